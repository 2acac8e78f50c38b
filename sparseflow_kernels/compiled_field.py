"""The door users come through: a module compiled to a field (`compile`).

It is an nn.Module that goes wherever the original `f(t, y)` went. Values come from the chosen engine, gradients as
`gradients` says.
"""

from __future__ import annotations

import threading
from typing import Any, Callable, Iterable

import torch
from torch import Tensor, nn

from . import gradients, operators
from .capture import unwrapped
from .capture.context import dotted
from .devices import factories_on_cpu, lasting, ordinary
from .divergence import DivergencePlan, Kind
from .engines import choose, reference_engine
from .engines.base import Engine
from .engines.reference import ReferenceEngine, is_autocast_enabled, own_precision
from .field import GraphField, UnsupportedFieldError, VectorField
from .field.from_chain import graph_of_chain
from .field.layout import State
from .field_parameters import FieldParameters, follow_assigned
from .hooks import CALLBACKS, GLOBAL_HOOKS, hooks_of
from .live import Run
from .origin import Key, Origin
from .packing import Packing
from .reading import Reading, check_fits, example_of, shapes_of
from .reading_live import read_and_run, tell_what_was_taken
from .report import describe_chain, describe_graph, engine_lines
from .tables import Report
from .trained import Held, check_made_again
from .write_back import write_back

_follow_assigned = follow_assigned  # where pickles of version 0.1.0 look for it


@lasting
def compile(  # noqa: A001 (the field's own word; the builtin is not needed here)
    module_or_field: nn.Module | VectorField | GraphField, engine: str = "auto", dim: int | None = None,
    like: State | None = None, live: bool = False,
) -> "CompiledField":  # fmt: skip
    """Read the field out of a module `f(t, y)`, simplify it exactly and hand it to an engine.

    module_or_field: a module f(t, y) made of linear maps, elementwise functions, products, sums, norms, functions of t
    and numbers per sample (`capture`); a VectorField or GraphField; or a CompiledField, to compile its current values
    again (after pruning them, or for another engine).
    engine: "auto" (by device and fit), "reference", "cpu", "cuda", "triton".  dim: size of the state, where capture
    cannot tell.  like: an example of the state, y0, in the module's dtype and on its device: a tensor [..., dim], or
    where the module needs it a tensor [batch, ...], a tensor without samples, or a tuple of tensors. The module is
    compared with the field on states of its shape.

    A field of states [..., dim] runs every row [dim] by itself. A module may not do so for states with more axes
    (points that see their mean): without an example these raise UnsupportedFieldError when the field is called; with
    one, the field's states are those of the example's shape, for any number of samples.

    The result keeps the module's dtype and device and shares no memory with it. It trains what the module trains and
    nothing else (`trained`): buffers and constants of the code are fixed, parameters used in several places are one.

    live: the parameters stay the module's own. The module becomes a submodule of the result (`.module`), every call
    gathers the parameters' present values, and gradients arrive in their `.grad`, through masks, parametrizations and
    sharing: an optimizer, a checkpoint or a wrapper made for the module goes on working. Exact zeros count as pruned,
    as ever. Where a mask, the set of parameters or training/evaluation mode changes, or a pruned entry comes back,
    the next call compiles anew. So it does where another tensor of the module has other numbers for the first time (a
    buffer, an attribute, what a function closes over); from then on that one is read at every call too. One that
    requires a gradient, as an encoder's output does, is from the start, and gradients flow on into what made it.

    Raises UnsupportedFieldError for what cannot be expressed, or not run by the engine asked for; ValueError for an
    unknown engine, or a `dim` or `like` that does not fit; TypeError for other objects.
    """
    return compile_moving(module_or_field, engine, dim, like, live)


@lasting
def compile_moving(
    module_or_field: nn.Module | VectorField | GraphField, engine: str, dim: int | None, like: State | None, live: bool,
    moving: frozenset[str] = frozenset(), zeros: bool = False,
) -> "CompiledField":  # fmt: skip
    """`compile`. moving: names of tensors beside a live field's parameters that have had other numbers before
    (`live.Watch.moved`), and are read like parameters.  zeros: those of trained parameters are no pruned
    entries."""
    source = unwrapped(module_or_field)
    if like is not None:
        like = ordinary(like)
    if live and (not isinstance(source, nn.Module) or isinstance(source, CompiledField)):
        raise TypeError(f"live: needs the nn.Module whose parameters are to be used, not {type(source).__name__}")
    found, run, seen = read_and_run(source, dim, like, live, moving, _in_plain_torch, zeros)
    if dim is not None and found.field.dim != dim:
        raise ValueError(f"compile: dim is {dim}, but the field's state has {found.field.dim} components")
    if like is not None and isinstance(source, (CompiledField, VectorField, GraphField)):
        check_fits(found.field, like)
    found = found.simplified()
    if not live and isinstance(source, nn.Module):
        tell_what_was_taken(source, found, seen)
    compiled = CompiledField(
        found.field, engine, origins=found.origins, held=found.held, simplification=found.told,
        source=source if live else None, run=run,
    )  # fmt: skip
    if like is not None:
        compiled.example = shapes_of(like)
    elif isinstance(source, CompiledField):
        compiled.example = source.example
    if compiled.shares.derived:
        check_made_again(found.field, compiled.ordered)
    for name in CALLBACKS:  # torchdiffeq looks for them on what it is given
        if (callback := getattr(source, name, None)) is not None:
            setattr(compiled, name, callback)
    return compiled


def _in_plain_torch(found: Reading, module: nn.Module) -> "CompiledField":
    """What was read of a module, over its own parameters."""
    return CompiledField(found.field, "reference", origins=found.origins, held=found.held, source=module)


class CompiledField(FieldParameters):
    """A compiled vector field, `field(t, y) -> dy/dt`. Made by `compile`.

    Its parameters are the remaining weights (`layers.<l>.values`, in CSR order of the layer's pattern), biases and time
    parameters, so an optimizer holds state for nothing else. Where a tensor of the field is no plain piece of the
    module's parameters (scaled, shared, computed, folded), its parameters are the entries it is made from,
    `entries.<name in the module>`. What the module does not train is a buffer. A state dict fits a field compiled from
    the same masks.

    torch.compile and torch.export see one opaque operator per evaluation or solve, with its gradient (`operators`); an
    exported program of torch runs wherever this package was imported. Fields with functions of time that are Python
    break a graph; exported, their evaluations are torch operations, and their solves are refused.

    dim: size of the state.  nnz: weights, that is multiply-adds per sample and evaluation.  nfe: evaluations so far, in
    calls of the field and in solves (gradients add none); set it to 0 to count anew. What a live field's module counts
    itself (`self.nfe += 1` in forward) is counted on as well.
    """

    example: tuple | None = None  # the shape of the `like` it was compiled with, or the shapes of its tensors
    _context: Tensor | None = None  # given by `with_context`
    _pinned: Callable[[], Tensor | None] | None = None  # what gives a `pinned` field its context

    def __init__(
        self, field: VectorField | GraphField, engine: str = "auto", *, origins: dict[Key, Origin] | None = None,
        held: dict[str, Held] | None = None, simplification: str = "", source: nn.Module | None = None,
        run: Run | None = None,
    ) -> None:  # fmt: skip
        """origins, held: of the field's tensors, and of the parameters these name; None: the tensors are parameters.
        source: the module whose own parameters are used, and what running it has shown."""
        choose(field, engine)  # says now what would go wrong later
        super().__init__(field, origins, held, source, run)
        self.nfe = 0
        self.requested = engine
        self.described = operators.describe(field, engine)
        self._simplification = simplification
        self._packing = Packing(engine)
        self._own_times: tuple[Packing, GraphField] | None = None  # a chain as the graph that takes a time per sample
        self._inner_hooks: list[dict] | None = None
        self._looked_at: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        forgotten = dict.fromkeys(("_own_times", "_inner_hooks"))
        return {**super().__getstate__(), **forgotten, "_looked_at": None, "_packing": Packing(self.requested)}

    def mark_looked_at(self, looked_at: bool) -> None:
        """Whether the caller, in this thread, has just seen that the module is what it was: the next solve does
        not look once more."""
        self.__dict__["_looked_at"] = threading.get_ident() if looked_at else None

    def changed(self) -> bool:
        """Whether the module is another than the one that this field was compiled from (`live`)."""
        return self._watch.changed()

    @property
    def bare_zeros(self) -> bool:
        """Whether it leaves entries out that torch would train (`live`): zeros of parameters without a mask."""
        return self._watch.bare_zeros

    def moved(self) -> frozenset[str]:
        """Names of tensors that the module held as constants, and that have other numbers now (`live`)."""
        return self._watch.moved()

    def follow(self) -> bool:
        """Compile anew where the module is no longer the one that this field was compiled from (`live`). True where it
        is not."""
        if self._pinned is not None:
            return False
        if self._looked_at is not None and self._looked_at == threading.get_ident():
            self.mark_looked_at(False)
            return False
        if not self.changed():
            return False
        like = self._like()
        dim = None if self.layout is not None or like is not None else self.dim
        moving = self.moving | self._watch.moved()
        fresh = compile_moving(self.module, self.requested, dim, like, True, moving, self._watch.zeros)
        own = {
            name
            for name in self.__dict__
            if name.endswith("_hooks") or name in ("training", "_context", "example", "nfe")
        }
        self.__dict__.update({name: value for name, value in fresh.__dict__.items() if name not in own})
        return True

    # ------------------------------------------------------------------------------------------------- what it is

    def _first(self) -> Tensor:
        """Every call asks for it first: where masks have come or gone since the last one, the parameters of a live
        field have other names now."""
        try:
            return super()._first()
        except RuntimeError:
            if self._watch is None:
                raise
            self._slots = None
            self.follow()
            return super()._first()

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
    def divergence_plan(self, kind: Kind = "exact") -> DivergencePlan:
        """How the divergence is computed (`divergence.plan`), counted once."""
        return self._packing.plan(kind, self._live_field)

    def ready(
        self, kind: Kind | None = None
    ) -> tuple[Engine, Callable[[], ReferenceEngine]]:  # fmt: skip
        """(the engine for a call made now, what gives the reference engine over the live parameters for it).

        The engine is `packed(kind)`, or the reference engine where only torch operations may take part."""
        if self._watch is not None:
            self.follow()
            if not gradients.only_torch():
                self._watch.make_weights()
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

    def reference(self, kind: Kind | None = None) -> ReferenceEngine:
        """The reference engine over the live parameters: autograd flows through it to them."""
        field = self.vector_field if torch.compiler.is_compiling() else self._live_field()
        return reference_engine(field, None if kind is None else self.divergence_plan(kind))

    def hooked_inside(self) -> bool:
        """Are there hooks of torch's on the field's layers, or on all modules?"""
        if self._inner_hooks is None:
            layers = [module for layer in self.layers for module in layer.modules()]
            self._inner_hooks = [hooks for module in layers for hooks in hooks_of(module)]
        return any(GLOBAL_HOOKS) or any(self._inner_hooks)

    @factories_on_cpu
    def packed(self, kind: Kind | None = None) -> Engine:
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
                f"t: must be a number, a tensor of one element in at most 2 axes, or a time per sample, [batch] or "
                f"[batch, 1] for y [batch, {self.dim}], not {list(t.shape)} for y {list(y.shape)}"
            )
        if t.is_complex() or t.dtype == torch.bool:
            raise TypeError(f"t: must be real numbers, not {t.dtype}")
        t = t.reshape(-1).to(y)
        if not torch.compiler.is_compiling():
            self.count(1)
        if isinstance(self.skeleton, GraphField):
            ready = self.ready()
            return gradients.evaluate(*ready, t, y.contiguous(), None, self.context_of(len(y)))[0]
        if self._own_times is None:
            packing = Packing("auto" if self.requested not in ("reference", "cpu") else self.requested)
            with torch.no_grad():
                graph = graph_of_chain(self.vector_field).map_tensors(lambda tensor: tensor.to("meta"))
            self._own_times = packing, graph
        packing, graph = self._own_times
        given = iter(self.ordered())
        field = graph.map_tensors(lambda _: next(given))
        if gradients.only_torch():
            return reference_engine(field).evaluate(t, y)
        engine = packing.engine(None, list(self._tensors()), lambda: field)
        return gradients.evaluate(engine, lambda: reference_engine(field), t, y.contiguous(), None)[0]

    # ------------------------------------------------------------------------------------------------- its context

    def with_context(self, context: Tensor) -> "CompiledField":
        """This field, its parameters and engines, with other numbers per sample than those the module holds.

        context: [batch, ...], flattened [batch, context]; gradients flow into it. Raises ValueError where the field has
        none, or one of another size.
        """
        node = getattr(self.skeleton, "context", None)
        if node is None:
            raise ValueError("with_context: this field has no context: its module holds no numbers per sample")
        if not isinstance(context, Tensor) or context.dim() < 1 or context[:1].numel() != node.rows:
            shape = list(context.shape) if isinstance(context, Tensor) else type(context).__name__
            raise ValueError(f"with_context: context must be [batch, {node.rows}], not {shape}")
        other = CompiledField.__new__(type(self))
        other.__dict__ = {**self.__dict__, "_context": context.reshape(len(context), -1)}
        return other

    def pinned(self) -> "CompiledField":
        """This field, which stays what it is now where its module comes to hold other numbers or tensors: for what
        evaluates it later, on behalf of a solve of now."""
        read = getattr(self.skeleton, "read_context", None)
        if self._watch is None and (read is None or self._context is not None):
            return self
        other = CompiledField.__new__(type(self))
        given = (lambda: None) if read is None else read.pinned()
        tensors = {name: self.entry(name) for name in self.moving}
        other.__dict__ = {**self.__dict__, "_pinned": given, "_pinned_tensors": tensors, "count": self.count}
        return other

    @property
    def has_context(self) -> bool:
        return getattr(self.skeleton, "context", None) is not None

    def context_of(self, batch: int) -> Tensor | None:
        """[batch, context]: what `with_context` was given, or what the module holds now; None for a field without."""
        node = getattr(self.skeleton, "context", None)
        if node is None:
            return None
        found = self._context
        if found is None:
            if self.skeleton.read_context is None:
                raise ValueError(
                    f"this field has a context [batch, {node.rows}]: give it by field.with_context(context)"
                )
            found = (self._pinned or self.skeleton.read_context)(batch)
        if found.shape != (batch, node.rows):
            raise ValueError(
                f"context: is {list(found.shape)}, for a state of {batch} samples it must be [{batch}, {node.rows}]; "
                "set the module's attribute, or use field.with_context(context)"
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
            raise TypeError(
                f"{name}: is {rows.dtype} on {rows.device}, the field {self.dtype} on {self.device}; convert one"
            )
        return rows

    def count(self, evaluations: int) -> None:
        """There were so many evaluations."""
        self.nfe += evaluations
        if self._watch is not None:
            self._watch.count(evaluations)

    def _layer_by_layer(self, t: Tensor, x: Tensor) -> Tensor:
        """f(t, x) in torch, every layer called as a module."""
        if not torch.compiler.is_compiling():
            self.count(1)
        if isinstance(self.skeleton, GraphField):
            return reference_engine(self.vector_field).evaluate(t, x, self.context_of(len(x)))
        with own_precision(x):
            for own, layer in zip(self.layers, self.vector_field.layers):
                x = own(t, x, layer)
        return x

    def in_own_dtype(self, y: Any) -> Any:
        """y in the field's dtype where torch.autocast is on, which makes states of other dtypes; else y as it is."""
        if isinstance(y, Tensor) and is_autocast_enabled(y) and y.is_floating_point():
            return y.to(self.dtype)
        return y

    @factories_on_cpu
    def _run(self, kind: Kind | None, t: Tensor, x: Tensor, noise: Tensor | None) -> tuple[Tensor, ...]:
        """(dx,) or (dx, trace) by the engine, for checked x [batch, dim]; with a graph where one is wanted."""
        if torch.compiler.is_compiling():
            if self.described is not None:
                return operators.evaluate(self.described, self.ordered(), kind, t, x, noise)
            if not torch.compiler.is_exporting():
                return _run_eagerly(self, kind, t, x, noise)
        ready = self.ready(kind)  # first: it may find that the module holds a context now
        context = self.context_of(len(x)) if isinstance(self.skeleton, GraphField) else None
        found = gradients.evaluate(*ready, t, x, noise, context)
        self.count(1)
        return self.reaching(found)

    def reaching(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The outputs, from which a gradient of zeros reaches what forward computes with and the field leaves out: the
        weights of a layer that is pruned away. torch's is zero for them, and not None, as those expect who take its
        norm, or who wait for it (DistributedDataParallel)."""
        if not self.dead or not torch.is_grad_enabled() or gradients.only_torch():
            return outputs
        return self._with_zeros_for(map(self.entry, self.dead), outputs)

    def reaching_module(self, ys: State) -> State:
        """The outputs of a solve, from which a gradient of zeros reaches all of a live field's module that forward does
        not read, as it does by torchdiffeq's adjoint."""
        if not self.live or not torch.is_grad_enabled() or gradients.only_torch():
            return ys
        read = {id(self.entry(name)) for name in (*self.shares.recipe.held, *self.dead)}
        unread = (parameter for parameter in self.module.parameters() if id(parameter) not in read)
        found = self._with_zeros_for(unread, ys if isinstance(ys, tuple) else (ys,))
        return found if isinstance(ys, tuple) else found[0]

    @staticmethod
    def _with_zeros_for(parameters: Iterable[Tensor], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        return (gradients.Reaching.apply(outputs[0], *trained), *outputs[1:]) if trained else outputs

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
        refused = self.skeleton.refused_axes
        if refused and (reason := self.skeleton.refused(y.dim())) is not None:
            raise UnsupportedFieldError(f"{name}: is {list(y.shape)}; {reason}")

    # ------------------------------------------------------------------------------------------------- the way back

    @factories_on_cpu
    def copy_to(self, module: nn.Module) -> None:
        """Write the current values into the parameters of the module this was compiled from.

        Entries that simplify took out keep what the module holds, and so do entries behind a pruning mask. Raises
        ValueError, and writes nothing, where the module's masks are not this field's.
        """
        module = unwrapped(module)
        if not self.live or module is not self.module:  # a live field's parameters are the module's own
            write_back(self, module, self._like())

    def _like(self) -> State | None:
        """An example of a state, where it was compiled with one."""
        return None if self.example is None else example_of(self.example, self.device, self.dtype)

    # ------------------------------------------------------------------------------------------------- telling of it

    @factories_on_cpu
    def report(self) -> Report:
        """For people: the layers that remain, what was removed, the engine and the divergence, each with its reason. A
        string, which notebooks show with its table."""
        if self._watch is not None:
            self.follow()
        field = self.vector_field
        if isinstance(field, GraphField):
            before, rows, after = describe_graph(field)
        else:
            before, rows, after = describe_chain(field)
        lines = [*after, "", *engine_lines(self, field)]
        if self._simplification:
            lines += ["", self._simplification]
        lines += [note for note in field.notes if note not in self._simplification]
        if self.layout is not None and not self.layout.batched:
            lines += ["the state is one sample: vectors hold several, so that torch's matrices may be quicker"]
        if self.moving:
            lines += [f"read at every call, like parameters: {', '.join(sorted(map(dotted, self.moving)))}"]
        return Report(before, rows, lines)


@torch._disable_dynamo  # torch.compiler.disable, which would import the compiler with this package
def _run_eagerly(field: CompiledField, *arguments: Any) -> tuple[Tensor, ...]:
    return field._run(*arguments)
