"""Texts tokenised once, and put together as the tokenizer itself would have."""

from __future__ import annotations

from pathlib import Path

import pytest
from fixtures.tiny_models import tiny_bert_tokenizer, tiny_llama_tokenizer, tiny_t5_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from rerank_ray.models.student.base import StudentDescription, encode_pairs
from rerank_ray.models.text_tokens import TextTokens

TOKENIZERS = {"BERT": tiny_bert_tokenizer(), "Llama": tiny_llama_tokenizer(), "T5": tiny_t5_tokenizer()}
TEXTS = st.text(st.sampled_from("ab cat.é😀ßא\ud7ff\u200b"), max_size=60)


class Counting:
    """A tokenizer that notes what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, texts: list[str], **_: object) -> dict[str, list[list[int]]]:
        self.asked.append(list(texts))
        return {"input_ids": [[len(text)] * len(text) for text in texts]}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(query=TEXTS, document=TEXTS)
def test_pairs_are_the_tokenizers_own(name: str, query: str, document: str):
    """Ids and segments of a pair whose query fits, the document cut from its end: `truncation="only_second"`."""
    tokenizer = TOKENIZERS[name]
    query = query[:8]
    # As lists: a pair of two strings whose second one is empty is taken for a single text.
    expected = tokenizer([query], [document], truncation="only_second", max_length=48)
    description = StudentDescription(head="linear", layers=(1,), max_length=48, max_query_length=40)
    (found,) = encode_pairs(TextTokens(tokenizer, 48), description, [query], [document])
    assert found == {n: expected[n][0] for n in ("input_ids", "token_type_ids") if n in expected}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXTS)
def test_single_texts_are_the_tokenizers_own(name: str, text: str):
    tokens = TextTokens(TOKENIZERS[name], 1000)
    (ids,) = tokens.ids([text])
    assert tokens.single.fill(ids)["input_ids"] == TOKENIZERS[name](text)["input_ids"]


def test_a_long_query_is_cut_before_the_document(tiny_bert: Path):
    """12 tokens of a pair, 5 of the query with its two special ones: 3 words, and what is left for the document."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    description = StudentDescription(head="linear", layers=(1,), max_length=12, max_query_length=5)
    (found,) = encode_pairs(TextTokens(tokenizer, 12), description, ["alpha " * 9], ["beta " * 20])
    expected = tokenizer("alpha " * 3, "beta " * 6)
    assert found == {n: expected[n] for n in ("input_ids", "token_type_ids")}


def test_each_text_is_tokenised_once():
    tokenizer = Counting()
    tokens = TextTokens(tokenizer, 3)
    assert [list(row) for row in tokens.ids(["bb", "a", "bb", "longer"])] == [[2, 2], [1], [2, 2], [6, 6, 6]]
    assert [list(row) for row in tokens.ids(["c", "longer", "a"])] == [[1], [6, 6, 6], [1]]
    assert tokenizer.asked == [["bb", "a", "longer"], ["c"]]


def test_the_least_recently_used_go_first():
    """An entry is 4 bytes a token and 256 more; there is room for two of them."""
    tokenizer = Counting()
    tokens = TextTokens(tokenizer, 10, kept_bytes=540)
    for texts in (["a"], ["b"], ["a"], ["c"]):
        tokens.ids(texts)
    assert tokens.bytes == 2 * 260
    tokens.ids(["a"])
    assert tokenizer.asked == [["a"], ["b"], ["c"]]
    tokens.ids(["b"])
    assert tokenizer.asked[-1] == ["b"]
    assert [len(row) for row in tokens.ids(["x" * 9, "y" * 8, "z" * 7])] == [9, 8, 7]
    assert tokens.bytes <= 540
