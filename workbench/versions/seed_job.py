"""Job kind "seed_demo": the bundled `ticket-extractor` versions in the registry, version 1 as champion.

Idempotent by digest and safe to be killed anywhere: what is there is kept, what is missing is added, an alias that somebody has
set is left alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.settings import data_dir
from workbench.versions.errors import FinetuneConfigError

if TYPE_CHECKING:
    from workbench.jobs import JobContext
    from workbench.settings import Settings

NAME = "ticket-extractor"
_ALIASES = (
    ("champion", 0, "the version that the demo starts with"),
    ("candidate", 1, "the demo's first challenger"),
)


def check(spec: dict[str, Any]) -> None:
    """Raises FinetuneConfigError for any field: the bundled versions need none."""
    if spec:
        raise FinetuneConfigError(
            f"seed_demo takes no fields, got {sorted(spec)}", value=sorted(spec), limit=[], param="spec"
        )


def run(spec: dict[str, Any], context: JobContext) -> dict[str, Any]:
    """Registers what is bundled; the versions' numbers by folder name."""
    del spec
    return seed_demo(context.settings, context)


def bundled_versions() -> list[Path]:
    """The shipped adapters, v1 first."""
    return sorted((data_dir() / "models" / NAME).glob("v[0-9]*"), key=lambda folder: int(folder.name[1:]))


def seed_demo(settings: Settings, context: JobContext | None = None) -> dict[str, Any]:
    """Registers the bundled versions in order and sets the aliases that were never set.

    Raises:
        MissingWeightsError: the bundled base is not here.
        RegistryUnreachableError: MLflow does not answer.
    """
    from workbench.versions.adapter import read_adapter, read_lineage
    from workbench.versions.lineage import register_adapter
    from workbench.versions.registry import Registry
    from workbench.versions.weights import find_weights

    numbers: dict[str, int | None] = {}
    folders = bundled_versions()
    for index, folder in enumerate(folders):
        if context is not None:
            context.check_cancelled()
            context.report(index / (len(folders) + 1), f"registering {NAME} {folder.name}")
        base = find_weights(read_adapter(folder).base_digest, settings, what="the bundled base model")
        told = str(read_lineage(folder).get("title", ""))
        ref = register_adapter(settings, NAME, folder, base, description=told, tags={"demo": "true"})
        numbers[folder.name] = ref.version
    registry = Registry(settings)
    for alias, index, reason in _ALIASES:
        if index < len(folders) and not registry.history(NAME, alias):
            number = numbers[folders[index].name]
            assert number is not None, "a registered version has a number"
            registry.promote(NAME, number, alias=alias, reason=reason)
    return {"name": NAME, "versions": numbers}
