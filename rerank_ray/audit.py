"""What a label run is worth before a student learns from it: `rerank-ray audit`.

Scores, defects, position bias, self-consistency, agreement with other runs and with known gains, and calibration. Rows
are read without their texts, and other runs are matched by query id, so many queries at a time, so that memory holds
these queries' ids and scores (and the qrels), whatever the size of the runs.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from rich.console import Console

from rerank_ray.accounting import count_output
from rerank_ray.errors import ConfigError, InputError
from rerank_ray.formats.lines import BadLines
from rerank_ray.formats.qrels import read_qrels
from rerank_ray.metrics.agreement import auc, kendall, ndcg, ranks, rbo
from rerank_ray.parquet import inspect_input, read_scored, record_of
from rerank_ray.report.tables import format_value, print_table
from rerank_ray.runs import resolve_ended
from rerank_ray.schema import LABELS, check_scored

_QUERIES_AT_A_TIME = 100_000
_SAMPLE = 1_000_000
_QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
_RELEVANT = 1.0
_BINS = 10

Qrels = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """One labelled query: its candidates in input order with scores and known gains, NaN where there is none."""

    doc_ids: tuple[str, ...]
    scores: np.ndarray
    labels: np.ndarray

    @property
    def ranking(self) -> list[str]:
        """The scored candidates, best first; ties in input order."""
        order = np.argsort(-self.scores, kind="stable")
        return [self.doc_ids[i] for i in order if not np.isnan(self.scores[i])]


def audit(
    run: str,
    *,
    against: Sequence[str] = (),
    shuffled: str | None = None,
    repeat: str | None = None,
    qrels: str | None = None,
) -> dict[str, Any]:
    """Audit a label run; returns the report as JSON types.

    Args:
        run: label run folder or label Parquet; a run that failed for its defects can be audited too.
        against: label runs of other teachers over the same queries.
        shuffled: a run of the same teacher over the same lists in another order (`rerank-ray shuffle`).
        repeat: a second run of the same teacher over the same input.
        qrels: TREC or BEIR qrels; without them the candidates' own `label` is the gain, where there is any.

    A measure of single queries is its mean over the queries where it is defined, and `queries` says how many those are.
    Candidates that are not judged count as not relevant, as `rerank-ray evaluate` counts them, in queries with at least
    one judgment; gains of 1 and above are relevant.

    Raises:
        InputError: a run that is not there or holds no labels, or no query in common.
        RowError: a row without `error` has no scores, not as many as candidates, or an infinite one.
        ConfigError: two runs of one name.
    """
    others = _named(against, {"shuffled": shuffled, "repeat": repeat})
    sources = {name: resolve_ended(uri) for name, uri in others.items()}
    data = resolve_ended(run)
    summary = inspect_input(data, LABELS)
    teacher = _teacher(data) if summary.rows else None
    for name, uri in sources.items():
        if not np.isin(inspect_input(uri, LABELS).id_hashes, summary.id_hashes).any():
            raise InputError(f"{others[name]}: has no query in common with {run}")
        if name in ("shuffled", "repeat") and _teacher(uri) != teacher:
            raise InputError(f"{others[name]}: is of another teacher than {run}: name it with --against")
    if not summary.rows:
        raise InputError(f"{run}: has no rows: there is nothing to audit")
    judgments = read_qrels(qrels, BadLines()) if qrels else None
    counts = count_output(data, summary.rows)
    scores, gains = _ScoreStatistics(), _GainStatistics()
    compared = {name: _Comparison() for name in sources}
    every_entry = _entries(data)
    while here := dict(islice(every_entry, _QUERIES_AT_A_TIME)):
        entries = {name: dict(_entries(uri, here)) for name, uri in sources.items()}
        for query_id, entry in here.items():
            scores.add(entry)
            gains.add(entry, judgments.get(query_id) if judgments is not None else _own_gains(entry))
            for name, comparison in compared.items():
                comparison.add(entry, entries[name].get(query_id))
    if qrels and not gains.queries:
        raise InputError(f"{qrels}: none of its queries is in {run}: these are another set's qrels")
    return {
        "run": run,
        "teacher": teacher,
        "counts": counts.to_dict(),
        "rates": counts.rates(),
        "scores": scores.report(),
        "others": {
            name: {"run": others[name], "teacher": _teacher(sources[name])} | comparison.report()
            for name, comparison in compared.items()
        },
        "gains": ({"source": qrels or "label"} | gains.report()) if gains.queries else None,
    }


def _named(against: Sequence[str], roles: Mapping[str, str | None]) -> dict[str, str]:
    named = {role: uri for role, uri in roles.items() if uri is not None}
    for uri in against:
        name = uri.rstrip("/").rsplit("/", 1)[-1]
        if name in roles or name in named:
            raise ConfigError(
                f"--against {uri}: there is already a run of the name {name!r}: rename one of the folders"
            )
        named[name] = uri
    return named


def _teacher(data: str) -> str:
    return next(read_scored(data))["teacher"]


def _entries(data: str, wanted: Container[str] | None = None) -> Iterator[tuple[str, _Entry]]:
    """The labelled queries of a run, or those of them that are wanted."""
    for row in read_scored(data, wanted):
        if row["error"] is not None:
            continue
        record_of(row, check_scored, data)
        candidates = row["candidates"]
        yield (
            row["query_id"],
            _Entry(
                doc_ids=tuple(c["doc_id"] for c in candidates),
                scores=np.array(row["scores"], dtype=float),
                labels=np.array([c["label"] for c in candidates], dtype=float),
            ),
        )


def _own_gains(entry: _Entry) -> dict[str, float] | None:
    """The candidates' known gains as one query's qrels; None without any."""
    gains = {d: g for d, g in zip(entry.doc_ids, entry.labels.tolist(), strict=True) if not math.isnan(g)}
    return gains or None


class _Mean:
    """A running mean of what is defined."""

    def __init__(self) -> None:
        self.sum, self.count = 0.0, 0

    def add(self, value: float | None) -> None:
        if value is not None:
            self.sum, self.count = self.sum + value, self.count + 1

    def report(self) -> dict[str, float | int | None]:
        return {"mean": self.sum / self.count if self.count else None, "queries": self.count}


class _Sample:
    """A uniform sample of a stream: all of it up to a million values, after that the million of the smallest keys."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)
        self._kept = np.empty((2, 0))
        self._new: list[np.ndarray] = []
        self._size = 0

    def add(self, values: np.ndarray) -> None:
        self._new.append(np.stack([self._random.random(len(values)), values]))
        self._size += len(values)
        if self._size > 2 * _SAMPLE:
            self._compact()

    def _compact(self) -> None:
        kept = np.concatenate([self._kept, *self._new], axis=1)
        if kept.shape[1] > _SAMPLE:
            kept = kept[:, np.argpartition(kept[0], _SAMPLE)[:_SAMPLE]]
        self._kept, self._new, self._size = kept, [], kept.shape[1]

    def quantiles(self) -> dict[str, float]:
        self._compact()
        if not self._kept.shape[1]:
            return {}
        values = np.quantile(self._kept[1], _QUANTILES)
        return {f"{q:.0%}": float(v) for q, v in zip(_QUANTILES, values, strict=True)}


class _ScoreStatistics:
    """The scores' distribution, their ties, and how they follow the input order."""

    def __init__(self) -> None:
        self.sample = _Sample()
        self.candidates = self.missing = self.pairs = self.tied = self.lists = self.constant = 0
        self.input_order = _Mean()

    def add(self, entry: _Entry) -> None:
        known = ~np.isnan(entry.scores)
        scores = entry.scores[known]
        self.candidates += len(known)
        self.missing += len(known) - len(scores)
        self.sample.add(scores)
        _, sizes = np.unique(scores, return_counts=True)
        self.pairs += len(scores) * (len(scores) - 1) // 2
        self.tied += int((sizes * (sizes - 1) // 2).sum())
        if len(scores) > 1:
            self.lists += 1
            self.constant += len(sizes) == 1
        self.input_order.add(kendall(scores, -np.flatnonzero(known)))

    def report(self) -> dict:
        return {
            "candidates": self.candidates,
            "unscored_share": self.missing / max(1, self.candidates),
            "quantiles": self.sample.quantiles(),
            "pairs": self.pairs,
            "tied_pairs_share": self.tied / max(1, self.pairs),
            "lists": self.lists,
            "constant_lists_share": self.constant / max(1, self.lists),
            "kendall_tau_with_input_order": self.input_order.report(),
        }


class _Comparison:
    """Agreement of two runs, documents matched by id: τ-b and rank change over the candidates that both scored, RBO and
    the first place over each run's whole ranking."""

    def __init__(self) -> None:
        names = ("kendall_tau", "rbo_0.9", "rank_change", "first_changed", "kendall_tau_with_its_input_order")
        self.means = {name: _Mean() for name in names}
        self.shared = 0

    def add(self, entry: _Entry, other: _Entry | None) -> None:
        if other is None:
            return
        self.shared += 1
        position = {d: i for i, d in enumerate(other.doc_ids)}
        pairs = [(i, position[d]) for i, d in enumerate(entry.doc_ids) if d in position]
        pairs = [(i, j) for i, j in pairs if not np.isnan(entry.scores[i]) and not np.isnan(other.scores[j])]
        here, there = (np.array([p[side] for p in pairs], dtype=int) for side in (0, 1))
        a, b = entry.scores[here], other.scores[there]
        self.means["kendall_tau"].add(kendall(a, b))
        first, second = entry.ranking, other.ranking
        self.means["rbo_0.9"].add(rbo(first, second))
        if pairs:
            self.means["rank_change"].add(float(np.abs(ranks(a) - ranks(b)).mean()))
            self.means["first_changed"].add(float(first[0] != second[0]))
        self.means["kendall_tau_with_its_input_order"].add(kendall(b, -there))

    def report(self) -> dict:
        return {"queries_in_common": self.shared} | {name: mean.report() for name, mean in self.means.items()}


class _GainStatistics:
    """Agreement with gains, and calibration of what can be read as a probability of relevance."""

    def __init__(self) -> None:
        self.means = {name: _Mean() for name in ("ndcg@10", "kendall_tau", "auc")}
        self.reliability = {"sigmoid": _Reliability(), "rank": _Reliability()}
        self.queries = self.candidates = self.judged = 0

    def add(self, entry: _Entry, gains: Mapping[str, float] | None) -> None:
        if not gains:
            return
        self.queries += 1
        self.candidates += len(entry.doc_ids)
        self.judged += sum(d in gains for d in entry.doc_ids)
        gain = {d: g if g >= _RELEVANT else 0.0 for d, g in gains.items()}
        # Like a ranking of a rerank job: candidates without a score go below the others, in input order.
        order = np.argsort(-entry.scores, kind="stable")
        self.means["ndcg@10"].add(ndcg([gain.get(entry.doc_ids[i], 0.0) for i in order], list(gain.values())))
        known = ~np.isnan(entry.scores)
        scores = entry.scores[known]
        values = np.array([gain.get(d, 0.0) for d, k in zip(entry.doc_ids, known, strict=True) if k])
        relevant = values >= _RELEVANT
        self.means["kendall_tau"].add(kendall(scores, values))
        self.means["auc"].add(auc(scores, relevant))
        self.reliability["sigmoid"].add(0.5 * (1 + np.tanh(scores / 2)), relevant)
        if len(scores) > 1:
            self.reliability["rank"].add((len(scores) - ranks(scores)) / (len(scores) - 1), relevant)

    def report(self) -> dict:
        return (
            {"queries": self.queries, "candidates": self.candidates, "judged_share": self.judged / self.candidates}
            | {name: mean.report() for name, mean in self.means.items()}
            | {"calibration": {name: r.report() for name, r in self.reliability.items()}}
        )


class _Reliability:
    """Mean prediction and share of relevant candidates in ten bins of equal width; ECE (Naeini et al. 2015)."""

    def __init__(self) -> None:
        self.count, self.predicted, self.relevant = np.zeros(_BINS), np.zeros(_BINS), np.zeros(_BINS)

    def add(self, p: np.ndarray, relevant: np.ndarray) -> None:
        index = np.minimum((p * _BINS).astype(int), _BINS - 1)
        for total, weights in ((self.count, None), (self.predicted, p), (self.relevant, relevant)):
            total += np.bincount(index, weights=weights, minlength=_BINS)

    def report(self) -> dict:
        filled = np.maximum(self.count, 1)
        predicted, relevant = self.predicted / filled, self.relevant / filled
        error = float((self.count * np.abs(predicted - relevant)).sum() / max(1.0, self.count.sum()))
        bins = [
            {
                "from": i / _BINS,
                "to": (i + 1) / _BINS,
                "candidates": int(self.count[i]),
                "mean_p": float(predicted[i]),
                "relevant_share": float(relevant[i]),
            }
            for i in np.flatnonzero(self.count).tolist()
        ]
        return {"ece": error, "bins": bins}


# Printing


def print_audit(report: Mapping[str, Any], console: Console) -> None:
    """The report as tables."""
    counts, rates, scores = report["counts"], report["rates"], report["scores"]
    of_rows = f"of {counts['rows']:,} rows"
    rows: dict[str, dict[str, str]] = {
        "rows with error": _cell(rates["error"], f"{counts['errors']:,} {of_rows}"),
        "rows with defects": _cell(rates["defect"], f"{counts['rows_with_defects']:,} {of_rows}"),
    }
    for kind, rate in rates["defects"].items():
        rows[f"rows with {kind} defects"] = _cell(
            rate["rows_affected"], f"{counts['rows_by_defect'][kind]:,} {of_rows}"
        )
    if rates["parse_failure"]["per_call"] is not None:
        calls = f"of {counts['usage']['calls']:,} model calls"
        rows["answers that could not be read"] = _cell(rates["parse_failure"]["per_call"], calls)
    rows |= {
        "candidates without score": _cell(scores["unscored_share"], f"of {scores['candidates']:,} candidates"),
        "tied pairs": _cell(scores["tied_pairs_share"], f"of {scores['pairs']:,} pairs"),
        "lists whose scores are all the same": _cell(scores["constant_lists_share"], f"of {scores['lists']:,} lists"),
        "τ-b of score and input order": _mean_cell(scores["kendall_tau_with_input_order"]),
    }
    print_table(rows, console, title=f"{report['run']}: {report['teacher']}", head="measure")
    if scores["quantiles"]:
        quantiles = {q: f"{v:.4g}" for q, v in scores["quantiles"].items()}
        print_table({"score": quantiles}, console, title="Score quantiles", head="")
    if report["others"]:
        titles = {
            "kendall_tau": "τ-b",
            "rbo_0.9": "RBO p = 0.9",
            "rank_change": "mean change of rank",
            "first_changed": "another first",
            "kendall_tau_with_its_input_order": "its τ-b with its input order",
        }
        others = {
            name: {"queries in common": format_value(other["queries_in_common"])}
            | {title: format_value(other[key]["mean"]) for key, title in titles.items()}
            for name, other in report["others"].items()
        }
        print_table(others, console, title="Agreement with other runs, means over queries", head="run")
    if report["gains"]:
        _print_gains(report["gains"], console)


def _print_gains(gains: Mapping[str, Any], console: Console) -> None:
    rows = {
        "nDCG@10": _mean_cell(gains["ndcg@10"]),
        "τ-b of score and gain": _mean_cell(gains["kendall_tau"]),
        "AUC": _mean_cell(gains["auc"]),
        "judged candidates": _cell(gains["judged_share"], f"of {gains['candidates']:,} candidates"),
    }
    for name, title in _PROBABILITIES.items():
        rows[f"ECE, p = {title}"] = _cell(gains["calibration"][name]["ece"], "scored candidates")
    source = "the candidates' own labels" if gains["source"] == "label" else gains["source"]
    print_table(rows, console, title=f"Against {source}", head="measure")
    by_bin = {name: {b["from"]: b for b in gains["calibration"][name]["bins"]} for name in _PROBABILITIES}
    bins = {
        f"{start:.1f} to {start + 1 / _BINS:.1f}": {
            f"{title}: {column}": format_value(by_bin[name].get(start, {}).get(key))
            for name, title in _PROBABILITIES.items()
            for key, column in (("candidates", "n"), ("mean_p", "mean p"), ("relevant_share", "relevant"))
        }
        for start in sorted({start for found in by_bin.values() for start in found})
    }
    print_table(bins, console, title="Calibration: mean p and share of relevant candidates", head="p")


_PROBABILITIES = {"sigmoid": "σ(score)", "rank": "ranked below"}


def _cell(value: float, over: str) -> dict[str, str]:
    # Strings, because the table makes the best of a column of numbers bold, and these are no competitors.
    return {"value": format_value(value), "over": over}


def _mean_cell(mean: Mapping[str, Any]) -> dict[str, str]:
    return _cell(mean["mean"], f"mean of {mean['queries']:,} queries")
