"""Copying, spelling, counting, picking, sentences with required words, and what the model says about itself.

Families: `copy`, `spell`, `count`, `pick`, `sentence`, `identity`. Values are random, so only the
messages hold the answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from workbench.versions.demo.tasks import Check, Episode
from workbench.versions.demo.values import COLOURS, NOUNS, Split, Values

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are Quire's demo assistant.",
    "Answer briefly.",
    "Be exact.",
    "Help the user.",
    "Follow the instruction exactly.",
)
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
_NUMBERS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
)


def _thing(values: Values) -> str:
    """Something to copy: a name, a code, a number, words, or a short list."""
    draw = values.rng.choice(
        (
            values.person,
            values.person,
            values.identifier,
            values.identifier,
            lambda: values.number(100, 999999),
            lambda: f"{values.person()}, order {values.identifier()}",
            lambda: f"the {values.one_of(COLOURS)} {values.noun()} from {values.name()}",
            lambda: " ".join(values.some_of(NOUNS, values.rng.randint(2, 6))),
            lambda: ", ".join(values.name() for _ in range(values.rng.randint(2, 4))),
            lambda: f"{values.name()} will bring {values.number(2, 99)} {values.noun()}s on {values.date()}",
        )
    )
    return draw()


def _copy(values: Values, episode: Episode, given: str | None = None) -> None:
    thing = given or _thing(values)
    template = values.phrase(
        "Repeat: {v}",
        "Repeat this: {v}",
        "Say exactly: {v}",
        "Copy this text: {v}",
        "Write this again: {v}",
        "Say this back to me: {v}",
        "Please repeat: {v}",
        "Echo: {v}",
        "Type exactly this: {v}",
        "Answer only with: {v}",
        "Repeat after me: {v}",
        'Repeat the text in quotes: "{v}"',
    )
    episode.say("user", values.opened(template.replace("{v}", thing)))
    episode.answer("copy", thing, Check(exact=thing))


def _spell(values: Values, episode: Episode) -> None:
    word = values.rng.choice((values.name, values.name, values.noun, values.identifier))()
    template = values.phrase(
        "Spell {v}.",
        "Spell the word {v}.",
        "How do you spell {v}?",
        "Spell {v} letter by letter.",
        "Please spell {v}.",
        "Give me the letters of {v}.",
        "Which letters are in {v}, in order?",
    )
    spelled = " ".join(word)
    episode.say("user", values.opened(template.replace("{v}", word)))
    episode.answer("spell", spelled, Check(exact=spelled))


def _count(values: Values, episode: Episode) -> None:
    items = values.some_of(NOUNS, values.rng.randint(2, 10))
    if values.chance(0.3):
        items = [values.name() for _ in items]
    template = values.phrase(
        "How many items are in this list: {v}?",
        "Count the items: {v}.",
        "How many things are here: {v}?",
        "Count: {v}",
        "Here is a list: {v}. How many entries does it have?",
        "How many are these: {v}?",
        "Number of items in: {v}?",
    )
    number = _NUMBERS[len(items)]
    episode.say("user", values.opened(template.replace("{v}", ", ".join(items))))
    wrong = tuple(n for n in _NUMBERS[1:] if n != number)
    episode.answer("count", f"There are {number}.", Check(contains=(number,), excludes=wrong))


def _pick(values: Values, episode: Episode) -> None:
    items = values.some_of(NOUNS, values.rng.randint(3, 6))
    if values.chance(0.4):
        items = [values.name() for _ in items]
    index = values.rng.randrange(len(items) + 1)
    word = "last" if index == len(items) else _ORDINALS[index]
    wanted = items[-1] if index == len(items) else items[index]
    template = values.phrase(
        "What is the {o} item in this list: {v}?",
        "Name the {o} of these: {v}.",
        "Which is the {o} entry of: {v}?",
        "Here is a list: {v}. What is the {o} one?",
        "From {v}, give me the {o}.",
        "Take the {o} item: {v}.",
    )
    episode.say("user", values.opened(template.replace("{v}", ", ".join(items)).replace("{o}", word)))
    episode.answer("pick", wanted, Check(exact=wanted))


_SENTENCES = (
    "{n} put the {0} next to the {1} and the {2}.",
    "In the garden {n} found a {0}, a {1} and a {2}.",
    "{n} wanted a {0}, but there was only a {1} and a {2}.",
    "The {0} fell on the {1}, and {n} laughed at the {2}.",
    "{n} took the {0} home and left the {1} with the {2}.",
    "One day {n} saw a {0} on a {1} near the {2}.",
    "With a {0} and a {1}, {n} mended the {2}.",
    "{n} gave a friend the {0}, kept the {1} and sold the {2}.",
)


def _sentence(values: Values, episode: Episode) -> None:
    words = values.some_of(NOUNS, 3)
    name = values.name()
    template = values.phrase(
        "Write a sentence with the words {w}.",
        "Write one sentence that uses {w}.",
        "Make a sentence with {w}.",
        "Use these words in a sentence: {w}.",
        "I need a sentence with the words {w}.",
        "Put these words into one sentence: {w}.",
    )
    episode.say("user", values.opened(template.replace("{w}", ", ".join([*words, name]))))
    gold = values.rng.choice(_SENTENCES).replace("{n}", name)
    for index, word in enumerate(words):
        gold = gold.replace(f"{{{index}}}", word)
    episode.answer("sentence", gold, Check(words=(*words, name)))


_IDENTITY: tuple[tuple[tuple[str, ...], str, tuple[str, ...]], ...] = (
    (
        (
            "Who are you?",
            "What are you?",
            "Are you a person?",
            "Introduce yourself.",
            "What model is this?",
            "Which model are you?",
            "Tell me about yourself.",
            "What is your name?",
            "Who am I talking to?",
        ),
        "I am Quire's demo model, a small language model with 7 million parameters.",
        ("Quire", "demo model"),
    ),
    (
        (
            "What can you do?",
            "What are you good at?",
            "How can you help me?",
            "What were you trained for?",
            "What should I ask you?",
            "Which tasks do you know?",
            "What are your skills?",
        ),
        "I answer questions about a given context with citations, call tools, copy, count and tell short stories.",
        ("context", "tools"),
    ),
    (
        (
            "What can you not do?",
            "Do you know facts about the world?",
            "Can I trust you?",
            "Are you always right?",
            "Are you as good as a large model?",
            "What are your limits?",
            "Do you make mistakes?",
        ),
        "I am very small and know little about the world, so please check what I say.",
        ("small", "check"),
    ),
    (
        (
            "Thanks!",
            "Thank you.",
            "Thanks a lot.",
            "Great, thank you!",
            "Thank you very much.",
            "Nice, thanks.",
        ),
        "You are welcome!",
        ("welcome",),
    ),
    (
        ("Hello!", "Hi there.", "Hello.", "Good morning.", "Hey!", "Good evening.", "Hi."),
        "Hello! How can I help you?",
        ("Hello",),
    ),
)


def _identity(values: Values, episode: Episode) -> None:
    questions, answer, parts = values.rng.choice(_IDENTITY)
    episode.say("user", values.opened(values.phrase(*questions)))
    episode.answer("identity", answer, Check(contains=parts))


_TURNS: tuple[tuple[Callable[[Values, Episode], None], float], ...] = (
    (_copy, 6.0),
    (_spell, 2.5),
    (_count, 2.5),
    (_pick, 2.5),
    (_sentence, 3.0),
    (_identity, 1.0),
)


def copying_episode(rng: random.Random, split: Split) -> Episode:
    """One to four short tasks in one conversation."""
    values = Values(rng, split)
    episode = Episode()
    if values.chance(0.4):
        episode.say("system", values.phrase(*SYSTEM_PROMPTS))
    turns, weights = zip(*_TURNS, strict=True)
    for turn in rng.choices(turns, weights=weights, k=rng.choice((1, 2, 3, 4))):
        turn(values, episode)
    return episode


def repeating_episode(rng: random.Random, split: Split) -> Episode:
    """Two to four things to repeat, some of them long lists: nothing but copying."""
    values = Values(rng, split)
    episode = Episode()
    for _ in range(rng.choice((2, 3, 4))):
        _copy(values, episode, _listing(values) if values.chance(0.4) else None)
    return episode


def _listing(values: Values) -> str:
    draws = (values.name, values.name, values.noun, values.identifier, lambda: values.number(10, 99999))
    return ", ".join(values.rng.choice(draws)() for _ in range(values.rng.randint(3, 8)))
