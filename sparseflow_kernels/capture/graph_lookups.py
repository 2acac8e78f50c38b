"""Rules of graphs for positions that depend on the state or on t: what is found at them, and what is written to them.

A position is a whole number, held as any other number. What is found at it is the sum over all places of what stands there,
each times one where the position is that place and else times zero: exact, and differentiable in what is looked up.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, Callable

import torch
from torch import Tensor

from ..field import Graph, Node
from .algebra import apply
from .elements import Elements, samples_of
from .functions import choose, product
from .operations import aten, base_name
from .refusal import REMEDY, refuse
from .registry import GRAPH, argument
from .values import Constant, StateValue, TimeValue

rule = GRAPH.rule
MOST_PLACES = 1024  # that a position is compared with
MOST_WRITTEN = 4096  # pairs of a place and what may be written there
LISTS = ("index", "_unsafe_index")  # their indices are a list, one for each axis


def varies(value: Any) -> bool:
    return isinstance(value, (StateValue, TimeValue))


def ones_at(e: Elements, position: Any, size: int) -> Tensor:
    """Elements [..., size]: one where the position is this place, else zero."""
    if size > MOST_PLACES:
        refuse(f"a lookup in {size} places at a position that depends on t or on the state (more than {MOST_PLACES})")
    places = Constant(torch.arange(size, dtype=e.table.dtype, device=e.table.device))
    return e.pointwise(lambda g, a, b: g.apply("eq", a, b), StateValue(e.ids(position).unsqueeze(-1)), places).ids


def _from_the_beginning(e: Elements, position: Any, size: int) -> StateValue:
    """A position that Python may count from the end."""
    wrap = lambda g, a: choose(g, g.apply("gt", g.number(0.0), a), g.add(a, g.number(float(size))), a)
    return e.pointwise(wrap, position)


def _or_nowhere(e: Elements, found: Tensor, weights: Tensor) -> StateValue:
    """What was found, [n, ...], by weights [n, places]; NaN where the position is no place at all, and torch raises an error."""
    make: Callable[[Graph, Node, Node], Node] = lambda g, a, met: choose(g, met, a, g.number(math.nan))
    return e.pointwise(make, StateValue(found), StateValue(e.sums(weights).view(-1, *[1] * (found.dim() - 1))))


class Lookup:
    """An operation that finds elements by an index. called(base, {number of an index: other positions}) runs it again."""

    def __init__(self, e: Elements, func, args: tuple, kwargs: dict) -> None:
        self._e, self._func, self._args, self._kwargs = e, func, args, kwargs
        self.name = base_name(func)
        self.base = args[0]
        self._place = 2 if self.name in ("gather", "index_select") else 1
        self.indices = list(args[self._place]) if self.name in LISTS else [args[self._place]]
        if self.name == "take":  # as from one line
            lines = self.base
            self.base = apply(aten.reshape.default, lines, [-1]) if isinstance(lines, Constant) else StateValue(
                e.ids(lines).reshape(-1)
            )  # fmt: skip

    @property
    def moving(self) -> list[int]:
        return [i for i, index in enumerate(self.indices) if varies(index)]

    def axis(self, i: int) -> int:
        if self.name in LISTS:
            return i
        return 0 if self.name in ("take", "embedding") else self._args[1] % max(len(self.base.shape), 1)

    def weights(self, i: int) -> Tensor:
        """Elements [elements of the index, places]."""
        size, index = self.base.shape[self.axis(i)], self.indices[i]
        index = _from_the_beginning(self._e, index, size) if self.name in (*LISTS, "take") else index
        return ones_at(self._e, index, size).reshape(-1, size)

    def called(self, base: Any, given: dict[int, Tensor]) -> Any:
        """base: a Constant, or int64 of the shape of the base, or longer along the axis of an index."""
        constant = isinstance(base, Constant)
        device = base.value.device if constant else torch.device("cpu")
        wrap = lambda index: Constant(index.to(device)) if constant else index.cpu()
        index = [wrap(given[i]) if i in given else a if a is None else wrap(a.value) for i, a in enumerate(self.indices)]
        args = list(self._args)
        args[0], args[self._place] = base, index if self.name in LISTS else index[0]
        return (apply if constant else _run)(self._func, *args, **self._kwargs)

    def taken(self, i: int) -> Tensor:
        """Which element of an index every element of the result is found by, int64."""
        count, axis = self.indices[i].shape.numel(), self.axis(i)
        shape = [count if d == axis else n for d, n in enumerate(self.base.shape)]
        numbers = torch.arange(count).view([count if d == axis else 1 for d in range(len(shape))]).expand(shape)
        given = {j: torch.zeros(self.indices[j].shape, dtype=torch.int64) for j in self.moving}
        return self.called(numbers.contiguous(), {**given, i: torch.arange(count).view(self.indices[i].shape)})

    def in_table(self, i: int) -> None:
        """Goes on with what is found in a table of constants, by one product for all of its other axes."""
        e, axis = self._e, self.axis(i)
        table, weights = apply(aten.movedim.int, e.typed(self.base), axis, 0), self.weights(i)
        rest = table.shape[1:]
        matrix = apply(aten.t.default, apply(aten.reshape.default, table, [table.shape[0], -1]))
        made = e.contract(weights, matrix, e.matrix_name(self.base))
        made = _or_nowhere(e, made, weights)
        self.base = StateValue(made.ids.view(len(weights), *rest).movedim(0, axis))
        self.indices[i] = Constant(torch.arange(len(weights)).view(self.indices[i].shape))

    def found(self) -> StateValue:
        """Of elements."""
        e, moving = self._e, self.moving
        weights = None
        for i in moving:
            own = self.weights(i)[self.taken(i).reshape(-1)]
            if weights is None:
                weights = own
            else:
                both = e.pointwise(product, StateValue(weights[:, :, None]), StateValue(own[:, None]))
                weights = both.ids.reshape(len(own), -1)
        sizes = [self.base.shape[self.axis(i)] for i in moving]
        if math.prod(sizes) > MOST_PLACES:
            refuse(f"a lookup in {math.prod(sizes)} places (more than {MOST_PLACES})")
        picks = itertools.product(*map(range, sizes))
        fixed = [{i: torch.full(self.indices[i].shape, k) for i, k in zip(moving, pick)} for pick in picks]
        if isinstance(self.base, Constant):
            flat = [apply(aten.reshape.default, self.called(self.base, given), [-1]) for given in fixed]
            found = apply(aten.stack.default, flat, 1)
            ids = e.ids(found, samples_of(weights).amin(1, keepdim=True).expand(found.shape))
        else:
            base = e.ids(self.base)
            ids = torch.stack([self.called(base, given).reshape(-1) for given in fixed], 1)
        return _or_nowhere(e, e.products(ids, weights), weights)


def _run(func, *args: Any, **kwargs: Any) -> Tensor:
    return func(*args, **kwargs)


def at_positions(e: Elements, func, args: tuple, kwargs: dict, out: Tensor) -> StateValue:
    """An operation that finds elements by an index that depends on t or on the state."""
    look = Lookup(e, func, args, kwargs)
    if isinstance(look.base, Constant) and look.name != "gather" and not look.base.from_attributes:
        look.in_table(look.moving[0])
    if not look.moving:
        return StateValue(look.called(look.base.ids, {}).reshape(out.shape))
    return StateValue(look.found().ids.reshape(out.shape))


@rule("bucketize", "searchsorted")
def sorted_place(e: Elements, func, args, kwargs, out) -> Any:
    """How many of the bounds are below."""
    values, bounds = args[:2] if base_name(func) == "bucketize" else (args[1], args[0])
    if kwargs.get("sorter") is not None:
        refuse("searchsorted with a sorter", "Give it sorted numbers")
    right = bool(argument(args, kwargs, 3, "right", False)) or kwargs.get("side") == "right"
    shape = list(getattr(values, "shape", ()))
    count = bounds.shape[-1]
    if count > MOST_PLACES:
        refuse(f"{base_name(func)} among {count} numbers (more than {MOST_PLACES})")
    axis = lambda v, where: StateValue(e.ids(v).unsqueeze(where)) if varies(v) else apply(
        aten.unsqueeze.default, v, where
    ) if isinstance(v, Constant) else v  # fmt: skip
    lower = axis(bounds, -2) if len(bounds.shape) > 1 else bounds
    compare = (lambda g, a, b: g.apply("ge", b, a)) if right else (lambda g, a, b: g.apply("gt", b, a))
    passed = e.pointwise(compare, lower, axis(values, -1)).ids
    return StateValue(e.sums(passed.reshape(-1, count)).view(shape))


# ------------------------------------------------------------------------------------------ writing at such positions


def written(e: Elements, func, args: tuple, kwargs: dict, out: Tensor) -> StateValue:
    """scatter and scatter_add along an axis, at an index that depends on t or on the state."""
    base, axis, index, source = args[:4]
    axis = axis % max(out.dim(), 1)
    how = kwargs.get("reduce", args[4] if len(args) > 4 else None)
    adds = base_name(func) == "scatter_add" or how in ("sum", "add")
    if how is not None and not adds or not kwargs.get("include_self", True):
        refuse(f"{base_name(func)} with reduce={how!r} at an index that depends on t or on the state")
    where = e.ids(index)
    window = tuple(slice(0, n) if d != axis else slice(None) for d, n in enumerate(where.shape))
    target = e.ids(base, samples_of(where).amin(axis, keepdim=True).expand(out.shape) if where.shape == out.shape else None)
    target = target.expand(out.shape).clone()
    source = e.ids(source)
    source = source[tuple(slice(0, n) for n in where.shape)] if source.dim() else source.expand(where.shape)
    lines = target[window].movedim(axis, -1)
    size, terms = lines.shape[-1], where.shape[axis]
    if size * terms > MOST_WRITTEN:
        refuse(f"{base_name(func)} of {terms} numbers to {size} places that depend on t or on the state")
    met = ones_at(e, StateValue(where.movedim(axis, -1)), size)  # [..., terms, size]
    given = source.movedim(axis, -1)
    if adds:
        sums = e.products(given.unsqueeze(-2), met.transpose(-1, -2))
        made = e.pointwise(lambda g, a, b: g.add(a, b), StateValue(lines), StateValue(sums)).ids
    else:
        made = lines
        for term in range(terms):
            one = StateValue(given[..., term: term + 1])
            made = e.pointwise(choose, StateValue(met[..., term, :]), one, StateValue(made)).ids
    target[window] = made.movedim(-1, axis)
    return StateValue(target)


WHERE = f"Choose with torch.where(condition, a, b), which computes both. Otherwise u{REMEDY[1:]}"


def refuse_position(func) -> None:
    refuse(f"{base_name(func)} at an index that depends on t or on the state", WHERE)


def refuse_mask() -> None:
    refuse("picking the elements where a condition on t or on the state holds, so many as there are,", WHERE)
