"""`from_pretrained` with this project's safety rules and errors that name the model."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import transformers
from safetensors import SafetensorError
from transformers.utils import cached_file, logging

from rerank_ray.errors import ModelError
from rerank_ray.models.gguf_header import read_once
from rerank_ray.models.resolve import ResolvedModel, base_settings, resolve
from rerank_ray.settings.models import ModelSettings

# Workers load models side by side; their bars would overwrite the job's own progress.
logging.disable_progress_bar()


def load(auto_class, resolved: ResolvedModel, settings: ModelSettings, **arguments):
    """Call `auto_class.from_pretrained`; weights load from safetensors or GGUF unless `allow_pickle` says otherwise.

    Raises:
        ModelError: the model is not there (a hub id that does not exist, or no network), or can't be read.
    """
    if "dtype" in arguments and resolved.gguf_file is None and not settings.allow_pickle:
        arguments["use_safetensors"] = True
    if "dtype" in arguments and resolved.gguf_file is not None and hasattr(transformers, "GgufConfig"):
        # transformers from 5.2x on keeps GGUF weights packed unless told otherwise; dense bfloat16 products are faster.
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        with read_once(resolved.gguf_file):
            return auto_class.from_pretrained(
                **resolved.pretrained_arguments, trust_remote_code=settings.trust_remote_code, **arguments
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if isinstance(error, OSError) and resolved.folder is None:
            raise ModelError(
                f"{settings.path}: is no folder or file here, and {auto_class.__name__} can't load it from the hub "
                f"({reason}): check the path or, for a hub model, its id, revision and the network"
            ) from error
        raise ModelError(f"{settings.path}: {auto_class.__name__} can't load this model: {reason}") from error


def load_adapted(auto_class, resolved: ResolvedModel, settings: ModelSettings, *, unread: str | None = None, **given):
    """As `load`, and every weight is the checkpoint's; where a folder holds adapters alone, the model that they are
    for, with the adapters added to it.

    Args:
        unread: how the names of weights begin that the caller never computes with; the checkpoint may lack these.

    Raises:
        ModelError: the checkpoint lacks a weight, which transformers would make up at random.
    """
    model, missing = load_with_missing(auto_class, resolved, settings, **given)
    missing = {name for name in missing if unread is None or not name.startswith(unread)}
    refuse_random(missing, settings.path, f": it was not saved as a {type(model).__name__}")
    return model


def load_with_missing(auto_class, resolved: ResolvedModel, settings: ModelSettings, **arguments):
    """As `load_adapted`, with the names of the weights that neither checkpoint nor adapters have."""
    if resolved.adapter_file is None:
        model, info = load(auto_class, resolved, settings, output_loading_info=True, **arguments)
        return model, set(info["missing_keys"])
    from rerank_ray.models.student.lora import saved_names, with_adapter

    base = base_settings(settings, resolved)
    model, missing = load_with_missing(auto_class, resolve(base), base, **arguments)
    return with_adapter(model, resolved.folder), missing - saved_names(resolved.folder)


def refuse_random(missing: Collection[str], source: str, reason: str = "") -> None:
    """Raise `ModelError` where a checkpoint has no weights for some parameters: transformers makes them up."""
    if missing:
        first, *others = sorted(missing)
        more = f" and {len(others):,} more" if others else ""
        raise ModelError(f"{source}: the checkpoint has no weights for {first}{more}, which would be random{reason}")


def read_beside(resolved: ResolvedModel, name: str) -> str | None:
    """The text of a further file of a checkpoint, or None when it has no such file."""
    path = cached_file(resolved.source, name, revision=resolved.revision, _raise_exceptions_for_missing_entries=False)
    return None if path is None else Path(path).read_text(encoding="utf-8")
