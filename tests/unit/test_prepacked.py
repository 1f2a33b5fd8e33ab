"""Prepacked linear layers compute what the layers they replace do."""

import pytest
import torch
from torch import nn

from rerank_ray.models.engine import computes_bfloat16
from rerank_ray.models.prepacked import PrepackedLinear, prepack

CPU = torch.device("cpu")
needs_bfloat16 = pytest.mark.skipif(not computes_bfloat16(CPU), reason="this processor has no bfloat16 products")


def layer(inputs: int = 96, outputs: int = 80, *, bias: bool = True, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias).to(dtype)


@needs_bfloat16
@pytest.mark.parametrize("shape", [(1, 96), (7, 96), (3, 17, 96), (5, 4096, 96)])
@pytest.mark.parametrize("bias", [True, False])
def test_same_output_for_any_number_of_rows(shape, bias: bool):
    linear = layer(bias=bias)
    x = torch.randn(shape).bfloat16()
    with torch.inference_mode():
        expected = linear.float()(x.float())
        found = PrepackedLinear(linear.bfloat16())(x)
    assert found.shape == expected.shape
    # bfloat16 keeps 8 bits: the product is exact to half of the last one.
    torch.testing.assert_close(found.float(), expected, rtol=2**-8, atol=2**-8)


@needs_bfloat16
def test_an_input_that_does_not_lie_in_rows():
    linear, x = layer(), torch.randn(6, 96, 9).bfloat16().transpose(1, 2)
    with torch.inference_mode():
        torch.testing.assert_close(PrepackedLinear(linear)(x), linear(x), rtol=2**-7, atol=2**-7)


@needs_bfloat16
def test_replaces_the_layers_that_it_serves_and_no_others():
    class Own(nn.Linear):
        pass

    model = nn.ModuleDict(
        {
            "served": nn.Sequential(layer(), nn.GELU(), layer(bias=False)),
            "float32": layer(dtype=torch.float32),
            "own": Own(96, 80).bfloat16(),
            "tokens": nn.Embedding(80, 96).bfloat16(),
            "shared": layer(bias=False),
        }
    )
    model["shared"].weight = model["tokens"].weight
    kept = {name: model[name] for name in ("float32", "own", "shared")}
    prepack(model)
    assert [type(m) for m in model["served"]] == [PrepackedLinear, nn.GELU, PrepackedLinear]
    assert {name: model[name] for name in kept} == kept


@pytest.mark.parametrize(
    "lacking",
    ["torch.backends.mkldnn.is_available", "rerank_ray.models.prepacked.computes_bfloat16"],
)
def test_without_the_kernels_the_model_stays(monkeypatch, lacking: str):
    """Where oneDNN is not there, or the processor has no bfloat16 products, whose layout can't be made there."""
    monkeypatch.setattr(lacking, lambda *_: False)
    model = nn.Sequential(layer())
    prepack(model)
    assert type(model[0]) is nn.Linear
