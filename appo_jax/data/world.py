"""The embedded world: people, companies, towns and rivers, their documents, and questions over them.

It is small enough for a policy of a few million parameters to learn on two CPU cores, and whole enough to need both
tools: no question of several hops can be answered without searching, and its arithmetic is beyond a small net's head.
All of it follows from a seed. `generate` makes it; `World` is its TFDS builder.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds

from appo_jax.data.documents import Document
from appo_jax.errors import DataError
from appo_jax.types import Example, Kind

NUM_TRAIN, NUM_HELD_OUT = 3000, 300

# How many entities of each type.
POPULACE = {"person": 160, "town": 64, "company": 48, "river": 24}

# Each type's facts, as the one sentence of its document that states them: {0} the entity, {1} the value.
SENTENCES: dict[str, dict[str, str]] = {
    "person": {"town": "{0} was born in {1}.", "company": "{0} works for {1}."},
    "company": {"town": "{0} is based in {1}.", "leader": "{0} is led by {1}.", "year": "{0} was founded in {1}."},
    "town": {"river": "{0} lies on the {1}.", "population": "{0} has {1} inhabitants."},
    "river": {"length": "{0} is {1} miles long."},
}

# (share of all questions, path, wording). A path starts at an entity type and follows relations.
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
# (share, paths, expression, wording). {0}, {1} of an expression are what the paths lead to; the letters are numbers.
COMPUTE_QUESTIONS = (
    (0.14, (), "{a}*{b}+{c}", "What is {a} times {b} plus {c}?"),
    (0.14, (), "{a}*{b}-{c}", "What is {a} times {b} minus {c}?"),
    (0.08, (), "{a}*{b}*{c}", "What is {a} times {b} times {c}?"),
    (0.09, ("person.town.population",), "{0}*{k}", "What is the population of the town where {0} was born times {k}?"),
    (0.07, ("company.town.population",), "{0}*{k}", "What is the population of the town where {0} is based times {k}?"),
    (0.07, ("town.river.length",), "{0}*{k}", "What is the length of the river of {0} times {k}?"),
    (0.07, ("company.year", "company.year"), "{1}-{0}", "How many years after {0} was {1} founded?"),
    (0.07, ("town.population", "town.population"), "{0}+{1}", "How many inhabitants do {0} and {1} have together?"),
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a question is answered: entities to look up, relations to follow, then arithmetic on what was found."""

    paths: tuple[tuple[str, ...], ...]  # each (entity, relation, relation, ...)
    expression: str | None = None  # Python; {0}, {1} stand for what the paths lead to. None: the answer is a name

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        record = json.loads(text)
        return cls(tuple(map(tuple, record["paths"])), record["expression"])


@dataclasses.dataclass(frozen=True)
class Question:
    """A question of the world, with its answer and the way to it."""

    id: str
    text: str
    gold: str
    plan: Plan

    @property
    def kind(self) -> Kind:
        return "qa" if self.plan.expression is None else "math"

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
    for sentences in SENTENCES.values():
        if relation in sentences:
            pattern = re.escape(sentences[relation]).replace(r"\{0\}", re.escape(entity)).replace(r"\{1\}", r"(\w+)")
            if found := re.search(rf"\b{pattern}", text):
                return found[1]
    return None


def generate(seed: int) -> WorldData:
    """The whole world of a seed: the same questions, documents and order on every machine."""
    rng = np.random.default_rng(seed)
    names, facts = _entities(rng)
    documents = tuple(
        Document(name, " ".join(SENTENCES[kind][r].format(name, value) for r, value in facts[name].items()))
        for kind in POPULACE
        for name in names[kind]
    )
    total = NUM_TRAIN + NUM_HELD_OUT
    found: dict[Any, tuple[str, str, Plan]] = {}  # by what is asked, so that no two splits ask the same
    for share, path, wording in SEARCH_QUESTIONS:
        kind, *relations = path.split(".")
        for entity in rng.permutation(names[kind])[: round(share * total)].tolist():
            plan = Plan(((entity, *relations),))
            found[plan] = (wording.format(entity), _follow(facts, entity, relations), plan)
    shares = np.array([share for share, *_ in COMPUTE_QUESTIONS])
    while len(found) < total:
        _, *template = COMPUTE_QUESTIONS[rng.choice(len(shares), p=shares / shares.sum())]
        text, gold, plan = _compute_question(rng, names, facts, *template)
        found.setdefault((frozenset(plan.paths), plan.expression), (text, gold, plan))
    records = list(found.values())
    questions = [Question(f"world-{i}", *records[index]) for i, index in enumerate(rng.permutation(total))]
    return WorldData(tuple(questions[:NUM_TRAIN]), tuple(questions[NUM_TRAIN:]), documents)


def _entities(rng: np.random.Generator) -> tuple[dict[str, list[str]], Facts]:
    words = iter(_names(rng, sum(POPULACE.values())))
    names = {kind: [next(words) for _ in range(count)] for kind, count in POPULACE.items()}
    facts: Facts = {}

    def one_of(kind: str) -> str:
        return names[kind][rng.integers(len(names[kind]))]

    for name in names["person"]:
        facts[name] = {"town": one_of("town"), "company": one_of("company")}
    for name in names["company"]:
        year = str(rng.integers(1800, 2000))
        facts[name] = {"town": one_of("town"), "leader": one_of("person"), "year": year}
    for name in names["town"]:
        facts[name] = {"river": one_of("river"), "population": str(rng.integers(100, 1000))}
    for name in names["river"]:
        facts[name] = {"length": str(rng.integers(100, 1000))}
    return names, facts


def _names(rng: np.random.Generator, count: int) -> list[str]:
    """Distinct pronounceable words of two syllables: consonant, vowel, consonant, twice."""
    letters = ["bdfgklmnprstvz", "aeiou", "lmnrst", "bdfgkmpt", "aeiou", "klnrsx"]
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(str(rng.choice(list(choice))) for choice in letters).capitalize()] = None
    return list(found)


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
) -> tuple[str, str, Plan]:
    numbers = {letter: int(rng.integers(11, 100)) for letter in "abc"} | {"k": int(rng.integers(3, 10))}
    kinds = [path.split(".")[0] for path in paths]
    entities = rng.choice(names[kinds[0]], size=len(kinds), replace=False).tolist() if kinds else []
    values = [int(_follow(facts, e, path.split(".")[1:])) for e, path in zip(entities, paths, strict=True)]
    if expression == "{1}-{0}" and values[0] > values[1]:  # years after: the earlier one is named first
        entities, values = entities[::-1], values[::-1]
    plan = Plan(
        tuple((entity, *path.split(".")[1:]) for entity, path in zip(entities, paths, strict=True)),
        expression.format("{0}", "{1}", **numbers),
    )
    gold = _evaluate((plan.expression or "").format(*values))
    return wording.format(*entities, **numbers), str(gold), plan


def _evaluate(expression: str) -> int:
    """Value of a sum or difference of products of whole numbers."""
    terms = re.findall(r"([+-]?)([\d*]+)", expression)
    return sum(int(f"{sign}1") * math.prod(map(int, factors.split("*"))) for sign, factors in terms)


class WorldConfig(tfds.core.BuilderConfig):
    """One of the two tables of a world: its questions (splits train, held_out) or its documents (split documents)."""

    def __init__(self, table: str, seed: int):
        super().__init__(name=f"{table}_{seed}", description=f"{table} of the world of seed {seed}")
        self.table, self.seed = table, seed


class World(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of the embedded world."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # there are no checksums beside this file; looking for them needs a package TFDS does not declare

    def _info(self) -> tfds.core.DatasetInfo:
        columns = {"questions": ("id", "text", "gold", "plan"), "documents": ("title", "text")}
        features = {column: tfds.features.Text() for column in columns[self.builder_config.table]}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        world = generate(self.builder_config.seed)
        if self.builder_config.table == "documents":
            return {"documents": self._generate_examples(world.documents)}
        return {"train": self._generate_examples(world.train), "held_out": self._generate_examples(world.held_out)}

    def _generate_examples(self, items: Sequence[Question | Document]) -> Iterator[tuple[int, dict[str, str]]]:
        for index, item in enumerate(items):
            record = {field.name: getattr(item, field.name) for field in dataclasses.fields(item)}
            yield index, {k: v.to_json() if isinstance(v, Plan) else v for k, v in record.items()}


def load_world(folder: Path, seed: int) -> WorldData:
    """The world of a seed from its TFDS dataset in `folder`, which is made there first when it is missing.

    Raises DataError when the folder cannot be written or what it holds is incomplete."""

    def read(table: str, split: str) -> list[dict[str, str]]:
        builder = World(data_dir=str(folder), config=WorldConfig(table, seed), file_format="array_record")
        builder.download_and_prepare()
        source = builder.as_data_source(split=split)
        expected = builder.info.splits[split].num_examples
        if len(source) != expected:
            raise DataError(f"{folder}: split {split} holds {len(source)} of {expected} records; delete the folder")
        return [{k: v.decode() for k, v in record.items()} for record in grain.MapDataset.source(source)]

    def questions(split: str) -> tuple[Question, ...]:
        return tuple(Question(**(r | {"plan": Plan.from_json(r["plan"])})) for r in read("questions", split))

    return WorldData(
        questions("train"), questions("held_out"), tuple(Document(**r) for r in read("documents", "documents"))
    )
