"""``hidden-markov``: sequences of a hidden Markov chain and a small causal transformer, untrained.

The downstream question has an answer here: which hidden state is the chain in?
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from workbench.progress import Progress
from workbench.subjects.builtin import Parts


@dataclass(frozen=True)
class Corpus:
    """Token sequences (n, length), and the hidden state at every position."""

    tokens: Tensor
    states: Tensor


def chain_rules(states: int = 6, tokens: int = 24, rules: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(states, states) chances of the next state, and (states, tokens) of what a state emits."""
    world = np.random.default_rng(rules)
    move = 0.85 * np.eye(states)[world.permutation(states)] + 0.15 * world.dirichlet(np.ones(states), states)
    return move, world.dirichlet(0.35 * np.ones(tokens), states)


def exact_loss(sequences: np.ndarray, move: np.ndarray, emit: np.ndarray) -> float:
    """Nats a token, from the second on, of the best predictor there is: the filter that knows the chain.

    sequences (n, length) of tokens; the first hidden state is uniform.
    """
    belief = np.full((len(sequences), len(move)), 1 / len(move))
    lost = 0.0
    for t in range(sequences.shape[1]):
        joint = belief * emit[:, sequences[:, t]].T
        chance = joint.sum(1, keepdims=True)
        lost -= float(np.log(chance).sum()) if t else 0.0
        belief = joint / chance @ move
    return lost / sequences[:, 1:].size


def hidden_markov(
    count: int, length: int = 24, states: int = 6, tokens: int = 24, seed: int = 0, rules: int = 0
) -> Corpus:
    """Sequences of a sticky hidden chain whose states emit overlapping sets of tokens;
    `rules` seeds the chain itself.
    """
    draw = np.random.default_rng(seed)
    move, emit = chain_rules(states, tokens, rules)
    hidden = np.empty((count, length), dtype=np.int64)
    seen = np.empty_like(hidden)
    hidden[:, 0] = draw.integers(states, size=count)
    for t in range(length):
        if t:
            hidden[:, t] = (
                (draw.random(count)[:, None] > move[hidden[:, t - 1]].cumsum(1)).sum(1).clip(max=states - 1)
            )
        seen[:, t] = (draw.random(count)[:, None] > emit[hidden[:, t]].cumsum(1)).sum(1).clip(max=tokens - 1)
    return Corpus(torch.tensor(seen), torch.tensor(hidden))


def small_model(seed: int, width: int = 32, tokens: int = 24) -> nn.Module:
    """A GPT-2 of two layers with random weights."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=tokens,
        n_embd=width,
        n_layer=2,
        n_head=2,
        n_positions=32,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


def chain(progress: Progress | None = None) -> Parts:
    """An untrained model, texts to train it on, and the splits `read` and `asked` with the hidden state of
    every position, for a probe to be fitted on and judged by.
    """
    counts = {"train": 4096, "validation": 512, "read": 1024, "asked": 1024, "test": 512}
    drawn = {name: hidden_markov(count, seed=i) for i, (name, count) in enumerate(counts.items())}
    splits = {
        name: {"input_ids": corpus.tokens}
        | ({"states": corpus.states} if name in ("read", "asked") else {"labels": corpus.tokens.clone()})
        for name, corpus in drawn.items()
    }
    splits["calibration"] = {k: v[:256] for k, v in splits["train"].items()}
    with torch.random.fork_rng(devices=[]):
        model = small_model(0)
    note = "sequences of a hidden Markov chain of 6 states and 24 tokens; the model is untrained"
    return Parts(model, "causal-lm", splits, info={"note": note})
