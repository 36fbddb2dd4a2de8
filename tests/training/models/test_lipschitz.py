"""The certified transformer: its bounds hold against searched slopes and against real differences,
its inputs have the length assumed.
"""

from __future__ import annotations

import pytest
import torch

from workbench.subjects import Subject
from workbench.subjects.tasks import CausalLM
from workbench.training import fit
from workbench.training.models.lipschitz import (
    Attention,
    LipschitzTransformer,
    Perceptron,
    largest_slope,
    spectral_norm,
)


def model(gain: float = 1.0) -> LipschitzTransformer:
    torch.manual_seed(0)
    made = LipschitzTransformer(11, width=8, layers=2, context=6)
    with torch.no_grad():
        for part in made.blocks.parameters():
            part.mul_(gain)
    return made


@pytest.mark.parametrize("gain", [0.5, 1.0, 2.0])
def test_no_slope_passes_the_certificate(gain: float) -> None:
    made = model(gain)
    ids = torch.randint(11, (16, 6))
    certificate = made.certificate()
    slope = largest_slope(made, ids)
    assert slope <= certificate and (gain > 1 or slope > 0.05 * certificate)
    x, y = made.embedded(ids), made.embedded(torch.randint(11, (16, 6)))
    length = lambda z: z.norm(dim=-1).amax(1)  # noqa: E731
    assert (length(x) <= 8**0.5 + 1e-5).all()
    assert (
        length(made.transformed(x) - made.transformed(y)) <= certificate * length(x - y) * (1 + 1e-6)
    ).all()


def test_a_linear_network_is_bounded_by_its_matrices_alone() -> None:
    """Attention whose queries are zero is a running mean of values:
    its bound is so sv, reached where all tokens move together.
    """
    torch.manual_seed(1)
    part = Attention(8)
    torch.nn.init.zeros_(part.query.weight)
    slope, largest = part.bound(1.0)
    assert slope == pytest.approx(
        spectral_norm(part.out) * spectral_norm(part.value)
    ) and largest == pytest.approx(slope)
    direction = torch.linalg.svd(part.out.weight @ part.value.weight)[2][0]
    moved = float(part(direction.expand(1, 5, 8)).norm(dim=-1).max().detach())
    product = float(torch.linalg.matrix_norm((part.out.weight @ part.value.weight).detach(), 2))
    assert moved == pytest.approx(product, rel=1e-5) and moved <= slope
    both = Perceptron(8)
    assert both.bound(2.0)[1] == pytest.approx(2 * both.bound(2.0)[0])


def test_causal_and_trained_within_its_cap() -> None:
    made = model()
    ids = torch.randint(11, (3, 6))
    changed = ids.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % 11
    torch.testing.assert_close(made(ids)[:, :4], made(changed)[:, :4])
    columns = {"input_ids": torch.arange(6).repeat(20, 1) % 11, "labels": torch.arange(6).repeat(20, 1) % 11}
    on = Subject("lipschitz", made, CausalLM(), {"train": columns, "validation": columns})
    run = fit(
        on,
        steps=30,
        batch_size=10,
        learning_rate=0.1,
        optimizer={
            "name": "muon",
            "scale": "none",
            "weight_map": "soft-cap",
            "cap": 1.5,
            "adamw_ratio": 0.1,
        },
    )
    assert run.history.loss.iloc[-1] < run.history.loss.iloc[0]
    assert max(spectral_norm(m) for m in made.blocks.modules() if isinstance(m, torch.nn.Linear)) <= 1.5 * (
        1 + 1e-4
    )
    assert largest_slope(made, ids) <= made.certificate()
