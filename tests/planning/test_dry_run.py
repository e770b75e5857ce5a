"""`--dry-run`: what it prints, what it refuses, and that it needs neither megatron nor a written run directory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_gil.cli import main


def ppo(world: Path, *more: str) -> list[str]:
    models = (f"models.policy={world / 'policy'}", f"models.reward_model={world / 'reward_model'}")
    sizes = ("batch.global_size=16", "batch.micro_size=4", "ppo.prompts=16", "sampling.max_new_tokens=8")
    sizes = (*sizes, "data.max_prompt_tokens=40")
    return ["ppo", f"run.dir={world / 'never'}", f"data.train={world / 'prompts.jsonl'}", *models, *sizes, *more]


def test_every_rank_and_model_is_shown(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ppo(world, "parallel.pipeline_size=2", "--dry-run", "--gpus", "4")) == 0
    shown = capsys.readouterr().out
    for text in (
        "each of ranks 0 to 1: layers 0 to 0, embedding",
        "each of ranks 2 to 3: layers 1 to 1, head",
        "1 tensor- x 2 pipeline- x 2 data-parallel",
        "prompts.jsonl: 24 rows, none cut to data.max_prompt_tokens=40; the longest has ",
        "2,000 iterations of 16 prompts",
        "global_size: 16",
        "KV cache",
        *("policy", "ref_policy", "critic", "reward_model", "rollout", "update critic"),
    ):
        assert text in shown
    assert not (world / "never").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--gpus", "3"), "3 data-parallel ranks"),
        (("parallel.tensor_size=3", "--gpus", "3"), "num_attention_heads=4 cannot be divided"),
        (("data.train=nowhere.jsonl",), "nowhere.jsonl"),
        (("models.reward_model=nowhere",), "--sizes-from"),
        (("models.critic=nowhere",), "models.critic=nowhere is not a directory"),
        (("ppo.prompts=15",), "cannot be divided by batch.global_size=16"),
        (("--gpu-memory", "2"), "do not fit in --gpu-memory 2"),
    ],
)
def test_what_cannot_run_is_one_line_and_exit_code_2(
    world: Path, change: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [part for part in change if "=" in part]
    options = [part for part in change if "=" not in part]
    assert main([*ppo(world, *settings), "--dry-run", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_policy_is_no_reward_model(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ppo(world, f"models.reward_model={world / 'policy'}"), "--dry-run"]) == 2
    assert "score.weight" in capsys.readouterr().err


def test_models_that_an_earlier_run_has_yet_to_write(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ppo(world, "models.reward_model=later/final/reward_model")
    assert main([*settings, "--dry-run", "--sizes-from", str(world / "policy")]) == 0
    assert "is not there yet" in capsys.readouterr().out


def test_megatron_is_not_imported(world: Path) -> None:
    code = (
        "import sys; from megatron_gil.cli import main; "
        f"status = main({[*ppo(world), '--dry-run']!r}); "
        "sys.exit(status or 3 * any(name.startswith('megatron.') for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
