"""`megatron-gil judge-web` as it is started and ended: kills, signals, links, and what is refused in one line."""

import json
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing, suppress
from pathlib import Path

import httpx2
import psutil
import pytest

from megatron_gil.cli import main
from megatron_gil.config import ConfigError
from megatron_gil.evaluation.comparisons import pair_files
from megatron_gil.evaluation.rubrics import read_rubric
from megatron_gil.evaluation.tables import summarise
from megatron_gil.evaluation.web.store import RatingStore, read_ratings
from megatron_gil.evaluation.web.study import make_study
from tests.evaluation.rating import START_S, position, rate, rate_all, say_name, serving, write_responses


def files(directory: Path, number: int = 4) -> list[Path]:
    rows = [(f"prompt {i}", f"good {i}") for i in range(number)]
    return write_responses(directory, {"ours": rows, "theirs": [(p, r.replace("good", "bad")) for p, r in rows]})


def test_every_rating_outlives_a_kill_and_the_same_command_goes_on(tmp_path: Path) -> None:
    ratings = tmp_path / "ratings.sqlite"
    command = [*files(tmp_path, 1000), "--output", ratings]
    confirmed = 0
    for patience_s in (0.2, 0.5):
        with serving(command) as server, server.client() as client:
            assert f"1000 pairs to rate, {confirmed} ratings so far" in server.printed[0]
            assert position(say_name(client, "Anna").text) == f"{confirmed + 1} of 1000"
            assert rate(client, client.get("/").text, "first").status_code == 303
            confirmed += 1
            killer = threading.Timer(patience_s, server.process.kill)
            killer.start()
            with suppress(httpx2.TransportError):  # at any moment, within a request too
                while rate(client, client.get("/").text, "first").status_code == 303:
                    confirmed += 1
            killer.join()
        kept = len(read_ratings(ratings))
        assert confirmed <= kept <= confirmed + 1, "one may have been kept without an answer"
        confirmed = kept
    assert confirmed >= 2


def test_signals_end_it_with_one_line_and_a_link_goes_on_after_a_restart(tmp_path: Path) -> None:
    ratings = tmp_path / "ratings.sqlite"
    command = [*files(tmp_path), "--output", ratings, "--raters", "anna", "ben", "--overlap", "2", "--host", "0.0.0.0"]
    with serving(command, num_lines=3) as server, server.client() as client:
        assert client.get("/").status_code == 403
        links = [re.sub(r"https?://[^/]+", "", line.split()[-1]) for line in server.printed[1:]]
        assert [line.split()[:4] for line in server.printed[1:]] == [[r, "0", "of", "4"] for r in ("anna", "ben")]
        page = client.get(links[0], follow_redirects=True)
        assert "token" not in str(page.url) + page.text
        assert "server" not in page.headers
        assert rate(client, client.get("/").text, "tie").status_code == 303
        code, said = server.end(signal.SIGTERM)  # with a connection open
        kept = f"ratings kept in {ratings}: 1"
        assert (code, said) == (75, f"megatron-gil judge-web: stopped by SIGTERM: {kept}; the same command goes on\n")
        before = dict(client.cookies)
    assert ratings.with_name("ratings.sqlite.key").stat().st_mode & 0o077 == 0
    with serving(command, num_lines=3) as server, server.client() as client:
        client.cookies.update(before)
        assert position(client.get("/").text) == "2 of 4"
        rate_all(client, "first")
        client.cookies.clear()
        client.get(links[1], follow_redirects=True)
        rate_all(client, "second")
        code, said = server.end(signal.SIGINT)
        assert (code, said) == (0, f"megatron-gil judge-web: everything is rated: ratings kept in {ratings}: 8\n")
    summary = summarise(read_ratings(ratings))
    (pair,), (both,) = summary.pairs, summary.raters
    assert (pair.first, pair.second, pair.num_items) == ("people: anna", "people: ben", 4)
    assert (both.num_raters, both.num_items) == (2, 4)


def test_one_server_for_a_file_and_readers_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ratings = tmp_path / "ratings.sqlite"
    command = [*files(tmp_path), "--output", ratings]
    with serving(command) as server, server.client() as client:
        rate(client, say_name(client, "Anna").text, "tie")
        assert [j.outcome for j in read_ratings(ratings)] == ["tie"]
        assert main(["judge-web", *map(str, command), "--port", "0"]) == 2
        said = capsys.readouterr().err
        assert f"megatron-gil judge-web: {ratings} is in use by process {server.process.pid} on" in said
        assert said.count("\n") == 1
        port = server.url.rpartition(":")[2]
        other = [*map(str, command[:-1]), str(tmp_path / "other.sqlite"), "--port", port]
        assert main(["judge-web", *other]) == 2
        assert "Address already in use; --port 0 takes any free one" in capsys.readouterr().err
        assert not (tmp_path / "other.sqlite").exists()


# --- what is refused in one line, before anything is written


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 can be reached from other machines: name who may rate with --raters"),
        (["--host", "::"], "can be reached from other machines"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid: "),
        (["--host", "192.0.2.1", "--raters", "a"], "--host 192.0.2.1 --port 0: Cannot assign requested address"),
        (["--port", "65536"], "--port 65536 must be"),
        (["--seed", "-1"], "--seed -1 must be"),
        (["--overlap", "1"], "--overlap needs --raters"),
        (["--raters", "a", "b", "--overlap", "3"], "--overlap 3 must be at least 1 and at most 2"),
        (["--raters", "a", "b", "--overlap", "0"], "--overlap 0 must be at least 1"),
        (["--raters", "Ann", "ann"], "--raters: ann stands there twice"),
        (["--raters", "a\tb\x07"], "holds characters that cannot be seen"),
        (["--raters", "x" * 41], "has more than 40 characters"),
        (["--public-url", "http://rate.example", "--raters", "a"], "must be https, a host, and no path"),
        (["--public-url", "https://rate.example"], "--public-url needs --raters"),
        (["--rubric", "no-such-file"], "--rubric no-such-file: No such file"),
        (["--output", "."], "is a directory"),
        (["--output", "/proc/nowhere/r.sqlite"], "cannot be written"),
    ],
)
def test_options_that_are_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    ratings = tmp_path / "ratings.sqlite"
    command = ["judge-web", *map(str, files(tmp_path)), "--output", str(ratings), "--port", "0", *options]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert {path.suffix for path in tmp_path.iterdir()} == {".jsonl"}, "nothing was written"


def test_files_that_are_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = files(tmp_path)
    rows = ours.read_text()
    cases = [
        (None, "No such file"),
        ("", "holds no responses"),
        (rows.replace("prompt 2", "another"), "row 3: the prompts differ"),
        (rows + rows, "4 responses cannot be paired with 8"),
        (rows, "nothing to rate: in all 4 pairs both responses are the same"),
        (rows.replace("good 1", "\\ud800"), "row 2 holds half of a surrogate pair"),
    ]
    for text, said in cases:
        theirs.unlink(missing_ok=True)
        if text is not None:
            theirs.write_text(text)
        assert main(["judge-web", str(ours), str(theirs), "--output", str(tmp_path / "r.sqlite"), "--port", "0"]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    assert not (tmp_path / "r.sqlite").exists()


def test_ratings_of_something_else_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = files(tmp_path)
    ratings, third = tmp_path / "ratings.sqlite", tmp_path / "third.jsonl"
    third.write_text(theirs.read_text().replace("bad 3", "worse 3"))
    study = make_study(pair_files(ours, [theirs]), policy="ours", rubric=read_rubric("helpful"), seed=1)
    RatingStore(ratings, study).close()
    content = ratings.read_bytes()

    def refused(*arguments: object) -> str:
        assert main(["judge-web", *map(str, arguments), "--output", str(ratings), "--port", "0"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert str(ratings) in error
        return error

    remedy = "give what it was made with, or name another --output"
    assert f"was made with --seed 1, not 2; {remedy}" in refused(ours, theirs, "--seed", 2)
    assert f"was made with --rubric helpful, not summary; {remedy}" in refused(ours, theirs, "--rubric", "summary")
    assert f"was made for ours against theirs, not theirs against ours; {remedy}" in refused(theirs, ours)
    assert "not ours against theirs, third" in refused(ours, theirs, third)
    shutil.copy(third, theirs)
    assert "1 of its 4 pairs are not in these files, which have 1 others" in refused(ours, theirs)
    assert ratings.read_bytes() == content

    for damage, said in (
        (b"no database at all, but text\n" * 200, "is no file of ratings"),
        (content[: len(content) // 2], "is damaged"),
        (content[:4096] + b"\x00" * 4096 + content[8192:], "is damaged"),
    ):
        ratings.write_bytes(damage)
        assert said in refused(ours, theirs)
        with pytest.raises(ConfigError, match=said):
            read_ratings(ratings)
        assert ratings.read_bytes() == damage
    ratings.unlink()
    with closing(sqlite3.connect(ratings)) as other:
        other.execute("CREATE TABLE mine (x)")
    assert "an SQLite file, but no file of ratings" in refused(ours, theirs)


def test_ratings_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such file of ratings; `megatron-gil judge-web` makes one"):
        read_ratings(tmp_path / "none.sqlite")
    ours, theirs = files(tmp_path)
    study = make_study(pair_files(ours, [theirs]), policy="ours", rubric=read_rubric("helpful"), seed=1)
    RatingStore(tmp_path / "r.sqlite", study).close()
    with pytest.raises(ConfigError, match="holds no ratings yet"):
        read_ratings(tmp_path / "r.sqlite")


def test_a_key_that_others_may_read_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["judge-web", *map(str, files(tmp_path)), "--output", str(tmp_path / "r.sqlite"), "--port", "0"]
    key = tmp_path / "r.sqlite.key"
    for content, mode, said in (("ab" * 32, 0o644, "others may read this key"), ("abc", 0o600, "holds no key")):
        key.write_text(content)
        key.chmod(mode)
        assert main(command) == 2
        assert said in capsys.readouterr().err


# --- what is imported


def test_help_imports_no_web_framework_and_without_one_a_line_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import sys; from megatron_gil.cli import main\n"
        "try: main(['judge-web', '--help'])\n"
        "except SystemExit: print(json.dumps(sorted(sys.modules)))"
    )
    command = [sys.executable, "-c", f"import json; {code}"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=START_S).stdout
    assert "usage: megatron-gil judge-web" in printed
    modules = set(json.loads(printed[printed.rindex('["') :]))
    assert not modules & {"starlette", "uvicorn", "jinja2", "torch"}

    monkeypatch.delitem(sys.modules, "megatron_gil.evaluation.web.app", raising=False)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert main(["judge-web", *map(str, files(tmp_path)), "--output", str(tmp_path / "r.sqlite")]) == 2
    assert "judge-web needs jinja2: pip install 'megatron_gil[judge]'" in capsys.readouterr().err


def test_loopback_is_the_default(tmp_path: Path) -> None:
    with serving([*files(tmp_path), "--output", tmp_path / "r.sqlite"]) as server:
        listening = psutil.Process(server.process.pid).net_connections("inet")
        assert [(one.status, one.laddr.ip) for one in listening] == [("LISTEN", "127.0.0.1")]
        with socket.create_connection(("127.0.0.1", listening[0].laddr.port)) as connection:
            connection.sendall(b"nonsense\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 400")
