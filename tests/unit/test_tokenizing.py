"""Prompts to tokens: what may be cut, what may not, and labels that are one token."""

from __future__ import annotations

import json

import pytest
from fixtures.tiny_models import tiny_bert_tokenizer, tiny_llama_tokenizer, tiny_sentencepiece_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast

from rerank_ray.errors import ModelError
from rerank_ray.models.continuations import answer_lead, end_ids, label_ids
from rerank_ray.models.protocol import Failure, Generate, LogLikelihood, NextToken, Prompt
from rerank_ray.models.tokenizing import EncodedCall, PromptEncoder, PromptTooLongError

LLAMA, PLAIN, BERT = tiny_llama_tokenizer(), tiny_llama_tokenizer(chat=False), tiny_bert_tokenizer()
HEAD, TAIL = "Query: alpha\nPassage: ", "\nAnswer Yes or No."
passages = st.one_of(st.text(max_size=80), st.sampled_from(["", "cat dog " * 60, "😀" * 30, "x" * 300, "a\n\n b"]))


def prompt(*given_passages: str, chat: bool = True, system: str | None = None) -> Prompt:
    """The passages between a head and a tail, separated by ` | `."""
    middle = [" | "] * (len(given_passages) - 1)
    return Prompt(parts=(HEAD, *middle, TAIL), passages=given_passages, chat=chat, system=system)


def encode_one(encoder: PromptEncoder, p: Prompt, reserved: int = 0) -> list[int] | PromptTooLongError:
    (ids,) = encoder.encode([p], [reserved])
    return ids


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


# Labels


def test_labels_of_one_token():
    ids = label_ids(LLAMA, ["Yes", "No"])
    assert LLAMA.convert_ids_to_tokens(ids) == ["Yes", "No"]


def test_labels_of_several_tokens_show_them():
    with pytest.raises(
        ModelError, match=r"label 'Yep' is \d tokens for this tokenizer \(\[.*\]\): choose a label of one"
    ):
        label_ids(LLAMA, ["Yes", "Yep"])


def test_an_empty_label():
    with pytest.raises(ModelError, match="label '' is 0 tokens"):
        label_ids(LLAMA, ["", "No"])


def test_labels_that_are_the_same_token():
    """An uncased tokenizer can't tell Cat from cat."""
    with pytest.raises(ModelError, match=r"labels \['Cat', 'cat'\] are not different tokens"):
        label_ids(BERT, ["Cat", "cat"])


# Labels and continuations where they stand

ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)


def sentencepiece(template: str | None = None) -> PromptEncoder:
    tokenizer = tiny_sentencepiece_tokenizer()
    tokenizer.chat_template = template
    return PromptEncoder(tokenizer, 512, None)


@pytest.mark.parametrize(
    ("template", "end", "prefill", "labels", "expected"),
    [
        (ZEPHYR, "?", "", ["Yes", "No"], ["Yes", "No"]),
        (ZEPHYR, "?", "Answer:", [" Yes", " No"], ["▁Yes", "▁No"]),
        (ZEPHYR, "?", "[", ["A", "B"], ["A", "B"]),
        (LLAMA_2, "?", "", ["Yes", "No"], ["▁Yes", "▁No"]),
        (LLAMA_2, "?", "[", ["A", "B"], ["A", "B"]),
        (None, "Answer:", "", ["Yes", "No"], ["▁Yes", "▁No"]),
        (None, "Answer:", "", [" Yes", " No"], ["▁Yes", "▁No"]),
        (None, "Answer:\n", "", ["Yes", "No"], ["Yes", "No"]),
        (None, "?\n", "[", ["A", "B"], ["A", "B"]),
    ],
)
def test_labels_are_read_as_the_model_writes_them(template, end: str, prefill: str, labels, expected):
    """SentencePiece's `▁Yes` is a word behind a space, `Yes` one behind a line break or a bracket."""
    encoder = sentencepiece(template)
    ids = encoder.label_ids(Prompt(parts=("A: ", end), passages=("cat",), prefill=prefill), labels)
    assert encoder.tokenizer.convert_ids_to_tokens(ids) == expected


def test_a_space_that_is_a_token_of_its_own_before_a_digit():
    """Llama 2 writes "▁", "0": the prompt ends with the space, or no label would be one token."""
    encoder = sentencepiece(LLAMA_2)
    asked = Prompt(parts=("A: ", "?"), passages=("cat",))
    (digits,) = encoder.encode_calls([NextToken(prompt=asked, labels=("0", "1"))])
    (words,) = encoder.encode_calls([NextToken(prompt=asked, labels=("Yes", "No"))])
    names = encoder.tokenizer.convert_ids_to_tokens
    assert names(digits.labels) == ["0", "1"]
    assert names(words.labels) == ["▁Yes", "▁No"]
    assert names(digits.prompt) == [*names(words.prompt), "▁"]
    with pytest.raises(ModelError, match="label '10' is 3 tokens"):
        encoder.label_ids(asked, ["10", "No"])


def test_a_letter_that_a_tokenizer_has_with_its_bracket():
    """Llama 3 and Qwen have "[A"; behind the bracket of a prefill (FIRST) the letter is read alone."""
    tokenizer = with_merge(LLAMA, "[", "A", use_regex=False)
    assert tokenizer.tokenize("[A") == ["[A"]
    assert label_ids(tokenizer, ["A", "B"], ["\n["] * 2) == label_ids(LLAMA, ["A", "B"])


def test_a_chat_template_that_refuses_the_conversation():
    """Gemma 2 has no system messages."""
    tokenizer = tiny_llama_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    encoder = PromptEncoder(tokenizer, 512, None)
    with pytest.raises(ModelError, match=r"refuses a conversation of system, user .*not supported.*: set chat: false"):
        encoder.label_ids(prompt("cat", system="Be brief"), ["Yes", "No"])
    assert encoder.label_ids(prompt("cat"), ["Yes", "No"])


def with_merge(
    tokenizer: PreTrainedTokenizerFast, left: str, right: str, *, use_regex: bool = True
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with one more token; without GPT-2's regex nothing parts words from signs."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["model"]["vocab"][left + right] = len(tokenizer)
    content["model"]["merges"].append([left, right])
    content["pre_tokenizer"]["use_regex"] = use_regex
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))


def test_a_label_that_the_tokenizer_joins_to_the_prompt():
    encoder = sentencepiece()
    with pytest.raises(ModelError, match=r"label 'Yes': .* joins it to the end of the prompt, 'at is it\? : '.*' Yes'"):
        encoder.label_ids(Prompt(parts=("A: ", " what is it? : "), passages=("cat",)), ["Yes", "No"])


@pytest.mark.parametrize("template", [ZEPHYR, LLAMA_2])
@pytest.mark.parametrize(("prefill", "answer"), [("", "what is a cat"), ("", "Yes"), ("", "[B]"), ("[", "B] > [A]")])
def test_an_answer_has_the_tokens_of_the_templates_own_turn(template: str, prefill: str, answer: str):
    """Prompt and continuation together are a conversation with that answer."""
    encoder = sentencepiece(template)
    turns = [{"role": "user", "content": "A: cat?"}, {"role": "assistant", "content": prefill + answer}]
    whole = encoder.tokenizer.apply_chat_template(turns, tokenize=False).rpartition(answer)
    call = LogLikelihood(prompt=Prompt(parts=("A: ", "?"), passages=("cat",), prefill=prefill), continuation=answer)
    (encoded,) = encoder.encode_calls([call])
    expected = encoder.tokenizer("".join(whole[:2]), add_special_tokens=False)["input_ids"]
    assert [*encoded.prompt, *encoded.continuation] == expected


def test_line_breaks_join_with_each_other_and_not_with_a_label():
    """Byte-level BPE of GPT-2's kind has one token for two line breaks, and two where a word follows them."""
    tokenizer = with_merge(LLAMA, "Ċ", "Ċ")
    pieces = [tokenizer.tokenize(text) for text in ("a\n\n", "a\n\nYes")]
    assert pieces == [["a", "ĊĊ"], ["a", "Ċ", "Ċ", "Yes"]]
    assert label_ids(tokenizer, ["Yes", "No"], ["a\n\n"] * 2) == label_ids(LLAMA, ["Yes", "No"])


def test_a_continuation_that_joins_the_prompt_keeps_its_own_tokens():
    encoder = sentencepiece()
    prompt = Prompt(parts=("A: ", "? : "), passages=("cat",))
    own = encoder.tokenizer("what", add_special_tokens=False)["input_ids"]
    assert list(encoder.continuation(prompt, "what")) == own


def test_calls_are_encoded_with_what_follows_them():
    """A text has room for its tokens, a score for its continuation and the backend's own."""
    encoder = PromptEncoder(LLAMA, 80, None)
    long = prompt("dog " * 90)
    calls = [
        Generate(prompt=long, max_tokens=30),
        NextToken(prompt=long, labels=("Yes", "No")),
        LogLikelihood(prompt=long, continuation="Yes No"),
        NextToken(prompt=long, labels=("Yes", "Perhaps")),
        Generate(prompt=long, max_tokens=70),
    ]
    text, labels, likelihood, bad_label, too_long = encoder.encode_calls(calls, 5)
    assert len(text.prompt) <= 50 < len(text.prompt) + 4
    assert len(labels.prompt) <= 75 < len(labels.prompt) + 4
    assert list(labels.labels) == label_ids(LLAMA, ["Yes", "No"])
    assert len(likelihood.prompt) + len(likelihood.continuation) <= 75
    assert list(likelihood.continuation) == LLAMA("Yes No", add_special_tokens=False)["input_ids"]
    assert "label 'Perhaps' is" in bad_label.reason
    assert isinstance(too_long, Failure)
    assert "raise max_length" in too_long.reason


def test_what_is_asked_of_a_written_text_shows_what_the_writer_saw():
    """Room was left for the whole text: a shorter one does not let more of the passage in."""
    encoder = PromptEncoder(LLAMA, 150, None)
    writer = Generate(prompt=prompt("dog " * 90), max_tokens=60)
    asked = LogLikelihood(
        prompt=Prompt(parts=writer.prompt.parts, passages=writer.prompt.passages, prefill="Yes "),
        continuation="No",
        written_by=writer,
    )
    written, read = encoder.encode_calls([writer, asked])
    assert isinstance(read, EncodedCall)
    assert read.prompt[: len(written.prompt)] == written.prompt
    assert LLAMA.decode(read.prompt[len(written.prompt) :]) == "Yes "


def test_what_is_asked_of_a_written_text_stands_right_behind_it():
    """A model that answered without the think block that its template's own turns have is read without it."""
    tokenizer = tiny_llama_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    encoder = PromptEncoder(tokenizer, 512, None)
    writer = Generate(prompt=prompt("cat"), max_tokens=60)
    for text in ("Yes ", "<think>\nNo\n</think>Yes "):
        asked = LogLikelihood(prompt=prefilled(text), continuation="No", written_by=writer)
        written, read = encoder.encode_calls([writer, asked])
        assert tokenizer.decode(read.prompt) == tokenizer.decode(written.prompt) + text


# How the model's own turn begins


def prefilled(prefill: str, chat: bool = True) -> Prompt:
    return Prompt(parts=(HEAD, TAIL), passages=("cat",), prefill=prefill, chat=chat)


def test_a_prefill_begins_the_models_turn():
    encoder = PromptEncoder(LLAMA, 512, None)
    expected = f"<|user|>{HEAD}cat{TAIL}<|end|><|assistant|>Answer: ["
    assert encode_one(encoder, prefilled("Answer: [")) == LLAMA(expected, add_special_tokens=False)["input_ids"]
    plain = f"{HEAD}cat{TAIL} Relevant:"
    assert encode_one(encoder, prefilled(" Relevant:", chat=False)) == LLAMA(plain)["input_ids"]
    assert encode_one(encoder, prefilled("")) == encode_one(encoder, prompt("cat"))


def test_a_prefill_is_never_cut():
    ids = encode_one(PromptEncoder(LLAMA, 70, None), Prompt(parts=(HEAD, TAIL), passages=("dog " * 90,), prefill="Yes"))
    assert 66 <= len(ids) <= 70
    assert LLAMA.decode(ids).endswith(f"{TAIL}<|end|><|assistant|>Yes")


@pytest.mark.parametrize("written", ["", "<think>", "<think>\n", "<think>\n\n</think>\n\n", "<think></think>"])
def test_one_think_block_whatever_the_template_writes(written: str):
    """Qwen3's template drops think blocks of the assistant's messages or adds an empty one, others open one."""
    tokenizer = tiny_llama_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>" + written + "{% endif %}"
    )
    encoder = PromptEncoder(tokenizer, 512, None)
    ids = encode_one(encoder, prefilled("<think>\n\n</think>\n\n"))
    assert tokenizer.decode(ids).endswith("<|end|><|assistant|><think>\n\n</think>\n\n")
    assert tokenizer.decode(ids).count("<think>") == 1
    # An answer stands behind the block, and never in one that is open.
    closed = "<think>\n\n</think>\n\n" if written and "/" not in written else written
    behind = f"<|end|><|assistant|>{closed}"
    read, likelihood, text, begun = encoder.encode_calls(
        [
            NextToken(prompt=prompt("cat"), labels=("Yes", "No")),
            LogLikelihood(prompt=prompt("cat"), continuation="Yes"),
            Generate(prompt=prompt("cat"), max_tokens=9),
            Generate(prompt=prefilled("Yes"), max_tokens=9),
        ]
    )
    assert tokenizer.decode(read.prompt).endswith(behind)
    assert likelihood.prompt == read.prompt
    assert tokenizer.decode(text.prompt).endswith(f"<|end|><|assistant|>{written}")
    assert tokenizer.decode(begun.prompt).endswith(f"{behind}Yes")


@pytest.mark.parametrize(
    ("begun", "answered", "lead"),
    [
        ("<|assistant|>", "<|assistant|>", ""),
        ("<|assistant|>", "<|assistant|> ", " "),
        ("<|assistant|>", "<|assistant|><think>\n\n</think>\n\n", "<think>\n\n</think>\n\n"),
        ("<|start|>assistant", "<|start|>assistant<|channel|>final<|message|>", "<|channel|>final<|message|>"),
        ("<|assistant|><think>\n", "<|assistant|>", "<think>\n\n</think>\n\n"),
        ("<|assistant|><think></think>", "<|assistant|>", ""),
        ("<|model|>", "<|assistant|> ", ""),
        ("<|assistant|>", "<|assistant|>\n", "\n"),
    ],
)
def test_what_leads_to_an_answer(begun: str, answered: str, lead: str):
    """Of Llama 2's kind, Qwen3's, gpt-oss's, QwQ's, DeepSeek-R1's, none and GLM's."""
    tokenizer = tiny_llama_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}<|user|>{% else %}"
        + answered
        + "{% endif %}{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}"
        + begun
        + "{% endif %}"
    )
    assert answer_lead(tokenizer) == lead
    (read,) = PromptEncoder(tokenizer, 512, None).encode_calls([NextToken(prompt=prompt("cat"), labels=("Yes", "No"))])
    expected = begun.replace("<think>\n", "") + (lead if lead.strip(" ") else "")
    assert tokenizer.decode(read.prompt).endswith(f"<|end|>{expected}")


@pytest.mark.parametrize(("written", "opened"), [("", ""), ("<think>\n", "<think>\n"), ("<think>\n\n</think>\n\n", "")])
def test_reasoning_that_the_template_opens(written: str, opened: str):
    """A generated text begins inside it; a prefill, or a prompt that is no chat, has its own."""
    tokenizer = tiny_llama_tokenizer()
    tokenizer.chat_template = "{{ messages[-1].content }}{% if add_generation_prompt %}" + written + "{% endif %}"
    encoder = PromptEncoder(tokenizer, 512, None)
    assert encoder.opened_reasoning(prompt("cat")) == opened
    assert encoder.opened_reasoning(prefilled("Yes")) == ""
    assert encoder.opened_reasoning(prefilled("", chat=False)) == ""


def test_the_tokens_that_end_a_turn():
    """All of the generation config's, the tokenizer's, and the chat template's end of turn, where there is one."""
    end, turn = LLAMA.eos_token_id, LLAMA.convert_tokens_to_ids("<|end|>")
    assert end_ids(LLAMA, GenerationConfig(eos_token_id=[7, 9])) == {end, turn, 7, 9}
    assert end_ids(PLAIN, GenerationConfig(eos_token_id=8)) == {end, 8}
    assert end_ids(PLAIN, GenerationConfig()) == {end}


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
