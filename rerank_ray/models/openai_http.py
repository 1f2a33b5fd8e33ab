"""Models behind an OpenAI-compatible HTTP API: generation, and scores where the server reports log-probabilities."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, ValidationError
from transformers import AutoTokenizer

from rerank_ray.errors import ConfigError, ModelError
from rerank_ray.models.http_client import HTTPClient, Request
from rerank_ray.models.loading import load
from rerank_ray.models.protocol import Answer, Call, Failure, Generate, LogLikelihood, NextToken, Prompt, Result
from rerank_ray.models.resolve import resolve
from rerank_ray.models.tokenizing import PromptEncoder
from rerank_ray.records import Usage, storable
from rerank_ray.settings.models import OpenAIHTTPSettings

# vLLM's stand-in for −∞, which JSON can't carry: no probability at all.
_NO_PROBABILITY = -9999.0
# Enough for a greeting: some reasoning models refuse a request whose limit ends them too early.
_PROBE_TOKENS, _REASONING_PROBE_TOKENS = 16, 1024
# A completion server writes a token, also where only the prompt is scored.
_GENERATED = 1
# What servers call the end that the model chose, and the end at a limit, in lower case. Whatever else they say, as
# DeepSeek's insufficient_system_resource, vLLM's abort and OpenRouter's error, is the end of half a text.
_WHOLE = frozenset(
    {"stop", "stop_token", "stop_sequence", "eos", "eos_token", "end_turn", "complete"}
    | {"tool_calls", "tool_use", "function_call"}
)
_CUT_OFF = frozenset({"length", "max_tokens", "model_length", "token_limit"})
# vLLM calls a token so where it is asked for ids.
_ID = "token_id:"
# SentencePiece's tokens of single bytes, which models write for characters that have no token.
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class OpenAIHTTP:
    """Answers `Generate`; `NextToken` with `top_logprobs`, `LogLikelihood` with `echo`.

    One call is one request. A short one at the start finds a wrong URL, key or model, and a server that does not report
    the log-probabilities it is said to.
    """

    exit_layer = None
    parameters = 0
    tells_each_answer = True

    def __init__(self, settings: OpenAIHTTPSettings) -> None:
        """Reach the server.

        Raises:
            ConfigError: the key's environment variable is not set, or the server lacks what the settings promise.
            ModelError: the server can't be reached, or refuses the key, the model or the path.
        """
        self.settings = settings
        self.name = f"openai_http:{settings.model}@{urlsplit(settings.url).hostname}"
        source = settings.tokenizer_settings
        if source is not None:
            # Another chat template makes other prompts.
            self.name += f":tokenizer={resolve(source).identity}"
        offered = {Generate: True, NextToken: settings.top_logprobs > 0, LogLikelihood: settings.echo}
        self.answers = frozenset(kind for kind, yes in offered.items() if yes)
        self.tells_log_probabilities = settings.logprobs
        self._encoder = _local_encoder(settings)
        self._client = HTTPClient(settings)
        # Whether tokens can be told apart by more than their text: the probe finds out.
        self._tells_ids = False
        self._probe()

    def check_labels(self, labels: tuple[str, ...], prompt: Prompt) -> None:
        """Raise `ConfigError` when the server reports fewer tokens than there are labels, and `ModelError` when the
        tokenizer, if there is one, needs several tokens for a label, or has several that the server calls alike."""
        if len(labels) > self.settings.top_logprobs:
            raise ConfigError(
                f"{len(labels)} labels need as many log-probabilities, and top_logprobs is "
                f"{self.settings.top_logprobs}: raise it, if the server allows, or compare fewer passages in one call"
            )
        self._check_chat(prompt)
        if self._encoder is not None:
            ids = self._encoder.label_ids(prompt, labels)
            if not self._tells_ids:
                _check_texts(self._encoder.tokenizer, labels, ids)

    def check_fits(self, prompt: Prompt, max_tokens: int = 0) -> None:
        """Raise `ModelError` unless the prompt, each passage cut to a token, and an answer fit the context, where there
        is a tokenizer to tell, and `ConfigError` where the server's API can't take the template."""
        self._check_chat(prompt)
        if self._encoder is not None:
            self._encoder.check_fits(self._cut(prompt), max_tokens, _GENERATED)

    def _check_chat(self, prompt: Prompt) -> None:
        if self.settings.api == "chat":
            request = self._chat_request(Generate(prompt=prompt, max_tokens=1))
            if isinstance(request, Failure):
                raise ConfigError(f"{self.settings.url}: {request.reason}")

    def run(self, calls: Sequence[Call], take: Callable[[int, Result], object] = lambda *_: None) -> list[Result]:
        """Answer the calls, in their order.

        Args:
            take: called with each call's number and its answer, as the server sends them.
        """
        results: list[Any] = self._requests(calls)
        ready = [i for i, r in enumerate(results) if isinstance(r, Request)]

        def take_reply(number: int, reply: dict | Failure) -> None:
            i = ready[number]
            results[i] = self._result(calls[i], reply)
            take(i, results[i])

        self._client.post([results[i] for i in ready], take_reply)
        return results

    def _result(self, call: Call, reply: dict | Failure) -> Result:
        if not isinstance(reply, dict):
            return reply
        parsed = _parsed(reply)
        result = parsed if isinstance(parsed, Failure) else self._read(call, parsed)
        if self._encoder is not None and isinstance(call, Generate) and isinstance(result, Answer):
            # A chat server puts reasoning that its template opened back; here the template was put on locally.
            return replace(result, value=self._encoder.opened_reasoning(call.prompt) + result.value)
        return result

    def _probe(self) -> None:
        prompt = Prompt(parts=("Hello",), passages=())
        calls: list[Call] = []
        if self.settings.logprobs or NextToken not in self.answers:
            reasons = self.settings.max_tokens_field == "max_completion_tokens"
            calls.append(Generate(prompt=prompt, max_tokens=_REASONING_PROBE_TOKENS if reasons else _PROBE_TOKENS))
        if NextToken in self.answers:
            calls.append(NextToken(prompt=prompt, labels=()))
        if LogLikelihood in self.answers:
            calls.append(LogLikelihood(prompt=prompt, continuation=" world"))
        for call, request in zip(calls, self._requests(calls), strict=True):
            reply = request if isinstance(request, Failure) else self._client.post([request])[0]
            parsed = _parsed(reply) if isinstance(reply, dict) else reply
            result = parsed if isinstance(parsed, Failure) else self._read(call, parsed)
            if isinstance(result, Failure) and (result is parsed or isinstance(call, Generate)):
                raise ModelError(f"{self.settings.url}: the first request failed: {result.reason}")
            if isinstance(call, Generate):
                if self.settings.logprobs and result.log_probability is None:
                    raise ConfigError(
                        f"{self.settings.url}: the server reports no log-probabilities; set logprobs: false"
                    )
            elif isinstance(result, Failure):
                setting = "top_logprobs: 0" if isinstance(call, NextToken) else "echo: false"
                raise ConfigError(f"{self.settings.url}: {result.reason}; set {setting}, and use a method without it")
            elif isinstance(call, NextToken) and self._encoder is not None:
                self._tells_ids = all(name.startswith(_ID) for name in parsed.choices[0].top_logprobs(by_id=True))

    def _requests(self, calls: Sequence[Call]) -> list[Request | Failure]:
        calls = [self._cut_call(c) for c in calls]
        if self.settings.api == "chat":
            return [self._chat_request(c) for c in calls]
        if self._encoder is None:
            return [self._completion_request(c, c.prompt.plain_text) for c in calls]
        encoded = self._encoder.encode_calls(calls, _GENERATED)
        return [
            e if isinstance(e, Failure) else self._completion_request(c, [*e.prompt, *e.continuation])
            for c, e in zip(calls, encoded, strict=True)
        ]

    def _cut(self, prompt: Prompt) -> Prompt:
        limit = self.settings.max_passage_words
        return (
            prompt
            if limit is None
            else replace(prompt, passages=tuple(_first_words(p, limit) for p in prompt.passages))
        )

    def _cut_call(self, call: Call) -> Call:
        cut = replace(call, prompt=self._cut(call.prompt))
        if not isinstance(call, LogLikelihood) or call.written_by is None:
            return cut
        return replace(cut, written_by=self._cut_call(call.written_by))

    def _chat_request(self, call: NextToken | Generate) -> Request | Failure:
        prompt = call.prompt
        if not prompt.chat:
            return Failure(
                reason="the template is plain text (chat: false), which a chat API can't take: use api: completions"
            )
        messages = [{"role": "system", "content": prompt.system}] if prompt.system else []
        messages.append({"role": "user", "content": prompt.body})
        body: dict[str, Any] = {"model": self.settings.model, "messages": messages}
        if prompt.prefill:
            if self.settings.prefill == "none":
                return Failure(
                    reason="the template begins the model's answer (prefill): set how the server continues one"
                )
            messages.append({"role": "assistant", "content": prompt.prefill})
            if self.settings.prefill == "continue_final_message":
                body |= {"continue_final_message": True, "add_generation_prompt": False}
        if isinstance(call, NextToken):
            body |= {"logprobs": True, "top_logprobs": self.settings.top_logprobs}
        elif self.settings.logprobs:
            body |= {"logprobs": True}
        body |= self._generation(call)
        return Request(path="chat/completions", body=body | self.settings.extra_body)

    def _completion_request(self, call: Call, text: str | list[int]) -> Request:
        body: dict[str, Any] = {"model": self.settings.model, "prompt": text}
        if isinstance(call, LogLikelihood):
            body |= {"echo": True, "logprobs": 1}
        elif isinstance(call, NextToken):
            body |= {"logprobs": self.settings.top_logprobs}
        elif self.settings.logprobs:
            body |= {"logprobs": 0}
        body |= self._generation(call)
        return Request(path="completions", body=body | self.settings.extra_body)

    def _generation(self, call: Call) -> dict[str, Any]:
        if not isinstance(call, Generate):
            return {self.settings.max_tokens_field: 1, **self._temperature(0.0)}
        fields = {self.settings.max_tokens_field: call.max_tokens, **self._temperature(call.temperature)}
        if call.temperature > 0:
            fields["seed"] = call.seed
        if call.stop:
            fields["stop"] = list(call.stop)
        return fields

    def _temperature(self, value: float) -> dict[str, Any]:
        return {"temperature": value} if self.settings.sends_temperature else {}

    def _read(self, call: Call, reply: _Reply) -> Result:
        choice, usage = reply.choices[0], reply.counted()
        if isinstance(call, Generate):
            value = choice.generated()
        elif isinstance(call, NextToken):
            value = _label_values(call.labels, self._names(call), choice.top_logprobs(by_id=self._tells_ids))
        else:
            count = len(self._encoder.continuation(call.prompt, call.continuation))
            value = _continuation_values(choice.logprobs, count)
        if isinstance(value, Failure):
            return replace(value, usage=usage)
        if not isinstance(call, Generate):
            return Answer(value=value, usage=usage)
        return Answer(value=value, usage=usage, cut_off=choice.cut_off, log_probability=choice.log_probability())

    def _names(self, call: NextToken) -> Sequence[str]:
        """What the server calls the labels' tokens."""
        if self._encoder is None:
            return call.labels
        ids = self._encoder.label_ids(call.prompt, call.labels)
        return [f"{_ID}{i}" if self._tells_ids else self._encoder.tokenizer.decode([i]) for i in ids]


class _PromptDetails(BaseModel):
    cached_tokens: int | None = None


class _Usage(BaseModel):
    prompt_tokens: int = 0
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None


class _Token(BaseModel):
    """`id` is told by llama.cpp."""

    token: str
    id: int | str | None = None
    logprob: float
    top_logprobs: list[_Token] = []

    def name(self, by_id: bool) -> str:
        return f"{_ID}{self.id}" if by_id and self.id is not None else self.token


class _Logprobs(BaseModel):
    """Chat servers fill `content`; completion servers the others, in parallel lists, or (llama.cpp) `content` too."""

    content: list[_Token] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float] | None] | None = None


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Choice(BaseModel):
    message: _Message | None = None
    text: str | None = None
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None

    @property
    def cut_off(self) -> bool:
        """Whether a limit ended the text."""
        return (self.finish_reason or "").lower() in _CUT_OFF

    def broken_off(self) -> str | None:
        """Why there is no whole answer, nor one up to its limit; None where there is one, or no reason is given."""
        if self.finish_reason == "content_filter":
            return "the server's content filter took the answer away"
        if not self.finish_reason or self.cut_off or self.finish_reason.lower() in _WHOLE:
            return None
        return f"the server broke the answer off: finish_reason {self.finish_reason!r}"

    def generated(self) -> str | Failure:
        """The text; reasoning that the server split off is put back in front, where methods look for it."""
        if self.message is None:
            nothing = Failure(reason="unexpected answer: neither message nor text")
            return nothing if self.text is None else storable(self.text)
        if self.message.refusal:
            return Failure(reason=f"the model refuses: {' '.join(self.message.refusal.split())[:200]}")
        reasoning = self.message.reasoning or self.message.reasoning_content
        return storable((f"<think>{reasoning}</think>" if reasoning else "") + (self.message.content or ""))

    def log_probability(self) -> float | None:
        """Of the whole text: the sum over its tokens; None when the server does not report them all."""
        if self.logprobs is None:
            return None
        content = self.logprobs.content
        values = [t.logprob for t in content] if content is not None else self.logprobs.token_logprobs or []
        known = values and all(v is not None and v > _NO_PROBABILITY for v in values)
        return sum(values) if known else None

    def top_logprobs(self, by_id: bool) -> dict[str, float] | None:
        """The first token's alternatives: text, or id where the server tells it, -> log-probability; None when it
        reports none."""
        if self.logprobs is None:
            return None
        if self.logprobs.content:
            tokens = self.logprobs.content[0].top_logprobs
            # Most likely first: the same text of a less likely token does not count.
            return {t.name(by_id): t.logprob for t in reversed(tokens)} or None
        return self.logprobs.top_logprobs[0] if self.logprobs.top_logprobs else None


class _Reply(BaseModel):
    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None

    def counted(self) -> Usage:
        usage = self.usage or _Usage()
        details = usage.prompt_tokens_details or _PromptDetails()
        return Usage(
            calls=1,
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=details.cached_tokens or 0,
            output_tokens=usage.completion_tokens or 0,
        )


def _parsed(reply: dict) -> _Reply | Failure:
    """A server's answer; a Failure where it is of another shape, or broken off."""
    try:
        parsed = _Reply.model_validate(reply)
    except ValidationError as error:
        fault = error.errors()[0]
        return Failure(reason=f"unexpected answer: {'.'.join(map(str, fault['loc']))}: {fault['msg']}")
    reason = parsed.choices[0].broken_off()
    # It is paid for like any other.
    return parsed if reason is None else Failure(reason=reason, usage=parsed.counted())


def _check_texts(tokenizer: Any, labels: Sequence[str], ids: Sequence[int]) -> None:
    """Raise `ModelError` where another token than a label's has its text, as SentencePiece's `▁Yes` and `Yes` do: read
    by its text, one may be taken for the other."""
    vocabulary = {name: i for name, i in tokenizer.get_vocab().items() if not _BYTE.fullmatch(name)}
    for label, own in zip(labels, ids, strict=True):
        text = tokenizer.decode([own])
        names = [n for n, i in vocabulary.items() if text.strip() in n and tokenizer.decode([i]) == text]
        if len(names) > 1:
            raise ModelError(
                f"label {label!r}: {len(names)} tokens of this tokenizer have the text {text!r} ({', '.join(names)}), "
                "and the server tells tokens by their text alone: have it tell their ids (vLLM's does with "
                "extra_body: {return_tokens_as_token_ids: true}), or run the model with kind hf_causal or vllm"
            )


def _label_values(
    labels: Sequence[str], names: Sequence[str], top: dict[str, float] | None
) -> tuple[float, ...] | Failure:
    if not top:
        return Failure(reason="the server reports no log-probabilities of the likeliest tokens (top_logprobs)")
    found = [top.get(name, _NO_PROBABILITY) for name in names]
    missing = [label for label, value in zip(labels, found, strict=True) if value <= _NO_PROBABILITY]
    if missing:
        return Failure(
            reason=f"label {missing[0]!r} is not among the {len(top)} likeliest tokens that the server reports "
            f"({', '.join(map(repr, list(top)[:5]))}, …): its probability is unknown"
        )
    return tuple(found)


def _continuation_values(logprobs: _Logprobs | None, count: int) -> tuple[float, ...] | Failure:
    """The echoed prompt's last `count` log-probabilities; the one token generated after them is not the prompt's."""
    echoed = (logprobs.token_logprobs if logprobs else None) or []
    values = echoed[-count - 1 : -1]
    if len(values) != count or len(echoed) < count + 2 or None in values:
        return Failure(reason="the server reports no log-probabilities of the prompt's tokens (echo)")
    return tuple(values)


def _local_encoder(settings: OpenAIHTTPSettings) -> PromptEncoder | None:
    source = settings.tokenizer_settings
    if source is None:
        return None
    return PromptEncoder(load(AutoTokenizer, resolve(source), source), settings.max_length, settings.chat)


def _first_words(text: str, count: int) -> str:
    """The text up to the end of its `count`-th word, spaces kept."""
    match = re.match(rf"\s*(?:\S+\s+){{{count - 1}}}\S+", text)
    return match[0] if match else text
