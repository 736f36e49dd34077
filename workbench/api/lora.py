"""/v1/load_lora_adapter and /v1/unload_lora_adapter: adapters that come and go while the server runs, as vLLM has them.

They work only where QUIRE_ALLOW_RUNTIME_LORA_UPDATING is set. A path of a request never leaves the folders that the server
was given (QUIRE_LORA_ROOTS), links included.

Boundary: HTTP and the path. Serving an adapter is ``workbench.host``'s. Source of names and answers: vLLM, "LoRA Adapters".
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from workbench.api.errors import ForbiddenError
from workbench.api.intake import read_json, take_request_id
from workbench.api.schema import Body, LoadLoraRequest, UnloadLoraRequest, parse
from workbench.errors import ApiError, UnknownModelError
from workbench.host import EngineHost
from workbench.settings import Settings
from workbench.versions.adapter import CONFIG_NAME, WEIGHTS_NAME

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,127}")  # nothing that names a version, an alias or a folder


class LoraRoutes:
    """The handlers, with what they need."""

    def __init__(self, host: EngineHost, settings: Settings) -> None:
        self._host = host
        self._is_allowed = settings.allow_runtime_lora_updating
        self._max_body_bytes = settings.max_body_bytes
        self._roots = settings.lora_root_folders

    async def load(self, request: Request) -> Response:
        """POST /v1/load_lora_adapter."""
        body = await self._read(request, LoadLoraRequest)
        name = _checked_name(body.lora_name)
        folder = await asyncio.to_thread(checked_folder, body.lora_path, self._roots)
        await asyncio.to_thread(self._host.load_adapter, name, str(folder), load_inplace=body.load_inplace)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        """POST /v1/unload_lora_adapter: only what `load` had loaded."""
        name = (await self._read(request, UnloadLoraRequest)).lora_name
        loaded = [each.id for each in self._host.resident() if each.parent and each.name is None]
        if name not in loaded:
            raise UnknownModelError(
                f"the adapter {name!r} is not loaded", value=name, limit=loaded, param="lora_name",
                remedy="GET /v1/models lists what is.",
            )  # fmt: skip
        await asyncio.to_thread(self._host.unload, name)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    async def _read(self, request: Request, kind: type[Body]) -> Body:
        take_request_id(request)
        if not self._is_allowed:
            raise ForbiddenError(
                "adapters cannot be loaded or unloaded over the API here", value=False, limit=True,
                param="QUIRE_ALLOW_RUNTIME_LORA_UPDATING",
                remedy="Start the server with QUIRE_ALLOW_RUNTIME_LORA_UPDATING=true, or use `quire models`.",
            )  # fmt: skip
        raw: Any = await read_json(request, self._max_body_bytes)
        return parse(kind, raw)


def checked_folder(given: str, roots: Sequence[Path]) -> Path:
    """The adapter's folder that `given` names, absolute or below a root, with every link followed.

    Raises:
        ApiError: it is not below a root, or its files are not. Nothing is told of what lies elsewhere.
    """
    allowed = [root.resolve() for root in roots]
    # An absolute path stays as it is.
    candidates = [] if "\0" in given else [root / given for root in allowed]
    for candidate in candidates:
        with suppress(OSError, RuntimeError):  # a name that is too long, links in a circle
            folder = candidate.resolve()
            files = [folder, *((folder / name).resolve() for name in (CONFIG_NAME, WEIGHTS_NAME))]
            if all(any(root in file.parents for root in allowed) for file in files) and folder.is_dir():
                return folder
    raise ApiError(
        f"{given!r} is no folder of an adapter that this server may read", value=given,
        limit=[str(root) for root in roots], param="lora_path",
        remedy="Put it below a folder of QUIRE_LORA_ROOTS, and name it from there.",
    )  # fmt: skip


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ApiError(
            f"{name!r} cannot be an adapter's name", value=name, limit=_NAME.pattern, param="lora_name",
            remedy="Use letters, digits, dots, dashes and underscores.",
        )  # fmt: skip
    return name
