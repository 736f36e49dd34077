"""The map of KV blocks: one cell a block, coloured by the sequence that holds it, as one canvas.

Encodes a `BlockMap` into two small byte strings; the browser paints. Live, ``live.js`` hands it new data. At most `MAX_CELLS` cells go there: larger pools
show runs of blocks, each run as its most telling block (shared, else held, else cached).
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from workbench.ui import markup, theme
from workbench.ui.theme import ThemeName

if TYPE_CHECKING:
    from engine.record_log import BlockMap

MAX_CELLS = 4096
MAX_LEGEND = 8
FREE, CACHED, FIRST_OWNER = 0, 1, 2
_HTML = '<div class="map"><canvas role="img"></canvas><div class="tip" role="status" hidden></div><div class="legend"></div></div>'
_CSS = """
.map { position: relative; font: 12px/1.4 var(--st-font, sans-serif); color: var(--st-text-color); }
canvas { width: 100%; display: block; }
.tip { position: absolute; z-index: 9; padding: 4px 8px; border-radius: 6px; pointer-events: none; white-space: nowrap;
  background: var(--st-secondary-background-color); border: 1px solid var(--st-border-color); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; margin-top: 8px; }
.legend span { display: inline-flex; align-items: center; gap: 6px; }
.legend i { width: 12px; height: 12px; background: var(--c, transparent); border-radius: 2px; box-sizing: border-box; }
.legend i.none { display: none; }
.legend i.free { border: 1px solid var(--st-border-color); }
.legend i.shared { background: repeating-linear-gradient(135deg, var(--c) 0 2px, var(--st-background-color) 2px 4px); }
"""


@dataclass(frozen=True, slots=True)
class Cells:
    """A block map as bytes. C cells; `codes` [C] is FREE, CACHED or FIRST_OWNER + place in `owners`; `hatched` [C]."""

    codes: NDArray[np.uint16]
    hatched: NDArray[np.uint8]
    owners: tuple[str, ...]
    per_cell: int


def cells_of(blocks: BlockMap) -> Cells:
    """Encode; O(blocks held)."""
    owners = tuple(blocks.owners)
    codes = np.zeros(max(1, blocks.num_blocks), np.uint16)
    hatched = np.zeros(len(codes), np.uint8)
    codes[np.fromiter(blocks.cached, np.int64, len(blocks.cached))] = CACHED
    for place in reversed(range(len(owners))):  # the first holder wins a shared block
        held = blocks.owners[owners[place]]
        codes[np.fromiter(held, np.int64, len(held))] = FIRST_OWNER + place
    hatched[np.fromiter(blocks.shared, np.int64, len(blocks.shared))] = 1
    per_cell = -(-len(codes) // MAX_CELLS)
    if per_cell > 1:
        codes, hatched = _by_runs(codes, hatched, per_cell)
    return Cells(codes, hatched, owners, per_cell)


def _by_runs(
    codes: NDArray[np.uint16], hatched: NDArray[np.uint8], per_cell: int
) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
    pad = -len(codes) % per_cell
    codes = np.pad(codes, (0, pad)).reshape(-1, per_cell)
    hatched = np.pad(hatched, (0, pad)).reshape(-1, per_cell)
    telling = np.argmax(codes.astype(np.int64) + (hatched.astype(np.int64) << 20), axis=1)
    rows = np.arange(len(codes))
    return codes[rows, telling], hatched[rows, telling]


def show(blocks: BlockMap, *, key: str = "block_map") -> None:
    """Render the map with its legend."""
    show_payload(payload(blocks, theme.current()), key=key)


def show_payload(data: dict[str, Any], *, key: str = "block_map") -> None:
    _component()(key=key, data=data)


def heading(blocks: BlockMap) -> str:
    """HTML that says which step the map is of."""
    note = f"after step {blocks.step_id:,}" if blocks.step_id >= 0 else "before the first step"
    return markup.section("KV blocks", note)


def payload(blocks: BlockMap, name: ThemeName) -> dict[str, Any]:
    """What the browser gets."""
    cells, t = cells_of(blocks), theme.tokens(name)
    owners = [{"label": _label(o, blocks), "colour": theme.colour_of(o, name)} for o in cells.owners]
    shown = [{"kind": "owner", **owner} for owner in owners[:MAX_LEGEND]]
    if len(owners) > MAX_LEGEND:
        shown.append({"kind": "free", "label": f"and {len(owners) - MAX_LEGEND} more sequences"})
    shared_label = f"shared prefix: {len(blocks.shared):,}"
    return {
        "codes": base64.b64encode(cells.codes.astype("<u2").tobytes()).decode(),
        "hatched": base64.b64encode(cells.hatched.tobytes()).decode(),
        "owners": owners,
        "per_cell": cells.per_cell,
        "num_blocks": blocks.num_blocks,
        "theme": name,
        "colours": {"background": t.background, "border": t.border, "cached": t.cached},
        "legend": [
            *shown,
            {"kind": "shared", "colour": t.muted, "label": shared_label},
            {"kind": "cached", "colour": t.cached, "label": f"cached: {len(blocks.cached):,}"},
            {"kind": "free", "label": f"free: {blocks.num_free:,}"},
            *(
                [{"kind": "none", "label": f"a cell is {cells.per_cell} blocks"}]
                if cells.per_cell > 1
                else []
            ),
        ],
        "summary": summary(blocks),
    }


def summary(blocks: BlockMap) -> str:
    """The map in one sentence, for those who cannot see it."""
    held = blocks.num_blocks - blocks.num_free - len(blocks.cached)
    return (
        f"{blocks.num_blocks:,} KV blocks: {held:,} held by {len(blocks.owners):,} sequences, {len(blocks.shared):,} of them "
        f"shared, {len(blocks.cached):,} cached, {blocks.num_free:,} free."
    )


def _label(owner: str, blocks: BlockMap) -> str:
    return f"{owner if len(owner) <= 20 else owner[:19] + '…'}: {len(blocks.owners[owner]):,}"


@cache
def _component() -> Callable[..., Any]:
    import streamlit as st

    script = Path(__file__).with_suffix(".js").read_text("utf-8")
    made: Callable[..., Any] = st.components.v2.component("quire.block_map", html=_HTML, css=_CSS, js=script)
    return made
