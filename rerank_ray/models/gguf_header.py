"""GGUF files with their header read once.

transformers reads a GGUF file's header for the tokenizer, for the configuration and for the weights, and lists the
architecture's tensor names anew for every module. A header holds the vocabulary, so this takes half a minute for a
model whose weights take two seconds.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


@contextmanager
def read_once(gguf_file: str | None) -> Iterator[None]:
    """Inside, and inside of a further one in it, a GGUF file's header is read once, and an architecture's tensor names
    are listed once; without a GGUF file nothing is changed."""
    if gguf_file is None:
        yield
        return
    import gguf

    if not isinstance(gguf.GGUFReader, type):
        yield
        return

    class Reader(gguf.GGUFReader):
        """The same on a plain array: a slice of a `memmap` costs three times as much, and a header takes a million."""

        @property
        def data(self) -> np.ndarray:
            return self._bytes

        @data.setter
        def data(self, mapped: np.ndarray) -> None:
            self._bytes = np.asarray(mapped)

    reader, tensor_names = gguf.GGUFReader, gguf.get_tensor_name_map
    # transformers imports both from the package at each call.
    gguf.GGUFReader, gguf.get_tensor_name_map = functools.cache(Reader), functools.cache(tensor_names)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, tensor_names
