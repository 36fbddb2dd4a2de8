"""What `delta` returns; and a stored difference opened again over its base."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor

from workbench.arithmetic.difference.difference import Stored, packing_of
from workbench.arithmetic.matrices import places_of
from workbench.arithmetic.sources import of_subject, own_tensors, plain, weights_hash
from workbench.errors import BadInput
from workbench.results import Result
from workbench.subjects import Subject
from workbench.subjects.stored import survives

if TYPE_CHECKING:
    import plotly.graph_objects as go

#: Between a matrix' name and that of what is stored of it.
OF = "::"


class DeltaView(BaseModel):
    """What the viewer may choose without compressing again."""

    show: Literal["matrices", "spectrum"] = Field(
        "matrices", description="what each matrix loses, or spectra"
    )


class DeltaResult(Result):
    """A row a matrix; the arrays are the stored difference itself, `.subject` is what it gives back.

    `result.save(folder, with_subject=False)` writes the difference alone, with its fields and where it comes
    from; `reloaded(base, folder)` opens it over the base.
    """

    def view_model(self) -> type[BaseModel]:
        return DeltaView

    def figure(self, **view: Any) -> go.Figure:
        from workbench.figures import figure, line

        title = f"{self.facts['method']}: {self.facts['bits']:.3g} bits a weight"
        if DeltaView(**view).show == "spectrum" and "spectrum" in self.tables:
            fig = figure(
                title, "singular vectors", "energy of the difference up to here (share)", xaxis_type="log"
            )
            for name, part in list(self.tables["spectrum"].groupby("matrix", sort=False))[:7]:
                line(fig, part["index"].to_numpy() + 1, part["energy"].to_numpy(), str(name))
            return fig
        fig = figure(title, "matrix", "share of the difference's energy that is lost")
        line(
            fig, self.table["matrix"].to_numpy(), self.table["lost"].to_numpy(), "lost", mode="lines+markers"
        )
        return fig


def kept_as_they_are(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that are not compressed, in 16 bits where no number of theirs would be rounded."""
    return {name: narrowed(value) for name, value in tensors.items()}


def narrowed(value: Tensor) -> Tensor:
    for dtype in (torch.bfloat16, torch.float16):
        if survives(value, dtype):
            return value.to(dtype)
    return value


def stored_as_arrays(stored: Mapping[str, Stored], others: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """`NAME::part` of compressed matrices and `NAME::` of other tensors; bfloat16 as its bits."""
    found = {f"{name}{OF}{part}": value for name, each in stored.items() for part, value in each.items()}
    arrays = {key: value.numpy() for key, value in found.items()}
    for name, value in others.items():
        bits = value.dtype == torch.bfloat16
        key = f"{name}{OF}bfloat16" if bits else f"{name}{OF}"
        arrays[key] = (value.view(torch.int16) if bits else value).numpy()
    return arrays


def taken_apart(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, Stored], dict[str, Tensor]]:
    """What `stored_as_arrays` was made of."""
    stored: dict[str, Stored] = {}
    others: dict[str, Tensor] = {}
    for key, array in arrays.items():
        name, _, part = key.partition(OF)
        value = torch.from_numpy(np.array(array))
        if part == "bfloat16":
            others[name] = value.view(torch.bfloat16)
        elif not part:
            others[name] = value
        else:
            stored.setdefault(name, {})[part] = value
    return stored, others


@torch.no_grad()
def reloaded(base: Subject, folder: str | os.PathLike[str]) -> Subject:
    """The fine-tune that a saved result of `delta` stores, over its base; bit for bit what the run gave.

    `BadInput` for a result of another instrument, and for another base than the one it was made from.
    """
    result = Result.load(folder, open_subject=False)
    if not isinstance(result, DeltaResult):
        raise BadInput(f"folder: {str(folder)!r} holds a result of {result.instrument.name()}, not of delta")
    told = result.tables["lineage"]
    wanted = told["weights"][told["kind"] == "base"].iloc[0]
    mine = plain(base)
    source = of_subject(base)
    settings: Any = result.instrument
    places = places_of(mine, settings.layers)
    if weights_hash(source, dict.fromkeys(place.tensor for place in places.values())) != wanted:
        name = told["model"].iloc[0]
        raise BadInput(f"base: {base.name!r} has other weights than {name}, the base; open it over that one")
    options = {n: result.facts[n] for n in ("strength", "density") if n in result.facts}
    packing = packing_of(settings.method.with_options(**options))
    stored, others = taken_apart(result.arrays)
    for name, each in stored.items():
        place = places[name]
        place.write(packing.unpack(each, place.part(source.tensor(place.tensor))))
    held = own_tensors(mine.model)
    for name, value in others.items():
        if name in held and held[name].shape == value.shape:
            held[name].copy_(value)
    return mine
