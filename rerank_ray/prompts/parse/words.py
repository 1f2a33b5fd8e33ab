"""Words that a text gives: a label, the entries of a list, a query."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rerank_ray.prompts.parse.answer import REFUSAL, answer_span, nothing_in, quoted, repairs, split_reasoning
from rerank_ray.records import Defect, DefectKind

_ANOTHER_LABEL = re.compile(
    r"[\s\]]*+(?:[,/&|]|and\b|or\b)[\s\[,]*+(?:(?:and|or)\b)?[\s\[]*+(?:(?:passage|document)\s*+\[?)?(\w++)",
    re.I,
)
# "Passage A does not answer the query": what is said of a passage until the clause's end.
_DENIED = re.compile(r"\]?[^.;:,\n\[]{0,60}?(?:\b(?:not|less|least|no|irrelevant|neither|nor)\b|n['’]t\b)", re.I)
_QUERY_MARKS = re.compile(
    r"\A[\s*#\"“`]*+(?:(?:[0-9]{1,2}[.)]|[-•])\s++)?(?:(?:search\s++)?(?:query|question)(?:\s++[0-9]++)?\s*+:[\s*]*+)?",
    re.I,
)
_QUERY_TASK = re.compile(r"\b(?:quer(?:y|ies)|questions?|passage|help|assist|generate|write|language model)\b", re.I)


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


def parse_label(text: str, labels: Sequence[str], *, cut_off: bool = False) -> ParsedLabel:
    """The one label that a text names, alone or as "Passage A", "[A]", "A."; two different ones name none, nor does one
    of which something is denied.

    Args:
        cut_off: the text ended at its token limit; then only a label at its beginning counts, for prose may have been
            on its way to the other one.
    """
    _, answer = split_reasoning(text)
    index_of = {label.upper(): i for i, label in enumerate(labels)}
    # "I'd" is no label I.
    start = re.match(r"\W*+(?:(?:the|passage|document|answer|is)\b\W*+)*+(\w++)(?!['’]\w)", answer, re.I)
    # A number at the end of what was cut off may lack digits.
    half = cut_off and start and start[1].isdigit() and start.end() == len(answer)
    if start and not half and start[1].upper() in index_of and _stands_alone(answer, start, index_of):
        return ParsedLabel(index=index_of[start[1].upper()])
    kind = nothing_in(answer)
    if kind is None and not cut_off:
        choices = "|".join(re.escape(n) for n in sorted(labels, key=len, reverse=True))
        pattern = rf"(\b(?:not|neither|nor)\s++(?:the\s++)?)?(?:\[\s*+|\b(?:passage|document)\s++\[?)({choices})(?!\w)"
        named: set[int] = set()
        for mention in re.finditer(pattern, answer, re.I):
            if len(named) < 2 and not mention[1] and not _DENIED.match(answer, mention.end()):
                # A pattern that ignores case takes the Kelvin sign for a K, which it is not in upper case.
                here = index_of.get(mention[2].upper())
                named |= {*([] if here is None else [here]), *_joined_to(answer, mention.end(), index_of)}
        if len(named) == 1:
            return ParsedLabel(index=named.pop())
        stranger = re.fullmatch(r"\W*+(?:(?i:passage)\s++)?\[?([A-Z]|[0-9]++)\]?\W*+", answer)
        kind = DefectKind.OUT_OF_RANGE if stranger else DefectKind.UNPARSED
    return ParsedLabel(index=None, defects=(Defect(kind=DefectKind.CUT_OFF if cut_off else kind, detail=quoted(text)),))


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
    cut = (Defect(kind=DefectKind.CUT_OFF, detail=quoted(text)),) if cut_off else ()
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
        kind = nothing_in(answer) or DefectKind.UNPARSED
        return ParsedItems(items=(), defects=(*cut, Defect(kind=kind, detail=quoted(text))))
    defects = repairs(
        f" in {quoted(answer)}",
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
    kind = nothing_in(answer)
    if kind is DefectKind.REFUSAL and not REFUSAL.match(answer.strip()) and not _QUERY_TASK.search(answer):
        kind = None  # a query may well ask what to do when one can't sleep
    if kind is None and cut_off and not rest.strip():
        kind = DefectKind.CUT_OFF
    query = _QUERY_MARKS.sub("", line).strip().strip('"“”*`').strip()
    if kind is None and not any(c.isalnum() for c in query):
        kind = DefectKind.UNPARSED
    if kind is not None:
        return ParsedQuery(query=None, defects=(Defect(kind=kind, detail=quoted(text)),))
    return ParsedQuery(query=query)
