"""From what a person writes to a folder that the engine loads: registry addresses, adapter folders, model folders, hub ids.

Weights are found by digest. An adapter is merged into a cached folder named by the digest of what it is made of, or, for
engines that take adapters, handed over beside its base. It asks the registry, but changes nothing there.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.versions.adapter import adapter_digest, is_adapter, read_adapter
from workbench.versions.errors import AdapterError, MissingWeightsError, UnknownVersionError
from workbench.versions.merge import is_merged, merge, merged_digest
from workbench.versions.ref import ResolvedVersion, VersionRef, parse_address
from workbench.versions.weights import adapter_cache, digest_of, find_weights, is_model, merged_cache

if TYPE_CHECKING:
    from workbench.settings import Settings
    from workbench.versions.registry import VersionInfo


def resolve(ref: str, settings: Settings, *, merged: bool = True) -> ResolvedVersion:
    """The version that `ref` names now, and a folder with its weights.

    `merged`: an adapter is merged into its base; else base and adapter come as they are, with a way to merge them.

    Raises:
        UnknownVersionError: the registry has no such version, or it is no folder and no hub id.
        MissingWeightsError: its weights are nowhere here; the digest is named.
        AdapterError, WrongBaseError: an adapter that does not fit its base.
        RegistryUnreachableError: the registry does not answer.
        ModelNotFoundError: a hub id that cannot be downloaded.
    """
    folder = Path(ref).expanduser()
    if folder.is_dir():
        return _whole(_of_folder(folder, settings), merged)
    address = parse_address(ref)
    if address is not None:
        from workbench.versions.registry import Registry

        which = f"@{address.alias}" if address.alias else str(address.version)
        return _whole(_of_registered(Registry(settings).get(address.name, which), settings, merged), merged)
    if ref.startswith("models:/"):
        raise UnknownVersionError(
            f"{ref!r} names no version", value=ref, limit="models:/NAME@alias or models:/NAME/3", param="model",
            remedy="Name an alias or a number.",
        )  # fmt: skip
    from engine.model_folder import find_model

    return _whole(_of_folder(find_model(ref), settings, name=ref), merged)


def _whole(found: ResolvedVersion, merged: bool) -> ResolvedVersion:
    return ResolvedVersion(found.ref, found.merge()) if merged and found.merge is not None else found


def merged(base: Path, adapter: Path, settings: Settings) -> ResolvedVersion:
    """Base + adapter as a folder that can be loaded, without the registry.

    Raises:
        AdapterError, WrongBaseError: the adapter cannot be read, or belongs to another base.
    """
    found = read_adapter(adapter)
    ref = VersionRef(adapter.resolve().name, None, None, "", digest_of(base, settings), found.digest)
    return _whole(_over(ref, base, adapter, settings), True)


def _of_folder(folder: Path, settings: Settings, name: str = "") -> ResolvedVersion:
    name = name or folder.resolve().name
    if is_adapter(folder) and not is_model(folder):
        adapter = read_adapter(folder)
        if not adapter.base_digest:
            raise AdapterError(
                f"the adapter {folder} does not say which base it belongs to", value=str(folder), param="adapter",
                remedy="Register it with its base: quire versions register NAME --base FOLDER --adapter FOLDER.",
            )  # fmt: skip
        base = find_weights(adapter.base_digest, settings, what=f"the base of {folder}")
        return _over(
            VersionRef(name, None, None, "", adapter.base_digest, adapter.digest), base, folder, settings
        )
    digest = digest_of(folder, settings)
    return ResolvedVersion(VersionRef(name, None, None, digest, digest), folder)


def _of_registered(info: VersionInfo, settings: Settings, merged: bool) -> ResolvedVersion:
    ref = info.ref
    cached = merged_cache(settings, ref.digest)
    if merged and ref.adapter_digest and is_merged(cached):
        return ResolvedVersion(ref, cached)
    hint = info.lineage.get("base_path", "")
    try:
        base = find_weights(
            ref.base_digest,
            settings,
            what=f"{ref.id}'s base {info.lineage.get('base_name', '')}",
            hints=[hint],
        )
    except MissingWeightsError:
        if ref.adapter_digest and is_merged(cached):  # made while the base was there
            return ResolvedVersion(ref, cached)
        raise
    if not ref.adapter_digest:
        return ResolvedVersion(ref, base)
    try:
        adapter = find_weights(
            ref.adapter_digest,
            settings,
            what=f"{ref.id}'s adapter",
            hints=[info.lineage.get("adapter_path", "")],
        )
    except MissingWeightsError:
        adapter = _fetch_adapter(info, settings)
    return _over(ref, base, adapter, settings)


def _over(ref: VersionRef, base: Path, adapter: Path, settings: Settings) -> ResolvedVersion:
    """Base and adapter as they are."""
    digest = ref.digest or merged_digest(ref.base_digest, ref.adapter_digest)
    ref = VersionRef(ref.name, ref.version, ref.alias, digest, ref.base_digest, ref.adapter_digest)
    return ResolvedVersion(ref, base, adapter, partial(merge, base, adapter, merged_cache(settings, digest)))


def _fetch_adapter(info: VersionInfo, settings: Settings) -> Path:
    """The adapter from the registry's artifacts, checked, then kept under its digest."""
    from workbench import tracking

    ref = info.ref
    client = tracking.client(settings)
    target = adapter_cache(settings, ref.adapter_digest)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as temporary:
        try:
            with tracking.reachable(client.tracking_uri):
                source = client.get_model_version_download_uri(ref.name, str(ref.version))
                from mlflow.artifacts import download_artifacts

                got = Path(
                    download_artifacts(
                        artifact_uri=f"{source}/adapter", dst_path=temporary, tracking_uri=client.tracking_uri
                    )
                )
        except OSError as error:
            raise _missing(ref) from error
        if not is_adapter(got) or adapter_digest(got) != ref.adapter_digest:
            raise _missing(ref)
        try:
            os.rename(got, target)
        except OSError:
            if not target.is_dir():  # another process was first: both hold the same
                shutil.copytree(got, target)
    return target


def _missing(ref: VersionRef) -> MissingWeightsError:
    return MissingWeightsError(
        f"the adapter {ref.adapter_digest} of {ref.id} is neither here nor among the registry's artifacts",
        value=ref.adapter_digest, param="model", remedy="Train it again, or register it again from a folder.",
    )  # fmt: skip
