"""What RankGPT with its variants, FIRST and self-consistency do each in its own way."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from fixtures.listwise import Script, first, oracle, rank_gpt, self_consistency
from fixtures.oracles import (
    USAGE,
    Adversary,
    Oracle,
    Recorder,
    Reply,
    best_first,
    known_list,
    outcome_of,
)
from fixtures.rows import make_list

from rerank_ray.errors import ConfigError
from rerank_ray.models.protocol import Answer, Failure
from rerank_ray.prompts.passages import shown_passage
from rerank_ray.ranking import scheduler

# RankGPT


def test_windows_run_from_the_back_and_carry_the_best_forward():
    """Five passages, window 3, step 2: ranks 3–5 first, then 1–3; texts by hand."""
    request = make_list(size=5)
    backend = Script("[3] > [1] > [2]", "[3] > [2] > [1]")
    outcome = outcome_of(rank_gpt(backend, window=3, step=2), backend, request)
    texts = [c.text for c in request.candidates]
    assert [list(c.prompt.passages) for c in backend.calls] == [texts[2:], [*texts[:2], texts[4]]]
    # 2,3,4 -> 4,2,3; then 0,1,4 -> 4,1,0: the order is 4, 1, 0, 2, 3.
    assert outcome.scores.scores == (3.0, 4.0, 2.0, 1.0, 5.0)
    assert outcome.usage.calls == 2


def test_the_prompt():
    request = make_list(size=2)
    backend = Script("[2] > [1]")
    method = rank_gpt(backend)
    outcome_of(method, backend, request)
    (call,) = backend.calls
    assert (call.temperature, call.max_tokens) == (0.0, 256)
    text = "".join(call.prompt.parts)
    assert "[1] " in text
    assert "\n[2] " in text
    assert "query" in call.prompt.parts[0]
    assert method.name.startswith("rank_gpt:recorder:prompt=")


def test_passages_are_cut_and_can_not_pose_as_identifiers():
    (candidate,) = make_list(size=1).candidates
    long = replace(candidate, text="one [2]  two\nthree [Fig] [ x ] four five", title="Head")
    assert shown_passage(long, 8) == "Head one (2) two three (Fig) [ x"


def test_repairs_are_defects():
    request = make_list(size=3)
    backend = Script("[2] > [2] > [7]")
    scores = outcome_of(rank_gpt(backend), backend, request).scores
    assert scores.scores == (2.0, 3.0, 1.0)
    assert [str(d.kind) for d in scores.defects] == ["out_of_range", "repeated", "missing"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty: ''"),
        ("I'm sorry, I can't rank these.", "refusal: "),
        ("lorem ipsum", "unparsed: 'lorem ipsum'"),
        ("Passage…", "cut_off: 'Passage'; unparsed: 'Passage'"),
    ],
)
def test_a_window_without_a_ranking_leaves_no_label(text: str, said: str):
    """What the window held is in first-stage order, which is not the teacher's; the error names it."""
    request = make_list(size=5)
    backend = Script("[1] > [2]", text)
    outcome = outcome_of(rank_gpt(backend, window=3, step=2), backend, request)
    assert outcome.scores is None
    assert outcome.error.startswith(f"the window of ranks 1 to 3 was not ranked: {said}")
    # Rates of refusals count it, and the repair before it.
    assert [str(d.kind) for d in outcome.defects] == ["missing", *(part.split(":")[0] for part in said.split("; "))]


def test_an_answer_that_was_cut_off_is_marked():
    request = make_list(size=3)
    backend = Script("[3] > [2] > …")
    scores = outcome_of(rank_gpt(backend), backend, request).scores
    assert scores.scores == (1.0, 2.0, 3.0)
    assert [str(d.kind) for d in scores.defects] == ["cut_off", "missing"]


def test_insert_rank_shows_scores():
    request = make_list(size=2, scores=[12.345, -1.0])
    backend = Script("[2] > [1]")
    outcome_of(rank_gpt(backend, prompt="insert_rank"), backend, request)
    (call,) = backend.calls
    assert "(BM25 score: 12.35)" in call.prompt.parts[1]
    assert "(BM25 score: -1.00)" in call.prompt.parts[2]


def test_insert_rank_needs_every_score():
    """An error of that row; the row beside it is ranked."""
    good, bad = make_list("q1", 2, scores=[2.0, 1.0]), make_list("q2", 2, scores=[2.0, 1.0])
    bad = replace(bad, candidates=(bad.candidates[0], replace(bad.candidates[1], score=None)))
    backend = Script("[2] > [1]")
    outcomes = scheduler.run(rank_gpt(backend, prompt="insert_rank"), backend, [bad, good])
    assert outcomes[0].error == "candidate 'd1' has no score, and the prompt shows first-stage scores"
    assert outcomes[1].scores.scores == (1.0, 2.0)


def test_reasoning_is_kept_and_not_ranked_by():
    """The prompt's prefill opens the think block, so the answers do not."""
    request = make_list(size=5)
    backend = Script("first [1] > [2] > [3]?</think><answer>[3] > [1] > [2]</answer>", "b</think>[3] > [2] > [1]")
    outcome = outcome_of(rank_gpt(backend, window=3, step=2, prompt="rank_gpt_reasoning"), backend, request)
    assert outcome.scores.scores == (3.0, 4.0, 2.0, 1.0, 5.0)
    assert outcome.scores.rationales == ("first [1] > [2] > [3]?", "b")
    assert outcome.scores.rationales_are_of_calls
    assert backend.calls[0].prompt.prefill == "<think>\n"


def test_reasoning_that_was_cut_off_is_no_ranking():
    request = make_list(size=3)
    backend = Script("surely [3] > [2] > [1], but…")
    outcome = outcome_of(rank_gpt(backend, prompt="rank_gpt_reasoning"), backend, request)
    assert "was not ranked: cut_off: " in outcome.error


# FIRST


def test_first_by_hand():
    """Logits of A, B, C: 1, 3, 2 give B, C, A; equal ones keep their order."""
    request, gains = known_list([1.0, 3.0, 2.0])
    backend = Oracle(gains)
    method = first(backend)
    assert outcome_of(method, backend, request).scores.scores == (1.0, 3.0, 2.0)
    (call,) = backend.calls
    assert call.labels == ("A", "B", "C")
    assert call.prompt.prefill == "["
    assert "[C] " in "".join(call.prompt.parts)
    tied = Adversary(Reply(text="", favourite=2))
    assert outcome_of(first(tied), tied, request).scores.scores == (2.0, 1.0, 3.0)


def test_first_without_logits():
    request = make_list(size=3)
    broken = Adversary(Reply(text="", favourite=None))
    outcome = outcome_of(first(broken), broken, request)
    assert outcome.error == "the window of ranks 1 to 3 was not ranked: a logit is not a finite number"
    assert [str(d.kind) for d in outcome.defects] == ["unscored"]


def test_first_with_fewer_letters_than_the_window(tmp_path: Path):
    path = tmp_path / "t.yaml"
    content = {"method": "first", "about": "a", "text": "{query} {passages}", "passage": "{identifier} {passage}"}
    path.write_text(json.dumps(content | {"labels": ["A", "B"]}), encoding="utf-8")
    with pytest.raises(ConfigError, match="3 passages at once need as many labels, but the first template has 2"):
        first(Oracle({}), prompt=str(path), window=3, step=1)


# Self-consistency


def test_shuffles_depend_on_seed_and_query_alone():
    def shown(query_id: str, seed: int) -> list[tuple[str, ...]]:
        request, gains = known_list([float(i) for i in range(6)], "q1")
        backend = oracle(gains)
        request = replace(request, query=replace(request.query, query_id=query_id))
        outcome_of(self_consistency(backend, seed=seed, permutations=4), backend, request)
        return [c.prompt.passages for c in backend.calls]

    assert shown("q1", 0) == shown("q1", 0)
    assert len(set(shown("q1", 0))) == 4
    assert shown("q1", 0) != shown("q1", 1)
    assert shown("q1", 0) != shown("q2", 0)


def test_a_position_bias_averages_out():
    """A model that always answers in the order shown: no passage is preferred for its place in the first stage."""
    request = make_list(size=4)
    backend = Adversary(Reply(text="[1] > [2] > [3] > [4]", favourite=0))
    scores = outcome_of(self_consistency(backend, permutations=200, aggregation="borda"), backend, request).scores
    assert scores.scores == pytest.approx([2.5] * 4, abs=0.3)
    # Uniform ranks 0 … 3 have variance 5/4.
    assert scores.uncertainty == pytest.approx([math.sqrt(1.25)] * 4, abs=0.15)


def test_what_a_shuffle_leaves_out_is_not_in_its_ranking():
    """Three shuffles each name one passage, the same one: the others are held by none."""
    request, gains = known_list([1.0, 2.0, 3.0])
    backend = Oracle(gains, write=lambda g: f"[{best_first(g)[0] + 1}]")
    scores = outcome_of(self_consistency(backend, permutations=3), backend, request).scores
    assert scores.rationales_are_of_calls
    assert scores.scores[2] == 1.0 + 2.0
    assert all(map(math.isnan, scores.scores[:2]))
    assert [str(d) for d in scores.defects[-2:]] == [
        "unscored: d0: no shuffle's ranking holds it",
        "unscored: d1: no shuffle's ranking holds it",
    ]


def test_a_shuffle_without_a_ranking_counts_for_nothing():
    """Of six shuffles two are refused or fail in the first window, and one in the second, which it alone skips then."""
    request, gains = known_list([float(i) for i in range(6)])
    good = oracle(gains)
    bad = {2: Answer(value="I'm sorry, I can't", usage=USAGE), 3: Failure(reason="no answer")}
    bad[6] = Answer(value="", usage=USAGE)

    class Unreliable(Recorder):
        """Ranks, but for three of its calls."""

        def answer(self, call):
            self.count = getattr(self, "count", -1) + 1
            return bad.get(self.count) or good.answer(call)

    backend = Unreliable()
    outcome = outcome_of(self_consistency(backend, permutations=6, window=4, step=2), backend, request)
    assert [len(batch) for batch in backend.batches] == [6, 4]
    assert [str(d) for d in outcome.scores.defects] == [
        "refusal: shuffle 3, ranks 3 to 6: \"I'm sorry, I can't\"",
        "unscored: shuffle 4, ranks 3 to 6: no answer",
        "empty: shuffle 1, ranks 1 to 4: ''",
    ]
    assert best_first(outcome.scores.scores)[:2] == [5, 4]
