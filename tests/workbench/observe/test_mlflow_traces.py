"""Traces in a real MLflow server: found by request, with usage, user and session; feedback reaches them, and erase removes them."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.sampling_params import SamplingParams
from workbench import supervisor, tracking
from workbench.evals.datasets import current_store
from workbench.model_card import ModelCard
from workbench.observe import feedback
from workbench.observe.erase import Subject, erase
from workbench.observe.feedback_keeper import FeedbackKeeper
from workbench.ports import bind
from workbench.services import Services
from workbench.settings import Settings
from workbench.versions.errors import RegistryUnreachableError
from workbench.worker_factory import fake_worker

pytestmark = pytest.mark.full


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    """With an MLflow server as `quire up` starts it."""
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    made = Settings(home_dir=tmp_path, mlflow_port=port, trace_sample=1, request_text="full", fake=True)
    folder = tmp_path / "mlflow"
    folder.mkdir()
    command, env = supervisor._mlflow_command(made, folder), supervisor._mlflow_env(made)
    with (tmp_path / "mlflow.log").open("wb") as output:
        server = subprocess.Popen(  # a group of its own, which its guard takes along when it ends
            command, env=env, stdout=output, stderr=output, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 150
        while not tracking.answers(made.mlflow_url):
            assert server.poll() is None, (tmp_path / "mlflow.log").read_text()
            assert time.monotonic() < deadline, "MLflow does not come up"
            time.sleep(0.2)
        yield made
    finally:
        server.terminate()
        server.wait(30)


def test_requests_are_traces_that_take_feedback_and_can_be_erased(settings: Settings) -> None:
    services = Services(settings)
    services.open()
    assert services.request_log is not None
    assert services.store is not None
    card = ModelCard("tickets/3", "", "", False, "", "", "", None, None)
    worker = fake_worker(delay_s=0.001)
    services.attach(card, worker)
    worker.start()
    for request_id, user in (("r1", "ada"), ("r2", "ada"), ("r3", "bob")):
        services.request_log.expect(request_id, {"user": user, "session": f"of {user}", "operation": "chat"})
        worker.submit("hello", SamplingParams(max_tokens=4), request_id=request_id).result()
        services.request_log.add_text(request_id, '[{"role": "user", "content": "hello"}]', f"hi {user}")
    deadline = time.monotonic() + 30
    while services.traces[0].num_sent < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert services.traces[0].num_dropped == 0
    services.request_log.on_row = None  # as where a request is not sampled
    services.request_log.expect("r4", {"user": "cy", "operation": "chat"})
    worker.submit("hello", SamplingParams(max_tokens=4), request_id="r4").result()
    services.request_log.add_text("r4", '[{"role": "user", "content": "hello"}]', "hi cy")
    worker.close()

    client = tracking.client(settings)
    experiment = tracking.experiment(settings, "requests")
    traces = client.search_traces(locations=[experiment])
    told = {trace.info.tags["request_id"]: trace for trace in traces}
    assert set(told) == {"r1", "r2", "r3"}
    info = told["r1"].info
    usage = {"input_tokens": 5, "output_tokens": 4, "total_tokens": 9, "cache_read_input_tokens": 0}
    assert info.token_usage == usage
    assert info.trace_metadata["mlflow.trace.user"] == "ada"
    assert info.trace_metadata["mlflow.trace.session"] == "of ada"
    assert {span.name for span in told["r1"].data.spans} == {"chat tickets/3", "queue", "prefill", "decode"}
    assert "hi ada" in (info.response_preview or "")

    feedback.record(services.store, "r1", "thumbs", "down", user="ada")
    feedback.record(services.store, "r3", "thumbs", "up", user="bob")
    feedback.record(services.store, "r4", "thumbs", "up", user="cy")
    feedback.record(services.store, "never asked", "thumbs", "up")
    keeper = FeedbackKeeper.of(settings, services.store)
    keeper.start()
    deadline = time.monotonic() + 60
    while feedback.num_unsent(services.store) > 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    keeper.close()
    unsent = [each.request_id for each in feedback.list_feedback(services.store) if each.sent_at is None]
    assert unsent == ["never asked"]
    [made] = client.search_traces(locations=[experiment], filter_string="tags.request_id = 'r4'")
    assert {span.name for span in made.data.spans} == {"chat tickets/3", "queue", "prefill", "decode"}
    assert abs(made.info.request_time / 1000 - time.time()) < 600, "its times are those of the log"
    assert [each.value for each in made.info.assessments] == [True]
    with current_store(client.tracking_uri):
        dataset = client.create_dataset(name="made of traces", experiment_id=[experiment])
        dataset.merge_records(
            [
                {"inputs": {"question": name}, "source": {"source_type": "TRACE", "source_data": {"trace_id": t.info.trace_id}}}
                for name, t in told.items()
            ]
        )  # fmt: skip
    services.close()

    away = settings.model_copy(update={"mlflow_tracking_uri": "http://127.0.0.1:9"})
    with pytest.raises(RegistryUnreachableError):
        erase(away, services.store, Subject("user", "ada"))
    planned = erase(settings, services.store, Subject("user", "ada"), dry_run=True)
    done = erase(settings, services.store, Subject("user", "ada"))
    assert (done.requests, done.feedback, done.traces) == (planned.requests, planned.feedback, planned.traces)
    assert (done.requests, done.feedback, done.traces, done.dataset_records, done.left) == (2, 1, 2, 2, [])
    left = client.search_traces(locations=[experiment])
    assert sorted(trace.info.tags["request_id"] for trace in left) == ["r3", "r4"]
    assert [len(trace.info.assessments) for trace in left] == [1, 1]
    again = erase(settings, services.store, Subject("user", "ada"))
    assert (again.requests, again.feedback, again.traces, again.dataset_records) == (0, 0, 0, 0)
    with current_store(client.tracking_uri):
        questions = [each["question"] for each in client.get_dataset(dataset.dataset_id).to_df()["inputs"]]
    assert questions == ["r3"]
