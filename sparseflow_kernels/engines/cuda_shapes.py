"""Launch shapes of the CUDA engines: those that fit, the one expected or measured to be the quickest, how many blocks."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any, Callable

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

    def tune(
        self, request: SolveRequest, repeats: int = 3, kind: str = "forward"
    ) -> list[tuple[tuple[int, ...], float]]:
        """Solve `request`, or with kind="adjoint" make its gradient, in every shape that fits, and use the quickest from
        then on. Returns (shape, seconds), the quickest first. On a GPU only: elsewhere times mean nothing."""
        if self.device.type != "cuda":
            raise ValueError(f"tune: times are taken on a GPU, and this engine is on {self.device}")
        return self._tune(request, repeats, kind, self._launch_seconds)

    def _tune(
        self, request: SolveRequest, repeats: int, kind: str, clock: Callable[[Callable[[], Any]], float]
    ) -> list[tuple[tuple[int, ...], float]]:
        if kind not in ("forward", "adjoint"):
            raise ValueError(f"tune: kind is 'forward' or 'adjoint', not {kind!r}")
        stages, batch, control = stages_of(request), request.x.shape[0], request.step_control
        if kind == "adjoint" and control != "shared":
            raise ValueError(f"tune: step_control={control!r} has no gradient of its own")
        self.plan_for(batch, stages, kind, control)  # raises where no shape fits
        run = self._a_solve(request) if kind == "forward" else self._a_gradient(request)
        found = []
        for plan in self.candidates(batch, stages, kind, control):
            if self._blocks(plan, kind) == 0:
                continue
            self.use(plan, batch, stages, kind, control)
            with self._guard():
                run()  # warms up
                found.append((plan, min(clock(run) for _ in range(repeats))))
        found.sort(key=lambda pair: pair[1])
        self.use(found[0][0], batch, stages, kind, control)
        table = [(plan.shape, seconds) for plan, seconds in found]
        shapes.remember(self._limits["name"], self._signature(kind, batch, stages, control), table)
        return table

    def _a_solve(self, request: SolveRequest) -> Callable[[], Any]:
        """A solve, in the shape that is in use."""
        raise NotImplementedError

    def _a_gradient(self, request: SolveRequest) -> Callable[[], Any]:
        """A gradient of that solve, recorded before."""
        result = self.solve(replace(request, record=True))
        grad_xs, grad_ls = torch.ones_like(result.xs), None if result.ls is None else torch.ones_like(result.ls)
        return lambda: self.solve_backward(request, result, grad_xs, grad_ls, ("tensors",))

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
