"""`quire doctor`: what this machine has, and for each thing that is missing, what to do.

Boundary: looks and reports; it changes nothing and loads no model. torch is imported (a build without it cannot serve).
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from workbench import settings as settings_module
from workbench.errors import HomeDirError, PortInUseError, SettingsError
from workbench.ports import check_free
from workbench.run_state import RunState
from workbench.settings import Settings

Level = Literal["ok", "warning", "error"]
_MIN_PYTHON = (3, 11)
_MIN_FREE_BYTES = 2 * 2**30
_CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "bf16")
_PACKAGE = re.compile(r"^([A-Za-z0-9_.-]+)")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at; `remedy` is set unless it is ok."""

    name: str
    level: Level
    message: str
    remedy: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine(*, home_dir: Path | None = None, model: str | None = None) -> list[Finding]:
    """Look at everything; never raises for what it finds."""
    findings = [_python(), *_packages(), *_torch(), _cpu(), _compiler()]
    try:
        settings = settings_module.load(home_dir=home_dir, model=model)
    except SettingsError as error:
        findings.append(Finding("settings", "error", error.message, error.remedy))
        return findings
    findings += [
        _home(settings),
        _disk(settings),
        *_ports(settings),
        _model(settings),
        *_draft_model(settings),
    ]
    return findings


def render(findings: list[Finding]) -> str:
    """The findings as a table for people."""
    marks = {"ok": "ok  ", "warning": "note", "error": "FAIL"}
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{marks[finding.level]}  {finding.name:<{width}}  {finding.message}")
        if finding.remedy and finding.level != "ok":
            lines.append(f"{'':6}{'':<{width}}  → {finding.remedy}")
    return "\n".join(lines)


def _python() -> Finding:
    version = platform.python_version()
    if sys.version_info < _MIN_PYTHON:
        return Finding("python", "error", f"Python {version}", "Install Python 3.11 or newer.")
    return Finding("python", "ok", f"Python {version} at {sys.executable}")


def _packages() -> Iterator[Finding]:
    """Whether what the distribution asks for is installed; versions of the parts that matter most."""
    missing = []
    for name in _required():
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        yield Finding(
            "packages", "error", f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}"
        )
        return
    told = ("torch", "transformers", "streamlit", "mlflow")
    yield Finding("packages", "ok", ", ".join(f"{name} {importlib.metadata.version(name)}" for name in told))


def _required() -> list[str]:
    try:
        lines = importlib.metadata.requires("quire") or []
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        lines = ["torch", "transformers", "tokenizers", "safetensors", "streamlit", "uvicorn", "starlette", "pydantic",
                 "pydantic-settings", "prometheus-client", "httpx", "numpy", "pandas", "plotly", "mlflow"]  # fmt: skip
    names = (
        _PACKAGE.match(line) for line in lines if "extra ==" not in line and "platform_system" not in line
    )
    return [match[1] for match in names if match]


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except Exception as error:  # noqa: BLE001 - a broken build raises whatever its libraries raise
        yield Finding(
            "torch", "error", f"cannot be imported: {error}", "Reinstall torch for this Python and machine."
        )
        return
    yield Finding("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        size = f"{properties.total_memory / 2**30:.0f} GiB"
        yield Finding(
            "gpu", "ok", f"{properties.name}, {size}, compute {properties.major}.{properties.minor}"
        )
    elif Path("/proc/driver/nvidia/version").exists():
        yield Finding(
            "gpu", "warning", "a GPU driver, but this torch cannot use it", "Install a CUDA build of torch."
        )
    else:
        yield Finding("gpu", "ok", "none: the CPU is used")


def _cpu() -> Finding:
    flags: set[str] = set()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                flags.update(line.partition(":")[2].split())
                break
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    has = [flag for flag in _CPU_FLAGS if flag in flags]
    text = f"{cores} cores, {platform.machine()}, {' '.join(has) or 'no vector flags known here'}"
    if platform.machine() == "x86_64" and "avx2" not in flags:
        return Finding("cpu", "warning", text, "Without AVX2 the forward pass is slow; use another machine.")
    return Finding("cpu", "ok", text)


def _compiler() -> Finding:
    compiler = next((path for name in ("g++", "clang++", "c++") if (path := shutil.which(name))), None)
    if compiler is None:
        return Finding(
            "compiler", "warning", "no C++ compiler: attention runs in torch, slower",
            "Install one, for example: apt-get install g++.",
        )  # fmt: skip
    return Finding("compiler", "ok", compiler)


def _home(settings: Settings) -> Finding:
    try:
        settings_module.prepare_home(settings)
    except HomeDirError as error:
        return Finding("home", "error", error.message, error.remedy)
    return Finding("home", "ok", f"{settings.home_dir} can be written")


def _disk(settings: Settings) -> Finding:
    folder = settings.home_dir
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    text = f"{free / 2**30:.1f} GiB free at {folder}"
    if free < _MIN_FREE_BYTES:
        return Finding("disk", "warning", text, "Free some space, or set HOME_DIR to a larger disk.")
    return Finding("disk", "ok", text)


def _ports(settings: Settings) -> Iterator[Finding]:
    app = RunState(settings.run_dir).read()
    if app is not None:
        yield Finding("ports", "ok", f"Quire runs at {app.url} (process {app.pid})")
        return
    wanted = [("PORT", settings.port)]
    if not settings.mlflow_tracking_uri:
        wanted.append(("MLFLOW_PORT", settings.mlflow_port))
    for variable, port in wanted:
        yield _port(settings.host, variable, port)


def _port(host: str, variable: str, port: int) -> Finding:
    try:
        check_free(host, port, variable=variable)
    except PortInUseError as error:
        return Finding(variable, "error", error.message, error.remedy)
    return Finding(variable, "ok", f"port {port} is free")


def _model(settings: Settings) -> Finding:
    from engine.errors import EngineError
    from workbench.model_card import check_model, read_model_card

    try:
        check_model(settings.model_path)
    except EngineError as error:
        return Finding("model", "error", error.message, error.remedy)
    card = read_model_card(settings.model_path)
    digest = f", digest {card.digest[:8]}" if card.digest else ", not downloaded yet"
    return Finding("model", "ok", f"{card.title}{digest}")


def _draft_model(settings: Settings) -> Iterator[Finding]:
    """Whether the draft model goes with the model, and what it takes beside it."""
    if (settings.speculative_config or {}).get("method") != "draft_model":
        return
    import torch

    from engine.build import resolve_config
    from engine.errors import EngineError
    from engine.memory import held_weight_bytes, kv_specs, torch_dtype
    from engine.model_folder import find_model
    from engine.models.draft import check_tokenizers, find_draft
    from engine.models.transformers_config import read_model_config
    from workbench.memory_budget import in_units

    try:
        folder = find_model(settings.model_path)
        model = read_model_config(folder)
        config = resolve_config(settings.engine_config(), model)
        device = torch.device(config.device)
        draft = find_draft(config, model, device)
        assert draft is not None, "the settings name a draft model"
        check_tokenizers(draft, folder)
    except EngineError as error:
        yield Finding("draft model", "error", error.message, error.remedy)
        return
    weights = held_weight_bytes(draft.model, torch_dtype(config), device)
    own, drafts = (spec.bytes_per_token for spec in kv_specs(config, model, draft))
    yield Finding(
        "draft model", "ok",
        f"{draft.folder.name}: weights {in_units(weights)}, KV {in_units(drafts)} a token beside the model's {in_units(own)}",
    )  # fmt: skip
