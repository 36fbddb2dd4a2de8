"""A law is a formula, its parameters and its columns, nothing else.

>>> law = Law.from_formula("E + A / params**alpha", name="params only")
>>> law.parameter_names
('A', 'E', 'alpha')
>>> law.columns
('params',)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from workbench.errors import BadInput
from workbench.scaling.formulas.formula import Graph, parse
from workbench.scaling.formulas.program import BoundProgram, Program
from workbench.scaling.formulas.tracing import argument_names, trace

Array = np.ndarray
Space = Literal["log", "linear"]

#: Columns a formula may name without declaring them; see `workbench.scaling.runs` for meanings and units.
KNOWN_COLUMNS = (
    "params",
    "non_embedding_params",
    "active_params",
    "average_params",
    "tokens",
    "unique_tokens",
    "flops",
    "loss",
    "learning_rate",
    "batch_tokens",
    "bits",
    "activation_bits",
    "kv_bits",
    "exponent_bits",
    "mantissa_bits",
    "block_size",
    "sparsity",
    "experts",
    "width",
    "depth",
    "seed",
    "step",
    "batch_size",
    "steps",
    "multiplier",
    "members",
    "epochs",
    "post_bits",
    "qat_fraction",
    "quantized_share",
    "distance",
    "streams",
    "vocab_params",
    "non_vocab_params",
    "granularity",
    "dense_tokens",
    "sparse_tokens",
    "expert_ratio",
    "task_loss",
)


@dataclass(frozen=True)
class Parameter:
    """One unknown of a law: where it may lie, where a search starts, and what it means.

    `low`, `high` are hard limits; `start` is the interval that multi-start searches cover. A parameter on
    a `log` scale is positive and searched, stepped and resampled in its logarithm.
    """

    name: str
    meaning: str = ""
    start: tuple[float, float] = (0.05, 1.5)
    low: float = -np.inf
    high: float = np.inf
    scale: Space = "linear"
    unit: str = ""

    def __post_init__(self) -> None:
        if self.scale == "log" and self.low == -np.inf:
            object.__setattr__(self, "low", 0.0)
        if self.scale == "log" and (self.low < 0 or self.start[0] <= 0):
            raise BadInput(
                f"parameter {self.name}: a log-scale parameter must be positive, got low={self.low}, "
                f"start={self.start}"
            )
        if not self.low <= self.start[0] <= self.start[1] <= self.high:
            raise BadInput(
                f"parameter {self.name}: start {self.start} must lie inside [{self.low}, {self.high}]"
            )

    def to_working(self, value: Any) -> Any:
        """Natural value -> the coordinate the solver steps in."""
        if self.scale == "linear":
            return value
        with np.errstate(divide="ignore"):
            return np.log(value)

    def to_natural(self, value: Any) -> Any:
        return np.exp(value) if self.scale == "log" else value


@dataclass(frozen=True)
class Law:
    """A parametric prediction of one column of a run table from others.

    `formula` is text in the language of :mod:`workbench.scaling.formulas.formula` or a Python function
    of columns and parameters. `target` is what it predicts. `latex` is for people.
    `source` names authors, year and equation.
    """

    name: str
    formula: str | Callable[..., Any]
    parameters: tuple[Parameter, ...]
    columns: tuple[str, ...]
    target: str = "loss"
    latex: str = ""
    source: str = ""
    title: str = ""
    fixed: Mapping[str, float] = field(default_factory=dict)
    #: Column -> range of the data that the law was published on, as its source says.
    published: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    #: True: residuals of the logarithm (losses, batch sizes); False: plain residuals.
    positive: bool = True

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.parameters)

    @property
    def free(self) -> tuple[Parameter, ...]:
        """Parameters that a fit determines (all but the fixed ones)."""
        return tuple(p for p in self.parameters if p.name not in self.fixed)

    def parameter(self, name: str) -> Parameter:
        for p in self.parameters:
            if p.name == name:
                return p
        raise BadInput(f"law {self.name}: no parameter {name!r}; it has {', '.join(self.parameter_names)}")

    def beyond(self, columns: Any) -> Array:
        """How many times a point lies outside the data that the law was published on, in the column where it
        does so most; 1 inside, and where no range is known.
        """
        times = np.ones(1)
        for name, (low, high) in self.published.items():
            if name in columns:
                values = np.asarray(columns[name], dtype=np.float64)
                times = np.maximum(times, np.maximum(values / high, low / values))
        return times

    def fix(self, **values: float) -> Law:
        """The same law with some parameters held at known values."""
        for name in values:
            self.parameter(name)
        return replace(self, fixed={**self.fixed, **{k: float(v) for k, v in values.items()}})

    def with_ranges(self, **ranges: tuple[float, float]) -> Law:
        """The same law with other hard limits for some parameters; the search interval is clipped to them."""
        changed = []
        for p in self.parameters:
            if p.name in ranges:
                low, high = map(float, ranges[p.name])
                start = (float(np.clip(p.start[0], low, high)), float(np.clip(p.start[1], low, high)))
                p = replace(p, low=low, high=high, start=start)
            changed.append(p)
        for name in ranges:
            self.parameter(name)
        return replace(self, parameters=tuple(changed))

    @classmethod
    def from_formula(
        cls,
        formula: str | Callable[..., Any],
        name: str = "custom",
        columns: Iterable[str] | None = None,
        parameters: Mapping[str, tuple[float, float]] | Iterable[Parameter] | None = None,
        target: str = "loss",
        positive: bool = True,
        **more: Any,
    ) -> Law:
        """A law from text or a function.

        Names among `columns` (default: the run table's standard columns) are data, all others parameters.
        `parameters` may give search intervals by name; a parameter without one is searched over
        +-(0.01 ... 1000).
        """
        known = set(KNOWN_COLUMNS if columns is None else columns)
        graph = Graph()
        if callable(formula):
            names = argument_names(formula)
            node = trace(
                formula, graph, {n: graph.column(n) if n in known else graph.parameter(n) for n in names}
            )
        else:
            node = parse(formula, graph, known)
        found, used = sorted(graph.parameters_in(node)), sorted(graph.columns_in(node))
        if target in used:
            raise BadInput(f"formula: {target} is what the law predicts, it cannot be one of its columns")
        if found and not used:
            raise BadInput(
                f"formula: names no column of the runs, only parameters ({', '.join(found)}); write e.g. "
                "'E + A/params**alpha'"
            )
        if not found:
            raise BadInput(f"formula: has no free parameter (columns: {', '.join(used) or 'none'})")
        if isinstance(parameters, Mapping) or parameters is None:
            spans = dict(parameters or {})
            unknown = set(spans) - set(found)
            if unknown:
                raise BadInput(
                    f"parameters: {', '.join(sorted(unknown))} not in the formula, "
                    f"which has {', '.join(found)}"
                )
            declared = tuple(
                Parameter(n, start=tuple(map(float, spans[n])))  # type: ignore[arg-type]
                if n in spans
                else Parameter(n, start=(0.0, 2.0))
                for n in found
            )
        else:
            declared = tuple(parameters)
            missing = set(found) - {p.name for p in declared}
            if missing:
                raise BadInput(
                    f"parameters: {', '.join(sorted(missing))} appear in the formula but are not declared"
                )
        return cls(
            name=name,
            formula=formula,
            parameters=declared,
            columns=tuple(used),
            target=target,
            positive=positive,
            **more,
        )

    def compile(self, space: Space) -> CompiledLaw:
        """Programs for the prediction, its gradient and its second derivatives,
        in the solver's coordinates.
        """
        return CompiledLaw(self, space)

    def predict(self, values: Mapping[str, float], columns: Any) -> Array:
        """Predicted target for given parameter values; columns (a mapping or a DataFrame)
        are broadcast against each other.

        BadInput when a column the law needs is missing.
        """
        missing = [c for c in self.columns if c not in columns]
        if missing:
            raise BadInput(f"law {self.name}: needs column {', '.join(missing)}; given: {', '.join(columns)}")
        arrays = np.broadcast_arrays(*(np.asarray(columns[c], dtype=np.float64) for c in self.columns))
        shape = arrays[0].shape
        flat = {c: a.ravel() for c, a in zip(self.columns, arrays, strict=True)}
        theta = np.array([[p.to_working(values[p.name]) for p in self.free]], dtype=np.float64)
        compiled = self.compile("linear")
        return np.broadcast_to(compiled.bind(flat, order=0)(theta)[0], (1, flat[self.columns[0]].size))[
            0
        ].reshape(shape)


class CompiledLaw:
    """A law as programs over the free parameters' working coordinates
    (logarithms for log-scale parameters).
    """

    def __init__(self, law: Law, space: Space) -> None:
        self.law, self.space = law, space
        self.names = [p.name for p in law.free]
        graph = self.graph = Graph()
        bindings: dict[str, int] = {}
        for p in law.parameters:
            if p.name in law.fixed:
                bindings[p.name] = graph.const(law.fixed[p.name])
            else:
                node = graph.parameter(p.name)
                bindings[p.name] = graph.call("exp", node) if p.scale == "log" else node
        if callable(law.formula):
            names = {n: bindings.get(n, -1) for n in argument_names(law.formula)}
            value = trace(law.formula, graph, {n: graph.column(n) if i < 0 else i for n, i in names.items()})
        else:
            value = parse(law.formula, graph, law.columns, bindings)
        self.value = value
        self.output = graph.log(value) if space == "log" else value
        self.first = [graph.derivative(self.output, n) for n in self.names]
        self._second: list[int] | None = None

    @property
    def second(self) -> list[int]:
        """Second derivatives, upper triangle row by row; built when first asked for."""
        if self._second is None:
            graph, n = self.graph, len(self.names)
            self._second = [
                graph.derivative(self.first[i], self.names[j]) for i in range(n) for j in range(i, n)
            ]
        return self._second

    def bind(self, columns: Mapping[str, Array], order: int) -> BoundProgram:
        """order 0: prediction; 1: with gradient; 2: with second derivatives (upper triangle)."""
        outputs = [self.output, *(self.first if order >= 1 else []), *(self.second if order >= 2 else [])]
        return Program(self.graph, outputs, self.names).bind(columns)

    def linear_names(self) -> list[str]:
        """Parameters in which the plain prediction is jointly linear
        (the largest set found greedily, in order).
        """
        graph = self.graph
        plain = CompiledLaw(
            replace(
                self.law,
                parameters=tuple(
                    replace(p, scale="linear") if p.scale == "log" else p for p in self.law.parameters
                ),
            ),
            "linear",
        )
        graph = plain.graph
        slopes = {n: graph.derivative(plain.value, n) for n in plain.names}
        chosen: list[str] = []
        for n in plain.names:
            if all(m not in graph.parameters_in(slopes[n]) for m in [*chosen, n]):
                chosen.append(n)
        return chosen
