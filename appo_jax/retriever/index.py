"""A search index on disk (tantivy) for corpora that do not fit in memory. It is built once, and many processes memory-map it.

Pages are split into words, stems and stop words as in the index of the `search` tool (tools/search.py), and ranked by the same
BM25 (k1 = 1.2, b = 0.75, Lucene's idf). Relevances are k1 + 1 times as large. Tantivy rounds a page's length to one of 256
steps, so pages of nearly equal relevance may change places.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import Stemmer
import tantivy

from appo_jax.errors import DataError
from appo_jax.tools.protocol import writable
from appo_jax.tools.search import cache_folder, kept_words, query_terms, read_passages, stop_terms, words
from appo_jax.types import Document

log = logging.getLogger(__name__)

_VERSION = "appo_jax tantivy 4"  # change it whenever the index of the same text changes
_MARK = "\N{MIDDLE DOT}"  # replaces the space that marks stop words, because tantivy splits terms at spaces
HEAP = 512 << 20  # bytes that the writer's threads hold together before they write segments
MAX_THREADS = 8  # of the writer; tantivy refuses less than 15 MB of HEAP per thread


def _schema() -> tantivy.Schema:
    builder = tantivy.SchemaBuilder()
    for name in ("terms", "stop_words"):
        builder.add_text_field(name, tokenizer_name="whitespace", index_option="freq")
    builder.add_text_field("title", stored=True, tokenizer_name="raw", index_option="basic")
    builder.add_bytes_field("text", stored=True)
    builder.add_bytes_field("id", stored=True)
    return builder.build()


def folder_of(corpus: Path, folder: Path | None = None) -> Path:
    """The folder of the index of a corpus file. It depends on the file's path, size and time of change. Raises DataError."""
    try:
        stat = corpus.stat()
    except OSError as error:
        raise DataError(f"search corpus {corpus}: {error.strerror}; expected a jsonl, json or parquet file") from error
    identity = f"{_VERSION} {corpus.absolute()} {stat.st_size} {stat.st_mtime_ns}"
    return cache_folder(folder) / f"tantivy-{hashlib.sha256(identity.encode()).hexdigest()[:24]}"


def build(corpus: Path, folder: Path) -> None:
    """Index the pages of a corpus file, each once, into `folder`, unless it exists. The folder appears when the index is complete.

    Raises DataError that names file and line."""
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    began, count = time.monotonic(), 0
    scratch = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        index = tantivy.Index(_schema(), path=str(scratch))
        writer = index.writer(HEAP, num_threads=min(os.cpu_count() or 1, MAX_THREADS))
        try:
            for (id, page), first in zip(read_passages(corpus), _first(corpus), strict=True):
                if not first:
                    continue
                writer.add_document(_document(id, page))
                count += 1
                if count % 250_000 == 0:
                    log.info("%s: %d pages indexed, %.0f s", corpus, count, time.monotonic() - began)
            writer.commit()
        finally:
            writer.wait_merging_threads()
        if not count:
            raise DataError(f"search corpus {corpus}: it is empty; expected at least one document with title and text")
        (scratch / "corpus.json").write_text(json.dumps({"corpus": str(corpus), "pages": count}))
        try:
            scratch.rename(folder)  # the first of several builders wins
        except OSError:
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    log.info("%s: %d pages indexed in %.0f s", corpus, count, time.monotonic() - began)


def _first(corpus: Path) -> np.ndarray:
    """For each page of a corpus file whether it is the first with its title and text, by a digest of 8 bytes. Read before the
    index is built, so that 24 bytes a page are enough; a set would need 80."""
    digests = np.fromiter((_digest(page) for _, page in read_passages(corpus)), np.uint64)
    first = np.zeros(len(digests), bool)
    first[np.unique(digests, return_index=True)[1]] = True
    if repeated := len(first) - first.sum():
        log.info("%s: %d of %d pages repeat earlier ones and are left out", corpus, repeated, len(first))
    return first


def _digest(page: Document) -> int:
    content = f"{page.title}\0{page.text}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())


def _document(id: str, page: Document) -> tantivy.Document:
    title = words(page.title)
    found = title + words(page.text)
    document = tantivy.Document()
    document.add_text("terms", " ".join(map(_stem, kept_words(found))))
    document.add_text("stop_words", " ".join(_marked(term) for term in stop_terms(found, title)))
    document.add_text("title", writable(page.title))
    document.add_bytes("text", page.text.encode("utf-8", "replace"))
    document.add_bytes("id", id.encode("utf-8", "replace"))
    return document


@functools.lru_cache(maxsize=1 << 19)
def _stem(word: str) -> str:
    return _STEMMER.stemWord(word)


_STEMMER = Stemmer.Stemmer("english")


def _marked(term: str) -> str:
    return term.replace(" ", _MARK)


class Hit(NamedTuple):
    """A page that a query finds."""

    id: str  # that of its record in the corpus, or its position there
    page: Document
    relevance: float


class Index:
    """An index on disk, opened for reading. Safe to use from several threads."""

    def __init__(self, folder: Path):
        """Open the index in a folder. Raises DataError if it holds none."""
        try:
            self._index = tantivy.Index.open(str(folder))
            self.pages: int = json.loads((folder / "corpus.json").read_text())["pages"]
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"{folder}: holds no index of a corpus ({error}); remove it, and the index is built again"
            ) from error
        self._schema = self._index.schema
        self._searcher = self._index.searcher()

    def search(self, query: str, k: int) -> list[Hit]:
        """The k best pages that share a word with the query, best first."""
        found = query_terms(writable(query))
        wanted = [
            (
                tantivy.Occur.Should,
                tantivy.Query.term_query(
                    self._schema, "stop_words" if term.startswith(" ") else "terms", _marked(term), "freq"
                ),
            )
            for term in found
        ]
        if not wanted:
            return []
        hits = self._searcher.search(tantivy.Query.boolean_query(wanted), k, count=False).hits
        return [self._hit(address, relevance) for relevance, address in hits]

    def _hit(self, address: tantivy.DocAddress, relevance: float) -> Hit:
        stored = self._searcher.doc(address)
        text, id = (bytes(stored.get_first(name) or b"").decode() for name in ("text", "id"))
        return Hit(id, Document(stored.get_first("title") or "", text), relevance)
