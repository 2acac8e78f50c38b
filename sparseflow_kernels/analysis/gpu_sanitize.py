"""compute-sanitizer over a small case: the toy field at keep 0.1, a batch that is no multiple of a tile, a solve and its
gradient. `python -m sparseflow_kernels.analysis.gpu_sanitize ENGINE` is the case."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

TOOLS = ("memcheck", "racecheck")
FOUND = 77  # exit code for errors found
BATCH = 33
SUMMARY = re.compile(r"=+\s*((?:ERROR|RACECHECK) SUMMARY:.*)")


def find_tool() -> str | None:
    """compute-sanitizer, on the PATH or where a CUDA toolkit has it."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    places = [Path(home) / folder for home in homes if home for folder in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(map(str, places)))


def check(tool: str, engine: str, dry: bool, seconds: float, program: str | None = None) -> dict[str, Any]:
    """{"sanitizer": [entry]}: tool, engine, summary (its own words), clean. dry: the case is run without the tool."""
    entry: dict[str, Any] = {"tool": tool, "engine": engine}
    program = program or find_tool()
    case = [sys.executable, "-P", "-m", __name__, engine]
    if not dry:
        if program is None:
            return {"sanitizer": [{**entry, "skipped": "compute-sanitizer was not found (it comes with the CUDA toolkit)"}]}
        case = [program, "--tool", tool, "--error-exitcode", str(FOUND), *case]
    # every tensor in an allocation of its own, so that what lies beyond its end is nobody's
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        ran = subprocess.run(case, env=environment, capture_output=True, text=True, errors="replace", timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"sanitizer": [{**entry, "skipped": f"time budget: not done after {seconds:.0f} s"}]}
    entry |= read(ran.returncode, ran.stdout + ran.stderr, dry)
    return {"sanitizer": [entry]}


def read(code: int, text: str, dry: bool = False) -> dict[str, Any]:
    """What the tool said. Without a summary it did not get to work, on a device that it does not support, for example."""
    summaries = SUMMARY.findall(text)
    last = " ".join(text.strip().splitlines()[-1:])[:300]
    if not summaries and not dry:
        return {"clean": None, "skipped": f"the tool gave no summary, exit code {code}: {last}"}
    summary = summaries[-1] if summaries else "dry run"
    if code == 0:
        return {"clean": True, "summary": summary}
    failed = f"{summary if code == FOUND else last} (exit code {code})"
    return {"clean": False, "summary": summary, "failed": failed, "report": text[-4000:]}


def main(engine: str) -> None:
    import dataclasses

    import torch

    from ..compiled_field import compile as compile_field
    from . import gpu_measure, peers
    from .problems import FIELDS, make_problem

    device = torch.device("cpu" if engine in ("cpu", "reference") else "cuda")
    problem = make_problem(dataclasses.replace(FIELDS["toy"], batch=BATCH), 0.1)
    field = compile_field(problem.module, "reference").vector_field
    compiled = compile_field(field.map_tensors(lambda tensor: tensor.detach().to(device)), engine)
    there = problem.on(device)
    there = dataclasses.replace(there, rtol=1e-3, atol=1e-3)
    peers.run_of(compiled, there)()
    gpu_measure.training_run(compiled, there)()
    if device.type == "cuda":
        torch.cuda.synchronize()
    finite = all(bool(torch.isfinite(p.grad).all()) for p in compiled.parameters() if p.grad is not None)
    print(f"{engine}: {'finite' if finite else 'NOT FINITE'}")
    if not finite:
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
