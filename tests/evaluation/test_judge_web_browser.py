"""The rating pages in Chromium: by keys alone, at a laptop's and a phone's width, and with text that means harm."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megatron_gil.evaluation.web.store import read_ratings
from tests.evaluation.rating import Server, serving, write_responses

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'megatron_gil[test]'")

PATIENCE_MS = 120_000
"""On a machine that is busy."""
SETTLE_MS = 450
"""rate.js takes no rating sooner than 400 ms after a page is shown."""
LAPTOP, PHONE = {"width": 1366, "height": 768}, {"width": 390, "height": 844}
CHAT = "Human: How do tides work?\n\nAssistant: The moon pulls.\n\nHuman: " + "And the sun? " * 300 + "\n\nAssistant:"
ROWS = [
    (CHAT, "It pulls too. " * 400, "word " * 900 + "x" * 400),
    ("What is 2 + 2?", "4", ""),
    ("Code?", "```python\nx = 1\n```", "No."),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no chromium on PATH")
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


@contextmanager
def serving_rows(directory: Path, rows: list[tuple[str, str, str]]) -> Iterator[Server]:
    both = {"ours": [(p, a) for p, a, _ in rows], "theirs": [(p, b) for p, _, b in rows]}
    with serving([*write_responses(directory, both), "--output", directory / "ratings.sqlite"]) as server:
        yield server


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ratings")


@pytest.fixture(scope="module")
def served(directory: Path) -> Iterator[Server]:
    """One for all tests, which have a rater each."""
    with serving_rows(directory, ROWS) as server:
        yield server


@pytest.fixture
def harmful(tmp_path: Path) -> Iterator[Server]:
    with serving_rows(tmp_path, [(f"{i} {text}", text, f"fine {text}") for i, text in enumerate(HARM)]) as server:
        yield server


def start(browser: Any, server: Server, rater: str, **options: Any) -> Any:
    """A page with the first pair, by keys alone. What the page asks of other hosts, and errors of scripts, fail."""
    page = browser.new_context(**{"viewport": LAPTOP, **options}).new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.on("pageerror", lambda error: pytest.fail(f"script: {error}"))
    page.on("request", lambda request: request.url.startswith(server.url) or pytest.fail(request.url))
    page.goto(server.url)
    assert page.evaluate("document.activeElement.id") == "name"
    page.keyboard.type(rater)
    press(page, "Enter", title="1 of ")
    return page


def press(page: Any, key: str, *, title: str) -> None:
    page.wait_for_load_state()  # a title is there before the script and the style sheet
    page.wait_for_timeout(SETTLE_MS)
    page.keyboard.press(key)
    page.wait_for_function("title => document.title.startsWith(title)", arg=title)
    page.wait_for_load_state()


def rated(page: Any) -> str:
    return page.locator(".notice strong").inner_text()


def test_by_keys_alone_to_the_end_and_back(browser: Any, served: Server, directory: Path) -> None:
    page = start(browser, served, "Anna")
    press(page, "1", title="2 of 3")
    press(page, "Space", title="3 of 3")
    press(page, "u", title="2 of 3")
    assert rated(page) == "Tie"
    press(page, "u", title="1 of 3")
    assert rated(page) == "Response 1 is better"
    assert page.locator("button[aria-pressed=true]").count() == 1
    press(page, "2", title="2 of 3")
    press(page, "n", title="3 of 3")
    press(page, "Numpad1", title="All rated")
    press(page, "u", title="3 of 3")
    while page.evaluate("document.activeElement.value") != "second":
        page.keyboard.press("Tab")
        assert page.evaluate("getComputedStyle(document.activeElement).outlineWidth") == "3px", "the focus is seen"
    press(page, "Enter", title="All rated")
    found = [j for j in read_ratings(directory / "ratings.sqlite") if j.rater == "Anna"]
    assert len(found) == 3
    second = [j for j in found if j.outcome != "tie"]
    assert all((j.outcome == "win") == (j.theirs_first is not None) for j in second), "both for response 2"


def test_a_key_held_down_or_pressed_twice_rates_one_pair(browser: Any, served: Server) -> None:
    page = start(browser, served, "Held")
    page.add_init_script("window.now = 0; performance.now = () => window.now")  # a clock that stands in every document
    page.reload()
    page.keyboard.press("1")  # at once: nobody has read it
    page.evaluate("window.now = 399")
    page.keyboard.press("1")
    assert _title_after_a_while(page) == "1 of 3"
    page.evaluate("window.now = 400")
    for _ in range(5):  # the first one presses it, the others are those of a key that is held
        page.keyboard.down("1")
    page.wait_for_function("() => document.title == '2 of 3'")
    page.wait_for_load_state()
    page.evaluate("window.now = 400")
    page.keyboard.down("1")
    assert _title_after_a_while(page) == "2 of 3"
    page.keyboard.up("1")
    page.keyboard.press("Control+1")
    assert _title_after_a_while(page) == "2 of 3"


def _title_after_a_while(page: Any) -> str:
    page.wait_for_timeout(500)
    return page.title()


@pytest.mark.parametrize(("size", "scheme"), [(LAPTOP, "light"), (PHONE, "dark")], ids=["laptop", "phone"])
def test_everything_is_in_reach_and_readable(browser: Any, served: Server, size: dict[str, int], scheme: str) -> None:
    page = start(browser, served, scheme, viewport=size, color_scheme=scheme)
    for position in (1, 2, 3):
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"], "nothing goes over the side"
        for name in ("buttons", "rubric"):
            for place in page.locator(".choices button" if name == "buttons" else ".rubric").all():
                box = place.bounding_box()
                assert box["y"] + box["height"] <= size["height"], f"{name} are in view without scrolling"
        for target in page.locator("button, nav a").all():
            assert target.bounding_box()["height"] >= 44
        for text in ("h2", ".passage", ".rubric", ".choices button", ".rater span"):
            assert page.locator(text).first.evaluate(CONTRAST) >= 4.5, text
        page.mouse.move(size["width"] / 2, size["height"] / 2)
        page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
        last = page.locator(".response").last.bounding_box()
        footer = page.locator("footer").bounding_box()
        assert last["y"] + last["height"] <= footer["y"] + 1, "the end of a response is above the buttons"
        press(page, "1", title=f"{position + 1} of 3" if position < 3 else "All rated")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (dark == "rgb(20, 23, 27)") == (scheme == "dark")


CONTRAST = """(element) => {
  const light = (color) => {
    const [r, g, b] = color.match(/[\\d.]+/g).map((x) => x / 255)
      .map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  let below = element;
  while (getComputedStyle(below).backgroundColor === "rgba(0, 0, 0, 0)") below = below.parentElement;
  const [a, b] = [light(getComputedStyle(element).color), light(getComputedStyle(below).backgroundColor)];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}"""
"""As in WCAG 2."""

HARM = [
    "<script>window.pwned = 1</script>",
    "<img src=x onerror='window.pwned = 1'>",
    "</div></section></main><form action='https://evil.example'><button data-key='1'>1</button></form>",
    '" onmouseover="window.pwned = 1" x="',
    "{{ 7 * 7 }} {% raw %} ${7 * 7}",
    "<svg onload=window.pwned=1><style>* { display: none }</style><base href='https://evil.example/'>",
    "</textarea><iframe srcdoc='<script>parent.pwned = 1</script>'></iframe><meta http-equiv=refresh content='0;url=https://evil.example'>",
    "javascript:window.pwned=1 \u202etxet \x1b[31m <!-- \u0000 -->",
]


def test_text_cannot_become_markup(browser: Any, harmful: Server, tmp_path: Path) -> None:
    page = start(browser, harmful, "<b onclick=window.pwned=1>Ann</b>")
    assert page.locator(".rater span").inner_text() == "<b onclick=window.pwned=1>Ann</b>"
    seen = set()
    for position in range(1, len(HARM) + 1):
        assert page.evaluate("window.pwned") is None
        assert (
            page.locator("main :is(script, img, form, svg, style, iframe, a, button, input, meta, base)").count() == 0
        )
        assert page.locator("form").count() == 2
        seen |= {page.locator(".response .text").nth(i).inner_text().strip() for i in (0, 1)}
        press(page, "2", title=f"{position + 1} of" if position < len(HARM) else "All rated")
    assert set(HARM[:-1]) <= seen, "every character is shown as it is"
    assert "javascript:window.pwned=1 U+202Etxet U+001B[31m <!-- U+0000 -->" in {
        text.replace("  ", " ") for text in seen
    }
    assert len(read_ratings(tmp_path / "ratings.sqlite")) == len(HARM)


def test_without_scripts_the_buttons_work(browser: Any, served: Server) -> None:
    page = browser.new_context(java_script_enabled=False).new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.goto(served.url)
    page.get_by_label("Your name").fill("Ben")
    page.get_by_role("button", name="Begin").click()
    for name in ("Response 1 is better", "Tie", "Response 2 is better"):
        page.get_by_role("button", name=name).click()
    assert page.get_by_role("heading", name="All 3 rated").is_visible()


def test_a_link_on_another_site_lets_a_rater_in(browser: Any, tmp_path: Path) -> None:
    """Browsers hold back our cookie on the way from there, and give it on the next step."""
    files = write_responses(tmp_path, {"ours": [("p", "a")], "theirs": [("p", "b")]})
    command = [*files, "--output", tmp_path / "r.sqlite", "--raters", "anna"]
    with serving(command, num_lines=2) as server:
        page = browser.new_context().new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.route(
            "http://mail.example/",
            lambda route: route.fulfill(
                content_type="text/html", body=f"<a href='{server.printed[1].split()[-1]}'>rate</a>"
            ),
        )
        page.goto("http://mail.example/")
        page.get_by_role("link").click()
        page.wait_for_function("() => document.title == '1 of 1'")
        assert page.url == f"{server.url}/"
        assert page.evaluate("document.cookie") == ""
        press(page, "Space", title="All rated")
