"""Parsers of scores and labels: nothing makes them fail, and nothing that is no answer becomes one."""

from __future__ import annotations

import json

import pytest
from fixtures.answers import NUMBERS, identifier_lists, kinds, texts
from hypothesis import given
from hypothesis import strategies as st

from rerank_ray.prompts.parse.scores import parse_score, parse_score_rows
from rerank_ray.prompts.parse.words import parse_items, parse_label

# Scores by identifier


@given(text=texts, identifiers=identifier_lists, cut_off=st.booleans())
def test_any_text_gives_scores_within_the_bounds(text: str, identifiers: list[str], cut_off: bool):
    parsed = parse_score_rows(text, identifiers, [(0, 10)], cut_off=cut_off)
    assert len(parsed.rows) == len(identifiers)
    assert all(row is None or 0 <= row[0] <= 10 for row in parsed.rows)
    if None in parsed.rows:
        assert parsed.defects


@given(
    scores=st.dictionaries(st.sampled_from(NUMBERS), st.floats(0, 10, allow_nan=False).map(lambda x: round(x, 3))),
    pretty=st.booleans(),
)
def test_json_is_read_exactly(scores: dict[str, float], pretty: bool):
    """A member that is not there is None and `missing`; nothing else is a defect."""
    parsed = parse_score_rows(json.dumps(scores, indent=2 if pretty else None), NUMBERS, [(0, 10)])
    assert parsed.rows == tuple((scores[name],) if name in scores else None for name in NUMBERS)
    assert kinds(parsed) == ([] if len(scores) == 20 else ["missing"] if scores else ["unparsed"])


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
        ('{"1": 8, "2": 0}', (8, 0, None), ["missing"]),
        ('{"1": 8, "2": 0, "3": 11}', (8, 0, None), ["out_of_range"]),
        ('{"1": 8, "2": 0, "3": -1}', (8, 0, None), ["out_of_range"]),
        ('{"1": 8, "2": 0, "3": 10, "4": 5}', (8, 0, 10), ["out_of_range"]),
        ('{"1": 8, "2": 0, "3": null}', (8, 0, None), ["missing"]),
        ('{"1": 8, "2": 0, "3": true}', (8, 0, None), ["missing"]),
        ('{"1": 8, "2": 0, "3": NaN}', (8, 0, None), ["missing"]),
        ('{"1": 8, "2": 0, "3": 1' + "0" * 400 + "}", (8, 0, None), ["missing"]),
        ('{"1": 8, "2": 0, "3": 1' + "0" * 5000 + "}", (8, 0, None), ["missing"]),
        ('{"1": 8, "2": 0, "3": "3/5"}', (8, 0, None), ["missing"]),
        ('{"1": 8, "2": 0, "3": 1', (8, 0, 1), []),
        ("Score: 7", (None,) * 3, ["unparsed"]),
        ("", (None,) * 3, ["empty"]),
        ("I can't score passage 1: it is hateful", (None,) * 3, ["refusal"]),
        ('I can\'t say much: {"1": 8, "2": 0, "3": 10}', (8, 0, 10), []),
    ],
)
def test_scores_by_identifier(text: str, scores: tuple[float | None, ...], defects: list[str]):
    parsed = parse_score_rows(text, NUMBERS[:3], [(0, 10)])
    assert parsed.rows == tuple(None if score is None else (score,) for score in scores)
    assert kinds(parsed) == defects


def test_scores_that_were_cut_off():
    """The last number may lack digits, so it is not a score."""
    parsed = parse_score_rows('{"1": 8, "2": 0, "3": 1', NUMBERS[:3], [(0, 10)], cut_off=True)
    assert parsed.rows == ((8,), (0,), None)
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
        ("Score (0 to 10): 7", 7),
        ("Rating [0-10]: 7", 7),
        ("Relevance (0=not relevant, 10=perfect): 7", 7),
        ("Relevance score (1 to 10): 9", 9),
        ("Final score: 7. A score of 10 would need more detail.", 7),
        ("score: 7, max score: 10", 7),
        ("I give it a score of 8.", 8),
        ("The passage covers only 2 of the aspects, so a score of 6 would be appropriate.", 6),
        ("The passage has 3 relevant facts. I assign it the maximum score: 10.", 10),
        ("I think a score of 8 would be fair.", 8),
        ("Relevance score: (7 = relevant)", 7),
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
        "I'd choose passage B.",
        "Passage B, not passage A",
        "Passage B and a half of the rest",
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
        ("Passage A or B", "unparsed"),
        ("Passage A and B", "unparsed"),
        ("Passage A, B", "unparsed"),
        ("[A] or B", "unparsed"),
        ("[A, C]", "unparsed"),
        ("Not passage A", "unparsed"),
        ("Neither passage A nor B", "unparsed"),
        ("D", "out_of_range"),
        ("Passage [9]", "out_of_range"),
    ],
)
def test_no_label(text: str, kind: str):
    parsed = parse_label(text, list("ABC"))
    assert (parsed.index, kinds(parsed)) == (None, [kind])


def test_a_pronoun_is_no_label():
    """The built-in setwise template has passages A to T."""
    letters = list("ABCDEFGHIJ")
    assert kinds(parse_label("I'm sorry, but I can't determine which passage is best.", letters)) == ["refusal"]
    assert parse_label("I'd choose passage B.", letters).index == 1
    assert parse_label("I", letters).index == 8


@pytest.mark.parametrize("text", ["Passage \u212a", "[\u212a]", "[\u0130]", "\u212a"])
def test_a_letter_that_is_one_in_another_case_alone_is_no_label(text: str):
    """The Kelvin sign's lower case is k, that of I with a dot begins with i; a pattern that ignores case takes them."""
    assert parse_label(text, list("ABCDEFGHIJKLMNOPQRST")).index is None


def test_numbers_as_labels():
    assert parse_label("12", NUMBERS).index == 11
    assert parse_label("[12]", NUMBERS).index == 11
    assert parse_label("Passage 12 is", NUMBERS).index == 11
    assert parse_label("1.5", NUMBERS).index is None
    assert parse_label("21", NUMBERS).index is None
    assert parse_label("[3, 5]", NUMBERS).index is None


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("Passage A does not answer the query.", None),
        ("Passage B is not relevant to the query. The other one is.", None),
        ("Passage A isn’t about the query.", None),
        ("Passage A is less relevant.", None),
        ("The best one is passage A, since passage B does not name the year.", 0),
        ("The best one is passage A. It does not name the year.", 0),
    ],
)
def test_a_passage_of_which_something_is_denied_is_not_the_choice(text: str, index: int | None):
    assert parse_label(text, list("ABC")).index == index


@pytest.mark.parametrize(
    "text", ["Passage A is less relevant than", "Passage A talks about dogs, whereas the query asks about the"]
)
def test_prose_that_was_cut_off_chooses_nothing(text: str):
    parsed = parse_label(text, list("ABC"), cut_off=True)
    assert (parsed.index, kinds(parsed)) == (None, ["cut_off"])


def test_a_label_that_was_cut_off():
    """A label that was given is one, whatever was to follow; reasoning that was cut off gives none."""
    assert parse_label("B. The passage", list("ABC"), cut_off=True).defects == ()
    assert kinds(parse_label("The better passage", list("ABC"), cut_off=True)) == ["cut_off"]
    assert kinds(parse_label("<think>[B] is", list("ABC"), cut_off=True)) == ["cut_off"]
    # The 1 may be the start of 12.
    assert kinds(parse_label("so</think><answer>[1", NUMBERS, cut_off=True)) == ["cut_off"]
    assert parse_label("so</think><answer>[1]", NUMBERS, cut_off=True).index == 0
    assert parse_label("[1", NUMBERS).index == 0


# Lists


def test_an_entrys_own_list_is_none_of_the_entries():
    """Asked how to tell a 0 from a 5, models write a legend below each criterion."""
    text = "Criteria:\n1. Depth: how deep\n   - 0: shallow\n   - 5: deep\n2. **Recency**\n\n10. Authority\n"
    parsed = parse_items(text, 3)
    assert (parsed.items, parsed.defects) == (("Depth: how deep", "Recency", "Authority"), ())
    assert parse_items("- Depth\n  1. a\n- Recency", 2).items == ("Depth", "Recency")
    assert parse_items("  1. A\n  2. B\n", 2).items == ("A", "B")
    assert parse_items(" 9. A\n10. B", 2).items == ("A", "B")
    assert parse_items("- Here are criteria:\n1. A\n2. B", 2).items == ("A", "B")


def test_a_label_said_thousands_of_times_takes_no_longer():
    assert parse_label("Both " + "[A], " * 20_000, list("AB")).index == 0
    assert kinds(parse_label("Both " + "[A], [B], " * 20_000, list("AB"))) == ["unparsed"]
