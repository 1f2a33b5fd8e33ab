"""A ranking that a text gives."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rerank_ray.prompts.parse.answer import NOISE, REFUSAL, quoted, repairs, split_reasoning
from rerank_ray.records import Defect, DefectKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Permutation:
    """`order`: a permutation of 0..N−1, best first, or None when the text ranks nothing; with the repairs made.

    The first `named` entries are the text's own; missing ones were appended after them.
    """

    order: tuple[int, ...] | None
    named: int = 0
    defects: tuple[Defect, ...] = ()


def parse_permutation(text: str, identifiers: Sequence[str], *, cut_off: bool = False) -> Permutation:
    """Read `[2] > [1] > …`; the first of repeated identifiers counts, unknown ones are dropped, and missing ones follow
    in input order (RankGPT, Sun et al. 2023).

    A chain of bracketed identifiers is a ranking whatever stands around it. Anything less (bare numbers, a list, lines
    that identifiers open) must name half of the passages, or be the whole answer: an order that is mostly the input's
    is not the model's. Passages that prose mentions are none, nor are lines that go through them in the prompt's order.
    Where a ranking lacks a passage that the text names before it, there is none: "[2] is best. Next: [3] > [1]" would
    put the best passage last.

    Args:
        identifiers: the labels of the N passages as the prompt shows them, "1", "2", … or "A", "B", …
        cut_off: the text ended at its token limit.
    """
    _, answer = split_reasoning(text)
    cut = (Defect(kind=DefectKind.CUT_OFF, detail=quoted(text)),) if cut_off else ()
    index_of = {name.upper(): i for i, name in enumerate(identifiers)}
    found, flaw, kind = _ranked_names(answer, index_of, cut_off)
    known = [index_of[name] for name in found if name in index_of]
    if not known:
        kind = kind or (DefectKind.OUT_OF_RANGE if found else DefectKind.UNPARSED)
        return Permutation(order=None, defects=(*cut, Defect(kind=kind, detail=quoted(answer))))
    named = list(dict.fromkeys(known))
    missing = [i for i in range(len(identifiers)) if i not in set(named)]
    repeated = [identifiers[i] for i in named if known.count(i) > 1]
    defects = repairs(
        f" in {quoted(answer)}",
        (DefectKind.OUT_OF_RANGE, [name for name in found if name not in index_of]),
        (DefectKind.REPEATED, repeated or ([flaw] if flaw == _RIVALS else [])),
        (DefectKind.MISSING, [*([flaw] if flaw == _BROKEN else []), *(identifiers[i] for i in missing)]),
    )
    return Permutation(order=(*named, *missing), named=len(named), defects=(*cut, *defects))


_ARROW = re.compile(r"&gt;|[-=]?>{1,2}|[→⇒≻＞]")
_UNQUOTED = {ord(quote): None for quote in '"“”'}
_REASON = r"\([^()\n]*+\)"
_RIVALS, _BROKEN = "two different rankings", "a > between its parts"


def _ranked_names(answer: str, known: dict[str, int], cut_off: bool) -> tuple[list[str], str | None, DefectKind | None]:
    """(identifiers in the answer's order, the flaw of their form, why it holds none)."""
    if not answer:
        return [], None, DefectKind.EMPTY
    numeric = all(name.isdigit() for name in known)
    text = _ARROW.sub(">", NOISE.sub("", answer).translate(_UNQUOTED))
    if cut_off and numeric:
        # The last number may lack digits.
        text = re.sub(r"(?<![0-9])[0-9]++\s*+\Z", "", text)
    bracketed = r"\[\s*+[0-9]++\s*+\]" if numeric else r"\[\s*+[A-Za-z]\s*+\]"
    bare = r"(?<![\w.])[0-9]++(?!\w|\.[0-9]|,[0-9]{3}(?![0-9]))" if numeric else r"(?<!\w)[A-Z](?!\w)"
    item = rf"(?:{bracketed}|{bare})"
    # "[2] (names the year) > [1]": reasons in brackets are no part of it.
    link = rf"{item}(?:[ \t]*+{_REASON})?+"
    matches = re.finditer(rf"{link}(?:\s*+>\s*+{link})++", text)
    chains = [(m.span(), _names(re.sub(_REASON, "", m[0]))) for m in matches]
    refusal = REFUSAL.search(text)
    if chains:
        joined = _tiers(text, chains, link) or _without_gaps(text, chains, item, bracketed)
        (start, end), best = max(enumerate(joined), key=lambda c: (len(set(c[1][1]) & set(known)), c[0]))[1]
        refused = refusal is not None and refusal.start() < start
        if 2 * len(set(best) & set(known)) >= len(known) or ("[" in text[start : start + 1] and not refused):
            if _passes_over(text[:end], best, known, bracketed):
                return [], None, None
            flaw = None if any(best == names for _, names in chains) else _BROKEN
            if any(sorted(other) == sorted(best) and other != best for _, other in joined):
                flaw = _RIVALS
            return best, flaw, None
    found = [*_listed(text, _Forms(item, bracketed), known, cut_off)]
    start, names = max(found, key=lambda f: len(set(f[1]) & set(known)), default=(len(text), []))
    if refusal and refusal.start() < start:
        return [], None, DefectKind.REFUSAL
    if _passes_over(text[:start], names, known, bracketed):
        return [], None, None
    count = len(set(names) & set(known))
    if 2 * count >= len(known) or count == 0:
        return names, None, None
    shown = _names(" ".join(re.findall(bracketed, text)) or text)
    nothing_else = re.fullmatch(rf"(?:{item}|[\s,;>.])*+", text) and set(names) >= set(shown)
    return (names if nothing_else else []), None, None


class _Forms:
    """Patterns of what may stand in a line; `item` is an identifier, in brackets or bare."""

    def __init__(self, item: str, bracketed: str) -> None:
        run = rf"{item}(?:(?:[ \t,;]|{_THEN})*+{item})*+"
        self.run = re.compile(rf"[ \t]*+(?:[-–—•+][ \t]++)?+({run})[ \t.!,;]*+")
        self.several = re.compile(rf"({bracketed}(?:(?:[ \t,;]|{_THEN})*+{bracketed})++)([ \t.!]*+\Z)?+")
        self.opener = re.compile(rf"[ \t|]*+({_NUMBERED}|[-–—•+]?+)[ \t]*+({bracketed})")
        self.numbered_inside = re.compile(rf"(?<![^\s,;])([0-9]{{1,4}})[.)][ \t]*+({bracketed})")
        self.array = re.compile(rf"\[\s*+({item}(?:[\s,;]++{item})++)\s*+\]")


def _listed(text: str, forms: _Forms, known: dict[str, int], cut_off: bool) -> Iterator[tuple[int, list[str]]]:
    """Every ranking that is a list, with where it starts: numbered lines, lines that hold nothing else, what stands
    behind labels or ends a sentence that says it is an order, arrays, and lines that identifiers open.

    Lines that identifiers open may as well be a summary of the passages, and are when they keep the prompt's order or
    were cut off.
    """
    numbered, opened, labelled, plain = [], [], [], []
    start, unfinished = 0, None
    for line in text.splitlines(keepends=True):
        bare = re.sub(_REASON, "", line).rstrip()
        label, colon, behind = bare.rpartition(":")
        opener, run = forms.opener.match(line), forms.run.fullmatch(bare)
        said = next((m for m in forms.several.finditer(bare) if m[2] is not None), None)
        after = forms.run.fullmatch(behind) if colon and not set(label) & set("[]") else None
        if opener and (opener[1][:1].isalnum() or opener[1][:1] == "("):
            numbered.append((start, _names(opener[2])))
        elif run and unfinished is not None:
            unfinished.extend(_listed_names(run[1]))
        elif run:
            unfinished = _listed_names(run[1])
            plain.append((start, unfinished))
        elif after:
            labelled.append((start, label, _listed_names(after[1]), "[" in after[1]))
        elif said and _ORDER.search(bare, 0, said.start()) and not _LOW_TIER.search(bare, 0, said.start()):
            yield start + said.start(), _listed_names(said[1])
        elif opener:
            opened.append((start, _names(opener[2])))
        if after and bare.endswith(","):
            unfinished = labelled[-1][2]
        elif bare and not run:
            unfinished = None
        start += len(line)
    yield from _joined(numbered)
    yield from plain
    tiers = [t for t in labelled if t[3] or _TIER_WORD.search(t[1])]
    names = [name for *_, of_tier, _ in tiers for name in of_tier]
    if len(tiers) > 1 and len(set(names)) == len(names) and not _LOW_TIER.search(tiers[0][1]):
        yield tiers[0][0], names
    else:
        yield from ((begin, of_label) for begin, label, of_label, _ in labelled if not _LOW_TIER.search(label))
    for begin, of_lines in _joined(opened):
        places = [known[name] for name in of_lines if name in known]
        if not cut_off and places != sorted(places):
            yield begin, of_lines
    inside = list(forms.numbered_inside.finditer(text))
    if [int(m[1]) for m in inside] == list(range(1, len(inside) + 1)):
        yield from _joined([(m.start(), _names(m[2])) for m in inside])
    yield from ((m.start(), _names(m[1])) for m in forms.array.finditer(text))


def _joined(lines: Sequence[tuple[int, list[str]]]) -> list[tuple[int, list[str]]]:
    """What all of the lines name, from the first one's start, or nothing without lines."""
    return [(lines[0][0], [name for _, names in lines for name in names])] if lines else []


_THEN = r"(?i:\b(?:and|then|followed[ \t]++by|finally|lastly)\b)"
_NUMBERED = (
    r"(?:(?i:rank|position|place|no\.?|number)[ \t]*+[0-9]{1,4}+[ \t]*+[.):|–—-]?+"
    r"|\(?+[0-9]{1,4}+(?:st|nd|rd|th)?+[ \t]*+\\?+[.):|–—-])"
)
_ORDER = re.compile(r"\b(?:rank\w*|order\w*|best|first|top|most)\b", re.I)
_TIER_WORD = re.compile(
    r"\b(?:(?:ir)?relevan\w*|best|top|first|second|third|fourth|fifth|next|then|other|others|rest|remaining|last|most|least)\b",
    re.I,
)
_Chain = tuple[tuple[int, int], list[str]]
"""Where a chain of identifiers stands in a text, and what it names."""
_GAP = re.compile(r"(?:[ \t>=,;]|\[[^\[\]\n]*+\])++")
_LOW_TIER = re.compile(
    r"\b(?:least|less|not|no|non|low(?:er|est)?|worst|bottom|others?|rest|remaining|irrelevan\w*|unrelated|off[- ]topic"
    r"|unlike|excluded?|except)\b",
    re.I,
)


def _passes_over(text: str, ranking: Sequence[str], known: dict[str, int], bracketed: str) -> bool:
    """Whether a text, up to where its ranking is, names a passage that the ranking lacks.

    Passages of which a sentence says that they are not relevant may well be missing: last is their place.
    """
    named: set[str] = set()
    for sentence in re.split(r"[.;!?\n]", text):
        if not _LOW_TIER.search(sentence):
            named.update(_names(" ".join(re.findall(bracketed, sentence))))
    return not named.isdisjoint(known.keys() - set(ranking))


def _without_gaps(text: str, chains: Sequence[_Chain], item: str, bracketed: str) -> list[_Chain]:
    """The chains, with what another sign ties to their beginning ("[3] = [1] > [2]"), and those as one that only such
    a sign or an empty bracket parts ("[1] > [2], [3] > [] > [4]")."""
    tied = re.compile(rf"(?:\A|[\n:])[ \t]*+((?:{item}[ \t]*+[=,;][ \t]*+)++)\Z")
    joined: list[_Chain] = []
    for (start, end), names in chains:
        (begin, before_end), before = joined[-1] if joined else ((0, 0), [])
        between = text[before_end:start]
        if joined and _GAP.fullmatch(between):
            parts = [n for m in re.finditer(bracketed, between) for n in _names(m[0])]
            joined[-1] = ((begin, end), [*before, *parts, *names])
        elif lead := tied.search(between):
            joined.append(((before_end + lead.start(1), end), [*_names(lead[1]), *names]))
        else:
            joined.append(((start, end), names))
    return joined


def _tiers(text: str, chains: Sequence[_Chain], link: str) -> list[_Chain]:
    """One ranking of tiers, "Highly relevant: [3]" above "Less relevant: [2] > [4]", or none.

    Every chain must be in a tier, the lowest not the first, and no two may rank the same passage: else one is a guess.
    """
    run = rf"{link}(?:(?:[ \t=,;]++|\s*+>\s*+)*+{link})*+"
    found = [
        m
        for m in re.finditer(rf"^([^\[\]\n>:]*+):\s*+({run})([ \t.,;]*+$)?", text, re.M)
        if _TIER_WORD.search(m[1]) and (">" in m[2] or m[3] is not None)
    ]
    names = [n for m in found for n in _names(re.sub(_REASON, "", m[2]))]
    if len(found) < 2 or _LOW_TIER.search(found[0][1]) or len(set(names)) < len(names):
        return []
    starts, ends = [m.start(2) for m in found], [m.end(2) for m in found]
    for (start, _), _ in chains:
        place = bisect_right(starts, start) - 1
        if place < 0 or start >= ends[place]:
            return []
    return [((starts[0], ends[-1]), names)]


def _listed_names(text: str) -> list[str]:
    return _names(re.sub(_THEN, "", text))


def _names(text: str) -> list[str]:
    """Every number without leading zeros, or letter, of a text that holds nothing else but separators."""
    return [n.lstrip("0") or "0" if n[0].isdigit() else n.upper() for n in re.findall(r"[0-9]++|[A-Za-z]", text)]
