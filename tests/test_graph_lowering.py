"""What graphs are lowered to, run in torch: the programs, told apart from the kernels that run them."""

from __future__ import annotations

import interpreted_program
import pytest
import torch
from random_graphs import random_graph
from sparseflow_kernels import divergence
from sparseflow_kernels.engines import graph_cpu, reference_engine
from sparseflow_kernels.engines.ahead import sums_of
from sparseflow_kernels.engines.graph_cpu import GraphCpuEngine
from sparseflow_kernels.engines.program import Store
from sparseflow_kernels.field import Activation, Graph, GraphField, Matrix, Part, Pattern
from sparseflow_kernels.field.graph import CONTEXT

WANTED = ("x", "tensors", "context", "noise", "t")


class _Interpreted:
    BuilderF64 = BuilderF32 = interpreted_program.Builder
    MOST_ROWS = MOST_ENTRIES = 1 << 30


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(graph_cpu, "_native", lambda: _Interpreted)


def assert_same(found, wanted):
    if wanted is None:
        wanted = torch.zeros_like(found)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [None, "exact", "hutchinson"])
@pytest.mark.parametrize("seed", range(40))
def test_programs_of_random_graphs(seed, kind):
    field, n = random_graph(seed), 4
    torch.manual_seed(seed)
    x, noise = torch.randn(n, field.dim).double(), torch.randn(n, field.dim).double()
    context = None if field.context is None else torch.randn(n, field.context.rows).double()
    plan = None if kind is None else divergence.plan(field, kind)
    noise = noise if kind == "hutchinson" else None
    grad_f, grad_trace = torch.randn(n, field.dim).double(), torch.randn(n).double() if kind else None
    reference, engine = reference_engine(field, plan), GraphCpuEngine(field, plan)
    for times in (torch.tensor(0.3, dtype=torch.float64), torch.rand(n).double()):
        # What a solve runs, where the context is computed beforehand; and what an evaluation runs, where it is in the state.
        inputs = [field.time] if times.dim() else []
        joint = [*inputs, *([field.context] if context is not None else []), *([noise_node(field)] if noise is not None else [])]
        for more in (inputs, joint) if joint != inputs else (inputs,):
            named = {"time": times[:, None] if times.dim() else None, "context": context, "noise": noise}
            point = torch.cat((x, *(named[node.name] for node in more)), 1)
            program = engine._program(False, tuple(more))
            t = 0.0 if times.dim() else float(times)
            f, trace = program.native.call(t, point, engine._context(program, context, noise, n))
            if kind is None:
                assert_same(f, reference.evaluate(times, x, context))
            else:
                wanted = reference.evaluate_with_divergence(times, x, noise, context)
                assert_same(f, wanted[0])
                assert_same(trace, wanted[1])
            adjoint = engine._program(True, tuple(more))
            rows = engine._context(adjoint, context, noise, n)
            pulled, of_rows, raw = adjoint.native.back(t, point, grad_f, grad_trace, rows)
            found, of_time = engine._gradient(adjoint, sums_of(adjoint.writer, raw), context, noise, of_rows, WANTED)
            wanted = reference.evaluate_backward(times, x, noise, grad_f, grad_trace, WANTED, context=context)
            of_x, *others = pulled.split([field.dim, *(node.rows for node in more)], 1)
            others = dict(zip((node.name for node in more), others))
            assert_same(of_x, wanted.x)
            assert_same(others["time"][:, 0] if times.dim() else torch.tensor(of_time, dtype=torch.float64), wanted.t)
            for one, other in zip(found.tensors, wanted.tensors):
                assert_same(one, other)
            for name in ("context", "noise"):
                if named[name] is not None:
                    assert_same(others.get(name, getattr(found, name)), getattr(wanted, name))
            lean = engine._program(True, tuple(more), (field.state, *more))  # of the parameters alone
            pulled, of_rows, raw = lean.native.back(t, point, grad_f, grad_trace, engine._context(lean, context, noise, n))
            assert not pulled.any() and len(lean.native.b.lists["reverse"]) <= len(adjoint.native.b.lists["reverse"]) + 1
            found, _ = engine._gradient(lean, sums_of(lean.writer, raw), context, noise, of_rows, WANTED)
            for one, other in zip(found.tensors, wanted.tensors):
                assert_same(one, other)


def noise_node(field):
    return field.graph.input("noise", field.dim, CONTEXT)


def lists(field, kind=None):
    engine = GraphCpuEngine(field, None if kind is None else divergence.plan(field, kind))
    return engine._program(False).native.b.lists["body"], engine


def layer(g, parts, x, rows, activation=None):
    pattern = Pattern.from_mask(torch.ones(rows, x.rows, dtype=torch.bool))
    parts.append(Part(torch.randn(pattern.nnz).double(), pattern))
    product = g.linear(Matrix(pattern, len(parts) - 1), x)
    parts.append(Part(torch.randn(rows).double()))
    z = g.add(product, g.vector(len(parts) - 1, rows))
    return z if activation is None else g.activation(Activation(activation), z)


def chain(activation):
    """3-8-8-3 as a graph."""
    g, parts = Graph(), []
    state, time, _ = GraphField.inputs(g, 3)
    out = layer(g, parts, layer(g, parts, layer(g, parts, state, 8, activation), 8, activation), 3)
    return GraphField(g, state, time, None, out, parts, torch.device("cpu"), torch.float64)


@pytest.mark.parametrize("activation", ["tanh", "silu", "softplus", "elu", "relu", "sin", "cube"])
def test_a_chain_is_one_fused_operation_a_layer(activation):
    field = chain(activation)
    body, _ = lists(field)
    assert [op[0] for op in body] == ["affine"] * 3
    body, engine = lists(field, "hutchinson")
    assert [op[8] for op in body if op[0] == "affine"] == [Store.SEED, Store.TANGENT, Store.VALUE]
    assert "product" not in [op[0] for op in body]
    streams = [op for op in engine._program(True).native.b.lists["reverse"] if op[0] in ("affine", "product")]
    # z_1; z_2 and its tangent, over one stream unless the slope lies beside the value already; the cotangents of the tangent,
    # of h_2 and h_1, and the state's
    assert len(streams) == (7 if activation in ("tanh", "relu", "sin") else 6)


@pytest.mark.parametrize("activation", ["tanh", "silu", "softplus", "elu", "relu", "sin", "cube"])
def test_the_backward_pass_of_a_chain_is_its_layers_and_what_they_pull(activation):
    field = chain(activation)
    _, engine = lists(field)
    ops = engine._program(True).native.b.lists["reverse"]
    assert [op[0] for op in ops if op[0] in ("affine", "product")] == ["affine"] * 2 + ["product"] * 3
    assert [op[0] for op in ops if op[0] == "pointwise"] == ["pointwise"]  # the state's cotangent into its place
    slopes = [op[3][0] for op in ops if op[0] == "affine"]  # kept beside the values, and multiplied on the way back
    assert [op[4][:2] for op in ops if op[0] == "product"] == [(slopes[1], 1), (slopes[0], 1), (-1, 0)]


def test_what_depends_on_time_or_context_alone_is_computed_outside():
    g, parts = Graph(), []
    state, time, context = GraphField.inputs(g, 3, 4)
    features = g.concatenate([g.apply("sin", time), g.apply("cos", time)])
    h = layer(g, parts, g.concatenate([state, context, features]), 16, "silu")
    out = layer(g, parts, h, 3)
    field = GraphField(g, state, time, context, out, parts, torch.device("cpu"), torch.float64)
    body, engine = lists(field)
    writer = engine._program(False).writer
    assert [op[0] for op in body] == ["product", "pointwise", "affine"]
    assert [node.rows for node in writer.contexts] == [16] and [node.rows for node in writer.timed] == [16]


def test_slices_and_concatenations_move_nothing():
    g, parts = Graph(), []
    state, time, _ = GraphField.inputs(g, 6)
    x, v = g.select(state, torch.arange(3)), g.select(state, torch.arange(3, 6))
    force = layer(g, parts, layer(g, parts, x, 8, "tanh"), 3)
    out = g.concatenate([v, force])
    field = GraphField(g, state, time, None, out, parts, torch.device("cpu"), torch.float64)
    body, _ = lists(field)
    assert [op[0] for op in body] == ["affine", "affine", "pointwise"]  # the last one copies v into its place


def norm(g, parts, x):
    """LayerNorm with its two vectors."""
    centred = g.sub(x, g.scaled(g.total(x), 1.0 / x.rows))
    variance = g.scaled(g.total(g.square(centred)), 1.0 / x.rows)
    parts += [Part(torch.randn(x.rows).double()), Part(torch.randn(x.rows).double())]
    scaled = g.mul(g.mul(centred, g.apply("rsqrt", g.add(variance, g.number(1e-5)))), g.vector(len(parts) - 2, x.rows))
    return g.add(scaled, g.vector(len(parts) - 1, x.rows))


@pytest.mark.parametrize("kind", [None, "hutchinson"])
def test_sums_of_rows_are_taken_along_by_pointwise_operations(kind):
    g, parts = Graph(), []
    state, time, _ = GraphField.inputs(g, 6)
    out = layer(g, parts, layer(g, parts, norm(g, parts, state), 8, "tanh"), 6)
    field = GraphField(g, state, time, None, out, parts, torch.device("cpu"), torch.float64)
    body, engine = lists(field, kind)
    for program, name in ((engine._program(False), "body"), (engine._program(True), "reverse")):
        b = program.native.b
        totals = [total for op in b.lists[name] if op[0] == "pointwise" for total in op[6]]
        assert len(totals) >= (3 if kind and name == "body" else 2)  # mean, variance, and the tangent of this one
        sizes = [b.matrices[op[1]]["shape"] for op in b.lists[name] if op[0] in ("affine", "product")]
        assert (1, 6) not in sizes


@pytest.mark.parametrize("native", [False, True])
def test_layers_read_by_one_matrix_do_not_share_a_buffer(native, monkeypatch):
    if native:
        monkeypatch.setattr(graph_cpu, "_native", lambda: pytest.importorskip("sparseflow_kernels._cpu"))
    g, parts = Graph(), []
    state, time, _ = GraphField.inputs(g, 3)
    left, right = (layer(g, parts, state, 8, "tanh") for _ in range(2))
    pattern = Pattern.from_mask(torch.ones(8, 8, dtype=torch.bool))
    parts += [Part(torch.randn(64).double(), pattern), Part(torch.randn(8).double())]
    shared = Matrix(pattern, len(parts) - 2)
    z = g.add(g.linear(shared, left), g.vector(len(parts) - 1, 8))
    out = layer(g, parts, g.mul(g.apply("exp", g.neg(g.square(z))), g.apply("sin", g.linear(shared, right))), 3)
    field = GraphField(g, state, time, None, out, parts, torch.device("cpu"), torch.float64)
    x = torch.randn(4, 3).double()
    program = GraphCpuEngine(field)._program(False)
    found = GraphCpuEngine(field).evaluate(0.0, x) if native else program.native.call(0.0, x)[0]
    assert_same(found, reference_engine(field).evaluate(torch.tensor(0.0).double(), x))
