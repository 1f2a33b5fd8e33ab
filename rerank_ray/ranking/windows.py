"""Sliding windows over a list (RankGPT, Sun et al. 2023): the one place that does their arithmetic."""

from __future__ import annotations


def windows(count: int, size: int, step: int) -> list[range]:
    """Windows over positions 0 … count−1, from the back to the front, each `step` before the last one.

    The last window always starts at 0: where a whole step would pass the head of the list, it is clamped to it. A list
    shorter than a window is one window, so there are 1 + ⌈(count − size) / step⌉ of them, and none for an empty list.

    Args:
        size: positions in a window, at least 2.
        step: from 1 to size − 1; neighbours overlap by size − step, the most that one pass can bring to the front.
    """
    if count == 0:
        return []
    starts = [*range(count - size, 0, -step), 0]
    return [range(start, min(start + size, count)) for start in starts]
