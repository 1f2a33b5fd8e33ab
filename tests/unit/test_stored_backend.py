"""Calls through the label store: which are asked, of whom, and what is stored when."""

from __future__ import annotations

import dataclasses
import math
import time
from functools import partial

import pytest
from fixtures.oracles import Recorder
from fixtures.rows import make_list
from fixtures.stores import CALLS, PROMPT, answer, opened, segments, stored

from rerank_ray import label_store
from rerank_ray.label_store import StoredBackend, model_key
from rerank_ray.models.fake import Fake
from rerank_ray.models.protocol import (
    Answer,
    Attention,
    Embed,
    Failure,
    NextToken,
    Pair,
    Prompt,
)
from rerank_ray.ranking.rankers import Ranker
from rerank_ray.records import Usage
from rerank_ray.settings import models
from rerank_ray.settings.models import FakeSettings, HFCausalSettings
from rerank_ray.settings.rankers import CascadeSettings, YesNoSettings

ATTENTION = Attention(prompt=Prompt(parts=("", " q"), passages=("a passage",)), query="q")


class Model(Recorder):
    """Answers what it is told to, and remembers what it was asked."""

    name = "model@1"

    def __init__(self, reply) -> None:
        super().__init__()
        self.answer = reply


def test_every_kind_of_call_is_asked_once(tmp_path):
    """The second process gets equal values, makes no call, and says in the usage that all tokens were there already."""
    first = stored(tmp_path, Fake(FakeSettings())).run(CALLS)
    model = Model(lambda call: pytest.fail(f"asked again: {call}"))
    model.name = Fake(FakeSettings()).name
    second = stored(tmp_path, model).run(CALLS)
    assert [(r.value, type(r.value)) for r in second] == [(r.value, type(r.value)) for r in first]
    for before, after in zip(first, second, strict=True):
        tokens = before.usage.prompt_tokens
        assert after.usage == Usage(calls=0, prompt_tokens=tokens, cached_tokens=tokens)


def test_what_a_text_came_with_is_kept(tmp_path):
    text = Answer(value="caf\u00e9 \ud800", usage=Usage(calls=1), cut_off=True, log_probability=-0.1)
    stored(tmp_path, Model(lambda call: text)).run(CALLS[2:3])
    (again,) = stored(tmp_path, Model(None)).run(CALLS[2:3])
    assert (again.value, again.cut_off, again.log_probability) == (text.value, True, -0.1)


@pytest.mark.parametrize(
    "other",
    [
        dataclasses.replace(CALLS[0], labels=("no", "yes")),
        dataclasses.replace(CALLS[0], prompt=dataclasses.replace(PROMPT, chat=False)),
        dataclasses.replace(CALLS[0], prompt=dataclasses.replace(PROMPT, parts=("Is ", " relevant? "))),
        dataclasses.replace(CALLS[3], seed=4),
        Embed(text="t", role="document"),
    ],
    ids=repr,
)
def test_another_call_is_another_entry(tmp_path, other):
    stored(tmp_path, Fake(FakeSettings())).run(CALLS)
    model = Model(lambda call: answer(1.0))
    model.name = Fake(FakeSettings()).name
    stored(tmp_path, model).run([other])
    assert model.calls == [other]


def test_another_model_is_given_nothing(tmp_path):
    stored(tmp_path, Fake(FakeSettings(seed=1)), seed=1).run(CALLS)
    other = Fake(FakeSettings(seed=2))
    results = stored(tmp_path, other, seed=2).run(CALLS)
    assert [r.value for r in results] == [r.value for r in other.run(CALLS)]
    assert all(r.usage.calls == 1 for r in results)


def test_the_key_holds_what_changes_answers_and_nothing_else():
    backend = Fake(FakeSettings())
    base = HFCausalSettings(path="org/model")

    def key(**changes) -> str:
        return model_key(backend, base.model_copy(update=changes))

    assert key(tokens_per_batch=9999, share_prefix=False, device="cpu") == key()
    assert len({key(), key(max_length=100), key(chat=False), key(dtype="float32"), key(path="org/other")}) == 5
    backend.name = "fake:seed=1"
    assert model_key(backend, base) != model_key(Fake(FakeSettings()), base)


def test_dtype_auto_is_what_this_machine_computes(monkeypatch):
    """The same config on a machine without bfloat16 must not be given bfloat16's answers."""
    import torch

    from rerank_ray.models import engine

    backend = Model(None)
    backend.device = torch.device("cpu")
    keys = set()
    for native in (True, False):
        monkeypatch.setattr(engine, "computes_bfloat16", lambda device, native=native: native)
        keys.add(model_key(backend, HFCausalSettings(path="org/model")))
    assert len(keys) == 2


def test_int8_has_fewer_steps_on_some_processors(monkeypatch):
    from rerank_ray.models import acceleration

    keys = set()
    for fewer in (True, False):
        monkeypatch.setattr(acceleration, "adds_in_16_bits", lambda fewer=fewer: fewer)
        keys.add(model_key(Model(None), HFCausalSettings(path="org/model", dtype="int8")))
    assert len(keys) == 2


def test_settings_left_out_of_the_key_exist():
    kinds = [v for v in vars(models).values() if isinstance(v, type) and hasattr(v, "model_fields")]
    assert {name for kind in kinds for name in kind.model_fields} >= label_store._NOT_IN_KEY


def test_failures_and_values_that_are_no_numbers_are_asked_again(tmp_path):
    replies = [
        Failure(reason="timeout"),
        Answer(value=(math.nan, 0.0), usage=Usage(calls=1)),
        Answer(value=(-math.inf, 0.0), usage=Usage(calls=1)),
    ]
    calls = [NextToken(prompt=PROMPT, labels=("yes", str(i))) for i in range(3)]
    for _ in range(2):
        model = Model(lambda call: replies[int(call.labels[1])])
        stored(tmp_path, model).run(calls)
        assert model.calls == calls
    assert segments(tmp_path) == []


@pytest.mark.parametrize(("every_s", "while_waiting"), [(0.01, 3), (3600.0, 0)])
def test_what_a_server_has_answered_outlives_the_rest(tmp_path, monkeypatch, every_s: float, while_waiting: int):
    """Each answer costs money: it is stored while others are waited for, and at the latest where these fail."""
    monkeypatch.setattr(label_store, "_STORE_EVERY_S", every_s)
    calls = [Pair(query="q", text=str(n)) for n in range(5)]

    class Server(Model):
        tells_each_answer = True

        def run(self, asked, take):
            for n in (1, 0, 3):
                take(n, answer(n))
            until = time.monotonic() + 20 * bool(while_waiting)
            while (held := sum(stored(tmp_path, Model(None)).holds(calls))) < while_waiting:
                assert time.monotonic() < until
                time.sleep(0.01)
            assert held == while_waiting
            raise RuntimeError("the fourth ended the connection")

    backend = stored(tmp_path, Server(None))
    with pytest.raises(RuntimeError, match="fourth"):
        backend.run(calls)
    again = Model(answer)
    again.answer = lambda call: answer(int(call.text))
    results = stored(tmp_path, again).run(calls)
    assert [r.value for r in results] == [answer(n).value for n in range(5)]
    assert [call.text for call in again.calls] == ["2", "4"]


def test_a_round_is_one_segment(tmp_path):
    """Of a model that answers all of them together, however long it takes."""
    stored(tmp_path, Fake(FakeSettings())).run(CALLS)
    assert len(segments(tmp_path)) == 1


def test_attention_passes_through_in_its_place(tmp_path):
    """Calls that are not stored are asked together with those that are missing, and come back in their order."""
    fake = Fake(FakeSettings())
    stored(tmp_path, fake).run(CALLS[:1])
    results = stored(tmp_path, fake).run([CALLS[4], ATTENTION, CALLS[0]])
    assert results[0].value == fake.run([CALLS[4]])[0].value
    assert results[1].value[0].tolist() == fake.run([ATTENTION])[0].value[0].tolist()
    assert results[2].value == fake.run([CALLS[0]])[0].value
    assert results[2].usage.calls == 0


def test_a_ranker_with_a_store_ranks_as_one_without(tmp_path):
    """Also inside a composition; a changed cheap stage leaves the expensive one's answers where they are."""
    model = FakeSettings(seed=5)
    teacher = CascadeSettings(stages=[{"ranker": YesNoSettings(model=model)}])
    requests = [make_list(f"q{i}") for i in range(3)]
    plain = Ranker(teacher).rank(requests)
    for expected_calls in (sum(len(r) for r in requests), 0):
        store = opened(tmp_path)
        outcomes = Ranker(teacher, wrap=partial(StoredBackend, store=store)).rank(requests)
        assert [o.scores for o in outcomes] == [o.scores for o in plain]
        assert sum(o.usage.calls for o in outcomes) == store.counts.misses == expected_calls
    assert store.counts.hits == sum(len(r) for r in requests)


def test_only_new_rows_are_asked(tmp_path):
    teacher = YesNoSettings(model=FakeSettings())
    requests = [make_list(f"q{i}") for i in range(20)]
    for count in (19, 20):
        outcomes = Ranker(teacher, wrap=partial(StoredBackend, store=opened(tmp_path))).rank(requests[:count])
    assert [o.usage.calls for o in outcomes] == [0] * 19 + [len(make_list("q19"))]
