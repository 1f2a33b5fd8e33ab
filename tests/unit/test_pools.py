"""Every backend that torch runs encodes its next calls while it answers the present ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fixtures import pools, published
from fixtures.students import DOCUMENTS, QUERIES, start, stirred
from fixtures.tiny_models import tiny_t5_folder

from rerank_ray.errors import ModelError
from rerank_ray.models import engine
from rerank_ray.models.bi_encoder import BiEncoder
from rerank_ray.models.cross_encoder import CrossEncoder
from rerank_ray.models.hf_causal import HFCausal
from rerank_ray.models.hf_seq2seq import HFSeq2Seq
from rerank_ray.models.late_interaction import ColBERT
from rerank_ray.models.layerwise import Layerwise
from rerank_ray.models.protocol import (
    Answer,
    Call,
    Embed,
    EmbedTokens,
    Failure,
    Generate,
    LogLikelihood,
    NextToken,
    Pair,
    PairList,
    Prompt,
    Result,
)
from rerank_ray.models.scalar_head import ScalarHead
from rerank_ray.settings.models import (
    BiEncoderSettings,
    ColBERTSettings,
    CrossEncoderSettings,
    HFCausalSettings,
    HFSeq2SeqSettings,
    LayerwiseSettings,
    ScalarHeadSettings,
)

COUNT = 20
PAIRS = [Pair(query=QUERIES[i % 3], text=DOCUMENTS[i % 8]) for i in range(COUNT)]
"""The last ones come again."""
ROLES = ("query", "document")


def scalar_head(folder: Path) -> tuple:
    base, adapter = published.rankllama(folder)
    backend = ScalarHead(ScalarHeadSettings(path=str(base), adapter=str(adapter), dtype="float32"))
    return backend, PAIRS, "encode", "_forward"


def layerwise(folder: Path) -> tuple:
    path = published.minicpm_layerwise(folder / "m")
    return Layerwise(LayerwiseSettings(path=str(path), dtype="float32", max_length=256)), PAIRS, "_encode", "_forward"


def colbert(folder: Path) -> tuple:
    backend = ColBERT(ColBERTSettings(path=str(published.colbert(folder / "c")), dtype="float32", cache_mb=0))
    calls = [EmbedTokens(text=DOCUMENTS[i % 8], role=ROLES[i % 2]) for i in range(COUNT)]
    return backend, calls, "_encode", "_forward"


@pytest.fixture
def make(tiny_bert: Path, tiny_cross_encoder: Path, tmp_path: Path) -> Callable[[str], tuple]:
    """A backend by its kind, 20 calls, and its methods that encode and that answer."""

    def bi_encoder(_: Path) -> tuple:
        backend = BiEncoder(BiEncoderSettings(path=str(tiny_bert), dtype="float32", max_length=48, cache_mb=0))
        calls = [Embed(text=DOCUMENTS[i % 8], role=ROLES[i % 2]) for i in range(COUNT)]
        return backend, calls, "_encode", "_forward"

    def cross_encoder(_: Path) -> tuple:
        settings = CrossEncoderSettings(path=str(tiny_cross_encoder), dtype="float32", max_length=64)
        return CrossEncoder(settings), PAIRS, "_encode", "_forward"

    def adaptive(folder: Path) -> tuple:
        student = stirred(start(tiny_bert, "similarity", layers=(1, 2, 3), gate=-1.0, interaction=1.0))
        student.description = student.description.model_copy(update={"exit_margins": (0.5, 0.5)})
        student.save(folder)
        backend = CrossEncoder(CrossEncoderSettings(path=str(folder), exit_layer="adaptive", dtype="float32"))
        calls = [PairList(query=QUERIES[i % 3], texts=tuple(DOCUMENTS[: i % 8]) * 2) for i in range(COUNT)]
        return backend, calls, "_encode_lists", "_answer_lists"

    made = (bi_encoder, cross_encoder, adaptive, scalar_head, layerwise, colbert)
    return lambda kind: {function.__name__: function for function in made}[kind](tmp_path)


@pytest.mark.parametrize("kind", ["bi_encoder", "cross_encoder", "adaptive", "scalar_head", "layerwise", "colbert"])
def test_the_next_calls_are_encoded_meanwhile(kind: str, make: Callable[[str], tuple], monkeypatch: pytest.MonkeyPatch):
    """An eighth of the calls first, and then seven at a time; each result is that of its call alone."""
    backend, calls, encode, answer = make(kind)
    alone = [backend.run([call])[0] for call in calls]
    monkeypatch.setattr(engine, "_POOL", 7)
    encoded = pools.watch(monkeypatch, backend, encode, answer)
    together = backend.run(calls)
    assert encoded == [calls[:3], calls[3:10], calls[10:17], calls[17:]]
    assert [result.usage for result in together] == [result.usage for result in alone]
    for found, expected in zip(together, alone, strict=True):
        np.testing.assert_allclose(found.value, expected.value, atol=1e-4)


# LLMs


@pytest.fixture(params=["causal", "seq2seq"])
def llm(request: pytest.FixtureRequest, tiny_llama: Path, tmp_path: Path) -> HFCausal | HFSeq2Seq:
    """With batches of 100 tokens."""
    given = {"dtype": "float32", "max_length": 100, "tokens_per_batch": 100}
    if request.param == "causal":
        return HFCausal(HFCausalSettings(path=str(tiny_llama), **given))
    return HFSeq2Seq(HFSeq2SeqSettings(path=str(tiny_t5_folder(tmp_path)), **given))


def prompt(number: int) -> Prompt:
    """Of 80 characters, taken for 20 tokens; the sixteenth leaves no room for a passage."""
    query = f"{number:02} the cat of alpha" + " and the dog" * (20 if number == 16 else number % 3)
    return Prompt(parts=(f"{query}\n".ljust(70, "."), "\nTrue: "), passages=("cat",))


def label_call(llm: HFCausal | HFSeq2Seq, number: int) -> NextToken:
    labels = ("Yes", "No") if isinstance(llm, HFCausal) else ("true", "false")
    return NextToken(prompt=prompt(number), labels=labels)


def in_its_order(llm: HFCausal | HFSeq2Seq, calls: list[Call]) -> list[Call]:
    """Prompts that begin alike side by side, where that saves anything."""
    return sorted(calls, key=lambda c: c.prompt.plain_text) if isinstance(llm, HFCausal) else calls


def check(together: list[Result], alone: list[Result]) -> None:
    """Each result is the call's own, up to the tokens that it shared with others."""
    for found, expected in zip(together, alone, strict=True):
        if isinstance(expected, Failure):
            assert found == expected
            continue
        value = expected.value if isinstance(expected.value, str) else pytest.approx(expected.value, abs=1e-4)
        assert (found.value, found.tokens) == (value, expected.tokens)
        assert replace(found.usage, cached_tokens=0) == expected.usage


def test_prompts_are_encoded_meanwhile(llm: HFCausal | HFSeq2Seq, monkeypatch: pytest.MonkeyPatch):
    """Labels, continuations and one that fails, some twice; five of 20 tokens first, where an eighth would be three."""
    calls: list[Call] = [label_call(llm, i) for i in (*range(8), *range(4))]
    calls += [LogLikelihood(prompt=prompt(i), continuation="the cat"[: 3 + i % 5]) for i in range(12, 20)]
    alone = [llm.run([call])[0] for call in calls]
    assert [i for i, result in enumerate(alone) if isinstance(result, Failure)] == [16]
    monkeypatch.setattr(engine, "_POOL", 7)
    encoded = pools.watch(monkeypatch, llm, "_encode", "_answer_pool")
    check(llm.run(calls), alone)
    assert [len(pool) for pool in encoded] == [5, 7, 7, 1]
    assert [call for pool in encoded for call in pool] == in_its_order(llm, calls)


def test_texts_are_written_while_prompts_are_encoded(llm: HFCausal | HFSeq2Seq, monkeypatch: pytest.MonkeyPatch):
    """In no more pools than must be."""
    calls = [Generate(prompt=prompt(i % 9), max_tokens=5, temperature=1.0, seed=i) for i in range(16)]
    alone = [llm.run([call])[0] for call in calls]
    assert all(isinstance(result, Answer) for result in alone)
    monkeypatch.setattr(engine, "_POOL", 7)
    encoded = pools.watch(monkeypatch, llm, "_encode", "_answer_pool")
    check(llm.run(calls), alone)
    assert [len(pool) for pool in encoded] == [7, 7, 2]
    assert [call for pool in encoded for call in pool] == in_its_order(llm, calls)


def test_what_can_not_be_encoded_reaches_the_caller(llm: HFCausal | HFSeq2Seq, monkeypatch: pytest.MonkeyPatch):
    """From a pool behind the first, whose results are lost: a backend answers all of its calls or none."""
    encode = llm.encoder.encode

    def failing(prompts: list[Prompt], reserved: list[int]) -> list:
        if len(prompts) == 7:
            raise ModelError("the second pool")
        return encode(prompts, reserved)

    monkeypatch.setattr(engine, "_POOL", 7)
    monkeypatch.setattr(llm.encoder, "encode", failing)
    with pytest.raises(ModelError, match="the second pool"):
        llm.run([label_call(llm, i) for i in range(12)])
