"""Rewards for what a ranker wrote: pure functions of the text and of what is known about its passages.

A text is the model's whole turn, the prompt's prefill included. One that does not keep to the form it was asked for, or
was cut off before it ended, has the form's penalty and is not well-formed, whatever it seems to say. ProRank's answer
is one token and needs no end: a ranker reads that token's logits. Gains are 0 or more.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from rerank_ray.metrics import agreement
from rerank_ray.prompts.parse.answer import split_reasoning
from rerank_ray.prompts.parse.permutation import parse_permutation
from rerank_ray.prompts.parse.scores import parse_score_rows

CUTOFF = 10
HIGHEST_GRADE = 10.0
_TURN = re.compile(
    r"\s*+(?:<think>(?P<reasoning>(?:(?!</?think>).)*+)</think>\s*+)?<answer>((?:(?!</?answer>).)*+)</answer>\s*+",
    re.DOTALL,
)
_PERMUTATION = re.compile(r"\[\w++\](?:\s*+>\s*+\[\w++\])*+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """What a text is worth, and whether it keeps to its form."""

    value: float
    well_formed: bool


def relevance_reward(text: str, labels: tuple[str, str], relevant: bool) -> Reward:
    """1 for an answer that is one of the two labels and nothing else, and 1 more for the right one (ProRank's warm-up,
    Li et al. 2025, whose weights of the two are not published).

    Args:
        text: what follows the prefill.
        labels: how a relevant passage is answered, and how another.
        relevant: whether the passage is.
    """
    # A chat template may have opened a think block before the answer.
    answer = text.strip().removeprefix("<think>").strip()
    if answer not in labels:
        return Reward(value=0.0, well_formed=False)
    return Reward(value=2.0 if answer == labels[not relevant] else 1.0, well_formed=True)


def choice_reward(
    text: str, identifiers: Sequence[str], best: Collection[int], *, reasoning: bool = True, cut_off: bool = False
) -> Reward:
    """1 if both the form and the chosen passage are right, otherwise 0 (Rank-R1, Zhuang et al. 2025).

    Args:
        best: which of the passages are right answers.
        reasoning: the form is `<think>…</think> <answer>[3]</answer>`, or else `<answer>[3]</answer>` alone.
    """
    answer = None if cut_off else _answer(text, reasoning)
    named = [i for i, name in enumerate(identifiers) if answer == f"[{name}]"]
    return Reward(value=float(any(i in best for i in named)), well_formed=bool(named))


def permutation_reward(
    text: str,
    identifiers: Sequence[str],
    gains: Sequence[float],
    reference: Sequence[int],
    *,
    reasoning: bool = True,
    cut_off: bool = False,
) -> Reward:
    """nDCG@10 + 0.2 · recall@10 + 0.1 · RBO with the teacher's order; 0 where the answer is not a whole permutation and
    nothing else, and −1 where the text has no answer (ReasonRank, Liu et al. 2025).

    RBO is taken as ReasonRank's published code takes it, at persistence 1, where it is the average overlap.

    Args:
        gains: of the passages, in the prompt's order.
        reference: the teacher's order of the passages, best first.
        reasoning: the form is `<think>…</think> <answer>[2] > [1]</answer>`, or else `[2] > [1]` alone.
    """
    answer = _answer(text, reasoning=True) if reasoning else split_reasoning(text)[1]
    if cut_off or not answer:
        return Reward(value=-1.0, well_formed=False)
    parsed = parse_permutation(answer, identifiers)
    if parsed.order is None or parsed.defects or not _PERMUTATION.fullmatch(answer):
        return Reward(value=0.0, well_formed=False)
    value = ndcg(parsed.order, gains) + 0.2 * recall(parsed.order, gains) + 0.1 * overlap(parsed.order, reference)
    return Reward(value=value, well_formed=True)


def grades_reward(text: str, identifiers: Sequence[str], gains: Sequence[float], *, cut_off: bool = False) -> Reward:
    """nDCG@10 + 0.2 · recall@10 + 0.1 · (1 − JS divergence of grades and gains) of a group's grades; −0.1 where the
    JSON lacks a grade or is none, and −0.5 where there is no answer (GroupRank, Sun et al. 2025).

    Equal grades leave the prompt's order. The divergence is in bits and compares grades and gains that add up to 1; the
    paper does not say how it makes distributions of them.

    Args:
        gains: of the passages, in the prompt's order.
    """
    _, answer = split_reasoning(text)
    if cut_off or not answer:
        return Reward(value=-0.5, well_formed=False)
    parsed = parse_score_rows(answer, identifiers, [(0.0, HIGHEST_GRADE)])
    if parsed.defects or not _holds_json(answer):
        return Reward(value=-0.1, well_formed=False)
    grades = [row[0] for row in parsed.rows]
    order = sorted(range(len(gains)), key=lambda i: -grades[i])
    agreement = 1 - js_divergence(grades, gains)
    return Reward(value=ndcg(order, gains) + 0.2 * recall(order, gains) + 0.1 * agreement, well_formed=True)


def integer_rewards(
    scores: Sequence[Sequence[float | None]], relevant: Sequence[bool], references: Sequence[float], penalty: float
) -> list[list[float]]:
    """ERank's rewards [N][G] for G integers of each of a query's N passages (Cai et al. 2025).

    All N · G integers are ranked together, the highest first, equal ones at the rank of their first. One of a relevant
    passage is worth 1 / rank. One of another passage costs the penalty if it is above any of a relevant passage, and
    otherwise its squared distance from the reference. An unreadable one, None, costs the penalty.

    Args:
        references: the score that each passage had before reinforcement.
    """
    known = [s for of_passage in scores for s in of_passage if s is not None]
    lowest = min((s for row, r in zip(scores, relevant, strict=True) if r for s in row if s is not None), default=None)

    def worth(score: float | None, is_relevant: bool, reference: float) -> float:
        if score is None:
            return -penalty
        if is_relevant:
            return 1.0 / (1 + sum(other > score for other in known))
        if lowest is not None and score > lowest:
            return -penalty
        return -((score - reference) ** 2)

    return [[worth(s, r, ref) for s in row] for row, r, ref in zip(scores, relevant, references, strict=True)]


def _answer(text: str, reasoning: bool) -> str | None:
    turn = _TURN.fullmatch(text)
    return turn[2].strip() if turn and (turn["reasoning"] is not None) is reasoning else None


def _holds_json(answer: str) -> bool:
    """Whether its last braces are a JSON object; rankers read grades in other forms too."""
    try:
        json.loads(answer[answer.rfind("{") : answer.rfind("}") + 1])
    except (ValueError, RecursionError):
        return False
    return True


def ndcg(order: Sequence[int], gains: Sequence[float]) -> float:
    """nDCG@10 with linear gains; 0 when no passage has one."""
    return agreement.ndcg([gains[i] for i in order], gains, CUTOFF) or 0.0


def recall(order: Sequence[int], gains: Sequence[float]) -> float:
    """Share of the passages with a gain that are among the first ten; 0 when none has one."""
    relevant = {i for i, gain in enumerate(gains) if gain > 0}
    return len(relevant & set(order[:CUTOFF])) / len(relevant) if relevant else 0.0


def overlap(a: Sequence[int], b: Sequence[int]) -> float:
    """Mean over depths d of the share of the first d items that two orders have in common: RBO's limit for persistence
    1 (Webber et al. 2010)."""
    return sum(len(set(a[:d]) & set(b[:d])) / d for d in range(1, len(a) + 1)) / len(a)


def js_divergence(a: Sequence[float], b: Sequence[float]) -> float:
    """Jensen-Shannon divergence in bits, 0 to 1, of two rows of weights; a row of zeros counts as uniform."""
    p, q = (_distribution(np.asarray(row, dtype=float)) for row in (a, b))
    m = (p + q) / 2
    return (_relative_entropy(p, m) + _relative_entropy(q, m)) / 2


def _distribution(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum() if weights.any() else np.full(len(weights), 1 / len(weights))


def _relative_entropy(p: np.ndarray, q: np.ndarray) -> float:
    some = p > 0
    return float((p[some] * np.log2(p[some] / q[some])).sum())
