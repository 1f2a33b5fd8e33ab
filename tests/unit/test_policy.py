"""The policy of GRPO: its probabilities beside a plain loop, how it draws, and what is saved of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from fixtures.tiny_models import tiny_bert_folder, tiny_llama_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from rerank_ray.distill.policy import Policy
from rerank_ray.errors import ModelError
from rerank_ray.models.hf_causal import HFCausal
from rerank_ray.models.protocol import Generate, Prompt
from rerank_ray.settings.models import HFCausalSettings
from rerank_ray.settings.reinforce import PolicySettings

LORA = {"rank": 4, "alpha": 8}


def policy(base: Path, **changes) -> Policy:
    torch.manual_seed(3)
    made = Policy(PolicySettings(base=str(base), max_length=256, **({"lora": LORA, "dtype": "float32"} | changes)))
    with torch.no_grad():
        for parameter in made.parameters():
            # Fresh adapters are zero: as training would, move them.
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) * 0.05)
    return made


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_probabilities_in_one_row_are_those_of_texts_alone(tiny_llama: Path, temperature: float):
    """Beside a plain pass over prompt and text, one text at a time; the gradient too."""
    made = policy(tiny_llama)
    prompt, texts = [5, 9, 200, 31, 7], [(40, 41, 1), (8,), (300, 12, 77, 13, 1)]
    told = made.log_probabilities(prompt, texts, temperature)
    expected = []
    for text in texts:
        ids = torch.tensor([[*prompt, *text]])
        logs = (made.model(ids).logits[0] / temperature).log_softmax(-1)
        expected += [logs[len(prompt) - 1 + i, token] for i, token in enumerate(text)]
    expected = torch.stack(expected)
    torch.testing.assert_close(told, expected, atol=1e-5, rtol=1e-5)
    trained = [p for p in made.parameters() if p.requires_grad]
    weights = torch.arange(1.0, 1 + len(told))
    for a, b in zip(
        torch.autograd.grad((weights * told).sum(), trained),
        torch.autograd.grad((weights * expected).sum(), trained),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_answers_are_drawn_by_the_weights_in_training(tiny_llama: Path):
    """Their log-probability as drawn is the sum of what the policy tells of their tokens, also after an update."""
    made = policy(tiny_llama)
    calls = [
        Generate(prompt=Prompt(parts=("the cat of",), passages=()), max_tokens=5, temperature=1.0, seed=s)
        for s in range(3)
    ]
    (ids,) = made.backend.encoder.encode([calls[0].prompt], [5])
    before = [a.tokens for a in made.backend.run(calls)]
    for _ in range(2):
        answers = made.backend.run(calls)
        for answer in answers:
            told = made.log_probabilities(ids, [answer.tokens]).sum().item()
            assert answer.log_probability == pytest.approx(told, abs=1e-4)
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.requires_grad:
                    parameter.mul_(-3.0)
    assert [a.tokens for a in answers] != before


def test_without_adapters_it_is_the_base(tiny_llama: Path):
    made = policy(tiny_llama)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    ids = torch.tensor([[5, 9, 200]])
    with made.without_adapters(), torch.no_grad():
        torch.testing.assert_close(made.model(ids).logits, base(ids).logits)
    assert (made.model(ids).logits - base(ids).logits).abs().max() > 0.1
    assert all(p.requires_grad for n, p in made.named_parameters() if "lora_" in n)


def test_only_what_is_trained_is_float32(tiny_llama: Path):
    made = policy(tiny_llama, dtype="bfloat16")
    assert {p.requires_grad: p.dtype for p in made.parameters()} == {True: torch.float32, False: torch.bfloat16}
    # As `from_pretrained` leaves it in what runs the saved model.
    assert made.model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert math.isfinite(made.log_probabilities([5, 6], [(7, 8)]).sum().item())


def test_a_saved_policy_is_an_ordinary_model(tiny_llama: Path, tmp_path: Path):
    made = policy(tiny_llama)
    made.save(tmp_path)
    ids = torch.tensor([[5, 9, 200, 31]])
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits
        torch.testing.assert_close(again, made.model(ids).logits, atol=1e-4, rtol=1e-4)
    call = Generate(prompt=Prompt(parts=("the cat of",), passages=()), max_tokens=5)
    backend = HFCausal(HFCausalSettings(path=str(tmp_path), max_length=256, dtype="float32"))
    assert backend.run([call])[0].value == made.backend.run([call])[0].value


def test_a_saved_policy_keeps_what_bfloat16_rounds_away(tiny_llama: Path, tmp_path: Path):
    """Each weight moved by less than half a step of its bfloat16: the file has base and change, to the last bit that
    float32 has of their sum."""
    made = policy(tiny_llama, dtype="bfloat16")
    layer = made.model.model.layers[1].self_attn.q_proj
    with torch.no_grad():
        for parameter in made.trained:
            parameter.mul_(0.01)
    base, change = layer.get_base_layer().weight.float(), layer.get_delta_weight("default").float()
    assert ((base + change).bfloat16() == base).float().mean() > 0.9
    made.save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    saved = load_file(tmp_path / "model.safetensors")["model.layers.1.self_attn.q_proj.weight"]
    torch.testing.assert_close(saved - base, change, atol=1e-7, rtol=0.0)
    assert layer.get_base_layer().weight.dtype == torch.bfloat16


def test_what_can_not_be_a_policy_is_refused(tmp_path: Path):
    bert = tiny_bert_folder(tmp_path / "bert")
    with pytest.raises(ModelError, match="a bert is no causal language model"):
        Policy(PolicySettings(base=str(bert), max_length=64))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    near = MistralConfig(vocab_size=500, num_hidden_layers=1, sliding_window=32, **sizes)
    MistralForCausalLM(near).save_pretrained(tmp_path / "near")
    tiny_llama_tokenizer().save_pretrained(tmp_path / "near")
    with pytest.raises(ModelError, match="layers see 32 tokens back, and max_length is 64"):
        Policy(PolicySettings(base=str(tmp_path / "near"), max_length=64))
    assert Policy(PolicySettings(base=str(tmp_path / "near"), max_length=32)).tokenizer is not None
