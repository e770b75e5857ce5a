from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from tests.world import write_world

# The same examples every time, and none too slow: a red run must mean a change, not a busy machine or a lucky draw.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny world's files (world.py); tests read them and write elsewhere."""
    return write_world(tmp_path_factory.mktemp("world"))
