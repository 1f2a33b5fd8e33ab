"""Cross-encoders: one forward pass over query and document together gives their relevance."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rerank_ray.models import engine
from rerank_ray.models.protocol import Answer, Pair, Result
from rerank_ray.models.resolve import resolve
from rerank_ray.models.student import load_student
from rerank_ray.records import Usage
from rerank_ray.settings.models import CrossEncoderSettings


class CrossEncoder:
    """Answers `Pair` with a checkpoint's raw score, or with a layer-wise student's at its exit layer."""

    answers = frozenset({Pair})

    def __init__(self, settings: CrossEncoderSettings) -> None:
        self.name = f"cross_encoder:{resolve(settings).identity}"
        self.device = engine.pick_device(settings.device)
        student = load_student(settings, dtype=engine.pick_dtype(settings.dtype, self.device))
        self.exit_layer = None
        if settings.exit_layer is not None or len(student.layers) > 1:
            self.exit_layer = settings.exit_layer or student.layers[-1]
            student = student.truncated(self.exit_layer)
        self.student = student.to(self.device)
        self.parameters = engine.count_parameters(self.student)
        self.runner = engine.BatchRunner(settings.tokens_per_batch, self.device)

    def run(self, calls: Sequence[Pair]) -> list[Result]:
        encoded = self.student.encode([c.query for c in calls], [c.text for c in calls])
        lengths = [len(e["input_ids"]) for e in encoded]
        scores = self.runner.run(lengths, lambda batch: self._forward([encoded[i] for i in batch]))
        return [
            Answer(value=score, usage=Usage(calls=1, prompt_tokens=length))
            for score, length in zip(scores, lengths, strict=True)
        ]

    @torch.inference_mode()
    def _forward(self, encoded: list[dict[str, list[int]]]) -> list[float]:
        inputs = {k: v.to(self.device) for k, v in self.student.collate(encoded).items()}
        return self.student(**inputs)[-1].float().tolist()
