"""A run is a folder: resolved config, state and counts, data, checkpoints. Started again, it resumes or refuses."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import posixpath
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version

import yaml
from pydantic import ValidationError

from rerank_ray import storage
from rerank_ray.config import Settings, differences, dump
from rerank_ray.errors import InputError, RunError

CONFIG, STATE = "config.yaml", "run.json"
_VERSIONS = ("rerank_ray", "ray", "torch", "transformers", "pyarrow", "numpy")
INGEST_SUMMARY = "ingest.json"
INGEST_UNFINISHED = '{"state": "unfinished"}\n'
"""What the summary is until its ingest has ended."""
_CHANGEABLE = (
    "execution",
    "limits",
    "log_every_steps",
    "store",
    "trec_run",
    # How a training's step is cut up, or a run that is out of memory could not go on.
    "backward",
    "policy.gradient_checkpointing",
    "student.gradient_checkpointing",
    "tokens_per_backward",
    "tokens_per_micro_batch",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFolder:
    """Paths of a run and access to its `run.json`."""

    uri: str

    @property
    def data(self) -> str:
        return storage.join(self.uri, "data")

    @property
    def checkpoint(self) -> str:
        return storage.join(self.uri, "checkpoint")

    @property
    def student(self) -> str:
        return storage.join(self.uri, "student")

    def path(self, *parts: str) -> str:
        return storage.join(self.uri, *parts)

    def state(self) -> dict:
        """The content of run.json; empty before the first start.

        Raises:
            RunError: it is damaged.
        """
        path = self.path(STATE)
        if not storage.exists(path):
            return {}
        try:
            return json.loads(storage.read_text(path))
        except ValueError as error:
            raise RunError(f"{path}: is damaged ({error}): put back a copy of it, or use another folder") from error

    def update(self, **fields) -> None:
        """Write fields into run.json; a reader sees the old content or the new."""
        content = self.state() | fields | {"updated": _now()}
        storage.write_text(self.path(STATE), json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def start(self, kind: str, settings: Settings, inputs: dict[str, str], fixed: Sequence[str] = ()) -> dict:
        """Create the run or check that it may be resumed; returns its state before this start.

        `execution`, `limits`, `store`, `trec_run` and what a training's memory depends on may change between starts,
        and `changes` in the state says what did; what changes a row may not.

        Args:
            kind: the job's name.
            inputs: fingerprint of each input.
            fixed: fields of `execution` that may not change either.

        Raises:
            RunError: the folder belongs to another job, config or input; the message prints the difference.
        """
        before = self.state()
        if not before:
            if storage.list_files(self.data, ".parquet"):
                raise RunError(f"{self.data}: holds data but {self.path(STATE)} is missing: use another folder")
            _, folder = storage.open_filesystem(self.uri)
            if any(posixpath.dirname(path) == folder for path in storage.list_files(self.uri, ".parquet")):
                raise RunError(f"{self.uri}: holds Parquet, which a run would hide: use another folder")
        else:
            self.check_same(kind, settings, inputs, fixed)
            if changed := differences(self._noted_config(type(settings)), yaml.safe_load(dump(settings))):
                self.update(changes=[*before.get("changes", []), {"start": before["starts"] + 1, "config": changed}])
        storage.write_text(self.path(CONFIG), dump(settings))
        if before.get("state") != "done":
            self.update(
                kind=kind,
                state="running",
                inputs=inputs,
                started=before.get("started") or _now(),
                starts=before.get("starts", 0) + 1,
                seed=getattr(settings, "seed", None),
                versions={name: version(name) for name in _VERSIONS} | {"python": platform.python_version()},
            )
        return before

    def check_same(self, kind: str, settings: Settings, inputs: dict[str, str], fixed: Sequence[str] = ()) -> None:
        """Raise `RunError`, as `start` does, unless a run that was started before may be resumed with these."""
        before = self.state()
        if before["kind"] != kind:
            raise RunError(f"{self.uri}: is a {before['kind']} run, not {kind}: use another folder")
        old, new = self._noted_config(type(settings)), yaml.safe_load(dump(settings))
        kept = {f"execution.{name}" for name in fixed}
        changed = [d for d in differences(old, new) if (path := d.split(":")[0]) in kept or not _may_change(path)]
        # A run of an earlier version noted fewer of them, and what a finished ingest read may be gone.
        noted = {name: digest for name, digest in before["inputs"].items() if name in inputs}
        changed += [f"content of input {d}" for d in differences(noted, {name: inputs[name] for name in noted})]
        if changed:
            lines = "\n".join(f"  {line}" for line in changed)
            raise RunError(
                f"{self.uri}: this run was started with another config or input; resuming would mix the two:\n{lines}\n"
                f"{self._way_out()}"
            )

    def _way_out(self) -> str:
        """What to do about a run that another config or input was started with: one that failed before it made
        anything, as a wrong path lets it, is in nobody's way."""
        _, folder = storage.open_filesystem(self.uri)
        if any(posixpath.dirname(path) != folder for path in storage.list_files(self.uri, "")):
            return "Put it back, or use another folder."
        return "Put it back, use another folder, or delete this one: nothing is finished in it."

    def _noted_config(self, kind: type[Settings]) -> dict:
        """The config that the run was started with. A setting that its version did not have is there with its default,
        which is what that version did; where it had one that is gone, the config is as it was noted."""
        noted = yaml.safe_load(storage.read_text(self.path(CONFIG)))
        try:
            return yaml.safe_load(dump(kind.model_validate(noted)))
        except ValidationError:
            return noted

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process, so that two schedulers can't write it at once.

        The lock is the operating system's and dies with the process. On filesystems other than the local one there is
        none to hold: the scheduler must not overlap jobs there.
        """
        folder = storage.local_path(self.uri)
        if folder is None:
            yield
            return
        with storage.writing(self.uri):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError) as error:
                raise RunError(
                    f"{self.uri}: is or lies below a file, and a run is a folder: use another path"
                ) from error
            # Without a buffer, which closing the file would try to write once more.
            file = (folder / "lock").open("ab+", buffering=0)
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().decode().strip()
                raise RunError(f"{self.uri}: another process is at it ({holder}): let it end") from None
            except OSError as error:
                raise RunError(
                    f"{self.uri}: this filesystem has no locks ({error}), and two jobs could write the run at once: "
                    "mount it with them (Lustre: -o flock; NFS: its lock service), or use another folder"
                ) from error
            with storage.writing(self.uri):
                file.truncate(0)
                file.write(f"pid {os.getpid()} on {platform.node()} since {_now()}\n".encode())
            yield


def _may_change(path: str) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in _CHANGEABLE)


def check_ray_reads_below(uri: str) -> None:
    """Ray takes what is behind a question mark for no part of a file's name, and a folder `query_id=…` for that column,
    in a run's checkpoint too.

    Raises:
        InputError: the folder, or one above it, has such a name.
    """
    _, path = storage.open_filesystem(uri)
    if "?" in path or "query_id=" in path:
        raise InputError(f"{uri}: Ray can't read files below a folder with '?' or 'query_id=' in its name: rename it")


def resolve_input(uri: str) -> str:
    """A run folder stands for its data; anything else for itself.

    Raises:
        RunError: the run, or the ingest, is not finished, so its data is not all there.
    """
    if not storage.is_directory(uri):
        return uri
    run = RunFolder(uri=uri)
    state = run.state()
    if not state:
        if not ingest_ended(uri):
            raise RunError(f"{uri}: this ingest did not end: start it again before using its output")
        return uri
    if state["state"] != "done":
        raise RunError(f"{uri}: this {state['kind']} run is {state['state']}: start it again before using its output")
    return run.data


def ingest_ended(folder: str) -> bool:
    """Whether an ingest into a folder came to its end; true where none was begun."""
    summary = storage.join(folder, INGEST_SUMMARY)
    return not storage.exists(summary) or storage.read_text(summary) != INGEST_UNFINISHED


def resolve_ended(uri: str) -> str:
    """As `resolve_input`, and of a run that failed for its errors or defects too: for looking at what it wrote."""
    run = RunFolder(uri=uri)
    ended = storage.is_directory(uri) and run.state().get("state") == "failed"
    return run.data if ended else resolve_input(uri)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
