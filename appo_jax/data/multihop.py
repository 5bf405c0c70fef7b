"""Questions over several Wikipedia paragraphs: the common part of HotpotQA, 2WikiMultihopQA and MuSiQue.

The paragraphs of all questions, each once, are the corpus of the search tool unless the config names another corpus.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from appo_jax.config import DataConfig
from appo_jax.data.demonstrations import CannotDemonstrate, ToolKit
from appo_jax.data.examples import Reader, split_files
from appo_jax.data.records import read_records
from appo_jax.data.source import Dataset
from appo_jax.types import Document, Example, Segment, Trace


class MultihopReader(Reader):
    """Also reads `id`, and `answers` or FlashRAG's `golden_answers`, if the fields of `columns` are missing or null."""

    def example(self, record: Any, path: Path, number: int) -> Example | None:
        columns = self.columns
        if isinstance(record, dict):
            golds = (name for name in (columns.golds, "answers", "golden_answers") if record.get(name) is not None)
            id = "id" if record.get(columns.id) is None else columns.id
            columns = dataclasses.replace(columns, golds=next(golds, columns.golds), id=id)
        return Reader(self.config, columns, self.kind, self.system).example(record, path, number)


def load_multihop(
    config: DataConfig,
    reader: Reader,
    paragraphs: Callable[[Any], Iterable[Document]],
    files: tuple[Sequence[str], Sequence[str]],
    what: str,
) -> Dataset:
    """Both splits, the paragraphs of all their records, and demonstrations.

    paragraphs: a function that returns the paragraphs of a record. files, what: see `split_files`. Raises DataError."""

    def read(path: Path) -> list[tuple[Example, list[Document]]]:
        def question(number: int, record: Any) -> tuple[Example, list[Document]] | None:
            example = reader.example(record, path, number)
            return None if example is None else (example, list(paragraphs(record)))

        return read_records(path, question, config.malformed, what)

    train, held_out = (read(path) for path in split_files(config, *files, what))
    documents = dict.fromkeys(page for _, pages in (*train, *held_out) for page in pages)

    def demonstration(index: int, kit: ToolKit) -> Trace:
        return demonstrate(*train[index], kit)

    return Dataset(
        [example for example, _ in train],
        [example for example, _ in held_out],
        tuple(documents) or None,
        demonstration,
        len(train) if documents else 0,
    )


def demonstrate(example: Example, paragraphs: Sequence[Document], kit: ToolKit) -> Trace:
    """A trace that looks up a paragraph named in the question, then one that holds the answer, and reads the answer there.

    For a question with yes or no, it looks up the first two named paragraphs. Raises CannotDemonstrate if the question names
    too few paragraphs (none; fewer than two for yes or no), or if the tool does not find them or the answer."""
    tool, gold = kit.tool_for("look_up"), example.golds[0]
    places = [(place.start(), page) for page in paragraphs if (place := _phrase(page.title).search(example.question))]
    named = [page for _, page in sorted(places, key=lambda pair: pair[0])]
    decided = gold.lower() in ("yes", "no")
    holding = [page for page in paragraphs if _sentence(page.text, gold) and page not in named]
    asked = named[:2] if decided or any(_sentence(page.text, gold) for page in named) else [*named[:1], *holding[:1]]
    if not named or (decided and len(asked) < 2):
        raise CannotDemonstrate("the question does not name what is to be looked up")
    segments: list[Segment] = []
    read: list[str] = []
    for page in asked:
        found = kit.run(tool, page.title)
        if " ".join(page.text.split())[:80] not in found:
            raise CannotDemonstrate("the tool does not find what is to be looked up")
        read.append(page.text)
        call = f"<think>I look up {page.title}.</think>{kit.write_call(tool, page.title)}"
        segments += [Segment(call, sampled=True), Segment(kit.write_result(found), sampled=False)]
    facts = [_first_sentence(text) for text in read] if decided else [_sentence(text, gold) for text in read]
    if not any(facts):
        raise CannotDemonstrate("what the tool finds does not hold the answer")
    thought = " ".join(fact for fact in facts if fact)
    answer = f"<think>{thought} So the answer is {gold}.</think><answer> \\boxed{{{gold}}} </answer>"
    return Trace(example, (*segments, Segment(answer, sampled=True)))


_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"])")


def _sentence(text: str, answer: str) -> str:
    """The first sentence that holds the answer as a whole phrase, ignoring case; "" if there is none."""
    phrase = _phrase(answer)
    return next((sentence.strip() for sentence in _END.split(text) if phrase.search(sentence)), "")


def _phrase(text: str) -> re.Pattern[str]:
    """Matches a text as whole words, ignoring case."""
    return re.compile(rf"(?<!\w){re.escape(text)}(?!\w)", re.IGNORECASE)


def _first_sentence(text: str) -> str:
    return _END.split(text.strip())[0]


def titled_paragraphs(record: Any) -> list[Document]:
    """The paragraphs in HotpotQA's `context`: [title, [sentence, …]] pairs, objects with title and text or sentences, or, as on
    Hugging Face, one object with the lists `title` and `sentences`, or the JSON text of pairs. Raises KeyError, TypeError or
    ValueError for another form."""
    context = record.get("context") or ()
    if isinstance(context, str):
        context = json.loads(context)
    if isinstance(context, dict):
        context = list(zip(context["title"], context["sentences"], strict=True))
    found = []
    for entry in context:
        if isinstance(entry, dict):
            title, text = entry["title"], entry["sentences"] if entry.get("text") is None else entry["text"]
        else:
            title, text = entry
        found.append(Document(title, _joined(text) if isinstance(text, list) else text))
    return found


def _joined(sentences: Sequence[str]) -> str:
    """The text of a paragraph. HotpotQA's sentences begin with the space before them, 2WikiMultihopQA's do not."""
    text = ""
    for sentence in filter(None, sentences):
        apart = not text or text[-1].isspace() or sentence[0].isspace()
        text += sentence if apart else " " + sentence
    return text
