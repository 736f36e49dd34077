"""Tables of benchmarks, and the bars that their figures are held against.

Bars are the project's own: *pass* is what the work must reach to be called done, *target* is where it is going.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Bar:
    """One figure that is judged. `percent`: shown as a percentage."""

    what: str
    passing: float
    target: float
    is_lower_better: bool = False
    percent: bool = True

    def verdict(self, value: float) -> str:
        """ "target", "pass" or "below the bar"."""
        reaches = operator.le if self.is_lower_better else operator.ge
        if reaches(value, self.target):
            return "target"
        return "pass" if reaches(value, self.passing) else "below the bar"

    def judge(self, value: float, *, is_tiny: bool) -> dict[str, Any]:
        """Print the figure beside its bars; returns both. At reduced size nothing is judged."""
        verdict = "not judged" if is_tiny else self.verdict(value)
        shown = [f"{v:.1%}" if self.percent else f"{v:.3g}" for v in (value, self.passing, self.target)]
        print(f"{self.what}: {shown[0]} (pass {shown[1]}, target {shown[2]}): {verdict}")
        return {
            "what": self.what, "value": value, "pass": self.passing, "target": self.target, "verdict": verdict,
        }  # fmt: skip


def print_table(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Rows with the same keys, which are the heads; numbers to the right, None as –."""
    if not rows:
        return
    cells = [[_shown(value) for value in row.values()] for row in rows]
    heads = [head.replace("_", " ") for head in rows[0]]
    widths = [max(len(head), *(len(line[i]) for line in cells)) for i, head in enumerate(heads)]
    numeric = [any(isinstance(row[head], int | float) for row in rows) for head in rows[0]]
    print(f"\n{title}")
    for line in [heads, *cells]:
        print(
            "  "
            + "  ".join(
                c.rjust(w) if n else c.ljust(w) for c, w, n in zip(line, widths, numeric, strict=True)
            ).rstrip()
        )


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)
