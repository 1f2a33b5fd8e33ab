"""Early exits with layers of their own: they start as the backbone's last, and are trained, cut off and saved apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fixtures.students import DOCUMENTS, QUERIES, load, scores, start, stirred
from fixtures.tiny_models import ENCODERS, tiny_encoder_folder
from pydantic import ValidationError
from transformers import AutoModel, ModernBertConfig, ModernBertModel

from rerank_ray.errors import ModelError
from rerank_ray.models.student import Student
from rerank_ray.settings.student import StudentSettings

LAYERS = (3, 4, 5)


@pytest.fixture(scope="module", params=["bert", "roberta", "electra"])
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five layers, with the tiny BERT's tokenizer."""
    return tiny_encoder_folder(tmp_path_factory.mktemp(request.param), *ENCODERS[request.param], layers=5)


def branched(encoder: Path, branch_layers: int = 1) -> Student:
    return start(encoder, "similarity", layers=LAYERS, gate=-1.0, interaction=1.0, branch_layers=branch_layers)


@pytest.mark.parametrize("branch_layers", [1, 2])
def test_branches_start_as_the_backbones_last_layers(encoder: Path, branch_layers: int):
    """An exit scores as an encoder of so many layers that has the backbone's last ones at its end."""
    last = range(6 - branch_layers, 6)
    for number, exit_layer in enumerate(LAYERS):
        taken = (*range(1, exit_layer - branch_layers + 1), *last)
        alone = start(encoder, "similarity", take_layers=taken, gate=-1.0, interaction=1.0)
        torch.testing.assert_close(scores(branched(encoder, branch_layers))[number], scores(alone)[0])


def test_a_branch_that_attends_otherwise_than_the_layers_below_it(tmp_path: Path):
    """ModernBERT's layers are not all of one kind."""
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    folder = tiny_encoder_folder(tmp_path / "m", ModernBertModel, ModernBertConfig, layers=4, layer_types=kinds)
    with pytest.raises(ModelError, match="branch_layers: 1: layers 3 to 3 have other attention than the last 1"):
        start(folder, "similarity", layers=(3, 4), branch_layers=1)
    assert len(start(folder, "similarity", layers=(2, 4), branch_layers=1).branches) == 1


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("branch_layers", [1, 2])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_student_is_cut_off_and_saved_with_its_branches(
    encoder: Path, tmp_path: Path, layer: int, branch_layers: int, alone: bool
):
    """An exit's branch becomes the last layers of an ordinary encoder, and the exits below it keep theirs."""
    whole = stirred(branched(encoder, branch_layers))
    short = whole.truncated(layer, alone=alone)
    kept = slice(LAYERS.index(layer) if alone else 0, LAYERS.index(layer) + 1)
    expected = scores(whole)[kept]
    assert expected.std() > 0.01
    torch.testing.assert_close(scores(short), expected, atol=1e-4, rtol=1e-5)
    short.save(tmp_path / "s")
    loaded = load(tmp_path / "s")
    assert loaded.description == short.description
    torch.testing.assert_close(scores(loaded), expected, atol=1e-4, rtol=1e-5)
    assert AutoModel.from_pretrained(tmp_path / "s").config.num_hidden_layers == layer


@pytest.mark.parametrize("exit_number", range(len(LAYERS)))
def test_an_exit_teaches_its_branch_and_what_is_shared_below_it(encoder: Path, exit_number: int):
    """Layers that its score has no part in have no gradient; the exit at 3 shares layers 1 and 2."""
    student = stirred(branched(encoder))
    student(**student.collate(student.encode(QUERIES, DOCUMENTS)))[exit_number].sum().backward()

    def is_taught(layer: torch.nn.Module) -> bool:
        return any(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())

    last = exit_number == len(LAYERS) - 1
    shared = LAYERS[exit_number] - (0 if last else 1)
    assert [is_taught(layer) for layer in student.backbone.encoder.layer] == [n < shared for n in range(5)]
    assert [is_taught(branch) for branch in student.branches] == [n == exit_number for n in range(2)]


def test_texts_encoded_alone_go_along_the_branches(encoder: Path):
    student = stirred(start(encoder, "similarity", layers=LAYERS, gate=-40.0, interaction=1.0, branch_layers=1))
    with torch.no_grad():
        student.gate.fill_(-40.0)
        student.linear.zero_()
    room = student.description.max_length - student.description.max_query_length
    queries, documents = (student.batch(student.encode_alone(t, n)) for t, n in ((QUERIES, 16), (DOCUMENTS, room)))
    with torch.no_grad():
        actual = student.score_all(student.encoded(queries), [student.encoded(documents)])
    for number, query in enumerate(QUERIES):
        expected = scores(student, [query] * len(DOCUMENTS), DOCUMENTS)
        torch.testing.assert_close(actual[:, number], expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "linear", "layers": (2, 3)}, "branch_layers is for head: similarity with several layers"),
        ({"layers": None}, "branch_layers is for head: similarity with several layers"),
        ({"layers": (1, 3)}, r"branch_layers \(1\) must be below the first of layers \(1\)"),
        ({"lora": {}}, "branch_layers are trained as they are, and lora trains adapters alone"),
    ],
)
def test_branches_that_can_not_be(changes: dict, message: str):
    settings = {"base": "model", "head": "similarity", "layers": (2, 3), "branch_layers": 1} | changes
    with pytest.raises(ValidationError, match=message):
        StudentSettings.model_validate(settings)
