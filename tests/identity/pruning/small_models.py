"""Small models of stock classes with seeded weights, as subjects on random tokens. Their type is left open:
torch knows of what a model holds only that it is a tensor or a module.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from tests.identity.pairs import Draw
from workbench.subjects import Subject

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}


def llama(draw: Draw, **sizes: Any) -> Any:
    import transformers

    return seeded(draw, transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | sizes)))


def mixtral(draw: Draw, **sizes: Any) -> Any:
    """Four experts, of which each token goes to two."""
    import transformers

    sizes = SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2} | sizes
    return seeded(draw, transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes)))


def seeded(draw: Draw, model: Any) -> Subject:
    """The model with normal weights, its norms near one; one shape of all of them is kept."""
    import workbench

    shapes = len(draw.shapes)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = draw.normal(*parameter.shape)
            parameter.copy_(1 + drawn / 10 if parameter.ndim == 1 else drawn / parameter.shape[-1] ** 0.5)
    del draw.shapes[shapes + 1 :]
    with TemporaryDirectory() as folder:
        model.float().eval().save_pretrained(folder)
        return workbench.subject(folder, data="random")


@contextmanager
def watched(modules: dict[str, nn.Module], outputs: bool = False) -> Iterator[dict[str, list[Tensor]]]:
    """What goes into each of these modules, or comes out of it, at every call while entered."""
    found: dict[str, list[Tensor]] = {name: [] for name in modules}

    def keep(name: str, value: Any) -> None:
        found[name].append((value[0] if isinstance(value, tuple) else value).detach())

    hooks = [
        module.register_forward_hook(
            lambda module, given, made, name=name: keep(name, made if outputs else given)
        )
        for name, module in modules.items()
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
