"""How many calibration tokens reached each expert of a mixture: what an expert that none reached becomes is a
guess, and is said.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from workbench.progress import Progress
from workbench.statistics.inputs import InputMoments
from workbench.subjects import Layer


@dataclass
class ExpertsSeen:
    """tokens : layer -> calibration tokens of each of its experts, of layers that hold several."""

    tokens: dict[str, list[int]] = field(default_factory=dict)

    def add(self, layer: str, moments: InputMoments) -> None:
        if len(moments.tokens) > 1:
            self.tokens[layer] = [int(count) for count in moments.tokens]

    def of(self, layers: Iterable[Layer]) -> dict[str, list[int]]:
        """The tokens of the experts of some layers."""
        return {layer.name: self.tokens[layer.name] for layer in layers if layer.name in self.tokens}

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
            "more or other calibration examples may reach them"
        )
        return {"unseen_experts": named}

    def tables(self) -> dict[str, pd.DataFrame]:
        """`experts`: layer, expert, its calibration tokens and its share of the layer's."""
        rows = [
            {"layer": layer, "expert": expert, "tokens": count, "share": count / max(sum(counts), 1)}
            for layer, counts in self.tokens.items()
            for expert, count in enumerate(counts)
        ]
        return {"experts": pd.DataFrame(rows)} if rows else {}
