"""SFT, reward model and DPO against TRL's trainers: same weights, same texts, one update of two microbatches.

TRL reads the texts, tokenizes, masks, pads, accumulates and differentiates with its own code (trl_side.py), this
project with its own (our_side.py); then the rows, the losses, the logged metrics and every gradient are compared.
Conventions that meet only at some settings:

- TRL's SFT divides by the response tokens of all microbatches, as `LossSum` does; its reward and DPO losses are means
  over the pairs of a microbatch, so its microbatches must be of one size, as they are here.
- TRL's DPO loss "sigmoid" ignores `label_smoothing`. Conservative DPO is still a weighted sum of its losses, see
  `SMOOTHED`.
- TRL counts a tie of scores as lost, this project as half won; there is no tie here.

`pytest -rP tests/peer` prints the differences; docs/parity.md has them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.peer.difference import relative, worst_gradient
from tests.peer.our_side import BETA, CENTER_COEF, LABEL_SMOOTHING, Row, Step, supervised
from tests.ranks import run_ranks

pytest.importorskip("trl", reason="TRL is not installed: pip install '.[peer]'")

NUM_ROWS, MICRO_SIZE = 16, 8
FLOAT32 = 1e-6  # transformers' cross-entropy and TRL's chunked one compute in float32 for any input
FLOAT64 = 1e-12  # sums in another order

# With l = -log sigmoid, TRL's "sigmoid" is l(h) and its "robust" ((1 - e) l(h) - e l(-h)) / (1 - 2e); conservative DPO,
# (1 - e) l(h) + e l(-h), is therefore 2 (1 - e) sigmoid - (1 - 2e) robust.
SMOOTHED: dict[str, Any] = {
    "loss_type": ["sigmoid", "robust"],
    "loss_weights": [2 * (1 - LABEL_SMOOTHING), -(1 - 2 * LABEL_SMOOTHING)],
    "label_smoothing": LABEL_SMOOTHING,
}
PAIR_METRICS = {"accuracy": "reward/accuracy", "margin": "reward/margin", "mean_reward": "reward/mean_score"}
DPO_METRICS = {
    "rewards/accuracies": "dpo/accuracy",
    "rewards/margins": "dpo/margin",
    "rewards/chosen": "dpo/chosen_reward",
    "rewards/rejected": "dpo/rejected_reward",
}


@pytest.fixture(scope="module")
def ours(world: Path) -> dict[str, Step]:
    return run_ranks(supervised, 1, world, NUM_ROWS, MICRO_SIZE)[0]


@pytest.mark.parametrize(("model", "name"), [("policy", "sft"), ("tied", "sft tied")])
@pytest.mark.parametrize("loss_type", ["nll", "chunked_nll"])
def test_sft(ours: dict[str, Step], world: Path, out: Path, model: str, name: str, loss_type: str) -> None:
    """- sum log pi / response tokens; the prompt is masked (`completion_only_loss`)."""
    from tests.peer import trl_side

    theirs = trl_side.sft(world, out, model, NUM_ROWS, MICRO_SIZE, loss_type=loss_type)
    _compare(ours[name], theirs, FLOAT32, {"loss": "sft/loss"}, f"{name}, {loss_type}")
    assert sorted(ours[name].rows) == _rows(theirs, lambda batch: batch["labels"] != -100)


def test_reward_model(ours: dict[str, Step], world: Path, out: Path) -> None:
    """- log sigmoid(chosen - rejected) + center_coef (chosen + rejected)^2, mean over pairs."""
    from tests.peer import trl_side

    theirs = trl_side.reward(world, out, NUM_ROWS, MICRO_SIZE, center_rewards_coefficient=CENTER_COEF)
    _compare(ours["reward"], theirs, FLOAT64, PAIR_METRICS, "reward")
    assert sorted(row for row, _ in ours["reward"].rows) == [row for row, _ in _rows(theirs, None)]


@pytest.mark.parametrize(("name", "settings"), [("dpo", {}), ("dpo smoothed", SMOOTHED)])
def test_dpo(ours: dict[str, Step], world: Path, out: Path, name: str, settings: dict[str, Any]) -> None:
    """Log-probs summed over each response, the reference another model than the policy."""
    from tests.peer import trl_side

    theirs = trl_side.dpo(world, out, NUM_ROWS, MICRO_SIZE, beta=BETA, **settings)
    _compare(ours[name], theirs, FLOAT64, DPO_METRICS, name)
    assert sorted(ours[name].rows) == _rows(theirs, lambda batch: batch["completion_mask"] != 0)


def _compare(ours: Step, theirs: Any, tolerance: float, metrics: dict[str, str], what: str) -> None:
    loss, gradient = relative(ours.loss, theirs.loss), worst_gradient(ours.gradients, theirs.gradients)
    print(f"{what}: loss {theirs.loss:.6f}, difference {loss:.1e}; worst gradient {gradient:.1e}")
    assert loss <= tolerance
    assert gradient <= tolerance
    for their_name, name in metrics.items():
        # logged by way of float32 on TRL's side
        assert ours.metrics[name] == pytest.approx(theirs.metrics[their_name], rel=1e-6), name


def _rows(theirs: Any, chosen: Any) -> list[Row]:
    """The rows of all of TRL's batches without padding, sorted: it shuffles them."""
    found = []
    for batch in theirs.batches:
        masks = chosen(batch) if chosen else batch["attention_mask"] != 0
        for tokens, mask, present in zip(batch["input_ids"], masks, batch["attention_mask"].bool(), strict=True):
            found.append((tokens[present].tolist(), mask[present].tolist()))
    assert len({len(row) for row, _ in found}) > 3, "rows of one length say nothing of padding"
    return sorted(found)
