"""The CUDA engine of chains: `csrc/cuda` behind the engine protocol. A whole solve is one launch, its gradient another."""

from __future__ import annotations

from typing import Any, Collection

import torch
from torch import Tensor

from ..divergence import DivergencePlan
from ..field import TimeFunction, UnsupportedFieldError, VectorField
from . import shapes
from .adjoint import write_adjoint
from .base import Gradient, SolveRequest, SolveResult
from .cuda_device import BUILDERS, IMAGE_BYTES, DeviceError
from .cuda_shapes import dense_above, stages_of
from .cuda_solve import CudaSolver
from .native import address, field_gradients, times_gradient
from .program import Writer, write_program

__all__ = ["CudaEngine", "DeviceError"]


class CudaEngine(CudaSolver):
    """Sparse kernels in CUDA C++; a whole solve is one launch. float32 and float64, compute capability 8.0 and newer.

    step_control: "shared", "per_tile" and "per_sample" (a step size for every sample; no gradient).

    Tuning: which launch shape is the quickest is estimated from counts (csrc/cuda/plan.cpp); `tune` measures, and what it
    found is used for that field and batch from then on, in later processes too (`shapes.json` in the cache folder).
    """

    @classmethod
    def unsupported(cls, field: VectorField) -> str | None:
        if (reason := cls._unready(field)) is not None:
            return reason
        for layer in field.layers:
            if isinstance(layer.gate, TimeFunction) or isinstance(layer.shift, TimeFunction):
                return (
                    f"layer {layer.name!r} has a function of time that is neither a sigmoid gate nor linear, which a kernel "
                    "cannot call; the triton and reference engines can"
                )
            if max(layer.out_features, layer.in_features) > 0xFFFF:
                return f"layer {layer.name!r} is wider than 65535; the triton engine runs any width"
        if (size := _image_bytes(field)) >= IMAGE_BYTES:
            return (
                f"its weights take {size / 2**30:.1f} GB, more than the 2 GB that the cuda engine's 32-bit offsets reach; "
                "the triton engine runs it"
            )
        return None

    @classmethod
    def unsuited(cls, field: VectorField) -> str | None:
        # the least a tile takes: a layer's values and tangents and the next one's, four samples
        widths = [field.dim, *(layer.out_features for layer in field.layers)]
        bytes_needed = max(a + b for a, b in zip(widths, widths[1:])) * 2 * 4 * field.dtype.itemsize
        limit = cls._limits_of(field.device)["shared_per_block"]
        if bytes_needed <= limit // 2:
            return None
        return (
            f"four samples' activations of two layers take {bytes_needed} bytes, too much of the {limit} bytes of shared "
            "memory that the cuda engine keeps them in"
        )

    def __init__(self, field: VectorField, plan: DivergencePlan | None = None) -> None:
        super().__init__(field, plan)
        self._writers: dict[str, Writer] = {}
        with self._guard():
            self._image("forward")  # what cannot be laid out is refused now

    # ---- programs

    def _write_image(self, kind: str) -> Any:
        builder = getattr(self._module, BUILDERS[self.dtype])()
        write = write_program if kind == "forward" else write_adjoint
        writer = write(builder, self._field, self.plan)
        if writer.externals.functions:
            raise UnsupportedFieldError(
                "engine 'cuda': the exact divergence of this field has too many paths to list, and an output gate: take "
                "the Hutchinson estimate, or engine='triton'"
            )
        image = self._laid_out(builder)
        writer.array = Tensor.detach  # from now on numbers stay where they are
        self._writers[kind] = writer
        return image

    def update(self, field: VectorField) -> bool:
        if not self._takes_over(field):
            return False
        self._field = field
        self.stamp += 1
        with self._guard():
            self._renew_images(lambda kind, image: self._writers[kind].renew(image, field))
        return True

    def _layers(self) -> str:
        layers = self._field.layers
        return "-".join(f"{layer.out_features}x{layer.in_features}:{layer.pattern.nnz}" for layer in layers)

    def describe(self, batch: int = 1000) -> list[str]:
        """The form of each layer, and how a batch of this size would run."""
        writer, whole = self._writers["forward"], self._image("forward").image.dense
        forms = [
            f"{number} {'four dense rows at a time' if whole[matrix] else 'sparse rows'} ({layer.pattern.density:.0%})"
            for number, (matrix, layer) in enumerate(zip(writer.weights, self._field.layers))
        ]
        plan, blocks = self.plan_for(batch, 7)
        key = self._signature("forward", batch, 7, "shared")
        source = "tuned" if shapes.tuned(self._limits["name"], key) == plan.shape else "by estimate"
        return [
            f"layers on the GPU: {', '.join(forms)} [dense from {dense_above():.0%} on]",
            f"a solve of {batch} samples: one launch of {blocks} blocks; {plan.reason} [{source}]",
        ]

    # ---- evaluations

    def evaluate(self, t: Tensor | float, y: Tensor) -> Tensor:
        return self._evaluate(t, self._ready(y, "y"), None, False)[0]

    def evaluate_with_divergence(self, t: Tensor | float, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.plan is None:
            raise ValueError("this engine was packed without a divergence: pack it with a plan")
        x = self._ready(x, "x")
        return self._evaluate(t, x, self._ready_noise(noise, x), True)

    # ---- gradients

    def evaluate_backward(
        self, t: Tensor | float, x: Tensor, noise: Tensor | None, grad_f: Tensor, grad_trace: Tensor | None,
        wanted: Collection[str],
    ) -> Gradient:  # fmt: skip
        x, grad_f = self._ready(x, "x"), self._ready_like(grad_f, x, "grad_f")
        noise = self._ready_noise(noise, x)
        grad_trace = self._ready_channel(grad_trace, x.shape[:1], "grad_trace")
        with self._guard():
            grad_x = torch.empty_like(x)
            at, value = self._time(t)
            sums = self._backward(x.shape[0], 1, {
                "evaluate": True, "x": x.data_ptr(), "noise": address(noise), "grad_f": grad_f.data_ptr(),
                "grad_trace": address(grad_trace), "time": address(at), "time_value": value, "grad_x": grad_x.data_ptr(),
                "grad_l": 0,
            })  # fmt: skip
            tensors = self._tensors(sums) if "tensors" in wanted else ()
        return Gradient(tensors=tensors, x=grad_x, t=sums[-1].to(self.dtype) if "t" in wanted else None)

    def solve_backward(
        self, request: SolveRequest, result: SolveResult, grad_xs: Tensor, grad_ls: Tensor | None, wanted: Collection[str]
    ) -> Gradient:
        x, noise = self._ready(request.x, "y0"), self._ready_noise(request.noise, request.x)
        outputs, batch = len(request.times), x.shape[0]
        grad_xs, grad_ls = self._ready_cotangents(request, grad_xs, grad_ls)
        with self._guard():
            grad_x = torch.empty_like(x)
            grad_l = None if self.plan is None else x.new_empty(batch)
            times, steps = self._on_the_device(tuple(request.times.tolist())), result.steps.to(self.device)
            sums = self._backward(batch, stages_of(request), {
                "evaluate": False, "x": 0, "noise": address(noise), "tableau": self._tableau(request.tableau),
                "sign": request.sign, "perturb": request.perturb, "n_times": outputs, "n_steps": len(steps),
                "times": times.data_ptr(), "steps": address(steps), "states": address(result.states),
                "derivatives": address(result.derivatives), "grad_xs": grad_xs.data_ptr(), "grad_ls": address(grad_ls),
                "grad_x": grad_x.data_ptr(), "grad_l": address(grad_l),
            })  # fmt: skip
            of_times = times_gradient(request, result, grad_xs, grad_ls, sums[-1]) if "times" in wanted else None
            tensors = self._tensors(sums) if "tensors" in wanted else ()
        return Gradient(tensors=tensors, x=grad_x, l=grad_l, times=of_times)

    def _tensors(self, sums: Tensor) -> tuple[Tensor, ...]:
        """A gradient, tensor by tensor of the field."""
        image, writer = self._image("adjoint").image, self._writers["adjoint"]

        def of_matrix(number: int) -> Tensor:
            first, size = image.matrix_gradient(number)
            return sums[first : first + size]

        def of_modulation(number: int, name: str) -> Tensor:
            first, size = image.modulation_gradients(number)[name]
            return sums[first : first + size]

        return field_gradients(self._field, writer, of_matrix, of_modulation)


def _image_bytes(field: VectorField) -> int:
    """What the program takes on the device at least (csrc/cuda/image.cpp): its weights and, where rows are sparse, 16
    bits for the column of each."""
    total = 0
    for layer in field.layers:
        pattern, item = layer.pattern, field.dtype.itemsize
        whole = pattern.density > dense_above() and min(pattern.shape) > 1
        total += pattern.shape[0] * pattern.shape[1] * item if whole else pattern.nnz * (item + 2)
        total += pattern.shape[0] * item
    return total
