"""The world with decisions: a script without mistakes answers every question, and mistakes are at the decisions."""

import re

import numpy as np
import pytest

from appo_jax.config import DataConfig, PythonToolConfig, SearchToolConfig, ToolsConfig
from appo_jax.data.demonstrations import ToolKit
from appo_jax.data.sources import decisions
from appo_jax.tools.build import build_executor

TOOLS = ToolsConfig(
    python=PythonToolConfig(isolation="process", preload=("math",), timeout=5.0), search=SearchToolConfig(top_k=1)
)


@pytest.fixture(scope="module")
def world():
    return decisions.make_world(0)


@pytest.fixture(scope="module")
def questions(world):
    return decisions.make_questions(world, 0)


@pytest.fixture(scope="module")
def kit(world):
    with build_executor(TOOLS, world.documents()) as executor:
        yield ToolKit(executor)


def answer(segments):
    return re.search(r"\\boxed\{ (\w+)\}", segments[-1].text)[1]


def write(question, world, kit, seed, errors):
    return decisions.Script(question, world, np.random.default_rng(seed), kit, errors=errors).write()


def test_a_script_without_wrong_turns_answers_every_question_with_at_most_seven_calls(world, questions, kit):
    calls = {}
    for i, question in enumerate(questions[:300]):
        segments = write(question, world, kit, i, errors=False)
        assert answer(segments) == question.gold(world)
        calls.setdefault(question.kind, set()).add(len(segments) // 2)
    assert max(calls["home-1"]) == 2  # a page, and its ledger
    assert max(calls["people-3"]) == 5  # three pages, a ledger, a town
    assert max(calls["people-1+1"]) == 7  # twice: a page, a ledger, a town; then python


def test_the_demonstrations_are_right_in_a_quarter_of_the_cases_and_seldom_on_long_chains(world, questions, kit):
    right = {}
    for i, question in enumerate(questions[:600]):
        hit = answer(write(question, world, kit, i, errors=True)) == question.gold(world)
        right.setdefault(question.kind, []).append(hit)
    assert 0.15 < np.mean(np.concatenate(list(right.values()))) < 0.35
    assert np.mean(right["home-1"]) > 0.5
    assert np.mean(right["people-1+1"]) < 0.1


def test_a_gold_follows_from_the_facts(world):
    name = next(iter(world.people))
    person = world.people[name]
    home = world.people[person.relations["friend"]].home
    one = decisions.Question(((name, "friend"),), number=False)
    two = decisions.Question(((name, "friend"), (name,)), number=True)
    assert one.text == f"What is the home of the friend of {name}?"
    assert one.gold(world) == home
    assert two.gold(world) == str(world.towns[home]["people"] + world.towns[person.home]["people"])
    assert (one.kind, two.kind) == ("home-2", "people-2+1")


def test_hearsay_is_mostly_wrong_and_what_is_no_hearsay_is_right(world):
    people = world.people.values()
    assert np.mean([p.hearsay for p in people]) == pytest.approx(decisions.HEARSAY, abs=0.12)
    assert all(p.stated_home == p.home for p in people if not p.hearsay)
    wrong = np.mean([p.stated_home != p.home for p in people if p.hearsay])
    assert wrong == pytest.approx(decisions.FALSE_HEARSAY, abs=0.12)


def test_decisions_are_readings_and_moves_in_thoughts_alone():
    text = "<think> Now teacher Rinbal. Next.</think><search> friend</search>\n<think> Hm, home Dun. Done.</think> home"
    found = [text[a:b] for a, b in decisions.decision_spans(text)]
    assert found == ["teacher", "Next", "home", "Done"]


def test_a_run_knows_the_decisions():
    """`appo-jax influence` asks the data source for them."""
    known = decisions.load(DataConfig(source="decisions")).decisions
    text = "<think> Well, rival Sansam. Check.</think>"
    assert [text[a:b] for a, b in known(text)] == ["rival", "Check"]


def test_every_turn_decides_and_most_tokens_do_not(world, questions, kit):
    """In the policy's text, fillers, names and tags are not decisions."""
    segments = write(questions[0], world, kit, 0, errors=False)
    for segment in segments:
        if segment.sampled:
            spans = decisions.decision_spans(segment.text)
            assert 1 <= len(spans) <= 2
            assert sum(b - a for a, b in spans) < len(segment.text) / 3


def test_the_source_is_the_same_for_the_same_seed_and_its_splits_share_nothing():
    first, again, other = (decisions.load(DataConfig(source="decisions", seed=seed)) for seed in (0, 0, 1))
    assert first.train == again.train
    assert first.train != other.train
    assert (len(first.train), len(first.held_out)) == (3000, 300)
    assert not {e.question for e in first.train} & {e.question for e in first.held_out}
    assert len({e.question for e in first.train}) == 3000
    assert not any(document.text in example.question for document in first.documents for example in first.held_out)
