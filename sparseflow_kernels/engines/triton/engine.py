"""The Triton engine behind the engine protocol."""

from __future__ import annotations

import functools
import os
from dataclasses import replace
from typing import Callable, Collection, Sequence

import torch
from torch import Tensor

from ...divergence import DivergencePlan
from ...field import GraphField, VectorField
from ..adjoint import write_adjoint
from ..base import Gradient, SolveRequest, SolveResult
from ..native import NativeEngine, field_gradients, solve_of_nothing, times_gradient
from ..program import Externals, write_program
from .held import HeldMemory, check_request, tell

OLDEST = (3, 6)
DTYPES = (torch.float32, torch.float64)
MOST_COUNTED = 2**31 - 2**16  # the last lanes of a tile may count beyond what there is


@functools.cache
def _no_triton() -> str | None:
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error}); install triton {OLDEST[0]}.{OLDEST[1]} or later"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < OLDEST:
        return f"triton is {triton.__version__}; install {OLDEST[0]}.{OLDEST[1]} or later"
    return None


def unready(field: VectorField | GraphField) -> str | None:
    """Why no field of this device and dtype runs here; None if it may."""
    if (reason := _no_triton()) is not None:
        return reason
    if field.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the field is on {field.device}, the triton engine needs it on a GPU: call .to('cuda')"
    if field.dtype not in DTYPES:
        return f"the triton engine computes in float32 and float64, not {field.dtype}: call .float() or .double()"
    return None


class TritonEngine(HeldMemory, NativeEngine):
    """Fused sparse kernels over batch-minor buffers in device memory, a step of a solve in one CUDA graph. float32 and
    float64, CUDA tensors; with TRITON_INTERPRET=1, for tests, CPU tensors.

    notes: what did not go as planned (a capture that failed), line by line.
    """

    name = "triton"
    contiguous = False  # kernels take strides

    @staticmethod
    def unsupported(field: VectorField) -> str | None:
        if (reason := unready(field)) is not None:
            return reason
        # kernels count entries, rows of modulations and a gradient's sums in 32 bits
        if (count := sum(layer.pattern.nnz + 2 * layer.out_features for layer in field.layers)) > MOST_COUNTED:
            return (
                f"its weights and neurons are {count} numbers, more than the {MOST_COUNTED} that 32-bit offsets reach: prune "
                "it, or use engine='reference'"
            )
        if (widest := max(layer.in_features for layer in field.layers)) > MOST_COUNTED:
            return f"a layer reads {widest} components, more than the {MOST_COUNTED} that 32-bit offsets reach"
        return None

    def __init__(self, field: VectorField, plan: DivergencePlan | None = None, form: str | None = None) -> None:
        """form: "auto", "sparse" or "dense", how matrices are multiplied; None reads SPARSEFLOW_TRITON_FORM."""
        super().__init__(field, plan)
        from .builder import Builder  # late: without triton the class can still say why it cannot run
        from .program import TritonProgram

        self.form, self.notes = form, []
        self._hold_memory()
        self._adjoint: tuple | None = None  # made when a gradient is first asked for
        with self._guard():
            builder = Builder(field.dtype, field.device, form)
            self._writer = write_program(builder, field, plan)
            self.program = TritonProgram(builder)

    def describe(self) -> list[str]:
        """A line per layer: how its matrix is multiplied, its density, why; and the notes."""
        return [*self.program.describe(), *self.notes]

    def update(self, field: VectorField) -> bool:
        if not self._takes_over(field) or self._writer.externals.functions:
            return False
        with self._lock, self._guard():
            self._field = field
            self.stamp += 1
            self._writer.renew(self.program, field)
            if self._adjoint is not None:
                program, writer = self._adjoint
                writer.renew(program, field)
        return True

    # ---- evaluations and solves

    def evaluate(self, t: Tensor | float, y: Tensor) -> Tensor:
        return self._evaluate(t, self._ready(y, "y"), None)[0]

    def evaluate_with_divergence(self, t: Tensor | float, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.plan is None:
            raise ValueError("this engine was packed without a divergence: pack it with a plan")
        x = self._ready(x, "x")
        return self._evaluate(t, x, self._ready_noise(noise, x))

    def _evaluate(self, t: Tensor | float, x: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        from .workspace import Workspace

        batch, program = len(x), self.program
        if batch == 0:
            return torch.empty_like(x), x.new_empty(0)
        with self._lock, self._guard():
            work = self._hold(("evaluate", batch), lambda: Workspace(program, batch, 1))
            tell(work.times, t)
            answers = self._answers()
            work.modulate(None if answers is None else answers([float(t)]))
            work.state(program.input)[:, :batch] = x.T
            if noise is not None:
                work.state(program.noise)[:, :batch] = noise.T
                work.run("prologue")
            work.run("body")
            trace = work.partials[: work.n_partials, :batch].sum(0) if self.plan is not None else x.new_empty(0)
            return work.state(program.output)[:, :batch].T.contiguous(), trace

    def _answers(self) -> Callable[[Sequence[float]], list[list[Tensor]]] | None:
        """Who answers for the functions of time that run in Python; None where there are none."""
        externals = self._writer.externals
        return functools.partial(_answers, externals, self.dtype, self.device) if externals.functions else None

    def solve(self, request: SolveRequest) -> SolveResult:
        from .solve import Solver

        check_request(request)
        self._refuse_captured_solves()
        x = self._ready(request.x, "y0")
        batch = len(x)
        l = self._ready_density(request)  # noqa: E741
        noise = self._ready_noise(request.noise, x)
        if batch == 0:
            return solve_of_nothing(request, x)
        with self._lock, self._guard():
            solver = self._hold(
                (request.tableau, batch, request.sign),
                lambda: Solver(self.program, request.tableau, batch, request.sign, self._answers(), self.notes.append),
            )
            return solver.solve(replace(request, x=x, l=l, noise=noise))

    # ---- gradients

    def _adjoint_program(self):
        if self._adjoint is None:
            from .builder import Builder
            from .program import TritonProgram

            builder = Builder(self.dtype, self.device, self.form)
            writer = write_adjoint(builder, self._field, self.plan)
            self._adjoint = TritonProgram(builder), writer
        return self._adjoint

    def _reversal(self, tableau, batch: int, sign: int):
        from .reversal import Reversal

        program, _ = self._adjoint_program()
        return self._hold(
            ("reversal", tableau, batch, sign), lambda: Reversal(program, tableau, batch, sign, self.notes.append)
        )

    def evaluate_backward(
        self, t: Tensor | float, x: Tensor, noise: Tensor | None, grad_f: Tensor, grad_trace: Tensor | None,
        wanted: Collection[str],
    ) -> Gradient:  # fmt: skip
        x, grad_f, noise = self._ready(x, "x"), self._ready_like(grad_f, x, "grad_f"), self._ready_noise(noise, x)
        grad_trace = self._ready_channel(grad_trace, x.shape[:1], "grad_trace")
        if len(x) == 0:
            return self._of_no_rows(x, wanted)
        with self._lock, self._guard():
            raw, grad_x = self._reversal(None, len(x), 1).evaluate(
                lambda times: tell(times, t), x, noise, grad_f, grad_trace
            )
            grad_t = raw.t.to(t.device if isinstance(t, Tensor) else "cpu", self.dtype) if "t" in wanted else None
            return Gradient(tensors=self._tensors(raw) if "tensors" in wanted else (), x=grad_x, t=grad_t)

    def solve_backward(
        self, request: SolveRequest, result: SolveResult, grad_xs: Tensor, grad_ls: Tensor | None, wanted: Collection[str]
    ) -> Gradient:
        x, noise = self._ready(request.x, "y0"), self._ready_noise(request.noise, request.x)
        outputs, batch = len(request.times), len(x)
        grad_xs, grad_ls = self._ready_cotangents(request, grad_xs, grad_ls)
        if batch == 0:
            return self._of_no_rows(x, wanted, outputs)
        with self._lock, self._guard():
            reversal = self._reversal(request.tableau, batch, request.sign)
            raw, grad_x, grad_l = reversal.solve(replace(request, x=x, noise=noise), result, grad_xs, grad_ls)
            times = times_gradient(request, result, grad_xs, grad_ls, raw.t) if "times" in wanted else None
            return Gradient(
                tensors=self._tensors(raw) if "tensors" in wanted else (), x=grad_x, l=grad_l, times=times
            )

    def _of_no_rows(self, x: Tensor, wanted: Collection[str], outputs: int = 0) -> Gradient:
        tensors = tuple(torch.zeros_like(tensor) for _, tensor in self._field.tensors()) if "tensors" in wanted else ()
        return Gradient(
            tensors, torch.empty_like(x), None if self.plan is None else x.new_empty(0),
            torch.zeros((), dtype=self.dtype) if "t" in wanted else None,
            torch.zeros(outputs, dtype=torch.float64) if "times" in wanted else None,
        )  # fmt: skip

    def _tensors(self, raw) -> tuple[Tensor, ...]:
        """A program's gradient, tensor by tensor of the field."""
        _, writer = self._adjoint_program()
        return field_gradients(
            self._field, writer, raw.matrices.__getitem__, lambda number, name: raw.modulations[number][name]
        )


def _answers(
    externals: Externals, dtype: torch.dtype, device: torch.device, times: Sequence[float]
) -> list[list[Tensor]]:
    """By time, what every function says."""
    return [[function(torch.full((), t, dtype=dtype, device=device)) for function in externals.functions] for t in times]
