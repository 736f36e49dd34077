"""Aliases that the engine follows: what the registry says, what is served, and the difference in words."""

from __future__ import annotations

from workbench.ui import markup, resources


def as_html() -> str:
    """One line an alias; empty when none is followed."""
    return "".join(_line(one) for one in resources.host().followed())


def _line(one: object) -> str:
    ref = str(getattr(one, "ref", ""))
    registry, serving = getattr(one, "registry_version", None), getattr(one, "serving_version", None)
    error = getattr(one, "error", None)
    if error:
        kind, told = "bad", f"registry {_v(registry)}, serving {_v(serving)}: {error}"
    elif registry is None and serving is None:
        kind, told = "idle", "not in the registry yet"
    elif registry != serving:
        kind, told = "warn", f"registry {_v(registry)}, serving {_v(serving)}: the new one is being loaded"
    else:
        kind, told = "ok", f"serving {_v(serving)}, as the registry says"
    return f'<p class="q-follow"><span class="q-mono">{markup.text(ref)}</span> {markup.chip(kind, told)}</p>'


def _v(version: object) -> str:
    return "none" if version is None else f"v{version}"
