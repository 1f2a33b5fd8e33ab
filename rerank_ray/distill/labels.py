"""Label Parquet as a training set: rows in an order that is a pure function of (seed, epoch), read as they are needed.

Only positions are kept in memory (12 bytes a row); texts are read a window of row groups at a time.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq

from rerank_ray import storage
from rerank_ray.errors import InputError
from rerank_ray.records import Labels
from rerank_ray.schema import LABELS, inspect_input, labels_from_row

_GROUPS_PER_WINDOW = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelSet:
    """Where the labelled rows lie: `positions` [rows, 2] of (row-group number, row in the group)."""

    groups: tuple[tuple[str, int], ...]
    """(URI, row group) of each group number."""
    train: np.ndarray
    validation: np.ndarray
    unlabelled: int
    """Rows with `error`: counted, not trained on."""
    fingerprint: str

    @classmethod
    def open(cls, uris: Sequence[str], validation_fraction: float, seed: int) -> LabelSet:
        """Check the files and split their labelled rows by query id.

        Raises:
            InputError: unreadable files, another schema, a query id used twice, or too few labelled rows to split.
        """
        groups: list[tuple[str, int]] = []
        none = np.empty((0, 2), dtype=np.int32)
        train, validation, unlabelled = [none], [none], 0
        digest = hashlib.sha256()
        earlier: list[tuple[str, np.ndarray]] = []
        for uri in uris:
            summary = inspect_input(uri, LABELS)
            for other, hashes in earlier:
                if shared := len(np.intersect1d(hashes, summary.id_hashes)):
                    raise InputError(f"{uri}: {shared} of its query ids are also in {other}: leave one of the two out")
            earlier.append((uri, summary.id_hashes))
            digest.update(summary.fingerprint.encode())
            for file in summary.files:
                for group, ids, errors in _row_groups(uri, file):
                    labelled = np.array([e is None for e in errors], dtype=bool)
                    held_out = np.array([_fraction(i, seed) < validation_fraction for i in ids], dtype=bool)
                    train.append(_positions(len(groups), labelled & ~held_out))
                    validation.append(_positions(len(groups), labelled & held_out))
                    unlabelled += int((~labelled).sum())
                    groups.append((storage.rejoin(uri, file), group))
        label_set = cls(
            groups=tuple(groups),
            train=np.concatenate(train),
            validation=np.concatenate(validation),
            unlabelled=unlabelled,
            fingerprint=digest.hexdigest()[:16],
        )
        label_set._check_split(uris)
        return label_set

    def _check_split(self, uris: Sequence[str]) -> None:
        if len(self.train) == 0 or len(self.validation) == 0:
            raise InputError(
                f"{', '.join(uris)}: {len(self.train)} labelled queries to train on and {len(self.validation)} held "
                f"out ({self.unlabelled} rows have no labels); each needs one: label more queries, or change "
                "validation.fraction or seed"
            )

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Training positions [rows, 2] of one epoch: row groups shuffled, then rows within windows of 16 groups."""
        random = np.random.default_rng([seed, epoch])
        numbers = self.train[:, 0]
        shuffled_groups = random.permutation(np.unique(numbers))
        windows = []
        for start in range(0, len(shuffled_groups), _GROUPS_PER_WINDOW):
            window = shuffled_groups[start : start + _GROUPS_PER_WINDOW]
            windows.append(random.permutation(self.train[np.isin(numbers, window)]))
        return np.concatenate(windows)

    def reader(self) -> LabelReader:
        return LabelReader(self.groups)


class LabelReader:
    """Reads labels by position, keeping the row groups of two windows."""

    def __init__(self, groups: Sequence[tuple[str, int]]) -> None:
        self._groups = groups
        self._rows = functools.lru_cache(maxsize=2 * _GROUPS_PER_WINDOW)(self._read_group)

    def read(self, positions: np.ndarray) -> Iterator[Labels]:
        """Labels at positions [rows, 2].

        Raises:
            RowError: a row breaks the contract.
        """
        for group, row in positions:
            yield labels_from_row(self._rows(int(group))[int(row)])

    def _read_group(self, number: int) -> list[dict]:
        uri, group = self._groups[number]
        fs, path = storage.open_filesystem(uri)
        with pq.ParquetFile(path, filesystem=fs) as file:
            return file.read_row_group(group, columns=LABELS.names).to_pylist()


def _row_groups(uri: str, path: str) -> Iterator[tuple[int, list[str], list[str | None]]]:
    """Number, query ids and errors of each row group of a file."""
    fs, _ = storage.open_filesystem(uri)
    with pq.ParquetFile(path, filesystem=fs) as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=["query_id", "error"])
            yield group, table["query_id"].to_pylist(), table["error"].to_pylist()


def _positions(group: int, chosen: np.ndarray) -> np.ndarray:
    rows = np.flatnonzero(chosen).astype(np.int32)
    return np.stack([np.full_like(rows, group), rows], axis=1)


def _fraction(query_id: str, seed: int) -> float:
    """A number in [0, 1) that depends on the query and the seed alone."""
    digest = hashlib.blake2b(f"{seed}:{query_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
