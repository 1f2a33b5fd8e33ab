"""Texts to token ids, each distinct text once, and what a tokenizer puts around them."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from rerank_ray.models.text_cache import TextCache

_KEPT_BYTES = 32 << 20
_ENTRY_BYTES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """The special tokens around one text, or around and between two, and the segment (token type) of every piece."""

    specials: tuple[tuple[int, ...], ...]
    """Before the first text, after each: two pieces around one text, three around two."""
    special_types: tuple[tuple[int, ...], ...]
    text_types: tuple[int, ...]
    has_types: bool

    @property
    def length(self) -> int:
        """How many special tokens there are."""
        return sum(map(len, self.specials))

    def fill(self, *texts: Sequence[int]) -> dict[str, list[int]]:
        """`input_ids`, and `token_type_ids` where the tokenizer gives them, of texts that are ids already."""
        ids, types = list(self.specials[0]), list(self.special_types[0])
        for number, text in enumerate(texts):
            ids += text
            ids += self.specials[number + 1]
            types += [self.text_types[number]] * len(text)
            types += self.special_types[number + 1]
        return {"input_ids": ids, "token_type_ids": types} if self.has_types else {"input_ids": ids}


class TextTokens:
    """Token ids of texts for one tokenizer, without special tokens and cut to `longest`.

    Texts that come again, a query with each of its candidates and a document under many queries, are tokenised once, as
    long as their ids are among the latest `kept_bytes` of them.
    """

    def __init__(self, tokenizer, longest: int, kept_bytes: int = _KEPT_BYTES) -> None:
        self.tokenizer = tokenizer
        self.longest = longest
        self._kept: TextCache[array] = TextCache(kept_bytes, _ENTRY_BYTES)

    @property
    def bytes(self) -> int:
        """What is kept."""
        return self._kept.bytes

    def ids(self, texts: Sequence[str]) -> list[Sequence[int]]:
        """The ids of each text."""
        rows = {text: self._kept.get(text) for text in dict.fromkeys(texts)}
        absent = [text for text, row in rows.items() if row is None]
        if absent:
            encoded = self.tokenizer(absent, add_special_tokens=False, verbose=False)["input_ids"]
            for text, ids in zip(absent, encoded, strict=True):
                rows[text] = row = array("i", ids[: self.longest])
                self._kept.keep(text, row, row.itemsize * len(row))
        return [rows[text] for text in texts]

    @functools.cached_property
    def single(self) -> Frame:
        return _frame(self.tokenizer("a"), 1)

    @functools.cached_property
    def pair(self) -> Frame:
        return _frame(self.tokenizer("a", "a"), 2)


def _frame(encoded, texts: int) -> Frame:
    """What a tokenizer put around its texts; the pieces are told by which text, or none, each token is of."""
    owners = encoded.sequence_ids(0)
    types = encoded.get("token_type_ids") or [0] * len(owners)
    first = [owners.index(n) for n in range(texts)]
    after = [len(owners) - owners[::-1].index(n) for n in range(texts)]
    pieces = [slice(start, end) for start, end in zip([0, *after], [*first, len(owners)], strict=True)]
    return Frame(
        specials=tuple(tuple(encoded["input_ids"][piece]) for piece in pieces),
        special_types=tuple(tuple(types[piece]) for piece in pieces),
        text_types=tuple(types[start] for start in first),
        has_types="token_type_ids" in encoded,
    )
