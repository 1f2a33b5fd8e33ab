"""A last layer that computes the first token alone: scores and gradients are those of the whole one."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from fixtures.students import DOCUMENTS, QUERIES, start, stirred
from fixtures.tiny_models import ENCODERS, HIDDEN, tiny_encoder_folder
from transformers import ModernBertConfig, ModernBertModel

from rerank_ray.models.student import Student, adapt
from rerank_ray.settings.student import StudentSettings

FORMS = {"one head": {}, "layer-wise": {"layers": (1, 3)}}


def whole_and_cut(folder: Path, **given) -> tuple[Student, Student]:
    whole = stirred(start(folder, "linear", **given))
    cut = copy.deepcopy(whole)
    cut.leave_out_what_is_not_read()
    return whole, cut


def results(student: Student, *, packed: bool = False) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Scores [layers, B], and the gradients of a sum of them with weights that are not all alike."""
    scores = student(**student.batch(student.encode(QUERIES, DOCUMENTS), packed=packed))
    student.zero_grad()
    (scores * torch.linspace(-1, 2, scores.numel()).reshape(scores.shape)).sum().backward()
    return scores.detach(), {n: p.grad for n, p in student.named_parameters() if p.grad is not None}


def check(found: tuple, expected: tuple) -> None:
    assert expected[0].std() > 1e-3
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-4)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("form", FORMS)
def test_scores_and_gradients_are_those_of_the_whole_layer(tmp_path: Path, kind: str, form: str):
    """Of a padded batch, and of one of equal lengths, which has no mask."""
    whole, cut = whole_and_cut(tiny_encoder_folder(tmp_path / "m", *ENCODERS[kind], layers=3), **FORMS[form])
    check(results(cut), results(whole))
    alike = [student.collate(student.encode(QUERIES[:2], ["passage " * 80] * 2)) for student in (whole, cut)]
    assert "attention_mask" not in alike[0]
    torch.testing.assert_close(cut(**alike[1]), whole(**alike[0]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("adapted", [{}, {"gradient_checkpointing": True}, {"lora": {"rank": 2}}])
def test_training_packs_and_cuts(tmp_path: Path, adapted: dict):
    """Also with checkpoints and adapters; against the padded batches of a whole layer."""
    folder = tiny_encoder_folder(tmp_path / "m", *ENCODERS["bert"], layers=3)
    students = []
    for leave_out in (Student.leave_out_what_is_not_read, None):
        with pytest.MonkeyPatch.context() as patch:
            student = stirred(start(folder, "linear", layers=(1, 3)))
            if leave_out is not None:
                patch.setattr(type(student), "leave_out_what_is_not_read", leave_out)
            settings = StudentSettings(base=str(folder), head="linear", max_length=64, max_query_length=16, **adapted)
            adapt(student, settings)
            students.append(student.train())
    whole, cut = students
    torch.manual_seed(0)
    check(results(cut, packed=True), results(whole))


def test_the_last_layer_computes_a_row_for_each_pair(tmp_path: Path):
    _, cut = whole_and_cut(tiny_encoder_folder(tmp_path / "m", *ENCODERS["bert"], layers=3))
    shapes = []
    for layer in cut.model.base_model.encoder.layer:
        layer.intermediate.register_forward_hook(lambda _, inputs, __: shapes.append(tuple(inputs[0].shape)))
    batch = cut.collate(cut.encode(QUERIES, DOCUMENTS))
    cut(**batch)
    pairs, length = batch["input_ids"].shape
    assert shapes == [(pairs, length, HIDDEN)] * 2 + [(pairs, 1, HIDDEN)]


def test_an_earlier_layer_of_a_cut_student_is_whole_again(tmp_path: Path):
    """What its head reads is the first token of that layer."""
    whole, cut = whole_and_cut(tiny_encoder_folder(tmp_path / "m", *ENCODERS["bert"], layers=3), layers=(1, 3))
    for layer in (1, 3):
        check(results(cut.truncated(layer, alone=True)), results(whole.truncated(layer, alone=True)))


def test_other_architectures_and_heads_are_left_as_they_are(tmp_path: Path):
    """A similarity head reads all tokens; ModernBERT's layers are others."""
    modern = tiny_encoder_folder(tmp_path / "modern", ModernBertModel, ModernBertConfig, layers=3)
    bert = tiny_encoder_folder(tmp_path / "bert", *ENCODERS["bert"], layers=3)
    for folder, head in ((modern, "linear"), (bert, "similarity")):
        whole = stirred(start(folder, head))
        cut = copy.deepcopy(whole)
        cut.leave_out_what_is_not_read()
        batch = whole.collate(whole.encode(QUERIES, DOCUMENTS))
        assert torch.equal(cut(**batch), whole(**batch))
