"""Builds the extension module `sparseflow_kernels._cpu` with CMake (CMakeLists.txt beside this file).

Nothing here imports torch, so pip's isolated build works. Environment:

    SPARSEFLOW_CPU_ISAS   instruction sets to compile, for example "baseline,avx2" (default: all of the architecture)
    MAX_JOBS              compiler processes at once (default: CMake's choice)
    CC, CXX, CXXFLAGS     as CMake reads them
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def tool(name: str) -> str:
    """Path of a build tool: beside this interpreter (a virtual environment that is not activated), then on PATH."""
    beside = Path(sys.executable).with_name(name)
    path = str(beside) if beside.exists() else shutil.which(name)
    if path is None:
        raise SystemExit(f"setup.py: {name} was not found; `pip install {name}` or build through pip, which brings it")
    return path


class CMakeBuild(build_ext):
    """One CMake project, one module; `_build.json` (read by build_info) is written beside the module."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        module.parent.mkdir(parents=True, exist_ok=True)
        tree = Path(self.build_temp).resolve() / ext.name
        # --fresh: an earlier isolated build's cache names cmake and ninja in a temporary folder that is gone. Objects stay.
        configure = [
            tool("cmake"), "--fresh", "-S", str(ROOT), "-B", str(tree), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={module.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        if isas := os.environ.get("SPARSEFLOW_CPU_ISAS"):
            configure.append(f"-DSPARSEFLOW_CPU_ISAS={isas.replace(',', ';')}")
        build = [tool("cmake"), "--build", str(tree), "--target", "_cpu"]
        if jobs := os.environ.get("MAX_JOBS"):
            build += ["--parallel", jobs]
        subprocess.run(configure, check=True)
        subprocess.run(build, check=True)
        shutil.copyfile(tree / "build.json", module.parent / "_build.json")

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        built = Path(self.build_lib) / "sparseflow_kernels" / "_build.json"
        shutil.copyfile(built, ROOT / "sparseflow_kernels" / "_build.json")

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), str(Path(self.build_lib) / "sparseflow_kernels" / "_build.json")]


setup(ext_modules=[Extension("sparseflow_kernels._cpu", sources=[])], cmdclass={"build_ext": CMakeBuild})
