"""What is done to a loaded model so that its forward pass is faster: prepacked weights, 8-bit products, compilation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from rerank_ray.errors import ModelError
from rerank_ray.models.prepacked import prepack, replace_linear
from rerank_ray.settings.models import TorchSettings


class Int8Linear(nn.Module):
    """A linear layer whose product is of 8-bit integers: a scale for each output's weights, fixed, and one for each row
    of the input, found as it comes (dynamic quantisation, symmetric).

    An x86 CPU without AVX-512 VNNI adds two neighbouring products in 16 bits, so weights have 64 steps to either side
    there and not 127, with which no such sum overflows: 2 · 255 · 64 < 2¹⁵.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features = linear.out_features
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.adds_in_16_bits = adds_in_16_bits()
        scale, weight = _scaled(linear.weight.detach(), 64 if self.adds_in_16_bits else 127)  # [out, 1], [out, in]
        weight = weight.round().to(torch.int8)
        if self.adds_in_16_bits:
            self.scale = scale[:, 0]
            self.zeros = torch.zeros(len(weight), dtype=torch.int64)
            self.weight = torch.ops.onednn.qlinear_prepack(weight, None)
        else:
            self.scale = scale.T.contiguous()
            self.weight = weight.T.contiguous()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale, rows = _scaled(x.reshape(-1, x.shape[-1]), 127)
        if self.adds_in_16_bits:
            products = self._product_of_unsigned((rows + 128).round().to(torch.uint8))
        else:
            products = torch._int_mm(rows.round().to(torch.int8), self.weight).to(x.dtype) * self.scale
        output = products * scale if self.bias is None else torch.addcmul(self.bias, products, scale)
        return output.view(*x.shape[:-1], self.out_features)

    def _product_of_unsigned(self, rows: torch.Tensor) -> torch.Tensor:
        """Products [N, out], in float32, of rows [N, in] of which 128 is the zero with the weights."""
        unused = {"output_scale": 1.0, "output_zero_point": 0, "post_op_args": [], "post_op_algorithm": ""}
        return torch.ops.onednn.qlinear_pointwise(
            rows,
            x_scale=1.0,
            x_zero_point=128,
            qw=self.weight,
            w_scale=self.scale,
            w_zero_point=self.zeros,
            bias=None,
            output_dtype=torch.float32,
            post_op_name="none",
            **unused,
        )


def _scaled(rows: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale [N, 1] of each row of a matrix [N, K], and the row in its steps, so many to either side of 0."""
    scale = (rows.abs().amax(1, keepdim=True) / steps).clamp(min=torch.finfo(rows.dtype).tiny)
    return scale, rows / scale


def adds_in_16_bits() -> bool:
    """Whether this CPU multiplies bytes through sums of 16 bits. PyTorch's own product of bytes takes forty times as
    long as that of float32 there, oneDNN's less than that of float32."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") and not torch.cpu._is_vnni_supported()


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
    """Put 8-bit layers in the place of a model's linear ones, but of adapters that are not merged: PEFT casts what they
    read to the type of their weights."""
    replace_linear(model, lambda path, _: "lora_" not in path, Int8Linear)


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
