"""The HTTP backend: what it sends, and what it makes of a server's answers."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fixtures.openai_http import PROMPT, YES_NO, always, backend, generate, settings
from fixtures.rows import make_list
from fixtures.stub_server import Exchange, Stub, chat_reply
from fixtures.tiny_models import tiny_llama_tokenizer, tiny_sentencepiece_tokenizer
from pydantic import TypeAdapter
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from rerank_ray.errors import ConfigError, ModelError
from rerank_ray.label_store import LabelStore, StoredBackend
from rerank_ray.models.openai_http import OpenAIHTTP, _check_texts
from rerank_ray.models.protocol import Answer, Failure, Generate, LogLikelihood, NextToken, Prompt
from rerank_ray.models.resolve import resolve
from rerank_ray.ranking.rankers import Ranker
from rerank_ray.records import Usage
from rerank_ray.settings.jobs import StoreSettings
from rerank_ray.settings.models import ModelSettings
from rerank_ray.settings.rankers import QueryLikelihoodSettings, RankerSettings, YesNoSettings

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


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("rank_gpt", {"prompt": "rank_gpt_reasoning"}, "prefill"),
        ("yes_no", {"prompt": "bge_reranker_llm"}, "api: completions"),
    ],
)
def test_a_template_that_the_server_can_not_take_is_refused_before_any_row(serve, method, options, said):
    stub = serve(always(chat_reply("Yes", top={"Yes": -0.5, "No": -1.5})))
    model = settings(stub, top_logprobs=2).model_dump()
    chosen = TypeAdapter(RankerSettings).validate_python({"method": method, "model": model, **options})
    with pytest.raises(ConfigError, match=said):
        Ranker(chosen)
    assert len(stub.requests) <= 2


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
    assert made.name.endswith(f":tokenizer={resolve(ModelSettings(path=str(tiny_llama))).identity}")
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


def test_half_of_a_surrogate_pair_is_a_question_mark(serve):
    """JSON can escape one, and no file or tokenizer takes it."""
    for reply in (chat_reply("[2] \ud83d> [1]"), chat_reply("", reasoning="fine \ud83d")):
        (answer,) = backend(serve(always(reply))).run([generate()])
        assert answer.value in ("[2] ?> [1]", "<think>fine ?</think>")


def test_a_refusal_and_a_content_filter_are_failures(serve):
    replies = {
        2: chat_reply(None, refusal="I can't help with that."),
        3: chat_reply("half an", finish="content_filter"),
    }
    stub = serve(lambda e: e.send(replies.get(e.body["max_tokens"], chat_reply("Hi"))))
    refused, filtered = backend(stub).run([generate(2), generate(3)])
    paid = Usage(calls=1, prompt_tokens=10, output_tokens=2)
    assert refused == Failure(reason="the model refuses: I can't help with that.", usage=paid)
    assert "content filter" in filtered.reason
    assert filtered.usage == paid


@pytest.mark.parametrize("reason", ["insufficient_system_resource", "error", "abort"])
def test_an_answer_that_the_server_broke_off_is_a_failure(serve, tmp_path, reason: str):
    """Half a text is no answer, and above all none to keep; it is billed all the same."""
    broken = [True]
    stub = serve(lambda e: e.send(chat_reply("[1] > [", finish=reason if e.number and broken else "stop")))
    made, model = OpenAIHTTP(settings(stub)), settings(stub)
    stored = StoredBackend(made, model, LabelStore(StoreSettings(uri=str(tmp_path))))
    (result,) = stored.run([generate()])
    assert "the server broke the answer off" in result.reason
    assert reason in result.reason
    assert result.usage == Usage(calls=1, prompt_tokens=10, output_tokens=2)
    broken.clear()
    (result,) = stored.run([generate()])
    assert result.value == "[1] > ["


@pytest.mark.parametrize(
    ("reason", "cut_off"),
    [(None, False), ("eos_token", False), ("STOP", False), ("model_length", True), ("MAX_TOKENS", True)],
)
def test_how_other_servers_say_that_a_text_is_whole_or_at_its_limit(serve, reason, cut_off: bool):
    (answer,) = backend(serve(always(chat_reply("[1]", finish=reason)))).run([generate()])
    assert (answer.value, answer.cut_off) == ("[1]", cut_off)


def test_labels_are_read_off_the_likeliest_tokens_by_their_exact_text(serve):
    stub = serve(always(chat_reply("No", top={"No": -0.25, " Yes": -1.0, "Yes": -2.5, "yes": -4.0})))
    made = backend(stub, top_logprobs=4)
    assert made.answers == {Generate, NextToken}
    answer = made.run([YES_NO])[0]
    assert answer.value == (-2.5, -0.25)
    body = stub.bodies[0]
    assert (body["logprobs"], body["top_logprobs"], body["max_tokens"], body["temperature"]) == (True, 4, 1, 0.0)


# The model's turns have a space before the answer.
SPACED = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture
def with_tokenizer(tiny_llama: Path, tmp_path: Path) -> Callable[[Stub, PreTrainedTokenizerFast], OpenAIHTTP]:
    """Makes a backend whose prompts become tokens here, in the template `SPACED`."""

    def made(stub: Stub, tokenizer: PreTrainedTokenizerFast) -> OpenAIHTTP:
        folder = shutil.copytree(tiny_llama, tmp_path / "model")
        tokenizer.chat_template = SPACED
        tokenizer.save_pretrained(folder)
        return backend(stub, api="completions", tokenizer=str(folder), top_logprobs=5)

    return made


def test_a_label_behind_a_space_is_read_off_the_token_that_holds_it(serve, with_tokenizer):
    """What is likely there is " Yes", as hf_causal reads it; "Yes" is another token."""
    top = {" Yes": -0.1, " No": -2.4, "No": -6.0, "Yes": -8.0}
    stub = serve(always({"choices": [{"text": " Yes", "logprobs": {"top_logprobs": [top]}}]}))
    made = with_tokenizer(stub, tiny_llama_tokenizer())
    made.check_labels(YES_NO.labels, PROMPT)
    assert made.run([YES_NO])[0].value == (-0.1, -2.4)


def test_tokens_of_one_text_are_refused_where_the_server_tells_texts(serve, with_tokenizer):
    """As vLLM's does, likeliest first: "Yes" is `▁Yes` with −0.3 and then, in its place, `Yes` with −7.5."""
    stub = serve(always({"choices": [{"text": "Yes", "logprobs": {"top_logprobs": [{"Yes": -7.5, "No": -1.4}]}}]}))
    made = with_tokenizer(stub, tiny_sentencepiece_tokenizer())
    with pytest.raises(
        ModelError, match=r"2 tokens of this tokenizer have the text 'Yes' \((Yes, ▁Yes|▁Yes, Yes)\).*return_tokens_as"
    ):
        made.check_labels(YES_NO.labels, PROMPT)


@pytest.mark.parametrize("server", ["vLLM", "llama.cpp"])
def test_tokens_of_one_text_are_told_apart_by_their_ids(serve, with_tokenizer, server: str):
    tokenizer = tiny_sentencepiece_tokenizer()
    values = {"▁Yes": -0.3, "▁No": -1.4, "Yes": -7.5, "No": -9.0}
    ids = dict(zip(values, tokenizer.convert_tokens_to_ids(list(values)), strict=True))
    if server == "vLLM":
        logprobs = {"top_logprobs": [{f"token_id:{ids[name]}": value for name, value in values.items()}]}
    else:
        top = [{"id": ids[name], "token": name.replace("▁", " "), "logprob": value} for name, value in values.items()]
        logprobs = {"content": [top[0] | {"top_logprobs": top}]}
    stub = serve(always({"choices": [{"text": "Yes", "logprobs": logprobs}]}))
    made = with_tokenizer(stub, tokenizer)
    made.check_labels(YES_NO.labels, PROMPT)
    assert made.run([YES_NO])[0].value == (-0.3, -1.4)


def test_a_digits_byte_is_no_other_token_of_its_text():
    """Gemma's decoder keeps spaces, so `▁1` and `1` differ; `<0x31>` is a 1 too, which no model writes."""
    vocabulary = {name: i for i, name in enumerate(["<unk>", "<0x31>", "1", "▁1"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    assert [fast.decode([i]) for i in (1, 2, 3)] == ["1", "1", " 1"]
    _check_texts(fast, ("1",), (2,))


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
    # The server bills the one without a label too.
    assert outcome.usage == Usage(calls=3, prompt_tokens=30, output_tokens=6)


def test_more_labels_than_the_server_reports_are_refused_before_any_call(serve):
    stub = serve(always(chat_reply("A", top={"A": -0.1})))
    with pytest.raises(ConfigError, match="3 labels need as many log-probabilities, and top_logprobs is 2"):
        backend(stub, top_logprobs=2).check_labels(("A", "B", "C"), Prompt(parts=("a",), passages=()))


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
    stub = serve(lambda e: e.send(reply if e.number else chat_reply("Hi")))
    made = OpenAIHTTP(settings(stub))
    result = made.run([generate()])[0]
    assert "unexpected answer" in result.reason


def test_a_server_need_not_count_tokens(serve):
    (answer,) = backend(serve(always(chat_reply("ok") | {"usage": None}))).run([generate()])
    assert answer == Answer(value="ok", usage=Usage(calls=1))
