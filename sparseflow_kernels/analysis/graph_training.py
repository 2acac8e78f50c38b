"""Training steps of the graph problems: a loss (`GraphSpec.loss`) and its gradient in all parameters, and in the first state
where an encoder would want it. As in `training_peers`: no optimizer, dense weights without masks but one product with the
gradient at the end, and this library takes over the weights anew in every step.

The baseline goes back through the solve by autograd: torchdiffeq's default, and the quicker for these fields.
Where the loss has no solve (a time for every sample) the baseline is autograd alone.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Callable

import torch
import torchdiffeq
from torch import Tensor, nn

from ..compiled_field import CompiledField
from ..divergence_field import with_divergence
from ..field import GraphField
from ..odeint import solve
from .floor import Work
from .graph_floor import GraphWork
from .graph_jax import JaxGraph
from .graph_problems import GraphProblem
from .peers import Contender, compiled, right_hand_side
from .training_peers import StepOutcome, StepRun, negative_log_likelihood, small_steps, trainable


def _mean_square(found: Any, target: Any) -> Any:
    difference = found - target
    return (difference * difference).mean()


def _loss(problem: GraphProblem, ys: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    if problem.spec.loss == "likelihood":
        xs, ls = ys
        return negative_log_likelihood(xs[-1], ls[-1])
    return _mean_square(ys[1:].swapaxes(0, 1), problem.target)


class _Trained:
    """What a step's gradient is compared on: the parameters' entries that the compiled field holds, and the first state."""

    def __init__(self, problem: GraphProblem) -> None:
        self._shapes = {name: p.shape for name, p in problem.module.named_parameters()}
        held = {name: one.elements for name, one in compiled(problem).held().items()}
        self._elements = {
            name: torch.arange(shape.numel()) if held[name] is None else held[name]
            for name, shape in self._shapes.items() if name in held
        }  # fmt: skip

    def of_module(self, gradients: dict[str, Tensor | None], first: Tensor | None = None) -> Tensor:
        """From the module's parameters: name -> gradient, None where nothing reads one."""
        parts = []
        for name, elements in self._elements.items():
            gradient = gradients[name]
            parts.append(torch.zeros(len(elements)) if gradient is None else gradient.reshape(-1)[elements].double())
        return torch.cat(parts + ([] if first is None else [first.reshape(-1).double()]))

    def of_field(self, field: CompiledField, first: Tensor | None = None) -> Tensor:
        held = field.held(lambda p: torch.zeros_like(p) if p.grad is None else p.grad)
        parts = [held[name].take(elements).double() for name, elements in self._elements.items()]
        return torch.cat(parts + ([] if first is None else [first.reshape(-1).double()]))


def _first_state(problem: GraphProblem) -> tuple[Tensor, Tensor | None]:
    """(the first x, itself where its gradient is wanted)."""
    if problem.spec.loss != "distance":
        return problem.x, None
    x = problem.x.clone().requires_grad_()
    return x, x


def _state(problem: GraphProblem, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    return x if problem.spec.divergence is None else (x, x.new_zeros(len(x)))


def _gradient_of(first: Tensor | None) -> Tensor | None:
    return None if first is None else first.grad


# ---------------------------------------------------------------------------------------------- dense torch, autograd


def _torch_step(problem: GraphProblem, loss_of: Callable[[nn.Module, Tensor], tuple[Tensor, int, Callable]]) -> StepRun:
    """loss_of(module, x) -> (loss, evaluations, how many the backward pass has made by then)."""
    module, trained = trainable(problem), _Trained(problem)
    # only matrices are pruned: a bias of LayerNorm starts at zero
    masks = [(p, mask) for p in module.parameters() if p.dim() > 1 and not bool((mask := p.detach() != 0).all())]
    x, first = _first_state(problem)

    def run() -> StepOutcome:
        module.zero_grad(set_to_none=True)
        x.grad = None
        loss, nfe, backward = loss_of(module, x)
        loss.backward()
        for parameter, mask in masks:
            if parameter.grad is not None:
                parameter.grad.mul_(mask)
        gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
        return StepOutcome(float(loss.detach()), partial(trained.of_module, gradients, _gradient_of(first)), nfe, backward())

    return run


def _through(problem: GraphProblem, odeint: Callable) -> StepRun:
    settings = {"rtol": problem.rtol, "atol": problem.atol, "method": "dopri5"}

    def loss_of(module: nn.Module, x: Tensor) -> tuple[Tensor, int, Callable]:
        rhs = right_hand_side(problem, module)
        loss = _loss(problem, odeint(rhs, _state(problem, x), problem.times, **settings))
        nfe, anew = rhs.nfe, odeint is torchdiffeq.odeint_adjoint
        return loss, nfe, lambda: rhs.nfe - nfe if anew else None

    return _torch_step(problem, loss_of)


def torchdiffeq_direct(problem: GraphProblem) -> StepRun:
    return _through(problem, torchdiffeq.odeint)


def torchdiffeq_adjoint(problem: GraphProblem) -> StepRun:
    return _through(problem, torchdiffeq.odeint_adjoint)


def torch_matching(problem: GraphProblem) -> StepRun:
    def loss_of(module: nn.Module, x: Tensor) -> tuple[Tensor, int, Callable]:
        return _mean_square(module(problem.sample_times, x), problem.target), 1, lambda: None

    return _torch_step(problem, loss_of)


def reference_gradient(problem: GraphProblem) -> Tensor:
    """The gradient of the whole batch in float64: autograd through torchdiffeq's dopri8 at tolerance 1e-10, some samples
    at a time, which bounds the memory; each part has steps of its own."""
    batch, rows = problem.x.shape[0], 64
    exact, trained = problem.reference(batch), _Trained(problem)
    module = trainable(exact)
    x, first = _first_state(exact)
    if problem.spec.loss == "matching":
        _mean_square(module(exact.sample_times, x), exact.target).backward()
    else:
        for start in range(0, batch, rows):
            part = exact.rows(start, start + rows)
            rhs, here = right_hand_side(part, module), x[start : start + rows]
            ys = torchdiffeq.odeint(
                rhs, _state(part, here), part.times, rtol=part.rtol, atol=part.atol, method="dopri8"
            )
            (_loss(part, ys) * (len(here) / batch)).backward()
    return trained.of_module({name: p.grad for name, p in module.named_parameters()}, _gradient_of(first))


# ------------------------------------------------------------------------------------------------------- this library


def sparseflow_step(problem: GraphProblem, engine: str = "auto") -> StepRun:
    spec, trained = problem.spec, _Trained(problem)
    field = compiled(problem, engine, trainable(problem))
    parameters = list(field.parameters())
    step = small_steps(parameters)
    x, first = _first_state(problem)
    rhs = field if spec.divergence is None else with_divergence(field, spec.divergence, problem.noise)
    settings = {"rtol": problem.rtol, "atol": problem.atol, "method": "dopri5"}

    def run() -> StepOutcome:
        step()
        x.grad = None
        for parameter in parameters:
            parameter.grad = None
        if spec.loss == "matching":
            loss, nfe, steps = _mean_square(field(problem.sample_times, x), problem.target), 1, 0
        else:
            solution = solve(rhs, _state(problem, x), problem.times, **settings)
            loss, nfe, steps = _loss(problem, solution.ys), solution.stats.nfe, solution.stats.accepted
        loss.backward()
        return StepOutcome(float(loss.detach()), lambda: trained.of_field(field, _gradient_of(first)), nfe, steps=steps)

    return run


def floor(problem: GraphProblem, field: CompiledField, outcome: StepOutcome) -> float | None:
    """Seconds of arithmetic: every evaluation forwards; six stages of every accepted step turned back, and the first
    derivative of all, or the one evaluation that there is."""
    if outcome.steps is None:
        return None
    found, kind, matching = field.vector_field, problem.spec.divergence, problem.spec.loss == "matching"
    plan = None if kind is None else field.divergence_plan(kind)
    if isinstance(found, GraphField):
        works = (GraphWork.of(found, plan, matching), GraphWork.of_gradient(found, plan, matching))
    else:
        works = (Work.of(found, plan), Work.of_gradient(found, plan))
    floors = [None if work is None else work.floor(problem.x.shape[0]) for work in works]
    if None in floors:
        return None
    return outcome.nfe * floors[0] + (6 * outcome.steps + 1) * floors[1]


# --------------------------------------------------------------------------------------------------------------- jax


def _jax_step(problem: GraphProblem) -> StepRun:
    """jit(value_and_grad), through a solve with diffrax's own choice of adjoint. Compiled ahead of the timing."""
    import jax
    import numpy

    own, trained, spec = JaxGraph(problem), _Trained(problem), problem.spec
    weights, noise, start = JaxGraph.arguments(problem)
    names = {name for name, _ in problem.module.named_parameters()}
    fixed = {name: value for name, value in weights.items() if name not in names}
    weights = {name: value for name, value in weights.items() if name in names}
    masks = {name: ((value != 0) | (value.ndim < 2)).astype(value.dtype) for name, value in weights.items()}
    target, times = problem.target.numpy(), problem.sample_times.numpy()

    def loss(weights, start, fixed, noise, target, times):
        everything = {**weights, **fixed}
        if spec.loss == "matching":
            return _mean_square(own.field(everything, times, start[0]), target), 0
        ys, steps = own.outputs(everything, noise, start)
        if spec.loss == "likelihood":
            xs, ls = ys
            return negative_log_likelihood(xs[-1], ls[-1]), steps
        return _mean_square(ys[0][1:].swapaxes(0, 1), target), steps

    @jax.jit
    def step(masks, *arguments):
        (value, steps), (of_weights, of_start) = jax.value_and_grad(loss, (0, 1), has_aux=True)(*arguments)
        return value, steps, jax.tree.map(lambda w, mask: w * mask, of_weights, masks), of_start[0]

    def run() -> StepOutcome:
        value, steps, gradients, of_start = jax.block_until_ready(step(masks, weights, start, fixed, noise, target, times))

        def gradient() -> Tensor:
            found = {name: torch.from_numpy(numpy.array(value)) for name, value in gradients.items()}
            first = torch.from_numpy(numpy.array(of_start)) if spec.loss == "distance" else None
            return trained.of_module(found, first)

        return StepOutcome(float(value), gradient, 1 if spec.loss == "matching" else own.evaluations(steps))

    return run


# -------------------------------------------------------------------------------------------------------- the register

BASELINE = Contender("torchdiffeq-direct", torchdiffeq_direct, remark="autograd through the solve, eager, dense weights")
MATCHING_BASELINE = Contender("torch", torch_matching, remark="autograd, eager, dense weights; no solve")
OURS = Contender("sparseflow", sparseflow_step)
_REFERENCE = Contender("reference-engine", partial(sparseflow_step, engine="reference"), remark="ours in plain torch")
PEERS = {
    "torchdiffeq-adjoint": Contender("torchdiffeq-adjoint", torchdiffeq_adjoint, remark="odeint_adjoint, eager, dense weights"),
    "diffrax": Contender("diffrax", _jax_step, ("diffrax", "jax"), "jit(value_and_grad), dense weights, shared steps"),
    "reference-engine": _REFERENCE,
}
MATCHING_PEERS = {
    "diffrax": Contender("jax", _jax_step, ("jax",), "jit(value_and_grad), dense weights; no solve"),
    "reference-engine": _REFERENCE,
}
