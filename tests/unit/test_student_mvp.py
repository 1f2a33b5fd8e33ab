"""Students that compare a list's passages: MVP's scores against a plain loop over transformers' own model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.rows import make_list
from fixtures.students import DOCUMENTS, load, start
from fixtures.teachable import settings
from fixtures.tiny_models import tiny_t5_folder
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, T5ForConditionalGeneration

from rerank_ray.distill.parallel import World
from rerank_ray.distill.targets import Targets, objective
from rerank_ray.distill.train import Trainer
from rerank_ray.errors import ModelError
from rerank_ray.export import export
from rerank_ray.models.cross_encoder import CrossEncoder
from rerank_ray.models.protocol import PairList
from rerank_ray.models.student import Student
from rerank_ray.models.whole_lists import WholeLists
from rerank_ray.ranking.rankers import Ranker
from rerank_ray.settings.models import CrossEncoderSettings
from rerank_ray.settings.objective import LossSettings, ObjectiveSettings
from rerank_ray.settings.rankers import CrossEncoderRankerSettings

SIZES = {"max_length": 64, "max_query_length": 16}
LISTS = [("cat", DOCUMENTS), ("alpha query", ["dog"]), ("the dog of beta", ["cat " * 80, *DOCUMENTS[:2]])]
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def base(tiny_t5: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny T5 with longer vectors, so that scores differ by much more than a tolerance."""
    folder = tmp_path_factory.mktemp("base") / "t5"
    model = T5ForConditionalGeneration.from_pretrained(tiny_t5)
    with torch.no_grad():
        for stack in (model.encoder, model.decoder):
            stack.final_layer_norm.weight *= 10
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_t5).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def student(base: Path) -> Student:
    return start(base, "mvp", views=3, **SIZES)


@pytest.fixture(scope="module")
def folder(student: Student, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mvp") / "student"
    student.save(path)
    return path


@torch.no_grad()
def by_hand(model: Path, query: str, passages: list[str], views: int) -> torch.Tensor:
    """Scores [N] of one list: each passage through the encoder alone, each view through the decoder alone."""
    t5, tokenizer = T5ForConditionalGeneration.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    sentinels = "".join(f"<extra_id_{k}>" for k in range(views))
    read = []
    for passage in passages:
        # No space before an empty passage: T5's own tokenizer drops it.
        space = " " if passage else ""
        ids = tokenizer(f"{sentinels} | Query: {query} | Context:{space}{passage}")["input_ids"]
        ids = ids if len(ids) <= SIZES["max_length"] else [*ids[: SIZES["max_length"] - 1], tokenizer.eos_token_id]
        read.append(t5.encoder(input_ids=torch.tensor([ids])).last_hidden_state[0, :views])
    scores = torch.zeros(len(passages))
    for k in range(views):
        of_view = torch.stack([vectors[k] for vectors in read])
        anchor = t5.decoder(
            input_ids=torch.tensor([[tokenizer.pad_token_id]]), encoder_hidden_states=of_view[None]
        ).last_hidden_state[0, 0]
        scores += of_view @ anchor / views
    return scores


@torch.no_grad()
def scored(student: Student, lists: list[tuple[str, list[str]]]) -> torch.Tensor:
    """Scores [pairs] of lists in one padded batch."""
    pairs = [pair for query, passages in lists for pair in student.encode([query] * len(passages), passages)]
    scores, views = student.scores(student(**student.collate(pairs)), [len(passages) for _, passages in lists])
    assert views.shape == (len(lists), 3, 32)
    return scores[0]


def asked(model: CrossEncoderSettings, lists: list[tuple[str, list[str]]] = LISTS) -> list[torch.Tensor]:
    """What the `cross_encoder` backend answers to each list."""
    calls = [PairList(query=query, texts=tuple(passages)) for query, passages in lists]
    return [torch.tensor(answer.value) for answer in CrossEncoder(model).run(calls)]


def test_scores_are_those_of_the_formula(student: Student, base: Path):
    """Of lists of different lengths in one batch, one of them of a single passage, and with a passage that is cut."""
    expected = torch.cat([by_hand(base, query, passages, 3) for query, passages in LISTS])
    assert expected[: len(DOCUMENTS)].std() > 1
    torch.testing.assert_close(scored(student, LISTS), expected, **CLOSE)


def test_the_order_of_passages_does_not_matter_and_their_company_does(student: Student):
    query, passages = LISTS[0]
    whole = scored(student, [(query, passages)])
    torch.testing.assert_close(scored(student, [(query, passages[::-1])]), whole.flip(0), **CLOSE)
    assert (scored(student, [(query, passages[:4])]) - whole[:4]).abs().max() > 0.1


@pytest.mark.parametrize("tokens_per_batch", [64, 200, 100_000])
def test_the_backend_answers_lists(folder: Path, student: Student, tokens_per_batch: int):
    """However their pairs and they themselves are batched; what is counted is a call a pair."""
    model = CrossEncoderSettings(path=str(folder), dtype="float32", max_length=64, tokens_per_batch=tokens_per_batch)
    for found, of_list in zip(asked(model), LISTS, strict=True):
        torch.testing.assert_close(found, scored(student, [of_list]), **CLOSE)
    (answer,) = CrossEncoder(model).run([PairList(query="cat", texts=("bird", "dog"))])
    length = len(student.encode(["cat"], ["bird"])[0]["input_ids"])
    assert (answer.usage.calls, answer.usage.prompt_tokens) == (2, 2 * length)


def test_lists_are_read_part_by_part(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Parts of what one batch holds, but a list is never divided: the same scores, from more passes."""
    model = CrossEncoderSettings(path=str(folder), dtype="float32", max_length=64, tokens_per_batch=64)
    whole = asked(model)
    parts = []
    run = WholeLists._run
    monkeypatch.setattr(WholeLists, "_run", lambda self, lists, runner: parts.append(lists) or run(self, lists, runner))
    monkeypatch.setattr("rerank_ray.models.whole_lists._BATCHES_HELD", 1)
    for found, expected in zip(asked(model), whole, strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)
    assert len(parts) > 1
    assert sum(map(len, parts)) == len(LISTS)


def test_a_ranker_asks_for_whole_lists(folder: Path, student: Student):
    """And its name has no layer."""
    ranker = Ranker(CrossEncoderRankerSettings(model=CrossEncoderSettings(path=str(folder), dtype="float32")))
    assert ranker.name.startswith(f"cross_encoder:{folder}@")
    assert "layer" not in ranker.name
    request = make_list(5)
    texts = [candidate.contents for candidate in request.candidates]
    (outcome,) = ranker.rank([request])
    expected = scored(student, [(request.query.text, texts)])
    torch.testing.assert_close(torch.tensor(outcome.scores.scores), expected, **CLOSE)


def test_a_saved_student_is_a_t5(folder: Path, student: Student):
    """Its folder has the description and what transformers reads, nothing else."""
    torch.testing.assert_close(scored(load(folder), LISTS), scored(student, LISTS), rtol=0, atol=0)
    described = json.loads((folder / "student.json").read_text())
    assert (described["head"], described["views"]) == ("mvp", 3)
    assert not (folder / "heads.safetensors").exists()
    torch.testing.assert_close(scored(student, LISTS[:1]), by_hand(folder, *LISTS[0], 3), **CLOSE)


# The text that the encoder reads


def test_what_the_encoder_reads(student: Student, base: Path):
    """The tokens are those of the whole text."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    text = "<extra_id_0><extra_id_1><extra_id_2> | Query: the cat | Context: a dog of beta"
    assert student.encode(["the cat"], ["a dog of beta"])[0]["input_ids"] == tokenizer(text)["input_ids"]


@given(st.text("abc é?", max_size=80), st.text("abc é?", max_size=200))
def test_views_and_end_are_always_there(student: Student, query: str, passage: str):
    """Of a query at most 15 tokens and `</s>` are left, and what is cut beside it is the passage's end."""
    (encoded,) = student.encode([query], [passage])
    ids = encoded["input_ids"]
    tokenizer = student.tokenizer
    assert len(ids) <= 64
    assert ids[:3] == tokenizer.convert_tokens_to_ids([f"<extra_id_{k}>" for k in range(3)])
    assert ids[-1] == tokenizer.eos_token_id
    before, head, between, tail = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("| Query:", query, "| Context:", passage)
    )
    whole = [*ids[:3], *before, *head[:15], *between, *tail]
    assert ids[:-1] == whole[:63]


# Checkpoints of its authors


@pytest.fixture
def published(folder: Path, tmp_path: Path) -> Path:
    """The student as MVP's authors save it: a wrapped encoder, another architecture's name, and no number of views."""
    out = tmp_path / "published"
    shutil.copytree(folder, out)
    (out / "student.json").unlink()
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"architectures": ["FiDT5"]}))
    weights = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        head, dot, rest = name.partition("encoder.")
        if head == "" and dot:
            kind, *parts = rest.split(".")
            wrapped = [kind, parts[0], "module", *parts[1:]] if kind == "block" else [kind, *parts]
            name = ".".join(["encoder", "encoder", *wrapped])
        weights[name] = tensor
    assert "encoder.encoder.block.1.module.layer.0.SelfAttention.q.weight" in weights
    assert "encoder.encoder.final_layer_norm.weight" in weights
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_a_published_checkpoint_is_read(published: Path, folder: Path):
    chosen = {"dtype": "float32", "max_length": 64}
    ours = asked(CrossEncoderSettings(path=str(folder), **chosen))
    theirs = asked(CrossEncoderSettings(path=str(published), views=3, **chosen))
    assert CrossEncoder(CrossEncoderSettings(path=str(published), views=3, **chosen)).name.endswith(":views=3")
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_checkpoint_without_wrapped_names_is_read_too(base: Path):
    (found, *_) = asked(CrossEncoderSettings(path=str(base), dtype="float32", max_length=64, views=2))
    torch.testing.assert_close(found, by_hand(base, *LISTS[0], 2), **CLOSE)


def test_checkpoints_that_are_not_read(published: Path, folder: Path, tiny_bert: Path, tmp_path: Path):
    with pytest.raises(ModelError, match="of an MVP's checkpoint set views"):
        load(published)
    with pytest.raises(ModelError, match="views: a student of ours tells how many it has"):
        CrossEncoder(CrossEncoderSettings(path=str(folder), views=3))
    with pytest.raises(ModelError, match="a bert can't be an MVP, only mt5, t5, umt5 can"):
        CrossEncoder(CrossEncoderSettings(path=str(tiny_bert), views=3))
    weights = load_file(published / "model.safetensors")
    del weights["encoder.encoder.final_layer_norm.weight"]
    save_file(weights, published / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"no weights for encoder\.final_layer_norm\.weight, which would be random"):
        CrossEncoder(CrossEncoderSettings(path=str(published), views=3))


# Training


def test_orthogonality_by_hand():
    """Two lists of two views: alike (4 − 2 = 2 off the diagonal), and at right angles, whatever their lengths."""
    views = torch.tensor([[[1.0, 0.0], [3.0, 0.0]], [[0.0, 2.0], [5.0, 0.0]]])
    targets = Targets(
        teacher=torch.tensor([[2.0, 1.0]] * 2),
        gains=torch.zeros(2, 2),
        mask=torch.ones(2, 2, dtype=torch.bool),
        confidence=torch.ones(2),
    )
    term = LossSettings(loss="listnet", target="ranks", temperature=0.8)
    chosen = ObjectiveSettings(losses=(term,), orthogonality=0.5)
    terms = objective(torch.zeros(1, 2, 2), targets, chosen, views)
    torch.testing.assert_close(terms["orthogonality"].loss, torch.tensor([2.0, 0.0]))
    torch.testing.assert_close(terms["total"].loss - terms["listnet"].loss, torch.tensor([1.0, 0.0]))


def trainer(labels: str, base: Path, **changes) -> Trainer:
    student = {"head": "mvp", "max_length": 64, "max_query_length": 16, "dropout": 0.0} | changes.pop("student", {})
    objective = {"losses": [{"loss": "listnet", "target": "ranks", "temperature": 0.8}]} | changes.pop("objective", {})
    return Trainer(settings(labels, base, student=student, objective=objective, **changes), World(), None)


def test_a_step_counts_the_anchors(labels: str, tiny_t5: Path):
    """The metric is the mean over the step's lists of ‖A Aᵀ − I‖², computed here list by list."""
    for weight in (0.0, 2.0):
        of_run = trainer(labels, tiny_t5, objective={"orthogonality": weight})
        expected = []
        for row, indices in of_run.step_data(0).groups:
            passages = [row.candidate_list.candidates[i].contents for i in indices]
            pairs = of_run.student.encode([row.candidate_list.query.text] * len(passages), passages)
            with torch.no_grad():
                _, anchors = of_run.student.scores(of_run.student(**of_run.student.collate(pairs)), [len(pairs)])
            unit = (anchors[0] / anchors[0].norm(dim=-1, keepdim=True)).numpy()
            expected.append(((unit @ unit.T - np.eye(4)) ** 2).sum())
        losses = of_run.train_step()
        assert losses["orthogonality"].item() == pytest.approx(np.mean(expected), rel=1e-3)
        assert losses["total"].item() == pytest.approx((losses["listnet"] + weight * losses["orthogonality"]).item())
        assert of_run.training_metrics()["loss/orthogonality"] == pytest.approx(np.mean(expected), rel=1e-3)


def test_a_list_is_never_divided(labels: str, tiny_t5: Path):
    """Scores and gradients are those of a step whose pairs are all in one batch, however small the micro-batches."""
    results = []
    for tokens in (16, 8192):
        of_run = trainer(labels, tiny_t5, tokens_per_micro_batch=tokens, tokens_per_backward=tokens, backward="plain")
        losses = of_run.forward_backward(of_run.step_data(0))
        gradients = [p.grad.to_dense() for p in of_run.student.parameters() if p.grad is not None]
        results.append((losses["total"], gradients))
    (small, small_gradients), (large, large_gradients) = results
    torch.testing.assert_close(small, large)
    for a, b in zip(small_gradients, large_gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("save", ["merged", "adapter"])
def test_adapters_are_trained_and_saved(labels: str, tiny_t5: Path, tmp_path: Path, save: str):
    """On encoder and decoder; the folder's scores are the student's."""
    of_run = trainer(labels, tiny_t5, student={"lora": {"rank": 2, "save": save}})
    names = {name.split(".")[1] for name, p in of_run.student.named_parameters() if p.requires_grad}
    assert names == {"encoder", "decoder"}
    for _ in range(3):
        of_run.train_step()
    of_run.student.eval().save(tmp_path / "s")
    assert (tmp_path / "s" / "adapter_config.json").exists() is (save == "adapter")
    pairs = of_run.student.encode(["cat"] * 3, ["dog", "bird of beta", "alpha"])
    with torch.no_grad():
        trained, loaded, untrained = (
            s.scores(s(**s.collate(pairs)), [3])[0]
            for s in (of_run.student, load(tmp_path / "s"), start(tiny_t5, "mvp", **SIZES))
        )
    torch.testing.assert_close(loaded, trained, atol=1e-5, rtol=1e-4)
    assert (untrained - trained).abs().max() > 1e-3


# What is refused


def test_views_have_one_exit():
    with pytest.raises(ValidationError, match=r"an MVP \(views\) has its last layer"):
        CrossEncoderSettings(path="some/mvp", views=4, exit_layer=2)


def test_what_can_not_be_a_student(tiny_bert: Path, tiny_t5: Path, tmp_path: Path):
    with pytest.raises(ModelError, match="a bert can't be an MVP, only mt5, t5, umt5 can"):
        start(tiny_bert, "mvp", **SIZES)
    for views, bare in ((6, tiny_t5), (1, tiny_t5_folder(tmp_path / "bare"))):
        with pytest.raises(ModelError, match=rf"the tokenizer has no token <extra_id_{views - 1}>.*\(views: {views}\)"):
            start(bare, "mvp", views=views, **SIZES)
    with pytest.raises(ModelError, match=r"max_length \(40\) leaves no room for a passage: .* take 3\d tokens"):
        start(tiny_t5, "mvp", max_length=40, max_query_length=16)
    with pytest.raises(ModelError, match="a student with head mvp scores at its last layer alone"):
        start(tiny_t5, "mvp", **SIZES).truncated(1)


@pytest.mark.parametrize(
    ("student", "objective", "message"),
    [
        ({"head": "linear", "views": 2}, {}, "views is for head mvp, and the head is linear"),
        ({"head": "mvp", "views": 0}, {}, "greater than 0"),
        ({"head": "linear"}, {"orthogonality": 0.5}, r"orthogonality is for student\.head mvp, and the head is linear"),
        ({"head": "mvp", "layers": [1, 2]}, {}, "layers is for head linear and similarity"),
    ],
)
def test_settings_that_would_do_nothing(student: dict, objective: dict, message: str):
    with pytest.raises(ValidationError, match=message):
        settings("labels", Path("base"), student=student, objective=objective)


def test_exports(folder: Path, tmp_path: Path):
    """The folder itself goes anywhere; forms that score single pairs are refused, and nothing is left of them."""
    options = {"layer": None, "int8": False, "overwrite": False}
    export(str(folder), str(tmp_path / "out"), form="transformers", **options)
    torch.testing.assert_close(scored(load(tmp_path / "out"), LISTS), scored(load(folder), LISTS), rtol=0, atol=0)
    with pytest.raises(ModelError, match="scores of a student with head mvp depend on the whole list"):
        export(str(folder), str(tmp_path / "onnx"), form="onnx", **options)
    with pytest.raises(ModelError, match="decoders with head linear, not for t5 with head mvp"):
        export(str(folder), str(tmp_path / "flag"), form="flagembedding-layerwise", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
