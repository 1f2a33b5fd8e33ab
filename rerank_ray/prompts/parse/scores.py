"""Scores that a text gives: one for each of several passages, or one alone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from rerank_ray.prompts.parse.answer import NOISE, nothing_in, quoted, repairs, split_reasoning
from rerank_ray.records import Defect, DefectKind

# Decimals are one number: 8.5 is neither 8 nor 5. So is 7/10, and so is 8,5, but not 1,000.
_NUMBER = r"[-+]?+(?:[0-9]++(?:\.[0-9]++|,[0-9]{1,2}+(?![0-9]))?+|\.[0-9]++)"
_FRACTION = re.compile(rf"(?<![\w.,])({_NUMBER})(?:\s*+(?:/|out\s+of)\s*+({_NUMBER}))?+(?!\w|,[0-9])", re.I)
_CALLED_SCORE = re.compile(r"\b(?:scores?|rating|relevance|grade|answer)[\"'\s]*+(?:is|of|:|=)?+[\"'\s(\[]*+\Z", re.I)
# What names numbers and gives none: a scale, and its legend "(0 = irrelevant, 10 = perfect)".
_SCALE = re.compile(
    r"\b(?:scale|range|from|between)\b[^.\n0-9]{0,20}+[0-9]++\s*+(?:to|and|-|–)\s*+[0-9]++"
    r"|[\[(]\s*+[0-9]++\s*+(?:[-–]|to\b|\.\.++)\s*+[0-9]++\s*+[\])]"
    r"|\(\s*+[0-9]++\s*+=[^=()\n]++=[^()\n]*+\)",
    re.I,
)
# Scores that may be another's: the highest there is, or what a better passage would have.
_ASIDE = re.compile(
    r"\bmax(?:imum)?+[\s_]++(?:possible\s++)?scores?\W{0,3}+(?:is\s++)?[0-9]++"
    r"|\bscores?\s++of\s++[0-9]++(?=\s++(?:would|could|means)\b)",
    re.I,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedScoreRows:
    """One tuple of numbers for each identifier asked for; None where the text gives none."""

    rows: tuple[tuple[float, ...] | None, ...]
    defects: tuple[Defect, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedScore:
    """One number, or None when the text gives none within the bounds."""

    score: float | None
    defects: tuple[Defect, ...] = ()


def parse_score_rows(
    text: str, identifiers: Sequence[str], bounds: Sequence[tuple[float, float]], *, cut_off: bool = False
) -> ParsedScoreRows:
    """Read `len(bounds)` numbers an identifier from JSON (`{"1": [7, 4.5], …}`, a single one also as `{"1": 7, …}`) or
    from lines such as `[1]: 7, 4.5`.

    The first of repeated identifiers counts. One that is left out, or has a number outside its [low, high] or another
    count of numbers, has none: it is missing, not 0 (GroupRank, Sun et al. 2025).

    Args:
        bounds: (low, high) of each number, both included.
        cut_off: the text ended at its token limit; a number at its very end is not read.
    """
    _, answer = split_reasoning(text)
    cut = (Defect(kind=DefectKind.CUT_OFF, detail=quoted(text)),) if cut_off else ()
    if cut_off:
        answer = re.sub(r"(?<![0-9.])[0-9.]++\s*+\Z", "", answer)
    known = {name.upper() for name in identifiers}
    entries = _json_entries(answer, known, {high for _, high in bounds}) or _line_entries(answer, bounds)
    if not entries:
        kind = nothing_in(answer) or DefectKind.UNPARSED
        nothing = (*cut, Defect(kind=kind, detail=quoted(text)))
        return ParsedScoreRows(rows=(None,) * len(identifiers), defects=nothing)
    rows: dict[str, tuple[float, ...] | None] = {}
    repeated, outside, strangers = [], [], []
    for name, values in entries:
        if name.upper() not in known:
            strangers.append(name)
        elif name.upper() in rows:
            repeated.append(name)
        else:
            fits = len(values) == len(bounds) and all(lo <= v <= hi for v, (lo, hi) in zip(values, bounds, strict=True))
            rows[name.upper()] = values if fits else None
            if not fits:
                outside.append(f"{name}={', '.join(f'{v:g}' for v in values)}")
    defects = repairs(
        "",
        (DefectKind.OUT_OF_RANGE, strangers + outside),
        (DefectKind.REPEATED, repeated),
        (DefectKind.MISSING, [name for name in identifiers if name.upper() not in rows]),
    )
    return ParsedScoreRows(rows=tuple(rows.get(n.upper()) for n in identifiers), defects=(*cut, *defects))


def _json_entries(text: str, known: set[str], wholes: set[float]) -> list[tuple[str, tuple[float, ...]]]:
    """(identifier, numbers) of the JSON object that names most identifiers, the last of equals; repeats are kept."""
    # Integers as floats: Python refuses to read an integer of 5,000 digits.
    decoder = json.JSONDecoder(object_pairs_hook=tuple, parse_int=float)
    best, most = [], 0
    for start in (m.start() for m in re.finditer(r"\{", text)):
        try:
            pairs, _ = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        numbers = [(NOISE.sub("", name).strip(" []."), _numbers(value, wholes)) for name, value in pairs]
        entries = [(name, values) for name, values in numbers if values]
        count = len({name.upper() for name, _ in entries} & known)
        if entries and count >= most:
            best, most = entries, count
    return best


def _numbers(value: object, wholes: set[float]) -> tuple[float, ...]:
    """A JSON value as finite numbers: 7, "7", "7/10" where 10 is among `wholes`, [7, 4.5]; () for anything else."""
    values = value if isinstance(value, list) else [value]
    read = []
    for v in values:
        match = _FRACTION.fullmatch(v.strip()) if isinstance(v, str) else None
        read.append(_as_float(match[1]) if match and (match[2] is None or _as_float(match[2]) in wholes) else v)
    return tuple(read) if all(isinstance(v, float) and math.isfinite(v) for v in read) else ()


def _line_entries(text: str, bounds: Sequence[tuple[float, float]]) -> list[tuple[str, tuple[float, ...]]]:
    number = r"[-+]?+[0-9]++(?:\.[0-9]++)?+"
    pattern = re.compile(
        r"(?:^|[,;{(])[\s\-•\"']*+\[?\s*+([0-9]++|[A-Za-z])\s*+\]?[\s\"']*+[:=]\s*+\[?\s*+"
        rf"({number}(?:\s*+,\s*+{number}){{{len(bounds) - 1}}})(?![\w]|\.[0-9])(?:\s*+/\s*+([0-9]++))?+",
        re.MULTILINE,
    )
    return [
        (m[1].lstrip("0") or "0" if m[1].isdigit() else m[1], tuple(float(n) for n in re.findall(number, m[2])))
        for m in pattern.finditer(NOISE.sub("", text))
        if m[3] is None or float(m[3]) == bounds[-1][1]
    ]


def parse_score(text: str, *, low: float, high: float, cut_off: bool = False) -> ParsedScore:
    """The number a text answers with: the last one said to be the score, or the only one there is.

    "8", "8. It …" and "the score is 8" say so. Decimals are read whole; 7/10 and "7 out of 10" are 7 where 10 is
    `high`, and no score otherwise. A text that was cut off may not have come to its answer, so that an only number
    means nothing there.
    """
    _, answer = split_reasoning(text)
    cut = (Defect(kind=DefectKind.CUT_OFF, detail=quoted(text)),) if cut_off else ()
    plain = _SCALE.sub("", answer)
    numbers = [m for m in _FRACTION.finditer(plain) if not (cut_off and m.end() == len(plain))]
    stated = [m for m in numbers if is_stated(plain, m)]
    asides = [m.span() for m in _ASIDE.finditer(plain)]
    stated = [m for m in stated if not any(a <= m.start() < b for a, b in asides)] or stated
    kind = None if stated else nothing_in(answer)
    alone = not cut_off and kind is None and len({m[0] for m in numbers}) == 1
    if not stated and not alone:
        defect = Defect(kind=kind or DefectKind.UNPARSED, detail=quoted(text))
        return ParsedScore(score=None, defects=(*cut, defect))
    chosen = (stated or numbers)[-1]
    value = _as_float(chosen[1])
    if not low <= value <= high or (chosen[2] is not None and _as_float(chosen[2]) != high):
        return ParsedScore(score=None, defects=(*cut, Defect(kind=DefectKind.OUT_OF_RANGE, detail=quoted(text))))
    # -0 is 0.
    return ParsedScore(score=value or 0.0, defects=cut)


def is_stated(text: str, number: re.Match) -> bool:
    """Whether a number in a text is said to be the score: it follows that word, or stands at the start for itself."""
    before = text[max(0, number.start() - 40) : number.start()]
    if _CALLED_SCORE.search(before):
        return True
    return not text[: number.start()].strip(" \n\t\"'([") and re.match(r"[ \t]++\w", text[number.end() :]) is None


def _as_float(number: str) -> float:
    return float(number.replace(",", "."))
