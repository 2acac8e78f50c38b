"""Reading the field out of a user's `nn.Module`: `forward(t, y)` -> VectorField or GraphField, by meaning, not by class names.

The module runs once, on a small random batch, under a dispatch mode that sees every aten operation (tracer). Beside
each tensor stands an abstract value (values):

- a constant, independent of t and y: parameters, and whatever is computed from them (prune masks, parametrizations);
- a function of t alone; affine functions and sigmoids of them are kept as such, others as a replayable graph
  (algebra, replay);
- a state, which depends on y: every element carries the number of a row of the field. Views, slices, joins and
  permutations are done by applying the very same operation to the numbers (rules); arithmetic makes new rows (rows).

The rows of the result, followed back to y, are the layers of the field (assemble): a chain. Where the module is none, it
runs once more and is read as a graph. Rows are rows of nodes then (graph_table), and an element has a sample and a row
wherever it lies (elements); an operation is a few lines of the tables of rules (graph_rules and those it names; functions
holds what works element by element). Functions of t are nodes once they meet the state (graph_time), tensors that share
memory follow each other (memory), numbers given per sample are the context (context), and the state may be of any shape,
or a tuple (graph_probe).

What does not fit raises UnsupportedFieldError with the module path and the operation (refusal). What Python makes of the
value that t has in one run is seen where it is read, or when it comes back (reads); what a run cannot show at all, when
the field is compared with the module at other points and times, and on states with other axes (verify).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..field import GraphField, TimeFunction, UnsupportedFieldError, VectorField
from ..field.layout import State
from ..origin import Key, Origin
from .assemble import assemble
from .attempts import find_probe
from .graph_reading import read_graph, unforeseen
from .probe import Probe, check_arguments, check_like, unwrapped
from .untouched import untouched
from .reads import compare_runs
from .refusal import REMEDY, NotFinite, with_sparsify
from .tracer import Tracer
from .verify import verify

__all__ = ["capture", "capture_graph", "capture_with_origins", "check_like", "unwrapped"]

Field = VectorField | GraphField


def capture(module: nn.Module, dim: int | None = None, like: State | None = None) -> Field:
    """The field of `module.forward(t, y)`, y [batch, dim] (or [dim], row by row, if only that works), t 0-d (or
    [1], [1, 1] if only those work).

    dim: size of the state; inferred from the module's weights if None.  like: an example of the state, a tensor of any
    shape or a tuple of tensors: the field is compared with the module on states of its shape. Where the rows [..., dim]
    are no samples of their own, its first axis is taken for that of the samples if forward runs for other sizes of it,
    or for this one, and treats samples one by one; else the whole state is one sample (`GraphField.layout`).
    `refused_axes` says for which other numbers of axes the module does something else than a field that runs every row
    [dim] by itself. Tensors that the module holds with a row for every sample are the field's context, which
    `GraphField.read_context` reads from the module whenever it is called.
    The module is left as it was: parameters, buffers, attributes, hooks and random state. All tensors of the field are
    detached copies in the module's dtype (float32 or float64) and device. A pruned entry (exact zero) is not in the
    pattern.

    Raises UnsupportedFieldError where the module cannot be expressed (naming the module path, the operation and the
    remedy), or where it differs from what was read; ValueError for NaN or infinite weights and for a `dim` or `like`
    that does not fit or a `dim` that cannot be inferred; TypeError for something that is no nn.Module with a forward of
    two arguments, and for a `like` that is no tensor of the module's dtype.
    """
    return capture_with_origins(module, dim, like)[0]


def capture_with_origins(
    module: nn.Module, dim: int | None = None, like: State | None = None
) -> tuple[Field, dict[Key, Origin]]:
    """capture(), and for every tensor of the field where its entries come from, parameters named as by the module."""
    module = unwrapped(module)
    check_arguments(module, dim)
    if like is not None:
        check_like(like, dim)
    try:
        return _read(module, dim, like)
    except UnsupportedFieldError as error:
        with untouched(module):  # a parametrization may move when it is asked for its weight
            told = with_sparsify(module, error)
        raise told from error.__cause__


def capture_graph(
    module: nn.Module, dim: int | None = None, like: State | None = None
) -> tuple[GraphField, dict[Key, Origin]]:
    """capture_with_origins(), as a graph also where the module is a chain."""
    module = unwrapped(module)
    check_arguments(module, dim)
    if like is not None:
        check_like(like, dim)
    probe, chain = None, None
    if like is None or _may_have_rows(like):
        try:
            with untouched(module), torch.no_grad():
                probe = find_probe(module, dim, like)
        except UnsupportedFieldError as error:
            chain = error
    return read_graph(module, probe, like, chain)


def _read(module: nn.Module, dim: int | None, like: State | None) -> tuple[Field, dict[Key, Origin]]:
    """As a chain, where it is one, else as a graph. The error is the graph's where the module ran for it."""
    one = like if like is None or _may_have_rows(like) else None
    probe, chain = None, None
    if like is None or one is not None:
        try:
            with untouched(module), torch.no_grad():
                probe = find_probe(module, dim, one)
        except UnsupportedFieldError as error:
            chain = error
        if probe is not None:
            try:
                found = _read_chain(module, probe, one)
            except UnsupportedFieldError as error:
                chain = error
            else:
                return found if _is_native(found[0]) else _graph_if_native(module, probe, like, found)
    return read_graph(module, probe, like, chain)


def _may_have_rows(like: State) -> bool:
    """It may be [..., dim]: no tuple, and no single number."""
    return isinstance(like, Tensor) and like.dim() > 0


def _is_native(field: VectorField) -> bool:
    """Nothing in it is Python, or it is on a device whose engines run chains alone."""
    parts = [part for layer in field.layers for part in (layer.gate, layer.shift)]
    return field.device.type != "cpu" or not any(isinstance(part, TimeFunction) for part in parts)


def _graph_if_native(
    module: nn.Module, probe: Probe, like: State | None, chain: tuple[VectorField, dict[Key, Origin]]
) -> tuple[Field, dict[Key, Origin]]:
    """The graph of a chain that has functions of time in Python, where the graph has none."""
    try:
        field, origins = read_graph(module, probe, like, None)
    except UnsupportedFieldError:
        return chain
    native = not field.functions
    return (field, origins) if native and field.layout.plain else chain


def _read_chain(module: nn.Module, probe: Probe, like: Tensor | None) -> tuple[VectorField, dict[Key, Origin]]:
    tracer = None
    try:
        with untouched(module), torch.no_grad():  # restored: a module may keep what a call has computed
            tracer = Tracer(module, probe)
            field, origins = assemble(tracer, *tracer.read(*probe.point()))
            if probe.only and like is None:
                raise UnsupportedFieldError(f"module {type(module).__name__}: {probe.only}. {REMEDY}.")
        if tracer.read_by_python:
            with untouched(module), torch.no_grad():
                compare_runs(module, probe)
        with untouched(module), torch.no_grad():  # restored: the calls above may have made it another module
            field.refused_axes = verify(module, field, probe, like)
    except UnsupportedFieldError as error:
        if tracer is None or not tracer.probe.only or tracer.probe.only in str(error):
            raise
        raise UnsupportedFieldError(f"{error} ({tracer.probe.only})") from error.__cause__
    except (NotFinite, TypeError, ValueError) as error:
        if tracer is None or isinstance(error, NotFinite):
            raise
        raise unforeseen(module, tracer, error) from error
    except Exception as error:
        raise unforeseen(module, tracer, error) from error
    return field, origins
