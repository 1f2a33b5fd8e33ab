"""Students as ONNX graphs: scores of padded batches of any size and length, for onnxruntime and what embeds it."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch
from torch import nn

from rerank_ray.errors import ConfigError, ModelError
from rerank_ray.models.student.base import Student

GRAPH = "model.onnx"
_LARGEST_GRAPH = 2**31
_EXAMPLES = (["query", "another query"], ["a document", "a document of some more words"])


def export_onnx(student: Student, folder: Path, *, int8: bool) -> None:
    """Write `model.onnx`: inputs as `Student.collate` names them, mask included; output `scores` [B] of the last layer.

    Args:
        int8: weights of matrix products as 8-bit integers, activations quantised as they come (for CPUs).

    Raises:
        ConfigError: the extra `onnx` is not installed.
        ModelError: the architecture can't be exported.
    """
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError('ONNX needs the extra `onnx`: pip install "rerank_ray[onnx]"') from error
    inputs = onnx_inputs(student, *_EXAMPLES)
    shapes = tuple(dict.fromkeys(range(tensor.ndim), torch.export.Dim.DYNAMIC) for tensor in inputs.values())
    graph = folder / GRAPH
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        try:
            program = torch.onnx.export(
                _LastLayer(student, list(inputs)).eval(),
                tuple(inputs.values()),
                input_names=list(inputs),
                output_names=["scores"],
                dynamic_shapes=(shapes,),
                dynamo=True,
                verbose=False,
            )
        except (torch.onnx.OnnxExporterError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelError(f"{type(student.pretrained).__name__} can't be exported to ONNX: {reason}") from error
        program.save(str(graph))
        if int8:
            _quantise(graph)


def onnx_inputs(student: Student, queries: list[str], documents: list[str]) -> dict[str, torch.Tensor]:
    """A padded batch as the graph takes it: always with the mask that `collate` leaves out where nothing is padded."""
    batch = student.collate(student.encode(queries, documents))
    if not {"last", "lengths"} & batch.keys():
        batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
    return batch


def _quantise(graph: Path) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    whole, weights = graph.with_name("whole.onnx"), graph.with_name("whole.onnx.data")
    model = onnx.load(graph)
    # torch writes the weights of a large model beside its graph, and a graph can't hold more than 2 GiB.
    graph.with_name(f"{graph.name}.data").unlink(missing_ok=True)
    # The shapes that the exporter noted down are of the example; the quantiser takes them for promises.
    del model.graph.value_info[:]
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    onnx.save(model, whole, save_as_external_data=True, location=weights.name)
    # Linear layers on one vector a pair, of heads, are Gemm nodes: small, and worth their precision.
    heads = [
        f"{node.name}{suffix}" for node in model.graph.node if node.op_type == "Gemm" for suffix in ("", "_MatMul")
    ]
    quantize_dynamic(
        whole,
        graph,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=heads,
        # Embeddings stay as they are, so that little may be saved.
        use_external_data_format=size > _LARGEST_GRAPH,
        extra_options={"DefaultTensorType": 1},
    )
    whole.unlink()
    weights.unlink()


class _LastLayer(nn.Module):
    """A student as a function of positional tensors."""

    def __init__(self, student: Student, names: list[str]) -> None:
        super().__init__()
        self.student, self.names = student, names

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.student(**dict(zip(self.names, tensors, strict=True)))[-1]
