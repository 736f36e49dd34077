"""The job kind "probe": counts, and does nothing else: shows that jobs run, keep what they store, and end as they should.

Spec: ``steps`` (default 5), ``step_s`` (seconds a step, default 0.1), ``fail_at`` (the step that raises), ``deaf`` (does not
heed a cancel).
"""

from __future__ import annotations

import time
from typing import Any

from workbench.jobs.context import JobContext
from workbench.jobs.model import JobSpecError

_LIMITS: dict[str, tuple[Any, int]] = {
    "steps": (int, 1),
    "step_s": ((int, float), 0),
    "fail_at": (int, 0),
    "deaf": (bool, 0),
}


class ProbeFailedError(JobSpecError):
    """The probe was asked to fail at this step."""

    code = "probe_failed"


def check(spec: dict[str, Any]) -> None:
    """Raises JobSpecError."""
    for name, value in spec.items():
        kind, low = _LIMITS.get(name, (type(None), 0))
        wrong_bool = isinstance(value, bool) and kind is not bool
        if name not in _LIMITS or not isinstance(value, kind) or wrong_bool or value < low:
            raise JobSpecError(
                f"{name}={value!r} is not accepted by a probe", value=value, limit=sorted(_LIMITS), param=name
            )


def run(spec: dict[str, Any], context: JobContext) -> dict[str, Any]:
    """Count; the result is the count and from where it went on."""
    steps = spec.get("steps", 5)
    first = (context.resumed or {}).get("counted", 0)
    for step in range(first, steps):
        if not spec.get("deaf"):
            context.check_cancelled()
        if step == spec.get("fail_at"):
            raise ProbeFailedError(
                f"step {step} failed, as asked", value=step, param="fail_at", remedy="Leave fail_at out."
            )
        time.sleep(spec.get("step_s", 0.1))
        context.partial({"counted": step + 1})
        context.report((step + 1) / steps, f"Step {step + 1} of {steps}")
    return {"counted": steps, "resumed_at": first}
