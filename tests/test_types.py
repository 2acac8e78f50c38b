"""What the package says of its types, and its reports in notebooks."""

import importlib.util
import pickle
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import sparseflow_kernels as sfk
from sparseflow_kernels.flows import mlp_field
from sparseflow_kernels.pruning import sparsity_report

SCRIPT = Path(__file__).with_name("typed_script.py")


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")
def test_a_users_script_is_checked_strictly(tmp_path):
    """The script's wrong calls say which error they are; strict mypy fails where one is no error, too."""
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir", str(tmp_path), str(SCRIPT)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_script_runs():
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Cells(HTMLParser):
    """The rows of all tables of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows, self.inside = [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.inside = tag in ("td", "th")
        if tag == "tr":
            self.rows.append([])
        elif self.inside:
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.rows[-1][-1] += data


class Gated(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)

    def forward(self, t, y):
        return self.a(y) * self.b(y)


@pytest.mark.parametrize("module", [mlp_field(3, (8, 8)), Gated()])
def test_reports_are_tables_in_notebooks(module):
    report = sfk.compile(module).report()
    header, *rows = Cells(report._repr_html_()).rows
    assert header[1] == "from" and len(rows) == len(report.rows) - 1
    for row in rows:
        assert "  ".join(row).split() in [line.split() for line in report.splitlines()]
    again = pickle.loads(pickle.dumps(report))
    assert again == report and again._repr_html_() == report._repr_html_()


def test_sizes_and_statistics_are_tables_in_notebooks():
    module = sfk.prune_weights_(mlp_field(3, (8, 8)), keep=0.5)
    found = sparsity_report(module)
    rows = Cells(found._repr_html_()).rows
    assert rows[-1] == ["all", "", f"{found.live}", f"{found.total}", f"{found.live / found.total:.1%}"]
    assert len(rows) == 2 + len(found.parameters)
    solution = sfk.solve(sfk.compile(module), torch.randn(5, 3), torch.tensor([0.0, 1.0]))
    told = dict(Cells(solution._repr_html_()).rows)
    assert int(told["nfe"]) == solution.stats.nfe and told["engine"] == solution.stats.engine and "steps" not in told
    assert "[2, 5, 3]" in solution._repr_html_()
