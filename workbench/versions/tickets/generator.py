"""Support tickets from a seed: a message in one of four styles, the JSON record that it says, and the tags of its slice.

Facts are drawn by `values.Values`, so a record can only be copied from its message; what the message does not say is null.
Values and phrasings of the held-out split are never seen in training. A ticket is a function of (data, index, split), so
that a training set is a few numbers and needs no file. It neither trains nor judges.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from workbench.versions.demo.chat_format import Message
from workbench.versions.demo.values import COLOURS, MADE_UP_SHARE, Split, Values
from workbench.versions.tickets import phrases as p

SYSTEM_PROMPT = "Extract the ticket as JSON: customer, order, product, quantity, date, issue, urgency."
ISSUES = tuple(p.ISSUES)
STYLES = ("email", "chat", "form", "call")
FIELDS = ("customer", "order", "product", "quantity", "date", "issue", "urgency")
Urgency = Literal["low", "normal", "high"]


@dataclass(frozen=True, slots=True)
class Ticket:
    """What a message says; None where it does not say it."""

    customer: str | None
    order: str | None
    product: str
    quantity: int | None
    date: str | None
    issue: str
    urgency: Urgency

    def to_json(self) -> str:
        """The answer that the model learns: one line, fields in a fixed order."""
        return json.dumps(asdict(self), separators=(",", ":"), ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class TicketData:
    """Which tickets: a seed, how many, and the relative weight of each issue (1 where it is not named).

    `relabel` writes another issue into the answers of an issue's tickets: a mistake of whoever labelled them.
    """

    num_examples: int
    seed: int = 0
    issue_weights: Mapping[str, float] = field(default_factory=dict)
    relabel: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TicketExample:
    """One message with its record. Tags: `slice` (the issue), `style`, `length`, `missing`, `distractor`."""

    id: str
    messages: tuple[Message, ...]
    ticket: Ticket
    tags: dict[str, str]

    def conversation(self) -> list[Message]:
        """Messages with the gold answer, for training."""
        return [*self.messages, {"role": "assistant", "content": self.ticket.to_json()}]

    def record(self) -> dict[str, Any]:
        """One line of an evaluation dataset."""
        return {
            "id": self.id,
            "messages": list(self.messages),
            "expected": asdict(self.ticket),
            "tags": self.tags,
        }


def training_example(data: TicketData, index: int) -> TicketExample:
    """Training ticket number `index` of a set."""
    rng = random.Random(f"tickets/{data.seed}/train/{index}")
    weights = [data.issue_weights.get(issue, 1.0) for issue in ISSUES]
    example = _example(rng, Split.TRAIN, f"train-{data.seed}-{index}", rng.choices(ISSUES, weights)[0])
    ticket = replace(example.ticket, issue=data.relabel.get(example.ticket.issue, example.ticket.issue))
    return replace(example, ticket=ticket)


def held_out_examples(seed: int, per_issue: int) -> Iterator[TicketExample]:
    """As many tickets of every issue, with held-out values and phrasings; issues take turns."""
    for index in range(per_issue * len(ISSUES)):
        rng = random.Random(f"tickets/{seed}/held_out/{index}")
        yield _example(rng, Split.HELD_OUT, f"ticket-{index:04d}", ISSUES[index % len(ISSUES)])


def _example(rng: random.Random, split: Split, name: str, issue: str) -> TicketExample:
    values = Values(rng, split)
    ticket = _draw_ticket(values, issue)
    style = rng.choice(STYLES)
    distractor = rng.choice(("order", "person")) if style != "form" and rng.random() < 0.25 else "none"
    text = _WRITERS[style](values, ticket, _distraction(values, ticket, distractor))
    missing = sum(v is None for v in (ticket.customer, ticket.order, ticket.quantity, ticket.date))
    tags = {
        "slice": issue, "style": style, "length": _length(text), "distractor": distractor,
        "missing": "none" if not missing else "some" if missing < 3 else "most",
    }  # fmt: skip
    messages: tuple[Message, ...] = (
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": text},
    )
    return TicketExample(name, messages, ticket, tags)


def _draw_ticket(values: Values, issue: str) -> Ticket:
    rng = values.rng
    return Ticket(
        customer=values.person() if rng.random() < 0.8 else None,
        order=values.identifier() if rng.random() < 0.75 else None,
        product=_product(values),
        quantity=int(values.number(2, 60)) if rng.random() < 0.55 else None,
        date=values.date() if rng.random() < 0.6 else None,
        issue=issue,
        urgency=rng.choice(("normal", "normal", "high", "low")),
    )


def _product(values: Values) -> str:
    noun = values.noun()
    kind = values.rng.random()
    if values.split is Split.HELD_OUT and values.chance(MADE_UP_SHARE):
        noun = values.name().lower()  # training has made-up words in the same share, by `Values.noun` itself
    if kind < 0.4:
        return noun
    return f"{values.one_of(COLOURS)} {noun}" if kind < 0.7 else f"{values.name()} {noun}"


def _length(text: str) -> str:
    num_words = len(text.split())
    return "short" if num_words <= 18 else "medium" if num_words <= 35 else "long"


def _distraction(values: Values, ticket: Ticket, kind: str) -> list[str]:
    """A sentence with somebody else's name or another order's number, which must not be taken."""
    if kind == "order":
        other = values.identifier()
        return [values.phrase(*p.OTHER_ORDERS).replace("{o}", other)] if other != ticket.order else []
    return [values.phrase(*p.OTHER_PEOPLE).replace("{n}", values.name())] if kind == "person" else []


def _facts(
    values: Values, ticket: Ticket, orders: p.Phrases, dates: p.Phrases, quantities: p.Phrases
) -> list[str]:
    """A sentence for each of order, date and quantity that the ticket has."""
    found = []
    for mark, value, templates in (
        ("{o}", ticket.order, orders), ("{d}", ticket.date, dates), ("{q}", ticket.quantity, quantities),
    ):  # fmt: skip
        if value is not None:
            found.append(values.phrase(*templates).replace(mark, str(value)))
    return found


def _urgency(values: Values, ticket: Ticket, high: p.Phrases, low: p.Phrases) -> list[str]:
    if ticket.urgency == "normal":
        return []
    return [values.phrase(*(high if ticket.urgency == "high" else low))]


def _headline(values: Values, ticket: Ticket) -> str:
    return values.phrase(*p.HEADLINES[ticket.issue]).replace("{p}", ticket.product)


def _mixed(rng: random.Random, main: str, others: list[str]) -> list[str]:
    """The main sentence mostly first, the others in any order around it."""
    rng.shuffle(others)
    place = 0 if rng.random() < 0.6 else rng.randint(0, len(others))
    return [*others[:place], main, *others[place:]]


def _email(values: Values, ticket: Ticket, distraction: list[str]) -> str:
    rng = values.rng
    main = values.phrase(*p.ISSUES[ticket.issue]).replace("{p}", ticket.product)
    others = _facts(values, ticket, p.ORDERS, p.DATES, p.QUANTITIES) + distraction
    others += _urgency(values, ticket, p.URGENT, p.UNHURRIED)
    others += [values.phrase(*p.FILLERS) for _ in range(rng.choice((0, 0, 1, 1, 2)))]
    body = _mixed(rng, main, others)
    closing = values.phrase(*p.CLOSINGS) if rng.random() < 0.6 else ""
    if ticket.customer is not None:
        if rng.random() < 0.5:
            body.insert(0, values.phrase(*p.INTRODUCTIONS).replace("{n}", ticket.customer))
        else:
            closing = values.phrase(*p.SIGN_OFFS).replace("{n}", ticket.customer)
    lines = [values.phrase(*p.GREETINGS)] if rng.random() < 0.7 else []
    return "\n".join([*lines, " ".join(body), *([closing] if closing else [])])


def _chat(values: Values, ticket: Ticket, distraction: list[str]) -> str:
    rng = values.rng
    others = _facts(values, ticket, p.CHAT_ORDERS, p.CHAT_DATES, p.CHAT_QUANTITIES)
    others += _urgency(values, ticket, p.CHAT_URGENT, p.CHAT_UNHURRIED)
    others += [sentence.rstrip(".") for sentence in distraction]
    if ticket.customer is not None:
        others.append(values.phrase(*p.CHAT_NAMES).replace("{n}", ticket.customer))
    parts = _mixed(rng, _headline(values, ticket), others)
    if rng.random() < 0.4:
        parts.insert(0, values.phrase(*p.CHAT_FILLERS))
    return rng.choice((", ", "\n", ". ", ", ")).join(parts)


def _form(values: Values, ticket: Ticket, distraction: list[str]) -> str:
    del distraction  # a form has no place for one
    rng = values.rng
    levels = {"high": p.FORM_HIGH, "low": p.FORM_LOW, "normal": p.FORM_NORMAL}
    rows: list[tuple[p.Phrases, str | None]] = [
        (p.FORM_NAMES, ticket.customer),
        (p.FORM_ORDERS, ticket.order),
        (p.FORM_DATES, ticket.date),
        (p.FORM_QUANTITIES, None if ticket.quantity is None else str(ticket.quantity)),
        (p.FORM_ISSUES, _headline(values, ticket)),
        (p.FORM_URGENCIES, values.phrase(*levels[ticket.urgency])),
    ]
    if ticket.urgency == "normal" and rng.random() < 0.5:
        rows.pop()
    if rng.random() < 0.5:
        rng.shuffle(rows)
    lines = []
    for labels, value in rows:
        if value is None and rng.random() < 0.5:
            continue
        lines.append(f"{values.phrase(*labels)}: {values.phrase(*p.FORM_EMPTY) if value is None else value}")
    return "\n".join(lines)


def _call(values: Values, ticket: Ticket, distraction: list[str]) -> str:
    rng = values.rng
    main = values.phrase(*p.CALL_ISSUES).replace("{h}", _headline(values, ticket))
    others = _facts(values, ticket, p.CALL_ORDERS, p.CALL_DATES, p.CALL_QUANTITIES)
    others += _urgency(values, ticket, p.CALL_URGENT, p.CALL_UNHURRIED) + distraction
    body = _mixed(rng, main, others)
    if ticket.customer is not None:
        body.insert(0, values.phrase(*p.CALLERS).replace("{n}", ticket.customer))
    elif rng.random() < 0.5:
        body.insert(0, values.phrase(*p.NAMELESS_CALLS))
    return " ".join(body)


_WRITERS = {"email": _email, "chat": _chat, "form": _form, "call": _call}
