"""What a model will see of a template and a row: `rerank-ray prompt show`.

The prompt comes from the ranking method itself, which is run until it makes the call: passages are cut, named and
counted as in a job.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from rerank_ray import config, storage
from rerank_ray.config import Settings
from rerank_ray.errors import ConfigError, InputError, ModelError
from rerank_ray.models.fake import Fake
from rerank_ray.models.protocol import (
    Answer,
    Attention,
    Call,
    Embed,
    Generate,
    LogLikelihood,
    NextToken,
    Prompt,
    Result,
)
from rerank_ray.models.resolve import resolve
from rerank_ray.models.tokenizing import PromptEncoder, PromptTooLongError
from rerank_ray.parquet import read_rows
from rerank_ray.prompts.render import find_template
from rerank_ray.ranking.rankers import METHODS, method_class
from rerank_ray.records import CandidateList, Usage
from rerank_ray.runs import resolve_input
from rerank_ray.schema import CANDIDATES, candidate_list_from_row
from rerank_ray.settings.models import FakeSettings, ModelSettings
from rerank_ray.settings.rankers import RankerSettings
from rerank_ray.settings.synthesize import QueryWriterSettings

# Templates that a method asks with beside its `prompt`: template method -> (ranking method, key of its settings).
_SECOND_TEMPLATES = {"rebel_criteria": ("rebel", "criteria_prompt")}
_CRITERIA = "1. Depth\n2. Recency\n3. Authority"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownPrompt:
    """A prompt as the model reads it, and facts about it, one a line."""

    text: str
    facts: tuple[str, ...]


class _Shown(Settings):
    """A ranker's settings, for their errors' paths."""

    ranker: Annotated[RankerSettings | QueryWriterSettings, Field(discriminator="method")]
    """The method that the template is written for."""


def show(
    template: str, row: str, *, model: str | None = None, overrides: Sequence[str] = (), number: int | None = None
) -> ShownPrompt:
    """Render a template for one row of candidate Parquet.

    Args:
        template: a built-in template's name, or the path of a YAML template.
        row: `INPUT` for its first row, or `INPUT:QUERY_ID`.
        model: path of a model, whose tokenizer applies its chat template and cuts what is too long. Without one the
            text is the template's own.
        overrides: `a.b=c` of the method's settings, `model.max_length=512` among them.
        number: which of the query's calls, from 1; None takes the first that shows a passage. Answers to earlier calls
            are made up.

    Raises:
        ConfigError: no such template, or a bad setting.
        InputError: no such row, or no such call.
        ModelError: no such tokenizer, or no passage fits.
    """
    written_for = find_template(template).method
    method, key = _SECOND_TEMPLATES.get(written_for, (written_for, "prompt"))
    if method not in METHODS:
        raise ConfigError(f"{template}: no ranking method is called {method!r}")
    content = {"method": method, key: template, "model": {"kind": "fake"}}
    if model is not None:
        content["model"] = {"kind": "hf_causal", "path": model}
    content = {"ranker": config.apply_overrides(content, overrides)}
    settings = config.validate(_Shown, content, f"prompt show {template}").ranker
    encoder = _encoder(settings.model) if isinstance(settings.model, ModelSettings) else None
    request = _request(row)
    call, place = _chosen(_calls(settings, request, _StandIn(encoder)), number)
    facts = [f"query {request.query.query_id!r}: {place} of {method}, {type(call).__name__}"]
    if isinstance(call, NextToken):
        facts.append(f"reads the logits of {', '.join(map(repr, call.labels))} at the next position")
    if isinstance(call, LogLikelihood):
        facts.append(f"reads the likelihood of {call.continuation!r} after it")
    if isinstance(call, Generate):
        facts.append(f"generates at most {call.max_tokens} tokens after it")
    if isinstance(call, Attention):
        less = "" if call.calibration is None else f", less what {call.calibration!r} pays in its place"
        facts.append(f"reads the attention that {call.query!r} pays to each passage{less}")
    if encoder is None:
        return ShownPrompt(text=_plain(call), facts=tuple(facts))
    text, more = _encoded(call, encoder, settings.model)
    return ShownPrompt(text=text, facts=(*facts, *more))


class _StandIn(Fake):
    """Answers in the model's place; label words are checked against its tokenizer."""

    def __init__(self, encoder: PromptEncoder | None) -> None:
        super().__init__(FakeSettings())
        self.encoder = encoder

    def check_labels(self, labels: tuple[str, ...], prompt: Prompt) -> None:
        if self.encoder is not None:
            self.encoder.label_ids(prompt, labels)

    def run(self, calls: Sequence[Call]) -> list[Result]:
        return [
            Answer(value=_CRITERIA, usage=Usage()) if isinstance(c, Generate) and not c.prompt.passages else answer
            for c, answer in zip(calls, super().run(calls), strict=True)
        ]


def _encoder(settings: ModelSettings) -> PromptEncoder:
    from transformers import AutoTokenizer

    from rerank_ray.models.loading import load

    tokenizer = load(AutoTokenizer, resolve(settings), settings)
    chat = False if settings.kind == "hf_seq2seq" else getattr(settings, "chat", None)
    return PromptEncoder(tokenizer, settings.max_length, chat)


def _request(row: str) -> CandidateList:
    # Query ids may hold colons as URIs do: the longest beginning that is there is the input.
    pieces = row.split(":")
    splits = ((":".join(pieces[:n]), ":".join(pieces[n:]) or None) for n in range(len(pieces), 0, -1))
    uri, query_id = next(((uri, rest) for uri, rest in splits if uri and storage.exists(uri)), (None, None))
    if uri is None:
        raise InputError(f"--row {row}: no such candidate Parquet; write INPUT or INPUT:QUERY_ID")
    for content in read_rows(resolve_input(uri), CANDIDATES.names):
        if query_id is None or content["query_id"] == query_id:
            return candidate_list_from_row(content)
    raise InputError(f"{uri}: has no " + ("rows" if query_id is None else f"query {query_id!r}"))


def _calls(settings: RankerSettings, request: CandidateList, backend: _StandIn) -> Iterator[Call]:
    """Every call that the method makes for a query, in order."""
    steps = method_class(settings.method)(settings, backend).rank(request)
    results = None
    while True:
        try:
            calls = steps.send(results)
        except StopIteration:
            return
        yield from calls
        results = backend.run(calls)


def _chosen(calls: Iterator[Call], number: int | None) -> tuple[Call, str]:
    if number is not None:
        call = next(itertools.islice(calls, number - 1, None), None) if number > 0 else None
        if call is None:
            raise InputError(f"--call {number}: the method makes no such call for this query")
        return call, f"call {number}"
    first = last = None
    for count, call in enumerate(calls, 1):
        if hasattr(call, "prompt") and call.prompt.passages:
            return call, f"call {count}"
        first, last = first or (call, f"call {count}"), (call, f"call {count}")
    if first is None:
        raise InputError("the method makes no call for this query: its list is too short to rank")
    # A list that is embedded, not asked about, comes after its documents.
    return last if isinstance(first[0], Embed) else first


def _plain(call: Call) -> str:
    prompt = getattr(call, "prompt", None)
    return call.text if prompt is None else prompt.plain_text


def _encoded(call: Call, encoder: PromptEncoder, model: ModelSettings) -> tuple[str, list[str]]:
    """The decoded token ids of the call's text, with how long it is and what was cut."""
    prompt, tokenizer = getattr(call, "prompt", None), encoder.tokenizer
    if prompt is None:
        return call.text, [f"{len(tokenizer(call.text)['input_ids'])} tokens before any cut"]
    facts = []
    decoder_only = model.kind != "hf_seq2seq"
    if not decoder_only and prompt.prefill:
        facts.append(f"the decoder begins with {prompt.prefill!r}")
        prompt = dataclasses.replace(prompt, prefill="")
    reserved = 0
    if decoder_only:
        reserved = getattr(call, "max_tokens", 0)
        if isinstance(call, NextToken | LogLikelihood | Generate):
            prompt = encoder.asked(call)
        if isinstance(call, LogLikelihood):
            reserved = len(encoder.continuation(call.prompt, call.continuation))
        if isinstance(call, Attention) and call.calibration is not None:
            # Passages are cut until the prompt fits with either text.
            query, calibration = tokenizer([call.query, call.calibration], add_special_tokens=False)["input_ids"]
            reserved = max(0, len(calibration) - len(query))
    (fitted,) = encoder.fit([prompt], [reserved])
    if isinstance(fitted, PromptTooLongError):
        raise ModelError(str(fitted))
    room = f"max_length {model.max_length}" + (f" − {reserved} that follow" if reserved else "")
    facts.append(f"{len(fitted.ids)} tokens of at most {room}")
    for n, (whole, shown) in enumerate(zip(call.prompt.passages, fitted.passages, strict=True), 1):
        if shown != whole:
            counts = [len(tokenizer(p, add_special_tokens=False)["input_ids"]) for p in (shown, whole)]
            facts.append(f"passage {n} is cut to {counts[0]} of {counts[1]} tokens, after {shown[-40:]!r}")
    return tokenizer.decode(fitted.ids, skip_special_tokens=False, clean_up_tokenization_spaces=False), facts
