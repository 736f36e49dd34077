"""Votes: kept when acknowledged, one of a kind a person and request, and on the MLflow trace when there is one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest

from workbench.observe import feedback
from workbench.observe.errors import FeedbackError
from workbench.observe.feedback_keeper import FeedbackKeeper
from workbench.store import Store, open_store

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def home(tmp_path):
    return tmp_path


@pytest.mark.usefixtures("database")
def test_what_was_recorded_is_listed_newest_first(store):
    feedback.record(store, "r1", "thumbs", "up", "nice", user="ada")
    feedback.record(store, "r2", "score", 4)
    feedback.record(store, "r3", "comment", comment="too long")
    feedback.record(store, "r4", "correction", "the answer is 42", user="bob")
    listed = feedback.list_feedback(store)
    assert [
        (item.request_id, item.kind, item.value, item.comment, item.correction, item.user) for item in listed
    ] == [
        ("r4", "correction", None, None, "the answer is 42", "bob"),
        ("r3", "comment", None, "too long", None, None),
        ("r2", "score", 4.0, None, None, None),
        ("r1", "thumbs", "up", "nice", None, "ada"),
    ]
    assert [item.request_id for item in feedback.list_feedback(store, kind="score")] == ["r2"]
    assert [item.request_id for item in feedback.list_feedback(store, request_ids=["r1", "r3"], limit=1)] == [
        "r3"
    ]


@pytest.mark.usefixtures("database")
def test_saying_it_again_replaces_it_for_that_person_alone(store):
    first = feedback.record(store, "r", "thumbs", True, user="ada")
    feedback.record(store, "r", "thumbs", "up", user="bob")
    feedback.record(store, "r", "thumbs", "up")
    again = feedback.record(store, "r", "thumbs", -1, "changed my mind", user="ada")
    feedback.record(store, "r", "thumbs", "up")
    assert again.id == first.id
    assert {(item.user, item.value) for item in feedback.list_feedback(store)} == {
        ("ada", "down"),
        ("bob", "up"),
        (None, "up"),
    }
    counts = feedback.summary(store)
    assert (counts.num_up, counts.num_down, counts.num_comments, counts.num_unsent) == (2, 1, 1, 3)


@pytest.mark.usefixtures("database")
def test_summary_of_nothing_has_no_mean(store):
    assert feedback.summary(store).mean_score is None
    feedback.record(store, "a", "score", 2)
    feedback.record(store, "b", "score", 5)
    assert feedback.summary(store).mean_score == 3.5


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"request_id": "r", "kind": "star", "value": 1}, "kind"),
        ({"request_id": "", "kind": "thumbs", "value": "up"}, "request_id"),
        ({"request_id": "r" * 300, "kind": "thumbs", "value": "up"}, "request_id"),
        ({"request_id": "r", "kind": "thumbs", "value": "sideways"}, "value"),
        ({"request_id": "r", "kind": "thumbs", "value": ["up"]}, "value"),
        ({"request_id": "r", "kind": "score", "value": 6}, "value"),
        ({"request_id": "r", "kind": "score", "value": float("nan")}, "value"),
        ({"request_id": "r", "kind": "score", "value": True}, "value"),
        ({"request_id": "r", "kind": "comment"}, "comment"),
        ({"request_id": "r", "kind": "comment", "comment": " "}, "comment"),
        ({"request_id": "r", "kind": "correction", "value": 3}, "correction"),
        ({"request_id": "r", "kind": "correction", "value": "a", "correction": "b"}, "value"),
        ({"request_id": "r", "kind": "comment", "value": "x" * 100_001}, "comment"),
    ],
)  # fmt: skip
def test_bad_feedback_is_refused_by_name_and_nothing_is_kept(store, given, param):
    with pytest.raises(FeedbackError) as refused:
        feedback.record(store, **given)
    assert refused.value.param == param
    assert feedback.list_feedback(store) == []


@pytest.mark.usefixtures("database")
def test_equal_votes_at_once_make_one_row_and_no_vote_is_lost(tmp_path):
    problems: list[Exception] = []

    def vote(worker: int) -> None:
        try:
            with open_store(tmp_path) as own:
                for number in range(50):
                    feedback.record(own, "shared", "thumbs", number % 2 == 0, user="ada")
                    feedback.record(own, f"own-{worker}-{number}", "thumbs", "up")
        except Exception as error:  # noqa: BLE001 - told in the main thread
            problems.append(error)

    threads = [threading.Thread(target=vote, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    with open_store(tmp_path) as store:
        listed = feedback.list_feedback(store, limit=1000)
    assert len(listed) == 201
    assert sum(item.request_id == "shared" for item in listed) == 1


def test_sigkill_loses_no_acknowledged_vote(tmp_path):
    script = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from workbench.observe import feedback
        from workbench.store import open_store
        store = open_store(Path(sys.argv[1]))
        for number in range(100000):
            feedback.record(store, f"{sys.argv[2]}-{number}", "comment", comment="c" * 2000)
            print(f"{sys.argv[2]}-{number}", flush=True)
        """
    )
    acknowledged: set[str] = set()
    for kill in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path), str(kill)], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert process.stdout is not None
        acknowledged |= {process.stdout.readline().strip() for _ in range(5 + 7 * kill)}
        process.send_signal(signal.SIGKILL)
        acknowledged |= {line.strip() for line in process.stdout if line.endswith("\n")}
        process.wait()
        process.stdout.close()
    with open_store(tmp_path) as store:
        listed = feedback.list_feedback(store, limit=100_000)
    assert acknowledged <= {item.request_id for item in listed}
    assert all(item.comment == "c" * 2000 for item in listed)


@pytest.mark.filterwarnings("ignore")  # MLflow's own, in MLflow's code
def test_feedback_reaches_the_trace_of_its_request_as_a_persons(tmp_path, store: Store, monkeypatch):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri)
    mlflow.set_tracking_uri(uri)
    try:
        experiment = client.create_experiment(
            "quire/traces", artifact_location=(tmp_path / "artifacts").as_uri()
        )
        mlflow.set_experiment(experiment_id=experiment)
        with mlflow.start_span("request"):
            mlflow.update_current_trace(client_request_id="traced")
        mlflow.flush_trace_async_logging()
        feedback.record(store, "traced", "thumbs", "up", "nice", user="ada")
        feedback.record(store, "traced", "correction", "42")
        feedback.record(store, "untraced", "thumbs", "down")

        assert feedback.flush(store, client) == 2
        feedback.record(
            store, "traced", "thumbs", "down", user="ada"
        )  # changed: sent again, as the same assessment
        assert feedback.flush(store, client) == 1
        assert feedback.flush(store, client) == 0

        (trace,) = client.search_traces(locations=[experiment], include_spans=False)
        said = {each.name: each for each in trace.info.assessments}
        assert len(trace.info.assessments) == 2
        assert said["thumbs"].value is False
        assert said["thumbs"].source.source_type == "HUMAN"
        assert said["thumbs"].source.source_id == "ada"
        assert said["correction"].value == "42"
    finally:
        mlflow.set_tracking_uri(None)
    assert [item.request_id for item in feedback.list_feedback(store) if item.sent_at is None] == ["untraced"]


def test_mlflow_being_down_keeps_feedback_in_the_outbox(store, caplog, fault):
    class Down:
        tracking_uri = "http://127.0.0.1:9"

        def search_experiments(self) -> list[object]:
            raise ConnectionError("connection refused")

    feedback.record(store, "r", "thumbs", "up")
    assert feedback.flush(store, Down()) == 0
    assert feedback.list_feedback(store)[0].sent_at is None
    assert "stays in the outbox" in caplog.text
    fault(
        "MLflow is down: feedback", fails="nothing: feedback is acknowledged by the store", goes_on="all",
        afterwards="feedback stays in the outbox until it is on its trace",
    )  # fmt: skip


class Mlflow:
    """MLflow's client as far as the outbox needs it before it sends: there is no trace, or it does not answer."""

    tracking_uri = "http://127.0.0.1:9"

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.is_down = False

    def search_experiments(self) -> list[object]:
        if self.is_down:
            raise ConnectionError("connection refused")
        return []

    def search_traces(self, *, filter_string: str, **more: object) -> list[object]:
        self.asked.append(filter_string)
        return []


def test_feedback_without_a_trace_is_in_nobodys_way(store):
    for number in range(5):
        feedback.record(store, f"r{number}", "thumbs", "up")
    mlflow, made = Mlflow(), []
    assert feedback.flush(store, mlflow, make_trace=lambda name: bool(made.append(name)), page=2) == 0
    assert made == [f"r{number}" for number in range(5)]
    assert feedback.num_unsent(store) == 5


def test_the_keeper_connects_only_for_what_waits_and_waits_longer_in_vain(store, eventually):
    connected: list[float] = []
    mlflow = Mlflow()

    def connect() -> Mlflow:
        connected.append(time.monotonic())
        return mlflow

    keeper = FeedbackKeeper(store, connect, every_s=0.01)
    keeper.start()
    try:
        time.sleep(0.1)
        assert connected == []
        mlflow.is_down = True
        feedback.record(store, "first", "thumbs", "up")
        assert eventually(lambda: len(connected) >= 5)
        gaps = [later - earlier for earlier, later in pairwise(connected[:5])]
        assert all(
            gap >= least for gap, least in zip(gaps, (0.015, 0.03, 0.06, 0.12))
        )  # they double from 0.02 s
        mlflow.is_down = False
        feedback.record(store, "second", "thumbs", "up")
        assert eventually(
            lambda: any("second" in each for each in mlflow.asked)
        )  # long before the next retry
    finally:
        keeper.close()
    assert feedback.num_unsent(store) == 2


def test_an_mlflow_that_hangs_does_not_keep_the_keeper_from_closing(store, eventually):
    hanging, asked = threading.Event(), threading.Event()

    def connect() -> None:
        asked.set()
        hanging.wait(30)

    feedback.record(store, "r", "thumbs", "up")
    keeper = FeedbackKeeper(store, connect, every_s=0.01)
    keeper.start()
    assert asked.wait(10)
    began = time.monotonic()
    keeper.close()
    waited_s = time.monotonic() - began
    hanging.set()
    keeper._thread.join(10)
    assert waited_s < 10, "it waited for MLflow"  # 2 s on a machine at rest
