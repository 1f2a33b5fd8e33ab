"""What a model's text says: a permutation, scores or a label, with every repair recorded as a defect.

No text makes a parser fail. A text that answers nothing (empty, a refusal, no answer in it) gives `None`, never a
ranking made up by the repairs, and callers turn that into a missing label. Each parser reads the answer that follows a
text's reasoning. Patterns are possessive (`++`): a model may repeat one character a thousand times, and no such text
may cost more than its length.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from rerank_ray.records import Defect, DefectKind

_QUOTED_CHARACTERS = 80
_NAMES_IN_DETAIL = 20
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
_REFUSAL = re.compile(
    r"\b(?:i['’]?m sorry|i am sorry|i apologi[sz]e|sorry, (?:but )?i|as an ai\b"
    r"|(?:i|we) (?:can(?:['’]?t| ?not)|could(?: not|n['’]t)|am unable|won['’]t|will not|must decline|refuse)\b"
    r"|i['’]m (?:unable|not able)|unable to (?:rank|rate|score|comply|assist|help|determine)"
    r"|(?:is|it['’]s) not possible to|impossible to|none of (?:the|these)\b)",
    re.I,
)
_NOISE = re.compile(r"[*`#]|\b(?:passage|document|doc|candidate)s?\b", re.I)
_ANOTHER_LABEL = re.compile(
    r"[\s\]]*+(?:[,/&|]|and\b|or\b)[\s\[,]*+(?:(?:and|or)\b)?[\s\[]*+(?:(?:passage|document)\s*+\[?)?(\w++)",
    re.I,
)
_THINK_TAG = re.compile(r"</?think(?:ing)?>", re.I)
_QUERY_MARKS = re.compile(
    r"\A[\s*#\"“`]*+(?:(?:[0-9]{1,2}[.)]|[-•])\s++)?(?:(?:search\s++)?(?:query|question)(?:\s++[0-9]++)?\s*+:[\s*]*+)?",
    re.I,
)
_QUERY_TASK = re.compile(r"\b(?:quer(?:y|ies)|questions?|passage|help|assist|generate|write|language model)\b", re.I)
_ANSWER = re.compile(r"<answer>((?:(?!</?answer>).)*+)(</answer>)?+", re.DOTALL | re.I)


@dataclass(frozen=True, slots=True, kw_only=True)
class Permutation:
    """`order`: a permutation of 0..N−1, best first, or None when the text ranks nothing; with the repairs made.

    The first `named` entries are the text's own; missing ones were appended after them.
    """

    order: tuple[int, ...] | None
    named: int = 0
    defects: tuple[Defect, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedScores:
    """One score for each identifier asked for; NaN where the text gives none."""

    scores: tuple[float, ...]
    defects: tuple[Defect, ...] = ()


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


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedLabel:
    """The index of the label that the text chooses, or None."""

    index: int | None
    defects: tuple[Defect, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedItems:
    """The entries of a list, () when the text holds none."""

    items: tuple[str, ...]
    defects: tuple[Defect, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedQuery:
    """The query that a text holds, or None."""

    query: str | None
    defects: tuple[Defect, ...] = ()


def split_reasoning(text: str) -> tuple[str, str]:
    """A reasoning model's text as (rationale, answer): around `</think>`, then inside `<answer>` where there is one.

    Reasoning that never ends has no answer. Where the prompt's prefill opens the think block, `text` is prefill + text,
    or a text that was cut off while the model still reasoned could pass for an answer.
    """
    reasoning, answer = answer_span(text)
    return _without_tags(text[: reasoning.stop]), text[answer.start : answer.stop].strip()


def answer_span(text: str) -> tuple[range, range]:
    """Where the rationale and the answer of `split_reasoning` stand in a text, tags and blanks included."""
    tags = list(_THINK_TAG.finditer(text))
    if tags and not tags[-1][0].startswith("</"):
        return range(len(text)), range(len(text), len(text))
    end = tags[-1].end() if tags else 0
    answers = list(_ANSWER.finditer(text, end))
    if not answers:
        return range(end), range(end, len(text))
    answer = next((a for a in reversed(answers) if a[2]), answers[-1])
    return range(end or answer.start()), range(answer.start(1), answer.end(1))


def whole_turn(prefill: str, text: str) -> str:
    """A model's text with the prompt's prefill in front, where that opens a think or answer block: the text alone
    would pass unfinished reasoning off as an answer. A prefill that only leads to the answer is no part of it."""
    return prefill + text if _THINK_TAG.search(prefill) or "<answer>" in prefill.lower() else text


def _without_tags(text: str) -> str:
    return _THINK_TAG.sub("", text).strip()


def parse_permutation(text: str, identifiers: Sequence[str], *, cut_off: bool = False) -> Permutation:
    """Read `[2] > [1] > …`; the first of repeated identifiers counts, unknown ones are dropped, and missing ones follow
    in input order (RankGPT, Sun et al. 2023).

    A chain of bracketed identifiers is a ranking whatever stands around it. Anything less (bare numbers, a list, prose
    that mentions passages) must name half of the passages, or be the whole answer: an order that is mostly the input's
    is not the model's.

    Args:
        identifiers: the labels of the N passages as the prompt shows them, "1", "2", … or "A", "B", …
        cut_off: the text ended at its token limit.
    """
    _, answer = split_reasoning(text)
    cut = (Defect(kind=DefectKind.CUT_OFF, detail=_quoted(text)),) if cut_off else ()
    index_of = {name.upper(): i for i, name in enumerate(identifiers)}
    found, flaw, kind = _ranked_names(answer, index_of, cut_off)
    known = [index_of[name] for name in found if name in index_of]
    if not known:
        kind = kind or (DefectKind.OUT_OF_RANGE if found else DefectKind.UNPARSED)
        return Permutation(order=None, defects=(*cut, Defect(kind=kind, detail=_quoted(answer))))
    named = list(dict.fromkeys(known))
    missing = [i for i in range(len(identifiers)) if i not in set(named)]
    repeated = [identifiers[i] for i in named if known.count(i) > 1]
    defects = _defects(
        f" in {_quoted(answer)}",
        (DefectKind.OUT_OF_RANGE, [name for name in found if name not in index_of]),
        (DefectKind.REPEATED, repeated or ([flaw] if flaw == _RIVALS else [])),
        (DefectKind.MISSING, [*([flaw] if flaw == _BROKEN else []), *(identifiers[i] for i in missing)]),
    )
    return Permutation(order=(*named, *missing), named=len(named), defects=(*cut, *defects))


_RIVALS, _BROKEN = "two different rankings", "a > between its parts"


def _ranked_names(answer: str, known: dict[str, int], cut_off: bool) -> tuple[list[str], str | None, DefectKind | None]:
    """(identifiers in the answer's order, the flaw of their form, why it holds none)."""
    if not answer:
        return [], None, DefectKind.EMPTY
    numeric = all(name.isdigit() for name in known)
    text = _NOISE.sub("", answer)
    if cut_off and numeric:
        # The last number may lack digits.
        text = re.sub(r"(?<![0-9])[0-9]++\s*+\Z", "", text)
    bracketed = r"\[\s*+[0-9]++\s*+\]" if numeric else r"\[\s*+[A-Za-z]\s*+\]"
    bare = r"(?<![\w.])[0-9]++(?!\w|\.[0-9]|,[0-9]{3}(?![0-9]))" if numeric else r"(?<!\w)[A-Z](?!\w)"
    item = rf"(?:{bracketed}|{bare})"
    chains = [(m.span(), _names(m[0])) for m in re.finditer(rf"{item}(?:\s*+>\s*+{item})++", text)]
    refusal = _REFUSAL.search(text)
    if chains:
        joined = _tiers(text, chains, set(known)) or _without_gaps(text, chains, bracketed)
        (start, _), best = max(enumerate(joined), key=lambda c: (len(set(c[1][1]) & set(known)), c[0]))[1]
        refused = refusal is not None and refusal.start() < start
        if 2 * len(set(best) & set(known)) >= len(known) or ("[" in text[start : start + 1] and not refused):
            flaw = None if any(best == names for _, names in chains) else _BROKEN
            if any(sorted(other) == sorted(best) and other != best for _, other in joined):
                flaw = _RIVALS
            return best, flaw, None
    lists = rf"^(?:[^:\n]*+:)?[ \t]*+({item}(?:[\s,;]++{item})++)[ \t.]*+$|\[\s*+({bare}(?:[\s,;]++{bare})++)\s*+\]"
    found = [(m.start(), _names(m[1] or m[2])) for m in re.finditer(lists, text, re.MULTILINE)]
    mentions = list(re.finditer(bracketed, text))
    found += [(mentions[0].start(), _names(" ".join(m[0] for m in mentions)))] if mentions else []
    whole = re.fullmatch(rf"\s*+({item})[\s.]*+", text)
    found += [(0, _names(whole[1]))] if whole else []
    start, names = max(found, key=lambda f: len(set(f[1]) & set(known)), default=(len(text), []))
    if refusal and refusal.start() < start:
        return [], None, DefectKind.REFUSAL
    count = len(set(names) & set(known))
    nothing_else = re.fullmatch(rf"(?:{item}|[\s,;>.])*+", text)
    return (names, None, None) if 2 * count >= len(known) or count == 0 or nothing_else else ([], None, None)


_Chain = tuple[tuple[int, int], list[str]]
"""Where a chain of identifiers stands in a text, and what it names."""
_GAP = re.compile(r"(?:[ \t>=,;]|\[[^\[\]\n]*+\])++")
_TIER = re.compile(r"^[^\[\]\n>:]*?\b(?:ir)?relevan[^\[\]\n>:]*+:[ \t]*+\Z", re.I | re.M)
_LOW_TIER = re.compile(r"\b(?:least|less|not|low|irrelevan\w*)\b", re.I)


def _without_gaps(text: str, chains: Sequence[_Chain], bracketed: str) -> list[_Chain]:
    """The chains, those that only another sign or an empty bracket parts put together ("[1] > [2], [3] > [] > [4]")."""
    joined = [chains[0]]
    for span, names in chains[1:]:
        (start, end), before = joined[-1]
        if _GAP.fullmatch(text, end, span[0]):
            between = [n for m in re.finditer(bracketed, text[end : span[0]]) for n in _names(m[0])]
            joined[-1] = ((start, span[1]), [*before, *between, *names])
        else:
            joined.append((span, names))
    return joined


def _tiers(text: str, chains: Sequence[_Chain], known: set[str]) -> list[_Chain]:
    """One ranking of tiers, "Highly relevant: [3] > [5]" above "Less relevant: [2] > [4]", or none.

    Every chain must be a tier, the lowest not the first, and no two may rank the same passage: else one is a guess.
    """
    labels = [_TIER.search(text, 0, start) for (start, _), _ in chains]
    names = [n for _, of_chain in chains for n in of_chain if n in known]
    if len(chains) < 2 or not all(labels) or _LOW_TIER.search(labels[0][0]) or len(set(names)) < len(names):
        return []
    return [((chains[0][0][0], chains[-1][0][1]), [n for _, of_chain in chains for n in of_chain])]


def _names(text: str) -> list[str]:
    """Every number without leading zeros, or letter, of a text that holds nothing else but separators."""
    return [n.lstrip("0") or "0" if n[0].isdigit() else n.upper() for n in re.findall(r"[0-9]++|[A-Za-z]", text)]


def parse_scores(
    text: str, identifiers: Sequence[str], *, low: float, high: float, cut_off: bool = False
) -> ParsedScores:
    """Read one number an identifier from JSON (`{"1": 7, …}`) or from lines such as `[1]: 7`.

    A member that is left out, or whose number lies outside [low, high], has no score: it is missing, not 0
    (GroupRank, Sun et al. 2025).
    """
    parsed = parse_score_rows(text, identifiers, [(low, high)], cut_off=cut_off)
    scores = tuple(math.nan if row is None else row[0] for row in parsed.rows)
    return ParsedScores(scores=scores, defects=parsed.defects)


def parse_score_rows(
    text: str, identifiers: Sequence[str], bounds: Sequence[tuple[float, float]], *, cut_off: bool = False
) -> ParsedScoreRows:
    """Read `len(bounds)` numbers an identifier from JSON (`{"1": [7, 4.5], …}`) or from lines such as `[1]: 7, 4.5`.

    The first of repeated identifiers counts. One that is left out, or has a number outside its [low, high] or another
    count of numbers, has none.

    Args:
        bounds: (low, high) of each number, both included.
        cut_off: the text ended at its token limit; a number at its very end is not read.
    """
    _, answer = split_reasoning(text)
    cut = (Defect(kind=DefectKind.CUT_OFF, detail=_quoted(text)),) if cut_off else ()
    if cut_off:
        answer = re.sub(r"(?<![0-9.])[0-9.]++\s*+\Z", "", answer)
    known = {name.upper() for name in identifiers}
    entries = _json_entries(answer, known, {high for _, high in bounds}) or _line_entries(answer, bounds)
    if not entries:
        kind = _nothing_in(answer) or DefectKind.UNPARSED
        nothing = (*cut, Defect(kind=kind, detail=_quoted(text)))
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
    defects = _defects(
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
        numbers = [(_NOISE.sub("", name).strip(" []."), _numbers(value, wholes)) for name, value in pairs]
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
        for m in pattern.finditer(_NOISE.sub("", text))
        if m[3] is None or float(m[3]) == bounds[-1][1]
    ]


def parse_score(text: str, *, low: float, high: float, cut_off: bool = False) -> ParsedScore:
    """The number a text answers with: the last one said to be the score, or the only one there is.

    "8", "8. It …" and "the score is 8" say so. Decimals are read whole; 7/10 and "7 out of 10" are 7 where 10 is
    `high`, and no score otherwise. A text that was cut off may not have come to its answer, so that an only number
    means nothing there.
    """
    _, answer = split_reasoning(text)
    cut = (Defect(kind=DefectKind.CUT_OFF, detail=_quoted(text)),) if cut_off else ()
    plain = _SCALE.sub("", answer)
    numbers = [m for m in _FRACTION.finditer(plain) if not (cut_off and m.end() == len(plain))]
    stated = [m for m in numbers if is_stated(plain, m)]
    asides = [m.span() for m in _ASIDE.finditer(plain)]
    stated = [m for m in stated if not any(a <= m.start() < b for a, b in asides)] or stated
    kind = None if stated else _nothing_in(answer)
    alone = not cut_off and kind is None and len({m[0] for m in numbers}) == 1
    if not stated and not alone:
        defect = Defect(kind=kind or DefectKind.UNPARSED, detail=_quoted(text))
        return ParsedScore(score=None, defects=(*cut, defect))
    chosen = (stated or numbers)[-1]
    value = _as_float(chosen[1])
    if not low <= value <= high or (chosen[2] is not None and _as_float(chosen[2]) != high):
        return ParsedScore(score=None, defects=(*cut, Defect(kind=DefectKind.OUT_OF_RANGE, detail=_quoted(text))))
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


def parse_label(text: str, labels: Sequence[str], *, cut_off: bool = False) -> ParsedLabel:
    """The one label that a text names, alone or as "Passage A", "[A]", "A."; two different ones name none.

    Args:
        cut_off: the text ended at its token limit; a defect only where it names no label.
    """
    _, answer = split_reasoning(text)
    index_of = {label.upper(): i for i, label in enumerate(labels)}
    # "I'd" is no label I.
    start = re.match(r"\W*+(?:(?:the|passage|document|answer|is)\b\W*+)*+(\w++)(?!['’]\w)", answer, re.I)
    if start and start[1].upper() in index_of and _stands_alone(answer, start, index_of):
        return ParsedLabel(index=index_of[start[1].upper()])
    kind = _nothing_in(answer)
    if kind is None:
        choices = "|".join(re.escape(n) for n in sorted(labels, key=len, reverse=True))
        pattern = rf"(\b(?:not|neither|nor)\s++(?:the\s++)?)?(?:\[\s*+|\b(?:passage|document)\s++\[?)({choices})(?!\w)"
        named: set[int] = set()
        for mention in re.finditer(pattern, answer, re.I):
            if len(named) < 2 and not mention[1]:
                named |= {index_of[mention[2].upper()], *_joined_to(answer, mention.end(), index_of)}
        if len(named) == 1:
            return ParsedLabel(index=named.pop())
        stranger = re.fullmatch(r"\W*+(?:(?i:passage)\s++)?\[?([A-Z]|[0-9]++)\]?\W*+", answer)
        kind = DefectKind.OUT_OF_RANGE if stranger else DefectKind.UNPARSED
    return ParsedLabel(
        index=None, defects=(Defect(kind=DefectKind.CUT_OFF if cut_off else kind, detail=_quoted(text)),)
    )


def _joined_to(text: str, end: int, index_of: dict[str, int]) -> set[int]:
    """The label that follows one which ends there: B of "Passage A or B"; not the article of "A and a"."""
    other = _ANOTHER_LABEL.match(text, end)
    return {index_of[other[1]]} if other and other[1] in index_of else set()


def _stands_alone(answer: str, label: re.Match, index_of: dict[str, int]) -> bool:
    """Whether a label at the start is the answer: "A", "A." or "A\\n…", but not "A good question", nor "A or B"."""
    rest = answer[label.end() :]
    if re.match(r"[.,][0-9]", rest) or (len(label[1]) == 1 and re.match(r"[ \t]++\w", rest)):
        return False
    other = _ANOTHER_LABEL.match(rest)
    return other is None or other[1].upper() not in index_of or other[1].upper() == label[1].upper()


def parse_items(text: str, count: int, *, cut_off: bool = False) -> ParsedItems:
    """Read the entries of a numbered or dashed list, the first `count` of them; other lines are no entries, nor are
    those of an entry's own list, which is indented, or dashed among numbered ones.

    Args:
        cut_off: the text ended at its token limit; its last entry is not read.
    """
    _, answer = split_reasoning(text)
    cut = (Defect(kind=DefectKind.CUT_OFF, detail=_quoted(text)),) if cut_off else ()
    entry = r"^([ \t]*+)[*#]*+[ \t]*+(?:([0-9])[0-9]*+[.):]|[-•*](?=[ \t]))[ \t*]*+(\S[^\n]*+)$"
    _, span = answer_span(text)
    top = []
    for found in re.finditer(entry, text[span.start : span.stop], re.MULTILINE):
        indent = len(found[1].expandtabs())
        if not top or indent < top[-1][0] + 2:
            top.append((indent, found))
    numbered = [m for _, m in top if m[2]]
    items = [m[3].strip().rstrip("*") for m in (numbered if len(numbered) > 1 else [m for _, m in top])]
    items = items[: -1 if cut_off else None]
    if not items:
        kind = _nothing_in(answer) or DefectKind.UNPARSED
        return ParsedItems(items=(), defects=(*cut, Defect(kind=kind, detail=_quoted(text))))
    defects = _defects(
        f" in {_quoted(answer)}",
        (DefectKind.MISSING, [f"{len(items)} of {count} entries"] if len(items) < count else []),
        (DefectKind.OUT_OF_RANGE, [f"{len(items)} entries for {count}"] if len(items) > count else []),
    )
    return ParsedItems(items=tuple(items[:count]), defects=(*cut, *defects))


def parse_query(text: str, *, cut_off: bool = False) -> ParsedQuery:
    """Read the search query that a text was asked for: its first line, or the one after "Here is a query:", without
    "Query:", a list's marker, or quotes.

    Args:
        cut_off: the text ended at its token limit; a query that ends there is none.
    """
    _, answer = split_reasoning(text)
    line, _, rest = answer.strip().partition("\n")
    if line.rstrip().endswith(":") and rest.strip():
        line, _, rest = rest.strip().partition("\n")
    kind = _nothing_in(answer)
    if kind is DefectKind.REFUSAL and not _REFUSAL.match(answer.strip()) and not _QUERY_TASK.search(answer):
        kind = None  # a query may well ask what to do when one can't sleep
    if kind is None and cut_off and not rest.strip():
        kind = DefectKind.CUT_OFF
    query = _QUERY_MARKS.sub("", line).strip().strip('"“”*`').strip()
    if kind is None and not any(c.isalnum() for c in query):
        kind = DefectKind.UNPARSED
    if kind is not None:
        return ParsedQuery(query=None, defects=(Defect(kind=kind, detail=_quoted(text)),))
    return ParsedQuery(query=query)


def _nothing_in(text: str) -> DefectKind | None:
    """Why a text holds no answer at all: it is empty, or it refuses."""
    if not text.strip():
        return DefectKind.EMPTY
    return DefectKind.REFUSAL if _REFUSAL.search(text) else None


def _defects(where: str, *kinds: tuple[DefectKind, Sequence[str]]) -> list[Defect]:
    return [Defect(kind=k, detail=f"{', '.join(n[:_NAMES_IN_DETAIL])}{where}") for k, n in kinds if n]


def _quoted(text: str) -> str:
    """A text's beginning, on one line."""
    line = " ".join(text.split())
    return repr(line if len(line) <= _QUOTED_CHARACTERS else line[: _QUOTED_CHARACTERS - 1] + "…")
