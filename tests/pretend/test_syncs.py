"""Host synchronisations are a budget: where the host may wait for the GPU, and how often.

Each line allows a function so many for every unit of the work: Python that waits for the GPU cannot give it the next
kernels meanwhile. An iteration is run in two sizes, so that a figure for a microbatch cannot pass as one for an update.
The figures are exact: whoever takes a synchronisation out takes it out here.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_gil.engine.slots import STEPS
from megatron_gil.training.ppo import iteration as training_ppo
from tests.pretend.report import Line, Sync
from tests.pretend.running import Change, run_commands, settings

Budget = dict[str, dict[str, int]]
"""file:function -> unit -> synchronisations."""

LENGTHS = "engine/packing.py:_read_sizes"  # of all rows at once
UPDATE: Budget = {
    LENGTHS: {"update": 1},
    "engine/megatron.py:TrainableModel._reduce": {"update": 1},  # all metrics
    "engine/optimizer.py:ModelOptimizer._gradient_norm": {"update": 1},  # decides whether the step is taken
}
if version("megatron-core").startswith("0.16."):  # later ones do not ask whether there are tokens
    UPDATE["megatron/core/distributed/finalize_model_grads.py:finalize_model_grads"] = {"update": 1}

SUPERVISED: Budget = {
    **UPDATE,
    "training/supervised/trainer.py:SupervisedTrainer.iterate": {"iteration": 2},  # tokens and rows of the batch
    "training/row_source.py:truncated_fraction": {"iteration": 2},  # there and back
}

BUDGETS: dict[str, Budget] = {
    "sft": {
        **SUPERVISED,
        "training/row_source.py:to_device": {"iteration": 4},  # one a field
    },
    "reward": {
        **SUPERVISED,
        "training/row_source.py:to_device": {"iteration": 5},
    },
    "dpo": {
        **SUPERVISED,
        LENGTHS: {"update": 1, "iteration": 1},  # and of the reference's pass
        "training/row_source.py:to_device": {"iteration": 5},
    },
    "ppo": {
        **UPDATE,
        LENGTHS: {"update": 1, "iteration": 4},  # and of each model that scores
        "engine/slots.py:Slots.advance": {"look": 1},  # which slots have ended
        "engine/slots.py:Slots._seat": {"fill": 1},
        "engine/slots.py:Slots._prefill": {"row": 1},
        "engine/slots.py:Slots.__init__": {"iteration": 4},
        "engine/generation.py:Generator._answer": {"iteration": 1},
        "engine/generation.py:Generator.sample": {"iteration": 1},
        "engine/generation.py:_uniforms": {"iteration": 1},
        "engine/generation.py:_join": {"iteration": 1},
        "models/rope.py:rope_frequencies": {"iteration": 1},
        "training/row_source.py:to_device": {"iteration": 5},
        "algo/groups.py:group_statistics": {"iteration": 2},  # twice: by scores, and by returns
        "algo/groups.py:HighGroup.update": {"iteration": 2},
        "algo/masked.py:ScoreMoments.merge": {"iteration": 2},
        "training/ppo/shaping_metrics.py:group_metrics": {"iteration": 2},
        "training/ppo/alarms.py:Alarms.out_of_range_fraction": {"iteration": 1},
        "training/run/metrics.py:Means.reduce": {"iteration": 1},
        "training/ppo/iteration.py:PpoTrainer.shape": {"iteration": 2},
        "training/row_source.py:truncated_fraction": {"iteration": 2},
    },
}


AT_MOST = {"engine/slots.py:Slots._prefill"}
"""Prompts of like length are read together, so that how often depends on their lengths."""


def place(sync: Sync) -> str:
    return sync.line.function.rpartition(" > ")[2].removeprefix("megatron_gil/")


def complaints(found: Counter[Sync], budget: Budget, units: dict[str, int]) -> list[str]:
    """What differs from the budget, a line each with where it is and how often."""
    counts, lines = Counter[str](), dict[str, list[str]]()
    for sync, count in found.items():
        counts[place(sync)] += count
        lines.setdefault(place(sync), []).append(f"{count} x {sync}")
    said = []
    for name in sorted(counts.keys() | budget.keys()):
        allowed = sum(count * units[unit] for unit, count in budget.get(name, {}).items())
        if counts[name] > allowed or (counts[name] < allowed and name not in AT_MOST):
            rule = " + ".join(f"{count} a {unit} ({units[unit]})" for unit, count in budget.get(name, {}).items())
            advice = "take them out of the loop" if counts[name] > allowed else "tighten the budget"
            where = "".join(f"\n    {line}" for line in lines.get(name, []))
            said.append(f"{name}: {counts[name]}, the budget says {allowed} = {rule or 'nothing'}: {advice}{where}")
    return said


def check(found: Counter[Sync], command: str, units: dict[str, int]) -> None:
    said = complaints(found, BUDGETS[command], units)
    assert not said, f"host synchronisations of an iteration of {command}:\n" + "\n".join(said)


SLOTS = 4


def ppo_sizes(*, prompts: int, tokens: int, micro_size: int) -> tuple[list[str], dict[str, int]]:
    """(settings, units of one iteration)."""
    minibatches, fills = prompts // 8, prompts // SLOTS
    units = {
        "iteration": 1,
        "row": prompts,
        "fill": fills,
        "look": fills * math.ceil(tokens / STEPS),
        "update": 2 * minibatches,
        "microbatch": 2 * minibatches * 8 // micro_size,
    }
    changes = {
        "ppo.prompts": prompts,
        "gil.warmup_updates": 0,
        "batch.micro_size": micro_size,
        "sampling.micro_size": SLOTS,
        "sampling.max_new_tokens": tokens,
        "sampling.min_new_tokens": tokens,
    }
    return [f"{key}={value}" for key, value in changes.items()], units


SMALL = ppo_sizes(prompts=8, tokens=3, micro_size=4)
LARGE = ppo_sizes(prompts=16, tokens=20, micro_size=2)


def iterations(
    root: Path, command: str, runs: dict[Path, list[str]], change: Change | None = None
) -> list[Counter[Sync]]:
    """The one iteration of each run, in one process."""
    commands = [[*settings(command, root, run), *changes] for run, changes in runs.items()]
    (answer,) = run_commands(root, 1, commands, change=change)
    assert set(answer.codes) == {0}, answer.said
    assert len(answer.iterations) == len(commands)
    return answer.iterations


def test_ppo(world: Path, tmp_path: Path) -> None:
    sizes = {tmp_path / name: size for name, size in {"small": SMALL, "large": LARGE}.items()}
    found = iterations(world, "ppo", {run: changes for run, (changes, _) in sizes.items()})
    for counts, (_, units) in zip(found, sizes.values(), strict=True):
        check(counts, "ppo", units)


def test_moving_models_to_the_host_and_back_waits_for_nothing(world: Path, tmp_path: Path) -> None:
    changes, units = LARGE
    (counts,) = iterations(world, "ppo", {tmp_path / "run": [*changes, "models.offload=all"]})
    check(counts, "ppo", units)


@pytest.mark.parametrize("command", ["sft", "reward", "dpo"])
def test_supervised(world: Path, tmp_path: Path, command: str) -> None:
    runs = {tmp_path / f"micro_{size}": ["train.updates=1", f"batch.micro_size={size}"] for size in (4, 1)}
    units = {"iteration": 1, "update": 1}
    for counts, microbatches in zip(iterations(world, command, runs), (2, 8), strict=True):
        check(counts, command, {**units, "microbatch": microbatches})


@contextlib.contextmanager
def loss_that_is_read() -> Iterator[None]:
    """A policy loss that somebody looks at, in every microbatch."""
    policy_loss = training_ppo.policy_loss

    def read(*args: Any, **kwargs: Any) -> Any:
        loss = policy_loss(*args, **kwargs)
        assert float(loss.total) < 1e9
        return loss

    with mock.patch.object(training_ppo, "policy_loss", read):
        yield


def test_a_new_synchronisation_fails_and_is_shown(world: Path, tmp_path: Path) -> None:
    changes, units = SMALL
    (counts,) = iterations(world, "ppo", {tmp_path / "run": changes}, loss_that_is_read)
    (said,) = complaints(counts, BUDGETS["ppo"], units)
    rule, line = said.splitlines()
    function = "PpoTrainer._update_policy.<locals>.invariant_policy_loss"
    assert rule == f"training/ppo/iteration.py:{function}: 2, the budget says 0 = nothing: take them out of the loop"
    assert line.startswith("    2 x megatron_gil/training/ppo/iteration.py:")
    assert line.endswith(f" (value, in {function})")


def test_a_higher_and_a_lower_count_fail() -> None:
    _, units = SMALL
    budget: Budget = {"a.py:f": {"row": 1, "fill": 1}}
    line = Sync("value", Line("megatron_gil/a.py:f", "megatron_gil/a.py:3"))
    assert complaints(Counter({line: 10}), budget, units) == []
    for count, advice in ((11, "take them out of the loop"), (9, "tighten the budget")):
        (said,) = complaints(Counter({line: count}), budget, units)
        assert said.startswith(f"a.py:f: {count}, the budget says 10 = 1 a row (8) + 1 a fill (2): {advice}")
    assert complaints(Counter(), budget, units) == [
        "a.py:f: 0, the budget says 10 = 1 a row (8) + 1 a fill (2): tighten the budget"
    ]
