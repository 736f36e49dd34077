"""The Fleet page, and endpoints where models are chosen: nothing yet, servers in each state, drain, add and forget; asking one."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from page_world import html_of
from records_world import eventually, settle

from workbench.backends.endpoints import Endpoints, endpoint

LOAD = {
    "server_load": 5, "running": 3, "waiting": 2, "waiting_tokens": 1234, "max_num_seqs": 8, "num_blocks": 512, "free_blocks": 400,
    "block_size": 16, "ready": True, "draining": False, "phase": "ready", "message": "", "models": ["qwen"], "version": "0.1.0",
}  # fmt: skip
TOKENS = [
    ("reasoning_content", "Hm.", -0.2, [("Hm.", -0.2)]),
    ("content", "Hel", -0.1, [("Hel", -0.1), ("Hi", -2.3)]),
    ("content", "lo", -0.5, [("lo", -0.5)]),
]


class Instance:
    """A server in the shape of a Quire instance that answers Hello."""

    def __init__(self) -> None:
        self.load: dict[str, Any] = dict(LOAD)
        self.asked: list[Any] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                models = {"data": [{"id": "qwen", "owned_by": "quire"}]}
                self.send({"/load": outer.load, "/v1/models": models}.get(self.path))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                outer.asked.append(body)
                if self.path in ("/drain", "/resume"):
                    outer.load["draining"] = self.path == "/drain"
                    self.send({"status": "draining", "server_load": 5})
                    return
                events: list[Any] = []
                for part, token, p, top in TOKENS:
                    told = {
                        "token": token,
                        "logprob": p,
                        "top_logprobs": [{"token": t, "logprob": q} for t, q in top],
                    }
                    events.append(
                        {"choices": [{"index": 0, "delta": {part: token}, "logprobs": {"content": [told]}}]}
                    )
                events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
                events.append({"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 3}})
                self.send("".join(f"data: {json.dumps(each)}\n\n" for each in events) + "data: [DONE]\n\n")

            def send(self, body: Any) -> None:
                content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
                self.send_response(404 if body is None else 200)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing on the terminal."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def instance() -> Iterator[Instance]:
    made = Instance()
    yield made
    made.close()


def add_button(at: Any) -> Any:
    return next(each for each in at.button if each.label == "Add the endpoint")


def test_a_first_endpoint_is_added_by_the_form(
    records: Callable[..., Any], open_page: Any, instance: Instance
) -> None:
    world = records(empty=True)
    at = settle(open_page("fleet"))
    assert "No other servers yet" in html_of(at)
    assert any("quire endpoints add" in block.value for block in at.code)
    at.text_input("endpoint_name").set_value("gpu")
    at.text_input("endpoint_url").set_value("http://u:p@x")
    add_button(at).click()
    at = settle(at.run())
    assert "must not hold credentials" in html_of(at)
    at.text_input("endpoint_url").set_value(instance.url)
    add_button(at).click()
    at = settle(at.run())
    assert [each.kind for each in Endpoints(world.store).list()] == ["quire"]
    assert eventually(lambda: "serves qwen" in html_of(at.run()))
    told = html_of(at)
    for figure in (
        "1 of 1",
        "<b>3</b> of 8 slots free",
        "<b>2</b> waiting",
        "<b>1,234</b> tokens queued",
        "<b>400</b> of 512 KV blocks free",
    ):
        assert figure in told, figure
    at.button("forget_gpu").click()
    at = settle(at.run())
    assert eventually(lambda: "No other servers yet" in html_of(at.run()))


def test_an_instance_is_drained_and_one_that_is_down_says_since_when(
    records: Callable[..., Any], open_page: Any, instance: Instance
) -> None:
    world = records(empty=True)
    endpoints = Endpoints(world.store)
    endpoints.add(endpoint("gone", "http://127.0.0.1:9", kind="vllm"))
    endpoints.add(endpoint("gpu", instance.url, kind="quire"))
    at = settle(open_page("fleet"))
    assert eventually(lambda: "has not answered yet" in html_of(at.run()) and "serves qwen" in html_of(at))
    assert "1 of 2" in html_of(at)
    at.button("drain_gpu").click()
    at = settle(at.run())
    assert instance.asked == [{}]
    assert eventually(lambda: "draining" in html_of(at.run()) and at.button("drain_gpu").label == "Resume")
    instance.close()
    assert eventually(lambda: "last answered" in html_of(at.run()))
    assert at.button("drain_gpu").disabled
    assert not at.exception


def test_the_playground_asks_an_endpoint_beside_the_version(
    records: Callable[..., Any], open_page: Any, instance: Instance
) -> None:
    world = records(empty=True)
    Endpoints(world.store).add(endpoint("gpu", instance.url, kind="llama.cpp"))
    at = settle(open_page("playground"))
    assert not at.number_input("min_tokens").disabled
    assert eventually(lambda: "qwen at gpu" in at.run().multiselect("beside").options)
    at.multiselect("beside").select("endpoint:gpu/qwen").run()
    assert at.number_input("min_tokens").disabled
    assert "does not take it" in at.number_input("min_tokens").help
    assert not at.number_input("top_k").disabled
    at.chat_input[0].set_value("Hi").run()
    assert eventually(lambda: "Hello" in html_of(at.run()) or "Hel</span>" in html_of(at))
    told = html_of(at)
    assert "qwen at gpu" in told
    assert "Hm." in told
    assert 'data-tip="' in told
    assert not at.exception
    (sent,) = instance.asked
    assert (sent["model"], sent["messages"][-1]["content"], sent["top_logprobs"]) == ("qwen", "Hi", 5)
    assert "min_tokens" not in sent


def test_a_benchmark_of_an_endpoint_needs_no_device(
    records: Callable[..., Any], open_page: Any, instance: Instance
) -> None:
    world = records(empty=True)
    Endpoints(world.store).add(endpoint("gpu", instance.url, kind="quire"))
    at = settle(open_page("benchmark"))
    assert eventually(lambda: any(each.label == "Whom to load" for each in at.run().selectbox))
    at.selectbox("target").set_value("endpoint:gpu/qwen").run()
    at.button("bench_start").click().run()
    (job,) = world.jobs.list(kind="benchmark")
    assert (job.device, job.spec["model"]) == ("none", "endpoint:gpu/qwen")
