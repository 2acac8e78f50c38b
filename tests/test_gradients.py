"""Gradients of evaluations and solves, engine by engine: finite differences, the dense module's, torchdiffeq's; who
makes them; what happens where they are not finite."""

from __future__ import annotations

import gc
import math
import threading
import weakref

import pytest
import torch
import torchdiffeq
from engine_fields import OpaqueEngine, PlainField
from fields import make_ffjord
from random_fields import random_field
from torch import nn
from torch.nn.utils import prune

import sparseflow_kernels as sfk
from sparseflow_kernels import engines
from sparseflow_kernels.activations import ACTIVATIONS
from sparseflow_kernels.divergence_field import with_divergence
from sparseflow_kernels.engines.base import Gradient
from sparseflow_kernels.engines.reference import ReferenceEngine
from sparseflow_kernels.field import Layer, Pattern, TimeFunction, VectorField
from sparseflow_kernels.odeint import odeint, solve
from sparseflow_kernels.solution import GradientError

F64 = torch.float64
KINDS = [None, "exact", "hutchinson"]
LAYER_KINDS = {
    "ignore": {}, "concat": {"shift": True}, "squash": {"gate": True}, "concatsquash": {"gate": True, "shift": True},
}  # fmt: skip
SIZES = {1: (2, 5, 2), 2: (3, 5, 4, 3), 3: (2, 4, 5, 4, 2), 4: (2, 4, 3, 4, 3, 2)}
# Steps that finite differences do not move: every one is forced to be accepted, and as long as the last.
STEADY = {"first_step": 0.23, "min_step": 0.23, "max_step": 0.23}


@pytest.fixture(params=["opaque", "cpu", "reference"])
def engine(request):
    """An engine class: one that gives gradients through the protocol, the native one, autograd's own."""
    return engine_class(request)


@pytest.fixture(params=["opaque", "cpu"])
def native(request):
    return engine_class(request)


def engine_class(request):
    if request.param == "cpu":
        cpu, missing = engines.available("cpu")
        missing = missing or cpu.unsupported(random_field([2, 3, 2]))
        return cpu if cpu is not None and not missing else pytest.skip(missing)
    return {"reference": ReferenceEngine, "opaque": OpaqueEngine}[request.param]


def states(rows=3, dim=3, seed=1):
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=F64)


def check(field, function, *inputs, **options):
    """gradcheck in the inputs and every parameter of the field."""
    leaves = [value.detach().clone().requires_grad_() for value in inputs]

    def of_all(*values):
        return function(*values[: len(leaves)])

    return torch.autograd.gradcheck(of_all, (*leaves, *field.parameters()), fast_mode=True, **options)


def evaluation(field, kind, noise):
    if kind is None:
        return lambda t, x, *_: field(t, x)
    zero = torch.zeros(len(noise), dtype=F64)
    if kind == "exact":
        augmented = with_divergence(field, kind)
        return lambda t, x, *_: augmented(t, (x, zero))
    # the probe is an input like any other
    return lambda t, x, noise: field._run(kind, t, x, noise)


# ------------------------------------------------------------------------------------------------ finite differences


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "depth, layers", [(depth, "concatsquash") for depth in SIZES] + [(2, "ignore"), (2, "concat"), (2, "squash")]
)
def test_evaluations(native, depth, layers, kind):
    field = PlainField(random_field(SIZES[depth], 0.7, **LAYER_KINDS[layers], seed=depth), native)
    x, noise = states(dim=field.dim), states(dim=field.dim, seed=2)
    inputs = (torch.tensor(0.4, dtype=F64), x) + ((noise,) if kind == "hutchinson" else ())
    assert check(field, evaluation(field, kind, noise), *inputs)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations(native, activation, kind):
    field = PlainField(random_field((3, 5, 4, 3), 0.7, activation=activation, gate=True, shift=True), native)
    x, noise = states(), states(seed=2)
    inputs = (torch.tensor(-0.3, dtype=F64), x) + ((noise,) if kind == "hutchinson" else ())
    assert check(field, evaluation(field, kind, noise), *inputs)


SOLVES = {
    "dopri5": {"method": "dopri5", "options": STEADY},
    "bosh3-stops": {"method": "bosh3", "options": STEADY | {"step_t": [0.33], "jump_t": [0.5]}},
    "adaptive_heun": {"method": "adaptive_heun", "options": STEADY},  # carries a derivative that is not f(t1, y1)
    "rk4": {"method": "rk4", "options": {"step_size": 0.3, "perturb": True}},
    "heun3": {"method": "heun3"},
}


def solution(field, kind, method, direction="up"):
    times = torch.linspace(0.1, 0.9, 4, dtype=F64)
    times = times if direction == "up" else times.flip(0)
    if kind is None:
        return lambda x, times: odeint(field, x, times, **SOLVES[method]), times
    noise = states(dim=field.dim, seed=2).sign()
    augmented = with_divergence(field, kind, noise if kind == "hutchinson" else None)
    return lambda x, times, l: odeint(augmented, (x, l), times, **SOLVES[method]), times


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", SIZES)
def test_solves(native, depth, kind):
    """Several outputs, both directions of time, in the state, the times, l and the parameters."""
    field = PlainField(random_field(SIZES[depth], 0.7, gate=True, shift=True, seed=depth), native)
    function, times = solution(field, kind, "dopri5", "up" if depth % 2 else "down")
    l = () if kind is None else (torch.ones(3, dtype=F64),)  # noqa: E741
    assert check(field, function, states(dim=field.dim), times, *l)


@pytest.mark.parametrize("kind, direction", [(None, "up"), ("exact", "down"), ("hutchinson", "up")])
@pytest.mark.parametrize("method", list(SOLVES)[1:])
def test_methods(native, method, kind, direction):
    field = PlainField(random_field((2, 4, 3, 2), 0.8, gate=True, shift=True), native)
    function, times = solution(field, kind, method, direction)
    l = () if kind is None else (torch.ones(3, 1, dtype=F64),)  # noqa: E741
    # with stops only the parts of the solve before the first one move with t[0], which differences do not see
    leaves = (states(dim=2), *l) if method == "bosh3-stops" else (states(dim=2), times, *l)
    if method == "bosh3-stops":
        whole, function = function, lambda x, *l: whole(x, times, *l)
    assert check(field, function, *leaves)


def test_layer_kinds_through_a_solve(native):
    for options in LAYER_KINDS.values():
        field = PlainField(random_field((2, 4, 2), 0.8, activation="softplus", **options), native)
        function, times = solution(field, "exact", "dopri5")
        assert check(field, function, states(dim=2), times, torch.zeros(3, dtype=F64))


def test_end_time_is_trainable(engine):
    """dL/dT of a solve to T, which the reference's flows lose: f at the end, by the definition."""
    field = PlainField(random_field((3, 6, 3), 0.7, gate=True, shift=True), engine)
    root = torch.tensor(0.9, dtype=F64, requires_grad=True)
    x, weights = states(), states(seed=4)
    ys = odeint(field, x, torch.stack((torch.zeros_like(root), root**2)), rtol=1e-9, atol=1e-9)
    (ys[-1] * weights).sum().backward()
    with torch.no_grad():
        expected = 2 * root * (field(root.detach() ** 2, ys[-1]) * weights).sum()
    torch.testing.assert_close(root.grad, expected, rtol=1e-6, atol=1e-7)


# ------------------------------------------------------------------------------------------------ the dense module's


def masked(kind, hidden, act):
    """An FFJORD net with half its weights pruned, none of its neurons dead."""
    module = make_ffjord(kind, 3, hidden, act).double()
    for index, layer in enumerate(module.diffeq.layers):
        mask = torch.rand(layer._layer.weight.shape, generator=torch.Generator().manual_seed(index)) < 0.5
        mask[torch.arange(max(mask.shape)) % mask.shape[0], torch.arange(max(mask.shape)) % mask.shape[1]] = True
        if kind == "concat":
            mask[:, 0] = True  # the time's column
        prune.custom_from_mask(layer._layer, "weight", mask)
    return module


class DenseDivergence(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, t, state):
        x = state[0] if state[0].requires_grad else state[0].detach().requires_grad_()
        with torch.enable_grad():
            dx = self.module(t, x)
            trace = sum(torch.autograd.grad(dx[:, m].sum(), x, create_graph=True)[0][:, m] for m in range(x.shape[1]))
        return dx, -trace


@pytest.mark.parametrize("times", [[0.0, 0.6, 1.0], [1.0, 0.3]], ids=["up", "down"])
@pytest.mark.parametrize("kind, act", [("ignore", "tanh"), ("concat", "softplus"), ("concatsquash", "tanh")])
def test_gradients_are_the_masked_modules(engine, kind, act, times):
    """A log-density's gradient by torchdiffeq through the dense module, gathered at the masks."""
    torch.manual_seed(3)
    module = masked(kind, (6, 5), act)
    field = PlainField(sfk.compile(module).vector_field.map_tensors(torch.Tensor.detach), engine)
    assert field.vector_field.hidden == [6, 5]
    times, arguments = torch.tensor(times, dtype=F64), dict(rtol=1e-8, atol=1e-8)
    grads = []
    for interface, f in ((torchdiffeq.odeint, DenseDivergence(module)), (odeint, with_divergence(field))):
        x = states(5).requires_grad_()
        ys, ls = interface(f, (x, torch.zeros(5, dtype=F64)), times, **arguments)
        (ys[1:].square().sum() - ls[1:].sum()).backward()
        grads.append(x.grad)
    close = dict(rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grads[1], grads[0], **close)
    for ours, theirs in zip(field.layers, module.diffeq.layers):
        mask, dense = theirs._layer.weight_mask.bool(), theirs._layer.weight_orig.grad
        if kind == "concat":
            torch.testing.assert_close(ours.shift.slope.grad, dense[:, 0], **close)
            mask, dense = mask[:, 1:], dense[:, 1:]
        torch.testing.assert_close(ours.values.grad, dense[mask], **close)
        torch.testing.assert_close(ours.bias.grad, theirs._layer.bias.grad, **close)
        if kind == "concatsquash":
            torch.testing.assert_close(ours.gate.slope.grad, theirs._hyper_gate.weight.grad[:, 0], **close)
            torch.testing.assert_close(ours.gate.offset.grad, theirs._hyper_gate.bias.grad, **close)
            torch.testing.assert_close(ours.shift.slope.grad, theirs._hyper_bias.weight.grad[:, 0], **close)


# ------------------------------------------------------------------------------------------------------ who makes it


class Teller(OpaqueEngine):
    """Says what it is asked; refuses what it is told to."""

    asked: list = []
    refuses: str | None = None

    def no_gradient(self, wanted, request=None):
        Teller.asked.append((set(wanted), request is not None))
        return Teller.refuses

    def evaluate_backward(self, *arguments, **more):
        assert Teller.refuses is None and not more
        Teller.asked.append("evaluate")
        return super().evaluate_backward(*arguments)

    def solve_backward(self, request, result, *arguments, **more):
        assert Teller.refuses is None and not more
        assert request.record and result.states.shape == (result.accepted + 1, *request.x.shape)
        Teller.asked.append("solve")
        return super().solve_backward(request, result, *arguments)


@pytest.fixture
def teller(monkeypatch):
    monkeypatch.setattr(Teller, "asked", [])
    monkeypatch.setattr(Teller, "refuses", None)
    return Teller


T01 = torch.tensor([0.0, 1.0], dtype=F64)


def test_engines_are_asked_for_what_is_wanted(teller):
    field = PlainField(random_field((3, 5, 3), gate=True), teller)
    x, t, noise = states(), torch.tensor(0.3, dtype=F64), states(seed=2)
    field(t, x).sum().backward()
    assert teller.asked == [({"tensors"}, False), "evaluate"]
    teller.asked.clear()
    odeint(field, x, T01).sum().backward()
    assert teller.asked == [({"tensors"}, True), "solve"]
    teller.asked.clear()
    field.requires_grad_(False)
    odeint(field, x.requires_grad_(), T01.clone().requires_grad_()).sum().backward()
    assert teller.asked == [({"x", "times"}, True), "solve"]
    teller.asked.clear()
    augmented = with_divergence(field, "hutchinson", noise)
    odeint(augmented, (states(), torch.zeros(3, dtype=F64, requires_grad=True)), T01)[1].sum().backward()
    assert teller.asked == [({"l"}, True), "solve"]


def test_a_refusal_goes_to_the_reference_engine(teller):
    field = PlainField(random_field((3, 5, 3), gate=True), teller)
    expected = PlainField(field.vector_field.map_tensors(torch.Tensor.detach), ReferenceEngine)
    teller.refuses = "it is Sunday"
    for f in (field, expected):
        x = states()
        (odeint(f, x, T01).square().sum() + f(0.2, x).sum()).backward()
    for ours, theirs in zip(field.parameters(), expected.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-10)
    assert OpaqueEngine.requests[-1].record is False
    assert "gradient: reference, in plain PyTorch, because it is Sunday" in field.report()
    teller.refuses = None
    assert "gradient: opaque\n" in field.report()


@pytest.mark.parametrize("kind", KINDS)
def test_the_native_engine_needs_no_help(monkeypatch, kind):
    cpu, missing = engines.available("cpu")
    if cpu is None or cpu.unsupported(random_field([2, 3, 2])):
        pytest.skip(missing or "the cpu engine is not built")

    def refuse(*arguments, **more):
        raise AssertionError("the reference engine was asked for a gradient")

    monkeypatch.setattr(ReferenceEngine, "evaluate_backward", refuse)
    monkeypatch.setattr(ReferenceEngine, "solve_backward", refuse)
    field = sfk.compile(random_field((3, 6, 5, 3), 0.7, gate=True, shift=True), "cpu")
    assert "gradient: cpu" in field.report()
    func = field if kind is None else with_divergence(field, kind)
    x, l = states().requires_grad_(), torch.zeros(3, dtype=F64, requires_grad=True)  # noqa: E741
    y0, arguments = (x if kind is None else (x, l)), dict(rtol=1e-4, atol=1e-4)
    for direction in (T01, T01.flip(0)):
        for method in ("dopri5", "tsit5", "rk4"):
            times = direction.clone().requires_grad_(method != "rk4")
            ys = odeint(func, y0, times, **arguments, method=method)
            value = func(times.detach()[0], y0)
            for outputs in (ys, value):
                (outputs if kind is None else outputs[0].sum() + outputs[1]).sum().backward()
    assert all(bool(p.grad.any()) for p in field.parameters())


def test_the_probe_of_a_solve_has_a_gradient(native):
    field = PlainField(random_field((3, 5, 4, 3), 0.8, gate=True, shift=True), native)
    x, l = states(), torch.zeros(3, dtype=F64)  # noqa: E741

    def density(noise):
        func = with_divergence(field, "hutchinson", noise)
        return odeint(func, (x, l), T01, method="rk4", options={"step_size": 0.3})[1]

    assert check(field, density, states(seed=2))


def test_gradients_that_are_differentiated_are_the_reference_engines(teller):
    field = PlainField(random_field((3, 5, 3), gate=True), teller)
    x = states().requires_grad_()
    for value in (field(0.3, x), odeint(field, x, T01)[1]):
        teller.asked.clear()
        (first,) = torch.autograd.grad(value.square().sum(), x, create_graph=True)
        assert first.requires_grad and "solve" not in teller.asked and "evaluate" not in teller.asked


def test_a_state_that_depends_on_the_parameters_is_not_counted_twice(engine):
    """y0 = f(0, x): second derivatives through the solve, against the plain reference engine's autograd."""
    results = []
    for chosen in (engine, ReferenceEngine):
        field = PlainField(random_field((3, 5, 3), 0.8, gate=True, shift=True), chosen)
        x = states().requires_grad_()
        value = odeint(field, field(0.0, x), T01, rtol=1e-3, atol=1e-3)[1].square().sum()
        first = torch.autograd.grad(value, [x, *field.parameters()], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, *field.parameters()])
        results.append([*first, *second])
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


def test_frozen_parameters(engine):
    field = sfk.compile(make_ffjord("concat", 2, (6,)).double())
    field = PlainField(field.vector_field.map_tensors(torch.Tensor.detach), engine)
    field.layers[0].values.requires_grad_(False)
    odeint(field, states(dim=2), T01).square().sum().backward()
    assert field.layers[0].values.grad is None and field.layers[0].bias.grad.any()


class Wave(nn.Module):
    def __init__(self):
        super().__init__()
        self.frequency = nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64))

    def forward(self, t):
        return torch.sin(self.frequency * t + 0.5)


def test_functions_of_time_are_trained(engine):
    """One module in two places: its parameters are the reference engine's to train, whoever runs the field."""
    plain, wave = random_field((2, 4, 4, 2), 0.9), Wave()
    plain.layers[0].gate, plain.layers[1].shift = TimeFunction(wave), TimeFunction(wave)
    field = PlainField(plain, engine)
    parameter = field.layers[0].gate_function.frequency
    assert len(list(field.parameters())) == len(list(plain.tensors())) + 1
    steady = dict(method="dopri5", options=STEADY)
    assert check(field, lambda x: odeint(field, x, T01, **steady), states(dim=2))
    field(0.4, states(dim=2)).sum().backward()
    assert parameter.grad is not None and bool(parameter.grad.all())


class Renewed(OpaqueEngine):
    """Holds copies of the values, and takes over new ones, as native engines do."""

    def __init__(self, field, plan=None):
        super().__init__(field.map_tensors(lambda tensor: tensor.detach().clone()), plan)

    def update(self, field):
        for own, new in zip(self.tensors(), ReferenceEngine(field).tensors()):
            own.copy_(new.detach())
        self._packed, self.stamp = None, self.stamp + 1
        return True

def test_an_engine_that_took_over_other_values_is_not_asked_for_the_old_gradient(monkeypatch):
    """torch.func.functional_call lends other parameters between a forward pass and its backward pass."""
    from sparseflow_kernels import packing

    monkeypatch.setattr(packing, "choose", lambda field, requested: (Renewed, ""))
    field = sfk.compile(random_field((3, 5, 3), 0.8, gate=True, shift=True), "reference")
    others = {name: torch.randn_like(p).requires_grad_() for name, p in field.named_parameters()}
    x, arguments = states(), dict(rtol=1e-4, atol=1e-4)
    first, engine = odeint(field, x, T01, **arguments)[1] + field(0.3, x), field.packed()
    module = nn.Module()
    module.field, module.forward = field, lambda x: odeint(field, x, T01, **arguments)[1] + field(0.3, x)
    second = torch.func.functional_call(module, {f"field.{name}": p for name, p in others.items()}, (x,))
    assert engine.stamp == 1 and isinstance(engine, Renewed)
    first.square().sum().backward()
    second.square().sum().backward()
    for values in (dict(field.named_parameters()), others):
        plain = PlainField(field.vector_field.map_tensors(torch.Tensor.detach), ReferenceEngine)
        with torch.no_grad():
            for parameter, value in zip(plain.parameters(), values.values()):
                parameter.copy_(value)
        (odeint(plain, x, T01, **arguments)[1] + plain(0.3, x)).square().sum().backward()
        for got, want in zip(values.values(), plain.parameters()):
            torch.testing.assert_close(got.grad, want.grad, rtol=1e-9, atol=1e-10)
    field(0.3, x)  # its own parameters again
    assert engine.stamp == 2 and field.packed() is engine


def test_changed_inputs_are_noticed_and_memory_is_given_back():
    field = PlainField(random_field((3, 5, 3)), OpaqueEngine)
    x = states().requires_grad_()
    start = x * 1.0
    ys = odeint(field, start, T01)
    start.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ys.sum().backward()
    ys = odeint(field, x, T01)
    ys.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        ys.sum().backward()
    gc.collect()
    gc.disable()
    try:
        ys = odeint(field, x, T01)
        node = weakref.ref(ys.grad_fn.next_functions[0][0])
        del ys
        assert node() is None  # no cycle between an output and what its gradient needs
    finally:
        gc.enable()


def test_gradient_of_nothing():
    """Outputs that the loss does not read, and steps beyond the last output."""
    field = PlainField(random_field((3, 5, 3)), OpaqueEngine)
    x = states().requires_grad_()
    ys = odeint(field, x, torch.tensor([0.5], dtype=F64))
    ys.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert not any(p.grad.any() for p in field.parameters() if p.grad is not None)


# -------------------------------------------------------------------------------------------- gradients not finite


def linear(rate, dtype=torch.float32):
    """y' = rate * y in two components."""
    values, bias = torch.full((2,), rate, dtype=dtype), torch.zeros(2, dtype=dtype)
    return VectorField([Layer(Pattern.from_mask(torch.eye(2).bool()), values, bias)])


def test_what_arrives_is_named(engine):
    field = PlainField(random_field((3, 5, 3)), engine)
    ys = odeint(field, states(4), torch.tensor([1.0, 0.5, 0.0], dtype=F64))
    weights = torch.ones_like(ys)
    weights[1, 2, 0] = math.nan
    words = r"output for t = 0\.5 is not finite, 1 row\(s\) of the batch: 2\. The loss"
    with pytest.raises(GradientError, match=words) as info:
        (ys * weights).sum().backward()
    assert (info.value.step, info.value.rows) == (None, (2,))


@pytest.mark.parametrize("direction", [1, -1])
def test_an_overflow_on_the_way_back_is_named(engine, direction):
    """The cotangent of row 1 grows by e^5 over the solve, past float32's largest, somewhere in the middle."""
    field = PlainField(linear(5.0 * direction), engine)
    x = torch.tensor([[1.0, 2.0], [3.0, 1.0], [1.0, 1.0]])
    times = torch.tensor([0.0, 0.4, direction])[[0, 2]]
    solution = solve(field, x.requires_grad_(), times, method="rk4", options={"step_size": 0.125})
    weights = torch.ones(3, 2)
    weights[1, 1] = 3e37
    with pytest.raises(GradientError, match="the gradient of a solve is not finite, in step") as info:
        (solution.ys[-1] * weights).sum().backward()
    error = info.value
    growth = 3e37 * math.exp(5 * (1 - abs(error.t)))
    assert error.rows == (1,) and error.dt == 0.125 and error.t == direction * error.step * 0.125
    assert growth > torch.finfo(torch.float32).max > growth * math.exp(-5 * 0.125) * 0.99


def test_a_state_that_is_not_finite_is_named(engine):
    """A fixed grid goes through an overflow without looking."""
    field = PlainField(linear(200.0), engine)
    x = torch.tensor([[1e34, 0.0], [1.0, 1.0]], requires_grad=True)
    ys = odeint(field, x, torch.tensor([0.0, 1.0]), method="euler", options={"step_size": 0.25})
    with pytest.raises(GradientError, match=r"the state that the solve had come to is not finite") as info:
        ys[-1, 1].sum().backward()
    assert info.value.rows == (0,) and info.value.t == 0.25 * info.value.step


def test_finite_gradients_in_company_pass(engine):
    """A row that is not finite and that the loss does not read stops nobody else where no parameter is trained."""
    field = PlainField(linear(1.0), engine).requires_grad_(False)
    x = torch.ones(2, 2, requires_grad=True)
    odeint(field, x, torch.tensor([0.0, 1.0]), method="rk4")[-1, 0].sum().backward()
    assert torch.isfinite(x.grad).all()


def test_an_engine_may_know_fewer_tensors():
    from sparseflow_kernels.gradients import _in_order

    one = torch.ones(1)
    assert _in_order(Gradient(tensors=(one,), x=one), ("x",), (True, True, True)) == (one, one, None)
    assert _in_order(Gradient(tensors=(one,), x=one), ("x",), (False, False, True)) == (None, None, None)


@pytest.mark.parametrize("offset", [-60.0, -120.0, -800.0])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_shift_behind_a_gate_that_underflows_has_its_gradient(native, dtype, offset):
    field = random_field([3, 5, 3], 0.8, gate=True, shift=True, dtype=dtype, seed=3)
    field.layers[0].gate.slope.zero_()
    field.layers[0].gate.offset.fill_(offset)
    x, grad = states(6).to(dtype), states(6, seed=2).to(dtype)
    found = [
        engine(field).evaluate_backward(0.4, x, None, grad, None, {"tensors", "x", "t"})
        for engine in (native, ReferenceEngine)
    ]
    for (name, _), mine, wanted in zip(field.tensors(), *(gradient.tensors for gradient in found)):
        torch.testing.assert_close(mine, wanted, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(found[0].t, found[1].t)


def test_new_values_wait_for_a_solve_in_another_thread():
    cpu = engines.available("cpu")[0]
    if cpu is None:
        pytest.skip("the cpu engine is not built")
    field = random_field([3, 32, 3], dtype=torch.float32)
    compiled = sfk.compile(field, engine="cpu")
    engine, grid = compiled.packed(), torch.linspace(0, 1, 2)
    options = {"step_size": 1e-5}  # long enough that the solve asks for the interpreter while new values wait
    solving = threading.Thread(target=lambda: solve(compiled, torch.randn(8, 3), grid, method="rk4", options=options))
    with torch.no_grad():
        solving.start()
        for _ in range(50):
            assert engine.update(compiled.vector_field)
        solving.join(60)
    assert not solving.is_alive()
