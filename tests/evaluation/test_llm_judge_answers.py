"""The file of answers: kept once they are said to be, and refused in one line where it is not what it should be."""

import asyncio
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_gil.config import ConfigError
from megatron_gil.evaluation.llm_judge.answers import Answer, AnswerStore, StoreFailed
from megatron_gil.evaluation.llm_judge.standing import standing_of

ANSWER = Answer(
    key="k",
    model="m",
    base_url="http://h/v1",
    rubric="helpful",
    instruction="Which?",
    prompt="p",
    first="a\x00b\u2028",
    second="",
    temperature=0.0,
    max_tokens=1024,
    kind="verdict",
    verdict="win",
    text="VERDICT: A",
    reason="",
    tokens_in=5,
    tokens_out=None,
    seconds=0.25,
    time="2026-01-01T00:00:00Z",
)


def keep(store: AnswerStore, *answers: Answer) -> None:
    async def all_at_once() -> None:
        await asyncio.gather(*(store.keep(answer) for answer in answers))

    asyncio.run(all_at_once())


def test_what_is_kept_is_on_the_disk_and_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "answers.sqlite"
    store = AnswerStore(path)
    keep(store, ANSWER, replace(ANSWER, kind="off_form", verdict=None), replace(ANSWER, key="other"))
    store.close()
    again = AnswerStore(path)
    assert again.answers("k") == [ANSWER, replace(ANSWER, kind="off_form", verdict=None)]
    assert again.answers("none") == []
    again.close()
    assert [p.name for p in path.parent.iterdir()] == ["answers.sqlite"]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    store = AnswerStore(path)
    for read_only in (False, True):
        with pytest.raises(ConfigError, match=r"answers\.sqlite: in use by another evaluation; wait for its end"):
            AnswerStore(path, read_only=read_only)
    store.close()
    AnswerStore(path).close()


def _other_program(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE t (x)")
    connection.close()


def _other_version(path: Path) -> None:
    AnswerStore(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 7")
    connection.close()


def _damaged(path: Path) -> None:
    store = AnswerStore(path)
    keep(store, *(replace(ANSWER, key=str(i), text="x" * 500) for i in range(300)))
    store.close()
    content = path.read_bytes()
    path.write_bytes(content[:8192] + b"\xff" * 20_000 + content[28_192:])


def _cut(path: Path) -> None:
    _damaged(path)
    path.write_bytes(path.read_bytes()[:10_000])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.write_text("prompt,response\n" * 100), "no SQLite file; name another --answers"),
        (_other_program, "a database of something else; name another --answers"),
        (_other_version, "answers in form 7, this version reads 1; name another --answers"),
        (_damaged, r"damaged \(.*\); name another --answers"),
        (_cut, r"damaged \(.*\); name another --answers"),
        (lambda path: path.mkdir(), "no file; name another --answers"),
        (lambda path: path.symlink_to("/dev/null"), "no file; name another --answers"),
        (lambda path: path.symlink_to("/proc/nothing"), "cannot be opened: unable to open"),
    ],
)
def test_what_is_no_file_of_answers_is_refused_in_one_line_and_stays_as_it_is(
    make, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "answers.sqlite"
    make(path)
    before = path.read_bytes() if path.is_file() else b""
    for read_only in (False, True):
        with pytest.raises(ConfigError, match=reason if not read_only else None) as error:
            AnswerStore(path, read_only=read_only)
        assert "\n" not in str(error.value)
        assert str(error.value).startswith(f"{path}: ")
    assert (path.read_bytes() if path.is_file() else b"") == before


def test_an_empty_file_is_one_without_answers(tmp_path: Path) -> None:
    """Its maker was killed before it wrote."""
    path = tmp_path / "answers.sqlite"
    path.write_bytes(b"")
    reader = AnswerStore(path, read_only=True)
    assert reader.answers("k") == []
    reader.close()
    assert path.read_bytes() == b""
    store = AnswerStore(path)
    keep(store, ANSWER)
    store.close()


def test_a_file_system_without_writing(tmp_path: Path) -> None:
    path = tmp_path / "version"
    path.symlink_to("/proc/version")
    with pytest.raises(ConfigError, match="name another --answers"):
        AnswerStore(path)


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be opened: .*; name another --answers"):
        AnswerStore(tmp_path / "file" / "answers.sqlite")


def test_a_full_disk_is_said_and_what_was_kept_stays(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    store = AnswerStore(path)
    keep(store, ANSWER)
    store._connection.execute("PRAGMA max_page_count = 10")  # as SQLite says that a disk is full
    with pytest.raises(StoreFailed, match=r"answers\.sqlite: database or disk is full; make room"):
        keep(store, replace(ANSWER, text="x" * 100_000))
    with pytest.raises(StoreFailed, match="is full"):
        keep(store, ANSWER)
    store.close()
    again = AnswerStore(path)
    assert again.answers("k") == [ANSWER]
    again.close()


def test_answers_on_their_way_are_written_by_close(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path / "answers.sqlite")

    async def leave_at_once() -> None:
        tasks = [asyncio.create_task(store.keep(ANSWER)) for _ in range(50)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(leave_at_once())
    store.close()
    again = AnswerStore(tmp_path / "answers.sqlite")
    assert len(again.answers("k")) == 50
    again.close()


def test_what_follows_from_answers() -> None:
    def state(*answers: Answer, max_tokens: int = 1024) -> tuple[object, ...]:
        found = standing_of(answers, base_url="http://h/v1", max_tokens=max_tokens)
        return (found.state, found.temperature, found.max_tokens) if found.state == "open" else (found.state,)

    off_form = replace(ANSWER, kind="off_form", verdict=None)
    cut, cut_later = replace(off_form, kind="cut"), replace(off_form, kind="cut", max_tokens=4096)
    too_long = replace(off_form, kind="too_long")
    assert state() == ("open", 0.0, 1024)
    assert state(off_form) == ("open", 0.7, 1024)
    assert state(off_form, off_form) == ("open", 0.7, 1024)
    assert state(off_form, off_form, off_form) == ("refused",)
    assert state(off_form, ANSWER) == ("verdict",)
    assert state(cut) == ("open", 0.0, 4096)
    assert state(cut, off_form) == ("open", 0.7, 4096)
    assert state(cut, cut_later) == ("refused",)
    assert state(cut, cut_later, max_tokens=2048) == ("open", 0.0, 8192)
    assert state(cut, max_tokens=2048) == ("open", 0.0, 2048)
    assert state(too_long) == ("refused",)
    assert state(too_long, max_tokens=100) == ("open", 0.0, 100)
    assert state(replace(too_long, base_url="http://other/v1")) == ("open", 0.0, 1024)
    assert state(replace(off_form, kind="refused")) == ("refused",)
