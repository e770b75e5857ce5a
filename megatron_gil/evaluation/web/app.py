"""The pages on which a rater compares two responses, not knowing whose they are."""

from __future__ import annotations

import sqlite3
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import cast, get_args

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from megatron_gil.evaluation.web.access import Access, clean_name
from megatron_gil.evaluation.web.guard import Guard, read_form
from megatron_gil.evaluation.web.store import Choice, Kept, RatingStore, said
from megatron_gil.evaluation.web.study import Study
from megatron_gil.evaluation.web.text import passages, turns

COOKIE_DAYS = 30
_TITLES = {400: "Not understood", 403: "No entry", 404: "No such page", 405: "Not done here", 500: "Something broke"}
_STATIC = {"style.css": "text/css", "rate.js": "text/javascript"}


def make_app(
    study: Study, store: RatingStore, access: Access, *, hosts: frozenset[str] | None, is_https: bool = False
) -> ASGIApp:
    """hosts: names under which the server may be called; None for any."""
    pages = _Pages(study, store, access, is_https)
    routes = [
        Route("/", pages.home),
        Route("/welcome", pages.welcome),
        Route("/name", pages.name, methods=["POST"]),
        Route("/leave", pages.leave, methods=["POST"]),
        Route("/pair/{item:int}", pages.pair),
        Route("/rate", pages.rate, methods=["POST"]),
        *(Route(f"/{name}", _static(name, kind)) for name, kind in _STATIC.items()),
    ]
    handlers = {HTTPException: pages.refused, sqlite3.Error: pages.not_kept, Exception: pages.broken}
    app = Starlette(routes=routes, exception_handlers=handlers)  # type: ignore[arg-type]
    app.router.redirect_slashes = False
    return Guard(app, hosts=hosts, refuse=pages.error)


@dataclass(frozen=True, slots=True)
class _Session:
    cookie: str
    rater: str


@dataclass(frozen=True, slots=True)
class _Progress:
    """Where a rater stands."""

    history: Mapping[int, Kept]
    todo: tuple[int, ...]
    """What the rater has not rated yet, in order."""

    @property
    def total(self) -> int:
        return len(self.history) + len(self.todo)

    @property
    def path(self) -> tuple[int, ...]:
        """What the rater has seen, with the first one of those to come at the end."""
        return (*self.history, *self.todo[:1])

    def after(self, item: int) -> str:
        """The address of the pair that follows: one rated already, or the first of those to come."""
        rated = list(self.history)
        place = rated.index(item) + 1 if item in self.history else len(rated)
        return f"/pair/{rated[place]}" if place < len(rated) else "/"


class _Pages:
    def __init__(self, study: Study, store: RatingStore, access: Access, is_https: bool) -> None:
        self._study, self._store, self._access, self._is_https = study, store, access, is_https
        self._templates = Environment(
            loader=PackageLoader("megatron_gil.evaluation.web", "pages"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )

    async def home(self, request: Request) -> Response:
        """The next pair; the page for a name; or, with a token, the session that it stands for."""
        if "token" in request.query_params:
            return self._enter(request.query_params["token"])
        session = self._session(request)
        if session is None or not session.rater:
            if self._access.raters:
                raise HTTPException(
                    403, "Open the link that you were given. If you have done so, reload this page, and allow cookies."
                )
            if session is None and request.headers.get("sec-fetch-site") in ("cross-site", "same-site"):
                # The browser may have a cookie, which it gives to our own pages alone.
                return self._show("welcome.html")
            return self._name_page(session)
        progress = self._progress(session.rater)
        if not progress.todo:
            back = progress.path[-1] if progress.path else None
            return self._show(
                "done.html", rater=session.rater, total=progress.total, back=back, leave_seal=self._leave_seal(session)
            )
        return self._pair(session, progress, progress.todo[0])

    async def welcome(self, request: Request) -> Response:
        """Where a link's token is taken out of the address. Not a redirect to the first page: after a link on another
        site the browser would follow it without the new cookie, which is for requests from our own pages alone."""
        return self._show("welcome.html")

    async def name(self, request: Request) -> Response:
        form = await read_form(request)
        visitor = self._session(request)
        if self._access.raters or visitor is None or not self._is_sealed(form, visitor, "name"):
            raise HTTPException(
                403, "This form is not of this session. Nothing was kept; go on and say your name anew."
            )
        try:
            rater = clean_name(form.get("name", ""))
        except ValueError as error:
            return self._name_page(visitor, f"This name {error}. Take another.", status=400)
        known = {name.casefold(): name for name in self._store.num_rated()}
        response = RedirectResponse("/", 303)
        self._set_cookie(response, self._access.cookie(known.get(rater.casefold(), rater)))
        return response

    async def leave(self, request: Request) -> Response:
        form = await read_form(request)
        session = self._session(request)
        if session is None or not self._is_sealed(form, session, "leave"):
            raise HTTPException(403, "This form is not of this session.")
        response = RedirectResponse("/", 303)
        response.delete_cookie(self._access.cookie_name)
        return response

    async def pair(self, request: Request) -> Response:
        """A pair that the rater has rated before."""
        session = self._session(request)
        if session is None or not session.rater:
            return RedirectResponse("/", 303)
        progress, item = self._progress(session.rater), request.path_params["item"]
        if item not in progress.path:
            raise HTTPException(404, "You have not come to this pair.")
        return self._pair(session, progress, item)

    async def rate(self, request: Request) -> Response:
        """Keeps the rating, then shows the pair that follows. A form that was sent already changes nothing."""
        form = await read_form(request)
        session = self._session(request)
        fields = [form.get(name, "") for name in ("item", "times", "shown")]
        if session is None or not session.rater or not self._is_sealed(form, session, "rate", *fields):
            raise HTTPException(
                403, "This form is not of this session. Nothing was kept; go on and rate the pair anew."
            )
        if form.get("choice") not in get_args(Choice):
            raise HTTPException(400, "This form names no choice. Nothing was kept; go on and rate the pair anew.")
        item, times, shown = (int(field) for field in fields)
        progress = self._progress(session.rater)
        if item in progress.history or item in progress.todo:  # else it was dealt to others since
            self._store.rate(
                session.rater,
                item,
                cast(Choice, form["choice"]),
                ours_first=self._study.ours_first(session.rater, item),
                times_before=times,
                seconds=max(0.0, time.time() - shown / 1000),
            )
        return RedirectResponse(progress.after(item), 303)

    def error(self, error: HTTPException) -> Response:
        title = _TITLES.get(error.status_code, "Not kept")
        return self._show(
            "message.html", title=title, text=error.detail, status=error.status_code, headers=error.headers
        )

    async def refused(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code in (404, 405) and error.detail in ("Not Found", "Method Not Allowed"):
            error = HTTPException(error.status_code, "There is no page of this address.", headers=error.headers)
        return self.error(error)

    async def not_kept(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, sqlite3.Error)
        print(f"megatron-gil judge-web: a page was not served: the file of ratings {said(error)}", file=sys.stderr)
        text = "The ratings cannot be written. Tell who runs this server, then go on: the last rating was not kept."
        return self.error(HTTPException(503, text))

    async def broken(self, request: Request, error: Exception) -> Response:
        return self.error(
            HTTPException(500, "What you have rated so far is kept. Go on, or tell who runs this server.")
        )

    def _enter(self, token: str) -> Response:
        rater = self._access.rater_of(token)
        if rater is None:
            raise HTTPException(403, "This link is not valid, or not any more. Ask for a new one.")
        response = RedirectResponse("/welcome", 303)
        self._set_cookie(response, self._access.cookie(rater))
        return response

    def _pair(self, session: _Session, progress: _Progress, item: int) -> Response:
        comparison, path = self._study.items[item], progress.path
        place, kept = path.index(item), progress.history.get(item)
        sides = (comparison.ours, comparison.theirs)
        first, second = sides if self._study.ours_first(session.rater, item) else sides[::-1]
        fields = {"item": str(item), "times": str(kept.times if kept else 0), "shown": str(int(time.time() * 1000))}
        return self._show(
            "rate.html",
            rater=session.rater,
            question=self._study.rubric.question,
            position=place + 1,
            total=progress.total,
            turns=turns(comparison.prompt),
            responses=[passages(first), passages(second)],
            choice=kept.choice if kept else None,
            back=f"/pair/{path[place - 1]}" if place else None,
            onward=progress.after(item),
            fields={**fields, "seal": self._access.seal(session.cookie, "rate", *fields.values())},
            leave_seal=self._leave_seal(session),
        )

    def _name_page(self, visitor: _Session | None, error: str = "", status: int = 200) -> Response:
        cookie = visitor.cookie if visitor else self._access.cookie("")
        seal = self._access.seal(cookie, "name")
        response = self._show("name.html", error=error, seal=seal, status=status)
        self._set_cookie(response, cookie)
        return response

    def _leave_seal(self, session: _Session) -> str | None:
        """Raters with links need no way out: their link is theirs alone."""
        return None if self._access.raters else self._access.seal(session.cookie, "leave")

    def _show(
        self, page: str, *, status: int = 200, headers: Mapping[str, str] | None = None, **context: object
    ) -> HTMLResponse:
        return HTMLResponse(self._templates.get_template(page).render(context), status, headers)

    def _session(self, request: Request) -> _Session | None:
        cookie = request.cookies.get(self._access.cookie_name, "")
        rater = self._access.rater_of_cookie(cookie)
        return None if rater is None else _Session(cookie, rater)

    def _set_cookie(self, response: Response, cookie: str) -> None:
        response.set_cookie(
            self._access.cookie_name,
            cookie,
            max_age=COOKIE_DAYS * 86400,
            httponly=True,
            samesite="strict",
            secure=self._is_https,
        )

    def _is_sealed(self, form: Mapping[str, str], session: _Session, *fields: str) -> bool:
        return self._access.is_sealed(form.get("seal", ""), session.cookie, *fields)

    def _progress(self, rater: str) -> _Progress:
        history = self._store.history(rater)
        return _Progress(history, tuple(i for i in self._store.share(self._study, rater) if i not in history))


def _static(name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
    content = files("megatron_gil.evaluation.web").joinpath("static", name).read_bytes()

    async def serve(request: Request) -> Response:
        return Response(content, media_type=kind)

    return serve
