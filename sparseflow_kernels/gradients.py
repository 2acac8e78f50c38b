"""Gradients of evaluations and solves: the one place that knows who makes them.

An engine that can (`Engine.no_gradient` is None) makes the gradient itself, from what it recorded on the way forwards.
Else, and where the gradient is to be differentiated in its turn (create_graph), the reference engine does, by autograd
through the same evaluation or the same accepted steps.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import partial
from typing import Any, Callable, Collection, Sequence

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor, is_legacy_batchedtensor
from torch.autograd import forward_ad

from . import memory, nonfinite
from .devices import factories_on_cpu
from .engines.base import Engine, Gradient, SolveRequest, SolveResult
from .engines.reference import ReferenceEngine
from .records import changed
from .solution import GradientError

SOLVE_INPUTS = ("x", "l", "times", "grid", "noise", "context")
EVALUATE_INPUTS = ("t", "x", "noise", "context")


def evaluate(
    engine: Engine, live: Callable[[], ReferenceEngine], t: Tensor, x: Tensor, noise: Tensor | None,
    context: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(f,) or, on an engine with a divergence, (f, trace), with a graph where one is wanted.

    live: gives the reference engine over the live parameters, whose values `engine` holds.  t: 0-d, of graphs also
    [batch].  x, noise: [batch, dim], contiguous.  context: [batch, context], of fields that have one.
    """
    if not engine.differentiable and torch.is_grad_enabled():
        reference = live()
        inputs = (t, x, noise, context, *reference.tensors())
        if _any_requires_grad(inputs):
            return _Evaluate.apply(engine, reference, *inputs)
    return call(engine, t, x, noise, context)


def solve(engine: Engine, live: Callable[[], ReferenceEngine], request: SolveRequest) -> SolveResult:
    """engine.solve(request), with a graph where one is wanted; `live` as in `evaluate`.

    The gradient is the exact one of the accepted steps, step sizes held fixed. Where it is not finite, its backward
    pass raises GradientError, or hands it on (`nonfinite`). Raises ValueError where a gradient is wanted and every tile
    has steps of its own.
    """
    if not torch.is_grad_enabled():
        return engine.solve(request)
    if engine.differentiable:
        return engine.solve(request) if only_torch() else _solve_watched(engine, request)
    reference = live()
    inputs = (*(getattr(request, name) for name in SOLVE_INPUTS), *reference.tensors())
    if not _any_requires_grad(inputs):
        return engine.solve(request)
    if request.step_control != "shared":
        raise ValueError(
            f"step_control={request.step_control!r} records no common steps to differentiate through; "
            "use step_control='shared', or solve under torch.no_grad()"
        )
    box: list[SolveResult] = []
    xs, ls = _Solve.apply(engine, reference, request, box, *inputs)
    (result,) = box
    result.xs, result.ls = xs, ls
    return result


@factories_on_cpu
def evaluate_backward(
    engine: Engine, reference: ReferenceEngine, t: Tensor, x: Tensor, noise: Tensor | None, grad_f: Tensor,
    grad_trace: Tensor | None, wanted: Collection[str], context: Tensor | None = None,
) -> Gradient:  # fmt: skip
    """Engine.evaluate_backward of the engine, or of the reference where that one cannot."""
    can = engine.no_gradient(wanted) is None and not is_batched(grad_f, grad_trace)
    maker = engine if can else reference
    grad_trace = None if grad_trace is None else grad_trace.contiguous()
    more = {} if context is None else {"context": context}
    return maker.evaluate_backward(t, x, noise, grad_f.contiguous(), grad_trace, wanted, **more)


@factories_on_cpu
def solve_backward(
    engine: Engine, reference: ReferenceEngine, request: SolveRequest, result: SolveResult, grad_xs: Tensor,
    grad_ls: Tensor | None, wanted: Collection[str], graph: bool = False,
) -> Gradient:  # fmt: skip
    """Engine.solve_backward of the engine, which said it can; the reference's if it is to be differentiable (`graph`)
    or holds for many cotangents at once (vmap). What is not finite goes to `nonfinite`."""
    many = is_batched(grad_xs, grad_ls)
    if graph or many:
        gradient = reference.solve_backward(request, result, grad_xs, grad_ls, wanted, graph=graph)
    else:
        grad_xs, grad_ls = grad_xs.contiguous(), None if grad_ls is None else grad_ls.contiguous()
        try:
            gradient = engine.solve_backward(request, result, grad_xs, grad_ls, wanted)
        except (MemoryError, RuntimeError) as error:
            if not memory.is_out_of_memory(error):
                raise
            parts = (request.x,) if request.l is None else (request.x, request.l)
            memory.explain(error, parts, len(request.times), request.tableau.stages_per_step)
    if many or not nonfinite.is_watched():
        return gradient
    if not all_finite([*gradient.tensors, *(getattr(gradient, name) for name in SOLVE_INPUTS)]):
        nonfinite.refuse(lambda: _explained(reference, request, result, grad_xs, grad_ls, gradient.x))
    return gradient


def only_torch() -> bool:
    """Only torch operations may take part in what runs now: inside torch.func's transforms, forward-mode
    differentiation, torch.jit.trace and torch.export."""
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return transformed or torch.jit.is_tracing() or torch.compiler.is_exporting()


class Reaching(torch.autograd.Function):
    """y as it is, with a gradient of zeros for other tensors: y does not depend on them, and torch would say so by
    zeros."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *others: Tensor) -> Tensor:
        ctx.kinds = [(other.shape, other.dtype, other.device) for other in others]
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.kinds)


def is_batched(*tensors: Tensor | None) -> bool:
    """Does one of them stand for many (vmap, or torch.autograd.grad with is_grads_batched)? Then it has no memory that
    an engine could read."""
    return any(t is not None and (is_batchedtensor(t) or is_legacy_batchedtensor(t)) for t in tensors)


def _any_requires_grad(tensors: Sequence[Tensor | None]) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def call(
    engine: Engine, t: Tensor, x: Tensor, noise: Tensor | None, context: Tensor | None = None
) -> tuple[Tensor, ...]:
    """(f,) or (f, trace), as the engine was packed."""
    more = () if context is None else (context,)
    if engine.plan is None:
        return (engine.evaluate(t, x, *more),)
    return tuple(engine.evaluate_with_divergence(t, x, noise, *more))


def wanted(names: Sequence[str], needs: Sequence[bool]) -> frozenset[str]:
    """Names of Gradient's fields, from needs_input_grad of the named inputs and then of the tensors."""
    found = {name for name, need in zip(names, needs) if need}
    return frozenset(found | {"tensors"}) if any(needs[len(names) :]) else frozenset(found)


def _in_order(gradient: Gradient, names: Sequence[str], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """A gradient per input: the named ones, then the tensors (an engine may know none for the last of them)."""
    rest = len(needs) - len(names)
    tensors = (*gradient.tensors, *(None,) * (rest - len(gradient.tensors)))
    found = (*(getattr(gradient, name) for name in names), *tensors)
    return tuple(value if need else None for value, need in zip(found, needs))


class _Evaluate(torch.autograd.Function):
    """One evaluation."""

    @staticmethod
    def forward(ctx, engine: Engine, reference: ReferenceEngine, t, x, noise, context, *tensors):
        ctx.engine, ctx.stamp, ctx.reference = engine, engine.stamp, reference
        ctx.save_for_backward(t, x, noise, context, *tensors)
        return call(engine, t, x, noise, context)

    @staticmethod
    def backward(ctx, grad_f, grad_trace=None):
        t, x, noise, context, *_ = ctx.saved_tensors  # raises where a parameter was changed in place since
        needs = ctx.needs_input_grad[2:]
        names = wanted(EVALUATE_INPUTS, needs)
        if torch.is_grad_enabled():  # create_graph
            more = {} if context is None else {"context": context}
            gradient = ctx.reference.evaluate_backward(t, x, noise, grad_f, grad_trace, names, graph=True, **more)
        else:
            engine = ctx.engine if ctx.engine.stamp == ctx.stamp else ctx.reference
            gradient = evaluate_backward(engine, ctx.reference, t, x, noise, grad_f, grad_trace, names, context)
        return (None, None, *_in_order(gradient, EVALUATE_INPUTS, needs))


class _Solve(torch.autograd.Function):
    """A whole solve."""

    @staticmethod
    def forward(ctx, engine: Engine, reference: ReferenceEngine, request: SolveRequest, box: list, *inputs):
        native = engine.no_gradient(wanted(SOLVE_INPUTS, ctx.needs_input_grad[4:]), request) is None
        named = {n: None if v is None else v.detach() for n, v in zip(SOLVE_INPUTS, inputs)}
        request, stamp = changed(request, record=native, **named), engine.stamp
        result = engine.solve(request)
        x_slopes, l_slopes = result.slopes or (None, None)
        # Tensors are kept by save_for_backward, so that changes are noticed and memory goes when backward is done; the
        # outputs are not kept at all.
        ctx.save_for_backward(result.states, result.derivatives, x_slopes, l_slopes, *inputs)
        result.states = result.derivatives = result.slopes = None
        ctx.engine, ctx.stamp, ctx.reference, ctx.native = engine, stamp, reference, native
        ctx.request = changed(request, **dict.fromkeys(SOLVE_INPUTS))
        ctx.result = copy.copy(result)
        ctx.result.xs = ctx.result.ls = None
        box.append(result)
        return result.xs, result.ls

    @staticmethod
    def backward(ctx, grad_xs, grad_ls):
        # raises where a parameter was changed in place since
        states, derivatives, x_slopes, l_slopes, *inputs = ctx.saved_tensors
        request, result = changed(ctx.request, **dict(zip(SOLVE_INPUTS, inputs))), copy.copy(ctx.result)
        result.states, result.derivatives = states, derivatives
        result.slopes = None if x_slopes is None else (x_slopes, l_slopes)
        needs = ctx.needs_input_grad[4:]
        names = wanted(SOLVE_INPUTS, needs)
        # an engine that holds other values by now (of another call of the same field) cannot go back through this one
        engine = ctx.engine if ctx.native and ctx.engine.stamp == ctx.stamp else ctx.reference
        graph = torch.is_grad_enabled()  # create_graph
        gradient = solve_backward(engine, ctx.reference, request, result, grad_xs, grad_ls, names, graph)
        return (None,) * 4 + _in_order(gradient, SOLVE_INPUTS, needs)


def _solve_watched(engine: ReferenceEngine, request: SolveRequest) -> SolveResult:
    """engine.solve(request) by autograd, which is told to raise where a gradient that leaves it is not finite."""
    named = {n: None if (v := getattr(request, n)) is None else v.view_as(v) for n in SOLVE_INPUTS}
    tensors = [tensor.view_as(tensor) for tensor in engine.tensors()]
    watched = [v for v in (*named.values(), *tensors) if v is not None and v.requires_grad]
    if not watched:
        return engine.solve(request)
    result = engine.over(tensors).solve(replace(request, **named))
    steps = replace(result, xs=None, ls=None)
    arrived: dict[str, Tensor] = {}
    for name, outputs in (("xs", result.xs), ("ls", result.ls)):
        if outputs is not None and outputs.requires_grad:
            outputs.register_hook(partial(arrived.__setitem__, name))

    def check(found: Sequence[Tensor | None]) -> None:
        if not nonfinite.is_watched() or is_batched(*found) or all_finite(found):
            return
        grads = (arrived.get(n) for n in ("xs", "ls"))
        of_x = dict(zip(map(id, watched), found)).get(id(named["x"]))
        nonfinite.refuse(lambda: _explained(engine, request, steps, *grads, of_x))

    torch.autograd.graph.register_multi_grad_hook(watched, check)
    return result


# ------------------------------------------------------------------------------------------- gradients not finite


@torch.no_grad()
def all_finite(found: Sequence[Tensor | None]) -> bool:
    by_device: dict[torch.device, list[Tensor]] = {}
    for value in found:
        if value is not None:
            by_device.setdefault(value.device, []).append(value.reshape(-1))
    for values in by_device.values():
        together = torch.cat(values)
        # a finite sum has finite terms only; one that is not may have overflowed by itself
        if not math.isfinite(together.sum().item()) and not bool(torch.isfinite(together).all()):
            return False
    return True


def bad_rows(values: Tensor, batch: int) -> tuple[int, ...]:
    """Rows of the batch with an entry that is not finite, of [batch, ...]."""
    bad = ~torch.isfinite(values.detach()).reshape(batch, -1).all(1)
    return tuple(bad.nonzero().flatten().tolist())


def _explained(
    reference: ReferenceEngine, request: SolveRequest, result: SolveResult, grad_xs: Tensor | None,
    grad_ls: Tensor | None, grad_x: Tensor | None,
) -> GradientError:  # fmt: skip
    """Where it went wrong: in what arrived, in a state of the solve, or in a step of the backward pass. Slow, and only
    called when something did."""
    if grad_xs is None:
        grad_xs = request.x.new_zeros(len(request.times), *request.x.shape)
    batch, steps = request.x.shape[0], result.steps.tolist()

    def error(what: str, advice: str, step: int | None, rows: tuple[int, ...]) -> GradientError:
        t, dt = (None, None) if step is None else (request.sign * steps[step][0], steps[step][1])
        return GradientError(what, advice, step, t, dt, rows, len(steps))

    for index, time in enumerate(request.times.tolist()):
        arrived = grad_xs[index] if grad_ls is None else torch.cat((grad_xs[index], grad_ls[index][:, None]), 1)
        if rows := bad_rows(arrived, batch):
            return GradientError.of_what_arrived(request.sign * time, rows, len(steps))

    detached = {n: None if (v := getattr(request, n)) is None else v.detach() for n in SOLVE_INPUTS}
    request = replace(request, **detached)
    states = result.states
    if states is None:
        with torch.no_grad():
            states = reference.solve(replace(request, replay=result.steps, record=True)).states
    for end, state in enumerate(states):
        if rows := bad_rows(state, batch):
            what = "the state that the solve had come to is not finite"
            advice = "Fixed grids are not checked on the way forwards: look at the parameters, or use a smaller step."
            return error(what, advice, max(end - 1, 0) if steps else None, rows)

    def rows_at(step: int) -> tuple[int, ...]:
        """Rows whose cotangent at the start of this step is not finite."""
        start = torch.tensor([steps[step][0]], dtype=torch.float64)
        later = request.times > start
        zeros = torch.zeros_like(grad_xs[:1])
        part = replace(
            request, x=states[step], times=torch.cat((start, request.times[later])),
            grid=None if request.grid is None else request.grid[step:],
        )  # fmt: skip
        found = reference.solve_backward(
            part, replace(result, steps=result.steps[step:]), torch.cat((zeros, grad_xs[later])),
            None if grad_ls is None else torch.cat((zeros[..., 0], grad_ls[later])), ("x",),
        )  # fmt: skip
        return () if found.x is None else bad_rows(found.x, batch)

    advice = (
        "The derivatives of the field overflow there: look at the rows named and at the parameters; smaller weights, "
        "tighter tolerances or float64 may help."
    )
    low, high = 0, len(steps)  # what is not finite stays so further back: bisect for the first step met backwards
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if rows_at(middle) else (low, middle)
    if low > 0:
        return error("the gradient of a solve is not finite", advice, low - 1, rows_at(low - 1))
    rows = () if grad_x is None else bad_rows(grad_x, batch)
    return error("the gradient of a solve is not finite", advice, None, rows)
