"""The decoder backend against a plain loop of transformers, one prompt at a time and without padding."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from fixtures.rows import make_list
from fixtures.tiny_models import tiny_llama_folder
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaModel

from rerank_ray.errors import ModelError
from rerank_ray.models import output_layer
from rerank_ray.models.hf_causal import HFCausal
from rerank_ray.models.protocol import Answer, Failure, LogLikelihood, NextToken, Prompt
from rerank_ray.models.resolve import _version, resolve
from rerank_ray.ranking.rankers import Ranker
from rerank_ray.settings.models import HFCausalSettings, ModelSettings
from rerank_ray.settings.rankers import QueryLikelihoodSettings, YesNoSettings
from rerank_ray.settings.reinforce import PolicySettings
from rerank_ray.settings.student import StudentSettings

PASSAGES = ["cat", "the dog of beta " * 12, "", "café 😀 שלום", "alpha {query} gamma", "x" * 90] * 11


def prompts(passages: list[str] = PASSAGES) -> list[Prompt]:
    return [Prompt(parts=("Query: alpha\nPassage: ", "\nAnswer Yes or No."), passages=(p,)) for p in passages]


def backend(folder: Path, **settings) -> HFCausal:
    return HFCausal(HFCausalSettings(path=str(folder), dtype="float32", **settings))


@pytest.fixture(scope="module")
def plain(tiny_llama: Path) -> tuple:
    """transformers' own tokenizer and model."""
    return AutoTokenizer.from_pretrained(tiny_llama), AutoModelForCausalLM.from_pretrained(tiny_llama).eval()


def chat_ids(tokenizer, prompt: Prompt) -> list[int]:
    """A prompt as the user's turn, its text filled in by hand."""
    text = prompt.parts[0] + prompt.passages[0] + prompt.parts[1]
    framed = f"<|user|>{text}<|end|><|assistant|>"
    assert framed == tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer(framed, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def plain_next_token(plain: tuple, prompt: Prompt, labels: tuple[str, ...]) -> list[float]:
    tokenizer, model = plain
    logits = model(torch.tensor([chat_ids(tokenizer, prompt)])).logits[0, -1]
    return [logits[tokenizer.convert_tokens_to_ids(label)].item() for label in labels]


@torch.no_grad()
def plain_log_likelihood(plain: tuple, prompt: Prompt, continuation: str) -> list[float]:
    """Each continuation token's log-probability from a forward pass of its own."""
    tokenizer, model = plain
    ids = chat_ids(tokenizer, prompt)
    values = []
    for token in tokenizer(continuation, add_special_tokens=False)["input_ids"]:
        values.append(model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token].item())
        ids = [*ids, token]
    return values


def test_weights_that_a_checkpoint_lacks_are_refused(tiny_llama: Path, tiny_bert: Path, tmp_path: Path):
    """They would be random, and other ones in every process: a model saved without its output layer, an encoder."""
    embedder = tmp_path / "embedder"
    shutil.copytree(tiny_llama, embedder)
    LlamaModel.from_pretrained(tiny_llama).save_pretrained(embedder)
    with pytest.raises(ModelError, match=r"embedder: .*no weights for lm_head\.weight, which would be random"):
        backend(embedder)
    with pytest.raises(ModelError, match=r"no weights for cls\.predictions\S+ and \d+ more, which would be random"):
        backend(tiny_bert, max_length=100)


def test_an_output_layer_tied_to_the_embeddings_is_not_missing(tiny_llama: Path, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    (answer,) = backend(tmp_path).run([NextToken(prompt=prompts()[0], labels=("Yes", "No"))])
    expected = plain_next_token((AutoTokenizer.from_pretrained(tmp_path), model), prompts()[0], ("Yes", "No"))
    assert answer.value == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("tokens_per_batch", [1024, 8192])
def test_next_token_logits_equal_a_plain_loop(tiny_llama: Path, plain: tuple, tokens_per_batch: int):
    """Prompts of 20 to 190 tokens, in batches of few and of many."""
    calls = [NextToken(prompt=p, labels=("Yes", "No")) for p in prompts()]
    results = backend(tiny_llama, tokens_per_batch=tokens_per_batch).run(calls)
    actual = torch.tensor([r.value for r in results])
    expected = torch.tensor([plain_next_token(plain, c.prompt, c.labels) for c in calls])
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert actual.std(0).min() > 0.01


def test_log_likelihoods_equal_a_plain_loop(tiny_llama: Path, plain: tuple):
    """Continuations of different lengths behind prompts of different lengths, next-token calls among them."""
    continuations = ["alpha", "which cat is the dog?", "שלום 😀", "a"]
    chosen = prompts()[:12]
    calls = [LogLikelihood(prompt=p, continuation=continuations[i % 4]) for i, p in enumerate(chosen)]
    mixed = [*calls, NextToken(prompt=chosen[0], labels=("No", "Yes"))]
    results = backend(tiny_llama).run(mixed)
    for call, result in zip(calls, results, strict=False):
        expected = plain_log_likelihood(plain, call.prompt, call.continuation)
        assert result.value == pytest.approx(expected, abs=1e-4)
        assert max(result.value) <= 0
    assert results[-1].value == pytest.approx(plain_next_token(plain, chosen[0], ("No", "Yes")), abs=1e-4)


def test_an_answer_is_the_same_alone_and_among_64(tiny_llama: Path):
    model = backend(tiny_llama)
    calls = [LogLikelihood(prompt=p, continuation="the cat of alpha") for p in prompts()[:64]]
    together = model.run(calls)
    for i in (0, 1, 2, 31, 63):
        (alone,) = model.run([calls[i]])
        assert alone.value == pytest.approx(together[i].value, abs=1e-4)
        assert alone.usage == dataclasses.replace(together[i].usage, cached_tokens=0)
    backwards = model.run(calls[::-1])[::-1]
    for a, b in zip(together, backwards, strict=True):
        assert a.value == pytest.approx(b.value, abs=1e-4)


def test_the_methods_scores_are_those_of_their_papers(tiny_llama: Path, plain: tuple):
    """yes_no: log p(yes) − log p(no); query_likelihood: the mean log-probability of the query's tokens."""
    request = make_list(size=4, text="which cat?")
    model = HFCausalSettings(path=str(tiny_llama), dtype="float32")
    yes_no = Ranker(YesNoSettings(model=model))
    (outcome,) = yes_no.rank([request])
    template = "Given a search query, find passages that answer it.\n\nQuery: which cat?\nPassage: "
    question = "\n\nDoes the passage answer the query? Answer Yes or No."
    for candidate, score in zip(request.candidates, outcome.scores.scores, strict=True):
        prompt = Prompt(parts=(template, question), passages=(candidate.text,))
        yes, no = plain_next_token(plain, prompt, ("Yes", "No"))
        assert score == pytest.approx(yes - no, abs=1e-4)
    likelihood = Ranker(QueryLikelihoodSettings(model=model))
    (outcome,) = likelihood.rank([request])
    for candidate, score in zip(request.candidates, outcome.scores.scores, strict=True):
        parts = ("Passage: ", "\n\nPlease write a question based on this passage.")
        logs = plain_log_likelihood(plain, Prompt(parts=parts, passages=(candidate.text,)), "which cat?")
        assert score == pytest.approx(sum(logs) / len(logs), abs=1e-4)
    assert outcome.usage.calls == 4
    assert outcome.usage.output_tokens == 4 * len(plain[0]("which cat?", add_special_tokens=False)["input_ids"])


def test_a_prompt_without_room_fails_and_harms_no_neighbour(tiny_llama: Path):
    model = backend(tiny_llama, max_length=64)
    good = NextToken(prompt=prompts(["cat"])[0], labels=("Yes", "No"))
    long_query = Prompt(parts=("alpha " * 200, "?"), passages=("cat",))
    results = model.run([good, NextToken(prompt=long_query, labels=("Yes", "No")), good])
    assert isinstance(results[1], Failure)
    assert "raise max_length" in results[1].reason
    assert results[0].value == results[2].value == pytest.approx(model.run([good])[0].value, abs=1e-4)


def test_a_continuation_longer_than_the_model_fails(tiny_llama: Path):
    (result,) = backend(tiny_llama, max_length=64).run(
        [LogLikelihood(prompt=prompts(["cat"])[0], continuation="cat " * 100)]
    )
    assert isinstance(result, Failure)


def test_usage_counts_the_tokens_that_were_computed(tiny_llama: Path, plain: tuple):
    tokenizer, _ = plain
    prompt = prompts(["cat"])[0]
    (result,) = backend(tiny_llama).run([LogLikelihood(prompt=prompt, continuation="which cat")])
    assert isinstance(result, Answer)
    assert result.usage.prompt_tokens == len(chat_ids(tokenizer, prompt))
    assert result.usage.output_tokens == len(tokenizer("which cat", add_special_tokens=False)["input_ids"])


def test_a_label_of_several_tokens_is_refused_before_any_row(tiny_llama: Path, tmp_path: Path):
    template = tmp_path / "t.yaml"
    template.write_text(
        "about: test\nmethod: yes_no\ntext: '{query} {passage}'\nlabels: [Relevant indeed, 'No']\n", encoding="utf-8"
    )
    with pytest.raises(ModelError, match=r"label 'Relevant indeed' is \d+ tokens"):
        Ranker(YesNoSettings(model=HFCausalSettings(path=str(tiny_llama)), prompt=str(template)))


# Models that can't be used


def test_max_length_beyond_the_model(tiny_llama: Path):
    with pytest.raises(ModelError, match="max_length is 2048, but the model ends at 1024 tokens"):
        backend(tiny_llama, max_length=2048)


def test_chat_without_a_template(tmp_path: Path):
    folder = tiny_llama_folder(tmp_path / "plain", chat=False)
    with pytest.raises(ModelError, match="chat: true, but the tokenizer has no chat template"):
        backend(folder, chat=True)


@pytest.mark.parametrize("path", ["/no/such/model", "./nothing", "a/b/c", "~/nothing-here", "no-such.gguf"])
def test_a_folder_that_is_not_there(path: str):
    with pytest.raises(ModelError, match="no such model folder or file"):
        resolve(ModelSettings(path=path))


@torch.no_grad()
def test_labels_logits_are_not_rounded_to_bfloat16(tiny_llama: Path):
    """They are the float32 product of the output layer's weights with the states that its model computes in bfloat16,
    where the model's own have 8 bits and so meet."""
    model = HFCausal(HFCausalSettings(path=str(tiny_llama), dtype="bfloat16"))
    words = ["cat", "dog", "a cat and a dog", "dog dog cat"]
    calls = [NextToken(prompt=Prompt(parts=("Passage: ", "?"), passages=(w,)), labels=("Yes", "No")) for w in words]
    ids = model.tokenizer.convert_tokens_to_ids(["Yes", "No"])
    weights = model.model.get_output_embeddings().weight
    for call, result in zip(calls, model.run(calls), strict=True):
        (tokens,) = model.encoder.encode([call.prompt], [0])
        state = model.model.base_model(torch.tensor([tokens])).last_hidden_state[0, -1]
        assert result.value == pytest.approx((weights[ids].float() @ state.float()).tolist(), abs=0.1)
        rounded = torch.tensor(result.value).bfloat16().float()
        assert (rounded != torch.tensor(result.value)).any()


def test_no_logits_but_those_that_are_read(tiny_llama: Path):
    """Of labels two columns at each prompt's last position, outside the output layer; of a continuation the whole
    vocabulary at as many positions as it has tokens, and at none of the prompt's but the last."""
    model = HFCausal(HFCausalSettings(path=str(tiny_llama), dtype="float32"))
    prompts = [Prompt(parts=("Passage: ", "?"), passages=(w,)) for w in ("cat", "dog " * 20, "a cat and a dog")]
    columns, positions = [], []
    layer, product = model.model.get_output_embeddings(), output_layer.product_in_float32

    def counted(states, weight, bias):
        columns.append((states.numel() // states.shape[-1], len(weight)))
        return product(states, weight, bias)

    layer.register_forward_hook(lambda _, inputs, __: positions.append(inputs[0].numel() // inputs[0].shape[-1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output_layer, "product_in_float32", counted)
        model.run([NextToken(prompt=p, labels=("Yes", "No")) for p in prompts])
    assert sum(rows for rows, _ in columns) == len(prompts)
    assert {of for _, of in columns} == {2}
    assert sum(positions) == 0
    continuation = " the cat of alpha"
    model.run([LogLikelihood(prompt=p, continuation=continuation) for p in prompts])
    tokens = model.tokenizer(continuation, add_special_tokens=False)["input_ids"]
    assert sum(positions) == len(prompts) * len(tokens)


def test_pickled_weights_need_permission(tiny_llama: Path, tmp_path: Path):
    shutil.copytree(tiny_llama, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="holds only pickled weights"):
        resolve(ModelSettings(path=str(tmp_path / "m")))
    resolve(ModelSettings(path=str(tmp_path / "m"), allow_pickle=True))
    for kind in (StudentSettings, PolicySettings):
        resolve(kind(base=str(tmp_path / "m"), allow_pickle=True).model_settings())


def test_folders_that_hold_no_model(tiny_llama: Path, tmp_path: Path):
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        resolve(ModelSettings(path=str(tmp_path)))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds no weights"):
        resolve(ModelSettings(path=str(tmp_path)))
    with pytest.raises(ModelError, match=r"a model is a folder or a \.gguf file"):
        resolve(ModelSettings(path=str(tiny_llama / "model.safetensors")))


@pytest.mark.parametrize("mistyped", ["runs/student", "no-such-model", "runs/no-such.gguf"])
def test_a_mistyped_path_is_told_apart_from_a_hub_that_fails(
    mistyped: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With at most one slash it may be a hub's id."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError) as caught:
        HFCausal(HFCausalSettings(path=mistyped))
    assert str(caught.value).startswith(f"{mistyped}: is no folder or file here, and AutoTokenizer can't load it from")
    assert str(caught.value).endswith("check the path or, for a hub model, its id, revision and the network")


def test_a_gguf_file_that_a_folder_here_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder of the repository's name is what transformers would look into."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(ModelError, match=r"^runs/no-such\.gguf: no such model folder or file$"):
        resolve(HFCausalSettings(path="runs/no-such.gguf"))


@pytest.mark.parametrize("broken", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_a_truncated_file_names_the_model(tiny_llama: Path, tmp_path: Path, broken: str):
    shutil.copytree(tiny_llama, tmp_path / "m")
    file = tmp_path / "m" / broken
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ModelError, match=f"{tmp_path / 'm'}: .* can't load this model"):
        backend(tmp_path / "m")


def test_the_identity_is_that_of_the_files(tiny_llama: Path, tmp_path: Path):
    """A copy of a folder has the same digest; one byte of another weight changes it."""
    shutil.copytree(tiny_llama, tmp_path / "m")
    digest = resolve(ModelSettings(path=str(tiny_llama))).identity.split("@")[1]
    assert resolve(ModelSettings(path=str(tmp_path / "m"))).identity == f"{tmp_path / 'm'}@{digest}"
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert resolve(ModelSettings(path=str(tmp_path / "m"))).identity.split("@")[1] != digest


def test_how_an_embedding_model_pools_is_part_of_its_identity(tiny_llama: Path, tmp_path: Path):
    """sentence-transformers keeps that in a folder beside the model; what training leaves there is no part of it."""
    folder = tmp_path / "m"
    shutil.copytree(tiny_llama, folder)

    def identity(file: str, content: str) -> str:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(content)
        return resolve(ModelSettings(path=str(folder))).identity

    mean = identity("1_Pooling/config.json", '{"pooling_mode_mean_tokens": true}')
    assert identity("checkpoint-500/config.json", "{}") == mean
    assert identity("1_Pooling/config.json", '{"pooling_mode_cls_token": true}') != mean


def test_the_base_is_part_of_an_adapters_identity(tiny_llama: Path, tmp_path: Path):
    """Of a folder of adapters alone: it names its base, whose weights may change."""
    base, adapters = tmp_path / "base", tmp_path / "adapters"
    shutil.copytree(tiny_llama, base)
    adapters.mkdir()
    shutil.copy(base / "config.json", adapters)
    (adapters / "model.safetensors").write_bytes(b"adapters")
    (adapters / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    before = resolve(ModelSettings(path=str(adapters))).identity
    assert before.endswith(f" on {resolve(ModelSettings(path=str(base))).identity}")
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert resolve(ModelSettings(path=str(adapters))).identity != before


def test_a_tensor_in_the_middle_of_a_large_file_changes_the_identity(tmp_path: Path):
    """LoRA merged into some layers leaves embeddings and the last layers as they were."""
    file = tmp_path / "model.gguf"

    def identity(content: bytearray) -> str:
        file.write_bytes(content)
        return resolve(ModelSettings(path=str(file))).identity

    content = bytearray(8 << 20)
    before = identity(content)
    content[4_000_001 : 4_000_001 + (64 << 10)] = b"\x01" * (64 << 10)
    assert identity(content) != before


def test_a_package_of_another_name_than_its_distribution_has_that_ones_version():
    assert _version("yaml") == importlib.metadata.version("PyYAML")
    assert _version("gguf") == importlib.metadata.version("gguf")
    assert _version("json") == "unknown"


def test_a_revision_is_for_the_hub(tiny_llama: Path):
    with pytest.raises(ModelError, match=r"'revision' \(v1\) only applies to hub models"):
        resolve(ModelSettings(path=str(tiny_llama), revision="v1"))
    hub = resolve(ModelSettings(path="org/name", revision="v1"))
    assert (hub.pretrained_arguments, hub.identity) == (
        {"pretrained_model_name_or_path": "org/name", "revision": "v1"},
        "org/name@v1",
    )
    gguf = resolve(ModelSettings(path="org/name/file.gguf"))
    assert (gguf.source, gguf.gguf_file, gguf.identity) == ("org/name", "file.gguf", "org/name/file.gguf@main")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("package://no_such_package/model", "Python package 'no_such_package' is not installed; try `pip install no-"),
        ("package://no_such.package/model", "is not installed"),
        ("package://json/model", "package 'json' holds no 'model'"),
        ("package://", "package"),
        ("package:///model", "package"),
    ],
)
def test_packages_that_hold_no_model(path: str, said: str):
    with pytest.raises(ModelError, match=said):
        resolve(ModelSettings(path=path))


def test_a_model_in_a_package(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "tiny_model_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    shutil.copytree(tiny_llama, package / "model")
    monkeypatch.syspath_prepend(str(tmp_path))
    resolved = resolve(ModelSettings(path="package://tiny_model_package/model"))
    assert resolved.folder == package / "model"
    assert "tiny_model_package" not in sys.modules
