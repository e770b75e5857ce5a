"""A reward that is a Python function (reward.function): found and checked before the run, called with rows, its answer
checked number by number. Nothing here knows of ranks or models."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import numbers
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from megatron_gil.config import ConfigError, RewardFunctionSection
from megatron_gil.data.rows.dataset import RowDataset
from megatron_gil.data.rows.demonstrations import ResponseDataset
from megatron_gil.data.rows.fields import LARGEST, RESPONSES, as_float
from megatron_gil.data.rows.preferences import PreferenceDataset
from megatron_gil.paths import expand_user

SHOWN = 60
"""Characters that are shown of a value."""


class RewardFunctionError(RuntimeError):
    """The function failed; one line names it, the row and the value."""


class _Raised(Exception):
    """Whatever the function raised."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardRow:
    """One response that is scored."""

    prompt: str
    response: str
    fields: Mapping[str, Any]
    """The other fields of the row in its file."""
    row_id: int


def reward_rows(dataset: ResponseDataset | PreferenceDataset, row_id: int) -> list[RewardRow]:
    """A row of a file that holds responses: one, or the chosen and the rejected one."""
    found, others = dataset.fields(row_id), dataset.others(row_id)
    return [
        RewardRow(prompt=found["prompt"], response=found[name], fields=others, row_id=row_id)
        for name in RESPONSES[dataset.kind]
    ]


class RewardFunction:
    """Called with prompts, responses and what else it takes of the rows' fields, each a list under its own name."""

    def __init__(self, section: RewardFunctionSection) -> None:
        """Imports the function. ConfigError where it is not there or cannot be called so."""
        assert section.function is not None
        self.name = f"reward.function={section.function}"
        self._timeout_s, self._threads = section.timeout_s, section.threads
        module, self.source = _import(section.function, self.name)
        self._function = _find(module, section.function.rpartition(":")[2], self.name)
        self._takes, self._needs = _arguments(self._function, self.name)

    def check_fields(self, dataset: RowDataset[Any]) -> None:
        """ConfigError where a file lacks a field that the function needs, or has one that hides an argument."""
        names = dataset.other_names
        for name in ("prompts", "responses"):
            if name in names:
                raise ConfigError(
                    f"{dataset.path}: a field is named {name}, which is an argument of {self.name}; rename it"
                )
        if missing := sorted(self._needs - {"prompts", "responses", *names}):
            found = f"the fields there are {', '.join(names)}" if names else "there are no other fields"
            raise ConfigError(
                f"{self.name} needs the argument {missing[0]}, and no row of {dataset.path} has a field of that name; "
                f"{found}"
            )

    def score(self, rows: Sequence[RewardRow], dataset: RowDataset[Any]) -> list[float]:
        """The function's number of each row, in order. RewardFunctionError where it has none that can be used.

        dataset: the file that the rows are of. The calls run in threads that are left behind by a time-out.
        """
        if not rows:
            return []
        size = -(-len(rows) // self._threads)
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        deadline = time.monotonic() + self._timeout_s
        answers: list[Any] = [None] * len(parts)

        def work(index: int) -> None:
            try:
                answers[index] = self._ask(parts[index], dataset)
            except _Raised as raised:
                answers[index] = RewardFunctionError(self._explain(raised.error, parts[index], dataset))
                answers[index] = self._find_row(parts[index], dataset) or answers[index]
            except RewardFunctionError as error:
                answers[index] = error

        threads = [
            threading.Thread(target=work, args=(index,), name=self.name, daemon=True) for index in range(len(parts))
        ]
        for thread in threads:
            thread.start()
        for index, (thread, part) in enumerate(zip(threads, parts, strict=True)):
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive() and answers[index] is None:  # else it looks for the row that raised
                raise RewardFunctionError(
                    f"{self.name} has not answered within reward.timeout_s={self._timeout_s:g} for "
                    f"{_rows_text(part, dataset)}"
                )
        for answer in answers:
            if isinstance(answer, RewardFunctionError):
                raise answer
        return [number for answer in answers for number in answer]

    def _ask(self, rows: Sequence[RewardRow], dataset: RowDataset[Any]) -> list[float]:
        try:
            answer = self._call(rows, dataset)
            answer = answer.tolist() if hasattr(answer, "tolist") else answer  # of numpy or torch
        except BaseException as error:  # the user's code may raise anything, SystemExit too
            raise _Raised(error) from None
        if not isinstance(answer, list | tuple):
            raise RewardFunctionError(
                f"{self.name} returned {_shown(answer)}, not a list of one number a row, for "
                f"{_rows_text(rows, dataset)}"
            )
        if len(answer) != len(rows):
            raise RewardFunctionError(
                f"{self.name} returned {len(answer)} numbers for {_rows_text(rows, dataset)}; it must return one a row"
            )
        return [self._number(value, row, dataset) for value, row in zip(answer, rows, strict=True)]

    def _call(self, rows: Sequence[RewardRow], dataset: RowDataset[Any]) -> Any:
        arguments: dict[str, list[Any]] = {"prompts": [r.prompt for r in rows], "responses": [r.response for r in rows]}
        # copies: rows of one prompt share their fields, and a function may write into a list that it is given
        arguments |= {name: [deepcopy(row.fields.get(name)) for row in rows] for name in dataset.other_names}
        if self._takes is not None:
            arguments = {name: values for name, values in arguments.items() if name in self._takes}
        return self._function(**arguments)

    def _number(self, value: Any, row: RewardRow, dataset: RowDataset[Any]) -> float:
        """The value as a number that a score can be."""
        what = f"{self.name} gives row {row.row_id + 1} of {dataset.path}"
        if not isinstance(value, numbers.Real | np.bool_):
            raise RewardFunctionError(f"{what} {_shown(value)}, which is no number (response {_shown(row.response)})")
        number = as_float(value)
        if not abs(number) <= LARGEST:  # a NaN too
            raise RewardFunctionError(
                f"{what} {_shown(value)}, which is not finite in float32 (response {_shown(row.response)})"
            )
        return number

    def _find_row(self, rows: Sequence[RewardRow], dataset: RowDataset[Any]) -> RewardFunctionError | None:
        """Of a call that raised, the first row that raises by itself too; None where there is none."""
        for row in rows:
            try:
                self._call([row], dataset)
            except BaseException as error:  # as in `_ask`
                return RewardFunctionError(self._explain(error, [row], dataset))
        return None

    def _explain(self, error: BaseException, rows: Sequence[RewardRow], dataset: RowDataset[Any]) -> str:
        text = " ".join(_text(error, str).split())
        what = f"{type(error).__name__}{f': {text:.200}' if text else ''}{self._line(error)}"
        response = f" (response {_shown(rows[0].response)})" if len(rows) == 1 else ""
        return f"{self.name} raised {what} for {_rows_text(rows, dataset)}{response}"

    def _line(self, error: BaseException) -> str:
        """Where in the function's file."""
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == self.source]
        return f" ({Path(self.source).name}:{frames[-1].lineno})" if frames else ""


def _import(target: str, name: str) -> tuple[ModuleType, str]:
    """The module, and the path of its source, empty where it has none."""
    place, separator, function = target.rpartition(":")
    if not (separator and place and function.isidentifier()):
        raise ConfigError(f"{name} must be package.module:name or FILE.py:name")
    try:
        module = _import_file(expand_user(place), name) if place.endswith(".py") else importlib.import_module(place)
    except ConfigError:
        raise
    except ModuleNotFoundError as error:
        if not f"{place}.".startswith(f"{error.name}."):
            raise ConfigError(f"{name} cannot be imported: {error}") from None
        raise ConfigError(
            f"{name}: no module named {error.name}; install it, put its folder in PYTHONPATH, or name its file as "
            "FILE.py:name"
        ) from None
    except (Exception, SystemExit) as error:  # whatever the module does as it is imported
        text = " ".join(str(error).split())
        raise ConfigError(f"{name} cannot be imported: {type(error).__name__}: {text:.200}") from None
    return module, getattr(module, "__file__", None) or ""


def _import_file(path: Path, name: str) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"{name}: there is no file {path}")
    module_name = f"reward_function_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickle look it up there
    spec.loader.exec_module(module)
    return module


def _find(module: ModuleType, function: str, name: str) -> Callable[..., Any]:
    found = getattr(module, function, None)
    if found is None:
        raise ConfigError(f"{name}: {module.__file__} has no {function}")
    if not callable(found):
        raise ConfigError(f"{name} is {_shown(found)}, not a function")
    if inspect.iscoroutinefunction(found):
        raise ConfigError(f"{name} is async, and is called as a plain function; name one that does asyncio.run of it")
    return found


def _arguments(function: Callable[..., Any], name: str) -> tuple[Collection[str] | None, set[str]]:
    """(the arguments that it takes by name, None for any; those of them without a default)."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # of a compiled function, which does not say
        return None, set()
    for parameter in parameters:
        if parameter.kind is parameter.POSITIONAL_ONLY and parameter.default is parameter.empty:
            raise ConfigError(f"{name}: it takes {parameter.name} by position alone, and is called by name")
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes = None if any(p.kind is p.VAR_KEYWORD for p in parameters) else {p.name for p in named}
    if takes is not None and "responses" not in takes:
        raise ConfigError(f"{name}: it takes no argument named responses")
    return takes, {p.name for p in named if p.default is p.empty}


def _text(value: Any, write: Callable[[Any], str]) -> str:
    """What str or repr writes, which may be code of the function's own."""
    try:
        return write(value)
    except Exception as error:
        return f"({write.__name__} raised {type(error).__name__})"


def _shown(value: Any) -> str:
    text = _text(value, repr)
    text = text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
    return text if isinstance(value, str) else f"{text} ({type(value).__name__})"


def _rows_text(rows: Sequence[RewardRow], dataset: RowDataset[Any]) -> str:
    first = f"row {rows[0].row_id + 1} of {dataset.path}"
    return first if len(rows) == 1 else f"{len(rows)} rows, the first {first}"
