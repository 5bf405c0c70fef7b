"""A tokenizer as the files of a Hugging Face folder, from which transformers and vLLM build the same tokenizer."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, decoders, models, normalizers

from appo_jax.text.folder import ADDITIONAL_TEMPLATES, chat_templates, read_json
from appo_jax.text.tokenizer import CONTROL_SYMBOLS

log = logging.getLogger(__name__)

COPIED = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
# The same text as SentencePieceTokenizer.render_prompt, also for whole conversations.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role not in ["system", "user", "assistant"] -%}
{{ raise_exception("no such role: " + message.role) }}
{%- endif -%}
{{ "<|" + message.role + "|>" + message.content }}
{%- if message.role == "assistant" -%}{{ eos_token }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<|assistant|>" }}{%- endif -%}"""


def tokenizer_files(path: Path) -> dict[str, bytes]:
    """A tokenizer's files, name -> content: those of its folder, and for a sentencepiece model also those made from
    it."""
    files = {"tokenizer.model": path.read_bytes()} if path.is_file() else {}
    for name in COPIED:
        if (path / name).is_file():
            files[name] = (path / name).read_bytes()
    if any(path.glob(ADDITIONAL_TEMPLATES)):  # as a list in tokenizer_config.json, because an export has no folders
        config = read_json(path / "tokenizer_config.json")
        templates = chat_templates(path, config)
        config["chat_template"] = [{"name": name, "template": source} for name, source in templates.items()]
        files["tokenizer_config.json"] = json.dumps(config, indent=2, ensure_ascii=False).encode()
        files.pop("chat_template.jinja", None)  # it would replace the list
    if "tokenizer.json" not in files and "tokenizer.model" in files:
        files |= _from_sentencepiece(files["tokenizer.model"], path)
    return files


def _from_sentencepiece(content: bytes, path: Path) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json of a sentencepiece model, used as SentencePieceTokenizer uses it."""
    model = sentencepiece_model_pb2.ModelProto.FromString(content)  # type: ignore[attr-defined]  # made at import
    kinds, trainer = model.SentencePiece, model.trainer_spec
    if trainer.model_type not in (trainer.BPE, trainer.CHAR):
        log.warning(
            "%s: a %s sentencepiece model has no equal in transformers: the export holds tokenizer.model alone, which this "
            "program reads. Train tokenizers with model_type bpe",
            path, trainer.ModelType.Name(trainer.model_type).lower(),
        )  # fmt: skip
        return {}
    # Symbols given by the user are found in the text before any piece is, as the library's added tokens are.
    pieces = [p.piece.replace("▁", " ") if p.type == kinds.USER_DEFINED else p.piece for p in model.pieces]
    unknown = next((i for i, p in enumerate(model.pieces) if p.type == kinds.UNKNOWN), None)
    made = models.BPE(
        {piece: i for i, piece in enumerate(pieces)},
        _merges({p.piece: p.score for p in model.pieces if p.type == kinds.NORMAL}),
        byte_fallback=trainer.byte_fallback, fuse_unk=True, unk_token=None if unknown is None else pieces[unknown],
    )  # fmt: skip
    tokenizer = tokenizers.Tokenizer(made)
    spaces = normalizers.Replace(" ", "▁")
    charsmap = model.normalizer_spec.precompiled_charsmap
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Precompiled(charsmap), spaces]) if charsmap else spaces
    )  # fmt: skip
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(
        [AddedToken(pieces[i], normalized=False) for i, p in enumerate(model.pieces) if p.type == kinds.CONTROL]
    )
    tokenizer.add_tokens(
        [AddedToken(pieces[i], normalized=False) for i, p in enumerate(model.pieces) if p.type == kinds.USER_DEFINED]
    )
    special = {"bos": trainer.bos_id, "eos": trainer.eos_id, "pad": trainer.pad_id, "unk": trainer.unk_id}
    config = {f"{name}_token": pieces[id] for name, id in special.items() if id >= 0} | {
        "additional_special_tokens": list(CONTROL_SYMBOLS),
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode(),
    }


def _merges(piece_scores: dict[str, float]) -> list[tuple[str, str]]:
    """The merges of a sentencepiece BPE model, which only stores pieces: every split of a piece into two others, pieces of
    the highest score first."""
    order = {piece: i for i, piece in enumerate(sorted(piece_scores, key=lambda piece: -piece_scores[piece]))}
    splits = [
        (order[piece], order[piece[:i]], (piece[:i], piece[i:]))
        for piece in piece_scores
        for i in range(1, len(piece))
        if piece[:i] in piece_scores and piece[i:] in piece_scores
    ]
    return [merge for *_, merge in sorted(splits)]
