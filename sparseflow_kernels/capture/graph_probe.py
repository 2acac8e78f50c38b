"""How forward is called where its field is read as a graph: with states of any shape, or tuples of them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any, Iterator

import torch
from torch import Tensor, nn

from ..field import Layout
from .attempts import TIME_SHAPES, held_tensors
from .probe import Points, Probe, differentiable


@dataclass(frozen=True)
class GraphProbe(Points):
    """layout: of the state.  plain: how states [batch, dim] are given to forward, where they are; else as they lie.
    only: why forward runs for this batch alone."""

    layout: Layout
    t_shape: tuple[int, ...]
    batch: int
    dtype: torch.dtype
    device: torch.device
    plain: Probe | None = None
    only: str = ""
    grad: bool = False  # as in Probe

    @staticmethod
    def of(probe: Probe) -> "GraphProbe":
        return GraphProbe(
            Layout(((probe.dim,),)), probe.t_shape, probe.batch, probe.dtype, probe.device, probe, probe.only,
            probe.grad,
        )

    @property
    def dim(self) -> int:
        return self.layout.dim

    def state(self, rows: Tensor) -> Any:
        """rows [batch, dim] as forward gets them."""
        if self.plain is not None:
            return rows.clone()
        state = self.layout.unflatten(rows)
        return tuple(part.clone() for part in state) if isinstance(state, tuple) else state.clone()

    def parts_of(self, rows: Tensor) -> list[Tensor]:
        state = rows if self.plain is not None else self.layout.unflatten(rows)
        return list(state) if isinstance(state, tuple) else [state]

    def call(self, module: nn.Module, t: Tensor, state: Any) -> Any:
        """module(t, state); what is no derivative of it raises RuntimeError."""
        if self.plain is not None:
            out = self.plain.run(module, t, state)
        else:
            out = differentiable(lambda state: module(t, state), state, self.grad)
        many = isinstance(state, tuple)
        outs, states = (out, state) if many else ([out], [state])
        fits = (
            isinstance(outs, (tuple, list)) and len(outs) == len(states)
            and all(isinstance(a, Tensor) and a.shape == b.shape for a, b in zip(outs, states))
        )  # fmt: skip
        if not fits:
            what = [list(o.shape) if isinstance(o, Tensor) else type(o).__name__ for o in outs] if isinstance(
                outs, (tuple, list)
            ) else type(outs).__name__  # fmt: skip
            raise RuntimeError(f"it returned {what} for a state {[list(s.shape) for s in states]}")
        return out

    def run(self, module: nn.Module, t: Tensor, rows: Tensor) -> Tensor:
        """The derivative of rows [batch, dim], as rows."""
        out = self.call(module, t, self.state(rows))
        return out if self.plain is not None else self.layout.flatten(out)


def probes(
    module: nn.Module, found: Probe | None, like: Any, dtype: torch.dtype, device: torch.device
) -> Iterator[GraphProbe]:
    """Ways to call the module, those first that let a field run most states: any row by itself; samples along the first
    axis; the whole state as one sample. found: what a chain would be read with."""
    if found is not None:
        yield GraphProbe.of(found)
    if like is None:
        return
    is_tuple = not isinstance(like, Tensor)
    shapes = tuple(tuple(part.shape) for part in (like if is_tuple else (like,)))
    lead = {shape[:1] for shape in shapes}
    if len(lead) == 1 and () not in lead and (is_tuple or len(shapes[0]) > 1):
        yield from _batched(module, shapes, is_tuple, dtype, device)
    yield from _running(module, Layout(shapes, is_tuple, batched=False), 1, dtype, device)


def _batched(module: nn.Module, shapes: tuple, is_tuple: bool, dtype, device) -> Iterator[GraphProbe]:
    layout = Layout(tuple(shape[1:] for shape in shapes), is_tuple)
    if not layout.dim:
        return
    taken = {s for _, x in held_tensors(module) for s in x.shape} | {s for shape in shapes for s in shape}
    free = next(n for n in itertools.count(3, 2) if n not in taken)
    own = shapes[0][0]
    found = list(_running(module, layout, free, dtype, device))
    if not found and own > 1:
        why = f"forward runs for batches of {own} samples, not of {free}"
        found = [replace(probe, only=why) for probe in _running(module, layout, own, dtype, device)]
    yield from found


def _running(module: nn.Module, layout: Layout, batch: int, dtype, device) -> Iterator[GraphProbe]:
    """The first way to call it that works."""
    for grad in (False, True):
        for t_shape in TIME_SHAPES:
            probe = GraphProbe(layout, t_shape, batch, dtype, device, grad=grad)
            if runs(module, probe):
                yield probe
                return


def runs(module: nn.Module, probe: GraphProbe) -> bool:
    t, rows = probe.point()
    try:
        probe.run(module, t, rows)
    except Exception:  # whatever the user's code raises says that this is not meant
        return False
    return True
