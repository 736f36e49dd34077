"""The table of docs/faults.md, a row a fault, made of what the tests that inject the fault observed.

A test takes the fixture `fault` and tells it, in words that hold what it saw, which requests failed and how, what goes on, and what is
there afterwards. Told in a run of the tests, a row is compared with the page's; ``python -m tests.faults_table [PATTERN]`` runs
these tests (those whose file or name holds PATTERN) and rewrites their rows.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import astuple, dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PAGE = TESTS.parent / "docs" / "faults.md"
BEGIN = "<!-- table: begin (python -m tests.faults_table) -->\n"
END = "<!-- table: end -->"
HEADINGS = ("fault", "what fails, and how", "what goes on", "what is there afterwards", "injected by")
TOLD_TO = "FAULTS_TOLD_TO"  # a file that rows are written to instead of being compared


@dataclass(frozen=True, slots=True)
class Row:
    """What became of one fault."""

    fault: str
    fails: str
    goes_on: str
    afterwards: str
    test: str  # file and name, below tests/


@dataclass(frozen=True, slots=True)
class Teller:
    """What the fixture `fault` is: tells a row of the test that has it."""

    test: str

    def __call__(self, fault: str, *, fails: str, goes_on: str, afterwards: str) -> None:
        row = Row(fault, fails, goes_on, afterwards, self.test)
        if told_to := os.environ.get(TOLD_TO):
            with Path(told_to).open("a", encoding="utf-8") as file:
                file.write(json.dumps(astuple(row)) + "\n")
            return
        known = read_table().get(fault)
        assert row == known, f"docs/faults.md says {known}: `python -m tests.faults_table` rewrites it"


def test_of(path: Path, name: str) -> str:
    """A test as the table names it."""
    return f"{path.relative_to(TESTS).as_posix()}::{name}"


def told_by_tests() -> dict[str, str]:
    """Every fault that a test tells, and the test, in the order of files and lines."""
    found: dict[str, str] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        source = path.read_text(encoding="utf-8")
        if "fault(" not in source:
            continue
        for test in ast.parse(source).body:
            for node in ast.walk(test) if isinstance(test, ast.FunctionDef) else ():
                is_told = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
                if is_told and node.func.id == "fault":
                    (name,) = node.args
                    assert isinstance(name, ast.Constant), f"{path}: a fault's name is written out"
                    assert name.value not in found, f"{name.value!r} is told by two tests"
                    found[name.value] = test_of(path, test.name)
    return found


def read_table() -> dict[str, Row]:
    """The rows of the page, by fault."""
    lines = PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip().splitlines()[2:]
    rows = [Row(*(cell.strip() for cell in line.strip().strip("|").split("|"))) for line in lines]
    return {row.fault: Row(*astuple(row)[:4], row.test.strip("`")) for row in rows}


def write_table(rows: dict[str, Row]) -> None:
    """Replace the rows of the page, in the order of the tests."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    for fault in told_by_tests():
        if row := rows.get(fault):
            assert not any("|" in cell or "\n" in cell for cell in astuple(row)), row
            lines.append("| " + " | ".join(astuple(row)[:4]) + f" | `{row.test}` |")
    head, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(head + BEGIN + "\n".join(lines) + "\n" + END + rest.split(END)[1], encoding="utf-8")


def main(pattern: str = "") -> int:
    tests = [test for test in dict.fromkeys(told_by_tests().values()) if pattern in test]
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "rows"
        told.touch()
        command = [sys.executable, "-m", "pytest", "-q", "-m", "full or not full"]
        command += [str(TESTS / test) for test in tests]
        done = subprocess.run(command, env={**os.environ, TOLD_TO: str(told)}, cwd=TESTS.parent, check=False)
        rows = [Row(*json.loads(line)) for line in told.read_text(encoding="utf-8").splitlines()]
    if done.returncode == 0:
        write_table({**read_table(), **{row.fault: row for row in rows}})
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
