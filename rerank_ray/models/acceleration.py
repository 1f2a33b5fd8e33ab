"""What is done to a loaded model so that its forward pass is faster: prepacked weights, 8-bit products, compilation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from rerank_ray.errors import ModelError
from rerank_ray.models.prepacked import prepack
from rerank_ray.settings.models import TorchSettings

_SMALLEST = 64


class Int8Linear(nn.Module):
    """A linear layer whose product is of 8-bit integers: a scale for each output's weights, fixed, and one for each row
    of the input, found as it comes (dynamic quantisation, symmetric)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.out_features = linear.out_features
        self.scale, quantised = _quantise(weight)  # [out, 1], [out, in]
        self.scale = self.scale.T.contiguous()
        self.weight = quantised.T.contiguous()
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale, rows = _quantise(x.reshape(-1, x.shape[-1]))
        output = torch._int_mm(rows, self.weight).to(x.dtype) * scale * self.scale
        if self.bias is not None:
            output = output + self.bias
        return output.view(*x.shape[:-1], self.out_features)


def _quantise(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale [N, 1] of each row of a matrix [N, K], and the row in steps of it, −127 to 127."""
    scale = (rows.abs().amax(1, keepdim=True) / 127).clamp(min=torch.finfo(rows.dtype).tiny)
    return scale, (rows / scale).round().to(torch.int8)


def accelerate(model: nn.Module, settings: TorchSettings) -> None:
    """Make a loaded model as fast as its settings ask for, in place; it can then neither be trained nor saved.

    Raises:
        ModelError: int8 on another device than the CPU, or nothing here to compile with.
    """
    device = next(model.parameters()).device
    if settings.dtype == "int8":
        if device.type != "cpu":
            raise ModelError(f"dtype: int8 is for CPUs, and the device is {device}: use bfloat16")
        _to_int8(model)
    if settings.compile:
        _compile(model, device)
    elif settings.dtype != "int8":
        prepack(model)


def _to_int8(model: nn.Module) -> None:
    """Put 8-bit layers in the place of a model's linear ones; small ones, heads among them, gain nothing and stay."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            # A subclass may do more than its base, so only the base is replaced.
            if type(child) is nn.Linear and min(child.weight.shape) >= _SMALLEST:
                setattr(module, name, Int8Linear(child))


def _compile(model: nn.Module, device: torch.device) -> None:
    """Compile at the first batches, for any batch size and length.

    Of an LLM in transformers' layout those parts that read and write more than they compute, each kind once for all
    layers: a whole one takes minutes. Of other models the whole, whose weights become constants of the code.
    """
    # Imported here, since it takes a second and most runs don't compile.
    from torch._inductor import config, cpp_builder, exc

    if device.type == "cpu":
        try:
            cpp_builder.get_cpp_compiler()
        except exc.InvalidCxxCompiler as error:
            reason = "compile: true needs a C++ compiler here, g++ or clang++: install one, or leave it out"
            raise ModelError(reason) from error
    in_parts = compiles_in_parts(model)
    parts = list(_parts(model)) if in_parts else [model]
    # For the whole process: as an option of the call it would not be known where the model is traced.
    config.freezing = not in_parts
    for part in parts:
        part.compile(dynamic=True)


def compiles_in_parts(model: nn.Module) -> bool:
    """Whether a model is of Llama's kind: what lies between its norms and feed-forward blocks is not compiled."""
    return any(_is_norm(module) for module in model.modules())


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNorm")


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """Norms and feed-forward blocks of decoders of Llama's kind, and the 8-bit layers outside them."""
    for child in module.children():
        if _is_norm(child) or type(child).__name__.endswith("MLP") or isinstance(child, Int8Linear):
            yield child
        else:
            yield from _parts(child)
