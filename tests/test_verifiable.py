"""examples/verifiable: its rule, its data, and every step of it in small."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron_gil.cli import main
from tests.ranks import run_ranks

SCRIPT = Path(__file__).parents[1] / "examples" / "verifiable" / "arithmetic.py"


def _script() -> Any:
    spec = importlib.util.spec_from_file_location("arithmetic", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_rule() -> None:
    assert _script().right(["12", " 12 ", "12 ", "2", "", "12="], ["12"] * 6) == [1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("seed", [1, 2])
def test_sums_are_right_and_those_held_out_are_not_trained_on(seed: int) -> None:
    train, held_out = _script().sums(seed)
    for row in [*train, *held_out]:
        a, b = map(int, row["prompt"].removesuffix("=").split("+"))
        assert row["answer"] == str(a + b)
        assert row["group"] == ("easy" if max(a, b) < 10 else "hard")
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    assert len({row["prompt"] for row in [*train, *held_out]}) == 100 + 40**2
    assert {row["group"] for row in held_out} == {"easy", "hard"}
    easy = sum(row["group"] == "easy" for row in train) / len(train)
    assert 0.4 < easy < 0.6


def _small(output: Path) -> tuple[str, list[str]]:
    """The whole example, with trainings of a few updates."""
    module, said = _script(), list[str]()
    small = {"sft": ["train.updates=2"], "ppo": ["ppo.iterations=2", "log.eval_every=1", "ppo.prompts=16"]}

    def run(*arguments: str) -> float:
        heard = io.StringIO()
        with contextlib.redirect_stderr(heard):
            code = main([*arguments, *small.get(arguments[0], [])])
        assert code == 0, heard.getvalue()
        said.append(heard.getvalue())
        return 1.0

    module.run = run
    assert module.train_seed(output, 3) == {"sft": 1.0, "grpo": 1.0, "grpo_gil": 1.0}
    found = module.curves(output, [3])
    module.draw(found, output / "curve.png")
    return module.table(found), said


def test_every_step_in_small(tmp_path: Path) -> None:
    table, said = run_ranks(_small, 1, tmp_path)[0]
    assert len(said) == 5  # sft, grpo, grpo_gil, generate, score
    assert "reward_model" not in " ".join(said)
    assert "critic" not in said[1]
    assert re.search(r"\nclassifier +10\d thousand parameters, float32, trained, from\s+\S+/sft/", said[2]), said[2]
    assert table.count("\n| GRPO ") == table.count("\n| GRPO-GIL ") == 3
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.size[0] > 500
