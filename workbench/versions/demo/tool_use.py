"""Tool calls: tools are listed in the system turn; the model calls the right one and uses its result.

Family `tool_call`: name and arguments are exactly right. Family `tool_answer`: the answer states what the
result says. Family `no_tool`: no listed tool fits. Tool and parameter names vary, so they must be read
from the list.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

from workbench.versions.demo.abilities import ABILITIES, Ability
from workbench.versions.demo.tasks import Check, Episode
from workbench.versions.demo.values import Split, Values

NO_TOOL = "I have no tool for that."

SYSTEM_PROMPTS = (
    "You can call tools.",
    "Use the tools.",
    "You are an assistant with tools.",
    "Call a tool when it helps.",
    "Help the user with these tools.",
    "Assistant with access to tools.",
)


@dataclass(frozen=True, slots=True)
class _Tool:
    ability: Ability
    name: str
    parameters: tuple[str, ...]
    schema: dict[str, Any]


def _make_tool(values: Values, ability: Ability) -> _Tool:
    name = values.key(*ability.names)
    parameters: list[str] = []
    for slot in ability.arguments:
        parameters.append(next(n for n in _shuffled(values, slot.names) if n not in parameters))
    described = name not in ability.names or values.chance(0.7)
    schema = {
        "type": "function",
        "function": {
            "name": name,
            "description": values.phrase(*ability.descriptions) if described else "",
            "parameters": {
                "type": "object",
                "properties": {parameter: {"type": "string"} for parameter in parameters},
                "required": parameters,
            },
        },
    }
    return _Tool(ability, name, tuple(parameters), schema)


def _shuffled(values: Values, names: tuple[str, ...]) -> list[str]:
    first = values.key(*names)
    return [first, *(name for name in names if name != first)]


def _fill(template: str, arguments: list[str], results: list[str]) -> str:
    for index, value in enumerate(arguments):
        template = template.replace(f"{{{index}}}", value)
    for index, value in enumerate(results):
        template = template.replace(f"{{r{index}}}", value)
    return template


def _use_tool(values: Values, episode: Episode, tool: _Tool) -> None:
    ability = tool.ability
    arguments = [slot.draw(values) for slot in ability.arguments]
    episode.say("user", values.opened(_fill(values.phrase(*ability.requests), arguments, [])))
    episode.call("tool_call", tool.name, dict(zip(tool.parameters, arguments, strict=True)))
    results = [slot.draw(values) for slot in ability.results]
    keys = [values.key(*slot.names) for slot in ability.results]
    episode.say(
        "tool", json.dumps(dict(zip(keys, results, strict=True)), separators=(",", ":"), ensure_ascii=False)
    )
    answer = _fill(ability.answer, arguments, results)
    episode.answer("tool_answer", answer[0].upper() + answer[1:], Check(contains=tuple(results)))


def tool_episode(rng: random.Random, split: Split, max_tools: int = 4) -> Episode:
    """One to four tools, and one to three requests; one request in eight fits no tool."""
    values = Values(rng, split)
    abilities = rng.sample(ABILITIES, min(max_tools, rng.choice((1, 2, 2, 3, 3, 4))) + 1)
    spare = abilities.pop()
    tools = [_make_tool(values, ability) for ability in abilities]
    episode = Episode(tools=[tool.schema for tool in tools])
    if values.chance(0.7):
        episode.say("system", values.phrase(*SYSTEM_PROMPTS))
    for _ in range(rng.choice((1, 2, 2, 3))):
        if values.chance(1 / 8):
            request = _fill(
                values.phrase(*spare.requests), [slot.draw(values) for slot in spare.arguments], []
            )
            episode.say("user", values.opened(request))
            episode.answer("no_tool", NO_TOOL, Check(exact=NO_TOOL))
        else:
            _use_tool(values, episode, rng.choice(tools))
    return episode
