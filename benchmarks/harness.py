"""What every benchmark shares: measuring in alternation, and where the figures go.

A benchmark compares things that are measured in one process and in turn, so that a machine's moods meet all of them,
and reports the median of each and of the rounds' ratios. `publish` writes `docs/benchmarks/NAME.json` and the section
of that name in `docs/benchmarks.md`.
"""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from scipy.stats import kendalltau

from rerank_ray.formats.hits import read_hits
from rerank_ray.formats.lines import BadLines
from rerank_ray.formats.qrels import read_qrels
from rerank_ray.metrics.agreement import ndcg
from rerank_ray.models.cross_encoder import CrossEncoder
from rerank_ray.models.protocol import Backend, Pair
from rerank_ray.models.text_tokens import TextTokens
from rerank_ray.parquet import read_candidates
from rerank_ray.ranking import scheduler
from rerank_ray.ranking.scheduler import Outcome
from rerank_ray.records import CandidateList
from rerank_ray.report.tables import markdown_table

DOCS = Path(__file__).parents[1] / "docs"
DL19_QRELS = "trec-dl/qrels.dl19-passage.txt"
Qrels = Mapping[str, Mapping[str, float]]
_INSTRUCTIONS = {
    "amx_bf16": "AMX",
    "avx512_bf16": "AVX-512 BF16",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
}
"""What processors multiply matrices with, best first, by the flag that says so."""
_PACKAGES = ("rerank_ray", "torch", "transformers", "ray", "sentence-transformers")


def alternate(
    subjects: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each subject in each of `rounds` rounds, after one round that warms everything up."""
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for number in range(rounds + 1):
        for name, subject in subjects.items():
            started = clock()
            subject()
            if number:
                seconds[name].append(clock() - started)
    return seconds


def ratio(of: Sequence[float], to: Sequence[float]) -> float:
    """Median of the rounds' ratios: how many times `to` goes into `of`."""
    return statistics.median(a / b for a, b in zip(of, to, strict=True))


def publish(name: str, *, title: str, about: str, rows: Mapping[str, Mapping], facts: Mapping | None = None) -> None:
    """Print a table of subjects and their figures and put it, with machine and command, into the docs."""
    table = markdown_table(dict(rows), head="")
    print(table)
    command = "python " + " ".join([os.path.relpath(sys.argv[0], DOCS.parent), *sys.argv[1:]])
    record = {"title": title, "command": command, "machine": machine(), "rows": rows, **(facts or {})}
    (DOCS / "benchmarks").mkdir(parents=True, exist_ok=True)
    (DOCS / "benchmarks" / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    where = ", ".join(f"{k} {v}" for k, v in record["machine"].items())
    _put_section(name, f"## {title}\n\n{about}\n\n    {command}\n\n{table}\n\n{where}\n")


def _put_section(name: str, text: str) -> None:
    page = DOCS / "benchmarks.md"
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    old = page.read_text() if page.exists() else "# Benchmarks\n"
    section = f"{begin}\n{text.rstrip()}\n{end}"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    found = pattern.search(old)
    page.write_text(pattern.sub(lambda _: section, old) if found else f"{old.rstrip()}\n\n{section}\n")


def trec_dl_lists(queries: int, depth: int, years: Sequence[int] = (19,)) -> list[CandidateList]:
    """The first queries of TREC-DL 2019, or of several years, each with the first passages of BM25's list."""
    folder = os.environ.get("RERANK_RAY_DATA")
    if not folder:
        raise SystemExit("set RERANK_RAY_DATA to the folder that holds trec-dl/ (README: Collections)")
    lists = [r for year in years for r in read_hits(f"{folder}/trec-dl/bm25_dl{year}.json.gz", BadLines())]
    if queries > len(lists):
        raise SystemExit(f"{queries} queries: TREC-DL has {len(lists)} in 20{', 20'.join(map(str, years))}")
    return [replace(r, candidates=r.candidates[:depth]) for r in lists[:queries]]


def forget_texts(encoder: CrossEncoder) -> None:
    """Let a cross-encoder tokenise anew what it has scored in a round before, as texts that come for the first time."""
    encoder.student.texts = TextTokens(encoder.student.tokenizer, encoder.student.texts.longest)


def ranked(method, backend: Backend, requests: Sequence[CandidateList]) -> list[Outcome]:
    """What becomes of the lists, side by side; a benchmark of queries that failed would be of less work."""
    outcomes = scheduler.run(method, backend, requests)
    if failed := [outcome.error for outcome in outcomes if outcome.error]:
        raise SystemExit(f"{len(failed)} queries failed, for example: {failed[0]}")
    return outcomes


def scored(encoder: CrossEncoder, request: CandidateList) -> list[float]:
    """Scores of a list's candidates."""
    return [a.value for a in encoder.run([Pair(query=request.query.text, text=c.contents) for c in request.candidates])]


def qrels_of(path: str) -> Qrels:
    """Judgements in a file below RERANK_RAY_DATA."""
    return read_qrels(os.path.join(os.environ["RERANK_RAY_DATA"], path), BadLines())


def reranked_ndcg(encoder: CrossEncoder, candidates: str, qrels: str) -> float:
    """nDCG@10 of candidate lists in the order of a cross-encoder's scores, by qrels that lie below RERANK_RAY_DATA."""
    gains, lists = qrels_of(qrels), list(read_candidates(candidates))
    return mean_ndcg(lists, [score for request in lists for score in scored(encoder, request)], gains)


def mean_ndcg(lists: Sequence[CandidateList], scores: Sequence[float], qrels: Qrels) -> float:
    """nDCG@10 of the lists that have a judged passage, in the order of the scores of all candidates, list by list."""
    values, start = [], 0
    for request in lists:
        judged = qrels.get(request.query.query_id, {})
        ranked = sorted(zip(request.candidates, scores[start : start + len(request)], strict=True), key=lambda p: -p[1])
        values.append(ndcg([judged.get(c.doc_id, 0.0) for c, _ in ranked], list(judged.values())))
        start += len(request)
    return statistics.mean(v for v in values if v is not None)


def agreement(lists: Sequence[CandidateList], scores: Sequence[float], reference: Sequence[float]) -> dict[str, str]:
    """How far the scores of all candidates are from a reference's, as text: a table would set the largest in bold."""
    return {
        "largest difference": f"{np.abs(np.subtract(scores, reference)).max():.1e}",
        "Kendall τ": f"{mean_tau(lists, scores, reference):.4f}",
    }


def mean_tau(lists: Sequence[CandidateList], a: Sequence[float], b: Sequence[float]) -> float:
    """Mean Kendall τ over the lists between two scores of all their candidates, list by list."""
    taus, start = [], 0
    for request in lists:
        span = slice(start, start + len(request))
        taus.append(kendalltau(a[span], b[span]).statistic)
        start = span.stop
    return statistics.mean(taus)


def largest_resident_mib() -> float:
    """The process's largest resident set so far (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def machine() -> dict[str, str]:
    """Processor, cores, accelerator and versions."""
    facts = {"processor": _processor(), "cores": str(os.cpu_count()), "python": platform.python_version()}
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    for package in _PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    return facts


def _processor() -> str:
    try:
        text = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return platform.processor() or platform.machine()
    found = re.search(r"Model name:\s*(.+)", text)
    name = found[1].strip() if found else platform.machine()
    # The name alone is that of several generations, which multiply differently.
    flags = set(text.split())
    fastest = next((of for flag, of in _INSTRUCTIONS.items() if flag in flags), None)
    return f"{name} with {fastest}" if fastest else name
