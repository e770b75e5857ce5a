"""What the miniature found: gold score per domain and method, win rates, pictures, the page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rich import box
from rich.console import Console
from rich.table import Table as ConsoleTable

from megatron_gil.demo.domains import HELDOUT_DOMAIN, TRAINING_DOMAINS
from megatron_gil.demo.gold import gold_score
from megatron_gil.demo.takeaway import takeaway
from megatron_gil.evaluation.comparisons import pair_rows
from megatron_gil.evaluation.judge import ScoreJudge
from megatron_gil.evaluation.report.figures import FrontierPoint, bars, colors, frontier, score_distributions, to_svg
from megatron_gil.evaluation.report.page import Picture, Table
from megatron_gil.evaluation.report.report import write_report
from megatron_gil.evaluation.report.runs import Run, read_run
from megatron_gil.evaluation.statistics import bootstrap
from megatron_gil.evaluation.winrate import HEADER, WinRate, judge_all, table_rows, win_rate
from megatron_gil.jsonl import iter_jsonl
from megatron_gil.paths import write_whole

METHODS: Mapping[str, str] = {
    "sft": "SFT",
    "dpo": "DPO",
    "ppo": "PPO",
    "ppo_kl": "PPO w/ KL",
    "ppo_gil": "PPO-GIL, published",
    "ppo_gil_targets": "PPO-GIL, KL targets",
}
"""Directory name -> name in tables, in the order of tables."""
POLICIES = tuple(METHODS)
SHORT: Mapping[str, str] = {**METHODS, "ppo_gil": "GIL paper", "ppo_gil_targets": "GIL targets"}
"""Names in a table that must fit a console of 80 columns."""
OURS, PUBLISHED, OPPONENT = "ppo_gil_targets", "ppo_gil", "ppo_kl"
"""The recommended setting of PPO-GIL, that of the paper, and the baseline that is hardest to beat."""
TIE_MARGIN = 0.05
"""A difference in gold score that the judge calls a tie."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    prompt: str
    response: str
    domain: str
    gold: float
    proxy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    responses: Mapping[str, Sequence[Response]]
    """Method -> responses to the held-out prompts, all methods to the same ones."""
    runs: Mapping[str, Run]


def read_results(output: Path) -> Results:
    """Everything the stages left in `output`."""
    responses = {}
    for method in METHODS:
        responses[method] = [_read_response(row) for _, row in iter_jsonl(output / "scores" / f"{method}.jsonl")]
    names = {**METHODS, "reward": "reward model"}
    return Results(responses=responses, runs={name: read_run(output / name, name=names[name]) for name in names})


def _read_response(row: dict[str, str]) -> Response:
    return Response(
        prompt=row["prompt"],
        response=row["response"],
        domain=row["group"],
        gold=gold_score(row["prompt"], row["response"]),
        proxy=float(row["score"]),
    )


def write_results(results: Results, output: Path, console: Console) -> Path:
    """Print the tables, write results.json and report.html; the page's path."""
    rates = {OURS: win_rates(results, OURS), PUBLISHED: win_rates(results, PUBLISHED, only=OPPONENT)}
    in_short, wins = read_in_short(results, rates), [win_table(found, ours) for ours, found in rates.items()]
    console.print(in_short, markup=False)
    for shown in (gold_table(results, with_interval=False), *wins):
        _print(shown, console)
    numbers = {
        "gold": {
            m: {d: _mean_gold(r, d) for d in (*TRAINING_DOMAINS, HELDOUT_DOMAIN)} for m, r in results.responses.items()
        },
        "win_rate": {
            ours: {m: {"win": r.win.value, "tie": r.tie.value, "lose": r.lose.value} for m, r in found.items()}
            for ours, found in rates.items()
        },
    }
    write_whole(output / "results.json", json.dumps(numbers, indent=1))
    page = output / "report.html"
    write_report(
        [output / name for name in results.runs],
        page,
        title="megatron-gil: the miniature",
        introduction=in_short,
        tables=[gold_table(results), *wins],
        pictures=pictures(results),
        names=[run.name for run in results.runs.values()],
    )
    return page


def read_in_short(results: Results, rates: Mapping[str, Mapping[str, WinRate]]) -> str:
    """The paragraph above the tables."""
    known = {m: [r for r in found if r.domain != HELDOUT_DOMAIN] for m, found in results.responses.items()}
    return takeaway(
        gold={m: fmean(r.gold for r in found) for m, found in known.items()},
        proxy={m: fmean(r.proxy for r in found) for m, found in known.items()},
        heldout={m: _mean_gold(found, HELDOUT_DOMAIN) for m, found in results.responses.items()},
        published=rates[PUBLISHED][OPPONENT],
        recommended=rates[OURS][OPPONENT],
        kl={m: results.runs[m].late_mean("policy/kl_sequence") for m in (OPPONENT, PUBLISHED, OURS)},
    )


def gold_table(results: Results, *, with_interval: bool = True) -> Table:
    """A row per method: gold score over all training domains, per domain, the gap, the worst, the held-out domain."""
    gold_name = "gold (95 %)" if with_interval else "gold"
    header = ("method", gold_name, *TRAINING_DOMAINS, "gap", "worst", f"held out: {HELDOUT_DOMAIN}", "proxy", "KL")
    rows = []

    def number(value: float) -> str:
        return f"{value:.3f}" if with_interval else f"{value:.2f}"  # a console has 80 columns

    for method, responses in results.responses.items():
        known = [response for response in responses if response.domain != HELDOUT_DOMAIN]
        by_domain = [_mean_gold(responses, domain) for domain in TRAINING_DOMAINS]
        kl = results.runs[method].late_mean("policy/kl_sequence")
        gold = bootstrap([response.gold for response in known])
        rows.append(
            (
                (METHODS if with_interval else SHORT)[method],
                str(gold) if with_interval else number(gold.value),
                *map(number, by_domain),
                number(max(by_domain) - min(by_domain)),
                number(min(by_domain)),
                number(_mean_gold(responses, HELDOUT_DOMAIN)),
                f"{fmean(response.proxy for response in known):.2f}",
                "" if kl is None else f"{kl:.4g}" if with_interval else f"{kl:.3g}",
            )
        )
    note = "Gold in [0, 1], its interval over the prompts of one run. proxy: the reward model's mean score in the "
    note += "training domains. KL: nats a response on training prompts, mean over the last tenth of the run."
    return Table(caption="Gold score on prompts that no method was trained on", header=header, rows=rows, note=note)


def win_rates(results: Results, ours: str, *, only: str | None = None) -> dict[str, WinRate]:
    """A method against each other one, or one alone, by the gold judge, prompt by prompt."""
    judge = ScoreJudge("gold", gold_score, tie_margin=TIE_MARGIN)
    texts = {
        m: [{"prompt": r.prompt, "response": r.response} for r in responses]
        for m, responses in results.responses.items()
    }
    opponents = [m for m in METHODS if m != ours and only in (None, m)]
    return {m: win_rate(judge_all(judge, pair_rows(texts[ours], texts[m], m))) for m in opponents}


def win_table(rates: Mapping[str, WinRate], ours: str) -> Table:
    rows = table_rows({METHODS[method]: rate for method, rate in rates.items()})
    note = f"Gold judge; a difference of at most {TIE_MARGIN} is a tie. Percent of prompts."
    return Table(caption=f"{METHODS[ours]}: win / tie / lose", header=HEADER, rows=rows, note=note)


def pictures(results: Results) -> list[Picture]:
    domains = (*TRAINING_DOMAINS, HELDOUT_DOMAIN)
    gold = {METHODS[m]: {d: _mean_gold(r, d) for d in domains} for m, r in results.responses.items()}
    known = {
        m: [response for response in responses if response.domain != HELDOUT_DOMAIN]
        for m, responses in results.responses.items()
    }
    proxy = {METHODS[m]: [response.proxy for response in responses] for m, responses in known.items()}
    points = {METHODS[m]: found for m in METHODS if (found := _frontier(results.runs[m]))}
    color = colors([run.name for run in results.runs.values()])  # as the page gives them
    return [
        Picture(svg=to_svg(bars(gold, label="gold score", color=color)), caption="Gold score per domain and method."),
        Picture(
            svg=to_svg(score_distributions(proxy, color=color)),
            caption="The reward model's score (proxy) of the responses in the training domains, per method, against "
            "the normal of equal mean and spread.",
        ),
        Picture(
            svg=to_svg(frontier(points, color=color)),
            caption="Reward-model (proxy) and gold score against KL during training, on training prompts.",
        ),
    ]


def _frontier(run: Run) -> list[FrontierPoint]:
    """A point for each iteration whose samples were kept."""
    kl = dict(zip(*run.series("policy/kl_sequence"), strict=True))
    by_iteration: dict[int, list[tuple[float, float]]] = {}
    for row in run.responses:
        pair = (row["score"], gold_score(row["prompt"], row["response"]))
        by_iteration.setdefault(row["iteration"], []).append(pair)
    return [
        FrontierPoint(kl=max(kl[i], 0.0), proxy=fmean(p for p, _ in pairs), gold=fmean(g for _, g in pairs))
        for i, pairs in by_iteration.items()
    ]


def _mean_gold(responses: Sequence[Response], domain: str) -> float:
    return fmean(response.gold for response in responses if response.domain == domain)


def _print(content: Table, console: Console) -> None:
    shown = ConsoleTable(
        title=content.caption,
        title_justify="left",
        caption=content.note,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for number, name in enumerate(content.header):
        shown.add_column(name, justify="right" if number else "left", no_wrap=number == 0)
    for row in content.rows:
        shown.add_row(*row)
    console.print(shown)
