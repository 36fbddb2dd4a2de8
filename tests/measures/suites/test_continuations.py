"""Probabilities of continuations, against whole logits in double precision."""

from __future__ import annotations

import pytest
import torch

from tests.measures.suites.speaking import WORDS, speaking
from workbench import BadInput
from workbench.measures.suites import continuations
from workbench.measures.suites.continuations import answered, asked_of, batches, planned


def some_pairs(count: int = 20) -> list[tuple[list[int], list[int]]]:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 30, (count, 2), generator=generator).tolist()
    pairs = [
        (
            torch.randint(0, WORDS, (a,), generator=generator).tolist(),
            torch.randint(0, WORDS, (b,), generator=generator).tolist(),
        )
        for a, b in lengths
    ]
    context, tokens = pairs[0]
    return [*pairs, *[(context, [*tokens[:-1], word]) for word in (1, 2, 3)], (context, tokens)]


@torch.no_grad()
def by_hand(on, context: list[int], tokens: list[int], length: int) -> tuple[float, bool]:
    whole = torch.tensor([*context, *tokens])[-(length + 1) :]
    log_p = on.model(whole[None, :-1]).logits[0].double().log_softmax(-1)[-len(tokens) :]
    wanted = torch.tensor(tokens)
    return float(log_p.gather(-1, wanted[:, None]).sum()), bool((log_p.argmax(-1) == wanted).all())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("positions", [512, 34])
def test_it_is_the_sum_over_whole_logits(architecture, positions):
    """Cut on the left where the model reads less; a table of positions is not run over."""
    on, pairs = speaking(architecture, positions=positions), some_pairs()
    found = answered(on, pairs, 128)
    for (context, tokens), answer in zip(pairs, found, strict=True):
        log_p, greedy = by_hand(on, context, tokens, positions)
        assert answer[0] == pytest.approx(log_p, abs=1e-4) and answer[1] == greedy


def test_the_most_probable_continuation_is_told():
    on = speaking()
    context = [1, 2, 3]
    for _ in range(3):
        context.append(int(on.model(torch.tensor([context])).logits[0, -1].argmax()))
    pairs = [(context[:3], context[3:]), (context[:3], [*context[3:5], (context[5] + 1) % WORDS])]
    assert [answer[1] for answer in answered(on, pairs)] == [True, False]


def test_batches_hold_so_many_tokens_and_change_nothing():
    on, pairs = speaking(), some_pairs()
    texts = asked_of(pairs, 512)
    assert len(texts) == 20 and sum(len(text.wanted) for text in texts) == len(pairs)
    for tokens in (1, 64, 10_000):
        sizes = [len(batch) * max(len(text.read) for text in batch) for batch in batches(texts, tokens)]
        assert all(size <= tokens for size in sizes) or tokens == 1 == max(len(b) for b in batches(texts, 1))
        found = answered(on, pairs, tokens)
        assert [a[0] for a in found] == pytest.approx([a[0] for a in answered(on, pairs)], abs=1e-5)


def test_what_has_no_probability_is_refused():
    """Kind: an item that the model cannot answer is one line, not an error from within."""
    on = speaking(positions=34)
    with pytest.raises(BadInput, match="continuation is empty"):
        answered(on, [([1], [])])
    with pytest.raises(BadInput, match="35 tokens and the model reads 34"):
        answered(on, [([1], [2] * 35)])
    with pytest.raises(BadInput, match=f"gives id {WORDS} and the model says {WORDS} words"):
        answered(on, [([1, 2], [WORDS])])


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_context_is_read_once_for_its_choices(architecture, monkeypatch):
    """The same answers with fewer tokens read; a model that answers otherwise reads everything whole."""
    on = speaking(architecture)
    generator = torch.Generator().manual_seed(7)
    words = torch.randint(0, WORDS, (4, 4, 50), generator=generator).tolist()
    pairs = [(item[0], choice[: 3 + 2 * k]) for item in words for k, choice in enumerate(item)]
    pairs += [(words[0][0], [7]), (words[0][0][:40], words[0][0][40:])]
    texts = asked_of(pairs, 512)
    work = planned(texts, 2048, 64)
    assert sorted(batch.shared for batch in work) == [0, 49, 49, 49, 49]
    assert sum(len(batch.texts) for batch in work) == len(texts)
    read: list[int] = []

    def count(module, args, call):
        read.append((args[0] if args else call["input_ids"]).numel())

    on.model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    found = answered(on, pairs)
    kept = sum(read)
    read.clear()
    monkeypatch.setattr(continuations, "least_shared", lambda on: 10**9)
    whole = answered(on, pairs)
    assert kept < 0.7 * sum(read)  # with the first context read both ways
    for one, two, (context, tokens) in zip(found, whole, pairs, strict=True):
        assert one[1] == two[1] and one[0] == pytest.approx(two[0], abs=1e-4)
        assert one[0] == pytest.approx(by_hand(on, context, tokens, 512)[0], abs=1e-4)
    monkeypatch.undo()
    plain = continuations.asked_together
    wrong = lambda on, texts, shared=0, cache=None: [  # noqa: E731
        (place, (log_p - 1.0 * (shared > 0), greedy)) for place, (log_p, greedy) in plain(on, texts)
    ]
    monkeypatch.setattr(continuations, "asked_together", wrong)
    assert [a[0] for a in answered(on, pairs)] == pytest.approx([a[0] for a in whole], abs=1e-4)


def test_a_model_without_a_cache_of_that_kind_reads_everything():
    """Kind: what an architecture lacks costs time, not the answer."""
    on, pairs = speaking(), [([*range(100)], [k, k + 1]) for k in range(5)]
    expected = [by_hand(on, context, tokens, 512)[0] for context, tokens in pairs]
    forward = on.model.forward

    def refusing(**call):
        assert call.get("past_key_values") is None, "no cache here"
        return forward(**call)

    on.model.forward = refusing
    assert [a[0] for a in answered(on, pairs)] == pytest.approx(expected, abs=1e-4)
