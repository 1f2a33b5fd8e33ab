"""Students that embed query and document apart, and T5's encoder: against the backends and libraries that read them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from fixtures.published import colbert
from fixtures.students import DOCUMENTS, QUERIES, load, scores, start
from fixtures.tiny_models import tiny_decoder_folder, tiny_llama_tokenizer, tiny_t5_folder
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import LlamaConfig, T5EncoderModel

from rerank_ray.errors import ModelError
from rerank_ray.models.bi_encoder import BiEncoder
from rerank_ray.models.late_interaction import ColBERT
from rerank_ray.models.protocol import Embed, EmbedTokens
from rerank_ray.models.student import Student
from rerank_ray.settings.models import BiEncoderSettings, ColBERTSettings


def moved(student: Student) -> Student:
    """With all its parameters moved a little, as training would."""
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random) * 0.03)
    return student


def embedded(backend, kind: type, queries: list[str] = QUERIES, documents: list[str] = DOCUMENTS) -> tuple[list, list]:
    """The backend's values for the queries and for the documents."""
    calls = [kind(text=q, role="query") for q in queries] + [kind(text=d, role="document") for d in documents]
    values = [torch.tensor(a.value) for a in backend.run(calls)]
    return values[: len(queries)], values[len(queries) :]


@pytest.fixture(scope="module")
def tiny_colbert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colbert(tmp_path_factory.mktemp("colbert") / "c")


@pytest.mark.parametrize("prefix", [None, "alpha: "])
def test_a_bi_encoder_student_is_a_sentence_encoder(tiny_bert: Path, tmp_path: Path, prefix: str | None):
    """Its scores are scale · cosine of what the `bi_encoder` backend and sentence-transformers embed; both know its
    prefixes and where it cuts a document."""
    from sentence_transformers import SentenceTransformer

    student = moved(start(tiny_bert, "bi_encoder", query_prefix=prefix, max_length=80))
    student.save(tmp_path / "s")
    texts = [*QUERIES, "cat"], [*DOCUMENTS, "bird " * 30 + "dog " * 70]
    expected = scores(student, *texts)[0] / student.log_scale.exp().item()
    assert expected.std() > 0.01
    torch.testing.assert_close(scores(load(tmp_path / "s")), scores(student), atol=0, rtol=0)
    settings = BiEncoderSettings(path=str(tmp_path / "s"), dtype="float32")
    queries, documents = embedded(BiEncoder(settings), Embed, *texts)
    ours = torch.stack([q @ d for q, d in zip(queries, documents, strict=True)])
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    if prefix is not None:
        with pytest.raises(ModelError, match="query_prefix is 'query: ', but this student was trained with 'alpha: '"):
            BiEncoder(settings.model_copy(update={"query_prefix": "query: "}))
    model = SentenceTransformer(str(tmp_path / "s"), device="cpu")
    sides = [
        model.encode(side, prompt_name=role, convert_to_tensor=True, show_progress_bar=False)
        for side, role in zip(texts, ("query", "document"), strict=True)
    ]
    torch.testing.assert_close((sides[0] * sides[1]).sum(-1), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sides[0].norm(dim=-1), torch.ones(len(sides[0])), atol=1e-4, rtol=0)


def test_a_sentence_encoder_without_its_weights_is_refused(tiny_bert: Path, tmp_path: Path):
    """Under other names than the architecture's they are random; only a pooler, which nothing reads, may lack."""
    folder = tmp_path / "m"
    shutil.copytree(tiny_bert, folder)
    weights = load_file(folder / "model.safetensors")
    without_pooler = {name: tensor for name, tensor in weights.items() if not name.startswith("pooler.")}
    assert len(without_pooler) < len(weights)
    save_file(without_pooler, folder / "model.safetensors", metadata={"format": "pt"})
    settings = BiEncoderSettings(path=str(folder), dtype="float32", max_length=64)
    assert BiEncoder(settings).run([Embed(text="cat", role="query")])
    renamed = {f"net.{name}": tensor for name, tensor in weights.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"no weights for embeddings\.\S+ and \d+ more, which would be random"):
        BiEncoder(settings)


def test_a_sentence_encoder_with_a_further_module_is_refused(tiny_bert: Path, tmp_path: Path):
    """Embeddings without a Dense module are others; also with a pooling of one's own, and where a student begins."""
    folder = tmp_path / "m"
    shutil.copytree(tiny_bert, folder)
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
        {"idx": 3, "name": "3", "path": "3_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    for pooling in (None, "mean"):
        with pytest.raises(ModelError, match=r"m/modules\.json: module '2_Dense' is a Dense, without which"):
            BiEncoder(BiEncoderSettings(path=str(folder), pooling=pooling, max_length=64))
    with pytest.raises(ModelError, match="is a Dense"):
        start(folder, "bi_encoder")
    (folder / "modules.json").write_text(json.dumps([m for m in modules if m["path"] != "2_Dense"]))
    assert BiEncoder(BiEncoderSettings(path=str(folder), max_length=64)).pooling == "mean"
    start(folder, "bi_encoder")


def test_a_colbert_student_is_a_colbert_checkpoint(tiny_colbert: Path, tmp_path: Path):
    """Its scores are scale · the mean over the query's tokens of MaxSim, of what the `colbert` backend embeds, which
    leaves punctuation out."""
    queries, documents = [*QUERIES, "dog!"], [*DOCUMENTS, "dog! cat, (bird); dog?"]
    student = moved(start(tiny_colbert, "colbert", max_length=80))
    student.save(tmp_path / "s")
    expected = scores(student, queries, documents)[0] / student.log_scale.exp().item()
    assert expected.std() > 0.01
    torch.testing.assert_close(scores(load(tmp_path / "s")), scores(student), atol=0, rtol=0)
    backend = ColBERT(ColBERTSettings(path=str(tmp_path / "s"), dtype="float32"))
    ours = torch.stack(
        [(q @ d.T).amax(-1).mean() for q, d in zip(*embedded(backend, EmbedTokens, queries, documents), strict=True)]
    )
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_a_colbert_starts_from_a_bert_too(tiny_colbert: Path, tmp_path: Path):
    """Without its linear layer and its metadata, what is left is a BERT, whose new layer has 128 dimensions."""
    weights = load_file(tiny_colbert / "model.safetensors")
    folder = tmp_path / "bert"
    folder.mkdir()
    for file in tiny_colbert.iterdir():
        if file.name not in ("artifact.metadata", "model.safetensors"):
            (folder / file.name).write_bytes(file.read_bytes())
    del weights["linear.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    student = start(folder, "colbert")
    assert student.model.linear.weight.shape == (128, 32)
    assert any(p is student.model.linear.weight for p in student.new_parameters())


@pytest.mark.parametrize("head", ["bi_encoder", "colbert"])
def test_padding_and_neighbours_do_not_matter(tiny_colbert: Path, head: str):
    """And a query that comes several times in a batch is embedded once."""
    student = start(tiny_colbert, head)
    batch = student.collate(student.encode(QUERIES, DOCUMENTS))
    assert len(batch["query_ids"]) == len(set(QUERIES))
    alone = torch.cat([scores(student, [q], [d]) for q, d in zip(QUERIES, DOCUMENTS, strict=True)], dim=1)
    torch.testing.assert_close(scores(student), alone, atol=1e-5, rtol=1e-5)
    shuffled = scores(student, QUERIES[::-1], DOCUMENTS[::-1])
    torch.testing.assert_close(scores(student), shuffled.flip(1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_an_empty_text_of_a_tokenizer_without_special_tokens(tmp_path: Path, pooling: str):
    """As Qwen 2's: it is the token that ends texts, whatever stands beside it."""
    folder = tiny_decoder_folder(tmp_path / "base", LlamaConfig, layers=2)
    tokenizer = tiny_llama_tokenizer(chat=False)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.save_pretrained(folder)
    settings = BiEncoderSettings(path=str(folder), dtype="float32", pooling=pooling)
    (queries, documents) = embedded(BiEncoder(settings), Embed, ["", "cat"], ["", "</s>", "bird dog " * 9])
    for vector in (queries[0], documents[0]):
        torch.testing.assert_close(vector, documents[1], atol=1e-6, rtol=0)
    student = start(folder, "bi_encoder")
    assert scores(student, ["cat", "cat"], ["", "dog"]).isfinite().all()
    assert [e["input_ids"] for e in student.encode(["cat"], [""])] == [[tokenizer.eos_token_id]]


def test_a_t5_encoder_student(tmp_path: Path):
    """The head on the mean of the encoder's states, pair by pair without padding; saved and loaded."""
    student = start(tiny_t5_folder(tmp_path / "t5"), "linear")
    student.save(tmp_path / "s")
    torch.testing.assert_close(scores(load(tmp_path / "s")), scores(student), atol=0, rtol=0)
    model, head = T5EncoderModel.from_pretrained(tmp_path / "s").eval(), load_file(tmp_path / "s" / "heads.safetensors")
    for i, encoded in enumerate(student.encode(QUERIES, DOCUMENTS)):
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([encoded["input_ids"]])).last_hidden_state[0]
        expected = head["weight"] @ hidden.mean(0) + head["bias"]
        torch.testing.assert_close(scores(student)[:, i], expected, atol=1e-4, rtol=1e-4)
    text = student.tokenizer.decode(student.encode(["cat"], ["dog"])[0]["input_ids"])
    assert text.index("Query:") < text.index("cat") < text.index("Document:") < text.index("dog")


def test_what_is_refused(tiny_llama: Path, tiny_bert: Path, tmp_path: Path):
    with pytest.raises(ModelError, match="a ColBERT is a BERT with a linear layer, not a llama"):
        start(tiny_llama, "colbert")
    with pytest.raises(ModelError, match=r"the tokenizer lacks \[unused0\]"):
        start(tiny_bert, "colbert")
    t5 = tiny_t5_folder(tmp_path / "t5")
    with pytest.raises(ModelError, match="a t5 is no encoder"):
        start(t5, "bi_encoder")
    with pytest.raises(ModelError, match="a T5 encoder has a head on its last layer only"):
        start(t5, "linear", layers=(1, 2))
    with pytest.raises(ModelError, match="a student with head bi_encoder scores at its last layer alone"):
        start(tiny_bert, "bi_encoder").truncated(1)
