"""Labels and continuations read off a batch's logits, against each call's own read alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from rerank_ray.models.scoring import read_scores

VOCABULARY = 300
TOKENS = st.lists(st.integers(0, VOCABULARY - 1), max_size=4)


@given(
    calls=st.lists(st.tuples(st.booleans(), TOKENS, st.integers(0, 2)), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 5),
)
def test_scores_are_those_of_each_call_alone(calls: list[tuple[bool, list[int], int]], dtype: torch.dtype, seed: int):
    """Bit for bit: a label's logit in float32, and log-softmax in float32 of each position's row; a call has labels or
    a continuation, and positions behind it that nobody asks for."""
    widths = [max(1, 1 if labelled else len(tokens)) + more for labelled, tokens, more in calls]
    starts = [0, *itertools.accumulate(widths[:-1])]
    logits = (9 * torch.randn(sum(widths), VOCABULARY, generator=torch.Generator().manual_seed(seed))).to(dtype)
    labels = [tokens if labelled else [] for labelled, tokens, _ in calls]
    continuations = [[] if labelled else tokens for labelled, tokens, _ in calls]
    expected = []
    for start, (labelled, tokens, _) in zip(starts, calls, strict=True):
        if labelled:
            expected.append(tuple(logits[start, tokens].float().tolist()))
        else:
            rows = [logits[start + i].float().log_softmax(-1) for i in range(len(tokens))]
            expected.append(tuple(row[token].item() for row, token in zip(rows, tokens, strict=True)))
    assert read_scores(logits, starts, labels, continuations) == expected


class Reads(TorchFunctionMode):
    """Notes what makes the CPU wait for a device: values that are read, and indices that are lists."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        listed = name == "__getitem__" and any(isinstance(part, list) for part in _parts(args[1]))
        if listed or name in {"tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__"}:
            self.waits.append(name)
        return function(*args, **(kwargs or {}))


def _parts(index: object) -> tuple:
    return index if isinstance(index, tuple) else (index,)


def test_a_batch_is_read_at_once():
    logits = torch.randn(40, VOCABULARY)
    with Reads() as reads:
        logits[0, [1, 2]].tolist()
    assert reads.waits == ["__getitem__", "tolist"]
    with Reads() as reads:
        values = read_scores(logits, range(0, 40, 2), [[1, 2], []] * 10, [[], [3, 4]] * 10)
    assert reads.waits == ["tolist"]
    assert [len(value) for value in values] == [2] * 20
    assert values[2] == pytest.approx(logits[4, [1, 2]].tolist())
