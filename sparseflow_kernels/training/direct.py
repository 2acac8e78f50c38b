"""A training step of a compiled model without autograd between its solves.

For nets of some hundred weights most of a step was Python: autograd's bookkeeping, arguments checked anew and wrappers
made for every solve, and values compared with those that were packed. Here the request of a solve is made once, engines
of its own take the parameters over at every step, their solves and gradients are called one after the other, and the
loss at the end of the interval is differentiated by its formula. What is computed is what
`row_nll(...).backward()` computes; a model that this does not fit is trained that way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..compiled_field import CompiledField
from ..devices import factories_on_cpu
from ..divergence_field import DivergenceField
from ..engines import choose
from ..engines.base import Engine, SolveRequest, SolveResult
from ..field import GraphField, VectorField
from ..flows import ContinuousFlow, ImageFlow, NeuralClassifier, NeuralODE
from ..hooks import is_hooked
from ..solution import SolverError
from ..solving.arguments import upward
from ..solving.engine_call import EngineCall, request_of


@dataclass
class _Solved:
    engine: Engine
    tensors: list[Tensor]
    request: SolveRequest
    result: SolveResult
    done: Tensor | None  # what the rows before left behind (`NeuralODE._enter`)


class DirectGradient:
    """The mean loss of a model and its gradient, which is added to the `grad` of the parameters (these must be
    there)."""

    def __init__(self, model: NeuralODE, template: SolveRequest, engines: list[Engine]) -> None:
        self.model, self.template, self.engines = model, template, engines
        self.kind = model.divergence if isinstance(model, ContinuousFlow) else None
        noise = model.noise if self.kind == "hutchinson" else None
        self.probes = [
            None if self.kind is None else DivergenceField(field, self.kind, noise) for field in model.vector_fields
        ]
        self.made: list[tuple] = [(None, []) for _ in model.vector_fields]  # a field, its tensors

    @classmethod
    @factories_on_cpu
    def of(cls, model: NeuralODE) -> "DirectGradient | None":
        """None for a model that only autograd can differentiate: fields that are not compiled for an engine with
        gradients of its own, bases of their own, norms, penalties, callables among the solver's options, end times that
        are trained on a fixed grid, the adjoint's gradient."""
        flow = isinstance(model, ContinuousFlow)
        if type(model) not in (ContinuousFlow, ImageFlow, NeuralClassifier) or model.gradient != "discrete":
            return None  # a class of the user's may have a loss of its own
        if model.norms is not None or (flow and (model.base or model.penalties)):
            return None
        fields = list(model.vector_fields)
        if not all(isinstance(field, CompiledField) for field in fields) or len(set(map(id, fields))) < len(fields):
            return None
        if any(field.live or field.has_context or field._masked for field in fields):
            return None
        if any(field.layout is not None and (field.layout.is_tuple or not field.layout.batched) for field in fields):
            return None
        if is_hooked(model):  # which would not be called
            return None
        like = next(model.parameters())
        if like.device.type != "cpu":  # a GPU's step waits for other things than Python
            return None
        t = torch.tensor([model.t0, model.t1], dtype=like.dtype)
        kind, engines = model.divergence if flow else None, []
        for field in fields:
            x = torch.zeros((1, field.dim), dtype=like.dtype, device=like.device)
            y = x if field.layout is None else field.layout.unflatten(x)
            func, state = (DivergenceField(field, kind), (y, x[:, 0])) if flow else (field, y)
            method = "dopri5" if model.method is None else model.method
            call = EngineCall.make(func, state, t, model.rtol, model.atol, method, dict(model.options or {}), "shared")
            if isinstance(call, str) or call.options.get("grid_constructor") is not None:
                return None
            times, sign = upward(t, like.device)
            template = request_of(
                x, x[:, 0] if flow else None, None, t, times, sign, call.rtol, call.atol, call.method, call.options
            )
            template = replace(template, record=True)
            engine = _packed(field, kind, field._live_field())
            engines.append(engine)
            if engine.differentiable or engine.no_gradient(_wanted(model), template) is not None:
                return None
            if model.sqrt_end_time is not None and template.grid is not None:  # which moves with the end
                return None
        return cls(model, template, engines)

    @factories_on_cpu
    def __call__(self, x: Tensor, labels: Tensor | None = None) -> tuple[float, int]:
        """(mean loss of the rows x [n, dim], evaluations of the fields). Raises SolverError for a solve that cannot go
        on; gradients are then as they were, and so they are for a loss that is not finite."""
        with torch.no_grad():
            solved: list[_Solved] = []
            x, change = self.model._begin(x)
            for number, (field, probe) in enumerate(zip(self.model.vector_fields, self.probes)):
                with torch.enable_grad():  # what is made of parameters
                    engine, tensors = self._engine(number, field)
                x, done = self.model._enter(number, x)
                noise = None if probe is None else probe.begin_solve(x)
                x, noise = _rows(field, x), None if noise is None else _rows(field, noise)
                request = replace(self.template, x=x, l=change, noise=noise, times=self._times(number))
                result = engine.solve(request)
                if result.status != "ok":
                    parts = (result.xs,) if result.ls is None else (result.xs, result.ls)
                    raise SolverError.of(result, request, parts, change is not None)
                solved.append(_Solved(engine, tensors, request, result, done))
                x, change = _laid_out(field, result.xs[-1]), None if change is None else result.ls[-1]
            ends = [one.done for one in solved if one.done is not None]
            value, grads, grad_l = self._loss([*ends, x], change, labels)
            nfe = sum(one.result.nfe for one in solved)
            if math.isfinite(value):
                grad_x = grads.pop()
                for number, one in reversed(list(enumerate(solved))):
                    grad_x, grad_l = self._backward(number, one, grad_x, grad_l)
                    grad_x = self.model._leave(number, grad_x, None if one.done is None else grads.pop())
            return value, nfe

    def _times(self, number: int) -> Tensor:
        """Of a solve, upwards."""
        if self.model.sqrt_end_time is None:
            return self.template.times
        times = self.model._times(number, self.model.sqrt_end_time[number])
        return upward(times, times.device)[0]

    def _engine(self, number: int, field: CompiledField) -> tuple[Engine, list[Tensor]]:
        """(an engine that holds the present values, the field's tensors, with a graph where they are made of
        others)."""
        made = field._live_field()  # with a graph of its own where tensors are derived
        engine = self.engines[number]
        if not engine.update(made):
            engine = self.engines[number] = _packed(field, self.kind, made)
        if made is not self.made[number][0]:
            self.made[number] = made, [tensor for _, tensor in made.tensors()]
        return engine, self.made[number][1]

    def _backward(
        self, number: int, one: _Solved, grad_x: Tensor, grad_l: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Add the gradient of a solve to the parameters'; (the cotangents of its start)."""
        field = self.model.vector_fields[number]
        grad_x = _rows(field, grad_x)
        grad_xs = torch.stack((torch.zeros_like(grad_x), grad_x))
        grad_ls = None if grad_l is None else torch.stack((torch.zeros_like(grad_l), grad_l))
        found = one.engine.solve_backward(one.request, one.result, grad_xs, grad_ls, _wanted(self.model))
        trained = [(tensor, gradient) for tensor, gradient in zip(one.tensors, found.tensors) if tensor.requires_grad]
        own = [(tensor.grad, gradient) for tensor, gradient in trained if tensor.is_leaf]
        if own:
            torch._foreach_add_(*map(list, zip(*own)))
        if len(own) < len(trained):
            torch.autograd.backward(*zip(*(pair for pair in trained if not pair[0].is_leaf)))
        if self.model.sqrt_end_time is not None and (root := self.model.sqrt_end_time[number]).requires_grad:
            root.grad += 2.0 * root.detach() * found.times[-1].to(root)
        return _laid_out(field, found.x), found.l

    def _loss(
        self, parts: list[Tensor], change: Tensor | None, labels: Tensor | None
    ) -> tuple[float, list[Tensor], Tensor | None]:
        """(mean loss, its gradient by the parts of the end [n, ...], and by the log-density channel [n])."""
        n = len(parts[0])
        if change is not None:  # 0.5 |z|^2 + dim/2 log 2 pi + l
            value = float(sum(0.5 * part.square().sum() for part in parts) + change.sum()) / n
            grads = [part / n for part in parts]
            return value + 0.5 * self.model.dim * math.log(2.0 * math.pi), grads, torch.full_like(change, 1.0 / n)
        (x,) = parts
        logs = x.log_softmax(1)
        chosen = labels.unsqueeze(1)
        gradient = logs.exp() / n
        gradient.scatter_add_(1, chosen, gradient.new_full((n, 1), -1.0 / n))
        return -float(logs.gather(1, chosen).sum()) / n, [gradient], None


def _wanted(model: NeuralODE) -> frozenset[str]:
    """What is asked of a gradient."""
    return frozenset(("x", "l", "tensors") if model.sqrt_end_time is None else ("x", "l", "tensors", "times"))


def _rows(field: CompiledField, x: Tensor) -> Tensor:
    return x if field.layout is None else field.layout.flatten(x).contiguous()


def _laid_out(field: CompiledField, rows: Tensor) -> Tensor:
    return rows if field.layout is None else field.layout.unflatten(rows)


@torch.no_grad()
def _packed(field: CompiledField, kind: str | None, made: VectorField | GraphField) -> Engine:
    """An engine of this step's own: it takes values over without asking whether they changed."""
    plan = None if kind is None else field.divergence_plan(kind)
    return choose(made, field.requested)[0](made, plan)
