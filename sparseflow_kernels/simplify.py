"""Exact rewriting of a VectorField: what cannot change the result is taken out, nothing is approximated.

- zero weights go, but for those of a matrix that training is to start from zero;
- hidden neurons nobody reads go, and with them what only they read (to a fixed point);
- a hidden neuron without inputs is a function of t only. If it is constant, W[:, j] * act(z_j) goes into the next
  layer's bias. If it varies with t, it goes into the next layer's shift where both are affine in t and no gate stands
  before it; else it stays, and a note says so;
- layers before one that has no neurons left go altogether: f does not depend on y there.

The state's own rows (the first layer's inputs, the last layer's outputs) always stay.

Training changes numbers, and what was taken out has to stay right: a number counts as zero for good only if nothing
trains it, and what was folded is a formula of the parameters it came from (`folding`), not a number.
"""

from __future__ import annotations

from dataclasses import dataclass, field as dataclass_field
from typing import Mapping

import torch
from torch import Tensor

from .field import Layer, LinearShift, Pattern, SigmoidGate, TimeFunction, VectorField
from .folding import Fold, Folding
from .origin import CONSTANT, Key, Origin


@dataclass
class LayerReport:
    """What happened to one layer of the input field. Neurons are its outputs; `dropped` were read by nobody, `folded`
    went into the next layer, `time_only` have no inputs but had to stay. density: of what remains (0 if nothing)."""

    layer: int
    name: str
    weights_before: int
    weights_after: int
    neurons_before: int
    neurons_after: int
    dropped: int
    folded: int
    time_only: int
    density: float


@dataclass
class SimplifyReport:
    """What simplify did, layer by layer, and the way back to the input field's layout.

    kept_layers: numbers of the input field's layers that remain, in order.
    kept_rows[l], kept_values[l]: int64, indices into input layer l's rows and values that remain, in the order of the
        new layer (empty for a layer that went).
    origins: of the new field's tensors, in terms of the input field's.
    str(report) gives a table.
    """

    layers: list[LayerReport]
    kept_layers: list[int]
    kept_rows: list[Tensor]
    kept_values: list[Tensor]
    origins: dict[Key, Origin]
    notes: list[str] = dataclass_field(default_factory=list)

    @property
    def weights_before(self) -> int:
        return sum(r.weights_before for r in self.layers)

    @property
    def weights_after(self) -> int:
        return sum(r.weights_after for r in self.layers)

    def __str__(self) -> str:
        lines = []
        for r in self.layers:
            line = (
                f"layer {r.layer} {r.name}: weights {r.weights_before} -> {r.weights_after} (density {r.density:.3f}), "
                f"neurons {r.neurons_before} -> {r.neurons_after}"
            )
            counts = (
                (r.dropped, "read by nobody"),
                (r.folded, "folded into the next layer"),
                (r.time_only, "of t only kept"),
            )
            details = [f"{n} {what}" for n, what in counts if n]
            if r.layer not in self.kept_layers:
                details.append("the layer is gone")
            lines.append(line + (f": {', '.join(details)}" if details else ""))
        lines.append(f"total: weights {self.weights_before} -> {self.weights_after}")
        return "\n".join([*lines, *self.notes])


class _Work:
    """One layer under the knife, in the input field's numbering."""

    def __init__(self, number: int, layer: Layer, origins: Mapping[Key, Origin], starts_at_zero: Tensor | None) -> None:
        self.layer, self.number = layer, number
        self.row, self.col = layer.pattern.row, layer.pattern.col
        self.entries = (layer.values.detach() != 0).cpu()
        if starts_at_zero is not None:
            self.entries |= starts_at_zero
        self.neurons = torch.ones(layer.out_features, dtype=torch.bool)
        self.affine_shift = isinstance(layer.shift, LinearShift)

        def zero_for_good(name: str) -> Tensor:
            return (dict(layer.tensors())[name].detach() == 0).cpu() & (origins[number, name].parameter == CONSTANT)

        self.no_bias = zero_for_good("bias")
        self.no_slope = zero_for_good("shift.slope") if self.affine_shift else torch.ones_like(self.no_bias)
        self.dropped = self.folded = 0

    def inputs(self) -> Tensor:
        return torch.bincount(self.row[self.entries], minlength=self.layer.out_features)

    def readers(self) -> Tensor:
        return torch.bincount(self.col[self.entries], minlength=self.layer.in_features)


def _drop_unread(work: _Work, after: _Work) -> bool:
    unread = work.neurons & (after.readers() == 0)
    work.neurons &= ~unread
    work.entries &= ~unread[work.row]
    work.dropped += int(unread.sum())
    return bool(unread.any())


def _fold(work: _Work, after: _Work) -> list[Fold]:
    """Takes neurons of `work` that are read but have no inputs out of it; what is to be added to `after` for them."""
    free = work.neurons & (work.inputs() == 0) & (after.readers() > 0)
    gate, shift = work.layer.gate, work.layer.shift
    # No bias behind a gate is 0 at all times.
    constant = free & work.no_slope & (work.no_bias if gate is not None else True)
    if isinstance(shift, TimeFunction):
        constant &= False
    varying = free & ~constant
    affine = work.affine_shift and gate is None and work.layer.activation.name == "identity"
    if not affine or after.layer.gate is not None or isinstance(after.layer.shift, TimeFunction):
        varying &= False
    folds = []
    for kind, neurons in (("constant", constant), ("affine", varying)):
        if not bool(neurons.any()):
            continue
        entries = after.entries & neurons[after.col]
        folds.append(Fold(kind, work.number, neurons.nonzero()[:, 0], entries.nonzero()[:, 0]))
        work.neurons &= ~neurons
        work.folded += int(neurons.sum())
        after.entries &= ~entries
        reached = torch.zeros_like(after.no_bias)
        reached[after.row[entries]] = True
        after.no_bias &= ~reached
        if kind == "affine":
            after.no_slope &= ~reached
            after.affine_shift = True
    return folds


def _rebuild(work: _Work, columns: Tensor, origins: Mapping[Key, Origin], folding: Folding) -> tuple:
    """(new layer, its tensors' origins, kept rows, kept values); columns: bool [in], the inputs that remain."""
    layer, number = work.layer, work.number
    rows, values = work.neurons.nonzero()[:, 0], work.entries.nonzero()[:, 0]
    new_row, new_col = torch.cumsum(work.neurons, 0) - 1, torch.cumsum(columns, 0) - 1
    row_ptr = torch.zeros(rows.numel() + 1, dtype=torch.int64)
    row = new_row[work.row[values]]
    torch.cumsum(torch.bincount(row, minlength=rows.numel()), 0, out=row_ptr[1:])
    pattern = Pattern((rows.numel(), int(columns.sum())), row_ptr, new_col[work.col[values]])
    found = {"values": origins[number, "values"].take(values)}
    names = ["bias", *(name for name, _ in layer.tensors() if name.startswith("gate."))]
    names += ["shift.slope", "shift.offset"] if work.affine_shift else []
    for name in names:
        found[name] = folding.origin((number, name), rows) or origins[number, name].take(rows)

    def part(kind: str, native: type, whole) -> SigmoidGate | LinearShift | TimeFunction | None:
        if f"{kind}.slope" in found:
            return native(found[f"{kind}.slope"].value.clone(), found[f"{kind}.offset"].value.clone())
        if not isinstance(whole, TimeFunction):
            return None
        return TimeFunction(whole.function, rows if whole.rows is None else whole.rows.cpu()[rows])

    new = Layer(
        pattern, found["values"].value.clone(), found["bias"].value.clone(), part("gate", SigmoidGate, layer.gate),
        part("shift", LinearShift, layer.shift), layer.activation, layer.name,
    )  # fmt: skip
    return new, found, rows, values


def simplify(
    field: VectorField, origins: Mapping[Key, Origin] | None = None,
    starts_at_zero: Mapping[int, Tensor] | None = None,
) -> tuple[VectorField, SimplifyReport]:  # fmt: skip
    """The same f, without what does not matter (module docstring), and a report with the way back.

    origins: of the field's tensors, which say what is never trained; None: nothing is.  starts_at_zero: layer ->
    bool [nnz], weights that stay though they are zero.
    Works on detached copies; the input field is not changed. The result differs from the input by rounding only.
    """
    detached = field.map_tensors(Tensor.detach)
    if origins is None:
        origins = {
            (number, name): Origin.of_constant(tensor)
            for number, layer in enumerate(detached.layers) for name, tensor in layer.tensors()
        }
    works = [
        _Work(number, layer, origins, (starts_at_zero or {}).get(number))
        for number, layer in enumerate(detached.layers)
    ]
    pairs, folds, changed = list(zip(works, works[1:])), [], True
    while changed:
        changed = False
        for work, after in reversed(pairs):
            changed |= _drop_unread(work, after)
        for work, after in pairs:
            found = _fold(work, after)
            folds, changed = folds + found, changed or bool(found)

    notes = []
    first = max((i + 1 for i, work in enumerate(works[:-1]) if not bool(work.neurons.any())), default=0)
    if first:
        notes.append(f"simplify: layer {first - 1} has no neurons left; f does not depend on the state")
    folding = Folding(detached, origins, folds, {work.number: work.neurons.nonzero()[:, 0] for work in works})
    layers, reports, kept_rows, kept_values, new_origins = [], [], [], [], {}
    columns = torch.ones(field.dim, dtype=torch.bool)
    for number, work in enumerate(works):
        remains = number >= first
        free = int((work.neurons & (work.inputs() == 0)).sum()) if remains and number < len(works) - 1 else 0
        if remains:
            if number == first and first:
                # The first layer left reads the state, in form; it has no entries.
                work.entries &= False
                work.col = torch.zeros_like(work.col)
            new, found, rows, values = _rebuild(work, columns, origins, folding)
            new_origins |= {(len(layers), name): origin for name, origin in found.items()}
            layers.append(new)
            columns = work.neurons
        else:
            rows = values = torch.empty(0, dtype=torch.int64)
        kept_rows.append(rows)
        kept_values.append(values)
        if free:
            notes.append(
                f"simplify: layer {number} ({work.layer.name}) keeps {free} neurons that are functions of t only: the "
                "next layer has a gate, or would lose its affine shift"
            )
        if remains and layers[-1].pattern.nnz == 0:
            notes.append(f"simplify: layer {number} ({work.layer.name}) has no weights left")
        reports.append(LayerReport(
            number, work.layer.name, work.layer.pattern.nnz, values.numel(), work.layer.out_features, rows.numel(),
            work.dropped, work.folded, free, layers[-1].pattern.density if remains else 0.0,
        ))
    report = SimplifyReport(reports, list(range(first, len(works))), kept_rows, kept_values, new_origins, notes)
    return VectorField(layers, [*field.notes, *notes], field.refused_axes), report
