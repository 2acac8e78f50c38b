"""Every form of the divergence against autograd's Jacobian, and what the planner chooses and counts."""

import subprocess
import sys

import pytest
import torch
from cpu_cases import isolated_environment
from random_fields import jacobians, plain_forward, random_field

import sparseflow_kernels as sfk
from sparseflow_kernels import activations, divergence
from sparseflow_kernels.divergence import (
    ColumnsForm, DiagonalForm, DivergencePlan, HutchinsonForm, NoHiddenForm, PairsForm, PathsForm, evaluate, plan,
)
from sparseflow_kernels.engines.cpu import CpuEngine
from sparseflow_kernels.field import Activation, Layer, Pattern, VectorField
from sparseflow_kernels.flows import mlp_field

SIZES = {
    0: [4, 4], 1: [3, 9, 3], 2: [5, 11, 8, 5], 3: [4, 9, 12, 7, 4], 4: [3, 8, 6, 9, 7, 3], 5: [2, 5, 6, 4, 7, 5, 2],
}
T = torch.tensor(0.37, dtype=torch.float64)


def slopes_of(field, t, x):
    _, pre_activations = plain_forward(field, t, x)
    slopes = []
    for layer, z in zip(field.layers[:-1], pre_activations):
        slope = activations.derivative(layer.activation, z)
        slopes.append(slope if layer.gate is None else layer.gate.at(t) * slope)
    return slopes


def state(field, batch=4, seed=1):
    return torch.randn(batch, field.dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def traces(field, chosen, x, noise=None):
    """(form's value, autograd's), both [batch]."""
    jacobian = jacobians(lambda x: plain_forward(field, T, x)[0], x)
    if noise is None:
        want = torch.diagonal(jacobian, dim1=1, dim2=2).sum(1)
    else:
        want = torch.einsum("bm,bmn,bn->b", noise, jacobian, noise)
    return evaluate(chosen, field, T, slopes_of(field, T, x), noise).expand_as(want), want


def assert_close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("depth", SIZES)
def test_exact_is_the_trace(depth, density, gate):
    field = random_field(SIZES[depth], density, gate=gate, shift=gate, seed=depth)
    assert_close(*traces(field, plan(field), state(field)))


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("depth", SIZES)
def test_hutchinson_is_the_quadratic_form(depth, gate):
    field = random_field(SIZES[depth], 0.5, gate=gate, shift=True, seed=depth)
    chosen = plan(field, "hutchinson")
    assert isinstance(chosen.form, HutchinsonForm) and chosen.form.output_gate == gate
    assert_close(*traces(field, chosen, state(field), state(field, seed=2)))


@pytest.mark.parametrize("name", list(activations.ACTIVATIONS))
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_exact_with_every_activation(depth, name):
    params = {"softplus": (2.0, 1.5), "elu": (0.7,)}.get(name, ())
    field = random_field(SIZES[depth], 0.6, activation=Activation(name, params), gate=True, shift=True, seed=3)
    assert_close(*traces(field, plan(field), state(field)))


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("density", [0.1, 0.3, 1.0])
def test_both_forms_for_three_hidden_layers(density, gate):
    field = random_field([5, 9, 12, 7, 5], density, gate=gate, seed=4)
    patterns = [layer.pattern for layer in field.layers]
    paths = divergence._plan_paths(patterns, divergence._count_paths(patterns))
    columns, _ = divergence._plan_columns(patterns)
    for form in (paths, columns):
        assert_close(*traces(field, DivergencePlan("exact", form, {}, ""), state(field)))


@pytest.mark.parametrize("only_output_gate", [False, True])
def test_output_gate_alone_and_hidden_gates_alone(only_output_gate):
    for depth in SIZES:
        field = random_field(SIZES[depth], 0.6, gate=not only_output_gate, output_gate=only_output_gate, seed=depth)
        assert_close(*traces(field, plan(field), state(field)))


@pytest.mark.parametrize("depth", SIZES)
def test_empty_patterns_have_trace_zero(depth):
    field = random_field(SIZES[depth], 0.6, gate=True, seed=1)
    for emptied in range(len(field.layers)):
        layers = list(field.layers)
        old = layers[emptied]
        none = Pattern.from_mask(torch.zeros(old.pattern.shape, dtype=torch.bool))
        layers[emptied] = Layer(none, old.values[:0], old.bias, old.gate, old.shift, old.activation)
        cut = VectorField(layers)
        got, want = traces(cut, plan(cut), state(cut))
        assert_close(got, want)
        assert not want.any()


def test_hidden_layer_without_neurons():
    for depth in (1, 2, 3, 4):
        sizes = list(SIZES[depth])
        sizes[1] = 0
        field = random_field(sizes, 1.0)
        got, want = traces(field, plan(field), state(field))
        assert got.shape == want.shape and not got.any()


def test_the_form_by_depth():
    kinds = [type(plan(random_field(SIZES[depth], 0.5)).form) for depth in (0, 1, 2, 4, 5)]
    assert kinds == [NoHiddenForm, DiagonalForm, PairsForm, ColumnsForm, ColumnsForm]
    assert isinstance(plan(random_field([6, 40, 40, 40, 6], 0.1)).form, PathsForm)
    assert isinstance(plan(random_field([6, 40, 40, 40, 6], 1.0)).form, ColumnsForm)


def count_by_hand(field):
    """(live weights of W_2, paths, columns' cost) by plain loops over dense masks."""
    masks = [layer.pattern.dense(torch.ones(layer.pattern.nnz)) > 0 for layer in field.layers]
    if len(masks) == 3:
        pairs = sum(
            bool((masks[0][j] & masks[2][:, i]).any()) for i, j in masks[1].nonzero().tolist()
        )
        return pairs
    live_pairs, paths = set(), 0
    for i, j in masks[2].nonzero().tolist():
        for k in masks[1][j].nonzero().flatten().tolist():
            if (masks[0][k] & masks[3][:, i]).any():
                live_pairs.add((i, k))
                paths += 1
    columns = 0
    for m in range(field.dim):
        walks = {
            (k, j, i)
            for k in masks[0][:, m].nonzero().flatten().tolist() for j in masks[1][:, k].nonzero().flatten().tolist()
            for i in masks[2][:, j].nonzero().flatten().tolist() if masks[3][m, i]
        }
        neurons = [{walk[level] for walk in walks} for level in range(3)]
        edges = len({walk[:2] for walk in walks}) + len({walk[1:] for walk in walks})
        columns += edges + sum(map(len, neurons)) + len(neurons[2])
    return paths + 3 * len(live_pairs), columns


@pytest.mark.parametrize("density", [0.1, 0.4, 1.0])
def test_costs_are_counted_on_the_real_masks(density):
    field = random_field([4, 10, 9, 4], density, seed=5)
    costs = plan(field).costs
    assert costs == {"hutchinson": field.layers[1].pattern.nnz, "pairs": count_by_hand(field)}
    field = random_field([4, 10, 9, 8, 4], density, seed=6, output_gate=True)
    paths, columns = count_by_hand(field)
    chosen = plan(field)
    probe = sum(layer.pattern.nnz for layer in field.layers[1:])
    assert chosen.costs == {"hutchinson": probe, "paths": paths, "columns": columns}
    assert isinstance(chosen.form, PathsForm if paths < columns else ColumnsForm)
    assert str(paths) in chosen.reason and str(columns) in chosen.reason
    assert plan(field, "hutchinson").costs == {"hutchinson": probe}


@pytest.mark.parametrize("gate", [False, True])
def test_values_without_a_path_list(monkeypatch, gate):
    field = random_field([5, 11, 8, 5], 0.7, gate=gate, seed=7)
    listed = plan(field)
    monkeypatch.setattr(divergence, "PATH_LIMIT", 10)
    monkeypatch.setattr(divergence, "BLOCK_ELEMENTS", 30)  # several blocks, several rows in each
    direct = plan(field)
    matrix = direct.form.matrix
    assert matrix.direct is not None and matrix.entry is None and listed.form.matrix.direct is None
    output_gate = field.layers[-1].gate.at(T) if gate else None
    assert torch.equal(matrix.pattern.col, listed.form.matrix.pattern.col)
    assert_close(matrix.values(field, output_gate), listed.form.matrix.values(field, output_gate))
    assert_close(*traces(field, direct, state(field)))
    with pytest.raises(ValueError, match="too many paths"):
        matrix.path_constants(field)


def test_blocks_do_not_change_the_plan(monkeypatch):
    field = random_field([5, 20, 24, 18, 5], 0.15, seed=8)
    whole = plan(field)
    monkeypatch.setattr(divergence, "BLOCK_ELEMENTS", 50)
    cut = plan(field)
    assert isinstance(whole.form, PathsForm) and isinstance(cut.form, PathsForm) and whole.costs == cut.costs
    for name in ("i", "k"):
        assert torch.equal(getattr(whole.form, name), getattr(cut.form, name))
    assert torch.equal(whole.form.products.col, cut.form.products.col)
    assert torch.equal(whole.form.coefficient.entry, cut.form.coefficient.entry)
    for (_, one), (_, other) in zip(whole.form.factors, cut.form.factors):
        assert torch.equal(one, other)


def test_too_many_paths_for_three_hidden_layers_gives_columns(monkeypatch):
    field = random_field([6, 40, 40, 40, 6], 0.05)
    monkeypatch.setattr(divergence, "PATH_LIMIT", 10)
    assert isinstance(plan(field).form, ColumnsForm)


def test_the_plan_reads_no_values():
    field = random_field(SIZES[3], 0.4, seed=9)
    zeroed = field.map_tensors(torch.zeros_like)
    one, other = plan(field), plan(zeroed)
    assert one.costs == other.costs and type(one.form) is type(other.form)


@pytest.mark.parametrize("depth", [0, 1, 2, 3, 4])
def test_gradients_of_the_trace_reach_every_tensor(depth):
    def gradients(trace):
        field = random_field(SIZES[depth], 0.5, gate=True, shift=True, seed=10)
        field = field.map_tensors(lambda tensor: tensor.requires_grad_())
        tensors = [tensor for _, tensor in field.tensors()]
        grads = torch.autograd.grad(trace(field).sum(), tensors, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(tensors, grads)]

    mine = gradients(lambda field: traces(field, plan(field), state(field))[0])
    autograd = gradients(lambda field: traces(field, plan(field), state(field))[1])
    for got, want in zip(mine, autograd):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_big_dense_masks_are_planned_without_their_paths():
    """MINIBOONE's dense field closes 31.8 million paths; the plan must not list them, nor BSDS300's columns."""
    sizes = [43, 860, 860, 43]
    layers = [
        Layer(Pattern.from_mask(torch.ones(out, into, dtype=torch.bool)), torch.zeros(out * into), torch.zeros(out))
        for into, out in zip(sizes, sizes[1:])
    ]
    chosen = plan(VectorField(layers))
    assert chosen.costs["pairs"] == 860 * 860 and "31802800 paths" in chosen.reason
    assert chosen.form.matrix.factors is None


@pytest.fixture
def one_by_one(monkeypatch):
    """Columns are never laid out side by side, and paths never listed: as in a field too wide for either."""
    for name in ("STACKED_ENTRIES", "MOST_STACKED_ENTRIES", "PATH_LIMIT"):
        monkeypatch.setattr(divergence, name, 0)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("density", [0.2, 1.0])
@pytest.mark.parametrize("depth", [3, 4, 5])
def test_columns_one_by_one_are_the_trace(depth, density, gate, one_by_one):
    field = random_field(SIZES[depth], density, gate=gate, shift=gate, seed=depth)
    chosen = plan(field)
    assert chosen.form.whole or not chosen.form.columns
    assert "one by one" in chosen.reason or not chosen.form.columns
    assert_close(*traces(field, chosen, state(field)))


@pytest.mark.parametrize("layer", ["ignore", "concatsquash"])
@pytest.mark.parametrize("depth, keep", [(2, 1.0), (3, 1.0), (3, 0.4), (4, 0.6)])
def test_columns_one_by_one_run_and_go_back_as_the_reference(depth, keep, layer, one_by_one):
    torch.manual_seed(depth)
    module = mlp_field(4, (9, 7, 8, 6)[:depth], layer, "softplus").double()
    if keep < 1:
        sfk.prune_weights_(module, keep, of="weights")
    start = torch.randn(5, 4, dtype=torch.float64)
    found = []
    for engine in ("reference", "cpu"):
        field = sfk.compile(module, engine=engine)
        x, l = start.clone().requires_grad_(), torch.zeros(5, dtype=torch.float64)
        t = torch.linspace(0, 1, 3, dtype=torch.float64)
        xs, ls = sfk.odeint(sfk.with_divergence(field), (x, l), t, method="rk4")
        (xs[-1].sin().sum() + ls.square().sum()).backward()
        found.append([xs.detach(), ls.detach(), x.grad, *(p.grad for p in field.parameters() if p.requires_grad)])
    assert native_reason(field, start) is None  # not by way of the reference engine
    for got, want in zip(*found):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-11)


def native_reason(field, x):
    engine = field._packing.engine("exact", list(field.parameters()), lambda: field.vector_field)
    assert engine.name == "cpu"
    return engine.no_gradient(("x", "tensors"))


def test_a_wide_dense_field_takes_little_more_memory_than_its_weights():
    """Laid out side by side, the 63 columns of this field have 5 million weights and take half a gigabyte."""
    program = """
import resource, torch, sparseflow_kernels as sfk
from sparseflow_kernels.flows import mlp_field
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
field = sfk.compile(mlp_field(63, (200, 200, 200), "concatsquash", "softplus"), engine="cpu")
x = torch.randn(4, 63, requires_grad=True)
field(torch.tensor(0.3), x).sum().backward()
before = peak()
dx, dl = sfk.with_divergence(field)(torch.tensor(0.3), (x, torch.zeros(4)))
dl.sum().backward()
print(peak() - before)
"""
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, env=isolated_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) < 100


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("depth", SIZES)
def test_plans_do_not_depend_on_the_default_dtype(depth, dtype):
    field = random_field(SIZES[depth], 0.6, gate=True, shift=True, seed=depth)
    want = plan(field)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        got = plan(field)
        engine = CpuEngine(field, got)
        value, trace = engine.evaluate_with_divergence(0.37, state(field))
    finally:
        torch.set_default_dtype(before)
    assert (got.costs, got.reason) == (want.costs, want.reason)
    assert value.dtype == trace.dtype == torch.float64
    assert_close(trace, traces(field, want, state(field))[1])


def test_errors():
    field = random_field(SIZES[2])
    with pytest.raises(ValueError, match="kind"):
        plan(field, "rademacher")
    with pytest.raises(ValueError, match="noise"):
        evaluate(plan(field, "hutchinson"), field, T, slopes_of(field, T, state(field)))


# --------------------------------------------------------------------------------------------------- activation table


def second_derivative(activation, z):
    rule, params = activations.rule_and_params(activation)
    return rule.second(z, *params)


@pytest.mark.parametrize("name", list(activations.ACTIVATIONS))
def test_activation_derivatives_against_autograd(name):
    for params in {"softplus": [(), (2.0, 3.0)], "elu": [(), (0.7,)]}.get(name, [()]):
        activation = Activation(name, params)
        z = torch.linspace(-30, 30.7, 601, dtype=torch.float64, requires_grad=True)
        first = torch.autograd.grad(activations.apply(activation, z).sum(), z, create_graph=True)[0]
        assert_close(activations.derivative(activation, z), first)
        if first.requires_grad:
            second = torch.autograd.grad(first.sum(), z)[0]
        else:
            second = torch.zeros_like(z)
        assert_close(second_derivative(activation, z), second)
        (through,) = torch.autograd.grad(activations.derivative(activation, z).sum(), z, allow_unused=True,
                                         materialize_grads=True) if name not in ("identity", "relu") else (second,)
        assert_close(through, second)


@pytest.mark.parametrize("name", ["sigmoid", "softplus", "silu", "elu"])
def test_activation_derivatives_keep_float32_accuracy_in_the_tails(name):
    activation = Activation(name)
    z = torch.linspace(-40, -0.5, 400)
    for function in (activations.derivative, second_derivative):
        wide = function(activation, z.double())
        error = ((function(activation, z).double() - wide).abs() / wide.abs()).median()
        assert error < 1e-6


def test_activation_numbers_are_fixed_and_unknown_names_refused():
    assert [rule.number for rule in activations.ACTIVATIONS.values()] == list(range(11))
    with pytest.raises(ValueError, match="mish"):
        activations.apply(Activation("mish"), torch.zeros(1))
    with pytest.raises(ValueError, match="2 parameters"):
        activations.derivative(Activation("softplus", (1.0,)), torch.zeros(1))
