"""The task generator: deterministic, held out by value and phrasing, and judged by checkers that can refuse."""

from __future__ import annotations

import json
import random
import re

import pytest

from workbench.versions.demo.corpus import story_tasks
from workbench.versions.demo.generator import FAMILIES, held_out_tasks, make_episode
from workbench.versions.demo.tasks import Check, Task
from workbench.versions.demo.values import NOUNS, Split, Values, part_of, split_of


def tasks_of(split: Split, num_episodes: int, seed: int = 3) -> list[Task]:
    return [task for index in range(num_episodes) for task in make_episode(seed, index, split).tasks()]


def test_same_seed_and_index_give_the_same_episode() -> None:
    for index in range(50):
        first, second = (make_episode(11, index, Split.TRAIN) for _ in range(2))
        assert (first.messages, first.tools, first.checks) == (second.messages, second.tools, second.checks)
    assert make_episode(11, 0, Split.TRAIN).messages != make_episode(12, 0, Split.TRAIN).messages


def test_every_family_appears() -> None:
    assert {task.family for task in tasks_of(Split.TRAIN, 300)} == set(FAMILIES)


@pytest.mark.parametrize("split", list(Split))
def test_checkers_accept_every_gold_answer(split: Split) -> None:
    for task in tasks_of(split, 600):
        assert task.passes(task.gold), task
        assert task.passes(f" {task.gold}\n")


def corruptions(task: Task) -> list[str]:
    gold = task.gold
    wrong = ["", "I do not know."]
    if task.family == "cited_answer":
        number = int(re.findall(r"\[(\d+)\]", gold)[-1])
        wrong += [
            re.sub(r"\[\d+\]", f"[{number + 1}]", gold),
            re.sub(r" \[\d+\]", "", gold),
            f"{gold} [{number + 1}]",
            gold.replace(task.check.contains[0], "Nothing"),
            "That is not in the context.",
        ]
    if task.family == "not_in_context":
        wrong += ["The lamp costs 3 euros [1]", f"{gold} [1]"]
    if task.family == "tool_call":
        name = str(task.check.tool_name)
        wrong += [
            gold.replace(f'"name":"{name}"', '"name":"other"'),
            gold.replace("<|tool_call|>", ""),
            gold + " ok",
        ]
        wrong += [gold.replace('"arguments":{', '"arguments":{"extra":"1",')]
    if task.family in ("copy", "spell", "pick"):
        wrong += [gold + "x", gold[:-1], gold.swapcase() if gold.swapcase() != gold else "x"]
    if task.family == "tool_answer":
        wrong += [gold.replace(value, "") for value in task.check.contains]
        wrong += [gold.replace(value, f"1{value}1") for value in task.check.contains]
    if task.family == "count":
        wrong += ["There are zero.", "There are eleven."]
    if task.family == "sentence":
        wrong += [gold.replace(word, "") for word in task.check.words]
    return wrong


def test_checkers_refuse_corrupted_answers() -> None:
    for task in tasks_of(Split.HELD_OUT, 400):
        for answer in corruptions(task):
            assert not task.passes(answer), (task.family, answer, task.check)


def test_values_of_the_two_splits_are_disjoint() -> None:
    drawn = {}
    for split in (Split.TRAIN, Split.HELD_OUT):
        values = Values(random.Random(5), split)
        drawn[split] = {values.name() for _ in range(2000)} | {values.identifier() for _ in range(2000)}
        made_up = [v for v in drawn[split] if any(c.isdigit() for c in v)]
        assert made_up
        assert all(split_of(v) is split for v in made_up)
    assert not drawn[Split.TRAIN] & drawn[Split.HELD_OUT]


def test_lists_are_cut_into_disjoint_parts_that_cover_them() -> None:
    for options in (NOUNS, ["a", "b"], [f"phrase {i}" for i in range(7)]):
        train, held_out = (set(part_of(options, half)) for half in (Split.TRAIN, Split.HELD_OUT))
        assert train
        assert held_out
        assert not train & held_out
        assert train | held_out == set(options)
    with pytest.raises(ValueError, match="two entries"):
        part_of(["one"], Split.TRAIN)


def test_held_out_requests_are_never_phrased_as_in_training() -> None:
    def shapes(split: Split) -> set[str]:
        requests = [t.messages[-1]["content"] for t in tasks_of(split, 500) if t.family == "copy"]
        return {re.match(r"[^:]*:", request).group() for request in requests if ":" in request}  # type: ignore[union-attr]

    train, held_out = shapes(Split.TRAIN), shapes(Split.HELD_OUT)
    assert train
    assert held_out
    assert not train & held_out


def test_held_out_tasks_are_as_many_as_asked_and_repeatable() -> None:
    first, second = held_out_tasks(9, 5), held_out_tasks(9, 5)
    assert first == second
    assert {family: len(tasks) for family, tasks in first.items()} == dict.fromkeys(FAMILIES, 5)


def test_checks_survive_json() -> None:
    for task in tasks_of(Split.HELD_OUT, 60):
        assert Check.from_json(json.loads(json.dumps(task.check.to_json()))) == task.check
    with pytest.raises(TypeError):
        Check.from_json({"unknown": 1})


def test_no_task_turns_a_message_into_a_record() -> None:
    for task in tasks_of(Split.TRAIN, 400):
        if not task.tools:
            assert not task.gold.lstrip().startswith("{")


def test_story_tasks_require_the_words_of_the_request() -> None:
    messages = [
        {"role": "system", "content": "storyteller"},
        {"role": "user", "content": "Tell me a story with the words horn, driving."},
        {"role": "assistant", "content": "Beep was driving. He heard a horn."},
    ]
    (task,) = story_tasks([messages])
    assert task.check.words == ("horn", "driving")
    assert task.passes("The horn blew while we were driving home.")
    assert not task.passes("The horn blew.")
