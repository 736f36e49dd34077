"""An adapter's making as an MLflow run: recipe as parameters, losses as a curve, held-out scores as metrics, then its version.

One run an adapter, found again by the adapter's digest, so that doing it twice, or again after being killed, leaves one run and
one version.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench import tracking
from workbench.versions.adapter import adapter_digest, read_lineage
from workbench.versions.ref import VersionRef
from workbench.versions.registry import Registry

if TYPE_CHECKING:
    from workbench.settings import Settings

_TAG = "quire.adapter_digest"


def register_adapter(
    settings: Settings,
    name: str,
    adapter: Path,
    base: Path,
    *,
    description: str = "",
    tags: Mapping[str, str] | None = None,
) -> VersionRef:
    """Registers base + adapter under a name, with the run that tells how it was made.

    Raises:
        AdapterError, WrongBaseError: as `Registry.register`.
        RegistryUnreachableError: MLflow does not answer; what is missing is added the next time.
    """
    facts = read_lineage(adapter)
    run_id = _run_of(settings, name, adapter, facts)
    return Registry(settings).register(
        name,
        base=base,
        adapter=adapter,
        run_id=run_id,
        description=description,
        tags=tags,
        metrics=_scores(facts),
    )


def _run_of(settings: Settings, name: str, adapter: Path, facts: Mapping[str, Any]) -> str:
    """The finished run of this adapter; made when there is none. A run that a killed process left open is not used."""
    digest = adapter_digest(adapter)
    client = tracking.client(settings)
    experiment_id = tracking.experiment(settings, "finetune")
    with tracking.reachable(client.tracking_uri):
        found = client.search_runs(
            [experiment_id], f"tags.`{_TAG}` = '{digest}' and attributes.status = 'FINISHED'", max_results=1
        )
    if found:
        return str(found[0].info.run_id)
    recipe = dict(facts.get("recipe", {}))
    training = dict(facts.get("training", {}))
    data = dict(recipe.pop("data", {}))
    params = {**recipe, **{f"data_{key}": value for key, value in data.items()}}
    tags = {_TAG: digest, "quire.version_name": name, "quire.trained_on": str(training.get("hardware", ""))}
    with tracking.start_run(settings, "finetune", f"{name} {digest[:8]}", params=params, tags=tags) as run:
        losses = training.pop("losses", [])
        steps = int(training.get("steps", len(losses)) or 0)
        run.log_curve("loss", {round((i + 1) * steps / len(losses)): loss for i, loss in enumerate(losses)})
        numbers = {key: value for key, value in training.items() if isinstance(value, int | float)}
        run.log_metrics({**numbers, **_scores(facts)})
        if facts:
            run.log_dict(dict(facts), "quire.json")
    return run.id


def _scores(facts: Mapping[str, Any]) -> dict[str, float]:
    """Held-out scores of the whole set, under their metric names."""
    overall = facts.get("evaluation", {}).get("summary", {}).get("all", {})
    return {key: float(value) for key, value in overall.items() if key != "n"}
