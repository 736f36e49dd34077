"""Judges a model on held-out tasks: `python -m workbench.versions.demo.evaluate MODEL_DIR --data DIALOGUES`.

Greedy answers against each task's own check, with Wilson 95 % intervals, and the perplexity of answers
per dialogue domain. It uses transformers, not Quire's engine, so that it can judge a model without
trusting the engine.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from workbench.versions.demo.batches import cut_by_length
from workbench.versions.demo.chat_format import ASSISTANT, END, PAD, SPECIAL_TOKENS, encode, render
from workbench.versions.demo.corpus import DOMAINS, Conversation, load_domain, story_tasks
from workbench.versions.demo.generator import held_out_tasks
from workbench.versions.demo.model import MAX_LENGTH, answer_loss
from workbench.versions.demo.tasks import Task
from workbench.versions.demo.values import Split

EVALUATION_SEED = 2026
_STORY_TOKENS = 420
_EXTRA_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Score:
    """Passed tasks of one family with the Wilson 95 % interval of the rate."""

    passed: int
    total: int
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Perplexity of answers per domain, and each family's score: all held out, and with known phrasings."""

    perplexity: dict[str, float]
    scores: dict[str, Score]
    scores_new_values: dict[str, Score]


def wilson(passed: int, total: int, z: float = 1.959964) -> Score:
    """Wilson's score interval. Source: E. B. Wilson, JASA 22 (1927)."""
    if total == 0:
        return Score(0, 0, 0.0, 1.0)
    rate = passed / total
    centre = rate + z * z / (2 * total)
    spread = z * math.sqrt(rate * (1 - rate) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    low, high = (centre - spread) / scale, (centre + spread) / scale
    return Score(passed, total, max(0.0, low), min(1.0, high))


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, tokenizer: Tokenizer, conversations: Iterable[Conversation]) -> float:
    """exp(mean negative log-likelihood) over answer tokens, end token included, contexts cut at the model's length."""
    total, count = 0.0, 0
    chats = [encode(tokenizer, messages) for messages in conversations]
    for batch in cut_by_length(chats, 4096, MAX_LENGTH):
        total += float(answer_loss(model, batch))
        count += int(batch.is_answer[:, 1:].sum())
    return math.exp(total / count)


def prompt_ids(tokenizer: Tokenizer, task: Task) -> list[int]:
    """Token ids [T] of a task's messages, ending where the answer begins."""
    text = "".join(segment.text for segment in render(task.messages, task.tools)) + ASSISTANT
    return tokenizer.encode(text, add_special_tokens=False).ids


@torch.inference_mode()
def greedy_answers(
    model: LlamaForCausalLM, tokenizer: Tokenizer, tasks: Sequence[Task], batch_size: int = 64
) -> list[str]:
    """One greedy answer per task, tool-call tokens included, without the end token."""
    prompts = [prompt_ids(tokenizer, task) for task in tasks]
    order = sorted(range(len(tasks)), key=lambda i: len(prompts[i]))
    answers = [""] * len(tasks)
    for rows in _chunks(order, batch_size):
        budget = max(len(tokenizer.encode(tasks[i].gold).ids) for i in rows) + _EXTRA_TOKENS
        if any(tasks[i].family == "story" for i in rows):
            budget = max(budget, _STORY_TOKENS)
        for row, ids in zip(rows, _generate(model, [prompts[i] for i in rows], budget), strict=True):
            answers[row] = tokenizer.decode(ids, skip_special_tokens=False)
    return answers


def _chunks(items: list[int], size: int) -> Iterator[list[int]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _generate(model: LlamaForCausalLM, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    length = max(len(prompt) for prompt in prompts)
    pad, end = SPECIAL_TOKENS.index(PAD), SPECIAL_TOKENS.index(END)
    ids = torch.full((len(prompts), length), pad)
    mask = torch.zeros(len(prompts), length, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    out = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=pad,
    )
    rows = out[:, length:].tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]


def score_tasks(
    model: LlamaForCausalLM, tokenizer: Tokenizer, families: dict[str, list[Task]], num_workers: int = 1
) -> dict[str, Score]:
    """The score of each family; families run side by side, each on one thread."""

    def score(tasks: list[Task]) -> Score:
        answers = greedy_answers(model, tokenizer, tasks)
        return wilson(
            sum(task.passes(answer) for task, answer in zip(tasks, answers, strict=True)), len(tasks)
        )

    with ThreadPoolExecutor(num_workers, initializer=torch.set_num_threads, initargs=(1,)) as workers:
        return dict(zip(families, workers.map(score, families.values()), strict=True))


def evaluate(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    data: Path,
    per_family: int,
    *,
    per_family_known: int | None = None,
    dialogues_per_domain: int | None = None,
    num_stories: int | None = None,
    num_workers: int = 1,
) -> Evaluation:
    """The whole judgement: perplexity on the dev parts, scores on held-out tasks, and on dev stories."""
    dev = {domain: load_domain(data, domain, "dev") for domain in DOMAINS}
    tasks = held_out_tasks(EVALUATION_SEED, per_family)
    known = held_out_tasks(EVALUATION_SEED, per_family_known or per_family, Split.NEW_VALUES)
    stories = story_tasks(dev["story"])[:num_stories]
    families = {"story": stories, **tasks} if stories else tasks
    scores = score_tasks(model, tokenizer, families, num_workers)
    with ThreadPoolExecutor(num_workers, initializer=torch.set_num_threads, initargs=(1,)) as workers:
        parts = workers.map(lambda d: perplexity(model, tokenizer, dev[d][:dialogues_per_domain]), dev)
        perplexities = dict(zip(dev, parts, strict=True))
    return Evaluation(
        perplexity=perplexities,
        scores={family: scores[family] for family in [*tasks, *families.keys() - tasks.keys()]},
        scores_new_values=score_tasks(model, tokenizer, known, num_workers),
    )


def load_model(folder: Path) -> tuple[LlamaForCausalLM, Tokenizer]:
    """An exported model in fp32 and its tokenizer."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), Tokenizer.from_file(str(folder / "tokenizer.json"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--per-family", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = load_model(arguments.model)
    result = evaluate(model, tokenizer, arguments.data, arguments.per_family, num_workers=arguments.threads)
    print(json.dumps(asdict(result), indent=2))


if __name__ == "__main__":
    main()
