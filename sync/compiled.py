"""Libraries in C that the install built, where there was a compiler; numpy and torch do without them.

They lie beside these files as optional extension modules and have no Python in them. They are loaded by ctypes, which
also lets other threads run while they work.
"""

import ctypes
import importlib.util

# The instructions that a library may have been compiled for, narrowest first; it numbers them in this order.
LEVELS = ("plain", "avx2", "avx512")


def load_library(name: str) -> ctypes.CDLL | None:
    """The library `weightcast.sync.<name>`, or None where it was not built."""
    spec = importlib.util.find_spec(f"weightcast.sync.{name}")
    return None if spec is None or spec.origin is None else ctypes.CDLL(spec.origin)
