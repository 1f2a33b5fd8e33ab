"""A backend without a model: answers are a hash of the call. It tests everything around a model."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence

from rerank_ray.models.protocol import Answer, Call, Embed, Failure, LogLikelihood, NextToken, Pair, Result
from rerank_ray.records import Usage
from rerank_ray.settings.models import FakeSettings


class Fake:
    """Answers every kind of call with numbers in (−1, 0] that depend on the call and the seed alone."""

    answers = frozenset({NextToken, LogLikelihood, Pair, Embed})
    exit_layer = None
    parameters = 0

    def __init__(self, settings: FakeSettings) -> None:
        self.settings = settings
        self.name = f"fake:seed={settings.seed}"

    def run(self, calls: Sequence[Call]) -> list[Result]:
        return [self._answer(call) for call in calls]

    def _answer(self, call: Call) -> Result:
        text = repr(call)
        if self.settings.crash_on is not None and self.settings.crash_on in text:
            os._exit(139)
        if self.settings.fail_on is not None and self.settings.fail_on in text:
            return Failure(reason=f"the call holds {self.settings.fail_on!r}")
        time.sleep(self.settings.seconds_per_call)
        size = {NextToken: lambda: len(call.labels), LogLikelihood: lambda: len(call.continuation.split()) or 1}
        numbers = _numbers(f"{self.settings.seed}:{text}", size.get(type(call), lambda: 4)())
        usage = Usage(calls=1, prompt_tokens=len(text.split()))
        return Answer(value=numbers[0] if isinstance(call, Pair) else numbers, usage=usage)


def _numbers(text: str, count: int) -> tuple[float, ...]:
    return tuple(
        -int.from_bytes(hashlib.sha256(f"{i}:{text}".encode()).digest()[:6], "big") / 2**48 for i in range(count)
    )
