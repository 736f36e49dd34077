"""The table of residents under random work: what has a reason stays, what has none leaves once, names lead to what is there."""

from __future__ import annotations

from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from workbench.load_options import PLAIN, LoadOptions
from workbench.model_source import ModelSource
from workbench.resident import HostPhase, HostState
from workbench.resident_table import ResidentTable, Slot, Wish

READY = HostState(HostPhase.READY, "Ready", 1.0)
VERSIONS = st.integers(1, 4)
ADAPTERS = st.integers(1, 3)
ALIASES = st.sampled_from(["m@champion", "m@candidate"])


class TableMachine(RuleBasedStateMachine):
    """Drives the table as the host does, and keeps a plain model of the reasons."""

    def __init__(self) -> None:
        super().__init__()
        self.table = ResidentTable()
        self.left: list[Slot] = []
        self.reloads = 0

    @initialize()
    def default(self) -> None:
        slot = Slot(ModelSource("base", "base", "/base"), "base", PLAIN, READY)
        self.table.add(slot)
        self.table.default = slot

    def make(self, version: int, deterministic: bool, wish: Wish, *, reload: bool = False) -> None:
        """As EngineHost._load."""
        self.reloads += reload
        source = ModelSource(f"m/{version}", f"m/{version}", f"/m{version}", "m", version)
        digest = f"{version}-{self.reloads}" if reload else f"{version}-"
        options = LoadOptions(deterministic=deterministic or None)
        known = self.table.same(source, digest, options)
        if known is not None:
            self.leave(self.table.grant(known, wish))
            return
        former = self.table.replaced_by(source, options)
        slot = Slot(
            source, self.table.free_id(source, digest, options.suffix, former), options, READY, digest=digest
        )
        self.table.add(slot)
        self.leave(self.table.grant(slot, wish, former))

    def leave(self, going: list[Slot]) -> None:
        for slot in going:
            assert not any(slot is other for other in self.left), "a model leaves once"
            self.left.append(slot)

    @rule(version=VERSIONS, deterministic=st.booleans(), reload=st.booleans())
    def pin(self, version: int, deterministic: bool, reload: bool) -> None:
        self.make(version, deterministic, Wish(pinned=True), reload=reload)

    @rule(version=VERSIONS, deterministic=st.booleans(), alias=st.none() | ALIASES)
    def hold(self, version: int, deterministic: bool, alias: str | None) -> None:
        self.make(version, deterministic, Wish(hold=True, alias=alias))

    @rule(version=VERSIONS)
    def make_default(self, version: int) -> None:
        self.make(version, False, Wish(as_default=True))

    @rule(version=VERSIONS, alias=ALIASES)
    def serve(self, version: int, alias: str) -> None:
        self.make(version, False, Wish(alias=alias, follow=True))
        found = self.table.lookup(alias)
        assert found is not None
        assert found.source.version == version

    @rule(version=VERSIONS)
    def release(self, version: int) -> None:
        slot = self.table.lookup(f"m/{version}")
        if slot is not None:
            slot.holds = max(0, slot.holds - 1)
            self.leave(self.table.settle())

    @rule(number=ADAPTERS, on=VERSIONS)
    def add_adapter(self, number: int, on: int) -> None:
        """As EngineHost.load_adapter, over a model that is there."""
        base = self.table.lookup(f"m/{on}")
        if base is not None and self.table.lookup(f"a{number}") is None:
            source = ModelSource(f"/a{number}", f"a{number}", base.source.path, adapter=f"/a{number}")
            slot = Slot(source, source.id, base.options, READY, digest=f"{number}", base=base)
            self.table.add(slot)
            self.leave(self.table.grant(slot, Wish(pinned=True)))

    @rule(number=ADAPTERS)
    def unload_adapter(self, number: int) -> None:
        slot = self.table.lookup(f"a{number}")
        if slot is not None:
            self.leave(self.table.drop_reasons(slot))

    @rule(version=VERSIONS)
    def unload(self, version: int) -> None:
        slot = self.table.lookup(f"m/{version}")
        if slot is not None and slot is not self.table.default and not self.table.carries(slot):
            self.leave(self.table.drop_reasons(slot))
            assert not any(slot is other for other in self.table.slots)

    @rule(alias=ALIASES, version=st.none() | VERSIONS)
    def registry_says(self, alias: str, version: int | None) -> None:
        self.table.note(alias, version, None)

    @rule()
    def one_has_drained(self) -> None:
        if self.table.draining:
            self.table.remove(self.table.draining[0])

    @invariant()
    def everyone_has_a_reason(self) -> None:
        table = self.table
        followed = [each.slot for each in table.follows.values()]
        for slot in table.slots:
            wanted = slot is table.default or slot.pinned or slot.holds or any(slot is f for f in followed)
            assert wanted or table.carries(slot)
        for slot in table.draining:
            assert not slot.pinned
            assert not slot.holds

    @invariant()
    def names_lead_to_residents(self) -> None:
        table = self.table
        here = list(map(id, table.slots))
        assert table.default is None or id(table.default) in here
        assert all(id(slot) in here for slot in table.aliases.values())
        assert all(id(slot.base) in here for slot in table.slots if slot.base), "an adapter's engine is there"
        assert all(each.slot is None or id(each.slot) in here for each in table.follows.values())
        assert all(table.aliases[ref] is each.slot for ref, each in table.follows.items())
        assert len({slot.id for slot in table.slots}) == len(table.slots), "ids are unique"
        assert not set(here) & set(map(id, table.draining))
        assert table.in_order()[:1] == [table.default]


TestTable = TableMachine.TestCase
TestTable.settings = hypothesis_settings(max_examples=60, stateful_step_count=30, deadline=None)
