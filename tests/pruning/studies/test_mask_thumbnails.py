"""A tile of a thumbnail is the mean of the weights below it."""

from __future__ import annotations

import numpy as np
import pytest

from workbench.pruning.studies.mask_thumbnails import thumbnails, tiled


@pytest.mark.parametrize("shape", [(7, 5), (48, 48), (100, 64), (97, 131)])
def test_tiles_are_means_and_none_is_lost(shape: tuple[int, int]) -> None:
    mask = np.random.default_rng(0).random(shape) < 0.3
    found = tiled(mask)
    assert found.shape == tuple(min(side, 48) for side in shape)
    rows, columns = (np.linspace(0, side, min(side, 48) + 1).astype(int) for side in shape)
    for i in (0, len(rows) // 2, len(rows) - 2):
        for j in (0, len(columns) - 2):
            part = mask[rows[i] : rows[i + 1], columns[j] : columns[j + 1]]
            assert found[i, j] == pytest.approx(part.mean())
    sizes = np.outer(np.diff(rows), np.diff(columns))
    assert (found * sizes).sum() == pytest.approx(mask.sum())


def test_a_matrix_a_method_and_a_layer() -> None:
    mask = np.ones((2, 3, 4), bool)  # experts one below the other
    fig = thumbnails("Masks", {"wanda": {"a.q": mask, "a.k": ~mask}, "obd": {"a.q": mask, "a.k": mask}}, "qk")
    assert len(fig.data) == 4 and np.asarray(fig.data[0].z).shape == (6, 4)
    assert [float(np.mean(trace.z)) for trace in fig.data] == [1, 0, 1, 1]
