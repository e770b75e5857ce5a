"""`megatron-gil evaluate-reward`: how good a reward model is on held-out preference pairs, by files of their scores.
(respond.py has the scoring, where a model is given.)"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from megatron_gil.commands.win_rates import print_table
from megatron_gil.config import ConfigError
from megatron_gil.evaluation.quality_tables import as_markdown, quality_table, sentences
from megatron_gil.evaluation.report.figures import to_svg
from megatron_gil.evaluation.report.quality_figures import quality_picture
from megatron_gil.evaluation.reward_quality import RewardQuality, divisions, reward_quality
from megatron_gil.evaluation.scored_pairs import ScoredPair, read_scored_pairs
from megatron_gil.evaluation.tables import finite
from megatron_gil.paths import write_new
from megatron_gil.training.run.output import QualityFiles, quality_files

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def evaluate_scored(paths: Sequence[Path], output: Path | None) -> int:
    """Of files with scores: print, and write where `output` says. Neither torch nor a rank is needed."""
    files = None
    if output is not None:
        files = quality_files(output, named="--output ", may_lack_directory=True, scores=False)
    pairs = read_scored_pairs(paths)
    try:
        show_and_write(pairs, files)
    except OSError as error:
        raise ConfigError(f"{output}: cannot be written: {error.strerror}; choose another --output") from None
    return 0


def show_and_write(pairs: Sequence[ScoredPair], files: QualityFiles | None) -> None:
    """Raises OSError where the files cannot be written; none of them is there then."""
    found = reward_quality(pairs)
    console = Console(highlight=False)
    print_table(console, quality_table(found))
    console.print()
    for sentence in sentences(found):
        console.print(sentence, markup=False)
    if files is None:
        return
    content = {
        files.table: as_markdown(found, files.picture.name),
        files.picture: to_svg(_picture(found, pairs)),
        files.numbers: json.dumps(finite(asdict(found)), indent=2) + "\n",
    }
    write_new(content)
    print(f"written: {', '.join(map(str, content))}", file=sys.stderr)


def _picture(found: RewardQuality, pairs: Sequence[ScoredPair]) -> Figure:
    """With the known groups as parts, else the files."""
    kept = [pair for pair in pairs if not pair.is_identical]
    by = next((name for name in ("group", "file") if name in found.slices), None)
    parts = {"all": kept} if by is None else divisions(kept)[by]
    return quality_picture(
        found.overall.bins,
        {name: [pair.margin for pair in part] for name, part in parts.items()},
        {} if by is None else {name: part.bins for name, part in found.slices[by].items()},
    )
