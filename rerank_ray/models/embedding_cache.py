"""Embeddings of documents kept for when they come again with another query."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from rerank_ray.models.protocol import Answer, Embed, EmbedTokens
from rerank_ray.models.text_cache import TextCache
from rerank_ray.records import Usage

_ENTRY_BYTES = 512


class EmbeddingCache(TextCache[tuple[np.ndarray, int]]):
    """Answers documents that it has seen from memory; a query does not come again."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes, _ENTRY_BYTES)

    def answer(
        self, calls: Sequence[Embed | EmbedTokens], compute: Callable[[Sequence[Embed | EmbedTokens]], list[Answer]]
    ) -> list[Answer]:
        """Answer calls in their order; `compute` is asked for queries and for the documents that are not kept."""
        answers = [self._kept(call) for call in calls]
        absent = [i for i, answer in enumerate(answers) if answer is None]
        for i, computed in zip(absent, compute([calls[i] for i in absent]) if absent else [], strict=True):
            answers[i] = computed
            if calls[i].role == "document":
                array = np.asarray(computed.value, dtype=np.float32)
                self.keep(calls[i].text, (array, computed.usage.prompt_tokens), array.nbytes)
        return answers

    def _kept(self, call: Embed | EmbedTokens) -> Answer | None:
        kept = self.get(call.text) if call.role == "document" else None
        if kept is None:
            return None
        array, tokens = kept
        value = tuple(array.tolist()) if isinstance(call, Embed) else array
        return Answer(value=value, usage=Usage(prompt_tokens=tokens, cached_tokens=tokens))
