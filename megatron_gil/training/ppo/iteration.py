"""PPO with group-invariant learning. `PpoTrainer.iterate` is the algorithm; plain PPO is the case of one group."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from megatron_gil.algo.likelihood import token_nll
from megatron_gil.algo.masked import ScoreMoments
from megatron_gil.algo.ppo import explained_variance, policy_loss, value_loss
from megatron_gil.config import PpoConfig
from megatron_gil.data.text.tokenizer import Tokenizer
from megatron_gil.engine.megatron import MegatronModel, TrainableModel
from megatron_gil.engine.optimizer import learning_rate
from megatron_gil.engine.protocol import Part, Sampler
from megatron_gil.training.ppo.alarms import Alarms, duplicate_fraction
from megatron_gil.training.ppo.grouping import Grouping
from megatron_gil.training.ppo.reward_text import RewardText
from megatron_gil.training.ppo.shaping import rollout_means, shape_experience, with_deviations
from megatron_gil.training.row_source import PromptSource, RowSource, truncated_fraction
from megatron_gil.training.run.metrics import Means
from megatron_gil.training.run.progress import Progress
from megatron_gil.training.run.samples import sample_texts
from megatron_gil.types import (
    AllSum,
    Experience,
    LossSum,
    Metrics,
    PromptBatch,
    Readout,
    Rollout,
    Scores,
    TokenBatch,
    take_rows,
)


class PpoTrainer:
    """Policy, reference, critic with group classifier, and reward model, all on one process-group layout."""

    line: tuple[str, ...] = (
        "reward/score_mean",
        "policy/kl_sequence",
        "group/return_variance",
        "critic/value_loss",
        "time/iteration_s",
    )

    def __init__(
        self,
        config: PpoConfig,
        *,
        policy: TrainableModel,
        ref_policy: MegatronModel,
        critic: TrainableModel | None,
        reward_model: MegatronModel,
        classifier: TrainableModel | None,
        grouping: Grouping,
        sampler: Sampler,
        prompts: PromptSource,
        eval_prompts: PromptSource | None,
        pretrain: RowSource | None,
        tokenizer: Tokenizer,
        progress: Progress,
        all_sum: AllSum,
        score_range: tuple[float, float] | None = None,
        reward_text: RewardText | None = None,
    ) -> None:
        """critic: None where advantages come from comparing a prompt's responses (rloo, grpo). classifier: the group
        classifier's own model; None where it is a head of the critic, or there is none. score_range: of the reward
        model's training; None where that is not known. reward_text: of a reward model with a tokenizer of its own.
        """
        self.config, self.num_iterations = config, config.ppo.iterations
        self.policy, self.ref_policy, self.critic, self.reward_model = policy, ref_policy, critic, reward_model
        self.classifier, self.grouping, self.sampler = classifier, grouping, sampler
        self.prompts, self.eval_prompts, self.pretrain = prompts, eval_prompts, pretrain
        self.tokenizer, self.progress, self.all_sum = tokenizer, progress, all_sum
        self.reward_text = reward_text
        self.moments = ScoreMoments()
        self.alarms = Alarms(
            config.alarms,
            min_group_mass=config.gil.min_group_mass,
            score_range=score_range,
            truncations=config.sampling.truncations(),
        )
        self.num_updates = 0
        # Greedy sampling has no log-probs of its own: those of temperature 1 stand in for them.
        self.temperature = config.sampling.temperature or 1.0
        minibatches = config.ppo.prompts * config.ppo.responses_per_prompt // config.batch.global_size
        self.num_planned_updates = config.ppo.iterations * config.ppo.epochs * minibatches

    def iterate(self, iteration: int) -> Metrics:
        """One iteration: sample responses, score them, settle rewards and groups, update critic and policy."""
        clock = [time.perf_counter()]
        rollout = self.sample(self.prompts.batch(iteration))
        clock.append(time.perf_counter())
        scores = self.score(rollout)
        self.progress.safe_point("shaping")  # the last: from here on the trainer's state changes
        experience, metrics = self.shape(rollout, scores)
        clock.append(time.perf_counter())
        metrics |= self.optimize(experience)
        clock.append(time.perf_counter())
        self.last_rollout, self.last_scores = rollout, scores
        metrics |= self.alarms.check(metrics, warming_up=self.grouping.warming_up(self.num_updates))
        return metrics | _times(clock, metrics["response/tokens"] * self.prompts.num_rows)

    def sample(self, prompts: PromptBatch) -> Rollout:
        """The policy's responses."""
        self.progress.safe_point("rollout", prompts)
        return self.sampler.sample(prompts, meet=partial(self.progress.meet, "rollout", prompts))

    def score(self, rollout: Rollout) -> Scores:
        """What every model says of the rollout, before any update."""

        def read(role: str, model: MegatronModel, rows: Rollout | TokenBatch = rollout, **kwargs: Any) -> Readout:
            self.progress.safe_point(f"scoring by {role}", rows)
            return model.evaluate(rows, **kwargs)

        policy = read("policy", self.policy, entropy=True, temperature=self.temperature)
        critic = read("critic", self.critic) if self.critic else Readout(values=torch.zeros_like(policy.log_probs))
        groups = read("classifier", self.classifier) if self.classifier else critic
        return Scores(
            log_probs=policy.log_probs,
            entropy=policy.entropy,
            ref_log_probs=read("ref_policy", self.ref_policy, temperature=self.temperature).log_probs,
            values=critic.values,
            group_probs=self.grouping.probs(rollout, groups),
            scores=read("reward_model", self.reward_model, self._rewarded(rollout, self.prompts)).scores,
        )

    def _rewarded(self, rollout: Rollout, prompts: PromptSource) -> Rollout | TokenBatch:
        """The rows that the reward model reads."""
        return self.reward_text.rows(rollout, prompts.dataset) if self.reward_text else rollout

    def shape(self, rollout: Rollout, scores: Scores) -> tuple[Experience, dict[str, float]]:
        """Rewards, advantages, and the group weights: constants of this iteration."""
        experience, self.moments, metrics = shape_experience(
            rollout,
            scores,
            moments=self.moments,
            grouping=self.grouping,
            num_updates=self.num_updates,
            ppo=self.config.ppo,
            gil=self.config.gil,
            known_names=self.prompts.dataset.group_names,
            all_sum=self.all_sum,
        )
        if self.critic:
            mask = rollout.response_mask
            explained = explained_variance(scores.values, experience.returns, mask, all_sum=self.all_sum)
            metrics["critic/explained_variance"] = float(explained)
        metrics |= self._truncation(rollout)
        metrics["response/duplicate_fraction"] = duplicate_fraction(rollout, self.policy.layout)
        metrics["reward/out_of_range_fraction"] = self.alarms.out_of_range_fraction(scores.scores, self.policy.layout)
        return experience, metrics

    def _truncation(self, rollout: Rollout) -> dict[str, float]:
        flags = {"data/truncated_fraction": self.prompts.dataset.truncated(rollout.row_ids.tolist())}
        if self.reward_text:
            flags["data/reward_truncated_fraction"] = self.reward_text.cut
        layout = self.policy.layout
        return {name: truncated_fraction(cut, layout, self.all_sum) for name, cut in flags.items()}

    def optimize(self, experience: Experience) -> dict[str, float]:
        """Both halves of the method: the critic with the classifier (stage 1), the policy with omega (stage 2)."""
        steps: list[Metrics] = []
        for minibatch in self._minibatches(experience):
            step = self._update_critic(minibatch, len(experience.tokens) / len(minibatch.tokens))
            if not self._policy_waits():
                step |= self._update_policy(minibatch)
            self.num_updates += 1
            steps.append(step)
        names = sorted({name for step in steps for name in step})
        values = {name: [step[name] for step in steps if name in step] for name in names}  # the policy may have waited
        return {name: sum(found) / len(found) for name, found in values.items()}

    def _policy_waits(self) -> bool:
        return self.num_updates < self.config.ppo.critic_warmup_updates or self.grouping.warming_up(self.num_updates)

    def _minibatches(self, experience: Experience) -> Iterator[Experience]:
        """This rank's part of each minibatch; rows were dealt so that its composition depends on no layout."""
        num_rows = len(experience.tokens)
        size = self.config.batch.global_size * num_rows // self.prompts.num_rows
        for _ in range(self.config.ppo.epochs):
            for start in range(0, num_rows, size):
                yield take_rows(experience, slice(start, start + size))

    def _update_critic(self, minibatch: Experience, num_minibatches: float) -> dict[str, float]:
        """Value loss averaged over tokens, plus the classifier's loss summed over the global batch."""
        ppo = self.config.ppo
        lr = learning_rate(self.config.critic_optimizer, update=self.num_updates, num_updates=self.num_planned_updates)
        num_tokens = self.all_sum(minibatch.response_mask.sum())

        def group_loss(readout: Readout, rows: Experience) -> torch.Tensor:
            return num_minibatches * self.grouping.loss(readout, rows.classifier_coefs)

        def critic_loss(readout: Readout, rows: Experience) -> LossSum:
            loss = value_loss(
                readout.values, rows.values, rows.returns, rows.response_mask, value_clip_range=ppo.value_clip_range
            )
            if self.classifier:
                return loss
            return LossSum(
                total=loss.total + num_tokens * group_loss(readout, rows), count=loss.count, metrics=loss.metrics
            )

        def classifier_loss(readout: Readout, rows: Experience) -> LossSum:
            return LossSum(total=num_tokens * group_loss(readout, rows), count=rows.response_mask.sum(), metrics={})

        step: dict[str, float] = {}
        if self.critic:
            self.progress.enter("critic warm-up" if self._policy_waits() else "critic update", minibatch)
            step |= _named("critic", self.critic.update(Part(minibatch, critic_loss), lr=lr))
        if self.classifier:
            self.progress.enter("classifier update", minibatch)
            step |= _named("classifier", self.classifier.update(Part(minibatch, classifier_loss), lr=lr))
        return step

    def _update_policy(self, minibatch: Experience) -> dict[str, float]:
        ppo = self.config.ppo
        lr = learning_rate(self.config.optimizer, update=self.num_updates, num_updates=self.num_planned_updates)

        def invariant_policy_loss(readout: Readout, rows: Experience) -> LossSum:
            weighted = rows.invariance_weights[:, None] * rows.advantages  # A' = omega A, before the min and the clip
            return policy_loss(
                readout.log_probs, rows.log_probs, weighted, rows.response_mask, clip_range=ppo.clip_range
            )

        parts = [Part(minibatch, invariant_policy_loss, self.temperature)]
        if self.pretrain:
            parts.append(self._pretraining_part(minibatch))
        self.progress.enter("policy update", minibatch)
        return _named("policy", self.policy.update(*parts, lr=lr))

    def _pretraining_part(self, minibatch: Experience) -> Part:
        """ptx_coef times the mean next-token loss on pre-training text, as a part that counts no tokens of its own."""
        assert self.pretrain is not None
        text = self.pretrain.batch(self.num_updates)
        counts = self.all_sum(torch.stack([minibatch.response_mask.sum(), text.response_mask.sum()]))
        scale = self.config.ppo.ptx_coef * counts[0] / counts[1]

        def ptx_loss(readout: Readout, rows: TokenBatch) -> LossSum:
            loss = token_nll(readout.log_probs, rows.response_mask)
            metrics = {"policy/ptx_loss": scale / self.config.ppo.ptx_coef * loss.total.detach()}
            return LossSum(total=scale * loss.total, count=torch.zeros_like(loss.count), metrics=metrics)

        return Part(text, ptx_loss)

    def evaluate(self) -> Metrics:
        """Scores of responses to the held-out prompts, under eval/."""
        if self.eval_prompts is None:
            return {}
        rollouts = []
        for batch in self.eval_prompts.all_batches():
            self.progress.safe_point("evaluation", batch)
            rollouts.append(self.sampler.sample(batch, meet=partial(self.progress.meet, "evaluation", batch)))
        rollouts = [rollout for rollout in rollouts if len(rollout.tokens)]
        self.progress.safe_point("evaluation by reward_model")
        rows = [self._rewarded(rollout, self.eval_prompts) for rollout in rollouts]
        scores = [self.reward_model.evaluate(batch).scores for batch in rows]
        names = self.eval_prompts.dataset.group_names
        parts = [rollout_means(r, s, names) for r, s in zip(rollouts, scores, strict=True)]
        metrics = with_deviations(Means.total(parts).reduce(self.all_sum))
        return {f"eval/{name}": value for name, value in metrics.items()}

    def samples(self, count: int) -> list[dict[str, Any]]:
        texts = sample_texts(self.last_rollout, self.tokenizer, count)
        scores = self.last_scores
        groups = scores.group_probs.tolist()
        cut = self.prompts.dataset.truncated(self.last_rollout.row_ids.tolist())
        rows = zip(texts, cut, scores.scores.tolist(), groups, strict=False)
        return [
            {**text, **({"prompt_truncated": True} if is_cut else {}), "score": score, "group_probs": probs}
            for text, is_cut, score, probs in rows
        ]

    def models(self) -> dict[str, TrainableModel]:
        """What a checkpoint holds."""
        trained = {"policy": self.policy, "critic": self.critic, "classifier": self.classifier}
        return {role: model for role, model in trained.items() if model is not None}

    def state(self) -> dict[str, Any]:
        moments = {"count": self.moments.count, "mean": self.moments.mean, "m2": self.moments.m2}
        return {
            "num_updates": self.num_updates,
            "moments": moments,
            "grouping": self.grouping.state(),
            "alarms": self.alarms.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.num_updates, self.moments = state["num_updates"], ScoreMoments(**state["moments"])
        self.grouping.load_state(state["grouping"])
        self.alarms.load_state(state["alarms"])

    def take_warnings(self) -> list[str]:
        return self.alarms.take_lines()


def _named(family: str, metrics: Metrics) -> dict[str, float]:
    """gradient_norm -> policy/gradient_norm; names that have a family keep it."""
    return {name if "/" in name else f"{family}/{name}": value for name, value in metrics.items()}


def _times(clock: list[float], num_tokens: float) -> dict[str, float]:
    rollout, score, update = (b - a for a, b in itertools.pairwise(clock))
    total = clock[-1] - clock[0]
    return {
        "time/rollout_s": rollout,
        "time/score_s": score,
        "time/update_s": update,
        "time/iteration_s": total,
        "time/tokens_per_s": num_tokens / total,
    }
