"""A ranking that a text gives."""

from __future__ import annotations

import re
from collections.abc import Sequence
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


_RIVALS, _BROKEN = "two different rankings", "a > between its parts"


def _ranked_names(answer: str, known: dict[str, int], cut_off: bool) -> tuple[list[str], str | None, DefectKind | None]:
    """(identifiers in the answer's order, the flaw of their form, why it holds none)."""
    if not answer:
        return [], None, DefectKind.EMPTY
    numeric = all(name.isdigit() for name in known)
    text = NOISE.sub("", answer)
    if cut_off and numeric:
        # The last number may lack digits.
        text = re.sub(r"(?<![0-9])[0-9]++\s*+\Z", "", text)
    bracketed = r"\[\s*+[0-9]++\s*+\]" if numeric else r"\[\s*+[A-Za-z]\s*+\]"
    bare = r"(?<![\w.])[0-9]++(?!\w|\.[0-9]|,[0-9]{3}(?![0-9]))" if numeric else r"(?<!\w)[A-Z](?!\w)"
    item = rf"(?:{bracketed}|{bare})"
    chains = [(m.span(), _names(m[0])) for m in re.finditer(rf"{item}(?:\s*+>\s*+{item})++", text)]
    refusal = REFUSAL.search(text)
    if chains:
        joined = _tiers(text, chains, set(known)) or _without_gaps(text, chains, bracketed)
        (start, _), best = max(enumerate(joined), key=lambda c: (len(set(c[1][1]) & set(known)), c[0]))[1]
        refused = refusal is not None and refusal.start() < start
        if 2 * len(set(best) & set(known)) >= len(known) or ("[" in text[start : start + 1] and not refused):
            flaw = None if any(best == names for _, names in chains) else _BROKEN
            if any(sorted(other) == sorted(best) and other != best for _, other in joined):
                flaw = _RIVALS
            return best, flaw, None
    then = rf"(?:[\s,;]|{_THEN})++"
    lists = rf"^(?:[^:\n]*+:)?[ \t]*+({item}(?:{then}{item})++)[ \t.]*+$|\[\s*+({bare}(?:[\s,;]++{bare})++)\s*+\]"
    listed = re.finditer(lists, text, re.MULTILINE)
    found = [(m.start(), _names(re.sub(_THEN, "", m[1] or m[2]))) for m in listed]
    found += _lines(text, bracketed, known, cut_off)
    whole = re.fullmatch(rf"\s*+({item})[\s.]*+", text)
    found += [(0, _names(whole[1]))] if whole else []
    start, names = max(found, key=lambda f: len(set(f[1]) & set(known)), default=(len(text), []))
    if refusal and refusal.start() < start:
        return [], None, DefectKind.REFUSAL
    count = len(set(names) & set(known))
    nothing_else = re.fullmatch(rf"(?:{item}|[\s,;>.])*+", text)
    return (names, None, None) if 2 * count >= len(known) or count == 0 or nothing_else else ([], None, None)


def _lines(text: str, bracketed: str, known: dict[str, int], cut_off: bool) -> list[tuple[int, list[str]]]:
    """The rankings of lines that bracketed identifiers open, with where they start.

    Numbered lines are one. Others may as well be a summary of the passages, and are when they keep their order or end
    before their end.
    """
    opened = rf"^[ \t]*+({_NUMBERED}|[-–—•+]?+)[ \t]*+({bracketed})"
    lines = [(m.start(), m[1][:1].isalnum(), m[2]) for m in re.finditer(opened, text, re.MULTILINE)]
    rankings = []
    for numbered in (True, False):
        chosen = [(start, name) for start, is_numbered, name in lines if is_numbered is numbered]
        names = _names(" ".join(name for _, name in chosen))
        places = [known[name] for name in names if name in known]
        if chosen and (numbered or (not cut_off and places != sorted(places))):
            rankings.append((chosen[0][0], names))
    return rankings


_THEN = r"(?i:\b(?:and[ \t]++)?+(?:then|followed[ \t]++by|finally|lastly)\b)"
_NUMBERED = r"(?i:rank[ \t]*+)?+[0-9]++(?:st|nd|rd|th)?+[ \t]*+[.):–—-]"
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
