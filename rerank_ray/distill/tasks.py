"""What a policy is asked about a query's candidates, and what its answers are worth, for each kind of reward."""

from __future__ import annotations

from collections.abc import Sequence

from rerank_ray.distill import rewards
from rerank_ray.distill.rewards import Reward
from rerank_ray.models.protocol import Answer, Prompt
from rerank_ray.prompts.parse.scores import parse_score
from rerank_ray.prompts.passages import prompt_over
from rerank_ray.prompts.render import load_template
from rerank_ray.records import Labels
from rerank_ray.settings.reinforce import RewardSettings


class Task:
    """`indices` are the query's candidates that are shown, in the prompt's order."""

    method: str
    """That the template is written for."""
    answers_at_once = False
    """Whether an answer is a label and nothing else, to be written where a ranker reads it: behind any reasoning."""

    def __init__(self, settings: RewardSettings) -> None:
        self.settings = settings
        self.template = load_template(settings.prompt, self.method)

    def prompts(self, labels: Labels, indices: Sequence[int]) -> list[Prompt]:
        """What is asked: one prompt, or one a candidate."""
        raise NotImplementedError  # abstract

    def rewards(
        self, labels: Labels, indices: Sequence[int], answers: Sequence[Sequence[Answer]]
    ) -> list[list[Reward]]:
        """What the answers [prompts][samples] are worth."""
        raise NotImplementedError  # abstract


def gains_of(labels: Labels, indices: Sequence[int]) -> list[float]:
    """Known gains of candidates; 0 where unjudged, or judged to be worse than irrelevant (spam is -2 in TREC Web)."""
    return [max(0.0, labels.candidate_list.candidates[i].label or 0.0) for i in indices]


class _OfPassages(Task):
    """A prompt for each passage."""

    def prompts(self, labels: Labels, indices: Sequence[int]) -> list[Prompt]:
        request = labels.candidate_list
        return [self.template.prompt(request.query, request.candidates[i]) for i in indices]


class _OfLists(Task):
    """One prompt over all passages."""

    def prompts(self, labels: Labels, indices: Sequence[int]) -> list[Prompt]:
        return [prompt_over(self.template, labels.candidate_list, indices, self.settings.passage_words)]

    def rewards(
        self, labels: Labels, indices: Sequence[int], answers: Sequence[Sequence[Answer]]
    ) -> list[list[Reward]]:
        names, gains = self.template.identifiers(len(indices)), gains_of(labels, indices)
        teacher = [labels.scores[i] for i in indices]
        prefill = self.template.prefill
        return [[self.worth(prefill + a.value, names, gains, teacher, a.cut_off) for a in answers[0]]]

    def worth(
        self, text: str, names: Sequence[str], gains: Sequence[float], teacher: Sequence[float], cut_off: bool
    ) -> Reward:
        raise NotImplementedError  # abstract


class ProRankTask(_OfPassages):
    """Is this passage relevant?"""

    method = "yes_no"
    answers_at_once = True

    def rewards(
        self, labels: Labels, indices: Sequence[int], answers: Sequence[Sequence[Answer]]
    ) -> list[list[Reward]]:
        relevant, other = (label.strip() for label in self.template.labels)
        return [
            [rewards.relevance_reward(a.value, (relevant, other), gain > 0) for a in of_passage]
            for gain, of_passage in zip(gains_of(labels, indices), answers, strict=True)
        ]


class ERankTask(_OfPassages):
    """How relevant is this passage, 0 to 10?"""

    method = "erank"

    def rewards(
        self, labels: Labels, indices: Sequence[int], answers: Sequence[Sequence[Answer]]
    ) -> list[list[Reward]]:
        integers = [[self._integer(a) for a in of_passage] for of_passage in answers]
        relevant = [gain > 0 for gain in gains_of(labels, indices)]
        references = [labels.scores[i] for i in indices]
        values = rewards.integer_rewards(integers, relevant, references, self.settings.penalty)
        return [
            [Reward(value=v, well_formed=s is not None) for v, s in zip(row, scores, strict=True)]
            for row, scores in zip(values, integers, strict=True)
        ]

    def _integer(self, answer: Answer) -> float | None:
        text = self.template.prefill + answer.value
        score = parse_score(text, low=0, high=rewards.HIGHEST_GRADE, cut_off=answer.cut_off).score
        return score if score is not None and not answer.cut_off and score.is_integer() else None


class RankR1Task(_OfLists):
    """Which passage is the most relevant?"""

    method = "rank_r1"

    def worth(self, text, names, gains, teacher, cut_off) -> Reward:
        best = [i for i, gain in enumerate(gains) if gain == max(gains)]
        return rewards.choice_reward(text, names, best, reasoning=self.settings.reasoning, cut_off=cut_off)


class ReasonRankTask(_OfLists):
    """In what order are the passages relevant?"""

    method = "rank_gpt"

    def worth(self, text, names, gains, teacher, cut_off) -> Reward:
        reference = sorted(range(len(teacher)), key=lambda i: -teacher[i])
        reasoning = self.settings.reasoning
        return rewards.permutation_reward(text, names, gains, reference, reasoning=reasoning, cut_off=cut_off)


class GroupRankTask(_OfLists):
    """How relevant are the passages, 0 to 10 each?"""

    method = "group_rank"

    def worth(self, text, names, gains, teacher, cut_off) -> Reward:
        return rewards.grades_reward(text, names, gains, cut_off=cut_off)


_TASKS: dict[str, type[Task]] = {
    "prorank": ProRankTask,
    "erank": ERankTask,
    "rank_r1": RankR1Task,
    "reason_rank": ReasonRankTask,
    "group_rank": GroupRankTask,
}


def make_task(settings: RewardSettings) -> Task:
    """Raises `ConfigError` when the template is not there, or is written for another method."""
    return _TASKS[settings.kind](settings)
