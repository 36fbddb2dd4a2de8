"""Input features that are rounded apart: the inputs that are wide are those whose weights are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import workbench
from workbench.names import method
from workbench.quantization.activations.activations import ActivationQuant
from workbench.quantization.number.formats import named
from workbench.quantization.number.packing import quantizer_of
from workbench.quantization.number.split_grid import SplitGrid
from workbench.quantization.quantize import Quantize
from workbench.quantization.rounding.problem import Problem
from workbench.quantization.transform.transform import in_coordinates

FEW = {"calibration_examples": 4, "predict_examples": 0, "test_examples": 0}


@pytest.mark.parametrize("name", ["outlier-split", "resq"])
def test_both_operands_of_a_wide_feature_are_wide(name: str, checkpoints: dict[str, Path]) -> None:
    """As in LLM.int8() and ResQ; a share of the inputs alone leaves the product at the narrow width."""
    ((_, fields),) = method(name).recipe
    on = workbench.subject(checkpoints["llama"], data="random")
    layers = Quantize(**fields, **FEW).run(on).subject.layers("blocks")
    for layer in layers:
        inputs = next(change for change in layer.changes if type(change) is ActivationQuant)
        grid = quantizer_of(layer).grid
        assert isinstance(grid, SplitGrid) and grid.wide.format.element.bits == 8
        assert inputs.wide is not None and torch.equal(inputs.wide, grid.mask[0])
        if grid.transform is not None:
            assert grid.transform.right is not None and torch.equal(inputs.right, grid.transform.right)


def test_outliertune_rounds_the_weight_that_holds_the_scales() -> None:
    """W diag(s) is what is put on the grid, s the features' largest inputs, as its recipe says."""
    ((_, fields),) = method("outliertune").recipe
    made = Quantize(**fields)
    weight, x = torch.randn(6, 8), torch.randn(40, 8) * torch.tensor([1.0, 2, 4, 8, 1, 1, 1, 32])
    largest = x.abs().amax(0)
    problem = Problem(weight, x.T @ x, named("int8"), "channel", largest=largest)
    moved, transform = in_coordinates(problem, made.transform)
    assert transform is not None
    torch.testing.assert_close(moved.weight, weight * largest, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(transform.inputs(x).abs().amax(0), torch.ones(8), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(transform.inputs(x) @ moved.weight.T, x @ weight.T, rtol=1e-4, atol=1e-3)
    assert str(made.activations) == "channel" and made.activations.options.format().affine
