"""TensorBoard and Weights & Biases (the real package, offline) show what metrics.jsonl and samples.jsonl hold."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from megatron_gil.config import ConfigError, LogSection, SftConfig
from megatron_gil.config.files import load_config
from megatron_gil.jsonl import iter_jsonl
from megatron_gil.training.run.boards import check_boards
from megatron_gil.training.run.metrics import RunLog
from tests.faults.running import Answer, Call, Interruption, arguments, call_all
from tests.ranks import run_ranks

try:
    Record: Any = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
except ImportError:
    Record = None
needs_wandb = pytest.mark.skipif(Record is None, reason="no wandb: pip install 'megatron_gil[wandb]'")

EVERY = ("log.samples_every=2", "log.samples=3")
BLOCK = 32768


def _rows(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in iter_jsonl(path)]


def _call_with_wandb(calls: list[Call], world: Path, environment: dict[str, str]) -> list[Answer]:
    os.environ.update(environment)
    return call_all(calls, world)


def _records(start: Path) -> Iterator[Any]:
    """What a start of a run left: protocol buffers in the log format of LevelDB, after a header of 7 bytes."""
    (path,) = start.glob("run-*.wandb")
    content, at, whole = path.read_bytes(), 7, b""
    while at < len(content):
        if BLOCK - at % BLOCK < 7:  # no room for another header
            at += BLOCK - at % BLOCK
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        whole += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # the whole of a record, or its end
            yield Record.FromString(whole)
            whole = b""


def _history(start: Path) -> list[dict[str, Any]]:
    """Of every step: its number and what was logged in it."""
    steps = []
    for record in _records(start):
        if record.HasField("history"):
            items = {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            steps.append({"_step": record.history.step.num, **items})
    return steps


def test_tensorboard_has_the_metrics_and_the_samples(world: Path, tmp_path: Path) -> None:
    call = Call(arguments("sft", world, tmp_path / "run", *EVERY, "log.tensorboard=true"))
    (answer,) = run_ranks(call_all, 1, [call], world)[0]
    assert answer.code == 0, answer.stderr
    board = EventAccumulator(str(tmp_path / "run"))
    board.Reload()
    for row in _rows(tmp_path / "run/metrics.jsonl"):
        iteration = row.pop("iteration")
        for name, value in row.items():
            (shown,) = [event.value for event in board.Scalars(name) if event.step == iteration]
            assert shown == pytest.approx(value, rel=1e-6)  # float32
    samples = _rows(tmp_path / "run/samples.jsonl")
    assert len(samples) == 6
    for number in range(3):
        events = board.Tensors(f"samples/{number}/text_summary")
        assert [event.step for event in events] == [1, 3]
        for event, sample in zip(events, samples[number::3], strict=True):
            shown: Any = tensor_util.make_ndarray(event.tensor_proto).item()
            text = shown.decode()
            assert event.step == sample["iteration"]
            for name in ("prompt", "target"):
                assert f"**{name}**\n\n    " + sample[name].replace("\n", "\n    ") in text


@needs_wandb
def test_wandb_gets_the_same_from_rank_0_and_goes_on_after_a_stop(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = arguments("ppo", world, run, *EVERY, "log.wandb=team/project")
    calls = [Call(command, Interruption("beginning iteration", 3, signal.SIGTERM, 1)), Call(command)]
    answers = run_ranks(_call_with_wandb, 2, calls, world, {"WANDB_MODE": "offline"})
    assert [answer.code for answer in answers[0]] == [75, 0], answers[0]
    assert all("Weights & Biases: offline; `wandb sync " in answer.stderr for answer in answers[0])
    starts = sorted(path for path in (run / "wandb").glob("offline-run-*") if not path.is_symlink())
    first, second = starts  # one of each start: rank 1 has none
    wandb_id = (run / "wandb_id").read_text().strip()
    assert {start.name.rpartition("-")[2] for start in starts} == {wandb_id}

    history = [_history(start) for start in starts]
    assert [step["_step"] for step in history[0]] == [0, 1]
    assert [step["_step"] for step in history[1]] == [2, 3]
    for step, row in zip(history[0] + history[1], _rows(run / "metrics.jsonl"), strict=True):
        assert row.pop("iteration") == step["_step"]
        assert {name: value for name, value in step.items() if name in row} == row
        assert {name for name in step if not name.startswith(("_", "samples"))} == set(row)
    samples = _rows(run / "samples.jsonl")
    tables = [json.loads(path.read_text()) for start in starts for path in start.glob("files/media/table/*.json")]
    found = [dict(zip(table["columns"], cells, strict=True)) for table in tables for cells in table["data"]]
    expected = [{k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in samples]
    assert found == expected
    assert len(found) == 6

    kept = [{record.WhichOneof("record_type"): record for record in _records(start)} for start in starts]
    for records in kept:
        about = records["run"].run
        assert (about.entity, about.project, about.run_id) == ("team", "project", wandb_id)
        assert (about.display_name, about.job_type) == ("run", "ppo")
        config = {item.key: json.loads(item.value_json) for item in about.config.update}
        assert config["ppo"]["prompts"] == 8
        assert config["megatron_gil"].keys() == {"version", "commit"}
    assert [records["exit"].exit.exit_code for records in kept] == [75, 0]
    assert ["preempting" in records for records in kept] == [True, False]
    assert first != second


def _log_while_the_service_dies(run: Path) -> str:
    """What a RunLog says whose wandb is killed after the first iteration."""
    os.environ["WANDB_MODE"] = "offline"
    config = load_config(SftConfig, None, [f"run.dir={run}", "log.wandb=project", "log.tensorboard=false"])
    run.mkdir()
    with contextlib.redirect_stderr(io.StringIO()) as said:
        log = RunLog(run, config=config, num_iterations=3, start=0, line=())
        for iteration in range(3):
            log.samples(iteration, [{"prompt": "a", "response": "b"}])
            log.iteration(iteration, {"x": float(iteration)})
            for process in psutil.Process().children(recursive=True):
                if process.name() == "wandb-core":
                    process.kill()
                    process.wait()
        log.close(0)
    return said.getvalue()


@needs_wandb
def test_a_wandb_that_dies_is_said_once_and_the_run_goes_on(tmp_path: Path) -> None:
    (said,) = run_ranks(_log_while_the_service_dies, 1, tmp_path / "run")
    assert said.count("no more Weights & Biases in this run, which goes on: ") == 1, said
    assert [row["x"] for row in _rows(tmp_path / "run/metrics.jsonl")] == [0, 1, 2]
    assert len(_rows(tmp_path / "run/samples.jsonl")) == 3


@needs_wandb
def test_a_run_does_not_start_without_the_wandb_that_it_was_asked_for(world: Path, tmp_path: Path) -> None:
    """Nobody is logged in: all ranks end, with one line, before an iteration."""
    call = Call(arguments("sft", world, tmp_path / "run", "log.wandb=project"))
    environment = {"WANDB_MODE": "online", "HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "WANDB_API_KEY": ""}
    ranks = run_ranks(_call_with_wandb, 2, [call], world, environment)
    assert [answers[0].code for answers in ranks] == [1, 1]
    lines = [line for line in ranks[0][0].stderr.split("\n") if "log.wandb" in line]
    assert len(lines) == 1
    assert "log.wandb=project: " in lines[0]
    assert "WANDB_MODE=offline" in lines[0]
    assert not (tmp_path / "run/metrics.jsonl").read_text()


def _config(wandb: str | None) -> SftConfig:
    return load_config(SftConfig, None, ["run.dir=x", *([f"log.wandb={wandb}"] if wandb else [])])


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory wandb/ that offline runs left where the command starts is no package."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    importlib.invalidate_caches()
    check_boards(_config(None))
    with pytest.raises(
        ConfigError, match=r"log\.wandb=mine needs the wandb package: pip install 'wandb>=0\.31', or set"
    ):
        check_boards(_config("mine"))


@pytest.mark.parametrize("project", ["", "a/b/c", "a/", "a#b", "a:b"])
def test_a_project_that_wandb_would_refuse_is_refused(project: str) -> None:
    with pytest.raises(ConfigError, match=r"log\.wandb=.* must be PROJECT or ENTITY/PROJECT"):
        LogSection(wandb=project)
