"""What methods that compare passages share: which labels an answer chooses, and what becomes of comparisons that have
no answer.

1. A comparison without an answer decides nothing, and is a defect.
2. A candidate whose comparisons all went without an answer has no score: its place would be the first stage's.
3. A list in which more than half of the comparisons went without an answer has no scores: its order would be.
4. A list in most of whose comparisons the answers contradict each other keeps its scores, and the defect says that its
   order is mostly the first stage's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rerank_ray.models.protocol import Failure, Result
from rerank_ray.prompts.parse.answer import split_reasoning, whole_turn
from rerank_ray.prompts.parse.words import parse_label
from rerank_ray.records import CandidateList, Defect, DefectKind, Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The labels that an answer prefers to all others: one, several that are exactly equal, or none."""

    labels: tuple[int, ...]
    rationale: str = ""
    defect: Defect | None = None


def read_choice(result: Result, labels: Sequence[str], *, prefill: str = "", tagged: bool = False) -> Choice:
    """Read a `NextToken` answer (the highest logits) or a `Generate` answer (the label that the text names).

    Args:
        prefill: how the model's turn began.
        tagged: the text must give its answer as `<answer>…`; a label that its reasoning mentions is none.
    """
    if isinstance(result, Failure):
        return Choice(labels=(), defect=Defect(kind=DefectKind.UNSCORED, detail=result.reason))
    if not isinstance(result.value, str):
        if not all(map(math.isfinite, result.value)):
            return Choice(
                labels=(), defect=Defect(kind=DefectKind.UNSCORED, detail="a label's logit is not a finite number")
            )
        return Choice(labels=tuple(i for i, logit in enumerate(result.value) if logit == max(result.value)))
    text = whole_turn(prefill, result.value)
    parsed = parse_label(text, labels, cut_off=result.cut_off)
    if parsed.index is None:
        return Choice(labels=(), defect=parsed.defects[0])
    if tagged and "<answer>" not in text.lower():
        kind = DefectKind.CUT_OFF if result.cut_off else DefectKind.UNPARSED
        return Choice(labels=(), defect=Defect(kind=kind, detail="the text ends without <answer>"))
    rationale, _ = split_reasoning(text)
    return Choice(labels=(parsed.index,), rationale=rationale)


class Comparisons:
    """The comparisons of one query's candidates, answered or not."""

    def __init__(self, request: CandidateList) -> None:
        self._ids = [c.doc_id for c in request.candidates]
        self._compared: set[int] = set()
        self._answered: set[int] = set()
        self._total = self._unanswered = self._inconsistent = 0
        self._flaws: dict[DefectKind, list[str]] = {}

    def add(
        self, group: Sequence[int], choices: Sequence[Choice], answered: bool, *, inconsistent: bool = False
    ) -> None:
        """Note a comparison of these candidates, what the model chose in each of its calls, whether that is an answer,
        and whether these contradict each other."""
        self._total += 1
        self._inconsistent += inconsistent
        self._unanswered += not answered
        self._compared.update(group)
        if answered:
            self._answered.update(group)
        for defect in (choice.defect for choice in choices if choice.defect is not None):
            documents = ", ".join(self._ids[i] for i in group[:3]) + (", …" if len(group) > 3 else "")
            self._flaws.setdefault(defect.kind, []).append(f"{documents}: {defect.detail}")

    def scores(self, scores: Sequence[float], rationales: Sequence[str] | None = None) -> Scores:
        """The method's scores, without those that rest on no answer; all of them are NaN where most comparisons do."""
        ids = [self._ids[i] for i in sorted(self._compared - self._answered)]
        unjudged = [f"{doc_id}: none of its comparisons has an answer" for doc_id in ids]
        if 2 * self._unanswered > self._total:
            share = f"{self._unanswered} of {self._total}"
            ids, unjudged = self._ids, [f"{share} comparisons have no answer: the order would be the first stage's"]
        contradicting = []
        if 2 * self._inconsistent > self._total:
            share = f"{self._inconsistent} of {self._total}"
            contradicting = [f"{share} comparisons contradict themselves: the order is mostly the first stage's"]
        without = set(ids)
        return Scores(
            scores=tuple(math.nan if i in without else s for i, s in zip(self._ids, scores, strict=True)),
            rationales=None if rationales is None else tuple(rationales),
            defects=(
                *(Defect(kind=DefectKind.UNSCORED, detail=detail) for detail in unjudged),
                *(Defect(kind=DefectKind.INCONSISTENT, detail=detail) for detail in contradicting),
                *(Defect(kind=kind, detail=of[0], count=len(of)) for kind, of in self._flaws.items()),
            ),
        )
