"""Runs the generators of many queries side by side and packs their calls into full device batches.

Each round gathers the calls that all unfinished generators wait for and hands them to the backend at once, so a method
that asks one thing after another keeps the device as busy as one that asks everything at the start.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from rerank_ray.errors import RerankRayError, UnavailableError
from rerank_ray.models.protocol import Backend, Call, Result
from rerank_ray.ranking.pointwise import Steps
from rerank_ray.records import CandidateList, Defect, Scores, Usage

# Many device batches, yet a bound on the token ids in memory: all pairs of 100 candidates are 9,900 prompts a query.
_CALLS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one candidate list: `scores`, or the `error` that left it without any."""

    request: CandidateList
    scores: Scores | None
    usage: Usage
    error: str | None = None
    defects: tuple[Defect, ...] = ()
    """Of a list with `error`: what the method found wrong; other lists have theirs in `scores`."""

    @property
    def all_defects(self) -> tuple[Defect, ...]:
        """What the method found wrong, wherever it stands."""
        return self.scores.defects if self.scores else self.defects


@dataclass(slots=True)
class _Progress:
    """One query's generator between two rounds."""

    request: CandidateList
    steps: Steps
    calls: list[Call]
    usage: Usage = field(default_factory=Usage)
    scores: Scores | None = None
    error: str | None = None
    defects: tuple[Defect, ...] = ()

    @property
    def running(self) -> bool:
        return self.scores is None and self.error is None

    def advance(self, results: list[Result] | None) -> None:
        """Send the results of the last calls (None to start) and take the next calls, the scores or the error."""
        try:
            self.calls = self.steps.send(results)
        except StopIteration as stop:
            self._finish(stop.value)
        except RerankRayError as error:
            self.error = str(error)
            self.defects = getattr(error, "defects", ())
        except Exception as error:
            # The method's own, of this query alone: what its neighbours have paid for is not asked again.
            self.error = f"{type(error).__name__}: {error}"

    def _finish(self, scores: Scores) -> None:
        if len(scores.scores) != len(self.request):
            raise AssertionError(f"the method returned {len(scores.scores)} scores for {len(self.request)} candidates")
        if all(score != score for score in scores.scores):
            first = f", for example {scores.defects[0]}" if scores.defects else ""
            self.error = f"no candidate could be scored{first}"
            self.defects = scores.defects
        else:
            self.scores = scores


def run(method, backend: Backend | None, requests: Sequence[CandidateList]) -> list[Outcome]:
    """Rank candidate lists side by side; one outcome a list, in input order.

    A backend that raises is asked again for each query alone, so that one query can't take its neighbours down. When
    every query fails alone, nothing is wrong with the queries and the exception is raised.

    Raises:
        UnavailableError: as the backend does; however few the queries are, the next ones would fare alike.
    """
    try:
        return _run(method, backend, requests)
    except UnavailableError:
        raise
    except Exception as error:
        if len(requests) == 1:
            return [_failed(requests[0], error)]
        _let_go(error)
        outcomes = [_run_alone(method, backend, request) for request in requests]
        if all(isinstance(o, Exception) for o in outcomes):
            raise
        return [_failed(r, o) if isinstance(o, Exception) else o for r, o in zip(requests, outcomes, strict=True)]


def _run_alone(method, backend: Backend | None, request: CandidateList) -> Outcome | Exception:
    try:
        return _run(method, backend, [request])[0]
    except UnavailableError:
        raise
    except Exception as error:
        _let_go(error)
        return error


def _let_go(error: BaseException | None) -> None:
    """Clear the variables of the calls that an exception came through: its traceback keeps them alive, and after an
    out-of-memory error they are the tensors that left no room."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _failed(request: CandidateList, error: Exception) -> Outcome:
    return Outcome(request=request, scores=None, usage=Usage(), error=f"{type(error).__name__}: {error}")


def _run(method, backend: Backend | None, requests: Sequence[CandidateList]) -> list[Outcome]:
    tasks = [_Progress(request, method.rank(request), []) for request in requests]
    for task in tasks:
        task.advance(None)
    while running := [t for t in tasks if t.running]:
        answers = _answer(backend, [call for t in running for call in t.calls])
        start = 0
        for task in running:
            results = answers[start : start + len(task.calls)]
            start += len(results)
            task.usage = sum((r.usage for r in results), start=task.usage)
            task.advance(results)
    return [Outcome(request=t.request, scores=t.scores, usage=t.usage, error=t.error, defects=t.defects) for t in tasks]


def _answer(backend: Backend | None, calls: list[Call]) -> list[Result]:
    """Answer each distinct call once; a repeat costs nothing and says so in its usage."""
    if not calls:
        return []
    distinct = list(dict.fromkeys(calls))
    answered: dict[Call, Result] = {}
    for start in range(0, len(distinct), _CALLS_AT_ONCE):
        chunk = distinct[start : start + _CALLS_AT_ONCE]
        answered.update(zip(chunk, backend.run(chunk), strict=True))
    seen: set[Call] = set()
    results: list[Result] = []
    for call in calls:
        result = answered[call]
        if call in seen:
            tokens = result.usage.prompt_tokens
            result = replace(result, usage=Usage(prompt_tokens=tokens, cached_tokens=tokens))
        seen.add(call)
        results.append(result)
    return results
