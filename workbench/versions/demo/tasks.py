"""Tasks with checkers: what the bundled model learns to do, and how an answer is judged without a judge.

An `Episode` is one conversation with gold answers; every gold assistant message is one `Task`: the
messages before it, and a `Check` that accepts or refuses any text. Family generators live in
`questions.py`, `tool_use.py` and `copying.py`; this module has no randomness and no phrasing of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from workbench.versions.demo.chat_format import Message, answer_text, split_tool_call

_CITATION = re.compile(r"\[(\d+)\]")


@dataclass(frozen=True, slots=True)
class Check:
    """What an answer must hold. Every condition that is set must be met.

    `exact`: the whole answer, spaces at the ends aside. `contains`: each text as whole words, case aside. `excludes`:
    none of these. `words`: each as a whole word or the start of one. `citations`: exactly these passages are cited.
    `not_found`: the answer says that the context lacks it, and cites nothing. `tool_name`, `arguments`: a call with
    exactly these.
    """

    exact: str | None = None
    contains: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    citations: tuple[int, ...] | None = None
    not_found: bool = False
    tool_name: str | None = None
    arguments: dict[str, Any] | None = None

    def passes(self, answer: str) -> bool:
        """True where the answer meets every condition; never raises."""
        text = answer.strip()
        folded = text.casefold()
        cited = {int(number) for number in _CITATION.findall(text)}
        return (
            (self.exact is None or text == self.exact)
            and all(_has_word(part, folded, whole=True) for part in self.contains)
            and not any(_has_word(part, folded, whole=True) for part in self.excludes)
            and all(_has_word(word, folded, whole=False) for word in self.words)
            and (self.citations is None or cited == set(self.citations))
            and (not self.not_found or ("not in the context" in folded and not cited))
            and (self.tool_name is None or self._calls(text))
        )

    def _calls(self, text: str) -> bool:
        call = split_tool_call(text)
        return call is not None and call.name == self.tool_name and call.arguments == self.arguments

    def to_json(self) -> dict[str, Any]:
        """The conditions that are set."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            name: list(v) if isinstance(v, tuple) else v
            for name, v in values.items()
            if v not in (None, (), False)
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Check:
        """The inverse of `to_json`. Raises TypeError on an unknown condition."""
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in data.items()}
        return cls(**values)


def _has_word(word: str, folded: str, *, whole: bool) -> bool:
    tail = r"(?!\w)" if whole else ""
    return re.search(rf"(?<!\w){re.escape(word.casefold())}{tail}", folded) is not None


@dataclass(frozen=True, slots=True)
class Task:
    """One question to a model: the messages and tools that it sees, the gold answer, and the check."""

    family: str
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...]
    gold: str
    check: Check

    def passes(self, answer: str) -> bool:
        """Whether an answer, tool-call tokens included, is right."""
        return self.check.passes(answer)


@dataclass(slots=True)
class Episode:
    """A conversation with gold answers; `checks[i]` judges the i-th assistant message."""

    messages: list[Message] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    families: list[str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)

    def say(self, role: str, content: str) -> None:
        self.messages.append({"role": role, "content": content})

    def answer(self, family: str, content: str, check: Check) -> None:
        """Adds a gold text answer."""
        self.messages.append({"role": "assistant", "content": content})
        self.families.append(family)
        self.checks.append(check)

    def call(self, family: str, name: str, arguments: dict[str, Any]) -> None:
        """Adds a gold tool call."""
        encoded = json.dumps(arguments, separators=(",", ":"), ensure_ascii=False)
        function = {"name": name, "arguments": encoded}
        self.messages.append(
            {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}
        )
        self.families.append(family)
        self.checks.append(Check(tool_name=name, arguments=arguments))

    def tasks(self) -> Iterator[Task]:
        """One task for every assistant message."""
        turn = 0
        for position, message in enumerate(self.messages):
            if message["role"] != "assistant":
                continue
            yield Task(
                family=self.families[turn],
                messages=tuple(self.messages[:position]),
                tools=tuple(self.tools),
                gold=answer_text(message),
                check=self.checks[turn],
            )
            turn += 1
