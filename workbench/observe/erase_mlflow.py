"""What MLflow keeps of a user, session or request: traces, with the feedback on them, and records of evaluation datasets.

Traces are found by the ids that our requests' traces have, and by the user, session and request that others' traces name.

Boundary: MLflow, through its client. Imports MLflow: not for the app's process.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from workbench import tracking
from workbench.observe import erase
from workbench.observe.trace_spans import trace_id_of

if TYPE_CHECKING:
    from workbench.observe.erase import Subject
    from workbench.settings import Settings

_CHUNK = 100  # traces of one call
_FILTERS = {
    "user": "metadata.`mlflow.trace.user` = '{}'",
    "session": "metadata.`mlflow.trace.session` = '{}'",
    "request": "trace.client_request_id = '{}'",
}


class MlflowRecords:
    """What MLflow has of a subject, found when this is made.

    Raises:
        RegistryUnreachableError: MLflow does not answer.
    """

    def __init__(self, settings: Settings, subject: Subject, request_ids: set[str]) -> None:
        self._client = tracking.client(settings)
        self._subject = subject
        self._request_ids = request_ids
        self._traces: dict[str, set[str]] = defaultdict(set)  # ids by experiment
        self._records: list[tuple[Any, list[str]]] = []  # a dataset, and its records
        with tracking.reachable(settings):
            for trace in self._found_traces():
                self._traces[trace.experiment_id].add(trace.trace_id)
            trace_ids = set().union(*self._traces.values())
            with self._store():
                self._records = [
                    (dataset, ids) for dataset in self._datasets() if (ids := self._own(dataset, trace_ids))
                ]

    @property
    def num_traces(self) -> int:
        return sum(len(ids) for ids in self._traces.values())

    @property
    def num_records(self) -> int:
        return sum(len(ids) for _, ids in self._records)

    def delete(self) -> None:
        """Remove the records first: by their traces they are found again after a crash."""
        with tracking.reachable(self._client.tracking_uri), self._store():
            for dataset, ids in self._records:
                dataset.delete_records(ids)
            for experiment_id, trace_ids in self._traces.items():
                for chunk in _chunks(sorted(trace_ids)):
                    self._client.delete_traces(experiment_id, trace_ids=chunk)

    def _store(self) -> AbstractContextManager[None]:
        from workbench.evals.datasets import current_store

        return current_store(self._client.tracking_uri)

    def _found_traces(self) -> Iterator[Any]:
        from mlflow.tracing.client import TracingClient

        store = TracingClient(tracking_uri=self._client.tracking_uri).store
        ours = [f"tr-{trace_id_of(request_id):032x}" for request_id in sorted(self._request_ids)]
        for chunk in _chunks(ours):
            yield from store.batch_get_trace_infos(chunk)
        if "'" in self._subject.key:
            return  # MLflow's filter language cannot quote it
        experiments = [each.experiment_id for each in self._client.search_experiments()]
        token: str | None = None
        while experiments:
            page = self._client.search_traces(
                locations=experiments, filter_string=_FILTERS[self._subject.kind].format(self._subject.key),
                max_results=_CHUNK, include_spans=False, page_token=token,
            )  # fmt: skip
            yield from (trace.info for trace in page)
            token = page.token
            if not token:
                return

    def _datasets(self) -> Iterator[Any]:
        token: str | None = None
        while True:
            page = self._client.search_datasets(max_results=_CHUNK, page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def _own(self, dataset: Any, trace_ids: set[str]) -> list[str]:
        """Ids of the dataset's records that were made of the subject's traces or requests."""
        found = []
        for record in dataset.to_df().to_dict("records"):
            source = record["source"]
            trace_id = (getattr(source, "source_data", None) or {}).get("trace_id") or record["source_id"]
            example_id = (record["inputs"] or {}).get("id")
            if trace_id in trace_ids or erase.is_made_of(
                self._subject, self._request_ids, record["tags"], example_id
            ):
                found.append(record["dataset_record_id"])
        return found


def _chunks(ids: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(ids), _CHUNK):
        yield ids[start : start + _CHUNK]
