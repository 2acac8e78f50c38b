"""What was built, what was found, and why something is missing."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
from pathlib import Path
from typing import Any

from .threads import get_num_threads


def _build_facts() -> dict[str, Any]:
    """The JSON file that setup.py wrote beside the extension module; empty without one."""
    try:
        return json.loads(Path(__file__).with_name("_build.json").read_text())
    except (OSError, ValueError):
        return {}


def _cpu() -> dict[str, Any]:
    facts = _build_facts()
    try:
        module = importlib.import_module("sparseflow_kernels._cpu")
    except Exception as error:  # whatever the loader says is the reason the user needs to see
        return {"built": False, "reason": f"{type(error).__name__}: {error}; build it with `pip install .`"}
    info: dict[str, Any] = {"built": True, "isas": facts.get("isas", []), "forced": os.environ.get("SPARSEFLOW_ISA")}
    try:
        info["isa"] = module.isa()
    except Exception as error:  # an unknown SPARSEFLOW_ISA is refused by the dispatcher
        info["isa"], info["reason"] = None, f"{type(error).__name__}: {error}"
    info["threads"] = get_num_threads()
    for key in ("compiler", "target", "build_type", "flags"):
        info[key] = facts.get(key, "unknown")
    return info


def _cuda() -> dict[str, Any]:
    try:
        importlib.import_module("sparseflow_kernels._cuda")
    except ModuleNotFoundError:
        return {"built": False, "reason": "this version has no CUDA extension; on a GPU a compiled field runs on the reference engine"}
    except Exception as error:
        return {"built": False, "reason": f"{type(error).__name__}: {error}"}
    return {"built": True}


def _triton() -> dict[str, Any]:
    try:
        return {"found": True, "version": importlib.metadata.version("triton")}
    except importlib.metadata.PackageNotFoundError:
        return {"found": False, "reason": "triton is not installed (pip install 'sparseflow_kernels[gpu]')"}


def _torch() -> dict[str, Any]:
    try:
        import torch

        return {
            "version": torch.__version__,
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        }
    except Exception as error:
        return {"version": None, "reason": f"{type(error).__name__}: {error}"}


def build_info() -> dict[str, Any]:
    """Facts about this installation, for bug reports and for the curious. Never raises.

    Returns a dict that `json.dumps` accepts:

    - version: the package's version; python: the interpreter's.
    - cpu: built (bool); if so isas (compiled), isa (chosen for this processor; the environment variable SPARSEFLOW_ISA
      forces one), forced, threads, compiler, target, build_type, flags; if not, reason.
    - cuda: built (bool), reason.  triton: found (bool), version or reason.
    - torch: version, threads (intra-op), gpu (name or None).
    """
    from . import __version__

    return {
        "version": __version__,
        "python": platform.python_version(),
        "cpu": _cpu(),
        "cuda": _cuda(),
        "triton": _triton(),
        "torch": _torch(),
    }
