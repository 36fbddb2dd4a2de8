"""The `merge` instrument: real folders of six architectures, every method by its name."""

from __future__ import annotations

import warnings

import pytest
import torch

import workbench
from tests.arithmetic.conftest import moved
from tests.conftest import ARCHITECTURES, tiny
from workbench.arithmetic import (
    MERGE,
    Interference,
    Merge,
    conflict_table,
    merge_checkpoints,
    of_folder,
    of_subject,
    side_by_side,
    source_of,
)
from workbench.arithmetic.sources import own_tensors
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.subjects import Mask

SMALL = {"validation_examples": 4, "test_examples": 4}
QUICK = {
    "fisher-weights": {"method.examples": 2},
    "hessian-weights": {"method.examples": 2, "method.probes": 1},
    "learned-soup": {"method.epochs": 1},
}


def opened(folder, **more):
    return workbench.subject(folder, data="random", max_length=8, max_examples=24, **more)


def tensors(on):
    return {name: value.detach() for name, value in own_tensors(on.model).items()}


@pytest.fixture(autouse=True)
def quiet(cache):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize(
    "architecture", [pytest.param(a, marks=[pytest.mark.long] * (a != "llama")) for a in ARCHITECTURES]
)
def test_every_method_runs_by_its_name_on_every_architecture(architecture, family):
    base, parents = family(architecture)
    on = opened(base)
    for name in MERGE:
        merge = Merge(method=name, parents=",".join(map(str, parents)), **SMALL, **QUICK.get(name, {}))
        merge = merge.with_fields(strengths=(0.5,)) if merge.method.has("strength") else merge
        result = merge.run(on, Progress(), cache=False)
        assert result.facts["method"] == name and not result.partial
        assert all(bool(torch.isfinite(value).all()) for value in tensors(result.subject).values())
        assert not result.tables["tests"]["kl"].isna().all()
        result.figure(), result.figure(show="conflicts", value="relative")


def test_the_mean_of_linear_models_answers_the_mean_of_their_answers(cache):
    """Soup of two linear models equals the mean of the outputs."""
    torch.manual_seed(0)
    data = {"inputs": torch.randn(32, 5), "labels": torch.randint(3, (32,))}
    one, two = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    base = workbench.subject(torch.nn.Linear(5, 3), data=data)
    sources = [of_subject(workbench.subject(each, data=data)) for each in (one, two)]
    models = side_by_side(of_subject(base), sources)
    weight = models.parts("weight").parents.mean(0)
    bias = models.parts("bias").parents.mean(0)
    x = data["inputs"]
    assert torch.allclose(x @ weight.T + bias, (one(x) + two(x)) / 2, atol=1e-6)


def test_the_ends_of_the_path_are_the_base_and_the_model(family):
    base, (parent, _) = family("bert")
    on, other = opened(base), opened(parent)
    for strength, wanted in ((0.0, on), (1.0, other)):
        found = Merge(method="wise-ft", parents=str(parent), strengths=(strength,), **SMALL).run(
            on, cache=False
        )
        assert all(
            torch.equal(value, tensors(wanted)[name]) for name, value in tensors(found.subject).items()
        )


def test_what_streams_from_shards_is_what_the_opened_model_has(family, tmp_path):
    """Three shards, read by name."""
    base, _ = family("llama")
    model = moved(tiny("llama"), 5)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    on = opened(base)
    streamed = of_folder(tmp_path / "sharded", own_tensors(on.model), "model")
    assert streamed is not None
    held = own_tensors(model)
    assert set(streamed.shapes) == set(held)
    assert all(torch.equal(streamed.tensor(name), value) for name, value in held.items())


def test_the_chosen_point_is_the_best_on_validation_and_another_split_reports_it(family):
    base, parents = family("bert")
    on = opened(base)
    result = Merge(
        method="ties",
        parents=",".join(map(str, parents)),
        strengths=(0.3, 1.0),
        densities=(0.2, 0.9),
        **SMALL,
    ).run(on, cache=False)
    points = result.table[result.table["kind"] == "merge"]
    assert len(points) == 4 and result.table["chosen"].sum() == 1
    chosen = points[points["chosen"]].iloc[0]
    assert chosen["loss"] == points["loss"].min() == result.facts["validation_loss"]
    assert result.facts["loss"] == pytest.approx(result.subject.evaluate("test", limit=4)["loss"], abs=1e-6)
    assert (result.facts["strength"], result.facts["density"]) == (chosen["strength"], chosen["density"])


def test_a_greedy_soup_is_never_worse_than_its_best_model(family):
    base, parents = family("bert", 3)
    result = Merge(method="greedy-soup", parents=",".join(map(str, parents)), **SMALL).run(
        opened(base), cache=False
    )
    alone = result.table[result.table["kind"] == "parent"]["loss"].min()
    assert result.facts["validation_loss"] <= alone + 1e-6
    weights = result.tables["lineage"]["weight"]
    assert weights.sum() == pytest.approx(1.0) and weights.iloc[0] == 0


def test_a_learned_soup_descends_along_the_models(family):
    """The slope of each weight is the loss's change when that model weighs more."""
    from workbench.arithmetic.merging.merging import Setting
    from workbench.arithmetic.merging.soups import slopes

    base, parents = family("bert")
    on = opened(base)
    models = side_by_side(of_subject(on), [source_of(str(p), on, "parents") for p in parents])
    host = on.copy()
    setting = Setting(models, [host], "validation", 4, lambda found: found[0]["loss"])
    batch = next(host.batches("validation", 4))
    found = slopes(setting, host, batch, [0.4, 0.6])

    def loss(weights):
        setting.mix(weights)
        with torch.no_grad():
            return float(host.loss(batch))

    step = 1e-2
    rises = [(loss([0.4 + step, 0.6]) - loss([0.4 - step, 0.6])) / (2 * step)]
    rises += [(loss([0.4, 0.6 + step]) - loss([0.4, 0.6 - step])) / (2 * step)]
    assert found.tolist() == pytest.approx(rises, abs=2e-3)


def test_fisher_weights_of_one_linear_layer_are_known(cache):
    """l = |z - y|^2 / 2 with targets drawn at unit variance: E[(dl / dw_oi)^2] = x_i^2 for every output."""
    from workbench.arithmetic.merging.curvature_weights import Fisher, squared_gradients
    from workbench.arithmetic.merging.merging import Setting

    torch.manual_seed(0)
    inputs = torch.randn(600, 3) * torch.tensor([1.0, 2.0, 0.5])
    data = {"inputs": inputs, "labels": torch.randn(600, 2)}
    on = workbench.subject(torch.nn.Linear(3, 2), data={"train": data, "validation": data, "test": data})
    models = side_by_side(of_subject(on), [of_subject(on)])
    setting = Setting(models, [on], "validation", 600, lambda found: 0.0)
    found = squared_gradients(setting, on, Fisher(examples=600), torch.Generator().manual_seed(0))
    expected = inputs.square().mean(0)
    assert torch.allclose(found["weight"].mean(0), expected, rtol=0.15)


def test_zeros_that_all_parents_have_stay(family, tmp_path):
    base, parents = family("bert")
    on = opened(base)
    folders = []
    for i, parent in enumerate(parents):
        made = opened(parent)
        for layer in made.layers():
            mask = torch.ones(layer.shape, dtype=torch.bool)
            mask[..., ::2] = False
            layer.attach(Mask(mask))
        folders.append(str(made.save(tmp_path / f"sparse{i}")))
    result = Merge(method="task-arithmetic", parents=",".join(folders), strengths=(1.0,), **SMALL).run(
        on, cache=False
    )
    assert all(bool((layer.weight[..., ::2] == 0).all()) for layer in result.subject.layers())
    assert result.facts["zeros_of_parents"] > 0 and result.facts["zeros_lost"] == 0
    freed = Merge(
        method="task-arithmetic", parents=",".join(folders), strengths=(1.0,), keep_zeros=False, **SMALL
    ).run(on, cache=False)
    assert freed.facts["zeros_lost"] == freed.facts["zeros_of_parents"]


def test_grids_of_quantized_parents_are_said_to_be_lost(family, tmp_path):
    from workbench.quantization import Quantize

    base, (one, two) = family("bert")
    on = opened(base)
    rounded = (
        Quantize(format="int4", test_examples=0, predict_examples=0).run(opened(one), cache=False).subject
    )
    rounded.save(tmp_path / "rounded")
    with pytest.warns(UserWarning, match="lie on grids"):
        Merge(parents=f"{tmp_path / 'rounded'}, {two}", **SMALL).run(on, cache=False)


def test_heads_that_differ_are_named_and_stay(family, tmp_path):
    import transformers

    base, (one, _) = family("bert")
    config = transformers.BertConfig.from_pretrained(base, num_labels=7)
    torch.manual_seed(3)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "seven")
    on = opened(base)
    with pytest.warns(UserWarning, match="classifier.weight is left out"):
        result = Merge(parents=f"{one}, {tmp_path / 'seven'}", **SMALL).run(on, cache=False)
    assert result.facts["left_out"] == 2
    assert torch.equal(result.subject.model.classifier.weight, on.model.classifier.weight)


def test_a_base_without_a_head_lends_its_trunk(family, tmp_path):
    base, (one, two) = family("bert")
    tiny("bert").bert.save_pretrained(tmp_path / "trunk")
    on = opened(one)
    result = Merge(
        method="task-arithmetic", parents=str(two), base=str(tmp_path / "trunk"), strengths=(0.5,), **SMALL
    ).run(on, cache=False)
    assert list(result.tables["lineage"]["kind"]) == ["base", "parent", "parent"]
    name = "bert.encoder.layer.0.attention.self.query.weight"
    start, mine, other = (tensors(opened(each))[name] for each in (base, one, two))
    assert torch.allclose(tensors(result.subject)[name], (mine + other) / 2, atol=1e-6), start.shape


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"parents": "GPT2, ONE"}, "is a gpt2, the subject a bert"),
        ({"parents": "ONE"}, "uniform merges two models or more"),
        ({"parents": "ONE, TWO", "strengths": (0.5,)}, "uniform has no strength"),
        ({"parents": "ONE, TWO", "method": "slerp", "strengths": (1.5,)}, "shares lie between 0 and 1"),
        ({"parents": "ONE, TWO", "method": "ties", "densities": (0.0,)}, "shares lie above 0"),
        ({"parents": "ONE, TWO", "base": "BASE", "method": "slerp"}, "there are 3"),
        ({"parents": "ONE, BROKEN"}, "holds nan or inf"),
        ({"parents": "ONE, DEEP"}, "missing in"),
        ({"parents": "ONE, nowhere"}, "parents: 'nowhere' is unknown"),
        ({"parents": "BASE, BASE"}, "has the weights of"),
        ({"base": "ONE"}, "needs parents"),
    ],
)
def test_what_cannot_be_merged_is_said_in_one_line(fields, said, family, tmp_path):
    import transformers

    base, (one, two) = family("bert")
    gpt2, _ = family("gpt2")
    broken = tiny("bert")
    with torch.no_grad():
        broken.classifier.weight[0, 0] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    config = transformers.BertConfig.from_pretrained(base, num_hidden_layers=3)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "deep")
    places = {"GPT2": gpt2, "ONE": one, "TWO": two, "BASE": base}
    places |= {"BROKEN": tmp_path / "broken", "DEEP": tmp_path / "deep"}

    def named(value):
        if not isinstance(value, str):
            return value
        return ", ".join(str(places.get(part.strip(), part)) for part in value.split(","))

    with pytest.raises(BadInput, match=said) as error:
        Merge(**{k: named(v) for k, v in fields.items()}, **SMALL).run(opened(base), cache=False)
    assert "\n" not in str(error.value)


def test_fine_tunes_are_made_where_none_are_named(cache):
    on = workbench.subject("digits-vit")
    merge = Merge(method="model-stock", fine_tunes=2, steps=2, **SMALL)
    first = merge.run(on, Progress())
    again = merge.run(on, Progress())
    assert first.facts["models"] == 2 and again.facts == first.facts
    assert again.subject.fingerprint == first.subject.fingerprint
    assert all(torch.equal(v, tensors(first.subject)[n]) for n, v in tensors(again.subject).items())


def test_each_parents_own_data_and_head(family, tmp_path):
    """Two saved subjects with data of their own: a row counts the mean over both."""
    base, parents = family("bert")
    folders = [str(opened(parent, seed=i).save(tmp_path / f"task{i}")) for i, parent in enumerate(parents)]
    on = opened(base)
    result = Merge(parents=",".join(folders), measured_on="parents", **SMALL).run(on, cache=False)
    parts = [workbench.subject(folder) for folder in folders]
    for part in parts:
        with torch.no_grad():
            for name, value in own_tensors(part.model).items():
                value.copy_(tensors(result.subject)[name])
    mean = sum(part.evaluate("test", limit=4)["loss"] for part in parts) / 2
    assert result.facts["loss"] == pytest.approx(mean, abs=1e-6)


def test_conflicts_are_counts_of_signs(family):
    base, parents = family("bert")
    on = opened(base)
    models = side_by_side(of_subject(on), [source_of(str(p), on, "parents") for p in parents])
    table = conflict_table(models, Progress()).set_index("tensor")
    name = "bert.encoder.layer.1.output.dense.weight"
    d = models.parts(name).differences.double()
    row = table.loc[name]
    assert row["conflict"] == pytest.approx(float((d[0] * d[1] < 0).double().mean()))
    assert row["cosine"] == pytest.approx(
        float(torch.cosine_similarity(d[0].flatten(), d[1].flatten(), dim=0))
    )
    assert (row["block"], row["role"]) == ("bert.encoder.layer.1", "output.dense.weight")
    energy = d.square().sum((1, 2)).mean()
    assert row["cancelled"] == pytest.approx(float(1 - d.mean(0).square().sum() / energy))


def test_files_merge_without_a_model(family, tmp_path):
    """The same numbers as the instrument's, and a folder that transformers opens."""
    base, parents = family("llama")
    out = merge_checkpoints(base, parents, tmp_path / "merged", "ties", 0.7, progress=Progress(), density=0.3)
    method = {"name": "ties", "density": 0.3}
    result = Merge(method=method, parents=",".join(map(str, parents)), strengths=(0.7,), **SMALL).run(
        opened(base), cache=False
    )
    found = tensors(opened(out))
    assert all(torch.equal(value, found[name]) for name, value in tensors(result.subject).items())
    with pytest.raises(BadInput, match="needs validation"):
        merge_checkpoints(base, parents, tmp_path / "soup", "greedy-soup")
    gpt2, _ = family("gpt2")
    with pytest.raises(BadInput, match="other tensors in its blocks"):
        merge_checkpoints(base, [gpt2], tmp_path / "other")


def test_settings_of_fine_tunes_say_that_nothing_reads_them(family):
    base, parents = family("bert")
    with pytest.warns(UserWarning, match="steps: has no effect where parents is given"):
        Merge(parents=",".join(map(str, parents)), steps=5, **SMALL).run(opened(base), cache=False)


def test_interference_is_the_table_of_a_merge(family):
    base, parents = family("bert")
    named = ",".join(map(str, parents))
    found = Interference(parents=named).run(opened(base), cache=False)
    merge = Merge(parents=named, **SMALL).run(opened(base), cache=False)
    assert found.table.equals(merge.tables["conflicts"])
    assert found.facts["conflict"] == merge.facts["conflict"]
    for value in ("conflict", "cosine", "norm", "relative", "cancelled"):
        assert len(found.figure(value=value).data) == 1
