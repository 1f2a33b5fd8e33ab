"""What must hold of every ranking method, whatever it asks: an oracle makes it rank perfectly, in as many calls as
docs/methods.md says; answers of no use are told, never ranked by; a query's scores are its own.

Forms, prompts and edge cases of single methods are in the tests of their families.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from fixtures.oracles import (
    ADVERSARIES,
    USAGE,
    Adversary,
    Oracle,
    Reply,
    best_first,
    known_list,
    outcome_of,
    permutation,
    rounds_of,
)
from fixtures.rows import make_list
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from rerank_ray.models.protocol import (
    Answer,
    Attention,
    Call,
    Embed,
    EmbedTokens,
    Generate,
    LogLikelihood,
    NextToken,
    Pair,
    Result,
)
from rerank_ray.ranking import scheduler
from rerank_ray.ranking.heads_file import HeadScore, HeadsFile, save_heads
from rerank_ray.ranking.rankers import METHODS, method_class
from rerank_ray.records import CandidateList, Query, ranking_of
from rerank_ray.settings.rankers import RankerSettings

NAME = "any"
LETTERS = "ABCDEFGHIJKLMNOPQRST"
NUMBERS = [str(n) for n in range(1, 21)]
WINDOW, STEP = 4, 2
SIZES = [1, WINDOW - 1, WINDOW, WINDOW + 1, 9]
CRITERIA = "1. It is deep.\n2. It is recent.\n3. It is clear."

WITHOUT_MODEL = {"bm25", "first_stage", "imported"}
COMPOSITIONS = {"ensemble", "cascade", "selective"}
NO_RANKER = {"write_query"}


def windows(count: int) -> int:
    return 1 + math.ceil(max(0, count - WINDOW) / STEP)


def heap(count: int, k: int, children: int) -> int:
    """Comparisons of a heap sort: each node's height to build it, and the root's for every place but the first."""

    def height(node: int) -> int:
        return 1 + height(node * children + 1) if node * children + 1 < count else 0

    return sum(map(height, range(count))) + (min(k, count) - 1) * height(0)


def graded(gains: Sequence[float]) -> str:
    return json.dumps({str(i): gain for i, gain in enumerate(gains, 1)})


def graded_by_criteria(gains: Sequence[float]) -> str:
    """The criteria themselves where no passage is shown; all passages are equally good by them."""
    return json.dumps({str(i): [gain, 1, 1, 1] for i, gain in enumerate(gains, 1)}) if gains else CRITERIA


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A method's settings, how an oracle writes for it, its calls for N candidates, and the places that it sorts."""

    settings: dict
    calls: Callable[[int], int]
    write: Callable[[Sequence[float]], str] | None = None
    at_most: bool = False
    """`calls` is a bound: how many a sort asks depends on the answers."""
    top: int | None = None
    """Below these places nothing is promised; None sorts all."""


WINDOWED = {"window": WINDOW, "step": STEP}
CASES = {
    "yes_no": Case(settings={}, calls=lambda n: n),
    "fine_grained": Case(settings={}, calls=lambda n: n),
    "erank": Case(settings={}, calls=lambda n: 2 * n, write=lambda g: f"Well. <answer>{g[0]:g}</answer>"),
    "query_likelihood": Case(settings={}, calls=lambda n: n),
    "prp": Case(settings={"k": 3}, calls=lambda n: 4 * (n + 2 * int(math.log2(n))), at_most=True, top=3),
    "duot5": Case(settings={}, calls=lambda n: n * (n - 1)),
    "setwise": Case(settings={"k": 3}, calls=lambda n: heap(n, 3, 2), at_most=True, top=3),
    "rank_r1": Case(
        settings={"k": 3, "children": 3},
        calls=lambda n: heap(n, 3, 3),
        at_most=True,
        top=3,
        write=lambda g: f"<think>Well.</think> <answer>[{best_first(g)[0] + 1}]",
    ),
    "icr": Case(settings={"documents_per_prompt": WINDOW}, calls=windows, top=WINDOW - STEP),
    "core_heads": Case(settings={"documents_per_prompt": WINDOW, "count": 2}, calls=windows, top=WINDOW - STEP),
    "rank_gpt": Case(settings=WINDOWED, calls=windows, top=WINDOW - STEP, write=permutation(NUMBERS)),
    "first": Case(settings=WINDOWED, calls=windows, top=WINDOW - STEP),
    "permutation_self_consistency": Case(
        settings=WINDOWED | {"permutations": 3},
        calls=lambda n: 3 * windows(n),
        top=WINDOW - STEP,
        write=permutation(NUMBERS),
    ),
    "group_rank": Case(settings={"group_size": 4}, calls=lambda n: math.ceil(n / 4), write=graded),
    "rebel": Case(settings={"group_size": 4}, calls=lambda n: 1 + math.ceil(n / 4), write=graded_by_criteria),
    "e2rank": Case(settings={"documents": 3}, calls=lambda n: n + 2),
    "cross_encoder": Case(settings={}, calls=lambda n: n),
    "bi_encoder": Case(settings={}, calls=lambda n: n + 1),
    "maxsim": Case(settings={}, calls=lambda n: n + 1),
}
# Whatever one logit, vector or number says is a score: nothing tells that it is always the same.
TAKES_ANY_NUMBER = set(CASES) - {"rank_gpt", "permutation_self_consistency", "group_rank", "rebel", "erank", "rank_r1"}


class AnyOracle(Oracle):
    """Answers every kind of call from the gains, which are 0 to 10."""

    answers = frozenset({NextToken, LogLikelihood, Generate, Attention, Pair, Embed, EmbedTokens})
    name = NAME
    attention_shape = (2, 2)

    def answer(self, call: Call) -> Result:
        if isinstance(call, Attention):
            return said(tuple(np.array([self.gains[p]], dtype=np.float32) for p in call.prompt.passages))
        if isinstance(call, Embed | EmbedTokens):
            # A query points along the first axis, a document the more so the more relevant it is.
            cosine = 1.0 if call.role == "query" else self.gains[call.text] / 10
            vector = (cosine, math.sqrt(1 - cosine**2))
            return said(vector if isinstance(call, Embed) else np.array([vector], dtype=np.float32))
        if isinstance(call, LogLikelihood):
            return said((self.gains[call.prompt.passages[0]] - 20.0,))
        if isinstance(call, NextToken) and len(call.prompt.passages) == 1 and len(call.labels) > 2:
            level = self.gains[call.prompt.passages[0]] / 10 * (len(call.labels) - 1)
            return said(tuple(-((number - level) ** 2) for number in range(len(call.labels))))
        return super().answer(call)


class AnyAdversary(Adversary):
    """An adversary that is asked for attention and embeddings too: the same for every text, or no numbers."""

    answers = AnyOracle.answers
    name = NAME
    attention_shape = (2, 2)

    def answer(self, call: Call) -> Result:
        result = super().answer(call)
        if not isinstance(result, Answer) or not isinstance(call, Attention | Embed | EmbedTokens):
            return result
        number = math.nan if math.isnan(result.value[0]) else 1.0
        if isinstance(call, Attention):
            return said(tuple(np.array([number], dtype=np.float32) for _ in call.prompt.passages))
        return said((number, 0.0) if isinstance(call, Embed) else np.array([[number, 0.0]], dtype=np.float32))


def said(value: object) -> Answer:
    return Answer(value=value, usage=USAGE)


@pytest.fixture(scope="module")
def heads_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("heads") / "heads.json")
    heads = tuple(HeadScore(layer=0, head=head, score=0.5) for head in (0, 1))
    save_heads(path, HeadsFile(model=NAME, prompt="p", layers=2, temperature=0.1, queries=1, heads=heads))
    return path


@pytest.fixture
def make(name: str, heads_file: str) -> Callable:
    """The method on a backend."""
    more = {"heads_file": heads_file} if name == "core_heads" else {}
    given = {"method": name, "model": {"kind": "fake"}, **more, **CASES[name].settings}
    settings = TypeAdapter(RankerSettings).validate_python(given)
    return lambda backend: method_class(name)(settings, backend)


def test_no_method_is_left_out():
    assert set(METHODS) == set(CASES) | WITHOUT_MODEL | COMPOSITIONS | NO_RANKER


@pytest.mark.parametrize("name", CASES)
@given(gains=st.lists(st.integers(0, 10), min_size=1, max_size=11, unique=True))
@hypothesis_settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_oracle_ranks_perfectly(make: Callable, name: str, gains: list[int]):
    request, known = known_list([float(g) for g in gains])
    backend = AnyOracle(known, CASES[name].write)
    outcome = outcome_of(make(backend), backend, request)
    assert outcome.scores.defects == ()
    ranked = ranking_of(request, outcome.scores, NAME).doc_ids
    expected = [f"d{i}" for i in best_first(gains)]
    assert list(ranked[: CASES[name].top]) == expected[: CASES[name].top]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", SIZES)
def test_calls_are_the_formula(make: Callable, name: str, size: int):
    """Worst order: every passage is better than those before it."""
    request, known = known_list([float(g) for g in range(1, size + 1)])
    backend = AnyOracle(known, CASES[name].write)
    calls = sum(rounds_of(make(backend), backend, request))
    expected = CASES[name].calls(size)
    assert calls <= expected if CASES[name].at_most else calls == expected


@pytest.mark.parametrize("name", CASES)
def test_nothing_to_rank(make: Callable, name: str):
    backend = AnyAdversary(Reply(text="", favourite=None))
    outcome = outcome_of(make(backend), backend, CandidateList(query=Query(query_id="q", text="query"), candidates=()))
    assert outcome.error


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_answers_of_no_use_are_told(make: Callable, name: str, adversary: str):
    """Every row has an error or scores; a candidate without one has a defect; and who never answers leaves no label."""
    backend = AnyAdversary(*ADVERSARIES[adversary])
    for outcome in scheduler.run(make(backend), backend, [make_list(f"q{i}", 2 + i) for i in range(5)]):
        assert (outcome.scores is None) == (outcome.error is not None)
        if outcome.scores is not None:
            missing = sum(map(math.isnan, outcome.scores.scores))
            assert len(outcome.scores.defects) >= missing
            assert outcome.scores.defects or name in TAKES_ANY_NUMBER
        if adversary in ("garbage", "refusals", "failures"):
            assert outcome.error


@pytest.mark.parametrize("name", CASES)
def test_a_query_scores_the_same_alone_and_among_64_others(make: Callable, name: str):
    lists = [known_list([float((3 * i + 7 * j) % 11) for j in range(1 + i % 7)], f"q{i}") for i in range(65)]
    backend = AnyOracle({text: gain for _, known in lists for text, gain in known.items()}, CASES[name].write)
    method = make(backend)
    together = scheduler.run(method, backend, [request for request, _ in lists])
    for number in (0, 13, 41, 64):
        alone = outcome_of(method, backend, lists[number][0])
        assert (alone.scores, alone.error) == (together[number].scores, None)
