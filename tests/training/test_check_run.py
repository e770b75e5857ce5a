"""The dry run accepts exactly what the run's own checks accept, and says the same of what it refuses."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from unittest import mock

import hypothesis
from hypothesis import strategies as st

from megatron_gil.cli import main
from megatron_gil.commands import train
from megatron_gil.config import ConfigError
from tests.ranks import run_ranks
from tests.training.running import use_cache
from tests.world import write_rows

LABELLED, UNLABELLED = "labelled.jsonl", "unlabelled.jsonl"
CHOICES: dict[str, tuple[str, ...]] = {
    "ppo.advantages": ("gae", "rloo", "grpo"),
    "ppo.responses_per_prompt": ("1", "2"),
    "ppo.prompts": ("8", "12"),
    "ppo.ptx_coef": ("0", "0.5"),
    "gil.num_groups": ("1", "2"),
    "gil.groups": ("learned", "known"),
    "gil.classifier": ("critic_head", "own_model"),
    "batch.global_size": ("8", "4"),
    "batch.micro_size": ("4", "3"),
    "data.train": (LABELLED, UNLABELLED, "demonstrations.jsonl", "nowhere.jsonl"),
    "data.eval": ("null", UNLABELLED, "nowhere.jsonl"),
    "data.pretrain": ("null", "demonstrations.jsonl", "preferences.jsonl"),
    "data.max_prompt_tokens": ("32", "60"),
    "models.critic": ("null", "policy", "nowhere"),
    "models.reward_model": ("reward_model", "policy", "null"),
    "reward.function": ("null", "tests.training.test_check_run:score", "nowhere:score"),
    "models.reward_tokenizer": ("same", "own"),
    "checkpoint.keep_best": ("null", "eval/reward/score_mean", "eval/nothing"),
}
"""What is drawn, the first of each most often, so that some configs can run."""
PLACES = ("data.train", "data.eval", "data.pretrain", "models.critic", "models.reward_model")
ARGUMENTS = st.fixed_dictionaries(
    {key: st.sampled_from((*(values[0],) * 3, *values)) for key, values in CHOICES.items()}
)


ACCEPTED = "everything is right"
"""Said in the place of taking the run directory, as a refusal, after which a command leaves nothing behind."""


def score(responses: list[str], group: list[str]) -> list[float]:
    """Needs a field that not every drawn file has."""
    return [float(label == "easy") for label in group]


def _call(arguments: list[str]) -> tuple[int, str]:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = main(arguments)
    return (0, "") if code == 0 or ACCEPTED in said.getvalue() else (code, said.getvalue())


def _compare(root: Path, directory: Path) -> tuple[int, int]:
    """How many drawn configs were accepted and refused, by both alike."""
    use_cache(root)
    counts = [0, 0]

    @hypothesis.settings(max_examples=30, deadline=None, derandomize=True)
    @hypothesis.given(ARGUMENTS)
    def agree(drawn: dict[str, str]) -> None:
        settings = {**drawn, "models.policy": "policy", "run.dir": str(directory / "run"), "log.eval_every": "1"}
        for key in (*PLACES, "models.policy"):
            if settings[key] != "null":
                settings[key] = str(root / settings[key])
        arguments = ["ppo", *(f"{key}={value}" for key, value in settings.items()), "sampling.max_new_tokens=8"]
        with mock.patch.object(train, "take_run_directory", side_effect=ConfigError(ACCEPTED)):
            run = _call([*arguments, "data.max_tokens=48"])
        dry = _call([*arguments, "data.max_tokens=48", "--dry-run"])
        assert run[0] == dry[0], (arguments, run, dry)
        assert run[1] == dry[1], (arguments, run, dry)
        counts[run[0] == 2] += 1

    agree()
    return counts[0], counts[1]


def test_the_dry_run_accepts_what_the_run_accepts(world: Path, tmp_path: Path) -> None:
    write_rows(world / LABELLED, [{"prompt": f"sun {i}", "group": ("easy", "hard")[i % 2]} for i in range(16)])
    write_rows(world / UNLABELLED, [{"prompt": f"sea {i}"} for i in range(16)])
    accepted, refused = run_ranks(_compare, 1, world, tmp_path)[0]
    assert accepted >= 3
    assert refused >= 10
