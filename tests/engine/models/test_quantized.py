"""Quantized weights hold what their definition says, and a quantized model's answers stay close to its own."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.attention.interface import AttentionMetadata
from engine.attention.reference import ReferenceAttention
from engine.build import build_engine, prepare_decoder, resolve_config
from engine.config import QUANTIZATIONS, EngineConfig
from engine.errors import ConfigError
from engine.kernels.fp8_linear import fp8_linear, fp8_linear_ref, round_rows_fp8
from engine.kernels.quantized_weight import (
    GROUP,
    QuantizedWeight,
    quantize_fp8,
    quantize_int4,
    quantize_int8,
    quantize_rows_fp8,
)
from engine.kernels.weight_only import weight_only_linear_ref
from engine.memory import decoder_bytes, make_kv_spec
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.quantized import (
    QUANTIZERS,
    QuantizedLinear,
    check_quantization,
    quantize_decoder,
)
from engine.models.weights import load_weights
from engine.runner.model_runner import allocate_caches
from engine.sampling_params import SamplingParams
from engine.tokenizer import Tokenizer

FOLDER = Path(__file__).parents[3] / "data" / "models" / "chat-base"
CPU = torch.device("cpu")
METHODS = pytest.mark.parametrize("method", QUANTIZATIONS)
TEXTS = {
    "Count the items: fork, lamp, onion.": "There are 3 items.",
    "Context:\n[1] Ventonni lives in Yansu.\n[2] Parase is a judge.\n\nQuestion: Where does Ventonni live?":
        "Ventonni lives in Yansu [1].",
    "Hello, how are you today?": "Hello! I am fine, thank you. How can I help you today?",
}  # fmt: skip


def _weight(out: int = 24, in_features: int = 300) -> Tensor:
    """Rows of different sizes, one of zeros; a group of positive values, one of negative ones, one value far out."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out, in_features, generator=generator) * torch.logspace(-3, 1, out)[:, None]
    weight[3] = 0.0
    weight[5, :GROUP] = weight[5, :GROUP].abs() + 1.0
    weight[6, :GROUP] = -weight[6, :GROUP].abs() - 1.0
    weight[7, 17] = 100.0
    return weight


def test_int8_is_off_by_half_a_step_at_most() -> None:
    weight = _weight()
    quantized = quantize_int8(weight)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((quantized.dequantize() - weight).abs() <= 0.5001 * step).all()
    assert quantized.values.abs().amax() == 127
    again = quantize_int8(quantized.dequantize())
    assert torch.equal(again.values, quantized.values)


def test_int4_is_off_by_half_a_step_of_its_group_at_most() -> None:
    """And by half a step more where the zero point was rounded, or the scale down, and the end of the range is cut."""
    weight = _weight()
    quantized = quantize_int4(weight)
    error = (quantized.dequantize() - weight).abs()
    for first in range(0, weight.shape[1], GROUP):
        group = weight[:, first : first + GROUP]
        step = (group.amax(1).clamp(min=0) - group.amin(1).clamp(max=0))[:, None] / 15
        assert (error[:, first : first + GROUP] <= 1.06 * step).all()
        assert (
            error[:, first : first + GROUP].mean() <= 0.28 * step.mean()
        )  # a quarter where rounding is even
    assert quantized.scales.shape == quantized.zeros.shape == (3, 24)
    assert quantized.values.shape == (24, 3 * GROUP // 2)


def test_fp8_is_off_by_a_sixteenth_at_most() -> None:
    """Three bits of mantissa; below the smallest normal number, 2^-6, steps are of 2^-9."""
    weight = _weight()
    quantized = quantize_fp8(weight)
    scale = weight.abs().amax(1, keepdim=True) / 448
    assert ((quantized.dequantize() - weight).abs() <= 2**-4 * weight.abs() + 2**-10 * scale).all()
    assert quantized.values.float().abs().amax() == 448


@pytest.mark.parametrize("quantize", [quantize_int8, quantize_int4, quantize_fp8])
def test_zeros_and_tiny_values_stay_finite_and_rows_do_not_depend_on_each_other(
    quantize: Callable[[Tensor], QuantizedWeight],
) -> None:
    weight = _weight()
    weight[4] = 1e-30
    weight[8] = 1e30
    whole = quantize(weight).dequantize()
    assert whole.isfinite().all()
    assert (whole[3] == 0).all()
    assert torch.equal(quantize(weight[5:9]).dequantize(), whole[5:9])


def test_activations_are_scaled_token_by_token() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 4, 5)[:, None]
    values, scales = quantize_rows_fp8(x)
    assert values.dtype == torch.float8_e4m3fn
    assert (values.float().abs().amax(1) == 448).all()
    assert torch.equal(scales, x.abs().amax(1) / 448)
    weight = quantize_fp8(torch.randn(8, 64, generator=torch.Generator().manual_seed(1)))
    want = (values.double() * scales.double()[:, None]) @ weight.dequantize().double().t()
    torch.testing.assert_close(fp8_linear_ref(x, weight).double(), want, rtol=1e-5, atol=1e-5)
    alone, _ = quantize_rows_fp8(x[2:3])
    assert torch.equal(alone.float(), values[2:3].float())


def test_fp8_products_agree_with_their_reference() -> None:
    """Through the same call as on a GPU; torch has a form of it for a CPU."""
    generator = torch.Generator().manual_seed(0)
    weight = quantize_fp8(torch.randn(32, 64, generator=generator))
    bias = torch.randn(32, generator=generator).bfloat16()
    x = (torch.randn(5, 64, generator=generator) * torch.logspace(-2, 2, 5)[:, None]).bfloat16()
    for given in (None, bias):
        got, want = fp8_linear(x, weight, given), fp8_linear_ref(x, weight, given)
        # Two ways of one float32 sum may be rounded to neighbouring values.
        torch.testing.assert_close(got, want, rtol=1.01 * torch.finfo(x.dtype).eps, atol=1e-4)
    out = torch.empty(5, 32, dtype=x.dtype)
    assert fp8_linear(x, weight, bias, out=out) is out
    assert torch.equal(out, fp8_linear(x, weight, bias))
    layer = QuantizedLinear(weight, bias, deterministic=False)
    assert torch.equal(layer(x), out)


def _load(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    decoder = Decoder(ModelConfig.from_folder(folder), dtype=dtype, device=CPU, max_positions=256)
    load_weights(decoder, folder)
    return decoder


@METHODS
def test_linear_layers_hold_the_rounded_values_and_nothing_else_changes(
    method: str, tiny_models: Callable[[str], Any]
) -> None:
    folder = tiny_models("llama_yarn_biased").folder
    plain, decoder = _load(folder), _load(folder)
    originals = [
        weakref.ref(parameter)
        for layer in decoder.layers
        for parameter in layer.parameters()
        if parameter.ndim == 2
    ]
    quantize_decoder(decoder, method)
    assert all(original() is None for original in originals), "a float weight is still held"
    linears = 0
    for (name, before), (same, after) in zip(
        plain.named_parameters(), decoder.named_parameters(), strict=True
    ):
        assert name == same
        if name.startswith("layers.") and before.ndim == 2:
            assert torch.equal(after, QUANTIZERS[method](before.data).dequantize()), name
            linears += 1
        else:
            assert torch.equal(after, before), name
    assert linears == 4 * len(decoder.layers)
    x = torch.randn(3, plain.config.hidden_size)
    inputs = round_rows_fp8(x) if method == "fp8" else x
    layer: Any = decoder.layers[0]
    torch.testing.assert_close(layer.qkv(x), inputs @ layer.qkv.weight.t() + layer.qkv.bias)


def test_the_output_head_is_quantized_on_request_and_a_tied_embedding_is_not(
    tiny_models: Callable[[str], Any],
) -> None:
    folder = tiny_models("llama3_gqa_tied").folder
    plain, decoder = _load(folder), _load(folder)
    quantize_decoder(decoder, "int4", lm_head=True)
    assert torch.equal(decoder.embedding, plain.embedding)
    assert torch.equal(decoder.lm_head.weight, quantize_int4(plain.embedding.data).dequantize())


def test_bytes_are_those_of_the_tensors_held(tiny_models: Callable[[str], Any]) -> None:
    tied = _load(tiny_models("llama3_gqa_tied").folder)
    assert decoder_bytes(tied) == 4 * tied.config.num_parameters + tied.rotary.nbytes
    weight, bias = _weight(256, 1000), torch.zeros(256, dtype=torch.bfloat16)
    held = {
        method: decoder_bytes(nn.ModuleList([QuantizedLinear(quantize(weight), bias, deterministic=False)]))
        - 512
        for method, quantize in QUANTIZERS.items()
    }
    assert held == {
        "int8": 256 * 1024 + 4 * 256,
        "int4": 256 * 512 + 8 * 256 * (2 + 1),  # of 8 groups a scale of two bytes and a zero point of one
        "fp8": 256 * 1000 + 4 * 256,
    }


@torch.inference_mode()
def _log_probabilities(decoder: Decoder, token_ids: list[int]) -> Tensor:
    """Of each next token after each of the text's, [n, V]."""
    length = len(token_ids)
    caches = allocate_caches(make_kv_spec(decoder.config, 256, torch.float32), 1, torch.float32, CPU)
    meta = AttentionMetadata(
        query_start=torch.tensor([0, length], dtype=torch.int32),
        seq_lens=torch.tensor([length], dtype=torch.int32),
        block_tables=torch.zeros(1, 1, dtype=torch.int32),
        slot_mapping=torch.arange(length),
        max_query_len=length,
        max_seq_len=length,
        num_decode_rows=0,
    )
    hidden = decoder(torch.tensor(token_ids), torch.arange(length), caches, meta, ReferenceAttention())
    return decoder.logits(hidden).log_softmax(-1)


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    tokenizer = Tokenizer.from_pretrained(FOLDER)
    return [
        [
            *tokenizer.apply_chat_template([{"role": "user", "content": asked}]),
            *tokenizer.encode(answer, add_special_tokens=False),
        ]
        for asked, answer in TEXTS.items()
    ]


@pytest.fixture(scope="module")
def expected(texts: list[list[int]]) -> list[Tensor]:
    decoder = _load(FOLDER)
    return [_log_probabilities(decoder, text) for text in texts]


def _divergence(decoder: Decoder, texts: list[list[int]], expected: list[Tensor]) -> float:
    """Mean KL divergence of the decoder's next-token distributions from the expected ones, in nats."""
    found = [
        (want.exp() * (want - _log_probabilities(decoder, text))).sum(-1)
        for text, want in zip(texts, expected, strict=True)
    ]
    return float(torch.cat(found).mean())


# Nats a token; measured on a CPU in float32: 0.0006, 0.089 and 0.012. With 256 inputs a layer the bundled model has far
# fewer over which the error of 4 bits evens out than the models that int4 is meant for.
MAX_DIVERGENCE = {"int8": 0.0015, "int4": 0.12, "fp8": 0.03}


@METHODS
def test_next_token_distributions_stay_close_and_a_broken_scale_shows(
    method: str, texts: list[list[int]], expected: list[Tensor]
) -> None:
    decoder = _load(FOLDER)
    quantize_decoder(decoder, method)
    close = _divergence(decoder, texts, expected)
    layer: Any = decoder.layers[3]
    layer.qkv.weight *= 1.5  # as if the scales of one product in 32 were wrong by half
    broken = _divergence(decoder, texts, expected)
    print(f"{method}: {close:.4f} nats a token, with a broken scale {broken:.4f}")
    assert close <= MAX_DIVERGENCE[method] < broken


def _engine_config(method: str, **settings: Any) -> EngineConfig:
    return EngineConfig(
        model=str(FOLDER), dtype="float32", device="cpu", quantization=method, max_model_len=256, num_blocks=64,
        num_threads=1, **settings,
    )  # fmt: skip


# fp8 in the reference's order of summation only: a value that another order moves by its last bit may be rounded to
# another of fp8's few numbers, and what follows from it is as large as fp8's own error.
@pytest.mark.parametrize(
    ("method", "backend", "deterministic"),
    [("int8", "auto", False), ("int8", "auto", True), ("int4", "auto", False), ("int4", "reference", False),
     ("fp8", "reference", False)],
)  # fmt: skip
def test_an_engine_computes_with_the_quantized_weights(
    method: str, backend: str, deterministic: bool, texts: list[list[int]], expected: list[Tensor]
) -> None:
    engine = build_engine(_engine_config(method, attention_backend=backend, deterministic=deterministic))
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    engine.add(engine.make_request(texts[1], params, request_id="a"))
    found: list[float] = []
    while engine.has_work:
        for delta in engine.step().deltas:
            assert delta.error is None, delta.error
            found.extend(entry.logprob for entry in delta.prompt_logprobs)
    engine.close()
    decoder = _load(FOLDER)
    quantize_decoder(decoder, method)
    following = torch.tensor(texts[1][1:])[:, None]
    want, plain = (
        each[:-1].gather(1, following)[:, 0] for each in (_log_probabilities(decoder, texts[1]), expected[1])
    )
    torch.testing.assert_close(torch.tensor(found), want, rtol=0, atol=1e-3)
    assert (want - plain).abs().amax() > 0.02, "the model answers as without quantization"


def test_only_the_decoder_that_rounds_activations_serves_fp8() -> None:
    for method, rounds in (("fp8", True), ("int8", False)):
        config = resolve_config(_engine_config(method))
        decoder = _load(FOLDER)
        quantize_decoder(decoder, method)
        assert isinstance(prepare_decoder(decoder, config), Decoder) == (
            rounds or config.attention_backend != "cpu"
        )


def test_an_unknown_method_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="int8, int4, fp8") as caught:
        EngineConfig(model="any", quantization="int3")
    assert caught.value.param == "quantization"


@pytest.mark.parametrize(
    ("method", "dtype"), [("int8", torch.float32), ("int4", torch.float64), ("fp8", torch.float16)]
)
def test_a_dtype_that_the_kernels_lack_is_refused_on_a_gpu_and_not_on_a_cpu(
    method: str, dtype: torch.dtype, tiny_models: Callable[[str], Any]
) -> None:
    model = ModelConfig.from_folder(tiny_models("llama3_gqa_tied").folder)
    with pytest.raises(ConfigError, match="bfloat16") as caught:
        check_quantization(method, model, dtype=dtype, device=torch.device("cuda"), deterministic=False)
    assert caught.value.param == "dtype"
    check_quantization(method, model, dtype=dtype, device=CPU, deterministic=False)


def test_a_reference_rounds_once() -> None:
    weight = quantize_int8(_weight())
    x = torch.randn(4, 300, generator=torch.Generator().manual_seed(2)).bfloat16()
    want = (x.double() @ weight.dequantize().double().t()).bfloat16()
    torch.testing.assert_close(weight_only_linear_ref(x, weight), want, rtol=2**-7, atol=1e-4)
