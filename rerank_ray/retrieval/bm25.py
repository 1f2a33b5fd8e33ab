"""BM25 over a collection that fits in memory as token ids: the first stage of `rerank-ray ingest beir`."""

from __future__ import annotations

import math
from collections.abc import Iterable

import bm25s
import numpy as np

from rerank_ray.errors import ConfigError, InputError
from rerank_ray.retrieval.words import words

K1 = 0.9
B = 0.4
STOPWORDS = "en"
"""Lucene's 33 words, in bm25s' name for them."""


class BM25Index:
    """A BM25 index with Lucene's formula, computed by bm25s (Lù, 2024, arXiv:2407.03618).

    score(q, d) = Σ over the query's tokens t, repeats included, of
    ln(1 + (N − df + 0.5) / (df + 0.5)) · tf / (tf + k1 · (1 − b + b · |d| / avg|d|))
    (the "accurate" Lucene variant of Kamphuis et al., ECIR 2020: lengths are not rounded to a byte as Lucene does).

    Tokens are lower-cased words (`words`) of two or more characters, so text without blanks between words (Chinese,
    Japanese, Thai) has to be segmented beforehand. Scores are float32.
    """

    def __init__(self, index: bm25s.BM25 | None, doc_ids: list[str]) -> None:
        self._index = index
        self.doc_ids = doc_ids
        self._position: dict[str, int] | None = None

    @classmethod
    def build(
        cls, docs: Iterable[tuple[str, str]], k1: float = K1, b: float = B, *, source: str = "the collection"
    ) -> BM25Index:
        """Index (doc id, contents) pairs in one pass; texts are dropped once they are tokenised.

        Args:
            source: where they come from, for what is raised.

        Raises:
            ConfigError: a parameter out of range.
            InputError: no documents.
        """
        check_parameters(k1, b)
        doc_ids: list[str] = []

        def contents() -> Iterable[str]:
            for doc_id, text in docs:
                doc_ids.append(doc_id)
                yield text

        tokens = _tokenize(contents())
        if not doc_ids:
            raise InputError(f"{source}: no documents: there is nothing to retrieve from")
        if not tokens.vocab:
            return cls(None, doc_ids)
        # Named so that the result does not depend on which optional packages bm25s finds.
        index = bm25s.BM25(k1=k1, b=b, method="lucene", backend="numpy", csc_backend="numpy", auto_compile=False)
        index.index(tokens, create_empty_token=False, show_progress=False)
        return cls(index, doc_ids)

    def top(self, query_text: str, depth: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions (in corpus order) and scores of the best documents, best first; equal scores in corpus order.

        Documents that share no token with the query (score 0) are not retrieved, so there may be fewer than `depth`.
        """
        scores = self._all_scores(query_text)
        found = np.flatnonzero(scores > 0)
        if len(found) > depth:
            lowest = np.partition(scores[found], len(found) - depth)[len(found) - depth]
            found = found[scores[found] >= lowest]
        order = np.argsort(-scores[found], kind="stable")[:depth]
        return found[order].astype(np.int32), scores[found][order]

    def search(self, query_texts: Iterable[str], depth: int) -> list[list[tuple[str, float]]]:
        """The best `depth` (doc id, score) pairs of each query, best first; see `top`.

        Raises:
            ConfigError: `depth` is less than 1.
        """
        if depth < 1:
            raise ConfigError(f"depth={depth}: retrieve at least one document a query")
        results = []
        for text in query_texts:
            positions, scores = self.top(text, depth)
            results.append([(self.doc_ids[p], float(s)) for p, s in zip(positions, scores, strict=True)])
        return results

    def scores(self, query_text: str, doc_ids: Iterable[str]) -> list[float]:
        """The scores of given documents (0 if no token is shared); NaN for a doc id that is not in the collection."""
        if self._position is None:
            self._position = {doc_id: i for i, doc_id in enumerate(self.doc_ids)}
        every_score = self._all_scores(query_text)
        positions = [self._position.get(doc_id) for doc_id in doc_ids]
        return [math.nan if p is None else float(every_score[p]) for p in positions]

    def _all_scores(self, query_text: str) -> np.ndarray:
        if self._index is None:
            return np.zeros(len(self.doc_ids), dtype=np.float32)
        (tokens,) = _tokenize([query_text], return_ids=False)
        return self._index.get_scores_from_ids(self._index.get_tokens_ids(tokens))


def _tokenize(texts: Iterable[str], **options):
    """Words of two or more characters, but for stop words. A blank between each two words is where
    bm25s cuts: its own pattern cuts words at vowel signs."""
    spaced = (" ".join(words(text)) for text in texts)
    return bm25s.tokenize(spaced, stopwords=STOPWORDS, token_pattern=r"\S\S+", show_progress=False, **options)


def check_parameters(k1: float, b: float) -> None:
    """Refuse BM25 parameters for which the formula means nothing.

    Raises:
        ConfigError: k1 is negative or not finite, or b lies outside [0, 1].
    """
    if not (math.isfinite(k1) and k1 >= 0):
        raise ConfigError(f"k1={k1}: term frequency saturation is a finite number from 0 (usually 0.9 to 1.5)")
    if not 0 <= b <= 1:
        raise ConfigError(f"b={b}: length normalisation lies between 0 (none) and 1 (full)")
