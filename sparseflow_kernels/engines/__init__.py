"""Who can run a vector field, and the choice among them. Engines are imported when first asked for."""

from __future__ import annotations

from importlib import import_module

from ..field import UnsupportedFieldError, VectorField
from .base import Engine

ENGINES = {"reference": ("reference", "ReferenceEngine"), "cpu": ("cpu", "CpuEngine")}


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

    "auto" takes the native engine of the field's device where it is built and can run the field, else the reference.
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
    if field.device.type != "cpu":
        return reference, f"plain PyTorch, because there is no native engine for {field.device.type} tensors yet"
    native, obstacle = available("cpu")
    obstacle = f"the cpu engine is {obstacle}" if native is None else native.unsupported(field)
    if obstacle:
        return reference, f"plain PyTorch, because {obstacle}"
    return native, f"the native engine for {field.device.type} tensors"
