"""Reasoning, then an integer: ERank (Cai et al. 2025)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from rerank_ray.models.protocol import Answer, Backend, Failure, Generate, LogLikelihood, Result
from rerank_ray.prompts.parse.answer import answer_span, split_reasoning
from rerank_ray.prompts.parse.scores import is_stated, parse_score
from rerank_ray.prompts.render import load_template
from rerank_ray.ranking.pointwise import Steps, Value, scores_from
from rerank_ray.records import CandidateList, Defect, DefectKind
from rerank_ray.settings.rankers import ERankSettings

_HIGHEST = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class _Integer:
    """The integer that the model's turn answers with, and the turn before it."""

    value: int
    before: str


class ERank:
    """Score = s·Pr(s) of the integer s in 0..10 that the model writes after its reasoning; `integer` is s itself.

    Pr(s) is the model's probability of the integer after the text that it wrote before it, asked for in a second round;
    a backend that only generates can give `integer`.
    """

    def __init__(self, settings: ERankSettings, backend: Backend) -> None:
        self.settings = settings
        self.template = load_template(settings.prompt, "erank")
        if hasattr(backend, "check_fits"):
            backend.check_fits(self.template.example(), settings.max_tokens)
        self.needs = frozenset({Generate, LogLikelihood} if settings.score == "weighted" else {Generate})
        form = f"score={settings.score}:temperature={settings.temperature:g}:seed={settings.seed}"
        self.name = f"erank:{backend.name}:prompt={self.template.digest}:{form}"

    def rank(self, request: CandidateList) -> Steps:
        prompts = [self.template.prompt(request.query, c) for c in request.candidates]
        calls = [
            Generate(
                prompt=prompt,
                max_tokens=self.settings.max_tokens,
                temperature=self.settings.temperature,
                seed=self.settings.seed,
            )
            for prompt in prompts
        ]
        results = yield list(calls)
        parsed = [_integer_in(r, self.template.prefill) for r in results]
        values: list[Value] = [float(p.value) if isinstance(p, _Integer) else p for p in parsed]
        scored = [i for i, p in enumerate(parsed) if isinstance(p, _Integer)]
        if self.settings.score == "weighted" and scored:
            likelihoods = yield [_likelihood_of(calls[i], parsed[i]) for i in scored]
            for i, likelihood in zip(scored, likelihoods, strict=True):
                values[i] = _weighted(parsed[i].value, likelihood)
        return replace(
            scores_from(request, values),
            rationales=tuple(
                split_reasoning(self.template.prefill + r.value)[0] if isinstance(r, Answer) else "" for r in results
            ),
        )


def _integer_in(result: Result, prefill: str) -> _Integer | Failure | Defect:
    """The integer that the model's turn answers with, and the turn up to it; `prefill` is how the turn began."""
    if not isinstance(result, Answer):
        return result
    text = prefill + result.value
    # An answer whose tags are closed is whole, whatever was cut off after it.
    parsed = parse_score(text, low=0, high=_HIGHEST, cut_off=result.cut_off and "</answer>" not in text.lower())
    if parsed.score is None:
        cut = result.cut_off and parsed.defects[0].kind is not DefectKind.REFUSAL
        return replace(parsed.defects[0], kind=DefectKind.CUT_OFF) if cut else parsed.defects[0]
    _, span = answer_span(text)
    answer = text[span.start : span.stop]
    # As the parser reads it: 7.0 is 7, and 10/10 or "10 out of 10" is its first 10.
    written = rf"(?<![\w.,])0*{parsed.score:g}(?:\.0+)?(?:\s*(?:/|out\s+of)\s*{_HIGHEST})?(?!\w)"
    places = list(re.finditer(written, answer, re.IGNORECASE))
    if not places or not parsed.score.is_integer():
        return Defect(kind=DefectKind.UNPARSED, detail=f"{parsed.score:g} is not written as an integer")
    place = ([m for m in places if is_stated(answer, m)] or places)[-1]
    return _Integer(value=int(parsed.score), before=text[: span.start + place.start()])


def _likelihood_of(call: Generate, integer: _Integer) -> LogLikelihood:
    """The call for the integer's probability after what stands before it in the call's answer."""
    prompt = replace(call.prompt, prefill=integer.before)
    return LogLikelihood(prompt=prompt, continuation=str(integer.value), written_by=call)


def _weighted(score: int, likelihood: Result) -> Value:
    return score * math.exp(math.fsum(likelihood.value)) if isinstance(likelihood, Answer) else likelihood
