"""Which queued jobs may start: exclusive alone, nothing overtakes it, children and device-less ones never wait."""

from __future__ import annotations

import pytest

from workbench.jobs.model import Device, Job, JobState
from workbench.jobs.runner import startable

Q, R = JobState.QUEUED, JobState.RUNNING


def job(name: str, state: JobState, device: Device = "shared", parent: str | None = None) -> Job:
    return Job(
        name, "probe", "", {}, state, 0.0, "", None, None, None, device, parent, "", None, None, None, None, 0, False, ""
    )  # fmt: skip


@pytest.mark.parametrize(
    ("jobs", "starts"),
    [
        ([], []),
        ([job("a", Q), job("b", Q)], ["a", "b"]),
        ([job("a", Q), job("b", Q), job("c", Q)], ["a", "b"]),  # two at once
        ([job("a", R), job("b", Q), job("c", Q)], ["b"]),
        ([job("a", R), job("b", Q, "exclusive"), job("c", Q)], []),  # c does not overtake b
        ([job("b", Q, "exclusive"), job("c", Q)], ["b"]),
        ([job("b", R, "exclusive"), job("c", Q), job("d", Q, "none")], ["d"]),
        ([job("a", R), job("b", Q, "exclusive", parent="a")], ["b"]),  # a waits for b
        ([job("a", R), job("x", R), job("b", Q, parent="a")], ["b"]),  # beyond the limit
        ([job("a", Q), job("b", Q, "exclusive")], ["a"]),
        ([job("b", Q, "exclusive", parent="gone")], ["b"]),
        ([job("a", R, "none"), job("b", Q, "exclusive")], ["b"]),
    ],
)
def test_startable(jobs: list[Job], starts: list[str]) -> None:
    assert [each.id for each in startable(jobs, 2)] == starts
