from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_gil.config import ConfigError
from megatron_gil.data.prepare.split import PrepareOptions, prepare, split_of
from megatron_gil.data.rows.demonstrations import DemonstrationDataset
from megatron_gil.data.rows.preferences import PreferenceDataset
from megatron_gil.data.rows.prompts import PromptDataset
from megatron_gil.data.text.chat import parse_dialogue
from megatron_gil.data.text.tokenizer import Tokenizer
from megatron_gil.jsonl import iter_jsonl
from tests.ranks import PATIENCE_S

TOOL = Path(__file__).parents[2] / "tools" / "prepare_data.py"
KINDS = ("prompts", "demonstrations", "preferences")


def run(source: str, path: Path, output: Path, **options: Any) -> dict[str, Any]:
    return prepare(PrepareOptions(source=source, inputs=[str(path)], output=output, **options))


def rows_of(output: Path, kind: str, split: str = "*") -> list[dict[str, Any]]:
    files = sorted(output.glob(f"{split}/{kind}.jsonl"))
    return [row for file in files for _, row in iter_jsonl(file)]


def contents(output: Path) -> dict[str, bytes]:
    return {str(file.relative_to(output)): file.read_bytes() for file in output.rglob("*") if file.is_file()}


def first_question(row: dict[str, Any]) -> str:
    messages = row.get("messages") or parse_dialogue(row["prompt"]) or [{"role": "user", "content": row["prompt"]}]
    return next(message["content"] for message in messages if message["role"] == "user")


@pytest.fixture(scope="module")
def prepared(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    output = tmp_path_factory.mktemp("prepared")
    directories = {"hh": "hh", "tldr": "tldr", "sharegpt": "sharegpt", "safe-rlhf": "pku", "cnndm": "cnndm"}
    for source, directory in directories.items():
        run(source, real_data / directory, output / source, eval_fraction=0.2)
    return {source: output / source for source in directories}


def test_no_opening_question_is_in_two_splits(prepared: dict[str, Path]):
    for output in prepared.values():
        seen = {
            s: {first_question(row) for kind in KINDS for row in rows_of(output, kind, s)} for s in ("train", "eval")
        }
        assert seen["train"]
        assert not seen["train"] & seen["eval"]
    sizes = [len(rows_of(prepared["hh"], "prompts", split)) for split in ("train", "eval")]
    assert 0.17 < sizes[1] / sum(sizes) < 0.23


def test_no_row_is_written_twice(prepared: dict[str, Path]):
    for output in prepared.values():
        for kind in KINDS:
            rows = [json.dumps({**row, "group": None}) for row in rows_of(output, kind)]
            assert len(set(rows)) == len(rows)
    dropped = json.loads((prepared["sharegpt"] / "card.json").read_text())["dropped"]
    assert dropped["preferences"]["repeats an earlier row"] == 5


def test_every_native_row_is_accounted_for(prepared: dict[str, Path]):
    for output in prepared.values():
        card = json.loads((output / "card.json").read_text())
        num_read = sum(card["rows_read"].values())
        for kind in {kind for kinds in card["splits"].values() for kind in kinds}:
            written = sum(kinds[kind]["rows"] for kinds in card["splits"].values())
            left_out = sum(sum(card["dropped"].get(where, {}).values()) for where in (kind, "rows"))
            assert written + left_out == num_read
            assert written == len(rows_of(output, kind))


def test_the_card_describes_the_files(prepared: dict[str, Path]):
    import hashlib

    for output in prepared.values():
        card = json.loads((output / "card.json").read_text())
        for split, kinds in card["splits"].items():
            for kind, entry in kinds.items():
                file = output / split / f"{kind}.jsonl"
                assert entry["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
                for name, characters in entry["characters"].items():
                    texts = [row[name] for row in rows_of(output, kind, split)]
                    lengths = [len(t) if isinstance(t, str) else sum(len(m["content"]) for m in t) for t in texts]
                    assert characters["max"] == max(lengths)
                    assert characters["mean"] == pytest.approx(sum(lengths) / len(lengths), abs=0.051)
        text = (output / "card.md").read_text()
        assert all(reason in text for reasons in card["dropped"].values() for reason in reasons)


def test_prepared_files_are_read_for_training(prepared: dict[str, Path], plain_tokenizer: Tokenizer):
    limits: dict[str, Any] = {"max_tokens": 256, "max_prompt_tokens": 128}
    for source, output in prepared.items():
        datasets = [
            PromptDataset(output / "train", plain_tokenizer, max_prompt_tokens=128),
            DemonstrationDataset(output / "train", plain_tokenizer, **limits),
        ]
        datasets[0].collate([0, 1], [0, 1])
        datasets[1].collate([0, 1])
        if source != "cnndm":
            datasets.append(PreferenceDataset(output / "train", plain_tokenizer, **limits))
            datasets[2].collate([0, 1])
        for dataset, kind in zip(datasets, KINDS, strict=False):
            assert len(dataset) == len(rows_of(output, kind, "train"))
    assert PromptDataset(prepared["hh"] / "train", plain_tokenizer, max_prompt_tokens=9).group_names == (
        "harmless",
        "helpful",
    )


def test_the_same_input_gives_the_same_bytes(real_data: Path, prepared: dict[str, Path], tmp_path: Path):
    run("hh", real_data / "hh", tmp_path / "again", eval_fraction=0.2)
    assert contents(tmp_path / "again") == contents(prepared["hh"])


def test_excluded_prompts_are_left_out_whatever_their_form(write_rows: Callable[..., Path], tmp_path: Path):
    def talk(*said: str) -> dict[str, Any]:
        return {"conversations": [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]}

    path = write_rows(
        [talk("Hello  there", "a"), talk("x", "y", "z", "w"), talk("other", "a"), talk("p", "q", "r", "s")]
    )
    excluded = [
        {"prompt": "hello THERE"},
        {"prompt": "\n\nHuman: x\n\nAssistant: y\n\nHuman: z\n\nAssistant:"},
        {"chosen": "\n\nHuman: p\n\nAssistant: 1", "rejected": "\n\nHuman: p\n\nAssistant: 2"},  # an earlier turn's
        "no row at all",
    ]
    exclude = write_rows(excluded, "exclude.jsonl")
    card = run("sharegpt", path, tmp_path / "out", exclude=[str(exclude)], eval_fraction=0)
    assert [first_question(row) for row in rows_of(tmp_path / "out", "demonstrations")] == ["other"]
    assert card["dropped"]["rows"] == {"the prompt occurs in an excluded file": 3}
    assert card["exclude"] == ["exclude.jsonl"]


def test_a_file_excludes_itself(real_data: Path, tmp_path: Path):
    files = sorted((real_data / "hh").iterdir())
    harmless = str(files[0])
    both = PrepareOptions(source="hh", inputs=[str(f) for f in files], output=tmp_path / "out", exclude=[harmless])
    prepare(both)
    assert {row["group"] for row in rows_of(tmp_path / "out", "prompts")} == {"helpful"}


@given(prompt=st.text(), fraction=st.floats(0, 1, exclude_max=True))
def test_a_prompt_stays_in_its_split_as_spaces_case_and_the_fraction_change(prompt: str, fraction: float):
    split = split_of(prompt, fraction)
    assert split_of(f"  {prompt}\n", fraction) == split
    assert split_of(f"\n\nHuman: {prompt}\n\nAssistant: a\n\nHuman: b\n\nAssistant:", fraction) in ("train", "eval")
    assert split == "train" or split_of(prompt, min(1.0, fraction * 1.5)) == "eval"
    assert split_of(prompt, 0) == "train"


def test_half_a_surrogate_pair_does_not_stop_the_run(write_rows: Callable[..., Path], tmp_path: Path):
    run("jsonl", write_rows([{"prompt": "a\ud800b", "completion": "c"}]), tmp_path / "out", eval_fraction=0)
    assert rows_of(tmp_path / "out", "demonstrations") == [{"prompt": "a?b", "completion": "c"}]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"eval_fraction": 1.0}, r"--eval-fraction=1.0 must lie in \[0, 1\)"),
        ({"limit": 0}, "--limit=0 must be at least 1"),
        ({"eval_fraction": float("nan")}, r"--eval-fraction=nan must lie in \[0, 1\)"),
        ({"exclude": ["nothing.jsonl"]}, "nothing.jsonl: no such file"),
        ({"source": "hh"}, "none of 2 rows can be used as hh"),
    ],
)
def test_a_refusal_leaves_nothing_behind(
    write_rows: Callable[..., Path], tmp_path: Path, options: dict[str, Any], complaint: str
):
    path = write_rows([{"prompt": "a"}, {"prompt": "b"}])
    with pytest.raises(ConfigError, match=complaint):
        run(options.pop("source", "jsonl"), path, tmp_path / "deep" / "out", **options)
    assert not list(tmp_path.glob("deep/*")) + list(tmp_path.glob("deep/.*"))


def test_a_run_that_fails_half_way_leaves_nothing_behind(write_rows: Callable[..., Path], tmp_path: Path):
    path = write_rows([{"prompt": "a"}])
    path.write_text(path.read_text() + "{")
    with pytest.raises(ConfigError, match=":2: not valid JSON"):
        run("jsonl", path, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


def test_options_limit_and_group(write_rows: Callable[..., Path], tmp_path: Path):
    path = write_rows([{"prompt": str(i)} for i in range(9)])
    run("jsonl", path, tmp_path / "out", eval_fraction=0, limit=3, group="mine")
    assert rows_of(tmp_path / "out", "prompts") == [{"prompt": str(i), "group": "mine"} for i in range(3)]


@pytest.mark.parametrize("by", [("-m", "megatron_gil", "prepare-data"), (str(TOOL),)], ids=["command", "tool"])
def test_the_command_answers_in_one_line_and_exit_codes(
    by: tuple[str, ...], write_rows: Callable[..., Path], tmp_path: Path
):
    command = [sys.executable, *by, "jsonl", "--input", str(write_rows([{"prompt": "a"}])), "--output"]
    for expected in (0, 2):  # the second finds the first one's output
        done = subprocess.run(
            [*command, str(tmp_path / "out")],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TOOL.parents[1])},
        )
        assert done.returncode == expected, done.stderr
    assert done.stderr == f"megatron-gil prepare-data: {tmp_path / 'out'}: exists; name another --output or remove it\n"
    assert (tmp_path / "out" / "train" / "prompts.jsonl").read_text() == '{"prompt": "a"}\n'


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    tool = Path(__file__).parents[2] / "tools" / "prepare_data.py"
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"{i}" * 900, "completion": "x"}) + "\n" for i in range(300)))
    given = ["jsonl", "--input", str(source), "--output", str(tmp_path / "out")]
    command = ["sh", "-c", 'ulimit -f 100; exec "$@"', "sh", sys.executable, str(tool), *given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stderr) == (1, f"megatron-gil prepare-data: {tmp_path / 'out'}: File too large\n")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
