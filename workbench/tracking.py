"""MLflow as the workbench uses it: one client, the experiments' names, runs with batched metrics, tables, links.

The running server is asked first; where our own does not run, its SQLite file and artifact folder are used directly, so that
the command line and notebooks work without the app and write what the server shows later. A tracking URI of somebody else's
(``MLFLOW_TRACKING_URI``) is taken as it is. MLflow is imported when first needed: it costs seconds. What a version, an
evaluation or a benchmark logs belongs to those rooms.
"""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from workbench.postgres_url import without_password
from workbench.versions.errors import RegistryUnreachableError

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient

    from workbench.settings import Settings

EXPERIMENTS = {
    "benchmark": "quire/benchmark",
    "evaluation": "quire/evaluation",
    "finetune": "quire/finetune",
    "runs": "quire/runs",
    "requests": "quire/requests",
}
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SQLALCHEMYSTORE_POOL_SIZE": "50",  # with the default of 5, evaluations of 200 rows stall and lose rows
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the default of 7 keeps a caller waiting for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # commands end with one JSON object on stdout
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
_DATABASES = ("sqlite:", "postgresql")  # MLflow's stores that need no server
_PROBE_S = 1.0


def tracking_uri(settings: Settings) -> str:
    """Where to read and write now: the environment's store, our running server, or that server's database itself."""
    if settings.mlflow_tracking_uri and settings.mlflow_tracking_uri != own_server(settings):
        return settings.mlflow_tracking_uri
    if answers(own_server(settings)):
        return own_server(settings)
    folder = settings.home_dir / "mlflow"
    folder.mkdir(parents=True, exist_ok=True)
    return settings.mlflow_store


def own_server(settings: Settings) -> str:
    """The address of the server that `quire up` starts."""
    own: Settings = settings.model_copy(update={"mlflow_tracking_uri": None})
    return own.mlflow_url


def answers(url: str) -> bool:
    """Whether a tracking server answers at that address within a second."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=_PROBE_S) as response:
            return bool(response.status == 200)
    except (OSError, ValueError, urllib.error.URLError):
        return False


def client(settings: Settings) -> MlflowClient:
    """A client of the tracking store and the registry. Cheap after the first one, which imports MLflow.

    Raises:
        RegistryUnreachableError: the store cannot be opened.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    uri = tracking_uri(settings)
    with reachable(uri):
        from mlflow import MlflowClient

        if uri.startswith(_DATABASES):
            _serve_artifacts_from_files(settings.home_dir / "mlflow" / "artifacts")
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def reachable(what: Settings | str) -> Iterator[None]:
    """Turns MLflow's failures to reach its store into one typed error; others pass.

    Raises:
        RegistryUnreachableError: naming the address and the reason.
    """
    try:
        yield
    except Exception as error:
        if not _is_unreachable(error):
            raise
        uri = without_password(what if isinstance(what, str) else tracking_uri(what))
        raise RegistryUnreachableError(
            f"MLflow at {uri} does not answer: {_first_line(error)}", value=uri, param="MLFLOW_TRACKING_URI",
            remedy="Check that it runs, or unset MLFLOW_TRACKING_URI to use Quire's own.",
        ) from error  # fmt: skip


def experiment(settings: Settings, name: str) -> str:
    """The id of an experiment, by its key in EXPERIMENTS or by its full name; made if it is not there."""
    return _experiment(client(settings), EXPERIMENTS.get(name, name))


def _experiment(mlflow_client: MlflowClient, name: str) -> str:
    from mlflow.exceptions import MlflowException

    with reachable(mlflow_client.tracking_uri):
        found = mlflow_client.get_experiment_by_name(name)
        if found is None:
            # the address that our server would give, so that both ways see the same files
            direct = mlflow_client.tracking_uri.startswith(_DATABASES)
            location = f"mlflow-artifacts:/{name.replace('/', '-')}" if direct else None
            try:
                return str(mlflow_client.create_experiment(name, artifact_location=location))
            except MlflowException:
                found = mlflow_client.get_experiment_by_name(name)  # another process was first
                if found is None:
                    raise
        if found.lifecycle_stage != "active":
            mlflow_client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """One MLflow run that is being written. As a context manager it ends as FINISHED, or FAILED on an exception."""

    id: str
    experiment_id: str
    name: str
    client: MlflowClient

    def log_metrics(self, metrics: Mapping[str, float], *, step: int = 0) -> None:
        """All metrics in one call: one by one they cost 2.5 to 25 ms each."""
        import time

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        rows = [Metric(name, float(value), now, step) for name, value in metrics.items()]
        with reachable(self.client.tracking_uri):
            for start in range(0, len(rows), 1000):  # the server's limit of one call
                self.client.log_batch(self.id, metrics=rows[start : start + 1000])

    def log_curve(self, name: str, values: Mapping[int, float]) -> None:
        """One metric over steps, in one call."""
        import time

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        rows = [Metric(name, float(value), now, step) for step, value in values.items()]
        with reachable(self.client.tracking_uri):
            for start in range(0, len(rows), 1000):
                self.client.log_batch(self.id, metrics=rows[start : start + 1000])

    def log_table(self, name: str, table: pd.DataFrame) -> None:
        """A table that MLflow's own pages show under the run's artifacts and in the evaluation view."""
        with reachable(self.client.tracking_uri):
            self.client.log_table(self.id, data=table, artifact_file=name if "." in name else f"{name}.json")

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """One file, or a folder with what is in it."""
        with reachable(self.client.tracking_uri):
            if path.is_dir():
                self.client.log_artifacts(self.id, str(path), folder)
            else:
                self.client.log_artifact(self.id, str(path), folder)

    def log_dict(self, value: Mapping[str, Any], name: str) -> None:
        """A JSON or YAML artifact, by the name's ending."""
        with reachable(self.client.tracking_uri):
            self.client.log_dict(self.id, dict(value), name)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Tags in one call."""
        from mlflow.entities import RunTag

        with reachable(self.client.tracking_uri):
            self.client.log_batch(self.id, tags=[RunTag(name, str(value)) for name, value in tags.items()])

    def end(self, status: str = "FINISHED") -> None:
        """Ends the run: FINISHED, FAILED or KILLED."""
        with reachable(self.client.tracking_uri):
            self.client.set_terminated(self.id, status)

    @property
    def path(self) -> str:
        """Where MLflow's pages show the run, under our own origin."""
        return run_path(self.experiment_id, self.id)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end("FINISHED" if kind is None else "FAILED")


def start_run(
    settings: Settings,
    experiment: str,
    name: str,
    *,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, Any] | None = None,
) -> TrackedRun:
    """Starts a run in an experiment (a key of EXPERIMENTS or a name), with its parameters in one call.

    Parameter values are cut at 6,000 characters, MLflow's limit.
    """
    from mlflow.entities import Param

    mlflow_client = client(settings)
    experiment_id = _experiment(mlflow_client, EXPERIMENTS.get(experiment, experiment))
    with reachable(mlflow_client.tracking_uri):
        run = mlflow_client.create_run(
            experiment_id, run_name=name, tags={key: str(value) for key, value in (tags or {}).items()}
        )
        if params:
            rows = [Param(key, str(value)[:6000]) for key, value in params.items()]
            mlflow_client.log_batch(run.info.run_id, params=rows)
    return TrackedRun(run.info.run_id, experiment_id, name, mlflow_client)


def log_metrics(run: TrackedRun, metrics: Mapping[str, float], *, step: int = 0) -> None:
    """`run.log_metrics`."""
    run.log_metrics(metrics, step=step)


def log_table(run: TrackedRun, name: str, table: pd.DataFrame) -> None:
    """`run.log_table`."""
    run.log_table(name, table)


def run_path(experiment_id: str, run_id: str) -> str:
    """The path of a run's page in MLflow's own interface, under our origin."""
    return f"/mlflow/#/experiments/{experiment_id}/runs/{run_id}"


def link(settings: Settings, run_id: str) -> str:
    """The path under our origin of a run's page, or its full address where MLflow is somebody else's."""
    mlflow_client = client(settings)
    with reachable(mlflow_client.tracking_uri):
        run = mlflow_client.get_run(run_id)
    path = run_path(run.info.experiment_id, run_id)
    uri = str(mlflow_client.tracking_uri)
    if uri.startswith("http") and uri != own_server(settings):
        return uri.rstrip("/") + path.removeprefix("/mlflow")
    return path


def _serve_artifacts_from_files(own_folder: Path) -> None:
    """With a database used directly, `mlflow-artifacts:` means the folder that the server would write to: beside a SQLite
    file, or `own_folder`."""
    from mlflow.store.artifact import artifact_repository_registry as registry
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
    from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository

    def open_repository(
        artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None
    ) -> Any:
        if tracking_uri is not None and tracking_uri.startswith(_DATABASES):
            is_file = tracking_uri.startswith("sqlite:")
            folder = (
                Path(tracking_uri.removeprefix("sqlite:///")).parent / "artifacts" if is_file else own_folder
            )
            below = artifact_uri.removeprefix("mlflow-artifacts:").lstrip("/")
            return LocalArtifactRepository((folder / below).as_uri())
        return MlflowArtifactsRepository(artifact_uri, tracking_uri, registry_uri)

    registry._artifact_repository_registry.register("mlflow-artifacts", open_repository)


def _is_unreachable(error: BaseException) -> bool:
    """Whether the cause is the way to the store, not what was asked of it."""
    seen: BaseException | None = error
    while seen is not None:
        module = type(seen).__module__
        if isinstance(seen, ConnectionError | TimeoutError) or module.startswith(("requests.", "urllib3.")):
            return True
        if module.startswith("sqlalchemy.") and type(seen).__name__ in ("OperationalError", "TimeoutError"):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
