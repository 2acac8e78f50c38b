"""Whole solves: an attempted step is a fixed sequence of launches on static memory. The host sets a few numbers (was the
last step accepted, the times of the evaluations, the weights of the sums), launches the step or replays its CUDA graph, and
reads three numbers back; what they mean is decided by numerics/step_control.py.
"""

from __future__ import annotations

import itertools
import math
import os
from functools import partial
from typing import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ...numerics.adaptive import choose_first_step, mixed_norm, offending_rows, rms_norm
from ...numerics.clock import Clock
from ...numerics.fixed_grid import combine
from ...numerics.interpolation import linear
from ...numerics.step_control import StopPoints, walk
from ...numerics.tableaus import FixedTableau, Tableau
from ..base import SolveRequest, SolveResult
from . import forms, step_kernels
from .launching import LANES, Launch, ceil_div, interpreted, launch
from .program import TritonProgram
from .workspace import Workspace

GRAPHS_VARIABLE = "SPARSEFLOW_TRITON_GRAPHS"
STAGE_BYTES = 16 << 20  # the stages of a step are kept for its gradient if they take no more; larger ones are made again

Answers = Callable[[Sequence[float]], list[list[Tensor]]]


def bits(weights: Sequence[float]) -> int:
    return sum(1 << j for j, weight in enumerate(weights) if weight != 0.0)


def rows_of_weights(rows: Sequence[Sequence[float]]) -> np.ndarray:
    """[rows, stages], padded so that every row is as well aligned as the first: a kernel is compiled once for all."""
    out = np.zeros((len(rows), ceil_div(max(map(len, rows), default=1), LANES) * LANES))
    for row, weights in zip(out, rows):
        row[: len(weights)] = weights
    return out


def graphs_wanted(program: TritonProgram) -> bool:
    return program.device.type == "cuda" and not interpreted() and os.environ.get(GRAPHS_VARIABLE, "1") != "0"


def _modulate(work: Workspace, answers: Answers | None, times: list[float]) -> None:
    work.modulate(None if answers is None else answers(times))


class Replayed:
    """A fixed sequence of launches on static memory: launched plainly at first, which compiles its kernels, and from
    then on replayed as a CUDA graph, where that is allowed and works."""

    def __init__(self, launches: list[Launch], may_capture: bool, note: Callable[[str], None], name: str) -> None:
        self.launches, self.may_capture, self.note, self.name = launches, may_capture, note, name
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm = False

    def run(self) -> None:
        if self.graph is None and self.warm and self.may_capture:
            self._capture()
        if self.graph is not None:
            return self.graph.replay()
        for bound in self.launches:
            bound()
        self.warm = True

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                for bound in self.launches:
                    bound()
        except Exception as error:  # noqa: BLE001  whatever a driver may not like; the plain launches are as right
            self.may_capture = False
            self.note(f"{self.name} is launched kernel by kernel: it could not be captured in a CUDA graph ({error})")
        else:
            self.graph = graph


class Solver:
    """The memory and the launches of one method over one batch size, kept between solves. No launch refers to the solver
    itself: memory that is no longer kept is free at once."""

    def __init__(
        self, program: TritonProgram, tableau: Tableau | FixedTableau, batch: int, sign: int, answers: Answers | None,
        note: Callable[[str], None], parts: tuple[int, ...] | None = None,
    ) -> None:  # fmt: skip
        """parts: rows of the components of the state, each with tolerances and a norm of its own; None: it is one."""
        self.program, self.tableau, self.batch, self.sign, self.answers = program, tableau, batch, sign, answers
        self.adaptive = isinstance(tableau, Tableau)
        self.stages = len(tableau.b)
        self.a = tableau.a if self.adaptive else tableau.a[1:]  # of the states after the first
        self.shortcut = self.adaptive and tableau.last_stage_is_solution and self.stages > 2
        evaluations = self.stages - self.adaptive  # an adaptive step has its first stage already
        rows = [*self.a, tableau.b, *((tableau.b_error,) if self.adaptive else ())]
        self.weights = rows_of_weights(rows)
        new = partial(torch.zeros, dtype=program.dtype, device=program.device)
        # what the host sets for a step, every part aligned: accepted?, the field's times, weights times dt
        self.params = new(LANES * (1 + ceil_div(evaluations, LANES)) + self.weights.size)
        self.staged = self._staging(self.params.numel())
        self.work = Workspace(program, batch, evaluations, self.params[LANES : LANES + evaluations])
        self.dim, self.rows, self.padded = program.dim, program.dim + program.divergence, self.work.padded
        self.y0, self.y1 = new(self.rows, self.padded), new(self.rows, self.padded)
        self.k = new(self.stages, self.rows, self.padded)
        # rows of the components; the log-density is the last one
        self.components = (*(parts or (self.dim,)), *((1,) if program.divergence else ()))
        bounds = torch.tensor([0, *itertools.accumulate(self.components)], dtype=torch.int32)
        self.bounds, self.width = bounds.to(program.device), len(self.components) + 1
        self.tolerance = new(2, self.rows)
        self.result = torch.zeros(self.width, dtype=torch.float64, device=program.device)
        tile = forms.tiles("step", self.rows, self.padded, interpreted())[0]
        self.tile = dict(ROWS=tile.rows, BATCH=tile.batch, warps=tile.warps, STAGES=self.stages)
        self.row_tiles = ceil_div(self.rows, tile.rows)
        self.programs = self.row_tiles * ceil_div(self.padded, tile.batch)
        self.measured = torch.zeros(self.programs, self.width, dtype=torch.float64, device=program.device)
        self.times: list[float] = []  # the field's, of the evaluations of a step
        self.modulate = partial(_modulate, self.work, answers, self.times)
        may_capture = graphs_wanted(program) and answers is None
        self.step = Replayed(self._bind(), may_capture, note, f"a step of {tableau.name} over a batch of {batch}")

    def _staging(self, *shape: int) -> Tensor:
        """Host memory that is copied to the device without waiting."""
        return torch.zeros(shape, dtype=self.program.dtype, pin_memory=self.program.device.type == "cuda")

    # ---- the launches

    def _weights(self, row: int) -> Tensor:
        first = self.params.numel() - self.weights.size
        return self.params[first + row * self.weights.shape[1] :]

    def _derivative(self) -> tuple:
        """Where the step kernels find the field's answer."""
        f = self.work.buffers[self.program.output]
        return f[:, 0], f.stride(0), self.work.partials, self.work.n_partials

    def _advance(self, stage: int, row: int | None, to_input: bool, to_end: bool) -> Launch:
        x = self.work.buffers[self.program.input]
        return partial(
            launch, step_kernels.advance, self.programs, *self._derivative(), self.y0, self.k, self.k.stride(0),
            self.rows, self.row_tiles, self.dim, self.padded, None if row is None else self._weights(row),
            *((x[:, 0], x.stride(0)) if to_input else (None, 0)), self.y1 if to_end else None,
            STAGE=stage, WEIGHTS=-1 if row is None else bits(self.weights[row]), SIGN=self.sign,
            DIVERGENCE=self.program.divergence, **self.tile,
        )  # fmt: skip

    def _bind(self) -> list[Launch]:
        work, tableau = self.work, self.tableau
        x = work.buffers[self.program.input]
        sequence: list[Launch] = [partial(
            launch, step_kernels.begin, self.programs, self.params, self.y0, self.y1, self.k, self.k.stride(0),
            self.stages - 1, self.rows, self.row_tiles, self.dim, self.padded, self._weights(0), x[:, 0], x.stride(0),
            WEIGHTS=bits(self.weights[0]) if self.adaptive else 0, **self.tile,
        ), self.modulate]  # fmt: skip
        for evaluation in range(work.stages):
            stage, last = evaluation + self.adaptive, evaluation + 1 == work.stages
            sequence.append(partial(work.run, "body", evaluation))
            if not (last and self.adaptive):
                is_end = last or (self.shortcut and evaluation + 2 == work.stages)
                sequence.append(self._advance(stage, stage, not last, is_end))
        if self.adaptive:
            end = len(self.a)
            sequence += [partial(
                launch, step_kernels.finish, self.programs, *self._derivative(), self.y0, self.k, self.k.stride(0),
                self.rows, self.row_tiles, self.dim, self.batch, self.padded, self._weights(end), self._weights(end + 1),
                self.y1, self.tolerance, self.bounds, self.measured, COMPONENTS=self.width - 1,
                STAGE=self.stages - 1, WEIGHTS=-1 if self.shortcut else bits(tableau.b),
                ERROR_WEIGHTS=bits(tableau.b_error), SIGN=self.sign, DIVERGENCE=self.program.divergence, **self.tile,
            ), partial(
                launch, step_kernels.total, 1, self.measured, self.programs, self.result, WIDTH=self.width, N=256,
            )]  # fmt: skip
        return sequence

    def _evaluate(self, t: Tensor | float, y: Tensor) -> Tensor:
        """sign * (f, -trace) [rows, batch] at the solver's time t and a state [rows, batch]; its place is stage 0 of k."""
        times = self.work.times
        if self.answers is not None:
            self.times[:] = [self.sign * float(t)] * self.work.stages
        times.copy_((t if isinstance(t, Tensor) else torch.full_like(times[0], t)) * self.sign)
        self.modulate()
        self.work.state(self.program.input)[:, : self.batch] = y[: self.dim]
        self.work.run("body", 0)
        self._advance(0, None, False, False)()
        return self.k[0, :, : self.batch]

    # ---- a solve

    def solve(self, request: SolveRequest) -> SolveResult:
        x, outputs = request.x, len(request.times)
        self.request, self.points = request, request.times.tolist()
        self.clock = Clock(request.times, x)
        self.xs = x.new_full((outputs, *x.shape), torch.nan)  # outputs a failed solve does not reach stay NaN
        self.xs[0] = x
        self.ls = self.slopes = None
        self.y0.zero_(), self.y1.zero_()
        y0 = self.y0[:, : self.batch]
        y0[: self.dim] = x.T
        if self.program.divergence:
            y0[self.dim] = request.l
            self.ls = x.new_full((outputs, self.batch), torch.nan)
            self.ls[0] = request.l
        if request.noise is not None and self.program.noise >= 0:
            self.work.state(self.program.noise)[:, : self.batch] = request.noise.T
        self.work.run("prologue")
        self.nfe, self.pending, self.tried, self.after_jump = 0, False, False, None
        self.states, self.derivatives = [], []
        self.kept = 0
        if request.record:
            stages = x.nbytes * self.stages <= STAGE_BYTES
            # a last stage at the solution follows from no derivative
            self.kept = self.stages - 1 - self.shortcut if stages else int(self.adaptive)
        result = self._adaptive() if self.adaptive else self._fixed()
        if request.record:
            self.states.append(self._x(self.y1 if self.pending else self.y0))
            result.states = torch.stack(self.states)
            result.derivatives = torch.cat(self.derivatives) if self.derivatives else x.new_zeros(0, *x.shape)
        self.request = self.xs = self.ls = self.slopes = None  # the caller's from now on
        self.states, self.derivatives = [], []
        return result

    def _x(self, y: Tensor) -> Tensor:
        """[..., rows, padded] -> [..., batch, dim]."""
        return y[..., : self.dim, : self.batch].transpose(-1, -2).contiguous()

    def _record(self) -> None:
        """The step that was just accepted, before the next one begins."""
        if self.request.record:
            self.states.append(self._x(self.y0))
            if self.kept:
                self.derivatives.append(self._x(self.k[: self.kept]))

    def _set(self, accepted: bool, times: Sequence[float], dt: float, out: np.ndarray) -> None:
        out[0] = accepted
        out[LANES : LANES + len(times)] = [self.sign * t for t in times]
        out[len(out) - self.weights.size :] = (dt * self.weights).ravel()

    # ---- adaptive: a Stepper

    def _adaptive(self) -> SolveResult:
        request, options, t0 = self.request, self.request.options, self.points[0]
        stops = StopPoints(t0, options)
        self.tolerance.copy_(torch.stack([self._by_row(request.rtol), self._by_row(request.atol)]))
        y = self.y0[:, : self.batch]
        f0 = self._evaluate(self.clock.seen(t0), y)
        self.nfe += 1
        if options.first_step is None:
            f0 = f0.clone()
            of_rows = [column[:, None] for column in self.tolerance]
            norm = rms_norm if len(self.components) == 1 else mixed_norm(*self.components)
            dt = choose_first_step(
                self._evaluate, self.clock, t0, y, f0, self.tableau.order, *of_rows, lambda value: norm(value.T)
            )
            self.nfe += 1
            self.k[0, :, : self.batch] = f0
        else:
            dt = float(options.first_step)
        if request.record:
            slopes = torch.zeros_like(self.xs), None if self.ls is None else torch.zeros_like(self.ls)
            self.slopes = slopes
        # x, dt and the weights of the middle point, for every output: written once, so that no copy is waited for
        width = ceil_div(2 + self.stages, LANES) * LANES
        self.numbers = torch.zeros(len(self.points), width, dtype=y.dtype, device=y.device)
        self.staged_numbers = self._staging(*self.numbers.shape)
        finite = bool(torch.isfinite(y).all())
        state = walk(self.points, dt, finite, self.tableau.order, options, stops, self)
        return SolveResult(
            self.xs, self.ls, self.nfe, len(state.steps), state.rejected,
            torch.tensor(state.steps, dtype=torch.float64).reshape(-1, 2), state.status, state.t, state.dt,
            () if state.status == "ok" else self._suspects(), slopes=self.slopes,
        )  # fmt: skip

    def _by_row(self, tolerances: Sequence[float]) -> Tensor:
        """[rows], from one number for all components or one for each."""
        if len(tolerances) == 1:
            return torch.full((self.rows,), float(tolerances[0]), dtype=torch.float64)
        numbers = torch.tensor(tolerances[: len(self.components)], dtype=torch.float64)
        return numbers.repeat_interleave(torch.tensor(self.components))

    def attempt(self, t: float, dt: float, t1: float, kind: str) -> tuple[float, bool]:
        clock, tableau = self.clock, self.tableau
        times = [clock.seen(t1, -1) if node == 1.0 else clock.node(t, node, dt) for node in tableau.c]
        self.times[:] = [self.sign * time for time in times]
        self._set(self.pending, times, dt, self.staged.numpy())
        self.params.copy_(self.staged, non_blocking=True)
        if self.after_jump is not None:
            self.k[-1, :, : self.batch], self.after_jump = self.after_jump, None
        self.pending, self.tried, self.dt = False, True, dt
        self.step.run()
        self.nfe += tableau.stages_per_step
        *squares, bad = self.result.tolist()  # the one read of the step
        ratio = 0.0
        for square, rows in zip(squares, self.components):
            own = math.sqrt(square / (rows * self.batch))
            ratio = own if own > ratio or math.isnan(own) else ratio
        return ratio, bad == 0.0

    def accept(self, t: float, dt: float, t1: float, kind: str) -> None:
        self._record()
        self.pending, self.accepted = True, (t, dt, t1)
        if kind == "jump":
            first = self.k[0].clone()  # outputs of this step are still to be read
            self.after_jump = self._evaluate(self.clock.seen(t1, +1), self.y1[:, : self.batch]).clone()
            self.k[0] = first
            self.nfe += 1

    def output(self, index: int, time: float) -> None:
        t, dt, t1 = self.accepted
        b_mid = self.tableau.b_mid
        numbers = self.staged_numbers[index]
        numbers.numpy()[: 2 + self.stages] = [(time - t) / (t1 - t), dt, *(dt * weight for weight in b_mid)]
        self.numbers[index].copy_(numbers, non_blocking=True)
        x_slopes, l_slopes = self.slopes or (None, None)
        launch(
            step_kernels.read_off, self.programs, self.numbers[index], self.y0, self.y1, self.k, self.k.stride(0),
            self.rows, self.row_tiles, self.dim, self.batch, self.padded, self.xs[index],
            None if self.ls is None else self.ls[index], None if x_slopes is None else x_slopes[index],
            None if l_slopes is None else l_slopes[index], WEIGHTS=bits(b_mid), **self.tile,
        )  # fmt: skip

    def _suspects(self) -> tuple[int, ...]:
        y, y1, k = (part[..., : self.batch].transpose(-1, -2) for part in (self.y0, self.y1, self.k))
        if not self.tried:
            return offending_rows([y, k[0]])
        rtol, atol = self.tolerance
        error = combine(list(k), self.tableau.b_error, self.dt) / (atol + rtol * torch.maximum(y.abs(), y1.abs()))
        return offending_rows([y, y1, error])

    # ---- fixed grids

    def _fixed(self) -> SolveResult:
        request, tableau, clock, index = self.request, self.tableau, self.clock, 1
        knots = request.grid.tolist()
        steps = list(zip(knots, knots[1:]))
        above, below = (tableau.next_stages, tableau.prev_stages) if request.perturb else ((), ())
        all_times = [
            [
                clock.seen(
                    t1 if node == 1.0 else t0 + node * (t1 - t0), 1 if stage in above else -1 if stage in below else 0
                )
                for stage, node in enumerate(tableau.c)
            ]
            for t0, t1 in steps
        ]  # fmt: skip
        staged = self._staging(len(steps), self.params.numel())
        for n, (t0, t1) in enumerate(steps):
            self._set(n > 0, all_times[n], t1 - t0, staged[n].numpy())
        params = staged.to(self.params.device, non_blocking=True)
        for n, (t0, t1) in enumerate(steps):
            self.times[:] = [self.sign * time for time in all_times[n]]
            self.params.copy_(params[n])
            self.step.run()
            self.nfe += tableau.stages_per_step
            while index < len(self.points) and self.points[index] <= t1:
                time, y = self.points[index], self.y1
                if time != t1:
                    y = linear(self.y0, self.y1, (time - t0) / (t1 - t0))
                self.xs[index] = y[: self.dim, : self.batch].T
                if self.ls is not None:
                    self.ls[index] = y[self.dim, : self.batch]
                index += 1
            self._record()
            self.pending = True
        log = torch.tensor([(t0, t1 - t0) for t0, t1 in steps], dtype=torch.float64).reshape(-1, 2)
        return SolveResult(self.xs, self.ls, self.nfe, len(steps), 0, log, t=knots[-1])
