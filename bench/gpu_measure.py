"""What bench/gpu.py measures, one function per kind of item. The same functions run on the CPU, in small (`Setting.dry`),
so that a machine with a GPU is not where they run for the first time."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Callable, Iterable

import gpu_diffrax
import gpu_sanitize
import torch
from gpu_clock import BASELINE, Clock, figures, in_turn, warm
from gpu_device import device_facts, measure_barrier, measure_rates
from gpu_setting import REFERENCE_ROWS, Setting, Workshop, request_to
from gpu_suite import Item, Sections, first_line
from torch import Tensor

from sparseflow_kernels.analysis import graph_training, peers, training_peers
from sparseflow_kernels.analysis.floor import Work
from sparseflow_kernels.analysis.graph_problems import GraphSpec
from sparseflow_kernels.analysis.peers import Outcome
from sparseflow_kernels.analysis.problems import FieldSpec, Problem
from sparseflow_kernels.analysis.training_peers import StepOutcome, small_steps
from sparseflow_kernels.compiled_field import CompiledField
from sparseflow_kernels.compiled_field import compile as compile_field
from sparseflow_kernels.engines.base import Engine, SolveRequest
from sparseflow_kernels.flows import ContinuousFlow

GRADIENT_WEIGHTS = 1_000_000  # the float64 reference of a gradient keeps dense weights for every evaluation
SPARSE_SHARE = 0.25  # of the multiply-add rate: every product of a sparse row needs 4 bytes of shared memory anew, which
#                      delivers 128 bytes a cycle to 128 multiply-adds

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
    pairs = [(outcome.x, reference.x), *([] if reference.l is None else [(outcome.l, reference.l)])]
    errors = [(ours[:rows].double() - exact).abs().max() for ours, exact in pairs]
    return float(torch.stack(errors).max())  # a NaN stays one


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


def tune(
    engine: Engine, request: SolveRequest, clock: Clock, seconds: float, kind: str = "forward"
) -> tuple[list[dict[str, Any]], str]:
    """The engine's own tuning of its solves, or of their gradients (kind="adjoint"): ([shape and seconds, the
    quickest first], a remark). A solve that is too long for it to be tried in every shape is shortened, in time,
    first; the table then is of the shortened one."""
    if not hasattr(engine, "tune"):
        return [], f"engine {engine.name!r} has no launch shapes to choose from"
    shapes = len(engine.candidates(request.x.shape[0], len(request.tableau.b), kind, request.step_control))
    _, one = warm(partial(engine.solve, request), clock, seconds / 8)
    one *= 1 if kind == "forward" else 4  # about, where the workspace stays on the chip
    once = 2 * 3 * shapes * one  # warmed up, timed; and the favourite, timed just now, is quicker than the others
    repeats, fraction, remark = 3 if 2 * once < seconds else 1, min(1.0, seconds / once), ""
    if fraction < 0.05:  # a short solve still has a step or two
        return [], f"a solve takes {one:.2g} s: too long to try {shapes} shapes in {seconds:.2g} s"
    if fraction < 1.0:
        begin, end = request.times.tolist()
        times = torch.tensor([begin, begin + fraction * (end - begin)], dtype=torch.float64)
        request, remark = dataclasses.replace(request, times=times), f"of the first {fraction:.0%} of the solve"
    table = engine.tune(request, repeats=repeats, kind=kind)
    return [{"shape": list(shape), "seconds": taken} for shape, taken in table], remark


def measure_solve(
    setting: Setting, shop: Workshop, spec: FieldSpec, keep: float, batch: int, engine: str, seconds: float
) -> Sections:  # fmt: skip
    """Rows of an engine's solve and training step, and of torchdiffeq's, on the same problem and in turns; at keep 1 only
    for the training step. Tuned first; a part that fails is a row that says so."""
    problem = shop.problem(spec, keep, batch)
    about = {"field": spec.name, "keep": keep, "batch": batch}
    compiled = shop.compiled(spec, keep, engine)
    tuning = _tuned(setting, compiled, problem, min(seconds / 3, 10.0))
    if any("failed" in entry for entry in tuning):
        compiled = shop.compiled(spec, keep, engine, anew=True)  # the shape that failed may still be in use
    packed = compiled.packed(spec.divergence)
    found: Sections = {"rows": [], "tuning": [{**about, "engine": engine, **entry} for entry in tuning]}
    rows_of = partial(_timed, setting, found["rows"], {**about, "nnz": compiled.nnz}, seconds)

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


def _tuned(setting: Setting, compiled: CompiledField, problem: Problem, seconds: float) -> list[dict[str, Any]]:
    """What `tune` found, or that it failed; nothing for an engine without launch shapes."""
    kind, state = problem.spec.divergence, problem.state()
    packed = compiled.packed(kind)
    x, l = state if kind is not None else (state, None)  # noqa: E741
    try:
        request = request_to(compiled, x, l, problem.noise, {}, 1.0, tolerance=problem.rtol)
        if compiled.has_context:
            request = dataclasses.replace(request, context=compiled.context_of(len(x)))
        found = []
        for kind in ("forward", "adjoint") if hasattr(packed, "tune") else ():
            with torch.no_grad():
                shapes, remark = tune(packed, request, setting.clock, seconds / 2, kind)
            found.append({"kind": kind, "shapes": shapes, "remark": remark})
        return found
    except Exception as error:
        return [{"shapes": [], "failed": first_line(error)}]


def _timed(
    setting: Setting, found: list[dict], about: dict[str, Any], seconds: float, task: str,
    contenders: dict[str, Callable], judge: Callable[[str, Any], dict],
) -> None:  # fmt: skip
    """Adds a row for every contender (name -> what prepares its run), timed in turns; what fails is a row too."""
    limit = 0.02 if setting.dry else min(max(seconds / 4, 0.2), 1.5)
    runs, firsts, rows = {}, {}, {}
    for name, prepare in contenders.items():
        row = rows[name] = {**about, "engine": name, "task": task}
        found.append(row)
        try:
            run = prepare()
            outcome, firsts[name] = warm(run, setting.clock, limit)
            row["nfe"] = outcome.nfe
            runs[name] = run
            row |= judge(name, outcome)  # if that fails the times are still worth having
        except Exception as error:
            row["failed"] = first_line(error)
    if not runs:
        return
    try:
        rounds = in_turn(runs, firsts, setting.clock, limit)
    except Exception as error:
        for name in runs:
            rows[name]["failed"] = first_line(error)
        return
    for name in runs:
        row = rows[name]
        row |= figures(rounds, name, row["nfe"])
        if row.get("floor"):
            row["share"] = row["floor"] / row["best"]


def measure_graph(setting: Setting, spec: GraphSpec, keep: float, engine: str, seconds: float) -> Sections:
    """As `measure_solve`, of a field that is a graph, its training step where the loss has a solve. The baseline of
    that goes back through torchdiffeq's solve by autograd."""
    problem = spec.problem(keep).on(setting.device)
    about = {"field": spec.name, "keep": keep, "batch": spec.batch}
    compiled = peers.compiled(problem, engine)
    tuning = _tuned(setting, compiled, problem, min(seconds / 3, 10.0))
    if any("failed" in entry for entry in tuning):
        compiled = peers.compiled(problem, engine)
    found: Sections = {"rows": [], "tuning": [{**about, "engine": engine, **entry} for entry in tuning]}
    rows_of = partial(_timed, setting, found["rows"], {**about, "nnz": compiled.nnz}, seconds)
    reference = peers.float64_reference(problem, min(REFERENCE_ROWS, spec.batch))

    def judge(name: str, outcome: Outcome) -> dict:
        how = {"how": _how(compiled.packed(spec.divergence), spec.batch)} if name == engine else {}
        return {"error": forward_error(outcome, reference), **how}

    ours, base = partial(peers.run_of, compiled, problem), partial(peers.torchdiffeq_dense, problem)
    rows_of("forward", {engine: ours, BASELINE: base}, judge)
    if spec.loss != "matching":
        steps = {engine: partial(graph_training.sparseflow_step, problem, engine)}
        if keep == 1.0:
            steps[BASELINE] = partial(graph_training.torchdiffeq_direct, problem)
        rows_of("train", steps, lambda name, outcome: {})
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

    def graphs(keep: float) -> list[Item]:
        return [
            Item(f"graph/{spec.name}/k{keep:g}/{engine}", partial(measure_graph, setting, spec, keep, engine), 1.5)
            for spec in setting.graphs for engine in setting.engines
        ]  # fmt: skip

    rivals = setting.peers
    wanted = ("miniboone", "bsds300", "hepmass", "power", "toy")
    by_want = sorted(setting.fields, key=lambda spec: wanted.index(spec.name) if spec.name in wanted else -1)
    for place, keep in enumerate(setting.keeps):
        found += solves(keep)
        if place < 2:
            found += graphs(keep)
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
             least=10.0 if setting.dry else max(30.0, 90.0 - 20.0 * place), reserve=25.0 if setting.sanitize else 0.0)
        for place, (tool, engine) in enumerate(pairs[:1] if setting.dry else pairs)
    ]  # fmt: skip
    return found
