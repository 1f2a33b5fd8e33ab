"""Qrels in either layout: BEIR's TSV with a header, or TREC's four columns."""

from __future__ import annotations

from rerank_ray.errors import InputError
from rerank_ray.formats import beir, trec
from rerank_ray.formats.lines import BadLines, text_lines


def read_qrels(path: str, bad: BadLines) -> dict[str, dict[str, float]]:
    """Read qrels as query id -> doc id -> gain; a first line that is BEIR's header makes the file a BEIR one.

    Raises:
        InputError: there is no judgment in the file: without qrels nothing would be labelled, and nobody would hear.
    """
    first = next(text_lines(path, BadLines(skip=True)), None)
    is_beir = first is not None and beir.is_qrels_header(first[1])
    gains = beir.read_qrels(path, bad) if is_beir else trec.read_qrels(path, bad)
    if not gains:
        raise InputError(
            f"{path}: holds no judgment that can be read: give TREC's lines (query, 0, document, gain) or BEIR's TSV "
            "with its header, or leave the qrels out"
        )
    return gains
