"""What Python makes of t (`int(t)`, `np.interp(float(t))`, `math.sin(t)`) becomes functions of time that run forward."""

from __future__ import annotations

import bisect
import copy
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
import torchdiffeq
from torch import nn

import sparseflow_kernels as sfk

KNOTS = np.linspace(0, 5, 6)
VALUES = np.random.default_rng(0).normal(size=6)
X = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
T = torch.tensor([0.0, 1.3, 2.6], dtype=torch.float64)
STEPS = dict(method="rk4", options={"step_size": 0.1})


class Driven(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
        self.register_buffer("table", torch.randn(6, 3))
        self.weights = nn.Parameter(torch.randn(6, 3))
        self.nfe = 0
        self.double()

    def forward(self, t, x):
        self.nfe += 1
        return 0.3 * self.net(x) + self.drive(t, x)

    def drive(self, t, x):
        return self.table[int(t)]


DRIVES = {
    "a row of a buffer": lambda self, t, x: self.table[int(t)],
    "from the end": lambda self, t, x: self.table[-1 - int(t)],
    "a row of a parameter": lambda self, t, x: self.weights[min(int(t / 0.5), 5)],
    "a list": lambda self, t, x: [0.1, -0.3, 0.2, 0.5, 0.9, 1.0][int(t)] * x,
    "bisect": lambda self, t, x: self.table[bisect.bisect([0.5, 1.5, 2.2], float(t))],
    "numpy's interpolation": lambda self, t, x: self.weights[0] * float(np.interp(float(t), KNOTS, VALUES)),
    "the math module": lambda self, t, x: x * math.sin(t) + self.table[round(float(t))] * math.cos(2 * t),
    "an array": lambda self, t, x: torch.from_numpy(np.array([np.sin(t.item()), 1.0, math.exp(-float(t))])) * x,
    "a tensor of numbers": lambda self, t, x: torch.tensor([math.sin(t), 0.0, 1.0], dtype=x.dtype) * x,
    "full": lambda self, t, x: torch.cat([x[:, :2], torch.full_like(x[:, :1], math.floor(float(t)))], 1),
}


def driven(name):
    return type("Driven", (Driven,), {"drive": DRIVES[name]})()


@pytest.mark.parametrize("name", DRIVES)
def test_values_solves_and_gradients(name):
    module = driven(name)
    field = sfk.compile(module, live=True)
    assert field.engine_name == "cpu"
    for time in (0.0, 0.7, 1.0, 2.49):
        t = torch.tensor(time, dtype=torch.float64)
        torch.testing.assert_close(field(t, X), module(t, X))
    found = []
    for func, solve in ((module, torchdiffeq.odeint), (field, sfk.odeint)):
        module.nfe = 0
        x = X.clone().requires_grad_()
        y = solve(func, x, T, **STEPS)[-1]
        gradients = torch.autograd.grad(y.square().sum(), [x, *module.parameters()], allow_unused=True, materialize_grads=True)
        found.append((y, gradients, module.nfe))
    torch.testing.assert_close(*found)


def test_a_table_that_changes_and_copies():
    module = driven("a row of a buffer")
    live, own = sfk.compile(module, live=True), sfk.compile(module)
    t, before = torch.tensor(1.7, dtype=torch.float64), module(torch.tensor(1.7, dtype=torch.float64), X)
    module.table.add_(1.0)
    torch.testing.assert_close(live(t, X), module(t, X))
    for field in (own, copy.deepcopy(own)):
        torch.testing.assert_close(field(t, X), before)


def test_pickles():
    field = sfk.compile(Driven())
    t = torch.tensor(1.7, dtype=torch.float64)
    torch.testing.assert_close(pickle.loads(pickle.dumps(field))(t, X), field(t, X))


def test_other_operations_at_other_times_are_refused():
    refused = {
        "parameters": lambda self, t, x: [self.net[0], self.net[2]][int(t) % 2].bias[:3] + 0 * x,
        "a way": lambda self, t, x: x.sin() if int(t) < 1 else x.cos().square(),
        "a size": lambda self, t, x: x[:, : 1 + int(t) % 2].sum(1, keepdim=True).expand(-1, 3),
    }
    for drive in refused.values():
        with pytest.raises(sfk.UnsupportedFieldError, match="Python sees the value of one call alone"):
            sfk.compile(type("Driven", (Driven,), {"drive": drive})())


def test_where_torch_is_quicker_it_is_handed_on():
    """The functions run at every stage, which of a small field takes longer than the field."""
    module = Driven()
    with sfk.accelerate() as running, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torchdiffeq.odeint(module, X, T, **STEPS)
    torch.testing.assert_close(found, torchdiffeq.odeint(module, X, T, **STEPS))
    assert "cpu engine" in running.report() or "torch is quicker" in running.report()


EVENTS = {
    "in a number": lambda self, t, x: 5.0 if int(t * 100) in {121, 122, 123} else 0.0,
    "a spike in a table": lambda self, t, x: x * np.where(np.arange(400) == 37, 9.0, 1.0)[int(t * 40)],
    "beside others": lambda self, t, x: x * math.sin(t) * (3.0 if math.floor(float(t) * 997) % 41 == 7 else 1.0),
    "in operations before": lambda self, t, x: (x * 2.0 if int(t * 997) % 41 == 7 else x) * math.sin(t),
    "in operations behind": lambda self, t, x: torch.relu(x * math.sin(t)) if int(t * 997) % 41 == 7 else x * math.sin(t),
}


@pytest.mark.parametrize("name", EVENTS)
def test_events_that_no_look_has_met(name):
    """What is the same at all times that were tried may be another at one of a solve."""
    module = type("Driven", (Driven,), {"drive": EVENTS[name]})()
    fine = dict(method="rk4", options={"step_size": 0.01})
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        wanted = torchdiffeq.odeint(module, X, T, **fine)
        with sfk.accelerate():
            for _ in range(2):
                torch.testing.assert_close(torchdiffeq.odeint(module, X, T, **fine), wanted)


def test_counters_of_a_model_behind_a_function():
    module = driven("the math module")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for context in (None, sfk.accelerate()):
            module.nfe = 0
            with context or warnings.catch_warnings():
                torchdiffeq.odeint(lambda t, y: module(t, y), X, T, **STEPS)
            assert module.nfe == 4 * 26
