"""The solver calls, torchdiffeq's by signature, default, result and error; and `solve`, which also says how it went.

Who runs a solve:
- a compiled field (or one with its divergence) and an explicit Runge-Kutta method: the field's engine, the whole solve
  at once;
- anything that needs Python at every step or a method we have no tableau for (events, callbacks, a norm of one's own,
  Adams, SciPy), and every plain callable: torchdiffeq;
- `tsit5`, which torchdiffeq lacks, on a plain callable, and dopri8 called by `solve`: the torch solver in `numerics`.
`Solution.stats` tells which, and why.

Where we differ from torchdiffeq 0.2.5 on purpose: `step_t` and `jump_t` given as lists hold for a decreasing `t` too
(there they are silently missed); an empty batch comes back empty; step sizes carry no gradient (there the first one
does); failed solves say where.
"""

from __future__ import annotations

from typing import Any, Callable, Iterator

import torch
import torchdiffeq
from torch import Tensor, nn

from .compiled_field import CompiledField
from .devices import ordinary
from .divergence_field import DivergenceField
from .engines.reference import is_autocast_enabled
from .field import VectorField
from .hooks import ADJOINT_CALLBACKS
from .numerics.tableaus import METHODS
from .solution import Solution
from .solving.adjoint_call import watched
from .solving.arguments import State, check_not_negative, checked_options
from .solving.delegation import begin, handed_over, solve_by_torchdiffeq, with_own_numbers
from .solving.engine_call import EngineCall
from .solving.torch_call import TorchCall, callbacks_of

__all__ = ["odeint", "odeint_adjoint", "odeint_dense", "odeint_event", "solve"]

# Their steps are of a much higher order than the quartic that outputs are read from, and as long as that order allows:
# in the worst case the outputs have no correct digit. `solve` ends their steps at the outputs.
_COARSE_OUTPUTS = ("dopri8",)

_GRAPHLESS = ("scipy_solver",)  # torchdiffeq's solve by it cannot be differentiated, its adjoint can
_OTHER_METHODS = ("explicit_adams", "implicit_adams", "fixed_adams", "scipy_solver")  # torchdiffeq's, no tableaus


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
    (fixed). Those that a method does not know are ignored, with a warning.
    event_fn: (t, y) -> tensor; ends the solve where it first changes sign.

    Returns [n, *y0.shape], or a tuple of such; with an event (event_t, the same with n = 2). Differentiable in y0, t
    and the parameters of func: the exact gradient of the accepted steps, step sizes held fixed. Where it is not finite
    (compiled fields), its backward pass does as `set_nonfinite_gradients` says. Under torch.autocast a compiled field's
    y0 may have any floating point dtype: it is converted to the field's, which the result has.

    Raises ValueError for an unknown method, tolerances and options that no solve can use, TypeError for a `t` that is
    not floating point, AssertionError for other bad input, and SolverError (an AssertionError) when a solve of ours
    cannot go on.
    """
    options, y0 = _checked(rtol, atol, method, options), _in_own_dtype(func, y0)
    if event_fn is not None:
        begin(func, y0)
        _refuse_tsit5(method, "events")
        return torchdiffeq.odeint(
            func, y0, t, rtol=rtol, atol=atol, method=method, options=handed_over(options, None), event_fn=event_fn
        )
    call = _plan_call(func, y0, t, rtol, atol, method, options)
    if isinstance(call, str):
        begin(func, y0)
        options = handed_over(options, t)
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

    With one exception. torchdiffeq, and therefore `odeint`, reads outputs off a quartic through the step that passes
    them, which for method "dopri8" is far less accurate than the step (y' = 7 t^6 at 1.3: 10770, right is 6.27). Here
    dopri8's steps end at the output times, and the outputs are as accurate as the steps, unless
    options["stop_at_outputs"] is False. An event is still read off the quartic.

    step_control: "shared", one step size for the batch as in torchdiffeq; "per_tile": each tile of samples chooses its
        own (the cpu and cuda engines); "per_sample": each sample does (the cuda engine). The latter two are for
        compiled fields, and have no gradient.
    """
    if step_control not in ("shared", "per_tile", "per_sample"):
        raise ValueError(f"step_control must be 'shared', 'per_tile' or 'per_sample', not {step_control!r}")
    options, y0 = _checked(rtol, atol, method, options), _in_own_dtype(func, y0)
    if event_fn is not None:
        call: EngineCall | TorchCall | str = "events need Python at every step"
        _refuse_tsit5(method, "events")
    else:
        call = _plan_call(func, y0, t, rtol, atol, method, options, step_control, stop=method in _COARSE_OUTPUTS)
    if not isinstance(call, str):
        return call.run()
    if step_control != "shared":
        raise ValueError(
            f"step_control={step_control!r} is for solves that an engine runs, and here: {call}"
        )
    begin(func, y0)
    options = handed_over(options, t if event_fn is None else None, method in _COARSE_OUTPUTS)
    return solve_by_torchdiffeq(func, y0, t, rtol, atol, method, options, event_fn, reason=call)


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
    gradient: str | None = None,
) -> Any:
    """`odeint` for those who want the gradient without keeping the solve.

    gradient: "adjoint", torchdiffeq's continuous adjoint: a second solve, backwards from the last output to the first,
        of (y, its cotangent, the parameters' gradients), to the tolerances adjoint_rtol and adjoint_atol. It keeps the
        outputs only, and agrees with the gradient of the solution to the tolerances.
        "discrete", which only compiled fields have: `odeint`'s own gradient, the exact one of the steps taken. It keeps
        the state at every accepted step and its stages' derivatives (nothing that grows with the width of the field),
        and needs about the evaluations of the forward solve where the adjoint repeats its step size search.
        None: "discrete" for a compiled field with no adjoint_* argument but ones that repeat the forward solve's own
        (as callers in between pass them on), else "adjoint". Who moves here from torchdiffeq asked for a gradient at
        little memory, which this is, and gets the more exact one; who set other tolerances, another method, options or
        parameters for the adjoint gets the adjoint that they belong to.
    adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options, adjoint_params: torchdiffeq's. Tolerances and method
        are the forward solve's if not given; adjoint_options["norm"] may be "seminorm", which leaves the parameters out
        of the error; adjoint_params are tuple(func.parameters()) if not given.

    Returns what `odeint` returns. The adjoint runs in torchdiffeq, on evaluations and vector-Jacobian products of the
    field's engine. Source: Chen et al. 2018 (Neural ODEs); of the seminorm: Kidger et al. 2021.

    Raises ValueError as torchdiffeq does, for an unknown `gradient`, for "discrete" where there is none, and for method
    "tsit5" with the adjoint.
    """
    if gradient not in (None, "discrete", "adjoint"):
        raise ValueError(f"gradient must be 'discrete', 'adjoint' or None, not {gradient!r}")
    adjoint = {
        "adjoint_rtol": adjoint_rtol,
        "adjoint_atol": adjoint_atol,
        "adjoint_method": adjoint_method,
        "adjoint_options": adjoint_options,
        "adjoint_params": adjoint_params,
    }
    options, y0 = _checked(rtol, atol, method, options), _in_own_dtype(func, y0)
    check_not_negative("adjoint_rtol", adjoint_rtol)
    check_not_negative("adjoint_atol", adjoint_atol)
    adjoint["adjoint_options"] = _known(adjoint_options, adjoint_method or method, "adjoint_options")
    if isinstance(adjoint_params, Iterator):
        adjoint["adjoint_params"] = adjoint_params = tuple(adjoint_params)
    own = {"adjoint_rtol": rtol, "adjoint_atol": atol, "adjoint_method": method or "dopri5"}
    given = [
        name for name, value in adjoint.items()
        if value is not None
        and not (name in own and type(value) in (float, str) and value == own[name])
        and not (name == "adjoint_params" and _are_all(value, func))
    ]  # fmt: skip
    obstacle = (
        f"{given[0]} is the adjoint's" if given
        else "func is not a compiled field" if not isinstance(func, (CompiledField, DivergenceField))
        else "an event ends the solve" if event_fn is not None
        else "func has callbacks of the adjoint's" if any(getattr(func, one, None) for one in ADJOINT_CALLBACKS)
        else f"method {method!r} keeps no graph" if method in _GRAPHLESS
        else None
    )  # fmt: skip
    if gradient == "discrete" and obstacle is not None:
        raise ValueError(f"gradient='discrete' is not to be had: {obstacle}; use gradient='adjoint'")
    if gradient != "adjoint" and obstacle is None:
        ys = odeint(func, y0, t, rtol=rtol, atol=atol, method=method, options=options)
        return (func.field if isinstance(func, DivergenceField) else func).reaching_module(ys)
    _refuse_tsit5(method, "the continuous adjoint")
    _refuse_tsit5(adjoint_method, "the continuous adjoint")
    func = with_own_numbers(func, y0)

    def run(y0: State, t: Tensor) -> Any:
        return torchdiffeq.odeint_adjoint(
            func, y0, t, rtol=rtol, atol=atol, method=method, options=handed_over(options, t), event_fn=event_fn,
            **adjoint,
        )

    if not isinstance(func, (CompiledField, DivergenceField)) or event_fn is not None:
        return run(y0, t)
    trained = func.parameters() if adjoint_params is None else adjoint_params
    return watched(run, y0, t, [parameter for parameter in trained if parameter.requires_grad])


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
    """Solve from t0 to t1 by dopri5 and return the solution as a function of t. Runs in torchdiffeq, which knows no t1
    before t0 (its steps are looked up in ascending time): there the field of -t is solved."""
    y0 = _in_own_dtype(func, y0)
    if float(t1) < float(t0):
        times = [name for name in ("step_t", "jump_t") if options and options.get(name) is not None]
        options = options and {**options, **{name: -torch.as_tensor(options[name]) for name in times}}
        mirrored = odeint_dense(
            lambda t, y: -func(-t, y), y0, -t0, -t1, rtol=rtol, atol=atol, method=method, options=options
        )
        return lambda t: mirrored(-t)
    options = handed_over(_checked(rtol, atol, method, options), None)
    solution = torchdiffeq.odeint_dense(func, y0, t0, t1, rtol=rtol, atol=atol, method=method, options=options)
    # which keeps the steps' times on the CPU, wherever y0 is
    return lambda t: solution(t.to("cpu") if isinstance(t, Tensor) else t)


# -------------------------------------------------------------------------------------------------------- who runs it


def _refuse_tsit5(method: str | None, what: str) -> None:
    if method == "tsit5":
        raise ValueError(f"method 'tsit5' does not support {what} here; use 'dopri5', which is of the same order")


def _are_all(parameters: Any, func: Callable) -> bool:
    """Whether these are the parameters that func trains."""
    if not isinstance(func, nn.Module) or not isinstance(parameters, (tuple, list)):
        return False
    trained = [{id(one) for one in some if one.requires_grad} for some in (parameters, func.parameters())]
    return trained[0] == trained[1]


def _in_own_dtype(func: Callable, y0: State) -> State:
    """A state of another dtype in the field's, under torch.autocast (`CompiledField.in_own_dtype`); an inference_mode's
    as one that autograd takes."""
    first = y0[0] if isinstance(y0, tuple) and y0 else y0
    field = func.field if isinstance(func, DivergenceField) else func
    if not isinstance(first, Tensor) or not isinstance(field, CompiledField):
        return y0
    if not torch.compiler.is_compiling() and torch.is_grad_enabled() and first.is_inference():
        y0 = ordinary(y0)
    if not is_autocast_enabled(first):
        return y0
    return tuple(map(field.in_own_dtype, y0)) if isinstance(y0, tuple) else field.in_own_dtype(y0)


def _checked(rtol: Any, atol: Any, method: str | None, options: dict | None) -> dict | None:
    """`options`, checked like the tolerances before anything runs (`arguments.checked_options`)."""
    check_not_negative("rtol", rtol)
    check_not_negative("atol", atol)
    return _known(options, method, "options")


def _known(options: dict | None, method: str | None, name: str) -> dict | None:
    if options is None or not (method is None or method in METHODS or method in _OTHER_METHODS):
        return options  # an unknown method is refused later
    return checked_options(options, method, name)


def _plan_call(
    func: Callable, y0: State, t: Tensor, rtol: Any, atol: Any, method: str | None, options: dict | None,
    step_control: str = "shared", stop: bool = False,
) -> EngineCall | TorchCall | str:  # fmt: skip
    """The call an engine (or numerics) will run, or the reason why torchdiffeq has to.

    stop: at outputs, where the options do not say.
    """
    compiled = isinstance(func, (CompiledField, DivergenceField))
    if not callable(func):
        remedy = "; compile(field) it first" if isinstance(func, VectorField) else ""
        raise TypeError(f"func must be a compiled field or a callable f(t, y), not {type(func).__name__}{remedy}")
    method = "dopri5" if method is None else method
    options = dict(options or {})
    stop = options.setdefault("stop_at_outputs", stop)
    if not stop:
        del options["stop_at_outputs"]
    # what torchdiffeq lacks
    by_numerics = method == "tsit5" or (stop and not callbacks_of(func) and "dtype" not in options)
    if not compiled and not by_numerics:
        if method not in METHODS and method not in _OTHER_METHODS:
            _raise_unknown_method(method)
        return "func is not a compiled field"
    if not isinstance(y0, (Tensor, tuple)):
        raise AssertionError("y0 must be either a torch.Tensor or a tuple")
    if method in _OTHER_METHODS:
        return f"method {method!r} has no Runge-Kutta tableau"
    if method not in METHODS:
        _raise_unknown_method(method)
    reason = "func is not a compiled field"
    if compiled:
        call = EngineCall.make(func, y0, t, rtol, atol, method, options, step_control)
        if isinstance(call, EngineCall) or not by_numerics:
            return call
        reason = call
    if step_control != "shared":
        raise ValueError(f"step_control={step_control!r} is for solves that an engine runs, and here: {reason}")
    return TorchCall.make(func, y0, t, rtol, atol, method, options, reason)


def _raise_unknown_method(method: Any) -> None:
    names = '", "'.join((*METHODS, *_OTHER_METHODS))
    raise ValueError(f'Invalid method "{method}". Must be one of {{"{names}"}}.')
