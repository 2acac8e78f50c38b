"""Nodes of a vector field as a graph: plain data.

Values are rows: every node is [rows] numbers per sample. When a node is computed follows from what it depends on (its
binding): nothing but parameters: when the field is packed; the context (numbers given per sample): once a solve; time:
once an evaluation, for all samples; the state: per sample and evaluation.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import cached_property
from typing import Callable, Iterable, Sequence

import torch
from torch import Tensor

from .chain import Pattern

STATE, TIME, CONTEXT = 1, 2, 4  # bits of Node.binding
SAMPLES = (STATE, STATE | TIME, STATE | CONTEXT, STATE | TIME | CONTEXT, TIME | CONTEXT)  # bindings that need them all
_STRUCTURAL = frozenset(("input", "vector", "number", "constant", "made", "linear", "rows", "time"))


@dataclass(frozen=True, eq=False)
class Matrix:
    """A sparse matrix [out, in] of the graph. Its values are those of part `part` of the field, what `made` computes from
    parts, or ones where both are None.

    entries: int64 [nnz], which of the part's values they are; None: all of them in order.
    """

    pattern: Pattern
    part: int | None = None
    entries: Tensor | None = None
    made: "Made | None" = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.pattern.shape

    @property
    def multiply_adds(self) -> int:
        """Of a product, per sample."""
        return self.pattern.nnz

    @property
    def places(self) -> tuple[Tensor, Tensor, Tensor]:
        """int64 (row, column, entry): where the values stand in the matrix, the number `entry` of them in each place."""
        return self.pattern.row, self.pattern.col, torch.arange(self.pattern.nnz)

    def product(self, x: Tensor, values: Tensor, transposed: bool = False) -> Tensor:
        """This matrix times x [batch, in], or its transpose times x [batch, out], without making it."""
        row, col = (index.to(x.device) for index in (self.pattern.row, self.pattern.col))
        row, col = (col, row) if transposed else (row, col)
        return x.new_zeros(x.shape[0], self.shape[1 if transposed else 0]).index_add(1, row, x[:, col] * values)

    @property
    def constant(self) -> bool:
        """Its values are ones, which nothing trains."""
        return self.part is None and self.made is None

    @cached_property
    def picks(self) -> bool:
        """Every row is one of x's: x[col]. As a product with a dense matrix, an infinite row would spoil all others."""
        pattern = self.pattern
        return self.constant and torch.equal(pattern.row_ptr.cpu(), torch.arange(pattern.shape[0] + 1))

    def values(self, part: Callable[[int], Tensor], like: Tensor) -> Tensor:
        """Its values [nnz]. part: gives the values of a part of the field.  like: of the dtype and device of ones."""
        if self.made is not None:
            return self.made(part, like)
        if self.part is None:
            return like.new_ones(self.pattern.nnz)
        return part(self.part) if self.entries is None else part(self.part)[self.entries]


Made = Callable[[Callable[[int], Tensor], Tensor], Tensor]  # (values of a part, like) -> numbers computed from parts


@dataclass(frozen=True, eq=False)
class Node:
    """One value of the graph, [rows] numbers per sample.

    kind: "input" (by its name), "vector" (values of a part, one per row; `tensor` says which, None: all), "number" (one
    row), "constant" (a tensor that belongs to no part), "made" (computed from parts), "linear" (a matrix, or its transpose,
    times the operand), "rows" (pieces of the operands, one after the other), "time" (a function of time kept in Python), or
    the name of a primitive.  origin: where the user's module computes it."""

    kind: str
    rows: int
    operands: tuple["Node", ...] = ()
    binding: int = 0
    name: str = ""
    part: int = -1
    value: float = 0.0
    tensor: Tensor | None = None
    matrix: Matrix | None = None
    transposed: bool = False
    pieces: tuple[tuple[int, int], ...] = ()  # of "rows": (first row, number of rows) of each operand
    function: Callable[[Tensor], Tensor] | None = None
    made: Made | None = None
    origin: str = ""

    def __repr__(self) -> str:
        """Without its operands, which other nodes have too: written out, a graph would be as long as it has paths."""
        name = self.name or (f"part {self.part}" if self.part >= 0 else "")
        told = [f"[{self.rows}]", *(text for text in (name, self.origin) if text)]
        return f"<Node {self.kind} {' '.join(told)}>"

    @property
    def elementwise(self) -> bool:
        """Its kind is a primitive."""
        return self.kind not in _STRUCTURAL

    @property
    def per_sample(self) -> bool:
        """Its value differs from sample to sample, and is computed at every evaluation."""
        return self.binding in SAMPLES


def order(
    outputs: Iterable[Node], stop: Callable[[Node], bool] = lambda node: False,
    operands: Callable[[Node], Sequence[Node]] = operator.attrgetter("operands"),
) -> list[Node]:  # fmt: skip
    """The outputs and the nodes that they depend on, operands before what reads them. Operands of a node for which `stop`
    holds are not followed. operands: what a node is taken to be a function of."""
    seen: set[int] = set()
    found: list[Node] = []
    waiting: list[tuple[Node, bool]] = [(node, False) for node in reversed(list(outputs))]
    while waiting:
        node, done = waiting.pop()
        if done:
            found.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            waiting.append((node, True))
            if not stop(node):
                waiting += [(operand, False) for operand in reversed(operands(node)) if id(operand) not in seen]
    return found


def parts_with_gradient(output: Node) -> frozenset[int]:
    """The parts of a field that a gradient reaches from its output: those that are read, and not only where forward
    detaches."""
    found: set[int] = set()
    seen, waiting = {output}, [output]
    while waiting:
        node = waiting.pop()
        found |= {holder.part for holder in (node, node.matrix) if holder is not None and holder.part is not None}
        for operand in () if node.kind == "detached" else node.operands:
            if operand not in seen:
                seen.add(operand)
                waiting.append(operand)
    return frozenset(found)


def from_parts(outputs: Sequence[Node]) -> bool:
    """Whether they depend on parts of the field."""
    return any(node.kind in ("vector", "made") or not (node.matrix is None or node.matrix.constant) for node in order(outputs))
