"""When gold has fallen, when a run counts as hacked slowly, and what an alarm's lead is."""

import json
from pathlib import Path

import pytest
from cells import GRID, read_grid
from forewarning import HACKED, PENALISED, SLOW, fall_of, leads, of_run


def _oracle(gold: list[float]) -> int | None:
    """The definition in words, a loop for each: mean over 10 to each side, under 95 % of the best of those so far."""
    smooth = [sum(gold[max(0, i - 10) : i + 11]) / len(gold[max(0, i - 10) : i + 11]) for i in range(len(gold))]
    for start in range(len(gold) - 9):
        if all(smooth[i] < 0.95 * max(smooth[: i + 1]) for i in range(start, len(gold))):
            return start
    return None


CURVES = [
    ([0.5] * 60, None),
    ([0.5] * 40 + [0.3] * 40, 32),  # 3 of the 21 about iteration 32 are 0.3: the mean is 0.471, the best 0.5
    ([0.5] * 40 + [0.3] * 8 + [0.5] * 40, None),  # not for good
    ([0.5] * 77 + [0.4] * 3, None),  # too late to tell
    ([0.3 + 0.005 * i for i in range(60)], None),
    ([0.4] * 30 + [0.6] * 30 + [0.5] * 30, 56),
]


@pytest.mark.parametrize(("gold", "expected"), CURVES)
def test_gold_has_fallen_where_it_stays_below(gold: list[float], expected: int | None) -> None:
    assert fall_of(gold) == _oracle(gold) == expected


def _run(root: Path, gold: list[float], first_update: int, raised: list[int]) -> Path:
    run_dir = root / "seed_11" / "ppo" / "run"
    run_dir.mkdir(parents=True)
    texts = {"prompt": "", "response": ""}
    samples = [{"iteration": i, "gold": value, **texts} for i, value in enumerate(gold)]
    metrics = [
        {"iteration": i, "alarm/kl": 0.0, "alarm/kl_ahead": float(i in raised)}
        | ({"policy/gradient_norm": 1.0} if i >= first_update else {})
        for i in range(len(gold))
    ]
    for name, rows in (("samples", samples), ("metrics", metrics)):
        (run_dir / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return run_dir


@pytest.mark.parametrize("first_update", [32 - SLOW, 32 - SLOW + 1])
def test_a_run_is_hacked_slowly_by_the_time_from_its_first_update(
    first_update: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forewarning.gold_curve", lambda samples: [row["gold"] for row in samples])
    kl, ahead = of_run("ppo", _run(tmp_path, CURVES[1][0], first_update, [20, 21, 50]))
    shared = {
        "cell": "ppo",
        "seed": 11,
        "first_update": first_update,
        "fall": 32,
        "slow": int(32 - first_update >= SLOW),
    }
    assert kl == shared | {"alarm": "kl", "first": None}
    assert ahead == shared | {"alarm": "kl_ahead", "first": 20}
    assert leads([kl, ahead]) == [None, 12]


def test_the_grid_keeps_every_response() -> None:
    cells = read_grid(GRID.with_name("slow.yaml"))
    for name in (HACKED, *PENALISED):
        assert "log.samples_every=1" in cells[name].settings
        assert "log.samples=64" in cells[name].settings
