"""The decoder as one compiled call a step on a CPU (``cpu_decoder.cpp``), for float32 and bfloat16.

It takes a loaded ``Decoder`` apart: weights move into packed panels one by one and the torch copies are dropped, so that
they are never all held twice. Results have the same bits whatever shares the batch, however the prompt was cut: it
serves deterministic mode as it is. `Decoder` remains the oracle, and what runs where there is no compiler.

Boundary: the two calls that the runner makes of a decoder, `forward` and `logits`. It does not load files, sample, or
serve GPUs, float64, or prompt embeddings.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from engine.attention.cpu import Caches, Paging, make_caches, make_paging
from engine.attention.interface import AttentionBackend, AttentionMetadata
from engine.kernels.cpu_library import CpuLibrary
from engine.kernels.kv_quantization import QUANTIZED_DTYPES
from engine.kernels.lora import SlotWeights
from engine.kernels.packed_linear import Packed, PackedWeight, pack_weight
from engine.models.decoder import Decoder, DecoderLayer, LayerCache, StepWeights
from engine.models.layers import LayerNorm, Linear, RMSNorm
from engine.models.lora import LoraSlots
from engine.plan import Int32


class _Layer(ctypes.Structure):
    _fields_ = [
        ("input_norm", ctypes.c_void_p),
        ("post_norm", ctypes.c_void_p),
        ("q_norm", ctypes.c_void_p),
        ("k_norm", ctypes.c_void_p),
        ("qkv", Packed),
        ("out", Packed),
        ("gate_up", Packed),
        ("down", Packed),
        ("caches", Caches),
        ("window", ctypes.c_int64),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.c_void_p),
        ("embedding", ctypes.c_void_p),
        ("lm_head", Packed),
        ("norm", ctypes.c_void_p),
        ("rotary", ctypes.c_void_p),
        ("num_layers", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("num_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_size", ctypes.c_int64),
        ("narrow", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
    ]


class _Delta(ctypes.Structure):
    _fields_ = [
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("size_in", ctypes.c_int64),
        ("num_parts", ctypes.c_int64),
        ("ends", ctypes.c_int64 * 3),
    ]


class _Adapters(ctypes.Structure):
    _fields_ = [
        ("slots", ctypes.c_void_p),
        ("deltas", ctypes.c_void_p),
        ("gate_up", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("slot_values", ctypes.c_int64),
        ("slot_scales", ctypes.c_int64),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        ("token_ids", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("num_tokens", ctypes.c_int64),
        ("num_threads", ctypes.c_int64),
        ("paging", Paging),
        ("x", ctypes.c_void_p),
        ("qkv", ctypes.c_void_p),
        ("h", ctypes.c_void_p),
        ("wide", ctypes.c_void_p),
        ("adapters", _Adapters),
    ]


@dataclass(slots=True)
class _Scratch:
    """Buffers of one step, grown to the largest step seen."""

    qkv: Tensor
    h: Tensor
    wide: Tensor


class FusedCpuDecoder:
    """Has the runner's two calls of ``Decoder``. The decoder given is emptied: its weights live on in packed form."""

    def __init__(self, decoder: Decoder, library: CpuLibrary) -> None:
        assert decoder.embedding.dtype in (torch.float32, torch.bfloat16), decoder.embedding.dtype
        assert not decoder.config.unfused("cpu"), decoder.config.unfused("cpu")
        self.config = decoder.config
        self.dtype = decoder.embedding.dtype
        self._library = library
        self._kept: list[Tensor | PackedWeight] = []  # memory that the descriptors point into
        assert decoder.rotary is not None
        self._rotary = decoder.rotary.float().contiguous()
        self._layers = (_Layer * decoder.config.num_layers)()
        self._final_norm = decoder.norm
        self._model = self._describe(decoder)
        self._caches: list[LayerCache] = []
        self._scratch: _Scratch | None = None
        self._lora: LoraSlots | None = None

    def use_lora(self, slots: LoraSlots) -> None:
        """Add what the adapters in these slots make of their tokens."""
        assert slots.dtype == self.dtype, (slots.dtype, self.dtype)
        self._lora = slots
        self._deltas = (_Delta * len(slots.layers))(*map(_describe_delta, slots.layers))

    @property
    def weight_bytes(self) -> int:
        """Memory of all weights as they are held now, of the rotary table, and of adapter slots."""
        return self._rotary.nbytes + self._kept_bytes() + (0 if self._lora is None else self._lora.num_bytes)

    def step_weights(self) -> StepWeights:
        """What a step reads of the weights, panels with the padding that is read with them."""
        return self._step_weights

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        caches: list[LayerCache],
        meta: AttentionMetadata,
        attention: AttentionBackend,
    ) -> Tensor:
        """Hidden states [T, hidden] (float32) of a step's tokens, before the final norm; writes K and V to the caches.

        `attention` is not asked: the compiled kernel is part of the call.
        """
        if caches is not self._caches:
            self._bind(caches)
        if token_ids.dtype != torch.int32 or positions.dtype != torch.int64:
            token_ids, positions = token_ids.int(), positions.long()
        token_ids, positions = token_ids.contiguous(), positions.contiguous()
        tokens = token_ids.shape[0]
        scratch = self._scratch_for(tokens)
        x = _new(tokens, self.config.hidden_size)
        token_slots, gate_up = self._token_slots(tokens)  # held until the step has run
        step = _Step(
            token_ids.data_ptr(),
            positions.data_ptr(),
            tokens,
            torch.get_num_threads(),
            make_paging(meta, caches[0].k.shape[2]),
            x.data_ptr(),
            scratch.qkv.data_ptr(),
            scratch.h.data_ptr(),
            scratch.wide.data_ptr(),
            self._describe_adapters(token_slots, gate_up),
        )
        self._library.functions.quire_forward(ctypes.byref(self._model), ctypes.byref(step))
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [n, V], float32, of the given rows of `forward`'s result."""
        hidden = hidden.contiguous()
        rows = hidden.shape[0]
        out = _new(rows, self.config.vocab_size)
        scratch = self._scratch_for(rows)
        self._library.functions.quire_logits(
            ctypes.byref(self._model), hidden.data_ptr(), scratch.h.data_ptr(), out.data_ptr(), rows,
            torch.get_num_threads(),
        )  # fmt: skip
        return out

    def final_hidden(self, hidden: Tensor) -> Tensor:
        """The given rows of `forward`'s result after the final norm, [n, hidden] (float32)."""
        normed: Tensor = self._final_norm(hidden)
        return normed

    def _token_slots(self, tokens: int) -> tuple[Int32 | None, Tensor | None]:
        """Each token's slot [T], -1 for none, and room for what is added to gate_up [T, 2 I]; None where nobody uses one."""
        if self._lora is None or self._lora.tokens is None:
            return None, None
        order, starts = (each.numpy() for each in (self._lora.tokens.order, self._lora.tokens.starts))
        slots = np.full(tokens, -1, np.int32)
        slots[order[starts[0] :]] = np.repeat(np.arange(len(starts) - 1, dtype=np.int32), np.diff(starts))
        return slots, _new(tokens, 2 * self.config.intermediate_size)

    def _describe_adapters(self, token_slots: Int32 | None, gate_up: Tensor | None) -> _Adapters:
        if self._lora is None or token_slots is None or gate_up is None:
            return _Adapters()
        layout = self._lora.layout
        return _Adapters(
            token_slots.ctypes.data, ctypes.addressof(self._deltas), gate_up.data_ptr(), layout.rank, layout.num_values,
            layout.num_scales,
        )  # fmt: skip

    def _describe(self, decoder: Decoder) -> _Model:
        config, narrow = decoder.config, self.dtype == torch.bfloat16
        for index, layer in enumerate(decoder.layers):
            assert isinstance(layer, DecoderLayer)
            self._layers[index] = self._describe_layer(layer, config.sliding_windows[index])
        layers_end = self._kept_bytes()
        plain = None if config.tie_embeddings else self._keep(decoder.embedding.data)
        embedding_end = self._kept_bytes()
        lm_head, norm = self._pack(decoder.lm_head), self._norm(decoder.norm)
        gathered = torch.bfloat16 if config.tie_embeddings and lm_head.narrow else decoder.embedding.dtype
        self._step_weights = StepWeights(
            layers_end, self._kept_bytes() - embedding_end, config.hidden_size * gathered.itemsize
        )
        decoder.embedding = _emptied(decoder.embedding)
        return _Model(
            ctypes.addressof(self._layers),
            plain,
            lm_head,
            norm,
            self._rotary.data_ptr(),
            config.num_layers,
            config.hidden_size,
            config.intermediate_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_size,
            int(narrow),
            config.rms_norm_eps,
            config.attention_scale,
        )

    def _describe_layer(self, layer: DecoderLayer, window: int | None) -> _Layer:
        return _Layer(
            self._norm(layer.input_norm),
            self._norm(layer.post_attention_norm),
            self._norm(layer.q_norm),
            self._norm(layer.k_norm),
            self._pack(layer.qkv),
            self._pack(layer.out),
            self._pack(layer.gate_up, gated=True),
            self._pack(layer.down),
            Caches(),
            window or 0,
        )

    def _pack(self, linear: Linear, *, gated: bool = False) -> Packed:
        packed = pack_weight(self._library, linear.weight.data, linear.bias, gated=gated)
        linear.weight = _emptied(linear.weight)
        self._kept.append(packed)
        return packed.descriptor

    def _norm(self, norm: RMSNorm | LayerNorm | None) -> int | None:
        return None if norm is None else self._keep(norm.weight.data.float())

    def _keep(self, tensor: Tensor) -> int:
        tensor = tensor.contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _kept_bytes(self) -> int:
        return sum(each.num_bytes if isinstance(each, PackedWeight) else each.nbytes for each in self._kept)

    def _bind(self, caches: list[LayerCache]) -> None:
        assert len(caches) == self.config.num_layers, len(caches)
        for layer, cache in zip(self._layers, caches, strict=True):
            assert cache.k.dtype in (self.dtype, torch.bfloat16, *QUANTIZED_DTYPES), (
                cache.k.dtype,
                self.dtype,
            )
            layer.caches = make_caches(cache.k, cache.v, cache.k_scale, cache.v_scale)
        self._caches = caches

    def _scratch_for(self, tokens: int) -> _Scratch:
        if self._scratch is None or self._scratch.h.shape[0] < tokens:
            config = self.config
            q_width = config.num_heads * config.head_size
            self._scratch = _Scratch(
                qkv=torch.empty(
                    tokens, q_width + 2 * config.num_kv_heads * config.head_size, dtype=torch.float32
                ),
                h=torch.empty(tokens, config.hidden_size, dtype=self.dtype),
                wide=torch.empty(tokens, max(config.intermediate_size, q_width), dtype=self.dtype),
            )
        return self._scratch


def _describe_delta(weights: SlotWeights) -> _Delta:
    ends = np.cumsum(weights.sizes).tolist()
    pointers = (weights.a.data_ptr(), weights.b.data_ptr(), weights.scales.data_ptr())
    return _Delta(*pointers, weights.a.shape[2], len(ends), (ctypes.c_int64 * 3)(*ends))


def _new(*shape: int) -> Tensor:
    """Unset float32 memory; made by NumPy, since torch would offer the interpreter to other threads."""
    return torch.from_numpy(np.empty(shape, dtype=np.float32))


def _emptied(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty(0, dtype=parameter.dtype), requires_grad=False)
