"""Templates: YAML data with documented slots, filled without touching braces in queries and passages.

A template file has these keys:

    about: one line on where it comes from
    system: system message, or left out
    chat: true when the text is the user's turn of a chat
    text: the prompt, with the slots {query}, {passage} and {instruction}
    labels: answer words, each one token (next-token methods)
    continuation: what precedes the text whose likelihood is taken (likelihood methods), and that text's slot
"""

from __future__ import annotations

import hashlib
import json
import re
from importlib import resources
from pathlib import Path
from typing import Literal

from pydantic import model_validator

from rerank_ray.config import Settings, read_yaml, validate
from rerank_ray.errors import ConfigError
from rerank_ray.models.protocol import Prompt
from rerank_ray.records import Candidate, Query

_SLOT = re.compile(r"\{(\w+)\}")
_DEFAULT_INSTRUCTION = "Given a search query, find passages that answer it"


class Template(Settings):
    """A prompt template of one method."""

    method: Literal["yes_no", "query_likelihood"]
    """The ranking method it is written for."""
    about: str
    system: str | None = None
    chat: bool = True
    text: str
    labels: tuple[str, str] | None = None
    """yes_no: the answers that mean relevant and not relevant."""
    continuation: str | None = None
    """query_likelihood: the text whose log-likelihood is the score; `{query}` is its slot."""

    @model_validator(mode="after")
    def _slots(self) -> Template:
        needed = {"yes_no": {"query", "passage"}, "query_likelihood": {"passage"}}[self.method]
        slots = _SLOT.findall(self.text)
        if missing := needed - set(slots):
            raise ValueError(f"text lacks the slot {{{sorted(missing)[0]}}}")
        if unknown := set(slots) - {"query", "passage", "instruction"}:
            raise ValueError(f"text has the unknown slot {{{sorted(unknown)[0]}}}; known: query, passage, instruction")
        if slots.count("passage") != 1:
            raise ValueError("text must hold the slot {passage} once")
        if self.method == "yes_no" and self.labels is None:
            raise ValueError("a yes_no template needs labels: [relevant, not relevant]")
        if self.method == "query_likelihood" and "{query}" not in (self.continuation or ""):
            raise ValueError("a query_likelihood template needs a continuation with the slot {query}")
        if unknown := set(_SLOT.findall(self.continuation or "")) - {"query", "instruction"}:
            raise ValueError(f"continuation has the unknown slot {{{sorted(unknown)[0]}}}; known: query, instruction")
        return self

    @property
    def digest(self) -> str:
        """Eight hex digits that change with anything the model would see."""
        content = self.model_dump(mode="json", exclude={"about"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]

    def prompt(self, query: Query, candidate: Candidate) -> Prompt:
        before, after = self.text.split("{passage}")
        return Prompt(
            parts=(_fill(before, query), _fill(after, query)),
            passages=(candidate.contents,),
            system=self.system,
            chat=self.chat,
        )

    def continued(self, query: Query) -> str:
        return _fill(self.continuation, query)


def _fill(text: str, query: Query) -> str:
    values = {"query": query.text, "instruction": query.instruction or _DEFAULT_INSTRUCTION}
    return _SLOT.sub(lambda match: values[match[1]], text)


def load_template(name: str, method: str) -> Template:
    """Load a built-in template by name, or a YAML file by path.

    Raises:
        ConfigError: no such template, a bad one, or one written for another method.
    """
    builtin = resources.files("rerank_ray.prompts") / "templates" / f"{name}.yaml"
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
    elif builtin.is_file():
        path = Path(str(builtin))
    else:
        folder = resources.files("rerank_ray.prompts") / "templates"
        known = sorted(f.name.removesuffix(".yaml") for f in folder.iterdir())
        raise ConfigError(f"prompt: no built-in template '{name}'; known: {', '.join(known)}, or give a .yaml path")
    template = validate(Template, read_yaml(path), source=str(path))
    if template.method != method:
        raise ConfigError(f"prompt: template '{name}' is written for {template.method}, not {method}")
    return template
