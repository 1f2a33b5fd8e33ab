"""Generation: samples that are their call's own, stop strings, ends and cut-off texts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fixtures.tiny_models import tiny_llama_tokenizer

from rerank_ray.models.decoding import choose, generate
from rerank_ray.models.fake import Fake
from rerank_ray.models.hf_causal import HFCausal
from rerank_ray.models.protocol import EmbedTokens, Generate, Prompt
from rerank_ray.settings.models import FakeSettings, HFCausalSettings

TOKENIZER = tiny_llama_tokenizer()
PROMPT = Prompt(parts=("Query: alpha", ""), passages=("cat",))
END = 1


class Script:
    """A model that writes given tokens, one list a row, and then goes on with `x`."""

    def __init__(self, texts: list[str]) -> None:
        self.tokens = [TOKENIZER(t, add_special_tokens=False)["input_ids"] for t in texts]
        self.rows = list(range(len(texts)))
        self.steps = 0

    def logits(self) -> torch.Tensor:
        filler = TOKENIZER("x", add_special_tokens=False)["input_ids"][0]
        logits = torch.zeros(len(self.rows), len(TOKENIZER))
        for place, row in enumerate(self.rows):
            logits[place, self.tokens[row][self.steps] if self.steps < len(self.tokens[row]) else filler] = 9.0
        return logits

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        assert len(tokens) == len(self.rows)
        self.steps += 1
        return self.logits()

    def keep(self, rows: torch.Tensor) -> None:
        self.rows = [self.rows[i] for i in rows.tolist()]


def write(texts: list[str], *, max_tokens: int = 40, stop: tuple[str, ...] = ()) -> tuple[list, Script]:
    script = Script(texts)
    calls = [Generate(prompt=PROMPT, max_tokens=max_tokens, stop=stop) for _ in texts]
    return generate(script, script.logits(), calls, TOKENIZER, frozenset({END})), script


def test_texts_end_where_the_model_ends_them():
    """Rows that are done leave: the last step computes the one that never ends. Special tokens are no text."""
    answers, script = write(["[2] > [1]</s>", "</s>", "<|user|>cat</s>", "dog"], max_tokens=12)
    assert [a.text for a in answers[:3]] == ["[2] > [1]", "", "cat"]
    assert [list(a.tokens) for a in answers[:3]] == script.tokens[:3]
    assert [a.cut_off for a in answers] == [False, False, False, True]
    assert answers[3].text.startswith("dogxxx")
    assert len(answers[3].tokens) == 12
    assert script.rows == [3]


def test_the_first_stop_string_ends_a_text():
    """Wherever it lies in the tokens, also when the last token of all completes it; what follows it is dropped."""
    (one, two, none, late), _ = write(
        ["cat\n\ndog", "the; cat\n\n", "שלום 😀</s>", "xxxxxxxxx;"], stop=("\n\n", ";"), max_tokens=10
    )
    assert (one.text, one.cut_off) == ("cat", False)
    assert (two.text, two.cut_off) == ("the", False)
    assert none.text == "שלום 😀" or none.cut_off
    assert (late.text, len(late.tokens), late.cut_off) == ("x" * 9, 10, False)


def test_only_the_end_of_a_long_text_is_decoded_to_look_for_a_stop_string(monkeypatch: pytest.MonkeyPatch):
    """A text of thousands of tokens would be decoded thousands of times; it is once, when the string is there."""
    decoded, decode = [], type(TOKENIZER).decode
    monkeypatch.setattr(
        type(TOKENIZER), "decode", lambda self, ids, **how: decoded.append(len(ids)) or decode(self, ids, **how)
    )
    (answer,), _ = write(["the cat " * 30 + "</answer> dog"], max_tokens=400, stop=("</answer>",))
    assert answer.text == "the cat " * 30
    assert sorted(decoded)[-2:] == [len("</answer>") + 8, len(answer.tokens)]


def test_a_text_that_ends_with_its_last_token_is_whole():
    size = len(TOKENIZER("the cat</s>", add_special_tokens=False)["input_ids"])
    answers, _ = write(["the cat</s>"], max_tokens=size)
    assert (answers[0].text, answers[0].cut_off) == ("the cat", False)
    answers, _ = write(["the cat</s>"], max_tokens=size - 1)
    assert (answers[0].text, answers[0].cut_off) == ("the cat", True)


def test_choose_follows_the_cumulative_distribution():
    """p = (0.5, 0, 0.25, 0.25): draws below 0.5 take token 0, from 0.5 token 2, from 0.75 token 3, never token 1."""
    logits = torch.tensor([0.5, 0.0, 0.25, 0.25]).log()
    draws = torch.tensor([0.0, 0.499, 0.501, 0.749, 0.751, 0.999999999999], dtype=torch.float64)
    assert choose(logits.expand(6, 4), torch.ones(6), draws).tolist() == [0, 0, 2, 2, 3, 3]
    assert choose(logits.expand(6, 4), torch.zeros(6), draws).tolist() == [0] * 6


def test_temperature_divides_the_logits():
    """p = (0.8, 0.2): at temperature 2 the square roots, (2/3, 1/3); at 1/2 the squares, (16/17, 1/17)."""
    logits = torch.tensor([0.8, 0.2]).log().expand(4, 2)
    draws = torch.tensor([0.66, 0.67, 0.94, 0.942], dtype=torch.float64)
    assert choose(logits, torch.tensor([2.0, 2.0, 0.5, 0.5]), draws).tolist() == [0, 1, 0, 1]


# With a model


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> HFCausal:
    return HFCausal(HFCausalSettings(path=str(tiny_llama), dtype="float32"))


def sample(seed: int, temperature: float = 1.0, passage: str = "cat", **rest) -> Generate:
    prompt = Prompt(parts=("Query: alpha\nPassage: ", "\nWhich?"), passages=(passage,))
    return Generate(prompt=prompt, max_tokens=12, temperature=temperature, seed=seed, **rest)


def test_samples_do_not_depend_on_neighbours(model: HFCausal):
    """The same call alone, first, last, and among greedy calls and others of its seed; other seeds differ."""
    call = sample(7)
    (alone,) = model.run([call])
    others = [sample(s, passage="the dog of beta " * s) for s in range(6)]
    batch = model.run([call, *others, sample(7, temperature=0.0), call])
    assert batch[0].value == batch[-1].value == alone.value
    assert model.run([*others, call])[-1].value == alone.value
    texts = {r.value for r in model.run([sample(s) for s in range(20)])}
    assert len(texts) == 20
    assert batch[-2].value == model.run([sample(3, temperature=0.0)])[0].value != alone.value


def test_samples_follow_the_models_distribution(model: HFCausal):
    """First tokens of 600 samples at temperature 0.7: each likely one within 4 standard deviations of its p."""
    calls = [Generate(prompt=sample(0).prompt, max_tokens=1, temperature=0.7, seed=s) for s in range(600)]
    texts = [r.value for r in model.run(calls)]
    (ids,) = model.encoder.encode([calls[0].prompt], [1])
    with torch.no_grad():
        p = (model.model(torch.tensor([ids])).logits[0, -1] / 0.7).softmax(-1)
    expected: dict[str, float] = {}
    for token, share in enumerate(p.tolist()):
        text = model.tokenizer.decode([token], skip_special_tokens=True)
        expected[text] = expected.get(text, 0.0) + share
    likely = {text: share for text, share in expected.items() if share > 0.01}
    assert len(likely) > 4
    for text, share in likely.items():
        assert abs(texts.count(text) / 600 - share) < 4 * (share * (1 - share) / 600) ** 0.5


def test_a_prefill_is_where_the_text_goes_on(model: HFCausal):
    """With the greedy text's own beginning as prefill, the rest is written; the prefill is not repeated."""
    prompt = sample(0).prompt
    (ids,) = model.encoder.encode([prompt], [0])
    (first,) = model.run([Generate(prompt=prompt, max_tokens=6)])
    begun = Prompt(parts=prompt.parts, passages=prompt.passages, prefill="Yes")
    (prefilled_ids,) = model.encoder.encode([begun], [0])
    assert prefilled_ids == [*ids, *model.tokenizer("Yes", add_special_tokens=False)["input_ids"]]
    (second,) = model.run([Generate(prompt=begun, max_tokens=6)])
    assert not second.value.startswith("Yes")
    assert second.value != first.value


def test_a_prompt_and_its_answer_fit_max_length(tiny_llama: Path):
    """The passage makes room for `max_tokens`; without any room the call fails."""
    model = HFCausal(HFCausalSettings(path=str(tiny_llama), dtype="float32", max_length=64))
    prompt = sample(0, passage="the dog of beta " * 50).prompt
    fits, fails = model.run([Generate(prompt=prompt, max_tokens=8), Generate(prompt=prompt, max_tokens=64)])
    assert 54 <= fits.usage.prompt_tokens <= 56
    assert "raise max_length" in fails.reason


def test_the_fake_answers_in_the_form_of_a_model():
    """A permutation of the prompt's passages, and unit rows, one a word; both change with the call."""
    fake = Fake(FakeSettings())
    prompts = [Prompt(parts=(q, *[""] * 5), passages=tuple("abcde")) for q in ("q", "r")]
    first, second = fake.run([Generate(prompt=p, max_tokens=9) for p in prompts])
    assert sorted(first.value.split(" > ")) == ["[1]", "[2]", "[3]", "[4]", "[5]"]
    assert first.value != second.value
    rows, others = (r.value for r in fake.run([EmbedTokens(text=t, role="query") for t in ("a b c", "d e f")]))
    assert rows.shape == (3, 4)
    assert (rows != others).all()
    assert (rows**2).sum(1) == pytest.approx([1.0] * 3, abs=1e-6)
