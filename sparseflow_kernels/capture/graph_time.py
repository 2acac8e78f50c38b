"""Functions of t as nodes.

What forward computes from t alone is kept as operations to be replayed (replay.py). Where it meets the state it is read by
the same rules as everything else, so that the parameters in it are parts of the field. What no rule knows (a lookup, whole
numbers) becomes a function of time that stays in Python.
"""

from __future__ import annotations

import contextlib
import operator
from dataclasses import dataclass
from typing import Any, Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..field import UnsupportedFieldError
from . import algebra
from .elements import Elements, same_for_all
from .graph_operations import apply_to_elements
from .graph_rules import WHOLE
from .operations import aten, base_name, call
from .provenance import ParameterNumbers
from .python_times import Slot
from .refusal import REMEDY, refuse
from .replay import Attribute, Leaf, Node, TimeFormula
from .trees import tree_leaves, tree_map
from .values import Constant, StateValue, TimeValue

ALIKE_AT = (0.618, 0.0, 0.31, 1.0, -0.7, 1.9, 7.3, 25.0)  # times at which copies of a function are compared


@dataclass(eq=False)
class Unread:
    """A function of t that is not made of rows: whole numbers, truth values, other dtypes."""

    node: Node


@dataclass(eq=False)
class Read:
    """What is known of a node of the replay. value: the result at the time of the run.  abstract: its elements, a Constant
    or Unread. For an operation with several results both are lists."""

    value: Any
    abstract: Any


class TimeReader:
    """Gives the elements of functions of t. functions: those of time that stay in Python."""

    def __init__(
        self, e: Elements, time: Node | Any, t: Tensor, parameters: ParameterNumbers,
        attribute: Callable[[Attribute], Constant],
    ) -> None:  # fmt: skip
        """time: the node of the graph's input.  t: 0-d, the time of the run.  attribute: gives what the module holds."""
        self._e, self._t, self._parameters, self._attribute = e, t, parameters, attribute
        self._time = StateValue(same_for_all(e.table.add(time)).reshape(()))
        self._known: dict[int, tuple[Any, Read]] = {}
        self.functions: list[TimeFormula] = []

    def ids(self, value: TimeValue) -> Tensor:
        with torch.utils._python_dispatch._disable_current_modes(), torch.no_grad():
            return self.elements(self._read(value.node), value.node).view(value.shape)

    def elements(self, read: Read, node: Node) -> Tensor:
        if isinstance(read.abstract, StateValue):
            return read.abstract.ids
        if isinstance(read.abstract, Constant):
            return self._e.ids(read.abstract)
        key = id(read.abstract)
        if key not in self._known:
            self._known[key] = (read.abstract, Read(read.value, StateValue(self._function(node, read.value))))
        return self._known[key][1].abstract.ids

    def _function(self, node: Node, value: Tensor) -> Tensor:
        flat = Node(aten.reshape.default, (Node(aten._to_copy.default, (node,), {"dtype": self._e.table.dtype}), [-1]))
        formula = self._formula(flat)
        first, inverse = self._alike(formula, value)
        if first.numel() < value.numel():
            flat = Node(aten.index_select.default, (flat, 0, first.to(self._e.table.device)))
            formula = self._formula(flat)
        if any(self._parameters.trained(name) for name in formula.names):
            refuse(
                f"a function of t that reads the parameters {', '.join(map(repr, formula.names))} in ways that are not "
                "followed (in another dtype, as whole numbers)",
                f"Compute it in the module's dtype with tensors. Otherwise u{REMEDY[1:]}",
            )
        self.functions.append(formula)
        made = self._e.graph.time_function(formula, first.numel())
        return same_for_all(self._e.table.add(made, first.numel())[inverse]).view(value.shape)

    def _formula(self, node: Node) -> TimeFormula:
        return TimeFormula(node, self._e.table.dtype, self._parameters.value)

    def _alike(self, formula: TimeFormula, value: Tensor) -> tuple[Tensor, Tensor]:
        """Elements that are one function for all samples: those of the first, and for every element its number among
        them. An axis as long as the batch is one of copies, where its numbers agree at all times."""
        places = torch.arange(value.numel()).view(value.shape)
        with contextlib.suppress(Exception):  # it is not defined at one of these times
            at = torch.stack([formula(self._t.new_tensor(t)).view(value.shape) for t in ALIKE_AT])
            for axis, size in enumerate(value.shape):
                one = at.narrow(axis + 1, 0, 1)
                if size == self._e.size and size > 1 and bool(((at == one) | (at.isnan() & one.isnan())).all()):
                    places = places.narrow(axis, 0, 1).expand(places.shape)
        return places.reshape(-1).unique(return_inverse=True)

    def _read(self, node: Node) -> Read:
        """Reads the node and, before it, those of its operands that were not read yet."""
        waiting = [node]
        while waiting:
            top = waiting[-1]
            if id(top) in self._known:
                waiting.pop()
                continue
            operands = (a for a in tree_leaves((top.args, top.kwargs)) if isinstance(a, Node))
            before = [a for a in operands if id(a) not in self._known]
            if before:
                waiting += before
            else:
                self._known[id(top)] = (top, self._one(top))
                waiting.pop()
        return self._known[id(node)][1]

    def _one(self, node: Node) -> Read:
        if node.operation is None:
            return Read(self._t, self._time)
        abstract = lambda a: self._argument(a).abstract if isinstance(a, (Node, Leaf, Tensor)) else a
        value = lambda a: self._argument(a).value if isinstance(a, (Node, Leaf, Tensor)) else a
        args, kwargs = tree_map(abstract, node.args), tree_map(abstract, node.kwargs)
        bare_args, bare_kwargs = tree_map(value, node.args), tree_map(value, node.kwargs)
        if node.operation is operator.getitem:
            inner = args[0][args[1]]
            if isinstance(inner, Unread):
                inner = Unread(node)
            return Read(bare_args[0][bare_args[1]], inner)
        out = call(node.operation, bare_args, bare_kwargs)
        leaves, spec = tree_flatten(out)
        if isinstance(out, Tensor):
            return Read(out, self._abstract(node, args, kwargs, out))
        return Read(out, tree_unflatten(self._many(node, args, kwargs, out, leaves), spec))

    def _argument(self, a: Any) -> Read:
        if isinstance(a, Node):
            return self._known[id(a)][1]
        key = id(a)
        if key not in self._known:
            if isinstance(a, Attribute):
                constant = self._attribute(a)
                if constant.value.is_floating_point():
                    self._known[key] = (a, Read(constant.value, self._of_samples(constant)))
                    return self._known[key][1]
            elif isinstance(a, Leaf):
                constant = self._parameters.by_name(a.name)
            else:
                constant = Constant(a)
            self._known[key] = (a, Read(constant.value, constant))
        return self._known[key][1]

    def _of_samples(self, constant: Constant, axis: int = 0) -> StateValue:
        """The elements of a tensor of the module, or of what is computed of it, that has a row for every sample along an
        axis."""
        entries = torch.arange(constant.value.numel()).view(constant.shape)
        lead = [-1 if i == axis else 1 for i in range(entries.dim())]
        samples = torch.arange(constant.shape[axis]).view(lead).expand(constant.shape)
        return StateValue(self._e.context_ids(self._e.typed(constant), entries, samples))

    def _spread(self, a: Any) -> Any:
        """An argument beside others that are the same for all samples, and do not tell whose its numbers are."""
        if isinstance(a, Constant) and a.value.is_floating_point() and self._e.size in a.shape and a.from_attributes:
            return self._of_samples(a, list(a.shape).index(self._e.size))
        return a

    def _abstract(self, node: Node, args: tuple, kwargs: dict, out: Tensor) -> Any:
        leaves = tree_leaves((args, kwargs))
        if not any(isinstance(a, (StateValue, Unread)) for a in leaves):
            if isinstance(node.operation, torch._ops.OpOverload):
                return algebra.evaluate(node.operation, args, kwargs, out)
            constants = [a for a in leaves if isinstance(a, Constant)]
            return Constant(out) if all(c.source is None for c in constants) else Unread(node)
        if isinstance(node.operation, Slot):
            return StateValue(self._function(node, out)) if out.dtype == self._e.table.dtype else Unread(node)
        if not isinstance(node.operation, torch._ops.OpOverload):  # .item(), where func takes a number
            one = next(a for a in leaves if isinstance(a, (StateValue, Unread)))
            return StateValue(one.ids.reshape(())) if isinstance(one, StateValue) else Unread(node)
        if out.dtype not in (self._e.table.dtype, torch.bool, *WHOLE):
            return Unread(node)
        if not any(isinstance(a, Unread) for a in leaves):
            with contextlib.suppress(UnsupportedFieldError):
                self._e.copies_whole = self._is_whole(node)
                args, kwargs = tree_map(self._spread, args), tree_map(self._spread, kwargs)
                made = apply_to_elements(self._e, node.operation, args, kwargs, out)
                if isinstance(made, StateValue) and made.ids.shape == out.shape:
                    return made
        picked = self._picked(node, args, out)
        if picked is not None:
            return picked
        return StateValue(self._function(node, out)) if out.dtype == self._e.table.dtype else Unread(node)

    def _is_whole(self, node: Node) -> bool:
        """The operation is given whole numbers first."""
        first = node.args[0] if node.args else None
        value = self._argument(first).value if isinstance(first, (Node, Leaf, Tensor)) else None
        return isinstance(value, Tensor) and not value.is_floating_point()

    def _picked(self, node: Node, args: tuple, out: Tensor) -> StateValue | None:
        """table[:, index] of parameters, or of numbers given per sample, at an index that depends on t; None for other
        operations.

        The sum of the table's entries, each times one where the index picks it and else times zero, is a product with a
        function of t.
        """
        base = getattr(node.operation, "_schema", None) and base_name(node.operation)
        own = isinstance(args[0], StateValue) or isinstance(args[0], Constant) and args[0].source is not None
        if base not in ("index", "index_select", "embedding") or not own:
            return None
        if base == "index":
            places = [i for i, a in enumerate(args[1]) if a is not None]
            axis, index, read = places[0], args[1][places[0]], node.args[1][places[0]]
            if len(places) != 1:
                return None
        elif base == "embedding":
            axis, index, read = 0, args[1], node.args[1]
        else:
            axis, index, read = args[1], args[2], node.args[2]
        if not isinstance(index, (Unread, StateValue)):
            return None
        ids = self._e.ids(args[0])
        axis = axis % ids.dim()
        size, shape = ids.shape[axis], self._argument(read).value.shape
        column = Node(aten.remainder.Scalar, (Node(aten.reshape.default, (read, [-1, 1])), size))
        picked = Node(aten.eq.Tensor, (column, torch.arange(size, device=self._e.table.device)))
        ones = Node(aten._to_copy.default, (picked,), {"dtype": self._e.table.dtype})
        weights = self._function(ones, torch.zeros(shape.numel(), size))
        found = self._e.products(ids.movedim(axis, -1).unsqueeze(-2), weights)
        found = found.movedim(-1, axis)
        return StateValue(found.reshape(*found.shape[:axis], *shape, *found.shape[axis + 1:]).reshape(out.shape))

    def _many(self, node: Node, args: tuple, kwargs: dict, out: Any, leaves: list) -> list:
        if any(isinstance(a, StateValue) for a in tree_leaves((args, kwargs))) and not any(
            isinstance(a, Unread) for a in tree_leaves((args, kwargs))
        ):
            try:
                made = tree_leaves(apply_to_elements(self._e, node.operation, args, kwargs, out))
                return [m if isinstance(m, StateValue) else Unread(node) for m in made]
            except UnsupportedFieldError:
                pass
        elif not any(isinstance(a, Unread) for a in tree_leaves((args, kwargs))):
            return tree_leaves(algebra.evaluate(node.operation, args, kwargs, out))
        return [Unread(node)] * len(leaves)
