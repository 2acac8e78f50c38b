"""Who can run a vector field, and the choice among them. Engines are imported when first asked for."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING

from ..field import GraphField, UnsupportedFieldError, VectorField
from .base import Engine

if TYPE_CHECKING:
    from ..divergence import DivergencePlan
    from .reference import ReferenceEngine

ENGINES = {
    "reference": ("reference", "ReferenceEngine"),
    "cpu": ("cpu", "CpuEngine"),
    "cuda": ("cuda", "CudaEngine"),
    "triton": ("triton", "TritonEngine"),
}

# Of fields that are graphs.
GRAPH_ENGINES = {
    "reference": ("graph_reference", "GraphReferenceEngine"),
    "cpu": ("graph_cpu", "GraphCpuEngine"),
    "cuda": ("graph_cuda", "GraphCudaEngine"),
    "triton": ("triton.graph_engine", "GraphTritonEngine"),
}

# By type of device, the one that is expected to be the quickest first.
NATIVE = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


def available(name: str, graph: bool = False) -> tuple[type[Engine] | None, str]:
    """(the engine's class, for chains or for graphs, "") or (None, why there is none). Raises ValueError for unknown
    names."""
    if name not in ENGINES:
        raise ValueError(f'engine: unknown name {name!r}; known are "auto", {", ".join(map(repr, ENGINES))}')
    module, class_name = (GRAPH_ENGINES if graph else ENGINES)[name]
    try:
        return getattr(import_module(f".{module}", __name__), class_name), ""
    except ImportError as error:
        return None, f"not built in this installation ({error}); sparseflow_kernels.build_info() says why"


def reference_engine(field: VectorField | GraphField, plan: DivergencePlan | None = None) -> ReferenceEngine:
    """The reference engine over a field's own tensors."""
    return _reference(isinstance(field, GraphField))(field, plan)


@lru_cache(maxsize=None)
def _reference(graph: bool) -> type[ReferenceEngine]:
    """Looked up once: every call of a field asks."""
    found, _ = available("reference", graph)
    return found


def choose(field: VectorField | GraphField, engine: str = "auto") -> tuple[type[Engine], str]:
    """The engine class that runs the field, and why, in a sentence.

    "auto" takes, of the native engines of the field's device (`NATIVE`), the first one that is built, can run the field
    and is suited to it (`Engine.unsuited`: it says so by counts); else the first that can; else the reference. Whatever
    was passed over is named with its reason.
    Raises ValueError for an unknown name, UnsupportedFieldError where an engine asked for by name cannot run the field.
    """
    graph = isinstance(field, GraphField)
    reference, _ = available("reference", graph)
    meaningless = reference.unsupported(field)  # what the reference cannot run has no meaning
    if engine != "auto":
        found, obstacle = available(engine, graph)
        if found is not None:
            obstacle = meaningless or found.unsupported(field)
        if obstacle:
            raise UnsupportedFieldError(f'engine="{engine}" cannot run this field: {obstacle}')
        return found, "asked for by name"
    if meaningless:
        raise UnsupportedFieldError(f"no engine can run this field: {meaningless}")
    kind = field.device.type
    if kind not in NATIVE:
        return reference, f"plain PyTorch, because there is no native engine for {kind} tensors"
    passed_over: list[str] = []
    willing: list[tuple[type[Engine], str]] = []
    for name in NATIVE[kind]:
        found, obstacle = available(name, graph)
        obstacle = f"the {name} engine is {obstacle}" if found is None else found.unsupported(field)
        if obstacle:
            passed_over.append(obstacle)
            continue
        unsuited = found.unsuited(field)
        if unsuited is None:
            willing = [(found, "")]
            break
        willing.append((found, unsuited))
        passed_over.append(unsuited)
    if not willing:
        return reference, f"plain PyTorch, because {'; and '.join(passed_over)}"
    found, unsuited = willing[0]
    reason = f"the native engine for {kind} tensors"
    passed_over = [other for other in passed_over if other != unsuited]
    if passed_over:
        reason += f"; {'; '.join(passed_over)}"
    return found, reason
