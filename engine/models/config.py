"""ModelConfig: the shape of a causal LM, frozen, read once from a Hugging Face config.json.

Boundary: plain numbers, no torch. What the decoder cannot do raises here, before any weight is read. It does not look at
weights, tokenizer or generation settings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ModelLoadError, ModelNotFoundError, UnsupportedModelError
from engine.models.moe_config import MoeConfig, read_moe
from engine.models.registry import Family, family_of
from engine.models.rope_config import RopeConfig, read_rope

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape of one decoder-only model. Window w at layer l: a token sees the w last positions, itself included."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_position: int
    rms_norm_eps: float
    rope: RopeConfig
    rotary_size: int  # values of a head that are turned, from its first on
    attention_scale: float
    tie_embeddings: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]  # one per layer
    local_rope: RopeConfig | None = None  # of layers with a window, where that is another one
    activation: str = "silu"  # of the MLP's gate: "silu" or "gelu_tanh"
    norm_offset: bool = False  # norms multiply by 1 + weight
    out_norms: bool = False  # norms of what attention and MLP add to the residual
    embedding_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    moe: MoeConfig | None = None
    dtype: str | None = None  # of the checkpoint
    eos_token_ids: frozenset[int] = frozenset()

    @property
    def unfused(self) -> tuple[str, ...]:
        """What of this model no fused step computes: not the compiled one of a CPU, not the Triton kernels between products.

        Empty: they run it. Otherwise the decoder takes torch's operations, beside whichever attention backend.
        """
        parts = {
            "partial rotary embedding": self.rotary_size != self.head_size,
            "rotary embedding by layer": self.local_rope is not None,
            "norms by 1 + weight": self.norm_offset,
            "norms of outputs": self.out_norms,
            f"activation {self.activation}": self.activation != "silu",
            "scaled embedding": self.embedding_scale is not None,
            "experts": self.moe is not None,
            "soft caps": bool(self.attention_softcap or self.logit_softcap),
        }
        return tuple(name for name, has in parts.items() if has)

    @property
    def max_context(self) -> int:
        """Positions that the rotary embedding was made for, scaling included."""
        if self.rope.kind == "yarn":
            return max(self.max_position, int(self.rope.original_max_position * self.rope.factor))
        if self.rope.kind == "linear":
            return int(self.max_position * self.rope.factor)
        return self.max_position

    @property
    def num_parameters(self) -> int:
        """Values to be stored; tied embeddings count once."""
        q, kv = self.num_heads * self.head_size, self.num_kv_heads * self.head_size
        h, i = self.hidden_size, self.intermediate_size
        layer = h * (q + 2 * kv) + q * h + 2 * h
        layer += (q + 2 * kv) * self.qkv_bias + h * self.out_bias
        layer += 2 * self.head_size * self.qk_norm + 2 * h * self.out_norms
        mlps = (
            self._mlp_parameters(self.moe.num_experts if self.moe else 0)
            + (2 * i + h) * self.mlp_bias * self.num_layers
        )
        return self.num_layers * layer + mlps + self.vocab_size * h * (1 if self.tie_embeddings else 2) + h

    @property
    def num_layer_products(self) -> int:
        """Values of all layers' matrices that a token is multiplied by once: of experts, of those that it is given to."""
        q, kv = self.num_heads * self.head_size, self.num_kv_heads * self.head_size
        mlps = self._mlp_parameters(self.moe.experts_per_token if self.moe else 0)
        return self.num_layers * self.hidden_size * (2 * q + 2 * kv) + mlps

    @property
    def num_step_parameters(self) -> int:
        """Values that one step reads at least: all but experts that no token is given to, and an untied input embedding, of
        which it reads a few rows."""
        idle = (
            self._mlp_parameters(self.moe.num_experts - self.moe.experts_per_token) - self._mlp_parameters(0)
            if self.moe
            else 0
        )
        return self.num_parameters - idle - (0 if self.tie_embeddings else self.vocab_size * self.hidden_size)

    @property
    def mlp_width(self) -> int:
        """Values between the matrices of a layer's MLP, or of a token's experts, for one token."""
        if self.moe is None:
            return self.intermediate_size
        experts = self.moe.experts_per_token * max(self.moe.intermediate_size, self.hidden_size)
        return max(self.intermediate_size, experts) + self.moe.shared_size

    def _mlp_parameters(self, num_experts: int) -> int:
        """Values of all layers' MLPs without biases, where layers of experts have so many of them."""
        dense = 3 * self.hidden_size * self.intermediate_size
        if self.moe is None:
            return self.num_layers * dense
        sparse = self.moe.num_parameters(self.hidden_size, num_experts)
        return sum(sparse if has_experts else dense for has_experts in self.moe.layers)

    @classmethod
    def from_folder(cls, folder: Path | str) -> ModelConfig:
        """Read ``config.json`` of a model folder.

        Raises:
            ModelNotFoundError: no such folder, or no config.json in it.
            ModelLoadError: the file is not JSON, or lacks a key.
            UnsupportedModelError: it asks for what the native decoder does not have.
        """
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise ModelNotFoundError(
                f"no config.json in {folder}",
                value=str(folder),
                param="model",
                remedy="Name a folder that holds a Hugging Face model: config.json and *.safetensors.",
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ModelLoadError(
                f"{path} is not valid JSON ({error})",
                value=str(path),
                param="model",
                remedy="Download the model's config.json again.",
            ) from error
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Read a config.json's content; raises as `from_folder` does."""
        family = family_of(values.get("architectures"))
        values = {**family.defaults, **_language_model_of(values, family)}
        _refuse_unknown_parts(values, family)
        hidden, heads = _positive(values, "hidden_size"), _positive(values, "num_attention_heads")
        kv_heads = int(values.get("num_key_value_heads") or heads)
        head_size = int(values.get("head_dim") or hidden // heads)
        if heads % kv_heads:
            raise UnsupportedModelError(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}",
                value=kv_heads,
                limit=heads,
                param="num_key_value_heads",
            )
        layers = _positive(values, "num_hidden_layers")
        max_position = _positive(values, "max_position_embeddings")
        raw_rope, raw_local = _split_rope(values)
        rotary_size = _read_rotary_size(raw_rope, values, family, head_size)
        rope = read_rope(raw_rope, values, max_position, rotary_size)
        local = None if raw_local is None else read_rope(raw_local, values, max_position, rotary_size)
        query_scalar = float(values["query_pre_attn_scalar"]) if family.reads_query_scalar else head_size
        attention_bias = family.reads_attention_bias and bool(values.get("attention_bias", False))
        dtype = values.get("dtype") or values.get("torch_dtype")
        return cls(
            architecture=family.architecture,
            vocab_size=_positive(values, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_positive(values, "intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_size=head_size,
            max_position=max_position,
            rms_norm_eps=float(values.get("rms_norm_eps", 1e-6)),
            rope=rope,
            rotary_size=rotary_size,
            attention_scale=query_scalar**-0.5,
            tie_embeddings=bool(values.get("tie_word_embeddings", False)),
            qkv_bias=family.qkv_bias
            or attention_bias
            or (family.reads_qkv_bias and bool(values.get("qkv_bias", True))),
            out_bias=attention_bias,
            mlp_bias=family.reads_mlp_bias and bool(values.get("mlp_bias", False)),
            qk_norm=family.qk_norm,
            sliding_windows=_read_windows(values, family, layers),
            local_rope=None if local == rope else local,
            activation=ACTIVATIONS[_activation(values, family)],
            norm_offset=family.norm_offset,
            out_norms=bool(family.names.mlp_out_norm),
            embedding_scale=hidden**0.5 if family.scales_embedding else None,
            attention_softcap=_softcap(values, family, "attn_logit_softcapping"),
            logit_softcap=_softcap(values, family, "final_logit_softcapping"),
            moe=read_moe(values, family, layers),
            dtype=str(dtype).removeprefix("torch.") if dtype else None,
            eos_token_ids=_as_ids(values.get("eos_token_id")),
        )


def _positive(values: Mapping[str, Any], key: str) -> int:
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


def _language_model_of(values: Mapping[str, Any], family: Family) -> Mapping[str, Any]:
    """The config with that of its language model in the place of what it says of itself; null says nothing."""
    nested = values.get(family.text_config) if family.text_config else None
    return {
        **values,
        **{key: value for key, value in (nested or {}).items() if value is not None or key not in values},
    }


def _activation(values: Mapping[str, Any], family: Family) -> Any:
    return values.get(family.activation_key, family.activations[0])


def _softcap(values: Mapping[str, Any], family: Family, key: str) -> float | None:
    cap = values.get(key) if family.reads_softcaps else None
    return float(cap) if cap else None


def _split_rope(values: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
    """What a config says of its rotary embedding, and of another one in layers with a window."""
    raw = values.get("rope_parameters") or values.get("rope_scaling") or {}
    local = {} if (base := values.get("rope_local_base_freq")) is None else {"rope_theta": base}
    if "full_attention" in raw or "sliding_attention" in raw:
        return raw.get("full_attention") or {}, {**local, **(raw.get("sliding_attention") or {})}
    return raw, local or None


def _as_ids(value: Any) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset(int(v) for v in (value if isinstance(value, (list, tuple)) else [value]))


def _refuse_unknown_parts(values: Mapping[str, Any], family: Family) -> None:
    """Raise for each part of a config that would silently change the model if it were ignored."""
    activation = _activation(values, family)
    if activation not in family.activations:
        raise UnsupportedModelError(
            f"{family.activation_key} {activation!r} is not supported",
            value=activation,
            limit=list(family.activations),
            param=family.activation_key,
        )
    if values.get("use_bidirectional_attention"):
        raise UnsupportedModelError(
            "use_bidirectional_attention: an encoder does not generate",
            value=values["use_bidirectional_attention"],
            limit=False,
            param="use_bidirectional_attention",
        )
    if values.get("quantization_config"):
        method = values["quantization_config"].get("quant_method", "unknown")
        raise UnsupportedModelError(
            f"quantized checkpoints ({method}) are not supported",
            value=method,
            param="quantization_config",
            remedy="Use the unquantized checkpoint of the model.",
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


def _read_rotary_size(
    rope: Mapping[str, Any], values: Mapping[str, Any], family: Family, head_size: int
) -> int:
    """Values of a head that are turned; they come in pairs."""
    share = rope.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1.0
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


def _read_windows(values: Mapping[str, Any], family: Family, layers: int) -> tuple[int | None, ...]:
    window = values.get("sliding_window")
    if family.window == "none":
        return (None,) * layers
    if family.window in ("by_layer", "used", "alternating") and not values.get("use_sliding_window", False):
        window = None
    if family.window in ("all", "used"):
        return (int(window) if window else None,) * layers
    kinds = values.get("layer_types")
    if kinds is None and family.window == "pattern":
        every = _positive(values, "sliding_window_pattern")
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
