"""The range of a reward model's scores: what training sees of it, where it is kept, and who reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_gil.config import ConfigError
from megatron_gil.jsonl import iter_jsonl
from megatron_gil.models.convert.copy import export_model, import_model
from megatron_gil.training.supervised import reward
from megatron_gil.training.supervised.score_range import quantile_range, read_score_range
from tests.ranks import run_ranks
from tests.training.running import DP2, ONE, TP2_PP2, world_size
from tests.training.test_resume import _arguments, _call


def test_the_range_leaves_out_one_in_a_hundred_at_each_end() -> None:
    assert quantile_range([float(i) for i in range(1000, 0, -1)]) == (11.0, 990.0)
    assert quantile_range([2.0, 1.0]) == (1.0, 2.0)


@pytest.mark.parametrize(
    "found", [[2.0, 1.0], [1.0], "12", [None, 2], [0.0, float("inf")], 3, {"1": 2, "3": 4}, [1, 10**400]]
)
def test_a_wrong_range_is_refused_in_one_line(tmp_path: Path, found: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"score_range": found}))
    with pytest.raises(ConfigError, match=r"config\.json: score_range is .*, expected \[low, high\]"):
        read_score_range(tmp_path)


def _train(layout: dict[str, Any], root: Path, run: Path) -> tuple[int, str]:
    reward.WINDOW = 40  # type: ignore[misc]  # three updates of eight pairs: older ones must go
    own = [f"parallel.{key}={value}" for key, value in layout.items() if key != "world"]
    return _call(_arguments("reward", root, run, "log.eval_every=2", *own), root)


def _state(run: Path, iteration: int) -> Any:
    return json.loads((run / f"checkpoints/iter_{iteration:07}/state.json").read_text())["state"]["trainer"]


@pytest.fixture(scope="module")
def runs(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same reward model trained at three layouts."""
    directory = tmp_path_factory.mktemp("reward")
    for name, layout in {"one": ONE, "dp2": DP2, "tp2_pp2": TP2_PP2}.items():
        code, text = run_ranks(_train, world_size(layout), layout, world, directory / name)[0]
        assert code == 0, text
    return {path.name: path for path in directory.iterdir()}


@pytest.mark.parametrize("name", ["one", "dp2", "tp2_pp2"])
def test_every_layout_sees_the_pairs_of_the_last_updates_once(name: str, runs: dict[str, Path]) -> None:
    last = len(list(iter_jsonl(runs["one"] / "metrics.jsonl")))
    for iteration in range(1, last + 1):
        expected, window = (_state(runs[n], iteration)["scores"] for n in ("one", name))
        assert [len(update) for update in window] == [16] * min(iteration, 3)
        for ours, theirs in zip(window, expected, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)  # float32 sums in another order, over a few updates
    row = list(iter_jsonl(runs[name] / "metrics.jsonl"))[-1][1]
    means = [sum(update) / 16 for update in _state(runs[name], last)["scores"]]
    assert means[-1] == pytest.approx(row["reward/mean_score"], abs=1e-6)  # not of the evaluation between
    found = read_score_range(runs[name] / f"checkpoints/iter_{last:07}/reward_model")
    assert found == quantile_range([s for update in _state(runs[name], last)["scores"] for s in update])


def test_conversion_keeps_the_range_and_older_models_have_none(
    runs: dict[str, Path], world: Path, tmp_path: Path
) -> None:
    trained = max((runs["one"] / "checkpoints").glob("iter_*")) / "reward_model"
    export_model(runs["one"], tmp_path / "out", role="reward", note=print)
    import_model(tmp_path / "out", tmp_path / "in")
    assert read_score_range(tmp_path / "in") == read_score_range(tmp_path / "out") == read_score_range(trained)
    assert read_score_range(trained) is not None
    assert read_score_range(world / "reward_model") is None
