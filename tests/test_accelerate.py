"""`with accelerate():` around scripts that were written for torchdiffeq: its examples, and what is handed on."""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings

import pytest
import torch
import torchdiffeq
from sparseflow_kernels import accelerate
from sparseflow_kernels import compile as compile_field
from sparseflow_kernels import odeint as own_odeint
from torch import nn
from torchdiffeq import odeint, odeint_adjoint  # imported before, as scripts do

torch.set_num_threads(1)


class Demo(nn.Module):  # ode_demo.py
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 50), nn.Tanh(), nn.Linear(50, 2))

    def forward(self, t, y):
        return self.net(y**3)


class Latent(nn.Module):  # latent_ode.py
    def __init__(self):
        super().__init__()
        self.elu = nn.ELU(inplace=True)
        self.fc1, self.fc2, self.fc3 = nn.Linear(4, 20), nn.Linear(20, 20), nn.Linear(20, 4)
        self.nfe = 0

    def forward(self, t, x):
        self.nfe += 1
        return self.fc3(self.elu(self.fc2(self.elu(self.fc1(x)))))


class Hyper(nn.Module):
    def __init__(self, dim, hidden, width):
        super().__init__()
        self.dim, self.width, self.block = dim, width, width * dim
        self.fc1, self.fc2 = nn.Linear(1, hidden), nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, 3 * self.block + width)

    def forward(self, t):
        p = torch.tanh(self.fc2(torch.tanh(self.fc1(t.reshape(1, 1)))))
        p = self.fc3(p).reshape(-1)
        w = p[: self.block].reshape(self.width, self.dim, 1)
        gate = torch.sigmoid(p[2 * self.block : 3 * self.block].reshape(self.width, 1, self.dim))
        u = p[self.block : 2 * self.block].reshape(self.width, 1, self.dim) * gate
        return w, p[3 * self.block :].reshape(self.width, 1, 1), u


class Cnf(nn.Module):  # cnf.py
    def __init__(self):
        super().__init__()
        self.hyper, self.width = Hyper(2, 8, 6), 6

    def forward(self, t, states):
        z = states[0]
        batch = z.shape[0]
        with torch.set_grad_enabled(True):
            z.requires_grad_(True)
            w, b, u = self.hyper(t)
            h = torch.tanh(torch.matmul(torch.unsqueeze(z, 0).repeat(self.width, 1, 1), w) + b)
            dz = torch.matmul(h, u).mean(0)
            trace = 0.0
            for i in range(z.shape[1]):
                trace = trace + torch.autograd.grad(dz[:, i].sum(), z, create_graph=True)[0].contiguous()[:, i].contiguous()
        return dz, -trace.contiguous().view(batch, 1)


def train(make, state, solver, inside, steps=4, **options):
    """Losses of a few steps of Adam on a module, made and trained as a script does."""
    torch.manual_seed(0)
    module = make().double()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    t = torch.linspace(0.0, 1.0, 5, dtype=torch.float64)
    losses = []

    def run():
        for _ in range(steps):
            optimizer.zero_grad()
            ys = solver(module, state(), t, rtol=1e-8, atol=1e-8, method="dopri5", **options)
            ys = ys if isinstance(ys, tuple) else (ys,)
            loss = sum((y[-1] ** 2).mean() + y.mean() for y in ys)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())

    if not inside:
        run()
        return losses, None
    with accelerate() as context:
        run()
    return losses, context


@pytest.mark.parametrize("solver", [odeint, odeint_adjoint], ids=["direct", "adjoint"])
@pytest.mark.parametrize(
    "make, state",
    [
        (Demo, lambda: torch.full((3, 2), 0.7).double()),
        (Latent, lambda: torch.linspace(-1, 1, 12).double().view(3, 4)),
        (Cnf, lambda: (torch.linspace(-1, 1, 10).double().view(5, 2), torch.zeros(5, 1).double())),
    ],
)
def test_the_examples_of_torchdiffeq_give_the_same_curves(make, state, solver):
    plain, _ = train(make, state, solver, inside=False)
    fast, context = train(make, state, solver, inside=True)
    torch.testing.assert_close(torch.tensor(fast), torch.tensor(plain), rtol=1e-6, atol=1e-7)
    assert "cpu engine, 4 solves" in context.report()


def test_what_cannot_be_compiled_is_handed_on_and_said_once():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(2, 2)

        def forward(self, t, y):
            return self.a(y) if float(y.sum()) > 0 else -y

    module, y0, t = Branches(), torch.randn(3, 2), torch.tensor([0.0, 1.0])
    wanted = odeint(module, y0, t)
    with accelerate() as context, pytest.warns(UserWarning, match="Branches is handed on") as said:
        for _ in range(3):
            assert torch.equal(odeint(module, y0, t), wanted)
        assert torch.equal(odeint(lambda t, y: -y, y0, t), odeint(lambda t, y: -y, y0, t))
    assert len(said) == 1 and "handed on to torchdiffeq (" in context.report()


class Ordered(nn.Module):
    def forward(self, y):
        return y.mode(-1, keepdim=True)[0] + y


def test_a_function_that_is_refused_is_named_with_its_place():
    net, y0, t = nn.Sequential(nn.Linear(2, 2), Ordered()), torch.randn(3, 2), torch.tensor([0.0, 0.1])

    class Model:
        def rate(self, t, y):
            return y.mode(-1, keepdim=True)[0] + y

    line = Model.rate.__code__.co_firstlineno
    scaled = functools.partial(lambda k, t, y: k * net(y), 0.5)
    for function, name, what in (
        (Model().rate, rf"Model.rate (test_accelerate.py:{line})", "the operation mode"),
        (scaled, f"<lambda> (test_accelerate.py:{line + 4})", "module 'Sequential.1' (Ordered): the operation mode"),
    ):
        with accelerate() as context, pytest.warns(UserWarning) as said:
            odeint(function, y0, t, method="euler")
        assert f"{name} is handed on to torchdiffeq: {what}" in str(said[0].message)
        assert f"{name}: handed on to torchdiffeq ({what}" in context.report()


def test_everything_is_put_back_after_errors_too():
    codes = [torchdiffeq.odeint.__code__, torchdiffeq.odeint_adjoint.__code__]
    with pytest.raises(ZeroDivisionError):
        with accelerate():
            with accelerate():
                assert torchdiffeq.odeint.__code__ is not codes[0]
            assert torchdiffeq.odeint.__code__ is not codes[0]
            raise ZeroDivisionError
    assert [torchdiffeq.odeint.__code__, torchdiffeq.odeint_adjoint.__code__] == codes
    assert "_sparseflow_kernels_call" not in torchdiffeq.odeint.__globals__


def test_calls_of_this_package_take_part_and_other_sizes_compile_once_more():
    module, t = Demo(), torch.tensor([0.0, 0.5])
    with accelerate() as context:
        one, two = own_odeint(module, torch.ones(3, 2), t), odeint(module, torch.ones(7, 2), t)
    assert context.report() == "Demo: cpu engine, 2 solves"
    torch.testing.assert_close(one[:, 0], two[:, 0])
    with torch.no_grad():
        torch.testing.assert_close(one, torchdiffeq.odeint(module, torch.ones(3, 2), t), rtol=1e-4, atol=1e-5)


def test_events_callbacks_and_other_solvers_work_as_ever():
    module, y0, t = Demo(), torch.full((1, 2), 0.5), torch.tensor([0.0, 1.0])
    adams = odeint(module, y0, t, method="explicit_adams")
    with accelerate():
        torch.testing.assert_close(odeint(module, y0, t, method="explicit_adams"), adams, rtol=1e-4, atol=1e-5)
        event_t, _ = odeint(module, y0, t, event_fn=lambda t, y: t - 0.3)
        assert abs(float(event_t) - 0.3) < 1e-4
        module.callback_step = lambda t, y, dt: None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            odeint(module, y0, t)


def test_threads_share_the_context():
    modules, failed = [Demo() for _ in range(4)], []
    t = torch.tensor([0.0, 1.0])
    wanted = [odeint(m, torch.ones(2, 2), t).detach() for m in modules]

    def work(number):
        try:
            for _ in range(3):
                found = odeint(modules[number], torch.ones(2, 2), t).detach()
                torch.testing.assert_close(found, wanted[number], rtol=1e-4, atol=1e-5)
        except Exception as error:  # noqa: BLE001
            failed.append(error)

    with accelerate():
        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert not failed


def test_attributes_set_between_solves_are_followed() -> None:
    """As graph fields are given their initial features before every solve."""

    class Source(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.x0 = nn.Linear(3, 3), torch.zeros(5, 3)
            self.register_buffer("mixing", torch.rand(5, 5))

        def forward(self, t, x):
            return self.mixing @ self.a(x) - x + self.x0

    torch.manual_seed(0)
    module, t = Source(), torch.tensor([0.0, 1.0])
    for _ in range(3):
        module.x0 = torch.randn(5, 3)
        with torch.no_grad():
            want = odeint(module, module.x0, t)
            with accelerate() as running:
                torch.testing.assert_close(odeint(module, module.x0, t), want, rtol=1e-4, atol=1e-5)
            assert "cpu engine" in running.report()
    with accelerate(), torch.no_grad():
        for _ in range(3):
            module.x0 = torch.randn(5, 3)
            found = odeint(module, torch.ones(5, 3), t)
            fresh = compile_field(module, like=module.x0)
            torch.testing.assert_close(own_odeint(fresh, torch.ones(5, 3), t), found, rtol=1e-4, atol=1e-5)


def test_what_becomes_unreadable_between_solves_is_handed_on_and_comes_back() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.power = nn.Linear(3, 3), 1

        def forward(self, t, x):
            x = nn.functional.dropout(self.a(x), 0.5, self.training)
            return x if self.power == 1 else x + 0.0 * torch.linalg.svdvals(x)

    module, y, t = Noisy(), torch.randn(4, 3), torch.tensor([0.0, 0.1])
    with accelerate() as running, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        odeint(module, y, t, method="euler")  # with noise
        module.eval()
        found = odeint(module, y, t, method="euler")
        assert "cpu engine, 1 solves" in running.report()
        module.power = 2
        torch.testing.assert_close(odeint(module, y, t, method="euler"), found)
        module.power = 1
        module.train()
        odeint(module, y, t, method="euler")
        report = running.report()
    assert report.count("dropout is active") == 1 and "svd" in report


def test_counters_of_the_module_go_on_as_under_torchdiffeq():
    counts = []
    for under in (contextlib.nullcontext, accelerate):
        module, y = Latent().double(), torch.ones(3, 4).double()
        nn.init.eye_(module.fc1.weight)
        for part in (module.fc2, module.fc3):
            nn.init.constant_(part.weight, 0.1)
        for part in (module.fc1, module.fc2, module.fc3):
            nn.init.zeros_(part.bias)
        with under():
            for _ in range(2):
                module.nfe = 0
                odeint(module, y, torch.tensor([0.0, 1.0]).double(), method="dopri5")
                counts.append(module.nfe)
    assert counts[0] > 8 and counts == [counts[0]] * 4


def test_modules_with_hooks_are_handed_on_so_that_these_are_called():
    module, y, seen = Demo().double(), torch.randn(3, 2).double(), []
    handle = module.net[0].register_forward_hook(lambda part, inputs, output: seen.append(len(output)))
    times = torch.tensor([0.0, 1.0]).double()
    with accelerate() as context:
        with pytest.warns(UserWarning, match="hooks"):
            odeint(module, y, times, method="rk4")
        assert len(seen) == 4
        handle.remove()
        odeint(module, y, times, method="rk4")
        assert len(seen) == 4 and "cpu engine, 1 solves" in context.report()


NET, GAIN = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2)).double(), 1.5


def of_globals(t, y):
    return GAIN * NET(y)


class Model(nn.Module):
    """Its method is the field; the rest of it, in training mode, changes at every call."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.inner, self.weight, self.scale = nn.Linear(2, 2), nn.Parameter(torch.ones(2)), 2.0

    def field(self, t, y):
        return torch.tanh(self.inner(y)) * self.weight * self.scale

    def forward(self, y, times):
        return odeint(self.field, self.encoder(y), times, rtol=1e-8, atol=1e-8, method="dopri5")


class Plain:
    def __init__(self):
        self.net, self.gain = NET, 0.5

    def __call__(self, t, y):
        return self.net(y) * self.gain


def times_number(t, y, number):
    return number * NET(y)


def functions(context):
    plain = Plain()
    yield "lambda", lambda: (lambda t, y: NET(y) - y)
    yield "context", lambda: (lambda t, y: NET(y + context))
    yield "globals", lambda: of_globals
    yield "partial", lambda: functools.partial(times_number, number=2.0)
    yield "object", lambda: plain
    yield "no network", lambda: (lambda t, y: torch.stack((y[:, 1], -y[:, 0]), 1))


@pytest.mark.parametrize("name", dict(functions(None)))
def test_functions_are_compiled_once_with_the_modules_that_they_read(name):
    context, y = torch.randn(3, 2).double(), torch.randn(3, 2).double()
    make, times = dict(functions(context))[name], torch.linspace(0, 1, 3).double()

    def run():
        out = odeint(make(), y, times, rtol=1e-9, atol=1e-9, method="dopri5")
        return out, torch.autograd.grad(out.sum(), list(NET.parameters())) if out.requires_grad else ()

    wanted = run()
    with accelerate() as accelerated:
        for _ in range(3):
            found = run()
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    assert accelerated.report().endswith("cpu engine, 3 solves")


def test_a_method_does_not_wait_for_the_rest_of_its_model():
    model, y, times = Model().double(), torch.randn(5, 2).double(), torch.tensor([0.0, 1.0]).double()

    def run(scale):
        model.scale = scale
        out = model(y, times)
        return out, torch.autograd.grad(out.sum(), list(model.parameters()))

    scales = (2.0, 2.0, 3.0, 3.0)
    wanted = [run(scale) for scale in scales]
    with accelerate() as accelerated:
        found = [run(scale) for scale in scales]
        assert len(accelerated._met) == 2  # one more for the new scale, and none for what the encoder counts
        assert accelerated.report().endswith("cpu engine, 4 solves")
        assert torch.equal(run(2.0)[0], found[0][0]) and len(accelerated._met) == 2  # and back
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_functions_that_write_what_they_read_are_handed_on_and_left_alone():
    count, seen, y, times = [0], [], torch.randn(3, 2).double(), torch.tensor([0.0, 1.0]).double()

    def counts(t, y):
        count[0] += 1
        return NET(y)

    class Notes(Demo):
        def __init__(self):
            super().__init__()
            self.seen = seen

        def forward(self, t, y):
            self.seen.append(float(t))
            return super().forward(t, y)

    with accelerate(), pytest.warns(UserWarning, match="handed on"):
        odeint(counts, y, times, method="rk4")
        odeint(Notes().double(), y, times, method="rk4")
    assert count == [4] and seen[0] == 0.0 and len(seen) == 4


def test_what_is_another_at_every_solve_is_handed_on():
    module, y, times = Demo().double(), torch.randn(3, 2).double(), torch.tensor([0.0, 1.0]).double()
    with accelerate() as accelerated, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(12):
            module.number = number
            odeint(module, y, times, method="rk4")
        assert "handed on to torchdiffeq (it, or modules of its class" in accelerated.report()
        assert "cpu engine, 8 solves" in accelerated.report()
        for _ in range(4 + 64):  # after a while it is tried again
            odeint(module, y, times, method="rk4")
        assert "cpu engine, 16 solves" in accelerated.report()


def test_functions_of_one_code_over_other_functions_are_told_apart():
    y, times = torch.randn(3, 2).double(), torch.tensor([0.0, 1.0]).double()
    inner = (torch.sin, torch.cos, nn.functional.softplus, lambda y: 2 * y, lambda y: -y)
    solve = lambda act: odeint(lambda t, y: act(NET(y)), y, times, method="rk4")  # noqa: E731
    wanted = [solve(act) for act in inner]
    with accelerate():
        torch.testing.assert_close([solve(act) for act in inner], wanted, rtol=1e-9, atol=1e-9)


def test_many_solves_of_one_step_are_left_to_torchdiffeq():
    """As between the observations of an ODE-RNN: to begin a solve here takes as long as several evaluations."""
    torch.manual_seed(0)
    net, t = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)), torch.tensor([0.0, 0.1])
    field = lambda t, y: net(y)  # noqa: E731
    large = nn.Linear(600, 600)
    large_field, long_field = lambda t, y: -large(y), lambda t, y: -net(y)  # noqa: E731
    found = []
    for context in (contextlib.nullcontext(), accelerate()):
        y, wide = torch.ones(4, 3, requires_grad=True), torch.ones(4, 600)
        start = y
        with context as running:
            for _ in range(20):
                y = odeint(field, y, t, method="euler")[-1]
                wide = odeint(large_field, wide, t, method="euler")[-1]
                y = odeint(long_field, y, t, method="euler", options={"step_size": 0.02})[-1]
        found.append((y, wide, *torch.autograd.grad(y.sum() + wide.sum(), [start, *net.parameters()])))
    torch.testing.assert_close(*found)
    told = running.report().splitlines()
    assert any("cpu engine, 16 solves" in line for line in told)
    assert any("4 solves of a step or two left to torchdiffeq" in line for line in told)
    assert sum("cpu engine, 20 solves" in line for line in told) == 2
