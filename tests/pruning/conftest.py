"""A network of two masked layers for the tests of training with masks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import workbench
from workbench.subjects import Layer, Mask, Subject

Pair = Callable[[tuple[int, int, int], Callable[[Layer], Tensor]], tuple[Subject, list[Layer]]]


@pytest.fixture()
def masked_pair() -> Pair:
    """make((inputs, hidden, classes), mask of a layer) -> the subject, with 40 random examples,
    and its two layers with a tanh between them.
    """

    def make(widths: tuple[int, int, int], mask: Callable[[Layer], Tensor]) -> tuple[Subject, list[Layer]]:
        torch.manual_seed(0)
        inputs, hidden, classes = widths
        net = nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, classes))
        subject = workbench.subject(
            net, data={"inputs": torch.randn(40, inputs), "labels": torch.randint(classes, (40,))}
        )
        layers = subject.layers("*")
        for layer in layers:
            layer.attach(Mask(mask(layer)))
        return subject, layers

    return make
