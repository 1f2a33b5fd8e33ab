"""A trained student to hand on: one folder, loadable elsewhere, with a model card (`rerank-ray export`)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Literal

import yaml
from safetensors import SafetensorError

from rerank_ray import storage
from rerank_ray.errors import ConfigError, ModelError
from rerank_ray.models.student import Student, load_student
from rerank_ray.models.student.base import description_of
from rerank_ray.models.student.flagembedding import write_flagembedding
from rerank_ray.models.student.onnx import export_onnx
from rerank_ray.models.student.t5_encoder import T5EncoderStudent
from rerank_ray.runs import CONFIG, STATE
from rerank_ray.settings.models import LayerwiseSettings, ModelSettings

Form = Literal["transformers", "onnx", "flagembedding-layerwise"]
CARD = "README.md"
_MODEL_FILE = "config.json"
"""In every export, and in every other folder that transformers reads."""


def export(student: str, out: str, *, form: Form, layer: int | None, int8: bool, overwrite: bool) -> None:
    """Write a student to `out` with a model card; a layer-wise one is cut to an ordinary cross-encoder, unless the form
    is a layer-wise one.

    Args:
        student: its folder; where it lies in its distillation run, the card tells of that too.
        form: `transformers` is a folder for `from_pretrained` (students with a linear head load as
            `AutoModelForSequenceClassification` and as sentence-transformers' `CrossEncoder`, the others by
            `rerank_ray`); `onnx` adds `model.onnx` in place of the weights; `flagembedding-layerwise` is a folder for
            FlagEmbedding's LayerWiseFlagLLMReranker, all layers' heads included.
        layer: the layer of a layer-wise student to end at; None is the last.
        int8: of onnx, weights as 8-bit integers.

    Raises:
        ConfigError: not a student, OUT is in the way or holds other things than a model, int8 of another form, or the
            extra `onnx` is missing.
        ModelError: the student has no head on that layer, or its architecture can't be exported in this form.
        RunError: OUT can't be written.
    """
    student = str(description_of(student).parent)
    if int8 and form != "onnx":
        raise ConfigError("--int8 is of --format onnx; the weights of transformers' folders stay as they are")
    folder = storage.local_path(out)
    if folder is None:
        raise ConfigError(f"{out}: an export is written to this machine's disk: name a folder, and copy it from there")
    _check_replaceable(folder, Path(student), overwrite=overwrite)
    model = load_student(ModelSettings(path=student))
    if form == "onnx" and model.reads_lists:
        raise ModelError(
            f"{student}: --format onnx writes a graph of single pairs, and the scores of a student with head "
            f"{model.description.head} depend on the whole list: use --format transformers"
        )
    last = model.layers[-1] if layer is None else layer
    if layer is not None or (len(model.layers) > 1 and form != "flagembedding-layerwise"):
        model = model.truncated(last, alone=form != "flagembedding-layerwise")
    # Beside OUT until it is whole, so that what stands there is never half an export.
    partial, before = (folder.with_name(f"{folder.name}.{what}") for what in ("partial", "before"))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with storage.writing(out):
            _write(model, partial, form, int8)
        # Now it is known that the form can hold this student.
        card = _card(model, Path(student), form, int8)
        with storage.writing(out):
            (partial / CARD).write_text(card)
            if folder.exists():
                shutil.rmtree(before, ignore_errors=True)
                folder.rename(before)
            partial.rename(folder)
        shutil.rmtree(before, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(model: Student, folder: Path, form: Form, int8: bool) -> None:
    try:
        if form == "flagembedding-layerwise":
            write_flagembedding(model, folder)
        else:
            model.save(folder)
    except SafetensorError as error:
        # What the system refuses it does not raise as the system's error.
        raise OSError(error) from error
    if form == "onnx":
        export_onnx(model, folder, int8=int8)
        for weights in (*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")):
            weights.unlink()


def _check_replaceable(folder: Path, student: Path, *, overwrite: bool) -> None:
    """Raise `ConfigError` unless the folder is not there, or may be deleted: it is empty, or a model that was saved."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"{folder}: is a file: name a folder that the export may make")
    if student.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"{folder}: holds the student itself ({student}), which would be deleted: name another folder"
        )
    if not overwrite:
        raise ConfigError(f"{folder}: is there already; --overwrite replaces it")
    if any(folder.iterdir()) and not (folder / _MODEL_FILE).is_file():
        raise ConfigError(
            f"{folder}: holds no earlier export: it has no {_MODEL_FILE}, and --overwrite would delete what is there: "
            "name another folder, or empty this one"
        )


def _card(model: Student, student: Path, form: Form, int8: bool) -> str:
    description = model.description
    first, last = description.layers[0], description.layers[-1]
    layers = f"layer {last}" if first == last else f"layers {first} to {last}"
    parts = [
        f"# {student.resolve().parent.name}",
        f"A reranker with a `{description.head}` head on {layers}, "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters, for queries of up to "
        f"{description.max_query_length} tokens and {description.max_length} tokens with the document. Higher is more "
        f"relevant; scores of different {'lists' if model.reads_lists else 'queries'} do not compare.",
        _usage(model, form, int8),
    ]
    run = student.parent
    if (run / STATE).exists() and (run / CONFIG).exists():
        parts.append(_training(json.loads((run / STATE).read_text()), (run / CONFIG).read_text()))
    return "\n\n".join(parts) + "\n"


def _usage(model: Student, form: Form, int8: bool) -> str:
    if form == "onnx":
        kind = "with 8-bit weights" if int8 else "in float32"
        return (
            f"## Use\n\n`model.onnx`, {kind}, takes padded batches as `rerank_ray.models.student` encodes them and "
            "gives `scores`."
        )
    description = model.description
    if form == "flagembedding-layerwise":
        return _flagembedding_usage(model)
    if description.head == "linear" and description.instruction is None and not isinstance(model, T5EncoderStudent):
        pair = f'("{description.query_prefix}query", "{description.document_prefix}document")'
        return (
            "## Use\n\n```python\nfrom sentence_transformers import CrossEncoder\n\n"
            f'CrossEncoder("FOLDER").predict([{pair}])\n```'
        )
    return (
        "## Use\n\n```yaml\nranker: {method: cross_encoder, model: {kind: cross_encoder, path: FOLDER, max_length: "
        f"{description.max_length}}}}}\n```\n\nin a config of `rerank-ray rerank`."
    )


def _flagembedding_usage(model: Student) -> str:
    description, pairs = model.description, model.instructed
    last = description.layers[-1]
    # What FlagEmbedding adds to `max_length` before it cuts the document, and after.
    around = 2 * (len(pairs.separator) + len(pairs.instruction))
    arguments = {
        "cutoff_layers": [last],
        "query_max_length": description.max_query_length,
        "max_length": description.max_length - around,
        "prompt": description.instruction,
    }
    given = "".join(f",\n    {name}={value!r}" for name, value in arguments.items())
    ours = {"kind": "layerwise", "path": "FOLDER", "max_length": description.max_length, "exit_layer": last}
    if description.instruction != LayerwiseSettings.model_fields["instruction"].default:
        ours["instruction"] = description.instruction
    config = yaml.safe_dump({"ranker": {"method": "cross_encoder", "model": ours}}, sort_keys=False, width=120).strip()
    return (
        "## Use\n\nWith FlagEmbedding, whose layer-wise reader needs transformers 4; `cutoff_layers` chooses the "
        "layer:\n\n```python\nfrom FlagEmbedding import LayerWiseFlagLLMReranker\n\n"
        f'reranker = LayerWiseFlagLLMReranker(\n    "FOLDER"{given},\n)\n'
        'reranker.compute_score([("query", "document")])\n```\n\n'
        f"With rerank_ray:\n\n```yaml\n{config}\n```\n\nScores are the same for pairs that fit; longer ones are cut "
        "some tokens apart."
    )


def _training(state: dict, config: str) -> str:
    """What the run folder tells: data, teachers, the kept step and its metrics, versions, and the whole config."""
    settings = yaml.safe_load(config)
    counts, best = state.get("counts", {}), state.get("best") or {}
    losses = " + ".join(f"{term['weight']:g} · {term['loss']}" for term in settings["objective"]["losses"])
    facts = {
        "started from": settings["student"]["base"],
        "labels": ", ".join(f"{uri} (fingerprint {print_})" for uri, print_ in state.get("inputs", {}).items()),
        "teacher": ", ".join(state.get("teachers", ())),
        "queries": ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items()),
        "objective": losses,
        "kept step": f"{best.get('step')} of {best.get('total_steps')}",
        "nDCG@10 on held-out queries": f"{best.get('validation_ndcg@10', float('nan')):.4f} (gains: "
        f"{settings['validation']['gains']})",
        "versions": ", ".join(f"{name} {version}" for name, version in state.get("versions", {}).items()),
    }
    table = "\n".join(["|  |  |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items() if value)])
    return f"## Training\n\n{table}\n\n```yaml\n{config.strip()}\n```"
