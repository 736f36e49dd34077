"""Where compiled kernels are kept between starts: under HOME_DIR where it is set, else in the user's cache.

Boundary: folders. What is built and how it is keyed is ``engine.kernels.cpu_library``'s, and Triton's own.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path


def kernel_cache(kind: str) -> Path:
    """The folder of one kind of kernels. It may not exist, and need not be writable."""
    home = os.environ.get("HOME_DIR")
    if home:
        return Path(home) / "cache" / kind
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "quire" / kind
    except RuntimeError:  # a user without a home
        return private_temporary_folder()


def keep_triton_kernels() -> None:
    """Let Triton keep what it compiles under HOME_DIR, where that is set and nobody named another folder (its own default
    is ``~/.triton/cache``): the home may be a container's, which a restart empties."""
    if os.environ.get("HOME_DIR"):
        os.environ.setdefault("TRITON_CACHE_DIR", str(kernel_cache("triton").absolute()))


def writable_folder(folder: Path) -> Path:
    """`folder`, made if need be; where it cannot be written, this user's folder for temporary files."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            return folder
    except OSError:
        return private_temporary_folder()


def private_temporary_folder() -> Path:
    """A folder for temporary files that outlives the process and nobody else can write: code is loaded from it."""
    folder = Path(tempfile.gettempdir()) / f"quire-kernels-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    return folder if is_ours else Path(tempfile.mkdtemp(prefix="quire-kernels-"))
