"""The job kind "gate": a candidate against the champion of its name, and the promotion that follows if it was asked for.

    {"name": "ticket-extractor", "candidate": "3" | "@alias" | "NAME/3" | "newest", "champion": the same | null, "dataset": path or name,
     "rules": path | null, "promote": false, "limit": n | null, "seed": 0, "scorers": [names] | null, "max_tokens": 256}

Result: that of a comparison, and ``name``, ``champion``, ``candidate`` (versions), ``promoted``.

The versions are fixed by number when the job begins: an alias that moves meanwhile changes nothing in what is compared, and the
promotion is left out when the champion is no longer the one that was compared with.

Boundary: one candidate, one decision. Moving aliases is the registry's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from workbench.evals.errors import CompareSpecError
from workbench.evals.gate import Verdict, default_rules_path
from workbench.evals.job import Outcome, Setup, open_record, prepare, run_setup

if TYPE_CHECKING:
    from workbench.jobs import JobContext
    from workbench.settings import Settings
    from workbench.versions.registry import Registry

CHAMPION = "champion"
NEWEST = "newest"
_FIELDS = {
    "name",
    "candidate",
    "champion",
    "dataset",
    "rules",
    "promote",
    "limit",
    "seed",
    "scorers",
    "max_tokens",
}


def check(spec: dict[str, Any]) -> None:
    """Refuse a spec that cannot run. Raises CompareSpecError, DatasetError, GateRulesError, UnknownMetricError."""
    from workbench import settings

    _setup(spec, settings.load(), "champion", "candidate")


def run(spec: dict[str, Any], context: JobContext) -> dict[str, Any]:
    """Compare candidate and champion, judge, and promote if the verdict allows it and the spec asks for it.

    Raises:
        UnknownVersionError: no such candidate, or no champion to compare it with.
    """
    from workbench.connect import connect
    from workbench.versions.registry import Registry

    settings, name = context.settings, str(spec["name"])
    _setup(spec, settings, "champion", "candidate")
    registry = Registry(settings)
    champion = _version(registry, name, str(spec.get("champion") or f"@{CHAMPION}"))
    candidate = _version(registry, name, spec["candidate"])
    if champion == candidate:
        raise CompareSpecError(
            f"{name}/{candidate} is the champion itself", value=candidate, param="candidate",
            remedy="Name another version, or another champion to compare it with.",
        )  # fmt: skip
    open_record(settings)
    setup = _setup(spec, settings, f"{name}/{champion}", f"{name}/{candidate}")
    with connect(context.home_dir) as backend:
        outcome = run_setup(setup, backend, context)
    if spec.get("limit") is None:  # figures of the whole dataset: what lists of versions show
        for version, means in ((champion, _means(outcome, "a")), (candidate, _means(outcome, "b"))):
            registry.record_metrics(name, version, means)
    promoted, note = False, ""
    if spec.get("promote", False) and outcome.decision.verdict is Verdict.PROMOTE:
        promoted, note = _promote(registry, name, champion, candidate, outcome.run_id)
    return {
        **outcome.to_dict(), "name": name, "champion": champion, "candidate": candidate, "promoted": promoted,
        "note": note,
    }  # fmt: skip


def _means(outcome: Outcome, side: str) -> dict[str, float]:
    return {metric.name: getattr(metric, side) for metric in outcome.comparison.metrics.values()}


def _promote(registry: Registry, name: str, champion: int, candidate: int, run_id: str) -> tuple[bool, str]:
    """Move the alias, unless somebody else moved it while the comparison ran."""
    now = _version(registry, name, f"@{CHAMPION}")
    if now != champion:
        return (
            False,
            f"The champion became version {now} while {candidate} was compared with {champion}: not promoted.",
        )
    registry.promote(name, candidate, alias=CHAMPION, reason=f"gate: promote, run {run_id}")
    return True, f"{name}@{CHAMPION} is now version {candidate}; before it was {champion}."


def _version(registry: Registry, name: str, which: str) -> int:
    """The number of "3", "@alias", "NAME/3", "NAME@alias" or "newest".

    Raises:
        UnknownVersionError: the registry has no such version.
        CompareSpecError: no version of this name.
    """
    from workbench.versions.ref import parse_address

    address = parse_address(which)
    if address is not None:
        which = f"@{address.alias}" if address.alias else str(address.version)
    elif which == NEWEST:
        versions = registry.versions(name)
        which = str(versions[-1].ref.version) if versions else "1"
    if (address is not None and address.name != name) or not (which.startswith("@") or which.isdigit()):
        raise CompareSpecError(
            f"{which!r} is no version of {name}", value=which, limit="3, @alias, NAME/3 or newest", param="candidate"
        )  # fmt: skip
    found = registry.get(name, which)
    assert found.ref.version is not None, found
    return int(found.ref.version)


def _setup(spec: Mapping[str, Any], settings: Settings, a: str, b: str) -> Setup:
    unknown = sorted(set(spec) - _FIELDS)
    if unknown:
        raise CompareSpecError(
            f"unknown field {unknown[0]!r}", value=unknown[0], limit=sorted(_FIELDS), param="spec"
        )
    for field in ("name", "candidate", "dataset"):
        if not isinstance(spec.get(field), str) or not spec[field]:
            raise CompareSpecError(f"{field} must be given as a text", value=spec.get(field), param=field)
    if not isinstance(spec.get("promote", False), bool):
        raise CompareSpecError("promote must be true or false", value=spec["promote"], param="promote")
    inner = {
        "a": a, "b": b, "dataset": spec["dataset"], "gate": spec.get("rules") or str(default_rules_path()), "speed": False,
        **{name: spec.get(name) for name in ("limit", "seed", "scorers", "max_tokens")},
    }  # fmt: skip
    return prepare(inner, settings)
