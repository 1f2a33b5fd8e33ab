"""A small real retrieval collection from the documentation of the Python installation it runs on.

Known-item search: the first sentence of a docstring is the query, the rest of that docstring the one document to find.
Nothing is downloaded or imported, and no data file is shipped. The same installation and seed give the same
collection; another version of Python or of a package gives a slightly different one.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from joblib import cpu_count

from rerank_ray import storage
from rerank_ray.errors import InputError
from rerank_ray.quickstart.docstrings import PACKAGES, Docstring, SourceFile, read_docstrings, source_files, stable_hash

_FILES_AT_A_TIME = 64
_SHINGLE = 3
_SKETCH = 48
_BANDS = 8
_SIMILAR = 0.4
_TOKEN = re.compile(r"\w+")
_NOT_A_SENTENCE = re.compile(
    r"[{}<>=|~\\]|::|->|--|https?:|\w\(\w*,|\.py\b|@|"
    r"^(deprecated|todo|note|warning|alias|see|internal|private|created|copyright|return type|this is a)\b|"
    r"\b(boilerplate|auto-?generated|overridden|overrides|docstring|deprecated|superclass|base class)\b",
    re.IGNORECASE,
)


def build_collection(
    out: Path,
    *,
    documents: int = 6000,
    train_queries: int = 200,
    test_queries: int = 100,
    seed: int = 0,
    packages: Sequence[str] = PACKAGES,
    files_per_package: int = 250,
) -> int:
    """Write a BEIR folder: `corpus.jsonl`, `queries.jsonl`, `qrels/train.tsv`, `qrels/test.tsv` (gain 1).

    At most `documents` documents, chosen by hash, and as evenly over packages as these allow. Near-duplicate
    documents are dropped, summaries that two docstrings share become no query, and the queries of one module are all
    in train or all in test, so that what was seen in training says little about the test.

    Returns:
        How many documents were written; there are as many queries as were asked for.

    Raises:
        InputError: the installation's documentation is too small for that many queries.
    """
    files = source_files(packages, files_per_package=files_per_package)
    found: dict[str, tuple[str, Docstring]] = {}
    for file, docstrings in zip(files, _read_all(files), strict=True):
        for docstring in docstrings:
            found.setdefault(docstring.name, (file.package, docstring))
    shared = Counter(_normalised(d.summary) for _, d in found.values())
    usable = [(package, d) for package, d in found.values() if is_document(d)]
    usable.sort(key=lambda item: stable_hash(f"{seed}/{item[1].name}"))
    kept = set(distinct([d.rest for _, d in usable]))
    corpus = _evenly([item for i, item in enumerate(usable) if i in kept], documents)

    queries: dict[str, list[Docstring]] = {"train": [], "test": []}
    room = {"train": train_queries, "test": test_queries}
    test_share = test_queries / max(1, train_queries + test_queries)
    for _, docstring in corpus:
        if shared[_normalised(docstring.summary)] > 1 or not is_query(docstring):
            continue
        split = "test" if stable_hash(f"{seed}/split/{docstring.module}") / 2**64 < test_share else "train"
        if len(queries[split]) < room[split]:
            queries[split].append(docstring)
    for split, wanted in room.items():
        if len(queries[split]) < wanted:
            raise InputError(
                f"the documentation of this Python installation gives {len(queries[split])} {split} queries, not "
                f"{wanted}: ask for fewer, or read more files per package"
            )
    _write(Path(out), corpus, queries)
    return len(corpus)


def _read_all(files: Sequence[SourceFile]) -> Iterator[list[Docstring]]:
    """Each file's docstrings; parsing is divided among the machine's cores."""
    with ProcessPoolExecutor(cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_docstrings_of, files, chunksize=_FILES_AT_A_TIME)


def _docstrings_of(file: SourceFile) -> list[Docstring]:
    """None of a file that this Python can't parse: a template, or another version's syntax."""
    try:
        return read_docstrings(file)
    except (SyntaxError, ValueError, RecursionError):
        return []


def is_document(docstring: Docstring) -> bool:
    """Enough running text to be found by: 25 words, 20 of them outside lists of arguments and examples.

    Templates that code fills in later, and documents that only point to another, are left out.
    """
    rest = docstring.rest
    refers = rest.startswith(("Refer to", "See ", "Same as", "For more ", "Please see", "Please refer"))
    is_template = any(mark in rest for mark in ("{{", "%(", "@@"))
    return len(rest.split()) >= 25 and docstring.prose_words >= 20 and not refers and not is_template


def is_query(docstring: Docstring) -> bool:
    """A sentence of 4 to 25 words that reads as a question to a search engine and does not stand in its document."""
    words = docstring.summary.split()
    if not 4 <= len(words) <= 25 or _NOT_A_SENTENCE.search(docstring.summary):
        return False
    plain = sum(word.strip(",.;()'\"").isalpha() and not any(c.isupper() for c in word[1:]) for word in words)
    return plain >= 0.75 * len(words) and _normalised(docstring.summary) not in _normalised(docstring.rest)


def _normalised(text: str) -> str:
    return " ".join(_TOKEN.findall(text.lower()))


def distinct(texts: Sequence[str]) -> list[int]:
    """Indices of the texts without those that nearly repeat an earlier one.

    Each text is sketched by the 48 smallest hashes of its word triples (bottom-k MinHash, Broder 1997); texts that
    share one of the 8 smallest are compared, and from an estimated Jaccard similarity of 0.4 on the later one goes.
    """
    kept: list[int] = []
    sketches: dict[int, list[int]] = {}
    buckets: dict[int, list[int]] = defaultdict(list)
    for i, text in enumerate(texts):
        sketch = _sketch(text)
        neighbours = {j for h in sketch[:_BANDS] for j in buckets[h]}
        if any(_similarity(sketch, sketches[j]) >= _SIMILAR for j in neighbours):
            continue
        kept.append(i)
        sketches[i] = sketch
        for h in sketch[:_BANDS]:
            buckets[h].append(i)
    return kept


def _sketch(text: str) -> list[int]:
    tokens = _TOKEN.findall(text.lower())
    triples = zip(*(tokens[offset:] for offset in range(_SHINGLE)), strict=False)
    return sorted({zlib.crc32(" ".join(t).encode("utf-8", "surrogatepass")) for t in triples})[:_SKETCH]


def _similarity(a: Sequence[int], b: Sequence[int]) -> float:
    """Jaccard similarity estimated from two sketches: the share of their union's smallest hashes that both hold."""
    both = set(a).intersection(b)
    if len(both) < _SIMILAR * max(len(a), len(b)):
        return 0.0
    smallest = sorted(set(a).union(b))[:_SKETCH]
    return len(both.intersection(smallest)) / max(1, len(smallest))


def _evenly(items: Sequence[tuple[str, Docstring]], limit: int) -> list[tuple[str, Docstring]]:
    """The first `limit` items in their order, the largest packages cut to one common size first."""
    sizes = sorted(Counter(package for package, _ in items).values())
    left, cap = limit, 0
    for i, size in enumerate(sizes):
        cap = left // (len(sizes) - i)
        left -= min(size, cap)
    taken: Counter[str] = Counter()
    chosen = []
    for package, docstring in items:
        if taken[package] < cap:
            taken[package] += 1
            chosen.append((package, docstring))
    return chosen[:limit]


def _write(out: Path, corpus: Sequence[tuple[str, Docstring]], queries: dict[str, list[Docstring]]) -> None:
    """Write the folder's files; `qrels/test.tsv`, by which a finished folder is known, comes last."""
    documents = ({"_id": d.name, "title": "", "text": d.rest} for _, d in corpus)
    storage.write_text(out / "corpus.jsonl", _json_lines(documents))
    numbered = {split: [(f"{split}-{n:04d}", d) for n, d in enumerate(of, start=1)] for split, of in queries.items()}
    lines = ({"_id": query_id, "text": d.summary} for of in numbered.values() for query_id, d in of)
    storage.write_text(out / "queries.jsonl", _json_lines(lines))
    for split, of in numbered.items():
        rows = ["query-id\tcorpus-id\tscore", *(f"{query_id}\t{d.name}\t1" for query_id, d in of)]
        storage.write_text(out / "qrels" / f"{split}.tsv", "\n".join(rows) + "\n")


def _json_lines(items: Iterable[dict[str, str]]) -> str:
    return "".join(json.dumps(item, ensure_ascii=True) + "\n" for item in items)
