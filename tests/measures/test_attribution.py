"""Which part broke it: one part at a time in the dense model, against whole models built by hand."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import workbench
from tests.measures.test_measures import examples, on
from tests.unfinished.stopping import Stopped
from workbench import BadInput
from workbench.cli import main
from workbench.measures import Attribution, compare
from workbench.measures.attribution import said
from workbench.measures.attribution_result import beside_usual, by_role, recorded_roles, unusual
from workbench.measures.parts import (
    OutputScores,
    noisy,
    parts_of,
    role_of,
    second_order,
    tensors_of,
    weight_error,
)
from workbench.measures.suffix import Suffix
from workbench.progress import Progress
from workbench.subjects import Mask, Subject
from workbench.unfinished.finished_parts import FinishedParts, read

ASKED = Attribution(changed="at hand", test_examples=8)
#: A weight of each architecture, in its second block.
ONE = {
    "bert": "bert.encoder.layer.1.intermediate.dense",
    "gpt2": "transformer.h.1.attn.c_attn",
    "llama": "model.layers.1.mlp.down_proj",
    "mixtral": "model.layers.1.self_attn.v_proj",
    "t5": "decoder.block.1.layer.0.SelfAttention.k",
}


def altered(dense: Subject, names: list[str] | None = None, amount: float = 0.3) -> Subject:
    """A copy with noise on the weights of these modules; of all matrices in the blocks by default."""
    made = dense.copy()
    torch.manual_seed(5)
    wanted = [layer.name for layer in made.layers()] if names is None else names
    with torch.no_grad():
        for name in wanted:
            for parameter in made.model.get_submodule(name).parameters():
                parameter += amount * parameter.std(correction=0) * torch.randn_like(parameter)
    made.name = "altered"
    return made


def lines(result: workbench.Result, level: str) -> pd.DataFrame:
    return result.table[result.table["level"] == level].set_index("part")


@pytest.mark.parametrize("architecture", ONE)
def test_the_only_changed_module_has_everything(architecture):
    dense = on(architecture, examples(architecture), 0.2)
    changed = altered(dense, [ONE[architecture]])
    result = ASKED.between(dense, changed)
    for level in ("block", "role", "module"):
        found = lines(result, level)
        assert len(found) == 1 and found["share"].iloc[0] == 1
        assert found["kl"].iloc[0] == pytest.approx(result.facts["full"], rel=1e-9)
    assert result.facts["no_swap"] == 0
    assert result.facts["blocks_additivity"] == pytest.approx(1) == result.facts["modules_additivity"]
    assert role_of(ONE[architecture]).endswith(lines(result, "module")["role"].iloc[0])
    back = result.tables["given_back"]
    assert (back["predicted"] == 0).all() and (back["measured"] == 0).all()


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
def test_each_part_is_what_a_model_with_only_this_part_changed_gives(architecture):
    """Parts against `compare` with a whole model built by hand, in other batches."""
    dense = on(architecture, examples(architecture), 0.2)
    changed = altered(dense)
    result = ASKED.between(dense, changed)
    for level in ("block", "module"):
        for name, row in lines(result, level).iloc[::3].iterrows():
            built = dense.copy()
            built.model.get_submodule(name).load_state_dict(changed.model.get_submodule(name).state_dict())
            found = compare(dense, built, limit=8, batch_size=3).measures()["kl"]
            assert row["kl"] == pytest.approx(found, rel=1e-4, abs=1e-7), name
    assert len(lines(result, "module")) == len(dense.layers())
    worst = result.tables["given_back"].set_index("level")["parts"]["module"].split(", ")
    repaired = changed.copy()
    for name in worst:
        repaired.model.get_submodule(name).load_state_dict(dense.model.get_submodule(name).state_dict())
    measured = compare(dense, repaired, limit=8).measures()["kl"]
    assert result.facts["repaired_modules_measured"] == pytest.approx(measured, rel=1e-4, abs=1e-7)
    shares = lines(result, "module")["share"]
    assert worst == list(shares.sort_values(ascending=False).index[:3])
    assert result.facts["repaired_modules_predicted"] == pytest.approx(
        result.facts["full"] * (1 - shares[worst].sum())
    )


def test_changes_on_weights_are_swapped_with_them():
    """A mask on one of GPT-2's transposed weights; the changed subject keeps it."""
    dense = on("gpt2", examples("gpt2"), 0.2)
    changed = dense.copy()
    layer = next(layer for layer in changed.layers() if layer.name == ONE["gpt2"])
    layer.attach(Mask(torch.rand(layer.shape) < 0.5))
    result = ASKED.between(dense, changed)
    assert list(lines(result, "module").index) == [ONE["gpt2"]]
    assert result.facts["full"] == pytest.approx(compare(dense, changed, limit=8).measures()["kl"], rel=1e-4)
    assert lines(result, "module")["weight_error"].iloc[0] == pytest.approx(0.5, abs=0.1)
    assert layer.changes and result.facts["modules_additivity"] == pytest.approx(1)


def test_of_the_modules_only_those_of_the_worst_block():
    dense = on("llama", examples("llama"), 0.2)
    changed = altered(dense)
    every, some = (ASKED.with_fields(parts=parts).between(dense, changed) for parts in ("modules", "worst"))
    blocks = lines(some, "block")
    pd.testing.assert_frame_equal(blocks, lines(every, "block"))
    worst = blocks["kl"].idxmax()
    modules = lines(some, "module")
    assert (
        set(modules["block"]) == {worst} and len(modules) == 7 and modules["share"].sum() == pytest.approx(1)
    )
    want = lines(every, "module").loc[modules.index]
    assert modules["kl"].to_numpy() == pytest.approx(want["kl"].to_numpy())
    assert some.facts["worst_block_modules_sum"] == pytest.approx(want["kl"].sum())
    assert "modules_additivity" not in some.facts and list(some.tables["given_back"]["level"]) == ["block"]
    drawn = some.figure(show="budget")
    assert list(drawn.data[2].y) == modules["kl"].tolist() and worst[-1] in drawn.layout.xaxis2.title.text
    assert drawn.data[2].meta["clicked"][0].startswith(modules.index[0])


def test_small_changes_add_up_and_are_predicted():
    trained = workbench.subject("bytelm")
    dense = trained.with_split("test", {k: v[:2, :96] for k, v in trained.split("test").items()})
    changed = altered(dense, amount=0.1)
    before = dense.fingerprint
    result = Attribution(changed="at hand", noise=False, give_back=2).between(dense, changed)
    assert result.facts["prediction"] == "reliable: the parts add up"
    assert (result.tables["given_back"]["error"] < 0.2).all()
    assert dense.fingerprint == before and result.facts["no_swap"] == 0
    scores = result.tables["scores"].set_index(["level", "score"])["rank_correlation"]
    assert scores["module", "output_error"] > 0.2


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_small_changes_are_predicted_from_gradients(architecture):
    """1/2 d.G d of each part against the divergence that it makes, to four standard errors of the draws.
    Matrices alone change, as compression does it: biases are not in the prediction.
    """
    dense = on(architecture, examples(architecture), 0.2)
    changed = altered(dense, amount=0.02)
    own = dict(dense.model.named_parameters())
    for name, value in changed.model.named_parameters():
        if value.ndim == 1:
            value.data = own[name].data.clone()
    result = ASKED.between(dense, changed)
    parts = [part for part in parts_of(dense, changed) if part.level != "role"]
    draws = 60
    found = second_order(dense, changed, parts, "test", 8, draws, 0, Progress())
    for part, predicted in zip(parts, found, strict=True):
        measured = lines(result, part.level).loc[part.name, "kl"]
        assert predicted == pytest.approx(measured, rel=0.05 + 4 * (2 / (8 * draws)) ** 0.5), part.name
    some = lines(result, "module")["second_order"]
    assert (some > 0).all() and "second_order" in set(result.tables["scores"]["score"])
    without = ASKED.with_fields(second_order=False).between(dense, changed)
    assert without.table["second_order"].isna().all()


def test_a_module_far_above_what_is_usual_for_its_kind_is_named():
    roles = ["self_attn.q_proj", "mlp.down_proj"] * 8
    table = pd.DataFrame({"level": "module", "block": [f"b.{i // 2}" for i in range(16)], "role": roles})
    table["part"] = table["block"] + "." + table["role"]
    table["kl"] = [1.0] * 15 + [300.0]
    shown = beside_usual(table, True)
    assert unusual(shown).startswith("b.7.mlp.down_proj (15.2 times the mean; usual for down_proj: ")
    assert unusual(beside_usual(table, False)) == ""
    bands = by_role(table).set_index("role")
    assert bands.loc["q_proj", "high"] == pytest.approx(1 / table["kl"].mean()) and bands["parts"].sum() == 16
    assert set(recorded_roles()["role"]) >= set(bands.index)


def test_what_does_not_add_up_is_called_unreliable():
    dense = on("llama", examples("llama"))
    result = ASKED.between(dense, altered(dense, amount=4.0))
    assert result.facts["prediction"].startswith("unreliable: full / sum of the blocks 0.")
    assert "(unreliable)" in result.figure().layout.title.text
    assert said({"blocks": 1.25, "modules": 0.8}).startswith("reliable")
    assert said({"blocks": 1.0, "modules": 1.3}) == (
        "unreliable: full / sum of the modules 1.30, outside 0.8 to 1.25"
    )


def test_without_distributions_on_disk_the_numbers_are_the_same():
    dense = on("gpt2", examples("gpt2"))
    changed = altered(dense)
    one = ASKED.between(dense, changed)
    two = ASKED.with_fields(disk=0).between(dense, changed)
    pd.testing.assert_frame_equal(one.table, two.table, rtol=1e-5, atol=1e-7)
    assert two.facts["no_swap"] == 0


def test_only_what_follows_is_computed(monkeypatch):
    """A swap in block i runs the blocks from i on: the calls of every block are counted."""
    dense = on("llama", examples("llama"))
    changed = altered(dense)
    calls = {name: 0 for name, _ in dense.blocks()}
    suffix = Suffix(dense, "test", 8, Progress(), 2048)
    assert suffix.order == list(calls)
    for subject in (dense, changed):
        for name, block in subject.blocks():
            block.mlp.register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
    suffix.advance(suffix.order[0])
    calls |= dict.fromkeys(calls, 0)
    last = suffix.order[1]
    assert suffix.ask({last: changed.model.get_submodule(last)}) is not None
    assert calls == {suffix.order[0]: 0, last: suffix.batches}


def test_noise_has_the_norm_of_the_change():
    dense = on("gpt2", examples("gpt2"))
    changed = altered(dense)
    part = next(part for part in parts_of(dense, changed) if part.level == "block")
    made = noisy(dense.model, changed.model, part, 0)
    assert len(made) == 4
    for name, module in made.items():
        one, two = (tensors_of(s.model.get_submodule(name)) for s in (dense, changed))
        for tensor, value in tensors_of(module).items():
            norms = [(other - one[tensor]).norm() for other in (value, two[tensor])]
            assert norms[0] == pytest.approx(float(norms[1]), rel=1e-4)
            assert not torch.equal(value, two[tensor]) or norms[1] == 0
    assert weight_error(dense.model, changed.model, part) == pytest.approx(0.09, rel=0.2)


def test_output_scores_are_those_of_the_module_on_its_inputs():
    torch.manual_seed(0)
    dense, changed = nn.Linear(4, 3), nn.Linear(4, 3)
    x = torch.randn(10, 4)
    with OutputScores({"one": (dense, changed)}) as scores:
        dense(x)
    error, turn = scores.of(["one"])
    one, two = dense(x).detach().double(), changed(x).detach().double()
    assert error == pytest.approx(float((two - one).square().sum() / one.square().sum()), rel=1e-5)
    cosine = torch.nn.functional.cosine_similarity(one.flatten(), two.flatten(), 0)
    assert turn == pytest.approx(1 - float(cosine), rel=1e-5)
    assert np.isnan(scores.of(["other"])).all()


def test_a_block_of_another_build_is_swapped_as_a_whole():
    """Heads or channels removed: such a block has no modules whose places could be taken."""
    dense = on("llama", examples("llama"))
    changed = altered(dense, [ONE["llama"].replace("1.mlp", "0.mlp")])
    block = changed.model.model.layers[1].mlp
    for name, shape in (("gate_proj", (40, 32)), ("up_proj", (40, 32)), ("down_proj", (32, 40))):
        held = getattr(block, name)
        held.weight = nn.Parameter(held.weight[: shape[0], : shape[1]].clone())
    result = ASKED.between(dense, changed)
    assert list(lines(result, "block").index) == ["model.layers.0", "model.layers.1"]
    assert list(lines(result, "module")["block"]) == ["model.layers.0"]
    assert np.isfinite(result.facts["full"]) and result.figure().data[0].z.shape[0] == 2


def test_what_is_outside_of_the_blocks_is_a_part_too():
    dense = on("llama", examples("llama"))
    changed = altered(dense, ["lm_head", "model.norm", ONE["llama"]])
    result = ASKED.between(dense, changed)
    found = lines(result, "block")
    assert "outside.lm_head" in found.index and found["kl"]["outside.lm_head"] > 0
    drawn = result.figure(show="budget")
    assert "lm_head" in drawn.data[0].x


def test_experts_of_one_block_are_one_part():
    assert role_of("mlp.experts.11.up_proj") == "mlp.experts.*.up_proj"
    assert (
        role_of("layer.0.SelfAttention.q") == "layer.*.SelfAttention.q" != role_of("layer.0.SelfAttention.k")
    )


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("WORKBENCH_CHECKPOINT_SECONDS", "0")
    dense = on("llama", examples("llama"))
    dense.save(tmp_path / "dense")
    altered(dense).save(tmp_path / "changed")
    return tmp_path


@pytest.mark.parametrize("moves", [1, 2, 9])
def test_killed_and_resumed_gives_the_same_numbers(saved, moves, monkeypatch):
    """Kind: what takes long goes on where it was stopped. A line cut off counts for nothing."""
    asked = Attribution(changed=str(saved / "changed"), test_examples=4)
    dense = workbench.subject(saved / "dense")
    whole = asked.run(dense, Progress(), cache=False)
    label = "modules" if moves > 2 else "blocks"
    partial = asked.run(dense, Stopped(label, moves))
    assert partial.partial and len(partial.table) < len(whole.table)
    (kept,) = (saved / "cache" / "unfinished").rglob(FinishedParts.FILE)
    known = read(kept)
    with kept.open("a") as file:
        file.write('["module:half a li')
    asks = []
    plain = Suffix._ask
    monkeypatch.setattr(Suffix, "_ask", lambda self, *a, **k: (asks.append(a), plain(self, *a, **k))[1])
    again = asked.run(dense, Progress())
    assert again.facts == whole.facts
    pd.testing.assert_frame_equal(again.table, whole.table, check_exact=True)
    for name, table in whole.tables.items():
        pd.testing.assert_frame_equal(again.tables[name], table, check_exact=True)
    swaps = [name for name in known if not name.startswith(("output:", "second order"))]
    assert (
        len(asks) + len(swaps) == 2 + 1 + 2 * 2 + 7 + 14 + 2
    )  # controls, blocks, noise, roles, modules, back
    assert not kept.exists() and len(swaps) >= moves


def test_saved_read_and_drawn_again(saved, tmp_path, capsys):
    sources = ["--subject", str(saved / "dense"), "--changed", str(saved / "changed")]
    out = tmp_path / "out"
    assert main(["run", "attribution", *sources, "--test-examples", "2", "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith("attribution: reference")
    result = workbench.Result.load(next(out.rglob("result.json")).parent)
    grid, budget = result.figure(), result.figure(show="budget", scale="linear")
    assert grid.data[0].z.shape == (2, 8) and len(budget.data) == 3
    assert len(budget.data[2].x) == 7 and budget.data[2].xaxis == "x2"
    assert "KL" in grid.data[0].colorbar.title.text and grid.data[0].colorscale[0][1] == "#00224e"
    linear = result.figure(value="share", scale="linear").data[0]
    assert np.nansum(linear.z[:, 1:]) == pytest.approx(100) == np.nansum(linear.z[:, 0])
    json.loads(grid.to_json())


@pytest.mark.parametrize(
    "changed, message", [("", "changed: is empty"), ("none.gguf", "changed: 'none.gguf' is not a file")]
)
def test_refused_before_anything_is_computed(changed, message):
    with pytest.raises(BadInput, match=message) as caught:
        Attribution(changed=changed).run(workbench.subject("bytelm"))
    assert "\n" not in str(caught.value)


def test_models_that_have_no_parts_in_common_are_refused():
    dense = on("llama", examples("llama"))
    with pytest.raises(BadInput, match="weight for weight; nothing differs"):
        ASKED.between(dense, dense.copy())
    shorter = dense.copy()
    del shorter.model.model.layers[1]
    with pytest.raises(BadInput, match="has 1 blocks and the reference 2"):
        ASKED.between(dense, shorter)
    wider = copy.deepcopy(dense.model)
    wider.lm_head = nn.Linear(32, 120, bias=False)
    with pytest.raises(BadInput, match="'lm_head' is not built like the reference's"):
        ASKED.between(dense, dense.with_model(wider))


def test_stopped_at_once_there_is_no_part():
    dense = on("llama", examples("llama"))
    progress = Progress()
    progress.stop.set()
    result = ASKED.between(dense, altered(dense), progress)
    assert len(result.table) == 0 and "full" not in result.facts and progress.partial


def test_noise_far_above_the_bars_is_drawn_at_the_end_of_their_axis():
    """One marker had set the axis, and every bar lay flat on zero."""
    dense = on("gpt2", examples("gpt2"))
    result = Attribution(changed="at hand", parts="worst", give_back=0).between(dense, altered(dense))
    block = result.table["level"] == "block"
    tallest = result.table["kl_high"].max()
    result.table.loc[block, "noise"] = [100 * tallest, *result.table.loc[block, "noise"].iloc[1:]]
    drawn = next(t for t in result.figure(show="budget").data if "noise" in (t.name or ""))
    assert max(drawn.y) <= 1.5 * tallest and drawn.marker.symbol[0] == "triangle-up"
    assert "above the axis" in drawn.name and drawn.customdata[0] == 100 * tallest
