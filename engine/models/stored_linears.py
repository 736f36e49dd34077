"""StoredLinears: the linear layers of a quantized checkpoint, gathered from its files and put into a decoder one by one.

A layer's tensors stay where their file is mapped until all files were looked through. Then each linear module of the decoder
is filled in turn: with our own quantized weight where the decoder holds that form and all that it joins has it, else with
floats. At most one module's weight exists in both forms.

Boundary: which tensor is whose, and where it ends up. Files are ``engine.models.weights``'s, formats ``engine.quantization``'s.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from engine.errors import CorruptWeightsError
from engine.kernels.quantized_weight import Fp8Weight, Int4Weight, Int8Weight, QuantizedWeight
from engine.models.decoder import Decoder, DecoderLayer
from engine.models.quantized import QuantizedLinear
from engine.quantization.checkpoint import LinearFormat
from engine.quantization.schemes import SCHEMES, UNUSED
from engine.quantization.stored_weight import StoredWeight, merge

log = logging.getLogger(__name__)
_FORMS = {Int4Weight: "int4", Int8Weight: "int8", Fp8Weight: "fp8"}


class StoredLinears:
    """Takes the tensors that make quantized weights, and those whose place in the decoder has no memory yet."""

    def __init__(self, decoder: Decoder, targets: Mapping[str, Tensor]) -> None:
        self._decoder = decoder
        self._targets = targets
        self._formats: dict[str, LinearFormat] = {}  # by the weight's name, for those that are quantized
        # Of each expected tensor: the weight, and which part of it.
        self._owners: dict[str, tuple[str, str]] = {}
        self._parts: dict[str, dict[str, Tensor]] = {}
        self.names: set[str] = set()  # of the weights that this fills
        quantization = decoder.config.quantization
        if quantization is None:
            return
        for name, target in targets.items():
            layer = name.removesuffix(".weight")
            is_linear = target.ndim == 2 and layer != decoder.names.embedding
            found = quantization.format_of(layer) if is_linear else None
            if found is not None:
                self._formats[name] = found
                for part in SCHEMES[found.scheme].tensors:
                    self._owners[f"{layer}.{part}"] = (name, part)
            elif target.is_meta:
                self._owners[name] = (name, "weight")
        self.names = {name for name, _ in self._owners.values()}

    def take(self, name: str, read: Callable[[], Tensor]) -> bool:
        """Keep a checkpoint's tensor if it is part of a layer here, or nothing that is computed; False: it is neither."""
        owner = self._owners.get(name)
        if owner is not None:
            if owner[1] in self._parts.get(owner[0], {}):
                raise CorruptWeightsError(
                    f"{name} is in one weight file and again in another", value=name, param="model",
                    remedy="Download the model again.",
                )  # fmt: skip
            self._parts.setdefault(owner[0], {})[owner[1]] = read()
            return True
        if not self._formats:
            return False
        layer, _, last = name.rpartition(".")
        # AutoGPTQ gives every layer a bias, of zeros where the model has none.
        is_empty_bias = last == "bias" and f"{layer}.weight" in self._formats and name not in self._targets
        return last in UNUSED or (is_empty_bias and not bool(read().any()))

    def missing(self) -> list[str]:
        """Expected tensors that no file held."""
        return sorted(
            name
            for name, (weight, part) in self._owners.items()
            if part not in self._parts.get(weight, {}) and not self._may_lack(weight, part)
        )

    def _may_lack(self, weight: str, part: str) -> bool:
        found = self._formats.get(weight)
        if found is None:
            return False
        return part in SCHEMES[found.scheme].optional and (part != "weight_zero_point" or found.symmetric)

    def fill(self, tell: Callable[[float], None]) -> None:
        """Put every weight into the decoder; `tell` gets the share that is done.

        Raises:
            CorruptWeightsError: tensors whose shapes do not make the layer's weight.
        """
        num_held = sum(self._fill_modules(tell)) if self._decoder.held_forms else 0
        rest = [name for name in self._targets if name in self.names and not self._targets[name].is_meta]
        for index, name in enumerate(rest):
            self._fill_floats(self._targets[name], name)
            tell((index + 1) / len(rest))
        quantization = self._decoder.config.quantization
        if quantization is not None:
            log.info(
                "%d linear layers are stored as %s: %d hold their quantized weights, the others became floats",
                len(self._formats), quantization.method, num_held,
            )  # fmt: skip

    def _fill_modules(self, tell: Callable[[float], None]) -> Iterator[int]:
        """Fill the modules whose weights have no memory; yields how many of the checkpoint's layers stay quantized in each."""
        layers = self._decoder.layers
        for index, layer in enumerate(layers):
            assert isinstance(layer, DecoderLayer)
            for module, parts in layer.merged_linears(self._decoder.names).items():
                prefix = f"{self._decoder.names.layers}.{index}"
                yield self._fill_module(layer, module, [f"{prefix}.{part}.weight" for part, _ in parts])
            tell((index + 1) / len(layers))

    def _fill_module(self, layer: DecoderLayer, module: str, names: list[str]) -> int:
        linear = getattr(layer, module)
        held = self._fused(names)
        if held is not None:
            bias = None if linear.bias is None else linear.bias.data
            setattr(layer, module, QuantizedLinear(held, bias, deterministic=False))
            return len(names)
        empty = torch.empty_like(linear.weight, device=self._decoder.embedding.device)
        linear.weight = nn.Parameter(empty, requires_grad=False)
        first = 0
        for name in names:
            size = self._targets[name].shape[0]
            self._fill_floats(linear.weight.data[first : first + size], name)
            first += size
        return 0

    def _fused(self, names: list[str]) -> QuantizedWeight | None:
        """The joint weight of these layers in a form that the decoder holds."""
        found: list[QuantizedWeight] = []
        for name in names:
            fused = self._read(name).fuse() if name in self._formats else None
            if fused is None or not self._may_hold(fused, name):
                return None
            found.append(fused)
        return merge(found)

    def _may_hold(self, fused: QuantizedWeight, name: str) -> bool:
        # An fp8 product rounds what it multiplies: only for a checkpoint that was made for that.
        allowed = not isinstance(fused, Fp8Weight) or self._formats[name].dynamic_inputs
        return allowed and _FORMS[type(fused)] in self._decoder.held_forms

    def _fill_floats(self, target: Tensor, name: str) -> None:
        if name in self._formats:
            self._read(name).copy_to(target)
            return
        plain = self._parts[name]["weight"]
        if plain.shape != target.shape or not plain.is_floating_point():
            raise self._wrong(name, f"it is {plain.dtype}, of another shape or no float")
        target.copy_(plain)

    def _read(self, name: str) -> StoredWeight:
        """One layer's weight on the decoder's device."""
        out, in_features = self._targets[name].shape
        found, device = self._formats[name], self._decoder.embedding.device
        parts = {part: tensor.to(device) for part, tensor in self._parts[name].items()}
        try:
            stored = SCHEMES[found.scheme].unpack(found, parts, out, in_features)
            shape = tuple(stored.values.shape)
            grid = (-(-out // stored.block_rows), -(-in_features // stored.group_size))
        except (RuntimeError, IndexError, KeyError, ValueError) as error:
            raise self._wrong(name, str(error)) from error
        if shape != (out, in_features):
            raise self._wrong(name, f"the weight has shape {shape}")
        for part in (stored.scales, stored.zeros):
            if part is not None and tuple(part.shape) != grid:
                raise self._wrong(name, f"scales have shape {tuple(part.shape)}, not {grid}")
        return stored

    def _wrong(self, name: str, reason: str) -> CorruptWeightsError:
        shapes = {part: tuple(tensor.shape) for part, tensor in self._parts[name].items()}
        expected = tuple(self._targets[name].shape)
        return CorruptWeightsError(
            f"the tensors of {name.removesuffix('.weight')} do not make a weight of shape {expected}: {reason}; they have {shapes}",
            value=shapes,
            limit=expected,
            param="model",
            remedy="Check that config.json and the weight files belong together.",
        )
