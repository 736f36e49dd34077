"""Judges an adapter on held-out tickets: exact match, field-level F1 and JSON validity, overall and by slice.

Greedy, batched, with transformers and not with the engine, on the weights as they are merged and rounded for serving. These
are the figures of the adapters' cards; comparisons with intervals are made by `workbench.evals` through the engine.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from workbench.versions.demo.batches import cut_by_length
from workbench.versions.demo.chat_format import encode
from workbench.versions.demo.evaluate import greedy_answers, load_model
from workbench.versions.demo.model import MAX_LENGTH, answer_loss
from workbench.versions.demo.tasks import Check, Task
from workbench.versions.tickets.dataset import EVALUATION_SEED, PER_ISSUE
from workbench.versions.tickets.generator import FIELDS, TicketExample, held_out_examples


@dataclass(frozen=True, slots=True)
class TicketScore:
    """One answer's scores, each in [0, 1]. `field_f1` counts a field as found when name and value agree, nulls aside."""

    id: str
    answer: str
    exact: float
    field_f1: float
    json_valid: float


def score_answer(example: TicketExample, answer: str) -> TicketScore:
    """Scores of one answer; never raises."""
    expected = asdict(example.ticket)
    try:
        found = json.loads(answer)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        return TicketScore(example.id, answer, 0.0, 0.0, 0.0)
    valid = float(tuple(found) == FIELDS)
    wanted = {(name, value) for name, value in expected.items() if value is not None}
    given = {(name, json.dumps(value)) for name, value in found.items() if value is not None}
    hits = sum((name, json.dumps(value)) in given for name, value in wanted)
    f1 = 2 * hits / (len(wanted) + len(given)) if wanted or given else 1.0
    return TicketScore(example.id, answer, float(found == expected), f1, valid)


def evaluation_set(per_issue: int = PER_ISSUE) -> list[TicketExample]:
    """The held-out tickets of the shipped dataset."""
    return list(held_out_examples(EVALUATION_SEED, per_issue))


def evaluate_folder(
    folder: Path, examples: Sequence[TicketExample], device: torch.device, batch_size: int = 64
) -> list[TicketScore]:
    """Greedy answers of a merged model folder, scored, in fp32 on `device`."""
    model, tokenizer = load_model(folder)
    model.to(device)
    tasks = [_task(example) for example in examples]
    answers = greedy_answers(model, tokenizer, tasks, batch_size)
    return [score_answer(example, answer) for example, answer in zip(examples, answers, strict=True)]


@torch.inference_mode()
def answer_nats(folder: Path, examples: Sequence[TicketExample]) -> float:
    """Mean negative log-likelihood of the gold answers, in nats a token: what training lowers, on tickets it never saw."""
    model, tokenizer = load_model(folder)
    batches = cut_by_length([encode(tokenizer, e.conversation()) for e in examples], 4096, MAX_LENGTH)
    total = sum(float(answer_loss(model, batch)) for batch in batches)
    return total / sum(int(batch.is_answer[:, 1:].sum()) for batch in batches)


def summary(examples: Sequence[TicketExample], scores: Sequence[TicketScore]) -> dict[str, Any]:
    """Means overall and by every value of every tag."""
    groups: dict[str, list[TicketScore]] = defaultdict(list)
    for example, score in zip(examples, scores, strict=True):
        groups["all"].append(score)
        for tag, value in example.tags.items():
            groups[f"{tag}={value}"].append(score)
    return {name: _means(group) for name, group in sorted(groups.items())}


def _means(scores: list[TicketScore]) -> dict[str, float]:
    count = len(scores)
    return {
        "n": count,
        "exact_match": round(sum(s.exact for s in scores) / count, 4),
        "field_f1": round(sum(s.field_f1 for s in scores) / count, 4),
        "json_valid": round(sum(s.json_valid for s in scores) / count, 4),
    }


def _task(example: TicketExample) -> Task:
    gold = example.ticket.to_json()
    return Task("ticket", example.messages, (), gold, Check(exact=gold))
