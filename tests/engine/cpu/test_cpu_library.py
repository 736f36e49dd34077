"""Building the kernels: cached, safe when several processes build at once, and absent where there is no compiler."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.attention.cpu import make_cpu_attention
from engine.kernels import cpu_library

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
from engine.kernels import cpu_library
cpu_library.FLAGS = tuple(flag for flag in cpu_library.FLAGS if not flag.startswith("-O"))  # half the time
print(cpu_library.build_and_load(Path(sys.argv[1])).panel_width)
"""
FALLBACK = """
import logging, torch
logging.basicConfig(format="%(message)s")
from engine.attention.cpu import make_cpu_attention
from engine.kernels import cpu_library
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
