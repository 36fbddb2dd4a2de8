"""Kind (fault 9): zeros that came in stay zeros, or the run says how many it revives."""

from __future__ import annotations

import pytest
import torch

import workbench
from workbench.progress import Progress
from workbench.pruning import Prune, TrainSparse
from workbench.quantization import Quantize, TrainQuantized
from workbench.training import Train


@pytest.fixture(scope="module")
def sparse():
    return Prune(method="magnitude", sparsity=0.7).run(
        workbench.subject("digits-vit"), Progress(), cache=False
    )


def zeros(on):
    return {layer.name: layer.weight.detach() == 0 for layer in on.layers()}


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "sparsegpt", "pattern": "2:4"},
        {"method": "sparsegpt", "pattern": "2:4 outputs"},
        {"method": "sparsegpt", "sparsity": 0.5},
        {"method": "magnitude", "sparsity": 0.5},
        {"method": "obert", "pattern": "2:4"},
        {"method": "magnitude", "sparsity": 0.5, "compensation": "least-squares"},
    ],
)
def test_a_second_pruning_keeps_the_zeros_of_the_first(sparse, fields):
    before = zeros(sparse.subject)
    found = Prune(**fields).run(sparse.subject, Progress(), cache=False)
    after = zeros(found.subject)
    assert all(bool(after[name][gone].all()) for name, gone in before.items())
    assert found.facts["sparsity"] >= 0.699 and "revived" not in found.facts


@pytest.mark.parametrize(
    ("instrument", "revives"),
    [
        (Quantize(rounding="gptq"), True),
        (Quantize(rounding="nearest"), False),
        (Quantize(format="binary"), True),
        (Prune(method="sparsegpt", pattern="2:4"), True),
        (Prune(method="magnitude", sparsity=0.1), False),
        (Train(steps=2), True),
        (TrainQuantized(steps=2, learning_rate=0.1), True),
        (TrainSparse(method="static", sparsity=0.1, steps=2), True),
        (Train(steps=2, start="random"), None),
    ],
)
def test_zeros_without_a_mask_that_get_a_value_are_counted(sparse, instrument, revives):
    """Pruned elsewhere: the zeros are in the weights, and nothing says that they have to stay. What trains
    is a further example: it revived all of them without a word.
    """
    on = workbench.subject("digits-vit")
    with torch.no_grad():
        for layer in on.layers():
            layer.write(sparse.subject.layers(layer.name)[0].weight.detach())
    before = zeros(on)
    found = instrument.run(on, Progress(), cache=False)
    after = zeros(found.subject)
    counted = sum(int((gone & ~after[name]).sum()) for name, gone in before.items())
    if revives is None:  # nothing of what came in was to stay
        assert "revived" not in found.facts and counted
        return
    assert found.facts.get("revived", 0) == counted and (counted > 0) == revives
