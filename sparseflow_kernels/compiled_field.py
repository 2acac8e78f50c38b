"""The door users come through: a module compiled to a field (`compile`), and a field with its divergence.

Both are nn.Modules that go wherever the original `f(t, y)` went. Values come from the chosen engine, gradients as
`gradients` says.
"""

from __future__ import annotations

import hashlib
import operator
from dataclasses import replace
from typing import Any, Callable, Iterator, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from . import gradients, operators
from .capture import capture_with_origins, check_like, unwrapped
from .capture.replay import TimeProgram
from .devices import factories_on_cpu
from .divergence import DivergencePlan
from .engines import choose
from .engines.base import Engine
from .engines.reference import ReferenceEngine, is_autocast_enabled, layer_output, own_precision
from .field import Layer, LinearShift, SigmoidGate, TimeFunction, UnsupportedFieldError, VectorField
from .origin import CONSTANT, Derivation, Key, Origin
from .packing import Packing
from .simplify import simplify
from .trained import Entries, Held, Shares, starts_at_zero
from .warn import warn

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
    module_or_field: nn.Module | VectorField, engine: str = "auto", dim: int | None = None, like: Tensor | None = None
) -> "CompiledField":
    """Read the program out of a module `f(t, y)`, simplify it exactly and hand it to an engine.

    module_or_field: a module whose forward is a chain of linear layers, functions of t and activations (`capture`); a
    VectorField; or a CompiledField, to compile its current values again (after pruning them, or for another engine).
    engine: "auto" (by device and fit), "reference", "cpu", "cuda", "triton".  dim: size of the state, where capture
    cannot tell.  like: an example of the state, y0 [..., dim] in the module's dtype and on its device. The module is
    compared with the field on states of its shape, and it settles `dim`.

    A field runs every row [dim] of a state [..., dim] by itself. A module may not do so for states with more axes
    (points that see their mean): these raise UnsupportedFieldError, here (`like`) or when the field is called.

    The result keeps the module's dtype and device and shares no memory with it. It trains what the module trains and
    nothing else (`trained`): buffers and constants of the code are fixed, parameters used in several places are one.

    Raises UnsupportedFieldError for what cannot be expressed, or not run by the engine asked for; ValueError for an
    unknown engine, or a `dim` or `like` that does not fit; TypeError for other objects.
    """
    module_or_field = unwrapped(module_or_field)
    if isinstance(module_or_field, CompiledField):
        field, held = module_or_field.vector_field, module_or_field.held()
        present = zip(module_or_field.origins.items(), field.tensors())
        origins = {key: replace(origin, value=tensor.detach()) for (key, origin), (_, tensor) in present}
    elif isinstance(module_or_field, VectorField):
        field = module_or_field
        origins, held = Held.by_tensors(field)
    else:
        field, origins = capture_with_origins(module_or_field, dim, like)
        held = Held.by_module(module_or_field)
    if dim is not None and field.dim != dim:
        raise ValueError(f"compile: dim is {dim}, but the field's state has {field.dim} components")
    if like is not None and isinstance(module_or_field, (CompiledField, VectorField)):
        _check_like(field, like)
    simplified, report = simplify(field, origins, starts_at_zero(origins, held))
    compiled = CompiledField(simplified, engine, origins=report.origins, held=held, simplification=str(report))
    compiled.example = None if like is None else tuple(like.shape)
    return compiled


def _check_like(field: VectorField, like: Tensor) -> None:
    check_like(like, field.dim)
    if (like.dtype, like.device) != (field.dtype, field.device):
        raise TypeError(f"like is {like.dtype} on {like.device}, the field {field.dtype} on {field.device}")
    reason = field.refused(like.dim())
    if reason is not None:
        raise UnsupportedFieldError(f"like: {reason}")


def _zeroing(mask: Tensor) -> Callable[[Tensor], Tensor]:
    """A hook that zeroes the gradient under the mask, which goes to the gradient's device once, not every time."""

    def hook(grad: Tensor) -> Tensor:
        nonlocal mask
        here = mask.to(grad.device)
        if not torch.compiler.is_compiling():  # what is copied there has no values
            mask = here
        return grad.masked_fill(here, 0)

    return hook


def _lost(name: str) -> RuntimeError:
    return RuntimeError(
        f"the compiled field has lost its parameter {name!r} (torch.nn.utils.prune, weight_norm and parametrizations put "
        "others in its place); prune or parametrize the module, then compile it"
    )


class _LayerParameters(nn.Module):
    """One layer's tensors, as parameters if they are trained and else as buffers: values, bias, gate.slope, gate.offset,
    shift.slope, shift.offset, without those that are made from `entries`; and the modules of its functions of time.

    Its state holds a digest of the layer's pattern: values in CSR order are another matrix under another pattern.
    """

    def __init__(
        self, layer: Layer, parameters: dict[str, nn.Parameter], buffers: dict[str, Tensor],
        functions: dict[str, nn.Module],
    ) -> None:  # fmt: skip
        super().__init__()
        self.layer_name = layer.name
        self._pattern = layer.pattern
        self._made = {name for name, _ in layer.tensors()} - parameters.keys() - buffers.keys()
        for name, tensor in (parameters | buffers).items():
            owner, _, leaf = name.rpartition(".")
            if owner and owner not in self._modules:
                self.add_module(owner, nn.Module())
            target = self.get_submodule(owner)
            if isinstance(tensor, nn.Parameter):
                target.register_parameter(leaf, tensor)
            else:
                target.register_buffer(leaf, tensor)
        for name, function in functions.items():
            self.add_module(name, function)
        self._complete = True

    def register_parameter(self, name: str, parameter: nn.Parameter | None) -> None:
        if self.__dict__.get("_complete"):  # torch.nn.utils.prune, parametrizations
            raise TypeError(
                f"{name!r} cannot be added to a layer of a compiled field: its engine would not see it. Prune or "
                "parametrize the module, then compile it"
            )
        super().register_parameter(name, parameter)

    def tensor(self, name: str) -> Tensor | None:
        """The tensor of this name; None if it is made from `entries`. Raises RuntimeError if it was taken out."""
        if name in self._made:
            return None
        owner, _, leaf = name.rpartition(".")
        module = self._modules[owner] if owner else self
        found = module._parameters.get(leaf, module._buffers.get(leaf))
        if found is None:
            raise _lost(name)
        return found

    def _digest(self) -> Tensor:
        pattern = self._pattern
        found = hashlib.sha256(repr(pattern.shape).encode())
        for part in (pattern.row_ptr, pattern.col):
            found.update(part.numpy().tobytes())
        return torch.frombuffer(bytearray(found.digest()), dtype=torch.int64).clone()

    def get_extra_state(self) -> Tensor:
        return self._digest()

    def set_extra_state(self, state: Any) -> None:
        """Nothing to set: what does not fit was refused before."""

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors):
        key = prefix + nn_module._EXTRA_STATE_KEY_SUFFIX
        if key not in state_dict:
            warn(
                f"{prefix}: this state does not say for which pattern of weights it is (it was saved by version 0.1.0, "
                "or parts of it are missing); it is right only if the field was compiled from the same masks"
            )
            state_dict = {**state_dict, key: self._digest()}
        elif not torch.equal(torch.as_tensor(state_dict[key]).cpu(), self._digest()):
            errors.append(
                f"layer {self.layer_name!r} ({prefix.rstrip('.')}) has other masks: its weights stand elsewhere than those "
                "of the field that this state was saved from. Compile a module with those masks, then load"
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors
        )  # fmt: skip

    def forward(self, t: Tensor, h: Tensor, layer: Layer) -> Tensor:
        """The layer's output, for those who hook it; engines do not come here."""
        return layer_output(layer, layer.weight, t, h)[0]


class CompiledField(nn.Module):
    """A compiled vector field, `field(t, y) -> dy/dt`. Made by `compile`.

    Its parameters are the remaining weights (`layers.<l>.values`, in CSR order of the layer's pattern), biases and time
    parameters, so an optimizer holds state for nothing else. Where a tensor of the program is no plain piece of the
    module's parameters (scaled, shared, computed, folded), its parameters are the entries it is made from, `entries.<name
    in the module>`. What the module does not train is a buffer. A state dict fits a field compiled from the same masks.

    torch.compile and torch.export see one opaque operator per evaluation or solve, with its gradient (`operators`); an
    exported program runs wherever this package was imported. Fields with functions of time that are Python break a
    graph; exported, their evaluations are torch operations, and their solves are refused.

    dim: size of the state.  nnz: weights, that is multiply-adds per sample and evaluation.
    """

    example: tuple[int, ...] | None = None  # the shape of the `like` it was compiled with

    def __init__(
        self, field: VectorField, engine: str = "auto", *, origins: dict[Key, Origin] | None = None,
        held: dict[str, Held] | None = None, simplification: str = "",
    ) -> None:  # fmt: skip
        """origins, held: of the field's tensors, and of the parameters these name; None: the tensors are parameters."""
        super().__init__()
        choose(field, engine)  # says now what would go wrong later
        self.requested = engine
        self._simplification = simplification
        if origins is None:
            origins, held = Held.by_tensors(field)
        programs = [part.function for _, _, part in _time_functions(field) if isinstance(part.function, TimeProgram)]
        self.origins = origins
        self.shares = Shares(origins, held, (name for program in programs for name in program.names))
        with torch.inference_mode(False):  # a field compiled there is a field elsewhere
            self._make_parameters(field, held)
        # The parameters hold the numbers from here on; keep no second copy of them.
        self._program = field.map_tensors(lambda tensor: tensor.detach().to("meta"))
        self._packing = Packing(engine)
        self.described = operators.describe(field, engine)
        self._slots: list[tuple[nn.Module, str, str]] | None = None
        self._live: tuple[list[Tensor], VectorField] | None = None
        self._inner_hooks: list[dict] | None = None

    def _make_parameters(self, field: VectorField, held: dict[str, Held]) -> None:
        recipe = self.shares.recipe
        entries = {
            name: nn.Parameter((held[name].values if e is None else held[name].take(e)).clone(), held[name].trained)
            for name, e in recipe.held.items()
        }
        if entries:
            self.entries = Entries(entries)
        functions: dict[int, dict[str, nn.Module]] = {number: {} for number in range(len(field.layers))}
        for number, kind, part in _time_functions(field):
            function = part.function
            if isinstance(function, TimeProgram):
                function = function.over(entries.__getitem__)
            if isinstance(function, nn.Module):
                functions[number][f"{kind}_function"] = function
        self.layers = nn.ModuleList()
        for number, layer in enumerate(field.layers):
            parameters, buffers = {}, {}
            for name, tensor in layer.tensors():
                tensor, key = tensor.detach().clone(), (number, name)
                if key in self.shares.own:
                    trained = next(held[parameter].trained for parameter, _ in self.origins[key].elements())
                    parameters[name] = nn.Parameter(tensor, trained)
                elif key in self.shares.fixed:
                    buffers[name] = tensor
            self.layers.append(_LayerParameters(layer, parameters, buffers, functions[number]))
        self._mask_gradients()

    def _mask_gradients(self) -> None:
        """Zeros that the module does not have between a tensor's entries have no gradient."""
        for number, name in self.shares.own:
            absent = self.origins[number, name].parameter == CONSTANT
            if bool(absent.any()):
                parameter = self.layers[number].tensor(name)
                wanted = parameter.requires_grad
                parameter.requires_grad_(True).register_hook(_zeroing(absent))  # torch hooks no others
                parameter.requires_grad_(wanted)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mask_gradients()  # copies and pickles of a parameter lose its hooks

    def __getstate__(self) -> dict[str, Any]:
        forgotten = dict.fromkeys(("_slots", "_live", "_inner_hooks"))
        return {**self.__dict__, "_packing": Packing(self.requested), **forgotten}

    def held(self, of: Callable[[Tensor], Tensor] = Tensor.detach) -> dict[str, Held]:
        """The elements of the module's parameters that this field holds, by the parameters' names in the module, with
        their values, or what else `of` gives of a parameter (its gradient, say)."""
        parts: dict[str, list[Held]] = {}
        for name, elements in self.shares.recipe.held.items():
            parameter = self._entry(name)
            parts.setdefault(name, []).append(Held(elements, of(parameter), parameter.requires_grad))
        for key in self.shares.own:
            origin, tensor = self.origins[key], self.layers[key[0]].tensor(key[1])
            for number, name in enumerate(origin.parameters):
                own = (origin.parameter == number).nonzero()[:, 0]
                elements, order = origin.index[own].sort()
                values = of(tensor)[own[order].to(tensor.device)]
                parts.setdefault(name, []).append(Held(elements, values, tensor.requires_grad))
        return {name: Held.together(several) for name, several in parts.items()}

    def _entry(self, name: str) -> nn.Parameter:
        owner, _, leaf = name.rpartition(".")
        return self.entries.get_submodule(owner)._parameters[leaf]

    # ------------------------------------------------------------------------------------------------- what it is

    @property
    def vector_field(self) -> VectorField:
        """The program over the live parameters: changes of these are changes of it. Differentiable in them."""
        given = iter(self.ordered())
        field = self._program.map_tensors(lambda _: next(given))
        for number, kind, part in _time_functions(field):
            if isinstance(part.function, nn.Module):
                own = self.layers[number]._modules[f"{kind}_function"]
                setattr(field.layers[number], kind, TimeFunction(own, part.rows))
        return field

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
        if self.shares.derived:  # what is made of parameters has a graph and values of its own at every call
            return self.vector_field
        tensors = list(self._tensors())
        if self._live is None or not all(map(operator.is_, self._live[0], tensors)):
            self._live = tensors, self.vector_field
        return self._live[1]

    def _tensors(self) -> Iterator[Tensor]:
        """All parameters and buffers as they are now, without walking the module tree: that would cost as much as a
        small solve. Raises RuntimeError if one was taken out."""
        if self._slots is None:
            self._slots = [
                (m, kind, name) for m in self.modules() for kind in ("_parameters", "_buffers")
                for name in m.__dict__[kind]
            ]  # fmt: skip
        for module, kind, name in self._slots:
            try:
                tensor = module.__dict__[kind][name]
            except KeyError:
                raise _lost(name) from None
            if tensor is not None:
                yield tensor

    def hooked_inside(self) -> bool:
        """Are there hooks of torch's on the field's layers, or on all modules?"""
        if self._inner_hooks is None:
            layers = [module for layer in self.layers for module in layer.modules()]
            self._inner_hooks = [hooks for module in layers for hooks in hooks_of(module)]
        return any(_GLOBAL_HOOKS) or any(self._inner_hooks)

    def ordered(self) -> list[Tensor]:
        """The program's tensors in the order of `VectorField.tensors()`, differentiable in the parameters; plainly
        enough for torch.compile to read."""
        derivation = None
        if self.shares.derived:
            recipe = self.shares.recipe
            derivation = Derivation(recipe, {name: self._entry(name) for name in recipe.held})
        found = []
        for number, name in self.origins:
            tensor = self.layers[number].tensor(name)
            found.append(derivation.tensor(self.origins[number, name]) if tensor is None else tensor)
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
            return y.to(self.dtype)
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
        like = next(self._tensors())
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
        like = next(self._tensors())
        if not isinstance(y, Tensor):
            raise TypeError(f"{name}: must be a tensor, not {type(y).__name__}")
        if y.dim() < 1 or y.shape[-1] != self.dim:
            raise ValueError(f"{name}: the last axis must be {self.dim}, the field's state size, not {list(y.shape)}")
        self.check_axes(name, y)
        if y.dtype != like.dtype:
            raise TypeError(f"{name}: is {y.dtype}, the field {like.dtype}; convert one of them with .to(dtype)")
        if y.device != like.device:
            raise ValueError(f"{name}: is on {y.device}, the field on {like.device}; move one of them with .to(device)")

    def check_axes(self, name: str, y: Tensor) -> None:
        """Raises UnsupportedFieldError where the module this was compiled from does something else than this field for
        states with as many axes as y."""
        refused = self._program.refused_axes
        if refused and (reason := self._program.refused(y.dim())) is not None:
            raise UnsupportedFieldError(f"{name}: is {list(y.shape)}; {reason}")

    # ------------------------------------------------------------------------------------------------- the way back

    @torch.no_grad()
    @factories_on_cpu
    def copy_to(self, module: nn.Module) -> None:
        """Write the current values into the parameters of the module this was compiled from.

        Entries that simplify took out keep what the module holds, and so do entries behind a pruning mask. Raises
        ValueError, and writes nothing, where the module's masks are not this field's.
        """
        module = unwrapped(module)
        like = None if self.example is None else torch.ones(self.example, dtype=self.dtype, device=self.device)
        original, origins = capture_with_origins(module, self.dim, like)
        theirs = Held.by_module(module)
        simplified, report = simplify(original, origins, starts_at_zero(origins, theirs))
        for number, (other, mine) in enumerate(zip(simplified.layers, self._program.layers)):
            if not _same_layout(other, mine):
                raise ValueError(
                    f"copy_to: layer {number} ({mine.name!r}) of the compiled field is {_layout(mine)}, the module now "
                    f"gives {_layout(other)}; it is not the module this was compiled from, or its masks have changed"
                )
        if len(simplified.layers) != len(self._program.layers):
            raise ValueError(
                f"copy_to: the compiled field has {len(self._program.layers)} layers, the module {len(simplified.layers)}"
            )
        programs = [p.function for _, _, p in _time_functions(simplified) if isinstance(p.function, TimeProgram)]
        shares = Shares(report.origins, theirs, (name for program in programs for name in program.names))
        if shares != self.shares:
            raise ValueError(
                "copy_to: the module computes its field from its parameters in another way than the one this was compiled "
                "from (shared, scaled or computed weights, or constants that were none)"
            )
        parameters = dict(module.named_parameters())
        for mine, (name, elements) in zip(self.shares.recipe.held, shares.recipe.held.items()):
            _write(parameters[name], elements, self._entry(mine))
        for number, name in self.shares.own:
            origin, tensor = report.origins[number, name], self.layers[number].tensor(name)
            for which, parameter in enumerate(origin.parameters):
                own = origin.parameter == which
                _write(parameters[parameter], origin.index[own], tensor[own.to(tensor.device)])

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


def _write(parameter: nn.Parameter, elements: Tensor | None, values: Tensor) -> None:
    values = values.detach().to(parameter)
    if elements is None:
        parameter.copy_(values)
    else:
        where = torch.unravel_index(elements.to(parameter.device), parameter.shape)
        parameter.index_put_(where, values)


def _time_functions(field: VectorField) -> list[tuple[int, str, TimeFunction]]:
    """(layer number, "gate" or "shift", function)."""
    return [
        (number, kind, part)
        for number, layer in enumerate(field.layers)
        for kind in ("gate", "shift")
        if isinstance(part := getattr(layer, kind), TimeFunction)
    ]


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
