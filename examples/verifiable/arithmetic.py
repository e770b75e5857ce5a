"""Sums whose answer a rule checks: the reward function, and the whole example from data to picture.

python examples/verifiable/arithmetic.py OUTPUT_DIR [--seeds 1 2 3]
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from megatron_gil.jsonl import iter_jsonl

HERE = Path(__file__).resolve().parent
METHODS = {"grpo": "GRPO", "grpo_gil": "GRPO-GIL"}
CHARACTERS = "0123456789+="
SHARE_TRAINED = 0.8
"""Of all sums; the others are held out."""
PANELS = {
    "eval/reward/score_mean": "all held-out sums",
    "eval/reward/score_mean_known_easy": "easy: one digit",
    "eval/reward/score_mean_known_hard": "hard: two digits",
}
"""Metric of an evaluation -> the sums it is of."""


def right(responses: list[str], answer: list[str]) -> list[float]:
    """1 where the response is the answer and nothing else, else 0. `answer` is a field of the rows."""
    return [float(response.strip() == expected) for response, expected in zip(responses, answer, strict=True)]


def sums(seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(rows to train on, held-out rows), the same for every seed but for their order."""
    digits, tens = range(10), range(10, 50)
    pairs = [("easy", a, b) for a in digits for b in digits] + [("hard", a, b) for a in tens for b in tens]
    random.Random(0).shuffle(pairs)
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b), "group": group} for group, a, b in pairs]
    count = int(SHARE_TRAINED * len(rows))
    train, held_out = rows[:count], rows[count:]
    easy = [row for row in train if row["group"] == "easy"]
    train += easy * (len(train) // len(easy) - 2)  # about as many easy rows as hard ones
    random.Random(seed).shuffle(train)
    return train, held_out


def write_world(directory: Path, seed: int) -> None:
    """A Llama of random weights whose tokens are characters; demonstrations, prompts with answers, held-out prompts."""
    from megatron_gil.demo.tiny_llama import write_tiny_llama

    directory.mkdir(parents=True)
    train, held_out = sums(seed)
    demonstrations = [{"prompt": row["prompt"], "completion": row["answer"]} for row in train]
    for name, rows in (("demonstrations", demonstrations), ("prompts", train), ("held_out", held_out)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "llama").mkdir()
    texts = [row["prompt"] + row["answer"] for row in train]
    num_tokens = len(CHARACTERS) + 7  # unknown, begin, end, padding, two of the dialogue, and a space
    write_tiny_llama(directory / "llama", texts, seed=seed, vocab_size=num_tokens)


def run(*arguments: str) -> float:
    """A command; its seconds. A training that is finished already does nothing."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "megatron_gil", *arguments], check=True)
    return time.monotonic() - started


def train_seed(output: Path, seed: int) -> dict[str, float]:
    """Seconds of each run of a seed: SFT, which is stopped early, and each method from there. What SFT answers to the
    held-out sums is kept in sft_scores.jsonl."""
    place, function = output / f"seed_{seed}", f"reward.function={HERE / 'arithmetic.py'}:right"
    if not place.exists():
        write_world(place, seed)
    demonstrations, prompts, held_out = (place / f"{n}.jsonl" for n in ("demonstrations", "prompts", "held_out"))

    def train(command: str, name: str, *settings: str) -> float:
        where = [f"run.dir={place / name}", f"run.seed={seed}"]
        return run(command, "--config", str(HERE / f"{name}.yaml"), *where, *settings)

    seconds = {"sft": train("sft", "sft", f"models.policy={place / 'llama'}", f"data.train={demonstrations}")}
    policy = f"models.policy={max((place / 'sft' / 'checkpoints').glob('iter_*')) / 'policy'}"
    for method in METHODS:
        seconds[method] = train("ppo", method, policy, function, f"data.train={prompts}", f"data.eval={held_out}")
    answers, scores = place / "sft_answers.jsonl", place / "sft_scores.jsonl"
    if not answers.exists():
        limits = ["data.max_prompt_tokens=8", "sampling.max_new_tokens=4"]
        run("generate", policy, f"data.train={held_out}", *limits, f"output={answers}")
    if not scores.exists():
        run("score", function, f"data.train={answers}", "batch.micro_size=256", f"output={scores}")
    return seconds


def before(place: Path) -> dict[str, float]:
    """Metric of PANELS -> share of the held-out sums that SFT answers right."""
    rows = [row for _, row in iter_jsonl(place / "sft_scores.jsonl")]
    groups = {name: name.rpartition("known_")[2] for name in PANELS}
    found = {name: [row["score"] for row in rows if row["group"] == group] for name, group in groups.items()}
    return {name: fmean(scores or [row["score"] for row in rows]) for name, scores in found.items()}


def curves(output: Path, seeds: Sequence[int]) -> dict[str, dict[str, list[list[tuple[int, float]]]]]:
    """metric -> method -> of each seed its (iterations so far, value)."""
    found: dict[str, dict[str, list[list[tuple[int, float]]]]] = {name: {} for name in PANELS}
    for method in METHODS:
        for seed in seeds:
            rows = [row for _, row in iter_jsonl(output / f"seed_{seed}" / method / "metrics.jsonl")]
            at_first = before(output / f"seed_{seed}")
            for name in PANELS:
                values = [(row["iteration"] + 1, row[name]) for row in rows if name in row]
                found[name].setdefault(method, []).append([(0, at_first[name]), *values])
    return found


def draw(found: Mapping[str, Mapping[str, list[list[tuple[int, float]]]]], path: Path) -> None:
    """Means over seeds, with the range between the least and the greatest."""
    from megatron_gil.evaluation.report.figures import curve_grid, to_png

    lines, bands = {}, {}
    for name, title in PANELS.items():
        lines[title], bands[title] = {}, {}
        for method, label in METHODS.items():
            columns = list(zip(*found[name][method], strict=True))
            values = [[value for _, value in column] for column in columns]
            lines[title][label] = ([column[0][0] for column in columns], [fmean(v) for v in values])
            bands[title][label] = ([min(v) for v in values], [max(v) for v in values])
    path.write_bytes(to_png(curve_grid(lines, bands=bands, smooth=1, share_y=True)))


def table(found: Mapping[str, Mapping[str, list[list[tuple[int, float]]]]]) -> str:
    """Of each method the share of right answers before and after: means over seeds, and that of each seed."""
    rows = ["| method | held-out sums | after SFT | at the end | of each seed |", "|---|---|---|---|---|"]
    for method, label in METHODS.items():
        for name, title in PANELS.items():
            first, last = ([values[i][1] for values in found[name][method]] for i in (0, -1))
            each = ", ".join(f"{value:.2f}" for value in last)
            rows.append(f"| {label} | {title} | {fmean(first):.2f} | {fmean(last):.2f} | {each} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="GRPO and GRPO-GIL on sums whose answer a rule checks.")
    parser.add_argument("output", type=Path, metavar="OUTPUT_DIR")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    for seed in arguments.seeds:
        seconds = train_seed(output, seed)
        print(f"seed {seed}: " + ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items()))
    found = curves(output, arguments.seeds)
    draw(found, output / "curve.png")
    print(table(found))


if __name__ == "__main__":
    main()
