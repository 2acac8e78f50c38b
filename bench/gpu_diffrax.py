"""diffrax on the GPU, timed in a process of its own: JAX takes its memory and its threads with it when it leaves.

`python bench/gpu_diffrax.py JSON` prints one line of JSON after the other, each a row.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from typing import Any, Callable, Sequence

from gpu_suite import end_with_parent, first_line

from sparseflow_kernels.analysis.jax_field import JaxField
from sparseflow_kernels.analysis.problems import FieldSpec, make_problem
from sparseflow_kernels.analysis.training_peers import diffrax_step

MARK = "ROW "
ENGINE = "diffrax"
# float32 throughout: by itself JAX multiplies float32 matrices in TF32 on a GPU, which costs evaluations and accuracy
ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}


def missing() -> str | None:
    absent = [name for name in ("jax", "diffrax") if importlib.util.find_spec(name) is None]
    return f"{', '.join(absent)} not installed" if absent else None


def in_a_process(spec: FieldSpec, batches: Sequence[int], platform: str, seconds: float) -> list[dict[str, Any]]:
    """Rows at keep 1, in the order in which they are measured; for what there is no row one that says why."""
    wanted = [
        {"field": spec.name, "keep": 1.0, "batch": batch, "engine": ENGINE, "task": task}
        for batch in batches for task in ("forward", "train")
    ]  # fmt: skip
    reason = missing()
    if reason is not None:
        return [{**row, "skipped": reason} for row in wanted]
    task = {"spec": dataclasses.asdict(spec), "batches": list(batches), "platform": platform, "seconds": seconds}
    command = [sys.executable, __file__, json.dumps(task)]
    platforms = {"JAX_PLATFORMS": "cuda,cpu" if platform == "gpu" else "cpu"}
    try:
        ran = subprocess.run(
            command, env={**os.environ, **ENVIRONMENT, **platforms}, capture_output=True, timeout=seconds,
            preexec_fn=end_with_parent,
        )  # fmt: skip
        said, complaint = ran.stdout, ran.stderr.decode(errors="replace").strip().splitlines()[-1:]
        reason = f"the process left with code {ran.returncode}: {' '.join(complaint)[:300]}"
        kind = "failed"
    except subprocess.TimeoutExpired as ended:
        said, kind, reason = ended.stdout or b"", "skipped", f"time budget: not done after {seconds:.0f} s"
    return completed(wanted, rows_in(said.decode(errors="replace")), kind, reason)


def rows_in(text: str) -> list[dict[str, Any]]:
    """The rows among what the process printed; a line cut in the middle is none."""
    rows = []
    for line in text.splitlines():
        if line.startswith(MARK):
            try:
                rows.append(json.loads(line.removeprefix(MARK)))
            except json.JSONDecodeError:
                pass
    return rows


def completed(wanted: list[dict], rows: list[dict], kind: str, reason: str) -> list[dict[str, Any]]:
    there = {(row["batch"], row["task"]) for row in rows}
    return rows + [{**row, kind: reason} for row in wanted if (row["batch"], row["task"]) not in there]


# --------------------------------------------------------------------------------------------------- in the other process


def main(argument: str) -> None:
    import jax

    task = json.loads(argument)
    jax.config.update("jax_default_matmul_precision", "highest")
    device = jax.devices(task["platform"])[0]  # says what is missing if there is none
    spec = FieldSpec(**{**task["spec"], "hidden": tuple(task["spec"]["hidden"])})
    problem = make_problem(dataclasses.replace(spec, batch=max(task["batches"])), 1.0)
    each = task["seconds"] / (8 * len(task["batches"]))
    for batch in task["batches"]:
        part = problem.on("cpu", batch)
        for name, prepare in (("forward", _forward), ("train", _training)):
            row = {"field": spec.name, "keep": 1.0, "batch": batch, "engine": ENGINE, "task": name}
            try:
                row |= _timed(prepare(part, device), min(each, 2.0))
            except Exception as error:  # memory, most likely
                row["failed"] = first_line(error)
            print(MARK + json.dumps(row), flush=True)


def _forward(problem, device) -> Callable[[], int]:
    import jax

    own, arguments = JaxField(problem), jax.device_put(JaxField.arguments(problem), device)
    run = jax.jit(own.solve)
    return lambda: own.evaluations(jax.block_until_ready(run(*arguments))[1])


def _training(problem, device) -> Callable[[], int]:
    import jax

    weights, noise, start = jax.device_put(JaxField.arguments(problem), device)
    masks = [(w != 0).astype(w.dtype) for w, *_ in weights]
    step = diffrax_step(problem)
    return lambda: JaxField.evaluations(jax.block_until_ready(step(masks, weights, noise, start))[1])


def _timed(run: Callable[[], int], seconds: float) -> dict[str, Any]:
    """Wall time around a call that waits for its result; compiled and run once before."""
    import statistics

    run()
    nfe, times = run(), []
    begin = time.perf_counter()
    while len(times) < 3 or (len(times) < 30 and time.perf_counter() - begin < seconds):
        before = time.perf_counter()
        run()
        times.append(time.perf_counter() - before)
    middle = statistics.median(times)
    return {"nfe": nfe, "samples": len(times), "median": middle, "best": min(times), "per_evaluation": middle / nfe}


if __name__ == "__main__":
    main(sys.argv[1])
