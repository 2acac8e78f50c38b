"""The door users come through: a module compiled to a field (`compile`).

It is an nn.Module that goes wherever the original `f(t, y)` went. Values come from the chosen engine, gradients as
`gradients` says.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any, Callable, Iterator, Literal

import torch
from torch import Tensor, nn

from . import gradients, operators
from .capture import capture_with_origins, check_like, unwrapped
from .capture.replay import TimeProgram
from .devices import factories_on_cpu
from .divergence import KINDS, DivergencePlan
from .engines import choose
from .engines.base import Engine
from .engines.reference import ReferenceEngine, is_autocast_enabled, own_precision
from .field import Layer, LinearShift, SigmoidGate, TimeFunction, UnsupportedFieldError, VectorField
from .hooks import GLOBAL_HOOKS, hooks_of
from .layer_parameters import LayerParameters, lost, zeroing
from .origin import CONSTANT, Derivation, Key, Origin
from .packing import Packing
from .simplify import simplify
from .trained import Entries, Held, Shares, check_made_again, without_zeros, write, zeros_to_keep


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
    example = None
    if isinstance(module_or_field, CompiledField):
        example = module_or_field.example
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
    simplified, report = simplify(field, origins, zeros_to_keep(origins, held))
    compiled = CompiledField(simplified, engine, origins=report.origins, held=held, simplification=str(report))
    compiled.example = example if like is None else tuple(like.shape)
    if compiled.shares.derived:
        check_made_again(simplified, compiled.ordered)
    return compiled


def _check_like(field: VectorField, like: Tensor) -> None:
    check_like(like, field.dim)
    if (like.dtype, like.device) != (field.dtype, field.device):
        raise TypeError(f"like is {like.dtype} on {like.device}, the field {field.dtype} on {field.device}")
    reason = field.refused(like.dim())
    if reason is not None:
        raise UnsupportedFieldError(f"like: {reason}")


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
        self.register_load_state_dict_post_hook(_follow_assigned)
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
            self.layers.append(LayerParameters(layer, parameters, buffers, functions[number]))
        absent = {key: self.origins[key].parameter == CONSTANT for key in self.shares.own}
        self._absent = {key: entries for key, entries in absent.items() if bool(entries.any())}
        self._mask_gradients()

    def _mask_gradients(self) -> None:
        """Zeros that the module does not have between a tensor's entries have no gradient: by a hook on our own
        parameters. Others in their place (of torch.func.functional_call) are masked at every call (`ordered`)."""
        self._masked = {(number, name): self.layers[number].tensor(name) for number, name in self._absent}
        for key, parameter in self._masked.items():
            wanted = parameter.requires_grad
            parameter.requires_grad_(True).register_hook(zeroing(self._absent[key]))  # torch hooks no others
            parameter.requires_grad_(wanted)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mask_gradients()  # copies and pickles of a parameter lose its hooks

    def __getstate__(self) -> dict[str, Any]:
        forgotten = dict.fromkeys(("_slots", "_live", "_inner_hooks", "_masked"))
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
        if gradients.only_torch():
            return self.reference(kind)
        engine = self.packed(kind)
        # What autograd flows through stands over the parameters of this call, not over those that it was packed from.
        return self.reference(kind) if engine.differentiable and torch.is_grad_enabled() else engine

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
            field = self.vector_field
            if any(self.layers[n].tensor(name) is not own for (n, name), own in self._masked.items()):
                return field  # masked, with a graph of its own too
            self._live = tensors, field
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
                raise lost(name) from None
            if tensor is not None:
                yield tensor

    def hooked_inside(self) -> bool:
        """Are there hooks of torch's on the field's layers, or on all modules?"""
        if self._inner_hooks is None:
            layers = [module for layer in self.layers for module in layer.modules()]
            self._inner_hooks = [hooks for module in layers for hooks in hooks_of(module)]
        return any(GLOBAL_HOOKS) or any(self._inner_hooks)

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
            if tensor is None:
                tensor = derivation.tensor(self.origins[number, name])
            elif (number, name) in self._absent and (
                torch.compiler.is_compiling() or tensor is not self._masked[number, name]
            ):
                tensor = tensor.masked_fill(self._absent[number, name].to(tensor.device), 0)
            found.append(tensor)
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
        held, parameters = self.held(), dict(module.named_parameters())
        with without_zeros(parameters, held, self.shares.trained):
            original, origins = capture_with_origins(module, self.dim, like)
            theirs = Held.by_module(module)
            for name in held.keys() & theirs.keys():  # what is trained was settled when this was compiled
                theirs[name].trained = self.shares.trained[name]
            simplified, report = simplify(original, origins, zeros_to_keep(origins, theirs))
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
        for own_name, (name, elements) in zip(self.shares.recipe.held, shares.recipe.held.items()):
            write(parameters[name], elements, self._entry(own_name))
        for number, name in self.shares.own:
            origin, tensor = report.origins[number, name], self.layers[number].tensor(name)
            for which, parameter in enumerate(origin.parameters):
                own = origin.parameter == which
                write(parameters[parameter], origin.index[own], tensor[own.to(tensor.device)])

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


def _follow_assigned(field: CompiledField, _: Any) -> None:
    """load_state_dict(assign=True) has put other parameters in the place of ours: functions of time read those of
    `entries`, and hooks are lost."""
    if any(field.layers[n].tensor(name) is not own for (n, name), own in field._masked.items()):
        field._mask_gradients()
    for module in field.layers.modules():
        if isinstance(module, TimeProgram):
            module.read(field._entry)


@torch._disable_dynamo  # torch.compiler.disable, which would import the compiler with this package
def _run_eagerly(field: CompiledField, *arguments: Any) -> tuple[Tensor, ...]:
    return field._run(*arguments)


