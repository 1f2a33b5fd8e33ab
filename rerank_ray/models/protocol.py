"""Calls that ranking methods make and backends answer.

Methods know nothing of devices, backends nothing of ranking: a call is all that passes between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rerank_ray.records import Usage


def interleaved(parts: Sequence[str], passages: Sequence[str]) -> str:
    """`parts[0] + passages[0] + parts[1] + …`."""
    pieces = [parts[0]]
    for passage, part in zip(passages, parts[1:], strict=True):
        pieces += [passage, part]
    return "".join(pieces)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """Text with slots for passages: `parts[0] + passages[0] + parts[1] + …`; only passages may be truncated.

    `chat` prompts become the user's turn of the tokenizer's chat template, after `system` when there is one; `prefill`
    is how the model's own turn begins. What calls of one query share stands in front, so that a backend may compute it
    once.
    """

    parts: tuple[str, ...]
    passages: tuple[str, ...]
    system: str | None = None
    chat: bool = True
    prefill: str = ""

    @property
    def body(self) -> str:
        """What stands between `system` and `prefill`."""
        return interleaved(self.parts, self.passages)

    @property
    def plain_text(self) -> str:
        """The whole prompt where no chat template parts it: the system message, a blank line, the rest."""
        return (f"{self.system}\n\n" if self.system else "") + self.body + self.prefill


@dataclass(frozen=True, slots=True, kw_only=True)
class NextToken:
    """Logits of single-token `labels` at the position after the prompt; value: tuple of floats, one a label.

    Logits are comparable within one answer only (they are log-probabilities up to a constant), unless the backend
    `tells_raw_logits`: then they are the model's own.
    """

    prompt: Prompt
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLikelihood:
    """Natural-log probabilities of the continuation's tokens after the prompt; value: tuple of floats, one a token.

    `written_by` is the call whose answer the prompt's prefill is part of: passages are cut as they were for it.
    """

    prompt: Prompt
    continuation: str
    written_by: Generate | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Generate:
    """Text that follows the prompt; value: the text, without `prefill`, special tokens and the stop string.

    Generation ends at the model's end-of-turn token, at the first of the strings in `stop`, or after `max_tokens`
    (`Answer.cut_off` is then True). At temperature 0 it is greedy; above, `seed` makes one call's sample
    reproducible, and calls that differ in `seed` alone are different samples.
    """

    prompt: Prompt
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Attention that the tokens of `query` pay to each passage of the prompt (ICR, Chen et al. 2024).

    `query` must occur in the prompt's last part; the span read is its last occurrence. For a document token t, a_t is
    the mean over the query's tokens of the attention to t, summed over `heads` ((layer, head) pairs from 0; None is
    all of them). With a `calibration` text the value is a_t minus what that text pays to t in the query's place;
    passages are cut until the prompt fits with either, so both see the same tokens, and what stands before the query
    is computed once. Value: a tuple of float32 arrays, one a passage, [tokens of the passage]; with `each_head`,
    [tokens, heads] in the order of `heads`, or layer by layer. No layer above the last one in `heads` is computed.

    A backend that answers this call has an `attention_shape`: how many layers, and how many heads in each. Reading it
    raises `ModelError` where the model's attention can't be read.
    """

    prompt: Prompt
    query: str
    calibration: str | None = None
    heads: tuple[tuple[int, int], ...] | None = None
    each_head: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Relevance of a text to a query; value: one float, the model's raw score."""

    query: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PairList:
    """Relevance of each of a list's texts to a query, by a model that has to see the list: each at the layer where its
    place is settled, or each compared with the others; value: a tuple of floats, one a text."""

    query: str
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Embed:
    """Embedding of a text as `role` query or document; value: tuple of floats of unit length.

    A text too long for the model is cut at its end, or fails where `truncate` is False.
    """

    text: str
    role: str
    truncate: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedTokens:
    """Late-interaction embedding of a text as `role` query or document; value: float32 array [tokens, dimension] of
    unit rows."""

    text: str
    role: str


Call = NextToken | LogLikelihood | Generate | Attention | Pair | PairList | Embed | EmbedTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A call's value, as the call's class documents it, and what it cost."""

    value: Any
    usage: Usage
    cut_off: bool = False
    """A generated text that ended at `max_tokens`."""
    log_probability: float | None = None
    """Natural-log probability of a generated text, the sum over its tokens; None where the backend does not know it."""
    tokens: tuple[int, ...] | None = None
    """A generated text's tokens, the one that ended it included, where the model is run here; they are not stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why one call has no answer, and what it cost all the same; the others of its batch are unharmed."""

    reason: str
    usage: Usage = field(default_factory=Usage)


Result = Answer | Failure


class Backend(Protocol):
    """Answers calls of the kinds in `answers`, in any number and order; answers do not depend on each other.

    The `run` of one that `tells_each_answer` (none does without that attribute) also takes a function, which it calls
    with each call's number and result as they come.
    """

    answers: frozenset[type]
    name: str
    """Kind, model and revision, as the `teacher` and `model` columns record them."""
    exit_layer: int | None
    """The layer a layer-wise model stops at, recorded with its rankings; None for other models."""
    parameters: int
    """How many parameters the model has, as it is run."""

    def run(self, calls: Sequence[Call]) -> list[Result]:
        """Answer the calls, in their order."""
        ...
