"""The measures of `fidelity` beside those that llama.cpp's perplexity tool prints with `--kl-divergence`.

The pair and the printed numbers are stored, so llama.cpp is not run again. Of the base it keeps a scale and a
minimum a token and 16 bits a word (`_logits_`), so that these probabilities sum to S, near 1 but not 1; words
below e^-16 are not counted. Ours are of distributions that sum to 1: D_stored = S (D + ln S) and
ln p_stored = ln p + ln S, exactly.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.identity.pairs import Draw, beside
from workbench.measures.intervals import quantiles
from workbench.measures.language import TokenPairs
from workbench.measures.reference import Answer, Comparison, joined, measured_in, paired, same
from workbench.storage.identity import PEER

PAIR = Path(__file__).with_name("llama_cpp.npz")
#: What was run, and the tables that it printed.
RUN: dict[str, Any] = json.loads(PAIR.with_suffix(".json").read_text(encoding="utf-8"))
#: ln of the probability from which on llama.cpp counts a word of the base.
LEAST = -16.0
Real = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Pair:
    """log_p : (tokens, vocabulary) of the base as it is stored;  logits : of the other model, as computed
    targets, window : (tokens,)
    """

    log_p: NDArray[np.float32]
    logits: NDArray[np.float32]
    targets: NDArray[np.int64]
    window: NDArray[np.int64]

    @property
    def counted(self) -> NDArray[np.bool_]:
        """(tokens, vocabulary) the words of the base that llama.cpp counts, and the target."""
        counted = self.log_p > LEAST
        counted[np.arange(len(self.targets)), self.targets] = True
        return counted


def stored_pair() -> Pair:
    """The pair of the suite."""
    with np.load(PAIR) as kept:
        return pair_of_files(kept["base"].tobytes(), kept["logits"])


def pair_of_files(base: bytes, logits: NDArray[np.float32]) -> Pair:
    """What `--kl-divergence-base` wrote of the base, beside the other model's logits.

    The file: "_logits_", n_ctx, words, chunks and the tokens as 32-bit integers, then for each token of the
    second halves scale and minimum as 32-bit floats and the words as 16-bit integers, their count made even.
    """
    assert base[:8] == b"_logits_"
    length, words, chunks = (int(n) for n in np.frombuffer(base, np.int32, 3, 8))
    tokens = np.frombuffer(base, np.int32, chunks * length, 20).reshape(chunks, length)
    begun, even = length // 2, 2 * ((words + 1) // 2)
    start = 20 + tokens.nbytes
    rows = np.frombuffer(base, np.uint16, offset=start).reshape(-1, even + 4)
    assert len(rows) == chunks * (length - 1 - begun)
    scale, least = rows[:, :4].copy().view(np.float32).T[..., None]
    return Pair(
        scale * rows[:, 4 : 4 + words] + least,
        logits.reshape(-1, words),
        tokens[:, begun + 1 :].reshape(-1).astype(np.int64),
        np.repeat(np.arange(chunks), length - 1 - begun),
    )


def comparison(
    dense: Real, changed: Real, targets: NDArray[np.int64], window: NDArray[np.int64]
) -> Comparison:
    """Two models' logits (tokens, vocabulary) compared as `fidelity` compares them."""
    where = torch.from_numpy(window), torch.arange(len(window))

    def answer(logits: Real) -> Answer:
        rows = torch.from_numpy(np.array(logits, np.float32))
        return Answer(rows, same, torch.from_numpy(targets), *where, logits.shape[-1])

    found = paired("language", answer(dense), answer(changed))
    loss, _ = measured_in(found)
    return Comparison("language", joined("language", [found]), {"loss": loss})


def plain(pair: Pair) -> Comparison:
    """The stored base taken as a distribution."""
    return comparison(pair.log_p, pair.logits, pair.targets, pair.window)


def as_stored(pair: Pair) -> Comparison:
    """The stored base as llama.cpp reads it: it sums to S, and what it does not count is no word."""
    log_p = np.where(pair.counted, pair.log_p, -np.inf)
    found = comparison(log_p, pair.logits, pair.targets, pair.window)
    assert isinstance(found.pairs, TokenPairs)
    total = np.exp(log_p.astype(np.float64)).sum(-1)
    pairs = replace(
        found.pairs,
        divergence=total * (found.pairs.divergence + np.log(total)),
        dense_log_p=found.pairs.dense_log_p + np.log(total),
    )
    return replace(found, pairs=pairs)


def ours(found: Comparison) -> dict[str, float]:
    """llama.cpp's label -> our number in its unit. What it prints after "±" are standard errors as if tokens
    were independent; ours are 95 % intervals over windows, which is another thing.
    """
    pairs, numbers = found.pairs, found.measures()
    assert isinstance(pairs, TokenPairs)
    ratio = numbers["ln_perplexity_ratio"]
    changed, dense = np.exp(found.evaluation["loss"]), np.exp(-pairs.dense_log_p.mean())
    low_10, low_5, low_1, least = quantiles(pairs.divergence, (0.1, 0.05, 0.01, 0))
    moved = quantiles(pairs.probability_change, (1, 0.9, 0.75, 0.25, 0.1, 0))
    most, high_90, high_75, low_25, moved_10, fewest = moved
    return {
        "Mean PPL(Q)": float(changed),
        "Mean PPL(base)": float(dense),
        "Mean ln(PPL(Q)/PPL(base))": ratio,
        "Mean PPL(Q)/PPL(base)": float(np.exp(ratio)),
        "Mean PPL(Q)-PPL(base)": float(changed - dense),
        "Mean KLD": numbers["kl"],
        "Maximum KLD": numbers["kl_max"],
        "99.9% KLD": numbers["kl_999"],
        "99.0% KLD": numbers["kl_99"],
        "Median KLD": numbers["kl_median"],
        "10.0% KLD": low_10,
        "5.0% KLD": low_5,
        "1.0% KLD": low_1,
        "Minimum KLD": least,
        "Mean Δp": 100 * numbers["delta_p_mean"],
        "Maximum Δp": 100 * most,
        "99.9% Δp": 100 * numbers["delta_p_99_9"],
        "99.0% Δp": 100 * numbers["delta_p_99"],
        "95.0% Δp": 100 * numbers["delta_p_95"],
        "90.0% Δp": 100 * high_90,
        "75.0% Δp": 100 * high_75,
        "Median Δp": 100 * numbers["delta_p_50"],
        "25.0% Δp": 100 * low_25,
        "10.0% Δp": 100 * moved_10,
        "5.0% Δp": 100 * numbers["delta_p_5"],
        "1.0% Δp": 100 * numbers["delta_p_1"],
        "0.1% Δp": 100 * numbers["delta_p_0_1"],
        "Minimum Δp": 100 * fewest,
        "RMS Δp": 100 * numbers["delta_p_rms"],
        "Same top p": 100 * numbers["same_top"],
    }


def printed(text: str) -> dict[str, tuple[str, str]]:
    """Label -> number and uncertainty as they are printed, the second empty where there is none."""
    row = re.compile(r"^\s*(.*\S)\s*: +(-?[\d.]+)%?(?: ± +(-?[\d.]+|nan))?", re.MULTILINE)
    return {" ".join(name.split()): (value, error) for name, value, error in row.findall(text)}


def digit(number: str) -> float:
    """One in the last place of a printed number."""
    return 10.0 ** -len(number.partition(".")[2])


def beside_printed(draw: Draw, *ends: str) -> tuple[Tensor, Tensor]:
    """Printed and ours, of the labels that end so."""
    pair = stored_pair()
    draw.shapes.append(list(pair.logits.shape))
    mine, theirs = ours(as_stored(pair)), printed("\n".join(RUN["printed"]))
    labels = [label for label in mine if label.endswith(ends)]
    return (
        torch.tensor([float(theirs[label][0]) for label in labels], dtype=torch.float64),
        torch.tensor([mine[label] for label in labels], dtype=torch.float64),
    )


BESIDE = dict(
    peer="llama.cpp",
    version="b4748 c392e50",
    kind=PEER,
    inputs="124 bytes that bytelm and its int4 rounding (a scale a tensor) predict",
)


@beside(
    "fidelity",
    compared="the divergence in nats (mean, extremes, quantiles)",
    tolerance=1e-6,
    finding="of the base as its file has it, in 16 bits and without words below e^-16",
    **BESIDE,
)
def divergence(draw: Draw) -> tuple[Tensor, Tensor]:
    return beside_printed(draw, "KLD")


@beside("fidelity", compared="perplexities and the ln of their ratio", tolerance=1e-6, **BESIDE)
def perplexity(draw: Draw) -> tuple[Tensor, Tensor]:
    return beside_printed(draw, "PPL(Q)", "PPL(base)", "PPL(base))")


@beside(
    "fidelity",
    compared="the change of p(correct) (mean, RMS, extremes, quantiles) and the share of the same first "
    "choice, in percent",
    tolerance=1e-3,
    **BESIDE,
)
def probability(draw: Draw) -> tuple[Tensor, Tensor]:
    return beside_printed(draw, "Δp", "Same top p")
