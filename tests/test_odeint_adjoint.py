"""odeint_adjoint: which gradient it is, torchdiffeq's own on the dense module as the oracle, and who multiplies."""

from __future__ import annotations

import pytest
import torch
import torchdiffeq
from engine_fields import OpaqueEngine, PlainField
from random_fields import plain_forward, random_field
from torch import nn

from sparseflow_kernels import engines
from sparseflow_kernels.divergence_field import with_divergence
from sparseflow_kernels.engines.reference import ReferenceEngine
from sparseflow_kernels.odeint import odeint, odeint_adjoint

F64 = torch.float64
UP = torch.tensor([0.0, 0.4, 0.7, 1.0], dtype=F64)


@pytest.fixture(params=["reference", "opaque", "cpu"])
def engine(request):
    if request.param == "cpu":
        cpu, missing = engines.available("cpu")
        missing = missing or cpu.unsupported(random_field([2, 3, 2]))
        return cpu if cpu is not None and not missing else pytest.skip(missing)
    return {"reference": ReferenceEngine, "opaque": OpaqueEngine}[request.param]


class Dense(nn.Module):
    """The field as a user of torchdiffeq has it, over the same parameters in the same order, with its divergence by
    autograd if asked."""

    def __init__(self, field, kind, noise):
        super().__init__()
        self.field, self.kind, self.noise = field, kind, noise

    def forward(self, t, state):
        if self.kind is None:
            return plain_forward(self.field.vector_field, t, state)[0]
        with torch.enable_grad():
            x = state[0] * 1.0
            x = x if x.requires_grad else x.detach().requires_grad_()
            dx = plain_forward(self.field.vector_field, t, x)[0]
            vectors = [self.noise] if self.kind == "hutchinson" else torch.eye(x.shape[1], dtype=x.dtype)[:, None]
            products = [torch.autograd.grad(dx, x, v.expand_as(x), create_graph=True)[0] * v for v in vectors]
            return dx, -sum(products).sum(1).view(state[1].shape)


def problem(engine, kind, l_shape=(4,)):
    generator = torch.Generator().manual_seed(2)
    x, noise = (torch.randn(4, 3, generator=generator, dtype=F64) for _ in range(2))
    field = PlainField(random_field((3, 6, 5, 3), 0.6, gate=True, shift=True), engine)
    dense = Dense(field, kind, noise)
    if kind is None:
        return field, dense, (x,)
    compiled = with_divergence(field, kind, noise if kind == "hutchinson" else None)
    return compiled, dense, (x, torch.zeros(l_shape, dtype=F64))


def gradients(interface, func, y0, times, **arguments):
    leaves, times = [part.clone().requires_grad_() for part in y0], times.clone().requires_grad_()
    ys = interface(func, tuple(leaves) if len(leaves) > 1 else leaves[0], times, **arguments)
    parts = (ys,) if isinstance(ys, torch.Tensor) else ys
    value = sum((part * torch.cos(torch.arange(part.numel(), dtype=F64)).view(part.shape)).sum() for part in parts)
    return torch.autograd.grad(value, [*leaves, times, *func.parameters()])


ADJOINTS = {
    "explicit": {"gradient": "adjoint"},
    "seminorm": {"adjoint_options": {"norm": "seminorm"}},
    "norm": {"adjoint_options": {"norm": lambda parts: 30 * max(part.abs().max() for part in parts)}},
    "tolerances": {"adjoint_rtol": 1e-7, "adjoint_atol": 1e-6},
    "method": {"adjoint_method": "bosh3", "adjoint_rtol": 1e-4},
    "grid": {"adjoint_method": "rk4", "adjoint_options": {"step_size": 0.1}},
}


@pytest.mark.parametrize("kind", [None, "exact", "hutchinson"])
@pytest.mark.parametrize("adjoint", ADJOINTS.values(), ids=ADJOINTS)
def test_it_is_torchdiffeqs_adjoint_of_the_dense_module(engine, adjoint, kind):
    """The same steps backwards, so the same numbers; times up and down, several outputs, tuple states."""
    times, l_shape = (UP, (4,)) if "adjoint_method" in adjoint else (UP.flip(0), (4, 1))
    compiled, dense, y0 = problem(engine, kind, l_shape)
    arguments = dict(rtol=1e-5, atol=1e-5)
    ours = gradients(odeint_adjoint, compiled, y0, times, **arguments, **adjoint)
    theirs = {name: value for name, value in adjoint.items() if name != "gradient"}
    wanted = gradients(torchdiffeq.odeint_adjoint, dense, y0, times, **arguments, **theirs)
    torch.testing.assert_close(ours, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", [None, "exact", "hutchinson"])
def test_adjoint_and_discrete_meet_at_tight_tolerances(engine, kind):
    compiled, _, y0 = problem(engine, kind)
    arguments = dict(rtol=1e-10, atol=1e-10)
    discrete = gradients(odeint_adjoint, compiled, y0, UP, **arguments)
    torch.testing.assert_close(discrete, gradients(odeint, compiled, y0, UP, **arguments), rtol=0, atol=0)
    adjoint = gradients(odeint_adjoint, compiled, y0, UP, **arguments, gradient="adjoint")
    torch.testing.assert_close(adjoint, discrete, rtol=1e-6, atol=1e-6)


class Counting(OpaqueEngine):
    backward: list = []

    def evaluate_backward(self, t, x, noise, grad_f, grad_trace, wanted):
        Counting.backward.append(frozenset(wanted))
        return super().evaluate_backward(t, x, noise, grad_f, grad_trace, wanted)

    def solve(self, request):
        raise AssertionError("the adjoint steps outside the engine")


def test_products_are_the_engines(monkeypatch):
    monkeypatch.setattr(Counting, "backward", [])
    compiled, _, y0 = problem(Counting, "exact")
    arguments = dict(rtol=1e-3, atol=1e-3, gradient="adjoint")
    gradients(odeint_adjoint, compiled, y0, UP, **arguments)
    assert len(Counting.backward) > 20 and set(Counting.backward) == {frozenset(("t", "x", "tensors"))}
    xs, _ = odeint_adjoint(compiled, tuple(part.requires_grad_() for part in y0), UP, **arguments, adjoint_params=())
    xs.sum().backward()
    assert all(p.grad is None for p in compiled.parameters()) and y0[0].grad is not None


def test_parameters_that_are_frozen_are_left_out(engine):
    compiled, dense, y0 = problem(engine, None)
    compiled.layers[1].values.requires_grad_(False)
    ys = odeint_adjoint(compiled, y0[0], UP, rtol=1e-4, atol=1e-4, gradient="adjoint")
    ys.sum().backward()
    assert compiled.layers[1].values.grad is None and compiled.layers[0].values.grad.any()


def test_the_noise_of_the_solve_is_kept_for_its_adjoint():
    """Other solves on the way draw other noise."""
    field = PlainField(random_field((3, 6, 3), 0.6), OpaqueEngine)
    x, l, arguments = torch.randn(4, 3, dtype=F64), torch.zeros(4, dtype=F64), dict(rtol=1e-6, atol=1e-6)  # noqa: E741
    drawing = with_divergence(field, "hutchinson", "gaussian")
    torch.manual_seed(1)
    _, first = odeint_adjoint(drawing, (x, l), UP, **arguments, gradient="adjoint")
    noise = drawing._drawn
    odeint(drawing, (x, l), UP, **arguments)
    assert not torch.equal(drawing._drawn, noise)
    given = with_divergence(field, "hutchinson", noise)
    _, second = odeint_adjoint(given, (x, l), UP, **arguments, gradient="adjoint")
    parameters = [p for name, p in field.named_parameters() if name != "layers.1.bias"]  # which no divergence has
    for one, other in zip(*(torch.autograd.grad(ls.sum(), parameters) for ls in (first, second))):
        torch.testing.assert_close(one, other)


def test_gradients_that_are_not_to_be_had():
    compiled, dense, y0 = problem(OpaqueEngine, None)
    with pytest.raises(ValueError, match="'discrete', 'adjoint' or None, not 'exact'"):
        odeint_adjoint(compiled, y0[0], UP, gradient="exact")
    for func, more, words in (
        (compiled, {"adjoint_rtol": 1e-3}, "adjoint_rtol is the adjoint's"),
        (dense, {}, "not a compiled field"),
        (compiled, {"event_fn": lambda t, y: y[0, 0]}, "an event"),
    ):
        with pytest.raises(ValueError, match=f"gradient='discrete'.*{words}"):
            odeint_adjoint(func, y0[0], UP, gradient="discrete", **more)
    with pytest.raises(ValueError, match="tsit5"):
        odeint_adjoint(compiled, y0[0], UP, method="tsit5", gradient="adjoint")


def test_arguments_that_repeat_the_forward_solve_ask_for_nothing(engine):
    """As torchcde passes them on, whoever asked for what."""
    field, _, y0 = problem(engine, None)
    run = lambda **given: torch.autograd.grad(  # noqa: E731
        odeint_adjoint(field, y0[0].requires_grad_(), UP, rtol=1e-3, atol=1e-4, **given).square().sum(), y0[0]
    )[0]
    same = {
        "adjoint_rtol": 1e-3, "adjoint_atol": 1e-4, "adjoint_method": "dopri5",
        "adjoint_params": tuple(field.parameters()),
    }  # fmt: skip
    discrete, continuous = run(gradient="discrete"), run(gradient="adjoint")
    assert torch.equal(run(**same), discrete) and torch.equal(run(gradient="discrete", **same), discrete)
    assert not torch.equal(discrete, continuous)
    for name, other in (("adjoint_rtol", 2e-3), ("adjoint_params", tuple(field.parameters())[1:])):
        assert not torch.equal(run(**{**same, name: other}), discrete)
