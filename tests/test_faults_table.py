"""docs/faults.md names the faults that tests inject, each by its test, and no others."""

from __future__ import annotations

from tests.faults_table import read_table, told_by_tests


def test_the_table_names_the_faults_that_tests_prove() -> None:
    assert {row.fault: row.test for row in read_table().values()} == told_by_tests()
