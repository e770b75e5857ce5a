"""What every request must be, and every response says: no other site may ask for a page, send a form or frame one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from urllib.parse import parse_qsl, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LARGEST_FORM = 16 << 10
"""Bytes."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """Around the application, so that its error pages have the headers too."""

    def __init__(
        self, app: ASGIApp, *, hosts: frozenset[str] | None, refuse: Callable[[HTTPException], Response]
    ) -> None:
        """hosts: names under which the server may be called; None for any, where a token is needed anyway. On loopback
        they keep off pages of other sites whose name was made to point here (DNS rebinding)."""
        self._app, self._hosts, self._refuse = app, hosts, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        error = self._error(scope["method"], Headers(scope=scope))
        app: Callable[[Scope, Receive, Send], Awaitable[None]] = self._refuse(error) if error else self._app
        await app(scope, receive, send_with_headers)

    def _error(self, method: str, headers: Headers) -> HTTPException | None:
        if self._hosts is not None and _host_name(headers.get("host", "")) not in self._hosts:
            return HTTPException(400, "This server is not called so. Take the address that it printed when it started.")
        if method not in ("GET", "HEAD") and _is_foreign(headers):
            return HTTPException(403, "This form was sent by another site. Nothing was kept.")
        return None


async def read_form(request: Request) -> dict[str, str]:
    """The fields of a form; HTTPException for what no page of ours sends."""
    if request.headers.get("content-type", "").partition(";")[0] != "application/x-www-form-urlencoded":
        raise HTTPException(415, "This is no form of this site. Nothing was kept.")
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > LARGEST_FORM:
            raise HTTPException(413, "This form is too large. Nothing was kept.", headers={"Connection": "close"})
    try:
        fields = parse_qsl(body.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=20)
    except ValueError:
        raise HTTPException(400, "This is no form of this site. Nothing was kept.") from None
    return dict(fields)


def _host_name(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _is_foreign(headers: Headers) -> bool:
    """Browsers say where a form comes from in Sec-Fetch-Site, over http only to this machine itself, and in Origin. The
    seal in the form decides where neither says anything."""
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site != "same-origin"
    origin = headers.get("origin")
    return origin is not None and origin.partition("://")[2] != headers.get("host")
