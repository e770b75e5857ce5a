"""Every command, and every option that changes which kernels run, on pretended GPUs: nothing that CUDA would refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.faults.running import final_weights, metrics_of
from tests.models.tiny import FAMILIES
from tests.pretend.running import (
    LAYOUTS,
    Answer,
    kernels_as_on_the_cpu,
    losses_not_a_number,
    models_left_where_they_were_made,
    run_commands,
    settings,
)
from tests.ranks import RankError
from tests.world import write_rows

KL_TARGETS = ("gil.kl_target_high=0.5", "gil.kl_target_low=2", "gil.warmup_updates=0")
OWN_MODEL = ("gil.classifier=own_model",)
SAMPLING = ("sampling.temperature=0.7", "sampling.top_k=8", "sampling.top_p=0.9", "sampling.repetition_penalty=1.2")
BFLOAT16 = ("models.dtype=bfloat16",)
DISTRIBUTED = ("parallel.distributed_optimizer=true",)
FULL, SELECTIVE = ("models.recompute=full",), ("models.recompute=selective",)
OPTIMIZERS = {"sft": ("optimizer",), "ppo": ("optimizer", "critic_optimizer")}
PAIRS = ("ppo.prompts=8", "ppo.responses_per_prompt=2")
DETERMINISTIC = ("run.deterministic=true",)
ROLLOUT_OFFLOAD, OFFLOAD = ("models.offload=rollout",), ("models.offload=all",)
FUNCTION = ("reward.function=tests.pretend.test_commands:_lengths", "reward.weight=0.5")
BACKGROUND = ("checkpoint.background=true", "checkpoint.every=1")

CASES: list[tuple[str, str, tuple[str, ...]]] = [
    ("one", "sft", (*FULL, "eval")),
    ("one", "sft", (*BFLOAT16, *DISTRIBUTED, *BACKGROUND)),
    ("one", "reward", (*BFLOAT16, "eval")),
    ("one", "dpo", (*SELECTIVE, "dpo.label_smoothing=0.1", "eval")),
    ("one", "ppo", ("eval", "gil.num_groups=3", "gil.balance_coef=0.1", *KL_TARGETS)),
    ("one", "ppo", ("ppo.advantages=rloo", *PAIRS, *OWN_MODEL, *SAMPLING, "sampling.min_new_tokens=2")),
    ("one", "ppo", ("ppo.advantages=grpo", *PAIRS, "gil.num_groups=1", "sampling.temperature=0", "ptx")),
    ("one", "ppo", ("gil.groups=known", "gil.group_value=weighted_log_prob", *BFLOAT16, *FULL)),
    ("one", "ppo", ("gil.num_groups=1", "ppo.kl_coef=0", "ppo.whiten_advantages=false", *SELECTIVE)),
    ("one", "ppo", (*DETERMINISTIC, *SAMPLING, "gil.group_value=weighted_log_prob", "ptx", *FULL)),
    ("one", "reward", (*DETERMINISTIC, *BFLOAT16, "eval")),
    ("one", "dpo", (*DETERMINISTIC, "eval")),
    ("tp2_sp", "ppo", (*DETERMINISTIC, *OWN_MODEL)),
    ("dp2", "sft", (*DETERMINISTIC, *DISTRIBUTED, "eval")),
    ("one", "generate", SAMPLING),
    ("one", "score", BFLOAT16),
    ("tp2", "ppo", (*OWN_MODEL, "gil.group_return=score", "eval")),
    ("tp2_sp", "ppo", (*FULL, *BFLOAT16, "gil.num_groups=3")),
    ("tp2_sp", "dpo", ("eval",)),
    ("pp2", "ppo", ("ppo.advantages=rloo", *PAIRS, *OWN_MODEL, *SAMPLING)),
    ("pp2", "sft", (*SELECTIVE, *BFLOAT16, "eval")),
    ("pp2", "reward", ("eval",)),
    ("dp2", "ppo", (*DISTRIBUTED, *BFLOAT16, "ptx", "gil.groups=known", "eval")),
    ("dp2", "sft", (*DISTRIBUTED, *BACKGROUND, "eval")),
    ("dp2", "generate", ()),
    ("tp2", "score", ()),
    ("dp2", "evaluate-reward", BFLOAT16),
    ("one", "audit", (*OFFLOAD, *BFLOAT16)),
    ("pp2", "audit", (*OWN_MODEL, "audit.group_by=rows")),
    ("one", "ppo", (*OFFLOAD, *BFLOAT16, *OWN_MODEL, "eval")),
    ("dp2", "ppo", (*ROLLOUT_OFFLOAD, *DISTRIBUTED, *BACKGROUND)),
    ("one", "dpo", (*OFFLOAD, *DETERMINISTIC)),
    ("one", "ppo", ("qwen3", *DETERMINISTIC)),
    ("tp2_sp", "ppo", ("mistral", *FULL, *BFLOAT16)),
    ("pp2", "ppo", ("qwen2", "ppo.advantages=rloo", *PAIRS, *OWN_MODEL)),
    ("dp2", "ppo", (*FUNCTION, "models.reward_model=null", "eval")),
    ("one", "ppo", (*FUNCTION, *BFLOAT16, "eval")),
    ("tp2", "score", FUNCTION),
]


def _lengths(responses: list[str]) -> list[float]:
    return [float(len(response)) for response in responses]


@pytest.fixture(scope="session")
def root(world: Path) -> Path:
    """The tiny world, and texts and answers for the commands that want them."""
    rows = [json.loads(line) for line in (world / "demonstrations.jsonl").read_text().splitlines()]
    write_rows(world / "answers.jsonl", [{"prompt": row["prompt"], "response": row["completion"]} for row in rows])
    write_rows(world / "texts.jsonl", [{"text": row["prompt"] + row["completion"]} for row in rows])
    return world


def changes(root: Path, command: str, options: tuple[str, ...]) -> list[str]:
    """`eval`, `ptx` and a family stand for what needs a file."""
    data = {"ppo": "prompts", "sft": "demonstrations"}.get(command, "preferences")
    files = {
        "eval": [f"data.eval={root / data}.jsonl", "log.eval_every=1"],
        "ptx": ["ppo.ptx_coef=0.5", f"data.pretrain={root / 'texts.jsonl'}"],
    }
    for name in FAMILIES:
        files[name] = [f"models.policy={root / name}", f"models.reward_model={root / name}_reward"]
    return [change for option in options for change in files.get(option, [option])]


def check_ran(ranks: list[Answer]) -> None:
    for answer in ranks:
        assert set(answer.codes) == {0}, answer.said
        assert answer.num_launches > 100


@pytest.mark.parametrize(
    ("layout", "command", "options"), CASES, ids=lambda value: "-".join(value) if isinstance(value, tuple) else value
)
def test_command(root: Path, tmp_path: Path, layout: str, command: str, options: tuple[str, ...]) -> None:
    world_size, parallel = LAYOUTS[layout]
    arguments = [*settings(command, root, tmp_path / "run"), *parallel, *changes(root, command, options)]
    check_ran(run_commands(root, world_size, [arguments]))
    if command in ("generate", "score"):
        assert len((tmp_path / "run.jsonl").read_text().splitlines()) == 24
    elif command == "audit":
        assert json.loads((tmp_path / "run.json").read_text())["quality"]["overall"]["num_pairs"] == 24
    elif command == "evaluate-reward":
        assert json.loads((tmp_path / "run.json").read_text())["overall"]["num_pairs"] == 24
    else:
        rows = metrics_of(tmp_path / "run")
        assert rows
        assert all(not name.endswith("skipped") or value == 0 for row in rows for name, value in row.items())
        assert ("eval" in options) == any(name.startswith("eval/") for name in rows[-1])


@pytest.mark.parametrize(
    ("layout", "command", "more"), [("one", "ppo", BFLOAT16), ("dp2", "sft", DISTRIBUTED)], ids=["one", "dp2"]
)
def test_resume(root: Path, tmp_path: Path, layout: str, command: str, more: tuple[str, ...]) -> None:
    """A checkpoint after one iteration, and another process that goes on to two; the same as two at once."""
    world_size, parallel = LAYOUTS[layout]
    steady = [f"{name}.{key}" for name in OPTIMIZERS[command] for key in ("schedule=constant", "warmup_fraction=0")]
    cut, whole = (
        [*settings(command, root, tmp_path / name), *parallel, *more, *steady, "checkpoint.every=1"]
        for name in ("cut", "whole")
    )
    length = "ppo.iterations" if command == "ppo" else "train.updates"
    check_ran(run_commands(root, world_size, [[*cut, f"{length}=1"]]))
    ranks = run_commands(root, world_size, [[*run, f"{length}=2"] for run in (cut, whole)])
    check_ran(ranks)
    assert "resuming" in ranks[0].said
    assert len(metrics_of(tmp_path / "cut")) == 2
    assert metrics_of(tmp_path / "cut") == metrics_of(tmp_path / "whole")
    assert final_weights(tmp_path / "cut") == final_weights(tmp_path / "whole")


@pytest.mark.parametrize("layout", ["one", "pp2"])
def test_an_update_that_is_skipped(root: Path, tmp_path: Path, layout: str) -> None:
    world_size, parallel = LAYOUTS[layout]
    ranks = run_commands(
        root, world_size, [[*settings("sft", root, tmp_path / "run"), *parallel]], change=losses_not_a_number
    )
    check_ran(ranks)
    assert [row["policy/skipped"] for row in metrics_of(tmp_path / "run")] == [1.0, 1.0]
    assert "gradient norm nan, loss of microbatch 0" in ranks[0].said


@pytest.mark.parametrize(
    ("layout", "flags"),
    [("one", []), ("tp2", ["--tensor-size", "2"]), ("pp2", ["--pipeline-size", "2"])],
    ids=["one", "tp2", "pp2"],
)
def test_verify(root: Path, layout: str, flags: list[str]) -> None:
    models = [str(root / name) for name in ("policy", "reward_model")]
    commands = [["convert", "verify", path, path, "--tolerance", "1e-5", *flags] for path in models]
    ranks = run_commands(root, LAYOUTS[layout][0], commands)
    check_ran(ranks)
    assert ranks[0].said.count("top-1 agreement 100.00%") == 2


def test_pretending_changes_no_value(root: Path, tmp_path: Path) -> None:
    """The metrics and the weights of a PPO run, bit for bit those of the CPU's."""
    for name, pretend in (("pretended", True), ("plain", False)):
        run = [*settings("ppo", root, tmp_path / name), "gil.warmup_updates=0", "ppo.epochs=2"]
        (answer,) = run_commands(root, 1, [run], pretend=pretend, change=kernels_as_on_the_cpu)
        assert answer.codes == [0], answer.said
        assert (answer.num_launches > 0) == pretend
    assert metrics_of(tmp_path / "pretended") == metrics_of(tmp_path / "plain")
    assert final_weights(tmp_path / "pretended") == final_weights(tmp_path / "plain")


def test_a_mistake_in_the_package_is_refused_with_its_line(root: Path, tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"DeviceMistake.* at megatron_gil/models/norm\.py:\d+\)"):
        run_commands(root, 1, [settings("sft", root, tmp_path / "run")], change=models_left_where_they_were_made)


def test_two_ranks_on_one_gpu_are_refused(root: Path, tmp_path: Path) -> None:
    ranks = run_commands(root, 2, [settings("sft", root, tmp_path / "run")], num_gpus=1)
    assert [answer.codes for answer in ranks] == [[2], [2]]
    assert "ranks 0 and 1 have the same GPU of" in ranks[0].said
    assert "start as many processes on a machine as it has GPUs" in ranks[0].said
    assert len(ranks[0].said.strip().splitlines()) == 1
