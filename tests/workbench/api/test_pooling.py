"""/v1/embeddings, /v1/rerank and /v1/score, asked by the official client and by hand, over a chat model, an encoder, a cross-encoder."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai import BadRequestError
from prometheus_client.parser import text_string_to_metric_families

from engine.config import EngineConfig
from engine.embedding import embedding_requests
from engine.pooling import PoolingParams
from tests.engine.encoder.conftest import WORDS, make_encoder
from workbench.access.keys import ApiKey, KeyLimits
from workbench.access.limits import KeyMeter, KeyUse, RateLimitError, using
from workbench.access.principal import Principal
from workbench.api.answer_log import AnswerLog
from workbench.api.pooling import Call
from workbench.api.pooling import _submit as submit
from workbench.backends.app import AppBackend
from workbench.backends.local import LocalBackend
from workbench.host import load_worker
from workbench.run_state import RunningApp

TEXTS = ["w1 w2 w3", "w9", "w3 w2 w1 w4 w5"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("encoders")
    make_encoder("bert", root / "embedder")
    make_encoder("bert", root / "reranker", "ForSequenceClassification", num_labels=1)
    make_encoder("electra", root / "labels", "ForSequenceClassification", num_labels=3)
    return {name: root / name for name in ("embedder", "reranker", "labels")}


@pytest.fixture(scope="module")
def pooling_server(serve: Callable[..., Any], folders: dict[str, Path]) -> Iterator[Any]:
    config = EngineConfig(model=str(folders["embedder"]), dtype="float32", device="cpu", num_threads=1)
    with serve(load_worker, config) as running:
        for name in ("reranker", "labels"):
            running.host.load(str(folders[name]))
        yield running


def test_official_client_gets_the_engines_vectors_in_both_encodings(pooling_server: Any) -> None:
    client = pooling_server.openai
    floats = client.embeddings.create(model="embedder", input=TEXTS, encoding_format="float")
    packed = client.embeddings.create(
        model="embedder", input=TEXTS
    )  # the client asks for base64 and unpacks it
    assert [each.embedding for each in packed.data] == [each.embedding for each in floats.data]
    assert [each.index for each in floats.data] == [0, 1, 2]
    raw = pooling_server.post("/v1/embeddings", input=TEXTS[0], encoding_format="base64").json()
    assert (
        np.frombuffer(base64.b64decode(raw["data"][0]["embedding"]), "<f4").tolist()
        == floats.data[0].embedding
    )
    with LocalVectors(pooling_server) as vectors:
        expected = vectors.embed(TEXTS)
    for each, vector in zip(floats.data, expected, strict=True):
        np.testing.assert_allclose(each.embedding, vector, rtol=0, atol=1e-6)  # float32, another batch
    assert floats.usage.prompt_tokens == floats.usage.total_tokens == sum(len(t.split()) + 2 for t in TEXTS)


def test_embedded_texts_count_for_the_key_that_asks(
    pooling_server: Any, eventually: Callable[..., bool]
) -> None:
    key = ApiKey(
        "key-a", "a", Principal("key-a", frozenset()), KeyLimits(daily_tokens=30), "", "", None, None, None
    )
    meter, worker = KeyMeter(), pooling_server.host.worker("embedder")
    worker.add_sink(meter)

    def embed(name: str) -> None:
        submit(
            worker, lambda _: embedding_requests(worker, TEXTS, PoolingParams()), Call(None, name, time.monotonic_ns()),
            AnswerLog(None),
        )  # fmt: skip

    used = sum(len(text.split()) + 2 for text in TEXTS)
    with using(KeyUse(key, meter)):
        embed("first")
        assert eventually(lambda: meter.used_today("key-a") == used)
        embed("second")
        with pytest.raises(RateLimitError, match="0 are left"):
            embed("third")


class LocalVectors:
    """The server's own worker, asked without HTTP."""

    def __init__(self, server: Any) -> None:
        from engine.llm import LLM

        self._llm = LLM.from_worker(server.host.worker("embedder"))

    def __enter__(self) -> LocalVectors:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def embed(self, texts: list[str]) -> list[Any]:
        return [each.vector for each in self._llm.embed(texts, use_tqdm=False)]


def test_token_ids_dimensions_and_truncation(pooling_server: Any) -> None:
    client = pooling_server.openai
    tokenizer = pooling_server.host.worker("embedder").tokenizer
    ids = [tokenizer.encode(text) for text in TEXTS]
    by_ids = client.embeddings.create(model="embedder", input=ids)
    by_text = client.embeddings.create(model="embedder", input=TEXTS, dimensions=8)
    for one, other in zip(by_ids.data, by_text.data, strict=True):
        head = np.array(one.embedding[:8])
        np.testing.assert_allclose(other.embedding, head / np.linalg.norm(head), rtol=0, atol=1e-6)
    single = client.embeddings.create(model="embedder", input=ids[0])
    np.testing.assert_allclose(single.data[0].embedding, by_ids.data[0].embedding, rtol=0, atol=1e-6)
    long = " ".join(WORDS[:70])
    with pytest.raises(BadRequestError, match="72 tokens, the model reads 64"):
        client.embeddings.create(model="embedder", input=long)
    cut = client.embeddings.create(model="embedder", input=long, extra_body={"truncate_prompt_tokens": -1})
    assert cut.usage.prompt_tokens == 64


def test_rerank_sorts_cuts_and_tells_the_documents(pooling_server: Any) -> None:
    documents = ["w4 w5", "w1 w2", {"text": "w7"}, "w8 w9 w10"]
    body = {"model": "reranker", "query": "w1 w2", "documents": documents}
    everything = pooling_server.http.post("/v1/rerank", json=body).json()
    scores = [each["relevance_score"] for each in everything["results"]]
    assert scores == sorted(scores, reverse=True)
    assert all(0 <= score <= 1 for score in scores)
    assert sorted(each["index"] for each in everything["results"]) == [0, 1, 2, 3]
    best = pooling_server.http.post("/v1/rerank", json={**body, "top_n": 2, "return_documents": False}).json()
    assert [each.keys() for each in best["results"]] == [{"index", "relevance_score"}] * 2
    assert [each["index"] for each in best["results"]] == [
        each["index"] for each in everything["results"][:2]
    ]
    # float32 sums of another batch
    assert [each["relevance_score"] for each in best["results"]] == pytest.approx(scores[:2], abs=1e-6)
    for path in ("/rerank", "/v2/rerank"):  # vLLM's other names
        again = pooling_server.http.post(path, json=body).json()["results"]
        assert [each["relevance_score"] for each in again] == pytest.approx(scores, abs=1e-6)
    place = next(each for each in everything["results"] if each["index"] == 2)
    assert place["document"] == {"text": "w7"}
    pairs = {"model": "reranker", "text_1": "w1 w2", "text_2": ["w4 w5", "w1 w2", "w7", "w8 w9 w10"]}
    scored = pooling_server.http.post("/v1/score", json=pairs).json()["data"]
    by_index = {each["index"]: each["relevance_score"] for each in everything["results"]}
    assert {each["index"]: each["score"] for each in scored} == pytest.approx(by_index, abs=1e-6)


def test_score_of_an_embedding_model_is_the_cosine(pooling_server: Any) -> None:
    body = {"model": "embedder", "queries": ["w1 w2", "w3"], "documents": ["w1 w2", "w5 w6 w7"]}
    same, other = pooling_server.http.post("/v1/score", json=body).json()["data"]
    assert same["score"] == pytest.approx(1.0, abs=1e-6)
    with LocalVectors(pooling_server) as vectors:
        a, b = vectors.embed(["w3", "w5 w6 w7"])
    assert other["score"] == pytest.approx(float(a @ b), abs=1e-6)


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/chat/completions", {"model": "embedder", "messages": [{"role": "user", "content": "hi"}]}, "/v1/embeddings"),
        ("/v1/completions", {"model": "reranker", "prompt": "hi"}, "/v1/rerank"),
        ("/v1/embeddings", {"model": "reranker", "input": "w1"}, "rates pairs of texts"),
        ("/v1/embeddings", {"model": "embedder", "input": []}, "input holds 0 texts"),
        ("/v1/embeddings", {"model": "embedder", "input": "w1", "dimensions": 33}, "the model has 32"),
        ("/v1/embeddings", {"model": "embedder", "input": "w1", "dimensions": 0}, "dimensions must be"),
        ("/v1/embeddings", {"model": "embedder", "input": "w1", "prompt_name": "query"}, "no prompt 'query'"),
        ("/v1/embeddings", {"model": "embedder", "input": "w1", "encoding_format": "int8"}, "encoding_format"),
        ("/v1/embeddings", {"model": "embedder", "input": [[1, 99]]}, "outside the vocabulary"),
        ("/v1/rerank", {"model": "labels", "query": "w1", "documents": ["w2"]}, "3 labels"),
        ("/v1/rerank", {"model": "reranker", "query": "w1", "documents": []}, "documents holds 0"),
        ("/v1/rerank", {"model": "reranker", "query": "w1", "documents": ["w2"], "top_n": -1}, "top_n"),
        ("/v1/score", {"model": "reranker", "text_1": ["w1", "w2"], "text_2": ["w1", "w2", "w3"]}, "cannot be paired"),
        ("/v1/score", {"model": "reranker", "text_1": "w1"}, "two sides"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_a_400_that_says_what_can(
    pooling_server: Any, path: str, body: dict[str, Any], message: str
) -> None:
    answer = pooling_server.http.post(path, json=body)
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]["message"]
    assert pooling_server.host.worker("embedder").health().ok


def test_texts_of_several_clients_share_batches_and_are_counted(pooling_server: Any) -> None:
    texts = [" ".join(WORDS[i : i + 4]) for i in range(12)]
    worker = pooling_server.host.worker("embedder")
    before = worker.stats()

    def ask(text: str) -> list[float]:
        return pooling_server.openai.embeddings.create(model="embedder", input=[text, text]).data[1].embedding

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(ask, texts))
    with LocalVectors(pooling_server) as vectors:
        for one, other in zip(found, vectors.embed(texts), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)
    after = worker.stats()
    assert after.finished["length"] - before.finished.get("length", 0) == 3 * len(texts)
    assert after.steps - before.steps < 3 * len(texts)
    families = {f.name: f for f in text_string_to_metric_families(pooling_server.http.get("/metrics").text)}
    prompts = [s for s in families["quire:prompt_tokens"].samples if s.labels.get("model_name") == "embedder"]
    assert sum(s.value for s in prompts) >= 6 * 3 * len(texts)


@pytest.mark.full
def test_backend_of_the_running_app_embeds_and_reranks_without_loss(
    pooling_server: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    from workbench.settings import Settings

    app = RunningApp(pooling_server.url, 1, "2026-01-01T00:00:00+00:00", "embedder", pooling_server.token)
    with AppBackend(app) as backend:
        found = backend.embed(TEXTS, PoolingParams(pooling="mean"), model="embedder")
        ranking = backend.rerank("w1 w2", TEXTS, model="reranker")
    settings = Settings(home_dir=tmp_path, model=str(folders["embedder"]), threads=1, dtype="float32")
    with LocalBackend(settings) as local:
        expected = local.embed(TEXTS, PoolingParams(pooling="mean"))
        loaded = local.load(str(folders["reranker"]))
        assert [each.index for each in local.rerank("w1 w2", TEXTS, model=loaded)] == [
            each.index for each in ranking
        ]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.vector, other.vector, rtol=0, atol=1e-6)
        assert one.num_prompt_tokens == other.num_prompt_tokens


@pytest.mark.full
def test_chat_model_embeds_and_reranks_by_cosine(real_server: Any) -> None:
    found = real_server.openai.embeddings.create(
        model=real_server.model, input=["the cat", "the cat", "a dog"]
    )
    a, b, c = (np.array(each.embedding) for each in found.data)
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    assert np.linalg.norm(c) == pytest.approx(1.0, abs=1e-6)
    body = {"model": real_server.model, "query": "the cat", "documents": ["a dog", "the cat"]}
    best, second = real_server.http.post("/v1/rerank", json=body).json()["results"]
    assert (best["index"], best["relevance_score"]) == (1, pytest.approx(1.0, abs=1e-6))
    assert second["relevance_score"] == pytest.approx(float(a @ c), abs=1e-5)
