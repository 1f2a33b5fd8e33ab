"""The HTTP backend against a server that is slow, drops connections, says 429 and 500, and sends half an answer."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pyarrow as pa
import pytest
from fixtures.rows import make_list
from fixtures.stub_server import Behaviour, Exchange, Stub, chat_reply, serving
from pydantic import ValidationError

from rerank_ray import config
from rerank_ray.errors import ConfigError, ModelError
from rerank_ray.models.http_client import HTTPClient, Pace, Request, _retry_after
from rerank_ray.models.openai_http import OpenAIHTTP
from rerank_ray.models.protocol import Answer, Failure, Generate, LogLikelihood, NextToken, Prompt
from rerank_ray.ranking.rankers import Ranker
from rerank_ray.records import Usage
from rerank_ray.runs import RunFolder
from rerank_ray.schema import CANDIDATES, candidate_row
from rerank_ray.settings.jobs import LabelSettings
from rerank_ray.settings.models import OpenAIHTTPSettings
from rerank_ray.settings.rankers import QueryLikelihoodSettings, YesNoSettings
from rerank_ray.stages import RankStage

KEY = "sk-very-secret-4711"
PROMPT = Prompt(parts=("Query: fleas\nPassage: ", "\nAnswer."), passages=("A flea lives a year.",))
YES_NO = NextToken(prompt=PROMPT, labels=("Yes", "No"))


@pytest.fixture
def serve() -> Iterator[Callable[[Behaviour], Stub]]:
    with ExitStack() as stack:
        yield lambda behaviour: stack.enter_context(serving(behaviour))


def settings(stub: Stub, **changes) -> OpenAIHTTPSettings:
    return OpenAIHTTPSettings(url=stub.url, model="m", **({"backoff_s": 0.01} | changes))


def client(stub: Stub, **changes) -> HTTPClient:
    return HTTPClient(settings(stub, **changes))


def post(stub: Stub, count: int, **changes) -> list[dict | Failure]:
    requests = [Request(path="chat/completions", body={"n": i}) for i in range(count)]
    return client(stub, **changes).post(requests)


def backend(stub: Stub, **changes) -> OpenAIHTTP:
    """A backend whose probe is forgotten by the stub."""
    made = OpenAIHTTP(settings(stub, **changes))
    stub.requests.clear()
    return made


def always(reply: dict) -> Behaviour:
    return lambda exchange: exchange.send(reply)


def generate(max_tokens: int = 5, **changes) -> Generate:
    return Generate(prompt=PROMPT, max_tokens=max_tokens, **changes)


# What is sent


def test_a_chat_request_holds_system_user_and_the_sampling(serve):
    stub = serve(always(chat_reply("ok")))
    prompt = Prompt(parts=("Passage: ", "."), passages=("a flea",), system="Judge.")
    call = Generate(prompt=prompt, max_tokens=7, temperature=0.5, seed=3, stop=("\n",))
    backend(stub, extra_body={"reasoning_effort": "low"}).run([call, generate(max_tokens=2)])
    first, second = sorted(stub.bodies, key=lambda b: -b["max_tokens"])
    assert first == {
        "model": "m",
        "messages": [{"role": "system", "content": "Judge."}, {"role": "user", "content": "Passage: a flea."}],
        "max_tokens": 7,
        "temperature": 0.5,
        "seed": 3,
        "stop": ["\n"],
        "reasoning_effort": "low",
    }
    assert second["temperature"] == 0.0
    assert {"seed", "stop"}.isdisjoint(second)
    assert {path for path, _, _ in stub.requests} == {"/v1/chat/completions"}


@pytest.mark.parametrize(
    ("way", "added"),
    [
        ("last_message", {}),
        ("continue_final_message", {"continue_final_message": True, "add_generation_prompt": False}),
    ],
)
def test_a_prefill_is_the_beginning_of_the_assistants_turn(serve, way, added):
    stub = serve(always(chat_reply("ok")))
    prompt = Prompt(parts=("Rank.",), passages=(), prefill="[")
    backend(stub, prefill=way).run([Generate(prompt=prompt, max_tokens=2)])
    body = stub.bodies[0]
    assert body["messages"][-1] == {"role": "assistant", "content": "["}
    assert {k: v for k, v in body.items() if "_final_" in k or "_prompt" in k} == added


def test_what_a_chat_server_would_misread_is_not_sent(serve):
    stub = serve(always(chat_reply("ok")))
    prefilled = Prompt(parts=("Rank.",), passages=(), prefill="[")
    plain = Prompt(parts=("Query: Document:",), passages=(), chat=False)
    results = backend(stub).run([Generate(prompt=p, max_tokens=2) for p in (prefilled, plain)])
    assert "prefill" in results[0].reason
    assert "api: completions" in results[1].reason
    assert stub.requests == []


def test_completions_without_a_tokenizer_send_the_text(serve):
    stub = serve(always({"choices": [{"text": " a year", "finish_reason": "length"}]}))
    prompt = Prompt(parts=("Passage: ", "."), passages=("a flea",), system="Judge.", prefill="It")
    answer = backend(stub, api="completions").run([Generate(prompt=prompt, max_tokens=2)])[0]
    assert stub.bodies[0]["prompt"] == "Judge.\n\nPassage: a flea.It"
    assert stub.requests[0][0] == "/v1/completions"
    assert (answer.value, answer.cut_off) == (" a year", True)


def test_passages_are_cut_after_a_word(serve):
    stub = serve(always(chat_reply("ok")))
    prompt = Prompt(parts=("P: ", " Q: ", "."), passages=("one  two\nthree four", "one two"))
    backend(stub, max_passage_words=3).run([Generate(prompt=prompt, max_tokens=2)])
    assert stub.bodies[0]["messages"][0]["content"] == "P: one  two\nthree Q: one two."


def test_with_a_tokenizer_the_server_gets_its_tokens_cut_to_max_length(serve, tiny_llama: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    stub = serve(always({"choices": [{"text": "ok", "finish_reason": "stop"}]}))
    made = backend(stub, api="completions", tokenizer=str(tiny_llama), max_length=100, max_passage_words=None)
    long = Prompt(parts=PROMPT.parts, passages=("the cat " * 50,))
    made.run([generate(5), Generate(prompt=long, max_tokens=5)])
    text = "<|user|>Query: fleas\nPassage: A flea lives a year.\nAnswer.<|end|><|assistant|>"
    sent = [b["prompt"] for b in stub.bodies]
    sent.remove(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert 90 < len(sent[0]) <= 95
    assert tokenizer.decode(sent[0]).endswith(" the cat the\nAnswer.<|end|><|assistant|>")


# What is read


def test_generated_text_its_end_and_its_usage(serve):
    replies = [chat_reply("yes", tokens=9), chat_reply("ye", finish="length"), chat_reply(None)]
    replies[0]["usage"]["prompt_tokens_details"] = {"cached_tokens": 4}
    stub = serve(lambda e: e.send(replies[e.body["max_tokens"] % 4]))
    whole, cut, empty = backend(stub).run([generate(n) for n in (4, 5, 6)])
    usage = Usage(calls=1, prompt_tokens=9, cached_tokens=4, output_tokens=2)
    assert whole == Answer(value="yes", usage=usage, cut_off=False)
    assert (cut.value, cut.cut_off) == ("ye", True)
    assert empty.value == ""


def test_reasoning_that_the_server_split_off_stands_in_front_again(serve):
    for name in ("reasoning", "reasoning_content"):
        stub = serve(always(chat_reply("[2] > [1]", **{name: "2 says it"})))
        assert backend(stub).run([generate()])[0].value == "<think>2 says it</think>[2] > [1]"


def test_a_refusal_and_a_content_filter_are_failures(serve):
    replies = [chat_reply(None, refusal="I can't help with that."), chat_reply("half an", finish="content_filter")]
    stub = serve(lambda e: e.send(replies[e.body["max_tokens"] % 2]))
    refused, filtered = backend(stub).run([generate(2), generate(3)])
    assert refused == Failure(reason="the model refuses: I can't help with that.")
    assert "content filter" in filtered.reason


def test_labels_are_read_off_the_likeliest_tokens_by_their_exact_text(serve):
    stub = serve(always(chat_reply("No", top={"No": -0.25, " Yes": -1.0, "Yes": -2.5, "yes": -4.0})))
    made = backend(stub, top_logprobs=4)
    assert made.answers == {Generate, NextToken}
    answer = made.run([YES_NO])[0]
    assert answer.value == (-2.5, -0.25)
    body = stub.bodies[0]
    assert (body["logprobs"], body["top_logprobs"], body["max_tokens"], body["temperature"]) == (True, 4, 1, 0.0)


@pytest.mark.parametrize("top", [{"No": -0.1, "Maybe": -3.0}, {"No": -0.1, "Yes": -9999.0}])
def test_a_label_that_the_server_leaves_out_has_no_score(serve, top):
    """-9999 is how a server writes minus infinity."""
    stub = serve(always(chat_reply("No", top=top)))
    result = backend(stub, top_logprobs=2).run([YES_NO])[0]
    assert isinstance(result, Failure)
    assert "label 'Yes' is not among the 2 likeliest tokens" in result.reason


def test_one_unreadable_label_leaves_its_candidate_unscored_and_the_others_alone(serve):
    def behaviour(exchange: Exchange) -> None:
        known = "document 1 " not in str(exchange.body)
        exchange.send(chat_reply("No", top={"No": -0.5, "Yes" if known else "Maybe": -1.5}))

    stub = serve(behaviour)
    outcome = Ranker(YesNoSettings(model=settings(stub, top_logprobs=2))).rank([make_list(size=3)])[0]
    assert outcome.scores.scores[0] == outcome.scores.scores[2] == -1.0
    assert math.isnan(outcome.scores.scores[1])
    assert str(outcome.scores.defects[0]).startswith("unscored: d1: label 'Yes'")


def test_more_labels_than_the_server_reports_are_refused_before_any_call(serve):
    stub = serve(always(chat_reply("A", top={"A": -0.1})))
    with pytest.raises(ConfigError, match="3 labels need as many log-probabilities, and top_logprobs is 2"):
        backend(stub, top_logprobs=2).check_labels(("A", "B", "C"))


def test_a_method_that_needs_log_probabilities_is_refused_without_them(serve):
    stub = serve(always(chat_reply("Yes")))
    with pytest.raises(ConfigError, match="2 labels need as many log-probabilities, and top_logprobs is 0"):
        Ranker(YesNoSettings(model=settings(stub)))
    with pytest.raises(ConfigError, match="LogLikelihood"):
        Ranker(QueryLikelihoodSettings(model=settings(stub)))


def test_a_texts_probability_is_the_product_of_its_tokens(serve):
    """exp(−0.5 − 0.25); unknown as soon as one token's is."""
    reply, unknown = chat_reply("Yes."), chat_reply("Yes.")
    tokens = [{"token": "Yes", "logprob": -0.5}, {"token": ".", "logprob": -0.25}]
    reply["choices"][0]["logprobs"] = {"content": tokens}
    unknown["choices"][0]["logprobs"] = {"content": [tokens[0], {"token": ".", "logprob": -9999.0}]}
    stub = serve(lambda e: e.send(unknown if e.body["max_tokens"] == 7 else reply))
    known, not_known = backend(stub, logprobs=True).run([generate(5), generate(7)])
    assert known.log_probability == -0.75
    assert not_known.log_probability is None
    assert all(b["logprobs"] is True and "top_logprobs" not in b for b in stub.bodies)


def test_a_completions_probability_is_the_product_of_its_tokens(serve):
    stub = serve(always({"choices": [{"text": "ok", "logprobs": {"token_logprobs": [-0.5, -1.0]}}]}))
    assert backend(stub, api="completions", logprobs=True).run([generate()])[0].log_probability == -1.5
    assert stub.bodies[0]["logprobs"] == 0


def test_a_server_that_keeps_its_texts_probability_to_itself_is_found_at_the_start(serve):
    with pytest.raises(ConfigError, match="set logprobs: false"):
        backend(serve(always(chat_reply("ok"))), logprobs=True)


def test_a_server_without_log_probabilities_is_found_at_the_start(serve):
    stub = serve(always(chat_reply("Yes")))
    with pytest.raises(ConfigError, match=r"no log-probabilities .* set top_logprobs: 0"):
        OpenAIHTTP(settings(stub, top_logprobs=5))


def echoing(exchange: Exchange) -> None:
    """As vLLM: the prompt's tokens, the first of them without a probability, then the one that is generated."""
    prompt = exchange.body["prompt"]
    logprobs = [None, *(-float(t) for t in prompt[1:]), -7.0]
    choice = {"text": "…", "finish_reason": "length", "logprobs": {"token_logprobs": logprobs, "tokens": []}}
    exchange.send({"choices": [choice], "usage": {"prompt_tokens": len(prompt), "completion_tokens": 1}})


def test_the_continuations_log_probabilities_are_the_last_of_the_echo(serve, tiny_llama: Path):
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(tiny_llama)(" alpha beta", add_special_tokens=False)["input_ids"]
    stub = serve(echoing)
    made = backend(stub, api="completions", tokenizer=str(tiny_llama), echo=True)
    assert made.answers == {Generate, LogLikelihood}
    answer = made.run([LogLikelihood(prompt=PROMPT, continuation=" alpha beta")])[0]
    assert answer.value == tuple(-float(i) for i in ids)
    assert stub.bodies[0]["prompt"][-len(ids) :] == ids
    assert stub.bodies[0]["echo"] is True


def test_a_server_that_does_not_echo_is_found_at_the_start(serve, tiny_llama: Path):
    stub = serve(always({"choices": [{"text": " world", "logprobs": {"token_logprobs": [-1.0]}}]}))
    with pytest.raises(ConfigError, match=r"prompt's tokens \(echo\); set echo: false"):
        backend(stub, api="completions", tokenizer=str(tiny_llama), echo=True)


@pytest.mark.parametrize(
    "reply", [{"choices": []}, {"choices": [{}]}, {"object": "list"}, {"choices": [{"message": {"content": 3}}]}]
)
def test_an_answer_of_another_shape_is_a_failure(serve, reply):
    stub = serve(always(reply))
    result = backend(stub).run([generate()])[0]
    assert "unexpected answer" in result.reason


# Trouble


def test_results_stand_in_the_order_of_the_calls(serve):
    def behaviour(exchange: Exchange) -> None:
        number = exchange.body["n"]
        time.sleep(0.002 * (20 - number))
        exchange.send({"n": number})

    assert post(serve(behaviour), 20) == [{"n": i} for i in range(20)]


def test_no_more_requests_are_in_flight_than_allowed(serve):
    def behaviour(exchange: Exchange) -> None:
        time.sleep(0.02)
        exchange.send({})

    stub = serve(behaviour)
    post(stub, 30, concurrency=3)
    assert stub.most_in_flight == 3
    assert len(stub.requests) == 30


def failing_first(times: int, fail: Behaviour) -> Behaviour:
    def behaviour(exchange: Exchange) -> None:
        if exchange.number < times:
            fail(exchange)
        else:
            exchange.send({"answered": exchange.number})

    return behaviour


TROUBLES: dict[str, Behaviour] = {
    "429": lambda e: e.send({"error": {"message": "slow down"}}, 429),
    "500": lambda e: e.send("oops", 500),
    "503": lambda e: e.send("busy", 503),
    "hang up": lambda e: e.hang_up(),
    "half an answer": lambda e: e.send_half({"choices": [1, 2, 3]}),
    "half a document": lambda e: e.send('{"choices": [{"mess'),
    "not an object": lambda e: e.send("[]"),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_what_may_pass_is_tried_again(serve, trouble):
    stub = serve(failing_first(2, TROUBLES[trouble]))
    assert post(stub, 1) == [{"answered": 2}]
    assert len({str(body) for body in stub.bodies}) == 1


@pytest.mark.parametrize("trouble", TROUBLES)
def test_what_does_not_pass_fails_after_the_last_attempt_and_alone(serve, trouble):
    def behaviour(exchange: Exchange) -> None:
        if exchange.body["n"] == 1:
            TROUBLES[trouble](exchange)
        else:
            exchange.send({"n": exchange.body["n"]})

    stub = serve(behaviour)
    results = post(stub, 3, max_tries=3)
    assert (results[0], results[2]) == ({"n": 0}, {"n": 2})
    assert "(attempt 3 of 3)" in results[1].reason
    assert [b["n"] for b in stub.bodies].count(1) == 3


def test_a_slow_answer_is_given_up(serve):
    def behaviour(exchange: Exchange) -> None:
        time.sleep(0.6 if exchange.number == 0 else 0)
        exchange.send({"answered": exchange.number})

    stub = serve(behaviour)
    assert post(stub, 1, timeout_s=0.3) == [{"answered": 1}]


def test_an_answer_that_drips_is_given_up_too(serve):
    """Each piece comes in time, the whole does not."""

    def behaviour(exchange: Exchange) -> None:
        exchange.send_response(200)
        exchange.send_header("Content-Length", "100")
        exchange.end_headers()
        for _ in range(20):
            time.sleep(0.1)
            exchange.wfile.write(b" ")
            exchange.wfile.flush()

    started = time.monotonic()
    results = post(serve(behaviour), 1, timeout_s=0.3, max_tries=1)
    assert "no answer within timeout_s (0.3 s)" in results[0].reason
    assert time.monotonic() - started < 1.9


def test_a_bad_request_is_not_repeated(serve):
    message = "This model's maximum context length is 8192 tokens"
    stub = serve(lambda e: e.send({"error": {"message": message}}, 400))
    assert post(stub, 1) == [Failure(reason=f"HTTP 400: {message}")]
    assert len(stub.requests) == 1


def test_retry_after_is_waited_for_by_everyone(serve):
    """The first of two calls is told to wait; the second, whose turn comes after it, waits as well."""
    stub = serve(failing_first(1, lambda e: e.send("busy", 429, Retry_After="0.4")))
    results = post(stub, 2, concurrency=1)
    assert [r["answered"] for r in results] in ([1, 2], [2, 1])
    assert stub.times[1] - stub.times[0] >= 0.39


def test_a_server_that_asks_for_more_patience_than_allowed_gets_no_further_request(serve):
    stub = serve(lambda e: e.send("quota", 429, Retry_After="3600"))
    results = post(stub, 1, max_wait_s=5)
    assert "asks to wait 3600 s" in results[0].reason
    assert len(stub.requests) == 1


@pytest.mark.parametrize("header", ["soon", "", "-3", None, "nan"])
def test_a_useless_retry_after_does_no_harm(header):
    assert _retry_after(header) in (None, 0.0)


def test_retry_after_may_be_a_date():
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert 27 < _retry_after(later) <= 30
    assert _retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0


def test_backoff_doubles_up_to_the_longest_wait(serve):
    made = client(serve(always({})), backoff_s=1.0, max_wait_s=10.0)
    for attempt, middle in ((1, 1.0), (2, 2.0), (3, 4.0)):
        waits = [made._backoff(attempt) for _ in range(200)]
        assert middle * 0.5 <= min(waits) < middle * 0.8
        assert middle * 1.2 < max(waits) <= middle * 1.5
    assert made._backoff(30) == 10.0


def test_pace_spaces_requests_evenly():
    pace = Pace(4.0)
    assert [pace.reserve(10.0) for _ in range(3)] == [0.0, 0.25, 0.5]
    assert pace.reserve(10.5) == pytest.approx(0.25)
    assert pace.reserve(20.0) == 0.0
    pace.hold(25.0)
    assert [pace.reserve(20.0), pace.reserve(20.0)] == [5.0, 5.25]
    assert [Pace(None).reserve(1.0) for _ in range(3)] == [0.0] * 3


def test_the_pace_is_held_on_the_wire(serve):
    """11 requests at 50 a second can't leave within less than 10 gaps of 20 ms."""
    stub = serve(always({}))
    post(stub, 11, queries_per_second=50)
    assert max(stub.times) - min(stub.times) >= 0.18


def test_the_budget_of_requests_counts_every_attempt(serve):
    stub = serve(failing_first(1, TROUBLES["500"]))
    results = post(stub, 5, concurrency=1, max_requests=4)
    assert len(stub.requests) == 4
    spent = [r for r in results if isinstance(r, Failure)]
    assert len(spent) == 2
    assert {r.reason for r in spent} == {"budget spent: max_requests is 4"}


def test_the_budget_of_tokens(serve):
    """12 tokens a call: the third call finds 24 of 20 spent."""
    stub = serve(always(chat_reply("ok")))
    results = post(stub, 5, concurrency=1, max_total_tokens=20)
    assert len(stub.requests) == 2
    assert [r.reason for r in results[2:]] == ["budget spent: max_total_tokens is 20"] * 3


def test_a_budget_of_tokens_needs_a_server_that_counts_them(serve):
    with pytest.raises(ConfigError, match="max_total_tokens"):
        post(serve(always({"choices": []})), 1, max_total_tokens=20)


def test_a_spent_budget_is_a_rows_error(serve):
    stub = serve(always(chat_reply("No", top={"No": -0.5, "Yes": -1.5})))
    stage = RankStage(YesNoSettings(model=settings(stub, top_logprobs=2, max_requests=4, concurrency=1)), "labels")
    rows = [candidate_row(make_list(f"q{i}")) for i in range(2)]
    labels = stage(pa.Table.from_pylist(rows, schema=CANDIDATES)).to_pylist()
    assert labels[0]["scores"] == [-1.0] * 3
    assert labels[1]["error"].endswith("budget spent: max_requests is 4")
    assert labels[1]["scores"] is None


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_every_call_would_meet_stops_the_job(serve, status):
    stub = serve(lambda e: e.send({"error": {"message": "no such model m"}}, status))
    with pytest.raises(ModelError, match=f"chat/completions: HTTP {status}: no such model m"):
        OpenAIHTTP(settings(stub))
    assert len(stub.requests) == 1


def test_such_an_error_ends_the_other_calls_at_once(serve):
    """Calls that wait for their next attempt don't keep the error from being seen."""
    stub = serve(lambda e: e.send("x", 401 if e.body["n"] == 1 else 503))
    started = time.monotonic()
    with pytest.raises(ModelError, match="401"):
        post(stub, 8, backoff_s=60)
    assert time.monotonic() - started < 10


def test_nobody_there_is_found_at_the_start():
    with serving(always({})) as stub:
        pass
    with pytest.raises(ModelError, match="can't connect"):
        OpenAIHTTP(settings(stub, backoff_s=60))


def test_a_server_that_goes_away_is_given_time_to_come_back(serve):
    """Only one that never answered is given up at once."""
    made = client(serve(always({})), backoff_s=0.05)
    assert made.post([Request(path="x", body={})]) == [{}]
    with serving(always({})) as gone:
        pass
    made.settings = made.settings.model_copy(update={"url": gone.url, "max_tries": 3})
    with pytest.raises(ModelError, match="can't connect"):
        made.post([Request(path="x", body={})])
    assert made.requests == 4


def test_a_first_request_that_is_refused_stops_the_job(serve):
    stub = serve(lambda e: e.send({"detail": "Unsupported parameter: 'max_tokens'"}, 400))
    with pytest.raises(ModelError, match="first request failed: HTTP 400: Unsupported parameter: 'max_tokens'"):
        OpenAIHTTP(settings(stub))


# The key


def test_the_key_travels_in_its_header_and_nowhere_else(serve, monkeypatch, caplog, tmp_path):
    """The server repeats it in every error, as some do."""
    monkeypatch.setenv("TEACHER_KEY", KEY)
    caplog.set_level(logging.DEBUG)

    def behaviour(exchange: Exchange) -> None:
        if exchange.number == 0:
            exchange.send(chat_reply("No", top={"No": -0.5, "Yes": -1.5}))
        else:
            exchange.send({"error": {"message": f"Incorrect API key provided: {KEY}"}}, 400)

    stub = serve(behaviour)
    model = settings(stub, api_key_env="TEACHER_KEY", top_logprobs=2)
    job = LabelSettings(input="data", teacher=YesNoSettings(model=model))
    stage = RankStage(job.teacher, "labels")
    table = stage(pa.Table.from_pylist([candidate_row(make_list())], schema=CANDIDATES))
    assert table["error"][0].as_py().endswith("Incorrect API key provided: [API key]")
    assert {headers["Authorization"] for _, headers, _ in stub.requests} == {f"Bearer {KEY}"}
    run = RunFolder(uri=str(tmp_path / "run"))
    with run.locked():
        run.start("label", job, {})
    (made,) = stage.ranker._backends.values()
    texts = [
        config.dump(job),
        repr(job),
        repr(vars(made)),
        repr(vars(made._client)),
        repr(made._client._http.headers),
        made.name,
        str(table.to_pylist()),
        caplog.text,
        str(stub.bodies),
        *(f.read_text() for f in (tmp_path / "run").rglob("*") if f.is_file()),
    ]
    assert len(texts) > 10
    assert not [t for t in texts if KEY in t]
    assert "TEACHER_KEY" in texts[0]


def test_a_key_in_a_fatal_error_is_taken_out(serve, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", KEY)
    stub = serve(lambda e: e.send(f"key {KEY} is not known", 401))
    with pytest.raises(ModelError) as caught:
        OpenAIHTTP(settings(stub, api_key_env="TEACHER_KEY"))
    assert "key [API key] is not known" in str(caught.value)


@pytest.mark.parametrize("value", [None, "", " \n", "schlüssel", "two\nlines"])
def test_a_key_that_can_not_be_sent_is_refused_without_showing_it(serve, monkeypatch, value):
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("TEACHER_KEY", value)
    with pytest.raises(ConfigError, match="TEACHER_KEY") as caught:
        client(serve(always({})), api_key_env="TEACHER_KEY")
    assert value is None or not value.strip() or value not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"api_key_env": KEY}, "name of an environment variable"),
        ({"url": f"https://user:{KEY}@host/v1"}, "no user, password"),
        ({"url": f"https://host/v1?key={KEY}"}, "no user, password"),
        ({"url": f"host/v1/{KEY}"}, "must begin with http"),
    ],
)
def test_a_config_that_holds_the_key_is_refused_without_showing_it(changes, message):
    content = {"input": "data", "teacher": {"method": "yes_no"}}
    model = {"kind": "openai_http", "url": "https://host/v1", "model": "m", "top_logprobs": 5}
    content["teacher"]["model"] = model | changes
    with pytest.raises(ConfigError, match=message) as caught:
        config.validate(LabelSettings, content, source="label.yaml")
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "some/model"}, "tokenizer needs api: completions"),
        ({"echo": True, "api": "completions"}, "echo needs"),
    ],
)
def test_settings_that_no_server_could_fulfil(changes, message):
    with pytest.raises(ValidationError, match=message):
        OpenAIHTTPSettings(url="https://host/v1", model="m", **changes)


def test_the_name_tells_model_and_host(serve):
    assert backend(serve(always(chat_reply("ok")))).name == "openai_http:m@127.0.0.1"
