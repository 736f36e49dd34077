"""How /v1/models shows a name whose traffic is split or routed: as a model, with its shares and which of them are there.

Boundary: one entry of the list. Who gets which model is ``workbench.traffic``'s and ``workbench.fleet.router``'s.
"""

from __future__ import annotations

from typing import Any

from workbench.errors import NotReadyError, UnknownModelError
from workbench.fleet.routes import Route
from workbench.host import EngineHost, Resident
from workbench.traffic import Split


def split_entry(host: EngineHost, split: Split, created: int) -> dict[str, Any]:
    """The entry; what its models have in common is told of all."""
    found = {arm: _found(host, arm.model) for arm in split.arms}
    there = [each for each in found.values() if each is not None]
    contexts = [each.card.context for each in there if each.card is not None and each.card.context]
    return {
        "id": split.name,
        "object": "model",
        "created": created,
        "owned_by": "quire",
        "root": split.name,
        "max_model_len": min(contexts, default=None),
        "digest": None,
        "name": None,
        "version": None,
        "aliases": [],
        "parent": None,
        "deterministic": bool(there) and all(each.deterministic for each in there),
        "task": there[0].task if there else "generate",
        "stored_as": None,
        "quantization": None,
        "split": [
            {
                "model": arm.model,
                "share": round(split.share(arm), 6),
                "serving": each.id if each is not None and each.state.ready else None,
            }
            for arm, each in found.items()
        ],
    }


def route_entry(route: Route, created: int) -> dict[str, Any]:
    """The entry of a routed name; what its endpoints' models are is not known here."""
    unknown = dict.fromkeys(
        ("max_model_len", "digest", "name", "version", "parent", "stored_as", "quantization"), None
    )
    return {
        "id": route.name,
        "object": "model",
        "created": created,
        "owned_by": "quire",
        "root": route.name,
        "aliases": [],
        "deterministic": False,
        "task": "generate",
        **unknown,
        "route": [str(target) for target in route.targets],
    }


def _found(host: EngineHost, model: str) -> Resident | None:
    try:
        return host.find(model)
    except (NotReadyError, UnknownModelError):
        return None
