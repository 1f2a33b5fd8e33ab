"""Prompts to token ids: chat templates applied once per frame, and truncation that only ever shortens passages."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rerank_ray.errors import ModelError
from rerank_ray.models.continuations import THINK, THINK_BLOCK, answer_lead, continuation_ids, label_ids, render_chat
from rerank_ray.models.protocol import Failure, Generate, LogLikelihood, NextToken, Prompt, interleaved

_SLOT = "\ue000PASSAGE\ue001"
# Characters before an answer that can have a part in its tokens, and more.
_CONTEXT = 64


class PromptTooLongError(Exception):
    """The template and query alone leave no room for a passage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedPrompt:
    """A prompt's token ids, and its passages as far as they are in them."""

    ids: list[int]
    passages: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedCall:
    """A call's token ids: its prompt's, and those of the labels or of the continuation that it asks about."""

    prompt: list[int]
    labels: tuple[int, ...] = ()
    continuation: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """A call's prompt, the tokens it leaves room for, and those that are known before the prompt's."""

    prompt: Prompt
    reserved: int
    labels: tuple[int, ...] = ()
    continuation: tuple[int, ...] = ()

    def encoded(self, ids: list[int] | PromptTooLongError) -> EncodedCall | Failure:
        if isinstance(ids, PromptTooLongError):
            return Failure(reason=str(ids))
        return EncodedCall(prompt=ids, labels=self.labels, continuation=self.continuation)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpannedPrompt:
    """A prompt's token ids, and which of them are each passage's and the query's.

    A token belongs to a text when it holds at least one of its characters, so a token that joins a text to its
    neighbour is the text's.
    """

    ids: list[int]
    passages: tuple[range, ...]
    query: range


class PromptEncoder:
    """Encodes prompts for one tokenizer, at most `max_length` tokens each, continuation included."""

    def __init__(self, tokenizer, max_length: int, chat: bool | None) -> None:
        if chat and not tokenizer.chat_template:
            raise ModelError("chat: true, but the tokenizer has no chat template; set chat: false")
        if not tokenizer.is_fast:
            raise ModelError(
                f"{type(tokenizer).__name__} is written in Python, and prompts are cut by where a text's tokens begin, "
                "which tokenizers tell that transformers runs with the tokenizers library: take another model"
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.chat = bool(tokenizer.chat_template) if chat is None else chat
        self._framed = functools.lru_cache(maxsize=4096)(self._frame)
        self._continued = functools.lru_cache(maxsize=4096)(functools.partial(continuation_ids, tokenizer))
        self._labelled = functools.lru_cache(maxsize=4096)(self._find_labels)

    def encode_calls(
        self, calls: Sequence[NextToken | LogLikelihood | Generate], room: int = 0
    ) -> list[EncodedCall | Failure]:
        """Each call's tokens, so that its prompt and what follows it fit `max_length`.

        A text needs its `max_tokens`, a score its continuation and `room` more.
        """
        prepared = [self._prepare(call, room) for call in calls]
        ready = [p for p in prepared if not isinstance(p, Failure)]
        encoded = iter(self.encode([p.prompt for p in ready], [p.reserved for p in ready]))
        return [p if isinstance(p, Failure) else p.encoded(next(encoded)) for p in prepared]

    def _prepare(self, call: NextToken | LogLikelihood | Generate, room: int) -> _Prepared | Failure:
        try:
            if isinstance(call, NextToken):
                prompt, labels = self._reading(call.prompt, call.labels)
                return _Prepared(prompt=prompt, reserved=room, labels=labels)
            prompt = self.asked(call)
            if isinstance(call, Generate):
                return _Prepared(prompt=prompt, reserved=call.max_tokens)
        except (ModelError, PromptTooLongError) as error:
            return Failure(reason=str(error))
        continuation = self.continuation(call.prompt, call.continuation)
        return _Prepared(prompt=prompt, reserved=len(continuation) + room, continuation=continuation)

    def asked(self, call: NextToken | LogLikelihood | Generate) -> Prompt:
        """The call's prompt as it is encoded.

        Raises:
            ModelError: a label is not exactly one token behind it.
            PromptTooLongError: the text that it goes on from can't have been written.
        """
        prompt = call.prompt
        if isinstance(call, NextToken):
            return self._reading(prompt, call.labels)[0]
        if isinstance(call, Generate):
            # Without a prefill the model's turn is its own, reasoning included.
            return self.answering(prompt) if prompt.prefill else prompt
        if call.written_by is None:
            return self.answering(prompt)
        writer = self.asked(call.written_by)
        (fitted,) = self.fit([writer], [call.written_by.max_tokens])
        if isinstance(fitted, PromptTooLongError):
            raise fitted
        begun = writer.prefill.removesuffix(call.written_by.prompt.prefill)
        return replace(prompt, passages=fitted.passages, prefill=begun + prompt.prefill)

    def answering(self, prompt: Prompt) -> Prompt:
        """The prompt behind which the model's answer begins, and not its reasoning.

        Where the chat template opens a think block, or writes an empty one or a channel's name before an answer, the
        prompt ends with it, and a prefill stands behind it. A prefill that begins with a think block has its own.
        """
        if not (prompt.chat and self.chat and self._lead_is_text) or prompt.prefill.startswith((THINK, self._lead)):
            return prompt
        return replace(prompt, prefill=self._lead + prompt.prefill)

    def continuation(self, prompt: Prompt, text: str) -> tuple[int, ...]:
        """The tokens of a text that follows the prompt."""
        prompt = self.answering(prompt)
        return tuple(self._continued(self._before(prompt, text), self._space(prompt) + text))

    def label_ids(self, prompt: Prompt, labels: Sequence[str]) -> tuple[int, ...]:
        """The token of each label word behind the prompt, where `NextToken` reads it.

        Raises:
            ModelError: a label is not exactly one token there, or two are the same.
        """
        return self._reading(prompt, labels)[1]

    def _reading(self, prompt: Prompt, labels: Sequence[str]) -> tuple[Prompt, tuple[int, ...]]:
        """The prompt behind which the labels are read, and their tokens."""
        prompt = self.answering(prompt)
        before = tuple(self._before(prompt, label) for label in labels)
        lead, ids = self._labelled(tuple(labels), before, self._space(prompt))
        return (replace(prompt, prefill=lead) if lead else prompt), ids

    def _find_labels(self, labels: tuple[str, ...], before: tuple[str, ...], space: str) -> tuple[str, tuple[int, ...]]:
        """What the prompt must end with beside its own end, and the labels' tokens; `space` is written before them."""
        try:
            return "", tuple(label_ids(self.tokenizer, labels, before, space))
        except ModelError as error:
            if not space:
                raise
            try:
                # Llama 2 has a token of its own for the space before a digit.
                return space, tuple(label_ids(self.tokenizer, labels, [end + space for end in before]))
            except ModelError:
                raise error from None

    @functools.cached_property
    def _lead(self) -> str:
        return answer_lead(self.tokenizer)

    @property
    def _lead_is_text(self) -> bool:
        """Whether more than spaces leads to an answer. Spaces are mostly a part of the answer's first token."""
        return bool(self._lead.strip(" "))

    def _space(self, prompt: Prompt) -> str:
        """The space that the model itself writes before its answer."""
        return self._lead if prompt.chat and self.chat and not prompt.prefill and not self._lead_is_text else ""

    def _before(self, prompt: Prompt, text: str) -> str:
        """The end of the prompt, as far as it may decide on the tokens of the text that follows."""
        chat = prompt.chat and self.chat
        end = self._framed(prompt.parts, prompt.system, prompt.prefill, chat)[-1][-_CONTEXT:]
        # In plain text a word that no space parts from the prompt is one by itself: `▁Yes` for SentencePiece.
        alone = not chat and not prompt.prefill and not end[-1:].isspace() and not text[:1].isspace()
        return "" if alone else end

    def encode(self, prompts: Sequence[Prompt], reserved: Sequence[int]) -> list[list[int] | PromptTooLongError]:
        """Token ids of each prompt, at most `max_length − reserved` long; passages are cut at a token's end to fit."""
        return [f.ids if isinstance(f, FittedPrompt) else f for f in self.fit(prompts, reserved)]

    def fit(self, prompts: Sequence[Prompt], reserved: Sequence[int]) -> list[FittedPrompt | PromptTooLongError]:
        """Prompts as `encode` makes them, with what is left of their passages."""
        special = [not (p.chat and self.chat) for p in prompts]
        frames = [self._framed(p.parts, p.system, p.prefill, not s) for p, s in zip(prompts, special, strict=True)]
        texts = [interleaved(frame, p.passages) for frame, p in zip(frames, prompts, strict=True)]
        fitted: list[FittedPrompt | PromptTooLongError] = []
        for i, ids in enumerate(self._encode_texts(texts, special)):
            limit = self.max_length - reserved[i]
            whole = FittedPrompt(ids=ids, passages=prompts[i].passages)
            fitted.append(whole if len(ids) <= limit else self._truncated(frames[i], prompts[i], limit, special[i]))
        return fitted

    def check_fits(self, prompt: Prompt, max_tokens: int = 0, room: int = 0) -> None:
        """Raise `ModelError` unless the prompt, its passages cut to a token each where need be, fits with a text of
        `max_tokens`, or with a score and its `room`."""
        (encoded,) = self.encode([prompt if max_tokens else self.answering(prompt)], [max_tokens or room])
        if isinstance(encoded, PromptTooLongError):
            raise ModelError(str(encoded))

    def opened_reasoning(self, prompt: Prompt) -> str:
        """The think tag that the chat template opens the model's turn with, where no prefill does; mostly ""."""
        if prompt.prefill or not (prompt.chat and self.chat):
            return ""
        opened = THINK_BLOCK.search(self._framed(prompt.parts, prompt.system, prompt.prefill, True)[-1])
        return opened[0] if opened and not opened[1] else ""

    def _frame(self, parts: tuple[str, ...], system: str | None, prefill: str, chat: bool) -> tuple[str, ...]:
        """The text around the passages, with the chat template and the prefill applied."""
        if not chat:
            head = f"{system}\n\n{parts[0]}" if system else parts[0]
            return _prefilled((head, *parts[1:]), prefill)
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": _SLOT.join(parts)})
        text = render_chat(self.tokenizer, messages, add_generation_prompt=True)
        frame = tuple(text.split(_SLOT))
        if len(frame) != len(parts):
            raise ModelError("the tokenizer's chat template changes or repeats the user's text; set chat: false")
        if prefill.startswith(THINK):
            # Some templates open a think block of their own, or write an empty one; the prefill's takes its place.
            frame = (*frame[:-1], THINK_BLOCK.sub("", frame[-1]))
        elif prefill and not self._lead_is_text and not prefill.startswith(self._lead):
            prefill = self._lead + prefill
        return _prefilled(frame, prefill)

    def _encode_texts(self, texts: Sequence[str], special: Sequence[bool]) -> list[list[int]]:
        encoded: list[list[int]] = [[] for _ in texts]
        for with_special in (True, False):
            indices = [i for i, s in enumerate(special) if s is with_special]
            if indices:
                # Calls that differ in what is asked of them may have one prompt.
                distinct = list(dict.fromkeys(texts[i] for i in indices))
                ids = self.tokenizer(distinct, add_special_tokens=with_special)["input_ids"]
                ids_of = dict(zip(distinct, ids, strict=True))
                for i in indices:
                    encoded[i] = ids_of[texts[i]]
        return encoded

    def encode_spans(self, prompt: Prompt, query: str, others: Sequence[str] = ()) -> list[SpannedPrompt]:
        """Token ids and spans of the prompt, and of the same prompt with each of `others` in the query's place.

        All of them hold the same passages, cut until the longest fits. The query is its last occurrence in the
        prompt's last part.

        Raises:
            PromptTooLongError: no passage fits.
            ModelError: the query is not there, or the chat template changes the user's text.
        """
        query, last = query.strip(), prompt.parts[-1]
        start = last.rfind(query)
        if start < 0 or not query:
            raise ModelError(f"the prompt's last part does not hold the query {query!r}")
        before, after = last[:start], last[start + len(query) :]
        queries = [query, *(other.strip() for other in others)]
        variants = [replace(prompt, parts=(*prompt.parts[:-1], before + q + after)) for q in queries]
        frames = [self._framed(v.parts, v.system, v.prefill, v.chat and self.chat) for v in variants]
        for frame, variant in zip(frames, variants, strict=True):
            # Templates may strip the end of a message, but the query stands where it stood.
            if not frame[-1].startswith(variant.parts[-1].rstrip()):
                raise ModelError("the tokenizer's chat template changes the user's text; set chat: false")
        special = not (prompt.chat and self.chat)
        passages = prompt.passages
        texts = [interleaved(frame, passages) for frame in frames]
        if max(map(len, self._encode_texts(texts, [special] * len(texts)))) > self.max_length:
            passages = self._cut(frames, passages, self.max_length, special)
        return [
            self._spanned(frame, passages, range(len(before), len(before) + len(q)), special)
            for frame, q in zip(frames, queries, strict=True)
        ]

    def _spanned(self, frame: Sequence[str], passages: Sequence[str], query: range, special: bool) -> SpannedPrompt:
        """Encode a frame with its passages; `query` are the query's characters in the frame's last part."""
        characters, end = [], 0
        for part, passage in zip(frame, passages, strict=False):
            start = end + len(part)
            end = start + len(passage)
            characters.append(range(start, end))
        characters.append(range(end + query.start, end + query.stop))
        encoded = self.tokenizer(interleaved(frame, passages), add_special_tokens=special, return_offsets_mapping=True)
        *spans, query_span = _token_spans(encoded["offset_mapping"], characters)
        return SpannedPrompt(ids=encoded["input_ids"], passages=tuple(spans), query=query_span)

    def _truncated(
        self, frame: tuple[str, ...], prompt: Prompt, limit: int, special: bool
    ) -> FittedPrompt | PromptTooLongError:
        try:
            passages = self._cut([frame], prompt.passages, limit, special)
        except PromptTooLongError as error:
            return error
        ids = self._encode_texts([interleaved(frame, passages)], [special])[0]
        return FittedPrompt(ids=ids, passages=tuple(passages))

    def _cut(self, frames: Sequence[tuple[str, ...]], passages: Sequence[str], limit: int, special: bool) -> list[str]:
        """Give every passage the same number of tokens, the largest with which each of the frames fits.

        Raises:
            PromptTooLongError: there is no room for a token of each.
        """
        specials = [special] * len(frames)
        bare = max(map(len, self._encode_texts([interleaved(f, [""] * len(passages)) for f in frames], specials)))
        if limit - bare < len(passages):
            raise PromptTooLongError(
                f"the prompt takes {bare} tokens without its passage and max_length leaves {limit}: raise max_length"
            )
        offsets = self.tokenizer(list(passages), add_special_tokens=False, return_offsets_mapping=True)[
            "offset_mapping"
        ]
        cap = _largest_cap([len(o) for o in offsets], limit - bare)
        while cap > 0:
            cut = [p if len(o) <= cap else p[: o[cap - 1][1]] for p, o in zip(passages, offsets, strict=True)]
            longest = max(map(len, self._encode_texts([interleaved(f, cut) for f in frames], specials)))
            if longest <= limit:
                return cut
            # Joining a cut passage to its frame can give a token or two more than the parts counted apart.
            cap -= max(1, (longest - limit) // len(cut))
        raise PromptTooLongError(f"no passage fits the {limit} tokens that max_length leaves: raise max_length")


def _token_spans(offsets: Sequence[tuple[int, int]], characters: Sequence[range]) -> list[range]:
    """The tokens that hold characters of each span; `offsets` are the tokens' characters, spans are in order.

    A token between two spans is the first one's: no token is counted twice.
    """
    spans, token = [], 0
    for wanted in characters:
        while token < len(offsets) and offsets[token][1] <= wanted.start:
            token += 1
        first = token
        # Special tokens have the offsets (0, 0), wherever they stand.
        while wanted and token < len(offsets) and offsets[token][0] < wanted.stop and offsets[token][1] > wanted.start:
            token += 1
        spans.append(range(first, token))
    return spans


def _prefilled(frame: tuple[str, ...], prefill: str) -> tuple[str, ...]:
    """The prefill is no message of the conversation: templates edit those (Qwen3's drops think blocks from them)."""
    return (*frame[:-1], frame[-1] + prefill)


def _largest_cap(lengths: Sequence[int], room: int) -> int:
    """The largest c with Σ min(length, c) ≤ room."""
    low, high = 0, max(lengths)
    while low < high:
        middle = (low + high + 1) // 2
        if sum(min(n, middle) for n in lengths) <= room:
            low = middle
        else:
            high = middle - 1
    return low
