"""Writes the GPTQ and AWQ checkpoints beside it with their formats' own libraries, on a CPU:

    pip install --no-deps --target DIR auto-gptq==0.7.1 autoawq==0.2.9
    PYTHONPATH=DIR python tests/engine/quantization/write_checkpoints.py FOLDER

Both libraries are at rest and need older transformers than ours; their packing modules alone still load, without the packages'
own `__init__`. `digests.json` holds the SHA-256 of every weight as the library itself dequantizes it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

GROUP = 32
VALUES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": True,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def find_library(name: str) -> Path | None:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def gptq_linear() -> Any:
    """AutoGPTQ's layer that packs and unpacks in torch."""
    folder = find_library("auto_gptq")
    assert folder is not None, "auto-gptq is not installed"
    spec = importlib.util.spec_from_file_location(
        "qlinear_cuda", folder / "nn_modules" / "qlinear" / "qlinear_cuda.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.QuantLinear


def awq_modules() -> tuple[Any, Any]:
    """AutoAWQ's layer, and its dequantization."""
    folder = find_library("awq") if "awq" not in sys.modules else Path(sys.modules["awq"].__path__[0])
    assert folder is not None, "autoawq is not installed"
    for name, path in {
        "awq": folder,
        "awq.modules": folder / "modules",
        "awq.modules.linear": folder / "modules/linear",
    }.items():
        package = types.ModuleType(name)
        package.__path__ = [str(path)]
        sys.modules[name] = package
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    return WQLinear_GEMM, dequantize_gemm


def ranges(weight: Tensor, group_of: Tensor, bits: int, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales float16 and zero points by output and group, from the largest and smallest value of each."""
    top = 2**bits - 1
    scales, zeros = [], []
    for group in range(int(group_of.max()) + 1):
        part = weight[:, group_of == group].float()
        low, high = part.amin(1).clamp(max=0.0), part.amax(1).clamp(min=0.0)
        if symmetric:
            high = torch.maximum(high, -low)
            low = -high
        scale = ((high - low) / top).half().float()
        zeros.append(
            torch.full_like(scale, (top + 1) / 2) if symmetric else (-low / scale).round().clamp(1, top)
        )
        scales.append(scale)
    return torch.stack(scales, 1), torch.stack(zeros, 1)


Packed = tuple[dict[str, Tensor], Tensor]


def pack_gptq(
    linear: nn.Linear, *, bits: int, group_size: int, symmetric: bool, ordered: bool, seed: int
) -> Packed:
    """A layer as AutoGPTQ stores it, and the weight that it makes of that."""
    size = linear.in_features if group_size < 0 else group_size
    group_of = torch.arange(linear.in_features) // size
    if ordered:
        group_of = group_of[torch.randperm(len(group_of), generator=torch.Generator().manual_seed(seed))]
    group_of = group_of.int()
    scales, zeros = ranges(linear.weight, group_of, bits, symmetric=symmetric)
    # in float32, as its own quantizer works, and its scales as it saves them
    wide = nn.Linear(linear.in_features, linear.out_features, bias=False)
    wide.weight.data = linear.weight.data.float()
    layer = gptq_linear()(bits, group_size, linear.in_features, linear.out_features, False)
    layer.pack(wide, scales, zeros, group_of)
    layer.scales = layer.scales.half()
    weight = layer(torch.eye(linear.in_features, dtype=torch.float16)).t()
    names = ("qweight", "qzeros", "scales", "g_idx")
    tensors = {name: getattr(layer, name) for name in names}
    return {**tensors, "bias": torch.zeros(linear.out_features, dtype=torch.float16)}, weight


def pack_awq(linear: nn.Linear) -> Packed:
    """A layer as AutoAWQ stores it, and the weight that it makes of that."""
    kind, dequantize = awq_modules()
    group_of = torch.arange(linear.in_features) // GROUP
    scales, zeros = ranges(linear.weight, group_of, 4, symmetric=False)
    layer = kind.from_linear(
        linear, 4, GROUP, scales=scales.t().contiguous().half(), zeros=zeros.t().contiguous()
    )
    tensors = {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales")}
    return tensors, dequantize(layer.qweight, layer.qzeros, layer.scales, 4, GROUP).t()


def _gptq(**settings: Any) -> tuple[dict[str, Any], Callable[[nn.Linear, int], Packed]]:
    config = {
        "quant_method": "gptq", "bits": settings["bits"], "group_size": settings["group_size"],
        "desc_act": settings["ordered"], "sym": settings["symmetric"], "true_sequential": True, "damp_percent": 0.01,
    }  # fmt: skip
    return config, lambda linear, seed: pack_gptq(linear, seed=seed, **settings)


WRITERS = {
    "gptq-4bit-act-order": _gptq(bits=4, group_size=GROUP, symmetric=False, ordered=True),
    "gptq-4bit-symmetric-row": _gptq(bits=4, group_size=-1, symmetric=True, ordered=False),
    "gptq-8bit": _gptq(bits=8, group_size=GROUP, symmetric=False, ordered=False),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True,
         "modules_to_not_convert": ["up_proj"]},
        lambda linear, seed: pack_awq(linear),
    ),
}  # fmt: skip


@torch.no_grad()
def write(name: str, folder: Path) -> None:
    """One checkpoint: config.json, model.safetensors, digests.json."""
    settings, pack = WRITERS[name]
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**VALUES)).half()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0.0, 1.5 / parameter.shape[1] ** 0.5)
    tensors = {key: value for key, value in model.state_dict().items() if key != "lm_head.weight"}
    digests = {}
    for index, (path, linear) in enumerate(model.named_modules()):
        if not isinstance(linear, nn.Linear) or path == "lm_head":
            continue
        if any(part in path for part in settings.get("modules_to_not_convert", ())):
            continue
        del tensors[f"{path}.weight"]
        packed, weight = pack(linear, index)
        tensors |= {f"{path}.{part}": value.contiguous() for part, value in packed.items()}
        assert weight.dtype == torch.float16
        digests[f"{path}.weight"] = hashlib.sha256(weight.detach().contiguous().numpy().tobytes()).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    config = {
        **VALUES,
        "architectures": ["LlamaForCausalLM"],
        "torch_dtype": "float16",
        "quantization_config": settings,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "digests.json").write_text(json.dumps(digests, indent=1))


if __name__ == "__main__":
    for each in WRITERS:
        write(each, Path(sys.argv[1]) / each)
