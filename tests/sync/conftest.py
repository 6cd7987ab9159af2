"""Addresses that the tests of sync publish on, and what stands in for a GPU."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.sync.host_driver import HostDriver
from tests.sync.slice_share import Subscribe, subscribing
from tests.sync.table_runner import run_by_numpy

from weightcast.sync import device_passes
from weightcast.sync.transports import cuda_ipc


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


@pytest.fixture
def nothing_stays(base: Path) -> Iterator[None]:
    """For tests that must leave the folder for sockets empty."""
    yield
    assert not list(base.iterdir())


@pytest.fixture
def sharing(base: Path) -> Iterator[Subscribe]:
    """Makes workers of this host that share a copy of slices, and end with the test."""
    with ExitStack() as stack:
        yield subscribing(stack, base)


@pytest.fixture
def driver() -> HostDriver:
    """A driver whose device is host memory."""
    return HostDriver()


@pytest.fixture(params=[None, run_by_numpy], ids=["by-torch", "by-tables"])
def as_gpu(driver: HostDriver, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> HostDriver:
    """Publishers and subscribers of this process find the stand-ins where they look for the driver and the kernel."""
    monkeypatch.setattr(device_passes, "find_runner", lambda device: request.param)
    monkeypatch.setattr(cuda_ipc, "find_driver", lambda: driver)
    return driver
