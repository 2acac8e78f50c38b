"""The command line, in its quickest settings, as a user without a terminal sees it."""

import inspect
import json
import re
import subprocess
import sys
import typing

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import sparseflow_kernels
from sparseflow_kernels import data
from sparseflow_kernels.cli import bench as bench_command
from sparseflow_kernels.cli import console
from sparseflow_kernels.cli import demo as demo_command
from sparseflow_kernels.cli import paper as paper_command
from sparseflow_kernels.cli import train as train_command
from sparseflow_kernels.cli.main import app


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "250"})
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


# ------------------------------------------------------------------------------------------------------------- options


def commands(group=app, words=()):
    """(words of the command with what it requires, its parameters' annotations by name)."""
    required = {"preset": ["gaussians"], "checkpoint": ["."], "keep": ["--keep", "0.5"], "name": ["moons"]}
    for one in group.registered_commands:
        hints = typing.get_type_hints(one.callback, include_extras=True)
        parameters = inspect.signature(one.callback).parameters
        needed = [word for name in parameters for word in required.get(name, ())]
        yield [*words, one.name or one.callback.__name__, *needed], {name: hints[name] for name in parameters}
    for inner in group.registered_groups:
        yield from commands(inner.typer_instance, (*words, inner.name))


def numeric_options():
    for words, hints in commands():
        for name, hint in hints.items():
            plain = typing.get_args(hint)[0] if hasattr(hint, "__metadata__") else hint
            for kind in (int, float):
                if kind is plain or kind in typing.get_args(plain):  # the latter: Optional
                    option = f"--{name.replace('_', '-')}"
                    yield pytest.param(words, option, kind, id=f"{' '.join(words)} {option}")


@pytest.mark.parametrize("words, option, kind", list(numeric_options()))
def test_every_number_has_bounds_and_is_named(words, option, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    absurd = ["1e300", "nan", "inf"] if kind is float else ["9" * 30]
    if option == "--clip":  # as large as one likes
        absurd.remove("1e300")
    zero = [] if option in ("--seed", "--retrain") else ["0"]
    for value in ["-1", "-7", *zero, *absurd]:
        assert f"error: {option} must be a " in run(*words, option, value, code=1), value
    assert list(tmp_path.iterdir()) == []


def test_the_numbers_that_were_asked_for_are_among_them():
    names = {(parameter.values[0][0], parameter.values[1]) for parameter in numeric_options()}
    assert {("train", "--tolerance"), ("train", "--rows"), ("sweep", "--jobs"), ("bench", "--seconds")} <= names
    assert len(names) >= 19


@pytest.mark.parametrize("words", [words for words, _ in commands()], ids=" ".join)
def test_help_shows_every_default(words):
    options = re.split(r"^│ (?=\*? *--)", run(*words, "--help"), flags=re.MULTILINE)[1:]
    shown = [option for option in options if "--help " not in option.split("\n")[0]]
    assert shown or words[0] == "data" or words[-1] == "list"
    assert all("[default: " in option or "[required]" in option for option in shown), shown


def test_both_methods_have_one_word(monkeypatch, tmp_path):
    chosen = []

    def jobs(first, methods, *others):
        chosen.append(methods)
        raise ValueError("enough")

    monkeypatch.setattr(train_command, "sweep_jobs", jobs)
    for method in ("both", "weights,neurons", "weights,weights"):
        run("sweep", "gaussians", "--net", "cnf_l2_h8", "--method", method, "--folder", tmp_path, code=1)
    assert chosen == [("weights", "neurons"), ("weights", "neurons"), ("weights",)]
    assert "--method must be weights, neurons or both" in run("sweep", "gaussians", "--method", "all", code=1)


# --------------------------------------------------------------------------------------------------- data that is wrong


def test_missing_power_names_the_command_that_fetches_it(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEFLOW_CACHE", str(tmp_path / "cache"))
    for arguments in (["train", "power", "--folder", tmp_path / "runs"], ["paper", "power", "--quick"]):
        assert "`sparseflow data fetch power`" in run(*arguments, code=1)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_file_of_rows_is_said_in_a_sentence_and_leaves_nothing(tmp_path):
    rows = np.random.default_rng(0).normal(size=(40, 2))
    good = {"train": rows, "val": rows, "test": rows}
    hole = rows.copy()
    hole[7, 1] = np.nan

    def npz(name, **arrays):
        np.savez(tmp_path / name, **{**good, **arrays})
        return tmp_path / name

    whole = npz("good.npz").read_bytes()
    (tmp_path / "text.npz").write_text("x,y\n1,2\n")
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "half.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "flipped.npz").write_bytes(whole[:400] + bytes([whole[400] ^ 1]) + whole[401:])
    np.savez(tmp_path / "other.npz", x=rows)
    with open(tmp_path / "array.npz", "wb") as file:
        np.save(file, rows)
    (tmp_path / "folder.npz").mkdir()
    for path, words in {
        tmp_path / "absent.npz": "does not exist",
        tmp_path / "folder.npz": "is a folder",
        tmp_path / "text.npz": "is no .npz file, or a damaged one",
        tmp_path / "empty.npz": "is no .npz file, or a damaged one",
        tmp_path / "half.npz": "is no .npz file, or a damaged one",
        tmp_path / "flipped.npz": "damaged",
        tmp_path / "array.npz": "is no .npz file, or a damaged one",
        tmp_path / "other.npz": "has no array test, train, val; it has x",
        npz("objects.npz", val=np.array([[1, None]], dtype=object)): "array val holds Python objects, not numbers",
        npz("words.npz", val=np.array([["a", "b"]])): "array val must hold real numbers, not <U1",
        npz("complex.npz", val=rows + 1j): "array val must hold real numbers, not complex128",
        npz("flat.npz", test=rows[:, 0]): "train, val and test must be [n, dim], got [[40, 2], [40, 2], [40]]",
        npz("wide.npz", test=rows[:, [0, 0, 1]]): "train, val and test must be [n, dim]",
        npz("none.npz", train=rows[:0]): "array train is empty",
        npz("hole.npz", train=hole): "array train has NaN or infinite entries in 1 of 40 rows: 7",
        npz("huge.npz", test=rows * 1e300): "array test has NaN or infinite entries in 40 of 40 rows: 0, 1, 2, 3, 4, 5, 6, 7, ...",
        npz("dim3.npz", **{part: rows[:, [0, 1, 1]] for part in good}): "rows of 3 numbers, and the net of experiment",
    }.items():
        printed = run("train", "gaussians", "--net", "cnf_l2_h8", "--data", path, "--folder", tmp_path / "run", code=1)
        assert words in printed and path.name in printed and printed.count("\n") == 1, printed
        assert not (tmp_path / "run").exists()
    assert "takes 2" in run("train", "gaussians", "--data", "digits", "--folder", tmp_path / "run", code=1)
    assert "must be an .npz file or one of" in run("train", "gaussians", "--data", "rows.csv", code=1)


# ------------------------------------------------------------------------------------------------------------- Ctrl-C


def test_ctrl_c_says_how_to_go_on_everywhere(monkeypatch, tmp_path):
    def interrupted(*arguments, **named):
        raise KeyboardInterrupt

    net = ["gaussians", "--net", "cnf_l2_h8", "--rows", "100", "--eval-rows", "50", "--epochs", "1"]
    run("train", *net, "--folder", tmp_path / "dense")
    for place, name, arguments, kept in [
        (train_command, "run_jobs", ["train", *net, "--folder", tmp_path / "a"], "every finished epoch is in"),
        (train_command, "run_jobs", ["sweep", *net, "--folder", tmp_path / "b"], "every finished epoch is in"),
        (train_command, "prune_cycle_", ["prune", tmp_path / "dense", "--keep", "0.5"], "what was finished is in"),
        (train_command, "fit", ["prune", tmp_path / "dense", "--keep", "0.5", "--retrain", "1"], "every finished"),
        (train_command, "_job", ["train", *net], "stopped. To go on"),
        (demo_command, "sparse_flow", ["demo", "--quick", "--out", tmp_path / "c"], "every finished epoch is in"),
        (paper_command.experiments, "run", ["paper", "toy", "--quick", "--jobs", 1, "--folder", tmp_path], "every"),
        (bench_command.benchmark, "bench", ["bench", "--quick"], "nothing is kept. To measure anew"),
        (bench_command.benchmark, "bench", ["bench", "--quick", "--json", "x.json"], "finished are in x.json"),
        (bench_command, "kernel_share", ["bench", "--kernels", "--quick"], "nothing is kept. To measure anew"),
        (data, "load", ["data", "fetch", "power"], "the cache is as it was before. To go on"),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(place, name, interrupted)
            patch.setattr("sys.argv", ["/somewhere/bin/sparseflow", *map(str, arguments)])
            printed = run(*arguments, code=130)
        assert kept in printed and "run the same command again:\n  sparseflow " in printed, printed
        assert printed.rstrip().endswith(" ".join(map(str, arguments))) and "Traceback" not in printed


# --------------------------------------------------------------------------------------------------------- 80 columns


@pytest.mark.parametrize("columns, rows", [
    (("keep", "name"), [("1", "a" * 200)]),  # nothing can be folded between words
    (("what", "value"), [("cpu.flags", " ".join(["-fno-trapping-math"] * 9)), ("cuda", "")]),
    (("keep", "contender", "nnz", "NFE", "ms/step", "best ms", "us/NFE", "ratio", "ratio/NFE", "floor share", "gradient error"),
     [("0.1", "torchdiffeq-adjoint", "8448", "38 + 56", "274.32", "265.06", "7219.0", "1.0", "1.0", "n/a", "2.1e-06")]),
    (("flow", "NLL"), [("dense", "-79.9")]),
])  # fmt: skip
def test_tables_fit_80_columns(monkeypatch, capsys, columns, rows):
    monkeypatch.setenv("COLUMNS", "80")
    title = "a title that is longer than its table, and than a line: " + "words " * 10
    console.show_table(title, columns, rows)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    shown = "".join("".join(lines).split())
    assert "…" not in shown and title.replace(" ", "") in shown
    for cell in (*columns, *(cell for row in rows for cell in row)):
        for piece in re.findall(r"[^\s/-]+", cell) if len(cell) < 80 else ():
            assert piece in shown
    assert shown.count("a") >= 200 or len(rows[0][1]) < 200


def test_piped_tables_are_a_line_a_row(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    console.show_table("title", ("name", "figure"), [("a" * 100, "-1.5"), ("b", "22")])
    assert capsys.readouterr().out.splitlines()[2:] == ["a" * 100 + "    -1.5", "b" + " " * 105 + "22"]


def test_version_and_completion():
    assert run("--version").strip() == f"sparseflow_kernels {sparseflow_kernels.__version__}"
    assert "--install-completion" in run("--help")
    done = subprocess.run([sys.executable, "-m", "sparseflow_kernels", "--version"], capture_output=True, text=True)
    assert done.stdout == run("--version")
