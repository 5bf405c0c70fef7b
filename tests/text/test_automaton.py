"""The stop automaton against plain string search on the text."""

import io
import random

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from appo_jax.text.automaton import StopAutomaton

STOPS = ("</python>", "</search>", "</tool_call>", "<stop>", "größe")


def first_completed(text: bytes, stops: list[bytes]) -> tuple[int, int]:
    """(end, index) of the stop string that ends first in `text`, the longer one on a tie; (-1, -1) for none."""
    found = [(text.find(s) + len(s), -len(s), i) for i, s in enumerate(stops) if s in text]
    end, _, index = min(found, default=(-1, 0, -1))
    return end, index


def expected_hits(tokens: list[int], token_bytes: list[bytes], stops: list[bytes]) -> list[int]:
    """The expected `hit` after every token, by string search."""
    end, index = first_completed(b"".join(token_bytes[t] for t in tokens), stops)
    ends = np.cumsum([len(token_bytes[t]) for t in tokens])
    return [index if 0 <= end <= e else -1 for e in ends]


def follow(automaton: StopAutomaton, streams: np.ndarray) -> np.ndarray:
    """`hit` after every token of every stream: [num_streams, length]."""
    state = np.zeros(len(streams), int)
    hits = np.empty(streams.shape, int)
    for t in range(streams.shape[1]):
        state = automaton.next_state[state, streams[:, t]]
        hits[:, t] = automaton.hit[state]
    return hits


def byte_tokenizer(rng: random.Random):
    return [bytes([b]) for b in range(256)], lambda text: list(text.encode())


def sentencepiece_tokenizer(rng: random.Random):
    words = ["".join(rng.choices("abdeghinorstu", k=rng.randint(2, 6))) for _ in range(60)]
    lines = [" ".join(rng.choices([*words, *STOPS, "<python>", "print(3)"], k=9)) for _ in range(300)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=480, byte_fallback=True, model_type="bpe",
        minloglevel=2, num_threads=1, add_dummy_prefix=False,
    )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())

    def piece_bytes(i: int) -> bytes:
        if processor.is_control(i) or processor.is_unknown(i):
            return b""
        piece = processor.id_to_piece(i)
        return bytes([int(piece[3:5], 16)]) if processor.is_byte(i) else piece.replace("▁", " ").encode()

    return [piece_bytes(i) for i in range(processor.vocab_size())], processor.encode


def piece_tokenizer(rng: random.Random):
    """Pieces cut at random from joined stop strings: many end in the middle of a stop string, or contain a complete one."""
    text = "".join(rng.choices([*STOPS, "x", "</", ">\n"], k=400)).encode()
    starts = [rng.randrange(len(text)) for _ in range(500)]
    pieces = list({text[s : s + rng.randint(1, 14)] for s in starts} | {bytes([b]) for b in range(256)})
    by_first: dict[int, list[int]] = {}
    for i, piece in enumerate(pieces):
        by_first.setdefault(piece[0], []).append(i)

    def encode(text: str) -> list[int]:
        rest, tokens = text.encode(), []
        while rest:
            token = rng.choice([i for i in by_first[rest[0]] if rest.startswith(pieces[i])])
            tokens.append(token)
            rest = rest[len(pieces[token]) :]
        return tokens

    return pieces, encode


@pytest.mark.parametrize("tokenizer", [byte_tokenizer, sentencepiece_tokenizer, piece_tokenizer])
def test_agrees_with_string_search_on_10_000_token_streams(tokenizer):
    rng = random.Random(7)
    token_bytes, encode = tokenizer(rng)
    token_bytes = [*token_bytes, b""]  # an end-of-text token, used as padding below
    stops = [s.encode() for s in STOPS]
    # snippets: whole stop strings, broken ones, neighbours; as the tokenizer cuts them
    snippets = [encode(text) for text in (*STOPS, *(s[:-1] for s in STOPS), *(s[1:] for s in STOPS), " <python>", "<<")]
    snippets += [encode(first[: rng.randint(1, len(first))] + second) for first in STOPS for second in STOPS]
    streams = np.full((10_000, 24), len(token_bytes) - 1)
    for row in streams:
        tokens: list[int] = []
        while len(tokens) < 24 and rng.random() < 0.9:
            tokens += rng.choices(range(len(token_bytes)), k=rng.randint(0, 4))
            if rng.random() < 0.4:
                tokens += rng.choice(snippets)
        row[: len(tokens)] = tokens[:24]

    hits = follow(StopAutomaton.build(STOPS, token_bytes), streams)
    expected = np.array([expected_hits(row, token_bytes, stops) for row in streams.tolist()])
    np.testing.assert_array_equal(hits, expected)
    assert set(np.unique(hits)) == {-1, 0, 1, 2, 3, 4}  # every stop string came up
    assert 0.2 < (hits[:, -1] >= 0).mean() < 0.9  # and many streams had none


SHORT = st.text("ab", min_size=1, max_size=4)


@settings(max_examples=300, deadline=None)
@given(st.lists(SHORT, max_size=4), st.lists(st.text("abc", max_size=5), min_size=1, max_size=6), st.data())
def test_agrees_with_string_search_for_any_stops_and_vocabulary(stops, vocabulary, data):
    """A two-letter alphabet makes overlaps, stops inside stops, and stops inside tokens common."""
    token_bytes = [v.encode() for v in vocabulary]
    tokens = data.draw(st.lists(st.integers(0, len(vocabulary) - 1), min_size=1, max_size=12))
    automaton = StopAutomaton.build(stops, token_bytes)
    expected = expected_hits(tokens, token_bytes, [s.encode() for s in stops])
    assert follow(automaton, np.array([tokens]))[0].tolist() == expected


def test_golden_table():
    automaton = StopAutomaton.build(["ab"], [b"a", b"b", b"xab", b"aba", b""])
    assert automaton.next_state.tolist() == [[1, 0, 2, 2, 0], [1, 2, 2, 2, 1], [2, 2, 2, 2, 2]]
    assert automaton.hit.tolist() == [-1, -1, 0]
    assert automaton.next_state.dtype == np.uint8


def test_first_completed_wins_inside_one_token():
    automaton = StopAutomaton.build(["</search>", "</python>"], [b"x</python></search>", b"</search>"])
    state = automaton.next_state[0, 0]
    assert automaton.hit[state] == 1
    assert automaton.next_state[state, 1] == state  # absorbing


def test_more_than_256_states_need_two_bytes():
    automaton = StopAutomaton.build(["a" * 300], [b"a", b"a" * 299])
    assert automaton.next_state.dtype == np.uint16
    state = automaton.next_state[automaton.next_state[0, 0], 1]
    assert automaton.hit[state] == 0


def test_no_stop_strings_never_hits():
    automaton = StopAutomaton.build([], [b"a", b"b"])
    assert automaton.next_state.tolist() == [[0, 0]]
    assert automaton.hit.tolist() == [-1]


def test_empty_stop_string_is_named():
    with pytest.raises(ValueError, match=r"stop_strings\[1\] is empty"):
        StopAutomaton.build(["x", ""], [b"a"])
