"""Search: ranking against BM25 computed from its definition, corpus files, and the stored index."""

import json
import math
import os
import string
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appo_jax import heartbeat
from appo_jax.config import SearchToolConfig, ToolsConfig
from appo_jax.errors import ConfigError, DataError
from appo_jax.tools import search
from appo_jax.tools.search import LocalSearch, format_pages, load_corpus, make_tool, split_contents, terms, words
from appo_jax.types import Document, Outcome

DOCUMENTS = [
    Document("Bern", "Bern is the capital of Switzerland."),
    Document("Rome", "Rome is the capital of Italy. Rome has many fountains."),
    Document("Fountains", "A fountain throws water into the air."),
    Document("Ada", "Ada was born in Bern."),
]


def bm25(query, documents, k1=1.2, b=0.75):
    """Scores by the formula: sum of idf · tf / (tf + k1 (1 − b + b |d| / mean |d|)),
    idf = ln(1 + (N − n + ½)/(n + ½)).
    """
    of_all = [terms(words(f"{d.title} {d.text}")) for d in documents]
    mean = sum(map(len, of_all)) / len(of_all)
    scores = []
    for mine in of_all:
        score = 0.0
        for term in terms(words(query)):
            holders = sum(term in other for other in of_all)
            tf = mine.count(term)
            idf = math.log(1 + (len(of_all) - holders + 0.5) / (holders + 0.5))
            score += idf * tf / (tf + k1 * (1 - b + b * len(mine) / mean))
        scores.append(score)
    return scores


VOCABULARY = ("red", "green", "blue", "old", "new", "house", "tree", "river", "stone", "bird")
WORDS = st.lists(st.sampled_from(VOCABULARY), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=12), WORDS, st.integers(1, 5))
def test_the_ranking_is_bm25(texts, query, k):
    documents = [Document(str(i), " ".join(text)) for i, text in enumerate(texts)]
    scores = bm25(" ".join(query), documents)
    found = LocalSearch(documents, top_k=k).search([" ".join(query)])[0]
    got = [scores[int(page.title)] for page in found]
    best = sorted((score for score in scores if score > 0), reverse=True)[:k]
    assert got == pytest.approx(best, rel=1e-5)


def titles(search, query):
    return [page.title for page in search.search([query])[0]]


def test_inflections_match_and_stop_words_do_not():
    search = LocalSearch(DOCUMENTS, top_k=4)
    assert titles(search, "fountain") == ["Fountains", "Rome"]
    assert titles(search, "the fountain of the is") == ["Fountains", "Rome"]


BANDS = [
    *DOCUMENTS,
    Document("The Who", "The Who are an English rock band formed in London in 1964."),
    Document("It", "It is a horror novel by Stephen King."),
    Document("Them", "A band from Belfast."),
    Document("Hamlet", "The speech begins: to be, or not to be, that is the question."),
    Document(
        "Essay", "It is said that it was he who did it, and that it is they who will do it, who then have it all."
    ),
    Document("Who's There", "A play in which the ghost of the king asks who is there."),
    Document("", "of the and"),
]


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("The Who", "The Who"), ("the who?", "The Who"), ("who the", "The Who"), ("It", "It"), ("IT!", "It"),
        ("to be or not to be", "Hamlet"), ("of the and", ""), ("Who's There", "Who's There"), ("Who’s there?", "Who's There"),
    ],
)  # fmt: skip
def test_a_query_of_stop_words_alone_looks_for_them(query, first):
    assert titles(LocalSearch(BANDS, top_k=3), query)[0] == first


@pytest.mark.parametrize("query", ["The Who of Bern", "capital", "who was born in the capital", "a band"])
def test_stop_words_change_nothing_beside_other_words(query):
    """The ranking by other words is the same with and without stop words."""
    plain = [
        Document(d.title, " ".join(w for w in d.text.split() if w.lower() not in {"the", "is", "of"})) for d in BANDS
    ]
    assert titles(LocalSearch(BANDS, top_k=9), query) == titles(LocalSearch(plain, top_k=9), query)


def test_documents_of_stop_words_alone_can_be_found():
    assert titles(LocalSearch([Document("It", ""), Document("The Who", "")]), "It") == ["It"]


ABROAD = [
    Document("Beyoncé", "A singer from Houston."),
    Document("Dvor\u030ca\u0301k", "A composer."),  # decomposed
    Document("東京タワー", "東京タワーは東京の塔である。"),
    Document("Straße", "Ein Weg."),
    Document("ＡＢＣ", "Full-width letters."),
    Document("हिन्दी", "हिन्दी भाषा"),
    Document("Ёлка", "Дерево."),
    Document("İzmir", "A city."),
    *(Document(title, "") for title in ("Łódź", "Søren", "Þór", "Đà Nẵng", "Æthelstan", "Hawaiʻi", "ΟΔΥΣΣΕΥΣ", "٢٠٢٠")),
]


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("Beyoncé", "Beyoncé"), ("Beyonce\u0301", "Beyoncé"), ("BEYONCE", "Beyoncé"), ("beyonce\u200b", "Beyoncé"),
        ("Dvořák", "Dvor\u030ca\u0301k"), ("Dvorak", "Dvor\u030ca\u0301k"), ("東京", "東京タワー"), ("abc", "ＡＢＣ"),
        ("हिन्दी", "हिन्दी"), ("ёлка", "Ёлка"), ("Izmir", "İzmir"), ("straße", "Straße"),
        ("Strasse", "Straße"), ("Lodz", "Łódź"), ("SØREN", "Søren"), ("Soren", "Søren"), ("Thor", "Þór"), ("Da Nang", "Đà Nẵng"),
        ("aethelstan", "Æthelstan"), ("Hawai'i", "Hawaiʻi"), ("Οδυσσεύς", "ΟΔΥΣΣΕΥΣ"), ("2020", "٢٠٢٠"), ("२०२०", "٢٠٢٠"),
    ],
)  # fmt: skip
def test_one_letter_has_one_spelling(query, first):
    assert titles(LocalSearch(ABROAD), query)[0] == first


JAPANESE = [
    Document("任天堂のゲーム", ""),
    Document("スーパーマリオブラザーズ", ""),
    Document("ケーキ", ""),
    Document("ประเทศไทย", ""),
    Document("ประเทศลาว", ""),
]


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("ゲーム", "任天堂のゲーム"), ("ケ\u3099ーム", "任天堂のゲーム"), ("ｹﾞｰﾑ", "任天堂のゲーム"),
        ("マリオ", "スーパーマリオブラザーズ"), ("ケーキ", "ケーキ"), ("ไทย", "ประเทศไทย"), ("ลาว", "ประเทศลาว"),
    ],
)  # fmt: skip
def test_words_are_found_in_scripts_without_spaces(query, first):
    assert titles(LocalSearch(JAPANESE), query)[0] == first


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("任天堂のゲーム", "任 天 堂 の ゲ ー ム"), ("ｶﾞ か\u3099 か", "ガ が か"), ("Tower東京Tower2", "tower 東 京 tower2"),
        ("ประเทศไทย ที่", "ป ร ะ เ ท ศ ไ ท ย ที่"),
        ("ລາວ", "ລ າ ວ"), ("ភាសា", "ភា សា"), ("မြန်မာ", "မြ န် မာ"),
        # Marks that make another letter stay; accents and optional points go.
        ("हिन्दी की", "हिन्दी की"), ("العَرَبِيَّة", "العربية"), ("שָׁלוֹם", "שלום"), ("Ё й ά é", "е и α e"), ("서울", "서울"),
        ("葛\U000e0100 ❤\ufe0f é", "葛 e"), ("東京's é", "東 京 's e"), ("゛ é", "e"),
    ],
)  # fmt: skip
def test_words_of_other_scripts(text, expected):
    assert words(text) == expected.split()


@given(st.text(string.printable))
def test_the_short_way_for_plain_text_finds_the_same_words(text):
    assert words(text) == words(text + " é")[:-1]


def test_a_possessive_is_no_word_of_a_query():
    pages = [Document("What's It", ""), Document("Cat", "The cat's paw, the dog's tail."), Document("It", "That's it.")]
    assert titles(LocalSearch(pages), "What's it?")[0] == "What's It"
    assert titles(LocalSearch(pages), "cat's") == ["Cat"]


def test_a_call_gives_pages_as_text():
    result, state = LocalSearch(DOCUMENTS, top_k=1).call(None, "Where was Ada born?")
    assert (result.text, result.outcome, state) == ("Page 1: Ada. Ada was born in Bern.", Outcome.OK, None)
    assert "No page" in LocalSearch(DOCUMENTS).call(None, "zzz")[0].text


def test_pages_are_deduplicated_and_cut():
    pages = [Document("A", "one two"), Document("B", "one  two"), Document("", "w " * 200)]
    lines = format_pages(pages, max_page_words=5).split("\n")
    assert lines == ["Page 1: A. one two", "Page 2: w w w w w …"]


def records():
    return [{"title": page.title, "text": page.text} for page in DOCUMENTS]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_corpus_files(tmp_path, kind):
    path = tmp_path / f"corpus.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, records() + records()[:1])) + "\n\n")
    elif kind == "json":
        path.write_text(json.dumps(records()))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records()), path)
    assert load_corpus(path) == DOCUMENTS


def test_search_r1_documents():
    assert split_contents('"Bern"\nBern is a town.') == Document("Bern", "Bern is a town.")
    assert split_contents("only text") == Document("", "only text")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"text": "x"}\n{broken', "a.jsonl, line 2: not valid JSON"),
        (
            "a.jsonl",
            '{"text": "x"}\n{"body": "x"}',
            r"line 2: expected an object .* got \['body'\]",
        ),
        ("a.jsonl", "", "it is empty"),
        ("a.json", "{}", "expected a list of documents, got dict"),
        ("a.json", "[", "not valid JSON"),
        ("a.parquet", "no", "cannot be read as parquet"),
        ("a.txt", "x", "expected .jsonl, .json or .parquet"),
        ("a.json", '[{"text": "?!"}]', "none of the 1 documents"),
    ],
)
def test_bad_corpora_are_named(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=words):
        LocalSearch.from_file(tmp_path / name, cache_dir=tmp_path / "cache")


def test_a_missing_corpus_is_named(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load_corpus(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", b'{"title": "a", "text": "b"}\n{"title": "caf\xe9", "text": "b"}\n'), ("a.json", b'[{"text": "caf\xe9"}]'),
     ("b.jsonl", b'{"text": "a"}\n' + b"[" * 100_000), ("b.json", b"[" * 100_000)],
)  # fmt: skip
def test_a_corpus_that_cannot_be_read_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}(, line 2)?: not valid JSON"):
        load_corpus(tmp_path / name)


def test_lone_surrogates_in_documents_can_be_searched(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"title": "x \\ud800", "text": "\\udfff rivers"}\n')
    search = LocalSearch.from_file(tmp_path / "c.jsonl", 1, tmp_path)
    assert len(search.search(["river \ud800"])[0]) == 1


def test_a_search_with_nothing_to_search_says_what_to_do():
    with pytest.raises(
        ConfigError, match=r"needs a corpus .* documents\); a run that needs none leaves search out of tools"
    ):
        make_tool(ToolsConfig(), None)


def test_a_file_of_answers_comes_before_the_documents_of_the_data_source(tmp_path):
    (tmp_path / "answers.json").write_text(json.dumps({"capital": "Page 1: a stored answer"}))
    stored = SearchToolConfig(cache=str(tmp_path / "c.sqlite"), cache_fill=str(tmp_path / "answers.json"))
    tool = make_tool(ToolsConfig(search=stored), DOCUMENTS)
    assert tool.call(None, "capital")[0].text == "Page 1: a stored answer"
    tool.close()


def test_the_index_is_stored_once_and_by_content(tmp_path):
    path = tmp_path / "corpus.json"
    path.write_text(json.dumps(records()))
    first = LocalSearch.from_file(path, 2, tmp_path / "cache")
    (stored,) = (tmp_path / "cache").iterdir()
    stamp = stored.stat().st_mtime_ns
    second = LocalSearch.from_file(path, 2, tmp_path / "cache")
    assert stored.stat().st_mtime_ns == stamp
    for query in ("capital", "fountains of Rome", "nothing"):
        assert first.search([query]) == second.search([query]) == LocalSearch(DOCUMENTS, 2).search([query])
    path.write_text(json.dumps(records()[:2]))
    assert len(LocalSearch.from_file(path, 4, tmp_path / "cache").search(["capital Bern fountain"])[0]) == 2


@pytest.mark.skipif("APPO_JAX_DATA" not in os.environ, reason="APPO_JAX_DATA does not name the data folder")
def test_recall_on_hotpotqa():
    """The answer is in the ten best pages for at least 84% of the questions that have an answer to search for."""
    data = Path(os.environ["APPO_JAX_DATA"])
    questions = [json.loads(line) for line in (data / "hotpotqa/dev_first300.jsonl").read_text().splitlines()]
    pages = load_corpus(data / "2wiki/corpus.json")
    pages += [Document(c["title"], c["text"]) for question in questions for c in question["context"]]
    search = LocalSearch(list(dict.fromkeys(pages)), top_k=10)
    asked = [q for q in questions if not {answer.lower() for answer in q["answers"]} & {"yes", "no"}]
    assert len(asked) == 279
    hits = 0
    for question, found in zip(asked, search.search([q["question"] for q in asked]), strict=True):
        text = " ".join(f"{page.title} {page.text}" for page in found).lower()
        hits += any(answer.lower() in text for answer in question["answers"])
    assert hits / len(asked) >= 0.84


def test_a_long_corpus_is_read_and_indexed_with_progress(tmp_path, monkeypatch):
    """A run of which the supervisor sees no progress is ended."""
    monkeypatch.setattr(search, "PROGRESS_EVERY", 10)
    signs = []

    class Corpus(list):
        def __iter__(self):
            for number, document in enumerate(list.__iter__(self)):
                if number % 15 == 14:  # between two marks
                    signs.append((heartbeat.doing()[0], heartbeat._life.progressed))
                yield document

    documents = Corpus(Document(f"page {i}", "words") for i in range(60))
    search.stored_index(documents, tmp_path)
    assert [phase for phase, _ in signs] == [
        "index"
    ] * 8  # four while their digest is computed, four while they are indexed
    assert len({time for _, time in signs}) == 8
    assert heartbeat.doing() == ("start", "", True)  # its own limit is as before
