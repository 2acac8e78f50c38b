"""The package as a thing that is built and shipped: metadata, build facts, the source distribution."""

import importlib
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

from sparseflow_kernels.build_info import build_info

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_build_info_is_json_and_complete():
    info = json.loads(json.dumps(build_info()))
    assert set(info) == {"version", "python", "cpu", "cuda", "triton", "torch"}
    assert info["torch"]["threads"] == 1
    assert info["cuda"] == {"built": False, "reason": info["cuda"]["reason"]}
    if info["cpu"]["built"]:
        assert info["cpu"]["isas"][0] == "baseline" and info["cpu"]["isa"] in info["cpu"]["isas"]
    else:
        assert "pip install" in info["cpu"]["reason"]


def test_build_info_says_why_the_extension_is_missing(monkeypatch):
    def refuse(name):
        raise ImportError(f"no {name} here")

    monkeypatch.setattr(importlib, "import_module", refuse)
    info = build_info()
    assert not info["cpu"]["built"] and "no sparseflow_kernels._cpu here" in info["cpu"]["reason"]


def test_forced_isa_is_reported():
    pytest.importorskip("sparseflow_kernels._cpu")
    code = "from sparseflow_kernels.build_info import build_info; print(build_info()['cpu']['isa'])"
    # -P: the installed package, not the source tree in the working directory, unless PYTHONPATH asks for the tree.
    result = subprocess.run([sys.executable, "-P", "-c", code], env={**os.environ, "SPARSEFLOW_ISA": "baseline"},
                            capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "baseline"


def test_nothing_at_build_time_imports_torch():
    assert not any("torch" in requirement for requirement in PYPROJECT["build-system"]["requires"])
    assert not re.search(r"^\s*(import|from)\s+torch", (ROOT / "setup.py").read_text(), re.MULTILINE)


def test_constraints_pin_every_direct_dependency_but_the_peers():
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    project = PYPROJECT["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["demo"], *project["optional-dependencies"]["test"]]
    names = {re.match(r"[\w.-]+", requirement).group().lower() for requirement in wanted}
    assert names <= pinned, f"constraints.txt lacks {sorted(names - pinned)}"


def tracked(folder: str, *suffixes: str) -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*") if path.suffix in suffixes}


@pytest.mark.slow
def test_source_distribution_is_complete_and_builds(tmp_path):
    subprocess.run([sys.executable, "-m", "build", "--sdist", "--outdir", str(tmp_path), str(ROOT)], check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    (tree,) = (path for path in tmp_path.iterdir() if path.is_dir())
    files = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}
    wanted = tracked("csrc", ".h", ".cpp") | tracked("sparseflow_kernels", ".py") | tracked("tests", ".py") | tracked("bench", ".py")
    wanted |= {"setup.py", "pyproject.toml", "CMakeLists.txt", "Makefile", "constraints.txt", "LICENSE", "README.md"}
    assert wanted <= files, f"missing from the sdist: {sorted(wanted - files)}"
    unwanted = {name for name in files if name.endswith((".so", ".pyc", "_build.json")) or "/build/" in name}
    assert not unwanted

    # What was unpacked, and nothing else, must be enough for a wheel; one instruction set keeps it quick.
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path / "wheel"), str(tree)]
    subprocess.run(command, env={**os.environ, "SPARSEFLOW_CPU_ISAS": "baseline"}, check=True)
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    target = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(wheel)], check=True)
    code = "from sparseflow_kernels.build_info import build_info; import json; print(json.dumps(build_info()))"
    result = subprocess.run([sys.executable, "-P", "-c", code], env={**os.environ, "PYTHONPATH": str(target)},
                            capture_output=True, text=True, check=True)
    info = json.loads(result.stdout)
    assert info["cpu"]["built"] and info["cpu"]["isas"] == ["baseline"] and info["cpu"]["isa"] == "baseline"
