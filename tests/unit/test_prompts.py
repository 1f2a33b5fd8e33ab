"""Templates: slots are filled, and nothing else is touched."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rerank_ray.config import read_yaml, validate
from rerank_ray.errors import ConfigError
from rerank_ray.prompts.render import Template, load_template
from rerank_ray.records import Candidate, Query

YES_NO = {"method": "yes_no", "about": "a", "text": "{instruction}: {query} / {passage}?", "labels": ["Yes", "No"]}
LIKELIHOOD = {"method": "query_likelihood", "about": "a", "text": "{passage}", "continuation": "{query}"}
ICR = {"method": "icr", "about": "a", "text": "{passages} {query}"}
texts = st.text(max_size=30) | st.sampled_from(["{passage}", "{query}", "{", "}}", "{0}", "%s", "\\1", "{instruction}"])


def template(content: dict) -> Template:
    return validate(Template, content, "t.yaml")


@given(query=texts, passage=texts, instruction=st.none() | texts.filter(bool))
def test_braces_in_texts_are_left_alone(query: str, passage: str, instruction: str | None):
    """The prompt is the template with each slot replaced once, whatever the replacements hold."""
    asked = Query(query_id="q", text=query, instruction=instruction)
    prompt = template(YES_NO).prompt(asked, Candidate(doc_id="d", text=passage))
    given_instruction = instruction or "Given a search query, find passages that answer it"
    assert prompt.parts == (f"{given_instruction}: {query} / ", "?")
    assert prompt.passages == (passage,)
    assert template(LIKELIHOOD).continued(asked) == query


def test_braces_that_are_no_slots_stay():
    """JSON in a template is text: only {name} is a slot."""
    made = template(YES_NO | {"text": 'Answer {"a": 1} or { query } for {query} {passage}'})
    asked = Query(query_id="q", text="cat")
    assert made.prompt(asked, Candidate(doc_id="d", text="p")).parts == ('Answer {"a": 1} or { query } for cat ', "")


def test_the_title_stands_before_the_passage():
    prompt = template(LIKELIHOOD).prompt(
        Query(query_id="q", text="x"), Candidate(doc_id="d", text="body", title="Head")
    )
    assert prompt.passages == ("Head body",)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (YES_NO | {"text": "{passage}"}, "text lacks the slot {query}"),
        (YES_NO | {"text": "{query}"}, "text lacks the slot {passage}"),
        (LIKELIHOOD | {"text": "write"}, "text lacks the slot {passage}"),
        (LIKELIHOOD | {"text": "{query}: {passage}"}, "text has the slot {query}, but the query's own"),
        (
            YES_NO | {"text": "{query} {passage} {document}"},
            "unknown slot {document}; known: query, instruction, passage",
        ),
        (YES_NO | {"text": "{query} {passage} {passage}"}, "text must hold the slot {passage} once"),
        (YES_NO | {"labels": None}, "a yes_no template needs labels: answer words"),
        (YES_NO | {"labels": ["Yes"]}, "labels"),
        (YES_NO | {"labels": [True, "No"]}, "labels.0: Input should be a valid string (given: True)"),
        (LIKELIHOOD | {"continuation": None}, "needs continuation with the slot {query}"),
        (LIKELIHOOD | {"continuation": "x"}, "needs a continuation with the slot {query}"),
        (LIKELIHOOD | {"continuation": "{query} of {passage}"}, "continuation has the unknown slot {passage}"),
        (YES_NO | {"passage": "[{identifier}] {passage}"}, "passage is an entry of {passages}, which yes_no has not"),
        (ICR | {"passage": "[{identifier}] {passage} ({score})"}, "passage has the unknown slot {score}; known"),
        (YES_NO | {"method": "other"}, "method"),
        (YES_NO | {"txt": "x"}, "txt: unknown key; did you mean 'text'?"),
    ],
)
def test_a_bad_template_says_why(content: dict, said: str):
    with pytest.raises(ConfigError) as caught:
        template(content)
    assert str(caught.value).startswith("t.yaml: 1 error\n")
    assert said in str(caught.value)


def test_the_digest_changes_with_what_the_model_sees():
    """`about` is for people; everything else is for the model."""
    base = template(YES_NO).digest
    assert len(base) == 8
    assert template(YES_NO | {"about": "another"}).digest == base
    changes = [
        {"text": "{instruction}: {query} / {passage}"},
        {"labels": ["Yes", "no"]},
        {"system": "Be brief"},
        {"chat": False},
    ]
    digests = [template(YES_NO | change).digest for change in changes]
    assert len({base, *digests}) == 5


@pytest.mark.parametrize(
    "name", [f.name.removesuffix(".yaml") for f in (resources.files("rerank_ray.prompts") / "templates").iterdir()]
)
def test_every_built_in_template_is_valid(name: str):
    """A method's own template has its name, every other one names its method, and each loads from a path."""
    path = str(resources.files("rerank_ray.prompts") / "templates" / f"{name}.yaml")
    method = read_yaml(path)["method"]
    assert load_template(path, method) == load_template(name, method)
    assert load_template(method, method).method == method


def test_templates_that_are_not_there():
    with pytest.raises(
        ConfigError, match=r"no built-in template 'yesno'; known: .*query_likelihood, .*yes_no.*, or give"
    ):
        load_template("yesno", "yes_no")
    with pytest.raises(ConfigError, match=r"no/such\.yaml: no such config file"):
        load_template("no/such.yaml", "yes_no")


def test_a_template_of_another_method(tmp_path: Path):
    with pytest.raises(ConfigError, match="template 'yes_no' is written for yes_no, not query_likelihood"):
        load_template("yes_no", "query_likelihood")
