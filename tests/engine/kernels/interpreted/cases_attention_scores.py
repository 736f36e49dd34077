"""Soft cap and ALiBi, through the backend, against the float64 reference; and their bits in deterministic mode."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.attention.random_step import PagedStep, excess_error, paged_step
from engine.attention.triton_paged import TritonPagedAttention
from engine.kernels.attention_tiles import SPLIT_TOKENS

ROWS = [(17, 1), (SPLIT_TOKENS + 1, 1), (35, 33), (SPLIT_TOKENS + 8, 16)]
HEADS = 4
# The slopes of 8 heads (Press et al. 2022), from the steepest to one that reaches over splits.
SLOPES = torch.tensor([2.0**-1, 2.0**-3, 2.0**-6, 2.0**-8])
FORMS: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 5.0},
    "alibi": {"alibi_slopes": SLOPES},
    "both, in a window": {"softcap": 20.0, "alibi_slopes": SLOPES, "window": 90},
}


def _step(rows: list[tuple[int, int]], dtype: torch.dtype, seed: int = 0) -> PagedStep:
    """Scores of about ±8, so that a cap matters."""
    step = paged_step(rows, num_kv_heads=1, group=HEADS, head_size=64, dtype=dtype, seed=seed)
    return replace(step, q=step.q * 8)


def _run(step: PagedStep, *, deterministic: bool = False, window: int | None = None, **form: Any) -> Tensor:
    backend = TritonPagedAttention(deterministic=deterministic)
    return backend.forward(
        step.q, step.k_cache, step.v_cache, step.meta, scale=step.scale, sliding_window=window, **form
    )


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
@pytest.mark.parametrize(
    ("dtype", "deterministic"),
    [(torch.float32, False), (torch.float16, True), (torch.bfloat16, False)],
)
def test_scores_are_formed_as_defined(form: dict[str, Any], dtype: torch.dtype, deterministic: bool) -> None:
    step = _step(ROWS, dtype)
    got = _run(step, deterministic=deterministic, **form)
    excess = excess_error(got, step, **form)
    assert excess <= 1.0, f"the error is {excess:.2f} of what rounding allows"
    assert excess_error(got, step, form.get("window")) > 10.0, "the form makes no difference here"


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
def test_deterministic_decode_gives_the_bits_of_prefill(form: dict[str, Any]) -> None:
    whole = _step([(SPLIT_TOKENS + 12, 24)], torch.float16)
    want = _run(whole, deterministic=True, **form)
    for begin, end in [(0, 11), (11, 12), (23, 24)]:
        got = _run(whole.part(0, begin, end), deterministic=True, **form)
        assert torch.equal(got, want[begin:end]), (begin, end)


def test_a_cap_holds_where_scores_would_overflow() -> None:
    step = _step(ROWS, torch.float32)
    huge = replace(step, q=step.q * 1e4)
    excess = excess_error(_run(huge, softcap=3.0), huge, softcap=3.0)
    assert excess <= 1.0, f"the error is {excess:.2f} of what rounding allows"
