"""`rerank-ray prompt`: what is printed is what the model reads; and a user's own template, from file to label."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
import torch
import yaml
from fixtures.rows import make_list
from fixtures.tiny_models import tiny_llama_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from rerank_ray import config
from rerank_ray.cli import main
from rerank_ray.errors import ConfigError, InputError, ModelError
from rerank_ray.models.protocol import Prompt
from rerank_ray.models.tokenizing import PromptEncoder, PromptTooLongError
from rerank_ray.parquet import write_candidates
from rerank_ray.prompt import show
from rerank_ray.prompts.render import builtin_templates, load_template
from rerank_ray.records import Candidate, CandidateList, Query
from rerank_ray.schema import CANDIDATES, candidate_row, labels_from_row
from rerank_ray.settings.jobs import LabelSettings
from rerank_ray.stages import RankStage

LLAMA = tiny_llama_tokenizer()
MINE = {
    "method": "yes_no",
    "about": "mine",
    "system": "Be brief",
    "text": "{query} {{passage}}?",
    "labels": ["Yes", "No"],
}


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """q1 with three candidates, q:2 with one that is long."""
    long = Candidate(doc_id="d0", text="cat dog " * 200)
    lists = [
        make_list("q1", text="which cat", scores=[3.0, 2.0, 1.0]),
        CandidateList(query=Query(query_id="q:2", text="bird"), candidates=(long,)),
    ]
    write_candidates(lists, str(tmp_path / "rows"))
    return str(tmp_path / "rows")


@pytest.fixture
def mine(tmp_path: Path) -> str:
    path = tmp_path / "elsewhere" / "mine.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(MINE), encoding="utf-8")
    return str(path)


# Without a model


def test_one_passage(rows: str, mine: str):
    """Braces that are no slot stay; the system message stands in front."""
    shown = show(mine, rows)
    assert shown.text == "Be brief\n\nwhich cat {alpha document 0 of q1}?"
    assert shown.facts == (
        "query 'q1': call 1 of yes_no, NextToken",
        "reads the logits of 'Yes', 'No' at the next position",
    )
    assert show(mine, f"{rows}:q:2").text.startswith("Be brief\n\nbird {cat dog cat")
    assert show(mine, rows, number=3).text == "Be brief\n\nwhich cat {gamma document 2 of q1}?"


def test_a_continuation_is_a_fact_of_its_own(rows: str):
    shown = show("query_likelihood", rows)
    assert "alpha document 0 of q1" in shown.text
    assert shown.facts[1] == "reads the likelihood of 'which cat' after it"


def test_a_pair(rows: str):
    text = show("prp", rows, overrides=["strategy=allpair"]).text
    assert "Passage A: alpha document 0 of q1" in text
    assert "Passage B: beta document 1 of q1" in text


def test_an_attention_call_says_whose_attention(rows: str, tiny_llama: Path):
    """The best candidate stands last. A long passage is cut to the room that the queries leave."""
    shown = show("icr", rows)
    assert "[1] gamma document 2 of q1\n\n[2] beta document 1 of q1\n\n[3] alpha document 0 of q1" in shown.text
    assert (
        shown.facts[1] == "reads the attention that 'which cat' pays to each passage, less what 'N/A' pays in its place"
    )
    facts = show("icr", f"{rows}:q:2", model=str(tiny_llama), overrides=["model.max_length=120"]).facts
    assert "tokens of at most max_length 120" in facts[2]


def test_a_list_is_as_long_as_the_methods_setting(rows: str):
    """Three children and their parent; heapsort begins at the last parent, which has two of the three candidates."""
    text = show("setwise", rows, overrides=["children=3"]).text
    assert "3 passages were found for it" in text
    assert all(f"Passage {letter}: " in text for letter in "ABC")
    with pytest.raises(ConfigError, match=r"ranker\.childen: unknown key; did you mean 'children'"):
        show("setwise", rows, overrides=["childen=3"])


@pytest.mark.parametrize("name", sorted(builtin_templates()))
def test_every_built_in_template_can_be_shown(name: str, rows: str):
    """Its words are in what is printed, between the slots; so is the query, unless it is what the model writes."""
    template = builtin_templates()[name]
    shown = show(name, rows)
    opening = template.text.split("{")[0]
    assert opening in shown.text
    assert "{query}" not in shown.text
    assert ("which cat" in "".join([shown.text, *shown.facts])) == (template.method != "write_query")


# With a model


def test_the_chat_template_is_applied(rows: str, mine: str, tiny_llama: Path):
    shown = show(mine, rows, model=str(tiny_llama))
    expected = "<|system|>Be brief<|end|><|user|>which cat {alpha document 0 of q1}?<|end|><|assistant|>"
    assert shown.text == expected
    count = len(LLAMA(expected, add_special_tokens=False)["input_ids"])
    assert shown.facts[-1] == f"{count} tokens of at most max_length 1024"
    plain = show(mine, rows, model=str(tiny_llama), overrides=["model.chat=false"])
    assert plain.text.startswith("<s>")
    assert "Be brief\n\nwhich cat {alpha" in plain.text


def test_what_is_cut_can_be_seen(rows: str, mine: str, tiny_llama: Path):
    """400 words in a context of 60 tokens: what follows the passage is whole, and a fact says how much is left."""
    shown = show(mine, f"{rows}:q:2", model=str(tiny_llama), overrides=["model.max_length=60"])
    assert shown.text.endswith("}?<|end|><|assistant|>")
    assert len(LLAMA(shown.text, add_special_tokens=False)["input_ids"]) <= 60
    (cut,) = [fact for fact in shown.facts if fact.startswith("passage 1 is cut to ")]
    left, whole = (int(word) for word in cut.split() if word.isdecimal() and word != "1")
    assert whole == len(LLAMA("cat dog " * 200, add_special_tokens=False)["input_ids"])
    body = shown.text.split("bird {")[1].split("}?")[0]
    assert left == len(LLAMA(body, add_special_tokens=False)["input_ids"])
    assert ("cat dog " * 200).startswith(body)


def test_a_continuation_takes_room(rows: str, tiny_llama: Path):
    shown = show("query_likelihood", rows, model=str(tiny_llama))
    count = len(LLAMA("which cat", add_special_tokens=False)["input_ids"])
    assert shown.facts[-1].endswith(f"of at most max_length 1024 − {count} that follow")


texts = st.text(max_size=60) | st.sampled_from(["cat dog " * 40, "😀" * 20])


@settings(deadline=None)
@given(passages=st.lists(texts, min_size=1, max_size=3), limit=st.integers(20, 90), reserved=st.integers(0, 9))
def test_a_fitted_prompt_is_the_encoded_one(passages: list[str], limit: int, reserved: int):
    prompt = Prompt(parts=("a ", *[" | "] * (len(passages) - 1), " b"), passages=tuple(passages), system="s")
    encoder = PromptEncoder(LLAMA, limit, None)
    (encoded,) = encoder.encode([prompt], [reserved])
    (fitted,) = encoder.fit([prompt], [reserved])
    if isinstance(encoded, PromptTooLongError):
        assert str(fitted) == str(encoded)
    else:
        assert fitted.ids == encoded
        assert all(whole.startswith(cut) for whole, cut in zip(passages, fitted.passages, strict=True))


# What can't be shown


def test_what_can_not_be_shown(rows: str, mine: str, tiny_llama: Path, tmp_path: Path):
    with pytest.raises(InputError, match="has no query 'q9'"):
        show(mine, f"{rows}:q9")
    with pytest.raises(InputError, match="no such candidate Parquet"):
        show(mine, "nowhere:q1")
    with pytest.raises(InputError, match="--call 4: the method makes no such call"):
        show(mine, rows, number=4)
    with pytest.raises(ConfigError, match="no built-in template 'mine'"):
        show("mine", rows)
    with pytest.raises(ModelError, match="raise max_length"):
        show(mine, rows, model=str(tiny_llama), overrides=["model.max_length=8"])
    Path(mine).write_text(yaml.safe_dump(MINE | {"labels": ["Absolutely", "No"]}), encoding="utf-8")
    with pytest.raises(ModelError, match="label 'Absolutely' is"):
        show(mine, rows, model=str(tiny_llama))


# The command


def test_the_command_prints_the_prompt_alone(rows: str, mine: str, tiny_llama: Path, capsys):
    arguments = ["prompt", "show", mine, "--row", f"{rows}:q1", "--model", str(tiny_llama)]
    assert main([*arguments, "--set", "model.max_length=512", "--call", "2"]) == 0
    out, err = capsys.readouterr()
    assert out == "<|system|>Be brief<|end|><|user|>which cat {beta document 1 of q1}?<|end|><|assistant|>\n"
    assert "# query 'q1': call 2 of yes_no" in err
    assert "max_length 512" in err


def test_the_command_lists_templates(capsys):
    assert main(["prompt", "list"]) == 0
    out = capsys.readouterr().out
    for name, template in builtin_templates().items():
        line = next(line for line in out.splitlines() if f" {name} " in line)
        assert f" {template.method} " in line


# A user's template, end to end


def test_a_template_outside_the_package_labels(rows: str, mine: str, tiny_llama: Path, tmp_path: Path):
    """The label is the difference of two logits that the model gives after the very text that `prompt show` prints."""
    file = tmp_path / "label.yaml"
    model = {"kind": "hf_causal", "path": str(tiny_llama), "dtype": "float32", "device": "cpu"}
    content = {"input": rows, "teacher": {"method": "yes_no", "prompt": mine, "model": model}}
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    stage = RankStage(config.load(LabelSettings, file).teacher, "labels")
    source = pa.Table.from_pylist([candidate_row(make_list("q1", text="which cat"))], schema=CANDIDATES)
    (row,) = stage(source).to_pylist()
    labels = labels_from_row(row)
    assert labels.teacher.endswith(f"prompt={load_template(mine, 'yes_no').digest}")
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    yes, no = (LLAMA(word, add_special_tokens=False)["input_ids"][0] for word in ("Yes", "No"))
    for number, score in enumerate(labels.scores, 1):
        text = show(mine, rows, model=str(tiny_llama), number=number).text
        ids = LLAMA(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            logits = plain(ids).logits[0, -1]
        assert score == pytest.approx(float(logits[yes] - logits[no]), abs=1e-4)
