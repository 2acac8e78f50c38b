"""Whole solves of the CPU engine: against torchdiffeq in float64, bit for bit against themselves, and gone wrong."""

from __future__ import annotations

import signal
import threading
from dataclasses import replace

import pytest
import torch
import torchdiffeq
from cpu_cases import Wave, in_a_process_of_its_own, states, threads  # noqa: F401
from engine_fields import PlainField
from fields import make_ffjord
from random_fields import jacobians, plain_forward, random_field

import sparseflow_kernels as sfk
from sparseflow_kernels import divergence
from sparseflow_kernels.divergence_field import with_divergence
from sparseflow_kernels.engines.base import SolveRequest
from sparseflow_kernels.engines.cpu import CpuEngine
from sparseflow_kernels.engines.reference import ReferenceEngine
from sparseflow_kernels.field import Activation, Layer, Pattern, TimeFunction, VectorField
from sparseflow_kernels.numerics.step_control import StepOptions
from sparseflow_kernels.numerics.tableaus import ADAPTIVE, FIXED, METHODS
from sparseflow_kernels.odeint import odeint, solve
from sparseflow_kernels.solution import SolverError

pytest.importorskip("sparseflow_kernels._cpu")
F32, F64 = torch.float32, torch.float64
TOLERANCE = {"dopri8": 1e-4, "dopri5": 1e-5, "bosh3": 1e-4, "fehlberg2": 1e-3, "adaptive_heun": 1e-3}
TIMES = {
    "up": torch.linspace(0.0, 1.5, 5, dtype=F64), "down": torch.tensor([2.0, 1.3, 1.29, -0.4], dtype=F64),
    "two": torch.tensor([0.2, 1.1], dtype=F64), "one": torch.tensor([0.7], dtype=F64),
}  # fmt: skip


class Oracle:
    """The field written out with torch's functions, its trace by autograd; counts evaluations, keeps steps."""

    def __init__(self, field: VectorField, kind: str | None = None, noise=None) -> None:
        self.field, self.kind, self.noise = field, kind, noise
        self.nfe, self.accepted, self.rejected = 0, [], 0

    def __call__(self, t, state):
        self.nfe += 1
        x = state if self.kind is None else state[0]
        f = lambda x: plain_forward(self.field, t, x)[0]  # noqa: E731
        if self.kind is None:
            return f(x)
        with torch.enable_grad():
            jacobian = jacobians(f, x).detach()
        if self.kind == "exact":
            return f(x), -jacobian.diagonal(dim1=1, dim2=2).sum(1)
        return f(x), -torch.einsum("bi,bij,bj->b", self.noise, jacobian, self.noise)


class WatchedOracle(Oracle):
    """With the callbacks that torchdiffeq's adaptive methods call."""

    def callback_accept_step(self, t0, y0, dt):
        self.accepted.append((t0.item(), dt.item()))

    def callback_reject_step(self, t0, y0, dt):
        self.rejected += 1


def field_of(dtype=F64, **options) -> VectorField:
    defaults = dict(density=0.5, activation="tanh", gate=True, shift=True, seed=5)
    return random_field((3, 12, 9, 3), dtype=dtype, **(defaults | options))


def compare(field, kind, method, times, *, tolerance=1e-10, batch=11, options=None, oracle_options=None, **more):
    x, noise = states(batch, field.dim, seed=2)
    compiled = PlainField(field, CpuEngine)
    y0 = x
    if kind is not None:
        compiled = with_divergence(compiled, kind, noise if kind == "hutchinson" else None)
        y0 = (x, torch.linspace(-1, 1, batch, dtype=F64))
    oracle = (WatchedOracle if method in ADAPTIVE else Oracle)(field, kind, noise)
    with torch.no_grad():
        # `solve` has dopri8 stop at the outputs
        ours = {**(options or {}), "stop_at_outputs": False} if method == "dopri8" else options
        found = solve(compiled, y0, times, method=method, options=ours, **more)
        wanted = torchdiffeq.odeint(oracle, y0, times, method=method, options=oracle_options or options, **more)
    assert found.stats.engine == "cpu"
    parts = zip((found.ys,), (wanted,)) if kind is None else zip(found.ys, wanted)
    for one, other in parts:
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    assert found.stats.nfe == oracle.nfe
    if method in ADAPTIVE:
        assert (found.stats.accepted, found.stats.rejected) == (len(oracle.accepted), oracle.rejected)
        steps = torch.tensor(oracle.accepted, dtype=F64).reshape(-1, 2)
        torch.testing.assert_close(found.stats.steps, steps, rtol=1e-6, atol=1e-9)
    return found, oracle


# ------------------------------------------------------------------------------------------------ against torchdiffeq


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("kind", [None, "exact", "hutchinson"])
@pytest.mark.parametrize("method", TOLERANCE)
def test_adaptive_methods(method, kind, direction):
    rtol = TOLERANCE[method]
    # dopri8's first error estimates are rounding, which moves the steps, and with them the outputs between them
    tolerance = 1e-8 if method == "dopri8" else 1e-10
    found, _ = compare(field_of(), kind, method, TIMES[direction], tolerance=tolerance, rtol=rtol, atol=rtol)
    assert found.stats.accepted >= 3


@pytest.mark.parametrize("kind", [None, "exact", "hutchinson"])
@pytest.mark.parametrize("method", TOLERANCE)
def test_steps_of_one_size(method, kind):
    """Without control nothing amplifies rounding."""
    options = {"first_step": 0.11, "min_step": 0.11, "max_step": 0.11}
    compare(field_of(), kind, method, TIMES["down"], tolerance=1e-13, options=options)


@pytest.mark.parametrize("kind", [None, "exact"])
def test_tsit5_against_the_reference_engine(kind):
    """torchdiffeq's own tsit5 has other coefficients."""
    field = field_of()
    x, _ = states(11, 3)
    y0 = x if kind is None else (x, torch.zeros(11, dtype=F64))
    found, wanted = (
        solve(PlainField(field, engine) if kind is None else with_divergence(PlainField(field, engine), kind), y0,
              TIMES["down"], method="tsit5", rtol=1e-5, atol=1e-5)
        for engine in (CpuEngine, ReferenceEngine)
    )  # fmt: skip
    for one, other in zip(*([ys] if kind is None else ys for ys in (found.ys, wanted.ys))):
        torch.testing.assert_close(one, other.detach(), rtol=1e-10, atol=1e-10)
    counts = [(s.stats.nfe, s.stats.accepted, s.stats.rejected) for s in (found, wanted)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("kind", [None, "exact", "hutchinson"])
@pytest.mark.parametrize("method", FIXED)
def test_fixed_methods(method, kind, times):
    compare(field_of(), kind, method, TIMES[times], options={"step_size": 0.17})


@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize("options", [{}, {"perturb": True}, {"step_size": 0.05, "perturb": True}])
def test_fixed_options(method, options):
    compare(field_of(), "exact", method, TIMES["down"], options=options)


@pytest.mark.parametrize("times", ["two", "one", "up"])
@pytest.mark.parametrize(
    "options",
    [{"first_step": 0.3}, {"step_t": (0.31, 0.9)}, {"jump_t": (0.4, 1.0)}, {"step_t": (0.9, 0.31), "jump_t": (0.4,)},
     {"min_step": 0.04, "max_step": 0.05}, {"safety": 0.7, "ifactor": 3.0, "dfactor": 0.5}, {"min_step": 0.5}],
)  # fmt: skip
def test_adaptive_options(options, times):
    tensors = {k: torch.tensor(v, dtype=F64) if isinstance(v, tuple) else v for k, v in options.items()}
    compare(field_of(), "exact", "dopri5", TIMES[times], rtol=1e-5, atol=1e-5, options=tensors)


def test_many_outputs_within_one_step_and_a_jump_among_them():
    """Outputs on, before and behind a jump are read off the step before it."""
    times = torch.linspace(0.0, 1.0, 60, dtype=F64)
    for options in ({}, {"jump_t": times[[20, 41]]}, {"jump_t": torch.tensor([0.333, 0.9], dtype=F64)}):
        compare(field_of(), "exact", "dopri5", times, rtol=1e-3, atol=1e-3, options=options)


def test_tolerances_per_component():
    """The step is limited by the log-density alone, then by the state alone."""
    for rtol, atol in (((1e-2, 1e-7), (1e-2, 1e-7)), ((1e-7, 1.0), (1e-8, 1.0)), ((1e-4, 1e-5), 1e-4)):
        compare(field_of(), "exact", "dopri5", TIMES["up"], rtol=rtol, atol=atol)


@pytest.mark.parametrize("batch", [1, 2, 100])
@pytest.mark.parametrize("depth", [0, 1, 3, 4])
def test_depths_and_batches(depth, batch):
    field = random_field((2, *(7, 9, 6, 8)[:depth], 2), 0.6, gate=True, shift=True, output_gate=False, seed=depth)
    for kind in ("exact", "hutchinson"):
        compare(field, kind, "dopri5", TIMES["up"], rtol=1e-5, atol=1e-5, batch=batch)


def test_functions_of_time():
    field = field_of()
    layers = [replace(layer, gate=TimeFunction(Wave(layer.out_features, n))) for n, layer in enumerate(field.layers)]
    layers[1] = replace(layers[1], shift=TimeFunction(Wave(layers[1].out_features, 9)))
    for kind in (None, "exact", "hutchinson"):
        for method in ("dopri5", "rk4"):
            compare(VectorField(layers), kind, method, TIMES["down"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["ignore", "concat", "concat_v2", "squash", "concatsquash"])
def test_modules_through_the_front_door(kind):
    torch.manual_seed(3)
    module = make_ffjord(kind, 3, (11, 8), "softplus").double()
    sfk.prune_weights_(module, keep=0.5)
    x, _ = states(9, 3)
    found = sfk.odeint(sfk.compile(module, engine="cpu"), x, TIMES["down"], rtol=1e-6, atol=1e-6)
    wanted = torchdiffeq.odeint(module, x, TIMES["down"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_float32_is_as_close_as_torch():
    """Both against float64, same steps: the solver adds no error of its own."""
    field = field_of(F32)
    x, noise = states(200, 3, F32)
    l = torch.zeros(200)  # noqa: E741
    errors = {}
    for kind in ("exact", "hutchinson"):
        given = noise if kind == "hutchinson" else None
        options = dict(rtol=1e-5, atol=1e-5, options={"first_step": 0.1, "max_step": 0.1, "min_step": 0.1})
        double = PlainField(field.map_tensors(torch.Tensor.double), ReferenceEngine)
        wide = with_divergence(double, kind, None if given is None else given.double())
        exact = solve(wide, (x.double(), l.double()), TIMES["up"], **options)
        for engine in (CpuEngine, ReferenceEngine):
            found = solve(with_divergence(PlainField(field, engine), kind, given), (x, l), TIMES["up"], **options)
            errors[engine] = [(f - w).square().mean().sqrt() for f, w in zip(found.ys, exact.ys)]
        for ours, torchs in zip(errors[CpuEngine], errors[ReferenceEngine]):
            assert ours <= 2 * torchs + 2e-8


# -------------------------------------------------------------------------------------------------------------- bits


def request_for(engine: CpuEngine, x, noise=None, *, method="dopri5", times=TIMES["two"], **more) -> SolveRequest:
    l = None if engine.plan is None else torch.zeros(len(x), dtype=x.dtype)  # noqa: E741
    n = 1 if l is None else 2
    tolerance = (1e-4,) * n
    grid = torch.linspace(times[0].item(), times[-1].item(), 4, dtype=F64) if method in FIXED else None
    return SolveRequest(
        x, l, times, 1, METHODS[method], tolerance, tolerance, more.pop("options", StepOptions()), grid=grid,
        noise=noise if engine.plan is not None and engine.plan.kind == "hutchinson" else None, **more,
    )  # fmt: skip


def engines_of(field: VectorField) -> dict[str, CpuEngine]:
    found = {kind: CpuEngine(field, divergence.plan(field, kind)) for kind in ("exact", "hutchinson")}
    return {"f": CpuEngine(field)} | found


def same(one, other, rows=slice(None)) -> bool:
    ls = one.ls is None or torch.equal(one.ls, other.ls[:, rows])
    return torch.equal(one.xs, other.xs[:, rows]) and ls


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", "rk4"])
def test_bits_of_a_solve_depend_on_neither_width_nor_threads(method, dtype, threads):  # noqa: F811
    field = random_field((4, 40, 33, 4), 0.3, activation="softplus", gate=True, shift=True, seed=3, dtype=dtype)
    for kind, engine in engines_of(field).items():
        widths = engine.program.widths()
        x, noise = states(2 * widths[-1] + 3, 4, dtype)
        request = request_for(engine, x, noise, method=method)
        engine.program.force_width(0)
        threads(1)
        wanted = engine.solve(request)
        assert wanted.status == "ok" and wanted.accepted >= 1
        for index in (*range(len(widths)), -1):
            for count in (1, 2, 4):
                threads(count)
                engine.program.force_width(index)
                found = engine.solve(request)
                assert same(found, wanted), (kind, index, count)
                assert torch.equal(found.steps, wanted.steps) and found.nfe == wanted.nfe


@pytest.mark.parametrize("dtype", [F32, F64])
def test_bits_of_a_wide_solve(dtype, threads):  # noqa: F811
    """Columns in several blocks."""
    field = random_field((5, 960, 901, 5), 0.05, activation="softplus", gate=True, output_gate=False, dtype=dtype)
    for kind, engine in engines_of(field).items():
        x, noise = states(100, 5, dtype)
        request = request_for(engine, x, noise, method="bosh3", times=torch.tensor([0.0, 0.3], dtype=F64))
        engine.program.force_width(0)
        wanted = engine.solve(request)
        for index in range(1, len(engine.program.widths())):
            threads(1 + index % 2)
            engine.program.force_width(index)
            assert same(engine.solve(request), wanted), (kind, index)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_bits_of_a_sample_do_not_depend_on_the_batch_when_the_steps_do_not(dtype):
    field = field_of(dtype)
    for kind, engine in engines_of(field).items():
        widths = engine.program.widths()
        x, noise = states(2 * widths[-1] + 3, 3, dtype)
        one_size = StepOptions(first_step=0.2, min_step=0.2, max_step=0.2)
        for method, options in (("rk4", StepOptions()), ("dopri5", one_size)):
            wanted = engine.solve(request_for(engine, x, noise, method=method, options=options))
            for width in widths:
                for batch in (1, width - 1, width + 1):
                    rows = slice(2, 2 + batch)
                    found = engine.solve(request_for(engine, x[rows], noise[rows], method=method, options=options))
                    assert same(found, wanted, rows), (kind, method, batch)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_per_tile_is_the_shared_solve_of_each_tile(method, dtype, threads):  # noqa: F811
    field = field_of(dtype, activation="sin")
    for kind, engine in engines_of(field).items():
        for index in (0, 2):
            engine.program.force_width(index)
            width = engine.program.widths()[index]
            x, noise = states(3 * width + 5, 3, dtype)
            x[:width] *= 30  # tiles that need different steps
            whole = request_for(engine, x, noise, method=method, times=TIMES["up"], step_control="per_tile")
            threads(2)
            found = engine.solve(whole)
            threads(1)
            parts = []
            for first in range(0, len(x), width):
                rows = slice(first, first + width)
                parts.append(engine.solve(request_for(engine, x[rows], noise[rows], method=method, times=TIMES["up"])))
                assert same(parts[-1], found, rows), (kind, index, first)
            assert found.accepted == sum(part.accepted for part in parts)
            assert found.rejected == sum(part.rejected for part in parts)
            assert found.nfe == -(-sum(part.nfe for part in parts) // len(parts))
            assert found.steps.shape == (0, 2) or method in FIXED
            if method == "dopri5":
                assert len({part.nfe for part in parts}) > 1


# --------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("direction", ["up", "down"])
def test_statistics(direction):
    x, _ = states(20, 3)
    times = TIMES[direction]
    stats = solve(PlainField(field_of(), CpuEngine), x, times, rtol=1e-6, atol=1e-6).stats
    sign = 1 if times[-1] > times[0] else -1
    assert stats.engine == "cpu" and stats.method == "dopri5" and stats.reason == ""
    assert stats.nfe == 2 + 6 * (stats.accepted + stats.rejected)
    steps = stats.steps
    assert steps.shape == (stats.accepted, 2) and steps.dtype == F64 and bool((steps[:, 1] > 0).all())
    torch.testing.assert_close(steps[1:, 0], steps[:-1, 0] + sign * steps[:-1, 1], rtol=1e-12, atol=1e-12)
    assert steps[0, 0] == times[0] and sign * (steps[-1, 0] + sign * steps[-1, 1] - times[-1]) >= 0
    fixed = solve(PlainField(field_of(), CpuEngine), x, times, method="rk4", options={"step_size": 0.1}).stats
    assert fixed.nfe == 4 * fixed.accepted and fixed.rejected == 0 and len(fixed.steps) == fixed.accepted


# -------------------------------------------------------------------------------------------------------- robustness


def test_empty_batch_and_strides():
    engine = CpuEngine(field_of())
    empty = engine.solve(request_for(engine, torch.zeros(0, 3, dtype=F64)))
    assert empty.xs.shape == (2, 0, 3) and empty.status == "ok"
    x, _ = states(10, 3)
    wanted = engine.solve(request_for(engine, x))
    assert same(engine.solve(request_for(engine, x.T.contiguous().T)), wanted)
    assert same(engine.solve(request_for(engine, torch.cat([x, x], 1)[:, :3])), wanted)


def test_bad_requests_are_refused():
    field = field_of()
    plain = CpuEngine(field)
    hutchinson = CpuEngine(field, divergence.plan(field, "hutchinson"))
    x, noise = states(6, 3)
    for bad in (x.float(), x[:, :2], x[0], x.to("meta")):
        with pytest.raises(ValueError, match="y0 must be"):
            plain.solve(request_for(plain, bad))
    good = request_for(hutchinson, x, noise)
    for l in (None, good.l[:5], good.l.float(), good.l[:, None]):  # noqa: E741
        with pytest.raises(ValueError, match="log-density"):
            hutchinson.solve(replace(good, l=l))
    for bad in (noise[:5], noise.float(), noise[:, :2]):
        with pytest.raises(ValueError, match="noise must"):
            hutchinson.solve(replace(good, noise=bad))


def test_a_missing_probe_is_refused():
    result = in_a_process_of_its_own("""
from sparseflow_kernels.engines.base import SolveRequest
from sparseflow_kernels.numerics.step_control import StepOptions
from sparseflow_kernels.numerics.tableaus import METHODS
field = random_field((3, 8, 3), 0.6)
engine = CpuEngine(field, divergence.plan(field, "hutchinson"))
x = torch.ones(4, 3, dtype=torch.float64)
times = torch.tensor([0.0, 1.0], dtype=torch.float64)
try:
    tolerance = (1e-3, 1e-3)
    l = x[:, 0].contiguous()
    engine.solve(SolveRequest(x, l, times, 1, METHODS["dopri5"], tolerance, tolerance, StepOptions()))
except ValueError as error:
    print("refused:", error)
""")
    assert result.returncode == 0 and result.stdout.startswith("refused: "), result


def square_field(dtype=F64) -> VectorField:
    """dy/dt = y^2 in two coordinates: blows up at t = 1 / y0."""
    eye = Pattern.from_mask(torch.eye(2, dtype=torch.bool))
    one, zero = torch.ones(2, dtype=dtype), torch.zeros(2, dtype=dtype)
    return VectorField([Layer(eye, one, zero, activation=Activation("square")), Layer(eye, one, zero)])


@pytest.mark.parametrize("step_control", ["shared", "per_tile"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", [None, "exact", "hutchinson"])
def test_rows_that_are_not_finite_are_named(kind, value, step_control):
    field = PlainField(field_of(), CpuEngine)
    x, _ = states(300, 3)
    x[3, 1] = x[131, 0] = value
    y0 = x if kind is None else (x, torch.zeros(300, dtype=F64))
    with pytest.raises(SolverError) as caught, torch.no_grad():
        solve(field if kind is None else with_divergence(field, kind), y0, TIMES["up"], rtol=1e-4, atol=1e-4,
              step_control=step_control)  # fmt: skip
    assert caught.value.status in ("underflow", "non_finite") and caught.value.t == 0.0
    assert caught.value.rows == (3, 131)
    assert "2 row(s) of the batch: 3, 131" in str(caught.value)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("kind", [None, "exact"])
def test_rows_that_blow_up_are_named(kind, dtype):
    field = PlainField(square_field(dtype), CpuEngine)
    x = torch.full((150, 2), 0.1, dtype=dtype)
    x[2, 0] = x[140, 1] = 2.0  # infinite at t = 0.5
    y0 = x if kind is None else (x, torch.zeros(150, dtype=dtype))
    with pytest.raises(SolverError) as caught, torch.no_grad():
        solve(field if kind is None else with_divergence(field, kind), y0, TIMES["up"], rtol=1e-4, atol=1e-4)
    assert caught.value.rows == (2, 140)
    assert 0.45 <= caught.value.t <= 0.55


def test_outputs_that_were_not_reached_are_nan():
    field = square_field()
    x = torch.full((150, 2), 0.1, dtype=F64)
    x[2, 0] = 1.0  # infinite at t = 1
    times = torch.tensor([0.0, 0.25, 0.5, 1.1, 1.2], dtype=F64)
    for engine in (ReferenceEngine, CpuEngine):
        with pytest.raises(SolverError) as caught, torch.no_grad():
            solve(PlainField(field, engine), x, times, rtol=1e-4, atol=1e-4)
        ys = caught.value.ys
        assert bool(ys[:3].isfinite().all()) and bool(ys[3:].isnan().all()), engine.name


def test_max_num_steps_and_min_step():
    x, _ = states(10, 3)
    field = field_of()
    caught = {}
    for engine in (CpuEngine, ReferenceEngine):
        with pytest.raises(SolverError, match=r"max_num_steps exceeded \(3>=3\)") as error, torch.no_grad():
            solve(PlainField(field, engine), x, TIMES["up"], rtol=1e-9, atol=1e-9, options={"max_num_steps": 3})
        caught[engine.name] = error.value
    assert caught["cpu"].status == "max_num_steps"
    assert caught["cpu"].t == pytest.approx(caught["reference"].t, rel=1e-6)
    # steps of min_step are taken whatever their error, until the state is not finite
    blow_up = square_field()
    for engine in (CpuEngine, ReferenceEngine):
        with pytest.raises(SolverError) as error, torch.no_grad():
            solve(PlainField(blow_up, engine), torch.full((3, 2), 2.0, dtype=F64), torch.tensor([0.0, 5.0], dtype=F64),
                  rtol=1e-6, atol=1e-6, options={"min_step": 0.1})  # fmt: skip
        caught[engine.name] = error.value
    assert caught["cpu"].status == caught["reference"].status == "non_finite"
    assert caught["cpu"].rows == (0, 1, 2)


def test_torchdiffeq_dies_of_the_same():
    x = torch.tensor([[2.0, 0.1]], dtype=F64)
    times = torch.tensor([0.0, 1.0], dtype=F64)
    with pytest.raises(AssertionError, match="underflow in dt"):
        torchdiffeq.odeint(Oracle(square_field()), x, times, rtol=1e-4, atol=1e-4)
    with pytest.raises(AssertionError, match="underflow in dt"):
        odeint(PlainField(square_field(), CpuEngine), x, times, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("step_control", ["shared", "per_tile"])
def test_functions_of_time_may_fail_on_any_thread(step_control, threads):  # noqa: F811
    threads(2)
    calls = []

    def failing(t):
        calls.append(t.item())
        if t > 0.4:
            raise ZeroDivisionError("at a stage")
        return torch.ones(3, dtype=F64)

    field = field_of()
    field = VectorField([*field.layers[:-1], replace(field.layers[-1], gate=TimeFunction(failing))])
    engine = CpuEngine(field)
    engine.program.force_width(0)  # choosing by the clock would call the function too
    x, _ = states(300, 3)
    with pytest.raises(ZeroDivisionError, match="at a stage"):
        engine.solve(request_for(engine, x, step_control=step_control))
    assert any(0.0 <= t <= 0.4 for t in calls)
    torch.testing.assert_close(engine.evaluate(0.3, x), plain_forward(field, torch.tensor(0.3, dtype=F64), x)[0])


def test_an_interrupt_ends_a_solve():
    """Ctrl-C, by an alarm that raises what Ctrl-C raises."""
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals reach the main thread only")
    engine = CpuEngine(field_of())
    x, _ = states(64, 3)
    grid = torch.linspace(0.0, 1.0, 2_000_001, dtype=F64)
    request = replace(request_for(engine, x, method="rk4", times=torch.tensor([0.0, 1.0], dtype=F64)), grid=grid)

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            engine.solve(request)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    assert engine.solve(request_for(engine, x)).status == "ok"


def test_memory_grows_with_the_state_not_with_the_hidden_layers():
    """Peak memory of a solve of 20000 samples less that of 1000: states, nothing of the size of the activations."""
    result = in_a_process_of_its_own("""
import resource, sys
import sparseflow_kernels as sfk
from sparseflow_kernels.engines.base import SolveRequest
from sparseflow_kernels.numerics.step_control import StepOptions
from sparseflow_kernels.numerics.tableaus import METHODS
sfk.set_num_threads(2)
field = random_field((8, 860, 860, 8), 0.01, activation="relu", dtype=torch.float32)
engine = CpuEngine(field, divergence.plan(field, "hutchinson"))
def run(batch):
    x = torch.ones(batch, 8)
    times = torch.tensor([0.0, 0.1], dtype=torch.float64)
    tolerance = (1e-3, 1e-3)
    l = x[:, 0].contiguous()
    engine.solve(SolveRequest(x, l, times, 1, METHODS["euler"], tolerance, tolerance, StepOptions(), grid=times, noise=x))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
run(1000)
before = run(1000)
print(run(20000) - before)
""")
    assert result.returncode == 0, result.stderr[-1000:]
    growth = int(result.stdout)
    # x, noise, five states, the outputs: 10 arrays of 20000 x 9 floats are 7 MB; one layer's activations would be 69
    assert growth < 20000 * 860 * 4 / 4, growth


def test_a_forked_child_solves_with_threads_of_its_own():
    result = in_a_process_of_its_own("""
import os
import sparseflow_kernels as sfk
sfk.set_num_threads(2)
field = sfk.compile(random_field((3, 40, 3), 0.5), engine="cpu")
x, t = torch.randn(2000, 3, dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
with torch.no_grad():
    wanted = sfk.odeint(field, x, t)
    for _ in range(3):
        child = os.fork()
        if child == 0:
            same = torch.equal(sfk.odeint(field, x, t), wanted)
            os._exit(0 if same else 3)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0, status
    assert torch.equal(sfk.odeint(field, x, t), wanted)
print("done")
""")
    assert result.returncode == 0 and result.stdout.strip() == "done", result


def test_asking_for_the_workspace_blocks_no_other_thread():
    """The engine's lock may wait for the interpreter (functions of time), so nobody may wait for it holding that."""
    result = in_a_process_of_its_own("""
import faulthandler, threading
from dataclasses import replace
from sparseflow_kernels.field import TimeFunction, VectorField
faulthandler.dump_traceback_later(10, exit=True)
layers = random_field((3, 8, 3), 0.5).layers
one = TimeFunction(lambda t: torch.ones(8, dtype=torch.float64) * t)
engine = CpuEngine(VectorField([replace(layers[0], gate=one), layers[1]]))
x = torch.zeros(50, 3, dtype=torch.float64)
def work():
    for _ in range(500):
        engine.evaluate(0.3, x)
worker = threading.Thread(target=work)
worker.start()
while worker.is_alive():
    engine.program.workspace_bytes(0)
print("done")
""")
    assert result.stdout.strip() == "done", result.stderr[-1000:]


def test_python_threads_share_an_engine(threads):  # noqa: F811
    threads(2)
    layers = field_of().layers
    field = VectorField([replace(layers[0], gate=TimeFunction(Wave(12, 4))), *layers[1:]])
    shared, own = CpuEngine(field), [CpuEngine(field) for _ in range(4)]
    x, _ = states(200, 3)
    wanted = shared.solve(request_for(shared, x))
    found: list = []

    def work(engine):
        for _ in range(5):
            found.append(same(engine.solve(request_for(engine, x)), wanted))

    workers = [threading.Thread(target=work, args=(engine,)) for engine in (*own, shared, shared)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 30 and all(found)
