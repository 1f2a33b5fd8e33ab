"""Outside formats to candidate Parquet: BEIR folders (with BM25), hits files, TREC runs, and several of these merged.

Each function streams candidate lists into `out` and writes `out/ingest.json` last: until then it says that this is an
unfinished ingest, which the next one replaces. A finished one that is overwritten stays until its successor is whole.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import pyarrow as pa
import pyarrow.parquet as pq

from rerank_ray import __version__, parquet, schema, storage
from rerank_ray.errors import ConfigError, InputError
from rerank_ray.formats import beir, hits, merge, trec
from rerank_ray.formats.lines import BadLines
from rerank_ray.formats.qrels import read_qrels
from rerank_ray.records import Candidate, CandidateList, Query, with_gains
from rerank_ray.retrieval import bm25
from rerank_ray.retrieval.hydrate import fetch, hydrate
from rerank_ray.runs import INGEST_SUMMARY, INGEST_UNFINISHED, RunFolder, ingest_ended, resolve_input

_PART = re.compile(r"part-\d{5}\.parquet")
_NEW = ".new"

Qrels = dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestSummary:
    """What an ingest read and wrote; `ingest.json` holds the same fields.

    `queries = rows + len(queries_without_candidates)`: a row needs candidates, so a query without any has none.
    """

    kind: str
    out: str
    sources: tuple[str, ...]
    parameters: dict[str, str | int | float | None]
    queries: int
    rows: int
    candidates: int
    queries_without_candidates: tuple[str, ...]
    labelled_pairs: int
    bad_lines: int
    bad_lines_listed: tuple[str, ...]
    rerank_ray_version: str
    schema_version: int


def ingest_beir(
    folder: str,
    split: str | None,
    depth: int,
    out: str,
    *,
    k1: float = bm25.K1,
    b: float = bm25.B,
    instruction: str | None = None,
    skip_bad_lines: bool = False,
    overwrite: bool = False,
) -> IngestSummary:
    """Retrieve `depth` candidates a query from a BEIR folder with BM25, and label them with the split's qrels.

    Only queries with judgments in the split are ingested; `split=None` takes every query and labels nothing. The
    collection is read twice: once into the index (token ids and doc ids in memory), once for the retrieved texts.

    Raises:
        InputError: a file is missing or has a bad line, a judged query has no text, no query has any candidate, or
            `out` holds an ingest already.
        ConfigError: depth, k1 or b out of range.
    """
    check_depth(depth)
    bm25.check_parameters(k1, b)
    check_out(out, overwrite)
    bad = BadLines(skip=skip_bad_lines)
    sources = [beir.find_file(folder, name) for name in beir.file_names(split)]
    corpus_path, queries_path = sources[:2]
    queries = list(beir.read_queries(queries_path, bad))
    qrels: Qrels = {}
    if split is not None:
        qrels = beir.read_qrels(sources[-1], bad)
        _report_unknown(sources[-1], qrels, {q.query_id for q in queries}, queries_path, bad)
        queries = [q for q in queries if q.query_id in qrels]

    corpus = ((d.doc_id, d.contents) for d in beir.read_corpus(corpus_path, bad))
    index = bm25.BM25Index.build(corpus, k1=k1, b=b, source=corpus_path)
    retrieved = [index.top(q.text, depth) for q in queries]
    needed = {index.doc_ids[p] for positions, _ in retrieved for p in positions}
    # The index's pass has reported the corpus' bad lines already.
    documents = fetch(needed, beir.read_corpus(corpus_path, BadLines(skip=True), needed))

    def candidate_lists() -> Iterator[tuple[Query, tuple[Candidate, ...]]]:
        for query, (positions, scores) in zip(queries, retrieved, strict=True):
            found = zip(positions, scores, strict=True)
            yield query, tuple(replace(documents[index.doc_ids[p]], score=float(s)) for p, s in found)

    return _write(
        candidate_lists(),
        out,
        kind="beir",
        sources=sources,
        qrels=qrels,
        bad=bad,
        instruction=instruction,
        parameters={"split": split, "depth": depth, "k1": k1, "b": b, "stopwords": bm25.STOPWORDS},
        overwrite=overwrite,
    )


def ingest_hits(
    files: Sequence[str],
    qrels: str | None = None,
    *,
    out: str,
    depth: int | None = None,
    instruction: str | None = None,
    skip_bad_lines: bool = False,
    overwrite: bool = False,
) -> IngestSummary:
    """Convert RankGPT or RankLLM hits files (JSON or JSONL, `.gz` included), one after the other.

    A file that is one JSON array is read whole; JSONL is streamed. `depth` keeps the first candidates of each list.

    Raises:
        InputError: a bad entry, a query id in two files, no entries at all, or `out` holds an ingest already.
    """
    check_depth(depth)
    check_out(out, overwrite)
    bad = BadLines(skip=skip_bad_lines)
    gains = read_qrels(qrels, bad) if qrels else {}

    def candidate_lists() -> Iterator[tuple[Query, tuple[Candidate, ...]]]:
        file_of: dict[str, str] = {}
        for path in files:
            for candidate_list in hits.read_hits(path, bad):
                query = candidate_list.query
                if query.query_id in file_of:
                    raise InputError(
                        f"{path}: query {query.query_id!r} is also in {file_of[query.query_id]}: a query has one "
                        "candidate list; ingest the files into two folders or drop one of the entries"
                    )
                file_of[query.query_id] = path
                yield query, candidate_list.candidates[:depth]

    return _write(
        candidate_lists(),
        out,
        kind="hits",
        sources=[*files, *([qrels] if qrels else [])],
        qrels=gains,
        bad=bad,
        instruction=instruction,
        parameters={"depth": depth},
        overwrite=overwrite,
    )


def ingest_trec(
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
    """Join a TREC run with its topics and its collection (TSV or JSONL each), in the order of the topics.

    The run, and the texts of the documents it names down to `depth`, are held in memory; the collection is streamed.

    Raises:
        InputError: a bad line, a query or document of the run that topics or collection lack, no query with
            candidates, or `out` holds an ingest already.
    """
    check_depth(depth)
    check_out(out, overwrite)
    bad = BadLines(skip=skip_bad_lines)
    gains = read_qrels(qrels, bad) if qrels else {}
    return _write(
        joined_run(run, queries, corpus, depth, bad),
        out,
        kind="trec",
        sources=[run, queries, corpus, *([qrels] if qrels else [])],
        qrels=gains,
        bad=bad,
        instruction=instruction,
        parameters={"depth": depth},
        overwrite=overwrite,
    )


def joined_run(
    run: str, queries: str, corpus: str, depth: int | None, bad: BadLines
) -> Iterator[tuple[Query, tuple[Candidate, ...]]]:
    """Each topic with what the run found for it, in the run's order."""
    topics = list(trec.read_topics(queries, bad))
    entries = {query_id: found[:depth] for query_id, found in trec.read_run(run, bad).items()}
    _report_unknown(run, entries, {q.query_id for q in topics}, queries, bad)
    needed = {e.doc_id for query in topics for e in entries.get(query.query_id, ())}
    documents = fetch(needed, trec.read_collection(corpus, bad, needed))
    return (
        (query, tuple(hydrate(entries.get(query.query_id, ()), documents, run_path=run, bad=bad))) for query in topics
    )


def ingest_merge(
    inputs: Sequence[str],
    *,
    out: str,
    method: str = "rrf",
    depth: int | None = None,
    overwrite: bool = False,
) -> IngestSummary:
    """Merge the candidates of several first stages over the same queries, by doc id: harder and more varied negatives.

    `inputs` are candidate Parquet or finished ingest runs; `method` is interleave or rrf (rerank_ray.formats.merge);
    `depth` keeps the first candidates of each merged list.

    Raises:
        InputError: an input is no candidate Parquet, two disagree on a query or a gain, or `out` is one of them or
            holds an ingest already.
    """
    check_depth(depth)
    sources = [resolve_input(uri) for uri in inputs]
    for uri, source in zip(inputs, sources, strict=True):
        check_apart(uri, source, out)
    check_out(out, overwrite)
    lists = ((query, candidates[:depth]) for query, candidates in merge.read_merged(sources, method))
    return _write(
        lists,
        out,
        kind="merge",
        sources=inputs,
        qrels={},
        bad=BadLines(),
        instruction=None,
        parameters={"method": method, "depth": depth},
        overwrite=overwrite,
    )


def check_depth(depth: int | None) -> None:
    if depth is not None and depth < 1:
        raise ConfigError(f"depth={depth}: keep at least one candidate a query")


def check_apart(uri: str, source: str, out: str) -> None:
    """Refuse to write to the folder that is read or that holds it; `source` was given as `uri`."""
    if storage.is_within(source, out):
        raise InputError(f"{uri}: is in {out}, the folder to write to: name another --out, or the input would be lost")


def _report_unknown(path: str, query_ids: Iterable[str], known: set[str], queries_path: str, bad: BadLines) -> None:
    for query_id in query_ids:
        if query_id not in known:
            fix = "add the query or remove its lines"
            bad.report(path, f"query {query_id!r}", f"its text is not in {queries_path}", fix)


def judged(
    lists: Iterable[tuple[Query, tuple[Candidate, ...]]], qrels: Qrels, sources: Sequence[str], without: list[str]
) -> Iterator[CandidateList]:
    """Lists with gains, unchanged where there are no qrels at all; queries without candidates go to `without` instead.

    Raises:
        InputError: at the end, if nothing could be labelled: of another set's qrels nobody would hear.
    """
    query_is_known = document_is_known = False
    # A judged query, and a candidate of its that may not be judged.
    example: tuple[str, str] | None = None
    for query, found in lists:
        gains = qrels.get(query.query_id, {})
        if gains:
            query_is_known = True
            document_is_known |= any(c.doc_id in gains for c in found)
        if not found:
            without.append(query.query_id)
            continue
        if gains and example is None:
            example = query.query_id, found[0].doc_id
        row = CandidateList(query=query, candidates=found)
        yield with_gains(row, gains) if qrels else row
    where = ", ".join(sources)
    if qrels and not query_is_known:
        raise InputError(
            f"{where}: the qrels name none of these queries, but {next(iter(qrels))!r}: these are another set's qrels"
        )
    if example and not document_is_known:
        query_id, doc_id = example
        raise InputError(
            f"{where}: the qrels judge none of the candidates (query {query_id!r}: {doc_id!r} is one, they judge "
            f"{next(iter(qrels[query_id]))!r}): doc ids are written otherwise, or these are another collection's qrels"
        )


def _write(
    lists: Iterable[tuple[Query, tuple[Candidate, ...]]],
    out: str,
    *,
    kind: str,
    sources: Sequence[str],
    qrels: Qrels,
    bad: BadLines,
    instruction: str | None,
    parameters: dict[str, str | int | float | None],
    overwrite: bool,
) -> IngestSummary:
    without: list[str] = []

    def rows() -> Iterator[dict]:
        for row in judged(lists, qrels, sources, without):
            query = replace(row.query, instruction=instruction or row.query.instruction)
            yield schema.candidate_row(replace(row, query=query))

    return write_ingest(
        rows(),
        schema.CANDIDATES,
        out,
        kind=kind,
        sources=sources,
        without=without,
        bad=bad,
        parameters={**parameters, "instruction": instruction},
        overwrite=overwrite,
    )


def write_ingest(
    rows: Iterable[dict],
    table: pa.Schema,
    out: str,
    *,
    kind: str,
    sources: Sequence[str],
    without: Sequence[str],
    bad: BadLines,
    parameters: dict[str, str | int | float | None],
    overwrite: bool,
) -> IngestSummary:
    """Write rows and their summary; `without` is read when all rows are made, for making them fills it.

    Raises:
        InputError: there is no row, or `out` has come to hold an ingest since `check_out`.
        RunError: another process writes to `out`.
    """
    candidates = labelled = 0

    def counted() -> Iterator[dict]:
        nonlocal candidates, labelled
        for row in rows:
            # Rows that are copied may break the contract.
            found = [c for c in row["candidates"] or () if c]
            candidates += len(found)
            labelled += sum(c["label"] is not None for c in found)
            yield row

    with RunFolder(uri=out).locked():
        # Another ingest may have ended here while this one read its sources.
        check_out(out, overwrite)
        written = _write_parts(counted(), table, out)
        if not written:
            raise InputError(
                f"{', '.join(sources)}: nothing was ingested: {len(without)} queries, none of them with a candidate "
                f"({bad.count} bad lines): check that the files belong together"
            )
        summary = IngestSummary(
            kind=kind,
            out=str(out),
            sources=tuple(str(s) for s in sources),
            parameters=parameters,
            queries=written + len(without),
            rows=written,
            candidates=candidates,
            queries_without_candidates=tuple(without),
            labelled_pairs=labelled,
            bad_lines=bad.count,
            bad_lines_listed=tuple(str(line) for line in bad.listed),
            rerank_ray_version=__version__,
            schema_version=schema.VERSION,
        )
        text = json.dumps(asdict(summary), indent=2, ensure_ascii=False) + "\n"
        storage.write_text(storage.join(out, INGEST_SUMMARY), text)
    return summary


def _write_parts(rows: Iterable[dict], table: pa.Schema, out: str) -> int:
    """Write rows in an earlier ingest's place; a finished one is deleted when they are all made, and there are some.

    A mistyped path or a bad line, found late since sources are streamed, must not cost it.
    """
    _delete_new(out)
    if not (storage.list_files(out, ".parquet") and ingest_ended(out)):
        _clear_out(out)
        return parquet.write_rows(rows, out, table)
    try:
        written = parquet.write_rows(rows, out, table, suffix=_NEW)
        if written:
            _clear_out(out)
            fs, parts = _new_parts(out)
            for path in parts:
                storage.move(fs, path, path.removesuffix(_NEW))
    finally:
        _delete_new(out)
    return written


def _new_parts(out: str) -> tuple[pa.fs.FileSystem, list[str]]:
    """Parts beside an earlier ingest's, which wait for their place."""
    fs, folder = storage.open_filesystem(out)
    paths = (path for path in storage.list_files(out, _NEW) if posixpath.dirname(path) == folder.rstrip("/"))
    return fs, [path for path in paths if _PART.fullmatch(posixpath.basename(path).removesuffix(_NEW))]


def _delete_new(out: str) -> None:
    """Delete the new parts of an ingest that failed, or was killed, before they had their place."""
    fs, parts = _new_parts(out)
    for path in parts:
        fs.delete_file(path)


def check_out(out: str, overwrite: bool) -> None:
    """Refuse a folder with finished data (unless it may be overwritten) or with Parquet files of something else."""
    if storage.exists(out) and not storage.is_directory(out):
        raise InputError(f"{out}: is a file: name a folder for the Parquet files")
    fs, folder = storage.open_filesystem(out)
    parts = storage.list_files(out, ".parquet")
    for path in parts:
        if not _is_part(fs, folder, path):
            raise InputError(
                f"{path}: a Parquet file that no ingest wrote; jobs would read it too: name another folder"
            )
    if parts and not overwrite and ingest_ended(out):
        raise InputError(f"{out}: already holds data: --overwrite replaces it, or name another folder")


def _is_part(fs: pa.fs.FileSystem, folder: str, path: str) -> bool:
    """Whether a file may be an ingest's, whole or torn: by its place and name, and by its schema if it has one."""
    if posixpath.dirname(path) != folder.rstrip("/") or not _PART.fullmatch(posixpath.basename(path)):
        return False
    try:
        metadata = pq.read_schema(path, filesystem=fs).metadata or {}
    except (pa.ArrowException, OSError):
        return True
    return metadata.get(b"rerank_ray.schema") in (b"candidates", b"labels")


def _clear_out(out: str) -> None:
    """Delete an earlier ingest; whatever ends this one from here on leaves it unfinished."""
    fs, _ = storage.open_filesystem(out)
    storage.write_text(storage.join(out, INGEST_SUMMARY), INGEST_UNFINISHED)
    for path in storage.list_files(out, ".parquet"):
        fs.delete_file(path)
