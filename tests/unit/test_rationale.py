"""Rationale distillation: texts and losses by hand and beside plain passes, training, and exact resume."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fixtures.rows import make_list, write_labels
from fixtures.students import start
from fixtures.training_world import Reports, in_three_parts
from pydantic import TypeAdapter
from transformers import AutoModelForCausalLM, AutoTokenizer

from rerank_ray.distill.parallel import World
from rerank_ray.distill.policy import Policy
from rerank_ray.distill.rationale import (
    ExplanationTerm,
    PermutationTerm,
    RationaleTrainer,
    ScoreTerm,
    open_terms,
)
from rerank_ray.distill.start import student_prompt
from rerank_ray.errors import ConfigError, InputError, ModelError, RunError
from rerank_ray.losses.pairwise import ranknet
from rerank_ray.models.hf_causal import HFCausal
from rerank_ray.models.protocol import Generate, NextToken
from rerank_ray.models.student import adapt
from rerank_ray.prompts.parse.answer import split_reasoning
from rerank_ray.prompts.parse.permutation import parse_permutation
from rerank_ray.ranking.composition import Child, Ensemble
from rerank_ray.ranking.listwise import RankGPT
from rerank_ray.ranking.scheduler import Outcome
from rerank_ray.records import CandidateList, Labels, Scores, Usage
from rerank_ray.schema import candidate_row, label_columns, labels_from_row
from rerank_ray.settings.models import HFCausalSettings
from rerank_ray.settings.rankers import RankGPTSettings
from rerank_ray.settings.rationale import PermutationTermSettings, RationaleSettings, TermSettings
from rerank_ray.settings.reinforce import PolicySettings
from rerank_ray.settings.student import StudentSettings

LORA = {"rank": 4, "alpha": 8}
SCORES = (3.0, 9.0, 5.0)


def row(
    number: int, rationales: tuple[str, ...] | None, scores: tuple[float, ...] = SCORES, teacher: str = "rank_gpt:m"
) -> dict:
    request = make_list(f"q{number}", len(scores), text=f"cat {number}")
    return candidate_row(request) | label_columns(teacher, Scores(scores=scores, rationales=rationales))


def graded(number: int, rationales: tuple[str, ...], scores: tuple[float, ...] = SCORES) -> dict:
    return row(number, rationales, scores, teacher="erank:m")


@pytest.fixture(scope="module")
def listwise(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Ten lists that a listwise teacher ranked in one window."""
    return write_labels(tmp_path_factory.mktemp("listwise"), [row(i, ("[2] it is.",)) for i in range(10)])


@pytest.fixture(scope="module")
def pointwise(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Eight lists whose passages a pointwise teacher explained one by one, all but the first."""
    return write_labels(tmp_path_factory.mktemp("pointwise"), [graded(i, ("", "Yes.", "Maybe.")) for i in range(8)])


def settings(base: Path, *terms: dict, **changes) -> RationaleSettings:
    content = {
        "policy": {"base": str(base), "max_length": 700, "dtype": "float32", "lora": LORA},
        "terms": terms,
        "queries_per_step": 2,
        "optimizer": {"learning_rate": 1e-2, "warmup_fraction": 0.0, "decay": "constant"},
        "validation": {"fraction": 0.3, "every_steps": 2},
    }
    return RationaleSettings.model_validate(content | changes)


def term(**given) -> TermSettings:
    return TypeAdapter(TermSettings).validate_python({"input": ["x"]} | given)


def policy(base: Path) -> Policy:
    return Policy(PolicySettings(base=str(base), max_length=700, dtype="float32", lora=LORA))


def test_texts_are_turns_of_the_prompts_form():
    """The prefill opens the think block, so what is learnt follows it; erank's template has none."""
    given = labels_from_row(row(0, ("[2] it is.",)))
    assert PermutationTerm(term(kind="permutation")).text(given) == (
        "[2] it is.\n</think>\n<answer>[2] > [3] > [1]</answer>"
    )
    bare = PermutationTerm(term(kind="permutation", prompt="rank_gpt", reasoning=False))
    assert bare.text(given) == "[2] > [3] > [1]"
    explained = ExplanationTerm(term(kind="explanation"))
    given = labels_from_row(graded(0, ("", " Yes. ", "No.")))
    assert explained.text(given, 1) == "<think>\nYes.\n</think>\n<answer>9</answer>"


@pytest.mark.parametrize("opened", ["<think>\n", "<think>"])
def test_a_think_block_that_the_chat_template_opens_is_gone_on_with(tiny_llama: Path, tmp_path: Path, opened: str):
    """What is learnt parses as the answer that it is: no second tag, and a bare ranking behind the block's end."""
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|assistant|>{%", f"<|assistant|>{opened}{{%")
    tokenizer.save_pretrained(folder)
    made = policy(folder)
    learnt: list[str] = []

    def log_probabilities(prompt: list[int], texts: list[list[int]]) -> torch.Tensor:
        learnt.append(tokenizer.decode(prompt).rpartition("<|assistant|>")[2] + "‖" + tokenizer.decode(texts[0]))
        return torch.zeros(1)

    made.log_probabilities = log_probabilities
    explained = labels_from_row(graded(0, ("Yes.", "", "")))
    ExplanationTerm(term(kind="explanation")).loss(made, replace(explained, scores=(9.0, 0.5, 0.5)), 0, 0)
    PermutationTerm(term(kind="permutation", prompt="rank_gpt", reasoning=False)).loss(made, explained, 0, 0)
    within = "Yes.\n</think>\n<answer>9</answer><|end|>"
    assert learnt[0] == (f"{opened}‖{within}" if opened[-1] == "\n" else f"{opened}‖\n{within}")
    assert learnt[1] == f"{opened}‖\n</think>\n\n[2] > [3] > [1]<|end|>"
    written = split_reasoning(learnt[1].replace("‖", "").removesuffix("<|end|>"))[1]
    assert parse_permutation(written, ["1", "2", "3"]).order == (1, 2, 0)


def test_a_prefill_that_the_texts_do_not_begin_with_is_refused(tmp_path: Path):
    template = tmp_path / "t.yaml"
    template.write_text(
        "{method: rank_gpt, about: t, text: '{query} {passages}', passage: '[{identifier}] {passage}', prefill: Well}"
    )
    with pytest.raises(ConfigError, match="prefill is 'Well', but the texts begin with '<think>"):
        PermutationTerm(PermutationTermSettings(input=["x"], prompt=str(template)))


def test_the_likelihood_is_that_of_a_plain_pass(tiny_llama: Path):
    """Cross-entropy over the text's tokens and the end of the turn, and over nothing of the prompt."""
    made, given = policy(tiny_llama), labels_from_row(row(0, ("[2] it is.",)))
    learnt = PermutationTerm(term(kind="permutation"))
    text = made.tokenizer(learnt.text(given), add_special_tokens=False)["input_ids"]
    text.append(made.tokenizer.convert_tokens_to_ids("<|end|>"))
    (prompt,) = made.backend.encoder.encode([learnt.prompt(given)], [len(text)])
    assert made.tokenizer.decode(prompt).endswith("<|assistant|><think>\n")
    ids = torch.tensor([prompt + text])
    wanted = ids.clone()
    wanted[0, : len(prompt)] = -100
    expected = made.model(ids, labels=wanted).loss
    torch.testing.assert_close(learnt.loss(made, given, 0, 0), expected, atol=1e-5, rtol=1e-5)


def test_explanations_count_alike(tiny_llama: Path):
    """Of three passages two are explained: the term is the mean of theirs, however long the texts are."""
    made, explained = policy(tiny_llama), ExplanationTerm(term(kind="explanation"))
    one = [labels_from_row(graded(0, told)) for told in (("", "Yes.", ""), ("", "", "Maybe so, or not at all."))]
    both = labels_from_row(graded(0, ("", "Yes.", "Maybe so, or not at all.")))
    apart = [explained.loss(made, given, 0, 0) for given in one]
    torch.testing.assert_close(explained.loss(made, both, 0, 0), (apart[0] + apart[1]) / 2)


def test_scores_are_the_log_odds_that_a_ranker_reads(tiny_llama: Path):
    """RankNet over what `yes_no` reads off the same model and prompt."""
    made, given = policy(tiny_llama), labels_from_row(row(0, None))
    scored = ScoreTerm(term(kind="score", objective={"losses": [{"loss": "ranknet"}]}))
    calls = [NextToken(prompt=scored._prompt(given, i), labels=("Yes", "No")) for i in range(3)]
    logits = [a.value for a in made.backend.run(calls)]
    scores = torch.tensor([[yes - no for yes, no in logits]])
    expected = ranknet(scores, torch.tensor([SCORES]), torch.ones(1, 3, dtype=torch.bool))[0]
    torch.testing.assert_close(scored.loss(made, given, 0, 0), expected, atol=1e-4, rtol=1e-4)


def test_the_objective_is_the_weighted_sum_of_its_terms(tiny_llama: Path, listwise: str, pointwise: str):
    """ReasoningRank's three, over two teachers' runs: the first step's gradient is the weighted sum of each alone."""
    terms = [
        {"kind": "score", "input": [pointwise], "weight": 0.4},
        {"kind": "explanation", "input": [pointwise], "weight": 0.4},
        {"kind": "permutation", "input": [listwise], "weight": 0.2},
    ]
    gradients = []
    for chosen in ([terms[0]], [terms[1]], [terms[2]], terms):
        # No clipping, and SGD's first step is the gradient.
        trainer = RationaleTrainer(settings(tiny_llama, *chosen, optimizer={"clip_norm": 1e9}), World(), None)
        before = [p.detach().clone() for p in trainer.policy.trained]
        trainer.optimizer = torch.optim.SGD(trainer.policy.trained, lr=1.0)
        trainer.optimizer.param_groups[0]["peak_lr"] = 1.0
        trainer.train_step()
        gradients.append([a - b.detach() for a, b in zip(before, trainer.policy.trained, strict=True)])
    for first, second, third, together in zip(*gradients, strict=True):
        torch.testing.assert_close(together, first + second + third, atol=1e-6, rtol=1e-3)
    assert any(g.abs().max() > 1e-4 for g in gradients[3])


def test_the_policy_learns_to_write_what_the_teacher_wrote(tiny_llama: Path, listwise: str, tmp_path: Path):
    """Its greedy answer to a held-out list is the teacher's text, word for word."""
    whole = {"base": str(tiny_llama), "max_length": 700, "dtype": "float32", "lora": None}
    chosen = settings(tiny_llama, {"kind": "permutation", "input": [listwise]}, policy=whole, epochs=20, max_steps=40)
    reports = Reports(tmp_path)
    RationaleTrainer(chosen, World(), None).run(reports)
    last = reports.metrics[40]
    assert last["validation_score"] > -0.1
    assert last["validation_score"] == pytest.approx(-last["validation_loss/permutation"])
    assert reports.metrics[0]["validation_score"] < -3
    data = open_terms(chosen)[0]
    (held_out,) = data.reader().read(data.validation[:1])
    learnt = PermutationTerm(chosen.terms[0])
    made = Policy(PolicySettings(base=str(tmp_path / "step-40" / "student"), max_length=700, dtype="float32"))
    (answer,) = made.backend.run([Generate(prompt=learnt.prompt(held_out), max_tokens=60)])
    assert (answer.value, answer.cut_off) == (learnt.text(held_out), False)


def test_a_resumed_run_ends_as_an_undisturbed_one(tiny_llama: Path, listwise: str, pointwise: str, tmp_path: Path):
    """Stopped in the first epoch and in a later one, with dropout and two terms of unequal length."""
    chosen = settings(
        tiny_llama,
        {"kind": "explanation", "input": [pointwise]},
        {"kind": "permutation", "input": [listwise]},
        policy={"base": str(tiny_llama), "max_length": 700, "dtype": "float32", "lora": LORA | {"dropout": 0.3}},
        epochs=4,
        max_steps=8,
    )
    whole = Reports(tmp_path / "whole")
    RationaleTrainer(chosen, World(), None).run(whole)
    parts = in_three_parts(tmp_path, lambda report, resume: RationaleTrainer(chosen, World(), resume).run(report))
    seen = {step: metrics for part in parts for step, metrics in part.metrics.items()}
    assert sorted(seen) == sorted(whole.metrics) == [0, 2, 4, 6, 8]
    for step, metrics in whole.metrics.items():
        for name in ("validation_score", "best_step", "loss/permutation"):
            assert seen[step].get(name) == metrics.get(name), (step, name)
    last = [tmp_path / name / "step-8" / "student" / "model.safetensors" for name in ("whole", "until-None")]
    assert last[0].read_bytes() == last[1].read_bytes()


def test_lists_without_what_a_term_learns_from_are_left_out(tiny_llama: Path, tmp_path: Path):
    """Two windows, an empty rationale, an unscored passage; scores that are no integers for explanations."""
    rows = [row(i, ("a",)) for i in range(9)]
    rows += [row(20, ("a", "b")), row(21, (" ",)), row(22, None), row(23, ("a",), (1.0, math.nan, 2.0))]
    mixed = write_labels(tmp_path / "mixed", rows)
    (data,) = open_terms(settings(tiny_llama, {"kind": "permutation", "input": [mixed]}))
    assert len(data.train) + len(data.validation) == 9
    weighted = write_labels(tmp_path / "weighted", [graded(i, ("a", "b", "c"), (6.3, 0.5, 1.1)) for i in range(9)])
    # Grades of 0 times their probability look like grades.
    named = [
        graded(i, ("a", "b", "c"), (6.3, 0.0, 1.1)) | {"teacher": "erank:m:score=weighted:temperature=0:seed=0"}
        for i in range(9)
    ]
    zeros = write_labels(tmp_path / "zeros", named)
    with pytest.raises(InputError, match=r"explanation.* 0 and 0 have"):
        open_terms(settings(tiny_llama, {"kind": "explanation", "input": [zeros]}))
    for kind, wanted in (("permutation", "ranked in one window"), ("explanation", "an integer 0 to 10")):
        with pytest.raises(InputError, match=rf"terms.0 \({kind}\): of \d training .* 0 and 0 have .*{wanted}"):
            open_terms(settings(tiny_llama, {"kind": kind, "input": [weighted]}))


def test_a_template_with_fewer_labels_than_a_list_has_passages_is_refused(
    tiny_llama: Path, listwise: str, tmp_path: Path
):
    """Before anything starts, and not at that list's step."""
    few = tmp_path / "few.yaml"
    few.write_text(
        "{method: rank_gpt, about: test, text: '{query} {passages}', passage: '[{identifier}] {passage}', "
        "labels: [A, B]}"
    )
    with pytest.raises(ConfigError, match="3 passages at once need as many labels, but the rank_gpt template has 2"):
        open_terms(settings(tiny_llama, {"kind": "permutation", "input": [listwise], "prompt": str(few)}))


def test_a_label_of_several_tokens_is_refused(tiny_llama: Path, pointwise: str, tmp_path: Path):
    """By its name; no score could be read, and a longer max_length would not help."""
    wordy = tmp_path / "wordy.yaml"
    wordy.write_text("{method: yes_no, about: test, text: '{query} {passage}', labels: [quite so, 'No']}")
    chosen = settings(tiny_llama, {"kind": "score", "input": [pointwise], "prompt": str(wordy)})
    with pytest.raises(ModelError, match=r"label 'quite so' is \d+ tokens"):
        RationaleTrainer(chosen, World(), None)


def test_first_stage_scores_are_shown_as_a_ranker_shows_them(tiny_llama: Path, tmp_path: Path):
    """A list without them is left out, as a ranker with the template refuses it."""
    scored = [make_list(f"q{i}", 3, scores=(2.5, 1.25, 0.5)) for i in range(9)]
    teacher = label_columns("teacher", Scores(scores=SCORES))
    rows = [candidate_row(request) | teacher for request in scored]
    mixed = write_labels(tmp_path / "mixed", [*rows, row(20, None), row(21, None)])
    shows = {"kind": "permutation", "prompt": "insert_rank", "reasoning": False}
    (data,) = open_terms(settings(tiny_llama, shows | {"input": [mixed]}))
    assert len(data.train) + len(data.validation) == 9
    prompt = PermutationTerm(term(**shows)).prompt(labels_from_row(rows[0]))
    ranker = RankGPT(
        RankGPTSettings(model=HFCausalSettings(path="m"), prompt="insert_rank"), SimpleNamespace(name="model")
    )
    assert [call.prompt for call in next(ranker.rank(scored[0]))] == [prompt]
    assert "(BM25 score: 1.25)" in "".join(prompt.parts)
    without = write_labels(tmp_path / "without", [row(i, None) for i in range(9)])
    with pytest.raises(InputError, match=r"0 and 0 have .* a first-stage score where the prompt shows them"):
        open_terms(settings(tiny_llama, shows | {"input": [without]}))


@pytest.mark.parametrize("teacher", ["group_rank:m", "permutation_self_consistency:m"])
def test_reasoning_over_a_shuffled_list_is_not_learnt(teacher: str):
    """Its [3] is another passage than the list's third."""
    labels = Labels(candidate_list=make_list(), teacher=teacher, scores=SCORES, rationales=("[3] answers it.",))
    assert not PermutationTerm(term(kind="permutation")).teaches(labels)
    assert PermutationTerm(term(kind="permutation", reasoning=False, prompt="rank_gpt")).teaches(labels)
    assert PermutationTerm(term(kind="permutation")).teaches(replace(labels, teacher="rank_gpt:m"))


@pytest.mark.parametrize(
    "teacher",
    [
        "rank_gpt:m",
        "setwise:m",
        "permutation_self_consistency:m",
        "cascade:(bi_encoder:m)>4(rank_r1:m)",
        "selective:entropy@10>0.5:(setwise:m)|(erank:m)",
    ],
)
def test_reasoning_over_several_passages_explains_none(teacher: str):
    """Three texts for three passages, whose scores, N - rank, might be grades."""
    texts = ("[2] > [1]", "[3] > [2]", "[1]")
    labels = Labels(candidate_list=make_list(), teacher=teacher, scores=(2.0, 1.0, 0.0), rationales=texts)
    assert not ExplanationTerm(term(kind="explanation")).teaches(labels)
    assert ExplanationTerm(term(kind="explanation")).teaches(replace(labels, teacher="erank:m"))


@pytest.mark.parametrize("combine", ["borda", "minmax", "kemeny"])
def test_a_grade_that_an_ensemble_replaced_is_not_learnt(combine: str):
    """It passes on erank's texts, which end in 9, 6 and 1, beside fused scores that may be integers from 0 to 10."""

    def child(name: str, scores: tuple[float, ...], rationales: tuple[str, ...] | None = None) -> Child:
        def rank(requests: Sequence[CandidateList]) -> list[Outcome]:
            given = Scores(scores=scores, rationales=rationales)
            return [Outcome(request=request, scores=given, usage=Usage()) for request in requests]

        return Child(path=name, name=name, rank=rank)

    children = {
        "a": child("erank:m", (9.0, 6.0, 1.0), ("Exactly: 9.", "Partly: 6.", "Barely: 1.")),
        "b": child("bi_encoder:m", (0.9, 0.5, 0.1)),
    }
    ensemble = Ensemble(SimpleNamespace(combine=combine, weights=None), children)
    scores = ensemble.rank([make_list()])[0].scores
    labels = Labels(
        candidate_list=make_list(), teacher=ensemble.name, scores=scores.scores, rationales=scores.rationales
    )
    assert any(s in range(11) for s in labels.scores)
    assert not ExplanationTerm(term(kind="explanation")).teaches(labels)


def test_texts_that_do_not_fit_are_skipped(tiny_llama: Path):
    """The text alone is longer than max_length: there is no shorter one that says the same."""
    made = Policy(PolicySettings(base=str(tiny_llama), max_length=64, dtype="float32", lora=LORA))
    given = labels_from_row(row(0, ("much reasoning " * 20,)))
    assert PermutationTerm(term(kind="permutation")).loss(made, given, 0, 0) is None


@pytest.mark.parametrize("head", ["yes_no", "linear"])
def test_a_second_adapter_goes_on_a_first(tiny_llama: Path, tmp_path: Path, head: str):
    """DeAR: the first stage's adapter, saved alone, is added to its base; the second stage trains one of its own."""
    first = StudentSettings(base=str(tiny_llama), head=head, max_length=256, lora={**LORA, "save": "adapter"})
    student = start(tiny_llama, head, prompt=student_prompt(first), max_length=256)
    adapt(student, first)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.1)
    student.save(tmp_path / "first")
    assert not (tmp_path / "first" / "model.safetensors").exists()
    second = policy(tmp_path / "first")
    # Readers of a scalar head's folder would put its pairs into a chat template; the second stage's prompts are a chat.
    with_template = AutoTokenizer.from_pretrained(tmp_path / "first").chat_template is not None
    assert with_template is (head == "yes_no")
    assert second.backend.encoder.chat
    assert second.tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny_llama).chat_template is not None
    ids = torch.tensor([[5, 9, 200, 31]])
    with torch.no_grad():
        states = second.model.base_model(ids).last_hidden_state
        expected = student.pretrained.base_model(ids).last_hidden_state
        plain = AutoModelForCausalLM.from_pretrained(tiny_llama).base_model(ids).last_hidden_state
    torch.testing.assert_close(states, expected, atol=1e-4, rtol=1e-4)
    assert (states - plain).abs().max() > 1e-2
    assert {n.split(".")[-3] for n, p in second.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_adapters_saved_alone_are_read_by_what_ranks_and_by_a_third_stage(tiny_llama: Path, tmp_path: Path):
    """Each stage's folder names the one before as its base; what writes and what trains on see all adapters."""
    settings = {"max_length": 256, "dtype": "float32", "lora": {**LORA, "save": "adapter"}}
    base, ids, seen = tiny_llama, torch.tensor([[5, 9, 200, 31]]), []
    for stage in ("first", "second"):
        trained = Policy(PolicySettings(base=str(base), **settings))
        with torch.no_grad():
            for name, parameter in trained.named_parameters():
                if "lora_" in name:
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
            seen.append(trained.model(ids).logits)
        base = tmp_path / stage
        trained.save(base)
        assert not (base / "model.safetensors").exists()
        ranking = HFCausal(HFCausalSettings(path=str(base), max_length=256, dtype="float32"))
        third = Policy(PolicySettings(base=str(base), **settings))
        with torch.no_grad():
            for model in (ranking.model, third.model):
                torch.testing.assert_close(model(ids).logits, seen[-1], atol=1e-4, rtol=1e-4)
    assert (seen[1] - seen[0]).abs().max() > 1e-2


def test_training_that_diverges_ends_there(listwise: str, tiny_llama: Path):
    """With weights that are no numbers every later step and validation would be paid for nothing."""
    rate = {"learning_rate": 1e38, "warmup_fraction": 0.0, "decay": "constant"}
    chosen = settings(tiny_llama, {"kind": "permutation", "input": [listwise]}, optimizer=rate)
    with pytest.raises(RunError, match="training has diverged: lower"):
        RationaleTrainer(chosen, World(), None).run(lambda metrics, folder: None)
