"""The command line, in its quickest settings, as a user without a terminal sees it."""

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

from sparseflow_kernels.analysis import bench, peers, problems
from sparseflow_kernels.analysis.floor import Work
from sparseflow_kernels.cli.main import app
from sparseflow_kernels.compiled_field import compile as compile_field


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output + str(result.exception)
    return result.output


TINY = dataclasses.replace(problems.FIELDS["toy"], name="tiny", hidden=(12, 10, 8), batch=20)
TINY_NOISY = dataclasses.replace(problems.FIELDS["power"], name="tiny-noisy", hidden=(12, 10), batch=20)


@pytest.fixture
def tiny_fields(monkeypatch):
    monkeypatch.setitem(problems.FIELDS, "tiny", TINY)
    monkeypatch.setitem(problems.FIELDS, "tiny-noisy", TINY_NOISY)


def test_info_prints_facts_and_json():
    assert "torch.version" in run("info")
    facts = json.loads(run("info", "--json"))
    assert facts["torch"]["version"] == torch.__version__
    assert set(facts["rates"]) == {"multiply-adds", "tanh", "softplus", "sigmoid"}


def test_data_commands(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEFLOW_CACHE", str(tmp_path))
    listed = run("data", "list")
    assert "photos" in listed and "not fetched" in listed
    assert run("data", "path").strip() == str(tmp_path)
    assert "needs no download" in run("data", "fetch", "moons", code=1)
    assert "is not one of" in run("data", "fetch", "nothing", code=1)


@pytest.mark.parametrize("arguments, word", [
    (["--fields", "nothing"], "--fields: 'nothing' is not one of"),
    (["--peers", "nothing"], "--peers: 'nothing' is not one of"),
    (["--keeps", "0.1,x"], "--keeps: '0.1,x' is not a list of numbers"),
    (["--keeps", "1.5"], "must lie in (0, 1]"),
])
def test_bench_refuses_bad_arguments(arguments, word):
    assert word in run("bench", *arguments, code=1)


def test_bench_writes_every_figure(tiny_fields, tmp_path):
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    printed = run("bench", "--quick", "--fields", "tiny,tiny-noisy", "--keeps", "1,0.3", "--peers", "torch.csr",
                  "--json", str(out), "--plot", str(picture))
    assert "tiny-noisy" in printed and "torch.csr" in printed
    assert picture.stat().st_size > 1000
    document = json.loads(out.read_text())
    rows = document["rows"]
    assert len(rows) == 2 * 2 * 3 and {row["keep"] for row in rows} == {1.0, 0.3}
    for row in rows:
        assert row["skipped"] is None and row["rounds"] >= 2
        assert row["nfe"] >= 14 and (row["nfe"] - 2) % 6 == 0  # dopri5: 2 to start, 6 a step
        assert 0 < row["best"] <= row["median"] and row["error"] < 1e-2
        assert (row["floor"] is None) == (document["rates"]["fma"] is None)


def test_results_become_a_table_in_a_document(tiny_fields, tmp_path):
    result, readme = tmp_path / "deeper" / "bench.json", tmp_path / "README.md"
    run("bench", "--quick", "--fields", "tiny,tiny-noisy", "--keeps", "1,0.3", "--json", str(result))
    readme.write_text("before\n<!-- bench:begin (generated) -->\nold\n<!-- bench:end -->\nafter\n")
    for _ in range(2):
        run("bench", "--load", str(result), "--markdown", str(readme))
    lines = readme.read_text().splitlines()
    assert lines[:2] == ["before", "<!-- bench:begin (generated) -->"] and lines[-2:] == ["<!-- bench:end -->", "after"]
    assert "old" not in lines and sum(line.startswith("|") for line in lines) == 2 + 2
    ours = [row for row in json.loads(result.read_text())["rows"] if row["contender"] == "sparseflow"]
    for line, field in zip((line for line in lines if line.startswith("| tiny")), ("tiny", "tiny-noisy")):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        ratios = [row["ratio"] for row in ours if row["field"] == field]
        assert [float(cell.split("x")[0]) for cell in cells[3:]] == pytest.approx(ratios, rel=0.06)
    readme.write_text("no place for it\n")
    assert "needs one line" in run("bench", "--load", str(result), "--markdown", str(readme), code=1)
    assert "is not a result" in run("bench", "--load", str(_written(tmp_path / "x.json", "{}")), code=1)


def _written(path, text):
    path.write_text(text)
    return path


def test_a_peer_that_fails_is_listed_and_the_rest_goes_on():
    def fall(problem):
        raise RuntimeError("no such luck")

    broken = peers.Contender("broken", fall)
    absent = peers.Contender("absent", fall, needs=("a_module_nobody_has",))
    problem = problems.make_problem(TINY, 0.5)
    rows = bench.bench_problem(problem, [peers.BASELINE, peers.OURS, broken, absent], seconds=0.0, most=2)
    assert [row.skipped for row in rows] == [None, None, "RuntimeError: no such luck", "a_module_nobody_has not installed"]


@pytest.mark.parametrize("spec", [TINY, TINY_NOISY], ids=lambda spec: spec.name)
def test_contenders_solve_the_same_problem(spec):
    problem = problems.make_problem(spec, 0.4)
    reference = peers.float64_reference(problem, spec.batch)
    for prepare in (peers.torchdiffeq_dense, peers.sparseflow, peers.torch_csr):
        assert bench.largest_error(prepare(problem)(), reference) < 2e-3


def test_problem_is_pruned_to_the_keep_ratio_at_constant_spectral_norm():
    dense, sparse = problems.make_problem(TINY, 1.0), problems.make_problem(TINY, 0.25)
    weights = [[part.weight for part in p.module.modules() if isinstance(part, torch.nn.Linear)] for p in (dense, sparse)]
    left = sum(int(w.count_nonzero()) for w in weights[1]) / sum(w.numel() for w in weights[0])
    assert left == pytest.approx(0.25, abs=0.02)
    for before, after in zip(*weights):
        spectral = [float(torch.linalg.matrix_norm(w, 2)) for w in (before, after)]
        assert spectral[0] == pytest.approx(spectral[1], rel=1e-4)
    assert torch.equal(dense.x, sparse.x)


def test_work_counts_live_weights_and_neurons():
    field = compile_field(problems.make_problem(TINY, 1.0).module)
    work = Work.of(field.vector_field, field.divergence_plan("hutchinson"))
    weights = 2 * 12 + 12 * 10 + 10 * 8 + 8 * 2
    assert work.multiply_adds == weights + 12 * 10 + 10 * 8  # the probe passes the hidden matrices only
    assert work.activations == {"tanh": 12 + 10 + 8}


def test_demo_runs_and_resumes(tmp_path):
    for module in ("matplotlib", "sklearn", "PIL"):
        pytest.importorskip(module)
    first = run("demo", "--quick", "--out", str(tmp_path))
    assert "trained before" not in first
    document = json.loads((tmp_path / "demo.json").read_text())
    dense, pruned, control = document["figures"]["flows"]
    assert pruned["parameters"] < dense["parameters"] == control["parameters"]
    assert dense["steps"] < pruned["steps"] == control["steps"]
    solves = document["figures"]["solves"]
    assert [(s["solver"], s["name"]) for s in solves] == [
        (solver, flow["name"]) for flow in (control, pruned) for solver in ("torchdiffeq", "sparseflow")
    ]
    assert all(s["nfe"] >= 14 and s["ratio"] > 0 for s in solves) and solves[0]["ratio"] == 1
    assert (tmp_path / "densities.png").read_bytes().startswith(b"\x89PNG")
    again = run("demo", "--quick", "--out", str(tmp_path))
    assert again.count("trained before") >= 4  # progress lines: of both data sets, dense and pruned
    resumed = json.loads((tmp_path / "demo.json").read_text())
    for before, after in zip(document["figures"]["flows"], resumed["figures"]["flows"]):
        assert after["nll"] == pytest.approx(before["nll"])
    next((tmp_path / "checkpoints").rglob("*_control.safetensors")).write_bytes(b"")
    assert "not a readable checkpoint" in run("demo", "--quick", "--out", str(tmp_path), code=1)
