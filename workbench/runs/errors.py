"""Errors of notebooks and schedules.

RunsError
├── UnknownNotebookError        no notebook of that name
├── NotebookFormatError         no parameters cell, or one that holds more than annotated scalars
├── NotebookParameterError      an unknown parameter, or a value of another type
├── NotebookFailedError         a cell raised; cell, error and traceback are kept with the job
├── ScheduleError               a trigger that cannot be read, or will never fire
│   └── SchedulePastError       the time is over
└── UnknownScheduleError        no schedule of that name
"""

from __future__ import annotations

from workbench.errors import WorkbenchError


class RunsError(WorkbenchError):
    """A notebook or schedule cannot be used."""

    code = "runs_error"


class UnknownNotebookError(RunsError, LookupError):
    """No notebook of that name."""

    code = "notebook_not_found"


class NotebookFormatError(RunsError):
    """The file is no notebook, or its parameters cannot be read."""

    code = "notebook_format"


class NotebookParameterError(RunsError, ValueError):
    """A parameter that the notebook does not have, or a value that is not of its type."""

    code = "notebook_parameter"


class NotebookFailedError(RunsError):
    """A cell raised."""

    code = "notebook_failed"


class ScheduleError(RunsError, ValueError):
    """The schedule cannot hold."""

    code = "invalid_schedule"


class SchedulePastError(ScheduleError):
    """The only time of the schedule is over."""

    code = "schedule_in_the_past"


class UnknownScheduleError(RunsError, LookupError):
    """No schedule of that name."""

    code = "schedule_not_found"
