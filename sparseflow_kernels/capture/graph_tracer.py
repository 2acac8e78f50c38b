"""Running a module's forward, and reading it as a graph."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..field import Graph, GraphField, Node, UnsupportedFieldError
from ..trained import Held
from .branches import Branches
from .context import Context, ReadContext, attribute, names_of
from .elements import ANY, Elements, rows_of, samples_of
from .functions import primitive
from .graph_lookups import LISTS, refuse_mask, varies
from .graph_operations import apply_to_elements
from .graph_probe import GraphProbe
from .graph_table import GraphTable
from .graph_time import TimeReader
from .memory import found_in, geometry, overlap, replaced, taken
from .operations import FACTORIES, base_name
from .untouched import untouched
from .probe import plain_operations
from .python_times import PythonTimes, SlotReader
from .reads import Reads, checks
from .refusal import REMEDY, refuse
from .samples import STRIDE
from .tracer import Following, _memory
from .trees import tree_leaves, tree_map
from .values import NOT_PLAIN, Constant, Opaque, StateValue

MOST_CONTEXT = 1 << 16  # rows of context, while it is not known how many there are


class GraphTracer(Following):
    """Reads one run of module(t, state): `read` gives the node of the result, `field` the field.

    context: None: constants that differ from sample to sample raise NeedsContext; else they become the context, and this
    is its number of rows, or more than that.  names: of the module's tensors that may be the context; None: all of those
    with a row for every sample.  times: what Python makes of t, where forward reads it.
    """

    attends = True

    def __init__(
        self, module: nn.Module, probe: GraphProbe, context: int | None = None, names: set[str] | None = None,
        times: PythonTimes | None = None,
    ) -> None:  # fmt: skip
        super().__init__(module, probe.dtype)
        if times is not None:
            self.slots = SlotReader(times, probe.dtype, probe.device)
        self.probe, self.graph = probe, Graph()
        self._input, self._time, _ = GraphField.inputs(self.graph, probe.layout.dim)
        held = Held.by_module(module, self.seen.moving, self.seen.zeros)
        self.table = GraphTable(self.graph, self.parameters, held, probe.device)
        self.elements = Elements(self.table, probe.batch, lambda: self.stack.path, self.layer_name)
        self.context: Context | None = None
        self._context_names = {}
        if context is not None:
            self.context = Context(self.elements, probe.batch, context)
            self.elements.context_ids = self.context.ids
            found = names_of(module, probe.batch)
            self._context_names = {key: leaf for key, leaf in found.items() if names is None or leaf.name in names}
            self.table.attribute = self._attribute

    def read(self, flagged: bool = True) -> tuple[Node, list[str]]:
        """(the node of the result, notes for people). Raises UnsupportedFieldError for what no rule expresses. flagged: as in
        training, gradients are on and the state requires one, for forwards that ask."""
        t, rows = self.probe.point()
        lines = torch.arange(self.probe.batch)[:, None] * STRIDE + self.table.add(self._input)
        self._keep = [t]
        self.bind_time(t)
        reader = TimeReader(self.elements, self._time, t.detach().reshape(()), self.parameters, self._attribute)
        self.elements.time_ids = reader.ids
        ways = Branches(reader.ids)
        self.branches = ways if self.slots is None else None  # slots are what they are on all ways
        error = None
        while ways.begin():
            state = self.probe.state(rows)
            parts = list(state) if isinstance(state, tuple) else [state]
            self._keep += [state, parts]
            for part, ids in zip(parts, self.probe.parts_of(lines)):
                self.bind(part.requires_grad_(flagged), StateValue(ids))
            again = untouched(self.module) if len(ways.ways) > 1 else contextlib.nullcontext()
            try:
                with again, torch.set_grad_enabled(flagged), Reads(self), self, self.stack.following(), plain_operations():
                    out = self.probe.call(self.module, t, state)
            except (AssertionError, ValueError) as raised:  # on this way
                if isinstance(raised, UnsupportedFieldError) or not ways.now.asked:
                    raise
                error = raised
                continue
            with self.stack.naming(), torch.no_grad():
                ways.now.rows = self._result(out, lines)
        if error is not None and all(way.rows is None for way in ways.ways):
            raise error
        with self.stack.naming(), torch.no_grad():
            return self.table.node_of(ways.chosen(self.elements)), [
                f"capture: {formula.names or 'a function of t'} is kept as a general function of t"
                for formula in reader.functions
            ]

    def _result(self, out: Any, lines: Tensor) -> Tensor:
        """The numbers of the rows of one sample's derivative, int64 [dim]."""
        outs = list(out) if isinstance(out, (tuple, list)) else [out]
        rows = []
        for part, ids in zip(outs, self.probe.parts_of(lines)):
            if part.is_complex():
                refuse("a complex derivative of a real state", "Return its real part, or torch.view_as_real of it")
            value = self.value_of(part)
            if isinstance(value, Opaque):
                refuse(value.reason)
            made = self.elements.ids(value, None if isinstance(value, StateValue) else samples_of(ids))
            made = made.expand(ids.shape)
            wanted, have = samples_of(ids), samples_of(made)
            if not bool(((have == wanted) | (have == ANY)).all()):
                refuse("a result whose first axis is not the batch")
            rows.append(rows_of(made).reshape(self.probe.batch if self.probe.layout.batched else 1, -1))
        every = torch.cat(rows, 1)
        if not torch.equal(every, every[:1].expand_as(every)):
            refuse(
                "a constant that differs from sample to sample of the batch",
                "Make it part of the state (columns whose derivative is zero) and cut it off again inside forward. "
                f"Otherwise u{REMEDY[1:]}",
            )
        return every[0].contiguous()

    def field(self, output: Node, notes: list[str]) -> GraphField:
        context = self.context if self.context is not None and self.context.count else None
        node = None if context is None else self.graph.input("context", context.count, 4)
        return GraphField(
            self.graph, self._input, self._time, node, self.graph.spread(output, self.probe.layout.dim),
            self.table.parts, self.probe.device, self.probe.dtype, notes, layout=self.probe.layout,
            read_context=None if context is None else ReadContext(self.module, context, self.probe.dtype),
        )  # fmt: skip

    # --------------------------------------------------------------------------------------------- values of tensors

    def _attribute(self, leaf: Any) -> Constant:
        return self.value_of(attribute(self.module, leaf.name))

    def value_of(self, tensor: Tensor) -> Any:
        """The value of a tensor. A tensor that was not met before may show memory that was: what autograd has kept, for
        example. Others are constants."""
        value = self.values.get(id(tensor))
        if value is not None:
            return value
        value = self._in_known_memory(tensor)
        if value is None:
            value = self.constant_of(tensor)
        self.bind(tensor, value)
        return value

    def constant_of(self, tensor: Tensor) -> Constant:
        leaf = self._context_names.get(id(tensor))
        if leaf is None:
            return super().constant_of(tensor)
        return Constant(tensor.detach(), torch.full(tensor.shape, NOT_PLAIN), None, leaf)

    def _detached(self, value: StateValue) -> StateValue:
        with torch.utils._python_dispatch._disable_current_modes(), torch.no_grad():
            return self.elements.pointwise(primitive("detached"), value)

    def _in_known_memory(self, tensor: Tensor) -> Any:
        if tensor.layout != torch.strided or not tensor.numel():
            return None
        known = self.aliases.get(_memory(tensor))
        if not known:
            return None
        for other in known:
            if geometry(other) == geometry(tensor):
                return self.values[id(other)]
        for other in sorted(known, key=Tensor.numel, reverse=True):
            if other.dtype != tensor.dtype or isinstance(self.values[id(other)], Opaque):
                continue
            number = found_in(tensor, other)
            if bool((number >= 0).all()):
                return taken(self.values[id(other)], number)
        if any(not isinstance(self.values[id(other)], Constant) for other in known):
            refuse("a tensor that shares memory with the state in a way that is not followed")
        return None

    def rebind(self, tensor: Tensor, value: Any) -> None:
        """The value of a tensor after an operation in place, which other tensors of the same memory follow."""
        self.pairs.check_written(tensor)
        self.bind(tensor, value)
        for other in self.aliases[_memory(tensor)]:
            if other is tensor or not overlap(other, tensor):
                continue
            if geometry(other) == geometry(tensor):
                self.values[id(other)] = value
                continue
            number = found_in(other, tensor)
            if not bool((number >= 0).any()):
                continue
            old = self.values[id(other)]
            if isinstance(value, Opaque) or isinstance(old, Opaque):
                reason = value if isinstance(value, Opaque) else old
                self.values[id(other)] = Opaque(other.shape, reason.reason)
            else:
                with torch.utils._python_dispatch._disable_current_modes(), torch.no_grad():
                    self.values[id(other)] = replaced(old, value, number, self.elements.ids)

    # ------------------------------------------------------------------------------------------------------ operations

    def _abstract(self, func, args: tuple, kwargs: dict, out: Any) -> Any:
        base = base_name(func)
        if base in ("is_same_size", "_has_same_storage_numel", "_linalg_check_errors"):
            return out  # it asks for shapes alone
        opaque = next((a for a in tree_leaves((args, kwargs)) if isinstance(a, Opaque)), None)
        if opaque is not None and base not in FACTORIES:
            if torch.Tag.data_dependent_output in func.tags:
                if opaque.checks:
                    return out
                refuse(f"reading a number out of {opaque.reason}")
            told = checks(base, args)
            return tree_map(lambda x: Opaque(x.shape, opaque.reason, told) if isinstance(x, Tensor) else x, out)
        if base == "as_strided":  # as autograd writes into a part of a gradient
            value = self._in_known_memory(out)
            if value is not None:
                return value
        if base in FACTORIES:
            out = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, out)  # it may be filled later
        return super()._abstract(func, args, kwargs, out)

    def _of_state(self, func, args: tuple, kwargs: dict, out: Any) -> Any:
        self.graph.origin = self.stack.path
        first = self.given[0] if self.given else None
        self.elements.copies_whole = isinstance(first, Tensor) and not first.is_floating_point()
        if base_name(func) in LISTS:
            masks = (isinstance(i, Tensor) and i.dtype == torch.bool and varies(a) for i, a in zip(self.given[1], args[1]))
            if any(masks):
                refuse_mask()
        with torch.utils._python_dispatch._disable_current_modes(), torch.no_grad():
            value = apply_to_elements(self.elements, func, args, kwargs, out)
        if isinstance(value, (StateValue, Opaque)) and checks(base_name(func), args):
            value = replace(value, checks=True)
        return value
