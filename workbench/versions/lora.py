"""Low-rank adapters in plain torch: put them on a model's linear layers, take them off as PEFT-named tensors.

A layer computes W x + (alpha / rank) B A x with W frozen; B starts at zero, so training starts at the base. Names on disk are
PEFT's (`base_model.model.<module>.lora_A.weight`). It neither trains (`finetune`) nor merges (`merge`).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import nn

from workbench.versions.adapter import CONFIG_NAME, WEIGHTS_NAME
from workbench.versions.errors import FinetuneConfigError

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PREFIX = "base_model.model."


class LoraLinear(nn.Module):
    """A frozen linear layer with a trainable low-rank update. `lora_A` [r, in], `lora_B` [out, r], fp32."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = alpha / rank
        start = torch.empty(rank, base.in_features)
        # PEFT's start: uniform within ±1/sqrt(in_features), the same on every device
        start.uniform_(-1.0, 1.0, generator=generator).div_(math.sqrt(base.in_features))
        device = base.weight.device
        self.lora_A = nn.Parameter(start.to(device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = nn.functional.linear(x, self.lora_A.to(x.dtype))
        update = nn.functional.linear(low, self.lora_B.to(x.dtype)) * self.scale
        result: torch.Tensor = self.base(x) + update
        return result


def inject(
    model: nn.Module, *, rank: int, alpha: float, targets: Iterable[str], seed: int
) -> dict[str, LoraLinear]:
    """Replaces every linear layer whose last name is a target, in place; everything else is frozen. By module name.

    Raises:
        FinetuneConfigError: no layer has one of these names.
    """
    wanted = set(targets)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in wanted
    ]
    missing = wanted - {name.rpartition(".")[2] for name, _ in found}
    if missing:
        raise FinetuneConfigError(
            f"the model has no linear layer named {sorted(missing)}", value=sorted(missing), param="targets",
            remedy="Name layers of this model, for example q_proj and v_proj.",
        )  # fmt: skip
    layers: dict[str, LoraLinear] = {}
    for name, module in found:
        parent, _, last = name.rpartition(".")
        layers[name] = LoraLinear(module, rank, alpha, generator)
        setattr(model.get_submodule(parent), last, layers[name])
    return layers


@torch.no_grad()
def load_layers(layers: dict[str, LoraLinear], adapter: Path) -> None:
    """Fills the layers from an adapter's file.

    Raises:
        FinetuneConfigError: it has other layers or another rank.
    """
    tensors = load_file(adapter / WEIGHTS_NAME)
    for name, layer in layers.items():
        for part, parameter in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            given = tensors.pop(f"{PREFIX}{name}.{part}.weight", None)
            if given is None or given.shape != parameter.shape:
                raise FinetuneConfigError(
                    f"{adapter} has no {part} of {name} with shape {tuple(parameter.shape)}", value=str(adapter),
                    limit=tuple(parameter.shape), param="start", remedy="Use the adapter's own rank and layers.",
                )  # fmt: skip
            parameter.copy_(given)
    if tensors:
        raise FinetuneConfigError(
            f"{adapter} has layers that are not trained here, first {next(iter(tensors))}", value=str(adapter),
            param="start", remedy="Use the adapter's own rank and layers.",
        )  # fmt: skip


def save_adapter(
    layers: dict[str, LoraLinear],
    folder: Path,
    *,
    rank: int,
    alpha: float,
    targets: Iterable[str],
    base_name: str,
    base_digest: str,
    dtype: torch.dtype,
) -> None:
    """Writes the two files of an adapter into an existing folder; not atomic, so give it a staging folder."""
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach().to("cpu", dtype).contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B.detach().to("cpu", dtype).contiguous()
    metadata = {"format": "pt", "base_digest": base_digest}
    (folder / WEIGHTS_NAME).write_bytes(_with_metadata(save(tensors), metadata))
    config: dict[str, Any] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "r": rank,
        "lora_alpha": alpha, "lora_dropout": 0.0, "target_modules": sorted(targets), "bias": "none",
        "fan_in_fan_out": False, "init_lora_weights": True, "inference_mode": True, "modules_to_save": None,
        "use_dora": False, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "layers_pattern": None,
        "layers_to_transform": None, "auto_mapping": None, "revision": None,
    }  # fmt: skip
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _with_metadata(content: bytes, metadata: dict[str, str]) -> bytes:
    """A safetensors file with metadata in a fixed order: the library's own order changes from call to call, and the digest with it."""
    (length,) = struct.unpack("<Q", content[:8])
    header = {"__metadata__": metadata, **json.loads(content[8 : 8 + length])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + content[8 + length :]
