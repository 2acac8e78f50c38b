"""The paper's experiments as a command: what would run, a tiny run from end to end, and what its figures are said to
say."""

import dataclasses
import json
import math

import numpy
import pytest
import torch
from typer.testing import CliRunner

from sparseflow_kernels import data
from sparseflow_kernels.analysis import paper, paper_cost, paper_experiments, paper_measure, paper_plots, paper_report
from sparseflow_kernels.analysis.paper import ResultError
from sparseflow_kernels.analysis.paper_experiments import STUDIES, TOYS, Analysis, Experiment, Quick, total_steps
from sparseflow_kernels.analysis.paper_measure import matthews_correlation
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
        if name == "digits_images":
            rows = torch.randint(17, (60, 64), generator=torch.Generator().manual_seed(0)).float()
            return Dataset(name, rows[:40], rows[40:50], rows[50:], shape=(1, 8, 8), levels=17)
        return toy.load(name, n=360 if name in paper_experiments.CLASSIFIED else 60)

    monkeypatch.setattr(data, "load", load)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("paper")


# ------------------------------------------------------------------------------------------------------- what would run


def test_without_options_all_that_the_paper_ran():
    runs = paper_experiments.toy_experiments()
    assert len({one.name for one in runs}) == len(runs) == 7 * 2 * 3
    assert {len(one.keeps) for one in runs} == {29}
    first = next(one for one in runs if (one.preset, one.net) == ("gaussians", "ffjord_l2_h128"))
    assert first.keeps[0] == pytest.approx(0.8) and first.keeps[-1] == pytest.approx(0.02)
    assert first.steps(14742, 0) == first.steps(14742, 7) == 1400 and first.steps_through(14742, 1) == 3 * 1400
    assert first.flow().divergence == "hutchinson" and first.flow().eval_divergence == "exact"
    powers = STUDIES["power"].runs()
    assert [len(one.keeps) for one in powers] == [8, 8] and powers[0].steps(1_659_900, 1) == 100 * 166


def test_quick_and_options_choose():
    runs = paper_experiments.toy_experiments(True)
    assert {one.preset for one in runs} == set(TOYS) and {one.method for one in runs} == {"weights"}
    assert all(min(one.keeps) <= 0.2 and one.seed == 0 for one in runs)
    chosen = paper_experiments.toy_experiments(
        True, names=["gaussians"], nets=["l4_h64"], methods=["neurons"], keeps=(0.5,), seeds=2
    )
    assert [(one.net, one.method, one.seed, one.keeps) for one in chosen] == [
        ("l4_h64", "neurons", 0, (0.5,)), ("l4_h64", "neurons", 1, (0.5,)),
    ]
    short = STUDIES["power"].runs(True)[0]
    assert short.steps(10**6, 0) == 400 and short.steps(10**6, 1) == 200 and short.flow().rtol == 1e-5


def test_every_study_of_the_paper_has_its_runs():
    sweep = STUDIES["moons-solvers"].runs(seeds=1, methods=["weights"])
    assert len(sweep) == 6 and {one.net for one in sweep} == {"l4_h32"} and len({one.name for one in sweep}) == 6
    rk4 = next(one for one in sweep if one.variant == "rk4 adjoint").flow()
    assert rk4.gradient == "adjoint" and rk4.eval().compile()(torch.zeros(3, 2)).shape == (3, 2) and rk4.method == "rk4"
    euler = next(one for one in sweep if one.variant == "euler discrete").flow().compile()
    euler(torch.zeros(3, 2))
    assert euler.stats.nfe == 79  # 80 points
    grid = STUDIES["gaussians-optimizers"].runs()
    assert len(grid) == 36 and not any(one.keeps for one in grid)
    assert {one.training()[0].lr for one in grid} == {0.05, 0.01, 0.005}
    depths = STUDIES["spirals2-depth"].runs(seeds=1)
    sizes = {one.net: sum(p.numel() for p in one.flow().parameters()) for one in depths}
    assert sizes == {"ffjord_l8_h37": 8623, "ffjord_l6_h45": 8507, "ffjord_l4_h64": 8642, "ffjord_l3_h90": 8642,
                     "ffjord_l2_h1700": 8502}
    assert all(study.runs(True) for study in STUDIES.values())
    with pytest.raises(ValueError, match="nothing stands in"):
        STUDIES["moons"].runs(stand_in=True)


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
    field = tiny().flow().vector_fields[0]
    x, found = data.load("gaussians").test[:50], paper_measure.dynamics(tiny().flow(), data.load("gaussians").test[:50])
    jacobians = torch.func.vmap(torch.func.jacrev(lambda row: field(torch.zeros(()), row[None])[0]))(x)
    assert found["lipschitz"] >= torch.linalg.svdvals(jacobians).max().item() * (1 - 1e-5)
    assert 0 < found["least_step"] <= found["mean_step"] <= 1 and dense["dynamics"]["lipschitz"] > 0
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
    page = (folder / "report.html").read_text()
    assert "(a) pruned no worse" in page and page.count("data:image/png;base64,") == 5 and "src=\"http" not in page
    drawn = {path.name for path in (folder / "plots").iterdir()}
    assert drawn == {"nll.png", "cost.png", "modes.png", "hessian.png", f"{tiny().name}.png"}
    text = report.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "| 0.700 | 12 |" in text and "\nold\n" not in text


def test_power_has_the_same_results(tmp_path):
    experiment = STUDIES["power"].runs(True)[0]
    experiment = dataclasses.replace(
        experiment, keeps=(0.5,), settings={**experiment.settings, "steps": 2, "batch": 50}, retraining={"steps": 1},
        tolerance=1e-2, analysis=dataclasses.replace(TINY, repeats=0, resolution=0),
    )
    document = paper.run(experiment, tmp_path)
    assert document["finished"] and document["entropy"] is None
    assert [record["size"] for record in document["cycles"]] == [43325, 43325 // 2]
    assert document["cycles"][1]["modes"] is None and not (tmp_path / "pictures").exists()
    (table,) = paper_report.tables([document])
    assert len(table.rows) == 2 and table.rows[1][0] == "0.500"


def test_images_are_judged_by_bits_per_dimension_and_show_samples(tmp_path):
    (experiment,) = STUDIES["digits"].runs(True, nets=["h2"], keeps=(0.5,))
    assert experiment.analysis.draws == 3 and experiment.prune_options == {} and experiment.of_images
    experiment = dataclasses.replace(
        experiment, settings={"steps": 1, "batch": 40}, retraining={"steps": 1}, model={"scales": 1, "blocks": 1},
        analysis=dataclasses.replace(experiment.analysis, resolution=2, torch_steps=0, draws=2),
    )
    document = paper.run(experiment, tmp_path, hessian=True)
    dense, pruned = document["cycles"]
    assert document["finished"] and (document["kind"], document["dim"]) == ("images", 64) and pruned["hessian"] is None
    (table,) = paper_report.tables([document])
    bits = dict(zip(table.columns, table.rows[1]))
    assert bits["bits/dim"] == f"{pruned['nll'] / 64 / math.log(2):.3f}" and 2 < float(bits["bits/dim"]) < 20
    difference = (pruned["nll"] - pruned["control"]["nll"]) / 64 / math.log(2)
    assert float(bits["less control"]) == pytest.approx(difference, abs=2e-3)
    with torch.random.fork_rng():  # the mean over draws of the noise
        torch.manual_seed(0)
        flow = experiment.flow().compile().eval()
        load = paper_measure.Measure(experiment, experiment.rows(), False)
        scores = load.scores(experiment.flow())
        torch.manual_seed(0)
        drawn = [-flow.row_nll(load.test).detach().double() for _ in range(2)]
    torch.testing.assert_close(scores, torch.stack(drawn).mean(0))
    arrays = numpy.load(paper.picture_path(tmp_path, document["name"], 1))
    assert arrays["samples"].shape == (4, 8, 8, 1) and arrays["samples"].max() <= 16
    assert "bits/dim at 0.50" in "\n".join(paper_report.verdicts([document]))
    names = [path.name for path in paper_plots.draw([document], tmp_path)]
    assert names == ["nll.png", "cost.png", f"{document['name']}.png"]
    assert paper_report.summary([document])[document["title"]]["dim"] == 64


def test_a_classifier_is_judged_by_its_error(tmp_path):
    runs = STUDIES["moons"].runs(nets=["l2_h8"], keeps=(0.6,), seeds=1)
    short = {"settings": {"epochs": 6}, "analysis": dataclasses.replace(TINY, repeats=0)}
    runs = [dataclasses.replace(one, **short) for one in runs]
    assert [one.method for one in runs] == ["weights", "neurons"]
    seen = []
    first, second = (paper.run(one, tmp_path, progress=seen.append) for one in runs)
    trained = [(facts["cycle"], facts["control"]) for facts in seen if "step" in facts and facts["step"] == 1]
    assert trained == [(0, False), (1, False), (1, True), (1, False)]  # dense and control once for both methods
    assert first["cycles"][0]["nll"] == second["cycles"][0]["nll"]
    assert first["cycles"][1]["control"]["error"] == second["cycles"][1]["control"]["error"]
    rows = len(data.load("moons").train)
    assert sum(total_steps(runs, {"moons": rows}).values()) == sum("step" in facts for facts in seen)
    flow, test = runs[0].flow(), data.load("moons").test
    error = (flow.predict(test) != data.load("moons").test_labels).float().mean()
    assert first["cycles"][0]["error"] < error  # it has learned
    assert {"probability", "vectors", "ends"} <= set(numpy.load(paper.picture_path(tmp_path, first["name"], 1)))
    (table, _) = paper_report.tables([first, second])
    assert table.columns[3] == "error %" and table.rows[0][3] == f"{100 * first['cycles'][0]['error']:.2f}"
    assert paper_report.summary([first])["moons l2_h8 weights"]["error"] == [
        [pytest.approx(record["error"], rel=1e-4) for record in first["cycles"]]
    ]


def test_matthews_correlation_is_that_of_two_classes():
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0])
    told = torch.tensor([0, 0, 1, 1, 1, 0, 1, 0])
    both, none, false, missed = 3, 3, 1, 1
    by_hand = (both * none - false * missed) / math.sqrt(4 * 4 * 4 * 4)
    assert matthews_correlation(told, labels, 2) == pytest.approx(by_hand)
    assert matthews_correlation(labels, labels, 2) == 1 and matthews_correlation(labels * 0, labels, 2) == 0


def test_a_training_that_fails_ends_the_run_and_says_so(monkeypatch, tmp_path):
    def failing(*arguments, **options):
        yield next(real(*arguments, **options))
        raise NonFiniteLossError("10 training steps in a row failed")

    real = paper.sparse_flow
    monkeypatch.setattr(paper, "sparse_flow", failing)
    document = paper.run(tiny(keeps=(0.5,)), tmp_path)
    assert not document["finished"] and "in a row" in document["stopped"]
    assert paper_report.claim([document], "dense").verdict == "not decided"
    assert "stopped after 0 prune ratios: 10 training steps" in paper_report.closing([document])[0]


# ------------------------------------------------------------------------------------------------ what the figures say


def made(differences, name="gaussians", keeps=(0.6, 0.3, 0.2, 0.1), seed=0, kind="density") -> dict:
    """A document whose differences from the dense net and from the control are these, in nats; of classifiers, of the
    errors, which are told in percent."""
    records = [{"index": 0, "keep": 1.0, "prune_ratio": 0.0, "versus_dense": {"nats": 0.0}, "versus_control": None,
                "error": 0.0, "control": None}]
    for index, (keep, nats) in enumerate(zip(keeps, differences), 1):
        error = None if nats is None else nats
        records.append({"index": index, "keep": keep, "prune_ratio": 1 - keep, "versus_dense": {"nats": nats},
                        "versus_control": {"nats": nats}, "error": error, "control": {"error": 0.0}})
    return {"name": f"{name}-seed{seed}", "title": name, "kind": kind, "cycles": records,
            "experiment": {"preset": name, "keeps": list(keeps), "seed": seed}}


def seeds(*differences, **options) -> list[dict]:
    return [made(one, seed=seed, **options) for seed, one in enumerate(differences)]


@pytest.mark.parametrize("kind", ["density", "classification"])
def test_a_claim_is_judged_by_means_over_seeds_and_their_spread(kind):
    # at every claimed ratio the two seeds are 0.02 apart: s = 0.02 / sqrt(2), the error of a mean of two is 0.01
    held = paper_report.claim(seeds((-0.11, -0.01, 0.009, 3.0), (-0.09, 0.01, 0.029, 3.0), kind=kind), "dense")
    assert held.verdict == "holds" and (held.cycles, held.better, held.worse, held.missing) == (3, 1, 0, 0)
    scale = 1 if kind == "density" else 100
    assert held.worst == pytest.approx((0.8, 0.019 * scale, 0.01 * scale)) and held.reach == pytest.approx(0.8)
    assert held.unit == ("nats" if kind == "density" else "points") and str(held).startswith("holds (2 seeds, 3 prune")
    failed = paper_report.claim(seeds((-0.11, 0.011, 0.0), (-0.09, 0.031, 0.02), kind=kind), "control")
    assert failed.verdict == "does not hold" and failed.worse == 1 and failed.reach == pytest.approx(0.4)
    assert "worse at 1" in str(failed)


def test_one_seed_decides_nothing_and_what_is_missing_or_not_finite_never_holds():
    alone = paper_report.claim([made((-0.1, -0.1, -0.1))], "dense")
    assert alone.verdict == "not decided" and "not decided by one seed" in str(alone)
    unfinished = paper_report.claim(seeds((-0.1, -0.1, -0.1), (-0.1,)), "dense")
    assert unfinished.verdict == "not decided" and unfinished.missing == 2 and "2 not finished" in str(unfinished)
    broken = paper_report.claim(seeds((-0.1, None, -0.1), (-0.1, -0.1, -0.1)), "dense")
    assert broken.verdict == "does not hold" and broken.worst[1] == math.inf
    assert "no cycle was finished" in str(paper_report.claim([made(())], "dense"))


def test_verdicts_are_given_per_data_set():
    good, bad = seeds((-0.1,) * 3, (-0.1,) * 3), seeds((0.5,) * 3, (0.5,) * 3, name="spirals2")
    lines = paper_report.verdicts([*good, *bad])
    assert lines[0].startswith("gaussians: (a)") and "holds in 1, does not hold in 0, not decided in 0 of 1" in lines[0]
    assert any(line.startswith("spirals2: (b)") and "holds in 0, does not hold in 1" in line for line in lines)


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
    monkeypatch.setattr(paper_experiments, "QUICK", {("gaussians", ""): Quick((0.5,), 1, 1)})
    monkeypatch.setattr(paper_experiments, "QUICK_ANALYSIS", TINY)
    arguments = ["--data", "gaussians", "--net", "cnf_l2_h8", "--folder", str(tmp_path), "--jobs", "1"]
    printed = command("toy", "--quick", *arguments)
    assert "paper toy: " in printed and "nll " in printed and "ms/step" in printed and "finished" in printed
    assert "gaussians cnf_l2_h8 weights" in printed and "(b) pruned no worse than the unpruned control" in printed
    (document,) = paper.read_results(tmp_path)
    assert document["finished"] and document["build"]["torch"]["version"] == torch.__version__


def test_every_experiment_is_listed_and_says_beforehand_what_it_takes(monkeypatch):
    printed = command("list")
    assert all(name in printed for name in STUDIES)
    assert "is no experiment" in command("run", "nothing", code=1)
    monkeypatch.setattr(paper_cost, "step_seconds", lambda experiment: 3.6)
    choice = ["--net", "l2_h3", "--seeds", "1", "--keeps", "0.5,0.2", "--method", "weights"]
    said = command("run", "moons", "--dry-run", *choice)
    steps = 5 * 50 * 3  # 324 training rows in batches of 128; dense, and two cycles with their control
    assert f"moons: 1 run, {steps} training steps, about {steps * 3.6 * paper_cost.GROWTH / 60:.0f} minutes" in said


def test_power_that_is_not_fetched_says_how(monkeypatch):
    def absent(name, download=False):
        raise FileNotFoundError("POWER is not in the cache")

    monkeypatch.setattr(data, "load", absent)
    assert "POWER is not in the cache" in command("power", "--quick", code=1)
