"""The engine's exception tree: what can go wrong, as types that a caller can act on.

    EngineError                      base, a TypedError: message, value, limit, remedy, param
    ├── ConfigError                  an EngineConfig that cannot hold (before any work)
    ├── InvalidRequestError          a request that can never run (before any work)
    │   ├── InvalidParamsError       a sampling parameter out of its range
    │   └── PromptTooLongError       prompt does not fit the context or the KV cache
    ├── ModelLoadError               the model cannot be loaded
    │   ├── ModelNotFoundError       no such folder or hub id
    │   ├── UnsupportedModelError    a capability that no model path here has, by name
    │   ├── UnsupportedAdapterError  a LoRA adapter that is not computed here, or belongs to another base
    │   └── CorruptWeightsError      missing shard, truncated file, wrong shape
    ├── OutOfMemoryError             the device has fewer bytes than asked for
    ├── StepFailedError              a step raised; its requests failed, the engine goes on
    ├── QueueFullError               too much waits already; it may be sent again later
    ├── EngineBusyError              the engine cannot sleep while requests run
    ├── EngineAsleepError            the engine takes requests again after wake_up()
    └── EngineDeadError              the engine cannot take requests any more

Boundary: types and their text only. HTTP status codes belong to ``workbench.api``, exit codes to the CLI.
"""

from __future__ import annotations

from typing import Any


class TypedError(Exception):
    """What every error raised on purpose carries, the engine's and those of what is built on it.

    `message` says what is wrong; `value` is the offending value, `limit` what would have been accepted, `remedy`
    what to do, `param` the argument's name. ``str(error)`` joins them into one sentence for people.
    """

    code = "error"

    def __init__(
        self,
        message: str,
        *,
        value: Any = None,
        limit: Any = None,
        remedy: str | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.value = value
        self.limit = limit
        self.remedy = remedy
        self.param = param

    def __str__(self) -> str:
        text = self.message
        if self.remedy:
            text = f"{text.rstrip('.')}. {self.remedy}"
        return text


class EngineError(TypedError):
    """Base of all errors that the engine raises on purpose."""

    code = "engine_error"


class ConfigError(EngineError, ValueError):
    """An engine setting is out of range, unknown, or contradicts another one."""

    code = "invalid_config"


class InvalidRequestError(EngineError, ValueError):
    """The request can never run on this engine."""

    code = "invalid_request"


class InvalidParamsError(InvalidRequestError):
    """A sampling parameter is out of its range."""

    code = "invalid_params"


class PromptTooLongError(InvalidRequestError):
    """The prompt leaves no room for one output token within the context or the KV cache."""

    code = "context_length_exceeded"


class ModelLoadError(EngineError):
    """The model's files cannot be turned into a running model."""

    code = "model_load_failed"


class ModelNotFoundError(ModelLoadError):
    """Neither a folder with a config.json nor a known hub id."""

    code = "model_not_found"


class UnsupportedModelError(ModelLoadError):
    """The model needs a capability that no model path of this engine has."""

    code = "model_unsupported"


class UnsupportedAdapterError(ModelLoadError):
    """A LoRA adapter does not fit this model, or asks for what the engine does not compute."""

    code = "adapter_unsupported"


class CorruptWeightsError(ModelLoadError):
    """A weight file is missing, truncated, or holds tensors of another shape than the config says."""

    code = "weights_corrupt"


class OutOfMemoryError(EngineError):
    """The device has fewer bytes than the configuration needs."""

    code = "out_of_memory"


class StepFailedError(EngineError):
    """A step raised while it computed; the requests in it failed, others go on."""

    code = "step_failed"


class QueueFullError(EngineError):
    """As much waits as may wait; nothing of the request was queued. `retry_after_s`: when there may be room."""

    code = "queue_full"

    def __init__(self, message: str, *, retry_after_s: int = 1, **facts: Any) -> None:
        super().__init__(message, **facts)
        self.retry_after_s = retry_after_s


class EngineBusyError(EngineError):
    """The engine was asked to sleep while it has requests."""

    code = "engine_busy"


class EngineAsleepError(EngineError):
    """The engine gave its device's memory back with ``sleep()`` and takes no requests until ``wake_up()``."""

    code = "engine_asleep"


class EngineDeadError(EngineError):
    """The engine is closed or its device context is broken; nothing more can be submitted."""

    code = "engine_dead"
