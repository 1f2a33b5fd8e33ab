"""Training data of other projects, which says what is relevant, to label Parquet: students learn from it as it is.

Label Parquet has all columns of candidate Parquet, so that a teacher can also label it anew. As with other ingests,
`out/ingest.json` is written last.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from rerank_ray import schema, storage
from rerank_ray.errors import ConfigError, InputError
from rerank_ray.formats import flagembedding, sentence_transformers, tevatron, trec
from rerank_ray.formats.lines import BadLines
from rerank_ray.formats.qrels import read_qrels
from rerank_ray.formats.training_data import TrainingLists, text_id
from rerank_ray.formats.triples import Triples, read_triples
from rerank_ray.ingest import IngestSummary, check_depth, check_out, joined_run, judged, write_ingest
from rerank_ray.records import Candidate, Labels, Query, Scores
from rerank_ray.retrieval.hydrate import fetch

_DOCUMENTS_HELD = 1_000_000

LIST_READERS = {
    "flagembedding": flagembedding.read_flagembedding,
    "sentence-transformers": sentence_transformers.read_labeled_lists,
    "margin-mse": sentence_transformers.read_margins,
    "tevatron": tevatron.read_tevatron,
}


def ingest_lists(
    kind: str,
    files: Sequence[str],
    *,
    out: str,
    depth: int | None = None,
    instruction: str | None = None,
    skip_bad_lines: bool = False,
    overwrite: bool = False,
) -> IngestSummary:
    """Convert training lists of one of `LIST_READERS`' formats to labels, file after file.

    `depth` keeps the first candidates of each list; where a format has positives they come first.

    Raises:
        InputError: a bad line, a query id used twice, a file given twice, files with teacher scores beside files
            without, no lists at all, or `out` holds an ingest already.
    """
    check_depth(depth)
    check_out(out, overwrite)
    if twice := [path for path, count in Counter(map(storage.absolute, files)).items() if count > 1]:
        raise InputError(f"{twice[0]}: is given more than once, which would double its lists: name each file once")
    bad = BadLines(skip=skip_bad_lines)
    lists = TrainingLists()
    labels = (_cut(made, depth) for path in files for made in LIST_READERS[kind](path, bad, lists))
    return _write_labels(
        labels,
        out,
        kind=kind,
        sources=files,
        bad=bad,
        instruction=instruction,
        parameters={"depth": depth},
        overwrite=overwrite,
    )


def ingest_triples(
    files: Sequence[str],
    queries: str | None = None,
    corpus: str | None = None,
    *,
    out: str,
    depth: int | None = None,
    instruction: str | None = None,
    skip_bad_lines: bool = False,
    overwrite: bool = False,
) -> IngestSummary:
    """Gather MS MARCO triples to one list a query, positives first, and label it with gains 1 and 0.

    Without `queries` and `corpus` the columns are texts; with both they are ids of the topics and the collection (TSV
    or JSONL each), whose texts are then held in memory for one share of the queries at a time.

    Raises:
        ConfigError: one of `queries` and `corpus` without the other.
        InputError: a bad line, an id that topics or collection lack, no triples at all, or `out` holds an ingest
            already.
    """
    check_depth(depth)
    if (queries is None) != (corpus is None):
        raise ConfigError("triples of ids need queries and corpus, triples of texts neither: give both or none")
    check_out(out, overwrite)
    bad = BadLines(skip=skip_bad_lines)
    gathered = read_triples(files, bad, depth, ids=queries is not None)
    labels = _labels_of_texts(gathered, bad) if queries is None else _labels_of_ids(gathered, queries, corpus, bad)
    return _write_labels(
        (_cut(made, depth) for made in labels),
        out,
        kind="triples",
        sources=[*files, *([queries, corpus] if queries else [])],
        bad=bad,
        instruction=instruction,
        parameters={"depth": depth},
        overwrite=overwrite,
    )


def _labels_of_texts(gathered: Iterable[Triples], bad: BadLines) -> Iterator[Labels]:
    lists = TrainingLists()
    for triples in gathered:
        sides = ((triples.positives, 1.0), (triples.negatives, 0.0))
        candidates = [Candidate(doc_id=text_id(t), text=t, label=gain) for side, gain in sides for t in side]
        yield from lists.checked(bad, *triples.place, Query(query_id="", text=triples.query), candidates, None)


def _labels_of_ids(gathered: Iterable[Triples], queries: str, corpus: str, bad: BadLines) -> Iterator[Labels]:
    lists = TrainingLists()
    topics = {q.query_id: q for q in trec.read_topics(queries, bad)}
    for number, (batch, needed) in enumerate(_batches(gathered)):
        # The first pass over the collection reports its bad lines.
        documents = fetch(needed, trec.read_collection(corpus, BadLines(skip=True) if number else bad, needed))
        for triples in batch:
            query = topics.get(triples.query)
            if query is None:
                reason = f"query {triples.query!r} is not in {queries}"
                bad.report(*triples.place, reason, "add the query or remove its lines")
                continue
            candidates = []
            for side, gain in ((triples.positives, 1.0), (triples.negatives, 0.0)):
                for doc_id, place in side.items():
                    if doc_id in documents:
                        candidates.append(replace(documents[doc_id], label=gain))
                    else:
                        reason = f"doc id {doc_id!r} is not in the collection"
                        bad.report(*place, reason, "give the collection that the triples were made from")
            yield from lists.checked(bad, *triples.place, query, candidates, None)


def _batches(gathered: Iterable[Triples]) -> Iterator[tuple[list[Triples], set[str]]]:
    """Queries whose passages' texts fit in memory together, with these passages' ids."""
    batch: list[Triples] = []
    needed: set[str] = set()
    for triples in gathered:
        batch.append(triples)
        needed.update(triples.positives, triples.negatives)
        if len(needed) >= _DOCUMENTS_HELD:
            yield batch, needed
            batch, needed = [], set()
    if batch:
        yield batch, needed


def ingest_rank_distillm(
    run: str,
    queries: str,
    corpus: str,
    qrels: str | None = None,
    *,
    out: str,
    depth: int | None = None,
    instruction: str | None = None,
    skip_bad_lines: bool = False,
    overwrite: bool = False,
) -> IngestSummary:
    """Join a teacher's TREC run with topics and collection, and label rank r of N candidates with N − r: the run's own
    scores mean nothing beyond their order (Rank-DistiLLM, Schlatt et al. 2025, arXiv:2405.07920).

    Raises:
        InputError: as `ingest_trec`.
    """
    check_depth(depth)
    check_out(out, overwrite)
    bad = BadLines(skip=skip_bad_lines)
    sources = [run, queries, corpus, *([qrels] if qrels else [])]
    gains = read_qrels(qrels, bad) if qrels else {}
    joined = joined_run(run, queries, corpus, depth, bad)
    without: list[str] = []

    def labels() -> Iterator[Labels]:
        for found in judged(joined, gains, sources, without):
            yield Labels(
                candidate_list=replace(found, candidates=tuple(replace(c, score=None) for c in found.candidates)),
                teacher=f"imported:{posixpath.basename(run)}:ranks",
                scores=tuple(float(len(found) - rank) for rank in range(1, len(found) + 1)),
            )

    return _write_labels(
        labels(),
        out,
        without=without,
        kind="rank-distillm",
        sources=sources,
        bad=bad,
        instruction=instruction,
        parameters={"depth": depth},
        overwrite=overwrite,
    )


def _cut(labels: Labels, depth: int | None) -> Labels:
    first = replace(labels.candidate_list, candidates=labels.candidate_list.candidates[:depth])
    return replace(labels, candidate_list=first, scores=labels.scores[:depth])


def _write_labels(
    labels: Iterable[Labels],
    out: str,
    *,
    kind: str,
    sources: Sequence[str],
    bad: BadLines,
    instruction: str | None,
    parameters: dict[str, str | int | float | None],
    overwrite: bool,
    without: Sequence[str] = (),
) -> IngestSummary:
    def rows() -> Iterator[dict]:
        for made in labels:
            query = replace(made.candidate_list.query, instruction=instruction or made.candidate_list.query.instruction)
            row = schema.candidate_row(replace(made.candidate_list, query=query))
            yield row | schema.label_columns(made.teacher, Scores(scores=made.scores))

    return write_ingest(
        rows(),
        schema.LABELS,
        out,
        kind=kind,
        sources=sources,
        without=without,
        bad=bad,
        parameters={**parameters, "instruction": instruction},
        overwrite=overwrite,
    )
