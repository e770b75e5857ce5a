"""Names on the Hub in the place of paths: from a cache on disk without a network, and from a Hub on this machine."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from omegaconf import OmegaConf

from megatron_gil.data.hub import HubName
from tests.faults.running import Answer, Call, Interruption, arguments, call_all
from tests.ranks import run_ranks
from tests.training.hub_server import COMMIT, LATER, HubServer, hub_server


def _put_in_cache(cache: Path, repo: str, source: Path, commit: str = COMMIT, branch: str = "main") -> Path:
    """As huggingface_hub lays it out: files by content, linked into a snapshot; what a branch was last."""
    root = cache / repo.replace("/", "--")
    snapshot = root / "snapshots" / commit
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        place = snapshot / path.relative_to(source)
        blob = root / "blobs" / f"{commit[0]}-{path.name}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, blob)
        place.symlink_to(os.path.relpath(blob, place.parent))
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / branch).write_text(commit)
    return snapshot


def _call(calls: list[Call], world: Path, environment: dict[str, str]) -> list[Answer]:
    """environment: with {rank} in a value, which then differs between ranks."""
    for name, value in environment.items():
        os.environ[name] = value.format(rank=os.environ["RANK"])
    importlib.reload(huggingface_hub.constants)  # the server that ranks are forked from has read its environment
    return call_all(calls, world)


def _config_of(run: Path) -> Any:
    return OmegaConf.load(run / "config.yaml")


@pytest.fixture
def cache(world: Path, tmp_path: Path) -> Path:
    """Of a model, and of a data set with two shards beside a file of another split."""
    cache = tmp_path / "cache"
    _put_in_cache(cache, "models/tiny/llama", world / "policy")
    lines = (world / "demonstrations.jsonl").read_text().splitlines(keepends=True)
    data = tmp_path / "data_repo/data"
    data.mkdir(parents=True)
    (data / "train-0.jsonl").write_text("".join(lines[:10]))
    (data / "train-1.jsonl").write_text("".join(lines[10:20]))
    (data / "test.jsonl").write_text("".join(lines[20:]))
    _put_in_cache(cache, "datasets/tiny/rows", tmp_path / "data_repo")
    return cache


@pytest.fixture
def hub(world: Path) -> Iterator[HubServer]:
    with hub_server() as server:
        server.put("models/tiny/llama", world / "policy")
        yield server


def _offline(cache: Path) -> dict[str, str]:
    return {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}


def _online(hub: HubServer, cache: Path) -> dict[str, str]:
    return {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}


def test_a_run_from_the_cache_is_pinned_and_goes_on_with_its_commit(world: Path, cache: Path, tmp_path: Path) -> None:
    """The branch moves between the stop and the resume."""
    run = tmp_path / "run"
    names = [
        "models.policy=tiny/llama",
        "data.train=tiny/rows:data/train-*.jsonl",
        "data.eval=tiny/rows:data/test.jsonl",
    ]
    command = arguments("sft", world, run, *names)
    stopped = Call(command, Interruption("beginning iteration", 3, signal.SIGTERM, 0))
    (answer,) = run_ranks(_call, 1, [stopped], world, _offline(cache))[0]
    assert answer.code == 75, answer.stderr
    config = _config_of(run)
    assert config.models.policy == f"tiny/llama@{COMMIT}"
    assert config.data.train == f"tiny/rows@{COMMIT}:data/train-*.jsonl"
    assert config.data.eval == f"tiny/rows@{COMMIT}:data/test.jsonl"
    assert f"from tiny/llama@{COMMIT}" in " ".join(answer.stderr.split())
    assert "20 rows" in answer.stderr
    _put_in_cache(cache, "models/tiny/llama", world / "other", LATER)
    changed = [*command, f"models.policy=tiny/llama@{LATER}"]
    answers = run_ranks(_call, 1, [Call(changed), Call(command)], world, _offline(cache))[0]
    assert [a.code for a in answers] == [2, 0], answers
    assert f"models.policy=tiny/llama@{COMMIT}, not tiny/llama@{LATER}; that cannot change" in answers[0].stderr
    assert "resuming with another setting" not in answers[1].stderr
    assert _config_of(run) == config

    whole = arguments("sft", world, tmp_path / "whole", f"models.policy={world / 'policy'}", *names[1:])
    (answer,) = run_ranks(_call, 1, [Call(whole)], world, _offline(cache))[0]
    assert answer.code == 0, answer.stderr
    last = "checkpoints/iter_0000004/policy/model.safetensors"
    assert (run / last).read_bytes() == (tmp_path / "whole" / last).read_bytes()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("models.policy=tiny/absent", "models.policy=tiny/absent is no path here, is not (or not whole) in the Hub's"),
        (
            "models.policy=tiny/llama@v2",
            "HF_HUB_OFFLINE is set; where there is a network: `hf download --revision v2",
        ),
        ("models.policy=tiny/llama:x", "models.policy=tiny/llama:x: a model is a whole repository; leave out :x"),
        ("models.policy=tiny/part", "no weights in model*.safetensors; the repository has none, or only a part of it"),
        (
            "data.train=tiny/rows@main",
            "holds 3 data files (data/test.jsonl, data/train-0.jsonl, data/train-1.jsonl)",
        ),
        ("data.train=tiny/rows:dota/*", "dota/*: no such file or directory"),
        ("data.tokenizer=tiny/rows@main", "data.tokenizer=tiny/rows@main is no path here, is not (or not whole)"),
    ],
)
def test_what_the_cache_lacks_is_said_with_its_key(
    world: Path, cache: Path, tmp_path: Path, override: str, said: str
) -> None:
    (tmp_path / "part").mkdir()
    shutil.copyfile(world / "policy/config.json", tmp_path / "part/config.json")
    _put_in_cache(cache, "models/tiny/part", tmp_path / "part")
    call = Call(arguments("sft", world, tmp_path / "run", override))
    dry = Call([*call.arguments, "--dry-run"])
    for answer in run_ranks(_call, 1, [call, dry], world, _offline(cache))[0]:
        assert answer.code == 2
        assert said in answer.stderr, answer.stderr
        assert answer.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_one_rank_of_a_node_downloads_and_the_others_wait(hub: HubServer, world: Path, tmp_path: Path) -> None:
    command = arguments("sft", world, tmp_path / "run", "models.policy=tiny/llama", "train.updates=1")
    ranks = run_ranks(_call, 2, [Call(command)], world, _online(hub, tmp_path / "cache"))
    assert [answers[0].code for answers in ranks] == [0, 0], ranks[0][0].stderr
    assert hub.served == dict.fromkeys(hub.served, 1)
    assert {"config.json", "model.safetensors", "tokenizer.model"} <= set(hub.served)
    assert _config_of(tmp_path / "run").models.policy == f"tiny/llama@{COMMIT}"


def test_every_node_gets_the_commit_of_rank_0(hub: HubServer, world: Path, tmp_path: Path) -> None:
    """Two nodes with a cache each."""
    command = arguments("sft", world, tmp_path / "run", "models.policy=tiny/llama", "train.updates=1")
    environment = _online(hub, tmp_path / "cache_{rank}") | {"LOCAL_RANK": "0"}
    ranks = run_ranks(_call, 2, [Call(command)], world, environment)
    assert [answers[0].code for answers in ranks] == [0, 0], ranks[0][0].stderr
    assert hub.served == dict.fromkeys(hub.served, 2)
    for rank in range(2):
        assert (tmp_path / f"cache_{rank}/models--tiny--llama/snapshots" / COMMIT / "config.json").is_file()


def test_only_what_is_read_is_downloaded(hub: HubServer, world: Path, tmp_path: Path) -> None:
    """Not the same weights in other forms, as the repositories of Llama have them."""
    repo = tmp_path / "repo"
    shutil.copytree(world / "policy", repo)
    (repo / "original").mkdir()
    for name in ("original/params.json", "original/model.safetensors", "pytorch_model.bin", "README.md"):
        (repo / name).write_text("{}")
    hub.put("models/tiny/llama", repo, LATER, branch="v2")
    command = arguments("sft", world, tmp_path / "run", "models.policy=tiny/llama@v2", "--dry-run")
    (answer,) = run_ranks(_call, 1, [Call(command)], world, _online(hub, tmp_path / "cache"))[0]
    assert answer.code == 0, answer.stderr
    assert set(hub.served) == {path.name for path in (world / "policy").iterdir()}


def test_a_plan_downloads_the_sizes_alone(hub: HubServer, world: Path, tmp_path: Path) -> None:
    calls = [Call(["plan", "--model", "tiny/llama", "--gpus", "1"]), Call(["plan", "--model=tiny/absent"])]
    known, absent = run_ranks(_call, 1, calls, world, _online(hub, tmp_path / "cache"))[0]
    assert known.code == 0, known.stderr
    assert hub.served == {"config.json": 1}
    assert absent.code == 2
    assert "--model=tiny/absent is no path here, and the Hub shows no model of that name" in absent.stderr


def test_a_conversion_and_an_audit_read_names(hub: HubServer, world: Path, tmp_path: Path) -> None:
    hub.put("datasets/tiny/pairs", tmp_path / "pairs")
    (tmp_path / "pairs").mkdir()
    shutil.copyfile(world / "preferences.jsonl", tmp_path / "pairs/pairs.jsonl")
    ppo = arguments("ppo", world, tmp_path / "run")
    calls = [
        Call(["convert", "import", "tiny/llama@main", str(tmp_path / "imported")]),
        Call(["convert", "verify", "tiny/llama", str(tmp_path / "imported")]),
        Call(["audit", *ppo[1:], "audit.pairs=tiny/pairs@main", f"output={tmp_path / 'audit.json'}", "--dry-run"]),
    ]
    answers = run_ranks(_call, 1, calls, world, _online(hub, tmp_path / "cache"))[0]
    assert [answer.code for answer in answers] == [0, 0, 0], answers
    assert (tmp_path / "imported/model.safetensors").is_file()
    assert hub.served["pairs.jsonl"] == 1


def _call_and_stop(calls: list[Call], world: Path, environment: dict[str, str], begun: Path) -> list[Answer]:
    """One of the ranks gets a SIGTERM once there is the file `begun`."""

    def stop() -> None:
        while not begun.exists():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    if os.environ["RANK"] == "1":
        threading.Thread(target=stop, daemon=True).start()
    return _call(calls, world, environment)


def test_a_stop_need_not_wait_for_a_download(hub: HubServer, world: Path, tmp_path: Path) -> None:
    """The Hub sends nothing of the files until the test is over."""
    hub.release.clear()
    begun = tmp_path / "begun"
    threading.Thread(target=lambda: hub.begun.wait() and begun.touch(), daemon=True).start()
    command = arguments("sft", world, tmp_path / "run", "models.policy=tiny/llama")
    environment = _online(hub, tmp_path / "cache")
    ranks = run_ranks(_call_and_stop, 2, [Call(command)], world, environment, begun, timeout_s=400.0)
    assert [answers[0].code for answers in ranks] == [75, 75]
    assert "stopped by SIGTERM in downloading models.policy, with nothing to save" in ranks[0][0].stderr


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("models.policy=tiny/absent", "tiny/absent is no path here, and the Hub shows no model of that name"),
        ("models.policy=tiny/gated", "is gated; accept its terms on https://huggingface.co/tiny/gated, then `hf auth"),
        ("models.policy=tiny/llama@v9", "models.policy=tiny/llama@v9 has no revision v9; https://hugg"),
        (
            "data.train=tiny/rows@main",
            "data.train=tiny/rows@main: holds 2 data files (a.jsonl, b.jsonl); say which",
        ),
    ],
)
def test_what_the_hub_refuses_is_said_by_one_rank(
    hub: HubServer, world: Path, tmp_path: Path, override: str, said: str
) -> None:
    hub.put("models/tiny/gated", world / "policy")
    hub.gated.add("models/tiny/gated")
    (tmp_path / "rows").mkdir()
    for name in ("a.jsonl", "b.jsonl", "c.txt"):
        (tmp_path / "rows" / name).write_text("{}\n")
    hub.put("datasets/tiny/rows", tmp_path / "rows")
    call = Call(arguments("sft", world, tmp_path / "run", override))
    ranks = run_ranks(_call, 2, [call], world, _online(hub, tmp_path / "cache"))
    assert [answers[0].code for answers in ranks] == [2, 2]
    assert said in ranks[0][0].stderr, ranks[0][0].stderr
    assert (ranks[0][0].stderr.count("\n"), ranks[1][0].stderr) == (1, "")
    assert not (tmp_path / "run").exists()


def test_a_path_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = HubName(repo="owner/name")
    assert HubName.parse("owner/name") == name
    assert HubName.parse("owner/name@v1.0:data/train-*.parquet") == HubName(
        repo="owner/name", revision="v1.0", files="data/train-*.parquet"
    )
    for path in ("/owner/name", "./owner", "../name", "owner", "a/b/c", "owner/name.jsonl", "owner/x.parquet", ""):
        assert HubName.parse(path) is None, path
    (tmp_path / "owner").mkdir()
    assert HubName.parse("owner/name") is None, "a mistyped path"
    assert HubName.parse("owner/name@main") is not None
    (tmp_path / "owner/name@main").mkdir()
    assert HubName.parse("owner/name@main") is None
