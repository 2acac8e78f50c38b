"""The triton engine's solves against the reference engine's: the same steps, the same counts, the same failures."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from cpu_cases import Wave, states
from random_fields import random_field
from triton_cases import DEVICE, F32, F64, close, on_device

from sparseflow_kernels import divergence
from sparseflow_kernels.engines.base import SolveRequest
from sparseflow_kernels.engines.reference import ReferenceEngine
from sparseflow_kernels.engines.triton import TritonEngine
from sparseflow_kernels.field import TimeFunction
from sparseflow_kernels.numerics.step_control import StepOptions
from sparseflow_kernels.numerics.tableaus import METHODS

BATCH = 9
GATED = random_field([2, 4, 3, 2], 0.8, gate=True, shift=True)
PLAIN = random_field([2, 4, 2], 0.8, activation="softplus")


def request_of(field, kind=None, method="dopri5", *, sign=1, times=(0.0, 0.3, 0.5, 1.0), tol=1e-5, batch=BATCH, **more):
    x, noise = (tensor.to(DEVICE) for tensor in states(batch, field.dim, field.dtype))
    tolerances = (tol,) if kind is None else (tol, 2 * tol)
    given = dict(
        x=x, l=None if kind is None else torch.linspace(0, 1, batch, dtype=x.dtype).to(DEVICE),
        times=torch.tensor(times, dtype=F64), sign=sign, tableau=METHODS[method], rtol=tolerances, atol=tolerances,
        options=StepOptions(), noise=noise if kind == "hutchinson" else None,
    )  # fmt: skip
    return SolveRequest(**given | more)


def both(field, kind=None, method="dopri5", form=None, **more):
    field = on_device(field)
    plan = None if kind is None else divergence.plan(field, kind)
    request = request_of(field, kind, method, **more)
    return TritonEngine(field, plan, form).solve(request), ReferenceEngine(field, plan).solve(request)


def same(got, want, bound=1e-10):
    counts = [(r.nfe, r.accepted, r.rejected, r.status, r.rows) for r in (got, want)]
    assert counts[0] == counts[1]
    close(got.steps, want.steps, bound, "steps")
    close(got.xs.nan_to_num(-7.0), want.xs.nan_to_num(-7.0), bound, "xs")
    assert (got.ls is None) == (want.ls is None)
    if want.ls is not None:
        close(got.ls.nan_to_num(-7.0), want.ls.nan_to_num(-7.0), bound, "ls")


@pytest.mark.parametrize("kind,sign", [(None, 1), ("exact", -1), ("hutchinson", 1)])
def test_dopri5(kind, sign):
    same(*both(GATED, kind, sign=sign, times=(0.0, 0.1, 0.4), tol=1e-4))


@pytest.mark.parametrize("method,tol", [
    ("tsit5", 1e-3), ("bosh3", 1e-3), ("adaptive_heun", 1e-2), ("dopri8", 1e-8),
])  # fmt: skip
def test_adaptive_methods(method, tol):
    # the error of dopri8 is all rounding here, and so would be the step sizes it chooses
    options = StepOptions(first_step=0.15 if method == "dopri8" else None)
    same(*both(PLAIN, "exact", method, tol=tol, times=(0.0, 0.15), options=options))


@pytest.mark.parametrize("method", ["midpoint", "rk4"])
def test_fixed_grids(method):
    grid = torch.linspace(0, 1, 3, dtype=F64)
    same(*both(GATED, "exact", method, grid=grid, perturb=method == "rk4", sign=-1))


def test_dense_matrices():
    same(*both(GATED, "exact", form="dense", times=(0.0, 0.5)))


@pytest.mark.parametrize("options", [
    dict(step_t=(0.2, 0.61), jump_t=(0.45,)), dict(min_step=0.3, first_step=0.01), dict(max_step=0.25),
    dict(first_step=9.0),
])  # fmt: skip
def test_options_of_steps(options):
    kind = "exact" if "jump_t" in options else None
    got, want = both(PLAIN, kind, options=StepOptions(**options), times=(0.0, 0.4, 0.44, 0.46, 0.7), tol=1e-3)
    same(got, want)


def test_too_many_steps_and_other_ends():
    got, want = both(GATED, options=StepOptions(max_num_steps=2), tol=1e-9)
    same(got, want)
    assert got.status == "max_num_steps" and got.xs[1:].isnan().all()
    got, want = both(PLAIN, "exact", options=StepOptions(min_step=torch.nan), times=(0.0, 1.0))
    assert got.status == want.status


def test_rows_that_are_not_finite_are_named():
    field = on_device(GATED)
    request = request_of(field)
    request.x[4, 1] = torch.nan
    got, want = TritonEngine(field).solve(request), ReferenceEngine(field).solve(request)
    same(got, want)
    assert got.status != "ok" and got.rows == (4,)


def test_rows_that_blow_up_are_named():
    field = random_field([2, 4, 2], 1.0, activation="cube", seed=1).map_tensors(lambda tensor: 3.0 * tensor)
    request = request_of(on_device(field), times=(0.0, 40.0), options=StepOptions(max_num_steps=9))
    request.x.mul_(0.01)
    request.x[5] = 3.0
    got, want = (engine(on_device(field)).solve(request) for engine in (TritonEngine, ReferenceEngine))
    assert (got.status, got.rows) == (want.status, want.rows) and got.status != "ok"


def test_functions_of_time_in_python():
    layers = list(GATED.layers)
    layers[0] = replace(layers[0], gate=TimeFunction(Wave(4, 1)))
    layers[1] = replace(layers[1], shift=TimeFunction(Wave(5, 2), torch.arange(3)))
    layers[2] = replace(layers[2], gate=TimeFunction(Wave(2, 3)))
    field = replace(GATED, layers=layers)
    same(*both(field, "exact", times=(0.0, 0.5)))
    same(*both(field, "exact", "midpoint", grid=torch.linspace(0, 1, 3, dtype=F64)))


def test_a_solver_is_used_again_and_new_values_arrive():
    field = on_device(PLAIN)
    plan = divergence.plan(field, "exact")
    engine, request = TritonEngine(field, plan), request_of(field, "exact", times=(0.0, 0.2), tol=1e-3)
    first = engine.solve(request)
    other = replace(request, x=2.0 * request.x, times=torch.tensor([0.2, 0.5], dtype=F64))
    same(engine.solve(other), ReferenceEngine(field, plan).solve(other))
    again = engine.solve(request)
    assert torch.equal(again.xs, first.xs) and torch.equal(again.ls, first.ls)
    moved = field.map_tensors(lambda tensor: 0.5 * tensor)
    assert engine.update(moved)
    same(engine.solve(request), ReferenceEngine(moved, plan).solve(request))


def test_memory_that_is_no_longer_kept_is_free_at_once():
    field = on_device(PLAIN)
    engine = TritonEngine(field)
    request = request_of(field, times=(0.0, 0.1), tol=1e-2, record=True)
    result = engine.solve(request)
    engine.solve_backward(request, result, torch.ones_like(result.xs), None, ("x",))
    held = [weakref.ref(part) for part in engine._held.values()]
    gc.disable()
    try:
        engine._held.clear()
        assert len(held) == 2 and not any(part() for part in held)
    finally:
        gc.enable()


def test_float32_takes_the_same_steps():
    field = on_device(random_field([3, 8, 3], 0.6, gate=True, dtype=F32))
    plan = divergence.plan(field, "exact")
    request = request_of(field, "exact", times=(0.0, 0.5), tol=1e-4)
    got, want = (engine(field, plan).solve(request) for engine in (TritonEngine, ReferenceEngine))
    same(got, want, 1e-5)
    assert got.xs.dtype == F32


def test_what_is_recorded():
    got, want = both(PLAIN, "exact", record=True, times=(0.0, 0.5, 1.0))
    same(got, want)
    close(got.states, want.states, what="states")
    assert got.derivatives.shape[1:] == got.xs.shape[1:] and got.derivatives.is_contiguous()
    x_slopes, l_slopes = got.slopes
    assert not x_slopes[0].any() and not l_slopes[0].any()
    field = on_device(PLAIN)
    dx, trace = ReferenceEngine(field, divergence.plan(field)).evaluate_with_divergence(1.0, want.xs[2])
    close(x_slopes[2], dx, 1e-3), close(l_slopes[2], -trace, 1e-3)


def test_one_output_and_no_rows():
    got, want = both(PLAIN, "exact", times=(0.25,))
    same(got, want)
    got, _ = TritonEngine(on_device(PLAIN)).solve(request_of(on_device(PLAIN), batch=0)), None
    assert got.xs.shape == (4, 0, 2) and got.status == "ok"


def test_what_it_cannot_do_is_said():
    field = on_device(PLAIN)
    engine = TritonEngine(field, divergence.plan(field))
    request = request_of(field, "exact")
    for control in ("per_tile", "per_sample"):
        with pytest.raises(ValueError, match=f"{control}.*engine='cuda'"):
            engine.solve(replace(request, step_control=control))
    with pytest.raises(ValueError, match=r"log-density channel must be \[9\]"):
        engine.solve(replace(request, l=request.l[:3]))
    with pytest.raises(ValueError, match=r"y0 must be \[batch, 2\]"):
        engine.solve(replace(request, x=request.x.float()))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs need a GPU")
def test_graphs_change_no_bit(monkeypatch):
    field = on_device(GATED)
    plan = divergence.plan(field)
    request = request_of(field, "exact", tol=1e-7)
    engine = TritonEngine(field, plan)
    replayed = engine.solve(request)
    assert not engine.notes
    monkeypatch.setenv("SPARSEFLOW_TRITON_GRAPHS", "0")
    plain = TritonEngine(field, plan).solve(request)
    assert torch.equal(replayed.xs, plain.xs) and torch.equal(replayed.ls, plain.ls) and replayed.nfe == plain.nfe


@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs need a GPU")
def test_evaluations_can_be_captured_and_solves_say_why_not():
    field = on_device(GATED)
    engine, request = TritonEngine(field), request_of(field)
    t, x = torch.tensor(0.3, dtype=F64, device=DEVICE), request.x.clone()
    want = engine.evaluate(t, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = engine.evaluate(t, x)
        with pytest.raises(RuntimeError, match="cannot be captured"):
            engine.solve(request)
    graph.replay()
    assert torch.equal(out, want)
