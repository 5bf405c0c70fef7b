"""Scripted demonstrations of the embedded world, which make mistakes on purpose.

They work with any tools that look things up and compute. The script reads the tools' real results, as a policy would, and
makes mistakes with the probabilities below. A policy that imitates it answers about half of the questions wrongly with greedy
decoding, but answers nearly every question correctly in 15 to 40 of 100 samples. So reinforcement learning can improve it. Each
choice between right and wrong is one token of the text ("Next" or "Done", "use" or "guess"), where a branch is worth most.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from appo_jax.data.demonstrations import ToolKit
from appo_jax.data.world import Question, WorldData, read_fact
from appo_jax.types import Segment, Trace

TRACES_PER_QUESTION = 2

# Questions for a name: answer with the name found so far instead of following the path further. Keys: (hops made, all hops).
GIVE_UP = {(1, 2): 0.60, (1, 3): 0.22, (2, 3): 0.56}
# Questions for a name, paths of one hop: follow one relation too many.
OVERSHOOT = 0.15
# Arithmetic without documents: guess a number instead of calling python; call it without the last term.
MENTAL, DROP_TERM = 0.56, 0.12
# Arithmetic on documents: guess a number after the first of two look-ups; guess after the last look-up; answer with the number
# that was read last; subtract in the wrong order.
GUESS_EARLY, GUESS_LATE, UNFINISHED, REVERSED = 0.15, 0.30, 0.14, 0.15
# All questions: look up a wrong entity; do not close a call, and answer with a guess (a malformed call).
WRONG_ENTITY, OPEN_CALL = 0.03, 0.01

# The relation that a script with OVERSHOOT follows from the value of a relation.
_ONWARD = {"town": "river", "company": "town", "leader": "town", "river": "length"}


class WorldScript:
    """`TRACES_PER_QUESTION` demonstrations of every question of a world's training split."""

    def __init__(self, world: WorldData, system: str, seed: int):
        self.questions, self.system, self.seed = world.train, system, seed
        self.names = [document.title for document in world.documents]  # for look-ups of a wrong entity

    def __len__(self) -> int:
        return TRACES_PER_QUESTION * len(self.questions)

    def demonstration(self, index: int, kit: ToolKit) -> Trace:
        """The same trace for the same seed and tools. Raises CannotDemonstrate if a tool that it needs is missing."""
        question = self.questions[index % len(self.questions)]
        script = _Script(question, self.names, np.random.default_rng([self.seed, index]), kit)
        return Trace(question.example(self.system), script.write())


class _Script:
    """Writes one trace. `text` is what the policy has written since the last tool result."""

    def __init__(self, question: Question, names: Sequence[str], rng: np.random.Generator, kit: ToolKit):
        self.question, self.names, self.rng, self.kit = question, names, rng, kit
        # A script that guesses needs the tools too: without them, questions of this type are left out.
        self.search = kit.tool_for("look_up") if question.solution.paths else ""
        self.compute = kit.tool_for("compute") if question.solution.expression is not None else ""
        self.text = "<think>"
        self.segments: list[Segment] = []

    def write(self) -> tuple[Segment, ...]:
        answer = self.find_name() if self.question.solution.expression is None else self.find_number()
        # With the space before it, a name is the same single token here as everywhere else.
        self.text += f"<answer>\\boxed{{ {answer or self.guess()}}}</answer>"
        return (*self.segments, Segment(self.text, sampled=True))

    def find_name(self) -> str | None:
        """Follow the path to the name at its end. None: answer with a guess."""
        ((entity, *relations),) = self.question.solution.paths
        hops = len(relations)
        if hops == 1 and self.chance(OVERSHOOT):
            relations.append(_ONWARD[relations[-1]])
        for made, relation in enumerate(relations, start=1):
            value = self.look_up(relation, entity)
            if value is None:
                return None
            entity = value
            if made < hops and self.chance(GIVE_UP[made, hops]):
                break
        self.text += " Done.</think>"
        return entity

    def find_number(self) -> str | None:
        """Look up the numbers, if any, then compute. None: answer with a guess."""
        paths, expression = self.question.solution.paths, self.question.solution.expression
        assert expression is not None
        found = [path[0] for path in paths]
        steps = [(number, relation) for number, path in enumerate(paths) for relation in path[1:]]
        for made, (number, relation) in enumerate(steps, start=1):
            value = self.look_up(relation, found[number])
            if value is None:
                return None
            found[number] = value
            if made < len(steps) and self.chance(GUESS_EARLY):
                self.text += " I guess.</think>"
                return None
        turn = self.rng.random()
        if turn < (GUESS_LATE if paths else MENTAL):
            self.text += " I guess.</think>"
            return None
        if paths and turn < GUESS_LATE + UNFINISHED:
            self.text += " Done.</think>"
            return found[-1]
        if not paths and self.chance(DROP_TERM):
            expression = expression[: max(expression.rfind(sign) for sign in "+-*")]
        if "-{1}" in expression and self.chance(REVERSED):
            found.reverse()
        self.text += f" I use {self.compute}.</think>"
        return self.call(self.compute, expression.format(*found))

    def look_up(self, relation: str, entity: str) -> str | None:
        """Search an entity's document and read a fact from it. None: the call was not closed, or the fact was not found."""
        self.text += f" {'Next' if self.segments else 'I need'} the {relation} of {entity}.</think>"
        if self.chance(WRONG_ENTITY):
            entity = self.any_of(self.names)
        result = self.call(self.search, f" {entity}")
        if result is None:
            return None
        value = read_fact(relation, entity, result)
        self.text += "<think>" + (f" The {relation} is {value}." if value else " I guess.</think>")
        return value

    def call(self, tool: str, argument: str) -> str | None:
        """Call a tool and return its result. None: the call was not closed."""
        left_open = self.chance(OPEN_CALL)
        self.text += self.kit.write_call(tool, argument, closed=not left_open)
        if left_open:
            return None
        result = self.kit.run(tool, argument.strip())
        self.segments += [Segment(self.text, sampled=True), Segment(self.kit.write_result(result), sampled=False)]
        self.text = ""
        return result

    def guess(self) -> str:
        """A plausible wrong answer."""
        gold = self.question.gold
        if self.question.kind == "qa":
            return self.any_of([name for name in self.names if name != gold])
        offset = int(self.rng.integers(1, max(10, int(gold) // 5)))
        return str(int(gold) + (offset if self.chance(0.5) else -offset))

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def any_of(self, names: Sequence[str]) -> str:
        return names[int(self.rng.integers(len(names)))]
