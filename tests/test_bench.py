"""The benchmarks: fair problems, contenders that compute the same, and a command that writes down what it found."""

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

from sparseflow_kernels.analysis import bench, peers, problems, training_peers
from sparseflow_kernels.analysis.floor import Work, fma_rate, training_step_floor
from sparseflow_kernels.capture import capture
from sparseflow_kernels.cli.main import app
from sparseflow_kernels.compiled_field import compile as compile_field
from sparseflow_kernels.engines.cpu import CpuEngine


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "200"})  # wide: headings are not folded
    assert result.exit_code == code, result.output + str(result.exception)
    return result.output


TINY = dataclasses.replace(problems.FIELDS["toy"], name="tiny", hidden=(12, 10, 8), batch=20)
TINY_SIGMOID = dataclasses.replace(problems.FIELDS["toy-l4_h64"], name="tiny-sigmoid", hidden=(12, 10, 8), batch=20)
TINY_NOISY = dataclasses.replace(problems.FIELDS["power"], name="tiny-noisy", hidden=(12, 10), batch=20)


@pytest.fixture
def tiny_fields(monkeypatch):
    monkeypatch.setitem(problems.FIELDS, "tiny", TINY)
    monkeypatch.setitem(problems.FIELDS, "tiny-noisy", TINY_NOISY)


@pytest.mark.parametrize("arguments, word", [
    (["--fields", "nothing"], "--fields: 'nothing' is not one of"),
    (["--train", "--peers", "torch.csr"], "--peers: 'torch.csr' is not one of"),
    (["--peers", "nothing"], "--peers: 'nothing' is not one of"),
    (["--keeps", "0.1,x"], "--keeps: '0.1,x' is not a list of numbers"),
    (["--keeps", "1.5"], "must lie in (0, 1]"),
])
def test_bench_refuses_bad_arguments(arguments, word):
    assert word in run(*arguments, code=1)


def test_bench_writes_every_figure(tiny_fields, tmp_path):
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    printed = run("--quick", "--fields", "tiny,tiny-noisy", "--keeps", "1,0.3", "--peers", "torch.csr",
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
    run("--quick", "--fields", "tiny,tiny-noisy", "--keeps", "1,0.3", "--json", str(result))
    readme.write_text("before\n<!-- bench:begin (generated) -->\nold\n<!-- bench:end -->\nafter\n")
    for _ in range(2):
        run("--load", str(result), "--markdown", str(readme))
    lines = readme.read_text().splitlines()
    assert lines[:2] == ["before", "<!-- bench:begin (generated) -->"] and lines[-2:] == ["<!-- bench:end -->", "after"]
    assert "old" not in lines and sum(line.startswith("|") for line in lines) == 2 + 2
    ours = [row for row in json.loads(result.read_text())["rows"] if row["contender"] == "sparseflow"]
    for line, field in zip((line for line in lines if line.startswith("| tiny")), ("tiny", "tiny-noisy")):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        ratios = [row["ratio"] for row in ours if row["field"] == field]
        assert [float(cell.split("x")[0]) for cell in cells[3:]] == pytest.approx(ratios, rel=0.06)
    readme.write_text("no place for it\n")
    assert "needs one line" in run("--load", str(result), "--markdown", str(readme), code=1)
    assert "is not a result" in run("--load", str(_written(tmp_path / "x.json", "{}")), code=1)


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


# ----------------------------------------------------------------------------------------------------- training steps


def _name(value) -> str:
    return getattr(value, "name", str(value))


def test_train_writes_every_figure_and_a_table(tiny_fields, tmp_path):
    pytest.importorskip("matplotlib")
    out, picture, readme = tmp_path / "train.json", tmp_path / "train.png", tmp_path / "README.md"
    readme.write_text(
        "<!-- bench:begin -->\nkept\n<!-- bench:end -->\n<!-- train-bench:begin -->\n<!-- train-bench:end -->\n"
    )
    printed = run("--train", "--quick", "--fields", "tiny-noisy", "--keeps", "1,0.3", "--peers", "torchdiffeq-direct",
                  "--json", str(out), "--plot", str(picture))
    assert "gradient error" in printed and "ms/step" in printed and picture.stat().st_size > 1000
    document = json.loads(out.read_text())
    assert document["task"] == "train" and len(document["rows"]) == 2 * 3
    for row in document["rows"]:
        assert row["skipped"] is None and row["rounds"] >= 2 and 0 < row["best"] <= row["median"]
        assert row["error"] < 1e-3
        if row["contender"] == "torchdiffeq-adjoint":
            assert row["ratio"] == 1.0 and row["nfe_backward"] >= 6
        else:
            assert row["nfe_backward"] is None
        has_floor = row["contender"] == "sparseflow" and document["rates"]["fma"] is not None
        assert (row["floor"] is not None) == has_floor
    assert "gradient error" in run("--load", str(out), "--markdown", str(readme))
    lines = readme.read_text().splitlines()
    assert lines[1] == "kept" and sum(line.startswith("| ") for line in lines) == 2 + 2
    base = next(row for row in document["rows"] if row["contender"] == "torchdiffeq-adjoint" and row["keep"] == 1)
    assert any(f"{base['nfe']} + {base['nfe_backward']} evaluations" in line for line in lines)
    broken = json.loads(out.read_text()) | {"task": "dance"}
    assert "is not a result" in run("--load", str(_written(tmp_path / "x.json", json.dumps(broken))), code=1)


@pytest.mark.parametrize("spec, keep", [(TINY, 0.6), (TINY_SIGMOID, 0.15), (TINY_NOISY, 0.3)], ids=_name)
def test_contenders_find_the_same_gradient(spec, keep):
    problem = problems.make_problem(spec, keep)
    reference = training_peers.reference_gradient(problem)
    losses = set()
    for contender in (training_peers.BASELINE, training_peers.OURS, *training_peers.PEERS.values()):
        if contender.missing():
            continue
        step = contender.prepare(problem)
        for _ in range(2):  # the second one must not add to the first
            outcome = step()
            assert outcome.gradient().shape == reference.shape
            assert training_peers.relative_error(outcome.gradient(), reference) < 1e-3, contender.name
        losses.add(round(outcome.loss, 3))
    assert max(losses) - min(losses) < 2e-3


@pytest.mark.parametrize("spec, keep", [(TINY_SIGMOID, 0.15), (TINY_NOISY, 0.07)], ids=_name)
def test_trained_entries_are_found_in_every_layout(spec, keep):
    problem = problems.make_problem(spec, keep)  # neurons die, and constants are folded
    module = training_peers.trainable(problem)
    entries, field = training_peers.TrainedEntries(module, spec.dim), compile_field(module)
    assert sum(layer.out_features for layer in field.vector_field.layers) < sum(spec.hidden) + spec.dim
    with torch.no_grad():  # values that tell where they came from; zeros stay zero, or the masks would change
        for number, parameter in enumerate(module.parameters()):
            marks = 1000.0 * number + torch.arange(1.0, parameter.numel() + 1).view_as(parameter)
            parameter.copy_(torch.where(parameter == 0, 0.0, marks))
    # as if these were gradients
    of_module = entries.of_module({name: p.detach() for name, p in module.named_parameters()})
    layers = capture(module).map_tensors(torch.Tensor.detach).layers
    captured = [{"weight": layer.weight, **dict(layer.tensors())} for layer in layers]
    assert torch.equal(entries.of_captured(captured), of_module)
    assert of_module.unique().numel() == of_module.numel() > field.nnz
    renewed = compile_field(module)
    for parameter in renewed.parameters():
        parameter.grad = parameter.detach().clone()
    assert torch.equal(entries.of_field(renewed), of_module)


def test_a_step_of_ours_takes_over_the_values(monkeypatch):
    pytest.importorskip("sparseflow_kernels._cpu")
    updates = []
    update = CpuEngine.update
    monkeypatch.setattr(CpuEngine, "update", lambda self, field: updates.append(1) or update(self, field))
    step = training_peers.OURS.prepare(problems.make_problem(TINY_NOISY, 0.5))
    step()
    before = len(updates)
    step()
    step()
    assert len(updates) == before + 2


def test_floor_of_a_training_step_counts_every_pass():
    field = compile_field(problems.make_problem(TINY_NOISY, 1.0).module)
    plan = field.divergence_plan("hutchinson")
    first, middle, last = 6 * 12, 12 * 10, 10 * 6
    # gated last layer: value and tangent through all layers, but for the probe's product with the first; the same back;
    # and both for every weight's gradient
    work = Work.of_gradient(field.vector_field, plan)
    assert work.multiply_adds == 2 * (first + 2 * middle + 2 * last) + 2 * (first + middle + last)
    assert work.activations == {"tanh": 12 + 10}
    plain = compile_field(problems.make_problem(TINY_SIGMOID, 1.0).module)
    shapes = 2 * 12, 12 * 10, 10 * 8, 8 * 2
    work = Work.of_gradient(plain.vector_field, plain.divergence_plan("hutchinson"))
    forwards, backwards = 2 * sum(shapes[:3]) - shapes[0], 2 * sum(shapes) - shapes[0]
    assert work.multiply_adds == forwards + backwards + 2 * sum(shapes)
    assert Work.of_gradient(plain.vector_field, plain.divergence_plan("exact")) is None
    if fma_rate() is not None:
        counts = ((20, 3), (20, 4), (26, 4))
        floors = [training_step_floor(field.vector_field, plan, 100, nfe, steps) for nfe, steps in counts]
        assert floors[0] < floors[1] < floors[2]
        assert floors[2] - floors[1] == pytest.approx(6 * Work.of(field.vector_field, plan).floor(100))


def test_kernels_are_measured():
    pytest.importorskip("sparseflow_kernels._cpu")
    printed = run("--kernels", "--quick")
    assert "spmm" in printed and "sddmm" in printed and "density 0.1" in printed
