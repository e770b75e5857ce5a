"""The model card of an export: the README.md of its directory, whose front matter the Hugging Face Hub reads
(https://huggingface.co/docs/hub/model-cards). It names files and directories without their paths, for cards are
published."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_gil import __version__
from megatron_gil.config import COMMAND_CONFIGS
from megatron_gil.config.files import settings_of
from megatron_gil.data.rows.encoding import format_response
from megatron_gil.data.text.tokenizer import Tokenizer
from megatron_gil.evaluation.report.overview import TERMS, kind_of, number_text
from megatron_gil.models.convert.lineage import Stage, hub_name, preparation
from megatron_gil.models.families import Head

METHODS = {
    "sft": ("SFT", "the next-token loss on the responses of demonstrations"),
    "reward": ("reward modelling", "the Bradley-Terry loss on pairs of responses"),
    "dpo": ("DPO", "direct preference optimisation (arXiv 2305.18290)"),
    "ppo": ("PPO", "PPO against a reward, with a KL penalty towards the model that it began with"),
    "ppo_gil": (
        "PPO-GIL",
        "PPO against a reward, with group-invariant learning (arXiv 2310.11971): a classifier infers groups of "
        "easy and hard data, the policy is trained against the variance of return between them, and the groups' KL "
        "penalties differ",
    ),
}
ROLES = {"policy": "policy", "reward_model": "reward model", "critic": "critic"}
SHOWN = (
    "run.seed",
    "models.dtype",
    "optimizer.lr",
    "critic_optimizer.lr",
    "batch.global_size",
    "train.epochs",
    "dpo.beta",
    "ppo.prompts",
    "ppo.kl_coef",
    "ppo.clip_range",
    "gil.num_groups",
)
"""Settings that a card names even where they are the defaults."""
LEFT_OUT = ("log.", "checkpoint.", "alarms.", "parallel.", "run.dir", "run.resume", "run.max_minutes")
"""Settings that say nothing of what was learned."""
HUMAN_ASSISTANT = "\\n\\nHuman: How do I boil an egg?\\n\\nAssistant:"

SOFTWARE = """@software{{megatron_gil,
  title   = {{megatron_gil: group-invariant learning for RLHF on megatron-core}},
  author  = {{{{megatron_gil contributors}}}},
  version = {{{version}}},
  year    = {{2026}}
}}"""
PAPER = """@inproceedings{zheng2024improving,
  title     = {Improving Generalization of Alignment with Human Preferences through Group Invariant Learning},
  author    = {Zheng, Rui and Shen, Wei and Hua, Yuan and Lai, Wenbin and Dou, Shihan and Zhou, Yuhao and Xi, Zhiheng
               and Wang, Xiao and Huang, Haoran and Gui, Tao and Zhang, Qi and Huang, Xuanjing},
  booktitle = {International Conference on Learning Representations},
  year      = {2024},
  url       = {https://arxiv.org/abs/2310.11971}
}"""


def model_card(
    stages: Sequence[Stage], *, role: str, head: Head, family: str, tokenizer: Tokenizer, num_parameters: int
) -> str:
    """The text of README.md. stages: as `lineage.trace` gives them. role: the model's directory in its checkpoint.
    family: model_type of config.json."""
    last = stages[0] if stages else None
    title = "A model converted by megatron_gil"
    if last is not None:
        title = f"{last.run.name}: {ROLES.get(role, 'model')} after {last.iteration:,} iterations of {_method(last)[0]}"
    base = _shown_path(stages[-1].started_from) if stages else ""
    facts = [f"{num_parameters:,} parameters"] + [f"trained from {base}"] * bool(base)
    kind = "Language model" if head == "lm" else "Model that scores a text"
    parts = [_front_matter(stages, head, family), f"# {title}", f"{kind} ({family}): {', '.join(facts)}."]
    parts += [_stage_text(stage, i) for i, stage in enumerate(reversed(stages), start=1)]
    parts += [_loading(head, tokenizer), _citation(stages), _origin(stages)]
    return "\n\n".join(parts) + "\n"


def _front_matter(stages: Sequence[Stage], head: Head, family: str) -> str:
    from huggingface_hub import ModelCardData  # takes a second to import

    methods = [_method(stage)[0].lower().replace(" ", "-") for stage in stages]
    base = hub_name(stages[-1].started_from) if stages else None
    data = {name for stage in stages for name in _datasets(str(stage.run.config.get("data.train")))}
    content = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation" if head == "lm" else "text-classification",
        tags=[*dict.fromkeys([family, "rlhf", *methods, "megatron_gil"])],
        base_model=base[0] if base else None,
        base_model_relation="finetune" if base else None,
        datasets=sorted(data) or None,
    )
    return f"---\n{content.to_yaml()}\n---"


def _datasets(value: str) -> list[str]:
    """The names on the Hub of what a run was trained on."""
    if found := hub_name(value):
        return [found[0]]
    card = preparation(Path(value))
    return [name for name in card["inputs"] if "/" in name] if card else []


def _method(stage: Stage) -> tuple[str, str]:
    """Its name, and what it does."""
    config = stage.run.config
    has_groups = int(config.get("gil.num_groups") or 1) > 1 or config.get("gil.groups") == "known"
    return METHODS["ppo_gil" if stage.command == "ppo" and has_groups else stage.command]


def _stage_text(stage: Stage, number: int) -> str:
    (name, meaning), run, config = _method(stage), stage.run, stage.run.config
    started, files = _shown_path(stage.started_from), [f"- {key}: {text}" for key, text in _data(config)]
    models = [f"- {key}: {_shown_path(str(config[key]))}" for key in config if _is_other_model(key, config)]
    parts = [
        f"## Stage {number}: {name}",
        f"{stage.iteration:,} iterations of {meaning}.",
        "\n".join([f"- from: {started}", *files, *models]),
        "Its settings that are not the defaults, and some that are:",
        _table(("setting", "value"), _settings(stage)),
    ]
    changes = [
        f"- {row['key']}: {row['old']} -> {row['new']}, from iteration {row['iteration']}" for row in run.changes
    ]
    if changes:
        parts.append("Changed on the way:\n\n" + "\n".join(changes))
    return "\n\n".join(parts + _metrics(stage))


def _is_other_model(key: str, config: dict[str, Any]) -> bool:
    """Whether a run read this model beside the one that it began with."""
    return key in ("models.ref_policy", "models.reward_model") and bool(config[key]) and "ppo.kl_coef" in config


def _data(config: dict[str, Any]) -> list[tuple[str, str]]:
    """(key, file) of what the run read, and where prepare-data had it from."""
    found = []
    for key in ("data.train", "data.eval", "data.pretrain"):
        if value := config.get(key):
            text, card = _shown_path(str(value)), preparation(Path(str(value)))
            found.append((key, f"{text}, of {card['source']}: {', '.join(card['inputs'])}" if card else text))
    return found


def _settings(stage: Stage) -> list[tuple[str, str]]:
    defaults, rows = settings_of(COMMAND_CONFIGS[stage.command]), []
    for key, value in stage.run.config.items():
        is_path = key.startswith(("models.", "data.")) and isinstance(value, str) and ("/" in value or "." in value)
        told = key in SHOWN or value != defaults.get(key, value)
        if told and not is_path and not key.startswith(LEFT_OUT):
            rows.append((key, json.dumps(value) if value is None or isinstance(value, bool) else str(value)))
    return rows


def _metrics(stage: Stage) -> list[str]:
    kind = kind_of(stage.run)
    if kind is None:
        return []
    names = [name for name in kind.columns if not name.startswith("time/") and stage.run.series(name)[1]]
    rows = [(kind.columns[name], f"`{name}`", number_text(stage.run, name)) for name in names]
    terms = [f"- {term}: {TERMS[term]}" for term in TERMS if any(term in kind.columns[name] for name in names)]
    note = "Means over the last tenth of the iterations; held-out: the last evaluation."
    return ["### Metrics", _table(("metric", "name", "value"), rows), note, "\n".join(terms)]


def _loading(head: Head, tokenizer: Tokenizer) -> str:
    auto_class = "AutoModelForCausalLM" if head == "lm" else "AutoModelForSequenceClassification"
    chat, special = '[{"role": "user", "content": "How do I boil an egg?"}]', ""
    lines = [
        f"from transformers import {auto_class}, AutoTokenizer",
        "",
        'name = "."  # this directory, or the name of the model on the Hub',
        "tokenizer = AutoTokenizer.from_pretrained(name)",
        f"model = {auto_class}.from_pretrained(name)",
    ]
    if tokenizer.has_chat_template:
        lines.append(f"prompt = tokenizer.apply_chat_template({chat}, add_generation_prompt=True, tokenize=False)")
        has_bos = tokenizer.encode(tokenizer.format_prompt(json.loads(chat)))[:1] == [tokenizer.bos_id]
        special = ", add_special_tokens=False" * (has_bos or not tokenizer.adds_bos)  # else the rows had a bos too
    else:
        lines.append(f'prompt = "{HUMAN_ASSISTANT}"  # or as the prompts of its training data are written')
    if head == "lm":
        lines += [
            f'inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False{special})',
            "output = model.generate(**inputs, max_new_tokens=128)",
            'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        ]
    else:
        response = format_response(tokenizer, "Nine minutes in boiling water.")
        lines += [
            f'text = prompt + "{response}" + tokenizer.eos_token  # the score is read at the end',
            f'inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False{special})',
            "print(model(**inputs).logits[0, 0].item())",
        ]
    return "## Loading it\n\n```python\n" + "\n".join(lines) + "\n```"


def _citation(stages: Sequence[Stage]) -> str:
    uses_groups = any(_method(stage)[0] == "PPO-GIL" for stage in stages)
    entries = [SOFTWARE.format(version=__version__), *([PAPER] if uses_groups else [])]
    return "## Citation\n\n```bibtex\n" + "\n".join(entries) + "\n```"


def _origin(stages: Sequence[Stage]) -> str:
    written = f"This card was written by `megatron-gil convert export`, megatron_gil {__version__}"
    trained = [f"{stage.run.name}: {stage.run.origin}" for stage in reversed(stages) if stage.run.origin]
    licence = "The licences of the base model and of the data are not known to it: add `license:` at its top."
    return f"{written}{'; trained by ' * bool(trained)}{'; '.join(trained)}. {licence}"


def _shown_path(value: str) -> str:
    """A name on the Hub with its revision, else the last parts of a path, enough to tell a checkpoint's run."""
    if found := hub_name(value):
        files = value.partition(":")[2]
        return f"{found[0]}{f':{files}' * bool(files)} (revision {found[1]})"
    parts = Path(value).parts
    in_run = len(parts) > 3 and parts[-3] == "checkpoints"
    return "/".join(parts[-4:] if in_run else parts[-1:])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
