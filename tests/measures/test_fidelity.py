"""The instrument: models of any kind of file against one reference."""

from __future__ import annotations

import numpy as np
import pytest

import workbench
from workbench import BadInput
from workbench.measures import Fidelity, TokenStrip, compare, verdict, word
from workbench.measures.fidelity import front
from workbench.measures.intervals import mcnemar
from workbench.measures.made_by import made_by
from workbench.pruning import Prune
from workbench.quantization import Quantize

FIELDS = dict(test_examples=0, predict_examples=0, calibration_examples=4)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Folders of bytelm at three and eight bits, and of bytelm itself."""
    folder = tmp_path_factory.mktemp("models")
    dense = workbench.subject("bytelm")
    for bits in (3, 8):
        Quantize(format=f"int{bits}", **FIELDS).run(dense, cache=False).save(folder / f"int{bits}")
    dense.save(folder / "itself")
    return folder


@pytest.fixture(scope="module")
def measured(results):
    names = ", ".join(str(results / name) for name in ("int3", "int8", "itself"))
    return Fidelity(candidates=names, test_examples=6, tolerance=0.005).run(
        workbench.subject("bytelm"), cache=False
    )


def test_every_candidate_has_its_row(measured, results):
    table = measured.table.set_index("subject")
    assert list(table.index) == ["bytelm", "int3", "int8", "itself"]
    assert table["kl"]["itself"] == 0 and table["word"]["itself"] == "same"
    assert table["kl"]["int3"] > 10 * table["kl"]["int8"] > 0
    assert list(table["verdict"][["int3", "int8"]]) == ["regression", "accept"]
    assert table["bits"].round(2).tolist() == [32.0, 3.25, 8.25, 32.0]
    assert measured.facts["smallest_accepted"] == "int8" and measured.facts["compared"] == 3
    dense = workbench.subject("bytelm")
    found = compare(dense, workbench.subject(results / "int3"), limit=6).measures()
    assert table["kl"]["int3"] == pytest.approx(found["kl"], rel=1e-4)
    for name in ("prefill_tokens_per_second", "decode_tokens_per_second", "peak_memory_bytes"):
        assert (table[name] > 0).all()
    assert (table["prefill_tokens_per_second"] > table["decode_tokens_per_second"]).all()


def test_buckets_and_domains(measured):
    buckets = measured.tables["buckets"]
    assert list(buckets["subject"].unique()) == ["int3", "int8", "itself"]
    assert (buckets.groupby("subject")["tokens"].sum() == 6 * 255).all()
    assert list(measured.tables["domains"]["domain"].unique()) == ["test"]


def test_the_figure_shows_front_quartiles_and_tolerance(measured, tmp_path):
    for x in ("bits", "megabytes"):
        fig = measured.figure(x=x)
        names = [trace.name for trace in fig.data if trace.name != "floor"]  # of rounding, of either sign
        assert names == ["median and quartiles", "front", "mean, 95 % interval", "tolerance"]
        assert list(fig.data[2].text) == ["int3", "int8"]  # exactly 0 has no place on a log axis
        assert fig.layout.yaxis.type == "log"
    measured.save(tmp_path / "saved")
    again = workbench.Result.load(tmp_path / "saved")
    assert again.figure().to_json() == measured.figure().to_json()


def test_what_has_no_place_in_the_figure_is_named_and_points_say_their_commands(measured, results):
    """Kind: a figure that leaves something out, or cannot be followed up, says nothing of it."""
    fig = measured.figure()
    assert "not drawn, 0 to rounding: itself" in fig.layout.title.text
    first, second = (said.split("\n") for said in fig.data[2].meta["clicked"])
    assert first[0].startswith("workbench run quantize --format int3 ")
    assert first[0].endswith(" --subject bytelm") and "--device" not in first[0]
    assert first[1] == f"workbench run attribution --subject bytelm --changed {results / 'int3'}"
    assert "--format int8" in second[0]
    commands = measured.tables["commands"]
    assert list(commands[commands["subject"] == "itself"]["command"]) == [
        f"workbench run attribution --subject bytelm --changed {results / 'itself'}"
    ]


def test_a_changed_model_is_called_as_its_folder(results):
    """Kind: two models of one name in a figure's title. A result keeps the name of what it was made from."""
    asked = TokenStrip(changed=str(results / "int3"))
    dense = workbench.subject("bytelm")
    assert asked.changed_model(dense).name == "int3" and dense.name == "bytelm"
    assert asked.with_fields(changed="bytelm").changed_model(dense).name == "bytelm"


def test_every_step_of_a_model_has_its_command():
    """Two further examples: several steps, and a step of an instrument that this version does not have."""
    steps = [
        {"instrument": "prune", "fields": Prune(sparsity=0.6).model_dump(mode="json")},
        {"instrument": "melt", "fields": {"heat": 3}},
    ]
    assert made_by(steps, "my model") == [
        "workbench run prune --sparsity 0.6 --subject 'my model' --out step-1",
        "workbench run melt --heat 3 --subject step-1",
    ]
    assert made_by([], "bytelm") == []


def test_a_second_domain_and_a_budget(results):
    dense = workbench.subject("bytelm")
    on = dense.with_split("other-domain", {k: v[:8] for k, v in dense.split("validation").items()})
    study = Fidelity(candidates=str(results / "int3"), test_examples=4, budget=0.5, floor=False, speed=False)
    found = study.run(on, cache=False)
    assert list(found.tables["domains"]["domain"]) == ["test", "other-domain"]
    assert found.table["verdict"][1] == "does not fit" and "floor" not in found.facts
    assert "decode_tokens_per_second" not in found.table


def test_the_key_follows_the_files(results, tmp_path):
    """A file that is written again under the same name is another model."""
    on = workbench.subject("bytelm")
    file = tmp_path / "model.gguf"
    file.write_bytes(b"one")
    study = Fidelity(candidates=str(file))
    before = study.key(on)
    assert study.key(on) == before != Fidelity(candidates=str(results / "int3")).key(on)
    file.write_bytes(b"other")
    assert study.key(on) != before


def test_gguf_files_of_several_types_in_their_order(tmp_path):
    """Against the model itself: the type with more bits is nearer, and sizes are those of the files."""
    pytest.importorskip("gguf", reason="GGUF files are read by the package 'gguf' (extra 'gguf')")
    from tests.subjects.test_gguf_files import small_llama, write_gguf

    model = small_llama()
    plain = write_gguf(tmp_path / "plain.gguf", model)
    files = [write_gguf(tmp_path / f"{kind}.gguf", model, kind) for kind in ("Q8_0", "Q5_1", "Q4_0")]
    on = workbench.subject(plain, data="random", max_length=16)
    names = ",".join(str(file) for file in (*files, plain))
    table = Fidelity(candidates=names).run(on, cache=False).table.set_index("subject")
    kl = table["kl"]
    assert kl["plain"].tolist() == [0, 0] and 0 < kl["Q8_0"] < kl["Q5_1"] < kl["Q4_0"]
    assert table["bits"]["Q8_0"] == 8.5 and table["bits"]["Q5_1"] == 6 and table["bits"]["Q4_0"] == 4.5


@pytest.mark.parametrize(
    "candidates, message",
    [
        ("", "candidates: is empty"),
        (" , ", "candidates: is empty"),
        ("none.gguf", "candidates: 'none.gguf' is not a file"),
    ],
)
def test_refused_before_anything_is_computed(candidates, message):
    with pytest.raises(BadInput, match=message) as caught:
        Fidelity(candidates=candidates).run(workbench.subject("bytelm"))
    assert "\n" not in str(caught.value)


def test_classifiers(tmp_path):
    vit = workbench.subject("digits-vit")
    Quantize(format="int2", **FIELDS).run(vit, cache=False).save(tmp_path / "int2")
    found = Fidelity(candidates=str(tmp_path / "int2"), test_examples=200).run(vit, cache=False)
    row = found.table.set_index("subject").loc["int2"]
    flips = int(row["right_to_wrong"]), int(row["wrong_to_right"])
    assert flips[0] > flips[1] and row["mcnemar_p"] == mcnemar(*flips)
    assert row["verdict"] == str(verdict(*row[["kl", "kl_low", "kl_high"]], 0.03, 200))
    assert row["word"] == word(row["kl"]) != "same"
    assert 0 < row["latency_1_ms"] < row["latency_32_ms"]


def test_the_front():
    assert front(np.array([1.0, 2.0, 3.0, 2.0]), np.array([3.0, 2.0, 2.5, 1.0])) == [0, 3]
    assert front(np.array([]), np.array([])) == []
