"""TREC files: runs, qrels, topics and collections (column layout as in the trec_eval manual)."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rerank_ray import storage
from rerank_ray.errors import InputError
from rerank_ray.formats.lines import (
    FLOAT32_MAX,
    BadLines,
    Fault,
    FirstSeen,
    first_character,
    id_field,
    json_object,
    number_column,
    optional_text,
    parsed,
    query_text,
    text_field,
)
from rerank_ray.parquet import doc_id_path, open_parquet
from rerank_ray.records import Candidate, Query, Ranking

# trec_eval separates columns by C's isspace; Python's `split` would also cut ids at no-break and other wide spaces.
_SPACES = re.compile(r"[ \t\v\f\r]+")
_NOT_IN_AN_ID = re.compile(r"[ \t\n\v\f\r]")
_ROWS_PER_BATCH = 1024

QUERY_IDS = ("_id", "id", "query_id", "qid")
# MS MARCO v2 passages have both: 'pid' names the passage, 'docid' the document it was cut from.
DOC_IDS = ("_id", "id", "pid", "docid", "doc_id")
DOC_TEXTS = ("text", "contents", "content", "segment", "passage")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEntry:
    """One line of a run: a document with its rank and score, and the line that says so."""

    doc_id: str
    rank: int
    score: float
    line_number: int


def read_run(path: str, bad: BadLines) -> dict[str, tuple[RunEntry, ...]]:
    """Read a run (`qid Q0 docid rank score tag`) as query id -> entries, ordered by the rank column.

    The rank column is what the first stage returned. (trec_eval ignores it and sorts by score; where the two differ,
    scores were tied or rounded.) Where ranks repeat within a query, nobody set them, or several runs were put into one
    file, and its scores count. Equal scores keep the file's order. Queries come in the order of their first line, which
    need not be followed by the query's other lines: the run is held in memory, without texts.

    Raises:
        InputError: other than six columns, a rank that is no integer, a score that is no finite number, a document
            twice for one query.
    """
    # Millions of lines: each holds its entry and its document's id, and shares its query's.
    run: dict[str, dict[str, RunEntry]] = {}

    def parse(number: int, line: str) -> None:
        query_id, _, doc_id, rank, score, _ = _columns(line, 6, "qid Q0 docid rank score tag")
        try:
            entry = RunEntry(doc_id=doc_id, rank=int(rank), score=number_column("score", score), line_number=number)
        except ValueError as error:
            raise Fault(f"rank {rank[:40]!r} is not an integer", "write ranks from 1") from error
        first = run.get(query_id, {}).get(doc_id)
        if first is not None:
            raise Fault(
                f"the pair of query and document '{query_id} / {doc_id}' is already used on line {first.line_number}",
                "keep one of the two",
            )
        run.setdefault(query_id, {})[doc_id] = entry

    for _ in parsed(path, bad, parse):
        pass
    return {query_id: _in_order(run.pop(query_id).values()) for query_id in list(run)}


def _in_order(entries: Collection[RunEntry]) -> tuple[RunEntry, ...]:
    has_ranks = len({e.rank for e in entries}) == len(entries)
    return tuple(sorted(entries, key=lambda e: e.rank if has_ranks else -e.score))


def read_qrels(path: str, bad: BadLines) -> dict[str, dict[str, float]]:
    """Read qrels (`qid iteration docid gain`) as query id -> doc id -> gain, in file order."""
    seen = FirstSeen("the pair of query and document")

    def parse(number: int, line: str) -> tuple[str, str, float]:
        query_id, _, doc_id, gain = _columns(line, 4, "qid iteration docid gain")
        value = number_column("gain", gain)
        seen.check((query_id, doc_id), number)
        return query_id, doc_id, value

    qrels: dict[str, dict[str, float]] = {}
    for query_id, doc_id, gain in parsed(path, bad, parse):
        qrels.setdefault(query_id, {})[doc_id] = gain
    return qrels


def _columns(line: str, count: int, layout: str) -> list[str]:
    columns = _SPACES.split(line.strip(" \t\v\f\r"))
    if len(columns) != count:
        raise Fault(f"{len(columns)} columns, not {count}", f"write `{layout}`, separated by blanks")
    return columns


def check_ids(uri: str) -> None:
    """Check, before anything is ranked, that a TREC run can hold the ids of these candidate lists.

    Raises:
        InputError: naming the file, the row and the id.
    """
    fs, _ = storage.open_filesystem(uri)
    for path in storage.list_files(uri, ".parquet"):
        with open_parquet(fs, path) as file:
            row = 0
            for batch in file.iter_batches(batch_size=_ROWS_PER_BATCH, columns=["query_id", doc_id_path(file, path)]):
                lists = batch["candidates"]
                _refuse_blanks(path, "query id", batch["query_id"], range(row, row + batch.num_rows))
                doc_ids = pc.struct_field(pc.list_flatten(lists), 0)
                _refuse_blanks(path, "doc id", doc_ids, pc.add(pc.list_parent_indices(lists), row))
                row += batch.num_rows


def _refuse_blanks(path: str, what: str, ids: pa.Array, rows: Sequence | pa.Array) -> None:
    """`rows` are the ids' in the file. Of a null or empty id a row's own error tells."""
    bad = pc.indices_nonzero(pc.match_substring_regex(ids, _NOT_IN_AN_ID.pattern))
    if len(bad):
        where = bad[0].as_py()
        raise InputError(
            f"{path}: row {rows[where]}: {what} {ids[where].as_py()!r} has blanks, which a TREC run can't hold: give "
            "it another, or set `trec_run: false`"
        )


def write_run(rankings: Iterable[Ranking], path: str, tag: str | None = None) -> int:
    """Write rankings as a TREC run: ranks from 1, strictly descending scores; returns the number of queries written.

    `tag` defaults to each ranking's model, with blanks replaced. Rankings with `error` have no lines. trec_eval sorts
    by score alone, as a 32-bit float, and breaks ties by doc id (the greater id first). So that it evaluates the order
    of the ranking, a score that is not below the one before is written as the next 32-bit float below it; Parquet keeps
    the exact ones. Documents without a score (NaN) come last, with made-up scores below the lowest real one.

    Raises:
        InputError: an id that would break the line into other columns, a score that no 32-bit float holds, or scores
            that do not descend (trec_eval would evaluate another order than the stored one).
    """
    written = 0
    with storage.new_file(path) as stream:
        for ranking in rankings:
            if ranking.error is not None:
                continue
            stream.write("".join(_run_lines(ranking, tag)).encode("utf-8"))
            written += 1
    return written


def _run_lines(ranking: Ranking, tag: str | None) -> Iterator[str]:
    where = f"query {ranking.query_id!r}"
    if ranking.scores is None or len(ranking.scores) != len(ranking.doc_ids):
        raise InputError(f"{where}: a run needs one score per document: rank the query again")
    pairs = list(zip(ranking.doc_ids, ranking.scores, strict=True))
    scored = [(doc_id, score) for doc_id, score in pairs if not math.isnan(score)]
    unscored = [doc_id for doc_id, score in pairs if math.isnan(score)]
    values = [score for _, score in scored]
    if any(abs(v) > FLOAT32_MAX for v in values):
        raise InputError(
            f"{where}: a score is infinite as a 32-bit float: a run holds finite scores, with room below for unscored "
            "ones"
        )
    if any(later > earlier for earlier, later in pairwise(values)):
        raise InputError(f"{where}: scores do not descend, so trec_eval would rank otherwise: sort the documents first")
    values = _strictly_descending(values)
    lowest = min(values, default=0.0)
    # A step under 2^-23 of the score would vanish in 32 bits.
    step = max(1.0, abs(lowest) * 2.0**-20)
    below = [(doc_id, lowest - (i + 1) * step) for i, doc_id in enumerate(unscored)]
    name = _NOT_IN_AN_ID.sub("_", tag if tag is not None else ranking.model) or "-"
    written = zip((doc_id for doc_id, _ in scored), values, strict=True)
    for rank, (doc_id, score) in enumerate([*written, *below], start=1):
        for what, value in (("query id", ranking.query_id), ("doc id", doc_id)):
            if not value or _NOT_IN_AN_ID.search(value):
                raise InputError(f"{where}: {what} {value!r} is empty or has blanks, which a TREC run can't hold")
        yield f"{ranking.query_id} Q0 {doc_id} {rank} {score!r} {name}\n"


def _strictly_descending(scores: Sequence[float]) -> list[float]:
    """Scores that descend as 32-bit floats, too: each as it is, or the next one below that of the document before."""
    descending: list[float] = []
    last = np.float32(np.inf)
    for score in scores:
        value = np.float32(score)
        if value < last:
            descending.append(score)
        else:
            value = np.nextafter(last, np.float32(-np.inf))
            descending.append(float(value))
        last = value
    return descending


def read_topics(path: str, bad: BadLines) -> Iterator[Query]:
    """Stream queries from TSV (`qid<TAB>text`) or JSONL (`_id|id|query_id|qid`, `text|query`).

    A file whose first line starts with `{` is JSONL.
    """
    seen = FirstSeen("query id")
    is_json = first_character(path) == "{"

    def parse(number: int, line: str) -> Query:
        if is_json:
            item = json_object(line)
        else:
            query_id, tab, text = line.partition("\t")
            if not tab:
                raise Fault("no tab", "write `qid<TAB>text`")
            item = {"qid": query_id, "text": text}
        query = Query(query_id=id_field(item, QUERY_IDS), text=query_text(item, ("text", "query")))
        seen.check(query.query_id, number)
        return query

    return parsed(path, bad, parse)


def read_collection(path: str, bad: BadLines, needed: Collection[str] | None = None) -> Iterator[Candidate]:
    """Stream documents, as candidates without scores, from TSV or JSONL.

    TSV has 2 columns (`docid<TAB>text`) or 3 (`docid<TAB>title<TAB>text`); JSONL has `_id|id|pid|docid|doc_id`,
    optionally `title`, and `text|contents|content|segment|passage`, where the first name found counts. A file whose
    first line starts with `{` is JSONL. With `needed`, only those doc ids are yielded, and only theirs are kept to
    find duplicates.
    """
    seen = FirstSeen("doc id")
    is_json = first_character(path) == "{"

    def parse(number: int, line: str) -> Candidate:
        item = json_object(line) if is_json else _collection_columns(line)
        document = Candidate(
            doc_id=id_field(item, DOC_IDS), title=optional_text(item, "title"), text=text_field(item, DOC_TEXTS)
        )
        if needed is None or document.doc_id in needed:
            seen.check(document.doc_id, number)
        return document

    documents = parsed(path, bad, parse)
    return documents if needed is None else (d for d in documents if d.doc_id in needed)


def _collection_columns(line: str) -> dict[str, str]:
    columns = line.split("\t")
    if len(columns) == 2:
        return {"docid": columns[0], "text": columns[1]}
    if len(columns) == 3:
        return {"docid": columns[0], "title": columns[1], "text": columns[2]}
    raise Fault(f"{len(columns)} columns, not 2 or 3", "write `docid<TAB>text` or `docid<TAB>title<TAB>text`")
