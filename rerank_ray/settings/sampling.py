"""Which candidates of a list are scored in a training step."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from rerank_ray.config import Settings


class BandSettings(Settings):
    """How many candidates of a group come from a range of teacher ranks."""

    ranks: tuple[PositiveInt, PositiveInt]
    """First and last teacher rank, from 1, both included."""
    count: PositiveInt
    """Candidates drawn from them."""

    @model_validator(mode="after")
    def _ascending(self) -> BandSettings:
        if self.ranks[0] > self.ranks[1]:
            raise ValueError(f"ranks: {list(self.ranks)}: the first must not be above the last")
        return self


class FalseNegativeSettings(Settings):
    """Which candidates the teacher holds too close to a query's positive to be its negatives: they are never drawn.

    The positive is the candidate with a known gain that the teacher likes best, or the teacher's first when no gain is
    known; candidates with a known gain are always kept. With both rules, either drops.
    """

    margin: Annotated[float, Field(ge=0.0)] | None = None
    """Drops scores above the positive's − margin, in the teacher's units."""
    fraction: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Drops scores above this fraction of the way from the list's lowest score to the positive's."""

    @model_validator(mode="after")
    def _a_rule(self) -> FalseNegativeSettings:
        if self.margin is None and self.fraction is None:
            raise ValueError("false_negatives drops nothing without margin or fraction: give one, or leave it out")
        return self


class CurriculumStage(Settings):
    """Bands for the first epochs."""

    until_epoch: PositiveInt
    """The stage ends after this many epochs, counted from the start of training."""
    bands: Annotated[tuple[BandSettings, ...], Field(min_length=1)]
    """In place of the sampling's own."""


class SamplingSettings(Settings):
    """Which candidates of a query are scored in one step; drawn anew each epoch."""

    group_size: PositiveInt = 16
    """Candidates a query; lists that are shorter are taken whole."""
    positives: NonNegativeInt = 0
    """Candidates with a known gain that are drawn first, if there are as many; the rest is drawn whatever its gain, so
    that a group can hold more of them. `ce`, `lce` and the lambda losses on gains learn nothing from a group without
    one; where there are more, `lce` compares each with the negatives alone."""
    bands: tuple[BandSettings, ...] | None = None
    """null draws uniformly from all scored candidates."""
    curriculum: tuple[CurriculumStage, ...] = ()
    """Other bands for early epochs, for example easy negatives before hard ones; `bands` holds when all are over."""
    false_negatives: FalseNegativeSettings | None = None
    """null draws every scored candidate, however close to the positive."""

    def bands_of(self, epoch: int) -> tuple[BandSettings, ...] | None:
        """The bands of an epoch, counted from 0."""
        return next((s.bands for s in self.curriculum if epoch < s.until_epoch), self.bands)

    @model_validator(mode="after")
    def _bands_fill_the_group(self) -> SamplingSettings:
        if self.positives > self.group_size:
            raise ValueError(f"positives ({self.positives}) is above group_size ({self.group_size})")
        stages = {f"curriculum.{n}.bands": s.bands for n, s in enumerate(self.curriculum)}
        for name, bands in {"bands": self.bands, **stages}.items():
            count = sum(b.count for b in bands or ())
            if bands is not None and count != self.group_size - self.positives:
                less = f" − positives ({self.positives})" if self.positives else ""
                raise ValueError(
                    f"{name}: the bands' counts add up to {count}, not to group_size ({self.group_size}){less}"
                )
        return self

    @model_validator(mode="after")
    def _stages_follow_each_other(self) -> SamplingSettings:
        ends = [s.until_epoch for s in self.curriculum]
        if ends != sorted(set(ends)):
            raise ValueError(f"curriculum: until_epoch must rise from stage to stage, not {ends}")
        return self
