"""Students whose scores depend on the whole list: each pair is read alone, then what was read of a list's together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

import torch

from rerank_ray.models.engine import BatchRunner, TooLongError, group_in_order
from rerank_ray.models.student import Encoded, Student

_BATCHES_HELD = 32
Lists = Sequence[Sequence[Encoded]]
ListScores = list[tuple[float, ...]]


def in_parts(lists: Lists, runner: BatchRunner, score: Callable[[Lists, BatchRunner], ListScores]) -> ListScores:
    """What `score` gives, part by part: what is read of pairs is held for at most 32 batches of them, as long as one
    list has no more.

    Raises:
        TooLongError: beside what is held of one list not a pair of it fits the memory.
    """
    tokens = [sum(len(e["input_ids"]) for e in pairs) for pairs in lists]
    parts = group_in_order(tokens, _BATCHES_HELD * runner.tokens_per_batch)
    found: ListScores = []
    while parts:
        part, budget = parts.pop(0), runner.tokens_per_batch
        try:
            found += score([lists[i] for i in part], runner)
        except TooLongError:
            # It is what is held that leaves no room: beside less of it as many tokens fit as before.
            runner.tokens_per_batch = budget
            if len(part) == 1:
                raise
            parts[:0] = [part[: len(part) // 2], part[len(part) // 2 :]]
    return found


class WholeLists:
    """Scores lists with a student that `reads_lists`."""

    def __init__(self, student: Student) -> None:
        self.student = student

    def run(self, lists: Lists, runner: BatchRunner) -> ListScores:
        """Scores of each list's pairs; a list's do not depend on the other lists.

        Pairs are batched by length whatever list they are of, and lists by how many vectors they have.
        """
        return in_parts(lists, runner, self._run)

    @torch.inference_mode()
    def _run(self, lists: Lists, runner: BatchRunner) -> ListScores:
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

    def _score(self, lists: list[list[torch.Tensor]]) -> ListScores:
        sizes = [len(vectors) for vectors in lists]
        outputs = torch.stack([vector for vectors in lists for vector in vectors])[None]
        scores, _ = self.student.scores(outputs, sizes)
        return [tuple(of_list.tolist()) for of_list in scores[-1].split(sizes)]
