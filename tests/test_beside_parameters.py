"""What stands beside a module's parameters inside `accelerate`: what forward writes into it, keeps, counts and reads from
classes and settings."""

from __future__ import annotations

import cProfile
import sys
import types
import warnings

import pytest
import torch
import sparseflow_kernels as sfk
from sparseflow_kernels import accelerate
from torch import nn
from torchdiffeq import odeint

torch.set_num_threads(1)


class Demo(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, t, y):
        return self.net(y**3)


class Lazy(nn.Module):
    """An attribute that forward makes where it is missing, and that a script sets between solves."""

    def __init__(self, first, mixes=False):
        super().__init__()
        self.net, self.held, self.first, self.mixes = nn.Linear(3, 3).double(), None, first, mixes

    def forward(self, t, y):
        if self.held is None:
            self.held = self.first
        mean = y.mean(0, keepdim=True) if self.mixes else 0.0
        return torch.tanh(self.net(y)) * self.held - mean


class Clamped(Lazy):
    def forward(self, t, y):
        self.held = self.held.clamp(-1.0, 1.0)
        return torch.tanh(self.net(y)) @ self.held


@pytest.mark.parametrize(
    "make, values",
    [
        (lambda: Lazy(torch.ones(3).double()), [torch.full((3,), k).double() for k in (1.0, 2.0, 3.0)]),
        (lambda: Lazy(1.0), [1.0, 2.0, 3.0]),
        (lambda: Lazy(torch.ones(4, 3).double(), True), [torch.full((4, 3), k).double() for k in (1.0, 2.0, 3.0)]),
        (lambda: Clamped(None), [torch.eye(3).double() * k for k in (0.1, 0.2, 3.0)]),
    ],
    ids=["vector", "number", "context that mixes", "written and read"],
)
def test_attributes_that_forward_writes_and_reads_are_watched(make, values):
    module, y, times = make(), torch.randn(4, 3).double(), torch.tensor([0.0, 1.0]).double()

    def run():
        found = []
        for value in values:
            module.held = value
            found.append(odeint(module, y, times, method="rk4"))
        return found

    wanted = run()
    with accelerate():
        torch.testing.assert_close(run(), wanted, rtol=1e-9, atol=1e-9)


def test_what_forward_keeps_for_others_is_kept():
    class Keeps(Demo):
        def forward(self, t, y):
            self.last = out = super().forward(t, y)
            return out

    module, y, times = Keeps().double(), torch.randn(3, 2).double(), torch.tensor([0.0, 1.0]).double()
    with accelerate(), pytest.warns(UserWarning, match="forward notes what it sees in 'last'"):
        odeint(module, y, times, method="rk4")
    assert module.last.shape == y.shape


def test_a_limit_of_evaluations_and_what_depends_on_their_number():
    class Limited(Demo):
        def __init__(self):
            super().__init__()
            self.nfe = 0

        def forward(self, t, y):
            if self.nfe > 20:
                raise RuntimeError("too many evaluations")
            self.nfe += 1
            return super().forward(t, y)

    class Warms(Limited):
        def forward(self, t, y):
            self.nfe += 1
            return Demo.forward(self, t, y) * (1.0 if self.nfe < 10000 else 0.5)

    y, times = torch.randn(3, 2).double(), torch.tensor([0.0, 1.0]).double()
    limited = Limited().double()
    with accelerate() as context:
        for _ in range(5):
            odeint(limited, y, times, method="rk4")
        assert limited.nfe == 20 and context.report() == "Limited: cpu engine, 5 solves"
        with pytest.raises(RuntimeError, match="too many evaluations"):
            odeint(limited, y, times, method="rk4")
    with accelerate(), pytest.warns(UserWarning, match="depends on how often it was called"):
        odeint(Warms().double(), y, times, method="rk4")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, (torch.tensor(0.0), torch.ones(2, 3)))])
def test_torchscript_itself(make):
    class Simple(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(3, 3)

        def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.net(y) * (1 + t)

    module, y, times = make(Simple()), torch.ones(2, 3), torch.tensor([0.0, 1.0])
    wanted = odeint(module, y, times)
    with accelerate():
        torch.testing.assert_close(odeint(module, y, times), wanted, rtol=1e-5, atol=1e-5)


def test_a_spectral_norm_in_training_moves_as_often_as_without():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3).double())

        def forward(self, t, y):
            return self.net(y)

    y, times, modules = torch.randn(2, 3).double(), torch.tensor([0.0, 1.0]).double(), (Normed(), Normed())
    wanted = odeint(modules[0], y, times, method="euler")
    with accelerate(), pytest.warns(UserWarning, match="spectral norm"):
        assert torch.equal(odeint(modules[1], y, times, method="euler"), wanted)
    for one, other in zip(modules[0].buffers(), modules[1].buffers()):
        assert torch.equal(one, other)


def test_forward_without_gradients_has_none():
    class NoGrad(Demo):
        def forward(self, t, y):
            with torch.no_grad():
                return super().forward(t, y)

    module, y, times = NoGrad().double(), torch.randn(3, 2).double(), torch.tensor([0.0, 1.0]).double()
    grads = []
    for context in (torch.enable_grad(), accelerate()):
        with context:
            start = y.clone().requires_grad_()
            odeint(module, start, times, method="rk4")[-1].square().sum().backward()
            grads.append(start.grad)
    torch.testing.assert_close(grads[1], grads[0])


CONFIG = types.ModuleType("config")
SETTINGS = types.SimpleNamespace(rate=1.0)


class Rates:
    rate = 1.0


def rate_of_a_class():
    return Rates.rate


class Rated(nn.Module):
    rate = 1.0

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 2).double()

    @property
    def as_property(self):
        return SETTINGS.rate

    @staticmethod
    def as_static_method():
        return SETTINGS.rate

    def as_method(self):
        return CONFIG.rate


READERS = {
    "of the class": "self.rate", "of a module": "CONFIG.rate", "of another class": "Rates.rate",
    "by a function": "rate_of_a_class()", "by a property": "self.as_property",
    "by a static method": "self.as_static_method()", "by a method": "self.as_method()",
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_numbers_beside_the_module_are_watched(name):
    namespace = dict(globals())
    exec(f"class Reads(Rated):\n    def forward(self, t, y):\n        return self.net(y) * {READERS[name]}", namespace)
    module, y, times = namespace["Reads"](), torch.randn(3, 2).double(), torch.tensor([0.0, 1.0]).double()

    def run():
        found = []
        for rate in (1.0, 2.0, 3.0):
            Rated.rate = Rates.rate = CONFIG.rate = SETTINGS.rate = rate
            found.append(odeint(module, y, times, method="rk4"))
        return found

    wanted = run()
    with accelerate():
        torch.testing.assert_close(run(), wanted, rtol=1e-9, atol=1e-9)


# --------------------------------------------------------------------------------------- the first evaluation of a solve


class MadeInForward(nn.Module):
    """What forward makes where it is missing. kind: of what it is made, and what else happens."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.norm = nn.Linear(3, 3).double(), nn.BatchNorm1d(3).double()
        self.kind, self.held, self.list = kind, None, []

    def forward(self, t, y):
        if self.held is None:
            self.held = self.net.weight.T.contiguous() if self.kind == "parameters" else torch.randn_like(y[:1])
        if self.kind == "list":
            self.list.append(float(t))
        if self.kind == "dropout":
            y = nn.functional.dropout(y, 0.5, self.training)
        if self.kind == "norm":
            y = self.norm(y)
        if self.kind == "average":
            self.held = 0.9 * self.held + 0.1 * y.detach().mean(0, keepdim=True)
        if self.kind == "parameters":
            return torch.tanh(y @ self.held)
        return torch.tanh(self.net(y)) * self.held


@pytest.mark.filterwarnings("ignore:accelerate")
@pytest.mark.parametrize("kind", ["parameters", "noise", "list", "dropout", "norm", "average"])
def test_the_first_evaluation_leaves_what_it_would_leave(kind):
    y, times = torch.randn(5, 3).double(), torch.tensor([0.0, 1.0]).double()

    def run():
        module = MadeInForward(kind)
        torch.manual_seed(1)
        out = odeint(module, y, times, method="rk4", options={"step_size": 0.25})
        grads = torch.autograd.grad(out[-1].square().sum(), module.net.weight)
        return out, grads, module.held.detach(), len(module.list), module.norm.running_mean, torch.rand(1)

    wanted = run()
    with accelerate():
        torch.testing.assert_close(run(), wanted, rtol=1e-9, atol=1e-9)


def test_numbers_that_require_a_gradient_later_have_one():
    class Source(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.code = nn.Linear(3, 3).double(), None

        def forward(self, t, y):
            return torch.tanh(self.net(y)) * self.code

    module, encoder, given = Source(), nn.Linear(2, 3).double(), torch.randn(2).double()
    y, times = torch.randn(5, 3).double(), torch.tensor([0.0, 1.0]).double()

    def run():
        with torch.no_grad():  # validation, then training, on the same
            module.code = encoder(given)
            odeint(module, y, times, method="rk4")
        module.code = encoder(given)
        loss = odeint(module, y, times, method="rk4")[-1].square().sum()
        return torch.autograd.grad(loss, list(encoder.parameters()))

    wanted = run()
    with accelerate():
        torch.testing.assert_close(run(), wanted)


def test_profilers_and_odd_attributes_of_classes_are_left_alone():
    class Settings(dict):
        __getattr__ = dict.__getitem__

    class Raises:
        def __get__(self, instance, owner):
            raise RuntimeError("not here")

    class Odd(Demo):
        settings, raising = Settings(rate=2.0), Raises()

        def forward(self, t, y):
            return super().forward(t, y) * self.settings.rate

    module, y, times = Odd().double(), torch.randn(3, 2).double(), torch.tensor([0.0, 1.0]).double()
    wanted = odeint(module, y, times, method="rk4")
    profiler = cProfile.Profile()
    with accelerate() as context:
        profiler.enable()
        found = odeint(lambda t, y: module(t, y), y, times, method="rk4")
        assert sys.getprofile() is profiler
        profiler.disable()
        torch.testing.assert_close(found, wanted)
        Odd.settings = Settings(rate=3.0)
        torch.testing.assert_close(odeint(module, y, times, method="rk4")[0], wanted[0])
        assert "cpu engine" in context.report()


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 2).double()

    def factor(self):
        return SETTINGS.rate

    def forward(self, t, y):
        return self.net(y) * self.factor()


class Derived(Base):
    def forward(self, t, y):
        return super().forward(t, y) + 1.0


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Base()

    def forward(self, t, y):
        return self.inner.net(y) * self.inner.factor()


@pytest.mark.parametrize("make", [Derived, Outer])
def test_what_methods_of_parents_and_parts_read_is_watched(make):
    module, y, times = make(), torch.randn(3, 2).double(), torch.tensor([0.0, 1.0]).double()

    def run():
        found = []
        for rate in (1.0, 2.0):
            SETTINGS.rate = rate
            found.append(odeint(module, y, times, method="rk4"))
        return found

    wanted = run()
    with accelerate():
        torch.testing.assert_close(run(), wanted)


def test_what_is_never_made_is_not_waited_for_at_every_solve():
    class Evaluations:
        count = 0

        def add(self):
            self.count += 1

    evaluations = Evaluations()

    class Never(Demo):
        def __init__(self):
            super().__init__()
            self.held, self.calls = None, 0

        def forward(self, t, y):
            evaluations.add()
            if self.held is None and self.calls < 0:
                self.held = y
            return super().forward(t, y)

    module, y, times = Never().double(), torch.randn(3, 2).double(), torch.tensor([0.0, 1.0]).double()
    with accelerate() as context:
        odeint(module, y, times, method="rk4")
        before = evaluations.count
        for _ in range(3):
            odeint(module, y, times, method="rk4")
        assert context.report() == "Never: cpu engine, 4 solves" and evaluations.count == before


LABELLED = {
    "sum": lambda m, te, ye, x: m.net(m.lift(x) + (te + ye)),
    "product": lambda m, te, ye, x: m.net(m.lift(x) + te * ye),
    "joined": lambda m, te, ye, x: m.net(m.lift(x) + torch.cat((te[:, :4], ye[:, :4]), 1)),
    "a layer behind": lambda m, te, ye, x: m.net(m.lift(x) + torch.relu(m.mix(te + ye))),
    "one hot": lambda m, te, ye, x: m.net(m.lift(x) + (te + nn.functional.one_hot(m.labels, 5).to(x) @ m.table.weight)),
}


@pytest.mark.parametrize("name", LABELLED)
def test_labels_beside_a_function_of_time(name):
    """As conditional U-Nets embed time and label before the state joins: numbers per sample, and no single large sample."""

    class Labelled(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.lift, self.time, self.mix = nn.Linear(2, 8), nn.Linear(1, 8), nn.Linear(8, 8)
            self.table, self.net = nn.Embedding(5, 8), nn.Sequential(nn.SiLU(), nn.Linear(8, 2))
            self.labels = torch.randint(0, 5, (6,))
            self.double()

        def forward(self, t, x):
            te = torch.tanh(self.time(t.expand(len(x))[:, None]))
            return LABELLED[name](self, te, self.table(self.labels), x)

    found = []
    for context in (None, accelerate()):
        module, x = Labelled(), torch.randn(6, 2).double().fill_(0.3).requires_grad_()
        with context or warnings.catch_warnings():
            y = odeint(module, x, torch.tensor([0.0, 1.0]).double(), method="rk4", options={"step_size": 0.2})[-1]
            gradients = torch.autograd.grad(y.sum(), [x, *module.parameters()], allow_unused=True, materialize_grads=True)
            module.labels = torch.tensor([4, 0, 2])  # of another batch
            more = odeint(module, x[:3].detach(), torch.tensor([0.0, 1.0]).double(), method="rk4", options={"step_size": 0.2})[-1]
        found.append((y, gradients, more))
    torch.testing.assert_close(*found)
    field = sfk.compile(Labelled(), like=torch.zeros(6, 2).double())
    assert field.layout is None and field.has_context
