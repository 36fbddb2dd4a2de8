"""Where two models differ: tokens against whole logits in double precision, flips against brute force."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import workbench
from tests.measures.test_measures import LANGUAGE, examples, log_probabilities, on
from workbench import BadInput
from workbench.cli import main
from workbench.errors import Stopped
from workbench.measures import TokenStrip
from workbench.measures import language as chunks
from workbench.measures.texts.spelled import Words, laid_out, visible
from workbench.measures.texts.token_strip import tokens_of
from workbench.measures.texts.token_strip_result import Colours
from workbench.progress import Progress
from workbench.subjects import TASK, Subject

ASKED = TokenStrip(changed="at hand", test_examples=12)


@pytest.mark.parametrize("architecture", LANGUAGE)
def test_each_token_is_that_of_whole_logits(architecture, monkeypatch):
    """Divergence, probabilities and first words, three tokens a chunk."""
    columns = examples(architecture)
    dense, changed = on(architecture, columns), on(architecture, columns, 0.05)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 3 * 4 * 99)
    result = ASKED.between(dense, changed)
    p, targets, windows = log_probabilities(dense)
    q, _, _ = log_probabilities(changed)
    known = result.table[result.table["kl"].notna()]
    rows = np.arange(len(targets))
    assert known["text"].tolist() == windows.tolist() and known["token"].tolist() == targets.tolist()
    assert known["kl"].to_numpy() == pytest.approx((np.exp(p) * (p - q)).sum(-1), abs=3e-6)
    assert known["dense_p"].to_numpy() == pytest.approx(np.exp(p[rows, targets]), abs=1e-6)
    assert known["changed_p"].to_numpy() == pytest.approx(np.exp(q[rows, targets]), abs=1e-6)
    assert known["same_first_word"].tolist() == (p.argmax(-1) == q.argmax(-1)).tolist()
    top = result.tables["top"]
    assert top["item"].tolist() == np.repeat(known.index, 5).tolist()
    for name, values in (("dense", p), ("changed", q)):
        best = np.sort(np.exp(values), -1)[:, :-6:-1]
        assert top[f"{name}_p"].to_numpy() == pytest.approx(best.ravel(), abs=1e-6)
        words = values.argsort(-1, kind="stable")[:, ::-1][:, :1]
        assert top[name][::5].tolist() == [f"#{w}" for w in words[:, 0]]
    assert result.facts["kl"] == pytest.approx(known["kl"].mean()) and result.facts["texts"] == 12


@pytest.mark.parametrize("architecture", [*LANGUAGE, "bert"])
def test_identical_models_differ_nowhere(architecture):
    columns = examples(architecture)
    result = ASKED.between(on(architecture, columns), on(architecture, columns))
    assert (result.table["kl"].dropna() == 0).all() and result.facts["kl_most"] == 0
    top = result.tables["top"]
    assert (top["dense"] == top["changed"]).all() and (top["dense_p"] == top["changed_p"]).all()
    result.figure()


def test_flips_are_those_of_brute_force():
    columns = examples("bert")
    dense, changed = on("bert", columns), on("bert", columns, 0.3)
    columns["labels"] = log_probabilities(dense)[0].argmax(-1) * torch.tensor([1] * 6 + [0] * 6).numpy()
    columns["labels"] = torch.tensor(columns["labels"])
    dense.labels = ["red", "green", "blue"]
    result = ASKED.between(dense, changed)
    p, truth, _ = log_probabilities(dense)
    q, _, _ = log_probabilities(changed)
    before, after = p.argmax(-1), q.argmax(-1)
    table = result.table
    assert table["kl"].to_numpy() == pytest.approx((np.exp(p) * (p - q)).sum(-1), abs=1e-6)
    assert table["confidence"].to_numpy() == pytest.approx(np.exp(q.max(-1)), abs=1e-6)
    lost, won = (before == truth) & (after != truth), (before != truth) & (after == truth)
    assert (table["flip"] == "right to wrong").tolist() == lost.tolist()
    assert (table["flip"] == "wrong to right").tolist() == won.tolist()
    assert result.facts["right_to_wrong"] == lost.sum() > 0
    assert table["after"].tolist() == [dense.labels[k] for k in after]
    drawn = result.figure().data[0]
    assert len(drawn.y) == (before != after).sum()
    first = [float(x) for x in drawn.x[: lost.sum()]]
    assert first == sorted(first, reverse=True)
    assert len(result.figure(show="largest change", examples=5).data[0].y) == 5
    assert "right to wrong" in drawn.meta["clicked"][0] and "reference" in drawn.hovertext[0]


def test_a_language_models_text_is_drawn_token_by_token(tmp_path):
    trained = workbench.subject("bytelm")
    dense = trained.with_split("test", {k: v[:2, :64] for k, v in trained.split("test").items()})
    changed = dense.copy()
    with torch.no_grad():
        for parameter in changed.model.parameters():
            parameter.mul_(1.05)
    result = TokenStrip(changed="at hand").between(dense, changed)
    text = dense.tokenizer.decode(dense.split("test")["input_ids"][0].tolist())
    assert "".join(result.table["word"][result.table["text"] == 0]) == text
    result.save(tmp_path / "saved")
    again = workbench.Result.load(tmp_path / "saved")
    drawn = again.figure(text=1, order="as they come")
    plain, coloured = drawn.data
    assert len(plain.text) == 1 and len(coloured.text) == 63  # nothing predicts the first token
    assert coloured.marker.colorscale[0][1] == "#00224e"
    assert "reference" in coloured.hovertext[0] and coloured.meta["clicked"][0].count("\n") == 7
    means = again.table.groupby("text")["kl"].mean()
    worst = again.figure(text=1).layout.title.text
    assert f"text {means.argmax() + 1}" in worst and f"{means.max():.3g}" in worst
    json.loads(drawn.to_json())


def test_masked_tokens_are_coloured_and_the_others_shown():
    """Kind: what a task does not ask for is shown without a colour, never as a difference of nothing."""
    columns = examples("bert")
    hidden = (torch.arange(20) % 4 == 2).expand(12, 20) & (columns["attention_mask"] != 0)
    columns["labels"] = columns["input_ids"].masked_fill(~hidden, -100)
    columns["input_ids"] = columns["input_ids"].masked_fill(hidden, 1)
    task = TASK["masked-lm"].value()
    import transformers

    config = transformers.BertConfig(
        vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    torch.manual_seed(0)
    dense = Subject("dense", transformers.BertForMaskedLM(config).eval(), task, {"test": columns})
    changed = dense.copy()
    with torch.no_grad():
        changed.model.cls.predictions.bias.normal_()
    table = ASKED.between(dense, changed).table
    assert table["kl"].notna().sum() == hidden.sum() and len(table) == columns["attention_mask"].sum()
    shown = torch.where(hidden, columns["labels"], columns["input_ids"])[columns["attention_mask"] != 0]
    assert table["token"].tolist() == shown.tolist()


def test_only_what_is_written_is_shown_of_an_encoder_decoder():
    dense = on("t5", examples("t5"))
    labels = dense.split("test")["labels"][3]
    assert tokens_of(dense, "test", 3)[0] == labels[labels != -100].tolist()


def test_tokens_are_spelled_with_their_spaces():
    class Meta:
        def convert_ids_to_tokens(self, token):
            return ["\N{LOWER ONE EIGHTH BLOCK}the", "ing", None][token]

        def decode(self, ids, **options):
            return "the" if ids == [0] else "ing"

    spell = Words(Meta())
    assert [spell(0), spell(1), spell(2), Words(None)(7)] == [" the", "ing", "#2", "#7"]
    assert visible("a\n\tb\x00") == "a↵⇥b·" and visible("x" * 30, 5) == "xxxx…"
    assert laid_out(["ab", "c\n", "", "漢"], 4) == [(0, 0, 2), (0, 2, 2), (1, 0, 1), (1, 1, 2)]
    assert laid_out(["abc", "de"], 4) == [(0, 0, 3), (1, 0, 2)]


def test_ink_stands_out_from_every_colour():
    """WCAG's contrast of at least 4.5 : 1 over the whole scale."""
    import plotly.colors

    scale = Colours(10.0)
    values = np.geomspace(1e-4, 10, 200)
    places = (scale.places(values) - scale.low) / (scale.high - scale.low)
    papers = plotly.colors.sample_colorscale("Cividis", places.tolist(), colortype="tuple")

    def light(rgb):
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    for paper, ink in zip(papers, scale.inks(values), strict=True):
        one, two = sorted((light(paper), light(plotly.colors.unlabel_rgb(hex_rgb(ink)))))
        assert (two + 0.05) / (one + 0.05) > 4.5


def hex_rgb(value: str) -> str:
    return "rgb(" + ",".join(str(int(value[k : k + 2], 16) / 255) for k in (1, 3, 5)) + ")"


def test_from_the_command_line(tmp_path: Path, capsys):
    columns = examples("llama")
    on("llama", columns).save(tmp_path / "dense")
    on("llama", columns, 0.05).save(tmp_path / "changed")
    out = tmp_path / "out"
    given = ["--subject", str(tmp_path / "dense"), "--changed", str(tmp_path / "changed")]
    assert main(["run", "token-strip", *given, "--test-examples", "3", "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith("token-strip: KL ")
    assert len(workbench.Result.load(next(out.rglob("result.json")).parent).figure().data) == 2


@pytest.mark.parametrize(
    "changed, message", [("", "changed: is empty"), ("none.gguf", "changed: 'none.gguf' is not a file")]
)
def test_refused_before_anything_is_computed(changed, message):
    with pytest.raises(BadInput, match=message) as caught:
        TokenStrip(changed=changed).run(workbench.subject("bytelm"))
    assert "\n" not in str(caught.value)


def test_tasks_without_words_are_refused(checkpoints):
    """Kind: an answer that is a number, a vector or a picture has no words to show."""
    columns = examples("bert") | {"labels": torch.zeros(12)}
    dense = Subject("numbers", on("bert", columns).model, TASK["regression"].value(), {"test": columns})
    with pytest.raises(BadInput, match="the task regression answers with numbers"):
        ASKED.between(dense, dense)
    pixels = {"inputs": torch.zeros(8, 2, 4, 4), "labels": torch.zeros(8, 4, 4, dtype=torch.long)}
    image = Subject("pixels", torch.nn.Conv2d(2, 3, 1), TASK["classification"].value(), {"test": pixels})
    with pytest.raises(BadInput, match="an answer for each pixel"):
        ASKED.between(image, image)


def test_stopped_at_once_is_one_line():
    progress = Progress()
    progress.stop.set()
    for architecture in ("llama", "bert"):
        columns = examples(architecture)
        with pytest.raises(Stopped, match="stopped before anything of 'test' was measured"):
            ASKED.between(on(architecture, columns), on(architecture, columns, 0.05), progress)
