"""A module that is changed between two solves, inside `accelerate()`: values and gradients are those of torchdiffeq."""

from __future__ import annotations

import contextvars
import ctypes
import functools
import gc
import logging
import math
import multiprocessing
import queue
import sys
import threading
import time
import types
import warnings
import weakref

import pytest
import torch
import torchdiffeq
from torch import nn

import sparseflow_kernels as sfk

T = torch.tensor([0.0, 1.0])
Y = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))

mycfg = types.ModuleType("a_users_settings")
sys.modules["a_users_settings"] = mycfg
VARIABLE = contextvars.ContextVar("variable")


def set_everything():
    mycfg.SCALE, mycfg.act = 1.0, torch.tanh
    VARIABLE.set(1.0)
    helper.scale = 1.0
    decorated.scale = 1.0


class Net(nn.Module):
    """A layer, and something beside it that forward reads."""

    def __init__(self, held=None, tie=lambda self: None):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.held = nn.Linear(3, 3), nn.Linear(3, 3), held
        tie(self)

    def forward(self, t, y):
        return torch.tanh(self.b(torch.tanh(self.a(y)))) * self.read(y)

    def read(self, y):
        return 1.0


def reads(function, forward=None):
    """A class whose forward reads by this function."""
    names = {"read": lambda self, y: function(self)} if forward is None else {"forward": forward}
    return type("Reads", (Net,), names)


def helper(y):
    return y * helper.scale


def decorate(function):
    @functools.wraps(function)
    def wrapper(self, t, y):
        return function(self, t, y) * wrapper.scale

    return wrapper


@decorate
def decorated(self, t, y):
    return torch.tanh(self.a(y))


def import_from(self):
    from a_users_settings import SCALE

    return SCALE


def import_whole(self):
    import a_users_settings as settings

    return settings.SCALE


class Holder:
    k = 1.0


HOLDER = Holder()


def tied(self):
    self.b.weight = self.a.weight


def tied_in_a_list(self):
    self.held = [self.a.weight]


def another(value=0.5):
    return nn.Parameter(torch.full((3, 3), value))


def zero_a_row(self):
    with torch.no_grad():
        self.a.weight[0] = 0


CASES = {  # name -> (makes the module, changes it)
    "tied weights, second": (lambda: Net(tie=tied), lambda m: setattr(m.b, "weight", another())),
    "tied weights, first": (lambda: Net(tie=tied), lambda m: setattr(m.a, "weight", another())),
    "tied, then assigned": (
        lambda: Net(tie=tied),
        lambda m: m.load_state_dict({k: v + ("b.w" in k) for k, v in m.state_dict().items()}, assign=True),
    ),
    "untied, then tied": (Net, tied),
    "a list holds a weight": (
        lambda: reads(lambda m: m.held[0].sum())(tie=tied_in_a_list), lambda m: setattr(m.a, "weight", another()),
    ),
    "numbers, then tensors": (lambda: reads(lambda m: m.held[0])([1.0]), lambda m: setattr(m, "held", [torch.ones(3) * 2])),
    "order of a dict": (
        lambda: reads(lambda m: next(iter(m.held.values())))({"a": 1.0, "b": 5.0}),
        lambda m: setattr(m, "held", {"b": 5.0, "a": 1.0}),
    ),
    "a truth value for a number": (
        lambda: reads(lambda m: 5.0 if isinstance(m.held[0], bool) else 1.0)([1]), lambda m: setattr(m, "held", [True]),
    ),
    "a negative zero": (lambda: reads(lambda m: math.copysign(1.0, m.held))(0.0), lambda m: setattr(m, "held", -0.0)),
    "an attribute of a helper": (
        lambda: reads(None, lambda self, t, y: torch.tanh(helper(self.a(y))))(), lambda m: setattr(helper, "scale", 0.1),
    ),
    "an attribute of a decorator": (lambda: reads(None, decorated)(), lambda m: setattr(decorated, "scale", 0.1)),
    "from ... import": (lambda: type("Reads", (Net,), {"read": lambda s, y: import_from(s)})(), lambda m: setattr(mycfg, "SCALE", 5.0)),
    "import": (lambda: type("Reads", (Net,), {"read": lambda s, y: import_whole(s)})(), lambda m: setattr(mycfg, "SCALE", 5.0)),
    "a function of a module": (
        lambda: reads(None, lambda self, t, y: mycfg.act(self.a(y)))(), lambda m: setattr(mycfg, "act", torch.sin),
    ),
    "a weak reference": (lambda: reads(lambda m: m.held().k)(weakref.ref(HOLDER)), lambda m: setattr(HOLDER, "k", 5.0)),
    "a shared value": (
        lambda: reads(lambda m: m.held.value)(multiprocessing.Value("f", 1.0)), lambda m: setattr(m.held, "value", 5.0),
    ),
    "a number of C": (lambda: reads(lambda m: m.held.value)(ctypes.c_float(1.0)), lambda m: setattr(m.held, "value", 5.0)),
    "bytes": (lambda: reads(lambda m: m.held[0])(bytearray([1])), lambda m: m.held.__setitem__(0, 5)),
    "a context variable": (lambda: reads(lambda m: VARIABLE.get())(), lambda m: VARIABLE.set(5.0)),
    "how many weights there are": (lambda: reads(lambda m: m.a.weight.nonzero().shape[0])(), zero_a_row),
    "whether a weight is trained": (
        lambda: reads(lambda m: 1.0 if m.a.weight.requires_grad else 5.0)(), lambda m: m.a.weight.requires_grad_(False),
    ),
    "a weight's gradient": (
        lambda: reads(lambda m: 1.0 if m.a.weight.grad is None else 5.0)(),
        lambda m: setattr(m.a.weight, "grad", torch.ones(3, 3)),
    ),
}  # fmt: skip


def values_and_gradients(module):
    y = torch.stack(tuple(torchdiffeq.odeint(module, Y, T)))[-1]
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [y, *torch.autograd.grad(y.sum(), trained, allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize("name", CASES)
def test_what_is_changed_is_seen(name):
    make, change = CASES[name]
    found = []
    for context in (None, sfk.accelerate()):
        set_everything()
        HOLDER.k = 1.0
        module = make()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with context or warnings.catch_warnings():
                first = values_and_gradients(module)
                change(module)
                found.append([*first, *values_and_gradients(module)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_functions_of_one_code_with_attributes_of_their_own():
    net = nn.Linear(3, 3)

    def make(k):
        def rate(t, y):
            rate.calls += 1
            return torch.tanh(net(y)) * rate.k

        rate.k, rate.calls = k, 0
        return rate

    found = []
    for context in (None, sfk.accelerate()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with context or warnings.catch_warnings():
                rates = [make(k) for k in (1.0, 5.0)]
                ys = [torchdiffeq.odeint(rate, Y, T)[-1] for rate in rates]
        found.append((*ys, [rate.calls for rate in rates]))
    torch.testing.assert_close(*found)


def test_a_buffer_that_is_to_have_a_gradient():
    class Scaled(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.ones(3))

        def read(self, y):
            return self.scale

    found = []
    for context in (None, sfk.accelerate()):
        module = Scaled()
        with context or warnings.catch_warnings():
            torchdiffeq.odeint(module, Y, T)
            module.scale.requires_grad_()
            torchdiffeq.odeint(module, Y, T).sum().backward()
        found.append(module.scale.grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


class Unread(Net):
    def forward(self, t, y):
        return torch.tanh(self.a(y))


def test_an_adjoint_gives_zeros_for_what_forward_does_not_read():
    """As torchdiffeq's does, of all parameters: a loop over their norms, and DistributedDataParallel, rely on it."""
    module = Unread()
    with sfk.accelerate():
        torchdiffeq.odeint(module, Y, T).sum().backward()
        assert module.b.weight.grad is None
        torchdiffeq.odeint_adjoint(module, Y, T).sum().backward()
    assert torch.equal(module.b.weight.grad, torch.zeros(3, 3)) and module.a.weight.grad.abs().sum() > 0


def test_an_adjoint_by_a_method_that_keeps_no_graph():
    module, field, options = Unread(), sfk.compile(Unread()), dict(solver="RK45")
    with sfk.accelerate():
        ys = torchdiffeq.odeint_adjoint(module, Y, T, method="scipy_solver", options=options)
    ours = sfk.odeint_adjoint(field, Y, T, method="scipy_solver", options=options)
    for one, weight in ((ys, module.a.weight), (ours, next(field.parameters()))):
        assert torch.autograd.grad(one.sum(), weight)[0].abs().sum() > 0


def test_callbacks_of_an_adjoint_are_called():
    class Called(Unread):
        steps = 0

        def callback_step_adjoint(self, t, y, dt):
            self.steps += 1

    module = Called()
    with sfk.accelerate():
        torchdiffeq.odeint_adjoint(module, Y, T).sum().backward()
    assert module.steps > 0


def test_a_state_of_inference_mode_trains():
    module = Unread()
    with torch.inference_mode():
        y = torch.randn(4, 3)
    for solve in (torchdiffeq.odeint, torchdiffeq.odeint_adjoint):
        with sfk.accelerate():
            solve(module, y, T).sum().backward()
    assert module.a.weight.grad.abs().sum() > 0


def test_modules_go_while_the_context_lasts():
    gone = []
    with sfk.accelerate() as running:
        for _ in range(3):
            module = Unread()
            torchdiffeq.odeint(module, Y, T).sum().backward()
            gone.append(weakref.ref(module))
            del module
        gc.collect()
        assert [one() for one in gone] == [None, None, None]
    assert running.report().count("Unread: cpu engine, 1 solves") == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["euler", "rk4"])
@pytest.mark.parametrize(("ends", "size"), [
    ((1.0, 1.6), 0.1), ((0.1, 0.4), 0.05), ((0.1, 0.4), 0.01), ((1.0, 2.2), 0.1), ((0.1, 0.28), 0.02), ((1.6, 1.0), 0.1),
])  # fmt: skip
def test_a_grid_whose_last_point_but_one_rounds_to_the_end(ends, size, method, dtype):
    class Counting(Net):
        nfe = 0

        def forward(self, t, y):
            self.nfe += 1
            return super().forward(t, y) * torch.sin(t)

    found = []
    for context in (None, sfk.accelerate()):
        module = Counting()
        with context or warnings.catch_warnings():
            y = torchdiffeq.odeint(module, Y, torch.tensor(ends, dtype=dtype), method=method, options={"step_size": size})
        found.append((y, module.nfe))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("where", ["part", "class"])
def test_counters_that_begin_on_the_class(where):
    class Counting(Net):
        nfe = 0

        def forward(self, t, y):
            owner = type(self) if where == "class" else self
            owner.nfe += 1
            return super().forward(t, y)

    found = []
    for context in (None, sfk.accelerate()):
        Counting.nfe, module = 0, Counting()
        with context or warnings.catch_warnings(), torch.no_grad():
            for _ in range(2):
                torchdiffeq.odeint(module, Y, T, method="rk4", options={"step_size": 0.1})
        found.append((module.nfe, Counting.nfe, module.__dict__.get("nfe")))
    assert found[0] == found[1] and found[0][0] == 80
    assert context.report() == "Counting: cpu engine, 2 solves"


def timed(function):
    @functools.wraps(function)
    def wrapper(*arguments):
        wrapper.calls += 1
        return function(*arguments)

    wrapper.calls = 0
    return wrapper


def logged(y):
    mycfg.calls["logged"] = mycfg.calls.get("logged", 0) + 1
    return y


class Trainer:
    def __init__(self, module):
        self.parts, self.step, self.rate = [module], 0, 0.5


HARMLESS = {
    "a timed helper": lambda self, t, y: timed_helper(self.a(y)),
    "a timed forward": timed(lambda self, t, y: torch.tanh(self.a(y))),
    "a helper that counts": lambda self, t, y: mycfg.logged(self.a(y)),
    "a trainer": lambda self, t, y: self.a(y) * self.trainer().rate,
}
timed_helper = timed(torch.tanh)


@pytest.mark.parametrize("name", HARMLESS)
def test_what_only_counts_compiles_nothing_anew(name):
    """Others call the same helpers meanwhile, and a trainer counts its steps."""
    mycfg.calls, mycfg.logged = {}, logged
    module = type("Reads", (Net,), {"forward": HARMLESS[name]})()
    trainer = Trainer(module)
    module.trainer = weakref.ref(trainer)
    with sfk.accelerate() as running, torch.no_grad():
        for _ in range(10):
            found = torchdiffeq.odeint(module, Y, T)
            module(T[0], Y)
            trainer.step += 1
    assert running.report() == "Reads: cpu engine, 10 solves"
    torch.testing.assert_close(found, torchdiffeq.odeint(module, Y, T), rtol=1e-4, atol=1e-4)


def test_what_other_threads_put_meanwhile_stays():
    module, stop, sent = Net(), [], []
    module.queue = queue.Queue()

    def produce():
        while not stop:
            module.queue.put(len(sent))
            sent.append(None)
            time.sleep(1e-4)

    thread = threading.Thread(target=produce)
    thread.start()
    try:
        for training in (True, False, True):  # compiled anew
            module.train(training)
            with sfk.accelerate(), torch.no_grad():
                torchdiffeq.odeint(module, Y, T)
    finally:
        stop.append(None)
        thread.join()
    assert module.queue.qsize() == len(sent)


def test_a_parameter_that_changes_before_the_backward_pass():
    """torch has no use for a bias there, so it may."""
    module = Net()
    with sfk.accelerate():
        y = torchdiffeq.odeint(module, Y, T)
        with torch.no_grad():
            module.b.bias.add_(0.1)
        y.sum().backward()
    assert module.b.bias.grad.abs().sum() > 0


@pytest.mark.parametrize("times", [[0.0, math.nan], [0.0, math.inf]])
def test_times_of_short_solves_are_checked(times):
    with sfk.accelerate(), pytest.raises(AssertionError, match="NaN|finite"):
        torchdiffeq.odeint(Net(), Y, torch.tensor(times), method="euler", options={"step_size": 0.05})


def test_short_solves_under_autocast_stay_where_they_are():
    module, found = Net(), []
    with sfk.accelerate(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(18):
            found.append(torchdiffeq.odeint(module, Y, T, method="midpoint"))
    assert all(torch.equal(one, found[0]) for one in found)


def test_loggers_are_not_walked():
    """All loggers of the process hang on one: a look at them took 25 times as long as a solve."""
    module = reads(None, lambda self, t, y: (self.held.debug("at %s", 0), torch.tanh(self.a(y)))[1])(logging.getLogger("some.user"))
    field = sfk.compile(module, live=True)
    assert len(field._watch._attributes._present()[0]) < 100
    torch.testing.assert_close(field(0.0, Y), module(T[0], Y), rtol=1e-4, atol=1e-5)
