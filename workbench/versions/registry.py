"""The registry of model versions: MLflow's, with versions by reference, digests as tags, and aliases that remember.

A version names its base (a folder or hub id, never copied) and, for fine-tunes, an adapter, which is stored as an artifact.
Registering the same content again gives the version that is there. Every call asks the store anew, so an alias that was
moved elsewhere is seen at once. It loads no weights: that is `resolution`.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench import tracking
from workbench.access.audit import audited_in
from workbench.versions import aliases
from workbench.versions.adapter import CARD_NAME, CONFIG_NAME, LINEAGE_NAME, WEIGHTS_NAME, read_adapter
from workbench.versions.aliases import AliasMove
from workbench.versions.digest import identity_files
from workbench.versions.errors import NothingToRollBackError, UnknownVersionError, VersionError
from workbench.versions.merge import check_base, merged_digest
from workbench.versions.ref import VersionRef
from workbench.versions.weights import digest_of, is_model

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

    from workbench.settings import Settings

__all__ = ["AliasMove", "Registry", "VersionInfo"]

CHAMPION = "champion"
_OWN = "quire."
_METRIC = "quire.metric."
_ADAPTER_FILES = (CONFIG_NAME, WEIGHTS_NAME, LINEAGE_NAME, CARD_NAME)
_EXTERNAL = "mlflow.model.isExternal"


@dataclass(frozen=True, slots=True)
class VersionInfo:
    """One registered version. `lineage`: base and its path, adapter's path, run, data, as far as they are known."""

    ref: VersionRef
    aliases: tuple[str, ...]
    created_at: str  # UTC, ISO 8601
    description: str
    metrics: dict[str, float]
    tags: dict[str, str]
    size_bytes: int
    lineage: dict[str, str]


class Registry:
    """Registered names, their versions and aliases. Cheap to make; every method may import MLflow and use the network.

    Every method raises RegistryUnreachableError when the store does not answer.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def names(self) -> list[str]:
        """Registered names that hold versions of ours."""
        return sorted(model.name for model in _all_models(self._client()) if _is_ours(model))

    def versions(self, name: str | None = None) -> list[VersionInfo]:
        """Versions of a name, or of all, oldest first. Empty when there is no such name."""
        client = self._client()
        with tracking.reachable(client.tracking_uri):
            models = [m for m in _all_models(client) if _is_ours(m) and name in (None, m.name)]
            return [
                _info(version, dict(model.aliases))
                for model in models
                for version in _all_versions(client, model.name)
            ]

    def get(self, name: str, which: str | int) -> VersionInfo:
        """One version by its number or `@alias`.

        Raises:
            UnknownVersionError: there is none, or it was not registered by Quire.
        """
        client = self._client()
        text = str(which)
        with (
            _known(f"{name}{text if text.startswith('@') else '/' + text}"),
            tracking.reachable(client.tracking_uri),
        ):
            if text.startswith("@"):
                version = client.get_model_version_by_alias(name, text[1:])
            else:
                version = client.get_model_version(name, text.removeprefix("v"))
            model = client.get_registered_model(name)
        if "quire.digest" not in version.tags:
            raise UnknownVersionError(
                f"{name}/{version.version} was registered without a digest, so its weights cannot be known",
                value=f"{name}/{version.version}", param="model", remedy="Register it with `quire versions register`.",
            )  # fmt: skip
        info = _info(version, dict(model.aliases))
        alias = text[1:] if text.startswith("@") else None
        return replace(info, ref=replace(info.ref, alias=alias))

    def register(
        self,
        name: str,
        *,
        base: Path | str,
        adapter: Path | None = None,
        run_id: str | None = None,
        description: str = "",
        tags: Mapping[str, str] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> VersionRef:
        """Registers base, or base + adapter, under a name and returns the version; known content is not doubled.

        Raises:
            VersionError: the name cannot be used, or the base is no model folder.
            AdapterError, WrongBaseError: the adapter cannot be read, or belongs to another base.
        """
        _check_name(name)
        facts = self._facts(Path(base), adapter)
        client = self._client()
        with tracking.reachable(client.tracking_uri):
            _create_model(client, name)
            for known in _all_versions(client, name):
                if known.tags.get("quire.digest") == facts["quire.digest"]:
                    return _info(known, {}).ref
            rows = {
                **{_METRIC + key: repr(float(value)) for key, value in (metrics or {}).items()},
                **(tags or {}),
                **facts,
            }
            run_id = run_id or self._run(name, facts, metrics or {})
            source, model_id = self._external_model(client, name, facts, adapter, run_id)
            version = client.create_model_version(
                name, source, run_id=run_id, tags=rows, description=description, model_id=model_id
            )
            return _info(version, {}).ref

    def record_metrics(self, name: str, version: int, metrics: Mapping[str, float]) -> None:
        """Notes measured figures on a version, where lists show them; the same name again replaces."""
        client = self._client()
        with _known(f"{name}/{version}"), tracking.reachable(client.tracking_uri):
            for key, value in metrics.items():
                client.set_model_version_tag(name, str(version), _METRIC + key, repr(float(value)))

    def promote(
        self, name: str, version: int | str, *, alias: str = CHAMPION, reason: str = ""
    ) -> VersionRef:
        """Points an alias at a version and records the move; nothing is recorded when it points there already.

        Raises:
            InvalidAliasError: an alias that the registry cannot hold.
            UnknownVersionError: no such version.
        """
        aliases.check_alias(alias)
        target = self.get(name, version)
        number = target.ref.version
        assert number is not None, "a registered version has a number"
        self._move(name, alias, number, reason, is_rollback=False)
        return replace(target.ref, alias=alias)

    def rollback(self, name: str, *, alias: str = CHAMPION, reason: str = "") -> VersionRef:
        """Points an alias back at the version that it named before its last move; again, at the one before that.

        Raises:
            NothingToRollBackError: it has named one version only.
            UnknownVersionError: no such name, or the earlier version was deleted.
        """
        version = self.previous(name, alias=alias)
        if version is None:
            raise NothingToRollBackError(
                f"{name}@{alias} has named no other version before", value=f"{name}@{alias}", param="alias",
                remedy="Promote the version that it should name.",
            )  # fmt: skip
        target = self.get(name, version)
        self._move(name, alias, version, reason or "rolled back", is_rollback=True)
        return replace(target.ref, alias=alias)

    def previous(self, name: str, *, alias: str = CHAMPION) -> int | None:
        """The version that `rollback` would lead to; None when there is none."""
        return aliases.rollback_target(self.history(name, alias))

    def history(self, name: str, alias: str = CHAMPION) -> list[AliasMove]:
        """All moves of an alias, oldest first, those made outside Quire included.

        Raises:
            UnknownVersionError: no such name.
        """
        model = self._model(name)
        return aliases.history(
            dict(model.tags), alias, _points_at(model, alias), _iso(model.last_updated_timestamp)
        )

    def _move(self, name: str, alias: str, version: int, reason: str, *, is_rollback: bool) -> None:
        """The alias first, then its record: killed between the two, the history shows a move without a reason."""
        client = self._client()
        model = self._model(name)
        before = _points_at(model, alias)
        if before == version:
            return
        move = aliases.new_move(before, version, reason, is_rollback=is_rollback)
        key, value = aliases.tag_of(alias, move, dict(model.tags))
        told = f"from {before or 'nothing'} to {version}"
        acts = audited_in(self._settings.home_dir, "move alias", f"{name}@{alias}", told)
        with acts, _known(f"{name}/{version}"), tracking.reachable(client.tracking_uri):
            client.set_registered_model_alias(name, alias, str(version))
            client.set_registered_model_tag(name, key, value)

    def _model(self, name: str) -> RegisteredModel:
        client = self._client()
        with _known(name), tracking.reachable(client.tracking_uri):
            return client.get_registered_model(name)

    def _client(self) -> MlflowClient:
        return tracking.client(self._settings)

    def _facts(self, base: Path, adapter: Path | None) -> dict[str, str]:
        """Digests and places, as the tags of the version."""
        if not is_model(base):
            raise VersionError(
                f"{base} is no model folder", value=str(base), limit="a folder with config.json and *.safetensors",
                param="base", remedy="Name the folder of the whole base model.",
            )  # fmt: skip
        base_digest = digest_of(base, self._settings)
        size = sum(file.stat().st_size for file in identity_files(base))
        facts = {
            "quire.base_name": base.resolve().name, "quire.base_digest": base_digest, "quire.digest": base_digest,
            "quire.base_path": str(base.resolve()), "quire.size_bytes": str(size),
        }  # fmt: skip
        if adapter is None:
            return facts
        found = read_adapter(adapter)
        check_base(found, base_digest)
        return facts | {
            "quire.adapter_digest": found.digest,
            "quire.adapter_path": str(adapter.resolve()),
            "quire.digest": merged_digest(base_digest, found.digest),
            "quire.size_bytes": str(size + found.size_bytes),
        }

    def _run(self, name: str, facts: Mapping[str, str], metrics: Mapping[str, float]) -> str:
        """A run of its own for what was registered without one: the server wants every version to have a run."""
        params = {key.removeprefix(_OWN): value for key, value in facts.items()}
        with tracking.start_run(self._settings, "runs", f"register {name}", params=params) as run:
            run.log_metrics(metrics)
        return run.id

    def _external_model(
        self,
        client: MlflowClient,
        name: str,
        facts: Mapping[str, str],
        adapter: Path | None,
        run_id: str,
    ) -> tuple[str, str]:
        """MLflow's record of a model whose weights are elsewhere, with the adapter as its artifact: address and id."""
        from mlflow.models.utils import get_external_mlflow_model_spec

        params = {
            "path": facts["quire.base_path"], "sha256": facts["quire.digest"], "base_sha256": facts["quire.base_digest"],
            "adapter_sha256": facts.get("quire.adapter_digest", ""), "dtype": _dtype(Path(facts["quire.base_path"])),
        }  # fmt: skip
        model = client.create_logged_model(
            tracking.experiment(self._settings, "finetune"), name=name, source_run_id=run_id,
            tags={_EXTERNAL: "true", "quire.digest": facts["quire.digest"]}, params=params, model_type="llm",
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            get_external_mlflow_model_spec(model).save(str(folder / "MLmodel"))
            if adapter is not None:
                (folder / "adapter").mkdir()
                for file in (adapter / each for each in _ADAPTER_FILES):
                    if file.is_file():
                        shutil.copyfile(file, folder / "adapter" / file.name)
            client.log_model_artifacts(model.model_id, str(folder))
        client.finalize_logged_model(model.model_id, "READY")
        return str(model.artifact_location), str(model.model_id)


class _known:
    """Turns the store's "does not exist" into UnknownVersionError. Used as a context manager."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        code = getattr(error, "error_code", None)
        if code == "RESOURCE_DOES_NOT_EXIST" or (
            code == "INVALID_PARAMETER_VALUE" and "not found" in str(error)
        ):
            raise UnknownVersionError(
                f"the registry has no {self._what}", value=self._what, param="model",
                remedy="`quire versions list` shows what there is.",
            ) from error  # fmt: skip


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}", name):
        raise VersionError(
            f"{name!r} is not usable as a name", value=name, param="name",
            limit="letters, digits, dot, dash and underscore, at most 100", remedy="Choose a name like ticket-extractor.",
        )  # fmt: skip


def _create_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, tags={"quire.managed": "true"})
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        client.set_registered_model_tag(name, "quire.managed", "true")


def _is_ours(model: RegisteredModel) -> bool:
    return "quire.managed" in model.tags


def _all_models(client: MlflowClient) -> Iterable[RegisteredModel]:
    token = None
    while True:
        with tracking.reachable(client.tracking_uri):
            page = client.search_registered_models(max_results=200, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _all_versions(client: MlflowClient, name: str) -> list[ModelVersion]:
    found: list[Any] = []
    token = None
    while True:
        page = client.search_model_versions(f"name='{name}'", max_results=200, page_token=token)
        found += [version for version in page if "quire.digest" in version.tags]
        token = page.token
        if not token:
            return sorted(found, key=lambda version: int(version.version))


def _points_at(model: RegisteredModel, alias: str) -> int | None:
    version = dict(model.aliases).get(alias)
    return None if version is None else int(version)


def _info(version: ModelVersion, model_aliases: Mapping[str, Any]) -> VersionInfo:
    tags = dict(version.tags)
    number = int(version.version)
    ref = VersionRef(
        name=version.name, version=number, alias=None, digest=tags["quire.digest"],
        base_digest=tags.get("quire.base_digest", ""), adapter_digest=tags.get("quire.adapter_digest", ""),
    )  # fmt: skip
    known = ("base_name", "base_path", "adapter_path", "data", "recipe")
    lineage = {key: tags[_OWN + key] for key in known if _OWN + key in tags}
    if version.run_id:
        lineage["run_id"] = version.run_id
    return VersionInfo(
        ref=ref,
        aliases=tuple(sorted(alias for alias, value in model_aliases.items() if int(value) == number)),
        created_at=_iso(version.creation_timestamp),
        description=version.description or "",
        metrics={k.removeprefix(_METRIC): float(v) for k, v in sorted(tags.items()) if k.startswith(_METRIC)},
        tags={key: value for key, value in tags.items() if not key.startswith(_OWN)},
        size_bytes=int(tags.get("quire.size_bytes", 0)),
        lineage=lineage,
    )


def _iso(timestamp_ms: int | None) -> str:
    return datetime.fromtimestamp((timestamp_ms or 0) / 1000, UTC).isoformat(timespec="microseconds")


def _dtype(folder: Path) -> str:
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return "unknown"
    return str(config.get("dtype") or config.get("torch_dtype") or "unknown")
