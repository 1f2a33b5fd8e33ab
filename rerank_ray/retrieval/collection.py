"""The documents of a collection: a file's, or those that candidate lists hold."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

from rerank_ray import storage
from rerank_ray.errors import InputError
from rerank_ray.formats.lines import BadLines
from rerank_ray.formats.trec import read_collection
from rerank_ray.parquet import read_candidates
from rerank_ray.records import Candidate


def holds_candidates(corpus: str) -> bool:
    """Whether a collection is that of candidate lists: a folder, or a Parquet file."""
    return storage.is_directory(corpus) or storage.open_filesystem(corpus)[1].endswith(".parquet")


def read_documents(corpus: str, needed: Collection[str] | None = None) -> Iterator[Candidate]:
    """Stream the documents of a TSV or JSONL file, or of candidates, without scores and gains.

    With `needed`, only those doc ids. Memory holds the doc ids, of candidates each with a hash of its text.

    Raises:
        InputError: a bad line; a document that has other texts in other lists.
    """
    if holds_candidates(corpus):
        return _listed(corpus, needed)
    return read_collection(corpus, BadLines(), needed)


def _listed(uri: str, needed: Collection[str] | None) -> Iterator[Candidate]:
    """The lists' documents, each where it stands first."""
    seen: dict[str, int] = {}
    for request in read_candidates(uri):
        for candidate in request.candidates:
            if needed is not None and candidate.doc_id not in needed:
                continue
            text = hash((candidate.title, candidate.text))
            if candidate.doc_id not in seen:
                seen[candidate.doc_id] = text
                yield replace(candidate, score=None, label=None)
            elif seen[candidate.doc_id] != text:
                raise InputError(
                    f"{uri}: query {request.query.query_id!r}: document {candidate.doc_id!r} has another text than "
                    "in an earlier list: give lists of one collection, whose doc ids stand for one text each"
                )
