"""A base and models made from it, as folders: weights moved by seeded noise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import tiny

#: (architecture, models) -> the folder of the base and those of the models.
Family = Callable[..., tuple[Path, list[Path]]]


def moved(model: torch.nn.Module, seed: int, size: float = 0.02) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    root = tmp_path_factory.mktemp("families")

    def made(architecture: str = "bert", count: int = 2) -> tuple[Path, list[Path]]:
        places = [root / architecture / str(i) for i in range(count + 1)]
        for i, place in enumerate(places):
            if not place.exists():
                model = tiny(architecture)
                (moved(model, i) if i else model).save_pretrained(place)
        return places[0], places[1:]

    return made
