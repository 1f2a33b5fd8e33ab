"""The label store: answers that models gave, kept between runs, so that none is paid for twice.

A folder of small Parquet files, the segments, which any number of processes share without locks: a segment is written
once under a name of its own, and never changed. Its name ends in the digest of its bytes, so that damage is found
before anything is read. Readers know the segments that were there when they opened the store, their own, and
all that are there when one of these has been merged into another.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from rerank_ray import __version__, storage
from rerank_ray.config import Settings
from rerank_ray.errors import InputError, RunError
from rerank_ray.models.protocol import (
    Answer,
    Backend,
    Call,
    Embed,
    Generate,
    LogLikelihood,
    NextToken,
    Pair,
    Result,
)
from rerank_ray.records import Usage
from rerank_ray.settings.jobs import StoreSettings

# Calls whose values are numbers or text: attention and token embeddings are megabytes a call, and a list that is scored
# as a whole would have to come again as a whole.
STORED_CALLS = (NextToken, LogLikelihood, Generate, Pair, Embed)
_READINGS = 6
"""Raised where the same call of a model comes to be read otherwise: answers from before are no answers then."""
# What says how a model is run, fed and paid for, not what it answers.
_NOT_IN_KEY = frozenset(
    {
        "device",
        # Of models that score whole lists, whose scores are not kept.
        "views",
        "tokens_per_batch",
        "share_prefix",
        "cache_mb",
        "allow_pickle",
        "tensor_parallel_size",
        "gpu_memory_utilization",
        "max_num_seqs",
        "enforce_eager",
        "api_key_env",
        "concurrency",
        "queries_per_second",
        "timeout_s",
        "max_tries",
        "backoff_s",
        "max_wait_s",
        "max_requests",
        "max_total_tokens",
        "seconds_per_call",
        "fail_on",
        "crash_on",
    }
)
_DIGEST_BYTES = 16
_NAME = re.compile(rf"\d{{20}}-[0-9a-f]{{8}}-([0-9a-f]{{{2 * _DIGEST_BYTES}}})\.parquet")
_SCHEMA = pa.schema([pa.field("digest", pa.binary(_DIGEST_BYTES)), pa.field("answer", pa.string())])
# A lookup reads whole segments, and an open store holds this much of them.
_SMALL_BYTES, _HELD_BYTES = 4 << 20, 256 << 20
_MOST_LOOKS = 4
"""How often a lookup follows answers into segments that others merge them into meanwhile."""
_WRITES_UNTIL_MERGED = 32
_STORE_EVERY_S = 10.0
_ABANDONED_AFTER_S = 3600
_FREED = 0.1
"""The share of `max_gb` that is free when a job begins: a store that is full takes some of every job's answers."""


@dataclass(slots=True, kw_only=True)
class StoreCounts:
    """What one process asked of the store: calls it found, calls it did not, and what went wrong."""

    hits: int = 0
    misses: int = 0
    corrupt_segments: int = 0
    failed_reads: int = 0
    """Segments that are there and could not be read: what they hold was computed again."""
    failed_writes: int = 0
    not_stored: int = 0
    """Answers for which there was no room within `max_gb`."""


class LabelStore:
    """Digest of a call -> its answer. The index takes 12 bytes an entry in memory."""

    def __init__(self, settings: StoreSettings) -> None:
        """Read the index of what is there; a folder that is not there is an empty store."""
        self._uri, self._max_bytes = settings.uri, int(settings.max_gb * 2**30)
        self.counts = StoreCounts()
        self._held: OrderedDict[str, pa.Table] = OrderedDict()
        self._own: list[str] = []
        self._segments: dict[str, _Index] = {}
        self._bytes = 0
        self._index()

    def get(self, digests: Sequence[bytes]) -> list[Answer | None]:
        """The answers under these digests; None where there is none. An answer's usage says that no call was made."""
        answers: list[Answer | None] = [None] * len(digests)
        names = list(self._segments)
        for _ in range(_MOST_LOOKS):
            self._look_up(digests, [name for name in names if name in self._segments], answers)
            if all(name in self._segments for name in names):
                break
            # Another process has merged those that are gone, and may do so again meanwhile.
            try:
                names = self._index()
            except OSError:
                self.counts.failed_reads += 1
                break
        self.counts.misses += sum(a is None for a in answers)
        self.counts.hits += sum(a is not None for a in answers)
        return answers

    def _look_up(self, digests: Sequence[bytes], names: Sequence[str], answers: list[Answer | None]) -> None:
        """Put what these segments have into `answers` where there is none yet."""
        wanted = _first_halves(b"".join(digests))
        left = np.array([i for i, answer in enumerate(answers) if answer is None], dtype=np.int64)
        # The latest segments first: a run that is done again finds its batches in few of them.
        for name in reversed(names):
            if not len(left):
                break
            found, rows = self._segments[name].find(wanted[left])
            table = self._table(name) if found.any() else None
            if table is None:
                continue
            part = table.take(pa.array(rows))
            for i, digest, text in zip(
                left[found].tolist(), part["digest"].to_pylist(), part["answer"].to_pylist(), strict=True
            ):
                if digest == digests[i]:
                    answers[i] = _decode(text)
            left = left[[answers[i] is None for i in left.tolist()]]

    def _index(self) -> list[str]:
        """Read the index of the segments that are there and not known yet; returns their names, also of those that are
        gone before they are read."""
        segments = _list_segments(self._uri)
        self._bytes = sum(size for _, size in segments)
        added = [name for name, _ in segments if name not in self._segments]
        for name in added:
            if (table := self._read(name)) is not None:
                self._segments[name] = _Index(table)
        return added

    def put(self, answers: Mapping[bytes, Answer]) -> None:
        """Keep answers, all of them in one new segment.

        A store that can't be written is counted, not raised: the answers at hand are worth more than their copies. So
        is one that is full. No other answer gives way: a job that is done again asks for the oldest first, and each new
        answer would take the place of one that it asks for next.
        """
        if not answers:
            return
        if self._bytes >= self._max_bytes:
            self.counts.not_stored += len(answers)
            return
        table = pa.table([list(answers), [_encode(a) for a in answers.values()]], schema=_SCHEMA)
        try:
            name, size = _write(self._uri, table, time.time_ns())
            self._add(name, table)
            self._bytes += size
            if len(self._own) >= _WRITES_UNTIL_MERGED:
                self._merge_own()
        except (OSError, RunError):
            self.counts.failed_writes += 1

    def _add(self, name: str, table: pa.Table) -> None:
        self._segments[name] = _Index(table)
        self._own.append(name)

    def _merge_own(self) -> None:
        """Make few segments of this process's many, and see how large the store is by now, others' writes included."""
        own, self._own = set(self._own), []
        small = [(name, size) for name, size in _list_segments(self._uri) if name in own and size < _SMALL_BYTES]
        for merged in _merge(self._uri, small, self._table):
            for name in merged.sources:
                self._segments.pop(name, None)
                self._held.pop(name, None)
            self._add(merged.name, merged.table)
        self._bytes = sum(size for _, size in _list_segments(self._uri))

    def _table(self, name: str) -> pa.Table | None:
        """A segment's rows, held while there is room; a segment that is gone or damaged leaves the index, and one that
        could not be read is asked for again next time."""
        if name in self._held:
            self._held.move_to_end(name)
            return self._held[name]
        failed = self.counts.failed_reads
        table = self._read(name)
        if table is None:
            if self.counts.failed_reads == failed:
                self._segments.pop(name, None)
            return None
        self._held[name] = table
        while len(self._held) > 1 and sum(t.nbytes for t in self._held.values()) > _HELD_BYTES:
            self._held.popitem(last=False)
        return table

    def _read(self, name: str) -> pa.Table | None:
        try:
            return _read(self._uri, name, self.counts)
        except OSError:
            self.counts.failed_reads += 1
            return None


def prepare(settings: StoreSettings) -> None:
    """Make the store's folder, and room in it for new answers, before anything expensive starts.

    Raises:
        InputError: it can't be made and written.
    """
    probe = storage.join(settings.uri, f"{uuid.uuid4().hex}.probe")
    try:
        storage.write_bytes(probe, b"")
        storage.delete_file(probe)
    except (OSError, RunError, pa.ArrowInvalid) as error:
        raise InputError(f"store.uri: {settings.uri}: can't be written as a label store: {error}") from error
    with contextlib.suppress(OSError):
        _drop_oldest(settings.uri, int((1 - _FREED) * settings.max_gb * 2**30))


def tidy(settings: StoreSettings) -> None:
    """Merge small segments, drop the oldest ones beyond `max_gb`, and delete what killed writers left behind.

    Any process may do so at any time: an open store that misses a segment then looks for the one that it went into.
    """
    # A store that can't be tidied now is tidied after the next job.
    with contextlib.suppress(OSError, RunError):
        small = [(name, size) for name, size in _list_segments(settings.uri) if size < _SMALL_BYTES]
        for _ in _merge(settings.uri, small, lambda name: _read(settings.uri, name, StoreCounts())):
            pass
        _drop_oldest(settings.uri, int(settings.max_gb * 2**30))
        fs, folder = storage.open_filesystem(settings.uri)
        for info in fs.get_file_info(pafs.FileSelector(folder, allow_not_found=True)):
            name = info.base_name.removesuffix(".tmp")
            if name != info.base_name and _NAME.fullmatch(name) and _age_s(info) > _ABANDONED_AFTER_S:
                _delete(settings.uri, info.base_name)


class StoredBackend:
    """A backend as the scheduler sees it: it asks the model only for what the store does not hold."""

    def __init__(self, backend: Backend, settings: Settings, store: LabelStore) -> None:
        self._backend, self._store, self._key = backend, store, model_key(backend, settings)

    def run(self, calls: Sequence[Call]) -> list[Result]:
        """Answer the calls, in their order; new answers are stored, failures and values that are no numbers never.

        What a server has answered is stored while others are waited for, and also where the backend raises.
        """
        stored = [i for i, call in enumerate(calls) if isinstance(call, STORED_CALLS)]
        digests = {i: self._digest(calls[i]) for i in stored}
        results: list[Result | None] = [None] * len(calls)
        for i, answer in zip(stored, self._store.get(list(digests.values())), strict=True):
            results[i] = answer
        missing = [i for i, result in enumerate(results) if result is None]
        if missing:
            with _Keeper(self._store, [digests.get(i) for i in missing]) as keeper:
                told = (keeper.take,) if getattr(self._backend, "tells_each_answer", False) else ()
                answered = self._backend.run([calls[i] for i in missing], *told)
                for number, result in enumerate(answered):
                    keeper.take(number, result)
            for i, result in zip(missing, answered, strict=True):
                results[i] = result
        return results

    def holds(self, calls: Sequence[Call]) -> list[bool]:
        """Which calls the store answers; the model is not asked."""
        answers = self._store.get([self._digest(call) for call in calls])
        return [answer is not None for answer in answers]

    def _digest(self, call: Call) -> bytes:
        # The text of a call names its class and every field of it, strings quoted and floats exact.
        return hashlib.blake2b(f"{self._key}\n{call!r}".encode(), digest_size=_DIGEST_BYTES).digest()


class _Keeper:
    """Stores one round's answers: every few seconds what has come, as the process may be killed, and the rest at the
    end. In a thread of its own: a store far away would hold up those who wait for a server's other answers."""

    def __init__(self, store: LabelStore, digests: Sequence[bytes | None]) -> None:
        """Take the calls' digests, None of those that are not stored."""
        self._store, self._digests = store, dict(enumerate(digests))
        self._come: dict[bytes, Answer] = {}
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._store_now_and_then, daemon=True)

    def __enter__(self) -> _Keeper:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._store_what_has_come()

    def take(self, number: int, result: Result) -> None:
        """Keep a call's result; one that was taken before is not taken again."""
        digest = self._digests.pop(number, None)
        if digest and _worth_keeping(result):
            with self._lock:
                self._come[digest] = result

    def _store_now_and_then(self) -> None:
        while not self._ended.wait(_STORE_EVERY_S):
            self._store_what_has_come()

    def _store_what_has_come(self) -> None:
        with self._lock:
            come, self._come = self._come, {}
        self._store.put(come)


def model_key(backend: Backend, settings: Settings) -> str:
    """What an answer depends on beside the call: the model with its revision, how it reads and computes, our release.

    `dtype: auto` stands for what it is on this machine. A hub model without `revision` is known by its name alone.
    """
    content = settings.model_dump(mode="json", exclude=_NOT_IN_KEY)
    if content.get("dtype") == "auto" and hasattr(backend, "device"):
        from rerank_ray.models.engine import pick_dtype

        content["dtype"] = str(pick_dtype("auto", backend.device))
    if content.get("dtype") == "int8":
        from rerank_ray.models.acceleration import adds_in_16_bits

        # Weights have fewer steps there.
        content["adds_in_16_bits"] = adds_in_16_bits()
    return json.dumps([__version__, _READINGS, backend.name, content], sort_keys=True)


class _Index:
    """Where a segment's digests stand: the first half of each, sorted, and its row."""

    def __init__(self, table: pa.Table) -> None:
        digests = table["digest"].combine_chunks()
        every = memoryview(digests.buffers()[1])
        prefixes = _first_halves(every[digests.offset * _DIGEST_BYTES :][: len(digests) * _DIGEST_BYTES])
        self._rows = np.argsort(prefixes, kind="stable").astype(np.uint32)
        self._prefixes = prefixes[self._rows]

    def find(self, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of `wanted` [N] may be here, and the rows of those."""
        at = np.searchsorted(self._prefixes, wanted).clip(max=len(self._prefixes) - 1)
        found = self._prefixes[at] == wanted
        return found, self._rows[at[found]]


def _first_halves(digests: bytes | memoryview) -> np.ndarray:
    return np.frombuffer(digests, dtype=np.uint64)[::2]


def _encode(answer: Answer) -> str:
    """JSON, which gives every finite float back exactly."""
    content = [answer.value, answer.usage.prompt_tokens, answer.cut_off, answer.log_probability]
    return json.dumps(content, default=float)


def _decode(text: str) -> Answer:
    value, tokens, cut_off, log_probability = json.loads(text)
    return Answer(
        value=tuple(value) if isinstance(value, list) else value,
        usage=Usage(prompt_tokens=tokens, cached_tokens=tokens),
        cut_off=cut_off,
        log_probability=log_probability,
    )


def _worth_keeping(result: Result) -> bool:
    """A value that is no number may be a failure of the moment, and would be one for ever."""
    if not isinstance(result, Answer):
        return False
    if isinstance(result.value, str):
        return True
    return all(math.isfinite(v) for v in (result.value if isinstance(result.value, tuple) else (result.value,)))


def _write(uri: str, table: pa.Table, at_ns: int) -> tuple[str, int]:
    """Write a segment; returns its name, which begins with its age in nanoseconds since the epoch, and its bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data = sink.getvalue().to_pybytes()
    name = f"{at_ns:020d}-{uuid.uuid4().hex[:8]}-{_checksum(data)}.parquet"
    storage.write_bytes(storage.join(uri, name), data)
    return name, len(data)


def _read(uri: str, name: str, counts: StoreCounts) -> pa.Table | None:
    """A segment's rows; None when it is gone, or when its bytes are not what its name says. Such a damaged one is
    counted and deleted: what it held is computed and written again.

    Raises:
        OSError: it is there, and can't be read now.
    """
    try:
        data = storage.read_bytes(storage.join(uri, name))
    except FileNotFoundError:
        return None
    if _checksum(data) != _NAME.fullmatch(name)[1]:
        _delete(uri, name)
        counts.corrupt_segments += 1
        return None
    return pq.read_table(pa.BufferReader(data), schema=_SCHEMA)


def _checksum(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Merged:
    """A segment made of others, which are deleted."""

    name: str
    table: pa.Table
    sources: tuple[str, ...]


def _merge(uri: str, segments: Sequence[tuple[str, int]], read: Callable[[str], pa.Table | None]) -> Iterator[_Merged]:
    """Merge segments (name, size in bytes) in their order, each time as many as make one that is not small."""
    group: dict[str, pa.Table] = {}
    group_bytes = 0
    for number, (name, size) in enumerate(segments, start=1):
        table = read(name)
        if table is not None:
            group[name] = table
            group_bytes += size
        if len(group) > 1 and (group_bytes >= _SMALL_BYTES or number == len(segments)):
            table = pa.concat_tables(group.values())
            first = {digest: row for row, digest in reversed([*enumerate(table["digest"].to_pylist())])}
            table = table.take(pa.array(sorted(first.values())))
            # As old as the youngest of them.
            merged, _ = _write(uri, table, int(name[:20]))
            yield _Merged(name=merged, table=table, sources=tuple(group))
            for source in group:
                _delete(uri, source)
            group, group_bytes = {}, 0


def _drop_oldest(uri: str, max_bytes: int) -> None:
    segments = _list_segments(uri)
    total = sum(size for _, size in segments)
    for name, size in segments:
        if total <= max_bytes:
            break
        _delete(uri, name)
        total -= size


def _list_segments(uri: str) -> list[tuple[str, int]]:
    """Name and size in bytes of every segment, the oldest first; other files in the folder are none of ours."""
    fs, folder = storage.open_filesystem(uri)
    files = fs.get_file_info(pafs.FileSelector(folder, allow_not_found=True))
    return sorted((f.base_name, f.size) for f in files if f.is_file and _NAME.fullmatch(f.base_name))


def _age_s(info: pafs.FileInfo) -> float:
    return time.time() - (info.mtime_ns or 0) / 1e9


def _delete(uri: str, name: str) -> None:
    """Delete a file that another process may have deleted already."""
    with contextlib.suppress(OSError):
        storage.delete_file(storage.join(uri, name))
