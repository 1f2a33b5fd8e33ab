"""What a training step sees: which queries, which of their candidates, and what they are compared with."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fixtures.rows import label_row, make_labels, make_list, write_labels
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from rerank_ray.distill.labels import LabelSet, TextLists
from rerank_ray.distill.sampling import sample_group, teacher_order
from rerank_ray.distill.targets import Targets, validation_ndcg
from rerank_ray.distill.tasks import gains_of
from rerank_ray.errors import InputError, RowError
from rerank_ray.formats.training_data import TrainingLists
from rerank_ray.parquet import write_candidates
from rerank_ray.records import Candidate, Query
from rerank_ray.schema import LABELS, labels_from_row
from rerank_ray.settings.sampling import BandSettings, FalseNegativeSettings, SamplingSettings

# Rows


def write_set(folder: Path, count: int, prefix: str = "q", rows_per_file: int = 64) -> str:
    """`count` labelled rows, every tenth with an error instead."""
    rows = [
        label_row(make_list(f"{prefix}{i}"), [1.0, 2.0, 3.0])
        if i % 10
        else label_row(make_list(f"{prefix}{i}"), None, error="boom")
        for i in range(count)
    ]
    return write_labels(folder, rows, rows_per_file=rows_per_file)


def query_ids(data: LabelSet, positions: np.ndarray) -> list[str]:
    return [labels.candidate_list.query.query_id for labels in data.reader().read(positions)]


def test_teachers_of_the_training_rows_are_told_up_to_20(tmp_path: Path):
    """Two share 60 rows; of 60 in as many rows, of which some are held out, 20 are named and the others counted."""
    rows = [label_row(make_list(f"q{i}"), [1.0, 2.0, 3.0]) for i in range(60)]
    two = [row | {"teacher": "ba"[i % 2]} for i, row in enumerate(rows)]
    assert LabelSet.open([write_labels(tmp_path / "a", two)], 0.2, seed=0).teachers == ("a", "b")
    many = LabelSet.open(
        [write_labels(tmp_path / "b", [row | {"teacher": f"t{i:02}"} for i, row in enumerate(rows)])], 0.2, seed=0
    )
    trained = sorted(f"t{int(query_id[1:]):02}" for query_id in query_ids(many, many.train))
    assert many.teachers == (*trained[:20], f"and {len(trained) - 20} more")


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ([1.0, 2.0], "'scores' has 2 entries for 3 candidates"),
        ([1.0, 2.0, -math.inf], "a score is infinite"),
    ],
)
def test_rows_that_training_would_stop_at_are_found_before_it(tmp_path: Path, scores: list[float], said: str):
    """Of label Parquet that another program wrote."""
    rows = [label_row(make_list(f"q{i}"), [1.0, 2.0, 3.0]) for i in range(20)]
    rows[7] |= {"scores": scores}
    folder = write_labels(tmp_path / "a", rows)
    with pytest.raises(RowError, match=rf"part-00000.parquet: query 'q7': {said}"):
        LabelSet.open([folder], 0.2, seed=0)
    with pytest.raises(RowError, match=said):
        labels_from_row(rows[7])


def test_text_lists_are_the_training_rows_and_the_other_files_rows_that_are_not_held_out(tmp_path: Path):
    """Candidates of the labels' queries and of others: none of a held-out query's is read, all others are, once."""
    labels = write_set(tmp_path / "labels", 60)
    names = [f"q{i}" for i in range(40, 100)]
    for part in (names[:7], names[7:]):
        write_candidates((make_list(name, 4) for name in part), str(tmp_path / f"texts{len(part)}"))
    data = LabelSet.open([labels], 0.3, 5, [str(tmp_path / "texts7"), str(tmp_path / "texts53")])
    lists = data.text_lists()
    read = lists.reader()
    found = [read(number).query.query_id for number in range(len(lists))]
    trained, held_out = query_ids(data, data.train), query_ids(data, data.validation)
    assert found[: len(trained)] == trained
    others = found[len(trained) :]
    assert len(set(others)) == len(others)
    assert set(others) < set(names)
    assert not set(others) & set(held_out)
    assert {n for n in names[:20] if n in trained} <= set(others)
    assert 30 < len(others) < 60


def test_text_lists_without_a_row(tmp_path: Path):
    write_candidates([make_list("q1", 4)], str(tmp_path / "texts"))
    with pytest.raises(InputError, match="holds no list to read texts from whose query is not held out"):
        TextLists.open([str(tmp_path / "texts")], 1.0, 0)
    with pytest.raises(InputError, match="does not exist"):
        TextLists.open([str(tmp_path / "none")], 0.2, 0)


def test_every_labelled_row_is_in_one_of_the_two_halves(tmp_path: Path):
    """300 rows in two folders and several files; 30 have errors. Held out: near a fifth of the 270, none of both."""
    uris = [write_set(tmp_path / "a", 200), write_set(tmp_path / "b", 100, "r")]
    data = LabelSet.open(uris, 0.2, seed=0)
    held_out, train = query_ids(data, data.validation), query_ids(data, data.train)
    labelled = {f"q{i}" for i in range(200) if i % 10} | {f"r{i}" for i in range(100) if i % 10}
    assert data.unlabelled == 30
    assert len(train) + len(held_out) == 270
    assert set(train) | set(held_out) == labelled
    assert not set(train) & set(held_out)
    assert 30 <= len(held_out) <= 80


def test_each_epoch_reads_every_training_row_once(tmp_path: Path):
    """Also with more row groups (19 of 16 rows) than one window of 16 holds."""
    data = LabelSet.open([write_set(tmp_path / "a", 300)], 0.1, seed=3)
    assert len(data.groups) > 16
    expected = sorted(query_ids(data, data.train))
    orders = [query_ids(data, data.order(3, epoch)) for epoch in (0, 1)]
    for order in orders:
        assert sorted(order) == expected
    assert orders[0] != orders[1]
    first_window = {(int(g)) for g, _ in data.order(3, 0)[: len(expected) // 2]}
    assert len(first_window) <= 16


def test_split_and_order_depend_on_ids_and_seed_alone(tmp_path: Path):
    """The split of a query is the same in other files, in other company and in another order."""
    data = LabelSet.open([write_set(tmp_path / "a", 100)], 0.3, seed=5)
    again = LabelSet.open([str(tmp_path / "a")], 0.3, seed=5)
    np.testing.assert_array_equal(data.order(5, 2), again.order(5, 2))
    moved = LabelSet.open(
        [write_set(tmp_path / "z", 40, "z"), write_set(tmp_path / "b", 100, rows_per_file=16)], 0.3, 5
    )
    held_out = set(query_ids(data, data.validation))
    assert {i for i in query_ids(moved, moved.validation) if i.startswith("q")} == held_out
    assert set(query_ids(data, LabelSet.open([str(tmp_path / "a")], 0.3, seed=6).validation)) != held_out


def test_all_lists_of_one_text_are_on_one_side(tmp_path: Path):
    """Training data without ids has a list for each positive of a query: none may be held out while another teaches."""
    lists = TrainingLists()
    rows = []
    for n in range(180):
        query = Query(query_id="", text=f"query {n % 60}")
        made = lists.labels("f", n, query, [Candidate(doc_id=f"d{i}", text=f"text {i}") for i in range(2)], [1.0, 0.0])
        rows.append(label_row(made.candidate_list, made.scores))
    data = LabelSet.open([write_labels(tmp_path / "a", rows)], 0.3, 5)
    train, held_out = ({i[:16] for i in query_ids(data, side)} for side in (data.train, data.validation))
    assert not train & held_out
    assert len(train | held_out) == 60
    assert len(held_out) > 5


def test_labels_behind_a_uri_are_read_through_it(tmp_path: Path):
    """Its escapes, host and options are lost once a file's path in the filesystem is taken out of it."""
    folder = write_set(tmp_path / "my labels", 30)
    data = LabelSet.open([f"file://{folder.replace(' ', '%20')}"], 0.2, seed=0)
    plain = LabelSet.open([folder], 0.2, seed=0)
    assert query_ids(data, data.order(0, 0)) == query_ids(plain, plain.order(0, 0))


def test_what_the_rows_lack_is_counted(tmp_path: Path):
    """A row without any score is neither trained on nor held out; the rest are counted by what they lack."""
    lacks = {
        "nan": label_row(make_list("nan", 2), [math.nan, math.nan]),
        "tied": label_row(make_list("tied"), [1.0, math.nan, 1.0]) | {"uncertainty": [0.1, None, 0.1]},
        "whole": label_row(make_list("whole"), [1.0, 2.0, 3.0]) | {"uncertainty": [0.1, 0.2, 0.3]},
        "failed": label_row(make_list("failed"), None, error="boom"),
    }
    lacks["whole"]["candidates"][1]["label"] = 2.0
    others = [label_row(make_list(f"q{i}", 1), [1.0]) for i in range(60)]
    data = LabelSet.open([write_labels(tmp_path / "a", [*lacks.values(), *others])], 0.1, seed=2)
    held_out = set(query_ids(data, data.validation))
    assert not held_out & set(lacks), "another seed, please: this test counts training rows"
    assert set(query_ids(data, data.train)) | held_out == {"tied", "whole"} | {f"q{i}" for i in range(60)}
    assert (data.unlabelled, data.unscored) == (1, 1)
    single = len(data.train) - 2
    assert (data.tied, data.gains_alike, data.without_uncertainty) == (single + 1, single + 1, single)


def test_labels_without_a_single_score(tmp_path: Path):
    rows = [label_row(make_list(f"q{i}", 2), [math.nan, math.nan]) for i in range(20)]
    with pytest.raises(InputError, match="0 rows have no labels and 20 no score"):
        LabelSet.open([write_labels(tmp_path / "a", rows)], 0.2, seed=0)


def test_a_query_id_in_two_inputs(tmp_path: Path):
    uris = [write_set(tmp_path / "a", 20), write_set(tmp_path / "b", 15)]
    with pytest.raises(InputError, match=f"{uris[1]}: 15 of its query ids are also in {uris[0]}"):
        LabelSet.open(uris, 0.2, seed=0)


@pytest.mark.parametrize("count", [1, 11])
def test_too_few_rows_to_split(tmp_path: Path, count: int):
    """One row is an error row; of eleven, at a fraction of 10⁻⁹, none is held out."""
    with pytest.raises(InputError, match="each needs one: label more queries, or change"):
        LabelSet.open([write_set(tmp_path / "a", count)], 1e-9, seed=0)


@pytest.mark.parametrize("row_groups", [0, 1])
def test_files_without_rows_are_passed_over(tmp_path: Path, row_groups: int):
    """A writer that was given nothing leaves a file of no rows; alone it is an input that can't be split."""
    (tmp_path / "a").mkdir()
    with pq.ParquetWriter(tmp_path / "a" / "empty.parquet", LABELS) as writer:
        for _ in range(row_groups):
            writer.write_batch(pa.RecordBatch.from_pylist([], schema=LABELS))
    with pytest.raises(InputError, match="0 labelled queries to train on"):
        LabelSet.open([str(tmp_path / "a")], 0.2, seed=0)
    write_set(tmp_path / "a" / "more", 50)
    data = LabelSet.open([str(tmp_path / "a")], 0.2, seed=0)
    assert len(data.train) + len(data.validation) == 45
    assert len(data.order(0, 0)) == len(data.train)


# Samples


scores_lists = st.lists(st.floats(-10, 10) | st.just(math.nan), min_size=1, max_size=40)


@settings(deadline=None)
@given(scores=scores_lists, size=st.integers(1, 20), seed=st.integers(0, 99), epoch=st.integers(0, 9))
def test_a_group_is_drawn_from_the_scored_candidates(scores: list[float], size: int, seed: int, epoch: int):
    """Distinct, in the teacher's order, as many as there are up to the size; NaN is never drawn."""
    labels = make_labels(scores)
    group = sample_group(labels, SamplingSettings(group_size=size), seed, epoch)
    order = teacher_order(labels)
    assert len(group) == len(set(group)) == min(size, len(order))
    assert set(group) <= set(order)
    assert [i for i in order if i in group] == group
    assert not any(math.isnan(scores[i]) for i in group)
    assert group == sample_group(labels, SamplingSettings(group_size=size), seed, epoch)


bands_of = st.lists(
    st.tuples(st.integers(1, 30), st.integers(0, 15), st.integers(1, 4)).map(
        lambda b: BandSettings(ranks=(b[0], b[0] + b[1]), count=b[2])
    ),
    min_size=1,
    max_size=4,
)


@settings(deadline=None)
@given(bands=bands_of, count=st.integers(1, 40), epoch=st.integers(0, 9))
def test_bands_give_their_share(bands: list[BandSettings], count: int, epoch: int):
    """Every band finds at least as many of the group in its ranks as it asks for, or all that there are."""
    labels = make_labels([float(-i) for i in range(count)])
    size = sum(b.count for b in bands)
    group = sample_group(labels, SamplingSettings(group_size=size, bands=tuple(bands)), 0, epoch)
    assert len(set(group)) == min(size, count)
    for band in bands:
        first, last = band.ranks
        inside = set(range(first - 1, min(last, count)))
        assert len(inside & set(group)) >= min(band.count, len(inside))


def test_bands_by_hand():
    """Ranks 1–1 and 5–8 of ten: the best one and two of the four, whatever the epoch; the two change with it."""
    labels = make_labels([float(i) for i in range(10)])
    chosen = SamplingSettings(
        group_size=3, bands=(BandSettings(ranks=(1, 1), count=1), BandSettings(ranks=(5, 8), count=2))
    )
    groups = {tuple(sample_group(labels, chosen, 0, epoch)) for epoch in range(50)}
    for best, *others in groups:
        assert best == 9
        assert set(others) <= {5, 4, 3, 2}
    assert len(groups) == 6


def test_an_unfilled_band_is_filled_from_the_rest():
    """Ranks 9–20 of ten candidates hold two; the other two of the four come from what is left."""
    labels = make_labels([float(-i) for i in range(10)])
    chosen = SamplingSettings(group_size=4, bands=(BandSettings(ranks=(9, 20), count=4),))
    for epoch in range(20):
        group = sample_group(labels, chosen, 0, epoch)
        assert len(group) == 4
        assert group[-2:] == [8, 9]


def test_epochs_seeds_and_queries_draw_apart():
    """Ten of 40: two draws are alike with a chance below 10⁻⁸."""
    scores = [float(i) for i in range(40)]
    chosen = SamplingSettings(group_size=10)
    draws = {
        tuple(sample_group(make_labels(scores, query_id=q), chosen, seed, epoch))
        for q, seed, epoch in (("a", 0, 0), ("a", 0, 1), ("a", 1, 0), ("b", 0, 0))
    }
    assert len(draws) == 4


def test_uniform_draws_reach_every_candidate():
    seen = {
        i
        for epoch in range(100)
        for i in sample_group(make_labels([float(i) for i in range(20)]), SamplingSettings(group_size=4), 0, epoch)
    }
    assert seen == set(range(20))


def test_known_positives_come_first():
    """Two of the three candidates with a gain, whatever their teacher score, then the band's; one, if there is one."""
    gains = [None, 1.0, None, 2.0, 0.0, None, None, None, None, 1.0]
    labels = make_labels([float(-i) for i in range(10)], gains=gains)
    chosen = SamplingSettings(group_size=3, positives=2, bands=(BandSettings(ranks=(5, 6), count=1),))
    drawn = [sample_group(labels, chosen, 0, epoch) for epoch in range(60)]
    assert {tuple(i for i in group if i in (1, 3, 9)) for group in drawn} == {(1, 3), (1, 9), (3, 9)}
    assert {i for group in drawn for i in group} - {1, 3, 9} == {4, 5}
    one = make_labels([float(-i) for i in range(10)], gains=[None] * 7 + [1.0, None, None])
    for epoch in range(20):
        group = sample_group(one, chosen, 0, epoch)
        assert len(group) == 3
        assert 7 in group


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        ({"margin": 0.0}, [2, 3, 4, 5, 1]),
        ({"margin": 2.0}, [2, 3, 4, 5, 1]),
        ({"margin": 2.5}, [2, 4, 5, 1]),
        ({"fraction": 1.0}, [2, 3, 4, 5, 1]),
        ({"fraction": 0.5}, [2, 5, 1]),
        ({"fraction": 0.5, "margin": 7.5}, [2, 1]),
    ],
)
def test_false_negatives_by_hand(rule: dict, kept: list[int]):
    """Scores 9, −1, 8, 6, 5, 1 and a positive at 8: its lowest score −1 lies 9 below. Half of that way up is 3.5.

    The candidate at 9 always goes; the positive and a second one at −1 always stay.
    """
    labels = make_labels([9.0, -1.0, 8.0, 6.0, 5.0, 1.0], gains=[None, 1.0, 2.0, None, None, None])
    chosen = SamplingSettings(group_size=6, false_negatives=FalseNegativeSettings(**rule))
    assert sample_group(labels, chosen, 0, 0) == kept


def test_without_a_known_gain_the_teachers_first_is_the_positive():
    """Scores 5, 4.5 and 1 with a margin of 1: the second is too close to the first."""
    chosen = SamplingSettings(group_size=6, false_negatives=FalseNegativeSettings(margin=1.0))
    assert sample_group(make_labels([1.0, 5.0, 4.5]), chosen, 0, 0) == [1, 0]


def test_bands_count_ranks_before_anything_is_filtered():
    """Rank 2 of five is a false negative; the band of ranks 2–3 has rank 3 left, the rest is drawn from 4 and 5."""
    labels = make_labels([5.0, 4.9, 3.0, 2.0, 1.0])
    chosen = SamplingSettings(
        group_size=3,
        bands=(BandSettings(ranks=(1, 1), count=1), BandSettings(ranks=(2, 3), count=2)),
        false_negatives=FalseNegativeSettings(margin=0.5),
    )
    groups = {tuple(sample_group(labels, chosen, 0, epoch)) for epoch in range(30)}
    assert groups == {(0, 2, 3), (0, 2, 4)}


def test_the_curriculum_by_hand():
    """Epochs 0 and 1 draw from ranks 6–10, epoch 2 from ranks 3–5, later ones from the two first."""

    def bands(first: int, last: int) -> list[dict]:
        return [{"ranks": [first, last], "count": 2}]

    stages = [{"until_epoch": 2, "bands": bands(6, 10)}, {"until_epoch": 3, "bands": bands(3, 5)}]
    chosen = SamplingSettings.model_validate({"group_size": 2, "curriculum": stages, "bands": bands(1, 2)})
    labels = [make_labels([float(-i) for i in range(10)], query_id=f"q{q}") for q in range(30)]
    seen = [{i for row in labels for i in sample_group(row, chosen, 0, epoch)} for epoch in range(5)]
    assert seen == [{5, 6, 7, 8, 9}, {5, 6, 7, 8, 9}, {2, 3, 4}, {0, 1}, {0, 1}]


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"group_size": 4, "positives": 5}, "positives (5) is above group_size (4)"),
        ({"group_size": 4, "positives": 1, "bands": [[1, 9, 4]]}, "add up to 4, not to group_size (4) − positives (1)"),
        ({"group_size": 4, "stages": [[1, [1, 9, 3]]]}, "curriculum.0.bands: the bands' counts add up to 3"),
        ({"group_size": 4, "stages": [[2, [1, 9, 4]], [2, [1, 9, 4]]]}, "must rise from stage to stage, not [2, 2]"),
        ({"false_negatives": {}}, "false_negatives drops nothing"),
        ({"false_negatives": {"fraction": 0.0}}, "greater than 0"),
    ],
)
def test_samplings_that_can_not_be_meant(sampling: dict, message: str):
    def band(first: int, last: int, count: int) -> dict:
        return {"ranks": [first, last], "count": count}

    if "bands" in sampling:
        sampling["bands"] = [band(*b) for b in sampling["bands"]]
    sampling["curriculum"] = [{"until_epoch": e, "bands": [band(*b)]} for e, b in sampling.pop("stages", [])]
    with pytest.raises(ValidationError, match=re.escape(message)):
        SamplingSettings.model_validate(sampling)


def test_teacher_order_keeps_the_first_stage_among_equals():
    assert teacher_order(make_labels([1.0, math.nan, 2.0, 1.0, 2.0])) == [2, 4, 0, 3]


# Targets


def test_targets_by_hand():
    """Two groups of different size: padding is masked and 0; an unjudged candidate has gain 0."""
    first = make_labels([3.0, 1.0, 2.0], gains=[1.0, None, 2.0])
    second = make_labels([5.0, 4.0])
    targets = Targets.of([(first, [0, 2, 1]), (second, [0])])
    assert targets.teacher.tolist() == [[3.0, 2.0, 1.0], [5.0, 0.0, 0.0]]
    assert targets.gains.tolist() == [[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]]
    assert targets.mask.tolist() == [[True, True, True], [True, False, False]]


def test_validation_ndcg_on_gains_by_hand():
    """Gains 0, 3, 1 ranked 2, 0, 1 by the student: (1/log₂2 + 0/log₂3 + 3/log₂4) / (3/log₂2 + 1/log₂3)."""
    labels = make_labels([0.0, 0.0, 0.0], gains=[None, 3.0, 1.0])
    expected = (1 + 3 / 2) / (3 + 1 / math.log2(3))
    assert validation_ndcg(labels, [0.5, 0.1, 0.9], "labels") == pytest.approx(expected)
    assert validation_ndcg(labels, [0.1, 0.9, 0.5], "labels") == 1.0
    assert validation_ndcg(make_labels([1.0, 2.0]), [1.0, 2.0], "labels") is None


def test_validation_ndcg_on_the_teacher_by_hand():
    """Teacher's ranks 1, 2, none (NaN) give gains 10, 9, 0; the student turns the first two round."""
    labels = make_labels([2.0, 1.0, math.nan])
    expected = (9 + 10 / math.log2(3)) / (10 + 9 / math.log2(3))
    assert validation_ndcg(labels, [1.0, 2.0, 0.0], "teacher") == pytest.approx(expected)


def test_validation_ndcg_does_not_hang_on_the_order_of_ties():
    """Ranks 1 and 2 tie: each has gain (10 + 9) / 2. A list of ties alone prefers nothing."""
    labels = make_labels([8.0, 8.0, 3.0])
    assert validation_ndcg(labels, [2.0, 1.0, 0.0], "teacher") == 1.0
    assert validation_ndcg(labels, [1.0, 2.0, 0.0], "teacher") == 1.0
    best, worst = 9.5 + 9.5 / math.log2(3) + 8 / 2, 8 + 9.5 / math.log2(3) + 9.5 / 2
    assert validation_ndcg(labels, [0.0, 1.0, 2.0], "teacher") == pytest.approx(worst / best)
    assert validation_ndcg(make_labels([4.0, 4.0]), [1.0, 0.0], "teacher") is None


def test_gains_below_zero_count_as_irrelevant():
    """TREC Web's spam: no ranking is better than the right one."""
    labels = make_labels([0.0] * 4, gains=[1.0, 0.0, -2.0, -2.0])
    assert validation_ndcg(labels, [4.0, 3.0, 2.0, 1.0], "labels") == 1.0
    assert validation_ndcg(labels, [1.0, 2.0, 3.0, 4.0], "labels") == pytest.approx(1 / math.log2(5))
    assert gains_of(labels, [0, 2]) == [1.0, 0.0]


def test_validation_ndcg_stops_at_rank_ten():
    """Of twelve candidates the teacher's eleventh and twelfth have no gain, and ranks 11 and 12 give none."""
    labels = make_labels([float(-i) for i in range(12)])
    perfect = [float(-i) for i in range(12)]
    assert validation_ndcg(labels, perfect, "teacher") == 1.0
    swapped_below = [*perfect[:10], perfect[11], perfect[10]]
    assert validation_ndcg(labels, swapped_below, "teacher") == 1.0
    last_two_first = [*perfect[:10], 2.0, 1.0]
    gains = [0, 0, *range(10, 2, -1)]
    dcg = sum(g / math.log2(rank + 2) for rank, g in enumerate(gains))
    ideal = sum((10 - rank) / math.log2(rank + 2) for rank in range(10))
    assert validation_ndcg(labels, last_two_first, "teacher") == pytest.approx(dcg / ideal)
