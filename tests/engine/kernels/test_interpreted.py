"""Runs the kernels in Triton's interpreter, on any machine, against their references.

Triton decides between interpreter and compiler when a kernel is decorated, so the cases run in a process of their own
whose environment says so from the start, and this process keeps the compiler for `test_compiled.py`. All cases were seen to
pass under Triton 3.7.1 with NumPy 2.4 and under 3.6.0 with NumPy 2.3.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import triton

HERE = Path(__file__).parent
VERSIONS = [tuple(map(int, package.__version__.split(".")[:2])) for package in (triton, numpy)]
CASES = sorted(path.name for path in (HERE / "interpreted").glob("cases_*.py"))
LONG = {
    "cases_attention_bits.py",
    "cases_attention_captured.py",
    "cases_attention_scores.py",
    "cases_attention_values.py",
    "cases_engine_quantized_kv.py",
    "cases_families.py",
    "cases_invariant_linear.py",
    "cases_lora.py",
    "cases_quantized_kv.py",
    "cases_sampling.py",
    "cases_weight_only.py",
}


@pytest.mark.skipif(
    VERSIONS[0] < (3, 7) and VERSIONS[1] >= (2, 4),
    reason="the interpreter of Triton before 3.7 does not run with NumPy 2.4 or later",
)
@pytest.mark.timeout(900)  # the interpreter is slow, and slower on a machine that is busy
@pytest.mark.parametrize(
    "cases", [pytest.param(name, marks=pytest.mark.full) if name in LONG else name for name in CASES]
)
def test_kernels_agree_with_their_references_in_the_interpreter(
    cases: str, pytestconfig: pytest.Config
) -> None:
    # Without this project's pytest settings, which ask for plugins that the cases do not need.
    command = [
        sys.executable, "-m", "pytest", "-q", "-x", "-rs", "-W", "error",
        "-W", "ignore::DeprecationWarning:triton.runtime.interpreter", "-p", "no:cacheprovider", "-c", os.devnull,
        "--rootdir", str(HERE), "--import-mode=importlib", "-o", "python_files=cases_*.py",
        str(HERE / "interpreted" / cases),
    ]  # fmt: skip
    child = subprocess.run(
        command,
        cwd=pytestconfig.rootpath,
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",  # the products are small, and threads that wait for each other are slow
            "OPENBLAS_NUM_THREADS": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        },
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
    assert " passed" in child.stdout, child.stdout[-2000:]
    assert "skipped" not in child.stdout, child.stdout[-2000:]


def test_there_are_cases() -> None:
    assert {"cases_attention_bits.py", "cases_engine.py"} <= set(CASES)
