"""The benchmark of fields that are no flows of plain layers: fair problems, contenders that compute the same, a floor, and
rows in `sparseflow bench` that can be written down and read again."""

import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from sparseflow_kernels.analysis import bench, graph_problems, peers
from sparseflow_kernels.analysis.floor import Work, fma_rate
from sparseflow_kernels.analysis.graph_floor import GraphWork, instruction_rate
from sparseflow_kernels.analysis.graph_problems import GRAPHS, GraphSpec
from sparseflow_kernels.analysis.training_peers import relative_error
from sparseflow_kernels.capture import capture
from sparseflow_kernels.cli.main import app


def _tiny(name, shape, **sizes):
    whole = GRAPHS[name]
    outputs = min(whole.outputs, 5)
    return GraphSpec(
        f"tiny-{name}", name, tuple(sizes.items()), "small", shape, whole.gain, whole.divergence, whole.loss, outputs
    )


TINY = {
    spec.module: spec
    for spec in (
        _tiny("cfm", (6, 2), dim=2, context=3, frequencies=2, width=8),
        _tiny("resnet", (6, 4), dim=4, width=10, blocks=2),
        _tiny("gru", (6, 5), dim=5),
        _tiny("hnn", (6, 4), dim=4, width=8),
        _tiny("latent", (6, 3), dim=3, width=8),
        _tiny("points", (4, 3, 3), width=8),
        _tiny("images", (4, 16), width=3, side=4),
    )
}
each = pytest.mark.parametrize("name", TINY)


@pytest.fixture
def tiny_graphs(monkeypatch):
    for spec in TINY.values():
        monkeypatch.setitem(graph_problems.GRAPHS, spec.name, spec)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 0, result.output + str(result.exception)
    return result.output


def test_every_kind_of_field_has_a_small_one():
    assert set(TINY) == set(graph_problems.MODULES) == {spec.module for spec in GRAPHS.values()}


@each
def test_pruning_keeps_the_share_of_all_and_the_norm_of_each_matrix(name):
    dense, sparse = TINY[name].problem(1.0), TINY[name].problem(0.3)
    assert torch.equal(dense.x, sparse.x)
    kinds = nn.Linear, nn.Conv2d
    linears = [[part.weight.flatten(1) for part in p.module.modules() if isinstance(part, kinds)] for p in (dense, sparse)]
    left, whole = (sum(int(weight.count_nonzero()) for weight in weights) for weights in linears[::-1])
    assert left == pytest.approx(0.3 * whole, abs=len(linears[0]))
    for before, after in zip(*linears):
        norms = [float(torch.linalg.matrix_norm(weight, 2)) for weight in (before, after)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_narrow_layers_stay_denser():
    found = graph_problems.densities([(200, 4), (200, 200), (1, 200)], 0.1)
    assert found[0] == found[2] == 1.0 and found[1] * 40_000 == pytest.approx(0.1 * 41_000 - 1_000)
    assert graph_problems.densities([(64, 64)] * 3, 0.1) == pytest.approx([0.1] * 3)
    assert graph_problems.densities([(8, 2), (2, 8)], 1.0) == [1.0, 1.0]


@each
def test_solves_agree(name):
    problem = TINY[name].problem(0.5)
    reference = peers.float64_reference(problem, problem.spec.batch)
    for contender in (peers.BASELINE, peers.OURS, peers.PEERS["diffrax"]):
        if contender.missing():
            continue
        outcome = contender.prepare(problem)()
        assert outcome.x.shape == problem.spec.shape and outcome.nfe >= 14
        assert bench.largest_error(outcome, reference) < 3e-3, contender.name


@each
def test_gradients_agree(name):
    problem = TINY[name].problem(0.5)
    task = bench.TRAIN.of(problem.spec)
    reference, losses = task.reference(problem), set()
    for contender in (task.baseline, task.ours, *task.peers.values()):
        if contender.missing():
            continue
        step = contender.prepare(problem)
        for _ in range(2):  # the second one must not add to the first
            outcome = step()
            assert relative_error(outcome.gradient(), reference) < 3e-3, contender.name
        assert (outcome.nfe == 1) == (problem.spec.loss == "matching")
        losses.add(outcome.loss)
    assert max(losses) - min(losses) < 3e-3 * max(1.0, max(losses))
    assert float(reference.norm()) > 0


def test_a_hamiltonian_keeps_a_graph_only_where_it_is_trained():
    problem = TINY["hnn"].problem(1.0)
    module = problem.module.requires_grad_(True)
    with torch.no_grad():
        assert not module(torch.tensor(0.0), problem.x).requires_grad
    assert module(torch.tensor(0.0), problem.x).requires_grad


@each
def test_jax_fields_are_the_modules(name):
    jax = pytest.importorskip("jax")
    from sparseflow_kernels.analysis.graph_jax import JaxGraph

    problem = TINY[name].problem(0.6)
    own, (weights, _, start) = JaxGraph(problem), JaxGraph.arguments(problem)
    found = jax.device_get(own.field(weights, 0.3, start[0]))
    wanted = problem.module(torch.tensor(0.3), problem.x)
    torch.testing.assert_close(torch.from_numpy(found.copy()), wanted.detach(), rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- the floor


def test_floor_counts_what_differs_from_sample_to_sample():
    dim = 5
    work = GraphWork.of(capture(TINY["gru"].problem(1.0).module, like=TINY["gru"].problem(1.0).x))
    assert work.multiply_adds == 3 * dim * dim
    assert work.instructions == {"sigmoid": 2 * dim, "tanh": dim, "mul": 2 * dim, "sub": 2 * dim}
    problem = TINY["cfm"].problem(1.0)
    field = capture(problem.module, like=problem.x)
    hidden = 2 * 8 * 8 + 2 * 8
    work = GraphWork.of(field)
    # products with the context and with what follows from time are made once a solve and once an evaluation
    assert work.multiply_adds == 2 * 8 + hidden and work.instructions["sigmoid"] == 3 * 8
    own_times = GraphWork.of(field, time_per_sample=True)
    assert own_times.multiply_adds == (2 + 4) * 8 + hidden
    assert own_times.instructions["sin"] == own_times.instructions["cos"] == 2


def test_floor_of_a_gradient_counts_every_weight_once_more():
    problem = TINY["gru"].problem(1.0)
    field = capture(problem.module, like=problem.x)
    # the candidate's product forwards is needed for its slope, and so are those of the gates
    assert GraphWork.of_gradient(field).multiply_adds == 3 * 3 * 25
    chain = capture(TINY["latent"].problem(1.0).module)
    first, middle, last = 3 * 8, 8 * 8, 8 * 3
    assert Work.of_gradient(chain, None).multiply_adds == first + middle + 2 * (first + middle + last)


def test_rates_of_instructions_are_measured():
    if fma_rate() is None:
        assert instruction_rate("exp") is None
        return
    assert 1e6 < instruction_rate("exp") <= fma_rate()


# -------------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize("train", [False, True], ids=["solve", "train"])
def test_rows_of_every_field_are_written_and_read_again(train, tiny_graphs, tmp_path):
    out, readme = tmp_path / "bench.json", tmp_path / "README.md"
    block = "graph-train-bench" if train else "graph-bench"
    readme.write_text(f"<!-- bench:begin -->\nkept\n<!-- bench:end -->\n<!-- {block}:begin -->\n<!-- {block}:end -->\n")
    names = [spec.name for spec in TINY.values()]
    kind = ["--train"] if train else []
    run(*kind, "--quick", "--fields", ",".join(names), "--keeps", "1,0.5", "--json", str(out))
    document = json.loads(out.read_text())
    assert len(document["rows"]) == len(names) * 2 * 2
    for row in document["rows"]:
        assert row["skipped"] is None and row["rounds"] >= 2 and 0 < row["best"] <= row["median"]
        assert row["error"] < 2e-2 and row["nfe"] >= 1
        if row["contender"] == "sparseflow":
            assert (row["floor"] is None) == (document["rates"]["fma"] is None)
    rows, fields, _ = bench.load_json(out)
    assert fields == list(TINY.values()) and len(rows) == len(document["rows"])
    printed = run("--load", str(out), "--markdown", str(readme))
    assert all(spec.title in printed for spec in TINY.values())
    lines = readme.read_text().splitlines()
    assert lines[1] == "kept" and sum(line.startswith("| tiny-") for line in lines) == len(names)
    assert not train or any("torch: " in line and "1 evaluation " in line for line in lines)


def test_flows_and_other_fields_go_into_tables_of_their_own(tiny_graphs, tmp_path):
    out, readme = tmp_path / "bench.json", tmp_path / "README.md"
    readme.write_text("<!-- bench:begin -->\n<!-- bench:end -->\n<!-- graph-bench:begin -->\n<!-- graph-bench:end -->\n")
    run("--quick", "--fields", "toy,tiny-gru", "--keeps", "0.1", "--peers", "torch.csr", "--json", str(out),
        "--markdown", str(readme))
    flows, others = readme.read_text().split("<!-- bench:end -->")
    assert "| toy" in flows and "tiny-gru" not in flows and "| tiny-gru" in others and "| toy" not in others
    skipped = {row["field"]: row["skipped"] for row in json.loads(out.read_text())["rows"] if row["contender"] == "torch.csr"}
    assert skipped["toy"] is None and "chains of layers" in skipped["tiny-gru"]
