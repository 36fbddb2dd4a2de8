from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import transformers
from torch import nn

import workbench
from tests.conftest import ARCHITECTURES, tiny
from workbench import BadInput
from workbench.pruning import Prune
from workbench.results import Result
from workbench.subjects import Mask, select


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saved_and_opened_again_gives_the_same_outputs(architecture, checkpoints, tmp_path):
    subject = workbench.subject(checkpoints[architecture], data="random")
    layer = subject.layers()[0]
    layer.attach(Mask(torch.rand(layer.shape) < 0.5))
    batch = next(subject.batches("test", 4))
    with torch.no_grad():
        want = subject.task.output(subject.model, batch)
    subject.save(tmp_path / "saved")
    again = workbench.subject(tmp_path / "saved")
    with torch.no_grad():
        got = again.task.output(again.model, batch)
    assert torch.equal(want, got)
    assert [type(c).__name__ for c in again.layers()[0].changes] == ["Mask"]
    plain = type(subject.model).from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.allclose(subject.task.output(plain, batch), want, atol=1e-6)


@pytest.mark.parametrize("step", range(1, 7))
def test_a_subject_of_an_interrupted_save_is_one_of_the_two(
    step: int, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 51, a further example: between two renames a folder held the files of two saves, and only
    `Result.load` finished the second.
    """
    on = workbench.subject(checkpoints["llama"], data="random", max_examples=16)
    results = [Prune(method="magnitude", sparsity=s, predict_examples=0).run(on) for s in (0.25, 0.75)]
    results[0].save(tmp_path / "r")
    left = [step]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise OSError(errno.ENOSPC, "full")
            return function(*given, **named)

        return call

    with monkeypatch.context() as patch:
        for name in ("replace", "rename"):
            patch.setattr(os, name, counted(getattr(os, name)))
        with contextlib.suppress(workbench.BadInput):
            results[1].save(tmp_path / "r")
    opened = workbench.subject(tmp_path / "r")
    zeros = float(torch.cat([(layer.weight == 0).float().flatten() for layer in opened.layers()]).mean())
    assert zeros == pytest.approx(Result.load(tmp_path / "r").facts["sparsity"], abs=1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_block_layers_leave_out_heads_and_embeddings(architecture):
    model = tiny(architecture)
    names = [layer.name for layer in select(model)]
    assert names and not any(word in name for name in names for word in ("lm_head", "classifier", "embed"))
    assert all(
        len(layer.shape) in (2, 3) and torch.equal(layer.weight, layer.weight) for layer in select(model)
    )


def test_plain_module_and_its_errors():
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(40, 4), torch.randint(3, (40,))
    subject = workbench.subject(net, data={"inputs": x, "labels": y})
    whole = torch.nn.functional.cross_entropy(
        net(subject.splits["test"]["inputs"]), subject.splits["test"]["labels"]
    )
    assert subject.evaluate("test", batch_size=3)["loss"] == pytest.approx(float(whole.detach()), abs=1e-6)
    with pytest.raises(BadInput, match="inputs"):
        workbench.subject(net)
    with pytest.raises(BadInput, match="layers: 'nothing'"):
        subject.layers("nothing")
    with pytest.raises(BadInput, match="no parameters"):
        workbench.subject(nn.Tanh(), data={"inputs": x, "labels": y})


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "computed",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.orthogonal,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
    ],
)
def test_weights_that_are_computed_are_named(computed):
    """Kind (section D): a traceback where a line would do; these were AttributeErrors of the first run."""
    net = nn.Sequential(computed(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 3))
    data = {"inputs": torch.randn(40, 4), "labels": torch.randint(3, (40,))}
    with pytest.raises(BadInput, match="subject: weight of '0' is computed"):
        workbench.subject(net, data=data)


def test_a_single_output_is_regression(checkpoints, tmp_path):
    """As in transformers: a classification head with one label predicts a number."""
    config = transformers.AutoConfig.from_pretrained(checkpoints["bert"], num_labels=1)
    transformers.AutoTokenizer.from_pretrained(checkpoints["bert"]).save_pretrained(tmp_path / "one")
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "one")
    subject = workbench.subject(tmp_path / "one", data="random")
    batch = next(subject.batches("test", 4))
    outputs = subject.task.output(subject.model, batch).detach().reshape(-1)
    assert float(subject.loss(batch).detach()) == pytest.approx(
        0.5 * float((outputs - batch["labels"]).square().mean())
    )
    (table := tmp_path / "table.csv").write_text("text,stars\n" + "a good one,high\nnot so good,low\n" * 20)
    with pytest.raises(BadInput, match="label-column: 'stars' must hold numbers"):
        workbench.subject(tmp_path / "one", data=table, text_column="text", label_column="stars")


def test_fingerprint_follows_weights_and_survives_saving(tmp_path, checkpoints):
    subject = workbench.subject(checkpoints["bert"], data="random")
    before = subject.fingerprint
    assert workbench.subject(checkpoints["bert"], data="random").fingerprint == before
    with torch.no_grad():
        subject.layers()[0].original.add_(1)
    assert subject.fingerprint != before


def test_broken_inputs_are_named(checkpoints, tmp_path):
    with pytest.raises(BadInput, match="unknown"):
        workbench.subject("digits-softmx")
    folder = tmp_path / "cut"
    folder.mkdir()
    for file in checkpoints["bert"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BadInput, match="not a complete safetensors"):
        workbench.subject(folder, data="random")
    weights.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(BadInput, match="pickle"):
        workbench.subject(folder, data="random")
    with pytest.raises(BadInput, match="needs data"):
        workbench.subject(checkpoints["bert"])
    table = tmp_path / "t.csv"
    pd.DataFrame({"text": ["a"] * 10}).to_csv(table, index=False)
    with pytest.raises(BadInput, match="label-column: 'label' is not in the data"):
        workbench.subject(checkpoints["bert"], data=table, text_column="text", label_column="label")


def test_a_python_file_gives_a_subject(tmp_path: Path):
    file = tmp_path / "net.py"
    file.write_text(
        "import torch, workbench\ndef make():\n"
        "    return workbench.subject(torch.nn.Linear(4, 2), data={'inputs': torch.randn(20, 4), 'labels': "
        "torch.randint(2, (20,))})\n"
    )
    assert workbench.subject(f"{file}:make").task.name == "classification"
    with pytest.raises(BadInput, match="no 'other'"):
        workbench.subject(f"{file}:other")


def test_a_seed_trains_another_network_and_is_refused_where_nothing_is_trained():
    first, second = (workbench.subject("digits-vit", epochs=1, seed=seed) for seed in (0, 1))
    assert first.fingerprint != second.fingerprint
    assert first.fingerprint == workbench.subject("digits-vit", epochs=1).fingerprint
    with pytest.raises(BadInput, match="seed"):
        workbench.subject("bytelm", seed=1)
