"""Training of policies, language models that write, on Ray Train."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rerank_ray import storage
from rerank_ray.distill.grpo import GRPOTrainer
from rerank_ray.distill.labels import LabelSet
from rerank_ray.distill.metrics_log import policy_summary_line
from rerank_ray.distill.parallel import World
from rerank_ray.distill.rationale import RationaleTrainer
from rerank_ray.distill.train import Report
from rerank_ray.execution.train import absolute_if_there, absolute_template, fit, metrics_log, work
from rerank_ray.runs import RunFolder
from rerank_ray.settings.rationale import RationaleSettings
from rerank_ray.settings.reinforce import ReinforceSettings

# Each job's settings, what trains, and the metric whose highest value is kept.
_JOBS = {
    "reinforce": (ReinforceSettings, GRPOTrainer, "validation_reward"),
    "distill-rationales": (RationaleSettings, RationaleTrainer, "validation_score"),
}


def train_policy(
    run: RunFolder, kind: str, settings: ReinforceSettings | RationaleSettings, data: LabelSet | Sequence[LabelSet]
) -> dict:
    """Train a policy; returns the best step's metrics, whose model is copied to `student/`.

    The workers run in folders of their own: paths in `settings` and `data` are absolute (`with_absolute_paths`).

    Args:
        kind: the job.

    Raises:
        RunError: a worker failed more often than `execution.max_failures`.
    """
    config = {"kind": kind, "settings": settings.model_dump(mode="json"), "data": data}
    score = _JOBS[kind][2]
    return fit(
        run,
        _worker,
        config,
        settings.execution,
        score=score,
        summary=policy_summary_line,
    )


def _worker(config: dict) -> None:
    settings_class, trainer_class, _ = _JOBS[config["kind"]]
    settings = settings_class.model_validate(config["settings"])

    def loop(world: World, report: Report, resume: Path | None = None) -> None:
        trainer_class(settings, world, resume, config["data"]).run(report)

    work(config["run"], metrics_log(config["run"]), settings.execution, loop)


def with_absolute_paths(settings: ReinforceSettings | RationaleSettings) -> ReinforceSettings | RationaleSettings:
    """Ray Train's workers run in a folder of their own."""
    changes = {"policy": settings.policy.model_copy(update={"base": absolute_if_there(settings.policy.base)})}
    if isinstance(settings, ReinforceSettings):
        reward = settings.reward.model_copy(update={"prompt": absolute_template(settings.reward.prompt)})
        changes |= {"input": [storage.absolute(uri) for uri in settings.input], "reward": reward}
    else:
        terms = [
            term.model_copy(
                update={
                    "input": [storage.absolute(uri) for uri in term.input],
                    "prompt": absolute_template(term.prompt),
                }
            )
            for term in settings.terms
        ]
        changes["terms"] = tuple(terms)
    return settings.model_copy(update=changes)
