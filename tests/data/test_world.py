"""The world's answers against answers that are computed again from the plain text of its documents."""

import re
import shutil
from collections import Counter

import pytest

from appo_jax.config import DataConfig
from appo_jax.data.source import load_dataset
from appo_jax.data.world import NUM_HELD_OUT, NUM_TRAIN, Solution, generate, load_world, read_fact
from appo_jax.errors import DataError


@pytest.fixture(scope="module")
def world():
    return generate(0)


def facts_of(document):
    """Relation -> value, from the document's words only."""
    patterns = {
        "town": r"(?:was born|is based) in (\w+)",
        "company": r"works for (\w+)",
        "leader": r"led by (\w+)",
        "river": r"lies on (\w+)",
        "population": r"has (\d+) inhabitants",
        "length": r"is (\d+) miles",
    }
    return {
        relation: found[1] for relation, pattern in patterns.items() if (found := re.search(pattern, document.text))
    }


# Every wording of the world, taken apart by hand: how a reader without the solution would go about it.
READINGS = [
    (r"In which town was (\w+) born\?", ["town"]),
    (r"For which company does (\w+) work\?", ["company"]),
    (r"Who leads (\w+)\?", ["leader"]),
    (r"On which river does (\w+) lie\?", ["river"]),
    (r"On which river lies the town where (\w+) (?:was born|is based)\?", ["town", "river"]),
    (r"In which town is the company based that (\w+) works for\?", ["company", "town"]),
    (r"Who leads the company that (\w+) works for\?", ["company", "leader"]),
    (r"In which town was the leader of (\w+) born\?", ["leader", "town"]),
    (r"On which river lies the town of the company that (\w+) works for\?", ["company", "town", "river"]),
    (r"In which town was the leader of the company born that (\w+) works for\?", ["company", "leader", "town"]),
    (r"What is the population of the town where (\w+) (?:was born|is based) times (\d)\?", ["town", "population"]),
    (r"What is the length of the river of (\w+) times (\d)\?", ["river", "length"]),
]


def solve(question, facts):
    if found := re.fullmatch(r"What is (\d+) times (\d+) (plus|minus|times) (\d+)\?", question):
        a, b, c = int(found[1]), int(found[2]), int(found[4])
        return str({"plus": a * b + c, "minus": a * b - c, "times": a * b * c}[found[3]])
    if found := re.fullmatch(r"How many more inhabitants has (\w+) than (\w+)\?", question):
        return str(int(facts[found[1]]["population"]) - int(facts[found[2]]["population"]))
    if found := re.fullmatch(r"How many inhabitants do (\w+) and (\w+) have together\?", question):
        return str(int(facts[found[1]]["population"]) + int(facts[found[2]]["population"]))
    for pattern, relations in READINGS:
        if found := re.fullmatch(pattern, question):
            value = found[1]
            for relation in relations:
                value = facts[value][relation]
            return str(int(value) * int(found[2])) if found.lastindex == 2 else value
    raise AssertionError(f"no reading of {question!r}")


def test_answers_follow_from_the_documents(world):
    facts = {document.title: facts_of(document) for document in world.documents}
    for question in (*world.train, *world.held_out):
        assert question.gold == solve(question.text, facts), question


def test_splits_share_no_question_and_no_plan(world):
    assert (len(world.train), len(world.held_out)) == (NUM_TRAIN, NUM_HELD_OUT)
    every = (*world.train, *world.held_out)
    assert len({question.text for question in every}) == len({question.id for question in every}) == len(every)
    assert len({(frozenset(q.solution.paths), q.solution.expression) for q in every}) == len(every)


def test_every_sort_of_question_is_in_both_splits(world):
    def sort(question):
        tools = ("search" if question.solution.paths else "", "python" if question.solution.expression else "")
        return question.kind, tools, tuple(path[1:] for path in question.solution.paths)

    train, held_out = Counter(map(sort, world.train)), Counter(map(sort, world.held_out))
    assert train.keys() == held_out.keys()
    both = sum(count for (_, tools, _), count in train.items() if tools == ("search", "python"))
    assert both > NUM_TRAIN / 4


def test_documents_are_short_and_unique(world):
    titles = [document.title for document in world.documents]
    assert len(set(titles)) == len(titles)
    assert all(document.text.startswith(f"{document.title} ") for document in world.documents)
    assert max(len(document.text.split()) for document in world.documents) < 15


def test_a_seed_is_a_world(world):
    assert generate(0) == world
    other = generate(1)
    assert {document.text for document in other.documents}.isdisjoint(document.text for document in world.documents)


def test_tfds_keeps_every_record_in_order(world, tmp_path):
    assert load_world(tmp_path, 0) == world  # made
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert load_world(tmp_path, 0) == world  # read again
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}


def test_damaged_dataset_is_named_and_can_be_made_again(world, tmp_path):
    load_world(tmp_path, 0)
    (record_file,) = tmp_path.rglob("*held_out*array_record*")
    record_file.write_bytes(record_file.read_bytes()[:-100])
    with pytest.raises(DataError, match=rf"{re.escape(str(tmp_path))}.*delete that folder"):
        load_world(tmp_path, 0)
    shutil.rmtree(tmp_path / "seed_0")
    assert load_world(tmp_path, 0) == world


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"data\.path"):
        load_world(tmp_path / "file", 0)


def test_dataset_of_the_world(world, tmp_path):
    dataset = load_dataset(DataConfig(path=str(tmp_path), system_prompt="Be brief."))
    assert [example.question for example in dataset.train] == [question.text for question in world.train]
    assert {example.system for example in dataset.held_out} == {"Be brief."}
    assert {example.kind for example in dataset.train} == {"qa", "math"}
    assert dataset.documents == world.documents


def test_read_fact_reads_the_named_entity_only():
    text = (
        "Page 1: Tommis. Tommis lies on Motfus and has 496 inhabitants.\n"
        "Page 2: Kisves. Kisves lies on Vatfus and has 232 inhabitants."
    )
    assert read_fact("population", "Kisves", text) == "232"
    assert read_fact("river", "Tommis", text) == "Motfus"
    assert read_fact("town", "Tommis", text) is None
    assert read_fact("river", "mis", text) is None


def test_plan_survives_json():
    solution = Solution((("Tommis", "population"), ("Kisves", "population")), "{0}-{1}")
    assert Solution.from_json(solution.to_json()) == solution
