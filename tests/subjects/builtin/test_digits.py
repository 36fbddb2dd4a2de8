"""The digits subjects against closed forms."""

import pytest
import torch
from torch.nn import functional as F

from workbench.progress import Progress
from workbench.subjects.builtin import digits


def test_hessian_at_zero_weights_has_the_published_spectrum():
    parts = digits.softmax()
    assert parts.task == "classification" and not parts.model.weight.any()
    inputs, labels = parts.splits["all"]["inputs"].double(), parts.splits["all"]["labels"]
    assert inputs.shape == (1797, 64)
    loss = lambda weight: F.cross_entropy(inputs @ weight.view(10, 64).T, labels)  # noqa: E731
    hessian = torch.func.hessian(loss)(torch.zeros(640, dtype=torch.float64))
    values = torch.linalg.eigvalsh(hessian).flip(0)
    assert values[:9] == pytest.approx([1.0455299687] * 9, abs=1e-9)
    assert values[9:27].tolist() == pytest.approx([0.0698833] * 9 + [0.0638585] * 9, abs=1e-7)
    assert values.sum().item() == pytest.approx(13.5127791110, abs=1e-9)
    assert (
        values.abs() < 1e-12
    ).sum() == 91  # 64 for the shift of all classes, 27 for pixels that span nothing


def test_trained_weights_are_stationary():
    parts = digits.softmax(trained=True)
    train = parts.splits["train"]
    weight = parts.model.weight.detach().double().requires_grad_()
    (
        F.cross_entropy(train["inputs"].double() @ weight.T, train["labels"]) + 0.5e-4 * weight.square().sum()
    ).backward()
    assert weight.grad.abs().max() < 1e-6
    test = parts.splits["test"]
    assert (parts.model(test["inputs"]).argmax(1) == test["labels"]).float().mean() > 0.94


@pytest.mark.parametrize("flat", [True, False])
def test_splits_partition_the_images(flat):
    splits = digits.digit_splits("x", flat)
    rows = {name: {tuple(row) for row in split["x"].flatten(1).tolist()} for name, split in splits.items()}
    assert len(rows["all"]) == 1797  # all images differ, so sets of rows are sets of examples
    assert rows["train"] | rows["validation"] | rows["test"] == rows["all"]
    assert not rows["train"] & rows["validation"] and not (rows["train"] | rows["validation"]) & rows["test"]
    assert rows["calibration"] < rows["train"]
    assert splits["train"]["x"].shape[1:] == ((64,) if flat else (1, 8, 8))


def test_vit_is_deterministic_and_cached(tmp_path, monkeypatch):
    states, steps = [], []
    for folder in ("a", "b", "a"):
        monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / folder))
        seen: list[int] = []
        progress = Progress()
        progress.show = lambda label, done, total, seen=seen: seen.append(done)
        torch.manual_seed(len(states))  # the caller's random state must not matter
        before = torch.get_rng_state()
        states.append(digits.vit(hidden=32, layers=1, epochs=2, progress=progress).model.state_dict())
        assert torch.equal(before, torch.get_rng_state())
        steps.append(seen)
    assert steps == [[0, 1, 2], [0, 1, 2], []]  # the third call loads
    for other in states[1:]:
        assert all(torch.equal(value, other[key]) for key, value in states[0].items())


def test_vit_learns(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    parts = digits.vit(progress=Progress())
    test = parts.splits["test"]
    with torch.no_grad():
        accuracy = (
            (parts.model(pixel_values=test["pixel_values"]).logits.argmax(1) == test["labels"]).float().mean()
        )
    assert accuracy > 0.93


def test_stopped_training_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    progress = Progress()
    progress.stop.set()
    with pytest.raises(KeyboardInterrupt, match="nothing was kept"):
        digits.vit(progress=progress)
    assert not list(tmp_path.rglob("*.safetensors"))
