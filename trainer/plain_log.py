"""What a script sees of its training that has not set up `logging`: rank 0's lines on stderr, while the run lasts.

A run started as a command sets up logging itself; a script that calls `pretrain` often does not, and Python then drops
every line below a warning. Whoever has set up logging is left alone.

    with lines_on_stderr():
        ...
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

FORMAT, TIME_FORMAT = "%(asctime)s %(name)s %(message)s", "%H:%M:%S"

# The package's own logger: what other libraries say is not this one's to show.
_PACKAGE = "weightcast"


@contextmanager
def lines_on_stderr() -> Iterator[None]:
    """Show this package's lines from level INFO on, unless somebody handles them already."""
    package = logging.getLogger(_PACKAGE)
    if package.hasHandlers():
        yield
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(FORMAT, TIME_FORMAT))
    level = package.level
    package.addHandler(handler)
    if level == logging.NOTSET:
        package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)
