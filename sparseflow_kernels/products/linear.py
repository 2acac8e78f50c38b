"""Three products of a sparse layer as differentiable operations.

    sparseflow::linear, sparseflow::spmm_transposed, sparseflow::sddmm

They are closed under differentiation: each is linear in both its factors, and the gradients of one are the other two,
so that backward passes can be differentiated as often as one likes. Eager calls run them as autograd functions, which
cost less than operators; torch.compile, torch.export and other tracers see the operators.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Callable, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad

from .packed import Where, packed_of

# ----------------------------------------------------------------------------------------------------- three operations
# x [..., in], grad [..., out], values [nnz], bias [out]; all of one dtype on one device. Nobody differentiates in here.


def _flat(x: Tensor) -> Tensor:
    """[..., features] -> [batch, features]."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _run_linear(x: Tensor, values: Tensor, bias: Tensor | None, where: Where) -> Tensor:
    """x W' + bias: [..., out]."""
    matrix = packed_of(where).matrix(where.backend, x.device)
    return matrix.forward(_flat(x), values, bias).view(*x.shape[:-1], where.shape[0])


def _run_transposed(grad: Tensor, values: Tensor, where: Where) -> Tensor:
    """grad W: [..., in]."""
    matrix = packed_of(where).matrix(where.backend, grad.device)
    return matrix.backward_input(_flat(grad), values).view(*grad.shape[:-1], where.in_features)


def _run_sddmm(grad: Tensor, x: Tensor, where: Where) -> Tensor:
    """grad' x at the entries of the pattern, summed over all other axes: [nnz]."""
    matrix = packed_of(where).matrix(where.backend, x.device)
    return matrix.backward_values(_flat(grad), _flat(x))


_WHERE = "Tensor row_ptr, Tensor col, int in_features, str backend"


@torch.library.custom_op(
    "sparseflow::linear", mutates_args=(), schema=f"(Tensor x, Tensor values, Tensor? bias, {_WHERE}) -> Tensor"
)
def _linear_op(x, values, bias, *where):
    return _run_linear(x, values, bias, Where(*where))


@_linear_op.register_fake
def _(x, values, bias, *where):
    return x.new_empty(*x.shape[:-1], Where(*where).shape[0])


@torch.library.custom_op(
    "sparseflow::spmm_transposed", mutates_args=(), schema=f"(Tensor grad, Tensor values, {_WHERE}) -> Tensor"
)
def _transposed_op(grad, values, *where):
    return _run_transposed(grad, values, Where(*where))


@_transposed_op.register_fake
def _(grad, values, *where):
    return grad.new_empty(*grad.shape[:-1], Where(*where).in_features)


@torch.library.custom_op("sparseflow::sddmm", mutates_args=(), schema=f"(Tensor grad, Tensor x, {_WHERE}) -> Tensor")
def _sddmm_op(grad, x, *where):
    return _run_sddmm(grad, x, Where(*where))


@_sddmm_op.register_fake
def _(grad, x, row_ptr, col, in_features, backend):
    return x.new_empty(col.shape[0])


# ------------------------------------------------------------------------------------------------------------ gradients


class _Calls(NamedTuple):
    """The operations as a derivative calls them: (two arguments, *where), the first also with a bias between."""

    linear: Callable
    spmm_transposed: Callable
    sddmm: Callable


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    """Keeps the two factors and where."""
    row_ptr, col, *ctx.rest = inputs[-len(Where._fields) :]
    ctx.save_for_backward(*inputs[:2], row_ptr, col)
    ctx.save_for_forward(*inputs[:2], row_ptr, col)


def _kept(ctx: Any) -> tuple[Tensor, Tensor, tuple]:
    left, right, row_ptr, col = ctx.saved_tensors
    return left, right, (row_ptr, col, *ctx.rest)


_NOTHING = (None,) * len(Where._fields)


def _linear_gradient(calls: _Calls, ctx: Any, grad: Tensor) -> tuple:
    x, values, where = _kept(ctx)
    need_x, need_values, need_bias = ctx.needs_input_grad[:3]
    return (
        calls.spmm_transposed(grad, values, *where) if need_x else None,
        calls.sddmm(grad, x, *where) if need_values else None,
        _flat(grad).sum(0) if need_bias else None,
        *_NOTHING,
    )


def _transposed_gradient(calls: _Calls, ctx: Any, cotangent: Tensor) -> tuple:
    grad, values, where = _kept(ctx)
    return (
        calls.linear(cotangent, values, None, *where) if ctx.needs_input_grad[0] else None,
        calls.sddmm(grad, cotangent, *where) if ctx.needs_input_grad[1] else None,
        *_NOTHING,
    )


def _sddmm_gradient(calls: _Calls, ctx: Any, cotangent: Tensor) -> tuple:
    grad, x, where = _kept(ctx)
    return (
        calls.linear(x, cotangent, None, *where) if ctx.needs_input_grad[0] else None,
        calls.spmm_transposed(grad, cotangent, *where) if ctx.needs_input_grad[1] else None,
        *_NOTHING,
    )


_OPERATORS = _Calls(_linear_op, _transposed_op, _sddmm_op)

_linear_op.register_autograd(partial(_linear_gradient, _OPERATORS), setup_context=_setup)
_transposed_op.register_autograd(partial(_transposed_gradient, _OPERATORS), setup_context=_setup)
_sddmm_op.register_autograd(partial(_sddmm_gradient, _OPERATORS), setup_context=_setup)


def _sum_of(*terms: Tensor | None) -> Tensor | None:
    given = [term for term in terms if term is not None]
    return sum(given[1:], given[0]) if given else None


def _one_by_one(info: Any, in_dims: tuple, args: tuple, call: Callable) -> tuple[Tensor, int]:
    """vmap over what the kernels have no batch axis for."""

    def item(index: int) -> Tensor:
        return call(*(a if d is None else a.select(d, index) for a, d in zip(args, in_dims)))

    if info.batch_size == 0:
        raise ValueError("SparseLinear: vmap over no items")
    return torch.stack([item(index) for index in range(info.batch_size)]), 0


def _same_pattern(in_dims: tuple) -> None:
    if any(dim is not None for dim in in_dims[-len(Where._fields) :]):
        raise ValueError(
            "SparseLinear: vmap over layers needs one pattern for all of them, and index tensors that are not stacked; "
            "stack the parameters only (values, bias), or call the layers one after another"
        )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x, values, bias, *where):
        return _run_linear(x, values, bias, Where(*where))

    setup_context = staticmethod(_setup)

    @staticmethod
    def backward(ctx, grad):
        return _linear_gradient(_EAGER, ctx, grad)

    @staticmethod
    def jvp(ctx, x_t, values_t, bias_t, *_):
        x, values, where = _kept(ctx)
        tangent = _sum_of(
            None if x_t is None else _EAGER.linear(x_t, values, None, *where),
            None if values_t is None else _EAGER.linear(x, values_t, None, *where),
        )
        if tangent is None:
            return None if bias_t is None else bias_t.expand(*x.shape[:-1], -1).clone()
        return tangent if bias_t is None else tangent + bias_t

    @staticmethod
    def vmap(info, in_dims, x, values, bias, *where):
        _same_pattern(in_dims)
        if in_dims[0] is not None and in_dims[1] is None and in_dims[2] is None:
            return _EAGER.linear(x.movedim(in_dims[0], 0), values, bias, *where), 0
        return _one_by_one(info, in_dims, (x, values, bias, *where), _EAGER.linear)


class _Transposed(torch.autograd.Function):
    @staticmethod
    def forward(grad, values, *where):
        return _run_transposed(grad, values, Where(*where))

    setup_context = staticmethod(_setup)

    @staticmethod
    def backward(ctx, cotangent):
        return _transposed_gradient(_EAGER, ctx, cotangent)

    @staticmethod
    def jvp(ctx, grad_t, values_t, *_):
        grad, values, where = _kept(ctx)
        return _sum_of(
            None if grad_t is None else _EAGER.spmm_transposed(grad_t, values, *where),
            None if values_t is None else _EAGER.spmm_transposed(grad, values_t, *where),
        )

    @staticmethod
    def vmap(info, in_dims, grad, values, *where):
        _same_pattern(in_dims)
        if in_dims[0] is not None and in_dims[1] is None:
            return _EAGER.spmm_transposed(grad.movedim(in_dims[0], 0), values, *where), 0
        return _one_by_one(info, in_dims, (grad, values, *where), _EAGER.spmm_transposed)


class _Sddmm(torch.autograd.Function):
    @staticmethod
    def forward(grad, x, *where):
        return _run_sddmm(grad, x, Where(*where))

    setup_context = staticmethod(_setup)

    @staticmethod
    def backward(ctx, cotangent):
        return _sddmm_gradient(_EAGER, ctx, cotangent)

    @staticmethod
    def jvp(ctx, grad_t, x_t, *_):
        grad, x, where = _kept(ctx)
        return _sum_of(
            None if grad_t is None else _EAGER.sddmm(grad_t, x, *where),
            None if x_t is None else _EAGER.sddmm(grad, x_t, *where),
        )

    @staticmethod
    def vmap(info, in_dims, grad, x, *where):
        _same_pattern(in_dims)
        grad, x = (a if d is None else a.movedim(d, 0) for a, d in zip((grad, x), in_dims))
        # gradients by the sample have nothing to sum up
        if math.prod((x if in_dims[1] is not None else grad).shape[1:-1]) == 1:
            row, col = rows_of(where[0], where[1]), where[1]
            products = grad.index_select(-1, row) * x.index_select(-1, col)
            return products.reshape(info.batch_size, -1), 0
        dims = tuple(None if d is None else 0 for d in in_dims)
        return _one_by_one(info, dims, (grad, x, *where), _EAGER.sddmm)


for _operator, _function in ((_linear_op, _Linear), (_transposed_op, _Transposed), (_sddmm_op, _Sddmm)):
    _operator.register_vmap(_function.vmap)


class _EagerLinear(_Linear):
    """The same where nothing but autograd looks on: setup_context, which torch.func needs, is slow."""

    @staticmethod
    def forward(ctx, x, values, bias, *where):
        _setup(ctx, (x, values, bias, *where), None)
        return _run_linear(x, values, bias, Where(*where))

    setup_context = torch.autograd.Function.setup_context


def _traced(a: Tensor, b: Tensor) -> bool:
    """Is what runs now recorded, or made of tensors that hold no numbers, so that only operators will do?"""
    return (
        torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0
        or type(a) not in _PLAIN or type(b) not in _PLAIN or a.is_meta or b.is_meta
        or is_legacy_batchedtensor(a) or is_legacy_batchedtensor(b)
    )  # fmt: skip


_PLAIN = (Tensor, nn.Parameter)


def _transformed() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _either(run: Callable, function: Any, operator: Callable, a: Tensor, b: Tensor, *rest: Any) -> Tensor:
    """An operation inside a derivative."""
    if _traced(a, b):
        return operator(a, b, *rest)
    if torch.is_grad_enabled() or _transformed():
        return function.apply(a, b, *rest)
    return run(a, b, *rest[: -len(Where._fields)], Where(*rest[-len(Where._fields) :]))


_EAGER = _Calls(
    partial(_either, _run_linear, _Linear, _linear_op),
    partial(_either, _run_transposed, _Transposed, _transposed_op),
    partial(_either, _run_sddmm, _Sddmm, _sddmm_op),
)


def product(x: Tensor, values: Tensor, bias: Tensor | None, where: Where) -> Tensor:
    if _traced(x, values):
        return _linear_op(x, values, bias, *where)
    if _transformed():
        return _Linear.apply(x, values, bias, *where)
    wanted = x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)
    if wanted and torch.is_grad_enabled():
        return _EagerLinear.apply(x, values, bias, *where)
    return _run_linear(x, values, bias, where)


def rows_of(row_ptr: Tensor, col: Tensor) -> Tensor:
    """int64 [nnz]: the row of every entry."""
    return torch.repeat_interleave(row_ptr.diff(), output_size=col.shape[0])
