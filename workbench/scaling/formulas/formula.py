"""Formulas as data: parse, differentiate exactly, evaluate for many parameter vectors at once.

A law arrives as text (``"E + A / params**alpha + B / tokens**beta"``) or as a Python function that is called
once with symbols. Either way it becomes a small graph of arithmetic nodes in which equal sub-expressions are
one node. Nothing the user wrote is ever executed: the text is parsed with :mod:`ast`, every syntax node
outside a short list is refused, and the graph is interpreted by :mod:`workbench.scaling.formulas.program`.

Derivatives are symbolic and exact, so a fit never differentiates numerically.

>>> graph = Graph()
>>> law = parse("E + A / params**alpha", graph, columns={"params"})
>>> sorted(graph.parameters_in(law))
['A', 'E', 'alpha']
>>> sorted(graph.parameters_in(graph.derivative(law, "A")))
['alpha']
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from workbench.errors import BadInput

Array = np.ndarray
MAX_CHARACTERS = 4000
MAX_NODES = 2000
#: Longest chain of operations; deeper ones would exhaust the interpreter's stack when differentiated.
MAX_DEPTH = 150
#: Distinct operations of a graph with all its derivatives; a law of published size has a few thousand.
MAX_GRAPH = 20_000


def _sigmoid(x: Array) -> Array:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def _softplus(x: Array) -> Array:
    return np.logaddexp(0.0, x)


# name -> (numpy implementation, derivative built from (graph, argument node, own node))
FUNCTIONS: dict[str, tuple[Callable[..., Array], Callable[[Graph, int, int], int]]] = {
    "exp": (np.exp, lambda g, u, y: y),
    "log": (np.log, lambda g, u, y: g.div(g.const(1), u)),
    "sqrt": (np.sqrt, lambda g, u, y: g.div(g.const(0.5), y)),
    "tanh": (np.tanh, lambda g, u, y: g.sub(g.const(1), g.mul(y, y))),
    "sin": (np.sin, lambda g, u, y: g.call("cos", u)),
    "cos": (np.cos, lambda g, u, y: g.neg(g.call("sin", u))),
    "arctan": (np.arctan, lambda g, u, y: g.div(g.const(1), g.add(g.const(1), g.mul(u, u)))),
    "sigmoid": (_sigmoid, lambda g, u, y: g.mul(y, g.sub(g.const(1), y))),
    "softplus": (_softplus, lambda g, u, y: g.call("sigmoid", u)),
    "abs": (np.abs, lambda g, u, y: g.call("sign", u)),
    "sign": (np.sign, lambda g, u, y: g.const(0)),
}
BINARY: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "min": np.minimum,
    "max": np.maximum,
}
LEAVES = ("const", "column", "parameter")
CONSTANT_NAMES = {"pi": float(np.pi)}
CALLABLE = sorted([*FUNCTIONS, "log2", "log10", "min", "max", "where"])


class Graph:
    """Hash-consed arithmetic graph; a node is an integer index,
    its definition a tuple ``(operation, *arguments)``.
    """

    def __init__(self) -> None:
        self.nodes: list[tuple[Any, ...]] = []
        self._index: dict[tuple[Any, ...], int] = {}
        self._derivatives: dict[tuple[int, str], int] = {}
        self._parameters: list[frozenset[str]] = []
        self._depths: list[int] = []
        self._positives: dict[int, bool] = {}
        self._logs: dict[int, int] = {}

    def _node(self, *definition: Any) -> int:
        found = self._index.get(definition)
        if found is not None:
            return found
        if len(self.nodes) >= MAX_GRAPH:
            raise BadInput(
                f"formula: more than {MAX_GRAPH:,} operations with its derivatives; shorten it or name fewer "
                "parameters"
            )
        nodes = (
            () if definition[0] in LEAVES else definition[2:] if definition[0] == "call" else definition[1:]
        )
        depth = 1 + max((self._depths[i] for i in nodes), default=0)
        if depth > 4 * MAX_DEPTH:
            raise BadInput(f"formula: chains of more than {4 * MAX_DEPTH} operations; shorten it")
        self.nodes.append(definition)
        self._depths.append(depth)
        self._index[definition] = len(self.nodes) - 1
        if definition[0] == "parameter":
            self._parameters.append(frozenset([definition[1]]))
        else:
            self._parameters.append(frozenset().union(*(self._parameters[i] for i in nodes)))
        return len(self.nodes) - 1

    def value(self, node: int) -> float | None:
        """The number a node stands for, or None when it is not a constant."""
        return self.nodes[node][1] if self.nodes[node][0] == "const" else None

    def parameters_in(self, node: int) -> frozenset[str]:
        """Names of the parameters a node depends on."""
        return self._parameters[node]

    def columns_in(self, node: int) -> set[str]:
        """Names of the data columns a node depends on."""
        seen: set[int] = set()
        stack, names = [node], set()
        while stack:
            current = stack.pop()
            if current in seen:
                continue
            seen.add(current)
            operation, *arguments = self.nodes[current]
            if operation == "column":
                names.add(arguments[0])
            elif operation == "call":
                stack.append(arguments[1])
            elif operation not in ("const", "parameter"):
                stack.extend(arguments)
        return names

    def const(self, value: float) -> int:
        return self._node("const", float(value))

    def column(self, name: str) -> int:
        return self._node("column", name)

    def parameter(self, name: str) -> int:
        return self._node("parameter", name)

    def _fold(self, operation: str, a: int, b: int) -> int | None:
        x, y = self.value(a), self.value(b)
        if x is None or y is None:
            return None
        with np.errstate(all="ignore"):
            return self.const(float(BINARY[operation](np.float64(x), np.float64(y))))

    def add(self, a: int, b: int) -> int:
        folded = self._fold("add", a, b)
        if folded is not None:
            return folded
        if self.value(a) == 0:
            return b
        if self.value(b) == 0:
            return a
        return self._node("add", min(a, b), max(a, b))

    def sub(self, a: int, b: int) -> int:
        folded = self._fold("sub", a, b)
        if folded is not None:
            return folded
        if self.value(b) == 0:
            return a
        if self.value(a) == 0:
            return self.neg(b)
        if a == b:
            return self.const(0)
        return self._node("sub", a, b)

    def neg(self, a: int) -> int:
        value = self.value(a)
        if value is not None:
            return self.const(-value)
        if self.nodes[a][0] == "sub":
            return self._node("sub", self.nodes[a][2], self.nodes[a][1])
        return self.mul(self.const(-1), a)

    def mul(self, a: int, b: int) -> int:
        folded = self._fold("mul", a, b)
        if folded is not None:
            return folded
        for first, second in ((a, b), (b, a)):
            if self.value(first) == 0:
                return self.const(0)
            if self.value(first) == 1:
                return second
            if self.value(first) is not None and self.nodes[second][0] == "mul":
                inner = self.nodes[second]  # pull constants together: 2 * (3 * x) = 6 * x
                if self.value(inner[1]) is not None:
                    return self.mul(self.mul(first, inner[1]), inner[2])
                if self.value(inner[2]) is not None:
                    return self.mul(self.mul(first, inner[2]), inner[1])
        return self._node("mul", min(a, b), max(a, b))

    def div(self, a: int, b: int) -> int:
        folded = self._fold("div", a, b)
        if folded is not None:
            return folded
        if self.value(a) == 0:
            return self.const(0)
        value = self.value(b)
        if value is not None and value != 0:
            return self.mul(a, self.const(1.0 / value))
        if a == b:
            return self.const(1)
        return self._node("div", a, b)

    def power(self, a: int, b: int) -> int:
        """a**b. Small whole exponents stay products; the rest is exp(b log a), defined for a > 0 only."""
        exponent, base = self.value(b), self.value(a)
        if exponent is not None:
            if base is not None:
                with np.errstate(all="ignore"):
                    return self.const(float(np.power(np.float64(base), np.float64(exponent))))
            if exponent == 0:
                return self.const(1)
            if exponent == 0.5:
                return self.call("sqrt", a)
            if 1 <= abs(exponent) <= 8 and exponent == int(exponent):
                result = a
                for _ in range(int(abs(exponent)) - 1):
                    result = self.mul(result, a)
                return result if exponent > 0 else self.div(self.const(1), result)
        if base == 1:
            return self.const(1)
        return self.call("exp", self.mul(b, self.log(a)))

    def log(self, a: int) -> int:
        """log with the two rewrites that keep columns apart from parameters:
        log exp x = x, log(x / y) = log x - log y. Each node of a shared graph is rewritten once.
        """
        if a not in self._logs:
            self._logs[a] = self._log(a)
        return self._logs[a]

    def _log(self, a: int) -> int:
        definition = self.nodes[a]
        if definition[0] == "call" and definition[1] == "exp":
            return definition[2]
        if (
            definition[0] in ("mul", "div")
            and self._positive(definition[1])
            and self._positive(definition[2])
        ):
            first, second = self.log(definition[1]), self.log(definition[2])
            return self.add(first, second) if definition[0] == "mul" else self.sub(first, second)
        return self.call("log", a)

    def _positive(self, node: int) -> bool:
        if node not in self._positives:
            self._positives[node] = self._seen_positive(node)
        return self._positives[node]

    def _seen_positive(self, node: int) -> bool:
        definition = self.nodes[node]
        if definition[0] == "const":
            return definition[1] > 0
        if definition[0] in ("add", "mul", "div", "min", "max"):
            return all(self._positive(i) for i in definition[1:])
        return definition[0] == "call" and definition[1] in ("exp", "sigmoid", "softplus")

    def call(self, name: str, a: int) -> int:
        value = self.value(a)
        if value is not None:
            with np.errstate(all="ignore"):
                return self.const(float(FUNCTIONS[name][0](np.float64(value))))
        return self._node("call", name, a)

    def choose(self, name: str, a: int, b: int) -> int:
        folded = self._fold(name, a, b)
        return folded if folded is not None else a if a == b else self._node(name, min(a, b), max(a, b))

    def where(self, left: int, right: int, yes: int, no: int) -> int:
        """yes where left >= right, else no."""
        return yes if yes == no else self._node("where", left, right, yes, no)

    def derivative(self, node: int, name: str) -> int:
        """Exact derivative of a node with respect to a parameter
        (one-sided at kinks of min, max, abs, where).
        """
        if name not in self._parameters[node]:
            return self.const(0)
        key = (node, name)
        if key not in self._derivatives:
            self._derivatives[key] = self._derive(node, name)
        return self._derivatives[key]

    def _derive(self, node: int, name: str) -> int:
        operation, *arguments = self.nodes[node]
        if operation == "parameter":
            return self.const(1)
        if operation == "call":
            function, inner = arguments
            return self.mul(FUNCTIONS[function][1](self, inner, node), self.derivative(inner, name))
        if operation == "where":
            left, right, yes, no = arguments
            return self.where(left, right, self.derivative(yes, name), self.derivative(no, name))
        a, b = arguments
        da, db = self.derivative(a, name), self.derivative(b, name)
        if operation == "add":
            return self.add(da, db)
        if operation == "sub":
            return self.sub(da, db)
        if operation == "mul":
            return self.add(self.mul(da, b), self.mul(a, db))
        if operation == "div":  # (da - (a / b) db) / b reuses the quotient
            return self.div(self.sub(da, self.mul(node, db)), b)
        return self.where(a, b, da, db) if operation == "max" else self.where(b, a, da, db)


def apply(graph: Graph, name: str, arguments: Sequence[int]) -> int:
    """The node for a named function; refuses names and argument counts outside the language."""
    if name in ("min", "max") and len(arguments) >= 2:
        result = arguments[0]
        for other in arguments[1:]:
            result = graph.choose(name, result, other)
        return result
    if name in ("log2", "log10") and len(arguments) == 1:
        return graph.mul(
            graph.const(1.0 / float(np.log(2.0 if name == "log2" else 10.0))), graph.log(arguments[0])
        )
    if name == "log" and len(arguments) == 1:
        return graph.log(arguments[0])
    if name in FUNCTIONS and len(arguments) == 1:
        return graph.call(name, arguments[0])
    raise BadInput(
        f"formula: function {name!r} with {len(arguments)} argument(s) is not available; "
        f"use {', '.join(CALLABLE)}"
    )


def parse(text: str, graph: Graph, columns: Iterable[str], bindings: Mapping[str, int] | None = None) -> int:
    """Turn formula text into a node. Lines ``name = expression`` may come before the final expression.

    Names in `columns` are data, names in `bindings` are the given nodes, every other name becomes
    a parameter. Raises BadInput naming what was refused; attribute access, indexing, strings, calls
    of unknown names and anything else outside arithmetic never get past this function.
    """
    if len(text) > MAX_CHARACTERS:
        raise BadInput(f"formula: {len(text)} characters, at most {MAX_CHARACTERS} are accepted")
    try:
        body = ast.parse(text.strip().replace("^", "**"), mode="exec").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise BadInput(
            f"formula: {text.strip()!r} is not an expression ({error}); write e.g. 'E + A/params**alpha'"
        ) from None
    if not body or not isinstance(body[-1], ast.Expr):
        raise BadInput("formula: the last line must be an expression, e.g. 'E + A/params**alpha'")
    names: dict[str, int] = dict(bindings or {})
    data = set(columns)
    if sum(1 for part in body for _ in ast.walk(part)) > MAX_NODES:
        raise BadInput(f"formula: more than {MAX_NODES} parts; shorten it")
    depth, level = 0, list[ast.AST](body)
    while level:
        depth, level = depth + 1, [child for part in level for child in ast.iter_child_nodes(part)]
    if depth > MAX_DEPTH:
        raise BadInput(
            f"formula: nested {depth} deep, at most {MAX_DEPTH} are accepted; name intermediate results on "
            "their own lines"
        )
    for statement in body[:-1]:
        if not (
            isinstance(statement, ast.Assign)
            and len(statement.targets) == 1
            and isinstance(statement.targets[0], ast.Name)
        ):
            raise BadInput(
                "formula: only lines like 'name = expression' may come before the final expression"
            )
        target = statement.targets[0].id
        if target in data or target in names:
            raise BadInput(
                f"formula: {target!r} is already a column, parameter or earlier line; choose another name"
            )
        names[target] = _expression(statement.value, graph, names, data)
    return _expression(body[-1].value, graph, names, data)


def _expression(tree: ast.expr, graph: Graph, names: Mapping[str, int], columns: set[str]) -> int:
    def build(part: ast.expr) -> int:
        node = built(part)
        value = graph.value(node)
        if value is not None and not np.isfinite(value):
            text = ast.unparse(part)
            shown = text if len(text) <= 60 else text[:57] + "..."
            raise BadInput(f"formula: {shown!r} is {value}; constants have to be finite, at most 1.8e308")
        return node

    def built(part: ast.expr) -> int:
        if isinstance(part, ast.Constant):
            if isinstance(part.value, bool) or not isinstance(part.value, int | float):
                raise BadInput(f"formula: {part.value!r} is not a number")
            try:
                return graph.const(float(part.value))
            except OverflowError:
                raise BadInput("formula: a number beyond 1.8e308 cannot be represented") from None
        if isinstance(part, ast.Name):
            if part.id in names:
                return names[part.id]
            if part.id in columns:
                return graph.column(part.id)
            return (
                graph.const(CONSTANT_NAMES[part.id])
                if part.id in CONSTANT_NAMES
                else graph.parameter(part.id)
            )
        if isinstance(part, ast.UnaryOp) and isinstance(part.op, ast.UAdd | ast.USub):
            inner = build(part.operand)
            return inner if isinstance(part.op, ast.UAdd) else graph.neg(inner)
        if isinstance(part, ast.BinOp):
            operations = {
                ast.Add: graph.add,
                ast.Sub: graph.sub,
                ast.Mult: graph.mul,
                ast.Div: graph.div,
                ast.Pow: graph.power,
            }
            for kind, operation in operations.items():
                if isinstance(part.op, kind):
                    return operation(build(part.left), build(part.right))
        if isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and not part.keywords:
            if part.func.id == "where" and len(part.args) == 3:
                return comparison(part.args[0], build(part.args[1]), build(part.args[2]))
            return apply(graph, part.func.id, [build(a) for a in part.args])
        raise BadInput(
            f"formula: {ast.unparse(part)!r} ({type(part).__name__}) is not accepted; "
            "use + - * / **, numbers, "
            f"names and {', '.join(CALLABLE)}"
        )

    def comparison(part: ast.expr, yes: int, no: int) -> int:
        if isinstance(part, ast.Compare) and len(part.ops) == 1:
            left, right = build(part.left), build(part.comparators[0])
            kind = part.ops[0]
            if isinstance(kind, ast.GtE):
                return graph.where(left, right, yes, no)
            if isinstance(kind, ast.LtE):
                return graph.where(right, left, yes, no)
            if isinstance(kind, ast.Lt):
                return graph.where(left, right, no, yes)
            if isinstance(kind, ast.Gt):
                return graph.where(right, left, no, yes)
        raise BadInput(
            "formula: the first argument of where() must be one comparison, e.g. where(tokens >= knee, a, b)"
        )

    try:
        return build(tree)
    except RecursionError:
        raise BadInput("formula: nested too deeply; name intermediate results on their own lines") from None
