"""What nvcc makes of the kernels, where there is an nvcc and needs no GPU: registers, spills, static shared memory."""

import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
WITHOUT_KERNELS = {"runtime.cu"}

pytestmark = [
    pytest.mark.skipif(not KERNELS, reason="this tree has no CUDA sources (csrc/cuda/*.cu)"),
    pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not on PATH, so no kernel can be compiled"),
]


@dataclass(frozen=True)
class Budget:
    """At most so much: registers of a thread, bytes of a block's static shared memory, bytes spilled."""

    registers: int = 128  # 512 threads of a block share 65536
    static_shared: int = 1024  # activations and weights are in dynamic shared memory
    spills: int = 0


# By the demangled name of a kernel, or of a function that is not inlined; the first pattern found in it counts.
BUDGETS: dict[str, Budget] = {
    # words that live across whole operations; the loops over entries have none (test_inner_loops_stay_in_registers)
    r"solve_kernel<": Budget(spills=256),
    r"adjoint_kernel<": Budget(spills=512),
    r"^__internal_|sine<": Budget(spills=64),  # CUDA's own: sin of huge arguments
}
LOCAL_LOADS = {"solve_f32.cu": 64, "adjoint_f32.cu": 128}  # of a kernel, tables that are indexed at run time among them


@dataclass(frozen=True)
class Report:
    """What ptxas says of a kernel, or (registers 0: its kernels' are counted) of a function that is not inlined."""

    name: str
    registers: int
    static_shared: int
    spills: int


def cuda_flags() -> list[str]:
    """The flags CMakeLists.txt compiles the module with."""
    flags = re.search(r"set\(cuda_flags (.*)\)", (ROOT / "CMakeLists.txt").read_text()).group(1)
    return ["-std=c++17", "-O3", "-DNDEBUG", *flags.split()]


def demangle(names: list[str]) -> list[str]:
    """C++ names of mangled ones; as they are without a demangler."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return names
    return subprocess.run([tool, *names], capture_output=True, text=True, check=True).stdout.splitlines()


def read_report(text: str) -> list[Report]:
    """The output of ptxas -v, function by function."""
    entry = name = ""
    spills: dict[str, int] = {}
    used: dict[str, tuple[int, int]] = {}
    for line in text.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)'", line):
            entry = found.group(1)
        elif found := re.search(r"Function properties for '?(\w+)'?", line):
            name = found.group(1)
        elif found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spills[name] = max(int(found.group(1)), int(found.group(2)), spills.get(name, 0))
        elif found := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            used[entry] = int(found.group(1)), int(shared.group(1)) if shared else 0
    plain = zip(spills, demangle(list(spills)), strict=True)
    return [Report(readable, *used.get(name, (0, 0)), spills[name]) for name, readable in plain]


def complaints(reports: list[Report]) -> list[str]:
    found = []
    for report in reports:
        budget = next((budget for pattern, budget in BUDGETS.items() if re.search(pattern, report.name)), Budget())
        for key in ("registers", "static_shared", "spills"):
            if getattr(report, key) > getattr(budget, key):
                found.append(f"{key} {getattr(report, key)} > {getattr(budget, key)}: {report.name}")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90"])
@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.name)
def test_kernels_keep_to_their_budgets(source, arch, tmp_path):
    cubin = tmp_path / "kernels.cubin"
    command = ["nvcc", "-cubin", f"-arch=sm_{arch}", *cuda_flags(), "-Xptxas", "-v", f"-I{ROOT / 'csrc'}",
               str(source), "-o", str(cubin)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"
    reports = read_report(done.stdout)
    kernels = [report for report in reports if report.registers]
    assert len(kernels) == len(set(re.findall(r"Compiling entry function '(\w+)'", done.stdout))), done.stdout
    assert kernels or source.name in WITHOUT_KERNELS, f"no kernel in ptxas's report:\n{done.stdout}"
    for report in kernels:
        print(f"{report.registers} registers, {report.static_shared} bytes shared, {report.spills} spilled: {report.name}")
    assert not (wrong := complaints(reports)), "\n".join(wrong)
    if arch == "90" and source.name in LOCAL_LOADS:  # here, as the compiler takes half a minute
        check_inner_loops(cubin, LOCAL_LOADS[source.name])


def check_inner_loops(cubin, most_local_loads):
    """The loops that multiply: operands from shared memory in 16-byte words, nothing from local memory. And of that little
    elsewhere: a kernel is one function, whose state lies in shared memory and its parameters in constant memory."""
    spec = importlib.util.spec_from_file_location("sass", ROOT / "bench" / "sass.py")
    sass = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sass)
    try:
        tool = sass.disassembler()
    except SystemExit as missing:
        pytest.skip(str(missing))
    text = subprocess.run([tool, "--dump-sass", str(cubin)], check=True, capture_output=True, text=True).stdout
    kernels = sass.instructions(text)
    assert len(kernels) >= 2
    for name, listing in kernels.items():
        loops = [sass.count(body) for body in sass.inner_loops(listing)]
        four = "Li4" in name  # samples to a thread
        multiplying = [loop for loop in loops if loop["FFMA"] >= (16 if four else 8) and loop["LDS.128"]]
        assert len(multiplying) >= (5 if four else 3), f"sparse and dense loops, with tangents and without, in {name}"
        assert not any(loop["LDL"] for loop in multiplying), (name, multiplying)
        if four and "Lb1" in name:
            assert sum(loop["LDS.128"] >= 4 for loop in multiplying) >= 5, f"activations as 16-byte words, in {name}"
        assert sass.count([text for _, text in listing])["LDL"] <= most_local_loads, name


def test_the_report_is_read():
    text = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5goodyPf' for 'sm_80'
ptxas info    : Function properties for _Z5goodyPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 372 bytes cmem[0]
ptxas info    : Compiling entry function '_Z5badlyPf' for 'sm_80'
ptxas info    : Function properties for _Z5badlyPf
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 2048 bytes smem, 372 bytes cmem[0]
ptxas info    : Function properties for _Z6helperf
    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
"""
    reports = read_report(text)
    assert [(r.registers, r.static_shared, r.spills) for r in reports] == [(40, 0, 0), (168, 2048, 12), (0, 0, 4)]
    wrong = "\n".join(complaints(reports))
    assert "goody" not in wrong and "registers 168 > 128" in wrong and "static_shared 2048 > 1024" in wrong
    assert re.search("spills 12 > 0.*badly", wrong) and re.search("spills 4 > 0.*helper", wrong)


def test_no_flag_loosens_the_arithmetic():
    flags = cuda_flags()
    assert {"-ftz=false", "-prec-div=true", "-prec-sqrt=true"} <= set(flags)
    assert "fast_math" not in (ROOT / "setup.py").read_text() and not any("fast" in flag for flag in flags)
