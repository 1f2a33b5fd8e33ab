"""Students: what the untrained one equals, gated attention against a plain twin, and what a saved one still gives."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from fixtures.students import DOCUMENTS, QUERIES, load, scores, start, stirred
from fixtures.tiny_models import HEADS, tiny_bert_tokenizer, tiny_cross_encoder_folder, tiny_encoder_folder
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    ElectraConfig,
    ElectraModel,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    RobertaConfig,
    RobertaModel,
)

from rerank_ray.errors import ModelError
from rerank_ray.models import attention
from rerank_ray.models.attention import gated_attention
from rerank_ray.models.bi_encoder import BiEncoder
from rerank_ray.models.cross_encoder import CrossEncoder
from rerank_ray.models.protocol import Embed, Pair
from rerank_ray.settings.models import BiEncoderSettings, CrossEncoderSettings

# The similarity head


def test_a_shut_gate_is_the_bi_encoder(tiny_bert: Path):
    """At gate −30 attention between the segments is e^−30, below float32's resolution: scale · cosine remains."""
    student = start(tiny_bert, "similarity", gate=-30.0)
    backend = BiEncoder(BiEncoderSettings(path=str(tiny_bert), dtype="float32", max_length=48, pooling="mean"))
    calls = [Embed(text=q, role="query") for q in QUERIES] + [Embed(text=d, role="document") for d in DOCUMENTS]
    vectors = torch.tensor([answer.value for answer in backend.run(calls)])
    cosines = (vectors[: len(QUERIES)] * vectors[len(QUERIES) :]).sum(-1)
    torch.testing.assert_close(scores(student)[0], 20 * cosines, atol=1e-4, rtol=1e-5)


def test_the_default_gate_is_nearly_the_bi_encoder(tiny_bert: Path):
    """e^−8 is 0.0003: the score at −8 is far nearer to the one at −30 than the one at 0 is."""
    shut, default, opened = (scores(start(tiny_bert, "similarity", gate=g))[0] for g in (-30.0, -8.0, 0.0))
    assert (default - shut).abs().max() < 0.05 * (opened - shut).abs().max()


@pytest.mark.parametrize(
    ("model", "config"), [(RobertaModel, RobertaConfig), (ElectraModel, ElectraConfig), (BertModel, BertConfig)]
)
def test_a_shut_gate_is_the_bi_encoder_whatever_the_architecture(tmp_path: Path, model: type, config: type):
    """RoBERTa counts positions from its padding id + 1: a segment that starts at 0 would be another text to it."""
    folder = tiny_encoder_folder(tmp_path / "m", model, config, layers=2)
    student = start(folder, "similarity", gate=-30.0)
    backend = BiEncoder(BiEncoderSettings(path=str(folder), dtype="float32", max_length=48, pooling="mean"))
    query, document = (
        torch.tensor(a.value) for a in backend.run([Embed(text="cat", role="query"), Embed(text="a", role="document")])
    )
    torch.testing.assert_close(scores(student, ["cat"], ["a"])[0, 0], 20 * query @ document, atol=1e-4, rtol=1e-5)


def test_an_architecture_that_can_not_be_gated_is_refused(tmp_path: Path):
    """MPNet's attention is its own code, which would take the gate and ignore it."""
    with pytest.raises(ModelError, match="MPNetModel does not use transformers' attention interface"):
        start(tiny_encoder_folder(tmp_path / "m", MPNetModel, MPNetConfig, layers=2), "similarity")


def reference_similarity(folder: Path, gate: float, interaction: float, query: str, document: str) -> float:
    """20 · (cosine of the segments' means + interaction · MaxSim) after transformers' eager attention with an explicit
    additive mask; MaxSim token by token, without the first and the last of each segment, which are special."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    q = tokenizer(query, truncation=True, max_length=16)["input_ids"]
    d = tokenizer(document, truncation=True, max_length=48)["input_ids"]
    segment = torch.tensor([0] * len(q) + [1] * len(d))
    bias = gate * (segment[:, None] != segment[None, :]).float()
    with torch.no_grad():
        hidden = model(
            input_ids=torch.tensor([q + d]),
            position_ids=torch.tensor([[*range(len(q)), *range(len(d))]]),
            attention_mask=bias[None, None],
        ).last_hidden_state[0]
    highest = [
        max((torch.cosine_similarity(a, b, dim=0).item() for b in hidden[len(q) + 1 : -1]), default=0.0)
        for i, a in enumerate(hidden[1 : len(q) - 1])
        if q[i + 1] != tokenizer.unk_token_id
    ]
    maxsim = sum(highest) / max(len(highest), 1)
    cosine = torch.cosine_similarity(hidden[: len(q)].mean(0), hidden[len(q) :].mean(0), dim=0).item()
    return 20 * (cosine + interaction * maxsim)


def test_texts_encoded_alone_score_as_pairs_with_the_gate_shut(tiny_bert: Path):
    """Every query with every document, at each layer, against one pair at a time; −40 leaves no attention across."""
    student = start(tiny_bert, "similarity", layers=(1, 3), gate=-40.0, interaction=(0.5, 2.0))
    room = student.description.max_length - student.description.max_query_length
    queries, *documents = (
        student.collate(student.encode_alone(texts, length))
        for texts, length in ((QUERIES, 16), (DOCUMENTS[:3], room), (DOCUMENTS[3:], room))
    )
    with torch.no_grad():
        actual = student.score_all(student.encoded(queries), [student.encoded(d) for d in documents])
    for number, query in enumerate(QUERIES):
        expected = scores(student, [query] * len(DOCUMENTS), DOCUMENTS)
        torch.testing.assert_close(actual[:, number], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("gate", "interaction"), [(0.0, 0.0), (-1.5, 0.0), (2.0, 0.0), (-8.0, 2.0), (-1.5, 0.5)])
def test_a_score_is_cosine_and_maxsim_after_gated_attention(tiny_bert: Path, gate: float, interaction: float):
    """The whole student against transformers' eager attention with the bias written out; at 0 it is plain attention."""
    pairs = zip(QUERIES, DOCUMENTS, strict=True)
    expected = [reference_similarity(tiny_bert, gate, interaction, q, d) for q, d in pairs]
    actual = scores(start(tiny_bert, "similarity", gate=gate, interaction=interaction))[0]
    torch.testing.assert_close(actual, torch.tensor(expected), atol=1e-4, rtol=1e-5)


def plain_attention(query, key, value, mask, gate, sign) -> torch.Tensor:
    """softmax(q·k/√d + β·[segments differ] + mask)·v, every tensor written out."""
    logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    differ = (sign[:, :, None] != sign[:, None, :]).to(query.dtype)
    logits = logits + gate[None, :, None, None] * differ[:, None]
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    return (logits.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("masked", [False, True])
def test_gated_attention_equals_the_plain_one_with_its_gradients(masked: bool, multiple: int, monkeypatch):
    """In float64, per head gates of either sign, with and without padding: output and all four gradients. So too where
    heads are widened to a multiple of 8, as on a GPU."""
    monkeypatch.setattr(attention, "width_multiple", lambda device: multiple)
    random = torch.Generator().manual_seed(0)
    shape = (3, HEADS, 7, 8)
    query, key, value = (torch.randn(shape, generator=random, dtype=torch.float64) for _ in range(3))
    gates = torch.randn(2, HEADS, generator=random, dtype=torch.float64) * 3
    sign = torch.tensor([[1, 1, 1, -1, -1, -1, -1], [1, -1, -1, -1, -1, -1, -1], [1, 1, 1, 1, 1, 1, -1]])
    mask = torch.ones(3, 1, 7, 7, dtype=torch.bool)
    mask[0, :, :, 5:] = False
    mask = mask if masked else None
    module = nn.Module()
    module.layer_idx = 1
    weight = torch.randn(3, 7, HEADS, 8, generator=random, dtype=torch.float64)
    gradients = []
    for gated in (True, False):
        leaves = [t.clone().requires_grad_() for t in (query, key, value, gates)]
        q, k, v, g = leaves
        if gated:
            output, _ = gated_attention(module, q, k, v, mask, gate=g, segment_sign=sign)
        else:
            output = plain_attention(q, k, v, mask, g[1], sign)
        (output * weight).sum().backward()
        gradients.append([output.detach(), *(leaf.grad for leaf in leaves)])
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain)
    assert gradients[0][4][0].abs().sum() == 0
    assert gradients[0][4][1].abs().min() > 0


def test_a_new_students_linear_term_is_zero(tiny_bert: Path):
    student = start(tiny_bert, "similarity", layers=(1, 3), interaction=2.0)
    heads = student.head_parameters()
    assert {n: tuple(p.shape) for n, p in heads.items()} == {
        "gate": (3, HEADS),
        "log_scale": (2,),
        "interaction": (2,),
        "linear": (2, 32),
    }
    assert heads["linear"].abs().sum() == 0
    torch.testing.assert_close(heads["log_scale"].exp(), torch.tensor([20.0, 20.0]))
    assert (heads["gate"] == -8).all()
    assert (heads["interaction"] == 2).all()


# Both heads


both_heads = pytest.mark.parametrize("head", ["linear", "similarity"])


@both_heads
def test_padding_and_neighbours_do_not_matter(tiny_bert: Path, head: str):
    """One padded batch of eight gives what eight batches of one give."""
    student = stirred(start(tiny_bert, head, layers=(1, 3), gate=-1.0))
    together = scores(student)
    alone = torch.cat([scores(student, [q], [d]) for q, d in zip(QUERIES, DOCUMENTS, strict=True)], dim=1)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert together.std() > 0.01


@both_heads
@pytest.mark.parametrize("layers", [None, (1, 2, 3)])
def test_a_saved_student_gives_the_same_scores(tiny_bert: Path, tmp_path: Path, head: str, layers: tuple | None):
    student = stirred(start(tiny_bert, head, layers=layers, gate=-1.0))
    student.save(tmp_path / "s")
    loaded = load(tmp_path / "s")
    assert loaded.description == student.description
    assert not loaded.training
    torch.testing.assert_close(scores(loaded), scores(student), atol=1e-6, rtol=1e-6)


@both_heads
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_a_truncated_student_is_the_layer(tiny_bert: Path, tmp_path: Path, head: str, layer: int):
    """Its last score is the whole student's at that layer, before and after saving, and it has no further layers."""
    whole = stirred(start(tiny_bert, head, layers=(1, 2, 3), gate=-1.0))
    short = whole.truncated(layer)
    assert short.layers == tuple(range(1, layer + 1))
    expected = scores(whole)[:layer]
    torch.testing.assert_close(scores(short), expected, atol=1e-5, rtol=1e-5)
    short.save(tmp_path / "s")
    torch.testing.assert_close(scores(load(tmp_path / "s")), expected, atol=1e-5, rtol=1e-5)
    count = AutoModel.from_pretrained(tmp_path / "s").config.num_hidden_layers
    assert count == layer
    torch.testing.assert_close(scores(whole)[:layer], expected)


@pytest.mark.parametrize("branch_layers", [0, 1])
def test_a_truncated_student_of_a_backbone_with_a_last_norm_is_the_layer(tmp_path: Path, branch_layers: int):
    """ModernBERT's: the whole student's early layers are scored behind it, as the cut student's last is."""
    alike = {"global_attn_every_n_layers": 1, "max_position_embeddings": 128}
    base = tiny_encoder_folder(tmp_path / "m", ModernBertModel, ModernBertConfig, layers=4, **alike)
    whole = stirred(start(base, "similarity", layers=(2, 4), interaction=1.0, branch_layers=branch_layers))
    torch.nn.init.normal_(whole.backbone.final_norm.weight, 1.0, 0.5)
    expected = scores(whole)[:1]
    assert expected.std() > 0.1
    torch.testing.assert_close(scores(whole.truncated(2)), expected, atol=1e-4, rtol=1e-4)


@both_heads
def test_the_backend_stops_at_its_exit_layer(tiny_bert: Path, tmp_path: Path, head: str):
    """Without exit_layer a layer-wise student stops at its last, and says so; a one-layer student has none."""
    student = stirred(start(tiny_bert, head, layers=(2, 3), gate=-1.0))
    student.save(tmp_path / "s")
    calls = [Pair(query=q, text=d) for q, d in zip(QUERIES, DOCUMENTS, strict=True)]
    for given, expected in ((2, 0), (3, 1), (None, 1)):
        backend = CrossEncoder(
            CrossEncoderSettings(path=str(tmp_path / "s"), dtype="float32", exit_layer=given, max_length=64)
        )
        values = torch.tensor([a.value for a in backend.run(calls)])
        torch.testing.assert_close(values, scores(student)[expected], atol=1e-5, rtol=1e-5)
        assert backend.exit_layer == (given or 3)
    with pytest.raises(ModelError, match=r"exit_layer: 1: this student has heads on layers \[2, 3\]"):
        CrossEncoder(CrossEncoderSettings(path=str(tmp_path / "s"), exit_layer=1))


@both_heads
@pytest.mark.parametrize("layers", [(1, 2), (3, 1), (1, 1, 3), (1, 4)])
def test_layers_that_can_not_be(tiny_bert: Path, head: str, layers: tuple[int, ...]):
    with pytest.raises(ModelError, match=r"give ascending layers of 1\.\.3 that end with 3"):
        start(tiny_bert, head, layers=layers)


@both_heads
def test_lengths_are_kept(tiny_bert: Path, head: str):
    """Query at most 16 tokens, both together at most 64; a short query leaves the rest to the linear one's document."""
    student = start(tiny_bert, head)
    encoded = student.encode(["cat", "cat " * 50], ["dog " * 100] * 2)
    lengths = [len(e["input_ids"]) for e in encoded]
    assert max(lengths) == 64
    ids = student.tokenizer.convert_tokens_to_ids
    cats = [e["input_ids"].count(ids("cat")) for e in encoded]
    assert cats == [1, 14]
    assert encoded[0]["input_ids"].count(ids("dog")) == (60 if head == "linear" else 46)


def test_new_parameters_are_those_of_the_heads(tiny_bert: Path):
    """Linear: the last layer's classifier is new and BERT's own pooler is not; early copies are new as a whole."""
    linear = start(tiny_bert, "linear", layers=(1, 3))
    new = {id(p) for p in linear.new_parameters()}
    names = {n for n, p in linear.named_parameters() if id(p) in new}
    assert names == {
        "model.classifier.weight",
        "model.classifier.bias",
        *(f"early_heads.1.{n}.{p}" for n in ("pooler.dense", "classifier") for p in ("weight", "bias")),
    }
    similarity = start(tiny_bert, "similarity")
    assert {id(p) for p in similarity.new_parameters()} == {id(p) for p in similarity.head_parameters().values()}


# Loading elsewhere


@pytest.mark.parametrize("layers", [None, (1, 2, 3)])
def test_a_linear_student_loads_anywhere(tiny_bert: Path, tmp_path: Path, layers: tuple | None):
    """transformers and sentence-transformers read the last layer's score off the saved folder."""
    from sentence_transformers import CrossEncoder as TheirCrossEncoder

    student = stirred(start(tiny_bert, "linear", layers=layers))
    student.save(tmp_path / "s")
    if layers is None:
        assert not (tmp_path / "s" / "heads.safetensors").exists()
    short = [d for d in DOCUMENTS if len(d) < 100]
    queries = QUERIES[: len(short)]
    expected = scores(student, queries, short)[-1]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "s").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "s")
    with torch.no_grad():
        theirs = model(**tokenizer(queries, short, padding=True, return_tensors="pt")).logits[:, 0]
    torch.testing.assert_close(theirs, expected, atol=1e-4, rtol=1e-4)
    predicted = TheirCrossEncoder(str(tmp_path / "s"), device="cpu").predict(
        list(zip(queries, short, strict=True)), show_progress_bar=False
    )
    torch.testing.assert_close(torch.as_tensor(predicted), expected, atol=1e-4, rtol=1e-4)


def test_any_cross_encoder_checkpoint_loads(tiny_cross_encoder: Path):
    """A checkpoint that is no student of ours: one layer, transformers' own logit."""
    student = load(tiny_cross_encoder, max_length=64)
    assert student.layers == (3,)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_cross_encoder).eval()
    inputs = tiny_bert_tokenizer()("cat", "the dog of beta", return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits[0]
    torch.testing.assert_close(scores(student, ["cat"], ["the dog of beta"])[0], expected, atol=1e-6, rtol=1e-6)


def test_a_checkpoint_without_a_head(tiny_bert: Path):
    with pytest.raises(ModelError, match=r"not a cross-encoder: the checkpoint has no weights for .*classifier"):
        load(tiny_bert)


def test_a_head_of_several_outputs(tmp_path: Path):
    folder = tiny_cross_encoder_folder(tmp_path / "three", num_labels=3)
    with pytest.raises(ModelError, match="the head has 3 outputs; a reranker's has one"):
        load(folder)


def test_a_long_query_where_the_tokenizer_ends_before_max_length(tiny_cross_encoder: Path):
    """max_length 512 on a model of 128 positions: the query may not take all 128 of them."""
    student = load(tiny_cross_encoder, max_length=512)
    (encoded,) = student.encode(["cat " * 300], ["dog " * 300])
    assert len(encoded["input_ids"]) <= 128
    assert scores(student, ["cat " * 300], ["dog " * 300]).isfinite().all()


def test_lengths_beyond_the_models_positions_are_refused(tiny_bert: Path, tiny_cross_encoder: Path, tmp_path: Path):
    """Where the tokenizer knows no end: before, the first long document ended the job with an IndexError."""
    for base, name in ((tiny_cross_encoder, "c"), (tiny_bert, "b")):
        shutil.copytree(base, tmp_path / name)
        tiny_bert_tokenizer(10**30).save_pretrained(tmp_path / name)
    with pytest.raises(ModelError, match="max_length is 400, but the model ends at 128 tokens"):
        load(tmp_path / "c", max_length=400)
    with pytest.raises(ModelError, match="max_length is 400, but the model ends at 128 tokens"):
        BiEncoder(BiEncoderSettings(path=str(tmp_path / "b"), max_length=400))
    assert load(tmp_path / "c", max_length=128)


def test_a_robertas_positions_begin_behind_its_padding_token(tmp_path: Path):
    """Of 70 positions the padding token, number 0, and those before it have one."""
    base = tiny_encoder_folder(tmp_path / "r", RobertaModel, RobertaConfig, layers=1)
    with pytest.raises(ModelError, match="max_length is 70, but the model ends at 69 tokens"):
        start(base, "linear", max_length=70)
    student = start(base, "linear", max_length=69)
    assert scores(student, ["cat"], ["dog " * 100]).isfinite().all()


def test_a_truncated_checkpoint_names_the_model(tiny_cross_encoder: Path, tmp_path: Path):
    shutil.copytree(tiny_cross_encoder, tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match=str(tmp_path / "m")):
        load(tmp_path / "m")
