"""Students of every architecture: decoders and seq2seq models beside encoders, and what the standard libraries read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fixtures.students import DOCUMENTS, QUERIES, load, scores, start, stirred
from fixtures.tiny_models import (
    tiny_bert_tokenizer,
    tiny_decoder_folder,
    tiny_encoder_folder,
    tiny_llama_folder,
)
from safetensors.torch import load_file
from sentence_transformers import CrossEncoder as TheirCrossEncoder
from tokenizers import processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ByT5Tokenizer,
    DebertaV2Config,
    DebertaV2Model,
    ElectraConfig,
    ElectraModel,
    Gemma3TextConfig,
    GPTNeoXConfig,
    MegatronBertConfig,
    MegatronBertModel,
    ModernBertConfig,
    ModernBertDecoderConfig,
    ModernBertModel,
    OPTConfig,
    T5Config,
    T5ForConditionalGeneration,
    XLMRobertaXLConfig,
    XLMRobertaXLModel,
)

from rerank_ray.errors import ModelError
from rerank_ray.export import export
from rerank_ray.models.cross_encoder import CrossEncoder
from rerank_ray.models.hf_causal import HFCausal
from rerank_ray.models.hf_seq2seq import HFSeq2Seq
from rerank_ray.models.protocol import NextToken, Pair
from rerank_ray.models.scalar_head import ScalarHead
from rerank_ray.models.student import StudentPrompt, load_student
from rerank_ray.settings.models import (
    CrossEncoderSettings,
    HFCausalSettings,
    HFSeq2SeqSettings,
    ModelSettings,
    ScalarHeadSettings,
)

CHAT = StudentPrompt(text="{query} | {passage} ? Yes or No", system="Be brief", labels=("Yes", "No"))
MONOT5 = StudentPrompt(text="Query: {query} Document: {passage} Relevant:", chat=False, labels=("true", "false"))
TOKEN = MONOT5.model_copy(update={"labels": ("cat",)})


def pairs(settings) -> list[float]:
    """What the `cross_encoder` backend answers, on the same pairs."""
    backend = CrossEncoder(CrossEncoderSettings.model_validate(settings | {"dtype": "float32"}))
    return [a.value for a in backend.run([Pair(query=q, text=d) for q, d in zip(QUERIES, DOCUMENTS, strict=True)])]


def as_theirs(folder: Path, queries: list[str], documents: list[str]) -> list[torch.Tensor]:
    """The last layer's scores as transformers and sentence-transformers compute them, padded on the right."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "right"
    with torch.no_grad():
        logits = model(**tokenizer(queries, documents, padding=True, return_tensors="pt")).logits[:, 0]
    predicted = TheirCrossEncoder(str(folder), device="cpu").predict(
        list(zip(queries, documents, strict=True)), show_progress_bar=False
    )
    return [logits, torch.as_tensor(predicted)]


@pytest.mark.parametrize("pads_with", ["</s>", None])
def test_texts_that_end_with_the_padding_token_have_the_same_last_token_elsewhere(tmp_path: Path, pads_with):
    """As Qwen3-Embedding's do: transformers takes a text's last token that is no padding for its last."""
    base = tiny_llama_folder(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer.pad_token = pads_with
    tokenizer.save_pretrained(base)
    student = stirred(start(base, "linear", max_length=400, max_query_length=40))
    student.save(tmp_path / "student")
    queries = [f"query: {q}" for q in QUERIES]
    documents = [f"document: {d}" for d in DOCUMENTS]
    for found in as_theirs(tmp_path / "student", queries, documents):
        torch.testing.assert_close(found, scores(student)[-1], atol=1e-5, rtol=1e-4)


# Decoders with a scalar head


@pytest.mark.parametrize("layers", [None, (1, 2)])
def test_a_decoder_with_a_scalar_head_loads_anywhere(tiny_llama: Path, tmp_path: Path, layers: tuple | None):
    """transformers, sentence-transformers and the `scalar_head` backend read the last layer's score off the folder."""
    student = stirred(start(tiny_llama, "linear", layers=layers, max_length=400, max_query_length=40))
    student.save(tmp_path / "s")
    expected = scores(student)[-1]
    assert expected.std() > 0.1
    for theirs in as_theirs(tmp_path / "s", [f"query: {q}" for q in QUERIES], [f"document: {d}" for d in DOCUMENTS]):
        torch.testing.assert_close(theirs, expected, atol=1e-4, rtol=1e-4)
    backend = ScalarHead(
        ScalarHeadSettings(
            path=str(tmp_path / "s"), dtype="float32", max_query_length=40, max_document_length=300, max_length=400
        )
    )
    values = [a.value for a in backend.run([Pair(query=q, text=d) for q, d in zip(QUERIES, DOCUMENTS, strict=True)])]
    torch.testing.assert_close(torch.tensor(values), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("base", ["tiny_bert", "tiny_llama"])
def test_long_documents_are_cut_alike_elsewhere(request: pytest.FixtureRequest, tmp_path: Path, base: str):
    """At the student's `max_length`, not at its base's: sentence-transformers reads the folder, and an export's."""
    student = stirred(start(request.getfixturevalue(base), "linear", max_length=64, max_query_length=32))
    student.save(tmp_path / "s")
    export(str(tmp_path / "s"), str(tmp_path / "e"), form="transformers", layer=None, int8=False, overwrite=False)
    documents = ["dog of beta gamma " * 60, "cat", "alpha " * 59 + "dog bird the cat"]
    queries = ["which cat"] * len(documents)
    expected = scores(student, queries, documents)[-1]
    described = student.description
    for folder in (tmp_path / "s", tmp_path / "e"):
        pairs = [
            (described.query_prefix + q, described.document_prefix + d) for q, d in zip(queries, documents, strict=True)
        ]
        theirs = TheirCrossEncoder(str(folder), device="cpu").predict(pairs, show_progress_bar=False)
        torch.testing.assert_close(torch.as_tensor(theirs), expected, atol=1e-4, rtol=1e-4)


def test_a_layer_of_a_decoder_is_head_of_norm_of_hidden(tiny_llama: Path, tmp_path: Path):
    """One pair at a time, without padding, from the weights as they were saved."""
    student = stirred(start(tiny_llama, "linear", layers=(1, 2)))
    student.save(tmp_path / "s")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "s").eval()
    early = load_file(tmp_path / "s" / "heads.safetensors")["1.weight"]
    norm = load_file(tmp_path / "s" / "model.safetensors")["model.norm.weight"]
    for i, encoded in enumerate(student.encode(QUERIES, DOCUMENTS)):
        with torch.no_grad():
            output = model(torch.tensor([encoded["input_ids"]]), output_hidden_states=True)
        hidden = output.hidden_states[1][0, -1]
        normed = hidden / (hidden.pow(2).mean() + model.config.rms_norm_eps).sqrt() * norm
        expected = torch.stack([early[0] @ normed, output.logits[0, 0]])
        torch.testing.assert_close(scores(student)[:, i], expected, atol=1e-4, rtol=1e-4)


def test_a_truncated_decoder_is_the_layer(tiny_llama: Path, tmp_path: Path):
    whole = stirred(start(tiny_llama, "linear", layers=(1, 2)))
    expected = scores(whole)
    whole.truncated(1).save(tmp_path / "s")
    assert load(tmp_path / "s").pretrained.config.num_hidden_layers == 1
    torch.testing.assert_close(scores(load(tmp_path / "s"))[0], expected[0], atol=1e-5, rtol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 0.1
    whole.save(tmp_path / "w")
    torch.testing.assert_close(torch.tensor(pairs({"path": str(tmp_path / "w"), "exit_layer": 1})), expected[0])


def test_a_foreign_decoder_whose_pairs_stand_in_a_chat_template_is_refused(tiny_llama: Path, tmp_path: Path):
    """sentence-transformers puts them there; without a template its scores are ours."""
    bare = {"query_prefix": "", "document_prefix": ""}
    student = stirred(start(tiny_llama, "linear", max_length=400, max_query_length=40, **bare))
    student.save(tmp_path / "s")
    (tmp_path / "s" / "student.json").unlink()
    (theirs, _) = as_theirs(tmp_path / "s", QUERIES, DOCUMENTS)
    torch.testing.assert_close(torch.tensor(pairs({"path": str(tmp_path / "s"), "max_length": 400})), theirs)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "s")
    with pytest.raises(ModelError, match=r"a decoder with a chat template.* kind: scalar_head .* method: yes_no"):
        load(tmp_path / "s", max_length=400)


def test_how_a_decoders_pair_is_put(tiny_llama: Path):
    """RankLLaMA's words by default, any others, and none; the query is cut to its length, its prefix included."""

    def text(**given) -> str:
        student = start(tiny_llama, "linear", **given)
        return student.tokenizer.decode(student.encode(["cat"], ["dog"])[0]["input_ids"], skip_special_tokens=True)

    assert text() == "query: catdocument: dog"
    assert text(query_prefix="", document_prefix="\n") == "cat\ndog"
    student = start(tiny_llama, "linear")
    (encoded,) = student.encode(["cat " * 50], [""])
    (head,) = student.encode([""], ["dog"])
    assert len(encoded["input_ids"]) <= 16 + len(head["input_ids"])


# Students that stay language models


def test_a_yes_no_student_is_what_a_language_model_says(tiny_llama: Path, tmp_path: Path):
    """Saved, it is an ordinary causal model: the `hf_causal` backend and plain transformers give the same log-odds."""
    student = start(tiny_llama, "yes_no", prompt=CHAT, max_length=200)
    with torch.no_grad():
        student.model.lm_head.weight += 0.3 * torch.randn(student.model.lm_head.weight.shape)
    student.save(tmp_path / "s")
    expected = scores(student)
    assert expected.shape == (1, len(QUERIES))
    assert expected.std() > 0.1
    torch.testing.assert_close(scores(load(tmp_path / "s")), expected)
    torch.testing.assert_close(torch.tensor(pairs({"path": str(tmp_path / "s")})), expected[0], atol=1e-5, rtol=1e-5)
    backend = HFCausal(HFCausalSettings(path=str(tmp_path / "s"), dtype="float32", max_length=200))
    calls = [NextToken(prompt=CHAT.fill(q, d), labels=CHAT.labels) for q, d in zip(QUERIES, DOCUMENTS, strict=True)]
    odds = [a.value[0] - a.value[1] for a in backend.run(calls)]
    torch.testing.assert_close(torch.tensor(odds), expected[0], atol=1e-4, rtol=1e-4)
    model, tokenizer = (c.from_pretrained(tmp_path / "s") for c in (AutoModelForCausalLM, AutoTokenizer))
    text = "<|system|>Be brief<|end|><|user|>cat | bird ? Yes or No<|end|><|assistant|>"
    with torch.no_grad():
        logits = model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0, -1]
    yes, no = (tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in CHAT.labels)
    torch.testing.assert_close(logits[yes] - logits[no], expected[0, 0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("head", "prompt"), [("yes_no", MONOT5), ("token_logit", TOKEN)])
def test_a_seq2seq_student_is_read_at_the_first_decoder_step(tiny_t5: Path, tmp_path: Path, head: str, prompt):
    """monoT5's log-odds and RankT5's raw logit: as the `hf_seq2seq` backend and plain transformers have them."""
    student = start(tiny_t5, head, prompt=prompt, max_length=120)
    student.save(tmp_path / "s")
    expected = scores(student)[0]
    assert expected.std() > 0.01
    torch.testing.assert_close(scores(load(tmp_path / "s"))[0], expected)
    model, tokenizer = (c.from_pretrained(tmp_path / "s") for c in (AutoModelForSeq2SeqLM, AutoTokenizer))
    inputs = tokenizer("Query: cat Document: bird Relevant:", return_tensors="pt")
    with torch.no_grad():
        logits = model(input_ids=inputs["input_ids"], decoder_input_ids=torch.tensor([[0]])).logits[0, -1]
    ids = [tokenizer(label, add_special_tokens=False)["input_ids"][0] for label in prompt.labels]
    first = logits[ids[0]] - (logits[ids[1]] if head == "yes_no" else 0)
    torch.testing.assert_close(first, expected[0], atol=1e-4, rtol=1e-4)
    if head == "yes_no":
        backend = HFSeq2Seq(HFSeq2SeqSettings(path=str(tmp_path / "s"), dtype="float32", max_length=120))
        calls = [
            NextToken(prompt=prompt.fill(q, d), labels=prompt.labels) for q, d in zip(QUERIES, DOCUMENTS, strict=True)
        ]
        odds = [a.value[0] - a.value[1] for a in backend.run(calls)]
        torch.testing.assert_close(torch.tensor(odds), expected, atol=1e-4, rtol=1e-4)


ANY_DECODER = pytest.mark.parametrize(("head", "layers"), [("linear", (1, 2)), ("yes_no", None)])


@ANY_DECODER
def test_padding_and_neighbours_do_not_matter(tiny_llama: Path, head: str, layers: tuple | None):
    student = stirred(start(tiny_llama, head, layers=layers, prompt=CHAT))
    alone = torch.cat([scores(student, [q], [d]) for q, d in zip(QUERIES, DOCUMENTS, strict=True)], dim=1)
    torch.testing.assert_close(scores(student), alone, atol=1e-5, rtol=1e-5)


def test_a_prompt_keeps_its_end(tiny_llama: Path):
    """Only the document is cut, and a query to its length; a prompt with no room for a document is refused."""
    student = start(tiny_llama, "yes_no", prompt=CHAT, max_length=64)
    (encoded,) = student.encode(["cat " * 50], ["dog " * 100])
    assert len(encoded["input_ids"]) <= 64
    text = student.tokenizer.decode(encoded["input_ids"])
    assert text.endswith(" ? Yes or No<|end|><|assistant|>")
    for short in (40, 30):
        with pytest.raises(ModelError, match="raise max_length"):
            start(tiny_llama, "yes_no", prompt=CHAT, max_length=short)


# Encoders

ENCODERS = {
    "electra": (ElectraModel, ElectraConfig, {"embedding_size": 16}),
    "deberta-v2": (
        DebertaV2Model,
        DebertaV2Config,
        {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 2, "pooler_hidden_size": 32},
    ),
    "modernbert": (
        ModernBertModel,
        ModernBertConfig,
        {"local_attention": 16, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3},
    ),
}


@pytest.fixture(scope="module", params=ENCODERS)
def encoder(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder of each architecture, with the tiny BERT's tokenizer; ModernBERT knows no segments."""
    model, config, more = ENCODERS[request.param]
    folder = tmp_path_factory.mktemp(request.param) / request.param
    tiny_encoder_folder(folder, model, config, layers=3, **({"max_position_embeddings": 128} | more))
    if request.param == "modernbert":
        tokenizer = tiny_bert_tokenizer()
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
        tokenizer.save_pretrained(folder)
    return folder


def test_a_linear_student_of_any_encoder_loads_anywhere(encoder: Path, tmp_path: Path):
    layers = None if encoder.name == "modernbert" else (1, 3)
    student = stirred(start(encoder, "linear", layers=layers))
    student.save(tmp_path / "s")
    short = [d for d in DOCUMENTS if len(d) < 100]
    expected = scores(student, QUERIES[: len(short)], short)
    assert (expected.std(dim=1) > 0.01).all()
    torch.testing.assert_close(scores(load(tmp_path / "s"), QUERIES[: len(short)], short), expected)
    for theirs in as_theirs(tmp_path / "s", QUERIES[: len(short)], short):
        torch.testing.assert_close(theirs, expected[-1], atol=1e-4, rtol=1e-4)
    if layers is not None:
        torch.testing.assert_close(
            scores(student.truncated(1), QUERIES[: len(short)], short), expected[:1], atol=1e-5, rtol=1e-5
        )


# What can't be


def test_large_scores_stay_apart_in_sentence_transformers(tiny_cross_encoder: Path, tmp_path: Path):
    """Its sigmoid of the 80 that a list of 100 teaches is its sigmoid of 40."""
    student = load(tiny_cross_encoder, max_length=64)
    with torch.no_grad():
        student.model.classifier.weight *= 0
        student.model.classifier.bias.fill_(80.0)
    student.save(tmp_path / "s")
    (found,) = TheirCrossEncoder(str(tmp_path / "s"), device="cpu").predict([("cat", "dog")], show_progress_bar=False)
    assert found == 80.0


@pytest.mark.parametrize("head", ["linear", "mvp", "yes_no"])
def test_a_tokenizer_in_python_is_refused(tmp_path: Path, head: str):
    """ByT5's: it does not tell which token is of which text."""
    base = tmp_path / "base"
    sizes = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
    T5ForConditionalGeneration(T5Config(vocab_size=400, **sizes)).save_pretrained(base)
    ByT5Tokenizer().save_pretrained(base)
    with pytest.raises(ModelError, match=f"head {head} needs a tokenizer .* ByT5Tokenizer is written in Python"):
        start(base, head, prompt=MONOT5)
    if head == "mvp":
        with pytest.raises(ModelError, match="ByT5Tokenizer is written in Python"):
            load_student(ModelSettings(path=str(base)), views=2)


def test_a_decoder_with_another_head_than_llama_s_is_refused(tmp_path: Path):
    folder = tiny_decoder_folder(tmp_path / "base", ModernBertDecoderConfig, layers=3)
    with pytest.raises(ModelError, match="ModernBertDecoderForSequenceClassification: a decoder's scalar head is"):
        start(folder, "linear")


def test_a_decoder_that_looks_both_ways_is_refused(tmp_path: Path):
    """EmbeddingGemma's: without a mask its tokens would see the padding, and scores would hang on the batch."""
    more = {"num_key_value_heads": 2, "head_dim": 8, "use_bidirectional_attention": True}
    folder = tiny_decoder_folder(tmp_path / "base", Gemma3TextConfig, layers=3, **more)
    with pytest.raises(
        ModelError, match="use_bidirectional_attention: True in its config its tokens see those on their right"
    ):
        start(folder, "linear")
    assert start(folder, "bi_encoder").layers == (3,)


def test_a_layer_wise_gpt_neox(tmp_path: Path):
    """Pythia's kind: its last norm has a name of its own."""
    student = stirred(start(tiny_decoder_folder(tmp_path / "base", GPTNeoXConfig, layers=3), "linear", layers=(1, 3)))
    student.save(tmp_path / "s")
    torch.testing.assert_close(scores(load(tmp_path / "s")), scores(student))
    torch.testing.assert_close(scores(student.truncated(1, alone=True))[0], scores(student)[0])


def test_a_layer_wise_decoder_without_a_known_last_norm_is_refused_when_it_starts(tmp_path: Path):
    folder = tiny_decoder_folder(tmp_path / "base", OPTConfig, layers=3, ffn_dim=64, word_embed_proj_dim=32)
    with pytest.raises(ModelError, match="can't find its last norm"):
        start(folder, "linear", layers=(1, 3))


@pytest.mark.parametrize(
    ("model", "config", "head"),
    [(MegatronBertModel, MegatronBertConfig, "linear"), (XLMRobertaXLModel, XLMRobertaXLConfig, "similarity")],
)
def test_an_encoder_that_norms_its_last_layer_alone_has_no_early_heads(tmp_path: Path, model, config, head: str):
    """Cut to a layer it would score with that norm, which the layer's head never saw."""
    folder = tiny_encoder_folder(tmp_path / "base", model, config, layers=3)
    assert start(folder, head).layers == (3,)
    with pytest.raises(ModelError, match="ends with more than its layers, so its earlier layers can't have heads"):
        start(folder, head, layers=(1, 3))


def test_heads_that_an_architecture_can_not_carry(tiny_bert: Path, tiny_llama: Path, tiny_t5: Path, tmp_path: Path):
    with pytest.raises(ModelError, match="a bert is no language model that goes on with a text"):
        start(tiny_bert, "yes_no", prompt=CHAT)
    with pytest.raises(ModelError, match="a llama is no encoder: use head: yes_no"):
        start(tiny_llama, "similarity")
    with pytest.raises(ModelError, match="label 'Absolutely' is"):
        start(tiny_llama, "yes_no", prompt=CHAT.model_copy(update={"labels": ("Absolutely", "No")}))
    with pytest.raises(ModelError, match="max_length is 2000, but the model ends at 1024 tokens"):
        start(tiny_llama, "linear", max_length=2000)


def test_weights_of_another_architecture_are_refused(tiny_bert: Path, tmp_path: Path):
    """A Llama's weights beside a BERT's config: every layer would be random, and nobody would know."""
    folder = tiny_llama_folder(tmp_path / "m")
    (folder / "config.json").write_text((tiny_bert / "config.json").read_text())
    with pytest.raises(ModelError, match=r"no weights for \d+ parameters of its layers .* of another architecture"):
        start(folder, "linear")
