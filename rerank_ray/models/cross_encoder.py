"""Cross-encoders: one forward pass over query and document together gives their relevance."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rerank_ray.errors import ModelError
from rerank_ray.models import engine
from rerank_ray.models.acceleration import accelerate
from rerank_ray.models.adaptive_exit import AdaptiveExit
from rerank_ray.models.protocol import Answer, Pair, PairList, Result
from rerank_ray.models.resolve import resolve
from rerank_ray.models.student import Encoded, Student, load_student
from rerank_ray.models.whole_lists import WholeLists
from rerank_ray.records import Usage
from rerank_ray.settings.models import CrossEncoderSettings


class CrossEncoder:
    """Answers `Pair` with a checkpoint's raw score, or with a layer-wise student's at its exit layer; `PairList`, where
    the exit is adaptive or the student reads whole lists."""

    def __init__(self, settings: CrossEncoderSettings) -> None:
        self.name = f"cross_encoder:{resolve(settings).identity}"
        if settings.views is not None:
            self.name += f":views={settings.views}"
        self.device = engine.pick_device(settings.device)
        dtype = engine.pick_dtype(settings.dtype, self.device)
        student = load_student(settings, dtype=dtype, views=settings.views)
        student.score_in_float32()
        self.adaptive = _adaptive(settings, student) if settings.exit_layer == "adaptive" else None
        self.exit_layer = None
        if self.adaptive is None and (settings.exit_layer is not None or len(student.layers) > 1):
            self.exit_layer = settings.exit_layer or student.layers[-1]
            student = student.truncated(self.exit_layer, alone=True)
        self.lists = WholeLists(student) if student.reads_lists else self.adaptive
        self.answers = frozenset({Pair} if self.lists is None else {PairList})
        self.parameters = engine.count_parameters(student)
        # With adaptive exits its parts do the work, and the whole only tokenises.
        self.student = student if self.adaptive else student.to(self.device)
        self._packs = False
        if self.adaptive is not None:
            self.name += ":layer=adaptive"
            self.adaptive.to(self.device, settings)
        else:
            self._packs = self.student.pack_in_scoring(settings)
            self.student.leave_out_what_is_not_read()
            for stack in self.student.stacks:
                accelerate(stack, settings)
        self.runner = engine.BatchRunner(
            settings.tokens_per_batch,
            self.device,
            in_cache=engine.LLM_TOKENS_IN_CACHE if student.is_causal else None,
            packed=self._packs or (self.adaptive is not None and self.adaptive.packs),
        )

    def run(self, calls: Sequence[Pair] | Sequence[PairList]) -> list[Result]:
        if self.lists is not None:
            return engine.in_pools(calls, self._encode_lists, self._answer_lists)
        return self.runner.answer(calls, self._encode, self._forward, length=_tokens)

    def _encode(self, calls: Sequence[Pair]) -> list[Encoded]:
        return self.student.encode([c.query for c in calls], [c.text for c in calls])

    def _encode_lists(self, calls: Sequence[PairList]) -> list[list[Encoded]]:
        return [self.student.encode([c.query] * len(c.texts), list(c.texts)) for c in calls]

    def _answer_lists(self, lists: list[list[Encoded]]) -> list[Answer]:
        return [
            Answer(value=result, usage=Usage(calls=len(pairs), prompt_tokens=sum(map(_tokens, pairs))))
            for result, pairs in zip(self.lists.run(lists, self.runner), lists, strict=True)
        ]

    @torch.inference_mode()
    def _forward(self, encoded: list[Encoded]) -> list[float]:
        return self.student(**self.student.batch(encoded, packed=self._packs))[-1].float().tolist()


def _tokens(encoded: Encoded) -> int:
    return len(encoded["input_ids"])


def _adaptive(settings: CrossEncoderSettings, student: Student) -> AdaptiveExit:
    margins = student.description.exit_margins
    if margins is None:
        raise ModelError(
            f"{settings.path}: exit_layer: adaptive: the student has no margins; find them on held-out lists with "
            f"`rerank-ray calibrate-exit {settings.path} --labels RUN --max-loss 0.01`"
        )
    return AdaptiveExit(student, margins)
