"""What an engine that is loaded now has its own way: fields of a form, bound to the page's address."""

from __future__ import annotations

from typing import Any

import streamlit as st

from engine.config import QUANTIZATIONS
from workbench.load_options import LoadOptions, read_speculation
from workbench.ui.glossary import tip

AS_STORED = "as stored"
AS_COMPUTED = "as computed"
KV_CACHES = ("fp8", "int8")


def show() -> dict[str, Any]:
    """Render the fields; what was written, to be read by `read` once the form is sent."""
    with st.expander("Options of its engine"):
        left, middle, right = st.columns(3)
        return {
            "quantization": left.selectbox(
                "Weights", [AS_STORED, *QUANTIZATIONS], key="own_weights", bind="query-params", help=tip("quantization")
            ),
            "kv_cache_dtype": middle.selectbox(
                "KV cache", [AS_COMPUTED, *KV_CACHES], key="own_kv", bind="query-params", help=tip("KV cache dtype")
            ),
            "max_model_len": right.number_input(
                "Context", 0, None, 0, key="own_context", bind="query-params",
                help="Tokens of one sequence at most; 0: the model's own, as far as the memory goes.",
            ),
            "speculative_config": st.text_input(
                "Speculation", key="own_speculation", bind="query-params", help=tip("speculation"),
                placeholder='off; or {"method": "ngram", "num_speculative_tokens": 4}',
            ),
        }  # fmt: skip


def read(written: dict[str, Any]) -> LoadOptions:
    """Raises ConfigError, SettingsError: what no engine takes."""
    given = {
        "quantization": written["quantization"],
        "kv_cache_dtype": written["kv_cache_dtype"],
        "max_model_len": int(written["max_model_len"]) or None,
        "speculative_config": read_speculation(written["speculative_config"] or ""),
    }
    unset = (None, AS_STORED, AS_COMPUTED)
    return LoadOptions.from_dict({name: value for name, value in given.items() if value not in unset})
