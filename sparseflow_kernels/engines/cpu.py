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
        self.dim, self.dtype = field.dim, field.dtype
        builder = getattr(_native(), _BUILDERS[field.dtype])()
        externals = write_program(builder, field, plan)
        self.program = builder.compile()
        if externals.functions:
            dtype = field.dtype
            self.program.set_refresh(lambda times: externals.answer(times, dtype))

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
            float(t), x.data_ptr(), _address(noise), x.shape[0], get_num_threads(), f.data_ptr(), divergence.data_ptr()
        )
        return f, divergence

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
        """The native code reads raw memory: nothing unchecked gets past this line."""
        if x.dim() != 2 or x.shape[1] != self.dim or x.dtype != self.dtype or x.device.type != "cpu":
            raise ValueError(
                f"{name} must be [batch, {self.dim}], {self.dtype} on the CPU, not {list(x.shape)}, {x.dtype} on {x.device}"
            )
        return x.detach().contiguous()

    def solve(self, request: SolveRequest) -> SolveResult:
        x = self._ready(request.x, "y0")
        batch, outputs = x.shape[0], len(request.times)
        l = ls = None
        if self.plan is not None:
            if request.l is None or request.l.shape != (batch,) or request.l.dtype != self.dtype:
                raise ValueError(f"the log-density channel must be [{batch}], {self.dtype}")
            l = request.l.detach().contiguous()
            ls = x.new_full((outputs, batch), torch.nan)
        noise = self._ready_noise(request.noise, x)
        xs = x.new_full((outputs, batch, self.dim), torch.nan)  # outputs a failed solve does not reach stay NaN
        rtol, atol = (*request.rtol, 0.0)[:2], (*request.atol, 0.0)[:2]
        raw = self.program.solve(
            x=x.data_ptr(), l=_address(l), noise=_address(noise), batch=batch,
            times=request.times.tolist(), sign=request.sign, tableau=_tableau(request.tableau), rtol=rtol, atol=atol,
            options=_options(request.options), grid=[] if request.grid is None else request.grid.tolist(),
            perturb=request.perturb, per_tile=request.step_control == "per_tile", threads=get_num_threads(),
            xs=xs.data_ptr(), ls=_address(ls),
        )
        return SolveResult(
            xs=xs, ls=ls, nfe=raw["nfe"], accepted=raw["accepted"], rejected=raw["rejected"],
            steps=torch.from_numpy(raw["steps"]), status=raw["status"], t=raw["t"], dt=raw["dt"], rows=tuple(raw["rows"]),
        )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


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
