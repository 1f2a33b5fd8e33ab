"""Each loss against values by hand, an independent implementation and finite differences; and what all losses share."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rerank_ray.distill.targets import Targets, objective
from rerank_ray.losses.cross_entropy import softmax_cross_entropy
from rerank_ray.losses.divergence import kl
from rerank_ray.losses.layerwise import self_distillation
from rerank_ray.losses.masking import masked_log_softmax, masked_zscore
from rerank_ray.losses.pairwise import ranknet
from rerank_ray.settings.distill import LossSettings, ObjectiveSettings

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

LOSSES: dict[str, Loss] = {
    "kl": lambda s, t, m: kl(s, t, m),
    "kl, T=3": lambda s, t, m: kl(s, t, m, temperature=3.0),
    "ranknet": ranknet,
    "ce": lambda s, t, m: softmax_cross_entropy(s, t > 0, m),
    "self-distillation": lambda s, t, m: self_distillation(torch.stack([s, t]), m),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


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


@settings(max_examples=40, deadline=None)
@given(groups(), st.sampled_from([0.5, 1.0, 3.0]))
def test_losses_equal_their_plain_twins(group: tuple, temperature: float):
    """KL's twin is torch's `kl_div` on the unmasked candidates of one query at a time."""
    scores, targets, mask = group
    for q in range(2):
        s, t, m = scores[q], targets[q], mask[q]
        theirs = torch.nn.functional.kl_div(
            (s[m] / temperature).log_softmax(0), (t[m] / temperature).log_softmax(0), log_target=True, reduction="sum"
        )
        ours = kl(scores, targets, mask, temperature)[q].item()
        assert ours == pytest.approx(temperature**2 * theirs.item(), abs=1e-4)
        lists = s.tolist(), t.tolist(), m.tolist()
        assert ranknet(scores, targets, mask)[q].item() == pytest.approx(plain_ranknet(*lists), abs=1e-4)
        positives = (t > 0).tolist()
        ours = softmax_cross_entropy(scores, targets > 0, mask)[q].item()
        assert ours == pytest.approx(plain_cross_entropy(s.tolist(), positives, m.tolist()), abs=1e-4)


@every_loss
def test_gradients_equal_finite_differences(loss: Loss):
    """Central differences with a step of 1e-2 in float32: their error is about 1e-7/1e-2 + (1e-2)² < 1e-3."""
    random = torch.Generator().manual_seed(0)
    scores, targets = torch.randn(2, 5, generator=random), torch.randn(2, 5, generator=random)
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    leaf = scores.clone().requires_grad_()
    loss(leaf, targets, mask).sum().backward()
    step = 1e-2
    for q in range(2):
        for c in range(5):
            nudge = torch.zeros(2, 5)
            nudge[q, c] = step
            up, down = (loss(scores + sign * nudge, targets, mask).sum().item() for sign in (1, -1))
            assert leaf.grad[q, c].item() == pytest.approx((up - down) / (2 * step), abs=1e-3)


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
@pytest.mark.parametrize("size", [1e4, 1e-30, 0.0])
def test_extreme_scores_stay_finite(loss: Loss, size: float):
    """Scores of ±1e4 in the teacher's order and against it: loss and gradient are finite, the loss is not negative."""
    signs = torch.tensor([[1.0, -1.0, 1.0, -1.0], [-1.0, 1.0, -1.0, 1.0]])
    leaf = (size * signs).requires_grad_()
    targets = size * torch.tensor([[1.0, -1.0, 0.5, 0.0]]).expand(2, 4)
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


@every_loss
def test_nothing_to_learn_is_zero(loss: Loss):
    """One candidate, no candidate, or nothing preferred among them: the loss is 0 and so is its gradient."""
    cases = [
        (torch.tensor([[3.0]]), torch.tensor([[0.0]]), all_real(1, 1)),
        (torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2, dtype=torch.bool)),
        (torch.tensor([[2.0, 2.0]]), torch.tensor([[0.0, 0.0]]), all_real(1, 2)),
    ]
    for scores, targets, mask in cases:
        leaf = scores.clone().requires_grad_()
        value = loss(leaf, targets, mask)
        value.sum().backward()
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


# The objective


TARGETS = Targets(
    teacher=torch.tensor([[3.0, 1.0, 0.0], [5.0, 2.0, 0.0]]),
    gains=torch.tensor([[0.0, 2.0, 1.0], [1.0, 0.0, 0.0]]),
    mask=torch.tensor([[True, True, True], [True, True, False]]),
)


def test_the_objective_is_the_weighted_sum_of_its_terms():
    """On two layers every term is a mean over both, and self-distillation is added with its own weight."""
    layers = torch.tensor([[[0.0, 1.0, 2.0], [1.0, 0.0, 0.0]], [[1.0, 0.5, -1.0], [0.0, 2.0, 0.0]]])
    chosen = ObjectiveSettings(
        losses=(
            LossSettings(loss="kl", weight=2.0, temperature=2.0),
            LossSettings(loss="ranknet", weight=0.5, target="gains"),
            LossSettings(loss="ce", weight=3.0, positives=2),
        ),
        self_distillation=0.25,
    )
    terms = objective(layers, TARGETS, chosen)
    mask = TARGETS.mask
    first_two = torch.tensor([[True, True, False]] * 2)
    expected = {
        "kl": sum(kl(s, TARGETS.teacher, mask, 2.0) for s in layers) / 2,
        "ranknet": sum(ranknet(s, TARGETS.gains, mask) for s in layers) / 2,
        "ce": sum(softmax_cross_entropy(s, first_two, mask) for s in layers) / 2,
        "self_distillation": kl(layers[0], layers[1], mask),
    }
    weights = {"kl": 2.0, "ranknet": 0.5, "ce": 3.0, "self_distillation": 0.25}
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)
    torch.testing.assert_close(terms["total"], sum(weights[n] * v for n, v in expected.items()))


def test_the_objective_of_one_layer_has_no_self_distillation():
    terms = objective(torch.zeros(1, 2, 3), TARGETS, ObjectiveSettings())
    assert set(terms) == {"kl", "ranknet", "ce", "total"}


def test_a_zscored_teacher_has_no_scale():
    """KL to a z-scored teacher is the same for the teacher's scores times 10 plus 3."""
    chosen = ObjectiveSettings(losses=(LossSettings(loss="kl", scores="zscore"),))
    other = Targets(teacher=10 * TARGETS.teacher + 3, gains=TARGETS.gains, mask=TARGETS.mask)
    scores = torch.tensor([[[0.0, 1.0, 2.0], [1.0, 0.0, 0.0]]])
    torch.testing.assert_close(objective(scores, TARGETS, chosen)["kl"], objective(scores, other, chosen)["kl"])


def test_cross_entropy_on_gains_takes_what_has_a_gain():
    """Query 1 has gains 0, 2, 1: the positives are the second and third candidate, at scores of ⅓ each: ln 3."""
    chosen = ObjectiveSettings(losses=(LossSettings(loss="ce", target="gains"),))
    value = objective(torch.zeros(1, 2, 3), TARGETS, chosen)["ce"]
    torch.testing.assert_close(value, torch.tensor([math.log(3), math.log(2)]))
