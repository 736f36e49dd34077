"""Which architectures the native decoder runs, and what each family adds to the plain Llama block.

Boundary: facts that a checkpoint's config.json does not state because its family's code does (biases, query-key norm,
which keys decide the sliding window, defaults of absent keys). Everything a config states is read in
``engine.models.config``. Causal LMs of other architectures are refused here by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from engine.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True)
class Family:
    """What one architecture's own code fixes."""

    architecture: str
    qkv_bias: bool = False  # always, whatever the config says
    reads_attention_bias: bool = False  # `attention_bias` adds a bias to q, k, v and o
    reads_mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head of q and k, before the rotary embedding
    window: str = "none"  # "none"; "all": every layer; "by_layer": use_sliding_window and layer_types or max_window_layers
    defaults: Mapping[str, Any] = field(
        default_factory=lambda: MappingProxyType({})
    )  # of keys a config may leave out


_FAMILIES = (
    Family("LlamaForCausalLM", reads_attention_bias=True, reads_mlp_bias=True),
    Family(
        "MistralForCausalLM",
        window="all",
        defaults=MappingProxyType({"sliding_window": 4096, "num_key_value_heads": 8}),
    ),
    Family(
        "Qwen2ForCausalLM",
        qkv_bias=True,
        window="by_layer",
        defaults=MappingProxyType({"sliding_window": 4096, "max_window_layers": 28}),
    ),
    Family(
        "Qwen3ForCausalLM",
        reads_attention_bias=True,
        qk_norm=True,
        window="by_layer",
        defaults=MappingProxyType({"sliding_window": 4096, "max_window_layers": 28, "head_dim": 128}),
    ),
)
FAMILIES: Mapping[str, Family] = MappingProxyType({f.architecture: f for f in _FAMILIES})


def family_of(architectures: list[str] | tuple[str, ...] | None) -> Family:
    """The family of a config's `architectures` list.

    Raises:
        UnsupportedModelError: naming the architecture and those that exist.
    """
    for name in architectures or ():
        if name in FAMILIES:
            return FAMILIES[name]
    known = ", ".join(FAMILIES)
    shown = ", ".join(architectures or ()) or "none"
    raise UnsupportedModelError(
        f"no model path for architecture {shown}",
        value=list(architectures or ()),
        limit=list(FAMILIES),
        remedy=f"The native decoder runs {known}.",
        param="model",
    )
