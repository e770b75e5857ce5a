"""Everything that a command takes from outside, checked before a model is built.

The run and its dry run both ask here, so that one accepts what the other does. Neither megatron nor a process group is
needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_gil.config import (
    AuditConfig,
    BatchPlan,
    CommandConfig,
    ConfigError,
    DpoConfig,
    EvaluateRewardConfig,
    GenerateConfig,
    PpoConfig,
    RewardConfig,
    ScoreConfig,
    SftConfig,
    TrainConfig,
    data_parallel_size,
    require,
)
from megatron_gil.data.hub import HubName, located
from megatron_gil.data.rows.demonstrations import DemonstrationDataset, ResponseDataset, TextDataset
from megatron_gil.data.rows.preferences import PreferenceDataset
from megatron_gil.data.rows.prompts import PromptDataset
from megatron_gil.data.rows.records import matching, read_scored_kind
from megatron_gil.data.text.tokenizer import Tokenizer
from megatron_gil.models.convert.check import check_tensors, check_tied, expected_shapes
from megatron_gil.models.convert.locate import newest_checkpoints
from megatron_gil.models.convert.weight_files import read_safetensors
from megatron_gil.models.families import ModelSpec, check_layout, read_spec
from megatron_gil.models.uses import ModelUse, has_reward_model, model_uses
from megatron_gil.models.weight_table import SCORE_HEAD
from megatron_gil.training.audit.rows import AuditRows, read_audit_rows
from megatron_gil.training.ppo.checks import check_rollout
from megatron_gil.training.reward_function import RewardFunction
from megatron_gil.training.run.best import check_keep_best
from megatron_gil.training.run.boards import check_boards
from megatron_gil.training.run.output import audit_files, new_file, quality_files
from megatron_gil.training.supervised.score_range import read_score_range
from megatron_gil.training.tokenizers import RunTokenizers, read_tokenizers

_NO_TOKENIZERS: Any = None  # not Optional in the type: only `score` by a function has none, and asks for none


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedRun:
    """What a command starts from."""

    uses: tuple[ModelUse, ...]
    specs: Mapping[str, ModelSpec]
    """By role."""
    tokenizers: RunTokenizers
    """Of the models; None without a type where there is none: reward.function alone scores texts."""
    train: Any
    """Rows of data.train, as the command reads them; None in a dry run whose input is still to be written."""
    held_out: Any = None
    """Rows of data.eval; None where it is not set."""
    pretrain: TextDataset | None = None
    audit: AuditRows | None = None
    """What audit measures on; None of other commands."""
    function: RewardFunction | None = None
    """reward.function, found; None where it is not set."""
    score_range: tuple[float, float] | None = None
    """Of the reward model's training; None where that is not known."""
    notes: tuple[str, ...] = ()
    """What a dry run took for what is not there yet."""

    @property
    def data(self) -> dict[str, Any]:
        """The rows of each file that is read, by its key."""
        rows: dict[str, Any] = {"data.train": self.train, "data.eval": self.held_out, "data.pretrain": self.pretrain}
        rows |= {held_out.key: held_out.rows for held_out in (self.audit.given if self.audit else ())}
        return {key: found for key, found in rows.items() if found is not None}


def check_run(config: CommandConfig, world_size: int, *, sizes_from: Path | None = None) -> CheckedRun:
    """Raises ConfigError, in one line, for whatever would keep the command from starting on so many processes.

    sizes_from: a model directory that stands for models that an earlier stage has yet to write (dry runs alone).
    """
    dp_size = data_parallel_size(world_size, config.parallel)
    if isinstance(config, TrainConfig):
        BatchPlan.of(world_size, config.parallel, config.batch)
        check_keep_best(config)
        if not isinstance(config, AuditConfig):  # which logs nothing
            check_boards(config)
    function = _find_function(config)
    uses = model_uses(config)
    found = {use.role: _find_model(config, use, sizes_from) for use in uses}
    specs = {role: model.spec for role, model in found.items()}
    tokenizers, tokenizer = _NO_TOKENIZERS, None
    if uses:
        lead = uses[0].role
        paths = {role: model.directory for role, model in found.items() if role == lead or not model.note}
        tokenizers = read_tokenizers(config, uses, paths, specs)
        tokenizer = tokenizers.tokenizer
    if isinstance(config, GenerateConfig | ScoreConfig):
        new_file(config.output, may_lack_directory=sizes_from is not None)
    if isinstance(config, EvaluateRewardConfig):
        quality_files(config.output, may_lack_directory=sizes_from is not None)
    if isinstance(config, AuditConfig):
        require(
            bool(config.audit.pairs or config.audit.trusted),
            "audit.pairs and audit.trusted are both null, so there is nothing to measure the reward on; give a "
            "file as audit.pairs=PAIRS.jsonl or audit.trusted=ROWS.jsonl",
        )
        audit_files(config.output, may_lack_directory=sizes_from is not None)
    notes = [*(model.note for model in found.values() if model.note), *(tokenizers.notes if uses else ())]
    train = None
    if _is_to_come(config, sizes_from):
        notes.append(f"data.train={config.data.train} is not there yet")
    else:
        train = _read_train(config, tokenizer, dp_size)
    held_out = _read_held_out(config, tokenizer, dp_size)
    audit = _read_audit(config, tokenizers, specs, train)
    for rows in (train, held_out, *(h.rows for h in (audit.given if audit else ()))):
        if function is not None and rows is not None:
            function.check_fields(rows)
    return CheckedRun(
        uses=uses,
        specs=specs,
        tokenizers=tokenizers,
        train=train,
        held_out=held_out,
        pretrain=_read_pretrain(config, tokenizer),
        audit=audit,
        function=function,
        score_range=read_score_range(found["reward_model"].directory)
        if isinstance(config, PpoConfig) and "reward_model" in found
        else None,
        notes=tuple(notes),
    )


def count_updates(config: SftConfig | RewardConfig | DpoConfig, num_rows: int) -> int:
    """Of a run of sft, reward or dpo on so many rows."""
    return config.train.updates or max(1, config.train.epochs * num_rows // config.batch.global_size)


def path_of(config: CommandConfig, key: str) -> str:
    """What a key such as data.train or audit.pairs names."""
    section, _, name = key.partition(".")
    return str(getattr(getattr(config, section), name))


def model_path(config: CommandConfig, use: ModelUse) -> Path:
    """The directory that a model starts from."""
    value = getattr(config.models, use.key)
    takes_function = use.key == "reward_model" and hasattr(config, "reward") and not isinstance(config, RewardConfig)
    require(
        bool(value),
        f"models.{use.key} is not set; give the directory of a model, as models.{use.key}=DIR"
        + ", or a function, as reward.function=package.module:name" * takes_function,
    )
    return located(value, "model", f"models.{use.key}")


def _find_function(config: CommandConfig) -> RewardFunction | None:
    if not isinstance(config, PpoConfig | ScoreConfig | EvaluateRewardConfig) or config.reward.function is None:
        return None
    return RewardFunction(config.reward)


def describe_rewards(config: Any) -> str:
    """What a score is made of, in words, of a command that has reward.function."""
    section, threads = config.reward, config.reward.threads
    model = [f"{section.model_weight:g} x reward_model"] * has_reward_model(config)
    text = " + ".join([*model, f"{section.weight:g} x {section.function}"])
    return text + f" in {threads} threads" * (threads > 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _FoundModel:
    directory: Path
    spec: ModelSpec
    note: str
    """Empty where the model is there; else what stands for it."""


def _find_model(config: CommandConfig, use: ModelUse, sizes_from: Path | None) -> _FoundModel:
    """A model whose tensors are there and whose sizes the layout can cut, or in a dry run the sizes alone."""
    directory, note = model_path(config, use), ""
    if not directory.is_dir():
        if sizes_from is None:
            raise ConfigError(
                f"models.{use.key}={directory} is not a directory; where an earlier stage has yet to write it, "
                "--dry-run takes --sizes-from MODEL_DIR; a model on the Hugging Face Hub is OWNER/NAME@REVISION"
            )
        directory, note = sizes_from, f"models.{use.key}={directory} is not there yet: sizes of {sizes_from}"
    elif not (directory / "config.json").is_file():
        model = _model_below(directory, use)
        hint = f"; take a model below it, as {model}" if model else ""
        raise ConfigError(f"models.{use.key}={directory} holds no config.json, and so no model{hint}")
    spec, parallel = read_spec(directory), config.parallel
    check_layout(spec, parallel.tensor_size, parallel.pipeline_size, parallel.sequence_parallel)
    if not note:
        _check_weights(use, spec, directory)
    return _FoundModel(directory=directory, spec=spec, note=note)


def _model_below(directory: Path, use: ModelUse) -> Path | None:
    """Of a checkpoint, or of a run's newest one, the model of this role, or else another."""
    for place in (directory, *newest_checkpoints(directory)):
        if models := [path.parent for path in place.glob("*/config.json")]:
            return max(models, key=lambda model: (use.key.endswith(model.name), model))
    return None


def _is_to_come(config: CommandConfig, sizes_from: Path | None) -> bool:
    """Whether what is answered or scored is still to be written by an earlier stage."""
    answers, path = isinstance(config, GenerateConfig | ScoreConfig | EvaluateRewardConfig), config.data.train
    return answers and sizes_from is not None and bool(path) and not _is_there(path or "")


def _is_there(path: str) -> bool:
    return Path(path).exists() or bool(matching(Path(path))) or HubName.parse(path) is not None


def _check_weights(use: ModelUse, spec: ModelSpec, path: Path) -> None:
    """The headers of the weight files: every tensor is there, as config.json says, and no file is cut off. Of a tied
    model that has a head all the same, that too."""
    files = read_safetensors(path)
    has_scores = any(SCORE_HEAD in file.tensors for file in files)
    if use.scores_from_start and not has_scores:
        known = {name for name, _ in expected_shapes(spec, "lm")}
        others = [name for file in files for name in file.tensors if name not in known]
        found = f", and its {others[0]} is no head that is read" if others else ""
        raise ConfigError(
            f"models.{use.key}={path} has no score.weight{found}; train it with `megatron-gil reward` first"
        )
    if use.head == "lm":
        check_tensors(files, spec, "lm", path, others=True)
        if spec.tied:
            check_tied(files)
    elif has_scores:
        check_tensors(files, spec, "score", path, others=True)
    else:  # the body alone: a tied language model has no head tensor, and a new score head is made
        check_tensors(files, replace(spec, tied=True), "lm", path, others=True)


def _read_train(config: CommandConfig, tokenizer: Tokenizer | None, dp_size: int) -> Any:
    if not config.data.train:
        raise ConfigError("data.train is not set: it is what the command reads; give a file as data.train=PATH")
    rows = _read_rows(config, "data.train", tokenizer)
    if isinstance(config, PpoConfig):
        check_rollout(config, dp_size, rows)
    return rows


def _read_rows(config: CommandConfig, key: str, tokenizer: Tokenizer | None) -> Any:
    """The rows of data.train or data.eval, every one of them checked. Without a tokenizer they are texts alone."""
    data, path, others = config.data, str(located(path_of(config, key), "dataset", key)), False
    match config:
        case PpoConfig() | GenerateConfig():
            others = isinstance(config, GenerateConfig) or config.reward.function is not None
            return PromptDataset(path, tokenizer, max_prompt_tokens=data.max_prompt_tokens, others=others)
        case SftConfig():
            kind: Any = DemonstrationDataset
        case ScoreConfig():
            others, kind = True, ResponseDataset if read_scored_kind(path) == "responses" else PreferenceDataset
        case EvaluateRewardConfig():
            others, kind = True, PreferenceDataset
        case _:
            kind = PreferenceDataset
    limits = {"max_tokens": data.max_tokens, "max_prompt_tokens": data.max_prompt_tokens}
    return kind(path, tokenizer, **limits, others=others)


def _read_held_out(config: CommandConfig, tokenizer: Tokenizer | None, dp_size: int) -> Any:
    if not isinstance(config, TrainConfig) or not config.data.eval:
        return None
    rows = _read_rows(config, "data.eval", tokenizer)
    if len(rows) < dp_size:
        raise ConfigError(
            f"data.eval={config.data.eval}: {len(rows)} rows are too few for {dp_size} data-parallel ranks; add rows "
            "or set data.eval=null"
        )
    return rows


def _read_pretrain(config: CommandConfig, tokenizer: Tokenizer | None) -> TextDataset | None:
    if not isinstance(config, PpoConfig) or not config.ppo.ptx_coef:
        return None
    data = config.data
    if not data.pretrain:
        raise ConfigError("data.pretrain is not set: ppo.ptx_coef is above 0; give a file as data.pretrain=PATH")
    path = located(data.pretrain, "dataset", "data.pretrain")
    return TextDataset(path, tokenizer, max_tokens=data.max_tokens, max_prompt_tokens=data.max_prompt_tokens)


def _read_audit(
    config: CommandConfig, tokenizers: RunTokenizers, specs: Mapping[str, ModelSpec], train: Any
) -> AuditRows | None:
    if not isinstance(config, AuditConfig):
        return None
    known = train.group_names if config.gil.groups == "known" else None
    return read_audit_rows(config, tokenizers, specs, known)
