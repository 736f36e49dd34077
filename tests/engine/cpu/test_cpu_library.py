"""Building the kernels: cached, safe when several processes build at once, and absent where there is no compiler."""

from __future__ import annotations

import logging
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from engine.attention.cpu import make_cpu_attention
from engine.kernels import cache_folder, cpu_library

# A compiler that takes its time and counts its calls: builders overlap for certain.
SLOW_COMPILER = """#!/bin/sh
case "$*" in *--version*) exec {real} "$@";; esac
echo call >> {calls}
sleep 1
exec {real} "$@"
"""
BUILD = """
import sys, torch
from pathlib import Path
from engine.kernels import cache_folder, cpu_library
cpu_library.FLAGS = tuple(flag for flag in cpu_library.FLAGS if not flag.startswith("-O"))  # half the time
print(cpu_library.build_and_load(Path(sys.argv[1])).panel_width)
"""
FALLBACK = """
import logging, torch
logging.basicConfig(format="%(message)s")
from engine.attention.cpu import make_cpu_attention
from engine.kernels import cache_folder, cpu_library
print(make_cpu_attention().name, make_cpu_attention().name)
print(cpu_library.unavailable_reason())
"""


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": str(cpu_library.ENGINE.parent)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def slow_compiler(library, tmp_path) -> tuple[Path, Path]:
    calls, script = tmp_path / "calls", tmp_path / "slow-g++"
    script.write_text(SLOW_COMPILER.format(real=cpu_library.find_compiler(), calls=calls))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script, calls


@pytest.mark.full
def test_builders_at_the_same_time_all_get_a_whole_library(slow_compiler, library, tmp_path):
    script, calls = slow_compiler
    cache = tmp_path / "cache"
    builders = [run_python(BUILD, str(cache), CXX=str(script)) for _ in range(2)]
    for builder in builders:
        out, errors = builder.communicate(timeout=170)
        assert (builder.returncode, out.strip()) == (0, str(library.panel_width)), errors
    assert len(list(cache.iterdir())) == 1, "one library, no leftovers"
    assert len(calls.read_text().split()) == 2, "both compiled: they did overlap"

    later = run_python(BUILD, str(cache), CXX=str(script))
    out, errors = later.communicate(timeout=170)
    assert (later.returncode, out.strip()) == (0, str(library.panel_width)), errors
    assert len(calls.read_text().split()) == 2, "the third process built again instead of using the cache"


def test_without_a_compiler_the_reference_runs_and_one_line_says_why(tmp_path):
    process = run_python(FALLBACK, PATH=str(tmp_path), HOME_DIR=str(tmp_path), CXX="")
    out, errors = process.communicate(timeout=170)
    assert process.returncode == 0, errors
    assert out.splitlines() == ["reference reference", "no C++ compiler (g++) on the path"]
    assert errors.strip().splitlines() == [
        "compiled CPU kernels are off, torch is used instead: no C++ compiler (g++) on the path"
    ]


def test_a_failing_compiler_is_quoted(library, tmp_path, monkeypatch):
    script = tmp_path / "broken-g++"
    script.write_text(
        "#!/bin/sh\ncase \"$*\" in *--version*) exit 0;; esac\necho 'no such flag' >&2\nexit 1\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(cpu_library.BuildError, match="no such flag"):
        cpu_library.build_and_load(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_home_that_cannot_be_written_gets_a_private_folder_that_the_next_process_finds(
    library, tmp_path, monkeypatch
):
    """The home lies below a file: not even root can make it."""
    (tmp_path / "file").touch()
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("HOME_DIR", str(tmp_path / "file" / "home"))
    home, name = cache_folder.kernel_cache("kernels"), library.path.name
    private = cache_folder.writable_folder(home)
    assert private.parent == temporary
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    shutil.copy(library.path, private / name)
    monkeypatch.setattr(cpu_library, "_build", lambda *_: pytest.fail("it is built already"))
    assert cpu_library.build_and_load(home).path == private / name

    private.chmod(0o777)  # anybody could have put something there
    other = cache_folder.writable_folder(home)
    assert other not in (private, home)
    assert stat.S_IMODE(other.stat().st_mode) == 0o700


def test_a_user_without_a_home_keeps_kernels_with_temporary_files(tmp_path, monkeypatch):
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("HOME_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(Path, "home", no_home)
    assert cache_folder.kernel_cache("kernels").parent == tmp_path


def test_triton_keeps_its_kernels_under_home_dir_unless_it_was_told_where(tmp_path, monkeypatch):
    for name in ("HOME_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    cache_folder.keep_triton_kernels()
    assert "TRITON_CACHE_DIR" not in os.environ
    monkeypatch.setenv("HOME_DIR", str(tmp_path))
    cache_folder.keep_triton_kernels()
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "cache" / "triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    cache_folder.keep_triton_kernels()
    assert os.environ["TRITON_CACHE_DIR"] == "/mine"


def test_the_key_follows_sources_and_flags(library, monkeypatch):
    compiler = cpu_library.find_compiler()
    key = cpu_library._key(compiler)
    assert key == cpu_library._key(compiler)
    assert key in library.path.name
    monkeypatch.setattr(cpu_library, "FLAGS", (*cpu_library.FLAGS, "-g"))
    assert cpu_library._key(compiler) != key


def test_brings_no_openmp_runtime_beside_torchs(library):
    torch.randn(64, 64) @ torch.randn(64, 64)
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "gomp" in line}
    assert len(mapped) == 1, mapped
    assert b"GOMP" not in library.path.read_bytes()


def test_the_compiled_backend_is_chosen_where_it_builds(library, caplog):
    with caplog.at_level(logging.WARNING):
        assert make_cpu_attention().name == "cpu"
    assert not caplog.records
