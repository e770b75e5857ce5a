"""What gives responses their scores: a reward model, which reads the policy's tokens or the text; a function, which
reads the text and the row's other fields; or their weighted sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatron_gil.config import RewardFunctionSection
from megatron_gil.data.rows.prompts import PromptDataset
from megatron_gil.data.text.tokenizer import Tokenizer
from megatron_gil.engine.protocol import FrozenEngine, RowScores, Scorer
from megatron_gil.parallel.collectives import gather_objects
from megatron_gil.parallel.layout import ParallelLayout
from megatron_gil.training.ppo.reward_text import RewardText
from megatron_gil.training.reward_function import RewardFunction, RewardFunctionError, RewardRow
from megatron_gil.training.run.loop import RunFailed
from megatron_gil.training.run.samples import sample_texts
from megatron_gil.types import Rollout


class RewardModel:
    """A Scorer of engine/protocol.py."""

    name = "reward_model"

    def __init__(self, engine: FrozenEngine, text: RewardText | None = None) -> None:
        """text: of a reward model with a tokenizer of its own; None where it reads the policy's tokens."""
        self._engine, self._text = engine, text

    def score(self, rollout: Rollout, prompts: PromptDataset) -> RowScores:
        if not len(rollout.tokens):
            none = torch.zeros(0, device=rollout.tokens.device)
            return RowScores(scores=none, model_scores=none)
        if self._text is None:
            scores = self._engine.evaluate(rollout).scores
            return RowScores(scores=scores, model_scores=scores)
        rows, cut = self._text.rows(rollout, prompts)
        scores = self._engine.evaluate(rows).scores
        return RowScores(scores=scores, truncated=torch.tensor(cut, device=scores.device), model_scores=scores)


class FunctionScorer:
    """The same of a RewardFunction. One rank of each model copy calls it; all ranks end where it fails on one."""

    name = "reward.function"

    def __init__(self, function: RewardFunction, tokenizer: Tokenizer, layout: ParallelLayout) -> None:
        self._function, self._tokenizer, self._layout = function, tokenizer, layout

    def score(self, rollout: Rollout, prompts: PromptDataset) -> RowScores:
        """RunFailed, on every rank, where the function fails."""
        layout, found, error = self._layout, list[float](), ""
        calls = layout.speaks_for_copy
        if calls:
            try:
                found = self._function.score(self._rows(rollout, prompts), prompts)
            except RewardFunctionError as failed:
                error = str(failed)
        answers = gather_objects((layout.dp_rank, calls, found, error), layout)
        if errors := [error for *_, error in answers if error]:
            raise RunFailed(errors[0])
        own = next(numbers for dp_rank, calls, numbers, _ in answers if calls and dp_rank == layout.dp_rank)
        scores = torch.tensor(own, dtype=torch.float32, device=rollout.tokens.device)
        return RowScores(scores=scores, function_scores=scores)

    def _rows(self, rollout: Rollout, prompts: PromptDataset) -> list[RewardRow]:
        """The texts as `generate` writes them: the prompt whole, whatever the model read of it."""
        row_ids, texts = rollout.row_ids.tolist(), sample_texts(rollout, self._tokenizer)
        read = {i: (prompts.fields(i)["prompt"], prompts.others(i)) for i in dict.fromkeys(row_ids)}
        return [
            RewardRow(prompt=read[row_id][0], response=text["response"], fields=read[row_id][1], row_id=row_id)
            for row_id, text in zip(row_ids, texts, strict=True)
        ]


class WeightedSum:
    """The same of several."""

    def __init__(self, terms: Sequence[tuple[float, Scorer]]) -> None:
        self._terms = terms
        self.name = " and ".join(scorer.name for _, scorer in terms)

    def score(self, rollout: Rollout, prompts: PromptDataset) -> RowScores:
        found = [scorer.score(rollout, prompts) for _, scorer in self._terms]
        weighted = [weight * row.scores for (weight, _), row in zip(self._terms, found, strict=True)]

        def first(name: str) -> torch.Tensor | None:
            return next((part for row in found if (part := getattr(row, name)) is not None), None)

        return RowScores(
            scores=torch.stack(weighted).sum(0),
            truncated=first("truncated"),
            model_scores=first("model_scores"),
            function_scores=first("function_scores"),
        )


def make_scorer(
    section: RewardFunctionSection,
    function: RewardFunction | None,
    models: Mapping[str, Any],
    *,
    text: RewardText | None,
    tokenizer: Tokenizer,
    layout: ParallelLayout,
) -> Scorer:
    """models: by role. text: of a reward model with a tokenizer of its own."""
    terms: list[tuple[float, Scorer]] = []
    if "reward_model" in models:
        terms.append((section.model_weight, RewardModel(models["reward_model"], text)))
    if function is not None:
        terms.append((section.weight, FunctionScorer(function, tokenizer, layout)))
    return terms[0][1] if len(terms) == 1 and terms[0][0] == 1 else WeightedSum(terms)
