"""Builds the extension modules with CMake (CMakeLists.txt beside this file): `sparseflow_kernels._cpu` always,
`sparseflow_kernels._cuda` where a usable nvcc is found. Whether there is a GPU is never asked: that is for run time.

Nothing here imports torch, so pip's isolated build works. Environment:

    SPARSEFLOW_ARCH        x86_64 or aarch64: build for Linux on that architecture; CXX is then a compiler for it
    SPARSEFLOW_CPU_ISAS    instruction sets to compile, for example "baseline,avx2" (default: all of the architecture)
    SPARSEFLOW_CUDA        auto (default): build `_cuda` if nvcc can be used; on: fail if not; off: leave it out
    SPARSEFLOW_CUDA_ARCHS  GPU architectures, "80;90" by default, or for example "90a"; newer GPUs get PTX of the newest
    CUDACXX, CUDA_HOME     nvcc, or the toolkit it is in, where it is neither on PATH nor in /usr/local/cuda
    CUDAHOSTCXX            the C++ compiler that nvcc drives (default: CXX, then nvcc's own choice)
    MAX_JOBS               compiler processes at once (default: CMake's choice)
    CC, CXX, CXXFLAGS      as CMake reads them
    SPARSEFLOW_BUILD_DIR   where objects are kept for the next build (default: build/ beside this file)
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TOOLKIT = Path("/usr/local/cuda")
OLDEST_NVCC = (12, 0)
OLDEST_ARCH = 80
PROBE = """
#include <cuda_runtime.h>
__global__ void kernel(float* x) { x[threadIdx.x] = tanhf(x[threadIdx.x]); }
int launch(float* x) { kernel<<<1, 32>>>(x); return cudaGetLastError(); }
"""


def tool(name: str) -> str:
    """Path of a build tool: beside this interpreter (a virtual environment that is not activated), then on PATH."""
    beside = Path(sys.executable).with_name(name)
    path = str(beside) if beside.exists() else shutil.which(name)
    if path is None:
        raise SystemExit(f"setup.py: {name} was not found; `pip install {name}` or build through pip, which brings it")
    return path


class Unusable(Exception):
    """Why the CUDA part cannot be built here, and what to do about it."""


def find_nvcc() -> str:
    if named := os.environ.get("CUDACXX"):
        if path := shutil.which(named):
            return path
        raise Unusable(f"CUDACXX={named} is no program; set it to the path of nvcc, or unset it")
    homes = [home for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
    for folders in (os.environ.get("PATH", ""), *(str(Path(home, "bin")) for home in (*homes, TOOLKIT))):
        if path := shutil.which("nvcc", path=folders):
            return path
    raise Unusable(f"nvcc was not found (CUDACXX, PATH, CUDA_HOME/bin, {TOOLKIT}/bin); install the CUDA toolkit "
                   f"{OLDEST_NVCC[0]}.{OLDEST_NVCC[1]} or newer, or set CUDACXX to nvcc's path")


def output_of(*command: str) -> tuple[bool, str]:
    """Whether the command succeeded, and all that it printed."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, str(error)
    return done.returncode == 0, done.stdout.decode(errors="replace")


def complaint(text: str) -> str:
    """The line of a compiler's output that says what is wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if re.search(r"error|fatal", line)), lines[-1] if lines else "no message")


def wanted_archs(text: str) -> list[str]:
    """"80;90" or "80,90a" as a list, oldest first."""
    archs = {arch for arch in re.split(r"[;,\s]+", text) if arch}
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?", arch):
            raise SystemExit(f"setup.py: SPARSEFLOW_CUDA_ARCHS={text!r}: {arch!r} is no architecture; write compute "
                             "capabilities without the dot, for example 80;90 or 90a")
        if int(arch.rstrip("af")) < OLDEST_ARCH:
            raise SystemExit(f"setup.py: SPARSEFLOW_CUDA_ARCHS={text!r}: the kernels copy asynchronously, which {arch} "
                             f"lacks; {OLDEST_ARCH} is the oldest")
    return sorted(archs, key=lambda arch: (int(arch.rstrip("af")), arch))


def host_compiler(nvcc: str, archs: list[str]) -> str | None:
    """The C++ compiler for nvcc (None: nvcc's own choice), proved by compiling and linking a small kernel."""
    if named := os.environ.get("CUDAHOSTCXX"):
        candidates = [shutil.which(named) or named]
    else:
        candidates = [shutil.which(os.environ.get("CXX") or "c++"), None]
    said = ""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        source.write_text(PROBE)
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        for compiler in dict.fromkeys(candidates):
            driven = ["-ccbin", compiler] if compiler else []
            good, said = output_of(nvcc, *driven, *codes, "-std=c++17", "-shared", "-Xcompiler=-fPIC", "-cudart=static",
                                   str(source), "-o", str(Path(folder, "probe.so")))
            if good:
                return compiler
    raise Unusable(f"{nvcc} does not compile and link a small kernel: {complaint(said)}; if the host compiler is too "
                   "new for it, set CUDAHOSTCXX to an older g++")


def usable_cuda() -> dict[str, Any]:
    """What `_cuda` is to be built with; raises Unusable."""
    nvcc = find_nvcc()
    good, said = output_of(nvcc, "--version")
    version = re.search(r"release \d+\.\d+, V(\d+)\.(\d+)[.\d]*", said)
    if not good or version is None:
        raise Unusable(f"{nvcc} --version does not answer as nvcc does: {complaint(said)}; set CUDACXX to nvcc's path")
    number = version.group().rpartition("V")[2]
    if tuple(map(int, version.groups())) < OLDEST_NVCC:
        raise Unusable(f"{nvcc} is version {number}, too old: {OLDEST_NVCC[0]}.{OLDEST_NVCC[1]} or newer is needed; "
                       "install a newer CUDA toolkit, or set CUDACXX to a newer nvcc")
    given = os.environ.get("SPARSEFLOW_CUDA_ARCHS", "").strip()
    archs = wanted_archs(given or "80;90")
    known = re.findall(r"compute_(\d+)", output_of(nvcc, "--list-gpu-arch")[1])
    if known and (unknown := [arch for arch in archs if arch.rstrip("af") not in known]):
        what = (f"nvcc {number} does not compile for {', '.join(unknown)}, only for {', '.join(known)}; "
                "set SPARSEFLOW_CUDA_ARCHS")
        raise SystemExit(f"setup.py: SPARSEFLOW_CUDA_ARCHS={given!r}: {what}") if given else Unusable(what)
    return {"built": True, "nvcc": number, "path": nvcc, "host_compiler": host_compiler(nvcc, archs), "archs": archs,
            "ptx": archs[-1].rstrip("af")}


def plan_cuda() -> dict[str, Any]:
    """`usable_cuda()`, or {"built": False, "reason": ...} where SPARSEFLOW_CUDA lets it be missing."""
    mode = os.environ.get("SPARSEFLOW_CUDA", "").lower() or "auto"
    if mode not in ("auto", "on", "off"):
        raise SystemExit(f"setup.py: SPARSEFLOW_CUDA={mode!r} is none of auto, on, off")
    if mode == "off":
        return {"built": False, "reason": "it was left out when the package was built (SPARSEFLOW_CUDA=off)"}
    if not any((ROOT / "csrc" / "cuda").glob("*.cu")):
        return {"built": False, "reason": "these sources have no CUDA kernels"}
    try:
        return usable_cuda()
    except Unusable as error:
        if mode == "on":
            raise SystemExit(f"setup.py: SPARSEFLOW_CUDA=on, but {error}") from None
        return {"built": False, "reason": f"when the package was built, {error}"}


def check_platform() -> None:
    """Ends with a sentence where nothing can be built: on another system, or without a compiler."""
    if not sys.platform.startswith(("linux", "darwin")):
        raise SystemExit(f"setup.py: sparseflow_kernels runs on Linux and macOS; this is {sys.platform}")
    named = os.environ.get("CXX")
    candidates = shlex.split(named)[:1] if named else ["c++", "g++", "clang++"]
    if not any(map(shutil.which, candidates)):
        what = f"CXX={named} is no program" if named else "no C++ compiler was found (c++, g++, clang++)"
        raise SystemExit(
            f"setup.py: {what}; sparseflow_kernels is compiled when it is installed from source: install GCC 12 or "
            "newer, or Clang (apt install g++, dnf install gcc-c++, xcode-select --install), or set CXX"
        )


def other_architecture() -> list[str]:
    """What CMake needs to be told where SPARSEFLOW_ARCH is not this machine's; empty where it is.

    The headers are this interpreter's: CPython's differ between x86-64 and aarch64 in nothing that an extension sees
    (csrc/bindings/python_sizes.cpp has the compiler check that). The names of modules and folders are set here."""
    arch = os.environ.get("SPARSEFLOW_ARCH") or platform.machine()
    if arch == platform.machine():
        return []
    here = f"{platform.machine()}-linux-gnu.so"
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    if arch not in ("x86_64", "aarch64") or not suffix.endswith(here) or not os.environ.get("CXX"):
        raise SystemExit(
            f"setup.py: SPARSEFLOW_ARCH={arch}: Linux on x86_64 builds for aarch64 and the other way round, with CXX "
            f"set to a compiler for it; this is {sysconfig.get_platform()}, CXX={os.environ.get('CXX', '')}"
        )
    os.environ["_PYTHON_HOST_PLATFORM"] = f"linux-{arch}"  # sysconfig.get_platform() answers with it
    suffix = os.environ["SETUPTOOLS_EXT_SUFFIX"] = suffix.removesuffix(here) + f"{arch}-linux-gnu.so"
    return [
        "-DCMAKE_SYSTEM_NAME=Linux", f"-DCMAKE_SYSTEM_PROCESSOR={arch}",
        f"-DPython_INCLUDE_DIR={sysconfig.get_path('include')}",
        f"-DPYTHON_MODULE_EXTENSION={suffix}", "-DPYTHON_MODULE_DEBUG_POSTFIX=", "-DPYTHON_IS_DEBUG=OFF",  # pybind11's
        "-DCMAKE_STRIP=", "-DCMAKE_MODULE_LINKER_FLAGS=-s",  # this machine's strip reads no other's files
    ]  # fmt: skip


def kept_pybind11(tree: Path) -> Path:
    """A copy of pybind11 that stays where it is: each of pip's builds has its own in a temporary folder, and with its
    path the bindings would be compiled anew every time. Returns the folder of its CMake files."""
    import pybind11

    package = Path(pybind11.__file__).resolve().parent
    kept = tree.parent / f"pybind11-{pybind11.__version__}"
    if not kept.exists():
        part = kept.with_name(f"{kept.name}.part")  # a build that was stopped leaves no half of it
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(package, part, ignore=shutil.ignore_patterns("__pycache__"))
        part.rename(kept)
    return kept / Path(pybind11.get_cmake_dir()).resolve().relative_to(package)


class CMakeBuild(build_ext):
    """One CMake project for all modules; `_build.json` (read by build_info) is written beside them."""

    def build_extensions(self) -> None:
        check_platform()
        folder = Path(self.get_ext_fullpath("sparseflow_kernels._cpu")).resolve().parent
        folder.mkdir(parents=True, exist_ok=True)
        # Not build_temp, which is another one for every editable build.
        kept = Path(os.environ.get("SPARSEFLOW_BUILD_DIR") or ROOT / "build").resolve()
        tree = kept / f"cmake.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "native"
        tree.mkdir(parents=True, exist_ok=True)
        cuda = plan_cuda()
        if cuda["built"]:
            print(f"CUDA: nvcc {cuda['nvcc']}, {';'.join(cuda['archs'])}")
        else:
            print(f"CUDA: not built: {cuda['reason']}")
            self.extensions = [ext for ext in self.extensions if ext.name != "sparseflow_kernels._cuda"]
            Path(self.get_ext_fullpath("sparseflow_kernels._cuda")).unlink(missing_ok=True)  # of an earlier build

        # An earlier isolated build's cache names cmake and ninja in a temporary folder that is gone, and maybe another
        # compiler. Not cmake --fresh: it deletes the objects too.
        (tree / "CMakeCache.txt").unlink(missing_ok=True)
        for found in (tree / "CMakeFiles").glob("[0-9]*"):  # what was found out of the compilers, by CMake's version
            shutil.rmtree(found)
        configure = [
            tool("cmake"), "-S", str(ROOT), "-B", str(tree), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder}",
            f"-DPython_EXECUTABLE={sys.executable}",
            # There is no link-time optimisation (NO_EXTRAS), yet pybind11 asks about it: zig's answer takes minutes.
            "-DHAS_FLTO=OFF", "-DHAS_FLTO_THIN=OFF", "-DHAS_FLTO_AUTO=OFF",
            *OTHER_ARCHITECTURE,
            f"-Dpybind11_DIR={kept_pybind11(tree)}",
        ]
        if isas := os.environ.get("SPARSEFLOW_CPU_ISAS"):
            configure.append(f"-DSPARSEFLOW_CPU_ISAS={isas.replace(',', ';')}")
        if cuda["built"]:
            codes = [*(f"{arch}-real" for arch in cuda["archs"]), f"{cuda['ptx']}-virtual"]
            configure += ["-DSPARSEFLOW_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={cuda['path']}"]
            configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(codes)}")
            if cuda["host_compiler"]:
                configure.append(f"-DCMAKE_CUDA_HOST_COMPILER={cuda['host_compiler']}")
        targets = [ext.name.rpartition(".")[2] for ext in self.extensions]
        build = [tool("cmake"), "--build", str(tree), "--target", *targets]
        if jobs := os.environ.get("MAX_JOBS"):
            build += ["--parallel", jobs]
        for command in (configure, build):
            if status := subprocess.run(command).returncode:
                raise SystemExit(f"setup.py: {command[0]} ended with status {status}; what is wrong is said above")

        facts = json.loads((tree / "build.json").read_text())
        flags = facts.pop("cuda_flags")
        facts["cuda"] = {**cuda, "flags": flags} if cuda["built"] else cuda
        (folder / "_build.json").write_text(json.dumps(facts, indent=2) + "\n")

    def copy_extensions_to_source(self) -> None:
        (ROOT / self.get_ext_filename("sparseflow_kernels._cuda")).unlink(missing_ok=True)  # of an earlier build
        super().copy_extensions_to_source()
        built = Path(self.build_lib) / "sparseflow_kernels" / "_build.json"
        shutil.copyfile(built, ROOT / "sparseflow_kernels" / "_build.json")

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), str(Path(self.build_lib) / "sparseflow_kernels" / "_build.json")]


OTHER_ARCHITECTURE = other_architecture()  # before setuptools asks for the platform

if __name__ == "__main__":
    modules = [Extension(f"sparseflow_kernels.{name}", sources=[]) for name in ("_cpu", "_cuda")]
    setup(ext_modules=modules, cmdclass={"build_ext": CMakeBuild})
