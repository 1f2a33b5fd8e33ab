"""Sorts against plain loops, and their bounds: what they ask, in how many rounds, and the order that follows."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
from fixtures.oracles import top_k
from hypothesis import given
from hypothesis import strategies as st

from rerank_ray.ranking.orders import scores_of_order
from rerank_ray.ranking.sorting import Group, Sort, bubblesort, duels, heapsort, run_sort, together

Judge = Callable[[Group], int | None]


def finish(sort: Sort, judge: Judge) -> tuple[list[int], list[list[Group]]]:
    """A sort's order under a judge, and the groups of each round."""
    rounds: list[list[Group]] = []
    answers = None
    while True:
        try:
            groups = sort.send(answers)
        except StopIteration as stop:
            return stop.value, [r for r in rounds if r]
        rounds.append(groups)
        answers = [judge(group) for group in groups]


def by_gain(gains: list[float]) -> Judge:
    """The item of the highest gain; of equal ones the first stage's first."""
    return lambda group: min(group, key=lambda i: (-gains[i], i))


def whimsical(seed: int) -> Judge:
    """Decides each group by its own dice, or not at all: no order is behind it, but the same group is decided alike."""

    def judge(group: Group) -> int | None:
        dice = random.Random(f"{seed}:{group}")
        return None if dice.random() < 0.2 else dice.choice(group)

    return judge


SORTS = {
    "heap of sets": lambda size, k, c: heapsort(size, k, max(c, 2)),
    "heap of duels": lambda size, k, c: heapsort(size, k, max(c, 2), duels),
    "bubbles": bubblesort,
}
sorts = st.sampled_from(sorted(SORTS))
sizes, ks, arities = st.integers(0, 40), st.integers(1, 45), st.integers(1, 8)


@given(sorts, st.lists(st.integers(0, 9), max_size=40), ks, arities)
def test_a_judge_who_knows_the_gains_gets_the_top_k(name: str, gains: list[float], k: int, children: int):
    """In order, and below them the first stage's order; equal gains too keep it."""
    order, _ = finish(SORTS[name](len(gains), k, children), by_gain(gains))
    assert order == top_k(gains, k)


@given(sorts, sizes, ks, arities)
def test_nothing_decided_is_the_first_stages_order(name: str, size: int, k: int, children: int):
    """Although a heap puts its last leaf on top each time."""
    order, _ = finish(SORTS[name](size, k, children), lambda group: None)
    assert order == list(range(size))


@given(sorts, sizes, ks, arities, st.integers(0, 99))
def test_any_answers_give_a_permutation_and_rounds_of_separate_groups(
    name: str, size: int, k: int, children: int, seed: int
):
    order, rounds = finish(SORTS[name](size, k, children), whimsical(seed))
    assert sorted(order) == list(range(size))
    assert order[k:] == sorted(order[k:])
    for groups in rounds:
        items = [item for group in groups for item in group]
        assert len(items) == len(set(items))
        assert all(2 <= len(group) <= max(children, 2) + 1 for group in groups)


def plain_bubblesort(size: int, passes: int, children: int, judge: Judge) -> tuple[list[int], int]:
    """Pass after pass, window after window; and how many windows."""
    order, asked = list(range(size)), 0
    for place in range(min(passes, size)):
        last = size - 1
        while last > place:
            first = max(last - children, place)
            window = order[first : last + 1]
            winner, asked = judge(tuple(window)), asked + 1
            if winner is not None:
                order[first : last + 1] = [winner, *(i for i in window if i != winner)]
            last = first
    return order[:passes] + sorted(order[passes:]), asked


@given(sizes, ks, arities, st.integers(0, 99))
def test_passes_that_follow_each_other_closely_are_passes_one_by_one(size: int, k: int, children: int, seed: int):
    """Same comparisons, same order, whatever the judge says; ⌈(N−1−p)/c⌉ of them in pass p."""
    order, rounds = finish(bubblesort(size, k, children), whimsical(seed))
    plain, asked = plain_bubblesort(size, k, children, whimsical(seed))
    assert order == plain
    counted = sum(len(groups) for groups in rounds)
    assert counted == asked == sum(math.ceil((size - 1 - p) / children) for p in range(min(k, max(size - 1, 0))))


def test_passes_overlap():
    """100 items, 10 passes by twos: 945 comparisons in 99 + 9 rounds, as pass p ends p windows earlier but starts 2p
    rounds later."""
    _, rounds = finish(bubblesort(100, 10), by_gain(list(range(100))))
    assert (sum(map(len, rounds)), len(rounds)) == (sum(99 - p for p in range(10)), 99 + 9)
    assert max(map(len, rounds)) == 10


def plain_heapsort(size: int, k: int, children: int, judge: Judge) -> tuple[list[int], int]:
    """The textbook's: sift down from the last parent to the root, then move the last leaf to the root k − 1 times."""
    heap, asked, top = list(range(size)), 0, []

    def sift(node: int, end: int) -> int:
        count = 0
        while node * children + 1 < end:
            nodes = [node, *range(node * children + 1, min(node * children + children + 1, end))]
            group = tuple(heap[n] for n in nodes)
            winner = judge(group)
            count += 1
            place = nodes[group.index(min(group) if winner is None else winner)]
            if place == node:
                break
            heap[node], heap[place], node = heap[place], heap[node], place
        return count

    for node in reversed(range(size)):
        asked += sift(node, size)
    while heap and len(top) < k:
        top.append(heap[0])
        last = heap.pop()
        if heap:
            heap[0] = last
        asked += sift(0, len(heap)) if len(top) < k else 0
    return top + [i for i in range(size) if i not in top], asked


@given(sizes, ks, st.integers(2, 8), st.integers(0, 99))
def test_a_heap_built_side_by_side_is_a_heap_built_node_by_node(size: int, k: int, children: int, seed: int):
    order, rounds = finish(heapsort(size, k, children), whimsical(seed))
    assert (order, sum(map(len, rounds))) == plain_heapsort(size, k, children, whimsical(seed))


def heap_bound(size: int, k: int, children: int) -> int:
    """Steps down at most: each node's height to build, and the root's for each item that leaves but the last."""

    def height(node: int) -> int:
        first = node * children + 1
        return 1 + height(first) if first < size else 0

    return sum(map(height, range(size))) + (min(k, size) - 1) * height(0) if size else 0


@given(st.lists(st.integers(0, 99), max_size=60), ks, st.integers(2, 8))
def test_a_heap_asks_at_most_its_heights(gains: list[float], k: int, children: int):
    """Sets: one comparison a step; duels: as many as there are children."""
    _, rounds = finish(heapsort(len(gains), k, children), by_gain(gains))
    assert sum(map(len, rounds)) <= heap_bound(len(gains), k, children)
    _, rounds = finish(heapsort(len(gains), k, children, duels), by_gain(gains))
    assert sum(map(len, rounds)) <= children * heap_bound(len(gains), k, children)


def test_heap_bounds_by_hand():
    """Seven items in a binary heap have heights 2, 1, 1, 0…: 4 steps to build it and 2 for each that leaves."""
    assert [heap_bound(7, k, 2) for k in (1, 2, 7, 9)] == [4, 6, 16, 16]
    _, rounds = finish(heapsort(7, 1, 2), by_gain([0, 1, 2, 3, 4, 5, 6]))
    assert [len(groups) for groups in rounds] == [2, 1, 1]


def test_subtrees_are_built_together():
    """127 items, 63 nodes with children on six levels: 6 rounds build a heap that is one already."""
    _, rounds = finish(heapsort(127, 1, 2), by_gain([-i for i in range(127)]))
    assert [len(groups) for groups in rounds] == [32, 16, 8, 4, 2, 1]


def finish_asking(sort: Sort, judge: Judge, key=tuple) -> tuple[list[int], list[Group]]:
    """As `finish`, through `run_sort`."""
    asked: list[Group] = []

    def compare(groups: list[Group]):
        asked.extend(groups)
        return (yield groups)

    order, _ = finish(run_sort(sort, compare, key), judge)
    return order, asked


@given(sorts, sizes, ks, arities, st.integers(0, 99))
def test_what_was_asked_is_remembered(name: str, size: int, k: int, children: int, seed: int):
    order, asked = finish_asking(SORTS[name](size, k, children), whimsical(seed))
    assert order == finish(SORTS[name](size, k, children), whimsical(seed))[0]
    assert len(asked) == len(set(asked))


def test_settled_passes_ask_nothing():
    """A list in order costs one pass, however many are wanted; with one swap at the top a second one asks what is new:
    0 against 2."""
    order, asked = finish_asking(bubblesort(20, 10), by_gain([-i for i in range(20)]))
    assert (order, len(asked)) == (list(range(20)), 19)
    order, asked = finish_asking(bubblesort(20, 10), by_gain([-1, 0, *range(-2, -20, -1)]))
    assert (order, len(asked)) == ([1, 0, *range(2, 20)], 20)


def test_a_pair_has_one_key_in_both_orders():
    """Items 0, 1, 2 where 2 > 0 > 1: the first pass asks (1, 2), (0, 2), and the second (0, 1)."""
    _, asked = finish_asking(bubblesort(3, 2), by_gain([1, 0, 2]), key=frozenset)
    assert asked == [(1, 2), (0, 2), (0, 1)]
    beats = {frozenset({0, 1}): 1, frozenset({1, 2}): 2, frozenset({0, 2}): 0}
    circle: Judge = lambda group: beats[frozenset(group)]  # noqa: E731
    _, asked = finish_asking(bubblesort(3, 2), circle, key=frozenset)
    assert asked == [(1, 2), (0, 2)]


def test_together_returns_what_each_returned():
    def count(upto: int):
        total = 0
        for n in range(upto):
            total += sum((yield [n] * n))
        return total

    steps = together([count(n) for n in (0, 3, 2)])
    assert steps.send(None) == []
    assert steps.send([]) == [1, 1]
    assert steps.send([10, 20]) == [2, 2]
    with pytest.raises(StopIteration) as stop:
        steps.send([1, 2])
    assert stop.value.value == [0, 13, 20]


def test_scores_of_an_order():
    assert scores_of_order([2, 0, 1]) == (2.0, 1.0, 3.0)
    assert scores_of_order([]) == ()
