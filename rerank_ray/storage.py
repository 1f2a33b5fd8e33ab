"""Files behind URIs: any pyarrow filesystem (local paths, s3://, gs://, hdfs://)."""

from __future__ import annotations

import fcntl
import hashlib
import os
import posixpath
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from rerank_ray.errors import InputError, RunError

Found = TypeVar("Found")

_COPIED_BYTES = 16 * 2**20
_FILES_AT_A_TIME = 16
_SECRET = re.compile(r"[^/]*://[^/@:]*:[^/@]*@")


@contextmanager
def writing(uri: str | os.PathLike[str]) -> Iterator[None]:
    """What is done inside writes this file or folder: where the system refuses, the error names it and the fix.

    Raises:
        RunError: a full disk, a folder that is a file, no permission, no network.
    """
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{os.fspath(uri)}: can't be written ({error}): free space or name another place, then start the same "
            "command again"
        ) from error


def open_filesystem(uri: str | os.PathLike[str]) -> tuple[pafs.FileSystem, str]:
    """Split a URI or local path into a pyarrow filesystem and the path inside it.

    Raises:
        InputError: pyarrow has no filesystem for such a URI, or the URI holds a password.
    """
    text = os.fspath(uri)
    if "://" in text:
        if _SECRET.match(text):
            raise InputError(
                f"{_SECRET.sub('…://', text)}: this address came with a key and its secret before an '@', which run "
                "folders and logs would keep: leave them out; S3's are AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in "
                "the environment"
            )
        try:
            return pafs.FileSystem.from_uri(text)
        except pa.ArrowException as error:
            raise InputError(
                f"{text}: no address of a file or folder ({str(error).splitlines()[0]}): give a local path, or a URI "
                "that pyarrow can open (s3://…, gs://…)"
            ) from error
    return pafs.LocalFileSystem(), os.path.abspath(text)


def join(uri: str | os.PathLike[str], *parts: str) -> str:
    """A path below a folder; a URI's options (`?region=…`) stay at its end."""
    path, options = _options_apart(uri)
    return posixpath.join(path, *parts) + options


def without_options(uri: str | os.PathLike[str]) -> str:
    """An address without the options at a URI's end (`?region=…`), which are no part of the file's name."""
    return _options_apart(uri)[0]


def _options_apart(uri: str | os.PathLike[str]) -> tuple[str, str]:
    text = os.fspath(uri)
    path, mark, options = text.partition("?")
    return (path, mark + options) if "://" in text else (text, "")


def absolute(uri: str | os.PathLike[str]) -> str:
    """A local path from the root, for processes that run in another folder; URIs stay as they are."""
    text = os.fspath(uri)
    return text if "://" in text else os.path.abspath(text)


def is_within(uri: str | os.PathLike[str], folder: str | os.PathLike[str]) -> bool:
    """Whether an address, spelled differently perhaps, is of that folder or of what lies below it."""
    (fs, path), (folder_fs, folder_path) = open_filesystem(uri), open_filesystem(folder)
    return fs.equals(folder_fs) and f"{path}/".startswith(f"{folder_path.rstrip('/')}/")


def exists(uri: str | os.PathLike[str]) -> bool:
    fs, path = open_filesystem(uri)
    return fs.get_file_info(path).type != pafs.FileType.NotFound


def is_directory(uri: str | os.PathLike[str]) -> bool:
    fs, path = open_filesystem(uri)
    return fs.get_file_info(path).type == pafs.FileType.Directory


def file_version(uri: str | os.PathLike[str]) -> tuple[int | None, int | None]:
    """A file's size and the time of its last change, in nanoseconds; None of what is not there."""
    fs, path = open_filesystem(uri)
    info = fs.get_file_info(path)
    return info.size, info.mtime_ns


def make_directory(uri: str | os.PathLike[str]) -> None:
    """Make a folder and those above it, unless it is there.

    Raises:
        RunError: it can't be made.
    """
    fs, path = open_filesystem(uri)
    with writing(uri):
        fs.create_dir(path, recursive=True)


def read_text(uri: str | os.PathLike[str]) -> str:
    return read_bytes(uri).decode("utf-8")


def read_bytes(uri: str | os.PathLike[str]) -> bytes:
    fs, path = open_filesystem(uri)
    with fs.open_input_stream(path) as stream:
        return stream.read()


def write_text(uri: str | os.PathLike[str], text: str) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(uri, text.encode("utf-8"))


def write_bytes(uri: str | os.PathLike[str], data: bytes) -> None:
    """Write a small file so that a reader sees the old content or the new, never half of it.

    A name that ends in `.gz` is compressed so.

    Raises:
        RunError: it can't be written.
    """
    fs, path = open_filesystem(uri)
    # A local rename is atomic; object stores have no rename, but there a put becomes visible only when complete.
    target = path + ".tmp" if isinstance(fs, pafs.LocalFileSystem) else path
    with writing(uri):
        fs.create_dir(posixpath.dirname(path), recursive=True)
        with fs.open_output_stream(target, compression="gzip" if path.endswith(".gz") else None) as stream:
            stream.write(data)
        if target != path:
            fs.move(target, path)


def check_writable(uri: str | os.PathLike[str]) -> None:
    """Find before the work for a file that it can't be written afterwards: writes one beside it for a moment.

    Raises:
        RunError: it can't be written, or is a folder, a device or a pipe, in whose place the file would be put.
    """
    fs, path = open_filesystem(uri)
    kind = fs.get_file_info(path).type
    if kind not in (pafs.FileType.NotFound, pafs.FileType.File):
        what = "a folder" if kind == pafs.FileType.Directory else "no plain file"
        raise RunError(f"{os.fspath(uri)}: is {what}: name a file to write")
    probe = f"{path}.{uuid.uuid4().hex}.probe"
    with writing(uri):
        fs.create_dir(posixpath.dirname(path), recursive=True)
        fs.open_output_stream(probe).close()
        fs.delete_file(probe)


def delete_directory(uri: str | os.PathLike[str]) -> None:
    fs, path = open_filesystem(uri)
    if fs.get_file_info(path).type == pafs.FileType.Directory:
        fs.delete_dir(path)


def delete_file(uri: str | os.PathLike[str]) -> None:
    fs, path = open_filesystem(uri)
    if fs.get_file_info(path).type == pafs.FileType.File:
        fs.delete_file(path)


def list_files(uri: str | os.PathLike[str], suffix: str) -> list[str]:
    """Files under a folder (or the one file itself) that end in `suffix`, sorted, as paths inside the filesystem."""
    fs, path = open_filesystem(uri)
    info = fs.get_file_info(path)
    if info.type == pafs.FileType.File:
        return [path]
    if info.type == pafs.FileType.NotFound:
        return []
    found = fs.get_file_info(pafs.FileSelector(path, recursive=True))
    return sorted(f.path for f in found if f.type == pafs.FileType.File and f.path.endswith(suffix))


def of_each_file(look: Callable[[str], Found], paths: Sequence[str]) -> Iterator[Found]:
    """What is found in each file, in their order, looked at side by side.

    A run has a file for each block, hundreds of thousands perhaps, and an object store answers for each after tens of
    milliseconds.
    """
    with ThreadPoolExecutor(_FILES_AT_A_TIME) as pool:
        for start in range(0, len(paths), _FILES_AT_A_TIME):
            yield from pool.map(look, paths[start : start + _FILES_AT_A_TIME])


def local_path(uri: str | os.PathLike[str]) -> Path | None:
    """The local path behind a URI, or None when it lies on another filesystem."""
    fs, path = open_filesystem(uri)
    return Path(path) if isinstance(fs, pafs.LocalFileSystem) else None


def digest(uri: str | os.PathLike[str], suffix: str = "") -> str:
    """16 hex digits that change with a file's bytes, or with the names and bytes of a folder's files that end so."""
    fs, path = open_filesystem(uri)
    digest = hashlib.sha256()
    for file in list_files(uri, suffix) if is_directory(uri) else [path]:
        if file != path:
            name = file.removeprefix(path.rstrip("/"))
            digest.update(f"{name}\0{fs.get_file_info(file).size}\0".encode())
        with fs.open_input_stream(file, compression=None) as stream:
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()[:16]


class NewFile:
    """A file that is being written."""

    def __init__(self, stream: pa.NativeFile, uri: str | os.PathLike[str]) -> None:
        self._stream, self._uri = stream, uri

    def write(self, data: bytes) -> None:
        """Append bytes; where that fails, `RunError` names the file."""
        with writing(self._uri):
            self._stream.write(data)


@contextmanager
def new_file(uri: str | os.PathLike[str]) -> Iterator[NewFile]:
    """A stream that becomes the file when it is whole; after an exception there is no torn one.

    A name that ends in a compression's suffix (`.gz`) is compressed so.

    Raises:
        RunError: it can't be written, or another process is writing it (known of local files only).
    """
    fs, path = open_filesystem(uri)
    with writing(uri):
        fs.create_dir(posixpath.dirname(path), recursive=True)
    # The suffix stays last, for it tells the compression.
    partial = posixpath.join(posixpath.dirname(path), ".partial-" + posixpath.basename(path))
    with _held(fs, partial):
        try:
            with writing(uri):
                stream = fs.open_output_stream(partial)
            # What else fails inside the caller's block, reading perhaps, is no failure to write.
            try:
                yield NewFile(stream, uri)
            finally:
                with writing(uri):
                    stream.close()
            with writing(uri):
                move(fs, partial, path)
        except BaseException:
            if fs.get_file_info(partial).type == pafs.FileType.File:
                fs.delete_file(partial)
            raise


@contextmanager
def _held(fs: pafs.FileSystem, path: str) -> Iterator[None]:
    """Hold a local file for this process, which may die with it: what two wrote at once would be a mixture."""
    if not isinstance(fs, pafs.LocalFileSystem):
        yield
        return
    with ExitStack() as held:
        with writing(path):
            file = held.enter_context(open(path, "ab"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{path}: another process is writing this file: let it end") from None
        yield


def move(fs: pafs.FileSystem, source: str, target: str) -> None:
    """Give a file another path inside its filesystem."""
    if fs.type_name != "s3":
        fs.move(source, target)
        return
    # There pyarrow asks for a copy in one request, which S3 refuses for more than 5 GiB.
    try:
        with (
            fs.open_input_stream(source, compression=None) as reader,
            fs.open_output_stream(target, compression=None) as writer,
        ):
            while block := reader.read(_COPIED_BYTES):
                writer.write(block)
    except BaseException:
        # Closing the stream has made a file of what was copied.
        if fs.get_file_info(target).type == pafs.FileType.File:
            fs.delete_file(target)
        raise
    fs.delete_file(source)
