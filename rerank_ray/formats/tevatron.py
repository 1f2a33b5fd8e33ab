"""Tevatron's training data: JSONL with `query_id, query, positive_passages, negative_passages` (Gao et al. 2022,
arXiv:2203.05765), each passage `{"docid", "title", "text"}`. It has no place for a teacher's scores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rerank_ray.formats.lines import (
    BadLines,
    Fault,
    id_field,
    json_object,
    optional_text,
    parsed,
    query_text,
    text_field,
)
from rerank_ray.formats.training_data import TrainingList, TrainingLists, json_line
from rerank_ray.records import Candidate, Labels, Query

_GAINS = {"positive_passages": 1.0, "negative_passages": 0.0}


def read_tevatron(path: str, bad: BadLines, lists: TrainingLists) -> Iterator[Labels]:
    """Stream one list a line, positives (gain 1) before negatives (gain 0)."""

    def parse(number: int, line: str) -> Labels:
        item = json_object(line)
        query = Query(query_id=id_field(item, ("query_id",)), text=query_text(item, ("query",)))
        candidates = [_candidate(p, name, gain) for name, gain in _GAINS.items() for p in _passages(item, name)]
        return lists.labels(path, number, query, candidates, None)

    return parsed(path, bad, parse)


def _passages(item: dict[str, Any], name: str) -> list:
    passages = item.get(name)
    if not isinstance(passages, list):
        raise Fault(f"{name!r} is missing or no array", "write an array, empty if there is none")
    return passages


def _candidate(passage: object, name: str, gain: float) -> Candidate:
    if not isinstance(passage, dict):
        raise Fault(f"{name!r} holds something that is not an object", 'write {"docid", "title", "text"}')
    return Candidate(
        doc_id=id_field(passage, ("docid",)),
        title=optional_text(passage, "title"),
        text=text_field(passage, ("text",)),
        label=gain,
    )


def tevatron_line(entry: TrainingList) -> str:
    """One line of the format."""
    sides = {"positive_passages": entry.positives, "negative_passages": entry.negatives}
    item: dict[str, Any] = {"query_id": entry.query.query_id, "query": entry.query.text}
    for name, pairs in sides.items():
        item[name] = [{"docid": c.doc_id, "title": c.title or "", "text": c.text} for c, _ in pairs]
    return json_line(item)
