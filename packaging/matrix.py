"""Runs the quick tests with the wheel in dist/ on several versions of torch: `make matrix`.

    python packaging/matrix.py [torch ...]        # "2.12.0", "2.13.0", "newest"; without: the floor, the pinned, the
    newest

Each version has a virtual environment of its own in build/matrix, which is kept. Versions that the index does not have
are named and passed over; the exit status is 1 where tests fail, or where nothing could be tested.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INDEX = "https://download.pytorch.org/whl/cpu"
QUICK = ("tests/test_odeint.py", "tests/test_compiled_field.py", "tests/test_gradients.py", "tests/test_training.py")


def versions() -> list[str]:
    """torch's floor in pyproject.toml, its pin in constraints.txt, and the newest there is."""
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    floor = next(re.fullmatch(r"torch>=([\d.]+)", line) for line in needed if line.startswith("torch>"))
    pinned = re.search(r"^torch==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return [f"{floor.group(1)}.*", pinned.group(1), "newest"]


def run(version: str, wheel: Path) -> bool | None:
    """Whether the quick tests pass; None where this torch could not be installed."""
    folder = ROOT / "build" / "matrix" / version.rstrip(".*")
    if not folder.exists():
        venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    torch = "torch" if version == "newest" else f"torch=={version}"
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--extra-index-url", INDEX, "--upgrade"]
    if subprocess.run(
        [*pip, torch, f"sparseflow_kernels[cli] @ {wheel.as_uri()}", "pytest", "pytest-xdist"]
    ).returncode:
        return None
    command = [python, "-P", "-m", "pytest", "-q", "-n", "2", *QUICK]
    return subprocess.run(command, cwd=ROOT).returncode == 0


def main() -> None:
    wheels = sorted((ROOT / "dist").glob("*.whl"), key=lambda path: path.stat().st_mtime)
    if not wheels:
        sys.exit("matrix.py: dist/ has no wheel; run `make wheel` first")
    found = {version: run(version, wheels[-1]) for version in sys.argv[1:] or versions()}
    for version, passed in found.items():
        print(f"torch {version}: {'not installed' if passed is None else 'passed' if passed else 'FAILED'}")
    sys.exit(0 if True in found.values() and False not in found.values() else 1)


if __name__ == "__main__":
    main()
