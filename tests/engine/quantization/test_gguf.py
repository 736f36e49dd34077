"""GGUF files that the gguf package wrote: the same weights as its own dequantizer, the same model and tokenizer as before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from engine.build import build_engine
from engine.config import EngineConfig
from engine.errors import ConfigError, CorruptWeightsError, ModelNotFoundError, UnsupportedModelError
from engine.llm import LLM
from engine.model_folder import find_model
from engine.models.config import ModelConfig
from engine.quantization.gguf_file import GgufFile
from engine.tokenizer import Tokenizer

BUNDLED = Path(__file__).parents[3] / "data" / "models" / "chat-base"
VALUES = {
    "vocab_size": 97, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 7,
}  # fmt: skip
CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
SIMPLE = (Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0)
BY_K = (Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K)


def stored(values: Any, kind: Kind, seed: int) -> Any:
    """Values as the package stores them; of types that it only reads, blocks of random bytes whose scales are finite."""
    if kind not in BY_K:
        return quantize(values, kind)
    size, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    shape = (*values.shape[:-1], values.shape[-1] // size * num_bytes)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8) & 0x3B


def write(
    path: Path,
    architecture: str,
    kind: Kind,
    change: Callable[[Any], Any] = lambda writer: None,
    **changes: Any,
) -> dict[str, Tensor]:
    """A random model's file, as llama.cpp's conversion would write it; its weights as the package dequantizes them, in transformers' order."""
    config = CONFIGS[architecture](**{**VALUES, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 1.5 / parameter.shape[-1] ** 0.5)
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim if architecture != "qwen2" else 64)
    writer.add_value_length(config.head_dim if architecture != "qwen2" else 64)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(64)
    writer.add_rope_freq_base(10000.0)
    writer.add_eos_token_id(7)
    change(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    found = {}
    for index, (name, tensor) in enumerate(model.state_dict().items()):
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        count = next((n for part, n in heads.items() if part in name), 0) if architecture == "llama" else 0
        # llama.cpp's own conversion: halves of a rotary pair side by side
        moved = tensor.view(count, 2, -1, *tensor.shape[1:]).transpose(1, 2) if count else tensor
        values = moved.reshape(tensor.shape).float().numpy()
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert target is not None
        if values.ndim == 1:
            writer.add_tensor(target, values)
            found[name] = tensor
            continue
        raw = stored(values, kind, index)
        writer.add_tensor(target, raw, raw_dtype=kind)
        plain = torch.from_numpy(dequantize(raw, kind).reshape(values.shape).copy())
        found[name] = (
            plain.view(count, -1, 2, plain.shape[1]).transpose(1, 2).reshape(plain.shape) if count else plain
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


@pytest.mark.parametrize("kind", [*SIMPLE, *BY_K], ids=lambda kind: kind.name)
def test_weights_are_those_that_the_package_dequantizes(
    kind: Kind, tmp_path: Path, loaded_weights: Callable[..., dict[str, Tensor]]
) -> None:
    want = write(tmp_path / "model.gguf", "llama", kind)
    found = loaded_weights(tmp_path / "model.gguf", torch.float32)
    assert set(found) == set(want)
    for name, value in want.items():
        assert torch.isfinite(value).all()
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_file_computes_what_transformers_computes_with_its_weights(
    architecture: str, tmp_path: Path, load_decoder: Callable[..., Any], decoder_logits: Callable[..., Tensor]
) -> None:
    """Biases, norms of queries and keys, the order of rotary pairs, and what the metadata says of all that."""
    path = tmp_path / "model.gguf"
    weights = write(path, architecture, Kind.Q8_0, num_hidden_layers=2)
    config = CONFIGS[architecture](**{**VALUES, "num_hidden_layers": 2})
    peer = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    peer.load_state_dict({name: value.double() for name, value in weights.items()})
    tokens = [3, 1, 4, 1, 5, 92, 65, 35, 89, 79]
    ours = decoder_logits(load_decoder(path), tokens)
    with torch.no_grad():
        want = peer(torch.tensor([tokens])).logits[0]
    # float64 throughout, but transformers makes its rotary table and its norm's sums in float32
    torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5)
    model = ModelConfig.from_folder(path)
    assert model.architecture == type(peer).__name__
    assert model.eos_token_ids == {7}


def test_embeddings_are_tied_where_the_file_has_no_output(
    tmp_path: Path, load_decoder: Callable[..., Any]
) -> None:
    from engine.bench.parts.cpu_peers import write_gguf

    write_gguf(BUNDLED, tmp_path / "model.gguf", "f16", BUNDLED / "tokenizer.json")
    model = ModelConfig.from_folder(tmp_path / "model.gguf")
    original = ModelConfig.from_folder(BUNDLED)
    assert model.tie_embeddings
    assert model.quantization is None, "floats can still be quantized while they are loaded"
    for name in (
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "head_size",
        "max_position",
        "rms_norm_eps",
        "rope",
    ):
        found, want = getattr(model, name), getattr(original, name)
        assert found == pytest.approx(want) if isinstance(want, float) else found == want, name
    ours, plain = load_decoder(tmp_path / "model.gguf"), load_decoder(BUNDLED)
    for (name, found), (_, want) in zip(ours.weight_targets(), plain.weight_targets(), strict=True):
        assert torch.equal(found, want.half().double()), name


def write_with_tokenizer(path: Path) -> None:
    """The bundled model with its vocabulary as Qwen's tokenizer would have it: digits one by one, byte-level BPE."""
    tokenizer = json.loads((BUNDLED / "tokenizer.json").read_text())
    vocabulary = {number: token for token, number in tokenizer["model"]["vocab"].items()}
    special = {added["id"]: added["content"] for added in tokenizer["added_tokens"]}
    vocabulary |= special

    def add(writer: Any) -> None:
        kinds = [
            gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in range(len(vocabulary))
        ]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list([vocabulary[i] for i in range(len(vocabulary))])
        writer.add_token_types(kinds)
        writer.add_token_merges(
            [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]]
        )
        writer.add_bos_token_id(1)
        writer.add_eot_token_id(2)
        writer.add_add_bos_token(False)
        writer.add_chat_template(
            "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"
        )

    write(path, "qwen2", Kind.Q8_0, add, vocab_size=len(vocabulary))


def test_a_file_is_a_whole_model(tmp_path: Path) -> None:
    """Tokenizer and chat template are the file's own; a folder that holds it alone is the model too."""
    write_with_tokenizer(tmp_path / "model.gguf")
    ours, original = Tokenizer.from_pretrained(tmp_path), Tokenizer.from_pretrained(BUNDLED)
    # GPT-2's class, which byte-level vocabularies are converted with, would bring its <|endoftext|> along.
    assert ours.vocab_size == original.vocab_size
    for text in (
        "Hello there, how are you?",
        "Count to 42: 1, 2, 3.",
        "naïve 日本 \n\n\ttabs",
        "<|user|>x<|end|>",
    ):
        ids = ours.encode(text)
        assert ids == original.encode(text), text
        assert ours.decode(ids, skip_special_tokens=False) == text
    user, end, assistant = (original.encode(f"<|{name}|>")[0] for name in ("user", "end", "assistant"))
    asked = ours.apply_chat_template([{"role": "user", "content": "hi"}])
    assert asked == [user, *original.encode("hi"), end, assistant]
    with LLM(tmp_path, dtype="float32", num_blocks=16, max_model_len=64, num_threads=1) as llm:
        assert llm.generate("Hello", use_tqdm=False)[0].token_ids
    with pytest.raises(ConfigError, match=r"gguf.*Leave quantization out"):
        build_engine(EngineConfig(model=str(tmp_path), quantization="int4", num_blocks=8))


def test_one_of_several_files_must_be_named(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ModelNotFoundError, match=r"a\.gguf, b\.gguf.*Name one of them"):
        find_model(str(tmp_path))


def llama3_factors(original: float = 8192.0, factor: float = 8.0) -> Any:
    """As llama.cpp's conversion writes them."""
    frequencies = 1.0 / 500000.0 ** (np.arange(0, 64, 2, dtype=np.float32) / 64)
    found = []
    for wavelength in 2 * np.pi / frequencies:
        smooth = (original / wavelength - 1.0) / (4.0 - 1.0)
        found.append(
            1.0
            if wavelength < original / 4
            else factor
            if wavelength > original
            else 1 / ((1 - smooth) / factor + smooth)
        )
    return np.array(found, dtype=np.float32)


def test_llama_3_scaling_is_found_in_its_factors(tmp_path: Path) -> None:
    def add(factors: Any) -> Callable[[Any], None]:
        def change(writer: Any) -> None:
            writer.add_tensor("rope_freqs.weight", factors)
            writer.kv_data[0]["llama.rope.freq_base"].value = 500000.0

        return change

    write(tmp_path / "scaled.gguf", "llama", Kind.F16, add(llama3_factors()))
    rope = ModelConfig.from_folder(tmp_path / "scaled.gguf").rope
    assert (rope.kind, rope.theta, rope.factor, rope.original_max_position) == ("llama3", 500000.0, 8.0, 8192)
    assert (rope.low_freq_factor, rope.high_freq_factor) == (1.0, 4.0)
    write(tmp_path / "other.gguf", "llama", Kind.F16, add(llama3_factors() ** 1.1))
    with pytest.raises(UnsupportedModelError, match=r"rope factors other than Llama 3\.1's"):
        ModelConfig.from_folder(tmp_path / "other.gguf")


@pytest.mark.parametrize("keep", [0, 3, 20, 200, 1000, -64])
def test_a_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "model.gguf"
    write(path, "llama", Kind.Q8_0)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CorruptWeightsError, match=r"model\.gguf cannot be read as GGUF.*truncated"):
        ModelConfig.from_folder(path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda writer: writer.add_expert_count(8), "experts"),
        (lambda writer: writer.add_uint16("split.count", 3), "one of 3 parts.*llama-gguf-split"),
        (lambda writer: writer.add_tensor("blk.0.attn_sinks.weight", np.zeros(4, np.float32)), "attn_sinks"),
        (
            lambda writer: writer.add_tensor("blk.0.ffn_up_exps.weight", np.zeros((2, 256), np.float32)),
            "ffn_up_exps",
        ),
        (
            lambda writer: writer.kv_data[0]["llama.rope.dimension_count"].__setattr__("value", 32),
            "unlike sizes",
        ),
        (
            lambda writer: writer.kv_data[0]["general.architecture"].__setattr__("value", "mamba"),
            "'mamba'.*qwen3",
        ),
    ],
)
def test_what_is_not_read_is_refused_by_name(
    tmp_path: Path, change: Callable[[Any], Any], named: str, load_decoder: Callable[..., Any]
) -> None:
    write(tmp_path / "model.gguf", "llama", Kind.F16, change)
    with pytest.raises(UnsupportedModelError, match=named):
        load_decoder(tmp_path / "model.gguf")


def test_a_header_says_what_the_package_s_own_reader_says(tmp_path: Path) -> None:
    """And leaves out the values of long arrays, which only a tokenizer needs."""

    def add(writer: Any) -> None:
        writer.add_token_list([f"token {i}" for i in range(5000)])
        writer.add_token_scores([0.5] * 5000)
        writer.add_array("some.numbers", [1, 2, 3])

    write(tmp_path / "model.gguf", "llama", Kind.Q4_0, add)
    file = GgufFile.read(tmp_path / "model.gguf")
    assert file.metadata["tokenizer.ggml.tokens"] == file.metadata["tokenizer.ggml.scores"] == 5000
    assert file.metadata["some.numbers"] == [1, 2, 3]
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert {name: (t.shape, t.offset, t.num_bytes) for name, t in file.tensors.items()} == {
        t.name: (tuple(reversed(t.shape.tolist())), t.data_offset, t.n_bytes) for t in reader.tensors
    }
