"""RopeConfig: one rotary embedding, frozen, as config.json states it in either spelling.

Boundary: plain numbers, no torch: `rope_parameters` (transformers 5, also by layer type) and `rope_theta` + `rope_scaling`
(older checkpoints). Frequencies and tables: ``engine.models.rope``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import UnsupportedModelError

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding of layers. Fields beyond `theta` count only for the kinds that name them."""

    kind: str = "default"
    theta: float = 10_000.0
    factor: float = 1.0  # linear, llama3, yarn, longrope
    original_max_position: int = 0  # llama3, yarn, longrope: the context of pre-training
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = (
        None  # yarn, longrope: scale of cos and sin; None: from factor and mscale
    )
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: whole dimensions as the ramp's ends
    short_factor: tuple[float, ...] = ()  # longrope: divisor of each frequency up to the original context
    long_factor: tuple[float, ...] = ()  # longrope: and beyond it


def read_rope(raw: Mapping[str, Any], values: Mapping[str, Any], max_position: int, size: int) -> RopeConfig:
    """Read `raw`, the rotary part of a config.json's `values`. `size`: values of a head that are turned.

    Raises:
        UnsupportedModelError: a kind that the decoder does not have, or one without its factors.
    """
    kind = str(raw.get("rope_type") or raw.get("type") or "default")
    if kind == "su" or (kind == "yarn" and "short_factor" in raw):  # what Phi-3 called it first
        kind = "longrope"
    if kind not in ROPE_TYPES:
        raise UnsupportedModelError(
            f"rope type {kind!r} is not supported",
            value=kind,
            limit=ROPE_TYPES,
            param="rope_parameters",
            remedy=f"Supported: {', '.join(ROPE_TYPES)}.",
        )
    theta = float(
        raw.get("rope_theta") or values.get("rope_theta") or values.get("rotary_emb_base") or 10_000.0
    )
    if kind == "default":
        return RopeConfig(theta=theta)
    original = int(
        values.get("original_max_position_embeddings")
        or raw.get("original_max_position_embeddings")
        or max_position
    )
    factor = raw.get("factor")
    if factor is None and kind in ("yarn", "longrope"):
        factor = max_position / original
    if not isinstance(factor, (int, float)) or factor <= 0:
        raise UnsupportedModelError(
            f"rope type {kind!r} needs a positive factor, got {factor!r}",
            value=factor,
            param="rope_parameters",
        )
    optional = {key: raw.get(key) for key in ("attention_factor", "mscale", "mscale_all_dim")}
    is_long = kind == "longrope"
    return RopeConfig(
        kind=kind,
        theta=theta,
        factor=float(factor),
        original_max_position=original,
        low_freq_factor=float(raw.get("low_freq_factor") or 1.0),
        high_freq_factor=float(raw.get("high_freq_factor") or 4.0),
        beta_fast=float(raw.get("beta_fast") or 32.0),
        beta_slow=float(raw.get("beta_slow") or 1.0),
        truncate=bool(raw.get("truncate", True)),
        short_factor=_factors(raw, "short_factor", size) if is_long else (),
        long_factor=_factors(raw, "long_factor", size) if is_long else (),
        **{key: None if value is None else float(value) for key, value in optional.items()},
    )


def _factors(raw: Mapping[str, Any], key: str, size: int) -> tuple[float, ...]:
    found = raw.get(key)
    if not isinstance(found, list) or len(found) != size // 2:
        count = len(found) if isinstance(found, list) else found
        raise UnsupportedModelError(
            f"rope type 'longrope' needs {size // 2} numbers as {key}, one for each frequency, got {count!r}",
            value=count,
            limit=size // 2,
            param="rope_parameters",
        )
    return tuple(float(factor) for factor in found)
