"""What training starts from: labels that can serve it, opened, and a student, each checked before a step is taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rerank_ray.distill import checkpoints
from rerank_ray.distill.labels import LabelSet
from rerank_ray.distill.targets import check_objective
from rerank_ray.errors import InputError
from rerank_ray.models.student import Student, StudentPrompt, adapt, load_student, new_student
from rerank_ray.prompts.render import Template, load_template
from rerank_ray.settings.distill import DistillSettings
from rerank_ray.settings.student import PROMPTED_HEADS, StudentSettings


def check_labels(data: LabelSet, settings: DistillSettings) -> None:
    """Refuse labels that can't serve these settings, before anything is trained.

    Raises:
        InputError: as `check_objective`; or no held-out query has a known gain to validate on; or queries have
            instructions of their own, which the student's prompt would not show.
    """
    check_objective(data, settings.objective)
    if settings.validation.gains == "labels":
        data.require_held_out_gains(settings.input, "set validation.gains to teacher")
    student = settings.student
    if data.with_instruction and student.head in PROMPTED_HEADS and "{instruction}" in _template(student).text:
        raise InputError(
            f"{', '.join(settings.input)}: {data.with_instruction} training queries have an instruction of their own; "
            f"a student with head {student.head} keeps its template's one, so teacher and student would read different "
            "prompts: leave 'instruction' out of the candidates and write it into the template"
        )


def open_label_set(settings: DistillSettings) -> LabelSet:
    """The labels and the texts beside them; reads all of the files."""
    warming = settings.student.exit_warm_up
    texts = warming.texts if warming else ()
    return LabelSet.open(settings.input, settings.validation.fraction, settings.seed, texts)


def with_inputs(settings: DistillSettings, change: Callable[[str], str]) -> DistillSettings:
    """The settings with the URIs of their labels and texts changed."""
    student = settings.student
    if student.exit_warm_up is not None:
        texts = tuple(change(uri) for uri in student.exit_warm_up.texts)
        student = student.model_copy(update={"exit_warm_up": student.exit_warm_up.model_copy(update={"texts": texts})})
    return settings.model_copy(update={"input": [change(uri) for uri in settings.input], "student": student})


def check_student(settings: StudentSettings) -> None:
    """Find what config and tokenizer can tell of a student that can't be started, without reading a weight.

    Raises:
        ConfigError: no such prompt, or a bad one.
        ModelError: the model is missing, can't carry the head, or lacks the layers that are asked for.
    """
    adapt(new_student(settings, student_prompt(settings), weights=False), settings)


def first_student(settings: StudentSettings, resume: Path | None) -> Student:
    """The student that training starts from: new, or as the checkpoint has it.

    Raises:
        As `check_student`.
    """
    # A checkpoint's folder has LoRA merged into the weights; the adapters are in the trainer's state.
    if resume is not None and settings.lora is None:
        saved = {"path": str(resume / checkpoints.STUDENT), "revision": None}
        student = load_student(settings.model_settings().model_copy(update=saved))
    else:
        student = new_student(settings, student_prompt(settings))
    adapt(student, settings)
    # Read from a file, weights begin anywhere in memory, and a product's last bit can hang on where.
    for parameter in student.parameters():
        parameter.data = parameter.data.clone()
    return student


def prompt_digest(settings: StudentSettings) -> dict[str, str]:
    """What a resumed run must find again: the template, by name, of a student that is asked a prompt."""
    return {f"prompt {settings.prompt}": _template(settings).digest} if settings.head in PROMPTED_HEADS else {}


def _template(settings: StudentSettings) -> Template:
    return load_template(settings.prompt, "yes_no")


def student_prompt(settings: StudentSettings) -> StudentPrompt | None:
    """The template as the student keeps it: its instruction is part of it, and the labels are what it is scored by.

    Raises:
        ConfigError: no such template, or a bad one.
    """
    if settings.head not in PROMPTED_HEADS:
        return None
    template = _template(settings)
    return StudentPrompt(
        text=template.text.replace("{instruction}", template.instruction),
        system=template.system,
        chat=template.chat,
        prefill=template.prefill,
        labels=template.labels if settings.head == "yes_no" else (settings.token,),
    )
