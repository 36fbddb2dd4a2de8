"""A model as a user writes one. It imports torch alone, as what its file imports is part of every key."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Blocks(nn.Module):
    """An input layer, three residual blocks and a head."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.start = nn.Linear(12, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(width, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        states = self.start(inputs)
        for block in self.blocks:
            states = states + block(states)
        outputs: Tensor = self.head(states)
        return outputs


class FeedForward(nn.Module):
    """Residual feed-forward blocks of the usual names, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for _ in range(2):
            block: Any = nn.Module()
            block.fc1, block.fc2 = nn.Linear(16, 24), nn.Linear(24, 16)
            self.blocks.append(block)
        self.head = nn.Linear(16, 5)

    def forward(self, states: Tensor) -> Tensor:
        block: Any
        for block in self.blocks:
            states = states + block.fc2(block.fc1(states).relu())
        outputs: Tensor = self.head(states)
        return outputs
