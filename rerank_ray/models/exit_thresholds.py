"""When a layer-wise student has seen enough of a list: thresholds on uncertainty, calibrated for a stated loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

_CONFIDENCE = 1.2816
"""Deviations of a normal mean that hold on one side with 90 %."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitCalibration:
    """Thresholds, and what they did to the lists that they were found on."""

    thresholds: tuple[float, ...]
    """One for each layer with a head but the last: a list whose uncertainty there is at most this leaves; −1 keeps all
    lists."""
    loss: float
    """Mean loss of the metric."""
    loss_bound: float
    """What the mean loss lies below with 90 % confidence, as far as these lists are like others."""
    left: tuple[float, ...]
    """Share of the lists that leave at each layer with a head, the last included."""


def calibrate(uncertainty: np.ndarray, loss: np.ndarray, max_loss: float) -> ExitCalibration:
    """The highest thresholds for which the mean loss stays below `max_loss` with 90 % confidence.

    Exits are settled from the first on. Each may use an equal share of the loss, and what those before it left over.

    Args:
        uncertainty: [lists, early exits], of a list's scores at each exit.
        loss: [lists, early exits], of the metric if the list leaves there, against the last layer; negative for a gain.

    Raises:
        ValueError: fewer than two lists, or a loss below 0 is promised.
    """
    lists, exits = uncertainty.shape
    if lists < 2:
        raise ValueError(f"{lists} list(s) to calibrate on: what holds of others can be told from two at least")
    if max_loss < 0:
        raise ValueError(f"max_loss: {max_loss}: the loss to stay below is 0 or more")
    taken = np.zeros(lists)
    inside = np.ones(lists, dtype=bool)
    thresholds, left = [], []
    for exit_number in range(exits):
        budget = max_loss * (exit_number + 1) / exits
        values = uncertainty[:, exit_number]
        threshold = -1.0
        for candidate in np.unique(values[inside])[::-1]:
            leaving = inside & (values <= candidate)
            if _bound(np.where(leaving, loss[:, exit_number], taken)) <= budget:
                threshold = float(candidate)
                break
        leaving = inside & (values <= threshold)
        taken = np.where(leaving, loss[:, exit_number], taken)
        inside &= ~leaving
        thresholds.append(threshold)
        left.append(float(leaving.mean()))
    return ExitCalibration(
        thresholds=tuple(thresholds),
        loss=float(taken.mean()),
        loss_bound=_bound(taken),
        left=(*left, float(inside.mean())),
    )


def _bound(losses: np.ndarray) -> float:
    return float(losses.mean() + _CONFIDENCE * losses.std(ddof=1) / math.sqrt(len(losses)))
