"""TransformersDecoder: a causal LM computed by transformers' own code over the paged KV cache.

A flat step goes in as one text of T tokens with the positions that they have in their rows; no mask is made and no cache is kept there:
each attention module's call is answered by the engine's attention backend, which knows the rows. The head runs apart, for the
rows that are asked for.

Boundary: implements ``engine.models.decoder.StepDecoder``. Whether a model can run so was found out before
(``engine.models.transformers_probe``). Products, norms and activations are transformers' and torch's: no fused kernels, no
quantization, no adapters, no batch invariance.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from engine.attention.interface import AttentionBackend, AttentionMetadata
from engine.models.config import ModelConfig
from engine.models.decoder import LayerCache, StepWeights
from engine.models.transformers_config import AttentionLayer, TransformersConfig
from engine.models.transformers_model import ANSWER, STEP, body_of, build_model, head_of, load_config

TABLES = (r"rotary_emb\.inv_freq$",)  # that older checkpoints hold


class TransformersDecoder(nn.Module):
    """A causal LM without its cache. Weights are uninitialised until the loader has filled `weight_targets`."""

    def __init__(
        self,
        config: TransformersConfig,
        folder: Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.config: ModelConfig = config
        with torch.device("cpu"), Unfilled():
            given = load_config(folder, trust_remote_code=trust_remote_code)
            model = build_model(given, STEP, trust_remote_code=trust_remote_code)
        place(model, dtype, device)
        self.model = model
        self._body = body_of(model)
        self._heads = (head_of(model),)  # in a tuple: its modules are those of `model`, not further ones
        targets = dict(self.weight_targets())
        self._places = {name: name if name in targets else None for name in model.state_dict()}
        self._step: _Step | None = None
        for index, layer in enumerate(config.attention_layers):
            setattr(model.get_submodule(layer.module), ANSWER, _PagedLayer(self, index, layer))

    @property
    def embedding(self) -> Tensor:
        """The input embedding [V, hidden]."""
        weight: Tensor = self.model.get_input_embeddings().weight
        return weight

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        caches: list[LayerCache],
        meta: AttentionMetadata,
        attention: AttentionBackend,
    ) -> Tensor:
        """Hidden states [T, hidden] of a step's tokens, as the head takes them; K and V are written to the caches."""
        self._step = _Step(caches, meta, attention)
        try:
            hidden: Tensor = self._body(
                input_ids=token_ids[None],
                position_ids=positions[None],
                # Not for attention: without one, some models look at token ids on the host, to warn of padding.
                attention_mask=torch.ones_like(token_ids)[None],
                use_cache=False,
            )[0]
        finally:
            self._step = None  # a step's tensors live no longer than the step
        return hidden[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [n, V] of the given rows of `forward`'s result, float32 (float64 for a float64 model)."""
        (head,) = self._heads
        logits: Tensor = head(inputs_embeds=hidden[None], use_cache=False).logits[0]
        return logits if logits.dtype == torch.float64 else logits.float()

    def final_hidden(self, hidden: Tensor) -> Tensor:
        """The given rows of `forward`'s result, which has the final norm behind it."""
        return hidden

    def step_weights(self) -> StepWeights:
        """What a step reads of the weights."""
        tables = {id(m.weight): m.weight for m in self._body.modules() if isinstance(m, nn.Embedding)}
        body = {id(p): p for p in self._body.parameters()}
        head = [p for p in self.model.parameters() if id(p) not in body]
        output = self.model.get_output_embeddings()
        if output is not None and id(output.weight) in body:
            head.append(output.weight)
        return StepWeights(
            layers=sum(p.nbytes for key, p in body.items() if key not in tables),
            head=sum(p.nbytes for p in head),
            embedding_row=sum(table[0].nbytes for table in tables.values()),
        )

    def weight_targets(self) -> Iterator[tuple[str, Tensor]]:
        """Names in the model, each with the parameter or stored buffer that it fills; of tied ones the first name."""
        seen: set[int] = set()
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if id(tensor) not in seen and tensor.is_floating_point():
                seen.add(id(tensor))
                yield name, tensor

    def place_of(self, stored: str) -> str | None:
        """The target's name for a checkpoint's, with or without the body's prefix; None for what the model computes itself."""
        prefix = f"{self.model.base_model_prefix}."
        for name in (stored, prefix + stored, stored.removeprefix(prefix)):
            if name in self._places:
                return self._places[name]
        ignored = (*TABLES, *(self.model._keys_to_ignore_on_load_unexpected or ()))
        return None if any(re.search(pattern, stored) for pattern in ignored) else stored

    def finish_loading(self) -> None:
        """Nothing is left to do."""

    def attend(self, index: int, layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of a step's queries [1, H, T, D] in one layer; keys and values [1, K, T, D] go to its cache first."""
        assert self._step is not None, f"{layer.module} attends outside of a step"
        meta, attention, cache = self._step.meta, self._step.attention, self._step.caches[index]
        q, k, v = (x[0].transpose(0, 1).to(value.dtype).contiguous() for x in (query, key, value))
        attention.store_kv(
            k, v, cache.k, cache.v, meta.slot_mapping, k_scale=cache.k_scale, v_scale=cache.v_scale
        )
        return attention.forward(
            q, cache.k, cache.v, meta, scale=layer.scale, sliding_window=layer.window, softcap=layer.softcap,
            k_scale=cache.k_scale, v_scale=cache.v_scale,
        )[None]  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Step:
    """What the attention modules of a step need beside their own arguments."""

    caches: list[LayerCache]
    meta: AttentionMetadata
    attention: AttentionBackend


class _PagedLayer:
    """Answers the attention calls of one module."""

    def __init__(self, decoder: TransformersDecoder, index: int, layer: AttentionLayer) -> None:
        self._decoder, self._index, self._layer = decoder, index, layer

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **asked: Any
    ) -> Tensor:
        return self._decoder.attend(self._index, self._layer, query, key, value)


class Unfilled(TorchFunctionMode):
    """Modules are built without drawing their weights, whose memory is therefore not touched; buffers get their values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args else kwargs.get("tensor")
        name = getattr(func, "__name__", "")
        if (
            isinstance(target, nn.Parameter)
            and name.endswith("_")
            and not name.startswith("__")
            and name != "requires_grad_"
        ):
            return target
        return func(*args, **kwargs)


def place(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Give every parameter and stored buffer fresh memory on the device, in `dtype` where they hold fractions.

    Buffers that no checkpoint holds are moved as they are: their values and dtype are the model's own.
    """
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            kind = dtype if parameter.is_floating_point() else parameter.dtype
            fresh = made.get(id(parameter))
            if fresh is None:
                empty = torch.empty(parameter.shape, dtype=kind, device=device)
                fresh = made[id(parameter)] = nn.Parameter(empty, requires_grad=False)
            module._parameters[name] = fresh
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            is_stored = name not in module._non_persistent_buffers_set
            kind = dtype if is_stored and buffer.is_floating_point() else buffer.dtype
            module._buffers[name] = buffer.to(device=device, dtype=kind)
