"""Rows of text as a table: aligned lines for people, and HTML for notebooks."""

from __future__ import annotations

from html import escape
from typing import Sequence

Row = Sequence[str]


def aligned(rows: Sequence[Row]) -> list[str]:
    """A line for every row, its cells under those of the row before."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def html_table(rows: Sequence[Row], header: bool = True) -> str:
    """An HTML table, its first row a header, or its first column one."""
    lines = []
    for number, row in enumerate(rows):
        tags = ["th" if (number == 0 if header else place == 0) else "td" for place in range(len(row))]
        cells = (f'<{tag} style="text-align: left">{escape(cell)}</{tag}>' for tag, cell in zip(tags, row))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table>{''.join(lines)}</table>"


class Report(str):
    """Text with a table in it, which notebooks show as one. before, after: lines round the table's rows."""

    rows: tuple[Row, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]

    def __new__(cls, before: Sequence[str], rows: Sequence[Row], after: Sequence[str]) -> "Report":
        report = super().__new__(cls, "\n".join([*before, *aligned(rows), *after]))
        report.before, report.rows, report.after = tuple(before), tuple(rows), tuple(after)
        return report

    def __getnewargs__(self) -> tuple:  # type: ignore[override]  # what __new__ takes here
        return self.before, self.rows, self.after

    def _repr_html_(self) -> str:
        def lines(text: Sequence[str]) -> str:
            joined = "\n".join(text).strip("\n")
            return f'<pre style="white-space: pre-wrap">{escape(joined)}</pre>' if joined else ""

        return lines(self.before) + html_table(self.rows) + lines(self.after)
