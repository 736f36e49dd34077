"""A causal LM of transformers in the two parts that an engine calls, its attention answered by us.

transformers' attention interface lets a model's attention modules call a function by name. Ours does nothing but hand the call
to whoever stands in for the module (`ANSWER`), so that it holds no state: a recorder while a model is probed, the paged
KV cache while it runs. No mask is made under `STEP`: which positions a token sees is the paged attention's. Under `PROBE`
a model gets the mask's rule in place of a mask.

Boundary: transformers' classes and registries. Source: https://huggingface.co/docs/transformers/attention_interface
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from engine.errors import UnsupportedModelError
from engine.models.config import read_config_values
from engine.models.registry import FAMILIES
from engine.models.transformers_adapters import register_adapter

STEP, PROBE = "quire_step", "quire_probe"  # attention implementations
ANSWER = "quire_attention"  # the attribute of a module that answers its attention calls
RULE = "quire_rule"  # the attribute of a mask that says which positions are seen

Answer = Callable[..., Tensor]


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **asked: Any
) -> tuple[Tensor, None]:
    """The attention function of the interface: queries [1, H, T, D], keys and values [1, K, T, D] -> [1, T, H, D]."""
    answer: Answer = getattr(module, ANSWER)
    return answer(query, key, value, attention_mask, **asked), None


def mask_of_rule(*, batch_size: int, q_length: int, kv_length: int, mask_function: Any, **_: Any) -> Tensor:
    """A mask without values that carries its rule."""
    mask = torch.empty(batch_size, 1, q_length, kv_length, device="meta")
    setattr(mask, RULE, mask_function)
    return mask


def load_config(folder: Path, *, trust_remote_code: bool) -> PretrainedConfig:
    """transformers' config of a folder.

    Raises:
        UnsupportedModelError: no such architecture in this version of transformers, code of the checkpoint's own that may
            not run, or a config that its class refuses.
    """
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a config class raises for values that it does not take
        values = read_config_values(folder)
        name = ", ".join(values.get("architectures") or ())
        if values.get("auto_map") and not trust_remote_code:
            raise refusal(
                name, "its code comes with the checkpoint, and runs only with trust_remote_code=True"
            ) from error
        raise refusal(name, f"transformers does not take its config.json ({_first_line(error)})") from error


def build_model(config: PretrainedConfig, attention: str, *, trust_remote_code: bool) -> PreTrainedModel:
    """The causal LM of a config on the current default device, its attention under one of our names.

    Raises:
        UnsupportedModelError: transformers has no causal LM for it, or none that dispatches attention by name.
    """
    AttentionInterface.register(STEP, attend)
    AttentionInterface.register(PROBE, attend)
    AttentionMaskInterface.register(PROBE, mask_of_rule)
    register_adapter(config.model_type, (STEP, PROBE), attend)
    name = ", ".join(config.architectures or ()) or config.model_type
    try:
        # The dtype is the process's default on purpose: transformers would set another one for all threads.
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config,
            attn_implementation=attention,
            dtype=torch.get_default_dtype(),
            trust_remote_code=trust_remote_code,
        )
    except KeyError as error:
        raise refusal(name, "its attention does not go through transformers' attention interface") from error
    except Exception as error:  # whatever a model's constructor raises
        raise refusal(name, f"transformers cannot build it ({_first_line(error)})") from error
    if type(model).__name__ not in (config.architectures or ()):
        raise refusal(name, f"transformers' causal LM of its kind is {type(model).__name__}")
    return model.eval().requires_grad_(False)


def body_of(model: PreTrainedModel) -> nn.Module:
    """The part of a causal LM that gives hidden states.

    Raises:
        UnsupportedModelError: it cannot be told from its head.
    """
    body: nn.Module = model.get_decoder()
    if body is model:
        raise refusal(type(model).__name__, "its layers are not a module apart from its output head")
    return body


def head_of(model: PreTrainedModel) -> nn.Module:
    """The same model with its body left out: called with `inputs_embeds`, it makes logits of these hidden states.

    The head's own code runs, with its scaling, bias and soft cap. Parameters are shared; the copies are of modules alone.
    """
    body = body_of(model)
    path = next(name for name, module in model.named_modules() if module is body).split(".")
    head = owner = _shallow(model)
    for part in path[:-1]:
        owner._modules[part] = _shallow(getattr(owner, part))
        owner = getattr(owner, part)
    owner._modules[path[-1]] = _Given()
    return head


class _Given(nn.Module):
    """Stands for a body whose hidden states are there already."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> BaseModelOutputWithPastAndCrossAttentions:
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=inputs_embeds)


def _shallow(module: nn.Module) -> nn.Module:
    made = copy.copy(module)
    made._modules = dict(module._modules)
    return made


def refusal(name: str, reason: str) -> UnsupportedModelError:
    """The error for a model that no path has."""
    return UnsupportedModelError(
        f"{name} is not supported: {reason}",
        value=name,
        limit=list(FAMILIES),
        param="model",
        remedy=f"The native decoder runs {', '.join(FAMILIES)}; beside them run causal LMs that transformers has code for and "
        "whose layers are all causal attention through its attention interface.",
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
