from __future__ import annotations

from pathlib import Path

import pytest

from tests.world import write_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny world's files (world.py); tests read them and write elsewhere."""
    return write_world(tmp_path_factory.mktemp("world"))
