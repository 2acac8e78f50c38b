"""Imports point one way: from clients to the door, from the door to engines, and down to what knows of nobody."""

import ast
from pathlib import Path

import sparseflow_kernels

PACKAGE = Path(__file__).resolve().parent.parent / "sparseflow_kernels"
NAME = sparseflow_kernels.__name__

# From the ground up. A file belongs to the entry that is the longest beginning of its name.
FLOORS = [
    ["devices", "files", "finite", "hooks", "memory", "records", "tables", "threads", "warn"],
    ["numerics", "field", "origin", "data", "masks", "build_info"],
    ["activations", "folding", "simplify", "simplify_graph", "trained", "divergence", "divergence_graph", "divergence_paths"],
    ["capture"],
    ["engines"],
    [
        "accelerate", "callables", "compiled_field", "counting", "divergence_field", "field_parameters", "gradients", "known_fields", "layer_parameters", "live",
        "live_attributes", "nonfinite", "odeint", "operators", "own_gradients", "packing", "products", "reading", "reading_live", "report", "solution",
        "solving", "sparse_conv", "sparse_layer", "sparse_linear", "sparsify", "trial", "write_back", "written",
    ],
    ["pruning", "flows"],
    ["training"],
    ["analysis"],
    ["cli", "__main__", ""],  # "": the package's own face
]  # fmt: skip
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def modules() -> dict[str, Path]:
    """Dotted names below the package ("" for its face) and their files."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, files: dict[str, Path]) -> set[str]:
    """Files of the package that one imports, wherever the import stands: in a function, or for type checkers alone, too."""
    own = [NAME, *name.split(".")] if name else [NAME]
    package = own if files[name].name == "__init__.py" else own[:-1]
    found = set()
    for node in ast.walk(ast.parse(files[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {(alias.name, None) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*start, *(node.module or "").split(".")]).rstrip(".")
            found |= {(base, alias.name) for alias in node.names}
    read = set()
    for base, leaf in found:
        if base.split(".")[0] != NAME:
            continue
        short = base.removeprefix(NAME).removeprefix(".")
        inner = f"{short}.{leaf}".lstrip(".")
        if inner in files:
            read.add(inner)
        elif short in files and not (short == "" and leaf.startswith("_")):  # extensions, __version__
            read.add(short)
    return read


FILES = modules()
IMPORTS = {name: imports(name, FILES) for name in FILES}


def floor(name: str) -> int:
    parts = name.split(".")
    return next(FLOOR[start] for n in range(len(parts), 0, -1) if (start := ".".join(parts[:n])) in FLOOR)


def test_every_file_has_a_floor():
    assert {name.split(".")[0] for name in FILES} <= FLOOR.keys()
    assert FLOOR.keys() <= {name.split(".")[0] for name in FILES}, "a floor names a file that is gone"


def test_nothing_imports_what_stands_above_it():
    upward = [f"{a} imports {b}" for a, names in IMPORTS.items() for b in names if floor(b) > floor(a)]
    assert not upward, upward


def test_no_files_import_each_other_in_a_circle():
    state: dict[str, int] = {}  # 1: on the path, 2: done
    path: list[str] = []

    def visit(name: str) -> None:
        state[name] = 1
        path.append(name)
        for other in sorted(IMPORTS[name]):
            assert state.get(other) != 1, " -> ".join([*path[path.index(other) :], other])
            if other not in state:
                visit(other)
        path.pop()
        state[name] = 2

    for name in sorted(FILES):
        if name not in state:
            visit(name)


def test_the_package_imports_nothing_of_the_bench():
    """The GPU suite lies in bench/, which a wheel does not have."""
    bench = {path.stem for path in (PACKAGE.parent / "bench").glob("*.py")}
    for name, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found = {node.module.split(".")[0]}
            else:
                continue
            assert not found & (bench | {"bench", "tests"}), name
