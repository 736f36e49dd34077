"""LoadOptions: what one resident model's engine has its own way, beside the settings of its host.

Part of what a resident is: the same files with other options are another resident, beside the first, with an engine of its own.
Boundary: values. Which of them a model or device can have is the engine's to say, before anything is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from engine.config import EngineConfig, SpeculativeConfig
from engine.errors import ConfigError
from workbench.errors import SettingsError


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """Names and values are EngineConfig's; None: as the host has it."""

    deterministic: bool | None = None
    quantization: str | None = None
    kv_cache_dtype: str | None = None
    max_model_len: int | None = None
    speculative_config: SpeculativeConfig | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From plain values, as JSON has them.

        Raises:
            ConfigError: an option that is not one of these, or a value that no engine takes.
        """
        known = [each.name for each in fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigError(
                    f"{name!r} is no option of a load", value=name, limit=known, param=name,
                    remedy=f"Options are {', '.join(known)}; the others are settings of the app.",
                )  # fmt: skip
        given = dict(values)
        speculation, exact = given.get("speculative_config"), given.get("deterministic")
        if isinstance(speculation, Mapping):
            given["speculative_config"] = SpeculativeConfig.from_dict(speculation)
        elif speculation is not None:
            raise ConfigError(
                f"speculative_config must be an object, got {speculation!r}", value=speculation, param="speculative_config"
            )  # fmt: skip
        if not isinstance(exact, bool | None):
            raise ConfigError(
                f"deterministic must be true or false, got {exact!r}", value=exact, param="deterministic"
            )
        found = cls(**given)
        found.on(EngineConfig(model="checked"))
        return found

    def as_dict(self) -> dict[str, Any]:
        """What is set, as plain values."""
        given = self._given()
        if self.speculative_config is not None:
            given["speculative_config"] = asdict(self.speculative_config)
        return given

    def on(self, config: EngineConfig) -> EngineConfig:
        """`config` with these options. Raises ConfigError."""
        return replace(config, **self._given())

    def beside(self, config: EngineConfig) -> LoadOptions:
        """Those that differ from the host's own."""
        return LoadOptions(**{name: v for name, v in self._given().items() if v != getattr(config, name)})

    @property
    def label(self) -> str:
        """What tells such a resident from the plain one, in its id and to people; "" for none."""
        parts = [
            "deterministic" if self.deterministic else "",
            self.quantization or "",
            f"kv-{self.kv_cache_dtype}" if self.kv_cache_dtype else "",
            f"{self.max_model_len}-tokens" if self.max_model_len else "",
            self.speculative_config.method if self.speculative_config else "",
        ]
        return "+".join(part for part in parts if part)

    @property
    def suffix(self) -> str:
        return f"#{self.label}" if self.label else ""

    def _given(self) -> dict[str, Any]:
        values = ((each.name, getattr(self, each.name)) for each in fields(self))
        return {name: value for name, value in values if value is not None}


PLAIN = LoadOptions()


def read_speculation(text: str) -> dict[str, Any] | None:
    """A speculative_config from JSON; None for an empty text.

    Raises:
        SettingsError: no JSON object.
    """
    if not text.strip():
        return None
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise SettingsError(
            f"speculative_config {text!r} is no JSON object", value=text, limit='{"method": "ngram"}', param="speculative_config",
            remedy='Write it like {"method": "ngram", "num_speculative_tokens": 4}.',
        )  # fmt: skip
    return found
