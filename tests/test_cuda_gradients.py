"""The CUDA engine's gradients of evaluations and solves against the reference engine's autograd in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cuda_cases import (  # noqa: F401
    DEVICE, F32, F64, ON_GPU, T, TestedEngine, close, dense_above, engine_on, field_of, kernels_field, poison, request_of,
    same_bits, states,
)  # fmt: skip
from engine_fields import PlainField
from test_cpu_engine import forms

from sparseflow_kernels import divergence
from sparseflow_kernels.activations import ACTIVATIONS
from sparseflow_kernels.divergence_field import with_divergence
from sparseflow_kernels.engines import cuda_solve, shapes as shapes_of
from sparseflow_kernels.engines.reference import ReferenceEngine
from sparseflow_kernels.field import Activation
from sparseflow_kernels.numerics.step_control import StepOptions
from sparseflow_kernels.numerics.tableaus import ADAPTIVE, FIXED, Tableau
from sparseflow_kernels.odeint import odeint, solve

KINDS = (None, "exact", "hutchinson")
DENSITIES = (2.0, 0.37)
STEADY = StepOptions(first_step=0.11, min_step=0.11, max_step=0.11)
SIZES = ((3, 3), (2, 7, 2), (3, 8, 7, 3), (2, 5, 6, 5, 2), (2, 3, 4, 4, 3, 2))


def random(*shape, dtype=F64, seed=5):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype).to(DEVICE)


def compare_gradients(got, want, field, bound=1e-10):
    for name in ("t", "x", "l", "times"):
        close(getattr(got, name), getattr(want, name), bound, name)
    names = [name for name, _ in field.tensors()]
    for name, one, other in zip(names, got.tensors, want.tensors, strict=True):
        close(one, other, bound, name)


# ------------------------------------------------------------------------------------------------------------ evaluations


def of_evaluation(field, ours, bound=1e-11, batch=9):
    x, noise = states(batch, field.dim)
    probe = noise if ours.plan is not None and ours.plan.kind == "hutchinson" else None
    grad_trace = None if ours.plan is None else random(batch, seed=6)
    given = (T, x, probe, random(batch, field.dim), grad_trace, ("t", "x", "tensors"))
    compare_gradients(ours.evaluate_backward(*given), ReferenceEngine(field, ours.plan).evaluate_backward(*given), field, bound)


@pytest.mark.parametrize("seed", range(0, 60, 2))
def test_evaluations_of_all_kinds(seed, dense_above):  # noqa: F811
    dense_above(DENSITIES[seed // 2 % 2])
    field = kernels_field(seed)
    for name, plan in {"none": None, **forms(field)}.items():
        if name == "direct" and field.layers[-1].gate is not None:
            continue
        ours = TestedEngine(field, plan)
        assert ours.no_gradient(("x", "t", "tensors")) is None
        of_evaluation(field, ours)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations(activation, kind):
    params = {"softplus": (2.5, 3.0), "elu": (1.67,)}.get(activation, ())
    field = field_of((3, 9, 7, 3), activation=Activation(activation, params))
    of_evaluation(field, TestedEngine(field, kind and divergence.plan(field, kind)))


PLACES = {"shared": {}, "streamed": {"shared_per_block": 60_000}, "global": {"shared_per_block": 15_000}}


@pytest.mark.parametrize("dense", DENSITIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_every_launch_shape(place, kind, dense, dense_above):  # noqa: F811
    """Tiles in part, one and several to a block; gradients of all tiles add up."""
    dense_above(dense)
    sizes, density = ((4, 150, 80, 4), 0.3) if place == "streamed" else ((4, 20, 13, 4), 0.5)
    field = field_of(sizes, density=density, activation="softplus")
    ours = engine_on(multiprocessors=2, **PLACES[place])(field, kind and divergence.plan(field, kind))
    seen = set()
    for plan in ours.candidates(100, 1, "adjoint"):
        if {"shared": False, "streamed": plan.resident, "global": not plan.global_bytes}[place]:
            continue
        seen.add((plan.work_in_shared, plan.resident))
        tile = plan.shape[0]
        batches = {2 * tile + 1} if place == "streamed" else {1, tile - 1, 3 * tile + 1}
        for batch in batches - {0}:
            ours.use(next(p for p in ours.candidates(batch, 1, "adjoint") if p.shape == plan.shape), batch, 1, "adjoint")
            of_evaluation(field, ours, batch=batch, bound=1e-10)
    assert seen, place


def test_float32_shapes_agree():
    """Four samples to a thread, in the shapes that double precision does not have."""
    field = field_of((4, 30, 17, 4), F32)
    double = field.map_tensors(torch.Tensor.double)
    for kind in KINDS:
        ours = engine_on(multiprocessors=2)(field, kind and divergence.plan(field, kind))
        reference = ReferenceEngine(double, ours.plan)
        for plan in ours.candidates(75, 1, "adjoint"):
            ours.use(plan, 75, 1, "adjoint")
            x, noise = states(75, 4, F32)
            probe = noise if kind == "hutchinson" else None
            grads = random(75, 4, dtype=F32), None if kind is None else random(75, dtype=F32, seed=6)
            wanted = ("t", "x", "tensors")
            got = ours.evaluate_backward(T, x, probe, *grads, wanted)
            up = lambda tensor: None if tensor is None else tensor.double()  # noqa: E731
            want = reference.evaluate_backward(T, x.double(), up(probe), *map(up, grads), wanted)
            close(got.x.double(), want.x, 1e-5, f"x, {plan.shape}")
            close(got.t.double(), want.t, 1e-5, f"t, {plan.shape}")
            for one, other in zip(got.tensors, want.tensors, strict=True):
                close(one.double(), other, 1e-5, f"{plan.shape}")


# ----------------------------------------------------------------------------------------------------------------- solves


def gradients(engine, request, wanted, seed=7):
    result = engine.solve(request)
    grad_xs = random(*result.xs.shape, seed=seed).to(result.xs.dtype)
    grad_ls = None if result.ls is None else random(*result.ls.shape, seed=seed + 1).to(result.xs.dtype)
    result.xs = result.ls = None  # they may be gone
    return engine.solve_backward(request, result, grad_xs, grad_ls, wanted)


def of_solve(field, kind, method="dopri5", *, engine=TestedEngine, batch=9, bound=1e-9, use=None, wanted=None, **more):
    plan = kind and divergence.plan(field, kind)
    ours, reference = engine(field, plan), ReferenceEngine(field, plan)
    x, noise = states(batch, field.dim, seed=3)
    request = request_of(ours, x, noise, method, record=True, **more)
    names = ("tensors", "x") + (() if kind is None else ("l",))
    if isinstance(request.tableau, Tableau) and not request.options.step_t:
        names += ("times",)
    assert ours.no_gradient(names, request) is None
    if use is not None:
        use(ours)
    compare_gradients(gradients(ours, request, names), gradients(reference, request, names), field, bound)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES)
def test_solves(sizes, kind):
    """Both directions of time, outputs inside of steps, on their ends and one alone."""
    field = field_of(sizes)
    for sign, times in ((1, (0.0, 0.1, 0.15, 0.8, 1.2)), (-1, (-1.0, -0.2, 0.5)), (1, (0.4,))):
        of_solve(field, kind, sign=sign, times=times)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_methods(method, kind):
    field = field_of((3, 8, 3))
    tolerance = {"fehlberg2": 1e-3, "adaptive_heun": 1e-3}.get(method, 1e-5)
    of_solve(field, kind, method, times=(0.0, 0.2, 0.3, 0.7), options=STEADY, tolerance=tolerance)
    if method != "dopri8":  # whose steps are rounding here
        of_solve(field, kind, method, times=(0.0, 0.2, 0.3, 0.7), tolerance=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", FIXED)
def test_fixed_grids(method, kind):
    field, grid = field_of((3, 8, 3)), torch.tensor([-0.9, -0.5, -0.3, 0.2], dtype=F64)
    for perturb, sign in ((False, 1), (True, -1)):
        of_solve(field, kind, method, times=(-0.9, -0.6, -0.5, -0.1, 0.2), grid=grid, perturb=perturb, sign=sign)


def test_prescribed_steps_and_forced_ones():
    field = field_of((3, 8, 3))
    of_solve(field, "exact", options=StepOptions(step_t=(0.31, 0.8)))
    of_solve(field, "exact", options=StepOptions(min_step=0.3, first_step=0.3))
    of_solve(field, "hutchinson", options=StepOptions(max_step=0.05), times=(0.0, 0.5))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_solves_of_many_tiles(place, kind, dense_above):  # noqa: F811
    sizes, density = ((4, 150, 80, 4), 0.3) if place == "streamed" else ((4, 20, 13, 4), 0.5)
    field = field_of(sizes, density=density)
    for dense, method in ((2.0, "bosh3"), (0.37, "rk4")):
        dense_above(dense)
        stages = 4

        def use(engine):
            plans = [plan for plan in engine.candidates(21, stages, "adjoint") if plan.shape[0] <= 8]
            plans = [p for p in plans if {"shared": True, "streamed": not p.resident, "global": p.global_bytes}[place]]
            engine.use(plans[0], 21, stages, "adjoint")

        engine = engine_on(multiprocessors=2, **PLACES[place])
        of_solve(field, kind, method, engine=engine, batch=21, use=use, tolerance=1e-3, times=(0.2, 0.5, 0.7))


def test_a_solve_longer_than_expected(monkeypatch):
    monkeypatch.setattr(cuda_solve, "FIRST_CAPACITY", 2)
    for capacity in (1, 2, 1000):
        def use(engine, capacity=capacity):
            engine._capacity = capacity

        of_solve(field_of((3, 8, 3)), "exact", use=use, times=(0.0, 1.0, 3.0), tolerance=1e-6, bound=1e-8)


def test_gradients_repeat_bit_for_bit(monkeypatch):
    field = field_of()
    for kind in KINDS:
        ours = engine_on(multiprocessors=2)(field, kind and divergence.plan(field, kind))
        x, noise = states(40, 3)
        request = request_of(ours, x, noise, record=True, tolerance=1e-4)
        ours.use([plan for plan in ours.candidates(40, 7, "adjoint") if plan.shape[0] == 8][-1], 40, 7, "adjoint")
        wanted = gradients(ours, request, ("x", "tensors", "times"))
        for seed in ("0", "3", "44"):
            monkeypatch.setenv("SPARSEFLOW_SHIM_SEED", seed)  # the order of threads on the host
            found = gradients(ours, request, ("x", "tensors", "times"))
            same_bits((found.x, found.times, *found.tensors), (wanted.x, wanted.times, *wanted.tensors), kind, seed)


def test_float32_is_as_close_as_torch():
    field = field_of(dtype=F32)
    double = field.map_tensors(torch.Tensor.double)
    x, noise = states(60, 3, F32)
    for kind in KINDS:
        plan = kind and divergence.plan(field, kind)
        ours, torchs = TestedEngine(field, plan), ReferenceEngine(field, plan)
        request = request_of(ours, x, noise, options=replace(STEADY), record=True)
        up = lambda tensor: None if tensor is None else tensor.double()  # noqa: E731
        wide = replace(request, x=x.double(), l=up(request.l), noise=up(request.noise))
        exact, mine, theirs = (
            gradients(engine, r, ("x", "tensors"))
            for engine, r in ((ReferenceEngine(double, plan), wide), (ours, request), (torchs, request))
        )
        for name, *parts in zip(["x", *(n for n, _ in field.tensors())], *((g.x, *g.tensors) for g in (exact, mine, theirs))):
            scale = parts[0].abs().max().clamp(min=1e-3)
            a, b = (((part.double() - parts[0]) / scale).square().mean().sqrt() for part in parts[1:])
            assert a <= 2 * b + 2.0**-23, (kind, name, a, b)


# ---------------------------------------------------------------------------------------------------- through the front door


def test_training_through_odeint():
    """Parameters, states, l and times by autograd, then a step of an optimizer: new values, the same engine."""
    fields = [PlainField(field_of((3, 8, 7, 3)), engine) for engine in (TestedEngine, ReferenceEngine)]
    engine = fields[0].packed("exact")

    def renewed(kind=None):
        assert kind == "exact" and engine.update(fields[0].vector_field)
        return engine

    fields[0].packed = renewed
    optimizers = [torch.optim.Adam(field.parameters(), 0.05) for field in fields]
    x, _ = states(9, 3)
    for _ in range(3):
        losses = []
        for field, optimizer in zip(fields, optimizers):
            optimizer.zero_grad()
            ys, ls = odeint(with_divergence(field, "exact"), (x, x[:, 0] * 0), torch.tensor([0.0, 0.4, 1.0], dtype=F64), rtol=1e-5, atol=1e-5)
            losses.append(ys[1:].square().mean() + ls.mean())
            losses[-1].backward()
        close(losses[0].detach(), losses[1].detach(), 1e-9)
        for ours, theirs in zip(fields[0].parameters(), fields[1].parameters()):
            close(ours.grad, theirs.grad, 1e-8)
        for optimizer in optimizers:
            optimizer.step()
    assert engine.stamp >= 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES)
def test_gradients_after_new_values(sizes, kind, dense_above):  # noqa: F811
    for dense in DENSITIES:
        dense_above(dense)
        field = field_of(sizes)
        ours = TestedEngine(field, kind and divergence.plan(field, kind))
        of_evaluation(field, ours)
        generator = torch.Generator().manual_seed(9)
        for _ in range(2):
            field = field.map_tensors(lambda tensor: tensor + 0.3 * torch.randn(tensor.shape, generator=generator, dtype=F64).to(DEVICE))
            assert ours.update(field)
            of_evaluation(field, ours)


def test_per_tile_has_no_gradient():
    field = PlainField(field_of((3, 8, 3)), TestedEngine)
    x, _ = states(5, 3)
    times = torch.tensor([0.0, 1.0], dtype=F64)
    with pytest.raises(ValueError, match="records no common steps to differentiate through"):
        solve(field, x, times, step_control="per_tile")
    with torch.no_grad():
        assert solve(field, x, times, step_control="per_tile").stats.steps.shape == (0, 2)


def test_what_has_no_gradient_is_said():
    field = field_of()
    ours = TestedEngine(field, divergence.plan(field, "hutchinson"))
    x, noise = states(5, 3)
    assert "noise" in ours.no_gradient(("noise",))
    request = request_of(ours, x, noise, "rk4", record=True)
    assert "fixed grid" in ours.no_gradient(("times",), request) and "fixed grid" in ours.no_gradient(("grid",), request)
    jump = request_of(ours, x, noise, options=StepOptions(jump_t=(0.5,)))
    assert "jumps or steps" in ours.no_gradient(("x",), jump)
    assert ours.no_gradient(("x", "tensors", "times", "l"), request_of(ours, x, noise)) is None


def test_wrong_cotangents_are_refused():
    """Raw memory is read: as many numbers as there must be, of the right sort, in the right place."""
    field = field_of()
    ours = TestedEngine(field, divergence.plan(field, "exact"))
    x, _ = states(6, 3)
    f, trace = random(6, 3), random(6)
    good = (T, x, None, f, trace, ("x",))
    ours.evaluate_backward(*good)
    for bad in (f[:5], f[:, :2], f.float(), f.to("meta")):
        with pytest.raises(ValueError):
            ours.evaluate_backward(T, x, None, bad, trace, ("x",))
    for bad in (trace[:5], trace[:, None], trace.float(), trace.to("meta")):
        with pytest.raises(ValueError):
            ours.evaluate_backward(T, x, None, f, bad, ("x",))
    request = request_of(ours, x, record=True)
    result = ours.solve(request)
    grads = torch.ones_like(result.xs), torch.ones_like(result.ls)
    ours.solve_backward(request, result, *grads, ("x",))
    for bad in (grads[0][:2], grads[0][:, :5], grads[0].float(), grads[0].to("meta")):
        with pytest.raises(ValueError):
            ours.solve_backward(request, result, bad, grads[1], ("x",))
    for bad in (grads[1][:2], grads[1][:, :5], grads[1].float(), grads[1].to("meta")):
        with pytest.raises(ValueError):
            ours.solve_backward(request, result, grads[0], bad, ("x",))


def test_an_empty_batch_has_a_gradient():
    field = field_of()
    ours = TestedEngine(field)
    x = states(4, 3)[0][:0]
    got = ours.evaluate_backward(T, x, None, x, None, ("x", "tensors", "t"))
    assert got.x.shape == (0, 3) and not any(part.any() for part in got.tensors)
    request = request_of(ours, x, record=True)
    got = gradients(ours, request, ("x", "tensors"))
    assert got.x.shape == (0, 3) and not any(part.any() for part in got.tensors)


def test_a_cotangent_that_is_not_finite_stays_in_its_row():
    """Where no parameter is trained nobody else notices; the next call is clean."""
    field = field_of()
    for kind in KINDS:
        ours = engine_on(multiprocessors=1)(field, kind and divergence.plan(field, kind))
        x, noise = states(20, 3)
        probe, trace = noise if kind == "hutchinson" else None, None if kind is None else random(20)
        f = random(20, 3)
        wanted = ours.evaluate_backward(T, x, probe, f, trace, ("x",)).x
        bad = f.clone()
        bad[7, 1] = float("nan")
        found = ours.evaluate_backward(T, x, probe, bad, trace, ("x",)).x
        good = torch.arange(20, device=DEVICE) != 7
        same_bits(found[good], wanted[good])
        assert found[7].isnan().any()
        same_bits(ours.evaluate_backward(T, x, probe, f, trace, ("x",)).x, wanted)


@pytest.mark.parametrize("kind", ["forward", "adjoint"])
def test_tuning_uses_the_quickest_shape_and_remembers_it(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEFLOW_CACHE", str(tmp_path))
    engine = TestedEngine(field_of((3, 8, 3)))
    x, noise = states(19, 3)
    request = request_of(engine, x, noise, times=(0.0, 0.4))
    shapes = [plan.shape for plan in engine.candidates(19, 7, kind)]
    wanted, seen = sorted(shapes)[len(shapes) // 2], []

    def clock(run):
        run()
        seen.append(engine.plan_for(19, 7, kind)[0].shape)
        return 1.0 if seen[-1] == wanted else 2.0

    table = engine._tune(request, 1, kind, clock)
    assert table[0] == (wanted, 1.0) and sorted(shape for shape, _ in table) == sorted(seen) == sorted(shapes)
    for one in (engine, TestedEngine(field_of((3, 8, 3)))):  # and another process's
        assert one.plan_for(19, 7, kind)[0].shape == wanted
    other = {"forward": "adjoint", "adjoint": "forward"}[kind]
    assert shapes_of.tuned(engine._limits["name"], engine._signature(other, 19, 7, "shared")) is None
    if not ON_GPU:
        with pytest.raises(ValueError, match="on a GPU"):
            engine.tune(request, kind=kind)
    with pytest.raises(ValueError, match="no gradient of its own"):
        engine._tune(replace(request, step_control="per_tile"), 1, "adjoint", clock)
