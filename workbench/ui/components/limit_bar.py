"""How close the engine runs to what this machine can do: the share of the limit, where the time went, and what would help."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.limits import Spent, spent
from workbench.ui import formats, markup, resources, who
from workbench.ui.components import action_state
from workbench.ui.markup import term

if TYPE_CHECKING:
    from engine.worker import EngineWorker
    from workbench.limits import LimitStore, MeasuredLimits
    from workbench.ui.components.engine_state import EngineView
    from workbench.ui.step_columns import StepColumns

ACTION = "limits"
_HELP = {
    "weights": "Every step reads all weights: more requests at once share the reading, quantized weights are less to read.",
    "KV": "Keys and values are most of what is read: shorter contexts, fewer sequences at once, or fewer bytes for each value help.",
    "compute": "The arithmetic itself takes longest: prompts that share a beginning are not computed twice, shorter ones are less.",
    "host": "The device waits for the host: more requests in a step, and fewer other processes on these cores, help.",
    "above": "More was reached than had been measured: measure again while nothing else keeps the machine busy.",
    "kernels": "Most time passes in kernels beyond what they need: small batches and busy cores are the usual reasons.",
}
_NAMES = {
    "weights": "reading weights",
    "KV": "reading keys and values",
    "compute": "arithmetic",
    "host": "the host",
}


def as_html(worker: EngineWorker, columns: StepColumns, since_ns: int, until_ns: int) -> str:
    """The part of the page for a window of steps."""
    store, heading = _store(), markup.section("Limit", "what the time of this window went to")
    if store is None:
        return heading + _muted("This app keeps no records: the machine is not measured.")
    measured = store.find(worker)
    if measured is None:
        return heading + _muted(_NOT_MEASURED)
    found = spent(columns.arrays(since_ns, until_ns), measured.limits, since_ns=since_ns, until_ns=until_ns)
    if not found.num_steps:
        return heading + _muted("No step in this window.") + _conditions(measured)
    if not found.floor_s:
        return heading + _muted("These steps needed nothing of the machine: this engine has no model.")
    return heading + told(found) + _conditions(measured, found)


_NOT_MEASURED = (
    "Not measured yet. What this machine can do is measured when the engine has answered its first request and is "
    "idle again, or now by the button."
)


def told(found: Spent) -> str:
    """Figure, bar and sentence of a window in which there were steps."""
    parts = [
        ("weights", found.weights_s, "var(--q-c0)"),
        ("KV", found.kv_s, "var(--q-c2)"),
        ("compute", found.compute_s, "var(--q-c1)"),
        ("kernels above that", found.kernels_s, "var(--q-cached)"),
        ("host", found.host_s, "var(--q-c3)"),
        ("idle", found.idle_s, "var(--q-surface)"),
    ]
    whole = sum(seconds for _, seconds, _ in parts)
    share = formats.percent(found.floor_s, found.busy_s)
    label = f"{share} of the limit, bound by {_NAMES[found.bound]}"
    return (
        f'<div class="q-limit"><b>{share}</b><span>{term("share of limit", "of the limit")} while it worked</span>'
        f"<span>bound by {_NAMES[found.bound]}</span></div>"
        f"{markup.stacked_bar(parts, lambda seconds: f'{100 * seconds / whole:.1f} %', label=label)}"
        f"{_muted(_HELP[_largest(found)])}"
    )


def measure_button(view: EngineView) -> None:
    """Measure now; what became of it is told below the button."""
    store, worker = _store(), view.worker
    if store is None or worker is None:
        return
    label = "Measure the machine"
    help = "Takes a moment, while no request runs; a request that comes ends it."
    if who.button(label, key="measure_limits", help=help):
        action_state.start(ACTION, label, lambda: store.measure(worker))
    action_state.show(ACTION)


def _largest(found: Spent) -> str:
    """What most of the busy time went to; "above" where the floor alone is more than that."""
    if found.floor_s > found.busy_s:
        return "above"
    parts = {"weights": found.weights_s, "KV": found.kv_s, "compute": found.compute_s, "host": found.host_s}
    parts["kernels"] = found.kernels_s
    return max(parts, key=lambda name: parts[name])


def _conditions(measured: MeasuredLimits, found: Spent | None = None) -> str:
    asked = measured.conditions
    threads = f" on {asked.threads} threads" if asked.threads else ""
    needed = (
        f"Needed {formats.rate(found.bytes_s, 'B')} and {formats.rate(found.flops_s, 'FLOP')} while it worked. "
        if found is not None
        else ""
    )
    return _muted(
        f"{needed}This machine reads {formats.rate(measured.bytes_s, 'B')} and multiplies "
        f"{formats.rate(measured.flops_s, 'FLOP')} in {asked.dtype}{threads}, measured {formats.at_minute(measured.at)} UTC."
    )


def _muted(text: str) -> str:
    return f'<p class="q-limit-note">{markup.text(text)}</p>'


def _store() -> LimitStore | None:
    services = resources.services()
    return None if services is None else services.limits
