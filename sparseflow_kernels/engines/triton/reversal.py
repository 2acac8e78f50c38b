"""The gradient of an evaluation, or of a whole solve, by the adjoint program: the accepted steps are walked backwards,
their stages made again where they were not recorded (csrc/cpu/adjoint.cpp, over the whole batch at once). The host knows
all steps beforehand, so it reads nothing from the device on the way.
"""

from __future__ import annotations

from functools import partial
from typing import Callable, Sequence

import torch
from torch import Tensor

from ...numerics.clock import Clock
from ...numerics.tableaus import FixedTableau, Tableau
from ..base import SolveRequest, SolveResult
from . import forms, step_kernels
from .collected import GraphSums, ProgramGradient, program_gradient
from .launching import LANES, Launch, ceil_div, interpreted, launch
from .program import TritonProgram
from .solve import Answers, Replayed, bits, graphs_wanted, rows_of_weights
from .workspace import Workspace


class Reversal:
    """Memory and launches of backward passes of one method (None: of a single evaluation) over one batch size."""

    def __init__(
        self, program: TritonProgram, tableau: Tableau | FixedTableau | None, batch: int, sign: int,
        note: Callable[[str], None], answers: Answers | None = None, graph: bool = False,
    ) -> None:  # fmt: skip
        """answers: say what functions of time in Python say.  graph: the program is a graph's."""
        self.answers = answers
        self.program, self.tableau, self.batch, self.sign = program, tableau, batch, sign
        self.adaptive = isinstance(tableau, Tableau)
        self.stages = 1 if tableau is None else len(tableau.b)
        self.a = () if tableau is None else tableau.a if self.adaptive else tableau.a[1:]
        self.shortcut = self.adaptive and tableau.last_stage_is_solution
        rows = [*self.a, *((tableau.b,) if tableau is not None else ())]
        self.weights = rows_of_weights(rows)
        new = partial(torch.zeros, dtype=program.dtype, device=program.device)
        # the field's times, weights times dt
        self.params = new(ceil_div(self.stages, LANES) * LANES + self.weights.size)
        self.work = Workspace(program, batch, self.stages, self.params[: self.stages])
        self.graph_sums = GraphSums(self.work) if graph else None
        self.dim, self.rows, self.padded = program.dim, program.dim + program.divergence, self.work.padded
        self.k = new(self.stages, self.dim, self.padded)
        self.inputs = new(self.stages, self.dim, self.padded)  # the states the stages were evaluated at
        self.of_k = new(self.stages, self.rows, self.padded)  # cotangents of sign * (f, -trace)
        # cotangents: of the state at the end of a step, at its start, of the derivative carried to the step before
        self.end, self.start, self.carried = (new(self.rows, self.padded) for _ in range(3))
        tile = forms.tiles("step", self.rows, self.padded, interpreted())[0]
        self.tile = dict(ROWS=tile.rows, BATCH=tile.batch, warps=tile.warps)
        self.row_tiles = ceil_div(self.rows, tile.rows)
        self.programs = self.row_tiles * ceil_div(self.padded, tile.batch)
        name = "an evaluation" if tableau is None else f"a stage of {tableau.name}"
        name = f"the gradient of {name} over a batch of {batch}"
        self.pulls = [Replayed(self._bind(i), graphs_wanted(program), note, name) for i in range(self.stages)]

    def _weights(self, row: int) -> Tensor:
        first = self.params.numel() - self.weights.size
        return self.params[first + row * self.weights.shape[1] :]

    def _bind(self, stage: int) -> list[Launch]:
        """From the cotangent of a stage to those of its state, of the earlier stages, and of all that is trained."""
        program, work = self.program, self.work
        x, v = work.buffers[program.input], work.buffers[program.cotangent]
        lam = work.state(program.trace_cotangent) if program.divergence else None
        found = work.buffers[program.state_cotangent]
        weights, mask = (None, 0) if stage == 0 else (self._weights(stage - 1), bits(self.weights[stage - 1]))
        return [
            partial(
                launch, step_kernels.prepare, self.programs, self.inputs[stage], self.of_k[stage], self.rows,
                self.row_tiles, self.dim, self.padded, x[:, 0], x.stride(0), v[:, 0], v.stride(0), lam, SIGN=self.sign,
                **self.tile,
            ),
            partial(work.run, "keep", stage),
            partial(work.run, "reverse", stage),
            *work.gradient.of_stage[stage if work.timed > 1 else 0],
            partial(
                launch, step_kernels.spread, self.programs, found[:, 0], found.stride(0), self.dim, self.row_tiles,
                self.padded, weights, self.of_k, self.of_k.stride(0), self.start, WEIGHTS=mask, STAGES=self.stages,
                **self.tile,
            ),
        ]  # fmt: skip

    def _begin(self, noise: Tensor | None) -> None:
        self.work.gradient.forget()
        if self.graph_sums is not None:
            self.graph_sums.forget()
        for buffer in (self.end, self.start, self.carried, self.of_k):
            buffer.zero_()
        if noise is not None and self.program.noise >= 0:
            self.work.state(self.program.noise, 1)[:, : self.batch] = noise.T  # beside the state

    def _finish(self) -> ProgramGradient:
        found = program_gradient(self.work)
        if self.graph_sums is not None:
            self.graph_sums.fill(found)
        return found

    def _pull(self, stage: int) -> None:
        self.pulls[stage].run()
        if self.graph_sums is not None:
            self.graph_sums.take(stage)

    def _x(self, y: Tensor) -> Tensor:
        return y[: self.dim, : self.batch].T.contiguous()

    # ---- a single evaluation

    def evaluate(
        self, tell: Callable[[Tensor], None], x: Tensor, noise: Tensor | None, grad_f: Tensor, grad_trace: Tensor | None
    ) -> tuple[ProgramGradient, Tensor]:
        """tell: puts the time into a tensor."""
        self._begin(noise)
        tell(self.work.times)
        self.work.modulate()
        self.inputs[0, :, : self.batch] = x.T
        self.of_k[0, : self.dim, : self.batch] = grad_f.T
        if self.program.divergence and grad_trace is not None:
            self.of_k[0, self.dim, : self.batch] = -grad_trace  # a solver sees the opposite of the trace
        self._pull(0)
        return self._finish(), self._x(self.start)

    # ---- a solve

    def solve(
        self, request: SolveRequest, result: SolveResult, grad_xs: Tensor, grad_ls: Tensor | None
    ) -> tuple[ProgramGradient, Tensor, Tensor | None]:
        """(gradient, of x [batch, dim], of l [batch] or None); grad_xs [outputs, batch, dim], grad_ls [outputs, batch]."""
        self._begin(request.noise)
        self.request, self.result = request, result
        self.points, self.grads = request.times.tolist(), (grad_xs, grad_ls)
        self.steps = result.steps.tolist()
        self.kept = len(result.derivatives) // max(1, len(self.steps))
        self._set_all()
        last = len(self.points) - 1
        for n in reversed(range(len(self.steps))):
            first = last  # outputs read off this step: (t0, t1], the last step's beyond its rounding too
            while first > 0 and self.points[first] > self.steps[n][0]:
                first -= 1
            self._step_back(n, range(first + 1, last + 1))
            last = first
        if self.adaptive and self.steps:
            self._first_derivative()
        self._add_output(self.end, 0, 1.0)
        grad_l = self.end[self.dim, : self.batch].clone() if self.program.divergence else None
        self.request = self.result = self.grads = self.all_params = None  # the caller's from now on
        return self._finish(), self._x(self.end), grad_l

    def _end_of(self, n: int) -> float:
        t, dt = self.steps[n]
        return self.steps[n + 1][0] if n + 1 < len(self.steps) else t + dt

    def _size_of(self, n: int) -> float:
        return self.steps[n][1] if self.adaptive else self._end_of(n) - self.steps[n][0]

    def _set_all(self) -> None:
        """The numbers of all steps, and behind them those of the first evaluation, in one transfer."""
        clock = Clock(self.request.times, self.inputs)
        staged = torch.zeros(
            len(self.steps) + 1, self.params.numel(), dtype=self.params.dtype,
            pin_memory=self.params.device.type == "cuda",
        )  # fmt: skip
        for n, (t0, _) in enumerate(self.steps):
            row = staged[n].numpy()
            row[: self.stages] = [self.sign * t for t in self._times(clock, n, t0)]
            row[len(row) - self.weights.size :] = (self._size_of(n) * self.weights).ravel()
        if self.steps:
            staged[-1, : self.stages] = self.sign * clock.seen(self.steps[0][0])
        self.all_times = staged[:, : self.stages].tolist() if self.answers is not None else None
        self.all_params = staged.to(self.params.device, non_blocking=True)

    def _modulate(self, n: int) -> None:
        """What depends on time alone, of all stages of step n."""
        self.work.modulate(None if self.answers is None else self.answers(self.all_times[n]))

    def _times(self, clock: Clock, n: int, t0: float) -> list[float]:
        """As the solver took them (solve.py)."""
        t1, dt, tableau = self._end_of(n), self._size_of(n), self.tableau
        if self.adaptive:
            return [t0, *(clock.seen(t1, -1) if c == 1.0 else clock.node(t0, c, dt) for c in tableau.c)]
        above, below = (tableau.next_stages, tableau.prev_stages) if self.request.perturb else ((), ())
        return [
            clock.seen(t1 if c == 1.0 else t0 + c * dt, 1 if stage in above else -1 if stage in below else 0)
            for stage, c in enumerate(tableau.c)
        ]

    def _reading(self, x: float) -> tuple[float, ...]:
        """What an output at fraction x of a step owes to its start, end and middle point and to the slopes at the ends."""
        if not self.adaptive:
            return 1.0 - x, x, 0.0, 0.0, 0.0
        x2, x3, x4 = x**2, x**3, x**4
        return (1.0 - 11.0 * x2 + 18.0 * x3 - 8.0 * x4, -5.0 * x2 + 14.0 * x3 - 8.0 * x4, 16.0 * (x2 - 2.0 * x3 + x4),
                x - 4.0 * x2 + 5.0 * x3 - 2.0 * x4, x2 - 3.0 * x3 + 2.0 * x4)  # fmt: skip

    def _add_output(self, out: Tensor, index: int, factor: float) -> None:
        if factor == 0.0:
            return
        grad_xs, grad_ls = self.grads
        out[: self.dim, : self.batch].add_(grad_xs[index].T, alpha=factor)
        if self.program.divergence and grad_ls is not None:
            out[self.dim, : self.batch].add_(grad_ls[index], alpha=factor)

    def _step_back(self, n: int, outputs: Sequence[int]) -> None:
        """Turns the cotangent of the end of a step into that of its start. An adaptive step's first derivative is the last
        one of the step before, whose cotangent is carried there."""
        (t0, _), t1, dt, adaptive = self.steps[n], self._end_of(n), self._size_of(n), self.adaptive
        stages, last_stage, is_last = self.stages, self.stages - 1, n + 1 == len(self.steps)
        readings = [self._reading((self.points[i] - t0) / (t1 - t0)) for i in outputs]
        inside = adaptive and any(any(reading[2:]) for reading in readings)
        b, b_mid = self.tableau.b, self.tableau.b_mid if adaptive else (0.0,) * stages

        # which stages have a cotangent at all; they are pulled back from the last to the first
        active = [False] * stages
        for i in reversed(range(stages)):
            active[i] = (
                b[i] != 0.0 or (inside and (b_mid[i] != 0.0 or i in (0, last_stage)))
                or (adaptive and i == last_stage and not is_last)
                or any(active[j] and self.a[j - 1][i] != 0.0 for j in range(i + 1, stages))
            )  # fmt: skip
        needed = max(i for i in range(stages) if active[i] or i == 0)

        self.params.copy_(self.all_params[n])
        self._modulate(n)
        self._remake(n, needed)

        self.of_k.zero_()
        if adaptive and not is_last:
            self.of_k[last_stage] = self.carried
        self.start.zero_()
        for i, (to_start, to_end, to_middle, slope_start, slope_end) in zip(outputs, readings):
            self._add_output(self.end, i, to_end)
            self._add_output(self.start, i, to_start + to_middle)
            if inside:
                for j, weight in enumerate(b_mid):
                    self._add_output(self.of_k[j], i, dt * to_middle * weight)
                self._add_output(self.of_k[0], i, slope_start * dt)
                self._add_output(self.of_k[last_stage], i, slope_end * dt)
        launch(
            step_kernels.spread, self.programs, self.end, self.padded, self.rows, self.row_tiles, self.padded,
            self._weights(len(self.a)), self.of_k, self.of_k.stride(0), self.start, WEIGHTS=bits(b), STAGES=stages,
            **self.tile,
        )  # fmt: skip
        for i in reversed(range(int(adaptive), stages)):
            if active[i]:
                self._pull(i)
        self.end.copy_(self.start)
        if adaptive:
            self.carried.copy_(self.of_k[0])

    def _remake(self, n: int, needed: int) -> None:
        """The states of the stages up to this one, from the derivatives that were kept."""
        states, batch, work = self.result.states, self.batch, self.work
        kept = min(self.kept, needed)
        if kept:
            recorded = self.result.derivatives[n * self.kept : n * self.kept + kept]
            self.k[:kept, :, :batch] = recorded.transpose(1, 2)
        self.inputs[0, :, :batch] = states[n].T
        for i in range(1, needed + 1):
            if self.shortcut and i == self.stages - 1:
                self.inputs[i, :, :batch] = states[n + 1].T
                return
            if i > kept:  # stage i - 1 was not kept
                work.state(self.program.input).copy_(self.inputs[i - 1])
                work.run("body", i - 1)
                torch.mul(work.state(self.program.output), self.sign, out=self.k[i - 1])
            launch(
                step_kernels.combine, self.programs, self.inputs[0], self.k, self.k.stride(0), self.dim, self.row_tiles,
                self.padded, self._weights(i - 1), self.inputs[i], WEIGHTS=bits(self.weights[i - 1]), STAGES=self.stages,
                **self.tile,
            )  # fmt: skip

    def _first_derivative(self) -> None:
        self.params.copy_(self.all_params[-1])
        self._modulate(-1)
        self.inputs[0, :, : self.batch] = self.result.states[0].T
        self.of_k[0] = self.carried
        self.start.copy_(self.end)
        self._pull(0)
        self.end.copy_(self.start)
