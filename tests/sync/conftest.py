"""Addresses that the tests of sync publish on."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def ipc() -> Iterator[str]:
    """An ipc address with a path short enough; nothing is left behind there."""
    with tempfile.TemporaryDirectory() as folder:
        yield f"ipc://{folder}/p"
        assert not os.listdir(folder)


@pytest.fixture(params=["tcp", "ipc"])
def address(request: pytest.FixtureRequest) -> str:
    """A free address of each transport."""
    return "tcp://127.0.0.1:0" if request.param == "tcp" else str(request.getfixturevalue("ipc"))


@pytest.fixture
def base() -> Iterator[Path]:
    """A folder for sockets with a short path that every user can enter, as the one for temporary files."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)
