"""Writing prepared rows, and the card that says what was written and what was left out."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from megatron_gil.data.prepare.sources.example import Tally


class KindWriter:
    """One JSON Lines file without repeated rows; counts what a card needs."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        self._file = path.open("wb")
        self._seen: set[bytes] = set()
        self._hash = hashlib.sha256()
        self._lengths: defaultdict[str, array[int]] = defaultdict(lambda: array("q"))
        self._groups: Counter[str] = Counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, row: Mapping[str, Any]) -> bool:
        """Whether the row was written. It is not where an earlier row equals it in everything but the group."""
        # half of a surrogate pair cannot be written as UTF-8: it becomes a question mark
        line = json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        content = json.dumps({name: value for name, value in row.items() if name != "group"})
        digest = hashlib.sha256(content.encode()).digest()[:16]
        if digest in self._seen:
            return False
        self._seen.add(digest)
        self._hash.update(line)
        self._file.write(line)
        for name, value in row.items():
            if name == "group":
                self._groups[value] += 1
            else:
                self._lengths[name].append(_num_characters(value))
        return True

    def summary(self) -> dict[str, Any]:
        characters = {name: _spread(lengths) for name, lengths in self._lengths.items()}
        groups = {"groups": dict(sorted(self._groups.items()))} if self._groups else {}
        return {"rows": len(self._seen), "characters": characters, **groups, "sha256": self._hash.hexdigest()}


def make_card(about: Mapping[str, Any], tally: Tally, writers: Mapping[tuple[str, str], KindWriter]) -> dict[str, Any]:
    """writers: by (split, kind). The card's `split_hash` changes whenever a row of any split does."""
    splits: dict[str, dict[str, Any]] = {}
    for split, kind in sorted(writers):
        splits.setdefault(split, {})[kind] = writers[split, kind].summary()
    dropped: dict[str, dict[str, int]] = {}
    for (kind, reason), count in sorted(tally.dropped.items()):
        dropped.setdefault(kind, {})[reason] = count
    hashes = "".join(entry["sha256"] for kinds in splits.values() for entry in kinds.values())
    return {
        **about,
        "rows_read": dict(sorted(tally.read.items())),
        "splits": splits,
        "dropped": dropped,
        "noted": dict(sorted(tally.noted.items())),
        "split_rule": "sha256 of the opening question",
        "split_hash": hashlib.sha256(hashes.encode()).hexdigest(),
    }


def write_card(card: Mapping[str, Any], directory: Path) -> None:
    """Writes card.json, and card.md for people to read."""
    (directory / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    (directory / "card.md").write_text(format_card(card), encoding="utf-8")


def format_card(card: Mapping[str, Any]) -> str:
    files = [
        [f"{split}/{kind}.jsonl", entry["rows"], *_format_lengths(entry["characters"])]
        for split, kinds in card["splits"].items()
        for kind, entry in kinds.items()
    ]
    dropped = [[kind, why, n] for kind, reasons in card["dropped"].items() for why, n in reasons.items()]
    noted = [[what, n] for what, n in card["noted"].items()]
    num_read = sum(card["rows_read"].values())
    parts = [
        f"# {card['source']}: {', '.join(card['inputs'])}",
        f"{num_read} rows read. Split by {card['split_rule']}, {card['eval_fraction']:g} of them to eval; split hash "
        f"{card['split_hash'][:16]}.",
        _table(["file", "rows", "characters, median (95 %, most)"], files),
    ]
    if card["exclude"]:
        parts.append(f"Prompts of {', '.join(card['exclude'])} are left out.")
    if dropped:
        parts.append("## Left out\n\n" + _table(["from", "why", "rows"], dropped))
    if noted:
        parts.append("## Repaired or kept\n\n" + _table(["what", "times"], noted))
    return "\n\n".join(parts) + "\n"


def _format_lengths(characters: Mapping[str, Mapping[str, float]]) -> list[str]:
    return [", ".join(f"{name} {c['median']:g} ({c['p95']:g}, {c['max']:g})" for name, c in characters.items())]


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _num_characters(value: Any) -> int:
    return len(value) if isinstance(value, str) else sum(len(message["content"]) for message in value)


def _spread(lengths: array[int]) -> dict[str, float]:
    values = np.asarray(lengths)
    median, p95 = np.percentile(values, [50, 95])
    return {
        "mean": round(float(values.mean()), 1),
        "median": float(median),
        "p95": float(p95),
        "max": int(values.max()),
    }
