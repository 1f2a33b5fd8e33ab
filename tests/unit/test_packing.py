"""Packed batches: scores and gradients are those of the padded ones, and padding is not computed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from fixtures.students import DOCUMENTS, QUERIES, start, stirred
from fixtures.tiny_models import ENCODERS, tiny_encoder_folder
from hypothesis import given
from hypothesis import strategies as st
from transformers import ModernBertConfig, ModernBertModel

from rerank_ray.models.packing import PACKABLE, Packing
from rerank_ray.models.student import Student, adapt
from rerank_ray.settings.student import StudentSettings

STUDENTS = {
    "linear": {"head": "linear"},
    "layer-wise linear": {"head": "linear", "layers": (1, 3)},
    "similarity": {"head": "similarity", "gate": -1.0, "interaction": 1.0},
    "layer-wise similarity": {"head": "similarity", "layers": (1, 3), "gate": -1.0, "interaction": 1.0},
    "branches": {"head": "similarity", "layers": (2, 3), "branch_layers": 1, "gate": -1.0, "interaction": 1.0},
}


def student(folder: Path, head: str, given: dict, **adapted) -> Student:
    """A student as training has it."""
    student = stirred(start(folder, head, **given))
    adapt(student, StudentSettings(base=str(folder), head=head, max_length=64, max_query_length=16, **given, **adapted))
    return student


def results(student: Student, *, packed: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Scores [layers, B], and the gradients of a sum of them with weights that are not all alike."""
    batch = student.batch(student.encode(QUERIES, DOCUMENTS), packed=packed)
    assert ("places" in batch) == packed
    student.zero_grad()
    scores = student(**batch)
    weights = torch.linspace(-1, 2, scores.numel()).reshape(scores.shape)
    (scores * weights).sum().backward()
    return scores.detach(), {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}


def check(student: Student) -> None:
    (scores, gradients), (expected, wanted) = results(student, packed=True), results(student, packed=False)
    assert expected.std() > 1e-3
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-4)
    # A pooler that only the model's own head reads has no part in the packed forward of earlier heads.
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_every_packable_kind_is_tested():
    assert set(ENCODERS) == set(PACKABLE)


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("form", STUDENTS)
def test_scores_and_gradients_are_those_of_padded_batches(tmp_path: Path, kind: str, form: str):
    folder = tiny_encoder_folder(tmp_path / "m", *ENCODERS[kind], layers=3)
    settings = dict(STUDENTS[form])
    check(student(folder, settings.pop("head"), settings))


@pytest.mark.parametrize("adapted", [{"gradient_checkpointing": True}, {"lora": {"rank": 2}}])
@pytest.mark.parametrize("head", ["linear", "similarity"])
def test_with_checkpoints_and_adapters(tmp_path: Path, head: str, adapted: dict):
    folder = tiny_encoder_folder(tmp_path / "m", *ENCODERS["bert"], layers=3)
    check(student(folder, head, {}, **adapted).train())


def test_padding_is_not_computed(tmp_path: Path):
    """A layer's products are over the real tokens, up to the next multiple of 64."""
    folder = tiny_encoder_folder(tmp_path / "m", *ENCODERS["bert"], layers=3)
    packing = student(folder, "linear", {})
    shapes = []
    layer = packing.model.base_model.encoder.layer[1]
    layer.intermediate.register_forward_hook(lambda _, inputs, __: shapes.append(tuple(inputs[0].shape[:2])))
    encoded = packing.encode(QUERIES, DOCUMENTS)
    padded = packing.batch(encoded)
    packing(**packing.batch(encoded, packed=True))
    packing(**padded)
    tokens = sum(len(e["input_ids"]) for e in encoded)
    assert shapes == [(1, math.ceil(tokens / 64) * 64), tuple(padded["input_ids"].shape)]
    assert shapes[0][1] < padded["input_ids"].numel() / 2


def test_without_padding_nothing_is_packed(tmp_path: Path):
    folder = tiny_encoder_folder(tmp_path / "m", *ENCODERS["bert"], layers=3)
    packing = student(folder, "linear", {})
    long = packing.encode(QUERIES[:2], ["passage " * 80] * 2)
    assert {len(e["input_ids"]) for e in long} == {64}
    assert "places" not in packing.batch(long, packed=True)


def test_another_architecture_is_padded(tmp_path: Path):
    """ModernBERT's sliding windows are not counted from a sequence's start."""
    folder = tiny_encoder_folder(tmp_path / "m", ModernBertModel, ModernBertConfig, layers=3)
    for head in ("linear", "similarity"):
        padded = student(folder, head, {})
        assert not padded.packs
        assert "places" not in padded.batch(padded.encode(QUERIES, DOCUMENTS), packed=True)


def test_an_encoder_that_is_a_decoder_by_its_config_is_padded(tmp_path: Path):
    """Its attention is causal."""
    built = student(tiny_encoder_folder(tmp_path, *ENCODERS["bert"], layers=3, is_decoder=True), "linear", {})
    assert "places" not in built.batch(built.encode(QUERIES, DOCUMENTS), packed=True)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), width=st.integers(1, 3))
def test_packing_is_undone_by_unpacking(lengths: list[int], width: int):
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    packing = Packing(places=mask.flatten().nonzero()[:, 0], mask=mask)
    padded = torch.randn(*mask.shape, width, dtype=torch.float64, requires_grad=True)
    packed = packing.pack(padded)
    assert packed.shape == (1, 64, width)
    torch.testing.assert_close(packed[0, : sum(lengths)], padded[mask.bool()])
    assert not packed[0, sum(lengths) :].any()
    torch.testing.assert_close(packing.unpack(packed), padded * mask[..., None])
    assert torch.autograd.gradcheck(lambda x: packing.unpack(packing.pack(x) ** 2), padded)
