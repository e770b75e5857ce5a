"""Who is in which group, and what follows from it: the strategies of the one PPO trainer.

`SingleGroup` is plain PPO: probability 1, KL weight 1, omega exactly 1, no classifier. `LearnedGroups` infers the
groups (stage 1 of the method). `KnownGroups` takes the labels that came with the data. Equations: algo/groups.py.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_gil.algo.groups import HighGroup, classifier_coefs, classifier_loss, group_statistics, invariance_weights
from megatron_gil.config import GilSection
from megatron_gil.training.ppo.kl_factors import KlFactors
from megatron_gil.types import AllSum, GroupStats, Readout, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Invariance:
    """What group inference settles for one rollout, as constants."""

    stats: GroupStats
    weights: Tensor  # [B] omega
    coefs: Tensor  # [B, M] c


class Grouping(Protocol):
    """A strategy. `num_updates` counts the critic's updates so far."""

    num_groups: int
    learns: bool
    """Whether there is a classifier to train."""

    @property
    def high(self) -> int:
        """The group whose score is highest."""
        ...

    @property
    def kl_factors(self) -> tuple[float, ...]:
        """Of all rows, or of the high group and of the others; empty where no target moves them."""
        ...

    def warming_up(self, num_updates: int) -> bool:
        """Whether the policy must wait for the classifier."""
        ...

    def probs(self, rollout: Rollout, classifier: Readout) -> Tensor:
        """[B, M] probability of each group, under the classifier as it is now."""
        ...

    def observe_scores(self, probs: Tensor, scores: Tensor) -> bool:
        """Take in a rollout's scores [B] to decide which group is high; True if that flipped."""
        ...

    def observe_kl(self, probs: Tensor, kl: Tensor, num_updates: int) -> None:
        """Take in the KL [B] of a rollout's responses, nats, where coefficients follow it."""
        ...

    def kl_weights(self, probs: Tensor, num_updates: int) -> Tensor:
        """[B] factor on each trajectory's KL penalty: floor + (1 - floor) p(g_high), or that of the group's controller,
        or 1."""
        ...

    def settle(self, probs: Tensor, returns: Tensor, num_updates: int) -> Invariance:
        """Statistics over the global batch, omega and c; returns [B], one per trajectory."""
        ...

    def loss(self, readout: Readout, coefs: Tensor) -> Tensor:
        """The classifier's loss summed over rows: -beta_critic sum_i sum_g c_ig p(g|i); added to the critic's."""
        ...

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any]) -> None: ...


def make_grouping(section: GilSection, *, num_known: int, all_sum: AllSum, kl_target: float | None = None) -> Grouping:
    """num_known: how many labels the data has. kl_target: of plain PPO."""
    if section.groups == "known":
        return KnownGroups(section, num_known, all_sum)
    return LearnedGroups(section, all_sum) if section.num_groups > 1 else SingleGroup(all_sum, kl_target)


class SingleGroup:
    """All rows in one group: PPO."""

    num_groups = 1
    learns = False
    high = 0

    def __init__(self, all_sum: AllSum, kl_target: float | None = None) -> None:
        self._all_sum, self._kl = all_sum, KlFactors.of(kl_target)

    @property
    def kl_factors(self) -> tuple[float, ...]:
        return self._kl.values

    def warming_up(self, num_updates: int) -> bool:
        return False

    def probs(self, rollout: Rollout, classifier: Readout) -> Tensor:
        return torch.ones(len(rollout.tokens), 1, device=rollout.tokens.device)

    def observe_scores(self, probs: Tensor, scores: Tensor) -> bool:
        return False

    def observe_kl(self, probs: Tensor, kl: Tensor, num_updates: int) -> None:
        self._kl = self._kl.observe(probs, kl, self._all_sum)

    def kl_weights(self, probs: Tensor, num_updates: int) -> Tensor:
        return self._kl.weights(probs)

    def settle(self, probs: Tensor, returns: Tensor, num_updates: int) -> Invariance:
        stats = group_statistics(probs, returns, all_sum=self._all_sum)
        return Invariance(stats=stats, weights=torch.ones_like(returns), coefs=torch.zeros_like(probs))

    def loss(self, readout: Readout, coefs: Tensor) -> Tensor:
        return torch.zeros((), device=coefs.device)

    def state(self) -> dict[str, Any]:
        return self._kl.state()

    def load_state(self, state: dict[str, Any]) -> None:
        assert "ema" not in state, "a checkpoint of a run with groups cannot continue as plain PPO"
        self._kl = self._kl.restored(state)


class _InvariantGroups:
    """What learned and known groups share: statistics, omega, c, the high group, warm-up and ramp."""

    def __init__(self, section: GilSection, num_groups: int, all_sum: AllSum) -> None:
        self._section, self.num_groups, self._all_sum = section, num_groups, all_sum
        self._high = HighGroup.start(num_groups)
        self._kl = KlFactors.of(section.kl_target_high, section.kl_target_low)

    def warming_up(self, num_updates: int) -> bool:
        return num_updates < self._section.warmup_updates

    def observe_scores(self, probs: Tensor, scores: Tensor) -> bool:
        stats = group_statistics(probs, scores, all_sum=self._all_sum, min_group_mass=self._section.min_group_mass)
        before = self._high
        self._high = before.update(stats.group_return, stats.counts, decay=self._section.ema_decay)
        return before.index != self._high.index

    def observe_kl(self, probs: Tensor, kl: Tensor, num_updates: int) -> None:
        if not self.warming_up(num_updates):  # a policy that waits has no KL
            sides = self._high_and_rest(probs)
            self._kl = self._kl.observe(sides, kl, self._all_sum, self._section.min_group_mass)

    def _high_and_rest(self, probs: Tensor) -> Tensor:
        """[B, 2] probability of the high group, and of all others together."""
        high = probs[:, self._high.index]
        return torch.stack([high, 1 - high], dim=1)

    def kl_weights(self, probs: Tensor, num_updates: int) -> Tensor:
        if not self._section.adaptive_kl or self.warming_up(num_updates):
            return torch.ones_like(probs[:, 0])
        if self._kl.controllers:
            return self._kl.weights(self._high_and_rest(probs))
        floor = self._section.kl_floor
        return floor + (1 - floor) * probs[:, self._high.index]

    def settle(self, probs: Tensor, returns: Tensor, num_updates: int) -> Invariance:
        section = self._section
        stats = group_statistics(probs, returns, all_sum=self._all_sum, min_group_mass=section.min_group_mass)
        return Invariance(
            stats=stats,
            weights=invariance_weights(
                probs, stats, invariance_coef=self._invariance_coef(num_updates), weight_floor=section.weight_floor
            ),
            coefs=classifier_coefs(probs, returns, stats, balance_coef=section.balance_coef),
        )

    def _invariance_coef(self, num_updates: int) -> float:
        """beta_policy now: 0 until the warm-up ends, then a linear ramp."""
        section, since = self._section, num_updates - self._section.warmup_updates
        if since < 0:
            return 0.0
        return section.invariance_coef * min(1.0, since / section.ramp_updates if section.ramp_updates else 1.0)

    @property
    def high(self) -> int:
        return self._high.index

    @property
    def kl_factors(self) -> tuple[float, ...]:
        return self._kl.values

    def state(self) -> dict[str, Any]:
        return asdict(self._high) | self._kl.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self._high = HighGroup(ema=tuple(state["ema"]), index=state["index"])
        self._kl = self._kl.restored(state)


class LearnedGroups(_InvariantGroups):
    """Groups inferred by the classifier: a head beside the value head, or of a critic-shaped model of its own."""

    learns = True

    def __init__(self, section: GilSection, all_sum: AllSum) -> None:
        super().__init__(section, section.num_groups, all_sum)

    def probs(self, rollout: Rollout, classifier: Readout) -> Tensor:
        assert classifier.group_logits is not None, "the model has no group head"
        logits = classifier.group_logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)

    def loss(self, readout: Readout, coefs: Tensor) -> Tensor:
        assert readout.group_logits is not None, "the model has no group head"
        return self._section.classifier_coef * classifier_loss(readout.group_logits, coefs)


class KnownGroups(_InvariantGroups):
    """The oracle of the ablations: the labels that came with the data, never wrong and never learned."""

    learns = False

    def probs(self, rollout: Rollout, classifier: Readout) -> Tensor:
        return torch.nn.functional.one_hot(rollout.known_groups, self.num_groups).float()

    def loss(self, readout: Readout, coefs: Tensor) -> Tensor:
        return torch.zeros((), device=coefs.device)
