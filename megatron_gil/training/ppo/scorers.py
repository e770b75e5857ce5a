"""What gives responses their scores: today a reward model, which reads the policy's tokens or the text."""

from __future__ import annotations

import torch

from megatron_gil.data.rows.prompts import PromptDataset
from megatron_gil.engine.protocol import FrozenEngine, RowScores
from megatron_gil.training.ppo.reward_text import RewardText
from megatron_gil.types import Rollout


class RewardModel:
    """A Scorer of engine/protocol.py."""

    def __init__(self, engine: FrozenEngine, text: RewardText | None = None) -> None:
        """text: of a reward model with a tokenizer of its own; None where it reads the policy's tokens."""
        self._engine, self._text = engine, text

    def score(self, rollout: Rollout, prompts: PromptDataset) -> RowScores:
        if self._text is None:
            return RowScores(scores=self._engine.evaluate(rollout).scores)
        rows, cut = self._text.rows(rollout, prompts)
        scores = self._engine.evaluate(rows).scores
        return RowScores(scores=scores, truncated=torch.tensor(cut, device=scores.device))
