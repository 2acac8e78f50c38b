"""Solves against torchdiffeq, the oracle: steps, counts, outputs, gradients, and who runs what."""

from __future__ import annotations

import inspect
import math

import pytest
import sparseflow_kernels
import torch
import torchdiffeq
from engine_fields import OpaqueEngine, PlainField, compiled
from torch import nn

from sparseflow_kernels import engines
from sparseflow_kernels.divergence_field import with_divergence
from sparseflow_kernels.engines.reference import ReferenceEngine
from sparseflow_kernels.field import Layer, Pattern, TimeFunction, VectorField
from sparseflow_kernels.numerics.adaptive import replay_adaptive, solve_adaptive
from sparseflow_kernels.numerics.step_control import StepOptions, initial_step, next_step_size, trial_step
from sparseflow_kernels.numerics.tableaus import ADAPTIVE, FIXED
from sparseflow_kernels.odeint import odeint, odeint_adjoint, odeint_dense, odeint_event, solve
from sparseflow_kernels.solution import SolverError

F64 = torch.float64
ORACLE = sorted(set(ADAPTIVE) - {"tsit5"})
# Tolerances at which the error estimate stands well above rounding, so that step sizes can be compared closely.
TOLERANCE = {"dopri5": 1e-4, "dopri8": 1e-4, "bosh3": 1e-3, "fehlberg2": 1e-3, "adaptive_heun": 1e-3, "tsit5": 1e-4}


class Watched:
    """A callable that counts its evaluations and keeps torchdiffeq's steps."""

    def __init__(self, f):
        self.f, self.nfe, self.times, self.accepted, self.rejected = f, 0, [], [], []

    def __call__(self, t, y):
        self.nfe += 1
        self.times.append(t.item())
        return self.f(t, y)

    def callback_accept_step(self, t0, y0, dt):
        self.accepted.append((t0.item(), dt.item()))

    def callback_reject_step(self, t0, y0, dt):
        self.rejected.append((t0.item(), dt.item()))


def kinked(t, y):
    """Oscillating, with a jump at t = 1.2."""
    kick = 2.0 if t.item() >= 1.2 else 0.0
    return torch.stack((y[..., 1], -4.0 * y[..., 0] + kick * torch.cos(3 * t), -y[..., 2] * y[..., 0]), -1)


def start(rows=6, dim=3, dtype=F64, seed=5):
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tensor_options(options):
    return {k: torch.tensor(v, dtype=F64) if isinstance(v, tuple) else v for k, v in options.items()}


OPTIONS = {
    "default": {},
    "first_step": {"first_step": 0.3},
    "step_t": {"step_t": (0.7, 2.2)},
    "jump_t": {"jump_t": (1.2, 2.0)},
    "both": {"step_t": (2.2, 0.7, -1.0), "jump_t": (1.2,)},
    "bounds": {"min_step": 0.04, "max_step": 0.05},
    "factors": {"safety": 0.7, "ifactor": 3.0, "dfactor": 0.5},
}


# ------------------------------------------------------------------------------------------------- numerics, any f


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("method", ORACLE)
def test_adaptive_step_for_step(method, options):
    times = torch.linspace(0.0, 3.0, 9, dtype=F64)
    tol = TOLERANCE[method]

    def oracle(y0):
        watched = Watched(kinked)
        ys = torchdiffeq.odeint(watched, y0, times, rtol=tol, atol=tol, method=method, options=tensor_options(options))
        return watched, torch.tensor(watched.accepted, dtype=F64), ys

    theirs, steps, expected = oracle(start())
    # Where an error estimate is close to rounding the steps are, too: allow what one unit in the last place of y0 does
    # to the oracle itself.
    noise = [oracle(start() * (1 + 4e-16 * (torch.rand(6, 3, dtype=F64) - 0.5)))[1:] for _ in range(3)]
    step_tol = max(1e-12, *(20 * (steps - other).abs().max().item() for other, _ in noise))
    y_tol = max(1e-10, *(20 * (expected - other).abs().max().item() for _, other in noise))
    assert step_tol < 1e-3 and y_tol < 1e-4
    ours = Watched(kinked)
    result = solve_adaptive(ours, start(), times, ADAPTIVE[method], tol, tol, options=StepOptions(**options))
    assert result.status == "ok"
    assert (result.nfe, result.accepted, result.rejected) == (theirs.nfe, len(theirs.accepted), len(theirs.rejected))
    assert ours.nfe == result.nfe
    torch.testing.assert_close(result.steps, steps, rtol=0, atol=step_tol)
    torch.testing.assert_close(torch.tensor(ours.times), torch.tensor(theirs.times), rtol=1e-6, atol=1e-6 + step_tol)
    torch.testing.assert_close(result.ys, expected, rtol=0, atol=y_tol)
    again = replay_adaptive(kinked, start(), times, ADAPTIVE[method], result.steps, StepOptions(**options))
    torch.testing.assert_close(again.ys, result.ys, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_nfe_is_two_and_the_stages(method):
    times = torch.tensor([0.0, 1.0, 3.0], dtype=F64)
    result = solve_adaptive(kinked, start(), times, ADAPTIVE[method], 1e-4, 1e-4)
    assert result.rejected > 0
    assert result.nfe == 2 + ADAPTIVE[method].stages_per_step * (result.accepted + result.rejected)


def test_f_sees_time_in_the_states_dtype_and_just_before_the_end_of_a_step():
    seen = []

    def f(t, y):
        assert t.shape == () and t.dtype == torch.float32
        seen.append(t)
        return -y

    times = torch.tensor([0.0, 1.0], dtype=F64)
    options = StepOptions(first_step=0.5)
    result = solve_adaptive(f, torch.ones(2), times, ADAPTIVE["dopri5"], 1e-3, 1e-3, options=options)
    t0, dt = result.steps[0].tolist()
    end = torch.tensor(t0 + dt, dtype=torch.float32)
    below = torch.nextafter(end, torch.tensor(-math.inf))
    assert seen[5] == below and seen[6] == below and seen[4] < below


@pytest.mark.parametrize("dtype", [torch.complex128, torch.float32, torch.bfloat16])
def test_other_dtypes(dtype):
    y0 = torch.tensor([1.0, 0.5], dtype=dtype)
    rate = -1.0 + 2.0j if dtype.is_complex else -1.0
    times = torch.tensor([0.0, 1.0], dtype=torch.float32)
    tol = 1e-2 if dtype == torch.bfloat16 else 1e-5
    ours = odeint(lambda t, y: rate * y, y0, times, method="tsit5", rtol=tol, atol=tol)
    assert ours.dtype == dtype
    exact = torch.exp(torch.tensor(rate)) * y0.to(torch.complex128)
    assert (ours[-1].to(torch.complex128) - exact).abs().max() < (0.05 if dtype == torch.bfloat16 else 1e-5)


def test_replay_that_ends_too_early_is_refused():
    times = torch.tensor([0.0, 1.0], dtype=F64)
    with pytest.raises(ValueError, match="end before the last output time"):
        replay_adaptive(lambda t, y: -y, start(), times, ADAPTIVE["dopri5"], torch.tensor([[0.0, 0.5]], dtype=F64))


def test_step_rule():
    options = StepOptions()
    assert next_step_size(0.1, 0.0, 5, options) == 1.0
    assert next_step_size(0.1, 0.99, 5, options) == 0.1  # an accepted step never shrinks
    assert next_step_size(0.1, 1.0, 5, options) == pytest.approx(0.09)
    assert next_step_size(0.1, 1e12, 5, options) == pytest.approx(0.02)
    assert math.isnan(next_step_size(0.1, math.nan, 5, options))
    assert trial_step(0.0, 1.0) == 1e-6 and trial_step(1.0, 2.0) == 0.005
    assert initial_step(1e-6, 0.0, 0.0, 5) == 1e-6
    assert math.isnan(initial_step(math.nan, 1.0, 1.0, 5))


# --------------------------------------------------------------------------------- compiled fields through the door

TIMES = {
    "up": torch.linspace(0.0, 2.0, 21, dtype=F64),
    "down": torch.linspace(1.5, -0.5, 4, dtype=F64),
    "one": torch.tensor([0.3], dtype=F64),
    "float32": torch.tensor([0.0, 0.5, 2.0]),
}


def problem(kind, engine=OpaqueEngine):
    func = compiled(engine=engine, kind=kind)
    y0 = start() if kind is None else (start(), torch.zeros(6, dtype=F64))
    return func, y0


@pytest.mark.parametrize("kind", [None, "exact", "hutchinson"])
@pytest.mark.parametrize("times", TIMES.values(), ids=TIMES)
@pytest.mark.parametrize("method", [*ORACLE, *FIXED])
def test_compiled_field_against_torchdiffeq(method, times, kind):
    func, y0 = problem(kind)
    tol = TOLERANCE.get(method, 1e-3)
    options = {} if method in ADAPTIVE else {"step_size": 0.13}
    with torch.no_grad():
        ours = {**options, "stop_at_outputs": False} if method == "dopri8" else options  # `solve` differs there
        solution = solve(func, y0, times, rtol=tol, atol=tol, method=method, options=ours)
        watched = Watched(func) if method in ADAPTIVE else func  # begin_solve is not called again: the same noise
        expected = torchdiffeq.odeint(watched, y0, times, rtol=tol, atol=tol, method=method, options=options)
    stats = solution.stats
    assert (stats.engine, stats.method, stats.reason) == ("opaque", method, "")
    step_tol, y_tol = (1e-5, 1e-7) if method == "dopri8" else (1e-8, 1e-10)  # see test_adaptive_step_for_step
    for ours, theirs in zip((solution.ys,) if kind is None else solution.ys, (expected,) if kind is None else expected):
        torch.testing.assert_close(ours, theirs, rtol=y_tol, atol=y_tol if times.dtype == F64 else 1e-7)
    if method in ADAPTIVE:
        assert (stats.nfe, stats.accepted, stats.rejected) == (
            watched.nfe, len(watched.accepted), len(watched.rejected),
        )  # fmt: skip
        expected_steps = torch.tensor(watched.accepted, dtype=F64).reshape(-1, 2)
        torch.testing.assert_close(stats.steps, expected_steps, rtol=0, atol=step_tol)
    else:
        assert stats.nfe == stats.accepted * FIXED[method].stages_per_step and stats.rejected == 0


@pytest.mark.parametrize("kind", [None, "exact", "hutchinson"])
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "rk4"])
def test_native_engine_through_the_door(method, kind):
    """The C++ engine, where it is built: outputs, counts and gradients are the reference's."""
    cpu, missing = engines.available("cpu")
    if cpu is None or cpu.unsupported(compiled().vector_field):
        pytest.skip(missing or cpu.unsupported(compiled().vector_field))
    options = {"step_size": 0.13} if method == "rk4" else {"step_t": [0.4]}
    results = []
    for engine in (cpu, ReferenceEngine):
        torch.manual_seed(0)
        func, y0 = problem(kind, engine)
        arguments = dict(rtol=1e-4, atol=1e-4, method=method, options=options)
        grads = gradients(odeint, func, y0, TIMES["down"], **arguments)
        torch.manual_seed(0)
        results.append((solve(func, y0, TIMES["down"], **arguments), grads))
    (native, native_grads), (reference, reference_grads) = results
    assert (native.stats.engine, reference.stats.engine) == ("cpu", "reference")
    assert (native.stats.nfe, native.stats.rejected) == (reference.stats.nfe, reference.stats.rejected)
    torch.testing.assert_close(native.ys, reference.ys, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(native.stats.steps, reference.stats.steps, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(native_grads, reference_grads, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("times", [TIMES["up"], TIMES["down"]], ids=["up", "down"])
def test_options_reach_the_engine_in_upward_time(times):
    func, y0 = problem(None)
    forms = (torch.tensor, list)  # a list holds for a decreasing t too
    inside = [0.4, 1.1] if times[0] < times[-1] else [1.1, 0.4]
    expected = torchdiffeq.odeint(
        func, y0, times, rtol=1e-4, atol=1e-4,
        options={"step_t": torch.tensor([inside[0]], dtype=F64), "jump_t": torch.tensor([inside[1]], dtype=F64)},
    )  # fmt: skip
    for form in forms:
        options = {"step_t": form([inside[0]]), "jump_t": form([inside[1]]), "dtype": F64, "max_num_steps": 50}
        if form is torch.tensor:
            options |= {"step_t": torch.tensor([inside[0]], dtype=F64), "jump_t": torch.tensor([inside[1]], dtype=F64)}
        solution = solve(func, y0, times, rtol=1e-4, atol=1e-4, options=options)
        assert solution.stats.engine == "opaque"
        torch.testing.assert_close(solution.ys, expected, rtol=1e-10, atol=1e-10)
        visited = solution.stats.steps[:, 0]
        assert all(bool((visited - point).abs().min() < 1e-12) for point in inside)


@pytest.mark.parametrize("perturb", [False, True])
@pytest.mark.parametrize("method", FIXED)
def test_grids(method, perturb):
    func, y0 = problem(None)
    times = TIMES["down"]

    def grid(f, y, t):
        return torch.cat((t[:1], torch.linspace(1.2, -0.3, 6, dtype=t.dtype), t[-1:]))

    for options in ({}, {"step_size": 0.3}, {"grid_constructor": grid}, {"step_size": torch.tensor(0.3)}):
        options = options | {"perturb": perturb}
        solution = solve(func, y0, times, method=method, options=options)
        assert solution.stats.engine == "opaque"
        expected = torchdiffeq.odeint(func, y0, times, method=method, options=options)
        torch.testing.assert_close(solution.ys, expected, rtol=1e-12, atol=1e-12)


def test_perturbed_stages_see_the_side_of_the_jump():
    """With perturb, a grid point on a jump of f is seen from inside each step."""
    from sparseflow_kernels.numerics.fixed_grid import solve_fixed

    def f(t, y):
        return torch.where(t < 1.0, torch.ones_like(y), -torch.ones_like(y))

    grid = torch.linspace(0.0, 2.0, 5, dtype=F64)
    y = solve_fixed(f, torch.zeros(1, dtype=F64), grid, grid, FIXED["rk4"], perturb=True).ys
    assert y[:, 0].tolist() == pytest.approx([0.0, 0.5, 1.0, 0.5, 0.0], abs=1e-15)


@pytest.mark.parametrize("shape", [(3,), (2, 1, 4, 3), (1, 3)])
@pytest.mark.parametrize("trailing", [False, True])
def test_shapes(shape, trailing):
    func = compiled(kind="exact")
    x = start(math.prod(shape[:-1])).reshape(shape)
    l0 = torch.randn(shape[:-1] + ((1,) if trailing else ()), dtype=F64)
    xs, ls = odeint(func, (x, l0), TIMES["up"], rtol=1e-4, atol=1e-4)
    assert xs.shape == (21, *x.shape) and ls.shape == (21, *l0.shape)
    expected = torchdiffeq.odeint(func, (x, l0), TIMES["up"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((xs, ls), expected, rtol=1e-10, atol=1e-10)
    transposed = x.transpose(0, -1).contiguous().transpose(0, -1)  # strided input
    torch.testing.assert_close(odeint(func, (transposed, l0), TIMES["up"], rtol=1e-4, atol=1e-4), (xs, ls))


def test_empty_batch():
    func, _ = problem("exact")
    solution = solve(func, (torch.zeros(0, 3, dtype=F64), torch.zeros(0, 1, dtype=F64)), TIMES["up"])
    assert solution.ys[0].shape == (21, 0, 3) and solution.ys[1].shape == (21, 0, 1)
    assert solution.stats.nfe == 0 and solution.stats.engine == "opaque"


def test_tolerances_per_component():
    func, y0 = problem("exact")
    for rtol, atol in (((1e-3, 1e-6), 1e-4), ([1e-3, 1e-6], (1e-4, torch.tensor(1e-3)))):
        ours = solve(func, y0, TIMES["up"], rtol=rtol, atol=atol)
        assert ours.stats.engine == "opaque"
        watched = Watched(func)
        expected = torchdiffeq.odeint(watched, y0, TIMES["up"], rtol=rtol, atol=atol)
        assert ours.stats.nfe == watched.nfe
        torch.testing.assert_close(ours.ys, expected, rtol=1e-9, atol=1e-9)


def test_float32_at_default_tolerances_and_late_times():
    func = compiled(engine=OpaqueEngine, dtype=torch.float32)
    y0 = start(dtype=torch.float32)
    for t0 in (0.0, 1e6):
        times = torch.tensor([t0, t0 + 1.0], dtype=F64)
        ours = solve(func, y0, times)
        watched = Watched(func)
        expected = torchdiffeq.odeint(watched, y0, times)
        assert ours.stats.engine == "opaque"
        assert abs(ours.stats.nfe - watched.nfe) <= 12 * 6  # rounding decides some steps down here
        torch.testing.assert_close(ours.ys, expected, rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------------------------------- gradients


def weighted_sum(ys):
    parts = (ys,) if isinstance(ys, torch.Tensor) else ys
    return sum((part * torch.cos(torch.arange(part.numel(), dtype=F64)).view(part.shape)).sum() for part in parts)


def gradients(interface, func, y0, times, **arguments):
    parts = (y0,) if isinstance(y0, torch.Tensor) else y0
    leaves = [part.clone().requires_grad_() for part in parts]
    times = times.clone().requires_grad_()
    ys = interface(func, leaves[0] if isinstance(y0, torch.Tensor) else tuple(leaves), times, **arguments)
    return torch.autograd.grad(weighted_sum(ys), [*leaves, times, *func.parameters()])


@pytest.mark.parametrize("engine", [ReferenceEngine, OpaqueEngine])
@pytest.mark.parametrize("kind", [None, "exact", "hutchinson"])
@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize(
    "method, options",
    [("dopri5", {"first_step": 0.1}), ("bosh3", {"first_step": 0.1, "jump_t": torch.tensor([0.3, 0.7], dtype=F64)}),
     ("rk4", {"step_size": 0.11, "perturb": True}), ("heun3", {})],
    ids=["dopri5", "bosh3-jumps", "rk4", "heun3"],
)  # fmt: skip
def test_gradients_are_those_of_torchdiffeq(method, options, direction, kind, engine):
    """Through the steps taken, in y0, l0, t and every parameter (first_step: elsewhere theirs also go through dt_0)."""
    func, y0 = problem(kind, engine)
    if method == "dopri5" and kind == "hutchinson" and direction == "down":
        y0 = (y0[0], y0[1][:, None])
    arguments = dict(rtol=1e-4, atol=1e-4, method=method, options=options)
    ours = gradients(odeint, func, y0, TIMES[direction][::3], **arguments)
    theirs = gradients(torchdiffeq.odeint, func, y0, TIMES[direction][::3], **arguments)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_gradient_by_finite_differences():
    func, y0 = problem("exact")
    times = TIMES["up"][::5]
    arguments = dict(rtol=1e-9, atol=1e-9)
    _, dl0, dt, dvalues, *_ = gradients(odeint, func, y0, times, **arguments)
    torch.testing.assert_close(dl0, weighted_sum_gradient_of_l(times))
    values = func.field.vector_field.layers[0].values

    def loss(times):
        with torch.no_grad():
            return weighted_sum(odeint(func, y0, times, **arguments)).item()

    for index in (0, 2, len(times) - 1):
        shift = torch.zeros_like(times)
        shift[index] = 1e-4
        assert (loss(times + shift) - loss(times - shift)) / 2e-4 == pytest.approx(dt[index].item(), rel=1e-5, abs=1e-6)
    for index in (0, 5):
        with torch.no_grad():
            values[index] += 1e-4
            high = loss(times)
            values[index] -= 2e-4
            low = loss(times)
            values[index] += 1e-4
        assert (high - low) / 2e-4 == pytest.approx(dvalues[index].item(), rel=1e-5, abs=1e-6)


def weighted_sum_gradient_of_l(times):
    """l only adds up, so the gradient of l0 is the sum of the outputs' weights."""
    return torch.cos(torch.arange(len(times) * 6, dtype=F64)).view(len(times), 6).sum(0)


def test_forward_stays_native_and_parameters_changed_since_are_noticed():
    func, y0 = problem(None)
    OpaqueEngine.requests.clear()
    ys = odeint(func, y0, TIMES["up"])
    assert ys.requires_grad and len(OpaqueEngine.requests) == 1
    with torch.no_grad():
        func.vector_field.layers[0].bias.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ys.sum().backward()
    with torch.no_grad():
        assert not odeint(func, y0, TIMES["up"]).requires_grad


@pytest.mark.parametrize("kind", [None, "exact"])
def test_second_derivatives(kind):
    """A gradient penalty gets through the native forward as through the reference."""
    results = []
    for engine in (ReferenceEngine, OpaqueEngine):
        func, y0 = problem(kind, engine)
        x = (y0 if kind is None else y0[0]).requires_grad_()
        ys = odeint(func, y0, TIMES["up"][::10], rtol=1e-3, atol=1e-3)
        (gradient,) = torch.autograd.grad(weighted_sum(ys), x, create_graph=True)
        results.append(torch.autograd.grad(gradient.pow(2).sum(), [x, *func.parameters()], allow_unused=True))
    expected, got = results
    assert all(g is not None for g in got[:5])
    torch.testing.assert_close(
        [torch.zeros(()) if g is None else g for g in got], [torch.zeros(()) if g is None else g for g in expected]
    )


def test_adjoint_of_a_compiled_field():
    func, y0 = problem(None)
    times, arguments = TIMES["up"][::4], dict(rtol=1e-8, atol=1e-8)
    exact = gradients(odeint, func, y0, times, **arguments)
    OpaqueEngine.requests.clear()
    torch.testing.assert_close(gradients(odeint_adjoint, func, y0, times, **arguments), exact)
    assert len(OpaqueEngine.requests) == 1
    handed_over = gradients(odeint_adjoint, func, y0, times, **arguments, adjoint_options={"norm": "seminorm"})
    assert len(OpaqueEngine.requests) == 1
    torch.testing.assert_close(handed_over, exact, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------- who runs what


def engine_of(func, y0, **arguments):
    solution = solve(func, y0, TIMES["up"], **{"rtol": 1e-3, "atol": 1e-3, **arguments})
    return solution.stats.engine, solution.stats.reason


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ({"method": "explicit_adams", "options": {"step_size": 0.5}}, "tableau"),
        ({"method": "scipy_solver"}, "tableau"),
        ({"options": {"norm": lambda y: y.abs().max()}}, "norm"),
        ({"options": {"dtype": torch.float32}}, "float64"),
        ({"method": "rk4", "options": {"interp": "cubic"}}, "linearly"),
        ({"rtol": torch.full((3,), 1e-3)}, "element to element"),
    ],
)
def test_handed_over(arguments, reason):
    func, y0 = problem(None)
    with torch.no_grad():
        engine, why = engine_of(func, y0, **arguments)
        solution = solve(func, y0, TIMES["up"], **{"rtol": 1e-3, "atol": 1e-3, **arguments})
        expected = torchdiffeq.odeint(func, y0, TIMES["up"], **{"rtol": 1e-3, "atol": 1e-3, **arguments})
    assert engine == "torchdiffeq" and reason in why
    assert torch.equal(solution.ys, expected)


def test_handed_over_for_the_state_or_the_field():
    func, y0 = problem(None)
    func.callback_step = lambda t, y, dt: None
    assert "callbacks" in engine_of(func, y0)[1]
    del func.callback_step
    handle = func.register_forward_hook(lambda module, inputs, output: None)
    assert "forward hooks" in engine_of(func, y0)[1]
    handle.remove()
    assert engine_of(func, y0) == ("opaque", "")
    wrapped = with_divergence(nn.Bilinear(1, 3, 3).double().requires_grad_(False))
    wrapped.field.forward = lambda t, x: -x
    assert "not compiled" in engine_of(wrapped, (y0, y0[:, 0]))[1]
    assert engine_of(lambda t, y: -y, y0) == ("torchdiffeq", "func is not a compiled field")


def test_statistics_of_a_solve_handed_over():
    for times in (TIMES["up"], TIMES["down"]):
        watched = Watched(kinked)
        solution = solve(watched, start(), times, rtol=1e-4, atol=1e-4)
        stats = solution.stats
        assert (stats.nfe, stats.accepted, stats.rejected) == (
            watched.nfe, len(watched.accepted), len(watched.rejected),
        )  # fmt: skip
        assert stats.steps.tolist() == [list(step) for step in watched.accepted]
    stats = solve(kinked, start(), TIMES["up"], method="rk4").stats
    assert (stats.nfe, stats.accepted, stats.steps) == (80, None, None)
    assert "torchdiffeq" in repr(solution) and "[4, 6, 3] float64" in repr(solution)


def test_event():
    def fall(t, y):
        return torch.stack((y[1], torch.full_like(y[1], -9.81)))

    y0 = torch.tensor([10.0, 0.0], dtype=F64)
    arguments = dict(event_fn=lambda t, y: y[0], rtol=1e-8, atol=1e-8)
    solution = solve(fall, y0, torch.tensor([0.0, 1.0], dtype=F64), **arguments)
    assert solution.event_t.item() == pytest.approx(math.sqrt(20 / 9.81), abs=1e-7)
    assert solution.ys.shape == (2, 2) and "event_t" in repr(solution)
    event_t, ys = odeint(fall, y0, torch.tensor([0.0, 1.0], dtype=F64), **arguments)
    assert torch.equal(event_t, solution.event_t) and torch.equal(ys, solution.ys)
    height = y0.clone().requires_grad_()
    event_t, _ = odeint_event(fall, height, torch.tensor(0.0, dtype=F64), **arguments)
    event_t.backward()
    assert height.grad[0].item() == pytest.approx(1 / math.sqrt(2 * 9.81 * 10), rel=1e-5)


def test_event_on_a_compiled_field_with_noise():
    func, y0 = problem("hutchinson")
    arguments = dict(event_fn=lambda t, y: 0.5 - t + 0.0 * y[1].sum(), rtol=1e-4, atol=1e-4)
    torch.manual_seed(1)
    event_t, (xs, ls) = odeint(func, y0, torch.tensor([0.0, 1.0], dtype=F64), **arguments)
    assert func._drawn is not None and xs.shape == (2, 6, 3) and ls.shape == (2, 6)
    assert event_t.item() == pytest.approx(0.5, abs=1e-3)


def test_dense():
    t = torch.tensor
    ours = odeint_dense(kinked, start(), t(0.0, dtype=F64), t(1.0, dtype=F64), rtol=1e-6, atol=1e-6)
    points = torch.tensor([0.25, 0.5], dtype=F64)
    expected = torchdiffeq.odeint(kinked, start(), t([0.0, 0.25, 0.5], dtype=F64), rtol=1e-6, atol=1e-6)[1:]
    torch.testing.assert_close(torch.stack([ours(point) for point in points]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [None, dict(step_t=torch.tensor([0.7, 0.5], dtype=F64))])
def test_dense_backwards_in_time(options):
    times = torch.tensor([1.0, 0.6, 0.25, 0.0], dtype=F64)
    ours = odeint_dense(kinked, start(), times[0], times[-1], rtol=1e-6, atol=1e-6, options=options)
    expected = torchdiffeq.odeint(kinked, start(), times, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.stack([ours(point) for point in times]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["odeint", "odeint_adjoint", "odeint_event", "odeint_dense"])
def test_signatures_are_torchdiffeqs(name):
    """`import sparseflow_kernels as torchdiffeq` has everything torchdiffeq has."""
    theirs = inspect.signature(getattr(torchdiffeq, name)).parameters
    ours = inspect.signature(getattr(sparseflow_kernels, name)).parameters
    assert list(ours) == list(theirs) + (["gradient"] if name == "odeint_adjoint" else [])
    for parameter in theirs:
        assert ours[parameter].kind == theirs[parameter].kind
        if name != "odeint_event" or parameter != "odeint_interface":
            assert ours[parameter].default == theirs[parameter].default


def test_plain_callables_are_torchdiffeqs_to_the_bit():
    for arguments in ({}, {"method": "dopri8"}, {"method": "implicit_adams", "options": {"step_size": 0.2}}):
        ours, theirs = (call(kinked, start(), TIMES["up"], **arguments) for call in (odeint, torchdiffeq.odeint))
        assert torch.equal(ours, theirs)
    module = nn.Linear(3, 3).double()

    class Func(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, t, y):
            return self.module(y)

    results = []
    for interface in (odeint_adjoint, torchdiffeq.odeint_adjoint):
        module.zero_grad()
        interface(Func(), start(), TIMES["up"], rtol=1e-4, atol=1e-4)[-1].sum().backward()
        results.append(module.weight.grad.clone())
    assert torch.equal(*results)


# ------------------------------------------------------------------------------------------------- tsit5, any callable


@pytest.mark.parametrize("times", [TIMES["up"], TIMES["down"]], ids=["up", "down"])
def test_tsit5(times):
    fine = torchdiffeq.odeint(kinked, start(), times, rtol=1e-10, atol=1e-10)
    solution = solve(kinked, start(), times, method="tsit5", rtol=1e-8, atol=1e-8)
    assert solution.stats.engine == "numerics" and solution.stats.method == "tsit5"
    torch.testing.assert_close(solution.ys, fine, rtol=1e-5, atol=1e-5)
    steps = solution.stats.steps
    assert steps[0, 0] == times[0] and (steps[:, 1] > 0).all()

    def as_tuple(t, state):
        dy = kinked(t, torch.cat((state[0], state[1][..., None]), -1))
        return [dy[..., :2], dy[..., 2]]

    y0 = (start()[:, :2], start()[:, 2])
    ys = odeint(as_tuple, y0, times, method="tsit5", rtol=(1e-8, 1e-8), atol=1e-8)
    assert ys[0].shape == (len(times), 6, 2) and ys[1].shape == (len(times), 6)
    torch.testing.assert_close(torch.cat((ys[0], ys[1][..., None]), -1), fine, rtol=1e-5, atol=1e-5)

    loose = solve(kinked, start(), times, method="tsit5", options={"norm": lambda y: 1e-3 * y.abs().max()})
    assert loose.stats.nfe < solve(kinked, start(), times, method="tsit5").stats.nfe


def test_tsit5_gradient():
    y0 = start().requires_grad_()

    def run(y):
        return odeint(lambda t, y: torch.sin(y) * t, y, TIMES["up"][::10], method="tsit5", rtol=1e-9, atol=1e-9)

    reference = torch.autograd.grad(
        weighted_sum(torchdiffeq.odeint(lambda t, y: torch.sin(y) * t, y0, TIMES["up"][::10], rtol=1e-9, atol=1e-9)), y0
    )
    torch.testing.assert_close(torch.autograd.grad(weighted_sum(run(y0)), y0), reference, rtol=1e-6, atol=1e-6)


def test_tsit5_limits():
    y0, times = start(), TIMES["up"]
    with pytest.raises(ValueError, match="does not support events"):
        odeint(kinked, y0, times[:2], method="tsit5", event_fn=lambda t, y: y[0, 0])
    with pytest.raises(ValueError, match="continuous adjoint"):
        odeint_adjoint(nn.Identity(), y0, times, method="tsit5")
    with pytest.raises(TypeError, match="floating point or complex"):
        odeint(kinked, torch.ones(3, dtype=torch.int64), times, method="tsit5")
    with pytest.warns(UserWarning, match="Unexpected arguments"):
        odeint(kinked, y0, times, method="tsit5", options={"foo": 1})
    with pytest.warns(UserWarning, match="does not support callbacks"):
        odeint(Watched(kinked), y0, times, method="tsit5")


# ------------------------------------------------------------------------------------------------- per-tile, failures


def test_step_control_is_checked():
    func, y0 = problem(None)
    with pytest.raises(ValueError, match="'shared', 'per_tile' or 'per_sample'"):
        solve(func, y0, TIMES["up"], step_control="per_row")
    with pytest.raises(ValueError, match="records no common steps"):
        solve(func, y0, TIMES["up"], step_control="per_tile")
    with pytest.raises(ValueError, match="func is not a compiled field"):
        solve(kinked, y0, TIMES["up"], step_control="per_tile")


def test_failure_names_time_rows_and_keeps_what_was_reached():
    func, y0 = problem("exact")
    y0[0][4, 1] = math.nan
    words = r"^underflow in dt 0\.0: stopped at t = 0, 1 row\(s\) of the batch: 4\. "
    with pytest.raises(SolverError, match=words) as info:
        odeint(func, y0, TIMES["up"])
    assert info.value.rows == (4,) and info.value.status == "underflow"

    y0 = (start(), torch.zeros(6, dtype=F64))
    times = torch.tensor([1.0, 0.9, -3.0], dtype=F64)
    with pytest.raises(SolverError, match=r"^max_num_steps exceeded \(3>=3\): stopped at t = ") as info:
        odeint(func, y0, times, options={"max_num_steps": 3, "max_step": 0.1})
    error = info.value
    assert 0.0 < error.t < 0.9 and error.ys[0].shape == (3, 6, 3) and not error.ys[0].requires_grad
    finite = [bool(torch.isfinite(part).all()) for part in error.ys[0]]
    assert finite == [True, True, False]


# ----------------------------------------------------------------------------------------- outputs of dopri8, by solve


def rising(t, y):
    """y' = 7 t^6 in every component: dopri8 makes no error in it, and steps as far as it may."""
    return 7 * t**6 + 0 * y


def rising_field(engine):
    nothing = Pattern.from_mask(torch.zeros(1, 1, dtype=torch.bool))
    shift = TimeFunction(lambda t: (7 * t**6).reshape(1))
    layer = Layer(nothing, torch.zeros(0, dtype=F64), torch.zeros(1, dtype=F64), shift=shift)
    return PlainField(VectorField([layer]), engine)


RISING = {
    "plain": lambda: rising, "opaque": lambda: rising_field(OpaqueEngine),
    "reference": lambda: rising_field(ReferenceEngine), "native": lambda: rising_field(native_engine()),
}  # fmt: skip


def native_engine():
    pytest.importorskip("sparseflow_kernels._cpu")
    from sparseflow_kernels.engines.cpu import CpuEngine

    return CpuEngine


@pytest.mark.parametrize("make", RISING.values(), ids=RISING)
@pytest.mark.parametrize("times", [[0.0, 1.3], [0.0, 0.2, 1.3, 1.3 + 1e-9, 4.0], [1.3, 1.0, 0.0], [-2.0, -1.9, 1.0]])
def test_outputs_of_dopri8_are_as_accurate_as_its_steps(make, times):
    times = torch.tensor(times, dtype=F64, requires_grad=True)
    y0 = torch.full((2, 1), times[0].item() ** 7, dtype=F64, requires_grad=True)
    solution = solve(make(), y0, times, method="dopri8")
    expected = times.detach().pow(7)[:, None, None].expand(-1, 2, 1)
    torch.testing.assert_close(solution.ys, expected, rtol=1e-9, atol=1e-11)
    ends = solution.stats.steps[:, 0].tolist() + [times[-1].item()]
    assert set(times.tolist()) <= set(ends)
    solution.ys.sum().backward()
    torch.testing.assert_close(y0.grad, torch.full_like(y0, len(times)))
    torch.testing.assert_close(times.grad[1:], 2 * 7 * times.detach()[1:].pow(6), rtol=1e-6, atol=1e-9)


def test_odeint_reads_dopri8_as_torchdiffeq_does():
    times, y0 = torch.tensor([0.0, 1.3], dtype=F64), torch.zeros(1, 1, dtype=F64)
    theirs = torchdiffeq.odeint(rising, y0, times, method="dopri8")
    assert theirs[-1].item() > 1e3
    assert torch.equal(odeint(rising, y0, times, method="dopri8"), theirs)
    assert odeint(rising_field(OpaqueEngine), y0, times, method="dopri8")[-1].item() > 1e3


@pytest.mark.parametrize("kind", [None, "exact"])
@pytest.mark.parametrize("options", [{}, {"step_t": [0.9, 1.1]}, {"jump_t": [0.5, 0.6]}, {"max_step": 0.25}], ids=str)
def test_dopri8_by_solve(kind, options):
    """Against itself between tight stops, in every engine; gradients and all."""
    func, y0 = problem(kind)
    native = compiled(kind=kind, engine=native_engine())
    times = torch.tensor([1.5, 1.2, 0.5, 0.499, -0.3], dtype=F64)
    tight = solve(func, y0, times, method="dopri5", rtol=1e-12, atol=1e-12)
    found, steps = {}, {}
    reference = compiled(kind=kind, engine=ReferenceEngine)
    for name, field in {"opaque": func, "reference": reference, "native": native}.items():
        state = tuple(p.clone().requires_grad_() for p in (y0 if kind else (y0,)))
        tolerances = {"rtol": 1e-6, "atol": 1e-6}
        solution = solve(field, state if kind else state[0], times, method="dopri8", options=options, **tolerances)
        ys = solution.ys if kind else (solution.ys,)
        for ours, right in zip(ys, tight.ys if kind else (tight.ys,)):
            torch.testing.assert_close(ours, right, rtol=2e-5, atol=2e-5)
        assert set(times.tolist()) <= {*solution.stats.steps[:, 0].tolist(), times[-1].item()}
        torch.stack([part.pow(2).sum() for part in ys]).sum().backward()
        found[name], steps[name] = [p.grad for p in state], len(solution.stats.steps)
    for name in ("reference", "native"):
        assert steps[name] == steps["opaque"]
        for ours, right in zip(found[name], found["opaque"]):
            torch.testing.assert_close(ours, right, rtol=1e-6, atol=1e-6)


def test_dopri8_of_solves_that_no_engine_runs():
    """A norm of one's own, a tuple and complex numbers: by numerics; callbacks: by torchdiffeq."""
    times, y0 = torch.tensor([0.0, 1.3, 2.0], dtype=F64), torch.zeros(2, 1, dtype=F64)
    expected = times.pow(7)[:, None, None].expand(-1, 2, 1)
    for func in (rising, rising_field(OpaqueEngine)):
        solution = solve(func, y0, times, method="dopri8", options={"norm": lambda y: y.abs().max()})
        assert solution.stats.engine == "numerics"
        torch.testing.assert_close(solution.ys, expected, rtol=1e-9, atol=1e-11)
    solution = solve(lambda t, y: (rising(t, y[0]), -y[1]), (y0, torch.ones(1, dtype=F64)), times, method="dopri8")
    torch.testing.assert_close(solution.ys[0], expected, rtol=1e-9, atol=1e-11)
    solution = solve(lambda t, y: 1j * y, torch.ones(1, dtype=torch.complex128), times, method="dopri8")
    torch.testing.assert_close(solution.ys[:, 0], torch.exp(1j * times), rtol=1e-7, atol=1e-7)
    for sign, options in ((1, {}), (-1, {"step_t": torch.tensor([-1.0], dtype=F64)})):
        solution = solve(Watched(lambda t, y: sign * rising(t, y)), y0, sign * times, method="dopri8", options=options)
        assert solution.stats.engine == "torchdiffeq"
        torch.testing.assert_close(solution.ys, expected, rtol=1e-9, atol=1e-11)
    asked = {"stop_at_outputs": True}  # which every adaptive method and every call understands
    for ys in (
        odeint(rising, y0, times, method="dopri8", options=asked),
        solve(rising, y0, times, method="bosh3", options=asked).ys,
    ):  # fmt: skip
        torch.testing.assert_close(ys, expected, rtol=1e-5, atol=1e-6)


def test_the_step_after_an_output_is_as_long_as_the_one_before():
    """An output that cuts a step short says nothing about the field."""
    times = torch.tensor([0.0, 1.0, 1.0 + 1e-9, 2.0], dtype=F64)
    for func in (lambda t, y: -y, compiled(), compiled(engine=native_engine())):
        taken = solve(func, start(), times, method="dopri8", rtol=1e-5, atol=1e-5).stats.steps
        after = taken[taken[:, 0] > 1.0]
        assert after[0, 1] > 1e-2


def test_a_forward_mode_derivative_in_t_is_refused():
    field, y, t = compiled(engine=ReferenceEngine), torch.randn(3, 3).double(), torch.tensor([0.0, 1.0]).double()
    for method in ("rk4", "dopri5"):
        with pytest.raises(NotImplementedError, match="forward-mode.*backwards"):
            torch.func.jvp(lambda t: odeint(field, y, t, method=method), (t,), (torch.ones_like(t),))
