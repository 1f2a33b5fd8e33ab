"""PRP and duoT5 on oracles, adversaries and tables: order, calls, failures."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from fixtures.oracles import (
    ADVERSARIES,
    ALWAYS_A,
    USAGE,
    Adversary,
    Oracle,
    Recorder,
    best_label,
    known_list,
    order_of,
    outcome_of,
    top_k,
)
from fixtures.rows import make_list
from fixtures.tiny_models import tiny_t5_folder
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from rerank_ray.errors import ConfigError, ModelError
from rerank_ray.models.protocol import Answer, Call, Failure, Generate, NextToken, Result
from rerank_ray.prompts.render import Template
from rerank_ray.ranking import scheduler
from rerank_ray.ranking.duot5 import DuoT5
from rerank_ray.ranking.prp import PRP
from rerank_ray.ranking.rankers import Ranker
from rerank_ray.records import CandidateList, DefectKind
from rerank_ray.settings.models import FakeSettings, HFCausalSettings, HFSeq2SeqSettings
from rerank_ray.settings.rankers import DuoT5Settings, PRPSettings

STRATEGIES = ["allpair", "heapsort", "sliding"]
MODES = ["scoring", "generation"]
strategies, modes, ks = st.sampled_from(STRATEGIES), st.sampled_from(MODES), st.integers(1, 20)
gains_lists = st.lists(st.integers(0, 9), min_size=1, max_size=16)


def prp(backend: Recorder, **chosen) -> PRP:
    if chosen.get("strategy") == "allpair":
        chosen.pop("k", None)  # it compares all
    return PRP(PRPSettings(model=FakeSettings(), **chosen), backend)


def duot5(backend: Recorder, **chosen) -> DuoT5:
    return DuoT5(DuoT5Settings(model=FakeSettings(), **chosen), backend)


# PRP


@given(strategies, gains_lists, ks)
def test_an_oracle_ranks_perfectly(strategy: str, gains: list[int], k: int):
    """allpair all of the list, the sorts its first k; equal gains are ties and keep the first stage's order."""
    request, known = known_list(gains)
    backend = Oracle(known)
    outcome = outcome_of(prp(backend, strategy=strategy, k=k), backend, request)
    assert order_of(outcome) == top_k(gains, len(gains) if strategy == "allpair" else k)
    assert outcome.scores.defects == ()


@given(strategies, st.permutations(range(9)))
def test_an_oracle_that_writes_its_answer(strategy: str, gains: list[int]):
    request, known = known_list(gains)
    backend = Oracle(known, best_label(["Passage A", "Passage B"]))
    outcome = outcome_of(prp(backend, strategy=strategy, mode="generation"), backend, request)
    assert order_of(outcome) == top_k(gains, len(gains))
    assert {type(call) for call in backend.calls} == {Generate}


@given(strategies, modes, st.integers(1, 16), ks)
def test_a_model_that_always_answers_a_changes_nothing(strategy: str, mode: str, size: int, k: int):
    """Its answers contradict each other, which are ties; the list says that its order is the first stage's."""
    backend = Adversary(ALWAYS_A)
    outcome = outcome_of(prp(backend, strategy=strategy, mode=mode, k=k), backend, make_list(size=size))
    assert order_of(outcome) == list(range(size))
    assert [d.kind for d in outcome.scores.defects] == [DefectKind.INCONSISTENT] * (size > 1)
    if strategy == "allpair":
        assert set(outcome.scores.scores) == {(size - 1) / 2}


@given(strategies, gains_lists, ks)
def test_calls_are_the_formulas(strategy: str, gains: list[int], k: int):
    """allpair N(N−1); sliding at most 2k(N−1); heapsort at most 2 orders · 2 duels · (N steps to build the heap, and
    ⌊log₂N⌋ for each of the other k − 1 places). Never both orders of a pair again."""
    request, known = known_list(gains)
    backend = Oracle(known)
    outcome = outcome_of(prp(backend, strategy=strategy, k=k), backend, request)
    n = len(gains)
    bounds = {
        "allpair": n * (n - 1),
        "sliding": 2 * k * (n - 1),
        "heapsort": 4 * (n + (min(k, n) - 1) * math.floor(math.log2(n))),
    }
    assert len(backend.calls) <= bounds[strategy]
    assert len(backend.calls) == len(set(backend.calls)) == outcome.usage.calls
    if strategy == "allpair":
        assert len(backend.calls) == bounds["allpair"]


def test_sliding_calls_by_hand():
    """Gains 0…4 and k = 2: each pass moves one up, 4 + 3 pairs in both orders; in falling order one pass is all."""
    for gains, calls in ((range(5), 14), (range(5, 0, -1), 8)):
        request, known = known_list(list(gains))
        backend = Oracle(known)
        outcome_of(prp(backend, strategy="sliding", k=2), backend, request)
        assert len(backend.calls) == calls


def test_allpair_scores_by_hand():
    """Gains 1, 3, 1: 3 wins twice, the others tie: 0.5, 2, 0.5, and the ranking keeps the first before the third."""
    request, known = known_list([1, 3, 1])
    backend = Oracle(known)
    outcome = outcome_of(prp(backend, strategy="allpair"), backend, request)
    assert outcome.scores.scores == (0.5, 2.0, 0.5)
    assert order_of(outcome) == [1, 0, 2]


def test_both_orders_share_a_prefix():
    """The query stands before the passages, so that a backend can compute it once."""
    backend = Oracle(known_list([1, 2])[1])
    outcome_of(prp(backend), backend, make_list(size=2))
    first, second = backend.calls
    assert first.prompt.passages == second.prompt.passages[::-1]
    assert first.prompt.parts == second.prompt.parts
    assert "query" in first.prompt.parts[0]
    assert first.labels == ("A", "B")


class PairTable(Recorder):
    """Answers a call by its two passages' places in `q1`'s list; what the table lacks fails."""

    def __init__(self, table: dict[tuple[int, int], object]) -> None:
        super().__init__()
        self.table = table
        self.place = {c.contents: i for i, c in enumerate(make_list(size=9).candidates)}

    def answer(self, call: Call) -> Result:
        pair = tuple(self.place[p] for p in call.prompt.passages)
        if pair not in self.table:
            return Failure(reason="timed out")
        return Answer(value=self.table[pair], usage=USAGE)


def oracle_table(gains: Sequence[float]) -> dict[tuple[int, int], object]:
    return {(i, j): (gains[i], gains[j]) for i, j in itertools.permutations(range(len(gains)), 2)}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_unanswered_comparison_is_a_tie_and_a_defect(strategy: str):
    """One order of (1, 2) has no answer; the other one alone, which prefers 2, is no win. Both beat 0."""
    table = oracle_table([0, 1, 2])
    del table[1, 2]
    backend = PairTable(table)
    outcome = outcome_of(prp(backend, strategy=strategy), backend, make_list())
    assert order_of(outcome) == [1, 2, 0]
    assert [str(d) for d in outcome.scores.defects] == ["unscored: d1, d2: timed out"]
    if strategy == "allpair":
        assert outcome.scores.scores == (0.0, 1.5, 1.5)


def test_half_of_the_comparisons_may_contradict_themselves():
    """Of three pairs one is chosen by its position: a tie. With two the order is no longer the model's."""
    table = oracle_table([0, 1, 2])
    table[0, 1] = (1, 0)
    backend = PairTable(table)
    assert outcome_of(prp(backend, strategy="allpair"), backend, make_list()).scores.defects == ()
    table[0, 2] = (1, 0)
    backend = PairTable(table)
    scores = outcome_of(prp(backend, strategy="allpair"), backend, make_list()).scores
    said = "inconsistent: 2 of 3 comparisons contradict themselves: the order is mostly the first stage's"
    assert [str(d) for d in scores.defects] == [said]
    assert scores.scores == (1.0, 0.5, 1.5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_candidate_that_is_never_judged_has_no_score(strategy: str):
    """Every prompt with passage 2 fails: its place would be the first stage's. The others are ranked around it."""
    gains = [0, 1, 5, 2, 3, 4]
    backend = PairTable({pair: v for pair, v in oracle_table(gains).items() if 2 not in pair})
    outcome = outcome_of(prp(backend, strategy=strategy), backend, make_list(size=6))
    assert [i for i, s in enumerate(outcome.scores.scores) if math.isnan(s)] == [2]
    assert "unscored: d2: none of its comparisons has an answer" in map(str, outcome.scores.defects)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ADVERSARIES)
@pytest.mark.parametrize("size", [1, 2, 7])
def test_adversaries_make_no_label(name: str, strategy: str, mode: str, size: int):
    """Garbage, refusals and failures end in the row's error, which counts them; a list of one needs no comparison."""
    backend = Adversary(*ADVERSARIES[name])
    outcome = outcome_of(prp(backend, strategy=strategy, mode=mode), backend, make_list(size=size))
    if size == 1:
        assert outcome.scores.scores == ((0.0,) if strategy == "allpair" else (1.0,))
    elif name == "always A":
        assert order_of(outcome) == list(range(size))
    elif name != "alternating":
        assert outcome.scores is None
        assert "comparisons have no answer: the order would be the first stage's" in outcome.error
        kinds = {"garbage": "unparsed", "refusals": "refusal"} if mode == "generation" else {}
        assert kinds.get(name, "unscored") in {d.kind for d in outcome.defects}


def test_a_list_without_scores_says_what_was_wrong():
    backend = Adversary(*ADVERSARIES["refusals"])
    outcome = outcome_of(prp(backend, strategy="allpair", mode="generation"), backend, make_list())
    lost, refusals = map(str, outcome.defects)
    assert lost == "unscored: 3 of 3 comparisons have no answer: the order would be the first stage's"
    assert refusals.startswith("refusal: 6×, first of d0, d1: ")
    assert outcome.defects[1].count == outcome.usage.calls == 6


def test_half_of_the_comparisons_is_enough():
    """Of (0, 1), (0, 2), (1, 2) … among four: three of six may fail, four may not."""
    every = list(itertools.combinations(range(4), 2))
    for failing, fails in ((3, False), (4, True)):
        kept = {pair: v for pair, v in oracle_table([0, 1, 2, 3]).items() if tuple(sorted(pair)) in every[failing:]}
        outcome = outcome_of(prp(b := PairTable(kept), strategy="allpair"), b, make_list(size=4))
        assert (outcome.error is not None) is fails


def test_nothing_to_compare():
    """The contract forbids empty lists; a method that gets one ends without a call, in the row's error."""
    request = CandidateList(query=make_list().query, candidates=())
    backend = Adversary(ALWAYS_A)
    for method in (*(prp(backend, strategy=s) for s in STRATEGIES), duot5(backend)):
        outcome = outcome_of(method, backend, request)
        assert (outcome.error, backend.calls) == ("no candidate could be scored", [])


# duoT5


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


@given(
    st.lists(st.lists(st.floats(-8, 8), min_size=4, max_size=4), min_size=4, max_size=4),
    st.sampled_from(["sum", "sum_log", "sym_sum", "sym_sum_log"]),
)
def test_duot5_is_the_papers_formula(margins: list[list[float]], aggregation: str):
    """Σ over j of p_ij, log p_ij, p_ij + 1 − p_ji and log p_ij + log(1 − p_ji), in a plain loop."""
    backend = PairTable({(i, j): (margins[i][j], 0.0) for i, j in itertools.permutations(range(4), 2)})
    outcome = outcome_of(duot5(backend, aggregation=aggregation), backend, make_list(size=4))
    p = [[1 / (1 + math.exp(-m)) for m in row] for row in margins]
    log_p = [[-softplus(-m) for m in row] for row in margins]
    log_not_p = [[-softplus(m) for m in row] for row in margins]
    term = {
        "sum": lambda i, j: p[i][j],
        "sum_log": lambda i, j: log_p[i][j],
        "sym_sum": lambda i, j: p[i][j] + 1 - p[j][i],
        "sym_sum_log": lambda i, j: log_p[i][j] + log_not_p[j][i],
    }[aggregation]
    expected = [sum(term(i, j) for j in range(4) if j != i) for i in range(4)]
    assert outcome.scores.scores == pytest.approx(expected, abs=1e-9)


@given(gains_lists, st.integers(1, 18))
def test_duot5_ranks_the_top_and_leaves_the_rest(gains: list[int], top: int):
    """m(m−1) calls; candidates below the first m stay below all of them in their order."""
    request, known = known_list(gains)
    backend = Oracle(known)
    outcome = outcome_of(duot5(backend, top=top), backend, request)
    m = min(top, len(gains))
    assert len(backend.calls) == m * (m - 1)
    # Equal gains have equal probabilities, but sums in another order of terms may differ in the last digit.
    ranked = order_of(outcome)
    assert [gains[i] for i in ranked[:m]] == sorted(gains[:m], reverse=True)
    assert ranked[m:] == list(range(m, len(gains)))
    scores = outcome.scores.scores
    assert all(min(scores[:m]) > s for s in scores[m:])


def test_a_prompt_of_duot5():
    backend = Oracle(known_list([1, 2])[1])
    outcome_of(duot5(backend), backend, make_list(size=2))
    prompt = backend.calls[0].prompt
    a, b = prompt.passages
    assert (prompt.parts, prompt.chat) == (("Query: query Document0: ", " Document1: ", " Relevant:"), False)
    assert (a, b) == tuple(c.text for c in make_list(size=2).candidates)
    assert backend.calls[0].labels == ("true", "false")


def test_duot5_of_a_t5(tmp_path):
    """A tiny T5 in the published form against a plain loop: the first decoder step's softmax over true and false."""
    folder = tiny_t5_folder(tmp_path / "t5")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    labels = tokenizer.convert_tokens_to_ids(["▁true", "▁false"])
    request = make_list(size=4)
    texts = [c.text for c in request.candidates]

    @torch.no_grad()
    def p(i: int, j: int) -> float:
        text = f"Query: query Document0: {texts[i]} Document1: {texts[j]} Relevant:"
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        logits = model(input_ids=ids, decoder_input_ids=torch.tensor([[0]])).logits[0, -1]
        return float(logits[labels].softmax(-1)[0])

    ranker = Ranker(DuoT5Settings(model=HFSeq2SeqSettings(path=str(folder), dtype="float32", max_length=512)))
    (outcome,) = ranker.rank([request])
    expected = [sum(p(i, j) + 1 - p(j, i) for j in range(4) if j != i) for i in range(4)]
    assert outcome.scores.scores == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 1e-3


def test_a_pair_that_duot5_lacks_is_left_out():
    """Margins of 0 give 1 for each pair, so 3 in four; without the pair (0, 1), sums of 2 are scaled by 3/2."""
    table = dict.fromkeys(itertools.permutations(range(4), 2), (0.0, 0.0))
    del table[1, 0]
    outcome = outcome_of(duot5(b := PairTable(table)), b, make_list(size=4))
    assert outcome.scores.scores == pytest.approx((3.0, 3.0, 3.0, 3.0))
    assert [str(d) for d in outcome.scores.defects] == ["unscored: d0, d1: timed out"]


def test_a_candidate_that_duot5_can_not_judge():
    table = {pair: v for pair, v in oracle_table([0, 1, 5, 2, 3]).items() if 2 not in pair}
    outcome = outcome_of(duot5(b := PairTable(table), top=4), b, make_list(size=5))
    scores = outcome.scores.scores
    assert [i for i, s in enumerate(scores) if math.isnan(s)] == [2]
    assert scores[3] > scores[1] > scores[0] > scores[4]


@pytest.mark.parametrize("name", sorted(set(ADVERSARIES) - {"always A", "alternating"}))
def test_duot5_without_answers(name: str):
    outcome = outcome_of(duot5(b := Adversary(*ADVERSARIES[name])), b, make_list())
    assert "3 of 3 comparisons have no answer" in outcome.error


# Both


CHOSEN = [
    PRPSettings(model=FakeSettings(), strategy="allpair"),
    *(PRPSettings(model=FakeSettings(), strategy=s, k=3) for s in STRATEGIES if s != "allpair"),
    DuoT5Settings(model=FakeSettings(), top=5),
]


@pytest.mark.parametrize("chosen", CHOSEN, ids=lambda c: f"{c.method}-{getattr(c, 'strategy', '')}")
def test_scores_are_the_same_alone_and_among_64(chosen: PRPSettings | DuoT5Settings):
    requests = [make_list(f"q{i}", 1 + i % 9) for i in range(64)]
    ranker = Ranker(chosen)
    together = ranker.rank(requests)
    for request, outcome in zip(requests, together, strict=True):
        (alone,) = ranker.rank([request])
        assert (alone.scores, alone.error, alone.usage) == (outcome.scores, None, outcome.usage)


def test_queries_are_compared_side_by_side():
    """Eight lists of gains in order: as many rounds as for one, of eight times the calls."""
    lists = [known_list(list(range(9, 0, -1)), f"q{i}") for i in range(8)]
    alone, together = Oracle(lists[0][1]), Oracle({k: v for _, known in lists for k, v in known.items()})
    scheduler.run(prp(alone), alone, [lists[0][0]])
    scheduler.run(prp(together), together, [request for request, _ in lists])
    assert [len(b) for b in together.batches] == [8 * len(b) for b in alone.batches]


def test_a_query_that_does_not_fit_is_an_error_of_its_row(tiny_llama):
    """The template and query alone pass max_length; the query beside it is ranked."""
    ranker = Ranker(PRPSettings(model=HFCausalSettings(path=str(tiny_llama), max_length=200)))
    long, short = make_list("q1", text="query " * 300), make_list("q2")
    bad, good = ranker.rank([long, short])
    assert "comparisons have no answer" in bad.error
    assert "raise max_length" in str(bad.defects[1])
    assert sorted(good.scores.scores) == [1.0, 2.0, 3.0]


def test_labels_of_several_tokens_are_refused_at_the_start(tiny_llama, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        'method: prp\nabout: mine\ntext: "{query} {passage_a} {passage_b}"\nlabels: ["First one", "B"]\n',
        encoding="utf-8",
    )
    with pytest.raises(ModelError, match="label 'First one' is"):
        Ranker(PRPSettings(model=HFCausalSettings(path=str(tiny_llama)), prompt=str(path)))


def test_a_mode_that_the_backend_can_not_answer(monkeypatch: pytest.MonkeyPatch):
    from rerank_ray.models.fake import Fake

    monkeypatch.setattr(Fake, "answers", frozenset({NextToken}))
    with pytest.raises(ConfigError, match=r"method prp needs \['Generate'\], which fake:seed=0 does not answer"):
        Ranker(PRPSettings(model=FakeSettings(), mode="generation"))
    Ranker(PRPSettings(model=FakeSettings(), mode="scoring"))


@pytest.mark.parametrize("method", ["prp", "duot5"])
def test_a_pair_has_two_labels(method: str):
    with pytest.raises(ValueError, match="labels must be two"):
        Template(method=method, about="a", text="{query} {passage_a} {passage_b}", labels=("A", "B", "C"))


def test_names_tell_what_changes_scores():
    backend = Oracle({})
    names = {prp(backend, strategy=s, mode=m, k=k).name for s in STRATEGIES for m in MODES for k in (1, 2)}
    assert len(names) == 10  # k is nothing to allpair
    assert len({duot5(backend, top=t, aggregation=a).name for t in (1, 2) for a in ("sum", "sym_sum")}) == 4
