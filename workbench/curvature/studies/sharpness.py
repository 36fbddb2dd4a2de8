"""How sharp the loss is where the subject stands, and the learning rates its curvature allows,
predicted and found by bisection.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from torch import Tensor

from workbench.axis import parameter
from workbench.curvature.estimators.eigenpairs import eigenpairs
from workbench.curvature.operators.curvature_operator import CurvatureOperator, Stopped
from workbench.curvature.studies.settings import CurvatureInstrument
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.results import Result
from workbench.subjects import Subject


class Preconditioned:
    """D^-1/2 H D^-1/2 for a positive diagonal D: the curvature that an optimizer with step D^-1 g sees."""

    def __init__(self, operator: CurvatureOperator, diagonal: Tensor) -> None:
        self.operator, self.scale = operator, diagonal.rsqrt()
        self.size, self.dtype, self.device = operator.size, operator.dtype, operator.device

    def matmat(self, vectors: Tensor, out: Tensor | None = None) -> Tensor:
        return self.operator.matmat(vectors * self.scale, out).mul_(self.scale)


def batch_gradients(operator: CurvatureOperator) -> tuple[Tensor, Tensor, float, list[float]]:
    """Mean gradient, mean square of the micro-batches' gradients (both (size,)), mean loss,
    and each micro-batch's weight.
    """
    total = torch.zeros(operator.size, dtype=operator.dtype, device=operator.device)
    square = torch.zeros_like(total)
    loss_sum, weights = 0.0, []
    with torch.enable_grad():
        for batch, _ in operator.batches():
            weight = operator.subject.task.items(batch)
            loss = operator.loss(batch)
            for s, g in zip(
                operator.slices, torch.autograd.grad(loss, operator.weights, allow_unused=True), strict=True
            ):
                if g is not None:
                    total[s].add_(g.reshape(-1), alpha=weight)
                    square[s].addcmul_(g.reshape(-1), g.reshape(-1), value=weight)
            loss_sum += weight * float(loss.detach())
            weights.append(float(weight))
    if not weights:
        raise BadInput(
            f"split: the first {operator.examples} examples of {operator.split!r} hold no target; "
            "check the label column"
        )
    return total / sum(weights), square / sum(weights), loss_sum / sum(weights), weights


@torch.no_grad()
def moved_loss_and_gradient(
    operator: CurvatureOperator, offset: Tensor, gradient: bool = True
) -> tuple[float, Tensor | None]:
    """Loss (and gradient) with `offset` (size,) added to the weights; they are restored bit for bit."""
    kept = [w.data for w in operator.weights]
    try:
        for weight, part in zip(operator.weights, operator.parts(offset), strict=True):
            weight.data = weight.data + part
        if gradient:
            found, loss = operator.gradient()
            return loss, found
        total, count = 0.0, 0
        for batch, _ in operator.batches():
            items = operator.subject.task.items(batch)
            total, count = total + items * float(operator.subject.loss(batch)), count + items
        return total / count, None
    finally:
        for weight, value in zip(operator.weights, kept, strict=True):
            weight.data = value


def stability_limit(
    step: Callable[[Tensor], Tensor],
    start: Tensor,
    guess: float,
    momentum: float,
    steps: int,
    accuracy: float = 0.02,
) -> float:
    """The largest learning rate at which a small displacement does not grow,
    by bisection in log scale to `accuracy`.

    Iterates m <- momentum m + (1 - momentum) f(d), d <- d - rate m, where `step(d)` gives f(d): the
    (preconditioned) change of the gradient at displacement d. A guess that is no positive number (of a
    curvature that is zero or not finite) is returned as it is. Stable:
    |d| shrinks from the second to the last quarter of `steps` iterations.
    """

    def stable(rate: float) -> bool:
        displacement, buffer = start.clone(), torch.zeros_like(start)
        limit = float(torch.linalg.vector_norm(start))
        sizes = []
        for _ in range(steps):
            buffer = momentum * buffer + (1 - momentum) * step(displacement)
            displacement = displacement - rate * buffer
            sizes.append(float(torch.linalg.vector_norm(displacement)))
            if not math.isfinite(sizes[-1]) or sizes[-1] > 1e3 * limit:
                return False
        early, late = max(sizes[steps // 4 : steps // 2]), max(sizes[-(steps // 4) :])
        return late <= early or late <= 0.01 * limit  # far below the start, rounding hides what happens

    if not 0 < guess < math.inf:
        return guess
    low, high = guess / 4, guess * 4
    while stable(high):
        low, high = high, high * 4
        if high > guess * 1e4:
            return math.inf
    while not stable(low):
        low, high = low / 4, low
        if low < guess * 1e-4:
            return 0.0
    while high / low > 1 + accuracy:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if stable(middle) else (low, middle)
    return math.sqrt(low * high)


class Sharpness(CurvatureInstrument):
    """Largest eigenvalue, plain and preconditioned as Adam sees it, the learning rates it allows,
    and the loss rise nearby.
    """

    summary_line = (
        "top eigenvalue, 2/lambda for SGD and Adam beside the limits found by bisection, "
        "loss rise at radius rho"
    )

    radius: float = parameter(
        0.05,
        "radius rho of the neighbourhood in which the loss rise is measured (Foret et al. 2021)",
        gt=0,
        le=10,
        scale="log",
        group="Search",
    )
    momentum: float = parameter(0.9, "Adam's first-moment decay beta1", ge=0, lt=1, group="Search")
    epsilon: float = parameter(1e-8, "Adam's epsilon", gt=0, le=1, scale="log", group="Search")
    tolerance: float = parameter(
        1e-3, "relative residual of the eigenvalue", gt=0, lt=1, scale="log", group="Search"
    )
    bisect: bool = parameter(
        False, "also find both limits by bisection on the true gradients (about 100 to 400 gradients each)"
    )
    bisect_steps: int = parameter(
        24, "iterations of each stability test", only_with="bisect", ge=4, le=500, group="Search"
    )

    @classmethod
    def result_class(cls) -> type[Result]:
        return SharpnessResult

    def _run(self, on: Subject, progress: Progress) -> Result:
        rows: list[dict[str, Any]] = []
        facts: dict[str, Any] = {}
        with self.open(on, progress.quiet()) as operator:
            facts["parameters"] = operator.size
            try:
                self._study(operator, progress, rows, facts)
            except Stopped:
                progress.partial = True
        return self.result(
            pd.DataFrame(rows, columns=["optimizer", "sharpness", "predicted_limit", "measured_limit"]), facts
        )

    def _study(
        self,
        operator: CurvatureOperator,
        progress: Progress,
        rows: list[dict[str, Any]],
        facts: dict[str, Any],
    ) -> None:
        mean, square, loss, _ = batch_gradients(operator)
        norm = float(torch.linalg.vector_norm(mean))
        facts |= {"loss": loss, "gradient_norm": norm}
        top = self._top(operator, progress, "sharpness products")
        facts |= {"top_eigenvalue": top[0], "two_over_top": 2 / top[0] if top[0] > 0 else math.inf}
        if norm > 0:
            raised, _ = moved_loss_and_gradient(operator, mean * (self.radius / norm), gradient=False)
            along = float(torch.dot(operator.matvec(mean / norm), mean / norm))
            facts |= {
                "rise_at_radius": raised - loss,
                "rise_predicted": self.radius * norm + 0.5 * self.radius**2 * along,
            }
        # Adam at rest: its second moment is the mean square of the batches' gradients
        diagonal = square.sqrt() + self.epsilon
        preconditioned = self._top(
            Preconditioned(operator, diagonal), progress, "preconditioned sharpness products"
        )
        facts["preconditioned_top"] = preconditioned[0]
        # heavy-ball momentum with (1 - beta) damping is stable up to (2 + 2 beta) / ((1 - beta) lambda)
        # (Cohen et al. 2022)
        scale = (2 + 2 * self.momentum) / (1 - self.momentum)
        for name, value, vector, momentum, inverse in (
            ("SGD", *top, 0.0, None),
            ("Adam", *preconditioned, self.momentum, diagonal),
        ):
            predicted = (2.0 if momentum == 0 else scale) / value if value > 0 else math.inf
            row = {
                "optimizer": name,
                "sharpness": value,
                "predicted_limit": predicted,
                "measured_limit": math.nan,
            }
            rows.append(row)
            facts[f"{name.lower()}_limit"] = predicted
            if self.bisect and value > 0 and not progress.stopped:
                row["measured_limit"] = facts[f"{name.lower()}_limit_measured"] = self._bisect(
                    operator, progress, mean, vector, momentum, inverse, predicted, name
                )

    def _top(self, operator: Any, progress: Progress, label: str) -> tuple[float, Tensor]:
        found = eigenpairs(
            operator,
            1,
            "top",
            self.tolerance,
            1,
            None,
            400,
            False,
            self.seed,
            lambda done, _: progress.show(label, done, None),
        )
        if not len(found.values):
            if progress.stop.is_set():
                raise Stopped
            raise BadInput(
                f"tolerance: the largest eigenvalue did not converge to {self.tolerance} in 400 products; "
                "give a larger tolerance"
            )
        return float(found.values[0]), found.vectors[0]

    def _bisect(
        self,
        operator: CurvatureOperator,
        progress: Progress,
        mean: Tensor,
        vector: Tensor,
        momentum: float,
        diagonal: Tensor | None,
        guess: float,
        name: str,
    ) -> float:
        # in the coordinates D^1/2 d the preconditioned iteration is the same,
        # and rounding is not blown up where D is tiny
        scale = torch.ones_like(vector) if diagonal is None else diagonal.rsqrt()
        offset = vector * (1e-4 / float(torch.linalg.vector_norm(vector * scale)))
        taken = 0

        def step(displacement: Tensor) -> Tensor:
            nonlocal taken
            taken += 1
            progress.show(f"bisection for {name}", taken, None)
            _, gradient = moved_loss_and_gradient(operator, displacement * scale)
            assert gradient is not None
            # only along the sharpest direction: directions of negative curvature grow at every rate,
            # and are not what is asked
            return torch.dot((gradient - mean) * scale, vector) * vector

        return stability_limit(step, offset, guess, momentum, self.bisect_steps)


class SharpnessResult(Result):
    def figure(self, **view: Any) -> go.Figure:
        from workbench.figures import color, figure

        fig = figure(
            "Largest stable learning rate",
            x="optimizer",
            y="learning rate",
            yaxis_type="log",
            barmode="group",
        )
        for index, (column, name) in enumerate(
            (("predicted_limit", "from curvature"), ("measured_limit", "by bisection"))
        ):
            if self.table[column].notna().any():
                fig.add_bar(
                    x=self.table["optimizer"], y=self.table[column], name=name, marker_color=color(index)
                )
        return fig
