"""What the inner loops of the CUDA kernels are made of: instructions by kind, counted in the machine code. Needs nvcc and
cuobjdump (the CUDA toolkit's, or the one in the triton package); no GPU.

    python bench/sass.py [csrc/cuda/solve_f32.cu] [--arch 90] [--least 8]
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("FFMA", "DFMA", "LDS.128", "LDS.64", "LDS", "LDG", "LD", "LDL", "MUFU", "SHFL")


def disassembler() -> str:
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None:
        beside = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(beside) if beside.exists() else None
    if found is None:
        sys.exit("bench/sass.py: cuobjdump was found neither on PATH nor in a triton package")
    return found


def instructions(text: str) -> dict[str, list[tuple[int, str]]]:
    """function -> [(address, instruction)] of cuobjdump's listing."""
    functions: dict[str, list[tuple[int, str]]] = {}
    name = ""
    for line in text.splitlines():
        if found := re.search(r"Function : (\S+)", line):
            name = found.group(1)
            functions[name] = []
        elif found := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", line):
            functions[name].append((int(found.group(1), 16), found.group(2).strip()))
    return functions


def inner_loops(listing: list[tuple[int, str]]) -> list[list[str]]:
    """The bodies of loops that have no loop inside them."""
    index = {address: number for number, (address, _) in enumerate(listing)}
    spans = []
    for number, (address, text) in enumerate(listing):
        if found := re.search(r"\bBRA(?:\.\w+)* (?:\w+, )?0x([0-9a-f]+)", text):
            target = int(found.group(1), 16)
            if target <= address and target in index:
                spans.append((index[target], number))
    inner = [one for one in spans if not any(o != one and one[0] <= o[0] and o[1] <= one[1] for o in spans)]
    return [[text for _, text in listing[begin : end + 1]] for begin, end in inner]


def count(body: list[str]) -> dict[str, int]:
    totals = dict.fromkeys((*KINDS, "other"), 0)
    for text in body:
        opcode = re.sub(r"^@!?U?P\w+ ", "", text).split()[0]
        totals[next((kind for kind in KINDS if opcode == kind or opcode.startswith(kind + ".")), "other")] += 1
    return totals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default=str(ROOT / "csrc" / "cuda" / "solve_f32.cu"))
    parser.add_argument("--arch", default="90")
    parser.add_argument("--least", type=int, default=8, help="show loops with at least so many multiply-adds")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        subprocess.run(
            ["nvcc", "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-cubin", f"-arch=sm_{options.arch}", options.source, "-o", cubin],
            check=True,
        )  # fmt: skip
        text = subprocess.run([disassembler(), "--dump-sass", cubin], check=True, capture_output=True, text=True).stdout
    for name, listing in instructions(text).items():
        print(f"\n{name}: {len(listing)} instructions")
        print("  instructions  " + "  ".join(f"{kind:>7}" for kind in (*KINDS, "other")) + "  multiply-adds")
        for body in inner_loops(listing):
            totals = count(body)
            work = totals["FFMA"] + totals["DFMA"]
            if work >= options.least:
                cells = "  ".join(f"{totals[kind]:>7}" for kind in (*KINDS, "other"))
                print(f"  {len(body):>12}  {cells}  {work / len(body):>12.0%}")


if __name__ == "__main__":
    main()
