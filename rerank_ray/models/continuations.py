"""What a model writes next: the tokens of labels and continuations where they stand, and those that end a turn."""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence

from jinja2 import TemplateError

from rerank_ray.errors import ModelError

THINK = "<think>"
"""How reasoning begins."""
THINK_BLOCK = re.compile(r"<think>\s*(</think>\s*)?\Z")
"""A think block at a text's end: open, or empty where it has a group."""
TODAY = datetime.date(2024, 7, 26)
"""What chat templates that name the day are told, which is what Llama 3's say where nobody tells them: a prompt must be
the same tomorrow."""
_DATE = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_ANSWER = "\ue000ANSWER\ue001"


def continuation_ids(tokenizer, before: str, text: str) -> list[int]:
    """The tokens of `text` as it is written right behind `before`; its own, where nothing stands before it.

    SentencePiece writes `▁Yes` for a word by itself and `Yes` behind a line break: what stands before a text decides on
    its first token. Where the end of `before` would join with the text into other tokens, they are the text's own: a
    way to write it too.
    """
    joined = _joined(tokenizer, before, text)
    return _alone(tokenizer, text) if joined is None else joined


def label_ids(tokenizer, labels: Sequence[str], before: Sequence[str] | None = None, lead: str = "") -> list[int]:
    """The token of each label word behind its text of `before`, none by default; `lead` is written before the label.

    Raises:
        ModelError: a label is not exactly one token there, so its probability could not be read off one position.
    """
    ids = []
    for label, text in zip(labels, before or [""] * len(labels), strict=True):
        tokens = _joined(tokenizer, text, lead + label)
        if tokens is None and text[-1:].isspace():
            raise ModelError(
                f"label {label!r}: this tokenizer joins it to the end of the prompt, {text[-12:]!r}: end the prompt or "
                f"its prefill before the space and begin the labels with it ({' ' + label!r})"
            )
        if tokens is None:
            # Llama 3 and Qwen have a token for "[A", but behind a prompt that ends with the bracket A is read alone.
            tokens = _joined(tokenizer, "\n", lead + label)
        if len(tokens) != 1:
            pieces = tokenizer.convert_ids_to_tokens(tokens)
            raise ModelError(
                f"label {label!r} is {len(tokens)} tokens for this tokenizer ({pieces}): choose a label of one token"
            )
        ids.append(tokens[0])
    if len(set(ids)) != len(ids):
        raise ModelError(f"labels {list(labels)} are not different tokens")
    return ids


def answer_lead(tokenizer) -> str:
    """What stands between the beginning of the model's turn, as the chat template writes it, and its answer.

    Mostly nothing; a space, an empty think block or a channel's name where the template's own turns have one, and the
    empty block where it opens a think block. "" where the template has its own turns begin in another way.
    """
    turn = [{"role": "user", "content": "?"}]
    begun = render_chat(tokenizer, turn, add_generation_prompt=True)
    block = THINK_BLOCK.search(begun)
    if block is not None:
        return "" if block[1] else "<think>\n\n</think>\n\n"
    try:
        answered = render_chat(tokenizer, [*turn, _answer_turn()]).partition(_ANSWER)[0]
    except ModelError:
        # Nothing to learn from a template that can't show an answer.
        return ""
    return answered.removeprefix(begun) if answered.startswith(begun) else ""


def render_chat(tokenizer, messages: list[dict[str, str]], **options) -> str:
    """The chat template's text of a conversation, on the day `TODAY`.

    Raises:
        ModelError: the template refuses it, as some do a system message, or wants more than a conversation.
    """
    try:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            options["chat_template"] = _DATE.sub(lambda call: repr(TODAY.strftime(call[2])), template)
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except (TemplateError, TypeError, ValueError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ModelError(
            f"the tokenizer's chat template refuses a conversation of {roles} ({error}): set chat: false, or give a "
            "prompt template without a system message"
        ) from error


def end_ids(tokenizer, generation_config) -> frozenset[int]:
    """The tokens that end the model's turn: end-of-sequence tokens, and what the chat template puts after it."""
    return frozenset({tokenizer.eos_token_id, turn_end(tokenizer), *_as_list(generation_config.eos_token_id)} - {None})


def turn_end(tokenizer) -> int | None:
    """The special token that the chat template puts after the model's turn; None without a template or a token."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "?"}, _answer_turn()]
    after = render_chat(tokenizer, turns).rpartition(_ANSWER)[2]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return next((t for t in tokenizer(after, add_special_tokens=False)["input_ids"] if t in special), None)


def _joined(tokenizer, before: str, text: str) -> list[int] | None:
    """The tokens of `text` behind `before`; None where those of `before` change with what follows."""
    if not before:
        return _alone(tokenizer, text)
    if before.endswith("\n"):
        # Tokenizers may part the last of several line breaks from the others where a word follows, but not from it.
        before = before.rstrip("\n") + "\n"
    head, whole = tokenizer([before, before + text], add_special_tokens=False)["input_ids"]
    return whole[len(head) :] if whole[: len(head)] == head else None


def _alone(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _answer_turn() -> dict[str, str]:
    return {"role": "assistant", "content": _ANSWER}


def _as_list(ids: int | list[int] | None) -> list[int | None]:
    return ids if isinstance(ids, list) else [ids]
