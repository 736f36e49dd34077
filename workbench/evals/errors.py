"""What can be wrong with an evaluation, as typed errors. What is wrong with the input is raised before a request is sent.

WorkbenchError
└── EvaluationError
    ├── DatasetError              a dataset that cannot be used
    │   ├── DatasetNotFoundError      no such file or bundled dataset
    │   ├── DatasetFormatError        a line that is no example: `value` is the line's number
    │   └── DatasetEmptyError         no examples in it
    ├── UnknownScorerError        no scorer of that name
    ├── ScorerError               a scorer that does not fit the dataset, or failed on an example
    ├── GateRulesError            a rules file that cannot be read
    ├── UnknownMetricError        a rule names no metric of the comparison
    ├── CompareSpecError          what is to be compared is not said, or not in a usable form
    └── RecordLostError           the store holds fewer rows than were given to it
"""

from __future__ import annotations

from workbench.errors import WorkbenchError


class EvaluationError(WorkbenchError):
    """Base of this room's errors."""

    code = "evaluation_error"


class DatasetError(EvaluationError, ValueError):
    """The dataset cannot be used."""

    code = "invalid_dataset"


class DatasetNotFoundError(DatasetError):
    """No such file and no bundled dataset of that name."""

    code = "dataset_not_found"


class DatasetFormatError(DatasetError):
    """A line of the file is no example; the message names the line."""

    code = "dataset_format"


class DatasetEmptyError(DatasetError):
    """There are no examples in the file."""

    code = "dataset_empty"


class UnknownScorerError(EvaluationError, ValueError):
    """No scorer of that name."""

    code = "unknown_scorer"


class ScorerError(EvaluationError):
    """The scorer does not fit the dataset, or failed on an example."""

    code = "scorer_failed"


class RequestsFailedError(EvaluationError):
    """Requests failed while they ran; a comparison of the others would be biased."""

    code = "requests_failed"


class GateRulesError(EvaluationError, ValueError):
    """The rules cannot be read."""

    code = "invalid_gate_rules"


class UnknownMetricError(GateRulesError):
    """A rule names a metric that this comparison does not have."""

    code = "unknown_metric"


class CompareSpecError(EvaluationError, ValueError):
    """The job does not say what to compare, or says it in an unusable form."""

    code = "invalid_comparison"


class JobFailedError(EvaluationError):
    """The job ended without a result."""

    code = "job_failed"


class RecordLostError(EvaluationError):
    """Fewer rows came back from the store than were written."""

    code = "records_lost"
