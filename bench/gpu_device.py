"""The device by itself: what it is, its rates, what a barrier costs, and whether it is there at all."""

from __future__ import annotations

import gc
import hashlib
import os
import platform
import statistics
import subprocess
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_clock import in_turn, median, warm
from gpu_setting import Setting, request_to
from gpu_suite import Sections, first_line

from sparseflow_kernels.analysis.bench import processor
from sparseflow_kernels.build_info import build_info
from sparseflow_kernels.compiled_field import compile as compile_field
from sparseflow_kernels.flows import mlp_field


def device_facts(setting: Setting, _: float = 0.0) -> Sections:
    """Name, capability, versions, clocks, date, and the commit: git's, or SPARSEFLOW_COMMIT where there is no .git."""
    commit = _said(["git", "-C", str(setting.repository), "rev-parse", "HEAD"]) or os.environ.get("SPARSEFLOW_COMMIT")
    facts: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "python": platform.python_version(),
        "system": platform.platform(), "processor": processor(), "torch": torch.__version__, "runtime": torch.version.cuda,
        "commit": commit, "sources": source_trees(setting.repository),
        "changed": bool(_said(["git", "-C", str(setting.repository), "status", "--porcelain", "--untracked-files=no"])),
        "build": build_info(), "name": device_name(setting.device),
    }  # fmt: skip
    if setting.device.type == "cuda":
        found = torch.cuda.get_device_properties(setting.device)
        facts |= {
            "capability": f"{found.major}.{found.minor}", "memory": found.total_memory,
            "multiprocessors": found.multi_processor_count,
        }
    identity = f"GPU-{found.uuid}" if setting.device.type == "cuda" and hasattr(found, "uuid") else "0"
    asked = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
    said = _said(["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader", f"--id={identity}"])
    if said:
        facts |= dict(zip(asked.split(","), (part.strip() for part in said.splitlines()[0].split(","))))
    return {"device": facts}


MEASURED = ("csrc", "sparseflow_kernels")  # folders whose contents decide what is measured
_BUILT = ("*.so", "*.pyc", "__pycache__", "_build.json")


def source_trees(repository: Path) -> dict[str, str]:
    """Git's ids of what these folders hold now, as `git rev-parse COMMIT:csrc` says them; .git is not asked."""
    return {name: (_tree(repository / name) or b"").hex() for name in MEASURED}


def _tree(folder: Path) -> bytes | None:
    """None for a folder without sources, which git does not know."""
    entries = []
    for path in folder.iterdir():
        if any(path.match(pattern) for pattern in _BUILT):
            continue
        if path.is_dir():
            if (found := _tree(path)) is not None:
                entries.append((path.name + "/", b"40000", found))
        else:
            mode = b"100755" if os.access(path, os.X_OK) else b"100644"
            entries.append((path.name, mode, _object(b"blob", path.read_bytes())))
    if not entries:
        return None
    body = b"".join(mode + b" " + name.rstrip("/").encode() + b"\0" + found for name, mode, found in sorted(entries))
    return _object(b"tree", body)


def _object(kind: bytes, body: bytes) -> bytes:
    return hashlib.sha1(kind + b" %d\0" % len(body) + body).digest()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} (dry run)"


def _said(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def measure_rates(setting: Setting, seconds: float) -> Sections:
    """copy_bytes_per_s: of a device-to-device copy, bytes read and bytes written counted.  fma_per_s: float32
    multiply-adds.  launch_s: one trivial kernel from event to event.  launch_rate_s: one of many in a row."""
    clock, device = setting.clock, setting.device
    count = (1 << 18) if setting.dry else (1 << 28)  # 1 GiB of float32
    source = torch.randn(1 << 16, device=device).repeat(count >> 16)
    target = torch.empty_like(source)
    copy = partial(target.copy_, source)
    rates: dict[str, Any] = {"copy_bytes_per_s": 2 * source.nbytes / median(copy, clock, seconds / 4)}
    del source, target, copy
    one = torch.zeros(1, device=device)
    rates["launch_s"] = median(lambda: one.add_(1), clock, seconds / 8, most=100)
    rates["launch_rate_s"] = median(lambda: [one.add_(1) for _ in range(100)], clock, seconds / 8) / 100
    rates |= _fma_rate(setting, seconds / 4)
    setting.know(rates)
    return {"rates": rates}


def _fma_rate(setting: Setting, seconds: float) -> dict[str, Any]:
    """By the Triton kernel of gpu_fma; by a float32 matrix product, which no library runs at the full rate, where there
    is no Triton."""
    if setting.device.type == "cuda":
        try:
            import gpu_fma

            out = gpu_fma.output(torch.cuda.get_device_properties(setting.device).multi_processor_count, setting.device)
            loops = 2048
            count = gpu_fma.launch(out, loops)
            taken = median(lambda: gpu_fma.launch(out, loops), setting.clock, seconds)
            return {"fma_per_s": count / taken, "fma_by": f"a loop over registers (Triton), {count:.3g} multiply-adds"}
        except ImportError:
            pass
    n = 128 if setting.dry else 8192
    a, b = torch.randn(2, n, n, device=setting.device)
    taken = median(lambda: a @ b, setting.clock, seconds, most=10)
    return {"fma_per_s": n**3 / taken, "fma_by": f"a float32 matrix product of {n} x {n}, {n**3:.3g} multiply-adds"}


# ----------------------------------------------------------------------------------------------------------- the barrier


def measure_barrier(setting: Setting, seconds: float, steps: int = 1000) -> Sections:
    """Microseconds that a step of a common size costs beyond one of a tile's own: solves of a field with one hidden
    neuron, as many samples as fill the device, small steps of one size (each is accepted). Shared steps meet once a step.

    For every launch shape whose tiles all run at once; where the engine has no shapes to choose from, as it is.
    """
    engine_name, device = setting.engines[0], setting.device
    steps = 20 if setting.dry else steps
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    batch = 64 if properties is None else 32 * properties.multi_processor_count
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = mlp_field(2, (1,), layer="ignore", activation="tanh")
        x = torch.randn(batch, 2)
    captured = compile_field(module, "reference").vector_field
    compiled = compile_field(captured.map_tensors(lambda tensor: tensor.detach().to(device)), engine_name)
    engine, x = compiled.packed(None), x.to(device)
    requests = {
        control: request_to(compiled, x, None, None, {"first_step": 1.0 / steps, "max_step": 1.0 / steps}, 1.0, control)
        for control in ("shared", "per_tile")
    }  # fmt: skip
    shapes: list[tuple | None] = [None]
    if hasattr(engine, "candidates"):
        per_tile = {plan.shape: plan for plan in engine.candidates(batch, 7, "forward", "per_tile")}
        shapes = [plan for plan in engine.candidates(batch, 7, "forward", "shared") if plan.shape in per_tile]
    found = []
    for plan in shapes:
        blocks = None
        if plan is not None:
            engine.use(plan, batch, 7, "forward", "shared")
            engine.use(per_tile[plan.shape], batch, 7, "forward", "per_tile")
            blocks = engine.plan_for(batch, 7, "forward", "shared")[1]
            if blocks < plan.tiles or engine.plan_for(batch, 7, "forward", "per_tile")[1] < plan.tiles:
                continue  # several tiles to a block: states would come and go as well
        runs = {control: partial(engine.solve, request) for control, request in requests.items()}
        taken = {}
        for control, run in runs.items():
            result, taken[control] = warm(run, setting.clock, seconds / len(shapes))
            if control == "shared":
                accepted = result.accepted
        rounds = in_turn(runs, taken, setting.clock, seconds / len(shapes), most=10)
        times = {control: statistics.median(t for turn in turns for t in turn) for control, turns in rounds.items()}
        found.append({
            "engine": engine_name, "shape": None if plan is None else list(plan.shape), "blocks": blocks, "batch": batch,
            "steps": accepted, **times, "microseconds": (times["shared"] - times["per_tile"]) / accepted * 1e6,
        })  # fmt: skip
    if not found:
        raise RuntimeError(f"no launch shape of engine {engine_name!r} runs {batch} samples at once")
    return {"barrier": found}


def lost(device: torch.device) -> str | None:
    """Why this process can launch nothing any more; None if it can."""
    gc.collect()
    if device.type != "cuda":
        return None
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        if torch.ones(1, device=device).add_(1).item() == 2.0:
            return None
        return "the device computes 1 + 1 wrongly"
    except Exception as error:
        return first_line(error)


def no_gpu() -> str | None:
    """Why nothing can be measured here; None if it can."""
    if torch.cuda.is_available():
        return None
    cuda = build_info()["cuda"]
    return (
        f"no GPU to measure: torch.cuda.is_available() is False (PyTorch {torch.__version__}, built for CUDA "
        f"{torch.version.cuda or 'none: this is a CPU build'}); the CUDA extension: {cuda.get('reason', 'available')}. "
        "`--dry-run` tries the suite on the CPU, without figures worth keeping"
    )
