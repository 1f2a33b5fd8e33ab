"""Docstrings of installed Python code as (summary, rest) pairs, read from source without importing anything."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGES = (
    *("numpy", "scipy", "pandas", "pyarrow", "networkx", "sympy", "matplotlib", "torch", "transformers"),
    *("ray", "pydantic", "huggingface_hub", "fsspec", "rich", "click", "jinja2"),
)
"""Packages that installing this project brings along; one that is absent is left out."""

STANDARD_LIBRARY = "python"

_LARGEST_FILE = 1_000_000
_SKIPPED_FOLDERS = {
    *("site-packages", "dist-packages", "__pycache__", "test", "tests", "testing", "_testing", "turtledemo"),
    *("thirdparty_files", "thirdparty", "third_party", "vendor", "vendored", "_vendor", "_vendored", "_bundled"),
    *("idlelib", "lib2to3", "pydoc_data"),
}
_SENTENCE_END = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!\bvs)(?<!\bcf)(?<!\bal)[.!?](?=\s+[^a-z\s]|$)")
_UNDERLINE = re.compile(r"\s*([-=~^*])\1{2,}\s*")
_ROLE = re.compile(r":[a-z:+-]+:`~?([^`<]*?)(?:\s*<[^`]*>)?`")
_EMPHASIS = re.compile(r"(?<!\w)(\*{1,2})(\w[^*]*)\1(?!\w)")
_DIRECTIVE = re.compile(r"\s*\.\. \S")
_FIELD = re.compile(r"\s*(:(param|type|return|rtype|raises?|arg|keyword|ivar|cvar|var)\b|@param\b)")
_ITEM = re.compile(r"\s*[`*\w.\[\]\"', ]{1,60}(\([^)]*\))?\s?:(\s|$)")
_SECTION = re.compile(
    r"\s*(args?|arguments|parameters|other parameters|params|keyword args|keyword arguments|attributes|returns?|"
    r"yields?|raises?|examples?|example usage|usage|see also|references|methods|inputs?|outputs?|shape|signature|"
    r"properties|kwargs|fields|throws|warns|receives):?:?\s*",
    re.IGNORECASE,
)
_PROSE_SECTION = re.compile(r"\s*(notes?|warnings?|description|details|background|discussion):?:?\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Docstring:
    """One docstring: `summary` is its first sentence, `rest` what follows it, whitespace normalised."""

    name: str
    """Dotted path of what it documents, as in `json.dumps`."""
    module: str
    summary: str
    rest: str
    prose_words: int
    """Words of `rest` outside of lists of arguments, examples and references."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    path: Path
    package: str
    module: str


def source_files(packages: Sequence[str] = PACKAGES, *, files_per_package: int) -> list[SourceFile]:
    """Python files of the standard library and of installed packages, without tests, vendored code and huge files.

    Of each package at most `files_per_package`, chosen by a hash of their path inside it: the same installation
    always gives the same files.
    """
    roots = {STANDARD_LIBRARY: Path(sysconfig.get_path("stdlib"))}
    for package in packages:
        # For a name without dots this only looks for the package, it does not run it.
        spec = importlib.util.find_spec(package)
        if spec and spec.submodule_search_locations:
            roots[package] = Path(next(iter(spec.submodule_search_locations)))
    chosen = []
    for package, root in roots.items():
        files = sorted(_walk(root), key=lambda path: stable_hash(f"{package}/{path.as_posix()}"))
        for relative in files[:files_per_package]:
            parts = relative.with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            prefix = () if package == STANDARD_LIBRARY else (package,)
            module = ".".join((*prefix, *parts))
            chosen.append(SourceFile(path=root / relative, package=package, module=module))
    return chosen


def stable_hash(text: str) -> int:
    """A 64-bit hash that is the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _walk(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in _SKIPPED_FOLDERS and f.isidentifier()]
        for name in files:
            path = Path(folder, name)
            is_test = name.startswith(("test_", "_test")) or name == "conftest.py"
            if name.endswith(".py") and not is_test and path.stat().st_size <= _LARGEST_FILE:
                yield path.relative_to(root)


def read_docstrings(file: SourceFile) -> list[Docstring]:
    """The docstrings of a file's module, classes, functions and methods with public names that have a rest.

    Raises:
        SyntaxError, ValueError, RecursionError: the file can't be parsed by this Python.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(file.path.read_bytes())
    found = (split_docstring(text, name, file.module) for name, text in _documented(tree, file.module))
    return [docstring for docstring in found if docstring is not None]


def _documented(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Module) and (text := _raw_docstring(node)):
        yield prefix, text
    for child in node.body:
        if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or child.name.startswith("_"):
            continue
        name = f"{prefix}.{child.name}"
        if text := _raw_docstring(child):
            yield name, text
        if isinstance(child, ast.ClassDef):
            yield from _documented(child, name)


def _raw_docstring(node: ast.AST) -> str | None:
    first = node.body[0] if node.body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return first.value.value
    return None


def split_docstring(text: str, name: str, module: str) -> Docstring | None:
    """Split a docstring into its first sentence and the rest; None when there is no rest.

    The first sentence ends at a full stop or with its paragraph. Heading underlines go, and reStructuredText roles
    become the name they hold.
    """
    lines = [_ROLE.sub(r"\1", line) for line in inspect.cleandoc(text).split("\n")]
    lines = [line for line in lines if not _UNDERLINE.fullmatch(line)]
    end = next((i for i, line in enumerate(lines) if not line.strip()), len(lines))
    paragraph = " ".join(" ".join(lines[:end]).split())
    stop = _SENTENCE_END.search(paragraph)
    cut = stop.end() if stop else len(paragraph)
    rest_lines = [paragraph[cut:], *lines[end:]]
    rest = " ".join(" ".join(rest_lines).split())
    if not rest:
        return None
    summary = _EMPHASIS.sub(r"\2", paragraph[:cut].replace("`", "")).strip(" .:")
    prose_words = sum(len(line.split()) for line in _prose_lines(rest_lines))
    return Docstring(name=name, module=module, summary=summary, rest=rest, prose_words=prose_words)


def _prose_lines(lines: Sequence[str]) -> Iterator[str]:
    """Lines of running text: outside sections of arguments and examples, field lists, directives and doctests."""
    inside = False
    for line in lines:
        if _PROSE_SECTION.fullmatch(line):
            inside = False
        elif _SECTION.fullmatch(line) or _FIELD.match(line) or _DIRECTIVE.match(line):
            inside = True
        elif (
            not inside
            and not line.lstrip().startswith((">>>", "...", "-", "*", "|", "+", "$"))
            and not _ITEM.match(line)
        ):
            yield line
