"""A world with decisions: long chains of look-ups in which a few tokens decide and many do not matter.

People have a teacher, a friend, a rival and a home; towns have people and coins. The home on a person's page may be hearsay
("maybe"), and is then wrong in most cases; the person's ledger has the true home. Questions follow one or two relations to a
home or to the number of its people, or ask for a sum over two homes. This takes one to seven tool calls.

Every turn of a rollout is `<think> FILLER … WORD …</think>`. The filler is random and changes nothing. The words of DECISIONS
decide what the rollout does next. So the positions that have influence are known by construction (`decision_spans`). A page
names three people and a town two numbers, so a rollout can go on plausibly after a wrong decision.

The demonstrations make mistakes with the probabilities below. A policy that imitates them answers most questions wrongly with
greedy decoding, but can answer all of them. A script without mistakes (`errors=False`) answers every question correctly.
Everything depends on `data.seed` only.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from appo_jax.config import DataConfig
from appo_jax.data.demonstrations import ToolKit
from appo_jax.data.source import Dataset
from appo_jax.data.world import pronounceable_names
from appo_jax.types import Document, Example, Segment, Trace

NUM_HELD_OUT = 300
NUM_PEOPLE, NUM_TOWNS = 200, 48
PEOPLE_RELATIONS = ("teacher", "friend", "rival")
HEARSAY, FALSE_HEARSAY = 0.5, 0.8  # the share of homes on pages that are hearsay; the share of hearsay that is wrong
TRACES_PER_QUESTION = 2

# Kinds of questions: the number of people on each chain, whether the number of people in their homes is asked for, and how many
# questions there are. Of the first two kinds there are 200 and 600 in all.
KINDS = (
    ((1,), False, 200),
    ((2,), False, 550),
    ((3,), False, 800),
    ((3,), True, 800),
    ((1, 1), True, 950),
)

FILLERS = (" Well,", " So", " Now", " Hm,")
MOVES = ("Next", "Check", "Done", "Compute", "Stop")
READINGS = (*PEOPLE_RELATIONS, "home", "people", "coins")
DECISIONS = re.compile(rf"(?<= )(?:{'|'.join((*READINGS, *MOVES))})\b")

# Probabilities of the demonstrations' mistakes.
SKIP_RELATION = 0.55  # read the home of the first person instead of following the second relation
OTHER_RELATION = 0.15  # follow a relation that the question does not ask for
TRUST_HEARSAY = 0.60  # do not check a home that is hearsay
OTHER_NUMBER = 0.55  # read the coins of a town instead of its people
STOP_EARLY = 0.20  # answer with the home instead of the number of its people
STOP_AT_FIRST = 0.55  # answer with the first of two numbers instead of computing their sum


@dataclasses.dataclass(frozen=True)
class Person:
    """The facts on a person's page and in the person's ledger."""

    relations: dict[str, str]  # teacher, friend, rival -> name
    home: str  # the true home, which the ledger has
    stated_home: str  # the home that the page states
    hearsay: bool

    @property
    def page_home(self) -> str:
        return f"maybe {self.stated_home}" if self.hearsay else self.stated_home


@dataclasses.dataclass(frozen=True)
class World:
    people: dict[str, Person]
    towns: dict[str, dict[str, int]]  # name -> people, coins

    def documents(self) -> tuple[Document, ...]:
        pages = [
            Document(
                name, f"{name}: {', '.join(f'{r} {p.relations[r]}' for r in PEOPLE_RELATIONS)}, home {p.page_home}."
            )
            for name, p in self.people.items()
        ]
        # A page holds the name twice and a ledger once, in about as many words. So a search for the name alone finds the page.
        ledgers = [
            Document("ledger", f"sealed ledger entry: {name}, home {p.home}.") for name, p in self.people.items()
        ]
        towns = [Document(name, f"people {t['people']}, coins {t['coins']}.") for name, t in self.towns.items()]
        return (*pages, *ledgers, *towns)


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about the homes of one or two persons, each found by following relations from a named person."""

    chains: tuple[tuple[str, ...], ...]  # one or two of (name, relation …)
    number: bool  # True: it asks for the number of people of the homes; False: for the home

    @property
    def text(self) -> str:
        homes = []
        for name, *relations in self.chains:
            whose = name
            for relation in relations:
                whose = f"the {relation} of {whose}"
            homes.append(f"the home of {whose}")
        where = " and ".join(homes)
        return f"How many people are in {where}?" if self.number else f"What is {where}?"

    @property
    def kind(self) -> str:
        """What is asked for, and how many people each chain has: home-3, people-1+1."""
        return f"{'people' if self.number else 'home'}-{'+'.join(str(len(chain)) for chain in self.chains)}"

    def gold(self, world: World) -> str:
        homes = []
        for name, *relations in self.chains:
            person = name
            for relation in relations:
                person = world.people[person].relations[relation]
            homes.append(world.people[person].home)
        return str(sum(world.towns[home]["people"] for home in homes)) if self.number else homes[0]


def make_world(seed: int) -> World:
    """The world of a seed."""
    rng = np.random.default_rng([seed, 1])
    names = pronounceable_names(rng, NUM_PEOPLE + NUM_TOWNS)
    people, towns = names[:NUM_PEOPLE], names[NUM_PEOPLE:]

    def person(name: str) -> Person:
        others = [other for other in people if other != name]
        relations = dict(zip(PEOPLE_RELATIONS, rng.choice(others, 3, replace=False).tolist(), strict=True))
        home, wrong = rng.choice(towns, 2, replace=False).tolist()
        hearsay = bool(rng.random() < HEARSAY)
        stated_home = wrong if hearsay and rng.random() < FALSE_HEARSAY else home
        return Person(relations, home, stated_home, hearsay)

    def numbers() -> dict[str, int]:
        people_, coins = rng.choice(np.arange(11, 100), 2, replace=False).tolist()
        return {"people": people_, "coins": coins}

    return World({name: person(name) for name in people}, {name: numbers() for name in towns})


def make_questions(world: World, seed: int) -> list[Question]:
    """All questions, the training questions first; no two are equal."""
    rng = np.random.default_rng([seed, 2])
    names = list(world.people)

    def chain(length: int) -> tuple[str, ...]:
        return (str(rng.choice(names)), *rng.choice(PEOPLE_RELATIONS, length - 1).tolist())

    found: dict[Any, Question] = {}
    for lengths, number, count in KINDS:
        wanted = len(found) + count
        while len(found) < wanted:
            question = Question(tuple(map(chain, lengths)), number)
            if len({c[0] for c in question.chains}) == len(question.chains):
                found.setdefault((frozenset(question.chains), question.number), question)
    questions = list(found.values())
    return [questions[i] for i in rng.permutation(len(questions))]


def decision_spans(text: str) -> list[tuple[int, int]]:
    """The decisions in a text of the policy: `[start, end)` of every reading and every move in its thoughts."""
    thoughts = [(m.start(1), m.end(1)) for m in re.finditer(r"<think>(.*?)(?:</think>|\Z)", text, re.DOTALL)]
    return [(m.start(), m.end()) for a, b in thoughts for m in DECISIONS.finditer(text, a, b)]


class Script:
    """Writes the trace of one question with real tools. `errors` False: without mistakes."""

    def __init__(self, question: Question, world: World, rng: np.random.Generator, kit: ToolKit, errors: bool = True):
        self.question, self.world, self.rng, self.kit, self.errors = question, world, rng, kit, errors
        self.search = kit.tool_for("look_up")
        self.compute = kit.tool_for("compute") if len(question.chains) > 1 else ""
        self.text, self.segments = "", list[Segment]()

    def write(self) -> tuple[Segment, ...]:
        results = [self._follow(list(chain)) for chain in self.question.chains]
        if len(results) == 1:
            answer = results[0]
        elif self._wrong(STOP_AT_FIRST):
            self.text += " Stop.</think>"
            answer = results[0]
        else:
            self.text += " Compute.</think>"
            answer = self._call(self.compute, "+".join(results))
            self._think()
            self.text += " Done.</think>"
        if len(results) == 1:
            self.text += " Done.</think>"
        self.text += f"<answer>\\boxed{{ {answer}}}</answer>"
        return (*self.segments, Segment(self.text, sampled=True))

    def _follow(self, chain: list[str]) -> str:
        """Follow one chain to a home or to the number of its people."""
        name, relations = chain[0], chain[1:]
        page = self._look_up(name)
        for made, relation in enumerate(relations):
            if made and self._wrong(SKIP_RELATION):
                break
            if self._wrong(OTHER_RELATION):
                relation = str(self.rng.choice([r for r in PEOPLE_RELATIONS if r != relation]))
            name = self._read(relation, page)
            page = self._look_up(name)
        home = self._read("home", page)
        if "maybe" in page and not self._wrong(TRUST_HEARSAY):
            self.text += " Check.</think>"
            home = self._read("home", self._open(f" ledger of {name}"))
        if not self.question.number or (len(self.question.chains) == 1 and self._wrong(STOP_EARLY)):
            return home
        page = self._look_up(home)
        return self._read("coins" if self._wrong(OTHER_NUMBER) else "people", page)

    def _look_up(self, name: str) -> str:
        if self.segments or self.text:
            self.text += " Next.</think>"
        else:
            self._think()
            self.text += " Next.</think>"
        return self._open(f" {name}")

    def _open(self, query: str) -> str:
        page = self._call(self.search, query)
        self._think()
        return page

    def _read(self, what: str, page: str) -> str:
        """Read a fact from a page."""
        found = re.search(rf"\b{what} (?:maybe )?(\w+)", page)
        value = found[1] if found else "nothing"
        self.text += f" {what} {value}."
        return value

    def _think(self) -> None:
        self.text += "<think>" + FILLERS[self.rng.integers(len(FILLERS))]

    def _call(self, tool: str, argument: str) -> str:
        self.text += self.kit.write_call(tool, argument)
        result = self.kit.run(tool, argument.strip())
        self.segments += [Segment(self.text, sampled=True), Segment(self.kit.write_result(result), sampled=False)]
        self.text = ""
        return result

    def _wrong(self, probability: float) -> bool:
        return bool(self.rng.random() < probability) and self.errors


def load(config: DataConfig) -> Dataset:
    """The world of `data.seed`. It is made again each time, which takes a second."""
    world = make_world(config.seed)
    questions = make_questions(world, config.seed)
    system = config.system_prompt or ""

    def examples(some: Sequence[Question], split: str) -> tuple[Example, ...]:
        return tuple(
            Example(f"decisions-{q.kind}-{split}-{i}", q.text, (q.gold(world),), "math" if q.number else "qa", system)
            for i, q in enumerate(some)
        )

    train, held_out = questions[:-NUM_HELD_OUT], questions[-NUM_HELD_OUT:]
    train_examples = examples(train, "train")

    def demonstration(index: int, kit: ToolKit) -> Trace:
        at = index % len(train)
        script = Script(train[at], world, np.random.default_rng([config.seed, 3, index]), kit)
        return Trace(train_examples[at], script.write())

    return Dataset(
        train_examples,
        examples(held_out, "held-out"),
        world.documents(),
        demonstration,
        TRACES_PER_QUESTION * len(train),
        decisions=decision_spans,
    )
