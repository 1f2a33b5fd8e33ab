"""Listwise rankers: windows, RankGPT and variants, FIRST and self-consistency, on oracles and adversaries."""

from __future__ import annotations

import itertools
import json
import math
import random
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from fixtures.oracles import (
    ADVERSARIES,
    USAGE,
    Adversary,
    Oracle,
    Recorder,
    Reply,
    best_first,
    known_list,
    outcome_of,
    permutation,
    rounds_of,
)
from fixtures.rows import make_list
from fixtures.tiny_models import tiny_llama_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from rerank_ray.errors import ConfigError
from rerank_ray.models.hf_causal import HFCausal
from rerank_ray.models.protocol import Answer, Failure, Generate, NextToken
from rerank_ray.prompts.passages import shown_passage
from rerank_ray.ranking import scheduler
from rerank_ray.ranking.first import First
from rerank_ray.ranking.listwise import RankGPT
from rerank_ray.ranking.permutation_self_consistency import PermutationSelfConsistency
from rerank_ray.ranking.rankers import Ranker, preflight
from rerank_ray.ranking.windows import windows
from rerank_ray.records import CandidateList, Query
from rerank_ray.settings.models import FakeSettings, HFCausalSettings
from rerank_ray.settings.rankers import (
    FirstSettings,
    PermutationSelfConsistencySettings,
    RankerSettings,
    RankGPTSettings,
)

NUMBERS = [str(n) for n in range(1, 101)]
FAKE = FakeSettings()


def rank_gpt(backend, **options) -> RankGPT:
    return RankGPT(RankGPTSettings(model=FAKE, **options), backend)


def first(backend, **options) -> First:
    return First(FirstSettings(model=FAKE, **options), backend)


def self_consistency(backend, **options) -> PermutationSelfConsistency:
    return PermutationSelfConsistency(PermutationSelfConsistencySettings(model=FAKE, **options), backend)


def oracle(gains: dict[str, float]) -> Oracle:
    return Oracle(gains, write=permutation(NUMBERS))


class Script(Recorder):
    """Answers its n-th call with the n-th text, cut off where the text ends in an ellipsis."""

    def __init__(self, *replies: str) -> None:
        super().__init__()
        self.replies = iter(replies)

    def answer(self, call):
        text = next(self.replies)
        return Answer(value=text.removesuffix("…"), usage=USAGE, cut_off=text.endswith("…"))


# Windows


@given(count=st.integers(1, 200), size=st.integers(2, 30), data=st.data())
def test_windows(count: int, size: int, data: st.DataObject):
    """1 + ⌈(N − w)/s⌉ of them, from the back; together they hold every position, the last one begins at 0."""
    step = data.draw(st.integers(1, size - 1))
    over = windows(count, size, step)
    assert len(over) == 1 + math.ceil(max(0, count - size) / step)
    assert over[0].stop == count
    assert over[-1].start == 0
    assert all(len(window) == min(size, count) for window in over)
    assert {position for window in over for position in window} == set(range(count))
    moved = [a.start - b.start for a, b in itertools.pairwise(over)]
    assert all(m == step for m in moved[:-1])
    assert all(1 <= m <= step for m in moved[-1:])


def test_windows_by_hand():
    """N = 25: 5–25, then 0–20, clamped; the paper's 100 passages take nine."""
    assert windows(25, 20, 10) == [range(5, 25), range(20)]
    assert windows(20, 20, 10) == [range(20)]
    assert windows(3, 20, 10) == [range(3)]
    assert len(windows(100, 20, 10)) == 9
    assert windows(0, 20, 10) == []


def test_windows_that_do_not_overlap_are_refused():
    with pytest.raises(ValidationError, match=r"step \(10\) must be smaller than window \(10\)"):
        RankGPTSettings(model=FAKE, window=10)
    with pytest.raises(ValidationError, match="window"):
        FirstSettings(model=FAKE, window=27)


SIZES = [1, 3, 4, 5, 23]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("passes", [1, 2])
def test_calls_are_the_formula(size: int, passes: int):
    """Window 4, step 2, so N = 1, w − 1, w, w + 1 and another."""
    request, gains = known_list([float(i) for i in range(size)])
    for make in (rank_gpt, first):
        backend = oracle(gains)
        rounds = rounds_of(make(backend, window=4, step=2, passes=passes), backend, request)
        assert rounds == [1] * passes * (1 + math.ceil(max(0, size - 4) / 2))
    backend = oracle(gains)
    rounds = rounds_of(self_consistency(backend, window=4, step=2, permutations=3), backend, request)
    assert rounds == [3] * (1 + math.ceil(max(0, size - 4) / 2))


@pytest.mark.parametrize("make", [rank_gpt, first, self_consistency])
def test_nothing_to_rank_takes_no_call(make):
    backend = oracle({})
    request = CandidateList(query=Query(query_id="q", text="query"), candidates=())
    assert "no candidate could be scored" in outcome_of(make(backend), backend, request).error
    assert backend.calls == []


# Oracles


@settings(max_examples=40, deadline=None)
@given(gains=st.lists(st.integers(0, 30), min_size=1, max_size=40), window=st.integers(2, 26), data=st.data())
def test_an_oracle_fills_the_top(gains: list[int], window: int, data: st.DataObject):
    """One pass carries the best window − step passages to the front, all of them where one window holds the list."""
    step = data.draw(st.integers(1, window - 1))
    request, known = known_list([float(g) for g in gains])
    top = len(gains) if len(gains) <= window else window - step
    for make in (rank_gpt, first):
        backend = oracle(known)
        scores = outcome_of(make(backend, window=window, step=step), backend, request).scores.scores
        assert sorted(scores) == [float(n) for n in range(1, len(gains) + 1)]
        order = best_first(scores)
        assert [gains[i] for i in order[:top]] == sorted(gains, reverse=True)[:top]


def test_enough_passes_rank_everything():
    """Window 4, step 2: each pass settles two more."""
    request, gains = known_list([float(i) for i in range(12)])
    for make in (rank_gpt, first):
        backend = oracle(gains)
        outcome = outcome_of(make(backend, window=4, step=2, passes=6), backend, request)
        assert outcome.scores.scores == tuple(float(i + 1) for i in range(12))


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("borda", [4.0, 3.0, 2.0, 1.0]),
        ("rrf", [1 / 61, 1 / 62, 1 / 63, 1 / 64]),
        ("kemeny", [4.0, 3.0, 2.0, 1.0]),
    ],
)
def test_self_consistency_of_an_oracle(method: str, expected: list[float]):
    request, gains = known_list([4.0, 3.0, 2.0, 1.0])
    backend = oracle(gains)
    scores = outcome_of(self_consistency(backend, aggregation=method, permutations=5), backend, request).scores
    assert scores.scores == pytest.approx(expected)
    assert scores.uncertainty == (0.0,) * 4
    assert [len(batch) for batch in backend.batches] == [len(set(backend.batches[0]))]


# RankGPT


def test_windows_run_from_the_back_and_carry_the_best_forward():
    """Five passages, window 3, step 2: ranks 3–5 first, then 1–3; texts by hand."""
    request = make_list(size=5)
    backend = Script("[3] > [1] > [2]", "[3] > [2] > [1]")
    outcome = outcome_of(rank_gpt(backend, window=3, step=2), backend, request)
    texts = [c.text for c in request.candidates]
    assert [list(c.prompt.passages) for c in backend.calls] == [texts[2:], [*texts[:2], texts[4]]]
    # 2,3,4 -> 4,2,3; then 0,1,4 -> 4,1,0: the order is 4, 1, 0, 2, 3.
    assert outcome.scores.scores == (3.0, 4.0, 2.0, 1.0, 5.0)
    assert outcome.usage.calls == 2


def test_the_prompt():
    request = make_list(size=2)
    backend = Script("[2] > [1]")
    method = rank_gpt(backend)
    outcome_of(method, backend, request)
    (call,) = backend.calls
    assert (call.temperature, call.max_tokens) == (0.0, 256)
    text = "".join(call.prompt.parts)
    assert "[1] " in text
    assert "\n[2] " in text
    assert "query" in call.prompt.parts[0]
    assert method.name.startswith("rank_gpt:recorder:prompt=")


def test_passages_are_cut_and_can_not_pose_as_identifiers():
    (candidate,) = make_list(size=1).candidates
    long = replace(candidate, text="one [2]  two\nthree [Fig] [ x ] four five", title="Head")
    assert shown_passage(long, 8) == "Head one (2) two three (Fig) [ x"


def test_repairs_are_defects():
    request = make_list(size=3)
    backend = Script("[2] > [2] > [7]")
    scores = outcome_of(rank_gpt(backend), backend, request).scores
    assert scores.scores == (2.0, 3.0, 1.0)
    assert [str(d.kind) for d in scores.defects] == ["out_of_range", "repeated", "missing"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty: ''"),
        ("I'm sorry, I can't rank these.", "refusal: "),
        ("lorem ipsum", "unparsed: 'lorem ipsum'"),
        ("Passage…", "cut_off: 'Passage'; unparsed: 'Passage'"),
    ],
)
def test_a_window_without_a_ranking_leaves_no_label(text: str, said: str):
    """What the window held is in first-stage order, which is not the teacher's; the error names it."""
    request = make_list(size=5)
    backend = Script("[1] > [2]", text)
    outcome = outcome_of(rank_gpt(backend, window=3, step=2), backend, request)
    assert outcome.scores is None
    assert outcome.error.startswith(f"the window of ranks 1 to 3 was not ranked: {said}")
    # Rates of refusals count it, and the repair before it.
    assert [str(d.kind) for d in outcome.defects] == ["missing", *(part.split(":")[0] for part in said.split("; "))]


def test_an_answer_that_was_cut_off_is_marked():
    request = make_list(size=3)
    backend = Script("[3] > [2] > …")
    scores = outcome_of(rank_gpt(backend), backend, request).scores
    assert scores.scores == (1.0, 2.0, 3.0)
    assert [str(d.kind) for d in scores.defects] == ["cut_off", "missing"]


def test_insert_rank_shows_scores():
    request = make_list(size=2, scores=[12.345, -1.0])
    backend = Script("[2] > [1]")
    outcome_of(rank_gpt(backend, prompt="insert_rank"), backend, request)
    (call,) = backend.calls
    assert "(BM25 score: 12.35)" in call.prompt.parts[1]
    assert "(BM25 score: -1.00)" in call.prompt.parts[2]


def test_insert_rank_needs_every_score():
    """An error of that row; the row beside it is ranked."""
    good, bad = make_list("q1", 2, scores=[2.0, 1.0]), make_list("q2", 2, scores=[2.0, 1.0])
    bad = replace(bad, candidates=(bad.candidates[0], replace(bad.candidates[1], score=None)))
    backend = Script("[2] > [1]")
    outcomes = scheduler.run(rank_gpt(backend, prompt="insert_rank"), backend, [bad, good])
    assert outcomes[0].error == "candidate 'd1' has no score, and the prompt shows first-stage scores"
    assert outcomes[1].scores.scores == (1.0, 2.0)


def test_reasoning_is_kept_and_not_ranked_by():
    """The prompt's prefill opens the think block, so the answers do not."""
    request = make_list(size=5)
    backend = Script("first [1] > [2] > [3]?</think><answer>[3] > [1] > [2]</answer>", "b</think>[3] > [2] > [1]")
    outcome = outcome_of(rank_gpt(backend, window=3, step=2, prompt="rank_gpt_reasoning"), backend, request)
    assert outcome.scores.scores == (3.0, 4.0, 2.0, 1.0, 5.0)
    assert outcome.scores.rationales == ("first [1] > [2] > [3]?", "b")
    assert outcome.scores.rationales_are_of_calls
    assert backend.calls[0].prompt.prefill == "<think>\n"


def test_reasoning_that_was_cut_off_is_no_ranking():
    request = make_list(size=3)
    backend = Script("surely [3] > [2] > [1], but…")
    outcome = outcome_of(rank_gpt(backend, prompt="rank_gpt_reasoning"), backend, request)
    assert "was not ranked: cut_off: " in outcome.error


# FIRST


def test_first_by_hand():
    """Logits of A, B, C: 1, 3, 2 give B, C, A; equal ones keep their order."""
    request, gains = known_list([1.0, 3.0, 2.0])
    backend = Oracle(gains)
    method = first(backend)
    assert outcome_of(method, backend, request).scores.scores == (1.0, 3.0, 2.0)
    (call,) = backend.calls
    assert call.labels == ("A", "B", "C")
    assert call.prompt.prefill == "["
    assert "[C] " in "".join(call.prompt.parts)
    tied = Adversary(Reply(text="", favourite=2))
    assert outcome_of(first(tied), tied, request).scores.scores == (2.0, 1.0, 3.0)


def test_first_without_logits():
    request = make_list(size=3)
    broken = Adversary(Reply(text="", favourite=None))
    outcome = outcome_of(first(broken), broken, request)
    assert outcome.error == "the window of ranks 1 to 3 was not ranked: a logit is not a finite number"
    assert [str(d.kind) for d in outcome.defects] == ["unscored"]


def test_first_with_fewer_letters_than_the_window(tmp_path: Path):
    path = tmp_path / "t.yaml"
    content = {"method": "first", "about": "a", "text": "{query} {passages}", "passage": "{identifier} {passage}"}
    path.write_text(json.dumps(content | {"labels": ["A", "B"]}), encoding="utf-8")
    with pytest.raises(ConfigError, match="3 passages at once need as many labels, but the first template has 2"):
        first(Oracle({}), prompt=str(path), window=3, step=1)


# Self-consistency


def test_shuffles_depend_on_seed_and_query_alone():
    def shown(query_id: str, seed: int) -> list[tuple[str, ...]]:
        request, gains = known_list([float(i) for i in range(6)], "q1")
        backend = oracle(gains)
        request = replace(request, query=replace(request.query, query_id=query_id))
        outcome_of(self_consistency(backend, seed=seed, permutations=4), backend, request)
        return [c.prompt.passages for c in backend.calls]

    assert shown("q1", 0) == shown("q1", 0)
    assert len(set(shown("q1", 0))) == 4
    assert shown("q1", 0) != shown("q1", 1)
    assert shown("q1", 0) != shown("q2", 0)


def test_a_position_bias_averages_out():
    """A model that always answers in the order shown: no passage is preferred for its place in the first stage."""
    request = make_list(size=4)
    backend = Adversary(Reply(text="[1] > [2] > [3] > [4]", favourite=0))
    scores = outcome_of(self_consistency(backend, permutations=200, aggregation="borda"), backend, request).scores
    assert scores.scores == pytest.approx([2.5] * 4, abs=0.3)
    # Uniform ranks 0 … 3 have variance 5/4.
    assert scores.uncertainty == pytest.approx([math.sqrt(1.25)] * 4, abs=0.15)


def test_what_a_shuffle_leaves_out_is_not_in_its_ranking():
    """Three shuffles each name one passage, the same one: the others are held by none."""
    request, gains = known_list([1.0, 2.0, 3.0])
    backend = Oracle(gains, write=lambda g: f"[{best_first(g)[0] + 1}]")
    scores = outcome_of(self_consistency(backend, permutations=3), backend, request).scores
    assert scores.rationales_are_of_calls
    assert scores.scores[2] == 1.0 + 2.0
    assert all(map(math.isnan, scores.scores[:2]))
    assert [str(d) for d in scores.defects[-2:]] == [
        "unscored: d0: no shuffle's ranking holds it",
        "unscored: d1: no shuffle's ranking holds it",
    ]


def test_a_shuffle_without_a_ranking_counts_for_nothing():
    """Of six shuffles two are refused or fail in the first window, and one in the second, which it alone skips then."""
    request, gains = known_list([float(i) for i in range(6)])
    good = oracle(gains)
    bad = {2: Answer(value="I'm sorry, I can't", usage=USAGE), 3: Failure(reason="no answer")}
    bad[6] = Answer(value="", usage=USAGE)

    class Unreliable(Recorder):
        """Ranks, but for three of its calls."""

        def answer(self, call):
            self.count = getattr(self, "count", -1) + 1
            return bad.get(self.count) or good.answer(call)

    backend = Unreliable()
    outcome = outcome_of(self_consistency(backend, permutations=6, window=4, step=2), backend, request)
    assert [len(batch) for batch in backend.batches] == [6, 4]
    assert [str(d) for d in outcome.scores.defects] == [
        "refusal: shuffle 3, ranks 3 to 6: \"I'm sorry, I can't\"",
        "unscored: shuffle 4, ranks 3 to 6: no answer",
        "empty: shuffle 1, ranks 1 to 4: ''",
    ]
    assert best_first(outcome.scores.scores)[:2] == [5, 4]


# All of them


@pytest.mark.parametrize("make", [rank_gpt, first, self_consistency])
@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_adversaries_are_reported(make, adversary: str):
    """Whatever the model says, each row has an error, or scores with defects where an answer had to be repaired.

    FIRST takes a logit for a logit: a letter that is always the highest is no defect.
    """
    requests = [make_list(f"q{i}", 3 + i) for i in range(6)]
    backend = Adversary(*ADVERSARIES[adversary])
    outcomes = scheduler.run(make(backend, window=3, step=2), backend, requests)
    for outcome in outcomes:
        assert (outcome.scores is None) == (outcome.error is not None)
        assert outcome.error or outcome.scores.defects or make is first
        assert not outcome.error or outcome.defects
    if adversary != "always A":
        assert any(o.error for o in outcomes)


@pytest.mark.parametrize("make", [rank_gpt, first, self_consistency])
def test_alone_and_among_64_others(make):
    source = random.Random(0)
    lists = [known_list([source.random() for _ in range(1 + i % 9)], f"q{i}") for i in range(65)]
    gains = {text: gain for _, known in lists for text, gain in known.items()}
    requests = [request for request, _ in lists]
    backend = oracle(gains)
    method = make(backend, window=4, step=2, **({"permutations": 4} if make is self_consistency else {}))
    together = scheduler.run(method, backend, requests)
    rounds = len(backend.batches)
    # Windows of all queries run side by side: as many rounds as the longest list has windows.
    assert rounds == 1 + math.ceil((9 - 4) / 2)
    for request, outcome in zip(requests, together, strict=True):
        assert outcome.error is None
        assert outcome_of(method, backend, request).scores == outcome.scores


def test_a_window_larger_than_the_context(tmp_path: Path):
    """1,024 tokens hold no answer of 1,000 beside 20 passages: found before any row is read."""
    model = HFCausalSettings(path=str(tiny_llama_folder(tmp_path)), device="cpu", dtype="float32")
    backend = HFCausal(model)
    with pytest.raises(ConfigError, match=r"20 passages at once: .* raise max_length, show fewer or lower max_tokens"):
        rank_gpt(backend, max_tokens=1000)
    short = HFCausal(model.model_copy(update={"max_length": 100}))
    with pytest.raises(ConfigError, match="26 passages at once"):
        first(short, window=26)
    assert rank_gpt(backend, window=4, step=2, max_tokens=64).needs == {Generate}


def test_preflight_finds_a_template_of_another_method():
    for chosen in (RankGPTSettings(model=FAKE, prompt="first"), PermutationSelfConsistencySettings(model=FAKE)):
        if chosen.prompt == "first":
            with pytest.raises(ConfigError, match="template 'first' is written for first, not rank_gpt"):
                preflight(chosen)
        else:
            preflight(chosen)


def test_first_on_a_model(tmp_path: Path):
    """A real forward pass: the letters' logits of the whole window, the same alone and beside others."""
    model = HFCausalSettings(path=str(tiny_llama_folder(tmp_path)), device="cpu", dtype="float32", chat=False)
    ranker = Ranker(FirstSettings(model=model, window=4, step=2, passage_words=5))
    requests = [make_list(f"q{i}", 3 + i) for i in range(4)]
    together = ranker.rank(requests)
    for request, outcome in zip(requests, together, strict=True):
        assert outcome.error is None
        assert sorted(outcome.scores.scores) == [float(n) for n in range(1, len(request) + 1)]
        assert ranker.rank([request])[0].scores == outcome.scores
    assert First.needs == {NextToken}


@pytest.mark.parametrize(
    ("method", "size"),
    [
        ("setwise", {"children": 2}),
        ("rank_r1", {"children": 2}),
        ("rank_gpt", {"window": 3, "step": 1}),
        ("group_rank", {"group_size": 3}),
        ("rebel", {"group_size": 3}),
        ("icr", {"documents_per_prompt": 3}),
        ("e2rank", {"documents": 3}),
    ],
)
def test_preflight_finds_a_template_with_too_few_labels(tmp_path: Path, method: str, size: dict):
    """Every method that shows a list names its passages by the labels that its template has."""
    path = tmp_path / "t.yaml"
    text = "{criteria} {passages} {query}" if method == "rebel" else "{passages} {query}"
    content = {"method": method, "about": "a", "text": text, "passage": "{identifier} {passage}"}
    path.write_text(json.dumps(content | {"labels": ["A", "B"]}), encoding="utf-8")
    settings = {"method": method, "model": {"kind": "fake"}, "prompt": str(path), **size}
    with pytest.raises(ConfigError, match="3 passages at once need as many labels"):
        preflight(TypeAdapter(RankerSettings).validate_python(settings))


@pytest.mark.parametrize(
    ("labels", "refused"),
    [
        ([*"ABCD"], None),
        (["1", "2", "10"], None),
        ([*"ABa"], "'A' differs"),
        (["A", "B", "AA"], "can't be found"),
        (["01", "02", "03"], "can't be found"),
        (["1", "2", "A"], "can't be found"),
    ],
)
def test_labels_that_a_ranking_can_not_be_read_with_are_refused(tmp_path: Path, labels: list[str], refused: str | None):
    path = tmp_path / "mine.yaml"
    content = {"method": "rank_gpt", "about": "mine", "text": "{query} {passages}", "passage": "{identifier} {passage}"}
    path.write_text(json.dumps(content | {"labels": labels}), encoding="utf-8")
    for settings_class in (RankGPTSettings, PermutationSelfConsistencySettings):
        chosen = settings_class(model=FAKE, prompt=str(path), window=len(labels), step=1)
        with nullcontext() if refused is None else pytest.raises(ConfigError, match=refused):
            Ranker(chosen)
