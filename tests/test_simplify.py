"""simplify keeps f to rounding, takes out what does not matter, and says what it did."""

from __future__ import annotations

import pytest
import torch
import torch.nn.utils.prune as prune
from torch import Tensor, nn

from fields import FIELDS, make_ffjord
from random_fields import plain_forward, random_field
from sparseflow_kernels.capture import capture
from sparseflow_kernels.field import (
    GraphField,
    IDENTITY, Activation, Layer, LinearShift, Pattern, SigmoidGate, TimeFunction, VectorField,
)
from sparseflow_kernels.simplify import simplify

TIMES = (-0.9, 0.0, 0.4, 1.7)


def assert_same(a: VectorField, b: VectorField, tolerance: float = 1e-12) -> None:
    generator = torch.Generator().manual_seed(3)
    y = torch.randn(6, a.dim, generator=generator, dtype=torch.float64).to(a.dtype)
    for value in TIMES:
        t = torch.tensor(value, dtype=y.dtype)
        torch.testing.assert_close(plain_forward(b, t, y)[0], plain_forward(a, t, y)[0], rtol=tolerance, atol=tolerance)


def layer(weight, bias=None, gate=None, shift=None, act: Activation = IDENTITY) -> Layer:
    weight = torch.tensor(weight, dtype=torch.float64)
    pattern = Pattern.from_mask(weight != 0)
    bias = torch.tensor(bias or [0.0] * weight.shape[0], dtype=torch.float64)
    return Layer(pattern, weight[weight != 0], bias, gate, shift, act, "made")


def vec(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


TANH = Activation("tanh")


def pruned(name: str, dtype: torch.dtype, amount: float) -> nn.Module:
    torch.manual_seed(1)
    module = FIELDS[name]().to(dtype)
    targets = [(m, "weight") for m in module.modules() if isinstance(m, nn.Linear)]
    if targets:
        prune.global_unstructured(targets, pruning_method=prune.L1Unstructured, amount=amount)
    return module


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("amount", [0.6, 0.92])
def test_keeps_every_pruned_field(name: str, amount: float) -> None:
    field = capture(pruned(name, torch.float64, amount))
    if isinstance(field, GraphField):
        pytest.skip("a graph: its time embedding is nodes")
    new, report = simplify(field)
    assert_same(field, new)
    assert new.nnz <= field.nnz and new.dim == field.dim
    for number, new_layer in zip(report.kept_layers, new.layers):
        old = field.layers[number]
        assert torch.equal(old.values[report.kept_values[number]], new_layer.values)
        assert report.kept_rows[number].numel() == new_layer.out_features
        assert bool((new_layer.values != 0).all())


@pytest.mark.parametrize("kind", ["concat", "concatsquash", "ignore"])
def test_keeps_float32(kind: str) -> None:
    field = capture(pruned(f"ffjord_{kind}", torch.float32, 0.8))
    new, _ = simplify(field)
    assert new.dtype == torch.float32
    assert_same(field, new, 1e-5)


def test_drops_unread_neurons_to_a_fixed_point() -> None:
    # Neuron 1 of layer 1 is read by nobody; neuron 2 of layer 0 only by it.
    field = VectorField([
        layer([[1, 2], [3, 0], [5, 6]], [0.1, 0.2, 0.3], act=TANH),
        layer([[1, 1, 0], [0, 0, 2]], [0.3, 0.4], act=TANH),
        layer([[1, 0], [2, 0]], [0.5, 0.6]),
    ])
    new, report = simplify(field)
    assert [x.pattern.shape for x in new.layers] == [(2, 2), (1, 2), (2, 1)]
    assert [r.dropped for r in report.layers] == [1, 1, 0]
    assert report.kept_rows[0].tolist() == [0, 1] and report.kept_rows[1].tolist() == [0]
    assert report.kept_values[1].tolist() == [0, 1]
    assert_same(field, new, 0.0)


def test_folds_constants_through_several_layers() -> None:
    # Neuron 0 of layer 0 is constant; then neuron 0 of layer 1, which reads only it, is too.
    field = VectorField([
        layer([[0, 0], [3, 1]], [0.7, 0.2], act=Activation("softplus")),
        layer([[2, 0], [1, 1]], [0.3, 0.4], act=TANH),
        layer([[1, 0], [2, 5]], [0.5, 0.6]),
    ])
    new, report = simplify(field)
    assert [x.pattern.shape for x in new.layers] == [(1, 2), (1, 1), (2, 1)]
    assert [r.folded for r in report.layers] == [1, 1, 0]
    assert_same(field, new)
    assert not torch.equal(new.layers[2].bias, field.layers[2].bias)


def test_constant_inside_the_next_gate() -> None:
    field = VectorField([
        layer([[0, 0], [3, 1]], [0.7, 0.2], act=TANH),
        layer([[2, 1], [1, 1]], [0.3, 0.4], SigmoidGate(vec(1, 2), vec(0.5, 0.1)), LinearShift(vec(1, 2), vec(0, 1))),
    ])
    new, _ = simplify(field)
    assert new.hidden == [1] and isinstance(new.layers[1].shift, LinearShift)
    assert_same(field, new)


def time_only(after_gate=None, after_shift=None, act=TANH) -> VectorField:
    return VectorField([
        layer([[0, 0], [3, 1]], [0.7, 0.2], shift=LinearShift(vec(2, 1), vec(0.1, 0.2)), act=act),
        layer([[2, 1], [1, 1]], [0.3, 0.4], gate=after_gate, shift=after_shift),
    ])


@pytest.mark.parametrize("shift", [None, LinearShift(vec(1, 2), vec(0, 1))])
def test_time_only_neuron_stays_where_it_would_cost_the_affine_shift(shift) -> None:
    field = time_only(after_shift=shift)
    new, report = simplify(field)
    assert new.hidden == [2] and report.layers[0].time_only == 1
    assert any("functions of t only" in note for note in new.notes)
    assert_same(field, new, 0.0)


def test_time_only_neuron_stays_before_a_gate() -> None:
    shift = TimeFunction(lambda t: torch.sin(t * vec(1, 2).to(t)))
    field = time_only(after_gate=SigmoidGate(vec(1, 2), vec(0.5, 0.1)), after_shift=shift)
    new, _ = simplify(field)
    assert new.hidden == [2]
    assert_same(field, new, 0.0)


def test_time_only_neuron_stays_before_a_time_function() -> None:
    field = time_only(after_shift=TimeFunction(lambda t: torch.sin(t * vec(1, 2, 3).to(t)), rows=torch.tensor([2, 0])))
    new, report = simplify(field)
    assert new.hidden == [2] and report.layers[0].time_only == 1
    assert_same(field, new)


@pytest.mark.parametrize("shift", [None, LinearShift(vec(1, 2), vec(0, 1))])
def test_affine_time_only_neuron_joins_the_affine_shift(shift) -> None:
    field = time_only(after_shift=shift, act=IDENTITY)
    new, _ = simplify(field)
    assert new.hidden == [1] and isinstance(new.layers[1].shift, LinearShift)
    assert_same(field, new)


def test_gated_neuron_without_inputs() -> None:
    # s * (0 + 0) + 0 is constant whatever the gate; with a bias it is not.
    gate = SigmoidGate(vec(1, 2, 3), vec(0.5, 0.1, 0.2))
    field = VectorField([
        layer([[0, 0], [3, 1], [0, 0]], [0.0, 0.2, 0.9], gate=gate, act=Activation("sigmoid")),
        layer([[2, 1, 1], [1, 1, 4]], [0.3, 0.4]),
    ])
    new, report = simplify(field)
    assert report.kept_rows[0].tolist() == [1, 2]
    assert torch.equal(new.layers[0].gate.slope, vec(2, 3))
    assert_same(field, new)


def test_explicit_zeros_go() -> None:
    pattern = Pattern.from_mask(torch.ones(2, 2, dtype=torch.bool))
    field = VectorField([Layer(pattern, vec(1, 0, 0, 2), vec(0, 0))])
    new, report = simplify(field)
    assert new.nnz == 2 and report.kept_values[0].tolist() == [0, 3]
    assert_same(field, new, 0.0)


@pytest.mark.parametrize("kind", ["ignore", "concat", "concat_v2", "squash", "concatsquash"])
@pytest.mark.parametrize("dead", [0, 1, 2])
def test_whole_layer_dead(kind: str, dead: int) -> None:
    torch.manual_seed(0)
    module = make_ffjord(kind, 2, (5, 6), "tanh").double()
    with torch.no_grad():
        module.diffeq.layers[dead]._layer.weight.zero_()
    field = capture(module)
    new, report = simplify(field)
    assert_same(field, new)
    assert new.layers[0].in_features == 2 and all(x.out_features > 0 for x in new.layers)
    if kind == "ignore":
        assert len(new.layers) == 1 and new.nnz == 0
        assert report.kept_layers == [2] and "the layer is gone" in str(report)


def test_single_neuron_left() -> None:
    torch.manual_seed(0)
    module = make_ffjord("ignore", 3, (5, 6), "tanh").double()
    with torch.no_grad():
        module.diffeq.layers[0]._layer.weight[1:] = 0
        module.diffeq.layers[1]._layer.weight[:, 1:] = 0
        module.diffeq.layers[1]._layer.weight[:3] = 0
        module.diffeq.layers[2]._layer.weight[:, 4:] = 0
    field = capture(module)
    new, _ = simplify(field)
    assert new.hidden == [1, 1]
    assert_same(field, new)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("gate, shift", [(False, False), (True, False), (False, True), (True, True)])
def test_random_sparse_fields(seed: int, gate: bool, shift: bool) -> None:
    activation = ["tanh", "softplus", "identity", "sin"][seed % 4]
    activation = Activation(activation, (1.5, 20.0) if activation == "softplus" else ())
    field = random_field((3, 6, 5, 6, 3), 0.2, activation=activation, gate=gate, shift=shift, seed=seed)
    new, report = simplify(field)
    assert_same(field, new)
    # A fixed point: every hidden neuron is read, and one without inputs is a function of t that had to stay.
    for number, before, after in zip(report.kept_layers, new.layers, new.layers[1:]):
        assert set(after.pattern.col.tolist()) == set(range(before.out_features))
        blind = set(range(before.out_features)) - set(before.pattern.row.tolist())
        assert len(blind) == report.layers[number].time_only
        assert not blind or gate or shift


def test_report_and_purity() -> None:
    field = capture(pruned("ffjord_ignore", torch.float64, 0.9))
    before = {name: x.clone() for name, x in field.tensors()}
    new, report = simplify(field)
    assert all(torch.equal(x, before[name]) for name, x in field.tensors())
    assert report.weights_before == field.nnz and report.weights_after == new.nnz
    for r in report.layers:
        assert r.neurons_before - r.dropped - r.folded == r.neurons_after or r.layer not in report.kept_layers
    text = str(report)
    assert text.count("\n") >= 3 and f"total: weights {field.nnz} -> {new.nnz}" in text
    again, second = simplify(new)
    assert again.nnz == new.nnz and again.hidden == new.hidden and second.weights_before == second.weights_after
