"""The `saliency-map` instrument: several methods' scores on one model, kept as ranks,
so that any sparsity is only a threshold.

A weight's rank is the sparsity at which its method removes it, in 65,536 steps, counted inside the method's
own comparison group (all layers, one layer, or one row).
So masks, densities, overlaps and predicted losses at any sparsity need no new computation.
"""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from pydantic import BaseModel
from torch import Tensor

from workbench.axis import Choice, parameter
from workbench.errors import BadInput
from workbench.instruments import SubjectInstrument
from workbench.progress import Progress
from workbench.pruning.axes import PRUNING_METHOD, SALIENCY, scores_weights, units_of
from workbench.pruning.calibration import Calibration
from workbench.pruning.pattern import Tiles
from workbench.results import Result
from workbench.subjects import Mask, Subject
from workbench.subjects.structure.units import discover

if TYPE_CHECKING:
    import plotly.graph_objects as go

LEVELS = 65535
BINS = 256
GRID = tuple(round(0.05 * i, 2) for i in range(1, 20))
LEFT_OUT = ("icbs", "llm-pruner", "ziplm")  # the scores of others


def scored_methods() -> dict[str, tuple[Choice, str]]:
    """Method -> saliency and allocation, of those that score single weights without training."""
    found = {}
    for name, entry in PRUNING_METHOD.entries.items():
        fields = PRUNING_METHOD.chosen(name)(Tiles(1, 1))
        saliency = SALIENCY.chosen(fields["saliency"])
        single = scores_weights(saliency) and saliency.entry.needs != "training"
        if single and not units_of(entry) and name not in LEFT_OUT:
            found[name] = (saliency, fields["allocation"])
    return found


class SaliencyMap(SubjectInstrument):
    """Which weights several methods would remove at any sparsity, how far they agree,
    and what a diagonal Fisher says it costs.
    """

    cached: ClassVar[bool] = False  # two bytes a weight and method; quicker to compute again than to keep
    summary_line: ClassVar[str] = (
        "several methods' saliencies as ranks: masks at any sparsity, overlaps, predicted losses"
    )

    methods: str = parameter(
        "magnitude,wanda,obd,obert", "methods that score single weights, separated by commas"
    )
    layers: str = parameter("blocks", "which layers: blocks or globs")
    calibration_examples: int = parameter(
        64, "examples for the layers' input statistics", ge=1, unit="examples", group="Data"
    )
    gradients: int = parameter(64, "per-example gradients", ge=1, unit="examples", group="Data")
    damp: float = parameter(
        0.01,
        "damp of Hessians and Fisher blocks, as a share of their mean diagonal",
        gt=0,
        scale="log",
        group="Fisher",
    )
    block: int = parameter(50, "weights in one block of the Fisher", ge=1, group="Fisher")
    calibration_split: str = parameter("calibration", "split for the statistics", group="Data")

    @classmethod
    def result_class(cls) -> type[Result]:
        return SaliencyMapResult

    def names(self) -> list[str]:
        return [name.strip() for name in self.methods.split(",") if name.strip()]

    def check(self, on: Any) -> None:
        on.layers(self.layers)
        on.split(self.calibration_split)
        known = scored_methods()
        for name in self.names():
            if name not in known:
                raise BadInput(
                    f"methods: {name!r} has no scores of single weights; give some of {', '.join(known)}"
                )
        if not self.names():
            raise BadInput(f"methods: is empty; give some of {', '.join(known)}")

    def with_settings(self, saliency: Choice) -> Choice:
        """A saliency with those of this instrument's settings that are options of it."""
        settings = {"gradients": self.gradients, "damp": self.damp, "block": self.block}
        known = saliency.entry.options.model_fields
        return saliency.with_options(**{k: v for k, v in settings.items() if k in known})

    def _run(self, on: Subject, progress: Progress) -> Result:
        layers = on.layers(self.layers)
        calibration = Calibration(
            on, layers, self.calibration_split, self.calibration_examples, self.seed, progress
        )
        diagonal, known = self.with_settings(SALIENCY.chosen("obd")), scored_methods()
        cost = {
            layer.name: diagonal(layer, calibration, Tiles(1, 1)).float()
            for layer in progress.track(layers, "diagonal Fisher")
        }
        ranks: dict[str, NDArray[np.uint16]] = {}
        curves: list[dict[str, Any]] = []
        for method in self.names():
            saliency, allocation = self.with_settings(known[method][0]), known[method][1]
            scores = {}
            for layer in progress.track(layers, f"saliency {method}"):
                scores[layer.name] = saliency(layer, calibration, Tiles(1, 1)).float()
            if progress.stopped:
                break
            mine = ranked(scores, allocation)
            ranks |= {f"{method}/{name}": rank for name, rank in mine.items()}
            lost = np.zeros(BINS)
            for layer in layers:
                lost += np.bincount(
                    mine[layer.name].ravel() >> 8,
                    weights=cost[layer.name].cpu().numpy().ravel(),
                    minlength=BINS,
                )
            curves += [
                {"method": method, "sparsity": (b + 1) / BINS, "predicted_change": float(c)}
                for b, c in enumerate(lost.cumsum())
            ]
        heads, counts = by_head(on, ranks, self.names())
        rows = [
            {
                "layer": layer.name,
                "out": layer.shape[-2],
                "in": layer.shape[-1],
                "weights": layer.original.numel(),
            }
            for layer in layers
        ]
        found = sorted({key.split("/", 1)[0] for key in ranks}, key=self.names().index)
        tables = {
            "curves": pd.DataFrame(curves),
            "overlap": overlaps(ranks, found, [layer.name for layer in layers]),
            "heads": heads,
        }
        return self.result(
            pd.DataFrame(rows),
            {"methods": ", ".join(found), "weights": sum(r["weights"] for r in rows)},
            tables=tables,
            arrays=ranks | counts,
        )


def ranked(scores: dict[str, Tensor], allocation: str) -> dict[str, NDArray[np.uint16]]:
    """The sparsity (0 to 65535) at which each weight goes, inside its comparison group;
    equal scores in order.
    """
    if allocation == "global":
        flat = torch.cat([s.flatten() for s in scores.values()])
        every = order_statistics(flat[None])[0]
        found, at = {}, 0
        for name, s in scores.items():
            found[name] = every[at : at + s.numel()].reshape(s.shape)
            at += s.numel()
    else:
        found = {
            n: order_statistics(s if allocation == "row" else s.reshape(1, -1)).reshape(s.shape)
            for n, s in scores.items()
        }
    return {name: value.cpu().numpy().astype(np.uint16) for name, value in found.items()}


def order_statistics(scores: Tensor) -> Tensor:
    """Ranks along the last dimension, scaled to 0 .. 65535, as int32."""
    order = scores.argsort(dim=-1, stable=True)
    n = scores.shape[-1]
    places = (torch.arange(n, device=scores.device) * LEVELS // max(n - 1, 1)).int().expand(scores.shape)
    return torch.zeros_like(order, dtype=torch.int32).scatter(-1, order, places.contiguous())


def by_head(
    on: Subject, ranks: dict[str, NDArray[np.uint16]], methods: list[str]
) -> tuple[pd.DataFrame, dict[str, NDArray[np.int64]]]:
    """A table of the attention heads that lie inside the ranked layers, and for each method ("METHOD heads")
    how many weights of each head go at each of `BINS` sparsities: (heads, BINS). A head of several query
    heads with one key and value counts once, with all its weights.
    """
    done = [m for m in methods if any(key.startswith(f"{m}/") for key in ranks)]
    groups = [
        g
        for g in discover(on.model, ("heads",))
        if done and all(f"{done[0]}/{m.layer.name}" in ranks for m in g.members)
    ]
    table = pd.DataFrame(
        [
            {"attention": g.name, "head": h, "label": f"{i}.{h}", "weights": g.weights_per_unit()}
            for i, g in enumerate(groups)
            for h in range(g.units)
        ],
        columns=["attention", "head", "label", "weights"],
    )
    counts = {}
    for method in done:
        bins = []
        for group in groups:
            total = np.zeros((group.units, BINS), dtype=np.int64)
            for member in group.members:
                rank = ranks[f"{method}/{member.layer.name}"] >> 8
                lines = rank if member.axis == -2 else rank.T
                for head, index in enumerate(member.index.numpy()):
                    total[head] += np.bincount(lines[index].ravel(), minlength=BINS)
            bins.append(total)
        counts[f"{method} heads"] = np.concatenate(bins) if bins else np.zeros((0, BINS), dtype=np.int64)
    return table, counts


def overlaps(ranks: dict[str, NDArray[np.uint16]], methods: list[str], layers: list[str]) -> pd.DataFrame:
    """Jaccard index of the kept weights of every two methods, at each sparsity of the grid:
    |A and B| / |A or B|.
    """
    rows = []
    for a, b in combinations(methods, 2):
        # A pair is kept by both while s < min rank, by either while s < max rank:
        # two histograms answer every sparsity.
        low, high = np.zeros(BINS), np.zeros(BINS)
        for name in layers:
            x, y = ranks[f"{a}/{name}"].ravel() >> 8, ranks[f"{b}/{name}"].ravel() >> 8
            low += np.bincount(np.minimum(x, y), minlength=BINS)
            high += np.bincount(np.maximum(x, y), minlength=BINS)
        both, either = low[::-1].cumsum()[::-1], high[::-1].cumsum()[::-1]
        for s in GRID:
            at = min(round(s * BINS), BINS - 1)
            rows.append({"a": a, "b": b, "sparsity": s, "jaccard": float(both[at] / max(either[at], 1))})
    return pd.DataFrame(rows, columns=["a", "b", "sparsity", "jaccard"])


#: Layers whose masks are shown as thumbnails at most.
THUMBNAILS = 6


class SaliencyView(BaseModel):
    """What the viewer may change without computing anew."""

    show: Literal["masks", "density", "heads", "predicted", "overlap"] = "masks"
    sparsity: float = parameter(0.7, "share of the weights removed", ge=0, le=0.99, step=0.01)


class SaliencyMapResult(Result):
    """Densities, predicted losses and overlaps at any sparsity, from the ranks."""

    def view_model(self) -> type[BaseModel]:
        return SaliencyView

    @property
    def methods(self) -> list[str]:
        return [m for m in str(self.facts["methods"]).split(", ") if m]

    def mask(self, method: str, layer: str, sparsity: float) -> NDArray[np.bool_]:
        """True where `method` keeps the weight at this sparsity, shape (..., out, in)."""
        return self.arrays[f"{method}/{layer}"] >= round(sparsity * (LEVELS + 1))

    def thumbnails(self, title: str, sparsity: float) -> go.Figure:
        """The masks of the first layers, one of each kind."""
        from workbench.figures import grid_of_layers, short_names
        from workbench.pruning.studies.mask_thumbnails import thumbnails

        names = self.table.layer.to_list()
        kinds = grid_of_layers(names).where
        first = list({kinds[name][0]: name for name in reversed(names)}.values())[::-1][:THUMBNAILS]
        masks = {m: {name: self.mask(m, name, sparsity) for name in first} for m in self.methods}
        return thumbnails(title, masks, short_names(first))

    def densities(self, method: str, sparsity: float) -> NDArray[np.float64]:
        """Share kept in each layer, in the order of the table."""
        return np.array([self.mask(method, name, sparsity).mean() for name in self.table.layer])

    def head_densities(self, method: str, sparsity: float) -> NDArray[np.float64]:
        """Share kept in each head of the table of heads, to 1 / 256 of the sparsity."""
        counts = self.arrays[f"{method} heads"]
        return 1 - counts[:, : round(sparsity * BINS)].sum(1) / np.maximum(counts.sum(1), 1)

    def predicted(self, method: str, sparsity: float) -> float:
        """The diagonal Fisher's loss change for this method's mask, nats."""
        curve = self.tables["curves"].query("method == @method")
        return float(np.interp(sparsity, [0, *curve.sparsity], [0, *curve.predicted_change]))

    def measure(
        self,
        on: Subject,
        method: str,
        sparsity: float,
        split: str = "validation",
        limit: int | None = None,
        progress: Progress | None = None,
    ) -> dict[str, float]:
        """Loss and metrics with the masks of this sparsity (no compensation), on a copy of the subject."""
        copy = on.copy()
        for layer in copy.layers(getattr(self.instrument, "layers", "blocks")):
            layer.attach(
                Mask(torch.from_numpy(self.mask(method, layer.name, sparsity)).to(layer.original.device))
            )
        return copy.evaluate(split, limit=limit, progress=progress)

    def figure(self, **view: Any) -> go.Figure:
        from workbench.figures import by_layer, color, figure, heat, line, rule

        shown = SaliencyView(**view)
        percent = f"{100 * shown.sparsity:.0f} % sparsity"
        if shown.show == "masks":
            return self.thumbnails(f"What each method keeps at {percent}", shown.sparsity)
        if shown.show == "density":
            return by_layer(
                f"What each method keeps at {percent}",
                self.table.layer.to_list(),
                {method: self.densities(method, shown.sparsity) for method in self.methods},
                "share kept",
                between=(0, 1),
            )
        tables = self.tables
        if shown.show == "heads":
            fig = figure(
                f"What each method keeps of every head at {percent}",
                x="attention.head",
                y="share kept",
                barmode="group",
                xaxis_type="category",
            )
            for index, method in enumerate(self.methods):
                fig.add_bar(
                    x=tables["heads"].label,
                    y=self.head_densities(method, shown.sparsity),
                    name=method,
                    marker_color=color(index),
                    hovertext=tables["heads"].attention,
                )
            return fig
        if shown.show == "predicted":
            fig = figure(
                "Predicted loss change of the mask alone",
                x="sparsity",
                y="diagonal Fisher (nats)",
                yaxis_type="log",
            )
            for method in self.methods:
                curve = tables["curves"].query("method == @method")
                line(fig, curve.sparsity, np.maximum(curve.predicted_change, 1e-12), method, mode="lines")
            rule(fig, percent, x=shown.sparsity)
            return fig
        grid = np.eye(len(self.methods))
        near = min(GRID, key=lambda s: abs(s - shown.sparsity))
        for row in tables["overlap"].query("sparsity == @near").itertuples():
            i, j = self.methods.index(str(row.a)), self.methods.index(str(row.b))
            grid[i, j] = grid[j, i] = float(str(row.jaccard))
        fig = figure(f"Overlap of what is kept at {100 * near:.0f} % sparsity", height=340)
        heat(fig, grid, self.methods, self.methods, unit="Jaccard index")
        return fig
