from __future__ import annotations

import json
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gil.config import ConfigError
from megatron_gil.data.text.tokenizer import Tokenizer
from tests.tokenizer_kinds import KINDS

_SENTENCEPIECE = ["sentencepiece_dir", "stories_dir"]  # the second collapses runs of spaces
_FAST = ["byte_level_dir", "metaspace_dir", "prepend_dir"]
SPECIAL = ("<s>", "</s>", "<unk>", "<|begin|>", "<|end|>", "<|eot|>", "<|role|>")
text = st.text(max_size=60).filter(lambda s: not any(token in s for token in SPECIAL))
spaced_text = st.lists(st.sampled_from(["Human", " the", "  ", " ", "\n\n", "Assistant:", "é", "字", "\t", "x"])).map(
    "".join
)
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Is the sea old?"},
    {"role": "assistant", "content": "Very."},
    {"role": "user", "content": "How old?"},
]


read = cache(Tokenizer.read)


@cache
def read_library(directory: Path) -> Any:
    from tokenizers import Tokenizer as Fast

    library = Fast.from_file(str(directory / "tokenizer.json"))
    library.no_truncation()
    library.no_padding()
    return library


@pytest.fixture(scope="module")
def stories_dir(real_data: Path) -> Path:
    return real_data / "stories260k-hf"


@pytest.fixture(scope="module", params=_SENTENCEPIECE)
def any_sentencepiece_dir(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def metaspace_dir(sentencepiece_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sentencepiece model as a tokenizer.json with a Metaspace that prepends, as transformers 5 writes it."""
    from transformers import LlamaTokenizer

    directory = tmp_path_factory.mktemp("metaspace")
    LlamaTokenizer.from_pretrained(sentencepiece_dir).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def prepend_dir(metaspace_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a Prepend normalizer, as transformers 4 wrote Llama 2's tokenizer.json."""
    directory = tmp_path_factory.mktemp("prepend")
    shutil.copytree(metaspace_dir, directory, dirs_exist_ok=True)
    specification = json.loads((metaspace_dir / "tokenizer.json").read_text())
    prepend, replace = (
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    )
    specification["normalizer"] = {"type": "Sequence", "normalizers": [prepend, replace]}
    specification["pre_tokenizer"] = None
    (directory / "tokenizer.json").write_text(json.dumps(specification))
    return directory


@pytest.fixture(scope="module", params=_FAST)
def fast_dir(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module", params=_SENTENCEPIECE + _FAST)
def any_dir(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@settings(deadline=None)
@given(text=text | spaced_text)
def test_ids_are_sentencepieces_own(any_sentencepiece_dir: Path, text: str):
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(any_sentencepiece_dir / "tokenizer.model"))
    ours = read(any_sentencepiece_dir)
    assert ours.encode(text) == model.encode(text)
    assert ours.encode(text, bos=True) == [model.bos_id(), *model.encode(text)]
    assert ours.decode(ours.encode(text)) == model.decode(model.encode(text))


@settings(deadline=None)
@given(text=text | spaced_text)
def test_ids_are_the_fast_librarys_own(fast_dir: Path, text: str):
    ours, library = read(fast_dir), read_library(fast_dir)
    assert ours.encode(text) == library.encode(text, add_special_tokens=False).ids
    assert ours.encode(text, bos=True) == library.encode(text, add_special_tokens=True).ids
    assert ours.decode(ours.encode(text, bos=True)) == library.decode(library.encode(text).ids)


@pytest.mark.parametrize("text", ["Hello world", "\n\nHuman: hi\n\nAssistant:", "é字 🙂", "x", "Is it?\nYes."])
def test_a_saved_sentencepiece_model_reads_the_same_in_transformers(stories_dir: Path, tmp_path: Path, text: str):
    from transformers import AutoTokenizer

    ours = Tokenizer.read(stories_dir)
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(text).input_ids == ours.encode(text, bos=True)
    assert theirs.decode(theirs(text).input_ids, skip_special_tokens=True) == ours.decode(ours.encode(text))
    assert Tokenizer.read(tmp_path).encode(text) == ours.encode(text)
    assert (tmp_path / "tokenizer.model").read_bytes() == (stories_dir / "tokenizer.model").read_bytes()


def test_a_saved_fast_tokenizer_reads_the_same_in_transformers(byte_level_dir: Path, tmp_path: Path):
    from transformers import AutoTokenizer

    ours = Tokenizer.read(byte_level_dir)
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("the little girl é").input_ids == ours.encode("the little girl é", bos=True)
    rendered = ours.format_prompt(CHAT)
    assert theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == rendered.text
    assert theirs(rendered.text, add_special_tokens=False).input_ids == ours.encode(rendered)


@settings(deadline=None)
@given(prompt=text | spaced_text, response=text | spaced_text)
def test_a_response_is_encoded_as_the_rest_of_the_whole(any_dir: Path, prompt: str, response: str):
    ours = read(any_dir)
    before, whole = ours.encode(prompt, bos=True), ours.encode(prompt + response, bos=True)
    # Where the end of the prompt is read otherwise in the middle of a text, no rule can agree; nor where a model that
    # strips spaces strips those of the prompt, or where there is no prompt.
    if whole[: len(before)] == before and prompt.strip(" \u2581") and prompt[-1] not in " \u2581":
        assert before + ours.encode_continuation(response) == whole


def test_no_space_is_put_before_a_response(any_dir: Path):
    ours = Tokenizer.read(any_dir)
    prompt = ours.encode("\n\nHuman: hi\n\nAssistant:", bos=True)
    for response in ("Lily", " Lily", "\nLily"):
        assert ours.decode(ours.encode_continuation(response), after=prompt) == response


@settings(deadline=None)
@given(text=st.text(alphabet=st.characters(codec="utf-8", exclude_characters=" \u2581"), max_size=40))
def test_bytes_not_in_the_vocabulary_come_back(sentencepiece_dir: Path, text: str):
    ours = read(sentencepiece_dir)
    if not any(token in text for token in SPECIAL):
        assert ours.decode(ours.encode(text)) == text


def test_control_tokens_are_left_out_of_text_and_their_text_is_not(plain_tokenizer: Tokenizer):
    a, b = plain_tokenizer.encode("a"), plain_tokenizer.encode_continuation("b")
    assert plain_tokenizer.decode([1, *a, plain_tokenizer.eos_id, *b]) == "ab"
    assert plain_tokenizer.decode(plain_tokenizer.encode("<s>a</s>b", bos=True)) == "<s>a</s>b"


@pytest.mark.parametrize("kind", KINDS)
def test_ids_without_a_token_are_left_out_of_text(kind: str, tmp_path: Path):
    """A model whose vocabulary is padded may sample them."""
    KINDS[kind](tmp_path)
    tokenizer = Tokenizer.read(tmp_path)
    first, second = tokenizer.encode("the sea"), tokenizer.encode_continuation(" is old")
    beyond = tokenizer.vocab_size
    assert tokenizer.decode([*first, beyond, *second, beyond + 9]) == tokenizer.decode([*first, *second])
    assert tokenizer.decode([beyond, *second], after=first) == tokenizer.decode(second, after=first)


def test_every_token_that_ends_a_response_is_known(chat_tokenizer: Tokenizer):
    assert chat_tokenizer.eos_id == 2  # the tokenizer's, before the model's
    assert chat_tokenizer.eos_ids == (2, 1)


@pytest.mark.parametrize(
    ("tokenizer_config", "config", "expected"),
    [
        ({}, {}, 2),  # none: eos
        ({}, {"pad_token_id": 5}, 5),
        ({"pad_token": "<unk>"}, {"pad_token_id": 5}, 0),
        ({"pad_token": "[PAD]", "added_tokens_decoder": {"400": {"content": "[PAD]"}}}, {"vocab_size": 400}, 2),
        ({"pad_token": "[PAD]", "added_tokens_decoder": {"400": {"content": "[PAD]"}}}, {"vocab_size": 401}, 400),
        ({}, {"pad_token_id": -1}, 2),
    ],
)
def test_padding_uses_a_row_the_embedding_has(
    sentencepiece_dir: Path, tmp_path: Path, tokenizer_config: dict, config: dict, expected: int
):
    shutil.copy(sentencepiece_dir / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Tokenizer.read(tmp_path).pad_id == expected


def test_a_prompt_without_a_template_is_human_and_assistant(plain_tokenizer: Tokenizer):
    expected = "Be kind.\n\nHuman: Is the sea old?\n\nAssistant: Very.\n\nHuman: How old?\n\nAssistant:"
    assert plain_tokenizer.format_prompt(CHAT).text == expected


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "refuses"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe|access"),
    ],
)
def test_a_template_that_fails_is_one_line(byte_level_dir: Path, tmp_path: Path, template: str, reason: str):
    shutil.copytree(byte_level_dir, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(ConfigError, match=reason) as error:
        Tokenizer.read(tmp_path).format_prompt(CHAT)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("README.md", b"", "holds neither tokenizer.json nor tokenizer.model"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "not a sentencepiece model; for Llama 3"),
        ("tokenizer.json", b"{", "tokenizer.json: not a tokenizer"),
        ("tokenizer.json", b"[]", "tokenizer.json: not a tokenizer"),
    ],
)
def test_a_directory_without_a_usable_tokenizer_is_refused(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        Tokenizer.read(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", "{'a': 1}", "not valid JSON"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"x": "<a>"}}',
            "added_tokens_decoder must map ids to tokens",
        ),
        ("tokenizer_config.json", '{"added_tokens_decoder": ["<a>"]}', "added_tokens_decoder must map ids to tokens"),
        (
            "tokenizer_config.json",
            '{"chat_template": [{"name": "default", "template": 1}]}',
            "chat_template must be text",
        ),
        ("added_tokens.json", '{"<a>": "400"}', "the id of '<a>' must be a whole number from 0, found '400'"),
        ("config.json", '{"vocab_size": {}}', "vocab_size must be a whole number, found {}"),
    ],
)
def test_a_broken_file_beside_the_tokenizer_is_named(
    sentencepiece_dir: Path, tmp_path: Path, name: str, content: str, message: str
):
    shutil.copy(sentencepiece_dir / "tokenizer.model", tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / name}: {message}")):
        Tokenizer.read(tmp_path)
