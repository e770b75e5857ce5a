"""`megatron-gil judge-web`: a page on which people rate pairs of responses, not knowing whose they are.

    megatron-gil judge-web scores/ppo_gil.jsonl scores/ppo_kl.jsonl scores/dpo.jsonl --output ratings.sqlite
    megatron-gil judge-web ... --raters anna ben cleo --overlap 2 --host 0.0.0.0

Serves until Ctrl-C; the same command goes on where it stopped. Without --raters whoever can reach this machine's
loopback address says a name and rates every pair. With --raters each has a link of their own, and --overlap deals the
pairs out. Any other address than loopback needs --raters. Exit codes: 0 everything is rated, 75 stopped before that, 2
a file or an option is wrong; one line on stderr says how.
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from megatron_gil.config import ConfigError
from megatron_gil.config.ranges import LARGEST_SEED, Range
from megatron_gil.evaluation.comparisons import pair_files
from megatron_gil.evaluation.rubrics import read_rubric
from megatron_gil.evaluation.web.access import Access, clean_name, read_key
from megatron_gil.evaluation.web.store import RatingStore
from megatron_gil.evaluation.web.study import Study, make_study
from megatron_gil.paths import expand_user
from megatron_gil.training.run.lock import FileLock
from megatron_gil.training.run.signals import EXIT_STOPPED

if TYPE_CHECKING:
    import uvicorn

LONGEST_LEAVE_S = 2
"""A browser that keeps a connection open is waited for no longer."""


def judge_web(arguments: Sequence[str]) -> int:
    """Serves the pages until a signal comes. ConfigError where a file or an option is wrong."""
    given = _parse(arguments)
    try:
        from megatron_gil.evaluation.web.app import make_app
    except ImportError as error:
        raise ConfigError(f"judge-web needs {error.name}: pip install 'megatron_gil[judge]'") from None
    rows = pair_files(given.ours, given.theirs)
    study = make_study(rows, policy=given.ours.stem, rubric=read_rubric(given.rubric), seed=given.seed)
    with closing(_bind(given)) as listener, _locked(given.output):
        hosts = _hosts(given, listener)
        access = Access(read_key(given.output.with_name(f"{given.output.name}.key")), given.raters)
        with closing(RatingStore(given.output, study)) as store:
            store.set_raters(study, given.raters, given.overlap)
            app = make_app(study, store, access, hosts=hosts, is_https=given.public_url is not None)
            _announce(given, study, store, access, _url(given, listener))
            stopped_by = _serve(app, listener)
            return _end(given, study, store, stopped_by)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="megatron-gil judge-web", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ours", type=expand_user, metavar="OURS.jsonl", help="responses: {prompt, response} lines")
    parser.add_argument("theirs", type=expand_user, nargs="+", metavar="THEIRS.jsonl", help="opponents, same prompts")
    parser.add_argument(
        "--output", type=expand_user, required=True, metavar="FILE.sqlite", help="ratings; made, or gone on with"
    )
    parser.add_argument(
        "--rubric",
        default="helpful",
        metavar="NAME_OR_FILE",
        help="helpful (default), harmless, summary or a text file",
    )
    parser.add_argument("--raters", nargs="+", default=[], metavar="NAME", help="who rates; each gets a link")
    parser.add_argument("--overlap", type=int, metavar="K", help="raters of each pair (default: all of them)")
    parser.add_argument("--seed", type=int, default=1, help="of the order, the sides and the dealing (default 1)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8765, help="default 8765; 0 takes any free one")
    parser.add_argument(
        "--public-url", metavar="URL", help="https address under which a proxy of yours gives out the pages"
    )
    given = parser.parse_args(arguments)
    for option, bounds in (("seed", Range(low=0, high=LARGEST_SEED)), ("port", Range(low=0, high=65535))):
        if (value := getattr(given, option)) not in bounds:
            raise ConfigError(f"--{option} {value} must be {bounds}")
    given.raters = _rater_names(given.raters)
    if given.overlap is not None and not given.raters:
        raise ConfigError("--overlap needs --raters: pairs are dealt out to people who are known")
    if given.overlap is not None and not 1 <= given.overlap <= len(given.raters):
        raise ConfigError(f"--overlap {given.overlap} must be at least 1 and at most {len(given.raters)}, the raters")
    if given.public_url is not None:
        url = urlsplit(given.public_url)
        if url.scheme != "https" or not url.hostname or url.path.strip("/") or url.query or url.fragment:
            raise ConfigError(f"--public-url {given.public_url} must be https, a host, and no path")
        if not given.raters:
            raise ConfigError("--public-url needs --raters: who comes from elsewhere must have a link")
    return given


def _rater_names(names: Sequence[str]) -> list[str]:
    cleaned: list[str] = []
    for name in names:
        try:
            cleaned.append(clean_name(name))
        except ValueError as error:
            raise ConfigError(f"--raters: the name {name!r} {error}") from None
        if cleaned[-1].casefold() in {other.casefold() for other in cleaned[:-1]}:
            raise ConfigError(f"--raters: {name} stands there twice")
    return cleaned


def _bind(given: argparse.Namespace) -> socket.socket:
    """A listening socket, before anything is written."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            given.host, given.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is no name"
        raise ConfigError(f"--host {given.host}: {reason}") from None
    if not ipaddress.ip_address(address[0]).is_loopback and not given.raters:
        raise ConfigError(f"--host {given.host} can be reached from other machines: name who may rate with --raters")
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"--host {given.host} --port {given.port}: {error.strerror}; --port 0 takes any free one"
        ) from None
    return listener


def _url(given: argparse.Namespace, listener: socket.socket) -> str:
    """Where raters reach the pages."""
    if given.public_url is not None:
        return given.public_url.rstrip("/")
    address, port = listener.getsockname()[:2]
    name = socket.gethostname() if ipaddress.ip_address(address).is_unspecified else given.host
    return f"http://{f'[{name}]' if ':' in name else name}:{port}"


def _hosts(given: argparse.Namespace, listener: socket.socket) -> frozenset[str] | None:
    """Names under which the server may be called. From other machines any: there nothing is shown without a token."""
    address = ipaddress.ip_address(listener.getsockname()[0])
    if not address.is_loopback:
        return None
    public = urlsplit(given.public_url or "").hostname
    names = {"localhost", "127.0.0.1", "::1", given.host.lower(), str(address), public}
    return frozenset(name for name in names if name)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One server for a file of ratings."""
    if path.is_dir():
        raise ConfigError(f"{path}: is a directory; name a file as --output")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock.take(path.with_name(f"{path.name}.lock"), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
    assert lock is not None
    try:
        yield
    finally:
        lock.release()


def _announce(given: argparse.Namespace, study: Study, store: RatingStore, access: Access, url: str) -> None:
    equal = len(study.items) - len(study.to_rate)
    left_out = f" ({equal} more have equal responses, ties)" if equal else ""
    counted = sum(store.num_rated().values())
    print(f"{url}: {len(study.to_rate)} pairs to rate{left_out}, {counted} ratings so far; Ctrl-C ends it")
    width = max((len(rater) for rater in given.raters), default=0)
    for rater in given.raters:
        rated, pairs = store.num_rated().get(rater, 0), len(store.share(study, rater))
        print(f"  {rater:<{width}}  {rated} of {pairs} rated  {url}/?token={access.token(rater)}")


def _serve(app: object, listener: socket.socket) -> signal.Signals:
    """Until a signal comes; which one it was. The second one ends the process at once: every rating is kept already."""
    import uvicorn

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=256,
        timeout_graceful_shutdown=LONGEST_LEAVE_S,
    )
    server = Server(config)
    with _stopping(server) as came:
        asyncio.run(server.serve(sockets=[listener]))
    return signal.Signals(came[0])


@contextmanager
def _stopping(server: uvicorn.Server) -> Iterator[list[int]]:
    """Gives the signals that came. One that was ignored from the start, as under nohup, stays so."""
    came: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        came.append(number)
        if len(came) > 1:
            os._exit(128 + number)
        server.should_exit = True

    numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(given: argparse.Namespace, study: Study, store: RatingStore, stopped_by: signal.Signals) -> int:
    rated = store.num_rated()
    kept = f"ratings kept in {given.output}: {sum(rated.values())}"
    if rated and all(rated.get(r, 0) >= len(store.share(study, r)) for r in given.raters or rated):
        print(f"megatron-gil judge-web: everything is rated: {kept}", file=sys.stderr)
        return 0
    print(
        f"megatron-gil judge-web: stopped by {stopped_by.name}: {kept}; the same command goes on",
        file=sys.stderr,
    )
    return EXIT_STOPPED
