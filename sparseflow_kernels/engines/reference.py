"""The reference engine: plain PyTorch on dense weights. It defines what a field, its divergence and a solve mean; every
other engine is tested against it. The divergence is the Jacobian's diagonal by forward tangents, not an identity.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Callable, ClassVar, Collection, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import activations
from ..divergence import DivergencePlan
from ..field import Layer, TimeFunction, UnsupportedFieldError, VectorField
from ..numerics.adaptive import solve_request
from .base import Engine, Gradient, SolveRequest, SolveResult

TANGENT_ELEMENTS = 1 << 22  # largest tangent block [batch, columns, width]; wider Jacobians go in several column blocks


class ReferenceEngine(Engine):
    """float32 and float64, CPU and GPU, any field. Autograd flows through `evaluate`, `evaluate_with_divergence` and
    `solve` to the state, the time, the noise and every tensor of the field."""

    name: ClassVar[str] = "reference"
    differentiable: ClassVar[bool] = True

    @staticmethod
    def unsupported(field: VectorField) -> str | None:
        if not field.dtype.is_floating_point:
            return f"the field's dtype is {field.dtype}, not floating point; convert the module first"
        for layer in field.layers:
            try:
                activations.rule_and_params(layer.activation)
            except UnsupportedFieldError as error:
                return f"layer {layer.name!r}: {error}"
        return None

    def __init__(self, field: VectorField, plan: DivergencePlan | None = None) -> None:
        self.field = field
        self.plan = plan
        self._packed: list[Tensor] | None = None  # dense weights without a graph

    def _weights(self) -> list[Tensor]:
        """Dense weights; under grad they are made anew at each call, because their graph belongs to one backward."""
        if torch.is_grad_enabled() and any(layer.values.requires_grad for layer in self.field.layers):
            return [layer.weight for layer in self.field.layers]
        if self._packed is None:
            with torch.no_grad():
                self._packed = [layer.weight for layer in self.field.layers]
        return self._packed

    def evaluate(self, t: Tensor | float, y: Tensor) -> Tensor:
        with own_precision(y):
            return self._forward(self._weights(), t, y)[0]

    def evaluate_with_divergence(
        self, t: Tensor | float, x: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if self.plan is None:
            raise ValueError("evaluate_with_divergence: this engine was packed without a divergence plan")
        with own_precision(x):
            return self._with_divergence(self._weights(), t, x, noise)

    def solve(self, request: SolveRequest) -> SolveResult:
        weights = self._weights()

        def f(t: Tensor | float, x: Tensor) -> tuple[Tensor, Tensor | None]:
            if self.plan is None:
                return self._forward(weights, t, x)[0], None
            dx, trace = self._with_divergence(weights, t, x, request.noise)
            return dx, -trace

        with own_precision(request.x):
            return SolveResult(**vars(solve_request(request, f)))

    # ------------------------------------------------------------------------------------------------- gradients

    def no_gradient(self, wanted: Collection[str], request: SolveRequest | None = None) -> None:
        return None

    def tensors(self) -> list[Tensor]:
        """What the tensors of this engine's Gradients belong to: the field's, in the order of `VectorField.tensors()`,
        then the parameters of its functions of time (each once), which no other engine can reach."""
        functions = {
            id(parameter): parameter for _, _, module in _time_modules(self.field) for parameter in module.parameters()
        }
        return [tensor for _, tensor in self.field.tensors()] + list(functions.values())

    def evaluate_backward(
        self, t: Tensor | float, x: Tensor, noise: Tensor | None, grad_f: Tensor, grad_trace: Tensor | None,
        wanted: Collection[str], graph: bool = False,
    ) -> Gradient:  # fmt: skip
        """Engine.evaluate_backward by autograd. graph: the gradient can be differentiated in its turn."""

        def run(engine: ReferenceEngine, t: Tensor, x: Tensor, noise: Tensor | None) -> tuple[Tensor, ...]:
            return (engine.evaluate(t, x),) if self.plan is None else engine.evaluate_with_divergence(t, x, noise)

        t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
        return self._pull_back(run, {"t": t, "x": x, "noise": noise}, (grad_f, grad_trace), wanted, graph)

    def solve_backward(
        self, request: SolveRequest, result: SolveResult, grad_xs: Tensor, grad_ls: Tensor | None,
        wanted: Collection[str], graph: bool = False,
    ) -> Gradient:  # fmt: skip
        """Engine.solve_backward by autograd through the recorded steps, taken again. graph: as in evaluate_backward.
        Only `steps` is read of the result."""

        def run(engine: ReferenceEngine, **inputs: Tensor | None) -> tuple[Tensor, Tensor | None]:
            again = engine.solve(replace(request, replay=result.steps, record=False, **inputs))
            return again.xs, again.ls

        inputs = {name: getattr(request, name) for name in ("x", "l", "times", "grid", "noise")}
        return self._pull_back(run, inputs, (grad_xs, grad_ls), wanted, graph)

    def _pull_back(
        self, run: Callable[..., tuple[Tensor | None, ...]], inputs: dict[str, Tensor | None],
        grads: Sequence[Tensor | None], wanted: Collection[str], graph: bool,
    ) -> Gradient:  # fmt: skip
        """The gradient of sum(grads * run(engine, **inputs)). It is taken on stand-ins, which gradients stop at: an
        input's own dependence on another one is not counted here."""

        def stand_in(tensor: Tensor | None, want: bool) -> Tensor | None:
            if tensor is None:
                return None
            if graph and tensor.requires_grad:
                return tensor.view_as(tensor)
            # a leaf; requires_grad_ is refused under torch.func, where a vmap over cotangents may bring us
            return Tensor._make_subclass(Tensor, tensor.detach(), want)

        with torch.enable_grad(), own_precision(inputs["x"]):
            lent = {name: stand_in(tensor, name in wanted) for name, tensor in inputs.items()}
            tensors = [stand_in(tensor, "tensors" in wanted) for tensor in self.tensors()]
            outputs = run(self.over(tensors), **lent)
            pairs = [
                (out, grad) for out, grad in zip(outputs, grads)
                if out is not None and grad is not None and out.requires_grad
            ]  # fmt: skip
            named = [name for name in lent if name in wanted and lent[name] is not None]
            targets = [lent[name] for name in named] + (tensors if "tensors" in wanted else [])
            if pairs:
                found = torch.autograd.grad(
                    [out for out, _ in pairs], targets, [grad for _, grad in pairs],
                    create_graph=graph, allow_unused=True,
                )
            else:
                found = (None,) * len(targets)
        return Gradient(tensors=tuple(found[len(named) :]), **dict(zip(named, found)))

    def over(self, tensors: Sequence[Tensor]) -> "ReferenceEngine":
        """This engine over other tensors, in the order of `tensors()`."""
        others = {id(own): other for own, other in zip(self.tensors(), tensors)}
        given = iter(tensors)
        field = self.field.map_tensors(lambda _: next(given))  # which visits them in that order
        for number, kind, module in _time_modules(self.field):
            part = getattr(field.layers[number], kind)
            setattr(field.layers[number], kind, TimeFunction(lent(module, others), part.rows))
        return ReferenceEngine(field, self.plan)

    # ------------------------------------------------------------------------------------------------- the formulas

    def _forward(self, weights: Sequence[Tensor], t: Tensor | float, y: Tensor) -> tuple[Tensor, list[tuple]]:
        """(f(t, y), [(s_l or None, z_l) of every layer])."""
        t = torch.as_tensor(t, dtype=y.dtype, device=y.device)
        trail = []
        for layer, weight in zip(self.field.layers, weights):
            y, scale, z = layer_output(layer, weight, t, y)
            trail.append((scale, z))
        return y, trail

    def _with_divergence(
        self, weights: Sequence[Tensor], t: Tensor | float, x: Tensor, noise: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Tangents [batch, columns, n_l] run beside the primal: all unit vectors, or the one noise vector."""
        dx, trail = self._forward(weights, t, x)
        slopes = [
            activations.derivative(layer.activation, z) for layer, (_, z) in zip(self.field.layers[:-1], trail)
        ] + [None]

        def push(tangent: Tensor) -> Tensor:
            for weight, (scale, _), slope in zip(weights, trail, slopes):
                tangent = functional.linear(tangent, weight)
                tangent = tangent if scale is None else scale * tangent
                tangent = tangent if slope is None else slope[:, None, :] * tangent
            return tangent

        if self.plan.kind == "hutchinson":
            if noise is None:
                raise ValueError('evaluate_with_divergence: a "hutchinson" divergence needs noise [batch, dim]')
            return dx, (noise * push(noise[:, None, :])[:, 0]).sum(1)
        widest = max(len(x), 1) * max(1, *(layer.out_features for layer in self.field.layers))
        units = torch.eye(self.field.dim, dtype=x.dtype, device=x.device)
        trace = x.new_zeros(len(x))
        for block in units.split(max(1, TANGENT_ELEMENTS // widest)):
            # one [1, columns, dim] for the whole batch: the first product is shared until a slope tells samples apart
            trace = trace + (push(block[None]) * block).sum((1, 2))
        return dx, trace


def layer_output(layer: Layer, weight: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """(act(z), s or None, z = s(t) * (W y + b) + c(t)) of one layer."""
    scale, shift = layer.modulation(t)
    z = functional.linear(y, weight, layer.bias)
    z = z if scale is None else scale * z
    z = z if shift is None else z + shift
    return activations.apply(layer.activation, z), scale, z


def _time_modules(field: VectorField) -> list[tuple[int, str, nn.Module]]:
    """(layer number, "gate" or "shift", module) of every function of time that is a module."""
    return [
        (number, kind, part.function)
        for number, layer in enumerate(field.layers)
        for kind, part in (("gate", layer.gate), ("shift", layer.shift))
        if isinstance(part, TimeFunction) and isinstance(part.function, nn.Module)
    ]


def lent(module: nn.Module, others: dict[int, Tensor]) -> Callable[[Tensor], Tensor]:
    """A module called with others, by id, in place of its parameters."""
    return _Lent(module, {name: others[id(parameter)] for name, parameter in module.named_parameters()})


class _Lent:
    """A module called with other tensors in place of its parameters."""

    def __init__(self, module: nn.Module, parameters: dict[str, Tensor]) -> None:
        self._module, self._parameters = module, parameters

    def __call__(self, t: Tensor) -> Tensor:
        return torch.func.functional_call(self._module, self._parameters, (t,))


def is_autocast_enabled(like: Tensor) -> bool:
    """On this tensor's device."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():  # quick, but not for tracing
        return False
    kind = like.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def own_precision(like: Tensor) -> contextlib.AbstractContextManager:
    """Autocast off: a field computes in its own dtype, as native engines do."""
    return torch.autocast(like.device.type, enabled=False) if is_autocast_enabled(like) else contextlib.nullcontext()
