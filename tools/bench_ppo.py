"""`bench.py ppo`: whole PPO iterations of this project and of TRL's PPOTrainer, in turns, on a small random Llama.

A step is a whole iteration as the side's own loop does it, from one to the next, logging included: `megatron-gil ppo`
as the command runs it, and `PPOTrainer.train` (which calls Python's garbage collector in every iteration). Either no
end of sequence can be sampled, so that all responses have their full length; or (`ragged`) the model ends them itself:
lengths are geometric with about a third of the limit as their mean, on both sides alike, for both have its weights.
"""

from __future__ import annotations

import json
import math
import os
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from bench_turns import WARM_UP, Side, Turns, ratios, spread, take_turns
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_gil.demo.tiny_llama import llama_config, llama_weights
from megatron_gil.jsonl import iter_jsonl

ON_THE_CPU: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
"""Settings of any of TRL's trainers: float32 on the CPU, without what would only slow it here."""
LR, KL_COEF = 1e-6, 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The field's mark; the width of the MLP is three times the hidden size, as in the miniature."""

    num_layers: int = 4
    hidden_size: int = 128
    vocab_size: int = 512
    num_rows: int = 32
    prompt_tokens: int = 32
    response_tokens: int = 64
    ragged: bool = False
    """Responses end by themselves."""
    max_positions: int = 128


def run_trl(turns: Turns, root: Path, sizes: Sizes, num_steps: int) -> None:
    """TRL's PPOTrainer: one minibatch, one epoch, one optimizer for policy and value model."""
    os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "CI": "1"}
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    rollout: dict[str, float] = {}
    own_generation = ppo_trainer.batch_generation

    def batch_generation(model: Any, queries: Any, *others: Any) -> Any:
        start = time.perf_counter()
        tokens, logits = own_generation(model, queries, *others)
        rollout.update(rollout=time.perf_counter() - start)
        # An end counts as part of its response, as it does on our side.
        ends = (tokens[:, queries.shape[1] :] == tokenizer.eos_token_id).cumsum(1)
        rollout.update(response_tokens=float((ends.cumsum(1) <= 1).sum(1).float().mean()))
        return tokens, logits

    class Pace(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            turns.wait(dict(rollout))

    args = PPOConfig(
        output_dir=str(root / "trl"),
        **ON_THE_CPU,
        num_sample_generations=0,
        stop_token="eos",
        per_device_train_batch_size=sizes.num_rows,
        gradient_accumulation_steps=1,
        total_episodes=num_steps * sizes.num_rows,
        num_ppo_epochs=1,
        response_length=sizes.response_tokens,
        temperature=1.0,
        learning_rate=LR,
        kl_coef=KL_COEF,
    )
    tokenizer = AutoTokenizer.from_pretrained(root / "policy")
    prompts = [row["prompt"] for _, row in iter_jsonl(root / "prompts.jsonl")]
    rows = Dataset.from_list([{"input_ids": tokenizer(prompt)["input_ids"]} for prompt in prompts])
    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=LlamaForCausalLM.from_pretrained(root / "policy", dtype=torch.float32),
        ref_model=LlamaForCausalLM.from_pretrained(root / "policy", dtype=torch.float32),
        reward_model=LlamaForSequenceClassification.from_pretrained(root / "reward_model", dtype=torch.float32),
        value_model=LlamaForSequenceClassification.from_pretrained(root / "reward_model", dtype=torch.float32),
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=[Pace()],
    )
    with mock.patch.object(ppo_trainer, "batch_generation", batch_generation):
        trainer.train()


def run_plain(turns: Turns, root: Path, sizes: Sizes, num_steps: int) -> None:
    _run_command(turns, root, sizes, num_steps, "plain", {"num_groups": 1})


def run_gil(turns: Turns, root: Path, sizes: Sizes, num_steps: int) -> None:
    """Two groups inferred by a head of the critic, and both models updated from the first step."""
    _run_command(turns, root, sizes, num_steps, "gil", {"num_groups": 2, "warmup_updates": 0, "ramp_updates": 0})


def _run_command(turns: Turns, root: Path, sizes: Sizes, num_steps: int, name: str, gil: dict[str, Any]) -> None:
    """`megatron-gil ppo`, whole; only its iterations wait for their turn."""
    from megatron_gil import config as c
    from megatron_gil.commands import ppo as parts
    from megatron_gil.commands.train import run_command
    from megatron_gil.training.run.signals import StopSignal

    class Paced(parts.PpoTrainer):
        def iterate(self, iteration: int) -> Any:
            if iteration:
                seconds = {part: done[f"time/{part}_s"] for part in ("rollout", "score", "update")}
                turns.wait({**seconds, "response_tokens": done["response/tokens"]})
            done.update(super().iterate(iteration))
            return dict(done)

    done: dict[str, float] = {}
    optimizer = c.OptimizerSection(lr=LR)
    config = c.PpoConfig(
        run=c.TrainingRunSection(dir=str(root / name)),
        models=c.ModelsSection(policy=str(root / "policy"), reward_model=str(root / "reward_model")),
        data=c.DataSection(train=str(root / "prompts.jsonl"), max_prompt_tokens=sizes.prompt_tokens),
        batch=c.BatchSection(global_size=sizes.num_rows, micro_size=sizes.num_rows),
        optimizer=optimizer,
        critic_optimizer=optimizer,
        sampling=c.SamplingSection(
            max_new_tokens=sizes.response_tokens,
            min_new_tokens=1 if sizes.ragged else sizes.response_tokens,  # TRL's whole samples have no end either
            micro_size=sizes.num_rows,
        ),
        ppo=c.PpoSection(iterations=num_steps, prompts=sizes.num_rows, kl_coef=KL_COEF),
        gil=c.GilSection(**gil),
        checkpoint=c.CheckpointSection(every=num_steps),
    )
    with mock.patch.object(parts, "PpoTrainer", Paced):
        run_command("ppo", config, StopSignal())


def bench_ppo(*, rounds: int, num_threads: int = 2, sizes: Sizes | None = None, json_file: Path | None = None) -> str:
    """The table; the figures of every round go to json_file."""
    sizes = sizes or Sizes()
    with tempfile.TemporaryDirectory(prefix="bench-ppo-") as place:
        root = Path(place)
        write_inputs(root, sizes)
        works = {"TRL 1.12.0": run_trl, "PPO": run_plain, "PPO-GIL": run_gil}
        sides = [Side(name, work, (root, sizes)) for name, work in works.items()]
        take_turns(sides, rounds=rounds, num_threads=num_threads)
    if not sizes.ragged:
        for step in (step for side in sides for step in side.steps):
            # TRL may sample the end by chance, and computes all columns all the same.
            assert step.notes["response_tokens"] > 0.9 * sizes.response_tokens, "responses ended early"
    if json_file is not None:
        json_file.write_text(json.dumps({side.name: [asdict(step) for step in side.steps] for side in sides}, indent=1))
    return format_table(sides, sizes, num_threads)


def format_table(sides: Sequence[Side], sizes: Sizes, num_threads: int) -> str:
    trl = sides[0]
    length = f"up to {sizes.response_tokens}" if sizes.ragged else str(sizes.response_tokens)
    lines = [
        f"Llama of {sizes.num_layers} layers, hidden {sizes.hidden_size}, MLP {3 * sizes.hidden_size}, 4 heads, 2 "
        f"key-value heads, vocabulary {sizes.vocab_size}, float32; {sizes.num_rows} prompts of "
        f"{sizes.prompt_tokens} tokens + {length} new ones, one update; {len(trl.steps)} interleaved "
        f"rounds after {WARM_UP} of warm-up, median (min to max); threads of each: {num_threads}, CPUs: "
        f"{os.cpu_count()}.",
        "",
        "| | seconds a step | times TRL's, of the same round | seconds on a CPU | times TRL's, likewise | rollout | "
        "scoring, shaping | updates | response tokens |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for side in sides:
        columns = [
            side.name,
            spread(side.seconds),
            spread(ratios(side.seconds, trl.seconds)),
            spread(side.cpu_seconds),
            spread(ratios(side.cpu_seconds, trl.cpu_seconds)),
            *(_part(side, part) for part in ("rollout", "score", "update")),
            f"{side.note('response_tokens'):.0f}",
        ]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def _part(side: Side, part: str) -> str:
    found = side.note(part)
    return "" if found is None else f"{found:.2f}"


def write_inputs(root: Path, sizes: Sizes) -> None:
    """policy/ and reward_model/, which differ in their heads alone, and prompts.jsonl, all of the same length.

    The last two ids end and pad; no prompt holds them.
    """
    config = llama_config(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        ffn_size=3 * sizes.hidden_size,
        num_layers=sizes.num_layers,
    )
    config |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config |= {"max_position_embeddings": sizes.max_positions}
    policy = llama_weights(config, seed=1)
    if sizes.ragged:
        end_by_themselves(policy, end_id=sizes.vocab_size - 2, mean_length=sizes.response_tokens / 3)
    reward_model = {name: tensor for name, tensor in policy.items() if name != "lm_head.weight"}
    reward_model["score.weight"] = policy["lm_head.weight"][:1].clone()
    heads = {"num_labels": 1, "architectures": ["LlamaForSequenceClassification"]}
    _write_model(root / "policy", config, policy)
    _write_model(root / "reward_model", config | heads, reward_model)
    draw = random.Random(1)
    words = [f"w{i}" for i in range(sizes.vocab_size - 2)]
    prompts = [" ".join(draw.choices(words, k=sizes.prompt_tokens)) for _ in range(8 * sizes.num_rows)]
    (root / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))


def end_by_themselves(weights: dict[str, torch.Tensor], *, end_id: int, mean_length: float) -> None:
    """Make the end of a response about as likely everywhere as one token in `mean_length`.

    A Llama has no bias. So the first of the hidden dimensions is the same number for every token, no layer writes into
    it, and only the end's row of the output layer reads it. The number is so large that the last norm leaves about the
    square root of the hidden size of it.
    """
    embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    embedding[:, 0] = 32.0
    for name, tensor in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor[0] = 0.0
    head[:, 0] = 0.0
    head[end_id] = 0.0
    head[end_id, 0] = math.log(len(head) / mean_length) / embedding.shape[1] ** 0.5


def _write_model(directory: Path, config: dict[str, object], weights: dict[str, torch.Tensor]) -> None:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    size = int(str(config["vocab_size"]))
    names = [*(f"w{i}" for i in range(size - 2)), "</s>", "<pad>"]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer.save(str(directory / "tokenizer.json"))
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "<pad>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(special))
