"""BEIR folders: `corpus.jsonl`, `queries.jsonl` and `qrels/<split>.tsv` (Thakur et al., 2021, arXiv:2104.08663)."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from rerank_ray import storage
from rerank_ray.errors import InputError
from rerank_ray.formats.lines import (
    BadLines,
    Fault,
    FirstSeen,
    id_field,
    json_object,
    number_column,
    optional_text,
    parsed,
    query_text,
    text_field,
    text_lines,
)
from rerank_ray.records import Candidate, Query

QRELS_HEADER = ["query-id", "corpus-id", "score"]


def file_names(split: str | None) -> list[str]:
    """What is read of a BEIR folder; without a split, all queries and no qrels."""
    return ["corpus.jsonl", "queries.jsonl", *([] if split is None else [f"qrels/{split}.tsv"])]


def look_for(folder: str, name: str) -> str | None:
    """The file `name` of a BEIR folder, or its `.gz` twin, or None where there is neither."""
    return next(filter(storage.exists, (storage.join(folder, name), storage.join(folder, name + ".gz"))), None)


def find_file(folder: str, name: str) -> str:
    """The file `name` of a BEIR folder, or its `.gz` twin.

    Raises:
        InputError: there is neither.
    """
    if path := look_for(folder, name):
        return path
    raise InputError(
        f"{storage.join(folder, name)}: no such file: a BEIR folder holds corpus.jsonl, queries.jsonl and "
        "qrels/<split>.tsv (for a folder without qrels give no split)"
    )


def read_corpus(path: str, bad: BadLines, needed: Collection[str] | None = None) -> Iterator[Candidate]:
    """Stream the documents of `corpus.jsonl` (`_id`, `title`, `text`) as candidates without scores.

    With `needed`, only those doc ids are yielded, and only theirs are kept to find duplicates.
    """
    seen = FirstSeen("doc id")

    def parse(number: int, line: str) -> Candidate:
        item = json_object(line)
        document = Candidate(
            doc_id=id_field(item, ("_id",)), title=optional_text(item, "title"), text=text_field(item, ("text",))
        )
        if needed is None or document.doc_id in needed:
            seen.check(document.doc_id, number)
        return document

    documents = parsed(path, bad, parse)
    return documents if needed is None else (d for d in documents if d.doc_id in needed)


def read_queries(path: str, bad: BadLines) -> Iterator[Query]:
    """Stream the queries of `queries.jsonl` (`_id`, `text`)."""
    seen = FirstSeen("query id")

    def parse(number: int, line: str) -> Query:
        item = json_object(line)
        query = Query(query_id=id_field(item, ("_id",)), text=query_text(item, ("text",)))
        seen.check(query.query_id, number)
        return query

    return parsed(path, bad, parse)


def is_qrels_header(line: str) -> bool:
    return [column.strip() for column in line.split("\t")] == QRELS_HEADER


def read_qrels(path: str, bad: BadLines) -> dict[str, dict[str, float]]:
    """Read `qrels/<split>.tsv` as query id -> doc id -> gain, in file order.

    Raises:
        InputError: the first line is not the header (never skipped: it would hide a judgment); bad lines.
    """
    first = next(text_lines(path, BadLines(skip=True)), None)
    if first is None or not is_qrels_header(first[1]):
        raise InputError(
            f"{path}:{first[0] if first else 1}: the first line is not the header "
            "'query-id<TAB>corpus-id<TAB>score': add it, or take the file for TREC qrels if it has four columns"
        )
    header = first[0]
    seen = FirstSeen("the pair of query and document")
    qrels: dict[str, dict[str, float]] = {}

    def parse(number: int, line: str) -> tuple[str, str, float] | None:
        if number == header:
            return None
        columns = line.split("\t")
        if len(columns) != 3:
            raise Fault(f"{len(columns)} columns, not 3", "write query-id, corpus-id and score between tabs")
        # Padded columns are aligned for readers, as the header's may be.
        query_id, doc_id, score = (column.strip(" ") for column in columns)
        if not query_id.strip() or not doc_id.strip():
            raise Fault("an id is empty", "give both ids")
        gain = number_column("score", score)
        seen.check((query_id, doc_id), number)
        return query_id, doc_id, gain

    for judgment in parsed(path, bad, parse):
        if judgment is not None:
            query_id, doc_id, gain = judgment
            qrels.setdefault(query_id, {})[doc_id] = gain
    return qrels
