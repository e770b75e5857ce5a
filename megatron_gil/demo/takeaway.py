"""What a reader should take from the demo's table, in plain words that follow from its numbers."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_gil.evaluation.winrate import WinRate, signed_percent


def takeaway(
    gold: Mapping[str, float],
    proxy: Mapping[str, float],
    heldout: Mapping[str, float],
    *,
    published: WinRate,
    recommended: WinRate,
    kl: Mapping[str, float | None],
) -> str:
    """One paragraph. gold, proxy, heldout: by method, means over the training domains, and of gold over the held-out
    one. published, recommended: the two settings of PPO-GIL against PPO w/ KL. kl: nats a response at the end, by
    method."""
    lines = [
        _of_plain_ppo(gold, proxy),
        f"PPO w/ KL, its coefficient tuned on other seeds, reaches {gold['ppo_kl']:.2f}.",
        f"PPO-GIL as published is {_verdict(published)} (win - lose {signed_percent(published.margin)} %)"
        f"{_drift(kl['ppo_gil'], kl['ppo_kl'])}.",
        f"PPO-GIL with a KL target for either group, the recommended setting, is {_verdict(recommended)} (win - lose "
        f"{signed_percent(recommended.margin)} %; in the domain that nobody trained on its gold is "
        f"{heldout['ppo_gil_targets']:.2f} against {heldout['ppo_kl']:.2f}).",
        "This is one seed of a toy world: it shows what the pipeline does, not how large an effect is.",
    ]
    return " ".join(lines)


def _of_plain_ppo(gold: Mapping[str, float], proxy: Mapping[str, float]) -> str:
    found = (
        f"PPO without KL takes the reward model's score from {proxy['sft']:.2f} to {proxy['ppo']:.2f} and gold from "
    )
    found += f"{gold['sft']:.2f} to {gold['ppo']:.2f}"
    if proxy["ppo"] > proxy["sft"] and gold["ppo"] < gold["sft"]:
        return f"{found}: it hacks the reward model."
    return f"{found}."


def _verdict(rate: WinRate) -> str:
    if rate.margin.low > 0:
        return "better than PPO w/ KL"
    if rate.margin.high < 0:
        return "worse than PPO w/ KL"
    return "neither better nor worse than PPO w/ KL"


def _drift(ours: float | None, theirs: float | None) -> str:
    """Why, where the group without a penalty has gone far."""
    if ours is None or theirs is None or ours < 2 * theirs:
        return ""
    return (
        f": its low group pays hardly any KL, and the policy is {ours:.1f} nats a response from SFT, not {theirs:.1f}"
    )
