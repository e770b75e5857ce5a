"""`bench.py ppo`: whole PPO iterations of this project and of TRL's PPOTrainer, interleaved, on a small random Llama.

Each side is a process of its own that does one iteration when it is its turn, and waits in between: neither is slowed
by the other's objects (TRL calls Python's garbage collector in every iteration) or by what the other changes in a
library. A step is a whole iteration as the side's own loop does it, from one to the next, logging included:
`megatron-gil ppo` as the command runs it, and `PPOTrainer.train`. No end of sequence can be sampled, so that all
responses have their full length.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_gil.demo.tiny_llama import llama_config, llama_weights
from megatron_gil.jsonl import iter_jsonl

WARM_UP = 3  # first iterations, left out
LR, KL_COEF = 1e-6, 0.05
_PROCESSES = multiprocessing.get_context("spawn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The field's mark; the width of the MLP is three times the hidden size, as in the miniature."""

    num_layers: int = 4
    hidden_size: int = 128
    vocab_size: int = 512
    num_rows: int = 32
    prompt_tokens: int = 32
    response_tokens: int = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One iteration: its wall-clock seconds, whole and by part; parts that a side does not tell of are absent."""

    seconds: float
    cpu_seconds: float  # of all threads of the process
    parts: dict[str, float]  # rollout, score, update
    response_tokens: float  # mean of the batch
    num_threads: int


class Turns:
    """A side's end of the agreement: `wait` reports the step since the last call and returns when it is its turn."""

    def __init__(self, pipe: Any, num_threads: int) -> None:
        self._pipe, self._start = pipe, _clocks()
        torch.set_num_threads(num_threads)

    def wait(self, parts: dict[str, float], response_tokens: float) -> None:
        seconds, cpu_seconds = (now - start for now, start in zip(_clocks(), self._start, strict=True))
        step = Step(
            seconds=seconds,
            cpu_seconds=cpu_seconds,
            parts=parts,
            response_tokens=response_tokens,
            num_threads=torch.get_num_threads(),
        )
        self._pipe.send(step)
        self._pipe.recv()
        self._start = _clocks()


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


Work = Callable[[Turns, Path, Sizes, int], None]


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
        rollout.update(seconds=time.perf_counter() - start, tokens=tokens.shape[1] - queries.shape[1])
        return tokens, logits

    class Pace(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            turns.wait({"rollout": rollout["seconds"]}, rollout["tokens"])

    args = PPOConfig(
        output_dir=str(root / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
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
    from megatron_gil.commands import train as commands
    from megatron_gil.training.run.signals import StopSignal

    class Paced(commands.PpoTrainer):
        def iterate(self, iteration: int) -> Any:
            if iteration:
                turns.wait(
                    {part: done[f"time/{part}_s"] for part in ("rollout", "score", "update")}, done["response/tokens"]
                )
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
        sampling=c.SamplingSection(  # TRL's samples have no end either
            max_new_tokens=sizes.response_tokens, min_new_tokens=sizes.response_tokens, micro_size=sizes.num_rows
        ),
        ppo=c.PpoSection(iterations=num_steps, prompts=sizes.num_rows, kl_coef=KL_COEF),
        gil=c.GilSection(**gil),
        checkpoint=c.CheckpointSection(every=num_steps),
    )
    with mock.patch.object(commands, "PpoTrainer", Paced):
        commands.run_command("ppo", config, StopSignal())


@dataclass(frozen=True, slots=True)
class Side:
    name: str
    work: Work
    steps: list[Step] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        return [step.seconds for step in self.steps]

    @property
    def cpu_seconds(self) -> list[float]:
        return [step.cpu_seconds for step in self.steps]


def bench_ppo(*, rounds: int, num_threads: int = 2, sizes: Sizes | None = None) -> str:
    """The table."""
    sizes = sizes or Sizes()
    os.environ |= {"OMP_NUM_THREADS": str(num_threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    os.environ["OMP_WAIT_POLICY"] = "passive"  # threads that spin would measure whatever else runs on the machine
    sides = [Side("TRL 1.12.0", run_trl), Side("PPO", run_plain), Side("PPO-GIL", run_gil)]
    with tempfile.TemporaryDirectory(prefix="bench-ppo-") as place:
        write_inputs(Path(place), sizes)
        pipes, processes = zip(
            *(_start(side.work, Path(place), sizes, rounds, num_threads) for side in sides), strict=True
        )
        try:
            _take_turns(sides, pipes, rounds)
        finally:
            for process in processes:
                process.kill()  # each still waits for a turn that does not come
                process.join()
    for step in (step for side in sides for step in side.steps):
        assert step.response_tokens == sizes.response_tokens, "a response ended early"
        assert step.num_threads == num_threads, "a side changed the number of threads"
    return format_table(sides, sizes, num_threads)


def _start(work: Work, root: Path, sizes: Sizes, rounds: int, num_threads: int) -> tuple[Any, Any]:
    mine, its = _PROCESSES.Pipe()
    last = WARM_UP + rounds + 1  # not reached: it may also save
    process = _PROCESSES.Process(target=_work, args=(work, its, root, sizes, last, num_threads), daemon=True)
    process.start()
    its.close()
    return mine, process


def _work(work: Work, pipe: Any, root: Path, sizes: Sizes, num_steps: int, num_threads: int) -> None:
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        work(Turns(pipe, num_threads), root, sizes, num_steps)


def _take_turns(sides: Sequence[Side], pipes: Sequence[Any], rounds: int) -> None:
    """Every side's first step comes with its start; once all have started, one at a time, in a new order each round."""
    for pipe in pipes:
        pipe.recv()
    order = random.Random(1)
    for number in range(1, WARM_UP + rounds):
        for side, pipe in order.sample(list(zip(sides, pipes, strict=True)), len(sides)):
            pipe.send(None)
            step = pipe.recv()
            if number >= WARM_UP:
                side.steps.append(step)


def format_table(sides: Sequence[Side], sizes: Sizes, num_threads: int) -> str:
    trl = sides[0]
    lines = [
        f"Llama of {sizes.num_layers} layers, hidden {sizes.hidden_size}, MLP {3 * sizes.hidden_size}, 4 heads, 2 "
        f"key-value heads, vocabulary {sizes.vocab_size}, float32; {sizes.num_rows} prompts of "
        f"{sizes.prompt_tokens} tokens + {sizes.response_tokens} new ones, one update; {len(trl.steps)} interleaved "
        f"rounds after {WARM_UP} of warm-up, median (min to max); threads of each: {num_threads}, CPUs: "
        f"{os.cpu_count()}.",
        "",
        "| | seconds a step | times TRL's, of the same round | seconds on a CPU | times TRL's, likewise | rollout | "
        "scoring, shaping | updates |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for side in sides:
        columns = [
            side.name,
            _spread(side.seconds),
            _spread(_ratios(side.seconds, trl.seconds)),
            _spread(side.cpu_seconds),
            _spread(_ratios(side.cpu_seconds, trl.cpu_seconds)),
            *(_part(side, part) for part in ("rollout", "score", "update")),
        ]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def _ratios(mine: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(mine, theirs, strict=True)]


def _part(side: Side, part: str) -> str:
    found = [step.parts[part] for step in side.steps if part in step.parts]
    return f"{statistics.median(found):.2f}" if found else ""


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


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
    policy = llama_weights(config, seed=1)
    reward_model = {name: tensor for name, tensor in policy.items() if name != "lm_head.weight"}
    reward_model["score.weight"] = policy["lm_head.weight"][:1].clone()
    heads = {"num_labels": 1, "architectures": ["LlamaForSequenceClassification"]}
    _write_model(root / "policy", config, policy)
    _write_model(root / "reward_model", config | heads, reward_model)
    draw = random.Random(1)
    words = [f"w{i}" for i in range(sizes.vocab_size - 2)]
    prompts = [" ".join(draw.choices(words, k=sizes.prompt_tokens)) for _ in range(8 * sizes.num_rows)]
    (root / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))


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
