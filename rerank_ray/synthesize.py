"""Synthetic queries: passages are drawn, an LLM writes queries for them, and those that find their passage again get
candidates (InPars, Bonifacio et al. 2022, arXiv:2202.05144; round trip: Promptagator, Dai et al. 2023,
arXiv:2209.11755)."""

from __future__ import annotations

import hashlib
import heapq
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from rerank_ray.errors import InputError
from rerank_ray.ranking.write_query import passage_of
from rerank_ray.records import Candidate, CandidateList, Query
from rerank_ray.retrieval.bm25 import BM25Index
from rerank_ray.retrieval.collection import read_documents
from rerank_ray.retrieval.hydrate import fetch
from rerank_ray.retrieval.words import words
from rerank_ray.settings.synthesize import SynthesizeSettings

LEFT_OUT = ("not_written", "copied", "duplicate", "not_found_by_bm25", "not_ranked", "not_found_by_round_trip")
"""Why a query is left out: the model wrote none, it repeats its passage, another one has the same words, its passage is
not among BM25's first, the round trip's ranker failed on it, or did not find the passage."""


# Drawing passages


def draw_passages(settings: SynthesizeSettings) -> Iterator[dict]:
    """Rows of the `passages` schema: one for each query to write, for passages in the order of their draw.

    A passage's place in the draw is a hash of the seed and its id, so that the same ones are drawn from a collection in
    another order, and most of them from one that has grown. Memory holds the drawn passages; passages without text are
    never drawn. A row's id says which passage, and depends on writer and seed: runs of two writers can be trained on
    together.

    Raises:
        InputError: a bad line of the collection, or no passage with text.
    """
    documents = (d for d in read_documents(settings.corpus) if d.contents.strip())
    drawn = heapq.nsmallest(settings.passages, documents, key=lambda d: _number(f"{settings.seed}:{d.doc_id}"))
    if not drawn:
        raise InputError(f"{settings.corpus}: holds no passage with text: there is nothing to write queries for")
    writer = f"{settings.seed}:{settings.writer.model_dump_json()}"
    for document in drawn:
        for n in range(settings.queries_per_passage):
            yield {
                "query_id": f"syn-{document.doc_id}-{_number(f'{writer}:{n}:{document.doc_id}') >> 32:08x}",
                "doc_id": document.doc_id,
                "title": document.title,
                "text": document.text,
            }


def _number(text: str) -> int:
    """64 bits that depend on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


# From queries to candidate lists


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenQuery:
    """A query with the passage that it was written for."""

    query_id: str
    text: str
    doc_id: str


def usable_queries(
    rows: Iterable[dict], max_copied_words: int | None, left_out: Counter[str]
) -> Iterator[WrittenQuery]:
    """Queries of `written_queries` rows that are worth a search, in the order of their ids; the others are counted.

    Of queries with the same words the first is kept. Memory holds the queries, without their passages.
    """
    found: list[WrittenQuery] = []
    for row in rows:
        if row["error"] is not None:
            left_out["not_written"] += 1
            continue
        # The title with the text: the model has seen both, and BM25 finds both.
        (passage,) = passage_of(row).candidates
        if max_copied_words is not None and longest_copied_run(row["query"], passage.contents) > max_copied_words:
            left_out["copied"] += 1
        else:
            found.append(WrittenQuery(query_id=row["query_id"], text=row["query"], doc_id=row["doc_id"]))
    seen: set[tuple[str, ...]] = set()
    for query in sorted(found, key=lambda q: q.query_id):
        its_words = tuple(words(query.text.casefold()))
        if its_words in seen:
            left_out["duplicate"] += 1
            continue
        seen.add(its_words)
        yield query


def longest_copied_run(query: str, passage: str) -> int:
    """How many words in a row of the query stand in the passage in the same order, case and punctuation aside."""
    asked, text = words(query.casefold()), f" {' '.join(words(passage.casefold()))} "
    longest = 0
    for start in range(len(asked)):
        while start + longest < len(asked) and f" {' '.join(asked[start : start + longest + 1])} " in text:
            longest += 1
    return longest


def retrieve(
    queries: Sequence[WrittenQuery], settings: SynthesizeSettings, left_out: Counter[str]
) -> Iterator[CandidateList]:
    """Each query's `depth` best documents by BM25; a query whose passage is not among the first `bm25_top` is counted.

    The passage has gain 1, the other candidates none. The collection is read twice, once into the index and once for
    the texts of what was found, which memory holds.
    """
    corpus = ((d.doc_id, d.contents) for d in read_documents(settings.corpus))
    index = BM25Index.build(corpus, k1=settings.k1, b=settings.b, source=settings.corpus)
    kept: list[tuple[WrittenQuery, list[tuple[str, float]]]] = []
    for query, ranking in zip(queries, index.search((q.text for q in queries), settings.depth), strict=True):
        if query.doc_id in [doc_id for doc_id, _ in ranking[: settings.bm25_top]]:
            kept.append((query, ranking))
        else:
            left_out["not_found_by_bm25"] += 1
    needed = {doc_id for _, ranking in kept for doc_id, _ in ranking}
    documents = fetch(needed, read_documents(settings.corpus, needed))
    for query, ranking in kept:
        yield CandidateList(
            query=Query(query_id=query.query_id, text=query.text),
            candidates=tuple(_candidate(documents, doc_id, score, query.doc_id) for doc_id, score in ranking),
        )


def _candidate(documents: Mapping[str, Candidate], doc_id: str, score: float, source: str) -> Candidate:
    return replace(documents[doc_id], score=score, label=1.0 if doc_id == source else None)


def finds_back(scores: Sequence[float | None], gains: Sequence[float | None], top: int) -> bool:
    """Whether the passage, the one candidate with a gain, is scored among the first `top`; ties keep the list's order.

    A candidate without a score (null or NaN) is below all others, and the passage without one is not found.
    """
    (source,) = [i for i, gain in enumerate(gains) if gain is not None]
    values = [math.nan if score is None else score for score in scores]
    if math.isnan(values[source]):
        return False
    above = sum(v > values[source] or (v == values[source] and i < source) for i, v in enumerate(values))
    return above < top
