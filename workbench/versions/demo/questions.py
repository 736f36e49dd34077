"""Questions over a given context: numbered passages of made-up facts, and an answer that cites its passage.

Family `cited_answer`: the fact is there; the answer states it and ends with the passage's number. Family
`not_in_context`: the entity or its attribute is missing, and the answer says so. The facts are random, so
nothing can be answered from memory. Only this phrasing of a context is taught: `[1] …` lines after the
word Context.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from workbench.versions.demo.facts import SUBJECTS, Attribute, Subject
from workbench.versions.demo.tasks import Check, Episode
from workbench.versions.demo.values import Split, Values

NOT_FOUND = "That is not in the context."


SYSTEM_PROMPTS = (
    "Answer from the context and cite the passage.",
    "Use only the context. Cite the passage number.",
    "Answer with the passage number in brackets, or say that it is not in the context.",
    "You answer questions about the context.",
    "Answer only from the passages below and name the passage.",
    "Answer from the given passages. If they do not say it, say so.",
    "Read the passages, answer briefly, cite.",
)


def fill(template: str, entity: str, value: str = "") -> str:
    """A template with its entity (`{E}` with a capital letter) and value; the first letter is made a capital."""
    text = template.replace("{E}", entity).replace("{e}", entity).replace("{v}", value)
    return text[0].upper() + text[1:]


@dataclass(frozen=True, slots=True)
class _Fact:
    entity: str
    attribute: Attribute
    value: str
    passage: int


def _facts(values: Values, num_passages: int) -> tuple[list[_Fact], list[str], list[Subject]]:
    facts: list[_Fact] = []
    passages: list[str] = []
    subjects: list[Subject] = []
    kinds = values.rng.sample(SUBJECTS, values.rng.choice((1, 1, 2, 2, 4)))
    for number in range(1, num_passages + 1):
        subject = values.rng.choice(kinds)
        entity = subject.draw(values)
        chosen = values.rng.sample(subject.attributes, values.rng.choice((1, 2, 2, 3)))
        written = [_Fact(entity, attribute, attribute.draw(values), number) for attribute in chosen]
        passages.append(
            " ".join(fill(values.phrase(*f.attribute.statements), f.entity, f.value) for f in written)
        )
        facts += written
        subjects.append(subject)
    return facts, passages, subjects


def _ask_found(values: Values, episode: Episode, facts: list[_Fact], lead: str) -> None:
    fact = values.rng.choice(facts)
    episode.say("user", lead + fill(values.phrase(*fact.attribute.questions), fact.entity))
    others = {
        f.value
        for f in facts
        if f.attribute is fact.attribute and f.value.casefold() != fact.value.casefold()
    }
    stated = fill(fact.attribute.answer, fact.entity, fact.value)
    excludes = tuple(sorted(v for v in others if v.casefold() not in stated.casefold()))[:8]
    check = Check(contains=(fact.value,), excludes=excludes, citations=(fact.passage,))
    episode.answer("cited_answer", f"{stated} [{fact.passage}]", check)


def _ask_missing(
    values: Values, episode: Episode, facts: list[_Fact], subjects: list[Subject], lead: str
) -> None:
    subject = values.rng.choice(subjects)
    attribute = values.rng.choice(subject.attributes)
    entity = subject.draw(values)
    if values.chance(0.6):  # a known entity without this attribute: harder than an unknown entity
        known = [f for f in facts if f.attribute in subject.attributes]
        stated = {(f.entity, id(f.attribute)) for f in facts}
        open_pairs = [
            (f.entity, a) for f in known for a in subject.attributes if (f.entity, id(a)) not in stated
        ]
        if open_pairs:
            entity, attribute = values.rng.choice(open_pairs)
    episode.say("user", lead + fill(values.phrase(*attribute.questions), entity))
    episode.answer("not_in_context", NOT_FOUND, Check(not_found=True))


def question_episode(rng: random.Random, split: Split, num_passages: int | None = None) -> Episode:
    """Passages and two to six questions about them; two in seven of the questions have no answer there."""
    values = Values(rng, split)
    size = num_passages or rng.choice((2, 3, 3, 4, 4, 5, 6, 8))
    facts, passages, subjects = _facts(values, size)
    context = "Context:\n" + "\n".join(f"[{n}] {text}" for n, text in enumerate(passages, 1))
    episode = Episode()
    lead = ""
    style = rng.random()
    if style < 0.45:
        episode.say("system", values.phrase(*SYSTEM_PROMPTS) + "\n" + context)
    else:
        if style < 0.75:
            episode.say("system", values.phrase(*SYSTEM_PROMPTS))
        lead = context + "\n\nQuestion: "
    for _ in range(rng.choice((2, 3, 4, 5, 6))):
        if rng.random() < 2 / 7:
            _ask_missing(values, episode, facts, subjects, lead)
        else:
            _ask_found(values, episode, facts, lead)
        lead = ""
    return episode
