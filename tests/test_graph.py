"""Graphs: what nodes mean, and that their tangents and adjoints are derivatives."""

from __future__ import annotations

import math

import pytest
import torch
from random_graphs import random_graph
from sparseflow_kernels import divergence
from sparseflow_kernels.divergence_graph import colour, structure
from sparseflow_kernels.engines import reference_engine
from sparseflow_kernels.field import Activation, Graph, GraphField, Layout, Matrix, Part, Pattern
from sparseflow_kernels.field.graph import CONTEXT, STATE, TIME, evaluate, order
from sparseflow_kernels.field.primitives import PRIMITIVES
from sparseflow_kernels.field.transforms import adjoint, tangent


def run(outputs, state, **more):
    return evaluate(outputs, {"state": state, **more}, lambda n: None)


@pytest.mark.parametrize("name", sorted(PRIMITIVES))
def test_partial_derivatives_of_primitives_are_those_of_autograd(name):
    g = Graph()
    arity = PRIMITIVES[name].arity
    inputs = [g.input(f"x{i}", 5, STATE) for i in range(arity)]
    node = g.apply(name, *inputs)
    x = [torch.tensor(v, dtype=torch.float64) for v in ([[0.3, 0.9, 0.2, 0.51, 0.77]], [[0.5, 0.31, 0.8, 0.51, 1.2]], [[0.7, 0.1, 0.4, 0.6, 0.2]])]
    x = [value.requires_grad_() for value in x[:arity]]
    env = {f"x{i}": value for i, value in enumerate(x)}
    (value,) = evaluate([node], env, lambda n: None)
    if value.requires_grad:
        wanted = torch.autograd.grad(value.sum(), x, allow_unused=True)
    else:
        wanted = [None] * arity
    for slope, grad in zip(PRIMITIVES[name].partials(g, node, inputs), wanted):
        found = torch.zeros(1, 5) if slope is None else evaluate([slope], env, lambda n: None)[0].expand(1, 5)
        torch.testing.assert_close(found.double(), torch.zeros(1, 5).double() if grad is None else grad)


@pytest.mark.parametrize("seed", range(40))
def test_tangent_and_adjoint_of_random_graphs_agree_with_autograd(seed):
    field = random_graph(seed)
    g, n = field.graph, 4
    torch.manual_seed(seed)
    probe, bar, lam = g.input("probe", field.dim, CONTEXT), g.input("bar", field.dim, STATE), g.input("lam", 1, STATE)
    (dot,) = tangent(g, [field.output], {field.state: probe})
    given = {field.output: bar}
    if dot is not None:
        trace = g.total(g.mul(probe, dot))
        given[trace] = lam
    found = adjoint(g, given, lambda node: node.kind in ("input", "vector", "number", "constant"))
    env = {"state": torch.randn(n, field.dim), "time": torch.tensor([[0.3]]), "probe": torch.randn(n, field.dim),
           "bar": torch.randn(n, field.dim), "lam": torch.randn(n, 1)}
    if field.context is not None:
        env["context"] = torch.randn(n, field.context.rows)
    env = {name: value.double().requires_grad_() for name, value in env.items()}
    parts = [part.values.clone().requires_grad_() for part in field.parts]
    run = lambda nodes: evaluate(nodes, env, lambda number: parts[number])
    (f,) = run([field.output])
    f = f.expand(n, field.dim)
    loss = (f * env["bar"]).sum()
    if dot is not None:
        (product,) = run([dot])
        of = lambda x: evaluate([field.output], {**env, "state": x}, lambda number: parts[number])[0].expand(n, field.dim)
        _, wanted = torch.func.jvp(of, (env["state"],), (env["probe"],))
        torch.testing.assert_close(product.expand(n, field.dim), wanted)
        loss = loss + (env["lam"] * (env["probe"] * wanted).sum(1, keepdim=True)).sum()
    grads = torch.autograd.grad(loss, [env["state"], *parts], allow_unused=True)
    pulled = found.cotangents.get(field.state)
    pulled = torch.zeros(n, field.dim).double() if pulled is None else run([pulled])[0].expand(n, field.dim)
    torch.testing.assert_close(pulled, torch.zeros_like(pulled) if grads[0] is None else grads[0])
    totals = [torch.zeros_like(part) for part in parts]
    for matrix, pairs in found.matrices.items():
        for left, right in pairs:
            a, b = (value.expand(n, value.shape[1]) for value in run([left, right]))
            grad = (a[:, matrix.pattern.row] * b[:, matrix.pattern.col]).sum(0)
            entries = torch.arange(len(grad)) if matrix.entries is None else matrix.entries
            totals[matrix.part] = totals[matrix.part].index_add(0, entries, grad)
    for node, cotangent in found.cotangents.items():
        if node.kind == "vector":
            totals[node.part] = totals[node.part] + run([cotangent])[0].expand(n, node.rows).sum(0)
    for total, grad in zip(totals, grads[1:]):
        torch.testing.assert_close(total, torch.zeros_like(total) if grad is None else grad)


@pytest.mark.parametrize("seed", range(40, 60))
@pytest.mark.parametrize("kind", ["exact", "hutchinson"])
def test_the_trace_node_is_the_trace(seed, kind):
    field = random_graph(seed)
    plan = divergence.plan(field, kind)
    engine = reference_engine(field, plan)
    torch.manual_seed(seed)
    n = 3
    x, noise = torch.randn(n, field.dim).double(), torch.randn(n, field.dim).double()
    context = None if field.context is None else torch.randn(n, field.context.rows).double()
    given = noise if kind == "hutchinson" else None
    f, trace = engine.evaluate_with_divergence(0.3, x, given, context)
    row = lambda i: lambda s: engine.evaluate(0.3, s[None], None if context is None else context[i : i + 1])[0]
    jacobian = torch.stack([torch.autograd.functional.jacobian(row(i), x[i]) for i in range(n)])
    wanted = jacobian.diagonal(dim1=1, dim2=2).sum(1)
    if kind == "hutchinson":
        wanted = torch.einsum("bi,bij,bj->b", noise, jacobian, noise)
    torch.testing.assert_close(trace, wanted)
    env = {"state": x, "time": torch.tensor([[0.3]], dtype=torch.float64), "noise": noise, "context": context}
    env = {name: value for name, value in env.items() if value is not None}
    (value,) = evaluate([plan.form.trace], env, lambda number: field.parts[number].values)
    torch.testing.assert_close(value.expand(n, 1)[:, 0], wanted)


def test_columns_that_do_not_reach_each_others_rows_share_a_colour():
    jacobian = torch.eye(6, dtype=torch.bool)
    for i in range(5):
        jacobian[i, i + 1] = jacobian[i + 1, i] = True
    groups = colour(jacobian)
    assert [group.tolist() for group in groups] == [[0, 2, 4], [1, 3, 5]]
    jacobian[2, 2] = False
    assert sorted(sum((group.tolist() for group in colour(jacobian)), [])) == [0, 1, 3, 4, 5]


def shifted(g, x, by):
    return g.select(x, (torch.arange(x.rows) + by) % x.rows)


def test_a_local_field_needs_as_many_colours_as_it_looks_far():
    dim = 30
    g = Graph()
    state, time, _ = GraphField.inputs(g, dim)
    h = g.apply("tanh", state)
    h = g.apply("sin", g.add(h, shifted(g, h, 1)))
    out = g.apply("tanh", g.mul(h, shifted(g, h, -1)))
    field = GraphField(g, state, time, None, out, [], torch.device("cpu"), torch.float64)
    assert structure(out, state).sum() == 3 * dim
    plan = divergence.plan(field, "exact")
    assert plan.form.colours == 2 and "2 colours" in plan.reason
    x = torch.randn(2, dim).double()
    _, trace = reference_engine(field, plan).evaluate_with_divergence(0.0, x)
    (value,) = evaluate([plan.form.trace], {"state": x}, lambda n: None)
    torch.testing.assert_close(value[:, 0], trace)


def test_sums_are_planned_term_by_term_and_chains_by_their_paths():
    dim, width = 6, 20
    g, parts = Graph(), []
    state, time, _ = GraphField.inputs(g, dim)

    def layer(x, rows, activation=None):
        pattern = Pattern.from_mask(torch.rand(rows, x.rows) < 0.4)
        parts.append(Part(torch.randn(pattern.nnz).double(), pattern))
        z = g.linear(Matrix(pattern, len(parts) - 1), x)
        return z if activation is None else g.activation(Activation(activation), z)

    net = layer(layer(layer(state, width, "tanh"), width, "silu"), dim)
    out = g.sub(g.add(net, layer(state, dim)), g.scaled(state, 0.3))
    field = GraphField(g, state, time, None, out, parts, torch.device("cpu"), torch.float64)
    plan = divergence.plan(field, "exact")
    assert plan.form.colours == 0 and plan.costs["exact"] <= parts[1].pattern.nnz
    assert plan.costs["exact"] < divergence.plan(field, "hutchinson").costs["hutchinson"] + width


def test_bindings_follow_from_what_a_node_reads():
    g = Graph()
    state, time, context = GraphField.inputs(g, 2, 3)
    matrix = Matrix(Pattern.from_mask(torch.ones(4, 7, dtype=torch.bool)), 0)
    product = g.linear(matrix, g.concatenate([state, context, g.apply("sin", time), g.apply("cos", time)]))
    kinds = sorted(node.binding for node in order([product]) if node.kind == "linear")
    assert kinds == [STATE, TIME, CONTEXT] or sorted(kinds) == sorted([STATE, TIME, CONTEXT])
    assert not g.apply("exp", time).per_sample and g.mul(g.apply("exp", time), g.total(context)).per_sample


def test_what_is_built_twice_is_there_once_and_zeros_go():
    g = Graph()
    state, time, _ = GraphField.inputs(g, 3)
    matrix = Matrix(Pattern.from_mask(torch.ones(2, 3, dtype=torch.bool)), 0)
    assert g.linear(matrix, state) is g.linear(matrix, state)
    assert g.add(state, g.zeros(3)) is state and g.mul(state, g.number(1.0)) is state
    assert g.linear(matrix, g.zeros(3)).kind == "constant"
    assert g.select(g.concatenate([state, g.square(state)]), torch.tensor([3, 4, 5])) is g.square(state)
    assert g.apply("exp", g.number(0.0)).value == 1.0


def test_a_thousand_deep_graph_needs_no_recursion():
    g = Graph()
    state, time, _ = GraphField.inputs(g, 2)
    node = state
    for _ in range(3000):
        node = g.add(g.apply("tanh", node), state)
    (dot,) = tangent(g, [node], {state: g.input("probe", 2, CONTEXT)})
    assert len(order([dot])) > 3000


def test_layouts_flatten_states_and_lay_them_out_again():
    layout = Layout(((2, 3), (4,)), is_tuple=True)
    state = torch.randn(5, 2, 3), torch.randn(5, 4)
    assert layout.dim == 10 and layout.fits(state) is None
    rows = layout.flatten(state)
    assert rows.shape == (5, 10)
    assert all(torch.equal(a, b) for a, b in zip(layout.unflatten(rows), state))
    assert layout.unflatten(rows[None].expand(7, 5, 10))[0].shape == (7, 5, 2, 3)
    assert "tuple of 2" in layout.fits(state[0]) and "not [5, 2, 4]" in layout.fits((torch.zeros(5, 2, 4), state[1]))
    assert "samples" in layout.fits((state[0][:4], state[1]))
    graph = Layout(((6, 2),), batched=False)
    assert graph.flatten(torch.zeros(6, 2)).shape == (1, 12) and graph.unflatten(torch.zeros(9, 1, 12)).shape == (9, 6, 2)


def test_activations_are_the_fused_ones():
    from sparseflow_kernels import activations

    g = Graph()
    z = g.input("state", 7, STATE)
    x = torch.tensor([[-40.0, -1.3, -1e-3, 0.0, 0.7, 19.0, 90.0]], dtype=torch.float64)
    for name, rule in activations.ACTIVATIONS.items():
        activation = Activation(name, rule.defaults)
        node = g.activation(activation, z)
        (value,) = run([node], x)
        torch.testing.assert_close(value, activations.apply(activation, x))
        (dot,) = tangent(g, [node], {z: g.number(1.0)})
        torch.testing.assert_close(run([dot], x)[0].expand(1, 7), activations.derivative(activation, x))
    assert math.isnan(float(run([g.activation(Activation("relu"), z)], x * math.nan)[0][0, 0]))


def test_a_graph_is_printed_node_by_node_and_not_path_by_path():
    g = Graph()
    state, time, _ = GraphField.inputs(g, 3)
    h = state
    for _ in range(60):  # 2 ** 60 paths
        h = g.add(g.apply("tanh", h), h)
    field = GraphField(g, state, time, None, h, [], torch.device("cpu"), torch.float64)
    lines = repr(field).splitlines()
    assert lines[1].endswith("<Node input [3] state>") and lines[3].endswith("<Node add [3]> 1, 0")
    assert lines[51] == "  ... 21 more" and len(lines) == 102
    assert repr(h) == "<Node add [3]>" and len(repr(field.__dict__)) < 1000
