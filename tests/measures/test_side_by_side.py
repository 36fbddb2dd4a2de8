"""Two models go on with the same texts: against transformers' own generation and words drawn by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import workbench
from tests.measures.test_measures import examples, on
from workbench import BadInput
from workbench.cli import main
from workbench.measures import SideBySide
from workbench.measures.texts.continued import continued, ends_of, next_words, parting, repetition, until_end
from workbench.progress import Progress

ASKED = SideBySide(changed="at hand", test_examples=6, prompt_tokens=5, new_tokens=12)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "mixtral"])
def test_greedily_it_is_transformers_own_generation(architecture):
    dense = on(architecture, examples(architecture), 0.1)
    prompts = dense.split("test")["input_ids"][:3, :5]
    own = dense.model.generate(
        prompts, do_sample=False, max_new_tokens=10, min_new_tokens=10, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(continued(dense.model, prompts, 10), own[:, 5:])
    dense.model.config.use_cache = False
    assert torch.equal(continued(dense.model, prompts, 10), own[:, 5:])


def test_words_are_drawn_from_the_distribution():
    logits = torch.tensor([0.2, 0.5, 0.3]).log().expand(4000, 3)
    draws = (torch.arange(4000) + 0.5) / 4000
    drawn = next_words(logits, draws)
    assert torch.bincount(drawn).tolist() == [800, 2000, 1200]
    assert next_words(torch.tensor([[0.0, -torch.inf]]), torch.tensor([0.9999999])).tolist() == [0]


def test_a_model_beside_itself_never_parts():
    dense = on("llama", examples("llama"), 0.1)
    result = ASKED.between(dense, dense.copy())
    assert result.table["parts_at"].isna().all() and len(result.table) == 12
    assert result.facts["greedy_same"] == 1 == result.facts["sampled_same"]
    tokens = result.tables["tokens"]
    assert (tokens["dense"] == tokens["changed"]).all()
    assert list(result.figure().data[0].y)[-1] == 6 and "never part" in drawn_title(result)


def drawn_title(result):
    return result.figure(show="a text", text=2).layout.title.text


def test_where_they_part_both_have_read_the_same():
    """The divergence at the first differing token, from whole logits in double precision."""
    dense, changed = on("llama", examples("llama"), 0.1), on("llama", examples("llama"), 0.12)
    result = ASKED.between(dense, changed)
    table, top = result.table, result.tables["top"]
    parted = table[table["parts_at"].notna()]
    assert len(parted) > 2
    for _, row in parted.iterrows():
        pair = result.tables["tokens"]
        pair = pair[(pair["text"] == row["text"]) & (pair["way"] == row["way"])]
        place = int(row["parts_at"])
        apart = (pair["dense"] != pair["changed"]).to_numpy()
        assert apart[place] and not apart[:place].any()
        ids = [int(word[1:]) for word in pair["dense"][:place]]
        read = torch.cat([dense.split("test")["input_ids"][row["text"]][:5], torch.tensor(ids, dtype=int)])
        p, q = (s.model(read[None]).logits[0, -1].detach().double().log_softmax(-1) for s in (dense, changed))
        assert row["kl"] == pytest.approx(float((p.exp() * (p - q)).sum()), abs=1e-6)
        if row["way"] == "greedy":
            assert int(pair["dense"].iloc[place][1:]) == p.argmax() != q.argmax()
            mine = top[(top["text"] == row["text"]) & (top["way"] == "greedy")]
            assert mine["dense"].iloc[0] == pair["dense"].iloc[place]
    assert result.facts["greedy_same"] == table[table["way"] == "greedy"]["parts_at"].isna().mean()
    again = ASKED.between(dense, changed)
    assert again.tables["tokens"].equals(result.tables["tokens"])
    figure = result.figure(show="a text", text=1, way="sampled")
    assert [len(trace.text) for trace in figure.data] == [12, 12]
    assert sum(sum(trace.y) for trace in result.figure().data) == 12


def test_repetition_and_parting():
    assert repetition([1, 2, 3, 4] * 3) == pytest.approx(1 - 4 / 9) and repetition([1, 2]) == 0.0
    assert repetition([7] * 6) == pytest.approx(2 / 3)
    assert parting(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4])) == 2
    assert parting(torch.tensor([1]), torch.tensor([1])) is None


def test_the_chat_template_is_applied():
    class Chat:
        chat_template = "there is one"

        def decode(self, ids, **options):
            return "-".join(map(str, ids))

        def apply_chat_template(self, said, **options):
            assert said[0]["role"] == "user" and options["add_generation_prompt"]
            return f"user {said[0]['content']} assistant"

        def __call__(self, text, **options):
            return {"input_ids": [len(part) for part in text.split()]}

    assert ASKED.in_template(Chat(), torch.tensor([10, 20])).tolist() == [4, 5, 9]
    assert ASKED.with_fields(chat=False).in_template(Chat(), torch.tensor([10, 20])).tolist() == [10, 20]


def test_from_the_command_line_and_saved(tmp_path, capsys):
    on("llama", examples("llama")).save(tmp_path / "dense")
    on("llama", examples("llama"), 0.05).save(tmp_path / "changed")
    given = ["--subject", str(tmp_path / "dense"), "--changed", str(tmp_path / "changed")]
    sizes = ["--test-examples", "2", "--new-tokens", "4", "--prompt-tokens", "3"]
    assert main(["run", "side-by-side", *given, *sizes, "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.startswith("side-by-side: reference")
    result = workbench.Result.load(next((tmp_path / "out").rglob("result.json")).parent)
    assert result.figure(show="a text", way="sampled").data[1].name == "changed"


def test_other_tasks_and_an_early_stop():
    bert = on("bert", examples("bert"))
    with pytest.raises(BadInput, match="sequence-classification continues no text"):
        ASKED.between(bert, bert)
    progress = Progress()
    progress.stop.set()
    dense = on("llama", examples("llama"))
    result = ASKED.between(dense, dense, progress)
    assert len(result.table) == 0 and np.sum([t.y for t in result.figure().data or ()]) == 0


def test_nothing_is_compared_after_the_end_of_a_text():
    """Kind: what a model would say after its end of text is no difference; the end itself is one."""
    tokens = torch.tensor([[1, 9, 2, 9, 3], [1, 2, 3, 4, 9], [9, 1, 1, 1, 1], [1, 2, 3, 4, 5]])
    want = [[1, 9, -1, -1, -1], [1, 2, 3, 4, 9], [9, -1, -1, -1, -1], [1, 2, 3, 4, 5]]
    assert until_end(tokens, [9]).tolist() == want and until_end(tokens, []).tolist() == tokens.tolist()
    dense = on("llama", examples("llama"), 0.1)
    first = continued(dense.model, dense.split("test")["input_ids"][:1, :5], 1)
    dense.model.generation_config.eos_token_id = [int(first)]
    assert ends_of(dense.model) == [int(first)]
    result = ASKED.with_fields(test_examples=1, choose="greedy").between(dense, dense.copy())
    assert result.tables["tokens"]["dense"].tolist() == [f"#{int(first)}"] + [""] * 11
    assert len(result.figure(show="a text").data[0].text) == 1 and result.facts["greedy_same"] == 1
