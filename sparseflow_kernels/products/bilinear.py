"""The products of a sparse layer as differentiable operations, closed under differentiation.

A layer is linear in its input and in its values. Of its three operations (x, values) -> y, (cotangent of y, values) -> that
of x, and (cotangent of y, x) -> that of the values, each is linear in both its factors, and the gradients of one are the
other two, so that backward passes can be differentiated as often as one likes. Eager calls run them as autograd functions,
which cost less than operators; torch.compile, torch.export and other tracers see the operators.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad


class Calls(NamedTuple):
    """The three operations as a derivative calls them: (two arguments, *where), the first also with a bias between."""

    linear: Callable
    transposed: Callable
    gradient: Callable


@dataclass(frozen=True)
class Kind:
    """A kind of layer. Nobody differentiates in its functions, whose tensors are of one dtype on one device.

    name: of its class, for messages.  where: a NamedTuple that says which layer an operation belongs to; its first fields
    are the tensors row_ptr and col.  linear(x, values, bias, where), transposed(grad, values, where), gradient(grad, x,
    where): the operations, for any leading axes.  names: of their operators, which tracers see.  schema: of the fields of
    `where`, as operators take them.  of_bias(grad): the cotangent of a bias.  with_bias(y, bias): y + bias.  shape_of(x,
    where): that of y.  shape_back(grad, where): that of x.  by_sample(grad, x, where): gradients of the values, [items, nnz],
    where every item of the first axis is one sample; None: it is not.
    """

    name: str
    where: type
    linear: Callable
    transposed: Callable
    gradient: Callable
    names: tuple[str, str, str]
    schema: str
    of_bias: Callable[[Tensor], Tensor]
    with_bias: Callable[[Tensor, Tensor], Tensor]
    shape_of: Callable[..., tuple[int, ...]]
    shape_back: Callable[..., tuple[int, ...]]
    by_sample: Callable[..., Tensor | None]


def _sum_of(*terms: Tensor | None) -> Tensor | None:
    given = [term for term in terms if term is not None]
    return sum(given[1:], given[0]) if given else None


_PLAIN = (Tensor, nn.Parameter)


def _traced(a: Tensor, b: Tensor) -> bool:
    """Is what runs now recorded, or made of tensors that hold no numbers, so that only operators will do?"""
    return (
        torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0
        or type(a) not in _PLAIN or type(b) not in _PLAIN or a.is_meta or b.is_meta
        or is_legacy_batchedtensor(a) or is_legacy_batchedtensor(b)
    )  # fmt: skip


def _transformed() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _setup(fields: int, ctx: Any, inputs: tuple, output: Tensor) -> None:
    """Keeps the two factors and where."""
    row_ptr, col, *ctx.rest = inputs[-fields:]
    ctx.save_for_backward(*inputs[:2], row_ptr, col)
    ctx.save_for_forward(*inputs[:2], row_ptr, col)


def _kept(ctx: Any) -> tuple[Tensor, Tensor, tuple]:
    left, right, row_ptr, col = ctx.saved_tensors
    return left, right, (row_ptr, col, *ctx.rest)


def _operators(kind: Kind) -> Calls:
    """The operations for tracers, with the fields of `where` spread out."""
    Where = kind.where
    fields = len(Where._fields)

    def operator(name: str, arguments: str, run: Callable, shape: Callable[..., tuple[int, ...]]) -> Callable:
        @torch.library.custom_op(
            f"sparseflow::{name}", mutates_args=(), schema=f"({arguments}, {kind.schema}) -> Tensor"
        )
        def own(*args):
            return run(*args[:-fields], Where(*args[-fields:]))

        @own.register_fake
        def _(*args):
            return args[0].new_empty(shape(args[0], Where(*args[-fields:])))

        return own

    linear, transposed, gradient = kind.names
    return Calls(
        operator(linear, "Tensor x, Tensor values, Tensor? bias", kind.linear, kind.shape_of),
        operator(transposed, "Tensor grad, Tensor values", kind.transposed, kind.shape_back),
        operator(gradient, "Tensor grad, Tensor x", kind.gradient, lambda grad, where: (where.col.shape[0],)),
    )


def differentiable(kind: Kind) -> Callable[[Tensor, Tensor, Tensor | None, Any], Tensor]:
    """The first operation, (x, values, bias, where) -> y, differentiable; and derivatives for the operators."""
    Where = kind.where
    fields = len(Where._fields)
    nothing = (None,) * fields
    setup = partial(_setup, fields)

    def linear_gradient(calls: Calls, ctx: Any, grad: Tensor) -> tuple:
        x, values, where = _kept(ctx)
        need_x, need_values, need_bias = ctx.needs_input_grad[:3]
        return (
            calls.transposed(grad, values, *where) if need_x else None,
            calls.gradient(grad, x, *where) if need_values else None,
            kind.of_bias(grad) if need_bias else None,
            *nothing,
        )

    def transposed_gradient(calls: Calls, ctx: Any, cotangent: Tensor) -> tuple:
        grad, values, where = _kept(ctx)
        return (
            calls.linear(cotangent, values, None, *where) if ctx.needs_input_grad[0] else None,
            calls.gradient(grad, cotangent, *where) if ctx.needs_input_grad[1] else None,
            *nothing,
        )

    def gradient_gradient(calls: Calls, ctx: Any, cotangent: Tensor) -> tuple:
        grad, x, where = _kept(ctx)
        return (
            calls.linear(x, cotangent, None, *where) if ctx.needs_input_grad[0] else None,
            calls.transposed(grad, cotangent, *where) if ctx.needs_input_grad[1] else None,
            *nothing,
        )

    def one_by_one(info: Any, in_dims: tuple, args: tuple, call: Callable) -> tuple[Tensor, int]:
        """vmap over what the kernels have no batch axis for."""

        def item(index: int) -> Tensor:
            return call(*(a.select(d, index) if isinstance(a, Tensor) and d is not None else a for a, d in zip(args, in_dims)))

        if info.batch_size == 0:
            raise ValueError(f"{kind.name}: vmap over no items")
        return torch.stack([item(index) for index in range(info.batch_size)]), 0

    def same_pattern(in_dims: tuple) -> None:
        # row_ptr and col: for plain numbers torch gives dimensions that mean nothing
        if any(dim is not None for dim in in_dims[-fields : 2 - fields]):
            raise ValueError(
                f"{kind.name}: vmap over layers needs one pattern for all of them, and index tensors that are not "
                "stacked; stack the parameters only (values, bias), or call the layers one after another"
            )

    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(x, values, bias, *where):
            return kind.linear(x, values, bias, Where(*where))

        setup_context = staticmethod(setup)

        @staticmethod
        def backward(ctx, grad):
            return linear_gradient(eager, ctx, grad)

        @staticmethod
        def jvp(ctx, x_t, values_t, bias_t, *_):
            x, values, where = _kept(ctx)
            tangent = _sum_of(
                None if x_t is None else eager.linear(x_t, values, None, *where),
                None if values_t is None else eager.linear(x, values_t, None, *where),
            )
            if bias_t is None:
                return tangent
            return kind.with_bias(x.new_zeros(kind.shape_of(x, Where(*where))) if tangent is None else tangent, bias_t)

        @staticmethod
        def vmap(info, in_dims, x, values, bias, *where):
            same_pattern(in_dims)
            if in_dims[0] is not None and in_dims[1] is None and in_dims[2] is None:
                return eager.linear(x.movedim(in_dims[0], 0), values, bias, *where), 0
            return one_by_one(info, in_dims, (x, values, bias, *where), eager.linear)

    class Transposed(torch.autograd.Function):
        @staticmethod
        def forward(grad, values, *where):
            return kind.transposed(grad, values, Where(*where))

        setup_context = staticmethod(setup)

        @staticmethod
        def backward(ctx, cotangent):
            return transposed_gradient(eager, ctx, cotangent)

        @staticmethod
        def jvp(ctx, grad_t, values_t, *_):
            grad, values, where = _kept(ctx)
            return _sum_of(
                None if grad_t is None else eager.transposed(grad_t, values, *where),
                None if values_t is None else eager.transposed(grad, values_t, *where),
            )

        @staticmethod
        def vmap(info, in_dims, grad, values, *where):
            same_pattern(in_dims)
            if in_dims[0] is not None and in_dims[1] is None:
                return eager.transposed(grad.movedim(in_dims[0], 0), values, *where), 0
            return one_by_one(info, in_dims, (grad, values, *where), eager.transposed)

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(grad, x, *where):
            return kind.gradient(grad, x, Where(*where))

        setup_context = staticmethod(setup)

        @staticmethod
        def backward(ctx, cotangent):
            return gradient_gradient(eager, ctx, cotangent)

        @staticmethod
        def jvp(ctx, grad_t, x_t, *_):
            grad, x, where = _kept(ctx)
            return _sum_of(
                None if grad_t is None else eager.gradient(grad_t, x, *where),
                None if x_t is None else eager.gradient(grad, x_t, *where),
            )

        @staticmethod
        def vmap(info, in_dims, grad, x, *where):
            same_pattern(in_dims)
            grad, x = (a if d is None else a.movedim(d, 0) for a, d in zip((grad, x), in_dims))
            dims = tuple(None if d is None else 0 for d in in_dims)
            found = kind.by_sample(grad, x, dims, Where(*where))
            if found is not None:
                return found, 0
            return one_by_one(info, dims, (grad, x, *where), eager.gradient)

    class EagerLinear(Linear):
        """The same where nothing but autograd looks on: setup_context, which torch.func needs, is slow."""

        @staticmethod
        def forward(ctx, x, values, bias, *where):
            setup(ctx, (x, values, bias, *where), None)
            return kind.linear(x, values, bias, Where(*where))

        setup_context = torch.autograd.Function.setup_context

    operators = _operators(kind)
    for operator, function, gradient in zip(
        operators, (Linear, Transposed, Gradient), (linear_gradient, transposed_gradient, gradient_gradient)
    ):
        operator.register_autograd(partial(gradient, operators), setup_context=setup)
        operator.register_vmap(function.vmap)

    def either(run: Callable, function: Any, operator: Callable, a: Tensor, b: Tensor, *rest: Any) -> Tensor:
        """An operation inside a derivative."""
        if _traced(a, b):
            return operator(a, b, *rest)
        if torch.is_grad_enabled() or _transformed():
            return function.apply(a, b, *rest)
        return run(a, b, *rest[:-fields], Where(*rest[-fields:]))

    eager = Calls(
        partial(either, kind.linear, Linear, operators.linear),
        partial(either, kind.transposed, Transposed, operators.transposed),
        partial(either, kind.gradient, Gradient, operators.gradient),
    )

    def product(x: Tensor, values: Tensor, bias: Tensor | None, where: Any) -> Tensor:
        if _traced(x, values):
            return operators.linear(x, values, bias, *where)
        if _transformed():
            return Linear.apply(x, values, bias, *where)
        wanted = x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)
        if wanted and torch.is_grad_enabled():
            return EagerLinear.apply(x, values, bias, *where)
        return kind.linear(x, values, bias, where)

    return product
