"""Compiled fields under torch.compile and torch.export: one opaque operator with its gradient, no graph breaks."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import pytest
import torch
from cpu_cases import isolated_environment
from fields import make_ffjord
from random_fields import random_field
from torch import nn

import sparseflow_kernels as sfk
from sparseflow_kernels import operators
from sparseflow_kernels.field import TimeFunction
from sparseflow_kernels.solution import GradientError, SolverError

F64 = torch.float64
UP, DOWN = torch.tensor([0.0, 0.4, 1.0], dtype=F64), torch.tensor([1.0, 0.5, 0.0], dtype=F64)
NATIVE = "cpu" if sfk.build_info()["cpu"]["built"] else "reference"


@pytest.fixture(autouse=True)
def forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(engine=NATIVE, seed=0):
    return sfk.compile(random_field((3, 8, 7, 3), 0.7, gate=True, shift=True, seed=seed), engine)


class Evaluation(nn.Module):
    def __init__(self, field):
        super().__init__()
        self.field = field

    def forward(self, y, t):
        return (self.field(0.3, y) + self.field(t[1], torch.tanh(y))).square().sum()


class Solve(nn.Module):
    def __init__(self, field, **arguments):
        super().__init__()
        self.field, self.arguments = field, {"rtol": 1e-6, "atol": 1e-6, **arguments}

    def forward(self, y, t):
        return sfk.odeint(self.field, torch.tanh(y), t, **self.arguments)[1:].square().sum()


class Density(Solve):
    def __init__(self, field, kind):
        super().__init__(sfk.with_divergence(field, kind))

    def forward(self, y, t):
        state = (torch.tanh(y), torch.zeros_like(y[..., :1]))
        solution = sfk.solve(self.field, state, t, **self.arguments)
        z, l = solution.ys  # noqa: E741
        return z[1:].square().sum() - l[1:].sum() + 0 * solution.stats.nfe


def outcome(function, module, y, t):
    """The value and the gradients in y, t and every parameter."""
    torch.manual_seed(3)  # of the probe
    y, t = y.clone().requires_grad_(), t.clone().requires_grad_()
    module.zero_grad()
    value = function(y, t)
    value.backward()
    return [value.detach(), y.grad, t.grad, *(parameter.grad for parameter in module.parameters())]


MODULES = {
    "evaluation": lambda field: (Evaluation(field), UP),
    "adaptive": lambda field: (Solve(field, options={"max_num_steps": 99, "step_t": [0.2]}), DOWN),
    "grid": lambda field: (Solve(field, method="rk4", options={"step_size": 0.15, "perturb": True}), DOWN),
    "density": lambda field: (Density(field, "hutchinson"), UP),
}


@pytest.mark.parametrize(
    "name, backend, engine",
    [(name, "aot_eager", NATIVE) for name in MODULES]
    + [("adaptive", "eager", NATIVE), ("density", "aot_eager", "reference")],
)
def test_whole_graphs_with_gradients(name, backend, engine):
    module, t = MODULES[name](compiled(engine))
    graph = torch.compile(module, fullgraph=True, backend=backend)
    for rows in (4, 6):  # the second time with a batch of any size
        y = torch.randn(rows, 3, dtype=F64)
        torch.testing.assert_close(outcome(graph, module, y, t), outcome(module, module, y, t), rtol=1e-9, atol=1e-9)
    if backend == "eager":
        with torch.no_grad():
            torch.testing.assert_close(graph(y, t), module(y, t))


def test_training_in_a_graph_packs_once():
    field = compiled()
    module = Density(field, "exact")
    graph, other = torch.compile(module, fullgraph=True, backend="aot_eager"), sfk.compile(field, NATIVE)
    eager = Density(other, "exact")
    optimizers = [torch.optim.SGD(f.parameters(), 0.05) for f in (field, other)]
    read, y = [], torch.randn(5, 3, dtype=F64)
    original = operators._ReadBack.read
    operators._ReadBack.read = staticmethod(lambda *arguments: (read.append(1), original(*arguments))[1])
    try:
        for _ in range(3):
            for function, optimizer in zip((graph, eager), optimizers):
                optimizer.zero_grad()
                function(y, UP).backward()
                optimizer.step()
    finally:
        operators._ReadBack.read = original
    for one, two in zip(field.parameters(), other.parameters()):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)
    assert len(read) == 1
    parameter = weakref.ref(field.layers[0].values)
    assert parameter() in operators._read_back
    del field, module, graph, other, eager, optimizers, function, optimizer, one, two
    torch._dynamo.reset()
    gc.collect()
    assert parameter() is None  # what is packed for a graph keeps nothing alive


@pytest.mark.parametrize("kind", ["evaluation", "solve", "density"])
def test_exports_run_in_another_process(kind, tmp_path):
    field = compiled("auto")
    module = {"evaluation": Evaluation, "solve": Solve, "density": lambda f: Density(f, "exact")}[kind](field)
    y = torch.randn(4, 3, dtype=F64)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(module, (y, UP), dynamic_shapes=({0: batch}, None))
    operator = "sparseflow.evaluate" if kind == "evaluation" else "sparseflow.solve"
    assert operator in str(program.graph) and "aten.addmm" not in str(program.graph)
    y = torch.randn(7, 3, dtype=F64)
    exported = program.module()
    torch.testing.assert_close(outcome(exported, exported, y, UP)[:3], outcome(module, module, y, UP)[:3])
    if kind != "density":  # one new process is enough
        return
    torch.export.save(program, tmp_path / "flow.pt2")
    torch.save((y, UP, module(y, UP).detach()), tmp_path / "data.pt")
    code = (
        "import sys, torch, sparseflow_kernels; folder = sys.argv[1]\n"
        "y, t, expected = torch.load(folder + '/data.pt')\n"
        "value = torch.export.load(folder + '/flow.pt2').module()(y, t)\n"
        "torch.testing.assert_close(value.detach(), expected)\n"
    )
    command = [sys.executable, "-P", "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=isolated_environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_an_export_leaves_the_field_as_it_was():
    field, y = compiled(), torch.randn(4, 3, dtype=F64)
    module = Density(field, "hutchinson")
    before = outcome(module, module, y, UP)
    program = torch.export.export(module, (y, UP))
    assert module.field._drawn.shape == y.shape and type(module.field._drawn) is torch.Tensor
    torch.testing.assert_close(outcome(module, module, y, UP), before, rtol=0, atol=0)
    torch.testing.assert_close(outcome(program.module(), module, y, UP)[:3], before[:3])


def test_operators_keep_torchs_rules():
    field = compiled()
    program, patterns = field.described
    x, t = torch.randn(4, 3, dtype=F64, requires_grad=True), torch.tensor(0.3, dtype=F64, requires_grad=True)
    common = (field.ordered(), patterns, program)
    torch.library.opcheck(torch.ops.sparseflow.evaluate.default, (t, x, None, *common, "exact"))
    l, options = torch.zeros(4, dtype=F64, requires_grad=True), (["first_step"], [0.1], [], [0.4])  # noqa: E741
    times, tolerances = UP.clone().requires_grad_(), ([1e-5] * 2, [1e-5] * 2)
    solve = (x, l, times, None, *common, "exact", "dopri5", *tolerances, *options, True)
    torch.library.opcheck(torch.ops.sparseflow.solve.default, solve)


def test_what_depends_on_data_is_checked_when_it_runs():
    field = compiled()
    graph = torch.compile(Solve(field, options={"max_num_steps": 3}), fullgraph=True, backend="eager")
    y = torch.randn(4, 3, dtype=F64)
    assert graph(y[:0], UP) == 0  # an empty batch comes back empty
    with pytest.raises(AssertionError, match="strictly increasing or decreasing"):
        graph(y, torch.tensor([0.0, 1.0, 0.5], dtype=F64))
    with pytest.raises(SolverError, match="max_num_steps exceeded") as info:
        graph(y, torch.tensor([0.0, 50.0, 90.0], dtype=F64))
    assert info.value.t > 0.0
    graph = torch.compile(
        lambda y, t: sfk.odeint(field, y, t, method="euler")[1].sum() * torch.full((), torch.inf, dtype=F64),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    with pytest.raises(GradientError, match="that arrives at the solve's output for t = 0.5"):
        graph(y, DOWN).backward()


class Wave(nn.Module):
    def forward(self, t):
        return torch.stack([t.sin(), t.cos(), t])


def test_what_cannot_be_an_operator():
    """Functions of time in Python, callables among the options: a graph break where torch may break, else an error."""
    plain = random_field((2, 3, 2), 1.0)
    plain.layers[0].shift = TimeFunction(Wave())
    field, y = sfk.compile(plain, NATIVE), torch.randn(4, 2, dtype=F64)
    module = Solve(field)
    value = module(y, UP)
    torch.testing.assert_close(torch.compile(module, backend="eager")(y, UP), value)
    torch.testing.assert_close(torch.compile(Evaluation(field), backend="eager")(y, UP), Evaluation(field)(y, UP))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(module, backend="eager", fullgraph=True)(y, UP)
    exported = torch.export.export(Evaluation(field), (y, UP)).module()  # an evaluation is torch operations anyway
    torch.testing.assert_close(exported(y + 1, UP), Evaluation(field)(y + 1, UP))
    with pytest.raises(sfk.UnsupportedFieldError, match="torch.export of this solve: the field has functions of time"):
        torch.export.export(module, (y, UP))
    grid = {"grid_constructor": lambda f, y, t: torch.linspace(0, 1, 6, dtype=F64)}
    module = Solve(compiled(), method="rk4", options=grid)
    y = torch.randn(4, 3, dtype=F64)
    torch.testing.assert_close(torch.compile(module, backend="eager")(y, UP), module(y, UP))


def test_a_module_of_the_users_own_around_a_pruned_net():
    """Layers before and behind the solve, in float32, dense layers and all."""
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(5, 2), nn.Linear(2, 1)
            self.field = sfk.compile(make_ffjord("concat", 2, (8, 6), "softplus"), NATIVE)

        def forward(self, x):
            t = torch.linspace(0.0, 1.0, 2)
            return self.last(sfk.odeint(self.field, self.first(x), t, rtol=1e-4, atol=1e-4)[-1])

    model, x = Model(), torch.randn(6, 5)
    graph = torch.compile(model, fullgraph=True, backend="aot_eager")
    grads = []
    for function in (graph, model):
        model.zero_grad()
        function(x).square().mean().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
