"""The sections of a config. Every key is explained by the string under it; docs/config.md and --help-config print them.

Sizes that follow from others (data-parallel size, microbatches per update, ...) are never keys: `BatchPlan` computes
them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from omegaconf import MISSING

from megatron_gil.config.ranges import LARGEST_SEED, integer, real
from megatron_gil.config.section import Section, path, require


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSection(Section):
    key: ClassVar[str] = "run"

    seed: int = integer(1, most=LARGEST_SEED)
    """Seeds sampling, data order and new heads. Dropout is not used."""
    deterministic: bool = False
    """On a GPU: only kernels that give the same bits each time, so that a resumed run repeats one that was not stopped
    bit for bit. Costs speed, above all in attention's backward pass. A CPU run is deterministic without it."""
    max_minutes: float | None = real(None, above=0)
    """Save and exit 75 once the process has run this long; null never."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRunSection(RunSection):
    dir: str = path(MISSING)
    """Run directory: config.yaml, metrics.jsonl, TensorBoard events, samples.jsonl, checkpoints/."""
    resume: bool = True
    """Continue from the newest checkpoint where the run directory holds a run; false refuses such a directory."""
    max_skipped_updates: int = integer(10)
    """Stop after this many updates skipped for a NaN or Inf loss or gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelsSection(Section):
    """Each path is a Hugging Face directory, or a `policy/`, `critic/`, ... directory inside one of our checkpoints
    (which has the same format)."""

    key: ClassVar[str] = "models"

    policy: str | None = path()
    """The model trained by sft, dpo and ppo, or used by generate."""
    ref_policy: str | None = path()
    """Frozen reference of dpo and ppo; null: a copy of the policy as it starts."""
    reward_model: str | None = path()
    """Trained by reward, read by ppo and score."""
    critic: str | None = path()
    """Where ppo's critic starts; null: from the reward model."""
    reward_tokenizer: Literal["same", "own"] = "same"
    """same: ppo's reward model has the policy's tokenizer and reads its tokens. own: it has another and reads prompts
    and responses as text; critic and classifier read the policy's tokens all the same."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Weights and activations; bfloat16 keeps float32 master weights in the optimizer."""
    layer: Literal["auto", "local", "transformer_engine"] = "auto"
    """Transformer layer: auto takes Transformer Engine where it imports and the device is a GPU."""
    fusions: Literal["auto", "off"] = "auto"
    """On a GPU, auto takes megatron-core's fused kernels, each where its library imports: rotary embedding (Transformer
    Engine), SwiGLU (Triton), gradient accumulation (Apex). The first lines of a run say which."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation in the backward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelSection(Section):
    key: ClassVar[str] = "parallel"

    tensor_size: int = integer(1, least=1)
    """Tensor-parallel ranks per model."""
    pipeline_size: int = integer(1, least=1)
    """Pipeline-parallel ranks per model. Data parallelism takes what is left: world / (tensor x pipeline)."""
    sequence_parallel: bool = False
    """Shard activations between tensor-parallel regions along the sequence; needs tensor_size > 1."""
    distributed_optimizer: bool = False
    """Shard optimizer state over data-parallel ranks (megatron-core's distributed optimizer)."""
    timeout_s: float = real(600.0, least=1, most=30 * 86400)
    """A collective that waits longer than this ends the run."""

    def _check(self) -> None:
        require(
            not (self.sequence_parallel and self.tensor_size == 1),
            "parallel.sequence_parallel=true needs parallel.tensor_size above 1; set one of the two",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSection(Section):
    key: ClassVar[str] = "data"

    train: str | None = path()
    """JSON Lines or Parquet file, or a directory of them: prompts, demonstrations or preferences, as the command
    needs."""
    eval: str | None = path()
    """The same, held out; null: no evaluation."""
    pretrain: str | None = path()
    """{"text"} or demonstrations, for ppo's pre-training-loss mix (ppo.ptx_coef)."""
    tokenizer: str | None = path()
    """Directory with tokenizer.model or tokenizer.json; null: the policy's (or reward model's) own directory."""
    max_prompt_tokens: int = integer(512, least=1)
    """A longer prompt loses its oldest turns or tokens: said at the start, and data/truncated_fraction."""
    max_tokens: int = integer(1024, least=1)
    """Prompt and response of sft, reward and dpo; a longer response is cut at its end, said as above."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSection(Section):
    key: ClassVar[str] = "batch"

    global_size: int = integer(32, least=1)
    """Rows (pairs for reward and dpo) of one update, over all ranks."""
    micro_size: int = integer(8, least=1)
    """Rows of one forward pass on one rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSection(Section):
    key: ClassVar[str] = "optimizer"

    lr: float = real(1e-5, least=0)
    min_lr: float = real(0.0, least=0)
    """Where the schedule ends."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Decay after the warm-up, over the run's updates."""
    warmup_fraction: float = real(0.1, least=0, most=1)
    """Share of the updates over which the rate rises from 0."""
    beta1: float = real(0.9, least=0, below=1)
    beta2: float = real(0.95, least=0, below=1)
    eps: float = real(1e-8, above=0)
    weight_decay: float = real(0.0, least=0)
    clip_grad: float = real(1.0, least=0)
    """Bound on the global gradient norm; 0 switches clipping off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyOptimizerSection(OptimizerSection):
    """Of ppo's policy."""

    lr: float = real(1e-6, least=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticOptimizerSection(OptimizerSection):
    key: ClassVar[str] = "critic_optimizer"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSection(Section):
    """PPO's log-probs are those of the temperature sampled at. top_k, top_p, repetition_penalty and min_new_tokens are
    not in them: policy/sampling_mismatch logs how far the sampled distribution is from the one they speak of."""

    key: ClassVar[str] = "sampling"

    temperature: float = real(1.0, least=0)
    """0 is greedy, with the log-probs of temperature 1."""
    top_k: int = integer(0)
    """0 switches off."""
    top_p: float = real(1.0, above=0, most=1)
    repetition_penalty: float = real(1.0, above=0)
    """Divides positive and multiplies negative logits of tokens already in the row (CTRL, arXiv 1909.05858)."""
    max_new_tokens: int = integer(128, least=1)
    min_new_tokens: int = integer(1, least=1)
    """No end-of-sequence token before this many."""
    micro_size: int | None = integer(None, least=1)
    """Slots: rows decoded together on one rank, each replaced by the next when it ends; bounds the key-value cache.
    null: 64; on a GPU as many, a power of two up to 256, as fit in half of the memory that is free."""
    cuda_graphs: Literal["auto", "off"] = "auto"
    """auto: on a GPU a decoding step is captured and replayed, which takes its start-up time away."""

    def truncations(self) -> list[str]:
        """What keeps the sampler from drawing from the whole softmax, as section.key=value."""
        off = {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "min_new_tokens": 1}
        found = {key: getattr(self, key) for key in off}
        return [f"sampling.{key}={value:g}" for key, value in found.items() if value != off[key]]

    def _check(self) -> None:
        require(
            self.min_new_tokens <= self.max_new_tokens,
            f"sampling.min_new_tokens={self.min_new_tokens} must lie in [1, max_new_tokens={self.max_new_tokens}]",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSection(Section):
    key: ClassVar[str] = "checkpoint"

    every: int = integer(100, least=1)
    """Save each this many iterations (and at the end, and on a signal)."""
    keep_last: int = integer(2, least=1)
    """How many checkpoints stay; the last one always does."""
    keep_every: int = integer(0)
    """Checkpoints of every n-th iteration stay for ever; 0: none does."""
    keep_best: str | None = None
    """A metric of the evaluations (log.eval_every): the checkpoint where it was highest stays, as checkpoints/best too,
    and is saved at once. With a minus before it, lowest: eval/reward/score_mean, -eval/sft/loss."""
    on_error: Literal["stop", "continue"] = "stop"
    """When a checkpoint cannot be written (disk full, read-only, gone): stop with exit code 1, or go on without it. The
    last good one is kept either way, and a run that cannot save its last iteration fails."""
    background: bool = False
    """Write in a thread while training goes on: the weights are copied to host memory, and the checkpoint counts from
    the iteration after its files are complete. A stop waits for it."""

    def _check(self) -> None:
        require(
            self.keep_best is None or self.keep_best.removeprefix("-").startswith("eval/"),
            f"checkpoint.keep_best={self.keep_best} must name a metric under eval/, such as eval/reward/score_mean",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSection(Section):
    key: ClassVar[str] = "log"

    tensorboard: bool = True
    samples_every: int = integer(10)
    """Iterations between rows of samples.jsonl; 0: none."""
    samples: int = integer(4)
    """Rows written each time."""
    eval_every: int = integer(0)
    """Iterations between evaluations on data.eval; 0: at the end only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AlarmSection(Section):
    """When ppo warns: a line as it begins, and a metric alarm/NAME that is 0 or 1. 0 switches an alarm off."""

    key: ClassVar[str] = "alarms"

    max_kl: float = real(50.0, least=0)
    """Nats a reply, of the batch or of one group."""
    kl_spike: float = real(2.0, least=0)
    """The same against its own mean over the last ten iterations or so, or against 3 nats if that is more."""
    group_information: float = real(0.02, least=0)
    """Share of log M that the classifier's probabilities tell of a row (mutual information)."""
    out_of_range_fraction: float = real(0.2, least=0)
    """Share of the replies scored outside the range that the reward model gave its training pairs."""
    entropy_fraction: float = real(0.5, least=0)
    """Entropy below this share of the first iteration's."""
    length_factor: float = real(1.75, least=0)
    """Replies this many times longer or shorter than in the first iteration."""
    sampling_mismatch: float = real(0.1, least=0)
    """Nats a token between the log-probs that the sampler drew by and those that PPO uses (top_p and the like)."""
    duplicate_fraction: float = real(0.4, least=0)
    """Share of the replies that equal a reply to another prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSection(Section):
    """How long sft, reward and dpo train: epochs, or a number of updates where that is set."""

    key: ClassVar[str] = "train"

    epochs: int = integer(1, least=1)
    updates: int | None = integer(None, least=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSection(Section):
    key: ClassVar[str] = "reward"

    center_coef: float = real(0.01, least=0)
    """Weight of (score_chosen + score_rejected)^2, which keeps the mean score near 0, where the group classifier that
    starts from the score head splits; 0 switches off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DpoSection(Section):
    key: ClassVar[str] = "dpo"

    beta: float = real(0.1, above=0)
    """Strength of the implicit KL constraint (arXiv 2305.18290, eq. 7)."""
    label_smoothing: float = real(0.0, least=0, below=0.5)
    """Probability that a preference label is flipped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PpoSection(Section):
    key: ClassVar[str] = "ppo"

    iterations: int = integer(2000, least=1)
    prompts: int = integer(32, least=1)
    """Prompts per iteration, over all ranks."""
    responses_per_prompt: int = integer(1, least=1)
    epochs: int = integer(1, least=1)
    """Passes over each rollout."""
    kl_coef: float = real(0.05, least=0)
    """eta, weight of the per-token KL penalty in the reward; 0 is PPO without KL."""
    advantages: Literal["gae", "rloo", "grpo"] = "gae"
    """gae needs a critic. rloo and grpo compare the shaped returns of a prompt's responses instead and have none: they
    need responses_per_prompt of at least 2, and learned groups a classifier of its own (gil.classifier=own_model)."""
    gamma: float = real(1.0, least=0, most=1)
    gae_lambda: float = real(0.95, least=0, most=1)
    clip_range: float = real(0.2, above=0)
    value_clip_range: float = real(0.2, above=0)
    whiten_advantages: bool = True
    """Zero mean, unit variance over the response tokens of the global batch; not for grpo, which scales by prompt."""
    normalize_score: bool = True
    """Divide out the running mean and standard deviation of all scores so far (PPO-max)."""
    score_clip: float = real(0.8, least=0)
    """Bound on |normalised score|; 0 switches off. The default is the siblings' value, see method.md."""
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
    """Group-invariant learning. `num_groups: 1` is plain PPO: no classifier, omega exactly 1, p_high exactly 1."""

    key: ClassVar[str] = "gil"

    num_groups: int = integer(2, least=1)
    """M."""
    groups: Literal["learned", "known"] = "learned"
    """learned: the classifier infers them; known: the labels in the data (`group`), the oracle of the ablations."""
    invariance_coef: float = real(0.1, least=0)
    """beta_policy, weight of the between-group variance in the policy's objective."""
    classifier_coef: float = real(1.0, least=0)
    """beta_critic, weight of the classifier's term in the critic's objective."""
    adaptive_kl: bool = True
    """Multiply the KL penalty of a trajectory by its probability of being in the best group."""
    kl_floor: float = real(0.0, least=0, most=1)
    """Least factor on a trajectory's KL penalty: floor + (1 - floor) p(g_high). 0: the paper; 1: PPO's own penalty."""
    classifier: Literal["critic_head", "own_model"] = "critic_head"
    group_return: Literal["total", "score"] = "total"
    """R_i: the sum of the shaped token rewards, or the normalised score alone."""
    group_value: Literal["return", "weighted_log_prob"] = "return"
    """What orders the groups: returns (right), or the printed formula's sum(log pi * R) (wrong sign, for study)."""
    weight_floor: float | None = real(None, most=1)
    """Lower bound on omega, whose mean is 1; null: none."""
    min_group_mass: float = real(0.02, least=0, below=1)
    """A group with less than this share of the batch (or less than 1 row) is left out of the statistics."""
    balance_coef: float = real(0.0, least=0)
    """Weight of KL(mean_i w_i || uniform) in the classifier's loss."""
    init_scale: float = real(1.0)
    """alpha: the classifier's rows start from +alpha to -alpha times the reward model's score head; never 0."""
    warmup_updates: int = integer(50)
    """Critic-and-classifier updates before the policy moves and the groups steer it; until then p_high = 1."""
    ramp_updates: int = integer(50)
    """Updates after that over which beta_policy rises linearly from 0."""
    ema_decay: float = real(0.9, least=0, below=1)
    """Of the group mean score that decides which group is high."""

    def _check(self) -> None:
        require(
            self.init_scale != 0, "gil.init_scale=0 is a stationary point that the classifier never leaves; use 1.0"
        )
