"""The shape of a causal LM that transformers' own code computes, and which path computes the model of a folder.

The native decoder takes the architectures of ``engine.models.registry``. Any other goes through transformers' attention
interface if its code can: that is found out by running it once without values (``engine.models.transformers_probe``), not by a
list of names.

Boundary: plain numbers. transformers is imported only for a model that the native decoder does not have.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.model_folder import is_gguf
from engine.models.config import ModelConfig, read_config_values
from engine.models.registry import FAMILIES


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """What one attention module of a model asks for, whatever the step."""

    module: str  # its qualified name in the model
    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    window: int | None  # a token sees so many last positions, itself included
    softcap: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformersConfig(ModelConfig):
    """A ModelConfig whose sizes were counted in the model itself.

    What only the native decoder computes with (`rope`, `rotary_size`, `rms_norm_eps`, biases, `qk_norm`) says nothing here:
    transformers reads it in config.json.
    """

    attention_layers: tuple[AttentionLayer, ...]
    num_values: int  # of all parameters, tied ones once
    num_table_values: int  # of embeddings that no product reads: a step takes a few rows
    num_product_values: int  # of the layers' matrices
    is_capturable: bool  # nothing in a step needs the host

    @property
    def num_parameters(self) -> int:
        return self.num_values

    @property
    def num_layer_products(self) -> int:
        return self.num_product_values

    @property
    def num_step_parameters(self) -> int:
        return self.num_values - self.num_table_values


def read_model_config(folder: Path | str, *, trust_remote_code: bool = False) -> ModelConfig:
    """The config of a folder's model: native where there is such a decoder, else through transformers.

    Raises:
        ModelNotFoundError, ModelLoadError: as ``ModelConfig.from_folder``.
        UnsupportedModelError: neither path has what the model needs; says what that is.
    """
    if is_gguf(Path(folder)):
        return ModelConfig.from_folder(folder)
    architectures = read_config_values(folder).get("architectures") or ()
    if not architectures or any(name in FAMILIES for name in architectures):
        return ModelConfig.from_folder(folder)
    from engine.models.transformers_probe import probe_folder

    return probe_folder(Path(folder), trust_remote_code=trust_remote_code)


def settle_for(config: EngineConfig, model: ModelConfig) -> EngineConfig:
    """`config` as this model's path can run it: steps are captured only where the model's code allows.

    Raises:
        ConfigError: a setting that only the native decoder has.
    """
    if not isinstance(model, TransformersConfig):
        return config
    for setting, off in (("quantization", None), ("enable_lora", False), ("deterministic", False)):
        if getattr(config, setting) != off:
            raise ConfigError(
                f"{setting} needs the native decoder; {model.architecture} is computed by transformers' code",
                value=getattr(config, setting),
                limit=off,
                param=setting,
                remedy=f"Set {setting}={off}. The native decoder runs {', '.join(FAMILIES)}.",
            )
    return config if model.is_capturable else replace(config, enforce_eager=True)
