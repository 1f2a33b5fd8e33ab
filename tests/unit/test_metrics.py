from __future__ import annotations

import math
import random

import pytest

from rerank_ray.errors import ConfigError, InputError
from rerank_ray.metrics.evaluation import SystemResult, evaluate_rankings, parse_metric
from rerank_ray.metrics.significance import compare_systems, holm

QRELS = {"q1": {"a": 3, "b": 1, "c": 0, "d": 2}, "q2": {"x": 1}, "q3": {"n": 0}}
RANKINGS = {"q1": ["b", "c", "u", "a"], "q9": ["a"]}


def one(metric: str, qrels=QRELS, rankings=RANKINGS) -> SystemResult:
    return evaluate_rankings(qrels, {"s": rankings}, [metric])["s"]


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("ndcg@10", (1 + 3 / math.log2(5)) / (3 + 2 / math.log2(3) + 1 / 2)),
        ("ndcg@2", 1 / (3 + 2 / math.log2(3))),
        ("ndcg_burges@10", (1 + 7 / math.log2(5)) / (7 + 3 / math.log2(3) + 1 / 2)),
        ("mrr@10", 1.0),
        ("mrr-l2", 1 / 4),
        ("mrr@3-l2", 0.0),
        ("map", (1 / 1 + 2 / 4) / 3),
        ("map-l2", (1 / 4) / 2),
        ("recall@100", 2 / 3),
        ("recall@1", 1 / 3),
        ("precision@5", 2 / 5),
        ("precision", 2 / 4),
        ("hit_rate@1", 1.0),
        ("hit_rate@3-l2", 0.0),
        ("r-precision", 1 / 3),
    ],
)
def test_values_by_hand(metric: str, expected: float) -> None:
    """Ranking b c u a, gains 1 0 – 3 (u unjudged); ideal a d b, gains 3 2 1; three relevant documents, two found.

    DCG, linear gain: 1/log2(2) + 3/log2(5); ideal 3/log2(2) + 2/log2(3) + 1/log2(4). Exponential: 1, 7 and 7, 3, 1.
    Relevant at ranks 1 and 4, where precision is 1/1 and 2/4. From gain 2 on only a and d are relevant, a at rank 4.
    """
    assert one(metric).per_query[metric]["q1"] == pytest.approx(expected, abs=1e-12)


def test_queries_without_ranking_or_relevant_documents_count_as_zero() -> None:
    """q2 has no ranking, q3 no relevant document, q9 no qrels: the mean is q1's 2/5 over three queries."""
    result = one("p@5")
    assert result.per_query["precision@5"] == {"q1": pytest.approx(0.4), "q2": 0.0, "q3": 0.0}
    assert result.means["precision@5"] == pytest.approx(0.4 / 3)
    assert (result.queries, result.queries_without_ranking, result.queries_without_relevant) == (3, 2, 1)
    assert result.rankings_without_qrels == 1


def test_against_a_plain_implementation() -> None:
    """nDCG, AP and RR written plainly, over random judgments and rankings with unjudged documents."""
    rng = random.Random(0)
    qrels = {f"q{i}": {f"d{j}": rng.choice([0, 0, 1, 2, 3]) for j in range(rng.randint(1, 30))} for i in range(40)}
    rankings = {q: rng.sample([f"d{j}" for j in range(60)], rng.randint(0, 50)) for q in qrels}
    result = evaluate_rankings(qrels, {"s": rankings}, ["ndcg@10", "map", "mrr"])["s"]
    for q, gains in qrels.items():
        ranked = [gains.get(d, 0) for d in rankings[q]]
        ideal = sorted(gains.values(), reverse=True)
        found = [rank for rank, gain in enumerate(ranked, 1) if gain >= 1]
        relevant = sum(g >= 1 for g in gains.values())
        ndcg = plain_dcg(ranked[:10]) / plain_dcg(ideal[:10]) if relevant else 0.0
        ap = sum((i + 1) / rank for i, rank in enumerate(found)) / relevant if relevant else 0.0
        assert result.per_query["ndcg@10"][q] == pytest.approx(ndcg, abs=1e-9)
        assert result.per_query["map"][q] == pytest.approx(ap, abs=1e-9)
        assert result.per_query["mrr"][q] == pytest.approx(1 / found[0] if found else 0.0, abs=1e-9)


def plain_dcg(gains: list[int]) -> float:
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, 1))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("nDCG@10", "ndcg@10"),
        ("ndcg_cut_10", "ndcg@10"),
        ("ndcg_cut.5", "ndcg@5"),
        ("recip_rank", "mrr"),
        ("RR@10", "mrr@10"),
        ("map_cut_100", "map@100"),
        ("AP", "map"),
        ("recall_100", "recall@100"),
        ("P_5", "precision@5"),
        ("p@5-l2", "precision@5-l2"),
        ("success_1", "hit_rate@1"),
        ("Rprec", "r-precision"),
        ("r-precision-l2", "r-precision-l2"),
        ("ndcg_burges@10", "ndcg_burges@10"),
    ],
)
def test_metric_names(text: str, name: str) -> None:
    assert parse_metric(text).name == name


@pytest.mark.parametrize("text", ["", "ndcgg@10", "ndcg@", "ndcg@0", "ndcg@x", "mrr-l0", "Rprec@5", "@10"])
def test_unknown_metrics_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="metric"):
        parse_metric(text)


def test_repeated_documents_and_empty_qrels_are_refused() -> None:
    with pytest.raises(InputError, match="'x' is ranked twice"):
        evaluate_rankings(QRELS, {"s": {"q2": ["x", "y", "x"]}}, ["map"])
    with pytest.raises(InputError, match="qrels are empty"):
        evaluate_rankings({}, {"s": {}}, ["map"])


def system(values: list[float]) -> SystemResult:
    per_query = {f"q{i}": v for i, v in enumerate(values)}
    return SystemResult(
        means={"m": sum(values) / len(values)},
        per_query={"m": per_query},
        queries=len(values),
        queries_without_ranking=0,
        queries_without_relevant=0,
        rankings_without_qrels=0,
    )


def test_exact_randomisation_by_hand() -> None:
    """Differences 1, 2, 3: of 8 sign patterns only +++ and --- reach |sum| = 6, so p = 2/8.

    Student: mean 2, standard deviation 1, t = 2·√3 = 3.4641 with 2 degrees of freedom, two-sided p = 0.07418.
    (For 2 degrees of freedom p = 1 - t/√(2 + t²) = 1 - 3.4641/√14.)
    """
    (c,) = compare_systems({"a": system([1, 2, 3]), "b": system([0, 0, 0])}, "m")
    assert c.difference == pytest.approx(2)
    assert c.p_randomisation == pytest.approx(2 / 8)
    assert c.p_t == pytest.approx(1 - math.sqrt(12 / 14), abs=1e-9)


def test_sampled_randomisation_is_seeded_and_never_zero() -> None:
    rng = random.Random(1)
    a = [rng.random() for _ in range(50)]
    systems = {
        "a": system([v + 0.5 + rng.gauss(0, 0.01) for v in a]),
        "b": system(a),
        "c": system([v + rng.gauss(0, 0.1) for v in a]),
    }
    first, second = (compare_systems(systems, "m", resamples=999, seed=7) for _ in range(2))
    assert first == second
    shift = first[0]
    assert shift.p_randomisation == pytest.approx(2 / 1000)
    assert shift.p_t < 1e-12
    assert first[2].p_randomisation > 0.01


def test_equal_systems_do_not_differ() -> None:
    (c,) = compare_systems({"a": system([0.5, 0.2]), "b": system([0.5, 0.2])}, "m")
    assert (c.difference, c.p_randomisation, c.p_t) == (0.0, 1.0, 1.0)
    assert compare_systems({"a": system([0.5])}, "m") == ()


def test_a_single_query_shows_no_difference() -> None:
    """Both its signs are as extreme as what was found."""
    (c,) = compare_systems({"a": system([1.0]), "b": system([0.5])}, "m")
    assert (c.difference, c.p_randomisation, c.p_t) == (0.5, 1.0, 1.0)


def test_holm_by_hand() -> None:
    """Sorted .01 .02 .03 .8 times 4 3 2 1 = .04 .06 .06 .8; the third stays at .06 because it may not fall."""
    assert holm([0.8, 0.01, 0.03, 0.02]) == pytest.approx([0.8, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
