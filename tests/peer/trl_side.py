"""TRL's own trainers on the tiny world: one process, float64, and an optimizer that keeps every gradient it is given.

Nothing of a loss is written here: data preparation, losses, backward passes and PPO's whole iteration are TRL's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

Gradients = dict[str, Tensor]


class RecordingSgd(torch.optim.SGD):
    """Plain gradient descent that keeps the gradients of each step, by Hugging Face's names."""

    def __init__(self, models: dict[str, torch.nn.Module], lr: float) -> None:
        self._named = {
            role: {n: p for n, p in model.named_parameters() if p.requires_grad} for role, model in models.items()
        }
        self.gradients: list[dict[str, Gradients]] = []
        super().__init__([p for named in self._named.values() for p in named.values()], lr=lr)

    def step(self, closure: Any = None) -> Any:
        self.gradients.append(
            {role: {n: _gradient(p) for n, p in named.items()} for role, named in self._named.items()}
        )
        return super().step(closure)


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad.detach().clone()


@dataclass
class Step:
    """One optimizer step of a trainer on rows that come with their answer."""

    loss: float
    gradients: Gradients
    metrics: dict[str, float]
    batches: list[dict[str, Tensor]]  # as TRL collated them


def sft(root: Path, out: Path, model: str, num_rows: int, micro_size: int, **settings: Any) -> Step:
    args = SFTConfig(**_arguments(out, num_rows, micro_size), max_length=None, completion_only_loss=True, **settings)
    return _train_once(SFTTrainer, args, root, load(root / model), "demonstrations", num_rows)


def reward(root: Path, out: Path, num_rows: int, micro_size: int, **settings: Any) -> Step:
    args = RewardConfig(**_arguments(out, num_rows, micro_size), max_length=None, **settings)
    return _train_once(RewardTrainer, args, root, load(root / "reward_model"), "preferences", num_rows)


def dpo(root: Path, out: Path, num_rows: int, micro_size: int, **settings: Any) -> Step:
    args = DPOConfig(**_arguments(out, num_rows, micro_size), max_length=None, **settings)
    ref_model = load(root / "other")
    return _train_once(DPOTrainer, args, root, load(root / "policy"), "preferences", num_rows, ref_model=ref_model)


def load(path: Path) -> Any:
    """The world's model in float64; transformers still computes its norms in float32."""
    architecture = json.loads((path / "config.json").read_text())["architectures"][0]
    kind = {"LlamaForCausalLM": LlamaForCausalLM, "LlamaForSequenceClassification": LlamaForSequenceClassification}
    return kind[architecture].from_pretrained(path, dtype=torch.float64)


def read_tokenizer(root: Path) -> Any:
    """The two settings are in tokenizer.model, but transformers reads the pieces of that file alone."""
    return AutoTokenizer.from_pretrained(root / "policy", add_bos_token=True, add_prefix_space=False)


def _rows(root: Path, name: str, num_rows: int) -> Dataset:
    lines = (root / f"{name}.jsonl").read_text().splitlines()[:num_rows]
    return Dataset.from_list([json.loads(line) for line in lines])


def _arguments(out: Path, num_rows: int, micro_size: int) -> dict[str, Any]:
    return {
        "output_dir": str(out),
        "per_device_train_batch_size": micro_size,
        "gradient_accumulation_steps": num_rows // micro_size,
        "gradient_checkpointing": False,
        "max_grad_norm": 0.0,  # no clipping
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "dataloader_pin_memory": False,
    }


def _train_once(trainer_class: Any, args: Any, root: Path, model: Any, rows: str, num_rows: int, **models: Any) -> Step:
    args.max_steps = 1
    optimizer = RecordingSgd({"model": model}, lr=0.0)
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=_rows(root, rows, num_rows),
        processing_class=read_tokenizer(root),
        optimizers=(optimizer, None),
        **models,
    )
    losses: list[Tensor] = []
    batches: list[dict[str, Tensor]] = []
    own_step = trainer.training_step

    def training_step(model: Any, inputs: dict[str, Any], *others: Any) -> Tensor:
        batches.append({name: value.clone() for name, value in inputs.items() if isinstance(value, Tensor)})
        losses.append(own_step(model, inputs, *others))
        return losses[-1]

    trainer.training_step = training_step
    trainer.train()
    (gradients,) = optimizer.gradients
    return Step(
        loss=float(torch.stack(losses).sum()),
        gradients=gradients["model"],
        metrics=trainer.state.log_history[0],
        batches=batches,
    )


@dataclass
class Whitening:
    """A call of TRL's masked_whiten."""

    x: Tensor
    mask: Tensor
    shift_mean: bool
    result: Tensor


@dataclass
class PpoRun:
    """One iteration of TRL's PPO: what it sampled, what it made of it, and the gradients of each update."""

    gradients: list[dict[str, Gradients]]  # role -> name -> gradient, per update
    losses: list[float] = field(default_factory=list)  # policy + vf_coef * value, per update
    metrics: dict[str, float] = field(default_factory=dict)
    whitened: list[Whitening] = field(default_factory=list)
    tokens: Tensor = field(init=False)  # [B, P + R]: left-padded prompt, response, padding after its end
    num_prompt_columns: int = 0


def ppo(root: Path, out: Path, num_rows: int, *, seed: int, lr: float, **settings: Any) -> PpoRun:
    """`PPOTrainer.train` for one iteration whose every update is of the whole batch.

    The logits of generation, which transformers rounds to float32, are replaced by those of TRL's own forward pass on
    what was generated: with a rounded pi_old, pi / pi_old would be no nearer to this project's than 1e-6.
    """
    arguments = {**_arguments(out, num_rows, num_rows), "seed": seed, "total_episodes": num_rows, **settings}
    args = PPOConfig(**arguments, num_mini_batches=1, num_sample_generations=0)
    tokenizer = read_tokenizer(root)
    policy, value_model = load(root / "policy"), load(root / "reward_model")
    optimizer = RecordingSgd({"policy": policy, "critic": value_model}, lr=lr)
    prompts = _rows(root, "prompts", num_rows)["prompt"]
    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=policy,
        ref_model=load(root / "other"),
        reward_model=load(root / "reward_model"),
        value_model=value_model,
        train_dataset=Dataset.from_list([{"input_ids": tokenizer(prompt)["input_ids"]} for prompt in prompts]),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
    )
    run = PpoRun(optimizer.gradients)
    own_generation, own_whitening = ppo_trainer.batch_generation, ppo_trainer.masked_whiten
    own_backward = trainer.accelerator.backward

    def batch_generation(model: Any, queries: Tensor, size: int, pad_id: int, config: Any) -> tuple[Tensor, Tensor]:
        run.num_prompt_columns = queries.shape[1]
        run.tokens, _ = own_generation(model, queries, size, pad_id, config)
        with torch.no_grad():
            output: Any = ppo_trainer.forward(model, run.tokens, pad_id)
        # generation's own come divided by the temperature
        return run.tokens, output.logits[:, queries.shape[1] - 1 : -1] / (args.temperature + 1e-7)

    def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
        result = own_whitening(values, mask, shift_mean)
        run.whitened.append(Whitening(values.clone(), mask, shift_mean, result.clone()))
        return result

    def backward(loss: Tensor, **kwargs: Any) -> None:
        run.losses.append(float(loss.detach()))
        own_backward(loss, **kwargs)

    trainer.accelerator.backward = backward
    with mock.patch.multiple(ppo_trainer, batch_generation=batch_generation, masked_whiten=masked_whiten):
        trainer.train()
    run.metrics = trainer.state.log_history[0]
    return run
