"""Columns that sentence-transformers' cross-encoder losses train on: labelled lists and margin triplets.

JSONL, or Parquet where the name ends in `.parquet`. As in its collator the label column is told by its name (label,
labels, score, scores) and the others by their order, whatever they are called; no further column is allowed, since it
would be taken for a passage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from rerank_ray import storage
from rerank_ray.formats.lines import (
    BadLines,
    Fault,
    json_object,
    number_field,
    number_list,
    parsed,
    query_text,
    text_field,
    text_list,
)
from rerank_ray.formats.training_data import (
    BYTES_PER_PASS,
    TrainingList,
    TrainingLists,
    json_line,
    passes_over,
    share_of,
    text_id,
)
from rerank_ray.parquet import open_parquet
from rerank_ray.records import Candidate, Labels, Query

LABEL_COLUMNS = ("label", "labels", "score", "scores")
_ROWS_PER_BATCH = 256

T = TypeVar("T")


def read_labeled_lists(path: str, bad: BadLines, lists: TrainingLists) -> Iterator[Labels]:
    """Stream lists of `query`, `docs` and either `labels` (gains) or `scores` (a teacher's)."""

    def parse(place: int | str, item: dict[str, Any]) -> Labels:
        (query, docs), label = _columns(item, 2, "query, docs and labels or scores")
        texts = text_list(item, docs)
        values = number_list(item, label, len(texts), docs)
        is_gain = label.startswith("label")
        if is_gain and any(v < 0 for v in values):
            raise Fault(f"{label!r} holds {min(values):g}, which is no gain", "call teacher scores 'scores'")
        gains = values if is_gain else [None] * len(texts)
        candidates = [Candidate(doc_id=text_id(t), text=t, label=g) for t, g in zip(texts, gains, strict=True)]
        return lists.labels(
            path, place, Query(query_id="", text=query_text(item, (query,))), candidates, None if is_gain else values
        )

    return _rows(path, bad, parse)


def read_margins(
    path: str, bad: BadLines, lists: TrainingLists, *, bytes_per_pass: int = BYTES_PER_PASS
) -> Iterator[Labels]:
    """Read triplets of query, passage, passage and `label`, the difference of the two passages' scores (Margin-MSE,
    Hofstätter et al. 2020).

    Only differences are known, so the triplets of one query and first passage become one list, in which that passage
    scores 0 and each other one what it lies below. They are gathered in passes, like triples.
    """
    passes = passes_over([path], bytes_per_pass)
    for number in range(passes):
        gathered: dict[tuple[str, str], tuple[int | str, dict[str, float]]] = {}
        # The first pass has reported the rows that can't be read.
        for place, query, first, second, margin in _margins(path, BadLines(skip=True) if number else bad):
            if share_of(query, passes) != number:
                continue
            _, below = gathered.setdefault((query, first), (place, {}))
            if below.setdefault(second, 0.0 - margin) != 0.0 - margin:
                reason = f"an earlier triplet of these texts has the margin {0.0 - below[second]:g}, not {margin:g}"
                bad.report(path, place, reason, "keep one of the two")
        for (query, first), (place, below) in gathered.items():
            candidates = [Candidate(doc_id=text_id(t), text=t) for t in (first, *below)]
            scores = [0.0, *below.values()]
            yield from lists.checked(bad, path, place, Query(query_id="", text=query), candidates, scores)


def _margins(path: str, bad: BadLines) -> Iterator[tuple[int | str, str, str, str, float]]:
    def parse(place: int | str, item: dict[str, Any]) -> tuple[int | str, str, str, str, float]:
        (query, first, second), label = _columns(item, 3, "query, positive, negative and label")
        texts = query_text(item, (query,)), text_field(item, (first,)), text_field(item, (second,))
        if texts[1] == texts[2]:
            raise Fault(f"{first!r} and {second!r} are the same text", "leave the triplet out")
        return place, *texts, number_field(item, label)

    return _rows(path, bad, parse)


def _columns(item: dict[str, Any], count: int, layout: str) -> tuple[list[str], str]:
    """The names of the `count` text columns in their order, and of the label column."""
    labels = [name for name in item if name in LABEL_COLUMNS]
    others = [name for name in item if name not in LABEL_COLUMNS]
    if len(labels) != 1 or len(others) != count:
        raise Fault(f"the columns are {', '.join(item) or 'none'}", f"give {layout}, and no others")
    return others, labels[0]


def _rows(path: str, bad: BadLines, parse: Callable[[int | str, dict[str, Any]], T]) -> Iterator[T]:
    if storage.without_options(path).endswith(".parquet"):
        return parsed(path, bad, parse, _parquet_rows(path))
    return parsed(path, bad, lambda number, line: parse(number, json_object(line)))


def _parquet_rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    fs, inner = storage.open_filesystem(path)
    with open_parquet(fs, inner) as file:
        row = 0
        for batch in file.iter_batches(batch_size=_ROWS_PER_BATCH):
            for item in batch.to_pylist():
                yield f"row {row}", item
                row += 1


def labeled_list_line(entry: TrainingList, *, scores: bool) -> str:
    """One list: teacher scores, or gains (0 where unknown), best first."""
    name = "scores" if scores else "labels"
    values = [(c.contents, s if scores else c.label or 0.0) for c, s in (*entry.positives, *entry.negatives)]
    ordered = sorted(values, key=lambda pair: -pair[1])
    return json_line({"query": entry.query.text, "docs": [t for t, _ in ordered], name: [v for _, v in ordered]})


def margin_lines(entry: TrainingList) -> str:
    """Every positive with every negative, and the difference of their scores."""
    return "".join(
        json_line(
            {
                "query": entry.query.text,
                "positive": positive.contents,
                "negative": negative.contents,
                "label": above - below,
            }
        )
        for positive, above in entry.positives
        for negative, below in entry.negatives
    )
