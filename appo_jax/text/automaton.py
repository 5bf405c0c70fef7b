"""Stop strings on token ids: an Aho-Corasick automaton over bytes, lifted to the tokenizer's tokens.

Generation stops where the text completes a call's closing tag, for any tokenisation of it. The jitted decode loop cannot
look at text, but it can follow one table: `state = next_state[state, token]`, and `hit[state] >= 0` says which string
has been completed. The table costs (total length of the stop strings + 1) · V entries of one or two bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class StopAutomaton:
    """Its state is the longest suffix of the text so far that is a prefix of a stop string; `S` states, `V` tokens. State 0 is
    the start. The first completed string wins, also in the middle of a token, and its state never changes again. Of two strings
    that end at the same byte the longer one wins, of two equal ones the first. Tokens without bytes (special tokens) keep the
    state.
    """

    next_state: np.ndarray  # [S, V] uint8, or uint16 for more than 256 states
    hit: np.ndarray  # [S] int32: index of the stop string this state has completed, -1 for none

    @classmethod
    def build(cls, stop_strings: Sequence[str], token_bytes: Sequence[bytes]) -> StopAutomaton:
        """Automaton of `stop_strings` for a tokenizer whose token v stands for the bytes `token_bytes[v]`.

        Raises ValueError for an empty stop string (it would stop before the first token).
        """
        if "" in stop_strings:
            raise ValueError(
                f"stop_strings[{list(stop_strings).index('')}] is empty; every stop string needs a character"
            )
        byte_next, hit = _byte_automaton([s.encode() for s in stop_strings])
        return cls(_lift(byte_next, token_bytes), hit)


def _byte_automaton(patterns: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Transition table [S, 256] and hits [S] over single bytes (Aho and Corasick, 1975)."""
    children: list[dict[int, int]] = [{}]  # the trie; state 0 is the empty prefix
    completed = [-1]
    for index, pattern in enumerate(patterns):
        state = 0
        for byte in pattern:
            if byte not in children[state]:
                children[state][byte] = len(children)
                children.append({})
                completed.append(-1)
            state = children[state][byte]
        if completed[state] < 0:
            completed[state] = index

    table = np.zeros((len(children), 256), np.int64)
    fallback = [0] * len(children)  # state of the longest proper suffix that is in the trie
    queue = [0]
    for state in queue:  # breadth first: a fallback is shorter, so its row is complete
        row = table[fallback[state]].copy() if state else np.zeros(256, np.int64)
        for byte, child in children[state].items():
            fallback[child] = int(row[byte]) if state else 0
            row[byte] = child
            queue.append(child)
        if completed[state] < 0:
            completed[state] = completed[fallback[state]]
        table[state] = row
    hit = np.array(completed, np.int32)
    absorbing = hit >= 0
    table[absorbing] = np.flatnonzero(absorbing)[:, None]
    return table, hit


def _lift(byte_next: np.ndarray, token_bytes: Sequence[bytes]) -> np.ndarray:
    """From bytes to tokens: walk byte i of all tokens from all states at once, longest tokens first."""
    lengths = np.array([len(token) for token in token_bytes], np.int64)
    order = np.argsort(-lengths, kind="stable")
    flat = np.frombuffer(b"".join(token_bytes), np.uint8)
    offsets = (np.cumsum(lengths) - lengths)[order]
    num_states = len(byte_next)
    dtype = np.min_scalar_type(num_states - 1)
    byte_next = byte_next.astype(dtype)
    states = np.repeat(np.arange(num_states, dtype=dtype)[:, None], len(lengths), axis=1)  # [S, V], tokens in `order`
    for i in range(lengths.max(initial=0)):
        longer = int((lengths > i).sum())
        states[:, :longer] = byte_next[states[:, :longer], flat[offsets[:longer] + i]]
    next_state = np.empty_like(states)
    next_state[:, order] = states
    return next_state
