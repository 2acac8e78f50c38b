"""Rules of graphs for linear systems: inverses, determinants, triangular and Cholesky factors of small matrices made of
the state, and any matrix of constants applied to the state.

Matrices of three columns are inverted by their cofactors. Larger ones are eliminated as LAPACK does it, with the pivot of
each column the largest below it: rows are exchanged by choices, so that every sample has its own pivots (Golub and Van
Loan, Matrix Computations, 3.4).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..field import Graph, Node
from .algebra import apply
from .elements import Elements, samples_of
from .functions import above, choose, maximum, product, quotient
from .graph_linear import matmul, unsqueezed
from .operations import aten, base_name
from .refusal import REMEDY, refuse
from .registry import GRAPH, argument
from .values import Constant, Opaque, StateValue, TimeValue

rule = GRAPH.rule

BY_COFACTORS = 3  # columns; of more, these formulas, which choose no pivots, are inexact
MOST_COLUMNS = 8  # whose elimination takes about as many operations as their cube


def _mapped(e: Elements, make: Any, *ids: Tensor) -> Tensor:
    return e.pointwise(make, *map(StateValue, ids)).ids


def _less(g: Graph, a: Node, b: Node, c: Node) -> Node:
    return g.sub(a, g.mul(b, c))


def _check_size(n: int, func) -> None:
    if n > MOST_COLUMNS:
        refuse(f"the operation {base_name(func)} on matrices of {n} columns made of the state (more than {MOST_COLUMNS})")


def _results(first: Any, out: Any, what: str) -> Any:
    """The values of an operation of several results, of which the first ones are known."""
    known = first if isinstance(first, list) else [first]
    if not isinstance(out, (tuple, list)):
        return known[0]
    return [*known, *(Opaque(v.shape, what) for v in out[len(known):])]


# ---------------------------------------------------------------------------------------------------------- cofactors


def _minor(e: Elements, ids: Tensor, row: int, column: int) -> Tensor:
    n = ids.shape[-1]
    rows, columns = ([k for k in range(n) if k != without] for without in (row, column))
    return _expanded(e, ids[..., rows, :][..., columns])


def _expanded(e: Elements, ids: Tensor) -> Tensor:
    """The determinants of matrices [..., n, n], by their first rows."""
    n = ids.shape[-1]
    if n == 0:
        return e.ids(1.0).expand(ids.shape[:-2])
    if n == 1:
        return ids[..., 0, 0]
    total = None
    for column in range(n):
        term = _mapped(e, product, ids[..., 0, column], _minor(e, ids, 0, column))
        sign = -1.0 if column % 2 else 1.0
        total = term if total is None else _mapped(e, lambda g, a, b, s=sign: g.add(a, g.scaled(b, s)), total, term)
    return total


def _by_cofactors(e: Elements, ids: Tensor) -> Tensor:
    n = ids.shape[-1]
    scale = _mapped(e, lambda g, a: g.apply("reciprocal", a), _expanded(e, ids))
    rows = []
    for row in range(n):
        for column in range(n):
            sign = -1.0 if (row + column) % 2 else 1.0
            make = lambda g, a, s, sign=sign: g.mul(g.scaled(a, sign), s)
            rows.append(_mapped(e, make, _minor(e, ids, column, row), scale))
    return torch.stack(rows, -1).view(ids.shape)


# -------------------------------------------------------------------------------------------------------- elimination


def _eliminated(e: Elements, ids: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Matrices [..., n, m >= n] with zeros below the diagonal of their first n columns, and the signs of the exchanges of
    rows [...]."""
    ids = ids.clone()
    sign = e.ids(1.0).expand(ids.shape[:-2])
    larger = lambda g, a, b: g.apply("gt", g.apply("abs", a), g.apply("abs", b))
    for k in range(n - 1):
        for i in range(k + 1, n):
            swap = _mapped(e, larger, ids[..., i, k], ids[..., k, k])
            upper, lower, wide = ids[..., k, k:], ids[..., i, k:], swap[..., None]
            ids[..., k, k:], ids[..., i, k:] = _mapped(e, choose, wide, lower, upper), _mapped(e, choose, wide, upper, lower)
            sign = _mapped(e, lambda g, s, a: choose(g, s, g.neg(a), a), swap, sign)
        factor = _mapped(e, quotient, ids[..., k + 1: n, k], ids[..., k, k, None])
        rest = _mapped(e, _less, ids[..., k + 1: n, k + 1:], factor[..., None], ids[..., k, None, k + 1:])
        ids[..., k + 1: n, k + 1:] = rest
    return ids, sign


def _substituted(e: Elements, ids: Tensor, right: Tensor, upper: bool, unit: bool) -> Tensor:
    """x of A x = right [..., n, k], A [..., n, n] being triangular."""
    n = ids.shape[-1]
    shape = torch.broadcast_shapes(ids.shape[:-2], right.shape[:-2])
    ids, right = ids.expand(*shape, n, n), right.expand(*shape, *right.shape[-2:])
    found: dict[int, Tensor] = {}
    for i in range(n - 1, -1, -1) if upper else range(n):
        value = right[..., i, :]
        for j, known in found.items():
            value = _mapped(e, _less, value, ids[..., i, j, None], known)
        found[i] = value if unit else _mapped(e, quotient, value, ids[..., i, i, None])
    return torch.stack([found[i] for i in range(n)], -2)


def _solved(e: Elements, ids: Tensor, right: Tensor, func) -> Tensor:
    """x of A x = right [..., n, k]."""
    n = ids.shape[-1]
    _check_size(n, func)
    shape = torch.broadcast_shapes(ids.shape[:-2], right.shape[:-2])
    ids, right = ids.expand(*shape, n, n), right.expand(*shape, *right.shape[-2:])
    if n <= BY_COFACTORS:
        return e.products(_by_cofactors(e, ids).unsqueeze(-2), right.transpose(-1, -2).unsqueeze(-3))
    made, _ = _eliminated(e, torch.cat([ids, right], -1), n)
    return _substituted(e, made[..., :n], made[..., n:], True, False)


def _determinant(e: Elements, ids: Tensor, func) -> Tensor:
    n = ids.shape[-1]
    _check_size(n, func)
    if n <= BY_COFACTORS:
        return _expanded(e, ids)
    made, sign = _eliminated(e, ids, n)
    diagonal = made.diagonal(dim1=-2, dim2=-1)
    lines = torch.cat([diagonal, sign[..., None]], -1)
    return e.tree(product, lines.reshape(-1, n + 1)).view(ids.shape[:-2])


def _factor(e: Elements, ids: Tensor, func) -> Tensor:
    """The lower Cholesky factors of matrices [..., n, n], of which the lower half is read."""
    n = ids.shape[-1]
    _check_size(n, func)
    made = e.zero.expand(ids.shape).clone()
    for j in range(n):
        column = ids[..., j:, j]
        for k in range(j):
            column = _mapped(e, _less, column, made[..., j:, k], made[..., j, k, None])
        pivot = _mapped(e, lambda g, a: g.apply("sqrt", a), column[..., :1])
        made[..., j, j] = pivot[..., 0]
        if j + 1 < n:
            made[..., j + 1:, j] = _mapped(e, quotient, column[..., 1:], pivot)
    return made


# -------------------------------------------------------------------------------------------- what becomes of arguments


def _columns(e: Elements, value: Any, samples: Tensor) -> Tensor:
    """The elements of a right side [..., n, k]; a constant stands beside the matrices' samples [..., 1, 1]."""
    if not isinstance(value, Constant):
        return e.ids(value)
    shape = torch.broadcast_shapes(value.shape, (*samples.shape[:-2], 1, 1))
    return e.ids(value, samples.expand(shape)).expand(shape)


def _samples(ids: Tensor) -> Tensor:
    return samples_of(ids).amin(-1, keepdim=True).amin(-2, keepdim=True)


def _applied(e: Elements, matrices: Constant | TimeValue, right: Any) -> StateValue:
    """Constants [..., n, n], the inverses of which are known, times a state [..., n, k]."""
    ids = e.ids(right)
    if len(matrices.shape) == 2:
        lines = ids.transpose(-1, -2)
        made = matmul(e, StateValue(lines.reshape(-1, ids.shape[-2])), apply(aten.transpose.int, matrices, 0, 1))
        return StateValue(made.ids.view(lines.shape).transpose(-1, -2))
    lead = torch.broadcast_shapes(matrices.shape[:-2], ids.shape[:-2])
    flat = apply(aten.expand.default, matrices, [*lead, *matrices.shape[-2:]])
    flat = apply(aten.reshape.default, flat, [-1, *matrices.shape[-2:]])
    made = matmul(e, flat, StateValue(ids.expand(*lead, *ids.shape[-2:]).reshape(-1, *ids.shape[-2:])))
    return StateValue(made.ids.view(*lead, *made.ids.shape[-2:]))


def _turned(value: Any) -> Any:
    if isinstance(value, StateValue):
        return StateValue(value.ids.transpose(-1, -2))
    return apply(aten.transpose.int, value, -2, -1)


@rule("linalg_inv_ex", "inverse", "linalg_inv")
def inverse(e: Elements, func, args, kwargs, out) -> Any:
    ids = e.ids(args[0])
    _check_size(ids.shape[-1], func)
    if ids.shape[-1] <= BY_COFACTORS:
        made = _by_cofactors(e, ids)
    else:
        one = torch.where(torch.eye(ids.shape[-1], dtype=torch.bool), e.ids(1.0), e.zero)
        made = _solved(e, ids, one, func)
    return _results(StateValue(made), out, "a check of a matrix")


@rule("_linalg_solve_ex", "linalg_solve_ex", "linalg_solve")
def solve(e: Elements, func, args, kwargs, out) -> Any:
    matrix, right = args[:2]
    first = out[0] if isinstance(out, (tuple, list)) else out
    vector = len(right.shape) == 1 or (len(right.shape) == len(matrix.shape) - 1 and right.shape == matrix.shape[:-1])
    right = unsqueezed(e, right, -1) if vector else right
    left = argument(args, kwargs, 2, "left", True)
    if not left:
        matrix, right = _turned(matrix), _turned(right)
    if isinstance(matrix, Constant):
        made = _applied(e, apply(aten.linalg_inv_ex.default, matrix)[0], right)
    else:
        ids = e.ids(matrix)
        made = StateValue(_solved(e, ids, _columns(e, right, _samples(ids)), func))
    made = made if left else _turned(made)
    return _results(StateValue(made.ids.reshape(first.shape)), out, "parts of a factorisation")


@rule("linalg_solve_triangular")
def solve_triangular(e: Elements, func, args, kwargs, out) -> Any:
    matrix, right = args[:2]
    upper, left, unit = kwargs["upper"], kwargs.get("left", True), kwargs.get("unitriangular", False)
    if not left:
        matrix, right, upper = _turned(matrix), _turned(right), not upper
    if isinstance(matrix, Constant):
        one = Constant(torch.eye(matrix.shape[-1], dtype=matrix.value.dtype, device=matrix.value.device))
        one = apply(aten.expand.default, one, list(matrix.shape))
        solved = apply(aten.linalg_solve_triangular.default, matrix, one, upper=upper, unitriangular=unit)
        made = _applied(e, solved, right)
    else:
        ids = e.ids(matrix)
        _check_size(ids.shape[-1], func)
        made = StateValue(_substituted(e, ids, _columns(e, right, _samples(ids)), upper, unit))
    return made if left else _turned(made)


@rule("cholesky_solve")
def cholesky_solve(e: Elements, func, args, kwargs, out) -> Any:
    right, matrix, upper = args[0], args[1], argument(args, kwargs, 2, "upper", False)
    if isinstance(matrix, Constant):
        return _applied(e, apply(aten.cholesky_inverse.default, matrix, upper), right)
    ids = e.ids(matrix).transpose(-1, -2) if upper else e.ids(matrix)
    _check_size(ids.shape[-1], func)
    made = _substituted(e, ids, _columns(e, right, _samples(ids)), False, False)
    return StateValue(_substituted(e, ids.transpose(-1, -2), made, True, False))


@rule("linalg_cholesky_ex", "cholesky")
def cholesky(e: Elements, func, args, kwargs, out) -> Any:
    upper, ids = argument(args, kwargs, 1, "upper", False), e.ids(args[0])
    made = _factor(e, ids.transpose(-1, -2) if upper else ids, func)
    return _results(StateValue(made.transpose(-1, -2) if upper else made), out, "a check of a matrix")


@rule("_linalg_det", "linalg_det", "det")
def determinant(e: Elements, func, args, kwargs, out) -> Any:
    return _results(StateValue(_determinant(e, e.ids(args[0]), func)), out, "parts of a factorisation")


@rule("_linalg_slogdet", "linalg_slogdet")
def log_determinant(e: Elements, func, args, kwargs, out) -> Any:
    found = StateValue(_determinant(e, e.ids(args[0]), func))
    size = e.pointwise(lambda g, a: g.apply("log", g.apply("abs", a)), found)
    return _results([e.pointwise(lambda g, a: g.apply("sign", a), found), size], out, "parts of a factorisation")


@rule("linalg_pinv", "pinverse")
def pseudo_inverse(e: Elements, func, args, kwargs, out) -> Any:
    # Its inverse would do for a matrix that has one. A mass matrix from a pruned network often has none, for some states.
    refuse(
        f"the operation {base_name(func)} on matrices of the state",
        f"Where they have an inverse, use torch.linalg.solve or torch.linalg.inv. Otherwise u{REMEDY[1:]}",
    )


# ---------------------------------------------------------------------------------------------------- exponentials

# Taylor's series to this power is exact to rounding for matrices of norm 1, in double precision too (1 / 19! is 8e-18);
# larger ones are halved first and squared as often (Higham, The Scaling and Squaring Method for the Matrix Exponential
# Revisited, 2005). exp overflows long before the largest of these.
POWER, MOST_HALVINGS = 18, 11


@rule("linalg_matrix_exp", "matrix_exp")
def matrix_exponential(e: Elements, func, args, kwargs, out) -> Any:
    ids = e.ids(args[0])
    n = ids.shape[-1]
    _check_size(n, func)
    lines = _mapped(e, lambda g, a: g.apply("detached", g.apply("abs", a)), ids)
    sums = e.sums(lines.reshape(-1, n)).view(ids.shape[:-1])
    norm = e.tree(maximum, sums.reshape(-1, n)).view(ids.shape[:-2])
    large = [_mapped(e, lambda g, a, k=k: above(g, a, 2.0**k), norm) for k in range(MOST_HALVINGS)]
    factor = e.ids(1.0).expand(norm.shape)
    for k in large:
        factor = _mapped(e, lambda g, c, a: choose(g, c, g.scaled(a, 0.5), a), k, factor)
    small = _mapped(e, product, ids, factor[..., None, None])
    one = torch.where(torch.eye(n, dtype=torch.bool), e.ids(1.0), e.zero).expand(ids.shape)
    made = one
    for k in range(POWER, 0, -1):  # 1 + A (1 + A / 2 (1 + A / 3 (...)))
        made = _mapped(e, lambda g, a, b, k=k: g.add(g.scaled(a, 1.0 / k), b), _multiplied(e, small, made), one)
    for k in large:
        made = _mapped(e, choose, k[..., None, None], _multiplied(e, made, made), made)
    outside = lambda g, a, m: choose(g, above(g, m, 2.0**MOST_HALVINGS), g.number(math.nan), a)
    return StateValue(_mapped(e, outside, made, norm[..., None, None]))


def _multiplied(e: Elements, a: Tensor, b: Tensor) -> Tensor:
    return e.products(a.unsqueeze(-2), b.transpose(-1, -2).unsqueeze(-3))
