"""compute-sanitizer over a small case: the toy field at keep 0.1, a batch that is no multiple of a tile, a solve and its
gradient. `python bench/gpu_sanitized_case.py ENGINE` is the case."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from gpu_suite import end_with_parent

TOOLS = ("memcheck", "racecheck", "synccheck")
CASE = Path(__file__).with_name("gpu_sanitized_case.py")
FOUND = 77  # exit code for errors found
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
    case = [sys.executable, str(CASE), engine]
    if not dry:
        if program is None:
            return {"sanitizer": [{**entry, "skipped": "compute-sanitizer was not found (it comes with the CUDA toolkit)"}]}
        case = [program, "--tool", tool, "--error-exitcode", str(FOUND), *case]
    # every tensor in an allocation of its own, so that what lies beyond its end is nobody's
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        ran = subprocess.run(
            case, env=environment, capture_output=True, text=True, errors="replace", timeout=seconds,
            preexec_fn=end_with_parent,
        )  # fmt: skip
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
