"""GRPO: advantages and loss by hand, tasks and their rewards, and training on a tiny Llama."""

from __future__ import annotations

import itertools
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.rows import label_row, write_labels
from fixtures.tiny_models import THINKING_TEMPLATE, WORDS, tiny_llama_tokenizer
from fixtures.training_world import Reports, in_three_parts
from pydantic import TypeAdapter, ValidationError

from rerank_ray.distill.grpo import Group, GRPOTrainer, advantages, clipped_loss, kl_estimate, open_labels
from rerank_ray.distill.metrics_log import policy_summary_line
from rerank_ray.distill.parallel import World
from rerank_ray.distill.tasks import Task, make_task
from rerank_ray.errors import ConfigError, InputError, ModelError
from rerank_ray.models.protocol import Answer, NextToken
from rerank_ray.records import Candidate, CandidateList, Query, Usage
from rerank_ray.schema import labels_from_row
from rerank_ray.settings.reinforce import ReinforceSettings, RewardSettings

LORA = {"rank": 4, "alpha": 8}


def row(number: int, *, gains: bool = True) -> dict:
    """A list of four; the first and the third passage are relevant."""
    random = np.random.default_rng(number)
    candidates = tuple(
        Candidate(doc_id=f"d{i}", text=" ".join(random.choice(WORDS, 6)), label=float(i in (0, 2)) if gains else None)
        for i in range(4)
    )
    query = Query(query_id=f"q{number}", text=str(random.choice(WORDS)))
    return label_row(CandidateList(query=query, candidates=candidates), [8.0, 3.0, 5.0, 1.0])


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_labels(tmp_path_factory.mktemp("labels"), [row(i) for i in range(12)])


def settings(labels: str, base: Path, **changes) -> ReinforceSettings:
    content = {
        "input": [labels],
        "policy": {"base": str(base), "max_length": 256, "lora": LORA, "dtype": "float32"},
        "reward": {"kind": "prorank", "prompt": "yes_no", "max_tokens": 2},
        "sampling": {"group_size": 2, "positives": 1},
        "samples": 4,
        "queries_per_step": 2,
        "optimizer": {"learning_rate": 3e-2, "weight_decay": 0.0, "decay": "constant", "warmup_fraction": 0.0},
        "validation": {"fraction": 0.3, "every_steps": 2},
        "epochs": 2,
    }
    return ReinforceSettings.model_validate(content | changes)


# The loss


def test_advantages_by_hand():
    """Rewards 0, 0, 0, 4: mean 1, deviation √3. A prompt whose answers are all worth 0.1 has exactly none."""
    result = advantages(torch.tensor([[0.0, 0.0, 0.0, 4.0], [0.1, 0.1, 0.1, 0.1]]))
    expected = [-1 / math.sqrt(3)] * 3 + [math.sqrt(3)]
    torch.testing.assert_close(result[0], torch.tensor(expected), atol=1e-3, rtol=0)
    assert result[1].tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.5, 2.0, -2.4, 0.0),
        (0.5, 2.0, -1.0, -1.0),
        (0.5, -2.0, 1.6, 0.0),
        (1.5, -2.0, 3.0, 3.0),
    ],
)
def test_the_clipped_loss_by_hand(ratio: float, advantage: float, loss: float, slope: float):
    """Clip 0.2. A token that became likelier than 1.2 times, and deserved it, is left alone; so is one that became
    rarer than 0.8 times and deserved that. The slope is that of the loss over the log-probability: −r · A."""
    now = torch.tensor([math.log(ratio)], requires_grad=True)
    result = clipped_loss(now, torch.zeros(1), torch.tensor([advantage]), 0.2)
    result.sum().backward()
    assert result.item() == pytest.approx(loss, abs=1e-5)
    assert now.grad.item() == pytest.approx(slope, abs=1e-5)


def test_the_kl_estimate_is_unbiased_and_never_negative():
    """Its mean over p is KL(p ‖ q), here over the whole vocabulary."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    estimate = kl_estimate(p.log(), q.log())
    assert (estimate >= 0).all()
    assert (p * estimate).sum().item() == pytest.approx((p * (p / q).log()).sum().item(), abs=1e-6)


def test_a_toy_policy_learns_what_is_rewarded():
    """Three answers of one token; the second is rewarded. Its probability rises with every update, to almost 1."""
    logits = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=1.0)
    generator = torch.Generator().manual_seed(0)
    seen = [1 / 3]
    for _ in range(20):
        drawn = torch.multinomial(logits.softmax(0).detach(), 16, replacement=True, generator=generator)
        advantage = advantages((drawn == 1).float()[None])[0]
        now = logits.log_softmax(0)[drawn]
        optimizer.zero_grad()
        clipped_loss(now, now.detach(), advantage, 0.2).mean().backward()
        optimizer.step()
        seen.append(logits.softmax(0)[1].item())
    assert all(after >= before for before, after in itertools.pairwise(seen))
    assert seen[-1] > 0.95


# Tasks


def answer(text: str, *, cut_off: bool = False) -> Answer:
    return Answer(value=text, usage=Usage(calls=1), cut_off=cut_off)


def task(reward: dict) -> Task:
    return make_task(TypeAdapter(RewardSettings).validate_python(reward))


def test_tasks_read_answers_for_the_passages_as_shown():
    """Passages 3, 2 and 1 of the list, in that order: the first and the third shown are relevant."""
    given, shown = labels_from_row(row(0)), [2, 1, 0]
    (prompt,) = task({"kind": "rank_r1"}).prompts(given, shown)
    assert prompt.passages == tuple(given.candidate_list.candidates[i].text for i in shown)

    def worth(answers: list[list[Answer]], **reward) -> list[list[float]]:
        assert len(task(reward).prompts(given, shown)) == len(answers)
        return [[r.value for r in of_prompt] for of_prompt in task(reward).rewards(given, shown, answers)]

    assert worth([[answer("1"), answer("0")]] * 3, kind="prorank") == [[2, 1], [1, 2], [2, 1]]
    best = [[answer("<think>.</think><answer>[1]</answer>"), answer("<think>.</think><answer>[2]</answer>")]]
    assert worth(best, kind="rank_r1") == [[1.0, 0.0]]
    # Prefilled with <think>; the teacher's order of what is shown is 3, 1, 2.
    order = [[answer("hm</think><answer>[3] > [1] > [2]</answer>"), answer("hm</think><answer>[3]</answer>")]]
    assert worth(order, kind="reason_rank") == [[pytest.approx(1.3), 0.0]]
    assert worth([[answer('{"1": 5, "2": 0, "3": 5}')]], kind="group_rank") == [[pytest.approx(1.3)]]
    # References 5, 3, 8; the integers 9, 7 and 2 of the relevant ones are above the other's 2 and below its 8.
    integers = [[answer("9"), answer("7")], [answer("2"), answer("8")], [answer("9"), answer("<answer>")]]
    assert worth(integers, kind="erank") == [[1.0, 0.25], [-1.0, -100.0], [1.0, -100.0]]


def test_tasks_show_first_stage_scores(tmp_path: Path, tiny_llama: Path):
    """Those of the passages shown, in their order; lists without are left out of the labels."""
    rows = [row(i) for i in range(12)]
    for number, of_list in enumerate(rows[:10]):
        for i, candidate in enumerate(of_list["candidates"]):
            candidate["score"] = number + i / 4
    reward = {"kind": "reason_rank", "prompt": "insert_rank", "reasoning": False, "max_tokens": 9}
    (prompt,) = task(reward).prompts(labels_from_row(rows[1]), [2, 0])
    assert [part.partition(" (BM25 score: ")[2][:4] for part in prompt.parts[1:]] == ["1.50", "1.00"]
    some = open_labels(settings(write_labels(tmp_path / "some", rows), tiny_llama, reward=reward))
    assert len(some.train) + len(some.validation) == 10
    without = write_labels(tmp_path / "without", [row(i) for i in range(12)])
    with pytest.raises(InputError, match="0 and 0 have the first-stage score of each passage, which insert_rank shows"):
        open_labels(settings(without, tiny_llama, reward=reward))
    open_labels(settings(without, tiny_llama))


def test_a_template_with_fewer_labels_than_passages_is_refused(labels: str, tiny_llama: Path, tmp_path: Path):
    """Before anything starts, and not at the first list that is long enough."""
    few = tmp_path / "few.yaml"
    few.write_text(
        "{method: rank_r1, about: test, text: '{query} {passages}', passage: '{identifier} {passage}', labels: [A, B]}"
    )
    reward = {"kind": "rank_r1", "prompt": str(few), "max_tokens": 4}
    open_labels(settings(labels, tiny_llama, reward=reward))
    with pytest.raises(ConfigError, match="3 passages at once need as many labels, but the rank_r1 template has 2"):
        open_labels(settings(labels, tiny_llama, reward=reward, sampling={"group_size": 3}))


def test_a_template_of_another_method_is_refused():
    with pytest.raises(ConfigError, match="template 'setwise' is written for setwise, not rank_r1"):
        task({"kind": "rank_r1", "prompt": "setwise"})


# Training


def short_answers(tmp_path: Path) -> Path:
    """A template whose answers are one token each, which the tiny model writes in a few of 100 texts."""
    path = tmp_path / "short.yaml"
    path.write_text("{method: yes_no, about: test, text: '{query} {passage}', chat: false, labels: [kappa, gamma]}")
    return path


def test_the_policy_learns_the_form(labels: str, tiny_llama: Path, tmp_path: Path):
    """Of the random model's answers few are one of the labels and nothing else; 20 steps later most are."""
    chosen = settings(
        labels, tiny_llama,
        reward={"kind": "prorank", "prompt": str(short_answers(tmp_path)), "max_tokens": 1},
        samples=32, epochs=10, max_steps=20, validation={"fraction": 0.3, "every_steps": 5},
    )  # fmt: skip
    reports = Reports(tmp_path / "run")
    GRPOTrainer(chosen, World(), None).run(reports)
    assert sorted(reports.metrics) == [0, 5, 10, 15, 20]
    first, last = reports.metrics[5], reports.metrics[20]
    assert first["well_formed"] < 0.1
    assert last["well_formed"] > 0.5
    assert last["reward"] > first["reward"] + 0.5
    assert reports.metrics[0]["validation_reward"] < 0.5
    assert last["validation_reward"] >= 1.5


def test_answers_that_are_all_alike_teach_nothing(labels: str, tiny_llama: Path):
    """No random text of one token is a JSON object: every reward is −0.1, and the weights stay as they are."""
    trainer = GRPOTrainer(
        settings(labels, tiny_llama, reward={"kind": "group_rank", "max_tokens": 1}, max_steps=1), World(), None
    )
    before = [p.detach().clone() for p in trainer.trained]
    assert trainer.draw() == []
    trainer.train_step()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.trained, strict=True))


GROUPS = [
    Group(prompt=[5, 9, 200], texts=((40, 41), (8,), (12, 77, 1)), advantages=(1.2, -0.6, -0.6), weight=1 / 6),
    Group(prompt=[31, 7], texts=((8,), (40, 1), (9, 9)), advantages=(0.7, -1.4, 0.7), weight=1 / 6),
]


def updated(trainer: GRPOTrainer, updates: int) -> tuple[float, float]:
    """How much Σ advantage · mean log-probability of the groups' answers rose, and the KL estimate in the end."""

    @torch.no_grad()
    def worth() -> float:
        total = 0.0
        for group in GROUPS:
            for text, advantage in zip(group.texts, group.advantages, strict=True):
                total += advantage * float(trainer.policy.log_probabilities(group.prompt, [text]).mean())
        return total

    before, told = worth(), []
    for _ in range(updates):
        told = trainer._update(GROUPS, told)
    with torch.no_grad():
        now = trainer.policy.log_probabilities(GROUPS[0].prompt, GROUPS[0].texts)
        with trainer.policy.without_adapters():
            base = trainer.policy.log_probabilities(GROUPS[0].prompt, GROUPS[0].texts)
    return worth() - before, float(kl_estimate(now, base).sum())


def test_an_update_raises_what_was_worth_more(labels: str, tiny_llama: Path):
    """The first is the policy's gradient itself; later ones are held back where an answer's ratio to the policy that
    drew it passed the clip, so that a wide clip goes further than a narrow one."""
    once, few, free = (
        updated(GRPOTrainer(settings(labels, tiny_llama, clip=clip), World(), None), updates)
        for updates, clip in ((1, 0.2), (8, 0.05), (8, 0.9))
    )
    assert 0 < once[0] < few[0] < free[0]


def test_a_steps_later_updates_are_held_to_its_answers(labels: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch):
    """With one update the ratios are 1 and nothing is clipped; the fourth is off from what drew the answers."""
    clipped = []
    for updates in (1, 4):
        trainer = GRPOTrainer(settings(labels, tiny_llama, updates_per_step=updates, clip=0.01), World(), None)
        monkeypatch.setattr(trainer, "draw", lambda: GROUPS)
        trainer.train_step()
        clipped.append(trainer._sums["clipped"])
    assert clipped[0] == 0 < clipped[1]


def test_a_label_is_drawn_where_a_ranker_reads_it(labels: str, tiny_llama: Path, tmp_path: Path):
    """Behind the empty think block that the template's own turns have, where a yes_no ranker or student reads."""
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    tokenizer = tiny_llama_tokenizer()
    tokenizer.chat_template = THINKING_TEMPLATE
    tokenizer.save_pretrained(folder)
    trainer = GRPOTrainer(settings(labels, folder, kl_weight=0.1), World(), None)
    (drawn, *_) = trainer.draw()
    assert tokenizer.decode(drawn.prompt).endswith("<|assistant|><think>\n\n</think>\n\n")
    read = set()
    for given in trainer.reader.read(trainer.data.train):
        query, template = given.candidate_list.query, trainer.task.template
        prompts = [template.prompt(query, candidate) for candidate in given.candidate_list.candidates]
        asked = [NextToken(prompt=prompt, labels=template.labels) for prompt in prompts]
        read |= {tuple(e.prompt) for e in trainer.policy.backend.encoder.encode_calls(asked)}
    assert tuple(drawn.prompt) in read


def test_micro_batches_add_up_to_the_same_gradient(labels: str, tiny_llama: Path):
    """Answers one at a time, or all of a group's in one row."""
    gradients = []
    for tokens in (8192, 1):
        trainer = GRPOTrainer(settings(labels, tiny_llama, tokens_per_micro_batch=tokens), World(), None)
        for group in GROUPS:
            for part in [[0, 1, 2]] if tokens > 1 else [[0], [1], [2]]:
                trainer._backward(group, part, None)
        gradients.append([p.grad.clone() for p in trainer.trained])
        trainer.optimizer.zero_grad()
        told = trainer._update(GROUPS, [])
        assert [len(parts) for parts in told] == ([1, 1] if tokens > 1 else [3, 3])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_the_kl_holds_the_policy_at_its_base(labels: str, tiny_llama: Path):
    """A weight that drowns the rewards leaves the policy nearer to its base."""
    (_, free), (_, held) = (
        updated(GRPOTrainer(settings(labels, tiny_llama, kl_weight=weight), World(), None), 8)
        for weight in (1e-6, 10.0)
    )
    assert 0 < held < 0.5 * free


@pytest.mark.parametrize("policy", [{"lora": LORA}, {"lora": None}])
def test_a_resumed_run_ends_as_an_undisturbed_one(labels: str, tiny_llama: Path, tmp_path: Path, policy: dict):
    """Stopped in the first epoch and in a later one: every byte of the policy is the same, and every metric."""
    base = {"base": str(tiny_llama), "max_length": 256, "dtype": "float32"}
    reward = {"kind": "prorank", "prompt": str(short_answers(tmp_path)), "max_tokens": 1}
    chosen = settings(
        labels, tiny_llama, policy=base | policy, reward=reward, updates_per_step=2, epochs=4, max_steps=8
    )
    whole = Reports(tmp_path / "whole")
    GRPOTrainer(chosen, World(), None).run(whole)
    parts = in_three_parts(tmp_path, lambda report, resume: GRPOTrainer(chosen, World(), resume).run(report))
    seen = {step: metrics for part in parts for step, metrics in part.metrics.items()}
    assert sorted(seen) == sorted(whole.metrics)
    for step, metrics in whole.metrics.items():
        for name in ("validation_reward", "best_step", "reward", "gradient_norm"):
            assert seen[step].get(name) == metrics.get(name), (step, name)
    files = [tmp_path / name / "step-8" / "student" / "model.safetensors" for name in ("whole", "until-None")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].read_bytes() != (whole.checkpoint(2) / "student" / "model.safetensors").read_bytes()


def test_a_line_for_people():
    metrics = {"step": 4, "total_steps": 8, "validation_reward": 0.5, "validation_seconds": 3.0, "reward": 0.25}
    metrics |= {"well_formed": 0.75, "clipped": 0.0, "skipped_queries": 2.0, "best_step": 4}
    assert policy_summary_line(metrics) == (
        "step 4/8, validation reward 0.5000, reward 0.2500, well formed 0.7500, 2 queries skipped, best at step 4"
    )


def test_eranks_references_are_grades(tmp_path: Path, tiny_llama: Path):
    """A first stage's score of 30 would cost an integer of 0 nine hundred, and a wrong order a hundred."""
    far = [row(i) | {"scores": [30.0, 3.0, 5.0, 1.0]} for i in range(12)]
    reward = {"kind": "erank", "max_tokens": 4}
    chosen = settings(write_labels(tmp_path / "far", far), tiny_llama, reward=reward)
    with pytest.raises(InputError, match=r"scores go from 1 to 30; .* must lie between 0 and 10"):
        open_labels(chosen)
    near = [row(i) for i in range(12)]
    open_labels(settings(write_labels(tmp_path / "near", near), tiny_llama, reward=reward))


def test_what_can_not_be_rewarded_is_refused(tmp_path: Path, tiny_llama: Path):
    without = write_labels(tmp_path / "without", [row(i, gains=False) for i in range(8)])
    with pytest.raises(InputError, match="every answer would be worth the same: ingest with qrels"):
        GRPOTrainer(settings(without, tiny_llama), World(), None)
    alike = [row(i) for i in range(8)]
    for labels in alike:
        for number, candidate in enumerate(labels["candidates"]):
            candidate["label"] = 1.0 + number % 2
    with pytest.raises(InputError, match="with a known gain above 0 and others without"):
        open_labels(settings(write_labels(tmp_path / "relevant", alike), tiny_llama))
    some = write_labels(tmp_path / "fit", [row(i) for i in range(8)])
    short = {"base": str(tiny_llama), "max_length": 20, "dtype": "float32"}
    with pytest.raises(ModelError, match="max_length leaves 18: raise max_length"):
        GRPOTrainer(settings(some, tiny_llama, policy=short), World(), None)
    rows = [row(i, gains=i > 0) for i in range(12)]
    trainer = GRPOTrainer(settings(write_labels(tmp_path / "some", rows), tiny_llama), World(), None)
    asked = trainer._ask([labels_from_row(rows[0]), labels_from_row(rows[1])], 0, 2, 1.0)
    assert len(asked) == 1
    assert trainer._sums["skipped_queries"] == 1


def test_steps_that_skip_every_query_say_so(labels: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch):
    trainer = GRPOTrainer(settings(labels, tiny_llama), World(), None)
    assert trainer._since_last() == {}
    monkeypatch.setattr(trainer, "_shown", lambda labels, epoch: [1, 3])
    trainer.train_step()
    assert trainer._since_last() == {"skipped_queries": 2.0}


def test_a_validation_holds_the_texts_of_few_lists(labels: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch):
    """They are read as they are asked, not all before the first is."""
    trainer = GRPOTrainer(settings(labels, tiny_llama, queries_per_step=1), World(), None)
    read, ask = [], trainer._ask
    reader = trainer.validation_reader.read
    monkeypatch.setattr(trainer.validation_reader, "read", lambda where: (read.append(r) or r for r in reader(where)))
    seen = []
    monkeypatch.setattr(trainer, "_ask", lambda *given: seen.append(len(read)) or ask(*given))
    trainer.validate()
    assert seen == list(range(1, len(trainer.data.validation) + 1))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"policy": {"base": "m", "lora": {"dropout": 0.1}}}, "answers are drawn without it"),
        ({"policy": {"base": "m", "lora": None}, "kl_weight": 0.1}, "set policy.lora"),
        ({"policy": {"base": "m", "max_length": 2}}, "leaves no room for a prompt"),
        ({"samples": 1}, "greater than or equal to 2"),
        ({"reward": {"kind": "prorank", "penalty": 3}}, "Extra inputs"),
    ],
)
def test_settings_that_can_not_be(given: dict, message: str):
    with pytest.raises(ValidationError, match=message):
        settings("x", Path("m"), **given)
