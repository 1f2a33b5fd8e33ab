"""What a model's text says: a permutation, scores or a label, with every repair recorded as a defect.

No text makes a parser fail. A text that answers nothing (empty, a refusal, no answer in it) gives `None`, never a
ranking made up by the repairs, and callers turn that into a missing label.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from rerank_ray.records import Defect, DefectKind

_QUOTED_CHARACTERS = 80
_NUMBER = re.compile(r"\d+")
# A decimal is one number: 8.5 is neither 8 nor 5.
_DECIMAL = re.compile(r"[-+]?(?:\d+(?:[.,]\d+)?|\.\d+)(?:\s*/\s*\d+(?:\.\d+)?)?")
_REFUSAL = re.compile(
    r"\b(?:i['\u2019]?m sorry|i am sorry|i apologi[sz]e|sorry, (?:but )?i|as an ai\b"
    r"|i (?:can(?:no|')t|cannot|can\u2019t|am unable|won['\u2019]t|will not|must decline)|i['\u2019]m unable"
    r"|unable to (?:rank|comply|assist|help))",
    re.IGNORECASE,
)
_REASONING_END = re.compile(r".*</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
_ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Permutation:
    """`order`: a permutation of 0..N−1, best first, or None when the text ranks nothing; with the repairs made."""

    order: tuple[int, ...] | None
    defects: tuple[Defect, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedScores:
    """One score for each identifier asked for; NaN where the text gives none."""

    scores: tuple[float, ...]
    defects: tuple[Defect, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedScore:
    """One number, or None when the text gives none within the bounds."""

    score: float | None
    defects: tuple[Defect, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedLabel:
    """The index of the label that the text chooses, or None."""

    index: int | None
    defects: tuple[Defect, ...] = ()


def split_reasoning(text: str) -> tuple[str, str]:
    """A reasoning model's text as (rationale, answer): around `</think>`, then inside `<answer>` where there is one."""
    end = _REASONING_END.match(text)
    rationale, rest = (text[: end.end()], text[end.end() :]) if end else ("", text)
    answers = _ANSWER.findall(rest)
    if answers:
        rationale, rest = rationale or rest[: rest.lower().rfind("<answer>")], answers[-1]
    rationale = re.sub(r"</?think(?:ing)?>", "", rationale, flags=re.IGNORECASE).strip()
    return rationale, rest.strip()


def parse_permutation(text: str, identifiers: Sequence[str], *, cut_off: bool = False) -> Permutation:
    """Read `[2] > [1] > …`; the first of repeated identifiers counts, unknown ones are dropped, and missing ones follow
    in input order (RankGPT, Sun et al. 2023).

    Args:
        identifiers: the labels of the N passages as the prompt shows them, "1", "2", … or "A", "B", …
        cut_off: the text ended at its token limit.
    """
    defects = [Defect(kind=DefectKind.CUT_OFF, detail=_quoted(text))] if cut_off else []
    nothing = _nothing_in(text)
    index_of = {name.upper(): i for i, name in enumerate(identifiers)}
    found = [] if nothing else _identifiers_in(text, identifiers)
    known = [index_of[name] for name in found if name in index_of]
    if not known:
        kind = nothing or (DefectKind.OUT_OF_RANGE if found else DefectKind.UNPARSED)
        return Permutation(order=None, defects=(*defects, Defect(kind=kind, detail=_quoted(text))))
    order = list(dict.fromkeys(known))
    missing = [i for i in range(len(identifiers)) if i not in set(order)]
    strangers = [name for name in found if name not in index_of]
    repeated = [identifiers[i] for i in order if known.count(i) > 1]
    for kind, names in (
        (DefectKind.OUT_OF_RANGE, strangers),
        (DefectKind.REPEATED, repeated),
        (DefectKind.MISSING, [identifiers[i] for i in missing]),
    ):
        if names:
            defects.append(Defect(kind=kind, detail=f"{', '.join(names[:20])} in {_quoted(text)}"))
    return Permutation(order=(*order, *missing), defects=tuple(defects))


def _identifiers_in(text: str, identifiers: Sequence[str]) -> list[str]:
    """Bracketed identifiers, upper-case; bare ones where the text brackets nothing."""
    if all(name.isdigit() for name in identifiers):
        bracketed = [str(int(n)) for inner in re.findall(r"\[([\d,;>\s]+)\]", text) for n in _NUMBER.findall(inner)]
        if bracketed:
            return bracketed
        # A bare list: numbers joined by '>' or ',' and nothing else, so that "the 3 passages" ranks nothing.
        chains = re.findall(r"\d+(?:\s*[>,]\s*\d+)+", text)
        chain = max(chains, key=len, default="")
        return [str(int(n)) for n in _NUMBER.findall(chain or (text if text.strip().isdigit() else ""))]
    bracketed = [n.upper() for n in re.findall(r"\[\s*([A-Za-z]{1,2})\s*\]", text)]
    if bracketed:
        return bracketed
    chains = re.findall(r"\b[A-Z]{1,2}(?:\s*[>,]\s*[A-Z]{1,2}\b)+", text)
    chain = max(chains, key=len, default="")
    alone = text.strip(" .\n")
    return re.findall(r"[A-Z]{1,2}", chain) or ([alone.upper()] if re.fullmatch(r"[A-Za-z]{1,2}", alone) else [])


def parse_scores(text: str, identifiers: Sequence[str], *, low: float, high: float) -> ParsedScores:
    """Read one number an identifier from JSON (`{"1": 7, …}`) or from lines such as `[1]: 7`.

    A member that is left out, or whose number lies outside [low, high], has no score: it is missing, not 0
    (GroupRank, Sun et al. 2025).
    """
    nothing = _nothing_in(text)
    missing_all = tuple(math.nan for _ in identifiers)
    if nothing:
        return ParsedScores(scores=missing_all, defects=(Defect(kind=nothing, detail=_quoted(text)),))
    entries = _json_entries(text) or _line_entries(text)
    if not entries:
        return ParsedScores(scores=missing_all, defects=(Defect(kind=DefectKind.UNPARSED, detail=_quoted(text)),))
    values: dict[str, float] = {}
    repeated, outside, strangers = [], [], []
    known = {name.upper() for name in identifiers}
    for raw_name, value in entries:
        name = raw_name.upper()
        if name not in known:
            strangers.append(raw_name)
        elif name in values:
            repeated.append(raw_name)
        else:
            if not low <= value <= high:
                outside.append(f"{raw_name}={value:g}")
            values[name] = value if low <= value <= high else math.nan
    missing = [name for name in identifiers if name.upper() not in values]
    defects = [
        Defect(kind=kind, detail=", ".join(names[:20]))
        for kind, names in (
            (DefectKind.OUT_OF_RANGE, strangers + outside),
            (DefectKind.REPEATED, repeated),
            (DefectKind.MISSING, missing),
        )
        if names
    ]
    scores = tuple(values.get(name.upper(), math.nan) for name in identifiers)
    return ParsedScores(scores=scores, defects=tuple(defects))


def _json_entries(text: str) -> list[tuple[str, float]]:
    """(identifier, number) of the last JSON object in the text, repeats kept; [] when there is none."""
    decoder = json.JSONDecoder(object_pairs_hook=lambda pairs: pairs)
    for start in reversed([m.start() for m in re.finditer(r"\{", text)]):
        try:
            pairs, _ = decoder.raw_decode(text[start:])
        except (ValueError, RecursionError):
            continue
        entries = []
        for name, value in pairs:
            if isinstance(value, str):
                number = re.fullmatch(r"\s*([-+]?\d+(?:\.\d+)?)\s*(?:/\s*\d+)?\s*", value)
                value = float(number[1]) if number else None
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                entries.append((name.strip(" []"), float(value)))
        if entries:
            return entries
    return []


def _line_entries(text: str) -> list[tuple[str, float]]:
    pattern = re.compile(r"\[?\s*(\d+|[A-Za-z])\s*\]?\s*[:=]\s*([-+]?\d+(?:\.\d+)?)")
    return [(m[1], float(m[2])) for m in pattern.finditer(text)]


def parse_score(text: str, *, low: float, high: float) -> ParsedScore:
    """The number a text answers with: the last one of its answer. Decimals are read whole, and 7/10 is 7."""
    nothing = _nothing_in(text)
    if nothing:
        return ParsedScore(score=None, defects=(Defect(kind=nothing, detail=_quoted(text)),))
    numbers = [m[0] for m in _DECIMAL.finditer(text)]
    if not numbers:
        return ParsedScore(score=None, defects=(Defect(kind=DefectKind.UNPARSED, detail=_quoted(text)),))
    value = float(numbers[-1].split("/")[0].strip().replace(",", "."))
    if not low <= value <= high:
        return ParsedScore(score=None, defects=(Defect(kind=DefectKind.OUT_OF_RANGE, detail=_quoted(text)),))
    return ParsedScore(score=value)


def parse_label(text: str, labels: Sequence[str]) -> ParsedLabel:
    """The one label that a text names, alone or as "Passage A", "[A]", "A."; two different ones name none."""
    nothing = _nothing_in(text)
    if nothing:
        return ParsedLabel(index=None, defects=(Defect(kind=nothing, detail=_quoted(text)),))
    index_of = {label.upper(): i for i, label in enumerate(labels)}
    start = re.match(r"\W*(?:(?:passage|document|answer(?:\s+is)?)\W+)*(\w+)", text, re.IGNORECASE)
    if start and start[1].upper() in index_of and (len(start[1]) > 1 or _stands_alone(text, start.end(1))):
        return ParsedLabel(index=index_of[start[1].upper()])
    pattern = r"(?:\[\s*|\b(?:passage|document)\s+\[?)({})\b".format("|".join(re.escape(n) for n in labels))
    named = list(dict.fromkeys(index_of[m.upper()] for m in re.findall(pattern, text, re.IGNORECASE)))
    if len(named) == 1:
        return ParsedLabel(index=named[0])
    stranger = re.match(r"\W*(?:passage\s+)?\[?([A-Z]|\d+)\]?\W*$", text)
    kind = DefectKind.OUT_OF_RANGE if stranger else DefectKind.UNPARSED
    return ParsedLabel(index=None, defects=(Defect(kind=kind, detail=_quoted(text)),))


def _stands_alone(text: str, end: int) -> bool:
    """A one-letter label is a label when no sentence follows it: "A" or "A." or "A\\n…", not "A good question"."""
    return re.match(r"\s*(?:[\W_]|$)", text[end:]) is not None and not re.match(r"[ \t]+\w", text[end:])


def _nothing_in(text: str) -> DefectKind | None:
    """Why a text holds no answer at all: it is empty, or it refuses."""
    if not text.strip():
        return DefectKind.EMPTY
    return DefectKind.REFUSAL if _REFUSAL.search(text[:400]) else None


def _quoted(text: str) -> str:
    """A text's beginning, on one line."""
    line = " ".join(text.split())
    return repr(line if len(line) <= _QUOTED_CHARACTERS else line[: _QUOTED_CHARACTERS - 1] + "…")
