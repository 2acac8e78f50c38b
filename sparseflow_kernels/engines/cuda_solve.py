"""Evaluations, solves and their gradients as launches of the CUDA kernels: one for a solve, one for its gradient. The host
waits once for a solve, to read how it went."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Callable, ClassVar

import torch
from torch import Tensor

from ..divergence import DivergencePlan
from ..field import GraphField, VectorField
from ..numerics.tableaus import Tableau
from .base import SolveRequest, SolveResult
from .cuda_shapes import STEP_CAPACITY, LaunchShapes, stages_of
from .native import address, native_options, solve_of_nothing

FIRST_CAPACITY = 24  # steps that a solve can record at first; a longer one is run again with room for them
RECORD_BYTES = 256 << 20  # but no more than fit in here, at first
READ_AT_ONCE = 64  # of the steps, those that come along with the counts

_STATUS = ("ok", "underflow", "non_finite", "max_num_steps", "interrupted")


class CudaSolver(LaunchShapes):
    controls: ClassVar[tuple[str, ...]] = ("shared", "per_tile", "per_sample")

    def __init__(self, field: VectorField | GraphField, plan: DivergencePlan | None = None) -> None:
        super().__init__(field, plan)
        self._capacity = FIRST_CAPACITY

    def _given(
        self, kind: str, noise: Tensor | None, context: Tensor | None, batch: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """What of a call the "forward" or the "adjoint" program reads: its noise, and rows [batch, ..] of a context."""
        return noise, None

    def _evaluate(
        self, t: Tensor | float, x: Tensor, noise: Tensor | None, with_trace: bool, context: Tensor | None = None,
        own_times: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """own_times: the time of every sample is a last column of x."""
        program = self._image("forward")
        batch = x.shape[0]
        with self._guard():
            f, trace = x.new_empty(batch, self.dim), x.new_empty(batch) if with_trace else None
            if batch == 0:
                return f, trace
            noise, rows = self._given("forward", noise, context, batch)
            plan, blocks = self.plan_for(batch, 1)
            memory = self._bytes(blocks * plan.global_bytes)
            at, value = self._time(t)
            self._launch(
                program.image.evaluate, plan=plan, image=program.memory.data_ptr(), device=self._index, blocks=blocks,
                stream=self._stream(), global_memory=address(memory), batch=batch, x=x.data_ptr(), noise=address(noise),
                time_value=value, time=address(at), f=f.data_ptr(), trace=address(trace),
                context=address(rows), own_times=own_times,
            )
        return f, trace

    def solve(self, request: SolveRequest) -> SolveResult:
        x = self._ready(request.x, "y0")
        batch = x.shape[0]
        if request.step_control not in self.controls:
            raise ValueError(f"step_control must be one of {self.controls}, not {request.step_control!r}")
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "a solve reads its outcome on the host, which a CUDA graph cannot capture; it is one launch already: call it "
                "outside the captured region"
            )
        l = self._ready_density(request)
        noise = self._ready_noise(request.noise, x)
        if request.record and request.step_control != "shared":
            raise ValueError(f"step_control={request.step_control!r} records no common steps for a gradient")
        if batch == 0:
            return solve_of_nothing(request, x)
        with self._guard():
            room = max(FIRST_CAPACITY, RECORD_BYTES // (2 * x.nbytes)) if x.nbytes else FIRST_CAPACITY
            capacity, step_capacity = min(self._capacity, room), STEP_CAPACITY
            result, accepted = self._solve(request, x, l, noise, capacity, step_capacity)
            if accepted > (capacity if request.record else step_capacity):  # again, with room for what it turned out to take
                result, _ = self._solve(request, x, l, noise, accepted, max(accepted, step_capacity))
            if request.record:
                self._capacity = max(FIRST_CAPACITY, accepted + accepted // 4)
        return result

    def _solve(
        self, request: SolveRequest, x: Tensor, l: Tensor | None, noise: Tensor | None, capacity: int, step_capacity: int
    ) -> tuple[SolveResult, int]:
        """The result, and how many steps were accepted; with fewer places some of them were not recorded."""
        program = self._image("forward")
        batch, dim, outputs = x.shape[0], self.dim, len(request.times)
        adaptive = isinstance(request.tableau, Tableau)
        shared, stages = request.step_control == "shared", stages_of(request)
        plan, blocks = self.plan_for(batch, stages, "forward", request.step_control)
        options = native_options(request.options)
        points = [*request.times.tolist(), *([] if request.grid is None else request.grid.tolist())]
        times = self._on_the_device((*points, *options["step_t"], *options["jump_t"]))
        xs = x.new_empty(outputs, batch, dim)
        ls = None if l is None else x.new_empty(outputs, batch)

        noise, context = self._given("forward", noise, request.context, batch)
        own_parts = list(request.parts or (dim,))
        components = len(own_parts) + (l is not None)
        tolerances = [[*one] * components if len(one) == 1 else [*one][:components] for one in (request.rtol, request.atol)]
        rows = dim + (l is not None)
        several = shared and plan.tiles > blocks
        if request.grid is not None:
            capacity = step_capacity = len(request.grid) - 1
        parts = {
            "barrier": 64, "next_tile": 64, "stop": 64,  # these begin at zero
            "stats": 64 * (1 if shared else plan.tiles), "steps": 16 * step_capacity if shared else 0, "blame": 16 * batch,
            "slots": 16 * self._module.SUMS * blocks, "global": blocks * plan.global_bytes,
            "tile_state": plan.tiles * 5 * rows * plan.shape[0] * x.element_size() if several else 0,
        }
        offsets, size = {}, 0
        for name, count in parts.items():
            offsets[name] = size
            size += (count + 127) // 128 * 128
        scratch = self._memory(size, f"a batch of {batch}")
        scratch[: offsets["stats"]].zero_()

        recorded: dict[str, Tensor] = {}
        if request.record:
            recorded["states"] = x.new_empty(capacity + 1, batch, dim)
            if adaptive:
                recorded["derivatives"] = x.new_empty(capacity + 1, batch, dim)
                recorded["x_slopes"] = torch.zeros_like(xs)
                if ls is not None:
                    recorded["l_slopes"] = torch.zeros_like(ls)
        names = ("states", "derivatives", "x_slopes", "l_slopes")
        arguments = {
            "image": program.memory.data_ptr(), "device": self._index, "blocks": blocks, "stream": self._stream(),
            "batch": batch, "x": x.data_ptr(), "l": address(l), "noise": address(noise),
            "context": address(context), "shared": shared,
            "tableau": self._tableau(request.tableau),
            "parts": own_parts, "rtol": tolerances[0], "atol": tolerances[1], "options": options, "sign": request.sign,
            "perturb": request.perturb, "n_times": outputs, "n_grid": len(points) - outputs, "times": times.data_ptr(),
            "xs": xs.data_ptr(), "ls": address(ls), "record": request.record, "capacity": capacity,
            "step_capacity": step_capacity,
            **{name: address(recorded.get(name)) for name in names},
            **{name: scratch.data_ptr() + offset if parts[name] else 0 for name, offset in offsets.items()},
        }
        self._launch(program.image.solve, plan, arguments)
        self._wait(scratch[offsets["stop"] : offsets["stop"] + 4])

        # the one read; of the steps, as many come along as most solves take
        first_steps = min(step_capacity, READ_AT_ONCE)
        end = offsets["steps"] + 16 * first_steps if shared else offsets["steps"]
        told = self._read(scratch[offsets["stats"] : end])
        said = told[: parts["stats"]].view(torch.float64).view(-1, 8).tolist()
        nfe, accepted, rejected = (sum(column) for column in list(zip(*said))[:3])
        failed = [tile for tile, one in enumerate(said) if one[3]]
        status, t, dt, bad = "ok", 0.0, 0.0, ()
        if failed:
            code, t, dt = said[failed[0]][3:6]
            status = _STATUS[int(code)]
            blame = scratch[offsets["blame"] : offsets["blame"] + 16 * batch].view(torch.float64).view(2, batch).cpu()
            bad = _offending(blame if l is not None else blame[:1], dim, None if shared else failed, plan.shape[0])
        kept = min(int(accepted), step_capacity) if shared else 0
        steps = told[told.numel() - 16 * first_steps :] if shared else told[:0]
        if kept > first_steps:
            steps = scratch[offsets["steps"] : offsets["steps"] + 16 * kept].cpu()
        result = SolveResult(
            xs=xs, ls=ls, nfe=math.ceil(nfe / len(said)), accepted=int(accepted), rejected=int(rejected),
            steps=steps.view(torch.float64).view(-1, 2)[:kept].clone(), status=status, t=t, dt=dt, rows=bad,
        )
        if request.record:
            kept = min(kept, capacity)
            result.states = recorded["states"][: kept + 1]
            result.derivatives = recorded["derivatives"][: kept + 1] if adaptive else x.new_empty(0, batch, dim)
            if 2 * kept < capacity:  # a gradient may be long in coming
                result.states, result.derivatives = result.states.clone(), result.derivatives.clone()
            if adaptive:
                result.slopes = recorded["x_slopes"], recorded.get("l_slopes")
        return result, int(accepted) if shared else 0

    def _a_solve(self, request: SolveRequest) -> Callable[[], Any]:
        request = replace(request, record=False)
        x, l = self._ready(request.x, "y0"), self._ready_density(request)
        noise = self._ready_noise(request.noise, x)
        return lambda: self._solve(request, x, l, noise, 0, STEP_CAPACITY)

    def _backward(self, batch: int, stages: int, arguments: dict) -> Tensor:
        """Launches the adjoint; the sums of all blocks, float64 on the device."""
        program = self._image("adjoint")
        if batch == 0:
            return torch.zeros(program.image.sums, dtype=torch.float64, device=self.device)
        plan, blocks = self.plan_for(batch, stages, "adjoint")
        image = program.image
        sums = torch.zeros(blocks, image.sums, dtype=self.dtype, device=self.device)
        stage_sums = torch.zeros(blocks, image.stage_sums, dtype=self.dtype, device=self.device)
        memory = self._bytes(blocks * plan.global_bytes)
        self._launch(image.backward, plan, {
            "image": program.memory.data_ptr(), "device": self._index, "blocks": blocks, "stream": self._stream(),
            "batch": batch, "global": address(memory), "sums": sums.data_ptr(), "stage_sums": address(stage_sums),
            "context": 0, "grad_context": 0, "own_times": False, "grad_times": 0, **arguments,
        })  # fmt: skip
        return sums.sum(0, dtype=torch.float64)


def _offending(blame: Tensor, dim: int, tiles: list[int] | None, width: int) -> tuple[int, ...]:
    """The rows that are to blame, among all or among those of the tiles that stopped: those that are not finite; if there
    are none, those whose own error is too large. blame: [1 or 2, batch], sums of squares over a component's elements."""
    among = torch.ones(blame.shape[1], dtype=torch.bool)
    if tiles is not None:
        among[:] = False
        for tile in tiles:
            among[tile * width : (tile + 1) * width] = True
    bad = ~torch.isfinite(blame).all(0) & among
    if not bool(bad.any()):
        bad = (blame > torch.tensor([float(dim), 1.0], dtype=blame.dtype)[: len(blame), None]).any(0) & among
    return tuple(bad.nonzero()[:, 0].tolist())
