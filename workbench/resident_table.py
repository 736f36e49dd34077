"""ResidentTable: which models are resident, under which names, and why each of them stays.

A model stays while it is the default, was asked for (`pinned`), is held by a job, is named by a followed alias, or its engine
serves an adapter that stays; what has no reason left is taken out and handed to the caller, who lets it drain. Pure
bookkeeping: no thread, no engine call.

Boundary: the owner (``workbench.host``) calls every changing method under its lock; readers take none, because tuples and
dicts here are replaced and never changed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from workbench.errors import UnknownModelError
from workbench.load_options import LoadOptions
from workbench.model_card import ModelCard
from workbench.model_source import ModelSource, plain, version_of
from workbench.resident import Followed, HostPhase, HostState, Resident
from workbench.traffic import Split, choose

if TYPE_CHECKING:
    from engine.records import MemoryLedger
    from engine.worker import EngineWorker


@dataclass(slots=True, eq=False)
class Slot:
    """One model of the host: what was asked for and how far it is."""

    source: ModelSource
    id: str
    options: LoadOptions
    state: HostState
    card: ModelCard | None = None
    worker: EngineWorker | None = None
    digest: str = ""
    ledger: MemoryLedger | None = None
    pinned: bool = False  # asked for by a person
    holds: int = 0  # jobs and scripts that use it for a while
    used_at: float = field(default_factory=time.monotonic)  # when a request or a job last asked for it
    base: Slot | None = None  # whose engine serves it: this one is an adapter there
    merged_because: str = ""  # why an adapter was merged instead
    adapter_bytes: int | None = None  # of host memory
    awake_ledger: MemoryLedger | None = None  # what it takes again when it wakes up; None: it is awake

    @property
    def now(self) -> HostState:
        """Its state as requests meet it: an adapter is no better off than its base."""
        return self.base.state if self.base is not None and self.state.ready else self.state


@dataclass(slots=True)
class Follow:
    """A followed alias: what is known of it."""

    ref: str
    slot: Slot | None = None
    registry_version: int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Wish:
    """Why a model is to become resident."""

    pinned: bool = False
    hold: bool = False
    as_default: bool = False
    alias: str | None = None  # its new requests go to this model from now on
    follow: bool = False  # and the alias is followed


@dataclass(slots=True)
class ResidentTable:
    slots: tuple[Slot, ...] = ()
    draining: tuple[Slot, ...] = ()
    default: Slot | None = None
    aliases: dict[str, Slot] = field(default_factory=dict)
    follows: dict[str, Follow] = field(default_factory=dict)

    # ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def in_order(self) -> list[Slot]:
        """The resident models, the default one first."""
        return sorted(self.slots, key=lambda slot: slot is not self.default)

    def everyone(self) -> tuple[Slot, ...]:
        """Those that drain included."""
        return (*self.slots, *self.draining)

    def lookup(self, wanted: str) -> Slot | None:
        """By id, by alias, or by registered version; a ready one before one that is loading."""
        found = [slot for slot in self.slots if slot.id == wanted]
        if not found and wanted in self.aliases:
            return self.aliases[wanted]
        version = version_of(wanted)
        if not found and version is not None:
            found = [slot for slot in self.slots if (slot.source.name, slot.source.version) == version]
        return min(found, key=lambda slot: not slot.now.loaded, default=None)

    def split(self, split: Split, user: str) -> Slot:
        """The user's model of a split: of those that are ready, else of those that are here. Raises UnknownModelError."""
        here = {arm: slot for arm in split.arms if (slot := self.lookup(plain(arm.model))) is not None}
        ready = [arm for arm, slot in here.items() if slot.now.ready]
        if not here:
            names = [arm.model for arm in split.arms]
            raise UnknownModelError(
                f"none of the models behind {split.name!r} is loaded", value=split.name, limit=names, param="model",
                remedy=f"Load one of them: {', '.join(names)}.",
            )  # fmt: skip
        return here[choose(ready or list(here), user)]

    def same(self, source: ModelSource, digest: str, options: LoadOptions) -> Slot | None:
        """The loaded model that already is what is asked for."""
        loaded = (s for s in self.slots if s.now.loaded and s.digest == digest)
        return next((s for s in loaded if _matches(s, source, options)), None)

    def base_of(self, source: ModelSource, options: LoadOptions) -> Slot | None:
        """The loaded model whose engine can take an adapter of that base."""
        for slot in self.slots:
            is_base = slot.base is None and slot.digest == source.base_digest and slot.options == options
            if is_base and slot.state.loaded and slot.worker is not None and slot.worker.config.enable_lora:
                return slot
        return None

    def carries(self, slot: Slot) -> list[Slot]:
        """The adapters that its engine serves."""
        return [other for other in self.slots if other.base is slot]

    def replaced_by(self, source: ModelSource, options: LoadOptions) -> Slot | None:
        """The model that a new load of `source` replaces: its files or the registry have changed, or it failed."""
        return next((s for s in self.slots if _matches(s, source, options)), None)

    def free_id(self, source: ModelSource, digest: str, suffix: str, replaced: Slot | None) -> str:
        """The source's id, told apart from another model of the same name."""
        stays = replaced is not None and self.carries(replaced)  # until its adapters have gone
        taken = {slot.id for slot in self.slots if stays or slot is not replaced}
        own = source.id + suffix
        return own if own not in taken else f"{source.id}-{digest[:8]}{suffix}"

    def ledgers(self) -> dict[str, MemoryLedger]:
        """Bytes of every engine that has memory, by its model's id."""
        return {slot.id: slot.ledger for slot in self.everyone() if slot.worker is not None and slot.ledger}

    def followed(self) -> list[Followed]:
        return [
            Followed(each.ref, each.registry_version, each.slot.source.version if each.slot else None, each.error)
            for each in self.follows.values()
        ]  # fmt: skip

    def describe(self, slot: Slot) -> Resident:
        ledger, config = slot.ledger, slot.worker.config if slot.worker else None
        return Resident(
            id=slot.id,
            ref=slot.source.ref,
            card=slot.card,
            state=slot.now,
            deterministic=bool(config.deterministic if config else slot.options.deterministic),
            is_default=slot is self.default,
            digest=slot.digest,
            name=slot.source.name,
            version=slot.source.version,
            aliases=tuple(ref for ref, target in self.aliases.items() if target is slot),
            followed=any(each.slot is slot for each in self.follows.values()),
            memory_bytes=ledger.engine_bytes if ledger else slot.adapter_bytes,
            parent=slot.base.id if slot.base else None,
            merged_because=slot.merged_because,
            task=slot.worker.pooling.task if slot.worker is not None else "generate",
            options=slot.options,
            config=config,
            adapters=tuple(each.id for each in self.carries(slot)),
        )

    # ── changing ────────────────────────────────────────────────────────────────────────────────────────────────────

    def add(self, slot: Slot) -> None:
        self.slots = (*self.slots, slot)

    def remove(self, slot: Slot) -> None:
        """Forget a model that never came or is gone."""
        self.slots = tuple(s for s in self.slots if s is not slot)
        self.draining = tuple(s for s in self.draining if s is not slot)

    def grant(self, slot: Slot, wish: Wish, former: Slot | None = None) -> list[Slot]:
        """Note why `slot` stays; `former` hands its reasons over to it. Those that have to leave now."""
        slot.used_at = time.monotonic()
        slot.pinned |= wish.pinned
        slot.holds += wish.hold
        if former is not None:
            self._hand_over(former, slot)
        if wish.alias is not None and wish.follow:
            before = self.follows.get(wish.alias)
            if before is not None and before.slot is not None and before.slot is self.default:
                self.default = slot
            self.aliases = {**self.aliases, wish.alias: slot}
            self.follows = {**self.follows, wish.alias: Follow(wish.alias, slot, slot.source.version)}
        elif (
            wish.alias is not None and wish.alias not in self.follows
        ):  # a followed one is the watcher's to move
            known = self.aliases.get(wish.alias)
            if known is None or known.source.version != slot.source.version:
                self.aliases = {**self.aliases, wish.alias: slot}
        if wish.as_default:
            self.default = slot
        return self.settle()

    def follow(self, ref: str) -> None:
        """Follow an alias, though nothing serves it yet."""
        if ref not in self.follows:
            self.follows = {**self.follows, ref: Follow(ref)}

    def note(self, ref: str, registry_version: int | None, error: str | None) -> None:
        """What the registry says of an alias. One that is not followed and has moved leads nowhere any more."""
        follow = self.follows.get(ref)
        if follow is not None:
            follow.registry_version, follow.error = registry_version, error
            return
        slot = self.aliases.get(ref)
        if slot is not None and error is None and slot.source.version != registry_version:
            self.aliases = {known: target for known, target in self.aliases.items() if known != ref}

    def drop_reasons(self, slot: Slot) -> list[Slot]:
        """Nobody wants `slot` any more, no alias follows to it. Those that have to leave now."""
        slot.pinned, slot.holds = False, 0
        self.follows = {ref: each for ref, each in self.follows.items() if each.slot is not slot}
        return self.settle()

    def settle(self) -> list[Slot]:
        """Take out what has no reason to stay; it is `draining` from now on."""
        followed = [each.slot for each in self.follows.values()]

        def stays(slot: Slot) -> bool:
            loading = slot.state.phase in (HostPhase.IDLE, HostPhase.LOADING)
            wanted = slot is self.default or slot.pinned or slot.holds > 0
            return wanted or loading or any(slot is other for other in followed)

        kept = [slot for slot in self.slots if stays(slot)]
        carriers = [slot.base for slot in kept if slot.base is not None]  # an adapter has no adapters
        going = [slot for slot in self.slots if slot not in kept and slot not in carriers]
        if going:
            self.slots = tuple(slot for slot in self.slots if slot not in going)
            self.draining = (*self.draining, *going)
            self.aliases = {ref: slot for ref, slot in self.aliases.items() if slot not in going}
        return going

    def _hand_over(self, former: Slot, slot: Slot) -> None:
        slot.pinned |= former.pinned
        slot.holds += former.holds
        former.pinned, former.holds = False, 0
        if self.default is former:
            self.default = slot
        self.aliases = {ref: slot if target is former else target for ref, target in self.aliases.items()}
        for follow in self.follows.values():
            if follow.slot is former:
                follow.slot = slot


def _matches(slot: Slot, source: ModelSource, options: LoadOptions) -> bool:
    """Whether a slot is of that source, whatever its files were then."""
    if slot.options != options:
        return False
    own = slot.source
    if source.name is not None:
        return (own.name, own.version) == (source.name, source.version)
    return own.name is None and (own.path, own.adapter) == (source.path, source.adapter)
