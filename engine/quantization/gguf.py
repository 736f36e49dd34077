"""GGUF models: the config.json that a file's metadata stands for, and the names of its tensors in Hugging Face checkpoints.

llama.cpp's "llama" also stands for Mistral. Its files hold q and k with the two halves of each rotary pair side by side, and
Llama 3's rotary scaling as a tensor of factors. Boundary: names and numbers; ``engine.models.gguf_weights`` moves values.
Source: llama.cpp, ``convert_hf_to_gguf.py``; gguf 0.19, ``constants.py``.
"""

from __future__ import annotations

import re
from typing import Any

from engine.errors import UnsupportedModelError
from engine.quantization.gguf_file import GgufFile

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
PAIRED = ("llama", "mistral")  # q and k have neighbouring rotary pairs
ROPE_FACTORS = "rope_freqs.weight"
FLOAT_TYPES = (0, 1, 30)  # float32, float16, bfloat16
_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_TENSOR = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<part>\w+)\.(?P<kind>weight|bias)")
_REMEDY = "Use the model's own checkpoint with *.safetensors."


def checkpoint_name(name: str) -> str:
    """The tensor's name in a Hugging Face checkpoint; its own where that has no such tensor."""
    match = _TENSOR.fullmatch(name)
    if match is None or match["part"] not in _NAMES:
        return name
    where = "" if match["layer"] is None else f"model.layers.{match['layer']}."
    return f"{where}{_NAMES[match['part']]}.{match['kind']}"


def config_values(file: GgufFile) -> dict[str, Any]:
    """What a config.json of this model holds, for ``ModelConfig.from_dict``.

    Raises:
        UnsupportedModelError: an architecture or a part of one that is not read here, by name.
    """
    architecture = str(file.metadata.get("general.architecture"))
    if architecture not in ARCHITECTURES:
        known = sorted(ARCHITECTURES)
        raise _unsupported(
            f"architecture {architecture!r} (read are {', '.join(known)})", architecture, known
        )

    def get(key: str, default: Any = None) -> Any:
        return file.metadata.get(f"{architecture}.{key}", default)

    heads, hidden = get("attention.head_count"), get("embedding_length")
    head_size = get("attention.key_length") or (hidden // heads if heads and hidden else None)
    rotated, kv_heads = get("rope.dimension_count", head_size), get("attention.head_count_kv", heads)
    if get("expert_count", 0):
        raise _unsupported("experts", get("expert_count"), 0)
    if (
        rotated != head_size
        or get("attention.value_length", head_size) != head_size
        or isinstance(kv_heads, list)
    ):
        raise _unsupported("heads of unlike sizes", (head_size, rotated, kv_heads), head_size)
    embedding = file.tensors.get("token_embd.weight")
    return {
        "architectures": [ARCHITECTURES[architecture]],
        "vocab_size": embedding.shape[0] if embedding else None,
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_size,
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon", 1e-6),
        "sliding_window": get("attention.sliding_window"),
        "rope_parameters": _rope(file, get),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": architecture != "qwen2" and "blk.0.attn_q.bias" in file.tensors,
        "eos_token_id": [
            file.metadata[key] for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
            if key in file.metadata
        ],
    }  # fmt: skip


def is_quantized(file: GgufFile) -> bool:
    """Whether any tensor is stored in less than a float."""
    return any(tensor.type_id not in FLOAT_TYPES for tensor in file.tensors.values())


def _rope(file: GgufFile, get: Any) -> dict[str, Any]:
    theta, kind = get("rope.freq_base", 10_000.0), get("rope.scaling.type", "none")
    found = {"rope_theta": theta, "rope_type": "default" if kind == "none" else kind}
    if ROPE_FACTORS in file.tensors:
        return {**found, **_llama3_scaling(file, get)}
    if kind == "none":
        return found
    found["factor"] = get("rope.scaling.factor")
    if kind == "yarn":
        found["original_max_position_embeddings"] = get("rope.scaling.original_context_length")
        found["attention_factor"] = get("rope.scaling.attn_factor")
    return found


def _llama3_scaling(file: GgufFile, get: Any) -> dict[str, Any]:
    """Llama 3.1's scaling, if it is what the file's tensor of factors says: converted files name no parameters of it."""
    import numpy as np

    tensor = file.tensors[ROPE_FACTORS]
    if tensor.type_id != 0:
        raise _unsupported("rope factors that are no float32", tensor.type_id, 0)
    given = np.memmap(file.path, np.float32, "r", tensor.offset, tensor.shape)
    exponents = np.arange(0, 2 * len(given), 2, dtype=np.float64) / (2 * len(given))
    wavelengths = 2 * np.pi * get("rope.freq_base", 10_000.0) ** exponents
    for original in (8192, get("rope.scaling.original_context_length") or 8192):
        factor = float(given[-1])
        blend = np.clip((original / wavelengths - 1.0) / (4.0 - 1.0), 0.0, 1.0)
        expected = 1 / ((1 - blend) / factor + blend)
        if np.allclose(given, expected, rtol=1e-3):  # the file's are float32, from frequencies in float32
            return {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": original}  # fmt: skip
    raise _unsupported("rope factors other than Llama 3.1's", [float(x) for x in given[:4]], "llama3")


def _unsupported(what: str, value: Any, limit: Any) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"GGUF files with {what} are not supported", value=value, limit=limit, param="model", remedy=_REMEDY
    )
