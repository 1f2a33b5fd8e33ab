"""Each loss against values by hand, of its paper or worked out."""

from __future__ import annotations

import math

import pytest
import torch

from rerank_ray.losses.cross_entropy import binary_cross_entropy, localized_contrastive, softmax_cross_entropy
from rerank_ray.losses.divergence import kl
from rerank_ray.losses.lambdaloss import lambdarank, ndcg_loss2, ndcg_loss2pp
from rerank_ray.losses.layerwise import self_distillation
from rerank_ray.losses.listwise import listmle, listnet, partial_listmle, position_aware_listmle
from rerank_ray.losses.masking import masked_log_softmax, masked_zscore, ranks
from rerank_ray.losses.orthogonality import orthogonality
from rerank_ray.losses.pairwise import ranknet, soft_ranknet, weighted_ranknet
from rerank_ray.losses.regression import adr_mse, margin_mse, mse


def all_real(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool)


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


def test_cprd_orders_equal_negatives_that_begin_within_the_cut_off():
    """Of equal scores a positive, six negatives that the teacher likes alike and three that it likes less: each of the
    six is drawn from nine, so the mean of their terms is ln 9. Cut off after seven, one of the three begins within."""
    targets = torch.tensor([[10.0] + [5.0] * 6 + [1.0] * 3])
    values = [
        partial_listmle(torch.zeros(1, 10), targets, targets > 5, all_real(1, 10), cutoff=k) for k in (1, 3, 6, 7)
    ]
    expected = [math.log(9)] * 3 + [(6 * math.log(9) + 3 * math.log(3)) / 9]
    assert [v.item() for v in values] == pytest.approx(expected, abs=1e-6)


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
