"""What the engines with kernels of their own have in common: what they check, which gradients they make, how a solve's
plain data is handed over, and whose gradient is whose."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from typing import Callable, ClassVar, Collection, Iterator

import torch
from torch import Tensor

from ..divergence import DivergencePlan
from ..field import GraphField, VectorField
from ..numerics.step_control import StepOptions
from ..numerics.tableaus import FixedTableau, Tableau
from .adjoint import no_adjoint
from .base import Engine, SolveRequest, SolveResult


MOST_SAMPLES = 2**31 - 2**16  # of a batch


class OneCaller:
    """A lock for what one call at a time may use, as csrc/calls.h has it: other threads wait, but a call that is made
    from within another one, by a function of time say, is told so."""

    _all: weakref.WeakSet[OneCaller] = weakref.WeakSet()

    def __init__(self) -> None:
        self._lock, self._owner = threading.Lock(), None
        self._all.add(self)

    def __enter__(self) -> None:
        if self._owner == threading.get_ident():
            raise RuntimeError(
                "a function of time may not run the same compiled field that is asking it, and neither may anything else "
                "that Python runs meanwhile, a signal handler say: compile another one for it"
            )
        self._lock.acquire()
        self._owner = threading.get_ident()

    def __exit__(self, *_) -> None:
        self._owner = None
        self._lock.release()

    @classmethod
    def _free_all(cls) -> None:
        """In a child of a fork, which lacks the other threads that may have held these."""
        for one in list(cls._all):
            if one._owner != threading.get_ident():
                one._lock, one._owner = threading.Lock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=OneCaller._free_all)


_MODULATION = ("bias", "gate_slope", "gate_offset", "shift_slope", "shift_offset")


class Renewal:
    """New numbers for a program in C++, which takes them over in one call (`send`): calls for each tensor would take longer
    than what small fields compute."""

    def __init__(self, dtype: torch.dtype) -> None:
        """dtype: the program's, whatever the numbers were computed in."""
        self._dtype = dtype
        self._held: list[Tensor] = []  # whose addresses these are
        self._matrices: list[tuple] = []
        self._vectors: list[tuple] = []
        self._modulations: list[tuple] = []

    def set_values(self, matrix: int, values: Tensor) -> None:
        self._matrices.append((matrix, self._memory(values)))

    def set_vector(self, vector: int, values: Tensor) -> None:
        self._vectors.append((vector, self._memory(values)))

    def set_modulation(self, modulation: int, **parts: Tensor) -> None:
        memory = tuple(self._memory(parts[name]) if name in parts else (0, 0) for name in _MODULATION)
        self._modulations.append((modulation, memory))

    def send(self, program) -> None:
        program.renew(self._matrices, self._vectors, self._modulations)

    def _memory(self, values: Tensor) -> tuple[int, int]:
        values = values.to(self._dtype).contiguous()
        self._held.append(values)
        return values.data_ptr(), values.numel()


class NativeEngine(Engine):
    """An engine that runs programs (`program.py`, `adjoint.py`) over raw memory."""

    contiguous: ClassVar[bool] = True  # states have to be

    def __init__(self, field: VectorField | GraphField, plan: DivergencePlan | None = None) -> None:
        reason = self.unsupported(field)
        if reason is not None:
            raise ValueError(f"engine {self.name!r}: {reason}")
        self.plan = plan
        self.dim, self.dtype, self.device = field.dim, field.dtype, field.device
        self.stamp = 0
        self._field = field

    def _takes_over(self, field: VectorField) -> bool:
        """Whether this field is the present one but for its values."""
        old = self._field  # its tensors may be other ones by now: module.to() gives them other memory in place
        return (field.dtype, field.device, len(field.layers)) == (self.dtype, self.device, len(old.layers)) and all(
            new.pattern is now.pattern and new.activation == now.activation
            and (type(new.gate), type(new.shift)) == (type(now.gate), type(now.shift))
            for new, now in zip(field.layers, old.layers)
        )

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """On the field's device; with ordinary tensors without a graph, because what is kept outlives an inference_mode."""
        with contextlib.ExitStack() as stack:
            if self.device.type == "cuda":
                stack.enter_context(torch.cuda.device(self.device))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            yield

    # ---- what every entry checks: kernels read raw memory, and nothing unchecked gets past these lines

    def _ready(self, x: Tensor, name: str) -> Tensor:
        if x.dim() == 2 and x.shape[0] > MOST_SAMPLES:
            raise ValueError(
                f"{name} has {x.shape[0]} rows, more than the {MOST_SAMPLES} that 32 bits count: use smaller batches"
            )
        if x.dim() != 2 or x.shape[1] != self.dim or x.dtype != self.dtype or x.device != self.device:
            raise ValueError(
                f"{name} must be [batch, {self.dim}], {self.dtype} on {self.device}, "
                f"not {list(x.shape)}, {x.dtype} on {x.device}"
            )
        return x.detach().contiguous() if self.contiguous else x.detach()

    def _ready_density(self, request: SolveRequest) -> Tensor | None:
        """The request's log-density channel; None without a divergence."""
        if self.plan is None:
            return None
        if request.l is None:
            raise ValueError("the log-density channel is missing: this engine was packed with a divergence")
        return self._ready_channel(request.l, (request.x.shape[0],), "the log-density channel")

    def _ready_noise(self, noise: Tensor | None, x: Tensor) -> Tensor | None:
        if self.plan is None or self.plan.kind != "hutchinson":
            return None
        if noise is None:
            raise ValueError("noise is missing: a hutchinson divergence needs a probe of the state's shape")
        return self._ready_like(noise, x, "noise")

    def _ready_like(self, other: Tensor, x: Tensor, name: str) -> Tensor:
        other = self._ready(other, name)
        if other.shape != x.shape:
            raise ValueError(f"{name} must have the state's shape {list(x.shape)}, not {list(other.shape)}")
        return other

    def _ready_channel(self, values: Tensor | None, shape: tuple[int, ...], name: str) -> Tensor | None:
        """A channel beside the state; None, or without a divergence: None."""
        if values is None or self.plan is None:
            return None
        if values.shape != shape or values.dtype != self.dtype or values.device != self.device:
            raise ValueError(
                f"{name} must be {list(shape)}, {self.dtype} on {self.device}, not {list(values.shape)}, {values.dtype} on "
                f"{values.device}"
            )
        return values.detach().contiguous()

    def _ready_cotangents(
        self, request: SolveRequest, grad_xs: Tensor, grad_ls: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """(grad_xs [outputs, batch, dim], grad_ls [outputs, batch] or None)."""
        outputs, batch = len(request.times), request.x.shape[0]
        if grad_xs.shape != (outputs, batch, self.dim):
            wanted = [outputs, batch, self.dim]
            raise ValueError(f"grad_xs must be shaped like the outputs, {wanted}, not {list(grad_xs.shape)}")
        grad_xs = self._ready(grad_xs.reshape(-1, self.dim), "grad_xs").view(outputs, batch, self.dim)
        return grad_xs, self._ready_channel(grad_ls, (outputs, batch), "grad_ls")

    def no_gradient(self, wanted: Collection[str], request: SolveRequest | None = None) -> str | None:
        if "noise" in wanted:
            return "the noise wants a gradient"
        if request is not None:
            if "grid" in wanted or ("times" in wanted and not isinstance(request.tableau, Tableau)):
                return "the points of a fixed grid want a gradient"
            if request.options.jump_t or (request.options.step_t and "times" in wanted):
                return "the solve has prescribed jumps or steps"
        return self._no_adjoint()

    def _no_adjoint(self) -> str | None:
        """Why this field and divergence have no adjoint program."""
        return no_adjoint(self._field, self.plan)


def solve_result(
    raw: dict, request: SolveRequest, xs: Tensor, ls: Tensor | None, batch: int, dim: int
) -> SolveResult:
    """What a native solve returned, as plain tensors."""
    result = SolveResult(
        xs=xs, ls=ls, nfe=raw["nfe"], accepted=raw["accepted"], rejected=raw["rejected"],
        steps=torch.from_numpy(raw["steps"]), status=raw["status"], t=raw["t"], dt=raw["dt"], rows=tuple(raw["rows"]),
    )
    if request.record:
        result.states, result.derivatives = (
            torch.from_numpy(raw[name]).view(-1, batch, dim) for name in ("states", "derivatives")
        )  # of the latter [accepted + 1, kept, batch, dim], the first two axes as one
        if raw["x_slopes"].size:
            x_slopes = torch.from_numpy(raw["x_slopes"]).view(len(request.times), batch, dim)
            of_l = None if ls is None else torch.from_numpy(raw["l_slopes"]).view(len(request.times), batch)
            result.slopes = x_slopes, of_l
    return result


def solve_of_nothing(request: SolveRequest, x: Tensor) -> SolveResult:
    outputs = len(request.times)
    ls = None if request.l is None else x.new_empty(outputs, 0)
    empty = torch.zeros(0, 2, dtype=torch.float64)
    return SolveResult(x.new_empty(outputs, *x.shape), ls, 0, 0, 0, empty)


def times_gradient(
    request: SolveRequest, result: SolveResult, grad_xs: Tensor, grad_ls: Tensor | None, of_time: Tensor | float
) -> Tensor:
    """The gradient of the output times, float64 on the CPU: an output moves along the solution with its own time; steps,
    with everything in them, move with the first. of_time: of the field's time, in all evaluations of the steps."""
    found = grad_xs.new_zeros(len(request.times), dtype=torch.float64)
    if result.slopes is not None:
        x_slopes, l_slopes = result.slopes
        found += (x_slopes * grad_xs).sum((1, 2), dtype=torch.float64)
        if grad_ls is not None:
            found += (l_slopes * grad_ls).sum(1, dtype=torch.float64)
    found[0] = request.sign * of_time - found[1:].sum()
    return found.cpu()


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def native_tableau(tableau: Tableau | FixedTableau) -> dict:
    if isinstance(tableau, Tableau):
        return dict(adaptive=True, order=tableau.order, c=tableau.c, a=tableau.a, b=tableau.b,
                    b_error=tableau.b_error, b_mid=tableau.b_mid)
    # a fixed tableau lists its first stage, at node 0, like the others; native code takes that stage for granted
    return dict(adaptive=False, order=tableau.order, c=tableau.c[1:], a=tableau.a[1:], b=tableau.b, b_error=(), b_mid=())


def native_options(options: StepOptions) -> dict:
    return dict(
        min_step=options.min_step, max_step=options.max_step, first_step=options.first_step, safety=options.safety,
        ifactor=options.ifactor, dfactor=options.dfactor, max_num_steps=options.max_num_steps,
        step_t=sorted(options.step_t or ()), jump_t=sorted(options.jump_t or ()),
        stop_at_outputs=options.stop_at_outputs,
    )


def field_gradients(
    field: VectorField, writer, of_matrix: Callable[[int], Tensor], of_modulation: Callable[[int, str], Tensor]
) -> tuple[Tensor, ...]:
    """The gradient of every tensor of the field, in its dtype, from those of an adjoint program's matrices and modulations
    (`adjoint.AdjointWriter`): matrices that were computed from the weights hand theirs on by autograd."""
    dtype = field.dtype
    values = [of_matrix(matrix) for matrix in writer.weights]
    if writer.derived_from:
        with torch.enable_grad():
            lent = field.map_tensors(lambda tensor: tensor.detach().requires_grad_())
            leaves = [layer.values for layer in lent.layers]
            made = [(function(lent), of_matrix(matrix)) for matrix, function in writer.derived_from]
            made = [(out, grad.to(dtype)) for out, grad in made if out.requires_grad]
            if made:
                carried = torch.autograd.grad(
                    [out for out, _ in made], leaves, [grad for _, grad in made], allow_unused=True
                )
                values = [own if more is None else own + more for own, more in zip(values, carried)]
    found: list[Tensor] = []
    for value, layer, modulation in zip(values, field.layers, writer.modulations):
        for name, _ in layer.tensors():
            found.append((value if name == "values" else of_modulation(modulation, name)).to(dtype))
    return tuple(found)
