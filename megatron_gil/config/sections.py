"""The sections of a config. Every key is explained by the string under it; docs/config.md and --help-config print them.

Sizes that follow from others (data-parallel size, microbatches per update, ...) are never keys: `BatchPlan` computes
them.
"""

from __future__ import annotations

import re
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
    """Save and exit with code 75 once the process has run this long; null: no limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRunSection(RunSection):
    dir: str = path(MISSING)
    """Run directory: config.yaml, metrics.jsonl, TensorBoard events, samples.jsonl, checkpoints/."""
    resume: bool = True
    """Continue from the newest checkpoint where the run directory holds a run; false refuses such a directory."""
    max_skipped_updates: int = integer(10)
    """Stop after this many updates skipped for a NaN or Inf loss or gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRunSection(TrainingRunSection):
    dir: str | None = path()  # type: ignore[assignment]
    """Not used: the file of the planned run may name a run directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelsSection(Section):
    """Each path is a Hugging Face directory, a `policy/`, `critic/`, ... directory inside one of our checkpoints (which
    has the same format), or a name on the Hugging Face Hub, OWNER/NAME or OWNER/NAME@REVISION."""

    key: ClassVar[str] = "models"

    policy: str | None = path()
    """The model trained by sft, dpo and ppo, or used by generate."""
    ref_policy: str | None = path()
    """Frozen reference of dpo and ppo; null: a copy of the policy as it starts."""
    reward_model: str | None = path()
    """Where reward starts its training (a language model will do); the trained one that ppo, score and
    evaluate-reward read."""
    critic: str | None = path()
    """Where ppo's critic starts; null: a copy of the reward model."""
    reward_tokenizer: Literal["same", "own"] = "same"
    """same: ppo's reward model has the policy's tokenizer and reads its tokens. own: it has another and reads prompts
    and responses as text; critic and classifier read the policy's tokens all the same."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Weights and activations; bfloat16 keeps float32 master weights in the optimizer."""
    layer: Literal["auto", "local", "transformer_engine"] = "auto"
    """Transformer layer: auto takes Transformer Engine where it imports and the device is a GPU."""
    fusions: Literal["auto", "off"] = "auto"
    """On a GPU, auto takes megatron-core's fused kernels, each where its library imports: SwiGLU (Triton), gradient
    accumulation (Apex). The first lines of a run say which."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Which activations are recomputed in the backward pass, to save memory: none, those of attention, or all."""
    offload: Literal["none", "frozen", "rollout", "all"] = "none"
    """What waits in host memory, pinned for a GPU, while nobody reads it. frozen: weights of reference and reward
    model. rollout: these and, while ppo samples and scores, the optimizers' states. all: these and, but in its own
    steps, each optimizer's state. With rollout and all, gradients have memory in their own model's updates alone. The
    numbers stay the same to the last bit (docs/planning.md)."""


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
    overlap: Literal["auto", "on", "off"] = "auto"
    """Sum gradients over data-parallel ranks while the backward pass still runs and, with distributed_optimizer, gather
    updated weights while the next forward pass does. auto: on GPUs, where there are several data-parallel ranks."""
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
    """JSON Lines or Parquet file, a directory of them or a pattern (part-*.parquet): prompts, demonstrations or
    preferences, as the command needs. On the Hugging Face Hub: OWNER/NAME:FILES or OWNER/NAME@REVISION:FILES."""
    eval: str | None = path()
    """The same, held out; null: no evaluation."""
    pretrain: str | None = path()
    """{"text"} or demonstrations, for ppo's pre-training-loss mix (ppo.ptx_coef)."""
    tokenizer: str | None = path()
    """Directory with tokenizer.model or tokenizer.json; null: the policy's (or reward model's) own directory."""
    max_prompt_tokens: int = integer(512, least=1)
    """A longer prompt loses its oldest turns or tokens. The first lines of a run say how many prompts are longer; the
    metric data/truncated_fraction says it of each batch."""
    max_tokens: int = integer(1024, least=1)
    """Prompt and response together, in sft, reward and dpo; a longer response is cut at its end, which is said as
    above."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSection(Section):
    key: ClassVar[str] = "batch"

    global_size: int = integer(32, least=1)
    """Rows (pairs for reward and dpo) of one update, over all ranks; in ppo the rows of one minibatch of the rollout,
    which has ppo.prompts x ppo.responses_per_prompt rows."""
    micro_size: int = integer(8, least=1)
    """Rows of one forward pass on one rank: of an update's rows, those of like length together. No layer computes
    padding; attention goes as far as the longest row of the pass."""
    micro_tokens: int | None = integer(None, least=1)
    """Tokens of one forward pass on one rank, in the place of micro_size: as many rows go together as have at most this
    many; a longer row goes by itself. Passes of like size need like memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSection(Section):
    key: ClassVar[str] = "optimizer"

    lr: float = real(1e-5, least=0)
    """Highest learning rate, which the schedule reaches after the warm-up."""
    min_lr: float = real(0.0, least=0)
    """Learning rate at the end of the schedule."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Decay after the warm-up, over the run's updates."""
    warmup_fraction: float = real(0.1, least=0, most=1)
    """Share of the updates over which the rate rises from 0."""
    beta1: float = real(0.9, least=0, below=1)
    """Adam's decay of the mean of gradients."""
    beta2: float = real(0.95, least=0, below=1)
    """Adam's decay of the mean of squared gradients."""
    eps: float = real(1e-8, above=0)
    """Adam's addition to the denominator."""
    weight_decay: float = real(0.0, least=0)
    """Weight decay of matrices, not of norms; decoupled from the gradient (AdamW)."""
    clip_grad: float = real(1.0, least=0)
    """Bound on the global gradient norm; 0 switches clipping off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyOptimizerSection(OptimizerSection):
    """In ppo these keys are the policy's; the critic has critic_optimizer."""

    lr: float = real(1e-6, least=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticOptimizerSection(OptimizerSection):
    """The optimizer of ppo's critic, and of the group classifier."""

    key: ClassVar[str] = "critic_optimizer"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSection(Section):
    """The log-probs that PPO uses take the temperature into account, but not top_k, top_p, repetition_penalty and
    min_new_tokens. How far they are from the distribution that was sampled is logged as policy/sampling_mismatch."""

    key: ClassVar[str] = "sampling"

    temperature: float = real(1.0, least=0)
    """0 takes the likeliest token each time; PPO then uses the log-probs of temperature 1."""
    top_k: int = integer(0)
    """Only this many of the likeliest tokens are drawn from; 0: all."""
    top_p: float = real(1.0, above=0, most=1)
    """Only the likeliest tokens that together have this probability are drawn from; 1: all."""
    repetition_penalty: float = real(1.0, above=0)
    """Divides positive and multiplies negative logits of tokens already in the row (CTRL, arXiv 1909.05858)."""
    max_new_tokens: int = integer(128, least=1)
    """A response ends here at the latest."""
    min_new_tokens: int = integer(1, least=1)
    """No end-of-sequence token before this many."""
    micro_size: int | None = integer(None, least=1)
    """Slots: so many rows are decoded together on one rank, and when one ends the next prompt takes its slot. Sets the
    size of the key-value cache. null: 64; on a GPU a power of two up to 256, as many as fit in half of the free
    memory."""
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
    """Iterations between checkpoints; one is also saved at the end and on a signal."""
    keep_last: int = integer(2, least=1)
    """How many of the newest checkpoints stay."""
    keep_every: int = integer(0)
    """Checkpoints of every n-th iteration stay for ever; 0: none does."""
    keep_best: str | None = None
    """A metric of the evaluations (log.eval_every): the checkpoint where it was highest stays, as checkpoints/best too,
    and is saved at once. With a minus before it, lowest: eval/reward/score_mean, -eval/sft/loss."""
    on_error: Literal["stop", "continue"] = "stop"
    """When a checkpoint cannot be written (disk full, read-only, gone): stop with exit code 1, or go on without it. The
    last good one is kept either way, and a run that cannot save its last iteration fails."""
    background: Literal["auto", True, False] = "auto"
    """Write in a thread while training goes on: the weights are copied to host memory, and the checkpoint counts from
    the iteration after its files are complete. A stop waits for it. auto: where at the first checkpoint every host has
    twice the memory free that the copies of its ranks take."""

    def _check(self) -> None:
        require(
            self.keep_best is None or self.keep_best.removeprefix("-").startswith("eval/"),
            f"checkpoint.keep_best={self.keep_best} must name a metric under eval/, such as eval/reward/score_mean",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSection(Section):
    key: ClassVar[str] = "log"

    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""
    wandb: str | None = None
    """A project in Weights & Biases, PROJECT or ENTITY/PROJECT, that gets what TensorBoard gets; needs
    the package of that name. A resumed run goes on there as the same run. null: none."""
    samples_every: int = integer(10)
    """Iterations between rows of samples.jsonl; 0: none."""
    samples: int = integer(4)
    """Rows written each time."""
    eval_every: int = integer(0)
    """Iterations between evaluations on data.eval; 0: at the end only."""

    def _check(self) -> None:
        require(
            self.wandb is None or re.fullmatch(r"([^/\\#?%:]+/)?[^/\\#?%:]+", self.wandb) is not None,
            f"log.wandb={self.wandb} must be PROJECT or ENTITY/PROJECT, without any of \\ # ? % :",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSection(Section):
    """How long sft, reward and dpo train."""

    key: ClassVar[str] = "train"

    epochs: int = integer(1, least=1)
    """Passes over data.train."""
    updates: int | None = integer(None, least=1)
    """A number of updates in the place of epochs; null: epochs count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSection(Section):
    key: ClassVar[str] = "reward"

    center_coef: float = real(0.01, least=0)
    """Weight of (score_chosen + score_rejected)^2, which keeps the mean score near 0. The group classifier starts from
    the score head and first splits the rows at 0. 0 switches off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardFunctionSection(Section):
    """What gives responses their scores beside models.reward_model, or in its place: the score is model_weight times
    the reward model's plus weight times the function's (docs/rewards.md)."""

    key: ClassVar[str] = "reward"

    function: str | None = None
    """package.module:name or FILE.py:name of a Python function that takes the lists prompts and responses and, under
    their names, the other fields of the rows of the data, and returns one number a row; null: none. Without a
    models.reward_model it scores alone, and critic and classifier start from the policy."""
    weight: float = real(1.0)
    """Of the function's numbers."""
    model_weight: float = real(1.0)
    """Of the reward model's scores."""
    timeout_s: float = real(120.0, above=0)
    """A call of the function that takes longer ends the run; below parallel.timeout_s, after which the other ranks give
    up."""
    threads: int = integer(1, least=1, most=1024)
    """The rows of a rank are cut into at most so many calls, which run at the same time in threads: for a function that
    waits, such as for a server. 1: one call with all rows of the rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DpoSection(Section):
    key: ClassVar[str] = "dpo"

    beta: float = real(0.1, above=0)
    """Strength of the implicit KL constraint (arXiv 2305.18290, eq. 7)."""
    label_smoothing: float = real(0.0, least=0, below=0.5)
    """Probability that a preference label is flipped."""
