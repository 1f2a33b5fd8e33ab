"""Decoders' sequences without padding: answers are those of one sequence at a time, and padding is not computed."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import pytest
import torch
from fixtures.students import DOCUMENTS, QUERIES, start, stirred
from fixtures.tiny_models import tiny_bert_folder, tiny_decoder_folder, tiny_llama_tokenizer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaForCausalLM, Qwen2Config

from rerank_ray.errors import ModelError
from rerank_ray.models import acceleration, packed_decoder
from rerank_ray.models.cross_encoder import CrossEncoder
from rerank_ray.models.hf_causal import HFCausal
from rerank_ray.models.last_token import computes_last_token_alone
from rerank_ray.models.packed_decoder import PACKABLE_DECODERS
from rerank_ray.models.plain_attention import attention_for_training
from rerank_ray.models.protocol import Attention, LogLikelihood, NextToken, Pair, Prompt
from rerank_ray.models.student import Student, StudentPrompt, adapt
from rerank_ray.settings.models import CrossEncoderSettings, HFCausalSettings
from rerank_ray.settings.student import StudentSettings

FRONTS = ["Query: alpha", "Query: the cat of alpha, and which dog is its friend?"]
PASSAGES = ["cat", "the dog of beta " * 9, "", "café 😀 שלום", "x" * 60, "the dog of beta " * 5]
PROMPTS = [Prompt(parts=(f"{q}\nPassage: ", "\nYes or No?"), passages=(p,)) for q in FRONTS for p in PASSAGES]
CONTINUATION = "the cat"
SHARED = {"num_key_value_heads": 2}
OWN = {"gemma": {"head_dim": 8}, "qwen3": {"head_dim": 8}}
CPU = torch.device("cpu")


def folder_of(kind: str, path: Path, **more: object) -> Path:
    return tiny_decoder_folder(path, CONFIG_MAPPING[kind], layers=3, **{**SHARED, **OWN.get(kind, {}), **more})


def backend(folder: Path, **settings) -> HFCausal:
    return HFCausal(HFCausalSettings(path=str(folder), max_length=300, **{"dtype": "float32", **settings}))


@torch.no_grad()
def one_by_one(folder: Path, model: HFCausal) -> list[list[float]]:
    """The log-probabilities of the continuation's tokens behind each prompt, from transformers' own attention."""
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    behind = model.tokenizer(CONTINUATION, add_special_tokens=False)["input_ids"]
    values = []
    for ids in model.encoder.encode(PROMPTS, [len(behind)] * len(PROMPTS)):
        logits = reference(torch.tensor([[*ids, *behind]])).logits[0, len(ids) - 1 : -1]
        values.append(logits.log_softmax(-1)[range(len(behind)), behind].tolist())
    return values


@pytest.mark.parametrize("kind", PACKABLE_DECODERS)
def test_answers_are_those_of_one_sequence_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str):
    """With prefixes of several lengths in a batch and without, with PyTorch's attention and taken apart, by blocks."""
    monkeypatch.setattr(packed_decoder, "_BLOCK", 24)
    folder = folder_of(kind, tmp_path)
    calls = [LogLikelihood(prompt=p, continuation=CONTINUATION) for p in PROMPTS]
    expected = None
    for share_prefix in (True, False):
        model = backend(folder, share_prefix=share_prefix)
        expected = expected or one_by_one(folder, model)
        assert torch.tensor(expected).std() > 1e-2
        for attention in (contextlib.nullcontext(), attention_for_training(CPU, 300)):
            with attention:
                results = model.run(calls)
            assert sum(r.usage.cached_tokens for r in results) > 0 or not share_prefix
            for result, wanted in zip(results, expected, strict=True):
                assert result.value == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("kind", PACKABLE_DECODERS)
@pytest.mark.parametrize("share_prefix", [True, False])
def test_labels_are_read_off_the_last_token_alone(tmp_path: Path, kind: str, share_prefix: bool):
    """They are transformers' logits behind each prompt. The last layer of Llama's kind computes one row a prompt, and
    one a prefix; of the others, whole prompts."""
    folder = folder_of(kind, tmp_path)
    model, rows = backend(folder, share_prefix=share_prefix), []
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.model.base_model.layers[-1].mlp.register_forward_hook(lambda _, x, __: rows.append(x[0].shape[:2].numel()))
    ids = model.tokenizer.convert_tokens_to_ids(["Yes", "No"])
    results = model.run([NextToken(prompt=p, labels=("Yes", "No")) for p in PROMPTS])
    computed, rows = sum(rows), []
    for prompt, result in zip(PROMPTS, results, strict=True):
        (tokens,) = model.encoder.encode([prompt], [0])
        with torch.no_grad():
            logits = reference(torch.tensor([tokens])).logits[0, -1, ids]
        assert result.value == pytest.approx(logits.tolist(), abs=1e-4)
    if computes_last_token_alone(model.model):
        assert len(PROMPTS) <= computed <= len(PROMPTS) + (len(FRONTS) if share_prefix else 0)
    else:
        assert computed > 3 * len(PROMPTS)
    assert computes_last_token_alone(model.model) == (kind in ("gemma", "llama", "mistral", "qwen2", "qwen3"))


def test_a_continuation_of_one_token_is_read_off_the_last_token_alone(tmp_path: Path):
    """Its logits are those of the prompt's last token; of longer ones every token's are read."""
    folder = folder_of("llama", tmp_path)
    model = backend(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    for continuation in ("cat", CONTINUATION):
        behind = model.tokenizer(continuation, add_special_tokens=False)["input_ids"]
        calls = [LogLikelihood(prompt=p, continuation=continuation) for p in PROMPTS]
        for prompt, result in zip(PROMPTS, model.run(calls), strict=True):
            (tokens,) = model.encoder.encode([prompt], [len(behind)])
            with torch.no_grad():
                logits = reference(torch.tensor([[*tokens, *behind]])).logits[0, len(tokens) - 1 : -1]
            expected = logits.log_softmax(-1)[range(len(behind)), behind].tolist()
            assert result.value == pytest.approx(expected, abs=1e-4)


def shapes_of(model: HFCausal) -> list[tuple[int, ...]]:
    """Rows and columns that the feed-forward block of the second layer computes, pass by pass."""
    shapes = []
    layer = model.model.base_model.layers[1]
    layer.mlp.register_forward_hook(lambda _, inputs, __: shapes.append(tuple(inputs[0].shape[:2])))
    model.run([NextToken(prompt=p, labels=("Yes", "No")) for p in PROMPTS])
    return shapes


def test_padding_is_not_computed(tmp_path: Path):
    """A layer's products are over the real tokens, up to the next multiple of 16."""
    model = backend(folder_of("llama", tmp_path), share_prefix=False)
    tokens = sum(len(ids) for ids in model.encoder.encode(PROMPTS, [0] * len(PROMPTS)))
    shapes = shapes_of(model)
    assert [rows for rows, _ in shapes] == [1] * len(shapes)
    computed = sum(columns for _, columns in shapes)
    assert tokens <= computed < tokens + 16 * len(shapes)
    assert (model.runner.computed.tokens, model.runner.computed.positions) == (tokens, computed)


@pytest.mark.parametrize(
    ("kind", "more", "settings"),
    [
        ("mistral", {"sliding_window": 24}, {}),
        ("stablelm", {}, {}),
        ("llama", {}, {"trained": True}),
        # Its norms are LayerNorms: it is compiled as a whole.
        ("starcoder2", {}, {"compile": True}),
    ],
    ids=["a window shorter than a sequence", "another architecture", "a model that is trained", "one program"],
)
def test_what_is_not_packed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, more: dict, settings: dict):
    folder = folder_of(kind, tmp_path, **more)
    if settings.get("compile"):
        monkeypatch.setattr(acceleration, "_compile", lambda model, device: None)
    model = backend(folder, compile=settings.get("compile", False))
    if settings.get("trained"):
        given = AutoModelForCausalLM.from_pretrained(folder).eval()
        model = HFCausal(HFCausalSettings(path=str(folder), max_length=300, dtype="float32"), given, model.tokenizer)
    assert max(rows for rows, _ in shapes_of(model)) > 1


def test_a_window_that_no_sequence_fills_is_none(tmp_path: Path):
    """Of a Mistral, and of a Qwen 2 some of whose layers have one."""
    mistral = backend(folder_of("mistral", tmp_path / "m", sliding_window=300))
    assert {rows for rows, _ in shapes_of(mistral)} == {1}
    some = {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 24}
    qwen = backend(tiny_decoder_folder(tmp_path / "q", Qwen2Config, layers=3, **SHARED, **some))
    assert max(rows for rows, _ in shapes_of(qwen)) > 1


def test_a_checkpoint_whose_own_code_can_t_pack_is_padded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(LlamaForCausalLM, "_can_set_attn_implementation_cached_value", False, raising=False)
    assert max(rows for rows, _ in shapes_of(backend(folder_of("llama", tmp_path)))) > 1


def test_attention_is_read_from_padded_batches_and_counted_so(tmp_path: Path):
    model = backend(folder_of("llama", tmp_path))
    assert {rows for rows, _ in shapes_of(model)} == {1}
    model.runner.computed.tokens = model.runner.computed.positions = 0
    prompts = [Prompt(parts=("A: ", "\nQuery: cat"), passages=(p,)) for p in PASSAGES]
    lengths = [len(ids) for ids in model.encoder.encode(prompts, [0] * len(prompts))]
    model.run([Attention(prompt=p, query="cat") for p in prompts])
    computed = model.runner.computed
    assert (computed.tokens, computed.positions) == (sum(lengths), len(prompts) * math.ceil(max(lengths) / 16) * 16)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("llama", {"is_causal": False}),
        ("qwen2", {"is_causal": False}),
        ("gemma", {"use_bidirectional_attention": True}),
    ],
)
def test_a_decoder_that_looks_both_ways_is_refused(tmp_path: Path, kind: str, more: dict):
    """Its tokens would see the padding."""
    folder = folder_of(kind, tmp_path, **more)
    for make in (backend, lambda folder: student(folder, head="linear"), lambda folder: student(folder, head="yes_no")):
        with pytest.raises(ModelError, match=rf"with {next(iter(more))}: .* in its config its tokens see"):
            make(folder)


def test_long_rope_is_refused_where_a_batch_would_change_a_score(tmp_path: Path):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    folder = folder_of("phi3", tmp_path, rope_parameters=rope, original_max_position_embeddings=64)
    with pytest.raises(ModelError, match=r"max_length is 300, but beyond 64 tokens LongRoPE .* set max_length to 64"):
        backend(folder)
    assert HFCausal(HFCausalSettings(path=str(folder), max_length=64, dtype="float32")).run(
        [NextToken(prompt=PROMPTS[0], labels=("Yes", "No"))]
    )


def test_padding_changes_no_rotation(tmp_path: Path):
    """Behind what prompts share, too, it ends where LongRoPE would rotate a batch otherwise."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    folder = folder_of("phi3", tmp_path, rope_parameters=rope, original_max_position_embeddings=64)
    prompts = [
        Prompt(parts=("The dog of alpha asks the cat of beta: ", ""), passages=(p * 80,)) for p in ("cat ", "beta ")
    ]
    values = []
    for share_prefix in (True, False):
        given = {"dtype": "float32", "share_prefix": share_prefix}
        model = HFCausal(HFCausalSettings(path=str(folder), max_length=64, **given))
        model._packs = model.runner._packed = model._prefix_runner._packed = False
        answers = model.run([NextToken(prompt=p, labels=("Yes", "No")) for p in prompts])
        assert all(60 < a.usage.prompt_tokens <= 64 for a in answers)
        assert (sum(a.usage.cached_tokens for a in answers) > 0) == share_prefix
        values.append([a.value for a in answers])
    torch.testing.assert_close(torch.tensor(values[0]), torch.tensor(values[1]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "xlnet"])
def test_an_encoder_with_a_language_models_head_is_refused(tmp_path: Path, kind: str):
    sizes = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    own = {} if kind == "xlnet" else {"hidden_size": 32, "num_attention_heads": 4}
    tokenizer = tiny_llama_tokenizer(chat=False)
    config = CONFIG_MAPPING[kind](vocab_size=len(tokenizer), **sizes, **own)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=rf"the tokens of {kind} see those on their right.* use kind: bi_encoder"):
        backend(tmp_path)


STUDENTS = {
    "linear": {"head": "linear"},
    "layer-wise": {"head": "linear", "layers": (1, 3)},
    "yes_no": {"head": "yes_no"},
    "adapters": {"head": "linear", "lora": {"rank": 2}},
    "checkpoints": {"head": "yes_no", "gradient_checkpointing": True},
}
WORDS = StudentPrompt(text="{query} | {passage} ?", chat=False, labels=("Yes", "No"))


def student(folder: Path, *, head: str, **given) -> Student:
    """A student as training has it."""
    settings = StudentSettings(base=str(folder), head=head, max_length=64, max_query_length=16, **given)
    student = stirred(start(folder, head, prompt=WORDS if head == "yes_no" else None, layers=given.get("layers")))
    adapt(student, settings)
    return student.train()


def scores_and_gradients(student: Student, *, packed: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Scores [layers, B], and the gradients of a sum of them with weights that are not all alike."""
    batch = student.batch(student.encode(QUERIES, DOCUMENTS), packed=packed)
    assert ("places" in batch) == packed
    student.zero_grad()
    with attention_for_training(CPU, 64):
        scores = student(**batch)
        (scores * torch.linspace(-1, 2, scores.numel()).reshape(scores.shape)).sum().backward()
    return scores.detach(), {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("form", STUDENTS)
def test_students_learn_as_from_padded_batches(tmp_path: Path, kind: str, form: str):
    learning = student(folder_of(kind, tmp_path), **STUDENTS[form])
    (scores, gradients), (expected, wanted) = (scores_and_gradients(learning, packed=p) for p in (True, False))
    assert expected.std() > 1e-3
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-4)
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_cross_encoders_score_without_padding(tmp_path: Path, kind: str):
    """Decoders and encoders alike, the scores those of one pair at a time."""
    folder = folder_of("llama", tmp_path / "m") if kind == "llama" else tiny_bert_folder(tmp_path / "m")
    stirred(start(folder, "linear")).save(tmp_path / "s")
    model = CrossEncoder(CrossEncoderSettings(path=str(tmp_path / "s"), max_length=64, dtype="float32"))
    calls = [Pair(query=q, text=d) for q, d in zip(QUERIES, DOCUMENTS, strict=True)]
    together = [a.value for a in model.run(calls)]
    (computed, tokens), alone = (model.runner.computed.positions, model.runner.computed.tokens), []
    for call in calls:
        (answer,) = model.run([call])
        alone.append(answer.value)
    assert torch.tensor(alone).std() > 1e-3
    assert together == pytest.approx(alone, abs=1e-5)
    assert tokens <= computed < tokens + 16 * 2
