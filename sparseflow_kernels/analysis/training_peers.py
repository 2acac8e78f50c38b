"""The contenders of the training-step benchmark. A step is the mean negative log-likelihood of the batch and its
gradient in all parameters, without the optimizer's own time, which is not a solver's.

All run on one thread, in float32, with dopri5, the same tolerances and the same Hutchinson noise. Each is given its
honest advantages: dense contenders hold their zeros in dense weights and mask the gradient once at the end (no product
with a mask in every evaluation), write the likelihood out, and keep a graph only where they need one. This library runs
`ContinuousFlow.log_prob` as a user would, and takes over the weights anew in every step, as after an optimizer's.
"""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import dataclass
from functools import partial
from typing import Callable, Iterable

import numpy
import torch
import torchdiffeq
from torch import Tensor, nn

from ..capture import capture_with_origins
from ..compiled_field import CompiledField
from ..flows import ContinuousFlow
from ..simplify import simplify
from .jax_field import JaxField
from .peers import AutogradDivergence, Contender
from .problems import Problem


@dataclass
class StepOutcome:
    """loss: mean negative log-likelihood in nats.  gradient: gives its gradient, see `TrainedEntries`.  nfe:
    evaluations of the field in the forward solve.  nfe_backward: those of a solve that the backward pass makes itself,
    None where it goes back through the forward one.  steps: accepted steps, None if unknown."""

    loss: float
    gradient: Callable[[], Tensor]
    nfe: int
    nfe_backward: int | None = None
    steps: int | None = None


StepRun = Callable[[], StepOutcome]


# ------------------------------------------------------------------------------------------------- what is compared


class TrainedEntries:
    """The entries that every contender trains: those of the simplified field that are a module's parameter each. Their
    gradients, in one order, from each contender's own layout."""

    def __init__(self, module: nn.Module, dim: int) -> None:
        captured, origins = capture_with_origins(module, dim)
        simplified, report = simplify(captured, origins)
        self._parameters = [name for name, _ in module.named_parameters()]
        starts, self._size = {}, 0
        for name, parameter in module.named_parameters():
            starts[name] = self._size
            self._size += parameter.numel()
        self._starts = starts
        self._matrices = {n: (layer.pattern.row, layer.pattern.col) for n, layer in enumerate(captured.layers)}
        # (layer of the captured field, tensor, its entries, those of the module)
        self._entries = []
        for number, original in enumerate(report.kept_layers):
            for name, _ in simplified.layers[number].tensors():
                source = origins.get((original, name))
                if source is None or not source.parameters:
                    continue
                kept = (report.kept_values if name == "values" else report.kept_rows)[original]
                plain = (source.parameter[kept] >= 0).nonzero()[:, 0]
                entries = kept[plain]
                offsets = torch.tensor([starts[parameter] for parameter in source.parameters])
                in_module = offsets[source.parameter[entries]] + source.index[entries]
                if not bool((source.scale[entries] == 1).all()):
                    raise ValueError("benchmark fields use their parameters as they are, not scaled")
                self._entries.append((original, name, entries, in_module))

    def of_module(self, gradients: dict[str, Tensor]) -> Tensor:
        """From the module's parameters: name -> gradient."""
        flat = torch.cat([gradients[name].reshape(-1) for name in self._parameters])
        return flat[torch.cat([in_module for *_, in_module in self._entries])]

    def of_captured(self, gradients: list[dict[str, Tensor]]) -> Tensor:
        """From the captured field's layers: tensor's name -> gradient; "weight" [out, in] for its values."""
        found = []
        for original, name, entries, _ in self._entries:
            if name == "values":
                row, col = self._matrices[original]
                found.append(gradients[original]["weight"][row[entries], col[entries]])
            else:
                found.append(gradients[original][name][entries])
        return torch.cat(found)

    def of_field(self, field: CompiledField) -> Tensor:
        """From the compiled field's parameters."""
        flat = torch.zeros(self._size, dtype=field.dtype)
        for name, held in field.held(lambda parameter: parameter.grad).items():
            flat[self._starts[name] + held.elements] = held.values
        return flat[torch.cat([in_module for *_, in_module in self._entries])]


def trainable(problem: Problem) -> nn.Module:
    return copy.deepcopy(problem.module).requires_grad_(True)


def relative_error(gradient: Tensor, reference: Tensor) -> float:
    """|gradient - reference| / |reference|, Euclidean norms over all parameters together."""
    return float((gradient.double() - reference).norm() / reference.norm())


# ---------------------------------------------------------------------------------------------- dense torch, autograd


def negative_log_likelihood(x: Tensor, l: Tensor) -> Tensor:
    """Mean of -log p over a batch, standard normal base: x [batch, dim] and l [batch] at the end time."""
    return (0.5 * (x * x).sum(1) + l).mean() + 0.5 * x.shape[1] * math.log(2 * math.pi)


def _torchdiffeq_step(problem: Problem, odeint: Callable, **settings) -> StepRun:
    module = trainable(problem)
    rhs = AutogradDivergence(module, problem.noise)
    state, times = problem.state(), problem.times
    entries = TrainedEntries(module, problem.spec.dim)
    masks = [(p, mask) for p in module.parameters() if not bool((mask := p.detach() != 0).all())]
    tolerances = {"rtol": problem.rtol, "atol": problem.atol, "method": "dopri5"}

    def run() -> StepOutcome:
        rhs.nfe = 0
        module.zero_grad(set_to_none=True)
        xs, ls = odeint(rhs, state, times, **tolerances, **settings)
        loss = negative_log_likelihood(xs[-1], ls[-1])
        nfe = rhs.nfe
        loss.backward()
        for parameter, mask in masks:
            parameter.grad.mul_(mask)
        gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
        backward = rhs.nfe - nfe if odeint is torchdiffeq.odeint_adjoint else None
        return StepOutcome(float(loss.detach()), partial(entries.of_module, gradients), nfe, backward)

    return run


def torchdiffeq_adjoint(problem: Problem) -> StepRun:
    return _torchdiffeq_step(problem, torchdiffeq.odeint_adjoint)


def torchdiffeq_seminorm(problem: Problem) -> StepRun:
    return _torchdiffeq_step(problem, torchdiffeq.odeint_adjoint, adjoint_options={"norm": "seminorm"})


def torchdiffeq_direct(problem: Problem) -> StepRun:
    return _torchdiffeq_step(problem, torchdiffeq.odeint)


def reference_gradient(problem: Problem) -> Tensor:
    """The gradient of the whole batch in float64: autograd through torchdiffeq's dopri8 at tolerance 1e-10, some rows
    at a time, which bounds the memory; each part has steps of its own."""
    batch = problem.x.shape[0]
    rows = min(batch, max(32, 100_000 // sum(problem.spec.hidden)))
    exact = problem.reference(batch)
    module = trainable(exact)
    for start in range(0, batch, rows):
        x = exact.x[start : start + rows]
        noise = None if exact.noise is None else exact.noise[start : start + rows]
        rhs = AutogradDivergence(module, noise)
        xs, ls = torchdiffeq.odeint(
            rhs, (x, x.new_zeros(len(x))), exact.times, rtol=exact.rtol, atol=exact.atol, method="dopri8"
        )
        (negative_log_likelihood(xs[-1], ls[-1]) * (len(x) / batch)).backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    return TrainedEntries(module, problem.spec.dim).of_module(gradients)


# ------------------------------------------------------------------------------------------------------- this library


def small_steps(parameters: Iterable[nn.Parameter]) -> Callable[[], None]:
    """Stands for an optimizer between two gradients: each call moves all values by less than their rounding, so that
    engines take over new ones, and the next call moves them back."""
    parameters, factors = list(parameters), itertools.cycle((1 + 2**-22, 1 - 2**-22))

    @torch.no_grad()
    def step() -> None:
        torch._foreach_mul_(parameters, next(factors))

    return step


def sparseflow_step(problem: Problem, engine: str = "auto") -> StepRun:
    module = trainable(problem)
    flow = ContinuousFlow(
        module, problem.spec.dim, divergence=problem.spec.divergence, rtol=problem.rtol, atol=problem.atol
    ).compile(engine)
    if problem.noise is not None:
        flow.noise = problem.noise  # the same probe for everybody
    entries = TrainedEntries(module, problem.spec.dim)
    (field,) = flow.vector_fields
    return step_of(flow, problem, small_steps(field.parameters()), lambda: entries.of_field(field))


def step_of(
    flow: ContinuousFlow, problem: Problem, move: Callable[[], None], gradient: Callable[[], Tensor]
) -> StepRun:  # fmt: skip
    """A step of a compiled flow: its parameters have moved, then the loss and its gradient."""

    def run() -> StepOutcome:
        move()
        flow.zero_grad(set_to_none=True)
        loss = -flow.log_prob(problem.x).mean()
        loss.backward()
        (stats,) = flow.stats.solves
        return StepOutcome(float(loss.detach()), gradient, stats.nfe, steps=stats.accepted)

    return run


# --------------------------------------------------------------------------------------------------------------- jax


_compiled: dict = {}  # compiling takes longer than all else: once for all keep ratios of a field


def diffrax_step(problem: Problem) -> Callable:
    """f(masks, *JaxField.arguments) -> (loss, steps, gradients), compiled when it is first called."""
    import jax

    own, constant = JaxField(problem), 0.5 * problem.spec.dim * math.log(2 * math.pi)

    def loss(weights, noise, start):
        (x, l), steps = own.solve(weights, noise, start)  # noqa: E741
        return (0.5 * (x * x).sum(1) + l).mean() + constant, steps

    @jax.jit
    def step(masks, weights, noise, start):
        (value, steps), gradients = jax.value_and_grad(loss, has_aux=True)(weights, noise, start)
        return value, steps, [(w * mask, *rest) for (w, *rest), mask in zip(gradients, masks)]

    return step


def diffrax_jit(problem: Problem) -> StepRun:
    """jit(value_and_grad) with diffrax's own choice of adjoint, RecursiveCheckpointAdjoint: exact for the steps taken,
    and at least three times quicker here than its DirectAdjoint. Compiled ahead of the timing."""
    import jax

    known = (problem.spec, problem.rtol, problem.atol)
    if known not in _compiled:
        _compiled[known] = diffrax_step(problem)
    step = _compiled[known]
    weights, noise, start = JaxField.arguments(problem)
    masks = [(w != 0).astype(w.dtype) for w, *_ in weights]
    entries = TrainedEntries(trainable(problem), problem.spec.dim)

    def run() -> StepOutcome:
        value, steps, gradients = jax.block_until_ready(step(masks, weights, noise, start))
        return StepOutcome(float(value), lambda: entries.of_captured(_tensors(gradients)), JaxField.evaluations(steps))

    return run


def _tensors(gradients) -> list[dict[str, Tensor]]:
    """Gradients of JaxField's weights under the names of a layer's tensors."""
    found = []
    for weight, bias, gate, shift in gradients:
        layer = {"weight": weight, "bias": bias}
        for name, part in (("gate", gate), ("shift", shift)):
            if part is not None:
                layer |= {f"{name}.slope": part[0], f"{name}.offset": part[1]}
        found.append({name: torch.from_numpy(numpy.array(value)) for name, value in layer.items()})
    return found


# -------------------------------------------------------------------------------------------------------- the register

BASELINE = Contender("torchdiffeq-adjoint", torchdiffeq_adjoint, remark="odeint_adjoint, eager, dense weights")
OURS = Contender("sparseflow", sparseflow_step)
PEERS = {
    contender.name: contender
    for contender in (
        Contender("torchdiffeq-direct", torchdiffeq_direct, remark="autograd through the solve, eager, dense weights"),
        Contender("torchdiffeq-seminorm", torchdiffeq_seminorm, remark="odeint_adjoint, parameters not in its norm"),
        Contender("diffrax", diffrax_jit, ("diffrax", "jax"), "jit(value_and_grad), dense weights, shared steps"),
        Contender("reference-engine", partial(sparseflow_step, engine="reference"), remark="ours in plain torch"),
    )
}
