"""One self-contained page about the runs of a folder: verdicts, tables and pictures, nothing outside the file."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import Any, Sequence

from ..files import atomic_write
from .paper_report import Table, closing, tables, verdicts

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem; font-size: 13px; }
th, td { text-align: right; padding: 0.15rem 0.6rem; border-bottom: 1px solid #ddd; white-space: nowrap; }
td:first-child, th:first-child { text-align: left; }
img { max-width: 100%; } figure { margin: 1rem 0; } li.net { margin-left: 1.5rem; } div.table { overflow-x: auto; }
"""


def write_html(documents: Sequence[dict[str, Any]], pictures: Sequence[Path], path: str | Path, title: str) -> Path:
    """Write the report to `path`, whole or not at all. pictures: PNG files, which are embedded."""
    lines = verdicts(documents)
    parts = [f"<h1>{escape(title)}</h1>", "<h2>Verdicts</h2>", "<ul>"]
    parts += [f'<li class="{"net" if line.startswith(" ") else "claim"}">{escape(line.strip())}</li>' for line in lines]
    parts += ["</ul>", "<h2>Pictures</h2>", *map(_figure, pictures), "<h2>Figures</h2>"]
    parts += [_table(table) for table in tables(documents)]
    parts += ["<h2>What ran</h2>", *(f"<p>{escape(line)}</p>" for line in closing(documents))]
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )
    path = Path(path)
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _figure(picture: Path) -> str:
    data = base64.b64encode(picture.read_bytes()).decode("ascii")
    name = escape(picture.stem)
    return f'<figure><img alt="{name}" src="data:image/png;base64,{data}"><figcaption>{name}</figcaption></figure>'


def _table(table: Table) -> str:
    def row(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(row("td", cells) for cells in table.rows)
    head = row("th", table.columns)
    return f'<h3>{escape(table.title)}</h3>\n<div class="table"><table>\n{head}\n{body}\n</table></div>'
