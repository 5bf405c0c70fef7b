"""Search over a corpus on this machine with BM25 (bm25s), and the format of pages that all search tools share.

Okapi BM25 over title and text; English stop words count only in queries that have no other words. The index of a corpus file
is built once, kept on disk and memory-mapped, so that many processes share it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import threading
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import Stemmer
from tokenizers import Regex, normalizers, pre_tokenizers

from appo_jax import heartbeat
from appo_jax.config import ToolsConfig
from appo_jax.errors import ConfigError, DataError
from appo_jax.text.letters import LATIN
from appo_jax.tools.protocol import Tool, ToolResult, writable
from appo_jax.types import Document, Outcome

if TYPE_CHECKING:  # importing it runs a JAX operation, which is not allowed before the hosts have joined
    import bm25s


def make_tool(config: ToolsConfig, documents: Sequence[Document] | None) -> Tool:
    """Search over `search.corpus`, else at `search.url`, else in `search.cache`, else over the data source's documents."""
    from appo_jax.tools.web import WebSearch  # it uses this module

    search = config.search
    if search.corpus is not None:
        return LocalSearch.from_file(search.corpus, search.top_k)
    if search.url is not None or search.cache is not None:
        return WebSearch(search)
    if documents is not None:
        return LocalSearch(documents, search.top_k)
    raise ConfigError(
        "tools.search.corpus: the search tool needs a corpus (or tools.search.url, tools.search.cache, or a data "
        "source that brings documents); a run that needs none leaves search out of tools.enabled"
    )


class LocalSearch:
    """The `search` tool over documents in memory or a corpus file. Stateless; safe to call from several threads."""

    name = "search"
    argument_name = "query"
    description = "Finds pages about a query"
    skills = ("look_up",)
    timeout = 30.0

    def __init__(self, documents: Sequence[Document], top_k: int = 3, index: bm25s.BM25 | None = None):
        if not documents:
            raise DataError("search corpus: no documents were given; expected at least one with a title and a text")
        self.documents = documents
        self.top_k = top_k
        self._index = index if index is not None else build_index(documents)

    @classmethod
    def from_file(cls, path: str | Path, top_k: int = 3, cache_dir: str | Path | None = None) -> LocalSearch:
        """Read a corpus and its index. The index is built on first use and kept under `cache_dir`, named by its content."""
        documents = load_corpus(path)
        return cls(documents, top_k, stored_index(documents, cache_folder(cache_dir)))

    def start(self) -> None:
        return None

    def call(self, state: None, argument: str) -> tuple[ToolResult, None]:
        return ToolResult(format_pages(self.search([argument])[0]), Outcome.OK), None

    def close(self) -> None:
        pass

    def search(self, queries: Sequence[str], top_k: int | None = None) -> list[list[Document]]:
        """The best documents of each query, best first. Documents that share no word with the query are left out."""
        k = top_k or self.top_k
        found: list[list[Document]] = []
        for query in queries:
            relevance = self._relevance(query)
            matches = np.flatnonzero(relevance)
            if len(matches) > k:  # sort only the documents that are as relevant as the k-th best
                matches = matches[relevance[matches] >= -np.partition(-relevance[matches], k - 1)[k - 1]]
            best = matches[np.lexsort((matches, -relevance[matches]))][:k]  # ties by position
            found.append([self.documents[i] for i in best])
        return found

    def _relevance(self, query: str) -> np.ndarray:
        """The relevance of all documents by BM25, [documents] float32: the sum over the query's terms of their stored columns."""
        columns, vocabulary = self._index.scores, self._index.vocab_dict
        data, indices, starts = columns["data"], columns["indices"], columns["indptr"]
        relevance = np.zeros(len(self.documents), np.float32)
        for word in query_terms(query):
            if (term := vocabulary.get(word)) is not None:
                column = slice(starts[term], starts[term + 1])
                relevance[indices[column]] += data[column]
        return relevance


_CLITIC = r"(?<=[\w])'(?:s|t|re|ll|ve|d|m)(?![\w])"  # a word of its own: Who's is who and 's
_WORD = re.compile(rf"{_CLITIC}|\w+")
_STOPWORDS = """a an and are as at be been but by did do does for had has have how if in into is it no not of on or such
that the their then there these they this to was were what when where which who whom whose why will with"""
_STOP = frozenset([*_STOPWORDS.split(), "'s", "'t", "'re", "'ll", "'ve", "'d", "'m"])
# Letters, apostrophes and digits that the normalisation below leaves in several spellings.
_DIGITS = {
    c: str(unicodedata.decimal(c)) for c in map(chr, range(0x660, 0x11_000)) if unicodedata.decimal(c, None) is not None
}
_CAPITALS = {letter.upper(): plain for letter, plain in LATIN.items() if letter != "ı"}
_OTHERS = {"ß": "ss", "ẞ": "ss", "ς": "σ", "’": "'", "ʻ": "'", "ʼ": "'", "ʽ": "'"}
_SPELLINGS = str.maketrans(LATIN | _CAPITALS | _OTHERS | _DIGITS)
_local = threading.local()  # a Stemmer may not be shared between threads
# Invisible characters; accents and optional points. In other scripts a mark makes another letter: the dots of ゲ, vowels of Thai.
_SCRIPTS = r"\p{Inherited}\p{Latin}\p{Greek}\p{Cyrillic}\p{Arabic}\p{Hebrew}\p{Syriac}\p{Mongolian}"
_IGNORED = Regex(rf"\p{{Cf}}|[\p{{Mn}}&&[{_SCRIPTS}]&&[^\u3099\u309A]]")
_NORMALIZER = normalizers.Sequence(
    [normalizers.NFKD(), normalizers.Replace(_IGNORED, ""), normalizers.Lowercase(), normalizers.NFC()]
)
# Scripts without spaces between words: every character, with its marks, is a word.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}ー\u3099\u309A\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_ONE, _RUN = rf"[\p{{L}}\p{{N}}&&[{_UNSPACED}]]\p{{M}}*", rf"[\w&&[^{_UNSPACED}]]+"
_SPLITTER = pre_tokenizers.Split(
    Regex(f"{_CLITIC}|{_ONE}|{_RUN}".replace(r"\w", r"\p{L}\p{M}\p{N}_")), behavior="removed", invert=True
)


def words(text: str) -> list[str]:
    """The words of a text in normalised spelling; everything except letters and digits separates words."""
    if text.isascii():  # the same result, computed faster
        return _WORD.findall(text.lower())
    text = _NORMALIZER.normalize_str(writable(text).translate(_SPELLINGS))
    return [word for word, _ in _SPLITTER.pre_tokenize_str(text)]


def terms(found: Sequence[str]) -> list[str]:
    """The index terms of a text's words: the stems (Snowball, English) of the words that are not stop words."""
    if not hasattr(_local, "stemmer"):
        _local.stemmer = Stemmer.Stemmer("english")
    return _local.stemmer.stemWords(kept_words(found))


def kept_words(found: Sequence[str]) -> list[str]:
    """The words that are not stop words."""
    return [word for word in found if word not in _STOP]


def stop_terms(found: Sequence[str], title: Sequence[str]) -> list[str]:
    """The stop words among a text's words, each marked by a space, and one term for the title if the title has only stop
    words."""
    whole_title = [f"  {' '.join(title)}"] if title and _STOP.issuperset(title) else []
    return [f" {word}" for word in found if word in _STOP] + whole_title


def query_terms(query: str) -> list[str]:
    """The terms of a query, or its stop words if it has only those ("The Who", "It")."""
    found = words(query)
    return terms(found) or stop_terms(found, found)


@heartbeat.phase("index")
def build_index(documents: Sequence[Document]) -> bm25s.BM25:
    """A BM25 index (k1 = 1.2, b = 0.75, Lucene's idf) of the documents' titles and texts.

    Stop words have separate columns that do not change the relevance by other words: it is computed as if a document had
    only stop words."""
    vocabulary: dict[str, int] = {}
    stop_vocabulary: dict[str, int] = {}
    ids: list[list[int]] = []
    stop_ids: list[list[int]] = []
    for number, document in enumerate(documents):
        if number % PROGRESS_EVERY == 0:
            heartbeat.progress()
        title = words(document.title)
        found = title + words(document.text)
        ids.append([vocabulary.setdefault(term, len(vocabulary)) for term in terms(found)])
        stop_ids.append([stop_vocabulary.setdefault(t, len(stop_vocabulary)) for t in stop_terms(found, title)])
    if not vocabulary and not stop_vocabulary:
        raise DataError(f"search corpus: none of the {len(documents)} documents holds a word that can be searched")
    if not vocabulary or not stop_vocabulary:
        return _columns(ids, vocabulary) if vocabulary else _columns(stop_ids, stop_vocabulary)
    index, stop_words = _columns(ids, vocabulary), _columns(stop_ids, stop_vocabulary)
    first, second = index.scores, stop_words.scores
    index.scores = first | {
        "data": np.concatenate([first["data"], second["data"]]),
        "indices": np.concatenate([first["indices"], second["indices"]]),
        "indptr": np.concatenate([first["indptr"], second["indptr"][1:] + first["indptr"][-1]]),
    }
    index.vocab_dict = vocabulary | {term: i + len(vocabulary) for term, i in stop_vocabulary.items()}
    return index


@heartbeat.phase("index columns")
def _columns(ids: Sequence[Sequence[int]], vocabulary: dict[str, int]) -> bm25s.BM25:
    import bm25s

    index = bm25s.BM25(k1=1.2, b=0.75, method="lucene")
    index.index((ids, vocabulary), create_empty_token=False, show_progress=False)
    return index


@heartbeat.phase("index")
def stored_index(documents: Sequence[Document], folder: Path) -> bm25s.BM25:
    """The memory-mapped index of these documents from `folder`. It is built and stored there if it is missing."""
    import bm25s

    digest = hashlib.sha256(_INDEX_VERSION)
    for number, document in enumerate(documents):
        if number % PROGRESS_EVERY == 0:
            heartbeat.progress()
        digest.update(f"{document.title}\0{document.text}\0".encode("utf-8", "surrogatepass"))
    path = folder / f"bm25-{digest.hexdigest()[:24]}"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            build_index(documents).save(Path(scratch) / "index", show_progress=False)
            try:
                os.rename(Path(scratch) / "index", path)  # atomically; the first of several builders wins
            except OSError:
                if not path.exists():
                    raise
    return bm25s.BM25.load(path, mmap=True)


PROGRESS_EVERY = 10_000  # pages: reading and indexing millions of them is progress
_INDEX_VERSION = b"appo_jax bm25 4"  # change it whenever the index of the same text changes


def cache_folder(folder: str | Path | None) -> Path:
    """The folder of stored indexes: `folder`, else one in the user's cache folder."""
    if folder is not None:
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "appo_jax"


@heartbeat.phase("index")
def load_corpus(path: str | Path) -> list[Document]:
    """The documents of a .jsonl, .json (a list) or .parquet file with `title` and `text` (or Search-R1's `contents`), each
    once. Raises DataError that names the file and the line."""
    pages = list(dict.fromkeys(read_pages(Path(path))))
    if not pages:
        raise DataError(f"search corpus {path}: it is empty; expected at least one document with title and text")
    return pages


def read_pages(path: Path) -> Iterator[Document]:
    """The documents of such a file one after the other, repeated ones included. Raises DataError."""
    return (page for _, page in read_passages(path))


def read_passages(path: Path) -> Iterator[tuple[str, Document]]:
    """`read_pages` with the `id` of each record; without one, its position from 0. Raises DataError."""
    if not path.is_file():
        raise DataError(f"search corpus {path}: no such file (tools.search.corpus: jsonl, json or parquet)")
    for number, (where, record) in enumerate(_records(path)):
        if number % PROGRESS_EVERY == 0:
            heartbeat.progress()
        page = _page(record, f"{path}, {where}")
        yield str(number if record.get("id") is None else record["id"]), page


def _records(path: Path) -> Iterable[tuple[str, Any]]:
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            number = 0
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
                for record in batch.to_pylist():
                    yield f"row {(number := number + 1)}", record
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"search corpus {path}: cannot be read as parquet ({error})") from error
    elif path.suffix == ".jsonl":
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield f"line {number}", json.loads(line)
                    except (ValueError, RecursionError) as error:  # not UTF-8, or not JSON
                        raise DataError(f"search corpus {path}, line {number}: not valid JSON ({error})") from error
    elif path.suffix == ".json":
        try:
            records = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise DataError(f"search corpus {path}: not valid JSON ({error})") from error
        if not isinstance(records, list):
            raise DataError(f"search corpus {path}: expected a list of documents, got {type(records).__name__}")
        yield from ((f"record {number}", record) for number, record in enumerate(records, start=1))
    else:
        raise DataError(f"search corpus {path}: unknown kind {path.suffix!r}; expected .jsonl, .json or .parquet")


def _page(record: Any, where: str) -> Document:
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return Document(str(record.get("title") or ""), record["text"])
    if isinstance(record, dict) and isinstance(record.get("contents"), str):
        return split_contents(record["contents"])
    got = sorted(record) if isinstance(record, dict) else type(record).__name__
    raise DataError(f"search corpus {where}: expected an object with `title` and `text`, got {got}")


def split_contents(contents: str) -> Document:
    """The document in a string of Search-R1: the title, often in quotes, on the first line, then the text."""
    title, _, text = contents.partition("\n")
    return Document(title.strip().strip('"'), text.strip()) if text else Document("", contents.strip())


def join_contents(page: Document) -> str:
    """A document as a string of Search-R1, the inverse of `split_contents`."""
    return f'"{page.title}"\n{page.text}' if page.title else page.text


MAX_TITLE_CHARS = 300
MAX_WORD_CHARS = 40  # a page of at most n words is cut at 40·n characters


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[:limit] + " …"


def format_pages(pages: Sequence[Document], max_page_words: int = 160) -> str:
    """`Page i: title. text`, one page per line, without repeated pages. Long pages and titles are cut and marked with …."""
    lines: list[str] = []
    seen = set()
    for page in pages:
        title = _shortened(page.title, MAX_TITLE_CHARS)
        text = " ".join(page.text.split())
        if text in seen:
            continue
        seen.add(text)
        words = text.split(" ")
        if len(words) > max_page_words:
            text = " ".join(words[:max_page_words]) + " …"
        text = _shortened(text, MAX_WORD_CHARS * max_page_words)
        lines.append(f"Page {len(lines) + 1}: {title}. {text}" if title else f"Page {len(lines) + 1}: {text}")
    return "\n".join(lines) if lines else "No page matches this query. Try other words."
