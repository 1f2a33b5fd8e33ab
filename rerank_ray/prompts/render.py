"""Templates: YAML data with documented slots, filled without touching braces in queries and passages.

A template file has these keys:

    method: the ranking method it is written for
    about: one line on where it comes from
    system: system message, or left out
    chat: true when the text is the user's turn of a chat
    instruction: what {instruction} is for a query that has none
    text: the prompt. {query} and {instruction} may stand anywhere (icr: {query} at the end; query_likelihood and
        write_query: no {query}); {passage} for methods that show one passage, {passage_a} and {passage_b} for those
        that show two, {passages} for a list, {count} for its length, {criteria} for those that the model wrote itself
        (rebel)
    passage: a list's entry: {passage}, its identifier {identifier} and, where the method has one, its {score}
    separator: what stands between a list's entries
    prefill: how the model's own turn begins
    labels: answer words, each one token, or a word, number or letter that differs in more than case where a model's
        text is read
    continuation: the text whose likelihood is taken; {query} is its slot
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources

from pydantic import model_validator

from rerank_ray.config import Settings, read_yaml, validate
from rerank_ray.errors import ConfigError
from rerank_ray.models.protocol import Prompt
from rerank_ray.records import Candidate, Query

_SLOT = re.compile(r"\{(\w+)\}")
_PASSAGE_SLOT = re.compile(r"(\{passage\}|\{passage_a\}|\{passage_b\}|\{passages\})")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Needs:
    """What a method's templates hold: slots that `text` has exactly once ({query} at least once), keys, other slots."""

    slots: frozenset[str]
    keys: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()


_LIST = _Needs(slots=frozenset({"query", "passages"}), keys=frozenset({"passage"}), optional=frozenset({"count"}))
_NEEDS = {
    "yes_no": _Needs(slots=frozenset({"query", "passage"}), keys=frozenset({"labels"})),
    "query_likelihood": _Needs(slots=frozenset({"passage"}), keys=frozenset({"continuation"})),
    "icr": _LIST,
    "fine_grained": _Needs(slots=frozenset({"query", "passage"}), keys=frozenset({"labels"})),
    "erank": _Needs(slots=frozenset({"query", "passage"})),
    "prp": _Needs(slots=frozenset({"query", "passage_a", "passage_b"}), keys=frozenset({"labels"})),
    "duot5": _Needs(slots=frozenset({"query", "passage_a", "passage_b"}), keys=frozenset({"labels"})),
    "setwise": replace(_LIST, keys=frozenset({"passage", "labels"})),
    "rank_r1": _LIST,
    "rank_gpt": _LIST,
    "first": replace(_LIST, keys=frozenset({"passage", "labels"})),
    "group_rank": _LIST,
    "e2rank": _LIST,
    "rebel": replace(_LIST, slots=frozenset({"query", "passages", "criteria"})),
    "rebel_criteria": _Needs(slots=frozenset({"query"}), optional=frozenset({"count"})),
    "write_query": _Needs(slots=frozenset({"passage"})),
}
# Methods whose labels are two, and what they say.
_NUMBER, _LETTER, _WORD = re.compile(r"0|[1-9][0-9]*"), re.compile(r"[A-Za-z]"), re.compile(r"\w+")
"""What parsers find in texts: the first two in rankings, the last elsewhere."""
_TWO_LABELS = {
    "yes_no": "[relevant, not relevant]",
    "prp": "[passage A, passage B]",
    "duot5": "[the first passage, the second]",
}
# Methods whose text must not show the query, and why.
_WITHOUT_QUERY = {
    "write_query": "the query is what the model writes",
    "query_likelihood": "the query's own likelihood is the score",
}
_KEY_HINTS = {"labels": ": answer words", "continuation": " with the slot {query}"}


class Template(Settings):
    """A prompt template of one method."""

    method: str
    """The ranking method it is written for."""
    about: str
    system: str | None = None
    chat: bool = True
    instruction: str = "Given a search query, find passages that answer it"
    """What `{instruction}` is for a query that has none."""
    text: str
    passage: str | None = None
    """List methods: one entry of the list."""
    separator: str = "\n"
    """List methods: what stands between two entries."""
    prefill: str = ""
    """How the model's own turn begins."""
    labels: tuple[str, ...] | None = None
    """Answer words; yes_no: relevant, not relevant; fine_grained: from the least relevant level to the most; prp:
    passage A, passage B; setwise: the passages' identifiers."""
    continuation: str | None = None
    """query_likelihood: the text whose log-likelihood is the score; `{query}` is its slot."""

    @model_validator(mode="after")
    def _slots(self) -> Template:
        if self.method not in _NEEDS:
            raise ValueError(f"method: no method '{self.method}' takes a template; known: {', '.join(sorted(_NEEDS))}")
        needs = _NEEDS[self.method]
        found = _SLOT.findall(self.text)
        if missing := needs.slots - set(found):
            raise ValueError(f"text lacks the slot {{{sorted(missing)[0]}}}")
        _refuse_unknown("text", found, ["query", "instruction", *sorted((needs.slots | needs.optional) - {"query"})])
        if self.method in _WITHOUT_QUERY and "query" in found:
            raise ValueError(f"text has the slot {{query}}, but {_WITHOUT_QUERY[self.method]}")
        for slot in sorted(needs.slots - {"query"}):
            if found.count(slot) != 1:
                raise ValueError(f"text must hold the slot {{{slot}}} once")
        for key in sorted(needs.keys):
            if getattr(self, key) is None:
                raise ValueError(f"a {self.method} template needs {key}{_KEY_HINTS.get(key, '')}")
        if self.method in _TWO_LABELS and len(self.labels) != 2:
            raise ValueError(f"labels must be two: {_TWO_LABELS[self.method]}")
        if self.method == "fine_grained" and (len(self.labels) < 2 or len(set(self.labels)) < len(self.labels)):
            raise ValueError("labels must be two or more different levels, the least relevant first")
        if self.method == "icr" and (found.count("query") != 1 or not self.text.rstrip().endswith("{query}")):
            raise ValueError(
                "text must hold the slot {query} once, at its end: the query's tokens see what stands before them alone"
            )
        if self.continuation is not None:
            _refuse_unknown("continuation", _SLOT.findall(self.continuation), ["query", "instruction"])
            if "{query}" not in self.continuation:
                raise ValueError(f"a {self.method} template needs a continuation with the slot {{query}}")
        if self.passage is not None:
            if "passages" not in needs.slots:
                raise ValueError(f"passage is an entry of {{passages}}, which {self.method} has not: leave it out")
            entry = _SLOT.findall(self.passage)
            # icr reads what the query attends to, and never looks at scores.
            _refuse_unknown("passage", entry, ["passage", "identifier", *(["score"] if self.method != "icr" else [])])
            if entry.count("passage") != 1 or "identifier" not in entry:
                raise ValueError("passage must hold the slot {passage} once, and {identifier}")
        return self

    @property
    def digest(self) -> str:
        """Eight hex digits that change with anything the model would see."""
        content = self.model_dump(mode="json", exclude={"about"}, exclude_defaults=True)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]

    def prompt(self, query: Query, candidate: Candidate) -> Prompt:
        """The prompt for one passage."""
        return self._made(query, {"{passage}": candidate.contents})

    def pair_prompt(self, query: Query, a: Candidate, b: Candidate) -> Prompt:
        """The prompt that compares passage A with passage B."""
        return self._made(query, {"{passage_a}": a.contents, "{passage_b}": b.contents})

    @property
    def shows_scores(self) -> bool:
        """Whether a list's entries show first-stage scores."""
        return "{score}" in (self.passage or "")

    def list_prompt(
        self,
        query: Query,
        passages: Sequence[str],
        scores: Sequence[float] | None = None,
        criteria: str = "",
    ) -> Prompt:
        """The prompt over a list of passages, which it names as `identifiers` does."""
        before, after = self.text.split("{passages}")
        values = {"count": str(len(passages)), "criteria": criteria}
        parts, texts = [self._fill(before, query, values)], []
        head, tail = self.passage.split("{passage}")
        for i, (passage, identifier) in enumerate(zip(passages, self.identifiers(len(passages)), strict=True)):
            entry = {"identifier": identifier, "score": "" if scores is None else f"{scores[i]:.2f}"}
            parts[-1] += (self.separator if i else "") + self._fill(head, query, entry)
            texts.append(passage)
            parts.append(self._fill(tail, query, entry))
        parts[-1] += self._fill(after, query, values)
        return self._prompt(parts, texts)

    def example(self, count: int = 1) -> Prompt:
        """A prompt of one-word texts, to check a model against before there is a row; a list has `count` passages.

        Raises:
            ConfigError: a list has fewer labels.
        """
        query, word = Query(query_id="", text="query"), Candidate(doc_id="", text="word")
        if self.passage is not None:
            return self.list_prompt(query, [word.text] * count, [0.0] * count)
        return self.pair_prompt(query, word, word) if "{passage_a}" in self.text else self.prompt(query, word)

    def identifiers(self, count: int) -> tuple[str, ...]:
        """How `count` passages of a list are named: the labels, or 1, 2, … in a template without.

        Raises:
            ConfigError: there are fewer labels than passages.
        """
        if self.labels is None:
            return tuple(str(n) for n in range(1, count + 1))
        if len(self.labels) < count:
            raise ConfigError(
                f"prompt: {count} passages at once need as many labels, but the {self.method} template has "
                f"{len(self.labels)}: show fewer passages at once or add labels"
            )
        return self.labels[:count]

    def check_readable(self) -> None:
        """Raise `ConfigError` where a text that names a label, in whatever case, might not be read as that one."""
        labels = self.labels or ()
        folded = [label.upper() for label in labels]
        if repeated := next((a for a, name in zip(labels, folded, strict=True) if folded.count(name) > 1), None):
            raise ConfigError(
                f"prompt: labels: {repeated!r} differs from another label in case alone, which a model's text does not "
                f"keep: use other labels in a {self.method} template whose answers are read from text"
            )
        kinds = [_NUMBER, _LETTER] if self.method == "rank_gpt" else [_WORD]
        if labels and not any(all(kind.fullmatch(label) for label in labels) for kind in kinds):
            needed = "numbers or letters" if self.method == "rank_gpt" else "words"
            raise ConfigError(
                f"prompt: labels: {', '.join(map(repr, labels[:3]))}, … can't be found in a text: labels of a "
                f"{self.method} template are single {needed}"
            )

    def query_prompt(self, query: Query, count: int) -> Prompt:
        """The prompt that shows no passage, and asks for `count` of something."""
        return self._prompt([self._fill(self.text, query, {"count": str(count)})], [])

    def continued(self, query: Query) -> str:
        return self._fill(self.continuation, query)

    def _fill(self, text: str, query: Query, values: Mapping[str, str] | None = None) -> str:
        every = {"query": query.text, "instruction": query.instruction or self.instruction, **(values or {})}
        return _SLOT.sub(lambda match: every[match[1]], text)

    def _made(self, query: Query, passages: Mapping[str, str]) -> Prompt:
        parts, texts = [""], []
        for piece in _PASSAGE_SLOT.split(self.text):
            if piece in passages:
                texts.append(passages[piece])
                parts.append("")
            else:
                parts[-1] += self._fill(piece, query)
        return self._prompt(parts, texts)

    def _prompt(self, parts: Sequence[str], passages: Sequence[str]) -> Prompt:
        return Prompt(
            parts=tuple(parts),
            passages=tuple(passages),
            system=self.system,
            chat=self.chat,
            prefill=self.prefill,
        )


def _refuse_unknown(key: str, slots: Sequence[str], known: Sequence[str]) -> None:
    if unknown := set(slots) - set(known):
        raise ValueError(f"{key} has the unknown slot {{{sorted(unknown)[0]}}}; known: {', '.join(known)}")


def builtin_templates() -> dict[str, Template]:
    """The templates that come with the package, by name."""
    folder = resources.files("rerank_ray.prompts") / "templates"
    names = sorted(f.name.removesuffix(".yaml") for f in folder.iterdir())
    return {name: find_template(name) for name in names}


def names_a_file(name: str) -> bool:
    """Whether a template's name is a YAML file's path, and not a built-in one's, whatever folder is called so."""
    return name.endswith((".yaml", ".yml"))


def find_template(name: str) -> Template:
    """Read a built-in template by name, or a YAML file by path.

    Raises:
        ConfigError: no such template, or a bad one.
    """
    folder = resources.files("rerank_ray.prompts") / "templates"
    builtin = folder / f"{name}.yaml"
    if names_a_file(name):
        path = name
    elif builtin.is_file():
        path = str(builtin)
    else:
        known = sorted(f.name.removesuffix(".yaml") for f in folder.iterdir())
        raise ConfigError(f"prompt: no built-in template '{name}'; known: {', '.join(known)}, or give a .yaml path")
    return validate(Template, read_yaml(path), source=path)


def load_template(name: str, method: str) -> Template:
    """A template as `find_template` reads it, for a method.

    Raises:
        ConfigError: no such template, a bad one, or one written for another method.
    """
    template = find_template(name)
    if template.method != method:
        raise ConfigError(f"prompt: template '{name}' is written for {template.method}, not {method}")
    return template
