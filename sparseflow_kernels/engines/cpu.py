"""The CPU engine: `csrc/cpu` behind the engine protocol."""

from __future__ import annotations

import torch
from torch import Tensor

from ..divergence import DivergencePlan
from ..field import VectorField
from ..numerics.step_control import StepOptions
from ..numerics.tableaus import FixedTableau, Tableau
from ..threads import get_num_threads
from .base import Engine, SolveRequest, SolveResult
from .program import write_program

_BUILDERS = {torch.float32: "BuilderF32", torch.float64: "BuilderF64"}


def _native():
    from .. import _cpu  # late: a checkout without the extension can still import the package

    return _cpu


class CpuEngine(Engine):
    """Sparse kernels in C++ over batch-minor tiles; a whole solve is one call. float32 and float64."""

    name = "cpu"

    @staticmethod
    def unsupported(field: VectorField) -> str | None:
        try:
            _native()
        except ImportError as error:
            return f"the CPU extension is not built ({error}); install the package with pip, which compiles it"
        if field.device.type != "cpu":
            return f"the field is on {field.device}, the cpu engine needs it on the CPU: call .to('cpu')"
        if field.dtype not in _BUILDERS:
            return f"the cpu engine computes in float32 and float64, not {field.dtype}: call .float() or .double()"
        return None

    def __init__(self, field: VectorField, plan: DivergencePlan | None = None) -> None:
        reason = self.unsupported(field)
        if reason is not None:
            raise ValueError(f"engine 'cpu': {reason}")
        self.plan = plan
        self.dim, self.dtype, self.divergence = field.dim, field.dtype, plan is not None
        builder = getattr(_native(), _BUILDERS[field.dtype])()
        externals = write_program(builder, field, plan)
        self.program = builder.compile()
        if externals.functions:
            dtype = field.dtype
            self.program.set_refresh(lambda times: externals.answer(times, dtype))

    def evaluate(self, t: Tensor | float, y: Tensor) -> Tensor:
        if self.divergence:
            return self._evaluate(t, y, None)[0]
        return self._evaluate(t, y, None, trace=False)[0]

    def evaluate_with_divergence(self, t: Tensor | float, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._evaluate(t, x, noise)

    def _evaluate(self, t, x: Tensor, noise: Tensor | None, trace: bool = True) -> tuple[Tensor, Tensor | None]:
        x = self._ready(x, "y")
        noise = None if noise is None else self._ready(noise, "noise")
        f = torch.empty_like(x)
        divergence = x.new_empty(x.shape[0]) if trace else None
        self.program.evaluate(
            float(t), x.data_ptr(), 0 if noise is None else noise.data_ptr(), x.shape[0], get_num_threads(), f.data_ptr(),
            0 if divergence is None else divergence.data_ptr(),
        )
        return f, divergence

    def _ready(self, x: Tensor, name: str) -> Tensor:
        """The native code reads raw memory: nothing unchecked gets past this line."""
        if x.dim() != 2 or x.shape[1] != self.dim or x.dtype != self.dtype or x.device.type != "cpu":
            raise ValueError(
                f"{name} must be [batch, {self.dim}], {self.dtype} on the CPU, not {list(x.shape)}, {x.dtype} on {x.device}"
            )
        return x.detach().contiguous()

    def solve(self, request: SolveRequest) -> SolveResult:
        x = self._ready(request.x, "y0")
        batch, outputs = x.shape[0], len(request.times)
        l = None
        if self.divergence:
            if request.l is None or request.l.shape != (batch,) or request.l.dtype != self.dtype:
                raise ValueError(f"the log-density channel must be [{batch}], {self.dtype}")
            l = request.l.detach().contiguous()
        noise = None if request.noise is None else self._ready(request.noise, "noise")
        if noise is not None and noise.shape != x.shape:
            raise ValueError(f"noise must have the state's shape {list(x.shape)}, not {list(noise.shape)}")
        xs = x.new_empty(outputs, batch, self.dim)
        ls = x.new_empty(outputs, batch) if l is not None else None
        rtol, atol = (*request.rtol, 0.0)[:2], (*request.atol, 0.0)[:2]
        raw = self.program.solve(
            x=x.data_ptr(), l=0 if l is None else l.data_ptr(), noise=0 if noise is None else noise.data_ptr(), batch=batch,
            times=request.times.tolist(), sign=request.sign, tableau=_tableau(request.tableau), rtol=rtol, atol=atol,
            options=_options(request.options), grid=[] if request.grid is None else request.grid.tolist(),
            perturb=request.perturb, per_tile=request.step_control == "per_tile", threads=get_num_threads(),
            xs=xs.data_ptr(), ls=0 if ls is None else ls.data_ptr(),
        )
        return SolveResult(
            xs=xs, ls=ls, nfe=raw["nfe"], accepted=raw["accepted"], rejected=raw["rejected"],
            steps=torch.from_numpy(raw["steps"]), status=raw["status"], t=raw["t"], dt=raw["dt"], rows=tuple(raw["rows"]),
        )


def _tableau(tableau: Tableau | FixedTableau) -> dict:
    if isinstance(tableau, Tableau):
        return dict(adaptive=True, order=tableau.order, c=tableau.c, a=tableau.a, b=tableau.b,
                    b_error=tableau.b_error, b_mid=tableau.b_mid)
    # a fixed tableau lists its first stage, at node 0, like the others; native code takes that stage for granted
    return dict(adaptive=False, order=tableau.order, c=tableau.c[1:], a=tableau.a[1:], b=tableau.b, b_error=(), b_mid=())


def _options(options: StepOptions) -> dict:
    return dict(
        min_step=options.min_step, max_step=options.max_step, first_step=options.first_step, safety=options.safety,
        ifactor=options.ifactor, dfactor=options.dfactor, max_num_steps=options.max_num_steps,
        step_t=sorted(options.step_t or ()), jump_t=sorted(options.jump_t or ()),
    )
