"""Complex tensors of a traced forward: each is a pair of real tensors, which the tracer follows.

An operation on complex tensors is done once more in real ones (complex_operations) under the tracer's eyes, so that whatever
is known of real tensors (sources of entries, functions of t, samples, memory that is shared) holds for the parts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .complex_operations import Pair, of_complex
from .memory import found_in, geometry
from .operations import FACTORIES, STRUCTURAL, aten, base_name, is_in_place, written
from .refusal import refuse
from .replay import Node
from .trees import tree_leaves, tree_map
from .values import NOT_PLAIN, Constant


class Pairs:
    """The pairs of the complex tensors that a tracer has met."""

    def __init__(self, tracer: Any) -> None:
        self._tracer = tracer
        self._known: dict[int, tuple[Tensor, Pair]] = {}  # by id, which the kept tensor keeps
        self._by_memory: dict[int, list[Tensor]] = {}

    def of(self, tensor: Tensor) -> Pair:
        known = self._known.get(id(tensor))
        if known is None:
            known = self.bind(tensor, self._in_known_memory(tensor) or self._constant(tensor))
        return known[1]

    def bind(self, tensor: Tensor, made: Pair) -> tuple[Tensor, Pair]:
        """A tensor, which stays alive from now on, and what it stands for. A part that is zero becomes a tensor."""
        parts = []
        for part in (made.real, made.imag):
            if not isinstance(part, Tensor):
                whole = torch.full(tensor.shape, 0.0 if part is None else part, dtype=tensor.real.dtype, device=tensor.device)
                part = self._bound(whole, Constant(whole))
            parts.append(part if part.shape == tensor.shape else part.expand(tensor.shape))
        self._by_memory.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)
        self._known[id(tensor)] = (tensor, Pair(*parts))
        return self._known[id(tensor)]

    def _bound(self, tensor: Tensor, value: Any) -> Tensor:
        self._tracer.bind(tensor, value)
        return tensor

    def _in_known_memory(self, tensor: Tensor) -> Pair | None:
        """What autograd has kept, for example."""
        for other in self._by_memory.get(tensor.untyped_storage()._cdata, ()):
            if other.dtype != tensor.dtype or other.is_conj() != tensor.is_conj():
                continue
            pair = self._known[id(other)][1]
            if geometry(other) == geometry(tensor):
                return pair
            number = found_in(tensor, other)
            if bool((number >= 0).all()):
                with self._tracer:
                    return Pair(*(part.reshape(-1)[number] for part in (pair.real, pair.imag)))
        return None

    def _constant(self, tensor: Tensor) -> Pair:
        """A tensor that is met for the first time, and does not depend on t and y."""
        value = self._tracer.constant_of(tensor)
        parts = []
        for number, part in enumerate((value.value.real, value.value.imag)):
            part = part.clone()
            if value.source is None:
                parts.append(self._bound(part, Constant(part)))
                continue
            node = Node(aten.select.int, (Node(aten.view_as_real.default, (value.node,)), -1, number))
            parts.append(self._bound(part, Constant(part, torch.full(part.shape, NOT_PLAIN), None, node)))
        return Pair(*parts)

    def operation(self, func: Any, args: tuple, kwargs: dict, out: Any) -> Any:
        """What the tracer does of an operation that complex tensors take part in. out: its result, or None."""
        base, leaves = base_name(func), tree_leaves((args, kwargs))
        lifted = lambda a: self.of(a) if isinstance(a, Tensor) and a.is_complex() else a
        given = tree_map(lifted, args), tree_map(lifted, kwargs)  # before the operation, which may write to them
        if written(func) and is_in_place(func):
            return self._in_place(func, args, kwargs, given)
        if out is None:
            out = func(*args, **kwargs)
        if base in FACTORIES or not written(func) and base not in STRUCTURAL and all(map(self._plain, leaves)):
            self._all_bound(out, tree_map(self._number, out))
            return out
        if torch.Tag.data_dependent_output in func.tags and not isinstance(out, Tensor):
            refuse("reading a complex number that is made of t or of the state (.item(), an if on its values)")
        with self._tracer:
            self._all_bound(out, of_complex(func, *given))
        return out

    def _in_place(self, func: Any, args: tuple, kwargs: dict, given: tuple) -> Tensor:
        """The parts are written to, so that other tensors of the same memory follow. They may be the tensor's own memory."""
        number = written(func)[0]
        tensor, before = args[number], given[0][number]
        with self._tracer:
            made = of_complex(func, *given)
            if isinstance(before, Pair):
                zeros = torch.zeros_like(before.real)
                # One part may be computed as the other, as it was.
                values = [zeros if v is None else v.clone() if isinstance(v, Tensor) else zeros + v for v in (made.real, made.imag)]
                before.real.copy_(values[0])
                before.imag.copy_(values[1])
            else:
                before.copy_(made.real if isinstance(made, Pair) else made)
                return tensor
        if before.real.untyped_storage()._cdata != tensor.untyped_storage()._cdata:
            func(*args, **kwargs)
        return tensor

    def _all_bound(self, out: Any, made: Any) -> None:
        for tensor, value in zip(tree_leaves(out), tree_leaves(made)):
            if not isinstance(tensor, Tensor):
                continue
            if tensor.is_complex():
                self.bind(tensor, value if isinstance(value, Pair) else Pair(value))
            elif isinstance(value, Tensor):
                self._tracer.bind(tensor, self._tracer.value_of(value))

    def _number(self, tensor: Any) -> Any:
        """The result of an operation on constants."""
        if not isinstance(tensor, Tensor):
            return tensor
        if not tensor.is_complex():
            return self._bound(tensor.clone(), Constant(tensor.clone()))
        return Pair(*(self._bound(part.clone(), Constant(part.clone())) for part in (tensor.real, tensor.imag)))

    def _plain(self, a: Any) -> bool:
        """It has nothing to do with t, the state or a parameter."""
        if not isinstance(a, Tensor):
            return not isinstance(a, float) or a not in self._tracer.numbers
        parts = (self.of(a).real, self.of(a).imag) if a.is_complex() else (a,)
        return all(
            isinstance(value := self._tracer.value_of(part), Constant) and value.source is None for part in parts
        )

    def check_written(self, tensor: Tensor) -> None:
        """A real tensor is written to, which may be a part of a complex one: those that are followed are other tensors."""
        if tensor.layout != torch.strided or not self._by_memory:
            return
        memory = tensor.untyped_storage()._cdata
        parts = (self._known[id(other)][1].real for other in self._by_memory.get(memory, ()))
        if any(part.untyped_storage()._cdata != memory for part in parts):
            refuse("writing into .real, .imag or torch.view_as_real of a complex tensor", "Use torch.complex(real, imag) instead")

    def detached(self, tensor: Tensor) -> None:
        """forward itself has detached it."""
        if id(tensor) in self._known:
            pair = self._known[id(tensor)][1]
            for part in (pair.real, pair.imag):
                self._tracer.detached(part)

    def seen(self, tensor: Any) -> Any:
        """The value of the part that depends on more; None where there is none."""
        known = self._known.get(id(tensor))
        if known is None:
            return None
        values = [self._tracer.values.get(id(part)) for part in (known[1].real, known[1].imag)]
        return values[1] if isinstance(values[0], Constant) else values[0]

