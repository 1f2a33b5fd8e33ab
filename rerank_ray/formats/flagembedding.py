"""FlagEmbedding's training data: JSONL with `query, pos, neg`, and `pos_scores, neg_scores` for distillation.

`prompt` is the instruction. Ids are not FlagEmbedding's: `query_id`, `pos_id` and `neg_id` are read where they are and
always written, which its readers do not mind.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rerank_ray.formats.lines import (
    BadLines,
    Fault,
    id_field,
    id_list,
    json_object,
    number_list,
    optional_text,
    parsed,
    query_text,
    text_list,
)
from rerank_ray.formats.training_data import TrainingList, TrainingLists, json_line, text_id
from rerank_ray.records import Candidate, Labels, Query


def read_flagembedding(path: str, bad: BadLines, lists: TrainingLists) -> Iterator[Labels]:
    """Stream one list a line, positives (gain 1) before negatives (gain 0)."""

    def parse(number: int, line: str) -> Labels:
        item = json_object(line)
        query = Query(
            query_id=id_field(item, ("query_id",)) if item.get("query_id") is not None else "",
            text=query_text(item, ("query",)),
            instruction=optional_text(item, "prompt"),
        )
        candidates = [*_candidates(item, "pos", 1.0), *_candidates(item, "neg", 0.0)]
        return lists.labels(path, number, query, candidates, _scores(item))

    return parsed(path, bad, parse)


def _candidates(item: dict[str, Any], side: str, gain: float) -> list[Candidate]:
    texts = text_list(item, side)
    ids = [text_id(t) for t in texts] if item.get(f"{side}_id") is None else id_list(item, f"{side}_id")
    if len(ids) != len(texts):
        raise Fault(f"'{side}_id' has {len(ids)} entries for {len(texts)} in {side!r}", "give each its own")
    return [Candidate(doc_id=i, text=t, label=gain) for i, t in zip(ids, texts, strict=True)]


def _scores(item: dict[str, Any]) -> list[float] | None:
    given = [side for side in ("pos", "neg") if item.get(f"{side}_scores") is not None]
    if not given:
        return None
    if len(given) == 1:
        raise Fault(f"'{given[0]}_scores' without the other side's", "give both or neither")
    return [s for side in given for s in number_list(item, f"{side}_scores", len(item[side]), side)]


def flagembedding_line(entry: TrainingList, *, scores: bool) -> str:
    """One line of the format; `scores` adds the teacher's."""
    item: dict[str, Any] = {"query_id": entry.query.query_id, "query": entry.query.text}
    sides = {"pos": entry.positives, "neg": entry.negatives}
    item |= {side: [c.contents for c, _ in pairs] for side, pairs in sides.items()}
    if scores:
        item |= {f"{side}_scores": [s for _, s in pairs] for side, pairs in sides.items()}
    item |= {f"{side}_id": [c.doc_id for c, _ in pairs] for side, pairs in sides.items()}
    if entry.query.instruction is not None:
        item["prompt"] = entry.query.instruction
    return json_line(item)
