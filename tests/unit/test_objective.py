"""The objective: which targets each term sees, how terms are weighed, and which queries they skip."""

from __future__ import annotations

import dataclasses
import math
import typing
from pathlib import Path

import pytest
import torch
from fixtures.rows import label_row, make_labels, make_list, write_labels
from pydantic import ValidationError

from rerank_ray.config import validate
from rerank_ray.distill.labels import LabelSet
from rerank_ray.distill.targets import NEEDS, Targets, check_objective, objective, term_names
from rerank_ray.errors import ConfigError, InputError
from rerank_ray.losses.cross_entropy import binary_cross_entropy, localized_contrastive, softmax_cross_entropy
from rerank_ray.losses.divergence import kl
from rerank_ray.losses.lambdaloss import lambdarank, ndcg_loss2, ndcg_loss2pp
from rerank_ray.losses.listwise import listmle, listnet, partial_listmle, position_aware_listmle
from rerank_ray.losses.masking import masked_zscore
from rerank_ray.losses.pairwise import ranknet, soft_ranknet, weighted_ranknet
from rerank_ray.losses.regression import adr_mse, margin_mse, mse
from rerank_ray.settings.distill import DistillSettings
from rerank_ray.settings.objective import LossName, LossSettings, ObjectiveSettings

TARGETS = Targets(
    teacher=torch.tensor([[3.0, 1.0, 0.0], [5.0, 2.0, 0.0]]),
    gains=torch.tensor([[0.0, 2.0, 1.0], [1.0, 0.0, 0.0]]),
    mask=torch.tensor([[True, True, True], [True, True, False]]),
    confidence=torch.tensor([1.0, 0.25]),
)
SCORES = torch.tensor([[0.0, 1.0, 2.0], [1.0, -0.5, 0.0]])
LAYERS = torch.stack([SCORES, torch.tensor([[1.0, 0.5, -1.0], [0.0, 2.0, 0.0]])])


def of(*losses: LossSettings, **more) -> ObjectiveSettings:
    return ObjectiveSettings(losses=losses, **more)


def one(targets: Targets = TARGETS, student: torch.Tensor = SCORES, **term) -> torch.Tensor:
    """The loss of an objective of one term on one layer, [Q]."""
    terms = objective(student[None], targets, of(LossSettings(**term)))
    return next(iter(terms.values())).loss


def test_the_objective_is_the_weighted_sum_of_its_terms():
    """On two layers every term is a mean over both, and self-distillation is added with its own weight."""
    chosen = of(
        LossSettings(loss="kl", weight=2.0, temperature=2.0),
        LossSettings(loss="ranknet", weight=0.5, target="gains"),
        LossSettings(loss="ce", weight=3.0, positives=2),
        self_distillation=0.25,
    )
    terms = objective(LAYERS, TARGETS, chosen)
    mask = TARGETS.mask
    first_two = torch.tensor([[True, True, False]] * 2)
    expected = {
        "kl": sum(kl(s, TARGETS.teacher, mask, 2.0) for s in LAYERS) / 2,
        "ranknet": sum(ranknet(s, TARGETS.gains, mask) for s in LAYERS) / 2,
        # The second query's group has two candidates, and so no negative.
        "ce": sum(softmax_cross_entropy(s, first_two, mask) for s in LAYERS) / 2 * torch.tensor([1.0, 0.0]),
        "self_distillation": kl(LAYERS[0], LAYERS[1], mask),
    }
    weights = {"kl": 2.0, "ranknet": 0.5, "ce": 3.0, "self_distillation": 0.25}
    for name, value in expected.items():
        torch.testing.assert_close(terms[name].loss, value)
    torch.testing.assert_close(terms["total"].loss, sum(weights[n] * v for n, v in expected.items()))


def test_the_objective_of_one_layer_has_no_self_distillation():
    terms = objective(torch.zeros(1, 2, 3), TARGETS, ObjectiveSettings())
    assert set(terms) == {"kl", "ranknet", "ce", "total"}


RECIPROCAL_RANKS = torch.tensor([[1.0, 1 / 2, 1 / 3], [1.0, 1 / 2, 0.0]])
FIRST = torch.tensor([[True, False, False], [True, False, False]])
T, G, M = TARGETS.teacher, TARGETS.gains, TARGETS.mask
TERMS = {
    "kl": ({"temperature": 2.0}, kl(SCORES, T, M, 2.0)),
    "ranknet": ({"target": "gains"}, ranknet(SCORES, G, M)),
    "soft_ranknet": ({"temperature": 2.0}, soft_ranknet(SCORES, T, M, 2.0)),
    "weighted_ranknet": ({"target": "gains"}, weighted_ranknet(SCORES, G, M)),
    "ce": ({}, softmax_cross_entropy(SCORES, FIRST, M)),
    "lce": ({"target": "gains"}, localized_contrastive(SCORES, G > 0, M)),
    "bce": ({}, binary_cross_entropy(SCORES, FIRST, M)),
    "listnet": ({"target": "ranks", "temperature": 0.8}, listnet(SCORES, RECIPROCAL_RANKS, M, 0.8)),
    "listmle": ({"target": "gains"}, listmle(SCORES, G, M)),
    "position_aware_listmle": ({"target": "gains"}, position_aware_listmle(SCORES, G, M)),
    "cprd": ({"cutoff": 1}, partial_listmle(SCORES, T, FIRST, M, 1) * torch.tensor([1.0, 0.0])),
    "mse": ({"scores": "zscore"}, mse(SCORES, masked_zscore(T, M), M)),
    "margin_mse": ({"scores": "zscore"}, margin_mse(SCORES, masked_zscore(T, M), M)),
    "adr_mse": ({"temperature": 0.5}, adr_mse(SCORES, T, M, 0.5)),
    "lambdarank": ({"target": "gains", "temperature": 0.5}, lambdarank(SCORES, G, M, 2.0)),
    "ndcg_loss2": ({"target": "ranks"}, ndcg_loss2(SCORES, RECIPROCAL_RANKS, M)),
    "ndcg_loss2pp": ({"target": "gains", "temperature": 0.5}, ndcg_loss2pp(SCORES, G, M, 2.0)),
}


@pytest.mark.parametrize("name", TERMS)
def test_each_loss_by_its_name(name: str):
    """Each gets the target, the temperature and the positives that its term asks for."""
    options, expected = TERMS[name]
    torch.testing.assert_close(one(loss=name, **options), expected)


def test_every_name_is_a_loss():
    assert set(typing.get_args(LossName)) == set(TERMS) == set(NEEDS)


def test_a_zscored_teacher_has_no_scale():
    """The z-scored teacher is the same for the teacher's scores times 10 plus 3; the raw one is not."""
    other = Targets(teacher=10 * T + 3, gains=G, mask=M, confidence=TARGETS.confidence)
    for name in ("kl", "listnet", "soft_ranknet", "mse", "margin_mse"):
        torch.testing.assert_close(one(loss=name, scores="zscore"), one(other, loss=name, scores="zscore"))
        assert not torch.allclose(one(loss=name), one(other, loss=name))


def test_cross_entropy_on_gains_takes_what_has_a_gain():
    """Query 1 has gains 0, 2, 1: the positives are the second and third candidate, at scores of ⅓ each: ln 3."""
    value = one(student=torch.zeros(2, 3), loss="ce", target="gains")
    torch.testing.assert_close(value, torch.tensor([math.log(3), math.log(2)]))


def test_layer_weights():
    """Weights 1 and 3 of two layers; a layer of weight 0 gets no gradient."""
    by_layer = [kl(s, T, M) for s in LAYERS]
    chosen = of(LossSettings(loss="kl", layer_weights=(1.0, 3.0)), self_distillation=0.0)
    torch.testing.assert_close(objective(LAYERS, TARGETS, chosen)["kl"].loss, (by_layer[0] + 3 * by_layer[1]) / 4)
    leaf = LAYERS.clone().requires_grad_()
    chosen = of(LossSettings(loss="kl", layer_weights=(0.0, 1.0)), self_distillation=0.0)
    objective(leaf, TARGETS, chosen)["total"].loss.sum().backward()
    assert leaf.grad[0].abs().sum() == 0
    assert leaf.grad[1].abs().sum() > 0


def test_queries_weigh_by_their_certainty():
    """Confidences 1 and ¼ weigh the total, self-distillation included; the terms are reported as they are."""
    equal = objective(LAYERS, TARGETS, of(LossSettings(loss="kl")))
    weighed = objective(LAYERS, TARGETS, of(LossSettings(loss="kl"), query_weights="uncertainty"))
    torch.testing.assert_close(weighed["kl"].loss, equal["kl"].loss)
    torch.testing.assert_close(weighed["total"].loss, equal["total"].loss * torch.tensor([1.0, 0.25]))


def test_confidence_by_hand():
    """Uncertainties 0.5, 1.5 and one unknown: 1 / (1 + 1); labels without any: 1."""
    labels = dataclasses.replace(make_labels([1.0, 2.0, math.nan]), uncertainty=(0.5, 1.5, math.nan))
    targets = Targets.of([(labels, [0]), (make_labels([1.0]), [0])])
    assert targets.confidence.tolist() == [0.5, 1.0]


# What can't teach


def groups(teacher: list[float], gains: list[float]) -> Targets:
    return Targets.of([(make_labels(teacher, gains=gains), range(len(teacher)))])


@pytest.mark.parametrize("name", TERMS)
def test_equal_targets_are_skipped(name: str):
    """A teacher without a preference, and gains that are all 0: the query adds nothing and is counted."""
    target = "ranks" if name.startswith(("lambda", "ndcg")) else "teacher"
    flat = groups([2.0, 2.0, 2.0], [0.0, 0.0, 0.0])
    for term in (LossSettings(loss=name, target=target), LossSettings(loss=name, target="gains")):
        leaf = torch.tensor([[[0.3, -1.0, 2.0]]], requires_grad=True)
        terms = objective(leaf, flat, of(term))
        if name == "bce" and term.target == "gains":
            assert not terms[name].skipped.any()
            continue
        assert terms[name].skipped.tolist() == [True]
        terms["total"].loss.sum().backward()
        assert terms["total"].loss.item() == 0
        assert leaf.grad.abs().sum() == 0


@pytest.mark.parametrize("name", ["lambdarank", "ndcg_loss2", "ndcg_loss2pp"])
def test_gains_of_nothing_but_junk_are_alike(name: str):
    """TREC's judges call pages -2 that are no page at all: for nDCG it is a gain of 0."""
    term = of(LossSettings(loss=name, target="gains"))
    skipped = [
        objective(torch.zeros(1, 1, 2), groups([2.0, 1.0], gains), term)[name].skipped.item()
        for gains in ([0.0, -2.0], [1.0, -2.0])
    ]
    assert skipped == [True, False]


@pytest.mark.parametrize("name", ["ce", "lce"])
def test_a_positive_needs_a_negative(name: str):
    """All positive, none positive, and one of each."""
    term = of(LossSettings(loss=name, target="gains"))
    skipped = [
        objective(torch.zeros(1, 1, 2), groups([2.0, 1.0], gains), term)[name].skipped.item()
        for gains in ([1.0, 2.0], [0.0, 0.0], [0.0, 1.0])
    ]
    assert skipped == [True, True, False]


def test_skipping_is_a_query_s_and_a_term_s_own():
    """The first query has no gain but a teacher's order; the second has both."""
    targets = Targets.of([(make_labels([2.0, 1.0]), [0, 1]), (make_labels([2.0, 1.0], gains=[0.0, 1.0]), [0, 1])])
    terms = objective(
        torch.zeros(1, 2, 2), targets, of(LossSettings(loss="kl"), LossSettings(loss="ce", target="gains"))
    )
    assert terms["kl"].skipped.tolist() == [False, False]
    assert terms["ce"].skipped.tolist() == [True, False]
    torch.testing.assert_close(terms["ce"].loss, torch.tensor([0.0, math.log(2)]))


def test_a_list_of_one_candidate_is_skipped_by_what_compares():
    targets = groups([2.0], [1.0])
    chosen = of(LossSettings(loss="ranknet"), LossSettings(loss="bce", target="gains"))
    terms = objective(torch.zeros(1, 1, 1), targets, chosen)
    assert terms["ranknet"].skipped.item()
    assert not terms["bce"].skipped.item()


def test_terms_of_the_same_loss_have_names_of_their_own():
    chosen = of(LossSettings(loss="kl"), LossSettings(loss="ce"), LossSettings(loss="kl", temperature=3.0))
    assert term_names(t.loss for t in chosen.losses) == ["kl", "ce", "kl_3"]
    assert set(objective(LAYERS[:1], TARGETS, chosen)) == {"kl", "ce", "kl_3", "total"}


# Before training


def open_labels(folder: Path, scores: list, gains: list, uncertainty: list | None = None) -> LabelSet:
    """40 queries with these scores, gains and uncertainties."""
    rows = []
    for i in range(40):
        row = label_row(make_list(f"q{i}", len(scores)), scores) | {"uncertainty": uncertainty}
        row["candidates"] = [c | {"label": g} for c, g in zip(row["candidates"], gains, strict=True)]
        rows.append(row)
    return LabelSet.open([write_labels(folder, rows)], 0.2, seed=0)


def test_labels_that_no_query_of_can_teach(tmp_path: Path):
    """The first term that would skip everything is named, with what is missing; the others pass."""
    no_gain = open_labels(tmp_path / "a", [2.0, 1.0], [None, None])
    flat = open_labels(tmp_path / "b", [2.0, 2.0], [None, 1.0])
    on_gains, on_teacher = LossSettings(loss="lce", target="gains"), LossSettings(loss="kl")
    check_objective(no_gain, of(on_teacher))
    check_objective(flat, of(on_gains))
    with pytest.raises(
        InputError, match=r"/a: objective\.losses\.1 \(lce on gains\): no query has both .* ingest with qrels"
    ):
        check_objective(no_gain, of(on_teacher, on_gains))
    with pytest.raises(
        InputError, match=r"/b: objective\.losses\.0 \(kl on teacher\): the teacher gave all candidates"
    ):
        check_objective(flat, of(on_teacher, on_gains))


def test_lists_of_one_candidate_are_not_blamed_on_the_teacher(tmp_path: Path):
    single = open_labels(tmp_path / "a", [2.0], [1.0])
    for term in (LossSettings(loss="kl"), LossSettings(loss="ce", target="gains")):
        with pytest.raises(InputError, match=r"/a: objective\.losses\.0 .* has one scored candidate alone"):
            check_objective(single, of(term))


@pytest.mark.parametrize(
    ("name", "gains", "message"),
    [
        ("ce", [0.0, -1.0], "no query has both"),
        ("lce", [1.0, 2.0], "no query has both"),
        ("bce", [0.0, -1.0], "no query has a candidate with a known gain above 0"),
        ("bce", [1.0, 2.0], "all candidates of all queries"),
        ("cprd", [0.0, 1.0], "no query has two candidates without"),
        ("kl", [0.0, -1.0], None),
        ("cprd", [None, None], None),
        ("bce", [0.0, 1.0], None),
    ],
)
def test_gains_are_refused_by_what_the_loss_needs(tmp_path: Path, name: str, gains: list, message: str | None):
    """ce and lce need a positive and a negative, bce both somewhere, cprd two negatives that the teacher orders."""
    data, chosen = open_labels(tmp_path / "a", [2.0, 1.0], gains), of(LossSettings(loss=name, target="gains"))
    if message is None:
        check_objective(data, chosen)
        return
    with pytest.raises(InputError, match=rf"/a: objective\.losses\.0 \({name} on gains\): {message}"):
        check_objective(data, chosen)


def test_gains_of_unscored_candidates_do_not_count(tmp_path: Path):
    """The only gain is of a candidate that the teacher left without a score, so no group holds it."""
    data = open_labels(tmp_path / "a", [2.0, 1.0, math.nan], [None, None, 1.0])
    with pytest.raises(InputError, match="ce on gains"):
        check_objective(data, of(LossSettings(loss="ce", target="gains")))


def test_weights_by_uncertainty_need_it(tmp_path: Path):
    chosen = of(LossSettings(loss="kl"), query_weights="uncertainty")
    check_objective(open_labels(tmp_path / "a", [2.0, 1.0], [None, None], [0.5, None]), chosen)
    without = open_labels(tmp_path / "b", [2.0, 1.0], [None, None])
    with pytest.raises(InputError, match=f"{len(without.train)} of {len(without.train)} training queries have none"):
        check_objective(without, chosen)


# Settings


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ({"loss": "ranknet", "temperature": 2.0}, "temperature changes nothing for ranknet"),
        ({"loss": "ce", "scores": "zscore"}, "scores changes nothing for ce"),
        ({"loss": "kl", "positives": 2}, "positives changes nothing for kl"),
        ({"loss": "listmle", "cutoff": 2}, "cutoff changes nothing for listmle"),
        ({"loss": "kl", "scores": "zscore", "target": "gains"}, "the target is gains"),
        ({"loss": "ce", "positives": 2, "target": "gains"}, "the positives are the candidates with a gain"),
        ({"loss": "lambdarank"}, "set target to ranks or to gains"),
        ({"loss": "kl", "layer_weights": (0.0, 0.0)}, "would teach nothing"),
        ({"loss": "kl", "layer_weights": (-1.0, 2.0)}, "greater than or equal to 0"),
        ({"loss": "huber"}, "Input should be"),
    ],
)
def test_terms_that_can_not_be_meant(term: dict, message: str):
    with pytest.raises(ValidationError, match=message):
        LossSettings(**term)


def test_layer_weights_fit_the_student():
    def build(layers: list[int] | None, weights: list[float]) -> DistillSettings:
        losses = [{"loss": "kl", "layer_weights": weights}]
        student = {"base": "b", "layers": layers}
        return DistillSettings.model_validate({"input": ["a"], "student": student, "objective": {"losses": losses}})

    build([2, 4], [1.0, 2.0])
    build(None, [1.0])
    with pytest.raises(ValidationError, match=r"losses\.0\.layer_weights has 3 entries for 2 layer"):
        build([2, 4], [1.0, 2.0, 3.0])


@pytest.mark.parametrize("loss", ["ce", "lce", "bce", "cprd"])
def test_which_of_two_equal_candidates_comes_first_changes_nothing(loss: str):
    """The teacher's best two tie, and one positive is asked for: both are."""
    targets = Targets(
        teacher=torch.tensor([[8.0, 8.0, 3.0, 1.0]]),
        gains=torch.zeros(1, 4),
        mask=torch.ones(1, 4, dtype=torch.bool),
        confidence=torch.ones(1),
    )
    scores = torch.tensor([[2.0, 0.0, 1.0, -1.0]])
    swapped = scores[:, [1, 0, 2, 3]]
    torch.testing.assert_close(one(targets, scores, loss=loss), one(targets, swapped, loss=loss))
    assert one(targets, scores, loss=loss) > 0


def test_ties_that_would_leave_no_negative_are_no_positives():
    """Scores 9, 3, 3, 3 and two positives: the one that stands out is the positive."""
    targets = Targets(
        teacher=torch.tensor([[9.0, 3.0, 3.0, 3.0]]),
        gains=torch.zeros(1, 4),
        mask=torch.ones(1, 4, dtype=torch.bool),
        confidence=torch.ones(1),
    )
    scores = torch.zeros(1, 4, requires_grad=True)
    one(targets, scores, loss="ce", positives=2).sum().backward()
    assert scores.grad[0, 0] < 0
    assert (scores.grad[0, 1:] > 0).all()


@pytest.mark.parametrize("loss", ["ce", "lce", "bce"])
def test_a_group_of_positives_alone_teaches_nothing(loss: str):
    """Scores 5 and 1 and two positives: cross-entropy would draw the two together, against the teacher."""
    targets = Targets(
        teacher=torch.tensor([[5.0, 1.0, 0.0], [5.0, 3.0, 1.0]]),
        gains=torch.zeros(2, 3),
        mask=torch.tensor([[True, True, False], [True, True, True]]),
        confidence=torch.ones(2),
    )
    scores = torch.zeros(2, 3, requires_grad=True)
    one(targets, scores, loss=loss, positives=2).sum().backward()
    assert not scores.grad[0].any()
    assert scores.grad[1].any()


@pytest.mark.parametrize(("loss", "positives", "group_size"), [("ce", 4, 4), ("kl", 1, 1), ("cprd", 9, 8)])
def test_groups_that_can_hold_no_negative_are_refused(loss: str, positives: int, group_size: int):
    given = {"loss": loss, **({} if positives == 1 else {"positives": positives})}
    content = {
        "input": ["runs/labels"],
        "student": {"base": "m"},
        "objective": {"losses": [given]},
        "sampling": {"group_size": group_size},
    }
    with pytest.raises(
        ConfigError, match=f"tells the teacher's first {positives} from others, and a group has no more"
    ):
        validate(DistillSettings, content, source="test")
    validate(DistillSettings, content | {"sampling": {"group_size": 10}}, source="test")
