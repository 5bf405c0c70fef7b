"""Training a sentencepiece tokenizer for policies that start from random weights."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from appo_jax.errors import ConfigError
from appo_jax.storage import write_atomically
from appo_jax.text.tokenizer import CONTROL_SYMBOLS

SPACE = "\u2581"  # how sentencepiece writes a space inside a piece
# Digits go in pairs from the left, so that copying a number takes a token or two.
PAIRS_OF_DIGITS = tuple(f"{number:02d}" for number in range(100))


def structure(call_pieces: Sequence[str]) -> tuple[str, ...]:
    """The fixed pieces of a rollout. Each is one token, so that the policy needs one choice for it.

    call_pieces: those of the run's call format (`CallFormat.pieces`)."""
    return ("<think>", "</think>", *call_pieces, "<answer>", "</answer>", "\\boxed{", "\n")


def train_tokenizer(texts: Iterable[str], path: Path, call_pieces: Sequence[str], vocab_size: int = 1024) -> None:
    """Train on `texts` and write the model to `path` (.model). The same texts give the same bytes. A small text gives
    fewer than `vocab_size` pieces. Raises ConfigError if `vocab_size` is too small for the letters in the text, or if there is
    another tokenizer at `path`: the policies that were trained with it need it.

    The model is a BPE, in which a frequent name becomes one piece. Digits are grouped in pairs; any byte can be
    encoded; spaces and line breaks are kept, so that pieces encoded separately decode to the joined text."""
    model = io.BytesIO()
    try:
        _train(texts, model, call_pieces, vocab_size)
    except RuntimeError as error:  # sentencepiece raises it if the vocabulary is too small for the letters of the text
        raise ConfigError(f"policy.architecture.vocab_size = {vocab_size}: {error}") from error
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, model.getvalue())
    elif path.read_bytes() != model.getvalue():
        raise ConfigError(
            f"policy.tokenizer = {str(path)!r}: another tokenizer is there, and the runs that use it need it; give another "
            "--policy.tokenizer to `data world` and to the run, or delete the file if no run uses it"
        )


def _train(texts: Iterable[str], model: io.BytesIO, call_pieces: Sequence[str], vocab_size: int) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        control_symbols=list(CONTROL_SYMBOLS),
        user_defined_symbols=[*(piece.replace(" ", SPACE) for piece in structure(call_pieces)), *PAIRS_OF_DIGITS],
        byte_fallback=True,
        split_digits=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
