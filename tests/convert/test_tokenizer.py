"""A tokenizer.model that makes one space of several: transformers' own reading does not; that of what we write does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from megatron_gil.data.sentencepiece_json import as_tokenizer_json
from megatron_gil.data.tokenizer import Tokenizer
from megatron_gil.models.convert.copy import export_model, import_model

ONE_TURN = "\n\nHuman: Say  it again.  Please!\n\nAssistant:"
# U+2581, sentencepiece's own mark for a space, is the one character that the two sides read differently.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581") | st.sampled_from(" \n\u3000"))


@pytest.fixture(scope="module")
def sides(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Tokenizer, Tokenizer]:
    """sentencepiece, transformers on the export, our tokenizer before and after."""
    root = tmp_path_factory.mktemp("tokenizers")
    import_model(stories, root / "imported")
    export_model(root / "imported", root / "exported", role=None, note=print)
    model = SentencePieceProcessor(model_file=str(stories / "tokenizer.model"))
    theirs = AutoTokenizer.from_pretrained(root / "exported")
    return model, theirs, Tokenizer.read(stories), Tokenizer.read(root / "exported")


def test_transformers_alone_reads_it_otherwise(stories: Path, sides: Any) -> None:
    """If this fails transformers has learnt to, and sentencepiece_json.py can go."""
    alone = AutoTokenizer.from_pretrained(stories)
    assert alone(ONE_TURN)["input_ids"] != [1, *sides[0].encode(ONE_TURN)]


@settings(max_examples=150, deadline=None)
@given(text=texts)
def test_all_sides_encode_alike(sides: Any, text: str) -> None:
    assume(not any(token in text for token in ("<unk>", "<s>", "</s>")))  # which sentencepiece alone takes for text
    model, theirs, before, after = sides
    ids = [1, *model.encode(text)]
    assert theirs(text)["input_ids"] == before.encode(text, bos=True) == after.encode(text, bos=True) == ids
    assert before.encode_continuation(text) == after.encode_continuation(text)
    assert theirs.decode(ids, skip_special_tokens=True) == before.decode(ids) == after.decode(ids)


@pytest.mark.parametrize("text", ["", "   ", ONE_TURN, "a </s> b", "<s>  a", "</s>", " x </s>  y "])
def test_spaces_and_special_tokens(sides: Any, text: str) -> None:
    _, theirs, before, after = sides
    assert theirs(text, add_special_tokens=False)["input_ids"] == before.encode(text) == after.encode(text)
    assert before.encode_continuation(text) == after.encode_continuation(text)


def test_llamas_own_tokenizer_needs_nothing(world: Path) -> None:
    """It has no normalization, like the miniature's."""
    assert as_tokenizer_json((world / "policy/tokenizer.model").read_bytes(), bos="<s>") is None
