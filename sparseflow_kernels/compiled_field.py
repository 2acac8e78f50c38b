"""The door users come through: a module compiled to a field (`compile`), and a field with its divergence.

Both are nn.Modules that go wherever the original `f(t, y)` went. Values come from the chosen engine, gradients as
`gradients` says.
"""

from __future__ import annotations

import copy
import operator
from typing import Any, Callable, Iterator, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from . import gradients, operators
from .capture import Sources, capture_with_sources, write_back
from .devices import factories_on_cpu
from .divergence import DivergencePlan
from .engines import choose
from .engines.base import Engine
from .engines.reference import ReferenceEngine, is_autocast_enabled, layer_output, own_precision
from .field import Layer, LinearShift, SigmoidGate, TimeFunction, VectorField
from .packing import Packing
from .simplify import simplify

KINDS = ("exact", "hutchinson")
NOISES = ("rademacher", "gaussian")

_GLOBAL_HOOKS = (
    nn_module._global_forward_hooks, nn_module._global_forward_pre_hooks, nn_module._global_backward_hooks,
    nn_module._global_backward_pre_hooks,
)  # fmt: skip


def hooks_of(module: nn.Module) -> tuple[dict, ...]:
    """The dicts that hold the hooks of a module's calls and of their gradients; they live as long as the module."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


@factories_on_cpu
def compile(  # noqa: A001 (the field's own word; the builtin is not needed here)
    module_or_field: nn.Module | VectorField, engine: str = "auto", dim: int | None = None
) -> "CompiledField":
    """Read the program out of a module `f(t, y)`, simplify it exactly and hand it to an engine.

    module_or_field: a module whose forward is a chain of linear layers, functions of t and activations (`capture`); a
    VectorField; or a CompiledField, to compile its current values again (after pruning them, or for another engine).
    engine: "auto" (by device and fit), "reference", "cpu", "cuda", "triton".  dim: size of the state, where capture cannot tell.

    The result keeps the module's dtype and device and shares no memory with it. What the module does not have (a bias
    left out, a masked entry of a bias) is not trained either: its gradient is zero, or `requires_grad` False.

    Raises UnsupportedFieldError for what cannot be expressed, or not run by the engine asked for; ValueError for an
    unknown engine or a `dim` that does not fit; TypeError for other objects.
    """
    if isinstance(module_or_field, CompiledField):
        field = module_or_field.vector_field
        frozen = module_or_field.frozen_entries()
    elif isinstance(module_or_field, VectorField):
        field, frozen = module_or_field, {}
    else:
        field, sources = capture_with_sources(module_or_field, dim)
        frozen = _absent_entries(field, sources, dict(module_or_field.named_parameters()))
    if dim is not None and field.dim != dim:
        raise ValueError(f"compile: dim is {dim}, but the field's state has {field.dim} components")
    simplified, report = simplify(field.map_tensors(torch.Tensor.detach))
    kept_frozen = {}
    for number, original in enumerate(report.kept_layers):
        for name, tensor in simplified.layers[number].tensors():
            if (original, name) in frozen:
                kept = (report.kept_values if name == "values" else report.kept_rows)[original]
                kept_frozen[number, name] = frozen[original, name][kept]
    return CompiledField(simplified, engine, frozen=kept_frozen, simplification=str(report))


def _absent_entries(
    field: VectorField, sources: Sources, parameters: dict[str, nn.Parameter]
) -> dict[tuple[int, str], Tensor]:
    """bool masks of the entries that are not trained: zero because the module has nothing there (a bias left out, a
    masked weight of the time), or parameters that require no grad. Entries computed from parameters in other ways are
    not among them, unless no parameter of the module requires grad."""
    untrained = bool(parameters) and not any(parameter.requires_grad for parameter in parameters.values())
    absent = {}
    for number, layer in enumerate(field.layers):
        for name, tensor in layer.tensors():
            source, none = sources.get((number, name)), (tensor == 0).cpu()
            if untrained:
                none = torch.ones_like(none)
            elif source is not None:
                fixed = torch.tensor([not parameters[name].requires_grad for name in source.parameters] + [False])
                none = torch.where(source.parameter < 0, none, fixed[source.parameter])
            elif not bool(none.all()):
                continue
            if bool(none.any()):
                absent[number, name] = none
    return absent


def _zeroing(mask: Tensor) -> Callable[[Tensor], Tensor]:
    """A hook that zeroes the gradient under the mask, which goes to the gradient's device once, not every time."""

    def hook(grad: Tensor) -> Tensor:
        nonlocal mask
        here = mask.to(grad.device)
        if not torch.compiler.is_compiling():  # what is copied there has no values
            mask = here
        return grad.masked_fill(here, 0)

    return hook


class _LayerParameters(nn.Module):
    """One layer's tensors as parameters: values, bias, gate.slope, gate.offset, shift.slope, shift.offset; and the
    modules of its functions of time."""

    def __init__(self, tensors: dict[str, Tensor], functions: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            owner, _, leaf = name.rpartition(".")
            if owner and owner not in self._modules:
                self.add_module(owner, nn.Module())
            target = self.get_submodule(owner)
            with torch.inference_mode(False):  # a field compiled there is a field elsewhere
                target.register_parameter(leaf, nn.Parameter(tensor.detach().clone()))
        for name, function in functions.items():
            self.add_module(name, function)

    def forward(self, t: Tensor, h: Tensor, layer: Layer) -> Tensor:
        """The layer's output, for those who hook it; engines do not come here."""
        return layer_output(layer, layer.weight, t, h)[0]


class CompiledField(nn.Module):
    """A compiled vector field, `field(t, y) -> dy/dt`. Made by `compile`.

    Its parameters are the remaining weights (`layers.<l>.values`, in CSR order of the layer's pattern), biases and time
    parameters, so an optimizer holds state for nothing else. The state dict holds values only: load it into a field
    compiled from the same masks.

    torch.compile and torch.export see one opaque operator per evaluation or solve, with its gradient (`operators`); an
    exported program runs wherever this package was imported. Fields with functions of time that are Python break a
    graph; exported, their evaluations are torch operations, and their solves are refused.

    dim: size of the state.  nnz: weights, that is multiply-adds per sample and evaluation.
    """

    def __init__(
        self, field: VectorField, engine: str = "auto", *, frozen: dict[tuple[int, str], Tensor] | None = None,
        simplification: str = "",
    ) -> None:  # fmt: skip
        super().__init__()
        choose(field, engine)  # says now what would go wrong later
        self._program = field  # patterns, activations and functions of time; its tensors are replaced by parameters
        self.requested = engine
        self._simplification = simplification
        self.layers = nn.ModuleList()
        for layer in field.layers:
            functions = {
                f"{kind}_function": part.function
                for kind, part in (("gate", layer.gate), ("shift", layer.shift))
                if isinstance(part, TimeFunction) and isinstance(part.function, nn.Module)
            }
            self.layers.append(_LayerParameters(dict(layer.tensors()), functions))
        # The parameters hold the numbers from here on; keep no second copy of them.
        self._program = field.map_tensors(lambda tensor: tensor.detach().to("meta"))
        self._packing = Packing(engine)
        self.described = operators.describe(field, engine)
        self._slots: list[tuple[nn.Module, str]] | None = None
        self._live: tuple[list[Tensor], VectorField] | None = None
        self._inner_hooks: list[dict] | None = None
        self._frozen = frozen or {}  # (layer, tensor's name) -> bool mask of entries that are not trained
        for (number, name), mask in self._frozen.items():
            if bool(mask.all()):
                self.layers[number].get_parameter(name).requires_grad_(False)
        self._mask_gradients()

    def _mask_gradients(self) -> None:
        for (number, name), mask in self._frozen.items():
            parameter = self.layers[number].get_parameter(name)
            if parameter.requires_grad:
                parameter.register_hook(_zeroing(mask))

    def __getstate__(self) -> dict[str, Any]:
        forgotten = dict.fromkeys(("_slots", "_live", "_inner_hooks"))
        return {**self.__dict__, "_packing": Packing(self.requested), **forgotten}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mask_gradients()  # copies and pickles of a parameter lose its hooks

    def frozen_entries(self) -> dict[tuple[int, str], Tensor]:
        """(layer number, tensor's name) -> bool mask, on the CPU, of the entries that are not trained; all of a tensor
        whose requires_grad is False. Tensors trained as a whole are left out."""
        frozen = dict(self._frozen)
        for number, layer in enumerate(self.vector_field.layers):
            for name, tensor in layer.tensors():
                if not tensor.requires_grad:
                    frozen[number, name] = torch.ones(tensor.shape, dtype=torch.bool)
        return frozen

    # ------------------------------------------------------------------------------------------------- what it is

    @property
    def vector_field(self) -> VectorField:
        """The program over the live parameters: changes of either are changes of both."""
        layers = []
        for layer, own in zip(self._program.layers, self.layers):
            layer = copy.copy(layer)
            layer.values, layer.bias = own.values, own.bias
            for kind in ("gate", "shift"):
                part = getattr(layer, kind)
                if isinstance(part, (SigmoidGate, LinearShift)):
                    live = getattr(own, kind)
                    setattr(layer, kind, type(part)(live.slope, live.offset))
                elif isinstance(part, TimeFunction) and isinstance(part.function, nn.Module):
                    setattr(layer, kind, TimeFunction(getattr(own, f"{kind}_function"), part.rows))
            layers.append(layer)
        return VectorField(layers, self._program.notes)

    @property
    def dim(self) -> int:
        return self._program.dim

    @property
    def nnz(self) -> int:
        return self._program.nnz

    @property
    def dtype(self) -> torch.dtype:
        return next(self._tensors()).dtype

    @property
    def device(self) -> torch.device:
        return next(self._tensors()).device

    @property
    def engine(self) -> type[Engine]:
        """The engine class that runs this field on its present device."""
        return choose(self.vector_field, self.requested)[0]

    @property
    def engine_name(self) -> str:
        return self.engine.name

    def extra_repr(self) -> str:
        return f"dim={self.dim}, nnz={self.nnz}, engine={self.requested!r}"

    # ------------------------------------------------------------------------------------------------- running it

    @factories_on_cpu
    def divergence_plan(self, kind: Literal["exact", "hutchinson"] = "exact") -> DivergencePlan:
        """How the divergence is computed (`divergence.plan`), counted once."""
        return self._packing.plan(kind, self._live_field)

    def runner(self, kind: Literal["exact", "hutchinson"] | None = None) -> Engine:
        """The engine for a call made now: `packed(kind)`, or the reference engine where only torch operations may take
        part."""
        return self.reference(kind) if gradients.only_torch() else self.packed(kind)

    def reference(self, kind: Literal["exact", "hutchinson"] | None = None) -> ReferenceEngine:
        """The reference engine over the live parameters: autograd flows through it to them."""
        field = self.vector_field if torch.compiler.is_compiling() else self._live_field()
        return ReferenceEngine(field, None if kind is None else self.divergence_plan(kind))

    def _live_field(self) -> VectorField:
        """`vector_field`, made once for the same parameters: it takes as long as a small solve. To be left as it is."""
        tensors = list(self._tensors())
        if self._live is None or not all(map(operator.is_, self._live[0], tensors)):
            self._live = tensors, self.vector_field
        return self._live[1]

    def _tensors(self) -> Iterator[Tensor]:
        """The parameters as they are now, without walking the module tree: that would cost as much as a small solve."""
        if self._slots is None:
            self._slots = [(m, name) for m in self.modules() for name in m._parameters]
        return (tensor for m, name in self._slots if (tensor := m._parameters[name]) is not None)

    def hooked_inside(self) -> bool:
        """Are there hooks of torch's on the field's layers, or on all modules?"""
        if self._inner_hooks is None:
            layers = [module for layer in self.layers for module in layer.modules()]
            self._inner_hooks = [hooks for module in layers for hooks in hooks_of(module)]
        return any(_GLOBAL_HOOKS) or any(self._inner_hooks)

    def ordered(self) -> list[Tensor]:
        """The parameters in the order of `VectorField.tensors()`; plainly enough for torch.compile to read."""
        found = []
        for own in self.layers:
            found += [own.values, own.bias]
            for kind in ("gate", "shift"):
                if kind in own._modules:
                    part = getattr(own, kind)
                    found += [part.slope, part.offset]
        return found

    @factories_on_cpu
    def packed(self, kind: Literal["exact", "hutchinson"] | None = None) -> Engine:
        """An engine that holds the current values, with the divergence of this kind; kept until a parameter changes."""
        return self._packing.engine(kind, list(self._tensors()), self._live_field)

    def forward(self, t: Tensor | float, y: Tensor) -> Tensor:
        """dy/dt, shaped like y.

        t: a number, or a tensor of one element in at most two axes.  y: [..., dim] in the field's dtype and device;
        under torch.autocast it may have another floating point dtype, and dy/dt has the field's.
        Differentiable in t, y and the parameters. Raises TypeError or ValueError for other t, y.
        """
        t, y = self._check_time(t), self.in_own_dtype(y)
        self._check_state("y", y)
        if y.numel() == 0:
            return y.clone()
        x = y.reshape(-1, self.dim).contiguous()
        out = self._layer_by_layer(t, x) if self.hooked_inside() else self._run(None, t, x, None)[0]
        return out if out.shape == y.shape else out.view(y.shape)

    def _layer_by_layer(self, t: Tensor, x: Tensor) -> Tensor:
        """f(t, x) in torch, every layer called as a module."""
        with own_precision(x):
            for own, layer in zip(self.layers, self.vector_field.layers):
                x = own(t, x, layer)
        return x

    def in_own_dtype(self, y: Tensor) -> Tensor:
        """y in the field's dtype where torch.autocast is on, which makes states of other dtypes; else y as it is."""
        if isinstance(y, Tensor) and is_autocast_enabled(y) and y.is_floating_point():
            return y.to(self.layers[0].values.dtype)
        return y

    @factories_on_cpu
    def _run(self, kind: str | None, t: Tensor, x: Tensor, noise: Tensor | None) -> tuple[Tensor, ...]:
        """(dx,) or (dx, trace) by the engine, for checked x [batch, dim]; with a graph where one is wanted."""
        if torch.compiler.is_compiling():
            if self.described is not None:
                return operators.evaluate(self, kind, t, x, noise)
            if not torch.compiler.is_exporting():
                return _run_eagerly(self, kind, t, x, noise)
        return gradients.evaluate(self.runner(kind), lambda: self.reference(kind), t, x, noise)

    def _check_time(self, t: Tensor | float) -> Tensor:
        like = self.layers[0].values
        if isinstance(t, Tensor):
            if t.numel() != 1 or t.dim() > 2:
                raise ValueError(f"t: must be a number or a tensor of one element, at most 2 axes, not {list(t.shape)}")
            if t.is_complex() or t.dtype == torch.bool:
                raise TypeError(f"t: must be a real number, not {t.dtype}")
            return t.reshape(()).to(like)
        if isinstance(t, bool) or not isinstance(t, (int, float)):
            raise TypeError(f"t: must be a number or a tensor, not {type(t).__name__}")
        return torch.full((), float(t), dtype=like.dtype, device=like.device)  # no copy, which would wait for a GPU

    def _check_state(self, name: str, y: Tensor) -> None:
        like = self.layers[0].values
        if not isinstance(y, Tensor):
            raise TypeError(f"{name}: must be a tensor, not {type(y).__name__}")
        if y.dim() < 1 or y.shape[-1] != self.dim:
            raise ValueError(f"{name}: the last axis must be {self.dim}, the field's state size, not {list(y.shape)}")
        if y.dtype != like.dtype:
            raise TypeError(f"{name}: is {y.dtype}, the field {like.dtype}; convert one of them with .to(dtype)")
        if y.device != like.device:
            raise ValueError(f"{name}: is on {y.device}, the field on {like.device}; move one of them with .to(device)")

    # ------------------------------------------------------------------------------------------------- the way back

    @torch.no_grad()
    @factories_on_cpu
    def copy_to(self, module: nn.Module) -> None:
        """Write the current values into the parameters of the module this was compiled from.

        Entries that simplify took out keep what the module holds, and so do entries behind a pruning mask. Raises
        ValueError, and writes nothing, where the module's masks are not this field's, or where a value that changed is
        no plain entry of a parameter (a constant of the module's code, a product of two parameters).
        """
        original, sources = capture_with_sources(module, self.dim)
        simplified, report = simplify(original)
        mine = self.vector_field
        for number, (theirs, ours) in enumerate(zip(simplified.layers, mine.layers)):
            if not _same_layout(theirs, ours):
                raise ValueError(
                    f"copy_to: layer {number} ({ours.name!r}) of the compiled field is {_layout(ours)}, the module now "
                    f"gives {_layout(theirs)}; it is not the module this was compiled from, or its masks have changed"
                )
        if len(simplified.layers) != len(mine.layers):
            raise ValueError(
                f"copy_to: the compiled field has {len(mine.layers)} layers, the module {len(simplified.layers)}"
            )
        for number, theirs, ours in zip(report.kept_layers, simplified.layers, mine.layers):
            whole = dict(original.layers[number].tensors())
            now = dict(theirs.tensors())
            for name, new in ours.tensors():
                new = new.to(now[name])
                if name not in whole:  # a shift that simplify folded in
                    if not torch.equal(new, now[name]):
                        raise ValueError(
                            f"copy_to: layer {number} ({ours.name!r}): {name} changed, which the module does not have"
                        )
                    continue
                kept = (report.kept_values if name == "values" else report.kept_rows)[number].to(new.device)
                old = whole[name][kept]
                # What simplify folded into this tensor stays out of the module's: it is still there, a layer earlier.
                whole[name][kept] = torch.where(now[name] == old, new, old + (new - now[name]))
        write_back(module, original, sources)

    # ------------------------------------------------------------------------------------------------- telling of it

    @factories_on_cpu
    def report(self) -> str:
        """For people: the layers that remain, what was removed, the engine and the divergence, each with its reason."""
        field = self.vector_field
        rows = [("layer", "from", "out x in", "weights", "density", "activation", "gate", "shift")]
        for number, layer in enumerate(field.layers):
            params = ", ".join(f"{value:g}" for value in layer.activation.params)
            rows.append((
                str(number), layer.name or "-", f"{layer.out_features} x {layer.in_features}", str(layer.pattern.nnz),
                f"{layer.pattern.density:.1%}", layer.activation.name + (f"({params})" if params else ""),
                _part_name(layer.gate), _part_name(layer.shift),
            ))
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        engine, reason = choose(field, self.requested)
        lines += ["", f"multiply-adds per sample and evaluation: {self.nnz}", f"engine: {engine.name} ({reason})"]
        lines += self.packed().describe()
        lines += self._gradient_lines()
        for kind in KINDS:
            plan = self.divergence_plan(kind)
            costs = ", ".join(f"{name} {cost}" for name, cost in plan.costs.items())
            form = type(plan.form).__name__.removesuffix("Form").lower()
            lines.append(f"{kind} divergence: {form} form; {plan.reason} [multiply-adds: {costs}]")
        if self._simplification:
            lines += ["", self._simplification]
        lines += [note for note in field.notes if note not in self._simplification]
        return "\n".join(lines)

    def _gradient_lines(self) -> list[str]:
        """Who makes the gradient in x and the parameters: one line, or one for the field and each divergence."""
        told: dict[str, list[str]] = {}
        for kind in (None, *KINDS):
            engine = self.packed(kind)
            obstacle = engine.no_gradient(("x", "tensors"))
            who = f"{engine.name}" if obstacle is None else f"reference, in plain PyTorch, because {obstacle}"
            told.setdefault(who, []).append("field" if kind is None else kind)
        if len(told) == 1:
            return [f"gradient: {who}" for who in told]
        return [f"gradient ({', '.join(kinds)}): {who}" for who, kinds in told.items()]


def _layout(layer: Layer) -> str:
    return (
        f"{layer.out_features} x {layer.in_features} with {layer.pattern.nnz} weights, {layer.activation.name}, "
        f"gate {_part_name(layer.gate)}, shift {_part_name(layer.shift)}"
    )


def _same_layout(one: Layer, other: Layer) -> bool:
    return (
        one.pattern.shape == other.pattern.shape
        and one.activation == other.activation
        and torch.equal(one.pattern.row_ptr, other.pattern.row_ptr)
        and torch.equal(one.pattern.col, other.pattern.col)
        and [name for name, _ in one.tensors()] == [name for name, _ in other.tensors()]
    )


def _part_name(part: Any) -> str:
    names = {SigmoidGate: "sigmoid", LinearShift: "linear", TimeFunction: "function of t"}
    return "-" if part is None else names[type(part)]


@torch._disable_dynamo  # torch.compiler.disable, which would import the compiler with this package
def _run_eagerly(field: CompiledField, *arguments: Any) -> tuple[Tensor, ...]:
    return field._run(*arguments)


# ------------------------------------------------------------------------------------------------------- divergence


def with_divergence(
    field: CompiledField | Callable[[Tensor, Tensor], Tensor],
    kind: Literal["exact", "hutchinson"] = "exact",
    noise: Tensor | Literal["rademacher", "gaussian"] | None = None,
) -> "DivergenceField":
    """The field beside its log-density: (x, l) -> (dx/dt, dl/dt = -tr df/dx), see DivergenceField.

    field: a CompiledField, or any f(t, x [..., dim]) that treats its rows independently (then by autograd).
    kind: "exact", or "hutchinson": e' (df/dx) e with the probe e fixed during a solve.
    noise: only for "hutchinson": "rademacher" (None; +1 or -1) or "gaussian", drawn at the start of each solve from
    torch's generator; or the probe itself, shaped like x.

    Raises ValueError for an unknown kind or noise and for noise with "exact", TypeError for other objects.
    """
    return DivergenceField(field, kind, noise)


class DivergenceField(nn.Module):
    """A vector field with its divergence, `field(t, (x, l)) -> (dx/dt, dl/dt)`. Made by `with_divergence`.

    field: what was given.  kind: "exact" or "hutchinson".  Source of the instantaneous change of variables: Chen et al.
    2018 (Neural ODEs); of the estimator with noise fixed per solve: Grathwohl et al. 2019 (FFJORD).
    """

    def __init__(
        self, field: CompiledField | Callable, kind: str = "exact", noise: Tensor | str | None = None
    ) -> None:
        super().__init__()
        if isinstance(field, (VectorField, DivergenceField, type)) or not callable(field):
            what = f"the class {field.__name__}" if isinstance(field, type) else type(field).__name__
            raise TypeError(
                f"with_divergence: field must be a callable f(t, x), not {what}"
                + ("; compile(field) it first" if isinstance(field, VectorField) else "")
            )
        if kind not in KINDS:
            raise ValueError(f'with_divergence: kind must be "exact" or "hutchinson", not {kind!r}')
        if kind == "exact" and noise is not None:
            raise ValueError('with_divergence: noise is only for kind="hutchinson"; the exact divergence has none')
        if isinstance(noise, str) and noise not in NOISES:
            raise ValueError(f'with_divergence: noise must be a tensor, "rademacher" or "gaussian", not {noise!r}')
        if noise is not None and not isinstance(noise, (str, Tensor)):
            raise TypeError(f"with_divergence: noise must be a tensor or a name, not {type(noise).__name__}")
        self.field = field
        self.kind = kind
        self.distribution = "rademacher" if noise is None else noise if isinstance(noise, str) else "given"
        self.register_buffer("noise", noise if isinstance(noise, Tensor) else None, persistent=False)
        self._drawn: Tensor | None = None

    def hooked_inside(self) -> bool:
        """Are there hooks of torch's on the field below, or on all modules?"""
        field = self._modules.get("field")  # quicker than self.field
        if not isinstance(field, CompiledField):
            return any(_GLOBAL_HOOKS)
        return field.hooked_inside() or any(hooks_of(field))

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}" + (f", noise={self.distribution!r}" if self.kind == "hutchinson" else "")

    def begin_solve(self, x: Tensor) -> Tensor | None:
        """Fix the probe for a solve that starts at x, and return it (shaped like x); None for "exact".

        The solver calls of this package do this. Under another solver the probe is drawn at the first evaluation and
        kept until `resample()`, or until x has another shape, dtype or device.
        """
        if self.kind == "exact":
            return None
        if self.noise is not None:
            if self.noise.shape != x.shape:
                raise ValueError(f"noise: is {list(self.noise.shape)}, the state {list(x.shape)}; they must be alike")
            return self.noise.to(x.device, x.dtype)
        if self.distribution == "gaussian":
            drawn = torch.randn_like(x.detach())
        else:
            drawn = torch.randint_like(x.detach(), 2) * 2 - 1
        if not torch.compiler.is_exporting():  # what is drawn there has no values
            self._drawn = drawn
        return drawn

    def resample(self) -> None:
        """Forget the drawn probe; the next evaluation or solve draws another. A probe that was given stays."""
        self._drawn = None

    def _probe(self, x: Tensor) -> Tensor | None:
        drawn = self._drawn
        if drawn is not None and (drawn.shape, drawn.dtype, drawn.device) == (x.shape, x.dtype, x.device):
            return drawn
        return self.begin_solve(x)

    def forward(self, t: Tensor | float, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(dx/dt shaped like x, dl/dt shaped like l) at state (x [..., dim], l [...] or [..., 1]).

        Differentiable in t, x and the parameters; l does not enter.
        """
        if not isinstance(state, (tuple, list)) or len(state) != 2 or not all(isinstance(p, Tensor) for p in state):
            raise TypeError("state: must be a tuple (x, l) of two tensors")
        x, l = state  # noqa: E741
        compiled = isinstance(self.field, CompiledField)
        if compiled:
            t, x = self.field._check_time(t), self.field.in_own_dtype(x)
            self.field._check_state("x", x)
        elif x.dim() < 1 or not x.is_floating_point():
            raise TypeError(f"x: must be a real floating point tensor [..., dim], not {x.dtype} {list(x.shape)}")
        if l.shape not in (x.shape[:-1], x.shape[:-1] + (1,)):
            raise ValueError(f"l: must be {list(x.shape[:-1])} or {[*x.shape[:-1], 1]}, not {list(l.shape)}")
        noise = self._probe(x)
        if compiled and x.numel() == 0:
            return x.clone(), torch.zeros_like(l)
        if compiled and not self.hooked_inside():
            flat = None if noise is None else noise.reshape(-1, self.field.dim).contiguous()
            dx, trace = self.field._run(self.kind, t, x.reshape(-1, self.field.dim).contiguous(), flat)
            return dx.view(x.shape), -trace.view(l.shape)
        dx, trace = _autograd_divergence(self.field, t, x, noise)
        return dx, -trace.view(l.shape)


def _autograd_divergence(
    f: Callable[[Tensor, Tensor], Tensor], t: Tensor | float, x: Tensor, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(f(t, x), tr df/dx [...]) of any f, one vector-Jacobian product per component, or one for a noise vector."""
    wanted = torch.is_grad_enabled()
    if isinstance(f, nn.Module):  # what any other callable depends on cannot be known
        depends = [value for value in (t, x, noise) if isinstance(value, Tensor)] + list(f.parameters())
        wanted = wanted and any(tensor.requires_grad for tensor in depends)
    with torch.inference_mode(False), torch.enable_grad():
        if x.is_inference():
            x = x.clone()
        if isinstance(t, Tensor) and t.is_inference():
            t = t.clone()
        inputs = x if wanted and x.requires_grad else x.detach().requires_grad_()
        dx = f(t, inputs)
        if not isinstance(dx, Tensor) or dx.shape != x.shape:
            shape = list(dx.shape) if isinstance(dx, Tensor) else type(dx).__name__
            raise ValueError(f"f(t, x): must be shaped like x, {list(x.shape)}, not {shape}")

        def product(cotangent: Tensor) -> Tensor:
            if not dx.requires_grad:
                return torch.zeros_like(x)
            (found,) = torch.autograd.grad(
                dx, inputs, cotangent, create_graph=wanted, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            return found

        if noise is not None:
            trace = (product(noise) * noise).sum(-1)
        else:
            trace = torch.zeros_like(x[..., 0])
            for m in range(x.shape[-1]):
                unit = torch.zeros_like(x)
                unit[..., m] = 1
                trace = trace + product(unit)[..., m]
    return (dx, trace) if wanted else (dx.detach(), trace.detach())
