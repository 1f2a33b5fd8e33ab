"""Training data from the command line and as a pipeline's step."""

from __future__ import annotations

import inspect
import json
import typing
from pathlib import Path

from rerank_ray.cli import main
from rerank_ray.execution.pipeline import INGESTS, ingest
from rerank_ray.parquet import read_rows
from rerank_ray.schema import LABELS
from rerank_ray.settings.pipeline import IngestSettings, TevatronIngestSettings


def test_labels_from_the_command_line_and_back_and_as_a_step(tmp_path: Path, console):
    lines = [{"query": f"q{i}", "pos": ["a"], "neg": ["b"], "pos_scores": [i], "neg_scores": [0]} for i in range(3)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    labels, back = str(tmp_path / "labels"), str(tmp_path / "back.jsonl")
    assert main(["ingest", "flagembedding", str(tmp_path / "train.jsonl"), "--out", labels]) == 0
    assert [row["scores"] for row in read_rows(labels, LABELS.names)] == [[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]]
    assert main(["convert", labels, "--format", "tevatron", "--out", back]) == 0
    run = ingest(TevatronIngestSettings(kind="tevatron", files=[back]), str(tmp_path / "run"), console)
    assert [row["teacher"] for row in read_rows(run.data, LABELS.names)] == ["gains:back.jsonl"] * 3


def test_every_kind_of_ingest_can_be_a_step():
    """Its settings are arguments of its function."""
    kinds = {}
    for model in typing.get_args(typing.get_args(IngestSettings)[0]):
        (kind,) = typing.get_args(model.model_fields["kind"].annotation)
        kinds[kind] = set(model.model_fields) - {"kind"}
    assert kinds.keys() == INGESTS.keys()
    for kind, names in kinds.items():
        assert names <= set(inspect.signature(INGESTS[kind]).parameters), kind
