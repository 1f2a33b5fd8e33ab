"""Parsers of model texts: nothing makes them fail, and nothing that is no answer becomes one."""

from __future__ import annotations

import json
import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rerank_ray.prompts.parse import (
    parse_label,
    parse_permutation,
    parse_score,
    parse_score_rows,
    parse_scores,
    split_reasoning,
)
from rerank_ray.records import DefectKind

NUMBERS = [str(i) for i in range(1, 21)]
LETTERS = list("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
# Text made of what the patterns look for, so that they match by accident, and any characters at all.
pieces = st.sampled_from(
    [
        "[",
        "]",
        " > ",
        "1",
        "2",
        "17",
        "99",
        "0",
        "A",
        "b",
        ",",
        ";",
        ":",
        "\n",
        " ",
        '{"',
        '": ',
        "}",
        "{",
        "8.5",
        "7/10",
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "I can't rank",
        "passage ",
        "score",
        "**",
        "İ",
        "٣",
        "²",
        "1" * 5000,
    ]
)
texts = st.text(max_size=60) | st.lists(pieces, max_size=25).map("".join)
identifier_lists = st.sampled_from([NUMBERS[:n] for n in (1, 2, 5, 20)] + [LETTERS[:n] for n in (1, 2, 5, 26)])


def kinds(parsed) -> list[str]:
    return [str(d.kind) for d in parsed.defects]


def ranked(text: str, identifiers: list[str] = NUMBERS[:3], **options) -> tuple[tuple[int, ...] | None, list[str]]:
    parsed = parse_permutation(text, identifiers, **options)
    return parsed.order, kinds(parsed)


# Permutations


@given(text=texts, identifiers=identifier_lists, cut_off=st.booleans())
def test_any_text_gives_a_permutation_or_none(text: str, identifiers: list[str], cut_off: bool):
    parsed = parse_permutation(text, identifiers, cut_off=cut_off)
    if parsed.order is None:
        assert set(parsed.defects)
        assert parsed.named == 0
    else:
        assert sorted(parsed.order) == list(range(len(identifiers)))
        assert 1 <= parsed.named <= len(identifiers)
        missing = parsed.order[parsed.named :]
        assert list(missing) == sorted(missing)
        assert (DefectKind.MISSING in {d.kind for d in parsed.defects}) == bool(missing)
    assert (DefectKind.CUT_OFF in {d.kind for d in parsed.defects}) == cut_off


@given(data=st.data())
def test_defects_exactly_when_repaired(data: st.DataObject):
    """A chain with items left out, repeated and made up: the expected order and defects by the definition."""
    size = data.draw(st.integers(2, 20))
    named = data.draw(st.lists(st.integers(1, size + 3), min_size=1, max_size=25))
    text = " > ".join(f"[{n}]" for n in named)
    parsed = parse_permutation(text, NUMBERS[:size])
    seen = list(dict.fromkeys(n - 1 for n in named if n <= size))
    if not seen:
        assert (parsed.order, kinds(parsed)) == (None, ["out_of_range"])
        return
    rest = [i for i in range(size) if i not in seen]
    assert parsed.order == (*seen, *rest)
    inside = [n for n in named if n <= size]
    expected = {"out_of_range": len(inside) < len(named), "repeated": len(seen) < len(inside), "missing": bool(rest)}
    assert kinds(parsed) == [kind for kind, present in expected.items() if present]


@pytest.mark.parametrize(
    "text",
    [
        "[2] > [3] > [1]",
        "[2]>[3]>[1]",
        "[2] >\n[3] >\n[1]",
        "2 > 3 > 1",
        "2, 3, 1",
        "3\n".join(["2\n", "1"]),
        "[2, 3, 1]",
        "The ranking is [2,3,1].",
        "Ranking: 2, 3, 1",
        "[2] [3] [1]",
        "[02] > [03] > [01]",
        "**[2]** > **[3]** > **[1]**",
        "Passage 2 > Passage 3 > Passage 1",
        "[Passage 2] > [Passage 3] > [Passage 1]",
        "Sure! Here is the ranking:\n\n[2] > [3] > [1]\n\nPassage [1] is off topic.",
        "1. [2] names the year\n2. [3] names the place\n3. [1] is off topic",
        "<think>[1] > [2] > [3], or rather not</think>\n[2] > [3] > [1]",
        "<think>hm</think><answer>[2] > [3] > [1]</answer>",
        "<answer>[2] > [3] > [1]",
        "First guess: [1] > [2]. Final: [2] > [3] > [1]",
    ],
)
def test_forms_of_one_ranking(text: str):
    assert ranked(text) == ((1, 2, 0), [])


@pytest.mark.parametrize(
    "text", ["[B] > [C] > [A]", "B > C > A", "[b] > [c] > [a]", "B, C, A", "Passage B > Passage C > A"]
)
def test_letters(text: str):
    assert ranked(text, LETTERS[:3]) == ((1, 2, 0), [])


@pytest.mark.parametrize(
    ("text", "order", "defects"),
    [
        ("[2] > [2] > [1] > [3]", (1, 0, 2), ["repeated"]),
        ("[3] > [9] > [1] > [2]", (2, 0, 1), ["out_of_range"]),
        ("[3] > [0]", (2, 0, 1), ["out_of_range", "missing"]),
        ("[3]", (2, 0, 1), ["missing"]),
        ("3", (2, 0, 1), ["missing"]),
        ("[1] > [2] > [3]. Corrected: [2] > [3] > [1]", (1, 2, 0), ["repeated"]),
        (f"[2] > [{'9' * 5000}]", (1, 0, 2), ["out_of_range", "missing"]),
    ],
)
def test_repairs(text: str, order: tuple[int, ...], defects: list[str]):
    assert ranked(text) == (order, defects)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("<think>[1] > [2] > [3]</think>", "empty"),
        ("<think>[1] > [2] > [3], but", "empty"),
        ("I'm sorry, but I can't rank these.", "refusal"),
        ("I’m sorry, I cannot rank passages [1], [2] and [3].", "refusal"),
        ("As an AI, I have no opinion on passages [1] to [3].", "refusal"),
        ("None of the passages [1], [2], [3] is relevant.", "refusal"),
        ("[7] > [8]", "out_of_range"),
        ("The most relevant one has 3 paragraphs.", "unparsed"),
        ("What a lovely day", "unparsed"),
        ("[] > []", "unparsed"),
        ("About 1,000 people", "unparsed"),
    ],
)
def test_no_ranking_is_made_up(text: str, kind: str):
    """The third and fourth hold a ranking that the model only thought of."""
    assert ranked(text) == (None, [kind])


def test_a_few_mentions_are_no_ranking():
    """With 20 passages, an order that names two in passing would be the input's."""
    text = "Only [4] and [7] say something about it."
    assert ranked(text, NUMBERS) == (None, ["unparsed"])
    assert ranked(text, ["4", "7", "9"])[0] == (0, 1, 2)
    assert ranked("In 2024, 5 > 3 held.", NUMBERS) == (None, ["unparsed"])
    assert ranked("I cannot rank in the form [2] > [1].", NUMBERS) == (None, ["refusal"])


@pytest.mark.parametrize(
    "text",
    [
        "[2] > [3] > [1]. I can't say more.",
        "I'm sorry for the delay: [2] > [3] > [1]",
        '[2] > [3] > [1]\nPassage [2] quotes: "I\'m sorry, as an AI I cannot help"',
        "2, 3, 1\nI am unable to determine more.",
        "1. [2] says 'I cannot'\n2. [3]\n3. [1]",
    ],
)
def test_a_ranking_that_quotes_a_refusal_is_a_ranking(text: str):
    assert ranked(text) == ((1, 2, 0), [])


@pytest.mark.parametrize(
    ("text", "order", "defects"),
    [
        # The 1 may be the start of 12: it is not read.
        ("[7] > [9] > [1", (6, 8), ["cut_off", "missing"]),
        ("7 > 9 > 1", (6, 8), ["cut_off", "missing"]),
        ("[7] > [9] >", (6, 8), ["cut_off", "missing"]),
    ],
)
def test_a_text_that_was_cut_off(text: str, order: tuple[int, ...], defects: list[str]):
    parsed = parse_permutation(text, NUMBERS, cut_off=True)
    if parsed.order is not None:
        assert parsed.order[: parsed.named] == order
        assert kinds(parsed) == defects
    else:
        # Two bare numbers of twenty are no ranking.
        assert ">" in text
        assert "[" not in text


def test_reasoning_that_never_ends_ranks_nothing():
    assert ranked("<think>so [2] > [3] > [1]? Perhaps", cut_off=True) == (None, ["cut_off", "empty"])


def test_a_cut_off_answer_that_is_whole():
    assert ranked("[2] > [3] > [1]\n\nNow", cut_off=True) == ((1, 2, 0), ["cut_off"])


@pytest.mark.parametrize(
    "text",
    [
        "1" * 40000,
        "[" * 40000,
        "1 > " * 15000,
        "\n" * 40000,
        "1," * 20000,
        "A" * 40000,
        "<answer>" * 5000,
        "[1 " * 20000,
        "{" * 40000,
        '{"a":' * 5000,
        "score " * 8000,
        "passage " * 8000,
        "<think>" * 8000,
        "a: " * 15000,
        " " * 40000,
    ],
)
def test_long_loops_are_read_quickly(text: str):
    """What a model that repeats itself writes; a quadratic pattern would take minutes."""
    start = time.process_time()
    parse_permutation(text, NUMBERS)
    parse_permutation(text, LETTERS)
    parse_scores(text, NUMBERS, low=0, high=10)
    parse_score(text, low=0, high=10)
    parse_label(text, LETTERS)
    assert time.process_time() - start < 5


# Reasoning


@pytest.mark.parametrize(
    ("text", "rationale", "answer"),
    [
        ("[1]", "", "[1]"),
        ("<think>a</think>b", "a", "b"),
        ("a</think>b", "a", "b"),
        ("<think>a</think>b</think>c", "ab", "c"),
        ("<think>a", "a", ""),
        ("<think>a</think><think>b", "ab", ""),
        ("<THINKING>a</THINKING> b ", "a", "b"),
        ("<think>a</think><answer>b</answer>", "a", "b"),
        ("because <answer>b</answer>", "because", "b"),
        ("<answer>a</answer> no, <answer>b</answer>", "<answer>a</answer> no,", "b"),
        ("İİİ <answer>b</answer>", "İİİ", "b"),
        ("<think>in <answer> tags</think><answer>b</answer> done <answer>", "in <answer> tags", "b"),
        ("<answer>b", "", "b"),
    ],
)
def test_reasoning_and_answer(text: str, rationale: str, answer: str):
    assert split_reasoning(text) == (rationale, answer)


@given(text=texts)
def test_reading_the_answer_twice_changes_nothing(text: str):
    _, answer = split_reasoning(text)
    if "<" not in answer:
        assert split_reasoning(answer) == ("", answer)


# Scores by identifier


@given(text=texts, identifiers=identifier_lists, cut_off=st.booleans())
def test_any_text_gives_scores_within_the_bounds(text: str, identifiers: list[str], cut_off: bool):
    parsed = parse_scores(text, identifiers, low=0, high=10, cut_off=cut_off)
    assert len(parsed.scores) == len(identifiers)
    assert all(math.isnan(s) or 0 <= s <= 10 for s in parsed.scores)
    if any(math.isnan(s) for s in parsed.scores):
        assert parsed.defects


@given(
    scores=st.dictionaries(st.sampled_from(NUMBERS), st.floats(0, 10, allow_nan=False).map(lambda x: round(x, 3))),
    pretty=st.booleans(),
)
def test_json_is_read_exactly(scores: dict[str, float], pretty: bool):
    """A member that is not there is NaN and `missing`; nothing else is a defect."""
    parsed = parse_scores(json.dumps(scores, indent=2 if pretty else None), NUMBERS, low=0, high=10)
    for name, score in zip(NUMBERS, parsed.scores, strict=True):
        assert score == scores[name] if name in scores else math.isnan(score)
    assert kinds(parsed) == ([] if len(scores) == 20 else ["missing"] if scores else ["unparsed"])


NAN = math.nan


@pytest.mark.parametrize(
    ("text", "scores", "defects"),
    [
        ('{"1": 8.5, "2": 0, "3": 10}', (8.5, 0, 10), []),
        ('```json\n{"1": 8.5, "2": 0, "3": 10}\n```', (8.5, 0, 10), []),
        ('<think>{"1": 1, "2": 1, "3": 1}</think>{"1": 8, "2": 0, "3": 10}', (8, 0, 10), []),
        ('{"[1]": "8", "Passage 2": "7/10", "3": "6.5"}', (8, 7, 6.5), []),
        ('{"scores": {"1": 8, "2": 0, "3": 10}}', (8, 0, 10), []),
        ('{"1": 1, "2": 2, "3": 3} or {"1": 8, "2": 0, "3": 10}', (8, 0, 10), []),
        ('{"1": 8, "2": 0, "3": 10} as {"1": 2} has none', (8, 0, 10), []),
        ("[1]: 8.5\n[2]: 0\n[3]: 10", (8.5, 0, 10), []),
        ("1: 8, 2: 0, 3: 10", (8, 0, 10), []),
        ("- Passage 1: 8/10\n- Passage 2: 0/10\n- Passage 3: 10/10", (8, 0, 10), []),
        ('{"1": 8, "1": 3, "2": 0, "3": 10}', (8, 0, 10), ["repeated"]),
        ('{"1": 8, "2": 0}', (8, 0, NAN), ["missing"]),
        ('{"1": 8, "2": 0, "3": 11}', (8, 0, NAN), ["out_of_range"]),
        ('{"1": 8, "2": 0, "3": -1}', (8, 0, NAN), ["out_of_range"]),
        ('{"1": 8, "2": 0, "3": 10, "4": 5}', (8, 0, 10), ["out_of_range"]),
        ('{"1": 8, "2": 0, "3": null}', (8, 0, NAN), ["missing"]),
        ('{"1": 8, "2": 0, "3": true}', (8, 0, NAN), ["missing"]),
        ('{"1": 8, "2": 0, "3": NaN}', (8, 0, NAN), ["missing"]),
        ('{"1": 8, "2": 0, "3": 1' + "0" * 400 + "}", (8, 0, NAN), ["missing"]),
        ('{"1": 8, "2": 0, "3": 1' + "0" * 5000 + "}", (8, 0, NAN), ["missing"]),
        ('{"1": 8, "2": 0, "3": "3/5"}', (8, 0, NAN), ["missing"]),
        ('{"1": 8, "2": 0, "3": 1', (8, 0, 1), []),
        ("Score: 7", (NAN,) * 3, ["unparsed"]),
        ("", (NAN,) * 3, ["empty"]),
        ("I can't score passage 1: it is hateful", (NAN,) * 3, ["refusal"]),
        ('I can\'t say much: {"1": 8, "2": 0, "3": 10}', (8, 0, 10), []),
    ],
)
def test_scores_by_identifier(text: str, scores: tuple[float, ...], defects: list[str]):
    parsed = parse_scores(text, NUMBERS[:3], low=0, high=10)
    assert parsed.scores == pytest.approx(scores, nan_ok=True)
    assert kinds(parsed) == defects


def test_scores_that_were_cut_off():
    """The last number may lack digits, so it is not a score."""
    parsed = parse_scores('{"1": 8, "2": 0, "3": 1', NUMBERS[:3], low=0, high=10, cut_off=True)
    assert parsed.scores == pytest.approx((8, 0, NAN), nan_ok=True)
    assert kinds(parsed) == ["cut_off", "missing"]


@pytest.mark.parametrize(
    ("text", "rows", "defects"),
    [
        ('{"1": [8.5, 4, 2.5], "2": [0, 0, 0]}', ((8.5, 4, 2.5), (0, 0, 0)), []),
        ("[1]: 8.5, 4, 2.5\n[2]: 0, 0, 0", ((8.5, 4, 2.5), (0, 0, 0)), []),
        ('{"1": [8.5, 4], "2": [0, 0, 0]}', (None, (0, 0, 0)), ["out_of_range"]),
        ('{"1": [8.5, 4, 6], "2": [0, 0, 0]}', (None, (0, 0, 0)), ["out_of_range"]),
        ('{"1": [8.5, 4, "x"], "2": [0, 0, 0]}', (None, (0, 0, 0)), ["missing"]),
    ],
)
def test_rows_of_scores(text: str, rows: tuple, defects: list[str]):
    parsed = parse_score_rows(text, NUMBERS[:2], [(0, 10), (0, 5), (0, 5)])
    assert parsed.rows == rows
    assert kinds(parsed) == defects


# One score


@given(text=texts, cut_off=st.booleans())
def test_any_text_gives_a_score_within_the_bounds_or_none(text: str, cut_off: bool):
    parsed = parse_score(text, low=0, high=10, cut_off=cut_off)
    assert 0 <= parsed.score <= 10 if parsed.score is not None else parsed.defects


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("7", 7),
        ("8.5", 8.5),
        ("8,5", 8.5),
        (".5", 0.5),
        ("7/10", 7),
        ("7 out of 10", 7),
        ("**Score:** 7", 7),
        ("Score: 8.5. The passage has 3 parts and 12 words.", 8.5),
        ("7 - it names 2 of the films", 7),
        ("I'd rate it a 7.", 7),
        ("On a scale of 0 to 10, it deserves 7", 7),
        ("On a scale from 0-10 I would give 6.5", 6.5),
        ("The relevance score is 7 (0-10)", 7),
        ('{"score": 7}', 7),
        ("<think>perhaps 3</think><answer>7</answer>", 7),
        ("Score: 3? No. Score: 7", 7),
        ("Score: 0. I can't find anything on it.", 0),
        ("-0", 0),
        ("3 of the 5 facts are there, so the score is 6", 6),
    ],
)
def test_one_score(text: str, score: float):
    parsed = parse_score(text, low=0, high=10)
    assert (repr(parsed.score), parsed.defects) == (repr(float(score)), ())


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", "empty"),
        ("relevant", "unparsed"),
        ("11", "out_of_range"),
        ("-1", "out_of_range"),
        ("4/5", "out_of_range"),
        ("I cannot rate passage 3", "refusal"),
        ("It has 3 parts and 12 words", "unparsed"),
        ("1,000", "unparsed"),
        ("9" * 5000, "out_of_range"),
        ("<think>7", "empty"),
    ],
)
def test_no_score(text: str, kind: str):
    parsed = parse_score(text, low=0, high=10)
    assert (parsed.score, kinds(parsed)) == (None, [kind])


@pytest.mark.parametrize(
    ("text", "score", "defects"),
    [
        ("Score: 7. It", 7, ["cut_off"]),
        ("7\nThe passage", 7, ["cut_off"]),
        ("Score: 1", None, ["cut_off", "unparsed"]),
        ("The passage names 3 films and", None, ["cut_off", "unparsed"]),
    ],
)
def test_a_score_that_was_cut_off(text: str, score: float | None, defects: list[str]):
    """The fourth says 3, but not as its answer; the third may have been about to say 10."""
    parsed = parse_score(text, low=0, high=10, cut_off=True)
    assert (parsed.score, kinds(parsed)) == (score, defects)


# Labels


@given(text=texts, labels=identifier_lists, cut_off=st.booleans())
def test_any_text_gives_a_label_or_a_defect(text: str, labels: list[str], cut_off: bool):
    parsed = parse_label(text, labels, cut_off=cut_off)
    assert (parsed.index is None) == bool(parsed.defects)
    assert parsed.index is None or 0 <= parsed.index < len(labels)


@pytest.mark.parametrize(
    "text",
    [
        "B",
        "b",
        "[B]",
        "B.",
        "(B)",
        "**B**",
        "Passage B",
        "The answer is B",
        "Answer: Passage B.",
        "B\nbecause A is short",
        "[B] > [A] > [C]",
        "The most relevant is Passage B.",
        "I think [B]",
        "<think>A?</think>B",
        "B. I can't say more",
        "B, B",
    ],
)
def test_one_label(text: str):
    parsed = parse_label(text, list("ABC"))
    assert (parsed.index, parsed.defects) == (1, ())


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", "empty"),
        ("I'm sorry, I can't choose", "refusal"),
        ("A good question", "unparsed"),
        ("A and B are alike", "unparsed"),
        ("A, B", "unparsed"),
        ("A or B", "unparsed"),
        ("[A], [B]", "unparsed"),
        ("Passage A and Passage B", "unparsed"),
        ("both", "unparsed"),
        ("D", "out_of_range"),
        ("Passage [9]", "out_of_range"),
    ],
)
def test_no_label(text: str, kind: str):
    parsed = parse_label(text, list("ABC"))
    assert (parsed.index, kinds(parsed)) == (None, [kind])


def test_numbers_as_labels():
    assert parse_label("12", NUMBERS).index == 11
    assert parse_label("[12]", NUMBERS).index == 11
    assert parse_label("Passage 12 is", NUMBERS).index == 11
    assert parse_label("1.5", NUMBERS).index is None
    assert parse_label("21", NUMBERS).index is None


def test_a_label_that_was_cut_off():
    """A label that was given is one, whatever was to follow; reasoning that was cut off gives none."""
    assert parse_label("B. The passage", list("ABC"), cut_off=True).defects == ()
    assert kinds(parse_label("The better passage", list("ABC"), cut_off=True)) == ["cut_off"]
    assert kinds(parse_label("<think>[B] is", list("ABC"), cut_off=True)) == ["cut_off"]
