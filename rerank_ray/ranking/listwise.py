"""Listwise ranking by generated permutations over sliding windows (RankGPT, Sun et al. 2023).

With a template that shows {score} it is InsertRank (Seetharaman et al. 2025); with one that asks for reasoning, the
form of DeAR's second stage (Abdallah et al. 2025) and of ReasonRank (Liu et al. 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

from rerank_ray.errors import ConfigError, ModelError, RowError
from rerank_ray.models.protocol import Answer, Backend, Call, Generate, Result
from rerank_ray.prompts.parse.answer import split_reasoning
from rerank_ray.prompts.parse.permutation import Permutation, parse_permutation
from rerank_ray.prompts.passages import prompt_over
from rerank_ray.prompts.render import Template, load_template
from rerank_ray.ranking.orders import scores_of_order
from rerank_ray.ranking.pointwise import Steps
from rerank_ray.ranking.windows import windows
from rerank_ray.records import CandidateList, Defect, DefectKind, Scores
from rerank_ray.settings.rankers import RankGPTSettings


class RankGPT:
    """Score = N − rank (from 0) in the order after the last window.

    Repairs of an answer are defects. A window without an answer (refused, empty, not a ranking) is an error of the
    query: the order left there would be the first stage's, not the model's. `rationales` holds each window's reasoning,
    in the order of the calls.
    """

    needs = frozenset({Generate})

    def __init__(self, settings: RankGPTSettings, backend: Backend) -> None:
        self.settings = settings
        self.template = load_template(settings.prompt, "rank_gpt")
        check_fits(backend, self.template, settings.window, settings.max_tokens)
        self.name = (
            f"rank_gpt:{backend.name}:prompt={self.template.digest}:window={settings.window}/{settings.step}"
            f":passes={settings.passes}:words={settings.passage_words}"
        )

    def rank(self, request: CandidateList) -> Steps:
        s = self.settings
        defects: list[Defect] = []
        rationales: list[str] = []

        def ask(members: Sequence[int]) -> Call:
            return permutation_call(self.template, request, members, s.passage_words, s.max_tokens)

        def read(result: Result, members: Sequence[int], window: range) -> list[int]:
            rationale, parsed = read_permutation(self.template, result, len(members))
            if parsed.order is None:
                why = "; ".join(map(str, parsed.defects))
                where = f"the window of ranks {window.start + 1} to {window.stop}"
                raise RowError(f"{where} was not ranked: {why}", (*defects, *parsed.defects))
            rationales.append(rationale)
            defects.extend(parsed.defects)
            return [members[i] for i in parsed.order]

        order = yield from slide(len(request), windows(len(request), s.window, s.step) * s.passes, ask, read)
        return Scores(
            scores=scores_of_order(order),
            rationales=tuple(rationales) if any(rationales) else None,
            rationales_are_of_calls=True,
            defects=tuple(defects),
        )


def slide(
    count: int,
    over: Sequence[range],
    ask: Callable[[Sequence[int]], Call],
    read: Callable[[Result, Sequence[int], range], Sequence[int]],
) -> Generator[list[Call], list[Result], list[int]]:
    """Reorder 0 … count−1 window after window, one call each; returns the order, best first.

    Args:
        over: windows over positions of the order.
        ask: the call that ranks these candidates.
        read: the candidates in the order of the call's result.
    """
    order = list(range(count))
    for window in over:
        members = order[window.start : window.stop]
        (result,) = yield [ask(members)]
        order[window.start : window.stop] = read(result, members, window)
    return order


def permutation_call(
    template: Template, request: CandidateList, members: Sequence[int], passage_words: int, max_tokens: int
) -> Generate:
    """Ask for an order of the candidates `members`."""
    return Generate(prompt=prompt_over(template, request, members, passage_words), max_tokens=max_tokens)


def read_permutation(template: Template, result: Result, count: int) -> tuple[str, Permutation]:
    """Rationale and order of `count` passages, from the answer to a `permutation_call`; a call that failed has none."""
    if not isinstance(result, Answer):
        return "", Permutation(order=None, defects=(Defect(kind=DefectKind.UNSCORED, detail=result.reason),))
    text = template.prefill + result.value
    return split_reasoning(text)[0], parse_permutation(text, template.identifiers(count), cut_off=result.cut_off)


def check_fits(backend: Backend, template: Template, count: int, max_tokens: int = 0) -> None:
    """Raise `ConfigError` when a prompt over `count` passages of a word can't fit the model's context, if known, when
    the template has fewer labels, or, of a text, when its labels can't be read from one."""
    prompt = template.example(count)
    if max_tokens:
        template.check_readable()
    if hasattr(backend, "check_fits"):
        try:
            backend.check_fits(prompt, max_tokens)
        except ModelError as error:
            raise ConfigError(f"{count} passages at once: {error}, show fewer or lower max_tokens") from error
