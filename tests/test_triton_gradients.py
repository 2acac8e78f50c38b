"""The triton engine's gradients of evaluations and solves against the reference engine's autograd."""

from __future__ import annotations

import pytest
import torch
from cpu_cases import states
from random_fields import random_field
from test_cpu_engine import any_field, forms
from test_triton_solve import GATED, PLAIN, request_of
from triton_cases import DEVICE, F64, INTERPRETED, close, on_device

from sparseflow_kernels import divergence
from sparseflow_kernels.engines.reference import ReferenceEngine
from sparseflow_kernels.engines.triton import TritonEngine
from sparseflow_kernels.engines.triton import forms as triton_forms
from sparseflow_kernels.engines.triton import solve as triton_solve
from sparseflow_kernels.engines.triton.forms import Tile
from sparseflow_kernels.numerics.step_control import StepOptions

T = 0.375


def compare_gradients(got, want, field, bound=1e-10):
    for name in ("t", "x", "l", "times"):
        close(getattr(got, name), getattr(want, name), bound, name)
    names = [name for name, _ in field.tensors()]
    for name, one, other in zip(names, got.tensors, want.tensors, strict=True):
        close(one, other, bound, name)


def of_evaluation(field, batch=9, only=None, form=None):
    field = on_device(field)
    generator = torch.Generator().manual_seed(5)
    x, noise = (tensor.to(DEVICE) for tensor in states(batch, field.dim))
    grad_f = torch.randn(batch, field.dim, generator=generator, dtype=F64).to(DEVICE)
    grad_trace = torch.randn(batch, generator=generator, dtype=F64).to(DEVICE)
    done = 0
    for name, plan in [("none", None), *forms(field).items()]:
        if (only is not None and name not in only) or TritonEngine(field, plan).no_gradient(("x",)) is not None:
            continue
        probe = noise if plan is not None and plan.kind == "hutchinson" else None
        given = (T, x, probe, grad_f, None if plan is None else grad_trace, ("t", "x", "tensors"))
        got = TritonEngine(field, plan, form).evaluate_backward(*given)
        want = ReferenceEngine(field, plan).evaluate_backward(*given)
        got.t = got.t.to(DEVICE)  # it comes where the time was given
        compare_gradients(got, want, field)
        done += 1
    return done


@pytest.mark.parametrize("seed", [0, 2, 11, 12, 13, 14])
def test_evaluations_of_all_kinds(seed):
    of_evaluation(any_field(seed))


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_evaluations_with_gates_and_shifts_on_every_layer(depth):
    sizes = [3, *(7, 6, 5)[:depth], 3]
    field = random_field(sizes, 0.7, activation="softplus" if depth % 2 else "tanh", gate=True, shift=True, seed=depth)
    assert of_evaluation(field, form="dense" if depth == 2 else None) >= 3


@pytest.mark.parametrize("activation", ["sigmoid", "elu", "silu", "cube"])
def test_evaluations_of_activations(activation):
    of_evaluation(random_field([2, 5, 4, 2], 0.8, activation=activation), only=("hutchinson", "chosen"))


@pytest.mark.skipif(not INTERPRETED, reason="a GPU has tiles of its own")
def test_more_entries_and_samples_than_a_tile(monkeypatch):
    monkeypatch.setitem(triton_forms.INTERPRETED, "gradient", Tile(8, 16, 1, 1))
    monkeypatch.setitem(triton_forms.INTERPRETED, "sparse", Tile(4, 16, 2, 1))
    of_evaluation(random_field([3, 6, 5, 3], 0.7, gate=True), batch=50, only=("chosen",))


def of_solve(field, kind=None, method="dopri5", form=None, wanted=("x", "l", "tensors"), **more):
    field = on_device(field)
    plan = None if kind is None else divergence.plan(field, kind)
    request = request_of(field, kind, method, record=True, tol=1e-2, **more)
    engine, reference = TritonEngine(field, plan, form), ReferenceEngine(field, plan)
    assert engine.no_gradient(wanted, request) is None
    result = engine.solve(request)
    generator = torch.Generator().manual_seed(7)
    grad_xs = torch.randn(result.xs.shape, generator=generator, dtype=F64).to(DEVICE)
    grad_ls = None if kind is None else torch.randn(result.ls.shape, generator=generator, dtype=F64).to(DEVICE)
    got = engine.solve_backward(request, result, grad_xs, grad_ls, wanted)
    want = reference.solve_backward(request, reference.solve(request), grad_xs, grad_ls, wanted)
    compare_gradients(got, want, field)
    return lambda: engine.solve_backward(request, result, grad_xs, grad_ls, wanted), got


@pytest.mark.parametrize("kind,sign,times", [(None, 1, (0.0, 0.1)), ("exact", -1, (0.0, 0.12, 0.15, 0.3)),
                                             ("hutchinson", 1, (0.0, 0.3))])
def test_solves(kind, sign, times):
    options = StepOptions(first_step=0.2)
    of_solve(GATED, kind, sign=sign, times=times, wanted=("x", "l", "times", "tensors"), options=options)


def test_solves_whose_stages_were_not_kept(monkeypatch):
    monkeypatch.setattr(triton_solve, "STAGE_BYTES", 0)
    of_solve(PLAIN, "exact", times=(0.0, 0.5), options=StepOptions(first_step=0.3), form="dense")


@pytest.mark.parametrize("method", ["bosh3", "fehlberg2"])
def test_other_methods(method):
    of_solve(PLAIN, "exact", method, times=(0.0, 0.25), options=StepOptions(first_step=0.15))


@pytest.mark.parametrize("method", ["euler", "rk4"])
def test_fixed_grids_and_repeated_bits(method):
    grid, times = torch.linspace(0, 1, 3, dtype=F64), (0.0, 0.3, 1.0)
    backward, first = of_solve(PLAIN, "exact", method, grid=grid, times=times, perturb=method == "rk4")
    if method == "euler":
        assert all(torch.equal(one, other) for one, other in zip(first.tensors, backward().tensors))


def test_one_output():
    of_solve(PLAIN, "exact", times=(0.25,))


@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_new_values_arrive(form):
    field = on_device(GATED)
    other = field.map_tensors(lambda tensor: 0.5 * tensor + 0.1)
    x, noise = (tensor.to(DEVICE) for tensor in states(9, 2))
    for kind in ("exact", "hutchinson"):
        plan = divergence.plan(field, kind)
        given = (T, x, noise if kind == "hutchinson" else None, x, x[:, 0], ("x", "tensors"))
        engine = TritonEngine(field, plan, form)
        engine.evaluate_backward(*given)
        assert engine.update(other)
        compare_gradients(engine.evaluate_backward(*given), ReferenceEngine(other, plan).evaluate_backward(*given), other)


def test_no_rows():
    field = on_device(PLAIN)
    engine = TritonEngine(field, divergence.plan(field))
    none = torch.zeros(0, 2, dtype=F64, device=DEVICE)
    found = engine.evaluate_backward(T, none, None, none, none[:, 0], ("x", "t", "tensors"))
    assert found.x.shape == (0, 2) and not any(bool(part.any()) for part in found.tensors)


def test_what_has_no_gradient_here():
    field = on_device(PLAIN)
    engine = TritonEngine(field, divergence.plan(field))
    assert "noise" in engine.no_gradient(("noise",))
    jump = request_of(field, "exact", options=StepOptions(jump_t=(0.3,)))
    assert "jumps" in engine.no_gradient(("x",), jump)
    fixed = request_of(field, "exact", "rk4", grid=torch.linspace(0, 1, 3, dtype=F64))
    assert "grid" in engine.no_gradient(("times",), fixed) and engine.no_gradient(("x",), fixed) is None
