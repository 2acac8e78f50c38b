"""Functions of t of any form, kept as the graph of operations that computed them."""

from __future__ import annotations

from dataclasses import dataclass, field as dataclass_field
from typing import Any, Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .operations import call


@dataclass(eq=False)
class Node:
    """One replayable operation; arguments are nodes, tensors and plain values. operation None: t itself, 0-d."""

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


class TimeProgram:
    """Replays a graph: `program(t) -> [n]` for a 0-d t, in t's dtype and device. dtype: the one it was traced in."""

    def __init__(self, node: Node, dtype: torch.dtype) -> None:
        self._node, self._dtype = node, dtype
        self._place: tuple | None = None
        self._moved: dict[int, Tensor] = {}  # the graph's tensors in the dtype and device of the last t

    def __getstate__(self) -> dict:
        # The cache is keyed by identity, which a copy does not keep.
        return {**self.__dict__, "_place": None, "_moved": {}}

    def __call__(self, t: Tensor) -> Tensor:
        if (t.dtype, t.device) != self._place:
            self._moved, self._place = {}, (t.dtype, t.device)
        done: dict[int, Any] = {}

        def value(a: Any) -> Any:
            if isinstance(a, Node):
                if a.operation is None:
                    return t
                if id(a) not in done:
                    done[id(a)] = call(a.operation, tree_map(value, a.args), tree_map(value, a.kwargs))
                return done[id(a)]
            if isinstance(a, Tensor):
                if id(a) not in self._moved:
                    self._moved[id(a)] = a.to(t.device, t.dtype if a.is_floating_point() else None)
                return self._moved[id(a)]
            if isinstance(a, torch.dtype):
                return t.dtype if a == self._dtype else a
            return t.device if isinstance(a, torch.device) else a

        return value(self._node)
