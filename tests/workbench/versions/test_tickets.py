"""Generated tickets: nothing of the held-out split is ever trained on, answers are in the message, the dataset is the generator's."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from workbench.settings import data_dir
from workbench.versions.demo.values import Split, part_of
from workbench.versions.tickets import phrases
from workbench.versions.tickets.dataset import PER_ISSUE, dataset_text
from workbench.versions.tickets.evaluate import evaluation_set, score_answer, summary
from workbench.versions.tickets.generator import (
    FIELDS,
    ISSUES,
    STYLES,
    TicketData,
    held_out_examples,
    training_example,
)


def text_of(example: object) -> str:
    return str(example.messages[-1]["content"])  # type: ignore[attr-defined]


def test_a_ticket_is_a_function_of_its_number() -> None:
    data = TicketData(100, 5)
    assert training_example(data, 17) == training_example(data, 17) != training_example(data, 18)
    assert training_example(TicketData(100, 6), 17) != training_example(data, 17)


def test_every_stated_value_is_in_the_message() -> None:
    examples = [training_example(TicketData(300), i) for i in range(300)] + list(held_out_examples(1, 30))
    for example in examples:
        ticket = example.ticket
        for value in (ticket.customer, ticket.order, ticket.product, ticket.date):
            assert value is None or value in text_of(example)
        assert ticket.quantity is None or str(ticket.quantity) in text_of(example).replace(
            ticket.order or " ", " "
        )
        assert tuple(json.loads(ticket.to_json())) == FIELDS


def test_held_out_values_and_phrasings_are_never_trained_on() -> None:
    trained = [training_example(TicketData(4000), i) for i in range(4000)]
    held_out = evaluation_set()
    for name in ("customer", "order", "date", "quantity"):
        seen = {getattr(e.ticket, name) for e in trained} - {None}
        asked = {getattr(e.ticket, name) for e in held_out} - {None}
        assert len(asked) > 5
        assert not seen & asked, name
    texts = "\n".join(text_of(example) for example in trained)
    lists = (phrases.INTRODUCTIONS, phrases.DATES, phrases.ORDERS, *phrases.ISSUES.values())
    checked = 0
    for template in (t for options in lists for t in part_of(options, Split.HELD_OUT)):
        fixed = max(re.split(r"\{\w\}", template), key=len)
        if len(fixed) > 22:  # shorter pieces may stand in another phrasing as well
            checked += 1
            assert fixed not in texts, template
    assert checked >= 5


def test_the_shipped_dataset_is_the_generators() -> None:
    path = data_dir() / "datasets" / "ticket-extractor.jsonl"
    assert path.read_text("utf-8") == dataset_text()
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert len(rows) == len({row["id"] for row in rows}) == PER_ISSUE * len(ISSUES) >= 400
    assert len({row["messages"][-1]["content"] for row in rows}) == len(rows)
    assert Counter(row["tags"]["slice"] for row in rows) == dict.fromkeys(ISSUES, PER_ISSUE)
    assert min(Counter(row["tags"]["style"] for row in rows)[style] for style in STYLES) > 80
    assert all(row["tags"].keys() == {"slice", "style", "length", "missing", "distractor"} for row in rows)


def test_weights_and_relabelling() -> None:
    without = [training_example(TicketData(400, 0, {"cancel": 0.0}), i).ticket.issue for i in range(400)]
    assert set(without) == set(ISSUES) - {"cancel"}
    mislabelled = [training_example(TicketData(400, 0, {}, {"cancel": "refund"}), i) for i in range(400)]
    plain = [training_example(TicketData(400, 0), i) for i in range(400)]
    for given, true in zip(mislabelled, plain, strict=True):
        assert text_of(given) == text_of(true)
        assert given.ticket.issue == ("refund" if true.ticket.issue == "cancel" else true.ticket.issue)


def test_scores() -> None:
    example = next(held_out_examples(0, 1))
    gold = json.loads(example.ticket.to_json())
    assert score_answer(example, example.ticket.to_json()).exact == 1.0
    stated = {name: value for name, value in gold.items() if value is not None}
    wrong = score_answer(example, json.dumps({**gold, "product": "something else"}))
    assert (wrong.exact, wrong.json_valid) == (0.0, 1.0)
    assert wrong.field_f1 == pytest.approx(2 * (len(stated) - 1) / (2 * len(stated)))
    for bad in ("", "no json", "[1]", "{"):
        assert score_answer(example, bad).json_valid == score_answer(example, bad).field_f1 == 0.0
    assert score_answer(example, "{}").json_valid == 0.0
    means = summary([example, example], [score_answer(example, example.ticket.to_json()), wrong])
    assert means["all"]["exact_match"] == 0.5
    assert means[f"slice={example.tags['slice']}"]["n"] == 2


def test_cards_tell_the_figures_of_their_own_records() -> None:
    folders = sorted((data_dir() / "models" / "ticket-extractor").glob("v*"))
    assert [folder.name for folder in folders] == ["v1", "v2", "v3", "v4"]
    total = 0
    for folder in folders:
        facts = json.loads((folder / "quire.json").read_text("utf-8"))
        card = (folder / "README.md").read_text("utf-8")
        assert f"| {facts['evaluation']['summary']['all']['exact_match']:.3f} |" in card
        assert facts["base"]["digest"] in card
        assert "license: apache-2.0" in card
        total += sum(Path(file).stat().st_size for file in folder.iterdir())
    assert total < 20_000_000
