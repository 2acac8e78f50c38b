"""What is measured, where and how much of it, and the problems and compiled fields that the items share."""

from __future__ import annotations

import dataclasses
import gc
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterable, Sequence

import torch
from gpu_clock import Clock, CudaClock, HostClock
from torch import Tensor

from sparseflow_kernels.analysis import peers
from sparseflow_kernels.analysis.graph_problems import GRAPHS, GraphSpec
from sparseflow_kernels.analysis.peers import Outcome
from sparseflow_kernels.analysis.problems import FIELDS, FieldSpec, Problem, make_problem
from sparseflow_kernels.compiled_field import CompiledField
from sparseflow_kernels.compiled_field import compile as compile_field
from sparseflow_kernels.engines.base import SolveRequest
from sparseflow_kernels.field import VectorField
from sparseflow_kernels.solving.arguments import request_of

FIELD_NAMES = ("toy", "power", "hepmass", "miniboone", "bsds300")
GRAPH_NAMES = ("resnet", "gru", "cfm")  # sums of rows and a tangent, products, a context and features of time
KEEPS = (0.1, 1.0, 0.02, 0.5, 0.2)  # the most wanted first
BATCHES = (1000, 10000)
ENGINES = ("cuda", "triton")
REFERENCE_ROWS = 32


@dataclass
class Setting:
    """Where and how much is measured."""

    device: torch.device
    clock: Clock
    fields: Sequence[FieldSpec]
    graphs: Sequence[GraphSpec] = ()
    keeps: Sequence[float] = KEEPS
    batches: Sequence[int] = BATCHES
    engines: Sequence[str] = ENGINES
    peers: bool = True
    sanitize: bool = False  # keep time for it
    dry: bool = False
    repository: Path = field(default_factory=Path.cwd)
    rates: dict[str, float] = field(default_factory=dict)  # the result file's, for floors

    def know(self, rates: dict[str, Any]) -> None:
        self.rates.update({name: value for name, value in rates.items() if isinstance(value, float)})

    @staticmethod
    def of_gpu(quick: bool, sanitize: bool, repository: Path) -> "Setting":
        device = torch.device("cuda", torch.cuda.current_device())
        if quick:
            few = specs(FIELD_NAMES[:2]), graph_specs(GRAPH_NAMES[:1])
            return Setting(device, CudaClock(), *few, (0.1, 1.0), BATCHES[:1], peers=False, sanitize=sanitize,
                           repository=repository)  # fmt: skip
        return Setting(device, CudaClock(), specs(FIELD_NAMES), graph_specs(GRAPH_NAMES), sanitize=sanitize,
                       repository=repository)  # fmt: skip

    @staticmethod
    def of_dry_run(repository: Path) -> "Setting":
        tiny = [dataclasses.replace(spec, hidden=(6,) * len(spec.hidden)) for spec in specs(("toy", "power"))]
        sizes = {"resnet": {"dim": 6, "width": 8, "blocks": 1}, "gru": {"dim": 6}, "cfm": {"width": 8, "context": 3}}
        graphs = [
            dataclasses.replace(GRAPHS[name], sizes=tuple(own.items()), shape=(16, own.get("dim", 2)))
            for name, own in sizes.items()
        ]  # fmt: skip
        return Setting(torch.device("cpu"), HostClock(), tiny, graphs, (0.5, 1.0), (16, 33), ("cpu", "reference"),
                       dry=True, repository=repository)  # fmt: skip


def specs(names: Iterable[str]) -> list[FieldSpec]:
    return [FIELDS[name] for name in names]


def graph_specs(names: Iterable[str]) -> list[GraphSpec]:
    """In the batch that the flows have too."""
    return [dataclasses.replace(GRAPHS[name], shape=(BATCHES[0], *GRAPHS[name].shape[1:])) for name in names]


class Workshop:
    """Problems and compiled fields of one (field, keep), made once for the items in a row that need them."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._key: tuple[str, float] | None = None
        self._made: dict[Any, Any] = {}

    def _at(self, spec: FieldSpec, keep: float) -> dict[Any, Any]:
        if self._key != (spec.name, keep):
            self._key, self._made = None, {}
            gc.collect()
            if self.setting.device.type == "cuda":
                torch.cuda.empty_cache()
            largest = dataclasses.replace(spec, batch=max(self.setting.batches))
            problem = make_problem(largest, keep)
            # captured on the CPU: the many small operations of that would each be a launch
            captured = compile_field(problem.module, "reference").vector_field.map_tensors(Tensor.detach)
            self._made = {"problem": problem, "field": captured}
            self._key = spec.name, keep
        return self._made

    def problem(self, spec: FieldSpec, keep: float, batch: int) -> Problem:
        """On the device; a smaller batch is the beginning of a larger one."""
        made = self._at(spec, keep)
        if ("problem", batch) not in made:
            made["problem", batch] = made["problem"].on(self.setting.device, batch)
        return made["problem", batch]

    def field(self, spec: FieldSpec, keep: float) -> VectorField:
        """Simplified, on the CPU."""
        return self._at(spec, keep)["field"]

    def compiled(self, spec: FieldSpec, keep: float, engine: str, anew: bool = False) -> CompiledField:
        """anew: with nothing that was tuned before."""
        made, key = self._at(spec, keep), ("compiled", engine)
        if anew or key not in made:
            device = self.setting.device
            made[key] = compile_field(made["field"].map_tensors(lambda tensor: tensor.detach().to(device)), engine)
        return made[key]

    def reference(self, spec: FieldSpec, keep: float) -> Outcome:
        """The first rows by torchdiffeq's dopri8 on dense float64 weights at tolerance 1e-10."""
        made = self._at(spec, keep)
        if "reference" not in made:
            rows = min(REFERENCE_ROWS, *self.setting.batches)
            made["reference"] = peers.float64_reference(made["problem"].on(self.setting.device, rows), rows)
        return made["reference"]


def request_to(
    compiled: CompiledField, x: Tensor, l: Tensor | None, noise: Tensor | None, options: dict, end: float,  # noqa: E741
    control: str = "shared", tolerance: float = 1e-5,
) -> SolveRequest:  # fmt: skip
    t = torch.tensor([0.0, end], dtype=x.dtype)
    tolerances = (tolerance,) * (1 if l is None else 2)
    return request_of(x, l, noise, t, t.double(), 1, tolerances, tolerances, "dopri5", options, control)
