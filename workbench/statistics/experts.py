"""How many calibration tokens reached each expert of a mixture: what an expert that none reached becomes is a
guess, and is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from workbench.progress import Progress
from workbench.statistics.inputs import InputMoments
from workbench.storage.resident import disk
from workbench.subjects import Layer


@dataclass
class ExpertsSeen:
    """tokens : layer -> calibration tokens of each of its experts, of layers that hold several
    errors : one row for each expert that none reached, see `measure`
    dense : layer -> expert -> its weight (out, in) as it was, where that was kept in memory
    """

    tokens: dict[str, list[int]] = field(default_factory=dict)
    errors: list[dict[str, Any]] = field(default_factory=list)
    dense: dict[str, dict[int, Tensor]] = field(default_factory=dict)

    def measure(
        self,
        layer: str,
        moments: InputMoments,
        before: Tensor,
        after: Tensor,
        rival: str,
        other: Callable[[int], Tensor | None],
    ) -> None:
        """What was done with the experts of a layer that no token reached, were all of the layer's tokens
        routed to them: squared output errors as shares of the output's energy under the second moment of what
        its other experts read.

        before, after : (experts, out, in) weights;  rival, other : another treatment, and what it makes of an
            expert's weight
        output_error, rival_error : of what was done, and of the other treatment
        reached_error : mean over the layer's other experts, each on its own tokens
        """
        assert moments.gram is not None
        counts = moments.tokens
        lost = [expert for expert, count in enumerate(counts.tolist()) if not count]
        if not lost or not bool(counts.any()):
            return
        pooled = moments.gram.sum(0) / counts.sum()
        reached = [
            output_error(before[e], after[e] - before[e], moments.gram[e])
            for e in range(len(counts))
            if e not in lost
        ]
        for expert in lost:
            weight, made = before[expert].float(), other(expert)
            row = {"layer": layer, "expert": expert}
            row["output_error"] = output_error(weight, after[expert] - weight, pooled)
            row["rival"] = rival
            row["rival_error"] = float("nan") if made is None else output_error(weight, made - weight, pooled)
            self.errors.append(row | {"reached_error": sum(reached) / len(reached)})
            if disk() is None:
                self.dense.setdefault(layer, {})[expert] = before[expert].clone()

    def add(self, layer: str, moments: InputMoments) -> None:
        if len(moments.tokens) > 1:
            self.tokens[layer] = [int(count) for count in moments.tokens]

    def record(self, layers: Iterable[Layer]) -> dict[str, Any]:
        """What JSON can hold of some layers."""
        names = {layer.name for layer in layers}
        return {
            "experts": {name: counts for name, counts in self.tokens.items() if name in names},
            "unseen": [row for row in self.errors if row["layer"] in names],
        }

    def take(self, record: dict[str, Any]) -> None:
        """What a run that was interrupted has left of some layers."""
        self.tokens |= record["experts"]
        self.errors += record["unseen"]

    @property
    def unseen(self) -> dict[str, list[int]]:
        """layer -> its experts that no calibration token reached."""
        found = {layer: [e for e, n in enumerate(counts) if not n] for layer, counts in self.tokens.items()}
        return {layer: experts for layer, experts in found.items() if experts}

    def facts(self, progress: Progress, fallback: str) -> dict[str, Any]:
        """`unseen_experts` where there are any; says which, and what was done with them."""
        if not self.unseen:
            return {}
        named = "; ".join(f"{layer}: {', '.join(map(str, e))}" for layer, e in self.unseen.items())
        progress.say(
            f"no calibration token reached these experts, which are {fallback}: {named}; "
            f"{self.cost()}more or other calibration examples may reach them"
        )
        facts: dict[str, Any] = {"unseen_experts": named, "unseen_treatment": fallback}
        if self.errors:
            table = pd.DataFrame(self.errors)
            for name in ("output_error", "rival_error", "reached_error"):
                if table[name].notna().all():
                    facts[f"unseen_{name}"] = float(table[name].mean())
            facts["unseen_rival"] = str(table["rival"].iloc[0])
        return facts

    def cost(self) -> str:
        """What was measured, as a part of a sentence."""
        if not self.errors:
            return ""
        mine, theirs = (
            float(np.mean([row[name] for row in self.errors])) for name in ("output_error", "reached_error")
        )
        rival = float(np.mean([row["rival_error"] for row in self.errors]))
        other = "" if np.isnan(rival) else f", {100 * rival:.2g} % {self.errors[0]['rival']}"
        return (
            f"their outputs' error on the layer's tokens is {100 * mine:.2g} %{other}, that of the experts "
            f"that were reached {100 * theirs:.2g} %; "
        )

    def tables(self) -> dict[str, pd.DataFrame]:
        """`experts`: layer, expert, its calibration tokens and its share of the layer's."""
        rows = [
            {"layer": layer, "expert": expert, "tokens": count, "share": count / max(sum(counts), 1)}
            for layer, counts in self.tokens.items()
            for expert, count in enumerate(counts)
        ]
        found = {"experts": pd.DataFrame(rows)} if rows else {}
        return found | ({"unseen_experts": pd.DataFrame(self.errors)} if self.errors else {})


def output_error(weight: Tensor, delta: Tensor, gram: Tensor) -> float:
    """tr(D G D^T) / tr(W G W^T) of a change D of W (out, in) under the inputs' second moment G (in, in)."""
    weight, delta = weight.float(), delta.float()
    lost, whole = (float(((d @ gram) * d).sum()) for d in (delta, weight))
    return lost / whole if whole > 0 else 0.0


def all_tokens(moments: InputMoments) -> InputMoments:
    """What an expert of the layer would read if it got the tokens of all of them, for each expert."""
    experts = len(moments.tokens)

    def shared(sums: Tensor) -> Tensor:
        return sums.sum(0, keepdim=True).expand(experts, *sums.shape[1:])

    gram = None if moments.gram is None else shared(moments.gram)
    tokens = torch.full_like(moments.tokens, float(moments.tokens.sum()))
    return InputMoments(gram, shared(moments.square), shared(moments.total), tokens)
