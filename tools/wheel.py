"""Builds a CPU wheel for manylinux and checks it.

    make wheel [ARCH=aarch64], or: python tools/wheel.py [--arch aarch64] [--glibc 2.28] [--out dist]

A compiler of the system links against its own C and C++ libraries, and the wheel would run on no older ones. That of
the ziglang package (tools/zig.py) does neither, and compiles for the other architecture, too. The wheel is checked by
auditwheel, which reads what the module really asks for.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from zig import compiler

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "build" / "wheel"
ARCHS = ("x86_64", "aarch64")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=ARCHS, help="the architecture it runs on (default: this machine's)")
    parser.add_argument("--glibc", default="2.28", help="the oldest C library it runs with (default: 2.28)")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder of the wheel (default: dist)")
    options = parser.parse_args()
    if not sys.platform.startswith("linux"):
        sys.exit(f"wheel.py: manylinux wheels are built on Linux; this is {sys.platform}: use `pip wheel .`")
    arch = options.arch or platform.machine()
    if arch not in ARCHS:
        sys.exit(f"wheel.py: there are wheels for {' and '.join(ARCHS)}; this is {arch}: use `pip wheel .`")
    tag = f"manylinux_{options.glibc.replace('.', '_')}_{arch}"
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ, "CXX": str(compiler(f"{arch}-linux-gnu.{options.glibc}", KEPT)), "SPARSEFLOW_CUDA": "off",
            "SPARSEFLOW_BUILD_DIR": str(KEPT), "SPARSEFLOW_ARCH": arch,
        }  # fmt: skip
        command = [sys.executable, "-m", "build", "--wheel", "--outdir", folder]
        command += ["-C--build-option=bdist_wheel", f"-C--build-option=--plat-name={tag}", str(ROOT)]
        if status := subprocess.run(command, env=environment).returncode:
            sys.exit(status)
        (wheel,) = Path(folder).glob("*.whl")
        shown = subprocess.run([sys.executable, "-m", "auditwheel", "show", str(wheel)], capture_output=True, text=True)
        said = " ".join((shown.stdout + shown.stderr).split())
        found = re.search(r'consistent with the following platform tag: "manylinux_(\d+)_(\d+)_', said)
        if not found or tuple(map(int, found.groups())) > tuple(map(int, options.glibc.split("."))):
            sys.exit(f"wheel.py: auditwheel does not find {tag} in {wheel.name}: {said}")
        options.out.mkdir(parents=True, exist_ok=True)
        placed = options.out / wheel.name
        placed.write_bytes(wheel.read_bytes())
    print(f"{placed}: {placed.stat().st_size / 1e6:.1f} MB, auditwheel: manylinux_{'_'.join(found.groups())}")


if __name__ == "__main__":
    main()
