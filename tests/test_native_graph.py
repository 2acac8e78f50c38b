"""Graph programs through the native builder: elementwise expressions, context, row vectors and time programs, against torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from random_graphs import random_graph

from sparseflow_kernels import _cpu, divergence
from sparseflow_kernels.engines import reference_engine
from sparseflow_kernels.engines.graph_cpu import GraphCpuEngine

DTYPES = {torch.float32: ("F32", np.float32), torch.float64: ("F64", np.float64)}
DTYPE_IDS = ["float32", "float64"]
EPS = {torch.float32: 2.0**-23, torch.float64: 2.0**-52}

# name: (number, torch's function, units in the last place allowed: in float32 and in float64, or in both)
UNARY = {
    "copy": (0, lambda a: a, 0, 0),
    "neg": (7, torch.neg, 0, 0),
    "abs": (10, torch.abs, 0, 0),
    "sign": (11, torch.sign, 0, 0),
    "sqrt": (14, torch.sqrt, 1, 1),
    "rsqrt": (15, torch.rsqrt, 2, 2),
    "reciprocal": (16, torch.reciprocal, 1, 1),
    "exp": (17, torch.exp, 2, 2),
    "expm1": (18, torch.expm1, 3, 3),
    "log": (19, torch.log, 2, 2),
    "log1p": (20, torch.log1p, 3, 3),
    "sin": (21, torch.sin, 3, 3),
    "cos": (22, torch.cos, 3, 3),
    "tan": (23, torch.tan, 3, 3),
    "tanh": (24, torch.tanh, 6, 4),
    "sigmoid": (25, lambda a: torch.where(a < 0, a.exp() / (1 + a.exp()), 1 / (1 + (-a).exp())), 4, 4),  # torch's own drops what is small
    "softplus": (26, lambda a: torch.logaddexp(a, torch.zeros_like(a)), 4, 4),
    "erf": (27, torch.erf, 3, 3),
    "atan": (34, torch.atan, 2, 2),
    "asin": (35, torch.asin, 2, 2),
    "acos": (36, torch.acos, 2, 2),
    "sinh": (37, torch.sinh, 3, 3),
    "cosh": (38, torch.cosh, 3, 3),
    "floor": (40, torch.floor, 0, 0),
    "square": (44, torch.square, 1, 0),
}
BINARY = {
    "add": (3, torch.add, 0),
    "sub": (4, torch.sub, 0),
    "mul": (5, torch.mul, 0),
    "div": (6, torch.div, 1),
    "maximum": (12, torch.maximum, 0),
    "minimum": (13, torch.minimum, 0),
    "pow": (29, torch.pow, 2),
    "gt": (30, lambda a, b: (a > b).to(a.dtype), 0),
    "ge": (31, lambda a, b: (a >= b).to(a.dtype), 0),
    "eq": (32, lambda a, b: (a == b).to(a.dtype), 0),
    "atan2": (39, torch.atan2, 2),
}
COPY, NUMBER, ROW, ADD_NUMBER, MUL_NUMBER, POW_NUMBER, WHERE, FMA, ROW_MUL, ROW_ADD = 0, 1, 2, 8, 9, 28, 33, 41, 42, 43
SIN, TANH, MUL, ADD, SUB, SQUARE, COS = 21, 24, 5, 3, 4, 44, 22


def renew_vector(program, number: int, values: torch.Tensor) -> None:
    program.renew([], [(number, (values.data_ptr(), values.numel()))], [])


class Graph:
    """A builder of graph programs in one precision, with expressions as lists of (op, to, a, b, c, number)."""

    def __init__(self, dtype: torch.dtype) -> None:
        suffix, self.numpy = DTYPES[dtype]
        self.dtype = dtype
        self.builder = getattr(_cpu, f"Builder{suffix}")()

    def expression(self, inputs, vectors, outputs, registers, code):
        rows = [tuple(line) + (0,) * (5 - len(line[:5])) + (0.0,) * (len(line) < 6) for line in code]
        columns = list(zip(*rows)) or [()] * 6
        return self.builder.expression(
            inputs, vectors, outputs, registers, *(np.array(c, np.int64) for c in columns[:5]), np.array(columns[5], np.float64)
        )

    def full(self, weight: torch.Tensor) -> int:
        rows, cols = weight.shape
        row_ptr, col = np.arange(rows + 1) * cols, np.tile(np.arange(cols), rows)
        return self.builder.matrix(rows, cols, row_ptr, col, weight.detach().to(self.dtype).numpy().ravel())

    def vector(self, values: torch.Tensor) -> int:
        return self.builder.vector(len(values), values.detach().to(self.dtype).numpy())

    def values(self, program, x: torch.Tensor, out: int, t: float = 0.0, context: torch.Tensor | None = None) -> torch.Tensor:
        x = x.to(self.dtype).contiguous()
        f = torch.full((len(x), out), math.nan, dtype=self.dtype)
        address = 0 if context is None else context.data_ptr()
        program.evaluate(t, x.data_ptr(), 0, len(x), 1, f.data_ptr(), 0, context=address)
        return f


def elementwise(dtype: torch.dtype, code, x: torch.Tensor, vector: torch.Tensor | None = None) -> torch.Tensor:
    """An expression of the columns of x, one row each, with one output."""
    graph = Graph(dtype)
    dim = x.shape[1]
    source, target = graph.builder.buffer(dim), graph.builder.buffer(1)
    vectors = [] if vector is None else [(graph.vector(vector), 0, False)]
    registers = max([line[1] for line in code]) - dim
    e = graph.expression(dim, len(vectors), 1, registers, code)
    graph.builder.pointwise(e, 1, [(source, 0, i, False) for i in range(dim)], vectors, [(target, 0, 0)])
    graph.builder.graph_roles(dim, 1, False, source, target)
    return graph.values(graph.builder.compile(), x, 1)[:, 0]


def special(dtype: torch.dtype) -> torch.Tensor:
    info = torch.finfo(dtype)
    magnitudes = [0.0, info.smallest_normal / 8, info.smallest_normal, 1e-20, 1e-6, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 1e2, 1e6, info.max, math.inf]
    plain = torch.tensor([s * m for m in magnitudes for s in (1.0, -1.0)] + [math.nan], dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    scattered = [scale * torch.randn(200, dtype=torch.float64, generator=generator) for scale in (1e-3, 0.3, 1.0, 5.0, 60.0, 600.0)]
    return torch.cat([plain, *(part.to(dtype) for part in scattered)])


def assert_close(found: torch.Tensor, wanted: torch.Tensor, ulps: float, what: str, exact: torch.Tensor | None = None) -> None:
    """wanted: torch's, for what is special; exact: in float64, for what is not."""
    finite = torch.isfinite(wanted)
    assert torch.equal(found[~finite].isnan(), wanted[~finite].isnan()), what
    numbers = ~wanted.isnan()
    infinite = ~finite & numbers
    assert torch.equal(found[infinite], wanted[infinite]), what
    reference = wanted if exact is None else exact
    spacing = (reference[finite].abs() * EPS[found.dtype]).clamp(min=torch.finfo(found.dtype).smallest_normal * EPS[found.dtype])
    error = (found[finite].double() - reference[finite].double()).abs() / spacing.double()
    assert error.numel() == 0 or error.max() <= ulps, f"{what}: {error.max().item():.1f} units in the last place"


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
class TestInstructions:
    @pytest.mark.parametrize("name", UNARY)
    def test_of_one_number(self, dtype, name):
        op, function, *ulps = UNARY[name]
        x = special(dtype)
        found = elementwise(dtype, [(op, 1, 0)], x[:, None])
        if name == "sigmoid":  # zero or denormal where exp(-x) is infinite
            smallest = torch.finfo(dtype).smallest_normal
            gone = function(x.double()) < 2 * smallest
            assert gone.any() and bool((found[gone] >= 0).all() and (found[gone] <= 2 * smallest).all())
            x, found = x[~gone], found[~gone]
        exact = function(x.double()) if dtype == torch.float32 else None
        assert_close(found, function(x), ulps[dtype == torch.float64], name, exact)

    @pytest.mark.parametrize("name", BINARY)
    def test_of_two_numbers(self, dtype, name):
        op, function, ulps = BINARY[name]
        some = special(dtype)[:60]
        x = torch.cartesian_prod(some, some)
        found = elementwise(dtype, [(op, 2, 0, 1)], x)
        wanted = function(x[:, 0].contiguous(), x[:, 1].contiguous())
        assert_close(found, wanted, ulps, name)

    def test_with_a_number(self, dtype):
        x = special(dtype)
        assert_close(elementwise(dtype, [(NUMBER, 1, 0, 0, 0, 1.25)], x[:, None]), torch.full_like(x, 1.25), 0, "number")
        assert_close(elementwise(dtype, [(ADD_NUMBER, 1, 0, 0, 0, 1.25)], x[:, None]), x + 1.25, 0, "add_number")
        assert_close(elementwise(dtype, [(MUL_NUMBER, 1, 0, 0, 0, -2.5)], x[:, None]), x * -2.5, 0, "mul_number")
        for power in (0.5, -0.5, 1.0, 2.0, 3.0, -1.0, -2.0, 0.0, 1.5, 4.0, -0.7):
            found = elementwise(dtype, [(POW_NUMBER, 1, 0, 0, 0, power)], x[:, None])
            assert_close(found, torch.pow(x, power), 3, f"pow_number {power}")

    def test_of_three_numbers(self, dtype):
        some = special(dtype)[25:37]
        x = torch.cartesian_prod(some, some, some)
        a, b, c = x.unbind(1)
        assert_close(elementwise(dtype, [(WHERE, 3, 0, 1, 2)], x), torch.where(a != 0, b, c), 0, "where")
        small = torch.randn(300, 3, dtype=dtype, generator=torch.Generator().manual_seed(1))
        a, b, c = small.double().unbind(1)
        found = elementwise(dtype, [(FMA, 3, 0, 1, 2)], small)
        bound = EPS[dtype] * (a.abs() * b.abs() + c.abs())
        assert ((found.double() - (a * b + c)).abs() <= bound).all()

    def test_of_a_row_vector(self, dtype):
        x, numbers = special(dtype), torch.tensor([1.75], dtype=dtype)
        assert_close(elementwise(dtype, [(ROW, 1, 0, 0)], x[:, None], numbers), torch.full_like(x, 1.75), 0, "row")
        assert_close(elementwise(dtype, [(ROW_MUL, 1, 0, 0)], x[:, None], numbers), x * 1.75, 0, "row_mul")
        assert_close(elementwise(dtype, [(ROW_ADD, 1, 0, 0)], x[:, None], numbers), x + 1.75, 0, "row_add")

    def test_registers_outlive_other_instructions(self, dtype):
        x = torch.randn(100, 2, dtype=dtype, generator=torch.Generator().manual_seed(2))
        code = [(SIN, 3, 0), (TANH, 4, 1), (MUL, 3, 3, 4), (ADD, 4, 3, 0), (SUB, 2, 4, 3)]
        assert torch.allclose(elementwise(dtype, code, x), x[:, 0], atol=20 * EPS[dtype])


class Example:
    """f(t, x; c) = x-part of W2 tanh(scale(t) * (W1 [x, c]) + b) * sin(x) + shift(t), written as a graph, and in torch."""

    dim, given, hidden = 3, 2, 20

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        generator = torch.Generator().manual_seed(7)
        self.parameters = {
            name: torch.randn(*shape, dtype=dtype, generator=generator).mul_(0.5).requires_grad_()
            for name, shape in {
                "w1": (self.hidden, self.dim + self.given), "b": (self.hidden,), "w2": (self.dim, self.hidden),
                "time_w": (self.hidden + self.dim, 1), "time_b": (self.hidden + self.dim,),
            }.items()
        }

    def answer(self, t: torch.Tensor) -> torch.Tensor:  # [n] -> [n, hidden + dim]
        p = self.parameters
        return torch.sin(t[:, None] * p["time_w"][:, 0] + p["time_b"])

    def f(self, t: torch.Tensor, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        p = self.parameters
        a = self.answer(t.reshape(1))[0]
        z = torch.tanh((torch.cat([x, c], 1) @ p["w1"].T) * a[: self.hidden] + p["b"])
        return (z @ p["w2"].T) * torch.sin(x) + a[self.hidden :]

    def time_program(self):
        graph, p = Graph(self.dtype), self.parameters
        n = self.hidden + self.dim
        b = graph.builder
        t, out = b.buffer(1), b.buffer(n)
        e = graph.expression(1, 2, 1, 1, [(ROW_MUL, 2, 0, 0), (ROW_ADD, 2, 2, 1), (SIN, 1, 2)])
        w, bias = graph.vector(p["time_w"][:, 0]), graph.vector(p["time_b"])
        b.pointwise(e, n, [(t, 0, 0, True)], [(w, 0, False), (bias, 0, False)], [(out, 0, 0)])
        b.graph_roles(1, n, False, t, out)
        return b.compile()

    def forward(self, graph: Graph) -> dict:
        b, p, dim, hidden = graph.builder, self.parameters, self.dim, self.hidden
        parts = dict(x=b.buffer(dim), c=b.buffer(self.given), both=b.buffer(dim + self.given), h=b.buffer(hidden), y=b.buffer(dim), f=b.buffer(dim))
        parts["w1"], parts["w2"] = graph.full(p["w1"]), graph.full(p["w2"])
        parts["scale"], parts["shift"] = b.vector(hidden, None, 0), b.vector(dim, None, hidden)
        parts["bias"] = graph.vector(p["b"])
        parts["copy"] = graph.expression(1, 0, 1, 0, [(COPY, 1, 0)])
        parts["end"] = graph.expression(2, 1, 1, 1, [(SIN, 3, 1), (MUL, 3, 3, 0), (ROW_ADD, 2, 3, 0)])
        b.pointwise(parts["copy"], self.given, [(parts["c"], 0, 0, False)], [], [(parts["both"], 0, dim)], list="prologue")
        return parts

    def body(self, graph: Graph, parts: dict) -> None:
        b, dim = graph.builder, self.dim
        b.pointwise(parts["copy"], dim, [(parts["x"], 0, 0, False)], [], [(parts["both"], 0, 0)])
        m = b.vector_modulation(self.hidden, parts["scale"], parts["bias"])
        b.affine(parts["w1"], (parts["both"], 0), (parts["h"], 0, 0), m, 1)
        b.product(parts["w2"], (parts["h"], 0), (parts["y"], 0))
        b.pointwise(parts["end"], dim, [(parts["y"], 0, 0, False), (parts["x"], 0, 0, False)], [(parts["shift"], 0, False)], [(parts["f"], 0, 0)])

    def program(self, external: bool = False):
        graph = Graph(self.dtype)
        parts = self.forward(graph)
        self.body(graph, parts)
        rows = self.hidden + self.dim
        graph.builder.graph_roles(
            self.dim, self.dim, False, parts["x"], parts["f"], context=parts["c"], time_rows=rows,
            time_external=0 if external else -1, externals=int(external),
        )
        return graph, graph.builder.compile()

    def adjoint(self):
        """Cotangents written out: y_bar = f_bar sin x, x_bar = f_bar y cos x + W1x' u, u = s h_bar (1 - h^2), ..."""
        graph = Graph(self.dtype)
        parts = self.forward(graph)
        self.body(graph, parts)
        b, dim, given, hidden = graph.builder, self.dim, self.given, self.hidden
        ones, f_bar, x_bar, c_bar = b.buffer(1), b.buffer(dim), b.buffer(dim), b.buffer(given)
        y_bar, h_bar, z_bar, u, r, both_bar = b.buffer(dim), b.buffer(hidden), b.buffer(hidden), b.buffer(hidden), b.buffer(hidden), b.buffer(dim + given)
        r_z = b.buffer(hidden)
        x, y, h, both = parts["x"], parts["y"], parts["h"], parts["both"]
        # keep: the same values, with r = W1 both beside them
        b.pointwise(parts["copy"], dim, [(x, 0, 0, False)], [], [(both, 0, 0)], list="keep")
        b.product(parts["w1"], (both, 0), (r, 0), list="keep")
        act = graph.expression(1, 2, 1, 1, [(ROW_MUL, 2, 0, 0), (ROW_ADD, 2, 2, 1), (TANH, 1, 2)])
        b.pointwise(act, hidden, [(r, 0, 0, False)], [(parts["scale"], 0, False), (parts["bias"], 0, False)], [(h, 0, 0)], list="keep")
        b.product(parts["w2"], (h, 0), (y, 0), list="keep")
        # reverse
        end = graph.expression(3, 0, 2, 2, [(SIN, 5, 2), (MUL, 3, 0, 5), (COS, 6, 2), (MUL, 6, 6, 1), (MUL, 4, 6, 0)])
        b.pointwise(end, dim, [(f_bar, 0, 0, False), (y, 0, 0, False), (x, 0, 0, False)], [], [(y_bar, 0, 0), (x_bar, 0, 0)], list="reverse")
        b.product(parts["w2"], (y_bar, 0), (h_bar, 0), transposed=True, list="reverse")
        slope = graph.expression(3, 1, 3, 1, [(SQUARE, 6, 1), (7, 6, 6), (ADD_NUMBER, 6, 6, 0, 0, 1.0), (MUL, 3, 6, 0), (MUL, 4, 3, 2), (ROW_MUL, 5, 3, 0)])
        b.pointwise(slope, hidden, [(h_bar, 0, 0, False), (h, 0, 0, False), (r, 0, 0, False)], [(parts["scale"], 0, False)],
                    [(z_bar, 0, 0), (r_z, 0, 0), (u, 0, 0)], list="reverse")
        b.product(parts["w1"], (u, 0), (both_bar, 0), transposed=True, list="reverse")
        add = graph.expression(2, 0, 1, 0, [(ADD, 2, 0, 1)])
        b.pointwise(add, dim, [(x_bar, 0, 0, False), (both_bar, 0, 0, False)], [], [(x_bar, 0, 0)], list="reverse")
        b.pointwise(parts["copy"], given, [(both_bar, 0, dim, False)], [], [(c_bar, 0, 0)], list="reverse")
        for matrix, left, right in ((parts["w1"], u, both), (parts["w2"], y_bar, h)):
            s = b.sum(self.hidden * (dim + given if left == u else dim), False)
            b.sum_of_matrix(matrix, s)
            b.gradient(matrix, (left, 0), (right, 0), s)
        for vector, left, n, timed in ((parts["bias"], z_bar, hidden, False), (parts["scale"], r_z, hidden, True), (parts["shift"], f_bar, dim, True)):
            s = b.sum(n, timed)
            b.sum_of_vector(vector, s)
            b.gradient(graph.full(torch.ones(n, 1)), (left, 0), (ones, 0), s)
        b.graph_roles(dim, dim, False, x, parts["f"], ones=ones, context=parts["c"], time_rows=hidden + dim)
        b.graph_adjoint_roles(f_bar, state_cotangent=x_bar, context_cotangent=c_bar)
        return parts, b.compile_adjoint()


MIDPOINT = {"adaptive": False, "order": 2, "c": [0.5], "a": [[0.5]], "b": [0.0, 1.0], "b_error": [], "b_mid": []}
OPTIONS = {
    "min_step": 0.0, "max_step": math.inf, "first_step": None, "safety": 0.9, "ifactor": 10.0, "dfactor": 0.2,
    "max_num_steps": 1000, "stop_at_outputs": False, "step_t": [], "jump_t": [],
}


def states(example: Example, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    return (
        torch.randn(batch, example.dim, dtype=example.dtype, generator=generator),
        torch.randn(batch, example.given, dtype=example.dtype, generator=generator),
    )


def solve_in_torch(example, x, c, grid, sign):
    xs = [x]
    for t0, t1 in zip(grid, grid[1:]):
        step = t1 - t0
        at = lambda t: torch.tensor(sign * t, dtype=example.dtype)
        k = sign * example.f(at(t0), x, c)
        k = sign * example.f(at(t0 + step / 2), x + step / 2 * k, c)
        x = x + step * k
        xs.append(x)
    return torch.stack(xs)


def solve(program, x, c, grid, sign, threads=1, record=False, per_tile=False):
    xs = torch.full((len(grid), *x.shape), math.nan, dtype=x.dtype)
    out = program.solve(
        x.data_ptr(), 0, 0, len(x), grid, sign, MIDPOINT, (1e-3, 1e-3), (1e-3, 1e-3), OPTIONS, grid, False, per_tile, record, False,
        threads, xs.data_ptr(), 0, context=c.data_ptr(),
    )
    assert out["status"] == "ok"
    return xs, out


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
class TestFields:
    def tolerance(self, dtype):
        return {"rtol": 2000 * EPS[dtype], "atol": 2000 * EPS[dtype]}

    @pytest.mark.parametrize("external", [False, True])
    def test_an_evaluation(self, dtype, external):
        example = Example(dtype)
        graph, program = example.program(external)
        asked = []

        def refresh(times):
            asked.append(list(times))
            return [[row.numpy()] for row in example.answer(torch.tensor(times, dtype=dtype)).detach()]

        if external:
            program.set_refresh(refresh)
        else:
            program.set_time(example.time_program())
        x, c = states(example, 150)
        found = graph.values(program, x, example.dim, t=0.3, context=c)
        assert torch.allclose(found, example.f(torch.tensor(0.3, dtype=dtype), x, c), **self.tolerance(dtype))
        assert len(asked) == int(external)

    @pytest.mark.parametrize("sign", [1, -1])
    def test_a_solve(self, dtype, sign):
        example = Example(dtype)
        _, program = example.program()
        program.set_time(example.time_program())
        x, c = states(example, 150)
        grid = [0.1, 0.3, 0.55, 0.8]
        with torch.no_grad():
            wanted = solve_in_torch(example, x, c, grid, sign)
        first, _ = solve(program, x, c, grid, sign)
        assert torch.allclose(first, wanted, **self.tolerance(dtype))
        for threads in (1, 3):
            for width in range(5):
                program.force_width(width)
                for per_tile in (False, True):
                    again, _ = solve(program, x, c, grid, sign, threads, per_tile=per_tile)
                    assert torch.equal(again, first)

    def test_new_numbers(self, dtype):
        example = Example(dtype)
        graph, program = example.program()
        time = example.time_program()
        program.set_time(time)
        x, c = states(example, 20)
        with torch.no_grad():
            example.parameters["b"].add_(0.25)
            example.parameters["time_b"].add_(0.5)
        renew_vector(program, 2, example.parameters["b"])
        renew_vector(time, 1, example.parameters["time_b"])
        found = graph.values(program, x, example.dim, t=0.3, context=c)
        assert torch.allclose(found, example.f(torch.tensor(0.3, dtype=dtype), x, c), **self.tolerance(dtype))
        with pytest.raises(ValueError, match="row vector 0: not as many values"):
            renew_vector(program, 0, torch.zeros(20, dtype=torch.float64))

    def test_gradients_of_an_evaluation(self, dtype):
        example = Example(dtype)
        parts, adjoint = example.adjoint()
        adjoint.set_time(example.time_program())
        x, c = states(example, 150)
        x.requires_grad_(), c.requires_grad_()
        g = torch.randn(150, 3, dtype=dtype, generator=torch.Generator().manual_seed(5))
        wanted = torch.autograd.grad(
            example.f(torch.tensor(0.3, dtype=dtype), x, c), [x, c, *example.parameters.values()], g, retain_graph=True
        )
        grad_x, grad_c = torch.empty_like(x), torch.empty_like(c)
        found = adjoint.evaluate(
            0.3, x.data_ptr(), 0, len(x), 1, g.data_ptr(), 0, grad_x.data_ptr(), context=c.data_ptr(), grad_context=grad_c.data_ptr()
        )
        assert len(found["time_points"]) == 1 and found["time_cotangents"].shape == (1, example.hidden + example.dim)
        self.compare(example, found, parts, grad_x, grad_c, wanted)

    def test_gradients_of_a_solve(self, dtype):
        example = Example(dtype)
        _, program = example.program()
        parts, adjoint = example.adjoint()
        time = example.time_program()
        program.set_time(time)
        adjoint.set_time(time)
        x, c = states(example, 150)
        grid = [0.1, 0.3, 0.55, 0.8]
        xs, out = solve(program, x, c, grid, -1, record=True)
        x.requires_grad_(), c.requires_grad_()
        g = torch.randn(len(grid), 150, 3, dtype=dtype, generator=torch.Generator().manual_seed(5))
        wanted = torch.autograd.grad(solve_in_torch(example, x, c, grid, -1), [x, c, *example.parameters.values()], g)
        results = []
        for threads in (1, 3):
            grad_x, grad_c = torch.empty_like(x), torch.empty_like(c)
            found = adjoint.solve(
                0, len(x), grid, -1, MIDPOINT, False, out["steps"], out["states"], out["derivatives"], threads, g.data_ptr(), 0,
                grad_x.data_ptr(), 0, context=c.data_ptr(), grad_context=grad_c.data_ptr(),
            )
            # Every stage of every step whose derivative was used
            assert found["time_cotangents"].shape == (6, example.hidden + example.dim)
            results.append((grad_x, grad_c, found["time_cotangents"]))
        assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
        assert np.array_equal(results[0][2], results[1][2])
        self.compare(example, found, parts, grad_x, grad_c, wanted)

    def compare(self, example, found, parts, grad_x, grad_c, wanted):
        p = example.parameters
        time_names = ["time_w", "time_b"]
        points = torch.tensor(np.asarray(found["time_points"]), dtype=example.dtype)
        of_time = torch.autograd.grad(
            example.answer(points), [p[n] for n in time_names], torch.tensor(found["time_cotangents"], dtype=example.dtype)
        )
        results = {
            "x": grad_x, "c": grad_c, "w1": found["matrices"][0], "b": found["vectors"][parts["bias"]], "w2": found["matrices"][1],
            **dict(zip(time_names, of_time)),
        }
        for (name, one), other in zip(results.items(), wanted):
            one = torch.as_tensor(one, dtype=torch.float64).reshape(other.shape)
            assert torch.allclose(one, other.double(), rtol=1e-4 if example.dtype == torch.float32 else 1e-11,
                                  atol=(1e-5 if example.dtype == torch.float32 else 1e-12) * float(other.abs().max())), name


class TestRefusals:
    def graph(self):
        graph = Graph(torch.float64)
        x, f = graph.builder.buffer(3), graph.builder.buffer(3)
        graph.builder.graph_roles(3, 3, False, x, f)
        return graph, x, f

    @pytest.mark.parametrize(
        ("code", "message"),
        [
            ([(99, 1, 0)], "instruction 0: unknown"),
            ([(COPY, 0, 0)], "writes place 0, which is neither"),
            ([(COPY, 1, 2)], "reads place 2, which nothing was written to"),
            ([(COPY, 1, 0), (COPY, 1, 0)], "instruction 1: an output is written twice"),
            ([(COPY, 2, 0)], "an output is not written"),
            ([(ROW, 1, 0, 0)], "no such row vector"),
        ],
    )
    def test_of_code(self, code, message):
        graph, *_ = self.graph()
        graph.expression(1, 0, 1, 1, code)
        with pytest.raises(ValueError, match=message):
            graph.builder.compile()

    def test_of_numbers_that_do_not_fit(self):
        graph, *_ = self.graph()
        with pytest.raises(ValueError, match="a must hold numbers from 0 to 65535, not -1"):
            graph.expression(1, 0, 1, 0, [(COPY, 1, -1)])
        with pytest.raises(ValueError, match="must be of one length"):
            graph.builder.expression(1, 0, 1, 0, np.array([0]), np.array([1]), np.array([0]), np.array([0]), np.array([0]), np.zeros(2))

    @pytest.mark.parametrize(
        ("rows", "input_row", "output", "message"),
        [
            (3, 1, None, "the input buffer has too few rows"),
            (3, -1, None, "the input buffer has too few rows"),
            (2, 0, (0, 0, 1), "an input and an output overlap"),
            (3, 0, (1, 0, 1), "the output buffer has too few rows"),
            (3, 0, (-1, 0), "needs a program with divergence"),
        ],
    )
    def test_of_operands(self, rows, input_row, output, message):
        graph, x, f = self.graph()
        e = graph.expression(1, 0, 1, 0, [(COPY, 1, 0)])
        graph.builder.pointwise(e, rows, [(x, 0, input_row, False)], [], [output or (f, 0, 0)])
        with pytest.raises(ValueError, match=message):
            graph.builder.compile()

    def test_an_input_that_is_overwritten_is_read_before(self):
        for code, good in (([(SIN, 2, 0), (ADD, 1, 2, 0)], True), ([(SIN, 1, 0), (ADD, 2, 1, 0)], False)):
            graph, x, f = self.graph()
            e = graph.expression(1, 0, 1, 1, code)
            graph.builder.pointwise(e, 3, [(f, 0, 0, False)], [], [(f, 0, 0)])
            if good:
                graph.builder.compile()
            else:
                with pytest.raises(ValueError, match="an input is read after an output"):
                    graph.builder.compile()

    def test_of_a_time_program(self):
        example = Example(torch.float64)
        graph, program = example.program()
        x, c = states(example, 2)
        with pytest.raises(RuntimeError, match="none was set"):
            graph.values(program, x, 3, context=c)
        with pytest.raises(ValueError, match="a time program has one input and here 23 outputs, not 3 and 3"):
            program.set_time(program)
        program.set_time(example.time_program())
        with pytest.raises(ValueError, match="context"):
            graph.values(program, x, 3)

    def test_a_solve_needs_as_many_outputs_as_inputs(self):
        time = Example(torch.float64).time_program()
        x = torch.zeros(1, 1, dtype=torch.float64)
        with pytest.raises(ValueError, match="not as many outputs as inputs"):
            solve(time, x, x, [0.0, 1.0], 1)


@pytest.mark.parametrize("kind", ["exact", "hutchinson"])
def test_an_engine_with_a_divergence_evaluates_the_field_alone(kind):
    field = random_graph(3)
    plan = divergence.plan(field, kind)
    x = torch.randn(5, field.dim, dtype=torch.float64)
    context = None if field.context is None else torch.randn(5, field.context.rows, dtype=torch.float64)
    for t in (torch.tensor(0.4, dtype=torch.float64), torch.rand(5, dtype=torch.float64)):
        found = GraphCpuEngine(field, plan).evaluate(t, x, context)
        torch.testing.assert_close(found, reference_engine(field, plan).evaluate(t, x, context))
