"""Configuration: one frozen dataclass per section, one per command. config_files.py reads them.

Every key is explained by the string under it. Sizes that follow from others (data-parallel size, microbatches per
update, ...) are never keys: `BatchPlan` computes them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self

from omegaconf import MISSING


class ConfigError(ValueError):
    """The user's configuration or data is wrong; the message is one line that names the key or file and the fix."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # it may quote what it refuses


def require(condition: bool, message: str) -> None:
    """ConfigError with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSection:
    seed: int = 1
    """Seeds sampling, data order and new heads. Dropout is not used."""
    max_minutes: float | None = None
    """Save and exit 75 once the process has run this long; null never."""

    def __post_init__(self) -> None:
        require(self.max_minutes is None or self.max_minutes > 0, f"run.max_minutes={self.max_minutes} must be above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRunSection(RunSection):
    dir: str = MISSING
    """Run directory: config.yaml, metrics.jsonl, TensorBoard events, samples.jsonl, checkpoints/."""
    resume: bool = True
    """Continue from the newest checkpoint where the run directory holds a run; false refuses such a directory."""
    max_skipped_updates: int = 10
    """Stop after this many updates skipped for a NaN or Inf loss or gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelsSection:
    """Each path is a Hugging Face directory, or a `policy/`, `critic/`, ... directory inside one of our checkpoints
    (which has the same format)."""

    policy: str | None = None
    """The model trained by sft, dpo and ppo, or used by generate."""
    ref_policy: str | None = None
    """Frozen reference of dpo and ppo; null: a copy of the policy as it starts."""
    reward_model: str | None = None
    """Trained by reward, read by ppo and score."""
    critic: str | None = None
    """Where ppo's critic starts; null: from the reward model."""
    reward_tokenizer: Literal["same", "own"] = "same"
    """same: ppo's reward model has the policy's tokenizer and reads its tokens. own: it has another and reads prompts
    and responses as text; critic and classifier read the policy's tokens all the same."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Weights and activations; bfloat16 keeps float32 master weights in the optimizer."""
    layer: Literal["auto", "local", "transformer_engine"] = "auto"
    """Transformer layer: auto takes Transformer Engine where it imports and the device is a GPU."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation in the backward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelSection:
    tensor_size: int = 1
    """Tensor-parallel ranks per model."""
    pipeline_size: int = 1
    """Pipeline-parallel ranks per model. Data parallelism takes what is left: world / (tensor x pipeline)."""
    sequence_parallel: bool = False
    """Shard activations between tensor-parallel regions along the sequence; needs tensor_size > 1."""
    distributed_optimizer: bool = False
    """Shard optimizer state over data-parallel ranks (megatron-core's distributed optimizer)."""
    timeout_s: float = 600.0
    """A collective that waits longer than this ends the run."""

    def __post_init__(self) -> None:
        for name in ("tensor_size", "pipeline_size"):
            require(getattr(self, name) >= 1, f"parallel.{name}={getattr(self, name)} must be at least 1")
        require(
            not (self.sequence_parallel and self.tensor_size == 1),
            "parallel.sequence_parallel=true needs parallel.tensor_size above 1; set one of the two",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSection:
    train: str | None = None
    """JSON Lines or Parquet file, or a directory of them: prompts, demonstrations or preferences, as the command
    needs."""
    eval: str | None = None
    """The same, held out; null: no evaluation."""
    pretrain: str | None = None
    """{"text"} or demonstrations, for ppo's pre-training-loss mix (ppo.ptx_coef)."""
    tokenizer: str | None = None
    """Directory with tokenizer.model or tokenizer.json; null: the policy's (or reward model's) own directory."""
    max_prompt_tokens: int = 512
    """A longer prompt loses its oldest turns or tokens: said at the start, and data/truncated_fraction."""
    max_tokens: int = 1024
    """Prompt and response of sft, reward and dpo; a longer response is cut at its end, said as above."""

    def __post_init__(self) -> None:
        for name in ("max_prompt_tokens", "max_tokens"):
            require(getattr(self, name) >= 1, f"data.{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSection:
    global_size: int = 32
    """Rows (pairs for reward and dpo) of one update, over all ranks."""
    micro_size: int = 8
    """Rows of one forward pass on one rank."""

    def __post_init__(self) -> None:
        for name in ("global_size", "micro_size"):
            require(getattr(self, name) >= 1, f"batch.{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSection:
    lr: float = 1e-5
    min_lr: float = 0.0
    """Where the schedule ends."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Decay after the warm-up, over the run's updates."""
    warmup_fraction: float = 0.1
    """Share of the updates over which the rate rises from 0."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    """Bound on the global gradient norm; 0 switches clipping off."""

    def __post_init__(self) -> None:
        require(self.lr >= 0, f"optimizer lr={self.lr} must not be negative")
        require(0 <= self.warmup_fraction <= 1, f"optimizer warmup_fraction={self.warmup_fraction} must lie in [0, 1]")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSection:
    """Anything but temperature 1 and the rest off makes the sampled distribution differ from the one PPO's
    log-probs speak of; policy/sampling_mismatch logs by how much."""

    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """0 switches off."""
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens already in the row (CTRL, arXiv 1909.05858)."""
    max_new_tokens: int = 128
    min_new_tokens: int = 1
    """No end-of-sequence token before this many."""
    micro_size: int = 64
    """Rows decoded together on one rank; bounds the key-value cache."""

    def __post_init__(self) -> None:
        require(self.micro_size >= 1, f"sampling.micro_size={self.micro_size} must be at least 1")
        require(self.temperature >= 0, f"sampling.temperature={self.temperature} must not be negative")
        require(self.top_k >= 0, f"sampling.top_k={self.top_k} must not be negative")
        require(0 < self.top_p <= 1, f"sampling.top_p={self.top_p} must lie in (0, 1]")
        require(self.repetition_penalty > 0, f"sampling.repetition_penalty={self.repetition_penalty} must be above 0")
        require(
            1 <= self.min_new_tokens <= self.max_new_tokens,
            f"sampling.min_new_tokens={self.min_new_tokens} must lie in [1, max_new_tokens={self.max_new_tokens}]",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSection:
    every: int = 100
    """Save each this many iterations (and at the end, and on a signal)."""
    keep_last: int = 2
    """How many checkpoints stay."""
    keep_every: int = 0
    """Checkpoints of every n-th iteration stay for ever; 0: none does."""
    on_error: Literal["stop", "continue"] = "stop"
    """When a checkpoint cannot be written (disk full, read-only, gone): stop with exit code 1, or go on without it. The
    last good one is kept either way, and a run that cannot save its last iteration fails."""
    background: bool = False
    """Write in a thread while training goes on: the weights are copied to host memory, and the checkpoint counts from
    the iteration after its files are complete. A stop waits for it."""

    def __post_init__(self) -> None:
        require(self.every >= 1, f"checkpoint.every={self.every} must be at least 1")
        require(
            self.keep_last >= 1,
            f"checkpoint.keep_last={self.keep_last} must be at least 1: the last one is never deleted",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSection:
    tensorboard: bool = True
    samples_every: int = 10
    """Iterations between rows of samples.jsonl; 0: none."""
    samples: int = 4
    """Rows written each time."""
    eval_every: int = 0
    """Iterations between evaluations on data.eval; 0: at the end only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AlarmSection:
    """When ppo warns: a line as it begins, and a metric alarm/NAME that is 0 or 1. 0 switches an alarm off."""

    max_kl: float = 50.0
    """Nats a reply, of the batch or of one group."""
    kl_spike: float = 2.0
    """The same against its own mean over the last ten iterations or so, or against 3 nats if that is more."""
    group_information: float = 0.02
    """Share of log M that the classifier's probabilities tell of a row (mutual information)."""
    out_of_range_fraction: float = 0.2
    """Share of the replies scored outside the range that the reward model gave its training pairs."""
    entropy_fraction: float = 0.5
    """Entropy below this share of the first iteration's."""
    length_factor: float = 1.75
    """Replies this many times longer or shorter than in the first iteration."""
    duplicate_fraction: float = 0.4
    """Share of the replies that equal a reply to another prompt."""

    def __post_init__(self) -> None:
        for f in fields(self):
            require(getattr(self, f.name) >= 0, f"alarms.{f.name}={getattr(self, f.name)} must not be negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSection:
    """How long sft, reward and dpo train: epochs, or a number of updates where that is set."""

    epochs: int = 1
    updates: int | None = None

    def __post_init__(self) -> None:
        require(self.epochs >= 1, f"train.epochs={self.epochs} must be at least 1")
        require(self.updates is None or self.updates >= 1, f"train.updates={self.updates} must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSection:
    center_coef: float = 0.01
    """Weight of (score_chosen + score_rejected)^2, which keeps the mean score near 0, where the group classifier that
    starts from the score head splits; 0 switches off."""

    def __post_init__(self) -> None:
        require(self.center_coef >= 0, f"reward.center_coef={self.center_coef} must not be negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class DpoSection:
    beta: float = 0.1
    """Strength of the implicit KL constraint (arXiv 2305.18290, eq. 7)."""
    label_smoothing: float = 0.0
    """Probability that a preference label is flipped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PpoSection:
    iterations: int = 2000
    prompts: int = 32
    """Prompts per iteration, over all ranks."""
    responses_per_prompt: int = 1
    epochs: int = 1
    """Passes over each rollout."""
    kl_coef: float = 0.05
    """eta, weight of the per-token KL penalty in the reward; 0 is PPO without KL."""
    advantages: Literal["gae", "rloo", "grpo"] = "gae"
    """gae needs a critic. rloo and grpo compare the shaped returns of a prompt's responses instead and have none: they
    need responses_per_prompt of at least 2, and learned groups a classifier of its own (gil.classifier=own_model)."""
    gamma: float = 1.0
    gae_lambda: float = 0.95
    clip_range: float = 0.2
    value_clip_range: float = 0.2
    whiten_advantages: bool = True
    """Zero mean, unit variance over the response tokens of the global batch; not for grpo, which scales by prompt."""
    normalize_score: bool = True
    """Divide out the running mean and standard deviation of all scores so far (PPO-max)."""
    score_clip: float = 0.8
    """Bound on |normalised score|; 0 switches off. The default is the siblings' value, see method.md."""
    critic_warmup_updates: int = 0
    """Updates in which only the critic learns, before the policy moves (PPO-max's critic pre-training)."""
    ptx_coef: float = 0.0
    """Weight of the language-modelling loss on data.pretrain in the policy's update."""

    def __post_init__(self) -> None:
        for name in ("iterations", "prompts", "responses_per_prompt", "epochs"):
            require(getattr(self, name) >= 1, f"ppo.{name}={getattr(self, name)} must be at least 1")
        require(
            self.advantages == "gae" or self.responses_per_prompt > 1,
            f"ppo.advantages={self.advantages} compares a prompt's responses; set ppo.responses_per_prompt above 1",
        )
        for name in ("gamma", "gae_lambda"):
            require(0 <= getattr(self, name) <= 1, f"ppo.{name}={getattr(self, name)} must lie in [0, 1]")
        for name in ("kl_coef", "score_clip", "ptx_coef", "critic_warmup_updates"):
            require(getattr(self, name) >= 0, f"ppo.{name}={getattr(self, name)} must not be negative")
        for name in ("clip_range", "value_clip_range"):
            require(getattr(self, name) > 0, f"ppo.{name}={getattr(self, name)} must be above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class GilSection:
    """Group-invariant learning. `num_groups: 1` is plain PPO: no classifier, omega exactly 1, p_high exactly 1."""

    num_groups: int = 2
    """M."""
    groups: Literal["learned", "known"] = "learned"
    """learned: the classifier infers them; known: the labels in the data (`group`), the oracle of the ablations."""
    invariance_coef: float = 0.1
    """beta_policy, weight of the between-group variance in the policy's objective."""
    classifier_coef: float = 1.0
    """beta_critic, weight of the classifier's term in the critic's objective."""
    adaptive_kl: bool = True
    """Multiply the KL penalty of a trajectory by its probability of being in the best group."""
    kl_floor: float = 0.0
    """Least factor on a trajectory's KL penalty: floor + (1 - floor) p(g_high). 0: the paper; 1: PPO's own penalty."""
    classifier: Literal["critic_head", "own_model"] = "critic_head"
    group_return: Literal["total", "score"] = "total"
    """R_i: the sum of the shaped token rewards, or the normalised score alone."""
    group_value: Literal["return", "weighted_log_prob"] = "return"
    """What orders the groups: returns (right), or the printed formula's sum(log pi * R) (wrong sign, for study)."""
    weight_floor: float | None = None
    """Lower bound on omega; null: none."""
    min_group_mass: float = 0.02
    """A group with less than this share of the batch (or less than 1 row) is left out of the statistics."""
    balance_coef: float = 0.0
    """Weight of KL(mean_i w_i || uniform) in the classifier's loss."""
    init_scale: float = 1.0
    """alpha: the classifier's rows start from +alpha to -alpha times the reward model's score head; never 0."""
    warmup_updates: int = 50
    """Critic-and-classifier updates before the policy moves and the groups steer it; until then p_high = 1."""
    ramp_updates: int = 50
    """Updates after that over which beta_policy rises linearly from 0."""
    ema_decay: float = 0.9
    """Of the group mean score that decides which group is high."""

    def __post_init__(self) -> None:
        require(self.num_groups >= 1, f"gil.num_groups={self.num_groups} must be at least 1")
        require(
            self.init_scale != 0, "gil.init_scale=0 is a stationary point that the classifier never leaves; use 1.0"
        )
        require(
            self.weight_floor is None or self.weight_floor <= 1,
            f"gil.weight_floor={self.weight_floor} must be at most 1, the mean of the weights",
        )
        require(0 <= self.kl_floor <= 1, f"gil.kl_floor={self.kl_floor} is a share of the penalty, from 0 to 1")
        require(0 <= self.ema_decay < 1, f"gil.ema_decay={self.ema_decay} must lie in [0, 1)")
        require(
            0 <= self.min_group_mass < 1, f"gil.min_group_mass={self.min_group_mass} is a share and must lie in [0, 1)"
        )
        for name in ("invariance_coef", "classifier_coef", "balance_coef", "warmup_updates", "ramp_updates"):
            require(getattr(self, name) >= 0, f"gil.{name}={getattr(self, name)} must not be negative")


def _section(cls: type) -> Any:
    return field(default_factory=cls)


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandConfig:
    """What every command has. `base` names a YAML file that this one changes."""

    run: RunSection = _section(RunSection)
    models: ModelsSection = _section(ModelsSection)
    parallel: ParallelSection = _section(ParallelSection)
    data: DataSection = _section(DataSection)
    batch: BatchSection = _section(BatchSection)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig(CommandConfig):
    """What every training command has."""

    run: TrainingRunSection = _section(TrainingRunSection)
    optimizer: OptimizerSection = _section(OptimizerSection)
    checkpoint: CheckpointSection = _section(CheckpointSection)
    log: LogSection = _section(LogSection)


@dataclass(frozen=True, slots=True, kw_only=True)
class SftConfig(TrainConfig):
    train: TrainSection = _section(TrainSection)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig(TrainConfig):
    train: TrainSection = _section(TrainSection)
    reward: RewardSection = _section(RewardSection)


@dataclass(frozen=True, slots=True, kw_only=True)
class DpoConfig(TrainConfig):
    train: TrainSection = _section(TrainSection)
    dpo: DpoSection = _section(DpoSection)


@dataclass(frozen=True, slots=True, kw_only=True)
class PpoConfig(TrainConfig):
    """`optimizer` is the policy's; batch.global_size rows make a minibatch of the rollout, which has
    ppo.prompts x ppo.responses_per_prompt rows."""

    critic_optimizer: OptimizerSection = _section(OptimizerSection)
    sampling: SamplingSection = _section(SamplingSection)
    ppo: PpoSection = _section(PpoSection)
    gil: GilSection = _section(GilSection)
    alarms: AlarmSection = _section(AlarmSection)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateConfig(CommandConfig):
    sampling: SamplingSection = _section(SamplingSection)
    output: str = MISSING
    """JSON Lines of {"prompt", "response"}, in the order of the prompts; must not exist yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreConfig(CommandConfig):
    output: str = MISSING
    """JSON Lines of {"prompt", "response", "score"}; must not exist yet."""


def data_parallel_size(world_size: int, parallel: ParallelSection) -> int:
    """Raises ConfigError with both numbers where the model's ranks do not divide the processes."""
    model_size = parallel.tensor_size * parallel.pipeline_size
    require(
        world_size % model_size == 0,
        f"{world_size} processes cannot be divided by parallel.tensor_size={parallel.tensor_size} x "
        f"parallel.pipeline_size={parallel.pipeline_size} = {model_size}; start a multiple of {model_size}",
    )
    return world_size // model_size


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """Every size that follows from others."""

    dp_size: int
    local_size: int
    """Rows of one update on one data-parallel rank."""
    micro_size: int
    num_microbatches: int

    @classmethod
    def of(cls, world_size: int, parallel: ParallelSection, batch: BatchSection) -> Self:
        """Raises ConfigError with both numbers where a division is not exact."""
        dp_size = data_parallel_size(world_size, parallel)
        require(
            batch.global_size % (dp_size * batch.micro_size) == 0,
            f"batch.global_size={batch.global_size} cannot be divided by {dp_size} data-parallel ranks x "
            f"batch.micro_size={batch.micro_size} = {dp_size * batch.micro_size}; change one of them",
        )
        local_size = batch.global_size // dp_size
        return cls(
            dp_size=dp_size,
            local_size=local_size,
            micro_size=batch.micro_size,
            num_microbatches=local_size // batch.micro_size,
        )
