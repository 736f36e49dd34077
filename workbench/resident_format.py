"""What a resident's weights and cache are stored as, and how its engine was set up: as plain values, and in one line for people.

Pages, API and CLI tell it from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.resident import Resident

_NAMES = ("dtype", "quantization", "max_model_len", "enable_lora", "tensor_parallel_size")


def format_of(resident: Resident) -> dict[str, Any]:
    """Plain values; None while its engine is not built."""
    config = resident.config
    speculation = config.speculative_config if config else None
    return {
        "stored_as": resident.card.stored_as if resident.card else "",
        **{name: getattr(config, name, None) for name in _NAMES},
        "kv_cache_dtype": config.kv_cache_dtype if config and resident.task == "generate" else None,
        "speculative_config": asdict(speculation) if speculation else None,
    }


def told(found: Mapping[str, Any]) -> str:
    """``float32 → int8, KV cache bfloat16, 2,048 tokens, ngram speculation, 2 ranks``; "" of a model without an engine."""
    if not found["dtype"]:
        return ""
    stored, held = found["stored_as"] or "", found["quantization"] or found["dtype"]
    weights = held if stored in ("", held) else f"{stored} → {held}"
    if stored and not found["quantization"] and not _is_dtype(stored):
        weights = f"{stored}, computes in {held}"
    speculation = found["speculative_config"]
    parts = [
        weights,
        f"KV cache {found['kv_cache_dtype']}" if found["kv_cache_dtype"] else "",
        f"{found['max_model_len']:,} tokens" if found["max_model_len"] else "",
        f"{speculation['method']} speculation" if speculation else "",
        f"{ranks} ranks" if (ranks := found["tensor_parallel_size"] or 1) > 1 else "",
    ]
    return ", ".join(part for part in parts if part)


def _is_dtype(stored: str) -> bool:
    from engine.config import DTYPES

    return stored in DTYPES
