"""Neurons without inputs, folded into the next layer: their part of its bias and shift as a formula of the
parameters."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from . import activations
from .field import Activation, VectorField
from .origin import Derivation, Key, Origin


@dataclass(eq=False)
class Fold:
    """Neurons (int64 [n], ascending) of a layer, without inputs; the next layer's weights `entries` (int64) read them.

    kind: "constant", W act(z) is added to the next bias; "affine", identity neurons that are affine in t, W z is added
    to the next bias and shift.
    """

    kind: str
    layer: int
    neurons: Tensor
    entries: Tensor


@dataclass(eq=False)
class _Step:
    """One fold: `weights` lead from its neuron number `source` to row `target` of the tensors in `to`. `own` (name ->
    origin [n], or None: `neurons` of what earlier folds made of the tensor) is added up to the neurons' z."""

    activation: Activation
    layer: int
    neurons: Tensor
    own: dict[str, Origin | None]
    to: list[str]
    weights: Origin
    source: Tensor
    target: Tensor


class Folding:
    """All folds of a field, in the order in which they were made. They are computed together."""

    def __init__(
        self, field: VectorField, origins: Mapping[Key, Origin], folds: Sequence[Fold], kept: Mapping[int, Tensor]
    ) -> None:
        """origins: of the field's tensors.  kept: layer -> rows that remain, ascending."""
        self._steps: list[_Step] = []
        reached = {"constant": ["bias"], "affine": ["bias", "shift.slope", "shift.offset"]}
        changed = dict.fromkeys((fold.layer + 1, name) for fold in folds for name in reached[fold.kind])
        # Of a tensor that is changed: the rows that remain or were folded.
        self._rows = {
            number: torch.cat([kept[number], *(fold.neurons for fold in folds if fold.layer == number)]).sort().values
            for number, _ in changed
        }
        nothing = lambda number: Origin.of_constant(torch.zeros_like(field.layers[number].bias))
        self._starts = {key: (origins.get(key) or nothing(key[0])).take(self._rows[key[0]]) for key in changed}
        for fold in folds:
            number, after = fold.layer, fold.layer + 1
            layer, pattern = field.layers[number], field.layers[after].pattern
            names = [] if layer.gate is not None else ["bias"]  # behind a gate there is none
            names += ["shift.offset"] + (["shift.slope"] if fold.kind == "affine" else [])
            own = {name: None for name in names if (number, name) in changed}
            own |= {
                name: origins[number, name].take(fold.neurons)
                for name in names if name not in own and (number, name) in origins
            }
            row, rows = pattern.row[fold.entries], self._rows[after]
            here = torch.isin(row, rows)  # rows that went later need nothing
            entries = fold.entries[here]
            neurons = torch.searchsorted(self._rows[number], fold.neurons) if number in self._rows else fold.neurons
            self._steps.append(_Step(
                layer.activation, number, neurons, own, reached[fold.kind], origins[after, "values"].take(entries),
                torch.searchsorted(fold.neurons, pattern.col[entries]), torch.searchsorted(rows, row[here]),
            ))  # fmt: skip
        self._now = self._compute(lambda origin: origin.value)

    def origin(self, key: Key, rows: Tensor) -> Origin | None:
        """Of the tensor's entries `rows`, ascending rows that remain; None where no fold changes the tensor."""
        if key not in self._starts:
            return None
        whole = Origin.of_expression(_Folded(self, key), self._now[key])
        return whole.take(torch.searchsorted(self._rows[key[0]], rows))

    def origins(self) -> Iterator[Origin]:
        yield from self._starts.values()
        for step in self._steps:
            yield step.weights
            yield from filter(None, step.own.values())

    def evaluate(self, derivation: Derivation) -> dict[Key, Tensor]:
        return self._compute(derivation.tensor)

    def _compute(self, tensor: Callable[[Origin], Tensor]) -> dict[Key, Tensor]:
        """The tensors with all folds in them, from a way to make a tensor of its origin."""
        found = {key: tensor(origin) for key, origin in self._starts.items()}
        for step in self._steps:
            weights = tensor(step.weights)
            neurons, source, target = (index.to(weights.device) for index in (step.neurons, step.source, step.target))
            parts = {
                name: found[step.layer, name].index_select(0, neurons) if origin is None else tensor(origin)
                for name, origin in step.own.items()
            }
            if "shift.slope" not in step.to:
                z = functools.reduce(torch.add, parts.values()) if parts else weights.new_zeros(neurons.numel())
                parts = {"bias": activations.apply(step.activation, z)}
            for name, value in parts.items():  # of affine neurons each part goes to its like
                to = step.layer + 1, name
                found[to] = found[to].index_add(0, target, weights * value.index_select(0, source))
        return found


class _Folded:
    """The `origin.Expression` of one tensor that folds change."""

    def __init__(self, folding: Folding, key: Key) -> None:
        self._folding, self._key = folding, key

    def evaluate(self, derivation: Derivation) -> Tensor:
        return derivation.result(self._folding)[self._key]

    def origins(self) -> Iterator[Origin]:
        return self._folding.origins()

    def whole(self) -> frozenset[str]:
        return frozenset()
