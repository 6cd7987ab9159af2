"""Fixtures that more than one folder of tests needs."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.assets.gemma import gemma_270m_folder


@pytest.fixture(scope="session")
def gemma_270m() -> Path:
    """The Hugging Face folder of the real Gemma 3 270M. Fails, never skips, where it cannot be had."""
    return gemma_270m_folder()


@pytest.fixture(autouse=True, scope="module")
def no_group_for_the_next_file() -> Iterator[None]:
    """Several files run in one process, in an order of pytest-xdist's: none finds a process group of another's.

    Groups of one are made by whatever first builds a model in a process (Megatron's, and vLLM's), and stay.
    """
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        from weightcast.bridges.process_groups import destroy_distributed

        destroy_distributed()
