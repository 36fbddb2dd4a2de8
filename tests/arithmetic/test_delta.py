"""The `delta` instrument: real folders, true bytes, exact reload."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

import workbench
from tests.arithmetic.test_merge import opened, tensors
from tests.conftest import ARCHITECTURES
from workbench.arithmetic import DIFFERENCE, Delta, reloaded
from workbench.errors import BadInput
from workbench.progress import Progress

SMALL = {"calibration_examples": 4, "validation_examples": 4, "test_examples": 4}
QUICK = {"bitdelta": {"method.steps": 2}, "graft": {"method.steps": 2, "method.batch_size": 2}}


@pytest.fixture(autouse=True)
def quiet(cache):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize(
    "architecture", [pytest.param(a, marks=[pytest.mark.long] * (a != "mixtral")) for a in ARCHITECTURES]
)
def test_every_difference_reloads_bit_for_bit_at_the_stated_size(architecture, family, tmp_path):
    base, (tuned, _) = family(architecture)
    over, on = opened(base), opened(tuned)
    for name in DIFFERENCE:
        result = Delta(method=name, base=str(base), **SMALL, **QUICK.get(name, {})).run(
            on, Progress(), cache=False
        )
        folder = result.save(tmp_path / name, with_subject=False)
        again = tensors(reloaded(over, folder))
        assert all(torch.equal(value, again[key]) for key, value in tensors(result.subject).items()), name
        file = folder / "arrays.safetensors"
        with file.open("rb") as content:
            header = int.from_bytes(content.read(8), "little")
        assert file.stat().st_size - 8 - header == result.facts["bytes"], name
        assert set(json.loads((folder / "result.json").read_text())["facts"]) == set(result.facts)
        assert result.table["lost"].min() >= 0 and result.facts["bits"] > 0
        result.figure(), result.figure(show="spectrum")


def test_a_difference_opens_over_its_own_base_only(family, tmp_path):
    base, (tuned, other) = family("bert")
    folder = Delta(method="number-format", base=str(base), **SMALL).run(opened(tuned), cache=False)
    folder = folder.save(tmp_path / "kept", with_subject=False)
    with pytest.raises(BadInput, match="open it over that one"):
        reloaded(opened(other), folder)


def test_distilled_scales_answer_more_like_the_fine_tune(family):
    """The mean squared distance of outputs on the calibration examples falls."""
    base, (tuned, _) = family("bert")
    on = opened(tuned)
    fields = SMALL | {"calibration_examples": 8}

    def distance(steps):
        method = {"name": "bitdelta", "steps": steps, "learning_rate": 1e-3}
        made = Delta(method=method, base=str(base), **fields).run(on, cache=False).subject
        batch = next(on.batches("calibration", 8))
        with torch.no_grad():
            gap = made.task.output(made.model, batch) - on.task.output(on.model, batch)
        return float(gap.square().mean())

    assert distance(30) < distance(0)


def test_a_learned_mask_is_never_worse_than_the_most_moved(family):
    base, (tuned, _) = family("bert")
    on = opened(tuned)

    def loss(steps):
        method = {"name": "graft", "steps": steps, "density": 0.05, "batch_size": 4}
        made = Delta(method=method, base=str(base), **SMALL).run(on, cache=False).subject
        return made.evaluate("validation", limit=4)["loss"]

    assert loss(6) <= loss(0) + 1e-7


def test_the_multiple_is_chosen_on_validation(family):
    base, (tuned, _) = family("bert")
    result = Delta(method="compeft", base=str(base), strengths=(0.5, 1.0), densities=(0.1, 0.5), **SMALL).run(
        opened(tuned), cache=False
    )
    tried = result.tables["tried"]
    best = tried.loc[tried["loss"].idxmin()]
    assert len(tried) == 4
    assert (result.facts["strength"], result.facts["density"]) == (best["strength"], best["density"])


def test_what_is_not_compressed_is_the_fine_tunes_own(family):
    base, (tuned, _) = family("llama")
    on = opened(tuned)
    result = Delta(method="singular-vectors", base=str(base), **SMALL).run(on, cache=False)
    mine, theirs = tensors(result.subject), tensors(on)
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(mine[name], theirs[name])
    assert not torch.equal(
        mine["model.layers.0.mlp.up_proj.weight"], theirs["model.layers.0.mlp.up_proj.weight"]
    )


def test_a_fine_tune_is_made_where_no_base_is_named(cache):
    result = Delta(method="number-format", steps=2, **SMALL).run(workbench.subject("digits-vit"), Progress())
    assert result.facts["kl"] < result.facts["base_kl"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"strengths": (1.0,)}, "number-format has no strength"),
        ({"method": "compeft", "densities": (2.0,)}, "density"),
        ({"base": "nowhere"}, "base: 'nowhere' is unknown"),
        ({"layers": "nothing*"}, "matches no layer"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(fields, said, family):
    _, (tuned, _) = family("bert")
    with pytest.raises(BadInput, match=said) as error:
        Delta(**fields, **SMALL).run(opened(tuned), cache=False)
    assert "\n" not in str(error.value)
