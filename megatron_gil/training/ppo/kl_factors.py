"""KL coefficients that follow the KL: a controller for all rows, or one for the high group and one for the others."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import Tensor

from megatron_gil.algo.groups import group_statistics
from megatron_gil.algo.kl import KlController
from megatron_gil.types import AllSum


@dataclass(frozen=True, slots=True, kw_only=True)
class KlFactors:
    """What ppo.kl_coef is multiplied by, for each side that rows may be on."""

    controllers: tuple[KlController, ...] = ()
    """Empty where every row pays ppo.kl_coef."""

    @classmethod
    def of(cls, *targets: float | None) -> Self:
        """targets: nats a response, of each side; None: that side has no controller."""
        return cls(controllers=tuple(KlController(target=target) for target in targets if target is not None))

    @property
    def values(self) -> tuple[float, ...]:
        return tuple(control.factor for control in self.controllers)

    def observe(self, sides: Tensor, kl: Tensor, all_sum: AllSum, min_mass: float = 0.0) -> KlFactors:
        """Each factor moved by the mean KL of its side. sides: [B, controllers] probability of being on each; kl: [B]
        nats; a side with less than the share min_mass of all rows, or less than one row, is left where it is."""
        if not self.controllers:
            return self
        stats = group_statistics(sides, kl, all_sum=all_sum, min_group_mass=min_mass)
        found = zip(self.controllers, stats.group_return.tolist(), stats.counts.tolist(), strict=True)
        return KlFactors(controllers=tuple(c.update(mean) if counts else c for c, mean, counts in found))

    def weights(self, sides: Tensor) -> Tensor:
        """[B] geometric mean of the factors, weighted by the probabilities; 1 without controllers."""
        if not self.controllers:
            return sides.new_ones(len(sides))
        logs = sides.new_tensor([math.log(factor) for factor in self.values])
        return (sides * logs).sum(1).exp()

    def state(self) -> dict[str, Any]:
        return {"kl_factors": list(self.values)} if self.controllers else {}

    def restored(self, state: dict[str, Any]) -> KlFactors:
        """As a checkpoint has them; 1 where it is from a run without targets."""
        factors = state.get("kl_factors", [])
        if len(factors) != len(self.controllers):
            return self
        return KlFactors(
            controllers=tuple(replace(c, factor=f) for c, f in zip(self.controllers, factors, strict=True))
        )
