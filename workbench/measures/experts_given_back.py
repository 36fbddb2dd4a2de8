"""How much of a changed model's distance is made by experts that no calibration token reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from workbench.curvature.operators.weights import place_of, with_weights
from workbench.measures.reference import Reference, other_model
from workbench.progress import Progress
from workbench.subjects import Layer, Subject


def given_back(
    reference: Reference | None,
    on: Subject,
    layers: Sequence[Layer],
    dense: Mapping[str, Mapping[int, Tensor]],
    split: str,
    progress: Progress,
) -> dict[str, float]:
    """The distance of a changed model to the reference once with its weights and once with these experts'
    dense ones: `unseen_kl` (`unseen_distance`), what they make of it, exactly 0 where no token of the split
    reaches them either. Nothing where there are none, or nothing to compare with.

    dense : layer -> expert -> weight (out, in)
    """
    if not dense or reference is None or not reference.readable or progress.stopped:
        return {}
    places, values = [], []
    for layer in layers:
        if layer.name in dense:
            weight = layer.weight.detach().clone()
            for expert, value in dense[layer.name].items():
                weight[expert] = value
            places.append(place_of(layer))
            values.append(weight.mT if layer.transposed else weight)
    changed = other_model(reference.on, on)  # what is measured meanwhile is remembered with nobody
    whole = reference.against(changed, progress)
    with with_weights(on.model, places, values):
        repaired = reference.against(other_model(reference.on, on), progress)
    if whole is None or repaired is None or progress.stopped:
        return {}
    name = "distance" if "distance" in whole.measures() else "kl"
    return {f"unseen_{name}": whole.distance()[0] - repaired.distance()[0]}
