"""What can be chosen in `prune` and `train-sparse`: every option is reached, every wrong one is refused,
and a choice of one's own is one registration.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import workbench
from workbench import BadInput
from workbench.axis import Options, axis_of, parameter
from workbench.cli import main
from workbench.progress import Progress
from workbench.pruning import Prune, TrainSparse
from workbench.pruning.axes import PATTERN, PRUNING_METHOD, SALIENCY, scores_weights

SMALL = {"calibration_examples": 4, "predict_examples": 0}
#: An accepted value for options whose default cannot be raised by one half.
OTHER = {
    "along": "outputs",
    "remove": False,
    "amplitude": 0.2,
    "replay": True,
    "blocks": "1",
    "support": "random",
    "regrow_by": "random",
    "threshold": 0.2,
    "exchanged": 0.1,
    "optimizer": "lamb",
    "schedule": "constant",
    "precision": "bf16",
}
#: Axes of training have a test of their own.
TRAINING = ("optimizer", "learning-rate-schedule", "precision")


def fields_on_axes(cls):
    return {name: found for name, info in cls.model_fields.items() if (found := axis_of(info)) is not None}


def changed(option, default):
    if option in OTHER:
        return OTHER[option]
    return default + 1 if isinstance(default, int) else default * 1.5


@pytest.mark.parametrize("cls", [Prune, TrainSparse])
def test_every_option_of_every_choice_is_reached_and_is_stored(cls):
    reached = 0
    for field, axis in fields_on_axes(cls).items():
        if axis.kind in TRAINING:
            continue
        for name, entry in axis.entries.items():
            made = cls(**{field: name})
            assert getattr(made, field).name == name
            for option, info in entry.options.model_fields.items():
                value = changed(option, info.default)
                given = {field: name, f"{field}.{option}": value}
                if name == "n:m" and option == "keep":
                    given |= {f"{field}.of": 8}
                made = cls(**given)
                assert getattr(getattr(made, field).options, option) == value
                assert cls(**made.model_dump(mode="json")) == made
                assert made.with_fields(seed=1).with_fields(seed=0) == made
                reached += 1
    assert reached > 20


@pytest.mark.parametrize("cls", [Prune, TrainSparse])
def test_an_option_that_the_choice_has_not_is_refused(cls):
    for given, words in (
        ({"saliency": "magnitude", "saliency.damp": 0.1}, "magnitude has no such option.*it is an option of"),
        ({"saliency": {"name": "gradient", "block": 3}}, "gradient has no such option"),
        ({"saliency": {"name": "fisher", "damp": -1}}, r"saliency\.damp: -1 is not accepted"),
        ({"method": "nothing-like-it"}, "method: .* is unknown"),
        ({"pattern": "2:2"}, "removes nothing|keeps 2 of 2"),
        ({"pattern": {"name": "n:m", "keep": 5}}, "removes nothing"),
    ):
        with pytest.raises(BadInput, match=words):
            cls(**given)


@pytest.mark.parametrize("cls", [Prune, TrainSparse])
def test_an_n_m_pattern_has_its_own_sparsity(cls):
    vit = workbench.subject("digits-vit")
    for pattern in ("1:4", {"name": "n:m", "keep": 1, "of": 4}):
        assert cls(pattern=pattern).sparsity == 0.75 and cls(pattern=pattern).pattern == "1:4"
    assert cls(**{"pattern": "n:m", "pattern.keep": 1}).sparsity == 0.75
    assert cls(pattern="1:4").with_fields(pattern="2:4").sparsity == 0.5
    with pytest.raises(BadInput, match="sparsity: 0.5 contradicts pattern 1:4, which fixes it at 0.75"):
        cls(pattern="1:4", sparsity=0.5).check(vit)
    cls(pattern="1:4", sparsity=0.75).check(vit)


def test_a_method_fills_what_is_not_given():
    made = Prune(method="sparsegpt")
    assert (made.saliency, made.compensation, made.allocation) == ("obs", "obs", "layer")
    assert made.given() == {"method": "sparsegpt"}
    heads = Prune(method="sparsegpt", pattern="heads")
    assert (heads.saliency, heads.compensation) == ("obs", "least-squares")
    assert Prune(method="sparsegpt", compensation="none").compensation == "none"
    assert Prune(method="minitron", pattern="layers").saliency == "block-influence"
    slope = TrainSparse(method="slope", pattern="2:4")
    assert (slope.masks, slope.terms, slope.backward) == ("static", "side-low-rank", "double-pruned")
    assert TrainSparse(method="app").saliency.options.gradients == 64  # its own default, Prune's is another
    assert Prune(method="gradient").saliency.options.gradients == 256


@pytest.mark.filterwarnings("default::FutureWarning")
def test_names_of_one_release_ago_say_the_new_ones():
    with pytest.warns(FutureWarning, match=r"sparsity_schedule\.events"):
        assert Prune(sparsity_schedule="cubic", steps=3).sparsity_schedule.options.events == 3
    with pytest.warns(FutureWarning, match="called sparsity_schedule"):
        old = Prune(schedule="cubic", **{"schedule.events": 3})
    assert old == Prune(sparsity_schedule={"name": "cubic", "events": 3})
    with pytest.warns(FutureWarning, match="geometric is a sparsity_schedule now"):
        both = TrainSparse(schedule="geometric", learning_rate_schedule="rex", stages=2)
    assert both == TrainSparse(sparsity_schedule="geometric", schedule="rex", stages=2)
    with pytest.warns(FutureWarning, match=r"recovery\.steps"):
        made = Prune(recovery="low-rank", recovery_steps=5, lr=1e-3, rank=2, batch_size=4)
    assert made == Prune(
        recovery={"name": "low-rank", "steps": 5, "learning_rate": 1e-3, "rank": 2, "batch_size": 4}
    )
    with pytest.warns(FutureWarning, match=r"saliency\.damp and compensation\.damp"):
        assert Prune(damp=0.1) == Prune(**{"saliency.damp": 0.1, "compensation.damp": 0.1})
    with pytest.warns(FutureWarning, match="no effect"):
        assert Prune(steps=1) == Prune()
    with pytest.warns(FutureWarning, match="portion"):
        assert TrainSparse(data="megabatches", replay=True).portion.options.replay
    with pytest.warns(FutureWarning, match=r"masks\.learning_rate"):
        made = TrainSparse(method="pst", score_lr=0.1, rank=2)
    assert made.masks.options.learning_rate == 0.1 and made.masks.options.rank == made.terms.options.rank == 2


def test_every_saliency_says_what_it_scores():
    single = {name for name in SALIENCY if scores_weights(SALIENCY.chosen(name))}
    assert {"magnitude", "fisher"} <= single
    assert not single & {"activation", "heapr", "angular", "usage", "learned"}
    assert all(entry.formula and entry.source for entry in SALIENCY.entries.values())
    assert all(entry.formula and entry.source for entry in PRUNING_METHOD.entries.values())
    for text in ("2:4", "2:4 outputs", "block 4x8", "row", "heads", "heads+neurons", "hybrid 8x8"):
        assert PATTERN.chosen(text) == text


class Power(Options):
    power: float = parameter(2.0, "exponent of the weight", gt=0)


@pytest.fixture
def own() -> Iterator[str]:
    @SALIENCY.add("a-power", formula="|w|^p", source="this test", options=Power)
    def power(layer, calibration, pattern, options):
        return layer.weight.detach().abs() ** options.power

    yield "a-power"
    del SALIENCY.entries["a-power"]


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block 4x4", "heads", "channels"])
def test_a_saliency_of_ones_own_prunes_like_any_other(own, pattern):
    vit = workbench.subject("digits-vit")
    shared = {"method": "magnitude", "pattern": pattern, **SMALL}
    mine, same, theirs = (
        Prune(**shared, saliency=saliency).run(vit, Progress(), cache=False)
        for saliency in ({"name": own, "power": 3.0}, {"name": own, "power": 1.0}, "magnitude")
    )
    assert f"{own} x {pattern}" in mine.facts["composition"]
    assert {k: v for k, v in same.facts.items() if k != "composition"} == {
        k: v for k, v in theirs.facts.items() if k != "composition"
    }
    if pattern == "unstructured":  # any power of |w| keeps the order
        for a, b in zip(mine.subject.layers(), theirs.subject.layers(), strict=True):
            assert torch.equal(a.weight, b.weight)
    if pattern == "block 4x4":
        trained = TrainSparse(saliency=own, pattern=pattern, steps=2).run(vit, Progress(), cache=False)
        assert trained.facts["sparsity"] == pytest.approx(0.5, abs=2e-3)


def test_scores_of_a_choice_that_was_changed_are_not_taken_from_the_memory(own):
    vit = workbench.subject("digits-vit")
    fields = {"method": "magnitude", "saliency": own, "pattern": "block 4x4", **SMALL}
    before = Prune(**fields).run(vit, Progress(), cache=False).facts["loss"]
    del SALIENCY.entries[own]

    @SALIENCY.add(own, formula="-|w|", source="this test", options=Power)
    def power(layer, calibration, pattern, options):
        return 10 - layer.weight.detach().abs()

    assert Prune(**fields).run(vit, Progress(), cache=False).facts["loss"] != before


def test_schedules_and_patterns_of_the_other_instrument_are_refused():
    vit = workbench.subject("digits-vit")
    with pytest.raises(BadInput, match="old name of sparsity_schedule, which is given as well"):
        Prune(schedule="cubic", sparsity_schedule="linear")
    for made, words in (
        (Prune(sparsity_schedule="geometric"), "from stage to stage of `train-sparse`"),
        (Prune(pattern="hybrid 4x4"), "only trained for, by `train-sparse`"),
        (TrainSparse(sparsity_schedule="linear"), "counts the events of `prune`"),
        (TrainSparse(**{"method": "pst", "sparsity_schedule.events": 3}), r"schedule\.events"),
        (TrainSparse(allocation="adaptive"), "shares out heads and neurons"),
    ):
        with pytest.raises(BadInput, match=words):
            made.check(vit)


def test_train_sparse_runs_from_the_command_line(capsys):
    assert main(["run", "train-sparse", "--help"]) == 0
    assert "--portion" in capsys.readouterr().out
    given = ["--subject", "digits-vit", "--steps", "2", "--pattern", "2:4", "--portion", "whole"]
    assert main(["run", "train-sparse", *given, "--no-cache"]) == 0
    assert "sparsity" in capsys.readouterr().out
    regrow = ["--subject", "digits-vit", "--steps", "2", "--masks", "regrow", "--masks.period", "1"]
    assert main(["run", "train-sparse", *regrow, "--no-cache"]) == 0
    assert main(["run", "train-sparse", *given, "--masks.period", "1", "--no-cache"]) == 2
    assert "it is an option of regrow" in capsys.readouterr().err


def test_a_results_key_follows_what_was_chosen(tmp_path):
    import shutil

    from workbench.axis import entries_in
    from workbench.code_version import PACKAGE, code_version
    from workbench.pruning import FisherSweep

    root = shutil.copytree(PACKAGE, tmp_path / "workbench", ignore=shutil.ignore_patterns("_data"))
    chosen = {
        "weights": Prune(),
        "heads": Prune(method="magnitude", pattern="heads"),
        "channels": Prune(method="magnitude", pattern="channels"),
    }

    def versions():
        values = {name: [entry.value for entry in entries_in(made)] for name, made in chosen.items()}
        return {name: code_version(Prune, entries, root=root) for name, entries in values.items()}

    for file, changes in (
        ("engine/structure_events.py", {"heads"}),
        ("engine/dimensions.py", {"channels"}),
        ("engine/matrices.py", {"weights"}),
        ("solvers/icbs.py", {"weights"}),
        ("calibration.py", {"weights", "heads", "channels"}),
    ):
        before, path = versions(), root / "pruning" / file
        path.write_text(path.read_text() + "\n# changed\n")
        assert {name for name, version in versions().items() if version != before[name]} == changes, file
    assert FisherSweep().code() != code_version(FisherSweep)
