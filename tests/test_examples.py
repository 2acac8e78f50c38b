"""The scripts in examples/ run as a user would run them."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_drop_in():
    difference = run("drop_in.py").strip().rsplit(" ", 1)[-1]
    assert float(difference) < 1e-4


def test_flow():
    printed = run("flow.py", "2")
    assert "keep 0.5" in printed and "samples: [1000, 2]" in printed
