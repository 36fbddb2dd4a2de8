"""Evaluate formula graphs for many parameter vectors at once.

Shapes: a column is ``(rows,)``, a parameter matrix is ``(starts, parameters)``; a node that mixes both is
``(starts, rows)``. Nodes that depend on columns alone are computed once, when the data is bound.

>>> import numpy as np
>>> from workbench.scaling.formulas.formula import Graph, parse
>>> graph = Graph()
>>> y = parse("a * x**b", graph, columns={"x"})
>>> program = Program(graph, [y, graph.derivative(y, "a")], ["a", "b"])
>>> [out.tolist() for out in program.bind({"x": np.array([1.0, 2.0])})(np.array([[3.0, 2.0]]))]
[[[3.0, 12.0]], [[1.0, 4.0]]]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from workbench.scaling.formulas.formula import BINARY, FUNCTIONS, Graph

Array = np.ndarray


class Program:
    """A list of output nodes as a straight-line program over the named parameters."""

    def __init__(self, graph: Graph, outputs: Sequence[int], parameters: Sequence[str]) -> None:
        self.graph, self.outputs, self.parameters = graph, list(outputs), list(parameters)
        order: list[int] = []
        state: dict[int, int] = {}
        stack = [(node, False) for node in reversed(self.outputs)]
        while stack:
            node, ready = stack.pop()
            if ready:
                order.append(node)
                continue
            if state.get(node):
                continue
            state[node] = 1
            stack.append((node, True))
            stack.extend((child, False) for child in self._children(node))
        self.order = order

    def _children(self, node: int) -> tuple[int, ...]:
        definition = self.graph.nodes[node]
        if definition[0] in ("const", "column", "parameter"):
            return ()
        return definition[2:] if definition[0] == "call" else definition[1:]

    def bind(self, columns: Mapping[str, Array]) -> BoundProgram:
        """Fix the data: everything that depends on columns alone is computed once, here.

        A column is (rows,), or (starts, rows) where every parameter vector has its own points.
        """
        return BoundProgram(self, columns)


class BoundProgram:
    """A program with its data; call it with ``(starts, parameters)`` to get one array per output."""

    def __init__(self, program: Program, columns: Mapping[str, Array]) -> None:
        graph = program.graph
        self.program = program
        self.fixed: dict[int, Array] = {}
        self.steps: list[tuple[int, Any, tuple[int, ...]]] = []
        self.where: list[tuple[int, int]] = []
        position = {name: i for i, name in enumerate(program.parameters)}
        for node in program.order:
            operation, *arguments = graph.nodes[node]
            if operation == "const":
                self.fixed[node] = np.full((1, 1), arguments[0])
            elif operation == "column":
                self.fixed[node] = np.atleast_2d(np.asarray(columns[arguments[0]], dtype=np.float64))
            elif operation == "parameter":
                self.where.append((node, position[arguments[0]]))
            else:
                children = program._children(node)
                function = FUNCTIONS[arguments[0]][0] if operation == "call" else BINARY.get(operation)
                if not graph.parameters_in(node):
                    with np.errstate(all="ignore"):
                        self.fixed[node] = _evaluate(function, [self.fixed[c] for c in children])
                else:
                    self.steps.append((node, function, children))
        last: dict[int, int] = {}
        for step, (_, _, children) in enumerate(self.steps):
            for child in children:
                last[child] = step
        keep = set(program.outputs) | set(self.fixed)
        self.release = [
            [c for c in set(children) if last[c] == step and c not in keep]
            for step, (_, _, children) in enumerate(self.steps)
        ]

    def __call__(self, theta: Array) -> list[Array]:
        """Outputs for theta (starts, parameters), each broadcastable to (starts, rows).
        Never warns; inf and nan pass through.
        """
        values = dict(self.fixed)
        for node, column in self.where:
            values[node] = theta[:, column, None]
        with np.errstate(all="ignore"):
            for (node, function, children), dead in zip(self.steps, self.release, strict=True):
                values[node] = _evaluate(function, [values[c] for c in children])
                for child in dead:
                    del values[child]
        return [values[node] for node in self.program.outputs]


def _evaluate(function: Callable[..., Array] | None, arguments: list[Array]) -> Array:
    if function is None:
        left, right, yes, no = arguments
        return np.where(left >= right, yes, no)
    return function(*arguments)
