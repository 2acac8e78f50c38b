"""Who can run a vector field, and the choice among them. Engines are imported when first asked for."""

from __future__ import annotations

from importlib import import_module

from ..field import UnsupportedFieldError, VectorField
from .base import Engine

ENGINES = {
    "reference": ("reference", "ReferenceEngine"),
    "cpu": ("cpu", "CpuEngine"),
    "cuda": ("cuda", "CudaEngine"),
    "triton": ("triton", "TritonEngine"),
}

# By type of device, the one that is expected to be the quickest first.
NATIVE = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


def available(name: str) -> tuple[type[Engine] | None, str]:
    """(the engine's class, "") or (None, why this installation lacks it). Raises ValueError for unknown names."""
    if name not in ENGINES:
        raise ValueError(f'engine: unknown name {name!r}; known are "auto", {", ".join(map(repr, ENGINES))}')
    module, class_name = ENGINES[name]
    try:
        return getattr(import_module(f".{module}", __name__), class_name), ""
    except ImportError as error:
        return None, f"not built in this installation ({error}); sparseflow_kernels.build_info() says why"


def choose(field: VectorField, engine: str = "auto") -> tuple[type[Engine], str]:
    """The engine class that runs the field, and why, in a sentence.

    "auto" takes, of the native engines of the field's device (`NATIVE`), the first one that is built, can run the field
    and is suited to it (`Engine.unsuited`: it says so by counts); else the first that can; else the reference. Whatever
    was passed over is named with its reason.
    Raises ValueError for an unknown name, UnsupportedFieldError where an engine asked for by name cannot run the field.
    """
    reference, _ = available("reference")
    meaningless = reference.unsupported(field)  # what the reference cannot run has no meaning
    if engine != "auto":
        found, obstacle = available(engine)
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
        found, obstacle = available(name)
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
