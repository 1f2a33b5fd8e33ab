"""Configs: every fault of a file in one message, with its path, and a hint where there is one."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, PositiveInt

from rerank_ray import settings
from rerank_ray.config import Settings, apply_overrides, differences, dump, expand, load, read_yaml, validate
from rerank_ray.errors import ConfigError
from rerank_ray.settings.distill import DistillSettings
from rerank_ray.settings.jobs import LabelSettings
from rerank_ray.settings.pipeline import PipelineSettings
from rerank_ray.settings.reinforce import ReinforceSettings


class Circle(Settings):
    """One of two shapes."""

    shape: Literal["circle"] = "circle"
    radius: PositiveInt


class Square(Settings):
    """The other one."""

    shape: Literal["square"] = "square"
    side: PositiveInt = 1


class NamedSquare(Square):
    """A square with a name."""

    name: str = ""


class Drawing(Settings):
    """A config with a union, a list of unions and a mapping of models."""

    name: str
    main: Annotated[Circle | Square, Field(discriminator="shape")]
    others: list[Annotated[Circle | Square, Field(discriminator="shape")]] = Field(default=[])
    named: dict[str, Square] = Field(default={})


GOOD = {"name": "n", "main": {"shape": "circle", "radius": 2}}


def faults(content: dict) -> list[str]:
    """The faults that a mapping has as a `Drawing`, without their indent."""
    with pytest.raises(ConfigError) as caught:
        validate(Drawing, content, "d.yaml")
    head, *lines = str(caught.value).splitlines()
    assert head == f"d.yaml: {len(lines)} error{'s' * (len(lines) > 1)}"
    return [line.removeprefix("  ") for line in lines]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# Faults


def test_every_fault_at_once_with_its_path():
    found = faults(
        {
            "nam": "n",
            "main": {"shape": "circle", "radius": -1},
            "others": [{"shape": "square"}, {"shape": "square", "sides": 2}],
            "named": {"a": {"side": "x"}},
        }
    )
    assert found == [
        "name: required, and missing",
        "main.radius: Input should be greater than 0 (given: -1)",
        "others.1.sides: unknown key; did you mean 'side'?",
        "named.a.side: Input should be a valid integer, unable to parse string as an integer (given: 'x')",
        "nam: unknown key; did you mean 'name'?",
    ]


def test_an_unknown_key_that_is_like_no_other_lists_the_known():
    assert faults(GOOD | {"zzz": 1}) == ["zzz: unknown key; known keys: main, name, named, others"]
    assert faults(GOOD | {"main": {"shape": "square", "radius": 1}}) == [
        "main.radius: unknown key; known keys: shape, side"
    ]


def test_a_union_says_what_it_needs():
    assert faults(GOOD | {"main": {"radius": 1}}) == ["main: needs 'shape': to say which kind it is"]
    (fault,) = faults(GOOD | {"main": {"shape": "line"}})
    assert fault.startswith("main: Input tag 'line' found using 'shape' does not match any of the expected tags")
    assert "'circle', 'square'" in fault


def test_a_real_config_with_several_faults():
    content = {
        "input": "in",
        "teacher": {"method": "yes_no", "model": {"kind": "hf_causal", "path": "p", "dtyp": "float32"}},
        "execution": {"actors": 0},
        "limits": {"max_error_rate": 2},
    }
    with pytest.raises(ConfigError) as caught:
        validate(LabelSettings, content, "label.yaml")
    assert [line.split(":")[0].strip() for line in str(caught.value).splitlines()] == [
        "label.yaml",
        "execution.actors",
        "limits.max_error_rate",
        "teacher.model.dtyp",
    ]
    assert "did you mean 'dtype'?" in str(caught.value)


def test_a_method_on_a_model_of_another_kind_is_refused_when_the_config_is_read():
    content = {"input": "in", "teacher": {"method": "cross_encoder", "model": {"kind": "hf_causal", "path": "p"}}}
    with pytest.raises(ConfigError, match=r"teacher\.model: Input tag 'hf_causal' .* 'cross_encoder', .*'fake'"):
        validate(LabelSettings, content, "label.yaml")


@pytest.mark.parametrize(
    ("ranker", "said"),
    [
        ({"method": "prp", "strategy": "allpair", "k": 5}, "k changes nothing with strategy allpair"),
        ({"method": "prp", "max_tokens": 64}, "max_tokens changes nothing with mode scoring"),
        ({"method": "setwise", "max_tokens": 64}, "max_tokens changes nothing with mode likelihood"),
        ({"method": "fine_grained", "score": "top", "read": "log_likelihood"}, "read changes nothing with score top"),
    ],
)
def test_a_rankers_option_that_nothing_reads_is_refused(ranker: dict, said: str):
    """A run's own config.yaml says every default, and must stay one that can be read."""
    content = {"input": "in", "teacher": {"model": {"kind": "fake"}, **ranker}}
    with pytest.raises(ConfigError, match=f"teacher: {said}: leave it out"):
        validate(LabelSettings, content, "label.yaml")
    option = said.split()[0]
    del content["teacher"][option]
    settings = validate(LabelSettings, content, "label.yaml")
    assert validate(LabelSettings, settings.model_dump(mode="json"), "config.yaml") == settings


def test_checks_between_fields_name_the_fields():
    base = {"input": ["l"], "student": {"base": "b", "max_length": 32, "max_query_length": 32}}
    with pytest.raises(ConfigError, match=r"student: max_query_length \(32\) must be at most max_length \(32\) − 8"):
        validate(DistillSettings, base, "d")
    # Two or three of these are special tokens, and [CLS] and [SEP] alone are no query.
    with pytest.raises(ConfigError, match=r"student\.max_query_length: Input should be greater than or equal to 4"):
        validate(DistillSettings, base | {"student": {"base": "b", "max_query_length": 3}}, "d")
    sampling = {"group_size": 4, "bands": [{"ranks": [1, 5], "count": 2}, {"ranks": [9, 6], "count": 2}]}
    with pytest.raises(ConfigError, match=r"sampling\.bands\.1: ranks: \[9, 6\]: the first must not be above"):
        validate(DistillSettings, base | {"student": {"base": "b"}, "sampling": sampling}, "d")
    sampling["bands"].pop()
    with pytest.raises(ConfigError, match=r"the bands' counts add up to 2, not to group_size \(4\)"):
        validate(DistillSettings, base | {"student": {"base": "b"}, "sampling": sampling}, "d")


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([{"name": "a"}], "step 'a' needs exactly one of ingest, synthesize, label, .*; it has none"),
        ([{"name": "a b", "evaluate": {"rankings": {"x": "y"}, "qrels": "q"}}], "steps.0.name"),
        ([{"name": "a", "evaluate": {"rankings": {"x": "step://b"}, "qrels": "q"}}], "step://b is no earlier step"),
        ([{"name": "a", "evaluate": {"rankings": {"x": "step://a"}, "qrels": "q"}}], "step://a is no earlier step"),
        ([{"name": "a", "evaluate": {"rankings": {"x": "y"}, "qrels": "q"}}] * 2, "two steps are called 'a'"),
        ([], "steps: List should have at least 1 item"),
        ([{"name": "a", "evaluate": {"rankings": {"x": "y"}, "qrels": "q", "metrics": []}}], "evaluate.metrics: Tuple"),
    ],
)
def test_pipelines_that_can_not_run(steps: list, said: str):
    with pytest.raises(ConfigError, match=said):
        validate(PipelineSettings, {"steps": steps}, "p.yaml")


# YAML


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3\n", "key 'a' is given twice"),
        ("a:\n  b: 1\n  b: 2\n", "key 'b' is given twice"),
        ("a: [1, {b: 1, b: 2}]\n", "key 'b' is given twice"),
        ("a: [1\n", "not valid YAML"),
        ("a: {{ templated }}\n", "not valid YAML"),
        ("- a\n", "a config is a YAML mapping of keys to values, not list"),
        ("", "not NoneType"),
        ("a: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ],
)
def test_yaml_that_is_refused(tmp_path: Path, text: str, said: str):
    path = write(tmp_path / "c.yaml", text)
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)


def test_merged_keys_may_be_given_again(tmp_path: Path):
    """`<<` takes the keys of an anchored mapping, and one that is given beside it wins."""
    text = "base: &base {x: 1, y: 1}\nmore: {<<: *base, y: 2}\n"
    assert read_yaml(write(tmp_path / "c.yaml", text)) == {"base": {"x": 1, "y": 1}, "more": {"x": 1, "y": 2}}


def test_a_repeated_key_names_its_line(tmp_path: Path):
    with pytest.raises(ConfigError, match="line 3, column 1"):
        read_yaml(write(tmp_path / "c.yaml", "a: 1\nb: 2\na: 3\n"))


def test_files_that_are_no_config(tmp_path: Path):
    with pytest.raises(ConfigError, match="no such config file"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="is a folder, not a config file"):
        read_yaml(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("name: café\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml: not UTF-8"):
        read_yaml(tmp_path / "latin.yaml")


# Overrides


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("a=2", {"a": 2, "list": [{"x": 1}, 5]}),
        ("a=b=c", {"a": "b=c", "list": [{"x": 1}, 5]}),
        ("new.deep.key=[1, two]", {"a": 1, "list": [{"x": 1}, 5], "new": {"deep": {"key": [1, "two"]}}}),
        ("list.0.x=7", {"a": 1, "list": [{"x": 7}, 5]}),
        ("list.1={y: 2}", {"a": 1, "list": [{"x": 1}, {"y": 2}]}),
        ("list=[]", {"a": 1, "list": []}),
        ("a=", {"a": None, "list": [{"x": 1}, 5]}),
    ],
)
def test_overrides(override: str, expected: dict):
    content = {"a": 1, "list": [{"x": 1}, 5]}
    assert apply_overrides(content, [override]) == expected
    assert content == {"a": 1, "list": [{"x": 1}, 5]}


def test_later_overrides_win():
    assert apply_overrides({}, ["a.b=1", "a.c=2", "a.b=3"]) == {"a": {"b": 3, "c": 2}}


def test_a_null_section_can_be_filled():
    assert apply_overrides({"a": None}, ["a.b=1"]) == {"a": {"b": 1}}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("a", "expected KEY=VALUE"),
        ("=1", "expected KEY=VALUE"),
        ("a=[1", "the value is not valid YAML"),
        ("a.b=1", "'a' holds a single value, so nothing can be set inside it"),
        ("list.2=1", "'2' is not an item number below 2"),
        ("list.x=1", "'x' is not an item number below 2"),
        ("list.-1=1", "'-1' is not an item number below 2"),
        ("list.².x=1", "'²' is not an item number below 2"),
    ],
)
def test_overrides_that_are_refused(override: str, said: str):
    with pytest.raises(ConfigError) as caught:
        apply_overrides({"a": 1, "list": [{"x": 1}, 5]}, [override])
    assert str(caught.value).startswith(f"--set {override}: ")
    assert said in str(caught.value)


def test_a_group_that_is_given_in_part_keeps_the_rest_of_its_default():
    """A default of the place is not the class's: `side` is 4 here, whatever else of the group is set."""

    class Frame(Settings):
        """A group with a default of its own."""

        inner: NamedSquare = NamedSquare(side=4)

    assert Frame.model_validate({"inner": {"name": "x"}}).inner == NamedSquare(side=4, name="x")
    assert Frame.model_validate({"inner": {"side": 2}}).inner == NamedSquare(side=2)
    assert Frame.model_validate({"inner": {}}).inner == Frame().inner
    assert validate(Frame, apply_overrides({}, ["inner.name=y"]), "f.yaml").inner == NamedSquare(side=4, name="y")


def test_a_reinforced_run_with_another_rate_keeps_its_schedule():
    content = read_yaml("configs/reinforce/smollm2.yaml") | {"optimizer": {"learning_rate": 5e-6}}
    optimizer = validate(ReinforceSettings, expand(content, {}), "x").optimizer
    assert (optimizer.learning_rate, optimizer.weight_decay, optimizer.decay) == (5e-6, 0.0, "constant")


def test_a_file_with_overrides_and_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RADIUS_NAME", "round")
    path = write(tmp_path / "d.yaml", "name: a-${RADIUS_NAME}\nmain: {shape: circle, radius: 1}\n")
    drawing = load(Drawing, path, ["main.radius=9", "others=[{shape: square}]"])
    assert drawing == Drawing(name="a-round", main=Circle(radius=9), others=[Square()])


def test_an_override_with_a_fault_is_reported_like_one_of_the_file(tmp_path: Path):
    path = write(tmp_path / "d.yaml", yaml.safe_dump(GOOD))
    with pytest.raises(ConfigError, match=r"main\.radius: Input should be greater than 0 \(given: 0\)"):
        load(Drawing, path, ["main.radius=0"])


# Variables


def test_variables_are_replaced_everywhere(monkeypatch: pytest.MonkeyPatch):
    """In lists and nested mappings, several in a string; a value that looks like a variable is not expanded again."""
    monkeypatch.setenv("A_ROOT", "/data")
    monkeypatch.setenv("A_NAME", "${A_ROOT}")
    content = {"a": ["${A_ROOT}/x", {"b": "${A_ROOT}-${A_NAME}"}], "c": 3, "d": "$A_ROOT {A_ROOT}"}
    unset = {}
    assert expand(content, unset) == {"a": ["/data/x", {"b": "/data-${A_ROOT}"}], "c": 3, "d": "$A_ROOT {A_ROOT}"}
    assert unset == {}


def test_variables_that_are_not_set_are_told_with_every_other_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """That `${A_SIDE}` is no integer is not told as well."""
    for name in ("A_ROOT", "A_NAME", "A_SIDE"):
        monkeypatch.delenv(name, raising=False)
    text = "name: ${A_ROOT}/${A_NAME}\nmain: {shape: circle, radius: 0}\nothers: [{shape: square, side: '${A_SIDE}'}]\n"
    with pytest.raises(ConfigError) as caught:
        load(Drawing, write(tmp_path / "d.yaml", text + "nmae: 1\n"))
    assert str(caught.value).splitlines() == [
        f"{tmp_path / 'd.yaml'}: 4 errors",
        "  name: the environment variables A_ROOT, A_NAME are not set (given: '${A_ROOT}/${A_NAME}')",
        "  others.0.side: the environment variable A_SIDE is not set (given: '${A_SIDE}')",
        "  main.radius: Input should be greater than 0 (given: 0)",
        "  nmae: unknown key; did you mean 'name'?",
    ]
    write(tmp_path / "d.yaml", "name: ${A_ROOT}\nmain: {shape: circle, radius: 1}\n")
    with pytest.raises(ConfigError, match="1 error\n  name: the environment variable A_ROOT is not set"):
        load(Drawing, tmp_path / "d.yaml")


# Dumps and differences


def test_a_budget_below_one_sequence_is_refused(tmp_path: Path):
    """The error names the file, both settings with their values, and the fix."""
    model = {"kind": "hf_causal", "path": "a/b", "max_length": 512, "tokens_per_batch": 511}
    path = tmp_path / "label.yaml"
    path.write_text(yaml.safe_dump({"input": "in", "teacher": {"method": "yes_no", "model": model}}))
    with pytest.raises(ConfigError) as caught:
        load(LabelSettings, path)
    said = str(caught.value)
    assert said.startswith(f"{path}: 1 error\n  teacher.model: ")
    assert "tokens_per_batch (511) is smaller than max_length (512)" in said
    assert said.endswith("raise the first or lower the second")
    path.write_text(path.read_text().replace("511", "512"))
    load(LabelSettings, path)


def test_a_dumped_config_is_the_config():
    """config.yaml of a run holds every default, and reading it back gives the same settings."""
    content = {"input": ["l"], "student": {"base": "é", "layers": [2, 4]}, "objective": {"losses": [{"loss": "kl"}]}}
    chosen = validate(DistillSettings, content, "d")
    text = dump(chosen)
    assert "é" in text
    assert validate(DistillSettings, yaml.safe_load(text), "d") == chosen


def test_differences_by_hand():
    old = {"a": 1, "b": {"c": 2, "d": [1]}, "gone": 0, "same": {"x": 1}}
    new = {"a": 1, "b": {"c": 3, "d": [1, 2]}, "same": {"x": 1}, "new": "n"}
    assert differences(old, new) == [
        "b.c: 2 -> 3",
        "b.d: [1] -> [1, 2]",
        "gone: 0 -> None",
        "new: None -> 'n'",
    ]


values = st.recursive(
    st.integers(0, 3), lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3), max_leaves=8
)


@given(st.dictionaries(st.sampled_from("abc"), values), st.dictionaries(st.sampled_from("abc"), values))
def test_no_difference_exactly_where_equal(old: dict, new: dict):
    assert (differences(old, new) == []) == (old == new)


# Every settings model


MODELS = sorted(
    {
        m
        for module in pkgutil.iter_modules(settings.__path__, f"{settings.__name__}.")
        for _, m in inspect.getmembers(importlib.import_module(module.name), inspect.isclass)
        if issubclass(m, Settings) and m is not Settings
    },
    key=lambda m: m.__name__,
)


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
def test_every_field_says_what_it_is(model: type[Settings]):
    """A docstring under each field; tags and the models that describe themselves need none."""
    assert model.__doc__
    silent = [
        name
        for name, field in model.model_fields.items()
        if not field.description
        and name not in ("kind", "method")
        and not any(m.__name__ in str(field.annotation) for m in MODELS)
    ]
    overridden = [
        n for n in silent if any(b.model_fields.get(n, None) for b in model.__mro__[1:] if hasattr(b, "model_fields"))
    ]
    assert set(silent) == set(overridden)


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
def test_settings_are_fixed_and_closed(model: type[Settings]):
    assert model.model_config["frozen"] is True
    assert model.model_config["extra"] == "forbid"
