"""Settings of the app: the environment, read once, checked before any work.

``PORT``, ``MLFLOW_PORT`` and ``HOME_DIR`` have no prefix, so that two checkouts run side by side with three variables;
everything else is ``QUIRE_…``. Engine settings that have no field here belong to ``engine.EngineConfig``.

Boundary: values only. Nothing here loads a model or opens a port; `prepare_home` makes the folders.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from workbench.access import exposure
from workbench.errors import HomeDirError, SettingsError
from workbench.fleet.routes import Route, parse_routes
from workbench.postgres_url import with_driver
from workbench.traffic import Split, parse_splits

if TYPE_CHECKING:
    from engine.config import EngineConfig

FAKE_MODEL = "fake-echo"  # the model that is none (QUIRE_FAKE)
BUNDLED_MODEL = Path("models") / "chat-base"
Dtype = Literal["auto", "float64", "float32", "bfloat16", "float16"]
KVCacheDtype = Literal["auto", "fp8", "fp8_e4m3", "int8"]
Quantization = Literal["int8", "int4", "fp8"]
LogLevel = Literal["debug", "info", "warning", "error"]


class Settings(BaseSettings):
    """What the environment says. Make it with `load`, which turns every complaint into a SettingsError."""

    model_config = SettingsConfigDict(env_prefix="QUIRE_", extra="forbid", frozen=True, populate_by_name=True)

    port: int = Field(default=8501, ge=1, le=65535, validation_alias="PORT")
    mlflow_port: int = Field(default=5001, ge=1, le=65535, validation_alias="MLFLOW_PORT")
    home_dir: Path = Field(default=Path(".quire"), validation_alias="HOME_DIR")
    mlflow_tracking_uri: str | None = Field(default=None, validation_alias="MLFLOW_TRACKING_URI")
    otlp_endpoint: str | None = Field(
        default=None, validation_alias="OTEL_EXPORTER_OTLP_ENDPOINT", pattern=r"^https?://"
    )  # of a collector; the other OTEL_EXPORTER_OTLP_* are the exporter's

    # The database under the MLflow server that we start; None: HOME_DIR/mlflow/mlflow.db. It may hold a password.
    mlflow_backend_store_uri: str | None = Field(
        default=None, validation_alias="MLFLOW_BACKEND_STORE_URI", repr=False
    )

    host: str = "127.0.0.1"
    # Who may come in (workbench.access). Off loopback a login is asked for in any case.
    require_login: bool = False  # on loopback too, as behind a proxy on this machine
    allowed_hosts: str = (
        ""  # names that this server is reached by, separated by commas; *.example.org for all below
    )
    trusted_proxy_header: str = ""  # such as X-Forwarded-User: a proxy names the user in it
    trusted_proxies: str = ""  # networks of such proxies, such as 10.0.0.0/8, separated by commas
    admins: str = ""  # users that a proxy names who are administrators, separated by commas
    session_hours: float = Field(default=12, gt=0, le=24 * 365)  # that a login lasts
    ssl_certfile: Path | None = None  # PEM, the server's own certificate first; https with both
    ssl_keyfile: Path | None = None
    model: str | None = None  # a folder or a hub id; None: the bundled model
    dtype: Dtype = "auto"
    quantization: Quantization | None = None  # of the weights as they load
    kv_cache_dtype: KVCacheDtype = "auto"
    device: str = "auto"
    tensor_parallel_size: int = Field(default=1, ge=1)  # processes that each compute a part of every layer
    threads: int | None = Field(default=None, ge=1)  # CPU threads of the forward pass, of each of them
    max_num_seqs: int = Field(default=256, ge=1)
    # What may wait for a row; more is refused until there is room. "auto": in proportion to the engine.
    max_queued_requests: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    max_queued_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    max_queue_seconds: float | None = Field(default=None, gt=0)  # that a request may wait; None: for ever
    client_weights: dict[str, float] | None = None  # JSON: {"end user": share}, 1 for all others
    max_model_len: int | None = Field(default=None, ge=1)
    num_blocks: int | None = Field(default=None, ge=1)
    swap_space_bytes: int = Field(default=0, ge=0)  # host memory for cached KV blocks; 0: none
    deterministic: bool = False
    enable_prefix_cache: bool = True
    speculative_config: dict[str, Any] | None = (
        None  # JSON: {"method": "ngram", …} or {"method": "draft_model", "model": "org/small", …}
    )
    # Whether adapters are served over an engine of their base. None: every engine on a CPU takes adapters, which costs
    # nothing until one is loaded; on a GPU one that was loaded for an adapter does. False: adapters are merged.
    enable_lora: bool | None = None
    max_loras: int = Field(default=8, ge=1)  # different adapters in one batch
    max_lora_rank: int = Field(default=16, ge=8, le=256)  # 8, 16, 32, 64, 128 or 256
    allow_runtime_lora_updating: bool = False  # whether /v1/load_lora_adapter and its opposite work
    lora_roots: str = (
        ""  # folders that such adapters must lie in, separated by commas; empty: HOME_DIR/models
    )
    tool_call_parser: str | None = None  # None: as the model's chat template shows
    reasoning_parser: str | None = None
    require_key: bool = False  # ask for an API key even before the first one was made
    max_body_bytes: int = Field(default=8 * 2**20, ge=1024)  # of one API request
    max_connections: int = Field(default=4096, ge=1)  # at a time; more are answered with 503
    stalled_client_seconds: float = Field(
        default=60, gt=0
    )  # a stream's client that reads nothing is cut then
    step_timeout_seconds: float = Field(default=300, ge=0)  # of an engine; then the app restarts. 0: never
    shutdown_grace_seconds: float = Field(default=3, ge=0, le=3600)  # that running requests have to end in
    log_level: LogLevel = "warning"
    fake: bool = False  # no model: the engine runs on FakeRunner (tests and page work)
    follow: str = "ticket-extractor@champion"  # aliases that stay resident, separated by commas; empty: none
    split: str = ""  # traffic of public names between models by weight: name=model:weight,model:weight; …
    routes: str = ""  # public names over several endpoints: name=endpoint:NAME/MODEL,endpoint:NAME/MODEL; …
    demo: bool = True  # register the bundled versions when MLflow answers for the first time
    request_text: Literal["off", "redacted", "full"] = "redacted"  # what the request log keeps of texts
    # The share of requests that are traced, to the collector and to MLflow. None: every one to the collector, none to MLflow.
    trace_sample: float | None = Field(default=None, ge=0, le=1)
    retention_days: float | None = Field(default=None, gt=0)  # of what people wrote, see observe/retention.py
    log_format: Literal["text", "json"] = "text"
    database_url: str | None = None  # of jobs, schedules and feedback; None: HOME_DIR/quire.db

    @property
    def url(self) -> str:
        """Where this machine's programs reach the app: an address that means "all" is loopback to them."""
        scheme = "https" if self.ssl_certfile else "http"
        host = {"0.0.0.0": "127.0.0.1", "::": "::1", "[::]": "::1"}.get(self.host, self.host)
        return f"{scheme}://{_bracketed(host)}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        return _is_loopback(self.host)

    @property
    def login_required(self) -> bool:
        """Pages are shown to those alone who have logged in: wherever others than this machine's user may ask."""
        return (
            self.require_login
            or not self.is_loopback
            or bool(self.trusted_proxy_header or self.allowed_hosts)
        )

    @property
    def allowed_host_names(self) -> tuple[str, ...]:
        """Names beside loopback that requests may call this server by."""
        return _parts(self.allowed_hosts)

    @property
    def trusted_proxy_networks(self) -> tuple[str, ...]:
        return _parts(self.trusted_proxies)

    @property
    def admin_names(self) -> tuple[str, ...]:
        return _parts(self.admins)

    @property
    def mlflow_url(self) -> str:
        """Where clients find MLflow: the one named by the environment, or our own child."""
        return self.mlflow_tracking_uri or f"http://{_bracketed(self.mlflow_host)}:{self.mlflow_port}/mlflow"

    @property
    def mlflow_host(self) -> str:
        """Our own MLflow has no login: others reach it through /mlflow alone."""
        return self.host if self.is_loopback else "127.0.0.1"

    @property
    def mlflow_store(self) -> str:
        """The database of our own MLflow server."""
        file = self.home_dir / "mlflow" / "mlflow.db"
        return with_driver(self.mlflow_backend_store_uri or "") or f"sqlite:///{file}"

    @property
    def run_dir(self) -> Path:
        return self.home_dir / "run"

    @property
    def device_id(self) -> str:
        """The device's number, for its lock: "1" of "cuda:1", else "0"."""
        number = self.device.rpartition(":")[2]
        return number if number.isdigit() else "0"

    @property
    def follow_refs(self) -> tuple[str, ...]:
        """The followed aliases, ``NAME@alias``."""
        return tuple(part.strip().removeprefix("models:/") for part in self.follow.split(",") if part.strip())

    @property
    def splits(self) -> tuple[Split, ...]:
        """The names whose traffic is split."""
        return parse_splits(self.split)

    @property
    def route_table(self) -> tuple[Route, ...]:
        """The names whose requests go to endpoints."""
        return parse_routes(self.routes)

    @property
    def lora_root_folders(self) -> tuple[Path, ...]:
        """The folders that adapters loaded at run time must lie in."""
        given = [Path(part.strip()).expanduser() for part in self.lora_roots.split(",") if part.strip()]
        return tuple(given) or (self.home_dir / "models",)

    @property
    def model_path(self) -> str:
        """The folder or hub id to load."""
        return FAKE_MODEL if self.fake else self.model or str(bundled_model())

    def engine_config(self) -> EngineConfig:
        """The engine's settings. Raises ConfigError."""
        from engine.config import EngineConfig, SpeculativeConfig

        return EngineConfig(
            model=self.model_path,
            dtype=self.dtype,
            quantization=self.quantization,
            kv_cache_dtype=self.kv_cache_dtype,
            device=self.device,
            tensor_parallel_size=self.tensor_parallel_size,
            num_threads=self.threads,
            max_num_seqs=self.max_num_seqs,
            max_queued_requests=self.max_queued_requests,
            max_queued_tokens=self.max_queued_tokens,
            max_queue_seconds=self.max_queue_seconds,
            client_weights=self.client_weights,
            max_model_len=self.max_model_len,
            num_blocks=self.num_blocks,
            swap_space_bytes=self.swap_space_bytes,
            deterministic=self.deterministic,
            enable_prefix_cache=self.enable_prefix_cache,
            speculative_config=SpeculativeConfig.from_dict(self.speculative_config)
            if self.speculative_config is not None
            else None,
            enable_lora=self.enable_lora is True,
            max_loras=self.max_loras,
            max_lora_rank=self.max_lora_rank,
            tool_call_parser=self.tool_call_parser,
            reasoning_parser=self.reasoning_parser,
        )

    def to_env(self) -> dict[str, str]:
        """The same settings as environment variables, for child processes."""
        env = {"PORT": str(self.port), "MLFLOW_PORT": str(self.mlflow_port), "HOME_DIR": str(self.home_dir)}
        if self.mlflow_tracking_uri:
            env["MLFLOW_TRACKING_URI"] = self.mlflow_tracking_uri
        if self.mlflow_backend_store_uri:
            env["MLFLOW_BACKEND_STORE_URI"] = self.mlflow_backend_store_uri
        for name in type(self).model_fields:
            value = getattr(self, name)
            if name not in _UNPREFIXED and value is not None:
                env[f"QUIRE_{name.upper()}"] = _as_text(value)
        return env


def _as_text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool | dict) else str(value)


_UNPREFIXED = {"port": "PORT", "mlflow_port": "MLFLOW_PORT", "home_dir": "HOME_DIR",
               "mlflow_tracking_uri": "MLFLOW_TRACKING_URI", "otlp_endpoint": "OTEL_EXPORTER_OTLP_ENDPOINT",
               "mlflow_backend_store_uri": "MLFLOW_BACKEND_STORE_URI"}  # fmt: skip


def load(**overrides: Any) -> Settings:
    """Read the environment; `overrides` (from the command line) win where they are not None.

    Paths come back absolute, so that children with another working directory mean the same folder.

    Raises:
        SettingsError: naming the variable, its value and what is accepted.
        HostRefusedError: others could connect, and nobody could log in.
        CertificateError: the files for https cannot be used.
    """
    _refuse_misspelt_variables()
    try:
        settings = Settings(**{name: value for name, value in overrides.items() if value is not None})
    except ValidationError as error:
        raise _settings_error(error) from None
    _check_follow(settings)
    parse_splits(settings.split)
    _check_routes(settings)
    if settings.port == settings.mlflow_port and not settings.mlflow_tracking_uri:
        raise SettingsError(
            f"PORT and MLFLOW_PORT are both {settings.port}", value=settings.port, param="MLFLOW_PORT",
            remedy="Give them different ports.",
        )  # fmt: skip
    files = {
        "home_dir": settings.home_dir,
        "ssl_certfile": settings.ssl_certfile,
        "ssl_keyfile": settings.ssl_keyfile,
    }
    settings = settings.model_copy(
        update={name: file and file.expanduser().absolute() for name, file in files.items()}
    )
    exposure.check(settings)
    return settings


def prepare_home(settings: Settings) -> None:
    """Make HOME_DIR and `run/` in it, and prove that they can be written.

    Raises:
        HomeDirError: naming the folder and the system's reason.
    """
    try:
        settings.run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=settings.run_dir) as probe:
            probe.write(b"x")
    except OSError as error:
        raise HomeDirError(
            f"HOME_DIR {str(settings.home_dir)!r} cannot be written: {error.strerror or error}",
            value=str(settings.home_dir),
            limit="a folder that this user can write",
            param="HOME_DIR",
            remedy="Set HOME_DIR to such a folder, for example HOME_DIR=~/.quire.",
        ) from error


def resource_root() -> Path:
    """Where `data/`, `pages/` and `.streamlit/` are: the checkout, or the resources inside an installed wheel."""
    package = Path(__file__).resolve().parent
    packed = package / "_resources"
    return packed if packed.is_dir() else package.parent


def data_dir() -> Path:
    """The project's `data/`."""
    return resource_root() / "data"


def bundled_model() -> Path:
    """The folder of the model that this project trained."""
    return data_dir() / BUNDLED_MODEL


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _parts(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _check_follow(settings: Settings) -> None:
    for ref in settings.follow_refs:
        name, at, alias = ref.partition("@")
        if not (name and at and alias) or "@" in alias or "/" in ref:
            raise SettingsError(
                f"QUIRE_FOLLOW={settings.follow} is not accepted: {ref!r} is no alias", value=settings.follow,
                limit="NAME@alias, separated by commas; empty for none", param="QUIRE_FOLLOW",
                remedy="Set it like ticket-extractor@champion.",
            )  # fmt: skip


def _check_routes(settings: Settings) -> None:
    twice = {route.name for route in settings.route_table} & {split.name for split in settings.splits}
    if twice:
        raise SettingsError(
            f"QUIRE_ROUTES and QUIRE_SPLIT both name {sorted(twice)[0]!r}", value=sorted(twice), param="QUIRE_ROUTES",
            remedy="Give each public name one of them.",
        )  # fmt: skip


def _refuse_misspelt_variables() -> None:
    """A QUIRE_ variable that is nearly one of ours is a slip that must not be dropped in silence."""
    known = [f"QUIRE_{name.upper()}" for name in Settings.model_fields if name not in _UNPREFIXED]
    for name in os.environ:
        if name.startswith("QUIRE_") and name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
            if near:
                raise SettingsError(
                    f"unknown setting {name}",
                    value=name,
                    limit=known,
                    param=name,
                    remedy=f"Did you mean {near[0]}?",
                )


def _settings_error(error: ValidationError) -> SettingsError:
    first = error.errors(include_url=False)[0]
    field = str(first["loc"][0])
    name = field if field in _UNPREFIXED.values() else _UNPREFIXED.get(field, f"QUIRE_{field.upper()}")
    value = first.get("input")
    limits = {k: v for k, v in first.get("ctx", {}).items() if k in ("ge", "le", "gt", "lt", "expected")}
    return SettingsError(
        f"{name}={value} is not accepted: {first['msg'].lower()}", value=value, limit=limits or first["msg"],
        param=name, remedy=f"Set {name} to an accepted value, or unset it for its default.",
    )  # fmt: skip


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host
