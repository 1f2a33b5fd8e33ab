"""The recipes of the literature: each is read as it ships and takes a few steps on a tiny model of its architecture."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.rows import label_row, write_labels
from fixtures.tiny_models import WORDS, tiny_bert_folder, tiny_bert_tokenizer, tiny_llama_folder, tiny_t5_folder
from transformers import DebertaV2Config, DebertaV2Model, ElectraConfig, ElectraModel

from rerank_ray import config
from rerank_ray.distill.parallel import World
from rerank_ray.distill.targets import Targets, objective
from rerank_ray.distill.train import Trainer
from rerank_ray.models.student import load_student
from rerank_ray.records import Candidate, CandidateList, Query
from rerank_ray.settings.distill import DistillSettings
from rerank_ray.settings.models import ModelSettings
from rerank_ray.settings.objective import ObjectiveSettings

RECIPES = Path(__file__).parents[2] / "configs" / "distill"
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def electra(folder: Path) -> Path:
    return _encoder(folder, ElectraModel, ElectraConfig, embedding_size=16)


def deberta(folder: Path) -> Path:
    more = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 2, "pooler_hidden_size": 32}
    return _encoder(folder, DebertaV2Model, DebertaV2Config, **more)


def _encoder(folder: Path, model, kind, **more) -> Path:
    torch.manual_seed(0)
    tokenizer = tiny_bert_tokenizer()
    model(kind(vocab_size=len(tokenizer), max_position_embeddings=128, **SIZES, **more)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# What a tiny model needs otherwise than the recipe has it, beside `base`.
RECIPE_MODELS = {
    "cross-encoder": (electra, []),
    "rank-distillm": (electra, []),
    "rankgpt-permutation": (deberta, []),
    "rankllama": (tiny_llama_folder, []),
    "dear-stage1": (tiny_llama_folder, []),
    "flagembedding-layerwise": (tiny_llama_folder, ["student.layers=[1,2]", "student.instruction=Answer Yes or No."]),
    "rankt5": (tiny_t5_folder, ["student.token=cat"]),
    "mvp": (partial(tiny_t5_folder, sentinels=4), []),
    "similarity": (tiny_bert_folder, []),
    "layerwise": (tiny_bert_folder, ["student.layers=[1,2,3]"]),
}


def test_every_recipe_is_tried():
    assert {p.stem for p in RECIPES.glob("*.yaml")} == set(RECIPE_MODELS)


def test_flagembeddings_objective_is_theirs():
    """Of a query they add cross-entropy on the positive and −Σ softmax(t)·log softmax(s) over all layers, and with a
    teacher nothing else; ours is that by the number of layers, less the teacher's entropy, which no score changes."""
    loaded = config.load(DistillSettings, RECIPES / "flagembedding-layerwise.yaml")
    random = torch.Generator().manual_seed(0)
    scores = torch.randn(21, 2, 4, generator=random)
    teacher = torch.randn(2, 4, generator=random).sort(descending=True).values
    gains, mask = torch.tensor([[0.0, 1.0, 0.0, 0.0]] * 2), torch.ones(2, 4, dtype=torch.bool)
    targets = Targets(teacher=teacher, gains=gains, mask=mask, confidence=torch.ones(2))
    logs, target = scores.log_softmax(-1), teacher.softmax(-1)
    theirs = -(logs[..., 1] + (target * logs).sum(-1)).sum(0)
    entropy = -(target * target.log()).sum(-1)
    torch.testing.assert_close(objective(scores, targets, loaded.objective)["total"].loss, theirs / 21 - entropy)


@pytest.mark.parametrize("recipe", ["rankllama", "rankt5", "flagembedding-layerwise"])
def test_positives_of_a_group_do_not_compete(recipe: str):
    """Their groups have one positive each: a group of two is the mean of both, each with the negatives alone."""
    loaded = config.load(DistillSettings, RECIPES / f"{recipe}.yaml")
    term = next(t for t in loaded.objective.losses if t.target == "gains")
    scores = torch.randn(1, 1, 5, generator=torch.Generator().manual_seed(0))

    def loss(*kept: int) -> torch.Tensor:
        mask = torch.zeros(1, 5, dtype=torch.bool)
        mask[0, list(kept)] = True
        gains = torch.tensor([[1.0, 0.0, 2.0, 0.0, 0.0]])
        targets = Targets(teacher=-torch.arange(5.0)[None], gains=gains, mask=mask, confidence=torch.ones(1))
        return objective(scores, targets, ObjectiveSettings(losses=(term,)))["total"].loss

    torch.testing.assert_close(loss(0, 1, 2, 3, 4), (loss(0, 1, 3, 4) + loss(1, 2, 3, 4)) / 2)


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twelve queries, four candidates each; the teacher counts `cat`, and the passage with most of them is judged."""
    rows = []
    for number in range(12):
        random = np.random.default_rng(number)
        counts = random.permutation(4)
        texts = [" ".join(["cat"] * n + list(random.choice(WORDS[:8], 5 - n))) for n in counts]
        candidates = tuple(Candidate(doc_id=f"d{i}", text=t, label=float(counts[i] == 3)) for i, t in enumerate(texts))
        request = CandidateList(query=Query(query_id=f"q{number}", text="cat"), candidates=candidates)
        rows.append(label_row(request, [float(n) for n in counts]))
    return write_labels(tmp_path_factory.mktemp("labels"), rows)


@pytest.mark.parametrize("recipe", RECIPE_MODELS)
def test_a_recipe_trains(recipe: str, labels: str, tmp_path: Path):
    """Three steps at a hundred times its rate: finite losses, weights that move, and a student that loads again."""
    make, changes = RECIPE_MODELS[recipe]
    base = make(tmp_path / "base")
    loaded = config.load(DistillSettings, RECIPES / f"{recipe}.yaml", [f"input=[{labels}]", f"student.base={base}"])
    rate = 100 * loaded.optimizer.learning_rate
    sizes = [
        "student.max_length=96",
        "student.max_query_length=16",
        "queries_per_step=4",
        "max_steps=3",
        "dtype=float32",
    ]
    small = ["sampling.bands=null", f"optimizer.learning_rate={rate}", *sizes, *changes]
    chosen = config.load(
        DistillSettings, RECIPES / f"{recipe}.yaml", [f"input=[{labels}]", f"student.base={base}", *small]
    )
    trainer = Trainer(chosen, World(), None)
    before = [p.detach().clone() for p in trainer.student.parameters()]
    losses = [trainer.train_step() for _ in range(3)]
    for values in losses:
        assert all(math.isfinite(v) for v in values.values())
        assert values["total"] > 0
    moved = [not torch.equal(a, b) for a, b in zip(before, trainer.student.parameters(), strict=True)]
    if chosen.student.lora is None:
        assert sum(moved) > 0.9 * len(moved)
    else:
        assert 2 <= sum(moved) < len(moved)
    trainer.student.save(tmp_path / "student")
    student = load_student(ModelSettings(path=str(tmp_path / "student"))).eval()
    encoded = student.collate(student.encode(["cat"], ["dog"]))
    with torch.no_grad():
        torch.testing.assert_close(student(**encoded), trainer.student.eval()(**encoded), atol=1e-4, rtol=1e-4)
