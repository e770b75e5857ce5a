"""The held-out rows of an audit, in the tokens of the policy and the classifier and in those of the reward model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from megatron_gil.config import AuditConfig, ConfigError
from megatron_gil.data.hub import located
from megatron_gil.data.rows.dataset import RowDataset
from megatron_gil.data.rows.preferences import PreferenceDataset
from megatron_gil.data.rows.prompts import PreferencePrompts, PromptDataset, ResponsePrompts
from megatron_gil.data.rows.trusted import TrustedDataset
from megatron_gil.data.text.tokenizer import Tokenizer
from megatron_gil.models.families import ModelSpec
from megatron_gil.training.tokenizers import RunTokenizers

Rows = TypeVar("Rows", PreferenceDataset, TrustedDataset)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """One file, read several times: all have the same rows in the same order. `rows` and `as_scored` are one where the
    models share a tokenizer."""

    key: str
    """audit.pairs or audit.trusted."""
    rows: PreferenceDataset | TrustedDataset
    as_scored: PreferenceDataset | TrustedDataset
    prompts: PromptDataset
    """As the policy reads them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRows:
    """None where the file is not given."""

    pairs: HeldOut | None
    trusted: HeldOut | None

    @property
    def given(self) -> tuple[HeldOut, ...]:
        return tuple(held_out for held_out in (self.pairs, self.trusted) if held_out)


def read_audit_rows(
    config: AuditConfig, tokenizers: RunTokenizers, specs: Mapping[str, ModelSpec], known: tuple[str, ...] | None
) -> AuditRows:
    """Every row of audit.pairs and audit.trusted, checked. specs: by role. known: the labels of data.train's rows,
    which the rows must have too (gil.groups=known); None where the classifier tells."""
    readers = [spec.max_positions for role, spec in specs.items() if role in ("critic", "classifier")]
    scorers = [spec.max_positions for role, spec in specs.items() if role == "reward_model"]

    def read(kind: type[Rows], key: str, value: str | None) -> HeldOut | None:
        if not value:
            return None
        path = located(value, "dataset", key)
        own = tokenizers.reward
        shared = [*readers, *(scorers if own is None else [])]
        rows = _open(kind, path, config, tokenizers.tokenizer, shared)
        if isinstance(rows, PreferenceDataset):
            _check_pairs(rows, f"{key}={value}")
        if known is not None:
            _check_labels(rows, f"{key}={value}", known)
        asks = PreferencePrompts if kind is PreferenceDataset else ResponsePrompts
        return HeldOut(
            key=key,
            rows=rows,
            as_scored=rows if own is None else _open(kind, path, config, own, scorers),
            prompts=asks(path, tokenizers.tokenizer, max_prompt_tokens=config.data.max_prompt_tokens),
        )

    audit = config.audit
    return AuditRows(
        pairs=read(PreferenceDataset, "audit.pairs", audit.pairs),
        trusted=read(TrustedDataset, "audit.trusted", audit.trusted),
    )


def _open(kind: type[Rows], path: Path, config: AuditConfig, tokenizer: Tokenizer, positions: list[int]) -> Rows:
    """positions: of the models that read the rows."""
    data, max_tokens = config.data, min([config.data.max_tokens, *positions])
    others = config.reward.function is not None
    return kind(path, tokenizer, max_tokens=max_tokens, max_prompt_tokens=data.max_prompt_tokens, others=others)


def _check_pairs(rows: PreferenceDataset, name: str) -> None:
    pairs = map(rows.fields, range(len(rows)))
    if all(pair["chosen"].strip() == pair["rejected"].strip() for pair in pairs):
        raise ConfigError(
            f"{name}: chosen and rejected are the same text in every row, so there is nothing to measure; give pairs "
            "of different responses"
        )


def _check_labels(rows: RowDataset, name: str, known: tuple[str, ...]) -> None:
    found = [rows.group_names[i] if i >= 0 else None for i in rows.known_groups(range(len(rows)))]
    strange = [(row, label) for row, label in enumerate(found) if label not in known]
    if strange:
        row, label = strange[0]
        has = "has no group" if label is None else f"has the group {label!r}"
        raise ConfigError(
            f"{name}: gil.groups=known needs one of data.train's groups in every row, {len(strange)} of {len(rows)} "
            f"lack it (row {row + 1} {has}); the groups are {', '.join(known)}"
        )
