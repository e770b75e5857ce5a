"""Every answer of a judge, kept in an SQLite file: what was paid for once is asked no more.

The file has a rollback journal, which cluster file systems bear (a write-ahead log needs shared memory), and belongs to
one process at a time.
"""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Literal

from megatron_gil.config import ConfigError
from megatron_gil.evaluation.judge import Verdict

APPLICATION, VERSION = 0x4D47414E, 1
"""Numbers in the file's head: what it is (MGAN; ratings have another), and the form of its table."""

Kind = Literal["verdict", "off_form", "cut", "refused", "too_long"]
"""off_form: without a verdict in its last line. cut: the same, at the limit on tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    key: str
    """Of the question."""
    model: str
    base_url: str
    rubric: str
    instruction: str
    prompt: str
    first: str
    second: str
    temperature: float
    """As asked for; a model may have none but its own."""
    max_tokens: int
    kind: Kind
    verdict: Verdict | None
    """For the first response."""
    text: str
    reason: str
    """Why there is no verdict."""
    tokens_in: int | None
    tokens_out: int | None
    seconds: float
    time: str
    """UTC."""


_COLUMNS = tuple(field.name for field in fields(Answer))
_NUMBERS = {"temperature": "REAL", "seconds": "REAL", "max_tokens": "INTEGER", "tokens_in": "INTEGER"}
_NUMBERS["tokens_out"] = "INTEGER"


class StoreFailed(Exception):
    """The file takes no more."""


class AnswerStore:
    """One connection: of the thread that opens it until the first `keep`, of a writing thread from then on."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Made where there is none. ConfigError, in one line, where it cannot be read or written, is in use, damaged,
        or something else."""
        self.path = path
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path}: no file; name another --answers")
        try:
            if not read_only:
                path.parent.mkdir(parents=True, exist_ok=True)
            # who only reads must still undo what a killed writer left half-written
            target = f"{path.absolute().as_uri()}?mode={'rw' if read_only else 'rwc'}"
            self._connection = sqlite3.connect(
                target, uri=True, timeout=0.5, isolation_level=None, check_same_thread=False
            )
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(f"{path}: cannot be opened: {error}; name another --answers") from None
        try:
            self._prepare(read_only)
        except (sqlite3.Error, ConfigError) as error:
            self._connection.close()
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{path}: {_meaning(error)}") from None
        self._waiting: queue.SimpleQueue[tuple[Answer, Future[None]] | None] = queue.SimpleQueue()
        self._writer: threading.Thread | None = None
        self._failure: str = ""

    def _prepare(self, read_only: bool) -> None:
        run = self._connection.execute
        owner, version = run("PRAGMA application_id").fetchone()[0], run("PRAGMA user_version").fetchone()[0]
        tables = run("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if tables and owner != APPLICATION:
            raise ConfigError(f"{self.path}: a database of something else; name another --answers")
        if tables and version != VERSION:
            raise ConfigError(
                f"{self.path}: answers in form {version}, this version reads {VERSION}; name another --answers"
            )
        damage = run("PRAGMA quick_check(1)").fetchone()[0]
        if damage != "ok":
            raise sqlite3.DatabaseError(damage)
        self._is_empty = read_only and not tables  # its maker was killed before it wrote
        if not read_only:
            run("PRAGMA locking_mode = EXCLUSIVE")
            run("PRAGMA journal_mode = DELETE")
            run("PRAGMA synchronous = FULL")
            run("BEGIN EXCLUSIVE")
            columns = ", ".join(f"{name} {_NUMBERS.get(name, 'TEXT')}" for name in _COLUMNS)
            run(f"CREATE TABLE IF NOT EXISTS answers (id INTEGER PRIMARY KEY, {columns})")
            run("CREATE INDEX IF NOT EXISTS answers_of_key ON answers (key)")
            run(f"PRAGMA application_id = {APPLICATION}")
            run(f"PRAGMA user_version = {VERSION}")  # a write: whether the file takes one
            run("COMMIT")

    def answers(self, key: str) -> list[Answer]:
        """In the order in which they came."""
        assert self._writer is None
        if self._is_empty:
            return []
        try:
            rows = self._connection.execute(
                f"SELECT {', '.join(_COLUMNS)} FROM answers WHERE key = ? ORDER BY id", (key,)
            )
            return [Answer(**dict(zip(_COLUMNS, row, strict=True))) for row in rows]
        except sqlite3.Error as error:
            raise ConfigError(f"{self.path}: {_meaning(error)}") from None

    async def keep(self, answer: Answer) -> None:
        """Returns once it is on the disk. StoreFailed where it is not."""
        if self._writer is None:
            self._writer = threading.Thread(target=self._write, name="answers", daemon=True)
            self._writer.start()
        kept: Future[None] = Future()
        self._waiting.put((answer, kept))
        await asyncio.wrap_future(kept)

    def close(self) -> None:
        """What waits to be written is."""
        if self._writer is not None:
            self._waiting.put(None)
            self._writer.join()
        self._connection.close()

    def _write(self) -> None:
        """All that came while the last commit was on its way goes into the next one."""
        is_last = False
        while not is_last:
            batch = [self._waiting.get()]
            while not self._waiting.empty():
                batch.append(self._waiting.get())
            is_last = None in batch
            items = [item for item in batch if item is not None]
            alive = [kept for _, kept in items if kept.set_running_or_notify_cancel()]
            failure = self._commit([answer for answer, _ in items])
            for kept in alive:
                if failure:
                    kept.set_exception(StoreFailed(failure))
                else:
                    kept.set_result(None)

    def _commit(self, answers: Sequence[Answer]) -> str:
        """What went wrong, after which nothing is written any more."""
        if self._failure or not answers:
            return self._failure
        marks = ", ".join("?" * len(_COLUMNS))
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.executemany(
                f"INSERT INTO answers ({', '.join(_COLUMNS)}) VALUES ({marks})", [astuple(answer) for answer in answers]
            )
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            if self._connection.in_transaction:
                self._connection.rollback()
            self._failure = f"{self.path}: {_meaning(error)}"
        return self._failure


def other_servers(answers: Iterable[Answer], base_url: str) -> list[str]:
    """Where answers came from, if not from here."""
    return sorted({answer.base_url for answer in answers} - {base_url})


def _meaning(error: sqlite3.Error) -> str:
    """Its message with the fix."""
    code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return "in use by another evaluation; wait for its end, or name another --answers"
    if code == sqlite3.SQLITE_NOTADB:
        return "no SQLite file; name another --answers"
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return f"cannot be written ({error}); name another --answers"
    if code == sqlite3.SQLITE_FULL:
        return f"{error}; make room, then start the same command again"
    if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_PROTOCOL):
        return f"{error}; where its file system does not lock files, name --answers on another"
    return f"damaged ({error}); name another --answers"
