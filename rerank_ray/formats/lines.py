"""What all line formats share: numbered lines, a policy for bad ones, and typed fields of JSON objects.

A reader is a `parse(line_number, line)` function that raises `Fault`; `parsed` runs it over a file and hands each
fault to the caller's `BadLines`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa

from rerank_ray import storage
from rerank_ray.errors import InputError

LISTED_BAD_LINES = 100
FLOAT32_MAX = 3.4028234663852886e38
_GZIP = b"\x1f\x8b"

T = TypeVar("T")


class Fault(Exception):
    """What is wrong with one line (`reason`), and how to mend it (`fix`)."""

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(reason, fix)
        self.reason = reason
        self.fix = fix


@dataclass(frozen=True, slots=True, kw_only=True)
class BadLine:
    """One line that was left out: `where` is `path:line`, or `path: entry 17` in a file that is one JSON array."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class BadLines:
    """What happens to lines that can't be used: the first one stops the reading, or all are skipped and counted.

    Attributes:
        skip: count bad lines instead of raising; None where a command has no option for it.
        count: the bad lines so far.
        listed: the first 100 of them.
    """

    def __init__(self, *, skip: bool | None = None) -> None:
        self.skip = skip
        self.count = 0
        self.listed: list[BadLine] = []

    def report(self, path: str, line_number: int | str, reason: str, fix: str) -> None:
        """Raise `InputError` for a bad line, or count it; a string as `line_number` names another place (`entry 17`).

        Raises:
            InputError: `path:line: reason: fix`, unless bad lines are skipped.
        """
        where = f"{path}:{line_number}" if isinstance(line_number, int) else f"{path}: {line_number}"
        if not self.skip:
            hint = "" if self.skip is None else "; --skip-bad-lines leaves such lines out and lists them"
            raise InputError(f"{where}: {reason}: {fix}{hint}")
        self.count += 1
        if len(self.listed) < LISTED_BAD_LINES:
            self.listed.append(BadLine(where=where, reason=reason))


def text_lines(path: str, bad: BadLines) -> Iterator[tuple[int, str]]:
    """Numbered lines (from 1) of a UTF-8 text file, `.gz` included, without blank lines, line ends and byte order mark.

    Raises:
        InputError: the file can't be opened or is damaged (never skipped); a line is not UTF-8 (a bad line).
    """
    number = 0
    try:
        fs, inner = storage.open_filesystem(path)
        with fs.open_input_stream(inner, compression="detect") as stream:
            for number, raw in enumerate(io.BufferedReader(stream, 1 << 20), start=1):
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    if number == 1 and raw.startswith(_GZIP):
                        # Never skipped: it is the whole file.
                        raise InputError(
                            f"{path}: is gzip, which only a name that ends in .gz says: rename it, or unpack it"
                        ) from error
                    bad.report(
                        path, number, f"byte {error.start + 1} of the line is not UTF-8", "convert the file to UTF-8"
                    )
                    continue
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, number, error) from error


def first_character(path: str) -> str:
    """The first character of a text file that is not blank ('' if there is none), which tells JSON from other layouts.

    Raises:
        InputError: the file can't be opened or is damaged.
    """
    try:
        fs, inner = storage.open_filesystem(path)
        with fs.open_input_stream(inner, compression="detect") as stream:
            return stream.read(4096).decode("utf-8-sig", errors="ignore").lstrip()[:1]
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, 0, error) from error


def _unreadable(path: str, lines_read: int, error: Exception) -> InputError:
    detail = (str(error).splitlines() or [type(error).__name__])[0]
    if lines_read == 0:
        return InputError(f"{path}:1: can't be read ({detail}): check the path, its permissions and its compression")
    return InputError(
        f"{path}:{lines_read + 1}: can't be read ({detail}): the file is damaged; fetch or write it again"
    )


def parsed(
    path: str, bad: BadLines, parse: Callable[[Any, Any], T], items: Iterable[tuple[int | str, Any]] | None = None
) -> Iterator[T]:
    """Run `parse(place, item)` over a file's numbered lines, or `items` of it, handing each `Fault` to `bad`."""
    for place, item in text_lines(path, bad) if items is None else items:
        try:
            record = parse(place, item)
        except Fault as fault:
            bad.report(path, place, fault.reason, fault.fix)
            continue
        yield record


class FirstSeen:
    """Raises a `Fault` for a key that an earlier line already used."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._line: dict[Any, int | str] = {}

    def check(self, key: Any, line_number: int | str) -> None:
        first = self._line.setdefault(key, line_number)
        if first != line_number:
            place = f"line {first}" if isinstance(first, int) else first
            shown = key if isinstance(key, str) else " / ".join(key)
            raise Fault(f"{self._what} {shown!r} is already used on {place}", "keep one of the two")


def json_object(line: str) -> dict[str, Any]:
    """Parse one line as a JSON object, or raise `Fault`."""
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Fault(f"not JSON ({error})", "write one JSON object a line") from error
    if not isinstance(item, dict):
        raise Fault(f"{_kind(item)}, not an object", "write one JSON object a line")
    return item


def id_field(item: dict[str, Any], names: Sequence[str]) -> str:
    """The first of the fields `names` that is there, as a non-empty id; integers are taken as their digits."""
    name, value = _first_field(item, names)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    text = _string(name, value)
    if not text.strip():
        raise Fault(f"{name!r} is empty", "give it an id")
    return text


def text_field(item: dict[str, Any], names: Sequence[str]) -> str:
    """The first of the fields `names` that is there, as a string, which may be empty."""
    return _string(*_first_field(item, names))


def optional_text(item: dict[str, Any], name: str) -> str | None:
    """A string field; None when it is missing, null or empty."""
    value = item.get(name)
    return None if value is None else _string(name, value) or None


def query_text(item: dict[str, Any], names: Sequence[str]) -> str:
    """The first of the fields `names` that is there, as a string with more than blanks in it."""
    text = text_field(item, names)
    if not text.strip():
        raise Fault("the query's text is empty", "write its text or leave the query out")
    return text


def optional_number(item: dict[str, Any], name: str) -> float | None:
    """A finite number field; None when it is missing or null."""
    value = item.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Fault(f"{name!r} is a {_kind(value)}, not a number", "write a number")
    return _finite(name, value)


def text_list(item: dict[str, Any], name: str) -> list[str]:
    """An array of strings, which may be empty."""
    return [_string(f"{name}[{i}]", value) for i, value in enumerate(_array(item, name))]


def id_list(item: dict[str, Any], name: str) -> list[str]:
    """An array of non-empty ids; integers are taken as their digits."""
    return [id_field({f"{name}[{i}]": value}, (f"{name}[{i}]",)) for i, value in enumerate(_array(item, name))]


def number_list(item: dict[str, Any], name: str, length: int, of: str) -> list[float]:
    """An array of finite numbers, one for each of the `length` entries of the field `of`."""
    values = _array(item, name)
    if len(values) != length:
        raise Fault(f"{name!r} has {len(values)} entries for {length} in {of!r}", "give each its own")
    return [number_field({f"{name}[{i}]": value}, f"{name}[{i}]") for i, value in enumerate(values)]


def number_field(item: dict[str, Any], name: str) -> float:
    """A finite number field that must be there."""
    value = optional_number(item, name)
    if value is None:
        raise Fault(f"{name!r} is {'null' if name in item else 'missing'}", "write a number")
    return value


def _array(item: dict[str, Any], name: str) -> list:
    name, value = _first_field(item, (name,))
    if not isinstance(value, list):
        raise Fault(f"{name!r} is a {_kind(value)}, not an array", "write it as an array")
    return value


def number_column(name: str, text: str) -> float:
    """A column of a text format as a finite number."""
    try:
        value = float(text)
    except ValueError as error:
        raise Fault(f"{name} {text!r} is not a number", "write a number") from error
    return _finite(name, value)


def _finite(name: str, value: float) -> float:
    """Scores and gains are stored as float32: what that can't hold would silently become infinite."""
    if not abs(value) <= FLOAT32_MAX:
        raise Fault(f"{name} {str(value)[:40]} is not a finite 32-bit number", "write a finite number")
    return float(value)


def _first_field(item: dict[str, Any], names: Sequence[str]) -> tuple[str, Any]:
    for name in names:
        if name in item:
            return name, item[name]
    named = " or ".join(repr(name) for name in names)
    raise Fault(f"{named} is missing", "add the field")


def _string(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise Fault(f"{name!r} is a {_kind(value)}, not a string", "write it as a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Fault(
            f"{name!r} holds half of a surrogate pair (\\u{ord(value[error.start]):04x})", "write the whole character"
        ) from error
    return value


def _kind(value: Any) -> str:
    """What a value is called: of JSON's kinds, or, out of a Parquet column, by its Python type."""
    if value is None:
        return "JSON null"
    kinds = {bool: "boolean", int: "number", float: "number", str: "string", list: "array", dict: "object"}
    return f"JSON {kinds[type(value)]}" if type(value) in kinds else type(value).__name__
