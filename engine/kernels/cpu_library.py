"""The compiled CPU kernels: built once per machine with its own compiler, loaded through a plain C interface.

The library is one shared object from a few C++ files (paged attention, packed products, the fused decoder, the sampler).
It needs no torch headers: tensors cross as raw pointers, which makes the build seconds and independent of torch's version.
Its threads are its own (``cpu_team.h``): it brings no OpenMP runtime beside torch's.

Cache: ``engine.kernels.cache_folder``, keyed by sources, compiler, flags and CPU.
Boundary: build and load only. Where there is no compiler `load` says why; the callers then use torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from engine.kernels.cache_folder import kernel_cache, writable_folder

logger = logging.getLogger(__name__)

ENGINE = Path(__file__).resolve().parents[1]
MAIN_SOURCE = ENGINE / "kernels" / "cpu_decoder.cpp"
SOURCES = (
    ENGINE / "kernels" / "cpu_vector.h",
    ENGINE / "kernels" / "cpu_phase.h",
    ENGINE / "kernels" / "cpu_team.h",
    ENGINE / "kernels" / "cpu_lora.h",
    ENGINE / "kernels" / "cpu_sampler.cpp",
    ENGINE / "kernels" / "packed_linear.cpp",
    ENGINE / "attention" / "cpu_cache.h",
    ENGINE / "attention" / "cpu_paged.cpp",
    MAIN_SOURCE,
)
FLAGS = ("-std=gnu++17", "-O2", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-pthread", "-fPIC")
BUILD_TIMEOUT_S = 180.0


class BuildError(RuntimeError):
    """The kernels cannot be compiled or loaded here; the text is the one reason, for people."""


@dataclass(frozen=True, slots=True)
class CpuLibrary:
    """The loaded kernels and what they were built for."""

    path: Path
    functions: ctypes.CDLL
    panel_width: int
    multiplies_bf16: bool


def load() -> CpuLibrary | None:
    """The kernels, built if need be; None where that is impossible: `unavailable_reason` says why, the log once."""
    found = _load_once()
    return found if isinstance(found, CpuLibrary) else None


def unavailable_reason() -> str | None:
    """Why `load` returns None; None where the kernels work."""
    found = _load_once()
    return None if isinstance(found, CpuLibrary) else str(found)


@lru_cache(maxsize=1)
def _load_once() -> CpuLibrary | BuildError:
    try:
        return build_and_load(kernel_cache("kernels"))
    except BuildError as error:
        logger.warning("compiled CPU kernels are off, torch is used instead: %s", error)
        return error


def cpu_flags() -> frozenset[str]:
    """Instruction set extensions of this CPU by the kernel's names; empty where the system does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    return frozenset(found.group(1).split()) if found else frozenset()


def multiplies_bf16() -> bool:
    """Whether this CPU has bfloat16 dot products; without them bfloat16 is slower than float32."""
    return "avx512_bf16" in cpu_flags()


def find_compiler() -> str:
    """Path of the C++ compiler: ``$CXX``, else g++ or c++ on the path."""
    for name in filter(None, (os.environ.get("CXX"), "g++", "c++")):
        path = shutil.which(name)
        if path:
            return path
    raise BuildError("no C++ compiler (g++) on the path")


def build_and_load(cache_folder: Path) -> CpuLibrary:
    """Load the library from `cache_folder`, compiling it there first if it is not yet there.

    Where the folder cannot be written, builds are kept with this user's temporary files.

    Raises:
        BuildError: no compiler, it failed, or the result does not load.
    """
    compiler = find_compiler()
    key = _key(compiler)
    path = cache_folder / f"quire_cpu_{key}.so"
    if not path.is_file():
        path = writable_folder(cache_folder) / path.name
    if not path.is_file():
        _build(compiler, path)
    try:
        functions = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} does not load: {error}") from error
    _declare(functions)
    return CpuLibrary(path, functions, int(functions.quire_panel_width()), multiplies_bf16())


def _key(compiler: str) -> str:
    digest = hashlib.sha256()
    version = _run([compiler, "--version"])
    for part in (version, " ".join(FLAGS), platform.machine(), " ".join(sorted(cpu_flags()))):
        digest.update(part.encode() + b"\0")
    for source in SOURCES:
        digest.update(source.read_bytes() + b"\0")
    return digest.hexdigest()[:20]


def _build(compiler: str, target: Path) -> None:
    """Compile to a private name beside the target, then rename: builders at the same time end with one whole file."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as work:
        library = Path(work) / target.name
        _run([compiler, *FLAGS, "-shared", str(MAIN_SOURCE), "-o", str(library)])
        os.replace(library, target)


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} did not run: {error}") from error
    if done.returncode:
        raise BuildError(f"{command[0]} failed: {done.stderr.strip()[-2000:]}")
    return done.stdout


def _declare(functions: ctypes.CDLL) -> None:
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    signatures = {
        "quire_pack": [pointer, pointer, integer, integer, integer, integer, integer, integer],
        "quire_linear": [pointer, pointer, pointer, integer, integer, integer, integer],
        "quire_store_kv": [
            pointer, pointer, integer, pointer, pointer, integer, pointer, integer, integer,
        ],
        "quire_attention": [pointer, pointer, pointer, integer, pointer, pointer, integer, integer],
        "quire_forward": [pointer, pointer],
        "quire_logits": [pointer, pointer, pointer, pointer, integer, integer],
        "quire_sample": [pointer],
        "quire_logprobs": [pointer],
    }  # fmt: skip
    functions.quire_panel_width.restype = integer
    functions.quire_panel_width.argtypes = []
    for name, arguments in signatures.items():
        function = getattr(functions, name)
        function.restype, function.argtypes = None, arguments
