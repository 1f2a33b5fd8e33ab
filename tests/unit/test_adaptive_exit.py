"""Adaptive exits: the scores of a list are those of the layer that it left at, and settled lists cost nothing more."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fixtures.rows import label_row, make_list, write_labels
from fixtures.students import DOCUMENTS, QUERIES, exit_of, scores, start, stirred
from fixtures.tiny_models import tiny_bert_folder
from hypothesis import given
from hypothesis import strategies as st

from rerank_ray import cli
from rerank_ray.calibrate_exit import calibrate_exit
from rerank_ray.distill.labels import LabelSet
from rerank_ray.errors import ConfigError, InputError, ModelError
from rerank_ray.models.adaptive_exit import AdaptiveExit, exit_uncertainty
from rerank_ray.models.cross_encoder import CrossEncoder
from rerank_ray.models.engine import BatchRunner, group_in_order
from rerank_ray.models.student import Student
from rerank_ray.ranking.rankers import Ranker
from rerank_ray.records import Candidate, CandidateList, Query
from rerank_ray.schema import LABELS, read_rows
from rerank_ray.settings.distill import DistillSettings
from rerank_ray.settings.models import CrossEncoderSettings
from rerank_ray.settings.rankers import CrossEncoderRankerSettings

LISTS = [DOCUMENTS, DOCUMENTS[2:5], ["cat"], ["dog of beta", "the cat", "zeta"], list(reversed(DOCUMENTS))]
ASKED = ["cat", "the dog of beta", "alpha", "iota", "alpha query"]
KINDS = ["linear", "similarity", "branched", "decoder"]


@pytest.fixture(params=KINDS)
def student(request: pytest.FixtureRequest, tiny_bert: Path, tiny_llama: Path, tmp_path: Path) -> Student:
    """Heads on all layers, or on those above the ones that all exits share."""
    if request.param == "decoder":
        return stirred(start(tiny_llama, "linear", layers=(1, 2)))
    if request.param == "branched":
        exits = {"layers": (2, 3, 4), "branch_layers": 1}
        deep_bert = tiny_bert_folder(tmp_path / "deep", layers=4)
        return stirred(start(deep_bert, "similarity", gate=-1.0, scale=4.0, interaction=1.0, **exits))
    return stirred(start(tiny_bert, request.param, layers=(1, 2, 3), gate=-1.0, scale=4.0, interaction=1.0))


def run(student: Student, thresholds: list[float], tokens_per_batch: int = 256):
    adaptive = AdaptiveExit(student, thresholds)
    lists = [student.encode([q] * len(d), d) for q, d in zip(ASKED, LISTS, strict=True)]
    runner = BatchRunner(tokens_per_batch, torch.device("cpu"))
    return adaptive.run(lists, runner), runner


def expected_scores(student: Student) -> list[torch.Tensor]:
    """Of each list, [layers, documents]."""
    return [scores(student, [q] * len(d), d) for q, d in zip(ASKED, LISTS, strict=True)]


def test_a_list_has_the_scores_of_the_layer_that_it_leaves_at(student: Student):
    """Thresholds between the lists' own uncertainties, so that some leave at every layer."""
    by_layer = expected_scores(student)
    early = [[exit_uncertainty(s.tolist()) for s in of_list[:-1]] for of_list in by_layer]
    low, high = sorted(row[0] for row in early)[1:3]
    first = (low + high) / 2
    thresholds = [first, *(0.0 for _ in student.layers[1:-1])]
    results, _ = run(student, thresholds)
    exits = [exit_of(row, thresholds) for row in early]
    assert len(set(exits)) > 1
    for (found, layer), exit_number, of_list in zip(results, exits, by_layer, strict=True):
        assert layer == student.layers[exit_number]
        torch.testing.assert_close(torch.tensor(found), of_list[exit_number], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("threshold", [-1.0, 1.0])
def test_all_or_none_go_to_the_end(student: Student, threshold: float):
    """And how the pairs are batched, or split into parts, makes no difference."""
    expected = [of_list[-1 if threshold < 0 else 0] for of_list in expected_scores(student)]
    for tokens in (64, 100_000):
        results, runner = run(student, [threshold] * (len(student.layers) - 1), tokens)
        assert {layer for _, layer in results} == {student.layers[-1] if threshold < 0 else student.layers[0]}
        for (found, _), one in zip(results, expected, strict=True):
            torch.testing.assert_close(torch.tensor(found), one, atol=1e-4, rtol=1e-4)
        once = sum(
            len(e["input_ids"]) for q, d in zip(ASKED, LISTS, strict=True) for e in student.encode([q] * len(d), d)
        )
        assert runner.stats.tokens == once * (len(student.layers) if threshold < 0 else 1)


@given(st.lists(st.lists(st.integers(1, 30), max_size=5), max_size=8), st.integers(1, 60))
def test_parts_hold_every_list_once_and_no_more_than_the_limit(lengths: list[list[int]], limit: int):
    parts = group_in_order([sum(of_list) for of_list in lengths], limit)
    assert [i for part in parts for i in part] == list(range(len(lengths)))
    for part in parts:
        assert len(part) == 1 or sum(sum(lengths[i]) for i in part) <= limit


def test_layers_that_cannot_be_computed_apart_are_refused(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch):
    from rerank_ray.models import adaptive_exit

    student = stirred(start(tiny_bert, "linear", layers=(1, 3)))
    monkeypatch.setattr(adaptive_exit._Held, "forward", lambda self, hidden, *_, **__: hidden)
    with pytest.raises(ModelError, match=r"its layers can't be computed apart.*use a fixed exit_layer"):
        AdaptiveExit(student, [0.5])


# From calibration to rankings


def teachable(number: int, size: int = 12) -> CandidateList:
    random = np.random.default_rng(number)
    candidates = tuple(
        Candidate(doc_id=f"d{i}", text=" ".join(random.choice(DOCUMENTS[1].split() + QUERIES[2].split(), 6)))
        for i in range(size)
    )
    return CandidateList(query=Query(query_id=f"q{number}", text=str(random.choice(QUERIES))), candidates=candidates)


@pytest.fixture
def calibrated(tiny_bert: Path, tmp_path: Path) -> tuple[Path, str]:
    """A layer-wise student, and labels by its own last layer."""
    student = stirred(start(tiny_bert, "similarity", layers=(1, 2, 3), gate=-1.0, scale=4.0, interaction=1.0))
    student.save(tmp_path / "student")
    rows = []
    for number in range(16):
        request = teachable(number)
        texts = [c.text for c in request.candidates]
        rows.append(label_row(request, scores(student, [request.query.text] * len(texts), texts)[-1].tolist()))
    return tmp_path / "student", write_labels(tmp_path / "labels", rows)


def test_calibration_is_kept_by_the_ranker(calibrated: tuple[Path, str], capsys: pytest.CaptureFixture):
    """On the lists that it was found on: the shares that leave at each layer, and scores of just those layers."""
    folder, labels = calibrated
    with pytest.raises(ModelError, match=r"exit_layer: adaptive: the student has no thresholds.*calibrate-exit"):
        CrossEncoder(CrossEncoderSettings(path=str(folder), exit_layer="adaptive"))
    assert cli.main(["calibrate-exit", str(folder), "--labels", labels, "--max-loss", "0.1"]) == 0
    told = capsys.readouterr().out
    assert "of 16 lists leave" in told
    report = calibrate_exit(str(folder), labels, 0.1)
    assert report.ndcg[-1] == pytest.approx(1.0, abs=0.01)
    assert report.calibration.loss_bound <= 0.1
    assert json.loads((folder / "student.json").read_text())["exit_thresholds"] == list(report.calibration.thresholds)
    model = CrossEncoderSettings(path=str(folder), exit_layer="adaptive", dtype="float32")
    ranker = Ranker(CrossEncoderRankerSettings(model=model))
    assert ranker.name.endswith(":layer=adaptive")
    requests = [teachable(n) for n in range(16)]
    outcomes = ranker.rank([*requests, CandidateList(query=Query(query_id="none", text="cat"), candidates=())])
    assert outcomes[-1].error == "no candidate could be scored"
    left = [sum(o.scores.exit_layer == n for o in outcomes[:-1]) / 16 for n in (1, 2, 3)]
    # The calibration ran in the device's own precision, which may move a list across a threshold.
    np.testing.assert_allclose(left, report.calibration.left, atol=0.13)
    assert 0 < left[2] < 1
    for request, outcome in zip(requests, outcomes, strict=False):
        fixed = Ranker(
            CrossEncoderRankerSettings(model=model.model_copy(update={"exit_layer": outcome.scores.exit_layer}))
        )
        assert outcome.scores.scores == pytest.approx(fixed.rank([request])[0].scores.scores, abs=1e-4)


def test_the_lists_that_the_distillation_held_out(calibrated: tuple[Path, str], tmp_path: Path):
    """A quarter of 16 queries, by the run's own split; beside no run, lists have to be named."""
    folder, labels = calibrated
    with pytest.raises(ConfigError, match=r"not a distillation run: name held-out lists with --labels"):
        calibrate_exit(str(folder), None, 0.2)
    settings = DistillSettings.model_validate(
        {"input": [labels], "student": {"base": "x", "head": "similarity"}, "validation": {"fraction": 0.25}, "seed": 3}
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    held_out = LabelSet.open([labels], 0.25, 3).validation
    report = calibrate_exit(str(folder), None, 0.2)
    assert report.lists == len(held_out) >= 2
    names = {row.candidate_list.query.query_id for row in LabelSet.open([labels], 0.25, 3).reader().read(held_out)}
    rows = [row for row in read_rows(labels, LABELS.names) if row["query_id"] in names]
    chosen = write_labels(tmp_path / "chosen", rows)
    assert calibrate_exit(str(folder), chosen, 0.2).ndcg == pytest.approx(report.ndcg)


def test_what_cannot_be_calibrated(calibrated: tuple[Path, str], tiny_bert: Path, tmp_path: Path):
    folder, labels = calibrated
    with pytest.raises(ConfigError, match=r"--max-loss -1"):
        calibrate_exit(str(folder), labels, -1.0)
    with pytest.raises(ConfigError, match=r"not a student of ours: it has no student.json"):
        calibrate_exit(str(tiny_bert), labels, 0.1)
    start(tiny_bert, "linear").save(tmp_path / "flat")
    with pytest.raises(ConfigError, match="a head on its last layer alone"):
        calibrate_exit(str(tmp_path / "flat"), labels, 0.1)
    unjudged = write_labels(tmp_path / "unjudged", [label_row(make_list(size=3), [1.0, 2.0, 3.0])])
    with pytest.raises(InputError, match=r"0 lists have a gain \(labels\)"):
        calibrate_exit(str(folder), unjudged, 0.1, gains="labels")


def test_a_truncated_student_has_no_thresholds(calibrated: tuple[Path, str]):
    from fixtures.students import load

    folder, labels = calibrated
    calibrate_exit(str(folder), labels, 0.2)
    short = load(folder).truncated(2, alone=True)
    assert short.layers == (2,)
    assert short.description.exit_thresholds is None
    torch.testing.assert_close(scores(short), scores(load(folder))[1:2], atol=1e-5, rtol=1e-5)
