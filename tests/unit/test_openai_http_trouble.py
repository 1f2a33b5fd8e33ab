"""The HTTP backend against a server that is slow, drops connections, says 429 and 500, and sends half an answer."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pyarrow as pa
import pytest
from fixtures.openai_http import PROMPT, always, backend, client, post, settings
from fixtures.rows import make_list
from fixtures.stub_server import Behaviour, Exchange, chat_reply, serving
from pydantic import ValidationError

from rerank_ray import config
from rerank_ray.errors import ConfigError, ModelError, UnavailableError
from rerank_ray.label_store import LabelStore, StoredBackend
from rerank_ray.models.http_client import Pace, Request, _retry_after
from rerank_ray.models.openai_http import OpenAIHTTP
from rerank_ray.models.protocol import Failure, NextToken
from rerank_ray.ranking.rankers import Ranker
from rerank_ray.runs import RunFolder
from rerank_ray.schema import CANDIDATES, candidate_row
from rerank_ray.settings.jobs import LabelSettings, StoreSettings
from rerank_ray.settings.models import OpenAIHTTPSettings
from rerank_ray.settings.rankers import YesNoSettings
from rerank_ray.stages import RankStage

KEY = "sk-very-secret-4711"


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
    "a 502 sent as an answer": lambda e: e.send({"error": {"code": 502, "message": "Provider returned error"}}),
    "compressed, it says": lambda e: e.send("<html>bad gateway</html>", 502, Content_Encoding="gzip"),
    "nested without end": lambda e: e.send("[" * 100_000),
    "an error sent as an answer": lambda e: e.send({"error": "overloaded", "choices": []}),
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


def test_an_error_sent_as_an_answer_is_treated_like_its_status(serve):
    refused = serve(lambda e: e.send({"error": {"code": 400, "message": "too long"}}))
    assert post(refused, 1) == [Failure(reason="HTTP 200: too long")]
    with pytest.raises(UnavailableError, match="HTTP 200: no credit"):
        post(serve(lambda e: e.send({"error": {"code": 402, "message": "no credit"}})), 1)


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
    """The last of 11 requests at 50 a second leaves 10 gaps of 20 ms after the first at the earliest, however slow the
    machine is."""
    stub = serve(always({}))
    started = time.monotonic()
    post(stub, 11, queries_per_second=50)
    assert max(stub.times) - started >= 0.2


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


def test_one_answer_that_does_not_count_is_a_failure_of_its_own(serve):
    """The server counts as a rule: the others' answers are paid for."""
    stub = serve(lambda e: e.send({"choices": []} if e.body["n"] == 3 else chat_reply("ok")))
    results = post(stub, 8, concurrency=1, max_total_tokens=10_000)
    assert len(stub.requests) == 8
    assert [i for i, r in enumerate(results) if isinstance(r, Failure)] == [3]
    assert "how many tokens they took, or this one does not" in results[3].reason


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


def test_one_text_that_a_server_forbids_fails_alone(serve):
    """OpenRouter's moderation and gateways that look for code answer so to one call, and the next is welcome."""
    message = "your input was flagged"

    def behaviour(exchange: Exchange) -> None:
        if exchange.body["n"] == 2:
            exchange.send({"error": {"code": 403, "message": message}}, 403)
        else:
            exchange.send({"n": exchange.body["n"]})

    results = post(serve(behaviour), 4, concurrency=1)
    assert results == [{"n": 0}, {"n": 1}, Failure(reason=f"HTTP 403: {message}"), {"n": 3}]


@pytest.mark.parametrize("count", [1, 2])
def test_a_key_that_is_revoked_is_no_rows_error(serve, count: int):
    """However few rows a batch has: all others would be written as errors too, at the cost of going through them."""
    stub = serve(lambda e: e.send(chat_reply("yes", top={"Yes": -1.0, "No": -2.0}), 200 if e.number == 0 else 401))
    stage = RankStage(YesNoSettings(model=settings(stub, top_logprobs=2)), "labels")
    rows = [candidate_row(make_list(f"q{i}")) for i in range(count)]
    with pytest.raises(UnavailableError, match="HTTP 401"):
        stage(pa.Table.from_pylist(rows, schema=CANDIDATES))


@pytest.mark.parametrize(
    ("status", "error", "said"),
    [
        (402, {"message": "no credit"}, "HTTP 402: no credit"),
        (429, {"message": "You exceeded your quota", "type": "insufficient_quota", "code": None}, "HTTP 429: You exc"),
    ],
)
def test_what_was_answered_before_the_server_said_stop_is_stored(serve, tmp_path, status, error, said):
    """Credit that ends after four calls, or a key that is revoked: what is paid for is not asked again."""
    calls = [NextToken(prompt=replace(PROMPT, passages=(f"passage {i}",)), labels=("Yes", "No")) for i in range(7)]
    answered: list[str] = []

    def behaviour(exchange: Exchange) -> None:
        if len(answered) == 4:
            exchange.send({"error": error}, status)
        else:
            answered.append(exchange.body["messages"][0]["content"])
            exchange.send(chat_reply("Yes", top={"Yes": -1.0, "No": -2.0}))

    stub = serve(lambda e: e.send(chat_reply("Yes", top={"Yes": -1.0, "No": -2.0})))
    model = settings(stub, top_logprobs=2, concurrency=1)
    made = OpenAIHTTP(model)
    stub.behaviour = behaviour
    uri = StoreSettings(uri=str(tmp_path))
    with pytest.raises(UnavailableError, match=said):
        StoredBackend(made, model, LabelStore(uri)).run(calls)
    assert len(answered) == 4
    again = StoredBackend(made, model, LabelStore(uri))
    assert sum(again.holds(calls)) == 4
    answered.clear()
    stub.requests.clear()
    assert [r.value for r in again.run(calls)] == [(-1.0, -2.0)] * 7
    assert len(answered) == 3


def test_sampled_scores_are_refused_where_the_probability_is_not_asked_for(serve):
    model = settings(serve(always(chat_reply("Yes"))))
    with pytest.raises(ConfigError, match=r"score: sampled: .* set logprobs: true"):
        Ranker(YesNoSettings(model=model, score="sampled"))


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


@pytest.mark.parametrize("changes", [{}, {"top_logprobs": 5}])
@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ({"status": "ok"}, "first request failed: unexpected answer: choices: Field required"),
        (chat_reply("Hi", finish="abort"), "first request failed: the server broke the answer off: .*'abort'"),
    ],
)
def test_a_server_whose_answers_can_not_be_read_is_found_at_the_start(serve, reply, message, changes):
    with pytest.raises(ModelError, match=message):
        OpenAIHTTP(settings(serve(always(reply)), **changes))


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
