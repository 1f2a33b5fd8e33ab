"""Students in bfloat16 read their scores off the last states without rounding them to eight bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fixtures.students import DOCUMENTS, QUERIES, start, stirred
from torch import nn

from rerank_ray.models.cross_encoder import CrossEncoder
from rerank_ray.models.output_layer import give_float32
from rerank_ray.models.protocol import Pair
from rerank_ray.models.student import StudentPrompt
from rerank_ray.settings.models import CrossEncoderSettings

MONOT5 = StudentPrompt(text="Query: {query} Document: {passage} Relevant:", chat=False, labels=("true", "false"))
WORDS = StudentPrompt(text="{query} | {passage} ?", chat=False, labels=("Yes", "No"))
STUDENTS = {
    "linear": ("tiny_bert", {"head": "linear"}),
    "layer-wise": ("tiny_bert", {"head": "linear", "layers": (1, 3)}),
    "decoder": ("tiny_llama", {"head": "linear"}),
    "decoder, layer-wise": ("tiny_llama", {"head": "linear", "layers": (1, 2)}),
    "decoder, yes_no": ("tiny_llama", {"head": "yes_no", "prompt": WORDS}),
    "T5, its encoder": ("tiny_t5", {"head": "linear"}),
    "T5, yes_no": ("tiny_t5", {"head": "yes_no", "prompt": MONOT5}),
    "T5, one token": ("tiny_t5", {"head": "token_logit", "prompt": MONOT5.model_copy(update={"labels": ("cat",)})}),
}


@pytest.mark.parametrize("kind", STUDENTS)
def test_scores_have_more_than_eight_bits(request: pytest.FixtureRequest, tmp_path: Path, kind: str):
    """They are near those of the model in float32, and hardly one is a number that bfloat16 has."""
    base, given = STUDENTS[kind]
    stirred(start(request.getfixturevalue(base), **given)).save(tmp_path / "s")
    pairs = [Pair(query=q, text=d) for q, d in zip(QUERIES, DOCUMENTS, strict=True)]
    exact, rounded = (
        torch.tensor(
            [r.value for r in CrossEncoder(CrossEncoderSettings(path=str(tmp_path / "s"), dtype=dtype)).run(pairs)]
        )
        for dtype in ("float32", "bfloat16")
    )
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.05 * float(exact.abs().max()))
    assert (rounded.bfloat16().float() != rounded).sum() > len(pairs) // 2


def test_similarities_are_of_unrounded_products(tiny_bert: Path):
    """Of bfloat16 states, as if these were float32."""
    student = stirred(start(tiny_bert, "similarity", scale=4.0, interaction=2.0))
    states = torch.randn(3, 20, student.backbone.config.hidden_size).bfloat16()
    query = (torch.arange(20) < 6).long().expand(3, -1)
    found, expected = (student._score(0, s, (query, 1 - query), torch.ones(3, 20)) for s in (states, states.float()))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", STUDENTS)
def test_what_is_compiled_is_called(request: pytest.FixtureRequest, kind: str):
    """A compiled module that a pass goes round is eager."""
    base, given = STUDENTS[kind]
    student = start(request.getfixturevalue(base), **given)
    called = []
    for stack in student.stacks:
        stack.register_forward_pre_hook(lambda module, _: called.append(module))
    student(**student.batch(student.encode(QUERIES, DOCUMENTS)))
    assert set(called) == set(student.stacks)


def test_a_heads_own_float32_is_the_product_of_unrounded_numbers():
    """Of the layer with one output alone: what is before it reads and gives the states' type."""
    head = nn.Sequential(nn.Linear(48, 24), nn.Linear(24, 1)).bfloat16()
    states = torch.randn(5, 48).bfloat16()
    inner = head[0](states)
    give_float32(head)
    expected = inner.float() @ head[1].weight.float().T + head[1].bias.float()
    torch.testing.assert_close(head(states), expected)
    assert head[0](states).dtype == torch.bfloat16


@pytest.mark.parametrize(("base", "prompt"), [("tiny_llama", WORDS), ("tiny_t5", MONOT5)])
def test_the_output_layer_is_left_as_it_is(request: pytest.FixtureRequest, base: str, prompt: StudentPrompt):
    """Prepacked, or of 8-bit integers, it would round what is read off it."""
    student = start(request.getfixturevalue(base), "yes_no", prompt=prompt)
    inside = [module for stack in student.stacks for module in stack.modules()]
    assert student.model.get_output_embeddings() not in inside
    layers = [m for m in student.model.modules() if isinstance(m, nn.Linear)]
    assert [m for m in layers if m not in inside] == [student.model.get_output_embeddings()]
