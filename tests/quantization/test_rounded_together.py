"""Layers that read the same are rounded as one matrix, and get what each gets alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import workbench
from workbench.quantization import Quantize, rounding_order
from workbench.quantization.rounding.feedback import Factors
from workbench.quantization.rounding.problem import Problem
from workbench.quantization.rounding_order import Source, round_layer, round_layers
from workbench.statistics import InputMoments, second_moments
from workbench.subjects import Layer, Subject
from workbench.subjects.changes import Mask

ALONE = [["q_proj"], ["k_proj"], ["v_proj"], ["o_proj"], ["gate_proj"], ["up_proj"], ["down_proj"]]
TOGETHER = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
GPTQ = {"rounding": "gptq", "format": "uint4", "group_size": 16}


@pytest.fixture()
def llama(checkpoints: dict[str, Path]) -> Subject:
    return workbench.subject(checkpoints["llama"], data="random", max_length=12)


def sources(layers: list[Layer], moments: dict[str, InputMoments]) -> dict[str, Source]:
    factors = Factors()
    return {layer.name: Source(moments[layer.name], torch.Generator(), factors) for layer in layers}


def solved(
    settings: Quantize, layers: list[Layer], on: Subject, monkeypatch: pytest.MonkeyPatch
) -> list[list[str]]:
    """What was rounded as one matrix, by names; each layer is compared with itself alone."""
    moments, shapes = second_moments(on, layers, examples=16), list[torch.Size]()
    alone = [round_layer(settings, layer, sources(layers, moments)[layer.name]) for layer in layers]
    kept = rounding_order.round_matrix

    def watched(settings: Quantize, problem: Problem) -> tuple[Tensor, rounding_order.Grid]:
        shapes.append(problem.weight.shape)
        return kept(settings, problem)

    monkeypatch.setattr(rounding_order, "round_matrix", watched)
    found = list(round_layers(settings, layers, sources(layers, moments)))
    for (values, grid, term), (own, own_grid, own_term) in zip(found, alone, strict=True):
        assert torch.equal(values, own) and torch.equal(grid.scale, own_grid.scale)
        assert term is None and own_term is None
        assert (grid.zero is None) == (own_grid.zero is None)
        assert grid.zero is None or torch.equal(grid.zero, own_grid.zero)
    left, groups = list(layers), []
    for shape in shapes:
        group: list[Layer] = []
        while sum(layer.shape[0] for layer in group) < shape[0]:
            group.append(left.pop(0))
        groups.append([layer.name.rpartition(".")[2] for layer in group])
    return groups


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"format": "int3"},
        {"format": "int4", "range": "mse"},
        {"granularity": "channel"},
        {"format": "mxfp4"},
        {"format": "nf4"},
        {"rounding": {"name": "gptq", "act_order": True}},
    ],
    ids=str,
)
def test_rows_of_one_matrix_get_what_they_get_alone(fields, llama, monkeypatch) -> None:
    settings = Quantize(**GPTQ | fields)
    assert solved(settings, llama.layers("*layers.0.*"), llama, monkeypatch) == TOGETHER


@pytest.mark.parametrize(
    "fields",
    [
        {"granularity": "tensor"},
        {"format": "nvfp4"},
        {"rounding": "nearest"},
        {"salient": "columns"},
        {"transform": "hadamard"},
    ],
    ids=str,
)
def test_what_belongs_to_a_whole_matrix_is_found_for_each(fields, llama, monkeypatch) -> None:
    """A number that one layer's rounding takes of all its weights is not taken of another's too."""
    settings = Quantize(**GPTQ | fields)
    assert solved(settings, llama.layers("*layers.0.*"), llama, monkeypatch) == ALONE


def test_pruned_beside_dense_layers(llama, monkeypatch) -> None:
    layers = llama.layers("*layers.0.*")
    for name in ("k_proj", "gate_proj"):
        layer = next(layer for layer in layers if layer.name.endswith(name))
        layer.attach(Mask(torch.rand(layer.shape) < 0.5))
    assert solved(Quantize(**GPTQ), layers, llama, monkeypatch) == TOGETHER


def test_the_same_inputs_in_other_formats_stay_apart(llama, monkeypatch) -> None:
    settings = Quantize(**GPTQ, layer_bits={"*k_proj": 3, "*up_proj": 3})
    assert solved(settings, llama.layers("*layers.0.*"), llama, monkeypatch) == ALONE


def test_large_layers_stay_apart(llama, monkeypatch) -> None:
    monkeypatch.setattr(rounding_order, "TOGETHER", 1600)
    groups = [["q_proj", "k_proj"], *ALONE[2:]]
    assert solved(Quantize(**GPTQ), llama.layers("*layers.0.*"), llama, monkeypatch) == groups
