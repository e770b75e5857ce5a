"""A public data set to training files: split, without repeats and excluded prompts, with a card beside them.

OUTPUT/train/{prompts,demonstrations,preferences}.jsonl    OUTPUT/eval/...    OUTPUT/card.json    OUTPUT/card.md
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_gil.config import ConfigError
from megatron_gil.data.prepare.card import KindWriter, make_card, write_card
from megatron_gil.data.prepare.sources import SOURCES, guess_reader
from megatron_gil.data.prepare.sources.example import Example, Origin, Tally
from megatron_gil.data.prepare.sources.files import HubChoice, iter_native_rows
from megatron_gil.data.text.chat import parse_dialogue

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareOptions:
    source: str
    """A key of SOURCES."""
    inputs: Sequence[str]
    """Files, directories or names on the hub."""
    output: Path
    """Must not exist yet."""
    eval_fraction: float = 0.05
    exclude: Sequence[str] = ()
    """Files whose prompts are left out."""
    group: str | None = None
    """A label for every row, in place of what the source says."""
    limit: int | None = None
    """Stop after this many native rows."""
    safe_rlhf_label: str = "safer"
    hub: HubChoice = field(default_factory=HubChoice)

    def __post_init__(self) -> None:
        if not 0 <= self.eval_fraction < 1:
            raise ConfigError(f"--eval-fraction={self.eval_fraction} must lie in [0, 1)")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"--limit={self.limit} must be at least 1")


def prepare(options: PrepareOptions) -> dict[str, Any]:
    """Write the files, all or nothing, and return the card. The same input gives the same bytes."""
    if options.output.exists():
        raise ConfigError(f"{options.output}: exists; name another --output or remove it")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{options.output.name}.", dir=options.output.parent))
    try:
        card = _write_splits(options, partial)
        partial.chmod(0o777 & ~_umask())  # mkdtemp lets only the user read it; give it the usual permissions
        partial.rename(options.output)
    except BaseException as error:
        shutil.rmtree(partial)
        if isinstance(error, OSError) and error.filename is None:  # a failed write does not know its file
            raise OSError(error.errno, error.strerror, str(options.output)) from None
        raise
    return card


def split_of(prompt: str, eval_fraction: float) -> str:
    """train or eval, by a hash of the prompt's opening question: conversations that begin alike stay together, so no
    prompt is in two splits, nor is one the beginning of another's."""
    messages = parse_dialogue(prompt)
    opening = prompt if messages is None else next(m["content"] for m in messages if m["role"] == "user")
    digest = hashlib.sha256(_collapse(opening).encode()).digest()
    return "eval" if int.from_bytes(digest[:8]) < eval_fraction * 2**64 else "train"


def prompt_keys(example: Example) -> Iterator[str]:
    """Keys by which prompts are compared: the same whatever their spaces, case and form. One for every response of the
    example."""
    messages = example.messages or parse_dialogue(example.prompt) or [{"role": "user", "content": example.prompt}]
    responses = [i for i, message in enumerate(messages) if message["role"] == "assistant"] if example.messages else []
    for end in responses or [len(messages)]:
        yield "\n".join(_collapse(message["content"]) for message in messages[:end])


def _write_splits(options: PrepareOptions, directory: Path) -> dict[str, Any]:
    excluded = _read_excluded(options)
    tally = Tally()
    with ExitStack() as stack:
        writers: dict[tuple[str, str], KindWriter] = {}
        for example in _iter_examples(options, tally):
            if any(key in excluded for key in prompt_keys(example)):
                tally.drop("the prompt occurs in an excluded file")
                continue
            split = split_of(example.prompt, options.eval_fraction)
            for kind, row in _rows_of(example, options.group).items():
                if (split, kind) not in writers:
                    writers[split, kind] = stack.enter_context(KindWriter(directory / split / f"{kind}.jsonl"))
                if not writers[split, kind].write(row):
                    tally.drop("repeats an earlier row", kind)
    if not writers:
        reasons = ", ".join(f"{reason}: {count}" for (_, reason), count in tally.dropped.most_common(3))
        inputs = " ".join(options.inputs)
        raise ConfigError(f"{inputs}: none of {tally.read.total()} rows can be used as {options.source} ({reasons})")
    card = make_card(_describe(options), tally, writers)
    write_card(card, directory)
    return card


def _iter_examples(options: PrepareOptions, tally: Tally) -> Iterator[Example]:
    read = SOURCES[options.source]
    native = ((origin, row) for name in options.inputs for origin, row in iter_native_rows(name, options.hub))
    for origin, row in islice(native, options.limit):
        tally.read[Path(origin).name] += 1
        if not isinstance(row, Mapping):
            tally.drop("not an object with named fields")
            continue
        example = read(row, Origin(name=origin, safe_rlhf_label=options.safe_rlhf_label), tally)
        if example is not None:
            yield example


def _read_excluded(options: PrepareOptions) -> set[str]:
    """Keys of all prompts in the excluded files, which may be training files or in a native form."""
    keys: set[str] = set()
    for name in options.exclude:
        before = len(keys)
        for origin, row in iter_native_rows(name, options.hub):
            example = guess_reader(row)(row, Origin(name=origin), Tally()) if isinstance(row, Mapping) else None
            keys.update(prompt_keys(example) if example is not None else ())
        if len(keys) == before:
            raise ConfigError(f"{name}: --exclude found no prompts in it")
    return keys


def _rows_of(example: Example, group: str | None) -> dict[str, Row]:
    """Rows of the training files, by kind."""
    prompt = {"prompt": example.prompt}
    rows: dict[str, Row] = {"prompts": prompt}
    if example.messages is not None:
        rows["demonstrations"] = {"messages": example.messages}
    elif example.completion is not None:
        rows["demonstrations"] = {**prompt, "completion": example.completion}
    if example.chosen is not None:
        rows["preferences"] = {**prompt, "chosen": example.chosen, "rejected": example.rejected}
    label = group or example.group
    return rows if label is None else {kind: {**row, "group": label} for kind, row in rows.items()}


def _describe(options: PrepareOptions) -> dict[str, Any]:
    return {
        "source": options.source,
        "inputs": [Path(name).name if Path(name).exists() else name for name in options.inputs],
        "exclude": [Path(name).name for name in options.exclude],
        "eval_fraction": options.eval_fraction,
    }


def _collapse(text: str) -> str:
    return " ".join(text.casefold().split()).encode("utf-8", "replace").decode()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
