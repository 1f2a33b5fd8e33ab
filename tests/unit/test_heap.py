"""What a scoring process frees stays with it, unless the environment says otherwise."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from rerank_ray.models import heap

# Five blocks of 20 MB, 24,400 pages in all, written to and freed again, 20 times.
COUNT = """
import ctypes, resource
from rerank_ray.models import heap
{setting}
c = ctypes.CDLL(None)
c.malloc.restype, c.free.argtypes, c.memset.argtypes = ctypes.c_void_p, [ctypes.c_void_p], [ctypes.c_void_p, int, int]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    blocks = [c.malloc(20_000_000) for _ in range(5)]
    for block in blocks:
        c.memset(block, 1, 20_000_000)
    for block in blocks:
        c.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages_taken(setting: str) -> int:
    code = COUNT.replace("{setting}", setting).replace("int, int]", "ctypes.c_int, ctypes.c_size_t]")
    return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(heap._glibc() is None, reason="another C library than glibc")
def test_pages_are_taken_once():
    assert pages_taken("") > 10 * 24_400
    assert pages_taken("heap.keep_freed()") < 1.2 * 24_400
    assert pages_taken("heap.keep_freed(); free = heap.give_back; free()") < 1.2 * 24_400


@pytest.mark.parametrize(
    ("name", "value", "asked"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "1000", 0),
        ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1", 0),
        ("GLIBC_TUNABLES", "glibc.cpu.x=1", 2),
    ],
)
def test_the_environment_has_its_way(monkeypatch: pytest.MonkeyPatch, name: str, value: str, asked: int):
    calls = []
    monkeypatch.setattr(heap, "_glibc", lambda: SimpleNamespace(mallopt=lambda *given: calls.append(given)))
    monkeypatch.setenv(name, value)
    heap.keep_freed()
    assert len(calls) == asked


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(heap, "_glibc", lambda: None)
    heap.keep_freed()
    heap.give_back()
