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
from .engines import choose, reference_engine
from .engines.base import Engine
from .engines.reference import ReferenceEngine, is_autocast_enabled, own_precision
from .field import (
    GraphField,
    Layer,
    LinearShift,
    Part,
    Pattern,
    SigmoidGate,
    TimeFunction,
    UnsupportedFieldError,
    VectorField,
)
from .field.from_chain import graph_of_chain
from .field.graph import order
from .field.layout import Layout, State
from .graph_report import describe_graph
from .hooks import GLOBAL_HOOKS, hooks_of
from .layer_parameters import LayerParameters, lost, zeroing
from .live import Watch
from .origin import CONSTANT, Derivation, Key, Origin
from .packing import Packing, strided
from .simplify import simplify
from .trained import Entries, Held, Shares, check_made_again, without_zeros, write, zeros_to_keep


@factories_on_cpu
def compile(  # noqa: A001 (the field's own word; the builtin is not needed here)
    module_or_field: nn.Module | VectorField | GraphField, engine: str = "auto", dim: int | None = None,
    like: State | None = None, live: bool = False,
) -> "CompiledField":  # fmt: skip
    """Read the program out of a module `f(t, y)`, simplify it exactly and hand it to an engine.

    module_or_field: a module f(t, y) made of linear maps, elementwise functions, products, sums, norms, functions of t and
    numbers per sample (`capture`); a VectorField or GraphField; or a CompiledField, to compile its current values again
    (after pruning them, or for another engine).
    engine: "auto" (by device and fit), "reference", "cpu", "cuda", "triton".  dim: size of the state, where capture
    cannot tell.  like: an example of the state, y0, in the module's dtype and on its device: a tensor [..., dim], or where the
    module needs it a tensor [batch, ...], a tensor without samples, or a tuple of tensors. The module is compared with the
    field on states of its shape.

    A field of states [..., dim] runs every row [dim] by itself. A module may not do so for states with more axes (points that
    see their mean): without an example these raise UnsupportedFieldError when the field is called; with one, the field's
    states are those of the example's shape, for any number of samples.

    The result keeps the module's dtype and device and shares no memory with it. It trains what the module trains and
    nothing else (`trained`): buffers and constants of the code are fixed, parameters used in several places are one.

    live: the parameters stay the module's own. The module becomes a submodule of the result (`.module`), every call
    gathers the parameters' present values, and gradients arrive in their `.grad`, through masks, parametrizations and
    sharing: an optimizer, a checkpoint or a wrapper made for the module goes on working. Exact zeros count as pruned, as
    ever. Where a mask, a buffer, the set of parameters or training/evaluation mode changes, or a pruned entry comes back,
    the next call compiles anew.

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
    elif isinstance(module_or_field, (VectorField, GraphField)):
        field = module_or_field
        origins, held = Held.by_tensors(field)
    else:
        field, origins = capture_with_origins(module_or_field, dim, like)
        held = Held.by_module(module_or_field)
    if dim is not None and field.dim != dim:
        raise ValueError(f"compile: dim is {dim}, but the field's state has {field.dim} components")
    if like is not None and isinstance(module_or_field, (CompiledField, VectorField, GraphField)):
        _check_like(field, like)
    if live and (not isinstance(module_or_field, nn.Module) or isinstance(module_or_field, CompiledField)):
        raise TypeError(f"live: needs the nn.Module whose parameters are to be used, not {type(module_or_field).__name__}")
    simplified, origins, told = _simplified(field, origins, held)
    compiled = CompiledField(
        simplified, engine, origins=origins, held=held, simplification=told, source=module_or_field if live else None
    )
    compiled.example = example if like is None else _shapes(like)
    if compiled.shares.derived:
        check_made_again(simplified, compiled.ordered)
    return compiled


def _simplified(
    field: VectorField | GraphField, origins: dict[Key, Origin], held: dict[str, Held]
) -> tuple[VectorField | GraphField, dict[Key, Origin], str]:
    """The field as it is packed, where its tensors come from, and what was done."""
    if isinstance(field, GraphField):
        return field, origins, ""
    simplified, report = simplify(field, origins, zeros_to_keep(origins, held))
    return simplified, report.origins, str(report)


def _shapes(state: State) -> tuple:
    return tuple(state.shape) if isinstance(state, Tensor) else tuple(tuple(part.shape) for part in state)


def _check_like(field: VectorField | GraphField, like: State) -> None:
    if isinstance(field, GraphField) and not field.layout.plain:
        if (reason := field.layout.fits(like)) is not None:
            raise ValueError(f"like: {reason}")
        return
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

    example: tuple | None = None  # the shape of the `like` it was compiled with, or the shapes of its tensors
    layout: Layout | None = None  # of its states, where they are not [..., dim]
    _context: Tensor | None = None  # given by `with_context`
    _watch: Watch | None = None  # of the module whose parameters are used

    def __init__(
        self, field: VectorField | GraphField, engine: str = "auto", *, origins: dict[Key, Origin] | None = None,
        held: dict[str, Held] | None = None, simplification: str = "", source: nn.Module | None = None,
    ) -> None:  # fmt: skip
        """origins, held: of the field's tensors, and of the parameters these name; None: the tensors are parameters.
        source: the module whose own parameters are used."""
        super().__init__()
        if source is not None:
            self.module = source
            read = getattr(field, "read_context", None)
            self._watch = Watch(source, frozenset() if read is None else read.tensors)
        choose(field, engine)  # says now what would go wrong later
        self.requested = engine
        self._simplification = simplification
        if origins is None:
            origins, held = Held.by_tensors(field)
        self.origins = origins
        whole = (name for program in _time_programs(field) for name in program.names)
        self.shares = Shares(origins, held, whole, live=source is not None)
        with torch.inference_mode(False):  # a field compiled there is a field elsewhere
            self._make_parameters(field, held)
        # The parameters hold the numbers from here on; keep no second copy of them.
        self._program = field.map_tensors(lambda tensor: tensor.detach().to("meta"))
        if isinstance(field, GraphField) and not field.layout.plain:
            self.layout = field.layout
        self._packing = Packing(engine)
        self.described = operators.describe(field, engine)
        self.register_load_state_dict_post_hook(_follow_assigned)
        self._own_times: Packing | None = None  # of the graph that takes a time per sample
        self._slots: list[tuple[nn.Module, str, str]] | None = None
        self._live: tuple[list[Tensor], VectorField] | None = None
        self._inner_hooks: list[dict] | None = None

    def _make_parameters(self, field: VectorField, held: dict[str, Held]) -> None:
        recipe = self.shares.recipe
        entries = {} if self._watch is None else {name: self._entry(name) for name in recipe.held}
        entries = entries or {
            name: nn.Parameter((held[name].values if e is None else held[name].take(e)).clone(), held[name].trained)
            for name, e in recipe.held.items()
        }
        if entries and self._watch is None:
            self.entries = Entries(entries)
        functions: dict[int, dict[str, nn.Module]] = {number: {} for number in range(len(field.layers))}
        for number, kind, part in _time_functions(field):
            function = part.function
            if isinstance(function, TimeProgram):
                function = function.over(entries.__getitem__)
            if isinstance(function, nn.Module):
                functions[number][f"{kind}_function"] = function
        if isinstance(field, GraphField):
            for program in _time_programs(field):  # they are the graph's own
                program.read(entries.__getitem__)
            if not field.parts:  # a field without tensors has a dtype and a device all the same
                self.register_buffer("_nothing", torch.empty(0, dtype=field.dtype, device=field.device), persistent=False)
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
        forgotten = dict.fromkeys(("_slots", "_live", "_inner_hooks", "_masked", "_own_times"))
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
        tree = self.entries if self._watch is None else self.module
        return tree.get_submodule(owner)._parameters[leaf]

    @property
    def live(self) -> bool:
        """Its parameters are its module's own."""
        return self._watch is not None

    def follow(self) -> None:
        """Compile anew where the module is no longer the one that this field was compiled from (`live`)."""
        if not self._watch.changed():
            return
        like = None if self.example is None else self._like(self.example)
        dim = None if self.layout is not None or like is not None else self.dim
        fresh = compile(self.module, self.requested, dim, like, live=True)
        own = {name for name in self.__dict__ if name.endswith("_hooks") or name in ("training", "_context", "example")}
        self.__dict__.update({name: value for name, value in fresh.__dict__.items() if name not in own})

    # ------------------------------------------------------------------------------------------------- what it is

    @property
    def vector_field(self) -> VectorField | GraphField:
        """The program over the live parameters: changes of these are changes of it. Differentiable in them."""
        given = iter(self.ordered())
        field = self._program.map_tensors(lambda _: next(given))
        if isinstance(field, GraphField):
            return field if field.parts else replace(field, dtype=self.dtype, device=self.device)
        for number, kind, part in _time_functions(field):
            if isinstance(part.function, nn.Module):
                own = self.layers[number]._modules[f"{kind}_function"]
                setattr(field.layers[number], kind, TimeFunction(own, part.rows))
        return field

    @property
    def dim(self) -> int:
        """Of a state [..., dim]; of one of another shape, all numbers of a sample."""
        return self._program.dim

    @property
    def nnz(self) -> int:
        return self._program.nnz

    @property
    def dtype(self) -> torch.dtype:
        return self._first().dtype

    @property
    def device(self) -> torch.device:
        return self._first().device

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
        return self.ready(kind)[0]

    def ready(
        self, kind: Literal["exact", "hutchinson"] | None = None
    ) -> tuple[Engine, Callable[[], ReferenceEngine]]:  # fmt: skip
        """(the engine for a call made now, what gives the reference engine over the live parameters for it)."""
        if self._watch is not None:
            self.follow()
        reference = lambda: self.reference(kind)
        if gradients.only_torch():
            return reference(), reference
        if self.shares.derived and torch.is_grad_enabled():
            made = self.vector_field  # once: it is packed from, and differentiated
            engine = self._packing.engine(kind, list(self._tensors()), lambda: made)
            reference = lambda: reference_engine(made, self._packing.plan(kind, lambda: made))
        else:
            engine = self.packed(kind)
        # What autograd flows through stands over the parameters of this call, not over those that it was packed from.
        return (reference() if engine.differentiable and torch.is_grad_enabled() else engine), reference

    def reference(self, kind: Literal["exact", "hutchinson"] | None = None) -> ReferenceEngine:
        """The reference engine over the live parameters: autograd flows through it to them."""
        field = self.vector_field if torch.compiler.is_compiling() else self._live_field()
        return reference_engine(field, None if kind is None else self.divergence_plan(kind))

    def _live_field(self) -> VectorField | GraphField:
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
                (m, kind, name) for kind in ("_parameters", "_buffers") for m in self.modules()
                for name in getattr(m, kind).keys()  # TorchScript's dictionaries are no others
            ]  # fmt: skip
        for module, kind, name in self._slots:
            try:
                tensor = getattr(module, kind)[name]
            except KeyError:
                raise lost(name) from None
            if tensor is not None:
                yield from strided(tensor)

    def _first(self) -> Tensor:
        """One of the field's dtype, on its device: a module may hold masks and indices beside its numbers."""
        return next(tensor for tensor in self._tensors() if tensor.is_floating_point())

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

    def forward(self, t: Tensor | float, y: State) -> State:
        """dy/dt, shaped like y.

        t: a number, or a tensor of one element in at most two axes; or a time per sample, [batch] or [batch, 1] for y
        [batch, dim].  y: [..., dim], or of the shape that the field was compiled for (`like`), in the field's dtype and
        device; under torch.autocast it may have another floating point dtype, and dy/dt has the field's.
        Differentiable in t, y, the context and the parameters. Raises TypeError or ValueError for other t, y.
        """
        if self.layout is not None:
            rows = self.flatten("y", y)
            return self.layout.unflatten(self._of_rows(t, rows) if len(rows) else rows.clone())
        if isinstance(t, Tensor) and t.numel() != 1:
            y = self.in_own_dtype(y)
            self._check_state("y", y)
            return self._at_own_times(t, y)
        t, y = self._check_time(t), self.in_own_dtype(y)
        self._check_state("y", y)
        if y.numel() == 0:
            return y.clone()
        x = y.reshape(-1, self.dim).contiguous()
        out = self._layer_by_layer(t, x) if self.hooked_inside() else self._run(None, t, x, None)[0]
        return out if out.shape == y.shape else out.view(y.shape)

    def _of_rows(self, t: Tensor | float, x: Tensor) -> Tensor:
        """dy/dt of rows [batch, dim]."""
        if isinstance(t, Tensor) and t.numel() != 1:
            return self._at_own_times(t, x)
        t = self._check_time(t)
        return self._layer_by_layer(t, x) if self.hooked_inside() else self._run(None, t, x, None)[0]

    @factories_on_cpu
    def _at_own_times(self, t: Tensor, y: Tensor) -> Tensor:
        """dy/dt of y [batch, dim] at a time per sample."""
        if y.dim() != 2 or t.shape not in ((len(y),), (len(y), 1)):
            raise ValueError(
                f"t: must be a number, a tensor of one element in at most 2 axes, or a time per sample, [batch] or [batch, "
                f"1] for y [batch, {self.dim}], not {list(t.shape)} for y {list(y.shape)}"
            )
        if t.is_complex() or t.dtype == torch.bool:
            raise TypeError(f"t: must be real numbers, not {t.dtype}")
        t = t.reshape(-1).to(y)
        if isinstance(self._program, GraphField):
            return gradients.evaluate(*self.ready(), t, y.contiguous(), None, self.context_of(len(y)))[0]
        if self._own_times is None:
            self._own_times = Packing("auto" if self.requested not in ("reference", "cpu") else self.requested)
        graph = lambda: graph_of_chain(self.vector_field)
        if gradients.only_torch():
            return reference_engine(graph()).evaluate(t, y)
        engine = self._own_times.engine(None, list(self._tensors()), graph)
        return gradients.evaluate(engine, lambda: reference_engine(graph()), t, y.contiguous(), None)[0]

    # ------------------------------------------------------------------------------------------------- its context

    def with_context(self, context: Tensor) -> "CompiledField":
        """This field, its parameters and engines, with other numbers per sample than those the module holds.

        context: [batch, ...], flattened [batch, context]; gradients flow into it. Raises ValueError where the field has
        none, or one of another size.
        """
        node = getattr(self._program, "context", None)
        if node is None:
            raise ValueError("with_context: this field has no context: its module holds no numbers per sample")
        if not isinstance(context, Tensor) or context.dim() < 1 or context[:1].numel() != node.rows:
            shape = list(context.shape) if isinstance(context, Tensor) else type(context).__name__
            raise ValueError(f"with_context: context must be [batch, {node.rows}], not {shape}")
        other = CompiledField.__new__(type(self))
        other.__dict__ = {**self.__dict__, "_context": context.reshape(len(context), -1)}
        return other

    @property
    def is_detached(self) -> bool:
        """Whether forward detaches what it computes of the state, so that some of its derivatives are not all of them."""
        return isinstance(self._program, GraphField) and any(
            node.kind == "detached" for node in order([self._program.output])
        )

    @property
    def has_context(self) -> bool:
        return getattr(self._program, "context", None) is not None

    def context_of(self, batch: int) -> Tensor | None:
        """[batch, context]: what `with_context` was given, or what the module holds now; None for a field without."""
        node = getattr(self._program, "context", None)
        if node is None:
            return None
        found = self._context
        if found is None:
            if self._program.read_context is None:
                raise ValueError(f"this field has a context [batch, {node.rows}]: give it by field.with_context(context)")
            found = self._program.read_context()
        if found.shape != (batch, node.rows):
            raise ValueError(
                f"context: is {list(found.shape)}, for a state of {batch} samples it must be [{batch}, {node.rows}]; set the "
                "module's attribute, or use field.with_context(context)"
            )
        if found.dtype != self.dtype or found.device != self.device:
            raise TypeError(f"context: is {found.dtype} on {found.device}, the field {self.dtype} on {self.device}")
        return found

    def flatten(self, name: str, y: State) -> Tensor:
        """Rows [batch, dim] of a state of the field's own layout. Raises TypeError or ValueError for others."""
        if isinstance(y, (tuple, list)):
            y = tuple(map(self.in_own_dtype, y))
        else:
            y = self.in_own_dtype(y)
        if (reason := self.layout.fits(y)) is not None:
            raise ValueError(f"{name}: {reason}")
        rows = self.layout.flatten(y).contiguous()
        if rows.dtype != self.dtype or rows.device != self.device:
            raise TypeError(f"{name}: is {rows.dtype} on {rows.device}, the field {self.dtype} on {self.device}; convert one")
        return rows

    def _layer_by_layer(self, t: Tensor, x: Tensor) -> Tensor:
        """f(t, x) in torch, every layer called as a module."""
        if isinstance(self._program, GraphField):
            return reference_engine(self.vector_field).evaluate(t, x, self.context_of(len(x)))
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
        context = self.context_of(len(x)) if isinstance(self._program, GraphField) else None
        return gradients.evaluate(*self.ready(kind), t, x, noise, context)

    def _check_time(self, t: Tensor | float) -> Tensor:
        like = self._first()
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
        like = self._first()
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
        if self._watch is not None and module is self.module:
            return  # they are its own
        like = None if self.example is None else self._like(self.example)
        held, parameters = self.held(), dict(module.named_parameters())
        with without_zeros(parameters, held, self.shares.trained):
            original, origins = capture_with_origins(module, self.dim if self.layout is None else None, like)
            theirs = Held.by_module(module)
            for name in held.keys() & theirs.keys():  # what is trained was settled when this was compiled
                theirs[name].trained = self.shares.trained[name]
            simplified, found, _ = _simplified(original, origins, theirs)
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
        shares = Shares(found, theirs, (name for program in _time_programs(simplified) for name in program.names))
        if shares != self.shares:
            raise ValueError(
                "copy_to: the module computes its field from its parameters in another way than the one this was compiled "
                "from (shared, scaled or computed weights, or constants that were none)"
            )
        for own_name, (name, elements) in zip(self.shares.recipe.held, shares.recipe.held.items()):
            write(parameters[name], elements, self._entry(own_name))
        for number, name in self.shares.own:
            origin, tensor = found[number, name], self.layers[number].tensor(name)
            for which, parameter in enumerate(origin.parameters):
                own = origin.parameter == which
                write(parameters[parameter], origin.index[own], tensor[own.to(tensor.device)])

    def _like(self, shape: tuple) -> State:
        """An example of a state of this shape, or of these shapes."""
        if shape and isinstance(shape[0], tuple):
            return tuple(map(self._like, shape))
        generator = torch.Generator().manual_seed(0)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.device, self.dtype)

    # ------------------------------------------------------------------------------------------------- telling of it

    @factories_on_cpu
    def report(self) -> str:
        """For people: the layers that remain, what was removed, the engine and the divergence, each with its reason."""
        field = self.vector_field
        if isinstance(field, GraphField):
            return "\n".join([*describe_graph(field), "", *self._engine_lines(field), *field.notes])
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
        lines += ["", *self._engine_lines(field)]
        if self._simplification:
            lines += ["", self._simplification]
        lines += [note for note in field.notes if note not in self._simplification]
        return "\n".join(lines)

    def _engine_lines(self, field: VectorField | GraphField) -> list[str]:
        """Who runs it, and how the divergence is computed."""
        engine, reason = choose(field, self.requested)
        lines = [f"multiply-adds per sample and evaluation: {self.nnz}", f"engine: {engine.name} ({reason})"]
        lines += self.packed().describe()
        lines += self._gradient_lines()
        for kind in KINDS if self.layout is None or not self.layout.is_tuple else ():
            plan = self.divergence_plan(kind)
            costs = ", ".join(f"{name} {cost}" for name, cost in plan.costs.items())
            form = type(plan.form).__name__.removesuffix("Form").lower()
            lines.append(f"{kind} divergence: {form} form; {plan.reason} [multiply-adds: {costs}]")
        return lines

    def _gradient_lines(self) -> list[str]:
        """Who makes the gradient in x and the parameters: one line, or one for the field and each divergence."""
        told: dict[str, list[str]] = {}
        for kind in (None, *(KINDS if self.layout is None or not self.layout.is_tuple else ())):
            engine = self.packed(kind)
            obstacle = engine.no_gradient(("x", "tensors"))
            who = f"{engine.name}" if obstacle is None else f"reference, in plain PyTorch, because {obstacle}"
            told.setdefault(who, []).append("field" if kind is None else kind)
        if len(told) == 1:
            return [f"gradient: {who}" for who in told]
        return [f"gradient ({', '.join(kinds)}): {who}" for who, kinds in told.items()]


def _time_programs(field: VectorField | GraphField) -> list[TimeProgram]:
    """Functions of time that read parameters of the module."""
    if isinstance(field, GraphField):
        functions = [node.function for node in order([field.output]) if node.kind == "time"]
    else:
        functions = [part.function for _, _, part in _time_functions(field)]
    return [function for function in functions if isinstance(function, TimeProgram)]


def _time_functions(field: VectorField | GraphField) -> list[tuple[int, str, TimeFunction]]:
    """(layer number, "gate" or "shift", function) of a chain."""
    if isinstance(field, GraphField):
        return []
    return [
        (number, kind, part)
        for number, layer in enumerate(field.layers)
        for kind in ("gate", "shift")
        if isinstance(part := getattr(layer, kind), TimeFunction)
    ]


def _layout(layer: Layer | Part) -> str:
    if isinstance(layer, Part):
        return "numbers" if layer.pattern is None else f"{list(layer.pattern.shape)} with {layer.pattern.nnz} weights"
    return (
        f"{layer.out_features} x {layer.in_features} with {layer.pattern.nnz} weights, {layer.activation.name}, "
        f"gate {_part_name(layer.gate)}, shift {_part_name(layer.shift)}"
    )


def _same_layout(one: Layer | Part, other: Layer | Part) -> bool:
    if isinstance(one, Part) or isinstance(other, Part):
        return type(one) is type(other) and one.values.shape == other.values.shape and (
            one.pattern is other.pattern if one.pattern is None or other.pattern is None
            else _same_pattern(one.pattern, other.pattern)
        )  # fmt: skip
    return (
        _same_pattern(one.pattern, other.pattern)
        and one.activation == other.activation
        and [name for name, _ in one.tensors()] == [name for name, _ in other.tensors()]
    )


def _same_pattern(one: Pattern, other: Pattern) -> bool:
    return one.shape == other.shape and torch.equal(one.row_ptr, other.row_ptr) and torch.equal(one.col, other.col)


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


