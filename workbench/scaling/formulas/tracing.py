"""Laws written as Python functions: the function is called once, with symbols, and leaves its formula behind.

>>> import numpy as np
>>> graph = Graph()
>>> node = trace(lambda x, a: a * np.exp(-x), graph, {"x": graph.column("x"), "a": graph.parameter("a")})
>>> sorted(graph.columns_in(node)), sorted(graph.parameters_in(node))
(['x'], ['a'])
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from workbench.errors import BadInput
from workbench.scaling.formulas.formula import Graph, apply

UFUNC_NAMES = {
    "exp": "exp",
    "log": "log",
    "sqrt": "sqrt",
    "tanh": "tanh",
    "sin": "sin",
    "cos": "cos",
    "arctan": "arctan",
    "absolute": "abs",
    "sign": "sign",
    "minimum": "min",
    "maximum": "max",
}


class Symbol:
    """A graph node with operators, handed to a law written as a Python function.
    ``np.exp(symbol)`` works too.
    """

    def __init__(self, graph: Graph, node: int) -> None:
        self.graph, self.node = graph, node

    def _lift(self, other: Any) -> int:
        if isinstance(other, Symbol):
            return other.node
        if isinstance(other, int | float | np.integer | np.floating):
            return self.graph.const(float(other))
        raise TypeError(f"a law may combine symbols with numbers only, got {type(other).__name__}")

    def __add__(self, o: Any) -> Symbol:
        return Symbol(self.graph, self.graph.add(self.node, self._lift(o)))

    def __sub__(self, o: Any) -> Symbol:
        return Symbol(self.graph, self.graph.sub(self.node, self._lift(o)))

    def __rsub__(self, o: Any) -> Symbol:
        return Symbol(self.graph, self.graph.sub(self._lift(o), self.node))

    def __mul__(self, o: Any) -> Symbol:
        return Symbol(self.graph, self.graph.mul(self.node, self._lift(o)))

    def __truediv__(self, o: Any) -> Symbol:
        return Symbol(self.graph, self.graph.div(self.node, self._lift(o)))

    def __rtruediv__(self, o: Any) -> Symbol:
        return Symbol(self.graph, self.graph.div(self._lift(o), self.node))

    def __pow__(self, o: Any) -> Symbol:
        return Symbol(self.graph, self.graph.power(self.node, self._lift(o)))

    def __rpow__(self, o: Any) -> Symbol:
        return Symbol(self.graph, self.graph.power(self._lift(o), self.node))

    def __neg__(self) -> Symbol:
        return Symbol(self.graph, self.graph.neg(self.node))

    __radd__, __rmul__ = __add__, __mul__

    def __bool__(self) -> bool:
        raise BadInput(
            "law function: branches on a value (if, and, or, comparison); use min, max or where so that the "
            "derivative exists"
        )

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **_: Any) -> Symbol:
        arithmetic = {
            "add": "__add__",
            "subtract": "__sub__",
            "multiply": "__mul__",
            "divide": "__truediv__",
            "power": "__pow__",
        }
        nodes = [self._lift(i) for i in inputs]
        symbols = [Symbol(self.graph, n) for n in nodes]
        if ufunc.__name__ in arithmetic:
            return getattr(symbols[0], arithmetic[ufunc.__name__])(symbols[1])
        if ufunc.__name__ == "negative":
            return -symbols[0]
        return Symbol(self.graph, apply(self.graph, UFUNC_NAMES.get(ufunc.__name__, ufunc.__name__), nodes))


def argument_names(function: Callable[..., Any]) -> list[str]:
    """The names a law function takes: its columns and parameters."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind not in kinds for p in parameters):
        raise BadInput("law function: name every column and parameter in its signature (no *args, **kwargs)")
    return [p.name for p in parameters]


def trace(function: Callable[..., Any], graph: Graph, names: Mapping[str, int]) -> int:
    """Call `function` with one symbol per argument name; the node of what it returns."""
    try:
        result = function(**{name: Symbol(graph, names[name]) for name in argument_names(function)})
    except TypeError as error:
        raise BadInput(
            f"law function: cannot be followed symbolically ({error}); "
            "use arithmetic and numpy's exp, log, sqrt, "
            "tanh, minimum, maximum"
        ) from None
    if not isinstance(result, Symbol):
        raise BadInput("law function: must return an expression of its arguments, got a plain value")
    return result.node
