"""Reads the folder of a Hugging Face tokenizer."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Mapping, Set
from pathlib import Path
from typing import Any

import tokenizers

from appo_jax.errors import DataError

ADDITIONAL_TEMPLATES = "additional_chat_templates/*.jinja"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises DataError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected a JSON file of a Hugging Face tokenizer: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected an object with settings, got {content!r:.100}")
    return content


def read_json_if_any(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def is_byte_level(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is of the kind that JsonTokenizer reads."""
    return tokenizer.get("model", {}).get("type") == "BPE" and '"ByteLevel"' in json.dumps(tokenizer.get("decoder"))


def chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates of a folder by name, as transformers reads them: from chat_template.jinja (`default`) and
    additional_chat_templates/NAME.jinja; without such files from tokenizer_config.json, which has one template or a list."""
    file, config_file = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    templates = {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob(ADDITIONAL_TEMPLATES))}
    if file.is_file():
        templates["default"] = file.read_text(encoding="utf-8")
    written = None if templates else config.get("chat_template")
    if isinstance(written, list):
        try:
            templates = {entry["name"]: entry["template"] for entry in written}
        except (KeyError, TypeError):
            raise DataError(
                f'{config_file}: chat_template = {written!r:.100}: expected a list of {{"name": …, "template": …}}'
            ) from None
    elif written:
        templates = {"default": written}
    if not templates:
        raise DataError(f"{config_file}: no chat_template (nor {file.name}); use an instruction-tuned model")
    if not templates.get("default"):
        raise DataError(
            f"{config_file}: its chat templates are named {', '.join(sorted(templates))}; expected one named default "
            f"(or {file.name})"
        )
    return templates


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The tokens that tokenizer_config.json names: `eos_token` and others, with their texts."""
    named = {key: value for key, value in config.items() if key.endswith("_token")}
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
    return {
        key: text for key, text in texts.items() if isinstance(text, str) and text
    }  # add_bos_token is true or false


# `<|im_end|>`, `[|user|]`, and DeepSeek's `<｜User｜>` with full-width bars.
_CONTROL = re.compile(r"[<\[][|｜].*[|｜][>\]]", re.DOTALL)
_IN_BRACKETS = re.compile(r"<.+>|\[.+\]", re.DOTALL)


def added_tokens(
    tokenizer: Mapping[str, Any], written: Collection[str], text_tags: Collection[str]
) -> tuple[dict[str, int], dict[str, int]]:
    """The control tokens of a tokenizer.json and its other added tokens, as text -> id.

    written: the texts in the chat templates, and the tokens that the templates write by name. An added token in brackets that
    is part of them marks a turn, or a part of one, whether or not it is marked special."""
    control: dict[str, int] = {}
    plain: dict[str, int] = {}
    for added in tokenizer.get("added_tokens", []):
        token = added["content"]
        marks = _CONTROL.fullmatch(token) or (_IN_BRACKETS.fullmatch(token) and any(token in text for text in written))
        is_control = (added["special"] or marks) and token not in text_tags
        (control if is_control else plain)[token] = added["id"]
    return control, plain


def without_control(
    tokenizer: Mapping[str, Any], control: Collection[str], plain: Mapping[str, int]
) -> tokenizers.Tokenizer:
    """The tokenizer of a tokenizer.json without its control tokens, so that no text can give one.

    plain: the other added tokens. They go into its vocabulary; otherwise the library would renumber them. Raises whatever the
    library raises for a file that it cannot read."""
    pieces = {piece: id for piece, id in tokenizer["model"]["vocab"].items() if piece not in control}
    text_only = {
        **tokenizer,
        "added_tokens": [added for added in tokenizer["added_tokens"] if added["content"] in plain],
        "model": tokenizer["model"] | {"vocab": pieces | dict(plain)},
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }
    return tokenizers.Tokenizer.from_str(json.dumps(text_only))


def declared_ends(folder: Path, known: Set[int]) -> list[int]:
    """The ids that a model's folder declares to end a turn. known: the ids of its tokenizer."""
    for name in ("generation_config.json", "config.json"):
        declared = read_json_if_any(folder / name).get("eos_token_id")
        ids = declared if isinstance(declared, list) else [] if declared is None else [declared]
        wrong = [id for id in ids if not isinstance(id, int) or isinstance(id, bool) or id not in known]
        if wrong:
            raise DataError(
                f"{folder / name}: eos_token_id = {declared}: expected ids of the tokenizer, 0 to {max(known)}"
            )
        if ids:
            return ids
    return []


@functools.cache
def _byte_level_table() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: printable Latin-1 stands for itself, the rest moves up from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(moved)}


def byte_level_bytes(piece: str) -> bytes:
    table = _byte_level_table()
    if any(char not in table for char in piece):  # as tokenizers' ByteLevel decoder: such a piece is plain text
        return piece.encode()
    return bytes(table[char] for char in piece)
