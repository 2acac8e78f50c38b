"""What bench/gpu.py measures, one function per kind of item. The same functions run on the CPU, in small (`Setting.dry`),
so that a machine with a GPU is not where they run for the first time."""

from __future__ import annotations

import dataclasses
import gc
import platform
import statistics
import subprocess
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterable, Sequence

import torch
from torch import Tensor

import gpu_diffrax
import gpu_sanitize
from gpu_suite import Item, Sections, first_line

from sparseflow_kernels.analysis import peers, training_peers
from sparseflow_kernels.analysis.bench import processor
from sparseflow_kernels.analysis.floor import Work
from sparseflow_kernels.analysis.peers import Outcome
from sparseflow_kernels.analysis.problems import FIELDS, FieldSpec, Problem, make_problem
from sparseflow_kernels.analysis.training_peers import StepOutcome, small_steps
from sparseflow_kernels.build_info import build_info
from sparseflow_kernels.compiled_field import CompiledField
from sparseflow_kernels.compiled_field import compile as compile_field
from sparseflow_kernels.engines.base import Engine, SolveRequest
from sparseflow_kernels.field import VectorField
from sparseflow_kernels.flows import ContinuousFlow, mlp_field
from sparseflow_kernels.solving.arguments import request_of

FIELD_NAMES = ("toy", "power", "hepmass", "miniboone", "bsds300")
KEEPS = (0.1, 1.0, 0.02, 0.5, 0.2)  # the most wanted first
BATCHES = (1000, 10000)
ENGINES = ("cuda", "triton")
BASELINE = "torchdiffeq"
WARM_RUNS = 3  # kernels are compiled in the first, a CUDA graph is captured in the second, the third is like all others
REFERENCE_ROWS = 32
GRADIENT_WEIGHTS = 1_000_000  # the float64 reference of a gradient keeps dense weights for every evaluation
SPARSE_SHARE = 0.25  # of the multiply-add rate: every product of a sparse row needs 4 bytes of shared memory anew, which
#                      delivers 128 bytes a cycle to 128 multiply-adds


# ------------------------------------------------------------------------------------------------------------- clocks


class CudaClock:
    """Seconds between two CUDA events around a call, on the current stream; the device is idle before."""

    def __call__(self, run: Callable[[], Any]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3


class HostClock:
    def __call__(self, run: Callable[[], Any]) -> float:
        before = time.perf_counter()
        run()
        return time.perf_counter() - before


Clock = Callable[[Callable[[], Any]], float]
Rounds = dict[str, list[list[float]]]  # contender -> round -> seconds of its runs in that round


def warm(run: Callable[[], Any], clock: Clock, seconds: float) -> tuple[Any, float]:
    """(what the first run gave, seconds of the last): WARM_RUNS runs, or two when those take more than `seconds`."""
    box: list[Any] = []
    spent = 0.0
    for done in range(1, WARM_RUNS + 1):
        last = clock(lambda: box.append(run()))
        spent += last
        if done >= 2 and spent > seconds:
            break
    return box[0], last


def in_turn(
    runs: dict[str, Callable[[], Any]], firsts: dict[str, float], clock: Clock, seconds: float, least: int = 3, most: int = 30
) -> Rounds:
    """Times of warmed-up runs, A A B A A B: each contender's turn is as many runs as fit into the slowest one's, 10 at most.
    `least` to `most` rounds, until `seconds` are spent. firsts: about how long a run takes."""
    slowest = max(firsts.values())
    repeats = {name: max(1, min(10, int(slowest / max(firsts[name], 1e-7)))) for name in runs}
    rounds: Rounds = {name: [] for name in runs}
    spent = 0.0
    for done in range(most):
        if done >= least and spent > seconds:
            break
        for name, run in runs.items():
            rounds[name].append([clock(run) for _ in range(repeats[name])])
            spent += sum(rounds[name][-1])
    return rounds


def figures(rounds: Rounds, name: str, nfe: int) -> dict[str, Any]:
    """Of one contender: samples, median, best, per_evaluation, and ratio: the baseline's time over its own, the median of
    the rounds' ratios (None without a baseline)."""
    own = rounds[name]
    times = [t for turn in own for t in turn]
    base = rounds.get(BASELINE)
    middle = statistics.median(times)
    return {
        "nfe": nfe, "samples": len(times), "median": middle, "best": min(times), "per_evaluation": middle / nfe,
        "ratio": None if base is None else statistics.median(
            statistics.median(b) / statistics.median(a) for a, b in zip(own, base)
        ),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ settings


@dataclass
class Setting:
    """Where and how much is measured."""

    device: torch.device
    clock: Clock
    fields: Sequence[FieldSpec]
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
            return Setting(device, CudaClock(), specs(FIELD_NAMES[:2]), (0.1, 1.0), BATCHES[:1], peers=False,
                           sanitize=sanitize, repository=repository)  # fmt: skip
        return Setting(device, CudaClock(), specs(FIELD_NAMES), sanitize=sanitize, repository=repository)

    @staticmethod
    def of_dry_run(repository: Path) -> "Setting":
        tiny = [dataclasses.replace(spec, hidden=(6,) * len(spec.hidden)) for spec in specs(("toy", "power"))]
        return Setting(torch.device("cpu"), HostClock(), tiny, (0.5, 1.0), (16, 33), ("cpu", "reference"), dry=True,
                       repository=repository)  # fmt: skip


def specs(names: Iterable[str]) -> list[FieldSpec]:
    return [FIELDS[name] for name in names]


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


# ------------------------------------------------------------------------------------------------- device and its rates


def device_facts(setting: Setting, _: float = 0.0) -> Sections:
    """Name, capability, versions, clocks, commit, date."""
    facts: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "python": platform.python_version(),
        "system": platform.platform(), "processor": processor(), "torch": torch.__version__, "runtime": torch.version.cuda,
        "commit": _said(["git", "-C", str(setting.repository), "rev-parse", "HEAD"]),
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
    rates: dict[str, Any] = {"copy_bytes_per_s": 2 * source.nbytes / _median(copy, clock, seconds / 4)}
    del source, target, copy
    one = torch.zeros(1, device=device)
    rates["launch_s"] = _median(lambda: one.add_(1), clock, seconds / 8, most=100)
    rates["launch_rate_s"] = _median(lambda: [one.add_(1) for _ in range(100)], clock, seconds / 8) / 100
    rates |= _fma_rate(setting, seconds / 4)
    setting.know(rates)
    return {"rates": rates}


def _median(run: Callable[[], Any], clock: Clock, seconds: float, most: int = 30) -> float:
    _, last = warm(run, clock, seconds)
    return statistics.median(t for turn in in_turn({"it": run}, {"it": last}, clock, seconds, most=most)["it"] for t in turn)


def _fma_rate(setting: Setting, seconds: float) -> dict[str, Any]:
    """By the Triton kernel of gpu_fma; by a float32 matrix product, which no library runs at the full rate, where there
    is no Triton."""
    if setting.device.type == "cuda":
        try:
            import gpu_fma

            out = gpu_fma.output(torch.cuda.get_device_properties(setting.device).multi_processor_count, setting.device)
            loops = 2048
            count = gpu_fma.launch(out, loops)
            taken = _median(lambda: gpu_fma.launch(out, loops), setting.clock, seconds)
            return {"fma_per_s": count / taken, "fma_by": f"a loop over registers (Triton), {count:.3g} multiply-adds"}
        except ImportError:
            pass
    n = 128 if setting.dry else 8192
    a, b = torch.randn(2, n, n, device=setting.device)
    taken = _median(lambda: a @ b, setting.clock, seconds, most=10)
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
        control: _request(compiled, x, None, None, {"first_step": 1.0 / steps, "max_step": 1.0 / steps}, 1.0, control)
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


def _request(
    compiled: CompiledField, x: Tensor, l: Tensor | None, noise: Tensor | None, options: dict, end: float,  # noqa: E741
    control: str = "shared", tolerance: float = 1e-5,
) -> SolveRequest:  # fmt: skip
    t = torch.tensor([0.0, end], dtype=x.dtype)
    tolerances = (tolerance,) * (1 if l is None else 2)
    return request_of(x, l, noise, t, t.double(), 1, tolerances, tolerances, "dopri5", options, control)


# ---------------------------------------------------------------------------------------------------------------- solves


def training_run(compiled: CompiledField, problem: Problem) -> Callable[[], StepOutcome]:
    """As `training_peers.sparseflow_step`, on a field that is compiled (and tuned) already."""
    flow = ContinuousFlow(
        compiled, problem.spec.dim, divergence=problem.spec.divergence, rtol=problem.rtol, atol=problem.atol
    )
    if problem.noise is not None:
        flow.noise = problem.noise
    parameters = list(compiled.parameters())

    def gradient() -> Tensor:
        return torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None])

    return training_peers.step_of(flow, problem, small_steps(parameters), gradient)


def forward_error(outcome: Outcome, reference: Outcome) -> float:
    rows = reference.x.shape[0]
    differences = (outcome.x[:rows].double() - reference.x).abs().max(), (outcome.l[:rows].double() - reference.l).abs().max()
    return float(torch.stack(differences).max())  # a NaN stays one


def gradient_error(setting: Setting, shop: Workshop, spec: FieldSpec, keep: float, engine: str) -> float | None:
    """|gradient - reference| / |reference| over all parameters, of a few rows: against the reference engine's in float64
    at tolerance 1e-8. None where that would take too much memory."""
    vector_field = shop.field(spec, keep)
    if sum(layer.in_features * layer.out_features for layer in vector_field.layers) > GRADIENT_WEIGHTS:
        return None
    problem = shop.problem(spec, keep, min(setting.batches))
    rows = min(REFERENCE_ROWS, problem.x.shape[0])
    few = problem.on(setting.device, rows)
    noise = None if few.noise is None else few.noise.double()
    exact = dataclasses.replace(few, x=few.x.double(), noise=noise, rtol=1e-8, atol=1e-8)
    exactly = compile_field(vector_field.map_tensors(lambda t: t.detach().to(setting.device, torch.float64)), "reference")
    reference = training_run(exactly, exact)().gradient()
    return training_peers.relative_error(training_run(shop.compiled(spec, keep, engine), few)().gradient(), reference)


def floor_of(
    setting: Setting, compiled: CompiledField, problem: Problem, evaluations: int, steps: int | None = None
) -> float | None:
    """Seconds of a solve's arithmetic at the measured multiply-add rate, a sparse field's at SPARSE_SHARE of it, and one
    launch; with `steps` those of a training step, in two launches (as `floor.training_step_floor` counts). None where the
    rates were not measured or the work is not known."""
    rate, launch = setting.rates.get("fma_per_s"), setting.rates.get("launch_s")
    if rate is None or launch is None:
        return None
    plan = compiled.divergence_plan(problem.spec.divergence)
    count = Work.of(compiled.vector_field, plan).multiply_adds * evaluations
    if steps is not None:
        back = Work.of_gradient(compiled.vector_field, plan)
        if back is None:
            return None
        count, launch = count + back.multiply_adds * (6 * steps + 1), 2 * launch
    return launch + count * problem.x.shape[0] / (rate * (1.0 if problem.keep == 1.0 else SPARSE_SHARE))


def tune(engine: Engine, request: SolveRequest, clock: Clock, seconds: float) -> tuple[list[dict[str, Any]], str]:
    """The engine's own tuning: ([shape and seconds, the quickest first], a remark). A solve that is too long for it to be
    tried in every shape is shortened, in time, first; the table then is of the shortened one."""
    if not hasattr(engine, "tune"):
        return [], f"engine {engine.name!r} has no launch shapes to choose from"
    shapes = len(engine.candidates(request.x.shape[0], len(request.tableau.b), "forward", request.step_control))
    _, one = warm(partial(engine.solve, request), clock, seconds / 8)
    once = 2 * 3 * shapes * one  # warmed up, timed; and the favourite, timed just now, is quicker than the others
    repeats, fraction, remark = 3 if 2 * once < seconds else 1, min(1.0, seconds / once), ""
    if fraction < 0.05:  # a short solve still has a step or two
        return [], f"a solve takes {one:.2g} s: too long to try {shapes} shapes in {seconds:.2g} s"
    if fraction < 1.0:
        begin, end = request.times.tolist()
        times = torch.tensor([begin, begin + fraction * (end - begin)], dtype=torch.float64)
        request, remark = dataclasses.replace(request, times=times), f"of the first {fraction:.0%} of the solve"
    table = engine.tune(request, repeats=repeats)
    return [{"shape": list(shape), "seconds": taken} for shape, taken in table], remark


def measure_solve(
    setting: Setting, shop: Workshop, spec: FieldSpec, keep: float, batch: int, engine: str, seconds: float
) -> Sections:  # fmt: skip
    """Rows of an engine's solve and training step, and of torchdiffeq's, on the same problem and in turns; at keep 1 only
    for the training step. Tuned first; a part that fails is a row that says so."""
    problem, clock = shop.problem(spec, keep, batch), setting.clock
    about = {"field": spec.name, "keep": keep, "batch": batch}
    compiled = shop.compiled(spec, keep, engine)
    found: Sections = {"rows": [], "tuning": []}
    packed = compiled.packed(spec.divergence)
    x, l = problem.state()  # noqa: E741
    try:
        request = _request(compiled, x, l, problem.noise, {}, 1.0, tolerance=problem.rtol)
        with torch.no_grad():
            shapes, remark = tune(packed, request, clock, min(seconds / 3, 10.0))
        if shapes or hasattr(packed, "tune"):
            found["tuning"].append({**about, "engine": engine, "shapes": shapes, "remark": remark})
    except Exception as error:
        found["tuning"].append({**about, "engine": engine, "shapes": [], "failed": first_line(error)})
        compiled = shop.compiled(spec, keep, engine, anew=True)  # the shape that failed may still be in use
        packed = compiled.packed(spec.divergence)
    limit = 0.02 if setting.dry else min(max(seconds / 4, 0.2), 1.5)

    def rows_of(task: str, contenders: dict[str, Callable], judge: Callable[[str, Any], dict]) -> None:
        runs, firsts, rows = {}, {}, {}
        for name, prepare in contenders.items():
            row = rows[name] = {**about, "engine": name, "task": task, "nnz": compiled.nnz}
            found["rows"].append(row)
            try:
                run = prepare()
                outcome, firsts[name] = warm(run, clock, limit)
                row["nfe"] = outcome.nfe
                runs[name] = run
                row |= judge(name, outcome)  # if that fails the times are still worth having
            except Exception as error:
                row["failed"] = first_line(error)
        if not runs:
            return
        try:
            rounds = in_turn(runs, firsts, clock, limit)
        except Exception as error:
            for name in runs:
                rows[name]["failed"] = first_line(error)
            return
        for name in runs:
            row = rows[name]
            row |= figures(rounds, name, row["nfe"])
            if row.get("floor"):
                row["share"] = row["floor"] / row["best"]

    def judge_forward(name: str, outcome: Outcome) -> dict:
        error = {"error": forward_error(outcome, shop.reference(spec, keep))}
        if name != engine:
            return error
        return {**error, "floor": floor_of(setting, compiled, problem, outcome.nfe), "how": _how(packed, batch)}

    def judge_training(name: str, outcome: StepOutcome) -> dict:
        if name != engine:
            return {"nfe_backward": outcome.nfe_backward}
        few = batch == min(setting.batches)
        return {
            "floor": floor_of(setting, compiled, problem, outcome.nfe, outcome.steps),
            "remark": packed.no_gradient(("tensors",)),  # then the reference engine makes the gradient
            "error": gradient_error(setting, shop, spec, keep, engine) if few else None,
        }

    ours, base = partial(peers.run_of, compiled, problem), partial(peers.torchdiffeq_dense, problem)
    rows_of("forward", {engine: ours, BASELINE: base}, judge_forward)
    contenders: dict[str, Callable] = {engine: partial(training_run, compiled, problem)}
    if keep == 1.0:
        contenders[BASELINE] = partial(training_peers.torchdiffeq_adjoint, problem)
    rows_of("train", contenders, judge_training)
    for parameter in compiled.parameters():
        parameter.grad = None
    return found


def _how(engine: Engine, batch: int) -> list[str] | None:
    """What the engine says of itself; never a reason to fail."""
    if not hasattr(engine, "describe"):
        return None
    try:
        return list(engine.describe(batch)) if hasattr(engine, "tune") else list(engine.describe())
    except Exception as error:
        return [first_line(error)]


# ----------------------------------------------------------------------------------------------------------------- peers


def measure_compiled_peer(setting: Setting, shop: Workshop, spec: FieldSpec, batch: int, seconds: float) -> Sections:
    """torchdiffeq on a field by torch.compile, forward. (Its training step needs a second derivative through the compiled
    field, for the divergence's, which torch.compile refuses.)"""
    problem = shop.problem(spec, 1.0, batch)
    runs = {"torch.compile": peers.torchdiffeq_compiled(problem), BASELINE: peers.torchdiffeq_dense(problem)}
    firsts, outcomes = {}, {}
    for name, run in runs.items():
        outcomes[name], firsts[name] = warm(run, setting.clock, seconds / 4)
    rounds = in_turn(runs, firsts, setting.clock, min(seconds / 4, 1.5))
    row = {
        "field": spec.name, "keep": 1.0, "batch": batch, "engine": "torch.compile", "task": "forward",
        "error": forward_error(outcomes["torch.compile"], shop.reference(spec, 1.0)),
        **figures(rounds, "torch.compile", outcomes["torch.compile"].nfe),
    }  # fmt: skip
    return {"rows": [row]}


def measure_diffrax(setting: Setting, spec: FieldSpec, seconds: float) -> Sections:
    """diffrax's jit on the GPU, forward and training step, in a process of its own."""
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
    platform_name = "cpu" if setting.dry else "gpu"
    batches = sorted(setting.batches, reverse=True)
    return {"rows": gpu_diffrax.in_a_process(spec, batches, platform_name, seconds)}


# -------------------------------------------------------------------------------------------------------------- launches

API_LAUNCHES = ("LaunchKernel", "LaunchCooperativeKernel", "GraphLaunch")


def count_launches(events: Iterable[tuple[str, bool]]) -> dict[str, Any]:
    """events: (name, on the device?) of a profiler.  kernels: that ran, by name as well; own: of this package's CUDA
    engine; copies, fills: of memory; calls: of the driver or runtime that launched a kernel or a graph."""
    counts = {"kernels": 0, "own": 0, "copies": 0, "fills": 0, "calls": 0}
    names: dict[str, int] = {}
    for name, on_device in events:
        if not on_device:
            counts["calls"] += name.startswith("cu") and any(part in name for part in API_LAUNCHES)
        elif name.startswith("Memcpy"):
            counts["copies"] += 1
        elif name.startswith("Memset"):
            counts["fills"] += 1
        else:
            counts["kernels"] += 1
            counts["own"] += "sparseflow" in name
            short = name.split("(")[0][-100:] if not name.startswith("(") else name[:100]
            names[short] = names.get(short, 0) + 1
    most = sorted(names.items(), key=lambda pair: -pair[1])[:8]
    return {**counts, "names": dict(most)}


def profiled(run: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    from torch.profiler import ProfilerActivity, profile

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    wait()
    with profile(activities=kinds) as profiler:
        run()
        wait()
    on_cuda = torch.autograd.DeviceType.CUDA
    events = [
        (event.name, event.device_type == on_cuda)
        for event in profiler.events() if not getattr(event, "is_user_annotation", False)
    ]
    if device.type == "cuda" and not any(on_device for _, on_device in events):
        raise RuntimeError("the profiler saw no kernel on the device (CUPTI may not be allowed here)")
    return count_launches(events)


def measure_launches(setting: Setting, shop: Workshop, spec: FieldSpec, seconds: float) -> Sections:
    """Launches of one solve and one training step, by torch.profiler, at the most wanted keep ratio and the smaller batch."""
    keep, batch = setting.keeps[0], min(setting.batches)
    problem, found = shop.problem(spec, keep, batch), []
    runs: list[tuple[str, str, Callable]] = []
    for engine in setting.engines:
        runs += [(engine, "forward", lambda e=engine: peers.run_of(shop.compiled(spec, keep, e), problem))]
        runs += [(engine, "train", lambda e=engine: training_run(shop.compiled(spec, keep, e), problem))]
    runs.append((BASELINE, "forward", lambda: peers.torchdiffeq_dense(problem)))
    for engine, task, prepare in runs:
        entry: dict[str, Any] = {"field": spec.name, "keep": keep, "batch": batch, "engine": engine, "task": task}
        found.append(entry)
        try:
            run = prepare()
            outcome, _ = warm(run, setting.clock, seconds)
            entry |= {"nfe": outcome.nfe, **profiled(run, setting.device)}
        except Exception as error:
            entry["failed"] = first_line(error)
    return {"launches": found}


# ----------------------------------------------------------------------------------------------------------- what to do


def items(setting: Setting) -> list[Item]:
    """Everything, the most wanted first."""
    shop = Workshop(setting)
    heavy = {"miniboone": 2.0, "bsds300": 4.0}
    found = [
        Item("device", partial(device_facts, setting), 0.5, least=0.0),
        Item("rates", partial(measure_rates, setting), 1.0),
        Item("barrier", partial(measure_barrier, setting), 1.0),
    ]

    def solves(keep: float) -> list[Item]:
        return [
            Item(f"solve/{spec.name}/k{keep:g}/b{batch}/{engine}",
                 partial(measure_solve, setting, shop, spec, keep, batch, engine), heavy.get(spec.name, 1.0))
            for spec in setting.fields for batch in setting.batches for engine in setting.engines
        ]  # fmt: skip

    def compiled_peers(batch: int) -> list[Item]:
        return [
            Item(f"peer/{spec.name}/b{batch}/torch.compile", partial(measure_compiled_peer, setting, shop, spec, batch),
                 4.0, least=8.0)
            for spec in setting.fields
        ]  # fmt: skip

    rivals = setting.peers
    wanted = ("miniboone", "bsds300", "hepmass", "power", "toy")
    by_want = sorted(setting.fields, key=lambda spec: wanted.index(spec.name) if spec.name in wanted else -1)
    for place, keep in enumerate(setting.keeps):
        found += solves(keep)
        if rivals and place == 1:
            found += [
                Item(f"peer/{spec.name}/diffrax", partial(measure_diffrax, setting, spec), 12.0,
                     least=1.0 if setting.dry else 20.0)
                for spec in by_want
            ]  # fmt: skip
        if rivals and not setting.dry and place == 2:
            found += compiled_peers(setting.batches[0])
    if rivals and not setting.dry:
        found += [item for batch in setting.batches[1:] for item in compiled_peers(batch)]
    # the profiler may slow down what comes after it
    found += [
        Item(f"launches/{spec.name}", partial(measure_launches, setting, shop, spec), 1.0, reserve=4.0)
        for spec in setting.fields
    ]
    pairs = [(tool, engine) for tool in gpu_sanitize.TOOLS for engine in setting.engines]
    found += [
        Item(f"sanitize/{tool}/{engine}", partial(gpu_sanitize.check, tool, engine, setting.dry), 8.0,
             least=10.0 if setting.dry else 90.0 - 20.0 * place, reserve=25.0 if setting.sanitize else 0.0)
        for place, (tool, engine) in enumerate(pairs[:1] if setting.dry else pairs)
    ]  # fmt: skip
    return found


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
