"""Compiled fields that are graphs, through the door: values, solves, gradients, divergences, layouts, context, times."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import sparseflow_kernels as sfk
import torch
import torchdiffeq
from sparseflow_kernels.engines.graph_native import GraphNativeEngine
from sparseflow_kernels.field import GraphField
from torch import nn
from torch.nn import functional

T = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
OPTIONS = {"rtol": 1e-7, "atol": 1e-7, "method": "dopri5", "options": {"first_step": 0.05}}


class Net(nn.Module):
    """forward(t, y) = rule(self, t, y), with the given parts."""

    def __init__(self, rule, **parts):
        super().__init__()
        self.rule = rule
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, t, y):
        return self.rule(self, t, y)


def residual():
    def rule(s, t, x):
        h = functional.gelu(s.up(s.norm(x)))
        return s.alpha * x + s.down(h) * torch.sigmoid(s.gate(torch.cat([torch.sin(t).expand(len(x), 1), x], 1)))

    return Net(rule, norm=nn.LayerNorm(4), up=nn.Linear(4, 16), down=nn.Linear(16, 4), gate=nn.Linear(5, 4),
               alpha=nn.Parameter(torch.tensor(0.3))), (6, 4)


def gru():
    def rule(s, t, h):
        r, z = torch.sigmoid(s.r(h)), torch.sigmoid(s.z(h))
        return (1 - z) * (torch.tanh(s.n(r * h)) - h)

    return Net(rule, r=nn.Linear(5, 5), z=nn.Linear(5, 5), n=nn.Linear(5, 5)), (4, 5)


def hamiltonian():
    def rule(s, t, x):
        with torch.enable_grad():
            x = x.requires_grad_(True)
            g = torch.autograd.grad(s.h(x).sum(), x, create_graph=True)[0]
        return torch.cat([g[:, 2:], -g[:, :2]], 1)

    return Net(rule, h=nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 1))), (3, 4)


def lotka_volterra():
    def rule(s, t, y):
        a, b = y[:, :1], y[:, 1:]
        return torch.cat([s.p[0] * a - s.p[1] * a * b, s.p[2] * a * b - s.p[3] * b], 1) + 0.1 * s.net(y)

    return Net(rule, p=nn.Parameter(torch.tensor([1.1, 0.4, 0.3, 0.9])), net=nn.Sequential(nn.Linear(2, 8), nn.Softplus(), nn.Linear(8, 2))), (5, 2)


PLAIN = [residual, gru, hamiltonian, lotka_volterra]


def made(make, dtype=torch.float64):
    torch.manual_seed(0)
    module, shape = make()
    return module.to(dtype).eval(), 0.5 * torch.randn(shape, dtype=dtype)


def compare_gradients(module, field, run, y0):
    """The loss's gradient in y0 and in the module's parameters, which are the sum over the field's, entry by entry."""
    leaves = lambda: tuple(p.clone().requires_grad_() for p in y0) if isinstance(y0, tuple) else (y0.clone().requires_grad_(),)
    one, two = leaves(), leaves()
    given = lambda parts: parts if isinstance(y0, tuple) else parts[0]
    total = lambda ys: sum((y[-1] * torch.linspace(-1, 1, y[-1].numel()).to(y).view(y[-1].shape)).sum() for y in (ys if isinstance(ys, tuple) else (ys,)))
    wanted = torch.autograd.grad(total(torchdiffeq.odeint(module, given(one), T, **OPTIONS)), [*one, *module.parameters()], allow_unused=True)
    module.zero_grad()
    live = sfk.compile(module, like=y0, live=True)
    found = torch.autograd.grad(total(run(live, given(two))), [*two, *module.parameters()], allow_unused=True)
    for a, b in zip(found, wanted):
        a, b = (torch.zeros((), dtype=torch.float64) if x is None else x for x in (a, b))
        torch.testing.assert_close(a.expand(b.shape).to(b.dtype), b.expand(a.shape), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", PLAIN)
def test_solves_gradients_and_divergences_are_the_modules(make):
    module, y0 = made(make)
    field = sfk.compile(module)
    assert isinstance(field.vector_field, GraphField) and field.engine_name == "cpu"
    for t in (-3.0, 0.0, 0.7, 11.0):
        time = torch.tensor(t, dtype=torch.float64)
        torch.testing.assert_close(field(time, y0), module(time, y0).detach(), rtol=1e-10, atol=1e-10)
    solution = sfk.solve(field, y0, T, **OPTIONS)
    assert solution.stats.engine == "cpu"
    torch.testing.assert_close(solution.ys, torchdiffeq.odeint(module, y0, T, **OPTIONS), rtol=1e-9, atol=1e-9)
    compare_gradients(module, field, lambda f, y: sfk.odeint(f, y, T, **OPTIONS), y0)
    time = torch.tensor(0.3, dtype=torch.float64)
    jacobian = torch.stack([torch.autograd.functional.jacobian(lambda z: module(time, z[None])[0], row) for row in y0])
    zeros = torch.zeros(len(y0), dtype=torch.float64)
    _, exact = sfk.with_divergence(field)(time, (y0, zeros))
    torch.testing.assert_close(-exact, jacobian.diagonal(dim1=1, dim2=2).sum(1), atol=1e-12, rtol=1e-9)
    noise = torch.randn_like(y0)
    _, estimate = sfk.with_divergence(field, "hutchinson", noise)(time, (y0, zeros))
    torch.testing.assert_close(-estimate, torch.einsum("bi,bij,bj->b", noise, jacobian, noise), atol=1e-12, rtol=1e-9)
    xs, ls = sfk.odeint(sfk.with_divergence(field), (y0, zeros), T, **OPTIONS)
    torch.testing.assert_close(xs, solution.ys, rtol=1e-6, atol=1e-6)
    assert ls.shape == (3, len(y0))


@pytest.mark.parametrize("make", PLAIN)
def test_training_writing_back_copies_and_state_dicts(make):
    module, y0 = made(make)
    field = sfk.compile(module)
    optimizer = torch.optim.SGD(field.parameters(), lr=0.05)
    sfk.odeint(field, y0, T, **OPTIONS)[-1].square().mean().backward()
    # A parameter that cannot change the field (the last bias of an energy) has none, as in torch.
    assert sum(parameter.grad is None for parameter in field.parameters()) == bool(field._idle)
    optimizer.step()
    time = torch.tensor(0.2, dtype=torch.float64)
    now = field(time, y0)
    for other in (copy.deepcopy(field), pickle.loads(pickle.dumps(field)), sfk.compile(field)):
        torch.testing.assert_close(other(time, y0), now)
    again = sfk.compile(module)
    assert not torch.allclose(again(time, y0), now)
    again.load_state_dict(field.state_dict())
    torch.testing.assert_close(again(time, y0), now)
    field.copy_to(module)
    torch.testing.assert_close(module(time, y0).detach(), now.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", PLAIN)
def test_a_time_per_sample(make):
    module, y0 = made(make)
    field = sfk.compile(module)
    times = torch.linspace(-1, 2, len(y0), dtype=torch.float64)
    wanted = torch.cat([module(times[i], y0[i : i + 1]) for i in range(len(y0))])
    torch.testing.assert_close(field(times, y0), wanted.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(field(times[:, None], y0), wanted.detach(), rtol=1e-9, atol=1e-9)
    live = sfk.compile(module, live=True)
    weight = torch.randn_like(y0)
    found = torch.autograd.grad((live(times, y0) * weight).sum(), list(module.parameters()), allow_unused=True)
    grads = torch.autograd.grad((wanted * weight).sum(), list(module.parameters()), allow_unused=True)
    for a, b in zip(found, grads):
        a, b = (torch.zeros(1, dtype=torch.float64) if x is None else x for x in (a, b))
        torch.testing.assert_close(a, b.expand(a.shape))
    with pytest.raises(ValueError, match="a time per sample"):
        field(times[:-1], y0)


def test_a_time_per_sample_of_a_chain():
    from sparseflow_kernels.flows import mlp_field

    torch.manual_seed(0)
    module = mlp_field(3, (16, 16), "concatsquash", "softplus").double()
    y, times = torch.randn(5, 3).double(), torch.rand(5).double()
    field = sfk.compile(module)
    wanted = torch.cat([module(times[i], y[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(field(times, y), wanted.detach())
    loss = field(times, y).square().sum()
    loss.backward()
    wanted.square().sum().backward()
    total = sum(float(p.grad.square().sum()) for p in module.parameters())
    assert abs(sum(float(p.grad.square().sum()) for p in field.parameters()) / total - 1) < 1e-9


# ------------------------------------------------------------------------------------------------------------- layouts


def points():
    def rule(s, t, x):
        return s.net(torch.cat([x, x.mean(1, keepdim=True).expand_as(x)], -1))

    return Net(rule, net=nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))), (4, 5, 3)


def graph():
    def rule(s, t, x):
        return torch.tanh(s.w(s.adjacency @ x)) - 0.1 * x

    adjacency = torch.tensor([[0.0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0]]).double()
    module = Net(rule, w=nn.Linear(3, 3))
    module.register_buffer("adjacency", adjacency)
    return module, (4, 3)


def image():
    def rule(s, t, x):
        return s.b(functional.silu(s.norm(s.a(x))))

    return Net(rule, a=nn.Conv2d(2, 4, 3, padding=1), norm=nn.GroupNorm(2, 4), b=nn.Conv2d(4, 2, 3, padding=1)), (3, 2, 4, 4)


@pytest.mark.parametrize("make", [points, graph, image])
def test_states_of_other_shapes(make):
    module, y0 = made(make)
    field = sfk.compile(module, like=y0)
    assert field.layout is not None
    solution = sfk.solve(field, y0, T, **OPTIONS)
    assert solution.stats.engine == "cpu" and solution.ys.shape == (3, *y0.shape)
    torch.testing.assert_close(solution.ys, torchdiffeq.odeint(module, y0, T, **OPTIONS), rtol=1e-9, atol=1e-9)
    compare_gradients(module, field, lambda f, y: sfk.odeint(f, y, T, **OPTIONS), y0)
    samples = len(field.layout.flatten(y0))
    _, dl = sfk.with_divergence(field)(T[1], (y0, torch.zeros(samples, dtype=torch.float64)))
    flat = lambda r: field.layout.flatten(module(T[1], field.layout.unflatten(r)))
    rows = field.layout.flatten(y0)
    jacobian = torch.autograd.functional.jacobian(flat, rows)
    wanted = torch.stack([jacobian[i, :, i].diagonal().sum() for i in range(samples)])
    torch.testing.assert_close(-dl, wanted)
    with pytest.raises(ValueError, match="y: must be"):
        field(T[0], y0[..., :-1])


def second_order():
    def rule(s, t, state):
        x, v = state
        return v, s.net(torch.cat([x, v], 1)) - x

    torch.manual_seed(0)
    module = Net(rule, net=nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 2))).double()
    return module, (torch.randn(5, 2).double(), 10 * torch.randn(5, 2).double())


def test_tuple_states_are_solved_as_torchdiffeq_solves_them():
    module, y0 = second_order()
    field = sfk.compile(module, like=y0)
    for tolerances in ({}, {"rtol": (1e-3, 1e-6), "atol": (1e-4, 1e-8)}):
        options = {"method": "dopri5", "rtol": 1e-5, "atol": 1e-5} | tolerances
        solution = sfk.solve(field, y0, T, **options)
        wanted = torchdiffeq.odeint(module, y0, T, **options)
        assert solution.stats.engine == "cpu"
        for a, b in zip(solution.ys, wanted):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)  # the same steps
    compare_gradients(module, field, lambda f, y: sfk.odeint(f, y, T, **OPTIONS), y0)
    dx, dv = field(0.0, y0)
    assert torch.equal(dx, y0[1]) and dv.shape == y0[1].shape
    reference = sfk.compile(module, "reference", like=y0)
    for a, b in zip(sfk.odeint(reference, y0, T, rtol=(1e-3, 1e-6), atol=(1e-4, 1e-8)), wanted):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    with pytest.raises(TypeError, match="tuple"):
        sfk.with_divergence(field)(0.0, (y0, torch.zeros(5).double()))


# ------------------------------------------------------------------------------------------------------------- context


def conditional():
    def rule(s, t, x):
        return s.net(torch.cat([x, s.context, t.expand(len(x), 1)], 1))

    torch.manual_seed(0)
    module = Net(rule, net=nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.Linear(16, 2))).double()
    module.context = torch.randn(7, 3).double()
    return module, torch.randn(7, 2).double()


def test_the_context_is_read_from_the_module_at_every_call():
    module, y0 = conditional()
    field = sfk.compile(module)
    for batch in (7, 7, 4):
        module.context = torch.randn(batch, 3).double()
        y = y0[:batch]
        torch.testing.assert_close(sfk.odeint(field, y, T, **OPTIONS), torchdiffeq.odeint(module, y, T, **OPTIONS))
    module.context = torch.randn(7, 4).double()
    with pytest.raises(ValueError, match=r"read from context is \[7, 4\] now, and was compiled with \[3\]"):
        field(0.0, y0)
    module.context = torch.randn(4, 3).double()
    with pytest.raises(ValueError, match=r"context: is \[4, 3\].*\[7, 3\]"):
        field(T[0], y0)


def test_gradients_flow_into_the_context():
    module, y0 = conditional()
    field = sfk.compile(module)
    grads = []
    for run in (lambda: sfk.odeint(field, y0, T, **OPTIONS), lambda: torchdiffeq.odeint(module, y0, T, **OPTIONS)):
        module.context = torch.linspace(-1, 1, 21).double().view(7, 3).requires_grad_()
        grads.append(torch.autograd.grad(run()[-1].square().sum(), module.context)[0])
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-7)
    given = module.context.detach().clone().requires_grad_()
    module.context = None
    found = torch.autograd.grad(sfk.odeint(field.with_context(given), y0, T, **OPTIONS)[-1].square().sum(), given)[0]
    torch.testing.assert_close(found, grads[0])
    noise = torch.randn_like(y0)
    aug = sfk.with_divergence(field.with_context(given), "hutchinson", noise)
    _, ls = sfk.odeint(aug, (y0, torch.zeros(7).double()), T, **OPTIONS)
    (of_context,) = torch.autograd.grad(ls[-1].sum(), given)
    assert of_context.abs().max() > 0
    with pytest.raises(ValueError, match="context must be"):
        field.with_context(torch.zeros(7, 5))
    with pytest.raises(ValueError, match="no context"):
        sfk.compile(residual()[0]).with_context(given)


def test_reports_say_what_is_computed_when():
    module, _ = conditional()
    text = sfk.compile(module).report()
    for words in ("context [batch, 3] (context)", "once a call", "once an evaluation", "per sample", "engine: cpu", "gradient: cpu"):
        assert words in text
    assert max(map(len, text.split("\n")[:12])) < 120


class Embedded(nn.Module):
    """A trained time embedding, and neurons that no sample changes."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 32))
        self.first, self.last = nn.Linear(3, 32), nn.Linear(32, 3)
        with torch.no_grad():
            self.first.weight[:24] = 0.0
            self.embed[2].weight[::2] = 0.0

    def forward(self, t, x):
        angles = t * torch.arange(1, 5)
        features = torch.cat((angles.sin(), angles.cos()))
        return x + self.last(torch.tanh(self.first(x) + self.embed(features)))


@pytest.mark.parametrize("wanted", ["all", "state", "times"])
def test_gradients_go_back_through_time_and_through_constants_natively(wanted, monkeypatch):
    module = Embedded().double()
    field = sfk.compile(module, dim=3, live=True)
    assert "the same for all" in field.report()
    monkeypatch.setattr(GraphNativeEngine, "_carry_on", None)
    module.requires_grad_(wanted == "all")
    x = torch.randn(7, 3, dtype=torch.float64)
    found = []
    for function, odeint in ((field, sfk.odeint), (module, torchdiffeq.odeint)):
        module.zero_grad()
        own = x.clone().requires_grad_(wanted != "times"), T.clone().requires_grad_(wanted != "state")
        odeint(function, *own, rtol=1e-9, atol=1e-9).square().sum().backward()
        pruned = {name: torch.where(p == 0, 0.0, p.grad) for name, p in module.named_parameters() if p.grad is not None}
        found.append({"x": own[0].grad, "t": own[1].grad, **pruned})
    assert found[0].keys() == found[1].keys() and (len(found[0]) > 2) == (wanted == "all")
    for name, theirs in found[1].items():
        if theirs is not None:
            torch.testing.assert_close(found[0][name], theirs, rtol=1e-6, atol=1e-7)


def test_a_call_leaves_nothing_to_the_garbage_collector():
    module = Net(lambda s, t, y: torch.tanh(s.net(torch.cat([y, s.c], 1))), net=nn.Linear(4, 2).double())
    module.c, y = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    field = sfk.compile(module, like=y)
    run = lambda: (field(0.1, y).sum() + sfk.odeint(field, y, T)[-1].sum()).backward()
    run()
    left = []
    for _ in range(3):  # what a test before this one held may go meanwhile; what a call leaves is left every time
        gc.collect()
        gc.disable()
        try:
            for _ in range(5):
                run()
            left.append(gc.collect())
        finally:
            gc.enable()
    assert min(left) == 0, left
