"""The file of ratings: an SQLite database with the pairs, and every rating as it was given, in the order of time."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_gil.config import ConfigError
from megatron_gil.evaluation.comparisons import Comparison, Judgment
from megatron_gil.evaluation.judge import Verdict, opposite
from megatron_gil.evaluation.web.study import Study
from megatron_gil.paths import sync

Choice = Literal["first", "second", "tie"]
_VERDICT: dict[str, Verdict] = {"first": "win", "tie": "tie", "second": "lose"}
"""For the response that was shown in the first place."""
_APPLICATION = 0x4D475241  # "MGRA": tells it from other SQLite files, a judge's answers too
_VERSION = 1
_PATIENCE_S = 5.0
"""A reader waits so long for a writer, and the other way round."""

_SCHEMA = (
    "CREATE TABLE study (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE items (item INTEGER PRIMARY KEY, prompt TEXT NOT NULL, ours TEXT NOT NULL, theirs TEXT NOT NULL)",
    "CREATE TABLE opponents (item INTEGER NOT NULL REFERENCES items, opponent TEXT NOT NULL,"
    " PRIMARY KEY (item, opponent))",
    "CREATE TABLE shares (rater TEXT NOT NULL, item INTEGER NOT NULL REFERENCES items, PRIMARY KEY (rater, item))",
    "CREATE TABLE ratings (number INTEGER PRIMARY KEY, rater TEXT NOT NULL, item INTEGER NOT NULL REFERENCES items,"
    " choice TEXT NOT NULL CHECK (choice IN ('first', 'second', 'tie')),"
    " ours_first INTEGER NOT NULL CHECK (ours_first IN (0, 1)), rated_at TEXT NOT NULL, seconds REAL NOT NULL)",
    "CREATE INDEX ratings_of ON ratings (rater, item)",
    # The last rating of an item by a rater is the one that counts; those before it were taken back.
    "CREATE VIEW last_ratings AS SELECT * FROM ratings"
    " WHERE number IN (SELECT max(number) FROM ratings GROUP BY rater, item)",
    f"PRAGMA application_id = {_APPLICATION}",
    f"PRAGMA user_version = {_VERSION}",
)


@dataclass(frozen=True, slots=True)
class Kept:
    """What a rater said of an item."""

    choice: Choice
    times: int
    """How often the item was rated: more than once where the rater changed it."""


class RatingStore:
    """Of one thread. A rating is on the disk when `rate` returns."""

    def __init__(self, path: Path, study: Study) -> None:
        """Makes the file, or goes on with it. ConfigError where it is not this study's, or cannot be used."""
        self._path = path
        self._is_dealt = False
        existed = path.exists()
        with _errors(path):
            self._connection = _connect(path, create=True)
        try:
            if existed and not _is_empty(self._connection, path):
                _check(self._connection, path)
                _compare(self._connection, path, study)
            else:
                self._create(study)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._connection.close()

    def set_raters(self, study: Study, raters: Sequence[str], overlap: int | None) -> None:
        """Deals the items out. Started again with the same raters everybody keeps their share; with others, what nobody
        has rated yet is dealt out anew. overlap: None gives every rater every item."""
        self._is_dealt = overlap is not None
        wanted = repr((sorted(raters), overlap))
        with _errors(self._path), self._transaction() as connection:
            if _study_value(connection, "raters") == wanted:
                return
            connection.execute("DELETE FROM shares")
            if overlap is not None:
                shares = study.deal(raters, overlap, self._raters_of_items())
                connection.executemany(
                    "INSERT INTO shares VALUES (?, ?)", [(rater, item) for rater in shares for item in shares[rater]]
                )
            connection.execute("INSERT OR REPLACE INTO study VALUES ('raters', ?)", (wanted,))

    def share(self, study: Study, rater: str) -> list[int]:
        """Items that a rater is asked about, in their order; all that differ unless they were dealt out."""
        if not self._is_dealt:
            return study.in_order(rater, study.to_rate)
        dealt = [item for (item,) in self._connection.execute("SELECT item FROM shares WHERE rater = ?", (rater,))]
        return study.in_order(rater, dealt)

    def history(self, rater: str) -> dict[int, Kept]:
        """Item -> the rating that counts, in the order in which the items were first rated."""
        found: dict[int, Kept] = {}
        rows = self._connection.execute("SELECT item, choice FROM ratings WHERE rater = ? ORDER BY number", (rater,))
        for item, choice in rows:
            found[item] = Kept(choice, found[item].times + 1 if item in found else 1)
        return found

    def rate(
        self, rater: str, item: int, choice: Choice, *, ours_first: bool, times_before: int, seconds: float
    ) -> bool:
        """Keeps a rating, unless the item was rated in the meantime: False where it was not rated `times_before` times,
        as after a second click on the same button."""
        with self._transaction() as connection:
            query = "SELECT count(*) FROM ratings WHERE rater = ? AND item = ?"
            if connection.execute(query, (rater, item)).fetchone()[0] != times_before:
                return False
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            connection.execute(
                "INSERT INTO ratings (rater, item, choice, ours_first, rated_at, seconds) VALUES (?, ?, ?, ?, ?, ?)",
                (rater, item, choice, int(ours_first), now, round(seconds, 3)),
            )
        return True

    def num_rated(self) -> dict[str, int]:
        """Rater -> items rated, of all that have rated any."""
        return dict(self._connection.execute("SELECT rater, count(*) FROM last_ratings GROUP BY rater ORDER BY rater"))

    def _raters_of_items(self) -> dict[int, Collection[str]]:
        found: dict[int, Collection[str]] = {}
        for item, rater in self._connection.execute("SELECT item, rater FROM last_ratings"):
            found[item] = {*found.get(item, ()), rater}
        return found

    def _create(self, study: Study) -> None:
        """All in one transaction: a file that was begun and not ended is empty."""
        with _errors(self._path), self._transaction() as connection:
            for statement in _SCHEMA:
                connection.execute(statement)
            values = {
                "policy": study.policy,
                "seed": str(study.seed),
                "rubric": study.rubric.name,
                "question": study.rubric.question,
            }
            connection.executemany("INSERT INTO study VALUES (?, ?)", values.items())
            connection.executemany(
                "INSERT INTO items VALUES (?, ?, ?, ?)",
                [(i, c.prompt, c.ours, c.theirs) for i, c in enumerate(study.items)],
            )
            connection.executemany(
                "INSERT INTO opponents VALUES (?, ?)",
                [(i, name) for i, c in enumerate(study.items) for name in study.opponents[c]],
            )
        sync(self._path.parent)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield self._connection
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise


def read_ratings(path: Path) -> list[Judgment]:
    """Ratings as judgments of no task: the last one of every rater and item, one for each opponent that gave the item's
    other response. The file may be in use by a server.

    Identical responses are ties of a rater "": once, since nobody was asked, and only as far as the raters have come
    (items have one order for all raters), since all of them beside a part of the others would be too many ties.
    ConfigError where the file cannot be used or holds no rating.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file of ratings; `megatron-gil judge-web` makes one")
    with _errors(path), closing(_connect(path, create=False)) as connection:
        if _is_empty(connection, path):
            raise ConfigError(f"{path}: holds no ratings yet")
        _check(connection, path)
        connection.execute("BEGIN")  # one moment for all that is read
        policy, items = _study_value(connection, "policy"), _stored_items(connection)
        rows = connection.execute("SELECT rater, item, choice, ours_first FROM last_ratings ORDER BY number").fetchall()
    if not rows:
        raise ConfigError(f"{path}: holds no ratings yet")
    texts = list(items)
    to_rate = {item for item, comparison in enumerate(texts) if not comparison.is_identical}
    reached = {item for _, item, _, _ in rows}
    last = len(texts) if reached >= to_rate else max(reached)
    found: list[Judgment] = []
    for rater, item, choice, ours_first in (
        *(("", item, None, None) for item in range(last) if item not in to_rate),
        *rows,
    ):
        verdict: Verdict | None = None
        if choice is not None:
            verdict = _VERDICT[choice] if ours_first else opposite(_VERDICT[choice])
        comparison = texts[item]
        found += [
            Judgment(
                task="",
                judge="people",
                rater=rater,
                policy=policy or "",
                opponent=opponent,
                prompt=comparison.prompt,
                ours=comparison.ours,
                theirs=comparison.theirs,
                outcome=verdict or "tie",
                ours_first=verdict if ours_first else None,
                theirs_first=None if ours_first else verdict,
            )
            for opponent in items[comparison]
        ]
    return found


def _connect(path: Path, *, create: bool) -> sqlite3.Connection:
    """A rollback journal, since a write-ahead log needs memory that the machines of a cluster do not share. EXTRA is
    FULL and also brings the journal's removal to the disk, without which a power cut could undo a rating."""
    uri = f"{path.absolute().as_uri()}?mode={'rwc' if create else 'rw'}"
    connection = sqlite3.connect(uri, uri=True, timeout=_PATIENCE_S, isolation_level=None)
    if create:
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.execute("PRAGMA synchronous = EXTRA")
    return connection


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    """What SQLite says of a file, as the user's to correct."""
    try:
        yield
    except sqlite3.Error as error:
        raise ConfigError(f"{path}: {said(error)}") from None


def said(error: sqlite3.Error) -> str:
    """An error of SQLite in the words of a user."""
    text = str(error)
    if "locked" in text:
        return "another program is writing to it; end that one, or name another --output"
    if "not a database" in text:
        return "is no file of ratings; name another --output"
    if "malformed" in text:
        return "is damaged; put back a copy of it, or name another --output"
    return f"cannot be used: {text}"


def _is_empty(connection: sqlite3.Connection, path: Path) -> bool:
    with _errors(path):
        return connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0


def _check(connection: sqlite3.Connection, path: Path) -> None:
    """That it is a file of ours, of this version, and whole."""
    with _errors(path):
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if application != _APPLICATION:
            raise ConfigError(f"{path}: an SQLite file, but no file of ratings; name another --output")
        if version != _VERSION:
            raise ConfigError(f"{path}: made by another version of megatron-gil (form {version}, here {_VERSION})")
        (state,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if state != "ok":
            raise ConfigError(f"{path}: is damaged; put back a copy of it, or name another --output")


def _study_value(connection: sqlite3.Connection, name: str) -> str | None:
    found = connection.execute("SELECT value FROM study WHERE name = ?", (name,)).fetchone()
    return found[0] if found else None


def _stored_items(connection: sqlite3.Connection) -> dict[Comparison, tuple[str, ...]]:
    """Every comparison in the order of its number -> its opponents."""
    names: dict[int, list[str]] = {}
    for item, opponent in connection.execute("SELECT item, opponent FROM opponents ORDER BY rowid"):
        names.setdefault(item, []).append(opponent)
    rows = connection.execute("SELECT item, prompt, ours, theirs FROM items ORDER BY item")
    return {Comparison(prompt=p, ours=o, theirs=t): tuple(names.get(item, ())) for item, p, o, t in rows}


def _compare(connection: sqlite3.Connection, path: Path, study: Study) -> None:
    """ConfigError that says in what the study differs from the one that the file was made for."""
    with _errors(path):
        values = {name: _study_value(connection, name) for name in ("policy", "seed", "rubric", "question")}
        stored = _stored_items(connection)
    remedy = "give what it was made with, or name another --output"
    if values["seed"] != str(study.seed):
        raise ConfigError(f"{path}: was made with --seed {values['seed']}, not {study.seed}; {remedy}")
    if values["question"] != study.rubric.question:
        other = "another text" if values["rubric"] == study.rubric.name else f"not {study.rubric.name}"
        raise ConfigError(f"{path}: was made with --rubric {values['rubric']}, {other}; {remedy}")
    names, wanted = ({name for of in found.values() for name in of} for found in (stored, study.opponents))
    before, here = ({(c, name) for c, of in found.items() for name in of} for found in (stored, study.opponents))
    if values["policy"] != study.policy or names != wanted:
        was, now = (
            f"{p} against {', '.join(sorted(n))}" for p, n in ((values["policy"], names), (study.policy, wanted))
        )
        raise ConfigError(f"{path}: was made for {was}, not {now}; {remedy}")
    if before != here:
        raise ConfigError(
            f"{path}: {len(before - here)} of its {len(before)} pairs are not in these files, which have "
            f"{len(here - before)} others; {remedy}"
        )
