"""Which architectures the native decoder runs, and what each family adds to the plain Llama block.

Boundary: facts that a checkpoint's config.json does not state because its family's code does (biases, norms, scales, names
of tensors, which keys decide the sliding window, defaults of absent keys). Everything a config states is read in
``engine.models.config``. Causal LMs of other architectures are refused here by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from engine.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True)
class TensorNames:
    """How a family's checkpoints call their tensors, without `.weight` and `.bias`. Empty: it has none.

    Projections that the decoder merges have one name each, or one name where the checkpoint merges them in that order.
    """

    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"
    layers: str = "model.layers"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    out: str = "self_attn.o_proj"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    input_norm: str = "input_layernorm"
    attention_out_norm: str = ""
    mlp_norm: str = "post_attention_layernorm"
    mlp_out_norm: str = ""
    router: str = "mlp.gate"
    expert: tuple[str, str, str] = (
        "mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj", "mlp.experts.{}.down_proj",
    )  # fmt: skip
    shared_expert: str = ""
    # How names may begin in a file, each with what that stands for; beginnings and ends of what is no part of the language
    # model: other modalities, and tables that old checkpoints carry though a config says them.
    # The default: files of the model without its output head, as embedding models are saved.
    prefixes: tuple[tuple[str, str], ...] = tuple(
        (f"{part}.", f"model.{part}.") for part in ("embed_tokens", "layers", "norm")
    )
    left_out: tuple[str, ...] = ()
    left_out_ends: tuple[str, ...] = (".rotary_emb.inv_freq",)

    def of_file(self, name: str) -> str | None:
        """What a file's tensor is called here; None: it is left out."""
        if name.startswith(self.left_out) or name.endswith(self.left_out_ends):
            return None
        for prefix, meant in self.prefixes:
            if name.startswith(prefix):
                return meant + name.removeprefix(prefix)
        return name


@dataclass(frozen=True, slots=True)
class Family:
    """What one architecture's own code fixes."""

    architecture: str
    qkv_bias: bool = False  # always, whatever the config says
    reads_attention_bias: bool = False  # `attention_bias` adds a bias to q, k, v and o
    reads_qkv_bias: bool = False  # `qkv_bias` adds one to q, k and v; absent: it does
    reads_mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head of q and k, before the rotary embedding
    # "none"; "all": every layer; "by_layer": use_sliding_window and layer_types or max_window_layers;
    # "pattern": layer_types, else each layer but every `sliding_window_pattern`-th; "used": every layer with
    # use_sliding_window; "alternating": then layer_types, else every other of the first max_window_layers
    window: str = "none"
    reads_partial_rotary: bool = False
    activation_key: str = "hidden_act"
    activations: tuple[str, ...] = ("silu", "swish")
    norm_offset: bool = False  # norms multiply by 1 + weight, in float32
    scales_embedding: bool = False  # by the square root of the hidden size
    reads_query_scalar: bool = False  # `query_pre_attn_scalar` instead of the head size
    reads_softcaps: bool = False
    block: str = "llama"  # or "neox"
    has_alibi: bool = False  # instead of a rotary embedding, where a config has no max_position_embeddings
    normalized_head_vocab: int = 0  # a vocabulary of this size has a head whose rows have length 1
    expert_size_key: str = ""  # layers have experts of this size in the place of an MLP
    normalizes_experts: bool = False  # always: weights of the chosen experts sum to 1, and are not rounded
    text_config: str = ""  # the key of the language model's config in one of several modalities
    names: TensorNames = TensorNames()
    defaults: Mapping[str, Any] = field(
        default_factory=lambda: MappingProxyType({})
    )  # of keys a config may leave out


_SANDWICH = TensorNames(
    attention_out_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_out_norm="post_feedforward_layernorm",
)
_GEMMA: dict[str, Any] = {
    "reads_attention_bias": True, "window": "pattern", "activation_key": "hidden_activation",
    "activations": ("gelu_pytorch_tanh",), "norm_offset": True, "scales_embedding": True, "reads_query_scalar": True,
    "reads_softcaps": True,
}  # fmt: skip
_GEMMA2 = {
    "vocab_size": 256_000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 8192,
    "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True, "query_pre_attn_scalar": 256,
    "sliding_window": 4096, "sliding_window_pattern": 2, "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}  # fmt: skip
_GEMMA3 = {
    **_GEMMA2, "vocab_size": 262_208, "max_position_embeddings": 131_072, "sliding_window_pattern": 6,
    "attn_logit_softcapping": None, "final_logit_softcapping": None, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
}  # fmt: skip
_PACKED = TensorNames(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",))
_BAICHUAN = TensorNames(qkv=("self_attn.W_pack",))
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
    Family(
        "MixtralForCausalLM",
        window="all",
        expert_size_key="intermediate_size",
        normalizes_experts=True,
        names=TensorNames(
            router="block_sparse_moe.gate",
            expert=(
                "block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3", "block_sparse_moe.experts.{}.w2",
            ),
        ),
        defaults=MappingProxyType({"num_key_value_heads": 8, "rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2}),
    ),
    Family(
        "Qwen2MoeForCausalLM",
        reads_qkv_bias=True,
        window="alternating",
        expert_size_key="moe_intermediate_size",
        names=TensorNames(shared_expert="mlp.shared_expert"),
        defaults=MappingProxyType(
            {
                "sliding_window": 4096, "max_window_layers": 28, "moe_intermediate_size": 1408,
                "shared_expert_intermediate_size": 5632, "num_experts": 60, "num_experts_per_tok": 4,
            }
        ),
    ),
    Family(
        "Qwen3MoeForCausalLM",
        reads_attention_bias=True,
        qk_norm=True,
        window="used",
        expert_size_key="moe_intermediate_size",
        defaults=MappingProxyType(
            {"sliding_window": 4096, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}
        ),
    ),
    Family(
        "GPTNeoXForCausalLM",
        reads_attention_bias=True,
        reads_partial_rotary=True,
        block="neox",
        activations=("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"),
        names=TensorNames(
            embedding="gpt_neox.embed_in", norm="gpt_neox.final_layer_norm", head="embed_out", layers="gpt_neox.layers",
            qkv=("attention.query_key_value",), out="attention.dense", gate_up=("mlp.dense_h_to_4h",),
            down="mlp.dense_4h_to_h",
            left_out_ends=(".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"),
        ),
        defaults=MappingProxyType({"attention_bias": True, "rotary_pct": 0.25}),
    ),
    # Their own code is remote and not run. The 13B models have ALiBi, and their configs no max_position_embeddings;
    # Baichuan 2 has the larger vocabulary.
    Family("BaiChuanForCausalLM", names=_BAICHUAN),
    Family("BaichuanForCausalLM", names=_BAICHUAN, has_alibi=True, normalized_head_vocab=125_696),
    Family("Phi3ForCausalLM", window="all", reads_partial_rotary=True, names=_PACKED),  # Phi-4 too
    Family("Gemma2ForCausalLM", names=_SANDWICH, defaults=MappingProxyType(_GEMMA2), **_GEMMA),
    Family("Gemma3ForCausalLM", names=_SANDWICH, qk_norm=True, defaults=MappingProxyType(_GEMMA3), **_GEMMA),
    Family(
        "Gemma3ForConditionalGeneration",
        names=replace(
            _SANDWICH,
            prefixes=(("language_model.model.", "model."), ("model.language_model.", "model.")),
            left_out=(
                "vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.",
            ),
        ),
        qk_norm=True,
        text_config="text_config",
        defaults=MappingProxyType(_GEMMA3),
        **_GEMMA,
    ),
)  # fmt: skip
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


def parts_of(names: tuple[str, ...], sizes: tuple[int, ...]) -> tuple[tuple[str, int], ...]:
    """Each name of a merged projection with its outputs; one name of several projections has them all."""
    return tuple(zip(names, sizes, strict=True)) if len(names) > 1 else ((names[0], sum(sizes)),)
