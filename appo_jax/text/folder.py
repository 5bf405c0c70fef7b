"""Reads the folder of a Hugging Face tokenizer."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from appo_jax.errors import DataError


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


def chat_template(folder: Path, config: dict[str, Any]) -> str:
    """Newer folders hold chat_template.jinja; older ones a string, or a list by name, in tokenizer_config.json."""
    file = folder / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if not template:
        raise DataError(
            f"{folder / 'tokenizer_config.json'}: no chat_template (nor {file.name}); use an instruction-tuned model"
        )
    return template


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
