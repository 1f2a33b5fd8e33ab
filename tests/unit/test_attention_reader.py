"""Attention read head by head against transformers' own matrices: eager attention, one prompt at a time, no padding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.tiny_models import tiny_llama_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from rerank_ray.errors import ModelError
from rerank_ray.models import engine
from rerank_ray.models.attention_reader import AttentionReader
from rerank_ray.models.hf_causal import HFCausal
from rerank_ray.models.protocol import Attention, Failure, NextToken, Prompt
from rerank_ray.models.tokenizing import PromptEncoder
from rerank_ray.settings.models import HFCausalSettings

LAYERS, HEADS = 2, 4
PASSAGES = [
    ["cat dog", "😀 bird of 😀", "x"],
    ["the dog of beta " * 12],
    ["alpha.", "", "café שלום\n\n", "gamma {query} [1]"],
    ["cat"] * 9,
]


def call(passages: list[str], query: str = "which cat of theta?", **options) -> Attention:
    middle = [f"\n\n[{i + 2}] " for i in range(len(passages) - 1)]
    parts = ("Passages:\n\n[1] ", *middle, f"\n\nFind passages for the query.\n\nQuery: {query}\nAnswer")
    return Attention(prompt=Prompt(parts=parts, passages=tuple(passages)), query=query, **options)


def backend(folder: Path, **settings) -> HFCausal:
    return HFCausal(HFCausalSettings(path=str(folder), dtype="float32", **settings))


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> HFCausal:
    return backend(tiny_llama)


@pytest.fixture(scope="module")
def eager(tiny_llama: Path):
    return AutoModelForCausalLM.from_pretrained(tiny_llama, attn_implementation="eager").eval()


@torch.inference_mode()
def plain_attention(eager, encoder: PromptEncoder, asked: Attention, query: str) -> list[np.ndarray]:
    """Mean attention of the query's tokens to each passage, [tokens, layers · heads], off the full matrices."""
    head, _, tail = asked.prompt.parts[-1].rpartition(asked.query)
    prompt = replace(asked.prompt, parts=(*asked.prompt.parts[:-1], head + query + tail))
    (spanned,) = encoder.encode_spans(prompt, query)
    (ids,) = encoder.encode([prompt], [0])
    assert spanned.ids == ids
    matrices = eager(torch.tensor([ids]), output_attentions=True).attentions
    every = torch.cat([m[0] for m in matrices])[:, spanned.query.start : spanned.query.stop].mean(1)
    return [every[:, span.start : span.stop].T.numpy() for span in spanned.passages]


def assert_close(value: tuple[np.ndarray, ...], expected: list[np.ndarray]) -> None:
    assert [v.shape for v in value] == [e.shape for e in expected]
    for v, e in zip(value, expected, strict=True):
        assert v.dtype == np.float32
        np.testing.assert_allclose(v, e, atol=1e-5)


# Values


@pytest.mark.parametrize("chat", [True, False])
def test_each_head_equals_the_full_matrices(tiny_llama: Path, eager, chat: bool):
    """GQA: two of the four heads share each of the two key heads. All calls go through the model in one batch."""
    model = backend(tiny_llama, chat=chat, tokens_per_batch=4096)
    calls = [call(passages, each_head=True) for passages in PASSAGES]
    for asked, result in zip(calls, model.run(calls), strict=True):
        assert_close(result.value, plain_attention(eager, model.encoder, asked, asked.query))


def test_calibration_is_the_difference_of_two_prompts(model: HFCausal, eager):
    """Texts that are shorter, longer, and that begin like the query: all as if each were a prompt of its own."""
    for text in ("N/A", "the dog of beta, gamma and delta " * 3, "which cat of", "which cat of theta? 😀"):
        calls = [call(passages, calibration=text, each_head=True) for passages in PASSAGES]
        for asked, result in zip(calls, model.run(calls), strict=True):
            query, calibration = (plain_attention(eager, model.encoder, asked, q) for q in (asked.query, text))
            assert_close(result.value, [a - b for a, b in zip(query, calibration, strict=True)])


def test_a_query_calibrated_by_itself_is_nothing(model: HFCausal):
    for result in model.run([call(p, calibration="which cat of theta?") for p in PASSAGES]):
        assert all((v == 0).all() for v in result.value)


def test_heads_add_up(model: HFCausal, eager):
    """All heads are their sum; chosen ones come in the order of the call, across layers."""
    chosen = ((1, 3), (0, 2), (1, 0))
    asked = [call(PASSAGES[0], **o) for o in ({}, {"heads": chosen}, {"heads": chosen, "each_head": True})]
    every = plain_attention(eager, model.encoder, asked[0], asked[0].query)
    columns = [layer * HEADS + head for layer, head in chosen]
    total, some, apart = model.run(asked)
    assert_close(total.value, [e.sum(1) for e in every])
    assert_close(some.value, [e[:, columns].sum(1) for e in every])
    assert_close(apart.value, [e[:, columns] for e in every])


def test_an_answer_is_the_same_alone_and_among_64(model: HFCausal):
    queries = [f"which dog {'of beta ' * (i % 7)}?" for i in range(64)]
    calls = [call([f"cat {i}", *PASSAGES[i % 4]], query, calibration="N/A") for i, query in enumerate(queries)]
    together = model.run(calls)
    for i in (0, 1, 13, 63):
        (alone,) = model.run([calls[i]])
        for a, b in zip(alone.value, together[i].value, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
        assert alone.usage == together[i].usage


@pytest.mark.parametrize(
    "make",
    [
        lambda **o: Qwen3ForCausalLM(Qwen3Config(head_dim=16, **o)),
        lambda **o: MistralForCausalLM(MistralConfig(sliding_window=None, **o)),
    ],
    ids=["qwen3", "mistral"],
)
def test_other_architectures(make):
    """Normalised queries and keys with a head dimension of their own; another family's layers."""
    tokenizer = tiny_llama_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=1,
            initializer_range=0.2,
        ).eval()
    encoder = PromptEncoder(tokenizer, 512, None)
    reader = AttentionReader(model, encoder, engine.BatchRunner(None, torch.device("cpu")))
    assert reader.shape == (3, 4)
    asked = call(PASSAGES[0], calibration="N/A", each_head=True)
    (result,) = reader.run([asked])
    model.set_attn_implementation("eager")
    a, b = (plain_attention(model, encoder, asked, q) for q in (asked.query, "N/A"))
    assert_close(result.value, [x - y for x, y in zip(a, b, strict=True)])


def test_other_calls_of_the_batch_are_answered_as_ever(model: HFCausal):
    """Reading leaves the model as it was, and each result stands in its call's place."""
    other = NextToken(prompt=call(PASSAGES[0]).prompt, labels=("Yes", "No"))
    (before,) = model.run([other])
    reading = call(PASSAGES[1])
    mixed = model.run([reading, other, reading, other])
    assert [isinstance(r.value[0], np.ndarray) for r in mixed] == [True, False, True, False]
    for result in (mixed[1], mixed[3], *model.run([other])):
        assert result.value == pytest.approx(before.value, abs=1e-5)
    np.testing.assert_array_equal(mixed[0].value[0], mixed[2].value[0])


# What is computed


def test_layers_above_the_last_head_are_not_run(model: HFCausal):
    """Of the last wanted layer nothing is run but its attention's queries and keys."""
    ran: list[str] = []
    parts = {f"layer {i}": layer for i, layer in enumerate(model.model.model.layers)}
    parts |= {f"mlp {i}": layer.mlp for i, layer in enumerate(model.model.model.layers)}
    parts["output"] = model.model.lm_head
    hooks = [m.register_forward_pre_hook(lambda _m, _i, name=name: ran.append(name)) for name, m in parts.items()]
    try:
        model.run([call(PASSAGES[0], heads=((0, 1),))])
        assert ran == ["layer 0"]
        ran.clear()
        model.run([call(PASSAGES[0], heads=((1, 0),)), call(PASSAGES[3], heads=((0, 0),))])
        assert ran == ["layer 0", "mlp 0", "layer 1"]
    finally:
        for hook in hooks:
            hook.remove()


def test_what_both_queries_share_is_computed_once(model: HFCausal):
    """The sequence is the prompt and the calibration prompt's own end, to the next multiple of 16."""
    shapes: list[torch.Size] = []
    hook = model.model.model.embed_tokens.register_forward_pre_hook(lambda _m, inputs: shapes.append(inputs[0].shape))
    asked = call(["dog of beta " * 40], calibration="N/A")
    (result,) = model.run([asked])
    hook.remove()
    both = model.encoder.encode_spans(asked.prompt, asked.query, ["N/A"])
    first, second = (len(p.ids) for p in both)
    assert result.usage.calls == 2
    assert result.usage.prompt_tokens == first + second
    assert result.usage.cached_tokens >= both[0].passages[0].stop
    assert [s[0] for s in shapes] == [1]
    assert 0 <= shapes[0][1] - (first + second - result.usage.cached_tokens) < 16


class Largest(TorchDispatchMode):
    """Remembers how many elements the largest tensor had that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(output) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return output


def test_no_matrix_of_the_whole_prompt_is_made(model: HFCausal, eager):
    """Of L² numbers there is not even one head's matrix; transformers' eager attention, beside it, makes one a head."""
    asked = call(["dog of beta " * 20] * 15, calibration="N/A", each_head=True)
    length = len(model.encoder.encode([asked.prompt], [0])[0])
    assert length > 900
    with Largest() as reading:
        model.run([asked])
    assert reading.elements < length**2 / 4
    with Largest() as full:
        plain_attention(eager, model.encoder, asked, asked.query)
    assert full.elements >= HEADS * length**2


# Truncation


def test_passages_are_cut_alike_for_both_queries(tiny_llama: Path, eager):
    """The calibration text is longer than the query: the passages make room for it, in both prompts."""
    model = backend(tiny_llama, max_length=160)
    text = "the dog of beta and gamma " * 4
    asked = call(["bird dog " * 80, "cat", "dog bird " * 80], calibration=text, each_head=True)
    first, second = model.encoder.encode_spans(asked.prompt, asked.query, [text])
    assert 150 <= len(second.ids) <= 160
    assert len(first.ids) < len(second.ids)
    (result,) = model.run([asked])
    lengths = [len(v) for v in result.value]
    assert lengths == [len(s) for s in first.passages] == [len(s) for s in second.passages]
    assert abs(lengths[0] - lengths[2]) <= 1
    assert lengths[1] == 1
    with torch.inference_mode():
        for sign, prompt in ((1, first), (-1, second)):
            matrices = eager(torch.tensor([prompt.ids]), output_attentions=True).attentions
            every = torch.cat([m[0] for m in matrices])[:, prompt.query.start : prompt.query.stop].mean(1)
            result = replace(
                result,
                value=tuple(
                    v - sign * every[:, s.start : s.stop].T.numpy()
                    for v, s in zip(result.value, prompt.passages, strict=True)
                ),
            )
    assert all(np.abs(v).max() < 1e-5 for v in result.value)


def test_a_prompt_without_room_fails_and_harms_no_neighbour(tiny_llama: Path):
    model = backend(tiny_llama, max_length=128)
    good = call(["cat"])
    results = model.run([good, call(["cat"], "alpha " * 200), call(["cat"], calibration="alpha " * 200), good])
    assert [isinstance(r, Failure) for r in results] == [False, True, True, False]
    assert "raise max_length" in results[1].reason
    np.testing.assert_array_equal(results[0].value[0], results[3].value[0])


# What can't be read


@pytest.mark.parametrize("heads", [((0, 4),), ((2, 0),), ((-1, 0),), ()])
def test_heads_that_the_model_has_not(model: HFCausal, heads):
    assert model.attention_shape == (LAYERS, HEADS)
    with pytest.raises(ModelError, match=r"head"):
        model.run([call(["cat"], heads=heads)])


def test_a_query_that_is_not_in_the_prompt(model: HFCausal):
    with pytest.raises(ModelError, match="the prompt's last part does not hold the query 'dog'"):
        model.run([replace(call(["dog"]), query="dog")])


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("sliding_window", 64, "slides over 64 tokens and max_length is 1024: lower max_length"),
        ("attn_logit_softcapping", 50.0, "soft cap"),
        ("layer_types", ["full_attention", "linear_attention"], r"layers without attention \(linear_attention\)"),
    ],
)
def test_attention_that_is_more_than_sdpa(tiny_llama: Path, field: str, value, said: str):
    model = backend(tiny_llama)
    setattr(model.model.config, field, value)
    with pytest.raises(ModelError, match=said):
        _ = model.attention_shape
