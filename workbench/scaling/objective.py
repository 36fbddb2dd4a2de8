"""What a fit minimises: a sum over runs of a loss of the residual, with its gradient and two curvatures.

Everything is batched: parameter matrices are ``(starts, parameters)`` and one call answers for all starts.
Row weights are ``(rows,)`` or ``(starts, rows)``, so a bootstrap resample is just another start with its own
multinomial weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from workbench.axis import Axis, Options, parameter
from workbench.errors import BadInput
from workbench.scaling.formulas.laws import Law, Space

Array = np.ndarray
#: Elements (starts x rows) evaluated at a time: small enough that a handful of such arrays stay in the cache.
BLOCK_ELEMENTS = 24_000


@dataclass(frozen=True)
class Objective:
    """Sum over rows of a loss of ``prediction - observation``.

    kind "huber": 0.5 r^2 up to `delta`, delta (|r| - delta / 2) beyond (Huber, 1964; Hoffmann et al. 2022 use
    delta = 1e-3 on log losses). kind "squares": r^2. `space` "log" compares logarithms, "linear" the values
    themselves.
    """

    kind: Literal["huber", "squares"] = "huber"
    space: Space = "log"
    delta: float = 1e-3

    def __post_init__(self) -> None:
        if not self.delta > 0:
            raise BadInput(
                f"delta: {self.delta!r} is not accepted, the Huber threshold must be positive (1e-3 is "
                "usual on log losses)"
            )

    @property
    def threshold(self) -> float:
        return self.delta if self.kind == "huber" else np.inf

    @property
    def factor(self) -> float:
        """Reported objective over the internal one, which is 0.5 r^2 for squares."""
        return 1.0 if self.kind == "huber" else 2.0


OBJECTIVE = Axis("scaling-objective", "what a fit minimises", home="scaling-fit.objective")


class Huber(Options):
    delta: float = parameter(
        1e-3, "Huber threshold: residuals beyond it count linearly", gt=0, le=10.0, scale="log"
    )


@OBJECTIVE.add(
    "huber",
    formula="r^2 / 2 up to delta, delta (|r| - delta / 2) beyond",
    source="Huber 1964; Hoffmann et al. 2022, eq. 3",
    options=Huber,
)
def huber(space: Space, options: Huber) -> Objective:
    return Objective("huber", space, options.delta)


@OBJECTIVE.add("squares", formula="r^2", source="Legendre 1805")
def squares(space: Space, options: Options) -> Objective:
    return Objective("squares", space)


@dataclass(frozen=True)
class Resample:
    """Per-start data: row weights (s, rows) or None, and what is added to the observations (s, rows)
    or None.
    """

    weights: Array | None = None
    shift: Array | None = None

    def take(self, rows: Array | slice) -> Resample:
        return Resample(
            None if self.weights is None else self.weights[rows],
            None if self.shift is None else self.shift[rows],
        )


Weights = Array | Resample | None


class Problem:
    """A law, its data and an objective, ready to evaluate for many parameter vectors.

    columns: name -> (rows,); target: (rows,) in natural units.
    BadInput if the target cannot be compared in log space.
    """

    def __init__(self, law: Law, columns: Mapping[str, Array], target: Array, objective: Objective) -> None:
        target = np.asarray(target, dtype=np.float64)
        if objective.space == "log" and not np.all(target > 0):
            row = int(np.flatnonzero(~(target > 0))[0])
            raise BadInput(
                f"{law.target}: row {row} is {target[row]!r}, a log objective needs positive values; "
                "drop the row or use space='linear'"
            )
        self.law, self.objective = law, objective
        self.columns = {c: np.asarray(columns[c], dtype=np.float64) for c in law.columns}
        self.target = target
        self.y = np.log(target) if objective.space == "log" else target
        self.rows, self.size = len(target), len(law.free)
        self.compiled = law.compile(objective.space)
        self._bound = {order: self.compiled.bind(self.columns, order) for order in (0, 1)}
        self.low = np.array(
            [p.to_working(p.low) if p.scale == "linear" or p.low > 0 else -np.inf for p in law.free]
        )
        self.high = np.array([p.to_working(p.high) for p in law.free])

    def natural(self, theta: Array) -> Array:
        """Working coordinates (..., parameters) -> natural values."""
        return np.stack([p.to_natural(theta[..., i]) for i, p in enumerate(self.law.free)], axis=-1)

    def working(self, values: Mapping[str, float]) -> Array:
        return np.array([p.to_working(values[p.name]) for p in self.law.free], dtype=np.float64)

    def blocks(self, starts: int) -> list[slice]:
        step = max(1, BLOCK_ELEMENTS // max(self.rows, 1))
        return [slice(i, min(i + step, starts)) for i in range(0, starts, step)]

    def residuals(self, theta: Array) -> Array:
        """(starts, rows) prediction minus observation in the objective's space."""
        out = np.empty((len(theta), self.rows))
        for block in self.blocks(len(theta)):
            out[block] = self._bound[0](theta[block])[0] - self.y
        return out

    def value(self, theta: Array, weights: Weights = None) -> Array:
        """Objective per start (internal scale), inf where the law is undefined."""
        out = np.empty(len(theta))
        for block in self.blocks(len(theta)):
            w, shift = _rows(weights, block)
            r = self._bound[0](theta[block])[0] - (self.y if shift is None else self.y + shift)
            out[block] = self._sum(np.broadcast_to(r, (len(theta[block]), self.rows)), w)
        return out

    def _sum(self, r: Array, weights: Array | None) -> Array:
        a, d = np.abs(r), self.objective.threshold
        with np.errstate(all="ignore"):
            clipped = np.minimum(a, d)
            loss = clipped * (a - 0.5 * clipped)  # 0.5 a^2 below the threshold, d (a - d / 2) above
            total = loss.sum(1) if weights is None else (loss * weights).sum(1)
        return np.where(np.isfinite(total), total, np.inf)

    def linearise(self, theta: Array, weights: Weights = None) -> tuple[Array, Array, Array]:
        """Value (s,), gradient (s, p) and the majorising Gauss-Newton curvature (s, p, p),
        rows weighted min(1, delta/|r|).
        """
        s, p = len(theta), self.size
        value, gradient, curvature = np.empty(s), np.empty((s, p)), np.empty((s, p, p))
        d = self.objective.threshold
        step = max(1, BLOCK_ELEMENTS // max(self.rows, 1))
        buffer = np.empty((min(step, s), p, self.rows))
        scaled = np.empty_like(buffer)
        for block in self.blocks(s):
            n = block.stop - block.start
            out = self._bound[1](theta[block])
            w, shift = _rows(weights, block)
            r = np.broadcast_to(out[0] - (self.y if shift is None else self.y + shift), (n, self.rows))
            value[block] = self._sum(r, w)
            jacobian = buffer[:n]
            for i in range(p):
                jacobian[:, i] = out[1 + i]
            with np.errstate(all="ignore"):
                if np.isfinite(d):
                    pull = d / np.maximum(np.abs(r), d)
                    if w is not None:
                        pull = pull * w
                else:
                    pull = np.ones_like(r) if w is None else np.broadcast_to(w, r.shape)
                np.multiply(jacobian, pull[:, None, :], out=scaled[:n])
                gradient[block] = np.matmul(scaled[:n], r[:, :, None])[:, :, 0]
                curvature[block] = np.matmul(scaled[:n], jacobian.transpose(0, 2, 1))
        return value, gradient, curvature

    def hessian(self, theta: Array, weights: Weights = None) -> Array:
        """Exact second derivatives (s, p, p) of the objective
        (rows on the Huber slope bend only through the law).
        """
        if 2 not in self._bound:
            self._bound[2] = self.compiled.bind(self.columns, 2)
        s, p, d = len(theta), self.size, self.objective.threshold
        result = np.empty((s, p, p))
        for block in self.blocks(s):
            n = block.stop - block.start
            out = self._bound[2](theta[block])
            w, shift = _rows(weights, block)
            r = np.broadcast_to(out[0] - (self.y if shift is None else self.y + shift), (n, self.rows))
            w = np.ones((1, self.rows)) if w is None else w
            inside = np.broadcast_to((np.abs(r) <= d) * w, (n, self.rows))
            slope = np.clip(r, -d, d) * w
            jacobian = np.stack([np.broadcast_to(o, (n, self.rows)) for o in out[1 : 1 + p]], axis=1)
            with np.errstate(all="ignore"):
                total = np.matmul(jacobian * inside[:, None, :], jacobian.transpose(0, 2, 1))
            k = 1 + p
            for i in range(p):
                for j in range(i, p):
                    with np.errstate(all="ignore"):
                        bend = (slope * out[k]).sum(1)
                    total[:, i, j] += bend
                    if i != j:
                        total[:, j, i] += bend
                    k += 1
            result[block] = total
        return result

    def jacobian(self, theta: Array) -> Array:
        """(rows, p) derivative of the predictions for one parameter vector."""
        out = self._bound[1](theta[None])
        return np.stack([np.broadcast_to(o, (1, self.rows))[0] for o in out[1:]], axis=1)


def _rows(weights: Weights, block: slice) -> tuple[Array | None, Array | None]:
    if weights is None:
        return None, None
    if isinstance(weights, Resample):
        part = weights.take(block)
        return part.weights, part.shift
    return (weights[None, :] if weights.ndim == 1 else weights[block]), None
