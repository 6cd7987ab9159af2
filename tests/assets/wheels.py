"""Wheels from the package index, for tests that want the data in them: downloaded and read, never installed or run.

download_wheels(["chatterbot-corpus==1.3.3"], folder, needed_for="tests with real instructions")
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def download_wheels(names: Sequence[str], folder: Path, *, needed_for: str) -> list[Path]:
    """The wheels of `names` (`package==version`), sorted by their names. Raises RuntimeError with what pip said."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*command, "--dest", str(folder), *names], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(
            f"{', '.join(names)} could not be downloaded from the package index; {needed_for} need it. pip said:\n"
            f"{done.stderr}"
        )
    return sorted(folder.glob("*.whl"))
