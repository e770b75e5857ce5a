"""The command line. Nothing heavy is imported before a command is known, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_gil import __version__
from megatron_gil.console import OutputLost, lasting_output, run_interruptible
from megatron_gil.paths import expand_user
from megatron_gil.training.run.signals import StopSignal

COMMANDS = {
    "sft": "train a policy on demonstrations",
    "reward": "train a reward model on preferences",
    "dpo": "train a policy on preferences directly",
    "ppo": "PPO, with group-invariant learning unless gil.num_groups=1",
    "generate": "answer the prompts of a file",
    "score": "reward-model scores of a file of responses or of pairs",
    "evaluate": "win/tie/lose of response files against one another",
    "judge-web": "a page on which people compare responses, blind",
    "win-rates": "verdicts of several judges and tasks as the paper's tables",
    "blind-pairs": "preferences as two files of responses, to check a judge against them",
    "evaluate-reward": "a reward model on preference pairs: accuracy, calibration, length",
    "audit": "before a ppo run: its groups, and whether the reward can be trusted in each",
    "report": "run directories as one HTML page with pictures",
    "plan": "memory and time of a model on so many GPUs, for every layout",
    "prepare-data": "a public data set to training files",
    "convert": "Hugging Face directories in and out of training, checked",
    "demo": "the whole pipeline in miniature on this machine",
}
TRAINING = ("sft", "reward", "dpo", "ppo")
CONFIGURED = (*TRAINING, "generate", "score", "evaluate-reward", "audit")
OWN_OPTIONS = ("evaluate", "judge-web", "win-rates", "blind-pairs", "prepare-data", "convert")
"""Commands that read their arguments themselves: the choices among them take imports."""


def main(argv: list[str] | None = None, stop: StopSignal | None = None) -> int:
    """stop: of a process that runs several commands, one after the other; a new one for this command otherwise.

    Exit codes: 0 done, 1 the run failed, 2 the user's config or data is wrong, 75 stopped after saving; of commands
    that have nothing to save, 130 after Ctrl-C and 141 where the reader of standard output has gone."""
    command = "megatron-gil"
    with lasting_output() as drop_output:
        try:
            arguments = _parse(sys.argv[1:] if argv is None else argv)
            command = f"megatron-gil {arguments.command}"
            if _runs_on_ranks(arguments):
                listening = stop or StopSignal()  # before anything slow
                drop_output()
                return _guarded(command, lambda: _run_configured(arguments, listening))
            return run_interruptible(command, lambda: _guarded(command, lambda: _run(arguments)))
        except OutputLost as lost:
            return lost.report(command)


def _runs_on_ranks(arguments: argparse.Namespace) -> bool:
    return arguments.command in CONFIGURED and not (
        arguments.dry_run or arguments.help_config or _scored_files(arguments)
    )


def _scored_files(arguments: argparse.Namespace) -> list[str]:
    """Of evaluate-reward: what is no section.key=value."""
    if arguments.command != "evaluate-reward":
        return []
    return [text for text in arguments.overrides if not re.match(r"[A-Za-z_][\w.]*=", text)]


def _guarded(command: str, run: Callable[[], int]) -> int:
    """With what is the user's to correct said in one line, by rank 0."""
    from megatron_gil.config import ConfigError

    try:
        return run()
    except ConfigError as error:
        if _rank() == 0:
            print(f"{command}: {error}", file=sys.stderr)
        return 2


def _parse(argv: list[str]) -> argparse.Namespace:
    """The arguments; overrides may stand on both sides of an option, which argparse alone refuses."""
    if argv[:1] and argv[0] in OWN_OPTIONS:
        return argparse.Namespace(command=argv[0], arguments=argv[1:])
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if any(text.startswith("-") for text in rest) or (rest and arguments.command not in CONFIGURED):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron-gil", description="Group-invariant RLHF on megatron-core.")
    parser.add_argument("--version", action="version", version=f"megatron-gil {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name in OWN_OPTIONS:
            continue
        if name in CONFIGURED:
            command.add_argument("--config", type=expand_user, metavar="FILE.yaml", help="a run's settings")
            command.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to them")
            command.add_argument("--help-config", action="store_true", help="print every key, its default and meaning")
            _add_dry_run(command, trains=name in (*TRAINING, "audit"))
            if name == "evaluate-reward":
                _describe_evaluate_reward(command)
        elif name == "report":
            command.add_argument("runs", type=expand_user, nargs="+", metavar="RUN", help="run directories")
            command.add_argument(
                "--judgments",
                type=expand_user,
                nargs="+",
                default=[],
                metavar="FILE.jsonl",
                help="of evaluate --output",
            )
            command.add_argument("--output", type=expand_user, default=Path("report.html"), metavar="FILE.html")
        elif name == "plan":
            command.add_argument(
                "--model",
                default="7b",
                metavar="SIZE",
                help="7b (default), 160m, 1.3b, 3b, 8b, 13b, 70b, a config.json or a name on the Hub, OWNER/NAME",
            )
            command.add_argument("--gpus", type=int, default=8, metavar="N", help="GPUs of the run (default 8)")
            command.add_argument("--gpu-memory", type=float, default=80.0, metavar="GIB", help="of each (default 80)")
            command.add_argument("--gpu", choices=("a100", "h100", "h200"), default="a100", help="for the times")
            command.add_argument(
                "--config", type=expand_user, metavar="FILE.yaml", help="of a ppo run (default: the paper's)"
            )
            command.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to it")
        else:
            command.add_argument("--output", type=expand_user, default=Path("runs/demo"), metavar="DIR")
            command.add_argument("--quick", action="store_true", help="a first impression in under 90 seconds")
            command.add_argument("--seed", type=int, default=1)
    return parser


def _describe_evaluate_reward(command: argparse.ArgumentParser) -> None:
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.usage = (
        "megatron-gil evaluate-reward SCORED.jsonl [SCORED.jsonl ...] [--output NAME.json]\n"
        "       megatron-gil evaluate-reward [--config FILE.yaml] [section.key=value ...] output=NAME.json"
    )
    command.description = (
        "How good a reward model is on held-out preference pairs: of files that `megatron-gil score` wrote of pairs,\n"
        "or of models.reward_model on data.train, which scores first. Table NAME.md and picture NAME.svg lie beside\n"
        "NAME.json."
    )
    command.add_argument("--output", type=expand_user, metavar="NAME.json", help="the same as output=NAME.json")


def _check_numbers(arguments: argparse.Namespace) -> None:
    """Of the options, as config/ does for the keys."""
    from megatron_gil.config import ConfigError
    from megatron_gil.config.ranges import LARGEST_SEED, Range

    ranges = {
        "gpus": Range(low=1, high=1_000_000),
        "gpu_memory": Range(low=0, high=math.inf, with_low=False),
        "seed": Range(low=0, high=LARGEST_SEED),
    }
    for name, bounds in ranges.items():
        value = getattr(arguments, name, None)
        if value is not None and value not in bounds:
            raise ConfigError(f"--{name.replace('_', '-')} {value} must be {bounds}")


def _add_dry_run(command: argparse.ArgumentParser, *, trains: bool) -> None:
    held = ", print what each rank holds" if trains else ""
    command.add_argument("--dry-run", action="store_true", help=f"check everything{held}, end")
    command.add_argument("--gpus", type=int, metavar="N", help="dry run: processes (default: one copy of the model)")
    if trains:
        command.add_argument("--gpu-memory", type=float, metavar="GIB", help="dry run: exit 2 where it does not fit")
    command.add_argument("--sizes-from", type=expand_user, metavar="DIR", help="dry run: of models still to be written")


def _run(arguments: argparse.Namespace) -> int:
    _check_numbers(arguments)
    if arguments.command in CONFIGURED and arguments.help_config:
        from megatron_gil.config.reference import help_text

        print(help_text(arguments.command, width=min(100, shutil.get_terminal_size().columns)))
        return 0
    if scored := _scored_files(arguments):
        return _evaluate_scored(scored, arguments)
    if arguments.command in CONFIGURED:
        from megatron_gil.commands.dry_run import dry_run

        return dry_run(_read_config(arguments), arguments)
    if arguments.command == "evaluate":
        from megatron_gil.commands.evaluate import evaluate
        from megatron_gil.demo.gold import gold_score

        return evaluate(arguments.arguments, gold_score=gold_score)
    if arguments.command == "judge-web":
        from megatron_gil.commands.judge_web import judge_web

        return judge_web(arguments.arguments)
    if arguments.command == "win-rates":
        from megatron_gil.commands.win_rates import win_rates

        return win_rates(arguments.arguments)
    if arguments.command == "blind-pairs":
        from megatron_gil.commands.blind_pairs import blind_pairs

        return blind_pairs(arguments.arguments)
    if arguments.command == "report":
        from megatron_gil.commands.report import report

        return report(arguments)
    if arguments.command == "plan":
        from megatron_gil.commands.plan import plan

        return plan(arguments)
    if arguments.command == "prepare-data":
        from megatron_gil.commands.prepare_data import prepare_data

        return prepare_data(arguments.arguments)
    if arguments.command == "convert":
        from megatron_gil.commands.convert import convert

        return convert(arguments.arguments, verify=_verify)
    from megatron_gil.demo.pipeline import run_demo

    return run_demo(arguments.output, quick=arguments.quick, seed=arguments.seed)


def _evaluate_scored(scored: list[str], arguments: argparse.Namespace) -> int:
    from megatron_gil.commands.evaluate_reward import evaluate_scored
    from megatron_gil.config import ConfigError

    if arguments.config is not None or arguments.dry_run or len(scored) < len(arguments.overrides):
        raise ConfigError(
            f"{scored[0]} is a file of scores: with one there are no settings and no --dry-run; a model is evaluated "
            "with section.key=value alone"
        )
    if _rank() != 0:
        return 0
    try:
        paths = [expand_user(text) for text in scored]
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return evaluate_scored(paths, arguments.output)


def _verify(*directories: Path, **options: Any) -> int:
    from megatron_gil.engine.verify import verify  # torch, which neither import nor export needs

    return verify(*directories, **options)


def _run_configured(arguments: argparse.Namespace, stop: StopSignal) -> int:
    _check_numbers(arguments)
    config = _read_config(arguments)
    from megatron_gil.commands.train import run_command

    return run_command(arguments.command, config, stop)


def _read_config(arguments: argparse.Namespace) -> Any:
    from megatron_gil.config import COMMAND_CONFIGS
    from megatron_gil.config.files import load_config

    output = [f"output={arguments.output}"] if getattr(arguments, "output", None) else []
    return load_config(COMMAND_CONFIGS[arguments.command], arguments.config, [*arguments.overrides, *output])


def _rank() -> int:
    """This process's number among those of the run, before there is a layout."""
    number = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    return int(number) if number.isdecimal() else 0  # what is wrong with it, the layout says


if __name__ == "__main__":
    sys.exit(main())
