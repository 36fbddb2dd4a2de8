"""Real double precision: stock models cast some steps (norms, router and attention probabilities)
down to float32 inside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

NARROW = (torch.float32, torch.float16, torch.bfloat16)


class KeepDouble(TorchFunctionMode):
    """Casts of float64 tensors to a narrower float are left out,
    so a float64 model computes in float64 throughout.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        subject = args[0] if args else None
        if isinstance(subject, Tensor) and subject.dtype == torch.float64:
            name = getattr(func, "__name__", "")
            if name in ("float", "half", "bfloat16"):
                return subject
            if name == "to":
                args = (
                    subject,
                    *(torch.float64 if isinstance(a, torch.dtype) and a in NARROW else a for a in args[1:]),
                )
            if name in ("to", "softmax", "log_softmax", "sum", "mean") and kwargs.get("dtype") in NARROW:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)
