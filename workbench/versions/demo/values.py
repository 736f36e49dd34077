"""Random values and phrasings of the generated tasks, split into training and held-out halves.

Names, identifiers and numbers are drawn at random so that a model can only answer by copying. A value
belongs to one split for ever: its hash decides. Lists (nouns, phrasings) are split the same way, with at
least one entry on each side. This module knows nothing of tasks or of tokens.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from enum import Enum
from functools import cache

HELD_OUT_SHARE = 6
"""One value in this many is held out for evaluation."""
MADE_UP_SHARE = 0.4
"""How often training replaces a word of a list, which could be learned by heart, by a made-up one."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_SYLLABLES = _words(
    "ba be bi bo bu da de di do du fa fe fi fo ga ge gi go ha he hi ho ja je jo ka ke ki ko ku la le li lo lu "
    "ma me mi mo mu na ne ni no nu pa pe pi po ra re ri ro ru sa se si so su ta te ti to tu va ve vi vo wa we "
    "ya yo za ze zi zo al an ar bel bran chan cor dal dan del dor el en er fen gar han hol in jor kal kim kor "
    "lan len lin lor mar mel min mon mor nal nor ol or pel pen por ran rin ros sal sel shi sho sol tal tam "
    "tan tel tor ul um val van ven vin wel win yan zor chu cha she tha gra dri bri tri pla flo sta ster ton "
    "well field wick ford ley by"
)
_FIRST_NAMES = _words(
    "Anna Ben Carla David Emma Felix Grace Hugo Ines Jack Kate Leo Maya Nora Oscar Paula Quinn Rosa Sam Tara "
    "Uma Victor Wendy Yara Zoe Amina Boris Chloe Diego Elena Farid Gita Hana Ivan Jonas Kofi Lena Malik Nadia "
    "Omar Priya Rahul Sofia Tomas Ursula Vera Walter Xenia Yusuf Zara Alice Brian Clara Daniel Edith Frank "
    "Gloria Henry Iris"
)
NOUNS = _words(
    "router lamp kettle charger backpack headset blender monitor keyboard tent jacket speaker camera drone "
    "printer scooter mug watch chair desk table ladder hammer bucket basket bottle carpet candle clock guitar "
    "piano violin drum trumpet helmet glove scarf boot sandal shirt sweater blanket pillow mirror brush comb "
    "towel soap sponge bowl plate fork spoon knife pan pot oven fridge heater fan bicycle skateboard sled "
    "kayak canoe paddle anchor rope net hook compass map globe telescope microscope lens tripod battery cable "
    "plug switch socket bulb torch notebook pencil pen eraser ruler stapler folder envelope stamp parcel box "
    "crate barrel shelf drawer cabinet sofa bench stool cushion curtain vase flower plant seed shovel rake "
    "hose wheel tire pedal saddle bell whistle ball bat racket puzzle kite doll robot train truck boat plane "
    "rocket apple pear peach plum cherry lemon orange banana grape melon carrot onion potato tomato pepper "
    "bean bread cheese butter cake cookie honey jam tea coffee"
)
COLOURS = _words(
    "red blue green yellow black white purple brown pink grey silver gold teal navy beige maroon turquoise "
    "violet"
)
MONTHS = _words("January February March April May June July August September October November December")
JOBS = _words(
    "teacher baker nurse pilot farmer painter plumber dentist lawyer singer writer tailor miner sailor "
    "gardener carpenter butcher chemist librarian mechanic engineer fisher potter waiter driver judge actor "
    "barber clerk"
)
PETS = _words(
    "cat dog parrot rabbit turtle hamster pony goat goldfish lizard canary mouse snake duck hen ferret"
)


_OPENERS = (
    "Hi! ", "Hello, ", "Hey. ", "Please: ", "One question. ", "Quick one: ", "I need your help. ", "Next: ",
    "Now this. ", "Good morning. ", "Sorry to bother you. ", "Okay. ",
)  # fmt: skip


class Split(Enum):
    """What a task draws from: training values and phrasings, new values in known phrasings, or both held out."""

    TRAIN = "train"
    NEW_VALUES = "new_values"
    HELD_OUT = "held_out"

    @property
    def of_values(self) -> Split:
        """The half that values come from."""
        return Split.TRAIN if self is Split.TRAIN else Split.HELD_OUT

    @property
    def of_wording(self) -> Split:
        """The half that phrasings, names of tools and system prompts come from."""
        return Split.HELD_OUT if self is Split.HELD_OUT else Split.TRAIN


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def split_of(value: str) -> Split:
    """The split that a random value belongs to; a function of the value alone."""
    return Split.HELD_OUT if _digest(value) % HELD_OUT_SHARE == 0 else Split.TRAIN


@cache
def _divide(options: tuple[str, ...], half: Split) -> tuple[str, ...]:
    if len(options) < 2:
        raise ValueError(f"a list to split needs two entries or more, got {len(options)}: add a phrasing")
    ranked = sorted(options, key=_digest)
    num_held_out = max(1, len(ranked) // HELD_OUT_SHARE)
    return tuple(ranked[:num_held_out] if half is Split.HELD_OUT else ranked[num_held_out:])


def part_of(options: Sequence[str], half: Split) -> tuple[str, ...]:
    """The entries of a list that belong to TRAIN or HELD_OUT: about a sixth is held out, at least one on each side."""
    return _divide(tuple(options), half)


class Values:
    """Draws values and phrasings of one split from one random stream."""

    def __init__(self, rng: random.Random, split: Split) -> None:
        self.rng = rng
        self.split = split

    def _draw(self, make: Callable[[], str]) -> str:
        while True:
            value = make()
            if split_of(value) is self.split.of_values and value not in _FIRST_NAMES:
                return value

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def phrase(self, *templates: str) -> str:
        """One phrasing (or name of a tool, or system prompt) of this split."""
        return self.rng.choice(part_of(templates, self.split.of_wording))

    def opened(self, request: str) -> str:
        """The request, a fifth of the time after a few polite words, so that not every request begins as a template."""
        return self.phrase(*_OPENERS) + request if self.chance(0.2) else request

    def one_of(self, options: Sequence[str]) -> str:
        """An entry of this split; in training often a made-up word in its place, so that entries are read, not known."""
        return self._often_made_up(self.rng.choice(part_of(options, self.split.of_values)))

    def some_of(self, options: Sequence[str], count: int) -> list[str]:
        """Distinct entries, as many as asked or as the split has; in training often made-up words in their places."""
        available = part_of(options, self.split.of_values)
        drawn = self.rng.sample(available, min(count, len(available)))
        return list(dict.fromkeys(self._often_made_up(entry) for entry in drawn))

    def _often_made_up(self, entry: str) -> str:
        if self.split is not Split.TRAIN or not self.chance(MADE_UP_SHARE):
            return entry
        word = self._made_up()
        return word if entry[0].isupper() else word.lower()

    def key(self, *names: str) -> str:
        """The name of a tool or of a parameter: in training often a made-up one, so that names are read, not known."""
        name = self.phrase(*names)
        if self.split is not Split.TRAIN or not self.chance(MADE_UP_SHARE):
            return name
        parts = [self._syllables() for _ in range(self.rng.choice((1, 1, 2)))]
        return "_".join(parts if self.chance(0.5) else [*name.split("_")[:1], *parts])

    def name(self) -> str:
        """A made-up name of two or three syllables, or (rarely) a common first name."""
        if self.chance(0.12):
            return self.one_of(_FIRST_NAMES)
        return self._made_up()

    def person(self) -> str:
        """A name, half of the time with a surname."""
        return f"{self.name()} {self._made_up()}" if self.chance(0.5) else self.name()

    def _made_up(self) -> str:
        return self._draw(lambda: self._syllables().capitalize())

    def _syllables(self) -> str:
        return "".join(self.rng.choice(_SYLLABLES) for _ in range(self.rng.choice((2, 2, 2, 3, 3))))

    def identifier(self) -> str:
        """An order number or a code: letters, digits, sometimes a dash or a word."""
        return self._draw(self._identifier)

    def _identifier(self) -> str:
        rng = self.rng
        letters = "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(rng.randint(1, 3)))
        digits = "".join(rng.choice("0123456789") for _ in range(rng.randint(2, 5)))
        style = rng.random()
        if style < 0.45:
            return letters + digits
        if style < 0.75:
            return f"{letters}-{digits}"
        return digits + letters[0] if style < 0.85 else f"{self._syllables().capitalize()}-{digits}"

    def number(self, low: int, high: int) -> str:
        """A whole number in [low, high] of this split; the range must hold enough of them."""
        return self._draw(lambda: str(self.rng.randint(low, high)))

    def noun(self) -> str:
        return self.one_of(NOUNS)

    def date(self) -> str:
        return self._draw(lambda: f"{self.rng.choice(MONTHS)} {self.rng.randint(1, 28)}")

    def clock(self) -> str:
        return self._draw(lambda: f"{self.rng.randint(7, 22)}:{self.rng.choice(('00', '15', '30', '45'))}")
