"""Parsers of rankings and reasoning: nothing makes them fail, and nothing that is no answer becomes one."""

from __future__ import annotations

import time

import pytest
from fixtures.answers import LETTERS, NUMBERS, identifier_lists, kinds, texts
from hypothesis import given
from hypothesis import strategies as st

from rerank_ray.prompts.parse.answer import split_reasoning
from rerank_ray.prompts.parse.permutation import parse_permutation
from rerank_ray.prompts.parse.scores import parse_score, parse_score_rows
from rerank_ray.prompts.parse.words import parse_label
from rerank_ray.records import DefectKind


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
        "1. [2] names the year, unlike [1] and [3]\n2. [3] is close to [2]\n3. [1] is off topic",
        "Rank 1: [2]\nRank 2: [3] (as [2])\nRank 3: [1]",
        "- Passage [2] names the year\n- Passage [3] names the place of [2]\n- Passage [1] is off topic",
        "[2] names the year\n[3] names the place\n[1] is off topic",
        "The best is: [2], followed by [3], and then [1].",
        "1. [2], 2. [3], 3. [1]",
        "(1) [2]\n(2) [3]\n(3) [1]",
        "| 1 | [2] | names the year |\n| 2 | [3] | close to [2] |\n| 3 | [1] | off topic |",
        '1. "[2]"\n2. "[3]"\n3. "[1]"',
        "First: [2]\nSecond: [3]\nThird: [1]",
        "Most relevant: [2]\nNext: [3]\nLeast relevant: [1]",
        "Relevant: [2], [3]\nNot relevant: [1]",
        "Best: 2\nOthers: 3, 1",
        "Ranking: 2,\n3, 1",
        "[2], [3], and [1]",
        "Ranking: [2], [3] and [1].",
        "The ranking is [2], [3], [1].",
        "First [2], then [3], and finally [1].",
        "[2] (names the year) > [3] (close, as of 1999) > [1] (off topic)",
        "[2] -> [3] -> [1]",
        "[2] → [3] ≻ [1]",
        "[2] &gt; [3] &gt; [1]",
        "[2] >> [3] => [1]",
        "[2][3][1]",
        '["[2]", "[3]", "[1]"]',
        "[[2], [3], [1]]",
        "- [2]\n- [3]\n- [1]",
        "- [2] (best)\n- [3]\n- [1] (worst)",
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
        ("Unlike [3], [1] names the year, and so does [2].", "unparsed"),
        ("[1] is about dogs, as is [3].\n[2] is about cats.\n[3] is about birds.", "unparsed"),
        ("- [1]: dogs\n- [2]: cats\n- [3]: birds", "unparsed"),
        ("Not relevant: [3], [1]", "unparsed"),
        ("The first thing to say is that I would not show [3], [1].", "unparsed"),
        ("Off topic are [3], [1], [2].", "unparsed"),
        ("Score of [1]: 3\nScore of [2]: 1\nScore of [3]: 2", "unparsed"),
        ("Query: 3\nAnswers: 2", "unparsed"),
        ("About 1,000 people", "unparsed"),
    ],
)
def test_no_ranking_is_made_up(text: str, kind: str):
    """The third and fourth hold a ranking that the model only thought of."""
    assert ranked(text) == (None, [kind])


@pytest.mark.parametrize(
    "text",
    [
        "Highly relevant: [3] > [5] > [1]\nLess relevant: [2] > [4] > [6] > [7]",
        "[3] > [5] = [1] > [2] > [4] > [6] > [7]",
        "[3] > [5] >= [1], [2] > [4] [6] > [7]",
        "[3] > [5] > [1] > [] > [2] > [4] > [6] > [7]",
        "[3] > [5] > [1] > [N/A] > [2] > [4] > [6] > [7]",
    ],
)
def test_tiers_and_broken_chains_are_read_in_their_order(text: str):
    """Taking the longest chain alone would put the passages that the model ranked first last. It is a repair."""
    assert ranked(text, NUMBERS[:7]) == ((2, 4, 0, 1, 3, 5, 6), ["missing"])


@pytest.mark.parametrize(
    ("text", "order"),
    [
        ("In the requested form [3] > [5]: [5] > [4] > [3]", (4, 3, 2, 0, 1)),
        ("Comparing: [2] > [3] is clear. [1] > [2] is clear.\nFinal ranking: [2] > [1] > [3]", (1, 0, 2, 3, 4)),
        ("Least relevant: [4] > [5]\nMost relevant: [1] > [2] > [3]", (0, 1, 2, 3, 4)),
        ("Not relevant: [2]\nRanking: [1] > [3] > [4] > [5]", (0, 2, 3, 4, 1)),
        ("Passage [2] is off topic, so I leave it out.\n[3] > [1] > [5] > [4]", (2, 0, 4, 3, 1)),
        ("[2] > [3]. [1] > [3] > [2]", (0, 2, 1, 3, 4)),
    ],
)
def test_guesses_and_comparisons_are_no_part_of_a_ranking(text: str, order: tuple[int, ...]):
    assert ranked(text, NUMBERS[:5]) == (order, ["missing"])


@pytest.mark.parametrize(
    "text",
    [
        "Compared with [2], [1] > [3] > [4] > [5]",
        "[4] > [5]. [1] > [2] > [3]",
        "[2]\n[3] > [1] > [5] > [4]",
        "Highly relevant: [3] > [1]\nSomewhat relevant is [2].\nNot relevant: [4] > [5]",
        "[2] is the most relevant passage, followed by [3], [1], [5], [4].",
        "Passage [2] ranks first, then [3], [1], [5], [4]",
        "The best is [2]. Then [3]. Then [1], [4], [5].",
        "Most relevant: [2] names the year\nNext: [3], [1], [5], [4]",
    ],
)
def test_a_ranking_that_lacks_what_is_named_before_it_is_none(text: str):
    """What a ranking lacks comes last: the passage that these name first would."""
    assert ranked(text, NUMBERS[:5]) == (None, ["unparsed"])


@pytest.mark.parametrize(
    ("text", "order", "defects"),
    [
        ("Highly relevant: [3]\nSomewhat relevant: [1] > [2]\nNot relevant: [4] > [5]", (2, 0, 1, 3, 4), ["missing"]),
        ("Highly relevant: [3] > [1]\nSomewhat relevant: [2].\nNot relevant: [4] > [5]", (2, 0, 1, 3, 4), ["missing"]),
        ("Relevant:\n[3]\n\nNot relevant:\n[2] > [1] > [4] > [5]", (2, 1, 0, 3, 4), ["missing"]),
        ("Most relevant: [2]\nThen: [3] > [1] > [5] > [4]", (1, 2, 0, 4, 3), ["missing"]),
        ("Relevant: [2]\nNot relevant: [4] > [5] > [1]", (1, 3, 4, 0, 2), ["missing"]),
        ("Relevant: [2] (the year), [3]\nNot relevant: [4] > [5] > [1]", (1, 2, 3, 4, 0), ["missing"]),
        ("[3] = [1] > [2] > [4] > [5]", (2, 0, 1, 3, 4), ["missing"]),
        ("Ranking: [3], [1] > [2] > [4] > [5]", (2, 0, 1, 3, 4), ["missing"]),
        ("3 = 1 > 2 > 4 > 5", (2, 0, 1, 3, 4), ["missing"]),
        ("[3] names the year, as does [1].\nRanking: [1] > [3] > [2] > [5] > [4]", (0, 2, 1, 4, 3), []),
    ],
)
def test_a_tier_or_tie_of_one_keeps_its_place(text: str, order: tuple[int, ...], defects: list[str]):
    assert ranked(text, NUMBERS[:5]) == (order, defects)


def test_letters_in_an_empty_bracket_are_no_passages():
    assert ranked("[C] > [B] > [N/A], [D] > [A]", LETTERS[:4]) == ((2, 1, 3, 0), ["missing"])


@pytest.mark.parametrize(
    ("text", "order"),
    [
        ("Relevant: [4], [2]\nNot relevant: [1], [3], [5]", (3, 1, 0, 2, 4)),
        ("Best: [4]\nOthers: [1], [2], [3], [5]", (3, 0, 1, 2, 4)),
        ("1. [4], 2. [2], 3. [1], 4. [3], 5. [5]", (3, 1, 0, 2, 4)),
        ("Here is my ranking:\n\n- [1]\n- [2]\n- [3]\n- [4]\n- [5]", (0, 1, 2, 3, 4)),
    ],
)
def test_lists_of_lists_are_read_in_their_order(text: str, order: tuple[int, ...]):
    """The longest of them is mostly that of what is not relevant."""
    assert ranked(text, NUMBERS[:5]) == (order, [])


def test_a_few_mentions_are_no_ranking():
    """An order that names two of 20 in passing would be the input's."""
    text = "Only [4] and [7] say something about it."
    assert ranked(text, NUMBERS) == (None, ["unparsed"])
    assert ranked(text, ["4", "7", "9"]) == (None, ["unparsed"])
    assert ranked("4, 7", NUMBERS)[0][:2] == (3, 6)
    assert ranked("The best ones: 4, 7", NUMBERS) == (None, ["unparsed"])
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


def test_a_summary_that_was_cut_off_ranks_nothing():
    """Which of its lines come next is not known, nor that they were to be a ranking; numbered lines are one."""
    lines = [f"[{n}] is about something" for n in (2, 1, *range(3, 13))]
    assert ranked("\n".join([*lines, "[13"]), NUMBERS, cut_off=True) == (None, ["cut_off", "unparsed"])
    numbered = "\n".join(f"{i}. {line}" for i, line in enumerate(lines, 1))
    parsed = parse_permutation(f"{numbered}\n13. [1", NUMBERS, cut_off=True)
    assert parsed.order[: parsed.named] == (1, 0, *range(2, 12))


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
        "1\n" * 15000 + "1 x",
        "[1] then\n" * 8000 + "[1] x",
        "Best: [1]\n" * 8000,
        "passage " * 8000,
        "<think>" * 8000,
        "a: " * 15000,
        "Best: [1] > [2]\n" * 3000,
        "".join(f"Best: [{n}] > [{n + 1}]\n" for n in range(1, 4000, 2)),
        "[1], [2] > [3] x " * 3000,
        "Best:" + "\n" * 40000,
        "[1] = " * 8000 + "[2] > [3]",
        " " * 40000,
        "[1], " * 15000 + "[",
    ],
)
def test_long_loops_are_read_quickly(text: str):
    """What a model that repeats itself writes; a quadratic pattern would take minutes."""
    start = time.process_time()
    parse_permutation(text, NUMBERS)
    parse_permutation(text, LETTERS)
    parse_score_rows(text, NUMBERS, [(0, 10)])
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
