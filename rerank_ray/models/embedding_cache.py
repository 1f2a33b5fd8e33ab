"""Embeddings of documents kept for when they come again with another query."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from rerank_ray.models.protocol import Answer, Embed, EmbedTokens
from rerank_ray.records import Usage

# Of one entry beside its numbers: key, array header and the table's own.
_ENTRY_BYTES = 512


class EmbeddingCache:
    """Answers documents that it has seen from memory, at most `max_bytes` of it; the least recently used go first."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._entries: OrderedDict[bytes, tuple[np.ndarray, int]] = OrderedDict()

    def answer(
        self, calls: Sequence[Embed | EmbedTokens], compute: Callable[[Sequence[Embed | EmbedTokens]], list[Answer]]
    ) -> list[Answer]:
        """Answer calls in their order; `compute` is asked for queries and for the documents that are not kept."""
        keys = [_key(call) for call in calls]
        answers = [self._kept(key, call) for key, call in zip(keys, calls, strict=True)]
        absent = [i for i, answer in enumerate(answers) if answer is None]
        for i, computed in zip(absent, compute([calls[i] for i in absent]) if absent else [], strict=True):
            answers[i] = computed
            self._keep(keys[i], computed)
        return answers

    def _kept(self, key: bytes | None, call: Embed | EmbedTokens) -> Answer | None:
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        array, tokens = self._entries[key]
        value = tuple(array.tolist()) if isinstance(call, Embed) else array
        return Answer(value=value, usage=Usage(prompt_tokens=tokens, cached_tokens=tokens))

    def _keep(self, key: bytes | None, answer: Answer) -> None:
        array = np.asarray(answer.value, dtype=np.float32)
        if key is None or key in self._entries or array.nbytes + _ENTRY_BYTES > self.max_bytes:
            return
        self._entries[key] = (array, answer.usage.prompt_tokens)
        self.bytes += array.nbytes + _ENTRY_BYTES
        while self.bytes > self.max_bytes:
            _, (dropped, _) = self._entries.popitem(last=False)
            self.bytes -= dropped.nbytes + _ENTRY_BYTES


def _key(call: Embed | EmbedTokens) -> bytes | None:
    """A document's key; None for a query, which does not come again."""
    return hashlib.blake2b(call.text.encode(), digest_size=16).digest() if call.role == "document" else None
