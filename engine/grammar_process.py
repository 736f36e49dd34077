"""A process of its own for grammars whose compilation may have no end: ``python -P grammar_process.py``.

How long xgrammar compiles an expression or a grammar cannot be told from its text, and a thread that compiles cannot be stopped:
``[a-z]?`` 1500 times takes minutes. Here the system ends the process, when a grammar takes more than its time or memory. It also ends by
itself when nobody has asked for IDLE_S.

In: a line of JSON with the vocabulary, then one for each job. Out: a line when it is ready, then one for each answer. This file
is run by its path, and so imports nothing of the engine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import types
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MAX_SECONDS = 20.0
MAX_GROWTH_BYTES = 2 << 30
IDLE_S = 300
MAX_BLANKS = 20  # between two parts of a JSON text: a sampled one would be nothing but blanks once in a while


@dataclass(frozen=True, slots=True)
class Job:
    """What to compile: a JSON schema, a regular expression, EBNF or a structural tag."""

    language: str  # "json", "regex", "ebnf" or "tag"
    text: str
    any_whitespace: bool = True


class TooCostly(Exception):
    """A grammar took more time or memory than it may."""


def compile_job(compiler: Any, job: Job) -> Any:
    """A job's ``xgrammar.CompiledGrammar``.

    Raises:
        RuntimeError: xgrammar's, for all that it does not take.
    """
    if job.language == "regex":
        return compiler.compile_regex(job.text)
    if job.language == "ebnf":
        return compiler.compile_grammar(job.text)
    if job.language == "tag":
        return compiler.compile_structural_tag(job.text)
    if job.any_whitespace:
        return compiler.compile_json_schema(job.text, max_whitespace_cnt=MAX_BLANKS)
    return compiler.compile_json_schema(job.text, any_whitespace=False, separators=(",", ":"))


class GrammarProcess:
    """The process, started with its first job. Safe to call from any thread; jobs are done one after another.

    `vocabulary`: an ``xgrammar.TokenizerInfo`` as JSON.
    """

    def __init__(self, vocabulary: str, max_seconds: float = MAX_SECONDS) -> None:
        self._vocabulary = vocabulary
        self._max_seconds = max_seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._end: weakref.finalize[..., Any] | None = None

    def compile(self, job: Job) -> str:
        """The compiled grammar as JSON.

        Raises:
            RuntimeError: as `compile_job`.
            TooCostly: the process was ended over it.
        """
        with self._lock:
            answer = self._ask(job)
        if answer is None:
            raise TooCostly
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return str(answer["compiled"])

    def _ask(self, job: Job) -> dict[str, Any] | None:
        """The answer to one job; None if it took too much."""
        began = time.monotonic()
        answer = _ask(self._running(), asdict(job))
        if answer is None:
            self._stop()  # it may take a while to end, and must not be asked again meanwhile
            # Ended so early, it did so by itself, for want of jobs.
            if time.monotonic() - began < self._max_seconds / 2:
                answer = _ask(self._running(), asdict(job))
        return answer

    def close(self) -> None:
        """End the process. The next job starts another one."""
        with self._lock:
            self._stop()

    def _running(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._stop()
        process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).resolve())], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
        )  # fmt: skip
        self._process, self._end = process, weakref.finalize(self, _end, process)
        ready = _ask(process, {"vocabulary": self._vocabulary, "max_seconds": self._max_seconds})
        assert ready is not None, "the process that compiles grammars does not start"
        return process

    def _stop(self) -> None:
        if self._end is not None:
            self._end()
        self._process = self._end = None


def _ask(process: subprocess.Popen[str], what: dict[str, Any]) -> dict[str, Any] | None:
    """The answer to one line; None if the process ended over it."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(what) + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        return None
    line = process.stdout.readline()
    answer: dict[str, Any] | None = json.loads(line) if line.endswith("\n") else None
    return answer


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()  # closes its pipes


class _Absent(types.ModuleType):
    """A module of which only names are asked."""

    __path__: list[str] = []  # noqa: RUF012 - a module's

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": lambda *args, **kwargs: None})


def _import_xgrammar() -> Any:
    """Without torch and transformers, which it imports and compiling does not use: they take 3 s of CPU time."""
    sys.modules["torch"] = None  # type: ignore[assignment] # tvm_ffi goes without
    import tvm_ffi  # noqa: F401

    sys.modules.update({name: _Absent(name) for name in ("torch", "transformers")})
    import xgrammar

    return xgrammar


def _serve() -> None:
    """What the process does."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else would write there
    import resource
    import signal

    xgrammar = _import_xgrammar()
    start = json.loads(sys.stdin.readline())
    info = xgrammar.TokenizerInfo.deserialize_json(start["vocabulary"])
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").is_file() else 0
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MAX_GROWTH_BYTES,) * 2)
    answer: dict[str, Any] = {"ready": True}
    while True:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        signal.setitimer(signal.ITIMER_REAL, IDLE_S)  # nobody handles the signal: it ends the process
        line = sys.stdin.readline()
        if not line:
            return
        signal.setitimer(signal.ITIMER_REAL, start["max_seconds"])
        try:
            answer = {"compiled": compile_job(compiler, Job(**json.loads(line))).serialize_json()}
        except RuntimeError as error:
            answer = {"error": str(error)}


if __name__ == "__main__":
    _serve()
