"""Reading a module as a graph: the ways to call it in turn, until one gives a field that is the module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..field import GraphField, UnsupportedFieldError
from ..field.layout import State
from ..origin import Key, Origin
from .elements import WHOLE
from .graph_probe import GraphProbe, probes
from .graph_tracer import MOST_CONTEXT, GraphTracer
from .probe import Probe, check_settled, dtype_and_device, plain_operations
from .untouched import untouched
from .python_times import PythonTimes
from .reads import compare_runs
from .refusal import REMEDY, NeedsContext, NotFinite, PythonValue
from .verify import verify_graph

WRONG_WAY = (WHOLE, "one by one")  # in errors: samples meet each other, or rows do
MOST_READINGS = 5  # of a module that has a context
Result = tuple[GraphField, dict[Key, Origin]]


def read_graph(
    module: nn.Module, found: Probe | None, like: State | None, chain: UnsupportedFieldError | None
) -> Result:  # fmt: skip
    """The field of a module as a graph, and the origins of its tensors.

    found: the way to call the module that a chain would be read with, if there is one.  chain: why the module is no chain.
    Raises UnsupportedFieldError, with the reason of the first way that the module can be called.
    """
    check_settled(module)
    example = like if like is None or isinstance(like, Tensor) else like[0]
    like = tuple(like) if isinstance(like, list) else like
    dtype, device = dtype_and_device(module, example)
    with untouched(module), torch.no_grad():
        ways = list(probes(module, found, like, dtype, device))
    errors: list[UnsupportedFieldError] = []
    for probe in ways:
        one = like if probe.plain is not None and isinstance(like, Tensor) else None
        try:
            try:
                return _read(module, probe, one)
            except PythonValue as error:
                return _read_with_slots(module, probe, one, error)
        except UnsupportedFieldError as error:
            if probe.only and probe.only not in str(error):
                error = UnsupportedFieldError(f"{error} ({probe.only})")
            errors.append(error)
    if not errors:
        errors = [chain or UnsupportedFieldError(
            f"module {type(module).__name__}: forward(t, like) does not run for the example, or returns something else "
            f"than a derivative of the state. {REMEDY}."
        )]  # fmt: skip
    # That a way was the wrong one tells less than why the right one did not do.
    raise next((error for error in errors if not any(words in str(error) for words in WRONG_WAY)), errors[0])


def _read_with_slots(module: nn.Module, probe: GraphProbe, like: Tensor | None, error: PythonValue) -> Result:
    """With functions of time for what Python makes of t. Raises the error where that cannot be."""
    try:
        with untouched(module), torch.no_grad(), plain_operations():
            times = PythonTimes(module, probe)
        return _read(module, probe, like, times)
    except UnsupportedFieldError:
        raise error from error.__cause__


def _read(module: nn.Module, probe: GraphProbe, like: Tensor | None, times: PythonTimes | None = None) -> Result:
    tracer = None
    try:
        tracer, output, notes = _trace(module, probe, times)
        if tracer.read_by_python and times is None:
            with untouched(module), torch.no_grad():
                compare_runs(module, probe)
        with untouched(module), torch.no_grad():
            field = tracer.field(output, notes)
            field.refused_axes = verify_graph(module, field, probe, like)
    except (UnsupportedFieldError, NotFinite):
        raise
    except Exception as error:
        raise unforeseen(module, tracer, error) from error
    return field, dict(tracer.table.origins)


def _trace(
    module: nn.Module, probe: GraphProbe, times: PythonTimes | None
) -> tuple[GraphTracer, Any, list[str]]:  # fmt: skip
    """Runs the module and reads the run. Where tensors of the module turn out to be its context the module is read again,
    until the number of the context's rows, which every reading needs to begin with, is that of the reading before."""
    rows, names = MOST_CONTEXT if probe.only else None, None
    flagged = times is None
    for _ in range(MOST_READINGS):
        with untouched(module), torch.no_grad():
            tracer = GraphTracer(module, probe, rows, names, times)
            try:
                output, notes = tracer.read(flagged)
            except NeedsContext:
                if rows is not None:
                    raise
                rows = MOST_CONTEXT
                continue
            except UnsupportedFieldError:
                raise
            except Exception as error:
                if not flagged:
                    raise unforeseen(module, tracer, error) from error
                flagged = False  # it may not be written to, or leave torch, then
                continue
        if rows is None or (rows == tracer.context.count and names == tracer.context.names):
            return tracer, output, notes
        rows, names = tracer.context.count or None, tracer.context.names
    raise UnsupportedFieldError(
        f"module {type(module).__name__}: what is given per sample is something else at every call. {REMEDY}."
    )


def unforeseen(module: nn.Module, tracer: Any, error: Exception) -> UnsupportedFieldError:
    """The error for an exception that no rule foresaw."""
    if tracer is not None and tracer.stack.refusal is not None:
        return tracer.stack.refusal
    where = f"module {type(module).__name__}" if tracer is None else f"{tracer.stack}"
    at = f", near the operation {tracer.operation}" if tracer is not None and tracer.operation else ""
    return UnsupportedFieldError(
        f"{where}: the module cannot be read{at} ({type(error).__name__}: {error}). {REMEDY}."
    )
