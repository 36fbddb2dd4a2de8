"""Probabilities of continuations, against whole logits in double precision."""

from __future__ import annotations

import pytest
import torch

from tests.measures.suites.speaking import WORDS, speaking
from workbench import BadInput
from workbench.measures.suites.continuations import answered, asked_of, batches


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
