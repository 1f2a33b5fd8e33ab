"""Tables of systems by metrics, for the terminal (rich) and for Markdown, and how their figures are written."""

from __future__ import annotations

from collections.abc import Mapping

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

Value = float | int | str | None
Systems = Mapping[str, Mapping[str, Value]]


def format_value(value: Value) -> str:
    """Four decimals for measures, thousands separators for counts and for floats from 100 on, an en dash for none."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if abs(value) < 100 else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: `1:02:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,}:{minutes:02d}:{seconds:02d}"


def columns_of(systems: Systems) -> list[str]:
    """Every column that a system has, in order of first appearance."""
    return list(dict.fromkeys(column for row in systems.values() for column in row))


def best_of(systems: Systems, column: str) -> float | None:
    """The highest number of a column of floats; None when the column holds counts or text, or fewer than two values."""
    values = [row[column] for row in systems.values() if row.get(column) is not None]
    return max(values) if len(values) > 1 and all(isinstance(v, float) for v in values) else None


def metric_table(systems: Systems, *, title: str | None = None, head: str = "system") -> Table:
    """A rich table with one row per system, in the order given; the best of each column of floats is bold.

    Where it is too wide, names and heads go on in further lines; no figure is ever cut.
    """
    # Text, not markup: `package://` would become a parcel, `run[1]` nothing.
    table = Table(title=None if title is None else Text(title, style="bold"), title_justify="left")
    table.add_column(head, overflow="fold")
    columns = columns_of(systems)
    for column in columns:
        words = (word for row in systems.values() for word in format_value(row.get(column)).split())
        width = max(map(cell_len, words), default=1)
        table.add_column(Text(column), justify="right", overflow="fold", min_width=width)
    best = {column: best_of(systems, column) for column in columns}
    for name, row in systems.items():
        cells = [
            Text(format_value(row.get(c)), style="bold" if best[c] is not None and row.get(c) == best[c] else "")
            for c in columns
        ]
        table.add_row(Text(name), *cells)
    return table


def print_table(systems: Systems, console: Console, *, title: str | None = None, head: str = "system") -> None:
    table = metric_table(systems, title=title, head=head)
    # A blank on both sides of each column, and lines around them.
    narrowest = sum(column.min_width or 1 for column in table.columns) + 3 * len(table.columns) + 1
    if narrowest > console.width:
        # Then it is for the terminal to break lines: rich would leave columns out, and the lines' ends.
        table.width = narrowest
    console.print(table, crop=False)


def markdown_table(systems: Systems, *, head: str = "system") -> str:
    """The same table in Markdown, without a line end at its end."""
    columns = columns_of(systems)
    best = {column: best_of(systems, column) for column in columns}

    def cell(row: Mapping[str, Value], column: str) -> str:
        text = _escape(format_value(row.get(column)))
        return f"**{text}**" if best[column] is not None and row.get(column) == best[column] else text

    lines = [
        "| " + " | ".join(_escape(c) for c in (head, *columns)) + " |",
        "|---|" + "---:|" * len(columns),
        *(f"| {_escape(name)} | " + " | ".join(cell(row, c) for c in columns) + " |" for name, row in systems.items()),
    ]
    return "\n".join(lines)


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
