"""The tokenizers of a command's models, and what must fit before it starts: one tokenizer for all models that read one
another's tokens, within their vocabularies, and rows within their positions. The dry run asks here too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_gil.config import CommandConfig, ConfigError, GenerateConfig, PpoConfig, require
from megatron_gil.data.hub import located
from megatron_gil.data.text.tokenizer import Tokenizer
from megatron_gil.models.families import ModelSpec
from megatron_gil.models.uses import ModelUse

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
    config: CommandConfig, uses: Sequence[ModelUse], paths: Mapping[str, Path], specs: Mapping[str, ModelSpec]
) -> RunTokenizers:
    """The command's tokenizer, checked against each of its models. ConfigError names both directories, the first
    difference, and the fix.

    paths: by role, the directory of the first model and of every other that is there already. specs: sizes of all.
    """
    lead = uses[0]
    given = config.data.tokenizer
    directory = located(given, "tokenizer", "data.tokenizer") if given else paths[lead.role]
    name = f"data.tokenizer={directory}" if config.data.tokenizer else f"models.{lead.key}={directory}"
    tokenizer, reward = Tokenizer.read(directory), None
    notes = []
    for use in uses:
        path, where = paths.get(use.role), f"models.{use.key}={paths.get(use.role, '')}"
        if use.reads_text:
            if path is not None:
                reward = Tokenizer.read(path)
                _check_size(reward, where, specs[use.role], "its config.json")
            continue
        _check_size(tokenizer, name, specs[use.role], where)
        if path is None or not Tokenizer.is_in(path) or tokenizer.is_copied_in(path):
            continue
        theirs = Tokenizer.read(path)
        if difference := first_difference(tokenizer, theirs):
            raise ConfigError(f"{where} has another tokenizer than {name}: {difference}; {_fix(config, use)}")
        if use.role == "reward_model" and theirs.chat_template != tokenizer.chat_template:
            notes.append(f"note: {where} has another chat template than {name}, whose it will read")
    _check_positions(config, uses, paths, specs)
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


def _fix(config: CommandConfig, use: ModelUse) -> str:
    reads_text = config.models.reward_tokenizer == "own" and isinstance(config, PpoConfig)
    if reads_text and use.role == "critic":
        return "set models.critic to a directory with the policy's tokenizer"
    if reads_text and use.role == "classifier":
        return "gil.classifier=own_model starts from it: set gil.classifier=critic_head"
    if isinstance(config, PpoConfig) and use.key in ("reward_model", "critic") and not config.data.tokenizer:
        return "set models.reward_tokenizer=own to have it read text, and models.critic to a model with the policy's"
    return "give models that share a tokenizer" + (", or set data.tokenizer=null" if config.data.tokenizer else "")


def _check_size(tokenizer: Tokenizer, name: str, spec: ModelSpec, model: str) -> None:
    require(
        tokenizer.num_ids <= spec.vocab_size,
        f"{name} makes {tokenizer.num_ids} different tokens, {model} has a vocabulary of {spec.vocab_size}; take the "
        "tokenizer that belongs to the model",
    )


def _check_positions(
    config: CommandConfig, uses: Sequence[ModelUse], paths: Mapping[str, Path], specs: Mapping[str, ModelSpec]
) -> None:
    data = config.data
    whole = (data.max_tokens, f"data.max_tokens={data.max_tokens}")
    for use in uses:
        limits = [whole]
        if isinstance(config, PpoConfig | GenerateConfig):
            new = config.sampling.max_new_tokens
            text = f"data.max_prompt_tokens={data.max_prompt_tokens} + sampling.max_new_tokens={new}"
            reads_pretraining = isinstance(config, PpoConfig) and config.ppo.ptx_coef and use.role == "policy"
            limits = [(data.max_prompt_tokens + new, text)] * (not use.reads_text) + [whole] * bool(reads_pretraining)
        for length, text in limits:
            positions, where = specs[use.role].max_positions, f"models.{use.key}={paths.get(use.role, '')}"
            require(
                length <= positions,
                f"{text} is above the {positions} positions of {where} (max_position_embeddings); lower it",
            )


def _spell(tokenizer: Tokenizer, token_id: int | None) -> str:
    return "none" if token_id is None else f"{tokenizer.token(token_id)!r} ({token_id})"
