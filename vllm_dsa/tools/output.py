"""What the tools print: sections of marked rows, with rich on a terminal that has it, plain text elsewhere; and what
they say to a user who asked for what cannot be done.

Standard library only, but for rich, which is used where it is installed and never asked for.
"""

import shutil
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

Mark = Literal["ok", "note", "fault", ""]
_STYLES = {"ok": "green", "note": "yellow", "fault": "bold red", "": ""}


class UserError(Exception):
    """What the user asked for cannot be done; the message names the thing, its value and the next step."""


def numbers(option: str, text: str, kind: type, least: float, most: float) -> list[Any]:
    """An option's numbers with commas between them, each once, ascending; UserError if one is not in its range."""
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(least <= value <= most for value in values):
        raise UserError(f"{option} {text}: give numbers from {least:g} to {most:g} with commas between them.")
    return sorted(set(values))


@dataclass(frozen=True)
class Row:
    """One line of a report: "ok" holds, "fault" does not and matters, "note" is worth knowing, "" is a fact."""

    label: str
    text: str
    mark: Mark = ""


@dataclass
class Section:
    """A titled part of a report."""

    title: str
    rows: list[Row] = field(default_factory=list)

    def add(self, label: str, text: str, mark: Mark = "") -> None:
        self.rows.append(Row(label, text, mark))


def show(sections: Iterable[Section]) -> None:
    """Print sections to standard output; those without rows are left out."""
    sections = [section for section in sections if section.rows]
    if not (sys.stdout.isatty() and _show_rich(sections)):
        _show_plain(sections)


def _show_rich(sections: list[Section]) -> bool:
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return False
    console = Console(highlight=False)
    for section in sections:
        console.print(Text(section.title, style="bold"))
        table = Table.grid(padding=(0, 2))
        for _ in range(3):
            table.add_column(overflow="fold")
        for row in section.rows:
            style = _STYLES[row.mark]
            table.add_row(Text(f"  {row.mark:5}", style=style), Text(row.label), Text(row.text))
        console.print(table)
    return True


def _show_plain(sections: list[Section]) -> None:
    width = max(60, shutil.get_terminal_size((120, 24)).columns)
    for section in sections:
        print(section.title)
        label = max(len(row.label) for row in section.rows)
        for row in section.rows:
            start = f"  {row.mark:5}  {row.label:{label}}  "
            # Words are never broken: a path or a command line must stay one that can be copied.
            lines = textwrap.wrap(row.text, width - len(start), break_long_words=False, break_on_hyphens=False) or [""]
            print(start + ("\n" + " " * len(start)).join(lines))
