"""Where people look at a run from elsewhere: TensorBoard, and Weights & Biases (https://docs.wandb.ai).

Both get what metrics.jsonl and samples.jsonl hold, under the same names, and are written by rank 0 alone. Those files
are the record; a board that fails is switched off, said in one line, and the run goes on.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from omegaconf import OmegaConf

from megatron_gil import __version__
from megatron_gil.config import COMMAND_CONFIGS, ConfigError, TrainConfig
from megatron_gil.paths import write_whole
from megatron_gil.training.run.directory import git_commit
from megatron_gil.training.run.signals import EXIT_STOPPED
from megatron_gil.types import Metrics

WANDB_ID_FILE = "wandb_id"
"""In the run directory: the id under which a resumed run goes on."""
FINISH_S = 60.0
"""How long the end of a run, or a stop that a cluster may cut short, waits for uploads."""

Row = dict[str, Any]


class BoardError(RuntimeError):
    """A board cannot be opened or written; one line."""


class Board(Protocol):
    name: str

    def iteration(self, iteration: int, metrics: Metrics) -> None:
        """Raises BoardError, as the others do."""
        ...

    def samples(self, iteration: int, rows: Sequence[Row]) -> None: ...

    def close(self, code: int) -> None:
        """code: the exit code of the run."""
        ...


def check_boards(config: TrainConfig) -> None:
    """ConfigError where log.wandb is set and the package is not there."""
    project = config.log.wandb
    found = find_spec("wandb") if project else None
    if project and (found is None or found.origin is None):  # no origin: a directory wandb/ that a run has left here
        raise ConfigError(
            f"log.wandb={project} needs the wandb package: pip install 'wandb>=0.31', or set log.wandb=null"
        )


def open_boards(directory: Path, config: TrainConfig, start: int) -> list[Board]:
    """Those that the config asks for. start: the first iteration to come. Raises BoardError."""
    boards: list[Board] = []
    if config.log.tensorboard:
        boards.append(TensorBoard(directory, start))
    if config.log.wandb:
        boards.append(WandbRun(directory, config, config.log.wandb))
    return boards


class TensorBoard:
    name = "TensorBoard events"

    def __init__(self, directory: Path, start: int) -> None:
        """Raises OSError."""
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self._writer = SummaryWriter(str(directory), purge_step=start)

    def iteration(self, iteration: int, metrics: Metrics) -> None:
        try:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, iteration)
        except OSError as error:
            raise BoardError(str(error)) from None

    def samples(self, iteration: int, rows: Sequence[Row]) -> None:
        try:
            for number, row in enumerate(rows):
                self._writer.add_text(f"samples/{number}", _markdown(row), iteration)
        except OSError as error:
            raise BoardError(str(error)) from None

    def close(self, code: int) -> None:
        self._writer.close()


class WandbRun:
    """The run of that name in Weights & Biases; a resumed run is the same one there."""

    name = "Weights & Biases"

    def __init__(self, directory: Path, config: TrainConfig, project: str) -> None:
        """project: PROJECT or ENTITY/PROJECT. Raises BoardError."""
        entity, _, project_name = project.rpartition("/")
        command = next(name for name, kind in COMMAND_CONFIGS.items() if kind is type(config))
        settings = _wandb_config(config)
        try:
            import wandb  # optional, and takes a second

            self._wandb = wandb
            self._run = wandb.init(
                entity=entity or None,
                project=project_name,
                id=_wandb_id(directory),
                resume="allow",
                name=directory.resolve().name,
                job_type=command,
                dir=directory,
                config=settings,
                allow_val_change=True,  # what a resume changes
                reinit="create_new",
                # console: the streams stay as they are; what a run says is in its log
                settings=wandb.Settings(console="off", silent=True, finish_timeout=FINISH_S),
            )
        except Exception as error:  # wandb hands on whatever its service, its files and the network raise
            fix = (
                f"`wandb login`, WANDB_MODE=offline (files for `wandb sync` in {directory / 'wandb'}) or log.wandb=null"
            )
            raise BoardError(f"log.wandb={project}: {_line(error)}; fix: {fix}") from None

    @property
    def place(self) -> str:
        """Where a person finds it."""
        if self._run.offline:
            return f"offline; `wandb sync {Path(self._run.dir).parent}` uploads it"
        return self._run.url or "disabled"

    def iteration(self, iteration: int, metrics: Metrics) -> None:
        self._log(dict(metrics), iteration)

    def samples(self, iteration: int, rows: Sequence[Row]) -> None:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        cells: list[Any] = [[iteration, *(_cell(row.get(column)) for column in columns)] for row in rows]
        table = self._wandb.Table(columns=["iteration", *columns], data=cells, allow_mixed_types=True)
        self._log({"samples": table}, iteration)

    def _log(self, values: dict[str, Any], iteration: int) -> None:
        try:
            self._run.log(values, step=iteration)
        except Exception as error:  # as above
            raise BoardError(_line(error)) from None

    def close(self, code: int) -> None:
        try:
            if code == EXIT_STOPPED:
                self._run.mark_preempting()
            self._run.finish(exit_code=code)
        except Exception as error:  # as above
            raise BoardError(_line(error)) from None


def _wandb_id(directory: Path) -> str:
    path = directory / WANDB_ID_FILE
    if not path.exists():
        write_whole(path, f"{secrets.token_hex(4)}\n")
    return path.read_text(encoding="utf-8").strip()


def _wandb_config(config: TrainConfig) -> dict[str, Any]:
    settings: Any = OmegaConf.to_container(OmegaConf.structured(config))
    return {**settings, "megatron_gil": {"version": __version__, "commit": git_commit()}}


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value


def _markdown(row: Row) -> str:
    """Each text as a block that is shown as it is; numbers in a line below."""
    texts = {key: value for key, value in row.items() if isinstance(value, str)}
    blocks = [f"**{key}**\n\n    " + text.replace("\n", "\n    ") for key, text in texts.items()]
    numbers = ", ".join(f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, int | float))
    return "\n\n".join([*blocks, *([numbers] if numbers else [])])


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
