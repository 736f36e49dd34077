"""Parts of a config.json, read one by one for ``engine.models.config``: counts, windows, and what is refused.

Boundary: plain values in and out; a family says which keys count. Rotary embedding and experts have readers of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.errors import ModelLoadError, UnsupportedModelError
from engine.models.registry import Family


def positive(values: Mapping[str, Any], key: str) -> int:
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelLoadError(
            f"config.json: {key} must be a positive integer, got {value!r}",
            value=value,
            limit=1,
            param=key,
            remedy="Use the config.json that belongs to the checkpoint.",
        )
    return value


def language_model_of(values: Mapping[str, Any], family: Family) -> Mapping[str, Any]:
    """The config with that of its language model in the place of what it says of itself; null says nothing."""
    nested = values.get(family.text_config) if family.text_config else None
    return {
        **values,
        **{key: value for key, value in (nested or {}).items() if value is not None or key not in values},
    }


def activation_of(values: Mapping[str, Any], family: Family) -> Any:
    return values.get(family.activation_key, family.activations[0])


def softcap_of(values: Mapping[str, Any], family: Family, key: str) -> float | None:
    cap = values.get(key) if family.reads_softcaps else None
    return float(cap) if cap else None


def split_rope(values: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
    """What a config says of its rotary embedding, and of another one in layers with a window."""
    raw = values.get("rope_parameters") or values.get("rope_scaling") or {}
    local = {} if (base := values.get("rope_local_base_freq")) is None else {"rope_theta": base}
    if "full_attention" in raw or "sliding_attention" in raw:
        return raw.get("full_attention") or {}, {**local, **(raw.get("sliding_attention") or {})}
    return raw, local or None


def as_ids(value: Any) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset(int(v) for v in (value if isinstance(value, (list, tuple)) else [value]))


def refuse_unknown_parts(values: Mapping[str, Any], family: Family) -> None:
    """Raise for each part of a config that would silently change the model if it were ignored."""
    activation = activation_of(values, family)
    if activation not in family.activations:
        raise UnsupportedModelError(
            f"{family.activation_key} {activation!r} is not supported",
            value=activation,
            limit=list(family.activations),
            param=family.activation_key,
        )
    for key, causal in (("use_bidirectional_attention", False), ("is_causal", True)):
        if (value := values.get(key)) is not None and bool(value) != causal:
            raise UnsupportedModelError(
                f"{key} is {value}: attention to later tokens too, of a decoder that was trained to embed, is not computed here",
                value=value,
                limit=causal,
                param=key,
            )
    for key in ("attention_bias", "mlp_bias"):
        read = family.reads_attention_bias if key == "attention_bias" else family.reads_mlp_bias
        if values.get(key) and not read and not (key == "attention_bias" and family.qkv_bias):
            raise UnsupportedModelError(
                f"{family.architecture} with {key} is not supported",
                value=values[key],
                limit=False,
                param=key,
            )


def read_rotary_size(
    rope: Mapping[str, Any], values: Mapping[str, Any], family: Family, head_size: int
) -> int:
    """Values of a head that are turned; they come in pairs."""
    share = (
        rope.get("partial_rotary_factor")
        or values.get("partial_rotary_factor")
        or values.get("rotary_pct")
        or 1.0
    )
    if share != 1.0 and not family.reads_partial_rotary:
        raise UnsupportedModelError(
            f"partial_rotary_factor {share} is not supported",
            value=share,
            limit=1.0,
            param="partial_rotary_factor",
        )
    size = int(head_size * share)
    if size % 2 or not 0 < size <= head_size:
        raise UnsupportedModelError(
            f"the rotary embedding turns pairs of values, not {size} of head_dim {head_size}",
            value=size,
            limit=head_size,
            param="head_dim",
        )
    return size


def read_windows(values: Mapping[str, Any], family: Family, layers: int) -> tuple[int | None, ...]:
    window = values.get("sliding_window")
    if family.window == "none":
        return (None,) * layers
    if family.window in ("by_layer", "used", "alternating") and not values.get("use_sliding_window", False):
        window = None
    if family.window in ("all", "used"):
        return (int(window) if window else None,) * layers
    kinds = values.get("layer_types")
    if kinds is None and family.window == "pattern":
        every = positive(values, "sliding_window_pattern")
        kinds = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(layers)]
    elif kinds is None:
        first = int(values["max_window_layers"])
        is_local = [
            i < first and i % 2 == 0 if family.window == "alternating" else i >= first for i in range(layers)
        ]
        kinds = ["sliding_attention" if window and local else "full_attention" for local in is_local]
    if len(kinds) != layers:
        raise ModelLoadError(
            f"config.json: layer_types has {len(kinds)} entries for {layers} layers",
            value=len(kinds),
            limit=layers,
            param="layer_types",
            remedy="Use the config.json that belongs to the checkpoint.",
        )
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention") or (
            kind == "sliding_attention" and not window
        ):
            raise UnsupportedModelError(
                f"layer type {kind!r} with sliding_window {window!r} is not supported",
                value=kind,
                limit=["full_attention", "sliding_attention"],
                param="layer_types",
            )
    return tuple(int(window) if window and kind == "sliding_attention" else None for kind in kinds)
