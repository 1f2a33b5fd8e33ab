"""ICR and CoRe heads: by hand, on backends that answer from a table, and on a tiny model against its full matrices."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.oracles import ATTENTION_HEADS, AttentionTable, outcome_of
from fixtures.rows import make_list
from fixtures.tiny_models import tiny_llama_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from rerank_ray.config import validate
from rerank_ray.errors import ConfigError, InputError, ModelError
from rerank_ray.models.protocol import Attention, Failure, Result
from rerank_ray.prompts.render import Template
from rerank_ray.ranking.core_heads import CoReHeads
from rerank_ray.ranking.heads_file import HeadScore, HeadsFile, load_heads, save_heads
from rerank_ray.ranking.icr import ICR, document_score
from rerank_ray.ranking.rankers import Ranker, preflight
from rerank_ray.records import CandidateList
from rerank_ray.settings.models import FakeSettings, HFCausalSettings
from rerank_ray.settings.rankers import CoReHeadsSettings, ICRSettings


def icr(backend, **options) -> ICR:
    return ICR(ICRSettings(model=FakeSettings(), **options), backend)


# A document's score


def test_abnormally_low_tokens_are_left_out():
    """Nine ones and −20: mean −1.1, deviation √(396.9 / 9) = 6.64, bound −14.38; the ones add up to 9."""
    assert document_score(np.array([1.0] * 9 + [-20.0])) == pytest.approx(9.0)


def test_the_deviation_divides_by_one_less_than_the_tokens():
    """[1, 1, 1, 1, −1, −6]: mean −0.5, squares 39.5. √(39.5 / 5) = 2.81 puts the bound at −6.12, which keeps −6: the
    sum is −3. √(39.5 / 6) = 2.57 would put it at −5.63."""
    assert document_score(np.array([1.0, 1.0, 1.0, 1.0, -1.0, -6.0])) == pytest.approx(-3.0)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_equal_tokens_all_count(count: int):
    """One token has no deviation; that of equal ones is 0, or what rounding makes of it."""
    assert document_score(np.full(count, 0.1, dtype=np.float32)) == pytest.approx(0.1 * count)
    assert document_score(np.full(count, -0.1, dtype=np.float32)) == pytest.approx(-0.1 * count)


@pytest.mark.parametrize("values", [[], [math.nan], [1.0, math.nan], [1.0, math.inf]])
def test_no_number_is_no_score(values: list[float]):
    assert math.isnan(document_score(np.array(values)))


# ICR


def test_icr_by_hand():
    """Sums of the calibrated tokens; the first stage's best stands last in the prompt, before the query."""
    request = make_list(text="which cat?")
    backend = AttentionTable({c.text: v for c, v in zip(request.candidates, [[1, 2], [5], [-1, 0.5]], strict=True)})
    method = icr(backend)
    outcome = outcome_of(method, backend, request)
    assert outcome.scores.scores == (3.0, 5.0, -0.5)
    assert not outcome.scores.defects
    (call,) = backend.calls
    assert (call.query, call.calibration, call.heads, call.each_head) == ("which cat?", "N/A", None, False)
    assert call.prompt.passages == tuple(c.text for c in reversed(request.candidates))
    assert call.prompt.parts[0].endswith("\n\n[1] ")
    assert call.prompt.parts[1:3] == ("\n\n[2] ", "\n\n[3] ")
    assert call.prompt.parts[3].endswith("Query: which cat?")
    assert method.name.startswith("icr:table:prompt=")


@pytest.mark.parametrize(
    ("count", "size", "calls"), [(1, 4, 1), (3, 4, 1), (4, 4, 1), (5, 4, 2), (10, 4, 4), (10, 3, 8)]
)
def test_long_lists_are_ordered_window_by_window(count: int, size: int, calls: int):
    """1 + ⌈(N − size) / (size // 2)⌉ prompts; an oracle brings the best half window to the top from anywhere."""
    request = make_list(size=count)
    gains = {c.text: [float(i)] for i, c in enumerate(request.candidates)}
    backend = AttentionTable(gains)
    outcome = outcome_of(icr(backend, documents_per_prompt=size), backend, request)
    assert len(backend.calls) == calls
    assert all(len(c.prompt.passages) == min(size, count) for c in backend.calls)
    if calls == 1:
        assert outcome.scores.scores == tuple(float(i) for i in range(count))
        return
    assert sorted(outcome.scores.scores) == [float(r + 1) for r in range(count)]
    ranked = sorted(range(count), key=lambda i: -outcome.scores.scores[i])
    assert ranked[: size // 2] == list(range(count))[::-1][: size // 2]


@settings(max_examples=40, deadline=None)
@given(gains=st.lists(st.integers(-3, 3), min_size=1, max_size=30), size=st.integers(2, 12))
def test_scores_of_windows_are_a_permutation(gains: list[int], size: int):
    request = make_list(size=len(gains))
    backend = AttentionTable({c.text: [g] for c, g in zip(request.candidates, gains, strict=True)})
    scores = outcome_of(icr(backend, documents_per_prompt=size), backend, request).scores.scores
    best = scores.index(max(scores))
    assert gains[best] == max(gains)
    if len(gains) <= size:
        assert scores == tuple(map(float, gains))
    else:
        assert sorted(scores) == [float(n + 1) for n in range(len(gains))]


def test_documents_without_a_score():
    """One without tokens, one whose attention overflowed: neither is 0, which would be a label."""
    request = make_list(size=4)
    values = [[1.0], [], [math.nan, 1.0], [2.0]]
    for size in (2, 4):
        backend = AttentionTable({c.text: v for c, v in zip(request.candidates, values, strict=True)})
        outcome = outcome_of(icr(backend, documents_per_prompt=size), backend, request)
        assert [math.isnan(s) for s in outcome.scores.scores] == [False, True, True, False]
        assert outcome.scores.scores[3] > outcome.scores.scores[0]
        assert [str(d).split(":")[:2] for d in outcome.scores.defects] == [["unscored", " d1"], ["unscored", " d2"]]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failed_prompt_is_an_error(failing: int):
    """Also when another window of the list was answered: half an order is none."""

    class Failing(AttentionTable):
        """Fails its call number `failing`."""

        def answer(self, call: Attention) -> Result:
            return Failure(reason="too long") if len(self.calls) == failing + 1 else super().answer(call)

    backend = Failing(lambda _text: [1.0])
    outcome = outcome_of(icr(backend, documents_per_prompt=2), backend, make_list(size=3))
    assert outcome.scores is None
    assert "2 documents in one prompt: too long" in outcome.error


def test_scores_are_the_same_alone_and_in_company(tiny_llama: Path, tmp_path: Path):
    requests = [make_list(f"q{i}", 1 + i % 5, text=f"which cat {i}?") for i in range(65)]
    model = HFCausalSettings(path=str(tiny_llama), dtype="float32", max_length=512)
    for chosen in (ICRSettings(model=model, documents_per_prompt=3), ICRSettings(model=FakeSettings())):
        ranker = Ranker(chosen)
        together = ranker.rank(requests)
        for request, outcome in list(zip(requests, together, strict=True))[::13]:
            (alone,) = ranker.rank([request])
            assert alone.scores.scores == pytest.approx(outcome.scores.scores, abs=1e-5)
            assert alone.usage == outcome.usage


# On a model


@torch.inference_mode()
def plain_icr(folder: Path, request: CandidateList) -> list[float]:
    """ICR written down again: two prompts, all of transformers' attention matrices, tokens found by decoding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    shown = [c.text for c in request.candidates][::-1]

    def token_scores(query: str) -> list[torch.Tensor]:
        text = "<|user|>Here are some paragraphs:"
        spans = []
        for i, passage in enumerate(shown):
            text += f"\n\n[{i + 1}] "
            spans.append((len(text), len(text) + len(passage)))
            text += passage
        text += (
            "\n\nPlease find information that is relevant to the following query in the paragraphs above.\n\nQuery: "
        )
        spans.append((len(text), len(text) + len(query)))
        encoded = tokenizer(f"{text}{query}<|end|><|assistant|>", add_special_tokens=False, return_offsets_mapping=True)
        *documents, asking = [
            [t for t, (a, b) in enumerate(encoded["offset_mapping"]) if a < end and b > start] for start, end in spans
        ]
        attentions = model(torch.tensor([encoded["input_ids"]]), output_attentions=True).attentions
        paid = torch.cat(attentions, dim=1)[0].sum(0)[asking].mean(0).double()
        return [paid[tokens] for tokens in documents]

    scores = []
    for query, nothing in zip(token_scores(request.query.text), token_scores("N/A"), strict=True):
        c = query - nothing
        scores.append(float(c[c > c.mean() - 2 * c.std()].sum()))
    return scores[::-1]


def test_icr_equals_a_plain_loop(tiny_llama: Path):
    request = make_list(size=6, text="which cat is that dog?")
    ranker = Ranker(ICRSettings(model=HFCausalSettings(path=str(tiny_llama), dtype="float32")))
    (outcome,) = ranker.rank([request])
    assert outcome.scores.scores == pytest.approx(plain_icr(tiny_llama, request), abs=1e-4)
    assert outcome.usage.calls == 2
    assert outcome.usage.cached_tokens > outcome.usage.prompt_tokens / 3


def test_the_calibration_query_scores_nothing(tiny_llama: Path):
    ranker = Ranker(ICRSettings(model=HFCausalSettings(path=str(tiny_llama), dtype="float32"), documents_per_prompt=4))
    (outcome,) = ranker.rank([make_list(size=4, text="N/A")])
    assert outcome.scores.scores == (0.0,) * 4


# CoRe heads


def heads_file(model: str = "table", layers: int = 2, scores: tuple[float, ...] = (0.1, 0.4, 0.3, 0.2)) -> HeadsFile:
    """A file of as many heads a layer as an `AttentionTable` has with these scores, layer by layer."""
    heads = tuple(
        HeadScore(layer=i // ATTENTION_HEADS, head=i % ATTENTION_HEADS, score=s) for i, s in enumerate(scores)
    )
    return HeadsFile(model=model, prompt="x", layers=layers, temperature=0.1, queries=3, heads=heads)


def core(backend, path: Path, **options) -> CoReHeads:
    return CoReHeads(CoReHeadsSettings(model=FakeSettings(), heads_file=str(path), **options), backend)


def test_the_best_heads_are_read(tmp_path: Path):
    """Scores 0.1, 0.4 | 0.3, 0.2 in two layers: the best two are (0, 1) and (1, 0); of the first layer, its two."""
    path = tmp_path / "heads.json"
    save_heads(str(path), heads_file())
    assert load_heads(str(path)) == heads_file()
    backend = AttentionTable(lambda _text: [1.0])
    whole, pruned = core(backend, path, count=2), core(backend, path, count=2, prune=0.5)
    assert (whole.heads, pruned.heads) == (((0, 1), (1, 0)), ((0, 1), (0, 0)))
    assert whole.name != pruned.name
    outcome_of(pruned, backend, make_list())
    assert {c.heads for c in backend.calls} == {((0, 1), (0, 0))}


def test_the_first_layers_are_kept():
    """int(30 · (1 − 0.9)) is 3 layers, 6 heads, though 30 · (1 − 0.9) is 2.9999999999999996 in floating point."""
    file = heads_file(layers=30, scores=tuple(i / 60 for i in range(60)))
    assert {layer for layer, _ in file.best(6, 0.9)} == {0, 1, 2}
    assert file.best(1, 0.0) == ((29, 1),)
    with pytest.raises(ConfigError, match=r"count is 7, but the first 3 of 30 layers hold 6 heads"):
        file.best(7, 0.9)


def test_all_heads_are_icr(tiny_llama: Path, tmp_path: Path):
    model = HFCausalSettings(path=str(tiny_llama), dtype="float32")
    whole = Ranker(ICRSettings(model=model))
    name = whole.name.removeprefix("icr:").rpartition(":prompt=")[0]
    heads = tuple(HeadScore(layer=i // 4, head=i % 4, score=0.5) for i in range(8))
    save_heads(str(tmp_path / "h.json"), heads_file(name).model_copy(update={"heads": heads}))
    chosen = CoReHeadsSettings(model=model, heads_file=str(tmp_path / "h.json"))
    preflight(chosen)
    request = make_list(size=5)
    (a,), (b,) = whole.rank([request]), Ranker(chosen).rank([request])
    assert a.scores.scores == pytest.approx(b.scores.scores, abs=1e-6)
    assert any(a.scores.scores)


def test_heads_of_another_model(tiny_llama: Path, tmp_path: Path):
    path = tmp_path / "heads.json"
    save_heads(str(path), heads_file("hf_causal:other@1"))
    with pytest.raises(ConfigError, match=r"heads\.json: these are heads of hf_causal:other@1, not of table: run"):
        core(AttentionTable({}), path, count=1)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such heads file; `rerank-ray detect-heads` writes one"),
        ("{", "not valid JSON"),
        ("[]", "heads.json: 1 error"),
        ({"heads": []}, "heads: Tuple should have at least 1 item"),
        ({"heads": [{"layer": 0, "head": 0, "score": 1}] * 2}, "heads names a head twice"),
        ({"heads": [{"layer": 2, "head": 0, "score": 1}]}, "a layer beyond the model's 2"),
        ({"heads": [{"layer": 0, "head": -1, "score": 1}]}, "heads.0.head"),
        ({"model": None}, "model"),
    ],
)
def test_a_bad_heads_file_is_found_before_the_job(tmp_path: Path, content, said: str):
    path = tmp_path / "heads.json"
    if isinstance(content, dict):
        content = json.dumps(heads_file().model_dump(mode="json") | content)
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises((ConfigError, InputError)) as caught:
        preflight(CoReHeadsSettings(model=FakeSettings(), heads_file=str(path), count=1))
    assert said in str(caught.value)


# Templates


@pytest.mark.parametrize(
    "text",
    [
        "{query} {passages}",
        "{query} {passages} {query}",
        "{passages} {query} {query}",
        # The query "graphs" would be looked for, and found, in what stands behind it.
        "{passages} {query}\nWhich of the paragraphs are relevant?",
        "{passages} {query} {instruction}",
    ],
)
def test_the_query_stands_once_at_the_end(text: str):
    content = {"method": "icr", "about": "a", "text": text, "passage": "[{identifier}] {passage}"}
    with pytest.raises(ConfigError, match=r"slot \{query\} once, at its end"):
        validate(Template, content, "t.yaml")
    validate(Template, content | {"text": "{instruction}: {passages} {query}\n"}, "t.yaml")


def test_a_model_whose_attention_can_not_be_read(tmp_path: Path):
    """Found when the ranker is made, not at its first row."""
    folder = tiny_llama_folder(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sliding_window": 64}))
    with pytest.raises(ModelError, match="slides over 64 tokens"):
        Ranker(ICRSettings(model=HFCausalSettings(path=str(folder))))
