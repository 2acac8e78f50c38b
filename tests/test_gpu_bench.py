"""The GPU suite where there is no GPU: the time budget, the result file, crashes and hangs, tables; and every measuring
function once on the CPU, in small."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import gpu_clock
import gpu_device
import gpu_diffrax
import gpu_measure
import gpu_report
import gpu_sanitize
import gpu_sanitized_case
import gpu_setting
import gpu_suite
import pytest
import torch
import typer
from cpu_cases import isolated_environment
from gpu_suite import Budget, Item, Results
from typer.testing import CliRunner

SCRIPT = Path(__file__).parents[1] / "bench" / "gpu.py"


class Watch:
    """A clock that is set by hand."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def work(watch, seconds, found=None, error=None, allowances=None):
    def run(allowance):
        if allowances is not None:
            allowances.append(allowance)
        watch.now += seconds
        if error is not None:
            raise error
        return found or {}

    return run


def results_at(path, **about):
    return Results.open(path, False, about)


def run_all(items, results, budget, **more):
    lines = []
    obstacle = gpu_suite.run_items(items, results, budget, lambda done, line: lines.append((done, line)), **more)
    statuses = {name: entry["status"] for name, entry in results.document["items"].items()}
    return obstacle, statuses, lines


# -------------------------------------------------------------------------------------------------- budget and failures


def test_items_share_the_time_by_weight_and_what_is_left_over_goes_to_the_next(tmp_path):
    watch, given = Watch(), []
    budget = Budget(100.0, watch)
    items = [Item("a", work(watch, 5, allowances=given), 1.0), Item("b", work(watch, 5, allowances=given), 3.0),
             Item("c", work(watch, 5, allowances=given), 1.0), Item("end", work(watch, 5, allowances=given), reserve=20.0)]
    _, statuses, lines = run_all(items, results_at(tmp_path / "x.json"), budget)
    assert given == [80 / 5, 75 * 3 / 4, 70, 85]
    assert set(statuses.values()) == {"done"} and [done for done, _ in lines] == [1, 2, 3, 4]


def test_what_does_not_fit_is_skipped_with_a_reason_but_not_what_time_was_kept_for(tmp_path):
    watch = Watch()
    items = [Item("slow", work(watch, 29)), Item("late", work(watch, 1)), Item("large", work(watch, 1), least=90.0),
             Item("kept", work(watch, 5), least=90.0, reserve=10.0)]
    results = results_at(tmp_path / "x.json")
    _, statuses, _ = run_all(items, results, Budget(40.0, watch))
    assert statuses == {"slow": "done", "late": "skipped", "large": "skipped", "kept": "done"}
    assert results.skipped() == ["late: time budget: 1 s are left for it, it is not begun below 2 s",
                                 "large: time budget: 1 s are left for it, it is not begun below 90 s"]


def test_a_failure_is_recorded_and_the_next_item_runs(tmp_path):
    watch = Watch()
    rows = {"rows": [{"engine": "e", "task": "train", "failed": "RuntimeError: no"}, {"engine": "f", "task": "train", "skipped": "not here"}]}
    items = [Item("bad", work(watch, 1, error=ValueError("first\nsecond"))), Item("half", work(watch, 1, rows)), Item("good", work(watch, 1))]
    results = results_at(tmp_path / "x.json")
    obstacle, statuses, _ = run_all(items, results, Budget(60.0, watch))
    assert obstacle is None and statuses == {"bad": "failed", "half": "partial", "good": "done"}
    assert results.failures() == ["bad: failed: ValueError: first", "half: e train: RuntimeError: no"]
    assert results.skipped() == ["half: f train: not here"]


@pytest.mark.parametrize("hidden", [False, True])
def test_a_lost_device_ends_the_process_and_is_not_tried_again(tmp_path, hidden):
    watch, asked = Watch(), []
    first = work(watch, 1, {"rows": [{"engine": "e", "task": "t", "failed": "x"}]}) if hidden else work(watch, 1, error=RuntimeError("x"))
    items = [Item("breaks", first), Item("after", work(watch, 1))]
    results = results_at(tmp_path / "x.json")
    obstacle, statuses, _ = run_all(items, results, Budget(60.0, watch), lost=lambda: asked.append(1) or "illegal address")
    assert obstacle == "illegal address" and statuses == {"breaks": "crashed"} and asked == [1]
    again = Results.open(tmp_path / "x.json", True, {})
    _, statuses, _ = run_all(items, again, Budget(60.0, watch))
    assert statuses == {"breaks": "crashed", "after": "done"} and watch.now == 2


# ------------------------------------------------------------------------------------------------------ the result file


def test_resuming_does_what_was_left_and_replaces_its_own_entries_only(tmp_path):
    watch, path = Watch(), tmp_path / "deeper" / "x.json"
    row = {"engine": "e", "task": "forward", "median": 1.0, "nfe": 3}
    items = [Item("a", work(watch, 1, {"rows": [row], "rates": {"x": 1}})), Item("b", work(watch, 1, {"rows": [{**row, "failed": "f"}]})),
             Item("c", work(watch, 1, error=OSError("away")))]
    run_all(items, results_at(path, name="n"), Budget(60.0, watch))
    better = [Item("a", work(watch, 1, error=AssertionError("again"))), Item("b", work(watch, 1, {"rows": [row, row], "rates": {"y": 2}})),
              Item("c", work(watch, 1))]
    results = Results.open(path, True, {"name": "n"})
    _, statuses, _ = run_all(better, results, Budget(60.0, watch))
    assert set(statuses.values()) == {"done"} and not results.failures()
    document = json.loads(path.read_text())
    assert [row["item"] for row in document["rows"]] == ["a", "b", "b"] and document["rates"] == {"x": 1, "y": 2}
    assert document["running"] is None
    with pytest.raises(ValueError, match="name is 'n', this run's is 'm'; move the file away"):
        Results.open(path, True, {"name": "m"})
    path.write_text("{}")
    with pytest.raises(ValueError, match="is not a result of bench/gpu.py"):
        Results.open(path, True, {})


def test_a_file_is_whole_at_any_time(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    results = results_at(path)
    before = path.read_text()
    results.document["rows"] = [{"item": "a", "bad": object()}]
    with pytest.raises(TypeError):
        results.save()
    assert path.read_text() == before
    del results.document["rows"]

    def fall(*_):
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", fall)
    with pytest.raises(OSError):
        results.begin("a", 1.0)
    assert path.read_text() == before


def test_only_chooses_by_parts_of_names():
    items = [Item(name, dict) for name in ("solve/toy/a", "solve/toys/a", "rates")]
    assert [item.name for item in gpu_suite.chosen(items, ["solve/toy", "rates"])] == ["solve/toy/a", "rates"]
    assert gpu_suite.chosen(items, []) == items
    with pytest.raises(ValueError, match="--only: 'sol' chooses nothing; there are solve/toy, solve/toys, rates"):
        gpu_suite.chosen(items, ["sol"])


def test_slug():
    assert gpu_suite.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3" and gpu_suite.slug("--") == "device"


# ------------------------------------------------------------------------------------------------- crashes and hangs

WORKER = """
import json, os, signal, sys, time
path = {path!r}
document = json.load(open(path))
def write():
    json.dump(document, open(path + ".new", "w")); os.replace(path + ".new", path)
for name in ("first", "second", "third"):
    if name in document["items"]: continue
    document["running"] = {{"item": name, "since": time.time(), "limit": 0.3}}; write()
    if name == "first": os.kill(os.getpid(), signal.SIGSEGV)
    if name == "second": time.sleep(30)
    document["items"][name] = {{"status": "done"}}; document["running"] = None; write()
"""


def test_the_supervisor_goes_on_behind_a_crash_and_a_hang(tmp_path):
    path, said = tmp_path / "x.json", []
    results_at(path)
    command = lambda until: [sys.executable, "-S", "-c", WORKER.format(path=str(path))]  # noqa: E731
    code = gpu_suite.supervise(command, path, Budget(60.0), said.append, poll=0.1)
    document = json.loads(path.read_text())
    assert code == 1 and {name: entry["status"] for name, entry in document["items"].items()} == {
        "first": "crashed", "second": "hung", "third": "done",
    }
    assert document["items"]["first"]["reason"] == "the process was ended by SIGSEGV"
    assert said[1:] == ["going on in a new process", "second: hung: no end after 0 s", "going on in a new process"]


@pytest.mark.skipif(sys.platform != "linux", reason="a parent's death is heard of on Linux")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_its_supervisor(tmp_path, number):
    told = tmp_path / "pid"
    worker = f"import os, time; open({str(told)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    supervisor = (
        "import sys\nfrom pathlib import Path\nfrom gpu_suite import Budget, supervise\n"
        f"supervise(lambda until: [sys.executable, '-c', {worker!r}], Path({str(tmp_path / 'x.json')!r}), Budget(60), print)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", supervisor], cwd=SCRIPT.parent)
    try:
        watch = Budget(30)
        while not (told.exists() and told.read_text()) and watch.left() > 0:
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(30) == (128 + number if number == signal.SIGTERM else -number)
        while _runs(int(told.read_text())) and watch.left() > 0:
            time.sleep(0.02)
        assert not _runs(int(told.read_text()))
    finally:
        process.kill()


def _runs(pid):
    """Whether the process is there, and not merely waiting to be asked for its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_supervisor_ends_what_outlives_the_budget(tmp_path):
    path = tmp_path / "x.json"
    results_at(path).begin("long", 1000.0)
    code = gpu_suite.supervise(lambda until: [sys.executable, "-S", "-c", "import time; time.sleep(30)"], path, Budget(-1.0),
                               lambda line: None, poll=0.05, grace=0.2)  # fmt: skip
    assert code == 1 and Results.load(path).document["items"]["long"]["status"] == "hung"


@pytest.mark.parametrize("code", [0, 1, 9])
def test_the_supervisor_passes_on_the_exit_code(tmp_path, code):
    path = tmp_path / "x.json"
    results_at(path)
    command = lambda until: [sys.executable, "-S", "-c", f"raise SystemExit({code})"]  # noqa: E731
    assert gpu_suite.supervise(command, path, Budget(60.0), lambda line: None, poll=0.05) == min(code, 1)


# ------------------------------------------------------------------------------------------------------------- figures


def test_rounds_are_in_turn_and_ratios_are_of_rounds():
    order, now = [], Watch()
    durations = {"ours": 0.1, gpu_clock.BASELINE: 0.45}

    def clock(run):
        name = run()
        order.append(name)
        now.now += 1
        return durations[name] * (1 + 0.5 * (now.now > 10))  # the machine slows down

    runs = {name: (lambda name=name: name) for name in durations}
    rounds = gpu_clock.in_turn(runs, durations, clock, seconds=0.0, least=3)
    assert order == (["ours"] * 4 + [gpu_clock.BASELINE]) * 3
    found = gpu_clock.figures(rounds, "ours", 10)
    assert found["ratio"] == pytest.approx(4.5) and found["samples"] == 12 and found["best"] == 0.1
    assert found["per_evaluation"] == pytest.approx(found["median"] / 10)
    assert gpu_clock.figures(rounds, gpu_clock.BASELINE, 10)["ratio"] == 1.0
    assert gpu_clock.figures({"ours": rounds["ours"]}, "ours", 10)["ratio"] is None
    assert len(gpu_clock.in_turn(runs, durations, clock, seconds=1e9, most=5)["ours"]) == 5


def test_warming_up_runs_thrice_or_twice_where_it_takes_long():
    for one, runs in ((0.1, 3), (9.0, 2)):
        seen = []
        first, last = gpu_clock.warm(lambda: seen.append(1) or len(seen), lambda run: (run(), one)[1], seconds=1.0)
        assert (first, last, len(seen)) == (1, one, runs)


def test_launches_are_told_apart():
    events = [("void sparseflow::cuda::solve_kernel<float, 4, true>(sparseflow::cuda::SolveParams<float>)", True), ("Memcpy DtoH", True),
              ("Memset (Device)", True), ("void at::native::fill(int)", True), ("cudaLaunchCooperativeKernel", False),
              ("cudaLaunchKernel", False), ("cuLaunchKernelEx", False), ("cudaGraphLaunch", False), ("cudaMemcpyAsync", False), ("aten::add", False)]  # fmt: skip
    found = gpu_measure.count_launches(events)
    names = found.pop("names")
    assert found == {"kernels": 2, "own": 1, "copies": 1, "fills": 1, "calls": 4}
    assert names == {"void sparseflow::cuda::solve_kernel<float, 4, true>": 1, "void at::native::fill": 1}


class FakeEngine:
    """An engine with three launch shapes, as far as tuning looks at it."""

    name = "fake"

    def __init__(self, seconds):
        self.seconds, self.solved, self.tuned = seconds, 0, None

    def candidates(self, batch, stages, kind, step_control):
        return [SimpleNamespace(shape=(tile, 4, 1, 256)) for tile in (32, 16, 8)]

    def solve(self, request):
        self.solved += 1

    def tune(self, request, repeats, kind):
        self.tuned = request.times.tolist(), repeats
        return [((16, 4, 1, 256), 0.5), ((32, 4, 1, 256), 1.0)]


@pytest.mark.parametrize("seconds, end, repeats, remark", [
    (0.001, 1.0, 3, ""), (0.05, 1.0, 1, ""), (0.1, 0.5, 1, "of the first 50% of the solve"), (2.0, None, None, "too long to try 3 shapes"),
])
def test_tuning_fits_into_its_time(seconds, end, repeats, remark):
    setting = gpu_setting.Setting.of_dry_run(Path("."))
    shop, spec = gpu_setting.Workshop(setting), setting.fields[1]
    problem = shop.problem(spec, 0.5, 16)
    x, l = problem.state()  # noqa: E741
    request = gpu_setting.request_to(shop.compiled(spec, 0.5, "reference"), x, l, problem.noise, {}, 1.0)
    engine = FakeEngine(seconds)
    table, said = gpu_measure.tune(engine, request, lambda run: (run(), seconds)[1], seconds=0.9)
    assert remark in said and (not remark) == (not said)
    if end is None:
        assert table == [] and engine.tuned is None
    else:
        assert engine.tuned == ([0.0, pytest.approx(end)], repeats)
        assert table[0] == {"shape": [16, 4, 1, 256], "seconds": 0.5}


def test_a_smaller_batch_is_the_beginning_of_a_larger_one():
    setting = gpu_setting.Setting.of_dry_run(Path("."))
    shop, spec = gpu_setting.Workshop(setting), setting.fields[1]
    small, large = (shop.problem(spec, 0.5, batch) for batch in setting.batches)
    assert torch.equal(small.x, large.x[:16]) and torch.equal(small.noise, large.noise[:16]) and len(large.x) == 33
    assert shop.compiled(spec, 0.5, "cpu" if "cpu" in setting.engines else "reference").nnz == shop.field(spec, 0.5).nnz


def test_the_floor_counts_a_quarter_of_the_rate_for_sparse_rows():
    setting = gpu_setting.Setting.of_dry_run(Path("."))
    shop, spec = gpu_setting.Workshop(setting), setting.fields[1]
    compiled, problem = shop.compiled(spec, 0.5, "reference"), shop.problem(spec, 0.5, 16)
    assert gpu_measure.floor_of(setting, compiled, problem, 10) is None
    setting.rates.update(fma_per_s=1e6, launch_s=0.25)
    plan = compiled.divergence_plan("hutchinson")
    count = (compiled.nnz + plan.costs["hutchinson"]) * 10 * 16
    assert gpu_measure.floor_of(setting, compiled, problem, 10) == pytest.approx(0.25 + count / 0.25e6)
    assert gpu_measure.floor_of(setting, compiled, problem, 10, steps=2) > 0.5 + count / 0.25e6


# --------------------------------------------------------------------------------------------- other processes' words


def test_rows_of_a_process_that_was_cut_off():
    wanted = [{"batch": batch, "task": task} for batch in (10, 20) for task in ("forward", "train")]
    text = 'hello\nROW {"batch": 10, "task": "forward", "median": 1.0}\nROW {"batch": 10, "ta'
    rows = gpu_diffrax.completed(wanted, gpu_diffrax.rows_in(text), "skipped", "no time")
    assert rows[0]["median"] == 1.0 and [row.get("skipped") for row in rows] == [None, "no time", "no time", "no time"]


@pytest.mark.parametrize("said, code, clean, word", [
    ("========= ERROR SUMMARY: 0 errors\n", 0, True, None),
    ("========= ERROR SUMMARY: 3 errors\n", 77, False, "3 errors (exit code 77)"),
    ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0, True, None),
    ("========= ERROR SUMMARY: 0 errors\nValueError: x\n", 1, False, "ValueError: x (exit code 1)"),
    ("Device not supported\n", 1, None, None),
])
def test_the_sanitizer_is_believed_only_with_a_summary(tmp_path, monkeypatch, said, code, clean, word):
    program = tmp_path / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\nprintf '%s' '{said}'\nexit {code}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert gpu_sanitize.find_tool() == str(program)
    (entry,) = gpu_sanitize.check("memcheck", "cuda", False, 10.0)["sanitizer"]
    assert entry["clean"] is clean and entry.get("failed", "") == (word or "") if word is None else word in entry["failed"]
    assert ("skipped" in entry) == (clean is None)


def test_without_the_sanitizer_the_entry_says_so(monkeypatch):
    monkeypatch.setattr(gpu_sanitize, "find_tool", lambda: None)
    (entry,) = gpu_sanitize.check("memcheck", "cuda", False, 10.0)["sanitizer"]
    assert "was not found" in entry["skipped"]


# -------------------------------------------------------------------------------------------------------------- tables


def row(engine, keep, ms, nfe=20, field="miniboone", batch=10000, task="forward", **more):
    return {"item": "i", "field": field, "keep": keep, "batch": batch, "engine": engine, "task": task, "nfe": nfe,
            "median": ms / 1e3, "best": ms / 1e3, "per_evaluation": ms / 1e3 / nfe, **more}  # fmt: skip


def document():
    return {
        "rows": [row("cuda", 0.1, 2.0, ratio=30.0, error=1e-5, floor=1e-3, share=0.5), row("triton", 0.1, 3.0, ratio=20.0),
                 row("torchdiffeq", 0.1, 60.0, ratio=1.0), row("triton", 1.0, 8.0, nfe=40, ratio=9.0), row("cuda", 1.0, 12.0, nfe=40),
                 row("diffrax", 1.0, 12.0, nfe=40), row("cuda", 0.1, 5.0, task="train"), row("torchdiffeq", 1.0, 300.0, nfe=40, task="train"),
                 {**row("triton", 0.1, 3.0, task="train"), "median": None, "failed": "RuntimeError"}],
        "barrier": [{"engine": "cuda", "shape": [8], "blocks": n, "microseconds": 2.0 + n / 200} for n in (132, 264)],
        "launches": [{"field": "toy", "engine": "cuda", "task": "forward", "nfe": 32, "kernels": 3, "own": 1, "copies": 2, "fills": 0, "calls": 3}],
        "tuning": [{"field": "miniboone", "keep": 0.1, "batch": 10000, "engine": "cuda", "remark": "",
                    "shapes": [{"shape": [16, 4, 1, 256], "seconds": 2e-3}, {"shape": [32, 4, 1, 256], "seconds": 4e-3}]}],
        "device": {"name": "A GPU", "commit": "abc", "build": {}},
        "rates": {"fma_per_s": 3e13, "fma_by": "a loop", "copy_bytes_per_s": 3e12, "launch_s": 5e-6, "launch_rate_s": 2e-6},
    }  # fmt: skip


def test_ratios_are_of_rounds_or_per_evaluation():
    table = gpu_report.Table(document())
    best = table.best("miniboone", 0.1, 10000, "forward")
    assert best["engine"] == "cuda" and table.ratio(best, "torchdiffeq") == 30.0
    assert table.ratio(best, "diffrax") == pytest.approx((12 / 40) / (2 / 20))
    assert table.ratio(best, gpu_report.DENSE) == pytest.approx((8 / 40) / (2 / 20))
    assert table.ratio(best, "torch.compile") is None
    step = table.best("miniboone", 0.1, 10000, "train")
    assert table.ratio(step, "torchdiffeq") == pytest.approx((300 / 40) / (5 / 20))


def test_goals_are_judged():
    found = {what: (value, met) for what, value, _, met in gpu_report.goals(document())}
    assert found["miniboone, keep 0.1, batch 10000: times quicker than diffrax, at least"] == (pytest.approx(3.0), True)
    assert found["miniboone, keep 0.1, batch 1000: times quicker than torchdiffeq, at least"] == (None, None)
    assert found["barrier of a shared step, microseconds, at most"] == (pytest.approx(3.32), False)
    assert found["launches of the cuda engine's kernels in a solve, exactly"] == (1, True)
    assert len(found) == 2 + 3 + 8 + 2


def test_markdown_shows_every_part(tmp_path):
    text = gpu_report.markdown(document(), ["barrier: failed: x"], ["sanitize/memcheck: no time"])
    assert "| miniboone, batch 10000 | cuda | 12 / 40 | 2 / 20 (30x, 50%) |" in text
    assert "| miniboone, forward | 0.1 | 10000 | cuda | 30x | - | 3.0x | 2.0x |" in text
    assert "| barrier of a shared step, microseconds, at most | 3 | 3.32 | **no** |" in text
    assert "| toy | cuda | forward | 32 | 3 | 1 | 2 | 0 | 3 |" in text and "(16, 4, 1, 256) | 2 | (32, 4, 1, 256) | 4 | 2 |" in text
    assert "- barrier: failed: x" in text and "- sanitize/memcheck: no time" in text and "dry run" not in text
    widths = [{line.count("|") for line in block.splitlines()} for block in text.split("\n\n") if block.startswith("| ")]
    assert all(len(counts) == 1 for counts in widths)
    assert "dry run" in gpu_report.markdown({"dry_run": True}, [], [])
    pytest.importorskip("matplotlib")
    assert gpu_report.plot(document(), tmp_path / "x.png").stat().st_size > 1000


# ------------------------------------------------------------------------------------------------------- the command


def invoke(*arguments):
    """The command in this process; it starts its measuring process itself."""
    app = typer.Typer()
    app.command()(runpy.run_path(str(SCRIPT))["main"])
    return CliRunner().invoke(app, arguments)


def test_every_measuring_function_runs_on_the_cpu(tmp_path):
    pytest.importorskip("sparseflow_kernels._cpu", reason="the CPU extension is not built")
    setting = gpu_setting.Setting.of_dry_run(SCRIPT.parents[1])
    only = ["device", "rates", "barrier", "solve/power/k1/b16", "solve/toy/k0.5/b33/cpu", "launches/power",
            "graph/resnet/k1/cpu", "graph/gru/k0.5/cpu", "graph/cfm/k0.5/cpu"]  # fmt: skip
    items = gpu_suite.chosen(gpu_measure.items(setting), only)
    results = results_at(tmp_path / "x.json")
    _, statuses, lines = run_all(items, results, Budget(100.0))
    assert set(statuses.values()) == {"done"} and len(items) == 7 + 3, results.document["items"]
    assert any("NFE" in line for _, line in lines)
    found = json.loads((tmp_path / "x.json").read_text())
    graphs = [r for r in found["rows"] if r["item"].startswith("graph/")]
    found["rows"] = [r for r in found["rows"] if r not in graphs]
    assert [(r["field"], r["engine"], r["task"]) for r in graphs] == [
        ("gru", "cpu", "forward"), ("gru", "torchdiffeq", "forward"), ("gru", "cpu", "train"),
        ("cfm", "cpu", "forward"), ("cfm", "torchdiffeq", "forward"),
        ("resnet", "cpu", "forward"), ("resnet", "torchdiffeq", "forward"),
        ("resnet", "cpu", "train"), ("resnet", "torchdiffeq", "train"),
    ]  # fmt: skip
    assert all(r["error"] < 5e-3 for r in graphs if r["task"] == "forward")
    both = [(engine, task, 1.0) for engine in ("cpu", "reference", "torchdiffeq") for task in ("forward", "train")]
    assert {(r["engine"], r["task"], r["keep"]) for r in found["rows"]} == {
        *both, ("cpu", "forward", 0.5), ("cpu", "train", 0.5), ("torchdiffeq", "forward", 0.5),
    }  # fmt: skip
    for r in found["rows"]:
        assert 0 < r["best"] <= r["median"] and r["nfe"] >= 14
        assert (r["ratio"] is None) == (r["task"] == "train" and r["keep"] != 1.0)
        if r["engine"] in ("cpu", "reference"):
            assert (r["floor"] is None) == (r["field"] == "toy" and r["task"] == "train")  # of its exact divergence
        if r["task"] == "forward" or (r["engine"] != "torchdiffeq" and r["batch"] == 16):
            assert r["error"] < 5e-3
    assert found["barrier"][0]["steps"] == pytest.approx(20, abs=2)
    assert {entry["engine"] for entry in found["launches"]} == {"cpu", "reference", "torchdiffeq"}
    assert found["rates"]["fma_per_s"] > 0 and found["device"]["commit"] != ""
    text = gpu_report.markdown(found, [], [])
    assert "Training steps" in text and "torch.profiler" in text


def test_every_item_has_its_place():
    setting = gpu_setting.Setting(
        torch.device("cpu"), None, gpu_setting.specs(gpu_setting.FIELD_NAMES), gpu_setting.graph_specs(gpu_setting.GRAPH_NAMES)
    )
    names = [item.name for item in gpu_measure.items(setting)]
    assert len(names) == len(set(names)) == 3 + 5 * 5 * 2 * 2 + 2 * 3 * 2 + 5 + 5 * 2 + 5 + 3 * 2
    solves = [name.split("/")[2] for name in names if name.startswith("solve/")]
    assert list(dict.fromkeys(solves)) == ["k0.1", "k1", "k0.02", "k0.5", "k0.2"]
    assert names.index("peer/miniboone/diffrax") < names.index("peer/toy/diffrax") < names.index("solve/toy/k0.02/b1000/cuda")
    assert names[-1].startswith("sanitize/") and names.index("launches/toy") > names.index("peer/bsds300/b10000/torch.compile")


def test_the_sources_are_told_as_git_does(tmp_path):
    for name, text in (("csrc/a.h", "one"), ("csrc/cuda/b.cu", "two"), ("csrc/cuda.h", ""), ("sparseflow_kernels/run", "x")):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "sparseflow_kernels" / "run").chmod(0o755)

    def git(*words):
        return subprocess.run(["git", "-C", tmp_path, *words], check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("add", ".")
    (tmp_path / "csrc" / "_cuda.so").write_text("built")
    (tmp_path / "csrc" / "__pycache__").mkdir()
    (tmp_path / "csrc" / "empty" / "__pycache__").mkdir(parents=True)
    tree = git("write-tree")
    wanted = {name: git("rev-parse", f"{tree}:{name}") for name in ("csrc", "sparseflow_kernels")}
    assert gpu_device.source_trees(tmp_path) == wanted
    (tmp_path / "csrc" / "a.h").write_text("another")
    assert gpu_device.source_trees(tmp_path)["csrc"] != wanted["csrc"]


def test_the_commit_is_told_where_git_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEFLOW_COMMIT", "abc")
    for name in gpu_device.MEASURED:
        (tmp_path / name).mkdir()
    setting = gpu_setting.Setting(torch.device("cpu"), None, [], repository=tmp_path)
    assert gpu_device.device_facts(setting)["device"]["commit"] == "abc"


def test_other_sources_are_not_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "supervise", lambda *_: 0)  # what is left is not measured
    arguments = ("--dry-run", "--minutes", "1", "--out", str(tmp_path), "--only", "device", "--resume")
    assert invoke(*arguments).exit_code == 0
    path = tmp_path / "cpu-dry-run.json"
    results = Results.load(path)
    results.document["items"]["barrier"] = {"status": "done"}
    results.save()
    assert invoke(*arguments).exit_code == 0 and Results.load(path).settled("barrier")
    results = Results.load(path)
    results.document["sources"]["csrc"] = "0" * 40
    results.save()
    ran = invoke(*arguments)
    assert "from other sources" in ran.output and not Results.load(path).settled("barrier")


RUN = SCRIPT.with_name("gpu_run.sh")


def run_parts(folder, *parts, python, **more):
    python_file = folder / "python"
    python_file.write_text("#!/bin/sh\n" + python)
    python_file.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python_file), "GPU_RUN_LOGS": str(folder / "logs"), **more}
    return subprocess.run([RUN, *parts], env=environment, capture_output=True, text=True)


def test_a_failing_part_is_told_and_the_next_one_runs(tmp_path):
    python = 'echo "$@"; echo "$SPARSEFLOW_CUDA_ARCHS"; case "$*" in *"-m pytest"*) exit 3;; esac'
    ran = run_parts(tmp_path, "build+cuda", "bench", python=python)
    assert ran.returncode == 1 and "failed: cuda: exit code 3" in ran.stdout
    logs = {path.stem: path.read_text() for path in (tmp_path / "logs").glob("*.log")}
    assert set(logs) == {"build", "cuda", "bench"} and "setup.py build_ext --inplace" in logs["build"]
    assert "-n 12" in logs["cuda"] and "tests/test_cuda_graph.py" in logs["cuda"] and "\n90\n" in logs["cuda"]
    assert re.search(r"bench/gpu.py --resume --minutes [78]", logs["bench"])


def test_parts_end_in_time_and_what_is_missing_is_named(tmp_path):
    ran = run_parts(tmp_path, "bench", "cuda", python='[ "$2" = - ] || exec sleep 60', GPU_RUN_SECONDS="6")
    assert ran.returncode == 1 and "failed: bench: exit code 124, out of time" in ran.stdout
    assert "failed: cuda: not begun" in ran.stdout
    ran = run_parts(tmp_path, "cuda", python='[ "$2" = - ] && echo "no torchdiffeq" && exit 1')
    assert ran.returncode == 1 and "no torchdiffeq" in ran.stdout and "failed: cuda: a package is missing" in ran.stdout
    assert run_parts(tmp_path, "dance", python="").returncode == run_parts(tmp_path, python="").returncode == 2


def test_the_case_for_the_sanitizer_runs(capsys):
    gpu_sanitized_case.main("reference")
    assert "reference: finite" in capsys.readouterr().out


def test_the_command_writes_resumes_and_says_what_failed(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", isolated_environment()["PYTHONPATH"])
    ran = invoke("--dry-run", "--minutes", "1", "--out", str(tmp_path), "--only", "device")
    assert ran.exit_code == 0, ran.output
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.suffix != ".png") == [".json", ".md"]
    path = tmp_path / "cpu-dry-run.json"
    results = Results.load(path)
    assert results.document["dry_run"] and results.document["device"]["torch"] == torch.__version__
    results.document["rows"] = [row("cpu", 0.5, 1.0), {"item": "i", "engine": "e", "task": "t", "failed": "RuntimeError: no"}]
    results.save()
    results.document["items"]["barrier"] = {"status": "hung"}
    results.save()
    again = invoke("--dry-run", "--minutes", "1", "--out", str(tmp_path), "--only", "device,barrier", "--resume")
    assert again.exit_code == 1 and "failed: i: e t: RuntimeError: no" in again.output
    assert "failed: barrier: hung" in again.output
    results = Results.load(path)
    results.forget(["barrier"])
    assert not results.settled("barrier") and results.settled("device")
    assert len(Results.load(path).document["rows"]) == 2 and "A dry run" in path.with_suffix(".md").read_text()


def test_the_command_refuses(tmp_path):
    results = SCRIPT.parent / "results"
    before = sorted(results.iterdir())
    ran = invoke("--dry-run", "--out", str(results))
    assert ran.exit_code == 1 and "a dry run does not write into bench/results" in ran.output
    ran = invoke("--dry-run", "--out", str(tmp_path), "--only", "device,dance")
    assert ran.exit_code == 1 and "--only: 'dance' chooses nothing" in ran.output
    (tmp_path / "cpu-dry-run.json").write_text("[]")
    ran = invoke("--dry-run", "--out", str(tmp_path), "--resume")
    assert ran.exit_code == 1 and "is not a result of bench/gpu.py" in ran.output
    assert sorted(results.iterdir()) == before and len(list(tmp_path.iterdir())) == 1


def test_without_a_gpu_the_message_names_what_was_found(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_device, "build_info", lambda: {"cuda": {"reason": "the driver is on holiday"}})
    ran = invoke("--out", str(tmp_path))
    assert ran.exit_code == 2 and not list(tmp_path.iterdir())
    for part in ("torch.cuda.is_available() is False", "the driver is on holiday", "--dry-run"):
        assert part in ran.output


def test_the_rate_kernel_is_multiply_adds_and_nothing_else():
    pytest.importorskip("triton")
    code = (
        "from triton.compiler import ASTSource\nfrom triton.backends.compiler import GPUTarget\nimport triton\n"
        "import gpu_fma as g\n"
        "types = {'out': '*fp32', 'factor': 'fp32', 'term': 'fp32', 'loops': 'i32', 'BLOCK': 'constexpr', 'UNROLL': 'constexpr'}\n"
        "source = ASTSource(fn=g.multiply_adds, signature=types, constexprs={'BLOCK': g.BLOCK, 'UNROLL': g.UNROLL})\n"
        "ptx = triton.compile(source, target=GPUTarget('cuda', 90, 32), options={'num_warps': g.WARPS}).asm['ptx']\n"
        "print(ptx.count('fma.rn.f32'), ptx.count('mul.f32'), g.CHAINS * g.UNROLL * g.BLOCK // (32 * g.WARPS))\n"
    )
    environment = isolated_environment()
    environment.pop("TRITON_INTERPRET", None)
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    multiply_adds, products, wanted = map(int, ran.stdout.split()[-3:])
    assert multiply_adds == wanted and products == 0
