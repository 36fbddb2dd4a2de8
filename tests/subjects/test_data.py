"""Tables as they are written, and labels matched to a checkpoint's classes by meaning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import transformers
from PIL import Image

import workbench
from tests.subjects.test_checkpoints import letters
from workbench import BadInput
from workbench.subjects.classes import trained, untrained
from workbench.subjects.rows import read_rows
from workbench.subjects.text import numbers

SIZES = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "vocab_size": 61,
}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    """A classifier whose classes are POSITIVE and NEGATIVE, in that order."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **SIZES, id2label={0: "POSITIVE", 1: "NEGATIVE"}, label2id={"POSITIVE": 0, "NEGATIVE": 1}
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    letters("[PAD]").save_pretrained(folder)
    return folder


def table(folder: Path, labels: list[Any], name: str = "t.csv", **more: list[Any]) -> Path:
    rows = pd.DataFrame(
        {"text": [f"abc {'b' * (i % 4)}" for i in range(len(labels))], "label": labels, **more}
    )
    rows.to_csv(folder / name, index=False)
    return folder / name


def of(folder: Path, data: Path, **options: Any) -> workbench.subjects.Subject:
    return workbench.subject(folder, data=data, text_column="text", label_column="label", **options)


@pytest.mark.parametrize(
    "labels",
    [
        ["negative", "positive"],
        ["Negative ", "POSITIVE"],
        [1, 0],
        ["1", "0"],
        [1.0, 0.0],
    ],
)
def test_the_order_of_classes_is_matched_by_meaning(labels, classifier, tmp_path):
    """Kind 6: class order between data and config, for names, numbers and numbers written as text."""
    on = of(classifier, table(tmp_path, labels * 20))
    assert on.labels == ["POSITIVE", "NEGATIVE"]
    want = [1, 0] * 20
    found = sorted(int(v) for split in on.splits.values() for v in split["labels"])
    assert found == sorted(want)
    first = on.split("train")
    texts = dict(zip(map(tuple, first["input_ids"].tolist()), first["labels"].tolist(), strict=True))
    again = of(classifier, table(tmp_path, ["NEGATIVE", "POSITIVE"] * 20, "u.csv"))
    other = again.split("train")
    assert texts == dict(zip(map(tuple, other["input_ids"].tolist()), other["labels"].tolist(), strict=True))
    if not isinstance(labels[0], str) or labels[0].strip().isdigit():
        assert "labels: 0 is POSITIVE, 1 is NEGATIVE" in on.data_note  # shown


@pytest.mark.parametrize("labels", [["negative", "positive"], [1, 0]])
def test_the_order_of_classes_of_images_is_matched_by_meaning(labels, tmp_path):
    """Kind 6: a picture that is black is NEGATIVE, in whatever order the column has its words."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=24,
        num_hidden_layers=1,
        image_size=8,
        patch_size=4,
        id2label={0: "POSITIVE", 1: "NEGATIVE"},
        label2id={"POSITIVE": 0, "NEGATIVE": 1},
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    processor = transformers.ViTImageProcessor(size={"height": 8, "width": 8})
    processor.save_pretrained(tmp_path / "vit")
    files = []
    for i in range(20):
        files.append(str(tmp_path / f"{i}.png"))
        Image.new("RGB", (8, 8), (255 * (i % 2),) * 3).save(files[-1])
    pd.DataFrame({"image": files, "label": labels * 10}).to_csv(tmp_path / "t.csv", index=False)
    on = workbench.subject(
        tmp_path / "vit", data=tmp_path / "t.csv", image_column="image", label_column="label"
    )
    assert on.labels == ["POSITIVE", "NEGATIVE"]
    for split in on.splits.values():
        dark = split["pixel_values"].flatten(1).mean(1) < 0
        assert torch.equal(split["labels"], dark.long())


@pytest.mark.parametrize(
    "labels, word",
    [
        (["good", "bad"], "holds bad, good, but the checkpoint's 2 classes are POSITIVE, NEGATIVE"),
        ([1, 2], "holds 1, 2"),
        (["negative", "positive", "positive-"], "holds negative, positive, positive-"),
    ],
)
def test_labels_of_unknown_meaning_are_refused(labels, word, classifier, tmp_path):
    with pytest.raises(BadInput, match=f"label-column: 'label' {word}"):
        of(classifier, table(tmp_path, labels * 20))


def test_classes_by_the_number_in_their_name():
    """Kind 6, another example: stars 1 to 5 are not the outputs 1 to 5."""
    stars = {i: f"{i + 1} star{'s' * (i > 0)}" for i in range(5)}
    found = trained([1, 5, "3"], "stars", stars)
    assert [found.of(v) for v in (1, "5", 3.0)] == [
        0,
        4,
        2,
    ] and found.note == "labels: 1 is 1 star, 3 is 3 stars, 5 is 5 stars"
    assert trained(["0", "1"], "label", {0: "1", 1: "0"}).place == {"0": 1, "1": 0}
    assert trained([0, 4], "label", {i: f"LABEL_{i}" for i in range(5)}).note == ""
    assert untrained(["10", "9", "x"], "label").names == ["9", "10", "x"]
    assert untrained(["10", "1_0", "\u0661\u0660"], "label").names == ["10", "1_0", "\u0661\u0660"]
    with pytest.raises(BadInput, match="must hold numbers"):  # fault 34, in data
        numbers(pd.Series(["0.5", "1_000"]), "stars")
    with pytest.raises(BadInput, match="holds negative, positive, but"):  # LABEL_0 may be either
        trained(["positive", "negative"], "label", {0: "LABEL_0", 1: "LABEL_1"})


def test_hidden_labels_are_no_class(classifier, tmp_path):
    """Kind 7: labels of -1 outside train are hidden, on a new head and on a trained one."""
    split = ["train"] * 20 + ["validation"] * 10 + ["test"] * 10
    data = table(tmp_path, ["x", "y"] * 15 + ["-1"] * 10, split=split)
    base = tmp_path / "base"
    transformers.BertModel(transformers.BertConfig(**SIZES)).save_pretrained(base)
    letters("[PAD]").save_pretrained(base)
    on = of(base, data)
    assert (
        on.labels == ["x", "y"] and "10 rows without a label (-1) are left out, all of test" in on.data_note
    )
    assert on.size("test") == on.size("validation") == 10
    real = table(tmp_path, [-1, 1] * 20, "signs.csv")
    assert of(base, real).labels == ["-1", "1"]  # classes of train
    data = table(tmp_path, [0, 1] * 15 + [-1] * 10, "numbers.csv", split=split)
    assert set(of(classifier, data).split("test")["labels"].tolist()) <= {0, 1}


def test_several_labels_of_one_text(classifier, tmp_path):
    """Kind 7: lists of labels, texts with several, and a 0 or 1 for each class say the same."""
    config = transformers.BertConfig(
        **SIZES,
        problem_type="multi_label_classification",
        id2label={0: "x", 1: "y", 2: "z"},
        label2id={"x": 0, "y": 1, "z": 2},
    )
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    letters("[PAD]").save_pretrained(tmp_path / "model")
    found = []
    for name, rows in {"a": [["z", "x"], []], "b": ["x|z", "y"], "c": [[1, 0, 1], [0, 1, 0]]}.items():
        lines = [{"text": f"abc{'b' * (i % 3)}", "label": rows[i % 2]} for i in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        on = of(tmp_path / "model", tmp_path / f"{name}.jsonl")
        assert on.task.name == "multi-label-classification" and on.evaluate("test")["loss"] > 0
        found.append(sorted(map(tuple, torch.cat([s["labels"] for s in on.splits.values()]).tolist())))
    assert found[1] == found[2] and set(found[0]) == {(1, 0, 1), (0, 0, 0)}


def test_words_with_labels(tmp_path):
    """Kind 6 for tokens: a word's first token carries its class, by name."""
    names = {0: "O", 1: "B-PER"}
    config = transformers.BertConfig(**SIZES, id2label=names, label2id={v: k for k, v in names.items()})
    transformers.BertForTokenClassification(config).save_pretrained(tmp_path / "model")
    letters("[PAD]").save_pretrained(tmp_path / "model")
    lines = [{"text": ["ab", "c"], "label": ["b-per", "o"]} for _ in range(20)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    on = of(tmp_path / "model", tmp_path / "t.jsonl")
    assert on.split("test")["labels"][0, :4].tolist() == [1, -100, 0, -100]
    lines[3]["label"] = ["o"]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(BadInput, match="label-column: row 4 .* two lists of one length"):
        of(tmp_path / "model", tmp_path / "t.jsonl")


def test_what_is_written_is_what_is_read(classifier, tmp_path):
    """Kind 27: None, NA and null are labels like others; 007 and 1e5 are texts; empty is empty."""
    (tmp_path / "t.csv").write_text("text,label\n" + "007,None\n1e5,NA\ntrue,null\n" * 5)
    rows, _ = read_rows(tmp_path / "t.csv", 100, 0)
    assert rows["text"].tolist()[:3] == ["007", "1e5", "true"] and set(rows["label"]) == {
        "None",
        "NA",
        "null",
    }
    (tmp_path / "t.jsonl").write_text('{"text": "007", "label": "01", "date": "2020-01-01"}\n' * 9)
    rows, _ = read_rows(tmp_path / "t.jsonl", 100, 0)
    assert rows.iloc[0].tolist() == ["007", "01", "2020-01-01"]
    with pytest.raises(BadInput, match="row 2 of column 'label' is empty"):
        of(classifier, table(tmp_path, ["positive", "", "negative"] * 5))


def test_json_in_one_array(classifier, tmp_path):
    """Kind 28: an array of objects is a table; anything else in it is named."""
    rows = [{"text": "abc", "label": name} for name in ("positive", "negative") * 10]
    (tmp_path / "t.json").write_text(json.dumps(rows, indent=1))
    assert of(classifier, tmp_path / "t.json").size("train") == 12
    for text, word in (
        ("[1, 2]", "entry 1 is int, an object with the columns is needed"),
        ('[["a", "b"]]', "entry 1 is list"),
        ('{"text": "a"}\n"b"', "entry 2 is str"),
        ("{", "could not be read"),
        ("[" * 100000, "could not be read"),
        ("", "too few|is not in the data"),
    ):
        (tmp_path / "u.json").write_text(text)
        with pytest.raises(BadInput, match=word):
            of(classifier, tmp_path / "u.json")


def test_names_of_classes_on_the_hub(monkeypatch):
    """Kind 6: a hub data set says what its numbers mean."""
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    part = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, -1]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"train": part})
    rows, _ = read_rows("hf:some/set", 10, 0)
    assert dict(zip(rows["text"], rows["label"], strict=True)) == {"a": "neg", "b": "pos", "c": -1}
