from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.processes import Sides


@pytest.fixture(scope="session")
def sides(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Sides:
    return Sides(world, tmp_path_factory.mktemp("sides"))
