"""Builds the site into docs/_build/html: examples are tested first, notebooks run, warnings are errors; no network."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
NEEDED = {
    "sphinx": "docs",
    "furo": "docs",
    "myst_nb": "docs",
    "sphinx_copybutton": "docs",
    "matplotlib": "demo",
    "sklearn": "demo",
}


def main() -> None:
    missing = {name: extra for name, extra in NEEDED.items() if importlib.util.find_spec(name) is None}
    if missing:
        extras = ",".join(sorted(set(missing.values())))
        sys.exit(f"docs/build.py: {', '.join(missing)} not installed: pip install 'sparseflow_kernels[{extras}]'")
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    # -P: the installed package, and not the sources beside it, which lack the native module
    tests = [sys.executable, "-P", "-m", "pytest", "-q", str(DOCS.parent / "tests" / "test_docs.py")]
    site = [
        sys.executable,
        "-P",
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-b",
        "html",
        str(DOCS),
        str(DOCS / "_build" / "html"),
    ]
    for command in (tests, site):
        if status := subprocess.run(command, env=environment).returncode:
            sys.exit(status)
    print(f"wrote {DOCS / '_build' / 'html' / 'index.html'}")


if __name__ == "__main__":
    main()
