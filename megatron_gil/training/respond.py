"""generate and score: files of prompts to files of responses, files of responses to files of scores."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from megatron_gil.config import GenerateConfig, ScoreConfig
from megatron_gil.data.demonstrations import ResponseDataset
from megatron_gil.data.prompts import PromptDataset
from megatron_gil.engine.files import reason, write_text
from megatron_gil.engine.generation import Generator
from megatron_gil.parallel.collectives import agree, broadcast_object, gather_objects
from megatron_gil.parallel.layout import ParallelLayout
from megatron_gil.training.build import build_frozen
from megatron_gil.training.checks import check_models, limits, new_file, require, say_what_is_read
from megatron_gil.training.loop import RunFailed
from megatron_gil.training.progress import Progress
from megatron_gil.training.samples import sample_texts
from megatron_gil.training.sources import PromptSource, RowSource
from megatron_gil.training.tokenizers import RunTokenizers


def generate(config: GenerateConfig, layout: ParallelLayout, progress: Progress) -> int:
    """One response per prompt of data.train, into `output`; of a prompt that was cut also what the model read."""

    def check() -> tuple[PromptDataset, RunTokenizers, Path]:
        tokenizers = check_models("generate", config)
        path = require(config.data.train, "data.train", "its prompts are answered")
        prompts = PromptDataset(path, tokenizers.tokenizer, max_prompt_tokens=config.data.max_prompt_tokens)
        return prompts, tokenizers, new_file(config.output)

    prompts, tokenizers, output = agree(layout, check)
    tokenizer = tokenizers.tokenizer
    say_what_is_read(config, layout, tokenizers, train=prompts)
    progress.safe_point("building policy")
    policy = build_frozen(config, "policy", "lm", layout)
    generator = Generator(policy, config.sampling, tokenizer=tokenizer, seed=config.run.seed)
    rows = {}
    before_batch = partial(progress.safe_point, "rollout")
    source = PromptSource(prompts, None, layout, len(prompts))
    for batch in source.all_batches(config.sampling.micro_size, before_batch):
        progress.enter("rollout", batch)
        rollout = generator.sample(batch)
        for row_id, group, text in zip(
            batch.row_ids.tolist(), batch.known_groups.tolist(), sample_texts(rollout, tokenizer), strict=True
        ):
            label = {"group": prompts.group_names[group]} if group >= 0 else {}
            read = {"prompt_read": text["prompt"]} if prompts.truncated([row_id])[0] else {}
            rows[row_id] = {**prompts.fields(row_id), **read, "response": text["response"], **label}
    _write_rows(rows, output, layout)
    return 0


def score(config: ScoreConfig, layout: ParallelLayout, progress: Progress) -> int:
    """The reward model's score of every {prompt, response} of data.train, into `output`."""

    def check() -> tuple[ResponseDataset, RunTokenizers, Path]:
        tokenizers = check_models("score", config)
        path = require(config.data.train, "data.train", "its responses are scored")
        responses = ResponseDataset(path, tokenizers.tokenizer, **limits(config))
        return responses, tokenizers, new_file(config.output)

    responses, tokenizers, output = agree(layout, check)
    say_what_is_read(config, layout, tokenizers, train=responses)
    progress.safe_point("building reward_model")
    model = build_frozen(config, "reward_model", "score", layout)
    rows = {}
    before_batch = partial(progress.safe_point, "scoring")
    for batch in RowSource(responses, None, layout, config.batch.micro_size).all_batches(before_batch):
        progress.enter("scoring", batch)
        for row_id, value in zip(batch.row_ids.tolist(), model.evaluate(batch).scores.tolist(), strict=True):
            group = responses.known_groups([row_id])[0]
            label = {"group": responses.group_names[group]} if group >= 0 else {}
            rows[row_id] = {**responses.fields(row_id), "score": value, **label}
    _write_rows(rows, output, layout)
    return 0


def _write_rows(rows: dict[int, dict[str, Any]], output: Path, layout: ParallelLayout) -> None:
    """All ranks' rows in the order of their ids, written beside and renamed."""
    error = ""
    parts = gather_objects(rows if layout.tp_rank == layout.pp_rank == 0 else {}, layout)
    if layout.is_main:
        merged = {row_id: row for part in parts for row_id, row in part.items()}
        lines = [json.dumps(merged[row_id], ensure_ascii=False) + "\n" for row_id in sorted(merged)]
        try:
            write_text(output, "".join(lines))
            print(f"{len(lines)} rows in {output}", file=sys.stderr)
        except OSError as refused:
            error = f"{output} cannot be written: {reason(refused)}"
    if error := broadcast_object(error, layout):
        raise RunFailed(error)
