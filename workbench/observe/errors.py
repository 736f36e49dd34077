"""Errors of the observe room.

WorkbenchError
├── EraseError           nobody was named whose records are to go
├── FeedbackError        feedback of an unknown kind, or a value that its kind does not take
└── RequestLogError      the request log cannot be opened, or was asked for something that it does not know
"""

from __future__ import annotations

from workbench.errors import ApiError, WorkbenchError


class FeedbackError(ApiError, ValueError):
    """Feedback that cannot be stored as it is."""

    code = "invalid_feedback"


class EraseError(ApiError, ValueError):
    """What is to be erased is not said."""

    code = "invalid_erase"


class RequestLogError(WorkbenchError, ValueError):
    """The request log cannot do that."""

    code = "request_log_error"
