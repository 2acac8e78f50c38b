"""What forward reads beside parameters, in all the places where people keep it: a change of it is seen."""

from __future__ import annotations

import array
import collections
import copy
import dataclasses
import fractions
import functools
import operator
import types
import warnings

import numpy as np
import pytest
import torch
import torchdiffeq
from torch import nn

import sparseflow_kernels as sfk

Y = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).double()
T = torch.tensor([0.0, 1.0]).double()


def solve(function, y=Y):
    return torchdiffeq.odeint(function, y, T, method="rk4", options={"step_size": 0.25})


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).double()


class Field(nn.Module):
    """tanh of a layer, times what `factor(self)` makes of something that it holds under `held`."""

    def __init__(self, held, factor):
        super().__init__()
        self.net, self.held, self.factor = mlp(), held, factor

    def forward(self, t, y):
        return self.net(y) * self.factor(self.held)


@dataclasses.dataclass(slots=True)
class Slots:
    rate: float = 1.0


class Settings:
    rate = 1.0


class Rate:
    def __init__(self, rate):
        self.rate = rate

    def __mul__(self, other):
        return self.rate * other


def nested(rate):
    space = types.SimpleNamespace(rate=rate)
    for _ in range(5):
        space = types.SimpleNamespace(inner=space)
    return space


def innermost(space):
    while hasattr(space, "inner"):
        space = space.inner
    return space


def slotted(held):
    held.rate = 3.0


def class_of(held):
    type(held).rate = 3.0


HELD = {  # name -> (what is held, the factor, how it is changed: in place, or by another in its place)
    "range": (lambda: range(2), len, lambda h: range(4)),
    "set": (lambda: {1}, len, lambda h: h.update((2, 3))),
    "frozenset": (lambda: frozenset({1}), sum, lambda h: frozenset({2})),
    "slice": (lambda: slice(0, 2), lambda h: h.stop, lambda h: slice(0, 3)),
    "deque": (lambda: collections.deque([1.0]), lambda h: h[0], lambda h: h.appendleft(3.0)),
    "fraction": (lambda: fractions.Fraction(1, 2), float, lambda h: fractions.Fraction(3, 2)),
    "bytes": (lambda: b"a", lambda h: h[0] / 100, lambda h: b"z"),
    "array": (lambda: array.array("d", [1.0]), lambda h: h[0], lambda h: h.__setitem__(0, 3.0)),
    "large numpy": (lambda: np.ones(10_000), lambda h: float(h[0]), lambda h: h.__setitem__(0, 3.0)),
    "proxy": (lambda: types.MappingProxyType({"a": 1.0}), lambda h: h["a"], lambda h: types.MappingProxyType({"a": 3.0})),
    "long list": (lambda: [1.0] * 100, lambda h: h[99], lambda h: h.__setitem__(99, 3.0)),
    "long list of tensors": (lambda: [torch.ones(3).double() for _ in range(100)], lambda h: h[99], lambda h: h.append(h.pop().mul_(3.0))),
    "slots": (Slots, lambda h: h.rate, slotted),
    "class of settings": (Settings, lambda h: h.rate, class_of),
    "operator": (lambda: Rate(1.0), lambda h: h * 2.0, slotted),
    "six deep": (lambda: nested(1.0), lambda h: h.inner.inner.inner.inner.inner.rate, lambda h: slotted(innermost(h))),
    "activation in a list": (lambda: [nn.LeakyReLU(0.1)], lambda h: h[0](-torch.ones(3).double()),
                             lambda h: setattr(h[0], "negative_slope", 0.5)),
}  # fmt: skip


@pytest.mark.parametrize("name", HELD)
def test_a_change_of_what_a_module_holds(name):
    make, factor, change = HELD[name]
    Settings.rate = 1.0
    module = Field(make(), factor)
    with sfk.accelerate() as context:
        torch.testing.assert_close(solve(module), solve_plain(module))
        other = change(module.held)
        module.held = module.held if other is None else other
        torch.testing.assert_close(solve(module), solve_plain(module))
    assert context.report() == "Field: cpu engine, 2 solves"
    Settings.rate = 1.0


def solve_plain(module):
    """The same in plain torch: rk4's 3/8 rule, as torchdiffeq has it."""
    y, h = Y, 0.25
    with torch.no_grad():
        for t in torch.arange(4).double() * h:
            k1 = module(t, y)
            k2 = module(t + h / 3, y + h * k1 / 3)
            k3 = module(t + 2 * h / 3, y + h * (k2 - k1 / 3))
            k4 = module(t + h, y + h * (k1 - k2 + k3))
            y = y + h * (k1 + 3 * (k2 + k3) + k4) / 8
    return torch.stack([Y, y])


class Drift:
    def __init__(self, net):
        self.net = net

    def drift(self, y):
        return self.net(y)


OUTSIDE = {  # where a frozen network is that is no part of the module
    "list": (lambda net: [net], lambda held, y: held[0](y)),
    "dict": (lambda net: {"net": net}, lambda held, y: held["net"](y)),
    "object": (Drift, lambda held, y: held.drift(y)),
    "bound": (lambda net: net.forward, lambda held, y: held(y)),
}


@pytest.mark.parametrize("where", OUTSIDE)
def test_a_network_outside_the_module_tree(where):
    hold, apply = OUTSIDE[where]
    net = mlp().requires_grad_(False)

    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.held = mlp(), hold(net)

        def forward(self, t, y):
            return self.net(y) - 0.5 * apply(self.held, y)

    student = Student()
    with sfk.accelerate() as context:
        for _ in range(2):
            torch.testing.assert_close(solve(student), solve_plain(student))
            with torch.no_grad():  # an average of the student's, say
                for mean, one in zip(net.parameters(), student.net.parameters()):
                    mean.lerp_(one, 0.5)
    assert context.report() == "Student: cpu engine, 2 solves"


def masked(layer, y):
    return nn.functional.linear(y, layer.weight * layer.weight_mask, layer.bias)


@pytest.mark.parametrize("how", ["tensor", "patched", "list", "function", "numpy", "late"])
def test_what_is_hung_on_a_module_of_torch(how):
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3).double()

        def forward(self, t, y):
            layer = self.layer
            if how == "patched":
                return layer(y)
            scale = getattr(layer, "scale", None)
            return layer(y) * (1.0 if scale is None else scale() if callable(scale) else scale if how == "tensor" else scale[0])

    module = Module()
    layer = module.layer
    rate = [1.0]
    if how == "patched":
        layer.weight_mask = torch.ones(3, 3).double()
        layer.forward = types.MethodType(masked, layer)
    elif how != "late":
        layer.scale = {"tensor": torch.ones(3).double(), "list": rate, "function": lambda: rate[0], "numpy": np.ones(1)}[how]
    with sfk.accelerate() as context:
        torch.testing.assert_close(solve(module), solve_plain(module))
        if how == "patched":
            layer.weight_mask[0, 1] = 0.0
        elif how == "late":
            layer.scale = [2.0]
        elif how == "tensor":
            layer.scale.mul_(2.0)
        elif how == "function":
            rate[0] = 2.0
        else:
            layer.scale[0] = 2.0
        torch.testing.assert_close(solve(module), solve_plain(module))
    assert context.report() == "Module: cpu engine, 2 solves"


@pytest.mark.parametrize("how", ["bound", "lambda"])
def test_what_trains_a_network_may_change_with_every_step(how):
    class Trainer:
        def __init__(self):
            torch.manual_seed(0)
            self.net, self.step, self.losses, self.best, self.settings = mlp(), 0, [], 1e9, {"rate": 1.0}
            self.optimizer = torch.optim.Adam(self.net.parameters(), 1e-2)

        def rhs(self, t, y):
            return self.net(y) * self.settings["rate"]

        def train(self):
            for _ in range(12):
                function = self.rhs if how == "bound" else lambda t, y: self.net(y) * self.settings["rate"]
                loss = solve(function)[-1].square().mean()
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                self.step, self.best = self.step + 1, min(self.best, loss.item())
                self.losses.append(loss.item())
                if self.step == 6:
                    self.settings["rate"] = 2.0
            return self.losses

    wanted = Trainer().train()
    with warnings.catch_warnings(), sfk.accelerate() as context:
        warnings.simplefilter("error")
        found = Trainer().train()
    assert found == pytest.approx(wanted, rel=1e-9)
    assert context.report().endswith("cpu engine, 12 solves")


class Writes(nn.Module):
    """Notes something of every evaluation: `write(self, t, y)`."""

    total = 0

    def __init__(self, **held):
        super().__init__()
        self.net = mlp()
        self.__dict__.update(held)
        self.register_buffer("mean", torch.zeros(3).double())

    def forward(self, t, y):
        h = self.net(y)
        self.write(t, h)
        return h

    def last(self):
        return self.h


def counts_in_its_class(self, t, h):
    Writes.total += 1


def keeps_and_reads(self, t, h):
    self.h = h
    return self.h + 1


NOTES = {  # name -> (what is held, what forward writes, what is there afterwards)
    "sum": (dict(reg=0.0), lambda self, t, h: setattr(self, "reg", self.reg + h.square().sum()), lambda m: m.reg),
    "running mean": ({}, lambda self, t, h: self.mean.mul_(0.9).add_(h.mean(0), alpha=0.1), lambda m: m.mean),
    "for a method": ({}, keeps_and_reads, lambda m: m.last()),
    "dict": (dict(stats={"nfe": 0}), lambda self, t, h: self.stats.update(nfe=self.stats["nfe"] + 1), lambda m: m.stats["nfe"]),
    "space": (dict(space=types.SimpleNamespace(n=0)), lambda self, t, h: setattr(self.space, "n", self.space.n + 1), lambda m: m.space.n),
    "queue": (dict(times=collections.deque(maxlen=3)), lambda self, t, h: self.times.append(float(h[0, 0])), lambda m: list(m.times)),
    "set": (dict(times=set()), lambda self, t, h: self.times.add(float(h[0, 0])), lambda m: sorted(m.times)),
    "class": ({}, counts_in_its_class, lambda m: Writes.total),
    "list in a dict": (dict(log={"x": []}), lambda self, t, h: self.log["x"].append(float(h[0, 0])), lambda m: m.log["x"]),
    "default": (dict(log=collections.defaultdict(list)), lambda self, t, h: self.log["x"].append(float(h[0, 0])), lambda m: m.log["x"]),
    "meter in a dict": (dict(log={"x": types.SimpleNamespace(seen=[])}), lambda self, t, h: self.log["x"].seen.append(float(h[0, 0])), lambda m: m.log["x"].seen),
}  # fmt: skip


@pytest.mark.parametrize("name", NOTES)
def test_what_forward_notes_is_noted(name):
    held, write, look = NOTES[name]
    kind = type("Writing", (Writes,), {"write": write})
    found = []
    for context in (None, sfk.accelerate()):
        torch.manual_seed(0)
        Writes.total = 0
        module = kind(**copy.deepcopy(held))
        with warnings.catch_warnings(), torch.no_grad(), context or torch.no_grad():
            warnings.simplefilter("ignore")
            y = solve(module)
        found.append((y, look(module)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("how", ["prune", "weight_norm"])
def test_the_weight_that_a_hook_makes_is_of_the_present_parameters(how):
    def train():
        torch.manual_seed(0)
        module = Field(1.0, float)
        layer = module.net[0]
        if how == "prune":
            nn.utils.prune.identity(layer, "weight")
        else:
            nn.utils.weight_norm(layer)
        optimizer, losses = torch.optim.SGD(module.parameters(), 0.1), []
        for step in range(6):
            optimizer.zero_grad()
            loss = solve(module)[-1].square().mean() + 0.1 * layer.weight.square().sum()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if how == "prune" and step == 2:  # by the weights as they are now
                nn.utils.prune.l1_unstructured(layer, "weight", 0.3)
        return losses

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        wanted = train()
        with sfk.accelerate() as context:
            found = train()
    assert found == pytest.approx(wanted, rel=1e-9)
    assert "cpu engine" in context.report() and "handed on" not in context.report()


def test_parameters_of_another_shape():
    class LowRank(nn.Module):
        def __init__(self):
            super().__init__()
            self.rank(2)

        def rank(self, n):
            torch.manual_seed(n)
            self.u, self.v = nn.Parameter(torch.randn(3, n).double()), nn.Parameter(torch.randn(n, 3).double())

        def forward(self, t, y):
            return torch.tanh(y @ self.u) @ self.v

    module = LowRank()
    live = sfk.compile(module, live=True)
    for rank in (2, 4, 1):
        module.rank(rank)
        torch.testing.assert_close(live(0.0, Y), module(0.0, Y))


def test_random_states_of_the_module_are_left_alone():
    class Draws(nn.Module):
        def __init__(self):
            super().__init__()
            self.generator = torch.Generator().manual_seed(3)
            self.numbers = np.random.default_rng(3)

        def forward(self, t, y):
            noise = torch.randn(3, generator=self.generator).double()
            return noise - y * self.numbers.random() * np.random.rand()

    found = []
    for context in (None, sfk.accelerate()):
        np.random.seed(1)
        with warnings.catch_warnings(), torch.no_grad(), context or torch.no_grad():
            warnings.simplefilter("ignore")
            found.append(solve(Draws()))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("shape", ["expand", "view", "reshape"])
def test_sizes_that_forward_takes_of_the_batch(shape, live):
    class Conditional(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.code = nn.Linear(3 + 4, 3).double(), torch.randn(16, 4).double()

        def forward(self, t, x):
            code = {
                "expand": lambda: self.code.expand(len(x), -1), "view": lambda: self.code.view(len(x), 4),
                "reshape": lambda: self.code.reshape(x.shape[0], 2, 2).flatten(1),
            }[shape]()  # fmt: skip
            return torch.tanh(self.net(torch.cat([x, code], 1)))

    module = Conditional()
    field = sfk.compile(module, like=torch.randn(16, 3).double(), live=live)
    for rows, samples in ((16, 16), (9, 9), (16, 16), (1, 1), (1, 5)):
        if shape != "expand" and rows != samples:
            continue
        module.code = torch.randn(rows, 4).double()
        x = torch.randn(samples, 3).double()
        torch.testing.assert_close(field(0.0, x), module(0.0, x))


def test_names_with_dots_and_hooks_on_all_modules_and_a_compiled_model_around():
    module = Field(1.0, float)
    values = {name: value.detach().clone().requires_grad_() for name, value in module.named_parameters()}  # net.0.weight, ...
    call = lambda t, y: torch.func.functional_call(module, values, (t, y))
    wanted = torch.autograd.grad(solve(call)[-1].sum(), list(values.values()))
    with sfk.accelerate():
        found = torch.autograd.grad(solve(call)[-1].sum(), list(values.values()))
    torch.testing.assert_close(found, wanted)

    handle = nn.modules.module.register_module_forward_hook(lambda part, args, out: out * 0.5 if part is module else None)
    try:
        with warnings.catch_warnings(), sfk.accelerate() as context:
            warnings.simplefilter("ignore")
            torch.testing.assert_close(solve(module), solve_plain(module))
        assert "handed on" in context.report() or context.report() == "no module was solved for"
    finally:
        handle.remove()


def test_a_compiled_model_round_a_solve():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.field, self.head = Field(1.0, float), nn.Linear(3, 1).double()

        def forward(self, y):
            return self.head(solve(self.field, y)[-1])

    model = Model()
    wanted = model(Y)
    with sfk.accelerate() as context:
        torch.testing.assert_close(torch.compile(model, backend="eager")(Y), wanted)
    assert context.report() == "Field: cpu engine, 1 solves"


def test_a_part_of_torchscript_that_was_differentiated_before():
    def make():
        class Scripted(nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.part, self.other = torch.jit.script(mlp()), nn.Linear(3, 3).double()

            def forward(self, t, y):
                return self.part(y) + self.other(y)

        return Scripted()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = make()
        for _ in range(3):
            solve(module)[-1].sum().backward()
            wanted, module = [p.grad for p in module.parameters()], make()
        with sfk.accelerate():
            solve(module)[-1].sum().backward()
    torch.testing.assert_close([p.grad for p in module.parameters()], wanted)


class Matrix(nn.Module):
    def __init__(self, start):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(start).double())

    def forward(self, t, y):
        return y @ self.a.T


@pytest.mark.parametrize("start", [
    [[0.0, 1.0, 0.5], [-1.0, -0.5, 0.0], [0.0, 0.0, -0.3]],
    [[-2.0, 1.0, 0.0], [1.0, -2.0, 1.0], [0.0, 1.0, -2.0]],
    [[0.0, 0.0, 0.0], [0.3, 0.0, 0.0], [0.0, 0.0, 0.7]],
])  # fmt: skip
def test_zeros_that_no_mask_keeps_are_trained_as_torch_trains_them(start):
    def train():
        module = Matrix(start)
        optimizer, losses = torch.optim.SGD(module.parameters(), 0.05), []
        for _ in range(5):
            with torch.no_grad():
                before = solve(module)[-1].square().mean()
            loss = solve(module)[-1].square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses += [before.item(), loss.item()]
        return losses, module.a.grad

    wanted = train()
    with sfk.accelerate() as context:
        found = train()
    torch.testing.assert_close(found, wanted)
    assert "handed on" not in context.report()


def test_zeros_under_a_mask_stay_pruned_and_so_do_all_where_nothing_is_trained():
    masked = sfk.prune_weights_(Field(1.0, float), keep=0.2)
    bare = Field(1.0, float)
    with torch.no_grad():
        bare.net[0].weight[1:] = 0.0
    with sfk.accelerate() as context:
        solve(masked)
        with torch.no_grad():
            solve(bare)
        counts = [field.nnz for field in (entry.field for entry in context._met)]
    remaining = [layer.weight_mask.count_nonzero() for layer in (masked.net[0], masked.net[2])]
    assert 0 < counts[0] <= int(sum(remaining)) and 0 < counts[1] <= 3 + 3


def test_settings_that_code_does_not_name_are_watched_too():
    @dataclasses.dataclass
    class Config:
        k: float = 1.0

        @torch.no_grad()
        def twice(self):
            return 2.0 * self.k

    def matched(held):
        match held:
            case Config(k=number):
                return number

    OTHER, get = Config(3.0), operator.attrgetter("k")
    ways = {
        "decorated": lambda c: c.twice(), "equal": lambda c: 2.0 if c == OTHER else 1.0, "match": matched, "getter": get,
    }
    for factor in ways.values():
        module = Field(Config(), factor)
        with sfk.accelerate():
            torch.testing.assert_close(solve(module), solve_plain(module))
            module.held.k = 3.0
            torch.testing.assert_close(solve(module), solve_plain(module))
    module = Field(functools.partial(torch.mul, torch.ones(3).double()), lambda held: held(2.0))
    with sfk.accelerate():
        torch.testing.assert_close(solve(module), solve_plain(module))
        module.held = functools.partial(torch.mul, 3.0 * torch.ones(3).double())
        torch.testing.assert_close(solve(module), solve_plain(module))


def test_large_and_linked_containers_cost_little():
    nodes = [types.SimpleNamespace(rate=1.0, others=[]) for _ in range(12)]
    for number, node in enumerate(nodes):
        node.others = [nodes[(number + step) % 12] for step in range(1, 7)]
    held = {"nodes": nodes, "table": [[1.0] * 100 for _ in range(100)]}
    module = Field(held, lambda held: held["nodes"][3].rate * held["table"][99][99])
    live = sfk.compile(module, live=True)
    looks = []
    attributes = live._watch._attributes
    count = attributes._stamp
    attributes._stamp = lambda *arguments: (looks.append(1), count(*arguments))[1]
    live(0.0, Y)
    assert len(looks) < 400
    for change in (lambda: setattr(nodes[3], "rate", 2.0), lambda: held["table"][99].__setitem__(99, 3.0)):
        change()
        torch.testing.assert_close(live(0.0, Y), module(0.0, Y))


def test_sizes_that_only_happen_to_be_the_batchs():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.code = nn.Linear(3 + 2, 3).double(), torch.randn(4, 2).double()
            self.base = torch.randn(2).double()

        def forward(self, t, x):
            heads = self.base.unsqueeze(0).expand(4, -1).sum(0)  # four heads, whatever the batch
            return torch.tanh(self.net(torch.cat([x, self.code * heads], 1)))

    module = Heads()
    field = sfk.compile(module, like=torch.randn(4, 3).double(), live=True)
    for samples in (4, 7, 2):
        module.code = torch.randn(samples, 2).double()
        x = torch.randn(samples, 3).double()
        torch.testing.assert_close(field(0.0, x), module(0.0, x))


def test_a_gradient_of_its_own_of_what_needs_a_graph_is_seen():
    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1.0

        @staticmethod
        def backward(ctx, gradient):
            return 0.5 * gradient

    class Needs(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, t, y):
            assert torch.is_grad_enabled()
            return Straight.apply(self.net(y))

    with pytest.raises(sfk.UnsupportedFieldError, match="gradient of its own"):
        sfk.compile(Needs(), like=Y)


def test_a_connection_that_grows_again_under_its_mask_is_trained():
    def train():
        torch.manual_seed(0)
        module = Field(1.0, float)
        layer = module.net[0]
        nn.utils.prune.custom_from_mask(layer, "weight", (torch.rand(8, 3) > 0.6))
        optimizer, losses = torch.optim.SGD(module.parameters(), 0.1), []
        for step in range(6):
            optimizer.zero_grad()
            loss = solve(module)[-1].square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if step == 2:  # as RigL does: some connections begin again, at zero
                with torch.no_grad():
                    grown = layer.weight_mask == 0
                    layer.weight_mask.masked_fill_(grown, 1.0)
                    layer.weight_orig.masked_fill_(grown, 0.0)
        return losses

    wanted = train()
    with sfk.accelerate():
        assert train() == pytest.approx(wanted, rel=1e-9)
