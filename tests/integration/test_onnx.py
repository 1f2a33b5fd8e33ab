"""Students as ONNX graphs, run by onnxruntime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fixtures.students import DOCUMENTS, QUERIES, scores, start, stirred
from fixtures.tiny_models import tiny_bert_folder, tiny_llama_folder
from onnxruntime import InferenceSession

from rerank_ray.export import export
from rerank_ray.models.student import Student
from rerank_ray.models.student.onnx import onnx_inputs


@pytest.fixture(scope="module")
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Student, Path]:
    """A student of the kind that is asked for, and its folder, beside which `float32/` has its graph."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "decoder":
        student = start(tiny_llama_folder(folder / "base"), "linear")
    else:
        options = {"layers": (1, 3), "gate": -1.0, "scale": 4.0, "interaction": 1.0}
        student = start(tiny_bert_folder(folder / "base"), request.param, **options)
    stirred(student).save(folder / "student")
    export(str(folder / "student"), str(folder / "float32"), form="onnx", layer=None, int8=False, overwrite=False)
    return student, folder


@pytest.mark.parametrize("exported", ["linear", "similarity", "decoder"], indirect=True)
def test_onnx_gives_the_same_scores(exported: tuple[Student, Path]):
    """In batches of other sizes and lengths than the graph was made with."""
    student, folder = exported
    assert not list((folder / "float32").glob("*.safetensors"))
    session = InferenceSession(str(folder / "float32" / "model.onnx"))
    for documents in (DOCUMENTS, DOCUMENTS[:1], DOCUMENTS[3:6]):
        queries = QUERIES[: len(documents)]
        inputs = onnx_inputs(student, queries, documents)
        (found,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        np.testing.assert_allclose(found, scores(student, queries, documents)[-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("exported", ["linear"], indirect=True)
def test_eight_bits_are_smaller_and_order_alike(exported: tuple[Student, Path]):
    student, folder = exported
    export(str(folder / "student"), str(folder / "int8"), form="onnx", layer=None, int8=True, overwrite=False)
    sizes = [(folder / name / "model.onnx").stat().st_size for name in ("float32", "int8")]
    assert sizes[1] < 0.9 * sizes[0]
    inputs = onnx_inputs(student, QUERIES, DOCUMENTS)
    session = InferenceSession(str(folder / "int8" / "model.onnx"))
    (found,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    expected = scores(student)[-1].numpy()
    assert np.corrcoef(found, expected)[0, 1] > 0.98
    assert np.abs(found - expected).max() > 1e-6
