"""What calibration data were is told with the result: counted here by hand."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

import workbench
from workbench.progress import Progress
from workbench.pruning import Prune
from workbench.quantization import Allocate, Quantize
from workbench.results import Result
from workbench.subjects import Subject
from workbench.subjects.examples.card import card
from workbench.subjects.tasks import TASK

LM = TASK.entries["causal-lm"].value()
LITTLE = {"predict_examples": 0, "test_examples": 4, "calibration_examples": 8, "group_size": 16}


class Tokenizer:
    """<s> 1, </s> 2 and two marks of a conversation."""

    eos_token_id = 2
    all_special_ids = (1, 2, 7, 8)
    all_special_tokens = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
    chat_template = "{% for m in messages %}<|im_start|>{{ m }}<|im_end|>{% endfor %}"


def columns(rows: list[list[int]], width: int) -> dict[str, torch.Tensor]:
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def by_hand(rows: list[list[int]]) -> str:
    state = hashlib.sha256()
    for row in rows:
        for number in (len(row), *row):
            state.update(number.to_bytes(8, "little"))
    return state.hexdigest()


def test_padded_texts_are_counted_without_their_padding() -> None:
    rows = [[1, 7, 30, 8, 2], [1, 31, 2], [1, 32, 33, 34, 35, 2]]
    found = card(LM, columns(rows, 6), 2, Tokenizer())
    assert found == {
        "examples": 2,
        "tokens": 8,
        "shortest": 3,
        "median": 4.0,
        "longest": 5,
        "layout": "padded",
        "end_of_text": 2.0,
        "template": 2.0,
        "other_marks": 2.0,
        "sha256": by_hand(rows[:2]),
    }


def test_padding_makes_no_other_text() -> None:
    rows = [[1, 30, 2], [31, 32]]
    short, long = columns(rows, 3), columns(rows, 9)
    long["input_ids"][0, 5] = 99  # behind the mask
    assert card(LM, short, 2)["sha256"] == card(LM, long, 2)["sha256"] == by_hand(rows)
    assert card(LM, columns([[1, 30], [2, 31, 32]], 3), 2)["sha256"] != by_hand(rows)


@pytest.mark.parametrize(
    ("rows", "layout"),
    [
        ([[30, 31, 2, 32], [33, 34, 35, 36]], "packed"),
        ([[1, 31, 32, 33], [1, 34, 35, 36]], "cut"),
        ([[2, 31, 32, 33], [34, 35, 2, 36]], "packed"),
        ([[40, 31, 32, 33], [40, 35, 2, 36]], "packed"),
        ([[1, 31, 32, 33], [1, 34, 35]], "padded"),
    ],
)
def test_windows_of_one_text_are_told_from_texts_that_were_cut(rows: list[list[int]], layout: str) -> None:
    found = card(LM, columns(rows, 4), len(rows), Tokenizer())
    assert found["layout"] == layout
    assert found["end_of_text"] == sum(row.count(2) for row in rows)


def test_a_mark_is_unknown_where_nobody_names_any() -> None:
    found = card(LM, columns([[1, 2], [3, 4]], 2), 2)
    assert found["end_of_text"] != found["end_of_text"] and found["layout"] == "packed"
    assert card(LM, columns([[1, 2], [3, 4]], 2), 2, config=type("C", (), {"eos_token_id": [2, 3]}))[
        "end_of_text"
    ] == pytest.approx(2)


def test_images_have_examples_and_a_hash(cache: Path) -> None:
    on = workbench.subject("digits-vit")
    first, second = (on.examples_card("calibration", n) for n in (8, 9))
    assert first["examples"] == 8 and "tokens" not in first and first["layout"] == ""
    assert len({first["sha256"], second["sha256"], on.examples_card("train", 9)["sha256"]}) >= 2


@pytest.fixture
def llama(checkpoints: dict[str, Path]) -> Subject:
    return workbench.subject(checkpoints["llama"], data="random")


@pytest.mark.parametrize(
    ("made", "decides", "examples"),
    [
        (Quantize(**LITTLE), "reported numbers", 8),
        (Quantize(**LITTLE, rounding="gptq"), "weights", 8),
        (Quantize(**LITTLE, range="mse"), "weights", 8),
        (Prune(method="magnitude", predict_examples=0, calibration_examples=8), "reported numbers", 8),
        (Prune(method="wanda", predict_examples=0, calibration_examples=8), "weights", 8),
        (
            Prune(
                method="obert",
                predict_examples=0,
                calibration_examples=4,
                **{"saliency.gradients": 6, "compensation.gradients": 6},
            ),
            "weights",
            6,
        ),
    ],
)
def test_a_result_tells_what_it_was_calibrated_on(
    llama: Subject, made: Any, decides: str, examples: int, tmp_path: Path
) -> None:
    result = made.run(llama, Progress(), cache=False)
    (row,) = result.tables["calibration"].to_dict("records")
    ids = llama.split("calibration")["input_ids"][:examples]
    assert (row["decides"], row["split"], row["examples"]) == (decides, "calibration", examples)
    assert row["tokens"] == ids.numel() and row["sha256"] == by_hand(ids.tolist())
    assert row["sha256"][:12] in result._repr_html_()
    again = Result.load(result.save(tmp_path / "kept", with_subject=False))
    assert again.calibration() == result.calibration() and len(again.calibration()) == 1


def test_the_shares_of_experts_are_summed_up(checkpoints: dict[str, Path]) -> None:
    on = workbench.subject(checkpoints["mixtral"], data="random")
    few = {"draws": 0, "widths": [2, 4], "calibration_examples": 4, "predict_examples": 6, "test_examples": 4}
    result = Allocate(sensitivity="output", group_size=16, **few).run(on, Progress(), cache=False)
    (row,) = result.tables["calibration"].to_dict("records")
    assert row["least_share"] == result.tables["experts"]["share"].min() and row["unreached"] == 0
    assert row["examples"] == 6 and f"least share {100 * row['least_share']:.2g} %" in result.calibration()[0]
