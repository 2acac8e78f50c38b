"""The trace of a term of a graph by its paths from the output to the state.

A path is a product A_k D_k ... A_1 D_1 A_0 of matrices A, which are the same for all samples, and diagonal matrices D
of slopes. The trace of a product stays the same when its last factor is moved to the front, so A_0 A_k is one matrix
that can be computed when the field is packed, and only those of its entries count that close a path:

    one slope:   tr = sum_j (A_0 A_1)_jj d_j
    two slopes:  tr = sum_ij d2_i A1_ij (A_0 A_2)_ji d1_j
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Sequence

import torch
from torch import Tensor

from .field import Convolution, Graph, Matrix, Node, Pattern
from .field.graph import evaluate, order
from .field.transforms import tangent

MOST_PATHS = 8  # of one term
MOST_SLOPES = 2  # of one path
MOST_ENTRIES = 2**26  # of a product of fixed factors, and of what leads to it: 256 MB in float32
MOST_WORK = 2**36  # multiply-adds of the products of fixed factors behind one path: some seconds


@dataclass(frozen=True)
class Fixed:
    """A factor that is the same for all samples: a matrix or its transpose, a diagonal of numbers that follow from the
    parts, or the selection of a piece of the rows."""

    matrix: Matrix | None = None
    transposed: bool = False
    diagonal: Node | None = None
    piece: tuple[int, int, int] | None = None  # (rows, first row, rows of what it is a piece of)

    def times(self, x: Tensor, part: Callable[[int], Tensor], like: Tensor) -> Tensor:
        """This factor times x [columns, n]."""
        if self.matrix is not None:
            return self._product(x, self.matrix.values(part, like))
        if self.diagonal is not None:
            return evaluate([self.diagonal], {}, part, like=like)[0][0][:, None] * x
        rows, first, _ = self.piece
        return x[first : first + rows]

    def _product(self, x: Tensor, values: Tensor) -> Tensor:
        if isinstance(self.matrix, Convolution):
            return self.matrix.product(x.T, values, self.transposed).T
        dense = self.matrix.pattern.dense(values)
        return (dense.T if self.transposed else dense) @ x

    def structure(self, x: Tensor) -> Tensor:
        """This factor of ones at the entries of a matrix, and else of ones on the diagonal, times x."""
        if self.matrix is not None:
            return self._product(x, torch.ones(self.matrix.pattern.nnz, dtype=torch.float32))
        if self.piece is None:
            return x
        rows, first, _ = self.piece
        return x[first : first + rows]

    @property
    def flipped(self) -> "Fixed":
        """The transpose."""
        if self.matrix is not None:
            return Fixed(self.matrix, not self.transposed)
        if self.diagonal is not None:
            return self
        rows, first, of = self.piece
        return Fixed(_placed(of, first, rows))

    @property
    def inputs(self) -> int:
        if self.matrix is not None:
            return self.matrix.shape[0 if self.transposed else 1]
        return self.diagonal.rows if self.diagonal is not None else self.piece[2]

    @property
    def multiply_adds(self) -> int:
        return 0 if self.matrix is None else self.matrix.multiply_adds

    @property
    def outputs(self) -> int:
        if self.matrix is not None:
            return self.matrix.shape[1 if self.transposed else 0]
        return self.diagonal.rows if self.diagonal is not None else self.piece[0]


@dataclass(frozen=True)
class Path:
    """A product of factors, from the left: Fixed, or the node of a slope. scale: a number that multiplies it."""

    factors: tuple[Fixed | Node, ...] = ()
    scale: float = 1.0

    @property
    def slopes(self) -> int:
        return sum(isinstance(factor, Node) for factor in self.factors)

    def behind(self, factor: Fixed | Node) -> "Path":
        return Path((factor, *self.factors), self.scale)


def trace_by_paths(g: Graph, term: Node, state: Node) -> tuple[Node, int] | None:
    """(the trace [1] of the term's Jacobian, its multiply-adds per sample), or None where there are too many paths,
    paths of too many slopes, or products of matrices that are too large."""
    found = _paths(g, term, state)
    if found is None:
        return None
    total, cost = g.number(0.0), 0
    for path in found:
        one = _trace(g, path, state.rows)
        if one is None:
            return None
        total, cost = g.add(total, g.scaled(one[0], path.scale)), cost + one[1]
    return total, cost


def _paths(g: Graph, output: Node, state: Node) -> list[Path] | None:
    moving: dict[Node, bool] = {}
    for node in order([output], stop=lambda node: node is state):
        moving[node] = node is state or any(moving[operand] for operand in node.operands)
    known: dict[Node, list[Path]] = {state: [Path()]}
    for node in order([output], stop=lambda node: node is state):
        if node in known:
            continue
        found: list[Path] = []
        if moving[node]:
            if node.kind == "linear":
                found = [path.behind(Fixed(node.matrix, node.transposed)) for path in known[node.operands[0]]]
            elif node.kind == "rows":
                found = _of_rows(node, known)
            else:
                anchors = _anchors(node, moving, state)
                for anchor in anchors:
                    (slope,) = tangent(g, [node], {**dict.fromkeys(anchors), anchor: g.number(1.0)})
                    found += [] if slope is None else _sloped(g, node, anchor, slope, known[anchor])
        if len(found) > MOST_PATHS or any(path.slopes > MOST_SLOPES for path in found):
            # The output may not read this node through these paths, but that is not looked into.
            return None
        known[node] = found
    return known[output]


def _anchors(node: Node, moving: dict[Node, bool], state: Node) -> list[Node]:
    """The nodes that an elementwise node is a function of: the first below it that are not elementwise."""
    found: dict[Node, None] = {}
    for other in order(node.operands, stop=lambda other: not other.elementwise or not moving[other] or other is state):
        if moving[other] and (not other.elementwise or other is state):
            found[other] = None
    return list(found)


def _sloped(g: Graph, node: Node, anchor: Node, slope: Node, paths: Sequence[Path]) -> list[Path]:
    spread = ()
    if anchor.rows != node.rows:
        column = Pattern((node.rows, 1), torch.arange(node.rows + 1), torch.zeros(node.rows, dtype=torch.int64))
        spread = (Fixed(g.ones(column)),)
    if slope.kind == "number":
        return [Path((*spread, *path.factors), path.scale * slope.value) for path in paths]
    factor = g.spread(slope, node.rows)
    return [Path((_diagonal(factor), *spread, *path.factors), path.scale) for path in paths]


def _diagonal(slope: Node) -> Fixed | Node:
    return slope if slope.binding else Fixed(diagonal=slope)


def _of_rows(node: Node, known: dict[Node, list[Path]]) -> list[Path]:
    found, start = [], 0
    for operand, (first, count) in zip(node.operands, node.pieces):
        for path in known.get(operand, ()):
            piece = (
                path if (first, count) == (0, operand.rows) else path.behind(Fixed(piece=(count, first, operand.rows)))
            )
            if count != node.rows:  # a matrix puts the piece at its place among zeros
                piece = piece.behind(Fixed(_placed(node.rows, start, count)))
            found.append(piece)
        start += count
    return found


def _placed(rows: int, first: int, count: int) -> Matrix:
    """What puts `count` rows at their place among `rows`, the others of which are zeros."""
    row_ptr = torch.arange(rows + 1).sub(first).clamp(0, count)
    return Matrix(Pattern((rows, count), row_ptr, torch.arange(count)))


# ---------------------------------------------------------------------------------------------------- the identities


def _trace(g: Graph, path: Path, dim: int) -> tuple[Node, int] | None:
    """(the node of the trace of one path, multiply-adds per sample); None where its products are too large."""
    groups: list[list[Fixed]] = [[]]  # of fixed factors, between the slopes
    slopes: list[Node] = []
    for factor in path.factors:
        if isinstance(factor, Node):
            slopes.append(factor)
            groups.append([])
        else:
            groups[-1].append(factor)
    if len(slopes) < 2:
        # The factors of A_0 A_k: those behind the last slope, then those before the first.
        outer = [*groups[-1], *groups[0]] if slopes else groups[0]
        width = slopes[0].rows if slopes else dim
        left, right = _halves(outer)
        between = left[-1].inputs if left else width
        if between * _multiply_adds(outer) > MOST_WORK:
            return None
        step = max(1, MOST_ENTRIES // max((factor.outputs for factor in (*left, *right)), default=width))

        def diagonal(part: Callable[[int], Tensor], like: Tensor) -> Tensor:
            # the diagonal of L R by the rows of L and of R', some of their columns at a time
            total = like.new_zeros(width)
            for first in range(0, between, step):
                some = range(first, min(first + step, between))
                rows = [_product(factors, width, part, like, some) for factors in (left, right)]
                total = total + (rows[0] * rows[1]).sum(1)
            return total

        if not slopes:
            return g.computed(lambda part, like: diagonal(part, like).sum()[None], 1), 0
        return g.total(g.mul(g.computed(diagonal, width), slopes[0])), width
    upper, lower = slopes
    outer, inner = [*groups[2], *groups[0]], groups[1]
    for factors, rows in ((outer, upper.rows), (inner, lower.rows)):
        columns = _columns(factors, rows)
        most_rows = max((factor.outputs for factor in factors), default=columns)
        if columns * most_rows > MOST_ENTRIES or columns * _multiply_adds(factors) > MOST_WORK:
            return None
    closed = (_structure(inner, lower.rows) > 0) & (_structure(outer, upper.rows).T > 0)
    pattern = Pattern.from_mask(closed)
    row, col = pattern.row, pattern.col

    def values(part: Callable[[int], Tensor], like: Tensor) -> Tensor:
        through, back = _product(inner, lower.rows, part, like), _product(outer, upper.rows, part, like)
        return through[row, col] * back[col, row]

    product = g.linear(Matrix(pattern, made=values), lower)
    return g.total(g.mul(upper, product)), pattern.nnz


def _halves(factors: Sequence[Fixed]) -> tuple[list[Fixed], list[Fixed]]:
    """The factors of L and of R' where L R is the product of all: cut where it is narrowest."""
    cut = min(range(1, len(factors) + 1), key=lambda at: factors[at - 1].inputs, default=0)
    return list(factors[:cut]), [factor.flipped for factor in reversed(factors[cut:])]


def _multiply_adds(factors: Sequence[Fixed]) -> int:
    """Of the product with one vector."""
    return sum(factor.multiply_adds for factor in factors)


def _columns(factors: Sequence[Fixed], width: int) -> int:
    return factors[-1].inputs if factors else width


def _product(
    factors: Sequence[Fixed], width: int, part: Callable[[int], Tensor], like: Tensor, columns: range | None = None
) -> Tensor:
    """The product of the factors, dense, or these columns of it; without factors the identity of this width."""
    rows = _columns(factors, width)
    columns = range(rows) if columns is None else columns
    x = torch.zeros(rows, len(columns), dtype=like.dtype, device=like.device)
    x[columns.start : columns.stop].fill_diagonal_(1.0)
    for factor in reversed(factors):
        x = factor.times(x, part, like)
    return x


@torch.no_grad()
def _structure(factors: Sequence[Fixed], width: int) -> Tensor:
    """Where the product of the factors can be other than zero: a matrix of positive numbers there, and zeros
    elsewhere."""
    x = torch.eye(factors[-1].inputs if factors else width, dtype=torch.float32)
    for factor in reversed(factors):
        x = factor.structure(x).clamp(max=1.0)
    return x
