"""Finding the attention heads that look at relevant passages (CoRe)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from fixtures.oracles import AttentionTable
from fixtures.tiny_models import tiny_llama_folder

from rerank_ray.cli import main
from rerank_ray.errors import ConfigError, InputError, RunError
from rerank_ray.models.fake import Fake
from rerank_ray.parquet import write_candidates, write_rows
from rerank_ray.prompts.render import load_template
from rerank_ray.ranking.head_detection import Detection, contrast, detect_heads, score_heads
from rerank_ray.ranking.heads_file import load_heads
from rerank_ray.ranking.rankers import Ranker
from rerank_ray.records import Candidate, CandidateList, Query
from rerank_ray.runs import INGEST_UNFINISHED
from rerank_ray.schema import CANDIDATES, candidate_row
from rerank_ray.settings.jobs import DetectHeadsSettings
from rerank_ray.settings.models import FakeSettings, HFCausalSettings
from rerank_ray.settings.rankers import CoReHeadsSettings, ICRSettings


def labelled(texts: list[str], labels: list[float | None], query_id: str = "q1") -> CandidateList:
    candidates = tuple(
        Candidate(doc_id=f"d{i}", text=text, label=label)
        for i, (text, label) in enumerate(zip(texts, labels, strict=True))
    )
    return CandidateList(query=Query(query_id=query_id, text="which cat?"), candidates=candidates)


def test_contrast_by_hand():
    """(0.3, 0.1, 0.2) / 0.1 with the first as positive: e³ / (e³ + e¹ + e²) = 0.6652; a head that pays all the same: ⅓;
    one that pays a negative 1 more at T 0.1: 1 / (1 + e¹⁰ + 1)."""
    paid = np.array([[0.3, 0.5, 0.0], [0.1, 0.5, 1.0], [0.2, 0.5, 0.0]])
    expected = [0.66524, 1 / 3, 1 / (2 + math.exp(10))]
    assert contrast(paid, [True, False, False], 0.1) == pytest.approx(expected, rel=1e-4)


def test_positives_do_not_compete_with_each_other():
    """Two positives 2 and 1 against a negative 0, T 1: the mean of 1 / (1 + e⁻²) and 1 / (1 + e⁻¹)."""
    expected = (1 / (1 + math.exp(-2)) + 1 / (1 + math.exp(-1))) / 2
    assert contrast(np.array([[2.0], [0.0], [1.0]]), [True, False, True], 1.0) == pytest.approx([expected])


def test_small_temperatures_do_not_overflow():
    assert contrast(np.array([[0.0, 9.0], [9.0, 0.0]]), [True, False], 0.001).tolist() == [0.0, 1.0]


def detection_settings(**options) -> DetectHeadsSettings:
    return DetectHeadsSettings(**({"input": "x", "output": "y", "model": FakeSettings()} | options))


def detect(backend, lists: list[CandidateList], **options) -> Detection:
    return score_heads(detection_settings(**options), backend, load_template("icr", "icr"), map(candidate_row, lists))


def pays_the_relevant(text: str) -> list[list[float]]:
    """Four heads, two tokens: (1, 0) pays relevant texts more, (0, 1) less, the others all the same."""
    relevant = text.startswith("good")
    return [[0.1, 0.0 if relevant else 0.2, 0.15 if relevant else 0.05, 0.1]] * 2


def test_the_head_that_points_to_the_positive_is_found():
    """Sums over tokens: 0.3 against 0.1 twice at T 0.1 for (1, 0), 0 against 0.4 for (0, 1), 0.2 for all else."""
    lists = [labelled(["good a", "bad b", "bad c"], [1.0, 0.0, None], f"q{i}") for i in range(5)]
    backend = AttentionTable(pays_the_relevant)
    heads = detect(backend, lists, temperature=0.1, queries_per_batch=2).heads
    assert [(h.layer, h.head) for h in heads.heads] == [(1, 0), (0, 0), (1, 1), (0, 1)]
    e2 = math.exp(2)
    expected = [e2 / (e2 + 2), 1 / 3, 1 / 3, 1 / (1 + 2 * math.exp(4))]
    assert [h.score for h in heads.heads] == pytest.approx(expected, rel=1e-5)
    assert (heads.queries, heads.layers, heads.model, heads.temperature) == (5, 2, "table", 0.1)
    assert [len(b) for b in backend.batches] == [2, 2, 1]
    assert backend.calls[0].heads == ((0, 0), (0, 1), (1, 0), (1, 1))
    assert backend.calls[0].each_head
    assert backend.calls[0].calibration is None


def test_documents_are_shuffled_by_query_and_seed():
    """The positive is first in every list; in the prompts it is anywhere, the same again with the same seed."""
    lists = [labelled(["good", *(f"bad {n}" for n in range(9))], [1.0] + [0.0] * 9, f"q{i}") for i in range(40)]
    places = []
    for seed in (0, 0, 1):
        backend = AttentionTable(pays_the_relevant)
        detect(backend, lists, seed=seed)
        places.append([c.prompt.passages.index("good") for c in backend.calls])
    assert places[0] == places[1] != places[2]
    assert set(places[0]) == set(range(10))


def test_lists_that_can_not_be_used_are_counted():
    lists = [
        labelled(["good", "bad"], [2.0, 0.0], "used"),
        labelled(["bad", "bad 2"], [0.0, None], "no positive"),
        labelled(["good", "good 2"], [1.0, 3.0], "no negative"),
        labelled(["bad", "bad 2", "good"], [0.0, 0.0, 1.0], "positive too deep"),
        labelled(["good", " "], [1.0, 0.0], "an empty negative"),
    ]
    detection = detect(AttentionTable(pays_the_relevant), lists, documents_per_prompt=2)
    assert detection.heads.queries == 1
    assert detection.skipped == {
        "no label of 1 or more among the first 2 candidates": 2,
        "no negative among the first 2 candidates": 2,
    }
    assert detect(AttentionTable(pays_the_relevant), lists[:1], min_gain=2.0).heads.queries == 1
    with pytest.raises(InputError, match="x: no query to detect heads with: 1 × no label of 3 or more"):
        detect(AttentionTable(pays_the_relevant), lists[:1], min_gain=3.0)
    with pytest.raises(InputError, match="no query to detect heads with: it is empty"):
        detect(AttentionTable(pays_the_relevant), [])
    assert detect(AttentionTable(pays_the_relevant), lists[:1] * 9, max_queries=4).heads.queries == 4


def test_a_row_that_breaks_the_contract_is_left_out(tmp_path: Path):
    rows = [candidate_row(labelled(["good", "bad"], [1.0, 0.0], f"q{i}")) for i in range(3)]
    rows[2]["candidates"][1]["text"] = None
    write_rows(rows, str(tmp_path / "rows"), CANDIDATES)
    detection = detect_heads(detection_settings(input=str(tmp_path / "rows")))
    assert detection.heads.queries == 2
    assert detection.skipped == {"the row breaks the contract (a text is null, a doc_id is there twice, …)": 1}


def test_a_run_folder_stands_for_its_data_once_it_is_done(tmp_path: Path):
    """As in other jobs: what else lies in the folder is not read, and an ingest that did not end is refused."""
    rows = [candidate_row(labelled(["good", "bad"], [1.0, 0.0], f"q{i}")) for i in range(3)]
    run = tmp_path / "run"
    write_rows(rows, str(run / "data"), CANDIDATES)
    write_rows(rows, str(run / "checkpoint"), CANDIDATES)
    state = {"state": "running", "kind": "retrieve"}
    (run / "run.json").write_text(json.dumps(state))
    with pytest.raises(RunError, match="this retrieve run is running"):
        detect_heads(detection_settings(input=str(run)))
    (run / "run.json").write_text(json.dumps(state | {"state": "done"}))
    assert detect_heads(detection_settings(input=str(run))).heads.queries == 3
    (run / "data" / "ingest.json").write_text(INGEST_UNFINISHED)
    with pytest.raises(RunError, match="this ingest did not end"):
        detect_heads(detection_settings(input=str(run / "data")))


def test_failed_prompts_are_left_out():
    backend = Fake(FakeSettings(fail_on="broken"))
    lists = [labelled(["good", "broken"], [1.0, 0.0], "a"), labelled(["good", "bad"], [1.0, 0.0], "b")]
    detection = detect(backend, lists)
    assert detection.heads.queries == 1
    assert detection.skipped == {"the call holds 'broken'": 1}


def test_attention_that_is_no_number_spoils_its_query_alone():
    """Half precision overflows; one NaN would be in every head's sum."""
    lists = [labelled(["good", bad], [1.0, 0.0], bad) for bad in ("bad", "overflow", "bad 2")]
    backend = AttentionTable(lambda text: np.full((2, 4), np.nan) if text == "overflow" else pays_the_relevant(text))
    detection = detect(backend, lists)
    assert detection.heads == detect(AttentionTable(pays_the_relevant), [lists[0], lists[2]]).heads
    assert detection.skipped == {"its attention is not a finite number": 1}


def test_from_candidates_to_a_ranking(tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture):
    """The command writes a file for this model, `core_heads` reads it, and a model of other weights refuses it."""
    lists = [labelled(["cat dog", "bird of beta", "alpha"], [1.0, 0.0, 0.0], f"q{i}") for i in range(4)]
    write_candidates(lists, str(tmp_path / "candidates"))
    (tmp_path / "heads.yaml").write_text(
        f"input: {tmp_path}/candidates\noutput: {tmp_path}/out/heads.json\n"
        f"model: {{kind: hf_causal, path: {tiny_llama}, dtype: float32, max_length: 256}}\n"
    )
    assert main(["detect-heads", str(tmp_path / "heads.yaml"), "--set", "max_queries=3"]) == 0
    assert "3 queries; best heads (layer.head): " in capsys.readouterr().out
    file = load_heads(f"{tmp_path}/out/heads.json")
    assert (file.layers, file.queries, len(file.heads)) == (2, 3, 8)
    assert [h.score for h in file.heads] == sorted((h.score for h in file.heads), reverse=True)

    def ranker(folder: Path) -> Ranker:
        model = HFCausalSettings(path=str(folder), dtype="float32")
        return Ranker(CoReHeadsSettings(model=model, heads_file=f"{tmp_path}/out/heads.json", count=2, prune=0.5))

    (outcome,) = ranker(tiny_llama).rank(lists[:1])
    assert len(set(outcome.scores.scores)) == 3
    with pytest.raises(ConfigError, match="these are heads of hf_causal:"):
        ranker(tiny_llama_folder(tmp_path / "other", seed=1))


def test_detection_does_not_depend_on_batches(tiny_llama: Path, tmp_path: Path):
    model = HFCausalSettings(path=str(tiny_llama), dtype="float32", max_length=256)
    backend = Ranker(ICRSettings(model=model))._backends.popitem()[1]
    lists = [labelled(["cat dog " * (1 + i), "bird", "alpha"], [1.0, 0.0, 0.0], f"q{i}") for i in range(5)]
    one, five = (detect(backend, lists, queries_per_batch=n).heads for n in (1, 5))
    assert [(h.layer, h.head) for h in one.heads] == [(h.layer, h.head) for h in five.heads]
    assert [h.score for h in one.heads] == pytest.approx([h.score for h in five.heads], abs=1e-4)
