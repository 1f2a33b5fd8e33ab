"""Adaptive exits: scores are those that all layers give, merged, and who has left costs nothing more."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fixtures.rows import label_row, make_list, write_labels
from fixtures.students import DOCUMENTS, QUERIES, scores, start, stirred
from fixtures.tiny_models import tiny_bert_folder, tiny_encoder_folder
from hypothesis import given
from hypothesis import strategies as st
from transformers import DebertaV2Config, DebertaV2Model, ModernBertConfig, ModernBertModel

from rerank_ray import cli
from rerank_ray.calibrate_exit import _labelled, _measure, calibrate_exit
from rerank_ray.distill.labels import LabelSet
from rerank_ray.distill.targets import validation_ndcg
from rerank_ray.errors import ConfigError, InputError, ModelError
from rerank_ray.models import engine
from rerank_ray.models.adaptive_exit import AdaptiveExit
from rerank_ray.models.cross_encoder import CrossEncoder
from rerank_ray.models.engine import BatchRunner, TooLongError, group_in_order
from rerank_ray.models.exit_margins import segments_of, settle
from rerank_ray.models.student import Student, load_student
from rerank_ray.models.whole_lists import in_parts
from rerank_ray.parquet import read_rows
from rerank_ray.ranking.rankers import Ranker
from rerank_ray.ranking.scheduler import Outcome
from rerank_ray.records import Candidate, CandidateList, Query
from rerank_ray.schema import LABELS
from rerank_ray.settings.distill import DistillSettings
from rerank_ray.settings.models import CrossEncoderSettings, ModelSettings
from rerank_ray.settings.rankers import CrossEncoderRankerSettings

_WORDS = " ".join(DOCUMENTS[:4]).split()
MANY = [" ".join(_WORDS[i % 7 : i % 7 + 1 + i % 9]) for i in range(17)]
LISTS = [DOCUMENTS + MANY, DOCUMENTS[2:5], ["cat"], MANY, list(reversed(DOCUMENTS)) + MANY[:9]]
ASKED = ["cat", "the dog of beta", "alpha", "iota", "alpha query"]
KINDS = ["linear", "similarity", "branched", "decoder", "deberta", "modernbert"]


@pytest.fixture(params=KINDS)
def student(request: pytest.FixtureRequest, tiny_bert: Path, tiny_llama: Path, tmp_path: Path) -> Student:
    """Heads on all layers, or on those above the ones that all exits share."""
    if request.param == "decoder":
        return stirred(start(tiny_llama, "linear", layers=(1, 2)))
    if request.param == "deberta":
        # Its layers give tuples.
        relative = {"relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"]}
        deberta = tiny_encoder_folder(tmp_path / "deberta", DebertaV2Model, DebertaV2Config, layers=3, **relative)
        return stirred(start(deberta, "linear", layers=(1, 2, 3)))
    if request.param == "modernbert":
        # Each layer's mask is chosen by its kind; documents are longer than the window.
        kinds = {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "local_attention": 8}
        modernbert = tiny_encoder_folder(tmp_path / "modern", ModernBertModel, ModernBertConfig, layers=3, **kinds)
        return stirred(start(modernbert, "similarity", layers=(1, 2, 3), gate=-1.0, scale=4.0, interaction=1.0))
    if request.param == "branched":
        exits = {"layers": (2, 3, 4), "branch_layers": 1}
        deep_bert = tiny_bert_folder(tmp_path / "deep", layers=4)
        return stirred(start(deep_bert, "similarity", gate=-1.0, scale=4.0, interaction=1.0, **exits))
    return stirred(start(tiny_bert, request.param, layers=(1, 2, 3), gate=-1.0, scale=4.0, interaction=1.0))


def run(student: Student, margins: list[float | None], tokens_per_batch: int = 256):
    adaptive = AdaptiveExit(student, margins)
    adaptive.to(torch.device("cpu"), CrossEncoderSettings(path="unused", dtype="float32"))
    assert adaptive.packs == (student.pretrained.config.model_type == "bert")
    lists = [student.encode([q] * len(d), d) for q, d in zip(ASKED, LISTS, strict=True)]
    runner = BatchRunner(tokens_per_batch, torch.device("cpu"))
    return adaptive, adaptive.run(lists, runner)


def expected_scores(student: Student) -> list[np.ndarray]:
    """Of each list, [layers, documents]."""
    return [scores(student, [q] * len(d), d).numpy() for q, d in zip(ASKED, LISTS, strict=True)]


def margins_between(student: Student, by_layer: list[np.ndarray]) -> list[float]:
    """For each early exit the middle of the widest gap among its candidates' distances below the tenth, so that
    rounding moves nobody across it."""
    chosen = []
    for number in range(len(student.layers) - 1):
        sides = [of_list[number] for of_list in by_layer if of_list.shape[1] > 10]
        below = np.sort(np.concatenate([np.sort(s)[-10] - s[s < np.sort(s)[-10]] for s in sides]))
        place = 1 + int(np.argmax(np.diff(below[1:-1])))
        chosen.append(float(below[place : place + 2].mean()))
    return chosen


@pytest.mark.parametrize("tokens", [64, 100_000])
def test_scores_are_those_that_all_layers_give_merged(student: Student, tokens: int):
    """However pairs are batched, or split into parts; and what is computed is what the candidates reach."""
    by_layer = expected_scores(student)
    margins = margins_between(student, by_layer)
    assert min(margins) > 1e-3
    adaptive, results = run(student, margins, tokens)
    settled = [settle(of_list, margins) for of_list in by_layer]
    reached = np.sum([counts for _, counts in settled], 0)
    assert reached[0] > reached[-1]
    for found, (expected, _) in zip(results, settled, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-3, rtol=1e-3)
    spans = segments_of(student.layers, student.description.branch_layers, margins)
    layers = sum(count * (end - begin) for count, (begin, _, end) in zip(reached, spans, strict=True))
    assert adaptive.layers_computed == pytest.approx(layers / reached[0])


def test_exits_that_are_skipped_are_not_computed(student: Student):
    none = [None] * (len(student.layers) - 1)
    adaptive, results = run(student, none)
    assert len(adaptive.segments) == 1
    assert adaptive.layers_computed == student.layers[-1]
    for found, of_list in zip(results, expected_scores(student), strict=True):
        np.testing.assert_allclose(found, of_list[-1], atol=1e-4, rtol=1e-4)
    adaptive, results = run(student, [*none[:-1], 0.0])
    assert len(adaptive.segments) == 2
    assert all(len(found) == len(d) for found, d in zip(results, LISTS, strict=True))


@given(st.lists(st.lists(st.integers(1, 30), max_size=5), max_size=8), st.integers(1, 60))
def test_parts_hold_every_list_once_and_no_more_than_the_limit(lengths: list[list[int]], limit: int):
    parts = group_in_order([sum(of_list) for of_list in lengths], limit)
    assert [i for part in parts for i in part] == list(range(len(lengths)))
    for part in parts:
        assert len(part) == 1 or sum(sum(lengths[i]) for i in part) <= limit


def test_lists_that_do_not_fit_together_are_halved():
    """What is held of others leaves no room; the budget that shrank for it is what it was."""
    lists = [[{"input_ids": [n]}] for n in range(7)]
    runner = BatchRunner(16, torch.device("cpu"))
    tried = []

    def score(part, runner: BatchRunner) -> list[tuple[float, ...]]:
        tried.append(len(part))
        assert runner.tokens_per_batch == 16
        if len(part) > 2:
            runner.tokens_per_batch = 1
            raise TooLongError("no room")
        return [tuple(map(float, pairs[0]["input_ids"])) for pairs in part]

    assert in_parts(lists, runner, score) == [(float(n),) for n in range(7)]
    assert (tried, runner.tokens_per_batch) == ([7, 3, 1, 2, 4, 2, 2], 16)

    def too_long(part, runner: BatchRunner) -> list[tuple[float, ...]]:
        runner.tokens_per_batch = 1
        raise TooLongError("no room")

    with pytest.raises(TooLongError):
        in_parts(lists[:1], runner, too_long)
    assert runner.tokens_per_batch == 16


def test_who_has_left_holds_no_memory(student: Student, monkeypatch: pytest.MonkeyPatch):
    """The others' states are no part of a whole batch's."""
    margins = margins_between(student, expected_scores(student))
    held = []

    def segment(self, segment, lists, pairs, states, runner):
        held.extend(states.values())
        return own(self, segment, lists, pairs, states, runner)

    own = AdaptiveExit._segment
    monkeypatch.setattr(AdaptiveExit, "_segment", segment)
    run(student, margins, 100_000)
    assert held
    for state in held:
        assert state.untyped_storage().nbytes() == state.nbytes


def mix_up(hidden: torch.Tensor) -> torch.Tensor:
    return hidden


def break_down(hidden: torch.Tensor) -> torch.Tensor:
    return hidden @ hidden


@pytest.mark.parametrize("wrong", [mix_up, break_down])
def test_layers_that_cannot_be_computed_apart_are_refused(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: Callable
):
    """By the ranker, and by the calibration before it reads a list."""
    from rerank_ray.models import adaptive_exit

    student = stirred(start(tiny_bert, "linear", layers=(1, 3)))
    monkeypatch.setattr(adaptive_exit._Held, "forward", lambda self, hidden, *_, **__: wrong(hidden))
    with pytest.raises(ModelError, match=r"its layers can't be computed apart.*use a fixed exit_layer"):
        AdaptiveExit(student, [0.5])
    student.save(tmp_path / "s")
    with pytest.raises(ModelError, match=r"its layers can't be computed apart"):
        calibrate_exit(str(tmp_path / "s"), str(tmp_path / "no-labels"), 0.1)


# From calibration to rankings


def teachable(number: int, size: int = 24) -> CandidateList:
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
    """On the lists that it was found on as many layers are computed as was told, and most of the best ten stay."""
    folder, labels = calibrated
    with pytest.raises(ModelError, match=r"exit_layer: adaptive: the student has no margins.*calibrate-exit"):
        CrossEncoder(CrossEncoderSettings(path=str(folder), exit_layer="adaptive"))
    assert cli.main(["calibrate-exit", str(folder), "--labels", labels, "--max-loss", "0.2"]) == 0
    told = capsys.readouterr().out
    assert "(16 lists, of which" in told
    report = calibrate_exit(str(folder), labels, 0.2)
    assert report.ndcg[-1] == pytest.approx(1.0, abs=0.01)
    assert report.calibration.loss_bound <= 0.2
    assert json.loads((folder / "student.json").read_text())["exit_margins"] == list(report.calibration.margins)
    model = CrossEncoderSettings(path=str(folder), exit_layer="adaptive", dtype="float32")
    loaded: dict[str, CrossEncoder] = {}
    ranker = Ranker(CrossEncoderRankerSettings(model=model), loaded)
    assert ranker.name.endswith(":layer=adaptive")
    requests = [teachable(n) for n in range(16)]
    outcomes = ranker.rank([*requests, CandidateList(query=Query(query_id="none", text="cat"), candidates=())])
    assert outcomes[-1].error == "no candidate could be scored"
    (backend,) = loaded.values()
    computed = backend.adaptive.layers_computed
    # The calibration ran in the device's own precision, which may move a candidate across a margin.
    assert computed == pytest.approx(report.calibration.layers_computed, abs=0.1)
    assert computed < 3
    whole = Ranker(CrossEncoderRankerSettings(model=model.model_copy(update={"exit_layer": 3}))).rank(requests)
    kept = [len(top_ten(a) & top_ten(b)) / 10 for a, b in zip(outcomes, whole, strict=False)]
    assert 0.6 < np.mean(kept) <= 1


def top_ten(outcome: Outcome) -> set[int]:
    return set(np.argsort(-np.array(outcome.scores.scores))[:10].tolist())


def test_margins_are_found_on_scores_that_are_not_rounded(calibrated, tiny_bert, tmp_path, monkeypatch):
    """As the student has them where it scores."""
    stirred(start(tiny_bert, "linear", layers=(1, 2, 3))).save(tmp_path / "linear")
    monkeypatch.setattr(engine, "pick_dtype", lambda *_: torch.bfloat16)
    measured = []

    def measure(*given):
        measured.extend(_measure(*given))
        return measured

    monkeypatch.setattr("rerank_ray.calibrate_exit._measure", measure)
    calibrate_exit(str(tmp_path / "linear"), calibrated[1], 0.2)
    scores = torch.tensor(np.stack([by_layer for _, by_layer, _ in measured]))
    assert (scores.bfloat16().to(scores.dtype) != scores).float().mean() > 0.9


def test_calibration_holds_no_texts(calibrated: tuple[Path, str]):
    """Of many thousand lists they would fill the memory; the losses are those of ids, scores and gains."""
    folder, labels = calibrated
    measured = _measure(load_student(ModelSettings(path=str(folder))), _labelled(labels), "teacher")
    assert {c.contents for row, _, _ in measured for c in row.candidate_list.candidates} == {""}
    for row, by_layer, ndcg in measured:
        assert [validation_ndcg(row, of_layer, "teacher") for of_layer in by_layer.tolist()] == ndcg


def test_thresholds_of_before_are_not_margins(calibrated: tuple[Path, str]):
    folder, _ = calibrated
    described = json.loads((folder / "student.json").read_text())
    del described["exit_margins"]
    (folder / "student.json").write_text(json.dumps(described | {"exit_thresholds": [0.5, 0.5]}))
    with pytest.raises(ModelError, match="the student has no margins"):
        CrossEncoder(CrossEncoderSettings(path=str(folder), exit_layer="adaptive"))


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
    for limit in (-1, 0, 1):
        with pytest.raises(ConfigError, match=rf"--limit {limit}: two lists at least"):
            calibrate_exit(str(folder), labels, 0.1, limit=limit)
    with pytest.raises(ConfigError, match=r"not a student of ours: it has no student.json"):
        calibrate_exit(str(tiny_bert), labels, 0.1)
    start(tiny_bert, "linear").save(tmp_path / "flat")
    with pytest.raises(ConfigError, match="a head on its last layer alone"):
        calibrate_exit(str(tmp_path / "flat"), labels, 0.1)
    unjudged = write_labels(tmp_path / "unjudged", [label_row(make_list(size=3), [1.0, 2.0, 3.0])])
    with pytest.raises(InputError, match=r"0 lists have a gain \(labels\)"):
        calibrate_exit(str(folder), unjudged, 0.1, gains="labels")


def test_a_truncated_student_has_no_margins(calibrated: tuple[Path, str]):
    from fixtures.students import load

    folder, labels = calibrated
    calibrate_exit(str(folder), labels, 0.2)
    short = load(folder).truncated(2, alone=True)
    assert short.layers == (2,)
    assert short.description.exit_margins is None
    torch.testing.assert_close(scores(short), scores(load(folder))[1:2], atol=1e-5, rtol=1e-5)
