"""Candidate lists as RankGPT and RankLLM write them: JSON or JSONL, `.gz` included.

RankGPT (Sun et al., 2023, arXiv:2304.09542): `{"query": TEXT, "hits": [{"content", "qid", "docid", "rank", "score"}]}`.
RankLLM (Sharifymoghaddam et al., 2025, arXiv:2505.19284):
`{"query": {"text", "qid"}, "candidates": [{"docid", "score", "doc": {...}}]}`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from rerank_ray import storage
from rerank_ray.errors import InputError
from rerank_ray.formats.lines import (
    BadLines,
    Fault,
    FirstSeen,
    first_character,
    id_field,
    json_object,
    optional_number,
    optional_text,
    parsed,
    query_text,
    text_field,
)
from rerank_ray.records import Candidate, CandidateList, Query

_RANKLLM_TEXTS = ("contents", "content", "text", "segment", "passage", "body")


def read_hits(path: str, bad: BadLines) -> Iterator[CandidateList]:
    """Read candidate lists, each in rank order (file order for equal ranks and where there are none).

    A file that starts with `[` is one JSON array, which is read whole; any other is JSONL and is streamed. An entry
    with any fault is left out as a whole when bad lines are skipped: a list that lacks some of its candidates is not
    the list that was retrieved. In an array, "line" means the entry's number from 1.

    Raises:
        InputError: not JSON (an array that can't be parsed is never skipped), no query text, no hits, hits of more
            than one query, a doc id twice, a query id twice in the file, fields of other types.
    """
    seen = FirstSeen("query id")

    def checked(place: int | str, item: object) -> CandidateList:
        if not isinstance(item, dict):
            raise Fault("not a JSON object", 'write {"query": …, "hits": […]}')
        candidate_list = _candidate_list(item)
        seen.check(candidate_list.query.query_id, place)
        return candidate_list

    if first_character(path) == "[":
        return parsed(path, bad, checked, _array_entries(path))
    return parsed(path, bad, lambda number, line: checked(number, json_object(line)))


def _array_entries(path: str) -> Iterator[tuple[str, object]]:
    for number, item in enumerate(_load_array(path), start=1):
        yield f"entry {number}", item


def _load_array(path: str) -> list:
    fs, inner = storage.open_filesystem(path)
    try:
        with fs.open_input_stream(inner, compression="detect") as stream:
            return json.loads(stream.read().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}:{error.lineno}: not JSON ({error.msg}): the file is damaged; write it again"
        ) from error
    except (ValueError, RecursionError, OSError, pa.ArrowException) as error:
        raise InputError(f"{path}:1: not a JSON array ({str(error)[:200]}): write it again as UTF-8 JSON") from error


def _candidate_list(item: dict[str, Any]) -> CandidateList:
    is_rankllm = "candidates" in item
    name = "candidates" if is_rankllm else "hits"
    hits = item.get(name)
    if not isinstance(hits, list) or not hits:
        raise Fault(f"{name!r} is missing, empty or no array", "give the query its hits or leave it out")
    if not all(isinstance(hit, dict) for hit in hits):
        raise Fault(f"{name!r} holds something that is not an object", 'write {"content", "qid", "docid", …}')
    query = _rankllm_query(item) if is_rankllm else _rankgpt_query(item, hits)
    candidates = [_rankllm_candidate(hit) if is_rankllm else _rankgpt_candidate(hit) for hit in hits]
    order = _rank_order(hits)
    doc_ids = FirstSeen("doc id")
    for position, i in enumerate(order, start=1):
        doc_ids.check(candidates[i].doc_id, f"hit {position}")
    return CandidateList(query=query, candidates=tuple(candidates[i] for i in order))


def _rankgpt_query(item: dict[str, Any], hits: list[dict]) -> Query:
    query_ids = {id_field(hit, ("qid",)) for hit in hits}
    if len(query_ids) > 1:
        raise Fault(
            f"hits of {len(query_ids)} query ids ({', '.join(sorted(query_ids)[:3])})", "write one entry a query"
        )
    return Query(query_id=query_ids.pop(), text=query_text(item, ("query",)))


def _rankllm_query(item: dict[str, Any]) -> Query:
    query = item.get("query")
    if not isinstance(query, dict):
        raise Fault("'query' is missing or no object", 'write {"text": …, "qid": …}')
    return Query(query_id=id_field(query, ("qid",)), text=query_text(query, ("text",)))


def _rankgpt_candidate(hit: dict[str, Any]) -> Candidate:
    return Candidate(
        doc_id=id_field(hit, ("docid",)),
        title=optional_text(hit, "title"),
        text=text_field(hit, ("content",)),
        score=optional_number(hit, "score"),
    )


def _rankllm_candidate(hit: dict[str, Any]) -> Candidate:
    document = hit.get("doc")
    if not isinstance(document, dict):
        raise Fault("a candidate's 'doc' is missing or no object", 'write {"contents": …}')
    return Candidate(
        doc_id=id_field(hit, ("docid",)),
        title=optional_text(document, "title"),
        text=text_field(document, _RANKLLM_TEXTS),
        score=optional_number(hit, "score"),
    )


def _rank_order(hits: list[dict]) -> list[int]:
    ranks = [hit.get("rank") for hit in hits]
    if all(rank is None for rank in ranks):
        return list(range(len(hits)))
    if not all(isinstance(rank, int) and not isinstance(rank, bool) for rank in ranks):
        raise Fault("a hit's 'rank' is missing or no integer", "give every hit its rank, or none")
    return sorted(range(len(hits)), key=lambda i: ranks[i])
