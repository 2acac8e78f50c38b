"""Graphs are closed under differentiation: the tangent and the adjoint of a graph are graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .graph import Graph, Matrix, Node, order
from .primitives import PRIMITIVES


def tangent(g: Graph, outputs: Sequence[Node], seeds: Mapping[Node, Node]) -> list[Node | None]:
    """The directional derivatives of the outputs, [rows] like each of them, or None for zero.

    seeds: for every node that moves, the direction in which it does, [rows] like the node.
    """
    dots: dict[Node, Node | None] = dict(seeds)
    for node in order(outputs, stop=lambda node: node in dots):
        if node in dots:
            continue
        if node in g.activations and g.activations[node][1] in dots:
            dot = dots[g.activations[node][1]]
            dots[node] = None if dot is None else g.mul(slope(g, node), dot)
        else:
            dots[node] = _tangent_of(g, node, [dots[operand] for operand in node.operands])
    return [dots[output] for output in outputs]


def _tangent_of(g: Graph, node: Node, moved: Sequence[Node | None]) -> Node | None:
    if all(dot is None for dot in moved):
        return None
    if node.kind == "linear":
        return g.linear(node.matrix, moved[0], node.transposed)
    if node.kind == "rows":
        parts = [g.zeros(o.rows) if dot is None else g.spread(dot, o.rows) for o, dot in zip(node.operands, moved)]
        return g.concatenate([
            g.select(part, _range(first, count)) for part, (first, count) in zip(parts, node.pieces)
        ])  # fmt: skip
    total = None
    for partial, dot in zip(PRIMITIVES[node.kind].partials(g, node, node.operands), moved):
        if partial is not None and dot is not None:
            total = g.add(total, g.mul(partial, dot))
    return None if total is None else g.spread(total, node.rows)


def slope(g: Graph, node: Node) -> Node:
    """act'(z) of a node that is act(z) (`Graph.activation`), as one node: kernels make it along with act(z)."""
    if node not in g.slopes:
        _, z = g.activations[node]
        dots: dict[Node, Node | None] = {z: g.number(1.0)}
        for inner in order([node], stop=lambda inner: inner is z):
            if inner is not z:
                dots[inner] = _tangent_of(g, inner, [dots[operand] for operand in inner.operands])
        g.slopes[node] = g.zeros(node.rows) if dots[node] is None else g.spread(dots[node], node.rows)
    return g.slopes[node]


def _range(first: int, count: int) -> Tensor:
    return torch.arange(first, first + count)


@dataclass
class Adjoint:
    """What `adjoint` finds.

    cotangents: leaf -> cotangent, [rows] like the leaf; a leaf that is absent has the cotangent zero.
    matrices: matrix -> pairs of nodes (left [out], right [in]). The gradient of entry (i, j) is the sum, over the pairs and
        the samples, of left_i * right_j.
    """

    cotangents: dict[Node, Node]
    matrices: dict[Matrix, list[tuple[Node, Node]]]


def adjoint(g: Graph, cotangents: Mapping[Node, Node], leaf: Callable[[Node], bool]) -> Adjoint:
    """The chain rule backwards: from cotangents of nodes those of the leaves, and the gradients of the matrices.

    cotangents: node -> cotangent, of the node's rows or of one row that stands for all.  leaf: says of a node that nothing
    behind it is differentiated; nodes without operands are leaves too.
    """
    nodes = order(cotangents, stop=leaf)
    moves: dict[Node, bool] = {}
    for node in nodes:  # whether anybody wants a gradient of something behind it
        if leaf(node) or not node.operands:
            moves[node] = node.kind not in ("number", "constant")
        else:
            trained = node.matrix is not None and not node.matrix.constant
            moves[node] = trained or any(moves[operand] for operand in node.operands)
    bars: dict[Node, Node | None] = {}
    pairs: dict[Matrix, list[tuple[Node, Node]]] = {}
    gathered: dict[Node, list[tuple[int, Node]]] = {}  # of nodes that are read in pieces: (first row, cotangent)

    def give(node: Node, bar: Node, rows: int) -> None:
        """Adds a cotangent to a node's. bar: of `rows` rows, or of one that stands for them all."""
        if moves[node]:
            if node.rows == 1 and rows > 1:
                bar = g.total(g.spread(bar, rows))
            bars[node] = g.add(bars.get(node), bar)

    for node, bar in cotangents.items():
        give(node, bar, node.rows)
    for node in reversed(nodes):
        if node in gathered:
            give(node, _together(g, node.rows, gathered[node]), node.rows)
        bar = bars.get(node)
        if bar is None or leaf(node) or not node.operands:
            continue
        if node.kind == "linear":
            (x,) = node.operands
            if not node.matrix.constant:
                wide = g.spread(bar, node.rows)
                pairs.setdefault(node.matrix, []).append((x, wide) if node.transposed else (wide, x))
            if moves[x]:
                sums = node.rows == 1 and node.matrix.constant and node.matrix.pattern.nnz == x.rows
                give(x, bar if sums else g.linear(node.matrix, bar, not node.transposed), x.rows)
        elif node.kind == "rows":
            start = 0
            for operand, (first, count) in zip(node.operands, node.pieces):
                if moves[operand]:
                    piece = g.select(bar, _range(start, count)) if bar.rows > 1 else bar
                    gathered.setdefault(operand, []).append((first, g.spread(piece, count)))
                start += count
        elif node in g.activations and g.activations[node][1] in moves:
            z = g.activations[node][1]
            if moves[z]:
                give(z, g.mul(slope(g, node), bar), node.rows)
        else:
            for operand, partial in zip(node.operands, PRIMITIVES[node.kind].partials(g, node, node.operands)):
                if partial is not None and moves[operand]:
                    give(operand, g.mul(partial, bar), node.rows)
    leaves = [node for node in nodes if (leaf(node) or not node.operands) and bars.get(node) is not None]
    found = {node: g.spread(bars[node], node.rows) for node in leaves}
    return Adjoint(found, pairs)


def _together(g: Graph, rows: int, pieces: Iterable[tuple[int, Node]]) -> Node:
    """The sum of pieces [their rows], each placed at its first row among `rows` rows that are zero elsewhere. Pieces that
    do not overlap are concatenated, which costs no addition."""
    pending = sorted(pieces, key=lambda piece: piece[0])
    total = None
    while pending:
        parts, rest, at = [], [], 0
        for first, bar in pending:
            if first < at:
                rest.append((first, bar))
                continue
            if first > at:
                parts.append(g.zeros(first - at))
            parts.append(bar)
            at = first + bar.rows
        if at < rows:
            parts.append(g.zeros(rows - at))
        total = g.add(total, g.concatenate(parts))
        pending = rest
    return total
