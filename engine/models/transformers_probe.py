"""What a causal LM of transformers asks of attention: found by running one step of it on tensors that have no values.

The model is built from its config on the meta device, where nothing is allocated. A recorder stands in for every
attention module and notes what it is called with; masks come as rules, which are tried at chosen positions. So it is
seen, not read off a name or a flag, whether a paged step can compute the model: that every layer is causal attention, full or over a
window; that positions come from the step and not from a token's place in the batch; that nothing else mixes tokens; and
that no value is needed on the host, which on the meta device raises.

Boundary: shapes and rules. It cannot see what a value would change: parity tests do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, PreTrainedModel

from engine.models.rope_config import RopeConfig
from engine.models.transformers_config import AttentionLayer, TransformersConfig
from engine.models.transformers_model import (
    ANSWER,
    PROBE,
    RULE,
    body_of,
    build_model,
    head_of,
    load_config,
    refusal,
)

NUM_TOKENS = 3
# What modules pass beside their attention's own arguments: settings of a forward pass, not of attention.
IGNORED = {"position_ids", "use_cache", "output_attentions", "is_causal", "dropout", "logits_to_keep"}
COMPUTED = {"scaling", "sliding_window", "softcap"}
# Operations along a sequence: a state, a convolution or a shift over the tokens before.
MIXING = (
    "aten::convolution",
    "aten::cumsum",
    "aten::cumprod",
    "aten::roll",
    "aten::_fft_r2c",
    "aten::constant_pad_nd",
)


def probe_folder(folder: Path, *, trust_remote_code: bool = False) -> TransformersConfig:
    """The config of a folder's model, if transformers' code for it can run in paged steps.

    Raises:
        UnsupportedModelError: naming the architecture and what stands in the way.
    """
    config = load_config(folder, trust_remote_code=trust_remote_code)
    name = ", ".join(config.architectures or ())
    if getattr(config, "quantization_config", None):
        raise refusal(name, "quantized checkpoints are read by the native decoder alone")
    if config.is_encoder_decoder:
        raise refusal(name, "it is an encoder with a decoder")
    if config.get_text_config(decoder=True) is not config:
        raise refusal(name, "it takes more than text")
    with torch.device("meta"):
        model = build_model(config, PROBE, trust_remote_code=trust_remote_code)
    if model._is_stateful:
        raise refusal(name, "its layers keep a state beside keys and values")
    if any(type(module).__name__.endswith("Experts") for module in model.modules()):
        raise refusal(name, "it gives tokens to experts, which paged steps do in the native decoder alone")
    return Probe(model, config).run()


class Probe:
    """One run of a model on the meta device."""

    def __init__(self, model: PreTrainedModel, config: PretrainedConfig) -> None:
        self._model, self._config = model, config
        self._name = type(model).__name__
        self._body = body_of(model)
        self._max_position = int(getattr(config, "max_position_embeddings", None) or 0)
        self._layers: list[AttentionLayer] = []

    def run(self) -> TransformersConfig:
        """What the model is.

        Raises:
            UnsupportedModelError: it cannot be computed in paged steps.
        """
        for name, module in self._model.named_modules():
            setattr(module, ANSWER, _Recorder(self, name))
        token_ids, positions = (torch.empty(1, NUM_TOKENS, dtype=torch.long, device="meta") for _ in range(2))
        watch, literals = _Watch(positions), _Literals()
        with watch, literals:
            hidden = self._attempt(
                self._body,
                input_ids=token_ids,
                position_ids=positions,
                attention_mask=torch.ones_like(token_ids),
            )[0]
            self._check(watch)
            logits = self._attempt(head_of(self._model), inputs_embeds=hidden).logits
        return self._shape(hidden, logits, is_capturable=not (watch.copies or literals.found))

    def _attempt(self, part: nn.Module, **inputs: Tensor) -> Any:
        try:
            with torch.no_grad():
                return part(**inputs, use_cache=False)
        except _Asked as asked:
            raise refusal(self._name, str(asked)) from None
        except Exception as error:  # whatever a model raises where there are no values
            raise refusal(
                self._name,
                f"a step of it needs values on the host, or more than tokens and positions ({error})",
            ) from error

    def record(
        self, name: str, query: Tensor, key: Tensor, value: Tensor, mask: Any, asked: dict[str, Any]
    ) -> Tensor:
        """Take down one attention call; its result without values."""
        (_, heads, tokens, size), kv_heads = query.shape, key.shape[1]
        if any(layer.module == name for layer in self._layers):
            raise _Asked(f"{name} attends more than once in a step")
        if tokens != NUM_TOKENS or key.shape != (1, kv_heads, tokens, size) or value.shape != key.shape:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (query, key, value))
            raise _Asked(
                f"{name} has queries, keys and values of shapes {shapes}, not [1, heads, tokens, one head size]"
            )
        unknown = sorted(
            key
            for key, given in asked.items()
            if key not in COMPUTED | IGNORED and given is not None and given is not False
        )
        if unknown:
            raise _Asked(f"{name} asks for {', '.join(unknown)}, which paged attention does not compute")
        scale, softcap = asked.get("scaling"), asked.get("softcap")
        if not all(number is None or isinstance(number, int | float) for number in (scale, softcap)):
            raise _Asked(f"the scale of {name} is not a number")
        window = self._window(name, mask)
        self._layers.append(
            AttentionLayer(
                name, heads, kv_heads, size, size**-0.5 if scale is None else float(scale), window, softcap
            )
        )
        return query.new_empty(1, tokens, heads, size)

    def _window(self, name: str, mask: Any) -> int | None:
        """Over how many positions the rule of a mask lets a token look back; None: over all."""
        rule, zero = getattr(mask, RULE, None), torch.tensor(0)
        if rule is None:
            raise _Asked(f"{name} gets no mask of transformers' own making")
        last = 2 * self._max_position or 8192
        keys = torch.arange(last + 1)
        try:
            with torch.device("cpu"):
                seen = {
                    q: rule(zero, zero, torch.tensor(q), keys).expand(last + 1)
                    for q in (0, 1, last // 2, last - 1, last)
                }
        except Exception as error:
            raise _Asked(f"the mask of {name} depends on more than positions") from error
        window = int(seen[last].sum())
        if not all(torch.equal(row, (keys <= q) & (keys > q - window)) for q, row in seen.items()):
            raise _Asked(f"the mask of {name} is neither causal nor a causal window")
        return None if window == last + 1 else window

    def _check(self, watch: _Watch) -> None:
        count = getattr(self._config, "num_hidden_layers", None)
        if len(self._layers) != count:
            raise refusal(
                self._name,
                f"{len(self._layers)} of its {count} layers attend through transformers' interface",
            )
        if watch.mixing:
            raise refusal(self._name, f"tokens mix outside attention ({', '.join(sorted(watch.mixing))})")
        if not watch.reads_positions:
            raise refusal(self._name, "it does not take the positions of a step's tokens")
        if len({(layer.num_heads, layer.num_kv_heads, layer.head_size) for layer in self._layers}) > 1:
            raise refusal(self._name, "its layers have heads of different numbers or sizes")
        if not self._max_position:
            raise refusal(
                self._name, "its config.json has no max_position_embeddings: how long may a context be?"
            )

    def _shape(self, hidden: Tensor, logits: Tensor, *, is_capturable: bool) -> TransformersConfig:
        config, first = self._config, self._layers[0]
        tables = {id(p) for m in self._body.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        layers = [p for p in self._body.parameters() if p.ndim > 1 and id(p) not in tables]
        embedding, head = self._model.get_input_embeddings(), self._model.get_output_embeddings()
        is_tied = head is not None and head.weight is embedding.weight
        unread = sum(p.numel() for p in self._body.parameters() if id(p) in tables)
        eos = config.eos_token_id
        if embedding.weight.shape[0] < logits.shape[-1]:
            raise refusal(
                self._name,
                f"it has logits of {logits.shape[-1]} tokens and {embedding.weight.shape[0]} embeddings",
            )
        return TransformersConfig(
            architecture=self._name,
            vocab_size=logits.shape[-1],
            hidden_size=hidden.shape[-1],
            intermediate_size=max(max(p.shape) for p in layers),
            num_layers=len(self._layers),
            num_heads=first.num_heads,
            num_kv_heads=first.num_kv_heads,
            head_size=first.head_size,
            max_position=self._max_position,
            rms_norm_eps=0.0,
            rope=RopeConfig(),
            rotary_size=0,
            attention_scale=first.scale,
            attention_softcap=first.softcap,
            tie_embeddings=is_tied,
            qkv_bias=False,
            out_bias=False,
            mlp_bias=False,
            qk_norm=False,
            sliding_windows=tuple(layer.window for layer in self._layers),
            dtype=None if config.dtype is None else str(config.dtype).removeprefix("torch."),
            eos_token_ids=frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos]),
            attention_layers=tuple(self._layers),
            num_values=sum(p.numel() for p in self._model.parameters()),
            num_table_values=unread - (embedding.weight.numel() if is_tied else 0),
            num_product_values=sum(p.numel() for p in layers),
            is_capturable=is_capturable,
        )


class _Asked(Exception):
    """An attention call that a paged step cannot answer."""


class _Recorder:
    """Answers the attention calls of one module of a probed model."""

    def __init__(self, probe: Probe, name: str) -> None:
        self._probe, self._name = probe, name

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, **asked: Any) -> Tensor:
        return self._probe.record(self._name, query, key, value, mask, asked)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Which operations a run is made of."""

    def __init__(self, positions: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._positions = positions
        self.reads_positions = False
        self.mixing: set[str] = set()
        self.copies = False  # a tensor of the host to the device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = func.overloadpacket._qualified_op_name
        made = func(*args, **(kwargs or {}))
        self.reads_positions |= any(tensor is self._positions for tensor in given)
        if name in MIXING:
            self.mixing.add(name)
        if name == "aten::_to_copy" and not any(tensor.device.type == "meta" for tensor in given):
            self.copies |= made.device.type == "meta"
        return made


class _Literals(TorchFunctionMode):
    """Whether a run makes tensors on the device of numbers of the host, which no operation shows."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor):
            self.found |= made.device.type == "meta" and made is not args[0]
        return made
