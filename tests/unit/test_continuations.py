"""What stands behind a prompt: labels, continuations and answers, each with the tokens it has there."""

from __future__ import annotations

import json

import pytest
from fixtures.prompts import HEAD, TAIL, encode_one, prompt
from fixtures.tiny_models import (
    THINKING_TEMPLATE,
    tiny_bert_tokenizer,
    tiny_llama_tokenizer,
    tiny_sentencepiece_tokenizer,
)
from tokenizers import Tokenizer
from transformers import GenerationConfig, PreTrainedTokenizerFast

from rerank_ray.errors import ModelError
from rerank_ray.models.continuations import answer_lead, end_ids, label_ids, render_chat
from rerank_ray.models.protocol import Failure, Generate, LogLikelihood, NextToken, Prompt
from rerank_ray.models.tokenizing import EncodedCall, PromptEncoder

LLAMA, PLAIN, BERT = tiny_llama_tokenizer(), tiny_llama_tokenizer(chat=False), tiny_bert_tokenizer()

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
    tokenizer.chat_template = THINKING_TEMPLATE
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


LLAMA_3 = """{%- if strftime_now is defined %}{%- set date = strftime_now("%d %b %Y") %}{%- else %}{%- set date = "?" %}
{%- endif %}{{ 'Today: ' + date + strftime_now( '; %Y-%m-%d' ) + '\\n' + messages[0]['content'] }}"""


def test_a_template_that_names_the_day_says_the_same_tomorrow():
    """What a prompt's score depends on must not be the day it was asked on."""
    tokenizer = tiny_llama_tokenizer()
    tokenizer.chat_template = LLAMA_3
    shown = render_chat(tokenizer, [{"role": "user", "content": "what"}])
    assert shown == "Today: 26 Jul 2024; 2024-07-26\nwhat"
    assert tokenizer.chat_template == LLAMA_3


def test_the_tokens_that_end_a_turn():
    """All of the generation config's, the tokenizer's, and the chat template's end of turn, where there is one."""
    end, turn = LLAMA.eos_token_id, LLAMA.convert_tokens_to_ids("<|end|>")
    assert end_ids(LLAMA, GenerationConfig(eos_token_id=[7, 9])) == {end, turn, 7, 9}
    assert end_ids(PLAIN, GenerationConfig(eos_token_id=8)) == {end, 8}
    assert end_ids(PLAIN, GenerationConfig()) == {end}
