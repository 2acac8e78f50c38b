"""Runs the quick tests with the wheel in dist/ on several versions of torch.

    make matrix, or: python tools/matrix.py [torch ...]    # "2.12.0", "newest"; without: floor, pin and newest

Each version has a virtual environment of its own in build/matrix, which is kept. Versions that the index does not have
are named and passed over; the exit status is 1 where tests fail, or where nothing could be tested.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import tomllib
import urllib.request
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INDEX = "https://download.pytorch.org/whl/cpu"
# What leans on torch's inside: capture, autograd, torch.compile and export, vmap, hooks; and torchdiffeq's calls.
QUICK = ("tests/test_torch_integration.py", "tests/test_accelerate.py", "tests/test_capture.py")
# The wheel is tested, not the tree; a module's path says which it was.
FOUND = "import sparseflow_kernels as s, torch; print(torch.__version__, s.__file__, s.build_info()['cpu']['isa'])"


def versions() -> list[str]:
    """torch's floor in pyproject.toml, its pin in constraints.txt, and the newest there is."""
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    floor = next(re.fullmatch(r"torch>=([\d.]+)", line) for line in needed if line.startswith("torch>"))
    pinned = re.search(r"^torch==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return [f"{floor.group(1)}.*", pinned.group(1), "newest"]


@functools.cache
def indexes() -> list[str]:
    """pip's words for torch's index of CPU builds; none where it is silent, as pip would ask for every package."""
    try:
        urllib.request.urlopen(INDEX, timeout=10).close()
    except OSError as error:
        print(f"{INDEX} does not answer ({error}): torch comes from pip's own index", flush=True)
        return []
    return ["--extra-index-url", INDEX]


def run(version: str, wheel: Path) -> bool | None:
    """Whether the quick tests pass; None where this torch could not be installed."""
    folder = ROOT / "build" / "matrix" / version.rstrip(".*")
    if not folder.exists():
        venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    torch = "torch" if version == "newest" else f"torch=={version}"
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--upgrade", *indexes()]
    wanted = [torch, f"sparseflow_kernels[cli] @ {wheel.as_uri()}", "pytest", "pytest-xdist"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if subprocess.run([*pip, *wanted], env=environment).returncode:
        return None
    found = subprocess.run([python, "-P", "-c", FOUND], env=environment, capture_output=True, text=True)
    print(f"torch {version}: {found.stdout.strip() or found.stderr}", flush=True)
    if str(folder) not in found.stdout:
        return False
    command = [python, "-P", "-m", "pytest", "-q", "-n", os.environ.get("JOBS", "2"), *QUICK]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode == 0


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
