"""What `solve` returns, and the errors of a solve that could not go on and of a gradient that is not finite."""

from __future__ import annotations

import io
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple, Sequence

import torch
from torch import Tensor

from .tables import html_table

if TYPE_CHECKING:
    from .engines.base import SolveRequest, SolveResult


@dataclass
class Stats:
    """How a solve went.

    nfe: evaluations of f (unless step_control is "shared": the mean over tiles, or samples, rounded up).
    accepted, rejected: steps; None where the solver that ran does not tell (Adams, SciPy).
    steps: float64 CPU [accepted, 2], (t, dt) of every accepted step, t in the caller's time and dt positive; None where
        it is not known.
    engine: who ran it: an engine's name ("cpu", "reference", ...), "numerics" for the package's own torch solver on a
        plain callable, or "torchdiffeq" for a solve that was handed over; `reason` then says why.
    Under torch.compile the counts are 0-d int64 tensors, `steps` is None, and `engine` is the one asked for.
    """

    nfe: int
    accepted: int | None
    rejected: int | None
    steps: Tensor | None = field(repr=False)
    engine: str
    method: str
    step_control: str = "shared"
    reason: str = ""

    def _repr_html_(self) -> str:
        told = ((each.name, str(getattr(self, each.name))) for each in fields(self) if each.repr)
        return html_table([(name, text) for name, text in told if text not in ("", "None")], header=False)


@dataclass(repr=False)
class Solution:
    """ys: [len(t), *y0.shape], or a tuple of such for a tuple state (with an event: the start and the event, so the
    first axis is 2).  event_t: 0-d, the time of the event, or None."""

    ys: Tensor | tuple[Tensor, ...]
    stats: Stats
    event_t: Tensor | None = None

    def __repr__(self) -> str:
        parts = (self.ys,) if isinstance(self.ys, Tensor) else self.ys
        shapes = ", ".join(f"{list(part.shape)} {str(part.dtype).removeprefix('torch.')}" for part in parts)
        ys = shapes if isinstance(self.ys, Tensor) else f"({shapes})"
        event = "" if self.event_t is None else f"event_t={self.event_t.item():g}, "
        return f"Solution(ys={ys}, {event}{self.stats})"

    def _repr_html_(self) -> str:
        shapes = [list(part.shape) for part in ((self.ys,) if isinstance(self.ys, Tensor) else self.ys)]
        return f"<code>ys: {', '.join(map(str, shapes))}</code>{self.stats._repr_html_()}"


class _Written(NamedTuple):
    """A tensor as bytes."""

    content: bytes


def _written(value: Any) -> Any:
    """Tensors, also in a tuple, as bytes: what torch would send between processes instead is a handle of memory that
    goes with the process that failed."""
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(map(_written, value))
    if not isinstance(value, Tensor):
        return value
    buffer = io.BytesIO()
    torch.save(value.detach().to("cpu", copy=True), buffer)
    return _Written(buffer.getvalue())


def _read(value: Any) -> Any:
    if isinstance(value, _Written):
        return torch.load(io.BytesIO(value.content), weights_only=True)
    return tuple(map(_read, value)) if isinstance(value, tuple) and not hasattr(value, "_fields") else value


def _restored(kind: type[BaseException], args: tuple, attributes: dict[str, Any]) -> BaseException:
    error = kind.__new__(kind, *args)
    error.__dict__.update({name: _read(value) for name, value in attributes.items()})
    return error


class _Portable(Exception):
    """An exception made of more than its message. It can be pickled and copied, so that a pool of processes hands it
    on; its tensors are on the CPU then."""

    def __reduce__(self) -> tuple:
        return _restored, (type(self), self.args, {name: _written(value) for name, value in self.__dict__.items()})


class SolverError(_Portable, AssertionError):
    """A solve could not go on. An AssertionError that begins with torchdiffeq's words, then says where and what to do.

    status: "underflow", "non_finite" or "max_num_steps".  t, dt: where it stopped, in the caller's time, and the step
    it wanted.  rows: offending rows of the flattened batch (may be empty).
    ys: the outputs, NaN from the first one that was not reached; no gradient.
    """

    def __init__(
        self,
        status: str,
        t: float,
        dt: float,
        rows: Sequence[int],
        ys: Tensor | tuple[Tensor, ...],
        max_num_steps: int,
    ) -> None:
        self.status, self.t, self.dt, self.rows, self.ys = status, t, dt, tuple(rows), ys
        first = ys if isinstance(ys, Tensor) else ys[0]
        if status == "underflow":
            lead = f"underflow in dt {dt}"
            advice = (
                "Either f or the state is not finite there (look at the rows named, and at the parameters), the "
                "solution blows up, or the tolerances are too tight for this dtype and this t: loosen rtol and atol, "
                "or use float64."
            )
        elif status == "non_finite":
            lead = f"non-finite values in state `y`: dtype {first.dtype}"
            advice = "A step of min_step was accepted whatever its error; lower options['min_step'], or mend f there."
        else:
            lead = f"max_num_steps exceeded ({max_num_steps}>={max_num_steps})"
            advice = (
                "Raise options['max_num_steps'] (it counts the steps of one output interval), or loosen rtol and atol. "
                "The outputs reached are in the error's `ys`."
            )
        super().__init__(f"{lead}: stopped at t = {t:.9g}{_rows_text(self.rows)}. {advice}")

    @staticmethod
    def of(
        result: "SolveResult", request: "SolveRequest", ys: Sequence[Tensor], is_tuple: bool = True
    ) -> "SolverError":  # fmt: skip
        """The error of an engine's solve with these outputs, in the caller's shapes."""
        ys = tuple(part.detach() for part in ys)
        return SolverError(
            result.status, request.sign * result.t, result.dt, result.rows, ys if is_tuple else ys[0],
            request.options.max_num_steps,
        )  # fmt: skip


class GradientError(_Portable, RuntimeError):
    """The gradient of a solve is not finite. Raised by the backward pass, in place of handing NaN to an optimizer, but
    where `set_nonfinite_gradients` or a GradScaler lets it through.

    step: number of the accepted step where it happened, counted from 0, or None where no single step is to blame (the
    gradient that arrived was not finite).  t, dt: that step, in the caller's time, or None.  rows: offending rows of
    the flattened batch (may be empty).
    """

    def __init__(
        self, what: str, advice: str, step: int | None, t: float | None, dt: float | None, rows: Sequence[int],
        steps: int,
    ) -> None:  # fmt: skip
        self.step, self.t, self.dt, self.rows = step, t, dt, tuple(rows)
        where = "" if step is None else f", in step {step} of {steps} (t = {t:.9g}, dt = {dt:.9g})"
        super().__init__(f"{what}{where}{_rows_text(self.rows)}. {advice}")

    @staticmethod
    def of_what_arrived(time: float, rows: Sequence[int], steps: int) -> "GradientError":
        """The error of a cotangent, of the output at `time`, that is not finite in these rows."""
        what = f"the gradient that arrives at the solve's output for t = {time:.9g} is not finite"
        advice = "The loss, or what is computed between the solve and it, is not finite there."
        return GradientError(what, advice, None, None, None, rows, steps)


def _rows_text(rows: tuple[int, ...]) -> str:
    if not rows:
        return ""
    shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
    return f", {len(rows)} row(s) of the batch: {shown}"
