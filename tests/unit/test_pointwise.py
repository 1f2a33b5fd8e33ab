"""Pointwise methods that read a language model: by hand, on oracles, and on adversaries."""

from __future__ import annotations

import math
import re
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from fixtures.oracles import ADVERSARIES, Adversary, Oracle, Recorder, known_list
from fixtures.rows import make_list
from hypothesis import given, settings
from hypothesis import strategies as st

from rerank_ray.errors import ConfigError, ModelError
from rerank_ray.models.fake import Fake
from rerank_ray.models.protocol import Answer, Call, Failure, Generate, LogLikelihood, NextToken, Result
from rerank_ray.prompts.render import load_template
from rerank_ray.ranking import scheduler
from rerank_ray.ranking.erank import ERank
from rerank_ray.ranking.fine_grained import FineGrained
from rerank_ray.ranking.rankers import Ranker
from rerank_ray.ranking.yes_no import YesNo
from rerank_ray.records import Candidate, Query, Usage, ranking_of
from rerank_ray.settings.models import FakeSettings, HFCausalSettings
from rerank_ray.settings.rankers import ERankSettings, FineGrainedSettings, YesNoSettings

MODEL = FakeSettings()
QUERY = Query(query_id="q", text="what is a cat")
PASSAGE = Candidate(doc_id="d", text="A cat is an animal.")


class Table(Recorder):
    """Answers from a table: (kind of call, passage, continuation or none) -> value or whole result."""

    name = "table"
    tells_raw_logits = True

    def __init__(self, table: dict, answers: frozenset[type] = Recorder.answers) -> None:
        super().__init__()
        self.table, self.answers = table, answers

    def answer(self, call: Call) -> Result:
        asked = (type(call), call.prompt.passages[0], getattr(call, "continuation", None))
        value = self.table[asked]
        return value if isinstance(value, Answer | Failure) else Answer(value=value, usage=Usage(calls=1))


def outcome_of(method, backend) -> scheduler.Outcome:
    (outcome,) = scheduler.run(method, backend, [make_list()])
    return outcome


TEXTS = [c.contents for c in make_list().candidates]


def generated(*results: Answer | Failure) -> Table:
    return Table({(Generate, t, None): r for t, r in zip(TEXTS, results, strict=True)}, frozenset({Generate}))


def said(text: str, p: float | None = None, cut_off: bool = False) -> Answer:
    log_p = None if p is None else math.log(p)
    return Answer(value=text, usage=Usage(calls=1), log_probability=log_p, cut_off=cut_off)


# Yes or no


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        ("log_odds", (math.log(3.0), -math.log(4.0), 0.0)),
        ("probability", (0.75, 0.2, 0.5)),
        ("sampled", (1.75, 0.2, 1.5)),
        ("logit", (math.log(3.0) + 7.0, 0.0, -2.0)),
    ],
)
def test_the_forms_of_yes_no(score: str, expected: tuple[float, ...]):
    """Odds of 3, 1/4 and 1: p(yes) 3/4, 1/5, 1/2; sampled: yes 1 + 3/4, no 1 − 4/5, and at a tie yes."""
    logits = [(math.log(3.0) + 7.0, 7.0), (0.0, math.log(4.0)), (-2.0, -2.0)]
    backend = Table({(NextToken, t, None): v for t, v in zip(TEXTS, logits, strict=True)})
    method = YesNo(YesNoSettings(model=MODEL, score=score), backend)
    assert outcome_of(method, backend).scores.scores == pytest.approx(expected)
    assert method.name.endswith("" if score == "log_odds" else f":score={score}")


def test_a_server_of_log_probabilities_cannot_tell_a_logit():
    backend = Table({})
    backend.tells_raw_logits = False
    with pytest.raises(ConfigError, match=r"score: logit: .* use kind hf_causal or hf_seq2seq, or score: log_odds"):
        YesNo(YesNoSettings(model=MODEL, score="logit"), backend)


def test_sampled_yes_no_where_only_a_sample_is_told():
    """Yes with 0.9 is 1.9, no with 0.7 is 0.3; an answer of another kind has no score."""
    backend = generated(said("Yes", 0.9), said(" no", 0.7), said("Maybe", 0.9))
    method = YesNo(YesNoSettings(model=MODEL, score="sampled"), backend)
    scores = outcome_of(method, backend).scores
    np.testing.assert_allclose(scores.scores, [1.9, 0.3, math.nan])
    assert [str(d) for d in scores.defects] == ["unparsed: d2: 'Maybe'"]
    assert {c.max_tokens for c in backend.calls} == {1}


def test_a_sample_of_untold_probability_has_no_score():
    backend = generated(said("Yes", 0.5), said("Yes"), Failure(reason="timed out"))
    scores = outcome_of(YesNo(YesNoSettings(model=MODEL, score="sampled"), backend), backend).scores
    np.testing.assert_allclose(scores.scores, [1.5, math.nan, math.nan])
    assert "did not tell the probability" in str(scores.defects[0])
    assert str(scores.defects[1]) == "unscored: d2: timed out"


@given(st.floats(-800, 800), st.floats(-800, 800))
def test_all_forms_of_yes_no_order_alike(a: float, b: float):
    """Probability and sampled are non-decreasing in the log-odds, also where the exponential overflows."""
    from rerank_ray.ranking.yes_no import _log_odds, _probability, _sampled

    low, high = sorted([(a, 0.0), (b, 0.0)], key=_log_odds)
    assert 0.0 <= _probability(low) <= _probability(high) <= 1.0
    assert _sampled(low) <= _sampled(high)


# Fine-grained levels


def test_expectation_over_a_scale_by_hand():
    """Weights 1:1:2:0:4 of levels 0..4: (1 + 4 + 16)/8; all on the last: 4; level by level the same whatever is added
    to all logits."""
    even = (0.0, 0.0, math.log(2.0), -math.inf, math.log(4.0))
    logits = [even, tuple(x + 1000.0 for x in even), (-1e9, -1e9, -1e9, -1e9, 0.0)]
    backend = Table({(NextToken, t, None): v for t, v in zip(TEXTS, logits, strict=True)})
    method = FineGrained(FineGrainedSettings(model=MODEL), backend)
    assert outcome_of(method, backend).scores.scores == pytest.approx((21 / 8, 21 / 8, 4.0))
    assert len(backend.calls) == 3


LEVELS = ("Not Relevant", "Somewhat Relevant", "Highly Relevant")


def levels_backend(rows: list[list[tuple[float, ...] | Failure]]) -> Table:
    cells = {
        (LogLikelihood, t, level): v
        for t, row in zip(TEXTS, rows, strict=True)
        for level, v in zip(LEVELS, row, strict=True)
    }
    return Table(cells)


def test_expectation_over_levels_of_several_tokens():
    """A label's likelihood is the product over its tokens: weights 1/2·1/2, 1/4, 1/2 → (1/4 + 2/2)/1 = 1.25."""
    half, quarter = -math.log(2.0), -math.log(4.0)
    row = [(half, half), (quarter,), (half, 0.0)]
    failed = [(0.0,), Failure(reason="too long"), (0.0,)]
    backend = levels_backend([row, failed, [(-3000.0,), (-3000.0,), (-1.0, -3000.0)]])
    chosen = FineGrainedSettings(model=MODEL, prompt="fine_grained_levels", read="log_likelihood")
    scores = outcome_of(FineGrained(chosen, backend), backend).scores
    last = (1.0 + 2.0 * math.exp(-1.0)) / (2.0 + math.exp(-1.0))
    np.testing.assert_allclose(scores.scores, [1.25, math.nan, last])
    assert [str(d) for d in scores.defects] == ["unscored: d1: too long"]
    assert len(backend.calls) == 9


def test_the_top_levels_log_likelihood():
    """One call a candidate, for the last label only."""
    backend = levels_backend([[(-9.0,), (-9.0,), (-1.0, -0.5)], [(0.0,), (0.0,), (-3.0,)], [(0.0,), (0.0,), (0.0,)]])
    chosen = FineGrainedSettings(model=MODEL, prompt="fine_grained_levels", score="top")
    assert outcome_of(FineGrained(chosen, backend), backend).scores.scores == (-1.5, -3.0, 0.0)
    assert [c.continuation for c in backend.calls] == ["Highly Relevant"] * 3


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=8))
def test_an_expectation_lies_between_the_levels(logits: list[float]):
    from rerank_ray.ranking.fine_grained import _expectation

    weights = np.exp(np.array(logits) - max(logits))
    expected = float((weights * np.arange(len(logits))).sum() / weights.sum())
    assert _expectation(logits) == pytest.approx(expected, abs=1e-9)
    assert 0.0 <= _expectation(logits) <= len(logits) - 1


# Reasoning and an integer


def erank(score: str = "weighted", **changes) -> ERankSettings:
    return ERankSettings(model=MODEL, score=score, **changes)


def test_the_integer_weighs_its_probability():
    """8 with 1/2·1/2 (two tokens) is 2; 10 with 0.9 is 9; the second question continues the model's own text."""
    first = "Cats have 4 legs.</think>\n<answer> 8 </answer> of 10"
    backend = Table(
        {
            (Generate, TEXTS[0], None): said(first),
            (Generate, TEXTS[1], None): said("Sure: <answer>10/10</answer>"),
            (Generate, TEXTS[2], None): said("3 facts of 9 are there. The score is 3."),
            (LogLikelihood, TEXTS[0], "8"): (-math.log(2.0), -math.log(2.0)),
            (LogLikelihood, TEXTS[1], "10"): (math.log(0.9),),
            (LogLikelihood, TEXTS[2], "3"): Failure(reason="too long"),
        }
    )
    scores = outcome_of(ERank(erank(), backend), backend).scores
    np.testing.assert_allclose(scores.scores, [2.0, 9.0, math.nan])
    assert scores.rationales == ("Cats have 4 legs.", "Sure:", "")
    prefills = [c.prompt.prefill for c in backend.batches[1]]
    assert prefills == [
        "Cats have 4 legs.</think>\n<answer> ",
        "Sure: <answer>",
        "3 facts of 9 are there. The score is ",
    ]
    assert [str(d) for d in scores.defects] == ["unscored: d2: too long"]


def test_a_turn_begins_with_the_templates_prefill(tmp_path: Path):
    """It is fed back before the model's own text, and reasoning that it opens must end before an answer counts."""
    template = tmp_path / "t.yaml"
    template.write_text("about: t\nmethod: erank\ntext: '{query} {passage}'\nprefill: '<think>'\n", encoding="utf-8")
    text = "Easy.</think><answer>4</answer>"
    likelihoods = {(LogLikelihood, t, "4"): (0.0,) for t in TEXTS[:2]}
    backend = Table(
        {(Generate, t, None): said(text) for t in TEXTS[:2]}
        | {(Generate, TEXTS[2], None): said("As in <answer>5</answer>", cut_off=True)}
        | likelihoods
    )
    scores = outcome_of(ERank(erank(prompt=str(template)), backend), backend).scores
    np.testing.assert_array_equal(scores.scores, [4.0, 4.0, math.nan])
    assert {c.prompt.prefill for c in backend.batches[1]} == {"<think>Easy.</think><answer>"}
    assert scores.defects[0].kind == "cut_off"
    assert scores.rationales[:2] == ("Easy.", "Easy.")


def test_integers_as_they_are_and_what_is_none():
    backend = generated(said("<answer>7</answer>"), said("<answer>8.5</answer>"), said("<answer>11</answer>"))
    scores = outcome_of(ERank(erank("integer"), backend), backend).scores
    np.testing.assert_array_equal(scores.scores, [7.0, math.nan, math.nan])
    assert [d.kind for d in scores.defects] == ["unparsed", "out_of_range"]
    assert len(backend.batches) == 1


@pytest.mark.parametrize(
    ("result", "score", "kind"),
    [
        (said("The first 3 of 5", cut_off=True), math.nan, "cut_off"),
        (said("<answer>6</answer> and", cut_off=True), 6.0, None),
        (said("<think>as in <answer>5</answer>, 7", cut_off=True), math.nan, "cut_off"),
        (said("<answer>5</answer>?</think> <answer>2</answer>"), 2.0, None),
        (said("<answer>5</answer>?</think> 7"), 7.0, None),
        (said("I'm sorry, but I can't rate this 5"), math.nan, "refusal"),
        (said(" "), math.nan, "empty"),
        (said("7 of 9 facts, 8 of 9 words"), math.nan, "unparsed"),
    ],
)
def test_a_number_outside_the_answer_is_no_answer(result: Answer, score: float, kind: str | None):
    backend = generated(said("<answer>1</answer>"), result, said("<answer>0</answer>"))
    scores = outcome_of(ERank(erank("integer"), backend), backend).scores
    np.testing.assert_array_equal(scores.scores, [1.0, score, 0.0])
    assert [d.kind for d in scores.defects] == ([kind] if kind else [])


def test_sampling_is_as_the_settings_say():
    backend = generated(*[said("<answer>1</answer>")] * 3)
    outcome_of(ERank(erank("integer", temperature=0.6, seed=7, max_tokens=99), backend), backend)
    assert {(c.temperature, c.seed, c.max_tokens) for c in backend.calls} == {(0.6, 7, 99)}


@settings(deadline=None)
@given(st.text(alphabet="0123456789 ./-+,of", max_size=12), st.text(alphabet="019</>thinkaswer ", max_size=20))
def test_where_the_integer_stands(inside: str, before: str):
    """Whatever the text, what follows the part that is fed back begins with the integer."""
    from rerank_ray.ranking.erank import _Integer, _integer_in

    text = f"{before}<answer>{inside}</answer>"
    integer = _integer_in(said(text), "")
    if isinstance(integer, _Integer):
        assert text.startswith(integer.before)
        assert re.match(rf"0*{integer.value}(?!\d)", text[len(integer.before) :])


@pytest.mark.parametrize(
    ("text", "before"),
    [
        ("<answer>7</answer>\nThe document rates 7 out of 10.", "<answer>"),
        ("The score is 7. It mentions the 7 wonders.", "The score is "),
        ("İİİİİİİİİİ<ANSWER>7</ANSWER>", "İİİİİİİİİİ<ANSWER>"),
        ("Seven, 7 of them: score: 7", "Seven, 7 of them: score: "),
    ],
)
def test_the_integers_probability_is_asked_where_it_is_the_answer(text: str, before: str):
    from rerank_ray.ranking.erank import _Integer, _integer_in

    assert _integer_in(said(text), "") == _Integer(value=7, before=before)


def test_a_yes_in_reasoning_that_the_prefill_opened_is_no_answer(tmp_path: Path):
    template = tmp_path / "mine.yaml"
    text = (resources.files("rerank_ray.prompts") / "templates" / "yes_no.yaml").read_text()
    template.write_text(text + 'prefill: "<think>\\n"\n')
    backend = generated(said("Yes", 0.9), said("no</think>Yes", 0.9), said("hm", 0.9))
    scores = outcome_of(
        YesNo(YesNoSettings(model=MODEL, score="sampled", prompt=str(template)), backend), backend
    ).scores
    np.testing.assert_allclose(scores.scores, [math.nan, 1.9, math.nan])


# Every one of them


METHODS = {
    "log_odds": (YesNo, YesNoSettings(model=MODEL)),
    "probability": (YesNo, YesNoSettings(model=MODEL, score="probability")),
    "sampled": (YesNo, YesNoSettings(model=MODEL, score="sampled")),
    "top": (FineGrained, FineGrainedSettings(model=MODEL, score="top")),
    "integer": (ERank, erank("integer")),
}


@pytest.mark.parametrize("name", METHODS)
@given(gains=st.lists(st.integers(0, 10), min_size=1, max_size=12))
@settings(deadline=None, max_examples=25)
def test_an_oracle_ranks_perfectly(name: str, gains: list[int]):
    """Falling gain, ties in input order."""
    request, known = known_list([float(g) for g in gains])
    backend = LoneOracle(known)
    made, chosen = METHODS[name]
    method = made(chosen, backend)
    (outcome,) = scheduler.run(method, backend, [request])
    ranked = ranking_of(request, outcome.scores, method.name).doc_ids
    expected = sorted(range(len(gains)), key=lambda i: -gains[i])
    assert ranked == tuple(request.candidates[i].doc_id for i in expected)
    assert len(backend.calls) == len(gains)


class LoneOracle(Oracle):
    """Says the gain: as a log-likelihood, as an integer, or as the logit of the first of two labels."""

    def __init__(self, gains: dict[str, float]) -> None:
        super().__init__(gains, write=lambda g: f"Well. <answer>{int(g[0])}</answer>")

    def answer(self, call: Call) -> Result:
        if isinstance(call, LogLikelihood):
            return Answer(value=(self.gains[call.prompt.passages[0]] - 10.0,), usage=Usage(calls=1))
        return super().answer(call)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_adversaries_leave_defects_not_labels(name: str, adversary: str):
    """Each candidate has a finite score or a defect of its own."""
    backend = Adversary(*ADVERSARIES[adversary])
    made, chosen = METHODS[name]
    request = make_list(size=10)
    (outcome,) = scheduler.run(made(chosen, backend), backend, [request])
    if outcome.error:
        assert "no candidate could be scored" in outcome.error
    else:
        missing = [c.doc_id for c, s in zip(request.candidates, outcome.scores.scores, strict=True) if math.isnan(s)]
        assert [str(d).split(": ")[1] for d in outcome.scores.defects] == missing
    if adversary in ("garbage", "refusals", "failures"):
        assert outcome.error


@pytest.mark.parametrize("name", METHODS)
def test_scores_are_the_same_alone_and_among_64(name: str):
    made, chosen = METHODS[name]
    requests, known = [], {}
    for i in range(64):
        request, gains = known_list([float((i * 7 + j) % 11) for j in range(1 + i % 5)], f"q{i}")
        requests.append(request)
        known |= gains
    backend = LoneOracle(known)
    method = made(chosen, backend)
    together = scheduler.run(method, backend, requests)
    for i in (0, 17, 63):
        (alone,) = scheduler.run(method, backend, [requests[i]])
        assert alone.scores == together[i].scores


@pytest.mark.parametrize(
    ("chosen", "needed"),
    [
        (FineGrainedSettings(model=MODEL), "NextToken"),
        (FineGrainedSettings(model=MODEL, read="log_likelihood"), "LogLikelihood"),
        (FineGrainedSettings(model=MODEL, score="top"), "LogLikelihood"),
        (erank(), "'Generate', 'LogLikelihood'"),
        (YesNoSettings(model=MODEL), "NextToken"),
        (YesNoSettings(model=MODEL, score="sampled"), "Generate"),
    ],
)
def test_a_backend_that_answers_nothing_is_refused_with_the_call(chosen, needed: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Fake, "answers", frozenset())
    with pytest.raises(ConfigError, match=f"needs .*{needed}.*does not answer"):
        Ranker(chosen)


# Formats of published checkpoints


def test_monot5s_format():
    prompt = load_template("monot5", "yes_no").prompt(QUERY, PASSAGE)
    assert (prompt.parts, prompt.chat) == (("Query: what is a cat Document: ", " Relevant:"), False)
    assert load_template("monot5", "yes_no").labels == ("true", "false")


def test_qwen3_rerankers_format():
    """System, user and prefilled turn as its model card gives them."""
    template = load_template("qwen3_reranker", "yes_no")
    prompt = template.prompt(QUERY, PASSAGE)
    assert prompt.system == (
        "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
        'Note that the answer can only be "yes" or "no".'
    )
    instruction = "Given a web search query, retrieve relevant passages that answer the query"
    assert prompt.parts == (f"<Instruct>: {instruction}\n<Query>: what is a cat\n<Document>: ", "")
    assert (prompt.prefill, template.labels) == ("<think>\n\n</think>\n\n", ("yes", "no"))
    own = template.prompt(Query(query_id="q", text="cat", instruction="Find cats"), PASSAGE)
    assert own.parts[0].startswith("<Instruct>: Find cats\n")


def test_proranks_format():
    """As the published reranker (mixedbread, v2) puts it together for a query without instruction."""
    template = load_template("prorank", "yes_no")
    prompt = template.prompt(QUERY, PASSAGE)
    assert prompt.system == "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    assert prompt.parts == (
        "query: what is a cat\ndocument: ",
        "\nYou are a search relevance expert who evaluates how well documents match search queries. For each "
        "query-document pair, carefully analyze the semantic relationship between them, then provide your binary "
        "relevance judgment (0 for not relevant, 1 for relevant).\nRelevance:",
    )
    assert template.labels == ("1", "0")


def test_an_answer_that_leaves_no_room_for_the_prompt_is_refused_at_the_start(tiny_llama: Path):
    """Otherwise every row of the job would be an error."""
    model = HFCausalSettings(path=str(tiny_llama), max_length=1024)
    with pytest.raises(ModelError, match=r"the prompt takes .* max_length leaves"):
        Ranker(ERankSettings(model=model, max_tokens=1024))
