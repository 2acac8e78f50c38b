"""torchdiffeq's error table: what bad input raises, on plain callables and on compiled fields alike."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torchdiffeq
from engine_fields import PlainField, OpaqueEngine, compiled
from torch import nn

from sparseflow_kernels.engines.reference import ReferenceEngine
from sparseflow_kernels.field import Activation, Layer, Pattern, VectorField
from sparseflow_kernels.odeint import odeint, odeint_adjoint, odeint_dense, odeint_event

F64 = torch.float64
T = torch.linspace(0.0, 1.0, 3, dtype=F64)
Y0 = torch.tensor([[0.5, -0.2, 0.1], [0.3, 0.4, -1.0]], dtype=F64)


def decay(t, y):
    return -y


FUNCS = {
    "plain": (lambda: decay, {}),
    "compiled": (compiled, {}),
    "tsit5": (lambda: decay, {"method": "tsit5"}),
    "compiled tsit5": (compiled, {"method": "tsit5"}),
}


@pytest.fixture(params=FUNCS)
def run(request):
    """run(y0, t, **arguments) by each way through the door."""
    make, defaults = FUNCS[request.param]
    func = make()
    return lambda y0=Y0, t=T, **arguments: odeint(func, y0, t, **{**defaults, **arguments})


def square_field():
    """y' = y^2, compiled."""
    eye = Pattern.from_mask(torch.eye(1, dtype=torch.bool))

    def layer(activation):
        return Layer(eye, torch.ones(1, dtype=F64), torch.zeros(1, dtype=F64), activation=Activation(activation))

    return PlainField(VectorField([layer("square"), layer("identity")]), OpaqueEngine)


# ------------------------------------------------------------------------------------------------------- the arguments


def test_unknown_method(run):
    with pytest.raises(ValueError, match=r'^Invalid method "foo". Must be one of \{"dopri5", '):
        run(method="foo")


@pytest.mark.parametrize("y0", [[1.0, 2.0], np.ones(3)], ids=["list", "array"])
def test_state_of_another_type(run, y0):
    with pytest.raises(AssertionError, match="^y0 must be either a torch.Tensor or a tuple"):
        run(y0)


def test_integer_state():
    for func in (decay, compiled()):
        with pytest.raises((NotImplementedError, RuntimeError, TypeError, ValueError)):
            odeint(func, torch.ones(2, 3, dtype=torch.int64), T)


def test_empty_tuple(run):
    with pytest.raises(ValueError):
        run(())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64, torch.float32])
def test_other_state_dtypes(dtype):
    assert odeint(decay, torch.ones(2, dtype=dtype), T, rtol=1e-2, atol=1e-2).dtype == dtype
    assert odeint(decay, torch.tensor(1.0, dtype=dtype), T, rtol=1e-2, atol=1e-2).shape == (3,)


def test_t_not_a_tensor(run):
    with pytest.raises(AssertionError, match="^t must be a torch.Tensor"):
        run(t=[0.0, 1.0])


def test_t_integer(run):
    with pytest.raises(TypeError, match="^`t` must be a floating point Tensor but is a torch.LongTensor"):
        run(t=torch.tensor([0, 1]))


@pytest.mark.parametrize("t", [torch.tensor(1.0), torch.zeros(2, 2)], ids=["0-d", "2-d"])
def test_t_of_another_shape(run, t):
    with pytest.raises(AssertionError, match="^t must be one dimensional"):
        run(t=t)


@pytest.mark.parametrize("t", [[0.0, 0.5, 0.5], [0.0, 1.0, 0.5], [1.0, 0.0, 0.0], [0.0, math.nan]])
def test_t_not_monotone(run, t):
    with pytest.raises(AssertionError, match="^t must be strictly increasing or decreasing"):
        run(t=torch.tensor(t))


def test_t_empty(run):
    with pytest.raises(IndexError):
        run(t=torch.zeros(0))


def test_t_of_one_point(run):
    assert torch.equal(run(t=torch.tensor([0.7])), Y0[None])


@pytest.mark.parametrize("name", ["rtol", "atol"])
def test_tolerance_with_gradient(run, name):
    with pytest.raises(AssertionError, match=f"^{name} cannot require gradient"):
        run(**{name: torch.tensor(1e-3, requires_grad=True)})


@pytest.mark.parametrize("name", ["rtol", "atol"])
@pytest.mark.parametrize("method", ["dopri5", "tsit5"])
def test_tuple_tolerance_of_another_length(name, method):
    for func, state in ((lambda t, y: y, (Y0, Y0[:, 0])), (compiled(kind="exact"), (Y0, Y0[:, 0]))):
        words = f"^If using tupled {name} it must have the same length as the tuple y0"
        with pytest.raises(AssertionError, match=words):
            odeint(func, state, T, method=method, **{name: (1e-3, 1e-3, 1e-3)})


def test_fourth_positional_argument():
    with pytest.raises(TypeError):
        odeint(decay, Y0, T, 1e-3)


def test_options_are_copied(run):
    options = {"max_num_steps": 1000}
    run(options=options)
    assert options == {"max_num_steps": 1000}


@pytest.mark.parametrize("name", ["rtol", "atol"])
@pytest.mark.parametrize("value", [-1e-9, math.nan, torch.tensor(-1.0), torch.full((2, 3), math.nan), (1e-3, -1.0)])
def test_negative_tolerance_is_refused(run, name, value):
    """torchdiffeq takes it in silence."""
    with pytest.raises(ValueError, match=f"^{name} must be 0 or more, and no NaN, not (-1|nan)"):
        run(**{name: value})


BAD_OPTIONS = [
    ("min_step", -1.0), ("min_step", math.nan), ("min_step", math.inf), ("max_step", 0.0), ("max_step", math.nan),
    ("safety", 0), ("safety", -0.5), ("safety", 1.5), ("safety", math.nan), ("ifactor", -2.0), ("ifactor", 0.5),
    ("ifactor", math.inf), ("dfactor", 0.0), ("dfactor", 1.0), ("dfactor", torch.tensor(math.nan)), ("max_num_steps", -1),
    ("max_num_steps", math.inf), ("max_num_steps", math.nan), ("max_num_steps", 2**31), ("max_num_steps", 2**40),
]  # fmt: skip


@pytest.mark.parametrize("option, value", BAD_OPTIONS)
def test_options_no_solve_can_use(run, option, value):
    with pytest.raises(ValueError, match=rf"^options\['{option}'\] must be .*, not "):
        run(options={option: value})


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_first_step_is_checked(run, value):
    with pytest.raises(AssertionError, match=r"^underflow in dt 0\.0: options\['first_step'\] must be"):
        run(options={"first_step": value})


def test_options_that_contradict_each_other(run):
    with pytest.raises(ValueError, match="^options: min_step must be at most max_step, and they are 0.5 and 0.1"):
        run(options={"min_step": 0.5, "max_step": 0.1})


@pytest.mark.parametrize("value", ["0.9", None, [1.0], 1j])
def test_options_of_another_type(run, value):
    with pytest.raises(TypeError, match=r"^options\['safety'\] must be"):
        run(options={"safety": value})


@pytest.mark.parametrize("name", ["step_t", "jump_t"])
@pytest.mark.parametrize("value", [[0.5, math.nan], torch.tensor([math.nan]), math.nan])
def test_stops_that_are_no_times(run, name, value):
    with pytest.raises(ValueError, match=rf"^options\['{name}'\] must hold points of time"):
        run(options={name: value})


def test_the_largest_step_limit_is_no_limit(run):
    assert torch.equal(run(options={"max_num_steps": 2**31 - 1}), run())


@pytest.mark.parametrize("value", ["no", None, 1])
def test_stop_at_outputs_is_said_plainly(run, value):
    with pytest.raises(TypeError, match=r"^options\['stop_at_outputs'\] must be True or False, not "):
        run(options={"stop_at_outputs": value})


def test_adjoints_are_checked_too():
    for func in (nn.Identity(), compiled()):
        for bad, words in (
            ({"adjoint_rtol": -1.0}, "adjoint_rtol must be"), ({"adjoint_atol": math.nan}, "adjoint_atol must be"),
            ({"rtol": -1.0}, "rtol must be"), ({"adjoint_options": {"safety": 0.0}}, r"adjoint_options\['safety'\]"),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=f"^{words}"):
                odeint_adjoint(func, Y0, T, **bad)
    with pytest.raises(ValueError, match="^rtol must be"):
        odeint_dense(decay, Y0[0], T[0], T[-1], rtol=-1.0)
    with pytest.raises(ValueError, match="^atol must be"):
        odeint_event(decay, Y0, T[0], event_fn=lambda t, y: y.sum() - 1, atol=-1.0)


def test_memory_that_is_not_there_is_told_in_sizes():
    field = compiled(engine=ReferenceEngine)
    words = r"outputs take 24000000000000 bytes \(21\.8 TiB\), 2 time\(s\) of .* 500000000000 row\(s\) of 3"
    with pytest.raises(MemoryError, match=words):  # nothing is made of the rows, which share one memory
        odeint(field, Y0[:1].expand(500_000_000_000, 3), T[[0, 2]])
    with pytest.raises(MemoryError, match=r"^a solve does not fit into memory: its outputs take 48000000000000000 bytes"):
        odeint(field, Y0[:1].expand(1_000_000_000_000, 3), torch.linspace(0, 1, 2000, dtype=F64))
    with pytest.raises(ValueError, match="step_size.* makes .* points"):
        odeint(field, Y0, T, method="rk4", options={"step_size": 1e-15})


def test_memory_that_runs_out_on_the_way_is_told_in_sizes(monkeypatch):
    """In the solve as in its gradient, whatever of torch or of C++ notices it."""
    field, y0 = compiled(engine=OpaqueEngine), Y0.clone().requires_grad_()
    for failure in (MemoryError("std::bad_alloc"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")):
        with monkeypatch.context() as patch:
            patch.setattr(OpaqueEngine, "solve", lambda self, request: (_ for _ in ()).throw(failure))
            with pytest.raises(MemoryError, match=f"its outputs take 144 bytes.*{failure}"):
                odeint(field, y0, T)
        ys = odeint(field, y0, T)
        with monkeypatch.context() as patch:
            patch.setattr(ReferenceEngine, "solve_backward", lambda *a, **k: (_ for _ in ()).throw(failure))
            with pytest.raises(MemoryError, match=f"its outputs take 144 bytes.*{failure}"):
                ys.sum().backward()


# ------------------------------------------------------------------------------------------------------------ failures


def test_zero_tolerances(run):
    with pytest.raises(AssertionError, match=r"^underflow in dt 0\.0"):
        run(rtol=0.0, atol=0.0)


def test_negative_first_step(run):
    with pytest.raises(AssertionError, match=r"^underflow in dt 0\.0"):
        run(options={"first_step": -0.1})


def test_nan_state(run):
    with pytest.raises(AssertionError, match=r"^underflow in dt 0\.0"):
        run(torch.full((2, 3), math.nan, dtype=F64))


@pytest.mark.parametrize("method", ["dopri5", "tsit5"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_function_not_finite(method, value):
    spoiled = compiled()
    with torch.no_grad():
        spoiled.vector_field.layers[-1].bias[0] = value
    for func in (lambda t, y: y * value, spoiled):
        with pytest.raises(AssertionError, match=r"^underflow in dt 0\.0"):
            odeint(func, Y0, T, method=method)


@pytest.mark.parametrize("method", ["dopri5", "tsit5"])
def test_blow_up(method):
    y0 = torch.tensor([[1.0], [0.1]], dtype=F64)  # the first row blows up at t = 1
    for func in (lambda t, y: y**2, square_field()):
        with pytest.raises(AssertionError, match=r"^underflow in dt \d\.\d+e-1[67]"):
            odeint(func, y0, torch.tensor([0.0, 2.0], dtype=F64), method=method)
    with pytest.raises(AssertionError, match=r"stopped at t = 1.*, 1 row\(s\) of the batch: 0\. "):
        odeint(square_field(), y0, torch.tensor([0.0, 2.0], dtype=F64), method=method)


def test_nan_with_min_step(run):
    with pytest.raises(AssertionError, match="^non-finite values in state `y`: "):
        run(torch.full((2, 3), math.nan, dtype=F64), options={"min_step": 0.1})


def test_too_many_steps(run):
    with pytest.raises(AssertionError, match=r"^max_num_steps exceeded \(4>=4\)"):
        run(options={"max_num_steps": 4, "max_step": 0.05})


def test_the_step_limit_holds_within_an_output_interval(run):
    """28 steps of 1 / 28: 15 are too few for two outputs and enough for three."""
    options = {"max_num_steps": 15, "max_step": 1 / 28, "first_step": 1 / 28}
    with pytest.raises(AssertionError, match="^max_num_steps exceeded"):
        run(t=T[::2], options=options, rtol=1e-2, atol=1e-2)
    run(options=options, rtol=1e-2, atol=1e-2)


def test_point_in_both_stop_lists(run):
    point = torch.tensor([0.5], dtype=F64)
    with pytest.raises(ValueError, match="^`step_t` and `jump_t` must not have any repeated elements between them."):
        run(options={"step_t": point, "jump_t": point})


def test_sticky_stop_list(run):
    """A step that lands on a stop by itself leaves the list there: 0.75 is never visited."""
    from sparseflow_kernels.odeint import solve

    options = {"step_t": torch.tensor([0.5, 0.75], dtype=F64), "max_step": 0.5, "first_step": 0.5, "min_step": 0.5}
    for func in (decay, compiled()):
        visited = solve(func, Y0, T, options=options).stats.steps[:, 0].tolist()
        assert visited == [0.0, 0.5]


# ----------------------------------------------------------------------------------------- the function, the options


def test_function_of_another_size():
    for arguments in ({}, {"method": "tsit5"}):
        with pytest.raises(RuntimeError):
            odeint(lambda t, y: y[:, :2], Y0, T, **arguments)


def test_function_that_returns_nothing():
    for arguments in ({}, {"method": "tsit5"}):
        with pytest.raises((TypeError, AttributeError)):
            odeint(lambda t, y: None, Y0, T, **arguments)


def test_unknown_option(run):
    with pytest.warns(UserWarning, match="Unexpected arguments {'foo': 1} are ignored"):
        run(options={"foo": 1})
    with pytest.warns(UserWarning, match=r"options\['max_steps'\]: did you mean 'max_step'\?") as told:
        run(options={"max_steps": 10})
    assert len(told) == 1 and told[0].filename == __file__


@pytest.mark.parametrize("method, option, near", [
    ("rk4", "stepsize", "step_size"), ("implicit_adams", "maxiters", "max_iters"), ("scipy_solver", "solvers", "solver"),
    ("dopri5", "step_size", None),
])  # fmt: skip
def test_unknown_options_of_other_methods(method, option, near):
    for func in (decay, compiled()):
        with pytest.warns(UserWarning, match=f"did you mean '{near}'" if near else "Unexpected arguments"):
            odeint(func, Y0, T, method=method, options={option: 1})
    with pytest.warns(UserWarning, match=f"did you mean '{near}'" if near else "Unexpected arguments"):
        odeint_adjoint(compiled(), Y0, T, method=method, options={option: 1})


def test_an_unknown_option_costs_no_engine():
    from sparseflow_kernels.odeint import solve

    with pytest.warns(UserWarning, match="did you mean 'first_step'"):
        assert solve(compiled(), Y0, T, options={"frist_step": 0.1}).stats.engine == "opaque"


def test_callback_the_solver_lacks():
    for func in (compiled(), nn.Identity()):
        func.forward = lambda t, y: -y
        func.callback_accept_step = lambda t, y, dt: None
        with pytest.warns(UserWarning, match="Solver 'rk4' does not support callbacks {'callback_accept_step'}"):
            odeint(func, Y0, T, method="rk4")


FIXED_FUNCS = pytest.mark.parametrize("func", [decay, compiled()], ids=["plain", "compiled"])


@FIXED_FUNCS
def test_two_grids(func):
    with pytest.raises(ValueError, match="^step_size and grid_constructor are mutually exclusive arguments."):
        odeint(func, Y0, T, method="rk4", options={"step_size": 0.1, "grid_constructor": lambda f, y, t: t})


@FIXED_FUNCS
def test_grid_that_does_not_span_t(func):
    with pytest.raises(AssertionError):
        odeint(func, Y0, T, method="rk4", options={"grid_constructor": lambda f, y, t: t[:-1]})


@FIXED_FUNCS
def test_unknown_interpolation(func):
    with pytest.raises(ValueError, match="^Unknown interpolation method foo"):
        odeint(func, Y0, T, method="rk4", options={"interp": "foo", "step_size": 0.3})


@FIXED_FUNCS
def test_fixed_grids_ignore_tolerances_and_norm(func):
    first = odeint(func, Y0, T, method="rk4")
    assert torch.equal(first, odeint(func, Y0, T, method="rk4", rtol=0.0, atol=0.0, options={"norm": lambda y: 1 / 0}))


# ------------------------------------------------------------------------------------------------------ events, adjoint


@FIXED_FUNCS
def test_event_with_another_number_of_times(func):
    with pytest.raises(ValueError, match=r"^We require len\(t\) == 2 when in event handling mode, but got len\(t\)=3."):
        odeint(func, Y0, T, event_fn=lambda t, y: y[0, 0])


@FIXED_FUNCS
def test_event_on_a_fixed_grid(func):
    with pytest.raises(AssertionError, match="^Event handling for fixed step solvers currently requires"):
        odeint(func, Y0, T[:2], method="euler", event_fn=lambda t, y: y[0, 0])


def test_event_that_never_fires():
    with pytest.raises(RuntimeError, match="^Reached maximum number of iterations 20000."):
        odeint(decay, Y0[0, :1], T[:2], method="euler", options={"step_size": 1e-9}, event_fn=lambda t, y: y[0])


def test_event_without_a_tensor_time():
    with pytest.raises(AttributeError):
        odeint_event(decay, Y0, 0.0, event_fn=lambda t, y: y[0, 0])


def test_adjoint_of_a_plain_function():
    with pytest.raises(ValueError, match="^func must be an instance of nn.Module"):
        odeint_adjoint(decay, Y0, T)
    odeint_adjoint(decay, Y0, T, adjoint_params=())


def test_adjoint_options_that_cannot_be_inferred():
    for func in (compiled(), nn.Identity()):
        with pytest.raises(ValueError, match="^If `adjoint_method != method` then we cannot infer `adjoint_options`"):
            odeint_adjoint(func, Y0, T, adjoint_method="rk4", options={"max_num_steps": 5})


def test_adams_orders():
    for order, outcome in ((13, pytest.raises(AssertionError)), (3, pytest.warns(UserWarning))):
        with outcome:
            odeint(compiled(), Y0, T, method="explicit_adams", options={"max_order": order})


def test_dense_limits():
    zero, one = torch.tensor(0.0), torch.tensor(1.0)
    with pytest.raises(AssertionError):
        odeint_dense(decay, (Y0,), zero, one)
    with pytest.raises(AssertionError):
        odeint_dense(decay, Y0, zero, one, method="bosh3")


def test_the_table_is_torchdiffeqs():
    """The leading words above, from the oracle itself, so that a new release of it is noticed."""
    cases = [
        ({"method": "foo"}, ValueError, 'Invalid method "foo"'),
        ({"options": {"max_num_steps": 4, "max_step": 0.05}}, AssertionError, r"max_num_steps exceeded \(4>=4\)"),
        ({"rtol": 0.0, "atol": 0.0}, AssertionError, r"underflow in dt 0\.0"),
    ]
    for arguments, kind, words in cases:
        with pytest.raises(kind, match=f"^{words}"):
            torchdiffeq.odeint(decay, Y0, T, **arguments)
