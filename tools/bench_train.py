"""`bench.py train`: updates of this project against transformers with torch's AdamW, and against TRL's trainers.

Every row of the table is two sides that take turns on the same rows, in the same order (bench_turns.py).

- engine: forward, backward and AdamW. Ours is `TrainableModel.update` in its default microbatches of 8 rows; theirs a
  plain training loop over LlamaForCausalLM: the batch padded to its longest row, an attention mask, labels on response
  tokens alone.
- one-pass: the same, but ours takes the whole batch at once too.
- sft, reward, dpo: whole steps from one to the next, logging included. Ours is the command as it runs; theirs TRL's
  trainer as its users have it, but for what would only slow it here: it has no activation checkpointing, which is its
  default. It reads rows in the order of the file. Its microbatches have 8 rows, its default.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from bench_memory import peak_bytes
from bench_ppo import ON_THE_CPU, Sizes, write_inputs
from bench_rows import MAX_PROMPT_TOKENS, MAX_TOKENS, Lengths, TextRow, draw_batches, write_rows
from bench_turns import WARM_UP, Side, Step, Turns, ratios, spread, take_turns

SEED, LR = 1, 1e-5
TRL_ROWS = 8
"""Rows of a microbatch: the default of TRL's per_device_train_batch_size."""
ENGINE_PARTS = ("engine", "one-pass")
PARTS = (*ENGINE_PARTS, "sft", "reward", "dpo")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    hidden_size: int
    num_layers: int
    vocab_size: int
    num_rows: int
    """Of an update; pairs are half as many."""

    def __str__(self) -> str:
        return f"{self.hidden_size} x {self.num_layers}, {self.vocab_size:,}"


SHAPES = {
    "small": Shape(hidden_size=128, num_layers=4, vocab_size=512, num_rows=32),
    "middle": Shape(hidden_size=256, num_layers=4, vocab_size=4096, num_rows=32),
    "wide": Shape(hidden_size=256, num_layers=4, vocab_size=32000, num_rows=16),
    "tiny": Shape(hidden_size=32, num_layers=2, vocab_size=64, num_rows=8),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What both sides of a case read."""

    root: Path
    """policy/, reward_model/, and the files of write_rows."""
    part: str
    batches: list[list[TextRow]]
    vocab_size: int

    @property
    def end_id(self) -> int:
        return self.vocab_size - 2

    @property
    def pad_id(self) -> int:
        return self.vocab_size - 1

    @property
    def num_rows(self) -> int:
        return len(self.batches[0])


@dataclass(slots=True, kw_only=True)
class Case:
    """One row of the table."""

    part: str
    shape: str
    lengths: Lengths
    num_rows: int
    ours: Side = field(repr=False)
    theirs: Side = field(repr=False)


class TokenCount:
    """Counts the tokens that models compute, and those among them that are padding."""

    def __init__(self, pad_id: int) -> None:
        self.computed, self._padding, self._pad_id = 0, 0, pad_id

    @contextmanager
    def attached(self) -> Iterator[None]:
        own = torch.nn.functional.embedding

        def embedding(ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            self.computed += ids.numel()
            # We pad up to a multiple of the tensor-parallel size with 0, which no row holds.
            self._padding += int(((ids == self._pad_id) | (ids == 0)).sum())
            return own(ids, *args, **kwargs)

        with mock.patch.object(torch.nn.functional, "embedding", embedding):
            yield

    def take(self) -> dict[str, float]:
        """Since the last call."""
        found = {"padding": self._padding / max(self.computed, 1)}
        self.computed = self._padding = 0
        return found


def run_engine(turns: Turns, place: Place, num_steps: int) -> None:
    """`TrainableModel.update` on the policy of an sft run."""
    from megatron_gil.engine.protocol import Part
    from megatron_gil.models.families import read_spec
    from megatron_gil.models.uses import model_uses
    from megatron_gil.parallel.layout import start_parallel
    from megatron_gil.training.build import build_model
    from megatron_gil.training.supervised.objectives import sft_loss

    config = _our_config(place)
    layout = start_parallel(config.parallel, seed=SEED)
    [use] = model_uses(config)
    model: Any = build_model(config, use, read_spec(place.root / "policy"), layout)
    batches = [_token_batch(rows, place) for rows in place.batches]

    def step(number: int) -> None:
        model.update(Part(batch=batches[number], loss_fn=sft_loss), lr=LR)

    _take_steps(turns, step, place, num_steps)


def run_transformers(turns: Turns, place: Place, num_steps: int) -> None:
    from transformers import LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model: Any = LlamaForCausalLM.from_pretrained(place.root / "policy", dtype=torch.float32).train()
    # What transformers' own Trainer takes, and it is the fastest of torch's on the CPU.
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    batches = []
    for rows in place.batches:
        ours = _token_batch(rows, place)
        mask = torch.arange(ours.tokens.shape[1]) < ours.lengths[:, None]
        labels = ours.tokens.clone()
        labels[:, 1:][~ours.response_mask] = -100
        labels[:, 0] = -100
        batches.append({"input_ids": ours.tokens, "attention_mask": mask.long(), "labels": labels})

    def step(number: int) -> None:
        model(**batches[number], use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    _take_steps(turns, step, place, num_steps)


def _take_steps(turns: Turns, step: Callable[[int], None], place: Place, num_steps: int) -> None:
    count = TokenCount(place.pad_id)
    with count.attached():
        asked = False
        for number in range(num_steps):
            if asked:
                peak = peak_bytes(lambda number=number: step(number))
                turns.wait({**count.take(), "peak_bytes": peak})
                return
            step(number)
            asked = turns.wait(count.take())


def _token_batch(rows: Sequence[TextRow], place: Place) -> Any:
    """Prompt, chosen response and an end of sequence, padded on the right to the longest."""
    from megatron_gil.types import TokenBatch

    texts = [[*row.prompt, *row.chosen, place.end_id] for row in rows]
    longest = max(map(len, texts))
    lengths = torch.tensor([len(text) for text in texts])
    prompts = torch.tensor([len(row.prompt) for row in rows])
    columns = torch.arange(longest - 1)
    return TokenBatch(
        tokens=torch.tensor([text + [place.pad_id] * (longest - len(text)) for text in texts]),
        lengths=lengths,
        response_mask=(columns >= prompts[:, None] - 1) & (columns < lengths[:, None] - 1),
        row_ids=torch.arange(len(rows)),
    )


def run_ours(turns: Turns, place: Place, num_steps: int) -> None:
    """`megatron-gil sft`, `reward` or `dpo`, whole; only its iterations wait for their turn."""
    from megatron_gil.commands import train as commands
    from megatron_gil.training.run.signals import StopSignal

    count = TokenCount(place.pad_id)
    name = "RewardTrainer" if place.part == "reward" else "SupervisedTrainer"
    kind: Any = getattr(commands, name)

    class Paced(kind):
        def iterate(self, iteration: int) -> Any:
            if iteration:
                turns.wait(count.take())
            return super().iterate(iteration)

    # _supervised has its kind as a default argument; the real class would be taken in the place of a patched name.
    def supervised(*args: Any, **kwargs: Any) -> Any:
        return own_supervised(*args, **{**kwargs, "kind": Paced})

    own_supervised = commands._supervised
    with mock.patch.object(commands, "_supervised", supervised), count.attached():
        commands.run_command(place.part, _our_config(place), StopSignal())


def _our_config(place: Place) -> Any:
    from megatron_gil import config as c

    kinds = {"sft": c.SftConfig, "reward": c.RewardConfig, "dpo": c.DpoConfig}
    files = {"sft": "demonstrations.jsonl", "reward": "preferences.jsonl", "dpo": "preferences.jsonl"}
    part = "sft" if place.part in ENGINE_PARTS else place.part
    micro_size = place.num_rows if place.part == "one-pass" else min(TRL_ROWS, place.num_rows)
    path = str(place.root / "policy")
    models = c.ModelsSection(reward_model=path) if part == "reward" else c.ModelsSection(policy=path)
    extra = {"reward": c.RewardSection(center_coef=0.0)} if part == "reward" else {}
    return kinds[part](
        run=c.TrainingRunSection(dir=str(place.root / "run"), seed=SEED),
        models=models,
        data=c.DataSection(
            train=str(place.root / files[part]), max_prompt_tokens=MAX_PROMPT_TOKENS, max_tokens=MAX_TOKENS
        ),
        batch=c.BatchSection(global_size=place.num_rows, micro_size=micro_size),
        optimizer=c.OptimizerSection(lr=LR, schedule="constant", warmup_fraction=0.0),
        checkpoint=c.CheckpointSection(every=10_000),
        train=c.TrainSection(updates=len(place.batches)),
        **extra,
    )


def run_trl(turns: Turns, place: Place, num_steps: int) -> None:
    """SFTTrainer, RewardTrainer or DPOTrainer."""
    import trl
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification, TrainerCallback

    count = TokenCount(place.pad_id)

    class Pace(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            turns.wait(count.take())

    names = {"sft": ("SFT", "demonstrations"), "reward": ("Reward", "preferences"), "dpo": ("DPO", "preferences")}
    name, file = names[place.part]
    micro_size = min(TRL_ROWS, place.num_rows)
    args = getattr(trl, f"{name}Config")(
        output_dir=str(place.root / "trl"),
        **ON_THE_CPU,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=micro_size,
        gradient_accumulation_steps=place.num_rows // micro_size,
        max_steps=len(place.batches),
        max_length=MAX_TOKENS,
        learning_rate=LR,
    )
    kind: Any = LlamaForSequenceClassification if place.part == "reward" else LlamaForCausalLM
    options = {"num_labels": 1} if place.part == "reward" else {}
    trainer = getattr(trl, f"{name}Trainer")(
        model=kind.from_pretrained(place.root / "policy", dtype=torch.float32, **options),
        args=args,
        train_dataset=load_dataset(
            "json", data_files=str(place.root / f"sequential_{file}.jsonl"), cache_dir=str(place.root / "cache")
        )["train"],
        processing_class=AutoTokenizer.from_pretrained(place.root / "policy"),
        callbacks=[Pace()],
    )
    with count.attached():
        trainer.train()


def bench_train(
    *,
    rounds: int,
    num_threads: int,
    parts: Sequence[str],
    shapes: Sequence[str],
    json_file: Path | None,
    scale: float = 1.0,
) -> str:
    """The table; the figures of every round go to json_file. scale: of all lengths (trials)."""
    cases = []
    for name in shapes:
        wanted: list[tuple[str, Lengths]] = [(part, "full") for part in ENGINE_PARTS if part in parts]
        for part, lengths in [*wanted, *((part, "chat") for part in PARTS if part in parts)]:
            case = _measure(part, name, lengths, rounds, num_threads, scale)
            print(_row(case), flush=True)
            cases.append(case)
            if json_file is not None:
                json_file.write_text(json.dumps([_figures(case) for case in cases], indent=1))
    return format_table(cases, rounds, num_threads)


def _measure(part: str, name: str, lengths: Lengths, rounds: int, num_threads: int, scale: float) -> Case:
    shape = SHAPES[name]
    num_rows = shape.num_rows // (2 if part in ("reward", "dpo") else 1)
    batches = draw_batches(WARM_UP + rounds + 3, num_rows, vocab_size=shape.vocab_size, lengths=lengths, scale=scale)
    works = (run_engine, run_transformers) if part in ENGINE_PARTS else (run_ours, run_trl)
    with tempfile.TemporaryDirectory(prefix="bench-train-") as directory:
        root = Path(directory)
        sizes = Sizes(
            num_layers=shape.num_layers,
            hidden_size=shape.hidden_size,
            vocab_size=shape.vocab_size,
            num_rows=1,
            max_positions=MAX_TOKENS,
        )
        write_inputs(root, sizes)
        write_rows(root, batches, seed=SEED)
        place = Place(root=root, part=part, batches=batches, vocab_size=shape.vocab_size)
        ours, theirs = (Side(name, work, (place,)) for name, work in zip(("ours", "theirs"), works, strict=True))
        take_turns([ours, theirs], rounds=rounds, num_threads=num_threads, memory=part in ENGINE_PARTS)
    return Case(part=part, shape=name, lengths=lengths, num_rows=num_rows, ours=ours, theirs=theirs)


def _figures(case: Case) -> dict[str, Any]:
    def steps(side: Side) -> dict[str, Any]:
        measured: Step | None = side.measured
        return {"steps": [asdict(step) for step in side.steps], "measured": measured and asdict(measured)}

    own = {"part": case.part, "shape": case.shape, "lengths": case.lengths, "num_rows": case.num_rows}
    return {**own, "ours": steps(case.ours), "theirs": steps(case.theirs)}


def format_table(cases: Sequence[Case], rounds: int, num_threads: int) -> str:
    lines = [
        f"float32; {rounds} interleaved rounds after {WARM_UP} of warm-up, median (min to max); threads of each: "
        f"{num_threads}, CPUs: {os.cpu_count()}. Full rows have 64 + 192 tokens; chats the lengths of HH-RLHF, up to "
        f"{MAX_TOKENS}. reward and dpo: pairs.",
        "",
        "| | hidden x layers, vocabulary | lengths | rows | seconds, ours | theirs | ours of theirs | on a CPU, "
        "likewise | padding, ours | theirs | MiB, ours | theirs | ours of theirs |",
        "|---" * 13 + "|",
    ]
    return "\n".join([*lines, *map(_row, cases)])


def _row(case: Case) -> str:
    ours, theirs = case.ours, case.theirs
    memory = ["", "", ""]
    if ours.measured is not None and theirs.measured is not None:
        mine, other = (side.measured.notes["peak_bytes"] / 2**20 for side in (ours, theirs) if side.measured)
        memory = [f"{mine:.0f}", f"{other:.0f}", f"{mine / other:.2f}"]
    columns = [
        case.part,
        str(SHAPES[case.shape]),
        case.lengths,
        str(case.num_rows),
        spread(ours.seconds),
        spread(theirs.seconds),
        spread(ratios(ours.seconds, theirs.seconds)),
        spread(ratios(ours.cpu_seconds, theirs.cpu_seconds)),
        f"{ours.note('padding'):.0%}",
        f"{theirs.note('padding'):.0%}",
        *memory,
    ]
    return f"| {' | '.join(columns)} |"
