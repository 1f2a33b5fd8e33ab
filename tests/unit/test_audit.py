"""The audit of label runs by hand, shuffled candidates, and the threshold for a budget, with their commands."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from fixtures.rows import label_row, make_list, write_labels
from hypothesis import given, settings
from hypothesis import strategies as st

from rerank_ray import audit as audit_module
from rerank_ray import shuffle as shuffle_module
from rerank_ray.audit import audit
from rerank_ray.cli import main
from rerank_ray.errors import ConfigError, InputError, RowError, RunError
from rerank_ray.metrics.evaluation import evaluate_rankings
from rerank_ray.parquet import read_candidates, read_rows, read_scored, write_rows
from rerank_ray.ranking.rankers import Ranker
from rerank_ray.records import CandidateList, Defect, DefectKind, Scores, Usage, with_gains
from rerank_ray.runs import resolve_input
from rerank_ray.schema import CANDIDATES, LABELS, candidate_row, label_columns
from rerank_ray.selectivity import threshold_for
from rerank_ray.settings.models import FakeSettings
from rerank_ray.settings.rankers import CrossEncoderRankerSettings, SelectiveSettings

NAN = math.nan


def labelled(folder: Path, lists: dict[str, Sequence[float]], teacher: str = "t", gains: dict | None = None) -> str:
    """A label file of these scores by query id; the candidates of every query have the same gains."""
    rows = [
        label_row(with_gains(make_list(query_id, len(scores)), gains or {}), scores, teacher=teacher)
        for query_id, scores in lists.items()
    ]
    return write_labels(folder, rows)


def value(mean: dict) -> tuple[float | None, int]:
    return mean["mean"], mean["queries"]


def test_scores_by_hand(tmp_path: Path):
    """q1 falls with the input order, q2 ties one pair of its three scored ones, q3 is constant, q4 failed.

    τ-b with the order: 1 for q1; for q2, scores 1 1 5 at positions 0 1 3: the two pairs that are no ties are against
    the order, −2/√(2·3); q3 has none. Pairs: 3 + 3 + 1, ties: 0 + 1 + 1.
    """
    scores = {"q1": [3.0, 2.0, 1.0], "q2": [1.0, 1.0, NAN, 5.0], "q3": [7.0, 7.0]}
    rows = [label_row(make_list(q, len(s)), s) for q, s in scores.items()]
    rows.append(label_row(make_list("q4"), None, error="boom"))
    report = audit(write_labels(tmp_path / "a", rows))
    found = report["scores"]
    assert (found["candidates"], found["pairs"], found["lists"]) == (9, 7, 3)
    assert found["unscored_share"] == pytest.approx(1 / 9)
    assert found["tied_pairs_share"] == pytest.approx(2 / 7)
    assert found["constant_lists_share"] == pytest.approx(1 / 3)
    assert value(found["kendall_tau_with_input_order"]) == (pytest.approx((1 - 2 / math.sqrt(6)) / 2), 2)
    # 1 1 1 2 3 5 7 7
    assert found["quantiles"]["0%"] == 1.0
    assert found["quantiles"]["50%"] == 2.5
    assert found["quantiles"]["100%"] == 7.0
    assert report["rates"]["error"] == 0.25
    assert report["gains"] is None
    assert report["others"] == {}


def test_defects_are_those_of_the_run(tmp_path: Path):
    """Two refusals in one of two rows, eight calls."""
    refusals = tuple(Defect(kind=DefectKind.REFUSAL, detail="x") for _ in range(2))
    scores = Scores(scores=(1.0, 2.0, NAN), defects=refusals)
    rows = [
        candidate_row(make_list("q1")) | label_columns("t", scores, Usage(calls=6)),
        candidate_row(make_list("q2")) | label_columns("t", Scores(scores=(1.0, 2.0, 3.0)), Usage(calls=2)),
    ]
    rates = audit(write_labels(tmp_path / "a", rows))["rates"]
    assert rates["defects"] == {"refusal": {"per_row": 1.0, "rows_affected": 0.5}}
    assert rates["parse_failure"] == {"per_call": pytest.approx(1 / 4), "rows_affected": 0.5}


def reordered(row: CandidateList, order: Sequence[int]) -> CandidateList:
    return CandidateList(query=row.query, candidates=tuple(row.candidates[i] for i in order))


def test_a_comparison_matches_documents_by_id(tmp_path: Path):
    """The other run has q1's candidates as d2 d0 d1 with scores 3 1 2, so d0 1, d1 2, d2 3, against 3, 1, 2 here.

    Of the pairs (d0, d1), (d0, d2), (d1, d2) only the last agrees: τ −1/3. Ranks 1 3 2 and 3 2 1: changes 2 1 1. d0 was
    first and is last. Its scores follow its own order in d2 > d0, d2 > d1 and not in d0, d1: τ 1/3. q2 is not in both.
    """
    one = write_labels(tmp_path / "one", [label_row(make_list(q), [3.0, 1.0, 2.0]) for q in ("q1", "q2")])
    other = write_labels(tmp_path / "other", [label_row(reordered(make_list("q1"), [2, 0, 1]), [3.0, 1.0, 2.0])])
    report = audit(one, shuffled=other, against=[other])
    assert list(report["others"]) == ["shuffled", "other"]
    found = report["others"]["shuffled"]
    assert found["queries_in_common"] == 1
    assert value(found["kendall_tau"]) == (pytest.approx(-1 / 3), 1)
    assert value(found["rank_change"]) == (pytest.approx(4 / 3), 1)
    assert value(found["first_changed"]) == (1.0, 1)
    assert value(found["kendall_tau_with_its_input_order"]) == (pytest.approx(1 / 3), 1)
    # d0 d2 d1 and d2 d1 d0: overlaps 0, 1, 3: (0.1/0.9)·(½·0.81 + 1·0.729) + 0.729.
    assert value(found["rbo_0.9"]) == (pytest.approx((0.405 + 0.729) / 9 + 0.729), 1)


def test_unscored_candidates_are_left_out_of_a_comparison(tmp_path: Path):
    one = labelled(tmp_path / "one", {"q1": [3.0, NAN, 2.0, 1.0]})
    other = labelled(tmp_path / "other", {"q1": [9.0, 1.0, NAN, 8.0]})
    found = audit(one, repeat=other)["others"]["repeat"]
    assert value(found["kendall_tau"]) == (1.0, 1)
    assert value(found["rank_change"]) == (0.0, 1)


def test_a_teacher_that_only_reads_positions_is_found_out(tmp_path: Path):
    """Its scores fall with the position, whatever stands there: perfect agreement with both input orders, and none
    between the two runs but by chance."""
    lists = [make_list(f"q{i}", 10) for i in range(40)]
    write_rows(map(candidate_row, lists), str(tmp_path / "in"), CANDIDATES)
    assert main(["shuffle", str(tmp_path / "in"), "--out", str(tmp_path / "shuffled")]) == 0
    by_position = [10.0 - i for i in range(10)]
    runs = [
        write_labels(tmp_path / name, [label_row(row, by_position) for row in rows])
        for name, rows in (("run", lists), ("again", read_candidates(str(tmp_path / "shuffled"))))
    ]
    report = audit(runs[0], shuffled=runs[1])
    assert report["scores"]["kendall_tau_with_input_order"]["mean"] == pytest.approx(1.0)
    found = report["others"]["shuffled"]
    assert found["kendall_tau_with_its_input_order"]["mean"] == pytest.approx(1.0)
    assert abs(found["kendall_tau"]["mean"]) < 0.2
    assert found["first_changed"]["mean"] > 0.6


# Gains


def test_gains_by_hand(tmp_path: Path):
    """d1 is relevant (gain 2), d0 judged as not, d2 not judged. Scores 1, 0, −1.

    nDCG: 1/log₂3. AUC ½: d0 above, d2 below. τ-b of (1, 0, −1) and (0, 2, 0): d1 loses to d0 and beats d2: 0. Sigmoids
    0.7311, ½, 0.2689 are in bins of their own: ECE (0.7311 + ½ + 0.2689)/3 = ½; shares ranked below 1, ½, 0: the same.
    """
    report = audit(labelled(tmp_path / "a", {"q1": [1.0, 0.0, -1.0]}, gains={"d0": 0.0, "d1": 2.0}))
    found = report["gains"]
    assert found["source"] == "label"
    assert (found["queries"], found["judged_share"]) == (1, pytest.approx(2 / 3))
    assert value(found["ndcg@10"]) == (pytest.approx(1 / math.log2(3)), 1)
    assert value(found["auc"]) == (0.5, 1)
    assert value(found["kendall_tau"]) == (pytest.approx(0.0), 1)
    sigmoid, rank = (found["calibration"][name] for name in ("sigmoid", "rank"))
    assert sigmoid["ece"] == pytest.approx(0.5)
    assert rank["ece"] == pytest.approx(0.5)
    assert [(b["from"], b["candidates"], b["relevant_share"]) for b in sigmoid["bins"]] == [
        (0.2, 1, 0.0),
        (0.5, 1, 1.0),
        (0.7, 1, 0.0),
    ]
    assert [b["mean_p"] for b in rank["bins"]] == [0.0, 0.5, 1.0]


def test_a_calibrated_teacher_has_no_error(tmp_path: Path):
    """Of four candidates at p = ¼ one is relevant, of two at p = ½ one is."""
    low, high = math.log(1 / 3), 0.0
    scores = [low] * 4 + [high] * 2
    gains = {f"d{i}": float(i in (0, 4)) for i in range(6)}
    found = audit(labelled(tmp_path / "a", {"q1": scores}, gains=gains))["gains"]["calibration"]["sigmoid"]
    assert found["ece"] == pytest.approx(0.0, abs=1e-7)
    assert [b["candidates"] for b in found["bins"]] == [4, 2]


def test_qrels_replace_the_candidates_labels_and_agree_with_evaluate(tmp_path: Path):
    """q1 and q2 are judged, also documents that were not retrieved; q3 is not; q2 has an unscored candidate."""
    scores = {"q1": [0.1, 0.9, 0.5], "q2": [0.3, NAN, 0.8], "q3": [1.0, 2.0, 3.0]}
    run = labelled(tmp_path / "a", scores, gains={"d0": 5.0})
    qrels = tmp_path / "qrels"
    qrels.write_text("q1 0 d0 1\nq1 0 x 3\nq1 0 d2 2\nq2 0 d1 1\nq9 0 d1 1\n", encoding="utf-8")
    found = audit(run, qrels=str(qrels))["gains"]
    rankings = {"q1": ["d1", "d2", "d0"], "q2": ["d2", "d0", "d1"]}
    judged = {"q1": {"d0": 1, "x": 3, "d2": 2}, "q2": {"d1": 1}}
    (expected,) = evaluate_rankings(judged, {"s": rankings}, ["ndcg@10"]).values()
    assert value(found["ndcg@10"]) == (pytest.approx(expected.means["ndcg@10"]), 2)
    assert found["source"] == str(qrels)


# Sizes


def flat(value: object, path: str = "") -> dict[str, float]:
    """Every number of a report by its path."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, inner in items for k, v in flat(inner, f"{path}.{key}").items()}
    return {path: value} if isinstance(value, int | float) else {}


def test_scores_that_no_job_writes_are_refused(tmp_path: Path):
    """Infinite ones, of label files from elsewhere: quantiles of them would be nothing to read."""
    run = labelled(tmp_path / "a", {"q1": [1.0, -math.inf]})
    with pytest.raises(RowError, match="query 'q1': a score is infinite"):
        audit(run)
    with pytest.raises(RowError, match="query 'q1': a score is infinite"):
        threshold_for(run, 0.5, 2, "margin")


def test_few_queries_at_a_time_give_the_same_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And Python's objects are made of each row once, however often that is."""
    rng = np.random.default_rng(0)
    one, other = (
        labelled(tmp_path / name, {f"q{i}": rng.normal(size=5).tolist() for i in range(30)}, gains={"d1": 1.0})
        for name in ("one", "other")
    )
    whole = audit(one, repeat=other)
    read = []

    def counted(*arguments) -> Iterator[dict]:
        for row in read_scored(*arguments):
            read.append(row["query_id"])
            yield row

    monkeypatch.setattr(audit_module, "_teacher", lambda data: "t")
    monkeypatch.setattr(audit_module, "read_scored", counted)
    monkeypatch.setattr(audit_module, "_QUERIES_AT_A_TIME", 7)
    parts = audit(one, repeat=other)
    assert flat(parts) == pytest.approx(flat(whole))
    assert parts["others"]["repeat"]["queries_in_common"] == 30
    assert len(read) == 60


def test_quantiles_of_more_scores_than_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of 20,000 even steps a sample of 1,000 has its quantiles within a few hundredths, and holds no more."""
    monkeypatch.setattr(audit_module, "_SAMPLE", 1000)
    sample = audit_module._Sample()
    for start in range(0, 20_000, 50):
        sample.add(np.arange(start, start + 50) / 20_000)
        assert sample._size <= 2 * 1000 + 50
    found = sample.quantiles()
    for name, expected in {"5%": 0.05, "25%": 0.25, "50%": 0.5, "75%": 0.75, "95%": 0.95}.items():
        assert found[name] == pytest.approx(expected, abs=0.05)


# The command


def test_the_command_prints_tables_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = labelled(tmp_path / "run", {"q1": [1.0, 0.0, -1.0]}, gains={"d0": 0.0, "d1": 2.0})
    other = labelled(tmp_path / "other", {"q1": [1.0, 0.5, 0.0]}, teacher="u")
    out = tmp_path / "audit.json"
    assert main(["audit", run, "--against", other, "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    for text in ("τ-b of score and input order", "Agreement with other runs", "other", "ECE, p = σ(score)", "0.6309"):
        assert text in printed
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["teacher"] == "t"
    assert report["others"]["other"]["teacher"] == "u"
    assert report == audit(run, against=[other])


def finished(folder: Path, state: str) -> str:
    labelled(folder / "data", {"q1": [1.0, 2.0]})
    (folder / "run.json").write_text(json.dumps({"kind": "label", "state": state}), encoding="utf-8")
    return str(folder)


def test_a_failed_run_can_be_audited_and_an_unfinished_one_not(tmp_path: Path):
    assert audit(finished(tmp_path / "failed", "failed"))["counts"]["rows"] == 1
    assert audit(finished(tmp_path / "done", "done"))["counts"]["rows"] == 1
    with pytest.raises(RunError, match="this label run is running"):
        audit(finished(tmp_path / "running", "running"))


def test_what_can_not_be_audited(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = labelled(tmp_path / "run", {"q1": [1.0, 2.0]})
    stranger = labelled(tmp_path / "stranger", {"q9": [1.0, 2.0]})
    with pytest.raises(InputError, match="has no query in common with"):
        audit(run, repeat=stranger)
    with pytest.raises(ConfigError, match="already a run of the name 'stranger'"):
        audit(run, against=[stranger, stranger])
    (tmp_path / "qrels").write_text("q9 0 d1 1\n", encoding="utf-8")
    with pytest.raises(InputError, match="none of its queries is in"):
        audit(run, qrels=str(tmp_path / "qrels"))
    write_rows([candidate_row(make_list())], str(tmp_path / "candidates"), CANDIDATES)
    with pytest.raises(InputError, match="column 'teacher' is missing"):
        audit(str(tmp_path / "candidates"))
    pq.write_table(LABELS.empty_table(), tmp_path / "empty.parquet")
    with pytest.raises(InputError, match="has no rows"):
        audit(str(tmp_path / "empty.parquet"))
    assert main(["audit", str(tmp_path / "none")]) == 1
    assert "the input does not exist" in capsys.readouterr().err


# Shuffling


@settings(deadline=None, max_examples=20)
@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5), seed=st.integers(0, 3))
def test_shuffling_keeps_every_row_and_candidate(tmp_path_factory: pytest.TempPathFactory, sizes: list[int], seed: int):
    folder = tmp_path_factory.mktemp("shuffle")
    lists = [make_list(f"q{i}", size, scores=[float(-j) for j in range(size)]) for i, size in enumerate(sizes)]
    write_rows(map(candidate_row, lists), str(folder / "in"), CANDIDATES)
    write_rows(map(candidate_row, lists[::-1]), str(folder / "reversed"), CANDIDATES)
    for name in ("in", "reversed"):
        arguments = ["shuffle", str(folder / name), "--seed", str(seed), "--out", str(folder / f"{name}-out")]
        assert main(arguments) == 0
    found = list(read_candidates(str(folder / "in-out")))
    assert [r.query for r in found] == [r.query for r in lists]
    for before, after in zip(lists, found, strict=True):
        assert sorted(after.candidates, key=lambda c: c.doc_id) == sorted(before.candidates, key=lambda c: c.doc_id)
    assert found == list(read_candidates(str(folder / "reversed-out")))[::-1]


def test_seeds_shuffle_differently_and_bad_rows_stay(tmp_path: Path):
    rows = [candidate_row(make_list("q1", 30)), candidate_row(make_list("q2")) | {"candidates": None}]
    write_rows(rows, str(tmp_path / "in"), CANDIDATES)
    orders = set()
    for seed in range(3):
        main(["shuffle", str(tmp_path / "in"), "--seed", str(seed), "--out", str(tmp_path / str(seed))])
        first, second = read_rows(str(tmp_path / str(seed)), CANDIDATES.names)
        orders.add(tuple(c["doc_id"] for c in first["candidates"]))
        assert second["candidates"] is None
    assert len(orders | {tuple(f"d{i}" for i in range(30))}) == 4


def test_what_can_not_be_shuffled(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_rows([candidate_row(make_list())], str(tmp_path / "in"), CANDIDATES)
    assert main(["shuffle", str(tmp_path / "in"), "--out", str(tmp_path / "in")]) == 1
    assert "already holds data" in capsys.readouterr().err
    assert main(["shuffle", str(tmp_path / "in"), "--seed", "-1", "--out", str(tmp_path / "out")]) == 1
    assert "--seed -1: must be 0 or more" in capsys.readouterr().err
    assert main(["shuffle", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 1
    assert "the input does not exist" in capsys.readouterr().err


def test_a_shuffle_that_did_not_end_is_no_input_and_is_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lists = [make_list(f"q{i}") for i in range(40)]
    source, out = str(tmp_path / "in"), str(tmp_path / "out")
    write_rows(map(candidate_row, lists), source, CANDIDATES)

    def interrupted(uri: str, columns: Sequence[str]):
        for number, row in enumerate(read_rows(uri, columns)):
            if number == 20:
                raise KeyboardInterrupt
            yield row

    with monkeypatch.context() as patch:
        patch.setattr(shuffle_module, "read_rows", interrupted)
        with pytest.raises(KeyboardInterrupt):
            shuffle_module.shuffle(source, out)
    with pytest.raises(RunError, match="did not end"):
        resolve_input(out)
    assert shuffle_module.shuffle(source, out) == 40
    assert len(list(read_candidates(resolve_input(out)))) == 40
    with pytest.raises(InputError, match="already holds data"):
        shuffle_module.shuffle(source, out)
    assert shuffle_module.shuffle(source, out, seed=1, overwrite=True) == 40
    for itself in (out, f"{out}/part-00000.parquet"):
        with pytest.raises(InputError, match="the folder to write to: name another --out"):
            shuffle_module.shuffle(itself, f"{out}/", overwrite=True)


# Selectivity


def cheap_run(folder: Path, differences: Sequence[float]) -> str:
    return labelled(folder, {f"q{i}": [d, 0.0] for i, d in enumerate(differences)})


def test_a_threshold_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Differences 0, ln 3, ln 3, 5: margins of p are 0, ½, ½ and more, so uncertainties 1, ½, ½ and less. A quarter of
    the budget buys the first, and so does a half: the next two tie, and together they would be too many."""
    run = cheap_run(tmp_path / "run", [math.log(3), 0.0, 5.0, math.log(3)])
    for budget, expected, selected in ((0.25, 0.5, 1), (0.5, 0.5, 1), (0.75, 2 / (1 + math.exp(5)), 3), (0.0, 1.0, 0)):
        found = threshold_for(run, budget, 2, "margin")
        assert (found.threshold, found.selected) == (pytest.approx(expected, abs=1e-7), selected)
    assert threshold_for(run, 1.0, 2, "margin").threshold == -1.0
    hundred = cheap_run(tmp_path / "hundred", [0.01 * i for i in range(100)])
    assert threshold_for(hundred, 0.29, 2, "margin").selected == 29
    assert main(["selectivity", run, "--budget", "0.75", "--k", "2", "--criterion", "margin"]) == 0
    printed = capsys.readouterr().out
    assert f"threshold: {threshold_for(run, 0.75, 2, 'margin').threshold!r}" in printed
    assert "sends 3 of 4 queries (75.0%)" in printed


@settings(deadline=None, max_examples=25)
@given(
    budget=st.floats(0, 1),
    k=st.integers(2, 6),
    criterion=st.sampled_from(["entropy", "margin"]),
    seed=st.integers(0, 99),
)
def test_the_selective_ranker_keeps_to_the_budget(
    tmp_path_factory: pytest.TempPathFactory, budget: float, k: int, criterion: str, seed: int
):
    """The threshold found on the cheap ranker's labels, given to the selective ranker, sends just as many queries."""
    cheap = CrossEncoderRankerSettings(model=FakeSettings(seed=seed))
    requests = [make_list(f"q{i}", 2 + i % 5) for i in range(12)]
    rows = [label_row(o.request, o.scores.scores) for o in Ranker(cheap).rank(requests)]
    found = threshold_for(write_labels(tmp_path_factory.mktemp("run"), rows), budget, k, criterion)
    chosen = SelectiveSettings(cheap=cheap, expensive=cheap, k=k, criterion=criterion, threshold=found.threshold)
    sent = sum(o.usage.calls > len(o.request) for o in Ranker(chosen).rank(requests))
    assert sent == found.selected == math.floor(budget * 12)


def test_budgets_that_mean_nothing(tmp_path: Path):
    run = cheap_run(tmp_path / "run", [1.0])
    with pytest.raises(ConfigError, match="a share of the queries"):
        threshold_for(run, 20, 2, "entropy")
    with pytest.raises(ConfigError, match="--k 1: uncertainty"):
        threshold_for(run, 0.2, 1, "entropy")
    failed = write_labels(tmp_path / "failed", [label_row(make_list(), None, error="boom")])
    with pytest.raises(InputError, match="no row has scores"):
        threshold_for(failed, 0.2, 2, "entropy")


def test_a_report_that_can_not_be_written_is_refused_before_the_audit(tmp_path: Path, capsys):
    assert main(["audit", str(tmp_path / "no-run"), "--json", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path}: is a folder: name a file to write\n"
