"""Labels to the training data of other projects: `rerank-ray convert`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from rerank_ray import storage
from rerank_ray.errors import ConfigError, InputError
from rerank_ray.formats.flagembedding import flagembedding_line
from rerank_ray.formats.sentence_transformers import labeled_list_line, margin_lines
from rerank_ray.formats.tevatron import tevatron_line
from rerank_ray.formats.training_data import TrainingList, json_line, repeats_gains, split, text_id
from rerank_ray.formats.trec import write_run
from rerank_ray.formats.triples import one_line, triples_lines
from rerank_ray.parquet import check_columns, open_parquet, read_rows, record_of
from rerank_ray.records import Labels, Ranking, Scores, ranking_of
from rerank_ray.runs import resolve_input
from rerank_ray.schema import CANDIDATES, LABELS, candidate_list_from_row, labels_from_row

RUN_FILE, QUERIES_FILE, CORPUS_FILE = "run.trec", "queries.jsonl", "corpus.jsonl"
RANK_DISTILLM = "rank-distillm"
_WITHOUT_POSITIVE = "without a positive"


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How lists become lines of one file, and what they need for that."""

    lines: Callable[[TrainingList, bool], str]
    """From a list, and whether teacher scores are wanted."""
    by_role: bool = True
    """Positives are told from negatives, and a list needs both."""
    targets: tuple[str, ...] = ("teacher", "gains")
    """What its numbers can be; () when it has none."""
    text: Callable[[str], str] = str
    """From a passage's contents to what the format holds of them: passages that it can't tell apart are one."""
    empty_texts: bool = True
    """Whether it can hold a passage without a text."""


FORMATS = {
    "flagembedding": Format(lines=lambda entry, scores: flagembedding_line(entry, scores=scores)),
    "sentence-transformers": Format(lines=lambda entry, scores: labeled_list_line(entry, scores=scores), by_role=False),
    "margin-mse": Format(lines=lambda entry, _: margin_lines(entry), targets=("teacher",)),
    "tevatron": Format(lines=lambda entry, _: tevatron_line(entry), targets=()),
    "triples": Format(lines=lambda entry, _: triples_lines(entry), targets=(), text=one_line, empty_texts=False),
}


@dataclass(slots=True, kw_only=True)
class Conversion:
    """What was written and what was left out."""

    lists: int = 0
    candidates: int = 0
    unscored: int = 0
    """Candidates left out because the teacher gave them no score."""
    repeated: int = 0
    """Candidates left out because another one of their list has the same text."""
    empty: int = 0
    """Candidates left out because they have no text, and the format no way to write that."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Why rows were left out -> how many."""

    def add(self, labels: Labels) -> None:
        self.lists += 1
        self.candidates += len(labels.candidate_list)

    def check(self, source: str) -> None:
        """Raise `InputError` if nothing was written."""
        if not self.lists:
            reasons = ", ".join(f"{count} rows {reason}" for reason, count in self.skipped.items())
            fix = ": --min-gain says which gains make a positive (1), or --positives N takes a teacher's first N"
            fix = fix if _WITHOUT_POSITIVE in self.skipped else ""
            raise InputError(f"{source}: no list can be written ({reasons or 'no rows'}){fix}")


def convert(
    source: str,
    out: str,
    form: str,
    *,
    target: str | None = None,
    min_gain: float | None = None,
    positives: int | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Write a label run, or candidates with gains, in another project's format.

    Labels that an ingest made of gains alone have no teacher, and are taken for candidates with gains.

    Of candidates with the same text, which might be positive and negative at once, a list keeps the one with the
    highest gain, and of these the one with the highest score; rank-distillm, which tells them by their ids, keeps all.

    Args:
        source: a label run, label Parquet or candidate Parquet.
        out: the file, compressed if it ends in `.gz`; for rank-distillm the folder of run, queries and collection.
        form: one of `FORMATS`, or rank-distillm.
        target: whether the format's numbers are the teacher's scores or the gains (default: teacher, if there is one).
        min_gain: candidates with this gain or a higher one are positives (default: 1).
        positives: the teacher's first ones are the positives instead, so many of a list.

    Raises:
        ConfigError: an option that this format or source has no use for.
        InputError: the source can't be read, it has lists with a teacher beside lists without, no list could be
            written, or `out` is there already (for rank-distillm, holds files already).
        RowError: a row breaks the contract.
    """
    data = resolve_input(source)
    taught = _has_teacher(data, source)
    _check_options(source, taught, form, target, min_gain, positives)
    with_scores = taught if target is None else target == "teacher"
    # A failed attempt leaves rank-distillm's folder empty.
    taken = storage.list_files(out, "") if form == RANK_DISTILLM else storage.exists(out)
    if taken and not overwrite:
        raise InputError(f"{out}: is there already: --overwrite replaces it, or name another")
    conversion = Conversion()
    rows = _labels(data, taught, conversion)
    if form == RANK_DISTILLM:
        _write_rank_distillm(rows, source, out, conversion)
    else:
        with storage.new_file(out) as file:
            for found in rows:
                labels = _writable(found, FORMATS[form], conversion)
                entry = split(labels, min_gain=1.0 if min_gain is None else min_gain, positives=positives)
                if FORMATS[form].by_role and not (entry.positives and entry.negatives):
                    conversion.skipped["without a negative" if entry.positives else _WITHOUT_POSITIVE] += 1
                    continue
                if not with_scores and all(c.label is None for c in labels.candidate_list.candidates):
                    conversion.skipped["without a known gain"] += 1
                    continue
                file.write(FORMATS[form].lines(entry, with_scores).encode())
                conversion.add(labels)
            conversion.check(source)
    return conversion


def _has_teacher(data: str, source: str) -> bool:
    """Whether the Parquet of `data` has a teacher's scores: candidates have none, and labels may repeat their gains.

    Raises:
        InputError: some lists have a teacher and others none, or the Parquet is neither of labels nor of candidates.
    """
    fs, _ = storage.open_filesystem(data)
    paths = storage.list_files(data, ".parquet")
    if not paths:
        raise InputError(f"{source}: holds no .parquet file: give a label run, or Parquet of labels or candidates")
    with open_parquet(fs, paths[0]) as file:
        labelled = "scores" in file.schema_arrow.names
        check_columns(file.schema_arrow, LABELS if labelled else CANDIDATES, paths[0])
    if not labelled:
        return False
    of_gains = {repeats_gains(row["teacher"] or "") for row in read_rows(data, ["teacher"])}
    if len(of_gains) > 1:
        raise InputError(
            f"{source}: some lists have a teacher's scores, and others gains alone (teacher gains:…): convert the two "
            "apart"
        )
    return True not in of_gains


def _check_options(
    source: str, taught: bool, form: str, target: str | None, min_gain: float | None, positives: int | None
) -> None:
    if form not in FORMATS and form != RANK_DISTILLM:
        raise ConfigError(f"format {form!r} is unknown; known: {', '.join([*FORMATS, RANK_DISTILLM])}")
    targets = FORMATS[form].targets if form in FORMATS else ("teacher",)
    if target is not None and target not in targets:
        raise ConfigError(f"target {target} does nothing for {form}, which holds {' or '.join(targets) or 'neither'}")
    if not taught and (target == "teacher" or positives is not None or targets == ("teacher",)):
        raise ConfigError(f"{source}: holds no teacher's scores, only candidates and their gains: label them first")
    by_role = form in FORMATS and FORMATS[form].by_role
    for name, value in (("min_gain", min_gain), ("positives", positives)):
        if value is not None and not by_role:
            raise ConfigError(f"{name} does nothing for {form}, which does not tell positives from negatives")
    if min_gain is not None and positives is not None:
        raise ConfigError("min_gain and positives both say what the positives are: give one")
    if positives is not None and positives < 1:
        raise ConfigError(f"positives={positives}: a list has at least one")


def _labels(data: str, taught: bool, conversion: Conversion) -> Iterator[Labels]:
    """Rows as labels without the candidates that have no score, which rows without a teacher keep; rows without any
    are counted."""
    for row in read_rows(data, (LABELS if taught else CANDIDATES).names):
        if not taught:
            yield Labels(candidate_list=record_of(row, candidate_list_from_row, data), teacher="", scores=None)
            continue
        if row["error"] is not None:
            conversion.skipped["with an error instead of labels"] += 1
            continue
        labels = record_of(row, labels_from_row, data)
        scored = [i for i, score in enumerate(labels.scores) if not math.isnan(score)]
        if not scored:
            conversion.skipped["without a score"] += 1
            continue
        conversion.unscored += len(labels.scores) - len(scored)
        candidates = tuple(labels.candidate_list.candidates[i] for i in scored)
        yield replace(
            labels,
            candidate_list=replace(labels.candidate_list, candidates=candidates),
            scores=tuple(labels.scores[i] for i in scored),
        )


def _writable(labels: Labels, form: Format, conversion: Conversion) -> Labels:
    """The list with one candidate a text, and where the format has columns none without; those left out are counted."""
    candidates = labels.candidate_list.candidates
    best: dict[str, int] = {}
    for i, candidate in enumerate(candidates):
        key = form.text(candidate.contents)
        if not key and not form.empty_texts:
            conversion.empty += 1
        elif key not in best or _worth(labels, i) > _worth(labels, best[key]):
            conversion.repeated += key in best
            best[key] = i
        else:
            conversion.repeated += 1
    kept = sorted(best.values())
    return replace(
        labels,
        candidate_list=replace(labels.candidate_list, candidates=tuple(candidates[i] for i in kept)),
        scores=labels.scores and tuple(labels.scores[i] for i in kept),
    )


def _worth(labels: Labels, i: int) -> tuple[float, float]:
    """By which one of the candidates with the same text is chosen: gain, unknown below all, then score."""
    gain = labels.candidate_list.candidates[i].label
    return -math.inf if gain is None else gain, labels.scores[i] if labels.scores else 0.0


def _write_rank_distillm(rows: Iterator[Labels], source: str, out: str, conversion: Conversion) -> None:
    """Write the teacher's order as a TREC run, with the queries and the documents that it names; all three or none.

    Raises:
        InputError: no list can be written, one doc id has two texts, or an id can't stand in a run.
    """
    text_of: dict[str, str] = {}
    with (
        storage.new_file(storage.join(out, QUERIES_FILE)) as queries,
        storage.new_file(storage.join(out, CORPUS_FILE)) as corpus,
    ):

        def rankings() -> Iterator[Ranking]:
            for labels in rows:
                query = labels.candidate_list.query
                queries.write(json_line({"_id": query.query_id, "text": query.text}).encode())
                for c in labels.candidate_list.candidates:
                    digest = text_id(f"{c.title}\0{c.text}")
                    if c.doc_id not in text_of:
                        text_of[c.doc_id] = digest
                        corpus.write(json_line({"_id": c.doc_id, "title": c.title or "", "text": c.text}).encode())
                    elif text_of[c.doc_id] != digest:
                        raise InputError(
                            f"query {query.query_id!r}: {c.doc_id!r} has another text than in an earlier list, and a "
                            "collection has one: give every text its own doc id"
                        )
                conversion.add(labels)
                yield ranking_of(labels.candidate_list, Scores(scores=labels.scores), labels.teacher)
            # Before the run, the first of the three, is put in its place.
            conversion.check(source)

        write_run(rankings(), storage.join(out, RUN_FILE))
