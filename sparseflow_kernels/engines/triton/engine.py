"""The Triton engine behind the engine protocol."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections import OrderedDict
from dataclasses import replace
from typing import Any, Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from ...divergence import DivergencePlan
from ...field import VectorField
from ...numerics.tableaus import Tableau
from ..adjoint import no_adjoint, write_adjoint
from ..base import Engine, Gradient, SolveRequest, SolveResult
from ..program import Externals, write_program

OLDEST = (3, 6)
DTYPES = (torch.float32, torch.float64)
HELD = 8  # batch sizes and methods whose memory and graphs are kept


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


class TritonEngine(Engine):
    """Fused sparse kernels over batch-minor buffers in device memory, a step of a solve in one CUDA graph. float32 and
    float64, CUDA tensors; with TRITON_INTERPRET=1, for tests, CPU tensors.

    notes: what did not go as planned (a capture that failed), line by line.
    """

    name = "triton"

    @staticmethod
    def unsupported(field: VectorField) -> str | None:
        if (reason := _no_triton()) is not None:
            return reason
        if field.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"the field is on {field.device}, the triton engine needs it on a GPU: call .to('cuda')"
        if field.dtype not in DTYPES:
            return f"the triton engine computes in float32 and float64, not {field.dtype}: call .float() or .double()"
        return None

    def __init__(self, field: VectorField, plan: DivergencePlan | None = None, form: str | None = None) -> None:
        """form: "auto", "sparse" or "dense", how matrices are multiplied; None reads SPARSEFLOW_TRITON_FORM."""
        reason = self.unsupported(field)
        if reason is not None:
            raise ValueError(f"engine 'triton': {reason}")
        from .program import Builder  # late: without triton the class can still say why it cannot run

        self.plan, self.form = plan, form
        self.dim, self.dtype, self.device = field.dim, field.dtype, field.device
        self.stamp, self.notes = 0, []
        self._field = field
        self._lock = threading.RLock()  # one workspace is one caller's at a time
        self._held: OrderedDict = OrderedDict()
        self._adjoint: tuple | None = None  # made when a gradient is first asked for
        with self._guard():
            builder = Builder(field.dtype, field.device, form)
            self._writer = write_program(builder, field, plan)
            self.program = builder.compile()

    def describe(self) -> list[str]:
        """A line per layer: how its matrix is multiplied, its density, why."""
        return self.program.describe()

    def update(self, field: VectorField) -> bool:
        same = field.dtype == self.dtype and field.device == self.device and all(
            new.pattern is old.pattern for new, old in zip(field.layers, self._field.layers, strict=True)
        )
        if not same or self._writer.externals.functions:
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
        from .program import Workspace

        batch, program = len(x), self.program
        if batch == 0:
            return torch.empty_like(x), x.new_empty(0)
        with self._lock, self._guard():
            work = self._hold(("evaluate", batch), lambda: Workspace(program, batch, 1))
            self._tell(work.times, t)
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

    def _tell(self, times: Tensor, t: Tensor | float) -> None:
        """One time, without reading the device."""
        if isinstance(t, Tensor) and t.device == times.device:
            times.copy_(t.detach().reshape(-1)[:1])
        else:
            times.fill_(float(t))

    def solve(self, request: SolveRequest) -> SolveResult:
        from .solve import Solver

        if request.step_control != "shared":
            raise ValueError(
                f"step_control={request.step_control!r}: the triton engine knows only 'shared'; engine='cuda' steps tiles "
                "and samples on their own"
            )
        if request.replay is not None:
            raise ValueError("the triton engine does not take recorded steps again: its gradients are solve_backward's")
        if self._capturing():
            raise RuntimeError(
                "a solve cannot be captured in a CUDA graph: its host reads the error after every step. Capture "
                "evaluations instead; the solve replays graphs of its own"
            )
        x = self._ready(request.x, "y0")
        batch = len(x)
        if self.plan is not None:
            l = request.l  # noqa: E741
            if l is None or l.shape != (batch,) or l.dtype != self.dtype or l.device != self.device:
                raise ValueError(f"the log-density channel must be [{batch}], {self.dtype} on {self.device}")
        noise = self._ready_noise(request.noise, x)
        if batch == 0:
            return _of_nothing(request, x)
        with self._lock, self._guard():
            solver = self._hold(
                (request.tableau, batch, request.sign),
                lambda: Solver(self.program, request.tableau, batch, request.sign, self._answers(), self.notes.append),
            )
            return solver.solve(replace(request, x=x, noise=noise))

    # ---- gradients

    def no_gradient(self, wanted: Collection[str], request: SolveRequest | None = None) -> str | None:
        if "noise" in wanted:
            return "the noise wants a gradient"
        if request is not None:
            if "grid" in wanted or ("times" in wanted and not isinstance(request.tableau, Tableau)):
                return "the points of a fixed grid want a gradient"
            if request.options.jump_t or (request.options.step_t and "times" in wanted):
                return "the solve has prescribed jumps or steps"
        return no_adjoint(self._field, self.plan)

    def _adjoint_program(self):
        if self._adjoint is None:
            from .program import Builder

            builder = Builder(self.dtype, self.device, self.form)
            writer = write_adjoint(builder, self._field, self.plan)
            self._adjoint = builder.compile(), writer
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
        x, grad_f, noise = self._ready(x, "x"), self._ready(grad_f, "grad_f"), self._ready_noise(noise, x)
        if len(x) == 0:
            return self._of_no_rows(x, wanted)
        with self._lock, self._guard():
            raw, grad_x = self._reversal(None, len(x), 1).evaluate(
                lambda times: self._tell(times, t), x, noise, grad_f, grad_trace
            )
            grad_t = raw.t.to(t.device if isinstance(t, Tensor) else "cpu", self.dtype) if "t" in wanted else None
            return Gradient(tensors=self._tensors(raw) if "tensors" in wanted else (), x=grad_x, t=grad_t)

    def solve_backward(
        self, request: SolveRequest, result: SolveResult, grad_xs: Tensor, grad_ls: Tensor | None, wanted: Collection[str]
    ) -> Gradient:
        x, noise = self._ready(request.x, "y0"), self._ready_noise(request.noise, request.x)
        outputs, batch = len(request.times), len(x)
        grad_ls = None if grad_ls is None or self.plan is None else grad_ls.detach()
        if grad_xs.shape != (outputs, batch, self.dim) or (grad_ls is not None and grad_ls.shape != (outputs, batch)):
            raise ValueError(f"the cotangents must be shaped like the outputs, [{outputs}, {batch}, ...]")
        grad_xs = self._ready(grad_xs.reshape(-1, self.dim), "grad_xs").view(outputs, batch, self.dim)
        if batch == 0:
            return self._of_no_rows(x, wanted, outputs)
        with self._lock, self._guard():
            reversal = self._reversal(request.tableau, batch, request.sign)
            raw, grad_x, grad_l = reversal.solve(replace(request, x=x, noise=noise), result, grad_xs, grad_ls)
            times = None
            if "times" in wanted:
                # An output moves along the solution with its own time; steps, with everything in them, with the first.
                of_outputs = grad_xs.new_zeros(outputs, dtype=torch.float64)
                if result.slopes is not None:
                    x_slopes, l_slopes = result.slopes
                    of_outputs += (x_slopes * grad_xs).sum((1, 2), dtype=torch.float64)
                    if grad_ls is not None:
                        of_outputs += (l_slopes * grad_ls).sum(1, dtype=torch.float64)
                of_outputs[0] = request.sign * raw.t - of_outputs[1:].sum()
                times = of_outputs.cpu()
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
        values = [raw.matrices[matrix] for matrix in writer.weights]
        if writer.derived_from:
            with torch.enable_grad():
                field = self._field.map_tensors(lambda tensor: tensor.detach().requires_grad_())
                leaves = [layer.values for layer in field.layers]
                made = [(function(field), raw.matrices[matrix]) for matrix, function in writer.derived_from]
                made = [(out, grad.to(self.dtype)) for out, grad in made if out.requires_grad]
                if made:
                    carried = torch.autograd.grad(
                        [out for out, _ in made], leaves, [grad for _, grad in made], allow_unused=True
                    )
                    values = [own if more is None else own + more for own, more in zip(values, carried)]
        found: list[Tensor] = []
        for value, layer, modulation in zip(values, self._field.layers, raw.modulations):
            for name, tensor in layer.tensors():
                found.append((value if name == "values" else modulation[name]).to(self.dtype))
        return tuple(found)

    # ---- what every entry checks

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """On the field's device; with ordinary tensors without a graph, because what is kept outlives an inference_mode."""
        with contextlib.ExitStack() as stack:
            if self.device.type == "cuda":
                stack.enter_context(torch.cuda.device(self.device))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            yield

    def _capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _hold(self, key: tuple, make: Callable[[], Any]) -> Any:
        """Memory for a call, from the last ones with the same key on the same stream. A captured call gets its own."""
        if self._capturing():
            return make()
        if self.device.type == "cuda":
            key = (*key, torch.cuda.current_stream().cuda_stream)
        if key not in self._held:
            try:
                self._held[key] = make()
            except torch.OutOfMemoryError:  # what is kept of other batch sizes may make room
                self._held.clear()
                self._held[key] = make()
            while len(self._held) > HELD:
                self._held.popitem(last=False)
        self._held.move_to_end(key)
        return self._held[key]

    def _ready_noise(self, noise: Tensor | None, x: Tensor) -> Tensor | None:
        if self.plan is None or self.plan.kind != "hutchinson":
            return None
        if noise is None:
            raise ValueError("noise is missing: a hutchinson divergence needs a probe of the state's shape")
        noise = self._ready(noise, "noise")
        if noise.shape != x.shape:
            raise ValueError(f"noise must have the state's shape {list(x.shape)}, not {list(noise.shape)}")
        return noise

    def _ready(self, x: Tensor, name: str) -> Tensor:
        """The kernels read raw memory: nothing unchecked gets past this line."""
        if x.dim() != 2 or x.shape[1] != self.dim or x.dtype != self.dtype or x.device != self.device:
            raise ValueError(
                f"{name} must be [batch, {self.dim}], {self.dtype} on {self.device}, "
                f"not {list(x.shape)}, {x.dtype} on {x.device}"
            )
        return x.detach()


def _answers(
    externals: Externals, dtype: torch.dtype, device: torch.device, times: Sequence[float]
) -> list[list[Tensor]]:
    """By time, what every function says."""
    return [[function(torch.full((), t, dtype=dtype, device=device)) for function in externals.functions] for t in times]


def _of_nothing(request: SolveRequest, x: Tensor) -> SolveResult:
    outputs = len(request.times)
    ls = None if request.l is None else x.new_empty(outputs, 0)
    empty = torch.zeros(0, 2, dtype=torch.float64)
    return SolveResult(x.new_empty(outputs, *x.shape), ls, 0, 0, 0, empty)
