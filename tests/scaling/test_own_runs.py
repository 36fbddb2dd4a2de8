"""The project's own sweep: the committed table, what it supports, and the script that made it."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from workbench.names import methods
from workbench.scaling import ScalingFit, fit, law, load_runs

FOLDER = Path(__file__).resolve().parents[2] / "data" / "runs"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("scaling_sweep", FOLDER / "scaling_sweep.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_complete_and_says_where_it_comes_from(script):
    runs = load_runs("scaling-sweep").table
    cells = runs[runs.role == "fit"].groupby(["width", "depth"]).tokens.nunique()
    assert set(cells.index) == set(script.SIZES) and (cells == len(script.SHORT) + len(script.LONG)).all()
    assert (runs.role == "held out").sum() == 1
    held = runs[runs.role == "held out"].iloc[0]
    assert (
        held.flops > 3 * runs[runs.role == "fit"].flops.max()
        and held.params > 2 * runs[runs.role == "fit"].params.max()
    )
    assert (runs.flops == 6 * runs.params * runs.tokens).all()
    assert {"torch", "corpus", "python"} <= set(json.loads((FOLDER / "scaling_sweep.json").read_text()))


def test_the_law_predicts_the_held_out_run_within_two_percent():
    runs = load_runs("scaling-sweep").table
    small = runs[runs.role != "held out"]
    best = small.loc[small.groupby(["params", "tokens"]).loss.idxmin()]
    found = fit(law("chinchilla"), best)
    held = runs[runs.role == "held out"]
    error = np.abs(found.predict(held) / held.loss.to_numpy() - 1).max()
    assert error < 0.02
    assert found.certificate.idle == ("E",)  # these runs are far from any floor, and the certificate says so
    assert methods()["chinchilla"].evidence()["held_out_error"] == pytest.approx(error, rel=1e-3)


def test_the_instrument_reaches_the_same_prediction(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    runs = load_runs("scaling-sweep")
    largest = runs.table[runs.table.role == "fit"].flops.max()
    result = ScalingFit(fit_below=float(largest), lowest_per_cell=True, checks=False, resamples=50).run(runs)
    assert (
        result.facts["runs"] == 16
        and result.facts["held_out_runs"] == 1
        and result.facts["held_out_error"] < 0.02
    )


def test_a_run_is_reproducible_and_learns(script):
    text = tuple(
        np.frombuffer(b"the same line of text again and again, " * 6000, dtype=np.uint8) for _ in range(2)
    )
    first, second = (script.train(16, 1, 24_000, 1.6e-2, 0, text) for _ in range(2))
    assert first["loss"] == second["loss"] and first["flops"] == 6 * first["params"] * first["tokens"]
    assert first["loss"] < np.log(256) - 1
    assert script.size_of(16, 1) == first["params"] > first["non_embedding_params"]


def test_attention_is_causal_and_rotary(script):
    import torch

    model = script.ByteModel(32, 2).eval()
    tokens = torch.randint(256, (1, script.SEQUENCE))
    changed = tokens.clone()
    changed[0, 60:] = (changed[0, 60:] + 1) % 256
    with torch.inference_mode():
        a, b = model(tokens), model(changed)
    assert torch.allclose(a[:, :60], b[:, :60], atol=1e-5) and not torch.allclose(
        a[:, 60:], b[:, 60:], atol=1e-3
    )
    constant = torch.full((1, 8), 65)
    with torch.inference_mode():
        same = script.ByteModel(32, 2).eval()
        same.cos, same.sin = same.cos[:8], same.sin[:8]
        assert torch.allclose(
            same(constant)[0, 0], same(constant)[0, 5], atol=1e-4
        )  # equal bytes attend to equal values wherever they stand


def test_resuming_repeats_nothing(script, tmp_path, monkeypatch):
    copy = tmp_path / "runs.csv"
    copy.write_bytes((FOLDER / "scaling_sweep.csv").read_bytes())
    monkeypatch.setattr("sys.argv", ["scaling_sweep.py", "--out", str(copy), "--minutes", "1"])
    monkeypatch.setattr(script, "train", lambda *_: pytest.fail("a finished run was repeated"))
    script.main()
    assert copy.read_bytes() == (FOLDER / "scaling_sweep.csv").read_bytes()


def test_drawn_tables_are_what_the_script_draws_and_a_fit_finds_the_law_again():
    place = FOLDER / "draw_from_laws.py"
    spec = importlib.util.spec_from_file_location("draw_from_laws", place)
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    assert {file.stem for file in (place.parent / "drawn").glob("*.csv")} == set(draw.CONSTANTS)
    for name in draw.CONSTANTS:
        kept = load_runs(f"drawn/{name}").table
        for column, values in draw.table(name).items():
            assert kept[column].to_numpy() == pytest.approx(values, rel=1e-6)
    found = fit(law("weight-precision"), load_runs("drawn/weight-precision").table, starts=64)
    assert found.params["gw"] == pytest.approx(draw.CONSTANTS["weight-precision"]["gw"], rel=0.1)
