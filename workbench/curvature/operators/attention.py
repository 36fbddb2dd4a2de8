"""A path through every stock layer that has a second derivative,
switched on inside a context and restored after it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

_lock = threading.Lock()
_users = 0
_open = contextlib.ExitStack()


@contextlib.contextmanager
def twice_differentiable() -> Iterator[None]:
    """Run `scaled_dot_product_attention` as plain matrix products and recurrent layers without cuDNN.

    Fused attention and cuDNN's recurrent kernels have no second derivative. The switches are process-wide, so
    the context counts its users: runs in several threads share it,
    and the last one out restores what was set before.
    """
    global _users
    with _lock:
        if _users == 0:
            _open.enter_context(sdpa_kernel(SDPBackend.MATH))
            _open.enter_context(torch.backends.cudnn.flags(enabled=False))
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _open.close()
