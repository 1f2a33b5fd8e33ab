"""Ensembles of teachers: each way of making scores comparable by hand, and what happens to what can't be combined."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from fixtures.full_disk import full_disk
from fixtures.rows import label_row, make_list, write_labels
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from rerank_ray.combine import combine
from rerank_ray.config import validate
from rerank_ray.errors import ConfigError, InputError, RunError
from rerank_ray.execution.jobs import combine_runs
from rerank_ray.parquet import inspect_input, read_rows
from rerank_ray.ranking.fusion import fuse
from rerank_ray.records import CandidateList
from rerank_ray.schema import LABELS, labels_from_row
from rerank_ray.settings.jobs import CombineSettings, LimitSettings

NAN = math.nan
IDS = ["a", "b", "c"]


def scores_of(rows: list[list[float]], method: str, weights: list[float] | None = None) -> list[float]:
    return list(fuse(np.array(rows), method, weights or [1.0] * len(rows), IDS[: len(rows[0])]).scores)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        # 1, 2, 6: mean 3, deviations −2, −1, 3, population variance 14/3.
        ("zscore", [-2 / math.sqrt(14 / 3), -1 / math.sqrt(14 / 3), 3 / math.sqrt(14 / 3)]),
        # (s − 1) / 5
        ("minmax", [0.0, 0.2, 1.0]),
        # Ranks 3, 2, 1.
        ("rrf", [1 / 63, 1 / 62, 1 / 61]),
        # Candidates below: 0, 1, 2 of 2.
        ("borda", [0.0, 0.5, 1.0]),
        ("kemeny", [0.0, 0.5, 1.0]),
    ],
)
def test_one_teacher_by_hand(method: str, expected: list[float]):
    assert scores_of([[1.0, 2.0, 6.0]], method) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        # Ranks of 2, 5, 2: the two below share 2.5.
        ("rrf", [1 / 62.5, 1 / 61, 1 / 62.5]),
        ("borda", [0.25, 1.0, 0.25]),
    ],
)
def test_ties_share_a_rank(method: str, expected: list[float]):
    assert scores_of([[2.0, 5.0, 2.0]], method) == pytest.approx(expected)


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3])
@pytest.mark.parametrize(
    ("method", "middle"), [("zscore", 0.0), ("minmax", 0.5), ("rrf", 1 / 62), ("borda", 0.5), ("kemeny", 0.5)]
)
def test_equal_scores_are_in_the_middle(value: float, method: str, middle: float):
    """Also where rounding makes their deviation a hair more than 0, as for three times 0.1."""
    assert scores_of([[value] * 3], method) == pytest.approx([middle] * 3)


def test_weights_by_hand():
    """minmax of (0, 1) and (1, 0) at weights 3 and 1: (3·0 + 1·1)/4 and (3·1 + 1·0)/4."""
    assert scores_of([[5.0, 9.0], [8.0, 2.0]], "minmax", [3.0, 1.0]) == pytest.approx([0.25, 0.75])


def test_kemeny_by_hand():
    """Orders a>b>c, a>b>c and b>c>a: a>b 2:1, b>c 3:0, a>c 2:1, so a>b>c, where Borda ties a and b (4 points each).

    The third teacher at weight 3 outvotes the other two. c unscored by one of them is ranked by the others.
    """
    rows = [[3.0, 2.0, 1.0], [9.0, 8.0, 7.0], [1.0, 3.0, 2.0]]
    assert scores_of(rows, "kemeny") == pytest.approx([1.0, 0.5, 0.0])
    assert scores_of(rows, "kemeny", [1.0, 1.0, 3.0]) == pytest.approx([0.0, 1.0, 0.5])
    np.testing.assert_allclose(scores_of([[3.0, 2.0, NAN], [9.0, 8.0, NAN]], "kemeny"), [1.0, 0.0, NAN])
    np.testing.assert_allclose(scores_of([[3.0, 2.0, NAN], [1.0, NAN, 5.0]], "kemeny"), [0.5, 0.0, 1.0])


def test_kemeny_shares_places_between_equals():
    """d has three below it, and a, b and c, which neither teacher tells apart, 2, 1 and 0: one on average, of three.

    Where the second teacher scored neither b nor c, those two share what a leaves them.
    """
    one, two = [0.0, 0.0, 0.0, 9.0], [1.0, 1.0, 1.0, 7.0]
    ids = [*IDS, "d"]
    for rows in ([one, two], [one[::-1], two[::-1]]):
        found = fuse(np.array(rows), "kemeny", [1.0, 1.0], ids)
        assert sorted(found.scores) == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1.0])
        assert found.scores[rows[0].index(9.0)] == 1.0
    found = fuse(np.array([one, [1.0, NAN, NAN, 7.0]]), "kemeny", [1.0, 1.0], ids)
    assert found.scores[1] == found.scores[2]


def test_uncertainty_by_hand():
    """The weighted population deviation: 0 and 1 at weights 3 and 1 have variance 3/4·(1/4)² + 1/4·(3/4)² = 3/16."""
    result = fuse(np.array([[5.0, 9.0], [8.0, 2.0]]), "minmax", [3.0, 1.0], IDS[:2])
    assert result.uncertainty == pytest.approx([math.sqrt(3) / 4] * 2)
    agreed = fuse(np.array([[5.0, 9.0], [1.0, 2.0]]), "minmax", [3.0, 1.0], IDS[:2])
    assert agreed.uncertainty == pytest.approx([0.0, 0.0])


def test_a_missing_score_is_left_out_of_the_mean():
    """b has the second teacher's score only, and is ranked by it among the two that it scored; c has none at all."""
    rows = [[4.0, NAN, NAN], [1.0, 3.0, NAN]]
    result = fuse(np.array(rows), "minmax", [1.0, 1.0], IDS)
    np.testing.assert_allclose(result.scores, [(0.5 + 0.0) / 2, 1.0, NAN])
    np.testing.assert_allclose(result.uncertainty, [0.25, 0.0, NAN])
    assert [str(d) for d in result.defects] == ["unscored: c: no teacher scored it"]


@pytest.mark.parametrize("method", ["zscore", "minmax", "rrf", "borda", "kemeny"])
def test_a_teacher_that_scored_nothing_changes_nothing(method: str):
    rows = [[1.0, 2.0, 6.0], [NAN, NAN, NAN]]
    assert scores_of(rows, method) == pytest.approx(scores_of(rows[:1], method))


finite = st.floats(-100, 100, width=32)


@given(scores=st.lists(finite, min_size=2, max_size=8, unique=True), factor=st.sampled_from([0.5, 2.0, 8.0]))
def test_a_teachers_scale_does_not_matter(scores: list[float], factor: float):
    """Scaled by a power of two, which is exact, and shifted by nothing: the same ensemble."""
    for method in ("zscore", "minmax", "rrf", "borda", "kemeny"):
        once = fuse(np.array([scores]), method, [1.0], [""] * len(scores)).scores
        scaled = fuse(np.array([scores]) * factor, method, [1.0], [""] * len(scores)).scores
        assert once == pytest.approx(scaled, abs=1e-9)


# Runs


def shuffled(candidate_list: CandidateList, order: list[int]) -> CandidateList:
    candidates = tuple(candidate_list.candidates[i] for i in order)
    return CandidateList(query=candidate_list.query, candidates=candidates)


def run(folder: Path, rows: list[dict]) -> str:
    return write_labels(folder, rows)


def combined(sources: list[str], out: Path, **settings) -> dict[str, dict]:
    chosen = CombineSettings(inputs=sources, **settings)
    count = combine(chosen, sources, [inspect_input(uri, LABELS) for uri in sources], str(out))
    rows = {row["query_id"]: row for row in read_rows(str(out), LABELS.names)}
    assert len(rows) == count
    return rows


def test_two_runs_are_matched_by_query_and_document(tmp_path: Path):
    """The second run has its rows and its candidates in another order; the first run's order and texts are kept."""
    q1, q2 = make_list("q1"), make_list("q2")
    sources = [
        run(tmp_path / "a", [label_row(q1, [0.0, 1.0, 2.0], teacher="A"), label_row(q2, [3.0, 4.0, 5.0], teacher="A")]),
        run(
            tmp_path / "b",
            [
                label_row(q2, [10.0, 20.0, 30.0], teacher="B"),
                label_row(shuffled(q1, [2, 0, 1]), [7.0, 5.0, 6.0], teacher="B"),
            ],
        ),
    ]
    rows = combined(sources, tmp_path / "out", method="minmax", weights=[2.0, 1.0])
    first = labels_from_row(rows["q1"])
    assert first.candidate_list == q1
    assert first.teacher == "combine:minmax:2*(A)+1*(B)"
    assert first.scores == pytest.approx([0.0, 0.5, 1.0])
    assert labels_from_row(rows["q2"]).scores == pytest.approx([0.0, 0.5, 1.0])
    assert rows["q1"]["usage"]["calls"] == 0


def test_an_error_in_one_run_is_an_error_of_the_ensemble(tmp_path: Path):
    lists = [make_list("q1"), make_list("q2")]
    sources = [
        run(tmp_path / "a", [label_row(c, [0.0, 1.0, 2.0], teacher="A") for c in lists]),
        run(
            tmp_path / "b",
            [label_row(lists[0], None, teacher="B", error="boom"), label_row(lists[1], [0.0, 1.0, 2.0], teacher="B")],
        ),
    ]
    rows = combined(sources, tmp_path / "out")
    assert (rows["q1"]["error"], rows["q1"]["scores"]) == ("B: boom", None)
    assert rows["q1"]["candidates"][0]["doc_id"] == "d0"
    assert rows["q2"]["error"] is None


def test_other_candidates_are_an_error_of_the_row(tmp_path: Path):
    sources = [
        run(tmp_path / "a", [label_row(make_list("q1", 3), [0.0, 1.0, 2.0], teacher="A")]),
        run(tmp_path / "b", [label_row(make_list("q1", 2), [0.0, 1.0], teacher="B")]),
    ]
    assert combined(sources, tmp_path / "out")["q1"]["error"] == "B labelled other candidates of this query"


def test_a_row_whose_candidate_is_null_keeps_its_error(tmp_path: Path):
    """As a label job leaves it."""
    broken = label_row(make_list("q1", 3), None, teacher="A", error="candidate 1 is null")
    broken["candidates"][1] = None
    rows = [broken, label_row(make_list("q2", 3), [0.0, 1.0, 2.0], teacher="A")]
    sources = [run(tmp_path / name, rows) for name in ("a", "b")]
    combination = combined(sources, tmp_path / "out")
    assert combination["q1"]["error"] == "A: candidate 1 is null"
    assert combination["q2"]["error"] is None


def test_a_combination_of_too_few_rows_fails(tmp_path: Path):
    """Half of the queries have other candidates in the second run."""
    sources = [
        run(
            tmp_path / name,
            [label_row(make_list(q, n), list(range(n)), teacher=name) for q, n in zip("pq", sizes, strict=True)],
        )
        for name, sizes in (("a", [3, 3]), ("b", [2, 3]))
    ]
    out = str(tmp_path / "out")
    with pytest.raises(RunError, match=r"error rate 0.5000 is above limits.max_error_rate 0.05.* and combine again"):
        combine_runs(CombineSettings(inputs=sources), out, Console(quiet=True))
    assert len(list(read_rows(f"{out}/data", ["query_id"]))) == 2
    raised = CombineSettings(inputs=sources, limits=LimitSettings(max_error_rate=0.5))
    assert combine_runs(raised, out, Console(quiet=True)).state()["state"] == "done"


@pytest.mark.parametrize("scores", [None, [0.0, 1.0], [0.0, 1.0, 2.0, 3.0]])
def test_scores_that_do_not_align_with_the_candidates_are_an_error_of_the_row(tmp_path: Path, scores):
    """Of label Parquet that another program wrote."""
    good = run(tmp_path / "a", [label_row(make_list("q1", 3), [0.0, 1.0, 2.0], teacher="A")])
    bad = run(tmp_path / "b", [label_row(make_list("q1", 3), scores, teacher="B")])
    for number, sources in enumerate(([good, bad], [bad, good])):
        row = combined(sources, tmp_path / f"out{number}")["q1"]
        assert row["error"] == f"B: 'scores' has {len(scores or ())} entries for 3 candidates"
        assert row["scores"] is None


def test_other_queries_are_refused(tmp_path: Path):
    rows = [label_row(make_list(f"q{i}"), [0.0, 1.0, 2.0]) for i in range(4)]
    sources = [run(tmp_path / "a", rows[:3]), run(tmp_path / "b", rows[1:])]
    with pytest.raises(InputError, match=f"{sources[1]}: has 3 queries, {sources[0]} has 3, and they share 2"):
        combined(sources, tmp_path / "out")


def test_few_queries_at_a_time_hold_every_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Forty queries, at most seven in memory at a time. The texts are read once, however often that is."""
    with_texts = []

    def counted(uri: str, columns: Sequence[str]) -> Iterator[dict]:
        for row in read_rows(uri, columns):
            if "candidates" in columns:
                with_texts.append(row["query_id"])
            yield row

    monkeypatch.setattr("rerank_ray.combine.read_rows", counted)
    monkeypatch.setattr("rerank_ray.combine._QUERIES_AT_A_TIME", 7)
    rows = [label_row(make_list(f"q{i}"), [0.0, float(i), 50.0]) for i in range(40)]
    sources = [run(tmp_path / "a", rows), run(tmp_path / "b", rows[::-1])]
    result = combined(sources, tmp_path / "out", method="minmax")
    assert len(result) == 40
    assert result["q25"]["scores"] == pytest.approx([0.0, 0.5, 1.0])
    assert with_texts == [f"q{i}" for i in range(40)]


def test_weights_are_one_for_each_run():
    with pytest.raises(ValueError, match="weights has 1 entries for 2 inputs"):
        CombineSettings(inputs=["a", "b"], weights=[1.0])
    with pytest.raises(ConfigError, match="inputs: "):
        validate(CombineSettings, {"inputs": ["a"]}, "test")


@pytest.mark.parametrize(
    ("file_bytes", "named"), [(0, "out"), (100, r"out/config\.yaml"), (2000, r"out/data/part-00000\.parquet")]
)
def test_a_combination_without_room_names_the_file(tmp_path: Path, file_bytes: int, named: str):
    """The lock, the config and the rows, each the first for which there is none."""
    rows = [label_row(make_list(f"q{i}"), [0.0, 1.0, 2.0]) for i in range(100)]
    settings = CombineSettings(inputs=[run(tmp_path / "a", rows), run(tmp_path / "b", rows)])
    with full_disk(file_bytes), pytest.raises(RunError, match=f"{named}: can't be written .*File too large"):
        combine_runs(settings, str(tmp_path / "out"), Console(quiet=True))
    done = combine_runs(settings, str(tmp_path / "out"), Console(quiet=True))
    assert done.state()["counts"]["rows"] == 100
