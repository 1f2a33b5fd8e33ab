"""Sorting by comparisons that somebody else makes: which items to compare next, and the order that follows.

Items are 0, 1, …, N−1 in first-stage order. A sort is a generator: it yields the groups of items that it wants
compared, all of which can be decided at the same time, is sent for each the item that won, or None where the comparison
decided nothing, and returns a permutation of the items. Below the first k places the first stage's order stays.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
Group = tuple[int, ...]
Sort = Generator[list[Group], list[int | None], list[int]]
Best = Callable[[Group], Generator[list[Group], list[int | None], int]]


def one_set(group: Group) -> Generator[list[Group], list[int | None], int]:
    """The best of a group by one comparison of all of it; undecided, the one that the first stage ranked highest."""
    (winner,) = yield [group]
    return min(group) if winner is None else winner


def duels(group: Group) -> Generator[list[Group], list[int | None], int]:
    """The best of a group by comparisons of two; undecided ones go to the one that the first stage ranked higher."""
    best = group[0]
    for challenger in group[1:]:
        best = yield from one_set((best, challenger))
    return best


def heapsort(size: int, k: int, children: int, best: Best = one_set) -> Sort:
    """The first k of `size` items by a heap whose nodes have `children` children each, 2 or more.

    Subtrees that don't touch are built side by side. The last leaf takes the place of an item that leaves the heap, so
    an undecided comparison can't simply keep the parent: that would be the first stage's last. It goes to the item that
    the first stage ranked higher, and a heap in which nothing is decided gives back the first stage's order.
    """
    heap = list(range(size))

    def below(node: int, end: int) -> range:
        return range(node * children + 1, min((node + 1) * children + 1, end))

    def sift_down(node: int, end: int) -> Generator[list[Group], list[int | None], None]:
        while nodes := below(node, end):
            winner = yield from best((heap[node], *(heap[n] for n in nodes)))
            place = heap.index(winner, node)
            if place == node:
                return
            heap[node], heap[place] = heap[place], heap[node]
            node = place

    def build(node: int) -> Generator[list[Group], list[int | None], None]:
        yield from together([build(child) for child in below(node, size)])
        yield from sift_down(node, size)

    yield from build(0)
    top: list[int] = []
    for end in range(size - 1, max(size - k, 0) - 1, -1):
        top.append(heap[0])
        heap[0] = heap[end]
        if len(top) < k:
            yield from sift_down(0, end)
    return _with_rest(top, size)


def bubblesort(size: int, passes: int, children: int = 1) -> Sort:
    """The first `passes` of `size` items: each pass carries the best of what is left from the bottom to its place.

    A comparison holds an item and the `children` below it; the winner moves to their front, the others keep their
    order, and an undecided one moves nothing. A pass follows the one before it two windows behind, which changes no
    comparison and gives rounds of up to `passes` of them.
    """
    order = list(range(size))

    def carry(place: int) -> Generator[list[Group], list[int | None], None]:
        for _ in range(2 * place):
            yield []
        last = size - 1
        while last > place:
            first = max(last - children, place)
            (winner,) = yield [tuple(order[first : last + 1])]
            if winner is not None:
                order.insert(first, order.pop(order.index(winner)))
            last = first

    yield from together([carry(place) for place in range(min(passes, size - 1))])
    return _with_rest(order[:passes], size)


def _with_rest(top: list[int], size: int) -> list[int]:
    settled = set(top)
    return top + [i for i in range(size) if i not in settled]


def together(steps: Sequence[Generator[list, list, T]]) -> Generator[list, list, list[T]]:
    """Run generators side by side: each round asks what all unfinished ones wait for. Returns what each returned."""
    returned: list[Any] = [None] * len(steps)
    waiting: dict[int, list] = {}

    def advance(index: int, answers: list | None) -> None:
        try:
            waiting[index] = steps[index].send(answers)
        except StopIteration as stop:
            waiting.pop(index, None)
            returned[index] = stop.value

    for index in range(len(steps)):
        advance(index, None)
    while waiting:
        asked = list(waiting.items())
        answers = yield [group for _, groups in asked for group in groups]
        start = 0
        for index, groups in asked:
            advance(index, answers[start : start + len(groups)])
            start += len(groups)
    return returned


def run_sort(
    sort: Sort,
    compare: Callable[[list[Group]], Generator[list, list, list[int | None]]],
    key: Callable[[Group], Hashable] = tuple,
) -> Generator[list, list, list[int]]:
    """Run a sort on the comparisons that the generator `compare` makes; groups of one `key` are compared once.

    That is also what ends a sort early: once the first places are settled, a further pass asks nothing new.
    """
    winners: dict[Hashable, int | None] = {}
    answers = None
    while True:
        try:
            groups = sort.send(answers)
        except StopIteration as stop:
            return stop.value
        new = list({key(group): group for group in groups if key(group) not in winners}.values())
        if new:
            winners.update(zip(map(key, new), (yield from compare(new)), strict=True))
        answers = [winners[key(group)] for group in groups]
