"""Setwise and Rank-R1 on oracles and adversaries: order, calls, votes, rationales, failures."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import pytest
from fixtures.oracles import (
    ADVERSARIES,
    ALWAYS_A,
    USAGE,
    Adversary,
    Oracle,
    Recorder,
    best_first,
    best_label,
    known_list,
    order_of,
    outcome_of,
    top_k,
)
from fixtures.rows import make_list
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from rerank_ray.errors import ConfigError, ModelError
from rerank_ray.models.protocol import Answer, Call, Failure, Generate, Result
from rerank_ray.ranking.rankers import Ranker, preflight
from rerank_ray.ranking.setwise import Setwise
from rerank_ray.settings.models import FakeSettings, HFCausalSettings
from rerank_ray.settings.rankers import RankR1Settings, SetwiseSettings

LETTERS = "ABCDEFGHIJKLMNOPQRST"
STRATEGIES = ["heapsort", "bubblesort"]
strategies, ks, arities = st.sampled_from(STRATEGIES), st.integers(1, 20), st.integers(2, 5)
gains_lists = st.lists(st.integers(0, 9), min_size=1, max_size=25)


def setwise(backend: Recorder, **chosen) -> Setwise:
    return Setwise(SetwiseSettings(model=FakeSettings(), **chosen), backend)


def rank_r1(backend: Recorder, **chosen) -> Setwise:
    return Setwise(RankR1Settings(model=FakeSettings(), **chosen), backend)


@given(strategies, gains_lists, ks, arities)
def test_an_oracle_ranks_the_top_k(strategy: str, gains: list[int], k: int, children: int):
    """Equal logits go to the passage that the first stage ranked higher."""
    request, known = known_list(gains)
    backend = Oracle(known)
    outcome = outcome_of(setwise(backend, strategy=strategy, k=k, children=children), backend, request)
    assert order_of(outcome) == top_k(gains, k)
    assert sorted(outcome.scores.scores) == [float(n) for n in range(1, len(gains) + 1)]
    assert outcome.scores.defects == ()


@given(strategies, st.permutations(range(12)), arities, st.integers(1, 4))
def test_an_oracle_that_writes_its_answer(strategy: str, gains: list[int], children: int, permutations: int):
    request, known = known_list(gains)
    backend = Oracle(known, best_label(LETTERS))
    method = setwise(backend, strategy=strategy, mode="generation", children=children, permutations=permutations)
    outcome = outcome_of(method, backend, request)
    assert order_of(outcome) == top_k(gains, 10)
    assert {type(call) for call in backend.calls} == {Generate}


@given(gains_lists, ks, arities)
def test_calls_are_the_formulas(gains: list[int], k: int, children: int):
    """Bubblesort at most ⌈(N−1−p)/c⌉ in pass p; heapsort at most each node's height, and the root's for each place but
    the first."""
    n = len(gains)
    request, known = known_list(gains)
    asked = {}
    for strategy in STRATEGIES:
        backend = Oracle(known)
        outcome_of(setwise(backend, strategy=strategy, k=k, children=children), backend, request)
        asked[strategy] = len(backend.calls)
        assert all(2 <= len(call.labels) == len(call.prompt.passages) <= children + 1 for call in backend.calls)
    assert asked["bubblesort"] <= sum(math.ceil((n - 1 - p) / children) for p in range(min(k, n - 1)))

    def height(node: int) -> int:
        first = node * children + 1
        return 1 + height(first) if first < n else 0

    assert asked["heapsort"] <= sum(map(height, range(n))) + (min(k, n) - 1) * height(0)


def test_calls_by_hand():
    """Seven passages in falling order, c = 2: the heap's three parents keep their places, then [d6, d1, d2] and
    [d6, d3, d4] settle the second place; bubblesort's three windows stay as they are, and its second pass asks
    [d1, d2] anew, the rest being known."""
    for strategy, calls in (("heapsort", 5), ("bubblesort", 4)):
        request, known = known_list(list(range(7, 0, -1)))
        backend = Oracle(known)
        assert order_of(outcome_of(setwise(backend, strategy=strategy, k=2), backend, request)) == list(range(7))
        assert len(backend.calls) == calls
    shown = [[int(p.split()[2]) for p in call.prompt.passages] for call in backend.calls]
    assert shown == [[4, 5, 6], [2, 3, 4], [0, 1, 2], [1, 2]]


def test_a_prompt_shows_the_set():
    request, known = known_list([1, 2, 3])
    backend = Oracle(known)
    outcome_of(setwise(backend), backend, request)
    (call,) = [c for c in backend.calls if len(c.labels) == 3]
    assert call.labels == ("A", "B", "C")
    assert call.prompt.passages == tuple(c.text for c in request.candidates)
    assert "query" in call.prompt.parts[0]
    assert call.prompt.parts[0].endswith("Passage A: ")
    assert "3 passages" in call.prompt.parts[0]


@pytest.mark.parametrize("name", ["garbage", "refusals", "failures"])
@given(strategies, st.sampled_from(["likelihood", "generation"]), st.integers(1, 16), ks, arities)
@settings(max_examples=30)
def test_a_model_without_answers_ranks_nothing(name, strategy, mode, size, k, children):
    backend = Adversary(*ADVERSARIES[name])
    method = setwise(backend, strategy=strategy, k=k, children=children, mode=mode)
    outcome = outcome_of(method, backend, make_list(size=size))
    if size == 1:
        assert outcome.scores.scores == (1.0,)
    else:
        assert "comparisons have no answer: the order would be the first stage's" in outcome.error
        assert outcome.scores is None


@given(strategies, st.sampled_from(["always A", "alternating"]), st.integers(1, 16), ks, arities)
def test_a_model_with_some_answers_gives_a_permutation_or_an_error(strategy, name, size, k, children):
    backend = Adversary(*ADVERSARIES[name])
    method = setwise(backend, strategy=strategy, k=k, children=children, mode="generation")
    outcome = outcome_of(method, backend, make_list(size=size))
    if outcome.error is None:
        assert sorted(order_of(outcome)) == list(range(size))
        kept = [s for s in outcome.scores.scores if not math.isnan(s)]
        assert len(kept) == len(set(kept))
    if name == "always A" and strategy == "bubblesort":
        assert order_of(outcome) == list(range(size))


class Script(Recorder):
    """Answers the n-th call with the n-th value; None fails it."""

    def __init__(self, *values: object) -> None:
        super().__init__()
        self.values = iter(values)

    def answer(self, call: Call) -> Result:
        value = next(self.values)
        return Failure(reason="timed out") if value is None else Answer(value=value, usage=USAGE)


def test_a_bad_label_decides_nothing():
    """Bubbles over four passages by twos: [d1 d2 d3] has no answer and stays, so that [d0 d1] moves d1 up; the second
    pass asks [d0 d2 d3] and is told d3."""
    backend = Script("none of them", "B", "C")
    method = setwise(backend, strategy="bubblesort", mode="generation", k=2)
    outcome = outcome_of(method, backend, make_list(size=4))
    assert order_of(outcome) == [1, 3, 0, 2]
    (defect,) = map(str, outcome.scores.defects)
    assert defect.startswith("unparsed: d1, d2, d3: ")


def test_a_label_outside_the_set_is_no_answer():
    """D in a set of three."""
    outcome = outcome_of(setwise(b := Script("D"), mode="generation", k=1), b, make_list())
    assert "1 of 1 comparisons have no answer" in outcome.error
    assert [d.kind for d in outcome.defects] == ["unscored", "out_of_range"]


# Votes


def test_the_same_set_is_asked_in_several_orders():
    """The first as it is; the others depend on query and set alone."""
    shown = {}
    for query_id in ("q1", "q1", "q2"):
        backend = Adversary(ALWAYS_A)
        outcome_of(setwise(backend, children=9, permutations=5, k=1), backend, make_list(query_id, 10))
        orders = [tuple(int(p.split()[2]) for p in call.prompt.passages) for call in backend.calls]
        assert len(set(orders)) == len(orders) == 5
        assert orders[0] == tuple(range(10))
        assert shown.setdefault(query_id, orders) == orders
    assert shown["q1"] != shown["q2"]


def test_a_small_set_is_asked_in_no_order_twice():
    """A set of two has two orders: an order that came twice would vote twice."""
    backend = Adversary(ALWAYS_A)
    outcome_of(setwise(backend, children=1, permutations=5, k=1, strategy="bubblesort"), backend, make_list("q", 4))
    orders = [tuple(int(p.split()[2]) for p in call.prompt.passages) for call in backend.calls]
    assert len(orders) == len(set(orders)) == 6


class PositionBiased(Recorder):
    """Prefers d2 wherever it stands, unless the first passage is d0: then that one."""

    def answer(self, call: Call) -> Result:
        places = [int(p.split()[2]) for p in call.prompt.passages]
        chosen = 0 if places[0] == 0 else places.index(2)
        return Answer(value=tuple(float(i == chosen) for i in range(len(places))), usage=USAGE)


def test_most_votes_win():
    """A single order is decided by position; nine of them by what the model prefers in the other orders."""
    places = {}
    for permutations in (1, 9):
        backend = PositionBiased()
        outcome = outcome_of(setwise(backend, children=9, k=1, permutations=permutations), backend, make_list(size=10))
        places[permutations] = order_of(outcome)[0]
    assert places == {1: 0, 9: 2}


def test_votes_that_fail_do_not_count():
    """Of three votes one fails: the others decide, and the defect stays."""
    request, known = known_list([0, 0, 1])
    orders = []

    class Lossy(Oracle):
        def answer(self, call: Call) -> Result:
            orders.append(call.prompt.passages)
            return Failure(reason="timed out") if len(orders) == 1 else super().answer(call)

    outcome = outcome_of(setwise(b := Lossy(known), permutations=3, k=1), b, request)
    assert order_of(outcome) == [2, 0, 1]
    assert [str(d) for d in outcome.scores.defects] == ["unscored: d0, d1, d2: timed out"]


# Rank-R1


def reasoned(gains: Sequence[float]) -> str:
    best = best_first(gains)[0] + 1
    return f"<think>[1] is off, [2] too; {best} of {len(gains)} answers it</think>\n<answer>[{best}]"


@given(strategies, st.lists(st.integers(0, 99), min_size=1, max_size=50, unique=True), ks, st.integers(2, 19))
def test_rank_r1_reads_the_answer_not_the_reasoning(strategy: str, gains: list[int], k: int, children: int):
    request, known = known_list(gains)
    backend = Oracle(known, reasoned)
    outcome = outcome_of(rank_r1(backend, strategy=strategy, k=k, children=children), backend, request)
    assert order_of(outcome) == top_k(gains, k)


def test_rank_r1_asks_twenty_at_once():
    """100 passages, c = 19: at most 99/19 + 1 parents to build and 2 steps for each of 9 more places."""
    request, known = known_list(list(range(100)))
    backend = Oracle(known, reasoned)
    outcome = outcome_of(rank_r1(backend), backend, request)
    assert order_of(outcome)[:10] == list(range(99, 89, -1))
    assert max(len(c.prompt.passages) for c in backend.calls) == 20
    assert len(backend.calls) <= 6 + 1 + 9 * 2
    call = backend.calls[0]
    assert call.stop == ("</answer>",)
    assert "<answer>[3]</answer>" in call.prompt.system


def test_the_winner_keeps_the_rationale():
    """Sets [d1 d2] and [d0 d2], the first of which d2 wins, the second d0."""
    backend = Script("<think>two is on topic</think><answer>[2]", "<think>one is better</think><answer>[1]")
    outcome = outcome_of(rank_r1(backend, strategy="bubblesort", children=1, k=1), backend, make_list())
    assert outcome.scores.rationales == ("one is better", "", "two is on topic")
    assert outcome_of(setwise(b := Script((1.0, 0.0, 0.0)), k=1), b, make_list()).scores.rationales is None


def test_the_rationale_is_of_a_vote_for_the_winner():
    """The set as it is gets a vote for its first passage; the other eight orders are judged by content."""

    class Reasons(PositionBiased):
        def answer(self, call: Call) -> Result:
            choice = best_first(super().answer(call).value)[0]
            reason = "it comes first" if choice == 0 and call.prompt.passages[0].split()[2] == "0" else "it answers"
            return Answer(value=f"<think>{reason}</think><answer>[{choice + 1}]", usage=USAGE)

    outcome = outcome_of(rank_r1(b := Reasons(), children=9, k=1, permutations=9), b, make_list(size=10))
    assert outcome.scores.rationales == ("", "", "it answers", *[""] * 7)


@pytest.mark.parametrize(
    ("text", "cut_off", "kind"),
    [
        ("<think>passage [2] is good", True, "cut_off"),
        ("<think>passage [2] is good</think> It is passage [2].", False, "unparsed"),
        ("It is passage [2], because it", True, "cut_off"),
        ("I'm sorry, but I can't help with that.", False, "refusal"),
        ("<think>hm</think><answer>[9]", False, "out_of_range"),
        ("<think>hm</think><answer>", False, "empty"),
        ("", False, "empty"),
    ],
)
def test_reasoning_without_a_label(text: str, cut_off: bool, kind: str):
    """A label that the reasoning mentions is no answer."""

    class Says(Recorder):
        def answer(self, call: Call) -> Result:
            return Answer(value=text, usage=USAGE, cut_off=cut_off)

    outcome = outcome_of(rank_r1(b := Says(), k=1), b, make_list())
    assert str(outcome.defects[1]).startswith(f"{kind}: d0, d1, d2: ")


def test_thinking_that_does_not_end_is_no_answer_elsewhere_either():
    outcome = outcome_of(setwise(b := Script("<think> I like Passage B"), mode="generation", k=1), b, make_list())
    assert str(outcome.defects[1]).startswith("empty: d0, d1, d2: ")


# Company and settings


CHOSEN = [
    *(SetwiseSettings(model=FakeSettings(), strategy=s, k=3, permutations=p) for s in STRATEGIES for p in (1, 3)),
    SetwiseSettings(model=FakeSettings(), children=5),
]


@pytest.mark.parametrize("chosen", CHOSEN, ids=lambda c: f"{c.strategy}-{c.children}-{c.permutations}")
def test_scores_are_the_same_alone_and_among_64(chosen: SetwiseSettings):
    requests = [make_list(f"q{i}", 1 + i % 9) for i in range(64)]
    ranker = Ranker(chosen)
    together = ranker.rank(requests)
    for request, outcome in zip(requests, together, strict=True):
        (alone,) = ranker.rank([request])
        assert (alone.scores, alone.error, alone.usage) == (outcome.scores, None, outcome.usage)


@pytest.mark.parametrize("settings_class", [SetwiseSettings, RankR1Settings])
@pytest.mark.parametrize("wrong", [{"k": 0}, {"children": 0}, {"permutations": 0}, {"children": 1}])
def test_settings_that_can_not_work(settings_class: type, wrong: dict):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        settings_class(model=FakeSettings(), **wrong)


def test_a_chain_is_fine_for_bubbles():
    assert SetwiseSettings(model=FakeSettings(), strategy="bubblesort", children=1).children == 1


def test_more_passages_than_labels_are_refused_before_anything_starts():
    """The built-in template has twenty letters."""
    preflight(SetwiseSettings(model=FakeSettings(), children=19))
    for check in (preflight, Ranker):
        with pytest.raises(ConfigError, match="21 passages at once need as many labels, but the setwise template"):
            check(SetwiseSettings(model=FakeSettings(), children=20))
    preflight(RankR1Settings(model=FakeSettings(), children=30))


def test_labels_of_several_tokens_are_refused_at_the_start(tiny_llama, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        'method: setwise\nabout: mine\ntext: "{query} {passages}"\npassage: "{identifier} {passage}"\n'
        'labels: ["A", "B", "passage three"]\n',
        encoding="utf-8",
    )
    with pytest.raises(ModelError, match="label 'passage three' is"):
        Ranker(SetwiseSettings(model=HFCausalSettings(path=str(tiny_llama)), prompt=str(path)))


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([*"ABCa"], "'A' differs from another label in case alone"),
        (["A", "B", "passage three"], "'A', 'B', 'passage three', … can't be found in a text"),
    ],
)
def test_labels_that_no_text_tells_apart_are_refused_where_texts_are_read(tmp_path, labels: list[str], said: str):
    path = tmp_path / "mine.yaml"
    content = {"method": "setwise", "about": "mine", "text": "{query} {passages}", "passage": "{identifier} {passage}"}
    path.write_text(json.dumps(content | {"labels": labels}), encoding="utf-8")
    options = {"model": FakeSettings(), "prompt": str(path), "children": len(labels) - 1}
    with pytest.raises(ConfigError, match=said):
        Ranker(SetwiseSettings(**options, mode="generation"))
    Ranker(SetwiseSettings(**options))


def test_a_set_that_does_not_fit_is_an_error_of_its_row(tiny_llama):
    ranker = Ranker(SetwiseSettings(model=HFCausalSettings(path=str(tiny_llama), max_length=300)))
    bad, good = ranker.rank([make_list("q1", text="query " * 400), make_list("q2")])
    assert "raise max_length" in str(bad.defects[1])
    assert sorted(good.scores.scores) == [1.0, 2.0, 3.0]


def test_a_set_that_can_never_fit_is_refused_at_the_start(tiny_llama):
    """Twenty passages, and 2,048 tokens of reasoning."""
    for chosen in (SetwiseSettings, RankR1Settings):
        with pytest.raises(ConfigError, match="20 passages at once"):
            Ranker(chosen(model=HFCausalSettings(path=str(tiny_llama), max_length=200), children=19))


def test_names_tell_what_changes_scores():
    backend = Oracle({})
    changes = [{}, {"k": 3}, {"children": 3}, {"permutations": 2}, {"strategy": "bubblesort"}, {"mode": "generation"}]
    assert len({setwise(backend, **change).name for change in changes}) == len(changes)
    assert rank_r1(backend).name.startswith("rank_r1:")
