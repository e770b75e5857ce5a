"""Standard output and error that may be closed, full or on a terminal that is gone."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn


class OutputLost(Exception):
    """Standard output takes no more. Not an OSError: what handles those means files."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"standard output cannot be written: {error.strerror}")
        self.is_closed = isinstance(error, BrokenPipeError)
        """The reader has gone, as `head` does when it has enough."""

    def report(self, command: str) -> int:
        """The exit code: 141, as after a SIGPIPE, without a word where the reader has gone."""
        if self.is_closed:
            return 128 + signal.SIGPIPE
        print(f"{command}: {self}", file=sys.stderr)
        return 1


class ConsoleStream(io.TextIOBase):
    """Writes text to a descriptor at once. What cannot be written is dropped, or raises OutputLost."""

    def __init__(self, replaced: Any, descriptor: int, *, drop: bool) -> None:
        self._descriptor, self.drop = descriptor, drop
        self._encoding = getattr(replaced, "encoding", None) or "utf-8"

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        try:
            return os.isatty(self._descriptor)
        except OSError:
            return False

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:  # type: ignore[override]
        content = text.encode(self._encoding, "backslashreplace")
        try:
            while content:
                content = content[os.write(self._descriptor, content) :]
        except OSError as error:
            if not self.drop:
                raise OutputLost(error) from None
        return len(text)


@contextmanager
def lasting_output() -> Iterator[Callable[[], None]]:
    """What standard error does not take is dropped; what standard output does not take raises OutputLost, or is dropped
    too once the function given here has been called. Streams that were put in their place are left alone.
    """
    for descriptor in (0, 1, 2):  # a closed one would be given to the next file that is opened
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    output = ConsoleStream(sys.stdout, 1, drop=False)
    if sys.stdout is sys.__stdout__:
        _flush(sys.stdout)
        sys.stdout = output  # type: ignore[assignment]
    if sys.stderr is sys.__stderr__:
        _flush(sys.stderr)
        sys.stderr = ConsoleStream(sys.stderr, 2, drop=True)  # type: ignore[assignment]

    def drop_output() -> None:
        output.drop = True

    try:
        yield drop_output
    finally:
        sys.stdout, sys.stderr = before


def _flush(stream: Any) -> None:
    if stream is not None:  # it was closed from the start
        try:
            stream.flush()
        except OSError:
            return


class CommandEnded(Exception):
    """A command ends before its work is done, for a reason that is no mistake in its arguments; one line says it."""

    def __init__(self, reason: str, exit_code: int) -> None:
        super().__init__(reason)
        self.exit_code = exit_code


class Interrupted(KeyboardInterrupt):
    """A signal asks a command to leave that has nothing to save."""

    def __init__(self, number: int) -> None:
        self.number = number


@contextmanager
def leaving_on_signals() -> Iterator[list[int]]:
    """The first SIGINT, SIGTERM or SIGHUP raises Interrupted, so that what was begun is cleared away; the second ends
    the process at once. Gives the signals that came: a library may turn the exception into one of its own.

    A signal that was ignored from the start, as nohup does, stays so.
    """
    came: list[int] = []

    def leave(number: int, _: FrameType | None) -> NoReturn:
        came.append(number)
        if len(came) > 1:
            os._exit(128 + number)
        raise Interrupted(number)

    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    before = {n: signal.getsignal(n) or signal.SIG_DFL for n in numbers}
    for number in numbers:
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, leave)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_interruptible(command: str, run: Callable[[], int]) -> int:
    """run() of a command that has nothing to save; stopped by a signal, or by the file system, in one line."""
    with lasting_output(), leaving_on_signals() as came:
        try:
            return run()
        except OutputLost as lost:
            return lost.report(command)
        except CommandEnded as ended:
            print(f"{command}: {ended}", file=sys.stderr)
            return ended.exit_code
        except OSError as error:
            if not came:
                where = f"{error.filename}: " if error.filename else ""
                print(f"{command}: {where}{error.strerror or error}", file=sys.stderr)
                return 1
        except BaseException:
            if not came:
                raise
        print(f"{command}: stopped by {signal.Signals(came[0]).name}; what it had begun is removed", file=sys.stderr)
        return 128 + came[0]
