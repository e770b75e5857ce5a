"""Where a reward model's scores lay in its training. PPO says which share of its responses is scored outside.

It is kept as "score_range": [low, high] in the config.json of the reward model, where other programs do not look.
"""

from __future__ import annotations

import math
from pathlib import Path

from megatron_gil.config import ConfigError
from megatron_gil.models.families import read_config

KEY = "score_range"
QUANTILE = 0.01
"""The range leaves out this share of the scores at each end."""


def quantile_range(scores: list[float]) -> tuple[float, float]:
    """The scores between which all but the share QUANTILE at each end lie."""
    ordered = sorted(scores)
    rest = int(QUANTILE * len(ordered))
    return ordered[rest], ordered[-1 - rest]


def read_score_range(directory: Path) -> tuple[float, float] | None:
    """What training wrote beside the sizes; None for a model that has no such key."""
    config = read_config(directory)
    found = config.get(KEY) if isinstance(config, dict) else None
    if found is None:
        return None
    try:
        low, high = (float(bound) for bound in found)
    except (TypeError, ValueError, OverflowError):
        low, high = math.nan, math.nan
    if not isinstance(found, list) or not -math.inf < low <= high < math.inf:
        raise ConfigError(
            f"{Path(directory) / 'config.json'}: {KEY} is {found!r}, expected [low, high]; correct it or take it out"
        )
    return low, high
