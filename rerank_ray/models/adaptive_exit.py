"""Layer-wise students that stop where a list's order is settled: settled lists leave the batches, and the layers above
are computed for the others alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from rerank_ray.errors import ModelError
from rerank_ray.models.acceleration import accelerate
from rerank_ray.models.engine import BatchRunner, group_in_order
from rerank_ray.models.student import Encoded, Student
from rerank_ray.models.student.source import layers_of
from rerank_ray.settings.models import TorchSettings
from rerank_ray.uncertainty import uncertainty_of

EXIT_DEPTH = 10
"""Candidates whose order must be settled: the uncertainty is that of so many at the top."""
_BATCHES_HELD = 32
"""Hidden states of at most so many batches are held at once, as long as one list has no more."""


def exit_uncertainty(scores: Sequence[float]) -> float:
    """What the thresholds are on: the normalised entropy of the softmax of a list's highest scores, 0 to 1."""
    return uncertainty_of(scores, EXIT_DEPTH, "entropy")


class AdaptiveExit:
    """Scores lists with a student that has a head on several layers."""

    def __init__(self, student: Student, thresholds: Sequence[float]) -> None:
        *early, last = student.layers
        # The layers below its branch are what an exit shares with those after it.
        shared = [n - student.description.branch_layers for n in early]
        self.segments = [
            _Segment(student, *bounds) for bounds in zip((0, *shared), (*shared, last), student.layers, strict=True)
        ]
        self.layers, self.thresholds = student.layers, thresholds
        self._check(student)

    @torch.inference_mode()
    def _check(self, student: Student) -> None:
        """Refuse an architecture whose layers do more with each other than pass hidden states on."""
        encoded = student.encode(["query"], ["document"])
        expected = student(**student.collate(encoded))[:, 0].float().tolist()
        states, found = None, []
        try:
            for segment in self.segments:
                scores, ends = segment(encoded, states)
                found, states = [*found, *scores], list(ends)
        except (TypeError, AttributeError, IndexError):
            found = []
        if len(found) != len(expected) or not np.allclose(found, expected, rtol=0.02, atol=0.02):
            raise ModelError(
                f"{type(student.pretrained).__name__}: its layers can't be computed apart, so exits can't be adaptive: "
                "use a fixed exit_layer"
            )

    def to(self, device: torch.device, settings: TorchSettings) -> AdaptiveExit:
        for segment in self.segments:
            accelerate(segment.student.to(device).pretrained, settings)
        return self

    def run(self, lists: Sequence[Sequence[Encoded]], runner: BatchRunner) -> list[tuple[tuple[float, ...], int]]:
        """Scores of each list's pairs, and the layer that they are of; a list's do not depend on the other lists."""
        results: list[tuple[tuple[float, ...], int]] = []
        tokens = [sum(len(e["input_ids"]) for e in pairs) for pairs in lists]
        for part in group_in_order(tokens, _BATCHES_HELD * runner.tokens_per_batch):
            results += self._run([lists[i] for i in part], runner)
        return results

    def _run(self, lists: Sequence[Sequence[Encoded]], runner: BatchRunner) -> list[tuple[tuple[float, ...], int]]:
        results: list[tuple[tuple[float, ...], int] | None] = [None] * len(lists)
        inside = range(len(lists))
        states: dict[tuple[int, int], torch.Tensor] = {}
        for number, (layer, segment) in enumerate(zip(self.layers, self.segments, strict=True)):
            pairs = [(i, j) for i in inside for j in range(len(lists[i]))]
            scored = dict(zip(pairs, self._segment(segment, lists, pairs, states, runner), strict=True))
            last = number == len(self.segments) - 1
            for i in inside:
                scores = tuple(scored[i, j] for j in range(len(lists[i])))
                if last or exit_uncertainty(scores) <= self.thresholds[number]:
                    results[i] = scores, layer
            inside = [i for i in inside if results[i] is None]
            states = {} if last else {pair: state for pair, state in states.items() if results[pair[0]] is None}
        return results

    @torch.inference_mode()
    def _segment(self, segment: _Segment, lists, pairs: list[tuple[int, int]], states, runner: BatchRunner):
        """Scores of the pairs at the segment's end; `states` gives where it begins and takes where the next does."""
        encoded = [lists[i][j] for i, j in pairs]
        lengths = [len(e["input_ids"]) for e in encoded]

        def forward(batch: list[int]) -> list[tuple[float, torch.Tensor]]:
            held = [states[pairs[b]] for b in batch] if segment.first else None
            scores, ends = segment([encoded[b] for b in batch], held)
            return [(score, end[: lengths[b]]) for score, end, b in zip(scores, ends, batch, strict=True)]

        outputs = runner.run(lengths, forward)
        states.update({pair: end for pair, (_, end) in zip(pairs, outputs, strict=True)})
        return [score for score, _ in outputs]


class _Held(nn.Module):
    """Stands for layers that have been computed: gives the hidden states after them, whatever comes in."""

    output: object = None

    def forward(self, *_: object, **__: object) -> object:
        return self.output


class _Segment:
    """The layers after `first` up to `last` of a student, and the head of the last one; the next segment begins after
    layer `shared`."""

    def __init__(self, student: Student, first: int, shared: int, last: int) -> None:
        self.first = first
        self.student = student.truncated(last, alone=True)
        layers = layers_of(self.student.pretrained)
        self.held = _Held()
        for index in range(first):
            layers[index] = self.held
        layers[shared - 1].register_forward_hook(self._keep)
        self._end: object = None

    def _keep(self, module: nn.Module, inputs: tuple, output: object) -> None:
        self._end = output

    def __call__(
        self, encoded: Sequence[Encoded], states: Sequence[torch.Tensor] | None
    ) -> tuple[list[float], torch.Tensor]:
        """Scores [B] of pairs, and their hidden states [B, L, H] after layer `shared`.

        Args:
            states: [tokens, H] of each pair after layer `first`; None from the first layer on.
        """
        inputs = self.student.batch(encoded)
        if states is not None:
            padded = states[0].new_zeros((*inputs["input_ids"].shape, states[0].shape[-1]))
            for row, state in zip(padded, states, strict=True):
                row[: len(state)] = state
            self.held.output = padded
        scores = self.student(**inputs)[-1].float().tolist()
        end, self._end, self.held.output = self._end, None, None
        return scores, end
