"""What the routers of a mixture of experts choose: usage, and the task-conditioned expected selection score
(Pei et al. 2025, PreMoe).

    TCESS_e = E over tokens of z_e [e among the token's K largest logits] [softmax over those K of z_e >= r]

with z the router's logits. Experts of small score are not needed for the task the calibration text stands
for; the scores of all layers are its pattern, and a new text gets the experts of the stored pattern nearest
to its own (Euclidean distance).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from workbench.axis import Options, parameter
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.pruning.axes import SALIENCY
from workbench.pruning.calibration import Calibration
from workbench.statistics import InputCapture
from workbench.statistics.inputs import kept_positions
from workbench.storage import replacing
from workbench.subjects import Batch, Layer, Subject
from workbench.subjects.structure.dimensions import smallest_units
from workbench.subjects.structure.experts import CHOSEN_EXPERTS, expert_count, expert_modules


@dataclass
class Routing:
    """Per layer with experts and expert: (layers, experts)
    TCESS and share of the tokens that choose the expert.
    """

    tcess: Tensor
    usage: Tensor


def routers(on: Subject) -> list[Layer]:
    """The matrix (experts, hidden) of every router, in forward order."""
    size = expert_count(on.model)[1]
    found = []
    for path in expert_modules(on.model):
        owner = on.model.get_submodule(path)
        name, module = next(
            (n, m)
            for n, m in owner.named_modules()
            for p in m.parameters(recurse=False)
            if p.ndim == 2 and p.shape[0] == size
        )
        found.append(Layer(f"{path}.{name}", module))
    return found


def chosen(on: Subject) -> int:
    """Experts that each token goes to."""
    config = on.model.config
    return next(
        (
            int(getattr(config, name))
            for name in CHOSEN_EXPERTS
            if isinstance(getattr(config, name, None), int)
        ),
        1,
    )


def selection(logits: Tensor, local: int, threshold: float = 0.0) -> Tensor:
    """logits (tokens, experts) -> the logits counted by TCESS, zero elsewhere:
    among the `local` largest and confident enough.
    """
    values, index = logits.topk(local, dim=-1)
    counted = torch.where(values.softmax(-1) >= threshold, values, 0.0)
    return torch.zeros_like(logits).scatter(-1, index, counted)


@torch.no_grad()
def routing(
    on: Subject,
    split: str = "calibration",
    examples: int = 128,
    local: int | None = None,
    threshold: float = 0.0,
    batch_size: int = 16,
    progress: Progress | None = None,
    batches: Sequence[Batch] | None = None,
) -> Routing:
    """One streaming pass over `examples` of a split (or over the given batches);
    `local` is the model's own top-k unless it is given.
    """
    progress = progress or Progress()
    layers, top = routers(on), chosen(on)
    size = layers[0].shape[0]
    tcess, usage = torch.zeros(len(layers), size), torch.zeros(len(layers), size)
    tokens = torch.zeros(len(layers), 1)
    number = {layer.name: i for i, layer in enumerate(layers)}

    def add(layer: Layer, expert: int, rows: Tensor) -> None:
        logits = (rows @ layer.weight.detach().mT).float()
        i = number[layer.name]
        tcess[i] += selection(logits, min(local or top, size), threshold).sum(0).cpu()
        usage[i] += (
            torch.zeros_like(logits).scatter(-1, logits.topk(min(top, size), -1).indices, 1.0).sum(0).cpu()
        )
        tokens[i] += len(rows)

    total = -(-min(examples, on.size(split)) // batch_size)
    with InputCapture(layers, add) as capture:
        for batch in progress.track(
            batches if batches is not None else on.batches(split, batch_size, examples), "routing", total
        ):
            capture.keep = kept_positions(on, batch)
            on.task.output(on.model, batch)
    return Routing(tcess / tokens.clamp_min(1), usage / tokens.clamp_min(1))


@dataclass
class ExpertPatterns:
    """Stored patterns: task name -> TCESS (layers, experts)."""

    scores: dict[str, Tensor] = field(default_factory=dict)

    def nearest(self, query: Tensor) -> str:
        """The task whose pattern is nearest to the query's scores (layers, experts);
        `BadInput` when none is stored or the shapes differ.
        """
        if not self.scores:
            raise BadInput("patterns: none is stored; add one for each task first")
        if wrong := [name for name, s in self.scores.items() if s.shape != query.shape]:
            raise BadInput(
                f"patterns: {wrong[0]} is of {tuple(self.scores[wrong[0]].shape)} experts and the query of "
                f"{tuple(query.shape)}; use one model for both"
            )
        return min(self.scores, key=lambda name: float((self.scores[name] - query).square().sum()))

    def kept(self, task: str, left: int) -> Tensor:
        """(layers, experts): True for the `left` experts of largest score in every layer."""
        return smallest_units(self.scores[task], left)

    def save(self, file: str | os.PathLike[str]) -> Path:
        """One safetensors file, written under a temporary name and renamed."""
        path = Path(file)
        with replacing(path, field="file") as draft:
            save_file(
                {str(i): s.contiguous() for i, s in enumerate(self.scores.values())},
                draft,
                metadata={"tasks": json.dumps(list(self.scores))},
            )
        return path

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> ExpertPatterns:
        """What `save` wrote; `BadInput` for any other file."""
        try:
            with safe_open(file, "pt") as stream:
                names = json.loads(stream.metadata()["tasks"])
                if not isinstance(names, list) or len(set(names)) != len(names):
                    raise ValueError(f"its tasks are {names!r}")
                scores = {str(name): stream.get_tensor(str(i)) for i, name in enumerate(names)}
            shapes = {tuple(score.shape) for score in scores.values()}
            if len(shapes) != 1 or len(next(iter(shapes))) != 2:
                raise ValueError("its scores are not of one shape (layers, experts)")
            if not all(score.is_floating_point() and score.isfinite().all() for score in scores.values()):
                raise ValueError("its scores are not finite numbers")
        except (OSError, ValueError, LookupError, TypeError, RecursionError, SafetensorError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise BadInput(
                f"file: {str(file)!r} holds no scores of experts ({reason}); save them again"
            ) from None
        return cls(scores)


class Counted(Options):
    local: int = parameter(
        0, "largest logits of a token that count; 0: the model's own experts a token", ge=0
    )
    confidence: float = parameter(0.0, "least softmax over those for one to count", ge=0, le=1)


def of_calibration(calibration: Calibration, local: int = 0, confidence: float = 0.0) -> Routing:
    return routing(
        calibration.subject,
        calibration.split,
        calibration.examples,
        local or None,
        confidence,
        progress=calibration.progress,
    )


@SALIENCY.add(
    "tcess",
    formula="E[z_e, where e is among the K largest and confident]",
    source="Pei et al. 2025 (PreMoe)",
    needs="inputs",
    options=Counted,
    traits="experts",
)
def tcess(calibration: Calibration, groups: Sequence[object], options: Counted) -> Tensor:
    return of_calibration(calibration, options.local, options.confidence).tcess


@SALIENCY.add(
    "usage",
    formula="share of the tokens that choose the expert",
    source="baseline",
    needs="inputs",
    traits="experts",
)
def usage(calibration: Calibration, groups: Sequence[object], options: Options) -> Tensor:
    return of_calibration(calibration).usage
