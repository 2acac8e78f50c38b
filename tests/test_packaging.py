"""The package as a thing that is built and shipped: metadata, build facts, the source distribution."""

import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import types
from pathlib import Path

import pytest

from sparseflow_kernels.build_info import build_info

BUILD_INFO = sys.modules["sparseflow_kernels.build_info"]  # the module: the package's attribute is the function
ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_build_info_is_json_and_complete():
    info = json.loads(json.dumps(build_info()))
    assert set(info) == {"version", "python", "cpu", "cuda", "triton", "torch"}
    assert info["torch"]["threads"] == 1
    assert info["cuda"]["available"] or info["cuda"]["reason"]
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


def device(major, minor, name="NVIDIA Some"):
    counts = {"multiprocessors": 108, "shared_per_block": 166912, "memory": 2**36}
    return {"name": name, "major": major, "minor": minor, **counts}


def answer(runtime=13000, driver=13000, error="", devices=(device(9, 0),)):
    return {"runtime": runtime, "driver": driver, "error": error, "devices": list(devices)}


@pytest.fixture
def cuda_module(monkeypatch):
    """Installs a stand-in for the CUDA extension, built for `archs`, whose probe answers `found`."""

    def install(found, archs=("80", "90"), ptx="90"):
        monkeypatch.setitem(sys.modules, "sparseflow_kernels._cuda", types.SimpleNamespace(probe=lambda: found))
        facts = {"built": True, "nvcc": "13.0.88", "archs": list(archs), "ptx": ptx, "flags": "-O3"}
        monkeypatch.setattr(BUILD_INFO, "_build_facts", lambda: {"cuda": facts})
        return json.loads(json.dumps(build_info()["cuda"]))

    return install


@pytest.mark.parametrize("found, archs, ptx", [
    (answer(), ["80", "90"], "90"),
    (answer(devices=[device(8, 6)]), ["80"], "80"),  # a later minor version of the same architecture
    (answer(devices=[device(12, 0)]), ["80", "90"], "90"),  # by way of PTX
    (answer(devices=[device(9, 0)]), ["90a"], "90"),
    (answer(driver=13010), ["80"], "80"),
    (answer(runtime=13010, driver=13000), ["90"], "90"),  # an older driver of the same major version
    (answer(devices=[device(7, 5), device(8, 0)]), ["80"], "80"),
])
def test_cuda_is_available(cuda_module, found, archs, ptx):
    info = cuda_module(found, archs, ptx)
    assert info["available"] and "reason" not in info
    assert info["nvcc"] == "13.0.88" and info["archs"] == archs
    assert info["devices"][-1]["usable"] and info["devices"][-1]["capability"].count(".") == 1


@pytest.mark.parametrize("found, archs, says", [
    (answer(driver=0, error="driver insufficient", devices=[]), ["80"], r"no NVIDIA driver.*driver insufficient.*nvidia-smi"),
    (answer(driver=12040, devices=[]), ["80"], r"too old: it knows CUDA 12\.4.*CUDA 13\.0; install"),
    (answer(error="no CUDA-capable device", devices=[]), ["80"], r"CUDA 13\.0\) shows no device.*no CUDA-capable"),
    (answer(devices=[device(7, 5, "NVIDIA T4")]), ["80"], r"need compute capability 8\.0 .*NVIDIA T4 .*7\.5"),
    (answer(devices=[device(8, 0, "NVIDIA A100")]), ["90"], r"for 90, which NVIDIA A100 .*SPARSEFLOW_CUDA_ARCHS='80'"),
    (answer(runtime=13010, driver=13000, devices=[device(12, 0)]), ["90"], r"12\.0.*SPARSEFLOW_CUDA_ARCHS='120'"),
    ({}, ["80"], r"does not answer: KeyError"),
    (None, ["80"], r"does not answer: TypeError"),
])
def test_cuda_says_why_it_is_not_available(cuda_module, found, archs, says):
    info = cuda_module(found, archs, archs[-1])
    assert info["built"] and not info["available"]
    assert re.search(says, info["reason"]), info["reason"]


def test_hidden_devices_are_named(cuda_module, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert "CUDA_VISIBLE_DEVICES is '7'" in cuda_module(answer(devices=[]))["reason"]


def test_a_cuda_module_that_was_not_built_or_does_not_load(monkeypatch):
    monkeypatch.setattr(BUILD_INFO, "_build_facts", lambda: {"cuda": {"built": False, "reason": "no nvcc"}})
    monkeypatch.setitem(sys.modules, "sparseflow_kernels._cuda", None)  # import raises ModuleNotFoundError
    assert build_info()["cuda"] == {"built": False, "available": False, "reason": "no nvcc"}
    monkeypatch.setattr(BUILD_INFO, "_build_facts", dict)
    assert "SPARSEFLOW_CUDA=on" in build_info()["cuda"]["reason"]

    def refuse(name):
        raise ImportError("GLIBCXX_9 not found")

    monkeypatch.setattr(importlib, "import_module", refuse)
    info = build_info()["cuda"]
    assert info["built"] and not info["available"] and "GLIBCXX_9" in info["reason"]


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


@pytest.fixture
def build(monkeypatch):
    """setup.py as a module, on a machine without nvcc: no CUDA variable set, PATH with a shell's own tools only."""
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("sparseflow_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("SPARSEFLOW_CUDA", "SPARSEFLOW_CUDA_ARCHS", "CUDACXX", "CUDAHOSTCXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(module, "TOOLKIT", Path("/nonexistent"))
    if shutil.which("nvcc"):
        pytest.skip("nvcc lies in /usr/bin: no folder of PATH is without one")
    return module


def fake_nvcc(folder: Path, version="12.4", compiles=True) -> Path:
    """A shell script that answers as nvcc does and compiles nothing."""
    folder.mkdir(parents=True)
    script = folder / "nvcc"
    end = "exit 0" if compiles else "echo 'error -- unsupported GNU version' >&2; exit 1"
    script.write_text(f"""#!/bin/sh
case "$1" in
  --version) echo 'Cuda compilation tools, release {version}, V{version}.99' ;;
  --list-gpu-arch) echo compute_80; echo compute_90 ;;
  *) {end} ;;
esac
""")
    script.chmod(0o755)
    return script


def test_cuda_is_planned_where_nvcc_is_found(build, monkeypatch, tmp_path):
    script = fake_nvcc(tmp_path / "toolkit" / "bin")
    monkeypatch.setattr(build, "TOOLKIT", tmp_path / "toolkit")
    plan = build.plan_cuda()
    assert plan["built"] and plan["path"] == str(script) and plan["nvcc"] == "12.4.99"
    assert plan["archs"] == ["80", "90"] and plan["ptx"] == "90"
    places = (("CUDACXX", script), ("CUDA_HOME", script.parent.parent), ("PATH", f"{script.parent}:/usr/bin:/bin"))
    for variable, value in places:
        with monkeypatch.context() as patch:
            patch.setattr(build, "TOOLKIT", Path("/nonexistent"))
            patch.setenv(variable, str(value))
            assert build.plan_cuda()["path"] == str(script)
    monkeypatch.setenv("SPARSEFLOW_CUDA_ARCHS", "90a, 80")
    plan = build.plan_cuda()
    assert plan["archs"] == ["80", "90a"] and plan["ptx"] == "90"
    monkeypatch.setenv("SPARSEFLOW_CUDA", "off")
    assert build.plan_cuda() == {"built": False, "reason": build.plan_cuda()["reason"]}


@pytest.mark.parametrize("version, compiles, says", [
    (None, True, "nvcc was not found.*CUDACXX"),
    ("11.8", True, r"version 11\.8\.99, too old: 12\.0"),
    ("13.0", False, "unsupported GNU version.*CUDAHOSTCXX"),
    ("nonsense", True, "does not answer as nvcc does"),
])
def test_an_unusable_nvcc_fails_only_where_cuda_is_asked_for(build, monkeypatch, tmp_path, version, compiles, says):
    if version:
        monkeypatch.setenv("CUDACXX", str(fake_nvcc(tmp_path / "bin", version, compiles)))
    plan = build.plan_cuda()
    assert not plan["built"] and re.search(says, plan["reason"]), plan
    monkeypatch.setenv("SPARSEFLOW_CUDA", "on")
    with pytest.raises(SystemExit, match=says):
        build.plan_cuda()


@pytest.mark.parametrize("archs, says", [
    ("9.0", "'9.0' is no architecture"), ("75", "80 is the oldest"), ("80;95", "does not compile for 95"),
])
def test_wrong_architectures_are_refused(build, monkeypatch, tmp_path, archs, says):
    monkeypatch.setenv("CUDACXX", str(fake_nvcc(tmp_path / "bin")))
    monkeypatch.setenv("SPARSEFLOW_CUDA_ARCHS", archs)
    with pytest.raises(SystemExit, match=says):
        build.plan_cuda()


def test_a_wrong_cuda_switch_is_refused(build, monkeypatch):
    monkeypatch.setenv("SPARSEFLOW_CUDA", "yes")
    with pytest.raises(SystemExit, match="none of auto, on, off"):
        build.plan_cuda()


def test_without_a_compiler_there_is_one_sentence(build, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(SystemExit, match=r"no C\+\+ compiler was found .*install GCC 12 or newer"):
        build.check_platform()
    monkeypatch.setenv("CXX", "no-such-c++ -m64")
    with pytest.raises(SystemExit, match="CXX=no-such-c.. -m64 is no program"):
        build.check_platform()
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit, match="runs on Linux and macOS; this is win32"):
        build.check_platform()


def test_a_build_of_baseline_kernels_alone_warns():
    native = pytest.importorskip("sparseflow_kernels._cpu")
    if native.best_isa() == "baseline":
        pytest.skip("this processor has nothing better")
    code = """
import warnings
from sparseflow_kernels import _cpu
from sparseflow_kernels.engines import cpu
_cpu.isa = lambda: "baseline"
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    cpu._native(), cpu._native()
print(*(str(w.message) for w in found), sep=chr(10))
"""
    environment = {name: value for name, value in os.environ.items() if name != "SPARSEFLOW_ISA"}
    for forced, warnings in (({}, 1), ({"SPARSEFLOW_ISA": "baseline"}, 0)):
        done = subprocess.run([sys.executable, "-P", "-c", code], env={**environment, **forced}, capture_output=True, text=True)
        assert done.stdout.count(f"no kernels for {native.best_isa()}") == warnings, done.stdout + done.stderr


def test_constraints_pin_every_direct_dependency_but_the_peers():
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(line for name in extras if name != "bench" for line in extras[name])]
    names = {re.match(r"[\w.-]+", requirement).group().lower() for requirement in wanted} - {"sparseflow_kernels"}
    assert names <= pinned, f"constraints.txt lacks {sorted(names - pinned)}"


def test_solving_needs_no_command_line_and_the_command_line_names_its_extra():
    code = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in ("typer", "rich"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import torch
import sparseflow_kernels as sfk
from sparseflow_kernels import data, flows, pruning, training

field = sfk.compile(flows.mlp_field(2, (4,)))
assert sfk.odeint(field, torch.randn(3, 2), torch.tensor([0.0, 1.0])).shape == (2, 3, 2)
from sparseflow_kernels.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "needs typer" in done.stderr and "pip install 'sparseflow_kernels[cli]'" in done.stderr


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
    wanted = tracked("csrc", ".h", ".cpp", ".cu", ".cuh") | tracked("sparseflow_kernels", ".py")
    wanted |= tracked("tests", ".py") | tracked("bench", ".py")
    wanted |= {"setup.py", "pyproject.toml", "CMakeLists.txt", "Makefile", "constraints.txt", "LICENSE", "README.md",
               "CHANGELOG.md", "CITATION.cff", "tools/wheel.py", "docs/conf.py", "docs/notebooks/drop_in_ode.ipynb"}
    assert wanted <= files, f"missing from the sdist: {sorted(wanted - files)}"
    unwanted = {name for name in files if name.endswith((".so", ".pyc", "_build.json")) or "/build/" in name}
    assert not unwanted

    # What was unpacked, and nothing else, must be enough for a wheel; one instruction set, no GPU and no optimisation keep
    # it quick.
    (tree / "setup.cfg").write_text("[build_ext]\ndebug = 1\n")
    environment = {"SPARSEFLOW_CPU_ISAS": "baseline", "SPARSEFLOW_CUDA": "off"}
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path / "wheel"), str(tree)]
    subprocess.run(command, env={**os.environ, **environment}, check=True)
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    target = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(wheel)], check=True)
    assert (target / "sparseflow_kernels" / "py.typed").exists()
    code = "from sparseflow_kernels.build_info import build_info; import json; print(json.dumps(build_info()))"
    result = subprocess.run([sys.executable, "-P", "-c", code], env={**os.environ, "PYTHONPATH": str(target)},
                            capture_output=True, text=True, check=True)
    info = json.loads(result.stdout)
    assert info["cpu"]["built"] and info["cpu"]["isas"] == ["baseline"] and info["cpu"]["isa"] == "baseline"
    assert not info["cuda"]["built"]
