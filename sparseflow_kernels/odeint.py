"""The solver calls, torchdiffeq's by signature, default, result and error; and `solve`, which also says how it went.

Who runs a solve:
- a compiled field (or one with its divergence) and an explicit Runge-Kutta method: the field's engine, the whole solve
  at once;
- anything that needs Python at every step or a method we have no tableau for (events, callbacks, a norm of one's own,
  Adams, SciPy), and every plain callable: torchdiffeq;
- `tsit5`, which torchdiffeq lacks, on a plain callable: the torch solver in `numerics`.
`Solution.stats` tells which, and why.

Where we differ from torchdiffeq 0.2.5 on purpose: `step_t` and `jump_t` given as lists hold for a decreasing `t` too
(there they are silently missed); an empty batch comes back empty; step sizes carry no gradient (there the first one
does); failed solves say where.
"""

from __future__ import annotations

import math
import numbers
import warnings
from dataclasses import dataclass, fields, replace
from typing import Any, Callable

import torch
import torchdiffeq
from torch import Tensor

from .compiled_field import CompiledField, DivergenceField
from .engines.base import Engine, SolveRequest, SolveResult
from .engines.reference import ReferenceEngine, own_precision
from .field import VectorField
from .numerics.adaptive import offending_rows, rms_norm, solve_adaptive
from .numerics.step_control import StepOptions, StopPoints
from .numerics.tableaus import ADAPTIVE, METHODS, Tableau
from .solution import Solution, SolverError, Stats

__all__ = ["odeint", "odeint_adjoint", "odeint_dense", "odeint_event", "solve"]

State = Tensor | tuple[Tensor, ...]

_CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")
_OTHER_METHODS = ("explicit_adams", "implicit_adams", "fixed_adams", "scipy_solver")  # torchdiffeq's, no tableaus
_STEP_OPTIONS = frozenset(option.name for option in fields(StepOptions))
_GRID_OPTIONS = frozenset(("step_size", "grid_constructor", "interp", "perturb"))


# ------------------------------------------------------------------------------------------------------ public calls


def odeint(
    func: Callable,
    y0: State,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict | None = None,
    event_fn: Callable | None = None,
) -> Any:
    """Solve dy/dt = func(t, y), y(t[0]) = y0, and return y at every time in `t`.

    func: a compiled field, or any callable (0-d t in y's real dtype, y) -> dy/dt.  y0: a tensor of any shape, or a
    tuple of tensors.  t: floating point [n], strictly increasing or decreasing.
    rtol, atol: numbers, or (tuple state) a sequence with one per tensor; the step is accepted when the root mean square
    of error / (atol + rtol max(|y_before|, |y_after|)), over the whole batch, is at most 1 (tuple: in every tensor).
    method: "dopri5" (None), "dopri8", "tsit5", "bosh3", "fehlberg2", "adaptive_heun"; "euler", "midpoint", "heun2",
    "heun3", "rk4" (3/8 rule); torchdiffeq's "explicit_adams", "implicit_adams", "scipy_solver".
    options: `StepOptions` by name, plus norm and dtype (adaptive); step_size, grid_constructor, interp, perturb
    (fixed).
    event_fn: (t, y) -> tensor; ends the solve where it first changes sign.

    Returns [n, *y0.shape], or a tuple of such; with an event (event_t, the same with n = 2). Differentiable in y0, t
    and the parameters of func: the exact gradient of the accepted steps, step sizes held fixed.

    Raises ValueError for an unknown method, TypeError for a `t` that is not floating point, AssertionError for other
    bad input, and SolverError (an AssertionError) when a solve of ours cannot go on.
    """
    if event_fn is not None:
        _prepare(func, y0)
        _refuse_tsit5(method, "events")
        return torchdiffeq.odeint(
            func, y0, t, rtol=rtol, atol=atol, method=method, options=options, event_fn=event_fn
        )
    call = _plan_call(func, y0, t, rtol, atol, method, options)
    if isinstance(call, str):
        _prepare(func, y0)
        return torchdiffeq.odeint(func, y0, t, rtol=rtol, atol=atol, method=method, options=options)
    return call.run().ys


def solve(
    func: Callable,
    y0: State,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict | None = None,
    event_fn: Callable | None = None,
    step_control: str = "shared",
) -> Solution:
    """`odeint`, returning a Solution: the same outputs as `.ys`, and `.stats`.

    step_control: "shared", one step size for the batch as in torchdiffeq, or "per_tile": each tile of samples chooses
    its own (compiled fields on an engine that can; no gradient).
    """
    if step_control not in ("shared", "per_tile"):
        raise ValueError(f"step_control must be 'shared' or 'per_tile', not {step_control!r}")
    if event_fn is not None:
        call: _Call | str = "events need Python at every step"
        _refuse_tsit5(method, "events")
    else:
        call = _plan_call(func, y0, t, rtol, atol, method, options, step_control)
    if not isinstance(call, str):
        return call.run()
    if step_control != "shared":
        raise ValueError(
            f"step_control={step_control!r} is for solves that an engine runs, and here: {call}"
        )
    _prepare(func, y0)
    return _solve_by_torchdiffeq(func, y0, t, rtol, atol, method, options, event_fn, reason=call)


def odeint_adjoint(
    func: Callable,
    y0: State,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict | None = None,
    event_fn: Callable | None = None,
    adjoint_rtol: Any = None,
    adjoint_atol: Any = None,
    adjoint_method: str | None = None,
    adjoint_options: dict | None = None,
    adjoint_params: Any = None,
) -> Any:
    """`odeint` with torchdiffeq's continuous adjoint for the gradient.

    A compiled field without any adjoint_* argument is solved by its engine, and its gradient is `odeint`'s: the exact
    one of the steps taken, in place of a second solve backwards. With an adjoint_* argument, or for any other callable,
    this is torchdiffeq.odeint_adjoint. Raises ValueError as that does, and for method "tsit5" on a plain callable.
    """
    adjoint = {
        "adjoint_rtol": adjoint_rtol,
        "adjoint_atol": adjoint_atol,
        "adjoint_method": adjoint_method,
        "adjoint_options": adjoint_options,
        "adjoint_params": adjoint_params,
    }
    if isinstance(func, (CompiledField, DivergenceField)) and event_fn is None:
        if all(value is None for value in adjoint.values()):
            return odeint(func, y0, t, rtol=rtol, atol=atol, method=method, options=options)
    _refuse_tsit5(method, "the continuous adjoint")
    _refuse_tsit5(adjoint_method, "the continuous adjoint")
    _prepare(func, y0)
    return torchdiffeq.odeint_adjoint(
        func, y0, t, rtol=rtol, atol=atol, method=method, options=options, event_fn=event_fn, **adjoint
    )


def odeint_event(
    func: Callable,
    y0: State,
    t0: Tensor,
    *,
    event_fn: Callable,
    reverse_time: bool = False,
    odeint_interface: Callable = odeint,
    **kwargs: Any,
) -> tuple[Tensor, State]:
    """Solve from t0 until event_fn(t, y) changes sign: (event_t, the state at t0 and at the event), with the gradient
    of the event time. Runs in torchdiffeq."""
    return torchdiffeq.odeint_event(
        func, y0, t0, event_fn=event_fn, reverse_time=reverse_time, odeint_interface=odeint_interface, **kwargs
    )


def odeint_dense(
    func: Callable,
    y0: Tensor,
    t0: Any,
    t1: Any,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict | None = None,
) -> Callable[[Tensor], Tensor]:
    """Solve from t0 to t1 by dopri5 and return the solution as a function of t. Runs in torchdiffeq."""
    return torchdiffeq.odeint_dense(func, y0, t0, t1, rtol=rtol, atol=atol, method=method, options=options)


# ------------------------------------------------------------------------------------------------------- normalising


def _refuse_tsit5(method: str | None, what: str) -> None:
    if method == "tsit5":
        raise ValueError(f"method 'tsit5' does not support {what} here; use 'dopri5', which is of the same order")


def _prepare(func: Callable, y0: State) -> None:
    """A compiled field with Hutchinson noise draws it once per solve, also when torchdiffeq runs the solve."""
    if isinstance(func, DivergenceField) and isinstance(y0, tuple) and y0 and isinstance(y0[0], Tensor):
        func.begin_solve(y0[0])


def _plan_call(
    func: Callable, y0: State, t: Tensor, rtol: Any, atol: Any, method: str | None, options: dict | None,
    step_control: str = "shared",
) -> "_Call | str":  # fmt: skip
    """The call an engine (or numerics) will run, or the reason why torchdiffeq has to."""
    compiled = isinstance(func, (CompiledField, DivergenceField))
    if not callable(func):
        remedy = "; compile(field) it first" if isinstance(func, VectorField) else ""
        raise TypeError(f"func must be a compiled field or a callable f(t, y), not {type(func).__name__}{remedy}")
    if not isinstance(options, (dict, type(None))):
        raise TypeError(f"options must be a dict, not {type(options).__name__}")
    method = "dopri5" if method is None else method
    if not compiled and method != "tsit5":
        if method not in METHODS and method not in _OTHER_METHODS:
            _raise_unknown_method(method)
        return "func is not a compiled field"
    if not isinstance(y0, (Tensor, tuple)):
        raise AssertionError("y0 must be either a torch.Tensor or a tuple")
    if method in _OTHER_METHODS:
        return f"method {method!r} has no Runge-Kutta tableau"
    if method not in METHODS:
        _raise_unknown_method(method)
    options = dict(options or {})
    reason = "func is not a compiled field"
    if compiled:
        call = _EngineCall.make(func, y0, t, rtol, atol, method, options, step_control)
        if isinstance(call, _EngineCall) or method != "tsit5":
            return call
        reason = call
    if step_control != "shared":
        raise ValueError(f"step_control={step_control!r} is for solves that an engine runs, and here: {reason}")
    return _TorchCall.make(func, y0, t, rtol, atol, options, reason)


def _raise_unknown_method(method: Any) -> None:
    names = '", "'.join((*METHODS, *_OTHER_METHODS))
    raise ValueError(f'Invalid method "{method}". Must be one of {{"{names}"}}.')


def _upward(t: Tensor, device: torch.device) -> tuple[Tensor, int]:
    """(upward times, sign) after torchdiffeq's checks of `t`; differentiable."""
    if not isinstance(t, Tensor):
        raise AssertionError(f"t must be a torch.Tensor, not {type(t).__name__}")
    if not t.is_floating_point():
        raise TypeError(f"`t` must be a floating point Tensor but is a {t.type()}")
    if t.dim() != 1:
        raise AssertionError(f"t must be one dimensional, not of shape {list(t.shape)}")
    if len(t) == 0:
        raise IndexError("t is empty; it must hold the initial time, and the times to solve for")
    if t.device != device:
        warnings.warn("t is not on the same device as y0. Coercing to y0.device.", stacklevel=5)
    values = t.detach().tolist()  # plain floats: a dozen tensor operations would cost as much as a small solve
    sign = -1 if len(values) > 1 and values[0] > values[1] else 1
    if not all(sign * before < sign * after for before, after in zip(values, values[1:])):
        raise AssertionError("t must be strictly increasing or decreasing")
    if not all(map(math.isfinite, values)):
        raise AssertionError("t must be finite")
    times = (t if sign > 0 else -t).to("cpu", torch.float64)
    return times, sign


def _check_tolerance(name: str, tolerance: Any, parts: int | None) -> None:
    """parts: the number of tensors of a tuple state, else None."""
    if tolerance is None or isinstance(tolerance, (str, bytes)):
        raise TypeError(f"{name} must be a number, a tensor or a sequence with one per tensor of y0, not {tolerance!r}")
    if isinstance(tolerance, Tensor) and tolerance.requires_grad:
        raise AssertionError(f"{name} cannot require gradient")
    if parts is not None and _is_sequence(tolerance) and len(tuple(tolerance)) != parts:
        raise AssertionError(f"If using tupled {name} it must have the same length as the tuple y0")


def _is_sequence(value: Any) -> bool:
    try:
        iter(value)
    except TypeError:  # a number, or an array or tensor without axes
        return False
    return True


def _number(value: Any) -> float | None:
    """A float out of a number or a one-element tensor; None for anything else."""
    if isinstance(value, Tensor):
        return value.item() if value.dim() == 0 else None
    return float(value) if isinstance(value, numbers.Real) else None


def _numbers(tolerance: Any, parts: int) -> tuple[float, ...] | None:
    """One float per tensor of the state, or None if the tolerance is not made of plain numbers."""
    if _is_sequence(tolerance):
        values = tuple(_number(value) for value in tolerance) if parts > 1 else (None,)
    else:
        values = (_number(tolerance),) * parts
    return None if any(value is None for value in values) else values


def _step_options(options: dict, sign: int) -> StepOptions:
    """StepOptions in upward time, from the user's dict (names outside it ignored)."""
    given: dict[str, Any] = {}
    for name, value in options.items():
        if name not in _STEP_OPTIONS or (value is None and name in ("first_step", "step_t", "jump_t")):
            continue
        if name in ("step_t", "jump_t"):
            flat = torch.as_tensor(value, dtype=torch.float64).detach().reshape(-1).tolist()
            given[name] = tuple(sign * point for point in flat)
        elif name == "max_num_steps":
            given[name] = int(value)
        else:
            given[name] = float(value)
    return StepOptions(**given)


def _grid(func: Callable, y0: State, t: Tensor, times: Tensor, sign: int, options: dict) -> Tensor:
    """float64 CPU grid in upward time, as torchdiffeq would step on it; differentiable in t."""
    step_size, constructor = options.get("step_size"), options.get("grid_constructor")
    if step_size is not None and constructor is not None:
        raise ValueError("step_size and grid_constructor are mutually exclusive arguments.")
    if constructor is not None:
        grid = (sign * constructor(func, y0, t)).to("cpu", torch.float64)
    elif step_size is not None:
        start, end = times[0], times[-1]
        size = float(step_size)
        if not size > 0.0:
            raise ValueError(f"options['step_size'] must be positive, not {size}")
        # the caller's dtype decides how many steps there are, as it does in torchdiffeq
        span = t.detach()[-1] * sign - t.detach()[0] * sign
        count = int(torch.ceil(span / size + 1).item())
        inner = torch.arange(0, max(count - 1, 0), dtype=torch.float64) * size + start
        grid = torch.cat((inner, end[None])) if len(times) > 1 else times
    else:
        return times
    if grid.numel() == 0 or bool(grid[0] != times[0]) or bool(grid[-1] != times[-1]):
        raise AssertionError("the grid of a fixed-grid method must start at t[0] and end at t[-1]")
    return grid


# -------------------------------------------------------------------------------------------------- an engine's solve


class _Call:
    def run(self) -> Solution:
        raise NotImplementedError


@dataclass
class _EngineCall(_Call):
    """A solve of a compiled field by its engine: x [..., dim], or (x, l [...] or [..., 1])."""

    func: CompiledField | DivergenceField
    y0: State
    t: Tensor
    times: Tensor
    sign: int
    rtol: tuple[float, ...]
    atol: tuple[float, ...]
    method: str
    options: dict
    step_control: str

    @staticmethod
    def make(
        func: CompiledField | DivergenceField, y0: State, t: Tensor, rtol: Any, atol: Any, method: str,
        options: dict, step_control: str,
    ) -> "_EngineCall | str":  # fmt: skip
        parts = (y0,) if isinstance(y0, Tensor) else y0
        if not parts:
            raise ValueError("y0 must be a tensor or a tuple with at least one tensor")
        if not all(isinstance(part, Tensor) for part in parts):
            raise TypeError(f"y0 must hold tensors only, not {', '.join(type(part).__name__ for part in parts)}")
        adaptive = method in ADAPTIVE
        # nn.Module answers for a missing attribute slowly, so look where a callback would be
        places = (func.__dict__, func._modules, type(func).__dict__)
        if any(place.get(name) is not None for name in _CALLBACKS for place in places):
            return "func has callbacks, which need Python at every step"
        if func._forward_hooks or func._forward_pre_hooks:
            return "func has forward hooks, which need Python at every evaluation"
        if isinstance(func, DivergenceField):
            field = func.field
            if not isinstance(field, CompiledField):
                return "the field under the divergence is not compiled"
            if not isinstance(y0, tuple) or len(parts) != 2:
                return "the state of a field with divergence must be a tuple (x, l)"
        else:
            field = func
            if isinstance(y0, tuple):
                return "the state is a tuple, and a compiled field runs on one tensor"
        x = parts[0]
        if x.dim() < 1 or x.shape[-1] != field.dim:
            return f"the state's last axis must be {field.dim}, its shape is {list(x.shape)}"
        if len(parts) == 2 and parts[1].shape not in (x.shape[:-1], x.shape[:-1] + (1,)):
            return f"l must be of shape {list(x.shape[:-1])} or with a last axis of 1, not {list(parts[1].shape)}"
        dtype, device = field.dtype, field.device
        if len({part.dtype for part in parts}) > 1:
            raise TypeError(f"y0: x is {x.dtype} and l is {parts[1].dtype}; the field wants {dtype} for both")
        for part in parts:
            if part.dtype != dtype or part.device != device:
                return (
                    f"y0 is {part.dtype} on {part.device}, the compiled field {dtype} on {device}; "
                    "convert one to the other to run it natively"
                )
        _check_tolerance("rtol", rtol, len(parts) if len(parts) > 1 else None)
        _check_tolerance("atol", atol, len(parts) if len(parts) > 1 else None)
        tolerances = _numbers(rtol, len(parts)), _numbers(atol, len(parts))
        if None in tolerances:
            return "rtol and atol differ from element to element"
        known = _STEP_OPTIONS | {"dtype"} if adaptive else _GRID_OPTIONS | {"norm"}
        if "norm" in options and adaptive:
            return "options['norm'] is Python at every step"
        unknown = [name for name in options if name not in known]
        if unknown:
            return f"unknown options {unknown}"
        if options.get("dtype", torch.float64) != torch.float64:
            return f"options['dtype'] is {options['dtype']}; engines keep time in float64"
        if options.get("interp", "linear") != "linear":
            return f"options['interp'] is {options['interp']!r}; engines interpolate linearly on a fixed grid"
        times, sign = _upward(t, x.device)
        return _EngineCall(func, y0, t, times, sign, *tolerances, method, options, step_control)

    def run(self) -> Solution:
        parts = (self.y0,) if isinstance(self.y0, Tensor) else self.y0
        x0, l0 = parts[0], (parts[1] if len(parts) > 1 else None)
        if x0.numel() == 0 or (l0 is not None and l0.numel() == 0):
            empty = torch.zeros(0, 2, dtype=torch.float64)
            ys = tuple(part[None].expand(len(self.t), *part.shape).clone() for part in parts)
            return self._solution(ys, 0, 0, 0, empty)

        if isinstance(self.func, DivergenceField):
            field, kind, noise = self.func.field, self.func.kind, self.func.begin_solve(x0)
        else:
            field, kind, noise = self.func, None, None
        if torch._C._functorch.is_batchedtensor(x0):
            raise ValueError("a solve cannot be vmapped: it takes whole batches, so give it y0 [batch, dim]")
        engine = field.runner(kind)
        tableau = METHODS[self.method]
        adaptive = isinstance(tableau, Tableau)
        options = _step_options(self.options, self.sign) if adaptive else StepOptions()
        if options.step_t or options.jump_t:
            StopPoints(self.times[0].item(), options)  # refuses repeated points, whatever the engine does
        request = SolveRequest(
            x=x0.reshape(-1, field.dim).contiguous(),
            l=None if l0 is None else l0.reshape(-1).contiguous(),
            times=self.times,
            sign=self.sign,
            tableau=tableau,
            rtol=self.rtol,
            atol=self.atol,
            options=options,
            grid=None if adaptive else _grid(self.func, self.y0, self.t, self.times, self.sign, self.options),
            perturb=bool(self.options.get("perturb", False)),
            noise=None if noise is None else noise.reshape(-1, field.dim).contiguous(),
            step_control=self.step_control,
        )
        result = _run_engine(engine, request, field, kind)
        flat = (result.xs,) if l0 is None else (result.xs, result.ls)
        ys = tuple(outputs.reshape(len(self.t), *part.shape) for outputs, part in zip(flat, parts))
        if result.status != "ok":
            detached = tuple(part.detach() for part in ys)
            raise SolverError(
                result.status, self.sign * result.t, result.dt, result.rows,
                detached if isinstance(self.y0, tuple) else detached[0], request.options.max_num_steps,
            )  # fmt: skip
        return self._solution(ys, result.nfe, result.accepted, result.rejected, result.steps, engine.name)

    def _solution(
        self, ys: tuple[Tensor, ...], nfe: int, accepted: int, rejected: int, steps: Tensor, engine: str | None = None
    ) -> Solution:
        if engine is None:
            field = self.func.field if isinstance(self.func, DivergenceField) else self.func
            engine = field.engine_name
        if self.sign < 0:
            steps = steps * torch.tensor([-1.0, 1.0], dtype=torch.float64)
        stats = Stats(nfe, accepted, rejected, steps, engine, self.method, self.step_control)
        return Solution(ys if isinstance(self.y0, tuple) else ys[0], stats)


def _run_engine(engine: Engine, request: SolveRequest, field: CompiledField, kind: str | None) -> SolveResult:
    """engine.solve, with a gradient if anything wants one."""
    if engine.differentiable or not torch.is_grad_enabled():
        return engine.solve(request)
    parameters = tuple(p for p in field.parameters() if p.requires_grad)
    inputs = (request.x, request.l, request.times, request.grid, *parameters)
    if not any(value is not None and value.requires_grad for value in inputs):
        return engine.solve(request)
    if request.step_control != "shared":
        raise ValueError(
            f"step_control={request.step_control!r} records no common steps to differentiate through; "
            "use step_control='shared', or solve under torch.no_grad()"
        )
    box: list[SolveResult] = []
    outputs = _EngineSolve.apply(engine, request, field, kind, box, *inputs)
    result = box[0]
    result.xs, result.ls = outputs
    return result


class _EngineSolve(torch.autograd.Function):
    """An engine's solve forwards; backwards the same accepted steps once more on the reference engine, differentiably
    (also a second time, under create_graph)."""

    @staticmethod
    def forward(ctx, engine, request, field, kind, box, x, l, times, grid, *parameters):  # noqa: E741
        detached = _with(request, *(None if v is None else v.detach() for v in (x, l, times, grid)))
        result = engine.solve(detached)
        box.append(result)
        ctx.request, ctx.field, ctx.kind, ctx.steps = detached, field, kind, result.steps
        ctx.given = tuple(value is not None for value in (x, l, times, grid))
        ctx.save_for_backward(*(v for v in (x, l, times, grid) if v is not None), *parameters)
        return result.xs, result.ls

    @staticmethod
    def backward(ctx, grad_xs, grad_ls):
        saved = list(ctx.saved_tensors)  # raises if a parameter was changed in place since
        inputs = [saved.pop(0) if given else None for given in ctx.given]
        parameters = saved
        wanted = ctx.needs_input_grad[5:]
        again_differentiable = torch.is_grad_enabled()
        with torch.enable_grad(), own_precision(inputs[0]):
            leaves = inputs if again_differentiable else [
                None if value is None else value.detach().requires_grad_(want)
                for value, want in zip(inputs, wanted)
            ]
            plan = None if ctx.kind is None else ctx.field.divergence_plan(ctx.kind)
            reference = ReferenceEngine(ctx.field.vector_field, plan)
            again = reference.solve(replace(_with(ctx.request, *leaves), replay=ctx.steps))
            pairs = [(out, grad) for out, grad in zip((again.xs, again.ls), (grad_xs, grad_ls)) if out is not None]
            targets = [value for value, want in zip((*leaves, *parameters), wanted) if want]
            grads = iter(
                torch.autograd.grad(
                    [out for out, _ in pairs], targets, [grad for _, grad in pairs],
                    create_graph=again_differentiable, allow_unused=True,
                )
            )  # fmt: skip
        return (None,) * 5 + tuple(next(grads) if want else None for want in wanted)


def _with(request: SolveRequest, *tensors: Tensor | None) -> SolveRequest:
    """The request with its differentiable inputs replaced: x, l, times, grid."""
    return replace(request, **dict(zip(("x", "l", "times", "grid"), tensors, strict=True)))


# ----------------------------------------------------------------------------------------------- numerics' own solve


@dataclass
class _TorchCall(_Call):
    """tsit5 on anything an engine does not run, in torch."""

    func: Callable
    y0: State
    t: Tensor
    times: Tensor
    sign: int
    rtol: Any
    atol: Any
    options: dict
    reason: str

    @staticmethod
    def make(
        func: Callable, y0: State, t: Tensor, rtol: Any, atol: Any, options: dict, reason: str
    ) -> "_TorchCall":  # fmt: skip
        parts = (y0,) if isinstance(y0, Tensor) else y0
        if not parts or not all(isinstance(part, Tensor) for part in parts):
            raise ValueError("y0 must be a tensor or a tuple with at least one tensor")
        if not (parts[0].is_floating_point() or parts[0].is_complex()):
            raise TypeError(f"y0 must be floating point or complex, not {parts[0].dtype}")
        if options.pop("dtype", torch.float64) != torch.float64:
            raise ValueError("options['dtype']: tsit5 keeps time in float64 here; use 'dopri5' for another time dtype")
        callbacks = {name for name in _CALLBACKS if getattr(func, name, None) is not None}
        if callbacks:
            warnings.warn(f"Solver 'tsit5' does not support callbacks {callbacks}", stacklevel=4)
        unused = {name: value for name, value in options.items() if name not in _STEP_OPTIONS | {"norm"}}
        if unused:
            warnings.warn(f"tsit5: Unexpected arguments {unused}", stacklevel=4)
        count = None if isinstance(y0, Tensor) else len(parts)
        _check_tolerance("rtol", rtol, count)
        _check_tolerance("atol", atol, count)
        times, sign = _upward(t, parts[0].device)
        return _TorchCall(func, y0, t, times, sign, rtol, atol, options, reason)

    def run(self) -> Solution:
        _prepare(self.func, self.y0)
        sign, is_tuple = self.sign, isinstance(self.y0, tuple)
        shapes = [part.shape for part in self.y0] if is_tuple else []

        def split(flat: Tensor, *lead: int) -> tuple[Tensor, ...]:
            sizes = [shape.numel() for shape in shapes]
            return tuple(part.reshape(*lead, *shape) for part, shape in zip(flat.split(sizes, -1), shapes))

        def f(t: Tensor, y: Tensor) -> Tensor:
            dy = self.func(t if sign > 0 else -t, split(y) if is_tuple else y)
            if is_tuple:
                dy = torch.cat([part.reshape(-1) for part in dy])
            return dy if sign > 0 else -dy

        def tolerance(value: Any) -> Any:
            if is_tuple and _is_sequence(value):
                rows = (torch.as_tensor(v, dtype=torch.float64).expand(s.numel()) for v, s in zip(value, shapes))
                value = torch.cat(tuple(rows))
            return torch.as_tensor(value, dtype=y0.real.dtype, device=y0.device)

        y0 = torch.cat([part.reshape(-1) for part in self.y0]) if is_tuple else self.y0
        user_norm = self.options.get("norm")

        def norm(y: Tensor) -> Any:
            if user_norm is not None:
                return user_norm(split(y) if is_tuple else y)
            return torch.stack([rms_norm(part) for part in split(y)]).amax() if is_tuple else rms_norm(y)

        options = _step_options(self.options, sign)
        result = solve_adaptive(
            f, y0, self.times, ADAPTIVE["tsit5"], tolerance(self.rtol), tolerance(self.atol), norm, options
        )
        ys = split(result.ys, len(self.t)) if is_tuple else result.ys
        if result.status != "ok":
            detached = tuple(part.detach() for part in ys) if is_tuple else ys.detach()
            rows = () if is_tuple else offending_rows(result.suspects)
            raise SolverError(result.status, sign * result.t, result.dt, rows, detached, options.max_num_steps)
        steps = result.steps * torch.tensor([float(sign), 1.0], dtype=torch.float64)
        stats = Stats(
            result.nfe, result.accepted, result.rejected, steps, "numerics", "tsit5", reason=self.reason
        )  # fmt: skip
        return Solution(ys, stats)


# ------------------------------------------------------------------------------------------------ torchdiffeq's solve


class _Observed:
    """func as torchdiffeq sees it, counting evaluations and noting accepted steps on the way."""

    def __init__(self, func: Callable, with_callbacks: bool) -> None:
        self._func = func
        self.nfe = 0
        self.accepted: list[tuple[float, float]] = []
        self.rejected = 0
        if with_callbacks:
            self.callback_accept_step = self._accept
            self.callback_reject_step = self._reject

    def __call__(self, t: Tensor, y: Any) -> Any:
        self.nfe += 1
        return self._func(t, y)

    def __getattr__(self, name: str) -> Any:  # callbacks of func itself
        if name in _CALLBACKS:
            return getattr(self._func, name)
        raise AttributeError(name)

    def _accept(self, t0: Tensor, y0: Any, dt: Tensor) -> None:
        self.accepted.append((float(t0.detach()), float(dt.detach())))
        if (callback := getattr(self._func, "callback_accept_step", None)) is not None:
            callback(t0, y0, dt)

    def _reject(self, t0: Tensor, y0: Any, dt: Tensor) -> None:
        self.rejected += 1
        if (callback := getattr(self._func, "callback_reject_step", None)) is not None:
            callback(t0, y0, dt)


def _solve_by_torchdiffeq(
    func: Callable, y0: State, t: Tensor, rtol: Any, atol: Any, method: str | None, options: dict | None,
    event_fn: Callable | None, reason: str,
) -> Solution:  # fmt: skip
    method = "dopri5" if method is None else method
    tells_steps = method in ADAPTIVE
    observed = _Observed(func, tells_steps)
    ys = torchdiffeq.odeint(
        observed, y0, t, rtol=rtol, atol=atol, method=method, options=options, event_fn=event_fn
    )
    event_t = None
    if event_fn is not None:
        event_t, ys = ys
    steps = torch.tensor(observed.accepted, dtype=torch.float64).reshape(-1, 2) if tells_steps else None
    stats = Stats(
        observed.nfe,
        len(observed.accepted) if tells_steps else None,
        observed.rejected if tells_steps else None,
        steps,
        "torchdiffeq",
        method,
        reason=reason,
    )
    return Solution(ys, stats, event_t)
