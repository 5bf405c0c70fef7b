"""Tokenizers: text to token ids and back, by bytes. No text can produce control tokens.

Two kinds: sentencepiece `.model` files, and Hugging Face folders with a byte-level BPE `tokenizer.json`. Both obey
three rules on which rollouts depend:

1. `encode` never yields a control token, for any text. Only `render_prompt` writes control tokens.
2. `decode` joins `token_bytes`: what a token adds to the text does not depend on its neighbours.
3. Encoding segments one by one and concatenating the ids decodes to the concatenated segments.

Text is UTF-8; a lone surrogate becomes "?". A sentencepiece model cannot tell U+2581 from a space.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jinja2
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from appo_jax.config import PolicyConfig
from appo_jax.errors import ConfigError, DataError
from appo_jax.text import chat
from appo_jax.text.folder import (
    added_tokens,
    byte_level_bytes,
    chat_templates,
    declared_ends,
    is_byte_level,
    read_json,
    read_json_if_any,
    special_tokens,
    without_control,
)

log = logging.getLogger(__name__)

ROLES = ("system", "user", "assistant")
CONTROL_SYMBOLS = tuple(f"<|{role}|>" for role in ROLES)  # of a sentencepiece model
_RESULT_PLACE = "THE-RESULT-OF-THE-CALL"
# Tags that the policy writes as text and from which rewards and calls are read. Some tokenizers mark them as special.
TAG_NAMES = ("answer", "think", "result", "tool_call", "tool_response")
_TEXT_TAGS = frozenset(f"<{slash}{name}>" for name in TAG_NAMES for slash in ("", "/"))


class Tokenizer(Protocol):
    """The interface of a tokenizer."""

    vocab_size: int  # ids are 0..vocab_size-1; a model's embedding may have more rows than that
    missing_ids: tuple[int, ...]  # of these, the ids that no token has
    eos_id: int  # ends the policy's turn, in demonstrations too
    eos_ids: tuple[int, ...]  # every id that ends a turn; eos_id is the first
    pad_id: int

    def encode(self, text: str) -> list[int]:
        """Ids of any text; never a control token."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; control tokens and ids that no token has add nothing, broken UTF-8 becomes U+FFFD."""

    def token_bytes(self) -> list[bytes]:
        """[V] the bytes each token adds to the text; b"" for control tokens."""

    def render_prompt(self, system: str, question: str) -> list[int]:
        """Ids of a conversation up to where the policy's turn begins. An empty `system` leaves that message out."""


class SentencePieceTokenizer:
    """A sentencepiece model with the control symbols `<|system|>`, `<|user|>` and `<|assistant|>`.

    A prompt is `<|system|> system <|user|> question <|assistant|>`. The model's dummy prefix and its removal of
    whitespace are switched off, since both would break rule 3. Raises DataError for an unusable file.
    """

    def __init__(self, path: str | Path):
        try:
            model = sentencepiece_model_pb2.ModelProto.FromString(  # type: ignore[attr-defined]  # made at import
                Path(path).read_bytes()
            )
            model.normalizer_spec.add_dummy_prefix = False
            model.normalizer_spec.remove_extra_whitespaces = False
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
        except Exception as error:  # protobuf and sentencepiece raise a dozen types
            raise DataError(f"{path}: not a readable sentencepiece model ({type(error).__name__}: {error})") from error
        self.vocab_size: int = self._model.vocab_size()
        self.missing_ids: tuple[int, ...] = ()
        self.eos_id: int = self._model.eos_id()
        if self.eos_id < 0:
            raise DataError(f"{path}: the sentencepiece model has no end-of-sequence symbol; train it with an eos_id")
        self.eos_ids: tuple[int, ...] = (self.eos_id,)
        self.pad_id: int = self._model.pad_id() if self._model.pad_id() >= 0 else self.eos_id
        self._token_bytes = [self._bytes_of(token) for token in range(self.vocab_size)]
        self._roles: dict[str, int] = {}
        for role, symbol in zip(ROLES, CONTROL_SYMBOLS, strict=True):
            token = self._model.piece_to_id(symbol)
            if not self._model.is_control(token):
                raise DataError(
                    f"{path}: no control symbol {symbol}; train it with control_symbols={','.join(CONTROL_SYMBOLS)}"
                )
            self._roles[role] = token

    def encode(self, text: str) -> list[int]:
        return self._model.encode(_valid_unicode(text))

    def decode(self, ids: Sequence[int]) -> str:
        return _join(self._token_bytes, ids)

    def token_bytes(self) -> list[bytes]:
        return self._token_bytes

    def _bytes_of(self, token: int) -> bytes:
        if self._model.is_control(token):
            return b""
        if self._model.is_unknown(token):
            return self._model.decode([token]).encode()
        piece = self._model.id_to_piece(token)
        if self._model.is_byte(token):
            return bytes([int(piece[3:5], 16)])  # <0xNN>
        return piece.replace("▁", " ").encode()

    def render_prompt(self, system: str, question: str) -> list[int]:
        roles = self._roles
        head = [roles["system"], *self.encode(system)] if system else []
        return [*head, roles["user"], *self.encode(question), roles["assistant"]]


class JsonTokenizer:
    """A Hugging Face folder: tokenizer.json (byte-level BPE), tokenizer_config.json and its chat templates.

    Control tokens are the added tokens marked special, those written `<|…|>` or alike, and those that a chat template writes.
    Added tokens such as Qwen3's `<think>` are ordinary text that happens to be one token, also if they are marked special. Of
    templates by name, `tool_use` is used where tools are given, and `default` otherwise. Raises DataError for an unusable folder.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        data = read_json(folder / "tokenizer.json")
        if not is_byte_level(data):
            raise DataError(
                f"{folder / 'tokenizer.json'}: only byte-level BPE is supported (model.type BPE, decoder ByteLevel); "
                "of a tokenizer made by sentencepiece give its .model file"
            )
        config_file = folder / "tokenizer_config.json"
        config = read_json(config_file)
        vocabulary: dict[str, int] = dict(data["model"]["vocab"])
        sources = chat_templates(folder, config)
        self._sources = {name: sources[name] for name in ("default", "tool_use") if name in sources}
        self._templates = {name: chat.compile_template(source) for name, source in self._sources.items()}
        self._special = special_tokens(config)
        written = {*self._special.values(), *(text for source in sources.values() for text in chat.literals(source))}
        self._control, plain_added = added_tokens(data, written, _TEXT_TAGS)
        if not self._control:
            raise DataError(f"{folder / 'tokenizer.json'}: has no special token, so nothing can end a turn")
        for piece in (*self._control, *plain_added):
            vocabulary.pop(piece, None)
        try:  # this guarantees rule 1: the tokenizer that reads text has no control tokens
            self._tokenizer = without_control(data, self._control, plain_added)
        except Exception as error:  # tokenizers raises bare Exception
            raise DataError(f"{folder / 'tokenizer.json'}: the tokenizers library cannot read it: {error}") from error
        ids = {*vocabulary.values(), *plain_added.values(), *self._control.values()}
        self.vocab_size: int = 1 + max(ids)
        self.missing_ids: tuple[int, ...] = tuple(sorted(set(range(self.vocab_size)) - ids))
        self._token_bytes = [b""] * self.vocab_size
        for piece, id in vocabulary.items():
            self._token_bytes[id] = byte_level_bytes(piece)
        for piece, id in plain_added.items():
            self._token_bytes[id] = piece.encode()

        self.eos_id: int = self._special_id("eos_token", config_file)
        self.eos_ids: tuple[int, ...] = (self.eos_id,)
        self.pad_id: int = self._special_id("pad_token", config_file) if "pad_token" in self._special else self.eos_id
        self._pattern = chat.control_pattern(list(self._control))
        self._tools: list[Mapping[str, Any]] | None = None
        self._variables: dict[str, Any] = {}

    @property
    def _template(self) -> jinja2.Template:
        return self._templates["tool_use" if self._tools and "tool_use" in self._templates else "default"]

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(_valid_unicode(text), add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return _join(self._token_bytes, ids)

    def token_bytes(self) -> list[bytes]:
        return self._token_bytes

    def render_prompt(self, system: str, question: str) -> list[int]:
        head = [{"role": "system", "content": system}] if system else []
        return self.render_chat([*head, {"role": "user", "content": question}])

    def with_tools(self, tools: Sequence[Mapping[str, Any]]) -> JsonTokenizer:
        """This tokenizer with tools: its template describes these OpenAI-style functions in every prompt. Raises
        ConfigError for a template that ignores them."""
        other = copy.copy(self)
        other._tools = list(tools)
        if tools and other.render_prompt("s", "q") == self.render_prompt("s", "q"):
            raise ConfigError("policy.tokenizer: its chat template does not describe tools to the policy")
        return other

    def with_variables(self, variables: Mapping[str, Any]) -> JsonTokenizer:
        """This tokenizer with variables for its chat template, such as enable_thinking.

        Raises ConfigError for a variable that the template does not read, or that this program sets."""
        known = {name for source in self._sources.values() for name in chat.variables_of(source)}
        known -= {"messages", "tools", "documents", "add_generation_prompt", *self._special}
        unknown = sorted(variables.keys() - known)
        if unknown:
            raise ConfigError(
                f"policy.template_variables: the chat template does not read {', '.join(unknown)}; "
                f"it reads {', '.join(sorted(known)) or 'no variables'}"
            )
        other = copy.copy(self)
        other._variables = dict(variables)
        return other

    def result_turn(self, call_end: str) -> tuple[list[int], list[int]]:
        """The ids that the template writes around a tool's result: from the end of the call (`call_end`) to the result,
        and from the result to where the policy continues. Raises ConfigError for a template that does not write such
        calls."""
        call = {"type": "function", "function": {"name": "f", "arguments": {"x": "1"}}}
        messages: list[chat.Message] = [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": "f", "content": _RESULT_PLACE},
        ]
        text = chat.render(self._template, messages, True, self._tools, **self._special, **self._variables)
        before, place, after = text.partition(_RESULT_PLACE)
        _, end, head = before.rpartition(call_end)
        if not place or not end:
            raise ConfigError(
                f"policy.tokenizer: its chat template does not write calls that end in {call_end} with results in turns of "
                "their own"
            )
        return self._ids(head), self._ids(after)

    def render_chat(self, messages: Sequence[chat.Message], add_generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation: transformers' `apply_chat_template`, but control tokens in contents stay text."""
        (guarded, tools), mark = chat.guard((messages, self._tools), self._pattern)
        variables = self._special | self._variables
        return self._ids(chat.render(self._template, guarded, add_generation_prompt, tools, **variables), mark)

    def reply_ends(self) -> dict[str, int]:
        """The control tokens with which the chat templates end an assistant's message, and their ids."""
        ends = [
            chat.reply_end(template, self._pattern, with_tools=name == "tool_use", **self._special)
            for name, template in self._templates.items()
        ]
        return {end: self._control[end] for end in ends if end is not None}

    def _ids(self, text: str, mark: str = "") -> list[int]:
        """Ids of rendered text, whose control tokens the template wrote. mark: what `chat.guard` put into the others."""
        ids: list[int] = []
        for piece, is_control in chat.split(text, self._pattern):
            ids += [self._control[piece]] if is_control else self.encode(piece.replace(mark, "") if mark else piece)
        return ids

    def _special_id(self, key: str, file: Path) -> int:
        token = self._special.get(key)
        if token not in self._control:
            raise DataError(f"{file}: {key} is {token!r}, expected one of the special tokens of tokenizer.json")
        return self._control[token]


def load_tokenizer(path: str | Path, model: str | Path | None = None) -> Tokenizer:
    """The tokenizer at `path`: a sentencepiece .model, or a folder that holds tokenizer.json or tokenizer.model.

    A turn is also ended by the ids that generation_config.json (where it names none, config.json) declares, in the folder
    of the tokenizer or in that of the `model`, and by the token with which the chat template ends an assistant's message.
    Raises DataError.
    """
    path = Path(path)
    tokenizer: JsonTokenizer | SentencePieceTokenizer
    if path.is_file() and path.suffix == ".model":
        tokenizer = SentencePieceTokenizer(path)
    elif (path / "tokenizer.model").is_file() and not is_byte_level(read_json_if_any(path / "tokenizer.json")):
        # If there is also a tokenizer.json, it was made from this file.
        tokenizer = SentencePieceTokenizer(path / "tokenizer.model")
    elif (path / "tokenizer.json").is_file():
        tokenizer = JsonTokenizer(path)
    else:
        raise DataError(
            f"{path}: no tokenizer here; expected a .model file or a folder with tokenizer.json or tokenizer.model"
        )
    folders = dict.fromkeys(Path(folder) for folder in (path, model) if folder is not None)
    known = set(range(tokenizer.vocab_size)) - set(tokenizer.missing_ids)
    declared = [id for folder in folders for id in declared_ends(folder, known)]
    tokenizer.eos_ids = tuple(dict.fromkeys([tokenizer.eos_id, *declared]))
    for token, id in tokenizer.reply_ends().items() if isinstance(tokenizer, JsonTokenizer) else ():
        if id not in tokenizer.eos_ids:  # such as <|im_end|> of base models that declare <|endoftext|> alone
            tokenizer.eos_ids += (id,)
            log.info("%s: %s ends a turn, too: the chat template ends replies with it", path, token)
    return tokenizer


def policy_tokenizer(policy: PolicyConfig) -> Tokenizer:
    """The tokenizer of a policy, with its template's variables. Raises DataError, and ConfigError for a variable that
    nothing reads."""
    tokenizer = load_tokenizer(policy.tokenizer or str(policy.path), policy.path)
    if not policy.template_variables:
        return tokenizer
    if not isinstance(tokenizer, JsonTokenizer):
        names = ", ".join(policy.template_variables)
        raise ConfigError(f"policy.template_variables: a sentencepiece model has no chat template that reads {names}")
    return tokenizer.with_variables(policy.template_variables)


def vocabulary(tokenizer: Tokenizer) -> str:
    """A digest of what the ids mean: the bytes of every token, and which one ends a turn."""
    meaning = repr((tokenizer.token_bytes(), tokenizer.eos_id)).encode()
    return hashlib.sha256(meaning).hexdigest()[:16]


def lacks_tokenizer(policy: PolicyConfig) -> bool:
    """Whether a policy of random weights has a tokenizer that is not trained yet (`appo-jax data world` does this)."""
    path = policy.tokenizer
    return policy.path is None and path is not None and path.endswith(".model") and not Path(path).exists()


def check_tags(tokenizer: Tokenizer, tags: Sequence[str]) -> None:
    """Raises ConfigError that names every tag that changes in encoding and decoding, or the line break between them, and every
    tag that is a control token: in text, the policy's own token would be lost."""
    lost = [tag for tag in (*tags, "\n") if tokenizer.decode(tokenizer.encode(tag)) != tag]
    if lost:
        raise ConfigError(
            f"policy.tokenizer: it cannot write {', '.join(map(repr, lost))} (encoding and decoding gives other text); "
            "use a tokenizer with byte fallback, or one trained on text that holds them"
        )
    control = [tag for tag in tags if isinstance(tokenizer, JsonTokenizer) and tag in tokenizer._control]
    if control:
        raise ConfigError(
            f"policy.tokenizer: {', '.join(control)} is a special token, which adds nothing to the policy's text; set "
            '"special": false for it in tokenizer.json, or use tools of other names'
        )


def _join(token_bytes: Sequence[bytes], ids: Sequence[int]) -> str:
    known = len(token_bytes)  # ids beyond are padding of a model's embedding
    return b"".join(token_bytes[token] for token in ids if token < known).decode("utf-8", errors="replace")


def _valid_unicode(text: str) -> str:
    return text.encode("utf-8", errors="replace").decode()
