"""What is computed from t and from parameters, in any form, kept as the graph of the operations that computed it."""

from __future__ import annotations

from dataclasses import dataclass, field as dataclass_field
from typing import Any, Callable, Iterator

import torch
from torch import Tensor, nn

from ..origin import Derivation, Origin, real_part
from .operations import call
from .trees import tree_leaves, tree_map


LARGEST_TOLD = 1 << 14  # elements of a tensor whose numbers say which one it is


@dataclass(frozen=True)
class Leaf:
    """A parameter of the module, by name."""

    name: str


@dataclass(frozen=True)
class Attribute(Leaf):
    """A tensor that the module holds, and is no parameter, by what finds it (context.py)."""


@dataclass(eq=False)
class Node:
    """One replayable operation; arguments are nodes, leaves, tensors and plain values. operation None: t itself, 0-d."""

    operation: Callable | None = None
    args: tuple = ()
    kwargs: dict = dataclass_field(default_factory=dict)

    def __getstate__(self) -> dict:
        # An operator pickles by name.
        state, operation = dict(self.__dict__), self.operation
        if isinstance(operation, torch._ops.OpOverload):
            state["operation"] = (*operation._schema.name.split("::"), operation._overloadname)
        return state

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if isinstance(self.operation, tuple):
            namespace, name, overload = self.operation
            self.operation = getattr(getattr(getattr(torch.ops, namespace), name), overload or "default")


def with_tensors(node: Node | Leaf, tensor: Callable[[Attribute], Tensor]) -> Any:
    """The graph with tensors in place of the module's attributes."""
    done: dict[int, Any] = {}

    def value(a: Any) -> Any:
        if isinstance(a, Attribute):
            return tensor(a)
        if not isinstance(a, Node):
            return a
        if id(a) not in done:
            done[id(a)] = Node(a.operation, tree_map(value, a.args), tree_map(value, a.kwargs))
        return done[id(a)]

    return value(node)


def frozen(node: Node) -> Node:
    """The graph with copies of its tensors, which somebody may write to."""
    done: dict[int, Any] = {}

    def value(a: Any) -> Any:
        if not isinstance(a, (Node, Tensor)):
            return a
        if id(a) not in done:
            if isinstance(a, Tensor):
                done[id(a)] = a.clone()
            else:
                done[id(a)] = Node(a.operation, tree_map(value, a.args), tree_map(value, a.kwargs))
        return done[id(a)]

    return value(node)


_SIZED = ("expand", "view", "reshape", "_unsafe_view", "zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "empty")


def with_samples(node: Node | Leaf, batch: int, samples: int) -> Any:
    """The graph for another number of samples: sizes that were `batch`, the first of each operation."""
    done: dict[int, Any] = {}

    def sizes(a: Any) -> Any:
        if not isinstance(a, (list, tuple)) or not all(isinstance(size, int) for size in a) or batch not in a:
            return a
        at = a.index(batch)
        return type(a)((*a[:at], samples, *a[at + 1 :]))

    def value(a: Any) -> Any:
        if not isinstance(a, Node):
            return a
        if id(a) not in done:
            args, kwargs = tree_map(value, a.args), tree_map(value, a.kwargs)
            if a.operation is not None and getattr(a.operation, "__name__", "").split(".")[0] in _SIZED:
                args = tuple(map(sizes, args))
            done[id(a)] = Node(a.operation, args, kwargs)
        return done[id(a)]

    return value(node)


class Forms:
    """Numbers for graphs that are equal for those that compute the same from the same leaves: what a loop over the samples
    computes from parameters, once for each."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, int]] = {}  # by id, which the kept node keeps
        self._numbers: dict[tuple, int] = {}

    def number(self, node: Node | Leaf) -> int:
        waiting = [node]
        while waiting:
            top = waiting[-1]
            before = [a for a in tree_leaves((top.args, top.kwargs)) if isinstance(a, Node)] if isinstance(top, Node) else []
            before = [a for a in before if id(a) not in self._known]
            if before:
                waiting += before
            else:
                self._known[id(waiting.pop())] = (top, self._number(top))
        return self._known[id(node)][1]

    def _number(self, a: Any) -> int:
        try:
            form = (a.operation, self._of(a.args), self._of(a.kwargs)) if isinstance(a, Node) else (a,)
            return self._numbers.setdefault(form, len(self._numbers))
        except TypeError:  # an argument that is no key, or no array
            return self._numbers.setdefault(("itself", id(a)), len(self._numbers))

    def _of(self, a: Any) -> Any:
        if isinstance(a, Node):
            return ("node", self._known[id(a)][1])
        if isinstance(a, (tuple, list)):
            return (type(a).__name__, *map(self._of, a))
        if isinstance(a, dict):
            return tuple((key, self._of(value)) for key, value in a.items())
        if not isinstance(a, Tensor):
            return type(a).__name__, repr(a) if isinstance(a, (float, complex)) else a  # two zeros, and NaN
        if a.layout != torch.strided or a.numel() > LARGEST_TOLD or a.is_conj() or a.is_neg():
            return ("tensor", id(a))
        return ("tensor", a.dtype, a.shape, a.detach().cpu().numpy().tobytes())


class Replay:
    """Runs a graph again, in the dtype and on the device that are wanted. dtype: the one it was traced in."""

    def __init__(self, node: Node | Leaf, dtype: torch.dtype) -> None:
        self._node, self._dtype = node, dtype
        self._place: tuple | None = None
        self._moved: dict[int, Tensor] = {}  # the graph's tensors in the last dtype and device

    def __getstate__(self) -> dict:
        # The cache is keyed by identity, which a copy does not keep.
        return {**self.__dict__, "_place": None, "_moved": {}}

    def leaves(self) -> frozenset[str]:
        """Names of the parameters that are read."""
        return frozenset(leaf.name for leaf in self.all_leaves())

    def all_leaves(self) -> frozenset[Leaf]:
        found, seen, waiting = set(), set(), [self._node]
        while waiting:
            a = waiting.pop()
            if isinstance(a, Leaf):
                found.add(a)
            elif isinstance(a, Node) and id(a) not in seen:
                seen.add(id(a))
                waiting += tree_leaves((a.args, a.kwargs))
        return frozenset(found)

    def run(
        self, like: Tensor, t: Tensor | None, parameter: Callable[[str], Tensor],
        detached: Callable[[str], Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """detached: gives the parameters where the graph detaches; None: `parameter` does."""
        if (like.dtype, like.device) != self._place:
            self._moved, self._place = {}, (like.dtype, like.device)
        return self._value(self._node, {}, like, t, parameter, detached)

    def _value(
        self, a: Any, done: dict[Any, Any], like: Tensor, t: Tensor | None, parameter: Callable[[str], Tensor],
        detached: Callable[[str], Tensor] | None,
    ) -> Any:  # fmt: skip
        # No function that calls itself by its own name: such a one, and the numbers it made, would live until the
        # garbage collector comes.
        if isinstance(a, Node):
            if a.operation is None:
                return t
            if detached is not None and a.operation is torch.ops.aten.detach.default:
                return self._value(a.args[0], done.setdefault("detached", {}), like, t, detached, None)
            if id(a) not in done:
                args, kwargs = tree_map(lambda b: self._value(b, done, like, t, parameter, detached), (a.args, a.kwargs))
                done[id(a)] = call(a.operation, args, kwargs)
            return done[id(a)]
        if isinstance(a, Leaf):
            return parameter(a.name)
        if isinstance(a, Tensor):
            if id(a) not in self._moved:
                self._moved[id(a)] = a.to(like.device, like.dtype if a.dtype == self._dtype else None)
            return self._moved[id(a)]
        if isinstance(a, torch.dtype):
            return like.dtype if a == self._dtype else a
        return like.device if isinstance(a, torch.device) else a


class Computed:
    """An `origin.Expression`: what a module computes from its parameters in ways that are no plain entries of them."""

    def __init__(self, node: Node | Leaf, dtype: torch.dtype) -> None:
        self._replay = Replay(node, dtype)
        self._names = self._replay.leaves()

    def evaluate(self, derivation: Derivation) -> Tensor:
        values = {name: derivation.whole(name) for name in self._names}
        detached = None if derivation.detached is None else derivation.detached.__getitem__
        return self._replay.run(real_part(next(iter(values.values()))), None, values.__getitem__, detached).reshape(-1)

    def origins(self) -> Iterator[Origin]:
        return iter(())

    def whole(self) -> frozenset[str]:
        return self._names


class TimeFormula(nn.Module):
    """A function of t of any form: `formula(t) -> [n]` for a 0-d t, in t's dtype and device.

    The module's parameters that it reads are given by `over`, and are this module's parameters then.
    """

    def __init__(self, node: Node, dtype: torch.dtype, value: Callable[[str], Tensor]) -> None:
        """value: what a parameter that the graph reads, by name, holds now."""
        super().__init__()
        self._replay = Replay(frozen(node), dtype)
        self.names = tuple(sorted(self._replay.leaves()))
        for number, name in enumerate(self.names):
            self.register_parameter(str(number), nn.Parameter(value(name).detach().clone()))

    def over(self, parameters: Callable[[str], nn.Parameter]) -> "TimeFormula":
        """The same function of other parameters, by name."""
        other = TimeFormula.__new__(TimeFormula)
        nn.Module.__init__(other)
        other._replay, other.names = self._replay, self.names
        other.read(parameters)
        return other

    def read(self, parameters: Callable[[str], nn.Parameter]) -> None:
        """Be a function of these from now on, by name."""
        for number, name in enumerate(self.names):
            self.register_parameter(str(number), parameters(name))

    def forward(self, t: Tensor) -> Tensor:
        numbers = {name: str(number) for number, name in enumerate(self.names)}
        return self._replay.run(t, t, lambda name: self._parameters[numbers[name]].to(t))

    def _save_to_state_dict(self, *args: Any) -> None:
        """A compiled field saves the parameters, which may be used elsewhere too."""

    def _load_from_state_dict(self, *args: Any) -> None:
        """See above."""


TimeProgram = TimeFormula  # its name in pickles of version 0.1.0
