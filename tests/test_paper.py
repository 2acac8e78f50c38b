"""The paper's experiments as a command: what would run, a tiny run from end to end, and what its figures are said to
say."""

import dataclasses
import json
import math

import pytest
import torch
from typer.testing import CliRunner

from sparseflow_kernels import data
from sparseflow_kernels.analysis import paper, paper_report
from sparseflow_kernels.analysis.paper import Analysis, Experiment, ResultError
from sparseflow_kernels.cli.paper import app
from sparseflow_kernels.data import toy
from sparseflow_kernels.data.dataset import Dataset
from sparseflow_kernels.training import NonFiniteLossError

TINY = Analysis(
    test_rows=100, samples=200, repeats=2, hessian_rows=30, hessian_steps=4, hessian_probes=2, resolution=10,
    torch_steps=2,
)


def tiny(**changes) -> Experiment:
    settings = {"epochs": 2, "batch": 100}
    experiment = Experiment("gaussians", "cnf_l2_h8", "weights", 0, (0.6, 0.3), settings, {"epochs": 1}, 1e-3, TINY)
    return dataclasses.replace(experiment, **changes)


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    def load(name, **options):
        if name == "power":
            rows = torch.randn(600, 6, generator=torch.Generator().manual_seed(0))
            return Dataset("power", rows[:400], rows[400:450], rows[450:])
        return toy.load(name, n=60)

    monkeypatch.setattr(data, "load", load)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("paper")


# ------------------------------------------------------------------------------------------------------- what would run


def test_without_options_all_that_the_paper_ran():
    runs = paper.toy_experiments()
    assert len({one.name for one in runs}) == len(runs) == 7 * 2 * 3
    assert {len(one.keeps) for one in runs} == {29}
    first = next(one for one in runs if (one.preset, one.net) == ("gaussians", "ffjord_l2_h128"))
    assert first.keeps[0] == pytest.approx(0.8) and first.keeps[-1] == pytest.approx(0.02)
    assert first.steps(14742, 0) == first.steps(14742, 7) == 1400 and first.steps_through(14742, 1) == 3 * 1400
    assert first.flow().divergence == "hutchinson" and first.flow().eval_divergence == "exact"
    powers = paper.power_experiments()
    assert [len(one.keeps) for one in powers] == [8, 8] and powers[0].steps(1_659_900, 1) == 100 * 166


def test_quick_and_options_choose():
    runs = paper.toy_experiments(True)
    assert {one.preset for one in runs} == set(paper.TOYS) and {one.method for one in runs} == {"weights"}
    assert all(min(one.keeps) <= 0.2 and one.seed == 0 for one in runs)
    chosen = paper.toy_experiments(
        True, names=["gaussians"], nets=["l4_h64"], methods=["neurons"], keeps=(0.5,), seeds=2
    )
    assert [(one.net, one.method, one.seed, one.keeps) for one in chosen] == [
        ("l4_h64", "neurons", 0, (0.5,)), ("l4_h64", "neurons", 1, (0.5,)),
    ]
    short = paper.power_experiments(True)[0]
    assert short.steps(10**6, 0) == 400 and short.steps(10**6, 1) == 200 and short.flow().rtol == 1e-5


def test_a_flow_follows_from_its_seed():
    def start(seed):
        return torch.cat([p.detach().flatten() for p in tiny(seed=seed).flow().parameters()])

    assert torch.equal(start(3), start(3)) and not torch.equal(start(3), start(4))


# --------------------------------------------------------------------------------------------------------- a tiny run


def test_a_run_measures_every_cycle_and_its_control(folder):
    seen = []
    document = paper.run(tiny(), folder, hessian=True, progress=seen.append)
    assert document["finished"] and document["stopped"] is None
    assert document == json.loads(paper.result_path(folder, tiny()).read_text())
    assert [record["keep"] for record in document["cycles"]] == [1.0, 0.6, 0.3]
    assert [record["size"] for record in document["cycles"]] == [42, 25, 12]
    steps = {(facts["cycle"], facts["control"]): facts["steps"] for facts in seen if "step" in facts}
    rows = len(data.load("gaussians").train)
    assert steps == {
        (index, control): tiny().steps(rows, index)
        for index in range(3) for control in ((False, True) if index else (False,))
    }
    assert [facts["done"] for facts in seen if "analysis" in facts][-1] == sum(steps.values())
    dense, *pruned = document["cycles"]
    assert dense["versus_dense"]["nats"] == 0 and dense["control"] is None
    for record in pruned:
        own, control = record["nll"], record["control"]["nll"]
        assert record["versus_control"]["nats"] == pytest.approx(own - control, abs=1e-9)
        assert record["versus_dense"]["nats"] == pytest.approx(own - dense["nll"], abs=1e-9)
        assert record["versus_control"]["error"] > 0 and record["live_size"] <= record["size"]
        assert record["hessian"]["size"] <= record["size"] and record["control"]["hessian"]["size"] == 42
        assert record["modes"]["modes"] == 6 and record["steps"] == tiny().steps(rows, 1)
        assert record["step_seconds"] > 0 and record["control"]["step_seconds"] > 0 and record["nfe"] >= 8
    assert document["torch"]["measured_steps"] == 2 and document["torch"]["step_seconds"] > 0


def test_what_is_reported_is_exact_whatever_the_flow_trains_with(tmp_path):
    values = []
    for draw in range(2):  # of Hutchinson noise in the analysis, if there were any
        torch.manual_seed(draw)
        document = paper.run(tiny(net="ffjord_l2_h8", keeps=(0.5,)), tmp_path / str(draw))
        values.append([(record["nll"], record["versus_control"]) for record in document["cycles"]])
    assert values[0] == values[1]


def test_a_second_call_trains_nothing_and_finds_the_same(folder):
    path = paper.result_path(folder, tiny())
    before, seen = path.read_text(), []
    again = paper.run(tiny(), folder, hessian=True, progress=seen.append)
    assert not any("step" in facts for facts in seen) and path.read_text() == before
    path.unlink()  # checkpoints alone are enough to measure anew
    anew = paper.run(tiny(), folder, hessian=True, progress=seen.append)
    assert not any("step" in facts for facts in seen)
    for record, other in zip(again["cycles"], anew["cycles"]):
        assert record == other
    assert again["torch"] is not None and anew["torch"] is not None


def test_another_run_is_refused(folder):
    with pytest.raises(ResultError, match="is of another run \\(differing: tolerance\\)"):
        paper.run(tiny(tolerance=1e-2), folder)
    with pytest.raises(ResultError, match="is not a result"):
        (folder / "other.json").write_text("{}")
        paper.read_result(folder / "other.json")


def test_what_a_killed_process_was_writing_is_not_read_and_damage_is_named(folder):
    path = paper.result_path(folder, tiny())
    whole = path.read_text()
    part = path.with_name(f".{path.name}.abc.json")
    part.write_text(whole[:100])
    assert [document["name"] for document in paper.read_results(folder)] == [tiny().name]
    part.unlink()
    for damage in (whole[:100], "", "[]", '{"format": "sparseflow-paper-1"}'):
        path.write_text(damage)
        with pytest.raises(ResultError, match="json is .*delete it: it is measured again"):
            paper.run(tiny(), folder)
    path.write_text(whole)


def test_tables_and_pictures_come_from_the_files(folder):
    pytest.importorskip("matplotlib")
    report = folder / "report.md"
    report.write_text("before\n<!-- paper-toy:begin -->\nold\n<!-- paper-toy:end -->\nafter\n")
    arguments = ["toy", "--redraw", "--folder", str(folder), "--markdown", str(report)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output + str(result.exception)
    assert "gaussians: (a) pruned no worse" in result.output and "gaussians: (b)" in result.output
    assert "dense in torch, from 2 measured steps" in result.output
    drawn = {path.name for path in (folder / "plots").iterdir()}
    assert drawn == {"nll.png", "cost.png", "modes.png", "hessian.png", f"{tiny().name}.png"}
    text = report.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "| 0.700 | 12 |" in text and "\nold\n" not in text


def test_power_has_the_same_results(tmp_path):
    experiment = paper.power_experiments(True)[0]
    experiment = dataclasses.replace(
        experiment, keeps=(0.5,), settings={**experiment.settings, "steps": 2, "batch": 50}, retraining={"steps": 1},
        tolerance=1e-2, analysis=dataclasses.replace(TINY, repeats=0, resolution=0),
    )
    document = paper.run(experiment, tmp_path)
    assert document["finished"] and document["entropy"] is None
    assert [record["size"] for record in document["cycles"]] == [43325, 43325 // 2]
    assert document["cycles"][1]["modes"] is None and not (tmp_path / "pictures").exists()
    (rows,) = paper_report.table([document]).values()
    assert len(rows) == 2 and rows[1][0] == "0.500"


def test_a_training_that_fails_ends_the_run_and_says_so(monkeypatch, tmp_path):
    def failing(*arguments, **options):
        yield next(real(*arguments, **options))
        raise NonFiniteLossError("10 training steps in a row failed")

    real = paper.sparse_flow
    monkeypatch.setattr(paper, "sparse_flow", failing)
    document = paper.run(tiny(keeps=(0.5,)), tmp_path)
    assert not document["finished"] and "in a row" in document["stopped"]
    assert not paper_report.claim(document, "dense").held
    assert "stopped after 0 prune ratios: 10 training steps" in paper_report.closing([document])[0]


# ------------------------------------------------------------------------------------------------ what the figures say


def made(differences, name="gaussians", keeps=(0.6, 0.3, 0.2, 0.1)) -> dict:
    records = [{"index": 0, "keep": 1.0, "prune_ratio": 0.0, "versus_dense": {"nats": 0.0, "error": 0.0},
                "versus_control": None}]
    for index, (keep, (nats, error)) in enumerate(zip(keeps, differences), 1):
        versus = {"nats": nats, "error": error}
        records.append({"index": index, "keep": keep, "prune_ratio": 1 - keep, "versus_dense": versus,
                        "versus_control": versus})
    return {"name": name, "experiment": {"preset": name, "keeps": list(keeps)}, "cycles": records}


def test_a_claim_holds_within_twice_the_error_down_to_a_prune_ratio_of_80_percent():
    held = paper_report.claim(made([(-0.1, 0.01), (0.0, 0.01), (0.019, 0.01), (3.0, 0.01)]), "dense")
    assert held.held and (held.cycles, held.better, held.worse, held.missing) == (3, 1, 0, 0)
    assert held.worst == (pytest.approx(0.8), 0.019, 0.01) and str(held).startswith("holds (3 prune ratios up to 0.8")
    failed = paper_report.claim(made([(-0.1, 0.01), (0.021, 0.01), (0.0, 0.01), (0.0, 0.01)]), "control")
    assert not failed.held and failed.worse == 1 and "does not hold" in str(failed) and "at 0.70" in str(failed)


def test_what_is_missing_or_not_finite_never_holds():
    unfinished = paper_report.claim(made([(-0.1, 0.01)]), "dense")
    assert not unfinished.held and unfinished.missing == 2 and "2 not finished" in str(unfinished)
    broken = paper_report.claim(made([(-0.1, 0.01), (None, None), (-0.1, 0.01)]), "dense")
    assert not broken.held and broken.worst[1] == math.inf
    assert "no cycle was finished" in str(paper_report.claim(made([]), "dense"))


def test_verdicts_are_given_per_data_set():
    good, bad = made([(-0.1, 0.01)] * 3), made([(0.5, 0.01)] * 3, "spirals2")
    lines = paper_report.verdicts([good, {**good, "name": "gaussians-again"}, bad])
    assert lines[0].startswith("gaussians: (a)") and lines[0].endswith("holds in 2 of 2 runs")
    assert any(line.startswith("spirals2: (b)") and line.endswith("holds in 0 of 1 runs") for line in lines)


def test_several_seeds_are_shown_by_mean_and_deviation():
    assert paper_report.spread([1.0, 3.0, None], ".1f") == "2.0 +- 1.4"
    assert paper_report.spread([0.5], "+.2f") == "+0.50" and paper_report.spread([None], ".1f") == ""


# ------------------------------------------------------------------------------------------------------------- command


def command(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output + str(result.exception)
    return result.output


@pytest.mark.parametrize("arguments, word", [
    (["--data", "nothing"], "--data: 'nothing' is not one of gaussians"),
    (["--net", "l1_h8"], "--net: "),
    (["--method", "x"], "--method: 'x' is not one of weights, neurons, both"),
    (["--keeps", "0.5,x"], "--keeps: keep ratios must be numbers"),
    (["--keeps", "1.5"], "--keeps: every keep ratio must lie in (0, 1)"),
    (["--redraw", "--folder", "/nowhere"], "/nowhere has no results"),
])
def test_bad_options_are_refused(arguments, word):
    assert word in command("toy", *arguments, code=1)


def test_the_command_trains_tells_and_writes(monkeypatch, tmp_path):
    line = paper.Quick("gaussians", "cnf_l2_h8", (0.5,), 1, 1)
    monkeypatch.setattr(paper, "QUICK_TOYS", (line,))
    monkeypatch.setattr(paper, "QUICK_ANALYSIS", TINY)
    printed = command("toy", "--quick", "--folder", str(tmp_path), "--jobs", "1")
    assert "paper toy: " in printed and "nll " in printed and "ms/step" in printed and "finished" in printed
    assert "gaussians cnf_l2_h8 weights" in printed and "(b) pruned no worse than the unpruned control" in printed
    (document,) = paper.read_results(tmp_path)
    assert document["finished"] and document["build"]["torch"]["version"] == torch.__version__


def test_power_that_is_not_fetched_says_how(monkeypatch):
    def absent(name, download=False):
        raise FileNotFoundError("POWER is not in the cache")

    monkeypatch.setattr(data, "load", absent)
    assert "POWER is not in the cache" in command("power", "--quick", code=1)
