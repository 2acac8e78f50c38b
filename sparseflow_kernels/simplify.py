"""Exact rewriting of a VectorField: what cannot change the result is taken out, nothing is approximated.

- zero weights go;
- hidden neurons nobody reads go, and with them what only they read (to a fixed point);
- a hidden neuron without inputs is a function of t only. If it is constant, W[:, j] * act(z_j) goes into the next
  layer's bias (summed in float64). If it varies with t, it goes into the next layer's shift where that costs no affine
  shift its form and no gate stands before it; else it stays, and a note says so;
- layers before one that has no neurons left go altogether: f does not depend on y there.

The state's own rows (the first layer's inputs, the last layer's outputs) always stay.
"""

from __future__ import annotations

from dataclasses import dataclass, field as dataclass_field

import torch
from torch import Tensor

from . import activations
from .field import Gate, Layer, LinearShift, Pattern, Shift, SigmoidGate, TimeFunction, VectorField


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
    str(report) gives a table.
    """

    layers: list[LayerReport]
    kept_layers: list[int]
    kept_rows: list[Tensor]
    kept_values: list[Tensor]
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


class _FoldedShift:
    """c(t) + W act(s(t) * b + c(t)) over folded neurons, in t's dtype and device; `weight` [out, neurons]."""

    def __init__(self, shift: TimeFunction, weight: Tensor, neurons: Layer) -> None:
        self._shift, self._weight, self._neurons = shift, weight, neurons
        self._moved: tuple | None = None  # dtype and device of the last t, and what is below in these

    def _in(self, t: Tensor) -> tuple:
        moved, place = self._moved, (t.dtype, t.device)
        if moved is None or moved[0] != place:
            own = self._neurons
            parts = (_each(part, lambda x: x.to(t)) for part in (own.gate, own.shift))
            moved = (place, self._weight.to(t), own.bias.to(t), *parts)
            if not torch.compiler.is_compiling():  # what is copied there has no values
                self._moved = moved
        return moved[1:]

    def __call__(self, t: Tensor) -> Tensor:
        weight, z, gate, shift = self._in(t)
        z = z if gate is None else gate.at(t) * z
        z = z if shift is None else z + shift.at(t)
        return self._shift.at(t) + weight @ activations.apply(self._neurons.activation, z)


def _each(part: Gate | Shift, function) -> Gate | Shift:
    if isinstance(part, (SigmoidGate, LinearShift)):
        return type(part)(function(part.slope), function(part.offset))
    return part


def _rows_of(part: Gate | Shift, rows: Tensor) -> Gate | Shift:
    if isinstance(part, TimeFunction):
        return TimeFunction(part.function, rows if part.rows is None else part.rows.cpu()[rows])
    return _each(part, lambda x: x.detach()[rows.to(x.device)])


class _Work:
    """One layer under the knife, in the input field's numbering."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.row, self.col = layer.pattern.row, layer.pattern.col
        self.entries = (layer.values.detach() != 0).cpu()
        self.neurons = torch.ones(layer.out_features, dtype=torch.bool)
        self.bias = layer.bias.detach().cpu().to(torch.float64, copy=True)
        self.shift: Shift = _each(layer.shift, Tensor.detach)
        self.dropped = self.folded = 0

    def inputs(self) -> Tensor:
        return torch.bincount(self.row[self.entries], minlength=self.layer.out_features)

    def readers(self) -> Tensor:
        return torch.bincount(self.col[self.entries], minlength=self.layer.in_features)

    def columns(self, neurons: Tensor) -> Tensor:
        """float64 CPU [out, len(neurons)] of the remaining weights."""
        layer = self.layer
        dense = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
        dense[self.row[self.entries], self.col[self.entries]] = layer.values.detach().cpu().double()[self.entries]
        return dense[:, neurons]

    def neurons_without_inputs(self, neurons: Tensor) -> Layer:
        """The given rows as a layer of their own without inputs, folded constants included."""
        pattern = Pattern((neurons.numel(), 0), torch.zeros(neurons.numel() + 1, dtype=torch.int64), neurons[:0])
        values = self.layer.values.detach()
        return Layer(
            pattern, values[:0], self.bias[neurons].to(values), _rows_of(self.layer.gate, neurons),
            _rows_of(self.shift, neurons), self.layer.activation, self.layer.name,
        )


def _drop_unread(work: _Work, after: _Work) -> bool:
    unread = work.neurons & (after.readers() == 0)
    work.neurons &= ~unread
    work.entries &= ~unread[work.row]
    work.dropped += int(unread.sum())
    return bool(unread.any())


def _fold(work: _Work, after: _Work) -> bool:
    """Folds neurons of `work` that are read but have no inputs into `after`; True if anything went."""
    free = work.neurons & (work.inputs() == 0) & (after.readers() > 0)
    indices = free.nonzero()[:, 0]
    if not indices.numel():
        return False
    layer, shift = work.layer, work.shift
    # b = 0 behind a gate is 0 at all times; a shift whose slope is 0 is a constant.
    constant = free & ((work.bias == 0) if layer.gate is not None else True)
    if isinstance(shift, LinearShift):
        constant &= (shift.slope == 0).cpu()
    elif shift is not None:
        constant &= False
    now = constant.nonzero()[:, 0]
    gone = now
    if now.numel():
        z = work.bias[now] if layer.gate is None else torch.zeros(now.numel(), dtype=torch.float64)
        if shift is not None:
            z = z + shift.offset.cpu().double()[now]
        after.bias += after.columns(now) @ activations.apply(layer.activation, z)
    varying = (free & ~constant).nonzero()[:, 0]
    if varying.numel() and after.layer.gate is None:
        neurons = work.neurons_without_inputs(varying)
        weight = after.columns(varying)
        like = after.layer.values.detach()
        affine = layer.gate is None and layer.activation.name == "identity" and isinstance(neurons.shift, LinearShift)
        if affine and not isinstance(after.shift, TimeFunction):
            slope = weight @ neurons.shift.slope.cpu().double()
            offset = weight @ neurons.shift.offset.cpu().double()
            if after.shift is not None:
                slope, offset = slope + after.shift.slope.cpu().double(), offset + after.shift.offset.cpu().double()
            after.shift = LinearShift(slope.to(like), offset.to(like))
            after.bias += weight @ work.bias[varying]
            gone = torch.cat([gone, varying])
        elif isinstance(after.shift, TimeFunction):
            after.shift = TimeFunction(_FoldedShift(after.shift, weight.to(like), neurons))
            gone = torch.cat([gone, varying])
    if not gone.numel():
        return False
    removed = torch.zeros_like(work.neurons)
    removed[gone] = True
    work.neurons &= ~removed
    work.folded += gone.numel()
    after.entries &= ~removed[after.col]
    return True


def _rebuild(work: _Work, columns: Tensor) -> tuple[Layer, Tensor, Tensor]:
    """(new layer, kept rows, kept values); columns: bool [in], the inputs that remain."""
    layer = work.layer
    rows, values = work.neurons.nonzero()[:, 0], work.entries.nonzero()[:, 0]
    new_row, new_col = torch.cumsum(work.neurons, 0) - 1, torch.cumsum(columns, 0) - 1
    row_ptr = torch.zeros(rows.numel() + 1, dtype=torch.int64)
    row = new_row[work.row[values]]
    torch.cumsum(torch.bincount(row, minlength=rows.numel()), 0, out=row_ptr[1:])
    pattern = Pattern((rows.numel(), int(columns.sum())), row_ptr, new_col[work.col[values]])
    old = layer.values.detach()
    new = Layer(
        pattern, old[values.to(old.device)], work.bias[rows].to(old), _rows_of(layer.gate, rows),
        _rows_of(work.shift, rows), layer.activation, layer.name,
    )
    return new, rows, values


def simplify(field: VectorField) -> tuple[VectorField, SimplifyReport]:
    """The same f, without what does not matter (module docstring), and a report with the way back.

    Works on detached copies; the input field is not changed. The result differs from the input by rounding only.
    """
    works = [_Work(layer) for layer in field.layers]
    pairs = list(zip(works, works[1:]))
    changed = True
    while changed:
        changed = False
        for work, after in reversed(pairs):
            changed |= _drop_unread(work, after)
        for work, after in pairs:
            changed |= _fold(work, after)

    notes = []
    first = max((i + 1 for i, work in enumerate(works[:-1]) if not bool(work.neurons.any())), default=0)
    if first:
        notes.append(f"simplify: layer {first - 1} has no neurons left; f does not depend on the state")
    layers, reports, kept_rows, kept_values = [], [], [], []
    columns = torch.ones(field.dim, dtype=torch.bool)
    for number, work in enumerate(works):
        remains = number >= first
        free = int((work.neurons & (work.inputs() == 0)).sum()) if remains and number < len(works) - 1 else 0
        if remains:
            if number == first and first:
                # The first layer left reads the state, in form; it has no entries.
                work.row, work.col, work.entries = work.row[:0], work.col[:0], work.entries[:0]
            new, rows, values = _rebuild(work, columns)
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
    report = SimplifyReport(reports, list(range(first, len(works))), kept_rows, kept_values, notes)
    return VectorField(layers, [*field.notes, *notes], field.refused_axes), report
