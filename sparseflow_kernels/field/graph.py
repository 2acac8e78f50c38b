"""The builder of a vector field's graph, and what its nodes mean.

Two operations make new rows: `linear` mixes rows by a sparse matrix, the same for all samples; a primitive (`apply`) mixes
nothing and works row by row, and an operand of one row serves all rows of the others. `rows` selects and concatenates. A
node that is built a second time is the one that was built first, so equal expressions are computed once.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Callable, Sequence

import torch
from torch import Tensor

from .chain import Activation, Pattern
from .convolution import Convolution
from .nodes import CONTEXT, SAMPLES, STATE, TIME, Made, Matrix, Node, from_parts, order, parts_with_gradient
from .primitives import PRIMITIVES

__all__ = [
    "CONTEXT", "SAMPLES", "STATE", "TIME", "Graph", "Matrix", "Node", "evaluate", "from_parts", "full_row", "order",
    "parts_with_gradient",
]  # fmt: skip

# The order of the terms of a sum: those that differ from sample to sample first.
_RANK = {binding: rank for rank, binding in enumerate((7, 3, 5, 1, 6, CONTEXT, TIME, 0))}


class Graph:
    """Makes nodes, and simplifies what cannot change the result while it makes them."""

    def __init__(self) -> None:
        self._known: dict[tuple, Node] = {}
        self._matrices: dict[tuple, Matrix] = {}
        self.origin = ""  # given to the nodes that are made
        self.activations: dict[Node, tuple[Activation, Node]] = {}  # node -> (activation, operand): fused kernels run it
        self.slopes: dict[Node, Node] = {}  # node of an activation -> its derivative there (`transforms.slope`)
        self.functions: list[Node] | None = []  # the functions of time in Python; None: it is not known which there are

    def __getstate__(self) -> dict:
        """Without the tables, which go by the identity of nodes and matrices: a copy has other ones."""
        return {**self.__dict__, "_known": {}, "_matrices": {}}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update({"slopes": {}, "functions": None, **state})  # version 0.1.0 kept neither

    def _intern(self, key: tuple, make: Callable[[], Node]) -> Node:
        node = self._known.get(key)
        if node is None:
            node = self._known[key] = make()
        return node

    # ---- leaves

    def input(self, name: str, rows: int, binding: int) -> Node:
        """An input by name: "state", "time", "context", or a cotangent or seed (binding STATE)."""
        return self._intern(("input", name, rows), lambda: Node("input", rows, binding=binding, name=name))

    def vector(self, part: int, rows: int, entries: Tensor | None = None) -> Node:
        """The values of part `part` of the field, one per row. entries: int64 [rows], which of them; None: all."""
        key = ("vector", part, None if entries is None else entries.numpy().tobytes())
        return self._intern(key, lambda: Node("vector", rows, part=part, tensor=entries, origin=self.origin))

    def number(self, value: float) -> Node:
        """A number of the code, one row."""
        value = float(value)
        key = ("number", value if value != 0 and value == value else repr(value))
        return self._intern(key, lambda: Node("number", 1, value=value))

    def constant(self, tensor: Tensor) -> Node:
        """Numbers [rows] that belong to no part and are not trained: masks, unit vectors. float64, on the CPU."""
        if tensor.numel() and bool((tensor == tensor[0]).all()):
            return self.number(float(tensor[0]))
        numbers = tensor.detach().cpu().to(torch.float64)
        key = ("constant", numbers.numel(), numbers.numpy().tobytes())
        return self._intern(key, lambda: Node("constant", numbers.numel(), tensor=numbers))

    def computed(self, made: Made, rows: int) -> Node:
        """Numbers [rows] that `made` computes from the values of parts, when the field is packed."""
        return Node("made", rows, made=made)

    def time_function(self, function: Callable[[Tensor], Tensor], rows: int) -> Node:
        """A function of time in Python, which takes a 0-d t and gives [rows]."""

        def make() -> Node:
            node = Node("time", rows, binding=TIME, function=function, origin=self.origin)
            if self.functions is not None:
                self.functions.append(node)
            return node

        return self._intern(("time", id(function)), make)

    # ---- mixing rows

    def ones(self, pattern: Pattern) -> Matrix:
        """A matrix of ones at the entries of a pattern: selections, sums of rows."""
        key = (pattern.shape, pattern.row_ptr.numpy().tobytes(), pattern.col.numpy().tobytes())
        if key not in self._matrices:
            self._matrices[key] = Matrix(pattern)
        return self._matrices[key]

    def linear(self, matrix: Matrix, x: Node, transposed: bool = False) -> Node:
        """matrix [out, in] times x [in], or its transpose times x [out].

        The product is split where x is a concatenation of values that are computed at different times, and a factor of one
        row that varies more often than the rest is taken out of it: less is computed per sample then.
        """
        out, width = matrix.shape[::-1] if transposed else matrix.shape
        if x.rows == 1 and width != 1:
            x = self.spread(x, width)
        assert x.rows == width, f"a matrix with {width} columns, times {x.rows} rows"
        if matrix.pattern.nnz == 0 or _is(x, 0.0):
            return self.spread(self.number(0.0), out)
        if x.kind in ("mul", "neg"):
            factor = _common_factor(x)
            if factor is not None:
                return self.mul(self.linear(matrix, factor[0], transposed), factor[1])
            if x.kind == "neg":
                return self.neg(self.linear(matrix, x.operands[0], transposed))
        if x.kind == "rows" and not transposed and len({operand.binding for operand in x.operands}) > 1:
            area = matrix.window.source_area if isinstance(matrix, Convolution) else 1
            if all(count % area == 0 for _, count in x.pieces):
                return self._split(matrix, x)
        return self._intern(
            ("linear", id(matrix), transposed, id(x)),
            lambda: Node("linear", out, (x,), x.binding, matrix=matrix, transposed=transposed, origin=self.origin),
        )

    def _split(self, matrix: Matrix, x: Node) -> Node:
        """matrix times a concatenation, as a sum over the bindings of its pieces, so that the terms that do not depend on
        the state are not computed for every sample and evaluation."""
        groups: dict[int, tuple[list[Node], list[Tensor]]] = {}
        start = 0
        for operand, (first, count) in zip(x.operands, x.pieces):
            parts, columns = groups.setdefault(operand.binding, ([], []))
            parts.append(self._piece(operand, first, count))
            columns.append(torch.arange(start, start + count))
            start += count
        total = None
        for _, (parts, columns) in sorted(groups.items(), key=lambda group: _RANK[group[0]]):
            term = self.linear(self.columns(matrix, torch.cat(columns)), self.concatenate(parts))
            if not _is(term, 0.0):
                total = self.add(total, term)
        return self.zeros(matrix.shape[0]) if total is None else total

    def columns(self, matrix: Matrix, index: Tensor) -> Matrix:
        """The matrix of these columns alone. index: int64, ascending; of a convolution whole channels."""
        key = (id(matrix), index.numpy().tobytes())
        if key not in self._matrices:
            pattern = matrix.pattern
            if isinstance(matrix, Convolution):
                area = matrix.window.source_area
                narrow, own = matrix.of_channels(index[::area] // area)
            else:
                place = torch.full((pattern.shape[1],), -1)
                place[index] = torch.arange(index.numel())
                own = (place[pattern.col] >= 0).nonzero().flatten()
                narrow = pattern.of_entries(own, place[pattern.col[own]], index.numel())
            entries = None if matrix.part is None else own if matrix.entries is None else matrix.entries[own]
            made = matrix.made and (lambda part, like: matrix.made(part, like)[own.to(like.device)])
            self._matrices[key] = replace(matrix, pattern=narrow, entries=entries, made=made)
        return self._matrices[key]

    def select(self, x: Node, index: Tensor) -> Node:
        """x[index]. index: int64 [rows of the result]."""
        index = index.cpu()
        if x.rows == 1 and x.kind == "number":
            return self.spread(x, index.numel())
        if torch.equal(index, torch.arange(x.rows)):
            return x
        if x.kind == "rows":  # the pieces themselves
            starts = torch.tensor([0, *(count for _, count in x.pieces)]).cumsum(0)
            which = torch.searchsorted(starts, index, right=True) - 1
            if index.numel() and bool((which == which[0]).all()):
                piece = int(which[0])
                return self.select(x.operands[piece], index - starts[piece] + x.pieces[piece][0])
        runs = _runs(index)
        if len(runs) <= 4 or (x.elementwise and len(runs) * 8 <= index.numel()):
            return self.concatenate([self._piece(x, first, count) for first, count in runs])
        pattern = Pattern((index.numel(), x.rows), torch.arange(index.numel() + 1), index)
        return self.linear(self.ones(pattern), x)

    def _piece(self, x: Node, first: int, count: int) -> Node:
        if count == x.rows:
            return x
        return self._intern(
            ("rows", (id(x),), ((first, count),)),
            lambda: Node("rows", count, (x,), x.binding, pieces=((first, count),), origin=self.origin),
        )

    def concatenate(self, parts: Sequence[Node]) -> Node:
        """The rows of all parts, one part after the other."""
        operands: list[Node] = []
        pieces: list[list[int]] = []
        for part in parts:
            inner = [(part, (0, part.rows))] if part.kind != "rows" else list(zip(part.operands, part.pieces))
            for node, (first, count) in inner:
                if operands and operands[-1] is node and sum(pieces[-1]) == first:
                    pieces[-1][1] += count
                elif count:
                    operands.append(node)
                    pieces.append([first, count])
        if len(operands) == 1:
            first, count = pieces[0]
            return self._piece(operands[0], first, count)
        binding = 0
        for operand in operands:
            binding |= operand.binding
        spans = tuple((first, count) for first, count in pieces)
        return self._intern(
            ("rows", tuple(map(id, operands)), spans),
            lambda: Node("rows", sum(c for _, c in spans), tuple(operands), binding, pieces=spans, origin=self.origin),
        )

    def spread(self, x: Node, rows: int) -> Node:
        """A node of one row, repeated; a node of that many rows as it is."""
        if x.rows == rows:
            return x
        if x.kind == "number":
            tensor = torch.full((rows,), x.value, dtype=torch.float64)
            key = ("constant", rows, tensor.numpy().tobytes())
            return self._intern(key, lambda: Node("constant", rows, tensor=tensor))
        pattern = Pattern((rows, 1), torch.arange(rows + 1), torch.zeros(rows, dtype=torch.int64))
        return self.linear(self.ones(pattern), x)

    def total(self, x: Node) -> Node:
        """The sum of the rows, [1]."""
        return x if x.rows == 1 else self.linear(self.ones(full_row(x.rows)), x)

    # ---- row by row

    def apply(self, name: str, *operands: Node) -> Node:
        """A primitive of `primitives.PRIMITIVES`, by name. The operands have one row, or as many as the others."""
        rows = max(operand.rows for operand in operands)
        assert all(operand.rows in (1, rows) for operand in operands), f"{name} of {[o.rows for o in operands]} rows"
        if all(operand.kind == "number" for operand in operands):
            return self.number(_on_numbers(name, [operand.value for operand in operands]))
        binding = 0
        for operand in operands:
            binding |= operand.binding
        return self._intern(
            (name, *map(id, operands)), lambda: Node(name, rows, operands, binding, origin=self.origin)
        )

    def add(self, a: Node | None, b: Node | None) -> Node:
        """a + b; None is zero. What no sample changes is summed up by itself, and added last."""
        if a is None or b is None:
            return b if a is None else a
        if _is(a, 0.0) and a.rows <= b.rows:
            return b
        if _is(b, 0.0) and b.rows <= a.rows:
            return a
        if b.kind == "neg":
            return self.sub(a, b.operands[0])
        if a.kind == "add" and a.binding & STATE and b.binding in (0, TIME):
            rest, last = a.operands
            if last.binding in (0, TIME) or (last.binding == CONTEXT and b.binding == 0):
                return self.add(rest, self.add(last, b))
        return self.apply("add", a, b)

    def sub(self, a: Node, b: Node) -> Node:
        if _is(b, 0.0) and b.rows <= a.rows:
            return a
        if _is(a, 0.0) and a.rows <= b.rows:
            return self.neg(b)
        return self.apply("sub", a, b)

    def mul(self, a: Node, b: Node) -> Node:
        for x, y in ((a, b), (b, a)):
            if x.kind == "number" and x.value in (1.0, -1.0, 0.0):
                return y if x.value == 1.0 else self.neg(y) if x.value == -1.0 else self.zeros(y.rows)
            if x.kind == "number" and y.kind == "mul" and y.operands[1].kind == "number":
                return self.mul(y.operands[0], self.number(x.value * y.operands[1].value))
        if a.kind == "number":
            a, b = b, a
        if _is(a, 0.0) or _is(b, 0.0):
            return self.zeros(max(a.rows, b.rows))
        if a is b:
            return self.square(a)
        return self.apply("mul", a, b)

    def zeros(self, rows: int) -> Node:
        return self.spread(self.number(0.0), rows)

    def scaled(self, a: Node, factor: float) -> Node:
        return self.mul(a, self.number(factor))

    def neg(self, a: Node) -> Node:
        if a.kind == "neg":
            return a.operands[0]
        return self.apply("neg", a)

    def square(self, a: Node) -> Node:
        return self.apply("square", a)

    def activation(self, activation: Activation, z: Node) -> Node:
        """One of the activations that engines have fused kernels for, written with primitives; `activations` remembers
        which nodes are one."""
        node = _ACTIVATIONS[activation.name](self, z, *activation.params)
        if node is not z and node.kind != "number":
            self.activations.setdefault(node, (activation, z))
        return node


def _softplus(g: Graph, z: Node, beta: float = 1.0, threshold: float = 20.0) -> Node:
    x = g.scaled(z, beta)
    return g.apply("where", g.apply("gt", x, g.number(threshold)), z, g.scaled(g.apply("softplus", x), 1.0 / beta))


def _elu(g: Graph, z: Node, alpha: float = 1.0) -> Node:
    below = g.apply("expm1", g.apply("where", g.apply("gt", z, g.number(0.0)), g.number(0.0), z))
    return g.apply("where", g.apply("gt", z, g.number(0.0)), z, g.scaled(below, alpha))


_ACTIVATIONS: dict[str, Callable[..., Node]] = {
    "identity": lambda g, z: z,
    "tanh": lambda g, z: g.apply("tanh", z),
    "sigmoid": lambda g, z: g.apply("sigmoid", z),
    "softplus": _softplus,
    "relu": lambda g, z: g.apply("where", g.apply("ge", g.number(0.0), z), g.number(0.0), z),
    "elu": _elu,
    "silu": lambda g, z: g.mul(z, g.apply("sigmoid", z)),
    "sin": lambda g, z: g.apply("sin", z),
    "square": lambda g, z: g.square(z),
    "cube": lambda g, z: g.mul(z, g.square(z)),
    "gelu": lambda g, z: g.mul(g.scaled(z, 0.5), g.add(g.apply("erf", g.scaled(z, math.sqrt(0.5))), g.number(1.0))),
}


def full_row(count: int) -> Pattern:
    """The pattern of a dense matrix [1, count]."""
    return Pattern((1, count), torch.tensor([0, count]), torch.arange(count))


def _common_factor(x: Node) -> tuple[Node, Node] | None:
    """(rows, factor) of a product of rows with a factor of one row, where the rows change less often than the product."""
    if x.kind == "mul":
        for rows, factor in (x.operands, x.operands[::-1]):
            if factor.rows == 1 and rows.rows == x.rows and rows.binding != x.binding:
                return rows, factor
    return None


def _is(node: Node, value: float) -> bool:
    if node.kind == "number":
        return node.value == value
    return node.kind == "constant" and bool((node.tensor == value).all())


def _runs(index: Tensor) -> list[tuple[int, int]]:
    """(first, count) of consecutive numbers."""
    if not index.numel():
        return []
    ends = ((index[1:] - index[:-1]) != 1).nonzero().flatten() + 1
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), ends))
    stops = torch.cat((ends, torch.tensor([index.numel()])))
    return list(zip(index[starts].tolist(), (stops - starts).tolist()))


def _on_numbers(name: str, values: Sequence[float]) -> float:
    tensors = [torch.tensor(value, dtype=torch.float64) for value in values]
    return float(PRIMITIVES[name].value(*tensors))


def evaluate(
    outputs: Sequence[Node], inputs: dict[str, Tensor], part: Callable[[int], Tensor],
    known: dict[Node, Tensor] | None = None, functions: dict[int, Callable[[Tensor], Tensor]] | None = None,
    like: Tensor | None = None, weights: dict[int, Tensor] | None = None, nodes: Sequence[Node] | None = None,
) -> list[Tensor]:  # fmt: skip
    """The nodes' values in torch, [batch or 1, rows] each, differentiable in everything. This defines what nodes mean.

    inputs: values by name, [batch or 1, rows] each; "time" is [1, 1], or [batch, 1] for a time per sample.  part: gives the
    values of a part of the field.  known: values of nodes that need not be computed.  functions: by the id of a function of
    time, the function that is called in its place.  like: a tensor of the dtype and device of the numbers; None: the first
    input.  weights: a dict that keeps the dense matrices, by their id, for the next call with the same parts.  nodes:
    `order(outputs)`, where it is known.
    """
    values: dict[Node, Tensor] = dict(known or {})
    like = next(iter(inputs.values())) if like is None else like
    weights = {} if weights is None else weights

    def weight(matrix: Matrix) -> Tensor:
        if id(matrix) not in weights:
            weights[id(matrix)] = matrix.pattern.dense(matrix.values(part, like))
        return weights[id(matrix)]

    def wide(x: Tensor, rows: int) -> Tensor:
        return x if x.shape[1] == rows else x.expand(x.shape[0], rows)

    for node in order(outputs, stop=lambda node: node in values) if nodes is None else nodes:
        if node in values:
            continue
        operands = [values[operand] for operand in node.operands]
        match node.kind:
            case "input":
                value = inputs[node.name]
            case "vector":
                value = part(node.part)
                value = (value if node.tensor is None else value[node.tensor.to(value.device)])[None]
            case "number":
                value = like.new_full((1, 1), node.value)
            case "constant":
                value = node.tensor.to(like)[None]
            case "made":
                value = node.made(part, like)[None]
            case "time":
                function = (functions or {}).get(id(node.function), node.function)
                value = torch.stack([function(t) for t in inputs["time"].reshape(-1)])
            case "linear":
                x = wide(operands[0], node.operands[0].rows)
                if isinstance(node.matrix, Convolution) or _is_large(node.matrix.pattern):
                    value = node.matrix.product(x, node.matrix.values(part, like), node.transposed)
                elif node.matrix.picks and not node.transposed:
                    value = x[:, node.matrix.pattern.col.to(x.device)]
                else:
                    value = x @ (weight(node.matrix) if node.transposed else weight(node.matrix).T)
            case "rows":
                batch = max(operand.shape[0] for operand in operands)
                parts = [
                    wide(operand, source.rows)[:, first : first + count].expand(batch, count)
                    for operand, source, (first, count) in zip(operands, node.operands, node.pieces)
                ]
                value = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            case _:
                value = PRIMITIVES[node.kind].value(*operands)
        values[node] = wide(value, node.rows)
    return [values[output] for output in outputs]


def _is_large(pattern: Pattern) -> bool:
    """Whether a product entry by entry takes less memory and time than one with the dense matrix."""
    return pattern.shape[0] * pattern.shape[1] > max(1 << 20, 64 * pattern.nnz)
