"""The parts of pages: colours, block map, timeline, code to copy, numbers, notices."""

from __future__ import annotations

import ast
import base64
import itertools
import json
import os
import re
import shlex
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from page_world import ROOT, make_worker

from engine.record_log import BlockMap
from engine.records import MemoryLedger
from engine.sampling_params import SamplingParams
from engine.structured_outputs import StructuredOutputsParams
from workbench.ui import charts, formats, glossary, markup, pace, theme
from workbench.ui.components import (
    block_map,
    copy_code,
    engine_live,
    memory_ledger,
    page_errors,
    step_timeline,
)
from workbench.ui.step_columns import MAX_BINS, StepColumns

# How the three colour-vision deficiencies see linear RGB. Source: Machado, Oliveira, Fernandes 2009, severity 1.
VISION = {
    "normal": np.eye(3),
    "protan": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    "deutan": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
    "tritan": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]),
}  # fmt: skip
APART = 20.0  # CIE76 difference; about 2 is just visible
THEMES = [theme.LIGHT, theme.DARK]


def linear(colour: str) -> np.ndarray:
    c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ np.clip(
        rgb, 0, 1
    )
    f = np.array([np.cbrt(v) if v > 0.008856 else 7.787 * v + 16 / 116 for v in xyz / [0.9505, 1.0, 1.089]])
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(a: str, b: str) -> float:
    low, high = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (a, b))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("tokens", THEMES, ids=["light", "dark"])
def test_palette_stays_apart_whatever_the_eye(tokens, vision):
    colours = [*tokens.palette, tokens.cached]
    seen = {c: lab(VISION[vision] @ linear(c)) for c in colours}
    nearest = min(float(np.linalg.norm(seen[a] - seen[b])) for a, b in itertools.combinations(colours, 2))
    assert nearest >= APART


@pytest.mark.parametrize("tokens", THEMES, ids=["light", "dark"])
def test_text_can_be_read(tokens):
    for ground in (tokens.background, tokens.surface):
        assert contrast(tokens.text, ground) >= 7
        for colour in (tokens.muted, tokens.bad, tokens.warn, tokens.ok):
            assert contrast(colour, ground) >= 4.5
    assert min(contrast(c, tokens.background) for c in tokens.palette) >= 1.9


def test_streamlit_theme_is_the_one_of_the_tokens():
    file = ROOT / ".streamlit" / "config.toml"
    assert file.read_text("utf-8") == theme.config_toml(), (
        "run `python -m workbench.ui.theme > .streamlit/config.toml`"
    )


def test_colour_follows_the_id_alone():
    assert [theme.colour_index(x) for x in ("a", "b", "request-1")] == [
        theme.colour_index(x) for x in ("a", "b", "request-1")
    ]
    assert {theme.colour_index(str(i)) for i in range(200)} == set(range(8))


@given(data=st.data())
def test_cells_say_who_holds_each_block(data):
    num_blocks = data.draw(st.integers(1, 40))
    blocks = st.lists(st.integers(0, num_blocks - 1), unique=True, max_size=10).map(tuple)
    owners = data.draw(st.dictionaries(st.text("abc", min_size=1, max_size=3), blocks, max_size=4))
    published = frozenset(data.draw(st.sets(st.integers(0, num_blocks - 1))))
    found = block_map.cells_of(BlockMap(0, num_blocks, owners, published))
    for block in range(num_blocks):
        holders = [o for o in owners if block in owners[o]]
        code = found.codes[block]
        if holders:
            assert found.owners[code - block_map.FIRST_OWNER] == holders[0]
        else:
            assert code == (block_map.CACHED if block in published else block_map.FREE)
        assert found.hatched[block] == (len(holders) > 1)


def test_large_pool_is_shown_in_runs():
    num_blocks = 3 * block_map.MAX_CELLS + 5
    found = block_map.cells_of(BlockMap(0, num_blocks, {"a": (0, 9), "b": (9,)}, frozenset({40})))
    assert found.per_cell == 4
    assert len(found.codes) == -(-num_blocks // 4) <= block_map.MAX_CELLS
    assert found.codes[0] == block_map.FIRST_OWNER
    assert found.hatched[2] == 1  # block 9 is shared: the most telling of its run
    assert found.codes[10] == block_map.CACHED


def test_block_map_has_words_for_what_it_shows():
    blocks = BlockMap(3, 10, {"a" * 30: (0, 1), "b": (1, 2)}, frozenset({5}))
    data = block_map.payload(blocks, "dark")
    assert data["summary"] == "10 KV blocks: 3 held by 2 sequences, 1 of them shared, 1 cached, 6 free."
    assert [item["label"] for item in data["legend"]] == [
        "a" * 19 + "…: 2", "b: 2", "shared prefix: 1", "cached: 1", "free: 6",
    ]  # fmt: skip


class NoSteps:
    def steps(self, since_ns=None, until_ns=None):
        return []


def test_timeline_sends_few_points():
    bins = StepColumns(NoSteps(), 600).bins(0, 10**9, MAX_BINS)
    data = step_timeline.payload(bins, 10**9, 8, "light", None)
    points = sum(len(base64.b64decode(s["values"])) // 4 for p in data["panels"] for s in p["series"])
    assert points == MAX_BINS * 10 <= 5000
    assert data["ticks"][-1] == "now"
    json.dumps(data)


def test_step_chart_is_a_figure_that_plotly_accepts():
    import plotly.graph_objects as go

    names = ("prefill", "decode", "schedule", "prepare", "forward", "sample")
    columns = {name: np.arange(5, dtype=np.float32) for name in names} | {"step_id": np.arange(5)}
    figure = go.Figure(charts.step_times(columns, 3, "dark"))
    assert len(figure.data) == 4
    assert sum(len(trace.y) for trace in figure.data) == 20
    assert figure.layout.shapes[0].x0 == 2.5


PARAMS = SamplingParams(
    temperature=0.5, top_k=7, top_p=0.9, min_p=0.1, max_tokens=33, min_tokens=2, seed=9, stop=("a'b", 'c"d'),
    ignore_eos=True, logprobs=4, presence_penalty=0.5, frequency_penalty=-0.5, repetition_penalty=1.2, typical_p=0.7,
    logit_bias={5: 2.0}, bad_words=("no", "never"), allowed_token_ids=(5, 6),
    structured_outputs=StructuredOutputsParams(choice=("a'b", "c")),
)  # fmt: skip
MESSAGES = [{"role": "system", "content": "it's\n$HOME `x`"}, {"role": "user", "content": 'ü "quoted" \\n'}]
WHOLE = {
    "model": "m", "messages": MESSAGES, "temperature": 0.5, "top_k": 7, "top_p": 0.9, "min_p": 0.1, "max_tokens": 33,
    "min_tokens": 2, "seed": 9, "stop": ["a'b", 'c"d'], "ignore_eos": True, "logprobs": True, "top_logprobs": 4,
    "presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.2, "typical_p": 0.7, "logit_bias": {"5": 2.0},
    "bad_words": ["no", "never"], "allowed_token_ids": [5, 6], "structured_outputs": {"choice": ["a'b", "c"]},
}  # fmt: skip


def test_curl_carries_the_whole_request_through_a_shell():
    words = shlex.split(copy_code.as_curl("http://127.0.0.1:1/v1", "m", MESSAGES, PARAMS).replace("\\\n", ""))
    assert words[:2] == ["curl", "http://127.0.0.1:1/v1/chat/completions"]
    assert json.loads(words[words.index("-d") + 1]) == WHOLE


def test_python_carries_the_whole_request():
    code = copy_code.as_python("http://127.0.0.1:1/v1", "m", MESSAGES, PARAMS)
    calls = [
        n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Call) and "create" in ast.unparse(n.func)
    ]
    given = {k.arg: ast.literal_eval(k.value) for k in calls[0].keywords}
    extra = given.pop("extra_body")
    assert {**given, **extra} == WHOLE


def test_where_keys_are_asked_for_the_code_takes_one_from_the_environment():
    base = "http://127.0.0.1:1/v1"
    code = copy_code.as_python(base, "m", MESSAGES, PARAMS, needs_key=True)
    assert "os.environ['QUIRE_API_KEY']" in ast.unparse(ast.parse(code))
    assert "import os" in code
    assert "none" not in code.split("answer =")[0]
    shell = copy_code.as_curl(base, "m", MESSAGES, PARAMS, needs_key=True)
    words = shlex.split(shell.replace("\\\n", ""))
    assert "Authorization: Bearer $QUIRE_API_KEY" in words
    assert json.loads(words[words.index("-d") + 1]) == WHOLE
    assert '"Authorization: Bearer $QUIRE_API_KEY"' in shell, "the shell fills it in"


def test_defaults_are_left_out_of_the_code():
    assert copy_code.settings(SamplingParams(max_tokens=None)) == {"temperature": 1.0}


def test_api_address_is_the_page_s():
    assert copy_code.base_url("http://127.0.0.1:8601/playground?chat=x") == "http://127.0.0.1:8601/v1"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (float("nan"), "–"), (0, "0"), (0.01234, "0.0123"), (1.239, "1.24"), (12.34, "12.3"), (1234.5, "1,234"),
     (-3.14159, "-3.14")],
)  # fmt: skip
def test_three_significant_digits(value, shown):
    assert formats.significant(value) == shown


def test_unknown_is_never_zero():
    assert (
        formats.milliseconds(None)
        == formats.percent(1, 0)
        == formats.count(None)
        == formats.bytes_of(None)
        == "–"
    )


def test_ledger_adds_up():
    shown = memory_ledger.as_html(MemoryLedger(2**30, 3 * 2**30, 512 * 2**20, 9 * 2**30, "cpu"))
    assert "4.50 GiB in all, 50.0 % of 9.00 GiB" in shown
    assert "512 MiB" in shown
    assert "graphs" not in shown
    assert "others" not in shown
    assert "free <b>4.50 GiB" in shown
    assert "KV cache <b>" in shown
    assert "KV cache int8 <b>" in memory_ledger.as_html(MemoryLedger(1, 2, 3, 9, "cpu"), "int8")


def test_ledger_shows_graphs_others_and_what_is_free_over_the_whole_device():
    ledger = MemoryLedger(
        2**30, 3 * 2**30, 2**30, 10 * 2**30, "cuda:0", graphs_bytes=2**30, other_bytes=2 * 2**30
    )
    shown = memory_ledger.as_html(ledger)
    widths = [float(part.split("%")[0]) for part in shown.split("width:")[1:]]
    assert widths == [10, 30, 10, 10, 20, 20]
    assert "6.00 GiB in all, 60.0 % of 10.0 GiB on cuda:0" in re.sub("<[^>]*>", "", shown)


def test_a_host_tier_is_in_the_bar_where_it_is_in_the_devices_memory():
    on_cpu = memory_ledger.as_html(MemoryLedger(2, 2, 2, 16, "cpu", host_tier_bytes=4))
    assert [float(part.split("%")[0]) for part in on_cpu.split("width:")[1:]] == [12.5, 12.5, 25, 12.5, 37.5]
    beside_gpu = memory_ledger.as_html(MemoryLedger(2, 2, 2, 8, "cuda:0", host_tier_bytes=2**26))
    assert [float(part.split("%")[0]) for part in beside_gpu.split("width:")[1:]] == [25, 25, 25, 25]
    assert "host tier 64.0 MiB in host memory" in re.sub("<[^>]*>", "", beside_gpu)


def test_everything_foreign_is_escaped():
    nasty = "<b a=\"1\" c='2'>&"
    for shown in (
        markup.panel("bad", nasty, nasty, [(nasty, nasty)]),
        markup.tiles([markup.Tile("x", nasty, nasty)]),
        markup.table(["x"], [[markup.Cell(nasty)]]),
        markup.title(nasty, nasty),
    ):
        assert "<b" not in shown


def test_every_term_that_a_page_uses_is_explained():
    with pytest.raises(KeyError):
        glossary.tip("no such term")
    assert all(text.endswith(".") for text in glossary.TERMS.values())


def test_page_error_is_told_by_id_and_logged(caplog, monkeypatch):
    shown: list[str] = []
    monkeypatch.setattr("streamlit.html", shown.append)
    with page_errors.shown():
        raise ValueError("<secret>")
    assert "secret" not in shown[0]
    number = caplog.records[0].args[0]
    assert number in shown[0]
    assert "<secret>" in caplog.text


def test_scripts_in_the_browser_fetch_nothing_but_the_live_parts():
    folder = ROOT / "workbench" / "ui"
    for file in [*folder.rglob("*.js"), *folder.rglob("*.css"), *folder.rglob("*.py")]:
        text = Path(file).read_text("utf-8").replace("fetch(`/live/", "")
        for word in ("https://", "@import", "fetch(", "XMLHttpRequest", " url("):
            assert word not in text, f"{file.name} has {word}"


@pytest.mark.parametrize(("num_cores", "seconds"), [(1, 5.0), (2, 5.0), (4, 2.0), (64, 2.0)])
def test_live_parts_refresh_less_often_where_no_core_is_free(monkeypatch, num_cores, seconds):
    monkeypatch.setattr(pace, "available_cores", lambda: num_cores)
    assert pace.every(2.0) == seconds


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a priority of their own on Linux alone")
def test_thread_that_yields_to_the_engine_keeps_a_lower_priority():
    found: list[int] = []

    def script() -> None:
        for _ in range(2):
            pace.yield_to_the_engine()
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    thread = threading.Thread(target=script)
    thread.start()
    thread.join(10)
    assert found == [max(pace.NICE, os.getpriority(os.PRIO_PROCESS, 0))]


def test_speculation_tells_how_often_it_was_right_and_what_it_brought():
    worker, _ = make_worker()
    plain = worker.stats()
    worker.close()
    assert not any("Guesses" in tile.label for tile in engine_live._tiles(plain))
    guessed = replace(plain, draft_tokens=40, accepted_tokens=10, speculation_gains={4: 1.25, 1: 1.5})
    [tile] = [tile for tile in engine_live._tiles(guessed) if "Guesses" in tile.label]
    assert tile.value == "25.0 %"
    assert tile.note == "10 of 40 tokens guessed by n-grams, 1.50 × the tokens/s (rows: 1)"


def test_code_to_copy_asks_for_json_without_blanks_where_the_page_did():
    asked = StructuredOutputsParams(json_object=True, any_whitespace=False)
    copied = copy_code.settings(SamplingParams(structured_outputs=asked))["structured_outputs"]
    assert copied == {"json_object": True, "disable_any_whitespace": True}
