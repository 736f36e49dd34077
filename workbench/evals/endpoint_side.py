"""An endpoint as a side of a comparison: what of it can be compared, said before anything is asked.

Its outputs are scored as a version's are. What needs log-probabilities of given texts, whole distributions or forced lengths needs an
engine that tells or takes them.

Boundary: refusals. Asking is the backend's.
"""

from __future__ import annotations

from collections.abc import Sequence

from workbench.backends.by_id import find_endpoint
from workbench.evals.datasets import Dataset
from workbench.evals.errors import CompareSpecError
from workbench.evals.scorers import Scorer
from workbench.settings import Settings


def check_endpoint_side(
    ref: str,
    dataset: Dataset,
    scorers: Sequence[Scorer],
    settings: Settings,
    *,
    speed: bool,
    divergence: bool,
) -> None:
    """Raise CompareSpecError where something was asked for that ``endpoint:NAME/MODEL`` cannot give; UnknownEndpointError."""
    endpoint = find_endpoint(ref, settings)
    title = endpoint.abilities.title
    needing = [scorer.metric.name for scorer in scorers if scorer.needs_reference]
    if divergence:
        raise _cannot(ref, "tell whole token distributions", "divergence", "Leave the divergence out.")
    if needing:
        raise _cannot(
            ref,
            f"tell the log-probabilities that {', '.join(needing)} needs",
            "scorers",
            "Choose scorers of outputs.",
        )
    if any(example.tools for example in dataset.examples):
        raise _cannot(
            ref, "have its tool calls scored: the wire does not tell how the model wrote them", "dataset",
            "Choose a dataset without tools.",
        )  # fmt: skip
    if speed and "min_tokens" not in endpoint.abilities.params:
        raise _cannot(
            ref, f"be timed with answers of equal length, since {title} takes no min_tokens", "speed",
            "Leave speed out (--no-speed), or run a benchmark of it.",
        )  # fmt: skip


def _cannot(ref: str, what: str, param: str, remedy: str) -> CompareSpecError:
    return CompareSpecError(f"{ref} cannot {what}", value=ref, param=param, remedy=remedy)
