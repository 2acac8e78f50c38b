"""The reference engine against plainly written formulas and autograd's Jacobian, and the choice of engines."""

import pytest
import torch
from random_fields import jacobians, plain_forward, random_field

from sparseflow_kernels import engines
from sparseflow_kernels.activations import ACTIVATIONS
from sparseflow_kernels.divergence import plan
from sparseflow_kernels.engines import available, choose, reference
from sparseflow_kernels.engines.base import SolveRequest
from sparseflow_kernels.engines.reference import ReferenceEngine
from sparseflow_kernels.field import Activation, TimeFunction, UnsupportedFieldError
from sparseflow_kernels.numerics.step_control import StepOptions
from sparseflow_kernels.numerics.tableaus import METHODS

T = torch.tensor(-0.6, dtype=torch.float64)
SIZES = {0: [3, 3], 1: [3, 8, 3], 2: [4, 9, 7, 4], 4: [3, 6, 8, 5, 7, 3]}


def batch(field, rows=5):
    return torch.randn(rows, field.dim, dtype=field.dtype)


def assert_close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("depth", SIZES)
def test_evaluate_and_both_divergences(depth, modulated):
    field = random_field(SIZES[depth], 0.5, gate=modulated, shift=modulated, seed=depth)
    x, noise = batch(field), batch(field)
    want = plain_forward(field, T, x)[0]
    jacobian = jacobians(lambda x: plain_forward(field, T, x)[0], x)
    assert_close(ReferenceEngine(field).evaluate(float(T), x), want)
    dx, trace = ReferenceEngine(field, plan(field)).evaluate_with_divergence(T, x)
    assert_close(dx, want)
    assert_close(trace, torch.einsum("bmm->b", jacobian))
    dx, estimate = ReferenceEngine(field, plan(field, "hutchinson")).evaluate_with_divergence(T, x, noise)
    assert_close(dx, want)
    assert_close(estimate, torch.einsum("bm,bmn,bn->b", noise, jacobian, noise))


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_every_activation(name):
    field = random_field([3, 7, 6, 3], 0.7, activation=name, gate=True, shift=True)
    x = batch(field)
    dx, trace = ReferenceEngine(field, plan(field)).evaluate_with_divergence(T, x)
    assert_close(dx, plain_forward(field, T, x)[0])
    assert_close(trace, torch.einsum("bmm->b", jacobians(lambda x: plain_forward(field, T, x)[0], x)))


def test_column_blocks_do_not_change_the_trace(monkeypatch):
    field = random_field([7, 11, 9, 7], 0.6, gate=True)
    x = batch(field)
    whole = ReferenceEngine(field, plan(field)).evaluate_with_divergence(T, x)[1]
    monkeypatch.setattr(reference, "TANGENT_ELEMENTS", 2 * len(x) * 11)
    assert_close(ReferenceEngine(field, plan(field)).evaluate_with_divergence(T, x)[1], whole)


def test_functions_of_time_and_no_rows():
    field = random_field([2, 5, 2], 1.0)
    field.layers[0].gate = TimeFunction(lambda t: torch.stack([t.sin(), t, t * t, t + 1, t.exp(), t - 9]),
                                        rows=torch.tensor([0, 1, 2, 3, 4]))
    engine = ReferenceEngine(field, plan(field))
    x = batch(field)
    dx, trace = engine.evaluate_with_divergence(T, x)
    assert_close(dx, plain_forward(field, T, x)[0])
    assert_close(trace, torch.einsum("bmm->b", jacobians(lambda x: plain_forward(field, T, x)[0], x)))
    dx, trace = engine.evaluate_with_divergence(T, x[:0])
    assert dx.shape == (0, 2) and trace.shape == (0,)


def test_gradients_reach_every_tensor_and_can_be_taken_twice_from_one_engine():
    field = random_field([3, 7, 6, 3], 0.6, gate=True, shift=True)
    live = field.map_tensors(lambda tensor: tensor.requires_grad_())
    tensors = [tensor for _, tensor in live.tensors()]
    engine = ReferenceEngine(live, plan(live))
    x = batch(field)
    with torch.no_grad():
        engine.evaluate(T, x)  # fills the graph-free cache, which must not be used below

    def total(dx, trace):
        return (dx.square().sum(1) + trace.square()).sum()

    plain = plain_forward(live, T, x)[0]
    trace = torch.einsum("bmm->b", jacobians(lambda x: plain_forward(live, T, x)[0], x))
    want = torch.autograd.grad(total(plain, trace), tensors)
    for _ in range(2):
        got = torch.autograd.grad(total(*engine.evaluate_with_divergence(T, x)), tensors)
        for one, other in zip(got, want):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["exact", "hutchinson"])
@pytest.mark.parametrize("sign", [1, -1])
def test_solve_is_the_flow_and_its_density(kind, sign):
    """heun2 on a fine grid against Heun written out, on the augmented state, in both directions of time."""
    field = random_field([3, 8, 7, 3], 0.6, gate=True, shift=True)
    x, noise, grid = batch(field), batch(field).sign(), torch.linspace(0.0, 0.5, 41, dtype=torch.float64)
    chosen = plan(field, kind)
    request = SolveRequest(
        x, torch.zeros(len(x), dtype=x.dtype), grid[[0, 20, 40]], sign, METHODS["heun2"], (1e-6,) * 2, (1e-6,) * 2,
        StepOptions(), grid=grid, noise=noise if kind == "hutchinson" else None,
    )
    result = ReferenceEngine(field, chosen).solve(request)

    def f(t, x):
        jacobian = jacobians(lambda x: plain_forward(field, sign * t, x)[0], x)
        trace = torch.einsum("bmm->b" if kind == "exact" else "bm,bmn,bn->b",
                             *((jacobian,) if kind == "exact" else (noise, jacobian, noise)))
        return (sign * plain_forward(field, sign * t, x)[0]).detach(), -sign * trace.detach()

    l = torch.zeros(len(x), dtype=x.dtype)  # noqa: E741
    for t, h in zip(grid[:-1], grid.diff()):
        k1, m1 = f(t, x)
        k2, m2 = f(t + h, x + h * k1)
        x, l = x + h / 2 * (k1 + k2), l + h / 2 * (m1 + m2)  # noqa: E741
    assert result.status == "ok" and result.nfe == 80
    torch.testing.assert_close(result.xs[-1], x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(result.ls[-1], l, rtol=1e-10, atol=1e-10)


def test_refusals_name_the_place():
    field = random_field([3, 5, 3])
    with pytest.raises(ValueError, match="without a divergence plan"):
        ReferenceEngine(field).evaluate_with_divergence(T, batch(field))
    with pytest.raises(ValueError, match="noise"):
        ReferenceEngine(field, plan(field, "hutchinson")).evaluate_with_divergence(T, batch(field))
    field.layers[0].activation = Activation("mish")
    assert "layer0" in ReferenceEngine.unsupported(field) and "mish" in ReferenceEngine.unsupported(field)
    with pytest.raises(UnsupportedFieldError, match="mish"):
        choose(field, "reference")
    with pytest.raises(UnsupportedFieldError, match="mish"):
        choose(field)


class FakeNative(ReferenceEngine):
    name = "cpu"
    differentiable = False
    obstacle = None

    @classmethod
    def unsupported(cls, field):
        return cls.obstacle


def test_auto_takes_the_native_engine_where_it_can(monkeypatch):
    field = random_field([3, 5, 3])
    truly = available
    monkeypatch.setattr(engines, "available", lambda name, graph=False: (FakeNative, "") if name == "cpu" else truly(name, graph))
    found, reason = choose(field)
    assert found is FakeNative and "native" in reason
    monkeypatch.setattr(FakeNative, "obstacle", "it is the wrong colour")
    found, reason = choose(field)
    assert found is ReferenceEngine and "wrong colour" in reason
    with pytest.raises(UnsupportedFieldError, match="wrong colour"):
        choose(field, "cpu")
    monkeypatch.setattr(engines, "available", lambda name, graph=False: (None, "no compiler") if name == "cpu" else truly(name, graph))
    found, reason = choose(field)
    assert found is ReferenceEngine and "no compiler" in reason
    with pytest.raises(UnsupportedFieldError, match="no compiler"):
        choose(field, "cpu")
    assert choose(field, "reference")[0] is ReferenceEngine


def test_unknown_engines_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'reference', 'cpu'"):
        choose(random_field([3, 5, 3]), "tpu")
