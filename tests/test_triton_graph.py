"""Fields that are graphs on the triton engine, against the reference engine: instructions, values, solves, gradients,
divergences."""

from __future__ import annotations

import pytest
import sparseflow_kernels as sfk
import torch
from graph_fields import FIELDS, Against, graph_of, made, second_order
from random_graphs import random_graph
from test_compiled_graph import Net
from test_native_graph import BINARY, POW_NUMBER, UNARY, WHERE, assert_close, special
from triton_cases import DEVICE, F32, F64, INTERPRETED, close

from sparseflow_kernels.engines.triton import pointwise
from sparseflow_kernels.engines.triton.builder import Expression
from sparseflow_kernels.engines.triton.graph_engine import GraphTritonEngine
from sparseflow_kernels.engines.triton.launching import ceil_div, launch
from sparseflow_kernels.numerics.step_control import StepOptions

T = 0.375
# where csrc/cpu asks the C library, the arcs and powers here are made of several roundings
WIDER = {"tan": 4, "atan": 3, "asin": 5, "acos": 5, "sinh": 4, "cosh": 4, "atan2": 5, "div": 1, "exp": 2, "sigmoid": 5}


def elementwise(code, x):
    """An expression of the columns of x."""
    n, batch = x.shape[1], len(x)
    registers = max(line[1] for line in code) - n
    full = tuple((*line, *(0,) * (5 - len(line[:5])), 0.0)[:6] if len(line) < 6 else line for line in code)
    padded = ceil_div(batch, 16) * 16
    memory = torch.zeros(n + 1, padded, dtype=x.dtype, device=DEVICE)
    memory[:n, :batch] = x.T.to(DEVICE)
    kernel = pointwise.kernel_of(Expression(n, 0, 1, registers, full), (False,) * n, (), (False,))
    launch(kernel, ceil_div(padded, 512), memory, padded, 1, 1, None, *range(n), n, ROWS=1, BATCH=512)
    return memory[n, :batch].cpu()


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", UNARY)
def test_instructions_of_one_number(name, dtype):
    op, function, *ulps = UNARY[name]
    x = special(dtype)
    exact = function(x.double()) if dtype == F32 else None
    bound = max(ulps[dtype == F64], WIDER.get(name, 0))
    assert_close(elementwise([(op, 1, 0)], x[:, None]), function(x), bound, name, exact)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", BINARY)
def test_instructions_of_two_numbers(name, dtype):
    op, function, ulps = BINARY[name]
    some = special(dtype)[:60]
    x = torch.cartesian_prod(some, some)
    bound = 1500 if name == "pow" and dtype == F64 else max(ulps, WIDER.get(name, 0))  # pow: the logarithm's rounding, times it
    wanted = function(x[:, 0].contiguous(), x[:, 1].contiguous())
    assert_close(elementwise([(op, 2, 0, 1)], x), wanted, bound, name)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_powers_and_choices(dtype):
    x = special(dtype)
    for power in (0.5, -0.5, 1.0, 2.0, 3.0, -1.0, -2.0, 0.0, 1.5, 4.0, -0.7):
        found = elementwise([(POW_NUMBER, 1, 0, 0, 0, power)], x[:, None])
        assert_close(found, torch.pow(x, power), 3 if dtype == F32 or power not in (1.5, -0.7) else 1500, f"pow {power}")
    some = special(dtype)[25:37]
    x = torch.cartesian_prod(some, some, some)
    assert_close(elementwise([(WHERE, 3, 0, 1, 2)], x), torch.where(x[:, 0] != 0, x[:, 1], x[:, 2]), 0, "where")


CASE = Against(GraphTritonEngine, DEVICE, close)


@pytest.mark.parametrize("seed,kind", [(0, None), (1, "exact"), (2, "hutchinson")])
def test_random_graphs(seed, kind):
    field = random_graph(seed)
    x = torch.randn(5, field.dim, generator=torch.Generator().manual_seed(seed), dtype=F64)
    context = None if field.context is None else torch.randn(5, field.context.rows, generator=torch.Generator().manual_seed(1), dtype=F64)
    CASE.evaluations(field, x, context, kind, (T, torch.linspace(-1, 1, 5, dtype=F64)))


@pytest.mark.parametrize("name", FIELDS)
def test_evaluations(name):
    field, x, context = graph_of(FIELDS[name])
    kind = {"residual": "hutchinson", "gru": "exact", "mixed": "exact", "conditional": "hutchinson"}.get(name)
    CASE.evaluations(field, x, context, kind)


def test_single_precision():
    field, x, context = graph_of(FIELDS["conditional"], F32)
    CASE.evaluations(field, x, context, "hutchinson", bound=3e-5)


@pytest.mark.parametrize("name,kind,method", [
    ("residual", None, "midpoint"), ("gru", "exact", "midpoint"), ("conditional", "hutchinson", "dopri5"), ("lookup", None, "rk4"),
    ("hamiltonian", None, "bosh3"), ("points", None, "midpoint"),
])  # fmt: skip
def test_solves(name, kind, method):
    field, x, context = graph_of(FIELDS[name])
    CASE.solves(field, x, context, kind, method, times=(0.0, 0.07, 0.2))


def test_a_solve_backwards_chooses_its_first_step():
    field, x, context = graph_of(FIELDS["mixed"])
    CASE.solves(field, x, context, "exact", sign=-1, options=StepOptions(), gradient=False, times=(0.0, 0.1))


def test_a_tuple_state_has_a_norm_for_each_part():
    module, y0 = made(second_order)
    y0 = tuple(part.to(DEVICE) for part in y0)
    given = dict(method="dopri5", rtol=(1e-2, 1e-4), atol=(1e-3, 1e-5))
    times = torch.tensor([0.0, 0.5], dtype=F64)
    solutions = [sfk.solve(sfk.compile(module.to(DEVICE), engine, like=y0), y0, times, **given) for engine in ("triton", "reference")]
    own, reference = solutions
    assert own.stats.engine == "triton" and (own.stats.nfe, own.stats.accepted) == (reference.stats.nfe, reference.stats.accepted)
    for one, other in zip(own.ys, reference.ys):
        close(one, other, 1e-9)


def test_training_takes_over_new_values():
    module, y0 = made(FIELDS["gru"])
    module, y0 = module.to(DEVICE), y0.to(DEVICE)
    times = torch.tensor([0.0, 0.2], dtype=F64)
    found = []
    for engine in ("triton", "reference"):
        field = sfk.compile(module, engine)
        assert field.engine_name == engine and f"gradient: {engine}" in field.report()
        optimizer = torch.optim.SGD(field.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            loss = sfk.odeint(field, y0, times, method="midpoint")[-1].square().sum()
            loss.backward()
            optimizer.step()
        found.append(loss.detach())
    close(*found, 1e-9)


def test_a_function_of_time_in_python():
    field = random_graph(3)
    g = field.graph
    wave = g.time_function(lambda t: torch.stack([torch.sin(t)] * field.dim), field.dim)
    field.output = g.mul(g.add(field.output, wave), g.add(wave, g.apply("cos", field.time)))
    x = torch.randn(4, field.dim, generator=torch.Generator().manual_seed(0), dtype=F64)
    context = None if field.context is None else x.new_ones(4, field.context.rows)
    CASE.evaluations(field, x, context, None)
    CASE.solves(field, x, context, None, "midpoint", times=(0.0, 0.2))


def test_no_samples():
    field, x, context = graph_of(FIELDS["conditional"])
    own, _ = CASE.engines(field, "exact")
    none = x[:0].to(DEVICE)
    assert own.evaluate(T, none, context[:0].to(DEVICE)).shape == (0, 2)
    found = own.evaluate_backward(T, none, None, none, none[:, 0], {"x", "context", "tensors", "t"}, context=context[:0].to(DEVICE))
    assert found.x.shape == (0, 2) and found.context.shape == (0, context.shape[1]) and not any(bool(t.any()) for t in found.tensors)


@pytest.mark.skipif(not INTERPRETED, reason="a field on the CPU runs here in the interpreter alone")
def test_what_is_missing_is_said():
    field, x, context = graph_of(FIELDS["conditional"])
    own, _ = CASE.engines(field)
    with pytest.raises(ValueError, match="context"):
        own.evaluate(T, x, None)
    with pytest.raises(ValueError, match="per_sample"):
        CASE.solves(field, x, context, step_control="per_sample", gradient=False)


def test_a_layer_without_a_bias():
    torch.manual_seed(0)
    field, x, context = graph_of(lambda: (Net(lambda s, t, y: torch.tanh(s.a(y)) - y * y, a=torch.nn.Linear(3, 3, bias=False)), (4, 3)))
    CASE.evaluations(field, x, context, None)
