"""Pairs as FlagEmbedding's LLM rerankers read them (Chen et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence

from rerank_ray.errors import ModelError
from rerank_ray.models.text_tokens import TextTokens

QUERY_PREFIX, DOCUMENT_PREFIX = "A: ", "B: "


class InstructedPairs:
    """Encodes `[bos] query "\\n" document "\\n" instruction`, pieces tokenised apart, as in training."""

    def __init__(self, tokenizer, instruction: str, max_length: int, max_query_length: int | None, source: str) -> None:
        """Args:
            max_length: tokens of a pair with everything around it.
            max_query_length: tokens of the query; None is three quarters of what is left for query and document.
            source: the model's name, for errors.

        Raises:
            ModelError: too little is left for query and document.
        """
        self.texts = TextTokens(tokenizer, max_length)
        self.separator, self.instruction = self.texts.ids(["\n", instruction])
        self.start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.room = max_length - len(self.start) - 2 * len(self.separator) - len(self.instruction)
        if self.room < 16 or self.room < (max_query_length or 0) + 8:
            raise ModelError(
                f"{source}: max_length ({max_length}) leaves {self.room} tokens for query and passage: raise "
                "max_length or shorten the instruction"
            )
        self.max_query_length = max_query_length or self.room * 3 // 4

    def encode(self, queries: Sequence[str], documents: Sequence[str]) -> list[list[int]]:
        """Token ids of pairs; a query is cut to its length, the document to what is left."""
        cut = [ids[: self.max_query_length] for ids in self.texts.ids(queries)]
        return [
            [*self.start, *q, *self.separator, *d[: self.room - len(q)], *self.separator, *self.instruction]
            for q, d in zip(cut, self.texts.ids(documents), strict=True)
        ]
