"""Model references to local files: hub ids with a revision, folders, and installed packages."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.fs

from rerank_ray import storage
from rerank_ray.errors import ModelError
from rerank_ray.settings.models import ModelSettings

PACKAGE_SCHEME = "package://"
_DIGEST_BLOCKS, _DIGEST_BLOCK_BYTES = 256, 16 << 10
_MODULE_CONFIGS = "[0-9]*_*/config.json"
"""What sentence-transformers keeps beside a model: how its states are pooled."""
_HUB_TIMEOUT_S = 10
_MODEL_FILE, _ADAPTER_FILE = "config.json", "adapter_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedModel:
    """Where a model's files lie: `folder`, or a hub id with `revision`; `gguf_file` names a GGUF file inside."""

    source: str
    revision: str | None
    gguf_file: str | None
    identity: str
    """Reference and revision; for local files a digest stands in for the revision."""

    @property
    def pretrained_arguments(self) -> dict:
        """Arguments for every `from_pretrained`."""
        arguments: dict = {"pretrained_model_name_or_path": self.source}
        if self.revision is not None:
            arguments["revision"] = self.revision
        if self.gguf_file is not None:
            arguments["gguf_file"] = self.gguf_file
        return arguments

    @property
    def folder(self) -> Path | None:
        """The local folder, or None for a hub id."""
        path = Path(self.source)
        return path if path.is_dir() else None

    @property
    def adapter_file(self) -> Path | None:
        """Of a local folder that holds adapters alone, and not the model that they are for: what names that model."""
        file = None if self.folder is None else self.folder / _ADAPTER_FILE
        return file if file is not None and file.exists() else None


def resolve(settings: ModelSettings) -> ResolvedModel:
    """Find what `path` and `revision` mean, without loading weights or asking a hub.

    A folder behind a URI (a student in a run folder) is copied into this machine's cache first.

    Raises:
        ModelError: nothing is there, or it holds no weights that may be loaded.
    """
    resolved = _resolve(settings.path, settings.revision, settings, _MODEL_FILE)
    if resolved.adapter_file is None:
        return resolved
    # Other weights below the same adapters are another model.
    return replace(resolved, identity=f"{resolved.identity} on {resolve(base_settings(settings, resolved)).identity}")


def base_settings(settings: ModelSettings, adapters: ResolvedModel) -> ModelSettings:
    """The settings of the model that a folder of adapters alone is for."""
    config = json.loads(adapters.adapter_file.read_text(encoding="utf-8"))
    return settings.model_copy(update={"path": config["base_model_name_or_path"], "revision": config.get("revision")})


def resolve_adapter(settings: ModelSettings) -> ResolvedModel | None:
    """The same for the LoRA adapter that `adapter` names, if it names one."""
    adapter = getattr(settings, "adapter", None)
    return None if adapter is None else _resolve(adapter, None, settings, _ADAPTER_FILE)


def ask_hub(resolved: ResolvedModel) -> ResolvedModel:
    """What was resolved, unless a hub that is in reach doesn't have it: a job's workers would find that out late.

    Workers may reach a hub, or hold models, that this machine doesn't: without an answer there is a warning alone.

    Raises:
        ModelError: nothing is there, neither here nor on the hub.
    """
    if resolved.folder is not None:
        return resolved
    # Most models are local; this import takes a tenth of a second.
    from httpx2 import TransportError
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    name, revision = resolved.source, resolved.revision
    try:
        files = [resolved.gguf_file] if resolved.gguf_file else [_MODEL_FILE, _ADAPTER_FILE]
        if not any(isinstance(try_to_load_from_cache(name, f, revision=revision), str) for f in files):
            HfApi().model_info(name, revision=revision, timeout=_HUB_TIMEOUT_S)
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{name}: is no folder or file here, and no model on the hub ({reason}): check the path or, for a hub "
            "model, its id, revision and your access to it"
        ) from error
    except (OSError, TransportError) as error:
        warnings.warn(
            f"{name}: is no folder or file here, and the hub can't be asked ({error}). The job's workers will look for "
            "it: if it was to be a path, stop the job and mend it",
            stacklevel=2,
        )
    return resolved


def _resolve(reference: str, revision: str | None, settings: ModelSettings, config_file: str) -> ResolvedModel:
    if reference.startswith(PACKAGE_SCHEME):
        path, version = _in_package(reference)
        _refuse_revision(reference, revision)
        return _local(path, f"{reference}@{version}", settings, config_file)
    if "://" in reference:
        path = storage.local_path(reference) or _fetch(reference)
    else:
        path = Path(reference).expanduser()
    if path.exists():
        _refuse_revision(reference, revision)
        return _local(path, f"{reference}@{_digest(path)}", settings, config_file)
    if _looks_like_a_path(reference) or (reference.endswith(".gguf") and path.parent.is_dir()):
        raise ModelError(f"{reference}: no such model folder or file")
    identity, gguf_file = f"{reference}@{revision or 'main'}", None
    if reference.endswith(".gguf"):
        reference, _, gguf_file = reference.rpartition("/")
    return ResolvedModel(source=reference, revision=revision, gguf_file=gguf_file, identity=identity)


def _looks_like_a_path(reference: str) -> bool:
    """Hub ids are `name` or `org/name`, and a GGUF file's name may follow; anything else can only be a path."""
    slashes = reference.count("/")
    only_here = slashes == 0 if reference.endswith(".gguf") else slashes > 1
    return only_here or reference.startswith((".", "/", "~"))


def _refuse_revision(reference: str, revision: str | None) -> None:
    if revision is not None:
        raise ModelError(f"{reference}: 'revision' ({revision}) only applies to hub models; remove it")


def _fetch(uri: str) -> Path:
    """Copy a model folder from another filesystem into this machine's cache, once for each content.

    A student that one step wrote to the run folder is the model of a later step, on whatever node that one runs.
    """
    fs, inner = storage.open_filesystem(uri)
    everything = pyarrow.fs.FileSelector(inner, recursive=True, allow_not_found=True)
    files = [f for f in fs.get_file_info(everything) if f.is_file]
    if not files:
        raise ModelError(f"{uri}: no such model folder")
    listing = "".join(sorted(f"{f.path}:{f.size}:{f.mtime_ns}\n" for f in files))
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rerank-ray" / "models"
    target = cache / hashlib.sha256(listing.encode()).hexdigest()[:16]
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial = tempfile.mkdtemp(dir=cache)
        pyarrow.fs.copy_files(inner, partial, source_filesystem=fs, destination_filesystem=pyarrow.fs.LocalFileSystem())
        try:
            os.rename(partial, target)
        except OSError:
            # Another process of this machine was faster; its copy is the same.
            shutil.rmtree(partial)
    return target


def _in_package(reference: str) -> tuple[Path, str]:
    name, _, inner = reference.removeprefix(PACKAGE_SCHEME).partition("/")
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # the parent of a dotted name is missing; no name at all
        spec = None
    if spec is None or not spec.submodule_search_locations:
        distribution = name.replace("_", "-")
        raise ModelError(f"{reference}: Python package '{name}' is not installed; try `pip install {distribution}`")
    path = Path(next(iter(spec.submodule_search_locations))) / inner
    if not path.exists():
        raise ModelError(f"{reference}: package '{name}' holds no '{inner}'")
    return path, _version(name)


def _version(package: str) -> str:
    """Of the distribution that holds a package: mostly the one of its name, else all are searched, for a second."""
    try:
        named = importlib.metadata.distribution(package)
        if any(file.parts[0] == package for file in named.files or ()):
            return named.version
    except importlib.metadata.PackageNotFoundError:
        pass
    distributions = importlib.metadata.packages_distributions().get(package, [])
    return importlib.metadata.version(distributions[0]) if distributions else "unknown"


def _local(path: Path, identity: str, settings: ModelSettings, config_file: str) -> ResolvedModel:
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{path}: a model is a folder or a .gguf file")
        return ResolvedModel(source=str(path.parent), revision=None, gguf_file=path.name, identity=identity)
    if not (path / config_file).exists():
        kind = "a model folder in transformers'" if config_file == _MODEL_FILE else "a LoRA adapter in PEFT's"
        raise ModelError(f"{path}: holds no {config_file}: not {kind} layout")
    if not any(path.glob("*.safetensors")):
        if not any(path.glob("*.bin")):
            raise ModelError(f"{path}: holds no weights (*.safetensors)")
        if not settings.allow_pickle:
            raise ModelError(
                f"{path}: holds only pickled weights (*.bin), which run code of whoever made them; convert them to "
                "safetensors, or set allow_pickle: true if you trust their source"
            )
    return ResolvedModel(source=str(path), revision=None, gguf_file=None, identity=identity)


def _digest(path: Path) -> str:
    """A short digest of a model's files: names, sizes, and 256 blocks of each, evenly spread.

    Training changes every tensor or a few in each layer, and so some of the blocks; reading all of a large model would
    take longer than loading it.
    """
    digest = hashlib.sha256()
    root, files = path.parent, [path]
    if path.is_dir():
        root, files = path, sorted(f for f in (*path.iterdir(), *path.glob(_MODULE_CONFIGS)) if f.is_file())
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(root).as_posix()}:{size}:".encode())
        with file.open("rb") as stream:
            for start in range(0, size, max(_DIGEST_BLOCK_BYTES, size // _DIGEST_BLOCKS)):
                stream.seek(start)
                digest.update(stream.read(_DIGEST_BLOCK_BYTES))
    return digest.hexdigest()[:12]
