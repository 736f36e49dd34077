"""The Playground of models that generate nothing: texts compared, documents ranked, refusals told."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from page_world import html_of
from streamlit.testing.v1 import AppTest

from engine.config import EngineConfig
from engine.encoder.engine import EncoderEngine
from engine.fake_tokenizer import FakeTokenizer
from engine.pooling import SCORE, ModelPooling, Pooling, Vector
from engine.worker import EngineWorker
from workbench.host import FAKE_MODEL, EngineHost
from workbench.ui import resources


class CountsBytes:
    """An encoder without a model: how often each byte stands in a text; of a pair, the logit of what both share."""

    def encode(self, texts: Sequence[Sequence[int]], poolings: Sequence[Pooling]) -> list[Vector]:
        return [self._vector(list(text), pooling) for text, pooling in zip(texts, poolings, strict=True)]

    def _vector(self, text: list[int], pooling: Pooling) -> Vector:
        if pooling.kind == SCORE:
            first, second = set(text[: pooling.second_segment]), set(text[pooling.second_segment :])
            return np.array([len(first & second) - 3.0])
        if ord("!") in text:
            raise RuntimeError("no exclamation marks")
        return np.bincount(text, minlength=261).astype(np.float64)


@pytest.fixture
def page(open_page: Callable[[str], AppTest]) -> Iterator[Callable[[ModelPooling], AppTest]]:
    """Opens the Playground on a model of that kind."""
    hosts: list[EngineHost] = []

    def make(pooling: ModelPooling) -> AppTest:
        config = EngineConfig(
            model=FAKE_MODEL, max_model_len=512, max_batched_tokens=2048, dtype="float32", device="cpu"
        )

        def factory(config: EngineConfig, *, progress: Any, on_fatal: Any) -> EngineWorker:
            tokenizer = FakeTokenizer()
            engine = EncoderEngine(
                config, CountsBytes(), pooling=pooling, vocab_size=tokenizer.vocab_size, tokenizer=tokenizer
            )
            return EngineWorker(engine, on_fatal=on_fatal)

        host = EngineHost(config, factory=factory)
        hosts.append(host)
        host.start()
        assert host.wait(10).ready, host.state()
        resources.provide(host)
        return open_page("playground")

    yield make
    resources.provide(None)
    for host in hosts:
        host.close()


EMBEDDER = ModelPooling("embed", "mean", poolings=("mean",))
RERANKER = ModelPooling(SCORE, SCORE, poolings=(SCORE,))


def send(at: AppTest, texts: str, query: str | None = None) -> AppTest:
    at.text_area(key="relations_texts").set_value(texts)
    if query is not None:
        at.text_input(key="relations_query").set_value(query)
    return finished(at.button(key="relations_go").click().run())


def finished(at: AppTest) -> AppTest:
    """The page once what was sent has ended."""
    deadline = time.monotonic() + 20
    while resources.actions().running():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return at.run() if " … " in html_of(at) else at


def test_texts_are_compared_in_a_heat_map_and_the_closest_pair_is_named(page):
    at = page(EMBEDDER)
    assert not at.exception
    assert "Nothing read yet" in html_of(at)
    assert not at.chat_input, "there is nobody to talk to"
    at = send(at, "abc\n\n  cab  \nxyz")
    assert not at.exception
    shown = html_of(at)
    assert "Most alike: <b>abc</b> and <b>cab</b>, cosine 1.000; the median pair has 0.000" in shown
    (chart,) = at.get("plotly_chart")
    (trace,) = json.loads(chart.proto.spec)["data"]
    np.testing.assert_allclose(trace["z"], [[1, 1, 0], [1, 1, 0], [0, 0, 1]], atol=1e-4)


def test_documents_are_ranked_with_bars_and_escaped(page):
    at = send(page(RERANKER), "qrs\n<b>abcd\nabcde", query="abcdefgh")
    assert not at.exception
    shown = html_of(at)
    order = [shown.index(text) for text in ("abcde</td>", "&lt;b&gt;abcd</td>", "qrs</td>")]
    assert order == sorted(order)
    assert "0.881" in shown  # the sigmoid of five shared letters less three
    assert "width:88.1%" in shown
    assert "<b>abcd" not in shown


@pytest.mark.full
def test_embedder_ranks_too_and_each_view_keeps_to_its_own_result(page):
    at = send(page(EMBEDDER), "abc\ncab")
    at.segmented_control(key="relations_view").set_value("Ranking").run()
    assert "Nothing read yet" in html_of(at)
    at = send(at, "xyz\nabd", query="abc")
    shown = html_of(at)
    assert shown.index("abd</td>") < shown.index("xyz</td>")
    assert "0.667" in shown


@pytest.mark.full
@pytest.mark.parametrize(
    ("texts", "query", "told"),
    [
        ("one line", "q", "at least two lines"),
        ("a\nb", " ", "Write a query"),
        ("a\n" * 25, "q", "more than the 24"),
    ],
)
def test_what_cannot_be_shown_is_said_before_anything_runs(page, texts, query, told):
    at = send(page(RERANKER), texts, query=query)
    assert told in html_of(at)
    assert not resources.host().worker().stats().steps


@pytest.mark.full
def test_failed_batch_is_told_with_its_reason_and_the_example_works_afterwards(page):
    at = send(page(EMBEDDER), "a!\nb")
    assert "no exclamation marks" in html_of(at)
    at.button(key="relations_example").click().run()
    at = finished(at.button(key="relations_go").click().run())
    assert not at.exception
    assert "Most alike" in html_of(at)


@pytest.mark.full
def test_classifier_says_what_it_is(page):
    at = page(ModelPooling("classify", SCORE, poolings=(SCORE,), num_labels=3))
    assert not at.exception
    assert "It tells 3 labels" in html_of(at)


@pytest.mark.full
def test_other_pages_show_an_engine_without_kv_blocks(page):
    at = page(EMBEDDER)
    for name in ("engine", "overview"):
        at = at.switch_page(f"../../pages/{name}.py").run()
        assert not at.exception, name
