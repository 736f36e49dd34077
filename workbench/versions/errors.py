"""Errors of this room: versions, weights, adapters, fine-tuning, and the registry behind them.

    WorkbenchError
    └── VersionError                 anything about a model version
        ├── UnknownVersionError      no such registered name, version or alias
        ├── InvalidAliasError        an alias that the registry cannot hold, or reserves
        ├── NothingToRollBackError   the alias has no earlier version
        ├── MissingWeightsError      no folder here holds the weights of that digest
        ├── AdapterError             a folder that is no readable adapter
        │   └── WrongBaseError       the adapter belongs to another base model
        ├── FinetuneConfigError      a fine-tune that cannot run as it was asked for
        │   ├── TrainingDataError    its data cannot be read
        │   └── CheckpointMismatchError   the checkpoint belongs to another fine-tune
        ├── WriteError               a folder or file of this room cannot be written (disk full, read-only)
        └── RegistryUnreachableError the tracking server or its store does not answer

Boundary: types and their text. Exit codes belong to the CLI, HTTP status codes to the API.
"""

from __future__ import annotations

from workbench.errors import WorkbenchError


class VersionError(WorkbenchError):
    """Base of this room's errors."""

    code = "version_error"


class UnknownVersionError(VersionError, LookupError):
    """The registry has no such name, version or alias."""

    code = "version_not_found"


class InvalidAliasError(VersionError, ValueError):
    """The alias cannot be set."""

    code = "invalid_alias"


class NothingToRollBackError(VersionError):
    """The alias points at the first version that it ever pointed at."""

    code = "nothing_to_roll_back"


class MissingWeightsError(VersionError):
    """No folder known here holds weights of that digest."""

    code = "missing_weights"


class AdapterError(VersionError, ValueError):
    """The folder is no adapter that can be read."""

    code = "invalid_adapter"


class WrongBaseError(AdapterError):
    """The adapter was trained on another base."""

    code = "wrong_base"


class FinetuneConfigError(VersionError, ValueError):
    """The fine-tune cannot run as asked."""

    code = "invalid_finetune"


class TrainingDataError(FinetuneConfigError):
    """The training data cannot be read."""

    code = "invalid_training_data"


class CheckpointMismatchError(FinetuneConfigError):
    """The checkpoint was made by another fine-tune."""

    code = "checkpoint_mismatch"


class WriteError(VersionError, OSError):
    """The disk is full or the folder is read-only; nothing half-written is left under its final name."""

    code = "cannot_write"


class RegistryUnreachableError(VersionError):
    """MLflow does not answer."""

    code = "registry_unreachable"
