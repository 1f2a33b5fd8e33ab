"""Listwise ranking by one token: the logits of the passages' letters (FIRST, Reddy et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rerank_ray.errors import RowError
from rerank_ray.models.protocol import Answer, Backend, Call, NextToken, Result
from rerank_ray.prompts.passages import prompt_over
from rerank_ray.prompts.render import load_template
from rerank_ray.ranking.listwise import check_fits, slide
from rerank_ray.ranking.orders import scores_of_order
from rerank_ray.ranking.pointwise import Steps
from rerank_ray.ranking.windows import windows
from rerank_ray.records import CandidateList, Defect, DefectKind, Scores
from rerank_ray.settings.rankers import FirstSettings


class First:
    """Score = N − rank (from 0) in the order after the last window; a window is ordered by the logits of its passages'
    letters after the opening bracket, all from one forward pass. Equal logits keep their order.

    A window without logits (its call failed) is an error of the query.
    """

    needs = frozenset({NextToken})

    def __init__(self, settings: FirstSettings, backend: Backend) -> None:
        self.settings = settings
        self.template = load_template(settings.prompt, "first")
        labels = self.template.identifiers(settings.window)
        if hasattr(backend, "check_labels"):
            backend.check_labels(labels, self.template.example(settings.window))
        check_fits(backend, self.template, settings.window)
        self.name = (
            f"first:{backend.name}:prompt={self.template.digest}:window={settings.window}/{settings.step}"
            f":passes={settings.passes}:words={settings.passage_words}"
        )

    def rank(self, request: CandidateList) -> Steps:
        s = self.settings

        def ask(members: Sequence[int]) -> Call:
            prompt = prompt_over(self.template, request, members, s.passage_words)
            return NextToken(prompt=prompt, labels=self.template.identifiers(len(members)))

        order = yield from slide(len(request), windows(len(request), s.window, s.step) * s.passes, ask, _read)
        return Scores(scores=scores_of_order(order))


def _read(result: Result, members: Sequence[int], window: range) -> list[int]:
    where = f"the window of ranks {window.start + 1} to {window.stop}"
    reason = result.reason if not isinstance(result, Answer) else None
    if reason is None and not all(map(math.isfinite, result.value)):
        reason = "a logit is not a finite number"
    if reason is not None:
        defect = Defect(kind=DefectKind.UNSCORED, detail=f"{where}: {reason}")
        raise RowError(f"{where} was not ranked: {reason}", (defect,))
    return [members[i] for i in sorted(range(len(members)), key=lambda i: -result.value[i])]
