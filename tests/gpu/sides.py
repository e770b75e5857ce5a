"""What one device says: logits, gradients, samples and PPO-GIL iterations of small random Llamas, saved to a file.

    python -m tests.gpu.sides --world DIR --wide DIR --device cuda --dtype float32 --out FILE.pt [--rollout FILE.pt]

Each side of a comparison is a process of its own: the package takes the GPU where there is one, and changes
megatron-core for as long as the process lives where there is none.
"""

from __future__ import annotations

import argparse
from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_gil.config import SamplingSection
from megatron_gil.engine.generation import Generator
from megatron_gil.engine.megatron import DTYPES, TrainableModel
from megatron_gil.engine.protocol import Part
from megatron_gil.parallel.layout import ParallelLayout
from megatron_gil.training.ppo.iteration import PpoTrainer
from megatron_gil.training.supervised.objectives import sft_loss
from megatron_gil.types import Rollout, TokenBatch
from tests.gpu.synchronisations import count_pretended, count_synchronisations
from tests.training.running import (
    ONE,
    GradientModel,
    build,
    full_weights,
    make_trainer,
    parallel,
    ppo_config,
    read_prompts,
    trained_models,
)

WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,  # a size that every attention kernel takes
    "vocab_size": 997,
    "max_position_embeddings": 512,
    "initializer_range": 0.06,
}
"""Of the model for logits and gradients: large enough for a GPU's usual kernels, which the tiny world is not."""
NUM_ROWS, WIDTH = 4, 200
SMOOTH_EPS = 1e-2
"""Adam's eps for iterations that are compared: with the usual 1e-8 its first step is the sign of the gradient, and a
gradient that is zero but for rounding moves its weight by a whole learning rate, either way."""
CAREFUL = SamplingSection(temperature=0.8, top_p=0.9, repetition_penalty=1.2, max_new_tokens=24)

Found = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("world", "wide", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda", "pretended"), required=True)
    parser.add_argument("--dtype", choices=tuple(DTYPES), required=True)
    parser.add_argument("--rollout", type=Path, help="another side's file: score and learn from its samples")
    given = parser.parse_args()
    torch.set_float32_matmul_precision("highest")  # no TF32
    torch.backends.cudnn.allow_tf32 = False
    dtype = DTYPES[given.dtype]
    if given.device == "pretended":
        torch.save(pretended_synchronisations(given.world, dtype), given.out)
        return
    with parallel(ONE) as layout:
        assert layout.device.type == given.device, f"this process runs on {layout.device}"
        rollout = None if given.rollout is None else _read_rollout(given.rollout, layout)
        found = {
            "logits": logits(given.wide, layout, dtype),
            "gradients": gradients(given.wide, layout, dtype),
            "samples": {} if rollout else samples(given.world, layout, dtype),
            "iteration": iteration(given.world, layout, dtype, rollout),
            "updates": {} if rollout else updates(given.world, layout, dtype),
            "synchronisations": {}
            if given.device == "cpu"
            else synchronisations(given.world, layout, dtype, count_synchronisations()),
        }
    torch.save(_on_host(found), given.out)


def logits(wide: Path, layout: ParallelLayout, dtype: torch.dtype) -> Found:
    """Of every column [B, T, V], and what the engine reads from them."""
    model = build(wide, layout, "lm", dtype=dtype)
    batch = _random_rows(layout)
    positions = torch.arange(WIDTH, device=layout.device).expand(NUM_ROWS, -1)
    with torch.no_grad():
        output = model.module.eval()(batch.tokens, positions, None)[..., : model.spec.vocab_size]
    readout = model.evaluate(batch, entropy=True)
    return {"logits": output.float(), "log_probs": readout.log_probs, "entropy": readout.entropy}


def gradients(wide: Path, layout: ParallelLayout, dtype: torch.dtype) -> Found:
    """Of SFT's loss, two rows at a time."""
    model = build(wide, layout, "lm", kind=GradientModel, dtype=dtype, micro_size=2)
    model.update(Part(batch=_random_rows(layout), loss_fn=sft_loss), lr=0.0)
    return model.gradients[0]


def samples(world: Path, layout: ParallelLayout, dtype: torch.dtype) -> Found:
    """Tokens at temperature 1, and under everything that reshapes the distribution."""
    config = ppo_config()
    tokenizer, prompts = read_prompts(config, world, layout)
    model = build(world / "policy", layout, "lm", dtype=dtype)
    found = {}
    for name, section in (("plain", config.sampling), ("reshaped", CAREFUL)):
        rollout = Generator(model, section, tokenizer=tokenizer, seed=3).sample(prompts.batch(0))
        found[name] = rollout.tokens
        found[f"{name} finished"] = rollout.finished
    return found


def iteration(world: Path, layout: ParallelLayout, dtype: torch.dtype, rollout: Rollout | None) -> Found:
    """A first PPO-GIL iteration from the prompts to the gradients of critic and policy; no weight moves."""
    trainer = make_trainer(ppo_config(ppo={"kl_coef": 0.2}), world, layout, kind=GradientModel, dtype=dtype)
    if rollout is not None:
        trainer.sample = lambda prompts: rollout  # type: ignore[method-assign]
    metrics = trainer.iterate(0)
    assert isinstance(trainer.models.policy, GradientModel)
    assert isinstance(trainer.models.critic, GradientModel)
    return {
        "rollout": asdict(trainer.last_rollout),
        "scores": asdict(trainer.last_scores),
        "metrics": _timeless(metrics),
        "policy": trainer.models.policy.gradients[0],
        "critic": trainer.models.critic.gradients[0],
    }


def updates(world: Path, layout: ParallelLayout, dtype: torch.dtype) -> Found:
    """Two iterations that learn: their metrics, and how far each weight moved."""
    trainer = _learner(world, layout, dtype)
    models: dict[str, TrainableModel] = trained_models(trainer)
    before = {role: full_weights(model) for role, model in models.items()}
    metrics = [_timeless(trainer.iterate(number)) for number in range(2)]
    moved = {role: {n: t - before[role][n] for n, t in full_weights(model).items()} for role, model in models.items()}
    return {"metrics": metrics, "moved": moved}


def synchronisations(
    world: Path, layout: ParallelLayout, dtype: torch.dtype, counted: AbstractContextManager[Counter[str]]
) -> Found:
    """Host synchronisations by line, in the second of two iterations: the first one makes what stays."""
    trainer = _learner(world, layout, dtype)
    trainer.iterate(0)
    with counted as counts:
        trainer.iterate(1)
    return dict(counts)


def pretended_synchronisations(world: Path, dtype: torch.dtype) -> Found:
    """The same on a pretended GPU."""
    from tests.pretend.device import pretended_gpus

    with pretended_gpus() as report, parallel(ONE) as layout:
        assert layout.device.type == "cuda", f"this process runs on {layout.device}"
        return {"synchronisations": synchronisations(world, layout, dtype, count_pretended(report))}


def _learner(world: Path, layout: ParallelLayout, dtype: torch.dtype) -> PpoTrainer:
    optimizer = {"eps": SMOOTH_EPS}
    config = ppo_config(optimizer=optimizer, critic_optimizer=optimizer, ppo={"kl_coef": 0.2})
    return make_trainer(config, world, layout, dtype=dtype)


def _random_rows(layout: ParallelLayout) -> TokenBatch:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(1, WIDE["vocab_size"], (NUM_ROWS, WIDTH), generator=generator)
    lengths = torch.tensor([WIDTH, WIDTH - 1, WIDTH // 2, 9])
    columns = torch.arange(WIDTH - 1)
    mask = (columns >= 4) & (columns < lengths[:, None] - 1)
    found = {"tokens": tokens, "lengths": lengths, "response_mask": mask, "row_ids": torch.arange(NUM_ROWS)}
    return TokenBatch(**{name: tensor.to(layout.device) for name, tensor in found.items()})


def _read_rollout(path: Path, layout: ParallelLayout) -> Rollout:
    saved = torch.load(path, weights_only=True)["iteration"]["rollout"]
    return Rollout(**{name: tensor.to(layout.device) for name, tensor in saved.items()})


def _timeless(metrics: Any) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith("time/")}


def _on_host(found: Any) -> Any:
    if isinstance(found, Tensor):
        return found.detach().cpu()
    if isinstance(found, dict):
        return {name: _on_host(part) for name, part in found.items()}
    return [_on_host(part) for part in found] if isinstance(found, list) else found


if __name__ == "__main__":
    main()
