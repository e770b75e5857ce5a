"""The recipes at the paper's scale: every file resolves, fits by estimate, and has the planner's numbers."""

from __future__ import annotations

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


def test_the_planner_plans_the_recipes() -> None:
    for name, stage in recipe().items():
        _, config = load(RECIPES / f"{name}.yaml")
        for section in ("batch.global_size", "data.max_prompt_tokens", "models.dtype"):
            part, key = section.split(".")
            assert getattr(getattr(config, part), key) == getattr(getattr(stage.config, part), key), (
                f"{name}: {section}"
            )
        if isinstance(config, c.PpoConfig):
            assert isinstance(stage.config, c.PpoConfig)
            for key in ("iterations", "prompts", "responses_per_prompt", "epochs"):
                assert getattr(config.ppo, key) == getattr(stage.config.ppo, key), f"{name}: ppo.{key}"
            for key in ("max_new_tokens", "micro_size"):
                assert getattr(config.sampling, key) == getattr(stage.config.sampling, key), f"{name}: sampling.{key}"
        else:
            assert config.data.max_tokens == stage.config.data.max_tokens, name
            assert config.train.epochs == 1


def test_the_baselines_differ_from_the_method_only_where_they_should() -> None:
    _, gil = load(RECIPES / "ppo_gil.yaml")
    _, with_kl = load(RECIPES / "ppo_kl.yaml")
    _, without = load(RECIPES / "ppo.yaml")
    assert with_kl.ppo == gil.ppo
    assert (with_kl.gil.num_groups, gil.gil.num_groups) == (1, 2)
    assert (without.ppo.kl_coef, with_kl.ppo.kl_coef) == (0.0, 0.05)
    for section in ("models", "parallel", "data", "batch", "optimizer", "critic_optimizer", "sampling"):
        assert getattr(without, section) == getattr(with_kl, section) == getattr(gil, section)
