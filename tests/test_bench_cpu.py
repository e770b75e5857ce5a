"""What the CPU benches measure on: lengths as in chats, the same rows on both sides, responses that end by themselves.
Two of them also run whole, on tiny models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import bench_rows
from bench_ppo import Sizes, write_inputs

from megatron_gil.data.rows.order import RowOrder
from megatron_gil.jsonl import iter_jsonl
from tests.ranks import PATIENCE_S

ROOT = Path(__file__).parents[1]


def test_every_batch_is_as_ragged_as_chats() -> None:
    """HH-RLHF's rows, cut at 512 tokens, have a mean of 174; their batches of 32 are 64 % padding."""
    batches = bench_rows.draw_batches(20, 32, vocab_size=100, lengths="chat")
    lengths = torch.tensor([[len(r.prompt) + len(r.chosen) + 1 for r in batch] for batch in batches]).double()
    assert float(lengths.mean()) == pytest.approx(174, rel=0.05)
    assert lengths.mean(1).std() < 8
    assert int(lengths.max()) <= bench_rows.MAX_TOKENS
    padding = 1 - lengths.sum() / (32 * lengths.amax(1)).sum()
    assert float(padding) == pytest.approx(0.64, abs=0.04)
    words = {word for batch in batches for row in batch for word in (*row.prompt, *row.chosen, *row.rejected)}
    assert words == set(range(1, 98)), "neither 0, nor the end, nor padding"


def test_full_rows_are_all_alike() -> None:
    [batch] = bench_rows.draw_batches(1, 4, vocab_size=100, lengths="full")
    assert {(len(row.prompt), len(row.chosen)) for row in batch} == {(64, 191)}


def test_a_run_reads_in_its_order_what_the_other_side_reads_in_the_files(tmp_path: Path) -> None:
    batches = bench_rows.draw_batches(3, 4, vocab_size=50, lengths="chat", scale=0.1)
    bench_rows.write_rows(tmp_path, batches, seed=7)
    for name in ("demonstrations", "preferences"):
        ours = [row for _, row in iter_jsonl(tmp_path / f"{name}.jsonl")]
        theirs = [row for _, row in iter_jsonl(tmp_path / f"sequential_{name}.jsonl")]
        assert ours != theirs
        order = RowOrder(12, seed=7, batch_size=4)
        read = [ours[row_id] for update in range(3) for row_id in order.next(4 * update).row_ids]
        assert read == theirs
    words = [f"w{word}" for word in batches[2][1].prompt]
    assert theirs[9]["prompt"].split() == words


def test_ragged_responses_are_geometric_with_a_third_of_the_limit_as_their_mean(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    sizes = Sizes(ragged=True)
    write_inputs(tmp_path, sizes)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        logits = model(torch.randint(sizes.vocab_size - 2, (8, 96))).logits
    ends = logits.softmax(-1)[..., sizes.vocab_size - 2]
    assert float(1 / ends.mean()) == pytest.approx(sizes.response_tokens / 3, rel=0.25)
    assert float(ends.max() / ends.min()) < 1.1, "about as likely everywhere"


def _bench(place: Path, *arguments: str) -> tuple[str, list[dict]]:
    command = [sys.executable, str(ROOT / "tools/bench.py"), *arguments, "--rounds", "1"]
    command += ["--json", str(place / "figures.json")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((place / "figures.json").read_text())


def test_bench_train_measures_both_sides_on_the_same_rows(tmp_path: Path) -> None:
    shown, cases = _bench(tmp_path, "train", "--shapes", "tiny", "--parts", "engine", "dpo")
    assert [(case["part"], case["lengths"]) for case in cases] == [
        ("engine", "full"),
        ("engine", "chat"),
        ("dpo", "chat"),
    ]
    for case in cases:
        for side in ("ours", "theirs"):
            [step] = case[side]["steps"]
            assert min(step["seconds"], step["cpu_seconds"]) > 0
            assert 0 <= step["notes"]["padding"] < 1
        assert (case["ours"]["measured"] is None) == (case["part"] == "dpo")
    engine_chat = cases[1]
    assert engine_chat["theirs"]["steps"][0]["notes"]["padding"] > 0.3, "theirs is padded to the longest row"
    assert 2**20 < engine_chat["theirs"]["measured"]["notes"]["peak_bytes"] < 2**30
    assert shown.count("| engine | 32 x 2, 64 | chat | 8 |") == 2  # as it comes, and in the table


def test_bench_growth_compares_memory_with_the_plan(tmp_path: Path) -> None:
    shown, figures = _bench(tmp_path, "growth", "--only", "recompute")
    peaks = {}
    for entry in figures:
        [rank] = entry["ranks"]
        assert rank["planned_bytes"] == pytest.approx(rank["measured_bytes"], rel=0.12)
        peaks[entry["point"]["recompute"]] = rank["measured_bytes"]
    assert peaks["full"] < 0.8 * peaks["none"]
    assert "| recompute full |" in shown
