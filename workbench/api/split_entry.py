"""How /v1/models shows a name whose traffic is split: as a model, with its shares and which of them are there.

Boundary: one entry of the list. Who gets which model is ``workbench.traffic``'s.
"""

from __future__ import annotations

from typing import Any

from workbench.errors import NotReadyError, UnknownModelError
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


def _found(host: EngineHost, model: str) -> Resident | None:
    try:
        return host.find(model)
    except (NotReadyError, UnknownModelError):
        return None
