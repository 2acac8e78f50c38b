"""The numbers of a compiled field as parameters: what optimizers and state dicts see, and the field made from them
again."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any, Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from .capture.context import PREFIX, part_named, tensor_named
from .capture.replay import TimeFormula
from .field import GraphField, TimeFunction, VectorField
from .field.graph import order, parts_with_gradient
from .field.layout import Layout
from .layer_parameters import LayerParameters, lost, zeroing
from .live import Run, Watch
from .origin import CONSTANT, Derivation, Key, Origin, real_part
from .packing import strided
from .trained import Entries, Held, Shares


class FieldParameters(nn.Module):
    """A field whose tensors are parameters and buffers of a module, or are made from them at every call (`trained`)."""

    layout: Layout | None = None  # of its states, where they are not [..., dim]
    _watch: Watch | None = None  # of the module whose parameters are used
    _idle: frozenset[int] = frozenset()  # parts of a graph that no gradient reaches: torch's is None for them, not zero
    moving: frozenset[str] = frozenset()  # names of tensors beside them that are used like them
    dead: tuple[str, ...] = ()  # parameters that the field does not read, and a gradient of zeros reaches
    _pinned_tensors: Mapping[str, Tensor] = {}  # those of a field that stays what it is (`CompiledField.pinned`)

    def __init__(
        self, field: VectorField | GraphField, origins: dict[Key, Origin] | None, held: dict[str, Held] | None,
        source: nn.Module | None, run: Run | None = None,
    ) -> None:  # fmt: skip
        """origins, held: of the field's tensors, and of the parameters these name; None: the tensors are parameters.
        source: the module whose own parameters are used, and what running it has shown."""
        super().__init__()
        self._owners: dict[str, tuple[nn.Module, str]] = {}  # of entries, by their names
        if source is not None:
            self.module = source
            read = getattr(field, "read_context", None)
            followed = dict.fromkeys(() if read is None else read.tensors, 1)
            names = {name for origin in (origins or {}).values() for name in origin.parameters}
            self.moving = frozenset() if run is None else run.moving
            self._watch = Watch(source, names, {**dict.fromkeys(self.moving, 0), **followed}, run)
        if origins is None:
            origins, held = Held.by_tensors(field)
        self.origins = origins
        whole = (name for formula in time_formulas(field) for name in formula.names)
        self.shares = Shares(origins, held, whole, live=source is not None)
        if run is not None:
            self.dead = tuple(sorted(run.reached - self.shares.recipe.held.keys()))
        self._make_parameters(field, held)
        # The parameters hold the numbers from here on: the skeleton is the field without them.
        self.skeleton = field.map_tensors(lambda tensor: tensor.detach().to("meta"))
        if isinstance(field, GraphField):
            self._idle = frozenset(range(len(field.parts))) - parts_with_gradient(field.output)
            if not field.layout.plain:
                self.layout = field.layout
        self.register_load_state_dict_post_hook(follow_assigned)
        self._slots: list[tuple[nn.Module, str, str]] | None = None
        self._live: tuple[list[Tensor], VectorField] | None = None

    def _make_parameters(self, field: VectorField, held: dict[str, Held]) -> None:
        recipe = self.shares.recipe
        entries = {} if self._watch is None else {name: self.entry(name) for name in recipe.held}
        entries = entries or {
            name: nn.Parameter((held[name].values if e is None else held[name].take(e)).clone(), held[name].trained)
            for name, e in recipe.held.items()
        }
        if entries and self._watch is None:
            self.entries = Entries(entries)
        functions: dict[int, dict[str, nn.Module]] = {number: {} for number in range(len(field.layers))}
        for number, kind, part in time_functions(field):
            function = part.function
            if isinstance(function, TimeFormula):
                function = function.over(entries.__getitem__)
            if isinstance(function, nn.Module):
                functions[number][f"{kind}_function"] = function
        if isinstance(field, GraphField):
            for formula in time_formulas(field):  # they are the graph's own
                formula.read(entries.__getitem__)
            if not field.parts:  # a field without tensors has a dtype and a device all the same
                self.register_buffer(
                    "_nothing", torch.empty(0, dtype=field.dtype, device=field.device), persistent=False
                )
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
        if "_program" in state:  # its name in pickles of version 0.1.0
            state = {**state, "skeleton": state["_program"]}
            del state["_program"]
        super().__setstate__({"_owners": {}, **state})
        self._mask_gradients()  # copies and pickles of a parameter lose its hooks

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_owners": {}, **dict.fromkeys(("_slots", "_live", "_masked"))}

    def held(self, of: Callable[[Tensor], Tensor] = Tensor.detach) -> dict[str, Held]:
        """The elements of the module's parameters that this field holds, by the parameters' names in the module, with
        their values, or what else `of` gives of a parameter (its gradient, say)."""
        parts: dict[str, list[Held]] = {}
        for name, elements in self.shares.recipe.held.items():
            parameter = self.entry(name)
            parts.setdefault(name, []).append(Held(elements, of(parameter), parameter.requires_grad))
        for key in self.shares.own:
            origin, tensor = self.origins[key], self.layers[key[0]].tensor(key[1])
            for number, name in enumerate(origin.parameters):
                own = (origin.parameter == number).nonzero()[:, 0]
                elements, order = origin.index[own].sort()
                values = of(tensor)[own[order].to(tensor.device)]
                parts.setdefault(name, []).append(Held(elements, values, tensor.requires_grad))
        return {name: Held.together(several) for name, several in parts.items()}

    def entry(self, name: str) -> Tensor:
        if name.startswith(PREFIX):
            pinned = self._pinned_tensors.get(name)
            return tensor_named(self.module, name) if pinned is None else pinned
        known = self._owners.get(name)
        if known is None:  # the owner stays: a live field whose module has other parts is compiled anew
            owner, _, leaf = name.rpartition(".")
            tree = self.entries if self._watch is None else self.module
            known = self._owners[name] = part_named(tree, owner), leaf
        module, leaf = known
        return module._parameters[leaf]

    @property
    def live(self) -> bool:
        """Its parameters are its module's own."""
        return self._watch is not None

    @property
    def vector_field(self) -> VectorField | GraphField:
        """The field over the live parameters: changes of these are changes of it. Differentiable in them."""
        given = iter(self.ordered())
        field = self.skeleton.map_tensors(lambda _: next(given))
        if isinstance(field, GraphField):
            return field if field.parts else replace(field, dtype=self.dtype, device=self.device)
        for number, kind, part in time_functions(field):
            if isinstance(part.function, nn.Module):
                own = self.layers[number]._modules[f"{kind}_function"]
                setattr(field.layers[number], kind, TimeFunction(own, part.rows))
        return field

    @property
    def dim(self) -> int:
        """Of a state [..., dim]; of one of another shape, all numbers of a sample."""
        return self.skeleton.dim

    @property
    def nnz(self) -> int:
        return self.skeleton.nnz

    @property
    def dtype(self) -> torch.dtype:
        return self._first().dtype

    @property
    def device(self) -> torch.device:
        return self._first().device

    @property
    def is_detached(self) -> bool:
        """Whether forward detaches what it computes of the state, so that some of its derivatives are not all of
        them."""
        return isinstance(self.skeleton, GraphField) and any(
            node.kind == "detached" for node in order([self.skeleton.output])
        )

    @property
    def python_functions(self) -> list[Any]:
        """Functions of time that are computed in Python at every stage."""
        if isinstance(self.skeleton, GraphField):
            return [node.function for node in self.skeleton.functions]
        return [part.function for _, _, part in time_functions(self.skeleton)]

    def ordered(self) -> list[Tensor]:
        """The field's tensors in the order of `VectorField.tensors()`, differentiable in the parameters; plainly
        enough for torch.compile to read."""
        derivation = None
        if self.shares.derived:
            recipe = self.shares.recipe
            derivation = Derivation(recipe, {name: self.entry(name) for name in recipe.held})
        found = []
        for number, name in self.origins:
            tensor = self.layers[number].tensor(name)
            if tensor is None:
                tensor = derivation.tensor(self.origins[number, name])
            elif (number, name) in self._absent and (
                torch.compiler.is_compiling() or tensor is not self._masked[number, name]
            ):
                tensor = tensor.masked_fill(self._absent[number, name].to(tensor.device), 0)
            found.append(tensor.detach() if number in self._idle else tensor)
        return found

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
                tensor = getattr(module, kind)[name]  # torch.export puts other dictionaries in their place for a while
            except KeyError:
                raise lost(name) from None
            if tensor is None:
                continue
            if tensor.layout is torch.strided:
                yield tensor
            else:
                yield from strided(tensor)
        for name in self.moving:
            yield self.entry(name)

    def _first(self) -> Tensor:
        """One of the field's dtype, on its device: a module may hold masks and indices beside its numbers."""
        found = next((tensor for tensor in self._tensors() if tensor.is_floating_point()), None)
        return real_part(next(filter(Tensor.is_complex, self._tensors()))) if found is None else found


def time_formulas(field: VectorField | GraphField) -> list[TimeFormula]:
    """Functions of time that read parameters of the module."""
    if isinstance(field, GraphField):
        functions = [node.function for node in field.functions]
    else:
        functions = [part.function for _, _, part in time_functions(field)]
    return [function for function in functions if isinstance(function, TimeFormula)]


def time_functions(field: VectorField | GraphField) -> list[tuple[int, str, TimeFunction]]:
    """(layer number, "gate" or "shift", function) of a chain."""
    if isinstance(field, GraphField):
        return []
    return [
        (number, kind, part)
        for number, layer in enumerate(field.layers)
        for kind in ("gate", "shift")
        if isinstance(part := getattr(layer, kind), TimeFunction)
    ]


def follow_assigned(field: FieldParameters, _: Any) -> None:
    """load_state_dict(assign=True) has put other parameters in the place of ours: functions of time read those of
    `entries`, and hooks are lost."""
    if any(field.layers[n].tensor(name) is not own for (n, name), own in field._masked.items()):
        field._mask_gradients()
    for module in field.layers.modules():
        if isinstance(module, TimeFormula):
            module.read(field.entry)
