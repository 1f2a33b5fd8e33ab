"""What can not be trained is found out before anything expensive."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from importlib import resources
from pathlib import Path

import pytest
from fixtures.rows import write_labels
from fixtures.teachable import settings, teachable
from rich.console import Console
from transformers import MBartConfig

from rerank_ray.distill.labels import LabelSet
from rerank_ray.distill.parallel import World, check_installed
from rerank_ray.distill.start import check_labels, check_student
from rerank_ray.distill.train import Trainer
from rerank_ray.errors import ConfigError, InputError, ModelError, RunError
from rerank_ray.execution import training_jobs
from rerank_ray.settings.distill import DistillExecutionSettings, DistillSettings
from rerank_ray.settings.rationale import RationaleSettings
from rerank_ray.settings.reinforce import ReinforceSettings
from rerank_ray.settings.student import StudentSettings


def test_labels_that_were_opened_are_not_opened_again(labels: str, tiny_bert: Path, monkeypatch):
    """The driver digests the files once, for all workers; what a worker reads of them is the same."""
    chosen = settings(labels, tiny_bert)
    opened = LabelSet.open([labels], chosen.validation.fraction, chosen.seed)
    rows = [row for row, _ in Trainer(chosen, World(), None).step_data(0).groups]
    monkeypatch.setattr(LabelSet, "open", None)
    assert [row for row, _ in Trainer(chosen, World(), None, opened).step_data(0).groups] == rows


def without_weights(model: Path, tmp_path: Path) -> Path:
    """A copy of a model's folder that can't be loaded: its weights are an empty file."""
    base = shutil.copytree(model, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    (base / "model.safetensors").touch()
    return base


WRONG_STUDENTS = {
    "head": ({"head": "yes_no"}, "no language model that goes on with a text"),
    "layers": ({"layers": [1, 5]}, "give ascending layers of 1..3 that end with 3"),
    "take_layers": ({"take_layers": [2, 4]}, "give ascending layers of 1..3"),
    "LoRA target": ({"lora": {"target_modules": ["q_proj"]}}, "no linear layer is called 'q_proj'"),
    "freeze": ({"freeze": {"layers": 4}}, "the model has 3 layers"),
    "max_length": ({"max_length": 1000}, "the model ends at 128 tokens"),
}


@pytest.mark.parametrize("wrong", WRONG_STUDENTS)
def test_a_student_that_can_not_be_is_found_out_without_its_weights(tiny_bert: Path, tmp_path: Path, wrong: str):
    base = without_weights(tiny_bert, tmp_path)
    changes, message = WRONG_STUDENTS[wrong]
    with pytest.raises(ModelError, match=message):
        check_student(StudentSettings(base=str(base), **({"max_length": 32, "max_query_length": 8} | changes)))


def test_a_seq2seq_model_whose_answers_begin_with_a_language_has_no_prompted_head(tiny_t5: Path, tmp_path: Path):
    base = without_weights(tiny_t5, tmp_path)
    MBartConfig(d_model=16).save_pretrained(base)
    for head in ("yes_no", "token_logit"):
        with pytest.raises(ModelError, match=f"{base}: a mbart has no token that every answer begins with"):
            check_student(StudentSettings(base=str(base), head=head))


RIGHT_STUDENTS = {
    "linear, layer-wise": {"layers": [1, 3], "gradient_checkpointing": True},
    "similarity": {"head": "similarity", "layers": [2, 3]},
    "bi-encoder": {"head": "bi_encoder", "take_layers": 2},
    "DoRA": {"lora": {"rank": 2, "dora": True}},
    "frozen": {"freeze": {"embeddings": True, "layers": 1}},
    "T5, mvp": {"head": "mvp", "max_length": 64, "freeze": {"embeddings": True}},
    "decoder": {"head": "linear"},
    "decoder, yes_no": {"head": "yes_no", "max_length": 128, "lora": {}},
}


@pytest.mark.parametrize("right", RIGHT_STUDENTS)
def test_a_student_that_can_be_passes_without_its_weights(
    tiny_bert: Path, tiny_llama: Path, tiny_t5: Path, tmp_path: Path, right: str
):
    model = {"decoder": tiny_llama, "T5": tiny_t5}.get(right.partition(",")[0], tiny_bert)
    base = without_weights(model, tmp_path)
    settings = {"max_length": 32, "max_query_length": 8} | RIGHT_STUDENTS[right]
    check_student(StudentSettings(base=str(base), **settings))


def test_labels_with_instructions_are_not_for_a_student_with_one(tmp_path: Path, tiny_bert: Path):
    """The teacher read the row's instruction; the student would read its template's."""
    rows = [teachable(i) | {"instruction": "find plants"} for i in range(12)]
    chosen = settings(write_labels(tmp_path / "labels", rows), tiny_bert)
    data = LabelSet.open(chosen.input, chosen.validation.fraction, chosen.seed)
    check_labels(data, chosen)
    for prompt, refused in (("monot5", False), ("yes_no", True)):
        student = chosen.student.model_copy(update={"head": "yes_no", "prompt": prompt})
        with pytest.raises(InputError, match="have an instruction of their own") if refused else nullcontext():
            check_labels(data, chosen.model_copy(update={"student": student}))


def test_zero_without_deepspeed_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_installed(DistillExecutionSettings())
    with pytest.raises(ConfigError, match=r'zero2 needs the extra `deepspeed`: pip install "rerank_ray\[deepspeed\]"'):
        check_installed(DistillExecutionSettings(strategy="zero2"))


WRONG_STRATEGIES = {
    "offload": ({"execution": {"offload": True}}, "offload moves what ZeRO divides"),
    "elastic": (
        {"execution": {"strategy": "zero2", "workers": 2, "min_workers": 1}},
        "zero2's checkpoints are divided among 2 workers",
    ),
    "min_workers": ({"execution": {"workers": 2, "min_workers": 3}}, r"min_workers \(3\) is above workers \(2\)"),
    "averaging": (
        {"execution": {"strategy": "zero3"}, "optimizer": {"averaging": 0.9}},
        "optimizer.averaging keeps a second copy of all weights on every worker",
    ),
    "interpolation": (
        {"execution": {"strategy": "zero3"}, "validation": {"interpolation": [0.5]}},
        "validation.interpolation keeps a second copy of all weights on every worker",
    ),
    "interpolated adapters": (
        {"student": {"lora": {"rank": 2}}, "validation": {"interpolation": [0.5]}},
        "validation.interpolation is between weights, and student.lora trains adapters",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_STRATEGIES)
def test_what_does_not_go_together_is_refused(labels: str, tiny_bert: Path, wrong: str):
    changes, message = WRONG_STRATEGIES[wrong]
    content = settings(labels, tiny_bert).model_dump() | {"execution": {}}
    for section, values in changes.items():
        content[section] = content[section] | values
    with pytest.raises(ValueError, match=message):
        DistillSettings.model_validate(content)


def template(name: str, file: Path) -> Path:
    file.write_text((resources.files("rerank_ray.prompts") / "templates" / f"{name}.yaml").read_text())
    return file


def distilled(tmp_path: Path, labels: str, tiny_llama: Path, prompt: Path) -> Callable[[], object]:
    student = {"base": str(tiny_llama), "head": "yes_no", "prompt": str(prompt), "max_length": 128, "lora": {}}
    chosen = settings(labels, tiny_llama, student=student)
    return lambda: training_jobs.distill(chosen, str(tmp_path / "run"), Console(quiet=True))


def reinforced(tmp_path: Path, labels: str, tiny_llama: Path, prompt: Path) -> Callable[[], object]:
    chosen = ReinforceSettings.model_validate(
        {
            "input": [labels],
            "policy": {"base": str(tiny_llama), "max_length": 128},
            "reward": {"kind": "prorank", "prompt": str(prompt)},
        }
    )
    return lambda: training_jobs.reinforce(chosen, str(tmp_path / "run"), Console(quiet=True))


def told(tmp_path: Path, labels: str, tiny_llama: Path, prompt: Path) -> Callable[[], object]:
    chosen = RationaleSettings.model_validate(
        {
            "policy": {"base": str(tiny_llama), "max_length": 128},
            "terms": [{"kind": "score", "input": [labels], "prompt": str(prompt)}],
        }
    )
    return lambda: training_jobs.distill_rationales(chosen, str(tmp_path / "run"), Console(quiet=True))


@pytest.mark.parametrize(("job", "name"), [(distilled, "yes_no"), (reinforced, "prorank"), (told, "yes_no")])
def test_training_does_not_go_on_with_another_prompt(
    labels: str, tiny_llama: Path, tmp_path: Path, monkeypatch, job: Callable, name: str
):
    """The config says the same; what is in the file that it names does not. Its last steps would learn another task."""

    class Training(Exception):
        """Everything was checked, and training began."""

    def begin(*_, **__):
        raise Training

    monkeypatch.setattr("rerank_ray.execution.train.train_student", begin)
    monkeypatch.setattr("rerank_ray.execution.policy.train_policy", begin)
    prompt = template(name, tmp_path / "mine.yaml")
    start = job(tmp_path, labels, tiny_llama, prompt)
    for _ in range(2):
        with pytest.raises(Training):
            start()
    prompt.write_text(prompt.read_text() + "\ninstruction: Find another thing.\n")
    with pytest.raises(RunError, match=rf"content of input prompt {prompt}: '\w+' -> '\w+'"):
        start()
