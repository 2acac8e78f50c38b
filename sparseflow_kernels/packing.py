"""A field, packed for its engine once and used until a number in it changes."""

from __future__ import annotations

from typing import Callable, Sequence

import torch
from torch import Tensor

from . import divergence
from .devices import lasting
from .divergence import DivergencePlan, Kind
from .engines import choose, reference_engine
from .engines.base import Engine
from .field import GraphField, UnsupportedFieldError, VectorField

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Snapshot:
    """What tensors held at one moment. Comparing the numbers themselves sees every change: of `.data`, through numpy or
    by another process too, which no version counter tells."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._what = [(t.shape, t.dtype, t.device) for t in tensors]
        self._native = self._kept = self._where = None
        if all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors):
            try:
                from . import _cpu
            except ImportError:  # a checkout without the extension
                pass
            else:
                self._native = _cpu.Snapshot([t.data_ptr() for t in tensors], [t.nbytes for t in tensors])
                self._where = _memory(tensors)
        if self._native is None:
            self._kept = _together(tensors)

    def taken(self, tensors: Sequence[Tensor]) -> Snapshot:
        """A snapshot of these tensors now: this one, where they fit into its memory."""
        if self._native is None or _memory(tensors) != self._where:
            return Snapshot(tensors)
        self._native.take([address for address, *_ in self._where])
        return self

    def same(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these tensors hold what those did, bit for bit, in the same shapes, dtypes and devices."""
        if self._native is not None:
            where = _memory(tensors)
            if where != self._where:  # other tensors, or the same ones with other memory
                if self._what != [(t.shape, t.dtype, t.device) for t in tensors] or not all(w[-1] for w in where):
                    return False
                self._where = where
            return self._native.same([address for address, *_ in where])
        if self._what != [(t.shape, t.dtype, t.device) for t in tensors]:
            return False
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return True  # the host must not wait here: a graph is recorded with the values of now
        return all(map(torch.equal, self._kept, _together(tensors)))


def _memory(tensors: Sequence[Tensor]) -> list[tuple]:
    """What can be read there, in few words: this is asked at every call."""
    return [(t.data_ptr(), t.nbytes, t.dtype, t.is_contiguous()) for t in tensors]


def _together(tensors: Sequence[Tensor]) -> list[Tensor]:
    """One tensor of bits for every dtype and device: a comparison makes the host wait for a GPU, so one is to do."""
    groups: dict[tuple, list[Tensor]] = {}
    for tensor in tensors:
        real = torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor.detach()
        bits = real.reshape(-1).view(_BITS[real.element_size()])
        groups.setdefault((bits.dtype, bits.device), []).append(bits)
    return [torch.cat(group) for group in groups.values()]


def strided(tensor: Tensor) -> list[Tensor]:
    """The tensor, or those that a sparse one consists of, its values first."""
    if tensor.layout == torch.strided:
        return [tensor]
    if tensor.layout == torch.sparse_coo:
        return [tensor._values(), tensor._indices()]
    rows = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
    outer, inner = (tensor.crow_indices, tensor.col_indices) if rows else (tensor.ccol_indices, tensor.row_indices)
    return [tensor.values(), outer(), inner()]


class Packing:
    """The engines that hold one field's values: without a divergence, and with each kind of it.

    requested: the engine asked for, as in `engines.choose`.
    """

    def __init__(self, requested: str) -> None:
        self.requested = requested
        self._plans: dict[str, DivergencePlan] = {}
        self._engines: dict[str | None, tuple[Snapshot, Engine]] = {}

    def __len__(self) -> int:
        return len(self._engines)

    def clear(self) -> None:
        """Forget what was packed."""
        self._engines.clear()

    @lasting
    def plan(self, kind: Kind | None, field: Callable[[], VectorField | GraphField]) -> DivergencePlan | None:
        """How the divergence is computed (`divergence.plan`), counted once; None for kind None."""
        if kind is not None and kind not in self._plans:
            self._plans[kind] = divergence.plan(field(), kind)
        return None if kind is None else self._plans[kind]

    @lasting
    def engine(
        self, kind: Kind | None, tensors: Sequence[Tensor], field: Callable[[], VectorField | GraphField]
    ) -> Engine:
        """An engine that holds the present values; `field` gives the field over `tensors`, or made from them."""
        known = self._engines.get(kind)
        if known is None or not known[0].same(tensors):
            self._engines.pop(kind, None)  # until all is well
            # Copied before it is packed: a change in between (of another thread) is seen at the next call.
            with torch.no_grad():  # an engine outlives the graph of what is made from parameters
                present = field()
                snapshot = Snapshot(tensors) if known is None else known[0].taken(tensors)
            engine = None if known is None else known[1]
            if engine is None or not engine.update(present):
                engine_class, _ = choose(present, self.requested)
                try:
                    engine = engine_class(present, self.plan(kind, field))
                except UnsupportedFieldError:  # because of the divergence: `choose` has asked for the field alone
                    if self.requested != "auto":
                        raise
                    engine = reference_engine(present, self.plan(kind, field))
            known = self._engines[kind] = (snapshot, engine)
        return known[1]
