"""The floor of a divergence: the model against itself with the rounding noise of the type it is stored in."""

from __future__ import annotations

from typing import Any, ClassVar

import pandas as pd
import torch
from torch import Tensor, nn

from workbench.axis import parameter
from workbench.instruments import SubjectInstrument
from workbench.measures.language import TokenPairs, confidence_table
from workbench.measures.reference import Comparison, Reference, batch_of, check_kind, reference_of
from workbench.measures.size import storage_dtype
from workbench.progress import Progress
from workbench.results import Result
from workbench.subjects.subject import Subject


class Floor(SubjectInstrument):
    """How far is a model from itself? Its weights are moved within the rounding of the type they are stored
    in: a divergence that is not above this one says nothing about a compressed model.
    """

    summary_line: ClassVar[str] = "a model against itself, its weights moved within their storage's rounding"

    test_examples: int = parameter(64, "texts", ge=2, unit="examples")
    split: str = parameter("test", "split the texts come from")

    def check(self, on: Subject) -> None:
        on.split(self.split)
        check_kind(on)

    def _run(self, on: Subject, progress: Progress) -> Result:
        asked = reference_of(
            on, self.split, self.test_examples, progress, batch_size=batch_of(on, self.split)
        )
        found = None if asked is None else floor_of(asked, progress, self.seed)
        if found is None:
            return self.result(pd.DataFrame(), {})
        numbers = found.measures()
        if isinstance(found.pairs, TokenPairs):
            table = confidence_table(found.pairs)
        else:
            table = pd.DataFrame([{"subject": on.name} | numbers])
        distance, low, high = found.distance()
        facts: dict[str, Any] = {"floor": distance, "floor_low": low, "floor_high": high}
        stored = str(storage_dtype(on.model)).removeprefix("torch.")
        return self.result(table, {"reference": on.name, "stored_as": stored} | facts)


@torch.no_grad()
def jittered(model: nn.Module, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """Move every weight, in place, by a number drawn evenly from half a spacing of `dtype` below it to half a
    spacing above: the weights that storing in this type cannot tell from these. Where a parameter is itself
    of that type and holds nothing in between, one in twelve moves by a whole spacing, up or down, which has
    the same variance. Shared weights move once.
    """
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        flat = weight.view(-1) if weight.is_contiguous() else None
        for part in [weight] if flat is None else flat.split(1 << 22):
            draw = torch.rand(part.shape, generator=generator, dtype=torch.float32).to(part.device) - 0.5
            if torch.finfo(part.dtype).eps >= torch.finfo(dtype).eps:
                draw = torch.where(draw.abs() > 0.5 - 1 / 24, draw.sign(), 0.0)
            part.add_((draw * spacing(part, dtype)).to(part.dtype))
    return model


def spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of neighbouring numbers of a type at each value: eps times the power of two below it."""
    exponent = torch.frexp(values.float()).exponent - 1
    return torch.where(values == 0, 0.0, torch.finfo(dtype).eps * exponent.float().exp2())


def floor_of(reference: Reference, progress: Progress | None = None, seed: int = 0) -> Comparison | None:
    """The reference against a copy of its model whose weights moved within their storage's rounding."""
    on = reference.on
    copy = on.copy()
    moved = Subject(
        f"{on.name}, jittered",
        jittered(copy.model, storage_dtype(on.model), seed),
        on.task,
        on.splits,
        fingerprint=None,
    )
    return reference.against(moved, progress, seed)
