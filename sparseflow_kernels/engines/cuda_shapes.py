"""Launch shapes of the CUDA engines: those that fit, the one expected or measured to be the quickest, how many blocks."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import Any

import torch

from ..divergence import DivergencePlan
from ..field import GraphField, VectorField
from . import shapes
from .base import SolveRequest
from .cuda_device import CudaDevice, DeviceError

SUMS_BYTES = 1 << 30  # memory for the gradients that blocks add up, each in a place of its own
STEP_CAPACITY = 4096  # steps whose times and sizes are kept for the statistics
# Rows of a nearly dense layer share activations (csrc/cuda/block.cuh). By wavefronts of shared memory: a sparse row reaches
# 0.22 of the multiply-add rate, four dense ones about 0.6. Not yet measured on a GPU.
DENSE_ABOVE = 0.37


class LaunchShapes(CudaDevice):
    def __init__(self, field: VectorField | GraphField, plan: DivergencePlan | None = None) -> None:
        super().__init__(field, plan)
        self._plans: dict[tuple, tuple[Any, int]] = {}

    def _laid_out(self, builder: Any) -> Any:
        """The image of a program; its streams cut into pieces if they cannot stay on chip."""
        image = builder.image(cut=False, dense_above=dense_above())
        if image.stream_bytes > self._limits["shared_per_block"] // 2:
            image = builder.image(cut=True, dense_above=dense_above())
        return image

    def candidates(self, batch: int, stages: int = 7, kind: str = "forward", step_control: str = "shared") -> list[Any]:
        """The launch shapes that fit, the one expected to be the quickest first (csrc/cuda/plan.h)."""
        image = self._image(kind).image
        return image.plans(self._limits, batch, stages, step_control != "shared", step_control == "per_sample")

    def plan_for(self, batch: int, stages: int, kind: str = "forward", step_control: str = "shared") -> tuple[Any, int]:
        """(launch shape, blocks) for a batch; the tuned one if there is one."""
        key = (kind, batch, stages, step_control)
        if key not in self._plans:
            found = self.candidates(batch, stages, kind, step_control)
            wanted = shapes.forced() or shapes.tuned(self._limits["name"], self._signature(*key))
            found.sort(key=lambda plan: plan.shape != wanted)  # the others in their order behind it
            for plan in found:
                blocks = self._blocks(plan, kind)
                if blocks > 0:
                    self._plans[key] = plan, blocks
                    break
            else:
                raise DeviceError(
                    f"engine 'cuda': no launch shape fits this field on {self._limits['name']} "
                    f"({self._limits['shared_per_block']} bytes of shared memory a block); use engine='triton'"
                )
        return self._plans[key]

    def _blocks(self, plan: Any, kind: str) -> int:
        """How many blocks to launch: no more than run at once, so that they can wait for each other. 0: none can."""
        try:
            at_once = self._image(kind).image.occupancy(plan, self._index)
        except RuntimeError as error:
            raise DeviceError(str(error)) from error
        blocks = min(plan.tiles, at_once * self._limits["multiprocessors"])
        if kind == "adjoint":
            per_block = self._image(kind).image.sums * self.dtype.itemsize
            blocks = max(min(blocks, 1), min(blocks, SUMS_BYTES // max(1, per_block)))
        return blocks

    def use(self, plan: Any, batch: int, stages: int, kind: str = "forward", step_control: str = "shared") -> None:
        """Run batches of this size in this shape from now on."""
        blocks = self._blocks(plan, kind)
        if blocks == 0:
            raise DeviceError(f"engine 'cuda': the shape {plan.shape} does not run on {self._limits['name']}")
        self._plans[kind, batch, stages, step_control] = plan, blocks

    def tune(self, request: SolveRequest, repeats: int = 3) -> list[tuple[tuple[int, ...], float]]:
        """Solve `request` in every shape that fits, and use the quickest from then on. Returns (shape, seconds), the
        quickest first. On a GPU only: elsewhere times mean nothing."""
        if self.device.type != "cuda":
            raise ValueError(f"tune: times are taken on a GPU, and this engine is on {self.device}")
        stages, batch, control = stages_of(request), request.x.shape[0], request.step_control
        request = replace(request, record=False)
        self.plan_for(batch, stages, "forward", control)  # raises where no shape fits
        found = []
        for plan in self.candidates(batch, stages, "forward", control):
            if self._blocks(plan, "forward") == 0:
                continue
            self.use(plan, batch, stages, "forward", control)
            x, l = self._ready(request.x, "y0"), self._ready_density(request)
            noise = self._ready_noise(request.noise, x)
            best = math.inf
            with self._guard():
                for repeat in range(repeats + 1):  # the first one warms up
                    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                    self._solve(request, x, l, noise, 0, STEP_CAPACITY, events)
                    if repeat > 0:
                        best = min(best, events[0].elapsed_time(events[1]) * 1e-3)
            found.append((plan, best))
        found.sort(key=lambda pair: pair[1])
        self.use(found[0][0], batch, stages, "forward", control)
        table = [(plan.shape, seconds) for plan, seconds in found]
        shapes.remember(self._limits["name"], self._signature("forward", batch, stages, control), table)
        return table

    def _layers(self) -> str:
        """What of the field a tuned shape holds for."""
        raise NotImplementedError

    def _signature(self, kind: str, batch: int, stages: int, step_control: str) -> str:
        """What a tuned shape holds for."""
        form = "none" if self.plan is None else type(self.plan.form).__name__
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self._layers()} {form} {dtype} {kind} batch {batch} stages {stages} {step_control}"


def dense_above() -> float:
    text = os.environ.get("SPARSEFLOW_CUDA_DENSE_ABOVE", DENSE_ABOVE)
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"SPARSEFLOW_CUDA_DENSE_ABOVE must be a density, like 0.37 (above 1: never), not {text!r}") from None


def stages_of(request: SolveRequest) -> int:
    return len(request.tableau.b)
