"""Write a quantized copy of a model as a compressed-tensors checkpoint, through that library: this engine and vLLM load it.

No data is needed: scales are those of each row's or group's range. int8 and int4 are of the weights alone; fp8 is of what they
multiply too, row by row as it comes. Boundary: the whole model is in memory meanwhile; the embedding and the output head stay
as they are. Quality: ``engine.bench.parts.quality``.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from engine.errors import ConfigError, UnsupportedModelError
from engine.models.config import ModelConfig

GROUPS = (128, 64, 32)  # inputs that share an int4 scale: the first that divides every layer's
SIDE_FILES = ("tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
              "generation_config.json", "LICENSE*")  # fmt: skip


def write_compressed(source: Path, target: Path, method: str) -> None:
    """Quantize the model of folder `source` by "int8", "int4" or "fp8" into the new folder `target`.

    Raises:
        ConfigError: `target` holds files, or the library is not installed.
        UnsupportedModelError: a model that is quantized already or a GGUF file, or inputs that no group size divides.
    """
    model = ModelConfig.from_folder(source)
    if model.quantization is not None or source.is_file():
        raise UnsupportedModelError(
            f"{source} is quantized already, or a GGUF file", value=str(source), limit="a folder of *.safetensors in floats",
            param="model", remedy="Use the unquantized checkpoint of the model.",
        )  # fmt: skip
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(
            f"{target} is there already", value=str(target), param="output", remedy="Name a new folder."
        )
    _require_library()
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    config = QuantizationConfig(config_groups={"group_0": _scheme(method, model)}, ignore=["lm_head"])
    apply_quantization_config(loaded, config, show_progress=False)
    with torch.no_grad():
        for module in loaded.modules():
            if getattr(module, "quantization_scheme", None) is not None:
                _set_scales(module)
    compressor = ModelCompressor.from_pretrained_model(loaded)
    compressor.compress_model(loaded)
    loaded.save_pretrained(target)
    compressor.update_config(str(target))
    for pattern in SIDE_FILES:
        for file in source.glob(pattern):
            shutil.copy2(file, target / file.name)


def _require_library() -> None:
    try:
        import compressed_tensors  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "compressed-tensors is not installed, which writes these checkpoints", value="compressed-tensors",
            param="output", remedy="pip install 'quire[quantize]'",
        ) from error  # fmt: skip


def _scheme(method: str, model: ModelConfig) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    inputs = None
    if method == "int4":
        # Symmetric: transformers 5.23 does not load zero points in the form that compressed-tensors 0.20 writes them.
        weights = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=_group_size(model))
    elif method == "int8":
        weights = QuantizationArgs(num_bits=8, type="int", strategy="channel")
    else:
        weights = QuantizationArgs(num_bits=8, type="float", strategy="channel")
        inputs = QuantizationArgs(num_bits=8, type="float", strategy="token", dynamic=True)
    return QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)


def _group_size(model: ModelConfig) -> int:
    inputs = (model.hidden_size, model.num_heads * model.head_size, model.intermediate_size)
    for size in GROUPS:
        if all(n % size == 0 for n in inputs):
            return size
    raise UnsupportedModelError(
        f"no group size of {GROUPS} divides the layers' inputs {inputs}", value=inputs, limit=GROUPS, param="method",
        remedy="Use method int8 or fp8.",
    )  # fmt: skip


def _set_scales(module: Any) -> None:
    from compressed_tensors.quantization.utils import calculate_qparams

    args, weight = module.quantization_scheme.weights, module.weight.data
    parts = weight[:, None] if args.strategy == "channel" else weight.unflatten(1, (-1, args.group_size))
    scales, _ = calculate_qparams(parts.amin(-1), parts.amax(-1), args)
    module.weight_scale.data.copy_(scales)
