"""Where a text's answer stands, behind its reasoning, and what all parsers say of it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rerank_ray.records import Defect, DefectKind

_QUOTED_CHARACTERS = 80
_NAMES_IN_DETAIL = 20
REFUSAL = re.compile(
    r"\b(?:i['’]?m sorry|i am sorry|i apologi[sz]e|sorry, (?:but )?i|as an ai\b"
    r"|(?:i|we) (?:can(?:['’]?t| ?not)|could(?: not|n['’]t)|am unable|won['’]t|will not|must decline|refuse)\b"
    r"|i['’]m (?:unable|not able)|unable to (?:rank|rate|score|comply|assist|help|determine)"
    r"|(?:is|it['’]s) not possible to|impossible to|none of (?:the|these)\b)",
    re.I,
)
NOISE = re.compile(r"[*`#]|\b(?:passage|document|doc|candidate)s?\b", re.I)
_THINK_TAG = re.compile(r"</?think(?:ing)?>", re.I)
_ANSWER = re.compile(r"<answer>((?:(?!</?answer>).)*+)(</answer>)?+", re.DOTALL | re.I)


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


def nothing_in(text: str) -> DefectKind | None:
    """Why a text holds no answer at all: it is empty, or it refuses."""
    if not text.strip():
        return DefectKind.EMPTY
    return DefectKind.REFUSAL if REFUSAL.search(text) else None


def repairs(where: str, *kinds: tuple[DefectKind, Sequence[str]]) -> list[Defect]:
    """One defect for each kind with names, which it lists, the first of them; `where` follows."""
    return [Defect(kind=k, detail=f"{', '.join(n[:_NAMES_IN_DETAIL])}{where}") for k, n in kinds if n]


def quoted(text: str) -> str:
    """A text's beginning, on one line."""
    line = " ".join(text.split())
    return repr(line if len(line) <= _QUOTED_CHARACTERS else line[: _QUOTED_CHARACTERS - 1] + "…")
