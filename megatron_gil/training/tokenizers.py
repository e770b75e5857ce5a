"""The tokenizers of a command's models, and what must fit before it starts: one tokenizer for all models that read one
another's tokens, within their vocabularies, and rows within their positions. The dry run asks here too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_gil.config import CommandConfig, ConfigError, PpoConfig, require
from megatron_gil.data.text.tokenizer import Tokenizer
from megatron_gil.models.llama import LlamaSpec

ROLES = {
    "sft": ("policy",),
    "reward": ("reward_model",),
    "dpo": ("policy", "ref_policy"),
    "ppo": ("policy", "ref_policy", "reward_model", "critic"),
    "generate": ("policy",),
    "score": ("reward_model",),
}
"""The models of a command; the first brings the tokenizer."""
FALLBACKS = {"ref_policy": "policy", "critic": "reward_model"}

PROBE = (
    "\n\nHuman: The  quick brown fox's 1,234.5 jumps\u2014over <b>7</b> dogs!\n\nAssistant: def f(x):\n\treturn x**2 "
    "# na\u00efve \u03b1\u03b2\u03b3 \u0416\u0443\u043a \u05e9\u05dc\u05d5\u05dd \u4f60\u597d \u3053 \uac00 "
    "\U0001f642  end "
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTokenizers:
    tokenizer: Tokenizer
    directory: Path  # of `tokenizer`
    reward: Tokenizer | None  # the reward model's own, where it reads text (models.reward_tokenizer=own)
    notes: tuple[str, ...]


def read_tokenizers(
    command: str, config: CommandConfig, paths: Mapping[str, Path], specs: Mapping[str, LlamaSpec]
) -> RunTokenizers:
    """The command's tokenizer, checked against each of its models. ConfigError names both directories, the first
    difference, and the fix.

    paths: directory of every model that is there already. specs: sizes of every model of the command.
    """
    lead = ROLES[command][0]
    directory = Path(config.data.tokenizer) if config.data.tokenizer else paths[lead]
    name = f"data.tokenizer={directory}" if config.data.tokenizer else f"models.{lead}={directory}"
    tokenizer = Tokenizer.read(directory)
    reads_text = isinstance(config, PpoConfig) and config.models.reward_tokenizer == "own"
    reward = Tokenizer.read(paths["reward_model"]) if reads_text and "reward_model" in paths else None
    notes = []
    for role in _readers_of_tokens(config, specs, reads_text):
        _check_size(tokenizer, name, specs[role], f"models.{_source(config, role)}={paths.get(role, '')}")
        path = paths.get(role)
        if path is None or not Tokenizer.is_in(path) or tokenizer.is_copied_in(path):
            continue
        theirs = Tokenizer.read(path)
        if difference := first_difference(tokenizer, theirs):
            where = f"models.{_source(config, role)}={path}"
            fix = _fix(config, role, reads_text)
            raise ConfigError(f"{where} has another tokenizer than {name}: {difference}; {fix}")
        if role == "reward_model" and theirs.chat_template != tokenizer.chat_template:
            notes.append(f"note: models.reward_model={path} has another chat template than {name}, whose it will read")
    if reward is not None:
        _check_size(reward, f"models.reward_model={paths['reward_model']}", specs["reward_model"], "its config.json")
    _check_positions(command, config, specs, paths, reads_text)
    return RunTokenizers(tokenizer=tokenizer, directory=directory, reward=reward, notes=tuple(notes))


def first_difference(ours: Tokenizer, theirs: Tokenizer) -> str | None:
    """What the second ("there") reads otherwise than the first ("here"), in words; None where they agree on special
    tokens, vocabulary and a probe text."""
    for name in ("bos", "eos"):
        here, there = (_spell(t, getattr(t, f"{name}_id")) for t in (ours, theirs))
        if here != there:
            return f"its {name} token is {there}, not {here}"
    if ours.adds_bos != theirs.adds_bos:
        return f"it puts {'a' if theirs.adds_bos else 'no'} bos token before a text"
    for token, token_id in ours.made_control_tokens.items():
        if theirs.id_of(token) != token_id:
            return f"its id of {token!r} is {theirs.id_of(token)}, not {token_id}"
    for i in range(min(ours.num_ids, theirs.num_ids)):
        here, there = ours.token(i), theirs.token(i)
        if here != there and here not in ours.control_tokens and there not in theirs.control_tokens:
            return f"its token {i} is {there!r}, not {here!r}"
    here, there = ours.encode(PROBE), theirs.encode(PROBE)
    if here != there:
        i = next((i for i, (a, b) in enumerate(zip(here, there, strict=False)) if a != b), min(len(here), len(there)))
        found = [_spell(t, ids[i] if i < len(ids) else None) for t, ids in ((theirs, there), (ours, here))]
        return f"it reads token {i} of a probe text as {found[0]}, not {found[1]}"
    return None


def _readers_of_tokens(config: Any, specs: Mapping[str, LlamaSpec], reads_text: bool) -> list[str]:
    """The roles that are given the policy's tokens."""
    roles = [role for role in specs if role != "reward_model" or not reads_text]
    if isinstance(config, PpoConfig):
        gil = config.gil
        if config.ppo.advantages != "gae":
            roles.remove("critic")
        if reads_text and gil.num_groups > 1 and gil.groups == "learned" and gil.classifier == "own_model":
            roles.append("reward_model")  # where the classifier starts
    return roles


def _source(config: CommandConfig, role: str) -> str:
    """The key that names a role's directory."""
    return role if getattr(config.models, role) else FALLBACKS[role]


def _fix(config: CommandConfig, role: str, reads_text: bool) -> str:
    if reads_text and role == "critic":
        return "set models.critic to a directory with the policy's tokenizer"
    if reads_text and role == "reward_model":
        return "gil.classifier=own_model starts from it: set gil.classifier=critic_head"
    if isinstance(config, PpoConfig) and role in ("reward_model", "critic") and not config.data.tokenizer:
        return "set models.reward_tokenizer=own to have it read text, and models.critic to a model with the policy's"
    return "give models that share a tokenizer" + (", or set data.tokenizer=null" if config.data.tokenizer else "")


def _check_size(tokenizer: Tokenizer, name: str, spec: LlamaSpec, model: str) -> None:
    require(
        tokenizer.num_ids <= spec.vocab_size,
        f"{name} makes {tokenizer.num_ids} different tokens, {model} has a vocabulary of {spec.vocab_size}; take the "
        "tokenizer that belongs to the model",
    )


def _check_positions(
    command: str, config: Any, specs: Mapping[str, LlamaSpec], paths: Mapping[str, Path], reads_text: bool
) -> None:
    data = config.data
    limits = [(data.max_tokens, f"data.max_tokens={data.max_tokens}", tuple(specs))]
    if command in ("ppo", "generate"):
        new = config.sampling.max_new_tokens
        text = f"data.max_prompt_tokens={data.max_prompt_tokens} + sampling.max_new_tokens={new}"
        roles = tuple(role for role in specs if role != "reward_model" or not reads_text)
        with_pretraining = limits if command == "ppo" and config.ppo.ptx_coef else []
        limits = [(data.max_prompt_tokens + new, text, roles), *((n, t, ("policy",)) for n, t, _ in with_pretraining)]
    for length, text, roles in limits:
        for role in roles:
            positions = specs[role].max_positions
            where = f"models.{_source(config, role)}={paths.get(role, '')}"
            require(
                length <= positions,
                f"{text} is above the {positions} positions of {where} (max_position_embeddings); lower it",
            )


def _spell(tokenizer: Tokenizer, token_id: int | None) -> str:
    return "none" if token_id is None else f"{tokenizer.token(token_id)!r} ({token_id})"
