"""Traffic of one public name, split between models by weight: the same user always meets the same one.

    QUIRE_SPLIT="tickets=ticket-extractor@champion:90,ticket-extractor/2:10"

Each model draws a number from a hash of user and model, and the highest wins; weights stretch the draws. So a model that joins,
leaves or changes its weight moves no users but those that it wins or loses.

Boundary: which of the models; whether they are loaded is the host's to know.
Source: Schindelhauer and Schomaker, "Weighted Distributed Hash Tables" (2005): weighted rendezvous hashing, logarithmic method.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from workbench.errors import SettingsError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,127}")  # nothing that names a version, an alias or a folder
_VARIABLE = "QUIRE_SPLIT"


@dataclass(frozen=True, slots=True)
class Arm:
    """One of a split's models: its id, NAME/version or NAME@alias."""

    model: str
    weight: float


@dataclass(frozen=True, slots=True)
class Split:
    """A public name and what answers to it."""

    name: str
    arms: tuple[Arm, ...]

    def share(self, arm: Arm) -> float:
        """Of the users, between 0 and 1."""
        return arm.weight / sum(each.weight for each in self.arms)


def choose(arms: Sequence[Arm], user: str) -> Arm:
    """The user's arm among those given; at least one."""
    return max(arms, key=lambda arm: _draw(arm, user))


def parse_splits(text: str) -> tuple[Split, ...]:
    """``name=model:weight,model:weight``, several of them separated by semicolons.

    Raises:
        SettingsError: a name that is none, or is there twice; a weight that is no number above 0; a model twice.
    """
    splits: list[Split] = []
    for part in filter(None, (each.strip() for each in text.split(";"))):
        name, equals, arms = (piece.strip() for piece in part.partition("="))
        if not equals or not _NAME.fullmatch(name):
            raise _refused(f"{part!r} does not begin with a name of letters, digits, dots, dashes", text)
        if any(split.name == name for split in splits):
            raise _refused(f"{name!r} is there twice", text)
        splits.append(Split(name, _arms(arms, text)))
    return tuple(splits)


def _arms(given: str, text: str) -> tuple[Arm, ...]:
    arms: list[Arm] = []
    for part in given.split(","):
        model, _, weight = (piece.strip() for piece in part.rpartition(":"))
        try:
            value = float(weight)
        except ValueError:
            value = 0.0
        if not model or not 0 < value < math.inf:
            raise _refused(f"{part.strip()!r} is no model with a weight above 0", text)
        if any(arm.model == model for arm in arms):
            raise _refused(f"{model!r} is there twice", text)
        arms.append(Arm(model, value))
    return tuple(arms)


def _draw(arm: Arm, user: str) -> float:
    digest = hashlib.blake2b(f"{user}\0{arm.model}".encode("utf-8", "replace"), digest_size=8).digest()
    uniform = (int.from_bytes(digest, "big") + 0.5) / 2**64  # neither 0 nor 1
    return -arm.weight / math.log(uniform) if uniform < 1 else math.inf


def _refused(what: str, value: Any) -> SettingsError:
    return SettingsError(
        f"{_VARIABLE}={value} is not accepted: {what}", value=value, limit="name=model:weight,model:weight; …",
        param=_VARIABLE, remedy="Set it like tickets=ticket-extractor@champion:90,ticket-extractor/2:10.",
    )  # fmt: skip
