"""generate and score: files of prompts to files of responses, files of responses or of pairs to files of scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from megatron_gil.commands.evaluate_reward import show_and_write
from megatron_gil.config import CommandConfig, EvaluateRewardConfig, GenerateConfig, ScoreConfig
from megatron_gil.engine.files import reason
from megatron_gil.engine.generation import Generator
from megatron_gil.engine.megatron import MegatronModel
from megatron_gil.evaluation.scored_pairs import read_scored_pairs
from megatron_gil.parallel.collectives import agree, broadcast_object
from megatron_gil.parallel.layout import ParallelLayout
from megatron_gil.training.build import build_models
from megatron_gil.training.check_run import CheckedRun, check_run
from megatron_gil.training.file_scores import FileScores
from megatron_gil.training.row_source import PromptSource
from megatron_gil.training.run.answers import AnswerFile, file_stamps, what_rows_depend_on
from megatron_gil.training.run.first_lines import first_rows, print_rows
from megatron_gil.training.run.loop import RunFailed
from megatron_gil.training.run.output import quality_files
from megatron_gil.training.run.progress import Progress
from megatron_gil.training.run.samples import sample_texts
from megatron_gil.training.run.signals import EXIT_STOPPED, StopRequested
from megatron_gil.training.run.take import take_output

BATCHES_OF_SLOTS = 4
"""Answers are written each time that the slots have been filled this often. A run that is killed loses what was
answered since the last write."""

SCORE_NAMES = {"responses": ("score",), "preferences": ("score_chosen", "score_rejected")}
"""By the kind of the rows."""


def generate(config: GenerateConfig, layout: ParallelLayout, progress: Progress) -> int:
    """Writes one response per prompt of data.train into `output`; for a prompt that was cut, also what the model
    read."""

    checked = agree(layout, lambda: check_run(config, layout.world_size))
    prompts, tokenizer, output = checked.train, checked.tokenizers.tokenizer, Path(config.output)
    depends_on = what_rows_depend_on(config, "models.policy", "data.train", "data.tokenizer")
    take_output(output, config, layout, progress)
    answers = AnswerFile(output, layout, begun_with=depends_on, num_rows=len(prompts))

    def answer_all() -> None:
        models = build_models(config, checked, layout, progress)
        sampler = Generator(models["policy"], config.sampling, tokenizer=tokenizer, seed=config.run.seed)
        _say_first(config, layout, answers, models, checked)

        size = BATCHES_OF_SLOTS * (config.sampling.micro_size or 256)
        for batch in PromptSource(prompts, None, layout, len(prompts)).all_batches(size, done=answers.done):
            answers.flush()
            progress.safe_point("rollout", batch)
            rollout = sampler.sample(batch, meet=partial(progress.meet, "rollout", batch))
            for row_id, group, text in zip(
                batch.row_ids.tolist(), batch.known_groups.tolist(), sample_texts(rollout, tokenizer), strict=True
            ):
                label = {"group": prompts.group_names[group]} if group >= 0 else {}
                read = {"prompt_read": text["prompt"]} if prompts.truncated([row_id])[0] else {}
                row = {**prompts.fields(row_id), **read, "response": text["response"], **label}
                answers.add({row_id: {**row, **prompts.passed_on(row_id)}})

    return _collect(answers, answer_all, progress)


def score(config: ScoreConfig, layout: ParallelLayout, progress: Progress) -> int:
    """The score, of a reward model or a function, of every {prompt, response} of data.train, or of both responses of
    every {prompt, chosen, rejected}, into `output`."""
    return score_into(Path(config.output), config, layout, progress)


def score_into(
    output: Path, config: ScoreConfig | EvaluateRewardConfig, layout: ParallelLayout, progress: Progress
) -> int:
    """The same into another file than config.output."""

    checked = agree(layout, lambda: check_run(config, layout.world_size))
    rows, names = checked.train, SCORE_NAMES[checked.train.kind]
    depends_on = what_rows_depend_on(config, "models.reward_model", "data.train", "data.tokenizer")
    if checked.function is not None and checked.function.source:
        depends_on["the files of reward.function"] = file_stamps(Path(checked.function.source))
    take_output(output, config, layout, progress)
    answers = AnswerFile(output, layout, begun_with=depends_on, num_rows=len(rows))

    def answer_all() -> None:
        models = build_models(config, checked, layout, progress)
        scores = FileScores(config, models, checked.function, rows, layout, progress)
        _say_first(config, layout, answers, models, checked)
        for found in scores.read(answers.flush, done=answers.done):
            for row_id, values in found.items():
                group = rows.known_groups([row_id])[0]
                label = {"group": rows.group_names[group]} if group >= 0 else {}
                row = {**rows.fields(row_id), **dict(zip(names, values, strict=True)), **label}
                answers.add({row_id: {**row, **rows.passed_on(row_id)}})

    return _collect(answers, answer_all, progress)


def evaluate_reward(config: EvaluateRewardConfig, layout: ParallelLayout, progress: Progress) -> int:
    """Scores the pairs of data.train, then says how good the reward model is on them."""
    files = agree(layout, lambda: quality_files(config.output))
    code = score_into(files.scored, config, layout, progress)
    if code:
        return code
    progress.enter("evaluating")

    def evaluate() -> str:
        """Why nothing could be written, or empty."""
        try:
            if layout.is_main:
                show_and_write(read_scored_pairs([files.scored]), files)
        except OSError as refused:
            again = f"megatron-gil evaluate-reward {files.scored} --output NAME.json"
            return (
                f"{files.numbers} cannot be written: {reason(refused)}; the scores are kept, `{again}` evaluates them"
            )
        return ""

    if error := broadcast_object(agree(layout, evaluate), layout):
        raise RunFailed(error)
    return 0


def _say_first(
    config: CommandConfig,
    layout: ParallelLayout,
    answers: AnswerFile,
    models: Mapping[str, MegatronModel],
    checked: CheckedRun,
) -> None:
    length = f"{len(checked.train) - len(answers.done):,} rows"
    print_rows(first_rows(config, layout, where=answers.output, models=models, checked=checked, length=length), layout)


def _collect(answers: AnswerFile, answer_all: Callable[[], None], progress: Progress) -> int:
    """Exit code 0 when the file is whole, or 75 when the command was stopped and what is done so far is kept."""
    try:
        answer_all()
    except StopRequested as stopped:
        answers.stop(stopped, progress.where.phase)
        return EXIT_STOPPED
    answers.finish()
    return 0
