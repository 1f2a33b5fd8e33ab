"""The C library's heap of a process that scores: what is freed is kept for the next batch, and given back now and then.

Both do nothing with another C library than glibc.
"""

from __future__ import annotations

import ctypes
import functools
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt (malloc.h)."""
_LARGEST_MMAP_THRESHOLD = 32 << 20
_NEVER = -1


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
        return library if library.mallopt and library.malloc_trim else None
    except (OSError, TypeError, AttributeError):
        return None


def keep_freed() -> None:
    """Keep freed memory for what is allocated next, unless the environment says when to give it back.

    By default glibc gives activations of megabytes back to the system when they are freed: a batch of seven seconds
    took up to 300,000 pages anew, and half a second for them. Blocks of 32 MiB and more still go back at once.
    """
    glibc, environment = _glibc(), os.environ
    is_set = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & set(environment)
    if glibc is not None and not is_set and "glibc.malloc." not in environment.get("GLIBC_TUNABLES", ""):
        glibc.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        glibc.mallopt(_TRIM_THRESHOLD, _NEVER)


def give_back() -> None:
    """Give what is free in the heap back to the system: activations of ever other sizes leave holes, which grow over
    the first hundreds of batches. It takes some 15 ms, and the next batch takes its pages anew."""
    if (glibc := _glibc()) is not None:
        glibc.malloc_trim(0)
