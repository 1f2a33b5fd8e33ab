"""When a layer-wise student has seen enough of a list: thresholds on uncertainty, calibrated for a stated loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

_RISK = 0.1
"""Chance that other lists like these lose more on average than was promised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitCalibration:
    """Thresholds, and what they did to the lists that they were found on."""

    thresholds: tuple[float, ...]
    """One for each layer with a head but the last: a list whose uncertainty there is at most this leaves; −1 keeps all
    lists."""
    loss: float
    """Mean loss of the metric."""
    loss_bound: float
    """What the mean loss of other lists lies below with 90 % confidence, as far as these are like them."""
    left: tuple[float, ...]
    """Share of the lists that leave at each layer with a head, the last included."""


def calibrate(uncertainty: np.ndarray, loss: np.ndarray, max_loss: float) -> ExitCalibration:
    """Thresholds for which the mean loss of lists like these stays below `max_loss` with 90 % confidence.

    Exits are settled from the first on. Each may use an equal share of the loss, and what those before it left over,
    and is wrong with an equal share of the 10 %. Its threshold rises from the lowest uncertainty on until the bound
    fails once: the highest of many that happen to pass would be wrong more often (fixed-sequence testing; Angelopoulos
    et al. 2021, "Learn then Test").

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
    # Of a mean, by Student's t.
    deviations = float(stdtrit(lists - 1, 1 - _RISK / exits))
    taken = np.zeros(lists)
    inside = np.ones(lists, dtype=bool)
    thresholds, left = [], []
    for exit_number in range(exits):
        budget = max_loss * (exit_number + 1) / exits
        values = uncertainty[:, exit_number]
        threshold = -1.0
        for candidate in np.unique(values[inside]):
            leaving = inside & (values <= candidate)
            if _bound(np.where(leaving, loss[:, exit_number], taken), deviations) > budget:
                break
            threshold = float(candidate)
        leaving = inside & (values <= threshold)
        taken = np.where(leaving, loss[:, exit_number], taken)
        inside &= ~leaving
        thresholds.append(threshold)
        left.append(float(leaving.mean()))
    return ExitCalibration(
        thresholds=tuple(thresholds),
        loss=float(taken.mean()),
        loss_bound=_bound(taken, deviations),
        left=(*left, float(inside.mean())),
    )


def _bound(losses: np.ndarray, deviations: float) -> float:
    return float(losses.mean() + deviations * losses.std(ddof=1) / math.sqrt(len(losses)))
