"""The fused decoder against the torch decoder in float64, its bitwise promises, and its memory."""

from __future__ import annotations

import pytest
import torch

from engine.attention.interface import AttentionMetadata
from engine.attention.reference import ReferenceAttention
from engine.kernels.kv_quantization import QUANTIZED_DTYPES, new_scales
from engine.kernels.lora import tokens_by_slot
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder, LayerCache
from engine.models.fused_cpu import FusedCpuDecoder
from engine.models.lora import AdapterWeights, LoraSlots

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}

# Each family's own parts: biases, head norms, windows; an inner size that fills no whole panel; untied embeddings;
# widths that are odd, or no multiple of a vector.
VARIANTS = {
    "llama": {},
    "llama-untied": {"tie_word_embeddings": False},
    "mistral-window": {"architectures": ["MistralForCausalLM"], "sliding_window": 24},
    "qwen2-bias": {"architectures": ["Qwen2ForCausalLM"]},
    "qwen3-head-norm": {"architectures": ["Qwen3ForCausalLM"]},
    "llama-all-biases": {"attention_bias": True, "mlp_bias": True},
    "llama-uneven": {"hidden_size": 57, "intermediate_size": 83, "head_dim": 12, "vocab_size": 101},
    "llama-one-kv-head": {"num_key_value_heads": 1, "num_attention_heads": 7},
}
BLOCK_SIZE, NUM_BLOCKS = 16, 40


def make_decoder(name: str, dtype: torch.dtype = torch.float64, *, exact_bf16: bool = False) -> Decoder:
    config = ModelConfig.from_dict({**BASE, **VARIANTS[name]})
    decoder = Decoder(config, dtype=dtype, device=torch.device("cpu"), max_positions=512)
    generator = torch.Generator().manual_seed(1)
    for key, parameter in decoder.named_parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = values * 0.3 + 1 if "norm" in key else values / parameter.shape[-1] ** 0.5
        parameter.data.copy_(values.bfloat16() if exact_bf16 else values)
    return decoder


def make_caches(decoder, dtype) -> list[LayerCache]:
    c = decoder.config
    shape = (NUM_BLOCKS, c.num_kv_heads, BLOCK_SIZE, c.head_size)
    pairs = [(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for _ in range(c.num_layers)]
    if dtype in QUANTIZED_DTYPES:
        return [LayerCache(k, v, new_scales(k), new_scales(v)) for k, v in pairs]
    return [LayerCache(k, v) for k, v in pairs]


def make_meta(rows: list[tuple[int, int, int]]) -> tuple[AttentionMetadata, torch.Tensor]:
    """Rows of (first block, context, new tokens); a row's blocks follow each other. Returns metadata and positions."""
    positions = [torch.arange(context, context + new) for _, context, new in rows]
    slots = [first * BLOCK_SIZE + at for (first, _, _), at in zip(rows, positions, strict=True)]
    counts = torch.tensor([0] + [new for _, _, new in rows])
    lengths = [context + new for _, context, new in rows]
    meta = AttentionMetadata(
        query_start=counts.cumsum(0).int(),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        block_tables=torch.stack([torch.arange(first, first + 10).int() for first, _, _ in rows]),
        slot_mapping=torch.cat(slots),
        max_query_len=int(counts.max()),
        max_seq_len=max(lengths),
        num_decode_rows=sum(1 for _, _, new in rows if new == 1),
    )
    return meta, torch.cat(positions)


# Two prompts in uneven chunks beside each other, then decode; the rows of tokens below are these rows' tokens.
STEPS = [
    [(0, 0, 37), (10, 0, 5)],
    [(10, 5, 1), (0, 37, 30)],
    [(0, 67, 1), (10, 6, 1)],
    [(0, 68, 1), (10, 7, 44)],
]
TOKENS = torch.randint(0, 100, (2, 200), generator=torch.Generator().manual_seed(2))


def token_ids(rows):
    return torch.cat([TOKENS[first // 10, context : context + new] for first, context, new in rows])


def run(decoder, dtype, steps=STEPS):
    """Logits of every token of the two rows, by (row, position)."""
    caches, attention, found = make_caches(decoder, dtype), ReferenceAttention(), {}
    for rows in steps:
        meta, positions = make_meta(rows)
        logits = decoder.logits(decoder.forward(token_ids(rows), positions, caches, meta, attention))
        keys = [(first, at) for first, context, new in rows for at in range(context, context + new)]
        found.update(zip(keys, logits, strict=True))
    return {key: found[key] for key in sorted(found)}


def stacked(found):
    return torch.stack(list(found.values()))


@pytest.mark.parametrize("name", VARIANTS)
def test_float32_logits_match_the_torch_decoder_in_float64(library, name):
    exact = stacked(run(make_decoder(name), torch.float64))
    found = stacked(run(FusedCpuDecoder(make_decoder(name, torch.float32), library), torch.float32))
    assert exact.std() > 0.5, "the logits are too flat to compare"
    assert found.dtype == torch.float32
    assert (found.double() - exact).abs().max() < 2e-5


@pytest.mark.parametrize("name", VARIANTS)
def test_bfloat16_logits_are_as_near_to_float64_as_those_of_the_torch_decoder_in_bfloat16(library, name):
    exact = stacked(run(make_decoder(name, exact_bf16=True), torch.float64))
    decoder = make_decoder(name, torch.bfloat16)
    by_torch = stacked(run(decoder, torch.bfloat16))
    found = stacked(run(FusedCpuDecoder(decoder, library), torch.bfloat16))
    assert (found - exact).square().mean() < 1.2 * (by_torch - exact).square().mean()


@pytest.mark.parametrize(
    ("name", "stored"),
    [("qwen3-head-norm", torch.int8), ("llama-uneven", torch.float8_e4m3fn)],
    ids=["int8", "fp8"],
)
def test_over_a_quantized_cache_logits_match_the_torch_decoder_in_float64(library, name, stored):
    """A key that float32 moves over the middle between two stored numbers becomes the other one: few do, hence the mean."""
    exact, plain = (stacked(run(make_decoder(name), dtype)) for dtype in (stored, torch.float64))
    found = stacked(run(FusedCpuDecoder(make_decoder(name, torch.float32), library), stored))
    quantization = (exact - plain).square().mean().sqrt()
    assert quantization > 1e-3
    assert (found - exact).square().mean().sqrt() < 0.02 * quantization


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.int8),
     (torch.float32, torch.float8_e4m3fn), (torch.float32, torch.bfloat16)],
    ids=["float32", "bfloat16", "bfloat16-int8", "float32-fp8", "float32-bfloat16"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen3-head-norm", "llama-uneven"])
def test_bits_do_not_depend_on_chunks_or_on_the_batch(library, name, dtype, stored):
    fused = FusedCpuDecoder(make_decoder(name, dtype), library)
    mixed = run(fused, stored)
    one_by_one = [[(first, at, 1)] for first, at in mixed]
    whole = [[(first, 0, 1 + max(at for f, at in mixed if f == first))] for first in (0, 10)]
    assert torch.equal(stacked(run(fused, stored, one_by_one)), stacked(mixed))
    assert torch.equal(stacked(run(fused, stored, whole)), stacked(mixed))


def test_bits_do_not_depend_on_the_number_of_threads(library):
    fused = FusedCpuDecoder(make_decoder("llama", torch.float32), library)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(stacked(run(fused, torch.float32)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_weights_that_bfloat16_holds_are_kept_in_half_the_memory(library):
    decoder = make_decoder("llama", torch.float32, exact_bf16=True)
    values = sum(p.numel() for key, p in decoder.named_parameters() if "norm" not in key)
    fused = FusedCpuDecoder(decoder, library)
    panel_padding = 1.25  # 200 and 176 outputs in panels of 64
    assert fused.weight_bytes < values * 2 * panel_padding


def test_the_torch_weights_are_dropped(library):
    decoder = make_decoder("llama", torch.float32)
    FusedCpuDecoder(decoder, library)
    linears = sum(p.numel() for key, p in decoder.named_parameters() if "norm" not in key)
    assert linears == 0


@pytest.mark.parametrize("exact_bf16", [False, True])
@pytest.mark.parametrize("name", ["llama", "llama-untied", "llama-all-biases"])
def test_a_step_reads_the_panels_as_they_are_packed(library, name, exact_bf16):
    decoder = make_decoder(name, torch.float32, exact_bf16=exact_bf16)
    config, size = (
        decoder.config,
        2 if exact_bf16 else 4,
    )  # float32 weights that bfloat16 holds are packed as bfloat16
    width = library.panel_width

    def panels(out: int, inputs: int, has_bias: bool) -> int:
        rows = -(-out // width) * width
        return rows * inputs * size + 4 * rows * has_bias

    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    gated = 2 * (-(-inner // (width // 2)) * (width // 2))  # gates and values alternate in half panels
    layer = panels(q + 2 * kv, hidden, config.qkv_bias) + panels(hidden, q, config.out_bias)
    layer += panels(gated, hidden, config.mlp_bias) + panels(hidden, inner, config.mlp_bias) + 2 * 4 * hidden
    found = FusedCpuDecoder(decoder, library).step_weights()
    assert found.layers == config.num_layers * layer
    assert found.head == panels(config.vocab_size, hidden, False) + 4 * hidden
    assert found.embedding_row == hidden * (size if config.tie_embeddings else 4)


class Adapted:
    """A decoder whose first row uses one adapter, and the second another or none."""

    def __init__(self, decoder, dtype, second: int) -> None:
        self.decoder, self.config, self.second = decoder, decoder.config, second
        self.slots = LoraSlots(
            decoder.config, max_loras=3, max_rank=8, dtype=dtype, device=torch.device("cpu")
        )
        for slot in range(3):
            generator = torch.Generator().manual_seed(slot)
            layout = self.slots.layout
            values = torch.randn(layout.num_values, generator=generator, dtype=torch.float64) / 8
            scales = torch.rand(layout.num_scales, generator=generator, dtype=torch.float64) + 0.5
            self.slots.put(slot, AdapterWeights(values.bfloat16(), scales.float(), "", 8))
        if isinstance(decoder, Decoder):
            self.slots.attach(decoder, use_kernel=False, deterministic=False)
        else:
            decoder.use_lora(self.slots)
        self.logits = decoder.logits

    def forward(self, token_ids, positions, caches, meta, attention):
        of_rows = torch.where(meta.block_tables[:, 0] == 0, 2, self.second).int()
        counts = meta.query_start.diff().long()
        self.slots.tokens = tokens_by_slot(of_rows.repeat_interleave(counts), 3)
        return self.decoder.forward(token_ids, positions, caches, meta, attention)


@pytest.mark.parametrize(
    ("name", "second"),
    [("llama", 0), ("qwen3-head-norm", -1), ("llama-all-biases", -1), ("llama-uneven", 0)],
)
def test_adapters_add_what_they_add_to_the_torch_decoder_in_float64(name, second, library):
    exact = stacked(run(Adapted(make_decoder(name), torch.float64, second), torch.float64))
    plain = stacked(run(make_decoder(name), torch.float64))
    fused = FusedCpuDecoder(make_decoder(name, torch.float32), library)
    found = stacked(run(Adapted(fused, torch.float32, second), torch.float32))
    differs = (exact - plain).abs().amax(1)
    of_second = len(differs) - 51
    assert differs[:of_second].min() > 0.1, "the adapter changes too little to be seen"
    assert (differs[of_second:].max() > 0.1) == (second >= 0)
    assert (found.double() - exact).abs().max() < 4e-5  # twice that of the base, which has half the products


def test_adapters_in_bfloat16_are_as_near_to_float64_as_in_the_torch_decoder(library):
    exact = stacked(run(Adapted(make_decoder("llama", exact_bf16=True), torch.float64, 0), torch.float64))
    by_torch = stacked(run(Adapted(make_decoder("llama", torch.bfloat16), torch.bfloat16, 0), torch.bfloat16))
    fused = FusedCpuDecoder(make_decoder("llama", torch.bfloat16), library)
    found = stacked(run(Adapted(fused, torch.bfloat16, 0), torch.bfloat16))
    assert (found - exact).square().mean() < 1.2 * (by_torch - exact).square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_bits_with_adapters_do_not_depend_on_chunks_or_on_the_batch(library, dtype):
    plain = FusedCpuDecoder(make_decoder("llama-uneven", dtype), library)
    without = run(plain, dtype)
    adapted = Adapted(plain, dtype, -1)
    mixed = run(adapted, dtype)
    assert torch.equal(stacked(run(adapted, dtype, [[(f, at, 1)] for f, at in mixed])), stacked(mixed))
    for (
        first,
        at,
    ), logits in mixed.items():  # beside an adapter, what uses none keeps the bits of a base without slots
        assert torch.equal(logits, without[first, at]) == (first == 10)
