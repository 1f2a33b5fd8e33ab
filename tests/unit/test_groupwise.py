"""GroupRank and REBEL: grades by hand, what is missing stays missing, and texts that are no grades."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from fixtures.oracles import ADVERSARIES, USAGE, Adversary, Oracle, Recorder, Reply, known_list, outcome_of, rounds_of
from fixtures.rows import make_list
from hypothesis import given
from hypothesis import strategies as st

from rerank_ray.errors import ConfigError
from rerank_ray.models.protocol import Answer, Failure, Generate
from rerank_ray.ranking import scheduler
from rerank_ray.ranking.groupwise import GroupRank, split
from rerank_ray.ranking.rankers import preflight
from rerank_ray.ranking.rebel import Rebel
from rerank_ray.records import CandidateList, Query
from rerank_ray.settings.models import FakeSettings
from rerank_ray.settings.rankers import GroupRankSettings, RebelSettings

FAKE = FakeSettings()


def group_rank(backend, **options) -> GroupRank:
    return GroupRank(GroupRankSettings(model=FAKE, **options), backend)


def rebel(backend, **options) -> Rebel:
    return Rebel(RebelSettings(model=FAKE, **options), backend)


def grades(gains: Sequence[float]) -> str:
    """The JSON of an oracle that grades passages with their gains."""
    return json.dumps({str(i): gain for i, gain in enumerate(gains, 1)})


# Groups


@given(size=st.integers(1, 60), group_size=st.integers(1, 25))
def test_groups_are_disjoint_and_even(size: int, group_size: int):
    groups = split(range(size), group_size)
    assert [i for group in groups for i in group] == list(range(size))
    assert len(groups) == math.ceil(size / group_size)
    assert max(map(len, groups)) <= group_size
    assert max(map(len, groups)) - min(map(len, groups)) <= 1


@pytest.mark.parametrize("size", [1, 3, 4, 5, 23])
@pytest.mark.parametrize("shuffles", [1, 3])
def test_group_rank_calls_are_the_formula(size: int, shuffles: int):
    """R · ⌈N/g⌉ calls, all in one round."""
    request, gains = known_list([float(i % 11) for i in range(size)])
    backend = Oracle(gains, write=grades)
    method = group_rank(backend, group_size=4, shuffles=shuffles)
    assert rounds_of(method, backend, request) == [shuffles * math.ceil(size / 4)]
    outcome = outcome_of(method, backend, request)
    assert outcome.scores.scores == pytest.approx([(i % 11) / 10 for i in range(size)])
    assert outcome.scores.defects == ()


def test_groups_are_random_and_seeded():
    def shown(seed: int, query_id: str = "q1") -> list[tuple[str, ...]]:
        request, gains = known_list([1.0] * 12)
        backend = Oracle(gains, write=grades)
        request = replace(request, query=replace(request.query, query_id=query_id))
        outcome_of(group_rank(backend, group_size=4, shuffles=2, seed=seed), backend, request)
        groups = [c.prompt.passages for c in backend.calls]
        for shuffle in (groups[:3], groups[3:]):
            assert sorted(text for group in shuffle for text in group) == sorted(gains)
        return groups

    assert shown(0) == shown(0)
    assert shown(0)[:3] != shown(0)[3:]
    assert shown(0) != shown(1)
    assert shown(0) != shown(0, "q2")


class Graders(Recorder):
    """Answers the calls of a batch with these texts, in turn; None fails the call."""

    def __init__(self, *texts: str | None) -> None:
        super().__init__()
        self.texts = iter(texts)

    def answer(self, call):
        text = next(self.texts)
        if text is None:
            return Failure(reason="no answer")
        return Answer(value=text.removesuffix("…"), usage=USAGE, cut_off=text.endswith("…"))


def test_what_a_group_leaves_out_is_missing_and_never_0():
    """Passage "2" of the only group has no grade, so no score; the others keep theirs."""
    request = make_list(size=3)
    backend = Graders('{"1": 10, "3": 2.5}')
    outcome = outcome_of(group_rank(backend), backend, request)
    shown = backend.calls[0].prompt.passages
    by_text = dict(zip([c.text for c in request.candidates], outcome.scores.scores, strict=True))
    np.testing.assert_array_equal([by_text[text] for text in shown], [1.0, math.nan, 0.25])
    unscored = next(c.doc_id for c in request.candidates if c.text == shown[1])
    assert [str(d) for d in outcome.scores.defects] == [
        "missing: group 1: 2",
        f"unscored: {unscored}: no group's answer grades it",
    ]


def test_a_grade_at_the_end_of_what_was_cut_off_is_none():
    """The 1 may have been about to become 10."""
    backend = Graders('{"1": 7, "2": 1…')
    outcome = outcome_of(group_rank(backend), backend, make_list(size=2))
    assert sorted(map(str, outcome.scores.scores)) == ["0.7", "nan"]
    assert [str(d.kind) for d in outcome.scores.defects] == ["cut_off", "missing", "unscored"]


def test_a_mean_over_two_shuffles_by_hand():
    """Groups of two that differ between the shuffles: each passage's mean is over its own grades only."""
    request, _ = known_list([0.0] * 4)
    backend = Graders('{"1": 2, "2": 4}', '{"1": 6, "2": 8}', '{"1": 10}', None)
    outcome = outcome_of(group_rank(backend, group_size=2, shuffles=2, seed=1), backend, request)
    assert len(backend.calls) == 4
    given_grades: dict[str, list[float]] = {}
    for call, values in zip(backend.calls, [(2, 4), (6, 8), (10,), ()], strict=True):
        for text, value in zip(call.prompt.passages, values, strict=False):
            given_grades.setdefault(text, []).append(value / 10)
    expected = [sum(given_grades[c.text]) / len(given_grades[c.text]) for c in request.candidates]
    assert outcome.scores.scores == pytest.approx(expected)
    assert [str(d) for d in outcome.scores.defects] == ["missing: group 3: 2", "unscored: group 4: no answer"]


def test_reasoning_before_the_grades_is_kept():
    request = make_list(size=2)
    backend = Graders('<think>{"1": 1, "2": 1} at first</think>{"1": 7, "2": 7}')
    scores = outcome_of(group_rank(backend), backend, request).scores
    assert scores.scores == (0.7, 0.7)
    assert scores.rationales == ('{"1": 1, "2": 1} at first',)
    assert scores.rationales_are_of_calls


def test_the_first_stage_has_its_weight():
    """0.6 · (0.5, 0.2, 0.8) + 0.4 · (1, 0.5, 0), the first stage's 30, 20, 10 scaled."""
    request, gains = known_list([5.0, 2.0, 8.0])
    candidates = tuple(replace(c, score=s) for c, s in zip(request.candidates, [30.0, 20.0, 10.0], strict=True))
    request = replace(request, candidates=candidates)
    backend = Oracle(gains, write=grades)
    scores = outcome_of(group_rank(backend, rerank_weight=0.6), backend, request).scores.scores
    assert scores == pytest.approx((0.7, 0.32, 0.48))
    equal = replace(request, candidates=tuple(replace(c, score=7.0) for c in candidates))
    scores = outcome_of(group_rank(backend, rerank_weight=0.6), backend, equal).scores.scores
    assert scores == pytest.approx((0.5, 0.32, 0.68))


def test_the_first_stage_scores_no_passage_alone():
    """A passage without a grade stays unscored though the first stage has a score for it."""
    request = make_list(size=2, scores=[2.0, 1.0])
    backend = Graders('{"1": 7}')
    scores = outcome_of(group_rank(backend, rerank_weight=0.6), backend, request).scores.scores
    assert sum(map(math.isnan, scores)) == 1


def test_a_weight_needs_scores():
    backend = Graders()
    outcome = outcome_of(group_rank(backend, rerank_weight=0.6), backend, make_list())
    assert outcome.error == "candidate 'd0' has no score, and rerank_weight is 0.6"
    assert backend.calls == []


# REBEL

CRITERIA = "1. **Depth**: 0 is a mention, 5 explains it.\n2. Recency: how new it is"


def test_rebel_by_hand():
    """Relevance 8 with 4 and 2.5: 11.25; 3 with 0 and 5: 5.5; 2.9 is dropped, whatever its criteria."""
    request = make_list(size=3)
    backend = Graders(CRITERIA, '{"1": [8, 4, 2.5], "2": [2.9, 5, 5], "3": [3, 0, 5]}')
    outcome = outcome_of(rebel(backend, criteria=2), backend, request)
    assert outcome.scores.scores == (11.25, 2.9, 5.5)
    assert outcome.scores.defects == ()
    asked, graded = backend.calls
    assert asked.prompt.passages == ()
    assert "Name 2 more" in "".join(asked.prompt.parts)
    assert "1. Depth**: 0 is a mention" in graded.prompt.parts[0]
    assert "2. Recency: how new it is" in graded.prompt.parts[0]


@given(rows=st.lists(st.lists(st.floats(0, 5), min_size=3, max_size=3), min_size=2, max_size=6))
def test_a_dropped_passage_is_below_every_kept_one(rows: list[list[float]]):
    """Relevance up to 10, so that some are dropped and some are kept, whatever their criteria."""
    rows = [[2 * row[0], *row[1:]] for row in rows]
    backend = Graders(CRITERIA, json.dumps(dict(enumerate(rows, 1))))
    scores = outcome_of(rebel(backend, criteria=2), backend, make_list(size=len(rows))).scores.scores
    kept = [score for score, row in zip(scores, rows, strict=True) if row[0] >= 3]
    dropped = [score for score, row in zip(scores, rows, strict=True) if row[0] < 3]
    assert min(kept, default=3.0) >= 3.0 > max(dropped, default=0.0)


@pytest.mark.parametrize("size", [1, 3, 4, 5, 23])
def test_rebel_calls_are_the_formula(size: int):
    request = make_list(size=size)

    class Writer(Recorder):
        """Criteria, then grades that fall with the place in the prompt."""

        def answer(self, call):
            count = len(call.prompt.passages)
            text = json.dumps({str(i): [9 - i, 1, 1] for i in range(1, count + 1)}) if count else CRITERIA
            return Answer(value=text, usage=USAGE)

    backend = Writer()
    outcome = outcome_of(rebel(backend, criteria=2, group_size=4), backend, request)
    assert [len(batch) for batch in backend.batches] == [1, math.ceil(size / 4)]
    assert outcome.error is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the model wrote no criteria: empty: ''"),
        ("I'm sorry, I can't help", "the model wrote no criteria: refusal: "),
        ("depth and recency", "the model wrote no criteria: unparsed: "),
        ("1. Depth…", "the model wrote no criteria: cut_off: "),
        ("1. Depth of {query}", "the model's criteria hold the placeholder {query}, which nothing fills"),
        (None, "the call for criteria has no answer: no answer"),
    ],
)
def test_criteria_that_can_not_be_used(text: str | None, said: str):
    backend = Graders(text)
    outcome = outcome_of(rebel(backend), backend, make_list())
    assert outcome.error.startswith(said)
    assert len(backend.calls) == 1


def test_fewer_or_more_criteria_than_asked_for():
    """The grades follow what was written; both are defects."""
    request = make_list(size=1)
    backend = Graders("- Depth", '{"1": [8, 4]}')
    scores = outcome_of(rebel(backend, criteria=2), backend, request).scores
    assert scores.scores == (10.0,)
    assert [str(d.kind) for d in scores.defects] == ["missing"]
    backend = Graders(CRITERIA + "\n3. Third\n", '{"1": [8, 4, 2]}')
    scores = outcome_of(rebel(backend, criteria=2), backend, request).scores
    assert scores.scores == (11.0,)
    assert [str(d.kind) for d in scores.defects] == ["out_of_range"]


def test_grades_out_of_their_bounds_are_none():
    """A criterion of 6 and a relevance of 11 are no grades; a passage without grades has no score."""
    request = make_list(size=3)
    backend = Graders(CRITERIA, '{"1": [8, 6, 2], "2": [11, 1, 1], "3": [8.5, 1, 1]}')
    scores = outcome_of(rebel(backend, criteria=2), backend, request).scores
    np.testing.assert_array_equal(scores.scores, [math.nan, math.nan, 9.5])
    assert [str(d.kind) for d in scores.defects] == ["out_of_range", "unscored", "unscored"]


def test_preflight_reads_both_templates():
    preflight(RebelSettings(model=FAKE))
    with pytest.raises(ConfigError, match="template 'rebel' is written for rebel, not rebel_criteria"):
        preflight(RebelSettings(model=FAKE, criteria_prompt="rebel"))


# Both


@pytest.mark.parametrize("make", [group_rank, rebel])
@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_adversaries_leave_no_label(make, adversary: str):
    requests = [make_list(f"q{i}", 3 + i) for i in range(6)]
    backend = Adversary(*ADVERSARIES[adversary])
    for outcome in scheduler.run(make(backend), backend, requests):
        assert outcome.scores is None
        assert outcome.error
        assert outcome.defects


@pytest.mark.parametrize("make", [group_rank, rebel])
def test_nothing_to_grade(make):
    backend = Adversary(Reply(text="", favourite=0))
    request = CandidateList(query=Query(query_id="q", text="query"), candidates=())
    assert "no candidate could be scored" in outcome_of(make(backend), backend, request).error
    assert backend.calls == []


def test_alone_and_among_64_others():
    source = random.Random(0)
    lists = [known_list([source.randint(0, 10) for _ in range(1 + i % 9)], f"q{i}") for i in range(65)]
    backend = Oracle({t: g for _, known in lists for t, g in known.items()}, write=grades)
    method = group_rank(backend, group_size=4, shuffles=2)
    requests = [request for request, _ in lists]
    together = scheduler.run(method, backend, requests)
    assert len(backend.batches) == 1
    for request, outcome in zip(requests, together, strict=True):
        assert outcome_of(method, backend, request).scores == outcome.scores
    assert method.needs == {Generate}
