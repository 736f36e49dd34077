"""Prompt chips: held-out tasks that the exported model passes, one-click prompts in the Playground.

Chosen among tasks with one user message and values that training never saw, passed greedily, by how sure the
model was: the largest of the smallest gaps between first and second choice over an answer, so that they also
pass where rounding differs a little. A chip list is a showcase and no score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from workbench.versions.demo.chat_format import END
from workbench.versions.demo.evaluate import greedy_answers, prompt_ids
from workbench.versions.demo.generator import held_out_tasks
from workbench.versions.demo.tasks import Task
from workbench.versions.demo.values import Split

CHIP_SEED = 7
WANTED = {
    "cited_answer": 2, "not_in_context": 1, "tool_call": 1, "copy": 1, "spell": 1, "count": 1,
    "sentence": 1, "story": 1, "pick": 1, "identity": 1,
}  # fmt: skip
LABELS = {
    "cited_answer": "Cite",
    "not_in_context": "Not there",
    "tool_call": "Tool",
    "copy": "Copy",
    "spell": "Spell",
    "pick": "Pick",
    "count": "Count",
    "sentence": "Sentence",
    "story": "Story",
    "identity": "About me",
}
_MAX_LABEL = 56


@torch.inference_mode()
def smallest_gap(model: LlamaForCausalLM, tokenizer: Tokenizer, task: Task, answer: str) -> float:
    """The least difference, in logits, between first and second choice over the answer and its end token."""
    prompt = prompt_ids(tokenizer, task)
    full = prompt + tokenizer.encode(answer + END, add_special_tokens=False).ids
    logits = model(input_ids=torch.tensor([full])).logits[0, len(prompt) - 1 : -1].float()
    best = logits.topk(2, dim=-1).values
    return float((best[:, 0] - best[:, 1]).min())


def choose_chips(
    model: LlamaForCausalLM, tokenizer: Tokenizer, stories: Sequence[Task] = (), candidates: int = 10
) -> list[dict[str, Any]]:
    """One JSON value per chip, families in the order of `WANTED`; a family without a passed task is left out."""
    chips: list[dict[str, Any]] = []
    strict = held_out_tasks(CHIP_SEED, candidates)
    known = held_out_tasks(CHIP_SEED, 2 * candidates, Split.NEW_VALUES)
    families = {"story": list(stories), **{family: strict[family] + known[family] for family in strict}}
    for family, wanted in WANTED.items():
        tasks = [task for task in families[family] if _one_question(task)]
        answers = greedy_answers(model, tokenizer, tasks)
        passed = [(task, answer) for task, answer in zip(tasks, answers, strict=True) if task.passes(answer)]
        ranked = sorted(passed, key=lambda pair: -smallest_gap(model, tokenizer, *pair))
        chips += [_chip(task, answer) for task, answer in ranked[:wanted]]
    return chips


def _one_question(task: Task) -> bool:
    return [message["role"] for message in task.messages][-1:] == ["user"] and len(task.messages) <= 2


def _label(task: Task) -> str:
    """The family in a word, and the last line of the request, cut."""
    line = task.messages[-1]["content"].splitlines()[-1].removeprefix("Question: ")
    label = f"{LABELS[task.family]}: {line}"
    return label if len(label) <= _MAX_LABEL else label[: _MAX_LABEL - 1] + "…"


def _expected(task: Task) -> str:
    """The gold answer; for a story, which is another author's, only what it must hold."""
    return task.gold if task.family != "story" else f"A story with the words {', '.join(task.check.words)}."


def _chip(task: Task, answer: str) -> dict[str, Any]:
    return {
        "family": task.family,
        "label": _label(task),
        "messages": list(task.messages),
        "tools": list(task.tools),
        "expected": _expected(task),
        "answer": answer,
        "check": task.check.to_json(),
    }
