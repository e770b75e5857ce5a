"""A tokenizer.model as the tokenizer.json that encodes alike.

transformers reads a bare tokenizer.model without its normalization: Llama's own does none, but sentencepiece's default
makes one space of several, and trained models then get other tokens from transformers than they were trained on.
"""

from __future__ import annotations

from typing import Any

_BPE = 2  # TrainerSpec.ModelType
_USER_DEFINED = 4  # SentencePiece.Type


def as_tokenizer_json(proto: bytes, *, bos: str | None) -> str | None:
    """None where transformers needs none, or where there is no such form (only byte-pair encoding has one).

    bos: token put before every text, if any.
    """
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # pyright: ignore[reportAttributeAccessIssue]

    model = ModelProto.FromString(proto)
    spec = model.normalizer_spec
    if not (spec.remove_extra_whitespaces or spec.precompiled_charsmap) or model.trainer_spec.model_type != _BPE:
        return None
    return _build(model, bos).to_str()


def _build(model: Any, bos: str | None) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    vocab = {piece.piece: i for i, piece in enumerate(model.pieces)}
    tokenizer = Tokenizer(
        models.BPE(
            vocab,
            _merges({piece.piece: piece.score for piece in model.pieces}),
            unk_token=model.trainer_spec.unk_piece,
            fuse_unk=True,
            byte_fallback=model.trainer_spec.byte_fallback,
        )
    )
    spec, steps = model.normalizer_spec, []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:  # one at the start is left: it stands for the dummy prefix
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex(r" +\z"), "")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    scheme = "first" if spec.add_dummy_prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [p.piece for p in model.pieces if p.type in (p.CONTROL, p.UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    own = [p.piece for p in model.pieces if p.type == _USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in own])
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocab[bos])]
        )
    return tokenizer


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, best piece first: sentencepiece keeps no list of merges."""
    ids = {piece: i for i, piece in enumerate(scores)}
    found = [
        (-score, ids[piece[:cut]], ids[piece[cut:]], piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    return [(left, right) for *_, left, right in sorted(found)]
