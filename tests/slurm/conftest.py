from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_gil.demo.world import World, WorldSizes, write_world
from tests.slurm.testbed import SlurmTestbed, missing_programs, start_testbed


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmTestbed]:
    """One cluster for all tests of this directory."""
    missing = missing_programs()
    if missing:
        pytest.skip(f"Slurm is not installed ({', '.join(missing)}); on Debian: slurmctld slurmd slurm-client munge")
    with start_testbed(tmp_path_factory.mktemp("slurm")) as testbed:
        yield testbed


@pytest.fixture(scope="session")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A tiny Llama with its data."""
    sizes = WorldSizes(demonstrations=400, preferences=400, prompts=100, eval_prompts=16, heldout_prompts=4)
    return write_world(tmp_path_factory.mktemp("miniature") / "world", seed=1, sizes=sizes)
