"""What a demo shows while it runs: a line a version, and below it what it is doing right now.

On a terminal the table is redrawn in place; anywhere else (a pipe, CI) every line is printed once, so that a log
reads from top to bottom.

    with LiveTable() as table:
        table.say("starting the engine")
        table.add(row)
"""

import time
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table

from weightcast.adapters.demo.events import HEADINGS, VersionRow

_WIDTHS = tuple(max(len(heading), 10) for heading in HEADINGS)


class LiveTable:
    """The table of one run. `console` is where it goes, standard output by default."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console if console is not None else Console(highlight=False)
        self._rows: list[VersionRow] = []
        self._started_s = time.monotonic()
        self._spinner = Spinner("dots")
        self._live = Live(console=self._console, refresh_per_second=8, transient=False)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.update(self._draw_table() if self._rows else "")
            self._live.stop()

    def say(self, text: str, *, passing: bool = False) -> None:
        """Show what happens now; it stays until the next one. A `passing` remark is for terminals only."""
        elapsed = f"{time.monotonic() - self._started_s:5.1f} s"
        if self._console.is_terminal:
            self._spinner.update(text=f"{elapsed}  {text}")
            self._refresh()
        elif not passing:
            self._print(f"[{elapsed}] {text}")

    def add(self, row: VersionRow) -> None:
        """Add the line of a version."""
        self._rows.append(row)
        if self._console.is_terminal:
            self._refresh()
            return
        if len(self._rows) == 1:
            self._print(_plain_line(HEADINGS))
        self._print(_plain_line(row.cells()))

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def _refresh(self) -> None:
        parts: list[RenderableType] = [self._draw_table()] if self._rows else []
        self._live.update(Group(*parts, self._spinner), refresh=True)

    def _draw_table(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in HEADINGS:
            table.add_column(heading, justify="right")
        for row in self._rows:
            table.add_row(*row.cells(), style="" if row.served else "red")
        return table


def _plain_line(cells: tuple[str, ...]) -> str:
    return "  ".join(cell.rjust(width) for cell, width in zip(cells, _WIDTHS, strict=True))
