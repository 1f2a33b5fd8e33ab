"""Linear layers whose weights lie in memory as the CPU's matrix kernels want them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from rerank_ray.models.engine import computes_bfloat16

_ROWS = 4096
"""Of the input that the layout is chosen for; any other number is computed as well."""
_SMALLEST = 64


class PrepackedLinear(nn.Module):
    """A linear layer for inference in bfloat16 on the CPU, of the same output as the layer it is made of.

    oneDNN reorders a weight in every call unless that was done before, which is most of the time where rows are few, as
    a text's are while it is written; and PyTorch writes a bias into the output ahead of the product, which this adds
    within.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features = linear.out_features
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        output = torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, "none", [], "")
        return output.view(*x.shape[:-1], self.out_features)


def prepack(model: nn.Module) -> None:
    """Put prepacked layers in the place of a model's linear ones in bfloat16 on the CPU. One without products of
    bfloat16 has no kernel for them, and an output layer that shares its weights with embeddings would need them twice.

    The model can then neither be trained nor saved.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    replace_linear(model, lambda _, x: id(x.weight) not in embeddings and _is_fit(x.weight), PrepackedLinear)


def replace_linear(
    model: nn.Module, fits: Callable[[str, nn.Linear], bool], make: Callable[[nn.Linear], nn.Module]
) -> None:
    """Put what `make` makes of it in the place of each of a model's linear layers that, with its path, `fits`; small
    ones, heads among them, gain nothing and stay."""
    for path, module in list(model.named_modules()):
        for name, child in module.named_children():
            # A subclass may do more than its base, so only the base is replaced.
            if type(child) is nn.Linear and min(child.weight.shape) >= _SMALLEST and fits(f"{path}.{name}", child):
                setattr(module, name, make(child))


def _is_fit(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and computes_bfloat16(weight.device)
