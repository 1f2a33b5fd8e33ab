"""What listwise rankers have in common: windows, calls, oracles, adversaries, and what is refused at the start."""

from __future__ import annotations

import itertools
import json
import math
import random
from contextlib import nullcontext
from pathlib import Path

import pytest
from fixtures.listwise import FAKE, first, oracle, rank_gpt, self_consistency
from fixtures.oracles import (
    ADVERSARIES,
    Adversary,
    best_first,
    known_list,
    outcome_of,
    rounds_of,
)
from fixtures.rows import make_list
from fixtures.tiny_models import tiny_llama_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from rerank_ray.errors import ConfigError
from rerank_ray.models.hf_causal import HFCausal
from rerank_ray.models.protocol import Generate, NextToken
from rerank_ray.ranking import scheduler
from rerank_ray.ranking.first import First
from rerank_ray.ranking.rankers import Ranker, preflight
from rerank_ray.ranking.windows import windows
from rerank_ray.records import CandidateList, Query
from rerank_ray.settings.models import HFCausalSettings
from rerank_ray.settings.rankers import (
    FirstSettings,
    PermutationSelfConsistencySettings,
    RankerSettings,
    RankGPTSettings,
)

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
