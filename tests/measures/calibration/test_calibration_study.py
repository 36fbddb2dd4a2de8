"""Kind: a study of many runs says what each of them alone says, and no run is done twice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import workbench
from tests.unfinished.stopping import Stopped
from workbench import BadInput
from workbench.cli import main
from workbench.measures import CalibrationStudy, compare
from workbench.measures.calibration import calibration_study
from workbench.measures.calibration.calibration_study import enough
from workbench.measures.calibration.chains import Chain, Study, beside, chain
from workbench.measures.calibration.domains import drawn
from workbench.measures.calibration.resampled import Resampled
from workbench.measures.intervals import block_bootstrap
from workbench.progress import Progress
from workbench.pruning import Prune
from workbench.quantization import Quantize
from workbench.results import Result
from workbench.subjects import Subject
from workbench.subjects.examples.random_values import randomised

SMALL: dict[str, Any] = {"amounts": [4, 8], "draws": 1, "test_examples": 8}
FEW: dict[str, Any] = {"predict_examples": 0, "test_examples": 0}


@pytest.fixture(scope="module", autouse=True)
def code_is_not_hashed() -> Iterator[None]:
    """Nothing here is about keys, and a study makes dozens."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("workbench.instruments", calibration_study.__name__):
            patch.setattr(f"{module}.code_version", lambda *_: "this code")
        yield


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    from tests.conftest import tiny

    folder = tmp_path_factory.mktemp("llama")
    tiny("llama").save_pretrained(folder)
    return workbench.subject(folder, data="random")


@pytest.fixture(scope="module")
def made(llama: Subject) -> Result:
    return CalibrationStudy(**SMALL).run(llama, Progress(), cache=False)


def rows(on: Subject, split: str, keep: Any) -> dict[str, torch.Tensor]:
    return {name: value[keep] for name, value in on.split(split).items()}


def by_hand(on: Subject, method: str, amount: int) -> Subject:
    order = torch.randperm(on.size("train"), generator=torch.Generator().manual_seed(0))
    given = on.with_split("calibration", rows(on, "train", order[:amount] if amount else slice(1)))
    given = given.with_split("test", rows(on, "test", slice(2)))
    some = max(amount, 1)
    instrument: Any = {
        "gptq": Quantize(format="int3", rounding="gptq", calibration_examples=some, **FEW),
        "nearest": Quantize(format="int3", calibration_examples=1, **FEW),
        "wanda": Prune(method="wanda", calibration_examples=some, predict_examples=0),
        "magnitude": Prune(method="magnitude", calibration_examples=1, predict_examples=0),
    }[method]
    found: Subject = instrument.run(given, Progress(), cache=False).subject
    return found


@pytest.mark.parametrize(
    ("method", "amount"),
    [("gptq", 4), ("gptq", 8), ("wanda", 4), ("wanda", 8), ("nearest", 0), ("magnitude", 0)],
)
def test_each_cell_is_what_the_instruments_give_one_by_one(
    llama: Subject, made: Result, method: str, amount: int
) -> None:
    changed = by_hand(llama, method, amount)
    texts = rows(llama, "test", slice(8))
    other = randomised(llama.task, texts, llama.model, llama.tokenizer, 0)
    draws = made.tables["draws"]
    mine = draws[(draws["method"] == method) & (draws["examples"] == amount)].set_index("domain")
    summed = made.table[(made.table["method"] == method) & (made.table["examples"] == amount)].iloc[0]
    for domain, columns, prefix in (("same", texts, ""), ("other", other, "second_")):
        dense = llama.with_split("test", columns)
        want = compare(dense, changed, "test").measures()
        for end in ("", "_low", "_high"):
            assert mine.loc[domain, f"kl{end}"] == pytest.approx(want[f"kl{end}"], rel=1e-9)
            assert summed[f"{prefix}kl{end}"] == pytest.approx(want[f"kl{end}"], rel=1e-9)
    assert summed["ratio"] == pytest.approx(mine.loc["other", "kl"] / mine.loc["same", "kl"])


def test_the_over_fit_is_beside_the_same_grid_without_data(made: Result) -> None:
    table = made.table.set_index(["method", "examples"])
    for method, free in (("gptq", "nearest"), ("wanda", "magnitude")):
        assert table.loc[(method, 8), "beside"] == free
        want = table.loc[(method, 8), "ratio"] / table.loc[(free, 0), "ratio"]
        assert table.loc[(method, 8), "overfit"] == pytest.approx(want)
        low, high = (table.loc[(method, 8), f"overfit_{end}"] for end in ("low", "high"))
        assert low < want < high and free in made.facts[f"overfit_{method}"]
        assert table.loc[(method, 8), ["above_largest_low", "above_largest_high"]].tolist() == [0, 0]
    assert made.facts["second_domain"] == "random tokens"


def test_enough_is_said_with_how_much_is_left() -> None:
    """`4` alone would say the same of a difference of nothing and of one that nobody can see."""
    columns = {"examples": [4, 8, 16], "kl": [3.0, 2.2, 2.0], "above_largest_high": [1.5, 0.5, 0.0]}
    told = [
        enough(pd.DataFrame(columns | {"above_largest_low": lows}))
        for lows in ([0.5, -0.1, 0.0], [-0.5, -0.1, 0.0], [0.5, 0.1, 0.0], [-0.5, 0.1, 0.0])
    ]
    assert told == [
        "8 (at most 25 % above 16)",
        "4 (at most 75 % above 16)",
        "16 or more",
        "16 or more",
    ]


def test_a_larger_draw_holds_the_smaller_one(llama: Subject) -> None:
    columns = llama.split("train")
    small, large = (drawn(columns, n, 3)["input_ids"] for n in (4, 8))
    assert torch.equal(large[:4], small) and not torch.equal(small, drawn(columns, 4, 4)["input_ids"])


def test_of_one_draw_the_interval_is_the_block_bootstrap_s() -> None:
    values, texts = np.random.default_rng(0).gamma(1.0, size=60), np.repeat(np.arange(12), 5)
    sums = np.bincount(texts, values)[None]
    means = Resampled(np.full(12, 5.0), 0).means(sums)
    assert tuple(np.quantile(means, [0.025, 0.975])) == pytest.approx(block_bootstrap(values, texts))
    far = np.concatenate([sums, 3 * sums])
    wide = np.quantile(Resampled(np.full(12, 5.0), 0).means(far), [0.025, 0.975])
    assert wide[1] - wide[0] > 2 * (np.quantile(means, 0.975) - np.quantile(means, 0.025))


def test_stopped_it_goes_on_and_measures_nothing_twice(
    llama: Subject, made: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    monkeypatch.setenv("WORKBENCH_CHECKPOINT_SECONDS", "0")
    ran: list[str] = []
    plain = calibration_study.Run.measured
    monkeypatch.setattr(
        calibration_study.Run, "measured", lambda self, cell: (ran.append(cell.name), plain(self, cell))[1]
    )
    asked = CalibrationStudy(**SMALL)
    partial = asked.run(llama, Stopped("calibrate", 3))
    assert partial.partial and len(partial.table) == 3 and partial.figure().data
    again = asked.run(llama, Progress())
    assert len(ran) == len(set(ran)) == len(made.table) and not again.partial
    pd.testing.assert_frame_equal(again.table, made.table, check_exact=True)
    assert again.facts == made.facts


def test_a_stop_inside_a_cell_leaves_the_cell_out(llama: Subject) -> None:
    """The progress of the method inside is another object; it has to hear of the Stop."""

    class Inside(Progress):
        def show(self, label: str, done: int, total: int | None) -> None:
            if label.startswith("calibrate") and done == 2:
                self.stop.set()

    result = CalibrationStudy(**SMALL).run(llama, Inside(), cache=False)
    assert result.partial and len(result.table) == 2


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"methods": "gptk"}, "gptk"),
        ({"methods": "spectrum"}, "methods: spectrum runs spectrum, which changes no model"),
        ({"methods": " , "}, "methods: is empty"),
        ({"methods": "gptq,gptq"}, "methods: gptq, gptq holds one twice"),
        ({"amounts": []}, "amounts: is empty"),
        ({"amounts": [0]}, "amounts: 0 is no number of examples"),
        ({"sources": "trian"}, "sources: 'trian' is no split; accepted: train"),
        ({"sources": "train,test"}, "sources: 'test' is measured on"),
        ({"sources": "validation", "second": "validation"}, "give second, which leaves out what is"),
        ({"second": "test"}, "second: 'test' is the split that the first domain is measured on"),
        ({"second": "texts.csv"}, "second: 'texts.csv' is neither a split (train"),
        ({"test_split": "tset"}, "split: 'tset' does not exist"),
        ({"methods": "quantize", "layers": "nothing*"}, "layers"),
    ],
)
def test_what_cannot_work_is_one_line_before_anything_runs(
    llama: Subject, fields: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration_study.Run, "all", lambda self: pytest.fail("it ran"))
    with pytest.raises(BadInput) as error:
        CalibrationStudy(**fields).run(llama, Progress(), cache=False)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_a_stranger_s_file_is_for_language_models(llama: Subject, tmp_path: Path) -> None:
    """Two further examples of what is refused: a file without texts, and one without a tokenizer."""
    (tmp_path / "other.csv").write_text("words\nx\n")
    with pytest.raises(BadInput, match="with a tokenizer"):
        CalibrationStudy(second=str(tmp_path / "other.csv")).run(llama, Progress(), cache=False)
    on = workbench.subject("bytelm")
    with pytest.raises(BadInput, match="no column text but words"):
        CalibrationStudy(second=str(tmp_path / "other.csv")).check(on)
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"line {n} " * 40}) + "\n" for n in range(9))
    )
    texts = calibration_study.Texts.of(
        CalibrationStudy(second=str(tmp_path / "text.jsonl"), sources="second"), on
    )
    assert texts.second.name == "text.jsonl" and texts.on.size("other") == 4
    assert len(texts.pools["second"]["input_ids"]) == 5


def test_widths_and_shares_reach_every_recipe() -> None:
    study = Study(bits=2, sparsity=0.25, layers="blocks", seed=0, device="cpu")
    awq = chain("awq", study, 7)
    assert [str(getattr(s, "format", "")) for s in awq.steps] == ["", "uint2"] and not awq.free
    assert str(awq.steps[0].kind.options.format) == "uint2"  # type: ignore[attr-defined]
    assert {s.calibration_examples for s in awq.steps} == {7}  # type: ignore[attr-defined]
    assert chain("obert", study, 7).steps[0].calibrates() == {"weights": ("calibration", 7)}  # type: ignore[attr-defined]
    assert chain("sparsegpt-2:4", study, 7).steps[0].sparsity == 0.5  # type: ignore[attr-defined]
    assert str(chain("smoothquant", study, 7).steps[-1].format) == "int8"  # type: ignore[attr-defined]
    assert chain("magnitude", study, 7).free and chain("hqq", study, 7).free
    found, twins = beside([chain(name, study, 7) for name in ("gptq", "wanda", "awq", "nearest")])
    assert twins == {"gptq": "nearest", "wanda": "magnitude", "awq": "nearest for awq"}
    assert [made.method for made in found if made.free] == ["nearest", "magnitude", "nearest for awq"]
    assert isinstance(found[0], Chain)


def test_random_tokens_keep_marks_padding_and_targets(llama: Subject) -> None:
    ids = torch.tensor([[1, 5, 6, 7, 0, 0], [1, 8, 9, 10, 11, 2]])
    mask = (torch.arange(6) < torch.tensor([[4], [6]])).long()
    columns = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    llama.model.config.eos_token_id = [1, 2]  # type: ignore[union-attr]
    made = randomised(llama.task, columns, llama.model, None, 0)
    assert torch.equal(made["input_ids"][mask == 0], ids[mask == 0])
    assert made["input_ids"][:, 0].tolist() == [1, 1] and int(made["input_ids"][1, 5]) == 2
    inside = made["input_ids"][:, 1:4]
    assert not torch.equal(inside, ids[:, 1:4]) and not torch.isin(inside, torch.tensor([1, 2])).any()
    assert torch.equal(made["labels"], made["input_ids"].masked_fill(mask == 0, -100))


def test_images_are_studied_as_well(tmp_path: Path) -> None:
    """A further example: no tokens, a classifier, and shuffled pixels as the second domain."""
    on = workbench.subject("digits-vit")
    study = CalibrationStudy(methods="wanda", amounts=[8], draws=2, test_examples=16, sources="train,random")
    result = study.run(on, Progress(), cache=False)
    assert result.table["data"].tolist() == ["none", "train", "random"]
    assert (result.table["kl"] > 0).all() and result.facts["enough_wanda"] == "not known: one amount"
    assert result.facts["unit"] == "nats an example"
    for show in ("divergence", "over-fit"):
        for data in ("train", "random"):
            fig = result.figure(show=show, data=data)
            assert fig.layout.xaxis.title.text and fig.layout.yaxis.title.text
    again = Result.load(result.save(tmp_path / "kept"))
    assert again.facts == result.facts and again.figure().to_json() == result.figure().to_json()


def test_the_cost_is_told_before(checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    source = ["--subject", str(checkpoints["llama"]), "--data", "random"]
    assert main(["run", "calibration-study", *source, "--amounts", "4", "--draws", "1", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("calibration-study holds") and "takes about" in told
