"""The command line, in its quickest settings, as a user without a terminal sees it."""

import json

import pytest
import torch
from typer.testing import CliRunner

from sparseflow_kernels.cli.main import app


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output + str(result.exception)
    return result.output


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
