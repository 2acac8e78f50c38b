"""Sphinx reads this: python docs/build.py, or `make docs`."""

from __future__ import annotations

import re
from pathlib import Path

import sparseflow_kernels
from sparseflow_kernels.analysis import bench
from sparseflow_kernels.analysis.markdown import bench_tables

DOCS = Path(__file__).resolve().parent

project, author = "sparseflow_kernels", "The sparseflow_kernels authors"
copyright = "2026, " + author  # noqa: A001 - Sphinx's name
version = release = sparseflow_kernels.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.doctest", "sphinx_copybutton"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]
html_theme, html_title = "furo", f"sparseflow_kernels {version}"
html_theme_options = {"source_directory": "docs/"}
html_show_sourcelink = False
default_role = "code"  # a word between single backticks in a docstring
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "exclude-members": "training"}
python_maximum_signature_line_length = 100
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# ------------------------------------------------------------------------------------- our docstrings, as
# reStructuredText

_ITEM = re.compile(r"^([A-Za-z_*][\w.*\[\]\"]*(?:(?:, | or )[A-Za-z_*][\w.*]*)*): (.*)$")


def _escaped(line: str) -> str:
    """Prose is no markup, but for what stands between backticks."""
    parts = re.split(r"(`+[^`]+`+)", line)
    prose = [re.sub(r"([*|\\])", r"\\\1", part) for part in parts[::2]]
    parts[::2] = [re.sub(r"(?<=\w)_(?!\w)", r"\\_", part) for part in prose]
    return re.sub(r"(?<!`)(`[^`]+`)(?=\w)", r"\1\\ ", "".join(parts))  # `compile`d: a word goes on behind the code


def docstring(app, what, name, obj, options, lines: list[str]) -> None:
    """`name: text` at the beginning of a line, its text going on in deeper lines, is an item of a list."""
    out: list[str] = []
    inside, code = False, False
    for line in lines:
        text, depth = line.strip(), len(line) - len(line.lstrip())
        if not text:
            inside, code = False, False
            out.append("")
            continue
        item = _ITEM.match(line)
        if depth >= 4 and not inside and (code or not out or not out[-1].strip()):
            if not code:
                out += ["::", ""]
            code = True
            out.append(line)
        elif item and depth == 0:
            if not inside and out and out[-1].strip():
                out.append("")
            inside = True
            out.append(f"* **{_escaped(item[1])}**: {_escaped(item[2])}")
        elif text.startswith("- ") and depth == 0:
            if not inside and out and out[-1].strip():
                out.append("")
            inside = True
            out.append(f"* {_escaped(text[2:])}")
        elif inside and depth:
            out.append(f"  {_escaped(text)}")
        else:
            if inside:
                out.append("")
            inside = False
            out.append(_escaped(text))
    lines[:] = out


# ------------------------------------------------------------------------------------------- benchmarks, from their
# files


def tables(app) -> None:
    """Writes docs/_build/benchmarks.md: a section for every file in bench/results that the bench has written."""
    lines: list[str] = []
    for path in sorted((DOCS.parent / "bench" / "results").glob("*.json")):
        try:
            rows, chosen, document = bench.load_json(path)
        except (ValueError, KeyError):  # of the GPU suite, which has tables of its own
            continue
        for name, table in bench_tables(rows, chosen, document).items():
            lines += [f"### `{path.name}`: {name}", "", table, ""]
    target = DOCS / "_build" / "benchmarks.md"
    target.parent.mkdir(exist_ok=True)
    target.write_text("\n".join(lines))


def setup(app) -> None:
    app.connect("autodoc-process-docstring", docstring)
    app.connect("builder-inited", tables)
