"""How large a batch should be: gradient noise scale, and batches that grow by themselves."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from workbench.axis import Options, parameter
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.subjects import Batch, Subject
from workbench.training.batch.rules import BATCH_RULE
from workbench.training.data_order import take
from workbench.training.state import TrainingState


@dataclass(frozen=True)
class NoiseScale:
    """tr(Sigma) and |G|^2 of the per-example gradient (mean G, covariance Sigma), and their ratio B_simple,
    in examples.
    """

    trace: float
    square_norm: float

    @property
    def simple(self) -> float:
        """B_simple = tr(Sigma) / |G|^2 (McCandlish et al. 2018, eq. 2.9);
        infinite where |G|^2 is not distinguishable from 0.
        """
        return self.trace / self.square_norm if self.square_norm > 0 else math.inf


def noise_scale(gram: np.ndarray, size: int) -> NoiseScale:
    """Unbiased tr(Sigma) and |G|^2 from k independent mean gradients over `size` examples each, given their
    (k, k) inner products.

    tr(Sigma) = size sum |g_i - mean|^2 / (k - 1) and |G|^2 = |mean|^2 - tr(Sigma) / (size k): McCandlish et
    al. (2018), appendix A.1, with B_small = size and B_big = k size.
    |G|^2 may come out negative when noise hides it.
    """
    k = len(gram)
    if k < 2:
        raise BadInput(f"groups: {k} gradient tells nothing about noise; at least 2 are needed")
    mean = float(gram.sum()) / k**2
    trace = size * (float(np.trace(gram)) - k * mean) / (k - 1)
    return NoiseScale(trace, mean - trace / (size * k))


def noise_scale_interval(
    gram: np.ndarray, size: int, level: float = 0.9, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Interval of B_simple by the jackknife in its logarithm:
    a bootstrap would count repeated groups as agreement and bias |G|^2 up.
    """
    from scipy import stats

    k = len(gram)
    if k < 4:
        return math.nan, math.nan
    whole = noise_scale(gram, size).simple
    parts = np.array([noise_scale(np.delete(np.delete(gram, i, 0), i, 1), size).simple for i in range(k)])
    if not math.isfinite(whole) or not np.isfinite(parts).all() or whole <= 0 or (parts <= 0).any():
        return 0.0, math.inf
    logs = np.log(parts)
    error = math.sqrt((k - 1) / k * float(((logs - logs.mean()) ** 2).sum()))
    reach = float(stats.t.ppf(0.5 + level / 2, k - 1)) * error
    return whole * math.exp(-reach), whole * math.exp(reach)


def flat_gradient(subject: Subject, batch: Batch, parameters: list[nn.Parameter]) -> Tensor:
    """The gradient of the batch's mean loss over `parameters`, as one vector; unused ones are zero."""
    found = torch.autograd.grad(subject.loss(batch), parameters, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found, strict=True)]
    )


def gradient_groups(
    subject: Subject,
    split: str = "train",
    groups: int = 16,
    size: int = 16,
    seed: int = 0,
    progress: Progress | None = None,
) -> np.ndarray:
    """Inner products (groups, groups), float64, of the gradients of `groups` disjoint random batches
    of `size` examples.
    """
    progress = progress or Progress()
    if groups * size > subject.size(split):
        raise BadInput(
            f"groups: {groups} x {size} examples are more than the {subject.size(split)} of split "
            f"{split!r}; lower groups or size"
        )
    parameters = [p for p in subject.model.parameters() if p.requires_grad]
    rows: list[Tensor] = []
    for index in progress.track(range(groups), "gradients"):
        chosen = take(subject.size(split), seed, index * size, size)
        batch = {k: v[chosen].to(subject.device) for k, v in subject.split(split).items()}
        rows.append(flat_gradient(subject, batch, parameters).cpu())
    matrix = torch.stack(rows).double()
    return (matrix @ matrix.T).numpy()


def gradient_variance(gradients: Tensor) -> tuple[Tensor, Tensor]:
    """(sum over coordinates of the sample variance, squared norm of the mean) of per-example gradients
    (examples, parameters).
    """
    mean = gradients.mean(0)
    return (gradients - mean).square().sum() / max(len(gradients) - 1, 1), mean.square().sum()


def next_batch(variance: float, square_norm: float, batch: int, eta: float, largest: int) -> int:
    """The norm test: keep `batch` while variance / batch <= eta^2 |g|^2, else ceil(variance / (eta^2 |g|^2)),
    never smaller, capped.

    Byrd et al. (2012), eq. 3.10; Lau et al. (2024), AdAdaGrad, eq. 7.
    `variance` is the per-example one, summed over coordinates.
    """
    bound = eta**2 * square_norm
    if variance <= bound * batch:
        return min(batch, largest)
    return largest if bound <= 0 else min(max(batch, math.ceil(variance / bound)), largest)


@dataclass
class NormTest:
    """A callback of `fit(..., batch_rule=NormTest(...))` that grows `run.batch_size` by the norm test.
    As `before_step` it would read gradients that are clipped already.

    Per-example gradients are those of `sample` examples of the batch just used, by one backward pass each.
    `sizes` records the batch of every step. With torch.optim.Adagrad this is AdAdaGrad.
    """

    eta: float = 0.5
    largest: int = 4096
    sample: int = 32
    every: int = 1
    sizes: list[int] = field(default_factory=list)

    def __call__(self, run: TrainingState) -> None:
        self.sizes.append(run.batch_size)
        if run.step % self.every or run.batch_size >= self.largest:
            return
        parameters = [p for p in run.subject.model.parameters() if p.requires_grad]
        sample = run.batch(self.sample)
        rows = [
            flat_gradient(run.subject, {k: v[i : i + 1] for k, v in sample.items()}, parameters)
            for i in range(len(run.chosen[: self.sample]))
        ]
        variance, _ = gradient_variance(torch.stack(rows))
        square = sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None)
        run.batch_size = next_batch(float(variance), square, run.batch_size, self.eta, self.largest)


class NormTestOptions(Options):
    eta: float = parameter(0.5, "standard error of the gradient borne, as a share of its norm", gt=0)
    largest: int = parameter(4096, "batch size at most", ge=1, unit="examples")
    sample: int = parameter(32, "examples whose own gradients are taken", ge=2, unit="examples")
    every: int = parameter(1, "steps between two tests", ge=1, unit="steps")


@BATCH_RULE.add(
    "norm-test",
    formula="B <- max(B, ceil(tr Sigma / (eta^2 |g|^2)))",
    source="Byrd et al. 2012, eq. 3.10; Lau et al. 2024, AdAdaGrad, eq. 7",
    needs="gradients",
    options=NormTestOptions,
)
def norm_test(options: NormTestOptions) -> NormTest:
    return NormTest(**options.model_dump())


def log_slope(x: Iterable[float], y: Iterable[float], level: float = 0.9) -> dict[str, Any]:
    """Least-squares slope of ln y on ln x with its t interval: the exponent of a power law."""
    from scipy import stats

    lx, ly = np.log(np.asarray(list(x), float)), np.log(np.asarray(list(y), float))
    if len(lx) < 3:
        raise BadInput(f"points: a slope with an interval needs at least 3 points, got {len(lx)}")
    found = stats.linregress(lx, ly)
    reach = float(stats.t.ppf(0.5 + level / 2, len(lx) - 2)) * float(found.stderr)
    return {
        "slope": float(found.slope),
        "low": float(found.slope) - reach,
        "high": float(found.slope) + reach,
        "intercept": float(found.intercept),
    }
