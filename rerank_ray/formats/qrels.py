"""Qrels in either layout: BEIR's TSV with a header, or TREC's four columns."""

from __future__ import annotations

from rerank_ray.formats import beir, trec
from rerank_ray.formats.lines import BadLines, text_lines


def read_qrels(path: str, bad: BadLines) -> dict[str, dict[str, float]]:
    """Read qrels as query id -> doc id -> gain; a first line that is BEIR's header makes the file a BEIR one."""
    first = next(text_lines(path, BadLines(skip=True)), None)
    is_beir = first is not None and beir.is_qrels_header(first[1])
    return beir.read_qrels(path, bad) if is_beir else trec.read_qrels(path, bad)
