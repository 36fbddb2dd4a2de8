"""Binary attention and the low-rank estimates of its residual polynomials:
identities, gradients, training, storage.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import workbench
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.quantization import TrainQuantized
from workbench.quantization.activations.attention import AttentionCall, watching
from workbench.quantization.number.packing import quantizer_of
from workbench.quantization.trained.binary_attention import (
    BinaryAttention,
    ElasticSigns,
    binarise,
    scaled_signs,
    scaled_steps,
)

SHORT: dict[str, Any] = {
    "method": "bipft",
    "steps": 25,
    "batch_size": 32,
    "learning_rate": 2e-3,
    "test_examples": 64,
}


def test_scaled_signs_and_steps() -> None:
    """Two values; gradients 1 inside and 0 outside; that of the scale sum of signs
    (and LSQ's for a step of one bit) over the root of their number.
    """
    x = torch.tensor([-2.0, -0.3, 0.0, 0.4, 5.0], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    found = scaled_signs(x, scale)
    assert found.tolist() == [-0.5, -0.5, 0.5, 0.5, 0.5]
    towards = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    (found * towards).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 0.0]
    assert scale.grad is not None and float(scale.grad) == pytest.approx((-1 - 2 + 3 + 4 + 5) / 5**0.5)
    maps, scale = (
        torch.tensor([0.1, 0.24, 0.26, 0.9], requires_grad=True),
        torch.tensor(0.5, requires_grad=True),
    )
    found = scaled_steps(maps, scale)
    assert torch.allclose(found, torch.tensor([0.0, 0.0, 0.5, 0.5]))
    found.sum().backward()
    assert maps.grad is not None and maps.grad.tolist() == [1.0, 1.0, 1.0, 0.0]
    assert scale.grad is not None and float(scale.grad) == pytest.approx(
        (-0.2 - 0.48 + (1 - 0.52) + 1) / 4**0.5, rel=1e-5
    )


def test_estimates_that_are_exact_give_back_full_precision() -> None:
    """Where every token is a unit vector any function of a token is linear, so estimators of full rank can
    hold Q_b, K_b, R_q, R_k and R_v: the scores are then Q K^T and the values V,
    which is the polynomial's identity.
    """
    tokens = dim = 6
    query, key, value = (torch.randn(1, 1, tokens, dim) for _ in range(3))
    scales = torch.tensor([0.7, 0.4, 0.9, 0.3])
    parts = [scaled_signs(t, s)[0, 0] for t, s in zip((query, key, value), scales[:3], strict=True)]
    lost = [t[0, 0] - part for t, part in zip((query, key, value), parts, strict=True)]
    estimators = torch.stack(
        [t.mT for t in (parts[0], parts[1], *lost)]
    )  # (5, rank, tokens): a token's column is its estimate
    change = BinaryAttention(scales, estimators, torch.zeros(5, dim), torch.eye(dim))
    change.before(torch.nn.Identity(), (torch.eye(tokens)[None],))
    binary_query, binary_key = change.operands(query, key)
    residual = change.residual_scores()
    assert residual is not None and torch.allclose(
        binary_query @ binary_key.mT + residual, query @ key.mT, atol=1e-5
    )
    _, whole = change.weighed(torch.rand(1, 1, tokens, tokens), value)
    assert torch.allclose(whole, value, atol=1e-6) and change.hidden is None


def test_it_begins_as_plain_binary_attention_and_every_estimator_learns(checkpoints: dict[str, Path]) -> None:
    outputs = {}
    for rank in (0, 2):
        on = workbench.subject(checkpoints["llama"], data="random").copy()
        batch = next(on.batches("train", 4))
        binarise(on, on.layers(), rank, torch.Generator().manual_seed(0))
        with watching(on.model) as seen:
            outputs[rank] = on.task.output(on.model, batch)
        calls = [c for c in seen if isinstance(c, AttentionCall)]
        assert all(len(torch.unique(t)) == 2 for c in calls for t in (c.query, c.key, c.maps))
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(
        copy.deepcopy(on.model)(**on.task.inputs(batch), use_cache=False).logits, outputs[2]
    )
    changes = [c for layer in on.layers() for c in layer.changes if isinstance(c, BinaryAttention)]
    for _ in range(2):  # estimates of residuals first; those they multiply once they are no longer zero
        on.loss(batch).backward()
        with torch.no_grad():
            for change in changes:
                assert change.estimators is not None and change.estimators.grad is not None
                change.estimators.sub_(100 * change.estimators.grad)
    assert len(changes) == 2
    for change in changes:
        assert (
            change.estimators is not None
            and change.estimators.grad is not None
            and (change.estimators.grad.abs().amax((1, 2)) > 0).all()
        )
        assert change.scales.grad is not None and change.up is not None and change.up.grad is not None


@pytest.mark.parametrize("rank", [0, 1])
def test_bipft_trains_and_is_stored(rank: int, tmp_path: Path) -> None:
    on = workbench.subject("digits-vit")
    result = TrainQuantized(**SHORT, **{"method.rank": rank}).run(on, Progress(), cache=False)
    assert result.subject is not None
    assert result.table["train_loss"].iloc[-5:].mean() < result.table["train_loss"].iloc[:5].mean()
    layers = result.subject.layers()
    assert all(len(torch.unique(row)) == 2 for layer in layers for row in layer.weight)
    changes = [c for layer in layers for c in layer.changes]
    assert (
        sum(isinstance(c, ElasticSigns) for c in changes) == len(layers)
        and sum(isinstance(c, BinaryAttention) for c in changes) == 3
    )
    assert result.tables is not None
    learned = (
        18 * 2 + sum(2 * layer.shape[-1] for layer in layers) + 3 * 2 * (4 + rank * (5 * 48 + 5 + 48))
    )  # scales, shifts, estimators, in 16 bits
    assert (
        result.tables["widths"]["bytes"].sum()
        == sum(quantizer_of(layer).grid.bytes(layer.shape) for layer in layers) + learned
    )
    result.save(tmp_path / "out")
    assert workbench.subject(tmp_path / "out").evaluate("test", limit=64)["loss"] == pytest.approx(
        result.facts["loss"], abs=1e-5
    )


def test_refusals(checkpoints: dict[str, Path]) -> None:
    for fields, on, text in (
        ({"method": "l4q", "method.rank": 0}, workbench.subject("digits-vit"), "rank"),
        ({"method": "bipft", "layers": "*fc1"}, workbench.subject("digits-vit"), "layers"),
        ({"method": "bipft", "activation_bits": 4}, workbench.subject("digits-vit"), "activation_bits"),
        ({"method": "bipft"}, workbench.subject(checkpoints["t5"], data="random"), "cross-attention"),
        ({"method": "bipft"}, workbench.subject(checkpoints["mixtral"], data="random"), "fused"),
    ):
        with pytest.raises(BadInput, match=text):
            TrainQuantized(**fields).check(on)
