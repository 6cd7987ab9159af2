"""A progress bar for exports: on rank 0 and a terminal only, silent everywhere else.

with progress_bar("exporting", total=200, enabled=True) as advance:
    advance(1)
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress

from weightcast.bridges.exchange import get_rank


@contextmanager
def progress_bar(what: str, total: int, enabled: bool) -> Iterator[Callable[[int], None]]:
    """Gives a function that takes the number of tensors done since its last call. Draws on stderr."""
    if not (enabled and get_rank() == 0 and sys.stderr.isatty()):
        yield lambda count: None
        return
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)
