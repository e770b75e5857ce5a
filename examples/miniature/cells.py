"""The cells of grid.yaml: one method on one seed each, and where a cell keeps its files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megatron_gil.config import ConfigError
from megatron_gil.demo.annotators import EASY, USUAL, Annotators
from megatron_gil.demo.pipeline import HELD_OUT_PROMPTS, RECIPES
from megatron_gil.demo.world import World, world_at, write_world
from megatron_gil.evaluation.report.runs import Json
from megatron_gil.jsonl import iter_jsonl

GRID = Path(__file__).with_name("grid.yaml")
EASY_HARD_PROMPTS = "prompts_easy_hard.jsonl"
"""The world's prompts, labelled easy or hard in the place of their domains."""
REPEATED_PROMPTS = "prompts_repeated.jsonl"
"""The world's unseen prompts of the training domains, SAMPLED times each; only for cells that sample."""
SAMPLED = 16
LONGER_CHOSEN = "preferences_longer.jsonl"
"""The world's preferences as annotators would have them who look at length alone; only for cells that name it."""
NEEDED = ("sft_model", "reward")
"""Cells that others start from."""
ROLES = {"sft": "policy", "reward": "reward_model", "dpo": "policy", "ppo": "policy"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A method. Command "none" trains nothing and answers with the SFT model; "sample" answers each prompt 16 times."""

    name: str
    label: str
    command: str
    iterations: int
    settings: Sequence[str]
    """All overrides of the command's recipe, those of the cell it is like included; {seed_dir} in them is where the
    seed's files are."""


def read_grid(path: Path = GRID) -> dict[str, Cell]:
    """The cells in the order in which they run, those of the file's `base` first."""
    tree: Any = OmegaConf.to_container(_load(path))
    cells: dict[str, Cell] = {}
    for name, entry in tree["cells"].items():
        like = entry.get("like")
        if like is not None and like not in cells:
            raise ConfigError(f"{path}: {name} is like {like}, which no cell above it is called")
        extra = tree["sampled"] if entry["command"] == "ppo" else []
        inherited = [*tree["common"], *extra] if like is None else cells[like].settings
        cells[name] = Cell(
            name=name,
            label=entry["label"],
            command=entry["command"],
            iterations=entry.get("iterations", tree["iterations"][entry["command"]]),
            settings=[*inherited, *entry.get("set", [])],
        )
    return cells


def _load(path: Path) -> Any:
    """A grid's file over its `base`, which may have one too."""
    loaded = OmegaConf.load(path)
    return OmegaConf.merge(_load(path.parent / loaded.base), loaded) if "base" in loaded else loaded


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a cell of a seed is."""

    output: Path
    seed: int
    cell: Cell

    @property
    def seed_dir(self) -> Path:
        return self.output / f"seed_{self.seed}"

    @property
    def cell_dir(self) -> Path:
        return self.seed_dir / self.cell.name

    @property
    def run_dir(self) -> Path:
        """Of the training command alone."""
        return self.cell_dir / "run"

    @property
    def rows(self) -> Path:
        """The result; a cell is finished when it exists."""
        return self.cell_dir / "rows.jsonl"

    @property
    def replies(self) -> Path:
        """The replies to the held-out prompts, scored."""
        return self.cell_dir / "scored_replies.jsonl"

    @property
    def pairs(self) -> Path:
        """The world's held-out pairs, scored; of cells that sample."""
        return self.cell_dir / "scored_pairs.jsonl"

    @property
    def model(self) -> Path:
        """What the cell trained."""
        return self.run_dir / "checkpoints" / f"iter_{self.cell.iterations:07}" / ROLES[self.cell.command]

    def take(self) -> None:
        """Make the cell's directory its own; ConfigError where it was begun with other settings."""
        record, wanted = self.cell_dir / "cell.json", json.loads(json.dumps(asdict(self.cell)))
        if record.exists():
            found = json.loads(record.read_text(encoding="utf-8"))
            if found != wanted:
                raise ConfigError(f"{self.cell_dir} was begun with other settings; choose another --output")
            return
        self.cell_dir.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(wanted), encoding="utf-8")


def read_annotators(path: Path) -> Annotators:
    """The `annotators` of the grid's file: of the world in which its cells are."""
    tree: Any = OmegaConf.to_container(_load(path))
    return Annotators(**tree.get("annotators", {}))


def take_world(seed_dir: Path, seed: int, annotators: Annotators = USUAL) -> None:
    """Write a seed's world, unless it is there in full."""
    done = seed_dir / HELD_OUT_PROMPTS
    if done.exists():
        return
    shutil.rmtree(seed_dir / "world", ignore_errors=True)
    world = write_world(seed_dir / "world", seed=seed, annotators=annotators)
    _rewrite_rows(
        world.prompts,
        seed_dir / EASY_HARD_PROMPTS,
        lambda row: {**row, "group": "easy" if row["group"] in EASY else "hard"},
    )
    done.write_bytes(world.prompts_eval.read_bytes() + world.prompts_heldout.read_bytes())


def write_repeated(seed_dir: Path) -> None:
    prompts = world_at(seed_dir / "world").prompts_eval.read_text(encoding="utf-8").splitlines(keepends=True)
    repeated = "".join(line * SAMPLED for line in prompts)
    (seed_dir / REPEATED_PROMPTS).write_text(repeated, encoding="utf-8")


def write_longer_chosen(seed_dir: Path) -> None:
    def choose(row: Json) -> Json:
        shorter, longer = sorted((row["chosen"], row["rejected"]), key=len)
        return {**row, "chosen": longer, "rejected": shorter}

    _rewrite_rows(world_at(seed_dir / "world").preferences, seed_dir / LONGER_CHOSEN, choose)


def _rewrite_rows(source: Path, target: Path, change: Callable[[Json], Json]) -> None:
    with target.open("w", encoding="utf-8") as file:
        for _, row in iter_jsonl(source):
            file.write(json.dumps(change(row)) + "\n")


def commands(place: Place, cells: Mapping[str, Cell]) -> list[list[str]]:
    """Arguments of `megatron-gil`, in order: train, and for a policy answer the held-out prompts and score that."""
    world, cell = world_at(place.seed_dir / "world"), place.cell
    sft, reward = (_at(place, cells[name]).model for name in NEEDED)
    key = "ppo.iterations" if cell.command == "ppo" else "train.updates"
    fixed = [f"run.dir={place.run_dir}", f"run.seed={place.seed}", f"{key}={cell.iterations}"]
    files = _training_files(cell.command, world, sft, reward)
    settings = [setting.replace("{seed_dir}", str(place.seed_dir)) for setting in cell.settings]
    train = [cell.command, "--config", str(RECIPES / f"{cell.command}.yaml"), *fixed, *files, *settings]
    if cell.command in ("sft", "reward"):  # the reward model, which scores replies, is not there yet
        return [train]
    policy, replies = place.model if cell.command in ROLES else sft, place.cell_dir / "replies.jsonl"
    prompts = place.seed_dir / (REPEATED_PROMPTS if cell.command == "sample" else HELD_OUT_PROMPTS)
    answer = ["generate", f"models.policy={policy}", f"data.train={prompts}"]
    answer += ["data.max_prompt_tokens=40", "sampling.max_new_tokens=24", f"run.seed={place.seed}", f"output={replies}"]
    score = ["score", f"models.reward_model={reward}", "data.max_prompt_tokens=40", "data.max_tokens=72"]
    score += ["batch.micro_size=64"]
    judged = [answer, [*score, f"data.train={replies}", f"output={place.replies}"]]
    if cell.command == "sample":
        return [*judged, [*score, f"data.train={world.preferences_eval}", f"output={place.pairs}"]]
    return judged if cell.command == "none" else [train, *judged]


def _training_files(command: str, world: World, sft: Path, reward: Path) -> list[str]:
    return {
        "sft": [f"models.policy={world.model}", f"data.train={world.demonstrations}"],
        "reward": [
            f"models.reward_model={sft}", f"data.train={world.preferences}", f"data.eval={world.preferences_eval}"
        ],
        "dpo": [f"models.policy={sft}", f"data.train={world.preferences}"],
        "ppo": [f"models.policy={sft}", f"models.reward_model={reward}", f"data.train={world.prompts}"],
    }.get(command, [])  # fmt: skip


def _at(place: Place, cell: Cell) -> Place:
    return Place(output=place.output, seed=place.seed, cell=cell)
