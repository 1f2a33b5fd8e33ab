"""The T5 backend against a plain loop of transformers, one prompt at a time and without padding."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from fixtures.rows import make_list
from fixtures.tiny_models import tiny_t5_folder
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    GenerationConfig,
    T5EncoderModel,
)

from rerank_ray.errors import ModelError
from rerank_ray.models.hf_seq2seq import HFSeq2Seq
from rerank_ray.models.protocol import Failure, Generate, LogLikelihood, NextToken, Prompt
from rerank_ray.ranking.rankers import Ranker
from rerank_ray.settings.models import HFSeq2SeqSettings
from rerank_ray.settings.rankers import YesNoSettings

PASSAGES = ["cat", "the dog of beta " * 12, "", "alpha {query} gamma", "x" * 90, "bird " * 70] * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_t5_folder(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def plain(folder: Path) -> tuple:
    """transformers' own tokenizer and model."""
    return AutoTokenizer.from_pretrained(folder), AutoModelForSeq2SeqLM.from_pretrained(folder).eval()


def backend(folder: Path, **settings) -> HFSeq2Seq:
    return HFSeq2Seq(HFSeq2SeqSettings(path=str(folder), dtype="float32", **settings))


def prompts(prefill: str = "") -> list[Prompt]:
    return [Prompt(parts=("Query: alpha Document: ", " Relevant:"), passages=(p,), prefill=prefill) for p in PASSAGES]


def text_of(prompt: Prompt) -> str:
    return f"{prompt.parts[0]}{prompt.passages[0]}{prompt.parts[1]}"


@torch.no_grad()
def plain_step(plain: tuple, prompt: Prompt, written: list[int]) -> torch.Tensor:
    """Log-probabilities of the token after those that the decoder has written."""
    tokenizer, model = plain
    ids = tokenizer(text_of(prompt), return_tensors="pt")["input_ids"]
    assert ids[0, -1] == tokenizer.eos_token_id
    return model(input_ids=ids, decoder_input_ids=torch.tensor([[0, *written]])).logits[0, -1].log_softmax(-1)


@pytest.mark.parametrize("tokens_per_batch", [512, 8192])
def test_scores_equal_a_plain_loop(folder: Path, plain: tuple, tokens_per_batch: int):
    """The first step's label logits, and a continuation's tokens one after another, in one mixed pool."""
    tokenizer, _ = plain
    true, false = tokenizer.convert_tokens_to_ids(["▁true", "▁false"])
    calls = [NextToken(prompt=p, labels=("true", "false")) for p in prompts()]
    likelihoods = [
        LogLikelihood(prompt=p, continuation=("the cat of alpha", "a dog")[i % 2]) for i, p in enumerate(prompts())
    ]
    results = backend(folder, tokens_per_batch=tokens_per_batch).run([*calls, *likelihoods])
    differences = []
    for call, result in zip(calls, results[: len(calls)], strict=True):
        logs = plain_step(plain, call.prompt, [])
        differences.append(result.value[0] - result.value[1])
        assert differences[-1] == pytest.approx((logs[true] - logs[false]).item(), abs=1e-4)
    assert max(differences) - min(differences) > 0.1
    for call, result in zip(likelihoods, results[len(calls) :], strict=True):
        tokens = tokenizer(call.continuation, add_special_tokens=False)["input_ids"]
        expected = [plain_step(plain, call.prompt, tokens[:i])[t].item() for i, t in enumerate(tokens)]
        assert result.value == pytest.approx(expected, abs=1e-4)
        assert result.usage.output_tokens == len(tokens)


def test_a_prefill_is_the_decoders(folder: Path, plain: tuple):
    """It stands before the label, the continuation and the text, and not in the encoder's prompt."""
    tokenizer, _ = plain
    begun = tokenizer("the cat", add_special_tokens=False)["input_ids"]
    model = backend(folder)
    prompt = prompts("the cat")[1]
    calls = [
        NextToken(prompt=prompt, labels=(" true", " false")),
        LogLikelihood(prompt=prompt, continuation=" dog"),
        Generate(prompt=prompt, max_tokens=1),
        Generate(prompt=prompts()[1], max_tokens=1),
    ]
    label, continuation, text, without = model.run(calls)
    logs = plain_step(plain, prompt, begun)
    true, false, dog = tokenizer.convert_tokens_to_ids(["▁true", "▁false", "▁dog"])
    assert label.value[0] - label.value[1] == pytest.approx((logs[true] - logs[false]).item(), abs=1e-4)
    assert continuation.value == pytest.approx([logs[dog].item()], abs=1e-4)
    assert text.value == tokenizer.decode([logs.argmax()], skip_special_tokens=True)
    assert text.log_probability == pytest.approx(logs.max().item(), abs=1e-4)
    assert without.value == tokenizer.decode([plain_step(plain, prompt, []).argmax()], skip_special_tokens=True)
    assert label.usage.prompt_tokens == len(tokenizer(text_of(prompt))["input_ids"])


@torch.no_grad()
def test_greedy_texts_are_those_of_transformers(folder: Path, plain: tuple, tmp_path: Path):
    """Token by token; a second end token that some texts come to makes rows leave the batch."""
    tokenizer, reference = plain
    encoded = [tokenizer(text_of(p), return_tensors="pt")["input_ids"] for p in prompts()[:6]]
    texts = [reference.generate(ids, max_new_tokens=20, do_sample=False)[0, 1:].tolist() for ids in encoded]
    counts = {t: sum(t in text for text in texts) for text in texts for t in text[1:]}
    end = min(counts, key=lambda t: abs(counts[t] - 3))
    assert 0 < counts[end] < 6
    shutil.copytree(folder, tmp_path / "m")
    GenerationConfig(eos_token_id=[1, end], pad_token_id=0, decoder_start_token_id=0).save_pretrained(tmp_path / "m")
    results = backend(tmp_path / "m").run([Generate(prompt=p, max_tokens=20) for p in prompts()[:6]])
    for ids, result in zip(encoded, results, strict=True):
        expected = reference.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=[1, end])[0, 1:].tolist()
        ended = expected[-1] in (1, end)
        assert result.usage.output_tokens == len(expected)
        assert result.value == tokenizer.decode(expected[:-1] if ended else expected, skip_special_tokens=True)
        assert result.cut_off is not ended
    assert {r.cut_off for r in results} == {True, False}


def test_samples_do_not_depend_on_neighbours(folder: Path):
    model = backend(folder)
    calls = [Generate(prompt=p, max_tokens=10, temperature=1.0, seed=5) for p in prompts()[:6]]
    together = model.run(calls)
    assert [model.run([c])[0].value for c in calls] == [r.value for r in together]
    other = Generate(prompt=calls[0].prompt, max_tokens=10, temperature=1.0, seed=6)
    assert model.run([other])[0].value != together[0].value


def test_long_passages_are_cut_and_prompts_without_room_fail(folder: Path):
    model = backend(folder, max_length=24)
    no_room = Prompt(parts=("alpha " * 40, ""), passages=("cat",))
    cut, failure = model.run([NextToken(prompt=p, labels=("true", "false")) for p in (prompts()[1], no_room)])
    assert 22 <= cut.usage.prompt_tokens <= 24
    assert isinstance(failure, Failure)


def test_a_method_runs_on_it(folder: Path, plain: tuple, tmp_path: Path):
    template = tmp_path / "t.yaml"
    template.write_text(
        "about: test\nmethod: yes_no\nchat: false\ntext: 'Query: {query} Document: {passage} Relevant:'\n"
        "labels: ['true', 'false']\n",
        encoding="utf-8",
    )
    request = make_list(size=3, text="which cat")
    model = HFSeq2SeqSettings(path=str(folder), dtype="float32")
    (outcome,) = Ranker(YesNoSettings(model=model, prompt=str(template))).rank([request])
    tokenizer, _ = plain
    true, false = tokenizer.convert_tokens_to_ids(["▁true", "▁false"])
    for candidate, score in zip(request.candidates, outcome.scores.scores, strict=True):
        prompt = Prompt(parts=("Query: which cat Document: ", " Relevant:"), passages=(candidate.text,))
        logs = plain_step(plain, prompt, [])
        assert score == pytest.approx((logs[true] - logs[false]).item(), abs=1e-4)


def test_a_label_of_several_tokens_is_refused(folder: Path):
    with pytest.raises(ModelError, match=r"label 'maybe' is \d tokens"):
        backend(folder).check_labels(("true", "maybe"), Prompt(parts=("a",), passages=()))


def test_an_encoder_alone_is_refused(folder: Path, tmp_path: Path):
    """Its decoder and output layer would be random, and other ones in every process."""
    T5EncoderModel.from_pretrained(folder).save_pretrained(tmp_path / "m")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "m")
    with pytest.raises(ModelError, match=r"no weights for decoder\.block\.0\S+ and \d+ more, which would be random"):
        backend(tmp_path / "m")


def test_models_of_other_families_are_refused(folder: Path, tmp_path: Path):
    shutil.copytree(folder, tmp_path / "bart")
    config = BartConfig(
        vocab_size=200,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
    )
    BartForConditionalGeneration(config).save_pretrained(tmp_path / "bart")
    with pytest.raises(ModelError, match="model type 'bart' is none of"):
        backend(tmp_path / "bart")
