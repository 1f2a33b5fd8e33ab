"""Each loss against values by hand, an independent implementation and finite differences; and what all losses share."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rerank_ray.losses.cross_entropy import binary_cross_entropy, localized_contrastive, softmax_cross_entropy
from rerank_ray.losses.divergence import kl
from rerank_ray.losses.lambdaloss import lambdarank, ndcg_loss2, ndcg_loss2pp
from rerank_ray.losses.layerwise import self_distillation
from rerank_ray.losses.listwise import listmle, listnet, partial_listmle, position_aware_listmle
from rerank_ray.losses.masking import masked_log_softmax, masked_zscore, ranks
from rerank_ray.losses.orthogonality import orthogonality
from rerank_ray.losses.pairwise import ranknet, soft_ranknet, weighted_ranknet
from rerank_ray.losses.regression import adr_mse, margin_mse, mse

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

LOSSES: dict[str, Loss] = {
    "kl": lambda s, t, m: kl(s, t, m),
    "kl, T=3": lambda s, t, m: kl(s, t, m, temperature=3.0),
    "ranknet": ranknet,
    "soft ranknet": soft_ranknet,
    "soft ranknet, T=3": lambda s, t, m: soft_ranknet(s, t, m, temperature=3.0),
    "weighted ranknet": weighted_ranknet,
    "ce": lambda s, t, m: softmax_cross_entropy(s, t > 0, m),
    "lce": lambda s, t, m: localized_contrastive(s, t > 0, m),
    "bce": lambda s, t, m: binary_cross_entropy(s, t > 0, m),
    "listnet": listnet,
    "listmle": listmle,
    "position-aware listmle": position_aware_listmle,
    "cprd": lambda s, t, m: partial_listmle(s, t, t > 1, m, cutoff=2),
    "cprd without cut-off": lambda s, t, m: partial_listmle(s, t, t > 1, m),
    "mse": mse,
    "margin-mse": margin_mse,
    "adr-mse": adr_mse,
    "adr-mse, T=0.5": lambda s, t, m: adr_mse(s, t, m, temperature=0.5),
    "lambdarank": lambdarank,
    "ndcg-loss2": ndcg_loss2,
    "ndcg-loss2++": ndcg_loss2pp,
    "lambdarank, σ=2": lambda s, t, m: lambdarank(s, t, m, sigma=2.0),
    "self-distillation": lambda s, t, m: self_distillation(torch.stack([s, t]), m),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
# Equal targets still have an entropy, a likelihood or a margin to the scores: only the gradient can be 0.
POINTWISE = {"bce", "mse"}
NOT_ZERO_AT_BEST = {"soft ranknet", "soft ranknet, T=3", "listnet", "listmle", "position-aware listmle", "cprd"}
NOT_ZERO_AT_BEST |= {"cprd without cut-off"}


def all_real(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool)


# By hand


def test_kl_by_hand():
    """Teacher ln 3, 0 is (¾, ¼); student 0, 0 is (½, ½): ¾ ln(¾/½) + ¼ ln(¼/½)."""
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    value = kl(torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]]), all_real(1, 2))
    assert value.item() == pytest.approx(expected, abs=1e-7)


def test_kl_with_temperature_by_hand():
    """At T = 2 a teacher of 2 ln 3, 0 is (¾, ¼) again, and T² = 4 times the divergence."""
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    value = kl(torch.zeros(1, 2), torch.tensor([[2 * math.log(3), 0.0]]), all_real(1, 2), temperature=2.0)
    assert value.item() == pytest.approx(expected, abs=1e-6)


def test_ranknet_by_hand():
    """Targets 2 > 1 > 0, scores 0, ln 2, 0: pairs (0,1): ln(1+2) = ln 3, (0,2): ln 2, (1,2): ln(1+½) = ln 1.5."""
    value = ranknet(torch.tensor([[0.0, math.log(2), 0.0]]), torch.tensor([[2.0, 1.0, 0.0]]), all_real(1, 3))
    assert value.item() == pytest.approx((math.log(3) + math.log(2) + math.log(1.5)) / 3, abs=1e-6)


def test_ranknet_skips_ties():
    """Targets 1, 0, 0: the pairs are (0,1) and (0,2), and their mean, not a third of their sum, is the loss."""
    value = ranknet(torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]]), all_real(1, 3))
    assert value.item() == pytest.approx(math.log(2), abs=1e-6)


def test_cross_entropy_by_hand():
    """Scores ln 2, 0, 0 are (½, ¼, ¼): positives 0 and 1 give (ln 2 + ln 4) / 2."""
    positives = torch.tensor([[True, True, False]])
    value = softmax_cross_entropy(torch.tensor([[math.log(2), 0.0, 0.0]]), positives, all_real(1, 3))
    assert value.item() == pytest.approx((math.log(2) + math.log(4)) / 2, abs=1e-6)


def test_soft_ranknet_by_hand():
    """Teacher ln 3, 0 prefers the first with σ(ln 3) = ¾; scores 0, ln 3 with ¼: −¾ ln ¼ − ¼ ln ¾."""
    value = soft_ranknet(torch.tensor([[0.0, math.log(3)]]), torch.tensor([[math.log(3), 0.0]]), all_real(1, 2))
    assert value.item() == pytest.approx(-0.75 * math.log(0.25) - 0.25 * math.log(0.75), abs=1e-6)


def test_soft_ranknet_with_temperature_by_hand():
    """Twice the numbers at T = 2 are the same preferences."""
    scores, teacher = torch.tensor([[0.0, 2 * math.log(3)]]), torch.tensor([[2 * math.log(3), 0.0]])
    value = soft_ranknet(scores, teacher, all_real(1, 2), temperature=2.0)
    assert value.item() == pytest.approx(-0.75 * math.log(0.25) - 0.25 * math.log(0.75), abs=1e-6)


def test_weighted_ranknet_by_hand():
    """The pairs of `test_ranknet_by_hand` at ranks 1, 2, 3 weigh ⅓, ¼ and ⅕."""
    value = weighted_ranknet(torch.tensor([[0.0, math.log(2), 0.0]]), torch.tensor([[2.0, 1.0, 0.0]]), all_real(1, 3))
    expected = (math.log(3) / 3 + math.log(2) / 4 + math.log(1.5) / 5) / (1 / 3 + 1 / 4 + 1 / 5)
    assert value.item() == pytest.approx(expected, abs=1e-6)


def test_lce_by_hand():
    """Scores ln 2, ln 3, 0, 0, the first two positive: −ln 2/(2+2) and −ln 3/(3+2), neither seeing the other."""
    positives = torch.tensor([[True, True, False, False]])
    value = localized_contrastive(torch.tensor([[math.log(2), math.log(3), 0.0, 0.0]]), positives, all_real(1, 4))
    assert value.item() == pytest.approx((math.log(2) + math.log(5 / 3)) / 2, abs=1e-6)


def test_lce_of_one_positive_is_the_softmax_cross_entropy():
    scores, positives = torch.tensor([[0.3, -1.0, 2.0]]), torch.tensor([[False, True, False]])
    theirs = softmax_cross_entropy(scores, positives, all_real(1, 3))
    torch.testing.assert_close(localized_contrastive(scores, positives, all_real(1, 3)), theirs)


def test_bce_by_hand():
    """A positive at ln 3 costs −ln ¾, a negative at ln 3 costs −ln ¼."""
    value = binary_cross_entropy(torch.full((1, 2), math.log(3)), torch.tensor([[True, False]]), all_real(1, 2))
    assert value.item() == pytest.approx((-math.log(0.75) - math.log(0.25)) / 2, abs=1e-6)


def test_listnet_by_hand():
    """Targets (¾, ¼), scores (½, ½): the cross-entropy is ln 2."""
    value = listnet(torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]]), all_real(1, 2))
    assert value.item() == pytest.approx(math.log(2), abs=1e-6)


def test_listmle_by_hand():
    """Scores ln 1, ln 2, ln 3 in the order 3rd, 1st, 2nd: 3/6 · 1/3 · 2/2."""
    scores = torch.tensor([[1.0, 2.0, 3.0]]).log()
    value = listmle(scores, torch.tensor([[5.0, -1.0, 9.0]]), all_real(1, 3))
    assert value.item() == pytest.approx(-math.log(1 / 6), abs=1e-6)


def test_listmle_of_ties_by_hand():
    """Targets 1, 1, 0 at scores ln 1, ln 2, ln 3: the tied two compete with all (1/6, 2/6), the last with none."""
    scores = torch.tensor([[1.0, 2.0, 3.0]]).log()
    value = listmle(scores, torch.tensor([[1.0, 1.0, 0.0]]), all_real(1, 3))
    assert value.item() == pytest.approx(-math.log(1 / 18), abs=1e-6)


def test_position_aware_listmle_by_hand():
    """The terms of `test_listmle_by_hand` weigh 2² − 1, 2¹ − 1 and 0, over 4."""
    scores = torch.tensor([[1.0, 2.0, 3.0]]).log()
    value = position_aware_listmle(scores, torch.tensor([[5.0, -1.0, 9.0]]), all_real(1, 3))
    assert value.item() == pytest.approx((3 * math.log(2) + math.log(3)) / 4, abs=1e-6)


def test_position_aware_listmle_of_long_lists_is_finite():
    """2^{K−1} of 1,000 candidates is no float32; of the weights' sum the first is a half, the second a quarter."""
    value = position_aware_listmle(torch.zeros(1, 1000), -torch.arange(1000.0)[None], all_real(1, 1000))
    expected = sum(math.log(1000 - k) / 2 ** (k + 1) for k in range(60))
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_cprd_by_hand():
    """Scores ln 1 to ln 4, the first a positive; of the negatives, ordered 4th, 3rd, 2nd, two are: 4/9 and 3/5."""
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).log()
    targets, positives = torch.tensor([[9.0, 1.0, 2.0, 3.0]]), torch.tensor([[True, False, False, False]])
    value = partial_listmle(scores, targets, positives, all_real(1, 4), cutoff=2)
    assert value.item() == pytest.approx(-(math.log(4 / 9) + math.log(3 / 5)) / 2, abs=1e-6)


def test_cprd_below_the_cut_off_sees_no_order():
    scores = torch.tensor([[0.3, -1.0, 2.0, 0.0]])
    none = torch.zeros(1, 4, dtype=torch.bool)
    a, b = torch.tensor([[9.0, 3.0, 2.0, 1.0]]), torch.tensor([[9.0, 1.0, 2.0, 3.0]])
    one = [partial_listmle(scores, t, none, all_real(1, 4), cutoff=1) for t in (a, b)]
    torch.testing.assert_close(*one)
    two = [partial_listmle(scores, t, none, all_real(1, 4), cutoff=2) for t in (a, b)]
    assert not torch.allclose(*two)


def test_mse_and_margin_mse_by_hand():
    """Errors 1, 3, −1: squares 1, 9, 1; their differences −2, 2 and 4: squares 4, 4, 16."""
    scores, targets = torch.tensor([[2.0, 5.0, 0.0]]), torch.tensor([[1.0, 2.0, 1.0]])
    assert mse(scores, targets, all_real(1, 3)).item() == pytest.approx(11 / 3)
    assert margin_mse(scores, targets, all_real(1, 3)).item() == pytest.approx(24 / 3)


def test_adr_mse_by_hand():
    """Scores 0, ln 3 against ranks 1, 2: r̂ = 1 + ¾ and 1 + ¼, both ¾ off, discounted by log₂ 2 and log₂ 3."""
    value = adr_mse(torch.tensor([[0.0, math.log(3)]]), torch.tensor([[1.0, 0.0]]), all_real(1, 2))
    assert value.item() == pytest.approx((0.75**2 + 0.75**2 / math.log2(3)) / 2, abs=1e-6)


def test_adr_mse_changes_when_the_teacher_turns_round():
    scores, targets = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[3.0, 2.0, 1.0]])
    right, wrong = (adr_mse(scores, t, all_real(1, 3), 0.1).item() for t in (targets, -targets))
    assert right == pytest.approx(0.0, abs=1e-3)
    assert wrong > 1


def test_lambda_losses_by_hand():
    """Gains 1, 3, 0 (2^y − 1: 1, 7, 0) at scores ln 2, 0, −ln 2, so ranks 1, 2, 3; ideal DCG 7 + 1/log₂ 3."""
    scores = torch.tensor([[math.log(2), 0.0, -math.log(2)]])
    gains, ideal = torch.tensor([[1.0, 3.0, 0.0]]), 7 + 1 / math.log2(3)
    # Pairs (better, worse): loss, gain difference, ranks.
    pairs = [
        (math.log(1 + 2), 6, 2, 1),  # s 0 against ln 2
        (math.log(1 + 1 / 4), 1, 1, 3),  # ln 2 against −ln 2
        (math.log(1 + 1 / 2), 7, 2, 3),  # 0 against −ln 2
    ]

    def discount(rank: int) -> float:
        return 1 / math.log2(1 + rank)

    swap = [g / ideal * abs(discount(a) - discount(b)) for _, g, a, b in pairs]
    gap = [g / ideal * (discount(abs(a - b)) - discount(abs(a - b) + 1)) for _, g, a, b in pairs]
    losses = [loss for loss, *_ in pairs]
    weights = {lambdarank: swap, ndcg_loss2: gap, ndcg_loss2pp: [s + 10 * d for s, d in zip(swap, gap, strict=True)]}
    for function, weight in weights.items():
        expected = sum(w * loss for w, loss in zip(weight, losses, strict=True))
        assert function(scores, gains, all_real(1, 3)).item() == pytest.approx(expected, rel=1e-5)


def test_the_lambda_of_lambdarank():
    """Two candidates, the better one last: ∂/∂s of it is −σ₀ |ΔNDCG| / (1 + e^{σ₀ (s_i − s_j)})."""
    scores = torch.tensor([[0.5, -0.25]], requires_grad=True)
    lambdarank(scores, torch.tensor([[0.0, 2.0]]), all_real(1, 2), sigma=2.0).sum().backward()
    delta = 1 - 1 / math.log2(3)
    expected = -2 * delta / (1 + math.exp(2 * -0.75))
    assert scores.grad.tolist()[0] == pytest.approx([-expected, expected], rel=1e-5)


def test_lambda_losses_follow_the_students_ranks():
    """The same pair, two apart in the list, costs more at its head than at its end."""
    gains = torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0]])
    low = lambdarank(torch.tensor([[-1.0, -2.0, 3.0, 2.0, 1.0]]), gains, all_real(1, 5))
    order = lambdarank(torch.tensor([[-1.0, -2.0, -3.0, -4.0, -5.0]]), gains, all_real(1, 5))
    assert not torch.allclose(low, order)


def test_equal_scores_are_not_taken_for_a_ranking():
    """A student that scores all alike is told to lift the gain, wherever it stands in the list."""
    losses = []
    for place in range(3):
        scores, gains = torch.zeros(1, 3, requires_grad=True), torch.zeros(1, 3)
        gains[0, place] = 1.0
        losses.append(lambdarank(scores, gains, all_real(1, 3)))
        losses[-1].sum().backward()
        assert scores.grad[0, place] < 0
    assert losses[0].item() == losses[1].item() == losses[2].item()


def test_gains_of_any_size():
    """2^1000 is no float32: the better of two is then the whole of the ideal DCG. A negative gain counts as 0."""
    value = lambdarank(torch.tensor([[0.0, 1.0]]), torch.tensor([[1000.0, 10.0]]), all_real(1, 2))
    assert value.item() == pytest.approx((1 - 1 / math.log2(3)) * math.log(1 + math.e), rel=1e-5)
    pair = [lambdarank(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, y]]), all_real(1, 2)) for y in (0.0, -2.0)]
    torch.testing.assert_close(*pair)


def test_ranks_by_hand():
    """Equal values share the mean of their ranks; a masked candidate has none and takes none."""
    mask = torch.tensor([[True, True, True, True, False]])
    assert ranks(torch.tensor([[2.0, 5.0, 2.0, 1.0, 9.0]]), mask).tolist() == [[2.5, 1.0, 2.5, 4.0, 0.0]]


def test_orthogonality_by_hand():
    """Views along two axes: 0, whatever their lengths; the same view twice: 1² + 1²; at 60°: 2 · ½²."""
    views = torch.tensor([[[2.0, 0.0], [0.0, 9.0]], [[1.0, 1.0], [2.0, 2.0]], [[1.0, 0.0], [0.5, math.sqrt(0.75)]]])
    torch.testing.assert_close(orthogonality(views), torch.tensor([0.0, 2.0, 0.5]), atol=1e-6, rtol=0)


def test_orthogonality_turns_views_apart():
    """Finite differences agree, a step against the gradient lowers it, bfloat16 and zero views stay finite."""
    random = torch.Generator().manual_seed(0)
    views = torch.randn(2, 3, 4, generator=random, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(orthogonality, views)
    orthogonality(views).sum().backward()
    assert (orthogonality(views - 0.01 * views.grad) < orthogonality(views)).all()
    for extreme in (torch.zeros(1, 2, 3), torch.full((1, 2, 3), 1e4), torch.full((1, 2, 3), 1e4).bfloat16()):
        assert orthogonality(extreme).dtype == torch.float32
        assert orthogonality(extreme).isfinite().all()


def test_self_distillation_by_hand():
    """The last layer's ln 3, 0 teaches two layers of (½, ½): twice the divergence of `test_kl_by_hand`."""
    layers = torch.tensor([[[0.0, 0.0]], [[1.0, 1.0]], [[math.log(3), 0.0]]])
    expected = 2 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert self_distillation(layers, all_real(1, 2)).item() == pytest.approx(expected, abs=1e-6)


def test_self_distillation_does_not_pull_the_last_layer():
    layers = torch.tensor([[[0.0, 0.0]], [[math.log(3), 0.0]]], requires_grad=True)
    self_distillation(layers, all_real(1, 2)).sum().backward()
    assert layers.grad[0].abs().sum() > 0
    torch.testing.assert_close(layers.grad[1], torch.zeros(1, 2))


def test_zscore_by_hand():
    """1, 3 and a masked 100: mean 2, population deviation 1."""
    mask = torch.tensor([[True, True, False]])
    value = masked_zscore(torch.tensor([[1.0, 3.0, 100.0]]), mask)
    torch.testing.assert_close(value, torch.tensor([[-1.0, 1.0, 0.0]]))


@pytest.mark.parametrize("constant", [0.0, 0.1, -3.3, 1e4, 1e-20])
@pytest.mark.parametrize("count", [1, 3, 7])
def test_zscore_of_equal_values_is_zero(constant: float, count: int):
    """Also where their mean is not exact: seven times 0.1, summed and divided by 7, is not 0.1 in float32."""
    mask = torch.tensor([[True] * count + [False] * 2])
    assert masked_zscore(torch.full((1, count + 2), constant), mask).tolist() == [[0.0] * (count + 2)]


def test_log_softmax_leaves_masked_candidates_out():
    """Two real candidates of equal score are ½ each, whatever the third one holds."""
    mask = torch.tensor([[True, True, False]])
    value = masked_log_softmax(torch.tensor([[5.0, 5.0, 9e9]]), mask)
    torch.testing.assert_close(value, torch.tensor([[-math.log(2), -math.log(2), 0.0]]))


# Independent implementations


def plain_ranknet(scores: list[float], targets: list[float], mask: list[bool]) -> float:
    """A loop over ordered pairs: the twin of `ranknet`."""
    n, terms = len(scores), []
    for i in range(n):
        for j in range(n):
            if mask[i] and mask[j] and targets[i] > targets[j]:
                terms.append(math.log1p(math.exp(-(scores[i] - scores[j]))))
    return sum(terms) / len(terms) if terms else 0.0


def plain_cross_entropy(scores: list[float], positives: list[bool], mask: list[bool]) -> float:
    total = math.log(sum(math.exp(s) for s, m in zip(scores, mask, strict=True) if m))
    terms = [total - s for s, p, m in zip(scores, positives, mask, strict=True) if p and m]
    return sum(terms) / len(terms) if terms else 0.0


@st.composite
def groups(draw, width: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores, targets [2, width] and a mask with at least one real candidate a query."""
    numbers = st.lists(st.floats(-5, 5, width=32), min_size=width, max_size=width)
    scores = [draw(numbers) for _ in range(2)]
    levels = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=width, max_size=width)
    targets = [draw(levels) for _ in range(2)]
    flags = st.lists(st.booleans(), min_size=width, max_size=width).filter(any)
    mask = [draw(flags) for _ in range(2)]
    return torch.tensor(scores), torch.tensor(targets), torch.tensor(mask)


def plain_listmle(scores: list[float], targets: list[float]) -> list[float]:
    """−log of each candidate's chance against those that are not above it, in the order of the targets."""
    order = sorted(range(len(scores)), key=lambda i: -targets[i])
    return [
        math.log(sum(math.exp(s) for s, t in zip(scores, targets, strict=True) if t <= targets[i])) - scores[i]
        for i in order
    ]


def plain_lambdas(scores: list[float], gains: list[float]) -> dict[str, float]:
    """Loops over pairs, with ranks from a sort: the twin of the three lambda losses."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], max(gains[i], 0.0)))
    rank = {i: r for r, i in enumerate(order, start=1)}
    gains = [2 ** max(g, 0.0) - 1 for g in gains]
    ideal = sum(g / math.log2(r + 1) for r, g in enumerate(sorted(gains, reverse=True), start=1))
    totals = {"lambdarank": 0.0, "ndcg_loss2": 0.0}
    for i in range(len(scores)):
        for j in range(len(scores)):
            if gains[i] > gains[j]:
                loss = math.log1p(math.exp(-(scores[i] - scores[j]))) * (gains[i] - gains[j]) / ideal
                apart = abs(rank[i] - rank[j])
                totals["lambdarank"] += loss * abs(1 / math.log2(1 + rank[i]) - 1 / math.log2(1 + rank[j]))
                totals["ndcg_loss2"] += loss * abs(1 / math.log2(1 + apart) - 1 / math.log2(2 + apart))
    return totals | {"ndcg_loss2pp": totals["lambdarank"] + 10 * totals["ndcg_loss2"]}


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def plain(scores: list[float], targets: list[float]) -> dict[str, float]:
    """Every loss but KL over the real candidates of one query, in loops and floats."""
    n = len(scores)
    both = [(i, j) for i in range(n) for j in range(n) if i != j]
    above = {i: sum(t > targets[i] for t in targets) for i in range(n)}
    rank = [above[i] + (targets.count(targets[i]) + 1) / 2 for i in range(n)]
    weights = {(i, j): 1 / (rank[i] + rank[j]) for i, j in both if targets[i] > targets[j]}
    weighted = sum(w * math.log1p(math.exp(scores[j] - scores[i])) for (i, j), w in weights.items())
    positives, negatives = [i for i in range(n) if targets[i] > 0], [i for i in range(n) if targets[i] <= 0]
    outside = sum(math.exp(scores[i]) for i in negatives)
    bce = [math.log1p(math.exp(-scores[i] if i in positives else scores[i])) for i in range(n)]
    chance = [math.exp(t) / sum(math.exp(u) for u in targets) for t in targets]
    surprises = plain_listmle(scores, targets)
    position = [2.0 ** (n - r) - 1 for r in sorted(rank)]
    cut = [i for i in range(n) if targets[i] <= 1]
    hardest = plain_listmle([scores[i] for i in cut], [targets[i] for i in cut])
    below = {i: sum(targets[j] > targets[i] for j in cut) for i in cut}
    shared = {i: below[i] + (sum(targets[j] == targets[i] for j in cut) + 1) / 2 for i in cut}
    kept = [s for s, r in zip(hardest, sorted(shared.values()), strict=True) if r <= 2]
    soft = []
    for i, j in both:
        p, q = 1 / (1 + math.exp(targets[j] - targets[i])), 1 / (1 + math.exp(scores[j] - scores[i]))
        soft.append(-p * math.log(q) - (1 - p) * math.log(1 - q))
    approximate = [1 + sum(1 / (1 + math.exp(scores[i] - scores[j])) for j in range(n) if j != i) for i in range(n)]
    return {
        "ranknet": plain_ranknet(scores, targets, [True] * n),
        "soft ranknet": mean(soft),
        "weighted ranknet": weighted / sum(weights.values()) if weights else 0.0,
        "ce": plain_cross_entropy(scores, [i in positives for i in range(n)], [True] * n),
        "lce": mean([math.log1p(outside / math.exp(scores[i])) for i in positives]),
        "bce": mean(bce),
        "listnet": sum(p * (math.log(sum(map(math.exp, scores))) - s) for p, s in zip(chance, scores, strict=True)),
        "listmle": sum(surprises),
        "position-aware listmle": sum(w * s for w, s in zip(position, surprises, strict=True)) / (sum(position) or 1.0),
        "cprd": mean(kept),
        "cprd without cut-off": mean(hardest),
        "mse": mean([(s - t) ** 2 for s, t in zip(scores, targets, strict=True)]),
        "margin-mse": mean([((scores[i] - scores[j]) - (targets[i] - targets[j])) ** 2 for i, j in both]),
        "adr-mse": mean([(r - a) ** 2 / math.log2(1 + r) for r, a in zip(rank, approximate, strict=True)]),
        "lambdarank": plain_lambdas(scores, targets)["lambdarank"],
        "ndcg-loss2": plain_lambdas(scores, targets)["ndcg_loss2"],
        "ndcg-loss2++": plain_lambdas(scores, targets)["ndcg_loss2pp"],
    }


@settings(max_examples=60, deadline=None)
@given(groups())
def test_losses_equal_their_plain_twins(group: tuple):
    scores, targets, mask = group
    values = {name: LOSSES[name](scores, targets, mask) for name in plain([0.0], [0.0])}
    assert len(values) == 17
    for q in range(2):
        theirs = plain(scores[q][mask[q]].tolist(), targets[q][mask[q]].tolist())
        for name, value in values.items():
            assert value[q].item() == pytest.approx(theirs[name], abs=1e-4, rel=1e-4), name


@settings(max_examples=40, deadline=None)
@given(groups(), st.sampled_from([0.5, 1.0, 3.0]))
def test_kl_equals_torchs(group: tuple, temperature: float):
    """Its twin is torch's `kl_div` on the unmasked candidates of one query at a time."""
    scores, targets, mask = group
    for q in range(2):
        s, t, m = scores[q], targets[q], mask[q]
        theirs = torch.nn.functional.kl_div(
            (s[m] / temperature).log_softmax(0), (t[m] / temperature).log_softmax(0), log_target=True, reduction="sum"
        )
        ours = kl(scores, targets, mask, temperature)[q].item()
        assert ours == pytest.approx(temperature**2 * theirs.item(), abs=1e-4)


@every_loss
def test_gradients_equal_finite_differences(loss: Loss):
    """In float64. A step of 1e-6 changes no rank, so the lambda losses' weights stay what they are."""
    random = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 6, generator=random, dtype=torch.float64)
    targets = torch.tensor([[2.0, 0.5, 0.0, 0.5, 3.0, -1.0], [0.0, 1.0, 2.0, -1.0, 0.0, 4.0]], dtype=torch.float64)
    mask = torch.tensor([[True] * 6, [True, True, True, True, False, False]])
    leaf = scores.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, targets, mask), leaf)
    loss(leaf, targets, mask).sum().backward()
    assert leaf.grad.abs().sum() > 0


# What every loss keeps


@every_loss
@settings(max_examples=25, deadline=None)
@given(group=groups(), order=st.permutations(range(6)))
def test_the_order_of_candidates_does_not_matter(loss: Loss, group: tuple, order: list[int]):
    scores, targets, mask = group
    permuted = loss(scores[:, order], targets[:, order], mask[:, order])
    torch.testing.assert_close(permuted, loss(scores, targets, mask), atol=1e-5, rtol=1e-5)


@every_loss
@settings(max_examples=25, deadline=None)
@given(group=groups(), filler=st.floats(-1e4, 1e4, width=32), count=st.integers(1, 5))
def test_padding_does_not_matter(loss: Loss, group: tuple, filler: float, count: int):
    """Masked candidates change neither loss nor gradient, and get no gradient themselves."""
    scores, targets, mask = group
    leaf = scores.clone().requires_grad_()
    loss(leaf, targets, mask).sum().backward()
    extra = torch.full((2, count), filler)
    padded = torch.cat([scores, extra], 1).requires_grad_()
    value = loss(padded, torch.cat([targets, extra], 1), torch.cat([mask, extra.bool() & False], 1))
    value.sum().backward()
    torch.testing.assert_close(value, loss(scores, targets, mask), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(padded.grad[:, :6], leaf.grad, atol=1e-5, rtol=1e-5)
    assert padded.grad[:, 6:].abs().sum() == 0
    assert leaf.grad[~mask].abs().sum() == 0


@every_loss
@settings(max_examples=25, deadline=None)
@given(group=groups())
def test_a_query_does_not_see_its_neighbours(loss: Loss, group: tuple):
    scores, targets, mask = group
    together = loss(scores, targets, mask)
    alone = torch.cat([loss(scores[q : q + 1], targets[q : q + 1], mask[q : q + 1]) for q in range(2)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e4, 1e-30, 0.0])
def test_extreme_scores_stay_finite(loss: Loss, size: float, dtype: torch.dtype):
    """Scores of ±1e4 in the teacher's order and against it: loss and gradient are finite, the loss is not negative."""
    signs = torch.tensor([[1.0, -1.0, 1.0, -1.0], [-1.0, 1.0, -1.0, 1.0]])
    leaf = (size * signs).to(dtype).requires_grad_()
    targets = (size * torch.tensor([[1.0, -1.0, 0.5, 0.0]]).expand(2, 4)).to(dtype)
    value = loss(leaf, targets, all_real(2, 4))
    value.sum().backward()
    assert value.isfinite().all()
    assert (value >= -1e-6).all()
    assert leaf.grad.isfinite().all()


@every_loss
def test_bfloat16_scores_are_computed_in_float32(loss: Loss):
    """The loss of bfloat16 scores is the float32 loss of the same numbers, to float32's accuracy."""
    random = torch.Generator().manual_seed(1)
    scores = torch.randn(2, 6, generator=random).mul(3).bfloat16()
    targets = torch.randn(2, 6, generator=random).bfloat16()
    value = loss(scores, targets, all_real(2, 6))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(scores.float(), targets.float(), all_real(2, 6)))


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_to_learn_is_zero(name: str):
    """No candidate, and for all but pointwise losses one candidate or no preference: loss and gradient are 0."""
    none = (torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2, dtype=torch.bool), True)
    one = (torch.tensor([[3.0]]), torch.tensor([[0.0]]), all_real(1, 1), True)
    alike = (torch.tensor([[2.0, 2.0]]), torch.tensor([[0.0, 0.0]]), all_real(1, 2), name not in NOT_ZERO_AT_BEST)
    if name.startswith("adr-mse"):
        # Candidates held equal are at rank 1½ each, approximately and truly.
        alike = (*alike[:3], True)
    for scores, targets, mask, zero in [none] if name in POINTWISE else [none, one, alike]:
        leaf = scores.clone().requires_grad_()
        value = LOSSES[name](leaf, targets, mask)
        value.sum().backward()
        if zero:
            torch.testing.assert_close(value.detach(), torch.zeros(1), atol=1e-6, rtol=0)
        torch.testing.assert_close(leaf.grad, torch.zeros_like(scores), atol=1e-6, rtol=0)


def test_kl_is_zero_where_the_student_agrees_and_positive_elsewhere():
    """Softmax knows differences only: teacher + 7 is the same distribution."""
    teacher = torch.tensor([[1.0, 0.0, -2.0]])
    assert kl(teacher + 7, teacher, all_real(1, 3)).item() == pytest.approx(0.0, abs=1e-6)
    assert kl(-teacher, teacher, all_real(1, 3)).item() > 1


def test_ranknet_sees_only_the_order_of_its_targets():
    scores = torch.tensor([[0.3, -1.0, 2.0]])
    a = ranknet(scores, torch.tensor([[3.0, 2.0, 1.0]]), all_real(1, 3))
    b = ranknet(scores, torch.tensor([[1e6, 0.0, -5.0]]), all_real(1, 3))
    torch.testing.assert_close(a, b)
    assert not torch.allclose(a, ranknet(scores, torch.tensor([[1.0, 2.0, 3.0]]), all_real(1, 3)))
