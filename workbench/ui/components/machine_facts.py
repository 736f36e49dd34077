"""What this server runs on and is set to: the doctor's findings, and every setting that is not at its default. No secrets."""

from __future__ import annotations

from urllib.parse import urlsplit, urlunsplit

import streamlit as st

from workbench.doctor import Finding, examine
from workbench.settings import Settings
from workbench.ui import markup, resources
from workbench.ui.components import needs
from workbench.ui.resources import PageServices

_CHIPS = {"ok": "ok", "warning": "warn", "error": "bad"}
_TTL_S = 60.0


def show(services: PageServices) -> None:
    """The doctor looks beside the page: he imports torch and asks ports."""
    home = services.settings.home_dir
    st.html(markup.section("This machine", "what quire doctor finds"))
    found = needs.value(
        resources.readings().get(("doctor",), lambda: examine(home_dir=home), ttl_s=_TTL_S), "The machine"
    )
    if found is not None:
        st.html(findings_html(found))


def show_settings(services: PageServices) -> None:
    given = changed(services.settings)
    st.html(markup.section("Settings", "what is not at its default; set where the server is started"))
    if not given:
        st.html('<p class="q-muted">Everything is at its default.</p>')
        return
    st.html(
        markup.html_table(
            ["setting", "value"], ([markup.text(n), markup.text(v)] for n, v in given.items()), left=2
        )
    )


def changed(settings: Settings) -> dict[str, str]:
    """Settings by the names of their variables; credentials in addresses are left out."""
    same = {name for name, field in Settings.model_fields.items() if getattr(settings, name) == field.default}
    return {
        name: _without_credentials(value)
        for name, value in settings.to_env().items()
        if name.removeprefix("QUIRE_").lower() not in same
    }


def findings_html(found: list[Finding]) -> str:
    rows = (
        [markup.text(each.name), markup.chip(_CHIPS[each.level], each.level), markup.text(each.message),
         markup.text(each.remedy or "")]
        for each in found
    )  # fmt: skip
    return markup.html_table(["what", "", "found", "what to do"], rows, left=4, css="wrap")


def _without_credentials(value: str) -> str:
    """`value`, without the user and password of an address such as a database's."""
    if "://" not in value:
        return value
    parts = urlsplit(value)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=host, query=""))
