"""Shared prefixes: which tokens are shared, and answers that are those of the plain path."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from fixtures.tiny_models import HEADS, HIDDEN, SPREAD, tiny_llama_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from rerank_ray.models import engine
from rerank_ray.models.hf_causal import HFCausal
from rerank_ray.models.prefixes import Group, shared_prefixes
from rerank_ray.models.protocol import Generate, LogLikelihood, NextToken, Prompt
from rerank_ray.settings.models import HFCausalSettings

LONG = list(range(100, 120))
"""A prefix of 20 tokens; below 16 sharing does not pay."""


def test_groups_by_hand():
    """0, 2 and 3 share 20 tokens; 1 shares 10 with them, too few to compute apart; 4 shares nothing."""
    sequences = [[*LONG, 1, 2], [*LONG[:10], 3], [*LONG, 1, 4], [*LONG, 5], [9]]
    assert [(g.length, sorted(g.members)) for g in shared_prefixes(sequences)] == [(20, [0, 2, 3])]


def test_queries_that_share_a_template():
    """Two queries (30 tokens each) behind one template (20): four rows together save 60 tokens, two pairs 2 · 30."""
    rows = [[*LONG, *[q] * 10, d] for q in (1, 2) for d in (7, 8, 9)]
    assert sorted((g.length, tuple(sorted(g.members))) for g in shared_prefixes(rows)) == [
        (30, (0, 1, 2)),
        (30, (3, 4, 5)),
    ]
    lone = [[*LONG, q, 1] for q in range(5)]
    assert [(g.length, len(g.members)) for g in shared_prefixes(lone)] == [(20, 5)]


def test_a_small_part_of_long_sequences_is_not_shared():
    """Two of 20 shared tokens and n of their own save 20 of 40 + 2 n: a sixteenth, if n is 140."""
    for own, count in ((140, 1), (141, 0)):
        assert len(shared_prefixes([[*LONG, *[d] * own] for d in (1, 2)])) == count


def test_two_that_share_much_among_many_that_share_little():
    """Ten of 1,000 tokens share 60, which saves 540 of 10,000, less than a sixteenth; two of them share 500."""
    beginnings = [[*[1] * 60, *[2] * 440], [*[1] * 60, *[2] * 440], *([*[1] * 60, 10 + n] for n in range(8))]
    sequences = [[*front, *[100 + n] * (1000 - len(front))] for n, front in enumerate(beginnings)]
    (group,) = shared_prefixes(sequences)
    assert (group.length, sorted(group.members)) == (500, [0, 1])


def test_the_last_token_is_always_computed():
    """Its position holds the first logits that a call asks for; equal prompts share all the others."""
    (group,) = shared_prefixes([LONG, LONG, [*LONG, 1]])
    assert group == Group(length=19, members=group.members)
    assert sorted(group.members) == [0, 1, 2]


def test_a_thousand_versions_of_one_text():
    """Version n shares 16 + n tokens with each later one, so what begins alike is a stretch in a stretch, a thousand
    deep. The versions from n on save (1500 − n − 1) · (16 + n) tokens, most at n = 741 or 742, and no two groups can
    be made of them."""
    (group,) = shared_prefixes([[*[1] * (16 + n), 2] for n in range(1500)])
    assert group.length * (len(group.members) - 1) == max((1500 - n - 1) * (16 + n) for n in range(1500)) == 757 * 758
    assert sorted(group.members) == list(range(1500 - len(group.members), 1500))


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.lists(st.integers(0, 1), max_size=20)), max_size=30))
def test_groups_are_disjoint_and_truly_share(parts: list[tuple[int, int, list[int]]]):
    sequences = [[*[a] * 16, *[b] * 8, *rest] for a, b, rest in parts]
    groups = shared_prefixes(sequences)
    members = [i for g in groups for i in g.members]
    assert len(members) == len(set(members))
    for group in groups:
        assert len(group.members) > 1
        assert group.length >= 16
        assert len({tuple(sequences[i][: group.length]) for i in group.members}) == 1
        assert all(len(sequences[i]) > group.length for i in group.members)
    saved = sum(g.length * (len(g.members) - 1) for g in groups)
    for a in range(3):
        family = [s for s in sequences if s[0] == a]
        if len(family) > 1 and min(map(len, family)) > 16:
            saved -= 16 * (len(family) - 1)
    assert saved >= 0


def windowed_folder(path: Path) -> Path:
    """A Mistral whose attention sees the last 24 tokens only."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        tokenizer = tiny_llama_tokenizer()
        config = MistralConfig(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN,
            intermediate_size=2 * HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            initializer_range=SPREAD,
            sliding_window=24,
            bos_token_id=0,
            eos_token_id=1,
        )
        MistralForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def learned_positions_folder(path: Path) -> Path:
    """A GPT-2 of 300 positions: a padded sequence must not run past the last one."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        tokenizer = tiny_llama_tokenizer()
        config = GPT2Config(
            vocab_size=len(tokenizer),
            n_embd=HIDDEN,
            n_layer=2,
            n_head=HEADS,
            n_positions=300,
            initializer_range=SPREAD,
            bos_token_id=0,
            eos_token_id=1,
        )
        GPT2LMHeadModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=["llama", "windowed", "learned_positions"])
def folder(request: pytest.FixtureRequest, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "llama":
        return tiny_llama
    make = {"windowed": windowed_folder, "learned_positions": learned_positions_folder}[request.param]
    return make(tmp_path_factory.mktemp(request.param))


def backend(folder: Path, **settings) -> HFCausal:
    return HFCausal(HFCausalSettings(path=str(folder), dtype="float32", max_length=300, **settings))


def prompts() -> list[Prompt]:
    """Queries of different lengths, one of them alone, each before passages of 1 to 200 tokens."""
    passages = ["cat", "the dog of beta " * 12, "café 😀 שלום", "alpha gamma", "x" * 90, "bird " * 120]
    queries = ["Query: alpha", "Query: the cat of alpha, and which dog is its friend?", "Find what is said of zeta."]
    made = [Prompt(parts=(f"{q}\nPassage: ", "\nYes or No?"), passages=(p,)) for q in queries for p in passages]
    return [*made, Prompt(parts=("No such query, and no long one ", "!"), passages=("cat",))]


@torch.no_grad()
def plain(model, ids: list[int], count: int) -> torch.Tensor:
    """Log-probabilities [count, vocabulary] behind each of the last positions of one sequence, not padded."""
    return model(torch.tensor([ids])).logits[0, -count:].log_softmax(-1)


@pytest.mark.parametrize("tokens_per_batch", [300, 4096])
def test_shared_scores_equal_a_plain_loop(folder: Path, tokens_per_batch: int):
    """Small batches hold one query's rows, large ones rows behind prefixes of different lengths."""
    model = backend(folder, tokens_per_batch=tokens_per_batch)
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    calls = [
        call
        for p in prompts()
        for call in (NextToken(prompt=p, labels=("Yes", "No")), LogLikelihood(prompt=p, continuation="the cat"))
    ]
    results = model.run(calls)
    continuation = model.tokenizer("the cat", add_special_tokens=False)["input_ids"]
    labels = model.tokenizer.convert_tokens_to_ids(["Yes", "No"])
    for call, result in zip(calls, results, strict=True):
        behind = [] if isinstance(call, NextToken) else continuation
        (ids,) = model.encoder.encode([call.prompt], [len(behind)])
        if isinstance(call, NextToken):
            logs = plain(reference, ids, 1)[0, labels]
            assert result.value[0] - result.value[1] == pytest.approx((logs[0] - logs[1]).item(), abs=1e-4)
        else:
            logs = plain(reference, [*ids, *behind[:-1]], len(behind))
            assert result.value == pytest.approx(logs[range(len(behind)), behind].tolist(), abs=1e-4)
    # Labels and continuations are read from batches of their own.
    assert sum(r.usage.cached_tokens for r in results) > sum(r.usage.prompt_tokens for r in results) / 8


def test_a_recurrent_model_whose_config_names_no_layers_shares_nothing(tmp_path: Path):
    """RWKV ignores a cache of keys and values: what stood behind a shared prefix was scored without it."""
    tokenizer = tiny_llama_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        made = RwkvForCausalLM(RwkvConfig(vocab_size=len(tokenizer), hidden_size=HIDDEN, num_hidden_layers=2))
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=SPREAD)
    made.save_pretrained(tmp_path)
    model, reference = backend(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    calls = [NextToken(prompt=p, labels=("Yes", "No")) for p in prompts()]
    labels = tokenizer.convert_tokens_to_ids(["Yes", "No"])
    for call, result in zip(calls, model.run(calls), strict=True):
        (ids,) = model.encoder.encode([call.prompt], [0])
        logs = plain(reference, ids, 1)[0, labels]
        assert result.value[0] - result.value[1] == pytest.approx((logs[0] - logs[1]).item(), abs=1e-4)
    assert Generate not in model.answers


def test_cached_tokens_are_those_not_computed_again(tiny_llama: Path):
    """Each group's first call pays for the prefix; the runner counts what was really computed."""
    model = backend(tiny_llama)
    calls = [NextToken(prompt=p, labels=("Yes", "No")) for p in prompts()]
    usages = [r.usage for r in model.run(calls)]
    (beginning,) = model.encoder.encode([Prompt(parts=("Find what is said of zeta.\nPassage: ",), passages=())], [0])
    framed = len(beginning) - len(model.tokenizer("<|end|><|assistant|>", add_special_tokens=False)["input_ids"])
    assert usages[12].cached_tokens == usages[18].cached_tokens == 0
    assert all(framed - 1 <= u.cached_tokens <= framed for u in usages[13:18])
    assert model.runner.computed.tokens == sum(u.prompt_tokens - u.cached_tokens for u in usages)


def test_sharing_can_be_switched_off(tiny_llama: Path):
    calls = [NextToken(prompt=p, labels=("Yes", "No")) for p in prompts()]
    off = backend(tiny_llama, share_prefix=False).run(calls)
    on = backend(tiny_llama).run(calls)
    assert [r.usage.cached_tokens for r in off] == [0] * len(calls)
    for a, b in zip(on, off, strict=True):
        assert a.value == pytest.approx(b.value, abs=1e-4)


def test_memory_that_prefixes_take_is_given_back(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch):
    """A row that has no room beside several prefixes has it beside one, and batches stay as large as they were."""
    calls = [NextToken(prompt=p, labels=("Yes", "No")) for p in prompts()]
    sharing = backend(tiny_llama)
    expected, budget, score = sharing.run(calls), sharing.runner.tokens_per_batch, sharing._score
    fitted: list[int] = []

    def short_of_memory(rows: list, prefixes):
        if prefixes is not None and len(prefixes.lengths) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        fitted.append(len(rows))
        return score(rows, prefixes)

    monkeypatch.setattr(sharing, "_score", short_of_memory)
    for answer, wanted in zip(sharing.run(calls), expected, strict=True):
        assert answer.value == pytest.approx(wanted.value, abs=1e-5)
        assert answer.usage == wanted.usage
    assert max(fitted) > 1
    assert sharing.runner.tokens_per_batch == budget


def test_prompts_that_begin_alike_go_into_one_pool(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch):
    """Eight queries' likelihoods under six passages, query by query: in pools of eight each passage is computed once,
    all but its prompt's last token, and for each call that one and the query, all but its last token, as among all
    calls together."""
    parts = ("Write a query that this passage answers.\nPassage: ", "\nQuery: ")
    prompts = [Prompt(parts=parts, passages=(f"{n} the dog of beta and the cat of {n}",)) for n in range(6)]
    calls = [LogLikelihood(prompt=p, continuation=f"which cat, {n}?") for n in range(8) for p in prompts]
    whole, divided = backend(tiny_llama, tokens_per_batch=4096), backend(tiny_llama, tokens_per_batch=4096)
    expected = whole.run(calls)
    monkeypatch.setattr(engine, "_POOL", 8)
    monkeypatch.setattr(divided.runner, "first_pool", lambda *_: 8)
    results = divided.run(calls)
    for found, alone in zip(results, expected, strict=True):
        assert found.value == pytest.approx(alone.value, abs=1e-4)
    tokens = sum(r.usage.prompt_tokens - 1 for r in expected[:6]) + sum(r.usage.output_tokens for r in expected)
    assert whole.runner.computed.tokens == divided.runner.computed.tokens == tokens
    assert sum(r.usage.cached_tokens for r in results) == 7 * sum(r.usage.prompt_tokens - 1 for r in expected[:6])


# Generation


@torch.no_grad()
def plain_generate(model, ids: list[int], ends: list[int], max_tokens: int) -> list[int]:
    """transformers' own greedy search over one sequence, without the tokens of the prompt."""
    output = model.generate(
        torch.tensor([ids]), max_new_tokens=max_tokens, do_sample=False, eos_token_id=ends, pad_token_id=0
    )
    return output[0, len(ids) :].tolist()


@pytest.fixture(scope="module")
def ending(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with a second end-of-sequence token, one that some greedy texts of `prompts()` soon come to."""
    encoded = backend(folder).encoder.encode(prompts(), [40] * len(prompts()))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    texts = [plain_generate(model, ids, [1], 40) for ids in encoded]
    firsts = {token: sum(token in text[:30] for text in texts) for text in texts for token in text[3:12]}
    chosen = min(firsts, key=lambda token: abs(firsts[token] - len(texts) / 2))
    assert 0 < firsts[chosen] < len(texts)
    target = tmp_path_factory.mktemp("ending") / "model"
    shutil.copytree(folder, target)
    GenerationConfig(bos_token_id=0, eos_token_id=[1, chosen]).save_pretrained(target)
    return target


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("tokens_per_batch", [300, 8192])
def test_greedy_texts_are_those_of_transformers(ending: Path, share_prefix: bool, tokens_per_batch: int):
    """Token by token, in batches with calls of other lengths: some end at once, some never."""
    model = backend(ending, share_prefix=share_prefix, tokens_per_batch=tokens_per_batch)
    calls = [Generate(prompt=p, max_tokens=m) for p, m in zip(prompts(), [1, 40, 20, 30] * 5, strict=False)]
    results = model.run(calls)
    reference = AutoModelForCausalLM.from_pretrained(ending).eval()
    ends = [*GenerationConfig.from_pretrained(ending).eos_token_id, model.tokenizer.convert_tokens_to_ids("<|end|>")]
    for call, result in zip(calls, results, strict=True):
        (ids,) = model.encoder.encode([call.prompt], [call.max_tokens])
        expected = plain_generate(reference, ids, ends, call.max_tokens)
        ended = expected[-1] in ends
        assert result.usage.output_tokens == len(expected)
        assert result.usage.prompt_tokens == len(ids)
        assert result.value == model.tokenizer.decode(expected[:-1] if ended else expected, skip_special_tokens=True)
        assert result.cut_off is not ended
        logs = plain(reference, [*ids, *expected[:-1]], len(expected))
        assert result.log_probability == pytest.approx(logs[range(len(expected)), expected].sum().item(), abs=1e-3)
    assert {r.cut_off for r in results} == {True, False}
