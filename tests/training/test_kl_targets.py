"""A KL coefficient for either side of the groups: whose KL moves it, whom it weighs, when it waits."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_gil.algo.kl import KlController
from megatron_gil.config import ConfigError, GilSection
from megatron_gil.training.ppo.grouping import LearnedGroups, SingleGroup, make_grouping

SECTION = GilSection(kl_target_high=0.5, kl_target_low=2.0, warmup_updates=3, min_group_mass=0.1)
PROBS = torch.tensor([[1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [0.0, 1.0]])
KL = torch.tensor([1.0, 2.0, 3.0, 4.0])


def clone(values: Tensor) -> Tensor:
    return values.clone()


def groups(**changes: Any) -> LearnedGroups:
    return LearnedGroups(replace(SECTION, **changes), clone)


def means(probs: Tensor, kl: Tensor, high: int) -> tuple[float, float]:
    """(of the high group, of the rest), by a loop."""
    sums = [[0.0, 0.0], [0.0, 0.0]]
    for row, nats in zip(probs.tolist(), kl.tolist(), strict=True):
        for side, weight in enumerate((row[high], 1 - row[high])):
            sums[side][0] += weight * nats
            sums[side][1] += weight
    return sums[0][0] / sums[0][1], sums[1][0] / sums[1][1]


@pytest.mark.parametrize("high", [0, 1])
def test_each_side_has_the_factor_that_its_own_kl_asks_for(high: int) -> None:
    found = groups()
    found.load_state({"ema": [1.0 - high, float(high)], "index": high})
    found.observe_kl(PROBS, KL, 3)
    of_high, of_low = (
        KlController(target=target).update(mean).factor
        for target, mean in zip((0.5, 2.0), means(PROBS, KL, high), strict=True)
    )
    wanted = [of_high ** row[high] * of_low ** (1 - row[high]) for row in PROBS.tolist()]
    assert found.kl_weights(PROBS, 3).tolist() == pytest.approx(wanted)
    assert found.kl_weights(PROBS, 3)[0 if high == 0 else 3] == pytest.approx(of_high)


def test_more_groups_than_two_share_the_lower_one() -> None:
    probs = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    found = groups(num_groups=3)
    found.observe_kl(probs, torch.tensor([0.5, 1.0, 5.0]), 3)  # 3 on average, above 2
    weights = found.kl_weights(probs, 3).tolist()
    assert weights == pytest.approx([1.0, 1.1, 1.1])


def test_nothing_moves_before_the_policy_does() -> None:
    found = groups()
    found.observe_kl(PROBS, KL, 2)
    assert found.kl_weights(PROBS, 2).tolist() == [1.0] * 4
    assert found.kl_weights(PROBS, 3).tolist() == [1.0] * 4


def test_a_side_without_mass_keeps_its_factor() -> None:
    found = groups()
    alone = torch.tensor([[1.0, 0.0]] * 4)
    found.observe_kl(alone, KL, 3)
    assert found.state()["kl_factors"] == [pytest.approx(1.1), 1.0]


def test_any_cut_into_ranks_gives_the_same_factors() -> None:
    whole = groups()
    whole.observe_kl(PROBS, KL, 3)
    parts: list[Tensor] = []

    def collect(values: Tensor) -> Tensor:
        parts.append(values.clone())
        return values.clone()

    for rows in (slice(0, 1), slice(1, 4)):
        LearnedGroups(SECTION, collect).observe_kl(PROBS[rows], KL[rows], 3)
    cut = LearnedGroups(SECTION, lambda values: parts[0] + parts[1])
    cut.observe_kl(PROBS[:1], KL[:1], 3)
    assert cut.state() == whole.state()


def test_plain_ppo_has_one_for_all_rows() -> None:
    found = make_grouping(GilSection(num_groups=1), num_known=0, all_sum=clone, kl_target=10.0)
    ones = torch.ones(4, 1)
    found.observe_kl(ones, KL, 0)
    assert found.kl_weights(ones, 0).tolist() == pytest.approx([0.9] * 4)  # 2.5 nats, under half of the target
    again = SingleGroup(clone, 10.0)
    again.load_state(found.state())
    assert again.state() == found.state() == {"kl_factors": [pytest.approx(0.9)]}


def test_a_checkpoint_holds_the_factors() -> None:
    found, restored = groups(), groups()
    found.observe_kl(PROBS, KL, 3)
    restored.load_state(found.state())
    assert restored.state() == found.state()
    assert torch.equal(restored.kl_weights(PROBS, 3), found.kl_weights(PROBS, 3))


def test_a_checkpoint_from_before_there_were_targets_is_read() -> None:
    found = groups()
    found.load_state({"ema": [1.0, 0.0], "index": 0})
    assert found.state()["kl_factors"] == [1.0, 1.0]
    SingleGroup(clone, 1.0).load_state({})


def test_without_targets_the_weight_is_that_of_the_paper() -> None:
    plain = groups(kl_target_high=None, kl_target_low=None)
    plain.observe_kl(PROBS, KL, 3)
    assert torch.equal(plain.kl_weights(PROBS, 3), PROBS[:, 0])
    assert isinstance(make_grouping(GilSection(num_groups=1), num_known=0, all_sum=clone), SingleGroup)


@pytest.mark.parametrize("other", [{"adaptive_kl": False}, {"kl_floor": 0.3}, {"kl_target_low": None}])
def test_what_targets_do_not_go_with_is_refused(other: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"gil\.kl_target_high"):
        replace(SECTION, **other)


def test_a_kl_that_is_no_number_moves_nothing() -> None:
    found = groups()
    found.observe_kl(PROBS, torch.tensor([math.nan, 1.0, 1.0, 1.0]), 3)
    assert found.state()["kl_factors"][0] == 1.0
