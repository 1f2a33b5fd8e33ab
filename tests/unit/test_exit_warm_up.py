"""Early exits learn from unlabelled text to score as the last layer does."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.rows import label_row, make_list, write_labels
from fixtures.tiny_models import WORDS
from pydantic import ValidationError

from rerank_ray.distill.exit_warm_up import draw, vary, warm_up
from rerank_ray.distill.metrics_log import summary_line
from rerank_ray.distill.parallel import World
from rerank_ray.distill.train import Trainer, train
from rerank_ray.models.student import Student, adapt, new_student
from rerank_ray.parquet import write_candidates
from rerank_ray.records import Candidate, CandidateList, Query
from rerank_ray.settings.distill import DistillSettings
from rerank_ray.settings.optimizer import OptimizerSettings
from rerank_ray.settings.student import ExitWarmUpSettings, StudentSettings


def text_list(number: int) -> CandidateList:
    """A query with ten passages of random words."""
    random = np.random.default_rng(number)
    passages = [" ".join(random.choice(WORDS, 12)) for _ in range(10)]
    query = Query(query_id=f"q{number}", text=" ".join(random.choice(WORDS, 3)))
    candidates = tuple(Candidate(doc_id=f"d{i}", text=text) for i, text in enumerate(passages))
    return CandidateList(query=query, candidates=candidates)


def student_of(folder: Path) -> Student:
    lengths = {"max_length": 64, "max_query_length": 16}
    start = {"gate": -8.0, "scale": (0.4, 4.0), "interaction": (20.0, 2.0)}
    settings = StudentSettings(base=str(folder), head="similarity", layers=(1, 3), **lengths, **start)
    student = new_student(settings)
    adapt(student, settings)
    return student


def warmed(folder: Path, told: list[dict] | None = None, **changes) -> tuple[Student, dict[str, float]]:
    torch.manual_seed(0)
    told = [] if told is None else told
    student = student_of(folder)
    options = {
        "steps": 150,
        "passages": 6,
        "spans": 4,
        "variants": 2,
        "optimizer": OptimizerSettings(learning_rate=1e-3),
    }
    settings = ExitWarmUpSettings(**options | changes)
    metrics = warm_up(student, text_list, 8, settings, nullcontext, 0, World(), lambda m, _save: told.append(m))
    assert metrics.pop("exit_warm_up/seconds") > 0
    return student, metrics


def trainer_settings(base: Path, folder: Path, warming: dict, **more) -> DistillSettings:
    """A student of layers 1 and 3, warmed up before it learns from eight lists of six."""
    rows = [label_row(make_list(f"q{i}", 6), [float(s) for s in range(6)]) for i in range(8)]
    student = {"base": str(base), "head": "similarity", "layers": [1, 3], "max_length": 32, "max_query_length": 8}
    content = {
        "input": [write_labels(folder / "labels", rows)],
        "student": student | {"exit_warm_up": {"passages": 4, "spans": 2} | warming},
        "dtype": "float32",
    }
    return DistillSettings.model_validate(content | more)


def test_the_early_exit_comes_to_score_as_the_last_layer_did(tiny_bert: Path):
    """Its scores of whole pairs near those that the last layer had; the last layer's stay nearer."""
    before = student_of(tiny_bert)
    student, metrics = warmed(tiny_bert)
    assert metrics["exit_warm_up/layer_1/last_kl"] < 0.75 * metrics["exit_warm_up/layer_1/first_kl"]

    @torch.no_grad()
    def scores(student: Student, number: int) -> torch.Tensor:
        labels = text_list(number)
        texts = [c.text for c in labels.candidates]
        pairs = student.encode([labels.query.text] * len(texts), texts)
        return 5 * student.eval()(**student.collate(pairs))

    def divergence(target: torch.Tensor, actual: torch.Tensor) -> float:
        return float(torch.nn.functional.kl_div(actual.log_softmax(-1), target.softmax(-1), reduction="sum"))

    targets = [scores(before, n)[-1] for n in range(8)]
    early = [sum(divergence(t, scores(s, n)[0]) for n, t in enumerate(targets)) for s in (before, student)]
    assert early[1] < 0.8 * early[0]
    assert sum(divergence(t, scores(student, n)[-1]) for n, t in enumerate(targets)) < early[1]


def test_the_kl_is_that_of_texts_without_padding(tiny_bert: Path):
    """Of one step's texts, encoded one by one; the seed draws the same texts."""
    student = student_of(tiny_bert)
    options = {"passages": 5, "spans": 3, "variants": 2, "temperature": 0.5}
    _, metrics = warmed(tiny_bert, steps=1, **options)
    random = np.random.default_rng([0, 1])
    labels = text_list(int(random.integers(8)))
    queries, passages = draw(labels, ExitWarmUpSettings(**options), random)
    with torch.no_grad():
        asked, listed = (
            [student.encoded(student.batch([text])) for text in student.encode_alone(texts, length)]
            for texts, length in ((queries, 16), (passages, 128))
        )
        early, last = torch.stack([student.score_all(q, listed)[:, 0] for q in asked], 1) / 0.5
    divergence = torch.nn.functional.kl_div(early.log_softmax(-1), last.softmax(-1), reduction="batchmean")
    assert metrics["exit_warm_up/layer_1/first_kl"] == pytest.approx(divergence.item(), rel=1e-4)


def test_it_tells_of_every_tenth_of_its_steps(tiny_bert: Path):
    """Steps are below 0, where the labels begin, so that a log keeps them in order."""
    told: list[dict] = []
    _, metrics = warmed(tiny_bert, told, steps=25)
    assert [m["step"] for m in told] == [n - 25 for n in range(2, 25, 3)]
    assert told[0]["exit_warm_up/layer_1/kl"] == metrics["exit_warm_up/layer_1/first_kl"]
    kl = [told[1][f"exit_warm_up/layer_{n}/kl"] for n in (1, 3)]
    assert summary_line(told[1]) == f"exit warm-up 6/25, KL {kl[0]:.4f} at layer 1, {kl[1]:.4f} at layer 3"


def test_it_is_a_function_of_the_seed(tiny_bert: Path):
    (first, told), (second, again) = warmed(tiny_bert, steps=3), warmed(tiny_bert, steps=3)
    assert told == again
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_a_step_draws():
    """The list's query, variants of it, and spans of the passages that are not drawn, word for word."""
    listed = text_list(0)
    texts = [c.text for c in listed.candidates]
    settings = ExitWarmUpSettings(passages=4, spans=12, variants=6, replaced_words=0.0)
    queries, passages = draw(listed, settings, np.random.default_rng(0))
    assert len(queries) == 1 + 6 + 12
    assert queries[0] == listed.query.text
    assert len(set(passages)) == 4
    others = set(texts) - set(passages)
    assert len(others) == 6
    spans = queries[7:]
    assert all(any(span in text for text in others) for span in spans)
    assert all(any(span in text for span in spans) for text in others)
    assert all(3 <= len(span.split()) <= 9 for span in spans)


@pytest.mark.parametrize("passages", [10, 50])
def test_where_all_passages_are_drawn_spans_are_of_them(passages: int):
    listed = text_list(0)
    settings = ExitWarmUpSettings(passages=passages, spans=5, variants=2, replaced_words=0.0)
    queries, drawn = draw(listed, settings, np.random.default_rng(0))
    assert sorted(drawn) == sorted(c.text for c in listed.candidates)
    assert all(any(span in text for text in drawn) for span in queries[3:])


def test_variants_of_a_query():
    """Some 0.6 of the words stay, in their order; every other one has one to three words of another passage in a row,
    and none is empty."""
    words = [f"query{n}" for n in range(50)]
    passages = [" ".join(f"{name}{n}" for n in range(20)) for name in "abcd"]
    candidates = tuple(Candidate(doc_id=text[0], text=text) for text in passages)
    listed = CandidateList(query=Query(query_id="q", text=" ".join(words)), candidates=candidates)
    settings = ExitWarmUpSettings(passages=2, spans=0, variants=40, replaced_words=0.0)
    queries, drawn = draw(listed, settings, np.random.default_rng(0))
    others = {text for text in passages if text not in drawn}
    shares, inserts = [], set()
    for number, variant in enumerate(queries[1:]):
        kept = [word for word in variant.split() if word in words]
        assert kept == sorted(kept, key=words.index)
        shares.append(len(kept) / len(words))
        added = " ".join(word for word in variant.split() if word not in words)
        inserts.add(len(added.split()))
        assert bool(added) == bool(number % 2)
        assert not added or (added in variant and any(added in text for text in others))
    assert inserts == {0, 1, 2, 3}
    assert np.mean(shares) == pytest.approx(0.6, abs=0.03)
    short = CandidateList(query=Query(query_id="q", text="one"), candidates=candidates)
    assert "" not in draw(short, settings, np.random.default_rng(0))[0]


def test_passages_vary():
    """Every other one loses up to a third at either end; of the words that stay a tenth are another passage's, and
    nothing else is in them."""
    passages = [" ".join(f"{name}{i}" for i in range(60)) for name in "abcdefgh"]
    kept, lengths = [], []
    for seed in range(20):
        varied = vary(passages, 0.1, np.random.default_rng(seed))
        assert len(varied) == len(passages)
        for number, (before, after) in enumerate(zip(passages, varied, strict=True)):
            words = after.split()
            assert set(words) <= {word for passage in passages for word in passage.split()}
            if number % 2:
                lengths.append(len(words))
            else:
                assert len(words) == 60
                kept.append(np.mean([w == b for w, b in zip(words, before.split(), strict=True)]))
    assert min(lengths) >= 20
    assert min(lengths) < 30 < 50 < max(lengths)
    assert np.mean(kept) == pytest.approx(0.9, abs=0.02)
    assert vary(["", "word"], 1.0, np.random.default_rng(0)) == ["", "word"]


def test_embeddings_stay_and_are_trained_afterwards(tiny_bert: Path):
    student, _ = warmed(tiny_bert, steps=2)
    before = student_of(tiny_bert).backbone
    for name, tensor in before.embeddings.state_dict().items():
        assert torch.equal(tensor, student.backbone.embeddings.state_dict()[name])
    layers = zip(before.encoder.layer, student.backbone.encoder.layer, strict=True)
    assert not any(torch.equal(*(layer.output.dense.weight for layer in pair)) for pair in layers)
    assert all(p.requires_grad for p in student.backbone.embeddings.parameters())


def test_the_trainer_warms_up_before_it_validates_and_not_when_it_resumes(tiny_bert: Path, tmp_path: Path):
    settings = trainer_settings(tiny_bert, tmp_path, {"steps": 2})
    trainer = Trainer(settings, World(), None)
    seen: list[dict] = []

    def keep(metrics: dict, checkpoint: Path | None) -> None:
        seen.append(metrics)
        resumed = Trainer(settings, World(), checkpoint)
        assert resumed.warm_up_metrics == {}
        for a, b in zip(resumed.student.parameters(), trainer.student.parameters(), strict=True):
            assert torch.equal(a, b)

    trainer.validate_and_report(keep)
    assert seen[0]["exit_warm_up/seconds"] > 0
    start = student_of(tiny_bert).backbone.state_dict()
    assert any(not torch.equal(start[k], v) for k, v in trainer.student.backbone.state_dict().items())


def test_a_warm_up_that_was_killed_goes_on_as_if_it_had_not(tiny_bert: Path, tmp_path: Path):
    """From the checkpoint of any of its tenths: the same weights, metrics and first validation, dropout included."""
    warming = {"steps": 20, "optimizer": {"learning_rate": 1e-3}}
    settings = trainer_settings(tiny_bert, tmp_path, warming, max_steps=1)

    def keep(folder: Path, kept: list[dict]) -> Callable[[dict, Path | None], None]:
        def report(metrics: dict, checkpoint: Path | None) -> None:
            kept.append({k: v for k, v in metrics.items() if "second" not in k})
            shutil.copytree(checkpoint, folder / str(metrics["step"]))

        return report

    whole: list[dict] = []
    train(settings, World(), keep(tmp_path / "whole", whole))
    assert [m["step"] for m in whole] == [*range(-19, 0, 2), 0, 1]
    for step in (-11, -1):
        rest: list[dict] = []
        train(settings, World(), keep(tmp_path / f"from{step}", rest), resume=tmp_path / "whole" / str(step))
        assert rest == [m for m in whole if m["step"] > step]
        files = [tmp_path / name / "1" / "student" / "model.safetensors" for name in ("whole", f"from{step}")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_the_trainer_reads_the_texts_beside_its_lists(tiny_bert: Path, tmp_path: Path):
    write_candidates((text_list(n) for n in range(10, 14)), str(tmp_path / "texts"))

    def metrics(**more) -> dict[str, float]:
        settings = trainer_settings(tiny_bert, tmp_path, {"steps": 2} | more)
        warmed = Trainer(settings, World(), None).warm_up_metrics
        return {name: value for name, value in warmed.items() if "kl" in name}

    assert metrics(texts=[str(tmp_path / "texts")]) != metrics()


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"head": "linear", "layers": [1, 3]}, "head: similarity with several layers"),
        ({"head": "similarity"}, "head: similarity with several layers"),
        ({"head": "similarity", "layers": [1, 3], "scale": [1, 2, 3]}, r"scale has 3 entries for 2 layer\(s\)"),
    ],
)
def test_settings_that_cannot_be(student: dict, message: str):
    with pytest.raises(ValidationError, match=message):
        StudentSettings.model_validate({"base": "x", "exit_warm_up": {}} | student)
