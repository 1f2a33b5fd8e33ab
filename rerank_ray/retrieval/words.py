"""Texts to words, in scripts that write vowels as marks on letters (Devanagari, Bengali, Thai) too."""

from __future__ import annotations

import functools
import re
import unicodedata

_ASCII = re.compile(r"\w+")
_PLACES_OF_MARKS = (*range(0x300, 0x1F000), *range(0xE0100, 0xE01F0))


def words(text: str) -> list[str]:
    """Runs of letters, digits and underscores, each with the marks that combine with it."""
    return (_ASCII if text.isascii() else _any_script()).findall(text)


@functools.cache
def _any_script() -> re.Pattern[str]:
    """`\\w` alone leaves out vowel signs, and would cut words at them: there is no class of marks in `re`."""
    marks = "".join(c for c in map(chr, _PLACES_OF_MARKS) if unicodedata.category(c).startswith("M"))
    return re.compile(rf"\w[\w{marks}]*")
