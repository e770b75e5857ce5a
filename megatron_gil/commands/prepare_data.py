"""`megatron-gil prepare-data`: turn a public data set into training files.

    megatron-gil prepare-data hh --input harmless-base/train.jsonl.gz helpful-base/train.jsonl.gz --output data/hh
    megatron-gil prepare-data hh --input Anthropic/hh-rlhf --data-dir harmless-base --output data/harmless

Writes OUTPUT/{train,eval}/{prompts,demonstrations,preferences}.jsonl, as far as the source has them, and a card of
counts, lengths and what was left out and why. Exit code 2: the input is wrong, one line on stderr says how.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from megatron_gil.data.prepare.card import format_card
from megatron_gil.data.prepare.sources import SOURCES
from megatron_gil.data.prepare.sources.files import HubChoice
from megatron_gil.data.prepare.split import PrepareOptions, prepare
from megatron_gil.paths import expand_user


def prepare_data(arguments: Sequence[str]) -> int:
    """Prints the card. ConfigError where the input is wrong."""
    print(format_card(prepare(_parse(arguments))), end="")
    return 0


def _parse(arguments: Sequence[str]) -> PrepareOptions:
    parser = argparse.ArgumentParser(
        prog="megatron-gil prepare-data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", choices=SOURCES, metavar="SOURCE", help=" | ".join(SOURCES))
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PATH_OR_HUB_NAME", help="files, directories, names on the hub"
    )
    parser.add_argument("--output", type=expand_user, required=True, metavar="DIR", help="must not exist yet")
    parser.add_argument("--eval-fraction", type=float, default=0.05, help="share of opening questions (default 0.05)")
    parser.add_argument("--exclude", nargs="+", default=[], metavar="FILE", help="leave out the prompts of these files")
    parser.add_argument("--group", help="label for every row (default: what the source says, for analysis only)")
    parser.add_argument("--limit", type=int, help="read this many rows only")
    parser.add_argument(
        "--label", choices=("safer", "better"), default="safer", help="safe-rlhf: which verdict makes the preference"
    )
    parser.add_argument("--split", default="train", help="hub: which split to read (default train)")
    parser.add_argument("--config", help="hub: name of the configuration")
    parser.add_argument("--data-dir", help="hub: directory within the data set")
    given = parser.parse_args(arguments)
    return PrepareOptions(
        source=given.source,
        inputs=[os.path.expanduser(name) for name in given.input],
        output=given.output,
        eval_fraction=given.eval_fraction,
        exclude=[os.path.expanduser(name) for name in given.exclude],
        group=given.group,
        limit=given.limit,
        safe_rlhf_label=given.label,
        hub=HubChoice(split=given.split, config=given.config, data_dir=given.data_dir),
    )
