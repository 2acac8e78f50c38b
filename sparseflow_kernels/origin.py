"""Where the numbers of a field come from: entries of a module's parameters, constants, or what is computed from both.

An `Origin` says it for one tensor of a field, entry by entry. From the parameters' values a `Derivation` makes the
tensor again, differentiably, so that a compiled field can train what its module trains (`trained`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Iterator, Mapping, Protocol

import torch
from torch import Tensor

CONSTANT, COMPUTED = -1, -2
Key = tuple[int, str]  # (layer number, name as in Layer.tensors())


def real_part(x: Tensor) -> Tensor:
    """A tensor of the dtype of the field that x is a parameter of: x, or its real part."""
    return x.detach().real if x.is_complex() else x


class Expression(Protocol):
    """What computed entries are the results of."""

    def evaluate(self, derivation: "Derivation") -> Tensor:
        """All results, flat."""

    def origins(self) -> Iterator["Origin"]:
        """Of the entries it reads."""

    def whole(self) -> frozenset[str]:
        """Names of the parameters it reads as a whole, in their own shape."""


@dataclass(eq=False)
class Origin:
    """Of a tensor [n], entry by entry: scale[i] times element index[i] of the flattened parameter
    parameters[parameter[i]]; value[i] where parameter[i] is CONSTANT; result index[i] of `expression` where it is
    COMPUTED.

    parameter, index: int64 [n].  scale: float64 [n].  value: [n], the tensor when it was read.
    """

    parameters: tuple[str, ...]
    parameter: Tensor
    index: Tensor
    scale: Tensor
    value: Tensor
    expression: Expression | None = None

    @staticmethod
    def of_parameter(name: str, value: Tensor) -> "Origin":
        """Of a tensor that is a parameter itself."""
        n = value.numel()
        zeros = torch.zeros(n, dtype=torch.int64)
        return Origin((name,), zeros, torch.arange(n), torch.ones(n, dtype=torch.float64), value.detach())

    @staticmethod
    def of_constant(value: Tensor) -> "Origin":
        """Of a tensor that has nothing to do with a parameter."""
        return replace(Origin.of_parameter("", value), parameters=(), parameter=torch.full((value.numel(),), CONSTANT))

    @staticmethod
    def of_expression(expression: Expression, value: Tensor) -> "Origin":
        """Of a tensor whose entries are the results of an expression."""
        n = value.numel()
        kinds = torch.full((n,), COMPUTED)
        return Origin((), kinds, torch.arange(n), torch.ones(n, dtype=torch.float64), value.detach(), expression)

    @property
    def complete(self) -> bool:
        """Every entry is a parameter's, times a number."""
        return bool((self.parameter >= 0).all())

    @property
    def constant(self) -> bool:
        """No entry has anything to do with a parameter."""
        return bool((self.parameter == CONSTANT).all())

    @property
    def computed(self) -> bool:
        """Some entries are computed."""
        return bool((self.parameter == COMPUTED).any())

    def take(self, entries: Tensor) -> "Origin":
        """Of tensor[entries]."""
        parts = {name: getattr(self, name)[entries] for name in ("parameter", "index", "scale")}
        return replace(self, **parts, value=self.value[entries.to(self.value.device)])

    def elements(self) -> Iterator[tuple[str, Tensor]]:
        """(parameter's name, numbers of its elements) of the entries that are no constants and not computed."""
        for number, name in enumerate(self.parameters):
            own = self.index[self.parameter == number]
            if own.numel():
                yield name, own

    def read(self) -> Iterator["Origin"]:
        """This one and, where entries are computed, those of what they are computed from."""
        yield self
        if self.computed:
            for origin in self.expression.origins():
                yield from origin.read()

    def needs_whole(self) -> frozenset[str]:
        """Names of the parameters that computed entries read as a whole."""
        return frozenset().union(*(origin.expression.whole() for origin in self.read() if origin.computed))


class Recipe:
    """How tensors are made from held entries of parameters. held: name -> int64, the numbers of the elements that are
    held, ascending; or None for a parameter held whole. Made once; a Derivation is one use of it."""

    def __init__(self, held: Mapping[str, Tensor | None]) -> None:
        self.held = dict(held)
        self._steps: dict[int, tuple[Origin, tuple, list[tuple]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_steps": {}}  # keyed by identity, which a copy does not keep

    def steps(self, origin: Origin, like: Tensor) -> list[tuple]:
        """(name, or None for the constants, or the expression; from which elements; times what; to which entries) in
        turn, on the device and in the dtype of `like`. None: all of them in order; times 1. Which elements: a tensor of
        their numbers, or how many from the first on."""
        known = self._steps.get(id(origin))
        if known is None or known[1] != (like.device, like.dtype):
            known = self._steps[id(origin)] = (origin, (like.device, like.dtype), list(self._make(origin, like)))
        return known[2]

    def _make(self, origin: Origin, like: Tensor) -> Iterator[tuple]:
        sources = [(name, origin.parameter == number) for number, name in enumerate(origin.parameters)]
        sources.append((origin.expression, origin.parameter == COMPUTED))
        sources = [(source, own) for source, own in sources if bool(own.any())]
        if len(sources) != 1 or not bool(sources[0][1].all()):
            yield None, None, origin.value.to(like), None
        for source, own in sources:
            index, scale = origin.index[own], origin.scale[own].to(like)
            size = None
            if isinstance(source, str) and (elements := self.held[source]) is not None:
                index, size = torch.searchsorted(elements, index), elements.numel()
            if torch.equal(index, torch.arange(index.numel(), device=index.device)):
                index = None if index.numel() == size else index.numel()
            where = None if bool(own.all()) else own.nonzero()[:, 0].to(like.device)
            yield (
                source, index.to(like.device) if isinstance(index, Tensor) else index,
                None if bool((scale == 1).all()) else scale, where,
            )  # fmt: skip


class Derivation:
    """Tensors made from values of the held parameters, by name, in one dtype on one device; differentiable in them.
    detached: what is read in their place where the module detaches; None: the same."""

    def __init__(
        self, recipe: Recipe, values: Mapping[str, Tensor], detached: Mapping[str, Tensor] | None = None
    ) -> None:
        self._recipe, self._values, self.detached = recipe, values, detached
        self._results: dict[int, Any] = {}

    def whole(self, name: str) -> Tensor:
        return self._values[name]

    def result(self, expression: Any) -> Any:
        """expression.evaluate(self), once."""
        if id(expression) not in self._results:
            self._results[id(expression)] = expression.evaluate(self)
        return self._results[id(expression)]

    def tensor(self, origin: Origin) -> Tensor:
        """The tensor [n] of this origin."""
        like = real_part(next(iter(self._values.values()), origin.value))
        made = None
        for source, index, scale, where in self._recipe.steps(origin, like):
            if source is None:
                made = scale
                continue
            piece = self._values[source].reshape(-1) if isinstance(source, str) else self.result(source)
            if isinstance(index, Tensor):
                piece = piece.index_select(0, index)
            elif index is not None:  # a copy: a bias may change before the backward pass, which torch takes
                piece = piece[:index].clone()
            piece = piece if scale is None else piece * scale
            made = piece if where is None else made.index_put((where,), piece)
        return made
