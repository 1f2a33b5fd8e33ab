"""When a layer-wise student has seen enough of a candidate: margins below a list's tenth score, calibrated for a stated
loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

EXIT_DEPTH = 10
"""Candidates of a list whose order counts, and who therefore go on to the last layer."""
_RISK = 0.1
"""Chance that other lists like these lose more on average than was promised."""
_TRIED = 100
"""Margins of an exit that are tried at most."""

Stage = tuple[np.ndarray, np.ndarray]
"""Places in their list, ascending, of the candidates that an exit has scored, and the scores."""


def goes_on(scores: np.ndarray, margin: float) -> np.ndarray:
    """Mask [n] of the candidates whose score is at most `margin` below the tenth highest of all n; NaN is below all."""
    if len(scores) <= EXIT_DEPTH:
        return np.ones(len(scores), dtype=bool)
    # NaN would be sorted above all.
    sortable = np.where(np.isnan(scores), -np.inf, scores)
    return scores >= np.partition(sortable, -EXIT_DEPTH)[-EXIT_DEPTH] - margin


def merged(stages: Sequence[Stage]) -> np.ndarray:
    """One score [n] for every candidate of a list: the last layer's of those that reached it, and below them those that
    left, the ones that left first at the end.

    Those who left keep their distances at their exit from each other and from the lowest that went on. One that went on
    and got no finite score is nobody's lowest; where no other went on, those who left have nothing to stand below, and
    get NaN.
    """
    went_on, values = stages[-1]
    final = np.empty(len(stages[0][0]))
    final[went_on] = values
    for places, values in reversed(stages[:-1]):
        left = ~np.isin(places, went_on)
        scored = np.isfinite(final[went_on])
        if scored.any():
            floor, cut = final[went_on][scored].min(), values[~left][scored].min()
            final[places[left]] = np.minimum(floor - (cut - values[left]), np.nextafter(floor, -np.inf))
        else:
            final[places[left]] = np.nan
        went_on = places
    return final


def settle(scores: np.ndarray, margins: Sequence[float | None]) -> tuple[np.ndarray, list[int]]:
    """A list's merged scores [n], and how many candidates reach each exit, from its scores [exits, n] at all of them.

    Args:
        margins: of each exit but the last; None skips it.
    """
    inside = np.arange(scores.shape[1])
    stages: list[Stage] = []
    reached = []
    for values, margin in zip(scores[:-1], margins, strict=True):
        reached.append(len(inside))
        if margin is not None:
            stages.append((inside, values[inside]))
            inside = inside[goes_on(values[inside], margin)]
    return merged([*stages, (inside, scores[-1][inside])]), [*reached, len(inside)]


def segments_of(
    layers: Sequence[int], branch_layers: int, margins: Sequence[float | None]
) -> list[tuple[int, int, int]]:
    """What is computed between the exits that are tried: (after which layer it begins, the last one that those above
    share, its own last)."""
    *early, last = layers
    tried = [layer for layer, margin in zip(early, margins, strict=True) if margin is not None]
    shared = [layer - branch_layers for layer in tried]
    return list(zip((0, *shared), (*shared, last), (*tried, last), strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitCalibration:
    """Margins, and what they did to the lists that they were found on."""

    margins: tuple[float | None, ...]
    """One for each layer with a head but the last: a candidate that lies further below its list's tenth score there
    leaves; None where an exit would cost more than it saves, or lose more than it may."""
    loss: float
    """Mean loss of the metric."""
    loss_bound: float
    """What the mean loss of other lists lies below with some 90 % confidence, by Student's t, as far as these are like
    them; with less where few lists lose much, of which a sample may hold none."""
    losing: float
    """Share of the lists that lose anything: the fewer they are, the less the bound says."""
    left: tuple[float, ...]
    """Share of the candidates that leave at each layer with a head, the last included."""
    layers_computed: float
    """Mean number of layers that are computed of a candidate, branches included."""


def calibrate(
    scores: Sequence[np.ndarray],
    loss: Callable[[int, np.ndarray], float],
    max_loss: float,
    layers: Sequence[int],
    branch_layers: int = 0,
) -> ExitCalibration:
    """Margins for which the mean loss of lists like these stays below `max_loss` with some 90 % confidence.

    Candidate pruning with certified error (Li et al. 2022). Exits are settled from the first on. Each may use an equal
    share of the loss, and what those before it left over, and is wrong with an equal share of the 10 %. Its margin
    falls from the widest on, at which nobody leaves, until the bound fails once: the narrowest of many that happen to
    pass would be wrong more often (fixed-sequence testing; Angelopoulos et al. 2021, "Learn then Test"). An exit is
    taken if it saves layers; if some are not, the others are settled anew with their shares of the loss.

    Args:
        scores: of each list, [exits, candidates], the last layer's included.
        loss: of a list's number and merged scores [candidates], what it loses against the last layer; negative for a
            gain.
        layers, branch_layers: the student's.

    Raises:
        ValueError: fewer than two lists, or a loss below 0 is promised.
    """
    if len(scores) < 2:
        raise ValueError(f"{len(scores)} list(s) to calibrate on: what holds of others can be told from two at least")
    if max_loss < 0:
        raise ValueError(f"max_loss: {max_loss}: the loss to stay below is 0 or more")
    exits = len(layers) - 1
    # Of a mean, by Student's t, which takes losses for normal. They are not: 3 % of lists that lose 0.7 each are
    # in none of 40 % of samples of 30. A bound without it can't promise 0.02 from fewer than some hundred lists.
    deviations = float(stdtrit(len(scores) - 1, 1 - _RISK / exits))

    def outcome(margins: Sequence[float | None]) -> ExitCalibration:
        settled = [settle(of_list, margins) for of_list in scores]
        losses = np.array([loss(number, final) for number, (final, _) in enumerate(settled)])
        reached = np.array([counts for _, counts in settled]).sum(0) / sum(of_list.shape[1] for of_list in scores)
        tried = [share for share, margin in zip(reached, (*margins, 0.0), strict=True) if margin is not None]
        spans = segments_of(layers, branch_layers, margins)
        return ExitCalibration(
            margins=tuple(margins),
            loss=float(losses.mean()),
            losing=float((losses > 0).mean()),
            loss_bound=float(losses.mean() + deviations * losses.std(ddof=1) / math.sqrt(len(losses))),
            left=(*(reached[:-1] - reached[1:]).tolist(), float(reached[-1])),
            layers_computed=sum(share * (end - begin) for share, (begin, _, end) in zip(tried, spans, strict=True)),
        )

    def settled(taken: Sequence[int]) -> ExitCalibration:
        found = outcome([None] * exits)
        for number, exit_number in enumerate(taken, start=1):
            narrowest = found
            for margin in _margins([of_list[exit_number] for of_list in scores]):
                tried = outcome([*found.margins[:exit_number], margin, *found.margins[exit_number + 1 :]])
                if tried.loss_bound > max_loss * number / len(taken):
                    break
                narrowest = tried
            if narrowest.layers_computed < found.layers_computed:
                found = narrowest
        return found

    taken = list(range(exits))
    while True:
        found = settled(taken)
        saving = [number for number in taken if found.margins[number] is not None]
        if saving == taken:
            return found
        taken = saving


def _margins(scores: Sequence[np.ndarray]) -> list[float]:
    """Margins to try at an exit, from the widest to 0: what candidates lie below their list's tenth score."""
    tenths = [np.partition(s, -EXIT_DEPTH)[-EXIT_DEPTH] if len(s) > EXIT_DEPTH else s.min() for s in scores]
    below = np.concatenate([tenth - s[s < tenth] for s, tenth in zip(scores, tenths, strict=True)])
    if not len(below):
        return [0.0]
    return [*np.unique(np.quantile(below, np.linspace(0, 1, _TRIED), method="higher"))[::-1].tolist(), 0.0]
