"""Texts for the doc ids of a run, by one streaming pass over the collection."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from rerank_ray.formats.lines import BadLines
from rerank_ray.formats.trec import RunEntry
from rerank_ray.records import Candidate


def fetch(needed: set[str], documents: Iterable[Candidate]) -> dict[str, Candidate]:
    """Keep the needed ones of a stream of documents: doc id -> document.

    Memory holds the needed documents only. Doc ids that the collection lacks are absent from the result.
    """
    return {document.doc_id: document for document in documents if document.doc_id in needed}


def hydrate(
    entries: Sequence[RunEntry], documents: Mapping[str, Candidate], run_path: str, bad: BadLines
) -> Iterator[Candidate]:
    """One query's run entries as candidates with text, title and the run's score, in the run's order.

    Raises:
        InputError: a doc id that the collection lacks, with the run's line (a bad line).
    """
    for entry in entries:
        document = documents.get(entry.doc_id)
        if document is None:
            bad.report(
                run_path,
                entry.line_number,
                f"doc id {entry.doc_id!r} is not in the collection",
                "give the collection that the run was made from",
            )
            continue
        yield replace(document, score=entry.score)
