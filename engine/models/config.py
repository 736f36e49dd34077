"""ModelConfig: the shape of a causal LM, frozen, read once from a Hugging Face config.json.

Boundary: plain numbers. Both spellings of the rotary embedding are read: `rope_parameters` (transformers 5)
and `rope_theta` + `rope_scaling` (older checkpoints). What the decoder cannot do raises here, before any weight is read.
It does not look at weights, tokenizer or generation settings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.errors import ModelLoadError, ModelNotFoundError, UnsupportedModelError
from engine.model_folder import is_gguf
from engine.models.registry import Family, family_of
from engine.quantization import gguf
from engine.quantization.checkpoint import CheckpointQuantization
from engine.quantization.gguf_file import GgufFile
from engine.quantization.schemes import read_quantization

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding of all layers. Fields beyond `theta` count only for the kinds that name them."""

    kind: str = "default"
    theta: float = 10_000.0
    factor: float = 1.0  # linear, llama3, yarn
    original_max_position: int = 0  # llama3, yarn: the context of pre-training
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn: scale of cos and sin; None: from factor and mscale
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: whole dimensions as the ramp's ends


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
    tie_embeddings: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]  # one per layer
    dtype: str | None = None  # of the checkpoint
    eos_token_ids: frozenset[int] = frozenset()
    quantization: CheckpointQuantization | None = None  # how the checkpoint stores its linear layers

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
        layer = h * (q + 2 * kv) + q * h + 3 * h * i + 2 * h
        layer += (q + 2 * kv) * self.qkv_bias + h * self.out_bias + (2 * i + h) * self.mlp_bias
        layer += 2 * self.head_size * self.qk_norm
        return self.num_layers * layer + self.vocab_size * h * (1 if self.tie_embeddings else 2) + h

    @property
    def num_layer_products(self) -> int:
        """Values of all layers' matrices: a token is multiplied by each of them once."""
        q, kv = self.num_heads * self.head_size, self.num_kv_heads * self.head_size
        return self.num_layers * self.hidden_size * (2 * q + 2 * kv + 3 * self.intermediate_size)

    @property
    def num_step_parameters(self) -> int:
        """Values that one step reads: all but an untied input embedding, of which it reads a few rows."""
        return self.num_parameters - (0 if self.tie_embeddings else self.vocab_size * self.hidden_size)

    @classmethod
    def from_folder(cls, folder: Path | str) -> ModelConfig:
        """Read ``config.json`` of a model folder, or the metadata of a GGUF file.

        Raises:
            ModelNotFoundError: no such folder, or no config.json in it.
            ModelLoadError: the file is not JSON, or lacks a key.
            UnsupportedModelError: it asks for what the native decoder does not have.
        """
        if is_gguf(Path(folder)):
            return cls._from_gguf(GgufFile.read(Path(folder)))
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
    def _from_gguf(cls, file: GgufFile) -> ModelConfig:
        model = cls.from_dict(gguf.config_values(file))
        quantization = CheckpointQuantization(method="gguf", groups=())
        return replace(model, quantization=quantization if gguf.is_quantized(file) else None)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Read a config.json's content; raises as `from_folder` does."""
        family = family_of(values.get("architectures"))
        values = {**family.defaults, **values}
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
        if head_size % 2:
            raise UnsupportedModelError(
                f"head_dim {head_size} is odd; the rotary embedding turns pairs of values",
                value=head_size,
                param="head_dim",
            )
        layers = _positive(values, "num_hidden_layers")
        max_position = _positive(values, "max_position_embeddings")
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
            rope=_read_rope(values, max_position),
            tie_embeddings=bool(values.get("tie_word_embeddings", False)),
            qkv_bias=family.qkv_bias or attention_bias,
            out_bias=attention_bias,
            mlp_bias=family.reads_mlp_bias and bool(values.get("mlp_bias", False)),
            qk_norm=family.qk_norm,
            sliding_windows=_read_windows(values, family, layers),
            dtype=str(dtype).removeprefix("torch.") if dtype else None,
            eos_token_ids=_as_ids(values.get("eos_token_id")),
            quantization=read_quantization(values),
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


def _as_ids(value: Any) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset(int(v) for v in (value if isinstance(value, (list, tuple)) else [value]))


def _refuse_unknown_parts(values: Mapping[str, Any], family: Family) -> None:
    """Raise for each part of a config that would silently change the model if it were ignored."""
    activation = values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedModelError(
            f"hidden_act {activation!r} is not supported",
            value=activation,
            limit=["silu"],
            param="hidden_act",
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
    rotated = (values.get("rope_parameters") or {}).get("partial_rotary_factor") or values.get(
        "partial_rotary_factor"
    )
    if rotated not in (None, 1, 1.0):
        raise UnsupportedModelError(
            f"partial_rotary_factor {rotated} is not supported",
            value=rotated,
            limit=1.0,
            param="partial_rotary_factor",
        )


def _read_rope(values: Mapping[str, Any], max_position: int) -> RopeConfig:
    raw = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    kind = str(raw.get("rope_type") or raw.get("type") or "default")
    if kind not in ROPE_TYPES:
        raise UnsupportedModelError(
            f"rope type {kind!r} is not supported",
            value=kind,
            limit=ROPE_TYPES,
            param="rope_parameters",
            remedy=f"Supported: {', '.join(ROPE_TYPES)}.",
        )
    theta = float(raw.get("rope_theta") or values.get("rope_theta") or 10_000.0)
    if kind == "default":
        return RopeConfig(theta=theta)
    factor = raw.get("factor")
    original = int(
        values.get("original_max_position_embeddings")
        or raw.get("original_max_position_embeddings")
        or max_position
    )
    if factor is None and kind == "yarn":
        factor = max_position / original
    if not isinstance(factor, (int, float)) or factor <= 0:
        raise UnsupportedModelError(
            f"rope type {kind!r} needs a positive factor, got {factor!r}",
            value=factor,
            param="rope_parameters",
        )
    optional = {key: raw.get(key) for key in ("attention_factor", "mscale", "mscale_all_dim")}
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
        **{key: None if value is None else float(value) for key, value in optional.items()},
    )


def _read_windows(values: Mapping[str, Any], family: Family, layers: int) -> tuple[int | None, ...]:
    window = values.get("sliding_window")
    if family.window == "none":
        return (None,) * layers
    if family.window == "all":
        return (int(window) if window else None,) * layers
    if not values.get("use_sliding_window", False):
        window = None
    kinds = values.get("layer_types")
    if kinds is None:
        first = int(values["max_window_layers"])
        kinds = ["sliding_attention" if window and i >= first else "full_attention" for i in range(layers)]
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
