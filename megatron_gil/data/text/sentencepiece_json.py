"""Turns a tokenizer.model into a tokenizer.json that encodes in the same way.

transformers reads a tokenizer.model alone in another way than sentencepiece does: without its normalization, and
without putting a space before a text that begins with one. The trained model would then be given other tokens than
it was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_gil.data.text.special_tokens import SpecialTokens
from megatron_gil.data.text.subwords import added_control, control_pieces

_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
_USER_DEFINED = 4  # SentencePiece.Type


def as_tokenizer_json(proto: bytes, special: SpecialTokens, *, bos: str | None) -> str | None:
    """None where there is no such form; there is one for byte-pair encoding and unigram models. special: the
    directory's special tokens, among them those added to the model's own. bos: the token put before every text, if any.
    """
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # pyright: ignore[reportAttributeAccessIssue]

    model = ModelProto.FromString(proto)
    control = [*control_pieces(model, special), *added_control(special, len(model.pieces))]
    if model.trainer_spec.model_type not in (_UNIGRAM, _BPE):
        return None
    return _build(model, special, control, bos).to_str()


def _build(model: Any, special: SpecialTokens, control: list[str], bos: str | None) -> Any:
    from tokenizers import AddedToken, Tokenizer, processors

    vocab = {piece.piece: i for i, piece in enumerate(model.pieces)}
    tokenizer = Tokenizer(_subwords(model, vocab))
    spec = model.normalizer_spec
    tokenizer.normalizer = _normalizer(spec)
    tokenizer.pre_tokenizer = _pre_tokenizer(spec)
    tokenizer.decoder = _decoder(spec)
    own = {piece.piece for piece in model.pieces if piece.type == _USER_DEFINED}
    added = _without_gaps({token: i for token, i in special.added_tokens.items() if i >= len(vocab)}, len(vocab))
    for token in [*(piece for piece in vocab if piece in own or piece in control), *added]:
        is_special = token in control or (token not in special.added_tokens and token not in own)
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=is_special)])
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


def _subwords(model: Any, vocab: Mapping[str, int]) -> Any:
    from tokenizers import models

    byte_fallback = model.trainer_spec.byte_fallback
    if model.trainer_spec.model_type == _BPE:
        scores = {piece.piece: piece.score for piece in model.pieces if piece.type == piece.NORMAL}
        merges, unknown = _merges(scores), model.trainer_spec.unk_piece
        return models.BPE(dict(vocab), merges, unk_token=unknown, fuse_unk=True, byte_fallback=byte_fallback)
    unk_id = next(i for i, piece in enumerate(model.pieces) if piece.type == piece.UNKNOWN)
    # In text sentencepiece finds only normal pieces. A score this low keeps the others out here too.
    scored = [(p.piece, p.score if p.type == p.NORMAL else -1e6) for p in model.pieces]
    return models.Unigram(scored, unk_id=unk_id, byte_fallback=byte_fallback)


def _normalizer(spec: Any) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex(r" +\z"), "")]
        if not spec.add_dummy_prefix:
            steps.append(normalizers.Replace(Regex(r"\A "), ""))
    if not _strips_start(spec):
        steps.append(normalizers.Replace(" ", "\u2581"))
    return normalizers.Sequence(steps)


def _pre_tokenizer(spec: Any) -> Any:
    """Replaces spaces by sentencepiece's mark and writes the dummy prefix: a mark before the first text, but not before
    text that follows a control token. Metaspace writes no prefix where the text begins with a mark already. For a model
    that strips spaces at the start this is right: the mark that is left is the prefix. For another model the prefix is
    written by a first Metaspace, whose mark is a space; at that point the text has no such mark yet.
    """
    from tokenizers import pre_tokenizers

    scheme = "first" if spec.add_dummy_prefix else "never"
    if _strips_start(spec):
        return pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    prefix = pre_tokenizers.Metaspace(replacement=" ", prepend_scheme=scheme, split=False)
    return pre_tokenizers.Sequence([prefix, pre_tokenizers.Metaspace(prepend_scheme="never", split=False)])


def _decoder(spec: Any) -> Any:
    from tokenizers import decoders

    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix or spec.remove_extra_whitespaces:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _strips_start(spec: Any) -> bool:
    return spec.remove_extra_whitespaces and spec.add_dummy_prefix


def _without_gaps(added: Mapping[str, int], first: int) -> list[str]:
    """The added tokens in the order of their ids, without gaps: the tokenizers library gives each the next id."""
    token_of = {i: token for token, i in added.items()}
    return [token_of.get(i, f"<|unused {i}|>") for i in range(first, max(token_of, default=-1) + 1)]


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, the best piece first. sentencepiece has no list of merges, so they
    are found from its pieces."""
    ids = {piece: i for i, piece in enumerate(scores)}
    found = [
        (-score, ids[piece[:cut]], ids[piece[cut:]], piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    return [(left, right) for *_, left, right in sorted(found)]
