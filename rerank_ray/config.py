"""YAML files and `--set a.b=c` overrides into pydantic models, with every error of a file reported at once."""

from __future__ import annotations

import difflib
import os
import re
import types
import typing
from collections.abc import Hashable, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rerank_ray import storage
from rerank_ray.errors import ConfigError


class Settings(BaseModel):
    """Base of every config model: unknown keys are errors, values are fixed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _given_in_part(cls, content: Any) -> Any:
        """A group of settings that is given in part keeps the rest of its default here, and not its class's."""
        if not isinstance(content, dict):
            return content
        defaults = {n: f.default for n, f in cls.model_fields.items() if isinstance(f.default, Settings)}
        given = {name: content[name] for name in defaults if isinstance(content.get(name), dict)}
        return content | {name: defaults[name].model_dump(exclude_unset=True) | value for name, value in given.items()}


S = TypeVar("S", bound=Settings)
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


def refuse_idle(settings: S, option: str, field: str, value: str) -> S:
    """Refuse an option that was changed although, with this value of another field, nothing reads it."""
    if getattr(settings, field) == value and getattr(settings, option) != type(settings).model_fields[option].default:
        raise ValueError(f"{option} changes nothing with {field} {value}: leave it out, or change {field}")
    return settings


def load(model: type[S], path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> S:
    """Read a YAML file, apply `a.b=c` overrides (values are YAML) and validate it.

    Raises:
        ConfigError: listing every fault with its path in the file.
    """
    unset: dict[str, str] = {}
    content = expand(apply_overrides(read_yaml(path), overrides), unset)
    return validate(model, content, os.fspath(path), unset)


_VARIABLE = re.compile(r"\$\{(\w+)\}")


def expand(value: Any, unset: dict[str, str], path: str = "") -> Any:
    """Replace `${NAME}` in every string by the environment variable of that name.

    A string with a variable that is not set stays as it is, and its fault is added to `unset` by its path in the file.
    """
    if isinstance(value, dict):
        return {k: expand(v, unset, f"{path}.{k}".removeprefix(".")) for k, v in value.items()}
    if isinstance(value, list):
        return [expand(v, unset, f"{path}.{i}") for i, v in enumerate(value)]
    if not isinstance(value, str):
        return value
    missing = [name for name in dict.fromkeys(_VARIABLE.findall(value)) if name not in os.environ]
    if missing:
        which = f"variable {missing[0]} is" if len(missing) == 1 else f"variables {', '.join(missing)} are"
        unset[path] = f"the environment {which} not set (given: {value!r})"
        return value
    return _VARIABLE.sub(lambda match: os.environ[match[1]], value)


def read_yaml(path: str | os.PathLike[str]) -> dict:
    """Read a YAML mapping; repeated keys are errors because YAML would silently keep the last one."""
    source = os.fspath(path)
    if not storage.exists(path):
        raise ConfigError(f"{source}: no such config file")
    if storage.is_directory(path):
        raise ConfigError(f"{source}: is a folder, not a config file")
    try:
        content = yaml.load(storage.read_text(path), Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: not UTF-8 text: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{source}: a config is a YAML mapping of keys to values, not {type(content).__name__}")
    return content


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice."""


def _mapping_without_repeats(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict:
    seen = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            raise yaml.constructor.ConstructorError(
                None, None, f"{key!r} can't be a key; text in braces needs quotes", problem_mark=key_node.start_mark
            )
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key!r} is given twice", problem_mark=key_node.start_mark
            )
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_repeats)


def apply_overrides(content: dict, overrides: Sequence[str]) -> dict:
    """Return `content` with each `a.b=c` applied; list items are addressed by number (`steps.0.depth=50`)."""
    result = _copy(content)
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals or not dotted:
            raise ConfigError(f"--set {override}: expected KEY=VALUE, for example --set seed=1")
        try:
            value = yaml.load(text, Loader=_StrictLoader)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {override}: the value is not valid YAML: {error}") from error
        _set(result, dotted.split("."), value, override)
    return result


def _copy(value: Any) -> Any:
    """A deep copy, in which what an alias repeats is apart."""
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_copy(v) for v in value]
    return value


def _set(target: Any, keys: list[str], value: Any, override: str) -> None:
    *parents, last = keys
    for key in parents:
        if isinstance(target, list):
            target = target[_index(key, target, override)]
        else:
            if target.get(key) is None:
                target[key] = {}
            target = target[key]
        if not isinstance(target, dict | list):
            raise ConfigError(f"--set {override}: {key!r} holds a single value, so nothing can be set inside it")
    if isinstance(target, list):
        target[_index(last, target, override)] = value
    else:
        target[last] = value


def _index(key: str, items: list, override: str) -> int:
    if not key.isdecimal() or int(key) >= len(items):
        raise ConfigError(f"--set {override}: {key!r} is not an item number below {len(items)}")
    return int(key)


def validate(model: type[S], content: dict, source: str, unset: Mapping[str, str] = MappingProxyType({})) -> S:
    """Validate a mapping; `source` names it in errors, which also tell the faults in `unset` that `expand` found.

    Raises:
        ConfigError: listing every fault with its path in the mapping.
    """
    faults = [f"{path}: {fault}" for path, fault in unset.items()]
    try:
        settings = model.model_validate(content)
    except ValidationError as error:
        for fault in error.errors():
            keys, parent = _walk(model, fault["loc"])
            # What else is wrong with a value that lacks a variable can't be said.
            if ".".join(keys) not in unset:
                faults.append(_describe(fault, keys, parent))
    if faults:
        count = "1 error" if len(faults) == 1 else f"{len(faults)} errors"
        raise ConfigError(f"{source}: {count}\n" + "\n".join(f"  {fault}" for fault in faults))
    return settings


def _describe(fault: dict, keys: list[str], parent: type[BaseModel] | None) -> str:
    path = ".".join(keys) or "(top level)"
    if fault["type"] == "extra_forbidden":
        known = sorted(parent.model_fields) if parent else []
        near = difflib.get_close_matches(keys[-1], known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"
        return f"{path}: unknown key; {hint}"
    if fault["type"] == "missing":
        return f"{path}: required, and missing"
    if fault["type"] == "union_tag_not_found":
        return f"{path}: needs {fault['ctx']['discriminator']}: to say which kind it is"
    message = fault["msg"].removeprefix("Value error, ")
    given = fault.get("input")
    return f"{path}: {message}" + (f" (given: {given!r})" if not isinstance(given, dict | list) else "")


def _walk(model: type[BaseModel], loc: tuple) -> tuple[list[str], type[BaseModel] | None]:
    """Follow an error location, leaving out the union tags that pydantic inserts; also return the model it ends in."""
    keys: list[str] = []
    annotation: Any = model
    parent: type[BaseModel] | None = None
    for step in loc:
        candidates = _models_in(annotation)
        tagged = [m for m in candidates if step in _tags(m)]
        if tagged and not any(step in m.model_fields for m in candidates):
            annotation = tagged[0]
            continue
        keys.append(str(step))
        owner = next((m for m in candidates if step in m.model_fields), None)
        if owner is not None:
            parent, annotation = owner, owner.model_fields[step].annotation
        elif isinstance(step, str):
            parent = candidates[0] if len(candidates) == 1 else parent
    return keys, parent


def _tags(model: type[BaseModel]) -> set[str]:
    """The values of the model's one-value Literal fields: what a discriminated union tells it by."""
    annotations = [field.annotation for field in model.model_fields.values()]
    literals = [typing.get_args(a) for a in annotations if typing.get_origin(a) is typing.Literal]
    return {values[0] for values in literals if len(values) == 1}


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The config models an annotation can hold, through unions, lists, dicts and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    origin = typing.get_origin(annotation)
    if origin in (typing.Annotated, typing.Union, types.UnionType, list, tuple, dict):
        return [m for arg in typing.get_args(annotation) for m in _models_in(arg)]
    return []


def dump(settings: Settings) -> str:
    """The resolved config as YAML, defaults included: what `config.yaml` of a run holds."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """One line per key whose value differs between two resolved configs."""
    lines = []
    for key in [*old, *(k for k in new if k not in old)]:
        a, b, path = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, path + ".")
        elif a != b:
            lines.append(f"{path}: {a!r} -> {b!r}")
    return lines
