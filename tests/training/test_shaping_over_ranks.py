"""Everything that couples rows - moments, whitening, group statistics, omega, c, metrics - over two real ranks."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_gil.algo.masked import ScoreMoments
from megatron_gil.config import GilSection, PpoSection
from megatron_gil.parallel.collectives import all_sum
from megatron_gil.parallel.layout import ParallelLayout
from megatron_gil.training.ppo.grouping import LearnedGroups
from megatron_gil.training.ppo.shaping import shape_experience
from megatron_gil.types import Experience, Rollout, Scores, take_rows
from tests.gathered import gather_rows
from tests.ranks import run_ranks
from tests.training.running import DP2, ONE, parallel, world_size

NUM_ROWS, WIDTH, NUM_GROUPS = 12, 15, 3
GIL = GilSection(num_groups=NUM_GROUPS, warmup_updates=0, ramp_updates=0, invariance_coef=0.4, balance_coef=0.1)
TOLERANCE = 1e-13  # float64 sums of two parts instead of twelve


def _rollout(seed: int) -> tuple[Rollout, Scores]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    prompt_lengths = torch.randint(1, 6, (NUM_ROWS,), generator=generator)
    lengths = prompt_lengths + torch.randint(1, WIDTH - 5, (NUM_ROWS,), generator=generator)
    columns = torch.arange(WIDTH - 1)
    mask = (columns >= prompt_lengths[:, None] - 1) & (columns < lengths[:, None] - 1)
    rows = torch.arange(NUM_ROWS)
    log_probs = -draw(NUM_ROWS, WIDTH - 1).abs()
    rollout = Rollout(
        tokens=torch.ones(NUM_ROWS, WIDTH, dtype=torch.long),
        lengths=lengths,
        prompt_lengths=prompt_lengths,
        response_mask=mask,
        sampled_log_probs=log_probs,
        finished=rows % 3 == 0,
        row_ids=rows,
        sample_ids=rows,
        known_groups=rows % 2,
    )
    scores = Scores(
        log_probs=log_probs,
        ref_log_probs=log_probs + 0.1 * draw(NUM_ROWS, WIDTH - 1),
        entropy=draw(NUM_ROWS, WIDTH - 1).abs(),
        values=draw(NUM_ROWS, WIDTH - 1),
        group_probs=(2 * draw(NUM_ROWS, NUM_GROUPS)).softmax(-1),
        scores=3 * draw(NUM_ROWS) + 5,
    )
    return rollout, scores


def _repeated(rollout: Rollout) -> Tensor:
    return rollout.row_ids % 5 < 2


def _shape(layout: dict[str, Any]) -> list[tuple[Experience, ScoreMoments, dict[str, float], Any]]:
    """Two rollouts one after the other, so that running moments and averages have a past."""
    with parallel(layout) as started:
        sums = all_sum(started)
        grouping, moments, found = LearnedGroups(GIL, sums), ScoreMoments(), []
        for seed in (1, 2):
            rollout, scores = _rollout(seed)
            experience, moments, metrics = shape_experience(
                take_rows(rollout, _mine(started)),
                take_rows(scores, _mine(started)),
                moments=moments,
                grouping=grouping,
                num_updates=1,
                ppo=PpoSection(kl_coef=0.3),
                gil=GIL,
                known_names=("a", "b"),
                repeated=_repeated(rollout)[_mine(started)],
                all_sum=sums,
            )
            found.append((gather_rows(experience, started), moments, metrics, grouping.state()))
        return found


def _shape_broken() -> list[Any]:
    """A good rollout alone; and after one with a NaN score."""
    with parallel(ONE) as started:
        found = []
        for seeds in ((2,), (1, 2)):
            sums = all_sum(started)
            grouping, moments = LearnedGroups(GIL, sums), ScoreMoments()
            for seed in seeds:
                rollout, scores = _rollout(seed)
                if seed == 1:
                    scores.scores[3] = torch.nan
                experience, moments, _ = shape_experience(
                    rollout,
                    scores,
                    moments=moments,
                    grouping=grouping,
                    num_updates=1,
                    ppo=PpoSection(),
                    gil=GIL,
                    known_names=(),
                    repeated=_repeated(rollout),
                    all_sum=sums,
                )
                assert bool(experience.advantages.isnan().any()) == (seed == 1), "the loss would not show the NaN"
            found.append((moments, grouping.state()))
        return found


def test_a_score_that_is_not_a_number_leaves_no_trace() -> None:
    """Its updates are skipped; moments and averages that took it in would spoil every later one."""
    alone, after = run_ranks(_shape_broken, 1)[0]
    assert after == alone


def _mine(layout: ParallelLayout) -> slice:
    """Shares of unequal weight: the first rank's rows differ from the second's in every statistic."""
    share = NUM_ROWS // layout.dp_size
    return slice(layout.dp_rank * share, (layout.dp_rank + 1) * share)


def test_two_ranks_settle_what_one_does() -> None:
    one = run_ranks(_shape, 1, ONE)[0]
    for rank in run_ranks(_shape, world_size(DP2), DP2):
        for (found, moments, metrics, state), (expected, one_moments, one_metrics, one_state) in zip(
            rank, one, strict=True
        ):
            for field in fields(Experience):
                ours, theirs = getattr(found, field.name), getattr(expected, field.name)
                torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE, msg=field.name)
            assert moments.count == one_moments.count
            assert moments.mean == pytest.approx(one_moments.mean, rel=TOLERANCE)
            assert moments.m2 == pytest.approx(one_moments.m2, rel=TOLERANCE)
            assert metrics.keys() == one_metrics.keys()
            for name, value in one_metrics.items():
                assert metrics[name] == pytest.approx(value, rel=1e-12, abs=1e-12), name
            assert state["index"] == one_state["index"]
            assert state["ema"] == pytest.approx(one_state["ema"], rel=TOLERANCE)


def test_the_settled_numbers_are_those_of_the_whole_batch() -> None:
    (experience, moments, metrics, _), _ = run_ranks(_shape, 2, DP2)[1]
    rollout, scores = _rollout(1)
    mask = rollout.response_mask
    assert float(experience.advantages[mask].mean()) == pytest.approx(0, abs=1e-12)
    assert float(experience.advantages[mask].var(correction=0)) == pytest.approx(1, abs=1e-6)
    assert float(experience.invariance_weights.mean()) == pytest.approx(1, abs=1e-12)
    assert moments.mean == pytest.approx(float(scores.scores.mean()))
    assert metrics["reward/score_mean"] == pytest.approx(float(scores.scores.mean()))
    assert metrics["reward/score_std"] == pytest.approx(float(scores.scores.std(correction=0)))
    assert metrics["group/mass_1"] == pytest.approx(float(scores.group_probs[:, 1].mean()))
    weight = scores.group_probs[:, 2]
    expected = float((weight * scores.scores).sum() / weight.sum())
    assert metrics["reward/score_mean_group_2"] == pytest.approx(expected)
    assert metrics["reward/score_mean_known_b"] == pytest.approx(float(scores.scores[1::2].mean()))
    repeated = _repeated(rollout)
    assert metrics["response/duplicate_fraction"] == pytest.approx(float(repeated.double().mean()))
    found = metrics["response/duplicate_fraction_group_2"]
    assert found == pytest.approx(float(weight[repeated].sum() / weight.sum()))
    total = sum(float(weight[i]) * float(scores.entropy[i][mask[i]].sum()) for i in range(NUM_ROWS))
    tokens = sum(float(weight[i]) * int(mask[i].sum()) for i in range(NUM_ROWS))
    assert metrics["policy/entropy_group_2"] == pytest.approx(total / tokens)
    kl = (scores.log_probs - scores.ref_log_probs)[mask]
    assert metrics["policy/kl"] == pytest.approx(float(kl.mean()))
