from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rerank_ray.errors import InputError
from rerank_ray.formats import beir
from rerank_ray.formats.lines import BadLines
from rerank_ray.quickstart.collection import build_collection, distinct, is_document, is_query
from rerank_ray.quickstart.docstrings import Docstring, SourceFile, read_docstrings, source_files, split_docstring

SMALL = {"documents": 150, "train_queries": 20, "test_queries": 10, "packages": ("numpy",), "files_per_package": 40}


def split(text: str) -> Docstring | None:
    return split_docstring(text, "m.f", "m")


def test_first_sentence_and_rest() -> None:
    docstring = split(
        """Read a file with :func:`~m.open`, e.g. *fast*, by M. van der Berg.  It may
        go on.

        Notes
        -----
        Said   here.
        """
    )
    assert docstring.summary == "Read a file with m.open, e.g. fast, by M. van der Berg"
    assert docstring.rest == "It may go on. Notes Said here."


def test_a_first_paragraph_without_full_stop_is_one_sentence() -> None:
    docstring = split("Join the parts\nof a path\n\nMore.")
    assert (docstring.summary, docstring.rest) == ("Join the parts of a path", "More.")
    assert split("Only one line.") is None


def test_prose_words_leave_out_lists_and_examples() -> None:
    """Prose: "Two words." (2) and, after Notes, "three more words." (3)."""
    docstring = split(
        """Sum up.

        Two words.

        Args:
            x (int): one of the numbers
            y: the other

        Examples:
            >>> f(1, 2)

        Notes:
            three more words.
            :param z: not these
        """
    )
    assert docstring.prose_words == 5


@pytest.mark.parametrize(
    ("summary", "good"),
    [
        ("Return the shortest path between two nodes of a graph", True),
        ("Sort the list", False),
        ("Do what the document says here", False),
        ("f(x, y) -> the sum of both numbers", False),
        ("DataFrame ExtensionArray BooleanDtype of a MultiIndex", False),
        ("Deprecated since version three of this library", False),
    ],
)
def test_queries_read_as_sentences(summary: str, good: bool) -> None:
    rest = "It will *do* what the document says: here. " * 5
    assert is_query(Docstring(name="n", module="m", summary=summary, rest=rest, prose_words=40)) is good


def test_documents_need_running_text() -> None:
    words = "word " * 30

    def document(rest: str, prose_words: int) -> bool:
        return is_document(Docstring(name="n", module="m", summary="s", rest=rest, prose_words=prose_words))

    assert document(words, 30)
    assert not document(words, 5)
    assert not document("word " * 24, 24)
    assert not document("Refer to " + words, 30)
    assert not document(words + "{{ arguments }}", 30)


def test_near_duplicates_go_and_the_first_stays() -> None:
    a = [f"word{i}" for i in range(100)]
    b = [*a[:97], "x", "y", "z"]
    other = [f"term{i}" for i in range(100)]
    half = [*a[:50], *other[:50]]
    assert distinct([" ".join(t) for t in (a, b, other, half, a)]) == [0, 2, 3]
    assert distinct(["", "short", "short"]) == [0, 1, 2]


def test_sources_are_read_without_running_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "quickstart_sample"
    (package / "tests").mkdir(parents=True)
    (package / "__init__.py").write_text('"""A package.\n\nRest of it."""\nraise SystemExit\n')
    (package / "broken.py").write_text("def f(:\n")
    (package / "test_it.py").write_text("")
    (package / "tests" / "more.py").write_text("")
    (package / "huge.py").write_text("#" * 1_000_001)
    (package / "code.py").write_text(
        "class C:\n    '''A class.\n\n    Its rest.'''\n    def m(self):\n        '''A method. Its rest.'''\n"
        "    def _hidden(self):\n        '''Not this. One.'''\ndef f():\n    '''No rest.'''\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    files = [
        f for f in source_files(["quickstart_sample", "absent_package"], files_per_package=10) if f.package[0] == "q"
    ]
    assert sorted(f.module for f in files) == [
        "quickstart_sample",
        "quickstart_sample.broken",
        "quickstart_sample.code",
    ]
    assert "quickstart_sample" not in sys.modules
    by_module = {f.module: f for f in files}
    assert [d.name for d in read_docstrings(by_module["quickstart_sample"])] == ["quickstart_sample"]
    names = [d.name for d in read_docstrings(by_module["quickstart_sample.code"])]
    assert names == ["quickstart_sample.code.C", "quickstart_sample.code.C.m"]
    with pytest.raises(SyntaxError):
        read_docstrings(SourceFile(path=package / "broken.py", package="q", module="q.broken"))


def test_collection_is_deterministic_and_its_splits_are_apart(tmp_path: Path) -> None:
    first = build_collection(tmp_path / "a", **SMALL)
    second = build_collection(tmp_path / "b", **SMALL)
    assert first == second
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/train.tsv", "qrels/test.tsv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

    bad = BadLines()
    corpus = {d.doc_id: d.text for d in beir.read_corpus(str(tmp_path / "a" / "corpus.jsonl"), bad)}
    queries = {q.query_id: q.text for q in beir.read_queries(str(tmp_path / "a" / "queries.jsonl"), bad)}
    train, test = (beir.read_qrels(str(tmp_path / "a" / "qrels" / f"{s}.tsv"), bad) for s in ("train", "test"))
    assert (len(corpus), len(train), len(test), len(queries)) == (first, 20, 10, 30)
    assert first <= 150
    for query_id, gains in {**train, **test}.items():
        (doc_id,) = gains
        assert queries[query_id] not in corpus[doc_id]
    answers = [{doc_id for gains in qrels.values() for doc_id in gains} for qrels in (train, test)]
    parents = [{doc_id.rpartition(".")[0] or doc_id for doc_id in side} for side in answers]
    assert not answers[0] & answers[1]
    assert not parents[0] & parents[1]


def test_too_small_an_installation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ask for fewer"):
        build_collection(tmp_path, **{**SMALL, "train_queries": 5000})
