"""Whole solves of the CUDA engine: against the reference engine in float64, bit for bit against themselves, gone wrong."""

from __future__ import annotations

import ctypes
import math
from dataclasses import replace

import pytest
import torch
from cuda_cases import (  # noqa: F401
    DEVICE, F32, F64, ON_GPU, TestedEngine, close, dense_above, engine_on, field_of, on_device, poison, request_of,
    same_bits, states,
)  # fmt: skip
from test_cpu_solve import square_field

from sparseflow_kernels import divergence
from sparseflow_kernels.engines import cuda_solve
from sparseflow_kernels.engines.reference import ReferenceEngine
from sparseflow_kernels.numerics.step_control import StepOptions
from sparseflow_kernels.numerics.tableaus import ADAPTIVE, FIXED

KINDS = (None, "exact", "hutchinson")
TOLERANCE = {"dopri8": 1e-4, "dopri5": 1e-5, "tsit5": 1e-5, "bosh3": 1e-4, "fehlberg2": 1e-3, "adaptive_heun": 1e-3}
STEADY = StepOptions(first_step=0.11, min_step=0.11, max_step=0.11)  # without control nothing amplifies rounding
DOWN = (-2.0, -1.3, -1.29, 0.4)  # of decreasing time, as requests have it


def engines(field, kind=None, engine=TestedEngine):
    plan = kind and divergence.plan(field, kind)
    return engine(field, plan), ReferenceEngine(field, plan)


def counts(result):
    return result.nfe, result.accepted, result.rejected, result.status, result.rows


def same_solves(got, want, bound=1e-10):
    assert counts(got) == counts(want)
    close(got.steps, want.steps, max(bound, 1e-6), "steps")
    close(got.xs, want.xs, bound, "xs")
    close(got.ls, want.ls, bound, "ls")
    if want.status != "ok":
        assert (got.t, got.dt) == pytest.approx((want.t, want.dt), rel=1e-6)


def compare(field, kind, method="dopri5", *, engine=TestedEngine, batch=11, bound=1e-10, **more):
    ours, reference = engines(field, kind, engine)
    x, noise = states(batch, field.dim, seed=2)
    request = request_of(ours, x, noise, method, **more)
    found = ours.solve(request)
    same_solves(found, reference.solve(request), bound)
    return found


def compare_errors(field, kind, method, *, tolerance, **more):
    """Both are equally far from the exact solution: where rounding decides on steps, these need not be the same."""
    ours, reference = engines(field, kind)
    x, noise = states(11, field.dim, seed=2)
    request = request_of(ours, x, noise, method, tolerance=tolerance, **more)
    exact = reference.solve(request_of(ours, x, noise, method, tolerance=1e-12, **more))

    def error(result):
        assert result.status == "ok"
        parts = [result.xs - exact.xs, *([] if kind is None else [result.ls - exact.ls])]
        return max(part.abs().max().item() for part in parts)

    found = ours.solve(request)
    assert error(found) <= 1.1 * error(reference.solve(request)) + 1e-9
    return found


def use_tile(engine, request, tile):
    """Tiles of so many samples, and the fewest threads, for this request."""
    batch, stages, control = len(request.x), len(request.tableau.b), request.step_control
    plans = [plan for plan in engine.candidates(batch, stages, step_control=control) if plan.shape[0] == tile]
    plan = min(plans, key=lambda plan: plan.shape[3])
    engine.use(plan, batch, stages, step_control=control)
    return plan.shape


def same(one, other, rows=slice(None)) -> None:
    same_bits((one.xs, one.ls), (other.xs[:, rows], None if other.ls is None else other.ls[:, rows]))


# ------------------------------------------------------------------------------------------------ against the reference


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_methods(method, kind):
    for sign, times in ((1, (0.2, 0.9, 1.5)), (-1, DOWN)):
        given = dict(tolerance=TOLERANCE[method], sign=sign, times=times)
        # dopri8's first error estimates are rounding, which moves the steps and all that follows from them
        found = (compare_errors if method == "dopri8" else compare)(field_of(), kind, method, **given)
        assert found.accepted >= 2
        compare(field_of(), kind, method, sign=sign, times=times, options=STEADY, bound=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", FIXED)
def test_fixed_grids(method, kind):
    for sign, times, perturb in ((1, (0.2, 0.9, 1.5), False), (-1, DOWN, True)):
        times = torch.tensor(times, dtype=F64)
        grid = torch.cat([torch.arange(times[0].item(), times[-1].item(), 0.17, dtype=F64), times[-1:]])
        compare(field_of(), kind, method, sign=sign, times=times, grid=grid, perturb=perturb)
        compare(field_of(), kind, method, sign=sign, times=times, grid=times, perturb=perturb)


@pytest.mark.parametrize("times", [(0.2, 1.1), (0.7,), (0.0, 0.3, 0.6, 1.5)])
@pytest.mark.parametrize("options", [
    {"first_step": 0.3}, {"step_t": (0.31, 0.9)}, {"jump_t": (0.4, 1.0)}, {"step_t": (0.31, 0.9), "jump_t": (0.4,)},
    {"min_step": 0.04, "max_step": 0.05}, {"safety": 0.7, "ifactor": 3.0, "dfactor": 0.5}, {"min_step": 0.5},
    {"first_step": 9.0},
])  # fmt: skip
def test_options(options, times):
    compare(field_of(), "exact", times=times, options=StepOptions(**options))
    compare(field_of(), "hutchinson", engine=engine_on(multiprocessors=1), batch=70, times=times, options=StepOptions(**options))


def test_many_outputs_within_one_step_and_a_jump_among_them():
    """Outputs on, before and behind a jump are read off the step before it."""
    times = torch.linspace(0.0, 1.0, 60, dtype=F64)
    for options in ({}, {"jump_t": (times[20].item(), times[41].item())}, {"jump_t": (0.333, 0.9)}):
        compare(field_of(), "exact", times=times, tolerance=1e-3, options=StepOptions(**options))


def test_tolerances_per_component():
    """The step is limited by the log-density alone, then by the state alone."""
    for rtol, atol in (((1e-2, 1e-7), (1e-2, 1e-7)), ((1e-7, 1.0), (1e-8, 1.0))):
        compare(field_of(), "exact", rtol=rtol, atol=atol)


@pytest.mark.parametrize("depth", [0, 1, 3, 4])
def test_depths_and_batches(depth):
    field = field_of((2, *(7, 9, 6, 8)[:depth], 2), output_gate=False, seed=depth)
    for kind in ("exact", "hutchinson"):
        for batch in (1, 2, 100):
            compare(field, kind, batch=batch)


PLACES = {"shared": {}, "streamed": {"shared_per_block": 50_000}, "global": {"shared_per_block": 16_000}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_places_and_tiles(place, kind, dense_above):  # noqa: F811
    """States, activations and weights in every kind of memory; one block, several, and several tiles to each."""
    sizes, density = ((4, 150, 80, 4), 0.3) if place == "streamed" else ((4, 30, 17, 4), 0.5)
    field = field_of(sizes, density=density, activation="softplus")
    for dense, multiprocessors, method in ((2.0, 3, "dopri5"), (0.37, 1, "bosh3"), (0.37, 2, "rk4")):
        dense_above(dense)
        engine = engine_on(multiprocessors=multiprocessors, **PLACES[place])
        ours, reference = engines(field, kind, engine)
        x, noise = states(40 if place == "streamed" else 75, 4, seed=4)
        request = request_of(ours, x, noise, method, tolerance=1e-4, record=True)
        stages = len(request.tableau.b)
        wanted = reference.solve(request)
        plans = ours.candidates(len(x), stages)
        if place == "streamed":
            plans = [plan for plan in plans if not plan.resident][:2]
        elif place == "global":
            plans = [plan for plan in plans if plan.global_bytes][:3]
        else:
            plans = plans[:3]
        assert plans
        for plan in plans:
            ours.use(plan, len(x), stages)
            if not ON_GPU and multiprocessors < 3:
                assert plan.tiles > ours.plan_for(len(x), stages)[1]
            found = ours.solve(request)
            same_solves(found, wanted)
            if method == "rk4":
                continue
            assert found.states.shape[0] == found.accepted + 1
            same_bits(found.states[0], x)


def test_float32_is_as_close_as_torch():
    """Both against float64, same steps: the solver adds no error of its own."""
    field = field_of(dtype=F32)
    double = field.map_tensors(torch.Tensor.double)
    x, noise = states(200, 3, F32)
    options = StepOptions(first_step=0.1, max_step=0.1, min_step=0.1)
    for kind in ("exact", "hutchinson"):
        ours, torchs = engines(field, kind)
        request = request_of(ours, x, noise, options=options)
        wide = replace(request, x=x.double(), l=request.l.double(), noise=None if request.noise is None else noise.double())
        exact = ReferenceEngine(double, divergence.plan(double, kind)).solve(wide)
        found, by_torch = ours.solve(request), torchs.solve(request)
        assert counts(found) == counts(by_torch)
        for part in ("xs", "ls"):
            mine, theirs = ((getattr(r, part) - getattr(exact, part)).square().mean().sqrt() for r in (found, by_torch))
            assert mine <= 2 * theirs + 2e-8, part


# ------------------------------------------------------------------------------------------------------------------ bits


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_solves_repeat_bit_for_bit(method, dtype, monkeypatch):
    """In whatever order threads and blocks come: several blocks, and several tiles to a block."""
    field = field_of((4, 30, 17, 4), dtype)
    x, noise = states(30, 4, dtype)
    for kind in KINDS:
        for multiprocessors in (1, 3):
            engine = engines(field, kind, engine_on(multiprocessors=multiprocessors))[0]
            request = request_of(engine, x, noise, method, tolerance=1e-4, record=True)
            use_tile(engine, request, 8)
            use_tile(engine, replace(request, step_control="per_tile"), 8)
            wanted = engine.solve(request)
            for control in ("shared", "per_tile"):
                other = replace(request, step_control=control, record=control == "shared")
                first = engine.solve(other)
                for seed in ("1", "2025"):
                    monkeypatch.setenv("SPARSEFLOW_SHIM_SEED", seed)  # the order of threads on the host
                    again = engine.solve(other)
                    assert counts(again) == counts(first)
                    same(again, first)
                    same_bits(again.steps, first.steps)
                    if control == "shared":
                        same_bits((again.states, again.derivatives), (wanted.states, wanted.derivatives))
                monkeypatch.delenv("SPARSEFLOW_SHIM_SEED")


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_per_tile_is_the_shared_solve_of_each_tile(method, dtype):
    field = field_of(dtype=dtype, activation="silu")
    for kind in KINDS:
        engine = engines(field, kind, engine_on(multiprocessors=2))[0]
        stages = 7 if method == "dopri5" else 4
        for tile in (4, 16):
            x, noise = states(5 * tile + 3, 3, dtype)
            x[:tile] *= 20  # tiles that need different steps
            whole = request_of(engine, x, noise, method, times=(0.2, 0.9, 2.0), tolerance=1e-6, rtol=(0.0, 0.0), step_control="per_tile")
            shape = use_tile(engine, whole, tile)
            found = engine.solve(whole)
            parts = []
            for first in range(0, len(x), tile):
                rows = slice(first, first + tile)
                one = replace(whole, x=x[rows], step_control="shared", l=None if kind is None else whole.l[rows],
                              noise=None if whole.noise is None else noise[rows])  # fmt: skip
                alone = next(p for p in engine.candidates(len(one.x), stages) if p.shape == shape)
                engine.use(alone, len(one.x), stages)
                parts.append(engine.solve(one))
                same(parts[-1], found, rows)
            assert found.accepted == sum(part.accepted for part in parts)
            assert found.rejected == sum(part.rejected for part in parts)
            assert found.nfe == math.ceil(sum(part.nfe for part in parts) / len(parts))
            assert found.steps.shape == (0, 2)
            if method == "dopri5":
                assert len({part.nfe for part in parts}) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_per_sample_is_the_solve_of_each_sample(kind):
    field = field_of(activation="silu")
    ours, reference = engines(field, kind)
    x, noise = states(11, 3)
    x[:3] *= 20
    whole = request_of(ours, x, noise, times=(0.2, 0.9, 2.0), tolerance=1e-6, rtol=(0.0, 0.0), step_control="per_sample")
    for shape in sorted(plan.shape for plan in ours.candidates(11, 7, step_control="per_sample")):
        plan = next(p for p in ours.candidates(11, 7, step_control="per_sample") if p.shape == shape)
        ours.use(plan, 11, 7, step_control="per_sample")
        found = ours.solve(whole)
        parts = []
        for row in range(11):
            rows = slice(row, row + 1)
            one = replace(whole, x=x[rows], l=None if kind is None else whole.l[rows], step_control="shared",
                          noise=None if whole.noise is None else noise[rows])  # fmt: skip
            parts.append(reference.solve(one))
            close(found.xs[:, rows], parts[-1].xs)
            close(None if kind is None else found.ls[:, rows], parts[-1].ls)
        assert found.accepted == sum(part.accepted for part in parts) and found.rejected == sum(part.rejected for part in parts)
        assert found.nfe == math.ceil(sum(part.nfe for part in parts) / 11)
        assert len({part.nfe for part in parts}) > 1


# ------------------------------------------------------------------------------------------------------- what is recorded


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_steps_are_told(method, record):
    """Also where there are more than the engine expects at first."""
    ours, reference = engines(field_of(), "exact")
    ours._capacity = 2
    x, _ = states(9, 3)
    request = request_of(ours, x, method=method, times=(0.0, 1.0, 3.0), tolerance=1e-6, record=record)
    for _ in range(2):
        found, wanted = ours.solve(request), reference.solve(request)
        assert found.accepted == wanted.accepted > 4 and found.steps.shape == (found.accepted, 2)
        same_solves(found, wanted)


@pytest.mark.parametrize("capacity", [1, 2, 1000])
def test_a_solve_longer_than_expected_is_recorded_whole(capacity, monkeypatch):
    """However little memory is set aside for it at first, and whatever earlier solves took."""
    monkeypatch.setattr(cuda_solve, "FIRST_CAPACITY", 2)
    ours, _ = engines(field_of(), "exact")
    x, _ = states(9, 3)
    request = request_of(ours, x, times=(0.0, 1.0, 3.0), tolerance=1e-6, record=True)
    wanted = TestedEngine(field_of(), ours.plan).solve(replace(request, record=False))
    ours._capacity = capacity
    found = ours.solve(request)
    assert found.accepted == wanted.accepted > 4
    assert len(found.steps) == found.accepted
    assert len(found.states) == found.accepted + 1 and len(found.derivatives) == found.accepted + 1
    assert bool(found.states.isfinite().all()) and bool(found.derivatives.isfinite().all())
    ends = found.steps.sum(1)
    torch.testing.assert_close(ends[:-1], found.steps[1:, 0], rtol=1e-12, atol=1e-12)
    same(found, wanted)


def test_records_are_the_solution():
    ours, reference = engines(field_of(), "exact")
    x, _ = states(9, 3)
    request = request_of(ours, x, times=(0.0, 0.4, 1.0), sign=-1, record=True)
    found = ours.solve(request)
    for step, (t, _dt) in enumerate(found.steps.tolist()):
        close(found.derivatives[step], -reference.evaluate(-t, found.states[step]), 1e-8, f"derivative at {t}")
    # the slope of an interpolant at an output is about the field there
    close(found.slopes[0][1:], -torch.stack([reference.evaluate(-t, found.xs[i + 1]) for i, t in enumerate((0.4, 1.0))]), 1e-3)
    assert not found.slopes[0][0].any() and not found.slopes[1][0].any()


# ------------------------------------------------------------------------------------------------------------ gone wrong


@pytest.mark.parametrize("control", ["shared", "per_tile", "per_sample"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_are_named(value, control):
    field = field_of()
    for kind in KINDS:
        for multiprocessors in (1, 3):
            ours, reference = engines(field, kind, engine_on(multiprocessors=multiprocessors))
            x, noise = states(30, 3)
            x[3, 1] = x[25, 0] = value
            request = request_of(ours, x, noise, tolerance=1e-4, step_control=control)
            use_tile(ours, request, 1 if control == "per_sample" else 8)
            found = ours.solve(request)
            wanted = reference.solve(replace(request, step_control="shared"))
            assert found.status == wanted.status and found.t == wanted.t
            assert found.rows == wanted.rows == (3, 25)
            reached = found.xs[1:].isfinite().all(2).all(0)
            if control == "shared":
                assert bool(found.xs[1:].isnan().all())
            else:
                assert not bool(reached[[3, 25]].any()) and bool(reached.any())
            if control == "per_sample":
                assert int(reached.sum()) == 28


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("kind", [None, "exact"])
def test_rows_that_blow_up_are_named(kind, dtype):
    field = on_device(square_field(dtype))
    x = torch.full((30, 2), 0.1, dtype=dtype, device=DEVICE)
    x[2, 0] = x[25, 1] = 2.0  # infinite at t = 0.5
    for control in ("shared", "per_tile"):
        ours, _ = engines(field, kind)
        request = request_of(ours, x, tolerance=1e-4, times=(0.0, 0.25, 1.1), step_control=control)
        use_tile(ours, request, 8)
        found = ours.solve(request)
        assert found.status == "underflow" and found.rows == (2, 25)
        assert 0.45 <= found.t <= 0.55
        reached = found.xs.isfinite().all(2)
        assert bool(reached[:2].all()) and not bool(reached[2, [2, 25]].any())
        assert bool(reached[2].any()) == (control == "per_tile")


def test_outputs_that_were_not_reached_are_nan():
    field = on_device(square_field())
    x = torch.full((50, 2), 0.1, dtype=F64, device=DEVICE)
    x[2, 0] = 1.0  # infinite at t = 1
    for multiprocessors in (1, 3):
        ours, reference = engines(field, "exact", engine_on(multiprocessors=multiprocessors))
        request = request_of(ours, x, times=(0.0, 0.25, 0.5, 1.1, 1.2), tolerance=1e-4)
        found, wanted = ours.solve(request), reference.solve(request)
        assert bool(found.xs[:3].isfinite().all()) and bool(found.xs[3:].isnan().all()) and bool(found.ls[3:].isnan().all())
        assert (found.status, found.rows) == (wanted.status, wanted.rows)
        same_bits(found.xs.isnan().double(), wanted.xs.isnan().double())


def test_max_num_steps_and_min_step():
    for batch in (9, 70):
        ours, reference = engines(field_of(), "exact")
        request = request_of(ours, states(batch, 3)[0], tolerance=1e-9, options=StepOptions(max_num_steps=3))
        found, wanted = ours.solve(request), reference.solve(request)
        assert counts(found)[:4] == counts(wanted)[:4] and found.status == "max_num_steps" and found.rows
        assert (found.t, found.dt) == pytest.approx((wanted.t, wanted.dt), rel=1e-6)
    # steps of min_step are taken whatever their error, until the state is not finite
    field = on_device(square_field())
    x = torch.full((30, 2), 0.1, dtype=F64, device=DEVICE)
    x[7] = 2.0
    for kind in (None, "exact"):
        ours, reference = engines(field, kind)
        request = request_of(ours, x, times=(0.0, 5.0), tolerance=1e-6, options=StepOptions(min_step=0.1))
        found, wanted = ours.solve(request), reference.solve(request)
        assert found.status == wanted.status == "non_finite" and found.rows == wanted.rows == (7,)
        assert found.t == pytest.approx(wanted.t)


def test_a_failed_solve_leaves_nothing_behind():
    ours, _ = engines(field_of(), "hutchinson", engine_on(multiprocessors=1))
    x, noise = states(40, 3)
    request = request_of(ours, x, noise)
    wanted = ours.solve(request)
    bad = x.clone()
    bad[11] = float("nan")
    assert ours.solve(replace(request, x=bad)).status != "ok"
    same(ours.solve(request), wanted)


# ------------------------------------------------------------------------------------------------------------ robustness


def test_an_empty_batch_and_strides():
    ours, _ = engines(field_of(), "hutchinson")
    x, noise = states(10, 3)
    for method in ("dopri5", "rk4"):
        for control in ours.controls:
            empty = ours.solve(request_of(ours, x[:0], noise[:0], method, step_control=control))
            assert empty.xs.shape == (3, 0, 3) and empty.ls.shape == (3, 0) and empty.status == "ok"
    wanted = ours.solve(request_of(ours, x, noise))
    for view in (x.T.contiguous().T, torch.cat([x, x], 1)[:, :3]):
        same(ours.solve(request_of(ours, view, noise.T.contiguous().T)), wanted)


def test_bad_requests_are_refused():
    field = field_of()
    plain, hutchinson = TestedEngine(field), engines(field, "hutchinson")[0]
    x, noise = states(6, 3)
    for bad in (x.float(), x[:, :2], x[0], x.to("meta")):
        with pytest.raises(ValueError, match="y0 must be"):
            plain.solve(replace(request_of(plain, x), x=bad))
    good = request_of(hutchinson, x, noise)
    for l in (None, good.l[:5], good.l.float(), good.l[:, None], good.l.to("meta")):  # noqa: E741
        with pytest.raises(ValueError, match="log-density"):
            hutchinson.solve(replace(good, l=l))
    for bad in (noise[:5], noise.float(), noise[:, :2], noise.to("meta"), None):
        with pytest.raises(ValueError, match="noise "):
            hutchinson.solve(replace(good, noise=bad))
    with pytest.raises(ValueError, match="step_control must be one of"):
        plain.solve(replace(request_of(plain, x), step_control="per_moon"))


@pytest.mark.skipif(ON_GPU, reason="the word is written before the launch, where the host can write")
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("control", ["shared", "per_tile", "per_sample"])
def test_an_interrupted_solve_ends(method, control, monkeypatch):
    """What Ctrl-C does (CudaEngine._wait), with the word there from the beginning: no step is taken further."""
    field = field_of()
    engine = engine_on(multiprocessors=2)(field)
    launch = engine._launch

    def interrupted(function, plan, arguments):
        ctypes.c_int.from_address(arguments["stop"]).value = 1
        launch(function, plan, arguments)

    monkeypatch.setattr(engine, "_launch", interrupted)
    x, noise = states(40, 3)
    result = engine.solve(request_of(engine, x, noise, method, step_control=control))
    assert result.status == "interrupted" and result.accepted == 0
    assert bool(torch.isnan(result.xs[-1]).all()) and torch.equal(result.xs[0], x)
