"""What was computed of texts, kept for when they come again."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Generic, TypeVar

Value = TypeVar("Value")


class TextCache(Generic[Value]):
    """Values of texts, at most `max_bytes` of them; the least recently used go first. Texts are known by their hash."""

    def __init__(self, max_bytes: int, entry_bytes: int) -> None:
        """`entry_bytes` is what an entry takes beside its value: key, header and the table's own."""
        self.max_bytes = max_bytes
        self.bytes = 0
        self._entry_bytes = entry_bytes
        self._entries: OrderedDict[bytes, tuple[Value, int]] = OrderedDict()

    def get(self, text: str) -> Value | None:
        key = _key(text)
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def keep(self, text: str, value: Value, size: int) -> None:
        """Keep a value of `size` bytes, unless the text has one or there is no room for so large a one."""
        key, size = _key(text), size + self._entry_bytes
        if key in self._entries or size > self.max_bytes:
            return
        self._entries[key] = (value, size)
        self.bytes += size
        while self.bytes > self.max_bytes:
            _, (_, dropped) = self._entries.popitem(last=False)
            self.bytes -= dropped


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()
