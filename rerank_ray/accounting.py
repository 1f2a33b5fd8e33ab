"""What a job's output adds up to: every input row exactly once, errors, defects and usage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rerank_ray import storage
from rerank_ray.errors import InputError, RunError
from rerank_ray.parquet import ROWS_PER_GROUP, id_hash, open_parquet
from rerank_ray.records import PARSE_FAILURES, Usage, kind_and_count
from rerank_ray.settings.jobs import LimitSettings

_EXAMPLES = 20
_REBUILT = "rebuilt-"
"""How the names of checkpoints begin that stand for all finished rows, after failed ones were taken out."""
_PENDING = ".pending.parquet"
"""How the names of Ray Data's checkpoints end whose output files may be half written."""


@dataclass(slots=True, kw_only=True)
class Counts:
    """Totals over a run's output; `examples` names the first rows with an error.

    `rows_with_defects` counts rows that were scored all the same; the counts by kind include rows with an error.
    """

    rows: int = 0
    ok: int = 0
    errors: int = 0
    rows_with_defects: int = 0
    rows_with_parse_failures: int = 0
    rows_without_calls: int = 0
    """Scored rows for which no model was asked: it has none, or a label store had all their answers."""
    pairs: int = 0
    defects: dict[str, int] = field(default_factory=dict)
    """Kind -> how many there are."""
    rows_by_defect: dict[str, int] = field(default_factory=dict)
    """Kind -> rows with at least one of it."""
    examples: list[str] = field(default_factory=list)
    usage: dict[str, int] = field(default_factory=lambda: asdict(Usage()))

    def to_dict(self) -> dict:
        return asdict(self)

    def rates(self) -> dict:
        """The totals as rates; a parse failure is an answer that holds none (empty, refusal, unparsed).

        Failures per call are null where rows were answered without one: nobody counted those answers.
        """
        rows, calls = max(1, self.rows), 0 if self.rows_without_calls else self.usage["calls"]
        failures = sum(self.defects.get(kind, 0) for kind in PARSE_FAILURES)
        return {
            "error": self.errors / rows,
            "defect": self.rows_with_defects / rows,
            "defects": {
                kind: {"per_row": count / rows, "rows_affected": self.rows_by_defect[kind] / rows}
                for kind, count in self.defects.items()
            },
            "parse_failure": {
                "per_call": failures / calls if calls else None,
                "rows_affected": self.rows_with_parse_failures / rows,
            },
        }


def passed_bounds(counts: Counts, limits: LimitSettings) -> list[str]:
    """One line for each bound that a run's output passes."""
    rates = counts.rates()
    bounds = [
        ("error rate", rates["error"], "max_error_rate", limits.max_error_rate),
        ("defect rate", rates["defect"], "max_defect_rate", limits.max_defect_rate),
    ]
    for kind, bound in limits.max_defect_rates.items():
        rate = counts.rows_by_defect.get(kind, 0) / max(1, counts.rows)
        bounds.append((f"rate of rows with {kind} defects", rate, f"max_defect_rates.{kind}", bound))
    return [f"{what} {rate:.4f} is above limits.{name} {bound}" for what, rate, name, bound in bounds if rate > bound]


def count_output(data_uri: str, expected_rows: int) -> Counts:
    """Read a run's output once, a row group of some files at a time, and check that it accounts for every input row.

    Raises:
        RunError: rows are missing, repeated or of other queries, or a file is damaged.
    """
    counts = Counts()
    hashes: list[np.ndarray] = []
    fs, _ = storage.open_filesystem(data_uri)
    for part, ids in storage.of_each_file(lambda path: _count_file(fs, path), storage.list_files(data_uri, ".parquet")):
        _merge(counts, part)
        hashes.append(ids)
    counts.defects = dict(Counter(counts.defects).most_common())
    counts.rows_by_defect = {kind: counts.rows_by_defect[kind] for kind in counts.defects}
    every_hash = np.concatenate(hashes) if hashes else np.empty(0, dtype=np.uint64)
    distinct = len(np.unique(every_hash))
    if counts.rows != expected_rows or distinct != expected_rows:
        fix = (
            "something else wrote into the folder: use another one"
            if distinct > expected_rows
            else "start the run again, a finished one with --retry-errors: it does what is missing, and takes out what "
            "is there twice"
        )
        raise RunError(f"{data_uri}: {counts.rows} rows of {distinct} queries for {expected_rows} input rows: {fix}")
    return counts


def count_rows(paths_of: str, paths: Sequence[str]) -> int:
    """Rows of Parquet files, by their footers alone.

    Args:
        paths_of: the folder that the paths, as `storage.list_files` has them, lie in.

    Raises:
        RunError: a file is damaged.
    """
    fs, _ = storage.open_filesystem(paths_of)

    def rows(path: str) -> int:
        with _opened(fs, path) as file:
            return file.metadata.num_rows

    return sum(storage.of_each_file(rows, paths))


@contextmanager
def _opened(fs: pa.fs.FileSystem, path: str) -> Iterator[pq.ParquetFile]:
    try:
        with open_parquet(fs, path) as file:
            yield file
    except InputError as error:
        raise RunError(
            f"{error}. Of a run's output: delete the file and start the run again, a finished one with --retry-errors, "
            "which does what is missing"
        ) from error


def _count_file(fs: pa.fs.FileSystem, path: str) -> tuple[Counts, np.ndarray]:
    """One output file's totals, and the hashes of its query ids."""
    counts, hashes = Counts(), [np.empty(0, dtype=np.uint64)]
    with _opened(fs, path) as file:
        names = [n for n in ("query_id", "error", "scores", "defects", "usage") if n in file.schema_arrow.names]
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=names)
            hashes.append(np.array([id_hash(i) for i in table["query_id"].to_pylist()], dtype=np.uint64))
            _add(counts, table)
    return counts, np.concatenate(hashes)


def _merge(counts: Counts, part: Counts) -> None:
    for name in (f.name for f in fields(Counts)):
        value, more = getattr(counts, name), getattr(part, name)
        if isinstance(value, dict):
            value |= {key: value.get(key, 0) + number for key, number in more.items()}
        elif isinstance(value, list):
            value += more[: _EXAMPLES - len(value)]
        else:
            setattr(counts, name, value + more)


def _add(counts: Counts, table: pa.Table) -> None:
    counts.rows += table.num_rows
    failed = pc.is_valid(table["error"])
    errors = pc.sum(failed).as_py() or 0
    counts.errors += errors
    counts.ok += table.num_rows - errors
    counts.pairs += pc.sum(pc.list_value_length(table["scores"])).as_py() or 0
    if errors and len(counts.examples) < _EXAMPLES:
        rows = table.select(["query_id", "error"]).filter(failed).slice(0, _EXAMPLES - len(counts.examples))
        counts.examples += [f"{r['query_id']}: {r['error']}" for r in rows.to_pylist()]
    if "defects" in table.column_names:
        for row, has_error in zip(table["defects"].to_pylist(), failed.to_pylist(), strict=True):
            counted = [kind_and_count(d) for d in row or ()]
            kinds = {kind for kind, _ in counted}
            counts.rows_with_defects += bool(kinds) and not has_error
            counts.rows_with_parse_failures += not PARSE_FAILURES.isdisjoint(kinds)
            for kind, count in counted:
                counts.defects[kind] = counts.defects.get(kind, 0) + count
            for kind in kinds:
                counts.rows_by_defect[kind] = counts.rows_by_defect.get(kind, 0) + 1
    if "usage" in table.column_names:
        unasked = pc.and_(pc.invert(failed), pc.equal(pc.struct_field(table["usage"], "calls"), 0))
        counts.rows_without_calls += pc.sum(unasked).as_py() or 0
        for name in counts.usage:
            counts.usage[name] += pc.sum(pc.struct_field(table["usage"], name)).as_py() or 0


def rebuild_checkpoint(data_uri: str, checkpoint_uri: str, *, drop_errors: bool) -> int:
    """Make a run's checkpoint anew from its output, so that a resume does every row that is not there.

    Rows of a query that is there already are taken out of the output, and rows with `error` if that is asked for. Each
    step can be repeated: killed anywhere and called again, it ends in the same state.

    Returns:
        How many rows were taken out by this call.

    Raises:
        RunError: a file of the output is damaged.
    """
    fs, folder = storage.open_filesystem(checkpoint_uri)
    delete_uncommitted(data_uri, checkpoint_uri)
    paths = storage.list_files(data_uri, ".parquet")
    again = _repeated(fs, paths)
    seen: set[int] = set()
    dropped, kept_ids = 0, []
    for path in paths:
        with _opened(fs, path) as file:
            table = file.read()
        keep = np.array([_is_first(id_hash(i), again, seen) for i in table["query_id"].to_pylist()], dtype=bool)
        if drop_errors:
            keep &= pc.is_null(table["error"]).to_numpy(zero_copy_only=False)
        good = table.filter(pa.array(keep))
        kept_ids.append(good.select(["query_id"]))
        if good.num_rows == table.num_rows:
            continue
        dropped += table.num_rows - good.num_rows
        if good.num_rows:
            pq.write_table(good, path + ".tmp", filesystem=fs, row_group_size=ROWS_PER_GROUP)
            fs.move(path + ".tmp", path)
        else:
            fs.delete_file(path)
    old = storage.list_files(checkpoint_uri, ".parquet")
    fs.create_dir(folder, recursive=True)
    # The folders above may be called so, too.
    names = [path.rsplit("/", 1)[-1] for path in old]
    rebuilt_before = [int(name.removeprefix(_REBUILT)[:6]) for name in names if name.startswith(_REBUILT)]
    if kept_ids:
        rebuilt = f"{folder}/{_REBUILT}{max(rebuilt_before, default=0) + 1:06d}.parquet"
        pq.write_table(pa.concat_tables(kept_ids), rebuilt, filesystem=fs)
    for path in old:
        fs.delete_file(path)
    return dropped


def _repeated(fs: pa.fs.FileSystem, paths: Sequence[str]) -> frozenset[int]:
    """Hashes of the query ids that more than one row has."""

    def hashes(path: str) -> np.ndarray:
        with _opened(fs, path) as file:
            ids = file.read(columns=["query_id"])["query_id"].to_pylist()
        return np.array([id_hash(i) for i in ids], dtype=np.uint64)

    found = [np.empty(0, dtype=np.uint64), *storage.of_each_file(hashes, paths)]
    every_hash, counts = np.unique(np.concatenate(found), return_counts=True)
    return frozenset(every_hash[counts > 1].tolist())


def _is_first(hashed: int, again: frozenset[int], seen: set[int]) -> bool:
    """Whether a row is the first of its query; `seen` remembers those of which there are more."""
    if hashed not in again:
        return True
    is_new = hashed not in seen
    seen.add(hashed)
    return is_new


def committed(checkpoint_uri: str) -> list[str]:
    """The files of a checkpoint that name finished rows, as `storage.list_files` has them."""
    return [path for path in storage.list_files(checkpoint_uri, ".parquet") if not path.endswith(_PENDING)]


def delete_uncommitted(data_uri: str, checkpoint_uri: str) -> None:
    """Delete output files whose checkpoint was never committed: a crash may have left them half written.

    A write that was committed and then done again, as its result was lost, has both kinds of checkpoint: it is taken
    back whole, and its rows are done once more.
    """
    fs, _ = storage.open_filesystem(checkpoint_uri)
    checkpoints = set(storage.list_files(checkpoint_uri, ".parquet"))
    pending = [path for path in checkpoints if path.endswith(_PENDING)]
    # A data file is called as its checkpoint and has a number of its own, behind a hyphen.
    prefixes = tuple(p.rsplit("/", 1)[-1].removesuffix(_PENDING) + "-" for p in pending)
    for path in storage.list_files(data_uri, ".parquet") if prefixes else ():
        if path.rsplit("/", 1)[-1].startswith(prefixes):
            fs.delete_file(path)
    for path in pending:
        twin = path.removesuffix(_PENDING) + ".parquet"
        if twin in checkpoints:
            fs.delete_file(twin)
        # Last: by it a call that was stopped half-way is known.
        fs.delete_file(path)
