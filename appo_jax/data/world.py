"""The embedded world: people, companies, towns and rivers, their documents, and questions over them.

A policy of a few million parameters can learn it on two CPU cores, but needs both tools: questions of several hops cannot be
answered without searching, and the arithmetic is too hard for a small network without Python. The world depends on a seed only.
`generate` makes it; `World` is its TFDS builder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from appo_jax.errors import DataError
from appo_jax.types import Document, Example, Kind

NUM_TRAIN, NUM_HELD_OUT = 3000, 300

# The number of entities of each type.
POPULACE = {"person": 160, "town": 64, "company": 48, "river": 24}

# The text of each type's documents. {name} is the entity, and every other field is one of its relations.
DESCRIPTIONS = {
    "person": "{name} was born in {town} and works for {company}.",
    "company": "{name} is based in {town} and led by {leader}.",
    "town": "{name} lies on {river} and has {population} inhabitants.",
    "river": "{name} is {length} miles long.",
}

# (share of all questions, path, wording). A path begins at an entity type and follows relations.
SEARCH_QUESTIONS = (
    (0.02, "person.town", "In which town was {0} born?"),
    (0.02, "person.company", "For which company does {0} work?"),
    (0.01, "company.leader", "Who leads {0}?"),
    (0.02, "town.river", "On which river does {0} lie?"),
    (0.04, "person.town.river", "On which river lies the town where {0} was born?"),
    (0.04, "person.company.town", "In which town is the company based that {0} works for?"),
    (0.04, "person.company.leader", "Who leads the company that {0} works for?"),
    (0.013, "company.town.river", "On which river lies the town where {0} is based?"),
    (0.013, "company.leader.town", "In which town was the leader of {0} born?"),
    (0.03, "person.company.town.river", "On which river lies the town of the company that {0} works for?"),
    (0.02, "person.company.leader.town", "In which town was the leader of the company born that {0} works for?"),
)
# (share, paths, expression, wording). {0} and {1} in an expression are the values at the ends of the paths; letters are numbers.
COMPUTE_QUESTIONS = (
    (0.14, (), "{a}*{b}+{c}", "What is {a} times {b} plus {c}?"),
    (0.14, (), "{a}*{b}-{c}", "What is {a} times {b} minus {c}?"),
    (0.08, (), "{a}*{b}*{c}", "What is {a} times {b} times {c}?"),
    (0.09, ("person.town.population",), "{0}*{k}", "What is the population of the town where {0} was born times {k}?"),
    (0.07, ("company.town.population",), "{0}*{k}", "What is the population of the town where {0} is based times {k}?"),
    (0.07, ("town.river.length",), "{0}*{k}", "What is the length of the river of {0} times {k}?"),
    (0.07, ("town.population", "town.population"), "{0}-{1}", "How many more inhabitants has {0} than {1}?"),
    (0.07, ("town.population", "town.population"), "{0}+{1}", "How many inhabitants do {0} and {1} have together?"),
)


@dataclasses.dataclass(frozen=True)
class Solution:
    """The solution of a question: entities to look up, relations to follow, then arithmetic on the values."""

    paths: tuple[tuple[str, ...], ...]  # each (entity, relation, relation, ...)
    expression: str | None = (
        None  # Python; {0} and {1} are the values at the ends of the paths. None: the answer is a name
    )

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Solution:
        record = json.loads(text)
        return cls(tuple(map(tuple, record["paths"])), record["expression"])


@dataclasses.dataclass(frozen=True)
class Question:
    """A question of the world, with its answer and its solution."""

    id: str
    text: str
    gold: str
    solution: Solution

    @property
    def kind(self) -> Kind:
        return "qa" if self.solution.expression is None else "math"

    def example(self, system: str) -> Example:
        return Example(self.id, self.text, (self.gold,), self.kind, system)


@dataclasses.dataclass(frozen=True)
class WorldData:
    train: tuple[Question, ...]
    held_out: tuple[Question, ...]
    documents: tuple[Document, ...]  # one per entity, titled with its name


Facts = dict[str, dict[str, str]]  # entity -> relation -> value


def read_fact(relation: str, entity: str, text: str) -> str | None:
    """The value that `text` states for the entity's relation, or None."""
    for description in DESCRIPTIONS.values():
        if f"{{{relation}}}" in description:
            pattern = r"\b" + description.replace("{name}", re.escape(entity)).replace(".", r"\.")
            if found := re.search(re.sub(r"{(\w+)}", r"(?P<\1>\\w+)", pattern), text):
                return found[relation]
    return None


def generate(seed: int) -> WorldData:
    """The world of a seed: the same questions and documents in the same order on every machine."""
    rng = np.random.default_rng(seed)
    names, facts = _entities(rng)
    documents = tuple(
        Document(name, DESCRIPTIONS[kind].format(name=name, **facts[name])) for kind in POPULACE for name in names[kind]
    )
    total = NUM_TRAIN + NUM_HELD_OUT
    found: dict[Any, tuple[str, str, Solution]] = {}  # by the solution, so that no question comes twice
    for share, path, wording in SEARCH_QUESTIONS:
        kind, *relations = path.split(".")
        for entity in rng.permutation(names[kind])[: round(share * total)].tolist():
            solution = Solution(((entity, *relations),))
            found[solution] = (wording.format(entity), _follow(facts, entity, relations), solution)
    shares = np.array([share for share, *_ in COMPUTE_QUESTIONS])
    while len(found) < total:
        _, paths, expression, wording = COMPUTE_QUESTIONS[rng.choice(len(shares), p=shares / shares.sum())]
        text, gold, solution = _compute_question(rng, names, facts, paths, expression, wording)
        found.setdefault((frozenset(solution.paths), solution.expression), (text, gold, solution))
    records = list(found.values())
    questions = [Question(f"world-{i}", *records[index]) for i, index in enumerate(rng.permutation(total))]
    return WorldData(tuple(questions[:NUM_TRAIN]), tuple(questions[NUM_TRAIN:]), documents)


def _entities(rng: np.random.Generator) -> tuple[dict[str, list[str]], Facts]:
    words = iter(pronounceable_names(rng, sum(POPULACE.values())))
    names = {kind: [next(words) for _ in range(count)] for kind, count in POPULACE.items()}
    facts: Facts = {}

    def any_name(kind: str) -> str:
        return names[kind][rng.integers(len(names[kind]))]

    for name in names["person"]:
        facts[name] = {"town": any_name("town"), "company": any_name("company")}
    for name in names["company"]:
        facts[name] = {"town": any_name("town"), "leader": any_name("person")}
    for name in names["town"]:
        facts[name] = {"river": any_name("river"), "population": str(rng.integers(11, 100))}
    for name in names["river"]:
        facts[name] = {"length": str(rng.integers(11, 100))}
    return names, facts


def pronounceable_names(rng: np.random.Generator, count: int) -> list[str]:
    """Distinct pronounceable words of two syllables, so that a small vocabulary can hold each as one token."""
    syllables = ["".join(letters) for letters in itertools.product("bdfgklmnprstvz", "aeiou", "lmnrst")]
    first, second = rng.permutation(syllables)[:40].reshape(2, 20)
    names = [f"{a}{b}".capitalize() for a in first for b in second]
    return rng.permutation(names)[:count].tolist()


def _follow(facts: Facts, entity: str, relations: list[str]) -> str:
    for relation in relations:
        entity = facts[entity][relation]
    return entity


def _compute_question(
    rng: np.random.Generator,
    names: dict[str, list[str]],
    facts: Facts,
    paths: tuple[str, ...],
    expression: str,
    wording: str,
) -> tuple[str, str, Solution]:
    numbers = {letter: int(rng.integers(11, 100)) for letter in "abc"} | {"k": int(rng.integers(3, 10))}
    kinds = [path.split(".")[0] for path in paths]
    entities = rng.choice(names[kinds[0]], size=len(kinds), replace=False).tolist() if kinds else []
    values = [int(_follow(facts, e, path.split(".")[1:])) for e, path in zip(entities, paths, strict=True)]
    if "-{1}" in expression and values[0] < values[1]:  # the entity with the greater value comes first
        entities, values = entities[::-1], values[::-1]
    solution = Solution(
        tuple((entity, *path.split(".")[1:]) for entity, path in zip(entities, paths, strict=True)),
        expression.format("{0}", "{1}", **numbers),
    )
    gold = _evaluate((solution.expression or "").format(*values))
    return wording.format(*entities, **numbers), str(gold), solution


def _evaluate(expression: str) -> int:
    """The value of a sum or difference of products of integers."""
    terms = re.findall(r"([+-]?)([\d*]+)", expression)
    return sum(int(f"{sign}1") * math.prod(map(int, factors.split("*"))) for sign, factors in terms)


class World(tfds.core.GeneratorBasedBuilder):  # type: ignore[misc]  # tfds has no types
    """TFDS builder of a seed's world: splits train, held_out and documents (`id` is the title; gold and solution are empty)."""

    VERSION = tfds.core.Version("1.4.0")  # raise it whenever the output of `generate` or the features change
    code_path = (
        None  # TFDS must not look for checksums next to this file: that needs a package that it does not declare
    )

    def __init__(self, folder: Path, seed: int):
        self.seed = seed
        super().__init__(data_dir=str(folder / f"seed_{seed}"), file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {name: tfds.features.Text() for name in ("id", "text", "gold", "solution")}
        )
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        world = generate(self.seed)
        documents = [Question(document.title, document.text, "", Solution(())) for document in world.documents]
        splits = {"train": world.train, "held_out": world.held_out, "documents": documents}
        return {split: self._generate_examples(rows) for split, rows in splits.items()}

    def _generate_examples(self, rows: Sequence[Question]) -> Iterator[tuple[int, dict[str, str]]]:
        for index, row in enumerate(rows):
            yield index, {"id": row.id, "text": row.text, "gold": row.gold, "solution": row.solution.to_json()}


def load_world(folder: Path, seed: int) -> WorldData:
    """The world of a seed from its TFDS dataset in `folder`, which is made first if it is missing.

    Raises DataError if the folder cannot be written, or if the dataset cannot be read completely."""
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints progress
            builder = World(folder, seed)
            builder.download_and_prepare()
        rows = {split: _read(builder, split) for split in ("train", "held_out", "documents")}
    except Exception as error:  # TFDS and array_record may raise anything
        raise DataError(
            f"{folder / f'seed_{seed}'}: the world cannot be made or read there ({type(error).__name__}: {error}); "
            "delete that folder, or set data.path to a folder that can be written"
        ) from error
    documents = tuple(Document(row.id, row.text) for row in rows["documents"])
    return WorldData(tuple(rows["train"]), tuple(rows["held_out"]), documents)


def _read(builder: World, split: str) -> list[Question]:
    source = builder.as_data_source(split=split)
    expected = builder.info.splits[split].num_examples
    # A grain iterator, which reads ahead in threads, takes six times as long.
    records = [{k: v.decode() for k, v in source[i].items()} for i in range(len(source))]
    if len(records) != expected:
        raise ValueError(f"split {split} holds {len(records)} of {expected} records")
    return [Question(r["id"], r["text"], r["gold"], Solution.from_json(r["solution"])) for r in records]
