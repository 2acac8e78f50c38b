"""The continuous adjoint of a compiled field: torchdiffeq's, with our own word for a gradient that is not finite."""

from __future__ import annotations

from typing import Any, Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import nonfinite
from ..gradients import all_finite, bad_rows, is_batched, only_torch
from ..solution import GradientError
from .arguments import State

# What torchdiffeq says of a step size that became NaN, and of a state that did; one that is too small is another matter
_OVERFLOWS = ("underflow in dt 0.0", "underflow in dt nan", "non-finite values")


@torch._disable_dynamo  # torch.compiler.disable, which would import the compiler with this package
def watched(run: Callable[[State, Tensor], State], y0: State, t: Tensor, parameters: Sequence[Tensor]) -> State:
    """run(y0, t), torchdiffeq's solve with its adjoint, whose backward pass asks `nonfinite` what to do with a gradient
    that is not finite; torchdiffeq's would solve backwards from it, and fail.

    parameters: the tensors beside y0 and t that the gradient is for.
    """
    parts = y0 if isinstance(y0, tuple) else (y0,)
    inputs = (t, *parts, *parameters)
    if not all(isinstance(tensor, Tensor) for tensor in inputs):
        return run(y0, t)  # which refuses it
    if only_torch():
        raise RuntimeError("the continuous adjoint cannot be transformed by torch.func; use gradient='discrete'")
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in inputs):
        return run(y0, t)

    def lent(t: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        ys = run(parts if isinstance(y0, tuple) else parts[0], t)
        return ys if isinstance(ys, tuple) else (ys,)

    ys = _Watched.apply(lent, len(parts), parameters, *inputs)
    return ys if isinstance(y0, tuple) else ys[0]


class _Watched(torch.autograd.Function):
    """torchdiffeq's graph, inside one node of ours."""

    @staticmethod
    def forward(
        ctx: Any, run: Callable, parts: int, parameters: Sequence[Tensor], *inputs: Tensor
    ) -> tuple[Tensor, ...]:  # fmt: skip
        with torch.enable_grad():  # on stand-ins, which gradients stop at; the parameters are the field's own
            leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip(inputs, ctx.needs_input_grad[3:])]
            lent = leaves[: 1 + parts]
            ctx.inner = run(*lent)
        ctx.targets, ctx.times = (*lent, *parameters), inputs[0].detach()
        return tuple(ys.detach() for ys in ctx.inner)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        if is_batched(*grads):
            raise RuntimeError(
                "the continuous adjoint takes one cotangent at a time (is_grads_batched, vmap); use gradient='discrete'"
            )
        needs = ctx.needs_input_grad[3:]
        wanted = [target for target, need in zip(ctx.targets, needs) if need]
        found = _gradient(ctx, wanted, grads)
        if found is None:
            found = [torch.full_like(target, torch.nan) for target in wanted]
        given = iter(found)
        return (None, None, None, *(next(given) if need else None for need in needs))


def _gradient(ctx: Any, wanted: Sequence[Tensor], grads: Sequence[Tensor]) -> Sequence[Tensor | None] | None:
    """None where it is not finite, and nobody minds."""
    if not all_finite(grads):
        nonfinite.refuse(lambda: _of_what_arrived(ctx.times, grads))
        return None
    pairs = [(ys, grad) for ys, grad in zip(ctx.inner, grads) if ys.requires_grad]
    if not pairs:
        return [None] * len(wanted)
    try:
        found = torch.autograd.grad(
            [ys for ys, _ in pairs], wanted, [grad for _, grad in pairs], allow_unused=True, retain_graph=True
        )  # fmt: skip
    except AssertionError as error:
        if not str(error).startswith(_OVERFLOWS):
            raise
        failed = error
    else:
        if nonfinite.is_watched() and not all_finite(found):
            nonfinite.refuse(_of_the_solve)
        return found
    try:
        nonfinite.refuse(_of_the_solve)
    except GradientError as error:
        raise error from failed
    return None


def _of_what_arrived(times: Tensor, grads: Sequence[Tensor]) -> GradientError:
    batch = grads[0][0].numel() // grads[0].shape[-1]
    for index, time in enumerate(times.tolist()):
        rows = {row for grad in grads for row in bad_rows(grad[index], batch)}
        if rows:
            return GradientError.of_what_arrived(time, sorted(rows), 0)
    raise AssertionError("unreachable")


def _of_the_solve() -> GradientError:
    return GradientError(
        "the gradient of a solve is not finite",
        "It overflowed in the adjoint's solve backwards: look at the parameters; smaller weights, tighter tolerances "
        "or float64 may help, and gradient='discrete' says where it happened.",
        None, None, None, (), 0,
    )  # fmt: skip
