"""The report of run directories: what it must hold, and that it needs nothing beside itself."""

import argparse
import base64
import io
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.patches import Rectangle
from PIL import Image

from megatron_gil.commands.report import report
from megatron_gil.config import ConfigError, GilSection, PpoConfig, TrainingRunSection
from megatron_gil.config.files import dump_config
from megatron_gil.evaluation.comparisons import judgment_rows
from megatron_gil.evaluation.report import figures
from megatron_gil.evaluation.report.overview import ALARMS, overview
from megatron_gil.evaluation.report.page import Picture, Table
from megatron_gil.evaluation.report.report import CURVES, write_report
from megatron_gil.evaluation.report.runs import config_differences, read_run, read_runs
from tests.evaluation.judged import judged


def make_run(directory: Path, *, num_groups: int, iterations: int = 30) -> Path:
    """A run directory as training leaves it, with numbers that are easy to recognise."""
    directory.mkdir(parents=True)
    config = PpoConfig(run=TrainingRunSection(dir=str(directory)), gil=GilSection(num_groups=num_groups))
    (directory / "config.yaml").write_text(f"# megatron_gil 0.1.0, commit abc123\n{dump_config(config)}")
    with (directory / "metrics.jsonl").open("w") as file:
        for i in range(iterations):
            row: dict[str, Any] = {"iteration": i, "reward/score_mean": i / 10, "policy/kl_sequence": None}
            row |= {"reward/score_mean_known_greet": i / 10, "reward/score_mean_known_fact": 0.0}
            row |= {f"group/return_{g}": float(g) for g in range(num_groups)}
            file.write(json.dumps(row) + "\n")
    sample = {"iteration": iterations - 1, "prompt": "shared <b>?", "response": f"response of {directory.name}"}
    row = {**sample, "score": 1.25, "group_probs": [0.2, 0.8][:num_groups]}
    (directory / "samples.jsonl").write_text(
        json.dumps({**row, "iteration": 0, "response": "an earlier response"}) + "\n" + json.dumps(row)
    )
    return directory


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [make_run(tmp_path / "ppo", num_groups=1), make_run(tmp_path / "gil", num_groups=2)]


def test_report_is_one_file_with_everything_in_it(runs: list[Path], tmp_path: Path) -> None:
    table = Table(
        caption="Gold <score>", header=("method", "gold"), rows=[("SFT", "0.41"), ("GIL", "0.66")], best=[(1, 1)]
    )
    drawing = figures.to_svg(figures.score_distributions({"SFT": [0.0, 1.0, 2.0], "GIL": [1.0, 1.5, 2.5]}))
    output = tmp_path / "out" / "report.html"
    write_report(runs, output, tables=[table], pictures=[Picture(svg=drawing, caption="scores")])
    text = output.read_text()
    assert "Gold &lt;score&gt;" in text
    assert "<td class=best>0.66</td>" in text
    assert "shared &lt;b&gt;?" in text
    assert "response of ppo" in text and "response of gil" in text  # noqa: PT018
    assert "an earlier response" not in text  # the last iteration's samples only
    assert "group 1: 0.80" in text
    assert "gil.num_groups" in text
    assert "abc123" in text
    # the given picture, the score's curve, known labels of each run, what gil inferred (returns), scores
    assert text.count("<img ") == 6
    assert "ppo against the others" in text
    assert "<td>gil</td><td>1</td><td>0.0</td><td>100.0</td>" in text  # both scored 1.25 on their prompt, each time
    assert not re.search(r"(src|href)=(?!\"data:|\"#)", text), "something would be fetched"
    assert "<script" not in text


def test_runs_are_compared_on_the_prompts_they_share_and_drawn_against_kl(runs: list[Path], tmp_path: Path) -> None:
    for run, scores in zip(runs, ((1.0, 2.0, 3.0), (1.0, 1.5, 4.0)), strict=True):
        prompts = ("shared", "also shared", f"of {run.name} alone")
        samples = [
            {"iteration": 5, "prompt": prompt, "response": f"{run.name} {score}", "score": score}
            for prompt, score in zip(prompts, scores, strict=True)
        ]
        (run / "samples.jsonl").write_text("\n".join(map(json.dumps, samples)))
        rows = [{"iteration": i, "reward/score_mean": i / 10, "policy/kl_sequence": i / 5} for i in range(30)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_report(runs, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "<td>gil</td><td>2</td><td>50.0</td><td>50.0</td><td>0.0</td>" in text
    assert text.count("<img ") == 4  # two curves, scores, score against KL


def test_report_shows_the_mean_of_the_last_tenth(runs: list[Path], tmp_path: Path) -> None:
    write_report(runs, tmp_path / "report.html")
    assert "<td>2.8</td>" in (tmp_path / "report.html").read_text()  # iterations 27, 28, 29: scores 2.7, 2.8, 2.9


def test_report_of_a_single_bare_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_groups=1, iterations=1)
    for name in ("config.yaml", "samples.jsonl"):
        (run / name).unlink()
    write_report([run], tmp_path / "report.html")
    assert "Config differences" not in (tmp_path / "report.html").read_text()


def test_series_leave_gaps_out_and_a_line_being_written(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"iteration": 0, "a": 1.0}\n{"iteration": 1, "a": null}\n{"iteration": 2, "a"'
    )
    run = read_run(tmp_path)
    assert run.series("a") == ([0], [1.0])
    assert len(run.metrics) == 2
    assert run.names() == ["iteration", "a"]


def test_damaged_and_foreign_directories_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no metrics\.jsonl"):
        read_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 0\n{"iteration": 1}\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl:1: not valid JSON"):
        read_run(tmp_path)


def test_run_names_tell_runs_apart(tmp_path: Path) -> None:
    directories = [make_run(tmp_path / seed / "ppo", num_groups=1) for seed in ("1", "2")]
    assert [run.name for run in read_runs(directories)] == ["1/ppo", "2/ppo"]
    with pytest.raises(ConfigError, match="named twice"):
        read_runs([directories[0], directories[0]])


def test_config_differences(runs: list[Path]) -> None:
    assert config_differences(read_runs(runs)) == [("gil.num_groups", ["1", "2"])]


def test_figures_are_well_formed_and_reproducible() -> None:
    def draw() -> str:
        point = figures.FrontierPoint
        return figures.to_svg(
            figures.frontier({"PPO": [point(kl=0, proxy=0, gold=0.4), point(kl=9, proxy=2, gold=0.3)]})
        )

    assert draw() == draw()
    root = ElementTree.fromstring(draw())
    assert root.tag.endswith("svg")
    bars = figures.to_svg(figures.bars({"SFT": {"greet": 0.4}, "GIL": {"greet": 0.5, "fact": 0.2}}, label="gold"))
    ElementTree.fromstring(bars)


def test_a_png_is_small_and_the_same_every_time() -> None:
    def draw() -> bytes:
        lines: dict[str, Any] = {
            f"method {i}": (range(130), np.random.default_rng(i).normal(size=130).cumsum()) for i in range(8)
        }
        bands: dict[str, Any] = {name: (y - 3.0, y + 3.0) for name, (_, y) in lines.items()}
        return figures.to_png(figures.curve_grid({"a": lines, "b": lines, "c": lines}, bands={"a": bands, "b": bands}))

    drawn = draw()
    assert drawn == draw()
    with Image.open(io.BytesIO(drawn)) as image:
        assert image.width == pytest.approx(10.65 * 110, abs=1)
    assert len(drawn) < 100_000


def test_running_mean() -> None:
    values = np.random.default_rng(1).normal(size=25).tolist()
    by_hand = [float(np.mean(values[max(0, i - 3) : i + 1])) for i in range(25)]
    assert figures.running_mean(values, 4) == pytest.approx(by_hand)


def test_report_command(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "page.html"
    assert report(argparse.Namespace(runs=runs, judgments=[], output=output)) == 0
    assert capsys.readouterr().out.strip() == str(output)
    assert output.stat().st_size > 10_000


def test_report_shows_what_judges_said(runs: list[Path], tmp_path: Path) -> None:
    rows = [judged("win" if i % 3 else "lose", str(i), ours="x" * i, opponent="<dpo>") for i in range(30)]
    judgments, output = tmp_path / "judgments.jsonl", tmp_path / "page.html"
    judgments.write_text("".join(json.dumps(row) + "\n" for row in judgment_rows([*rows, judged("refused", "r")])))
    plain = tmp_path / "plain.html"
    report(argparse.Namespace(runs=runs, judgments=[], output=plain))
    report(argparse.Namespace(runs=runs, judgments=[judgments], output=output))
    text = output.read_text()
    assert text.count("<img ") == plain.read_text().count("<img ") + 2
    assert "win / tie / lose of us on t by j" in text
    assert "<td>&lt;dpo&gt;</td><td>30</td><td>66.7</td><td>0.0</td><td>33.3</td>" in text


ODD = [
    ("config.yaml", b"run: {", "config.yaml: not valid YAML"),
    ("config.yaml", b"- 5\n", "config.yaml: must hold `section:` keys"),
    ("config.yaml", b"a: \xff\n", "config.yaml: not valid YAML"),
    ("config.yaml", b"#" + b"x" * (1 << 20) + b"\n", "config.yaml: larger than 1 MiB"),
    ("metrics.jsonl", b"5\n", 'metrics.jsonl: line 1 has no whole number "iteration"'),
    ("metrics.jsonl", b'{"a": 5}\n', 'metrics.jsonl: line 1 has no whole number "iteration"'),
    ("metrics.jsonl", b'{"iteration": "5"}\n', 'metrics.jsonl: line 1 has no whole number "iteration"'),
    ("metrics.jsonl", b'{"iteration": 5e9}\n', 'metrics.jsonl: line 1 has no whole number "iteration"'),
    ("metrics.jsonl", b'{"iteration": 1, "a": "b"}\n', "metrics.jsonl: line 1 has the metric 'a' that is no number"),
    ("metrics.jsonl", b'\xff\n{"iteration": 1}\n', "metrics.jsonl:1: not UTF-8"),
    ("samples.jsonl", b'{"iteration": 1, "prompt": "a"}\n', 'samples.jsonl: line 1 has no text "response"'),
    ("samples.jsonl", b'{"iteration": 1, "prompt": 5, "response": ""}\n', 'samples.jsonl: line 1 has no text "prompt"'),
    (
        "samples.jsonl",
        b'{"iteration": 1, "prompt": "", "response": "", "group_probs": [1, "a"]}\n',
        'samples.jsonl: line 1 has "group_probs" that are no list of numbers',
    ),
    ("config_history.jsonl", b'{"iteration": 1}\n', 'config_history.jsonl: line 1 has no text "key"'),
]


@pytest.mark.parametrize(("name", "content", "message"), ODD)
def test_a_broken_file_of_a_run_is_named_in_one_line(
    name: str, content: bytes, message: str, runs: list[Path], tmp_path: Path
) -> None:
    (runs[0] / name).write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        write_report(runs, tmp_path / "report.html")
    assert message in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
    assert not list(tmp_path.glob("*report.html*"))


def test_any_label_and_any_number_can_be_drawn(runs: list[Path], tmp_path: Path) -> None:
    labels = (r"$\frac{$", "$x$", "_hidden", "<&>", "\x00\x1b", "\ud800", "--", "图")
    values = ("NaN", "Infinity", "1e308", "-1e999", "1" + "0" * 400, "0.5", "7", "null")
    row = {f"reward/score_mean_known_{label}": f"@{value}" for label, value in zip(labels, values, strict=True)}
    text = re.sub(r'"@([^"]*)"', r"\1", json.dumps({**row, "reward/score_mean": "@1e307"}))
    lines = "".join(f'{{"iteration": {i}, {text[1:]}\n' for i in range(3))
    (runs[0] / "metrics.jsonl").write_text(lines)
    sample = '{"iteration": 2, "prompt": "\\ud800", "response": "a\\u2028b", "score": NaN}\n'
    (runs[0] / "samples.jsonl").write_text(sample)
    write_report(runs, tmp_path / "report.html")
    pictures = re.findall(r"base64,([^\"]+)", (tmp_path / "report.html").read_text())
    for picture in pictures:
        ElementTree.fromstring(base64.b64decode(picture))
    assert len(pictures) >= 2


def test_what_a_resume_changed_is_shown(runs: list[Path], tmp_path: Path) -> None:
    row = {"iteration": 12, "key": "optimizer.lr", "old": 1e-5, "new": 5e-7, "time": "2026-01-01", "commit": "c"}
    (runs[1] / "config_history.jsonl").write_text(json.dumps(row) + "\n")
    write_report(runs, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "Config changes during a run" in text
    cells = "".join(f"<td>{cell}</td>" for cell in ("gil", "12", "optimizer.lr", "1e-05", "5e-07", "2026-01-01"))
    assert cells in text


def test_a_page_is_there_whole_or_as_it_was(runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, output = tmp_path / "real.html", tmp_path / "report.html"
    output.symlink_to(real)
    real.write_text("before")

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_report(runs, output)
    assert real.read_text() == "before"
    assert not list(tmp_path.glob(".*"))
    write_report(runs, output)
    assert output.is_symlink()
    assert "<html" in real.read_text()
    write_report(runs, Path("/dev/null"))
    assert Path("/dev/null").is_char_device()


def _with_metrics(run: Path, rows: list[dict[str, float]]) -> Path:
    text = "".join(json.dumps({"iteration": i, **row}) + "\n" for i, row in enumerate(rows))
    (run / "metrics.jsonl").write_text(text)
    return run


def _alarmed(run: Path) -> Path:
    """An alarm that stands twice, and one that never does."""
    kl = [1.0 if 5 <= i <= 9 or i == 20 else 0.0 for i in range(30)]
    rows = [
        {"reward/score_mean": 0.1, "policy/kl_sequence": 5.0 * on, "alarm/kl": on, "alarm/length": 0.0} for on in kl
    ]
    return _with_metrics(run, rows)


def test_alarms_are_a_list_and_bands(runs: list[Path], tmp_path: Path) -> None:
    calm = _with_metrics(runs[1], [{"reward/score_mean": 0.1, "policy/kl_sequence": 1.0, "alarm/kl": 0.0}] * 30)
    loud = _alarmed(runs[0])
    assert read_run(loud).alarms() == {"kl": [(5, 9), (20, 20)]}
    assert read_run(calm).alarms() == {}
    write_report([loud, calm], tmp_path / "loud.html")
    text = (tmp_path / "loud.html").read_text()
    assert "<td>kl</td><td>KL above alarms.max_kl</td><td>5 to 9, 20</td><td>20%</td>" in text
    assert "length</td>" not in text
    write_report([calm], tmp_path / "calm.html")
    assert "No alarm stood in any run" in (tmp_path / "calm.html").read_text()
    lines = {"KL": {"a": ([0.0, 1.0, 2.0], [1.0, 2.0, 3.0])}}
    plain = figures.curve_grid(lines).axes[0]
    shaded = figures.curve_grid(lines, alarms={"KL": {"a": [(1, 2)]}}, color={"a": "#123456"}).axes[0]
    assert (len(plain.patches), len(shaded.patches)) == (0, 2)
    for patch in shaded.patches:  # the shade and the strip at the foot, half an iteration to each side
        assert isinstance(patch, Rectangle)
        assert (patch.get_x(), patch.get_x() + patch.get_width()) == (0.5, 2.5)
        assert patch.get_facecolor()[:3] == pytest.approx((0x12 / 255, 0x34 / 255, 0x56 / 255))


def test_every_alarm_of_training_is_explained() -> None:
    source = (Path(__file__).parents[2] / "megatron_gil/training/ppo/alarms.py").read_text()
    assert set(re.findall(r'Alarm\("(\w+)"', source)) == set(ALARMS)
    drawn = {metric for _, metrics in ALARMS.values() for metric in metrics}
    assert drawn <= set(CURVES)


def test_tables_are_by_kind_with_what_is_held_out_first(tmp_path: Path) -> None:
    rows = {
        "reward": {"reward/loss": 0.5, "reward/accuracy": 0.8},
        "sft": {"sft/loss": 2.0, "time/tokens_per_s": 12345.0},
        "ppo": {"reward/score_mean": 1.0, "policy/kl_sequence": 15.63},
    }
    found = {}
    for name, row in rows.items():
        found[name] = _with_metrics(make_run(tmp_path / name, num_groups=1), [row] * 20)
    evaluated = [rows["reward"]] * 19 + [{**rows["reward"], "eval/reward/accuracy": 0.7}]
    _with_metrics(found["reward"], evaluated)
    tables = {t.caption: t for t in overview(read_runs(list(found.values())), {})}
    assert list(tables) == ["PPO", "Reward model", "SFT"]
    assert tables["Reward model"].header == (
        "run",
        "iterations",
        "held-out accuracy",
        "training accuracy",
        "reward loss",
    )
    assert tables["Reward model"].rows == [("reward", "20", "0.7", "0.8", "0.5")]
    assert tables["SFT"].header == ("run", "iterations", "SFT loss", "tokens/s")
    assert tables["SFT"].rows == [("sft", "20", "2", "12,345")]
    assert tables["PPO"].rows == [("ppo", "20", "1", "15.63")]
    for shown in tables.values():
        unclear = [h for h in shown.header if h not in ("run", "iterations", "tokens/s", "tokens a response")]
        assert set(unclear) == set(shown.hints)


def test_a_number_has_one_window(runs: list[Path]) -> None:
    """The demo's table and the page's take it from the same place."""
    run = read_run(_with_metrics(runs[0], [{"policy/kl_sequence": float(i)} for i in range(250)]))
    assert run.late_mean("policy/kl_sequence") == pytest.approx(np.mean(range(225, 250)))
    assert run.last("policy/kl_sequence") == 249.0
    assert run.late_mean("absent") is None


def test_a_run_has_one_colour_and_its_parts_have_others(runs: list[Path], tmp_path: Path) -> None:
    color = figures.colors(["a", "b"])
    assert figures.colors(["b"]) != {"b": color["b"]}, "by place: so a page hands its own to every picture"
    alone = figures.curve_grid({"x": {"b": ([0.0], [1.0])}}, color=color).axes[0]
    assert alone.lines[-1].get_color() == color["b"]
    assert not set(figures.PALETTE) & set(figures.PARTS_PALETTE)
    write_report(runs, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    for name, value in figures.colors(["ppo", "gil"]).items():
        assert f'<span class=dot style="background: {value}"></span>{name}</' in text


def test_rows_of_sft_and_pairs_are_shown(runs: list[Path], tmp_path: Path) -> None:
    samples = {"iteration": 3, "prompt": "p", "chosen": "good", "rejected": "bad"}
    samples |= {"score_chosen": 1.5, "score_rejected": 0.25, "margin": 1.25}  # type: ignore[dict-item]
    (runs[0] / "samples.jsonl").write_text(json.dumps(samples) + "\n")
    row = {"iteration": 3, "prompt": "p", "target": "imitate me", "loss": 0.125}
    (runs[1] / "samples.jsonl").write_text(json.dumps(row) + "\n")
    write_report(runs, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "<th>prompt</th><th>chosen</th><th>rejected</th><th>margin</th>" in text
    assert "<td>p</td><td>imitate me</td><td>0.125</td>" in text
    assert "Responses side by side" not in text


def test_the_page_fits_a_phone(runs: list[Path], tmp_path: Path) -> None:
    write_report(runs, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "@media (max-width: 640px)" in text
    assert text.count("<table") == text.count("<div class=scroll><table")
