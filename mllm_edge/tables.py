"""Tables for people, and sizes as they write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def size(count: float) -> str:
    """Bytes for people: 10^3, 10^6, 10^9."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def table(title: str, *columns: str, right: Sequence[str] = ()) -> Table:
    """An empty table; the columns in `right` hold numbers."""
    from rich.box import SIMPLE
    from rich.table import Table

    made = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def pairs(title: str, rows: dict[str, str]) -> Table:
    """Names and what they stand for."""
    made = table(title, "", "")
    made.show_header = False
    for name, value in rows.items():
        made.add_row(name, value)
    return made
