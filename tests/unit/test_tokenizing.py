"""Prompts to tokens: what is written around passages, what may be cut, and which tokens are whose."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
from fixtures.prompts import HEAD, TAIL, encode_one, prompt
from fixtures.tiny_models import tiny_bert_tokenizer, tiny_llama_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoTokenizer, ByT5Tokenizer, T5Config

from rerank_ray.errors import ModelError
from rerank_ray.models.protocol import Prompt
from rerank_ray.models.tokenizing import PromptEncoder, PromptTooLongError

LLAMA, PLAIN, BERT = tiny_llama_tokenizer(), tiny_llama_tokenizer(chat=False), tiny_bert_tokenizer()
passages = st.one_of(st.text(max_size=80), st.sampled_from(["", "cat dog " * 60, "😀" * 30, "x" * 300, "a\n\n b"]))


def test_a_tokenizer_that_does_not_tell_where_tokens_begin_is_refused():
    with pytest.raises(ModelError, match="ByT5Tokenizer is written in Python"):
        PromptEncoder(ByT5Tokenizer(), 64, False)


def test_a_tokenizer_that_is_a_sentencepiece_model_alone(tmp_path: Path):
    """As monoT5, T5 1.1 and DeBERTa 3 are published, without a tokenizer.json."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat", "a dog ate the bone"] * 20),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=40,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    T5Config(vocab_size=60).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 10}')
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(encode_one(PromptEncoder(tokenizer, 64, False), prompt("cat"))).count("cat") == 1


# What is written around the passages


def test_chat_prompts_are_the_users_turn():
    ids = encode_one(PromptEncoder(LLAMA, 512, None), prompt("cat", system="Be brief"))
    expected = f"<|system|>Be brief<|end|><|user|>{HEAD}cat{TAIL}<|end|><|assistant|>"
    assert ids == LLAMA(expected, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("tokenizer", "setting", "chat"), [(LLAMA, False, True), (LLAMA, None, False), (PLAIN, None, True)]
)
def test_other_prompts_are_plain_text_with_special_tokens(tokenizer, setting: bool | None, chat: bool):
    """Where the config, the prompt or the tokenizer says no chat, the system message stands in front."""
    ids = encode_one(PromptEncoder(tokenizer, 512, setting), prompt("cat", chat=chat, system="Be brief"))
    assert ids == tokenizer(f"Be brief\n\n{HEAD}cat{TAIL}")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id


def test_chat_and_plain_prompts_in_one_call():
    """Each keeps its own place and its own special tokens."""
    chosen = [prompt("cat"), prompt("dog", chat=False), prompt("bird"), prompt("a", chat=False)]
    encoder = PromptEncoder(LLAMA, 512, None)
    assert encoder.encode(chosen, [0] * 4) == [encode_one(encoder, p) for p in chosen]


def test_a_template_that_repeats_the_users_text_is_refused():
    tokenizer = tiny_llama_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}"
    with pytest.raises(ModelError, match="changes or repeats the user's text"):
        encode_one(PromptEncoder(tokenizer, 512, None), prompt("cat"))


# Truncation


@settings(max_examples=60, deadline=None)
@given(passage=passages, room=st.integers(1, 120), reserved=st.integers(0, 20))
def test_only_the_passage_is_cut(passage: str, room: int, reserved: int):
    """Head and tail stand whole around a beginning of the passage, and the continuation's tokens stay free."""
    framed = (f"<|user|>{HEAD}", f"{TAIL}<|end|><|assistant|>")
    bare = len(LLAMA("".join(framed), add_special_tokens=False)["input_ids"])
    limit = bare + room + reserved
    ids = encode_one(PromptEncoder(LLAMA, limit, None), prompt(passage), reserved)
    whole = LLAMA(passage.join(framed), add_special_tokens=False)["input_ids"]
    if len(whole) <= limit - reserved:
        assert ids == whole
        return
    if isinstance(ids, PromptTooLongError):
        assert room < 4
        return
    assert len(ids) <= limit - reserved
    text = LLAMA.decode(ids, skip_special_tokens=False)
    assert text.startswith(framed[0])
    assert text.endswith(framed[1])
    kept = text[len(framed[0]) : -len(framed[1])]
    assert passage.startswith(kept.rstrip("\ufffd"))


def test_a_long_passage_fills_the_room():
    """Tokens that join at the seams may cost one or two of the room; more would be thrown-away evidence."""
    for limit in range(60, 100):
        ids = encode_one(PromptEncoder(LLAMA, limit, None), prompt("cat dog " * 100))
        assert limit - 2 <= len(ids) <= limit


def test_several_passages_are_cut_to_the_same_length():
    """Long passages share what a short one leaves: here `cat` keeps its one token."""
    long_a, long_b = "dog " * 100, "bird " * 100
    encoder = PromptEncoder(BERT, 64, None)
    ids = encode_one(encoder, prompt(long_a, "cat", long_b))
    dog, cat, bird = (ids.count(BERT.convert_tokens_to_ids(w)) for w in ("dog", "cat", "bird"))
    assert cat == 1
    assert dog == bird
    assert 62 <= len(ids) <= 64
    assert BERT.decode(ids).startswith("[CLS] query : alpha passage :")


def test_wordpieces_are_cut_at_a_tokens_end():
    """A word of 300 unknown letters is 300 tokens for BERT; the cut text encodes to the tokens that were kept."""
    ids = encode_one(PromptEncoder(BERT, 40, None), prompt("x" * 300))
    assert len(ids) == 40


def test_a_template_without_room_says_how_much_is_missing():
    encoder = PromptEncoder(LLAMA, 10, None)
    failure = encode_one(encoder, prompt("cat"))
    assert isinstance(failure, PromptTooLongError)
    assert "without its passage and max_length leaves 10: raise max_length" in str(failure)


def test_a_reserve_beyond_max_length_is_too_long():
    assert isinstance(encode_one(PromptEncoder(LLAMA, 50, None), prompt("cat"), reserved=60), PromptTooLongError)


def test_each_passage_needs_a_token():
    """Room for two tokens and three passages: an empty passage would be judged by its number alone."""
    parts = ("a", " ", " ", " b")
    bare = len(BERT("".join(parts))["input_ids"])
    failure = encode_one(PromptEncoder(BERT, bare + 2, None), Prompt(parts=parts, passages=("cat dog",) * 3))
    assert isinstance(failure, PromptTooLongError)


# Spans


def spans_of(encoder: PromptEncoder, p: Prompt, query: str, *others: str) -> list[list[str]]:
    """Texts of the passages' and the query's tokens, for each of the queries."""
    return [
        [encoder.tokenizer.decode(s.ids[span.start : span.stop]) for span in (*s.passages, s.query)]
        for s in encoder.encode_spans(p, query, others)
    ]


def test_a_token_over_a_joint_belongs_to_the_passage():
    """ " cat" is one token of the tiny vocabulary, and takes the space before the passage along; "]" stays outside."""
    p = Prompt(parts=("[1] ", "\n[2]", "\nQuery: the dog end"), passages=("cat", "dog."))
    assert spans_of(PromptEncoder(LLAMA, 512, None), p, "the dog") == [[" cat", "dog.", " the dog"]]


@pytest.mark.parametrize("chat", [True, False])
@settings(max_examples=50, deadline=None)
@given(texts=st.lists(passages, min_size=1, max_size=4), query=st.text(min_size=1, max_size=20).filter(str.strip))
def test_spans_hold_their_texts_and_little_else(chat: bool, texts: list[str], query: str):
    """In order, apart from each other, and at most one character (a space that a token joins to its word) too long."""
    middle = [f"\n[{i}] " for i in range(2, len(texts) + 1)]
    p = Prompt(parts=("Query: ? [1] ", *middle, f"\nQuery: {query}"), passages=tuple(texts), chat=chat)
    encoder = PromptEncoder(LLAMA, 4096, None)
    (spanned,) = encoder.encode_spans(p, query)
    assert spanned.ids == encode_one(encoder, p)
    assert list(spanned.query)
    end = 0
    for span, text in zip((*spanned.passages, spanned.query), (*texts, query.strip()), strict=True):
        assert end <= span.start <= span.stop <= len(spanned.ids)
        end = span.stop
        held = LLAMA.decode(spanned.ids[span.start : span.stop], clean_up_tokenization_spaces=False)
        assert held.strip(" \n") == text.strip(" \n") or text in held
        assert len(held) <= len(text) + 2
        assert bool(list(span)) == bool(text)


def test_special_tokens_belong_to_no_text():
    """The tokenizer ends plain text with a token of no characters; the query before it ends where it ends."""
    tokenizer = tiny_llama_tokenizer(chat=False)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    p = Prompt(parts=("", "\nQuery: the dog"), passages=("cat",))
    assert spans_of(PromptEncoder(tokenizer, 512, None), p, "the dog") == [["cat", " the dog"]]


def test_the_query_is_its_last_occurrence_in_the_last_part():
    p = Prompt(parts=("dog [1] ", "\ndog or dog?"), passages=("dog",))
    encoder = PromptEncoder(LLAMA, 512, None)
    first, second = encoder.encode_spans(p, "dog", ["bird"])
    texts = [LLAMA.decode(s.ids).split("\n")[-1].split("<|end|>")[0] for s in (first, second)]
    assert texts == ["dog or dog?", "dog or bird?"]
    assert spans_of(encoder, p, "dog", "bird") == [[" dog", " dog"], [" dog", " bird"]]


def test_a_template_that_strips_the_users_text():
    """The query ends with spaces, and so does the message; neither moves the query."""
    tokenizer = tiny_llama_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("message.content", "message.content | trim")
    p = Prompt(parts=("  [1] ", "\nQuery: the dog  "), passages=("cat",))
    assert spans_of(PromptEncoder(tokenizer, 512, None), p, "the dog  ") == [[" cat", " the dog"]]


def test_a_template_that_changes_the_query():
    tokenizer = tiny_llama_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("message.content", "message.content | upper")
    with pytest.raises(ModelError, match="changes the user's text"):
        PromptEncoder(tokenizer, 512, None).encode_spans(Prompt(parts=("", " dog"), passages=("cat",)), "dog")


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(passages, min_size=1, max_size=4),
    room=st.integers(1, 120),
    queries=st.tuples(st.sampled_from(["dog", "the cat of beta", "😀" * 9]), st.sampled_from(["N/A", "bird " * 20])),
)
def test_cut_passages_are_the_same_for_all_queries(texts: list[str], room: int, queries: tuple[str, str]):
    """Both prompts fit, their passages have the same tokens, and the query stays whole."""
    p = Prompt(parts=("[1] ", *["\n[2] "] * (len(texts) - 1), f"\nQuery: {queries[0]}"), passages=tuple(texts))
    empty = [Prompt(parts=(*p.parts[:-1], f"\nQuery: {q}"), passages=("",) * len(texts)) for q in queries]
    bare = max(len(encode_one(PromptEncoder(LLAMA, 4096, None), e)) for e in empty)
    encoder = PromptEncoder(LLAMA, bare + room, None)
    try:
        first, second = encoder.encode_spans(p, queries[0], queries[1:])
    except PromptTooLongError:
        # A passage's first character may be four byte tokens, which are cut only together.
        assert room < 4 * len(texts) + 4
        return
    assert max(len(first.ids), len(second.ids)) <= bare + room
    for a, b in zip(first.passages, second.passages, strict=True):
        assert first.ids[a.start : a.stop] == second.ids[b.start : b.stop]
    for spanned, query in ((first, queries[0]), (second, queries[1])):
        assert LLAMA.decode(spanned.ids[spanned.query.start : spanned.query.stop]).strip() == query.strip()
