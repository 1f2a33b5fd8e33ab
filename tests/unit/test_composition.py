"""Ensembles, cascades and selective reranking: by hand, what must hold for any scores, and what becomes of failures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pytest
from fixtures.rows import make_list
from hypothesis import given, settings
from hypothesis import strategies as st

from rerank_ray import config
from rerank_ray.errors import ConfigError, InputError, ModelError
from rerank_ray.models.fake import Fake
from rerank_ray.ranking import rankers
from rerank_ray.ranking.composition import Cascade, Child, Ensemble, Selective
from rerank_ray.ranking.rankers import Ranker, preflight
from rerank_ray.ranking.scheduler import Outcome
from rerank_ray.records import CandidateList, Defect, DefectKind, Scores, Usage, ranking_of
from rerank_ray.schema import CANDIDATES, candidate_row, labels_from_row
from rerank_ray.settings.jobs import LabelSettings
from rerank_ray.settings.models import CrossEncoderSettings, FakeSettings
from rerank_ray.settings.rankers import (
    BM25Settings,
    CascadeSettings,
    CascadeStageSettings,
    CrossEncoderRankerSettings,
    EnsembleSettings,
    FirstStageSettings,
    FusionMethod,
    ImportedSettings,
    SelectiveSettings,
    YesNoSettings,
)
from rerank_ray.stages import RankStage
from rerank_ray.uncertainty import uncertainty_of

NAN = math.nan
FIRST = FirstStageSettings()


class Table:
    """A ranker that reads its scores from a table and notes what it was asked: doc id -> score, NaN is a defect."""

    def __init__(self, scores: dict[str, float], *, rationales: bool = False, fails_on: str = "") -> None:
        self.scores, self.rationales, self.fails_on = scores, rationales, fails_on
        self.asked: list[list[tuple[str, ...]]] = []

    def child(self, path: str) -> Child:
        return Child(path=path, name=path.upper(), rank=self.rank)

    def rank(self, requests: Sequence[CandidateList]) -> list[Outcome]:
        self.asked.append([tuple(c.doc_id for c in r.candidates) for r in requests])
        return [self._outcome(r) for r in requests]

    def _outcome(self, request: CandidateList) -> Outcome:
        usage = Usage(calls=len(request))
        if request.query.query_id == self.fails_on:
            return Outcome(request=request, scores=None, usage=usage, error="boom")
        ids = [c.doc_id for c in request.candidates]
        scores = tuple(self.scores[d] for d in ids)
        defects = tuple(
            Defect(kind=DefectKind.UNSCORED, detail=d) for d, s in zip(ids, scores, strict=True) if math.isnan(s)
        )
        texts = tuple(f"why {d}" for d in ids) if self.rationales else None
        return Outcome(request=request, scores=Scores(scores=scores, rationales=texts, defects=defects), usage=usage)


def table(*scores: float, **arguments) -> Table:
    return Table({f"d{i}": s for i, s in enumerate(scores)}, **arguments)


def cascade(*stages: tuple[Table, int | None]) -> Cascade:
    chosen = CascadeSettings(stages=[CascadeStageSettings(ranker=FIRST, keep=keep) for _, keep in stages])
    return Cascade(chosen, {p: t.child(p) for p, (t, _) in zip(chosen.children, stages, strict=True)})


def ensemble(*tables: Table, **arguments) -> Ensemble:
    chosen = EnsembleSettings(rankers=[FIRST] * len(tables), **arguments)
    return Ensemble(chosen, {p: t.child(p) for p, t in zip(chosen.children, tables, strict=True)})


def selective(cheap: Table, expensive: Table, **arguments) -> Selective:
    chosen = SelectiveSettings(cheap=FIRST, expensive=FIRST, **arguments)
    return Selective(chosen, {"cheap": cheap.child("cheap"), "expensive": expensive.child("expensive")})


def one(composition, size: int = 3, **arguments) -> Outcome:
    (outcome,) = composition.rank([make_list("q1", size, **arguments)])
    return outcome


def order_of(outcome: Outcome) -> tuple[str, ...]:
    return ranking_of(outcome.request, outcome.scores, "").doc_ids


def stored(outcome: Outcome) -> tuple[str, ...]:
    """The order that float32, which labels are stored in, leaves."""
    scores = Scores(scores=tuple(float(np.float32(s)) for s in outcome.scores.scores))
    return ranking_of(outcome.request, scores, "").doc_ids


# Ensembles


def test_an_ensemble_by_hand():
    """minmax of (0, 1, 2) and (30, 10, 20) at weights 1 and 3: (0 + 3)/4, (1/2 + 0)/4, (1 + 3/2)/4. The deviations: 0
    and 1 around 3/4, 1/2 and 0 around 1/8, 1 and 1/2 around 5/8, each with variance w₁w₂/(w₁+w₂)²·d² = 3/16·d²."""
    made = ensemble(table(0.0, 1.0, 2.0), table(30.0, 10.0, 20.0), combine="minmax", weights=[1.0, 3.0])
    outcome = one(made)
    assert outcome.scores.scores == pytest.approx((0.75, 0.125, 0.625))
    root = math.sqrt(3) / 4
    assert outcome.scores.uncertainty == pytest.approx((root, root / 2, root / 2))
    assert outcome.usage == Usage(calls=6)
    assert made.name == "ensemble:minmax:1*(RANKERS.0)+3*(RANKERS.1)"


def test_defects_and_rationales_of_children_are_kept():
    """A defect says whose it is; a candidate that no ranker scored has one more."""
    made = ensemble(table(1.0, NAN, NAN, rationales=True), table(NAN, 3.0, NAN), table(1.0, 2.0, NAN, rationales=True))
    outcome = one(made)
    assert math.isnan(outcome.scores.scores[2])
    assert [str(d) for d in outcome.scores.defects] == [
        "unscored: rankers.0: d1",
        "unscored: rankers.0: d2",
        "unscored: rankers.1: d0",
        "unscored: rankers.1: d2",
        "unscored: rankers.2: d2",
        "unscored: d2: no teacher scored it",
    ]
    assert outcome.scores.rationales == tuple(f"why d{i}\n\nwhy d{i}" for i in range(3))
    assert one(ensemble(table(1.0, 2.0, 3.0))).scores.rationales is None


def test_rationales_of_calls_are_no_candidates_own():
    """Three windows over three candidates give three texts, none of which is about one of them."""

    class Windows(Table):
        def _outcome(self, request: CandidateList) -> Outcome:
            outcome = super()._outcome(request)
            texts = ("window 1", "window 2", "window 3")
            scores = replace(outcome.scores, rationales=texts, rationales_are_of_calls=True)
            return replace(outcome, scores=scores)

    assert one(ensemble(Windows({"d0": 3.0, "d1": 2.0, "d2": 1.0}))).scores.rationales is None


def test_a_childs_error_is_the_rows_and_ends_its_cost():
    first, second, third = table(1.0, 2.0, 3.0), table(1.0, 2.0, 3.0, fails_on="q1"), table(1.0, 2.0, 3.0)
    outcomes = ensemble(first, second, third).rank([make_list("q0"), make_list("q1")])
    assert [o.error for o in outcomes] == [None, "rankers.1: boom"]
    assert outcomes[1].scores is None
    assert [o.usage.calls for o in outcomes] == [9, 6]
    assert [len(batch) for t in (first, second, third) for batch in t.asked] == [2, 2, 1]


real = st.floats(-1e6, 1e6, width=32)
scores_or_none = st.lists(real | st.just(NAN), min_size=1, max_size=9).filter(lambda s: not all(map(math.isnan, s)))


@settings(deadline=None)
@given(scores=scores_or_none, method=st.sampled_from(get_args(FusionMethod)))
def test_an_ensemble_of_one_ranker_keeps_its_order(scores: list[float], method: str):
    """But for candidates so close that z-scores round them together."""
    outcome = one(ensemble(table(*scores), combine=method), len(scores))
    expected = ranking_of(outcome.request, Scores(scores=tuple(scores)), "")
    if method in ("rrf", "borda", "kemeny"):
        assert order_of(outcome) == expected.doc_ids
    ranked = [outcome.scores.scores[int(d[1:])] for d in expected.doc_ids]
    known = [s for s in ranked if not math.isnan(s)]
    assert known == sorted(known, reverse=True)
    assert len(known) == sum(not math.isnan(s) for s in scores)


# Cascades


def test_a_cascade_by_hand():
    """Five candidates. The first stage orders d4 d3 d2 d1 d0 (50 … 10); the second takes the top three of them and
    orders d2 d4 d3 (7, 6, 5). d1 and d0, 10 apart, go just below 5 and stay 10 apart."""
    cheap, strong = table(10.0, 20.0, 30.0, 40.0, 50.0), table(NAN, NAN, 7.0, 5.0, 6.0)
    made = cascade((cheap, None), (strong, 3))
    outcome = one(made, 5)
    assert strong.asked == [[("d4", "d3", "d2")]]
    below = float(np.nextafter(np.float32(5), np.float32(0)))
    assert outcome.scores.scores == (below - 10.0, below, 7.0, 5.0, 6.0)
    assert order_of(outcome) == ("d2", "d4", "d3", "d1", "d0")
    assert outcome.usage == Usage(calls=8)
    assert outcome.scores.defects == ()
    assert made.name == "cascade:(STAGES.0.RANKER)>3(STAGES.1.RANKER)"


def test_what_no_stage_reranks_keeps_the_first_stages_differences():
    outcome = one(cascade((table(1.0, 2.0, NAN, NAN), 2)), 4, scores=[9.0, 8.0, 7.0, 3.0])
    below = float(np.nextafter(np.float32(1), np.float32(0)))
    assert outcome.scores.scores == (1.0, 2.0, below, below - 4.0)


def test_without_first_stage_scores_ranks_are_one_apart():
    outcome = one(cascade((table(1.0, 2.0, NAN, NAN), 2)), 4)
    below = float(np.nextafter(np.float32(1), np.float32(0)))
    assert outcome.scores.scores == (1.0, 2.0, below, below - 1.0)


def test_an_earlier_stage_settles_the_ties_of_a_later_one():
    """The first stage reverses the three, the second finds them alike: d2 d1 d0 stays, by the smallest steps."""
    outcome = one(cascade((table(1.0, 2.0, 3.0), None), (table(0.5, 0.5, 0.5), None)))
    one_below = np.nextafter(np.float32(0.5), np.float32(0))
    two_below = np.nextafter(one_below, np.float32(0))
    assert outcome.scores.scores == (float(two_below), float(one_below), 0.5)
    untouched = one(cascade((table(0.5, 0.5, 0.5), None)))
    assert untouched.scores.scores == (0.5, 0.5, 0.5)


def test_what_a_stage_can_not_score_is_unscored_unless_a_later_one_scores_it():
    """d0 fails in the first stage and is last; the second stage reranks the top two, or everything."""
    first, second = (table(NAN, 2.0, 3.0), None), table(5.0, 6.0, 4.0)
    top = one(cascade(first, (second, 2)))
    np.testing.assert_array_equal(top.scores.scores, [NAN, 6.0, 4.0])
    assert [str(d) for d in top.scores.defects] == ["unscored: stages.0.ranker: d0"]
    everything = one(cascade(first, (second, None)))
    assert everything.scores.scores == (5.0, 6.0, 4.0)


def test_stages_ask_for_all_queries_at_once_and_drop_failed_ones():
    cheap, strong = table(1.0, 2.0, 3.0, fails_on="q1"), table(1.0, 2.0, 3.0)
    outcomes = cascade((cheap, None), (strong, 2)).rank([make_list(f"q{i}") for i in range(3)])
    assert [len(batch) for batch in strong.asked] == [2]
    assert [o.error for o in outcomes] == [None, "stages.0.ranker: boom", None]
    assert [o.usage.calls for o in outcomes] == [5, 3, 5]


@given(
    data=st.data(),
    size=st.integers(1, 8),
    keeps=st.lists(st.none() | st.integers(1, 9), min_size=1, max_size=4),
)
def test_a_cascade_keeps_every_candidate_once_and_its_scores_are_its_order(data, size: int, keeps: list):
    """Against the plain thing: sort the top of a list of ids, stage by stage. Few values, so that there are ties."""
    few = st.sampled_from([0.0, 1.0, 1.0 + 1e-9, -3.5, 1e6])
    tables = [table(*data.draw(st.lists(few, min_size=size, max_size=size))) for _ in keeps]
    outcome = one(cascade(*zip(tables, keeps, strict=True)), size)
    expected = [f"d{i}" for i in range(size)]
    for ranker, keep in zip(tables, keeps, strict=True):
        head = sorted(expected[:keep], key=lambda d: -ranker.scores[d])
        expected = head + expected[len(head) :]
    assert list(order_of(outcome)) == expected
    assert list(stored(outcome)) == expected
    assert sorted(expected) == [f"d{i}" for i in range(size)]


# Selective


@pytest.mark.parametrize(
    ("scores", "k", "criterion", "expected"),
    [
        # Two alike: p = ½, ½.
        ([1.0, 1.0, -9.0], 2, "entropy", 1.0),
        ([1.0, 1.0, -9.0], 2, "margin", 1.0),
        # p = ¾, ¼: entropy (¾·ln(4/3) + ¼·ln 4)/ln 2 = 2 − ¾·log₂3 = 0.811278; margin 1 − ½.
        ([0.0, math.log(3.0)], 2, "entropy", 2 - 0.75 * math.log2(3)),
        ([0.0, math.log(3.0)], 2, "margin", 0.5),
        # p = ½, ¼, ¼ of the top three: (½·ln 2 + 2·¼·ln 4)/ln 3 = 1.5·ln 2/ln 3.
        ([0.0, math.log(2.0), 0.0, -50.0], 3, "entropy", 1.5 * math.log(2) / math.log(3)),
        ([0.0, math.log(2.0), 0.0, -50.0], 3, "margin", 0.75),
        # No order to be uncertain about, or none at all.
        ([3.0], 5, "entropy", 0.0),
        ([3.0, NAN], 5, "margin", 0.0),
        ([2000.0, 0.0], 2, "entropy", 0.0),
    ],
)
def test_uncertainty_by_hand(scores: list[float], k: int, criterion: str, expected: float):
    assert uncertainty_of(scores, k, criterion) == pytest.approx(expected, abs=1e-6)


@given(
    st.lists(st.floats(-50, 50) | st.just(NAN), max_size=9), st.integers(1, 9), st.sampled_from(["entropy", "margin"])
)
def test_uncertainty_is_a_share_and_that_of_the_stored_scores(scores: list[float], k: int, criterion: str):
    """Labels hold float32: the threshold found on them has to part the queries of a later run in the same way."""
    value = uncertainty_of(scores, k, criterion)
    assert 0.0 <= value <= 1.0
    assert value == uncertainty_of([float(np.float32(s)) for s in scores], k, criterion)


def test_only_uncertain_queries_take_the_expensive_ranker():
    """q0's cheap top two are 5 apart (uncertainty 2·σ(−5) = 0.013), q1's 0.1 (0.95): q1 alone passes 0.5."""

    class PerQuery(Table):
        """Cheap scores by query."""

        def _outcome(self, request: CandidateList) -> Outcome:
            self.scores = {"q0": {"d0": 5.0, "d1": 0.0, "d2": -1.0}, "q1": {"d0": 0.1, "d1": 0.0, "d2": -1.0}}[
                request.query.query_id
            ]
            return super()._outcome(request)

    cheap, expensive = PerQuery({}), table(1.0, 2.0, NAN)
    made = selective(cheap, expensive, k=2, criterion="margin", threshold=0.5)
    sure, unsure = made.rank([make_list("q0"), make_list("q1")])
    assert expensive.asked == [[("d0", "d1")]]
    assert sure.scores.scores == (5.0, 0.0, -1.0)
    assert order_of(unsure) == ("d1", "d0", "d2")
    assert [o.usage.calls for o in (sure, unsure)] == [3, 5]
    assert made.name == "selective:margin@2>0.5:(EXPENSIVE)|(CHEAP)"


@given(
    data=st.data(),
    size=st.integers(1, 7),
    criterion=st.sampled_from(["entropy", "margin"]),
)
def test_a_threshold_at_its_extremes_is_the_cheap_or_the_expensive_ranker(data, size: int, criterion: str):
    drawn = [table(*data.draw(st.lists(real, min_size=size, max_size=size, unique=True))) for _ in range(2)]
    for threshold, ranker in ((1.0, drawn[0]), (-1.0, drawn[1])):
        outcome = one(selective(*drawn, k=9, criterion=criterion, threshold=threshold), size)
        assert outcome.scores.scores == tuple(ranker.scores.values())


# Real rankers


def fake(seed: int = 0, **model) -> CrossEncoderRankerSettings:
    return CrossEncoderRankerSettings(model=FakeSettings(seed=seed, **model))


NESTED = CascadeSettings(
    stages=[
        CascadeStageSettings(ranker=EnsembleSettings(rankers=[fake(1), YesNoSettings(model=FakeSettings(seed=1))])),
        CascadeStageSettings(
            ranker=SelectiveSettings(cheap=fake(2), expensive=fake(3), k=3, criterion="margin", threshold=0.8), keep=5
        ),
    ]
)


def test_nested_compositions_give_a_query_the_same_alone_and_in_company():
    requests = [make_list(f"q{i}", 1 + i) for i in range(9)]
    ranker = Ranker(NESTED)
    together = ranker.rank(requests)
    for request, outcome in zip(requests, together, strict=True):
        (alone,) = ranker.rank([request])
        assert (alone.scores, alone.usage, alone.error) == (outcome.scores, outcome.usage, None)
    # Two calls a candidate, one more for each of the top five, and three more where the selective stage is uncertain.
    extra = [o.usage.calls - 2 * len(o.request) - min(5, len(o.request)) for o in together]
    assert {0, 3} <= set(extra) <= {0, 1, 2, 3}
    assert ranker.exit_layer is None
    assert ranker.rank([]) == []


def test_equal_models_are_loaded_once(monkeypatch: pytest.MonkeyPatch):
    """Three of the nested config's: seeds 1, 2 and 3; the two rankers of seed 1 share theirs."""
    loads = []
    monkeypatch.setattr(Fake, "parameters", 10)
    monkeypatch.setattr(rankers, "load_backend", lambda model: loads.append(model) or Fake(model))
    assert Ranker(NESTED).parameters == 30
    assert [m.seed for m in loads] == [1, 2, 3]


def test_a_multi_teacher_label_row_has_its_disagreement():
    teacher = EnsembleSettings(rankers=[fake(1), fake(2), fake(3)])
    source = pa.Table.from_pylist([candidate_row(make_list("q1", 4))], schema=CANDIDATES)
    (row,) = RankStage(teacher, "labels")(source).to_pylist()
    labels = labels_from_row(row)
    alone = np.array([Ranker(fake(seed)).rank([labels.candidate_list])[0].scores.scores for seed in (1, 2, 3)])
    zscores = (alone - alone.mean(1, keepdims=True)) / alone.std(1, keepdims=True)
    assert labels.scores == pytest.approx(zscores.mean(0), rel=1e-5)
    assert labels.uncertainty == pytest.approx(zscores.std(0), rel=1e-5)
    assert row["usage"]["calls"] == 12
    assert labels.teacher.count("cross_encoder:fake:seed=") == 3


def test_a_teacher_that_fails_leaves_the_row_without_labels():
    teacher = EnsembleSettings(rankers=[fake(1), fake(2, fail_on="document")])
    (outcome,) = Ranker(teacher).rank([make_list("q1")])
    assert outcome.scores is None
    assert outcome.error.startswith("rankers.1: no candidate could be scored, for example unscored: d0")
    assert [str(d).split(": the call")[0] for d in outcome.defects] == [f"unscored: rankers.1: d{i}" for i in range(3)]


@pytest.mark.parametrize(
    ("child", "error", "said"),
    [
        (CrossEncoderRankerSettings(model=CrossEncoderSettings(path="./none")), ModelError, "no such model folder"),
        (BM25Settings(corpus="./none.jsonl"), InputError, "no such file"),
        (YesNoSettings(model=FakeSettings(), prompt="none"), ConfigError, "no built-in template 'none'"),
        (ImportedSettings(run=["./none"]), InputError, "no such file"),
    ],
)
def test_preflight_looks_into_compositions(child, error: type, said: str):
    inner = EnsembleSettings(rankers=[FIRST, child])
    with pytest.raises(error, match=rf"^stages\.1\.ranker: rankers\.1: .*{said}"):
        preflight(CascadeSettings(stages=[CascadeStageSettings(ranker=r) for r in (FIRST, inner)]))
    with pytest.raises(error, match=rf"^expensive: .*{said}"):
        preflight(SelectiveSettings(cheap=FIRST, expensive=child, k=1, threshold=0.5))


def test_faults_inside_compositions_are_listed_with_their_path(tmp_path: Path):
    (tmp_path / "label.yaml").write_text(
        """
        input: candidates
        teacher:
          method: cascade
          stages:
            - ranker: {method: first_stage}
            - keep: 0
              ranker:
                method: ensemble
                rankers:
                  - {method: yes_no, model: {kind: hf_causal, path: p, dtyp: float32}}
                  - {method: yesno}
                  - {method: selective, cheap: {method: first_stage}, k: 3, threshold: 2}
        """,
        encoding="utf-8",
    )
    with pytest.raises(ConfigError) as caught:
        config.load(LabelSettings, tmp_path / "label.yaml")
    inner = "teacher.stages.1.ranker.rankers"
    found = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert f"{inner}.0.model.dtyp: unknown key; did you mean 'dtype'?" in found
    assert any(line.startswith(f"{inner}.1: Input tag 'yesno' found using 'method'") for line in found)
    assert f"{inner}.2.expensive: required, and missing" in found
    assert f"{inner}.2.threshold: Input should be less than or equal to 1 (given: 2)" in found
    assert "teacher.stages.1.keep: Input should be greater than 0 (given: 0)" in found
    assert len(found) == 5


def test_weights_are_one_for_each_ranker():
    with pytest.raises(ValueError, match="weights has 1 entries for 2 rankers"):
        EnsembleSettings(rankers=[FIRST, FIRST], weights=[1.0])


def test_a_composition_survives_its_config_file():
    settings = LabelSettings(input="i", teacher=NESTED)
    assert config.validate(LabelSettings, settings.model_dump(mode="json"), "config.yaml") == settings
