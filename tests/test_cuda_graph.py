"""Fields that are graphs on the CUDA engine, against the reference engine: instructions, values, solves, gradients,
divergences; on a GPU or over the host shim (cuda_cases.py)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sparseflow_kernels as sfk
import torch
from cuda_cases import DEVICE, F32, F64, NATIVE, close, engine_on, poison, same_bits  # noqa: F401  poison: for every test
from graph_fields import FIELDS, Against, graph_of, made, second_order
from random_graphs import random_graph
from sparseflow_kernels.engines.base import SolveRequest
from sparseflow_kernels.engines.graph_cuda import GraphCudaEngine
from sparseflow_kernels.field import Graph, GraphField
from sparseflow_kernels.numerics.step_control import StepOptions
from sparseflow_kernels.numerics.tableaus import METHODS
from test_compiled_graph import Net
from test_native_graph import BINARY, UNARY, assert_close, special

Engine = engine_on(GraphCudaEngine)
CASE = Against(Engine, DEVICE, close)


def field_over(dim, output, dtype=F64):
    """output(graph, state, time): the node of the derivative."""
    g = Graph()
    state, time, _ = GraphField.inputs(g, dim)
    return GraphField(g, state, time, None, output(g, state, time), [], DEVICE, dtype)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", [name for name in UNARY if name != "copy"])
def test_instructions_of_one_number(name, dtype):
    _, function, *ulps = UNARY[name]
    x = special(dtype)
    engine = Engine(field_over(1, lambda g, state, time: g.apply(name, state), dtype))
    exact = function(x.double()) if dtype == F32 else None
    assert_close(engine.evaluate(0.0, x[:, None].to(DEVICE))[:, 0].cpu(), function(x), ulps[dtype == F64], name, exact)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", BINARY)
def test_instructions_of_two_numbers(name, dtype):
    _, function, ulps = BINARY[name]
    some = special(dtype)[:60]
    x = torch.cartesian_prod(some, some)
    row = lambda g, state, n: g.select(state, torch.tensor([n]))
    made_of = lambda g, state, time: g.concatenate([g.apply(name, row(g, state, 0), row(g, state, 1)), row(g, state, 0)])
    found = Engine(field_over(2, made_of, dtype)).evaluate(0.0, x.to(DEVICE)).cpu()
    assert_close(found[:, 0], function(x[:, 0].contiguous(), x[:, 1].contiguous()), ulps, name)


@pytest.mark.parametrize("seed", range(12))
def test_random_graphs(seed):
    field = random_graph(seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(7, field.dim, generator=generator, dtype=F64)
    context = None if field.context is None else torch.randn(7, field.context.rows, generator=generator, dtype=F64)
    for kind in (None, "exact", "hutchinson"):
        CASE.evaluations(field, x, context, kind, (0.375, torch.linspace(-1, 1, 7, dtype=F64)))


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("kind", [None, "exact", "hutchinson"])
def test_evaluations(name, kind):
    field, x, context = graph_of(FIELDS[name])
    CASE.evaluations(field, x, context, kind)


@pytest.mark.parametrize("name", ["residual", "conditional"])
def test_single_precision(name):
    field, x, context = graph_of(FIELDS[name], F32)
    CASE.evaluations(field, x, context, "hutchinson", bound=3e-5)
    CASE.solves(field, x, context, None, "midpoint", bound=1e-4)


@pytest.mark.parametrize("name,kind,method", [
    ("residual", None, "dopri5"), ("residual", "hutchinson", "midpoint"), ("gru", "exact", "rk4"),
    ("conditional", "hutchinson", "dopri5"), ("conditional", None, "rk4"), ("gru", None, "dopri5"),
    ("hamiltonian", None, "bosh3"), ("points", "exact", "dopri5"), ("mixed", "exact", "dopri5"),
])  # fmt: skip
def test_solves(name, kind, method):
    field, x, context = graph_of(FIELDS[name])
    CASE.solves(field, x, context, kind, method)
    CASE.solves(field, x, context, kind, method, sign=-1, options=StepOptions(), gradient=False)


def test_a_tuple_state_has_a_norm_for_each_part():
    module, y0 = made(second_order)
    field = sfk.compile(module, "reference", like=y0)
    x = field.layout.flatten(y0)
    for tolerances in (dict(rtol=(1e-2, 1e-5), atol=(1e-3, 1e-6)), dict(rtol=(1e-3,), atol=(1e-4,))):
        for options in (StepOptions(first_step=0.1), StepOptions()):
            CASE.solves(field.vector_field, x, None, parts=(2, 2), options=options, times=(0.0, 0.4, 1.0), **tolerances)
    two = engine_on(GraphCudaEngine, multiprocessors=1)
    Against(two, DEVICE, close).solves(field.vector_field, x.repeat(40, 1), None, parts=(2, 2), rtol=(1e-2, 1e-5), atol=(1e-3, 1e-6))


def test_batches_of_several_tiles():
    field, _, _ = graph_of(FIELDS["conditional"])
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=F64)
    x, context = normal(150, 2), normal(150, field.context.rows)
    Against(engine_on(GraphCudaEngine, multiprocessors=1), DEVICE, close).solves(field, x, context, "hutchinson")
    CASE.evaluations(field, x, context, "exact")


def test_tiles_and_samples_step_on_their_own():
    field, x, context = graph_of(FIELDS["conditional"])
    own, reference = CASE.engines(field, "exact")
    assert "one launch" in own.describe(100)[0]
    times = torch.tensor([0.0, 0.5], dtype=F64)
    for control in ("per_tile", "per_sample"):
        request = SolveRequest(
            x=x.to(DEVICE), l=x.new_zeros(len(x)).to(DEVICE), times=times, sign=1, tableau=METHODS["dopri5"],
            rtol=(1e-7, 1e-7), atol=(1e-7, 1e-7),
            options=StepOptions(), context=context.to(DEVICE), step_control=control,
        )  # fmt: skip
        found = own.solve(request)
        assert found.status == "ok"
        wanted = reference.solve(replace(request, step_control="shared"))
        close(found.xs, wanted.xs, 1e-5)
        close(found.ls, wanted.ls, 1e-5)


def test_more_numbers_at_once_than_a_thread_has_registers():
    def output(g, state, time):
        waves = [g.apply("sin", g.scaled(state, 0.1 * n)) for n in range(40)]
        total = None
        for wave in waves:
            total = g.add(total, wave)
        out = None
        for wave in waves:
            out = g.add(out, g.mul(wave, g.apply("tanh", total)))
        return out

    field = field_over(2, output)
    assert NATIVE.REGISTERS < 40
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    for kind in (None, "exact"):
        CASE.evaluations(field, x, None, kind)


def test_samples_beyond_the_batch_do_not_reach_the_gradients():
    """The slopes of a root are infinite at zero, which is what memory behind the batch could hold."""
    field, x, context = graph_of(lambda: (Root(), (5, 3)))
    CASE.evaluations(field, x.abs() + 0.1, context, None)
    CASE.solves(field, x.abs() + 0.5, context, None, "rk4")


class Root(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(3, 3)

    def forward(self, t, y):
        return self.a(torch.sqrt(y)) * 0.1 - y * torch.log(y) * 0.1


def test_new_values_are_taken_over():
    field, x, context = graph_of(FIELDS["conditional"])
    own, _ = CASE.engines(field, "hutchinson")
    noise = torch.ones_like(x)
    own.evaluate_backward(0.2, x.to(DEVICE), noise.to(DEVICE), x.to(DEVICE), None, {"tensors"}, context=context.to(DEVICE))
    changed = field.map_tensors(lambda tensor: (0.9 * tensor + 0.05).to(DEVICE))
    assert own.update(changed)
    fresh = Engine(changed, own.plan)
    given = 0.2, x.to(DEVICE), noise.to(DEVICE), context.to(DEVICE)
    same_bits(own.evaluate_with_divergence(*given), fresh.evaluate_with_divergence(*given))
    grads = [
        one.evaluate_backward(*given[:3], x.to(DEVICE), None, {"tensors"}, context=given[3]).tensors for one in (own, fresh)
    ]
    same_bits(*grads)


def test_what_it_cannot_run_is_refused_by_name():
    y0 = tuple(torch.randn(2, 1, dtype=F64) for _ in range(NATIVE.COMPONENTS))
    many = sfk.compile(Net(lambda s, t, y: y), "reference", like=y0).vector_field
    assert "norms" in Engine.unsupported(many.map_tensors(lambda tensor: tensor.to(DEVICE)))
    field = random_graph(0)
    g = field.graph
    g.origin = "model.py:12 of Net"
    field.output = g.mul(field.output, g.time_function(lambda t: torch.sin(t).reshape(1), 1))
    assert Engine.unsupported(graph_of(FIELDS["lookup"])[0].map_tensors(lambda t: t.to(DEVICE))) is None  # all of it is nodes
    assert "model.py:12 of Net is a function of time in Python" in Engine.unsupported(field.map_tensors(lambda t: t.to(DEVICE)))
    wide = field_over(70_000, lambda g, state, time: g.apply("sin", state))
    assert "65535" in Engine.unsupported(wide)
    lacking, x, context = graph_of(FIELDS["conditional"])
    own, _ = CASE.engines(lacking)
    with pytest.raises(ValueError, match="context"):
        own.evaluate(0.0, x.to(DEVICE), None)
