"""Students as ONNX graphs, run by onnxruntime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fixtures.students import DOCUMENTS, QUERIES, scores, start, stirred
from fixtures.tiny_models import tiny_bert_folder, tiny_llama_folder
from onnxruntime import InferenceSession

from rerank_ray.export import export
from rerank_ray.models.student.onnx import onnx_inputs


@pytest.mark.parametrize("kind", ["linear", "similarity", "decoder"])
def test_onnx_gives_the_same_scores(kind: str, tmp_path: Path):
    """In batches of other sizes and lengths than the graph was made with."""
    if kind == "decoder":
        student = start(tiny_llama_folder(tmp_path / "base"), "linear")
    else:
        student = start(tiny_bert_folder(tmp_path / "base"), kind, layers=(1, 3), gate=-1.0, scale=4.0, interaction=1.0)
    stirred(student).save(tmp_path / "student")
    export(str(tmp_path / "student"), str(tmp_path / "out"), form="onnx", layer=None, int8=False, overwrite=False)
    assert not list((tmp_path / "out").glob("*.safetensors"))
    session = InferenceSession(str(tmp_path / "out" / "model.onnx"))
    for documents in (DOCUMENTS, DOCUMENTS[:1], DOCUMENTS[3:6]):
        queries = QUERIES[: len(documents)]
        inputs = onnx_inputs(student, queries, documents)
        (found,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        np.testing.assert_allclose(found, scores(student, queries, documents)[-1], atol=1e-4, rtol=1e-4)


def test_eight_bits_are_smaller_and_order_alike(tmp_path: Path):
    student = stirred(start(tiny_bert_folder(tmp_path / "base"), "linear"))
    student.save(tmp_path / "student")
    for int8 in (False, True):
        export(
            str(tmp_path / "student"), str(tmp_path / f"{int8}"), form="onnx", layer=None, int8=int8, overwrite=False
        )
    sizes = [(tmp_path / name / "model.onnx").stat().st_size for name in ("False", "True")]
    assert sizes[1] < 0.9 * sizes[0]
    inputs = onnx_inputs(student, QUERIES, DOCUMENTS)
    session = InferenceSession(str(tmp_path / "True" / "model.onnx"))
    (found,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    expected = scores(student)[-1].numpy()
    assert np.corrcoef(found, expected)[0, 1] > 0.98
    assert np.abs(found - expected).max() > 1e-6
