"""Rows of a graph that nobody reads, or that no sample changes: the same function with fewer rows."""

from __future__ import annotations

import copy

import pytest
import sparseflow_kernels as sfk
import torch
from random_graphs import random_graph
from sparseflow_kernels import divergence
from sparseflow_kernels import simplify_graph as module
from sparseflow_kernels.analysis.bench import known_fields
from sparseflow_kernels.engines import reference_engine
from sparseflow_kernels.engines.graph_cpu import GraphCpuEngine
from sparseflow_kernels.field.graph import order
from sparseflow_kernels.simplify_graph import Rows, simplify_graph
from sparseflow_kernels.trained import Held
from torch import nn

F64 = torch.float64


def simplified(field):
    origins, _ = Held.by_tensors(field)
    found, new_origins, told = simplify_graph(field, origins)
    assert [key for key in new_origins] == [(number, "values") for number in range(len(found.parts))]
    for (_, origin), part in zip(new_origins.items(), found.parts):
        assert torch.equal(origin.value, part.values)
    return found, new_origins, told


def same(ours, theirs) -> None:
    """None is a gradient of zero."""
    like = theirs if ours is None else ours
    if like is not None:
        ours, theirs = (torch.zeros_like(like) if one is None else one for one in (ours, theirs))
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("seed", range(60))
def test_random_graphs(seed, monkeypatch):
    monkeypatch.setattr(module, "LEAST", 0.0)
    monkeypatch.setattr(module, "LEAST_FIXED", 1)
    field = random_graph(seed, gaps=True)
    found, origins, _ = simplified(field)
    torch.manual_seed(seed)
    x, n = torch.randn(5, field.dim, dtype=F64), 5
    context = None if field.context is None else torch.randn(n, field.context.rows, dtype=F64)
    grad, grad_trace = torch.randn(n, field.dim, dtype=F64), torch.randn(n, dtype=F64)
    for times in (torch.tensor(0.3, dtype=F64), torch.rand(n, dtype=F64)):
        for kind in (None, "exact"):
            if kind and times.dim():
                continue
            plans = [kind and divergence.plan(one, kind) for one in (field, found)]
            before, reference = (reference_engine(one, plan) for one, plan in zip((field, found), plans))
            engine = GraphCpuEngine(found, plans[1])
            wanted_names = ("x", "tensors", "t", *(["context"] if context is not None else []))
            more = {} if context is None else {"context": context}
            trace = grad_trace if kind else None
            wanted = before.evaluate_backward(times, x, None, grad, trace, wanted_names, **more)
            for one in (reference, engine):
                if kind is None:
                    torch.testing.assert_close(one.evaluate(times, x, context), before.evaluate(times, x, context))
                else:
                    pairs = zip(*(e.evaluate_with_divergence(times, x, None, context) for e in (one, before)))
                    for ours, theirs in pairs:
                        torch.testing.assert_close(ours, theirs)
                got = one.evaluate_backward(times, x, None, grad, trace, wanted_names, **more)
                for name in ("x", "t", "context"):
                    same(getattr(got, name), getattr(wanted, name))
                total = [torch.zeros_like(part.values) for part in field.parts]
                for gradient, (_, origin) in zip(got.tensors, origins.items()):
                    gradient = torch.zeros_like(origin.value) if gradient is None else gradient
                    for name, elements in origin.elements():
                        number = int(name.split(".")[0])
                        total[number].index_add_(0, elements, gradient[origin.parameter == origin.parameters.index(name)])
                for ours, theirs in zip(total, wanted.tensors):
                    same(ours, theirs)


class Residual(nn.Module):
    """Neurons 0 to 9 of `up` are read by nobody, neurons 10 to 29 have no inputs; those have a part in the next bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.of_time = nn.Linear(4, 60), nn.Linear(60, 4), nn.Linear(1, 60)
        with torch.no_grad():
            self.down.weight[:, :10] = 0.0
            self.up.weight[10:30] = 0.0
            self.of_time.weight[20:] = 0.0

    def forward(self, t, x):
        return x + self.down(torch.tanh(self.up(x) + self.of_time(t.reshape(1, 1))))


def rows_of(field) -> list[int]:
    return [node.rows for node in order([field.vector_field.output]) if node.kind == "tanh" and node.per_sample]


@pytest.mark.parametrize("live", [False, True])
def test_solves_and_gradients_of_a_pruned_residual(live):
    net = Residual().double()
    field = sfk.compile(net, live=live)
    assert rows_of(field) == [30]
    told = str(field.report())
    assert "read by nobody" in told and "the same for all" in told
    x, t = torch.randn(7, 4, dtype=F64, requires_grad=True), torch.tensor([0.0, 0.4, 1.0], dtype=F64)
    twin = copy.deepcopy(net)
    z = x.detach().clone().requires_grad_()
    ours = sfk.odeint(field, x, t, rtol=1e-9, atol=1e-9)
    theirs = sfk.odeint(twin, z, t, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-8)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-6, atol=1e-7)
    held = dict(net.named_parameters()) if live else field.held(lambda p: p.grad)
    for name, parameter in twin.named_parameters():
        there = (parameter != 0).reshape(-1)  # a zero of the module is a pruned entry
        if live:
            ours = held[name].grad.reshape(-1)
        else:
            ours = torch.zeros(parameter.numel(), dtype=F64)
            ours[held[name].elements if held[name].elements is not None else slice(None)] = held[name].values.reshape(-1)
        torch.testing.assert_close(ours[there], parameter.grad.reshape(-1)[there], rtol=1e-6, atol=1e-7)


def test_a_live_field_follows_what_it_folded():
    net = Residual()
    field = sfk.compile(net, live=True)
    x = torch.randn(5, 4)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.25)
        torch.testing.assert_close(field(0.3, x), net(torch.tensor(0.3), x))
        net.up.weight[12, 1] = 0.5  # back again
        net.down.weight[2, 3] = 0.5
        torch.testing.assert_close(field(0.3, x), net(torch.tensor(0.3), x))


def test_a_time_per_sample_computes_constant_neurons_with_the_others():
    class Own(Residual):
        def forward(self, t, x):
            return x + self.down(torch.tanh(self.up(x) + self.of_time(t.reshape(-1, 1))))

    net = Own().double()
    field = sfk.compile(net)
    assert field.vector_field.single is not None and rows_of(field) == [30]
    t, x = torch.rand(6, dtype=F64), torch.randn(6, 4, dtype=F64)
    torch.testing.assert_close(field(t, x), net(t, x))
    (program,) = [p for key, p in field.packed()._programs.items() if key[1]]
    assert not program.computed and not program.writer.timed
    field(t, x).square().sum().backward()
    net(t, x).square().sum().backward()
    weight = field.held(lambda p: p.grad)["down.weight"]
    own = torch.arange(240) if weight.elements is None else weight.elements
    torch.testing.assert_close(weight.values.reshape(-1), net.down.weight.grad.reshape(-1)[own])


def test_nothing_is_built_anew_where_nothing_goes():
    pruned = sfk.compile(Residual())
    field = pruned.vector_field
    assert Rows(field, apart=False).saved == 0 and simplify_graph(field, pruned.origins)[0] is field
    full = nn.Sequential(nn.Linear(3, 20), nn.Tanh(), nn.Linear(20, 3))

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = full

        def forward(self, t, x):
            return x - self.net(x)

    plain = sfk.compile(Plain())
    assert plain.vector_field.single is None and "read by nobody" not in str(plain.report())


@pytest.mark.parametrize("kind", ["exact", "hutchinson"])
def test_divergences_of_a_pruned_residual(kind):
    net = Residual().double()
    field, x = sfk.compile(net), torch.randn(6, 4, dtype=F64)
    noise = torch.randn(6, 4, dtype=F64) if kind == "hutchinson" else None
    state = (x, torch.zeros(6, dtype=F64))
    found = sfk.with_divergence(field, kind, noise)(torch.tensor(0.3, dtype=F64), state)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda y: net(torch.tensor(0.3, dtype=F64), y[None])[0]))(x)
    trace = jacobian.diagonal(dim1=1, dim2=2).sum(1) if noise is None else torch.einsum("bi,bij,bj->b", noise, jacobian, noise)
    torch.testing.assert_close(found[0], net(torch.tensor(0.3, dtype=F64), x))
    torch.testing.assert_close(found[1], -trace)


def test_convolutions_keep_their_rows_beside_products_that_lose_some():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.conv, self.up, self.down = nn.Conv2d(1, 1, 3, padding=1), nn.Linear(16, 60), nn.Linear(60, 16)
            with torch.no_grad():
                self.down.weight[:, :20] = 0.0
                self.up.weight[20:40] = 0.0

        def forward(self, t, x):
            return self.conv(torch.tanh(self.conv(x))) + self.down(torch.tanh(self.up(x.flatten(1)))).view_as(x)

    net = Both().double()
    x = torch.randn(3, 1, 4, 4, dtype=F64, requires_grad=True)
    field = sfk.compile(net, like=x.detach())
    told = str(field.report())
    assert "read by nobody" in told and "the same for all" in told
    torch.testing.assert_close(field(0.2, x), net(0.2, x))
    ours, theirs = (torch.autograd.grad(f(0.2, x).square().sum(), x)[0] for f in (field, net))
    torch.testing.assert_close(ours, theirs)
    field(0.2, x).square().sum().backward()
    net(0.2, x).square().sum().backward()
    found = field.held(lambda p: p.grad)
    for name in ("conv.weight", "up.weight", "up.bias", "down.weight"):
        wanted = dict(net.named_parameters())[name].grad.reshape(-1)
        own = torch.arange(len(wanted)) if found[name].elements is None else found[name].elements
        torch.testing.assert_close(found[name].values.reshape(-1), wanted[own])


def test_rows_that_cost_more_apart_than_together_stay():
    """16 points under shared weights: 3 constant neurons of each would make two products and a sum of one product."""
    problem = known_fields()["points"].problem(0.1)
    field = sfk.compile(problem.module, like=problem.like)
    rows = Rows(field.vector_field, apart=True)
    assert rows.saved > max(module.LEAST * rows.rows, module.LEAST_FIXED)
    assert "the same for all" not in field.report()
