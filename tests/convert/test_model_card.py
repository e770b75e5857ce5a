"""The README.md of an export: front matter that the Hub reads, the runs that made the model, and code that loads it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from transformers import AutoModelForSequenceClassification

from megatron_gil import __version__
from megatron_gil.data.rows.encoding import encode_responses
from megatron_gil.data.text.tokenizer import Tokenizer
from megatron_gil.models.convert.copy import export_model, import_model
from megatron_gil.models.convert.lineage import hub_name
from tests.convert.directories import files_under
from tests.faults.running import Call, arguments, call_all, metrics_of
from tests.ranks import run_ranks

ITERATION = "checkpoints/iter_0000004"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def runs(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SFT from what lies as in the Hub's cache, a reward model from it, and PPO-GIL from both."""
    root = tmp_path_factory.mktemp("runs")
    base = root / f"models--meta-llama--Llama-tiny/snapshots/{COMMIT}"
    shutil.copytree(world / "policy", base)
    sft, reward = root / "sft" / ITERATION / "policy", root / "reward" / ITERATION / "reward_model"
    calls = [
        Call(arguments("sft", world, root / "sft", f"models.policy={base}")),
        Call(arguments("reward", world, root / "reward", f"models.reward_model={sft}", "optimizer.lr=0.001")),
        Call(
            arguments(
                "ppo", world, root / "gil", f"models.policy={sft}", f"models.reward_model={reward}", "ppo.kl_coef=0.25"
            )
        ),
    ]
    for answer in run_ranks(call_all, 1, calls, world, timeout_s=600.0)[0]:
        assert answer.code == 0, answer.stderr
    return root


def _card(source: Path, target: Path, role: Any = None) -> Any:
    export_model(source, target, role=role, note=pytest.fail)
    return ModelCard.load(target / "README.md")


def test_the_front_matter_is_what_the_hub_reads(runs: Path, tmp_path: Path) -> None:
    card = _card(runs / "gil", tmp_path / "policy")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llama", "rlhf", "ppo-gil", "sft", "megatron_gil"],
        "base_model": "meta-llama/Llama-tiny",
        "base_model_relation": "finetune",
    }
    validate_repo_id(card.data.base_model)
    for role in ("reward", "critic"):
        other = _card(runs / ("gil" if role == "critic" else "reward"), tmp_path / role, role)
        assert other.data.pipeline_tag == "text-classification"
        assert other.data.base_model == "meta-llama/Llama-tiny"


def test_it_tells_of_every_run_that_made_the_model(runs: Path, tmp_path: Path) -> None:
    text = _card(runs / "gil", tmp_path / "out").text
    assert "# gil: policy after 4 iterations of PPO-GIL" in text
    stages = re.split(r"^## ", text, flags=re.M)[1:]
    assert [stage.partition("\n")[0] for stage in stages] == [
        *("Stage 1: SFT", "Stage 2: PPO-GIL", "Loading it", "Citation")
    ]
    sft, gil = stages[:2]
    assert f"- from: meta-llama/Llama-tiny (revision {COMMIT})" in sft
    assert "- data.train: demonstrations.jsonl" in sft
    assert "- from: sft/checkpoints/iter_0000004/policy" in gil
    assert "- models.reward_model: reward/checkpoints/iter_0000004/reward_model" in gil
    assert "| ppo.kl_coef | 0.25 |" in gil
    assert "| gil.warmup_updates | 1 |" in gil
    assert "gil.balance_coef" not in gil, "a default that is not among those always shown"
    assert "ppo." not in sft
    assert "@inproceedings{zheng2024improving" in text
    first = (runs / "gil/config.yaml").read_text().partition("\n")[0]
    assert f"gil: {first.removeprefix('# ')}" in text
    assert __version__ in first
    assert str(runs) not in text, "paths of the machine are not published"


def test_its_metrics_are_those_of_the_checkpoint(runs: Path, tmp_path: Path) -> None:
    """Iterations after it were of another model."""
    run = tmp_path / "gil"
    shutil.copytree(runs / "gil", run)
    expected = metrics_of(run)[1]["eval/reward/score_mean"]
    text = _card(run / "checkpoints/iter_0000002", tmp_path / "out").text
    assert f"| held-out score | `eval/reward/score_mean` | {expected:.4g} |" in text
    assert "after 2 iterations" in text


@pytest.mark.parametrize(("run", "role"), [("gil", "policy"), ("reward", "reward")])
def test_its_code_loads_the_model(runs: Path, tmp_path: Path, run: str, role: Any) -> None:
    """As a reader would: copied out and run beside the files."""
    _card(runs / run, tmp_path / "out", role)
    printed = _run_code(tmp_path / "out")
    if role == "reward":
        float(printed)


def _run_code(directory: Path) -> str:
    code = re.findall(r"```python\n(.*?)```", (directory / "README.md").read_text(), flags=re.S)
    assert len(code) == 1
    code[0] = code[0].replace("max_new_tokens=128", "max_new_tokens=4")  # the tiny Llama has few positions
    command = [sys.executable, "-W", "error::UserWarning", "-c", code[0]]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


TEMPLATE = "{% for m in messages %}{{ m['content'] }} sun{% endfor %}"


@pytest.mark.parametrize("template", [None, TEMPLATE, "{{ bos_token }}" + TEMPLATE])
def test_its_code_scores_what_we_score(world: Path, tmp_path: Path, template: str | None) -> None:
    """With a chat template no space stands before the response, and one bos before all, whoever writes it. (The
    template ends in a word that its tokenizer knows: it would fuse unknown characters of prompt and response.)"""
    source = shutil.copytree(world / "reward_model", tmp_path / "source")
    path = source / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    export_model(source, tmp_path / "out", note=pytest.fail)
    prompt, response = "\n\nHuman: How do I boil an egg?\n\nAssistant:", " Nine minutes in boiling water."
    tokenizer, limits = Tokenizer.read(source), {"max_prompt_tokens": 60, "max_tokens": 120}
    tokens = encode_responses(tokenizer, prompt, [response], **limits)[0].tokens
    model: Any = AutoModelForSequenceClassification.from_pretrained(source)
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits.item()
    assert float(_run_code(tmp_path / "out")) == pytest.approx(expected, abs=1e-6)


def test_a_readme_that_was_there_stays(runs: Path, tmp_path: Path) -> None:
    """Of a checkpoint's model, to whom its user gave one; and on the way in and out again."""
    run = tmp_path / "gil"
    shutil.copytree(runs / "gil", run)
    model = run / ITERATION / "policy"
    (model / "README.md").write_text("mine\n")
    export_model(run, tmp_path / "out", role="policy", note=pytest.fail)
    import_model(tmp_path / "out", tmp_path / "again")
    export_model(tmp_path / "again", tmp_path / "last", note=pytest.fail)
    for directory in (model, *(tmp_path / name for name in ("out", "again", "last"))):
        assert (directory / "README.md").read_text() == "mine\n"


def test_a_model_of_no_run_gets_a_card_that_claims_nothing(world: Path, tmp_path: Path) -> None:
    card = _card(world / "policy", tmp_path / "out")
    assert card.data.base_model is None
    assert "# A model converted by megatron_gil" in card.text
    assert "Stage" not in card.text
    import_model(world / "policy", tmp_path / "imported")
    assert "README.md" not in files_under(tmp_path / "imported")


def test_a_damaged_run_is_exported_and_said(runs: Path, tmp_path: Path) -> None:
    run = tmp_path / "gil"
    shutil.copytree(runs / "gil", run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write("[1]\n")
    notes: list[str] = []
    export_model(run, tmp_path / "out", note=notes.append)
    assert len(notes) == 1
    assert "metrics.jsonl: line 5" in notes[0]
    assert "Stage" not in (tmp_path / "out/README.md").read_text()


def test_data_of_prepare_data_is_named_by_its_source(runs: Path, world: Path, tmp_path: Path) -> None:
    run, data = tmp_path / "gil", tmp_path / "prepared"
    shutil.copytree(runs / "gil", run)
    (data / "train").mkdir(parents=True)
    (data / "card.json").write_text(json.dumps({"source": "hh", "inputs": ["helpful.jsonl", "Anthropic/hh-rlhf"]}))
    config = (run / "config.yaml").read_text()
    changed = config.replace(f"train: {world / 'prompts.jsonl'}", f"train: {data / 'train/prompts.jsonl'}")
    assert changed != config
    (run / "config.yaml").write_text(changed)
    card = _card(run, tmp_path / "out")
    assert "- data.train: prompts.jsonl, of hh: helpful.jsonl, Anthropic/hh-rlhf\n" in card.text
    assert card.data.datasets == ["Anthropic/hh-rlhf"]


def test_names_on_the_hub_are_told_from_paths() -> None:
    assert hub_name(f"meta-llama/Llama-3.2-1B@{COMMIT}") == ("meta-llama/Llama-3.2-1B", COMMIT)
    assert hub_name(f"/c/models--a--b.c/snapshots/{COMMIT}") == ("a/b.c", COMMIT)
    for path in ("runs/sft", "/runs/sft/checkpoints/iter_0000004/policy", "policy", ""):
        assert hub_name(path) is None
