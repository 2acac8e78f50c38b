"""Runs the tests of the triton engine in Triton's interpreter, each file in a process of its own: TRITON_INTERPRET is read
when kernels are defined, and other tests want none of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cpu_cases import isolated_environment

pytest.importorskip("triton")

FILES = ("elementwise", "matrix", "engine", "solve", "gradients", "graph")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process is interpreted already")
def test_in_the_interpreter(name):
    file = Path(__file__).with_name(f"test_triton_{name}.py")
    options = ("-q", "-x", "-p", "no:cacheprovider", "--rootdir", str(file.parents[1]))
    command = [sys.executable, "-P", "-m", "pytest", *options, str(file)]
    environment = isolated_environment(TRITON_INTERPRET="1")
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=file.parents[1])
    if run.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:
        pytest.skip(run.stdout[-300:])
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert re.search(r"\d+ passed", run.stdout), run.stdout[-1000:]
