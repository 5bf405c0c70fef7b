"""Finds training questions that repeat other training questions or evaluation questions."""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from appo_jax.types import Example

if TYPE_CHECKING:
    import datasketch

logger = logging.getLogger(__name__)

SIMILARITY = 0.8  # the smallest Jaccard similarity of the word triples of near duplicates
NUM_PERMUTATIONS = 128
_EXPONENT = re.compile("[⁰¹²³⁴-⁹]+")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


@dataclasses.dataclass(frozen=True)
class Repetitions:
    """Pairs (index of a training question, id of the question that it repeats)."""

    # Equal to an earlier training question except for case, spaces and punctuation outside numbers.
    duplicates: list[tuple[int, str]]
    near_duplicates: list[tuple[int, str]]  # similar to an earlier training question, and not a duplicate
    overlaps: list[tuple[int, str]]  # equal or similar to an evaluation question

    def indices(self, kinds: Iterable[str]) -> set[int]:
        """The training questions of these kinds."""
        return {index for kind in kinds for index, _ in getattr(self, kind)}


def find_repetitions(train: Sequence[Example], evaluation: Sequence[Example]) -> Repetitions:
    """All repetitions in `train`.

    Questions are near duplicates if the Jaccard similarity of their word triples is at least SIMILARITY and they hold the same
    numbers in the same order: a word problem with other numbers is another problem."""
    questions = [_Question.of(example.question) for example in train]
    found = Repetitions([], [], _overlaps(questions, evaluation))
    seen = _Index()
    for index, (example, question) in enumerate(zip(train, questions, strict=True)):
        if (other := seen.exact(question)) is not None:
            found.duplicates.append((index, other))
            continue
        if (other := seen.near(question)) is not None:
            found.near_duplicates.append((index, other))
        seen.add(example, question)
    return found


def find_overlaps(train: Sequence[Example], evaluation: Sequence[Example]) -> list[tuple[int, str]]:
    """`Repetitions.overlaps` alone."""
    return _overlaps([_Question.of(example.question) for example in train], evaluation)


def _overlaps(questions: Sequence[_Question], evaluation: Sequence[Example]) -> list[tuple[int, str]]:
    evaluated = _Index()
    for example in evaluation:
        evaluated.add(example, _Question.of(example.question))
    others = (
        (index, evaluated.exact(question) or evaluated.near(question)) for index, question in enumerate(questions)
    )
    return [(index, other) for index, other in others if other is not None]


def drop_repetitions(train: Sequence[Example], evaluation: Sequence[Example], kinds: Sequence[str]) -> list[Example]:
    """The training questions without those of the given kinds (fields of `Repetitions`); logs how many are left out."""
    found = find_repetitions(train, evaluation)
    gone = found.indices(kinds)
    counts = ", ".join(f"{len(getattr(found, kind))} {kind.replace('_', ' ')}" for kind in kinds)
    logger.warning("%d of %d training questions are left out: %s", len(gone), len(train), counts)
    return [example for index, example in enumerate(train) if index not in gone]


@functools.cache
def _empty_sketch() -> datasketch.MinHash:
    from datasketch import MinHash  # not above, because it loads SciPy, which takes half a second, and few runs need it

    return MinHash(num_perm=NUM_PERMUTATIONS)


@dataclasses.dataclass(frozen=True)
class _Question:
    key: str  # equal for exact duplicates
    shingles: frozenset[str]
    numbers: tuple[str, ...]
    sketch: datasketch.MinHash  # of the shingles

    @classmethod
    def of(cls, text: str) -> _Question:
        text = _EXPONENT.sub(lambda digits: "^" + digits[0], text)  # NFKC would write 2² as 22
        folded = _THOUSANDS.sub("", unicodedata.normalize("NFKC", text).casefold())
        words = re.findall(r"\w+|[-+*/^=<>!]", folded)
        numbers = tuple(re.findall(r"\d+", folded))
        # The key keeps symbols, because 2+3 is not 2-3, nor 5! + 2 what 5 + 2 is. It leaves out full stops, quotation marks and
        # the like. It keeps where numbers end, because 1.5 and 1:5 are not 15.
        key = " ".join([re.sub(r"[\s.,;:?'\"“”‘’`]+", "", folded), *numbers])
        triples = (" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2)))
        shingles = frozenset(triples)
        sketch = _empty_sketch().copy()
        sketch.update_batch([shingle.encode() for shingle in sorted(shingles)])
        return cls(key, shingles, numbers, sketch)


class _Index:
    """An index of questions, in which equal and similar ones are found."""

    def __init__(self) -> None:
        self._keys: dict[str, str] = {}
        self._questions: dict[str, _Question] = {}
        from datasketch import MinHashLSH

        self._lsh = MinHashLSH(threshold=SIMILARITY - 0.2, num_perm=NUM_PERMUTATIONS)

    def add(self, example: Example, question: _Question) -> None:
        if question.key in self._keys:
            return
        name = f"{len(self._questions)} {example.id}"  # ids of several sets may coincide
        self._keys[question.key] = example.id
        self._questions[name] = question
        self._lsh.insert(name, question.sketch)

    def exact(self, question: _Question) -> str | None:
        """The id of an equal question, or None."""
        return self._keys.get(question.key)

    def near(self, question: _Question) -> str | None:
        """The id of the first near duplicate, or None."""
        for name in sorted(self._lsh.query(question.sketch), key=lambda name: int(name.split(" ", 1)[0])):
            other = self._questions[name]
            union = len(question.shingles | other.shingles)
            if question.numbers == other.numbers and len(question.shingles & other.shingles) >= SIMILARITY * union:
                return name.split(" ", 1)[1]
        return None
