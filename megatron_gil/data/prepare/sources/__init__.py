"""Public data sets in their native form, read into one shape (example.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_gil.data.prepare.sources.example import Reader
from megatron_gil.data.prepare.sources.hh import read_hh
from megatron_gil.data.prepare.sources.jsonl import read_jsonl
from megatron_gil.data.prepare.sources.safe_rlhf import read_safe_rlhf
from megatron_gil.data.prepare.sources.sharegpt import read_sharegpt
from megatron_gil.data.prepare.sources.summaries import read_cnndm, read_tldr

SOURCES: Mapping[str, Reader] = {
    "hh": read_hh,
    "tldr": read_tldr,
    "sharegpt": read_sharegpt,
    "safe-rlhf": read_safe_rlhf,
    "cnndm": read_cnndm,
    "jsonl": read_jsonl,
}


def guess_reader(row: Mapping[str, Any]) -> Reader:
    """The reader for a row, known by a field that only its source has."""
    telling = {"query": read_tldr, "post": read_tldr, "info": read_tldr, "article": read_cnndm}
    telling |= {"conversations": read_sharegpt, "response_0": read_safe_rlhf}
    return next((reader for name, reader in telling.items() if name in row), read_jsonl)
