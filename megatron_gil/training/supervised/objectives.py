"""What SFT, reward model and DPO train for: three losses of the one trainer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from megatron_gil.algo.likelihood import token_nll
from megatron_gil.algo.preference import dpo_loss, pairwise_loss
from megatron_gil.config import DpoSection, RewardSection
from megatron_gil.engine.protocol import FrozenEngine, LossFn, RowNumbers
from megatron_gil.types import LossSum, PreferenceBatch, Readout, TokenBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    loss_fn: LossFn
    per: Literal["token", "row"]
    """What the loss is a mean over."""
    row_numbers: RowNumbers
    """What samples.jsonl says of a row beside its text."""
    line: tuple[str, ...]
    """Metrics of the console line."""


def sft_objective() -> Objective:
    numbers = RowNumbers(names=("loss",), read=_nats_a_token)
    return Objective(loss_fn=sft_loss, per="token", row_numbers=numbers, line=("sft/loss",))


def reward_objective(section: RewardSection) -> Objective:
    numbers = RowNumbers(names=("score_chosen", "score_rejected"), read=lambda readout, rows: readout.scores)
    line = ("reward/loss", "reward/accuracy")
    return Objective(loss_fn=reward_loss_fn(section), per="row", row_numbers=numbers, line=line)


def dpo_objective(section: DpoSection) -> Objective:
    def implicit_rewards(readout: Readout, rows: PreferenceBatch) -> torch.Tensor:
        """beta (log pi - log pi_ref) of both responses."""
        return section.beta * (response_log_probs(readout, rows) - rows.ref_log_probs)

    numbers = RowNumbers(names=("reward_chosen", "reward_rejected"), read=implicit_rewards)
    line = ("dpo/loss", "dpo/accuracy", "dpo/margin")
    return Objective(loss_fn=dpo_loss_fn(section), per="row", row_numbers=numbers, line=line)


def sft_loss(readout: Readout, rows: TokenBatch) -> LossSum:
    return token_nll(readout.log_probs, rows.response_mask)


def reward_loss_fn(section: RewardSection) -> LossFn:
    def loss(readout: Readout, rows: PreferenceBatch) -> LossSum:
        return pairwise_loss(readout.scores, center_coef=section.center_coef)

    return loss


def dpo_loss_fn(section: DpoSection) -> LossFn:
    def loss(readout: Readout, rows: PreferenceBatch) -> LossSum:
        return dpo_loss(
            response_log_probs(readout, rows),
            rows.ref_log_probs,
            beta=section.beta,
            label_smoothing=section.label_smoothing,
        )

    return loss


def fill_ref_log_probs(batch: PreferenceBatch, ref_policy: FrozenEngine) -> PreferenceBatch:
    """The pairs with what the frozen reference says of them."""
    return replace(batch, ref_log_probs=response_log_probs(ref_policy.evaluate(batch), batch))


def response_log_probs(readout: Readout, rows: PreferenceBatch) -> torch.Tensor:
    """[B, 2] log-prob of each response, summed over its tokens: in float64, so that the sum does not depend on how far
    rows are padded, and a policy that equals its reference has margin 0."""
    log_probs = torch.where(rows.response_mask, readout.log_probs, 0)
    return log_probs.double().sum(-1).to(log_probs.dtype)


def _nats_a_token(readout: Readout, rows: TokenBatch) -> torch.Tensor:
    """[B, 1] mean over the tokens of the target."""
    count = rows.response_mask.sum(1).clamp(min=1)
    return (-torch.where(rows.response_mask, readout.log_probs, 0).sum(1) / count)[:, None]
