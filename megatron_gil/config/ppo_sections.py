"""The sections that only ppo has. Every key is explained by the string under it, as in sections.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from megatron_gil.config.ranges import integer, real
from megatron_gil.config.section import Section, path, require


@dataclass(frozen=True, slots=True, kw_only=True)
class PpoSection(Section):
    key: ClassVar[str] = "ppo"

    iterations: int = integer(2000, least=1)
    """Rollouts, each followed by its updates."""
    prompts: int = integer(32, least=1)
    """Prompts per iteration, over all ranks."""
    responses_per_prompt: int = integer(1, least=1)
    """Responses sampled for each prompt."""
    epochs: int = integer(1, least=1)
    """Passes over each rollout."""
    kl_coef: float = real(0.05, least=0)
    """eta, the weight of the per-token KL penalty in the reward; 0 is PPO without KL."""
    kl_target: float | None = real(None, above=0)
    """Hold the KL of a response near so many nats: the coefficient starts at kl_coef and moves by at most a tenth an
    iteration (arXiv 1909.08593). null: it stays as it is. With groups there is one for either side,
    gil.kl_target_high and gil.kl_target_low."""
    advantages: Literal["gae", "rloo", "grpo"] = "gae"
    """gae: from a critic. rloo, grpo: by comparing the returns of a prompt's responses, without a critic; they need
    ppo.responses_per_prompt of at least 2, and learned groups then need gil.classifier=own_model."""
    gamma: float = real(1.0, least=0, most=1)
    """Discount of later rewards, per token."""
    gae_lambda: float = real(0.95, least=0, most=1)
    """lambda of generalised advantage estimation (arXiv 1506.02438)."""
    clip_range: float = real(0.2, above=0)
    """The ratio of new to old probability is clipped to 1 - this and 1 + this (arXiv 1707.06347)."""
    value_clip_range: float = real(0.2, above=0)
    """A new value is clipped to this far from the old one."""
    whiten_advantages: bool = True
    """Zero mean, unit variance over the response tokens of the global batch; not for grpo, which scales by prompt."""
    normalize_score: bool = True
    """Subtract the running mean of all scores so far and divide by their standard deviation (PPO-max, arXiv
    2307.04964)."""
    score_clip: float = real(0.8, least=0)
    """Normalised scores are clipped to this on both sides of 0; 0 switches off. Read only where normalize_score is
    true. The default is that of the MOSS-RLHF line of work, as in examples/paper_7b."""
    critic_warmup_updates: int = integer(0)
    """Updates in which only the critic learns, before the policy moves (PPO-max's critic pre-training)."""
    ptx_coef: float = real(0.0, least=0)
    """Weight of the language-modelling loss on data.pretrain in the policy's update."""

    @property
    def num_rows(self) -> int:
        """Of a rollout, over all ranks."""
        return self.prompts * self.responses_per_prompt

    def _check(self) -> None:
        require(
            self.advantages == "gae" or self.responses_per_prompt > 1,
            f"ppo.advantages={self.advantages} compares a prompt's responses; set ppo.responses_per_prompt above 1",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GilSection(Section):
    """Group-invariant learning (arXiv 2310.11971). With one group it is plain PPO: no classifier, omega exactly 1,
    p(g_high) exactly 1."""

    key: ClassVar[str] = "gil"

    num_groups: int = integer(2, least=1)
    """M, how many groups the classifier tells apart; 1 is plain PPO. Of known groups there are as many as labels in the
    data."""
    groups: Literal["learned", "known"] = "learned"
    """learned: the classifier infers them, without labels. known: each row's group is its label in the data (the field
    group), for ablations."""
    invariance_coef: float = real(0.1, least=0)
    """beta_policy, the weight of the between-group variance in the policy's objective."""
    classifier_coef: float = real(1.0, least=0)
    """beta_critic, the weight of the classifier's term in the critic's objective."""
    adaptive_kl: bool = True
    """Multiply the KL penalty of a trajectory by its probability of being in the best group."""
    kl_floor: float = real(0.0, least=0, most=1)
    """Least factor on a trajectory's KL penalty, which is floor + (1 - floor) p(g_high). 0: as in the paper; 1: the
    whole penalty, as in PPO."""
    kl_target_high: float | None = real(None, above=0)
    """Hold the KL of the high group's responses near so many nats, and that of all others near kl_target_low: each side
    then has a KL coefficient of its own, which starts at ppo.kl_coef and moves by at most a tenth an iteration. They
    take the place of p(g_high); a trajectory between the groups has their weighted geometric mean. null: as in the
    paper."""
    kl_target_low: float | None = real(None, above=0)
    """The same of the other groups."""
    classifier: Literal["critic_head", "own_model"] = "critic_head"
    """Where the group classifier lives: a second head on the critic, or a model of its own."""
    group_return: Literal["total", "score"] = "total"
    """R_i, a trajectory's return in the group statistics. total: the sum of its shaped token rewards; score: its
    normalised score alone."""
    group_value: Literal["return", "weighted_log_prob"] = "return"
    """What a group's value is made of. return: the returns. weighted_log_prob: the paper's printed formula,
    sum(log pi * R), which has the wrong sign and is kept for study."""
    weight_floor: float | None = real(None, most=1)
    """Lower bound on omega, whose mean is 1; null: none."""
    min_group_mass: float = real(0.02, least=0, below=1)
    """A group with less than this share of the batch (or less than 1 row) is left out of the statistics."""
    balance_coef: float = real(0.0, least=0)
    """Weight of KL(mean of the rows' group probabilities || uniform) in the classifier's loss, which keeps the groups
    from emptying."""
    init_scale: float = real(1.0)
    """alpha: at the start, the classifier's weights of groups 0 to M - 1 are +alpha to -alpha, evenly spaced, times
    those of the reward model's score head. Not 0, from which it would never move."""
    warmup_updates: int = integer(50)
    """First updates, in which only critic and classifier learn: the policy waits, and every row pays the full KL
    penalty."""
    ramp_updates: int = integer(50)
    """Updates after the warm-up over which invariance_coef rises linearly from 0."""
    ema_decay: float = real(0.9, least=0, below=1)
    """Decay of the running mean of each group's score; the group whose mean is highest is g_high."""

    @property
    def has_groups(self) -> bool:
        """Whether it is more than plain PPO."""
        return self.num_groups > 1 or self.groups == "known"

    @property
    def is_learned(self) -> bool:
        """Whether a classifier infers the groups."""
        return self.num_groups > 1 and self.groups == "learned"

    @property
    def is_in_critic(self) -> bool:
        """Whether that classifier is a head of the critic."""
        return self.is_learned and self.classifier == "critic_head"

    def _check(self) -> None:
        require(
            self.init_scale != 0, "gil.init_scale=0 is a stationary point that the classifier never leaves; use 1.0"
        )
        require(
            (self.kl_target_high is None) == (self.kl_target_low is None),
            "gil.kl_target_high and gil.kl_target_low go together; set both or none",
        )
        require(
            self.kl_target_high is None or (self.adaptive_kl and self.kl_floor == 0),
            "gil.kl_target_high takes the place of p(g_high) as the factor on the KL penalty; leave "
            "gil.adaptive_kl=true and gil.kl_floor=0",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AlarmSection(Section):
    """When ppo warns. An alarm is one line as it begins, and the metric alarm/NAME, which is 1 while it stands. 0
    switches an alarm off."""

    key: ClassVar[str] = "alarms"

    max_kl: float = real(50.0, least=0)
    """Warn where the KL to the reference, of the batch or of one group, is above this; nats a response."""
    kl_spike: float = real(2.0, least=0)
    """Warn where that KL is so many times its own running mean (of about ten iterations; counted as at least 3
    nats)."""
    kl_ahead: float = real(0.7, least=0)
    """Warn where the KL of the batch, if it goes on as in the last 15 iterations, is in 20 more above this share of the
    entropy that a response had in the first iteration."""
    group_information: float = real(0.02, least=0)
    """Warn where the classifier's probabilities hardly differ between rows: their mutual information with the row, as a
    share of the log M that it can be at most, is below this."""
    out_of_range_fraction: float = real(0.2, least=0)
    """Warn where more than this share of the responses is scored outside the range of scores that the reward model's
    own training data had."""
    entropy_fraction: float = real(0.5, least=0)
    """Warn where the policy's entropy is below this share of the first iteration's."""
    length_factor: float = real(1.75, least=0)
    """Warn where responses are this many times longer or shorter than in the first iteration."""
    sampling_mismatch: float = real(0.1, least=0)
    """Warn where the sampler's log-probs and those that PPO uses differ by more than this, nats a token. Only where
    top_p and the like are set, which are the reason."""
    duplicate_fraction: float = real(0.4, least=0)
    """Warn where more than this share of the responses equals a response to another prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditSection(Section):
    """What the groups of a planned ppo run are measured on. Give pairs, trusted or both."""

    key: ClassVar[str] = "audit"

    pairs: str | None = path()
    """Preference pairs {"prompt", "chosen", "rejected"} that the reward model was not trained on; null: none."""
    trusted: str | None = path()
    """A few hundred rows {"prompt", "response", "trusted"}; trusted is a number that somebody trusts, such as a
    person's rating, higher is better; null: none. Pairs and these rows are cut as data.max_tokens says, or to the
    positions of the models that read them where these are fewer."""
    group_by: Literal["policy", "rows"] = "policy"
    """In which group a row of these files is. policy: in that of the policy's own responses to its prompt, of which two
    are sampled. rows: in that of the responses in the file, which may be unlike any that the classifier has seen."""
    iterations: int = integer(30)
    """Rollouts that the classifier is trained on before anything is measured; the policy stays as it is. Not read
    where gil.groups=known."""
    responses: int = integer(512, least=2)
    """At least so many responses of the policy are measured, in whole rollouts, once the classifier is trained."""
