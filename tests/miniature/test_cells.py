"""Bookkeeping of the grid: what a cell runs, when it is finished, what may not be mixed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from alarms import FAULTS, HEALTHY, drop_iteration, of_run
from cells import GRID, Cell, Place, commands, read_grid, take_world, write_longer_chosen
from rich.console import Console
from run import Progress, choose, waves

from megatron_gil.config import ConfigError, DpoConfig, PpoConfig, RewardConfig, SftConfig
from megatron_gil.config.files import load_config
from megatron_gil.demo.stages import Stage
from megatron_gil.evaluation.report.runs import read_run
from megatron_gil.jsonl import iter_jsonl

CONFIGS = {"sft": SftConfig, "reward": RewardConfig, "dpo": DpoConfig, "ppo": PpoConfig}


def _place(output: Path, name: str) -> Place:
    return Place(output=output, seed=3, cell=read_grid()[name])


@pytest.mark.parametrize("name", [name for name, cell in read_grid().items() if cell.command != "none"])
def test_every_cell_is_a_valid_command_on_its_own_seed(name: str, tmp_path: Path) -> None:
    train = commands(_place(tmp_path, name), read_grid())[0]
    config = load_config(CONFIGS[train[0]], Path(train[2]), train[3:])
    assert config.run.seed == 3
    assert config.run.dir == str(tmp_path / "seed_3" / name / "run")


def test_cells_inherit_the_settings_of_the_cell_they_are_like(tmp_path: Path) -> None:
    def config(name: str) -> PpoConfig:
        train = commands(_place(tmp_path, name), read_grid())[0]
        return load_config(PpoConfig, Path(train[2]), train[3:])

    ppo, kl, gil, plain = (config(name) for name in ("ppo", "ppo_kl", "gil", "gil_plain_kl"))
    assert (ppo.ppo.kl_coef, ppo.gil.num_groups) == (0.0, 1)
    assert (kl.ppo.kl_coef, kl.gil.num_groups) == (0.1, 1)
    assert replace(kl, gil=gil.gil, run=gil.run) == gil  # the same but for the groups
    assert replace(gil.gil, adaptive_kl=False) == plain.gil


@pytest.mark.parametrize("grid", ["grid.yaml", "tuning.yaml", "targets.yaml", "rivals.yaml", "faults.yaml"])
def test_no_two_cells_are_the_same(grid: str) -> None:
    cells = read_grid(GRID.with_name(grid)).values()
    assert len({(c.command, tuple(c.settings), c.iterations) for c in cells}) == len(cells)


def test_a_grid_has_the_cells_of_its_base() -> None:
    base, tuning = read_grid(), read_grid(GRID.with_name("tuning.yaml"))
    assert {name: tuning[name] for name in base} == base
    assert len(tuning) > len(base)


def test_faults_are_valid_commands_on_the_seeds_own_files(tmp_path: Path) -> None:
    cells = read_grid(GRID.with_name("faults.yaml"))
    places = {name: Place(output=tmp_path, seed=3, cell=cells[name]) for name in (*FAULTS.values(), *HEALTHY)}
    for place in places.values():
        train = commands(place, cells)[0]
        config = load_config(PpoConfig, Path(train[2]), train[3:])
        assert config.log.samples_every == 5
        reward = "reward_longer" if place.cell.name == "longer" else "reward"
        trained = Place(output=tmp_path, seed=3, cell=cells[reward])
        assert config.models.reward_model == str(trained.model)
    train = commands(replace(places["longer"], cell=cells["reward_longer"]), cells)[0]
    config = load_config(RewardConfig, Path(train[2]), train[3:])
    take_world(tmp_path / "seed_3", 3)
    write_longer_chosen(tmp_path / "seed_3")
    assert config.data.train is not None
    rows = [row for _, row in iter_jsonl(Path(config.data.train))]
    assert len(rows) == 12000
    assert all(len(row["chosen"]) >= len(row["rejected"]) for row in rows)


def test_methods_of_a_seed_share_the_data_and_the_models_they_start_from(tmp_path: Path) -> None:
    def files(name: str) -> list[str]:
        train = commands(_place(tmp_path, name), read_grid())[0]
        return [text for text in train if text.startswith(("models.", "data.", "run.seed"))]

    assert files("ppo") == files("gil") == files("grpo_gil")


def test_the_sft_model_answers_once_there_is_a_reward_model(tmp_path: Path) -> None:
    cells = read_grid()
    assert [c[0] for c in commands(_place(tmp_path, "sft_model"), cells)] == ["sft"]
    assert [c[0] for c in commands(_place(tmp_path, "sft"), cells)] == ["generate", "score"]
    places = [_place(tmp_path, name) for name in cells]
    order = [{place.cell.name for place in wave} for wave in waves(places)]
    assert order[:2] == [{"sft_model"}, {"reward", "dpo"}]
    assert set.union(*order) == set(cells)
    assert sum(map(len, order)) == len(cells)


def test_a_cell_begun_with_other_settings_is_refused(tmp_path: Path) -> None:
    place = _place(tmp_path, "gil")
    place.take()
    place.take()  # the same again is the same cell
    other = Place(output=tmp_path, seed=3, cell=replace(place.cell, iterations=7))
    with pytest.raises(ConfigError, match="other settings; choose another --output"):
        other.take()


def test_a_choice_brings_what_it_needs_and_refuses_a_wrong_name() -> None:
    assert list(choose(read_grid(), ["gil"])) == ["sft_model", "reward", "gil"]
    with pytest.raises(ConfigError, match="no cell is called gill"):
        choose(read_grid(), ["gill"])


def test_a_world_that_was_cut_off_is_written_anew(tmp_path: Path) -> None:
    take_world(tmp_path, 3)
    whole = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / "held_out_prompts.jsonl").unlink()
    (tmp_path / "world" / "prompts.jsonl").write_text("half a li", encoding="utf-8")
    take_world(tmp_path, 3)
    assert {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == whole
    rows = whole["held_out_prompts.jsonl"].decode().splitlines()
    assert {json.loads(row)["group"] for row in rows} == {"greet", "refuse", "fact", "both", "mixed"}


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ([0.5] * 8, None),
        ([0.5, 0.5, 0.5, 0.5, 0.3, 0.3, 0.3, 0.3], 19),  # mean of 0.5, 0.5, 0.3, 0.3, 0.3 at the fourth
        ([0.5, 0.5, 0.3, 0.3, 0.3, 0.3, 0.5, 0.5, 0.5], None),  # not for good
        ([0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.32], None),  # too late to tell
        ([0.3, 0.4, 0.5, 0.6, 0.7], None),
    ],
)
def test_gold_drops_when_it_falls_for_good(
    curve: list[float], expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alarms.gold_curve", lambda samples: [row["gold"] for row in samples])
    run_dir = tmp_path / "seed_3" / "ppo" / "run"
    run_dir.mkdir(parents=True)
    texts = {"prompt": "", "response": ""}
    samples = [{"iteration": 5 * i + 4, "gold": gold, **texts} for i, gold in enumerate(curve)]
    (run_dir / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples), encoding="utf-8")
    raised = [{"iteration": i, "alarm/kl": float(i in (7, 9))} for i in range(40)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in raised), encoding="utf-8")
    assert drop_iteration(read_run(run_dir)) == expected
    (row,) = of_run("ppo", run_dir)
    counted = {"iterations": 40, "raised": 2, "first": 7, "gold_drop": expected}
    assert row == {"cell": "ppo", "seed": 3, "alarm": "kl", **counted}


def test_progress_shows_a_cell_as_done_only_with_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cell = Cell(name="gil", label="PPO-GIL", command="ppo", iterations=10, settings=())
    stage = Stage(name="gil seed 1", arguments=[], product=tmp_path / "rows.jsonl", num_iterations=10)
    progress = Progress([cell], [1], Console(width=80))
    progress.show(stage, 10)  # trained, not yet measured
    assert "done" not in capsys.readouterr().out
    stage.product.write_text("", encoding="utf-8")
    progress.show(stage, 10)
    progress.show(stage, 10)
    assert capsys.readouterr().out == "gil seed 1 done (1 of 1)\n"
