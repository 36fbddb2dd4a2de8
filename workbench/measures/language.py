"""How two language models differ on the same target tokens, from the logits of both, a chunk at a time.

With p the dense model's distribution over the vocabulary, q the changed one's and c the target:

    divergence  sum_v p_v (ln p_v - ln q_v)      in nats, 0 where they are the same
    acceptance  sum_v min(p_v, q_v)              the chance that a token drafted by q is kept by p
                                                 (speculative decoding, Leviathan et al. 2023, eq. 2)
    ln(PPL ratio)  mean (ln p_c - ln q_c)        paired over the tokens
    change of p(correct)  q_c - p_c              llama.cpp's "delta p" (tools/perplexity)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from workbench.kernels.training.cross_entropy_rows import places_of_largest
from workbench.measures.intervals import block_bootstrap, quantiles
from workbench.storage.resident import trim
from workbench.subjects.vocabulary import wide

#: Upper bounds of the dense model's probability of its own first choice.
CONFIDENCE = (0.25, 0.5, 0.75, 0.95, 1.0)
#: Bytes of one chunk's logits. Four arrays of that size live at a time.
CHUNK_BYTES = 24 * 2**20


@dataclass(frozen=True)
class TokenPairs:
    """One entry a target token, in the order of windows and positions."""

    window: NDArray[np.int64]  # example of the split
    position: NDArray[np.int64]
    divergence: NDArray[np.float64]  # nats
    acceptance: NDArray[np.float64]
    confidence: NDArray[np.float64]  # of the dense model in its first choice
    same_top: NDArray[np.bool_]
    dense_log_p: NDArray[np.float64]  # of the target
    changed_log_p: NDArray[np.float64]
    right: NDArray[np.bool_]  # whether the changed model's first choice is the target

    @classmethod
    def of(cls, parts: Sequence[dict[str, Tensor]]) -> TokenPairs:
        whole = {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}
        order = np.lexsort((whole["position"], whole["window"]))
        wanted = {"window": np.int64, "position": np.int64, "same_top": np.bool_, "right": np.bool_}
        return cls(
            **{f.name: whole[f.name][order].astype(wanted.get(f.name, np.float64)) for f in fields(cls)}
        )

    @property
    def probability_change(self) -> NDArray[np.float64]:
        return np.exp(self.changed_log_p) - np.exp(self.dense_log_p)


def chunk_length(vocabulary: int) -> int:
    """Tokens whose logits are formed at a time."""
    return max(1, CHUNK_BYTES // (4 * vocabulary))


@torch.no_grad()
def pair_of(dense: Tensor, changed: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """What is kept of the logits (n, vocabulary) of both, each (n,). Overwrites both."""
    places = targets[:, None]
    z_p, p, ln_sum_p, choice = softmax_of(dense)
    z_q, q, ln_sum_q, changed_choice = softmax_of(changed)
    found = {
        "confidence": (-ln_sum_p[:, 0]).exp(),
        "same_top": choice == changed_choice,
        "right": changed_choice == targets,
        "dense_log_p": (z_p.gather(-1, places) - ln_sum_p)[:, 0],
        "changed_log_p": (z_q.gather(-1, places) - ln_sum_q)[:, 0],
    }
    terms = z_p.sub_(z_q).sub_(ln_sum_p - ln_sum_q).mul_(p)
    divergence = terms.sum(-1)
    if not divergence.isfinite().all():  # a word that neither model can say has ln 0 twice, and adds nothing
        divergence = torch.where(p == 0, 0.0, terms).sum(-1)
    found["divergence"] = divergence
    found["acceptance"] = torch.minimum(p, q, out=q).sum(-1)
    return found


def softmax_of(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits less their largest one (overwritten), their softmax, the ln of the sum of their exponentials
    (n, 1), and the place of the largest (n,): one exponential for all of it.
    """
    choice = places_of_largest(logits)
    below = logits.sub_(logits.gather(-1, choice[:, None]))
    chances = below.exp()
    total = chances.sum(-1, keepdim=True)
    return below, chances.div_(total), total.log(), choice


def pairs_in_chunks(
    dense: Tensor, dense_head: Any, changed: Tensor, changed_head: Any, targets: Tensor, vocabulary: int
) -> dict[str, Tensor]:
    """`pair_of` over chunks of rows (n, width) of both models, each with its own head; the same chunks."""
    step = chunk_length(vocabulary)
    parts = []
    trim()
    for first in range(0, len(targets), step):
        part = slice(first, first + step)
        logits = [
            fresh(wide(head(rows[part])), rows)
            for rows, head in ((dense, dense_head), (changed, changed_head))
        ]
        parts.append(pair_of(logits[0], logits[1], targets[part]))
        del logits  # before the next two are formed
    return {name: torch.cat([part[name] for part in parts]).double() for name in parts[0]}


def fresh(logits: Tensor, rows: Tensor) -> Tensor:
    """Logits that may be overwritten."""
    return (
        logits.clone() if logits.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr() else logits
    )


def language_measures(pairs: TokenPairs, seed: int = 0) -> dict[str, float]:
    """The numbers of one text domain."""
    low, high = block_bootstrap(pairs.divergence, pairs.window, seed)
    ratio = pairs.dense_log_p - pairs.changed_log_p
    ratio_low, ratio_high = block_bootstrap(ratio, pairs.window, seed)
    lower, median, upper, high_99, high_999 = quantiles(pairs.divergence, (0.25, 0.5, 0.75, 0.99, 0.999))
    moved = pairs.probability_change
    found = {
        "kl": float(pairs.divergence.mean()),
        "kl_low": low,
        "kl_high": high,
        "kl_quarter": lower,
        "kl_median": median,
        "kl_three_quarters": upper,
        "kl_99": high_99,
        "kl_999": high_999,
        "kl_max": float(pairs.divergence.max()),
        "same_top": float(pairs.same_top.mean()),
        "acceptance": float(pairs.acceptance.mean()),
        "ln_perplexity_ratio": float(ratio.mean()),
        "ln_perplexity_ratio_low": ratio_low,
        "ln_perplexity_ratio_high": ratio_high,
        "delta_p_rms": float(np.sqrt(np.square(moved).mean())),
        "delta_p_mean": float(moved.mean()),
        "tokens": float(len(moved)),
    }
    shares = (0.001, 0.01, 0.05, 0.5, 0.95, 0.99, 0.999)
    for share, value in zip(shares, quantiles(moved, shares), strict=True):
        found[f"delta_p_{100 * share:g}".replace(".", "_")] = value
    return found


def confidence_table(pairs: TokenPairs) -> pd.DataFrame:
    """Mean divergence where the dense model is so sure of its first choice: one row a bucket."""
    rows, below = [], 0.0
    for bound in CONFIDENCE:
        top = bound == CONFIDENCE[-1]
        inside = (pairs.confidence >= below) & ((pairs.confidence < bound) | top)
        rows.append(
            {
                "confidence": f"{below:g} to {bound:g}",
                "tokens": int(inside.sum()),
                "share": float(inside.mean()),
                "kl": float(pairs.divergence[inside].mean()) if inside.any() else float("nan"),
                "same_top": float(pairs.same_top[inside].mean()) if inside.any() else float("nan"),
            }
        )
        below = bound
    return pd.DataFrame(rows)
