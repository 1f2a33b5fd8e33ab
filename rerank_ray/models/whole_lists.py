"""Students whose scores depend on the whole list: each pair is read alone, then what was read of a list's together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch

from rerank_ray.models.engine import BatchRunner
from rerank_ray.models.student import Encoded, Student


class WholeLists:
    """Scores lists with a student that `reads_lists`."""

    def __init__(self, student: Student) -> None:
        self.student = student

    @torch.inference_mode()
    def run(self, lists: Sequence[Sequence[Encoded]], runner: BatchRunner) -> list[tuple[float, ...]]:
        """Scores of each list's pairs; a list's do not depend on the other lists.

        Pairs are batched by length whatever list they are of, and lists by how many vectors they have.
        """
        pairs = [pair for of_list in lists for pair in of_list]
        lengths = [len(pair["input_ids"]) for pair in pairs]
        read = iter(runner.run(lengths, lambda batch: self._read([pairs[i] for i in batch])))
        vectors = [list(islice(read, len(of_list))) for of_list in lists]
        counts = [self.student.description.views * len(of_list) for of_list in lists]
        # Another runner, since what it counts are no tokens.
        together = BatchRunner(runner.tokens_per_batch, next(self.student.parameters()).device)
        return together.run(counts, lambda batch: self._score([vectors[i] for i in batch]))

    def _read(self, pairs: list[Encoded]) -> torch.Tensor:
        """Vectors [B, V, H]."""
        return self.student(**self.student.batch(pairs))[-1]

    def _score(self, lists: list[list[torch.Tensor]]) -> list[tuple[float, ...]]:
        sizes = [len(vectors) for vectors in lists]
        outputs = torch.stack([vector for vectors in lists for vector in vectors])[None]
        scores, _ = self.student.scores(outputs, sizes)
        return [tuple(of_list.tolist()) for of_list in scores[-1].split(sizes)]
