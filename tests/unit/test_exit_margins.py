"""Margins of adaptive exits: who leaves, what score they get, and what is lost, by hand and at random."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rerank_ray.models.exit_margins import calibrate, goes_on, merged, segments_of, settle

TWENTY = np.arange(20.0)
"""Scores of twenty candidates; the tenth highest is 10."""


def test_who_goes_on():
    assert np.flatnonzero(goes_on(TWENTY, 0.0)).tolist() == list(range(10, 20))
    assert np.flatnonzero(goes_on(TWENTY, 2.5)).tolist() == list(range(8, 20))
    assert goes_on(TWENTY, 10.0).all()
    assert goes_on(TWENTY[:10], 0.0).all()
    unknown = np.where(TWENTY > 17, np.nan, TWENTY)
    assert np.flatnonzero(goes_on(unknown, 0.0)).tolist() == list(range(8, 18))
    unknown = np.where(TWENTY > 4, np.nan, TWENTY)
    assert np.flatnonzero(goes_on(unknown, 0.0)).tolist() == list(range(5))


def test_scores_are_merged_by_hand():
    """Candidates 1 and 4 leave at the first exit, 0 at the second, where it is 2 below the lowest of the others.

    The lowest that went on from the first exit is 5 there, and the lowest score after it is −4.
    """
    stages = [
        (np.arange(5), np.array([6.0, 4.0, 5.0, 9.0, 1.0])),
        (np.array([0, 2, 3]), np.array([1.0, 3.0, 8.0])),
        (np.array([2, 3]), np.array([-2.0, 7.0])),
    ]
    assert merged(stages).tolist() == [-4.0, -5.0, -2.0, 7.0, -8.0]


def test_one_without_a_score_takes_none_from_the_others():
    """Candidate 2 left 1.5 below candidate 1, the lowest of those that the last layer scored."""
    stages = [(np.arange(3), np.array([2.0, 2.5, 1.0])), (np.array([0, 1]), np.array([np.nan, 5.0]))]
    assert merged(stages).tolist() == pytest.approx([np.nan, 5.0, 3.5], nan_ok=True)
    scores = np.stack([TWENTY[::-1], TWENTY[::-1]])
    scores[1, 3] = np.nan
    final, _ = settle(scores, [0.5])
    assert np.flatnonzero(np.isnan(final)).tolist() == [3]
    known = np.delete(final, 3)
    assert (np.diff(known) < 0).all()


def test_no_score_is_made_up():
    """A model that gives NaN for all that went on, or at an exit for the whole list, leaves nothing to put the others
    below."""
    stages = [(np.arange(3), np.array([3.0, 2.0, 1.0])), (np.array([0, 1]), np.array([np.nan, np.nan]))]
    assert np.isnan(merged(stages)).all()
    final, reached = settle(np.stack([np.full(20, np.nan), TWENTY]), [0.0])
    assert np.isnan(final).all()
    assert reached == [20, 0]


def test_a_list_is_settled_by_hand():
    """At the first exit those below 10 − 2 leave, and the last layer has the others the other way round."""
    scores = np.stack([TWENTY, -TWENTY])
    final, reached = settle(scores, [2.0])
    assert reached == [20, 12]
    assert final[8:].tolist() == (-TWENTY[8:]).tolist()
    assert final[:8].tolist() == [-27.0 + i for i in range(8)]
    skipped, reached = settle(scores, [None])
    assert reached == [20, 20]
    assert skipped.tolist() == scores[1].tolist()


score = st.floats(-100.0, 100.0)
lists = st.integers(1, 30).flatmap(lambda n: arrays(float, (3, n), elements=score))
margins = st.lists(st.one_of(st.none(), st.floats(0.0, 50.0)), min_size=2, max_size=2)


@given(lists, margins)
def test_those_who_went_on_are_above_those_who_left(scores: np.ndarray, margins: list[float | None]):
    final, reached = settle(scores, margins)
    assert np.isfinite(final).all()
    assert reached[0] == scores.shape[1]
    assert reached[-1] >= min(10, scores.shape[1])
    order = np.argsort(-final, kind="stable")
    went, left = order[: reached[-1]], order[reached[-1] :]
    assert final[went].tolist() == scores[-1][went].tolist()
    assert not len(left) or final[left].max() < final[went].min()
    # Those who left at one exit stand as it has them, as far as floats can tell.
    tried = [number for number, margin in enumerate(margins) if margin is not None]
    if len(tried) == 1:
        assert (np.diff(scores[tried[0]][left]) <= 1e-9).all()


def test_what_is_computed_between_exits():
    """Layers 4, 5 and 6 with branches of two: an exit shares what lies below its branch."""
    assert segments_of((4, 5, 6), 2, [0.0, 0.0]) == [(0, 2, 4), (2, 3, 5), (3, 6, 6)]
    assert segments_of((4, 5, 6), 2, [0.0, None]) == [(0, 2, 4), (2, 6, 6)]
    assert segments_of((4, 5, 6), 0, [None, 0.0]) == [(0, 5, 5), (5, 6, 6)]
    assert segments_of((4, 5, 6), 0, [None, None]) == [(0, 6, 6)]


def lost_tenths(scores: list[np.ndarray]):
    """A loss of 0.1 for each of the last layer's ten best that is not among the merged ten."""

    def loss(number: int, final: np.ndarray) -> float:
        best, kept = (set(np.argsort(-s)[:10].tolist()) for s in (scores[number][-1], final))
        return 0.1 * len(best - kept)

    return loss


def test_where_nothing_is_lost_all_but_ten_leave():
    """Exits that agree with the last layer: of twenty ten go on, from layer 2 of 6."""
    scores = [np.stack([TWENTY + n, 2 * TWENTY]) for n in range(3)]
    found = calibrate(scores, lost_tenths(scores), 0.0, (2, 6))
    assert found.margins == (0.0,)
    assert found.left == (0.5, 0.5)
    assert found.layers_computed == pytest.approx(2 + 0.5 * 4)
    assert (found.loss, found.loss_bound) == (0.0, 0.0)


def test_an_exit_that_costs_more_than_it_saves_is_not_tried():
    """Half of the candidates leave: at layer 5 of 6 with a branch of three layers, 5 + 0.5 · 4 are computed."""
    scores = [np.stack([TWENTY, TWENTY])] * 3
    assert calibrate(scores, lost_tenths(scores), 0.0, (5, 6), branch_layers=0).layers_computed == pytest.approx(5.5)
    dear = calibrate(scores, lost_tenths(scores), 0.0, (5, 6), branch_layers=3)
    assert dear.margins == (None,)
    assert dear.layers_computed == 6
    assert dear.left == (0.0, 1.0)
    assert calibrate(scores, lost_tenths(scores), 0.0, (2, 6), branch_layers=1).layers_computed == pytest.approx(4.5)


def left(final: np.ndarray) -> np.ndarray:
    """Who left, where the last layer's scores are 2 · TWENTY: the others have those."""
    return np.flatnonzero(final != 2 * TWENTY)


def test_a_loss_that_may_be_chance_is_not_taken():
    """Of four lists one loses 0.08 if any candidate leaves: 0.02 on average, but its 90 % bound is 0.02 + 1.6377 · 0.04
    / 2, by Student's t with 3 degrees of freedom."""
    scores = [np.stack([TWENTY, 2 * TWENTY])] * 4
    bound = 0.02 + 1.6377444 * 0.04 / 2

    def loss(number: int, final: np.ndarray) -> float:
        return 0.08 * (number == 0 and len(left(final)) > 0)

    assert calibrate(scores, loss, bound - 1e-6, (1, 2)).margins == (None,)
    taken = calibrate(scores, loss, bound + 1e-6, (1, 2))
    assert taken.margins == (0.0,)
    assert taken.loss == pytest.approx(0.02)
    assert taken.loss_bound == pytest.approx(bound)


def test_exits_share_the_confidence():
    """With two exits each bound holds with 95 %: Student's t of 2.3534 with 3 degrees of freedom. The first exit has
    the best candidates at the end, so the second may use all of what is promised."""
    scores = [np.stack([-TWENTY, TWENTY, 2 * TWENTY])] * 4
    bound = 0.02 + 2.3533634 * 0.04 / 2

    def loss(number: int, final: np.ndarray) -> float:
        return 1.0 if (left(final) >= 10).any() else 0.08 * (number == 0 and len(left(final)) > 0)

    assert calibrate(scores, loss, bound - 1e-6, (1, 2, 3)).margins == (None, None)
    assert calibrate(scores, loss, bound + 1e-6, (1, 2, 3)).margins == (None, 0.0)


def test_an_exit_that_saves_nothing_leaves_its_share_to_the_others():
    """More than five of twenty that leave cost 0.02, and half of 0.03 is less. With five gone at layer 2 there is
    nothing in layer 5, whose branch has one layer: 2 + 0.75 · 4 + 0.5 · 2 against 2 + 0.75 · 5."""
    scores = [np.stack([TWENTY, TWENTY, 2 * TWENTY])] * 3

    def loss(_: int, final: np.ndarray) -> float:
        return 0.02 * (len(left(final)) > 5)

    assert calibrate(scores, loss, 0.019, (2, 5, 6), branch_layers=1).margins == (5.0, None)
    found = calibrate(scores, loss, 0.03, (2, 5, 6), branch_layers=1)
    assert found.margins == (0.0, None)
    assert found.layers_computed == pytest.approx(2 + 0.5 * 5)


def test_a_margin_below_one_that_fails_is_not_tried():
    """The fourth that leaves costs 0.5, and with those after it as much is won."""
    scores = [np.stack([TWENTY, 2 * TWENTY])] * 3

    def loss(_: int, final: np.ndarray) -> float:
        return 0.0 if len(left(final)) < 4 else 0.5 if len(left(final)) == 4 else -0.5

    assert calibrate(scores, loss, 0.1, (1, 2)).margins == (7.0,)
    assert calibrate(scores, loss, 0.6, (1, 2)).margins == (0.0,)


@given(st.lists(lists, min_size=2, max_size=8), st.floats(0.0, 0.3), st.integers(0, 1))
def test_the_bound_is_kept_and_what_is_told_is_what_happens(
    scores: list[np.ndarray], max_loss: float, branch_layers: int
):
    layers = (2, 4, 6)
    found = calibrate(scores, lost_tenths(scores), max_loss, layers, branch_layers)
    assert found.loss_bound <= max_loss
    settled = [settle(of_list, found.margins) for of_list in scores]
    losses = [lost_tenths(scores)(number, final) for number, (final, _) in enumerate(settled)]
    assert found.loss == pytest.approx(np.mean(losses))
    reached = np.sum([counts for _, counts in settled], 0) / sum(of_list.shape[1] for of_list in scores)
    assert np.cumsum(found.left[::-1])[::-1] == pytest.approx(reached)
    assert found.layers_computed <= 6
    used = [share for share, margin in zip(reached, (*found.margins, 0.0), strict=True) if margin is not None]
    spans = segments_of(layers, branch_layers, found.margins)
    assert found.layers_computed == pytest.approx(
        sum(s * (end - b) for s, (b, _, end) in zip(used, spans, strict=True))
    )


def test_what_cannot_be_calibrated():
    for count in (0, 1):
        with pytest.raises(ValueError, match=rf"{count} list\(s\) to calibrate on"):
            calibrate([np.zeros((2, 3))] * count, lambda *_: 0.0, 0.1, (1, 2))
    with pytest.raises(ValueError, match=r"max_loss: -0.1"):
        calibrate([np.zeros((2, 3))] * 2, lambda *_: 0.0, -0.1, (1, 2))
