"""Each loss against an independent implementation and finite differences; and what all losses share."""

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
    harder = [sum(targets[j] > targets[i] for j in cut) for i in cut]
    kept = [s for s, count in zip(hardest, sorted(harder), strict=True) if count < 2]
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
