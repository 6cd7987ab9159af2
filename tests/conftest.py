"""Fixtures that more than one folder of tests needs."""

from pathlib import Path

import pytest
from tests.assets.gemma import gemma_270m_folder


@pytest.fixture(scope="session")
def gemma_270m() -> Path:
    """The Hugging Face folder of the real Gemma 3 270M. Fails, never skips, where it cannot be had."""
    return gemma_270m_folder()
