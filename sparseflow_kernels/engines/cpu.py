"""The CPU engine: `csrc/cpu` behind the engine protocol."""

from __future__ import annotations

import functools
import os
from typing import Collection

import torch
from torch import Tensor

from ..divergence import DivergencePlan
from ..field import GraphField, UnsupportedFieldError, VectorField
from ..threads import get_num_threads
from ..warn import warn
from .adjoint import write_adjoint
from .base import Gradient, SolveRequest, SolveResult
from .native import (
    NativeEngine,
    Renewal,
    address,
    field_gradients,
    native_options,
    native_tableau,
    solve_result,
    times_gradient,
)
from .program import write_program

STAGE_BYTES = 4 << 20  # the stages of a step are kept for its gradient if they take no more; larger ones are computed again

# Rows of a gradient's program for one of a layer, at most but for what the exact divergence stacks.
_ADJOINT_SLOTS = 12

_BUILDERS = {torch.float32: "BuilderF32", torch.float64: "BuilderF64"}


@functools.cache
def _native():
    from .. import _cpu  # late: a checkout without the extension can still import the package

    if not os.environ.get("SPARSEFLOW_ISA") and _cpu.isa() == "baseline" != _cpu.best_isa():
        warn(
            f"this build of sparseflow_kernels holds no kernels for {_cpu.best_isa()}, which this processor runs: solves "
            "take several times as long. Install it without SPARSEFLOW_CPU_ISAS=baseline (`sparseflow info` says what "
            "was built), or set SPARSEFLOW_ISA=baseline if that is meant"
        )
    return _cpu


def unready(field: VectorField | GraphField) -> str | None:
    """Why no field of this device and dtype runs here; None if it may."""
    try:
        _native()
    except ImportError as error:
        return f"the CPU extension is not built ({error}); install the package with pip, which compiles it"
    if field.device.type != "cpu":
        return f"the field is on {field.device}, the cpu engine needs it on the CPU: call .to('cpu')"
    if field.dtype not in _BUILDERS:
        return f"the cpu engine computes in float32 and float64, not {field.dtype}: call .float() or .double()"
    return None


def _rows(field: VectorField, slots: int = 1) -> int:
    """Rows that a tile's activations take at least, as csrc/validate.cpp counts them. slots: of a hidden layer's buffer."""
    widths = [layer.out_features for layer in field.layers]
    return field.dim + 1 + sum((width + 1) * slots for width in widths[:-1]) + widths[-1] + 1


def _too_large(field: VectorField, slots: int = 1, what: str = "its layers") -> str | None:
    """Why kernels with 32-bit offsets cannot run the field; None if they can."""
    native = _native()
    if (rows := _rows(field, slots)) > native.MOST_ROWS:
        return (
            f"{what} take {rows} rows of activations, more than the {native.MOST_ROWS} that 32-bit offsets reach: "
            "prune neurons, or use engine='reference'"
        )
    for layer in field.layers:
        if layer.pattern.nnz > native.MOST_ENTRIES:
            return (
                f"layer {layer.name!r} has {layer.pattern.nnz} weights, more than the {native.MOST_ENTRIES} that 32-bit "
                "offsets reach: prune it, or use engine='reference'"
            )
    return None


class CpuEngine(NativeEngine):
    """Sparse kernels in C++ over batch-minor tiles; a whole solve is one call. float32 and float64."""

    name = "cpu"

    @staticmethod
    def unsupported(field: VectorField) -> str | None:
        return unready(field) or _too_large(field)

    def __init__(self, field: VectorField, plan: DivergencePlan | None = None) -> None:
        super().__init__(field, plan)
        if plan is not None and (reason := _too_large(field, 2, "its layers with their derivatives")) is not None:
            raise UnsupportedFieldError(f"engine 'cpu': the divergence of this field: {reason}")
        self._adjoint: tuple | None = None  # made when a gradient is first asked for
        builder = getattr(_native(), _BUILDERS[field.dtype])()
        self._writer = write_program(builder, field, plan)
        self.program = builder.compile()
        self._writer.array = Tensor.detach  # from now on numbers are read where they are
        externals, dtype = self._writer.externals, field.dtype
        if externals.functions:
            self.program.set_refresh(lambda times: externals.answer(times, dtype))

    @torch.no_grad()
    def update(self, field: VectorField) -> bool:
        if not self._takes_over(field) or self._writer.externals.functions:
            return False
        self._field = field
        self.stamp += 1
        forward = self.program, self._writer
        for program, writer in (forward,) if self._adjoint is None else (forward, self._adjoint):
            renewal = Renewal(self.dtype)
            writer.renew(renewal, field)
            renewal.send(program)
        return True

    def evaluate(self, t: Tensor | float, y: Tensor) -> Tensor:
        y = self._ready(y, "y")
        f = torch.empty_like(y)
        self.program.evaluate(float(t), y.data_ptr(), 0, y.shape[0], get_num_threads(), f.data_ptr(), 0)
        return f

    def evaluate_with_divergence(self, t: Tensor | float, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.plan is None:
            raise ValueError("this engine was packed without a divergence: pack it with a plan")
        x = self._ready(x, "x")
        noise = self._ready_noise(noise, x)
        f, divergence = torch.empty_like(x), x.new_empty(x.shape[0])
        self.program.evaluate(
            float(t), x.data_ptr(), address(noise), x.shape[0], get_num_threads(), f.data_ptr(), divergence.data_ptr()
        )
        return f, divergence

    def solve(self, request: SolveRequest) -> SolveResult:
        x = self._ready(request.x, "y0")
        if request.step_control not in ("shared", "per_tile"):
            raise ValueError(f"step_control={request.step_control!r}: the cpu engine knows 'shared' and 'per_tile'")
        batch, outputs = x.shape[0], len(request.times)
        l = self._ready_density(request)
        ls = None if l is None else x.new_full((outputs, batch), torch.nan)
        noise = self._ready_noise(request.noise, x)
        xs = x.new_full((outputs, batch, self.dim), torch.nan)  # outputs a failed solve does not reach stay NaN
        rtol, atol = (*request.rtol, 0.0)[:2], (*request.atol, 0.0)[:2]
        raw = self.program.solve(
            x=x.data_ptr(), l=address(l), noise=address(noise), batch=batch,
            times=request.times.tolist(), sign=request.sign, tableau=native_tableau(request.tableau), rtol=rtol, atol=atol,
            options=native_options(request.options), grid=[] if request.grid is None else request.grid.tolist(),
            perturb=request.perturb, per_tile=request.step_control == "per_tile", record=request.record,
            record_stages=x.nbytes * len(request.tableau.b) <= STAGE_BYTES, threads=get_num_threads(),
            xs=xs.data_ptr(), ls=address(ls),
        )
        return solve_result(raw, request, xs, ls, batch, self.dim)

    # ---- gradients

    def no_gradient(self, wanted: Collection[str], request: SolveRequest | None = None) -> str | None:
        reason = super().no_gradient(wanted, request)
        if reason is None and _rows(self._field, _ADJOINT_SLOTS) > _native().MOST_ROWS:  # then it is worth to write it
            try:
                self._adjoint_program()
            except ValueError as error:
                return f"the program of the gradient cannot be run ({error})"
        return reason

    def _adjoint_program(self):
        if self._adjoint is None:
            builder = getattr(_native(), _BUILDERS[self.dtype])()
            writer = write_adjoint(builder, self._field, self.plan)
            self._adjoint = builder.compile_adjoint(), writer
            writer.array = Tensor.detach
        return self._adjoint

    def evaluate_backward(
        self, t: Tensor | float, x: Tensor, noise: Tensor | None, grad_f: Tensor, grad_trace: Tensor | None,
        wanted: Collection[str],
    ) -> Gradient:  # fmt: skip
        program, _ = self._adjoint_program()
        x, grad_f, noise = self._ready(x, "x"), self._ready_like(grad_f, x, "grad_f"), self._ready_noise(noise, x)
        grad_trace = self._ready_channel(grad_trace, x.shape[:1], "grad_trace")
        grad_x = torch.empty_like(x)
        raw = program.evaluate(
            t=float(t), x=x.data_ptr(), noise=address(noise), batch=x.shape[0], threads=get_num_threads(),
            grad_f=grad_f.data_ptr(), grad_trace=address(grad_trace), grad_x=grad_x.data_ptr(),
        )
        grad_t = torch.tensor(raw["t"], dtype=self.dtype) if "t" in wanted else None
        return Gradient(tensors=self._tensors(raw) if "tensors" in wanted else (), x=grad_x, t=grad_t)

    def solve_backward(
        self, request: SolveRequest, result: SolveResult, grad_xs: Tensor, grad_ls: Tensor | None, wanted: Collection[str]
    ) -> Gradient:
        program, _ = self._adjoint_program()
        x, noise = self._ready(request.x, "y0"), self._ready_noise(request.noise, request.x)
        grad_xs, grad_ls = self._ready_cotangents(request, grad_xs, grad_ls)
        batch = x.shape[0]
        grad_x = torch.empty_like(x)
        grad_l = None if self.plan is None else x.new_empty(batch)
        raw = program.solve(
            noise=address(noise), batch=batch, times=request.times.tolist(), sign=request.sign,
            tableau=native_tableau(request.tableau), perturb=request.perturb, steps=result.steps.numpy(),
            states=result.states.numpy(), derivatives=result.derivatives.numpy(), threads=get_num_threads(),
            grad_xs=grad_xs.data_ptr(), grad_ls=address(grad_ls), grad_x=grad_x.data_ptr(), grad_l=address(grad_l),
        )
        times = times_gradient(request, result, grad_xs, grad_ls, raw["t"]) if "times" in wanted else None
        return Gradient(tensors=self._tensors(raw) if "tensors" in wanted else (), x=grad_x, l=grad_l, times=times)

    def _tensors(self, raw: dict) -> tuple[Tensor, ...]:
        """A native gradient, tensor by tensor of the field."""
        _, writer = self._adjoint_program()
        matrices, modulations = raw["matrices"], raw["modulations"]
        return field_gradients(
            self._field, writer, lambda number: torch.from_numpy(matrices[number]),
            lambda number, name: torch.from_numpy(modulations[number][name]),
        )
