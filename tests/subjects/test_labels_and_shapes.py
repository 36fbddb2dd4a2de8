"""Labels, kinds of targets and shapes are matched by meaning, shown or refused; what is asked is obeyed."""

from __future__ import annotations

import json
import shutil
import unicodedata
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import workbench
from tests.subjects.test_checkpoints import change, letters
from workbench import BadInput
from workbench.subjects.classes import trained


@pytest.mark.parametrize(
    "names, labels",
    [
        (["-1", "0", "1"], ["1", "-1", "0"]),
        (["A", "a", "B"], ["A", "a", "B", "b"]),
        (["n\u00e9gatif", "positif"], [unicodedata.normalize("NFD", "n\u00e9gatif"), "Positif"]),
        (["x_y", "x-y"], ["x-y", "x_y"]),
        (["+", "-"], ["-", "+"]),
    ],
)
def test_a_name_is_matched_as_written_first(names, labels):
    """Kind: names were compared only after spelling was taken away, which made two classes one."""
    found = trained(labels, "label", dict(enumerate(names)))
    for label in labels:
        spelled = unicodedata.normalize("NFC", label)
        wanted = [n for n in names if n == spelled] or [
            n for n in names if n.casefold() == spelled.casefold()
        ]
        assert names[found.of(label)] == wanted[0]


def test_a_name_that_could_be_two_is_refused():
    """The same kind: without case, `x Y` is two of the classes; a number keeps its sign."""
    for names, label in ((["x_y", "x-y"], "X Y"), (["one", "1"], "-1")):
        with pytest.raises(BadInput, match="label-column: 'label' holds"):
            trained([label, names[0]], "label", dict(enumerate(names)))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A BERT without a head."""
    folder = tmp_path_factory.mktemp("base")
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 1}
    transformers.BertModel(transformers.BertConfig(vocab_size=61, **sizes)).save_pretrained(folder)
    return folder


def labelled(base: Path, to: Path, labels: list[Any], splits: list[str] | None = None, **more: Any) -> Any:
    """The base on thirty texts with these labels, in turn."""
    rows = [{"text": "abc " * (i % 5 + 1), "label": labels[i % len(labels)]} for i in range(30)]
    if splits is not None:
        rows = [row | {"split": splits[i % len(splits)]} for i, row in enumerate(rows)]
    (to / "t.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    columns = {"text_column": "text", "label_column": "label", "tokenizer": letters("[PAD]")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return workbench.subject(base, data=to / "t.jsonl", **columns, **more)


@pytest.mark.parametrize("labels, outputs", [([0.5, 1.25, -1], 1), ([[0.5, 1.0], [2.0, 3.0]], 2)])
def test_a_new_head_for_numbers(labels, outputs, base, tmp_path):
    """Kind: a new head had the two outputs of a classifier whatever the task."""
    on = labelled(base, tmp_path, labels, task="regression")
    assert on.model.config.num_labels == outputs and on.evaluate("test")["loss"] > 0
    assert workbench.subject(base, data="random", task="regression").model.config.num_labels == 1


@pytest.mark.parametrize(
    "labels, word", [([["a"], ["a", "b"]], "holds a list"), ([0.5, 1.5, 2], "give task=regression")]
)
def test_targets_of_another_kind_are_no_classes(labels, word, base, tmp_path):
    """Kind: lists and numbers became one class for each way that they are written."""
    with pytest.raises(BadInput, match=f"label-column: .*{word}"):
        labelled(base, tmp_path, labels)


@pytest.mark.parametrize("hidden", ["?", "unlabelled", "NaN", "-1"])
def test_a_hidden_label_is_no_class(hidden, base, tmp_path):
    """Kind: a word for `not known`, in test alone, became a class of its own."""
    splits = ["train", "train", "validation", "validation", "test"]
    on = labelled(base, tmp_path, ["n", "p", "p", "n", hidden], splits)
    assert on.labels == ["n", "p"] and "test is the validation split" in on.data_note
    assert "classes are n, p" in on.data_note


def test_random_inputs_are_as_many_and_as_long_as_asked(base):
    """Kind: `--data random` had 96 examples of 64 tokens whatever was asked."""
    on = workbench.subject(base, data="random", task="masked-lm", max_length=100, max_examples=20)
    assert on.split("test")["input_ids"].shape[1] == 100 and sum(map(on.size, on.splits)) == 20
    usual = workbench.subject(base, data="random", task="masked-lm")
    assert usual.split("test")["input_ids"].shape[1] == 64 and sum(map(usual.size, usual.splits)) == 96
    cut = workbench.subject(base, data="random", task="masked-lm", max_length=3000, max_examples=20)
    assert "texts are cut to 512 tokens" in cut.data_note


def test_what_is_wrong_is_said(base, checkpoints, tmp_path):
    """Kind: the accepted names were another field's, and a missing weight was said of a foreign shard."""
    place = Path(shutil.copytree(checkpoints["mixtral"], tmp_path / "m"))
    change(place, experts_implementation="org/name")
    with pytest.raises(BadInput, match="accepted: eager, batched_mm, grouped_mm; or leave it out"):
        workbench.subject(place, data="random")
    change(place, experts_implementation=...)
    (place / "model.safetensors").unlink()
    for where in ("../x.safetensors", "https://host/x.safetensors"):
        index = {"weight_map": {"lm_head.weight": where}}
        (place / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(BadInput, match="no file of its own folder"):
            workbench.subject(place, data="random")
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 1}
    config = transformers.CanineConfig(**sizes, num_hash_buckets=61, local_transformer_stride=16)
    transformers.CanineForSequenceClassification(config).save_pretrained(tmp_path / "c")
    with pytest.raises(BadInput, match="subject: Canine.* has no one table of tokens") as found:
        workbench.subject(tmp_path / "c", data="random")
    assert str(found.value).count("subject:") == 1


class Shaped(nn.Module):
    """(n, 3) -> (n, *shape)."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape
        self.linear = nn.Linear(3, torch.Size(shape).numel())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).view(-1, *self.shape)


@pytest.mark.parametrize(
    "shape, labels, loss, word",
    [
        ((2, 3), torch.rand(40, 3, 2), "squared_error", "shape .3, 2. and the output .2, 3."),
        ((6,), torch.rand(40, 2, 3), "squared_error", "give targets of the output's shape"),
        ((5,), torch.randint(5, (40,)).float(), "cross_entropy", r"are float32.*give labels.long"),
        ((5, 4), torch.randint(5, (40, 4)).double(), "cross_entropy", r"are float64.*give labels.long"),
        ((1, 4, 6), torch.zeros(40, 4, 6).long(), "cross_entropy", "one class"),
        ((1,), torch.zeros(40).long(), "cross_entropy", "one class"),
    ],
)
def test_targets_of_another_shape_or_type(shape, labels, loss, word):
    """Kind: targets that only have as many numbers as the output were measured against it silently."""
    with pytest.raises(BadInput, match=word):
        workbench.subject(Shaped(*shape), data={"inputs": torch.randn(40, 3), "labels": labels}, loss=loss)


def test_ones_at_the_end_of_a_shape_are_nothing():
    """The same kind: (n, 5, 1) are the targets of (n, 5)."""
    data = {"inputs": torch.randn(40, 3), "labels": torch.rand(40, 5, 1)}
    assert workbench.subject(Shaped(5), data=data, loss="squared_error").evaluate("test")["loss"] > 0
