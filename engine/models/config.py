"""ModelConfig: the shape of a causal LM, frozen, read once from a Hugging Face config.json.

Boundary: plain numbers. What the decoder cannot do raises here, before any weight is read. It does not look at weights,
tokenizer or generation settings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.errors import ModelLoadError, ModelNotFoundError, UnsupportedModelError
from engine.model_folder import is_gguf
from engine.models.config_json import (
    activation_of,
    as_ids,
    language_model_of,
    positive,
    read_rotary_size,
    read_windows,
    refuse_unknown_parts,
    softcap_of,
    split_rope,
)
from engine.models.moe_config import MoeConfig, read_moe
from engine.models.registry import family_of
from engine.models.rope_config import RopeConfig, read_rope
from engine.quantization import gguf
from engine.quantization.checkpoint import CheckpointQuantization
from engine.quantization.gguf_file import GgufFile
from engine.quantization.schemes import read_quantization

ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}  # fmt: skip


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
    rotary_size: int  # values of a head that are turned, from its first on; 0 beside ALiBi
    attention_scale: float
    tie_embeddings: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]  # one per layer
    local_rope: RopeConfig | None = None  # of layers with a window, where that is another one
    block: str = "llama"  # or "neox": LayerNorms, and an MLP without a gate
    parallel_residual: bool = False  # of "neox": attention and MLP take the same residual
    has_alibi: bool = False  # instead of a rotary embedding
    has_normalized_head: bool = False  # rows of the output head are brought to length 1
    activation: str = "silu"  # of the MLP: "silu", "gelu_tanh" or "gelu"
    norm_offset: bool = False  # norms multiply by 1 + weight
    out_norms: bool = False  # norms of what attention and MLP add to the residual
    embedding_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    moe: MoeConfig | None = None
    dtype: str | None = None  # of the checkpoint
    eos_token_ids: frozenset[int] = frozenset()
    quantization: CheckpointQuantization | None = None  # how the checkpoint stores its linear layers

    def unfused(self, device_type: str) -> tuple[str, ...]:
        """What of this model the device's fused step does not compute: the one compiled call of a CPU, or on a GPU the Triton
        kernels between products. Empty: it runs it. Otherwise the decoder takes torch's operations, beside whichever attention
        backend.
        """
        nowhere = {
            "GPT-NeoX's block": self.block == "neox",
            "partial rotary embedding": 0 < self.rotary_size < self.head_size,
        }
        on_gpu_alone = {
            "ALiBi": self.has_alibi,
            "norms by 1 + weight": self.norm_offset,
            f"activation {self.activation}": self.activation != "silu",
            "rotary embedding by layer": self.local_rope is not None,
            "norms of outputs": self.out_norms,
            "experts": self.moe is not None,
            "scaled embedding": self.embedding_scale is not None,
            "soft caps": bool(self.attention_softcap or self.logit_softcap),
        }
        parts = nowhere if device_type == "cuda" else nowhere | on_gpu_alone
        return tuple(name for name, has in parts.items() if has)

    @property
    def max_context(self) -> int:
        """Positions that the rotary embedding was made for, scaling included."""
        if self.rope.kind == "yarn":
            return max(self.max_position, int(self.rope.original_max_position * self.rope.factor))
        if self.rope.kind == "linear" and self.local_rope is None:  # Gemma 3 states the scaled context
            return int(self.max_position * self.rope.factor)
        return self.max_position

    @property
    def num_parameters(self) -> int:
        """Values to be stored; tied embeddings count once."""
        q, kv = self.num_heads * self.head_size, self.num_kv_heads * self.head_size
        h, i, is_neox = self.hidden_size, self.intermediate_size, self.block == "neox"
        layer = h * (q + 2 * kv) + q * h + 2 * h
        layer += (q + 2 * kv) * self.qkv_bias + h * self.out_bias + 2 * h * is_neox
        layer += 2 * self.head_size * self.qk_norm + 2 * h * self.out_norms
        layer += ((1 if is_neox else 2) * i + h) * self.mlp_bias
        mlps = self._mlp_parameters(self.moe.num_experts if self.moe else 0)
        embeddings = self.vocab_size * h * (1 if self.tie_embeddings else 2)
        return self.num_layers * layer + mlps + embeddings + h * (2 if is_neox else 1)

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
        unread = 0 if self.tie_embeddings else self.vocab_size * self.hidden_size
        if self.moe is not None:
            unread += self._mlp_parameters(self.moe.num_experts) - self._mlp_parameters(
                self.moe.experts_per_token
            )
        return self.num_parameters - unread

    @property
    def mlp_width(self) -> int:
        """Values between the matrices of a layer's MLP, or of a token's experts, for one token."""
        if self.moe is None:
            return self.intermediate_size
        experts = self.moe.experts_per_token * max(self.moe.intermediate_size, self.hidden_size)
        return max(self.intermediate_size, experts) + self.moe.shared_size

    def _mlp_parameters(self, num_experts: int) -> int:
        """Values of all layers' MLPs without biases, where layers of experts have so many of them."""
        dense = (2 if self.block == "neox" else 3) * self.hidden_size * self.intermediate_size
        if self.moe is None:
            return self.num_layers * dense
        sparse = self.moe.num_parameters(self.hidden_size, num_experts)
        return sum(sparse if has_experts else dense for has_experts in self.moe.layers)

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
        return cls.from_dict(read_config_values(folder))

    @classmethod
    def _from_gguf(cls, file: GgufFile) -> ModelConfig:
        model = cls.from_dict(gguf.config_values(file))
        quantization = CheckpointQuantization(method="gguf", groups=())
        return replace(model, quantization=quantization if gguf.is_quantized(file) else None)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Read a config.json's content; raises as `from_folder` does."""
        family = family_of(values.get("architectures"))
        values = {**family.defaults, **language_model_of(values, family)}
        refuse_unknown_parts(values, family)
        hidden, heads = positive(values, "hidden_size"), positive(values, "num_attention_heads")
        kv_heads = int(values.get("num_key_value_heads") or heads)
        head_size = int(values.get("head_dim") or hidden // heads)
        if heads % kv_heads:
            raise UnsupportedModelError(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}",
                value=kv_heads,
                limit=heads,
                param="num_key_value_heads",
            )
        layers = positive(values, "num_hidden_layers")
        has_alibi = family.has_alibi and "max_position_embeddings" not in values
        max_position = positive(values, "model_max_length" if has_alibi else "max_position_embeddings")
        raw_rope, raw_local = split_rope(values)
        rotary_size = 0 if has_alibi else read_rotary_size(raw_rope, values, family, head_size)
        rope = read_rope(raw_rope, values, max_position, rotary_size)
        local = None if raw_local is None else read_rope(raw_local, values, max_position, rotary_size)
        query_scalar = float(values["query_pre_attn_scalar"]) if family.reads_query_scalar else head_size
        attention_bias = family.reads_attention_bias and bool(values.get("attention_bias", False))
        is_neox = family.block == "neox"
        dtype = values.get("dtype") or values.get("torch_dtype")
        return cls(
            architecture=family.architecture,
            vocab_size=positive(values, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=positive(values, "intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_size=head_size,
            max_position=max_position,
            rms_norm_eps=float(
                values.get("layer_norm_eps", 1e-5) if is_neox else values.get("rms_norm_eps", 1e-6)
            ),
            rope=rope,
            rotary_size=rotary_size,
            attention_scale=query_scalar**-0.5,
            tie_embeddings=bool(values.get("tie_word_embeddings", False)),
            qkv_bias=family.qkv_bias
            or attention_bias
            or (family.reads_qkv_bias and bool(values.get("qkv_bias", True))),
            out_bias=attention_bias,
            mlp_bias=is_neox or (family.reads_mlp_bias and bool(values.get("mlp_bias", False))),
            qk_norm=family.qk_norm,
            sliding_windows=read_windows(values, family, layers),
            block=family.block,
            parallel_residual=is_neox and bool(values.get("use_parallel_residual", True)),
            has_alibi=has_alibi,
            has_normalized_head=values["vocab_size"] == family.normalized_head_vocab,
            local_rope=None if local == rope else local,
            activation=ACTIVATIONS[activation_of(values, family)],
            norm_offset=family.norm_offset,
            out_norms=bool(family.names.mlp_out_norm),
            embedding_scale=hidden**0.5 if family.scales_embedding else None,
            attention_softcap=softcap_of(values, family, "attn_logit_softcapping"),
            logit_softcap=softcap_of(values, family, "final_logit_softcapping"),
            moe=read_moe(values, family, layers),
            dtype=str(dtype).removeprefix("torch.") if dtype else None,
            eos_token_ids=as_ids(values.get("eos_token_id")),
            quantization=read_quantization(values),
        )


def read_config_values(folder: Path | str) -> dict[str, Any]:
    """The content of a model folder's ``config.json``.

    Raises:
        ModelNotFoundError: no such folder, or no config.json in it.
        ModelLoadError: the file is not JSON.
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
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelLoadError(
            f"{path} is not valid JSON ({error})",
            value=str(path),
            param="model",
            remedy="Download the model's config.json again.",
        ) from error
    return values
