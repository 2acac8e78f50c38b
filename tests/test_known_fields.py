"""What `accelerate` compiles, for how long it is kept, and who shares it: contexts, wrappers, functions, threads, copies."""

from __future__ import annotations

import concurrent.futures
import copy
import gc
import importlib
import sys
import warnings
import weakref

import pytest
import torch
import torchdiffeq
from sparseflow_kernels import accelerate
from torch import nn
from torchdiffeq import odeint, odeint_adjoint

torch.set_num_threads(1)
T = torch.tensor([0.0, 0.7, 1.0]).double()


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module, c: torch.Tensor, scale: float = 1.0) -> None:
        super().__init__()
        self.inner, self.c, self.scale, self.nfe = inner, c, scale, 0

    def forward(self, t, y):
        self.nfe += 1
        return self.inner(torch.cat([y, self.c], 1)) * self.scale


def solved(odeint, wrappers, y, **options):
    """Solutions, and the gradients of all that is trained, after all solves."""
    found = [odeint(one, y, T, rtol=1e-8, atol=1e-8, **options) for one in wrappers]
    trained = [*wrappers[0].inner.parameters(), *(one.c for one in wrappers)]
    loss = sum((i + 1) * part[-1].square().sum() for i, part in enumerate(found))
    return found, torch.autograd.grad(loss, trained, allow_unused=True)  # torchdiffeq's adjoint knows of no tensor held


@pytest.mark.parametrize("options", [{}, {"adjoint_options": {"norm": "seminorm"}}, {"method": "rk4"}])
def test_wrappers_made_for_every_solve_share_what_is_compiled(options, monkeypatch):
    inner, y = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double(), torch.randn(3, 2).double()
    contexts = [torch.randn(3, 2).double() for _ in range(10)]
    made = lambda: [Wrapper(inner, c.clone().requires_grad_()) for c in contexts]
    call = odeint_adjoint if "adjoint_options" in options else odeint
    first, second = made(), made()
    wanted = solved(call, first, y, **options)
    counts = [one.nfe for one in first]
    compiled = counted_compiles(monkeypatch)
    with accelerate() as context, warnings.catch_warnings():
        warnings.simplefilter("error")
        found = solved(call, second, y, **options)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-6, atol=1e-7)
    for ours, theirs in zip(found[1], wanted[1]):
        assert theirs is None or torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert wanted[1][0] is not None and (wanted[1][-1] is None) == ("adjoint_options" in options)
    assert len(compiled) == 4 and context.report().endswith("7 solves")
    if not options:
        assert [one.nfe for one in second] == counts
    with accelerate():
        for _ in range(30):
            odeint(Wrapper(inner, torch.randn(3, 2).double()), y, T)
    assert len(compiled) == 4


def test_the_adjoint_goes_back_with_the_numbers_of_its_own_solve():
    inner, y = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double(), torch.randn(3, 2).double()
    contexts = [torch.randn(3, 2).double() for _ in range(3)]
    options = {"adjoint_options": {"norm": "seminorm"}, "rtol": 1e-9, "atol": 1e-9}

    def run(held):
        loss = 0
        for c in contexts:
            if held is None:  # a lambda for every solve, over the numbers of now
                func = lambda t, x, c=c: inner(torch.cat([x, c], 1))
                out = odeint_adjoint(func, y, T, adjoint_params=tuple(inner.parameters()), **options)
            else:
                held.c = c
                out = odeint_adjoint(held, y, T, **options)
            loss = loss + out[-1].square().sum()
        return torch.autograd.grad(loss, list(inner.parameters()))

    wanted = run(None)
    held = Wrapper(inner, contexts[0])
    with accelerate():
        found = run(None), run(held)
    for one in found:
        torch.testing.assert_close(one, wanted, rtol=1e-5, atol=1e-7)
    assert held.nfe > 100  # of the solves backwards, too


def test_wrappers_with_other_numbers_are_compiled_by_themselves_and_not_for_ever():
    inner, y = nn.Linear(4, 2).double(), torch.randn(3, 2).double()
    wrappers = [Wrapper(inner, torch.randn(3, 2).double(), scale=0.1 * i) for i in range(40)]
    solve = lambda one: odeint(one, y, T)
    wanted = [solve(one) for one in wrappers]
    with accelerate() as context, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = [solve(one) for one in wrappers]
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert len(told) == 1 and "keep one, and give it what changes" in str(told[0].message)
    assert "keep one" in context.report()
    few = wrappers[:5]  # that live on, and take turns
    wanted = [solve(one) for one in few]
    with accelerate() as context:
        found = [solve(one) for _ in range(20) for one in few]
    torch.testing.assert_close(found, wanted * 20, rtol=1e-6, atol=1e-6)


class Path(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("slope", torch.randn(2).double())


class Controlled(nn.Module):
    def __init__(self, net, path):
        super().__init__()
        self.net, self.path = net, path

    def forward(self, t, y):
        return torch.tanh(self.net(y)) * self.path.slope


def test_wrappers_round_parts_made_anew_share_what_is_compiled(monkeypatch):
    net, y = nn.Linear(2, 2).double(), torch.randn(3, 2).double()
    wrappers = [Controlled(net, Path()) for _ in range(20)]
    wanted = [odeint(one, y, T) for one in wrappers]
    compiled = counted_compiles(monkeypatch)
    with accelerate(), warnings.catch_warnings():
        warnings.simplefilter("error")
        found = [odeint(one, y, T) for one in wrappers]
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert len(compiled) == 5  # three alone, and two for all others: with the slope as a constant, and as it moves


class Knots:
    """A path through the data of a batch. `first` is never read."""

    def __init__(self, values):
        self.values, self.first = values, values[:, 0] + 1.0

    def derivative(self, t):
        return self.values[:, 1:].index_select(1, (t * 3.9).long().clamp(0, 3).reshape(1))[:, 0]


class KnotsModule(nn.Module):
    def __init__(self, values):
        super().__init__()
        self.register_buffer("values", values)
        self.register_buffer("first", values[:, 0] + 1.0)

    derivative = Knots.derivative


class Driven(nn.Module):
    def __init__(self, net, path=None):
        super().__init__()
        self.net, self.path = net, path
        self.idle = nn.BatchNorm1d(2, affine=False).double()

    def forward(self, t, y):
        return torch.tanh(self.net(y)) * self.path.derivative(t)

    def method(self, t, y):
        return self.forward(t, y)

    def solve(self, odeint, path, kind, y):
        self.path = path
        net = self.net
        func = {
            "kept": lambda: self, "method": lambda: self.method, "wrapper": lambda: Driven(net, path),
            "lambda": lambda: lambda t, y: torch.tanh(net(y)) * path.derivative(t),
        }[kind]()  # fmt: skip
        self.idle(y)  # its buffers change
        return odeint(func, y, T, method="rk4", options={"step_size": 0.1})[-1]


@pytest.mark.parametrize("kind", ["kept", "method", "wrapper", "lambda"])
@pytest.mark.parametrize("path", [Knots, KnotsModule])
@pytest.mark.parametrize("lengths", [(5,), (5, 7)])
def test_paths_through_data_are_context(path, kind, lengths, monkeypatch):
    model, y = Driven(nn.Linear(2, 2)).double(), torch.randn(3, 2).double()
    data = [torch.randn(3, lengths[i % len(lengths)], 2).double() for i in range(14)]

    def run():
        given = [x.clone().requires_grad_() for x in data]
        found = [model.solve(torchdiffeq.odeint, path(x), kind, y) for x in given]
        loss = sum((i + 1) * part.square().sum() for i, part in enumerate(found))
        return found, torch.autograd.grad(loss, [*model.net.parameters(), *given])

    wanted = run()
    compiled = counted_compiles(monkeypatch)
    with accelerate(), warnings.catch_warnings():
        warnings.simplefilter("error")
        found = run()
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    anew = kind == "wrapper" or (kind == "lambda" and path is KnotsModule)
    assert len(compiled) == len(lengths) + 3 * anew


def test_lengths_that_come_back_find_their_fields(monkeypatch):
    net, y = nn.Linear(2, 2).double(), torch.randn(3, 2).double()
    compiled = counted_compiles(monkeypatch)
    with accelerate(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(60):
            odeint(Driven(net, Knots(torch.randn(3, 5 + number % 7, 2).double())), y, T, method="euler")
    assert len(compiled) <= 3 + 7


def test_parts_that_a_method_reaches_without_calling_them_are_watched():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("by", torch.ones(2).double())
            self.number = 1.0

        def value(self):
            return self.by * self.number

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.scaled = nn.Linear(2, 2).double(), Scaled()

        def method(self, t, y):
            return self.net(y) * self.scaled.value()

    model, y = Model(), torch.randn(3, 2).double()
    changes = (
        lambda: None, lambda: model.scaled.by.mul_(2.0), lambda: setattr(model.scaled, "number", 0.5),
        lambda: setattr(model, "scaled", Scaled()),
    )  # fmt: skip

    def solve():
        return torchdiffeq.odeint(model.method, y, T, method="rk4")

    for change in changes:
        change()
        wanted = solve()
        with accelerate() as context:
            torch.testing.assert_close(solve(), wanted, rtol=1e-9, atol=1e-9)
        assert "cpu engine" in context.report()


def test_classes_made_for_every_solve_are_not_compiled_for_ever(monkeypatch):
    net, y = nn.Linear(4, 2).double(), torch.randn(3, 2).double()

    def made(c):
        class Local(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = net

            def forward(self, t, x):
                return torch.tanh(self.net(torch.cat([x, c], 1)))

        return Local()

    contexts = [torch.randn(3, 2).double() for _ in range(15)]
    wanted = [odeint(made(c), y, T) for c in contexts]
    compiled = counted_compiles(monkeypatch)
    with accelerate(), pytest.warns(UserWarning, match="keep one, and give it what changes"):
        found = [odeint(made(c), y, T) for c in contexts]
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert len(compiled) == 8


@pytest.mark.parametrize("kind", ["lambda", "wrapper"])
def test_threads_solve_for_their_own_numbers(kind):
    inner, y = nn.Linear(4, 2).double(), torch.randn(3, 2).double()
    contexts = [torch.randn(3, 2).double() for _ in range(60)]

    def solve(c):
        func = Wrapper(inner, c) if kind == "wrapper" else lambda t, x: inner(torch.cat([x, c], 1))
        return odeint(func, y, T)

    wanted = [solve(c) for c in contexts]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with accelerate(), concurrent.futures.ThreadPoolExecutor(4) as pool:
            found = list(pool.map(solve, contexts))
    finally:
        sys.setswitchinterval(before)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double()

    def forward(self, t, y):
        return self.net(y) - y * t


class Solver(nn.Module):
    """A model that enters a context for every solve, as forward of many do."""

    def __init__(self, func):
        super().__init__()
        self.func = func

    def forward(self, y):
        with accelerate() as accelerated:
            out = torchdiffeq.odeint(self.func, y, T)[-1] + torchdiffeq.odeint(lambda t, x: self.func(t, x), y, T)[-1]
        self.report = accelerated.report()
        return out


def counted_compiles(monkeypatch):
    found = []
    module = importlib.import_module("sparseflow_kernels.accelerate")
    own = module.compile_field
    monkeypatch.setattr(module, "compile_field", lambda *a, **k: found.append(a[0]) or own(*a, **k))
    return found


def test_a_context_for_every_solve_compiles_once(monkeypatch):
    compiled, net = counted_compiles(monkeypatch), Field()
    model, y = Solver(net), torch.randn(4, 2).double()
    wanted = 2 * torchdiffeq.odeint(net, y, T)[-1]
    for _ in range(3):
        torch.testing.assert_close(model(y), wanted, rtol=1e-6, atol=1e-6)
        assert model.report.count("1 solves") == 2
    assert len(compiled) == 2 and compiled[0] is net
    with accelerate("reference"):
        torchdiffeq.odeint(net, y, T)
    assert len(compiled) == 3


def test_as_a_decorator(monkeypatch):
    compiled, net, y = counted_compiles(monkeypatch), Field(), torch.randn(4, 2).double()

    @accelerate()
    def end(y):
        return torchdiffeq.odeint(net, y, T)[-1]

    found = [end(y) for _ in range(3)]
    assert len(compiled) == 1
    torch.testing.assert_close(found, 3 * [torchdiffeq.odeint(net, y, T)[-1]], rtol=1e-6, atol=1e-6)


def test_copies_and_pickles_know_nothing_of_what_was_compiled(monkeypatch, tmp_path):
    net, y = Field(), torch.randn(4, 2).double()
    Solver(net)(y)
    torch.save(net, tmp_path / "net.pt")
    assert b"sparseflow" not in (tmp_path / "net.pt").read_bytes().replace(b"_sparseflow_kernels_kept", b"")
    read = torch.load(tmp_path / "net.pt", weights_only=False)
    compiled = counted_compiles(monkeypatch)
    for other in (copy.deepcopy(net), read, copy.copy(net)):
        with torch.no_grad():
            next(other.parameters()).mul_(2.0)
        wanted = 2 * torchdiffeq.odeint(other, y, T)[-1]
        torch.testing.assert_close(Solver(other)(y), wanted, rtol=1e-6, atol=1e-6)
        assert compiled.pop() is not compiled.pop()
    assert net.state_dict().keys() == Field().state_dict().keys()


def test_what_was_compiled_goes_with_its_module():
    net, y = Field(), torch.randn(4, 2).double()
    Solver(net)(y)
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None


def test_what_was_refused_is_tried_again_where_it_is_another(monkeypatch):
    class Switch(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.odd = nn.Linear(2, 2).double(), True

        def forward(self, t, y):
            return self.net(y) if not self.odd or float(y.sum()) > 0 else -y

    compiled, net, y = counted_compiles(monkeypatch), Switch(), torch.randn(4, 2).double()
    for expected in (1, 1, 2, 2):
        if expected == 2:
            net.odd = False
        with warnings.catch_warnings(), accelerate() as accelerated:
            warnings.simplefilter("ignore")
            torchdiffeq.odeint(net, y, T)
        assert len(compiled) == expected and ("handed on" in accelerated.report()) == (expected == 1)


def test_a_solve_inside_forward_is_a_part_of_it():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Field()

        def forward(self, t, y):
            return torchdiffeq.odeint(self.inner, y, torch.tensor([0.0, 0.1]).double(), method="rk4")[-1] - y

    net, y = Nested(), torch.randn(4, 2).double()
    wanted = torchdiffeq.odeint(net, y, T)
    with accelerate() as context:
        torch.testing.assert_close(torchdiffeq.odeint(net, y, T), wanted, rtol=1e-7, atol=1e-8)
    assert context.report() == "Nested: cpu engine, 1 solves"


class Source(nn.Module):
    """A graph's field with a source term, as an encoder gives it for every batch."""

    def __init__(self, adjacency):
        super().__init__()
        self.net, self.x0 = nn.Linear(3, 3).double(), None
        self.register_buffer("adjacency", adjacency)
        self.register_buffer("rate", torch.ones(3).double())

    def forward(self, t, x):
        return torch.tanh(self.adjacency @ self.net(x)) - self.rate * x + self.x0


@pytest.mark.parametrize("call", [odeint, odeint_adjoint], ids=["direct", "adjoint"])
@pytest.mark.parametrize("kind", ["detached", "trained", "trained with zeros"])
def test_tensors_that_are_others_at_every_solve_are_read_like_parameters(kind, call, monkeypatch):
    torch.manual_seed(0)
    adjacency = (torch.rand(6, 6) < 0.4).double()
    field, encoder = Source(adjacency), nn.Linear(2, 3).double()
    data = [torch.randn(6, 2).double() for _ in range(10)]

    def run(call):
        found = []
        for number, one in enumerate(data):
            x = encoder(one)
            x = torch.relu(x) if "zeros" in kind else x
            field.x0 = x.detach() if kind == "detached" else x
            field.rate = torch.full((3,), 0.5 + number % 3).double()
            found.append(call(field, x, T, method="rk4", options={"step_size": 0.25})[-1])
        loss = sum((i + 1) * part.square().sum() for i, part in enumerate(found))
        return found, torch.autograd.grad(loss, [*field.parameters(), *encoder.parameters()])

    wanted = run(odeint)  # torchdiffeq's adjoint goes back with the last x0, and knows of none
    compiled = counted_compiles(monkeypatch)
    with accelerate() as context, warnings.catch_warnings():
        warnings.simplefilter("error")
        found = run(call)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert len(compiled) == 2 and context.report() == "Source: cpu engine, 10 solves"


def test_the_continuous_adjoint_goes_back_with_such_tensors_of_its_own_solve():
    field = Source(torch.eye(4).double())
    options = {"adjoint_options": {"norm": "seminorm"}, "rtol": 1e-9, "atol": 1e-9}

    def run(call, **options):
        torch.manual_seed(1)
        found = []
        for _ in range(4):
            field.x0 = torch.rand(4, 3).double() + 0.1
            found.append(call(field, torch.randn(4, 3).double(), T, **options)[-1].square().sum())
        return torch.autograd.grad(sum(found), list(field.parameters()))

    wanted = run(odeint, rtol=1e-9, atol=1e-9)
    with accelerate():
        torch.testing.assert_close(run(odeint_adjoint, **options), wanted, rtol=1e-6, atol=1e-7)


def test_masks_that_are_others_stay_masks():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(8, 8).double()
            self.register_buffer("mask", (torch.rand(8, 8) < 0.3).double())

        def forward(self, t, x):
            return torch.tanh(x @ (self.net.weight * self.mask).T)

    module, y = Masked(), torch.randn(5, 8).double()
    with accelerate() as context:
        for _ in range(3):
            module.mask = (torch.rand(8, 8) < 0.3).double()
            wanted = Masked.forward(module, None, y)
            field = context.field_for(module, y)
            torch.testing.assert_close(field(0.0, y), wanted)
            assert not field.moving and field.nnz <= int(module.mask.sum()) + 8  # of the identity behind tanh


@pytest.mark.parametrize("seconds", [(1.0, 2.0), (2.0, 1.0)], ids=["quicker", "slower"])
def test_states_of_one_large_sample_go_to_the_quicker(seconds, monkeypatch):
    trial = importlib.import_module("sparseflow_kernels.trial")
    monkeypatch.setattr(trial, "SMALLEST", 32)
    field, x = Source(torch.eye(20).double() + 0.1), torch.randn(20, 3).double()
    field.x0 = torch.ones(20, 3).double()
    wanted = torchdiffeq.odeint(field, x, T)
    turns = iter(seconds * 8)
    ran = []
    monkeypatch.setattr(trial, "_seconds", lambda run: ran.append(run()) or next(turns))
    with accelerate() as context, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for number in range(3):
            field.x0 = torch.full((20, 3), 1.0 + number).double()
            found = torchdiffeq.odeint(field, x, T)
            if not number:
                torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    slower = seconds[0] > seconds[1]
    assert ("1e+03 ms there and 2e+03 ms here" in context.report()) == slower
    assert ("cpu engine, 3 solves" in context.report()) == (not slower)
    assert len(told) == slower and len(ran) == (8 if slower else 16)  # once more, when x0 had moved
    with accelerate() as context:
        torchdiffeq.odeint(field, x, T)
    assert len(ran) == (8 if slower else 16) and ("torch is quicker" in context.report()) == slower


class Passes(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, t, x):
        return self.inner(t, x)


@pytest.mark.parametrize("kind", ["wrapper of a wrapper", "lambda over a wrapper"])
def test_wrappers_inside_may_be_new_as_well(kind, monkeypatch):
    inner, y = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double(), torch.randn(3, 2).double()
    contexts = [torch.randn(3, 2).double() for _ in range(12)]

    def solve(c):
        wrapper = Passes(Wrapper(inner, c))
        func = wrapper if kind == "wrapper of a wrapper" else lambda t, x: wrapper(t, x) - x
        return odeint(func, y, T, method="rk4")[-1]

    def run():
        found = [solve(c) for c in contexts]
        return found, torch.autograd.grad(sum(found).square().sum(), list(inner.parameters()))

    wanted = run()
    compiled = counted_compiles(monkeypatch)
    with accelerate(), warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(run(), wanted, rtol=1e-9, atol=1e-9)
    assert len(compiled) == 4


class Noisy(nn.Module):
    """FFJORD's: the noise is drawn in the first evaluation of a solve."""

    def __init__(self):
        super().__init__()
        self.net, self.noise = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double(), None
        self.register_buffer("nfe", torch.tensor(0.0))

    def before(self):
        self.noise = None
        self.nfe.fill_(0)

    def forward(self, t, states):
        y = states[0]
        self.nfe += 1
        if self.noise is None:
            self.noise = torch.randn_like(y)
        with torch.set_grad_enabled(True):
            y.requires_grad_(True)
            dy = self.net(y)
            product = torch.autograd.grad(dy, y, self.noise, create_graph=True)[0]
            return dy, -(product * self.noise).sum(1, keepdim=True)


def test_noise_that_a_solve_draws_is_drawn_as_without():
    def run():
        torch.manual_seed(0)
        field, found, counts = Noisy(), [], []
        for _ in range(5):
            field.before()
            x = torch.randn(6, 2).double()
            z, logp = odeint(field, (x, torch.zeros(6, 1).double()), T, rtol=1e-7, atol=1e-7)
            loss = z[-1].square().sum() + logp[-1].sum()
            found.append((z.detach(), logp.detach(), *torch.autograd.grad(loss, list(field.parameters()))))
            counts.append(int(field.nfe))
        return found, counts

    wanted = run()
    with accelerate() as context:
        found = run()
        assert context.report() == "Noisy: cpu engine, 5 solves"
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-6, atol=1e-6)
    assert found[1] == wanted[1]
