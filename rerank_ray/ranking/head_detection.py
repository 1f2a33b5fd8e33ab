"""Which attention heads tell relevant documents from hard negatives? (CoRe, Tran et al. 2025)."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rerank_ray.errors import ConfigError, InputError, RowError
from rerank_ray.models.backends import load_backend
from rerank_ray.models.protocol import Answer, Attention, Backend, Result
from rerank_ray.parquet import inspect_input, read_rows
from rerank_ray.prompts.render import Template, load_template
from rerank_ray.ranking.heads_file import HeadScore, HeadsFile
from rerank_ray.records import Query
from rerank_ray.runs import resolve_input
from rerank_ray.schema import CANDIDATES, candidate_list_from_row
from rerank_ray.settings.jobs import DetectHeadsSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Detection:
    """The heads' scores, and how many queries could not be used, by reason."""

    heads: HeadsFile
    skipped: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Example:
    """One query's documents in the order of its prompt, and which of them are relevant."""

    query: Query
    passages: tuple[str, ...]
    relevant: tuple[bool, ...]


def detect_heads(settings: DetectHeadsSettings) -> Detection:
    """Score every head of the model on labelled candidate lists.

    Raises:
        InputError: a file of the input breaks the contract, or no query of it can be used.
        RunError: the run, or the ingest, that the input names is not finished.
        ConfigError: the model does not answer `Attention`.
        ModelError: the model can't be loaded, or its attention can't be read.
    """
    template = load_template(settings.prompt, "icr")
    data = resolve_input(settings.input)
    inspect_input(data, CANDIDATES)
    backend = load_backend(settings.model)
    if Attention not in backend.answers:
        raise ConfigError(f"detect-heads needs ['Attention'], which {backend.name} does not answer")
    return score_heads(settings, backend, template, read_rows(data, CANDIDATES.names))


def score_heads(settings: DetectHeadsSettings, backend: Backend, template: Template, rows: Iterable[dict]) -> Detection:
    """Mean over queries of `contrast`, from rows of the `candidates` columns; see `detect_heads`."""
    layers, width = backend.attention_shape
    heads = tuple((layer, head) for layer in range(layers) for head in range(width))
    total, queries, skipped = np.zeros(len(heads)), 0, {}

    def usable() -> Iterator[_Example]:
        for row in rows:
            example = _example(row, settings)
            if isinstance(example, str):
                skipped[example] = skipped.get(example, 0) + 1
            else:
                yield example

    examples = itertools.islice(usable(), settings.max_queries)
    while batch := list(itertools.islice(examples, settings.queries_per_batch)):
        results = backend.run([_call(template, example, heads) for example in batch])
        for example, result in zip(batch, results, strict=True):
            paid = _paid(result)
            if isinstance(paid, str):
                skipped[paid] = skipped.get(paid, 0) + 1
                continue
            total += contrast(paid, example.relevant, settings.temperature)
            queries += 1
    if not queries:
        reasons = "; ".join(f"{count} × {reason}" for reason, count in skipped.items()) or "it is empty"
        raise InputError(f"{settings.input}: no query to detect heads with: {reasons}")
    scores = [
        HeadScore(layer=layer, head=head, score=score)
        for (layer, head), score in zip(heads, (total / queries).tolist(), strict=True)
    ]
    found = HeadsFile(
        model=backend.name,
        prompt=template.digest,
        layers=layers,
        temperature=settings.temperature,
        queries=queries,
        heads=tuple(sorted(scores, key=lambda h: -h.score)),
    )
    return Detection(heads=found, skipped=skipped)


def _paid(result: Result) -> np.ndarray | str:
    """Attention [documents, heads] that the query pays, or why it can't be used."""
    if not isinstance(result, Answer):
        return result.reason
    paid = np.stack([tokens.astype(np.float64).sum(0) for tokens in result.value])
    return paid if np.isfinite(paid).all() else "its attention is not a finite number"


def _example(row: dict, settings: DetectHeadsSettings) -> _Example | str:
    """The first candidates of a list in random order, or why they can't be used.

    Shuffled, because a head that looks at the ends of the prompt would win wherever the first stage is good.
    """
    try:
        request = candidate_list_from_row(row)
    except RowError:
        return "the row breaks the contract (a text is null, a doc_id is there twice, …)"
    candidates = [c for c in request.candidates if c.contents.strip()][: settings.documents_per_prompt]
    random.Random(f"{settings.seed}:{request.query.query_id}").shuffle(candidates)
    relevant = tuple(c.label is not None and c.label >= settings.min_gain for c in candidates)
    if not any(relevant):
        return f"no label of {settings.min_gain:g} or more among the first {settings.documents_per_prompt} candidates"
    if all(relevant):
        return f"no negative among the first {settings.documents_per_prompt} candidates"
    return _Example(query=request.query, passages=tuple(c.contents for c in candidates), relevant=relevant)


def _call(template: Template, example: _Example, heads: tuple[tuple[int, int], ...]) -> Attention:
    prompt = template.list_prompt(example.query, example.passages)
    return Attention(prompt=prompt, query=example.query.text, heads=heads, each_head=True)


def contrast(paid: np.ndarray, relevant: Sequence[bool], temperature: float) -> np.ndarray:
    """softmax([a(d⁺), a(d⁻₁), …] / T) at the positive, for each head; the mean over the positives where there are more.

    Args:
        paid: [documents, heads], attention that each document gets: a(d) = Σ over its tokens.
        relevant: which documents are positives; each competes with the negatives alone.

    Returns:
        [heads], in 0..1.
    """
    is_relevant = np.asarray(relevant)
    logits = paid / temperature
    negatives = logits[~is_relevant]
    # p = 1 / (1 + Σ exp(a⁻ − a⁺)): exp overflows to inf and p to 0, as it should.
    with np.errstate(over="ignore"):
        chances = [1 / (1 + np.exp(negatives - positive).sum(0)) for positive in logits[is_relevant]]
    return np.mean(chances, axis=0)
