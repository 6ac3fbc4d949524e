"""The questions of `transaction.Reading`, asked in SQL on one connection."""

from services.registry.queries.judging import JudgingQuestions
from services.registry.queries.log import LogQuestions
from services.registry.queries.submissions import SubmissionQuestions
from services.registry.queries.tasks import TaskQuestions


class SqlReading(TaskQuestions, SubmissionQuestions, JudgingQuestions, LogQuestions):
    """`transaction.Reading` over a connection."""
