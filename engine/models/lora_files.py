"""Read a LoRA adapter from a PEFT folder: adapter_config.json and adapter_model.safetensors.

Strict: every tensor has its place in the decoder, A and B come in pairs of the rank that the config says, and whatever the
config asks for that is not plain LoRA is refused, because it would be a part of the adapter that is not computed. Ranks and
alphas may differ by module (`rank_pattern`, `alpha_pattern`); with rsLoRA the scale is alpha / sqrt(rank).

Boundary: host memory only, no pickle, no download. An adapter names its base by path or hub id, which says nothing
certain: names and shapes of its tensors decide. Source: PEFT, `LoraConfig` and `get_pattern_key`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from engine.errors import CorruptWeightsError, ModelNotFoundError, UnsupportedAdapterError
from engine.models.lora import AdapterWeights, Place, SlotLayout, scale_dtype

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
FILES = (CONFIG_NAME, WEIGHTS_NAME)
PREFIX = "base_model.model."
# What changes an adapter's arithmetic beyond plain LoRA, by the config's key, and the values that leave it plain.
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (None, False),
    "use_qalora": (None, False),
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "fan_in_fan_out": (None, False),
    # The others change the base's weights when training starts, and the adapter is the difference to that.
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}  # fmt: skip
_TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


def read_adapter(folder: Path | str, layout: SlotLayout, dtype: torch.dtype) -> AdapterWeights:
    """An adapter's weights in the layout of a slot, converted to `dtype`.

    Raises:
        ModelNotFoundError: the folder does not hold both files.
        CorruptWeightsError: a file that cannot be read, a missing half, values that are not finite.
        UnsupportedAdapterError: what the engine does not compute, a rank beyond the limit, or another base.
    """
    raw_config, raw_weights = (_bytes_of(Path(folder), name) for name in FILES)
    config = _parse_config(raw_config)
    tensors = _parse_tensors(raw_weights)
    values = torch.zeros(layout.num_values, dtype=dtype)
    scales = torch.zeros(layout.num_scales, dtype=scale_dtype(dtype))
    largest = 0
    for module, (a, b) in _pairs(tensors).items():
        place = layout.places.get(module)
        if place is None:
            raise UnsupportedAdapterError(
                f"the adapter changes {module}, which this engine does not adapt or this model does not have",
                value=module,
                limit=sorted({name.split(".", 3)[3] for name in layout.places}),
                param="lora",
                remedy="Load it on the base that it was trained on, with projections of attention and MLP as its targets.",
            )
        rank = _check_pair(module, a, b, place, config, layout.rank)
        _put(values, a, place.a, place.size_in)
        _put(values, b, place.b, layout.rank)
        scales[place.scale] = _scale(config, module, rank)
        largest = max(largest, rank)
    if not (values.isfinite().all() and scales.isfinite().all()):
        raise _corrupt(f"{WEIGHTS_NAME} has values that are not finite in {dtype}", folder)
    return AdapterWeights(values, scales, _digest(raw_config, raw_weights), largest)


def _put(values: Tensor, matrix: Tensor, start: int, width: int) -> None:
    """Write a matrix to rows of `width` values; of what is wider than the matrix the rest stays zero."""
    rows, columns = matrix.shape
    values[start : start + rows * width].view(rows, width)[:, :columns] = matrix


def _bytes_of(folder: Path, name: str) -> bytes:
    """The whole file at once: what is digested is what is loaded."""
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise ModelNotFoundError(
            f"{name} cannot be read from {folder} ({error.strerror})",
            value=str(folder),
            limit=list(FILES),
            param="lora",
            remedy="Name a folder that PEFT's save_pretrained wrote, with safetensors.",
        ) from error


def _parse_config(raw: bytes) -> dict[str, Any]:
    try:
        config = json.loads(raw)
        if not isinstance(config, dict):
            raise ValueError("it is no JSON object")
    except ValueError as error:
        raise _corrupt(f"{CONFIG_NAME} cannot be read ({error})", None) from error
    for key, plain in PLAIN.items():
        if config.get(key) not in plain:
            raise UnsupportedAdapterError(
                f"the adapter has {key}={config.get(key)!r}, which is not computed here",
                value=config.get(key),
                limit=list(plain),
                param="lora",
                remedy="Train plain LoRA, or merge the adapter into its base and load that as a model.",
            )
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise _corrupt(f"{CONFIG_NAME}: {key} is no mapping", config.get(key))
    return config


def _parse_tensors(raw: bytes) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load(raw)
    except SafetensorError as error:
        raise _corrupt(f"{WEIGHTS_NAME} cannot be read as safetensors ({error})", len(raw)) from error
    return tensors


def _pairs(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by module."""
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = _TENSOR.fullmatch(name.removeprefix(PREFIX))
        if found is None or not name.startswith(PREFIX) or not tensor.is_floating_point() or tensor.ndim != 2:
            raise UnsupportedAdapterError(
                f"{WEIGHTS_NAME} holds {name} {tuple(tensor.shape)} {tensor.dtype}, which is no A or B of a linear layer",
                value=name,
                limit=f"{PREFIX}<module>.lora_A.weight, {PREFIX}<module>.lora_B.weight",
                param="lora",
                remedy="Train plain LoRA of linear layers.",
            )
        halves.setdefault(found["module"], {})[found["side"]] = tensor
    lonely = [module for module, sides in halves.items() if len(sides) != 2]
    if lonely or not halves:
        raise _corrupt(
            f"{WEIGHTS_NAME} does not hold both A and B of {lonely[0] if lonely else 'any module'}", lonely
        )
    return {module: (sides["A"], sides["B"]) for module, sides in halves.items()}


def _check_pair(
    module: str, a: Tensor, b: Tensor, place: Place, config: Mapping[str, Any], max_rank: int
) -> int:
    """The rank of a module's A [r, in] and B [out, r]."""
    rank, expected = a.shape[0], (a.shape[0], place.size_in, place.size_out, a.shape[0])
    if (*a.shape, *b.shape) != expected:
        raise UnsupportedAdapterError(
            f"{module}: A {tuple(a.shape)} and B {tuple(b.shape)} do not belong to a layer of this base, which has "
            f"{place.size_in} inputs and {place.size_out} outputs",
            value=(tuple(a.shape), tuple(b.shape)),
            limit=((rank, place.size_in), (place.size_out, rank)),
            param="lora",
            remedy="Load the adapter on the base that it was trained on.",
        )
    if not 1 <= rank <= max_rank:
        raise UnsupportedAdapterError(
            f"{module}: rank {rank} is beyond max_lora_rank {max_rank}",
            value=rank,
            limit=max_rank,
            param="max_lora_rank",
            remedy=f"Build the engine with max_lora_rank of at least {rank}.",
        )
    declared = _of_module(config, "rank_pattern", module, config.get("r"))
    if declared != rank:
        raise _corrupt(f"{module}: {CONFIG_NAME} says rank {declared!r}, the tensors have {rank}", declared)
    return rank


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = _of_module(config, "alpha_pattern", module, config.get("lora_alpha"))
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise _corrupt(f"{CONFIG_NAME} has no lora_alpha for {module}", alpha)
    return float(alpha / rank**0.5 if config.get("use_rslora") else alpha / rank)


def _of_module(config: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    """A pattern is a regular expression that matches the end of a module's name from a dot on; the first that does counts."""
    for pattern, value in (config.get(key) or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise _corrupt(
                f"{CONFIG_NAME}: {key} has no regular expression {pattern!r} ({error})", pattern
            ) from error
    return default


def _digest(*contents: bytes) -> str:
    """SHA-256 over the names and digests of both files: what the workbench calls the adapter's digest too."""
    lines = [
        f"{name}\0{sha256(content).hexdigest()}\n" for name, content in zip(FILES, contents, strict=True)
    ]
    return sha256("".join(lines).encode()).hexdigest()


def _corrupt(message: str, value: Any) -> CorruptWeightsError:
    return CorruptWeightsError(
        message, value=value, param="lora", remedy="Save the adapter again, or point to an intact copy of it."
    )
