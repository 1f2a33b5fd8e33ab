"""Label Parquet as a training set: rows in an order that is a pure function of (seed, epoch), read as they are needed.

Only positions are kept in memory (12 bytes a row); texts are read a window of row groups at a time.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rerank_ray import storage
from rerank_ray.errors import InputError
from rerank_ray.parquet import doc_id_path, inspect_input, open_parquet, record_of
from rerank_ray.records import CandidateList, Labels
from rerank_ray.schema import CANDIDATES, LABELS, candidate_list_from_row, check_scores, labels_from_row

_GROUPS_PER_WINDOW = 16
_MAX_TEACHERS = 20
_ID_OF_REPEATED_TEXT = re.compile(r"([0-9a-f]{16})-[0-9]+")
Row = TypeVar("Row")
RowGroup = tuple[str, str, int]
"""A folder's or a file's URI, a file's path in its filesystem, and a row group's number in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelSet:
    """Where the labelled rows lie: `positions` [rows, 2] of (row-group number, row in the group)."""

    groups: tuple[RowGroup, ...]
    """Of each group number."""
    train: np.ndarray
    validation: np.ndarray
    unlabelled: int
    """Rows with `error`: counted, not trained on."""
    unscored: int
    """Rows without an error and without a single score: counted, not trained on either."""
    single: int
    """Training rows with one scored candidate alone."""
    tied: int
    """Training rows whose scored candidates all have the same score."""
    gains_alike: int
    """Training rows whose scored candidates all have the same known gain, or none."""
    without_positive: int
    """Training rows none of whose scored candidates has a known gain above 0."""
    without_negative: int
    """Training rows all of whose scored candidates have a known gain above 0."""
    without_contrast: int
    """Training rows without a positive or without a negative."""
    negatives_tied: int
    """Training rows whose scored candidates without a gain above 0 all have the same score, or are none."""
    without_uncertainty: int
    """Training rows without uncertainty."""
    with_instruction: int
    """Training rows whose query has an instruction of its own."""
    held_out_without_gain: int
    """Held-out rows none of whose candidates has a known gain above 0."""
    teachers: tuple[str, ...]
    """Who scored the training rows, sorted: at most 20 names, and how many more there are."""
    score_range: tuple[float, float]
    """Their lowest and highest score in the training rows."""
    fingerprint: str
    texts: TextLists | None
    """Other lists, to read texts from."""

    @classmethod
    def open(cls, uris: Sequence[str], validation_fraction: float, seed: int, texts: Sequence[str] = ()) -> LabelSet:
        """Check the files and split their labelled rows by query id.

        Args:
            texts: candidate Parquet beside the labels.

        Raises:
            InputError: unreadable files, another schema, a query id used twice, or too few labelled rows to split.
        """
        groups: list[RowGroup] = []
        none = np.empty((0, 2), dtype=np.int32)
        train, validation = [none], [none]
        counts = dict.fromkeys(("unlabelled", "unscored", "held_out_without_gain", *_COUNTED_FACTS), 0)
        lowest, highest = math.inf, -math.inf
        teachers: set[str] = set()
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
                for group, rows in _row_groups(uri, file, _columns_of_facts):
                    facts = [record_of(row, _facts, file) for row in rows]
                    labelled = np.array([f.labelled for f in facts], dtype=bool)
                    scored = np.array([f.scored for f in facts], dtype=bool)
                    held_out = _held_out([f.query_id for f in facts], validation_fraction, seed)
                    train.append(_positions(len(groups), scored & ~held_out))
                    validation.append(_positions(len(groups), scored & held_out))
                    counts["unlabelled"] += int((~labelled).sum())
                    counts["unscored"] += int((labelled & ~scored).sum())
                    trained = [facts[row] for _, row in train[-1]]
                    for name in _COUNTED_FACTS:
                        counts[name] += sum(getattr(f, name) for f in trained)
                    teachers.update(f.teacher for f in trained if f.teacher)
                    lowest = min([lowest, *(f.lowest for f in trained)])
                    highest = max([highest, *(f.highest for f in trained)])
                    counts["held_out_without_gain"] += sum(not facts[row].has_gain for _, row in validation[-1])
                    groups.append((uri, file, group))
        label_set = cls(
            groups=tuple(groups),
            train=np.concatenate(train),
            validation=np.concatenate(validation),
            **counts,
            teachers=_first_names(teachers),
            score_range=(lowest, highest),
            fingerprint=digest.hexdigest()[:16],
            texts=TextLists.open(texts, validation_fraction, seed) if texts else None,
        )
        label_set._check_split(uris)
        return label_set

    def _check_split(self, uris: Sequence[str]) -> None:
        if len(self.train) == 0 or len(self.validation) == 0:
            raise InputError(
                f"{', '.join(uris)}: {len(self.train)} labelled queries to train on and {len(self.validation)} held "
                f"out ({self.unlabelled} rows have no labels and {self.unscored} no score); each needs one: label more "
                "queries, or change "
                "validation.fraction or seed"
            )

    def require_held_out_gains(self, uris: Sequence[str], otherwise: str) -> None:
        """Raise `InputError` where there is no held-out row to validate on by known gains; `otherwise` is another fix
        than qrels."""
        if self.held_out_without_gain == len(self.validation):
            raise InputError(
                f"{', '.join(uris)}: none of {len(self.validation)} held-out queries has a candidate with a known "
                f"gain: ingest with qrels, which set the candidates' 'label', or {otherwise}"
            )

    def where(self, usable: Callable[[Labels], bool]) -> LabelSet:
        """Only the lists that are usable; the counts are still of all."""
        both = np.concatenate([self.train, self.validation])
        # In the files' order, so that each row group is read once.
        order = np.lexsort((both[:, 1], both[:, 0]))
        kept = np.empty(len(both), dtype=bool)
        kept[order] = [usable(labels) for labels in self.reader().read(both[order])]
        train, validation = np.split(kept, [len(self.train)])
        return replace(self, train=self.train[train], validation=self.validation[validation])

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Training positions [rows, 2] of one epoch: row groups shuffled, then rows within windows of 16 groups.

        The same files give the same order. Labels of the same rows made again need not: replicas write rows as they are
        done, and a run that was resumed has other files.
        """
        random = np.random.default_rng([seed, epoch])
        numbers = self.train[:, 0]
        shuffled_groups = random.permutation(np.unique(numbers))
        window_of_group = np.empty(len(self.groups), dtype=np.int64)
        window_of_group[shuffled_groups] = np.arange(len(shuffled_groups)) // _GROUPS_PER_WINDOW
        window = window_of_group[numbers]
        windows = np.split(self.train[np.argsort(window, kind="stable")], np.cumsum(np.bincount(window))[:-1])
        return np.concatenate([random.permutation(rows) for rows in windows])

    def reader(self) -> RowReader[Labels]:
        return RowReader(self.groups, LABELS, labels_from_row)

    def text_lists(self) -> TextLists:
        """Queries and passages of the training rows, and of the lists beside them."""
        own = TextLists(groups=self.groups, positions=self.train, fingerprint=self.fingerprint)
        return own if self.texts is None else own + self.texts


class Steps:
    """Which training rows each optimizer step takes, and its epoch: a function of (seed, step) alone."""

    def __init__(self, data: LabelSet, seed: int, queries_per_step: int) -> None:
        self.per_epoch = math.ceil(len(data.train) / queries_per_step)
        self._data, self._seed, self._size = data, seed, queries_per_step
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def at(self, step: int) -> tuple[np.ndarray, int]:
        """Positions [rows, 2] of a step, for all workers, and its epoch; an epoch's last step can have fewer rows."""
        epoch, number = divmod(step, self.per_epoch)
        held, order = self._order
        if held != epoch:
            order = self._data.order(self._seed, epoch)
            self._order = (epoch, order)
        return order[number * self._size : (number + 1) * self._size], epoch


class RowReader(Generic[Row]):
    """Reads rows by position, keeping the row groups of two windows."""

    def __init__(self, groups: Sequence[RowGroup], schema: pa.Schema, from_row: Callable[[dict], Row]) -> None:
        self._groups, self._columns, self._from_row = groups, schema.names, from_row
        self._rows = functools.lru_cache(maxsize=2 * _GROUPS_PER_WINDOW)(self._read_group)

    def read(self, positions: np.ndarray) -> Iterator[Row]:
        """Rows at positions [rows, 2].

        Raises:
            RowError: a row breaks the contract.
        """
        for group, row in positions:
            yield self._from_row(self._rows(int(group))[int(row)])

    def _read_group(self, number: int) -> list[dict]:
        uri, path, group = self._groups[number]
        fs, _ = storage.open_filesystem(uri)
        with open_parquet(fs, path) as file:
            return file.read_row_group(group, columns=self._columns).to_pylist()


@dataclass(frozen=True, slots=True, kw_only=True)
class TextLists:
    """Candidate lists whose texts alone are read, by number: of labels, of candidates, or of both."""

    groups: tuple[RowGroup, ...]
    """Of each group number."""
    positions: np.ndarray
    """[lists, 2] of (row-group number, row in the group)."""
    fingerprint: str

    @classmethod
    def open(cls, uris: Sequence[str], held_out: float, seed: int) -> TextLists:
        """Check candidate Parquet and find its rows, but those of queries that `LabelSet.open` would hold out.

        Raises:
            InputError: unreadable files, another schema, or no row that is not held out.
        """
        groups: list[RowGroup] = []
        positions = [np.empty((0, 2), dtype=np.int32)]
        digest = hashlib.sha256()
        for uri in uris:
            summary = inspect_input(uri, CANDIDATES)
            digest.update(summary.fingerprint.encode())
            for file in summary.files:
                for group, rows in _row_groups(uri, file, lambda *_: ["query_id"]):
                    held = _held_out([row["query_id"] for row in rows], held_out, seed)
                    positions.append(_positions(len(groups), ~held))
                    groups.append((uri, file, group))
        found = cls(groups=tuple(groups), positions=np.concatenate(positions), fingerprint=digest.hexdigest()[:16])
        if not len(found.positions):
            raise InputError(f"{', '.join(uris)}: holds no list to read texts from whose query is not held out")
        return found

    def __add__(self, other: TextLists) -> TextLists:
        moved = other.positions + np.array([len(self.groups), 0], dtype=np.int32)
        return TextLists(
            groups=self.groups + other.groups,
            positions=np.concatenate([self.positions, moved]),
            fingerprint=f"{self.fingerprint}+{other.fingerprint}",
        )

    def __len__(self) -> int:
        return len(self.positions)

    def reader(self) -> Callable[[int], CandidateList]:
        """Reads the list of a number."""
        rows = RowReader(self.groups, CANDIDATES, candidate_list_from_row)
        return lambda number: next(rows.read(self.positions[number : number + 1]))


@dataclass(frozen=True, slots=True, kw_only=True)
class _RowFacts:
    """What can be told of a row without its texts."""

    query_id: str
    teacher: str | None
    labelled: bool
    scored: bool
    single: bool
    tied: bool
    gains_alike: bool
    without_positive: bool
    without_negative: bool
    without_contrast: bool
    negatives_tied: bool
    has_gain: bool
    without_uncertainty: bool
    with_instruction: bool
    lowest: float
    highest: float
    """Of the scores; infinite where there are none."""


_COUNTED_FACTS = [f.name for f in fields(_RowFacts) if f.name in {counted.name for counted in fields(LabelSet)}]
"""What a `LabelSet` counts of its training rows."""


def _row_groups(
    uri: str, path: str, columns: Callable[[pq.ParquetFile, str], list[str]]
) -> Iterator[tuple[int, list[dict]]]:
    """Number of each row group of a file, and the columns of its rows that are wanted of that file."""
    fs, _ = storage.open_filesystem(uri)
    with open_parquet(fs, path) as file:
        names = columns(file, path)
        for group in range(file.num_row_groups):
            yield group, file.read_row_group(group, columns=names).to_pylist()


def _columns_of_facts(file: pq.ParquetFile, path: str) -> list[str]:
    gains = doc_id_path(file, path).removesuffix("doc_id") + "label"
    return ["query_id", "teacher", "instruction", "scores", "uncertainty", "error", gains]


def _facts(row: dict) -> _RowFacts:
    """Raises `RowError` where training would stop at the row."""
    if row["error"] is None:
        check_scores(row)
    pairs = zip(row["scores"] or [], row["candidates"] or [], strict=False)
    scored = [(s, (c and c["label"]) or 0.0) for s, c in pairs if s is not None and not math.isnan(s)]
    scores = {score for score, _ in scored}
    known = {gain for _, gain in scored}
    without_positive = all(gain <= 0 for gain in known)
    without_negative = all(gain > 0 for gain in known)
    return _RowFacts(
        query_id=row["query_id"],
        teacher=row["teacher"],
        labelled=row["error"] is None,
        scored=row["error"] is None and len(scored) > 0,
        single=len(scored) == 1,
        tied=len(scores) < 2,
        gains_alike=len(known) < 2,
        without_positive=without_positive,
        without_negative=without_negative,
        without_contrast=without_positive or without_negative,
        negatives_tied=len({score for score, gain in scored if gain <= 0}) < 2,
        has_gain=max(known, default=0.0) > 0,
        without_uncertainty=all(u is None or math.isnan(u) for u in row["uncertainty"] or []),
        with_instruction=row["instruction"] is not None,
        lowest=min(scores, default=math.inf),
        highest=max(scores, default=-math.inf),
    )


def _first_names(names: set[str]) -> tuple[str, ...]:
    first = sorted(names)[:_MAX_TEACHERS]
    more = len(names) - len(first)
    return (*first, f"and {more:,} more") if more else tuple(first)


def _positions(group: int, chosen: np.ndarray) -> np.ndarray:
    rows = np.flatnonzero(chosen).astype(np.int32)
    return np.stack([np.full_like(rows, group), rows], axis=1)


def _held_out(query_ids: Sequence[str], share: float, seed: int) -> np.ndarray:
    """Of each query, whether it is held out: a function of its id and the seed alone."""
    return np.array([_fraction(query_id, seed) < share for query_id in query_ids], dtype=bool)


def _fraction(query_id: str, seed: int) -> float:
    """A number in [0, 1) that depends on the query and the seed alone."""
    # Lists of one text that came without ids share what their ids begin with: all of them, or none, are held out.
    of_text = _ID_OF_REPEATED_TEXT.fullmatch(query_id)
    key = of_text[1] if of_text else query_id
    digest = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
