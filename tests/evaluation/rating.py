"""Raters who read the pages of `megatron-gil judge-web` over HTTP, and the server as a process."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

import httpx2

ROOT = Path(__file__).parents[2]
START_S = 60
"""Until a server answers on a machine that is busy."""


def write_responses(directory: Path, files: dict[str, list[tuple[str, str]]]) -> list[Path]:
    """Name -> (prompt, response) of each row."""
    paths = []
    for name, rows in files.items():
        paths.append(directory / f"{name}.jsonl")
        paths[-1].write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in rows))
    return paths


def hidden_fields(page: str) -> dict[str, str]:
    """Of the form with the three buttons, or the only one."""
    form = page[page.find('action="/rate"') :] if 'action="/rate"' in page else page
    return dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', form))


def shown(page: str) -> tuple[str, str, str]:
    """The prompt and the two responses of a page; texts of one passage alone."""
    prompt, first, second = re.findall(r'<div class="passage" dir="auto">(.*?)</div>|<p class="empty">', page, re.S)
    return unescape(prompt), unescape(first), unescape(second)


def position(page: str) -> str:
    """ "2 of 5", or what else the title says."""
    found = re.search(r"<title>(.*)</title>", page)
    assert found is not None
    return found[1]


def say_name(client: httpx2.Client, name: str) -> httpx2.Response:
    seal = hidden_fields(client.get("/").text)
    return client.post("/name", data={**seal, "name": name}, follow_redirects=True)


def rate(client: httpx2.Client, page: str, choice: str) -> httpx2.Response:
    """The answer to a button of this page; 303 where the rating is kept."""
    return client.post("/rate", data={**hidden_fields(page), "choice": choice}, follow_redirects=False)


def rate_all(client: httpx2.Client, choose: dict[str, str] | str) -> list[str]:
    """Rates until nothing is left; the pages. choose: a response -> first, for the side on which it stands, or what is
    chosen always."""
    pages = []
    while 'action="/rate"' in (page := client.get("/", follow_redirects=True).text):
        pages.append(page)
        _, first, second = shown(page)
        choice = choose if isinstance(choose, str) else _better(choose, first, second)
        assert rate(client, page, choice).status_code == 303
    return pages


def _better(choose: dict[str, str], first: str, second: str) -> str:
    return "first" if choose.get(first) == "better" else "second" if choose.get(second) == "better" else "tie"


class InProcess(httpx2.BaseTransport):
    """Requests to an application of this process, in this thread: its file of ratings belongs to one."""

    def __init__(self, app: Any) -> None:
        self._transport = httpx2.ASGITransport(app, raise_app_exceptions=False)

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        async def ask() -> httpx2.Response:
            content = request.read()
            asked = httpx2.Request(request.method, request.url, headers=request.headers, content=content)
            answer = await self._transport.handle_async_request(asked)
            return httpx2.Response(answer.status_code, headers=answer.headers, content=await answer.aread())

        return asyncio.run(ask())


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str
    printed: list[str]
    """Lines of standard output."""

    def client(self) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=30, trust_env=False)

    def end(self, number: signal.Signals) -> tuple[int, str]:
        """Exit code and standard error."""
        self.process.send_signal(number)
        _, said = self.process.communicate(timeout=START_S)
        return self.process.returncode, said


@contextmanager
def serving(arguments: Sequence[object], num_lines: int = 1) -> Iterator[Server]:
    """`megatron-gil judge-web` on a free port, which has printed so many lines; killed at the end."""
    command = [sys.executable, "-m", "megatron_gil", "judge-web", *map(str, arguments), "--port", "0"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
    try:
        assert process.stdout is not None
        printed = [process.stdout.readline().rstrip("\n") for _ in range(num_lines)]
        assert printed[0], process.communicate(timeout=START_S)
        port = printed[0].split(": ")[0].rpartition(":")[2]
        yield Server(process, f"http://127.0.0.1:{port}", printed)
    finally:
        process.kill()
        process.communicate()
