"""What Python makes of the value of t: followed, or refused when it is read or when it comes back, never kept."""

from __future__ import annotations

import bisect
import copy
import math
from typing import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchdiffeq
from torch import Tensor, nn

import sparseflow_kernels as sfk

TIMES = (
    -1234.5, -90.0, -3.3, -0.2, 0.0, 0.3, 1.5, 2.9, 3.0, 5.5, 6.9, 7.0, 7.5, 12.3, 17.5, 29.9, 40.5, 100.25, 600.015,
    5000.0, 2e5,
)  # fmt: skip
KNOTS = torch.linspace(0, 30, 7)
TABLE = torch.randn(7, 3, generator=torch.Generator().manual_seed(3))
STEPS = torch.cat([torch.zeros(17), torch.ones(13)])


class Timed(nn.Module):
    """net(y) changed by rule(self, t, net(y)), a function of t."""

    def __init__(self, rule: Callable) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rule, self.doses, self.log = rule, [(40.0, 41.0, 1.0), (100.0, 100.5, 2.0)], []
        self.net, self.other = (nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)) for _ in range(2))
        self.embedding = nn.Embedding(7, 3)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.rule(self, t, self.net(y))

    def dose(self, t: float) -> float:
        return next((amount for start, end, amount in self.doses if start <= t < end), 0.0)


def interpolated(t: Tensor) -> Tensor:
    i = (torch.searchsorted(KNOTS, t) - 1).clamp(0, 5)
    return TABLE[i] + (t - KNOTS[i]) / (KNOTS[i + 1] - KNOTS[i]) * (TABLE[i + 1] - TABLE[i])


def wrapped(t: Tensor) -> Tensor:
    while t > 24:
        t = t - 24
    return t


def in_its_domain(m: nn.Module, t: Tensor, v: Tensor) -> Tensor:
    assert t >= -1e9, "too early"
    if t > 1e9:
        raise ValueError("too late")
    return m.other(v) if t < 5.5 else v


def dosed(m: nn.Module, t: Tensor, v: Tensor) -> Tensor:
    for start, end, amount in m.doses:
        if start <= t < end:
            v = v + amount
    return v


def asked_twice(m: nn.Module, t: Tensor, v: Tensor) -> Tensor:
    h = m.net(v) if t < 3 else m.other(v)
    return h + (m.other(h) if t < 3 else t * v)


RIGHT = {
    "a window, by an if": lambda m, t, v: v + (1.0 if 5 < t < 8 else 0.0),
    "min and max of tensors": lambda m, t, v: v * max(min(t, torch.tensor(3.0)), -2.0),
    "is_nonzero": lambda m, t, v: v * (1.0 if t.is_nonzero() else 2.0),
    "one layer or another": lambda m, t, v: (m.net if t % 2.0 < 0.5 else m.other)(v),
    "one of many": lambda m, t, v: v * (2.0 if (KNOTS < t).any() and not t > 29 else 0.5),
    "what holds in its domain": in_its_domain, "doses": dosed, "asked twice": asked_twice,
    "the number itself": lambda m, t, v: v * t.item(),
    "numbers of functions": lambda m, t, v: v * (t**2).item() + t.sin().item(),
    "torch.tensor of the number": lambda m, t, v: v * torch.tensor(t.item()),
    "torch.tensor of tensors": lambda m, t, v: v + torch.tensor([t, 0.5, torch.sin(t)]),
    "a bound number": lambda m, t, v: v * torch.clamp(t, -2, 3).item(),
    "kept on the module": lambda m, t, v: (setattr(m, "now", t.item()), v * m.now)[1],
    "written down": lambda m, t, v: (m.log.append(float(t)), f"{t} {t:.2f} {t!r}", v)[2],
    "checked to be a number": lambda m, t, v: v if torch.isfinite(t).all() and not torch.isnan(t) else -v,
    "copied": lambda m, t, v: v * copy.deepcopy(t),
    "torch.where": lambda m, t, v: v + torch.where(t > 5, 1.0, 0.0),
    "a window": lambda m, t, v: v + ((t > 5) & (t < 8)).to(v),
    "clamp": lambda m, t, v: v * torch.clamp(t, -2, 3),
    "round": lambda m, t, v: v * torch.round(t),
    "remainder": lambda m, t, v: v * torch.remainder(t, 24.0),
    "the nearest knot": lambda m, t, v: v + TABLE[(KNOTS - t).abs().argmin()],
    "the nearest, backwards": lambda m, t, v: v + TABLE[-1 - (KNOTS - t).abs().argmin()],
    "the nearest column": lambda m, t, v: v + TABLE.t()[..., (KNOTS - t).abs().argmin()],
    "the nearest among axes": lambda m, t, v: v + TABLE[None, (KNOTS - t).abs().argmin(), :],
    "searchsorted": lambda m, t, v: v + TABLE[torch.searchsorted(KNOTS, t).clamp(max=6)],
    "searchsorted for a number": lambda m, t, v: v + TABLE[torch.searchsorted(KNOTS, float(t)).clamp(max=6)],
    "bucketize": lambda m, t, v: v + TABLE[torch.bucketize(t.reshape(1), KNOTS).clamp(max=6)],
    "a whole number as a factor": lambda m, t, v: v * t.long(),
    "whole numbers as tensors": lambda m, t, v: v + STEPS[t.floor().long().clamp(0, 29)],
    "gather": lambda m, t, v: v + torch.gather(STEPS, 0, t.long().clamp(0, 29).reshape(1)),
    "interpolation": lambda m, t, v: v + interpolated(t),
    "a mask": lambda m, t, v: v + KNOTS[KNOTS < t].sum(),
    "the last of a mask": lambda m, t, v: v + TABLE[(KNOTS <= t.clamp(0, 30)).nonzero()[-1]],
    "an embedding": lambda m, t, v: v + m.embedding(t.long().clamp(0, 6)),
    "one hot": lambda m, t, v: v + F.one_hot(t.long().clamp(0, 2), 3).to(v),
    "linspace": lambda m, t, v: v + torch.linspace(0, float(t), 3),
}


@pytest.mark.parametrize("name", RIGHT)
def test_functions_of_time_that_are_kept(name: str) -> None:
    module = Timed(RIGHT[name])
    field, y = sfk.compile(module), torch.randn(4, 3)
    assert module.log == [] and not hasattr(module, "now")
    for value in TIMES:
        t = torch.tensor(value)
        with torch.no_grad():
            torch.testing.assert_close(field(t, y), module(t, y), rtol=2e-5, atol=2e-5)


REFUSED = {
    "truth value": {
        "a loop": lambda m, t, v: v * wrapped(t),
    },
    "whole number": {
        "a choice of layers": lambda m, t, v: [v, -v][int(t) % 2],
        "a slice": lambda m, t, v: v + TABLE[: t.long().clamp(1, 6)].sum(0),
        "copied": lambda m, t, v: v + torch.tensor([t.long(), 0, 1]),
        "roll": lambda m, t, v: v + torch.roll(TABLE[0], int(t)),
    },
    "computed from t in Python|branches on values of t": {
        "other layers": lambda m, t, v: v if float(t) < 37.5 else m.other(v),
        "other layers, far out": lambda m, t, v: v if float(t) < 4000 else m.other(v),
    },
}

# What Python makes of t, where forward runs the same operations at all times.
IN_PYTHON = {
    "so many": lambda m, t, v: v * sum(1.0 if t > k else 0.5 for k in range(40)),
    "torch.equal": lambda m, t, v: v * (2.0 if torch.equal(t, torch.tensor(7.0)) else 1.0),
    "torch.allclose": lambda m, t, v: v * (2.0 if torch.allclose(t, torch.tensor(7.0), atol=0.5) else 1.0),
    "in a tensor": lambda m, t, v: v * (2.0 if t in KNOTS else 1.0),
    "int": lambda m, t, v: v + STEPS[min(max(int(t), 0), 29)],
    "item of an index": lambda m, t, v: v + TABLE[(KNOTS - t).abs().argmin().item()],
    "a list": lambda m, t, v: v * [1.0, 2.0, 3.0][t.long().clamp(0, 2)],
    "a count": lambda m, t, v: v * int((KNOTS <= t).sum()),
    "numpy": lambda m, t, v: v + float(t.detach().cpu().numpy() > 9),
    "asarray": lambda m, t, v: v + float(np.asarray(t) > 7),
    "a function of numpy": lambda m, t, v: v * np.sin(t),
    "tolist": lambda m, t, v: v + float(t.reshape(1).tolist()[0] > 7),
    "from_numpy": lambda m, t, v: v + torch.from_numpy(np.interp(t.numpy(), [0, 9], [0, 1]).reshape(1)).to(v),
    "data_ptr": lambda m, t, v: v * (t.data_ptr() % 2 + 1),
    "min": lambda m, t, v: v * min(float(t), 3.0),
    "min far out": lambda m, t, v: v * min(max(float(t), -1e5), 1e5),
    "math": lambda m, t, v: v * math.sin(float(t)),
    "math of a tensor": lambda m, t, v: v * math.exp(-(t * 0.01) ** 2),
    "too small to be seen in values": lambda m, t, v: v + 1e-9 * math.floor(t.item()),
    "numpy of a number": lambda m, t, v: v * float(np.sin(float(t))),
    "interp": lambda m, t, v: v + torch.tensor(np.interp(t.item(), [0.0, 9.0], [0.0, 1.0]), dtype=v.dtype),
    "a power": lambda m, t, v: v * t.item() ** 2,
    "a formatted number": lambda m, t, v: v * float(f"{t.item():.1f}"),
    "beside the number": lambda m, t, v: v + torch.tensor([t.item(), 2 * t.item(), 1.0]),
    "a narrow window": lambda m, t, v: v + (1.0 if 600.01 < float(t) < 600.02 else 0.0),
    "near a point": lambda m, t, v: v + (1.0 if abs(t.item() - 50) < 0.2 else 0.0),
    "one point": lambda m, t, v: v + (1.0 if float(t) == 77.0 else 0.0),
    "a schedule": lambda m, t, v: v + m.dose(float(t)),
    "the time of day": lambda m, t, v: v * (1.0 if float(t) % 24.0 < 23.9 else 0.5),
    "bisect": lambda m, t, v: v + TABLE[min(bisect.bisect([1.0, 2.0, 500.0], float(t)), 2)],
    "a table by int of float": lambda m, t, v: v + STEPS[min(max(int(float(t)), 0), 29)],
    "a table of zeros": lambda m, t, v: v + torch.zeros(30)[min(max(int(float(t)), 0), 29)],
    "the length of a mask": lambda m, t, v: v * len(KNOTS[KNOTS < t]),
    "kept on the module": lambda m, t, v: (setattr(m, "now", math.floor(t.item() / 1e4)), v * (m.now + 1))[1],
}


@pytest.mark.filterwarnings("ignore:__array_wrap__")
@pytest.mark.parametrize("words, name", [(words, name) for words, cases in REFUSED.items() for name in cases])
def test_what_python_makes_of_time_is_refused(words: str, name: str) -> None:
    with pytest.raises(sfk.UnsupportedFieldError, match=words) as error:
        sfk.compile(Timed(REFUSED[words][name]))
    assert "torch.searchsorted" in str(error.value) and "sfk.odeint" in str(error.value)


FAR = (-883.9, -30.2, 7.0, 9.0, 23.95, 37.5, 47.95, 50.1, 77.0, 100.14, 600.015, 4000.0, 12345.0, 2e5)


@pytest.mark.filterwarnings("ignore:__array_wrap__")
@pytest.mark.parametrize("name", IN_PYTHON)
def test_what_python_makes_of_time_is_made_at_every_time(name: str) -> None:
    module, y = Timed(IN_PYTHON[name]), torch.randn(4, 3)
    field = sfk.compile(module)
    assert field.engine_name == "cpu"
    for value in (*TIMES, *FAR):
        t = torch.tensor(value)
        with torch.no_grad():
            torch.testing.assert_close(field(t, y), module(t, y), rtol=2e-5, atol=2e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_hides_nothing() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return self.a(y) * 2.0 if bool(t > 5) else self.a(y)

    class Number(Branch):
        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return self.a(y) * float(int(t))

    with pytest.raises(sfk.UnsupportedFieldError, match="truth value"):
        sfk.compile(torch.jit.script(Branch()))
    number, y = torch.jit.script(Number()), torch.randn(4, 3)
    field = sfk.compile(number)
    for value in (0.3, 1.0, 7.9):
        torch.testing.assert_close(field(value, y), number(torch.tensor(value), y))


def test_a_field_that_is_defined_for_some_times_only() -> None:
    """Where the module raises, there is nothing to compare with."""
    module = Timed(lambda m, t, v: v + STEPS[t.reshape(1).long()])
    field, y = sfk.compile(module), torch.randn(4, 3)
    for value in (0.0, 16.9, 17.1, 29.5):
        torch.testing.assert_close(field(torch.tensor(value), y), module(torch.tensor(value), y))


def test_branches_are_differentiated_and_run_natively() -> None:
    module = Timed(lambda m, t, v: v * torch.exp(-t) if t < 0.5 else m.other(v) - v).double()
    field = sfk.compile(module, like=torch.randn(4, 3, dtype=torch.float64), live=True)
    y, times = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    found, want = (
        torch.autograd.grad(solve(f, y, times, method="rk4", options={"step_size": 0.25})[-1].square().sum(), list(module.parameters()), allow_unused=True)
        for f, solve in ((field, sfk.odeint), (module, torchdiffeq.odeint)))
    assert field.engine_name == "cpu" and sfk.solve(field, y, times).stats.engine == "cpu"
    for a, b in zip(found, want):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_values_are_compared_far_out() -> None:
    """A buffer that counts calls, seen only where t is large; and overflow on both sides."""

    def late(m, t, v):
        m.calls = getattr(m, "calls", 0) + 1
        return v + torch.where(t > 50, float(m.calls), 0.0)

    with pytest.raises(sfk.UnsupportedFieldError, match=r"differs from the module at t = (57|997)"):
        sfk.compile(Timed(late))
    module = Timed(lambda m, t, v: v * torch.exp(t) + torch.exp(-t))
    field, y = sfk.compile(module), torch.randn(4, 3)
    torch.testing.assert_close(field(torch.tensor(3.0), y), module(torch.tensor(3.0), y))
