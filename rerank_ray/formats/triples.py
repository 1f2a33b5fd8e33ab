"""MS MARCO triples: TSV of query, positive and negative, as texts (`triples.train.small.tsv`) or as ids
(`qidpidtriples.train.full.2.tsv`; Bajaj et al. 2016, arXiv:1611.09268).

A query's lines lie anywhere in a file, so lists are gathered in passes over it: each takes the queries of one share of
the ids' hashes, and memory holds that share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rerank_ray.formats.lines import BadLines, Fault, parsed
from rerank_ray.formats.training_data import BYTES_PER_PASS, TrainingList, passes_over, share_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Triples:
    """The triples of one query: passage -> the place (file, line) that first names it, in the files' order."""

    query: str
    positives: dict[str, tuple[str, int]] = field(default_factory=dict)
    negatives: dict[str, tuple[str, int]] = field(default_factory=dict)

    @property
    def place(self) -> tuple[str, int]:
        return next(iter(self.positives.values()))

    def add(self, positive: str, negative: str, place: tuple[str, int], depth: int | None) -> None:
        """Take one line in; beyond `depth` passages no negative is added.

        Raises:
            Fault: a passage is a positive here and a negative there.
        """
        for passage, others in ((positive, self.negatives), (negative, self.positives)):
            if passage in others:
                path, number = others[passage]
                role = "negative" if others is self.negatives else "positive"
                raise Fault(f"passage {passage[:40]!r} is a {role} on line {number} of {path}", "keep one of the two")
        if positive == negative:
            raise Fault(f"passage {positive[:40]!r} is positive and negative", "keep one of the two")
        self.positives.setdefault(positive, place)
        if depth is None or len(self.positives) + len(self.negatives) < depth:
            self.negatives.setdefault(negative, place)


def read_triples(
    paths: Sequence[str],
    bad: BadLines,
    depth: int | None = None,
    *,
    ids: bool = False,
    bytes_per_pass: int = BYTES_PER_PASS,
) -> Iterator[Triples]:
    """Gather the lines of each query; queries come in the order of their first line, pass by pass.

    Args:
        ids: the columns are ids; texts that are nothing but numbers are taken for forgotten ones, and refused.

    Raises:
        InputError: other than three columns, an empty one, or a passage that is positive and negative (bad lines).
    """
    passes = passes_over(paths, bytes_per_pass)
    for number in range(passes):
        gathered: dict[str, Triples] = {}
        for path in paths:
            # The first pass has reported the lines that can't be parsed.
            for line, query, positive, negative in _lines(path, BadLines(skip=True) if number else bad, ids):
                if share_of(query, passes) != number:
                    continue
                try:
                    gathered.setdefault(query, Triples(query=query)).add(positive, negative, (path, line), depth)
                except Fault as fault:
                    bad.report(path, line, fault.reason, fault.fix)
        yield from (triples for triples in gathered.values() if triples.positives)


def _lines(path: str, bad: BadLines, ids: bool) -> Iterator[tuple[int, str, str, str]]:
    def parse(number: int, line: str) -> tuple[int, str, str, str]:
        columns = line.split("\t")
        if len(columns) != 3:
            raise Fault(f"{len(columns)} columns, not 3", "write query, positive and negative between tabs")
        for name, column in zip(("query", "positive", "negative"), columns, strict=True):
            if not column.strip():
                raise Fault(f"the {name} is empty", "give it or leave the line out")
        if not ids and all(column.strip().isdecimal() for column in columns):
            raise Fault("all columns are numbers", "these are ids: give --queries and --corpus, which have their texts")
        return number, *columns

    return parsed(path, bad, parse)


def triples_lines(entry: TrainingList) -> str:
    """Every positive with every negative; tabs and line ends of a text become blanks, for the format has no quotes."""
    return "".join(
        "\t".join(one_line(text) for text in (entry.query.text, positive.contents, negative.contents)) + "\n"
        for positive, _ in entry.positives
        for negative, _ in entry.negatives
    )


def one_line(text: str) -> str:
    """A text as a column can hold it."""
    return " ".join(text.split())
