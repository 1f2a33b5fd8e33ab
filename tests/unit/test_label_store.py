"""The label store gives back what was stored or nothing, whoever else reads, writes, tidies or breaks it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures.stores import CALLS, answer, digest, opened, segments, stored
from hypothesis import given, settings
from hypothesis import strategies as st

from rerank_ray import label_store
from rerank_ray.errors import InputError
from rerank_ray.label_store import LabelStore, StoreCounts, StoredBackend, prepare, tidy
from rerank_ray.models.fake import Fake
from rerank_ray.models.protocol import (
    Answer,
)
from rerank_ray.records import Usage
from rerank_ray.settings.jobs import StoreSettings
from rerank_ray.settings.models import FakeSettings

NUMBERS = st.integers(0, 30)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 2), st.sets(NUMBERS, min_size=1)),
        st.tuples(st.just("get"), st.integers(0, 2), st.lists(NUMBERS)),
        st.tuples(st.just("open"), st.integers(0, 2), st.none()),
        st.tuples(st.just("tidy"), st.integers(0, 1 << 10), st.none()),
        st.tuples(st.just("delete"), st.integers(0, 1 << 10), st.none()),
        st.tuples(st.just("flip"), st.integers(0, 1 << 10), st.integers(0, 1 << 20)),
        st.tuples(st.just("truncate"), st.integers(0, 1 << 10), st.integers(0, 1 << 20)),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_the_stored_value_or_none_whatever_happens(tmp_path_factory, steps):
    """Three processes on one folder; in between someone tidies it, deletes files and damages bytes."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(label_store, "_WRITES_UNTIL_MERGED", 3)
        patch.setattr(label_store, "_HELD_BYTES", 0)
        stores = [opened(folder) for _ in range(3)]
        put: set[int] = set()
        for kind, which, argument in steps:
            files = segments(folder)
            if kind == "put":
                stores[which].put({digest(n): answer(n) for n in argument})
                put |= argument
            elif kind == "get":
                for n, found in zip(argument, stores[which].get([digest(n) for n in argument]), strict=True):
                    assert found is None or (n in put and found.value == answer(n).value)
            elif kind == "open":
                stores[which] = opened(folder)
            elif kind == "tidy":
                tidy(StoreSettings(uri=str(folder), max_gb=1e-6 * (1 + which)))
            elif files:
                damage(files[which % len(files)], kind, argument)


def damage(file: Path, how: str, where: int | None) -> None:
    data = bytearray(file.read_bytes())
    if how == "delete":
        file.unlink()
    elif how == "truncate":
        file.write_bytes(data[: where % max(1, len(data))])
    elif data:
        data[where % len(data)] ^= 1 << (where % 8)
        file.write_bytes(data)


@settings(max_examples=60, deadline=None)
@given(where=st.integers(0, 1 << 20), how=st.sampled_from(["flip", "truncate"]))
def test_damage_is_counted_and_what_it_hit_is_written_again(tmp_path_factory, where, how):
    folder = tmp_path_factory.mktemp("store")
    fake = Fake(FakeSettings())
    expected = [r.value for r in stored(folder, fake).run(CALLS)]
    (file,) = segments(folder)
    damage(file, how, where)
    store = opened(folder)
    results = StoredBackend(fake, FakeSettings(), store).run(CALLS)
    assert [r.value for r in results] == expected
    assert (store.counts.corrupt_segments, store.counts.misses) == (1, len(CALLS))
    third = opened(folder)
    assert all(r.usage.calls == 0 for r in StoredBackend(fake, FakeSettings(), third).run(CALLS))
    assert third.counts.corrupt_segments == 0


def test_damage_after_opening_is_a_miss(tmp_path):
    opened(tmp_path).put({digest(1): answer(1)})
    store = opened(tmp_path)
    damage(segments(tmp_path)[0], "flip", 100)
    assert store.get([digest(1)]) == [None]
    assert store.counts.corrupt_segments == 1


def test_half_a_digest_alone_is_no_match(tmp_path):
    """The index holds the first 8 bytes of a digest; an entry that shares them with another is not that other."""
    store = opened(tmp_path)
    store.put({digest(1): answer(1)})
    assert store.get([digest(1)[:8] + bytes(8)]) == [None]


def test_tidy_merges_without_losing_anything(tmp_path):
    writers = [opened(tmp_path) for _ in range(2)]
    for n in range(20):
        writers[n % 2].put({digest(n): answer(n), digest(100): answer(100)})
    tidy(StoreSettings(uri=str(tmp_path)))
    assert len(segments(tmp_path)) == 1
    found = opened(tmp_path).get([digest(n) for n in [*range(20), 100]])
    assert [a.value for a in found] == [answer(n).value for n in [*range(20), 100]]


def test_a_writer_merges_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(label_store, "_WRITES_UNTIL_MERGED", 4)
    store = opened(tmp_path)
    for n in range(10):
        store.put({digest(n): answer(n)})
    assert len(segments(tmp_path)) <= 4
    assert None not in store.get([digest(n) for n in range(10)])


def test_the_oldest_are_dropped_beyond_the_bound(tmp_path):
    store = opened(tmp_path)
    for n in range(3):
        store.put({digest(n): answer(n)})
    sizes = [f.stat().st_size for f in segments(tmp_path)]
    label_store._drop_oldest(str(tmp_path), sizes[1] + sizes[2])
    assert [a is not None for a in opened(tmp_path).get([digest(n) for n in range(3)])] == [False, True, True]


@pytest.mark.parametrize("writes_until_measured", [4, 1000])
def test_a_full_store_takes_no_more_and_keeps_what_it_has(tmp_path, monkeypatch, writes_until_measured: int):
    """Room for ten of twelve batches: done again with one more, a job finds those ten, as nothing gave way to answers
    that it asks for later. It says how many answers there was no room for."""
    monkeypatch.setattr(label_store, "_WRITES_UNTIL_MERGED", writes_until_measured)
    monkeypatch.setattr(label_store, "_SMALL_BYTES", 0)
    batches = [[digest(5 * i + n) for n in range(5)] for i in range(13)]
    opened(tmp_path / "one").put({d: answer(1) for d in batches[0]})
    size = segments(tmp_path / "one")[0].stat().st_size
    bound = StoreSettings(uri=str(tmp_path / "s"), max_gb=9.5 * size / 2**30)
    first = LabelStore(bound)
    for batch in batches[:12]:
        first.put({d: answer(1) for d in batch})
    assert first.counts.not_stored == 10
    again = LabelStore(bound)
    for batch in batches:
        found = again.get(batch)
        again.put({d: answer(1) for d, a in zip(batch, found, strict=True) if a is None})
    assert (again.counts.hits, again.counts.misses, again.counts.not_stored) == (50, 15, 15)


def test_an_open_store_finds_what_another_process_has_merged(tmp_path):
    writer = opened(tmp_path)
    for n in range(6):
        writer.put({digest(n): answer(n)})
    reader = opened(tmp_path)
    tidy(StoreSettings(uri=str(tmp_path)))
    assert len(segments(tmp_path)) == 1
    assert [a.value for a in reader.get([digest(n) for n in range(6)])] == [answer(n).value for n in range(6)]
    assert reader.counts == StoreCounts(hits=6)


@pytest.mark.parametrize("indexed", [True, False], ids=["at a look-up", "at the start"])
def test_a_segment_that_can_t_be_read_for_a_moment_is_counted(tmp_path, monkeypatch, indexed):
    opened(tmp_path).put({digest(1): answer(1)})
    if indexed:
        store = opened(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(label_store.storage, "read_bytes", lambda uri: (_ for _ in ()).throw(OSError("503")))
        if not indexed:
            store = opened(tmp_path)
        assert store.get([digest(1)]) == [None]
    assert store.counts == StoreCounts(misses=1, failed_reads=1)
    if indexed:
        assert store.get([digest(1)])[0].value == answer(1).value
    assert len(segments(tmp_path)) == 1


def test_room_is_made_before_a_job(tmp_path):
    """The oldest are dropped until a tenth of the bound is free, so that a full store is not what it was for ever."""
    store = opened(tmp_path)
    for n in range(20):
        store.put({digest(n): answer(n)})
    size = sum(f.stat().st_size for f in segments(tmp_path))
    settings = StoreSettings(uri=str(tmp_path), max_gb=size / 2**30)
    prepare(settings)
    found = [a is not None for a in LabelStore(settings).get([digest(n) for n in range(20)])]
    assert found == [False] * found.count(False) + [True] * found.count(True)
    assert 2 <= found.count(False) <= 3
    LabelStore(settings).put({digest(99): answer(99)})
    tidy(settings)
    assert LabelStore(settings).get([digest(99)])[0] is not None


WRITER = """
import sys
from rerank_ray.label_store import LabelStore, tidy
from rerank_ray.models.protocol import Answer
from rerank_ray.records import Usage
from rerank_ray.settings.jobs import StoreSettings
uri, number = sys.argv[1], int(sys.argv[2])
settings = StoreSettings(uri=uri)
store = LabelStore(settings)
print("ready", flush=True)
sys.stdin.readline()
def digest(n):
    return n.to_bytes(4, "big") * 4
for round in range(30):
    mine, common = 1000 * (number + 1) + round, round
    store.put({digest(n): Answer(value=(float(n),), usage=Usage(calls=1, prompt_tokens=7)) for n in (mine, common)})
    if round % 7 == number:
        tidy(settings)
    for n, found in zip(range(30), store.get([digest(n) for n in range(30)])):
        assert found is None or found.value == (n,), (n, found)
    assert store.get([digest(mine)])[0].value == (mine,)
counts = store.counts
assert (counts.corrupt_segments, counts.failed_writes, counts.failed_reads, counts.not_stored) == (0, 0, 0, 0), counts
"""


def test_processes_write_read_and_tidy_one_store(tmp_path):
    """Three at once, each with answers of its own and with the others'; at the end all are there."""
    python = [sys.executable, "-c", WRITER, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writers = [subprocess.Popen([*python, str(n)], **pipes) for n in range(3)]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=60)
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    wanted = [*range(30), *(1000 * (n + 1) + k for n in range(3) for k in range(30))]
    found = opened(tmp_path).get([digest(n) for n in wanted])
    assert [a and a.value for a in found] == [(n,) for n in wanted]


def test_files_of_others_are_left_alone(tmp_path):
    """A store put by mistake into a folder of data neither reads, merges, counts nor deletes what is there."""
    foreign = [tmp_path / "part-0.parquet", tmp_path / "notes.tmp"]
    for file in foreign:
        file.write_bytes(b"data" * 1000)
        os.utime(file, (0, 0))
    store = opened(tmp_path)
    store.put({digest(1): answer(1)})
    tidy(StoreSettings(uri=str(tmp_path), max_gb=1e-6))
    assert all(file.exists() for file in foreign)
    assert store.counts.corrupt_segments == 0


def test_what_a_killed_writer_left_is_deleted_when_it_is_old(tmp_path):
    opened(tmp_path).put({digest(1): answer(1)})
    name = segments(tmp_path)[0].name
    old, fresh = tmp_path / f"{name}.tmp", tmp_path / f"1{name[1:]}.tmp"
    for file in (old, fresh):
        file.write_bytes(b"half")
    os.utime(old, (0, 0))
    tidy(StoreSettings(uri=str(tmp_path)))
    assert (old.exists(), fresh.exists()) == (False, True)


def test_a_store_that_can_not_be_written_costs_no_answer(tmp_path):
    store = opened(tmp_path / "a")
    (tmp_path / "a").write_text("a file where the folder should be")
    results = StoredBackend(Fake(FakeSettings()), FakeSettings(), store).run(CALLS)
    assert all(isinstance(r, Answer) for r in results)
    assert store.counts.failed_writes == 1
    with pytest.raises(InputError, match=r"store\.uri: .*can't be written"):
        prepare(StoreSettings(uri=str(tmp_path / "a")))


def test_floats_come_back_exactly(tmp_path):
    values = (0.1, -1e-300, 1 / 3, 3.4028234663852886e38, -0.0)
    store = opened(tmp_path)
    store.put({digest(1): Answer(value=values, usage=Usage())})
    assert json.dumps(store.get([digest(1)])[0].value) == json.dumps(values)
