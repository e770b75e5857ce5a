"""A chat-completions server on this machine that misbehaves on purpose, in this process or one of its own:

    python -m tests.evaluation.chat_server DELAY_S

prints its URL, prefers the longer response, and answers GET /counts with how often each message was asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Request = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Served:
    """What the server does with one request."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    cut_after: int | None = None
    """The connection ends after so many bytes of the body."""
    drip_s: float = 0.0
    """Between single bytes of the body."""
    raw: bytes | None = None
    """All that is sent, in place of an answer; the connection ends."""


def says(content: object, *, finish_reason: str = "stop", usage: object = (50, 10), **message: object) -> Served:
    """A completion; usage: tokens in and out, or anything else as it stands."""
    if isinstance(usage, tuple):
        usage = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": content} | message,
        "finish_reason": finish_reason,
    }
    return body({"id": "1", "object": "chat.completion", "choices": [choice], "usage": usage})


def body(value: object, status: int = 200, **headers: str) -> Served:
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return Served(status=status, body=json.dumps(value).encode(), headers=named)


def error(status: int, message: str = "no", **fields: object) -> Served:
    headers = {name: str(fields.pop(name)) for name in list(fields) if name.startswith("retry")}
    return body({"error": {"message": message} | fields}, status, **headers)


@dataclass(frozen=True)
class Shown:
    """A message, read as a judge is told to: by the lines that end in its number."""

    prompt: str
    first: str
    second: str


def shown(request: Request) -> Shown:
    message: str = request["messages"][1]["content"]
    number = message.split("\n")[0].removeprefix("The number is ").removesuffix(".")
    assert number.isdecimal()

    def between(name: str) -> str:
        _, begin, rest = message.partition(f"\n[BEGIN {name} {number}]\n")
        text, end, _ = rest.partition(f"\n[END {name} {number}]\n")
        assert begin, name
        assert end, name
        assert number not in text
        return text

    assert message.count(number) == 7
    return Shown(between("REQUEST"), between("RESPONSE A"), between("RESPONSE B"))


def prefer_longer(request: Request) -> Served:
    seen = shown(request)
    better = "TIE" if len(seen.first) == len(seen.second) else "AB"[len(seen.first) < len(seen.second)]
    return says(f"Because it is.\nVERDICT: {better}")


class ChatServer:
    """answer: what is done with a request; also given how often the same message was asked before."""

    def __init__(self, answer: Callable[[Request, int], Served]) -> None:
        self._answer = answer
        self.requests: list[Request] = []
        self.headers: list[dict[str, str]] = []
        self.times_s: list[float] = []
        self.asked: Counter[str] = Counter()
        """How often each message came."""
        self.served: Counter[str] = Counter()
        """How often an answer to it with status 200 was sent whole."""
        self.most_in_flight = self._in_flight = 0
        self.url = ""

    async def run(self, started: Callable[[], None], stop: asyncio.Event) -> None:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=256)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        started()
        await stop.wait()
        server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while await self._serve_one(reader, writer):
                pass
        writer.close()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection stays open."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:] if line)}
        content = await reader.readexactly(int(headers.get("content-length", 0)))
        if head[0].startswith("GET /counts"):
            return await self._send(writer, body({"asked": self.asked, "served": self.served}))
        request = json.loads(content)
        message = request["messages"][1]["content"]
        self.requests.append(request)
        self.headers.append(headers)
        self.times_s.append(asyncio.get_running_loop().time())
        async with self._counted():
            served = self._answer(request, self.asked[message])
            self.asked[message] += 1
            stays = await self._send(writer, served)
        if served.status == 200 and stays:
            self.served[message] += 1
        return stays

    @contextlib.asynccontextmanager
    async def _counted(self) -> AsyncIterator[None]:
        self._in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self._in_flight)
        try:
            yield
        finally:
            self._in_flight -= 1

    async def _send(self, writer: asyncio.StreamWriter, served: Served) -> bool:
        if served.delay_s:
            await asyncio.sleep(served.delay_s)
        if served.raw is not None:
            writer.write(served.raw)
            await writer.drain()
            return False
        headers = {"Content-Type": "application/json", "Content-Length": str(len(served.body))} | dict(served.headers)
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        writer.write(f"HTTP/1.1 {served.status} Status\r\n{head}\r\n".encode("latin-1"))
        if served.drip_s:
            for i in range(len(served.body)):
                writer.write(served.body[i : i + 1])
                await writer.drain()
                await asyncio.sleep(served.drip_s)
            return True
        writer.write(served.body if served.cut_after is None else served.body[: served.cut_after])
        await writer.drain()
        return served.cut_after is None


@contextmanager
def chat_server(answer: Callable[[Request, int], Served]) -> Iterator[ChatServer]:
    """In a thread of this process."""
    server, started, loop = ChatServer(answer), threading.Event(), asyncio.new_event_loop()
    stop = asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(server.run(started.set, stop)))
    thread.start()
    assert started.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()


def main(delay_s: float) -> None:
    def answer(request: Request, before: int) -> Served:
        served = prefer_longer(request)
        return Served(body=served.body, delay_s=delay_s)

    server = ChatServer(answer)
    asyncio.run(server.run(lambda: print(server.url, flush=True), asyncio.Event()))


if __name__ == "__main__":
    main(float(sys.argv[1]))
