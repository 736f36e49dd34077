"""Dialogue data from disk: four domains of chat conversations in `DOMAIN.PART.jsonl.xz` files.

Only reads; the data itself is not part of the project. Licences and sources: `data/README.md`. Sets that
may only be used for evaluation are not among the domains.
"""

from __future__ import annotations

import json
import lzma
import random
import re
from pathlib import Path
from typing import Literal

from workbench.versions.demo.chat_format import Message
from workbench.versions.demo.tasks import Check, Task

DOMAINS = {"story": 0.35, "persona": 0.27, "topical": 0.2, "tm4": 0.18}
"""Each domain's share of the dialogues in the training mix."""

_REQUIRED = "with the words "
_PLAIN_WORD = re.compile(r"(?<![\w'-])[a-z]{4,}(?![\w'-])")

Part = Literal["train", "dev"]
Conversation = list[Message]


def load_domain(folder: Path, domain: str, part: Part) -> list[Conversation]:
    """All conversations of one file. Raises FileNotFoundError with the remedy where the file is missing."""
    path = folder / f"{domain}.{part}.jsonl.xz"
    if not path.is_file():
        raise FileNotFoundError(
            f"dialogue file {path} is missing: pass the folder of DOMAIN.PART.jsonl.xz files"
        )
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["messages"] for line in lines]


def load_dialogues(folder: Path, part: Part) -> dict[str, list[Conversation]]:
    """Every domain's conversations of one part."""
    return {domain: load_domain(folder, domain, part) for domain in DOMAINS}


def ask_for_other_words(rng: random.Random, messages: Conversation) -> Conversation:
    """A story's conversation whose request names three other words of the same story, half of the time.

    So the words have to be read from the request, and a story seen again is not the same task again.
    """
    request, mark, _ = messages[1]["content"].partition(_REQUIRED)
    if not mark or rng.random() < 0.5:
        return messages
    found = sorted(set(_PLAIN_WORD.findall(messages[2]["content"])))
    if len(found) < 3:
        return messages
    words = ", ".join(rng.sample(found, 3))
    return [messages[0], {**messages[1], "content": f"{request}{mark}{words}."}, *messages[2:]]


def story_tasks(conversations: list[Conversation]) -> list[Task]:
    """Family `story`: a story must hold every word that its request names (the words after 'with the words')."""
    tasks = []
    for messages in conversations:
        request, _, listed = messages[1]["content"].partition(_REQUIRED)
        words = tuple(word.strip(" .") for word in listed.split(",") if word.strip(" ."))
        if request and words:
            gold = messages[2]["content"]
            tasks.append(Task("story", tuple(messages[:2]), (), gold, Check(words=words)))
    return tasks
