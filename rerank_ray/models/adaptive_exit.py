"""Layer-wise students that stop where a candidate's place is settled: those far below their list's tenth leave the
batches, and the layers above are computed for the others alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from rerank_ray.errors import ModelError
from rerank_ray.models.acceleration import accelerate
from rerank_ray.models.engine import BatchRunner
from rerank_ray.models.exit_margins import Stage, goes_on, merged, segments_of
from rerank_ray.models.packing import Packing
from rerank_ray.models.student import Encoded, Student
from rerank_ray.models.student.source import layers_of
from rerank_ray.models.whole_lists import in_parts
from rerank_ray.settings.models import TorchSettings


class AdaptiveExit:
    """Scores lists with a student that has a head on several layers."""

    def __init__(self, student: Student, margins: Sequence[float | None]) -> None:
        """`margins` are those of `exit_margins.calibrate`."""
        spans = segments_of(student.layers, student.description.branch_layers, margins)
        held = _Held(layers_of(student.pretrained)[0])
        self.segments = [_Segment(student, *span, held) for span in spans]
        self.margins = [margin for margin in margins if margin is not None]
        self._scored = [0] * len(self.segments)
        self._check(student)

    @property
    def packs(self) -> bool:
        """Whether no padding is computed."""
        return all(segment.packs for segment in self.segments)

    @property
    def layers_computed(self) -> float:
        """Mean number of layers that were computed of a pair so far."""
        depths = [segment.last - segment.first for segment in self.segments]
        return float(np.dot(self._scored, depths)) / max(1, self._scored[0])

    @torch.inference_mode()
    def _check(self, student: Student) -> None:
        """Refuse an architecture whose layers do more with each other than pass hidden states on."""
        encoded = student.encode(["query"], ["document"])
        scores = student(**student.collate(encoded))[:, 0].float().tolist()
        expected = [scores[student.layers.index(segment.last)] for segment in self.segments]
        states, found = None, []
        try:
            for segment in self.segments:
                scores, ends = segment(encoded, states)
                found, states = [*found, *scores], list(ends)
        except (TypeError, ValueError, AttributeError, LookupError, RuntimeError):
            found = []
        if len(found) != len(expected) or not np.allclose(found, expected, rtol=0.02, atol=0.02):
            raise ModelError(
                f"{type(student.pretrained).__name__}: its layers can't be computed apart, so exits can't be adaptive: "
                "use a fixed exit_layer"
            )

    def to(self, device: torch.device, settings: TorchSettings) -> AdaptiveExit:
        for segment in self.segments:
            segment.student.to(device)
            segment.pack(settings)
            for stack in segment.student.stacks:
                accelerate(stack, settings)
        return self

    def run(self, lists: Sequence[Sequence[Encoded]], runner: BatchRunner) -> list[tuple[float, ...]]:
        """Scores of each list's pairs (`exit_margins.merged`); a list's do not depend on the other lists."""
        return in_parts(lists, runner, self._run)

    def _run(self, lists: Sequence[Sequence[Encoded]], runner: BatchRunner) -> list[tuple[float, ...]]:
        stages: list[list[Stage]] = [[] for _ in lists]
        inside = [np.arange(len(pairs)) for pairs in lists]
        states: dict[tuple[int, int], torch.Tensor] = {}
        counts: list[int] = []
        for number, segment in enumerate(self.segments):
            pairs = [(i, int(j)) for i, places in enumerate(inside) for j in places]
            counts.append(len(pairs))
            scored, states = self._segment(segment, lists, pairs, states, runner)
            values = np.split(np.array(scored), np.cumsum([len(places) for places in inside])[:-1])
            for of_list, places, scores in zip(stages, inside, values, strict=True):
                of_list.append((places, scores))
            if number < len(self.margins):
                margin = self.margins[number]
                inside = [p[goes_on(scores, margin)] for p, scores in zip(inside, values, strict=True)]
                states = {(i, int(j)): states[i, int(j)] for i, places in enumerate(inside) for j in places}
        self._scored = [before + count for before, count in zip(self._scored, counts, strict=True)]
        return [tuple(merged(of_list).tolist()) for of_list in stages]

    @torch.inference_mode()
    def _segment(
        self, segment: _Segment, lists, pairs: list[tuple[int, int]], states, runner: BatchRunner
    ) -> tuple[list[float], dict[tuple[int, int], torch.Tensor]]:
        """Scores of the pairs at the segment's end, and where the next one begins; `states` is where this one does."""
        encoded = [lists[i][j] for i, j in pairs]
        lengths = [len(e["input_ids"]) for e in encoded]

        def forward(batch: list[int]) -> list[tuple[float, torch.Tensor]]:
            held = [states[pairs[b]] for b in batch] if segment.first else None
            scores, ends = segment([encoded[b] for b in batch], held)
            # Copies: who goes on would keep the memory of a whole batch.
            return [(score, end[: lengths[b]].clone()) for score, end, b in zip(scores, ends, batch, strict=True)]

        outputs = runner.run(lengths, forward)
        return [score for score, _ in outputs], {pair: end for pair, (_, end) in zip(pairs, outputs, strict=True)}


class _Held(nn.Module):
    """Stands for layers that have been computed: gives the hidden states after them, whatever comes in."""

    output: torch.Tensor | None = None
    beside: tuple[None, ...] | None = None
    """What the architecture's layers give with their hidden states, in a tuple (DeBERTa's); None without a tuple."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # ModernBERT looks up a layer's mask by it; any kind that the model has will do, since no mask is used here.
        self.attention_type = getattr(layer, "attention_type", None)

    def forward(self, *_: object, **__: object) -> torch.Tensor | tuple[torch.Tensor | None, ...]:
        return self.output if self.beside is None else (self.output, *self.beside)


class _Segment:
    """The layers after `first` up to `last` of a student, and the head of the last one; the next segment begins after
    layer `shared`. All of a student's have one `held`, which learns from the first what a layer's output looks like."""

    def __init__(self, student: Student, first: int, shared: int, last: int, held: _Held) -> None:
        self.first, self.last = first, last
        self.student = student.truncated(last, alone=True)
        layers = layers_of(self.student.pretrained)
        self.held = held
        for index in range(first):
            layers[index] = self.held
        layers[shared - 1].register_forward_hook(self._keep)
        self._end: torch.Tensor | None = None
        self.packs = False

    def pack(self, settings: TorchSettings) -> None:
        """Compute no padding where that is faster; a decoder's states are not taken apart."""
        self.packs = not self.student.is_causal and self.student.pack_in_scoring(settings)

    def _keep(self, module: nn.Module, inputs: tuple, output: torch.Tensor | tuple) -> None:
        if isinstance(output, tuple):
            output, *others = output
            self.held.beside = (None,) * len(others)
        self._end = output

    def __call__(
        self, encoded: Sequence[Encoded], states: Sequence[torch.Tensor] | None
    ) -> tuple[list[float], torch.Tensor]:
        """Scores [B] of pairs, and their hidden states [B, L, H] after layer `shared`.

        Args:
            states: [tokens, H] of each pair after layer `first`; None from the first layer on.
        """
        inputs = self.student.batch(encoded, packed=self.packs)
        packing = Packing(places=inputs["places"], mask=inputs["attention_mask"]) if "places" in inputs else None
        if states is not None:
            padded = states[0].new_zeros((*inputs["input_ids"].shape, states[0].shape[-1]))
            for row, state in zip(padded, states, strict=True):
                row[: len(state)] = state
            self.held.output = padded if packing is None else packing.pack(padded)
        scores = self.student(**inputs)[-1].float().tolist()
        end, self._end, self.held.output = self._end, None, None
        return scores, end if packing is None else packing.unpack(end)
