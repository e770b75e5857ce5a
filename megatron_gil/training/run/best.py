"""Which checkpoint is the best by `checkpoint.keep_best`. Imports nothing heavy: the dry run looks, too."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_gil.config import ConfigError, DpoConfig, PpoConfig, RewardConfig, SftConfig, TrainConfig
from megatron_gil.types import Metrics

EVAL_METRICS: dict[type[TrainConfig], tuple[str, ...]] = {
    SftConfig: ("sft/loss",),
    RewardConfig: ("reward/accuracy", "reward/loss", "reward/margin", "reward/mean_score"),
    DpoConfig: ("dpo/accuracy", "dpo/loss", "dpo/margin", "dpo/chosen_reward", "dpo/rejected_reward"),
    PpoConfig: ("reward/score_mean", "reward/score_std", "response/tokens", "response/finished_fraction"),
}
"""What an evaluation of each command writes, under eval/."""
PER_LABEL = "eval/reward/score_mean_known_"
"""And ppo, for each label in the data."""


def check_keep_best(config: TrainConfig) -> None:
    """ConfigError for a metric that the command's evaluations do not write."""
    written = next(names for kind, names in EVAL_METRICS.items() if isinstance(config, kind))
    names = [f"eval/{name}" for name in written]
    wanted = (config.checkpoint.keep_best or names[0]).removeprefix("-")
    if wanted not in names and not (isinstance(config, PpoConfig) and wanted.startswith(PER_LABEL)):
        raise ConfigError(
            f"checkpoint.keep_best={config.checkpoint.keep_best} is no metric of this command's evaluations; take one "
            f"of {', '.join(names)}, with a minus before it where less is better"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """Whole iterations of the best evaluation so far, its value, and the metric with its direction."""

    iteration: int
    value: float
    metric: str


def find_best(metrics: Metrics, iteration: int, keep_best: str | None, so_far: Best | None) -> Best | None:
    """`so_far`, or this iteration where it is better. One of another metric counts for nothing, and so does NaN."""
    if keep_best is None:
        return None
    so_far = so_far if so_far is not None and so_far.metric == keep_best else None
    value = metrics.get(keep_best.removeprefix("-"))
    sign = -1 if keep_best.startswith("-") else 1
    if value is None or value != value or (so_far is not None and sign * value <= sign * so_far.value):
        return so_far
    return Best(iteration=iteration, value=value, metric=keep_best)
