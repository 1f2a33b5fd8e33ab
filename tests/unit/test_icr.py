"""ICR and CoRe heads: by hand, on backends that answer from a table, and on a tiny model against its full matrices."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.oracles import USAGE, Recorder
from fixtures.rows import make_list
from fixtures.tiny_models import tiny_llama_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from rerank_ray.cli import main
from rerank_ray.config import validate
from rerank_ray.errors import ConfigError, InputError, ModelError, RunError
from rerank_ray.models.fake import Fake
from rerank_ray.models.protocol import Answer, Attention, Failure, Result
from rerank_ray.prompts.render import Template, load_template
from rerank_ray.ranking import scheduler
from rerank_ray.ranking.core_heads import CoReHeads
from rerank_ray.ranking.head_detection import Detection, contrast, detect_heads, score_heads
from rerank_ray.ranking.heads_file import HeadScore, HeadsFile, load_heads, save_heads
from rerank_ray.ranking.icr import ICR, document_score
from rerank_ray.ranking.rankers import Ranker, preflight
from rerank_ray.records import Candidate, CandidateList, Query
from rerank_ray.runs import INGEST_UNFINISHED
from rerank_ray.schema import CANDIDATES, candidate_row, write_candidates, write_rows
from rerank_ray.settings.jobs import DetectHeadsSettings
from rerank_ray.settings.models import FakeSettings, HFCausalSettings
from rerank_ray.settings.rankers import CoReHeadsSettings, ICRSettings

WIDTH = 2


class Table(Recorder):
    """Answers `Attention` with what `read` says about each passage's text: [tokens], or [tokens, heads]."""

    answers = frozenset({Attention})
    name = "table"
    attention_shape = (2, WIDTH)

    def __init__(self, read: Callable[[str], object] | Mapping[str, object]) -> None:
        super().__init__()
        self.read = read if callable(read) else read.__getitem__

    def answer(self, call: Attention) -> Result:
        values = tuple(np.asarray(self.read(passage), dtype=np.float32) for passage in call.prompt.passages)
        return Answer(value=values, usage=USAGE)


def icr(backend, **options) -> ICR:
    return ICR(ICRSettings(model=FakeSettings(), **options), backend)


def one_outcome(method, backend, request: CandidateList) -> scheduler.Outcome:
    (outcome,) = scheduler.run(method, backend, [request])
    return outcome


def labelled(texts: list[str], labels: list[float | None], query_id: str = "q1") -> CandidateList:
    candidates = tuple(
        Candidate(doc_id=f"d{i}", text=text, label=label)
        for i, (text, label) in enumerate(zip(texts, labels, strict=True))
    )
    return CandidateList(query=Query(query_id=query_id, text="which cat?"), candidates=candidates)


# A document's score


def test_abnormally_low_tokens_are_left_out():
    """Nine ones and −20: mean −1.1, deviation √(396.9 / 9) = 6.64, bound −14.38; the ones add up to 9."""
    assert document_score(np.array([1.0] * 9 + [-20.0])) == pytest.approx(9.0)


def test_the_deviation_divides_by_one_less_than_the_tokens():
    """[1, 1, 1, 1, −1, −6]: mean −0.5, squares 39.5. √(39.5 / 5) = 2.81 puts the bound at −6.12, which keeps −6: the
    sum is −3. √(39.5 / 6) = 2.57 would put it at −5.63."""
    assert document_score(np.array([1.0, 1.0, 1.0, 1.0, -1.0, -6.0])) == pytest.approx(-3.0)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_equal_tokens_all_count(count: int):
    """One token has no deviation; that of equal ones is 0, or what rounding makes of it."""
    assert document_score(np.full(count, 0.1, dtype=np.float32)) == pytest.approx(0.1 * count)
    assert document_score(np.full(count, -0.1, dtype=np.float32)) == pytest.approx(-0.1 * count)


@pytest.mark.parametrize("values", [[], [math.nan], [1.0, math.nan], [1.0, math.inf]])
def test_no_number_is_no_score(values: list[float]):
    assert math.isnan(document_score(np.array(values)))


# ICR


def test_icr_by_hand():
    """Sums of the calibrated tokens; the first stage's best stands last in the prompt, before the query."""
    request = make_list(text="which cat?")
    backend = Table({c.text: v for c, v in zip(request.candidates, [[1, 2], [5], [-1, 0.5]], strict=True)})
    method = icr(backend)
    outcome = one_outcome(method, backend, request)
    assert outcome.scores.scores == (3.0, 5.0, -0.5)
    assert not outcome.scores.defects
    (call,) = backend.calls
    assert (call.query, call.calibration, call.heads, call.each_head) == ("which cat?", "N/A", None, False)
    assert call.prompt.passages == tuple(c.text for c in reversed(request.candidates))
    assert call.prompt.parts[0].endswith("\n\n[1] ")
    assert call.prompt.parts[1:3] == ("\n\n[2] ", "\n\n[3] ")
    assert call.prompt.parts[3].endswith("Query: which cat?")
    assert method.name.startswith("icr:table:prompt=")


@pytest.mark.parametrize(
    ("count", "size", "calls"), [(1, 4, 1), (3, 4, 1), (4, 4, 1), (5, 4, 2), (10, 4, 4), (10, 3, 8)]
)
def test_long_lists_are_ordered_window_by_window(count: int, size: int, calls: int):
    """1 + ⌈(N − size) / (size // 2)⌉ prompts; an oracle brings the best half window to the top from anywhere."""
    request = make_list(size=count)
    gains = {c.text: [float(i)] for i, c in enumerate(request.candidates)}
    backend = Table(gains)
    outcome = one_outcome(icr(backend, documents_per_prompt=size), backend, request)
    assert len(backend.calls) == calls
    assert all(len(c.prompt.passages) == min(size, count) for c in backend.calls)
    if calls == 1:
        assert outcome.scores.scores == tuple(float(i) for i in range(count))
        return
    assert sorted(outcome.scores.scores) == [float(r + 1) for r in range(count)]
    ranked = sorted(range(count), key=lambda i: -outcome.scores.scores[i])
    assert ranked[: size // 2] == list(range(count))[::-1][: size // 2]


@settings(max_examples=40, deadline=None)
@given(gains=st.lists(st.integers(-3, 3), min_size=1, max_size=30), size=st.integers(2, 12))
def test_scores_of_windows_are_a_permutation(gains: list[int], size: int):
    request = make_list(size=len(gains))
    backend = Table({c.text: [g] for c, g in zip(request.candidates, gains, strict=True)})
    scores = one_outcome(icr(backend, documents_per_prompt=size), backend, request).scores.scores
    best = scores.index(max(scores))
    assert gains[best] == max(gains)
    if len(gains) <= size:
        assert scores == tuple(map(float, gains))
    else:
        assert sorted(scores) == [float(n + 1) for n in range(len(gains))]


def test_documents_without_a_score():
    """One without tokens, one whose attention overflowed: neither is 0, which would be a label."""
    request = make_list(size=4)
    values = [[1.0], [], [math.nan, 1.0], [2.0]]
    for size in (2, 4):
        backend = Table({c.text: v for c, v in zip(request.candidates, values, strict=True)})
        outcome = one_outcome(icr(backend, documents_per_prompt=size), backend, request)
        assert [math.isnan(s) for s in outcome.scores.scores] == [False, True, True, False]
        assert outcome.scores.scores[3] > outcome.scores.scores[0]
        assert [str(d).split(":")[:2] for d in outcome.scores.defects] == [["unscored", " d1"], ["unscored", " d2"]]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failed_prompt_is_an_error(failing: int):
    """Also when another window of the list was answered: half an order is none."""

    class Failing(Table):
        """Fails its call number `failing`."""

        def answer(self, call: Attention) -> Result:
            return Failure(reason="too long") if len(self.calls) == failing + 1 else super().answer(call)

    backend = Failing(lambda _text: [1.0])
    outcome = one_outcome(icr(backend, documents_per_prompt=2), backend, make_list(size=3))
    assert outcome.scores is None
    assert "2 documents in one prompt: too long" in outcome.error


def test_scores_are_the_same_alone_and_in_company(tiny_llama: Path, tmp_path: Path):
    requests = [make_list(f"q{i}", 1 + i % 5, text=f"which cat {i}?") for i in range(65)]
    model = HFCausalSettings(path=str(tiny_llama), dtype="float32", max_length=512)
    for chosen in (ICRSettings(model=model, documents_per_prompt=3), ICRSettings(model=FakeSettings())):
        ranker = Ranker(chosen)
        together = ranker.rank(requests)
        for request, outcome in list(zip(requests, together, strict=True))[::13]:
            (alone,) = ranker.rank([request])
            assert alone.scores.scores == pytest.approx(outcome.scores.scores, abs=1e-5)
            assert alone.usage == outcome.usage


# On a model


@torch.inference_mode()
def plain_icr(folder: Path, request: CandidateList) -> list[float]:
    """ICR written down again: two prompts, all of transformers' attention matrices, tokens found by decoding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    shown = [c.text for c in request.candidates][::-1]

    def token_scores(query: str) -> list[torch.Tensor]:
        text = "<|user|>Here are some paragraphs:"
        spans = []
        for i, passage in enumerate(shown):
            text += f"\n\n[{i + 1}] "
            spans.append((len(text), len(text) + len(passage)))
            text += passage
        text += (
            "\n\nPlease find information that is relevant to the following query in the paragraphs above.\n\nQuery: "
        )
        spans.append((len(text), len(text) + len(query)))
        encoded = tokenizer(f"{text}{query}<|end|><|assistant|>", add_special_tokens=False, return_offsets_mapping=True)
        *documents, asking = [
            [t for t, (a, b) in enumerate(encoded["offset_mapping"]) if a < end and b > start] for start, end in spans
        ]
        attentions = model(torch.tensor([encoded["input_ids"]]), output_attentions=True).attentions
        paid = torch.cat(attentions, dim=1)[0].sum(0)[asking].mean(0).double()
        return [paid[tokens] for tokens in documents]

    scores = []
    for query, nothing in zip(token_scores(request.query.text), token_scores("N/A"), strict=True):
        c = query - nothing
        scores.append(float(c[c > c.mean() - 2 * c.std()].sum()))
    return scores[::-1]


def test_icr_equals_a_plain_loop(tiny_llama: Path):
    request = make_list(size=6, text="which cat is that dog?")
    ranker = Ranker(ICRSettings(model=HFCausalSettings(path=str(tiny_llama), dtype="float32")))
    (outcome,) = ranker.rank([request])
    assert outcome.scores.scores == pytest.approx(plain_icr(tiny_llama, request), abs=1e-4)
    assert outcome.usage.calls == 2
    assert outcome.usage.cached_tokens > outcome.usage.prompt_tokens / 3


def test_the_calibration_query_scores_nothing(tiny_llama: Path):
    ranker = Ranker(ICRSettings(model=HFCausalSettings(path=str(tiny_llama), dtype="float32"), documents_per_prompt=4))
    (outcome,) = ranker.rank([make_list(size=4, text="N/A")])
    assert outcome.scores.scores == (0.0,) * 4


# CoRe heads


def heads_file(model: str = "table", layers: int = 2, scores: tuple[float, ...] = (0.1, 0.4, 0.3, 0.2)) -> HeadsFile:
    """A file of WIDTH heads a layer with these scores, layer by layer."""
    heads = tuple(HeadScore(layer=i // WIDTH, head=i % WIDTH, score=s) for i, s in enumerate(scores))
    return HeadsFile(model=model, prompt="x", layers=layers, temperature=0.1, queries=3, heads=heads)


def core(backend, path: Path, **options) -> CoReHeads:
    return CoReHeads(CoReHeadsSettings(model=FakeSettings(), heads_file=str(path), **options), backend)


def test_the_best_heads_are_read(tmp_path: Path):
    """Scores 0.1, 0.4 | 0.3, 0.2 in two layers: the best two are (0, 1) and (1, 0); of the first layer, its two."""
    path = tmp_path / "heads.json"
    save_heads(str(path), heads_file())
    assert load_heads(str(path)) == heads_file()
    backend = Table(lambda _text: [1.0])
    whole, pruned = core(backend, path, count=2), core(backend, path, count=2, prune=0.5)
    assert (whole.heads, pruned.heads) == (((0, 1), (1, 0)), ((0, 1), (0, 0)))
    assert whole.name != pruned.name
    one_outcome(pruned, backend, make_list())
    assert {c.heads for c in backend.calls} == {((0, 1), (0, 0))}


def test_the_first_layers_are_kept():
    """int(30 · (1 − 0.9)) is 3 layers, 6 heads, though 30 · (1 − 0.9) is 2.9999999999999996 in floating point."""
    file = heads_file(layers=30, scores=tuple(i / 60 for i in range(60)))
    assert {layer for layer, _ in file.best(6, 0.9)} == {0, 1, 2}
    assert file.best(1, 0.0) == ((29, 1),)
    with pytest.raises(ConfigError, match=r"count is 7, but the first 3 of 30 layers hold 6 heads"):
        file.best(7, 0.9)


def test_all_heads_are_icr(tiny_llama: Path, tmp_path: Path):
    model = HFCausalSettings(path=str(tiny_llama), dtype="float32")
    whole = Ranker(ICRSettings(model=model))
    name = whole.name.removeprefix("icr:").rpartition(":prompt=")[0]
    heads = tuple(HeadScore(layer=i // 4, head=i % 4, score=0.5) for i in range(8))
    save_heads(str(tmp_path / "h.json"), heads_file(name).model_copy(update={"heads": heads}))
    chosen = CoReHeadsSettings(model=model, heads_file=str(tmp_path / "h.json"))
    preflight(chosen)
    request = make_list(size=5)
    (a,), (b,) = whole.rank([request]), Ranker(chosen).rank([request])
    assert a.scores.scores == pytest.approx(b.scores.scores, abs=1e-6)
    assert any(a.scores.scores)


def test_heads_of_another_model(tiny_llama: Path, tmp_path: Path):
    path = tmp_path / "heads.json"
    save_heads(str(path), heads_file("hf_causal:other@1"))
    with pytest.raises(ConfigError, match=r"heads\.json: these are heads of hf_causal:other@1, not of table: run"):
        core(Table({}), path, count=1)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such heads file; `rerank-ray detect-heads` writes one"),
        ("{", "not valid JSON"),
        ("[]", "heads.json: 1 error"),
        ({"heads": []}, "heads: Tuple should have at least 1 item"),
        ({"heads": [{"layer": 0, "head": 0, "score": 1}] * 2}, "heads names a head twice"),
        ({"heads": [{"layer": 2, "head": 0, "score": 1}]}, "a layer beyond the model's 2"),
        ({"heads": [{"layer": 0, "head": -1, "score": 1}]}, "heads.0.head"),
        ({"model": None}, "model"),
    ],
)
def test_a_bad_heads_file_is_found_before_the_job(tmp_path: Path, content, said: str):
    path = tmp_path / "heads.json"
    if isinstance(content, dict):
        content = json.dumps(heads_file().model_dump(mode="json") | content)
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises((ConfigError, InputError)) as caught:
        preflight(CoReHeadsSettings(model=FakeSettings(), heads_file=str(path), count=1))
    assert said in str(caught.value)


# Detection


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
    backend = Table(pays_the_relevant)
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
        backend = Table(pays_the_relevant)
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
    detection = detect(Table(pays_the_relevant), lists, documents_per_prompt=2)
    assert detection.heads.queries == 1
    assert detection.skipped == {
        "no label of 1 or more among the first 2 candidates": 2,
        "no negative among the first 2 candidates": 2,
    }
    assert detect(Table(pays_the_relevant), lists[:1], min_gain=2.0).heads.queries == 1
    with pytest.raises(InputError, match="x: no query to detect heads with: 1 × no label of 3 or more"):
        detect(Table(pays_the_relevant), lists[:1], min_gain=3.0)
    with pytest.raises(InputError, match="no query to detect heads with: it is empty"):
        detect(Table(pays_the_relevant), [])
    assert detect(Table(pays_the_relevant), lists[:1] * 9, max_queries=4).heads.queries == 4


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
    backend = Table(lambda text: np.full((2, 4), np.nan) if text == "overflow" else pays_the_relevant(text))
    detection = detect(backend, lists)
    assert detection.heads == detect(Table(pays_the_relevant), [lists[0], lists[2]]).heads
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


# Templates


@pytest.mark.parametrize(
    "text",
    [
        "{query} {passages}",
        "{query} {passages} {query}",
        "{passages} {query} {query}",
        # The query "graphs" would be looked for, and found, in what stands behind it.
        "{passages} {query}\nWhich of the paragraphs are relevant?",
        "{passages} {query} {instruction}",
    ],
)
def test_the_query_stands_once_at_the_end(text: str):
    content = {"method": "icr", "about": "a", "text": text, "passage": "[{identifier}] {passage}"}
    with pytest.raises(ConfigError, match=r"slot \{query\} once, at its end"):
        validate(Template, content, "t.yaml")
    validate(Template, content | {"text": "{instruction}: {passages} {query}\n"}, "t.yaml")


def test_a_model_whose_attention_can_not_be_read(tmp_path: Path):
    """Found when the ranker is made, not at its first row."""
    folder = tiny_llama_folder(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sliding_window": 64}))
    with pytest.raises(ModelError, match="slides over 64 tokens"):
        Ranker(ICRSettings(model=HFCausalSettings(path=str(folder))))
