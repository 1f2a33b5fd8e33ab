"""What is done to a loaded model changes its speed and, within its precision, nothing else."""

from __future__ import annotations

import copy
import platform
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures import published
from fixtures.students import DOCUMENTS, QUERIES, start, stirred
from fixtures.tiny_models import tiny_bert_folder, tiny_llama_tokenizer, tiny_t5_folder
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaModel

from rerank_ray.errors import ModelError
from rerank_ray.models import acceleration
from rerank_ray.models.acceleration import Int8Linear, accelerate
from rerank_ray.models.backends import load_backend
from rerank_ray.models.cross_encoder import CrossEncoder
from rerank_ray.models.hf_causal import HFCausal
from rerank_ray.models.protocol import (
    Attention,
    Embed,
    EmbedTokens,
    Generate,
    LogLikelihood,
    NextToken,
    Pair,
    PairList,
    Prompt,
)
from rerank_ray.settings.models import (
    BiEncoderSettings,
    ColBERTSettings,
    CrossEncoderSettings,
    HFCausalSettings,
    LayerwiseSettings,
    ScalarHeadSettings,
)

needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")


def settings(path: object = "unused", **given) -> CrossEncoderSettings:
    return CrossEncoderSettings(path=str(path), **given)


@pytest.fixture(params=["sums of 32 bits", "sums of 16 bits"])
def steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Of an 8-bit layer's weights to either side of 0, with each of the two kernels."""
    in_16_bits = request.param == "sums of 16 bits"
    if in_16_bits and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("x86's alone")
    monkeypatch.setattr(acceleration, "adds_in_16_bits", lambda: in_16_bits)
    return 64 if in_16_bits else 127


@pytest.mark.parametrize("bias", [True, False])
def test_an_8_bit_layer_by_hand(steps: int, bias: bool):
    """Of 127 steps: weights [[1, -2], [0.5, 0.25]] have scales 2/127 and 0.5/127, so 64 and −127 steps (63.5 rounds to
    even), 127 and 64. The input [3, -1] has scale 3/127: 127 and −42 steps. The products are 64·127 + 127·42 and
    127·127 − 64·42. Of 64 steps the weights are 32 and −64, 64 and 32: 32·127 + 64·42 and 64·127 − 32·42.
    """
    linear = nn.Linear(2, 2, bias=bias)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, -2.0], [0.5, 0.25]]))
        if bias:
            linear.bias.copy_(torch.tensor([10.0, 20.0]))
    first, second = {127: (13462, 13441), 64: (6752, 6784)}[steps]
    expected = torch.tensor([first * 2 / steps * 3 / 127, second * 0.5 / steps * 3 / 127])
    expected = expected + torch.tensor([10.0, 20.0]) if bias else expected
    found = Int8Linear(linear)(torch.tensor([[[3.0, -1.0]], [[0.0, 0.0]]]))
    torch.testing.assert_close(found[0, 0], expected)
    assert found.shape == (2, 1, 2)
    assert found[1, 0].tolist() == ([10.0, 20.0] if bias else [0.0, 0.0])


def test_8_bit_layers_are_near_the_layers_they_replace(steps: int):
    """A step is 1/127 of a row's largest value, or 1/64, and rounding errs by up to half a step in each of two
    factors."""
    torch.manual_seed(0)
    linear, x = nn.Linear(256, 96), torch.randn(5, 33, 256)
    found = Int8Linear(linear)(x)
    with torch.no_grad():
        expected = linear(x)
    assert (found - expected).std() < 0.02 * expected.std()


def test_no_sum_of_8_bit_products_overflows(steps: int):
    """Every factor as large as it gets: all products 127 · steps, and the same with the sign that the input has."""
    linear = nn.Linear(512, 64, bias=False)
    nn.init.constant_(linear.weight, 2.0)
    x = torch.tensor([[3.0], [-3.0]]).expand(2, 512)
    torch.testing.assert_close(Int8Linear(linear)(x), torch.tensor([[3072.0], [-3072.0]]).expand(2, 64))


def test_an_8_bit_row_does_not_depend_on_its_neighbours(steps: int):
    torch.manual_seed(0)
    layer, x = Int8Linear(nn.Linear(256, 96)), torch.randn(5, 256)
    torch.testing.assert_close(layer(torch.cat([x, 100 * x]))[:5], layer(x))


def test_only_large_linear_layers_become_8_bit():
    class Own(nn.Linear):
        pass

    model = nn.ModuleDict({"large": nn.Linear(64, 64), "head": nn.Linear(64, 1), "own": Own(64, 64)})
    accelerate(model, settings(dtype="int8"))
    assert isinstance(model["large"], Int8Linear)
    assert type(model["head"]) is nn.Linear
    assert type(model["own"]) is Own


def test_unmerged_adapters_stay_as_they_are():
    """One of rank 64 is as large as the layers that become 8-bit, and its base is one of them."""
    torch.manual_seed(0)
    lora = LoraConfig(r=64, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(64, 96)), lora).base_model.model.eval()
    x = torch.randn(9, 64)
    with torch.no_grad():
        expected = model(x)
        accelerate(model, settings(dtype="int8"))
        found = model(x)
    assert isinstance(model[0].base_layer, Int8Linear)
    assert type(model[0].lora_A["default"]) is nn.Linear
    assert (found - expected).std() < 0.02 * expected.std()


def test_8_bit_is_for_the_cpu():
    with pytest.raises(ModelError, match="dtype: int8 is for CPUs, and the device is meta: use bfloat16"):
        accelerate(nn.Linear(64, 64, device="meta"), settings(dtype="int8"))


def test_a_missing_compiler_is_said_at_the_start(monkeypatch: pytest.MonkeyPatch):
    def missing() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    with pytest.raises(ModelError, match=r"needs a C\+\+ compiler here, g\+\+ or clang\+\+"):
        accelerate(nn.Linear(4, 4), settings(compile=True))


def test_adaptive_exits_are_not_compiled():
    with pytest.raises(ValidationError, match="rows leave between them: leave one of the two out"):
        settings(compile=True, exit_layer="adaptive")


@needs_compiler
@pytest.mark.parametrize("head", [pytest.param("linear", marks=pytest.mark.slow), "similarity"])
def test_a_compiled_student_scores_as_it_did(tiny_bert: Path, tmp_path: Path, head: str):
    """Over batches of several sizes and lengths, the gated attention's included."""
    stirred(start(tiny_bert, head)).save(tmp_path)
    pairs = [Pair(query=q, text=d) for q, d in zip(QUERIES, DOCUMENTS, strict=True)]
    plain = CrossEncoder(settings(tmp_path, dtype="float32", max_length=64))
    compiled = CrossEncoder(settings(tmp_path, dtype="float32", max_length=64, compile=True))
    counters.clear()
    for some in (pairs, pairs[:3], pairs[1:2]):
        expected, found = ([a.value for a in model.run(some)] for model in (plain, compiled))
        assert not counters["graph_break"], "the whole is one program"
        np.testing.assert_allclose(found, expected, atol=1e-4)


@needs_compiler
def test_compiled_8_bit_layers_answer_as_they_did():
    """None of two layers with weights of one shape is taken for the other."""
    torch.manual_seed(0)
    plain, x = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), torch.randn(9, 64)
    compiled = copy.deepcopy(plain)
    accelerate(plain, settings(dtype="int8"))
    accelerate(compiled, settings(dtype="int8", compile=True))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), plain(x), atol=1e-5, rtol=0)


PUBLISHED = {
    "bi-encoder": lambda folder: BiEncoderSettings(path=str(tiny_bert_folder(folder)), max_length=64),
    "ColBERT": lambda folder: ColBERTSettings(path=str(published.colbert(folder)), max_length=64),
    "MVP": lambda folder: settings(tiny_t5_folder(folder, sentinels=4), views=4, max_length=64),
    "MiniCPM": lambda folder: LayerwiseSettings(path=str(published.minicpm_layerwise(folder)), max_length=256),
    "RankLLaMA": lambda folder: ScalarHeadSettings(
        **dict(zip(("path", "adapter"), map(str, published.rankllama(folder)), strict=True)), max_length=128
    ),
}


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_other_compiled_models_answer_as_they_did(tmp_path: Path, name: str):
    chosen = PUBLISHED[name](tmp_path / "model").model_copy(update={"dtype": "float32"})
    plain, compiled = load_backend(chosen), load_backend(chosen.model_copy(update={"compile": True}))
    calls = {
        "bi-encoder": [Embed(text=d, role="document") for d in DOCUMENTS],
        "ColBERT": [EmbedTokens(text=d, role="document") for d in DOCUMENTS],
        "MVP": [PairList(query="cat", texts=tuple(DOCUMENTS))],
    }.get(name, [Pair(query=q, text=d) for q, d in zip(QUERIES, DOCUMENTS, strict=True)])
    for expected, found in zip(plain.run(calls), compiled.run(calls), strict=True):
        np.testing.assert_allclose(found.value, expected.value, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_what_is_compiled(dtype: str):
    """Of a Llama of two layers five norms, two feed-forward blocks and the 8-bit layers of its attention; of a BERT the
    whole."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}

    def compiled(model: nn.Module) -> Counter[str]:
        accelerate(model, settings(compile=True, dtype=dtype))
        return Counter(type(m).__name__ for m in model.modules() if m._compiled_call_impl is not None)

    in_attention = {"Int8Linear": 2 * 4} if dtype == "int8" else {}
    llama = compiled(LlamaModel(LlamaConfig(vocab_size=9, **sizes)))
    assert llama == {"LlamaRMSNorm": 5, "LlamaMLP": 2} | in_attention
    assert compiled(BertModel(BertConfig(vocab_size=9, **sizes))) == {"BertModel": 1}


@needs_compiler
@pytest.mark.slow
def test_a_compiled_decoder_answers_as_it_did(tiny_llama: Path):
    """With and without a prefix that prompts share, whose keys and values are computed once, and what it attends to."""
    prompts = [Prompt(parts=("alpha beta " * 12, " gamma"), passages=(d,)) for d in ("cat", "the dog of beta", "iota")]
    calls = [NextToken(prompt=p, labels=("Yes", "No")) for p in prompts]
    calls += [LogLikelihood(prompt=p, continuation=" delta") for p in prompts]
    calls += [Generate(prompt=prompts[0], max_tokens=4)]
    plain = HFCausal(HFCausalSettings(path=str(tiny_llama), dtype="float32", max_length=96))
    compiled = HFCausal(HFCausalSettings(path=str(tiny_llama), dtype="float32", max_length=96, compile=True))
    for some in (calls, calls[:1], calls[4:]):
        for expected, found in zip(plain.run(some), compiled.run(some), strict=True):
            if isinstance(expected.value, str):
                assert found.value == expected.value
            else:
                np.testing.assert_allclose(found.value, expected.value, atol=1e-4)
    assert any(answer.usage.cached_tokens for answer in plain.run(calls))
    asked = [Attention(prompt=Prompt(parts=("", " alpha"), passages=("the cat",)), query="alpha", calibration="N/A")]
    (expected,), (found,) = plain.run(asked), compiled.run(asked)
    np.testing.assert_allclose(found.value[0], expected.value[0], atol=1e-6)


@needs_compiler
def test_attention_is_not_read_through_a_whole_program(tmp_path: Path):
    """GPT-2 has no RMSNorm, so it is compiled as one."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tiny_llama_tokenizer()), n_embd=32, n_layer=1, n_head=4))
    model.save_pretrained(tmp_path)
    tiny_llama_tokenizer().save_pretrained(tmp_path)
    kinds = [HFCausal(HFCausalSettings(path=str(tmp_path), max_length=96, compile=c)).answers for c in (False, True)]
    assert kinds[0] - kinds[1] == {Attention}
