"""The rating pages: what raters see and do not see, what is kept of it, and who may ask for what."""

import base64
import json
import re
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import httpx2
import pytest

from megatron_gil.cli import main
from megatron_gil.config import ConfigError
from megatron_gil.evaluation.comparisons import pair_files, read_judgments
from megatron_gil.evaluation.llm_judge.answers import AnswerStore
from megatron_gil.evaluation.rubrics import read_rubric
from megatron_gil.evaluation.tables import summarise
from megatron_gil.evaluation.web.access import Access
from megatron_gil.evaluation.web.app import make_app
from megatron_gil.evaluation.web.store import RatingStore, read_ratings
from megatron_gil.evaluation.web.study import Study, make_study
from megatron_gil.evaluation.web.text import Piece, Turn, passages, turns
from tests.evaluation.rating import InProcess, hidden_fields, position, rate, rate_all, say_name, shown, write_responses

KEY = b"k" * 32
SECRETS = ("secret_policy", "secret_opponent", "other_opponent")
Open = Callable[..., httpx2.Client]


def study_of(directory: Path, number: int = 6, seed: int = 1) -> Study:
    """Ours is better in each row, the same in the row before the last, and the last row is the first once more. The
    second opponent says the same as the first in every row but one."""
    ours = [(f"prompt {i}", f"good {i}") for i in range(number)]
    theirs = [(f"prompt {i}", f"bad {i}") for i in range(number)]
    ours, theirs = [*ours, ("same?", "equal"), ours[0]], [*theirs, ("same?", " equal\n"), theirs[0]]
    files = {SECRETS[0]: ours, SECRETS[1]: theirs, SECRETS[2]: [("prompt 0", "bad, but other"), *theirs[1:]]}
    mine, *others = write_responses(directory, files)
    return make_study(pair_files(mine, others), policy=mine.stem, rubric=read_rubric("summary"), seed=seed)


CHOOSE = {f"good {i}": "better" for i in range(100)}


@pytest.fixture
def visit(tmp_path: Path) -> Iterator[Open]:
    """Opens the pages as a new browser would. The file of ratings is the same for all of a test."""
    opened: list[RatingStore] = []

    def open_pages(
        raters: tuple[str, ...] = (),
        overlap: int | None = None,
        *,
        key: bytes = KEY,
        number: int = 6,
        hosts: frozenset[str] | None = frozenset({"testserver"}),
        is_https: bool = False,
    ) -> httpx2.Client:
        study = study_of(tmp_path, number)
        store = RatingStore(tmp_path / "ratings.sqlite", study)
        opened.append(store)
        store.set_raters(study, raters, overlap)
        app = make_app(study, store, Access(key, raters), hosts=hosts, is_https=is_https)
        url = "https://testserver" if is_https else "http://testserver"
        return httpx2.Client(transport=InProcess(app), base_url=url)

    yield open_pages
    for store in opened:
        store.close()


def enter(client: httpx2.Client, rater: str, key: bytes = KEY) -> str:
    """The first page after a rater's link."""
    answer = client.get("/", params={"token": Access(key, [rater]).token(rater)})
    assert (answer.status_code, answer.headers["location"]) == (303, "/welcome")
    assert '<meta http-equiv="refresh" content="0; url=/">' in client.get("/welcome").text
    return client.get("/").text


# --- what is asked


def test_every_pair_is_asked_about_once_and_equal_responses_are_not(visit: Open, tmp_path: Path) -> None:
    client = visit()
    say_name(client, "Anna")
    pages = rate_all(client, CHOOSE)
    assert [position(page) for page in pages] == [f"{i} of 7" for i in range(1, 8)]
    assert sorted(shown(page)[0] for page in pages) == sorted([f"prompt {i}" for i in range(6)] + ["prompt 0"])
    assert position(client.get("/").text) == "All rated"

    found = read_ratings(tmp_path / "ratings.sqlite")
    assert {(j.task, j.judge, j.policy) for j in found} == {("", "people", SECRETS[0])}
    by_prompt = Counter((j.prompt, j.opponent, j.theirs, j.rater, j.outcome) for j in found)
    one, two = SECRETS[1:]
    wanted = {(f"prompt {i}", name, f"bad {i}", "Anna", "win"): 1 for i in range(1, 6) for name in (one, two)}
    wanted |= {("prompt 0", name, "bad 0", "Anna", "win"): 1 for name in (one, two)}  # the row that was there twice
    wanted |= {("prompt 0", two, "bad, but other", "Anna", "win"): 1}
    wanted |= {("same?", name, " equal\n", "", "tie"): 1 for name in (one, two)}
    assert by_prompt == wanted


def test_ratings_become_the_same_tables(visit: Open, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Anna always takes ours, Ben the first place. Identical responses are ties of no rater's."""
    for rater, choose in (("Anna", CHOOSE), ("Ben", "first")):
        client = visit()
        say_name(client, rater)
        rate_all(client, choose)
    files = [str(tmp_path / f"{name}.jsonl") for name in SECRETS]
    people = ["--judge", "people", "--ratings", str(tmp_path / "ratings.sqlite")]
    output = tmp_path / "people.json"
    assert main(["evaluate", *files, *people, "--task", "letters", "--output", str(output)]) == 0
    assert "15 of 15 pairs are rated in" in capsys.readouterr().err
    table = json.loads(output.read_text())
    assert (table["judge"], table["task"], table["ours"]) == ("people", "letters", SECRETS[0])
    said = read_judgments(tmp_path / "people.judgments.jsonl")
    one = [j for j in said if j.opponent == SECRETS[1]]
    assert Counter(j.rater for j in one) == {"Anna": 6, "Ben": 6, "": 1}
    wins = sum(j.outcome == "win" for j in one if j.rater == "Ben")
    assert table["opponents"][SECRETS[1]]["win"]["value"] == pytest.approx((6 + wins) / 2 / 7)
    (raters,) = summarise(said).raters
    assert (raters.num_raters, raters.num_items) == (2, 7)
    assert table["opponents"][SECRETS[1]]["position"]["both_orders"] == 0

    write_responses(tmp_path, {"others": [("a prompt that nobody saw", "r")]})
    others = str(tmp_path / "others.jsonl")
    assert main(["evaluate", others, others, *people]) == 2
    assert "ratings.sqlite: rates none of the pairs of" in capsys.readouterr().err
    assert main(["evaluate", *files, "--judge", "people"]) == 2
    assert "--judge people and --ratings FILE.sqlite" in capsys.readouterr().err


def test_ratings_and_a_judges_answers_are_told_apart(visit: Open, tmp_path: Path) -> None:
    visit()
    with pytest.raises(ConfigError, match=r"ratings\.sqlite: a database of something else; name another --answers"):
        AnswerStore(tmp_path / "ratings.sqlite", read_only=True)
    AnswerStore(tmp_path / "answers.sqlite").close()
    with pytest.raises(ConfigError, match=r"answers\.sqlite: an SQLite file, but no file of ratings"):
        read_ratings(tmp_path / "answers.sqlite")


def test_a_choice_counts_for_the_response_on_that_side(visit: Open, tmp_path: Path) -> None:
    sides = {}
    for rater, choice in (("Anna", "first"), ("Ben", "second"), ("Cleo", "tie")):
        client = visit()
        say_name(client, rater)
        sides[rater] = {
            shown(page)[:1] + tuple(sorted(shown(page)[1:])): shown(page) for page in rate_all(client, choice)
        }
    for j in read_ratings(tmp_path / "ratings.sqlite"):
        if j.rater:
            ours_first = sides[j.rater][j.prompt, *sorted((j.ours, j.theirs))][1] == j.ours
            outcome = {"Anna": ("lose", "win"), "Ben": ("win", "lose"), "Cleo": ("tie", "tie")}[j.rater][ours_first]
            assert j.outcome == outcome
            assert (j.ours_first, j.theirs_first) == ((outcome, None) if ours_first else (None, outcome))


def test_identical_responses_are_ties_only_as_far_as_raters_have_come(visit: Open, tmp_path: Path) -> None:
    study = study_of(tmp_path, 200)
    (equal,) = set(range(len(study.items))) - set(study.to_rate)
    client = visit(number=200)
    page = say_name(client, "Anna").text
    assert rate(client, page, "tie").status_code == 303
    found = read_ratings(tmp_path / "ratings.sqlite")
    (item,) = (i for i, c in enumerate(study.items) if c.prompt == shown(page)[0] and c.theirs in shown(page))
    assert any(not j.rater for j in found) == (equal < item)


def test_sides_and_order_are_a_function_of_seed_rater_and_item(tmp_path: Path) -> None:
    study, again, other = study_of(tmp_path, 300), study_of(tmp_path, 300), study_of(tmp_path, 300, seed=2)
    items = range(len(study.items))
    sides = {rater: [study.ours_first(rater, i) for i in items] for rater in ("Anna", "Ben")}
    assert all(0.4 < sum(of) / len(of) < 0.6 for of in sides.values())
    assert 0.4 < sum(a == b for a, b in zip(*sides.values(), strict=True)) / len(items) < 0.6
    assert sides["Anna"] == [again.ours_first("Anna", i) for i in items]
    assert sides["Anna"] != [other.ours_first("Anna", i) for i in items]
    orders = [s.in_order(rater, s.to_rate) for s, rater in ((study, "Anna"), (again, "Anna"), (study, "Ben"))]
    assert orders[0] == orders[1] != orders[2]
    assert all(sorted(order) == list(study.to_rate) for order in orders)
    assert {i // 20 for i in orders[0][:19]} == {0}, "raters who stop early have rated the same pairs"
    assert list(study.items) != list(other.items)


def test_nothing_that_reaches_the_browser_says_whose_a_response_is(visit: Open, tmp_path: Path) -> None:
    client = visit()
    say_name(client, "Anna")
    answers = [client.get(path) for path in ("/", "/style.css", "/rate.js", "/welcome", "/nowhere")]
    pages: dict[bool, set[str]] = {True: set(), False: set()}
    while 'action="/rate"' in (answer := client.get("/")).text:
        answers += [answer, rate(client, answer.text, "first")]
        answers.append(client.get(f"/pair/{hidden_fields(answer.text)['item']}"))
        prompt, first, second = shown(answer.text)
        page = answer.text.replace(first, "RESPONSE").replace(second, "RESPONSE").replace(prompt, "PROMPT")
        pages[first.startswith("good")].add(re.sub(r'value="[^"]+"|\d+ of \d+|/pair/\d+|<nav[^$]*</nav>', "", page))
    assert pages[True] == pages[False], "the same page, whichever side is ours"
    assert len(pages[True]) == 1
    for answer in answers:
        cookies = "".join(base64.urlsafe_b64decode(c.split(".")[0] + "==").decode() for c in client.cookies.values())
        for name in (*SECRETS, str(tmp_path), "jsonl", "summary"):
            assert name not in f"{answer.text}{answer.headers}{cookies}" or (
                name == "summary" and "Which s" in answer.text
            )


# --- undo


def test_back_over_several_pairs_and_on_again(visit: Open, tmp_path: Path) -> None:
    client = visit()
    say_name(client, "Anna")
    items = []
    for _ in range(3):
        page = client.get("/").text
        items.append(int(hidden_fields(page)["item"]))
        rate(client, page, "first")
    page = client.get("/").text
    for step in (3, 2, 1):
        (back,) = re.findall(r'<a href="(/pair/\d+)" data-key="u"', page)
        page = client.get(back).text
        assert position(page) == f"{step} of 7"
        assert "You rated this pair: <strong>Response 1 is better" in page
    assert 'data-key="u"' not in page
    answer = rate(client, page, "tie")
    assert answer.headers["location"] == f"/pair/{items[1]}", "on to the one that came after"
    assert "<strong>Tie" in client.get(f"/pair/{items[0]}").text
    (onward,) = re.findall(r'<a href="([^"]*)" data-key="n"', client.get(f"/pair/{items[2]}").text)
    assert position(client.get(onward).text) == "4 of 7"

    study = study_of(tmp_path)
    outcomes = {(j.prompt, j.theirs): j.outcome for j in read_ratings(tmp_path / "ratings.sqlite") if j.rater}
    changed = study.items[items[0]]
    assert outcomes.pop((changed.prompt, changed.theirs)) == "tie"
    assert len(outcomes) == 2
    assert "tie" not in outcomes.values()
    with closing(sqlite3.connect(tmp_path / "ratings.sqlite")) as connection:
        assert connection.execute("SELECT count(*) FROM ratings").fetchone() == (4,), "the one taken back stays known"


def test_a_form_sent_twice_counts_once_and_an_old_one_changes_nothing(visit: Open, tmp_path: Path) -> None:
    client = visit()
    page = say_name(client, "Anna").text
    assert [rate(client, page, choice).status_code for choice in ("first", "first", "second")] == [303] * 3
    assert position(client.get("/").text) == "2 of 7"
    assert f"Response {1} is better</strong>" in client.get(f"/pair/{hidden_fields(page)['item']}").text
    assert len({(j.prompt, j.theirs) for j in read_ratings(tmp_path / "ratings.sqlite") if j.rater}) == 1


def test_a_pair_to_come_is_not_shown(visit: Open) -> None:
    client = visit()
    first = int(hidden_fields(say_name(client, "Anna").text)["item"])
    codes = {item: client.get(f"/pair/{item}").status_code for item in range(9)}
    assert codes.pop(first) == 200
    assert set(codes.values()) == {404}


# --- raters


def test_a_name_is_the_way_back(visit: Open, tmp_path: Path) -> None:
    client = visit()
    rate(client, say_name(client, " Anna  B ").text, "tie")
    assert position(say_name(visit(), "anna b").text) == "2 of 7"
    assert {j.rater for j in read_ratings(tmp_path / "ratings.sqlite")} - {""} == {"Anna B"}
    for name, said in (("", "is empty"), ("x" * 41, "more than 40"), ("a\u202eb", "cannot be seen")):
        answer = say_name(visit(), name)
        assert (answer.status_code, said in answer.text) == (400, True)
    left = client.post("/leave", data=hidden_fields(client.get("/").text.partition("<main>")[0]))
    assert left.status_code == 303
    assert position(client.get("/").text) == "Your name"


@pytest.mark.parametrize("overlap", [1, 2, 3])
def test_pairs_are_dealt_out_evenly(tmp_path: Path, overlap: int) -> None:
    study, raters = study_of(tmp_path, 40), ("anna", "ben", "cleo")
    shares = study.deal(raters, overlap, {})
    assert {len([r for r in raters if i in shares[r]]) for i in study.to_rate} == {overlap}
    sizes = [len(share) for share in shares.values()]
    assert max(sizes) - min(sizes) <= 1
    common = [len(shares[a] & shares[b]) for a, b in (raters[:2], raters[1:], raters[::2])]
    assert max(common) - min(common) <= 2


def test_raters_rate_their_shares_and_a_new_one_takes_what_is_left(visit: Open, tmp_path: Path) -> None:
    raters = ("anna", "ben", "cleo")
    client = visit(raters, 2)
    enter(client, "anna")
    num_anna = len(rate_all(client, CHOOSE))
    assert num_anna in (4, 5)
    later = visit(("ben", "dora"), 2)
    enter(later, "dora")
    num_dora = len(rate_all(later, CHOOSE))
    ben = visit(("ben", "dora"), 2)
    enter(ben, "ben")
    rate_all(ben, CHOOSE)
    found = {(j.prompt, j.theirs, j.rater) for j in read_ratings(tmp_path / "ratings.sqlite") if j.rater}
    assert set(Counter(found_item[:2] for found_item in found).values()) == {2}
    assert Counter(rater for *_, rater in found)["dora"] == num_dora
    nobody = visit(("emil",), 1)
    assert position(enter(nobody, "emil")) == "Nothing to rate"


def test_without_a_token_there_is_nothing_to_see(visit: Open, tmp_path: Path) -> None:
    raters = ("anna", "ben")
    client = visit(raters)
    assert client.get("/").status_code == 403
    assert client.get("/", params={"token": "0" * 43}).status_code == 403
    assert client.post("/name", data={"name": "anna", "seal": ""}).status_code == 403
    assert position(enter(client, "anna")) == "1 of 7"
    rate(client, client.get("/").text, "tie")
    content = (tmp_path / "ratings.sqlite").read_bytes()
    assert Access(KEY, raters).token("anna").encode() not in content
    assert KEY not in content

    cookie = dict(client.cookies)
    for other in (visit(("ben",)), visit(raters, key=b"n" * 32)):  # anna rates no more; all links are new
        other.cookies.update(cookie)
        assert other.get("/").status_code == 403
    forged = visit(raters)
    ((name, value),) = cookie.items()
    text = base64.urlsafe_b64encode(json.dumps(["x", "ben"]).encode()).decode()
    forged.cookies.update({name: f"{text}.{value.partition('.')[2]}"})
    assert forged.get("/").status_code == 403


# --- other sites


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"sec-fetch-site": "same-origin", "origin": "http://testserver"}, 303),
        ({"origin": "http://testserver"}, 303),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"sec-fetch-site": "none"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://testserver:81"}, 403),
        ({"origin": "null"}, 403),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/json"}, 415),
        ({"host": "evil.example"}, 400),
        ({"host": "testserver.evil.example"}, 400),
        ({"host": "[::1"}, 400),
    ],
)
def test_forms_of_other_sites_are_refused(visit: Open, tmp_path: Path, headers: dict[str, str], code: int) -> None:
    client = visit()
    page = say_name(client, "Anna").text
    answer = client.post("/rate", data={**hidden_fields(page), "choice": "first"}, headers=headers)
    assert answer.status_code == code, answer.text
    assert _num_kept(tmp_path) == (code == 303)


def test_a_form_needs_the_seal_of_its_session_and_its_pair(visit: Open, tmp_path: Path) -> None:
    client, other = visit(), visit()
    fields = {**hidden_fields(say_name(client, "Anna").text), "choice": "first"}
    foreign = hidden_fields(say_name(other, "Anna").text)
    assert client.post("/rate", data={**foreign, "choice": "first"}).status_code == 403, "the same pair and rater"
    item = str((int(fields["item"]) + 1) % 7)
    bad = {"seal": [foreign["seal"], "", "0" * 43, "\xff"], "item": [item, "x", ""], "times": ["1"], "shown": ["0"]}
    for name, values in bad.items():
        for value in values:
            assert client.post("/rate", data={**fields, name: value}).status_code == 403, (name, value)
    assert client.post("/rate", data={**fields, "choice": "third"}).status_code == 400
    assert client.post("/rate", content=b"\xff", headers={"content-type": _FORM}).status_code == 400
    assert client.post("/rate", content=b"choice=%ff", headers={"content-type": _FORM}).status_code == 400
    assert client.post("/rate", content=b"a=" + b"x" * 20_000, headers={"content-type": _FORM}).status_code == 413
    assert client.post("/leave", data={"seal": fields["seal"]}).status_code == 403
    assert client.get("/rate").status_code == 405
    assert visit().post("/rate", data=fields).status_code == 403
    assert _num_kept(tmp_path) == 0
    assert client.post("/rate", data=fields).status_code == 303


_FORM = "application/x-www-form-urlencoded"


def _num_kept(directory: Path) -> int:
    with closing(sqlite3.connect(directory / "ratings.sqlite")) as connection:
        return connection.execute("SELECT count(*) FROM ratings").fetchone()[0]


def test_headers_of_every_page_and_the_cookie(visit: Open) -> None:
    client = visit(is_https=True)
    answers = [client.get(path) for path in ("/", "/welcome", "/nowhere", "/style.css", "/pair/1", "/pair/x")]
    answers += [client.post("/rate"), client.get("/", headers={"host": "evil.example"}), client.request("TRACE", "/")]
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; form-action 'self'")
        assert "unsafe" not in policy
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "Traceback" not in answer.text
        assert " on" not in re.sub(r">[^<]*<", "><", answer.text) or answer.url.path.endswith("css")
    cookie = answers[0].headers["set-cookie"].lower()
    assert all(f"; {flag}" in cookie for flag in ("httponly", "samesite=strict", "secure", "path=/"))
    assert "; secure" not in visit().get("/").headers["set-cookie"].lower()


# --- errors


def test_what_goes_wrong_is_a_plain_page(
    visit: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = visit()
    page = say_name(client, "Anna").text
    with closing(sqlite3.connect(tmp_path / "ratings.sqlite", isolation_level=None)) as other:
        monkeypatch.setattr("megatron_gil.evaluation.web.store._PATIENCE_S", 0.0)
        impatient = visit()
        impatient.cookies.update(client.cookies)
        other.execute("BEGIN EXCLUSIVE")
        answer = rate(impatient, page, "first")
    assert (answer.status_code, "the last rating was not kept" in answer.text) == (503, True)
    assert "a page was not served: the file of ratings another program is writing" in capsys.readouterr().err
    assert rate(impatient, page, "first").status_code == 303, "sent again it is kept"

    monkeypatch.setattr(Study, "ours_first", lambda *_: 1 / 0)
    answer = client.get("/")
    assert (answer.status_code, "Something broke" in answer.text) == (500, True)
    assert "Zero" not in answer.text


# --- texts


def test_a_chat_is_cut_into_turns() -> None:
    chat = "\n\nHuman: Is this\nHuman: right?\n\nAssistant: Yes.\n\nMore.\n\nHuman: And?\n\nAssistant:"
    assert [(t.speaker, t.passages[0].pieces[0].text) for t in turns(chat)] == [
        ("Human", "Is this\nHuman: right?"),
        ("Assistant", "Yes.\n\nMore."),
        ("Human", "And?"),
    ]
    assert turns("SUBREDDIT: r/x\n\nTL;DR:") == [Turn("", passages("SUBREDDIT: r/x\n\nTL;DR:"))]
    assert turns("") == [Turn("", ())]


def test_code_and_characters_that_cannot_be_seen() -> None:
    cut = passages("Look:\r\n```python\nx = 1\n```\nDone\u202e!\x00 \U0001f469\u200d\U0001f467\n")
    assert [p.is_code for p in cut] == [False, True, False]
    assert cut[1].pieces == (Piece("```python\nx = 1\n```", False),)
    assert [p.text for p in cut[2].pieces if p.is_hidden] == ["U+202E", "U+0000"]
    assert cut[2].pieces[-1].text == " \U0001f469\u200d\U0001f467", "one picture, in one piece"
    assert [p.is_code for p in passages("```\nnever closed")] == [True]
    assert passages(" \n") == ()
