"""Quantize a loaded decoder: the weights of its linear layers become int8, int4 or fp8; what is quantized, and what for.

On a GPU the layers are replaced by ones that hold the quantized weights and multiply with them. On a CPU there is
nothing to gain in speed: the layers keep float weights that hold the rounded values, so that every other path (the fused
decoder too) computes with them as they are, and a method's quality can be judged on any machine. Norms and the embedding
stay as they are, and so does the output head unless it is asked for.

Boundary: weights that were loaded in float. Formats: `engine.kernels.quantized_weight`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from engine.errors import ConfigError
from engine.kernels.fp8_linear import FEATURE_MULTIPLE, MIN_CAPABILITY, fp8_linear, round_rows_fp8
from engine.kernels.quantized_weight import (
    Fp8Weight,
    Int4Weight,
    QuantizedWeight,
    quantize_fp8,
    quantize_int4,
    quantize_int8,
)
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.layers import Linear

QUANTIZERS: dict[str, Callable[[Tensor], QuantizedWeight]] = {
    "int8": quantize_int8,
    "int4": quantize_int4,
    "fp8": quantize_fp8,
}


class QuantizedLinear(nn.Module):
    """``x @ W.T + bias`` on a GPU with W quantized. The tensors are buffers: whoever counts a module's bytes finds them."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, *, deterministic: bool) -> None:
        super().__init__()
        self.weight = weight
        self.deterministic = deterministic
        self.register_buffer("values", weight.values)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("zeros", weight.zeros if isinstance(weight, Int4Weight) else None)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        bias = cast("Tensor | None", self.bias)
        if isinstance(self.weight, Fp8Weight):
            return fp8_linear(x, self.weight, bias)
        from engine.kernels.weight_only import weight_only_linear

        return weight_only_linear(x, self.weight, bias, deterministic=self.deterministic)


class RoundedInputLinear(Linear):
    """A linear layer whose inputs are rounded row by row to fp8 and back: W8A8 where no device multiplies fp8."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(round_rows_fp8(x))


def check_quantization(
    method: str, model: ModelConfig, *, dtype: torch.dtype, device: torch.device, deterministic: bool
) -> None:
    """Check that a device computes a method at a dtype, before any weight is read. A CPU takes all of them.

    Raises:
        ConfigError: naming what it would take; a model with experts, whose weights have no quantized product.
    """
    if model.moe is not None:
        raise ConfigError(
            f"quantization {method!r} of a mixture of {model.moe.num_experts} experts is not supported",
            value=method,
            limit=None,
            param="quantization",
            remedy="Set quantization=None.",
        )
    if device.type != "cuda":
        return
    dtypes = (torch.bfloat16,) if method == "fp8" else (torch.bfloat16, torch.float16)
    if dtype not in dtypes:
        allowed = [str(each).removeprefix("torch.") for each in dtypes]
        raise ConfigError(
            f"quantization {method!r} does not multiply {str(dtype).removeprefix('torch.')}",
            value=str(dtype).removeprefix("torch."),
            limit=allowed,
            param="dtype",
            remedy=f"Set dtype={allowed[0]!r}.",
        )
    if method == "fp8":
        _check_fp8(model, device, deterministic)


def _check_fp8(model: ModelConfig, device: torch.device, deterministic: bool) -> None:
    capability = torch.cuda.get_device_capability(device)
    heads = model.num_heads * model.head_size
    sizes = (
        model.hidden_size, model.intermediate_size, heads, heads + 2 * model.num_kv_heads * model.head_size,
    )  # fmt: skip
    if capability < MIN_CAPABILITY:
        reason = f"{device} has compute capability {capability[0]}.{capability[1]}, fp8 products need 8.9"
    elif deterministic:
        reason = "fp8 products depend on the number of tokens beside, which deterministic excludes"
    elif any(size % FEATURE_MULTIPLE for size in sizes):
        reason = f"fp8 products need sizes that are multiples of {FEATURE_MULTIPLE}, the model has {sizes}"
    else:
        return
    raise ConfigError(
        reason, value="fp8", limit=("int8", "int4"), param="quantization", remedy='Set quantization="int8".'
    )


def check_checkpoint(method: str | None, model: ModelConfig) -> None:
    """Refuse to quantize weights that are quantized already.

    Raises:
        ConfigError: naming the checkpoint's method.
    """
    if method is not None and model.quantization is not None:
        raise ConfigError(
            f"quantization {method!r} does not go with a checkpoint that is quantized already ({model.quantization.method})",
            value=method,
            limit=None,
            param="quantization",
            remedy="Leave quantization out, or use the unquantized checkpoint of the model.",
        )


def held_forms(
    model: ModelConfig, *, dtype: torch.dtype, device: torch.device, deterministic: bool
) -> frozenset[str]:
    """The forms in which layers of a quantized checkpoint stay on this device; a CPU computes with floats, and so does what
    was a GGUF file, whose blocks none of them holds."""
    if model.quantization is None or not model.quantization.groups or device.type != "cuda":
        return frozenset()
    found = set()
    for method in QUANTIZERS:
        with contextlib.suppress(ConfigError):
            check_quantization(method, model, dtype=dtype, device=device, deterministic=deterministic)
            found.add(method)
    return frozenset(found)


def set_deterministic(decoder: Decoder, deterministic: bool) -> None:
    """Products with quantized weights give a row the same bits whatever shares its step, or not."""
    for module in decoder.modules():
        if isinstance(module, QuantizedLinear):
            module.deterministic = deterministic


def quantize_decoder(
    decoder: Decoder, method: str, *, deterministic: bool = False, lm_head: bool = False
) -> None:
    """Quantize the linear layers in place, "int8", "int4" or "fp8", one decoder layer after the other; each float weight
    is given up before the next layer's is read.

    Deterministic: layers on a GPU give a row the same bits whatever shares its step. On a CPU the rounded values are
    rounded once more, to the decoder's dtype. `lm_head`: the output head too; a tied one leaves the embedding as it is.
    """
    for layer in decoder.layers:
        for name, child in list(layer.named_children()):
            if isinstance(child, Linear):
                setattr(layer, name, _quantize_linear(child, method, deterministic))
    if lm_head:
        decoder.lm_head = cast(Linear, _quantize_linear(decoder.lm_head, method, deterministic))


def _quantize_linear(linear: Linear, method: str, deterministic: bool) -> nn.Module:
    weight = QUANTIZERS[method](linear.weight.data)
    if linear.weight.device.type == "cuda":
        bias = None if linear.bias is None else linear.bias.data
        return QuantizedLinear(weight, bias, deterministic=deterministic)
    rounded = nn.Parameter(weight.dequantize().to(linear.weight.dtype), requires_grad=False)
    kind = RoundedInputLinear if method == "fp8" else Linear
    kept = kind(
        rounded.shape[1], rounded.shape[0], bias=False, dtype=rounded.dtype, device=torch.device("meta")
    )
    kept.weight, kept.bias = rounded, linear.bias
    return kept
