"""Attention as plain products on a CPU: the fused kernel's, taken apart."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from rerank_ray.models import plain_attention
from rerank_ray.models.plain_attention import attention, attention_for_training

CPU = torch.device("cpu")
FUSED = "ScaledDotProductFlashAttentionForCpuBackward0"
ALLOWED = torch.ones(2, 1, 20, 20, dtype=torch.bool)
ALLOWED[1, :, :, 13:] = False
BIAS = torch.linspace(-3, 3, 400).view(20, 20)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Query, key and value [2, 4, 20, 8]."""
    torch.manual_seed(0)
    return tuple(torch.randn(2, 4, 20, 8, dtype=dtype, requires_grad=True) for _ in range(3))


@pytest.mark.parametrize("attend", [attention, scaled_dot_product_attention])
@pytest.mark.parametrize("mask", [None, ALLOWED, BIAS], ids=["all", "padded", "biased"])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_it_is_the_fused_one_taken_apart(attend, mask: torch.Tensor | None, scale: float | None):
    """Output and gradients are the same, of what calls PyTorch's attention itself too."""
    leaves = inputs(torch.float64)
    if mask is BIAS:
        mask = mask.double()

    def output_and_gradients(attend) -> list[torch.Tensor]:
        output = attend(*leaves, mask, scale=scale)
        return [output, *torch.autograd.grad(output.sin().sum(), leaves)]

    expected = output_and_gradients(scaled_dot_product_attention)
    with attention_for_training(CPU, 20):
        found = output_and_gradients(attend)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_dropout_leaves_weights_out_and_scales_the_rest():
    """With values of 1 each output is its kept weights' sum over 1 − p: 1 on average, and not always."""
    query, key, value = inputs()
    with attention_for_training(CPU, 20), torch.no_grad():
        output = attention(query, key, torch.ones_like(value), None, dropout=0.5)
    assert output.mean().item() == pytest.approx(1.0, abs=0.15)
    assert output.std().item() > 0.1


def test_what_a_row_may_not_attend_to_has_no_part_in_bfloat16():
    """Nor has a row that may attend to nothing, as padding in front of a causal model's texts, any NaN."""
    query, key, value = inputs(torch.bfloat16)
    mask = ALLOWED.clone()
    mask[1, :, 4] = False
    with attention_for_training(CPU, 20):
        output = attention(query, key, value, mask)
        gradient = torch.autograd.grad(output.sum(), key, retain_graph=True)[0]
    assert output.dtype == torch.bfloat16
    assert output.isfinite().all()
    assert gradient.isfinite().all()
    seen = torch.autograd.grad(output[1, :, :4].sum(), value)[0]
    assert not seen[1, :, 13:].any()
    assert seen[1, :, :13].all()


def test_it_ends_with_its_context():
    """Also when a step fails; other devices and long sequences keep the fused kernel."""

    def in_force() -> tuple[bool, bool]:
        fused = [a(*inputs(), None).grad_fn.name() == FUSED for a in (attention, scaled_dot_product_attention)]
        assert fused[0] == fused[1]
        return fused[0], torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()

    def failing_step() -> None:
        with attention_for_training(CPU, 20):
            assert in_force() == (False, True)
            raise RuntimeError("a step that fails")

    before = in_force()
    assert before[0]
    with pytest.raises(RuntimeError, match="a step that fails"):
        failing_step()
    assert in_force() == before
    for device, length in ((torch.device("meta"), 20), (CPU, 4096)):
        with attention_for_training(device, length):
            assert in_force() == before


@pytest.mark.parametrize("faster", [True, False])
def test_scoring_takes_it_apart_where_the_products_are_faster(monkeypatch: pytest.MonkeyPatch, faster: bool):
    """In bfloat16, up to 256 tokens."""

    def is_fused(length: int, dtype: torch.dtype) -> bool:
        query, key, value = (torch.randn(1, 1, length, 8, dtype=dtype, requires_grad=True) for _ in range(3))
        return attention(query, key, value, None).grad_fn.name() == FUSED

    monkeypatch.setattr(plain_attention, "_FUSED_IS_SLOWER", faster)
    for length, dtype, short in ((256, torch.bfloat16, True), (257, torch.bfloat16, False), (20, torch.float32, False)):
        assert is_fused(length, dtype) != (faster and short)


@pytest.mark.parametrize("mask", [None, ALLOWED], ids=["all", "padded"])
def test_heads_that_share_keys(mask: torch.Tensor | None):
    """Four heads of queries, and two of keys and values: as if each of these were there twice."""
    query, key, value = inputs(torch.float64)
    key, value = key[:, ::2], value[:, ::2]
    expected = scaled_dot_product_attention(
        query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), attn_mask=mask
    )
    torch.testing.assert_close(attention(query, key, value, mask), expected, rtol=1e-12, atol=1e-12)
    with attention_for_training(CPU, 20):
        torch.testing.assert_close(attention(query, key, value, mask), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mask", [None, ALLOWED, BIAS], ids=["all", "padded", "biased"])
@pytest.mark.parametrize("weights", [1, 4 * 20 * 20 * 4 * 8, 2**20])
def test_in_scoring_some_sequences_at_a_time(monkeypatch: pytest.MonkeyPatch, mask, weights: int):
    """One, as its weights take more than the cache has, four and two, or all."""
    monkeypatch.setattr(plain_attention, "_WEIGHTS_IN_CACHE", weights)
    query, key, value = (torch.cat([x, x.flip(2), 2 * x]).detach() for x in inputs(torch.float64))
    mask = mask.double() if mask is BIAS else mask if mask is None else mask.repeat(3, 1, 1, 1)
    expected = scaled_dot_product_attention(query, key, value, attn_mask=mask)
    with attention_for_training(CPU, 20):
        found = attention(query, key, value, mask)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
