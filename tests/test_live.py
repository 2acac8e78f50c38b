"""Fields whose parameters stay their module's: training as it would go on dense torch, whatever is done to the module."""

from __future__ import annotations

import copy
import pickle

import pytest
import sparseflow_kernels as sfk
import torch
import torchdiffeq
from sparseflow_kernels.live import Watch
from torch import nn
from torch.nn.utils import parametrizations, prune

T = torch.tensor([0.0, 1.0], dtype=torch.float64)
OPTIONS = {"rtol": 1e-6, "atol": 1e-6, "method": "dopri5", "options": {"first_step": 0.05}}


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, t, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Residual(Chain):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.3))

    def forward(self, t, x):
        h = torch.tanh(self.a(x))
        h = h + torch.tanh(self.b(h) * torch.sin(t))
        return self.scale * self.c(h) - 0.1 * x


def pair(make, prepare):
    """The same module twice."""
    torch.manual_seed(0)
    plain = make().double()
    twins = [plain, copy.deepcopy(plain)]
    for module in twins:
        torch.manual_seed(1)
        prepare(module)
    return twins


def pruned(module):
    prune.l1_unstructured(module.b, "weight", 0.7)
    prune.random_unstructured(module.a, "weight", 0.3)


def parametrized(module):
    pruned(module)
    parametrizations.weight_norm(module.c)


def tied(module):
    module.a.bias = module.b.bias


@pytest.mark.parametrize("prepare", [pruned, parametrized, tied], ids=lambda f: f.__name__)
@pytest.mark.parametrize("make", [Chain, Residual])
def test_training_goes_as_on_dense_torch(make, prepare):
    mine, theirs = pair(make, prepare)
    field = sfk.compile(mine, live=True)
    assert {id(p) for p in field.parameters()} == {id(p) for p in mine.parameters()} and field.live
    assert set(mine.state_dict()) == set(theirs.state_dict())
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-2, weight_decay=1e-3) for m in (mine, theirs)]
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(2)).double()
    for _step in range(5):
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses = [sfk.odeint(field, x, T, **OPTIONS)[-1].square().mean(), torchdiffeq.odeint(theirs, x, T, **OPTIONS)[-1].square().mean()]
        for loss in losses:
            loss.backward()
        for p, q in zip(mine.parameters(), theirs.parameters()):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-10)
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-11)


def test_other_masks_are_compiled_when_they_are_met():
    mine, theirs = pair(Residual, pruned)
    field = sfk.compile(mine, live=True)
    x, before = torch.randn(4, 3).double(), field.nnz
    for module in (mine, theirs):
        module.b.weight_mask[:8] = 0.0
    torch.testing.assert_close(field(T[1], x), theirs(T[1], x))
    assert field.nnz < before
    for module in (mine, theirs):
        prune.remove(module.b, "weight")
        module.b.weight.data[0, 0] = 2.0  # a pruned entry that is back
    torch.testing.assert_close(field(T[1], x), theirs(T[1], x))
    for module in (mine, theirs):
        module.a.weight_orig.data.mul_(1.5)
    torch.testing.assert_close(sfk.odeint(field, x, T), torchdiffeq.odeint(theirs, x, T))
    mine.load_state_dict(pair(Residual, pruned)[0].state_dict(), strict=False)
    torch.testing.assert_close(field(T[1], x), mine(T[1], x))


@pytest.mark.parametrize("ask", [
    lambda field, x: field(T[1], x), lambda field, x: field(T[:1].expand(len(x)), x), lambda field, x: sfk.odeint(field, x, T),
    lambda field, x: field.report(),
])  # fmt: skip
@pytest.mark.parametrize("like", [None, torch.zeros(2, 3).double()])
def test_masks_may_come_and_go_between_calls(ask, like):
    mine, x = Residual().double(), torch.randn(4, 3).double()
    field = sfk.compile(mine, live=True, like=like)
    dense = field.nnz
    for change, expected in (
        (lambda: sfk.prune_weights_(mine, 0.5, of="weights"), lambda nnz: nnz < dense),
        (lambda: [prune.remove(layer, "weight") for layer in (mine.a, mine.b)], lambda nnz: nnz < dense),
    ):
        change()
        ask(field, x)
        torch.testing.assert_close(field(T[1], x), mine(T[1], x))
        assert expected(field.nnz)


def test_what_becomes_unreadable_is_said():
    class Switch(Chain):
        def forward(self, t, x):
            x = super().forward(t, x)
            return nn.functional.dropout(x, 0.5, self.training)

    module = Switch().double().eval()
    field = sfk.compile(module, live=True)
    field(T[0], torch.randn(2, 3).double())
    module.train()
    with pytest.raises(sfk.UnsupportedFieldError, match="eval"):
        field(T[0], torch.randn(2, 3).double())
    module.eval()
    field(T[0], torch.randn(2, 3).double())
    with pytest.raises(TypeError, match="live"):
        sfk.compile(field, live=True)


class Diffusion(nn.Module):
    """Nodes of a graph, with attributes of several kinds."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.x0, self.adjacency = torch.randn(5, 3), torch.rand(5, 5)
        self.rate, self.settings, self.nfe, self.log = 0.5, {"damping": [0.1]}, 0, []
        self.force = lambda t, bound=torch.ones(1): bound * torch.sin(t)

    def forward(self, t, x):
        self.nfe += 1
        mixed = torch.tanh(self.a(self.adjacency.to(x) @ x)) * self.rate
        return mixed - self.settings["damping"][0] * x + self.x0.to(x) * self.force(t)


EDITS = {
    "another tensor": lambda m: setattr(m, "x0", torch.randn(5, 3)),
    "numbers in place": lambda m: m.x0.mul_(2.0),
    "numbers past every counter": lambda m: m.x0.numpy().fill(0.3),
    "a matrix": lambda m: setattr(m, "adjacency", torch.rand(5, 5)),
    "a number": lambda m: setattr(m, "rate", 0.7),
    "inside a dictionary": lambda m: m.settings["damping"].__setitem__(0, 0.4),
    "another function": lambda m: setattr(m, "force", lambda t: 2 * torch.cos(t)),
    "a function's default": lambda m: m.force.__defaults__[0].mul_(3.0),
}


@pytest.mark.parametrize("name", EDITS)
def test_attributes_that_change_are_followed(name):
    torch.manual_seed(0)
    module, y, t = Diffusion().double(), torch.randn(5, 3, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    field = sfk.compile(module, like=y, live=True)
    before = field(t, y)
    torch.testing.assert_close(before, module(t, y))
    EDITS[name](module)
    torch.testing.assert_close(field(t, y), module(t, y))
    assert not torch.equal(before, field(t, y))


def test_counters_and_the_context_compile_nothing_anew(monkeypatch):
    torch.manual_seed(0)
    module, y = Diffusion().double(), torch.randn(5, 3, dtype=torch.float64)
    field = sfk.compile(module, like=y, live=True)
    module(0.0 * T[0], y)
    module.nfe = 0
    assert module.nfe == 0 and not field._watch.changed()

    class Conditional(Chain):
        def forward(self, t, x):
            return super().forward(t, x) + self.c(self.given.to(x).tanh())

    other, y = Conditional().double(), torch.randn(6, 3, dtype=torch.float64)
    other.given = torch.randn(6, 16)
    field = sfk.compile(other, like=y, live=True)
    other.given = torch.randn(6, 16)
    assert field.has_context and not field._watch.changed()
    torch.testing.assert_close(field(T[0], y), other(T[0], y))
def zeroed(dtype=torch.float32):
    """A chain with exact zeros in two weights."""
    torch.manual_seed(0)
    module = Chain().to(dtype)
    for layer in (module.a, module.b):
        layer.weight.data[torch.rand(layer.weight.shape) < 0.5] = 0.0
    return module


def test_a_live_field_is_copied_and_pickled_with_its_module():
    field = sfk.compile(zeroed(), live=True)
    y = torch.randn(4, 3)
    wanted = field(0.0, y)
    for twin in (copy.deepcopy(field), pickle.loads(pickle.dumps(field))):
        assert torch.equal(twin(0.0, y), wanted)
        twin(0.0, y).sum().backward()
        assert all(p.grad is not None for p in twin.module.parameters())
        assert all(p.grad is None for p in field.module.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_entries_that_come_back_are_seen(dtype):
    module = zeroed(dtype)
    watch = Watch(module)
    assert not watch.changed()
    with torch.no_grad():
        module.b.weight.mul_(1.5)
        module.c.weight.zero_()  # nothing there was zero
        assert not watch.changed()
        place = int((module.b.weight.reshape(-1) == 0).nonzero()[-1])
        for number, changed in ((-0.0, False), (2.0**-20, True), (float("nan"), True), (float("inf"), True), (0.0, False)):
            module.b.weight.view(-1)[place] = number
            assert watch.changed() == changed, number
        module.b.weight.data = module.b.weight.t()  # its zeros lie elsewhere
        assert watch.changed()


class Edited(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.norm = nn.Sequential(nn.Linear(3, 8), nn.LeakyReLU(), nn.Linear(8, 3)), nn.LayerNorm(3)
        self.register_buffer("calls", torch.tensor(0.0))
        self.last = torch.sin

    def forward(self, t, y):
        self.calls += 1
        return self.last(self.norm(self.net(y)))


REPLACED = {
    "slope": lambda module: setattr(module.net[1], "negative_slope", 0.5),
    "eps": lambda module: setattr(module.norm, "eps", 0.5),
    "bias": lambda module: setattr(module.net[0], "bias", None),
    "activation": lambda module: module.net.__setitem__(1, nn.Sigmoid()),
    "layer": lambda module: module.net.__setitem__(2, nn.Linear(8, 3).double()),
    "function of torch": lambda module: setattr(module, "last", torch.cos),
    "function": lambda module: setattr(module, "last", lambda y: -y),
    "append": lambda module: module.net.append(nn.Tanh()),
    "forward": lambda module: setattr(module, "forward", lambda t, y: -y),
    "forward of a part": lambda module: setattr(module.net, "forward", lambda y: 2 * y),
    "class": lambda module: setattr(module, "__class__", type("Doubled", (Edited,), {"forward": lambda self, t, y: 2 * y})),
    "hook": lambda module: module.net.register_forward_hook(lambda part, inputs, output: 2 * output + 1),
}


@pytest.mark.parametrize("edit", REPLACED)
def test_edits_of_the_module_are_followed(edit):
    module, y = Edited().double(), torch.randn(4, 3).double()
    field = sfk.compile(module, live=True)
    field(0.0, y)
    REPLACED[edit](module)
    torch.testing.assert_close(field(0.0, y), module(0.0, y))


def test_the_module_counts_the_evaluations_that_a_solve_has_made():
    module, y = Edited().double(), torch.randn(4, 3).double()
    field = sfk.compile(module, live=True)
    watch = field._watch
    solution = sfk.solve(field, y, T, **OPTIONS)
    assert field.nfe == module.calls == solution.stats.nfe
    module.calls.fill_(0)
    field(0.0, y)
    assert module.calls == 1 and field._watch is watch  # a counter that was reset compiles nothing anew


def test_tensors_that_change_are_read_at_every_call(monkeypatch):
    class Scaled(Chain):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.ones(3))
            self.shift = None

        def forward(self, t, x):
            return super().forward(t, x) * self.scale + self.shift

    torch.manual_seed(0)
    module, x, encoder = Scaled(), torch.randn(5, 3), nn.Linear(1, 3)
    module.shift = encoder(torch.ones(1))
    field = sfk.compile(module, live=True)
    compiled = []
    follow = type(field).follow
    monkeypatch.setattr(type(field), "follow", lambda self: compiled.append(follow(self)))
    for number in range(5):
        module.scale = torch.full((3,), 1.0 + number)
        module.shift = encoder(torch.full((1,), number + 1.0))
        found, wanted = field(0.0, x), module(torch.tensor(0.0), x)
        torch.testing.assert_close(found, wanted)
        trained = [*module.parameters(), *encoder.parameters()]
        ours = torch.autograd.grad(found.sum(), trained, retain_graph=True)
        torch.testing.assert_close(ours, torch.autograd.grad(wanted.sum(), trained))
    assert sum(compiled) == 1 and "read at every call, like parameters: scale, shift" in str(field.report())


# --------------------------------------------------------------------------------- what forward takes of its numbers

TAKEN = {
    "a number": lambda s, y: s.net(y) * s.p[0].item(),
    "a whole number": lambda s, y: sum((s.net(y) for _ in range(int(s.p[0]))), 0 * y),
    "a branch": lambda s, y: s.net(y) if s.p[0] > 1 else -s.net(y),
    "a list": lambda s, y: s.net(y) * s.p.tolist()[0],
    "an array": lambda s, y: s.net(y) * float(s.p.detach().numpy()[0]),
    "a copied number": lambda s, y: s.net(y) * torch.tensor([s.p[0].detach(), 1.0, 1.0, 2.0]),
    "a position": lambda s, y: s.net(y) + y[:, s.p.argmax()][:, None],
    "an order": lambda s, y: s.net(y) + y[:, s.p.argsort()],
    "an order of parameters": lambda s, y: s.net(y) * s.p[s.p.detach().abs().argsort()],
    "a mask": lambda s, y: s.net(y) + y[:, s.p > 0].sum(1, keepdim=True),
    "gathered": lambda s, y: s.net(y) + y.gather(1, s.p.argsort().expand(len(y), 4)),
    "chosen": lambda s, y: s.net(y) + y[:, s.p.topk(2).indices].sum(1, keepdim=True),
    "a number of the context": lambda s, y: s.net(y + s.c) * s.c.max().item(),
    "a branch on the context": lambda s, y: s.net(y + s.c) if s.c.sum() > 0 else y + s.c,
    "a position in the context": lambda s, y: s.net(y + s.c) + y[:, s.c[0].argmax()][:, None],
    "a mean of the context": lambda s, y: s.net(y + s.c) * s.c.mean(),
}  # fmt: skip


class Takes(nn.Module):
    def __init__(self, rule, trained):
        super().__init__()
        torch.manual_seed(0)
        self.rule, self.net = rule, nn.Linear(4, 4)
        self.p = nn.Parameter(torch.tensor([2.0, -1.0, 0.5, 3.0]), requires_grad=trained)
        self.c = torch.randn(3, 4).abs()

    def forward(self, t, y):
        return self.rule(self, y)

    def becomes_another(self):
        with torch.no_grad():
            self.p.copy_(torch.tensor([-1.2, 2.0, 3.0, 0.1]))
        self.c = -2 * torch.randn(3, 4).abs()


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", TAKEN)
def test_what_python_takes_of_parameters_and_context_is_no_constant(name, trained):
    module, y = Takes(TAKEN[name], trained), torch.randn(3, 4)
    if trained and name in ("a number", "a whole number"):
        with pytest.raises(sfk.UnsupportedFieldError, match="a number read out of the parameter 'p'"):
            sfk.compile(module, like=y)
        return
    field = sfk.compile(module, like=y, live=True)
    for _ in range(2):
        torch.testing.assert_close(field(0.0, y), module(torch.tensor(0.0), y), rtol=1e-5, atol=1e-5)
        module.becomes_another()


@pytest.mark.parametrize("name", [name for name in TAKEN if "context" in name])
def test_a_field_of_its_own_says_that_what_it_took_is_another(name):
    module, y = Takes(TAKEN[name], True), torch.randn(3, 4)
    field = sfk.compile(module, like=y)
    field(0.0, y)
    module.becomes_another()
    with pytest.raises(ValueError, match="that forward made of c is another now.*compile it anew"):
        field(0.0, y)
    field.with_context(torch.zeros(3, field.skeleton.context.rows))(0.0, y)  # given by hand, it is the caller's


@pytest.mark.parametrize("trained", [False, True])
def test_a_field_of_its_own_warns_of_branches_on_what_it_trains(trained, recwarn):
    sfk.compile(Takes(TAKEN["a branch"], trained))
    told = [str(w.message) for w in recwarn]
    assert len(told) == trained and all("a branch or a position of the parameter 'p'" in text for text in told)


# ------------------------------------------------------------------------------------------- zeros of computed weights

F = nn.functional
COMPUTED_ZEROS = {
    "clamp": lambda w: w.clamp(min=0.0),
    "magnitude": lambda w: w * (w.abs() > 0.3),
    "soft threshold": lambda w: F.softshrink(w, 0.3),
    "rounded": lambda w: (w * 4).round() / 4,
    "largest": lambda w: w * torch.zeros_like(w).scatter(1, w.abs().topk(2, 1).indices, 1.0),
    "straight through": lambda w: w + (w * (w.abs() > 0.3) - w).detach(),
    "rounded, straight through": lambda w: w + ((w * 4).round() / 4 - w).detach(),
}


class Thresholds(nn.Module):
    def __init__(self, rule):
        super().__init__()
        torch.manual_seed(0)
        self.rule, self.a, self.b = rule, nn.Linear(3, 8).double(), nn.Linear(8, 3).double()

    def forward(self, t, y):
        return F.linear(torch.tanh(self.a(y)), self.rule(self.b.weight * 2), self.b.bias)


@pytest.mark.parametrize("name", COMPUTED_ZEROS)
def test_zeros_of_computed_weights_come_back(name):
    y = torch.randn(6, 3).double()
    losses = []
    for compiled in (False, True):
        module = Thresholds(COMPUTED_ZEROS[name])
        field = sfk.compile(module, live=True) if compiled else module
        optimizer, found = torch.optim.SGD(module.parameters(), lr=0.5), []
        for step in range(8):
            if step == 4:
                with torch.no_grad():
                    module.b.weight.copy_(module.b.weight.roll(1, 0).flip(1) * 1.1)
            optimizer.zero_grad()
            loss = (field(0.0, y) - y.roll(1, 1)).square().mean()
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
        losses.append(torch.stack(found))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=1e-9)


def test_products_with_pruned_entries_stay_pruned():
    """They are zero wherever the others move, so nobody looks after them."""
    module = Thresholds(lambda w: w)
    parametrizations.weight_norm(module.b)
    with torch.no_grad():
        module.b.parametrizations.weight.original1[:, ::2] = 0.0
    field = sfk.compile(module, live=True)
    assert field._watch._answers is None and field.nnz <= 24 + 12


@pytest.mark.parametrize("dead", ["a layer", "all"])
def test_what_is_pruned_away_has_a_gradient_of_zeros(dead):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.unread = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(2, 2)

        def forward(self, t, y):
            return self.b(torch.tanh(self.a(y))) * (0.0 if dead == "all" and t is None else 1.0)

    module = Net()
    prune.custom_from_mask(module.b, "weight", torch.zeros(3, 4))
    if dead == "all":
        prune.custom_from_mask(module.b, "bias", torch.zeros(3))
    live, y = sfk.compile(module, live=True), torch.randn(5, 3)
    for function in (live, module):
        module.zero_grad(set_to_none=True)
        out = sfk.odeint(function, y, torch.tensor([0.0, 1.0])) if function is live else module(0.0, y)
        out.sum().backward()
        given = {name for name, p in module.named_parameters() if p.grad is not None}
        assert given == {name for name, _ in module.named_parameters() if "unread" not in name}
        assert not module.a.weight.grad.any() and not module.b.weight_orig.grad.any()
    module.zero_grad(set_to_none=True)
    live(0.0, y).sum().backward()
    assert module.a.weight.grad is not None and module.unread.weight.grad is None
