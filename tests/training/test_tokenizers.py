"""Models that read one another's tokens share a tokenizer, or the command is refused; one that is declared another
reads text. What is cut is said."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_gil import config as c
from megatron_gil.config import ConfigError
from megatron_gil.config.files import load_config
from megatron_gil.data.text.tokenizer import Tokenizer
from megatron_gil.demo.tiny_llama import train_tokenizer
from megatron_gil.jsonl import iter_jsonl
from megatron_gil.models.families import read_spec
from megatron_gil.models.uses import model_uses
from megatron_gil.training.tokenizers import first_difference, read_tokenizers
from tests.models.tiny import SIZES
from tests.ranks import run_ranks
from tests.test_cli import _call
from tests.world import SPECIAL, write_json, write_rows

CONFIGS: dict[str, Any] = {
    "sft": c.SftConfig,
    "reward": c.RewardConfig,
    "dpo": c.DpoConfig,
    "ppo": c.PpoConfig,
    "generate": c.GenerateConfig,
    "score": c.ScoreConfig,
    "evaluate-reward": c.EvaluateRewardConfig,
}
SHORT = ("data.max_prompt_tokens=32", "data.max_tokens=48", "sampling.max_new_tokens=8")


@pytest.fixture(scope="module")
def others(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories that differ from the world's policy in their tokenizer alone."""
    root = tmp_path_factory.mktemp("others")
    found = {}
    for name in ("other", "bos", "larger", "padded", "bare"):
        found[name] = Path(shutil.copytree(world / "reward_model", root / name))
    texts = ["the snow was on the stone and the fire in the tree"] * 9 + ["bird sea wind rain sun moon bcfgjklpqvxyz"]
    train_tokenizer(texts, found["other"] / "tokenizer.model", vocab_size=SIZES["vocab_size"] - 8)
    write_json(found["bos"] / "tokenizer_config.json", {**SPECIAL, "add_bos_token": False})
    vocabulary = Tokenizer.read(world / "policy").vocab_size
    write_json(found["larger"] / "added_tokens.json", {"<|more|>": SIZES["vocab_size"] + 3, "<|end|>": vocabulary})
    write_json(found["larger"] / "tokenizer_config.json", {**SPECIAL, "eos_token": "<|more|>"})
    write_json(found["padded"] / "tokenizer_config.json", {**SPECIAL, "pad_token": "[PAD]"})
    write_json(found["padded"] / "added_tokens.json", {"[PAD]": max(vocabulary, SIZES["vocab_size"])})
    (found["bare"] / "tokenizer.model").unlink()
    return found


def _check(command: str, world: Path, *overrides: str) -> Any:
    policy, reward_model = f"models.policy={world / 'policy'}", f"models.reward_model={world / 'reward_model'}"
    common = [policy, reward_model, *(o for o in SHORT if command in ("ppo", "generate") or o.startswith("data"))]
    extra = ["run.dir=x"] if command not in ("generate", "score", "evaluate-reward") else ["output=x"]
    config = load_config(CONFIGS[command], None, [*common, *extra, *overrides])
    uses = model_uses(config)
    paths = {use.role: Path(getattr(config.models, use.key)) for use in uses}
    return read_tokenizers(config, uses, paths, {role: read_spec(path) for role, path in paths.items()})


@pytest.mark.parametrize("command", CONFIGS)
def test_models_of_one_tokenizer_go_together(command: str, world: Path, others: dict[str, Path]) -> None:
    found = _check(command, world)
    assert found.notes == ()
    assert found.reward is None
    assert found.directory == world / (
        "reward_model" if command in ("reward", "score", "evaluate-reward") else "policy"
    )
    for name in ("padded", "bare"):  # a token that only pads changes nothing; a directory may hold no tokenizer
        lead = "reward_model" if command in ("reward", "score", "evaluate-reward") else "policy"
        _check(command, world, f"models.{lead}={others[name]}", f"data.tokenizer={world / 'policy'}")
    if command == "ppo":
        _check(command, world, f"models.reward_model={others['padded']}")


@pytest.mark.parametrize(
    ("command", "override", "name", "message"),
    [
        ("ppo", "models.reward_model", "other", r"set models\.reward_tokenizer=own"),
        ("ppo", "models.critic", "other", "its token "),
        ("ppo", "models.ref_policy", "other", "give models that share a tokenizer"),
        ("ppo", "models.reward_model", "bos", "puts no bos token before a text"),
        ("dpo", "models.ref_policy", "other", "its token "),
        ("sft", "data.tokenizer", "other", r"has another tokenizer than data\.tokenizer=.*data\.tokenizer=null"),
        ("reward", "data.tokenizer", "other", "its token "),
        ("score", "data.tokenizer", "other", "its token "),
        ("generate", "data.tokenizer", "other", "its token "),
        ("sft", "data.tokenizer", "larger", r"has a vocabulary of \d+; take the tokenizer that belongs to the model"),
        ("score", "data.tokenizer", "larger", r"makes \d+ different tokens"),
    ],
)
def test_another_tokenizer_is_refused(
    command: str, override: str, name: str, message: str, world: Path, others: dict[str, Path]
) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        _check(command, world, f"{override}={others[name]}")
    assert str(others[name]) in str(refused.value)
    assert f"{world}" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_first_difference_is_named(world: Path, others: dict[str, Path]) -> None:
    ours = Tokenizer.read(world / "policy")
    assert first_difference(ours, Tokenizer.read(world / "reward_model")) is None
    theirs = Tokenizer.read(others["other"])
    i = next(i for i in range(60) if ours.token(i) != theirs.token(i))
    assert first_difference(ours, theirs) == f"its token {i} is {theirs.token(i)!r}, not {ours.token(i)!r}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), "set models.critic to a directory with the policy's tokenizer"),
        (("models.critic=policy", "gil.classifier=own_model"), "set gil.classifier=critic_head"),
    ],
)
def test_what_reads_tokens_cannot_start_from_a_model_of_other_tokens(
    overrides: tuple[str, ...], message: str, world: Path, others: dict[str, Path]
) -> None:
    own = ("models.reward_tokenizer=own", f"models.reward_model={others['other']}")
    with pytest.raises(ConfigError, match=message):
        _check("ppo", world, *own, *(o.replace("=policy", f"={world / 'policy'}") for o in overrides))
    found = _check("ppo", world, *own, f"models.critic={world / 'policy'}")
    assert first_difference(found.reward, Tokenizer.read(others["other"])) is None
    _check("ppo", world, *own, "ppo.advantages=rloo", "ppo.responses_per_prompt=2", "gil.num_groups=1")


@pytest.mark.parametrize(
    ("command", "override", "message"),
    [
        ("sft", "data.max_tokens=65", r"data\.max_tokens=65 is above the 64 positions of models\.policy="),
        ("reward", "data.max_tokens=65", r"of models\.reward_model="),
        ("dpo", "data.max_tokens=65", r"max_position_embeddings"),
        ("score", "data.max_tokens=65", r"data\.max_tokens=65"),
        ("ppo", "data.max_prompt_tokens=57", r"data\.max_prompt_tokens=57 \+ sampling\.max_new_tokens=8 is above"),
        ("generate", "sampling.max_new_tokens=33", r"max_prompt_tokens=32 \+ sampling\.max_new_tokens=33 is above"),
    ],
)
def test_rows_longer_than_the_positions_are_refused(command: str, override: str, message: str, world: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        _check(command, world, override)
    key, _, value = override.partition("=")
    _check(command, world, f"{key}={int(value) - 1}")


def _ppo(world: Path, run: Path, *more: str) -> list[str]:
    return [
        "ppo", f"run.dir={run}", f"models.policy={world / 'policy'}", f"models.reward_model={world / 'reward_model'}",
        f"data.train={world / 'prompts.jsonl'}", "data.max_prompt_tokens=6", "sampling.max_new_tokens=10",
        "batch.global_size=8", "batch.micro_size=4", "ppo.iterations=1", "ppo.prompts=8", "log.samples=8",
        "log.tensorboard=false", *more,
    ]  # fmt: skip


def _call_all(calls: list[list[str]], root: Path) -> list[tuple[int, str, str]]:
    return [_call(arguments, root) for arguments in calls]


def test_the_run_and_the_dry_run_say_the_same(world: Path, others: dict[str, Path], tmp_path: Path) -> None:
    """Of a tokenizer that does not fit, and of how many rows are cut."""
    wrong = _ppo(world, tmp_path / "never", f"models.reward_model={others['other']}")
    good = _ppo(world, tmp_path / "run")
    dry, real, said, ran = run_ranks(_call_all, 1, [[*wrong, "--dry-run"], wrong, [*good, "--dry-run"], good], world)[0]
    assert dry == real
    assert dry[0] == 2
    assert dry[1].count("\n") == 1
    assert not (tmp_path / "never").exists()
    ours = Tokenizer.read(world / "policy")
    lengths = [len(ours.encode(row["prompt"], bos=True)) for _, row in iter_jsonl(world / "prompts.jsonl")]
    num_cut = sum(length > 6 for length in lengths)
    assert 0 < num_cut < 24
    line = f"24 rows, {num_cut} ({num_cut / 24:.1%}) cut to data.max_prompt_tokens=6; the longest has {max(lengths)}"
    assert (said[0], ran[0]) == (0, 0), said[1] + ran[1]
    assert line in said[2]
    assert line in " ".join(ran[1].split())
    samples = [row for _, row in iter_jsonl(tmp_path / "run" / "samples.jsonl")]
    (metrics,) = (row for _, row in iter_jsonl(tmp_path / "run" / "metrics.jsonl"))
    assert metrics["data/truncated_fraction"] == sum("prompt_truncated" in row for row in samples) / 8
    whole = {row["prompt"] for _, row in iter_jsonl(world / "prompts.jsonl")}
    for row in samples:
        assert (row["prompt"] in whole) != row.get("prompt_truncated", False)
        assert any(prompt.endswith(row["prompt"]) for prompt in whole)


def _write_rewarded(world: Path, source: Path, run: Path) -> Path:
    """The run's samples as a file for `score`."""
    rows = [row for _, row in iter_jsonl(run / "samples.jsonl")]
    return write_rows(run / "responses.jsonl", [{"prompt": r["prompt"], "response": r["response"]} for r in rows])


def _own_and_score(world: Path, other: Path, run: Path) -> tuple[Any, Any]:
    own = ["models.reward_tokenizer=own", f"models.reward_model={other}", f"models.critic={world / 'policy'}"]
    ran = _call(_ppo(world, run, "data.max_prompt_tokens=40", "sampling.max_new_tokens=16", *own), world)
    responses = _write_rewarded(world, other, run) if ran[0] == 0 else run
    limits = ["data.max_prompt_tokens=60", "data.max_tokens=64", "batch.micro_size=4"]
    scored = ["score", f"models.reward_model={other}", f"data.train={responses}", f"output={run}/scores.jsonl", *limits]
    return ran, _call(scored, world)


def test_a_reward_model_of_its_own_tokenizer_scores_text(world: Path, others: dict[str, Path], tmp_path: Path) -> None:
    """PPO's scores are those of `score` on the same texts."""
    ran, scored = run_ranks(_own_and_score, 1, world, others["other"], tmp_path / "run")[0]
    assert ran[0] == 0, ran[1]
    assert scored[0] == 0, scored[1]
    samples = [row for _, row in iter_jsonl(tmp_path / "run" / "samples.jsonl")]
    scores = [row["score"] for _, row in iter_jsonl(tmp_path / "run" / "scores.jsonl")]
    assert len(scores) == 8
    assert max(scores) - min(scores) > 0.01
    assert [row["score"] for row in samples] == pytest.approx(scores, abs=1e-5)  # padded to another width
    (metrics,) = (row for _, row in iter_jsonl(tmp_path / "run" / "metrics.jsonl"))
    assert metrics["data/reward_truncated_fraction"] == 0
    mean = sum(scores) / len(scores)
    assert metrics["reward/score_mean"] == pytest.approx(mean, abs=1e-5)


def test_text_longer_than_the_reward_models_positions_loses_the_oldest_of_its_prompt(
    world: Path, others: dict[str, Path]
) -> None:
    from megatron_gil.training.ppo.reward_text import RewardText

    ours, own = Tokenizer.read(world / "policy"), Tokenizer.read(others["other"])
    prompt, response = "sun moon sea tree bird stone rain snow", " wind fire"
    whole = RewardText(ours, own, max_tokens=10_000).encode(prompt, response)
    for max_tokens in (1, 2, 9, len(whole.tokens) - 1, len(whole.tokens)):
        row = RewardText(ours, own, max_tokens=max_tokens).encode(prompt, response)
        assert len(row.tokens) <= max_tokens
        assert row.num_tokens == len(whole.tokens)
        assert (row.prompt_cut or row.response_cut) == (max_tokens < len(whole.tokens))
        if not row.response_cut:
            written = [i for i, is_response in zip(whole.tokens, whole.is_response, strict=True) if is_response]
            assert row.tokens[-len(written) :] == written


def test_generate_shows_what_was_read_of_a_cut_prompt(world: Path, tmp_path: Path) -> None:
    output = tmp_path / "responses.jsonl"
    arguments = ["generate", f"models.policy={world / 'policy'}", f"data.train={world / 'prompts.jsonl'}"]
    arguments += ["data.max_prompt_tokens=6", "sampling.max_new_tokens=4", f"output={output}"]
    code, said, _ = run_ranks(_call_all, 1, [arguments], world)[0][0]
    assert code == 0, said
    assert "cut to data.max_prompt_tokens=6" in said
    prompts = [row["prompt"] for _, row in iter_jsonl(world / "prompts.jsonl")]
    rows = [row for _, row in iter_jsonl(output)]
    assert [row["prompt"] for row in rows] == prompts
    ours = Tokenizer.read(world / "policy")
    assert 0 < sum("prompt_read" in row for row in rows) < len(rows)
    for row in rows:
        is_cut = len(ours.encode(row["prompt"], bos=True)) > 6
        assert ("prompt_read" in row) == is_cut
        assert row["prompt"].endswith(row.get("prompt_read", ""))
