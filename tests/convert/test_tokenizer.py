"""transformers' AutoTokenizer on what we write, a checkpoint or an export, reads text as we do, whatever the source."""

from __future__ import annotations

import gzip
import json
import random
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from megatron_gil.data.text.tokenizer import Tokenizer
from megatron_gil.engine.model_files import tokenizer_files
from megatron_gil.models.convert.copy import export_model, import_model
from tests.tokenizer_kinds import KINDS, write_kinds

ONE_TURN = "\n\nHuman: Say  it again.  Please!\n\nAssistant:"
ALPHABETS = (range(1, 0x250), range(0x370, 0x400), range(0x4E00, 0x4E40), range(0x1F600, 0x1F640), range(0x600, 0x640))
ODD = "\u2028\u2029\x85\xa0\u200b\u3000\ufeff\u2581\ufb01\u0130\u212b\r\t\n   "
NUM_TEXTS = 150
TALK = [
    {"role": "user", "content": " Is the  sea old?"},
    {"role": "assistant", "content": "Very.\n"},
    {"role": "user", "content": "\tHow old? "},
]
texts = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n\u3000\u2581"), max_size=60)
read = cache(Tokenizer.read)


def hh_texts(directory: Path, count: int) -> list[str]:
    with gzip.open(directory / "hh" / "helpful-base-test.jsonl.gz") as file:
        return [json.loads(line)["chosen"] for line, _ in zip(file, range(count), strict=False)]


def random_texts(count: int) -> list[str]:
    rng = random.Random(1)
    pool = [*ODD, *(chr(i) for alphabet in ALPHABETS for i in alphabet)]
    draws = (lambda: rng.choice(pool), lambda: rng.choice([" ", "  ", "the ", "\n", "Human:"]))
    return ["".join(rng.choice(draws)() for _ in range(rng.randint(0, 40))) for _ in range(count)]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory, public_data: Path | None) -> dict[str, Path]:
    found = write_kinds(tmp_path_factory.mktemp("kinds"))
    return {**found, "stories": public_data / "stories260k-hf"} if public_data else found


@pytest.fixture(scope="module")
def written(kinds: dict[str, Path], world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """What a checkpoint holds of each tokenizer, and an export of that."""
    root, found = tmp_path_factory.mktemp("written"), {}
    for kind, source in kinds.items():
        checkpoint = root / f"{kind}_checkpoint"
        shutil.copytree(world / "tied", checkpoint, ignore=shutil.ignore_patterns("*token*"))
        for name, content in tokenizer_files(source).items():
            (checkpoint / name).write_bytes(content)
        import_model(checkpoint, root / f"{kind}_imported")
        export_model(root / f"{kind}_imported", root / f"{kind}_exported", role=None, note=print)
        found[kind] = [checkpoint, root / f"{kind}_exported"]
    return found


@pytest.fixture(params=[*KINDS, "stories"])
def kind(request: pytest.FixtureRequest, kinds: dict[str, Path]) -> str:
    if request.param not in kinds:
        pytest.skip("no public data; set MEGATRON_GIL_DATA")
    return request.param


def test_auto_tokenizer_reads_every_text_as_we_do(
    kind: str, kinds: dict[str, Path], written: dict[str, list[Path]], public_data: Path | None
) -> None:
    before = read(kinds[kind])
    sample = random_texts(NUM_TEXTS) + (hh_texts(public_data, NUM_TEXTS) if public_data else [])
    for directory in written[kind]:
        theirs, after = AutoTokenizer.from_pretrained(directory), read(directory)
        for text in sample:
            ids = before.encode(text, bos=True)
            assert theirs(text).input_ids == ids, (directory.name, text)
            assert after.encode(text, bos=True) == ids, (directory.name, text)
            assert after.encode_continuation(text) == before.encode_continuation(text), (directory.name, text)
            assert theirs.decode(ids, skip_special_tokens=True) == before.decode(ids) == after.decode(ids)


def test_auto_tokenizer_reads_conversations_as_we_do(
    kind: str, kinds: dict[str, Path], written: dict[str, list[Path]]
) -> None:
    before = read(kinds[kind])
    for directory in written[kind]:
        theirs, after = AutoTokenizer.from_pretrained(directory), read(directory)
        assert before.has_chat_template == after.has_chat_template == bool(theirs.chat_template)
        assert before.control_tokens <= after.control_tokens
        assert (after.bos_id, after.eos_id) == (before.bos_id, before.eos_id)
        if before.has_chat_template:
            ours = before.encode(before.format_prompt(TALK))
            found = theirs.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
            assert found == ours == after.encode(after.format_prompt(TALK))


@settings(max_examples=40)
@given(text=texts)
@pytest.mark.parametrize("name", ["sentencepiece", "collapsing", "no_prefix", "unigram", "stories"])
def test_sentencepiece_and_what_we_write_of_it_agree(
    name: str, kinds: dict[str, Path], written: dict[str, list[Path]], text: str
) -> None:
    if name not in kinds or any(token in text for token in read(kinds[name]).control_tokens):
        return
    model = _processor(kinds[name])
    ids = [model.bos_id(), *model.encode(text)]
    for directory in (kinds[name], *written[name]):
        assert read(directory).encode(text, bos=True) == ids
    assert _auto(written[name][-1])(text).input_ids == ids
    assert _auto(written[name][-1]).decode(ids, skip_special_tokens=True) == model.decode(ids)


@cache
def _processor(directory: Path) -> Any:
    return SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))


@cache
def _auto(directory: Path) -> Any:
    return AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("name", ["sentencepiece", "stories"])
def test_transformers_alone_reads_a_bare_model_otherwise(name: str, kinds: dict[str, Path], tmp_path: Path) -> None:
    """If this fails transformers has learnt to, and sentencepiece_json.py can go."""
    if name not in kinds:
        pytest.skip("no public data; set MEGATRON_GIL_DATA")
    shutil.copyfile(kinds[name] / "tokenizer.model", tmp_path / "tokenizer.model")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    alone = AutoTokenizer.from_pretrained(tmp_path)
    assert [alone(text)["input_ids"] for text in (ONE_TURN, "  a  b")] != [
        read(kinds[name]).encode(text, bos=True) for text in (ONE_TURN, "  a  b")
    ]


@pytest.mark.parametrize("text", ["", "   ", ONE_TURN, " \n x", "\u3000x"])
def test_spaces(kinds: dict[str, Path], written: dict[str, list[Path]], text: str) -> None:
    for name, source in kinds.items():
        ours = read(source)
        for directory in written[name]:
            assert _auto(directory)(text, add_special_tokens=False).input_ids == ours.encode(text), name
            assert read(directory).encode_continuation(text) == ours.encode_continuation(text), name
