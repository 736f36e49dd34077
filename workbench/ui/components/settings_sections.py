"""The sections of the Settings page, in their order: each is a function of the app's services."""

from __future__ import annotations

from collections.abc import Callable

from workbench.ui.components import audit_table, key_table, machine_facts, retention_facts
from workbench.ui.resources import PageServices

SECTIONS: tuple[Callable[[PageServices], None], ...] = (
    key_table.show,
    audit_table.show,
    retention_facts.show,
    machine_facts.show,
    machine_facts.show_settings,
)
