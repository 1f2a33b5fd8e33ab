"""Effectiveness of rankings against relevance judgments, computed by ranx.

ranx is imported on first use: it compiles its metrics once per installation (some 10 s, kept in numba's cache) and
costs about 2 s per process after that.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rerank_ray.errors import ConfigError, InputError

Qrels = Mapping[str, Mapping[str, float]]
Rankings = Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricFamily:
    """A metric without its cutoff: the function of `ranx.metrics` that computes it, and its definition in words."""

    function: str
    definition: str


FAMILIES = {
    "ndcg": MetricFamily(
        function="ndcg",
        definition="DCG over the ideal DCG of all judged documents, gain linear: gain / log2(rank + 1), as trec_eval's",
    ),
    "ndcg_burges": MetricFamily(
        function="ndcg_burges",
        definition="nDCG with exponential gain: (2^gain - 1) / log2(rank + 1) (Burges et al. 2005)",
    ),
    "mrr": MetricFamily(function="reciprocal_rank", definition="1 / rank of the first relevant document, else 0"),
    "map": MetricFamily(
        function="average_precision",
        definition="sum of the precision at each relevant document's rank / number of relevant documents",
    ),
    "recall": MetricFamily(function="recall", definition="relevant documents retrieved / all relevant documents"),
    "precision": MetricFamily(
        function="precision",
        definition="relevant documents retrieved / cutoff (without a cutoff: / documents retrieved)",
    ),
    "hit_rate": MetricFamily(function="hit_rate", definition="1 if a relevant document is retrieved, else 0"),
    "r-precision": MetricFamily(function="r_precision", definition="precision at the number of relevant documents"),
}

ALIASES = {
    "ndcg_cut": "ndcg",
    "recip_rank": "mrr",
    "rr": "mrr",
    "ap": "map",
    "map_cut": "map",
    "r": "recall",
    "p": "precision",
    "set_p": "precision",
    "success": "hit_rate",
    "rprec": "r-precision",
}

_METRIC = re.compile(r"(?P<family>[a-z_-]+?)(?:[@._](?P<cutoff>[1-9]\d*))?(?:-l(?P<min_gain>[1-9]\d*))?", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A metric to compute: its family, the rank it stops at (None = the whole ranking) and the least relevant gain."""

    family: str
    cutoff: int | None = None
    min_gain: int = 1

    @property
    def name(self) -> str:
        """The canonical name: `ndcg@10`, `recall@100-l2`."""
        cutoff = f"@{self.cutoff}" if self.cutoff else ""
        return self.family + cutoff + (f"-l{self.min_gain}" if self.min_gain > 1 else "")

    @property
    def definition(self) -> str:
        scope = f"over the first {self.cutoff} documents" if self.cutoff else "over the whole ranking"
        return f"{FAMILIES[self.family].definition}; {scope}; gains of {self.min_gain} and above are relevant"


def parse_metric(text: str) -> Metric:
    """Read a metric such as `ndcg@10`, `mrr@10`, `map`, `recall@100`, `precision@5`, `hit_rate@1` or `r-precision`.

    `-l2` at the end makes gains of 2 and above relevant instead of 1 and above (trec_eval's `-l2`); for nDCG lower
    gains then count as 0. trec_eval's names mean the same: `ndcg_cut_10`, `recip_rank`, `map_cut_100`, `recall_100`,
    `P_5`, `success_1`, `Rprec`; so do `p@5`, `r@100`, `ap`, `rr@10`.

    Raises:
        ConfigError: the name is unknown.
    """
    match = _METRIC.fullmatch(text.strip())
    family = match["family"].lower() if match else ""
    family = ALIASES.get(family, family)
    if match is None or family not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ConfigError(f"metric {text!r} is unknown; write one of {known}, with an optional cutoff: ndcg@10")
    if family == "r-precision" and match["cutoff"]:
        raise ConfigError(
            f"metric {text!r}: r-precision takes no cutoff, its cutoff is the number of relevant documents"
        )
    return Metric(
        family=family,
        cutoff=int(match["cutoff"]) if match["cutoff"] else None,
        min_gain=int(match["min_gain"] or 1),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemResult:
    """One system's effectiveness over all `queries` of the qrels, and what was counted on the way.

    A query of the qrels without a ranking, or without a relevant document, scores 0 and stays in the mean: trec_eval
    does the same with `-c` (it only leaves out queries that the qrels don't name at all).
    """

    means: dict[str, float]
    """Metric name -> mean over the queries of the qrels."""
    per_query: dict[str, dict[str, float]]
    """Metric name -> query id -> value, in the order of the qrels."""
    queries: int
    queries_without_ranking: int
    queries_without_relevant: int
    """Queries whose judgments are all below gain 1: no ranking can score above 0 on them."""
    rankings_without_qrels: int
    """Rankings of queries that the qrels don't name: ignored."""


def evaluate_rankings(
    qrels: Qrels, systems: Mapping[str, Rankings], metrics: Sequence[Metric | str]
) -> dict[str, SystemResult]:
    """Score the rankings of several systems with every metric.

    `qrels` maps query id -> doc id -> gain; each system maps query id -> doc ids, best first. The order of the doc ids
    is all that counts: no score is sorted, so ties can't be broken in another way. Unjudged documents have gain 0, and
    so do gains below 1.

    Raises:
        ConfigError: a metric is unknown.
        InputError: the qrels are empty, or a ranking holds a doc id twice.
    """
    if not qrels:
        raise InputError("the qrels are empty: without judged queries there is nothing to measure")
    parsed = [m if isinstance(m, Metric) else parse_metric(m) for m in metrics]
    judged = [_judged_array(gains) for gains in qrels.values()]
    without_relevant = sum(not (array[:, 1] >= 1).any() for array in judged)
    results = {}
    for name, rankings in systems.items():
        ranked = [_ranked_array(rankings.get(q, ()), gains, q, name) for q, gains in qrels.items()]
        values = _ranx_values(judged, ranked, parsed)
        results[name] = SystemResult(
            means={metric: float(np.mean(v)) for metric, v in values.items()},
            per_query={metric: dict(zip(qrels, v.tolist(), strict=True)) for metric, v in values.items()},
            queries=len(qrels),
            queries_without_ranking=sum(not rankings.get(q) for q in qrels),
            queries_without_relevant=without_relevant,
            rankings_without_qrels=sum(q not in qrels for q in rankings),
        )
    return results


def _judged_array(gains: Mapping[str, float]) -> np.ndarray:
    """`[documents, 2]` of (document number, gain), highest gain first: the ideal ranking. Numbers count the qrels."""
    pairs = sorted(enumerate(gains.values()), key=lambda pair: -pair[1])
    return np.array(pairs, dtype=np.float64).reshape(-1, 2)


def _ranked_array(doc_ids: Sequence[str], gains: Mapping[str, float], query_id: str, system: str) -> np.ndarray:
    """`[documents, 2]` of (document number, descending pseudo-score); unjudged documents are numbered -1.

    ranx would number documents by a 64-bit hash cut to 53 bits; numbering the judged ones by position can't collide.
    """
    if len(set(doc_ids)) != len(doc_ids):
        twice = next(d for i, d in enumerate(doc_ids) if d in doc_ids[:i])
        raise InputError(f"{system}: query {query_id!r}: {twice!r} is ranked twice; a second hit would count as a gain")
    number = {doc_id: i for i, doc_id in enumerate(gains)}
    array = np.empty((len(doc_ids), 2))
    array[:, 0] = [number.get(d, -1) for d in doc_ids]
    array[:, 1] = np.arange(len(doc_ids), 0, -1)
    return array


def _ranx_values(
    judged: list[np.ndarray], ranked: list[np.ndarray], metrics: Sequence[Metric]
) -> dict[str, np.ndarray]:
    from numba.core.errors import NumbaWarning
    from numba.typed import List
    from ranx import metrics as ranx_metrics

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumbaWarning)
        judged_list, ranked_list = List(judged), List(ranked)
        # The metric functions, not `ranx.evaluate`, which loses the values of a lone metric that has a cutoff (0.3.21).
        return {
            m.name: getattr(ranx_metrics, FAMILIES[m.family].function)(
                judged_list, ranked_list, m.cutoff or 0, m.min_gain
            )
            for m in metrics
        }
