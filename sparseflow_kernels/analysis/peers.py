"""The contenders of the benchmark: torchdiffeq's dense solve (the baseline), this library, and peers where installed.

Every contender gets the same `Problem`, is prepared (compiled, converted, warmed up) outside the timed part, and returns
an `Outcome`. All run on one thread, in float32, with the same method (dopri5), tolerances and Hutchinson noise.

Each is given its honest advantages: the baseline multiplies dense weights without masks, with its noise fixed and
no graph kept beyond one vector-Jacobian product; forward-mode peers carry their tangents beside the primal.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Callable, Iterator

import numpy
import torch
import torchdiffeq
from torch import Tensor, nn

from ..capture import capture
from ..compiled_field import CompiledField, compile as compile_field
from ..divergence_field import with_divergence
from ..field import Activation, VectorField
from ..odeint import solve
from ..threads import get_num_threads, set_num_threads
from .graph_jax import JaxGraph
from .jax_field import JaxField
from .problems import FieldSpec, Problem


@dataclass
class Outcome:
    """x: [batch, dim] (or as the state is) and l: [batch] at the end time, None without a divergence; nfe: evaluations of
    the field."""

    x: Tensor
    l: Tensor | None
    nfe: int


Run = Callable[[], Outcome]


# ---------------------------------------------------------------------------------------------- dense torch, autograd


class AutogradDivergence(nn.Module):
    """f(t, (x, l)) = (f, -tr df/dx) as a user of torchdiffeq writes it; counts its evaluations. Differentiable where
    gradients are on; elsewhere no graph is kept."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], noise: Tensor | None) -> None:
        super().__init__()
        self.function, self.noise, self.nfe = function, noise, 0

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        self.nfe += 1
        x, graph = state[0], torch.is_grad_enabled()
        with torch.enable_grad():
            x = x if graph and x.requires_grad else x.detach().requires_grad_(True)
            f = self.function(t, x)
            if self.noise is not None:
                (product,) = torch.autograd.grad(f, x, self.noise, create_graph=graph)
                trace = (product * self.noise).sum(1)
            else:
                trace = torch.zeros_like(x[:, 0])
                last = x.shape[1] - 1
                for i in range(x.shape[1]):
                    (row,) = torch.autograd.grad(f[:, i].sum(), x, retain_graph=graph or i < last, create_graph=graph)
                    trace = trace + row[:, i]
        return (f, -trace) if graph else (f.detach(), -trace.detach())


class Counted(nn.Module):
    """f(t, x) itself; counts its evaluations."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.nfe = function, 0

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        self.nfe += 1
        return self.function(t, x)


def right_hand_side(problem: Problem, function: nn.Module) -> AutogradDivergence | Counted:
    return Counted(function) if problem.spec.divergence is None else AutogradDivergence(function, problem.noise)


def _torchdiffeq_run(problem: Problem, rhs: nn.Module, method: str = "dopri5") -> Run:
    state, times = problem.state(), problem.times

    def run() -> Outcome:
        rhs.nfe = 0
        with torch.no_grad():
            ys = torchdiffeq.odeint(rhs, state, times, rtol=problem.rtol, atol=problem.atol, method=method)
        return _outcome(ys, rhs.nfe)

    return run


def _outcome(ys: Tensor | tuple[Tensor, Tensor], nfe: int) -> Outcome:
    x, l = ys if isinstance(ys, tuple) else (ys, None)  # noqa: E741
    return Outcome(x[-1], None if l is None else l[-1], nfe)


def torchdiffeq_dense(problem: Problem) -> Run:
    return _torchdiffeq_run(problem, right_hand_side(problem, problem.module))


def torchdiffeq_compiled(problem: Problem) -> Run:
    torch._dynamo.reset()
    return _torchdiffeq_run(problem, right_hand_side(problem, torch.compile(problem.module)))


def float64_reference(problem: Problem, rows: int) -> Outcome:
    """The problem's first rows, solved with dopri8 in float64 at tolerance 1e-10."""
    exact = problem.reference(rows)
    return _torchdiffeq_run(exact, right_hand_side(exact, exact.module), "dopri8")()


# ------------------------------------------------------------------------------------------------------- this library


def sparseflow(problem: Problem, engine: str = "auto") -> Run:
    return run_of(compiled(problem, engine), problem)


def compiled(problem: Problem, engine: str = "auto", module: nn.Module | None = None) -> CompiledField:
    """The problem's module, or a copy of it, compiled as a user does."""
    return compile_field(problem.module if module is None else module, engine=engine, like=problem.like)


def run_of(field: CompiledField, problem: Problem) -> Run:
    """A whole solve, with divergence where the problem has one, of a field that is compiled already, as a user calls it."""
    kind, state, times = problem.spec.divergence, problem.state(), problem.times
    rhs = field if kind is None else with_divergence(field, kind, problem.noise)

    def run() -> Outcome:
        with torch.no_grad():
            solution = solve(rhs, state, times, rtol=problem.rtol, atol=problem.atol, method="dopri5")
        return _outcome(solution.ys, solution.stats.nfe)

    return run


# ---------------------------------------------------------------------------------------------- peers on captured data


def _value_and_slope(activation: Activation, z: Tensor) -> tuple[Tensor, Tensor | float]:
    """(act(z), act'(z)) of the benchmark's activations."""
    if activation.name == "tanh":
        h = torch.tanh(z)
        return h, 1 - h * h
    if activation.name == "sigmoid":
        h = torch.sigmoid(z)
        return h, h * (1 - h)
    if activation.name == "softplus":
        beta = activation.params[0] if activation.params else 1.0
        return torch.nn.functional.softplus(z, beta), torch.sigmoid(beta * z)
    return z, 1.0


class CsrDivergence(nn.Module):
    """torch.sparse CSR weights, batch-minor activations, tangents beside the primal in one product per layer."""

    def __init__(self, field: VectorField, noise: Tensor | None) -> None:
        super().__init__()
        self.layers, self.nfe = field.layers, 0
        self.noise = None if noise is None else noise.T.contiguous()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch calls its CSR tensors a beta
            self.weights = [
                torch.sparse_csr_tensor(p.row_ptr.int(), p.col.int(), layer.values, p.shape, check_invariants=False)
                for layer in field.layers
                for p in (layer.pattern,)
            ]

    def _tangent(self, x: Tensor, slopes: list[Tensor], gates: list, seed: Tensor) -> Tensor:
        p = seed
        for weight, slope, gate in zip(self.weights, slopes, gates):
            p = weight @ p
            if gate is not None:
                p = gate[:, None] * p
            p = slope * p
        return (seed * p).sum(0)

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        self.nfe += 1
        h = x = state[0].T.contiguous()
        slopes, gates = [], []
        for layer, weight in zip(self.layers, self.weights):
            gate, shift = layer.modulation(t)
            z = torch.addmm(layer.bias[:, None], weight, h)
            if gate is not None:
                z = gate[:, None] * z
            if shift is not None:
                z = z + shift[:, None]
            h, slope = _value_and_slope(layer.activation, z)
            slopes.append(slope)
            gates.append(gate)
        if self.noise is not None:
            trace = self._tangent(x, slopes, gates, self.noise)
        else:
            trace = torch.zeros_like(x[0])
            for m in range(x.shape[0]):
                seed = torch.zeros_like(x)
                seed[m] = 1.0
                trace = trace + self._tangent(x, slopes, gates, seed)
        return h.T.contiguous(), -trace


def _plain_layers(problem: Problem) -> None:
    if not isinstance(problem.spec, FieldSpec):
        raise ValueError("written for chains of layers with a divergence only")


def torch_csr(problem: Problem) -> Run:
    _plain_layers(problem)
    field = compile_field(problem.module).vector_field.map_tensors(Tensor.detach)
    return _torchdiffeq_run(problem, CsrDivergence(field, problem.noise))


def diffrax_jit(problem: Problem) -> Run:
    """Compiled ahead of the timing."""
    import jax

    kind = JaxField if isinstance(problem.spec, FieldSpec) else JaxGraph
    own, arguments = kind(problem), kind.arguments(problem)
    run_jit = jax.jit(own.solve)

    def run() -> Outcome:
        ends, steps = jax.block_until_ready(run_jit(*arguments))
        x, *l = (torch.from_numpy(numpy.array(part)) for part in ends)  # noqa: E741
        return Outcome(x, l[0] if l else None, own.evaluations(steps))

    return run


def torchode_dense(problem: Problem) -> Run:
    """torchode steps every sample on its own; its divergence carries forward tangents on dense weights."""
    import torchode

    _plain_layers(problem)
    field = capture(problem.module).map_tensors(Tensor.detach)
    weights = [layer.weight.T.contiguous() for layer in field.layers]
    dim, noise = problem.spec.dim, problem.noise

    def part(value, t):
        return None if value is None else value.slope * t + value.offset

    def rhs(t: Tensor, y: Tensor) -> Tensor:
        h, slopes = y[:, :dim], []
        t = t[:, None]
        for layer, weight in zip(field.layers, weights):
            gate, shift = part(layer.gate, t), part(layer.shift, t)
            z = torch.addmm(layer.bias, h, weight)
            if gate is not None:
                gate = torch.sigmoid(gate)
                z = gate * z
            if shift is not None:
                z = z + shift
            h, slope = _value_and_slope(layer.activation, z)
            slopes.append(slope if gate is None else slope * gate)

        def tangent(seed: Tensor) -> Tensor:
            p = seed
            for weight, slope in zip(weights, slopes):
                p = slope * (p @ weight)
            return (seed * p).sum(1, keepdim=True)

        if noise is not None:
            trace = tangent(noise)
        else:
            eye = torch.eye(dim)
            trace = sum(tangent(eye[m].expand_as(y[:, :dim])) for m in range(dim))
        return torch.cat([h, -trace], 1)

    term = torchode.ODETerm(rhs)
    solver = torchode.AutoDiffAdjoint(
        torchode.Dopri5(term=term), torchode.IntegralController(atol=problem.atol, rtol=problem.rtol, term=term)
    )
    batch = problem.x.shape[0]
    start = torch.cat([problem.x, problem.x.new_zeros(batch, 1)], 1)
    ivp = torchode.InitialValueProblem(y0=start, t_eval=torch.tensor([[0.0, 1.0]], dtype=start.dtype).expand(batch, 2).contiguous())

    def run() -> Outcome:
        with torch.no_grad():
            solution = solver.solve(ivp)
        end = solution.ys[:, -1]
        return Outcome(end[:, :dim], end[:, dim], int(solution.stats["n_f_evals"].max()))

    return run


# -------------------------------------------------------------------------------------------------------- the register


@dataclass(frozen=True)
class Contender:
    """name; prepare: Problem -> Run; needs: modules that must be importable; remark: what to know when reading its time."""

    name: str
    prepare: Callable[[Problem], Run]
    needs: tuple[str, ...] = ()
    remark: str = ""

    def missing(self) -> str | None:
        absent = [name for name in self.needs if importlib.util.find_spec(name) is None]
        return f"{', '.join(absent)} not installed" if absent else None


BASELINE = Contender("torchdiffeq", torchdiffeq_dense, remark="eager, dense weights")
OURS = Contender("sparseflow", sparseflow)
PEERS = {
    contender.name: contender
    for contender in (
        Contender("diffrax", diffrax_jit, ("diffrax", "jax"), "jit, dense weights, shared steps"),
        Contender("torchode", torchode_dense, ("torchode",), "eager, dense weights, steps per sample (NFE: the most of any)"),
        Contender("torch.compile", torchdiffeq_compiled, remark="torchdiffeq on a compiled dense field"),
        Contender("torch.csr", torch_csr, remark="torchdiffeq on torch.sparse CSR weights, forward tangents"),
    )
}


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread per library inside. Must be entered before jax is imported: XLA reads its settings once."""
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    torch_threads, own_threads = torch.get_num_threads(), get_num_threads()
    torch.set_num_threads(1)
    set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(torch_threads)
        set_num_threads(own_threads)
