"""The jobs that train: distil, reinforce, distil rationales, each from settings to a finished run folder."""

from __future__ import annotations

import time

from rich.console import Console

from rerank_ray.distill.parallel import check_installed
from rerank_ray.distill.start import check_labels, check_student, open_label_set, prompt_digest, with_inputs
from rerank_ray.models.resolve import ask_hub, resolve
from rerank_ray.runs import RunFolder, resolve_input
from rerank_ray.settings.distill import DistillSettings
from rerank_ray.settings.rationale import RationaleSettings
from rerank_ray.settings.reinforce import ReinforceSettings


def distill(settings: DistillSettings, run_uri: str, console: Console) -> RunFolder:
    """Train a student: the run's `student/` holds the best step's."""
    from rerank_ray.execution.train import train_student, with_absolute_paths

    settings = with_inputs(settings, resolve_input)
    absolute = with_absolute_paths(settings)
    labels = open_label_set(absolute)
    base = ask_hub(resolve(settings.student.model_settings())).identity
    inputs = {"labels": labels.fingerprint, settings.student.base: base} | prompt_digest(settings.student)
    if labels.texts:
        inputs["texts"] = labels.texts.fingerprint
    check_labels(labels, absolute)
    check_installed(settings.execution)
    check_student(absolute.student)
    run = RunFolder(uri=run_uri)
    with run.locked():
        before = run.start("distill", settings, inputs, settings.execution.fixed)
        if before.get("state") == "done":
            console.print(f"{run_uri}: already done, student at {run.student}")
            return run
        started = time.monotonic()
        metrics = train_student(run, absolute, labels)
        counts = {
            "training_queries": len(labels.train),
            "validation_queries": len(labels.validation),
            "queries_without_labels": labels.unlabelled,
            "queries_without_scores": labels.unscored,
        }
        timings = {"seconds_of_last_start": round(time.monotonic() - started, 2)}
        run.update(state="done", counts=counts, teachers=labels.teachers, timings=timings, best=metrics)
    best = f"step {metrics['step']}, validation nDCG@10 {metrics['validation_ndcg@10']:.4f}"
    console.print(f"{run_uri}: student at {run.student} ({best}, {timings['seconds_of_last_start']:,.0f} s)")
    return run


def reinforce(settings: ReinforceSettings, run_uri: str, console: Console) -> RunFolder:
    """Train a language model on ranking rewards: the run's `student/` holds the best step's."""
    from rerank_ray.distill.grpo import open_labels
    from rerank_ray.distill.tasks import make_task
    from rerank_ray.execution.policy import with_absolute_paths

    settings = settings.model_copy(update={"input": [resolve_input(uri) for uri in settings.input]})
    template = make_task(settings.reward).template
    absolute = with_absolute_paths(settings)
    labels = open_labels(absolute)
    counts = {"training_queries": len(labels.train), "validation_queries": len(labels.validation)}
    digests = {"labels": labels.fingerprint, f"prompt {settings.reward.prompt}": template.digest}
    return _train_policy("reinforce", settings, absolute, labels, digests, counts, run_uri, console)


def distill_rationales(settings: RationaleSettings, run_uri: str, console: Console) -> RunFolder:
    """Train a language model on what teachers wrote: the run's `student/` holds the best step's."""
    from rerank_ray.distill.rationale import make_terms, open_terms
    from rerank_ray.distill.targets import term_names
    from rerank_ray.execution.policy import with_absolute_paths

    terms = [t.model_copy(update={"input": [resolve_input(uri) for uri in t.input]}) for t in settings.terms]
    settings = settings.model_copy(update={"terms": tuple(terms)})
    absolute = with_absolute_paths(settings)
    data = open_terms(absolute)
    named = dict(zip(term_names(t.kind for t in settings.terms), data, strict=True))
    digests = {name: labels.fingerprint for name, labels in named.items()}
    digests |= {f"prompt {term.settings.prompt}": term.template.digest for term in make_terms(settings)}
    counts = {
        name: {"training_queries": len(labels.train), "validation_queries": len(labels.validation)}
        for name, labels in named.items()
    }
    return _train_policy("distill-rationales", settings, absolute, data, digests, counts, run_uri, console)


def _train_policy(kind, settings, absolute, data, digests, counts, run_uri: str, console: Console) -> RunFolder:
    """What the jobs that train a language model share; `absolute` are the settings with paths that workers can use."""
    from rerank_ray.execution.policy import train_policy

    inputs = digests | {settings.policy.base: ask_hub(resolve(settings.policy.model_settings())).identity}
    run = RunFolder(uri=run_uri)
    with run.locked():
        before = run.start(kind, settings, inputs)
        if before.get("state") == "done":
            console.print(f"{run_uri}: already done, model at {run.student}")
            return run
        started = time.monotonic()
        metrics = train_policy(run, kind, absolute, data)
        timings = {"seconds_of_last_start": round(time.monotonic() - started, 2)}
        run.update(state="done", counts=counts, timings=timings, best=metrics)
    console.print(
        f"{run_uri}: model at {run.student} (step {metrics['step']}, {timings['seconds_of_last_start']:,.0f} s)"
    )
    return run
