"""Rewards by hand, and for any text at all."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from rerank_ray.distill.rewards import (
    choice_reward,
    grades_reward,
    integer_rewards,
    js_divergence,
    ndcg,
    overlap,
    permutation_reward,
    relevance_reward,
)

NAMES = ("1", "2", "3")
TEXTS = st.text(alphabet=st.sampled_from(list('<>/[]{}":, 0123think answer\n')), max_size=80)


@pytest.mark.parametrize(
    ("text", "relevant", "value"),
    [
        ("1", True, 2.0),
        (" 0\n", False, 2.0),
        ("0", True, 1.0),
        ("1", False, 1.0),
        ("1 because it does", True, 0.0),
        ("10", True, 0.0),
        ("", True, 0.0),
    ],
)
def test_prorank_pays_for_the_form_and_again_for_the_answer(text: str, relevant: bool, value: float):
    reward = relevance_reward(text, ("1", "0"), relevant)
    assert (reward.value, reward.well_formed) == (value, value > 0)


def test_a_turn_that_did_not_end_is_not_well_formed():
    """Even if what there is of it would be right."""
    gains = [0.0, 1.0, 0.0]
    rewards = [
        choice_reward("<answer>[2]</answer>", NAMES, {1}, reasoning=False, cut_off=True),
        permutation_reward("[2] > [1] > [3]", NAMES, gains, [1, 0, 2], reasoning=False, cut_off=True),
        grades_reward('{"1": 0, "2": 9, "3": 1}', NAMES, gains, cut_off=True),
    ]
    assert [(r.value, r.well_formed) for r in rewards] == [(0, False), (-1, False), (-0.5, False)]


@pytest.mark.parametrize(
    ("text", "value", "well_formed"),
    [
        ("<think>The second one.</think>\n<answer>[2]</answer>", 1.0, True),
        ("<think></think><answer> [2] </answer>\n", 1.0, True),
        ("<think>…</think><answer>[3]</answer>", 0.0, True),
        ("<answer>[2]</answer>", 0.0, False),
        ("<think>…</think><answer>2</answer>", 0.0, False),
        ("<think>…</think><answer>[4]</answer>", 0.0, False),
        ("<think>…</think><answer>[2]", 0.0, False),
        ("<think>…</think><answer>[2]</answer> I hope this helps", 0.0, False),
        ("<think>…<think>…</think><answer>[2]</answer>", 0.0, False),
        ("So: <think>…</think><answer>[2]</answer>", 0.0, False),
    ],
)
def test_rank_r1_pays_for_form_and_passage_together(text: str, value: float, well_formed: bool):
    reward = choice_reward(text, NAMES, {1})
    assert (reward.value, reward.well_formed) == (value, well_formed)


def test_rank_r1_without_reasoning():
    """Then reasoning is what breaks the form; any of several equally relevant passages is right."""
    assert choice_reward("<answer>[3]</answer>", NAMES, {1, 2}, reasoning=False).value == 1
    assert not choice_reward("<think>a</think><answer>[3]</answer>", NAMES, {1, 2}, reasoning=False).well_formed


def test_reason_rank_by_hand():
    """Gains 0, 1, 1; the answer 1, 3, 2 puts them at ranks 2 and 3. nDCG = (1/log2 3 + 1/log2 4) / (1 + 1/log2 3);
    recall is 1; with the teacher's 2, 3, 1 the first d share 0, 1 and 3 passages: overlap = (0 + 1/2 + 1) / 3."""
    reward = permutation_reward(
        "<think>hm</think>\n<answer>[1] > [3] > [2]</answer>", NAMES, [0.0, 1.0, 1.0], [1, 2, 0]
    )
    expected = (1 / math.log2(3) + 0.5) / (1 + 1 / math.log2(3)) + 0.2 + 0.1 * 0.5
    assert reward.well_formed
    assert reward.value == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think>hm</think><answer>[1] > [2]</answer>", 0.0),
        ("<think>hm</think><answer>[1] > [2] > [2] > [3]</answer>", 0.0),
        ("<think>hm</think><answer>none</answer>", 0.0),
        ("<think>hm</think><answer>2, 3, 1</answer>", 0.0),
        ("<think>hm</think><answer>The order is [2] > [3] > [1].</answer>", 0.0),
        ("<think>hm</think><answer></answer>", -1.0),
        ("[1] > [2] > [3]", -1.0),
        ("<think>hm", -1.0),
    ],
)
def test_reason_rank_tells_a_bad_answer_from_a_bad_form(text: str, value: float):
    reward = permutation_reward(text, NAMES, [0.0, 1.0, 1.0], [1, 2, 0])
    assert (reward.value, reward.well_formed) == (value, False)


def test_reason_rank_without_reasoning_pays_for_a_permutation_alone():
    """Rankers read more than that, but it is the form that is learnt. A chat template may have begun a think block."""
    for text in ("[2]>[3] > [1]\n", "<think>\n\n</think>\n\n[2] > [3] > [1]"):
        assert permutation_reward(text, NAMES, [0.0, 1.0, 1.0], [1, 2, 0], reasoning=False).value == pytest.approx(1.3)
    for text, value in (("Sure! [2] > [3] > [1]", 0.0), ("2\n3\n1", 0.0), ("<think>[2] > [3] > [1]", -1.0)):
        reward = permutation_reward(text, NAMES, [0.0, 1.0, 1.0], [1, 2, 0], reasoning=False)
        assert (reward.value, reward.well_formed) == (value, False)


def test_recall_counts_the_first_ten():
    """Of twelve passages the two relevant ones come first and last: half of them are found."""
    names = tuple(str(n) for n in range(1, 13))
    gains = [1.0, *[0.0] * 10, 1.0]
    order = list(range(12))
    text = " > ".join(f"[{n}]" for n in names)
    reward = permutation_reward(text, names, gains, order, reasoning=False)
    assert reward.value == pytest.approx(1 / (1 + 1 / math.log2(3)) + 0.2 * 0.5 + 0.1)


def test_group_rank_by_hand():
    """Grades 0, 9, 1 put the one relevant passage first: nDCG and recall are 1. As distributions (0, .9, .1) and
    (0, 1, 0); the divergence is scipy's distance squared."""
    reward = grades_reward('<think>hm</think>{"1": 0, "2": 9, "3": 1}', NAMES, [0.0, 2.0, 0.0])
    divergence = jensenshannon([0, 0.9, 0.1], [0, 1, 0], base=2) ** 2
    assert reward.well_formed
    assert reward.value == pytest.approx(1.2 + 0.1 * (1 - divergence))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"1": 0, "2": 9}', -0.1),
        ('{"1": 0, "2": 9, "3": 11}', -0.1),
        ("the second", -0.1),
        ("[1]: 0\n[2]: 9\n[3]: 1", -0.1),
        ("{1: 0, 2: 9, 3: 1}", -0.1),
        ('{"1": 0, "2": 9, "3": 1} {"4": ' + "[" * 100_000 + "}", -0.1),
        ("<think>hm", -0.5),
    ],
)
def test_group_rank_tells_bad_grades_from_no_answer(text: str, value: float):
    reward = grades_reward(text, NAMES, [0.0, 2.0, 0.0])
    assert (reward.value, reward.well_formed) == (value, False)


def test_erank_by_hand():
    """Ranked together: 9 (a), 7 (b), 7 (a), 5 (b), 2 (c), 1 (c). The relevant passage a has ranks 1 and 2; b's 7 is not
    above a's lowest, 7; b's reference is 4: its integers cost 9 and 1. c's reference is 2."""
    rewards = integer_rewards([[9, 7], [7, 5], [2, 1]], [True, False, False], [8.0, 4.0, 2.0], penalty=100.0)
    assert rewards == [[1.0, 0.5], [-9.0, -1.0], [0.0, -1.0]]


def test_erank_punishes_what_is_above_a_relevant_passage():
    """8 is above the relevant passage's 3 although below its 9; what can't be read costs the same."""
    rewards = integer_rewards([[9, 3, None], [8, 3, None]], [True, False], [8.0, 3.0], penalty=50.0)
    assert rewards == [[1.0, 1 / 3, -50.0], [-50.0, 0.0, -50.0]]


def test_erank_without_a_readable_relevant_passage():
    assert integer_rewards([[None], [8]], [True, False], [8.0, 6.0], penalty=50.0) == [[-50.0], [-4.0]]


@given(st.lists(st.floats(0, 10), min_size=2, max_size=6), st.lists(st.floats(0, 10), min_size=2, max_size=6))
def test_js_divergence_is_scipys(a: list[float], b: list[float]):
    a, b = a[: min(len(a), len(b))], b[: min(len(a), len(b))]
    if sum(a) > 1e-3 and sum(b) > 1e-3:
        assert js_divergence(a, b) == pytest.approx(jensenshannon(a, b, base=2) ** 2, abs=1e-6)


@given(st.permutations(range(6)), st.permutations(range(6)))
def test_overlap_is_symmetric_and_1_for_the_same_order(a: list[int], b: list[int]):
    assert overlap(a, b) == overlap(b, a)
    assert (overlap(a, b) == 1) == (a == b)


@given(st.permutations(range(5)), st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=5, max_size=5))
def test_ndcg_is_highest_for_the_gains_own_order(order: list[int], gains: list[float]):
    best = sorted(range(5), key=lambda i: -gains[i])
    assert ndcg(order, gains) <= ndcg(best, gains) + 1e-12
    assert ndcg(best, gains) == pytest.approx(float(any(gains)))


@given(TEXTS, st.booleans(), st.booleans())
def test_any_text_has_a_reward_and_only_well_formed_ones_gain(text: str, reasoning: bool, cut_off: bool):
    gains = [0.0, 1.0, 0.0]
    rewards = [
        relevance_reward(text, ("1", "0"), True),
        choice_reward(text, NAMES, {1}, reasoning=reasoning, cut_off=cut_off),
        permutation_reward(text, NAMES, gains, [1, 0, 2], reasoning=reasoning, cut_off=cut_off),
        grades_reward(text, NAMES, gains, cut_off=cut_off),
    ]
    for reward in rewards:
        assert math.isfinite(reward.value)
        assert reward.well_formed or reward.value <= 0
