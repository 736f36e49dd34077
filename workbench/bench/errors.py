"""Errors of the bench room.

WorkbenchError
├── BenchmarkError          a benchmark that cannot be run as it is described
│   └── TraceError          a recorded trace that cannot be read
└── BenchmarkNotFoundError  no saved benchmark of that id
"""

from __future__ import annotations

from workbench.errors import WorkbenchError


class BenchmarkError(WorkbenchError, ValueError):
    """The benchmark cannot run as it is described."""

    code = "invalid_benchmark"


class TraceError(BenchmarkError):
    """The trace's file is not one."""

    code = "invalid_trace"


class BenchmarkNotSavedError(WorkbenchError):
    """The record could not be written."""

    code = "benchmark_not_saved"


class BenchmarkNotFoundError(WorkbenchError, LookupError):
    """No benchmark of that id is saved in this HOME_DIR."""

    code = "benchmark_not_found"
