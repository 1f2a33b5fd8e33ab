"""Thresholds of adaptive exits: within the promised loss, by hand and at random."""

from __future__ import annotations

import numpy as np
import pytest
from fixtures.students import exit_of
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rerank_ray.models.exit_thresholds import calibrate


def test_two_exits_by_hand():
    """Nothing lost below uncertainty 0.5 at the first exit, and none at the second: half leave at each."""
    uncertainty = np.array([[0.1, 0.1], [0.2, 0.1], [0.5, 0.1], [0.6, 0.1], [0.7, 0.1], [0.8, 0.1]])
    loss = np.array([[0.0, 0.0]] * 3 + [[0.5, 0.0]] * 3)
    found = calibrate(uncertainty, loss, 0.0)
    assert found.thresholds == (0.5, 0.1)
    assert found.left == (0.5, 0.5, 0.0)
    assert (found.loss, found.loss_bound) == (0.0, 0.0)


def test_a_loss_that_may_be_chance_is_not_taken():
    """Four lists lose 0.02 on average, which is allowed, but its 90 % bound is 0.02 + 1.6377 · 0.04 / 2: Student's t
    with 3 degrees of freedom."""
    uncertainty = np.full((4, 1), 0.3)
    loss = np.array([[0.08], [0.0], [0.0], [0.0]])
    bound = 0.02 + 1.6377444 * 0.04 / 2
    assert calibrate(uncertainty, loss, bound - 1e-6).thresholds == (-1.0,)
    taken = calibrate(uncertainty, loss, bound + 1e-6)
    assert taken.thresholds == (0.3,)
    assert taken.loss == pytest.approx(0.02)
    assert taken.loss_bound == pytest.approx(bound)


def test_exits_share_the_confidence():
    """With two exits each bound holds with 95 %: Student's t of 2.3534 with 3 degrees of freedom. None can leave at the
    first, so the second may use all of what is promised."""
    uncertainty = np.full((4, 2), 0.3)
    uncertainty[:, 0] = 1.0
    loss = np.array([[1.0, 0.08], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    bound = 0.02 + 2.3533634 * 0.04 / 2
    assert calibrate(uncertainty, loss, bound - 1e-6).thresholds == (-1.0, -1.0)
    assert calibrate(uncertainty, loss, bound + 1e-6).thresholds == (-1.0, 0.3)


def test_a_threshold_above_one_that_fails_is_not_tried():
    """The third of eight lists loses 0.4 and each one above it wins 0.3.

    Up to the third the bound is 0.05 + 1.415 · 0.1414 / √8 = 0.121, which fails; with all of them it would be −0.01.
    """
    uncertainty = np.arange(1.0, 9.0)[:, None] / 10
    loss = np.array([0.0, 0.0, 0.4, *[-0.3] * 5])[:, None]
    assert calibrate(uncertainty, loss, 0.12).thresholds == (0.2,)
    assert calibrate(uncertainty, loss, 0.122).thresholds == (0.8,)


shapes = st.tuples(st.integers(2, 40), st.integers(1, 4))


@given(st.data(), shapes, st.floats(0.0, 0.3))
def test_the_bound_is_kept_and_the_thresholds_say_who_leaves_where(data, shape: tuple[int, int], max_loss: float):
    uncertainty = data.draw(arrays(float, shape, elements=st.floats(0.0, 1.0)))
    loss = data.draw(arrays(float, shape, elements=st.floats(-1.0, 1.0)))
    found = calibrate(uncertainty, loss, max_loss)
    assert found.loss_bound <= max_loss
    exits = [exit_of(row, found.thresholds) for row in uncertainty]
    for number, share in enumerate(found.left):
        assert share == pytest.approx(exits.count(number) / shape[0])
    losses = [0.0 if e == shape[1] else loss[i, e] for i, e in enumerate(exits)]
    assert found.loss == pytest.approx(np.mean(losses))


def test_what_cannot_be_calibrated():
    for lists in (0, 1):
        with pytest.raises(ValueError, match=rf"{lists} list\(s\) to calibrate on"):
            calibrate(np.zeros((lists, 2)), np.zeros((lists, 2)), 0.1)
    with pytest.raises(ValueError, match=r"max_loss: -0.1"):
        calibrate(np.ones((2, 1)), np.ones((2, 1)), -0.1)
