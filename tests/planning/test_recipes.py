"""The recipes at the paper's scale: every file resolves, fits by estimate, and is what the planner plans."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_gil import config as c
from megatron_gil.config.files import load_config
from megatron_gil.planning.memory import GIB, Cut
from megatron_gil.planning.presets import SPECS, recipe
from megatron_gil.planning.rank import rank_memory
from megatron_gil.planning.workload import read_workload

RECIPES = Path(__file__).resolve().parents[2] / "examples" / "paper_7b"
COMMANDS: dict[str, Any] = {"sft": c.SftConfig, "reward": c.RewardConfig, "dpo": c.DpoConfig}
TRAINING = sorted(path for path in RECIPES.rglob("*.yaml") if path.stem not in ("generate", "score"))


def load(path: Path) -> tuple[str, Any]:
    command = path.stem if path.stem in COMMANDS else "ppo"
    return command, load_config(COMMANDS.get(command, c.PpoConfig), path, ["run.dir=unused"])


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: str(path.relative_to(RECIPES)))
@pytest.mark.parametrize("num_gpus", [8, 16])
def test_a_recipe_resolves_and_fits_on_80_gb(path: Path, num_gpus: int) -> None:
    _, config = load(path)
    plan = c.BatchPlan.of(num_gpus, config.parallel, config.batch)
    cut = Cut(
        tp_size=config.parallel.tensor_size,
        pp_size=config.parallel.pipeline_size,
        dp_size=plan.dp_size,
        sequence_parallel=config.parallel.sequence_parallel,
        distributed_optimizer=config.parallel.distributed_optimizer,
    )
    workload = read_workload(config, lambda role: SPECS["7b"])
    peaks = [rank_memory(workload, cut, pp_rank).peak / GIB for pp_rank in range(cut.pp_size)]
    assert max(peaks) < 79, f"{max(peaks):.1f} GiB"


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("generate.yaml")) + sorted(RECIPES.rglob("score.yaml")), ids=str)
def test_the_recipes_of_answers_and_scores_resolve(path: Path) -> None:
    kind: Any = c.GenerateConfig if path.stem == "generate" else c.ScoreConfig
    config = load_config(kind, path, ["output=unused"])
    assert config.models.dtype == "bfloat16"


def test_an_installed_package_plans_the_recipe(tmp_path: Path) -> None:
    """As a wheel has it: without examples/."""
    project, installed = RECIPES.parents[1], tmp_path / "installed"
    build = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(installed)]
    subprocess.run(build, cwd=project, check=True, timeout=120)
    command = [sys.executable, "-m", "megatron_gil", "plan"]
    plans = [
        subprocess.run(command, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True)
        for root in (installed, project)
    ]
    assert [done.returncode for done in plans] == [0, 0], plans[0].stderr
    assert plans[0].stdout == plans[1].stdout
    assert not [path for path in installed.rglob("*") if path.is_symlink()]


def test_the_planner_plans_every_run_of_the_recipe() -> None:
    stages = recipe()
    assert {(name, stage.num_iterations) for name, stage in stages.items()} == {
        ("sft", 1625), ("reward", 5025), ("dpo", 5025), ("ppo_gil", 2000), ("ppo_kl", 2000), ("ppo", 2000)
    }  # fmt: skip
    for name, stage in stages.items():
        command, config = load(RECIPES / f"{name}.yaml")
        assert command == stage.command
        planned = {"run": config.run, "batch": config.batch, "parallel": config.parallel}
        assert replace(stage.config, **planned) == config


def test_the_baselines_differ_from_the_method_only_where_they_should() -> None:
    _, gil = load(RECIPES / "ppo_gil.yaml")
    _, with_kl = load(RECIPES / "ppo_kl.yaml")
    _, without = load(RECIPES / "ppo.yaml")
    assert with_kl.ppo == gil.ppo
    assert (with_kl.gil.num_groups, gil.gil.num_groups) == (1, 2)
    assert (without.ppo.kl_coef, with_kl.ppo.kl_coef) == (0.0, 0.05)
    for section in ("models", "parallel", "data", "batch", "optimizer", "critic_optimizer", "sampling"):
        assert getattr(without, section) == getattr(with_kl, section) == getattr(gil, section)
