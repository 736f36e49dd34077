"""Plan before loading: what a model would take on a GPU of a given size, for each quantization, from its config alone."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

import streamlit as st

from workbench.memory_budget import in_units
from workbench.ui import formats, markup, resources
from workbench.ui.components import action_state
from workbench.ui.markup import Cell

if TYPE_CHECKING:
    from workbench.model_plan import ModelPlan, PlanRow

_HEAD = (
    "Weights", "KV cache", "Weights (GiB)", "Workspace (GiB)", "KV per token (KiB)", "KV tokens", "Sequences at once",
)  # fmt: skip


def show() -> None:
    """Render the form and the latest plan of this session."""
    st.html(markup.section("Plan before loading", "from a model's config alone; the GPU need not be here"))
    with st.form("model_plan", border=True):
        left, middle, right, button = st.columns([3, 1, 1, 1], vertical_alignment="bottom")
        model = left.text_input(
            "Folder, *.gguf file or hub id",
            key="plan_model",
            bind="query-params",
            placeholder="/models/my-model or org/name",
        )
        memory = middle.text_input("GPU memory", "80GiB", key="plan_memory", bind="query-params")
        context = right.number_input(
            "Context",
            0,
            None,
            0,
            key="plan_context",
            bind="query-params",
            help="Tokens of a sequence; 0: up to 8,192, as far as the model goes.",
        )
        sent = button.form_submit_button("Plan", width="stretch", key="plan_go")
    key = st.session_state.setdefault("plan_key", f"plan_{secrets.token_hex(8)}")
    given = (model or "").strip()
    if sent and not given:
        st.html(markup.panel("warn", "No model was named", "Write a folder, a *.gguf file or a hub id."))
        return
    if sent:
        action_state.start(key, f"Plan {given}", lambda: _plan(given, memory or "", int(context)))
    action_state.show(key)
    action = resources.actions().get(key)
    if action is not None and not action.running and action.error is None:
        st.html(_as_html(action.result))


def _plan(model: str, memory: str, context: int) -> ModelPlan:
    from workbench.model_plan import make_plan, parse_bytes

    return make_plan(model, gpu_bytes=parse_bytes(memory), context=context or None)


def _as_html(plan: ModelPlan) -> str:
    told = (
        f"{plan.model}: {plan.architecture}, {formats.significant(plan.num_parameters / 1e9)} B parameters stored as "
        f"{plan.stored_as}, computed in {plan.dtype} on {in_units(plan.gpu_bytes)}. Sequences of {plan.context:,} tokens, of the "
        "engine's 256 rows at most. An estimate: a loaded engine measures its largest step."
    )
    return f'<p class="q-muted">{markup.text(told)}</p>' + markup.table(_HEAD, map(_row, plan.rows), left=2)


def _row(row: PlanRow) -> list[Cell]:
    fits = [Cell(f"{row.num_kv_tokens:,}"), Cell(f"{row.num_sequences:,}")]
    return [
        Cell(row.weights),
        Cell(row.kv_cache_dtype),
        Cell(formats.significant(row.weights_bytes / 2**30)),
        Cell(formats.significant(row.workspace_bytes / 2**30)),
        Cell(formats.significant(row.kv_bytes_per_token / 2**10)),
        *(fits if not row.problem else [Cell(formats.UNKNOWN), Cell(row.problem)]),
    ]
