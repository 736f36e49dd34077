"""Feedback of people about requests: thumbs, a score, a comment, a correction. Stored here first, then put on MLflow's traces.

`record` answers only when the row is on the disk, so a vote that was acknowledged is never lost, whether MLflow is up or not.
One person has one opinion of each kind on a request: saying it again replaces it and sends it again. `flush` puts what was
not sent yet onto the request's MLflow trace, with a human source; feedback on requests without a trace, of which none can be
made either, stays and is tried again later. When, is `feedback_keeper`'s affair.

Boundary: rows and their way to MLflow. Who may vote is the API's affair; whether the request existed is not checked here.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import sqlalchemy as sa

from workbench.observe.errors import FeedbackError
from workbench.store import feedback_outbox as outbox
from workbench.store import utc_now

if TYPE_CHECKING:
    from workbench.store import Store

log = logging.getLogger(__name__)

Kind = Literal["thumbs", "score", "comment", "correction"]
KINDS: tuple[Kind, ...] = ("thumbs", "score", "comment", "correction")
UP, DOWN = "up", "down"
MAX_SCORE = 5.0
MAX_CHARS = 100_000  # of a comment or correction
MAX_ID_CHARS = 256
_THUMBS: dict[Any, str] = {UP: UP, DOWN: DOWN, "thumbs_up": UP, "thumbs_down": DOWN, 1: UP, 0: DOWN, -1: DOWN}
_NOBODY = ""  # the user of votes without one; NULL would not equal itself in a search


@dataclass(frozen=True, slots=True)
class Feedback:
    """One person's opinion of one kind on one request."""

    id: int
    request_id: str
    created_at: str  # UTC, ISO 8601; of the last change
    kind: Kind
    value: str | float | None  # thumbs: "up" or "down"; score: 0 … 5
    comment: str | None
    correction: str | None  # what the answer should have been
    user: str | None
    sent_at: str | None  # when it reached MLflow; None: not yet

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class FeedbackSummary:
    """Counts of what people said."""

    num_up: int
    num_down: int
    num_scores: int
    mean_score: float | None
    num_comments: int  # comments given alone or beside another kind
    num_corrections: int
    num_unsent: int


def record(
    store: Store,
    request_id: str,
    kind: str,
    value: Any = None,
    comment: str | None = None,
    *,
    correction: str | None = None,
    user: str | None = None,
) -> Feedback:
    """Keep one opinion, replacing the same person's earlier one of that kind; on the disk when this returns.

    `value`: "up" or "down" (also true/false, 1/-1) for thumbs, a number from 0 to 5 for a score; the text of a comment or
    correction may be given as `value` or under its own name.

    Raises:
        FeedbackError: an unknown kind, a value that it does not take, an id or text that is empty or too long.
        StoreError: it could not be written; nothing was kept.
    """
    row = _checked(request_id, kind, value, comment, correction, user)
    row["created_at"], row["sent_at"] = utc_now(), None
    same = sa.and_(*(outbox.c[name] == row[name] for name in ("request_id", "kind", "user")))
    with store.begin() as connection:  # takes the write lock first: two equal votes at once make one row
        known = connection.execute(sa.select(outbox.c.id).where(same)).scalar()
        if known is None:
            known = connection.execute(sa.insert(outbox).values(**row).returning(outbox.c.id)).scalar_one()
        else:
            connection.execute(sa.update(outbox).where(outbox.c.id == known).values(**row))
    return _feedback({**row, "id": known})


def list_feedback(
    store: Store, *, limit: int = 50, kind: str | None = None, request_ids: Sequence[str] | None = None
) -> list[Feedback]:
    """The newest feedback first. Raises StoreError."""
    query = sa.select(outbox).order_by(outbox.c.created_at.desc(), outbox.c.id.desc()).limit(limit)
    if kind is not None:
        query = query.where(outbox.c.kind == kind)
    if request_ids is not None:
        query = query.where(outbox.c.request_id.in_(list(request_ids)))
    with store.read() as connection:
        return [_feedback(row) for row in connection.execute(query).mappings()]


def summary(store: Store) -> FeedbackSummary:
    """Counts over all feedback. Raises StoreError."""
    with store.read() as connection:
        rows = connection.execute(
            sa.select(outbox.c.kind, outbox.c.value, outbox.c.comment, outbox.c.sent_at)
        ).all()
    thumbs = [row.value for row in rows if row.kind == "thumbs"]
    scores = [float(row.value) for row in rows if row.kind == "score"]
    return FeedbackSummary(
        num_up=thumbs.count(UP),
        num_down=thumbs.count(DOWN),
        num_scores=len(scores),
        mean_score=sum(scores) / len(scores) if scores else None,
        num_comments=sum(1 for row in rows if row.comment),
        num_corrections=sum(1 for row in rows if row.kind == "correction"),
        num_unsent=sum(1 for row in rows if row.sent_at is None),
    )


def flush(
    store: Store,
    client: Any,
    *,
    make_trace: Callable[[str], bool] | None = None,
    stopping: Callable[[], bool] = lambda: False,
    page: int = 200,
) -> int:
    """Put unsent feedback onto the MLflow traces of its requests; how many were sent.

    A trace is found by its client request id, or by the tag that traces of `trace_export` have; where there is none, `make_trace`
    may make it from the request's id, and says whether it did. Feedback without a trace stays unsent and is in nobody's way, and so
    does what MLflow refuses. Sending twice (a crash between MLflow's answer and our mark) replaces the assessment instead of adding
    one. `client` is an MlflowClient; `stopping` is asked before each. Slow: not for an event loop. Raises StoreError.
    """
    sent = 0
    for item in _unsent(store, page):
        if stopping():
            break
        try:
            was_sent = _send(client, item)
            if not was_sent and make_trace is not None and make_trace(item.request_id):
                was_sent = _send(client, item)
            if not was_sent:
                continue
        except Exception as error:  # noqa: BLE001 - MLflow raises its own, HTTP's and the database's; all mean: later
            log.warning("feedback was not sent to MLflow, it stays in the outbox: %s", error)
            break
        changed = outbox.c.created_at != item.created_at  # meanwhile replaced: it must be sent again
        with store.begin() as connection:
            connection.execute(
                sa.update(outbox).where(outbox.c.id == item.id, ~changed).values(sent_at=utc_now())
            )
        sent += 1
    return sent


def num_unsent(store: Store) -> int:
    """What waits in the outbox. Raises StoreError."""
    query = sa.select(sa.func.count()).select_from(outbox).where(outbox.c.sent_at.is_(None))
    with store.read() as connection:
        return int(connection.execute(query).scalar_one())


def _unsent(store: Store, page: int) -> Iterator[Feedback]:
    """All of it, the oldest first, read page by page."""
    last = 0
    while True:
        query = sa.select(outbox).where(outbox.c.sent_at.is_(None), outbox.c.id > last)
        with store.read() as connection:
            rows = connection.execute(query.order_by(outbox.c.id).limit(page)).mappings().all()
        if not rows:
            return
        last = rows[-1]["id"]
        yield from map(_feedback, rows)


def _send(client: Any, item: Feedback) -> bool:
    """Whether a trace of the request exists and now has this feedback."""
    from mlflow.entities import AssessmentSource, AssessmentSourceType, Feedback as Assessment  # noqa: I001
    from mlflow.tracing.client import TracingClient

    traces = _traces_of(client, item.request_id)
    tracing = TracingClient(tracking_uri=client.tracking_uri)
    for trace in traces:
        assessment = Assessment(
            name=item.kind,
            value=_assessed(item),
            source=AssessmentSource(AssessmentSourceType.HUMAN, item.user or "anonymous"),
            rationale=item.comment,
            metadata={"request_id": item.request_id, "feedback_id": str(item.id)},
        )
        earlier = [
            known.assessment_id
            for known in trace.info.assessments
            if (known.metadata or {}).get("feedback_id") == str(item.id)
        ]
        if earlier:
            tracing.update_assessment(trace.info.trace_id, earlier[0], assessment)
        else:
            tracing.log_assessment(trace.info.trace_id, assessment)
    return bool(traces)


def _traces_of(client: Any, request_id: str) -> list[Any]:
    if "'" in request_id:
        return []  # MLflow's filter language cannot quote it, and the API hands out no such id
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    for filter_string in (f"trace.client_request_id = '{request_id}'", f"tags.request_id = '{request_id}'"):
        found = client.search_traces(
            locations=experiments, filter_string=filter_string, max_results=5, include_spans=False
        )
        if found:
            return list(found)
    return []


def _assessed(item: Feedback) -> str | float | bool:
    if item.kind == "thumbs":
        return item.value == UP
    text = item.correction if item.kind == "correction" else item.comment
    return item.value if isinstance(item.value, float) else text or ""


def _checked(
    request_id: str, kind: str, value: Any, comment: str | None, correction: str | None, user: str | None
) -> dict[str, Any]:
    """The row's fields, each in the one form that is stored. Raises FeedbackError."""
    if kind not in KINDS:
        raise FeedbackError(
            f"feedback kind {kind!r} is unknown", value=kind, limit=KINDS, param="kind",
            remedy=f"Use one of {', '.join(KINDS)}.",
        )  # fmt: skip
    row: dict[str, Any] = {
        "request_id": _text("request_id", request_id, MAX_ID_CHARS, needed=True),
        "kind": kind,
        "value": None,
        "comment": _text("comment", comment, MAX_CHARS),
        "correction": _text("correction", correction, MAX_CHARS),
        "user": _text("user", user, MAX_ID_CHARS) or _NOBODY,
    }
    if kind == "thumbs":
        row["value"] = _thumb(value)
    elif kind == "score":
        row["value"] = _score(value)
    else:
        if None not in (row[kind], value) and value != row[kind]:
            raise FeedbackError(
                f"value and {kind} contradict each other", value=value, param="value",
                remedy=f"Send {kind} alone.",
            )  # fmt: skip
        row[kind] = _text(kind, value if row[kind] is None else row[kind], MAX_CHARS, needed=True)
    return row


def _text(name: str, value: Any, max_chars: int, *, needed: bool = False) -> str | None:
    if value is None and not needed:
        return None
    if not isinstance(value, str) or (needed and not value.strip()):
        raise FeedbackError(
            f"{name} must be a text, got {value!r}", value=value, param=name, remedy=f"Send {name} as text."
        )
    if len(value) > max_chars:
        raise FeedbackError(
            f"{name} has {len(value)} characters, the limit is {max_chars}", value=len(value), limit=max_chars,
            param=name, remedy="Send less.",
        )  # fmt: skip
    return value.encode("utf-8", "replace").decode()  # half a surrogate pair fits into no database


def _thumb(value: Any) -> str:
    try:
        return _THUMBS[value]
    except (KeyError, TypeError):
        raise FeedbackError(
            f"thumbs must be up or down, got {value!r}", value=value, limit=(UP, DOWN), param="value",
            remedy="Send value \"up\" or \"down\".",
        ) from None  # fmt: skip


def _score(value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not 0 <= value <= MAX_SCORE:
        raise FeedbackError(
            f"a score must be a number from 0 to {MAX_SCORE:g}, got {value!r}", value=value, limit=(0, MAX_SCORE),
            param="value", remedy="Send value as a number in that range.",
        )  # fmt: skip
    return float(value)


def _feedback(row: Mapping[str, Any] | sa.RowMapping) -> Feedback:
    fields = {name: row[name] for name in Feedback.__dataclass_fields__}
    value = fields["value"]
    if isinstance(value, str) and value not in (UP, DOWN):  # a database without a JSON type hands back text
        fields["value"] = json.loads(value)
    return Feedback(**{**fields, "user": fields["user"] or None})
