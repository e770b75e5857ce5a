"""The same work by this project's own training code, on one rank in float64; what `run_ranks` runs, so without TRL."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_gil.config import DpoSection, RewardSection
from megatron_gil.data.rows.demonstrations import DemonstrationDataset
from megatron_gil.data.rows.preferences import PreferenceDataset
from megatron_gil.data.text.tokenizer import Tokenizer
from megatron_gil.demo.tiny_llama import EOS_ID, PAD_ID
from megatron_gil.engine.protocol import Part, Update
from megatron_gil.parallel.layout import ParallelLayout
from megatron_gil.training.ppo.iteration import PpoTrainer
from megatron_gil.training.supervised.objectives import dpo_loss_fn, fill_ref_log_probs, reward_loss_fn, sft_loss
from megatron_gil.types import Experience, Metrics, Rollout, Scores, count_terms
from tests.training.running import ONE, GradientModel, build, make_trainer, parallel, ppo_config, use_cache

CENTER_COEF, BETA, LABEL_SMOOTHING = 0.01, 0.3, 0.1
LIMITS: dict[str, Any] = {"max_tokens": 48, "max_prompt_tokens": 32}  # nothing of the world is that long: no row is cut
Gradients = dict[str, Tensor]
Row = tuple[list[int], list[bool]]  # tokens without padding; which of them the loss speaks of


@dataclass
class Step:
    """One update's loss, gradients and metrics, and the rows it was of."""

    loss: float
    gradients: Gradients
    metrics: Metrics
    rows: list[Row]


def supervised(root: Path, num_rows: int, micro_size: int) -> dict[str, Step]:
    with parallel(ONE) as layout:
        use_cache(root)
        tokenizer = Tokenizer.read(root / "policy")
        texts = DemonstrationDataset(root / "demonstrations.jsonl", tokenizer, **LIMITS).collate(range(num_rows))
        pairs = PreferenceDataset(root / "preferences.jsonl", tokenizer, **LIMITS).collate(range(num_rows))
        common: dict[str, Any] = {"micro_size": micro_size, "dtype": torch.float64}
        scored = fill_ref_log_probs(pairs, build(root / "other", layout, "lm", **common))
        smooth = DpoSection(beta=BETA, label_smoothing=LABEL_SMOOTHING)
        work = {
            "sft": ("policy", "lm", texts, sft_loss),
            "sft tied": ("tied", "lm", texts, sft_loss),
            "reward": ("reward_model", "score", pairs, reward_loss_fn(RewardSection(center_coef=CENTER_COEF))),
            "dpo": ("policy", "lm", scored, dpo_loss_fn(DpoSection(beta=BETA, label_smoothing=0.0))),
            "dpo smoothed": ("policy", "lm", scored, dpo_loss_fn(smooth)),
        }
        found = {}
        for name, (directory, head, batch, loss_fn) in work.items():
            model = build(root / directory, layout, head, kind=DescendingModel, **common)
            per = "token" if name.startswith("sft") else "row"
            model.update(Part(batch=batch, loss_fn=loss_fn, per=per), lr=0.0)
            found[name] = replace(model.steps[0], rows=_rows(batch))
        return found


def _rows(batch: Any) -> list[Row]:
    tokens, mask = batch.tokens.flatten(0, -2), batch.response_mask.flatten(0, -2)
    lengths = batch.lengths.flatten().tolist()
    return [
        (row[:n].tolist(), [False, *chosen[: n - 1].tolist()])
        for row, chosen, n in zip(tokens, mask, lengths, strict=True)
    ]


class DescendingModel(GradientModel):
    """An update is a step of plain gradient descent, and is kept."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps: list[Step] = []

    def accumulate(self, *parts: Any) -> Any:
        found = super().accumulate(*parts)
        count = sum(int(count_terms(part.batch, part.per)) for part in parts)
        self.loss = sum(float(part.loss.total.detach()) for part in found.losses) / count
        return found

    def update(self, *parts: Any, lr: float) -> Update:
        update = super().update(*parts, lr=lr)
        self.steps.append(Step(self.loss, self.gradients[-1], update.metrics, []))
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter -= lr * parameter.main_grad  # type: ignore[attr-defined]
        return update


@dataclass
class PpoRun:
    """One iteration of `PpoTrainer` on a rollout that TRL sampled."""

    policy: list[Step]
    critic: list[Step]
    metrics: dict[str, float]  # of shaping and, averaged over the updates, of optimizing
    scores: Scores  # columns of [B, S] tensors are the response's, as TRL's are
    experience: Experience  # likewise


def ppo(
    root: Path,
    tokens: Tensor,
    num_prompt_columns: int,
    *,
    lr: float,
    state_after_end: bool,
    temperature: float = 1.0,
    **settings: Any,
) -> PpoRun:
    """Score, shape and optimize, with Bessel's correction of the whitening; see test_trl_ppo.py.

    tokens: TRL's [B, P + R]. state_after_end: the critic also learns the value of the state after a response's end.
    """
    with parallel(ONE) as layout:
        rollout = as_rollout(tokens, num_prompt_columns)
        trainer = _trainer(root, layout, len(tokens), lr, temperature, settings)
        scores, longer = trainer.score(rollout), _with_state_after_end(rollout)
        assert trainer.models.critic is not None
        with_after = replace(scores, values=trainer.models.critic.evaluate(longer).values)
        experience, metrics = trainer.shape(rollout, scores)
        num_tokens = float(rollout.response_mask.sum())
        corrected = replace(experience, advantages=experience.advantages * ((num_tokens - 1) / num_tokens) ** 0.5)
        metrics |= trainer.optimize(corrected)
        critic = trainer.models.critic
        if state_after_end:
            other = _trainer(root, layout, len(tokens), lr, temperature, settings)
            others = other.optimize(_learn_state_after_end(corrected, longer, with_after))
            metrics |= {name: value for name, value in others.items() if name.startswith("critic/")}
            critic = other.models.critic
        assert isinstance(trainer.models.policy, DescendingModel)
        assert isinstance(critic, DescendingModel)
        columns = rollout.prompt_lengths[:, None] - 1 + torch.arange(tokens.shape[1] - num_prompt_columns)
        return PpoRun(
            policy=trainer.models.policy.steps,
            critic=critic.steps,
            metrics=metrics,
            scores=_columns(with_after, ("log_probs", "ref_log_probs", "values"), columns),
            experience=_columns(experience, ("response_mask", "values", "advantages", "returns"), columns),
        )


def _trainer(
    root: Path, layout: ParallelLayout, num_rows: int, lr: float, temperature: float, settings: dict[str, Any]
) -> PpoTrainer:
    """Plain PPO, scores as they are, with another reference than the policy so that the KL is not 0."""
    rate = {"lr": lr, "schedule": "constant", "warmup_fraction": 0.0}
    config = ppo_config(
        batch={"global_size": num_rows, "micro_size": 4},
        optimizer=rate,
        critic_optimizer=rate,
        ppo={"prompts": num_rows, "responses_per_prompt": 1, "normalize_score": False, **settings},
        sampling={"temperature": temperature},
        gil={"num_groups": 1},
    )
    return make_trainer(config, root, layout, kind=DescendingModel, ref_policy="other", dtype=torch.float64)


def as_rollout(tokens: Tensor, num_prompt_columns: int) -> Rollout:
    """TRL's left-padded prompts and right-padded responses as right-padded rows."""
    prompts, responses = tokens[:, :num_prompt_columns], tokens[:, num_prompt_columns:]
    prompt_lengths = (prompts != PAD_ID).sum(1)
    lengths = prompt_lengths + (responses != PAD_ID).sum(1)
    rows = torch.full_like(tokens, PAD_ID)
    for row, source, length in zip(rows, tokens, lengths.tolist(), strict=True):
        row[:length] = source[source != PAD_ID]
    position = torch.arange(1, tokens.shape[1])
    mask = (position >= prompt_lengths[:, None]) & (position < lengths[:, None])
    ids = torch.arange(len(tokens))
    return Rollout(
        tokens=rows,
        lengths=lengths,
        prompt_lengths=prompt_lengths,
        response_mask=mask,
        sampled_log_probs=torch.zeros(mask.shape),  # read by a metric alone
        finished=(responses == EOS_ID).any(1),
        row_ids=ids,
        sample_ids=ids,
        known_groups=torch.full_like(ids, -1),
    )


def _with_state_after_end(rollout: Rollout) -> Rollout:
    """Each ended response goes on by a padding token, so that the critic is asked for the state after its end."""
    column = torch.arange(rollout.response_mask.shape[1])
    after = (column == rollout.lengths[:, None] - 1) & rollout.finished[:, None]
    return replace(rollout, lengths=rollout.lengths + after.any(1), response_mask=rollout.response_mask | after)


def _learn_state_after_end(experience: Experience, longer: Rollout, scores: Scores) -> Experience:
    """The return of the state after the end is the score."""
    after = longer.response_mask & ~experience.response_mask
    return replace(
        experience,
        lengths=longer.lengths,
        response_mask=longer.response_mask,
        values=scores.values,
        returns=torch.where(after, scores.scores[:, None], experience.returns),
    )


def _columns(batch: Any, names: tuple[str, ...], columns: Tensor) -> Any:
    return replace(batch, **{name: getattr(batch, name).gather(1, columns) for name in names})
