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
        info["best_isa"] = module.best_isa()
        info["isa"] = module.isa()
    except Exception as error:  # an unknown SPARSEFLOW_ISA is refused by the dispatcher
        info["isa"], info["reason"] = None, f"{type(error).__name__}: {error}"
    info["threads"] = get_num_threads()
    for key in ("compiler", "target", "build_type", "flags"):
        info[key] = facts.get(key, "unknown")
    return info


def _version(number: int) -> str | None:
    """CUDA's 13000 as "13.0"; None for 0, which stands for none."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else None


def _runs(archs: list[str], ptx: str, major: int, minor: int) -> bool:
    """Whether code compiled for `archs`, with PTX of `ptx`, runs on a device of this compute capability."""
    if ptx.isdigit() and int(ptx) <= 10 * major + minor:
        return True  # the driver compiles it
    for arch in archs:
        built = divmod(int(arch.rstrip("af")), 10)
        exact = arch.endswith("a")  # code with one architecture's own instructions runs on no other
        if built == (major, minor) or not exact and built[0] == major and built[1] <= minor:
            return True
    return False


def _cuda_trouble(runtime: int, driver: int, error: str, devices: list[dict[str, Any]], archs: list[str]) -> str | None:
    """Why the CUDA module can run on none of the machine's devices, and what to do; None if it can."""
    said = f" (CUDA says: {error})" if error else ""
    if not driver:
        return (
            f"no NVIDIA driver was found{said}; install one (nvidia-smi shows it when it works), or hand the GPU to "
            "this container (docker run --gpus all)"
        )
    if driver // 1000 < runtime // 1000:
        # Within one major version CUDA promises that an older driver runs what a newer toolkit compiled.
        return (
            f"the NVIDIA driver is too old: it knows CUDA {_version(driver)}, the module was built with CUDA "
            f"{_version(runtime)}; install a driver for CUDA {runtime // 1000}.0 or newer, or build the package with "
            f"CUDA {driver // 1000}'s nvcc (CUDACXX=.../nvcc)"
        )
    if not devices:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        what = "check nvidia-smi" if hidden is None else f"CUDA_VISIBLE_DEVICES is {hidden!r}: check that it names one"
        return f"the driver (CUDA {_version(driver)}) shows no device{said}; {what}"
    if not any(device["usable"] for device in devices):
        names = ", ".join(f"{device['name']} (compute capability {device['capability']})" for device in devices)
        wanted = ";".join(sorted({device["capability"].replace(".", "") for device in devices}))
        if all(int(device["capability"].partition(".")[0]) < 8 for device in devices):
            return f"the kernels need compute capability 8.0 or newer (A100 and later); found: {names}"
        return (f"the module was built for {', '.join(archs)}, which {names} cannot run; build it with "
                f"SPARSEFLOW_CUDA_ARCHS='{wanted}'")
    return None


def _usable(found: dict[str, Any], facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Name, compute capability and whether the kernels run there, of every device of a probe."""
    archs, ptx = facts.get("archs", []), facts.get("ptx", "")
    if found["driver"] < found["runtime"]:
        ptx = ""  # a driver does not know the PTX of a toolkit that is newer than itself
    return [
        {
            "name": device["name"], "capability": f"{device['major']}.{device['minor']}",
            "usable": device["major"] >= 8 and (not archs or _runs(archs, ptx, device["major"], device["minor"])),
        }
        for device in found["devices"]
    ]  # fmt: skip


def cuda_obstacle(found: dict[str, Any], index: int) -> str | None:
    """Why the CUDA module's kernels cannot run on a device, by what its `probe` found; None if they can."""
    facts = _build_facts().get("cuda", {})
    devices = _usable(found, facts)
    if devices and index >= len(devices):
        return f"there is no device {index}; the driver shows {len(devices)}"
    return _cuda_trouble(
        found["runtime"], found["driver"], found["error"], devices[index : index + 1], facts.get("archs", [])
    )


def cuda_info() -> dict[str, Any]:
    """The CUDA extension as it was built and what it finds here; the `cuda` entry of `build_info`. Never raises.

    `available` says whether a solve can run on a device of this machine; if not, `reason` says what was found and what
    to do about it.
    """
    facts = _build_facts().get("cuda", {})
    try:
        module = importlib.import_module("sparseflow_kernels._cuda")
    except ModuleNotFoundError as error:
        reason = facts.get(
            "reason", f"{error}; build the package where nvcc is found (SPARSEFLOW_CUDA=on pip install .)"
        )
        return {"built": False, "available": False, "reason": reason}
    except Exception as error:
        return {"built": True, "available": False, "reason": f"it does not load: {type(error).__name__}: {error}"}
    archs, ptx = facts.get("archs", []), facts.get("ptx", "")
    info: dict[str, Any] = {"built": True, "available": False, "archs": archs, "ptx": ptx or None}
    for key in ("nvcc", "flags"):
        info[key] = facts.get(key, "unknown")
    try:
        found = module.probe()
        info["runtime"], info["driver"] = _version(found["runtime"]), _version(found["driver"])
        info["devices"] = [
            {**usable, **{key: device[key] for key in ("multiprocessors", "shared_per_block", "memory")}}
            for usable, device in zip(_usable(found, facts), found["devices"])
        ]
        trouble = _cuda_trouble(found["runtime"], found["driver"], found["error"], info["devices"], archs)
    except Exception as error:  # a module of another version of the package, for example
        trouble = f"it does not answer: {type(error).__name__}: {error}; build the package again (pip install .)"
    if trouble is None:
        info["available"] = True
    else:
        info["reason"] = trouble
    return info


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
      forces one), best_isa (that it runs, compiled or not), forced, threads, compiler, target, build_type, flags; if
      not, reason.
    - cuda: built (bool); available (bool): whether it can run on a device here; if not, reason; if built, nvcc
      (version), archs and ptx (what was compiled for), flags, runtime and driver (CUDA versions, driver None without
      one), devices: a list of name, capability, multiprocessors, shared_per_block and memory (bytes), usable (bool).
    - triton: found (bool), version or reason.
    - torch: version, threads (intra-op), gpu (name or None).
    """
    from . import __version__

    return {
        "version": __version__,
        "python": platform.python_version(),
        "cpu": _cpu(),
        "cuda": cuda_info(),
        "triton": _triton(),
        "torch": _torch(),
    }
