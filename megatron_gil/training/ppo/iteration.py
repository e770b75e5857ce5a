"""PPO with group-invariant learning. `PpoTrainer.iterate` is the algorithm; plain PPO is the case of one group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from megatron_gil.algo.likelihood import token_nll
from megatron_gil.algo.masked import ScoreMoments
from megatron_gil.algo.ppo import explained_variance, policy_loss, value_loss
from megatron_gil.config import PpoConfig
from megatron_gil.data.text.tokenizer import Tokenizer
from megatron_gil.engine.optimizer import learning_rate
from megatron_gil.engine.protocol import Engine, FrozenEngine, Part, Sampler, Scorer, Update
from megatron_gil.parallel.collectives import all_sum
from megatron_gil.parallel.layout import ParallelLayout
from megatron_gil.training.ppo.alarms import Alarms
from megatron_gil.training.ppo.duplicates import repeats_another
from megatron_gil.training.ppo.grouping import Grouping
from megatron_gil.training.ppo.shaping import shape_experience
from megatron_gil.training.ppo.shaping_metrics import rollout_means, with_deviations
from megatron_gil.training.ppo.trends import KlTrends
from megatron_gil.training.row_source import PromptSource, RowSource, truncated_fraction
from megatron_gil.training.run.metrics import Means
from megatron_gil.training.run.progress import Progress
from megatron_gil.training.run.samples import sample_texts
from megatron_gil.training.run.timer import Timer
from megatron_gil.types import (
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """Everything that reads or writes tokens, all on one process-group layout."""

    policy: Engine
    ref_policy: FrozenEngine
    critic: Engine | None = None
    """None where advantages come from comparing a prompt's responses (rloo, grpo)."""
    classifier: Engine | None = None
    """The group classifier's own model; None where it is a head of the critic, or there is none."""
    sampler: Sampler
    """Answers with the policy as it is."""
    scorer: Scorer

    def offload(self) -> None:
        """Before sampling: what only updates need may wait elsewhere."""
        for model in (self.policy, self.critic, self.classifier):
            if model:
                model.offload()


class PpoTrainer:
    """Samples, scores, shapes and updates; what a checkpoint holds of it beside the models is `state`."""

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
        models: Models,
        *,
        grouping: Grouping,
        prompts: PromptSource,
        eval_prompts: PromptSource | None,
        pretrain: RowSource | None,
        tokenizer: Tokenizer,
        progress: Progress,
        layout: ParallelLayout,
        score_range: tuple[float, float] | None = None,
    ) -> None:
        """score_range: of the reward model's training; None where that is not known."""
        self.config, self.models, self.num_iterations = config, models, config.ppo.iterations
        self.grouping, self.tokenizer, self.progress = grouping, tokenizer, progress
        self.prompts, self.eval_prompts, self.pretrain = prompts, eval_prompts, pretrain
        self.layout, self.all_sum = layout, all_sum(layout)
        self.moments = ScoreMoments()
        self.trends = KlTrends()
        self.alarms = Alarms(
            config.alarms,
            min_group_mass=config.gil.min_group_mass,
            score_range=score_range,
            truncations=config.sampling.truncations(),
        )
        self.num_updates = 0
        # Greedy sampling has no log-probs of its own: those of temperature 1 stand in for them.
        self.temperature = config.sampling.temperature or 1.0
        minibatches = config.ppo.num_rows // config.batch.global_size
        self.num_planned_updates = config.ppo.iterations * config.ppo.epochs * minibatches

    def iterate(self, iteration: int) -> Metrics:
        """One iteration: sample responses, score them, settle rewards and groups, update critic and policy."""
        timer = Timer()
        with timer("rollout"):
            rollout = self.sample(self.prompts.batch(iteration))
        with timer("score"):
            scores = self.score(rollout)
            self.progress.safe_point("shaping")  # the last: from here on the trainer's state changes
            experience, metrics = self.shape(rollout, scores)
        with timer("update"):
            metrics |= self.optimize(experience)
        self.last_rollout, self.last_scores = rollout, scores
        metrics |= self.trends.add(metrics)
        metrics |= self.alarms.check(metrics, warming_up=self.grouping.warming_up(self.num_updates))
        return metrics | timer.metrics(num_tokens=metrics["response/tokens"] * self.prompts.num_rows)

    def sample(self, prompts: PromptBatch, phase: str = "rollout") -> Rollout:
        """The policy's responses."""
        self.progress.safe_point(phase, prompts)
        self.models.offload()
        return self.models.sampler.sample(prompts, meet=partial(self.progress.meet, phase, prompts))

    def score(self, rollout: Rollout) -> Scores:
        """What every model says of the rollout, before any update."""

        def read(role: str, model: FrozenEngine, **kwargs: Any) -> Readout:
            self.progress.safe_point(f"scoring by {role}", rollout)
            return model.evaluate(rollout, **kwargs)

        models = self.models
        policy = read("policy", models.policy, entropy=True, temperature=self.temperature)
        critic = read("critic", models.critic) if models.critic else Readout(values=torch.zeros_like(policy.log_probs))
        groups = read("classifier", models.classifier) if models.classifier else critic
        ref_policy = read("ref_policy", models.ref_policy, temperature=self.temperature)
        self.progress.safe_point(f"scoring by {models.scorer.name}", rollout)
        scored = models.scorer.score(rollout, self.prompts.dataset)
        return Scores(
            log_probs=policy.log_probs,
            entropy=policy.entropy,
            ref_log_probs=ref_policy.log_probs,
            values=critic.values,
            group_probs=self.grouping.probs(rollout, groups),
            scores=scored.scores,
            truncated=scored.truncated,
            model_scores=scored.model_scores,
            function_scores=scored.function_scores,
        )

    def shape(self, rollout: Rollout, scores: Scores) -> tuple[Experience, dict[str, float]]:
        """Rewards, advantages, and the group weights: constants of this iteration."""
        layout = self.layout
        repeated = repeats_another(rollout, dp_rank=layout.dp_rank, dp_size=layout.dp_size, all_sum=self.all_sum)
        experience, self.moments, metrics = shape_experience(
            rollout,
            scores,
            moments=self.moments,
            grouping=self.grouping,
            num_updates=self.num_updates,
            ppo=self.config.ppo,
            gil=self.config.gil,
            known_names=self.prompts.dataset.group_names,
            repeated=repeated,
            all_sum=self.all_sum,
        )
        if self.models.critic:
            mask = rollout.response_mask
            explained = explained_variance(scores.values, experience.returns, mask, all_sum=self.all_sum)
            metrics["critic/explained_variance"] = float(explained)
        cut: dict[str, Sequence[bool] | torch.Tensor] = {
            "data/truncated_fraction": self.prompts.dataset.truncated(rollout.row_ids.tolist())
        }
        if scores.truncated is not None:
            cut["data/reward_truncated_fraction"] = scores.truncated
        metrics |= {name: truncated_fraction(flags, layout, self.all_sum) for name, flags in cut.items()}
        if scores.model_scores is not None:
            outside = self.alarms.out_of_range_fraction(scores.model_scores, layout)
            metrics["reward/out_of_range_fraction"] = outside
            if scores.function_scores is not None:
                parts = {"model": scores.model_scores, "function": scores.function_scores}
                metrics |= {f"reward/{name}_mean": self._row_mean(part) for name, part in parts.items()}
        return experience, metrics

    def _row_mean(self, numbers: torch.Tensor) -> float:
        """Of a number a row [B], over all ranks."""
        total, count = self.all_sum(torch.stack([numbers.double().sum(), torch.ones_like(numbers).double().sum()]))
        return float(total / count)

    def optimize(self, experience: Experience) -> dict[str, float]:
        """Both halves of the method: the critic with the classifier (stage 1), the policy with omega (stage 2)."""
        steps: list[Metrics] = []
        for minibatch in self._minibatches(experience):
            step = self._update_critic(minibatch)
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

    def _update_critic(self, minibatch: Experience) -> dict[str, float]:
        """Value loss averaged over tokens, plus the classifier's loss summed over the rows of the rollout."""
        clip_range = self.config.ppo.value_clip_range
        lr = learning_rate(self.config.critic_optimizer, update=self.num_updates, num_updates=self.num_planned_updates)

        def critic_loss(readout: Readout, rows: Experience) -> LossSum:
            mask = rows.response_mask
            return value_loss(readout.values, rows.values, rows.returns, mask, value_clip_range=clip_range)

        def group_loss(readout: Readout, rows: Experience) -> LossSum:
            return LossSum(total=self.grouping.loss(readout, rows.classifier_coefs), metrics={})

        values = Part(batch=minibatch, loss_fn=critic_loss)
        groups = Part(batch=minibatch, loss_fn=group_loss, weight=self.prompts.num_rows, per="row")
        critic, classifier = self.models.critic, self.models.classifier
        step: dict[str, float] = {}
        if critic:
            in_head = self.grouping.learns and not classifier
            self.progress.enter("critic warm-up" if self._policy_waits() else "critic update", minibatch)
            step |= _named("critic", critic.update(*([values, groups] if in_head else [values]), lr=lr))
        if classifier:
            self.progress.enter("classifier update", minibatch)
            step |= _named("classifier", classifier.update(groups, lr=lr))
        return step

    def _update_policy(self, minibatch: Experience) -> dict[str, float]:
        """The clipped loss with A' = omega A, plus ptx_coef times the mean next-token loss on pre-training text."""
        ppo = self.config.ppo
        lr = learning_rate(self.config.optimizer, update=self.num_updates, num_updates=self.num_planned_updates)

        def invariant_policy_loss(readout: Readout, rows: Experience) -> LossSum:
            weighted = rows.invariance_weights[:, None] * rows.advantages  # A' = omega A, before the min and the clip
            mask = rows.response_mask
            return policy_loss(readout.log_probs, rows.log_probs, weighted, mask, clip_range=ppo.clip_range)

        def ptx_loss(readout: Readout, rows: TokenBatch) -> LossSum:
            loss = token_nll(readout.log_probs, rows.response_mask)
            return LossSum(total=loss.total, metrics={"policy/ptx_loss": loss.total.detach()})

        parts = [Part(batch=minibatch, loss_fn=invariant_policy_loss, temperature=self.temperature)]
        if self.pretrain:
            text = self.pretrain.batch(self.num_updates)
            parts.append(Part(batch=text, loss_fn=ptx_loss, weight=ppo.ptx_coef))
        self.progress.enter("policy update", minibatch)
        return _named("policy", self.models.policy.update(*parts, lr=lr))

    def evaluate(self) -> Metrics:
        """Scores of responses to the held-out prompts, under eval/."""
        if self.eval_prompts is None:
            return {}
        rollouts = [self.sample(batch, "evaluation") for batch in self.eval_prompts.all_batches()]
        scorer, prompts = self.models.scorer, self.eval_prompts.dataset
        self.progress.safe_point(f"evaluation by {scorer.name}")
        scores = [scorer.score(rollout, prompts).scores for rollout in rollouts]
        parts = [
            rollout_means(rollout, scored, prompts.group_names)
            for rollout, scored in zip(rollouts, scores, strict=True)
            if len(rollout.tokens)
        ]
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

    def state(self) -> dict[str, Any]:
        return {
            "num_updates": self.num_updates,
            "moments": asdict(self.moments),
            "grouping": self.grouping.state(),
            "trends": self.trends.state(),
            "alarms": self.alarms.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.num_updates, self.moments = state["num_updates"], ScoreMoments(**state["moments"])
        self.grouping.load_state(state["grouping"])
        self.trends.load_state(state.get("trends", {"past": {}}))  # a checkpoint of an older version has none
        self.alarms.load_state(state["alarms"])

    def extra_config(self) -> dict[str, dict[str, Any]]:
        return {}

    def take_warnings(self) -> list[str]:
        return self.alarms.take_lines()


def _named(family: str, update: Update) -> dict[str, float]:
    """gradient_norm -> policy/gradient_norm; names that have a family keep it."""
    return {name if "/" in name else f"{family}/{name}": value for name, value in update.metrics.items()}
