"""The workbench's exception tree, in the shape of the engine's: message, value, limit, remedy, param.

    WorkbenchError
    ├── SettingsError            a setting of the app is out of range or contradicts another one
    │   ├── HostRefusedError     an address that is not loopback, while nobody could log in
    │   ├── CertificateError     the files for https are missing, unreadable or do not belong together
    │   └── HomeDirError         HOME_DIR cannot be written
    ├── PortInUseError           another process listens where this one should
    ├── AlreadyRunningError      another supervisor owns this HOME_DIR
    ├── UnknownModelError        no model of that id is loaded here
    ├── NotReadyError            the model is still loading, or its load failed
    │   ├── ModelAsleepError     the model sleeps until somebody wakes it
    │   └── ServerStoppingError  the server was told to stop; running requests may end
    ├── ApiError                 an API request that cannot be answered
    │   ├── UnsupportedFieldError    a field, or a value of one, that this API does not serve
    │   └── BodyTooLargeError        the request body is over the limit
    └── ServerUnreachableError   no Quire server answers at that address

Boundary: types and their text. HTTP status codes belong to ``workbench.api.errors``, exit codes to the CLI.
"""

from __future__ import annotations

from engine.errors import TypedError


class WorkbenchError(TypedError):
    """Base of all errors that the workbench raises on purpose."""

    code = "workbench_error"


class SettingsError(WorkbenchError, ValueError):
    """A setting cannot be used."""

    code = "invalid_setting"


class HostRefusedError(SettingsError):
    """The address would be reachable from other machines, and there is no way to log in."""

    code = "host_refused"


class CertificateError(SettingsError):
    """The certificate or its key cannot be used."""

    code = "invalid_certificate"


class HomeDirError(SettingsError):
    """HOME_DIR does not exist and cannot be made, or cannot be written."""

    code = "home_dir_not_writable"


class PortInUseError(WorkbenchError):
    """The port is taken."""

    code = "port_in_use"


class AlreadyRunningError(WorkbenchError):
    """Another supervisor holds this HOME_DIR."""

    code = "already_running"


class UnknownModelError(WorkbenchError, LookupError):
    """No model of that id."""

    code = "model_not_found"


class NotReadyError(WorkbenchError):
    """There is no model to answer with, yet or any more."""

    code = "model_not_ready"


class ModelAsleepError(NotReadyError):
    """The model gave its device memory back; requests do not wake it, because others may have that memory now."""

    code = "model_asleep"


class ServerStoppingError(NotReadyError):
    """The server was told to stop and takes no more requests; those that run may end."""

    code = "server_stopping"


class ApiError(WorkbenchError):
    """A request to the API that cannot be answered as it is."""

    code = "invalid_request"


class UnsupportedFieldError(ApiError):
    """The field, or this value of it, is not served here."""

    code = "unsupported_field"


class BodyTooLargeError(ApiError):
    """The request's body is over the limit."""

    code = "body_too_large"


class ServerUnreachableError(WorkbenchError):
    """Nothing answers there, or what answers is not an OpenAI-compatible server."""

    code = "server_unreachable"
