"""Every ranking method through the scheduler, on a backend that answers from a table; and what becomes of failures."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fixtures.rows import make_list
from hypothesis import given, settings
from hypothesis import strategies as st

from rerank_ray.errors import ConfigError, InputError, ModelError
from rerank_ray.models.fake import Fake
from rerank_ray.models.protocol import (
    Answer,
    Call,
    Embed,
    Failure,
    Generate,
    LogLikelihood,
    NextToken,
    Pair,
    Prompt,
    Result,
)
from rerank_ray.ranking import scheduler
from rerank_ray.ranking.bi_encoder import BiEncoderRanker
from rerank_ray.ranking.cross_encoder import CrossEncoderRanker
from rerank_ray.ranking.first_stage import FirstStage
from rerank_ray.ranking.query_likelihood import QueryLikelihood
from rerank_ray.ranking.rankers import Ranker, preflight
from rerank_ray.ranking.yes_no import YesNo
from rerank_ray.records import Candidate, CandidateList, Query, Scores, Usage, ranking_of, with_gains
from rerank_ray.settings.models import CrossEncoderSettings, FakeSettings, HFCausalSettings
from rerank_ray.settings.rankers import (
    BiEncoderRankerSettings,
    BM25Settings,
    CrossEncoderRankerSettings,
    FirstStageSettings,
    ImportedSettings,
    QueryLikelihoodSettings,
    YesNoSettings,
)


class Oracle:
    """A backend that knows the answers: document text -> value; a text it lacks fails, and `bomb` raises."""

    answers = frozenset({NextToken, LogLikelihood, Pair, Embed})
    name = "oracle"
    exit_layer = None

    def __init__(self, values: dict[str, object], bomb: str | None = None) -> None:
        self.values, self.bomb = values, bomb
        self.batches: list[list[Call]] = []

    def run(self, calls: Sequence[Call]) -> list[Result]:
        self.batches.append(list(calls))
        if any(self.bomb and self.bomb in repr(c) for c in calls):
            raise RuntimeError("the backend broke")
        return [self._answer(c) for c in calls]

    def _answer(self, call: Call) -> Result:
        text = call.prompt.passages[0] if isinstance(call, NextToken | LogLikelihood) else call.text
        if text not in self.values:
            return Failure(reason="unknown text")
        return Answer(value=self.values[text], usage=Usage(calls=1, prompt_tokens=10, output_tokens=2))


def texts_of(request: CandidateList) -> list[str]:
    return [c.contents for c in request.candidates]


def one_outcome(method, backend: Oracle | None, request: CandidateList) -> scheduler.Outcome:
    (outcome,) = scheduler.run(method, backend, [request])
    return outcome


def relevance(backend: Oracle) -> CrossEncoderRanker:
    """The simplest method there is: the backend's number for the pair."""
    return CrossEncoderRanker(CrossEncoderRankerSettings(model=FakeSettings()), backend)


# Methods


def test_yes_no_by_hand():
    """Logits (yes, no) of (2, 0.5), (−1, 1), (0, 0): differences 1.5, −2, 0."""
    request = make_list()
    backend = Oracle(dict(zip(texts_of(request), [(2.0, 0.5), (-1.0, 1.0), (0.0, 0.0)], strict=True)))
    method = YesNo(YesNoSettings(model=FakeSettings()), backend)
    outcome = one_outcome(method, backend, request)
    assert outcome.scores.scores == (1.5, -2.0, 0.0)
    assert outcome.usage == Usage(calls=3, prompt_tokens=30, output_tokens=6)
    call = backend.batches[0][0]
    assert call.labels == ("Yes", "No")
    assert "Query: query" in call.prompt.parts[0]
    assert method.name.startswith("yes_no:oracle:prompt=")


def test_query_likelihood_by_hand():
    """Mean, not sum, and with its sign: logs (−1, −3), (−0.5,), (−2, −2, −2)."""
    request = make_list()
    backend = Oracle(dict(zip(texts_of(request), [(-1.0, -3.0), (-0.5,), (-2.0,) * 3], strict=True)))
    method = QueryLikelihood(QueryLikelihoodSettings(model=FakeSettings()), backend)
    assert one_outcome(method, backend, request).scores.scores == (-2.0, -0.5, -2.0)
    assert {c.continuation for c in backend.batches[0]} == {"query"}


def test_cross_encoder_reads_title_and_text():
    candidates = (Candidate(doc_id="a", text="body", title="Head"), Candidate(doc_id="b", text="body", title=None))
    request = CandidateList(query=Query(query_id="q", text="query"), candidates=candidates)
    backend = Oracle({"Head body": 1.0, "body": 2.0})
    assert one_outcome(relevance(backend), backend, request).scores.scores == (1.0, 2.0)
    assert [c.query for c in backend.batches[0]] == ["query"] * 2


def test_bi_encoder_by_hand():
    """Query (0.6, 0.8) with (1, 0), (0, 1) and itself: 0.6, 0.8, 1."""
    request = make_list()
    vectors = [(1.0, 0.0), (0.0, 1.0), (0.6, 0.8)]
    backend = Oracle({"query": (0.6, 0.8)} | dict(zip(texts_of(request), vectors, strict=True)))
    method = BiEncoderRanker(BiEncoderRankerSettings(model=FakeSettings()), backend)
    assert one_outcome(method, backend, request).scores.scores == pytest.approx((0.6, 0.8, 1.0))
    assert [c.role for c in backend.batches[0]] == ["query", "document", "document", "document"]


def test_bi_encoder_without_a_query_embedding():
    request = make_list()
    backend = Oracle(dict.fromkeys(texts_of(request), (1.0, 0.0)))
    method = BiEncoderRanker(BiEncoderRankerSettings(model=FakeSettings()), backend)
    assert "no candidate could be scored" in one_outcome(method, backend, request).error


def test_first_stage_scores():
    """A candidate without a score is unscored, not 0."""
    base = make_list(scores=[3.0, 2.0, 1.0])
    candidates = (*base.candidates[:2], Candidate(doc_id="d2", text="t"))
    outcome = one_outcome(
        FirstStage(FirstStageSettings(), None), None, CandidateList(query=base.query, candidates=candidates)
    )
    np.testing.assert_array_equal(outcome.scores.scores, [3.0, 2.0, math.nan])
    assert [str(d) for d in outcome.scores.defects] == ["unscored: d2: the candidate has no first-stage score"]
    assert outcome.usage == Usage()


def test_bm25_is_the_collections_formula(tmp_path: Path):
    """Three documents of lengths 3, 1, 2 (average 2), k1 0.9, b 0.4; `cat` is in two: idf = ln(1 + 1.5/2.5) = ln 1.6.

    d0: tf 2, norm 0.9·(0.6 + 0.4·1.5) = 1.08: ln 1.6 · 2/3.08. d1: tf 1, norm 0.9·(0.6 + 0.4·0.5) = 0.72:
    ln 1.6 · 1/1.72. d2: 0. The candidate's own text plays no part, and d9 is not in the collection.
    """
    (tmp_path / "corpus.tsv").write_text("d0\tcat cat dog\nd1\tcat\nd2\tbird zebra\n", encoding="utf-8")
    ranker = Ranker(BM25Settings(corpus=str(tmp_path / "corpus.tsv")))
    request = CandidateList(
        query=Query(query_id="q", text="Cat?"),
        candidates=tuple(Candidate(doc_id=d, text="other") for d in ("d1", "d9", "d0", "d2")),
    )
    (outcome,) = ranker.rank([request])
    expected = [math.log(1.6) / 1.72, math.nan, math.log(1.6) * 2 / 3.08, 0.0]
    np.testing.assert_allclose(outcome.scores.scores, expected, rtol=1e-6)
    assert [str(d) for d in outcome.scores.defects] == ["not_in_corpus: d9"]


def write_run(path: Path) -> str:
    """q1 ranks d1 and d0; d2 is outside; q2 has one document that is no candidate."""
    path.write_text("q1 Q0 d1 1 7.5 other\nq1 Q0 d0 2 -2.0 other\nq2 Q0 x 1 1.0 other\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(("outside", "expected"), [("missing", math.nan), ("lowest", -2.0)])
def test_imported_scores(tmp_path: Path, outside: str, expected: float):
    ranker = Ranker(ImportedSettings(run=[write_run(tmp_path / "a.trec")], outside=outside))
    (outcome,) = ranker.rank([make_list("q1")])
    np.testing.assert_array_equal(outcome.scores.scores, [-2.0, 7.5, expected])
    assert [str(d) for d in outcome.scores.defects] == (["not_in_run: d2"] if outside == "missing" else [])


def test_an_imported_run_that_lacks_the_query(tmp_path: Path):
    """An error of that row alone, also when all its rows lack it."""
    ranker = Ranker(ImportedSettings(run=[write_run(tmp_path / "a.trec")]))
    good, bad = ranker.rank([make_list("q1"), make_list("q9")])
    assert good.error is None
    assert bad.error == "query 'q9' is not in the imported run"
    assert all(o.error for o in ranker.rank([make_list("q8"), make_list("q9")]))


def test_two_runs_with_the_same_query(tmp_path: Path):
    paths = [write_run(tmp_path / "a.trec"), write_run(tmp_path / "b.trec")]
    with pytest.raises(InputError, match=f"{paths[1]}: query 'q1' is also in an earlier file"):
        Ranker(ImportedSettings(run=paths))


def test_imported_hits_need_scores(tmp_path: Path):
    hits = '[{"query": "what", "hits": [{"qid": "q1", "docid": "d0", "content": "t"}]}]'
    (tmp_path / "hits.json").write_text(hits, encoding="utf-8")
    with pytest.raises(InputError, match="hit 'd0' has no score"):
        Ranker(ImportedSettings(run=[str(tmp_path / "hits.json")]))


# Failures


@pytest.mark.parametrize("broken", [None, math.nan, math.inf, -math.inf])
def test_a_failed_call_is_a_candidate_without_score(broken: float | None):
    """Never a low score, which would be a false label; the others of the list keep theirs."""
    request = make_list()
    first, second, third = texts_of(request)
    backend = Oracle({first: 1.0, third: 3.0} | ({} if broken is None else {second: broken}))
    outcome = one_outcome(relevance(backend), backend, request)
    np.testing.assert_array_equal(outcome.scores.scores, [1.0, math.nan, 3.0])
    reason = "unknown text" if broken is None else "the model's score is not a finite number"
    assert [str(d) for d in outcome.scores.defects] == [f"unscored: d1: {reason}"]
    assert outcome.error is None


def test_a_list_without_any_score_is_an_error():
    backend = Oracle({})
    outcome = one_outcome(relevance(backend), backend, make_list())
    assert outcome.scores is None
    assert outcome.error == "no candidate could be scored, for example unscored: d0: unknown text"


def test_a_backend_that_raises_takes_one_query_down():
    requests = [make_list(f"q{i}") for i in range(4)]
    backend = Oracle({t: 1.0 for r in requests for t in texts_of(r)}, bomb="of q2")
    outcomes = scheduler.run(relevance(backend), backend, requests)
    assert [o.error for o in outcomes] == [None, None, "RuntimeError: the backend broke", None]
    assert [o.request for o in outcomes] == requests


def test_what_a_failed_pass_held_is_free_for_the_next():
    """A traceback keeps the tensors of every call that the exception came through; the neighbours need the room."""
    held: list[weakref.ref] = []
    alive: list[int] = []

    class Device(Oracle):
        def run(self, calls):
            alive.append(sum(tensor() is not None for tensor in held))
            try:
                self.forward(calls)
            except MemoryError as error:
                raise RuntimeError("out of memory") from error
            return super().run(calls)

        def forward(self, calls):
            activations = np.zeros(10)
            held.append(weakref.ref(activations))
            if any("of q1" in call.text for call in calls):
                raise MemoryError

    requests = [make_list(f"q{i}") for i in range(4)]
    backend = Device({text: 1.0 for request in requests for text in texts_of(request)})
    outcomes = scheduler.run(relevance(backend), backend, requests)
    assert [o.error for o in outcomes] == [None, "RuntimeError: out of memory", None, None]
    assert alive == [0] * 5


def test_a_backend_that_always_raises_is_no_fault_of_the_rows():
    backend = Oracle({}, bomb="")
    backend.bomb = "document"
    with pytest.raises(RuntimeError, match="the backend broke"):
        scheduler.run(relevance(backend), backend, [make_list("q1"), make_list("q2")])


def test_a_method_that_loses_a_score_is_caught():
    class Forgetful:
        """Returns one score too few."""

        def rank(self, request: CandidateList):
            yield []
            return Scores(scores=(1.0,) * (len(request) - 1))

    outcome = one_outcome(Forgetful(), None, make_list())
    assert outcome.error == "AssertionError: the method returned 2 scores for 3 candidates"


def test_an_error_of_a_method_is_its_query_s_alone():
    """What is asked for the others is not asked again."""
    requests = [make_list("q1"), make_list("q2")]
    backend = Oracle(dict.fromkeys(texts_of(requests[0]), 1.0))
    method = relevance(backend)

    class Picky:
        def rank(self, request: CandidateList):
            scores = yield from method.rank(request)
            return {"q1": scores}[request.query.query_id]

    outcomes = scheduler.run(Picky(), backend, requests)
    assert [o.error for o in outcomes] == [None, "KeyError: 'q2'"]
    assert len(backend.batches) == 1


# The scheduler


def test_calls_of_all_queries_are_one_batch_and_repeats_are_asked_once():
    """Two queries of like text over the same documents: six calls, three distinct; the repeats cost nothing."""
    first = make_list("q1")
    second = CandidateList(query=Query(query_id="q2", text="query"), candidates=first.candidates[::-1])
    backend = Oracle(dict(zip(texts_of(first), [1.0, 2.0, 3.0], strict=True)))
    a, b = scheduler.run(relevance(backend), backend, [first, second])
    assert [len(batch) for batch in backend.batches] == [3]
    assert (a.scores.scores, b.scores.scores) == ((1.0, 2.0, 3.0), (3.0, 2.0, 1.0))
    assert a.usage == Usage(calls=3, prompt_tokens=30, output_tokens=6)
    assert b.usage == Usage(prompt_tokens=30, cached_tokens=30)


def test_a_repeated_call_has_all_of_its_answer():
    """Two candidates of one text: what the second is told differs in its cost alone."""
    usage = Usage(calls=1, prompt_tokens=7)
    answer = Answer(value="Yes", usage=usage, cut_off=True, log_probability=-0.5, tokens=(3, 4))

    class Once:
        def __init__(self, told: Result) -> None:
            self.told = told

        def run(self, calls):
            return [self.told for _ in calls]

    call = Generate(prompt=Prompt(parts=("q",), passages=()), max_tokens=1)
    again = Usage(prompt_tokens=7, cached_tokens=7)
    for told in (answer, Failure(reason="no label", usage=answer.usage)):
        first, second = scheduler._answer(Once(told), [call, call])
        assert first is told
        assert second == replace(told, usage=again)


def test_a_repeated_call_that_fails_fails_for_both():
    first = make_list("q1")
    second = CandidateList(query=Query(query_id="q2", text="query"), candidates=first.candidates)
    backend = Oracle({texts_of(first)[0]: 1.0})
    for outcome in scheduler.run(relevance(backend), backend, [first, second]):
        assert len(outcome.scores.defects) == 2


def test_a_large_round_is_handed_over_in_pieces(monkeypatch: pytest.MonkeyPatch):
    """Five distinct calls by twos; each answer finds its candidate."""
    monkeypatch.setattr(scheduler, "_CALLS_AT_ONCE", 2)
    request = make_list(size=5)
    backend = Oracle(dict(zip(texts_of(request), [3.0, 1.0, 5.0, 2.0, 4.0], strict=True)))
    assert one_outcome(relevance(backend), backend, request).scores.scores == (3.0, 1.0, 5.0, 2.0, 4.0)
    assert [len(batch) for batch in backend.batches] == [2, 2, 1]


class Tournament:
    """A sequential method: asks for one candidate after another until one scores above `enough`."""

    def __init__(self, enough: float) -> None:
        self.enough = enough

    def rank(self, request: CandidateList):
        scores = [0.0] * len(request)
        for i, candidate in enumerate(request.candidates):
            (answer,) = yield [Pair(query=request.query.text, text=candidate.text)]
            scores[i] = answer.value
            if answer.value > self.enough:
                break
        return Scores(scores=tuple(scores))


def test_sequential_methods_run_side_by_side():
    """Three queries that end after 1, 2 and 3 rounds: rounds of 3, 2 and 1 calls."""
    requests = [make_list(f"q{i}") for i in range(3)]
    values = {t: float(i >= n) for n, r in enumerate(requests) for i, t in enumerate(texts_of(r))}
    backend = Oracle(values)
    outcomes = scheduler.run(Tournament(0.5), backend, requests)
    assert [len(batch) for batch in backend.batches] == [3, 2, 1]
    assert [o.scores.scores for o in outcomes] == [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)]
    assert [o.usage.calls for o in outcomes] == [1, 2, 3]


def test_nothing_to_rank():
    assert scheduler.run(relevance(Oracle({})), Oracle({}), []) == []


METHOD_SETTINGS = [
    YesNoSettings(model=FakeSettings()),
    QueryLikelihoodSettings(model=FakeSettings()),
    CrossEncoderRankerSettings(model=FakeSettings()),
    BiEncoderRankerSettings(model=FakeSettings()),
]


@pytest.mark.parametrize("chosen", METHOD_SETTINGS, ids=lambda s: s.method)
def test_scores_are_the_same_alone_and_in_company(chosen):
    requests = [make_list(f"q{i}", 1 + i) for i in range(6)]
    ranker = Ranker(chosen)
    together = ranker.rank(requests)
    for request, outcome in zip(requests, together, strict=True):
        (alone,) = ranker.rank([request])
        assert (alone.scores, alone.error) == (outcome.scores, None)


def test_the_fake_depends_on_call_and_seed_alone():
    call = Pair(query="q", text="t")
    answers = {Fake(FakeSettings(seed=seed)).run([call])[0].value for seed in (0, 0, 1)}
    assert len(answers) == 2
    assert all(-1 < a <= 0 for a in answers)
    (failure,) = Fake(FakeSettings(fail_on="text='t'")).run([call])
    assert isinstance(failure, Failure)


# Before anything starts


def test_a_method_on_a_backend_that_can_not_answer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Fake, "answers", frozenset({Pair}))
    with pytest.raises(ConfigError, match=r"method yes_no needs \['NextToken'\], which fake:seed=0 does not answer"):
        Ranker(YesNoSettings(model=FakeSettings()))


@pytest.mark.parametrize(
    ("chosen", "error", "said"),
    [
        (YesNoSettings(model=HFCausalSettings(path="./none")), ModelError, "./none: no such model folder"),
        (YesNoSettings(model=FakeSettings(), prompt="none"), ConfigError, "prompt: no built-in template 'none'"),
        (YesNoSettings(model=FakeSettings(), prompt="query_likelihood"), ConfigError, "written for query_likelihood"),
        (BM25Settings(corpus="./none.jsonl"), InputError, "./none.jsonl: no such file"),
        (ImportedSettings(run=["./none.trec"]), InputError, "./none.trec: no such file"),
        (CrossEncoderRankerSettings(model=CrossEncoderSettings(path="./none")), ModelError, "no such model folder"),
    ],
)
def test_preflight_finds_what_can_not_work(chosen, error: type, said: str):
    with pytest.raises(error, match=said):
        preflight(chosen)


def test_preflight_lets_the_rest_pass():
    for chosen in METHOD_SETTINGS:
        preflight(chosen)


# Rankings


def test_ranking_of_keeps_the_first_stage_among_ties_and_puts_unscored_last():
    request = make_list(size=6)
    scores = Scores(scores=(1.0, math.nan, 2.0, 1.0, math.nan, 2.0))
    ranking = ranking_of(request, scores, "m")
    assert ranking.doc_ids == ("d2", "d5", "d0", "d3", "d1", "d4")
    np.testing.assert_array_equal(ranking.scores, [2.0, 2.0, 1.0, 1.0, math.nan, math.nan])


@settings(deadline=None)
@given(st.lists(st.floats(), min_size=1, max_size=12))
def test_a_ranking_is_a_permutation_with_falling_scores(values: list[float]):
    ranking = ranking_of(make_list(size=len(values)), Scores(scores=tuple(values)), "m")
    assert sorted(ranking.doc_ids) == sorted(f"d{i}" for i in range(len(values)))
    real = [s for s in ranking.scores if not math.isnan(s)]
    assert real == sorted(real, reverse=True)
    assert all(math.isnan(s) for s in ranking.scores[len(real) :])


def test_gains_are_those_of_the_qrels():
    request = with_gains(make_list(), {"d1": 2.0, "x": 1.0})
    assert [c.label for c in request.candidates] == [None, 2.0, None]
